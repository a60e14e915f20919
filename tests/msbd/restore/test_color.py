"""msbd/restore/color.py: the colours come from the reference, the structure stays; or the luma does,
to a level.
"""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from msbd.pixels.metrics import to_luma
from msbd.restore.color import (
    adain_color_fix,
    is_gray,
    low_frequencies,
    luma,
    to_gray,
    transfer_chroma,
    wavelet_color_fix,
)
from tests.helpers.goldens import load_golden, relative_error

Fix = Callable[[Tensor, Tensor], Tensor]
FIXES: list[Fix] = [wavelet_color_fix, adain_color_fix]


@pytest.fixture
def pictures() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    image, reference = (
        torch.rand(2, 3, 37, 50, generator=generator, dtype=torch.float64) * 2 - 1 for _ in range(2)
    )
    return image, reference


@pytest.mark.parametrize("case", ["colorfix_48x64", "colorfix_70x50"])
def test_the_official_functions(case: str) -> None:
    golden = load_golden("pasd_helpers", case)
    image, reference = (
        golden[f"in.{name}_uint8"].permute(2, 0, 1)[None].float() / 127.5 - 1 for name in ("target", "source")
    )
    fixed = {"wavelet": wavelet_color_fix(image, reference), "adain": adain_color_fix(image, reference)}
    for name, picture in fixed.items():
        assert relative_error(picture / 2 + 0.5, golden[f"out.{name}_float"]) < 2e-6
    low = low_frequencies(image) / 2 + 0.5
    assert relative_error(low, golden["out.decomp_low"]) < 1e-6
    assert relative_error(image / 2 + 0.5 - low, golden["out.decomp_high"]) < 1e-6


@pytest.mark.parametrize("fix", FIXES)
def test_a_picture_with_its_own_colours_stays(fix: Fix, pictures: tuple[Tensor, Tensor]) -> None:
    image, _ = pictures
    torch.testing.assert_close(fix(image, image), image, atol=1e-12, rtol=0)


@pytest.mark.parametrize("fix", FIXES)
def test_a_tint_is_taken_off(fix: Fix, pictures: tuple[Tensor, Tensor]) -> None:
    image, _ = pictures
    tint = torch.tensor([0.3, -0.2, 0.1], dtype=image.dtype).view(1, 3, 1, 1)
    torch.testing.assert_close(fix(image + tint, image), image, atol=1e-12, rtol=0)


def test_wavelets_keep_the_structure_and_change_the_large_areas(pictures: tuple[Tensor, Tensor]) -> None:
    image, reference = pictures
    fixed = wavelet_color_fix(image, reference)
    torch.testing.assert_close(fixed - low_frequencies(reference), image - low_frequencies(image))
    far = (low_frequencies(image) - low_frequencies(reference)).abs().mean()
    assert (low_frequencies(fixed) - low_frequencies(reference)).abs().mean() < far


def test_adain_gives_the_references_moments(pictures: tuple[Tensor, Tensor]) -> None:
    image, reference = pictures[0], pictures[1][:, :, :20] / 2 + 0.3
    fixed = adain_color_fix(image, reference)
    for moment in (torch.mean, torch.std):
        torch.testing.assert_close(moment(fixed, (2, 3)), moment(reference, (2, 3)), atol=1e-4, rtol=0)


def test_a_picture_of_one_pixel() -> None:
    image, reference = torch.zeros(1, 3, 1, 1), torch.ones(1, 3, 1, 1) / 2
    for fix in FIXES:
        torch.testing.assert_close(fix(image, reference), reference)


def test_pictures_of_two_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^the picture is \(1, 3, 4, 4\), .* \(1, 3, 4, 5\); resize one$"):
        wavelet_color_fix(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 5))


LEVEL = st.integers(0, 255)
COLOURS = st.lists(st.tuples(LEVEL, LEVEL, LEVEL, LEVEL), min_size=1, max_size=30)


