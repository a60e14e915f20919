"""A model, by name or path, to where each of its parts lies on this machine. Nothing is downloaded.

Model    a name of registry.py; a folder of files named by their part, as weights/mini/ and `tools.models
         convert` write it; a diffusers or PASD folder; one file with several nets
Copying  this file, canonical.py, detect.py, esrgan.py, extras.py, fetch.py, fetch_hub.py, fields.py,
         files.py, hub.py, keymap.py, ldm.py, lora.py, lora_changes.py, lora_names.py, merge.py, ncnn.py,
         pickles.py, registry.py and taesd.py; torch, safetensors, huggingface_hub
"""

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .canonical import Contents, read_contents
from .fetch import find_spare, local_files
from .files import WeightsError
from .hub import Source, find_sources, read_json, read_source, source_files, source_of
from .registry import MODELS, find_model

# In a flat folder each is in <part>.safetensors.
PARTS = ("unet", "vae", "text_encoder", "clip", "rrdb", "controlnet")
_TOKENIZERS = ("tokenizer.json", "tokenizer/tokenizer.json", "vocab.json", "tokenizer/vocab.json")
# Asymmetric VQGAN: a whole autoencoder, or what its decoder has over a plain one.
DECODERS = ("asymmetric_vae", "asymmetric_added")
# What enlarges a photograph four times, best first.
ENLARGERS = ("realesrgan-x4plus", "realsr-df2k")
# What editing with Stable Diffusion takes besides its own files.
_COMPANIONS = ("clip-vit-l14", *ENLARGERS)


@dataclass(frozen=True)
class Located:
    """Where a model's parts lie, and what was read of them: each file once, however often it is asked for."""

    name: str  # as it was asked for
    nets: Mapping[str, Source]  # part -> tensors; several parts may lie in one file
    tokenizer: Path | None = None
    scheduler: Mapping[str, Any] = field(default_factory=dict)  # scheduler_config.json's content
    companions: frozenset[str] = frozenset()  # parts that are not the model's own, but were on this machine
    # What its user says that the U-Net predicts (epsilon or v_prediction); None: what its files say.
    prediction_type: str | None = None
    _read: dict[Path, Contents] = field(default_factory=dict, repr=False, compare=False)

    def net(self, part: str) -> Source:
        """The source of one part. Raises WeightsError naming what the model has."""
        if set(self.nets) == {"lora"} != {part}:
            raise WeightsError(f"{self.name}: a LoRA, which changes a model and is none; take it with --lora")
        if self.only_enlarges and part != "rrdb":
            raise WeightsError(
                f"{self.name}: an upscaler and nothing else, no {part} there; it enlarges with --method rrdb, and for "
                "another model with --upscaler"
            )
        if part not in self.nets and self.nets.keys() & {*DECODERS}:
            raise WeightsError(
                f"{self.name}: a mask-conditioned decoder (Asymmetric VQGAN), which goes beside a model and its "
                f"autoencoder and takes the place of neither; no {part} there"
            )
        if part not in self.nets:
            raise WeightsError(
                f"{self.name}: no {part} there; it has {', '.join(self.nets) or 'no net at all'}. Add {part}.safetensors to a folder "
                "of its parts (`python -m tools.models convert` makes one)"
            )
        return self.nets[part]

    def contents(self, part: str) -> Contents:
        """What the file of one part holds, mapped where the format allows.

        Raises WeightsError as `net` does, and for a file that cannot be read or holds another net.
        """
        source = self.net(part)
        if source.path not in self._read:
            self._read[source.path] = read_contents(read_source(source), source.path)
        contents = self._read[source.path]
        if len(contents.parts) == 1 and part not in contents.parts:
            raise WeightsError(
                f"{source.path}: holds a {contents.parts[0]}, expected {part}; are two files mixed up?"
            )
        return contents

    def release(self) -> None:
        """Let go of what was read, so that files which cannot be mapped do not stay in memory beside the
        nets.
        """
        self._read.clear()

    @property
    def only_enlarges(self) -> bool:
        """Whether it is an upscaler and nothing else."""
        return set(self.nets) == {"rrdb"}

    def with_part(self, part: str, other: "Located") -> "Located":
        """This model with `part` from `other` in the place of its own. WeightsError where `other` has
        none.
        """
        self._read.update(other._read)
        return replace(self, nets=dict(self.nets) | {part: other.net(part)})

    def without(self, part: str) -> "Located":
        """This model less one part."""
        return replace(self, nets={name: source for name, source in self.nets.items() if name != part})

    def alone(self) -> "Located":
        """The model without its companions."""
        own = {part: source for part, source in self.nets.items() if part not in self.companions}
        return replace(self, nets=own, companions=frozenset())

    def over(self, base: "Located") -> "Located":
        """This model, with the parts, the tokenizer and the scheduler that it lacks from `base`."""
        theirs = dict(base.nets)
        if "clip" in self.nets:  # its text half is this model's text encoder
            theirs.pop("text_encoder", None)
        base._read.update(self._read)  # one place for both, as they share files
        return replace(
            self,
            nets=theirs | dict(self.nets),
            tokenizer=self.tokenizer or base.tokenizer,
            scheduler=self.scheduler or base.scheduler,
            _read=base._read,
        )

    def files(self) -> dict[str, list[Path]]:
        """Part -> every file that it is read from."""
        files = {part: source_files(source) for part, source in self.nets.items()}
        return files | ({"tokenizer": [self.tokenizer]} if self.tokenizer else {})


