"""Masks: from a picture's pixels to a stage's pixels and to latent cells, grown, or feathered.

Tensors  masks (B, 1, H, W) float, 1 = edit, 0 = keep; sizes are (H, W)
Copying  needs pixels/box.py; torch and numpy
"""

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .box import Box

LatentRule = Literal["any", "center"]


def resize_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """`mask` (B, 1, H, W) at `size`, {0, 1}: set wherever a pixel under it is: no thin stroke is lost."""
    binary = (mask > 0).to(mask.dtype)
    if tuple(mask.shape[-2:]) == tuple(size):
        return binary
    if mask.device.type == "mps":  # its adaptive pooling gives wrong values (pytorch issue 190064)
        return resize_mask(mask.cpu(), size).to(mask.device)
    return F.adaptive_max_pool2d(binary, size)  # cell i covers floor(i s) .. ceil((i + 1) s)


def sample_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """`mask` (B, 1, H, W) at `size`, {0, 1}, as the official code does it: bilinear, not antialiased, then >
    0.

    At a factor of 8 this reads the four centre pixels of each cell: up to 3 masked pixels at an edge end up
    in a kept cell, and a 16-pixel stroke at a factor of 44 vanishes more often than not. Hence `resize_mask`.
    """
    return (F.interpolate(mask, size=size, mode="bilinear", align_corners=False) > 0).to(mask.dtype)


def latent_mask(mask: Tensor, factor: int, rule: LatentRule = "any") -> Tensor:
    """`mask` (B, 1, H, W) in latent cells of `factor` pixels: (B, 1, ceil(H/factor), ceil(W/factor)), {0, 1}.

    "any" (ours): one masked pixel sets its cell. "center" (official): see `sample_mask`; H and W are then
    multiples of `factor`.
    """
    if rule == "any":
        return F.max_pool2d((mask > 0).to(mask.dtype), factor, ceil_mode=True)
    if rule == "center":
        return sample_mask(mask, (mask.shape[-2] // factor, mask.shape[-1] // factor))
    raise ValueError(f"unknown latent mask rule {rule!r}; expected 'any' or 'center'")


def dilate(mask: Tensor, radius: int) -> Tensor:
    """`mask` (B, 1, H, W) grown by `radius` pixels or cells, diagonals included; 0 gives it back."""
    if radius < 0:
        raise ValueError(f"a mask is dilated by 0 or more pixels, got {radius}")
    rows = F.max_pool2d(mask, (2 * radius + 1, 1), stride=1, padding=(radius, 0))  # a square is separable
    return F.max_pool2d(rows, (1, 2 * radius + 1), stride=1, padding=(0, radius))


def progressive_dilation(mask: Tensor, progress: float) -> Tensor:
    """`mask` grown by a box of 7, 5, 3, then 1 cells in the four quarters of `progress` (0..1).

    An option of the official code, off by default: progressive mask shrinking of Avrahami et al. 2022
    (Blended Latent Diffusion), arXiv:2206.02779, which widens thin masks early on.
    """
    return dilate(mask, 3 - min(int(4 * progress), 3))


def feather(mask: Tensor, width: int) -> Tensor:
    """Weights (B, 1, H, W) that rise inside the mask: exactly 0 outside, 1 from `width` pixels inside on.

    Linear in the Euclidean distance to the nearest kept pixel. The picture's border is no edge. Width 0 gives
    the hard mask.
    """
    inside = mask > 0.5
    if width <= 0:
        return inside.to(mask.dtype)
    reach = width + 1
    across = _distance_along_rows(inside, reach) ** 2  # (B, 1, H, W), to the row's nearest kept pixel
    squared = across.clone()
    height = mask.shape[-2]
    for shift in range(1, min(reach, height - 1) + 1):
        squared[..., shift:, :] = torch.minimum(squared[..., shift:, :], across[..., :-shift, :] + shift**2)
        squared[..., :-shift, :] = torch.minimum(squared[..., :-shift, :], across[..., shift:, :] + shift**2)
    weight = (squared.sqrt() - 0.5) / width  # the edge runs half a pixel before the first masked one
    return torch.where(inside, weight.clamp(0, 1), 0).to(mask.dtype)


def _distance_along_rows(inside: Tensor, reach: int) -> Tensor:
    """Pixels to the nearest unset pixel of the same row, at most `reach`, float32; 0 where unset."""
    width = inside.shape[-1]
    column = torch.arange(width, device=inside.device).expand(inside.shape)
    left = torch.where(inside, -reach - 1, column).cummax(dim=-1).values
    right = torch.where(inside, width + reach + 1, column).flip(-1).cummin(dim=-1).values.flip(-1)
    return torch.minimum(column - left, right - column).clamp(max=reach).float()


def mask_box(mask: Tensor | np.ndarray) -> Box:
    """The tight box around everything that is set in `mask`, (H, W) or (..., H, W), non-zero = set.

    The official code's extents are one pixel short and come from the mask before thresholding; these are
    exact. ValueError if nothing is set.
    """
    array = mask.detach().cpu().numpy() if isinstance(mask, Tensor) else np.asarray(mask)
    height, width = array.shape[-2:]
    array = np.any(array.reshape(-1, height, width), axis=0)
    rows, columns = np.flatnonzero(np.any(array, axis=1)), np.flatnonzero(np.any(array, axis=0))
    if not len(rows):
        raise ValueError(
            f"the mask ({height} x {width} pixels) is empty; at least one pixel must be set (white = edit)"
        )
    top, left = int(rows[0]), int(columns[0])
    return Box(top, left, int(rows[-1]) + 1 - top, int(columns[-1]) + 1 - left)
