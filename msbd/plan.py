"""What an edit will do before it does it: the options, the crop, the stages, their tiles.

Paper    Ackermann & Li 2022 (Multi-Stage Blended Diffusion), arXiv:2210.12965, appendix A.2, "Hyperparameters"
Units    pixels unless a name says otherwise; sizes are (H, W); masks (1, 1, H, W), 1 = edit
"""

from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args, get_origin

from torch import Tensor

from . import official
from .crops import Box, crop_box, first_stage_size, mask_box, stage_sizes
from .masks import latent_mask, resize_mask, sample_mask
from .resize import take
from .tiles import tile_boxes, touches

Mode = Literal["msbd", "naive", "segments", "first-stage-only"]
NAIVE_OVER_NATIVE = 960 / 512  # the paper's baseline (A.3): the largest size that fitted its GPU


@dataclass(frozen=True)
class Measures:
    """The sizes a diffusion model was trained for; the measures of every stage follow from them."""

    native: int = 512  # pixels, side of its training pictures
    multiple: int = 64  # pixels; picture sides it likes are multiples of this
    guidance_scale: float = 7.5  # the paper's, for Stable Diffusion


@dataclass(frozen=True)
class EditConfig:
    """Every option of an edit. The defaults are the paper's; None means "as the model's measures say"."""

    mode: Mode = "msbd"  # the paper's method, or one of its baselines
    margin: float = 1.4  # side of the crop over the longer side of the mask, at least 1
    seed: int | None = None  # of all noise, where the call gets no generator; None: 0
    # Sampling: all stages
    num_steps: int = 50  # T of the paper: DDIM steps of a whole run
    eta: float = 1.0  # 0: deterministic DDIM, 1: as much noise as DDPM
    guidance_scale: float | None = None  # 1: the prompt alone, without guidance
    negative_prompt: str = ""
    background_level: Literal["prev", "current"] = (
        "prev"  # of the background: algorithm 1's, or a step noisier
    )
    background_noise: Literal["once", "fresh"] = (
        "once"  # one x-hat for all repeats of a step, or a new one each
    )
    latent_mask: Literal["any", "center"] = "any"  # cells with any masked pixel, or with a masked centre
    dilate_mask: bool = False  # grow the latent mask early on, by 3, 2, 1 cells, then not
    # First stage
    first_stage_size: int | None = None  # side of the square with its area; None: native
    first_stage_batch: int = 5  # B: candidates to choose from
    repaint_steps: int = 5  # R: repeats of each step after its first evaluation; 0: Blended Diffusion
    repaint_jump: int = 1  # steps each repeat goes back
    start_timestep: float = 1.0  # fraction of the schedule to start from
    start_from: Literal["source", "noise"] = "source"  # q(x_T | x~) as in algorithm 1, or pure noise
    clip_reranking: bool = True  # choose by CLIP; otherwise the first candidate
    rerank_area: Literal["crop", "mask"] = "crop"  # what CLIP looks at
    # Later stages
    max_edgelen: int | None = (
        None  # side of the square with the intermediate stage's area; None: 1.5 x native
    )
    straight_to_grid: bool = False  # leave the intermediate stage out
    upscale_startstep: float = 0.4  # T' / T of stages in one piece
    grid_startstep: float = 0.25  # T' / T of tiled stages
    upscale_num_steps: int | None = (
        None  # T of the later stages; None: num_steps (official formulas: twice that)
    )
    upscaling_mode: Literal["rrdb", "bilinear", "bicubic", "sharpen", "none"] = "rrdb"  # none: nearest pixel
    lowpass_reference: Literal["matching", "half", "no"] = "matching"  # LP of line 20
    conditional_upscale: bool = True  # with the prompt; otherwise with the empty one
    blended_upscale: bool = True  # keep the background; otherwise SDEdit of the whole crop
    tile: int | None = None  # side of a tile; None: 1.5 x native
    grid_overlap: int | None = None  # of neighbouring tiles; None: a sixth of the tile
    tile_batch: int | None = None  # tiles sampled at once; None: what fits into memory
    # Decoder optimisation
    decoder_optimization: bool = True
    decoderopt_steps: int = 100  # of Adam
    decoderopt_lr: float = 1e-4
    decoderopt_weight: float = 100.0  # lambda of eq. 1; the paper does not give it, the official code has 100
    decoderopt_latents: Literal["sampler", "reencode"] = "sampler"  # z_out of eq. 1, or E(x_out)
    # Composite
    feather: int = 0  # pixels inside the mask over which the edit fades in
    formulas: Literal["paper", "official"] = "paper"  # whose counting, starts, ladder and tile blending

    def __post_init__(self) -> None:
        for field in fields(self):
            if get_origin(field.type) is Literal and getattr(self, field.name) not in get_args(field.type):
                allowed = ", ".join(map(str, get_args(field.type)))
                raise ValueError(f"{field.name} is {getattr(self, field.name)!r}; expected one of {allowed}")
        for name, least in (("num_steps", 1), ("first_stage_batch", 1), ("repaint_steps", 0), ("repaint_jump", 0),
                            ("margin", 1), ("eta", 0), ("feather", 0), ("decoderopt_steps", 0), ("decoderopt_lr", 0),
                            ("decoderopt_weight", 0), ("tile_batch", 1), ("first_stage_size", 1), ("max_edgelen", 1),
                            ("tile", 1), ("grid_overlap", 0), ("upscale_num_steps", 1)):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise ValueError(f"{name} is {value}; expected at least {least}")
        if self.eta > 1:
            raise ValueError(
                f"eta is {self.eta}; expected 0 (deterministic DDIM) to 1 (as much noise as DDPM)"
            )
        for name in ("start_timestep", "upscale_startstep", "grid_startstep"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a fraction above 0, at most 1")
        if self.repaint_jump == 0 and self.formulas == "paper":
            raise ValueError("repaint_jump is 0, the official code's word for one step; expected 1 or more")

    def for_model(self, measures: Measures) -> "EditConfig":
        """The same options with every None but `tile_batch` filled in. ValueError where a size does not suit the model."""
        side = measures.native * 3 // 2
        tile = self.tile or side
        overlap = tile // 6 // measures.multiple * measures.multiple or measures.multiple
        filled = {
            "seed": 0,
            "guidance_scale": measures.guidance_scale,
            "first_stage_size": measures.native,
            "max_edgelen": side,
            "upscale_num_steps": self.num_steps * (2 if self.formulas == "official" else 1),
            "tile": tile,
            "grid_overlap": overlap if overlap < tile else 0,
        }
        full = replace(self, **{name: value for name, value in filled.items() if getattr(self, name) is None})
        for name in ("first_stage_size", "max_edgelen", "tile", "grid_overlap"):
            if getattr(full, name) % measures.multiple:
                raise ValueError(
                    f"{name} is {getattr(full, name)}; this model needs multiples of {measures.multiple} pixels"
                )
        return full


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
    cropped = take(mask, crop)
    sizes = _sizes(crop.size, config, measures)
    stages = (_stage(number, size, cropped, config, measures) for number, size in enumerate(sizes))
    return EditPlan(crop, tuple(stages), config)


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
    large = max(size) > tile if config.formulas == "official" else size[0] * size[1] > tile * tile
    tiled = large and not first
    grid = [Box(0, 0, *size)]
    if config.mode == "segments":
        grid = tile_boxes(*size, native, min(overlap, native // 2), measures.multiple)
    elif tiled and config.formulas == "official":
        grid = official.tile_grid(*size, tile=tile, overlap=overlap, smallest=native)
    elif tiled:
        grid = tile_boxes(*size, tile, overlap, measures.multiple)
    mask = stage_mask(cropped, size, config)
    # Plain SDEdit repaints everything; and "center" may lose a thin mask altogether, where the official code does too
    boxes = [box for box in grid if touches(box, mask)] if first or config.blended_upscale else grid
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
        boxes=tuple(boxes or grid),
    )


def _given(value: Any) -> int:
    """A size that `for_model` has filled in."""
    assert isinstance(value, int), "the config was not completed with for_model"
    return value
