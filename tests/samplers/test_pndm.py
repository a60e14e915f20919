"""PLMS against LDM's and diffusers' trajectories, which one formulation gives, and its order of accuracy."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from samplers.ddim import ddim_sample, ddim_step
from samplers.pndm import pndm_sample, pndm_step
from samplers.schedule import (
    StepInfo,
    ldm_timesteps,
    leading_timesteps,
    make_alphas_cumprod,
    make_betas,
    rescale_zero_terminal_snr,
    v_prediction,
)
from tests.helpers.fake_denoiser import NoDoubleOnLatents, fake_eps
from tests.helpers.gaussian import (
    START,
    convergence_order,
    gaussian_eps,
    gaussian_flow,
    perfect,
    uneven_levels,
)
from tests.helpers.goldens import load_golden, relative_error

LEVELS = make_alphas_cumprod(make_betas())
FIRST = float(LEVELS[0])
X, NOISE = torch.randn(2, 1, 4, 6, 5, generator=torch.Generator().manual_seed(0)).double().unbind(0)


@pytest.mark.parametrize("case", ["pndm_10", "pndm_20"])
def test_pndm_sample_matches_diffusers(case: str) -> None:
    golden = load_golden("schedulers", case)
    told: list[float] = []
    seen = [golden["trajectory"][0]]

    def keep(info: StepInfo) -> None:
        told.append(info.t)
        seen.append(info.x)

    timesteps = leading_timesteps(golden.meta["num_inference_steps"])
    pndm_sample(fake_eps(), seen[0], timesteps, LEVELS, final_alpha=FIRST, on_step=keep)
    assert told == golden["timesteps"].tolist()
    assert relative_error(torch.stack(seen), golden["trajectory"]) < 1e-5


def test_pndm_timesteps_match_diffusers() -> None:
    for num_steps, expected in load_golden("schedulers", "tables").meta["timesteps"]["pndm"].items():
        infos: list[StepInfo] = []
        pndm_sample(fake_eps(), X, leading_timesteps(int(num_steps)), LEVELS, on_step=infos.append)
        assert [info.t for info in infos] == expected


def test_pndm_sample_matches_ldm() -> None:
    golden = load_golden("ldm_sampler", "plms_10")
    infos: list[StepInfo] = []
    out = pndm_sample(
        lambda x, t: fake_eps(x, t, golden["in.c"]),
        golden["in.x_T"],
        ldm_timesteps(golden.meta["S"]),
        LEVELS,
        final_alpha=FIRST,
        on_step=infos.append,
    )
    assert relative_error(out, golden["out.x"]) < 1e-5
    # LDM logs the start, then each step once: not the first evaluation's, which the second improves
    seen = [golden["in.x_T"], *(info.x for info in infos[1:])]
    assert relative_error(torch.stack(seen), golden["out.x_inter"]) < 1e-5


def test_pndm_converges_with_order_2() -> None:
    assert convergence_order(pndm_sample, 128) == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("power", [0, 1, 2, 3])
def test_pndm_step_integrates_a_polynomial_eps_exactly(power: int) -> None:
    """Adams-Bashforth of k points takes the mean of an eps = u^p over a step of u without error for p < k."""
    for known in range(4):
        past = tuple(torch.full_like(X, float(-k) ** power) for k in range(known + 1))
        x_prev, _, history = pndm_step(X, past[0], 0.3, 0.5, past[1:])
        exact, _ = ddim_step(X, torch.full_like(X, 1 / (power + 1)), 0.3, 0.5)
        assert (relative_error(x_prev, exact) < 1e-12) == (power <= known)
        assert len(history) == min(known + 1, 3) and torch.equal(history[0], past[0])


@given(st.integers(1, 40), st.booleans())
def test_pndm_with_a_perfect_denoiser_recovers_x0(num_steps: int, into_clean: bool) -> None:
    eps = (NOISE - LEVELS[999].sqrt() * X) / (1 - LEVELS[999]).sqrt()
    final = 1.0 if into_clean else FIRST
    timesteps = torch.cat([torch.tensor([999]), leading_timesteps(num_steps + 1)[1:]])
    out = pndm_sample(perfect(X, LEVELS), NOISE, timesteps, LEVELS, final_alpha=final)
    torch.testing.assert_close(out, final**0.5 * X + (1 - final) ** 0.5 * eps, rtol=0, atol=1e-9)


def test_pndm_of_one_step_is_ddim_and_of_two_is_heuns_method() -> None:
    out = pndm_sample(fake_eps(), X, [801], LEVELS)
    torch.testing.assert_close(out, ddim_sample(fake_eps(), X, [801], LEVELS), rtol=0, atol=1e-12)
    infos: list[StepInfo] = []
    pndm_sample(fake_eps(), X, [801, 301], LEVELS, on_step=infos.append)
    first, second = torch.tensor(801), torch.tensor(301)
    there = ddim_step(X, fake_eps(X, first), LEVELS[801], LEVELS[301])[0]
    both = (fake_eps(X, first) + fake_eps(there, second)) / 2
    improved = ddim_step(X, both, LEVELS[801], LEVELS[301])[0]
    for info, expected in zip(infos, (there, improved), strict=False):
        torch.testing.assert_close(info.x, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.bfloat16, 0.03), (torch.float16, 4e-3), (torch.float32, 1e-5)]
)
def test_pndm_works_in_low_precision(dtype: torch.dtype, tolerance: float) -> None:
    timesteps = leading_timesteps(10)
    with NoDoubleOnLatents(dtype):
        out = pndm_sample(fake_eps(), X.to(dtype), timesteps, LEVELS)
        history = pndm_step(X.to(dtype), NOISE.to(dtype), 0.4, 0.9)[2]
    assert out.dtype == dtype and history[0].dtype == torch.float32
    assert relative_error(out.double(), pndm_sample(fake_eps(), X, timesteps, LEVELS)) < tolerance


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_pndm_starts_from_a_clamped_zero_terminal_snr(dtype: torch.dtype) -> None:
    levels = make_alphas_cumprod(rescale_zero_terminal_snr(make_betas())).clamp(min=2**-24)
    denoise = v_prediction(lambda x, t: -0.5 * x, levels)
    for timesteps in ([999], [999, 500], [999, 750, 500, 250]):
        out = pndm_sample(denoise, X.to(dtype), timesteps, levels)
        assert out.dtype == dtype and bool(out.isfinite().all())


def test_pndm_draws_no_noise_and_reports_every_evaluation() -> None:
    generator = torch.Generator().manual_seed(3)
    state = generator.get_state()
    infos: list[StepInfo] = []
    told: list[Tensor] = []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        told.append(t)
        return fake_eps()(x, t)

    out = pndm_sample(denoise, X, [601, 301, 1], LEVELS, generator=generator, on_step=infos.append)
    assert torch.equal(generator.get_state(), state)
    assert [(i.step, i.total, i.t) for i in infos] == [(0, 4, 601), (1, 4, 301), (2, 4, 301), (3, 4, 1)]
    assert [int(t) for t in told] == [i.t for i in infos]
    assert torch.equal(infos[-1].x, out) and torch.equal(infos[-1].pred_x0, out)
    assert all(t.dtype == torch.int64 and t.dim() == 0 for t in told)


def test_pndm_refuses_two_sources_of_noise() -> None:
    with pytest.raises(ValueError, match="both"):
        pndm_sample(fake_eps(), X, [1], LEVELS, noise=lambda *_: NOISE, generator=torch.Generator())


@given(st.integers(1, 40))
def test_pndm_from_runge_kutta_with_a_perfect_denoiser_recovers_x0(num_steps: int) -> None:
    eps = (NOISE - LEVELS[999].sqrt() * X) / (1 - LEVELS[999]).sqrt()
    timesteps = torch.cat([torch.tensor([999]), leading_timesteps(num_steps + 1)[1:]])
    infos: list[StepInfo] = []
    out = pndm_sample(
        perfect(X, LEVELS),
        NOISE,
        timesteps,
        LEVELS,
        skip_prk_steps=False,
        final_alpha=FIRST,
        on_step=infos.append,
    )
    torch.testing.assert_close(out, FIRST**0.5 * X + (1 - FIRST) ** 0.5 * eps, rtol=0, atol=1e-9)
    total = len(timesteps) + 3 * min(3, len(timesteps) - 1)
    assert [info.step for info in infos] == list(range(total)) and {info.total for info in infos} == {total}
    assert torch.equal(infos[-1].x, out)


def even_order(num_steps: int, prediction: str, **options: Any) -> float:
    """`convergence_order` with a table entry half-way between steps, of a net that may predict v."""
    errors = []
    for n in (num_steps, 2 * num_steps):
        levels = uneven_levels(2 * n)
        first, last = float(levels[-1]), float(levels[0])

        def answer(x: Tensor, t: Tensor, levels: Tensor = levels) -> Tensor:
            a = float(levels[t])
            eps = gaussian_eps(x, a)
            x0 = (x - (1 - a) ** 0.5 * eps) / a**0.5
            return eps if prediction == "epsilon" else a**0.5 * eps - (1 - a) ** 0.5 * x0

        out = pndm_sample(
            answer, START, range(2 * n, 1, -2), levels, final_alpha=last, prediction=prediction, **options
        )
        errors.append((out - gaussian_flow(START, first, last)).abs().max().item())
    return math.log2(errors[0] / errors[1])


@pytest.mark.parametrize("skip_prk_steps", [True, False])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_pndm_is_of_second_order_by_either_start(skip_prk_steps: bool, prediction: str) -> None:
    """As the paper proves, whatever the net predicts; where v itself is combined only of first."""
    found = even_order(128, prediction, skip_prk_steps=skip_prk_steps)
    assert found == pytest.approx(2, abs=0.1)
    mixed = even_order(128, prediction, skip_prk_steps=skip_prk_steps, mix="output")
    assert mixed == pytest.approx(2 if prediction == "epsilon" else 1, abs=0.15)


def test_pndm_refuses_another_mix() -> None:
    with pytest.raises(ValueError, match="mix is 'eps'"):
        pndm_sample(fake_eps(), X, [1], LEVELS, mix="eps")
