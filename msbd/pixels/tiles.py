"""Tiles: cut a large picture into overlapping boxes, and fade what was computed in each into one picture.

Paper    Ackermann & Li 2022, arXiv:2210.12965, appendix A.2: segments of 768 pixels overlapping by 128
Tensors  patches (B, C, h, w) float; weights (1, 1, h, w) in (0, 1]; masks (1, 1, H, W)
Copying  needs pixels/box.py

The official code fades over half the overlap, on the later tile's side only, in 8 bits, and its grid has
redundant tiles and settings for which it never ends (official.py has both). Here the fade is symmetric, over
the whole overlap, in float, and a partition of unity.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .box import Box


def tile_boxes(height: int, width: int, tile: int, overlap: int, multiple: int = 1) -> list[Box]:
    """The fewest boxes of at most `tile` x `tile` that cover a picture and overlap by `overlap` or more, by
    rows.

    Tiles start at multiples of `tile - overlap`; the last one of each axis is pushed back inside, so that it
    keeps its size. All starts are multiples of `multiple` (latent cells), all sizes too when the picture's
    are. A picture of at most `tile` is one box. ValueError unless 0 <= overlap < tile, both multiples of
    `multiple`.
    """
    if not 0 <= overlap < tile:
        raise ValueError(
            f"tiles of {tile} pixels cannot overlap by {overlap}; the overlap must be from 0 to less than the tile"
        )
    if tile % multiple or overlap % multiple:
        raise ValueError(f"tile ({tile}) and overlap ({overlap}) must be multiples of {multiple} pixels")
    if height < 1 or width < 1:
        raise ValueError(f"there is nothing to tile in {height} x {width} pixels")
    rows, columns = (_spans(side, tile, overlap, multiple) for side in (height, width))
    return [Box(top, left, h, w) for top, h in rows for left, w in columns]


def touches(box: Box, mask: Tensor) -> bool:
    """Whether anything under `box` is set in `mask` (1, 1, H, W); if not, the tile need not be computed."""
    return bool((mask[..., *box.window] > 0).any())


def covered(mask: Tensor, boxes: Sequence[Box]) -> Tensor:
    """`mask` (1, 1, H, W) under any of `boxes`, and 0 elsewhere."""
    kept = torch.zeros_like(mask)
    for box in boxes:
        kept[..., *box.window] = mask[..., *box.window]
    return kept


class TileBlend:
    """Fades tiles into one picture as they arrive; holds that picture and one map of weights, not the tiles.

    `boxes` is the whole grid. Tiles that were left out (no masked pixel) weigh nothing: what remains is
    renormalised, so wherever every tile over a pixel was added, its weights still sum to 1, and elsewhere the
    neighbours reach to their edges.
    """

    def __init__(self, boxes: Sequence[Box], height: int, width: int) -> None:
        self.height, self.width = height, width
        self._rows, self._columns = _axis_weights(boxes, height, width)
        self._sum: Tensor | None = None  # (B, C, H, W)
        self._weight: Tensor | None = None  # (1, 1, H, W)

    def add(self, box: Box, patch: Tensor) -> None:
        """Add the `patch` (B, C, box.height, box.width) computed for `box`, one of the grid's boxes, once
        each.
        """
        if tuple(patch.shape[-2:]) != box.size:
            raise ValueError(
                f"a patch of {tuple(patch.shape[-2:])} pixels does not fit its tile of {box.size}"
            )
        if self._sum is None or self._weight is None:
            self._sum = patch.new_zeros((*patch.shape[:2], self.height, self.width), dtype=torch.float32)
            self._weight = patch.new_zeros((1, 1, self.height, self.width), dtype=torch.float32)
        weight = _outer(self._rows[box.top, box.height], self._columns[box.left, box.width]).to(patch.device)
        self._sum[..., *box.window] += weight * patch.float()
        self._weight[..., *box.window] += weight

    def result(self, fill: Tensor) -> Tensor:
        """The blended picture, in float32; where no tile was added, `fill` (broadcastable to it) shows."""
        if self._sum is None or self._weight is None:
            return fill.float()
        return torch.where(self._weight > 0, self._sum / self._weight.clamp_min(1e-12), fill.to(self._sum))


def _spans(length: int, tile: int, overlap: int, multiple: int) -> list[tuple[int, int]]:
    """(start, size) of each tile along one axis."""
    if length <= tile:
        return [(0, length)]
    stride = tile - overlap
    last = math.ceil((length - tile) / multiple) * multiple
    starts = [*range(0, last, stride), last]  # the range stops short of `last`: no redundant tile
    return [(start, min(tile, length - start)) for start in starts]


def _axis_weights(
    boxes: Sequence[Box], height: int, width: int
) -> tuple[dict[tuple[int, int], Tensor], dict[tuple[int, int], Tensor]]:
    """Weights by (start, size) along the rows and along the columns.

    A tile's weight is their outer product.
    """
    rows, columns = {(box.top, box.height) for box in boxes}, {(box.left, box.width) for box in boxes}
    if len(rows) * len(columns) != len(set(boxes)):
        raise ValueError(
            "the boxes are not a grid (every row span with every column span); make them with tile_boxes"
        )
    return _partition_of_unity(sorted(rows), height), _partition_of_unity(sorted(columns), width)


def _partition_of_unity(spans: list[tuple[int, int]], length: int) -> dict[tuple[int, int], Tensor]:
    """One ramped weight (size,), float64, per span (start, size).

    They sum to 1 at each of the `length` positions.
    """
    raw, total = {}, torch.zeros(length, dtype=torch.float64)
    for k, (start, size) in enumerate(spans):
        position = torch.arange(size, dtype=torch.float64) + 0.5  # of pixel centres, so that no weight is 0
        weight = torch.ones(size, dtype=torch.float64)
        if k > 0 and (shared := sum(spans[k - 1]) - start) > 0:
            weight *= _rise(position / shared)
        if k + 1 < len(spans) and (shared := start + size - spans[k + 1][0]) > 0:
            weight *= _rise((size - position) / shared)
        raw[start, size] = weight
        total[start : start + size] += weight
    if not bool((total > 0).all()):
        raise ValueError(f"the tiles {spans} do not cover all {length} pixels")
    # Two neighbours' ramps sum to 1 by themselves; the division is for the pixels that a pushed-back last
    # tile makes three tiles share.
    return {span: weight / total[span[0] : span[0] + span[1]] for span, weight in raw.items()}


def _rise(u: Tensor) -> Tensor:
    """0 to 1 over u from 0 to 1, smooth at both ends, with rise(u) + rise(1 - u) = 1."""
    return 0.5 - 0.5 * torch.cos(math.pi * u.clamp(0, 1))


def _outer(rows: Tensor, columns: Tensor) -> Tensor:
    """(h,) and (w,) -> (1, 1, h, w), float32."""
    return (rows[:, None] * columns[None, :])[None, None].float()
