"""What a model's files say besides its tensors: the noise schedule it was trained on, its native size, its
pictures' normalisation.

Reads    the safetensors metadata (JSON under `config`, modelspec.prediction_type), config.json's sample_size,
         scheduler_config.json, the .yaml beside a single file; what is absent is as in Stable Diffusion 1.x
         and in CLIP
Copying  this file, detect.py, extras.py, fields.py, files.py, hub.py, keymap.py, merge.py, ncnn.py,
         pickles.py and taesd.py; torch, safetensors
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .detect import stored_config, table_of
from .extras import told
from .files import MAX_HEADER, WeightsError
from .hub import Source, source_metadata

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
BETA_SCHEDULES = ("scaled_linear", "linear", "squaredcos_cap_v2")

_CELL = 8  # pixels per latent cell of Stable Diffusion, in which config.json counts
_CELLS = 16  # a native size is a multiple of this many cells, so that 3/2 of it is one of 64 pixels


@dataclass(frozen=True)
class Training:
    """How a U-Net was trained; the defaults are Stable Diffusion 1.x's. What is None its user decides."""

    prediction_type: str = "epsilon"  # one of PREDICTION_TYPES
    beta_schedule: str = "scaled_linear"  # one of BETA_SCHEDULES
    beta_start: float = 0.00085
    beta_end: float = 0.012
    rescale_betas_zero_snr: bool = False  # to pure noise at the end (Lin et al. 2023, arXiv:2305.08891)
    native: int | None = None  # side of its pictures in pixels
    multiple: int | None = None  # sizes it takes are multiples of this many pixels
    guidance_scale: float | None = None
    trained_betas: tuple[float, ...] | None = None  # (1000,), instead of a schedule between two betas


def read_training(
    source: Source,
    scheduler: Mapping[str, Any],
    marks: Iterable[str] = (),
    prediction_type: str | None = None,
) -> Training:
    """Of the U-Net at `source`, beside which `scheduler` is scheduler_config.json's content; `marks` are
    those that its file has (canonical.Contents).

    `prediction_type` overrules what all these say of it. Raises WeightsError, also where a mark says one
    thing and the file's metadata or the scheduler another.
    """
    path, config, marked = source.path, read_config(source, "unet"), told(marks)
    own = {"prediction_type": prediction_type} if prediction_type else {}
    _check_agree(path, marked, config, scheduler, own)
    said = {**scheduler, **_native(source), **_beside(path), **config, **marked, **own}
    training = Training(
        prediction_type=said.get("prediction_type", Training.prediction_type),
        beta_schedule=said.get("beta_schedule", Training.beta_schedule),
        beta_start=_number(path, said, "beta_start", Training.beta_start),
        beta_end=_number(path, said, "beta_end", Training.beta_end),
        rescale_betas_zero_snr=_flag(path, said, "rescale_betas_zero_snr"),
        native=_count(path, said, "native"),
        multiple=_count(path, said, "multiple"),
        guidance_scale=_number(path, said, "guidance_scale") if "guidance_scale" in said else None,
        trained_betas=_betas(path, said),
    )
    for name, known in (("prediction_type", PREDICTION_TYPES), ("beta_schedule", BETA_SCHEDULES)):
        if getattr(training, name) not in known:
            raise WeightsError(
                f"{path}: configured for {name} = {getattr(training, name)!r:.40}, expected one of {', '.join(known)}"
            )
    if not training.beta_start < training.beta_end < 1:
        raise WeightsError(
            f"{path}: configured for betas from {training.beta_start} to {training.beta_end}, expected 0 < start < end < 1"
        )
    if said.get("num_train_timesteps", 1000) != 1000:
        raise WeightsError(
            f"{path}: configured for num_train_timesteps = {said['num_train_timesteps']!r:.40}, expected 1000"
        )
    return training


def _check_agree(
    path: Path,
    marked: Mapping[str, Any],
    config: Mapping[str, Any],
    scheduler: Mapping[str, Any],
    overruled: Mapping[str, Any],
) -> None:
    """WeightsError where a file's marks say something else than what lies in or beside it."""
    kind = "prediction_type"
    for where, table, names in (
        ("its metadata", config, (kind, "rescale_betas_zero_snr")),
        # A scheduler's flags are often left at their defaults.
        ("scheduler_config.json", scheduler, (kind,)),
    ):
        for name in names:
            if name in marked and name not in overruled and table.get(name, marked[name]) != marked[name]:
                way_out = "; say which with --prediction-type" if name == kind else ""
                raise WeightsError(
                    f"{path}: marked for {name} = {marked[name]}, but {where} says {table[name]!r:.40}{way_out}"
                )


