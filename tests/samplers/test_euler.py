"""Euler and Euler ancestral against diffusers' trajectories (there in the form x / sqrt(a)), and DDIM."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from samplers.ddim import ddim_step
from samplers.euler import euler_sample, euler_sigmas, euler_step
from samplers.schedule import (
    StepInfo,
    karras_steps,
    leading_timesteps,
    make_alphas_cumprod,
    make_betas,
    rescale_zero_terminal_snr,
    solver_steps,
    v_prediction,
)
from tests.helpers.fake_denoiser import NoDoubleOnLatents, fake_eps, recorded_noise
from tests.helpers.gaussian import convergence_order, perfect
from tests.helpers.goldens import load_golden, relative_error

LEVELS = make_alphas_cumprod(make_betas())
X, NOISE = torch.randn(2, 1, 4, 6, 5, generator=torch.Generator().manual_seed(0)).double().unbind(0)


@pytest.mark.parametrize("case", ["euler_10", "euler_20", "euler_50", "euler_a_10"])
def test_euler_sample_matches_diffusers(case: str) -> None:
    golden = load_golden("schedulers", case)
    timesteps = leading_timesteps(golden.meta["num_inference_steps"])
    steps = solver_steps(timesteps, LEVELS)
    ancestral = "noise" in golden.tensors
    seen = [golden["trajectory"][0]]
    euler_sample(
        fake_eps(),
        math.sqrt(steps[0][1]) * seen[0],
        timesteps,
        LEVELS,
        eta=1.0 if ancestral else 0.0,
        noise=(lambda site, step, shape: golden["noise"][step]) if ancestral else None,
        on_step=lambda info: seen.append(info.x / math.sqrt(steps[info.step][2])),
    )
    assert torch.equal(timesteps.float(), golden["timesteps"])
    assert relative_error(torch.stack(seen), golden["trajectory"]) < 1e-5
    sigmas = torch.tensor([euler_sigmas(a_t, a_prev)[0] for _, a_t, a_prev in steps] + [0.0])
    assert relative_error(sigmas, golden["sigmas"]) < 1e-6


def test_euler_start_is_unit_noise_where_diffusers_scales_by_init_noise_sigma() -> None:
    """init_noise_sigma is sqrt(sigma^2 + 1) with "leading", so that times sqrt(a) is 1."""
    for case in ("euler_10", "euler_20", "euler_50", "euler_a_10"):
        meta = load_golden("schedulers", case).meta
        a = float(LEVELS[leading_timesteps(meta["num_inference_steps"])[0]])
        assert meta["init_noise_sigma"] * math.sqrt(a) == pytest.approx(1, rel=1e-6)


def test_euler_at_fractions_of_a_timestep_interpolates_sigma() -> None:
    """diffusers' "linspace" of 20: the second timestep is 946.42, and sigma is linear between 946 and 947."""
    told: list[Tensor] = []
    infos: list[StepInfo] = []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        told.append(t)
        return fake_eps()(x, t)

    timesteps = torch.linspace(999, 0, 20)
    euler_sample(denoise, X, timesteps, LEVELS, on_step=infos.append)
    assert [t.item() for t in told] == pytest.approx(timesteps.tolist())
    assert told[0].dtype == torch.int64 and told[1].dtype == torch.float32
    assert infos[1].t == pytest.approx(946.4211, abs=1e-3)
    sigmas = ((1 - LEVELS) / LEVELS).sqrt()
    _, a_t, _ = solver_steps([999, 946.25], LEVELS)[1]
    assert euler_sigmas(a_t, 1.0)[0] == pytest.approx((0.75 * sigmas[946] + 0.25 * sigmas[947]).item())


def test_euler_converges_with_order_1() -> None:
    assert convergence_order(euler_sample, 128) == pytest.approx(1, abs=0.1)


@given(st.floats(0.005, 0.995), st.floats(0, 1), st.floats(0, 1))
def test_euler_is_ddim_of_the_same_eta(a_t: float, fraction: float, eta: float) -> None:
    a_prev = min(a_t + fraction * (1 - a_t), 1.0)
    ours = euler_step(X, NOISE, a_t, a_prev, eta, NOISE.flip(-1))
    for out, ref in zip(ours, ddim_step(X, NOISE, a_t, a_prev, eta, NOISE.flip(-1)), strict=True):
        torch.testing.assert_close(
            out, ref, rtol=0, atol=1e-6
        )  # sqrt(1 - ratio) where the levels all but meet


