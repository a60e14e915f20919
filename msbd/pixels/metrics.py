"""How close two pictures are, and how sure one can be of a figure measured on a few.

Papers   Wang et al. 2004 (SSIM), doi:10.1109/TIP.2003.819861; Xue et al. 2014 (GMSD), arXiv:1308.3052;
         Hasler & Suesstrunk 2003 (colourfulness), doi:10.1117/12.477378;
         Wilson 1927 (interval of a share); Efron & Tibshirani 1993, "An Introduction to the Bootstrap",
         section 13.3
Tensors  images (B, 3, H, W) in [-1, 1]; masks (B, 1, H, W), weights of the pixels
Copying  needs pixels/luma.py; torch and numpy
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .luma import BT601
from .luma import luma as luma_of  # `luma` is an argument here


def squared_error(image: Tensor, reference: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared error (B,) of `image` (B, 3, H, W) in [-1, 1] against `reference`, in units of the [0, 1]
    range.

    With `mask` (B, 1, H, W) the mean over what it weighs; NaN where it is empty. ValueError for shapes that
    differ.
    """
    _check_same_shape(image, reference)
    error = ((image.double() - reference.double()) / 2).square()
    weight = torch.ones_like(error) if mask is None else mask.double().expand_as(error)
    return (error * weight).sum(dim=(1, 2, 3)) / weight.sum(dim=(1, 2, 3))


def psnr(image: Tensor, reference: Tensor, mask: Tensor | None = None, *, luma: bool = False) -> Tensor:
    """Peak signal-to-noise ratio (B,) in dB, 10 log10(range^2 / squared error); infinite for equal pictures.

    Arguments as of `squared_error`; with `luma` of the pictures' `to_luma`, super-resolution's "PSNR on Y".
    """
    if luma:
        image, reference = to_luma(image), to_luma(reference)
    return -10 * torch.log10(squared_error(image, reference, mask))


