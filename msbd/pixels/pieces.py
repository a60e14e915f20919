"""Run a net that looks at a few pixels only over a large picture piece by piece, so that its memory does not
grow.

Tensors  image (1, C, H, W) in the net's own range -> (1, C', H', W'), H' / H = W' / W a whole number, or one
         over it
Copying  needs pixels/box.py, pixels/resize.py, pixels/tiles.py

A piece of the result equals the same piece of a run on the whole picture, but for rounding, where the context
around it is at least as wide as the net looks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from .box import Box
from .resize import take
from .tiles import tile_boxes


@dataclass(frozen=True)
class Piece:
    """One piece, in pixels of the picture."""

    seen: Box  # what the net gets: `kept` and its context; mirrored where it leaves the picture
    kept: Box  # the part whose result is kept


def mirrored_pieces(
    size: tuple[int, int], side: int, context: int, multiple: int = 1, rim: int | None = None
) -> list[Piece]:
    """Pieces of `side` pixels that cover a picture of `size` (H, W) once, each with `context` pixels all
    around it.

    Beyond the picture's border the net sees the picture mirrored, `rim` pixels of it (None: `context`). What
    it sees is rounded up to `multiple` pixels a side.
    """
    rim = context if rim is None else rim
    rows, columns = (_spans(length, side, context, multiple, rim) for length in size)
    return [
        Piece(Box(top, left, high, wide), Box(kept_top, kept_left, kept_high, kept_wide))
        for top, high, kept_top, kept_high in rows
        for left, wide, kept_left, kept_wide in columns
    ]


def _spans(length: int, side: int, context: int, multiple: int, rim: int) -> list[tuple[int, int, int, int]]:
    """(start and length of what is seen, of what is kept) of the pieces along one side of a picture."""
    spans = []
    for start in range(0, length, side):
        end = min(start + side, length)
        first = max(start - context, -rim) if start else -rim
        last = min(end + context, length + rim) if end < length else length + rim
        seen = last - first
        spans.append((first, seen + -seen % multiple, start, end - start))
    return spans


def inner_pieces(size: tuple[int, int], side: int, context: int, multiple: int = 1) -> list[Piece]:
    """Pieces that cover a picture of `size` (H, W), each with `context` pixels around it, but none beyond the
    border.

    There the net sees the picture end, as it does in a run on the whole. A piece is `side` pixels and its
    context 2 x `context` more, pushed back inside at the end; where two overlap, the later one is kept.
    `side`, `context` and `size` are multiples of `multiple`, so are all numbers. A picture of at most side +
    2 x context is one piece.
    """
    boxes = tile_boxes(*size, side + 2 * context, 2 * context, multiple)
    return [Piece(box, _without_context(box, context, size)) for box in boxes]


def run_in_pieces(
    net: Callable[[Tensor], Tensor],
    image: Tensor,
    pieces: Sequence[Piece],
    fill: Callable[[tuple[int, int]], Tensor] | None = None,
) -> Tensor:
    """`net(image)`, (1, C', H', W'), from `pieces`, one at a time.

    `fill(size)` makes the picture (1, C', *size) that shows where no piece is, and is written into; None
    where the pieces cover all of it. ValueError without a piece.
    """
    result: Tensor | None = None
    for piece in pieces:
        made = net(take(image, piece.seen))
        up, down = made.shape[-1], piece.seen.width  # the net enlarges up / down times
        if result is None:
            height, width = (length * up // down for length in image.shape[-2:])
            result = fill((height, width)) if fill else made.new_empty(1, made.shape[1], height, width)
        kept, seen = piece.kept, piece.seen
        target = Box(*(n * up // down for n in (kept.top, kept.left, kept.height, kept.width)))
        top, left = ((k - s) * up // down for k, s in ((kept.top, seen.top), (kept.left, seen.left)))
        result[..., *target.window] = made[..., *Box(top, left, *target.size).window]
    if result is None:
        raise ValueError(f"no pieces of a picture of {tuple(image.shape[-2:])} pixels; expected at least one")
    return result


def _without_context(box: Box, context: int, size: tuple[int, int]) -> Box:
    """`box` less `context` pixels on each side that is not the border of a picture of `size`."""
    top, left = (start + (context if start else 0) for start in (box.top, box.left))
    bottom, right = (
        end - (context if end < side else 0) for end, side in zip((box.bottom, box.right), size, strict=True)
    )
    return Box(top, left, bottom - top, right - left)
