"""Read a stored reference case: `tests/golden/<family>/<case>.safetensors` with the `.json` that says how it
was made.

What can be made again to the bit is not stored. A sidecar's `made` says how, per tensor,
in one of these ways:

| keys of the recipe | the tensor |
|---|---|
| `seeded_input`, `shape`, `seed`, perhaps `times`, `plus`, `clamp` | seeded_weights.seeded_input(...) |
| `picture`, `rows`, `columns`, `layout` | a crop of scikit-image's, uint8 (H, W, 3); "nchw": (1, 3, H, W) |
| `over_255` | the named uint8 tensor / 255 |
| `float_of` | the named uint8 tensor as float32 (masks of 0 and 1) |
| `clip_normalised` | the named uint8 picture, normalised as CLIP's preprocessing does |
| `values`, `index` | the first named tensor's values at the second's places (for few values) |
| `same_as` | another tensor of the case |

Of the tensors that a sidecar's `strided` names, every n-th value is stored, as `<name>.strided`; n shares no
factor with the tensor's sizes, so every channel, row and column is met.
Files whose name ends in `.gz` or `.xz` are compressed; `.xz` with a model of each of a number's four bytes
(LZMA's lp = 2), by which float32 takes a seventh less.
"""

import gzip
import json
import lzma
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load
from torch import Tensor

from tests.helpers.seeded_weights import seeded_input

GOLDEN = Path(__file__).resolve().parents[1] / "golden"

_CLIP_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
_CLIP_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


@dataclass(frozen=True)
class Golden:
    """One case: `tensors` by stored name (`in.*`, `out.*`, `mid.*`, ...) and `meta`, the sidecar."""

    tensors: dict[str, Tensor]
    meta: dict[str, Any]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def has(self, name: str) -> bool:
        """Whether the tensor `name` is stored or made, whole or every n-th value of it."""
        return name in self.tensors or f"{name}.strided" in self.tensors

    def sampled(self, name: str, out: Tensor) -> tuple[Tensor, Tensor]:
        """`out` and the stored tensor `name`, both as far as `name` is stored: whole, or every n-th value."""
        stride = self.meta.get("strided", {}).get(name)
        return (out, self[name]) if stride is None else (out.flatten()[::stride], self[f"{name}.strided"])


def stored_bytes(path: str) -> bytes | None:
    """The content of `tests/golden/<path>`, which may lie there compressed as `<path>.gz` or `<path>.xz`;
    None where it does not lie there at all.
    """
    file = GOLDEN / path
    for suffix, unpack in ((".gz", gzip.decompress), (".xz", lzma.decompress)):
        packed = file.with_name(file.name + suffix)
        if packed.exists():
            return unpack(packed.read_bytes())
    return file.read_bytes() if file.exists() else None


def read_json(path: str) -> Any:
    """The content of the JSON file `tests/golden/<path>`, compressed or not."""
    content = stored_bytes(path)
    assert content is not None, f"{path} is not in tests/golden"
    return json.loads(content)


def read_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Key -> shape of a net's file, as `tests/golden/manifests/<name>.json` lists them."""
    listed = read_json(f"manifests/{name}.json")
    return {key: tuple(shape) for key, shape in listed.get("keys", listed).items()}


def load_golden(family: str, case: str) -> Golden:
    """The case `family/case`; a case without tensors (only numbers in its sidecar) has an empty `tensors`.

    Lists of keys that several sidecars share are read from `manifests/` into their places. Skips the test
    where a tensor is a crop of a scikit-image picture and there is no scikit-image.
    """
    meta = read_json(f"{family}/{case}.json")
    for described in (meta.get("weights"), meta.get("lora")):
        for key, value in described.items() if isinstance(described, dict) else ():
            if "shapes" in key and str(value).startswith("manifests/"):
                described[key] = read_json(value)["keys"]
    content = stored_bytes(f"{family}/{case}.safetensors")
    tensors = load(content) if content else {}
    for name, recipe in meta.get("made", {}).items():
        tensors[name] = _made(recipe, tensors)
    return Golden(tensors, meta)


def _made(recipe: dict[str, Any], stored: dict[str, Tensor]) -> Tensor:
    """The tensor of one recipe of a sidecar's `made`; `stored` holds what the recipe names."""
    if "seeded_input" in recipe:
        made = seeded_input(recipe["seeded_input"], recipe["shape"], recipe["seed"])
        made = made * recipe["times"] if "times" in recipe else made
        made = made + recipe["plus"] if "plus" in recipe else made
        return made.clamp(*recipe["clamp"]) if "clamp" in recipe else made
    if "picture" in recipe:
        picture = getattr(pytest.importorskip("skimage.data"), recipe["picture"])()
        crop = torch.from_numpy(picture[slice(*recipe["rows"]), slice(*recipe["columns"])].copy())
        return crop.permute(2, 0, 1)[None].contiguous() if recipe.get("layout") == "nchw" else crop
    if "over_255" in recipe:
        return stored[recipe["over_255"]] / 255
    if "float_of" in recipe:
        return stored[recipe["float_of"]].float()
    if "clip_normalised" in recipe:
        return (stored[recipe["clip_normalised"]] / 255 - _CLIP_MEAN) / _CLIP_STD
    if "index" in recipe:
        return stored[recipe["values"]][stored[recipe["index"]].int()]
    return stored[recipe["same_as"]]


def relative_error(out: Tensor, ref: Tensor) -> float:
    """max|out - ref| / max|ref|, the measure of every parity test (DESIGN section 6)."""
    assert out.shape == ref.shape, f"shape {tuple(out.shape)}, reference {tuple(ref.shape)}"
    out, ref = out.detach().to(torch.float64).cpu(), ref.to(torch.float64).cpu()
    return ((out - ref).abs().max() / ref.abs().max()).item()
