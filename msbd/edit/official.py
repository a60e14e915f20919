"""Where the paper and its official code differ: the official code's formulas.

Source   what pfnet-research/multi-stage-blended-diffusion at b933b3d computes; written anew, none of it
         copied. Each docstring says what ours (paper.py, the same name) does instead and why. Its crashes are
         not imitated: where it fails an assertion or never ends, a ValueError says so
Units    pixels, sizes (H, W); masks (1, 1, H, W), 1 = edit; pictures (1, 3, H, W) in [-1, 1]; latents (n, 4,
         h, w)

First the functions that paper.py has under the same names, then what they are made of, then decoder
optimisation's latents (`decoderopt_latents="reencode"`). `plan.plan_edit` chooses between the pages, once.
"""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from samplers.repaint import Evaluation, official_plan, with_known
from samplers.schedule import ldm_start_timesteps, ldm_timesteps, q_sample_between

from ..latents import encode
from ..pixels.box import Box
from ..pixels.masks import mask_box
from ..pixels.resize import take, truncate_to_8_bits
from ..pixels.samples import to_image, to_pixels
from . import paper
from .config import ModelSpec, ResolvedEditConfig
from .crops import crop_box, first_stage_size
from .decoder_opt import Segment

MULTIPLE = 64  # pixels; all official sizes are multiples of it

# Preset `official`: the EditConfig options that differ from the paper's. What its counting does (fresh and
# late background noise, a result that is not quite clean, twice the steps after the first stage) comes with
# formulas="official". Not imitated, as they are accidents: the crop's swapped axes and extents one pixel
# short, the picture's BGR order before the upscaler, tile sources cut two pixels off, the same noise in every
# tile, endless grids, pasting back and cutting out again between stages, 8-bit truncation of the result. Not
# imitated, as a plan has one crop and one grid per stage: later stages on a rectangle instead of the square,
# decoding a tiled stage in a grid of its own (overlap 256), decoder steps of two segments each.
OPTIONS: dict[str, Any] = {
    "formulas": "official",
    "margin": 1.2,
    "repaint_jump": 0,
    "start_from": "noise",
    "latent_mask": "center",
    "background_level": "current",
    "background_noise": "fresh",
    "decoderopt_latents": "reencode",
}


def crop(mask: Tensor, config: ResolvedEditConfig, spec: ModelSpec) -> Box:
    """A crop that is never smaller than native, around the mask's centre of mass (`crop_around`).

    Where it leaves the picture the official code stops; here it is then the paper's, which mirrors the
    picture.
    """
    box, picture_size = mask_box(mask), (mask.shape[-2], mask.shape[-1])
    margin = max(config.margin, config.first_stage_size / max(box.size))
    ours = crop_box(box, picture_size, margin, spec.multiple)
    inside = Box(0, 0, *picture_size).contains(ours)
    return crop_around(mask, ours.size) if inside else ours


def sizes(crop_size: tuple[int, int], config: ResolvedEditConfig, spec: ModelSpec) -> list[tuple[int, int]]:
    """A ladder of sqrt(2) (`stage_edges`), no stage shrinking. Ours: one stage between, no size twice."""
    first = first_stage_size(crop_size, config.first_stage_size, spec.multiple)
    edges = stage_edges(
        max(crop_size),
        config.first_stage_size,
        config.max_edgelen,
        straight_to_grid=config.straight_to_grid,
        multiple=spec.multiple,
    )
    later = [stage_size(edge, crop_size, spec.multiple) for edge in edges]
    return [first, *(size for size in later if math.prod(size) >= math.prod(first))]


def is_tiled(
    size: tuple[int, int], crop_size: tuple[int, int], config: ResolvedEditConfig, spec: ModelSpec
) -> bool:
    """Where the longer side is longer than a tile. Ours goes by the number of pixels, as memory does."""
    return max(size) > config.tile


def grid(size: tuple[int, int], config: ResolvedEditConfig, spec: ModelSpec) -> list[Box]:
    """`tile_grid`, with redundant tiles and tiles of different sizes. Ours has neither."""
    return tile_grid(*size, tile=config.tile, overlap=config.grid_overlap, smallest=config.first_stage_size)


def evaluations(
    num_steps: int,
    start: float,
    repeats: int,
    jump: int,
    alphas_cumprod: Tensor,
    *,
    known_level: str = "current",
    known_noise: str = "fresh",
    sampler: str = "ddim",
    spacing: str = "auto",
    repaint_end: float = 0.0,
) -> tuple[Evaluation, ...]:
    """The official count of steps: LDM's spacing, which takes more steps than asked where they do not divide
    1000, cut off at int(start x steps). Ours has exactly the number asked for; see
    `samplers.repaint.official_plan` for the rest.

    `known_level` "prev" and `known_noise` "once" put the paper's background (lines 6 and 7) into it, to
    measure that. The last three are paper.py's: the official code has one sampler and one spacing, and
    repeats every step (EditConfig refuses others).
    """
    timesteps = ldm_start_timesteps(ldm_timesteps(num_steps), start)
    plan = official_plan(timesteps, alphas_cumprod, repeats=repeats, jump=jump)
    return with_known(plan, level=known_level, noise=known_noise)


