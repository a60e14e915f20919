"""CLIP reranking: how well do candidate pictures fit the prompt?

Papers   Radford et al. 2021 (CLIP), arXiv:2103.00020; Ackermann & Li 2022, arXiv:2210.12965, "Approach"
         (ViT-L/14, best of five)
Tensors  images (B, 3, H, W) in [-1, 1]; ids (1, 77); scores (B,), higher = better, logit_scale x cosine
Copying  needs edit/crops.py, pixels/box.py, pixels/preprocess.py, pixels/resize.py; the CLIP is any module
         with `encode_image`, `encode_text` and `logit_scale` (a logarithm)
"""

import math
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..pixels.box import Box
from ..pixels.preprocess import CLIP_MEAN, CLIP_STD, clip_pixels
from ..pixels.resize import take
from .crops import crop_box


class CLIP(Protocol):
    """What is needed of a CLIP: projected, not normalised embeddings (B, D)."""

    @property
    def logit_scale(self) -> Tensor: ...

    def encode_image(self, pixels: Tensor, /) -> Tensor: ...

    def encode_text(self, ids: Tensor, /) -> Tensor: ...


@torch.no_grad()
def clip_scores(
    clip: CLIP,
    ids: Tensor,
    images: Tensor,
    *,
    box: Box | None = None,
    size: int = 224,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
) -> Tensor:
    """The score (B,), exp(logit_scale) * cosine, of each of `images` for one tokenized prompt.

    `images` (B, 3, H, W) in [-1, 1], `ids` (1, 77). CLIP's preprocessing would cut the ends off a picture
    that is not square; such a one has the mean score of the fewest squares that cover it. With `box` (of the
    mask) only what lies around it is looked at; the official code scores the whole crop, background included.
    The text is encoded once, the squares one at a time. `size`, `mean` and `std` are the CLIP's own:
    ViT-L/14's by default.
    """
    if box is not None:
        images = take(images, crop_box(box, (images.shape[-2], images.shape[-1]), 1.0, 1))
    text = F.normalize(clip.encode_text(ids).float(), dim=-1)  # (1, D)
    cosines = []
    for square in _squares(images.shape[-2], images.shape[-1]):
        pixels = clip_pixels(take(images, square), size=size, mean=mean, std=std).to(clip.logit_scale.dtype)
        pictures = torch.cat([F.normalize(clip.encode_image(one[None]).float(), dim=-1) for one in pixels])
        cosines.append((pictures @ text.T)[:, 0])  # (B, D) @ (D, 1) -> (B,)
    return clip.logit_scale.float().exp() * torch.stack(cosines).mean(0)


def _squares(height: int, width: int) -> list[Box]:
    """The fewest squares of the shorter side that cover a picture, evenly spaced along it."""
    side, longer = sorted((height, width))
    gaps = math.ceil(longer / side) - 1
    starts = [round(k * (longer - side) / gaps) for k in range(gaps + 1)] if gaps else [0]
    return [Box(start, 0, side, side) if height > width else Box(0, start, side, side) for start in starts]
