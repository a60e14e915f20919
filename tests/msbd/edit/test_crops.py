import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from msbd.edit.crops import crop_box, first_stage_size, stage_sizes
from msbd.pixels.box import Box, round_up
from msbd.pixels.masks import mask_box

SIDES = st.integers(1, 7000)
MODELS = st.sampled_from([(512, 768, 64), (128, 192, 16)])  # native, stage, multiple: SD and mini


@st.composite
def masks_in_pictures(draw: st.DrawFn) -> tuple[Box, tuple[int, int]]:
    height, width = draw(SIDES), draw(SIDES)
    top, left = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
    return Box(top, left, draw(st.integers(1, height - top)), draw(st.integers(1, width - left))), (
        height,
        width,
    )


def overlap(start: int, side: int, picture: int) -> int:
    return min(start + side, picture) - max(start, 0)


def test_mask_box_is_exact() -> None:
    mask = np.zeros((40, 60), bool)
    mask[3, 7] = mask[20, 59] = True
    expected = Box(3, 7, 18, 53)
    assert mask_box(mask) == expected
    assert mask_box(torch.from_numpy(mask)[None, None].float()) == expected
    assert (expected.bottom, expected.right) == (21, 60)


def test_window_takes_the_box_out_of_a_picture() -> None:
    picture = torch.arange(2 * 5 * 7).reshape(2, 5, 7)
    assert torch.equal(picture[..., *Box(1, 2, 3, 4).window], picture[:, 1:4, 2:6])


def test_mask_box_of_an_empty_mask_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        mask_box(torch.zeros(1, 1, 8, 9))


@settings(max_examples=500, deadline=None)
@given(case=masks_in_pictures(), margin=st.floats(1, 4), multiple=st.sampled_from([1, 8, 16, 64]))
@example(case=(Box(0, 0, 37, 53), (37, 53)), margin=1.2, multiple=64)  # smaller than one multiple
@example(case=(Box(100, 10, 40, 5900), (400, 6000)), margin=1.2, multiple=64)  # wide thin mask in a strip
@example(case=(Box(10, 100, 5900, 40), (6000, 400)), margin=1.5, multiple=64)
@example(case=(Box(0, 0, 3000, 4000), (3000, 4000)), margin=1.0, multiple=64)  # touches all four borders
@example(case=(Box(6999, 0, 1, 1), (7000, 7000)), margin=1.0, multiple=64)  # one pixel in a corner
@example(case=(Box(0, 0, 1, 1), (1, 1)), margin=4.0, multiple=16)
def test_crop_box_covers_the_mask_in_allowed_shapes(
    case: tuple[Box, tuple[int, int]], margin: float, multiple: int
) -> None:
    mask, picture = case
    crop = crop_box(mask, picture, margin, multiple)
    square = round_up(max(mask.size) * margin, multiple)
    assert crop.contains(mask)
    assert crop.height % multiple == 0 and crop.width % multiple == 0
    assert max(crop.size) <= 2 * min(crop.size)
    assert max(crop.size) <= square
    if square <= min(picture):
        assert crop.size == (square, square)
        assert Box(0, 0, *picture).contains(crop)
    for start, side, length in ((crop.top, crop.height, picture[0]), (crop.left, crop.width, picture[1])):
        assert overlap(start, side, length) == min(side, length)  # mirrored only where the picture ends


@settings(max_examples=300, deadline=None)
@given(case=masks_in_pictures(), margin=st.floats(1, 4))
def test_crop_box_leaves_the_picture_only_when_it_must(
    case: tuple[Box, tuple[int, int]], margin: float
) -> None:
    mask, picture = case
    crop = crop_box(mask, picture, margin, 1)
    inside = Box(0, 0, *picture).contains(crop)
    fits = max(mask.width / picture[0], mask.height / picture[1]) * min(margin, 1.125) <= 2 * 0.999
    assert inside or not fits


def test_crop_box_slides_at_borders_and_centres_elsewhere() -> None:
    assert crop_box(Box(0, 900, 100, 100), (1000, 1000), 2.0, 64) == Box(0, 744, 256, 256)
    assert crop_box(Box(450, 450, 100, 100), (1000, 1000), 2.0, 64) == Box(372, 372, 256, 256)


def test_crop_box_of_the_papers_examples() -> None:
    # paper, figure 2: a mask of 1166 x 2297 (W x H) in a portrait photo that cannot hold the square
    assert crop_box(Box(300, 900, 2297, 1166), (4608, 3456), 1.2, 64) == Box(40, 75, 2816, 2816)
    assert crop_box(Box(300, 300, 2297, 1166), (2800, 1800), 1.2, 64) == Box(48, 0, 2752, 1792)


