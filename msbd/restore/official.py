"""What the official PASD code computes where ours differs, for restore's preset `official` and to measure it.

Source   what yangxy/PASD at 396f9ac and the libraries it calls compute; written anew, none of it copied.
         Each docstring says what ours does instead and why. Its crashes are not imitated: where it fails or
         never ends, a ValueError says so
Units    images (1, 3, H, W) in [-1, 1], worked on in 8 bits as there; sizes (H, W); boxes as in crops.py
Copying  needs crops.py, images.py, official.py, tiles.py and what they need
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..pixels.box import Box
from ..pixels.files import to_image, to_pixels
from ..pixels.resize import truncate_to_8_bits
from ..pixels.tiles import TileBlend

MULTIPLE = 8  # pixels; both sides of a prepared picture are multiples of it

# What the official command line sets, by RestoreConfig's names; the rest are RestoreConfig's own defaults.
OPTIONS: dict[str, Any] = {
    "formulas": "official",
    "ans": "fallback",  # as at the versions that it pins
    "posterior": "sample",
    "latent_tiled_size": 320,
    "latent_tiled_overlap": 8,
    "color_fix": "wavelet",
}


# ---- the picture before and after --------------------------------------------------------------------------


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


def prepare(image: Tensor, upscale: float, process_size: int, *, grayscale: bool = False) -> Tensor:
    """`image` (1, 3, H, W) at its `prepared_size`, in 8 bits after each of Pillow's up to three resizes.

    Bicubic by `upscale`, bilinear to the process size, bicubic to multiples of 8. `grayscale`: its luma in
    all channels. Raises as `prepared_size`. Ours resizes once, in float.
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


def round_to_levels(image: Tensor) -> Tensor:
    """`image` on 256 levels, as the official pipeline gives its result before the colour fix. Ours stays in float."""
    return to_image(to_pixels(image)).to(image)


def finish(image: Tensor, size: tuple[int, int]) -> Tensor:
    """The colour-fixed `image` (1, 3, h, w) cut off, not rounded, to 8 bits, and resized by Pillow, bicubic.

    The truncation darkens by half a level on average. Ours stays in float until the file is written.
    """
    picture = Image.fromarray(to_pixels(truncate_to_8_bits(image)))
    picture = picture.resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return to_image(np.asarray(picture)).to(image)


FALLING_BACK = (
    "unipc",
    "dpmpp",
)  # diffusers' multistep schedulers, whose `add_noise` looks a timestep up on their grid


# ---- the start latent --------------------------------------------------------------------------------------


def start_level(
    added_noise_level: int, timesteps: Sequence[int] | Tensor, alphas_cumprod: Tensor, fallback: bool
) -> float:
    """alpha_a of the adjustable noise schedule (Eq. 4 of the paper) that `added_noise_level` leads to.

    It is alphas_cumprod[added_noise_level]; but with `fallback`, as in diffusers 0.25 and later, a timestep
    that is not among the sampler's `timesteps` is silently taken for the last of them. So 900 with 20 steps,
    the official default, adds the noise of t = 50: hardly any. Ours takes the level asked for. ValueError for
    one outside the schedule.
    """
    if not 0 <= added_noise_level < len(alphas_cumprod):
        raise ValueError(
            f"the added noise level is a timestep, 0 to {len(alphas_cumprod) - 1}; got {added_noise_level}"
        )
    grid = [int(t) for t in timesteps]
    reached = grid[-1] if fallback and added_noise_level not in grid else added_noise_level
    return float(alphas_cumprod[reached])


# ---- tiles -------------------------------------------------------------------------------------------------


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


def gaussian_weights(height: int, width: int) -> Tensor:
    """The official weights (1, 1, height, width), float64, of a tile: a Gaussian of sigma side / 10.

    Its centre is (width - 1) / 2 across but height / 2 down, half a cell below the middle. Its edges do not
    fade out: with the official 320 cells and overlap of 8 a neighbour's share steps from 0 to 0.26 at once.
    Ours, `tiles.tile_weights`, rises from 0 over the whole overlap, the same from either side.
    """
    return (_gaussian(height, height / 2)[:, None] * _gaussian(width, (width - 1) / 2)[None, :])[None, None]


class GaussianBlend(TileBlend):
    """`tiles.TileBlend` by the official weights, `gaussian_weights`: the mean of all tiles over a cell."""

    def __init__(self, boxes: Sequence[Box], height: int, width: int) -> None:
        super().__init__(boxes, height, width)
        self._rows = {span: _gaussian(span[1], span[1] / 2) for span in self._rows}
        self._columns = {span: _gaussian(span[1], (span[1] - 1) / 2) for span in self._columns}


# ---- colourisation -----------------------------------------------------------------------------------------


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
