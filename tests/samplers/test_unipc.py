"""UniPC against diffusers' trajectories; its orders of accuracy, and where the formulas are singular."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from samplers.ddim import ddim_sample
from samplers.schedule import (
    StepInfo,
    clip_sample,
    diffusers_leading_timesteps,
    karras_steps,
    leading_timesteps,
    linspace_timesteps,
    make_alphas_cumprod,
    make_betas,
    rescale_zero_terminal_snr,
    v_prediction,
)
from samplers.unipc import unipc_sample, unipc_step
from tests.helpers.fake_denoiser import NoDoubleOnLatents, fake_eps
from tests.helpers.gaussian import START, convergence_order, gaussian_eps, gaussian_flow, perfect
from tests.helpers.goldens import load_golden, relative_error

LEVELS = make_alphas_cumprod(make_betas())
X, NOISE = torch.randn(2, 1, 4, 6, 5, generator=torch.Generator().manual_seed(0)).double().unbind(0)
VARIANTS = st.sampled_from(["bh1", "bh2"])


@pytest.mark.parametrize("case", ["unipc_10", "unipc_20", "unipc_20_diffusers029", "unipc_leading_20"])
def test_unipc_sample_matches_diffusers(case: str) -> None:
    golden = load_golden("schedulers", case)
    steps = golden.meta["num_inference_steps"]
    if "leading" in case:  # diffusers' multistep schedulers step by T // (N + 1) there
        timesteps = diffusers_leading_timesteps(steps, drop_zero=True)
    else:
        timesteps = linspace_timesteps(steps, drop_zero=True)
    seen = [golden["trajectory"][0]]
    unipc_sample(fake_eps(), seen[0], timesteps, LEVELS, on_step=lambda info: seen.append(info.x))
    assert torch.equal(timesteps, golden["timesteps"])
    assert relative_error(torch.stack(seen), golden["trajectory"]) < 1e-5


@pytest.mark.parametrize("variant", ["bh1", "bh2"])
def test_unipc_converges_as_the_paper_says(variant: str) -> None:
    """UniP-p with order p, UniPC-p with p + 1, unless the low orders of the first and last steps show."""

    def order_of(order: int, corrector: bool, lower_order_final: bool) -> float:
        return convergence_order(
            unipc_sample,
            128,
            order=order,
            variant=variant,
            corrector=corrector,
            lower_order_final=lower_order_final,
        )

    assert order_of(1, False, False) == pytest.approx(1, abs=0.1)
    assert order_of(1, True, False) == pytest.approx(2, abs=0.1)
    assert order_of(2, False, False) == pytest.approx(2, abs=0.1)
    assert order_of(2, True, False) == pytest.approx(3, abs=0.1)
    assert order_of(2, True, True) == pytest.approx(2, abs=0.1)  # its last step is DDIM's, uncorrected
    assert order_of(3, True, False) > 2.9


@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_step_errs_by_its_order_from_an_exact_history(order: int, variant: str) -> None:
    """One step of length h off by h^(p+1), corrected by h^(p+2)."""
    errors = []
    for h in (0.025, 0.0125):
        levels = [1 / (1 + math.exp(2.4 - 2 * h * k)) for k in (0, 0.9, 2, 2.8, 3.8)]  # lambda from -1.2 up
        exact = [gaussian_flow(START, levels[0], a) for a in levels]
        history: tuple[Tensor, ...] = ()
        predicted = START
        for x, a_t, a_prev in zip(exact[:3], levels[:3], levels[1:4], strict=True):
            eps = gaussian_eps(x, a_t)
            predicted, _, history = unipc_step(
                x, eps, a_t, a_prev, history, order=order, variant=variant, corrector=False
            )
        # The corrector takes the prediction at the exact point: whatever error is left is its own.
        eps = gaussian_eps(exact[3], levels[3])
        corrected = unipc_step(exact[3], eps, levels[3], levels[4], history, variant=variant)[2][1]
        errors.append([(e - exact[3]).abs().max().item() for e in (predicted, corrected)])
    orders = [math.log2(a / b) for a, b in zip(*errors, strict=True)]
    assert orders[0] == pytest.approx(order + 1, abs=0.2)
    assert orders[1] == pytest.approx(order + 2, abs=0.2)


@given(st.integers(1, 30), st.booleans())
def test_unipc_of_order_1_without_corrector_is_ddim(num_steps: int, into_clean: bool) -> None:
    timesteps = linspace_timesteps(num_steps, drop_zero=True)
    final = 1.0 if into_clean else float(LEVELS[0])
    out = unipc_sample(fake_eps(), X, timesteps, LEVELS, order=1, corrector=False, final_alpha=final)
    ref = ddim_sample(fake_eps(), X, timesteps, LEVELS, final_alpha=final)
    torch.testing.assert_close(out, ref, rtol=0, atol=1e-10)


@given(st.integers(1, 30), st.integers(1, 3), VARIANTS, st.booleans(), st.booleans())
def test_unipc_with_a_perfect_denoiser_recovers_x0(
    num_steps: int, order: int, variant: str, corrector: bool, lower: bool
) -> None:
    out = unipc_sample(
        perfect(X, LEVELS),
        NOISE,
        linspace_timesteps(num_steps, drop_zero=True),
        LEVELS,
        order=order,
        variant=variant,
        corrector=corrector,
        lower_order_final=lower,
    )
    torch.testing.assert_close(out, X, rtol=0, atol=1e-9)


@given(st.integers(1, 5), st.integers(1, 3), VARIANTS, st.booleans())
def test_unipc_into_level_1_ends_on_the_last_prediction(
    num_steps: int, order: int, variant: str, lower: bool
) -> None:
    """Even for order 3 with bh1, where the reference's last step is infinity times zero."""
    infos: list[StepInfo] = []
    out = unipc_sample(
        fake_eps(),
        X,
        linspace_timesteps(num_steps, drop_zero=True),
        LEVELS,
        order=order,
        variant=variant,
        lower_order_final=lower,
        on_step=infos.append,
    )
    assert bool(out.isfinite().all()) and torch.equal(out, infos[-1].pred_x0)


