"""Colours for the pixels that nobody sees, from those around them.

Source   Gortler et al. 1996, "The Lumigraph", section 3.4 (push and pull)
Tensors  image (B, C, H, W) float in any range; visible (B, 1, H, W) bool
Copying  this file stands alone: torch only
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def fill_hidden(image: Tensor, visible: Tensor) -> Tensor:
    """`image` (B, C, H, W), where each pixel that is not `visible` has the mean of the visible ones near it.

    Near is the smallest of the squares of 2, 4, 8, ... pixels, on a grid, that has any. Visible pixels come
    back as they are, for any hidden ones; with nothing visible all is 0.
    """
    if bool(visible.all()):
        return image
    return torch.where(visible, image, _filled(torch.where(visible, image, 0), visible.to(image.dtype)))


def _filled(image: Tensor, weight: Tensor) -> Tensor:
    """Each pixel of `image`, 0 where `weight` is, or the mean of the smallest square around it with any
    weight.
    """
    if bool((weight > 0).all()) or max(image.shape[-2:]) == 1:
        return image
    size = image.shape[-2:]
    odd = (0, size[1] % 2, 0, size[0] % 2)
    half_weight = F.avg_pool2d(F.pad(weight, odd), 2)
    half = F.avg_pool2d(F.pad(image * weight, odd), 2) / half_weight.clamp_min(1e-12)
    coarse = _filled(half, (half_weight > 0).to(image.dtype))
    wide = coarse.repeat_interleave(2, -2).repeat_interleave(2, -1)[..., : size[0], : size[1]]
    return torch.where(weight > 0, image, wide)
