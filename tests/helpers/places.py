"""Where, and in which precision, a net is compared with its oracle."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor


@dataclass(frozen=True)
class Place:
    """A device and a dtype for our net, and how far it may be from the oracle: max|difference| / max|oracle|.

    The oracle runs on the CPU, in float64 beside our float64 and in float32 beside everything else.
    """

    device: str
    dtype: torch.dtype
    tolerance: float

    @property
    def oracle(self) -> torch.dtype:
        """The oracle's dtype."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def put(self, *tensors: Tensor) -> list[Tensor]:
        """The tensors on the device; floating-point ones in the dtype, integers as they are."""
        return [a.to(self.device, self.dtype if a.is_floating_point() else a.dtype) for a in tensors]


# In float64 only a formula that differs shows (5e-15 is left). On a GPU float32 means without TF32, but with
# other algorithms. The same tiny nets on a CPU are up to 4.5e-2 away in bfloat16, 5.2e-3 in float16.
PLACES = [
    pytest.param(Place("cpu", torch.float64, 1e-12), id="cpu-float64"),
    pytest.param(Place("cpu", torch.float32, 1e-5), id="cpu-float32"),
    pytest.param(Place("cuda", torch.float32, 1e-4), id="cuda-float32", marks=pytest.mark.cuda),
    pytest.param(Place("cuda", torch.bfloat16, 8e-2), id="cuda-bfloat16", marks=pytest.mark.cuda),
    pytest.param(Place("cuda", torch.float16, 1e-2), id="cuda-float16", marks=pytest.mark.cuda),
]
