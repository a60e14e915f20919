"""Where to cut: the crop around a mask, and the sizes at which it is worked on. Integers only.

Paper    Ackermann & Li 2022 (Multi-Stage Blended Diffusion), arXiv:2210.12965, "Approach" and appendix A.2
Units    pixels; sizes are (H, W); a box may lie partly outside its picture, which is then mirrored
         (resize.take)
Copying  needs pixels/box.py
"""

import math
from itertools import pairwise

from ..pixels.box import Box, round_up

MAX_ASPECT = 2  # of a crop: beyond 2:1 a model trained on squares starts to repeat its subject
# Least crop-to-mask ratio, where the picture has it: a crop cut along the mask's edge has nothing to blend
# with.
CONTEXT = 1.125


def crop_box(mask: Box, picture_size: tuple[int, int], margin: float, multiple: int) -> Box:
    """The part of a picture (H, W) to work on for a mask with the tight box `mask`, which it always contains.

    The square of side max(mask.size) * margin, rounded up to `multiple`, centred on the mask and slid inside
    the picture. The official code fails where the picture cannot hold that square. Here the crop is then the
    largest rectangle inside both the square and the picture that covers the mask with an aspect from 1:2 to
    2:1; where there is none, it leaves the picture by as little as it must. Both sides are multiples of
    `multiple` always. ValueError for a margin below 1 or a mask outside the picture.
    """
    height, width = picture_size
    if margin < 1:
        raise ValueError(f"margin is a multiple of the mask's size and must be at least 1, got {margin}")
    if mask.height < 1 or mask.width < 1 or not Box(0, 0, height, width).contains(mask):
        raise ValueError(f"the mask's {mask} does not lie inside the picture of {height} x {width} pixels")
    square = round_up(max(mask.size) * margin, multiple)
    if square <= min(height, width):
        crop_height = crop_width = square
    else:
        crop_height, crop_width = _largest_rectangle(
            mask.size, picture_size, square, min(margin, CONTEXT), multiple
        )
    top = _slide(mask.top + (mask.height - crop_height) // 2, crop_height, height)
    left = _slide(mask.left + (mask.width - crop_width) // 2, crop_width, width)
    return Box(top, left, crop_height, crop_width)


def first_stage_size(crop_size: tuple[int, int], native: int, multiple: int) -> tuple[int, int]:
    """The size (H, W) at which a crop is first edited: its aspect, about native^2 pixels, whole multiples.

    Of the sizes around the exact one, that whose aspect (weighted twice) and area are nearest: the picture is
    stretched by the difference in aspect, so that counts for more than some extra area.
    """
    height, width = crop_size
    exact_height, exact_width = native * math.sqrt(height / width), native * math.sqrt(width / height)

    def mismatch(size: tuple[int, int]) -> float:
        aspect = abs(math.log(size[0] / size[1] * width / height))
        return round(2 * aspect + abs(math.log(size[0] * size[1] / native**2)), 6)  # of a tie, the smaller

    sizes = [(h, w) for h in _neighbours(exact_height, multiple) for w in _neighbours(exact_width, multiple)]
    return min(sizes, key=mismatch)


def stage_sizes(
    crop_size: tuple[int, int],
    native: int,
    stage: int,
    multiple: int,
    *,
    max_jump: float = 4.0,
    straight_to_grid: bool = False,
) -> list[tuple[int, int]]:
    """The sizes (H, W) of all stages: about native^2 pixels, about stage^2, ..., `crop_size`.

    Further stages, evenly spaced in scale, come in wherever a side would grow more than `max_jump` times at
    once (the upscaler knows x4). `straight_to_grid` leaves the stage^2 one out. Every stage is larger than
    the one before. A crop of at most native area has the first stage only: it is enlarged to it, and its
    result shrunk back.
    """
    if max_jump <= 1:
        raise ValueError(
            f"max_jump is how many times longer a stage may be than the one before, more than 1; got {max_jump}"
        )
    sizes = [first_stage_size(crop_size, native, multiple)]
    if crop_size[0] * crop_size[1] <= native**2 or sizes[0] == crop_size:
        return sizes
    middle = first_stage_size(crop_size, stage, multiple)
    if not straight_to_grid and _is_between(sizes[0], middle, crop_size):
        sizes += _inserted(sizes[-1], middle, crop_size, multiple, max_jump) + [middle]
    return [*sizes, *_inserted(sizes[-1], crop_size, crop_size, multiple, max_jump), crop_size]


def _largest_rectangle(
    mask_size: tuple[int, int], picture_size: tuple[int, int], square: int, context: float, multiple: int
) -> tuple[int, int]:
    """The crop's (H, W) in a picture that cannot hold the square; see `crop_box`."""

    def cover(side: int, picture_side: int, wanted: int) -> int:
        """As much of `wanted` as the picture has in whole multiples, but no less than the mask needs."""
        return max(min(wanted, picture_side // multiple * multiple), round_up(side, multiple))

    sides = list(zip(mask_size, picture_size, strict=True))
    most = [cover(side, picture_side, square) for side, picture_side in sides]
    least = [cover(side, picture_side, round_up(side * context, multiple)) for side, picture_side in sides]
    # Shorten the longer side to the aspect as far as the mask allows, then lengthen the shorter one, out of
    # the picture if need be.
    height, width = (max(min(most[i], MAX_ASPECT * most[1 - i]), least[i]) for i in (0, 1))
    shortest_height, shortest_width = (round_up(side / MAX_ASPECT, multiple) for side in (width, height))
    return max(height, shortest_height), max(width, shortest_width)


def _slide(start: int, side: int, picture_side: int) -> int:
    """The start nearest to `start` whose span lies inside the picture, or, if longer, contains all of it."""
    low, high = sorted((0, picture_side - side))
    return min(max(start, low), high)


def _neighbours(exact: float, multiple: int) -> tuple[int, int]:
    below = max(math.floor(round(exact / multiple, 6)), 1) * multiple
    return below, max(round_up(exact, multiple), multiple)


def _is_between(low: tuple[int, int], middle: tuple[int, int], high: tuple[int, int]) -> bool:
    return low[0] < middle[0] < high[0] and low[1] < middle[1] < high[1]


def _inserted(
    start: tuple[int, int], end: tuple[int, int], crop_size: tuple[int, int], multiple: int, max_jump: float
) -> list[tuple[int, int]]:
    """The fewest sizes between `start` and `end`, evenly spaced, that keep every jump within `max_jump`."""
    low, high = math.sqrt(start[0] * start[1]), math.sqrt(end[0] * end[1])
    for count in range(64):
        sides = (low * (high / low) ** (k / (count + 1)) for k in range(1, count + 1))
        sizes = [first_stage_size(crop_size, round(side), multiple) for side in sides]
        path = [start, *sizes, end]
        jumps = [max(after[0] / before[0], after[1] / before[1]) for before, after in pairwise(path)]
        if max(jumps) <= max_jump:
            return sizes
    raise ValueError(
        f"no stages between {start} and {end} keep every jump within {max_jump} in multiples of {multiple} pixels"
    )
