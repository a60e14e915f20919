"""Errors of pictures against scikit-image, stored references and by hand; intervals against known values."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from msbd.pixels.metrics import (
    bootstrap_interval,
    border_step,
    colourfulness,
    edge_step,
    gmsd,
    hue_error,
    psnr,
    sharpness,
    squared_error,
    ssim,
    to_luma,
    wilson_interval,
)
from tests.helpers.goldens import load_golden

GOLDENS = ("a_blur", "a_noise", "big_tone")


def pictures(count: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    one, other = torch.rand(2, count, 3, 9, 13, generator=generator) * 2 - 1
    return one, other


def test_psnr_is_that_of_scikit_image() -> None:
    one, other = pictures()
    for got, a, b in zip(psnr(one, other), one.numpy(), other.numpy(), strict=True):
        assert got.item() == pytest.approx(peak_signal_noise_ratio(a, b, data_range=2), abs=1e-6)


def test_psnr_of_equal_pictures_is_infinite() -> None:
    one, _ = pictures()
    assert psnr(one, one).tolist() == [math.inf, math.inf]


def test_squared_error_looks_only_where_the_mask_is() -> None:
    one, _ = pictures(1)
    other = one.clone()
    other[..., :3, :4] += 0.5  # 0.25 in the [0, 1] range
    mask = torch.zeros(1, 1, 9, 13)
    mask[..., :3, :4] = 1
    assert squared_error(one, other, mask).item() == pytest.approx(0.25**2)
    assert squared_error(one, other, 1 - mask).item() == 0
    assert squared_error(one, other).item() == pytest.approx(0.25**2 * 12 / 117)


def stored(case: str, crop: int = 0) -> tuple[Tensor, Tensor, dict[str, float]]:
    """A stored case: its pictures, less `crop` pixels on every side, and what its references measured."""
    golden = load_golden("metrics", case)
    a, b = (golden[f"in.{k}_rgb_uint8"].permute(2, 0, 1)[None].float() / 127.5 - 1 for k in "ab")
    inside = (..., slice(crop, a.shape[-2] - crop), slice(crop, a.shape[-1] - crop))
    return a[inside], b[inside], golden.meta["values"]


@pytest.mark.parametrize("crop", [0, 4])
@pytest.mark.parametrize("case", GOLDENS)
def test_psnr_and_ssim_are_those_of_basicsr(case: str, crop: int) -> None:
    """Its Y values were computed in float32."""
    a, b, values = stored(case, crop)
    assert psnr(a, b).item() == pytest.approx(values[f"psnr_rgb_crop{crop}"], abs=1e-5)
    assert psnr(a, b, luma=True).item() == pytest.approx(values[f"psnr_y_crop{crop}"], abs=1e-5)
    assert ssim(a, b).item() == pytest.approx(values[f"ssim_rgb_crop{crop}"], abs=1e-7)
    assert ssim(a, b, luma=True).item() == pytest.approx(values[f"ssim_y_crop{crop}"], abs=1e-7)


@pytest.mark.parametrize("case", GOLDENS)
def test_the_conventions_of_other_libraries_are_within_reach(case: str) -> None:
    """pyiqa works in float32, its Y on the full range and, for SSIM, rounded to levels."""
    a, b, values = stored(case)
    assert psnr(a, b).item() == pytest.approx(values["skimage_psnr_rgb"], abs=1e-5)
    assert ssim(a, b).item() == pytest.approx(values["skimage_ssim_rgb_gauss"], abs=1e-7)
    assert ssim(a, b).item() == pytest.approx(values["pyiqa_ssimc"], abs=1e-6)
    assert psnr(a, b).item() == pytest.approx(values["pyiqa_psnr"], abs=1e-4)
    y_a, y_b = to_luma(a, full_range=True), to_luma(b, full_range=True)
    assert psnr(y_a, y_b).item() == pytest.approx(values["pyiqa_psnry"], abs=1e-4)
    rounded = ((y * 127.5 + 127.5).round() / 127.5 - 1 for y in (y_a, y_b))
    assert ssim(*rounded).item() == pytest.approx(values["pyiqa_ssim"], abs=2e-5)


def test_luma_of_white_black_and_the_primaries() -> None:
    colours = torch.tensor([[1, 1, 1], [0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])[..., None, None] * 2.0 - 1
    assert (to_luma(colours, full_range=True) / 2 + 0.5).flatten().tolist() == pytest.approx(
        [1, 0, 0.299, 0.587, 0.114]
    )
    assert (to_luma(colours) * 127.5 + 127.5).flatten().tolist() == pytest.approx(
        [235, 16, 81.481, 144.553, 40.966]  # 16 + (65.481, 128.553, 24.966), BT.601
    )


@pytest.mark.parametrize("size", [(11, 11), (12, 31), (40, 17)])
def test_ssim_is_that_of_scikit_image(size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    one = torch.rand(2, 3, *size, generator=generator) * 2 - 1
    other = one + 0.3 * torch.randn(one.shape, generator=generator)
    options = {"data_range": 2, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    for got, a, b in zip(ssim(one, other), one.double().numpy(), other.double().numpy(), strict=True):
        # Shifted to [0, 2]: the luminance term looks at absolute values.
        assert got.item() == pytest.approx(structural_similarity(a + 1, b + 1, channel_axis=0, **options))


def test_ssim_of_a_picture_with_itself_is_one_and_with_its_negative_less_than_zero() -> None:
    noise = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(2)) - 0.5
    assert ssim(noise, noise).item() == pytest.approx(1, abs=1e-12)
    assert ssim(noise, -noise).item() < -0.5


def test_ssim_refuses_less_than_a_window() -> None:
    with pytest.raises(ValueError, match=r"\(1, 3, 10, 64\) has no SSIM.* 11 x 11"):
        ssim(torch.zeros(1, 3, 10, 64), torch.zeros(1, 3, 10, 64))


def gmsd_by_hand(a: np.ndarray, b: np.ndarray) -> float:
    """GMSD of two pictures (3, H, W) in [-1, 1], pixel by pixel."""
    maps = []
    for picture in (a, b):
        levels = (picture.astype(np.float64) + 1) * 127.5
        y = 0.299 * levels[0] + 0.587 * levels[1] + 0.114 * levels[2]
        y = np.pad(y, ((0, y.shape[0] % 2), (0, y.shape[1] % 2)))
        y = np.pad((y[::2, ::2] + y[1::2, ::2] + y[::2, 1::2] + y[1::2, 1::2]) / 4, 1)
        gradient = np.empty((y.shape[0] - 2, y.shape[1] - 2))
        for i, j in np.ndindex(gradient.shape):
            around = y[i : i + 3, j : j + 3]
            right, down = around[:, 2] - around[:, 0], around[2] - around[0]
            gradient[i, j] = math.hypot(right.sum() / 3, down.sum() / 3)
        maps.append(gradient)
    r, d = maps
    similarity = (2 * r * d + 170) / (r * r + d * d + 170)
    return math.sqrt(((similarity - similarity.mean()) ** 2).mean())


@pytest.mark.parametrize("size", [(16, 24), (15, 23), (15, 24), (1, 1)])
def test_gmsd_is_that_of_its_formula(size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(3)
    one = torch.rand(2, 3, *size, generator=generator) * 2 - 1
    other = (one + 0.2 * torch.randn(one.shape, generator=generator)).clamp(-1, 1)
    for got, a, b in zip(gmsd(one, other), one.numpy(), other.numpy(), strict=True):
        assert got.item() == pytest.approx(gmsd_by_hand(a, b), abs=1e-9)


@pytest.mark.parametrize(
    ("case", "value"), [("a_blur", 0.0638926060), ("a_noise", 0.0274823810), ("big_tone", 0.0052315183)]
)
def test_gmsd_is_that_of_piq(case: str, value: float) -> None:
    """`piq.gmsd` 0.8.0 (Apache-2.0) in float64, noted once."""
    a, b, _ = stored(case)
    assert gmsd(a, b).item() == pytest.approx(value, abs=1e-7)


def test_gmsd_is_zero_for_equal_pictures_and_symmetric() -> None:
    a, b, _ = stored("a_noise")
    assert gmsd(a, a).item() == pytest.approx(0, abs=1e-12)
    assert gmsd(a, b).item() == pytest.approx(gmsd(b, a).item(), abs=1e-12)


def test_measures_follow_blur_and_noise() -> None:
    clean, _, _ = stored("big_tone")
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(4))
    noisy = torch.cat([clean + sigma * noise for sigma in (0.05, 0.1, 0.2)])
    blurred = torch.cat(
        [F.avg_pool2d(clean, side, 1, side // 2, count_include_pad=False) for side in (3, 5, 7)]
    )
    for worse in (noisy, blurred):
        reference = clean.expand_as(worse)
        assert (gmsd(worse, reference).diff() > 0.01).all()
        assert (ssim(worse, reference).diff() < -0.01).all()
        assert (psnr(worse, reference).diff() < -0.5).all()


@pytest.mark.parametrize("measure", [ssim, gmsd])
def test_a_batch_is_measured_picture_by_picture(measure: Callable[[Tensor, Tensor], Tensor]) -> None:
    one = torch.rand(3, 3, 16, 20, generator=torch.Generator().manual_seed(5)) * 2 - 1
    other = one.roll(1, dims=-1)
    each = torch.cat([measure(one[i : i + 1], other[i : i + 1]) for i in range(3)])
    assert measure(one, other).shape == (3,)
    torch.testing.assert_close(measure(one, other), each)


@pytest.mark.parametrize("measure", [psnr, ssim, gmsd])
def test_different_sizes_are_not_compared(measure: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match=r"\(1, 3, 16, 16\) cannot be compared .*\(1, 3, 17, 16\)"):
        measure(torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 17, 16))


def test_edge_step_is_the_height_of_a_step() -> None:
    mask = torch.zeros(1, 1, 10, 10)
    mask[..., 3:7, 2:8] = 1
    image = -1 + mask.expand(1, 3, 10, 10) * (20 / 127.5)
    assert edge_step(image, mask).item() == pytest.approx(20)


def test_edge_step_does_not_see_differences_elsewhere() -> None:
    mask = torch.zeros(1, 1, 12, 12)
    mask[..., 4:9, 4:9] = 1
    image = torch.zeros(1, 3, 12, 12)
    image[..., 6, 6] = 1  # two pixels inside the edge
    image[..., 0, :] = -1  # far outside
    assert edge_step(image, mask).item() == 0


@pytest.mark.parametrize(("right", "count"), [(0, 10), (10, 10), (5, 10), (46, 48), (1, 1000)])
def test_wilson_interval_ends_where_the_score_test_does(right: int, count: int) -> None:
    """Its ends are the shares p with |share - p| = 1.96 sqrt(p (1 - p) / n)."""
    share, z = right / count, 1.959964
    for p in wilson_interval(right, count):
        assert (share - p) ** 2 == pytest.approx(z * z * p * (1 - p) / count, abs=1e-9)
    low, high = wilson_interval(right, count)
    assert 0 <= low <= share <= high <= 1 and high - low > 0.001


def test_wilson_interval_has_known_values() -> None:
    z2 = 1.959964**2
    assert wilson_interval(0, 10) == pytest.approx((0, z2 / (10 + z2)))  # the closed form without a success
    assert wilson_interval(10, 10) == pytest.approx((10 / (10 + z2), 1))


def test_wilson_interval_refuses_what_is_no_share() -> None:
    for right, count in ((3, 2), (-1, 4), (0, 0)):
        with pytest.raises(ValueError, match="no share"):
            wilson_interval(right, count)


def test_bootstrap_interval_is_that_of_the_normal_for_many_values() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    low, high = bootstrap_interval(values.tolist())
    half = 1.96 * values.std() / math.sqrt(400)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)
    assert bootstrap_interval(values.tolist()) == (low, high)


def test_bootstrap_interval_of_one_value_is_that_value() -> None:
    assert bootstrap_interval([1.5]) == (1.5, 1.5)
    with pytest.raises(ValueError, match="no values"):
        bootstrap_interval([])


def from_hues(degrees: Tensor, chroma: float, y: float = 0.0) -> Tensor:
    """A picture (1, 3, *degrees.shape) of luma y whose (Cb, Cr) have these directions and this length."""
    radians, length = degrees.double().deg2rad(), chroma / 127.5
    blue, red = y + 1.772 * length * radians.cos(), y + 1.402 * length * radians.sin()  # BT.601
    return torch.stack((red, (y - 0.299 * red - 0.114 * blue) / 0.587, blue))[None]


@pytest.mark.parametrize("turn, error", [(0, 0), (30, 30), (-120, 120), (180, 180), (270, 90), (359, 1)])
def test_turned_hues_are_off_by_their_angle(turn: float, error: float) -> None:
    hues = torch.arange(0, 360, 5.0).view(8, 9)
    reference = from_hues(hues, 40)
    for picture in (from_hues(hues + turn, 40), from_hues(hues + turn, 3, y=0.3)):  # paler and lighter
        assert hue_error(picture, reference).item() == pytest.approx(error, abs=1e-9)


def test_grey_is_as_bad_as_a_guess() -> None:
    generator = torch.Generator().manual_seed(0)
    hues, guess = torch.rand(2, 100, 100, generator=generator) * 360
    reference = from_hues(hues, 30)
    assert hue_error(from_hues(guess, 30), reference).item() == pytest.approx(90, abs=1)
    assert hue_error(torch.zeros_like(reference), reference).item() == 90
    assert hue_error(from_hues(hues, 0.99), reference).item() == 90  # below a level
    assert hue_error(from_hues(hues, 1.01), reference).item() == pytest.approx(0, abs=1e-9)


def test_hue_errors_weigh_by_the_chroma_of_the_truth() -> None:
    vivid, pale = (from_hues(torch.zeros(2, 3), chroma) for chroma in (60, 20))
    reference, turned = (
        torch.cat((vivid, pale), dim=-1),
        torch.cat((vivid, from_hues(torch.full((2, 3), 80.0), 50)), dim=-1),
    )
    assert hue_error(turned, reference).item() == pytest.approx(80 * 20 / (60 + 20))
    almost_gray = from_hues(torch.zeros(2, 3), 0.99)  # weighs nothing, whatever is there
    gray = torch.cat((vivid, almost_gray), dim=-1)
    assert hue_error(turned, gray).item() == pytest.approx(0, abs=1e-9)


def test_a_grey_truth_has_no_hue_and_each_picture_its_own_error() -> None:
    one = from_hues(torch.zeros(4, 4), 30)
    other = from_hues(torch.full((4, 4), 50.0), 30)
    errors = hue_error(torch.cat((one, one, one)), torch.cat((one, other, torch.full_like(one, 0.5))))
    assert errors[:2].tolist() == pytest.approx([0, 50], abs=1e-9) and errors[2].isnan()
    with pytest.raises(ValueError, match="cannot be compared"):
        hue_error(one, other[..., 1:])


def test_colourfulness_by_its_formula() -> None:
    red, yellow, gray = ([255, 0, 0], [255, 255, 0], [90, 90, 90])
    pixels = torch.tensor([[red, yellow], [red, red], [gray, gray]]).permute(0, 2, 1)[:, :, None] / 127.5 - 1
    # red: rg 255, yb 127.5; yellow: rg 0, yb 255
    spread, offset = math.hypot(127.5, 63.75), math.hypot(127.5, 191.25)
    expected = [spread + 0.3 * offset, 0.3 * math.hypot(255, 127.5), 0]
    assert colourfulness(pixels).tolist() == pytest.approx(expected, abs=1e-4)


def test_colourfulness_of_random_colours_against_numpy_and_of_less_colour() -> None:
    picture, _ = pictures()
    r, g, b = (picture[0].double().numpy() * 127.5).reshape(3, -1)
    rg, yb = r - g, (r + g) / 2 - b
    expected = np.sqrt(rg.var() + yb.var()) + 0.3 * np.sqrt(rg.mean() ** 2 + yb.mean() ** 2)
    assert colourfulness(picture)[0].item() == pytest.approx(expected)
    y = to_luma(picture, full_range=True)
    half = colourfulness(y + 0.5 * (picture - y))  # proportional to the chroma
    torch.testing.assert_close(half, 0.5 * colourfulness(picture))


def test_sharpness_is_the_slope_of_a_ramp_and_grows_with_contrast() -> None:
    ramp = (torch.arange(8.0)[None, :] * 3 + torch.arange(6.0)[:, None] * 4).expand(1, 3, 6, 8) / 127.5
    assert torch.allclose(sharpness(ramp), torch.tensor([5.0], dtype=torch.float64))
    assert torch.allclose(sharpness(2 * ramp), 2 * sharpness(ramp))
    assert sharpness(torch.zeros(2, 3, 1, 9)).tolist() == [0, 0]


def test_border_step_finds_steps_at_the_lines_and_only_there() -> None:
    ramp = torch.linspace(-0.5, 0.5, 64).expand(1, 3, 48, 64).clone()
    everywhere = torch.ones(1, 1, 48, 64)
    assert border_step(ramp, everywhere, [], [32], 8) == pytest.approx(1, abs=1e-6)
    stepped = ramp.clone()
    stepped[..., 32:] += 0.25
    assert border_step(stepped, everywhere, [], [32], 8) > 2.5
    assert border_step(stepped, everywhere, [], [16], 8) < 1
    left = everywhere.clone()
    left[..., 30:] = 0  # the step lies where the mask is not
    assert border_step(stepped, left, [], [16], 8) == pytest.approx(1, abs=1e-6)
    assert math.isnan(border_step(ramp, everywhere, [], [], 8))
