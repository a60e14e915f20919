"""What an edit will do, before anything is computed: the crop, the stages, and of each its schedule, tiles
and masks.

Paper    Ackermann & Li 2022, arXiv:2210.12965, "Approach" and appendix A.2
Units    pixels, sizes (H, W); masks (1, 1, H, W), 1 = edit; boxes lie in the picture (crop) or in the stage
         (tiles)
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from types import ModuleType

import torch
from torch import Tensor

from samplers.repaint import Evaluation

from ..pixels.box import Box
from ..pixels.masks import latent_mask, resize_mask, sample_mask
from ..pixels.resize import put_back, take
from ..pixels.tiles import covered, tile_boxes
from . import official, paper
from .config import EditConfig, ModelSpec, ResolvedEditConfig
from .crops import first_stage_size

RULES = {"paper": paper, "official": official}  # by EditConfig.formulas
LARGEST_CROP, SMALL_CROP = 16, 512  # times the picture's area; a crop of SMALL_CROP squared is always taken
NAIVE_OVER_NATIVE = 15 / 8  # the naive baseline runs at 960 for a model of 512, what fits into 32 GB


@dataclass(frozen=True)
class Stage:
    """One pass of Blended Diffusion at one size, with all that it needs."""

    name: str
    # 0: the first stage, on noise or a noised source; later ones refine the picture of the one before
    number: int
    size: tuple[int, int]  # (H, W) of the whole crop at this stage
    start: float  # fraction of the schedule its sampling starts from: T' / T
    whole_run: bool  # whether that is its end, where nothing is left of the source
    repeats: int  # R, RePaint's repeats of each step
    num_steps: int  # T, the steps of a whole run
    candidates: int  # B: pictures sampled side by side; more than one in the first stage only
    kept: int  # of them those that go on after `halfway`
    halfway: int  # how many evaluations all candidates have
    joint: bool  # whether the tiles are sampled as one latent
    grid: tuple[Box, ...]  # all tiles; a stage in one piece has one
    boxes: tuple[Box, ...]  # those with a masked pixel, the only ones computed
    schedule: tuple[Evaluation, ...] = field(repr=False)  # what each window goes through
    mask: Tensor = field(repr=False, compare=False)  # m at this size, (1, 1, H, W)
    cells: Tensor = field(repr=False, compare=False)  # m in latent cells, (1, 1, h, w)

    @property
    def evaluations(self) -> int:
        """Evaluations of the U-Net: each candidate and tile counts, both halves of the guidance as one."""
        all_of_them, the_rest = self.halfway, len(self.schedule) - self.halfway
        return (all_of_them * self.candidates + the_rest * self.kept) * len(self.boxes)

    @property
    def windows(self) -> tuple[Box, ...]:
        """What is sampled by itself: the computed tiles, or the whole stage where they are joint."""
        return (Box(0, 0, *self.size),) if self.joint else self.boxes


@dataclass(frozen=True)
class EditPlan:
    """Where and at which sizes an edit works."""

    crop: Box
    stages: tuple[Stage, ...]
    config: ResolvedEditConfig
    spec: ModelSpec
    picture_size: tuple[int, int]  # (H, W) of the picture that was planned for

    @property
    def rules(self) -> ModuleType:
        """Whose formulas are followed: paper.py or official.py, which have the same functions."""
        return RULES[self.config.formulas]

    @property
    def evaluations(self) -> int:
        """Evaluations of the U-Net in all."""
        return sum(stage.evaluations for stage in self.stages)

    def to(self, device: torch.device) -> "EditPlan":
        """The same plan with its masks on `device`."""
        moved = (replace(s, mask=s.mask.to(device), cells=s.cells.to(device)) for s in self.stages)
        return replace(self, stages=tuple(moved))


@dataclass(frozen=True)
class EditResult:
    """The edited picture, equal to the source bit for bit outside the mask, and how it came about."""

    image: Tensor  # (1, 3, H, W) in [-1, 1]
    plan: EditPlan  # its config.seed is the one that was used, drawn from a generator or not
    # (B, 3, h, w), those of the first stage that were kept, before decoder optimisation; of segments B = 0
    candidates: Tensor
    scores: Tensor | None  # (B,) CLIP's, higher = better; None without reranking
    chosen: int  # index of the candidate that was taken
    seconds: dict[str, float] = field(default_factory=dict)  # by stage and task
    notes: tuple[str, ...] = ()  # what did not go as planned: batches and tiles halved to fit into memory
    # (1, 1, H, W) in [0, 1], beside `image`: how much of the edit each of its pixels has
    weight: Tensor = field(kw_only=True)


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


def plan_edit(
    mask: Tensor,
    config: EditConfig,
    spec: ModelSpec,
    alphas_cumprod: Tensor,
    *,
    downscale: int = 8,
    has_upscaler: bool = True,
) -> EditPlan:
    """The plan for repainting `mask` (1, 1, H, W), {0, 1}, with a model of these sizes and levels
    alphas_cumprod (T,).

    `downscale` is the side of the autoencoder's latent cells in pixels. ValueError for an empty mask, options
    that do not suit the model, more steps than its schedule has, and a stage that needs an upscaler where
    there is none.
    """
    full = config.for_model(spec)
    rules = RULES[full.formulas]
    crop = rules.crop(mask, full, spec)
    most = max(LARGEST_CROP * mask.shape[-2] * mask.shape[-1], SMALL_CROP**2)
    if crop.height * crop.width > most:
        raise ValueError(
            f"the mask needs a crop of {crop.width} x {crop.height} pixels, more than {LARGEST_CROP} times the picture of "
            f"{mask.shape[-1]} x {mask.shape[-2]}, which is too narrow for it; mask a shorter part of it"
        )
    masked = visible = take(mask, crop)
    if not Box(0, 0, mask.shape[-2], mask.shape[-1]).contains(crop):
        # Where the crop leaves the picture, the nets see picture and mask mirrored, and that part of the
        # result is cut off: no tile is computed for it alone.
        picture = Box(-crop.top, -crop.left, mask.shape[-2], mask.shape[-1])
        visible = put_back(torch.zeros_like(masked), mask, picture)
    planning = _Planning(full, spec, rules, crop.size, alphas_cumprod, downscale)
    sizes = planning.sizes()
    stages = tuple(planning.stage(number, size, masked, visible) for number, size in enumerate(sizes))
    grows = any(after.size != before.size for before, after in pairwise(stages))
    if grows and full.upscaling_mode == "rrdb" and not has_upscaler:
        raise ValueError(
            "upscaling_mode is rrdb, but this model comes without an upscaler: name one (`--upscaler "
            "realesrgan-x4plus`), or take --upscaling-mode bilinear, which does without"
        )
    return EditPlan(crop, stages, full, spec, (mask.shape[-2], mask.shape[-1]))


def halve_tiles(stage: Stage, config: ResolvedEditConfig, spec: ModelSpec) -> Stage | None:
    """A later stage in tiles of half the size, for when memory ran out; None if they cannot shrink."""
    tile = max(stage.grid[0].size) // 2 // spec.multiple * spec.multiple
    if stage.number == 0 or tile < 2 * spec.multiple:
        return None
    overlap = min(config.grid_overlap, tile // 2 // spec.multiple * spec.multiple)
    grid = tile_boxes(*stage.size, tile, overlap, spec.multiple)
    boxes = _computed(grid, covered(stage.mask, stage.boxes), stage.number, config)
    return replace(stage, grid=tuple(grid), boxes=boxes)


def stage_mask(mask: Tensor, size: tuple[int, int], config: EditConfig) -> Tensor:
    """The crop's mask (1, 1, H, W) at a stage's size, {0, 1}."""
    return (resize_mask if config.latent_mask == "any" else sample_mask)(mask, size)


def stage_cells(mask: Tensor, at_size: Tensor, number: int, config: EditConfig, downscale: int) -> Tensor:
    """The crop's mask (1, 1, H, W) in a stage's latent cells, (1, 1, h, w), {0, 1}; `at_size` is its
    `stage_mask`.
    """
    if config.latent_mask == "center" and number == 0:  # the official code skips the stage's own pixels
        return sample_mask(mask, (at_size.shape[-2] // downscale, at_size.shape[-1] // downscale))
    return latent_mask(at_size, downscale, config.latent_mask)


@dataclass(frozen=True)
class _Planning:
    """What all stages of a plan follow from."""

    config: ResolvedEditConfig
    spec: ModelSpec
    rules: ModuleType
    crop_size: tuple[int, int]
    alphas_cumprod: Tensor
    downscale: int

    def sizes(self) -> list[tuple[int, int]]:
        """Of all stages; the baselines have one."""
        config, multiple = self.config, self.spec.multiple
        native, crop = config.first_stage_size, self.crop_size
        first = first_stage_size(crop, native, multiple)
        if config.method == "segments":
            return [crop if crop[0] * crop[1] > native**2 else first]
        if config.method == "naive":
            return [first_stage_size(crop, round(native * NAIVE_OVER_NATIVE), multiple)]
        if config.method == "first-stage-only":
            return [first]
        return self.rules.sizes(crop, config, self.spec)

    def stage(self, number: int, size: tuple[int, int], masked: Tensor, visible: Tensor) -> Stage:
        """The stage of that number and size.

        `masked` is the crop's mask, (1, 1, H, W), mirrored where the crop leaves the picture; in `visible` it
        is 0 there.
        """
        config, first = self.config, number == 0
        tiled = not first and self.rules.is_tiled(size, self.crop_size, config, self.spec)
        grid = self._grid(size, tiled)
        mask = stage_mask(masked, size, config)
        visible = mask if visible is masked else stage_mask(visible, size, config)
        num_steps = config.num_steps if first else config.upscale_num_steps
        later_start = config.grid_startstep if tiled else config.upscale_startstep
        start = config.start_timestep if first else later_start
        repeats = config.repaint_steps if first else 0
        schedule = self.rules.evaluations(
            num_steps,
            start,
            repeats,
            config.repaint_jump,
            self.alphas_cumprod,
            known_level=config.background_level,
            known_noise=config.background_noise,
            sampler=config.sampler,
            spacing=config.spacing,
            repaint_end=config.repaint_end,
        )
        candidates = config.first_stage_batch if first and config.method != "segments" else 1
        halfway = _halfway(schedule)  # 0 where there is one evaluation
        return Stage(
            name="first stage" if first else f"stage {number + 1}",
            number=number,
            size=size,
            start=start,
            whole_run=first and start == 1,
            repeats=repeats,
            num_steps=num_steps,
            candidates=candidates,
            kept=min(config.candidates_kept or candidates, candidates)
            if config.clip_reranking and halfway
            else candidates,
            halfway=halfway,
            joint=tiled and config.tiles == "joint",
            grid=tuple(grid),
            boxes=_computed(grid, visible, number, config),
            schedule=schedule,
            mask=mask,
            cells=stage_cells(masked, mask, number, config, self.downscale),
        )

    def _grid(self, size: tuple[int, int], tiled: bool) -> list[Box]:
        config = self.config
        if config.method == "segments":
            native = config.first_stage_size
            return tile_boxes(*size, native, min(config.grid_overlap, native // 2), self.spec.multiple)
        return self.rules.grid(size, config, self.spec) if tiled else [Box(0, 0, *size)]


def _halfway(schedule: Sequence[Evaluation]) -> int:
    """The index of a first evaluation of a timestep, as near before the middle as there is one."""
    middle = len(schedule) // 2
    firsts = (k for k in range(middle, 0, -1) if schedule[k].t < schedule[k - 1].t)
    return next(firsts, middle)


def _computed(grid: list[Box], mask: Tensor, number: int, config: EditConfig) -> tuple[Box, ...]:
    """The tiles of stage `number` that are worked on: those that its `mask` touches."""
    if number > 0 and not config.blended_upscale:  # plain SDEdit repaints everything
        return tuple(grid)
    # "center" may lose a thin mask altogether, where the official code does too
    return tuple(box for box in grid if mask[..., *box.window].any()) or tuple(grid)
