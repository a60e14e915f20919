"""Any model to safetensors under canonical names; another model or LoRAs mixed in, if asked for."""

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msbd.files import remove_leftovers, whole_file
from msbd.loading.nets import fit_net, read_lora_file
from msbd.loading.parts import BASE, ModelParts
from weights.files import WeightsError, read_metadata, write_safetensors
from weights.ldm import to_ldm
from weights.locate import PARTS, locate
from weights.lora import read_lora
from weights.merge import pack_delta
from weights.settings import read_config, read_training
from weights.tokenizer import load_tokenizer

from .._cli import print_notes

State = Mapping[str, Tensor]
TOKENIZER = "tokenizer.json"


def convert(args: argparse.Namespace) -> Iterator[Path]:
    """Write what `args` ask for; each file's path as it is there. Raises WeightsError, ValueError."""
    model = _Conversion(args)
    if args.pasd_delta:
        nets = {part: model.tensors(part) for part in ("unet", "controlnet")}
        yield model.write(args.output, pack_delta(nets["unet"], nets["controlnet"]), model.configs(nets))
    elif args.layout == "ldm":
        nets = {part: model.tensors(part) for part in BASE if part in model.parts or part == "text_encoder"}
        yield model.write(args.output, to_ldm(nets), model.configs(nets))
    elif args.output.suffix.lower() == ".safetensors":
        if len(model.parts) != 1:
            raise WeightsError(
                f"{args.model}: has {', '.join(model.parts)}; name a folder with -o, or one of them with --part"
            )
        yield model.write_part(model.parts[0], args.output)
    else:
        yield from model.write_folder(args.output)
    print_notes(model.notes, quiet=False)


def copying(model: str | Path, folder: Path) -> argparse.Namespace:
    """The options of `convert` that copy every part of `model` into `folder`."""
    return argparse.Namespace(
        model=model, output=folder, part=None, dtype=None, layout=None, pasd_delta=False, blend=None, lora=[]
    )


class _Conversion:
    """A model that is read part by part, changed, and written."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._located = locate(args.model)
        loras = [(read_lora_file(path), weight) for path, weight in args.lora]
        self._lora_notes = [note for lora, _ in loras for note in lora.notes]
        other, weight = args.blend or (None, 0.0)
        self._parts = ModelParts(self._located, loras, other and locate(other), weight)
        self._dtype: torch.dtype | None = getattr(torch, args.dtype) if args.dtype else None
        self._inputs = [file for files in self._located.files().values() for file in files]
        there = self._parts.parts
        if "pasd_added" in there:
            raise WeightsError(f"{args.model}: a compact export already; it loads as it is, with a base")
        if "asymmetric_added" in there:
            raise WeightsError(
                f"{args.model}: a decoder without its autoencoder; it loads as it is, beside one"
            )
        if args.part and args.part not in there:
            raise WeightsError(f"{args.model}: has no {args.part}; it has {', '.join(there)}")
        self.parts: tuple[str, ...] = (args.part,) if args.part else there
        for lora, _ in loras:
            if not any(layer.part in self.parts for layer in lora.layers):
                raise ValueError(
                    f"{lora.source}: changes none of the parts to be written ({', '.join(self.parts)})"
                )

    @property
    def notes(self) -> list[str]:
        """What of the LoRAs is not in what was written."""
        return [*self._lora_notes, *dict.fromkeys(self._parts.notes)]

    def tensors(self, part: str) -> dict[str, Tensor]:
        """One part's tensors with everything mixed in, in the dtype asked for."""
        state, _ = self._parts.tensors(part)
        return {key: tensor.to(self._dtype) for key, tensor in state.items()} if self._dtype else state

    def write_folder(self, folder: Path) -> Iterator[Path]:
        """Every part as a file of its own, and the tokenizer.

        ValueError where other parts lie there already.
        """
        if folder.suffix.lower() in (".ckpt", ".pth", ".pt", ".bin"):
            raise ValueError(f"{folder}: what is written is safetensors; name it so, or name a folder")
        files = {part: folder / f"{part}.safetensors" for part in (*PARTS, *self.parts)}
        if strangers := [file for part, file in files.items() if part not in self.parts and file.exists()]:
            raise ValueError(
                f"{strangers[0]}: of another model, with which these parts would mix; take a new folder"
            )
        folder.mkdir(exist_ok=True)
        for part in self.parts:
            yield self.write_part(part, files[part])
        if self._located.tokenizer and len(self.parts) > 1:
            self._check(folder / TOKENIZER)
            with whole_file(folder / TOKENIZER) as unfinished:
                load_tokenizer(self._located.tokenizer).save(unfinished)
            yield folder / TOKENIZER

    def write_part(self, part: str, path: Path) -> Path:
        """One part as a file of its own, with its sizes and settings in the metadata."""
        state = self.tensors(part)
        if part == "lora":
            source = self._located.net(part)
            metadata = read_metadata(source.path)  # PEFT keeps a layer's alpha there
            self._lora_notes += read_lora(state, source.path, metadata).notes
            return self._write(path, state, metadata)
        return self.write(path, state, self.configs({part: state})[part])

    def write(self, path: Path, state: State, config: Mapping[str, Any]) -> Path:
        """`state` as safetensors with `config` in its metadata.

        ValueError rather than writing over what is being read.
        """
        return self._write(path, state, {"config": json.dumps(config)})

    def configs(self, nets: Mapping[str, State]) -> dict[str, dict[str, Any]]:
        """Part -> sizes and settings, of each of `nets`. WeightsError for one that is not complete."""
        return {part: self._config(part, state) for part, state in nets.items()}

    def _config(self, part: str, state: State) -> dict[str, Any]:
        from_clip = part == "text_encoder" and part not in self._located.nets
        source = self._located.net("clip" if from_clip else part)
        fit = fit_net(state, source)
        if wrong := (*fit.missing, *fit.unknown, *fit.misshapen):
            raise WeightsError(
                f"{source.path}: {part} is not complete ({len(wrong)} misfits, first {wrong[0]!r:.120}); see `tools.models keys`"
            )
        said = {} if from_clip else read_config(source, part)
        if part == "unet":
            marks = self._located.contents(part).marks
            training = asdict(read_training(source, self._located.scheduler, marks))
            said |= {name: value for name, value in training.items() if value is not None}
        return asdict(fit.net.config) | said

    def _write(self, path: Path, state: State, metadata: Mapping[str, str]) -> Path:
        self._check(path)
        remove_leftovers([path.parent])
        write_safetensors(path, state, metadata)
        return path

    def _check(self, path: Path) -> None:
        if path.is_dir():
            raise ValueError(f"{path}: a folder; name the file to write")
        if any(path.exists() and path.samefile(file) for file in self._inputs):
            raise ValueError(f"{path}: the output would overwrite what is read; take another name")
