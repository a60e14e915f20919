"""Take the step off the edge of an edit: the smoothest correction that makes it meet the picture around it.

Papers   Perez, Gangnet & Blake 2003 (Poisson image editing), doi:10.1145/882262.882269; Briggs, Henson &
         McCormick 2000, "A Multigrid Tutorial"; Tatebe 1993, "The multigrid preconditioned conjugate gradient
         method"; Braess 1995, "Towards algebraic multigrid for elliptic problems of second order"
Tensors  images (1, 3, H, W) float32 in [-1, 1]; masks (1, 1, H, W), 1 = edit, 0 = keep
Copying  needs pixels/box.py and pixels/masks.py; torch and numpy
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .box import Box
from .masks import mask_box

TOLERANCE = 0.02 * 2 / 255  # a fiftieth of an 8-bit level; what is left is a few times this at most
MOST_ITERATIONS = 100  # 3 to 12 are needed
# Two Jacobi steps, damped by the roots of the Chebyshev polynomial that is least over [0.5, 2], where the
# eigenvalues of what the next level cannot represent lie: a factor of 0.22 at most.
DAMPING = (1 / (1.25 + 0.75 * math.sqrt(0.5)), 1 / (1.25 - 0.75 * math.sqrt(0.5)))


@torch.no_grad()
def membrane(picture: Tensor, source: Tensor, mask: Tensor) -> Tensor:
    """`picture` (1, 3, H, W) in [-1, 1] inside `mask` (1, 1, H, W), made to meet `source` (1, 3, H, W) around
    it.

    Exactly `source` where the mask is 0; elsewhere picture + u, where u solves Laplace's equation with u =
    source - picture on the kept pixels beside the mask (Perez et al. 2003, Eq. 5): a membrane hung on the
    step. Its equations are those of a pixel's 4 neighbours (Eq. 7); neighbours beyond the picture's border do
    not count, so a mask that runs to it is free there. To 0.1 of an 8-bit level u is that of a direct solver,
    and lies between the least and the largest step. The result is not clamped to [-1, 1]. A mask over all of
    the picture meets nothing: `picture` is unchanged.

    Other values of `picture` outside the mask do not matter. No gradients. ValueError for shapes that do not
    fit.
    """
    height, width = picture.shape[-2:]
    if picture.shape != (1, 3, height, width) or source.shape != picture.shape:
        raise ValueError(
            f"pictures of shapes {tuple(picture.shape)} and {tuple(source.shape)}; expected (1, 3, H, W) twice"
        )
    if mask.shape != (1, 1, height, width):
        raise ValueError(f"a mask of shape {tuple(mask.shape)}; expected {(1, 1, height, width)}")
    masked = mask > 0.5
    if not masked.any():
        return source.clone()
    if masked.all():
        return picture.clone()

    window = _grown(mask_box(masked), 1, (height, width)).window
    inside, below, around = masked[..., *window], picture[..., *window], source[..., *window]
    result = source.clone()
    result[..., *window] = torch.where(inside, below + _harmonic(around - below, inside), around)
    return result


def _grown(box: Box, margin: int, size: tuple[int, int]) -> Box:
    """`box` and `margin` pixels around it, as far as a picture of `size` goes."""
    top, left = max(box.top - margin, 0), max(box.left - margin, 0)
    bottom, right = min(box.bottom + margin, size[0]), min(box.right + margin, size[1])
    return Box(top, left, bottom - top, right - left)


def _harmonic(step: Tensor, inside: Tensor) -> Tensor:
    """u (1, C, H, W) where `inside` (1, 1, H, W) bool is set, from `step` (1, C, H, W) where it is not."""
    free = inside.to(step.dtype)
    kept = 1 - free
    levels = _levels(
        free[..., 1:] * free[..., :-1], free[..., 1:, :] * free[..., :-1, :], _neighbours(kept) * free
    )
    channels = []  # one at a time: a third of the memory, and more of it in the processor's cache
    for plane in step.split(1, dim=1):
        load = _neighbours(plane * kept) * free
        mean = load.sum() / levels[0].ground.sum()  # so that a constant step is solved at once
        channels.append(_solved(levels, load - mean * levels[0].ground) + mean)
    return torch.cat(channels, dim=1)


def _neighbours(x: Tensor) -> Tensor:
    """The sum over each pixel's 4 neighbours within `x` (1, 1, H, W); the same shape."""
    total = torch.zeros_like(x)
    total[..., 1:] += x[..., :-1]
    total[..., :-1] += x[..., 1:]
    total[..., 1:, :] += x[..., :-1, :]
    total[..., :-1, :] += x[..., 1:, :]
    return total


