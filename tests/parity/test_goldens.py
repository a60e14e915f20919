"""The stored cases in half precision and on a GPU; tests/nets and tests/weights have float32 on the CPU."""

import gc
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers.goldens import GOLDEN
from tests.helpers.parity_cases import CASES, Case, error_of, moved

PLACES = [
    ("cpu", torch.bfloat16),
    ("cuda", torch.float32),
    ("cuda", torch.bfloat16),
    ("cuda", torch.float16),
]


def parameters() -> list[Any]:
    """Every case at every place where it is meant to run; full-size nets on the GPU only."""
    found = []
    for case in CASES:
        for device, dtype in PLACES:
            if case.allowed(device, dtype) is not None and not (case.full and device == "cpu"):
                marks = [pytest.mark.full] * case.full + [pytest.mark.cuda] * (device == "cuda")
                name = f"{case.label}-{device}-{str(dtype).removeprefix('torch.')}"
                found.append(pytest.param(case, device, dtype, id=name, marks=marks))
    return found


KEPT: dict[str, nn.Module] = {}


def built(case: Case) -> nn.Module:
    """The case's net, which stays for the next case that has it; the one before is gone by then."""
    if case.net not in KEPT:
        KEPT.clear()
        gc.collect()
        KEPT[case.net] = case.build(case.source.meta)
    return KEPT[case.net]


@pytest.mark.parametrize(("case", "device", "dtype"), parameters())
def test_net_equals_reference(case: Case, device: str, dtype: torch.dtype) -> None:
    error = error_of(case, moved(built(case), device, dtype), device, dtype)
    assert error <= (case.allowed(device, dtype) or 0)


@pytest.mark.parametrize("family", sorted({case.family for case in CASES}))
def test_every_stored_case_is_listed(family: str) -> None:
    stored = {path.name.split(".")[0] for path in (GOLDEN / family).glob("*.json*")}  # or compressed
    wrapper = {name for name in stored if name.startswith("esrganer_")}  # pictures: tests/nets/test_rrdb.py
    assert {case.name for case in CASES if case.family == family} == stored - wrapper
