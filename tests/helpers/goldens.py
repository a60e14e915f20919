"""Read a stored reference case: `tests/golden/<family>/<case>.safetensors` with the `.json` that says how it was made."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


@dataclass(frozen=True)
class Golden:
    """One case: `tensors` by stored name (`in.*`, `out.*`, `mid.*`, ...) and `meta`, the sidecar."""

    tensors: dict[str, Tensor]
    meta: dict[str, Any]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]


def load_golden(family: str, case: str) -> Golden:
    """The case `family/case`; a case without tensors (only numbers in its sidecar) has an empty `tensors`."""
    path = GOLDEN / family / f"{case}.json"
    stored = path.with_suffix(".safetensors")
    return Golden(load_file(stored) if stored.exists() else {}, json.loads(path.read_text()))


def relative_error(out: Tensor, ref: Tensor) -> float:
    """max|out - ref| / max|ref|, the measure of every parity test (DESIGN section 6)."""
    assert out.shape == ref.shape, f"shape {tuple(out.shape)}, reference {tuple(ref.shape)}"
    out, ref = out.detach().to(torch.float64).cpu(), ref.to(torch.float64).cpu()
    return ((out - ref).abs().max() / ref.abs().max()).item()
