import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from msbd.pixels.box import Box
from msbd.pixels.resize import low_pass, pad_reflect, put_back, reflected_indices, resize, sharpen, take
from tests.helpers.goldens import load_golden, relative_error


@pytest.mark.parametrize("case", ["interp_70x90_to_128x64", "interp_96x80_to_64"])
def test_resize_and_low_pass_match_golden(case: str) -> None:
    golden = load_golden("msbd", case)
    height, width = golden["out.image"].shape[-2:]
    size = (height, width)
    assert relative_error(resize(golden["in.image"], size), golden["out.image"]) <= 1e-6
    assert relative_error(low_pass(golden["in.image"], size), golden["out.lowpass"]) <= 1e-6


def test_sharpen_matches_golden() -> None:
    golden = load_golden("msbd", "sharpen")
    assert relative_error(sharpen(golden["in.image"]), golden["out.default"]) <= 1e-5
    assert relative_error(sharpen(golden["in.image"], 5, 1.0), golden["out.k5_s1"]) <= 1e-5


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(1, 1), (3, 50), (200, 7)])
def test_resize_keeps_a_flat_picture_flat(mode: str, size: tuple[int, int]) -> None:
    flat = torch.full((1, 3, 37, 53), -0.4)
    torch.testing.assert_close(resize(flat, size, mode), torch.full((1, 3, *size), -0.4))


def test_resize_keeps_dtype_and_returns_the_same_size_untouched() -> None:
    image = torch.rand(1, 3, 9, 8).to(torch.bfloat16)
    assert resize(image, (9, 8)) is image
    assert resize(image, (20, 4)).dtype == torch.bfloat16


def test_low_pass_removes_detail_and_keeps_the_mean() -> None:
    image = torch.rand(1, 3, 64, 64)
    out = low_pass(image, (16, 16))
    assert out.var() < 0.3 * image.var()
    assert abs(out.mean() - image.mean()) < 0.01


@settings(max_examples=100, deadline=None)
@given(start=st.integers(-400, 50), count=st.integers(1, 500), length=st.integers(1, 40))
@example(start=-2600, count=3000, length=400)
def test_reflected_indices_equal_numpys_reflection(start: int, count: int, length: int) -> None:
    before, after = max(0, -start), max(0, start + count - length)
    expected = np.pad(np.arange(length), (before, after), mode="reflect")[before + start :][:count]
    assert reflected_indices(start, start + count, length).tolist() == expected.tolist()


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    top=st.integers(-50, 30),
    left=st.integers(-50, 30),
    height=st.integers(1, 60),
    width=st.integers(1, 60),
)
def test_take_then_put_back_changes_nothing(
    size: tuple[int, int], top: int, left: int, height: int, width: int
) -> None:
    image = torch.rand(2, 3, *size)
    box = Box(top, left, height, width)
    patch = take(image, box)
    assert patch.shape[-2:] == box.size
    assert torch.equal(put_back(image, patch, box), image)


def test_put_back_writes_only_under_the_box() -> None:
    image = torch.zeros(1, 3, 10, 10)
    out = put_back(image, torch.ones(1, 3, 6, 6), Box(-2, 7, 6, 6))
    assert out.sum() == 3 * 4 * 3 and image.sum() == 0
    with pytest.raises(ValueError, match="does not fit"):
        put_back(image, torch.ones(1, 3, 5, 6), Box(0, 0, 6, 6))


def test_pad_reflect_pads_a_400_pixel_side_to_3000() -> None:
    image = torch.rand(1, 1, 400, 2)
    out = pad_reflect(image, 1300, 1300, 0, 0)
    assert out.shape == (1, 1, 3000, 2)
    torch.testing.assert_close(out[0, 0, :, 0].numpy(), np.pad(image[0, 0, :, 0], 1300, mode="reflect"))
    assert pad_reflect(torch.rand(1, 3, 1, 1), 5, 4, 3, 2).shape == (1, 3, 10, 6)
