"""The formulas of a restoration that the paper, or this project where the paper is silent, has chosen.

Paper    Yang et al. 2023 (PASD), arXiv:2308.14469, section 3
Units    images (1, 3, H, W) in [-1, 1]; control pictures in [0, 1]; latents (1, 4, h, w), scaled; sizes (H,
         W); tiles in latent cells, everything else in pixels
Copying  needs pixels/box.py, pixels/gray.py, pixels/resize.py, pixels/tiles.py, restore/color.py,
         samplers/ans.py, samplers/schedule.py

official.py has the same functions as the official code computes them; rules.py lists both, and a plan carries
one.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from samplers.ans import ans_start
from samplers.schedule import NoiseSource

from ..pixels.box import Box, round_up
from ..pixels.gray import looks_gray, with_chroma_of
from ..pixels.resize import enlarge, resize, take
from ..pixels.tiles import TileBlend, tile_boxes
from .color import COLOR_FIXES, is_gray, to_gray, transfer_chroma

SMALLEST = 64  # pixels a side that the nets get to see; a smaller picture is mirrored outwards


# ---- sizes and tiles ---------------------------------------------------------------------------------------


def plan_sizes(
    input_size: tuple[int, int], output_size: tuple[int, int], process_size: int, downscale: int, *, grayscale: bool
) -> tuple[tuple[int, int], Box]:  # fmt: skip
    """The size at which a picture is restored, and the box of whole latent cells around it that the nets get.

    A grey picture that is to get colours may be worked on at any size, others at the size of their result at
    least.
    """
    size = working_size(input_size if grayscale else output_size, process_size, shrink=grayscale)
    return size, padded_box(size, downscale)


def working_size(size: tuple[int, int], least: int, *, shrink: bool = False) -> tuple[int, int]:
    """`size` enlarged until its shorter side has `least` pixels, the longer at most 2 x `least`.

    The nets know pictures of about that size; the official code enlarges without an end, a strip of 3 x 500
    to 768 x 128000. With `shrink` a larger one is made smaller too: colours need no more, and the luma comes
    from the picture itself.
    """
    factor = min(least / min(size), 2 * least / max(size))
    factor = factor if shrink else max(1.0, factor)
    height, width = (max(1, round(side * factor)) for side in size)
    return height, width


def padded_box(size: tuple[int, int], downscale: int) -> Box:
    """The smallest box of whole latent cells, `SMALLEST` a side at least, with a picture of `size` in its
    middle.

    Where it leaves the picture, the picture is mirrored: nothing is squashed.
    """
    height, width = (round_up(max(side, SMALLEST), downscale) for side in size)
    return Box((size[0] - height) // 2, (size[1] - width) // 2, height, width)


def latent_tiles(height: int, width: int, tile: int, overlap: int) -> list[Box]:
    """Tiles of at most `tile` cells a side that cover a latent and overlap by `overlap`, all of one size."""
    return tile_boxes(height, width, tile, overlap)


def blend(tiles: Sequence[Box], height: int, width: int) -> TileBlend:
    """What fades the predictions of `tiles` into one of (height, width): symmetric ramps over the whole
    overlap.
    """
    return TileBlend(tiles, height, width)


# ---- the picture before ------------------------------------------------------------------------------------


def prepare(
    image: Tensor, output_size: tuple[int, int], working_size: tuple[int, int], process_size: int, *, grayscale: bool
) -> Tensor:  # fmt: skip
    """The control picture (1, 3, *working_size) in [0, 1]: `image` resized once, bicubic, on 256 levels.

    With `grayscale` its luma in all channels.
    """
    control = enlarge(image / 2 + 0.5, working_size)
    return to_gray(control) if grayscale else control


def hints(
    embed: Callable[[Tensor], Tensor], control: Tensor, tiles: Sequence[Box], downscale: int
) -> dict[Box, Tensor]:
    """Section 3.1: for each of `tiles` the control's features, `embed(control)` (1, C, h, w), degradations
    removed.

    They are made once of the whole control (1, 3, H, W), so that a tile sees beyond its edges, and cut.
    """
    whole = embed(control)
    return {tile: take(whole, tile) for tile in tiles}


# ---- the start latent --------------------------------------------------------------------------------------


def start_level(
    added_noise_level: int, sampler: str, timesteps: Sequence[int] | Tensor, alphas_cumprod: Tensor
) -> float:
    """a_a of Eq. 4 that `added_noise_level`, a timestep n, stands for: alphas_cumprod[n] (section 4.2).

    ValueError for a timestep outside the schedule.
    """
    if not 0 <= added_noise_level < len(alphas_cumprod):
        raise ValueError(
            f"the added noise level is a timestep, 0 to {len(alphas_cumprod) - 1}; got {added_noise_level}"
        )
    return float(alphas_cumprod[added_noise_level])


def start(z_lr: Tensor, a_n: float, a_a: float, noise: NoiseSource) -> Tensor:
    """z_N of Eq. 4 from z_LR (1, 4, h, w): sqrt(a_a a_N) z_LR + sqrt(1 - a_a a_N) z'', one noise drawn at
    "start".
    """
    return ans_start(z_lr, a_n, a_a, noise("start", 0, tuple(z_lr.shape)))


# ---- the picture after -------------------------------------------------------------------------------------


def finish(
    restored: Tensor, control: Tensor, image: Tensor, output_size: tuple[int, int], color_fix: str
) -> Tensor:
    """The result (1, 3, *output_size) from `restored` and `control`, both (1, 3, *working_size), and the
    input `image`.

    With the colours of the control, and resized, in float. A grey picture stays grey where colours are put
    right, and a scan of one as near to it as it was, at fine edges too, which the official code tints.
    """
    fixed = COLOR_FIXES[color_fix](restored, control)
    if color_fix != "none" and is_gray(image):
        fixed = to_gray(fixed)
    elif color_fix != "none" and looks_gray(image):
        fixed = with_chroma_of(image, fixed)
    return resize(fixed, output_size, "bicubic").clamp(-1, 1)


def finish_coloured(restored: Tensor, image: Tensor, output_size: tuple[int, int]) -> Tensor:
    """The result of mode colorize (1, 3, *output_size): the colours of `restored` on the luma of the input
    `image`.
    """
    source = resize(image, output_size, "bicubic").clamp(-1, 1)
    return transfer_chroma(resize(restored, output_size, "bicubic").clamp(-1, 1), to_gray(source))
