"""SR of Algorithm 1: enlarge a stage's result to the next stage's size.

Paper    Ackermann & Li 2022, arXiv:2210.12965, appendix A.2: Real-ESRGAN x4, then bilinear down; its ablation
         has the others
Tensors  image (1, 3, H, W) in [-1, 1] -> (1, 3, H', W') in [-1, 1]; the upscaler net takes and gives [0, 1]
Copying  needs pixels/gray.py, pixels/luma.py, pixels/masks.py, pixels/pieces.py, pixels/resize.py,
         pixels/tiles.py
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .gray import looks_gray, with_chroma_of
from .luma import luma
from .masks import dilate, resize_mask
from .pieces import Piece, mirrored_pieces, run_in_pieces
from .resize import low_pass, resize, sharpen
from .tiles import touches

# Pixels. _PIECE: side of the pieces in which the upscaler is run. _CONTEXT: how much of the mirrored picture
# it sees beyond the border, and around a piece where it does not say how far it looks (`config.context`).
# _MULTIPLE: what a piece and its margins are rounded up to; upscalers of scale 2 and 1 take no other sizes.
_PIECE, _CONTEXT, _MULTIPLE = 256, 16, 4
_SCALE = 4  # of nets that enlarge further the pieces are smaller, so that their results are not larger
_REACH = 2  # pixels: how far the bilinear resize after the net looks

OnProgress = Callable[[int, int], None]  # done, of how many


def super_resolve(
    image: Tensor, size: tuple[int, int], mode: str, upscaler: Callable[[Tensor], Tensor] | None = None,
    needed: Tensor | None = None, on_progress: OnProgress | None = None,
) -> Tensor:  # fmt: skip
    """`image` (1, 3, H, W) in [-1, 1] at `size` by "rrdb" (`enlarge_by_net`), "bilinear", "bicubic",
    "sharpen" or "none".

    "none" repeats pixels. `needed` is for "rrdb". The same size comes back as it is. `on_progress(done,
    total)` is called once, by "rrdb" more often. ValueError for "rrdb" without an upscaler, or another word.
    """
    if mode == "rrdb" and tuple(image.shape[-2:]) != tuple(size):
        if upscaler is None:
            raise ValueError(
                "upscaling_mode is rrdb, but this model has no upscaler; use bilinear, or load one"
            )
        return enlarge_by_net(image, size, upscaler, needed, on_progress)
    made = _interpolated(image, size, mode)
    if on_progress is not None:
        on_progress(1, 1)
    return made


def _interpolated(image: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    if mode in ("bilinear", "bicubic"):
        return resize(image, size, mode).clamp(-1, 1)
    if mode == "sharpen":
        return sharpen(resize(image, size))
    if mode == "none":
        return F.interpolate(image, size=size, mode="nearest")
    raise ValueError(f"upscaling_mode is {mode!r}; expected rrdb, bilinear, bicubic, sharpen or none")


@torch.no_grad()
def enlarge_by_net(
    image: Tensor, size: tuple[int, int], upscaler: Callable[[Tensor], Tensor], needed: Tensor | None = None,
    on_progress: OnProgress | None = None, *, piece: int | None = None, context: int | None = None,
) -> Tensor:  # fmt: skip
    """`image` (1, 3, H, W) in [-1, 1] at `size`, of any ratio: `upscaler`, then bilinear.

    The net runs on pieces, and at the picture's own size too. `needed` (1, 1, H', W') is set where the result
    will be looked at (None: everywhere): the net, which takes nearly all of the time, is run on those pieces
    only, and elsewhere the picture is bilinear. `piece` is their side (None: 256), `context` what is seen
    around each (None: as the net's config says), in pixels of `image`. `on_progress(done, total)` counts
    pieces, of a net with blocks (`.body`) these too. Of a grey picture the net gives the luma only: it would
    colour it. A net of one channel gets and gives the luma, one of four an opaque picture.
    """
    needed = torch.ones_like(image[:, :1]) if needed is None else needed
    asked = resize_mask(needed, (image.shape[-2], image.shape[-1]))
    around = getattr(getattr(upscaler, "config", None), "context", _CONTEXT) if context is None else context
    usual = _PIECE * _SCALE // max(_SCALE, int(getattr(getattr(upscaler, "config", None), "scale", _SCALE)))
    piece = piece or usual
    pieces = mirrored_pieces((image.shape[-2], image.shape[-1]), piece, around, _MULTIPLE, _CONTEXT)
    made = _in_pieces(upscaler, image / 2 + 0.5, pieces, asked, on_progress or (lambda *_: None))
    made = made.mul_(2).sub_(1)  # in place: of a photograph it is gigabytes
    if looks_gray(image) or _channels(upscaler)[1] == 1:
        made = with_chroma_of(image, made)
    return resize(made, size).clamp(-1, 1)


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


def _in_pieces(
    upscaler: Callable[[Tensor], Tensor], image: Tensor, pieces: Sequence[Piece], asked: Tensor,
    on_progress: OnProgress,
) -> Tensor:  # fmt: skip
    """The upscaler over those pieces of a picture (1, 3, H, W) in [0, 1] that `asked` touches; bilinear
    elsewhere.
    """
    asked = dilate(asked, _REACH)
    pieces = [piece for piece in pieces if touches(piece.kept, asked)]
    if not pieces:
        return image

    def bilinear(size: tuple[int, int]) -> Tensor:
        large = resize(image, size)
        return image.clone() if large is image else large

    with _counted(upscaler, len(pieces), on_progress) as run:
        return run_in_pieces(run, image, pieces, bilinear)


@contextmanager
def _counted(upscaler: Any, pieces: int, on_progress: OnProgress) -> Iterator[Callable[[Tensor], Tensor]]:
    """What runs the upscaler on one of `pieces`, in its own dtype, and counts its blocks and its end."""
    blocks, done = list(getattr(upscaler, "body", ())), 0

    def count(*_: object) -> None:
        nonlocal done
        done += 1
        on_progress(done, pieces * (len(blocks) + 1))

    def run(piece: Tensor) -> Tensor:
        made = _run(upscaler, piece)
        count()
        return made

    hooks = [block.register_forward_hook(count) for block in blocks]
    try:
        yield run
    finally:
        for hook in hooks:
            hook.remove()


def _run(upscaler: Any, image: Tensor) -> Tensor:
    """The net's result in three channels, of `image` (1, 3, H, W) in as many as it takes."""
    parameter = next(upscaler.parameters(), None) if hasattr(upscaler, "parameters") else None
    taken, given = _channels(upscaler)
    if taken == 1:
        image = luma(image)
    elif taken == 4:
        image = torch.cat([image, torch.ones_like(image[:, :1])], 1)
    made = upscaler(image if parameter is None else image.to(parameter)).float().to(image.device)
    return made.expand(-1, 3, -1, -1) if given == 1 else made[:, :3]


def _channels(upscaler: Any) -> tuple[int, int]:
    """Channels that the net takes and gives; of anything without a config an RGB picture's."""
    config = getattr(upscaler, "config", None)
    return getattr(config, "num_in_ch", 3), getattr(config, "num_out_ch", 3)
