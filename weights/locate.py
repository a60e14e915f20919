"""A model, by name or path, to where each of its parts lies on this machine. Nothing is downloaded.

Model    a name of registry.py; a folder of files named by their part, as weights/mini/ and `tools.models convert` write it;
         a diffusers or PASD folder; one file with several nets
Copying  this file, canonical.py, detect.py, esrgan.py, fetch.py, files.py, hub.py, keymap.py, ldm.py, lora.py, merge.py and
         registry.py; torch, safetensors, huggingface_hub
"""

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .canonical import read_contents
from .fetch import find_local, local_files
from .files import WeightsError
from .hub import Source, find_sources, read_json, read_source, source_files, source_of
from .registry import MODELS, find_model

# In a flat folder each is in <part>.safetensors.
PARTS = ("unet", "vae", "text_encoder", "clip", "rrdb", "controlnet")
_TOKENIZERS = ("tokenizer.json", "tokenizer/tokenizer.json", "vocab.json", "tokenizer/vocab.json")
# What editing with Stable Diffusion takes besides its own files.
_COMPANIONS = ("clip-vit-l14", "realesrgan-x4plus")


@dataclass(frozen=True)
class Located:
    """Where a model's parts lie."""

    name: str  # as it was asked for
    nets: Mapping[str, Source]  # part -> tensors; several parts may lie in one file
    tokenizer: Path | None = None
    scheduler: Mapping[str, Any] = field(default_factory=dict)  # scheduler_config.json's content

    def net(self, part: str) -> Source:
        """The source of one part. Raises WeightsError naming what the model has."""
        if set(self.nets) == {"lora"} != {part}:
            raise WeightsError(f"{self.name}: a LoRA, which changes a model and is none; take it with --lora")
        if part not in self.nets:
            raise WeightsError(
                f"{self.name}: no {part} there; it has {', '.join(self.nets) or 'no net at all'}. Add {part}.safetensors to a folder "
                "of its parts (`python -m tools.models convert` makes one)"
            )
        return self.nets[part]

    def files(self) -> dict[str, list[Path]]:
        """Part -> every file that it is read from."""
        files = {part: source_files(source) for part, source in self.nets.items()}
        return files | ({"tokenizer": [self.tokenizer]} if self.tokenizer else {})


def locate(model: str | Path, *, companions: bool = False, spare: Collection[str] = ()) -> Located:
    """Where the parts of `model` lie. A name wins over a file or folder of that name (write ./name).

    With `companions`, a file or folder without CLIP, its tokenizer or an enlarger gets those that were fetched to this machine.
    `spare` are parts that a known model may lack where it has them from another one.
    Raises WeightsError for an unknown name, a model that is not on this machine (it says how to fetch it), and a folder
    without any net.
    """
    path = Path(model)
    if str(model) in MODELS or not os.path.exists(path):  # which takes any string, unlike Path.exists
        if str(model) not in MODELS and (path.suffix or len(path.parts) > 1):
            raise WeightsError(f"{str(model)[:200]}: no such file or folder")
        return _named(str(model), spare)  # refuses an unknown name and names the known ones
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
    return Located(str(model), nets, _tokenizer(path))


def _named(name: str, spare: Collection[str]) -> Located:
    files = local_files(find_model(name), spare)  # with those of the models it needs
    nets = {part: Source(files[part], read_json(files[f"{part}_config"]) if f"{part}_config" in files else {})
            for part in PARTS if part in files}  # fmt: skip
    if "all" in files:
        nets = _one_file(files["all"]) | nets
    scheduler = read_json(files["scheduler"]) if "scheduler" in files else {}
    return Located(name, nets, files.get("tokenizer"), scheduler)


def _one_file(path: Path) -> dict[str, Source]:
    source = source_of(path)
    return dict.fromkeys(read_contents(read_source(source), path).parts, source)


def _single(path: Path) -> Located:
    return Located(str(path), _one_file(path), _tokenizer(path.parent))


def _hub_folder(path: Path) -> Located:
    # PASD's colour model has its scheduler beside the checkpoints.
    pasd = [path.parent] if (path / "controlnet").is_dir() else []
    schedulers = [folder / "scheduler" / "scheduler_config.json" for folder in (path, *pasd)]
    scheduler = read_json(next((file for file in schedulers if file.is_file()), schedulers[0]))
    return Located(str(path), find_sources(path), _tokenizer(path), scheduler)


def _tokenizer(folder: Path) -> Path | None:
    return next((folder / name for name in _TOKENIZERS if (folder / name).is_file()), None)


def _with_companions(located: Located) -> Located:
    """With CLIP, the enlarger and CLIP's tokenizer added where the model has none and this machine has them."""
    nets, tokenizer = dict(located.nets), located.tokenizer
    if "unet" not in nets:
        return located
    for name in _COMPANIONS:
        for file in MODELS[name].files:
            path = find_local(file)
            if path and file.part == "tokenizer":
                tokenizer = tokenizer or path
            elif path:
                nets.setdefault(file.part, Source(path))
    return replace(located, nets=nets, tokenizer=tokenizer)