@given(st.floats(0.005, 0.995), st.floats(0, 1), st.floats(0, 1))
def test_euler_sigmas_add_up_to_the_next_sigma(a_t: float, fraction: float, eta: float) -> None:
    a_prev = min(a_t + fraction * (1 - a_t), 1.0)
    sigma, down, up = euler_sigmas(a_t, a_prev, eta)
    assert math.hypot(down, up) == pytest.approx(math.sqrt((1 - a_prev) / a_prev), abs=1e-9)
    assert 0 <= up <= math.hypot(down, up) <= sigma + 1e-9


@given(st.integers(1, 20), st.floats(0, 1), st.booleans())
def test_euler_with_a_perfect_denoiser_recovers_x0(num_steps: int, eta: float, karras: bool) -> None:
    timesteps, levels, table = leading_timesteps(num_steps), None, LEVELS
    if karras:
        _, levels = karras_steps(num_steps, LEVELS)
        timesteps, table = torch.arange(num_steps), levels
    generator = torch.Generator().manual_seed(1)
    out = euler_sample(
        perfect(X, table), NOISE, timesteps, LEVELS, eta=eta, levels=levels, generator=generator
    )
    torch.testing.assert_close(out, X, rtol=0, atol=1e-9)


def test_euler_draws_noise_at_its_documented_sites_only() -> None:
    for final_alpha, steps in ((1.0, 4), (float(LEVELS[0]), 5)):  # a step into level 1 adds no noise
        asked, noise = recorded_noise()
        euler_sample(
            fake_eps(), X, leading_timesteps(5), LEVELS, eta=0.3, final_alpha=final_alpha, noise=noise
        )
        assert asked == [("step", i, tuple(X.shape)) for i in range(steps)]
    generator = torch.Generator().manual_seed(3)
    state = generator.get_state()
    euler_sample(fake_eps(), X, leading_timesteps(5), LEVELS, generator=generator)
    assert torch.equal(generator.get_state(), state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_euler_starts_from_a_clamped_zero_terminal_snr(dtype: torch.dtype) -> None:
    levels = make_alphas_cumprod(rescale_zero_terminal_snr(make_betas())).clamp(min=2**-24)
    denoise = v_prediction(lambda x, t: -0.5 * x, levels)
    for eta in (0.0, 1.0):
        out = euler_sample(
            denoise, X.to(dtype), [999, 700, 300, 1], levels, eta=eta, generator=torch.Generator()
        )
        assert out.dtype == dtype and bool(out.isfinite().all()) and out.abs().max() < 10


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.bfloat16, 0.03), (torch.float16, 4e-3), (torch.float32, 1e-5)]
)
def test_euler_works_in_low_precision(dtype: torch.dtype, tolerance: float) -> None:
    def run(x: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return euler_sample(fake_eps(), x, leading_timesteps(10), LEVELS, eta=1.0, generator=generator)

    with NoDoubleOnLatents(dtype):
        out = run(X.to(dtype))
    assert out.dtype == dtype and relative_error(out.double(), run(X)) < tolerance


def test_euler_step_of_a_clean_latent_changes_nothing() -> None:
    for eta in (0.0, 1.0):
        assert torch.equal(euler_step(X, NOISE, 1.0, 1.0, eta)[0], X)


def test_euler_reports_every_step() -> None:
    infos: list[StepInfo] = []
    out = euler_sample(fake_eps(), X, [601, 301, 1], LEVELS, on_step=infos.append)
    assert [(i.step, i.total, i.t) for i in infos] == [(0, 3, 601), (1, 3, 301), (2, 3, 1)]
    assert torch.equal(infos[-1].x, out)
    torch.testing.assert_close(infos[-1].pred_x0, out)


@pytest.mark.parametrize(
    "a_t, a_prev, eta, message",
    [
        (0.4, 0.9, 1.5, "eta"),
        (0.9, 0.4, 0.5, "noisier"),
        (0.0, 0.4, 0.0, "levels"),
        (0.4, 1.1, 0.0, "levels"),
        (0.4, 0.9, 1.0, "noise is None"),
    ],
)
def test_euler_refuses_what_has_no_meaning(a_t: float, a_prev: float, eta: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        euler_step(X, NOISE, a_t, a_prev, eta)
