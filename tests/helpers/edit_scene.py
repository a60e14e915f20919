"""The picture, mask and options that the tests of the edit pipeline share."""

from typing import Any

import torch
from torch import Tensor

from msbd.edit.config import EditConfig
from msbd.edit.pipeline import EditPipeline, EditResult
from msbd.pixels.box import Box
from msbd.pixels.resize import resize

FAST = EditConfig(
    num_steps=4,
    repaint_steps=1,
    first_stage_batch=2,
    upscaling_mode="bilinear",
    decoder_optimization=False,
    guidance_scale=1.0,
)
TARGET = (0.5, -0.5, 0.0)


def picture(height: int, width: int, seed: int = 0) -> Tensor:
    """A smooth picture with some grain, (1, 3, H, W), inside (-1, 1) and on no 8-bit level."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 5, 7, generator=generator) * 1.6 - 0.8
    return resize(coarse, (height, width)) + 0.1 * torch.rand(1, 3, height, width, generator=generator)


def rectangle(height: int, width: int, *boxes: Box) -> Tensor:
    """A mask (1, 1, H, W) of these boxes."""
    mask = torch.zeros(1, 1, height, width)
    for box in boxes:
        mask[..., box.top : box.bottom, box.left : box.right] = 1
    return mask


IMAGE = picture(200, 220)
MASK = rectangle(200, 220, Box(40, 30, 130, 150))  # three stages: 64, 96 and, in tiles, 208 x 208


def shown(pipeline: EditPipeline, config: EditConfig, **kwargs: Any) -> tuple[EditResult, dict[str, Tensor]]:
    """The edit of IMAGE, and every picture it showed on the way, by name."""
    pictures: dict[str, Tensor] = {}
    result = pipeline(
        IMAGE, MASK, "a house", config=config, on_picture=lambda name, x: pictures.update({name: x}), **kwargs
    )
    return result, pictures
