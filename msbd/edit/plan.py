"""What an edit will do before it does it, and what it gives: the crop, the stages, their tiles; the result.

Paper    Ackermann & Li 2022 (Multi-Stage Blended Diffusion), arXiv:2210.12965, appendix A.2, "Hyperparameters"
Units    pixels unless a name says otherwise; sizes are (H, W); masks (1, 1, H, W), 1 = edit
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from ..pixels.box import Box
from ..pixels.masks import latent_mask, mask_box, resize_mask, sample_mask
from ..pixels.resize import put_back
from ..pixels.tiles import covered, tile_boxes, touches
from . import official
from .config import EditConfig, Measures
from .crops import crop_box, first_stage_size, stage_sizes

NAIVE_OVER_NATIVE = 960 / 512  # the paper's baseline (A.3): the largest size that fitted its GPU


@dataclass(frozen=True)
class Stage:
    """One size at which the crop is worked on."""

    name: str
    number: int  # 0: the first stage, lines 1 to 18 of algorithm 1; from 1: lines 19 to 28
    size: tuple[int, int]  # (H, W) of the whole crop at this stage
    start: float  # fraction of the schedule its sampling starts from
    repeats: int  # RePaint's R
    num_steps: int  # T
    candidates: int  # pictures sampled side by side; more than one in the first stage only
    grid: tuple[Box, ...]  # all tiles; a stage in one piece has one
    boxes: tuple[Box, ...]  # those with a masked pixel, the only ones computed


@dataclass(frozen=True)
class EditPlan:
    """Where and at which sizes an edit works; `config` has no None left but `tile_batch`."""

    crop: Box
    stages: tuple[Stage, ...]
    config: EditConfig


@dataclass(frozen=True)
class EditResult:
    """The edited picture, equal to the source bit for bit outside the mask, and how it came about."""

    image: Tensor  # (1, 3, H, W) in [-1, 1]
    plan: EditPlan  # its config.seed is the one that was used, drawn from a generator or not
    candidates: Tensor  # (B, 3, h, w): first-stage pictures before decoder optimisation; mode segments: the crop as it ended
    scores: Tensor | None  # (B,) CLIP's, higher = better; None without reranking
    chosen: int  # index of the candidate that was taken
    seconds: dict[str, float] = field(default_factory=dict)  # by stage and task
    notes: tuple[str, ...] = ()  # what did not go as planned: batches and tiles halved to fit into memory


def check_inputs(image: Tensor, mask: Tensor) -> None:
    """ValueError unless `image` is (1, 3, H, W), floating, and `mask` (1, 1, H, W)."""
    if image.ndim != 4 or image.shape[:2] != (1, 3) or not image.is_floating_point():
        raise ValueError(
            f"image has shape {tuple(image.shape)}, {image.dtype}; expected (1, 3, H, W), floating, in [-1, 1]"
        )
    if mask.shape != (1, 1, *image.shape[-2:]):
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}; expected (1, 1, {image.shape[-2]}, {image.shape[-1]}), the picture's size"
        )


def plan_edit(mask: Tensor, config: EditConfig, measures: Measures) -> EditPlan:
    """The plan for repainting `mask` (1, 1, H, W): crop, stages, tiles. ValueError for an empty mask or unsuitable options."""
    config = config.for_model(measures)
    crop = _crop(mask, config, measures)
    # Where the crop leaves the picture, nets see the picture and its mask mirrored, but nobody sees the result: no tiles there.
    seen = Box(-crop.top, -crop.left, mask.shape[-2], mask.shape[-1])
    cropped = put_back(mask.new_zeros(1, 1, *crop.size), mask, seen)
    sizes = _sizes(crop.size, config, measures)
    stages = (_stage(number, size, cropped, config, measures) for number, size in enumerate(sizes))
    return EditPlan(crop, tuple(stages), config)


def halve_tiles(stage: Stage, mask: Tensor, config: EditConfig, measures: Measures) -> Stage | None:
    """A later stage in tiles of half the size, for a device that ran out of memory; `mask` is the crop's. None if they cannot shrink."""
    tile = max(stage.grid[0].size) // 2 // measures.multiple * measures.multiple
    if stage.number == 0 or tile < 2 * measures.multiple:
        return None
    overlap = min(_given(config.grid_overlap), tile // 2 // measures.multiple * measures.multiple)
    grid = tile_boxes(*stage.size, tile, overlap, measures.multiple)
    boxes = _computed(grid, covered(stage_mask(mask, stage.size, config), stage.boxes), stage.number, config)
    return replace(stage, grid=tuple(grid), boxes=boxes)


def stage_mask(mask: Tensor, size: tuple[int, int], config: EditConfig) -> Tensor:
    """The crop's mask (1, 1, H, W) at a stage's size, {0, 1}."""
    return (resize_mask if config.latent_mask == "any" else sample_mask)(mask, size)


def stage_cells(mask: Tensor, stage: Stage, config: EditConfig, factor: int) -> Tensor:
    """The crop's mask (1, 1, H, W) in a stage's latent cells of `factor` pixels, {0, 1}."""
    if config.latent_mask == "center" and stage.number == 0:  # official: there from the crop's own pixels
        return sample_mask(mask, (stage.size[0] // factor, stage.size[1] // factor))
    return latent_mask(stage_mask(mask, stage.size, config), factor, config.latent_mask)


def _crop(mask: Tensor, config: EditConfig, measures: Measures) -> Box:
    box, picture = mask_box(mask), (mask.shape[-2], mask.shape[-1])
    if config.formulas == "paper":
        return crop_box(box, picture, config.margin, measures.multiple)
    margin = max(config.margin, _given(config.first_stage_size) / max(box.size))  # never smaller than native
    crop = crop_box(box, picture, margin, measures.multiple)
    inside = Box(0, 0, *picture).contains(crop)  # else the official code stops; ours mirrors
    return official.crop_around(mask, crop.size) if inside else crop


def _sizes(crop: tuple[int, int], config: EditConfig, measures: Measures) -> list[tuple[int, int]]:
    native, middle = _given(config.first_stage_size), _given(config.max_edgelen)
    first = first_stage_size(crop, native, measures.multiple)
    if config.mode == "segments":
        return [crop if crop[0] * crop[1] > native**2 else first]
    if config.mode == "naive":
        return [first_stage_size(crop, round(native * NAIVE_OVER_NATIVE), measures.multiple)]
    if config.mode == "first-stage-only":
        return [first]
    if config.formulas == "official":
        edges = official.stage_edges(
            max(crop),
            native,
            middle,
            straight_to_grid=config.straight_to_grid,
            multiple=measures.multiple,
        )
        later = [official.stage_size(edge, crop, measures.multiple) for edge in edges]
        return [first, *(size for size in later if size[0] * size[1] >= first[0] * first[1])]  # none shrinks
    return stage_sizes(crop, native, middle, measures.multiple, straight_to_grid=config.straight_to_grid)


def _stage(
    number: int, size: tuple[int, int], cropped: Tensor, config: EditConfig, measures: Measures
) -> Stage:
    first = number == 0
    tile, overlap, native = _given(config.tile), _given(config.grid_overlap), _given(config.first_stage_size)
    one_piece = first_stage_size((cropped.shape[-2], cropped.shape[-1]), tile, measures.multiple)
    # Not tile^2: the middle stage, tile^2 pixels but for rounding to whole multiples, is one piece.
    large = max(size) > tile if config.formulas == "official" else math.prod(size) > math.prod(one_piece)
    tiled = large and not first
    grid = [Box(0, 0, *size)]
    if config.mode == "segments":
        grid = tile_boxes(*size, native, min(overlap, native // 2), measures.multiple)
    elif tiled and config.formulas == "official":
        grid = official.tile_grid(*size, tile=tile, overlap=overlap, smallest=native)
    elif tiled:
        grid = tile_boxes(*size, tile, overlap, measures.multiple)
    later_start = config.grid_startstep if tiled else config.upscale_startstep
    return Stage(
        name="first stage" if first else f"stage {number + 1}",
        number=number,
        size=size,
        start=config.start_timestep if first else later_start,
        repeats=config.repaint_steps if first else 0,
        num_steps=config.num_steps if first else _given(config.upscale_num_steps),
        candidates=config.first_stage_batch if first and config.mode != "segments" else 1,
        grid=tuple(grid),
        boxes=_computed(grid, stage_mask(cropped, size, config), number, config),
    )


def _computed(grid: list[Box], mask: Tensor, number: int, config: EditConfig) -> tuple[Box, ...]:
    """The tiles of stage `number` that are worked on: those that its `mask` touches."""
    if number > 0 and not config.blended_upscale:  # plain SDEdit repaints everything
        return tuple(grid)
    # "center" may lose a thin mask altogether, where the official code does too
    return tuple(box for box in grid if touches(box, mask)) or tuple(grid)


def _given(value: Any) -> int:
    """A size that `for_model` has filled in."""
    assert isinstance(value, int), "the config was not completed with for_model"
    return value
