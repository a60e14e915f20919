"""Folders as the Hugging Face hub has them: one per model, in it one per net, each with config.json and its
tensors.

Reads    diffusers folders (model_index.json, unet/, vae/, text_encoder/, tokenizer/, scheduler/), PASD's
         (unet/, controlnet/), a net's own folder, files in shards, ncnn's graphs; and the older names that
         such files have
Copying  this file, keymap.py, ncnn.py, taesd.py, files.py and pickles.py; torch and safetensors through
         them
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from .files import MAX_HEADER, WeightsError, first_line, read_metadata, read_state_dict
from .keymap import KeyMap
from .ncnn import is_ncnn, ncnn_files, read_ncnn
from .taesd import HALVES, half_of, other_half

# Parts, each in the folder of its name. CLIP as a whole (openai/clip-vit-large-patch14) lies in a folder of
# its own.
PART_FOLDERS = ("unet", "vae", "text_encoder", "controlnet")

# The tensors of a net's folder, best first: safe before pickled, whole precision before half. `non_ema` is
# never taken.
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_ENDINGS = (
    ".safetensors", ".safetensors.index.json", ".fp16.safetensors", ".fp16.safetensors.index.json", ".safetensors.index.fp16.json",
    ".bin", ".bin.index.json", ".fp16.bin", ".bin.index.fp16.json",
)  # fmt: skip

# ---- older names, as data: (older, canonical) --------------------------------------------------------------

# The autoencoder's attention until diffusers 0.17.
_ATTENTION = (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"))
OLD_VAE = KeyMap(
    (f"{half}.mid_block.attentions.0.{old}", f"{half}.mid_block.attentions.0.{new}")
    for half in ("encoder", "decoder")
    for old, new in _ATTENTION
)
# A text or vision model saved by transformers 5 lacks the name of its half.
BARE_TEXT = KeyMap((name, f"text_model.{name}") for name in ("embeddings", "encoder", "final_layer_norm"))
BARE_VISION = KeyMap(
    (name, f"vision_model.{name}") for name in ("embeddings", "pre_layrnorm", "encoder", "post_layernorm")
)


def hub_map(keys: Iterable[str]) -> KeyMap | None:
    """The map to canonical names for a net with these keys; None where they are canonical already, or not of
    this kind.
    """
    keys = set(keys)
    if "encoder.mid_block.attentions.0.query.weight" in keys:
        return OLD_VAE
    if "embeddings.token_embedding.weight" in keys:
        return BARE_TEXT
    return BARE_VISION if "embeddings.patch_embedding.weight" in keys else None


# ---- folders -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """Where one net's tensors lie."""

    path: Path  # a weights file, or the index of its shards
    config: Mapping[str, Any] = field(default_factory=dict)  # what the config.json beside it says


def find_source(folder: Path) -> Source:
    """The tensors of the net whose folder this is. Raises WeightsError naming what it looked for."""
    for stem in _STEMS:
        for ending in _ENDINGS:
            if (path := folder / (stem + ending)).is_file():
                return Source(path, read_json(folder / "config.json"))
    raise WeightsError(
        f"{folder}: no weights here; expected one of {', '.join(stem + '.safetensors' for stem in _STEMS)} (or .bin)"
    )


def find_sources(folder: Path) -> dict[str, Source]:
    """Part -> source, for the parts that a model's folder has; {} if it is no such folder."""
    return {part: find_source(folder / part) for part in PART_FOLDERS if (folder / part).is_dir()}


def source_metadata(source: Source) -> dict[str, str]:
    """The metadata of a source's safetensors file; {} for any other. Raises WeightsError."""
    if source.path.name.endswith(".json") or is_ncnn(source.path):  # the index of shards, or a graph
        return {}
    return read_metadata(source.path)


def source_of(path: Path) -> Source:
    """A single file, and the config.json beside it where the file has the name of a net's folder."""
    named = any(path.name.startswith(f"{stem}.") for stem in _STEMS)
    return Source(path, read_json(path.with_name("config.json")) if named else {})


def read_source(source: Source) -> dict[str, Tensor]:
    """All tensors, of every shard; keys as stored, of ncnn's files basicsr's. Raises WeightsError."""
    if is_ncnn(source.path):
        return read_ncnn(source.path)
    if not source.path.name.endswith(".json"):
        return _both_halves(source.path, read_state_dict(source.path))
    index = _read_index(source.path)
    state: dict[str, Tensor] = {}
    for name in sorted(set(index.values())):
        state |= read_state_dict(source.path.with_name(name))
    if wrong := state.keys() ^ index.keys():
        raise WeightsError(
            f"{source.path}: {len(wrong)} tensors are in the index or in the shards but not in both, first {min(wrong)!r:.80}; "
            "download all shards again"
        )
    return state


def _both_halves(path: Path, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state`; of a half of TAESD both halves, the other one from the file beside it. WeightsError without
    it.
    """
    if (half := half_of(state)) is None:
        return state
    beside = other_half(path, half)
    if not beside.is_file():
        raise WeightsError(f"{path}: the {half} of TAESD alone; put {beside.name} beside it")
    other = read_state_dict(beside)
    if (found := half_of(other)) in (None, half):
        raise WeightsError(f"{beside}: beside the {half} of TAESD, but not its other half")
    halves = {half: state, found: other}
    return {f"{name}.{key}": tensor for name in HALVES for key, tensor in halves[name].items()}


def source_files(source: Source) -> list[Path]:
    """Every file that `read_source` opens. Raises WeightsError for an index that is none."""
    if is_ncnn(source.path):
        return [*ncnn_files(source.path)]
    if not source.path.name.endswith(".json"):
        named = any(half in source.path.name for half in HALVES)  # else no more need be looked at
        half = half_of(read_state_dict(source.path)) if named else None
        return [source.path] if half is None else [source.path, other_half(source.path, half)]
    shards = set(_read_index(source.path).values())
    return [source.path, *(source.path.with_name(name) for name in sorted(shards))]


def _read_index(path: Path) -> dict[str, str]:
    """Tensor -> the bare name of the shard that it is in, at least one."""
    index = read_json(path).get("weight_map")
    index = index if isinstance(index, dict) else {}
    names = index.values()
    if not names or not all(isinstance(name, str) and name and name == Path(name).name for name in names):
        raise WeightsError(
            f"{path}: no index of shards; expected a `weight_map` from tensors to files beside it"
        )
    return index


def read_json(path: Path) -> dict[str, Any]:
    """The table in a JSON file; {} if there is no file. Raises WeightsError for anything that is no table."""
    if not path.is_file():
        return {}
    if (size := path.stat().st_size) > MAX_HEADER:
        raise WeightsError(f"{path}: {size:,} bytes, no model known here says so much; download it again")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: not a JSON file ({first_line(error)})") from None
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: holds no JSON table, expected {{name: value}}")
    return content
