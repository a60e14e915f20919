"""DPM-Solver++(2M) against diffusers' trajectories, with and without Karras' sigmas, and its order."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from samplers.ddim import ddim_step
from samplers.dpmpp import dpmpp_sample, dpmpp_step
from samplers.schedule import (
    StepInfo,
    clip_sample,
    diffusers_leading_timesteps,
    half_log_snr,
    karras_steps,
    linspace_timesteps,
    make_alphas_cumprod,
    make_betas,
    rescale_zero_terminal_snr,
    v_prediction,
)
from tests.helpers.fake_denoiser import NoDoubleOnLatents, fake_eps
from tests.helpers.gaussian import convergence_order, perfect
from tests.helpers.goldens import load_golden, relative_error

LEVELS = make_alphas_cumprod(make_betas())
X, NOISE = torch.randn(2, 1, 4, 6, 5, generator=torch.Generator().manual_seed(0)).double().unbind(0)


@pytest.mark.parametrize("case", ["dpmpp2m_10", "dpmpp2m_20", "dpmpp2m_leading_14", "dpmpp2m_karras_12"])
def test_dpmpp_sample_matches_diffusers(case: str) -> None:
    golden = load_golden("schedulers", case)
    steps, levels = golden.meta["num_inference_steps"], None
    if "karras" in case:
        timesteps, levels = karras_steps(steps, LEVELS)
    elif "leading" in case:  # diffusers' multistep schedulers step by T // (N + 1) there
        timesteps = diffusers_leading_timesteps(steps, drop_zero=True)
    else:
        timesteps = linspace_timesteps(steps, drop_zero=True)
    seen = [golden["trajectory"][0]]
    dpmpp_sample(
        fake_eps(), seen[0], timesteps, LEVELS, levels=levels, on_step=lambda info: seen.append(info.x)
    )
    assert torch.equal(timesteps, golden["timesteps"])
    assert relative_error(torch.stack(seen), golden["trajectory"]) < 1e-5


def test_dpmpp_converges_with_order_2() -> None:
    assert convergence_order(dpmpp_sample, 128) == pytest.approx(2, abs=0.1)


@given(st.floats(0.005, 0.995), st.floats(0.005, 1))
def test_dpmpp_without_history_is_ddim(a_t: float, a_prev: float) -> None:
    x_prev, pred_x0, _ = dpmpp_step(X, NOISE, a_t, a_prev)
    for out, ref in zip((x_prev, pred_x0), ddim_step(X, NOISE, a_t, a_prev), strict=True):
        torch.testing.assert_close(out, ref, rtol=0, atol=1e-10)


def test_dpmpp_step_is_second_order_only_where_it_can_be() -> None:
    """The last step forgets the history into level 1, and in runs of fewer than 15 steps; not otherwise."""
    for num_steps, final_alpha, first_order in ((20, 1.0, True), (14, 0.999, True), (15, 0.999, False)):
        infos: list[StepInfo] = []
        timesteps = linspace_timesteps(num_steps, drop_zero=True)
        out = dpmpp_sample(fake_eps(), X, timesteps, LEVELS, final_alpha=final_alpha, on_step=infos.append)
        x, t = infos[-2].x, timesteps[-1]
        plain, _ = ddim_step(x, fake_eps(x, t), LEVELS[t], final_alpha)
        assert (relative_error(out, plain) < 1e-9) == first_order


@given(st.integers(1, 30), st.booleans(), st.sampled_from(["dpmsolver++", "dpmsolver"]))
def test_dpmpp_with_a_perfect_denoiser_recovers_x0(num_steps: int, karras: bool, algorithm_type: str) -> None:
    """Told the latent's own level: with Karras' sigmas the timesteps are only near it."""
    timesteps, levels = linspace_timesteps(num_steps, drop_zero=True), None
    table = LEVELS
    if karras:
        _, levels = karras_steps(num_steps, LEVELS)
        timesteps, table = torch.arange(num_steps), levels
    out = dpmpp_sample(
        perfect(X, table), NOISE, timesteps, LEVELS, levels=levels, algorithm_type=algorithm_type
    )
    torch.testing.assert_close(out, X, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dpmpp_starts_from_a_clamped_zero_terminal_snr(dtype: torch.dtype) -> None:
    levels = make_alphas_cumprod(rescale_zero_terminal_snr(make_betas())).clamp(min=2**-24)
    denoise = v_prediction(lambda x, t: -0.5 * x, levels)
    for num_steps in (1, 2, 3, 20):
        out = dpmpp_sample(denoise, X.to(dtype), linspace_timesteps(num_steps, drop_zero=True), levels)
        assert out.dtype == dtype and bool(out.isfinite().all()) and out.abs().max() < 10


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.bfloat16, 0.03), (torch.float16, 4e-3), (torch.float32, 1e-5)]
)
def test_dpmpp_works_in_low_precision(dtype: torch.dtype, tolerance: float) -> None:
    timesteps = linspace_timesteps(10, drop_zero=True)
    with NoDoubleOnLatents(dtype):
        out = dpmpp_sample(fake_eps(), X.to(dtype), timesteps, LEVELS)
        history = dpmpp_step(X.to(dtype), NOISE.to(dtype), 0.4, 0.9)[2]
    assert out.dtype == dtype and history[1].dtype == torch.float32
    assert relative_error(out.double(), dpmpp_sample(fake_eps(), X, timesteps, LEVELS)) < tolerance


def test_dpmpp_draws_no_noise_and_reports_every_step() -> None:
    generator = torch.Generator().manual_seed(3)
    state = generator.get_state()
    infos: list[StepInfo] = []
    told: list[Tensor] = []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        told.append(t)
        return fake_eps()(x, t)

    out = dpmpp_sample(denoise, X, [601, 301, 1], LEVELS, generator=generator, on_step=infos.append)
    assert torch.equal(generator.get_state(), state)
    assert [(i.step, i.total, i.t) for i in infos] == [(0, 3, 601), (1, 3, 301), (2, 3, 1)]
    assert torch.equal(infos[-1].x, out) and torch.equal(infos[-1].pred_x0, out)
    assert all(t.dtype == torch.int64 and t.dim() == 0 for t in told)


def test_dpmpp_refuses_what_has_no_meaning() -> None:
    for level in (0.0, 1.0):
        with pytest.raises(ValueError, match="level"):
            dpmpp_step(X, NOISE, level, 1.0)
    with pytest.raises(ValueError, match="both"):
        dpmpp_sample(fake_eps(), X, [1], LEVELS, noise=lambda *_: NOISE, generator=torch.Generator())


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize("algorithm_type", ["dpmsolver++", "dpmsolver"])
def test_dpmpp_converges_with_its_order(order: int, solver_type: str, algorithm_type: str) -> None:
    """Of third order is only a step: the first ones of a run, and the official weights, leave it at two."""
    found = convergence_order(
        dpmpp_sample, 128, order=order, solver_type=solver_type, lower_order_final=False
    )
    assert found == pytest.approx(min(order, 2), abs=0.1)


def test_dpmpp_heun_is_exact_for_a_prediction_linear_in_lambda() -> None:
    """And midpoint is not: x0 = lambda, whose ODE in lambda has a closed solution."""
    a, b, c = 0.1, 0.3, 0.6

    def eps_of(x: Tensor, level: float, x0: float) -> Tensor:
        return (x - level**0.5 * x0) / (1 - level) ** 0.5

    exact = ((1 - c) / (1 - b)) ** 0.5 * X
    grid = torch.linspace(half_log_snr(b), half_log_snr(c), 20001, dtype=torch.float64)
    weight = (1 - c) ** 0.5 * torch.trapezoid(grid.exp() * grid, grid)  # sigma_t times the integral
    errors = {}
    for solver_type in ("heun", "midpoint"):
        history = dpmpp_step(X, eps_of(X, a, half_log_snr(a)), a, b)[2]
        eps = eps_of(X, b, half_log_snr(b))
        found = dpmpp_step(X, eps, b, c, history, solver_type=solver_type)[0]
        errors[solver_type] = relative_error(found, exact + weight)
    assert errors["heun"] < 1e-8 < 1e-3 < errors["midpoint"]


def test_dpmpp_lowers_the_order_at_the_end_where_asked() -> None:
    def error(num_steps: int, options: dict[str, Any]) -> float:
        infos: list[StepInfo] = []
        timesteps = linspace_timesteps(num_steps, drop_zero=True)
        out = dpmpp_sample(
            fake_eps(), X, timesteps, LEVELS, final_alpha=0.999, on_step=infos.append, **options
        )
        x, t = infos[-2].x, timesteps[-1]
        return relative_error(out, ddim_step(x, fake_eps(x, t), LEVELS[t], 0.999)[0])

    cases: list[tuple[int, dict[str, Any], bool]] = [
        (10, {}, True),
        (10, {"lower_order_final": False}, False),
        (10, {"lower_order_final": False, "euler_at_final": True}, True),
        (20, {"euler_at_final": True}, True),
        (20, {}, False),
    ]
    for num_steps, options, lowered in cases:
        assert (error(num_steps, options) < 1e-9) == lowered, (num_steps, options)


def test_dpmpp_of_order_3_remembers_two_predictions_and_limits_them() -> None:
    limit, history = clip_sample(0.4), ()
    for a_t, a_prev, kept in ((0.1, 0.2, 1), (0.2, 0.4, 2), (0.4, 0.7, 2), (0.7, 0.7, 2), (0.7, 1.0, 2)):
        x, pred_x0, history = dpmpp_step(X, NOISE, a_t, a_prev, history, order=3, limit=limit)
        assert history[0].shape == (kept,) and float(history[0][0]) == a_t and len(history) == kept + 1
        assert pred_x0.abs().max() <= 0.4 and bool(x.isfinite().all())
    wrong: list[dict[str, Any]] = [
        {"order": 4},
        {"order": 0},
        {"solver_type": "bh2"},
        {"algorithm_type": "sde"},
    ]
    for options in wrong:
        with pytest.raises(ValueError, match="orders 1 to 3|algorithm_type"):
            dpmpp_step(X, NOISE, 0.4, 0.9, **options)