def coloured_and_grey(levels: list[tuple[int, int, int, int]], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Pictures (1, 3, 1, n) and (1, 1, 1, n) of n pixels of red, green and blue, and of grey."""
    pixels = torch.tensor(levels, dtype=dtype).T[None, :, None] / 127.5 - 1
    return pixels[:, :3], pixels[:, 3:]


def test_luma_is_the_weighted_mean(pictures: tuple[Tensor, Tensor]) -> None:
    image, _ = pictures
    torch.testing.assert_close(luma(image), to_luma(image, full_range=True), atol=1e-12, rtol=0)
    torch.testing.assert_close(luma(to_gray(image)), luma(image), atol=1e-12, rtol=0)
    assert to_gray(image).shape == image.shape and to_gray(image).std(1).max() == 0
    primaries = torch.eye(3).view(3, 3, 1, 1)
    assert luma(primaries).flatten().tolist() == pytest.approx([0.299, 0.587, 0.114])


@given(COLOURS)
def test_the_luma_of_transferred_chroma_is_the_sources(levels: list[tuple[int, int, int, int]]) -> None:
    for dtype in (torch.float32, torch.float64):
        image, gray = coloured_and_grey(levels, dtype)
        result = transfer_chroma(image, gray)
        assert result.dtype == dtype and result.abs().max() <= 1
        torch.testing.assert_close(luma(result), gray, atol=1e-6, rtol=0)
        rounded = ((result + 1) * 127.5).round()
        assert (luma(rounded) - (gray + 1) * 127.5).abs().max() < 0.5 + 1e-4  # in levels


@given(COLOURS)
def test_transferred_chroma_keeps_its_hue_and_what_fits(levels: list[tuple[int, int, int, int]]) -> None:
    image, gray = coloured_and_grey(levels, torch.float64)
    result = transfer_chroma(image, gray)
    chroma, kept = image - luma(image), result - luma(result)
    power = chroma.square().sum(1, keepdim=True)
    # A grey pixel's chroma is the rounding of its luma, in another order of sums for each kernel: no factor
    # is in it.
    s = torch.where(power > 1e-24, (kept * chroma).sum(1, keepdim=True) / power.clamp_min(1e-24), 0)
    torch.testing.assert_close(kept, s * chroma, atol=1e-12, rtol=0)  # one factor for the three channels
    assert s.min() > -1e-12 and s.max() < 1 + 1e-12
    whole = gray + chroma
    fits = whole.abs().amax(1) <= 1
    torch.testing.assert_close(torch.where(fits[:, None], result, whole), whole, atol=1e-12, rtol=0)
    at_the_edge = result.abs().amax(1) > 1 - 1e-12
    assert bool((fits | at_the_edge).all())  # no smaller than it must be


def test_chroma_is_scaled_by_the_channel_that_leaves_first() -> None:
    image = torch.tensor([0.5, 0.0, -0.5]).view(1, 3, 1, 1)  # chroma 0.4075, -0.0925, -0.5925 around 0.0925
    for y, s in ((0.8, 0.2 / 0.4075), (-0.8, 0.2 / 0.5925), (0.0, 1.0), (1.0, 0.0), (-1.0, 0.0)):
        expected = y + s * torch.tensor([0.4075, -0.0925, -0.5925])
        result = transfer_chroma(image, torch.full((1, 1, 1, 1), y))
        torch.testing.assert_close(result.flatten(), expected, atol=1e-6, rtol=0)


def test_the_source_of_luma_may_have_colours_and_leave_the_range(pictures: tuple[Tensor, Tensor]) -> None:
    image, source = pictures
    torch.testing.assert_close(transfer_chroma(image, source), transfer_chroma(image, luma(source)))
    torch.testing.assert_close(transfer_chroma(image, image), image, atol=1e-12, rtol=0)
    torch.testing.assert_close(transfer_chroma(to_gray(image), source), to_gray(source), atol=1e-12, rtol=0)
    assert torch.equal(
        transfer_chroma(image, source * 9), transfer_chroma(image, luma(source * 9).clamp(-1, 1))
    )


def test_luma_of_another_size_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^the coloured picture is \(1, 3, 4, 4\), .* \(1, 1, 4, 5\); resize one$"
    ):
        transfer_chroma(torch.zeros(1, 3, 4, 4), torch.zeros(1, 1, 4, 5))


def test_gray_is_what_has_equal_channels_up_to_a_level() -> None:
    gray = torch.rand(1, 1, 5, 7).expand(1, 3, 5, 7) * 2 - 1
    assert is_gray(gray)
    tinted = gray.clone()
    tinted[:, 0, 2, 3] = tinted[:, 1, 2, 3] + 1 / 127.5
    assert is_gray(tinted)
    tinted[:, 0, 2, 3] += 1 / 127.5
    assert not is_gray(tinted)