def test_crop_box_shortens_a_panorama_before_it_pads() -> None:
    assert crop_box(Box(500, 1000, 300, 2500), (1500, 6000), 1.5, 64) == Box(0, 778, 1472, 2944)


@pytest.mark.parametrize("margin", [0.5, 0.0])
def test_crop_box_refuses_a_margin_below_one(margin: float) -> None:
    with pytest.raises(ValueError, match="margin"):
        crop_box(Box(0, 0, 5, 5), (10, 10), margin, 8)


def test_crop_box_refuses_a_mask_outside_the_picture() -> None:
    with pytest.raises(ValueError, match="inside the picture"):
        crop_box(Box(5, 5, 10, 10), (10, 10), 1.0, 8)


@settings(max_examples=500, deadline=None)
@given(short=st.integers(1, 120), ratio=st.floats(1, 2), tall=st.booleans(), model=MODELS)
def test_first_stage_size_keeps_area_and_aspect(
    short: int, ratio: float, tall: bool, model: tuple[int, int, int]
) -> None:
    native, _, multiple = model
    long = int(short * ratio)
    crop = (long * multiple, short * multiple) if tall else (short * multiple, long * multiple)
    height, width = first_stage_size(crop, native, multiple)
    assert height % multiple == 0 and width % multiple == 0
    assert 0.8 <= height * width / native**2 <= 1.25
    assert 0.9 <= (height / width) / (crop[0] / crop[1]) <= 1.1


@settings(max_examples=500, deadline=None)
@given(case=masks_in_pictures(), margin=st.floats(1, 3), model=MODELS, straight=st.booleans())
@example(case=(Box(0, 0, 37, 53), (37, 53)), margin=1.0, model=(512, 768, 64), straight=False)
@example(case=(Box(100, 10, 40, 5900), (400, 6000)), margin=1.2, model=(128, 192, 16), straight=True)
def test_stage_sizes_grow_within_the_jump_to_the_crop(
    case: tuple[Box, tuple[int, int]], margin: float, model: tuple[int, int, int], straight: bool
) -> None:
    native, stage, multiple = model
    crop = crop_box(*case, margin, multiple).size
    sizes = stage_sizes(crop, native, stage, multiple, straight_to_grid=straight)
    assert sizes[0] == first_stage_size(crop, native, multiple)
    if crop[0] * crop[1] <= native**2:
        assert len(sizes) == 1
    else:
        assert sizes[-1] == crop
    for before, after in zip(sizes, sizes[1:], strict=False):
        assert before[0] <= after[0] and before[1] <= after[1] and before != after
        assert max(after[0] / before[0], after[1] / before[1]) <= 4
    assert all(height % multiple == 0 and width % multiple == 0 for height, width in sizes)


@pytest.mark.parametrize(
    "crop, sizes",
    [
        (
            (2816, 2816),
            [(512, 512), (768, 768), (2816, 2816)],
        ),  # the paper: one intermediate stage, then full resolution
        ((512, 512), [(512, 512)]),  # official: a second pass at 512
        ((768, 768), [(512, 512), (768, 768)]),  # official: [768, 768]
        ((256, 256), [(512, 512)]),
        ((576, 576), [(512, 512), (576, 576)]),
        ((6016, 6016), [(512, 512), (768, 768), (2176, 2176), (6016, 6016)]),
        ((1408, 2816), [(384, 768), (512, 1024), (1408, 2816)]),
    ],
)
def test_stage_sizes_of_known_crops(crop: tuple[int, int], sizes: list[tuple[int, int]]) -> None:
    assert stage_sizes(crop, 512, 768, 64) == sizes


def test_stage_sizes_straight_to_grid_has_no_middle_stage() -> None:
    assert stage_sizes((2048, 2048), 512, 768, 64, straight_to_grid=True) == [(512, 512), (2048, 2048)]


def test_box_times_is_undone_by_divided() -> None:
    box = Box(-3, 2, 5, 7)
    assert box.times(4) == Box(-12, 8, 20, 28) and box.times(4).divided(4) == box


def test_box_divided_is_exact_or_refused() -> None:
    assert Box(-64, 128, 192, 256).divided(8) == Box(-8, 16, 24, 32)
    with pytest.raises(ValueError, match="multiples of 8"):
        Box(4, 0, 64, 64).divided(8)
