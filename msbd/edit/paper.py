"""Where the paper and its official code differ: the paper's formulas.

Paper    Ackermann & Li 2022, arXiv:2210.12965, "Approach", Algorithm 1 and appendix A.2
Units    pixels, sizes (H, W); masks (1, 1, H, W), 1 = edit; pictures (1, 3, H, W) in [-1, 1]; latents (n, 4,
         h, w)

official.py has the same functions under the same names. `plan.plan_edit` chooses between the two pages, once.
"""

import math
from collections.abc import Collection, Iterable, Sequence

from torch import Tensor

from samplers.repaint import Evaluation, repaint_plan, with_known
from samplers.schedule import q_sample

from ..pixels.box import Box
from ..pixels.masks import mask_box
from ..pixels.tiles import TileBlend, tile_boxes
from ..solvers import partial_timesteps
from .config import ModelSpec, ResolvedEditConfig
from .crops import crop_box, first_stage_size, stage_sizes


def crop(mask: Tensor, config: ResolvedEditConfig, spec: ModelSpec) -> Box:
    """The part of the picture to work on: a square around the mask, `margin` times as long (A.2)."""
    picture_size = (mask.shape[-2], mask.shape[-1])
    return crop_box(mask_box(mask), picture_size, config.margin, spec.multiple)


def sizes(crop_size: tuple[int, int], config: ResolvedEditConfig, spec: ModelSpec) -> list[tuple[int, int]]:
    """The size of each stage: the model's own, one between, the crop's (A.2, "Hyperparameters")."""
    return stage_sizes(
        crop_size,
        config.first_stage_size,
        config.max_edgelen,
        spec.multiple,
        straight_to_grid=config.straight_to_grid,
    )


def is_tiled(
    size: tuple[int, int], crop_size: tuple[int, int], config: ResolvedEditConfig, spec: ModelSpec
) -> bool:
    """Whether a later stage of `size` is cut into tiles: where it has more pixels than a tile.

    More than the crop's shape has at a tile's area, to be exact: the intermediate stage, which has just that
    size, is one piece whatever the rounding to whole multiples.
    """
    return math.prod(size) > math.prod(first_stage_size(crop_size, config.tile, spec.multiple))


def grid(size: tuple[int, int], config: ResolvedEditConfig, spec: ModelSpec) -> list[Box]:
    """The tiles of a stage of `size`: no redundant one (A.2: 768 pixels, overlapping by 128)."""
    return tile_boxes(*size, config.tile, config.grid_overlap, spec.multiple)


def evaluations(
    num_steps: int,
    start: float,
    repeats: int,
    jump: int,
    alphas_cumprod: Tensor,
    *,
    known_level: str = "prev",
    known_noise: str = "once",
    sampler: str = "ddim",
    spacing: str = "auto",
    repaint_end: float = 0.0,
) -> tuple[Evaluation, ...]:
    """The evaluations of a stage: `num_steps` of a whole run, from its `start` on (T' / T); lines 5-14.

    The timesteps are the `sampler`'s, spaced as `spacing` says; below the fraction `repaint_end` of the
    schedule none is repeated.
    """
    timesteps = partial_timesteps(sampler, num_steps, start, spacing, alphas_cumprod).tolist()
    repeated = [t for t in timesteps if t >= repaint_end * len(alphas_cumprod)]
    once = timesteps[len(repeated) :]
    plan: tuple[Evaluation, ...] = ()
    if repeated:
        final_alpha = float(alphas_cumprod[once[0]]) if once else 1.0
        plan += repaint_plan(
            repeated, alphas_cumprod, repeats=repeats, jump_length=jump, final_alpha=final_alpha
        )
    if once:
        plan += repaint_plan(once, alphas_cumprod)
    return with_known(plan, level=known_level, noise=known_noise)


def start_latent(known: Tensor, first: Evaluation, alphas_cumprod: Tensor, noise: Tensor) -> Tensor:
    """x_T ~ q(x_T | x_0 = x~), lines 4 and 21: the encoded picture `known`, noised to the first evaluation's
    level.
    """
    return q_sample(known, first.t, alphas_cumprod, noise)


def shared_noise(whole_run: bool) -> Collection[str]:
    """The sites where all candidates share one noise: none, line 7 stands inside the loop over the batch."""
    return ()


def before_upscaling(picture: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """What SR of line 20 gets of the last stage's picture: the picture itself, in float."""
    return picture


def blend(
    pictures: Iterable[Tensor], boxes: Sequence[Box], grid: Sequence[Box], background: Tensor, overlap: int
) -> Tensor:
    """One picture of the tiles `pictures` at `boxes`, of all the `grid`, crossfaded; elsewhere `background`
    shows.
    """
    blended = TileBlend(grid, background.shape[-2], background.shape[-1])
    for box, picture in zip(boxes, pictures, strict=True):
        blended.add(box, picture)
    return blended.result(background)
