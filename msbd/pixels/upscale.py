"""SR of Algorithm 1: enlarge a stage's result to the next stage's size.

Paper    Ackermann & Li 2022, arXiv:2210.12965, appendix A.2: Real-ESRGAN x4, then bilinear down; its ablation has the others
Tensors  image (1, 3, H, W) in [-1, 1] -> (1, 3, H', W') in [-1, 1]; the upscaler net takes and gives [0, 1]
Copying  needs crops.py, masks.py, resize.py and tiles.py
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .box import Box
from .masks import dilate, resize_mask
from .resize import low_pass, resize, sharpen, take
from .tiles import touches

_PIECE, _CONTEXT = 256, 16  # pixels: pieces the net sees at a time, and what it sees around each
_REACH = 2  # pixels: how far the bilinear resize after the net looks


@torch.no_grad()
def super_resolve(
    image: Tensor, size: tuple[int, int], mode: str, upscaler: Callable[[Tensor], Tensor] | None = None,
    needed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`image` (1, 3, H, W) in [-1, 1] at `size` by "rrdb" (the `upscaler`, then bilinear), "bilinear", "bicubic", "sharpen" or "none".

    "none" repeats pixels. `needed` (1, 1, H', W') is set where the result will be looked at (None: everywhere): the upscaler,
    which takes nearly all of the time, is run on those pieces only, and elsewhere the picture is bilinear. The same size comes
    back as it is. ValueError for "rrdb" without an upscaler, or another word.
    """
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    if mode == "rrdb":
        if upscaler is None:
            raise ValueError(
                "upscaling_mode is rrdb, but this model has no upscaler; use bilinear, or load one"
            )
        needed = torch.ones_like(image[:, :1]) if needed is None else needed
        asked = resize_mask(needed, (image.shape[-2], image.shape[-1]))
        return resize(_in_pieces(upscaler, image / 2 + 0.5, asked) * 2 - 1, size).clamp(-1, 1)
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


def _in_pieces(upscaler: Callable[[Tensor], Tensor], image: Tensor, asked: Tensor) -> Tensor:
    """The upscaler over the pieces of a picture that `asked` touches, each with context around it; bilinear elsewhere.

    In pieces, so that the net's memory does not grow with the picture.
    """
    height, width = image.shape[-2:]
    asked = dilate(asked, _REACH)
    result = image
    for top in range(0, height, _PIECE):
        for left in range(0, width, _PIECE):
            inner = Box(top, left, min(_PIECE, height - top), min(_PIECE, width - left))
            if not touches(inner, asked):
                continue
            rows, columns = (side + -side % 4 + 2 * _CONTEXT for side in inner.size)  # x2, x1: multiples of 4
            large = _run(upscaler, take(image, Box(top - _CONTEXT, left - _CONTEXT, rows, columns)))
            scale = large.shape[-1] // columns
            if result is image:
                result = resize(image, (height * scale, width * scale)) if scale > 1 else image.clone()
            outer, edge = inner.times(scale), scale * _CONTEXT
            piece = large[..., edge : edge + outer.height, edge : edge + outer.width]
            result[..., *outer.window] = piece
    return result


def _run(upscaler: Any, image: Tensor) -> Tensor:
    parameter = next(upscaler.parameters(), None) if hasattr(upscaler, "parameters") else None
    return upscaler(image if parameter is None else image.to(parameter)).float().to(image.device)
