"""Samples of 8 and 16 bits as tensors, and tensors as samples.

Tensors  image (1, C, H, W) float in [-1, 1]; samples (H, W, C) uint8 or uint16
Copying  this file stands alone: numpy and torch
"""

import numpy as np
import torch
from torch import Tensor


def to_image(samples: np.ndarray) -> Tensor:
    """(H, W, C) uint8 or uint16 -> (1, C, H, W) float32 in [-1, 1]; `to_pixels` gives uint8 exactly back."""
    half = np.iinfo(samples.dtype).max / 2
    return torch.from_numpy(samples.transpose(2, 0, 1).astype(np.float32))[None] / half - 1


def to_pixels(image: Tensor) -> np.ndarray:
    """(1, C, H, W) in [-1, 1] -> (H, W, C) uint8, clamped and rounded (the official code truncates)."""
    levels = ((image[0].detach().float().cpu() + 1) * 127.5).round().clamp(0, 255)
    return levels.permute(1, 2, 0).to(torch.uint8).contiguous().numpy()


def in_8_bits(samples: np.ndarray) -> np.ndarray:
    """uint16 rounded to uint8; uint8 as it is."""
    return (
        samples if samples.dtype == np.uint8 else ((samples.astype(np.uint32) + 128) // 257).astype(np.uint8)
    )
