"""Errors of pictures against scikit-image and by hand; intervals against known values."""

import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio

from msbd.metrics import bootstrap_interval, edge_step, psnr, squared_error, wilson_interval


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


def test_pictures_of_different_sizes_are_not_compared() -> None:
    with pytest.raises(ValueError, match=r"\(1, 3, 8, 8\)"):
        psnr(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 9, 8))


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