def read_restoring(source: Source) -> dict[str, Any]:
    """What the ControlNet of PASD at `source` likes, as far as its file says: guidance_scale,
    conditioning_scale, uses_prompts (the flag `prompts`).
    """
    said = read_config(source, "controlnet")
    scales = ("guidance_scale", "conditioning_scale")
    found: dict[str, Any] = {name: _number(source.path, said, name) for name in scales if name in said}
    return found | ({"uses_prompts": _flag(source.path, said, "prompts")} if "prompts" in said else {})


def read_normalisation(
    source: Source, mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation, RGB in [0, 1], of the pictures that the CLIP at `source` was trained on,
    or those given.
    """
    said = {"image_mean": mean, "image_std": std} | read_config(source, "clip")
    for name in ("image_mean", "image_std"):
        values = said[name]
        numbers = isinstance(values, tuple) and all(type(a) in (int, float) and abs(a) < 1e30 for a in values)
        if not numbers or len(values) != 3 or (name == "image_std" and min(values) <= 0):
            raise WeightsError(f"{source.path}: configured for {name} = {values!r}, expected three numbers")
    return said["image_mean"], said["image_std"]


def read_config(source: Source, part: str) -> dict[str, Any]:
    """What the metadata of a file say of its `part`; {} for a file without any. Raises WeightsError."""
    try:
        metadata = source_metadata(source)
        kind = {"v": "v_prediction", "epsilon": "epsilon"}.get(metadata.get("modelspec.prediction_type", ""))
        usual = {"prediction_type": kind} if kind and part == "unet" else {}
        return usual | table_of(stored_config(metadata), part)
    except WeightsError as error:
        known = str(error).startswith(str(source.path))
        raise WeightsError(str(error) if known else f"{source.path}: {error}") from None


def _beside(path: Path) -> dict[str, str]:
    """The one line that matters of the .yaml that comes with single files trained to predict v."""
    yaml = path.with_suffix(".yaml")
    if not yaml.is_file() or yaml.stat().st_size > MAX_HEADER:
        return {}
    found = re.search(
        r"^\s*parameterization:\s*[\"']?v[\"']?\s*$", yaml.read_text(errors="replace"), re.MULTILINE
    )
    return {"prediction_type": "v_prediction"} if found else {}


def _native(source: Source) -> dict[str, int]:
    cells = source.config.get("sample_size")
    return {"native": _CELL * cells} if type(cells) is int and cells > 0 and cells % _CELLS == 0 else {}


def _number(path: Path, said: Mapping[str, Any], name: str, usual: float = 0.0) -> float:
    value = said.get(name, usual)
    if type(value) not in (int, float) or not 0 < value < 1e30:
        raise WeightsError(f"{path}: configured for {name} = {value!r:.40}, expected a number above 0")
    return float(value)


def _flag(path: Path, said: Mapping[str, Any], name: str) -> bool:
    value = said.get(name) or False
    if type(value) is not bool:
        raise WeightsError(f"{path}: configured for {name} = {value!r:.40}, expected true or false")
    return value


def _betas(path: Path, said: Mapping[str, Any]) -> tuple[float, ...] | None:
    values = said.get("trained_betas")
    if values is None:
        return None
    numbers = isinstance(values, list | tuple) and all(type(a) in (int, float) and 0 < a < 1 for a in values)
    if not numbers or len(values) != 1000:
        raise WeightsError(
            f"{path}: configured for trained_betas = {values!r:.40}, expected 1000 numbers between 0 and 1"
        )
    return tuple(float(a) for a in values)


def _count(path: Path, said: Mapping[str, Any], name: str) -> int | None:
    value = said.get(name)
    if value is not None and (type(value) is not int or value < 1):
        raise WeightsError(f"{path}: configured for {name} = {value!r}, expected pixels, 1 or more")
    return value
