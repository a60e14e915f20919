"""How close two pictures are, and how sure one can be of a figure measured on a few.

Papers   Wilson 1927 (interval of a share); Efron & Tibshirani 1993, "An Introduction to the Bootstrap", section 13.3
Tensors  images (B, 3, H, W) in [-1, 1]; masks (B, 1, H, W), weights of the pixels
Copying  this file stands alone: torch and numpy
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def squared_error(image: Tensor, reference: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared error (B,) of `image` (B, 3, H, W) in [-1, 1] against `reference`, in units of the [0, 1] range.

    With `mask` (B, 1, H, W) the mean over what it weighs; NaN where it is empty. ValueError for shapes that differ.
    """
    if image.shape != reference.shape:
        raise ValueError(
            f"a picture of shape {tuple(image.shape)} cannot be compared with one of {tuple(reference.shape)}"
        )
    error = ((image.double() - reference.double()) / 2).square()
    weight = torch.ones_like(error) if mask is None else mask.double().expand_as(error)
    return (error * weight).sum(dim=(1, 2, 3)) / weight.sum(dim=(1, 2, 3))


def psnr(image: Tensor, reference: Tensor, mask: Tensor | None = None) -> Tensor:
    """Peak signal-to-noise ratio (B,) in dB, 10 log10(range^2 / squared error); infinite for equal pictures.

    Arguments as of `squared_error`.
    """
    return -10 * torch.log10(squared_error(image, reference, mask))


def edge_step(image: Tensor, mask: Tensor) -> Tensor:
    """Mean difference across the edge of `mask` (B, 1, H, W), in 8-bit levels, of `image` (B, 3, H, W) in [-1, 1]: (B,).

    Over all pairs of pixels side by side or one above the other of which exactly one is masked, and the three channels, the mean
    of |difference|. NaN where the mask has no edge.
    """
    inside = mask > 0.5
    total, pairs = image.new_zeros(len(image), dtype=torch.float64), mask.new_zeros(len(mask))
    for dim in (-2, -1):
        crossing = inside.narrow(dim, 1, inside.shape[dim] - 1) ^ inside.narrow(dim, 0, inside.shape[dim] - 1)
        total = total + (image.diff(dim=dim).abs().double() * crossing).sum(dim=(1, 2, 3))
        pairs = pairs + crossing.sum(dim=(1, 2, 3))
    return total / (pairs * image.shape[1]) * 127.5


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """95 % interval (low, high) in [0, 1] of a share of which `right` of `count` trials were seen (Wilson's score interval).

    Unlike share +- 1.96 standard errors it stays within [0, 1] and is sound for few trials and for 100 %.
    """
    if not 0 <= right <= count or count == 0:
        raise ValueError(f"{right} of {count} is no share")
    z = 1.959964
    share, spread = right / count, z * z / count
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    low, high = min(middle - half, share), max(middle + half, share)
    return max(low, 0.0), min(high, 1.0)  # 0 and 1 exactly, without rounding


def bootstrap_interval(values: Sequence[float], *, draws: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """95 % interval (low, high) of the mean of `values`: percentiles of the means of `draws` resamples.

    For a paired difference give the differences. ValueError without a value.
    """
    if len(values) == 0:
        raise ValueError("no values: the mean of nothing has no interval")
    array, rng = np.asarray(values, np.float64), np.random.default_rng(seed)
    means = array[rng.integers(len(array), size=(draws, len(array)))].mean(axis=1)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)
