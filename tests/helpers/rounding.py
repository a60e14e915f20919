"""Comparisons of two computations that are one in mathematics, and what may be compared bit for bit instead.

Bit for bit, on any machine: one computation run twice (the same operations on tensors of the same sizes,
strides and dtype, equally frozen, with as many threads); what is copied or drawn; and what consists of single
roundings, which IEEE 754 fixes: + - * / and sqrt of one pair of numbers at a time, and sums of whole numbers.

Not bit for bit: a sum, a product of matrices, a convolution, a normalisation or a softmax within another
batch, tile or layout, or among other threads. A library chooses its loop by these,
and so the order of the roundings.

Nor a frozen net beside one that is not. For tokens that are not contiguous, `torch.matmul` and `F.linear`
make one product of two matrices where an operand requires a gradient, but one product for each picture where
none does (ATen's `should_fold`), under `no_grad` too. An Intel processor with AMX happened to round both
alike; an AMD EPYC with AVX-512 does not. So a test freezes both nets (`requires_grad_(False)`, as `build_net`
does) and goes on comparing bit for bit.
"""

import torch
from torch import Tensor

# Of the largest value: a few dozen roundings, one behind the other.
ROUNDINGS = 64


def assert_same_to_rounding(out: Tensor, expected: Tensor, *, flipped: float = 0.0) -> None:
    """Fail unless max|out - expected| is at most 64 roundings of max|expected|, in the dtype of `expected`.

    `flipped` is the share of values that may be further away: where the computation ends in whole levels or
    in JPEG's coefficients, a value in the middle between two of them goes to either side.
    """
    assert out.shape == expected.shape and out.dtype == expected.dtype
    out, expected = out.detach().cpu(), expected.detach().cpu()
    allowed = ROUNDINGS * torch.finfo(expected.dtype).eps * expected.abs().max()
    away = (out.double() - expected.double()).abs()
    far = (~(away <= allowed)).double().mean().item()
    assert far <= flipped, (
        f"{far:.2%} of the values differ by more than rounding, the most by {away.max():.3g}"
    )