def ssim(image: Tensor, reference: Tensor, *, luma: bool = False) -> Tensor:
    """Mean structural similarity (B,) of pictures (B, 3, H, W) in [-1, 1], 1 for equal ones.

    Wang et al. 2004, section III: Gaussian windows of 11 x 11 pixels and sigma 1.5, those that lie in the
    picture, K 0.01 and 0.03; the mean of the three channels, or with `luma` of the pictures' `to_luma`.
    ValueError for shapes that differ, or smaller than a window.
    """
    _check_same_shape(image, reference)
    if min(image.shape[-2:]) < 11:
        raise ValueError(
            f"a picture of shape {tuple(image.shape)} has no SSIM: its windows take at least 11 x 11 pixels"
        )
    if luma:
        image, reference = to_luma(image), to_luma(reference)
    x, y = (picture.double() * 127.5 + 127.5 for picture in (image, reference))
    mean_x, mean_y = _gaussian_means(x), _gaussian_means(y)
    variance_x = _gaussian_means(x * x) - mean_x**2
    variance_y = _gaussian_means(y * y) - mean_y**2
    covariance = _gaussian_means(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    light = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (light * structure).mean(dim=(1, 2, 3))


def gmsd(image: Tensor, reference: Tensor) -> Tensor:
    """Gradient magnitude similarity deviation (B,) of pictures (B, 3, H, W) in [-1, 1], 0 for equal ones.

    Larger is worse. Xue et al. 2014, section II: full-range luma in 0..255, means of 2 x 2 pixels, Prewitt
    gradients, their similarity with c = 170, its standard deviation over all pixels. Zeros continue the
    picture, as in piq. ValueError for shapes that differ.
    """
    _check_same_shape(image, reference)
    x, y = (_gradient_magnitude(_halved(to_luma(picture, full_range=True))) for picture in (image, reference))
    similarity = (2 * x * y + 170) / (x**2 + y**2 + 170)
    return similarity.std(dim=(1, 2, 3), correction=0)


def colourfulness(image: Tensor) -> Tensor:
    """Hasler & Suesstrunk's colourfulness (B,) of `image` (B, 3, H, W) in [-1, 1].

    sqrt(var(rg) + var(yb)) + 0.3 sqrt(mean(rg)^2 + mean(yb)^2) of the opponents rg = R - G and yb = (R + G) /
    2 - B in 8-bit levels: 0 for grey; viewers called 33 moderately and 109 extremely colourful. Training's
    `colourfulness_loss` is another measure, the official code's, of |rg| and |yb|.
    """
    red, green, blue = (image.double() * 127.5).flatten(2).unbind(1)  # (B, H * W)
    opponents = torch.stack((red - green, (red + green) / 2 - blue))
    spread, offset = opponents.var(-1, correction=0).sum(0), opponents.mean(-1).square().sum(0)
    return spread.sqrt() + 0.3 * offset.sqrt()


def hue_error(image: Tensor, reference: Tensor) -> Tensor:
    """Mean error of the hues (B,), in degrees, of `image` (B, 3, H, W) in [-1, 1] against `reference`.

    A colour is the vector (Cb, Cr) of BT.601, its hue the vector's direction and its chroma the length, in
    8-bit levels; luma does not enter. The error at a pixel is the angle between the two vectors, 0 to 180,
    and the mean is weighted by the reference's chroma: the hue of a nearly grey pixel is hardly seen, and
    mostly noise. Below 1 level, the step of 8 bits, a colour counts as grey, which has no hue. Such a pixel
    of `image` has error 90 by definition, what a hue drawn at random has on average, so that leaving out the
    colour is as bad as guessing it; such a pixel of `reference` weighs nothing. NaN where all of it is grey.
    ValueError for shapes that differ.
    """
    _check_same_shape(image, reference)
    (b, r), (true_b, true_r) = (_chroma(picture).unbind(1) for picture in (image, reference))
    angle = torch.atan2((b * true_r - r * true_b).abs(), b * true_b + r * true_r).rad2deg()
    error = torch.where(torch.hypot(b, r) < 1, 90, angle)
    weight = torch.hypot(true_b, true_r)
    weight = torch.where(weight < 1, 0, weight)
    return (error * weight).sum(dim=(1, 2)) / weight.sum(dim=(1, 2))


def to_luma(image: Tensor, *, full_range: bool = False) -> Tensor:
    """BT.601's luma (B, 1, H, W) in float64 of `image` (B, 3, H, W) in [-1, 1], itself in units of [-1, 1].

    Black and white are at 16 and 235 of 255, as in video and in super-resolution's "Y"; with `full_range` at
    0 and 255, where PSNR is 1.32 dB lower.
    """
    y = luma_of(image.double() / 2 + 0.5)
    return (y if full_range else (16 + 219 * y) / 255) * 2 - 1


def _chroma(image: Tensor) -> Tensor:
    """(Cb, Cr) of BT.601, (B, 2, H, W) in float64, 8-bit levels around 0, of `image` (B, 3, H, W)."""
    red, _, blue = (image.double() * 127.5).split(1, dim=1)
    y = to_luma(image, full_range=True) * 127.5
    return torch.cat(((blue - y) / (2 * (1 - BT601[2])), (red - y) / (2 * (1 - BT601[0]))), dim=1)


def _check_same_shape(image: Tensor, reference: Tensor) -> None:
    if image.shape != reference.shape:
        raise ValueError(
            f"a picture of shape {tuple(image.shape)} cannot be compared with one of {tuple(reference.shape)}"
        )


def _gaussian_means(x: Tensor) -> Tensor:
    """Weighted means of `x` (B, C, H, W) over the 11 x 11 windows that lie in it: (B, C, H - 10, W - 10)."""
    ramp = torch.arange(-5, 6, dtype=x.dtype, device=x.device)
    weights = torch.softmax(-(ramp**2) / (2 * 1.5**2), dim=0)  # exp(...) / sum
    planes = x.flatten(0, 1)[:, None]  # (B * C, 1, H, W)
    planes = F.conv2d(F.conv2d(planes, weights.view(1, 1, 11, 1)), weights.view(1, 1, 1, 11))
    return planes.unflatten(0, x.shape[:2])[:, :, 0]


def _halved(luma: Tensor) -> Tensor:
    """Means of 2 x 2 pixels of `luma` (B, 1, H, W) in [-1, 1], in 0..255."""
    height, width = luma.shape[-2:]
    return F.avg_pool2d(F.pad(luma * 127.5 + 127.5, (0, width % 2, 0, height % 2)), 2)


def _gradient_magnitude(x: Tensor) -> Tensor:
    """Of `x` (B, 1, H, W), by Prewitt's kernels divided by 3, zeros around it; the same shape."""
    across = x.new_tensor([[1, 0, -1]] * 3) / 3
    kernels = torch.stack((across, across.T))[:, None]  # (2, 1, 3, 3)
    return F.conv2d(x, kernels, padding=1).square().sum(1, keepdim=True).sqrt()


def edge_step(image: Tensor, mask: Tensor) -> Tensor:
    """Mean difference across the edge of `mask` (B, 1, H, W), in 8-bit levels, of `image` (B, 3, H, W) in
    [-1, 1]: (B,).

    Over all pairs of pixels side by side or one above the other of which exactly one is masked, and the three
    channels, the mean of |difference|. NaN where the mask has no edge.
    """
    inside = mask > 0.5
    total, pairs = image.new_zeros(len(image), dtype=torch.float64), mask.new_zeros(len(mask))
    for dim in (-2, -1):
        crossing = inside.narrow(dim, 1, inside.shape[dim] - 1) ^ inside.narrow(dim, 0, inside.shape[dim] - 1)
        total = total + (image.diff(dim=dim).abs().double() * crossing).sum(dim=(1, 2, 3))
        pairs = pairs + crossing.sum(dim=(1, 2, 3))
    return total / (pairs * image.shape[1]) * 127.5


def border_step(
    image: Tensor, mask: Tensor, rows: Sequence[int], columns: Sequence[int], reach: int
) -> float:
    """How much more the colours of `image` (1, 3, H, W) change across these lines than across others: 1 is
    as much.

    A line's step is the mean, over the places along it and the channels, of |mean of the `reach` pixels
    before it - mean of the `reach` pixels from it on|; places count where `mask` (1, 1, H, W) is set for all
    of them. `rows` are horizontal lines between row y - 1 and y, `columns` vertical ones. The others are all
    lines of the same direction, at least `reach` away from those. NaN where there is none of either.
    """
    near: list[Tensor] = []
    far: list[Tensor] = []
    for dim, lines in ((-2, rows), (-1, columns)):
        means = image.double().unfold(dim, reach, 1).mean(-1)
        inside = (mask > 0.5).unfold(dim, reach, 1).all(-1)
        count = means.shape[dim] - reach
        if count < 1 or not lines:
            continue
        steps = (means.narrow(dim, reach, count) - means.narrow(dim, 0, count)).abs().mean(1, keepdim=True)
        valid = inside.narrow(dim, reach, count) & inside.narrow(dim, 0, count)
        for k in range(count):
            distance = min(abs(k + reach - line) for line in lines)
            if distance == 0 or distance >= reach:
                found = steps.select(dim, k)[valid.select(dim, k)]
                (near if distance == 0 else far).append(found)
    return (torch.cat(near).mean() / torch.cat(far).mean()).item() if near and far else float("nan")


def sharpness(image: Tensor) -> Tensor:
    """Mean length of the luma's gradient, in 8-bit levels a pixel, of `image` (B, 3, H, W) in [-1, 1]: (B,).

    Of differences between neighbours, so that noise counts as much as detail. 0 for a side of 1 pixel.
    """
    luma = to_luma(image, full_range=True) * 127.5
    if min(luma.shape[-2:]) < 2:
        return luma.new_zeros(len(luma))
    across, down = luma.diff(dim=-1)[..., 1:, :], luma.diff(dim=-2)[..., 1:]
    return torch.hypot(across, down).mean(dim=(1, 2, 3))


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """95 % interval (low, high) in [0, 1] of a share of which `right` of `count` trials were seen (Wilson's
    score interval).

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
