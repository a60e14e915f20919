"""CLIP reranking: how well do candidate pictures fit the prompt?

Papers   Radford et al. 2021 (CLIP), arXiv:2103.00020; Ackermann & Li 2022, arXiv:2210.12965, "Approach"
         (ViT-L/14, best of five)
Tensors  images (B, 3, H, W) in [-1, 1]; ids (1, 77); scores (B,), higher = better, logit_scale x cosine
Copying  needs crops.py and resize.py; the CLIP is any module with `encode_image`, `encode_text` and
         `logit_scale` (a logarithm)
"""

import math
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..pixels.resize import resize, take
from .crops import Box, crop_box

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of the pictures CLIP was trained on, RGB in [0, 1]
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


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

    `images` (B, 3, H, W) in [-1, 1], `ids` (1, 77). CLIP's preprocessing would cut the ends off a picture that is not square;
    such a one has the mean score of the fewest squares that cover it. With `box` (of the mask) only what lies around it is looked
    at; the official code scores the whole crop, background included. The text is encoded once, the squares one at a time.
    `size`, `mean` and `std` are the CLIP's own: ViT-L/14's by default.
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


def clip_pixels(
    images: Tensor, *, size: int = 224, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD
) -> Tensor:
    """CLIP's preprocessing of `images` (B, 3, H, W) in [-1, 1]: (B, 3, size, size), normalised.

    Bicubic, antialiased, to `size` on the shorter side; the centre square; (x - mean) / std. In float
    throughout, where the original resizes 8-bit pictures: within two levels of it but for a few pixels at
    hard edges. An odd remainder is cut as Hugging Face's processor does it; OpenAI's recipe may be one pixel
    to the right.
    """
    height, width = images.shape[-2:]
    short = min(height, width)
    shape = (size * height // short, size * width // short)
    zero_to_one = (resize(images.float(), shape, "bicubic") / 2 + 0.5).clamp(0, 1)
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    centre = zero_to_one[..., top : top + size, left : left + size]
    shift, spread = (centre.new_tensor(values).view(1, 3, 1, 1) for values in (mean, std))
    return (centre - shift) / spread