def start_latent(known: Tensor, first: Evaluation, alphas_cumprod: Tensor, noise: Tensor) -> Tensor:
    """SDEdit's start as the official code noises it: as if `known` were at level alphas_cumprod[0] already.
    Ours: clean.
    """
    return q_sample_between(known, float(alphas_cumprod[0]), first.a_t, noise)


def shared_noise(whole_run: bool) -> Collection[str]:
    """In a whole run one x-hat serves all candidates. Ours draws one for each (line 7 stands inside the
    loop).
    """
    return ("known",) if whole_run else ()


def before_upscaling(picture: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """Real-ESRGAN gets the last stage's picture through 8 bits, truncated. Ours stays in float."""
    grows = tuple(picture.shape[-2:]) != tuple(size)
    return truncate_to_8_bits(picture) if mode == "rrdb" and grows else picture


def blend(
    pictures: Iterable[Tensor], boxes: Sequence[Box], grid: Sequence[Box], background: Tensor, overlap: int
) -> Tensor:
    """Tiles are drawn over each other in 8 bits (`compose_tiles`). Ours crossfades them in float."""
    if len(grid) == 1:
        return paper.blend(pictures, boxes, grid, background, overlap)
    drawn = compose_tiles(to_pixels(background), [to_pixels(tile) for tile in pictures], boxes, overlap)
    return to_image(drawn).to(background)


# ---- what they are made of ---------------------------------------------------------------------------------


def crop_around(mask: Tensor, crop_size: tuple[int, int]) -> Box:
    """The crop of `crop_size` around the centre of mass of `mask` (1, 1, H, W), slid inside the picture.

    Where that loses part of a mask that would fit, it is centred on the box of the mask instead. ValueError
    where the picture is smaller than the crop (an assertion there). Ours centres on the box always: the
    centre of mass moves with the mask's shape, and two stages could disagree on it.
    """
    picture_size = (mask.shape[-2], mask.shape[-1])
    if crop_size[0] > picture_size[0] or crop_size[1] > picture_size[1]:
        raise ValueError(
            f"the official crop of {crop_size} does not fit the picture of {picture_size} (H, W); "
            "take a smaller margin or preset paper, which pads"
        )
    box = mask_box(mask)
    rows, columns = (mask[0, 0] > 0).nonzero().double().mean(0).tolist()
    crop = _window((int(rows), int(columns)), crop_size, picture_size)
    if not crop.contains(box) and box.height <= crop_size[0] and box.width <= crop_size[1]:
        middle = (int((box.top + box.bottom - 1) / 2), int((box.left + box.right - 1) / 2))
        crop = _window(middle, crop_size, picture_size)
    return crop


def stage_edges(
    longest: int,
    native: int = 512,
    max_edge: int = 768,
    *,
    straight_to_grid: bool = False,
    multiple: int = MULTIPLE,
) -> list[int]:
    """The longer edge of each stage after the first: native x sqrt(2)^j up to `max_edge`, then `longest`.

    The last may repeat the one before it (768 gives 768, 768) or the first stage's size (512 gives 512): a
    pass that changes no size. Ours, `crops.stage_sizes`: the paper's one stage of 1.5 x native, none
    repeated, and no jump beyond the upscaler's x4.
    """
    if straight_to_grid:
        return [longest]
    count = max(0, math.ceil(2 * math.log2(longest / native) - 1e-9)) if longest > native else 0
    edges = [math.ceil(2 ** (0.5 * j) * native / multiple) * multiple for j in range(count)]
    return [edge for edge in edges if edge <= max_edge][1:] + [longest]


def stage_size(edge: int, rectangle: tuple[int, int], multiple: int = MULTIPLE) -> tuple[int, int]:
    """The size (H, W) of the stage whose longer edge is `edge`; the shorter one is rounded UP to `multiple`.

    Aspects differ by stage, and later crops may leave the picture.
    Ours picks the multiples whose aspect is nearest, and takes the same crop in every stage.
    """
    long, short = max(rectangle), min(rectangle)
    other = math.ceil(edge * short / long / multiple) * multiple
    return (edge, other) if rectangle[0] >= rectangle[1] else (other, edge)


def tile_grid(
    height: int, width: int, *, tile: int = 768, overlap: int = 128, smallest: int = 512
) -> list[Box]:
    """The official grid of tiles, row by row: stride tile - overlap, each up to `tile` long.

    A tile that would be shorter than `smallest` starts earlier. It goes on while a start lies inside the
    picture, even if a tile has reached its end: 1408 pixels get three tiles where two do. Where tile -
    overlap < smallest it never ends; that is a ValueError here. Ours: `tiles.tile_boxes`.
    """
    if height <= tile and width <= tile:
        return [Box(0, 0, height, width)]
    spans = [_official_spans(side, tile, overlap, smallest) for side in (height, width)]
    return [
        Box(top, left, bottom - top, right - left) for top, bottom in spans[0] for left, right in spans[1]
    ]


def alpha_mask(box: Box, picture_size: tuple[int, int], overlap: int) -> Tensor:
    """The opacity (h, w) of a tile: 1, with a sigmoid ramp over overlap / 2 pixels on its inner sides.

    Drawn in order over opaque earlier tiles, only the later tile's ramp shows, so the fade is half the
    overlap, at the later tile's worst pixels. Ours, `tiles.TileBlend`: a symmetric fade over the whole
    overlap.
    """
    rows = _ramps(box.height, overlap, box.top > 0, box.bottom < picture_size[0])
    columns = _ramps(box.width, overlap, box.left > 0, box.right < picture_size[1])
    return (rows[:, None] * columns[None, :]).float()


def compose_tiles(
    base: np.ndarray, tiles: Sequence[np.ndarray], boxes: Sequence[Box], overlap: int
) -> np.ndarray:
    """Draw uint8 `tiles` (h, w, 3) in order over `base` (H, W, 3): the "over" operator of Porter & Duff 1984.

    Opacities are truncated to 8 bits first, as there, and the result of each tile is rounded. Ours: float
    until the end.
    """
    canvas = base.astype(np.int64)
    for tile, box in zip(tiles, boxes, strict=True):
        alpha = (alpha_mask(box, (base.shape[0], base.shape[1]), overlap).numpy() * 255).astype(np.uint8)
        window = (slice(box.top, box.bottom), slice(box.left, box.right))
        opacity = alpha[..., None].astype(np.int64)
        canvas[window] = (opacity * tile + (255 - opacity) * canvas[window] + 127) // 255
    return canvas.astype(np.uint8)


# ---- decoder optimisation ----------------------------------------------------------------------------------


@torch.no_grad()
def reencoded_segment(vae: Any, image: Tensor, reference: Tensor, mask: Tensor) -> Segment:
    """A segment for `decoder_opt.optimize_decoder` whose latent is the ENCODED `image`, not the sampler's.

    `image` and `reference` (1, 3, H, W) in [-1, 1], `mask` (1, 1, H, W). The
    target inside the mask is thus D(E(x_out)), one more trip through the VAE, which softens every stage.
    Ours is eq. 1: z_out, x_out.
    """
    return Segment(encode(vae, image), reference, mask)


def reencoded_segments(vae: Any, image: Tensor, reference: Tensor, mask: Tensor, tile: int) -> list[Segment]:
    """`reencoded_segment` for each of `decoder_segments`, every pixel weighted by 1 / the number of segments
    it is in.
    """
    boxes = decoder_segments(image.shape[-2], image.shape[-1], tile)
    coverage = torch.zeros_like(mask)
    for box in boxes:
        take(coverage, box).add_(1)  # a view: segments lie inside
    pieces = [[take(part, box) for part in (image, reference, mask)] for box in boxes]
    segments = [reencoded_segment(vae, *piece) for piece in pieces]
    return [
        replace(segment, weight=1 / take(coverage, box)) for segment, box in zip(segments, boxes, strict=True)
    ]


def decoder_segments(height: int, width: int, tile: int = 512) -> list[Box]:
    """What the decoder is fitted to: tiles without overlap, the last one of each axis pushed back inside."""
    spans = [[min(start, max(side - tile, 0)) for start in range(0, side, tile)] for side in (height, width)]
    return [Box(top, left, min(tile, height), min(tile, width)) for top in spans[0] for left in spans[1]]


def _window(centre: tuple[int, int], crop_size: tuple[int, int], picture_size: tuple[int, int]) -> Box:
    top, left = (
        min(max(c - side // 2, 0), length - side)
        for c, side, length in zip(centre, crop_size, picture_size, strict=True)
    )
    return Box(top, left, *crop_size)


def _official_spans(length: int, tile: int, overlap: int, smallest: int) -> list[tuple[int, int]]:
    stride = tile - overlap
    if stride <= 0 or stride < min(smallest, length):
        raise ValueError(
            f"the official grid never ends for tiles of {tile} pixels overlapping by {overlap}; "
            f"tile - overlap must be at least {smallest}"
        )
    spans, start = [], 0
    while start < length:
        end = min(length, start + tile)
        if end - start < smallest:
            start = max(end - smallest, 0)
        spans.append((start, end))
        start += stride
    return spans


def _ramps(length: int, overlap: int, before: bool, after: bool) -> Tensor:
    weight = torch.ones(length, dtype=torch.float64)
    half = overlap // 2
    ramp = torch.sigmoid(torch.linspace(-5, 5, half, dtype=torch.float64)) if half else weight[:0]
    if before:
        weight[:half] *= ramp
    if after and half:
        weight[-half:] *= ramp.flip(0)
    return weight
