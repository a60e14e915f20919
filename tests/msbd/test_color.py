"""msbd/color.py: the colours come from the reference, the structure stays."""

from collections.abc import Callable

import pytest
import torch
from goldens import load_golden, relative_error
from torch import Tensor

from msbd.color import adain_color_fix, low_frequencies, wavelet_color_fix

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