@pytest.mark.parametrize("lower", [False, True])
def test_unipc_with_a_last_step_of_no_length_stays_where_it_is(lower: bool) -> None:
    """timesteps that end at 0, and final_alpha its level: h = 0, by which the ratios are divided."""
    infos: list[StepInfo] = []
    unipc_sample(
        fake_eps(),
        X,
        [999, 500, 200, 0],
        LEVELS,
        order=3,
        corrector=False,
        lower_order_final=lower,
        final_alpha=float(LEVELS[0]),
        on_step=infos.append,
    )
    torch.testing.assert_close(infos[-1].x, infos[-2].x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
def test_unipc_starts_from_a_clamped_zero_terminal_snr(dtype: torch.dtype, variant: str) -> None:
    levels = make_alphas_cumprod(rescale_zero_terminal_snr(make_betas())).clamp(min=2**-24)
    denoise = v_prediction(lambda x, t: -0.5 * x, levels)
    for num_steps in (1, 2, 3, 20):
        for order in (1, 2, 3):
            timesteps = linspace_timesteps(num_steps, drop_zero=True)
            x = X.to(dtype)
            out = unipc_sample(denoise, x, timesteps, levels, order=order, variant=variant)
            assert out.dtype == dtype and bool(out.isfinite().all()) and out.abs().max() < 10


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.bfloat16, 0.03), (torch.float16, 4e-3), (torch.float32, 1e-5)]
)
def test_unipc_works_in_low_precision(dtype: torch.dtype, tolerance: float) -> None:
    timesteps = linspace_timesteps(10, drop_zero=True)
    with NoDoubleOnLatents(dtype):
        out = unipc_sample(fake_eps(), X.to(dtype), timesteps, LEVELS)
    assert out.dtype == dtype
    assert relative_error(out.double(), unipc_sample(fake_eps(), X, timesteps, LEVELS)) < tolerance


def test_unipc_keeps_its_history_in_float32_and_no_longer_than_its_order() -> None:
    history: tuple[Tensor, ...] = ()
    for a_t, a_prev, kept in ((0.1, 0.3, 1), (0.3, 0.5, 2), (0.5, 0.7, 3), (0.7, 0.9, 3), (0.9, 1.0, 1)):
        _, _, history = unipc_step(X.half(), NOISE.half(), a_t, a_prev, history, order=3)
        assert [h.dtype for h in history] == [torch.float64] + [torch.float32] * (1 + kept)
        assert history[0].tolist()[0] == a_t and len(history[0]) == kept


def test_unipc_draws_no_noise_and_reports_every_step() -> None:
    generator = torch.Generator().manual_seed(3)
    state = generator.get_state()
    infos: list[StepInfo] = []
    told: list[Tensor] = []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        told.append(t)
        return fake_eps()(x, t)

    out = unipc_sample(denoise, X, [601, 301, 1], LEVELS, generator=generator, on_step=infos.append)
    assert torch.equal(generator.get_state(), state)
    assert [(i.step, i.total, i.t) for i in infos] == [(0, 3, 601), (1, 3, 301), (2, 3, 1)]
    assert torch.equal(infos[-1].x, out)
    assert all(t.dtype == torch.int64 and t.dim() == 0 for t in told)


def test_unipc_refuses_what_has_no_meaning() -> None:
    for order in (0, 4):
        with pytest.raises(ValueError, match=f"order {order}"):
            unipc_step(X, NOISE, 0.4, 0.9, order=order)
    with pytest.raises(ValueError, match="'vary'"):
        unipc_step(X, NOISE, 0.4, 0.9, variant="vary")
    for level in (0.0, 1.0):
        with pytest.raises(ValueError, match="level"):
            unipc_step(X, NOISE, level, 1.0)
    with pytest.raises(ValueError, match="both"):
        unipc_sample(
            fake_eps(),
            X,
            leading_timesteps(2),
            LEVELS,
            noise=lambda *_: NOISE,
            generator=torch.Generator(),
        )


@given(st.integers(1, 20), st.integers(1, 3), VARIANTS)
def test_unipc_with_karras_sigmas_and_a_perfect_denoiser_recovers_x0(
    num_steps: int, order: int, variant: str
) -> None:
    """Told the latent's own level, which is only near that of the timestep."""
    _, levels = karras_steps(num_steps, LEVELS)
    out = unipc_sample(
        perfect(X, levels),
        NOISE,
        torch.arange(num_steps),
        LEVELS,
        levels=levels,
        order=order,
        variant=variant,
    )
    torch.testing.assert_close(out, X, rtol=0, atol=1e-8)


def test_unipc_limits_what_it_predicts() -> None:
    infos: list[StepInfo] = []
    unipc_sample(
        fake_eps(), 3 * X, leading_timesteps(8), LEVELS, limit=clip_sample(0.5), on_step=infos.append
    )
    assert all(info.pred_x0.abs().max() <= 0.5 for info in infos)