@dataclass(frozen=True)
class _Level:
    """The equations on one grid, (A x)_p = sum over neighbours q of weight_pq (x_p - x_q) + ground_p x_p.

    Everything is (1, 1, H, W) but `right` (1, 1, H, W - 1) and `down` (1, 1, H - 1, W), the weights between a
    cell and the next. A cell without an unknown has none and no ground.
    """

    right: Tensor
    down: Tensor
    ground: Tensor  # weights to values that are given
    diagonal: Tensor
    live: Tensor  # 1 where there is an unknown, else 0
    inverse: Tensor  # live / diagonal
    x: Tensor  # two buffers: to allocate tensors of many megabytes anew costs more than to compute in them
    scratch: Tensor

    @classmethod
    def of(cls, right: Tensor, down: Tensor, ground: Tensor) -> "_Level":
        diagonal = ground.clone()
        diagonal[..., 1:] += right
        diagonal[..., :-1] += right
        diagonal[..., 1:, :] += down
        diagonal[..., :-1, :] += down
        live = (diagonal > 0).to(ground.dtype)
        inverse = live / torch.where(diagonal > 0, diagonal, 1)
        buffers = torch.empty_like(ground), torch.empty_like(ground)
        return cls(right, down, ground, diagonal, live, inverse, *buffers)

    def add_neighbours(self, x: Tensor, total: Tensor) -> Tensor:
        """`total`, to which the weighted sums over the neighbours in `x` have been added."""
        total[..., 1:].addcmul_(self.right, x[..., :-1])
        total[..., :-1].addcmul_(self.right, x[..., 1:])
        total[..., 1:, :].addcmul_(self.down, x[..., :-1, :])
        total[..., :-1, :].addcmul_(self.down, x[..., 1:, :])
        return total

    def residual(self, x: Tensor, load: Tensor) -> Tensor:
        """load - A x, in `scratch`."""
        return self.add_neighbours(x, torch.addcmul(load, self.diagonal, x, value=-1, out=self.scratch))

    def smooth(self, x: Tensor, load: Tensor, damping: float) -> None:
        """One damped Jacobi step of A x = load, in place."""
        x.lerp_(self.add_neighbours(x, self.scratch.copy_(load)).mul_(self.inverse), damping)


def _levels(right: Tensor, down: Tensor, ground: Tensor) -> list[_Level]:
    """The equations of the weights given (see `_Level`), and those of grids of 2 x 2 cells each, to one cell.

    The next grid's ground is the sum over 4 cells, and its weight half the sum over the 2 pairs that face
    each other, since its cells are twice as far apart. Sums alone would make each correction half as large as
    it must be (Braess 1995). With sums of the ground, every kept pixel is felt on all grids, be it in a
    straight edge or a single one in a large mask.
    """
    levels = [_Level.of(right, down, ground)]
    while ground.numel() > 1:
        odd_height, odd_width = ground.shape[-2] % 2, ground.shape[-1] % 2
        right = F.pad(right[..., 1::2], (0, 0, 0, odd_height))
        down = F.pad(down[..., 1::2, :], (0, odd_width))
        ground = F.pad(ground, (0, odd_width, 0, odd_height))
        ground = ground[..., 0::2, :] + ground[..., 1::2, :]
        right = (right[..., 0::2, :] + right[..., 1::2, :]) / 2
        down = (down[..., 0::2] + down[..., 1::2]) / 2
        ground = ground[..., 0::2] + ground[..., 1::2]
        levels.append(_Level.of(right, down, ground))
    return levels


def _solved(levels: list[_Level], load: Tensor) -> Tensor:
    """x of A x = `load` (1, 1, H, W) on the first level: conjugate gradients, preconditioned by a V-cycle.

    The V-cycle of the residual is close to the error itself, so its largest value says when to stop. `load`
    is overwritten.
    """
    top, residual = levels[0], load
    x, direction = torch.zeros_like(load), torch.zeros_like(load)
    before = None
    for _ in range(MOST_ITERATIONS):
        z = _cycle(levels, residual)
        if z.abs().amax().item() < TOLERANCE:
            x += z
            break
        now = torch.mul(residual, z, out=top.scratch).sum()
        direction = z.clone() if before is None else direction.mul_(now / before).add_(z)
        before = now
        # x is free, z having been used: it holds -A direction
        minus_a = top.add_neighbours(direction, torch.mul(top.diagonal, direction, out=top.x).neg_())
        length = -now / torch.mul(direction, minus_a, out=top.scratch).sum()
        x.addcmul_(length, direction)
        residual.addcmul_(length, minus_a)
    return x


def _cycle(levels: list[_Level], load: Tensor) -> Tensor:
    """About A^-1 load on the first of `levels`, in its `x`: one V-cycle, linear, symmetric and positive."""
    level, x = levels[0], levels[0].x
    torch.mul(load, level.inverse, out=x)
    if len(levels) == 1:
        return x  # one cell: solved
    x *= DAMPING[0]
    level.smooth(x, load, DAMPING[1])
    coarse = _cycle(levels[1:], _restricted(level.residual(x, load)))
    height, width = x.shape[-2:]
    # bilinear: 3/4 of the cell that a pixel lies in and 1/4 of the next, per side
    fine = F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False)
    x.addcmul_(level.live, fine[..., :height, :width])
    level.smooth(x, load, DAMPING[1])
    level.smooth(x, load, DAMPING[0])
    return x


def _restricted(x: Tensor) -> Tensor:
    """`x` (1, 1, H, W) in cells of 2 x 2, (1, 1, ceil(H/2), ceil(W/2)): the transpose of `_cycle`'s bilinear
    interpolation.
    """
    return _restricted_rows(_restricted_rows(x).mT).mT


def _restricted_rows(x: Tensor) -> Tensor:
    """The transpose along the second to last side, (..., n, m) to (..., ceil(n/2), m)."""
    even, odd = x[..., 0::2, :], x[..., 1::2, :]
    pairs = odd.shape[-2]
    total = 0.75 * even
    total[..., :pairs, :].add_(odd, alpha=0.75)
    total[..., :-1, :].add_(even[..., 1:, :], alpha=0.25)
    total[..., 1:, :].add_(odd[..., : even.shape[-2] - 1, :], alpha=0.25)
    total[..., :1, :].add_(even[..., :1, :], alpha=0.25)  # beyond the ends the interpolation repeats them
    if pairs == even.shape[-2]:
        total[..., -1:, :].add_(odd[..., -1:, :], alpha=0.25)
    return total
