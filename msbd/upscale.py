"""SR of Algorithm 1: enlarge a stage's result to the next stage's size.

Paper    Ackermann & Li 2022, arXiv:2210.12965, appendix A.2: Real-ESRGAN x4, then bilinear down; its ablation has the others
Tensors  image (1, 3, H, W) in [-1, 1] -> (1, 3, H', W') in [-1, 1]; the upscaler net takes and gives [0, 1]
Copying  needs resize.py and crops.py
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .crops import Box
from .resize import low_pass, resize, sharpen, take

_PIECE, _CONTEXT = 256, 16  # pixels: pieces the net sees at a time, and what it sees around each


@torch.no_grad()
def super_resolve(
    image: Tensor, size: tuple[int, int], mode: str, upscaler: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """`image` (1, 3, H, W) in [-1, 1] at `size` by "rrdb" (the `upscaler`, then bilinear), "bilinear", "bicubic", "sharpen" or "none".

    "none" repeats pixels. ValueError for "rrdb" without an upscaler, or another word. The same size comes back as it is.
    """
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    if mode == "rrdb":
        if upscaler is None:
            raise ValueError(
                "upscaling_mode is rrdb, but this model has no upscaler; use bilinear, or load one"
            )
        return resize(_in_pieces(upscaler, image / 2 + 0.5) * 2 - 1, size).clamp(-1, 1)
    if mode in ("bilinear", "bicubic"):
        return resize(image, size, mode).clamp(-1, 1)
    if mode == "sharpen":
        return sharpen(resize(image, size))
    if mode == "none":
        return F.interpolate(image, size=size, mode="nearest")
    raise ValueError(f"upscaling_mode is {mode!r}; expected rrdb, bilinear, bicubic, sharpen or none")


def low_pass_reference(reference: Tensor, input_size: tuple[int, int], mode: str) -> Tensor:
    """LP(x_in) of line 20: `reference` (1, 3, H, W), as sharp as the `input_size` picture that was enlarged to its size (A.2).

    `mode` "matching" is the paper's; "half" goes through half the size, "no" leaves it sharp (the ablations of A.4).
    """
    if mode == "no":
        return reference
    if mode == "half":
        return low_pass(reference, (max(1, reference.shape[-2] // 2), max(1, reference.shape[-1] // 2)))
    return low_pass(reference, input_size)


def _in_pieces(upscaler: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
    """The upscaler over a whole picture in pieces, each with context around it, so that memory does not grow with the picture."""
    height, width = image.shape[-2:]
    rows = []
    for top in range(0, height, _PIECE):
        row = []
        for left in range(0, width, _PIECE):
            h, w = min(_PIECE, height - top), min(_PIECE, width - left)
            rows_seen, columns_seen = (
                side + -side % 4 + 2 * _CONTEXT for side in (h, w)
            )  # x2, x1: multiples of 4
            piece = take(image, Box(top - _CONTEXT, left - _CONTEXT, rows_seen, columns_seen))
            large = _run(upscaler, piece)
            scale = large.shape[-1] // piece.shape[-1]
            edge = scale * _CONTEXT
            row.append(large[..., edge : edge + scale * h, edge : edge + scale * w])
        rows.append(torch.cat(row, dim=-1))
    return torch.cat(rows, dim=-2)


def _run(upscaler: Any, image: Tensor) -> Tensor:
    parameter = next(upscaler.parameters(), None) if hasattr(upscaler, "parameters") else None
    return upscaler(image if parameter is None else image.to(parameter)).float().to(image.device)