def locate(model: str | Path, *, companions: bool = False, optional: Collection[str] = ()) -> Located:
    """Where the parts of `model` lie. A name wins over a file or folder of that name (write ./name).

    With `companions`, a file or folder without CLIP, its tokenizer or an upscaler gets those that were
    fetched to this machine. `optional` are parts that a known model may lack where it has them from another
    one. Raises WeightsError for an unknown name, a model that is not on this machine (it says how to fetch
    it), and a folder without any net.
    """
    path = Path(model)
    if str(model) in MODELS or not os.path.exists(path):  # which takes any string, unlike Path.exists
        if str(model) not in MODELS and (path.suffix or len(path.parts) > 1):
            raise WeightsError(f"{str(model)[:200]}: no such file or folder")
        return _named(str(model), optional)  # refuses an unknown name and names the known ones
    if path.is_file() or (path / "unet").is_dir():
        found = _single(path) if path.is_file() else _hub_folder(path)
        return _with_companions(found) if companions else found
    flat = {part: path / f"{part}.safetensors" for part in PARTS}
    nets = {part: Source(file) for part, file in flat.items() if file.is_file()}
    if not nets and (path / "pasd.safetensors").is_file():  # the folder of a training run
        return _single(path / "pasd.safetensors")
    if not nets:
        raise WeightsError(
            f"{path}: no model's folder; expected a diffusers folder (unet/, vae/, text_encoder/), or files named "
            f"{', '.join(file.name for file in flat.values())}"
        )
    found = Located(str(model), nets, _tokenizer(path))
    return _with_companions(found) if companions else found


def find_enlarger() -> Located | None:
    """The first of ENLARGERS that is on this machine; None if none is, or can be used. No network call."""
    for name in ENLARGERS:
        if path := find_spare(MODELS[name].files[0]):
            return Located(name, {"rrdb": Source(path)})
    return None


def _named(name: str, optional: Collection[str]) -> Located:
    files = local_files(find_model(name), optional)  # with those of the models it needs
    nets = {part: Source(files[part], read_json(files[f"{part}_config"]) if f"{part}_config" in files else {})
            for part in (*PARTS, *DECODERS) if part in files}  # fmt: skip
    nets |= {"lora": Source(files["lora"])} if "lora" in files else {}
    read: dict[Path, Contents] = {}
    if "all" in files:
        nets = _one_file(files["all"], read) | nets
    scheduler = read_json(files["scheduler"]) if "scheduler" in files else {}
    return Located(name, nets, files.get("tokenizer"), scheduler, _read=read)


def _one_file(path: Path, read: dict[Path, Contents]) -> dict[str, Source]:
    """Part -> source, for a file that has to be read to know its parts; what it holds goes into `read`."""
    source = source_of(path)
    read[path] = read_contents(read_source(source), path)
    return dict.fromkeys(read[path].parts, source)


def _single(path: Path) -> Located:
    read: dict[Path, Contents] = {}
    return Located(str(path), _one_file(path, read), _tokenizer(path.parent), _read=read)


def _hub_folder(path: Path) -> Located:
    # PASD's colour model has its scheduler beside the checkpoints.
    pasd = [path.parent] if (path / "controlnet").is_dir() else []
    schedulers = [folder / "scheduler" / "scheduler_config.json" for folder in (path, *pasd)]
    scheduler = read_json(next((file for file in schedulers if file.is_file()), schedulers[0]))
    return Located(str(path), find_sources(path), _tokenizer(path), scheduler)


def _tokenizer(folder: Path) -> Path | None:
    return next((folder / name for name in _TOKENIZERS if (folder / name).is_file()), None)


def _with_companions(located: Located) -> Located:
    """With CLIP, the upscaler and CLIP's tokenizer where the model has none and this machine has them."""
    nets, tokenizer = dict(located.nets), located.tokenizer
    if "unet" not in nets:  # a part alone, which nobody edits with
        return located
    for file in (file for name in _COMPANIONS for file in MODELS[name].files):
        there = tokenizer if file.part == "tokenizer" else nets.get(file.part)
        if there or not (path := find_spare(file)):
            continue
        if file.part == "tokenizer":
            tokenizer = path
        else:
            nets[file.part] = Source(path)
    return replace(
        located, nets=nets, tokenizer=tokenizer, companions=frozenset(nets.keys() - located.nets.keys())
    )
