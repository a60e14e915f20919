"""PASD's start latent: Eqs. 3 and 4, and the numbers that the paper and the official code give."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from samplers.ans import ans_start
from samplers.schedule import make_alphas_cumprod, make_betas, q_sample

ALPHAS = make_alphas_cumprod(make_betas())
LEVELS = st.floats(0, 1)


def normal(seed: int) -> torch.Tensor:
    return torch.randn(1, 4, 6, 5, generator=torch.Generator().manual_seed(seed))


@given(a_n=st.floats(1e-4, 1), a_a=LEVELS)
def test_the_share_of_the_picture_is_the_root_of_both_levels_and_the_variance_is_kept(
    a_n: float, a_a: float
) -> None:
    zero, one = torch.zeros(1, 1, 1, 1, dtype=torch.float64), torch.ones(1, 1, 1, 1, dtype=torch.float64)
    share = ans_start(one, a_n, a_a, zero, zero).item()
    kept, z, more = (
        share,
        ans_start(zero, a_n, a_a, one, zero).item(),
        ans_start(zero, a_n, a_a, zero, one).item(),
    )
    assert share == pytest.approx((a_n * a_a) ** 0.5, abs=1e-12)
    assert kept**2 + z**2 + more**2 == pytest.approx(1, abs=1e-12)
    assert ans_start(one, a_n, a_a, zero).item() == pytest.approx(share, abs=1e-12)
    assert ans_start(zero, a_n, a_a, one).item() ** 2 == pytest.approx(z**2 + more**2, abs=1e-12)


def test_level_one_is_equation_3_and_level_zero_is_the_noise() -> None:
    z_lr, noise = normal(1), normal(2)
    assert torch.allclose(
        ans_start(z_lr, float(ALPHAS[999]), 1.0, noise), q_sample(z_lr, 999, ALPHAS, noise), atol=1e-6
    )
    assert torch.equal(ans_start(z_lr, float(ALPHAS[999]), 0.0, noise), noise)


def test_the_coefficients_of_the_official_code() -> None:
    """pasd-official.md, 2c: of z_LR, with the level n = 900, 400, and by the fallback to 50."""
    one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    for n, share in ((900, 0.008121), (400, 0.044476), (50, 0.066592)):
        assert ans_start(one, float(ALPHAS[999]), float(ALPHAS[n]), zero).item() == pytest.approx(
            share, abs=1e-6
        )
    assert float(ALPHAS[900]) ** 0.5 == pytest.approx(0.1189, abs=1e-4), "the paper's alpha_900 is this root"


@pytest.mark.parametrize("a_a", [-0.1, 1.1, float("nan")])
def test_a_level_outside_0_to_1_is_refused(a_a: float) -> None:
    with pytest.raises(ValueError, match="alpha_a"):
        ans_start(normal(1), 0.5, a_a, normal(2))


def test_dtype_and_shape_are_the_latents() -> None:
    start = ans_start(normal(1).half(), 0.005, 0.3, normal(2), normal(3))
    assert start.dtype == torch.float16 and start.shape == (1, 4, 6, 5)
