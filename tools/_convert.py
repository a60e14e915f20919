"""Any model to safetensors under canonical names; another model or LoRAs mixed in on the way, if asked for."""

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msbd.load_nets import Shelf, fit_net, read_lora_file
from weights.files import WeightsError, is_pickle, read_metadata, write_safetensors
from weights.hub import Source
from weights.ldm import to_ldm
from weights.locate import Located, locate
from weights.lora import merge_loras, read_lora
from weights.merge import blend, pack_delta
from weights.settings import read_config, read_training
from weights.tokenizer import load_tokenizer

BLENDED = ("unet", "vae", "text_encoder")  # what belongs to a base model

State = Mapping[str, Tensor]


def reads_pickles(args: argparse.Namespace) -> bool:
    """Whether converting would open a pickle, of the model or of what is mixed in."""
    others = [path for path, _ in (*args.lora, *([args.blend] if args.blend else []))]
    files = [
        file for model in (args.model, *others) for paths in locate(model).files().values() for file in paths
    ]
    return any(is_pickle(file) for file in files if file.suffix != ".json")


def convert(args: argparse.Namespace) -> Iterator[Path]:
    """Write what `args` ask for; each file's path as it is there. Raises WeightsError, ValueError."""
    model = Conversion(args)
    if args.pasd_delta:
        yield model.write(args.output, pack_delta(model.tensors("unet"), model.tensors("controlnet")))
    elif args.layout == "ldm":
        parts = {part: model.tensors(part) for part in model.parts if part in BLENDED}
        yield model.write(args.output, to_ldm(parts))
    elif args.output.suffix == ".safetensors":
        if len(model.parts) != 1:
            raise WeightsError(
                f"{args.model}: has {', '.join(model.parts)}; name a folder with -o, or one of them with --part"
            )
        yield model.write_part(model.parts[0], args.output)
    else:
        args.output.mkdir(exist_ok=True)
        for part in model.parts:
            yield model.write_part(part, args.output / f"{part}.safetensors")
        if model.located.tokenizer and not args.part:
            path = args.output / "tokenizer.json"
            load_tokenizer(model.located.tokenizer).save(path)
            yield path


class Conversion:
    """A model that is read part by part, changed, and written."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.located: Located = locate(args.model)
        self._shelf = Shelf(self.located)
        self._dtype: torch.dtype | None = getattr(torch, args.dtype) if args.dtype else None
        self._inputs = [file for files in self.located.files().values() for file in files]
        self._loras = [(read_lora_file(path), weight) for path, weight in args.lora]
        self._other, self._weight = (None, 0.0)
        if args.blend:
            path, self._weight = args.blend
            self._other = Shelf(locate(path))
        there = tuple(self.located.nets)
        if args.part and args.part not in there:
            raise WeightsError(f"{args.model}: has no {args.part}; it has {', '.join(there)}")
        self.parts: tuple[str, ...] = (args.part,) if args.part else there

    def tensors(self, part: str) -> dict[str, Tensor]:
        """One part's tensors with everything mixed in, in the dtype asked for."""
        state, _ = self._shelf.tensors(part)
        if self._other is not None and part in BLENDED:
            state = blend(state, self._other.tensors(part)[0], self._weight)
        if part in ("unet", "text_encoder"):
            state |= merge_loras({part: state}, self._loras).get(part, {})
        return {key: tensor.to(self._dtype) for key, tensor in state.items()} if self._dtype else state

    def write_part(self, part: str, path: Path) -> Path:
        """One part as a file of its own, with its sizes and settings in the metadata."""
        state, source = self.tensors(part), self.located.net(part)
        if part == "lora":
            metadata = read_metadata(source.path)  # PEFT keeps a layer's alpha there
            read_lora(state, source.path, metadata)
            return self.write(path, state, metadata=metadata)
        if part == "pasd_added":
            return self.write(path, state)
        fit = fit_net(state, source)
        if wrong := (*fit.missing, *fit.unknown, *fit.misshapen):
            raise WeightsError(
                f"{source.path}: {part} is not complete ({len(wrong)} misfits, first {wrong[0]!r:.120}); see `tools.models keys`"
            )
        return self.write(path, state, asdict(fit.net.config) | self._settings(part, source))

    def write(
        self,
        path: Path,
        state: State,
        config: Mapping[str, Any] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Path:
        """`state` as safetensors. ValueError rather than writing over what is being read."""
        if any(path.exists() and path.samefile(file) for file in self._inputs):
            raise ValueError(f"{path}: the output would overwrite what is read; take another name")
        write_safetensors(path, state, {"config": json.dumps(config)} if config else metadata)
        return path

    def _settings(self, part: str, source: Source) -> dict[str, Any]:
        said = read_config(source)
        if part == "unet":
            said |= {
                name: value
                for name, value in asdict(read_training(source, self.located.scheduler)).items()
                if value is not None
            }
        return said
