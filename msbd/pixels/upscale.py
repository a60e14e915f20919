"""SR of Algorithm 1: enlarge a stage's result to the next stage's size.

Paper    Ackermann & Li 2022, arXiv:2210.12965, appendix A.2: Real-ESRGAN x4, then bilinear down; its ablation
         has the others
Tensors  image (1, 3, H, W) in [-1, 1] -> (1, 3, H', W') in [-1, 1]; the upscaler net takes and gives [0, 1]
Copying  needs pixels/masks.py, pixels/pieces.py, pixels/resize.py, pixels/tiles.py
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .masks import dilate, resize_mask
from .pieces import mirrored_pieces, run_in_pieces
from .resize import low_pass, resize, sharpen
from .tiles import touches

# Pixels. _PIECE: side of the pieces in which the upscaler is run. _CONTEXT: margin around each.
# _MULTIPLE: what a piece and its margins are rounded up to; upscalers of scale 2 and 1 take no other sizes.
_PIECE, _CONTEXT, _MULTIPLE = 256, 16, 4
_REACH = 2  # pixels: how far the bilinear resize after the net looks


@torch.no_grad()
def super_resolve(
    image: Tensor, size: tuple[int, int], mode: str, upscaler: Callable[[Tensor], Tensor] | None = None,
    needed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`image` (1, 3, H, W) in [-1, 1] at `size` by "rrdb" (the `upscaler`, then bilinear), "bilinear",
    "bicubic", "sharpen" or "none".

    "none" repeats pixels. `needed` (1, 1, H', W') is set where the result will be looked at (None:
    everywhere): the upscaler, which takes nearly all of the time, is run on those pieces only, and elsewhere
    the picture is bilinear. The same size comes back as it is. ValueError for "rrdb" without an upscaler, or
    another word.
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
    """LP(x_in) of line 20: `reference` (1, 3, H, W), as sharp as the `input_size` picture that was enlarged
    to its size (A.2).

    `mode` "matching" is the paper's; "half" goes through half the size, "no" leaves it sharp (the ablations
    of A.4).
    """
    if mode == "no":
        return reference
    if mode == "half":
        return low_pass(reference, (max(1, reference.shape[-2] // 2), max(1, reference.shape[-1] // 2)))
    return low_pass(reference, input_size)


def _in_pieces(upscaler: Callable[[Tensor], Tensor], image: Tensor, asked: Tensor) -> Tensor:
    """The upscaler over the pieces of a picture (1, 3, H, W) in [0, 1] that `asked` touches; bilinear
    elsewhere.
    """
    asked = dilate(asked, _REACH)
    pieces = mirrored_pieces((image.shape[-2], image.shape[-1]), _PIECE, _CONTEXT, _MULTIPLE)
    pieces = [piece for piece in pieces if touches(piece.kept, asked)]
    if not pieces:
        return image

    def bilinear(size: tuple[int, int]) -> Tensor:
        large = resize(image, size)
        return image.clone() if large is image else large

    return run_in_pieces(lambda piece: _run(upscaler, piece), image, pieces, bilinear)


def _run(upscaler: Any, image: Tensor) -> Tensor:
    parameter = next(upscaler.parameters(), None) if hasattr(upscaler, "parameters") else None
    return upscaler(image if parameter is None else image.to(parameter)).float().to(image.device)
