"""The parts of a mask that are so far apart that each has a crop of its own.

Units    pixels; masks (1, 1, H, W), 1 = edit
Copying  needs pixels/box.py; numpy and torch

Ours: the papers and the official code crop all of a mask at once, so that two small spots in opposite corners
are each a fraction of a latent cell of their common crop.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..pixels.box import Box

_CELLS = 256  # a side of the grid on which parts are told apart, at most


@dataclass(frozen=True)
class Part:
    """What a mask has in some cells of a grid."""

    cells: np.ndarray | None  # (h, w) bool; None: all of them
    side: int  # of a cell, pixels

    def of(self, mask: Tensor) -> Tensor:
        """The part of `mask` (1, 1, H, W), in that shape."""
        if self.cells is None:
            return mask
        cells = torch.from_numpy(self.cells).to(mask)[None, None]
        whole = cells.repeat_interleave(self.side, -2).repeat_interleave(self.side, -1)
        return mask * whole[..., : mask.shape[-2], : mask.shape[-1]]


def split_mask(mask: Tensor, crop_of: Callable[[Box], Box]) -> list[Part]:
    """The parts of `mask` (1, 1, H, W), which sum to it, from top to bottom: groups of its connected areas,
    joined wherever the crops of two groups, by `crop_of` the tight box of each, overlap.

    Areas less than a 256th of the picture apart count as connected.
    """
    cell = -(-max(mask.shape[-2:]) // _CELLS)
    grid = F.max_pool2d(mask, cell, ceil_mode=True)[0, 0].numpy() > 0
    labels = _connected(grid)
    groups = [_Group({label}, _box(mask, labels == label, cell)) for label in range(1, labels.max() + 1)]
    joined: list[_Group] = []
    while groups:
        group = groups.pop()
        others = groups + joined
        touching = _overlapping(crop_of(group.box), [crop_of(other.box) for other in others])
        if not touching:
            joined.append(group)
            continue
        for number in touching:
            group = _Group(group.labels | others[number].labels, _around(group.box, others[number].box))
        kept = set(range(len(others))) - set(touching)
        joined = [others[number] for number in sorted(kept) if number >= len(groups)]
        groups = [others[number] for number in sorted(kept) if number < len(groups)] + [group]
    if len(joined) < 2:
        return [Part(None, cell)]
    joined.sort(key=lambda group: (group.box.top, group.box.left))
    return [Part(np.isin(labels, list(group.labels)), cell) for group in joined]


class _Group:
    def __init__(self, labels: set[int], box: Box) -> None:
        self.labels, self.box = labels, box


def _connected(grid: np.ndarray) -> np.ndarray:
    """The areas of `grid` (h, w) bool, connected also by corners, numbered from 1; 0 elsewhere."""
    labels = np.zeros(grid.shape, np.int64)
    waiting = set(zip(*np.nonzero(grid), strict=True))
    count = 0
    while waiting:
        count += 1
        reached = [waiting.pop()]
        while reached:
            row, column = reached.pop()
            labels[row, column] = count
            for near in ((row + down, column + right) for down in (-1, 0, 1) for right in (-1, 0, 1)):
                if near in waiting:
                    waiting.remove(near)
                    reached.append(near)
    return labels


def _box(mask: Tensor, cells: np.ndarray, cell: int) -> Box:
    """The tight box of what `mask` has in those cells."""
    rows, columns = np.nonzero(cells.any(1))[0], np.nonzero(cells.any(0))[0]
    top, left = int(rows[0]) * cell, int(columns[0]) * cell
    part = mask[0, 0, top : (int(rows[-1]) + 1) * cell, left : (int(columns[-1]) + 1) * cell]
    own = torch.from_numpy(cells[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
    own = own.repeat_interleave(cell, 0).repeat_interleave(cell, 1)[: part.shape[0], : part.shape[1]]
    down, right = ((part > 0) & own).nonzero().T
    first, last = (int(down.min()), int(right.min())), (int(down.max()), int(right.max()))
    return Box(top + first[0], left + first[1], last[0] - first[0] + 1, last[1] - first[1] + 1)


def _around(one: Box, other: Box) -> Box:
    top, left = min(one.top, other.top), min(one.left, other.left)
    return Box(top, left, max(one.bottom, other.bottom) - top, max(one.right, other.right) - left)


def _overlapping(box: Box, others: list[Box]) -> list[int]:
    """The numbers of those of `others` that share a pixel with `box`."""
    return [
        number
        for number, other in enumerate(others)
        if box.top < other.bottom
        and other.top < box.bottom
        and box.left < other.right
        and other.left < box.right
    ]
