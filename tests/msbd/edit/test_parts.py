import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from msbd.edit.config import EditConfig, ModelSpec
from msbd.edit.crops import crop_box
from msbd.edit.parts import split_mask
from msbd.edit.plan import LARGEST_CROP, SMALL_CROP, plan_edit
from msbd.pixels.box import Box
from msbd.pixels.masks import mask_box
from samplers.schedule import make_alphas_cumprod, make_betas

LEVELS = make_alphas_cumprod(make_betas())


def mask_of(size: tuple[int, int], *boxes: tuple[int, int, int, int]) -> Tensor:
    mask = torch.zeros(1, 1, *size)
    for top, left, height, width in boxes:
        mask[..., top : top + height, left : left + width] = 1
    return mask


def crops(size: tuple[int, int], multiple: int = 64) -> "object":
    def crop_of(box: Box) -> Box:
        return crop_box(box, size, 1.5, multiple)

    return crop_of


def boxes(mask: Tensor) -> list[Box]:
    parts = [part.of(mask) for part in split_mask(mask, crops(tuple(mask.shape[-2:])))]  # type: ignore[arg-type]
    assert torch.equal(torch.stack(parts).sum(0), mask)
    return [mask_box(part) for part in parts]


def test_two_far_spots_are_two_parts_and_two_near_ones_are_one() -> None:
    far = mask_of((2000, 2000), (20, 20, 40, 40), (1900, 1900, 40, 40))
    assert boxes(far) == [Box(20, 20, 40, 40), Box(1900, 1900, 40, 40)]
    near = mask_of((2000, 2000), (900, 900, 40, 40), (900, 950, 40, 40))
    assert boxes(near) == [Box(900, 900, 40, 90)]


def test_parts_join_as_their_crops_grow() -> None:
    """A and B alone would not touch C; joined, they do."""
    chain = mask_of((2000, 2000), (900, 700, 200, 200), (900, 950, 200, 200), (900, 1270, 60, 60))
    assert boxes(chain) == [Box(900, 700, 200, 630)]


def test_one_part_is_the_mask_itself() -> None:
    mask = mask_of((300, 400), (10, 10, 100, 100))
    (part,) = split_mask(mask, crops((300, 400)))  # type: ignore[arg-type]
    assert part.of(mask) is mask
    nothing = torch.zeros(1, 1, 30, 40)
    assert len(split_mask(nothing, crops((30, 40)))) == 1  # type: ignore[arg-type]


@given(
    st.lists(
        st.tuples(st.integers(0, 380), st.integers(0, 480), st.integers(1, 40), st.integers(1, 40)),
        min_size=1,
        max_size=8,
    )
)
def test_parts_sum_to_the_mask_and_their_crops_are_apart(places: list[tuple[int, int, int, int]]) -> None:
    mask = mask_of((400, 500), *places)
    crop_of = crops((400, 500), 16)
    parts = [part.of(mask) for part in split_mask(mask, crop_of)]  # type: ignore[arg-type]
    assert torch.equal(torch.stack(parts).sum(0), mask)
    taken = np.zeros((600, 700), int)
    for part in parts:
        crop = crop_of(mask_box(part))  # type: ignore[operator]
        taken[crop.top + 100 : crop.bottom + 100, crop.left + 100 : crop.right + 100] += 1
    assert taken.max() == 1


def test_many_parts_take_no_time() -> None:
    mask = torch.zeros(1, 1, 4000, 4000)
    mask[..., ::100, ::100] = 1
    assert len(split_mask(mask, lambda box: box)) == 1600


@pytest.mark.parametrize("size", [(1, 65537), (65537, 1), (3, 20001)])
def test_a_crop_is_never_far_larger_than_its_picture(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="more than 16 times the picture.*mask a shorter part"):
        plan_edit(torch.ones(1, 1, *size), EditConfig(), ModelSpec(), LEVELS)
    spot = mask_of(size, (0, 0, min(40, size[0]), min(40, size[1])))
    crop = plan_edit(spot, EditConfig(), ModelSpec(), LEVELS).crop
    assert crop.height * crop.width <= max(LARGEST_CROP * size[0] * size[1], SMALL_CROP**2)
