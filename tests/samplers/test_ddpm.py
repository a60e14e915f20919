"""DDPM's ancestral sampler against diffusers' trajectories, and properties that need no reference."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from samplers.ddim import ddim_step
from samplers.ddpm import ddpm_sample, ddpm_sigma, ddpm_step
from samplers.schedule import clip_sample, leading_timesteps, make_alphas_cumprod, make_betas, q_sample
from tests.helpers.fake_denoiser import NoDoubleOnLatents, fake_eps, recorded_noise
from tests.helpers.goldens import load_golden, relative_error

LEVELS = make_alphas_cumprod(make_betas())
X, NOISE = torch.randn(2, 1, 4, 6, 5, generator=torch.Generator().manual_seed(0)).double().unbind(0)


@pytest.mark.parametrize("num_steps", [10, 20])
def test_ddpm_sample_matches_diffusers(num_steps: int) -> None:
    golden = load_golden("schedulers", f"ddpm_fixed_small_{num_steps}")
    seen = [golden["trajectory"][0]]
    ddpm_sample(
        fake_eps(),
        seen[0],
        leading_timesteps(num_steps),
        LEVELS,
        noise=lambda site, step, shape: golden["noise"][step],
        on_step=lambda info: seen.append(info.x),
    )
    assert relative_error(torch.stack(seen), golden["trajectory"]) < 1e-6


@given(st.floats(0.005, 0.995), st.floats(0, 1))
def test_ddpm_fixed_small_is_ddim_of_eta_1(a_t: float, fraction: float) -> None:
    a_prev = min(a_t + fraction * (1 - a_t), 1.0)
    ours = ddpm_step(X, NOISE, a_t, a_prev, NOISE.flip(-1))
    for out, ref in zip(ours, ddim_step(X, NOISE, a_t, a_prev, 1.0, NOISE.flip(-1)), strict=True):
        torch.testing.assert_close(out, ref, rtol=0, atol=1e-9)


def test_ddpm_with_true_noise_recovers_x0_in_one_step() -> None:
    for t in (1, 400, 999):
        out, pred_x0 = ddpm_step(q_sample(X, t, LEVELS, NOISE), NOISE, LEVELS[t], 1.0)
        torch.testing.assert_close(out, X)
        assert torch.equal(out, pred_x0)


def test_ddpm_variances_are_beta_and_the_posterior() -> None:
    a_t, a_prev = float(LEVELS[500]), float(LEVELS[499])
    beta = float(make_betas()[500])
    assert ddpm_sigma(a_t, a_prev, "fixed_large") ** 2 == pytest.approx(beta)
    assert ddpm_sigma(a_t, a_prev, "fixed_small") ** 2 == pytest.approx(beta * (1 - a_prev) / (1 - a_t))
    assert ddpm_sigma(a_t, 1.0, "fixed_large") == 0


def test_ddpm_asks_for_noise_at_its_documented_sites_only() -> None:
    for variance in ("fixed_small", "fixed_large"):
        for final_alpha, steps in ((1.0, 4), (float(LEVELS[0]), 5)):
            asked, noise = recorded_noise()
            ddpm_sample(
                fake_eps(),
                X,
                leading_timesteps(5),
                LEVELS,
                variance=variance,
                final_alpha=final_alpha,
                noise=noise,
            )
            assert asked == [("step", i, tuple(X.shape)) for i in range(steps)]


def test_ddpm_refuses_what_has_no_meaning() -> None:
    with pytest.raises(ValueError, match="learned"):
        ddpm_step(X, NOISE, 0.4, 0.9, NOISE, "learned")
    with pytest.raises(ValueError, match="noisier"):
        ddpm_step(X, NOISE, 0.9, 0.4, NOISE)
    with pytest.raises(ValueError, match="noise is None"):
        ddpm_step(X, NOISE, 0.4, 0.9)


def test_ddpm_works_in_bfloat16() -> None:
    x = X.bfloat16()
    with NoDoubleOnLatents(torch.bfloat16):
        out = ddpm_sample(
            fake_eps(), x, leading_timesteps(10), LEVELS, generator=torch.Generator().manual_seed(0)
        )
    ref = ddpm_sample(
        fake_eps(), X, leading_timesteps(10), LEVELS, generator=torch.Generator().manual_seed(0)
    )
    assert out.dtype == torch.bfloat16 and relative_error(out, ref) < 0.03


def test_ddpm_goes_on_from_the_limited_clean_latent() -> None:
    limit = clip_sample(0.5)
    expected = limit((X - 0.6**0.5 * NOISE) / 0.4**0.5)
    x_prev, pred_x0 = ddpm_step(X, NOISE, 0.4, 0.9, torch.zeros_like(X), limit=limit)
    torch.testing.assert_close(pred_x0, expected)
    alpha = 0.4 / 0.9
    mean = 0.9**0.5 * (1 - alpha) / 0.6 * expected + alpha**0.5 * 0.1 / 0.6 * X
    torch.testing.assert_close(x_prev, mean)
    out = ddpm_sample(fake_eps(), X, [601, 1], LEVELS, limit=limit, generator=torch.Generator())
    assert out.abs().max() <= 0.5
