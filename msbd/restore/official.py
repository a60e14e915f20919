"""What the official PASD code computes where ours differs, for restore's preset `official` and to measure it.

Source   what yangxy/PASD at 396f9ac and the libraries it calls compute; written anew, none of it copied. The
         functions are those of paper.py, under the same names (rules.py lists them). Each docstring says what
         ours, there, does instead and why. Its crashes are not imitated: where it fails or never ends, a
         ValueError says so
Units    images (1, 3, H, W) in [-1, 1], worked on in 8 bits as there; control pictures in [0, 1]; sizes (H,
         W)
Copying  needs pixels/box.py, pixels/samples.py, pixels/resize.py, pixels/tiles.py, restore/color.py,
         restore/paper.py, samplers/ans.py, samplers/schedule.py
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from samplers.ans import ans_start
from samplers.schedule import NoiseSource

from ..pixels.box import Box
from ..pixels.resize import resize, round_to_8_bits, take, truncate_to_8_bits
from ..pixels.samples import to_image, to_pixels
from ..pixels.tiles import TileBlend
from . import paper
from .color import COLOR_FIXES

MULTIPLE = 8  # pixels: both sides of a prepared picture are whole multiples

# What the official command line sets, by RestoreConfig's names; the rest are RestoreConfig's own defaults.
OPTIONS: dict[str, Any] = {
    "formulas": "official",
    "ans": "fallback",  # as at the versions that it pins
    "posterior": "sample",
    "latent_tiled_size": 320,
    "latent_tiled_overlap": 8,
    "color_fix": "wavelet",
}


# ---- sizes and tiles ---------------------------------------------------------------------------------------


def plan_sizes(
    input_size: tuple[int, int], output_size: tuple[int, int], process_size: int, downscale: int, *, grayscale: bool
) -> tuple[tuple[int, int], Box]:  # fmt: skip
    """`prepared_size`, which is also all that the nets get. ValueError for an output of another aspect.

    Ours keeps the aspect to a pixel and mirrors the picture outwards to whole latent cells.
    """
    if output_size[0] * input_size[1] != output_size[1] * input_size[0]:
        raise ValueError(
            f"preset official enlarges both sides alike; {input_size} cannot become {output_size} with it"
        )
    size = prepared_size(input_size, output_size[0] / input_size[0], process_size, grayscale=grayscale)
    return size, Box(0, 0, *size)


def prepared_size(
    size: tuple[int, int], upscale: float, process_size: int, *, grayscale: bool = False
) -> tuple[int, int]:
    """The size (H, W) at which the official code works on a picture of `size`.

    Enlarged by `upscale`, then until the shorter side has `process_size` pixels, then each side cut down to a
    multiple of 8. With `grayscale` there is no upscale, a large picture is shrunk as well, and its longer
    side has at most 2 x process_size. ValueError for an upscale that is not a whole number, and for a side
    that ends below 8 pixels. Ours pads by reflection, which keeps the aspect, and takes any scale.
    """
    height, width = _processed_size(size, upscale, process_size, grayscale)
    if min(height, width) < MULTIPLE:
        raise ValueError(
            f"the official code would work on {size[0]} x {size[1]} pixels at {height} x {width}, "
            f"but a side needs at least {MULTIPLE}; take preset paper, which pads"
        )
    return height // MULTIPLE * MULTIPLE, width // MULTIPLE * MULTIPLE


def latent_tiles(height: int, width: int, tile: int, overlap: int) -> list[Box]:
    """The official tiles of a latent, column by column: squares of min(tile, height, width) cells.

    A latent of at most tile^2 cells is one box, however long. The last tile of each axis is pushed back
    inside. ValueError unless 0 <= overlap < min(tile, height, width): there the official code never ends, so
    a long strip of a picture hangs it. Ours, `tiles.tile_boxes`, has oblong tiles and goes by the sides.
    """
    if height * width <= tile**2:
        return [Box(0, 0, height, width)]
    tile = min(tile, height, width)
    if not 0 <= overlap < tile:
        raise ValueError(
            f"the official grid never ends for tiles of {tile} latent cells overlapping by {overlap}; "
            f"the overlap must be from 0 to {tile - 1}"
        )
    tops, lefts = (_starts(side, tile, tile - overlap) for side in (height, width))
    return [Box(top, left, tile, tile) for left in lefts for top in tops]


def blend(tiles: Sequence[Box], height: int, width: int) -> TileBlend:
    """The mean of all tiles over a cell, weighted by a Gaussian over each: `GaussianBlend`. Ours fades to
    zero.
    """
    return GaussianBlend(tiles, height, width)


class GaussianBlend(TileBlend):
    """`tiles.TileBlend` by the official weights: over a tile of (height, width) a Gaussian of sigma side /
    10.

    Its centre is (width - 1) / 2 across but height / 2 down, half a cell below the middle. Its edges do not
    fade out: with the official 320 cells and overlap of 8 a neighbour's share steps from 0 to 0.26 at once.
    Ours rises from 0 over the whole overlap, the same from either side.
    """

    def __init__(self, boxes: Sequence[Box], height: int, width: int) -> None:
        super().__init__(boxes, height, width)
        self._rows = {span: _gaussian(span[1], span[1] / 2) for span in self._rows}
        self._columns = {span: _gaussian(span[1], (span[1] - 1) / 2) for span in self._columns}


# ---- the picture before ------------------------------------------------------------------------------------


def prepare(
    image: Tensor, output_size: tuple[int, int], working_size: tuple[int, int], process_size: int, *, grayscale: bool
) -> Tensor:  # fmt: skip
    """The control picture (1, 3, *working_size) in [0, 1]: `prepared`. Ours resizes once, in float."""
    upscale = output_size[0] / image.shape[-2]
    return prepared(image, upscale, process_size, grayscale=grayscale) / 2 + 0.5


def prepared(image: Tensor, upscale: float, process_size: int, *, grayscale: bool = False) -> Tensor:
    """`image` (1, 3, H, W) at its `prepared_size`, in 8 bits after each of Pillow's up to three resizes.

    Bicubic by `upscale`, bilinear to the process size, bicubic to multiples of 8. `grayscale`: its luma in
    all channels. Raises as `prepared_size`.
    """
    size = (image.shape[-2], image.shape[-1])
    height, width = prepared_size(size, upscale, process_size, grayscale=grayscale)
    picture = Image.fromarray(to_pixels(image))
    if grayscale:
        picture = picture.convert("L").convert("RGB")
    else:
        factor = int(upscale)
        picture = picture.resize((size[1] * factor, size[0] * factor), Image.Resampling.BICUBIC)
    rows, columns = _processed_size(size, upscale, process_size, grayscale)
    picture = picture.resize((columns, rows), Image.Resampling.BILINEAR)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    return to_image(np.asarray(picture)).to(image)


def hints(
    embed: Callable[[Tensor], Tensor], control: Tensor, tiles: Sequence[Box], downscale: int
) -> dict[Box, Tensor]:
    """The features of each tile, made of the tile's own pixels, so that they end in zeros at the tile's
    edges.

    Ours makes them once of the whole picture and cuts them.
    """
    return {tile: embed(take(control, tile.times(downscale))) for tile in tiles}


# ---- the start latent --------------------------------------------------------------------------------------

# diffusers' multistep schedulers, whose `add_noise` looks a timestep up on the sampler's own grid.
FALLING_BACK = ("unipc", "dpmpp")


def start_level(
    added_noise_level: int, sampler: str, timesteps: Sequence[int] | Tensor, alphas_cumprod: Tensor
) -> float:
    """a_a of Eq. 4 that `added_noise_level` leads to as in diffusers 0.25 and later; config's `ans`
    "fallback".

    There, with `FALLING_BACK`, a timestep that is not among the sampler's is silently taken for the last of
    them. So 900 with 20 steps, the official default, adds the noise of t = 50: hardly any. Ours takes the
    level asked for. ValueError for one outside the schedule.
    """
    asked = paper.start_level(added_noise_level, sampler, timesteps, alphas_cumprod)
    grid = [int(t) for t in timesteps]
    if sampler not in FALLING_BACK or added_noise_level in grid:
        return asked
    return float(alphas_cumprod[grid[-1]])


def start(z_lr: Tensor, a_n: float, a_a: float, noise: NoiseSource) -> Tensor:
    """z_N of Eq. 4 in two steps, a noise drawn for each, at "start" and "more".

    Ours draws one, since the sum of the two is normal again, as the paper says.
    """
    shape = tuple(z_lr.shape)
    return ans_start(z_lr, a_n, a_a, noise("start", 0, shape), noise("more", 0, shape))


# ---- the picture after -------------------------------------------------------------------------------------


def finish(
    restored: Tensor, control: Tensor, image: Tensor, output_size: tuple[int, int], color_fix: str
) -> Tensor:
    """The result (1, 3, *output_size): rounded to 8 bits, colours fixed, cut off to 8 bits, resized by
    Pillow.

    Ours stays in float, and keeps a grey picture grey.
    """
    fixed = COLOR_FIXES[color_fix](round_to_8_bits(restored, -1), control)
    return truncated(fixed, output_size)


def truncated(image: Tensor, size: tuple[int, int]) -> Tensor:
    """The colour-fixed `image` (1, 3, h, w) cut off, not rounded, to 8 bits, and resized by Pillow, bicubic.

    The truncation darkens by half a level on average. Ours stays in float until the file is written.
    """
    picture = Image.fromarray(to_pixels(truncate_to_8_bits(image)))
    picture = picture.resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return to_image(np.asarray(picture)).to(image)


def finish_coloured(restored: Tensor, image: Tensor, output_size: tuple[int, int]) -> Tensor:
    """The result of mode colorize (1, 3, *output_size): the chroma of `restored` on the luma of the input
    `image`.

    By `transfer_chroma_official`, in 8 bits; ours keeps the luma and the hue, in float.
    """
    source = resize(image, output_size, "bicubic").clamp(-1, 1)
    return transfer_chroma_official(round_to_8_bits(restored, -1), source)


def transfer_chroma_official(image: Tensor, source: Tensor) -> Tensor:
    """The colours of `image` (1, 3, h, w) on the luma of `source` (1, 3, H, W), by OpenCV's 8-bit YUV.

    `image` is resized to (H, W) without antialiasing; then Y = 0.299 R + 0.587 G + 0.114 B, U = 0.492 (B -
    Y) + 128, V = 0.877 (R - Y) + 128; `source`'s Y takes its Y's place, and the way back is clipped. That
    changes the luma and the hue of vivid colours. Ours, `color.transfer_chroma`, keeps both, in float.
    """
    luma = np.asarray(Image.fromarray(to_pixels(source)).convert("L"), np.int32)
    red, green, blue = np.moveaxis(_resize_like_opencv(to_pixels(image), luma.shape), -1, 0)
    y = _weighted((0.299, red), (0.587, green), (0.114, blue))
    u, v = (
        (_weighted((weight, colour - y)) + 128).clip(0, 255) - 128
        for weight, colour in ((0.492, blue), (0.877, red))
    )
    colours = (_weighted((1.14, v)), _weighted((-0.395, u), (-0.581, v)), _weighted((2.032, u)))
    result = np.stack([luma + colour for colour in colours], axis=-1)
    return to_image(result.clip(0, 255).astype(np.uint8)).to(source)


def _processed_size(
    size: tuple[int, int], upscale: float, process_size: int, grayscale: bool
) -> tuple[int, int]:
    """`prepared_size` before its sides are cut to multiples of 8."""
    factor = 1 if grayscale else int(upscale)
    if not grayscale and (upscale < 1 or upscale != factor):
        raise ValueError(
            f"the official code enlarges by whole numbers only, not {upscale:g} times; preset paper can"
        )
    height, width = (side * factor for side in size)
    if not grayscale and min(height, width) >= process_size:
        return height, width
    short, long = process_size, int(process_size * max(height, width) / min(height, width))
    if grayscale and long > 2 * process_size:
        short, long = int(2 * process_size * short / long), 2 * process_size
    return (short, long) if height <= width else (long, short)


def _starts(length: int, tile: int, stride: int) -> list[int]:
    count = math.ceil((length - tile) / stride) + 1
    return [min(k * stride, length - tile) for k in range(count)]


def _gaussian(length: int, centre: float) -> Tensor:
    variance = 0.01
    position = (torch.arange(length, dtype=torch.float64) - centre) / length
    return torch.exp(-(position**2) / (2 * variance)) / math.sqrt(2 * math.pi * variance)


def _weighted(*terms: tuple[float, np.ndarray]) -> np.ndarray:
    """The sum of weight x values, in OpenCV's fixed point: weights of 14 bits, the sum rounded."""
    total = sum(round(weight * 2**14) * values for weight, values in terms)
    return (np.asarray(total) + 2**13) >> 14


def _resize_like_opencv(pixels: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """`pixels` (h, w, 3) uint8 -> (*size, 3) int32, bilinear without antialiasing, in OpenCV's fixed point.

    Weights of 11 bits; 4 bits are dropped after the rows, 16 of each term after the columns.
    """
    samples = _bilinear(pixels.shape[1], size[1])
    columns = [weight[:, None] * pixels[:, index] for index, weight in samples]
    levels = (columns[0] + columns[1]) >> 4
    samples = _bilinear(pixels.shape[0], size[0])
    rows = [(weight[:, None, None] * levels[index]) >> 16 for index, weight in samples]
    return (rows[0] + rows[1] + 2) >> 2


def _bilinear(length: int, wanted: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The two samples of `length` around the centre of each of `wanted` pixels: (index, weight of 2048)."""
    centre = ((np.arange(wanted) + 0.5) * (length / wanted) - 0.5).astype(np.float32)
    low = np.floor(centre).astype(np.int32)
    far = np.rint((centre - low) * 2048).astype(np.int32)
    return [(low.clip(0, length - 1), 2048 - far), ((low + 1).clip(0, length - 1), far)]
