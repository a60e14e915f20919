"""LCM's multistep sampling against diffusers' trajectories, and its boundary condition."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from samplers.lcm import lcm_sample, lcm_step, lcm_timesteps
from samplers.schedule import StepInfo, clip_sample, make_alphas_cumprod, make_betas, predict_x0, q_sample
from tests.helpers.fake_denoiser import NoDoubleOnLatents, fake_eps, recorded_noise
from tests.helpers.gaussian import perfect
from tests.helpers.goldens import load_golden, relative_error

LEVELS = make_alphas_cumprod(make_betas())
X, NOISE = torch.randn(2, 1, 4, 6, 5, generator=torch.Generator().manual_seed(0)).double().unbind(0)


@pytest.mark.parametrize("case", ["lcm_4", "lcm_4_diffusers029"])
def test_lcm_sample_matches_diffusers(case: str) -> None:
    golden = load_golden("schedulers", case)
    timesteps = lcm_timesteps(golden.meta["num_inference_steps"])
    seen = [golden["trajectory"][0]]
    lcm_sample(
        fake_eps(),
        seen[0],
        timesteps,
        LEVELS,
        noise=lambda site, step, shape: golden["noise"][step],
        on_step=lambda info: seen.append(info.x),
    )
    assert torch.equal(timesteps, golden["timesteps"])
    assert relative_error(torch.stack(seen), golden["trajectory"]) < 1e-5


def test_lcm_timesteps_match_diffusers() -> None:
    for num_steps, expected in load_golden("schedulers", "tables").meta["timesteps"]["lcm_sd15json"].items():
        assert lcm_timesteps(int(num_steps)).tolist() == expected


@given(st.integers(1, 50))
def test_lcm_timesteps_are_ones_the_model_was_distilled_on(num_steps: int) -> None:
    timesteps = lcm_timesteps(num_steps)
    assert timesteps.dtype == torch.int64 and len(timesteps) == num_steps
    assert timesteps[0] == 999 and bool((timesteps.diff() < 0).all())
    assert set(timesteps.tolist()) <= set(range(19, 1000, 20))


def test_lcm_timesteps_refuses_more_steps_than_were_distilled() -> None:
    for num_steps in (0, 51):
        with pytest.raises(ValueError, match=f"num_steps is {num_steps}"):
            lcm_timesteps(num_steps)


def test_lcm_step_meets_the_boundary_condition() -> None:
    """At t = 0 the consistency function is the identity; far from it, the denoiser's clean latent."""
    torch.testing.assert_close(lcm_step(X, NOISE, 0, 0.9, 1.0)[0], X, rtol=0, atol=0)
    far, _ = lcm_step(X, NOISE, 999, 0.3, 1.0)
    torch.testing.assert_close(far, predict_x0(X, NOISE, 0.3), rtol=0, atol=1e-6)
    # where 10 t = sigma_data = 0.5: c_skip = 1 / 2, c_out = 1 / sqrt(2)
    middle, _ = lcm_step(X, NOISE, 0.05, 0.3, 1.0)
    torch.testing.assert_close(middle, X / 2 + predict_x0(X, NOISE, 0.3) / 2**0.5)


def test_lcm_step_noises_its_prediction_again() -> None:
    x_prev, pred_x0 = lcm_step(X, NOISE, 500, LEVELS[500], LEVELS[200], NOISE.flip(-1))
    torch.testing.assert_close(x_prev, q_sample(pred_x0, 200, LEVELS, NOISE.flip(-1)))


@given(st.integers(1, 50))
def test_lcm_with_a_perfect_denoiser_recovers_x0(num_steps: int) -> None:
    """But for the share c_skip of the last latent: 7e-6 at t = 19."""
    out = lcm_sample(perfect(X, LEVELS), NOISE, lcm_timesteps(num_steps), LEVELS, generator=torch.Generator())
    torch.testing.assert_close(out, X, rtol=0, atol=1e-4)


def test_lcm_asks_for_noise_in_every_step_but_the_last_and_reports_each() -> None:
    asked, noise = recorded_noise()
    infos: list[StepInfo] = []
    told: list[Tensor] = []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        told.append(t)
        return fake_eps()(x, t)

    out = lcm_sample(denoise, X, lcm_timesteps(4), LEVELS, noise=noise, on_step=infos.append)
    assert asked == [("step", i, tuple(X.shape)) for i in range(3)]
    assert [(i.step, i.total, i.t) for i in infos] == [(0, 4, 999), (1, 4, 759), (2, 4, 499), (3, 4, 259)]
    assert torch.equal(infos[-1].x, out) and torch.equal(infos[-1].pred_x0, out)
    assert all(t.dtype == torch.int64 and t.dim() == 0 for t in told)
    lcm_sample(fake_eps(), X, lcm_timesteps(1), LEVELS)  # one step draws nothing


def test_lcm_refuses_to_noise_without_noise() -> None:
    with pytest.raises(ValueError, match="noise is None"):
        lcm_step(X, NOISE, 500, 0.3, 0.5)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.03), (torch.float16, 4e-3)])
def test_lcm_works_in_low_precision(dtype: torch.dtype, tolerance: float) -> None:
    def run(x: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return lcm_sample(fake_eps(), x, lcm_timesteps(4), LEVELS, generator=generator)

    with NoDoubleOnLatents(dtype):
        out = run(X.to(dtype))
    assert out.dtype == dtype and relative_error(out.double(), run(X)) < tolerance


def test_lcm_limits_the_clean_latent_before_the_boundary_condition() -> None:
    x = 5 * torch.ones(1, 4, 2, 2, dtype=torch.float64)
    _, free = lcm_step(x, torch.zeros_like(x), 999, 0.5, 1.0)
    _, limited = lcm_step(x, torch.zeros_like(x), 999, 0.5, 1.0, limit=clip_sample())
    assert free.max() > 7 and limited.max() == pytest.approx(1, abs=1e-6)
