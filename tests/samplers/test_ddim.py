"""DDIM against LDM's and diffusers' trajectories, and properties that need no reference."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from samplers.ddim import ddim_invert, ddim_sample, ddim_sigma, ddim_step
from samplers.guidance import classifier_free_guidance
from samplers.schedule import (
    StepInfo,
    clip_sample,
    ldm_timesteps,
    leading_timesteps,
    make_alphas_cumprod,
    make_betas,
    q_sample,
    step_levels,
    trailing_timesteps,
)
from tests.helpers.fake_denoiser import NoDoubleOnLatents, fake_eps, recorded_noise
from tests.helpers.goldens import load_golden, relative_error

LEVELS = make_alphas_cumprod(make_betas())
FIRST = float(LEVELS[0])


@pytest.mark.parametrize("case", ["ddim_eta0_10", "ddim_eta0_50", "ddim_eta1_10", "ddim_eta1_20"])
def test_ddim_sample_matches_diffusers(case: str) -> None:
    golden = load_golden("schedulers", case)
    noise = (lambda site, step, shape: golden["noise"][step]) if "noise" in golden.tensors else None
    timesteps = leading_timesteps(golden.meta["num_inference_steps"])
    seen = [golden["trajectory"][0]]
    ddim_sample(
        fake_eps(),
        seen[0],
        timesteps,
        LEVELS,
        eta=golden.meta["step_kwargs"]["eta"],
        final_alpha=FIRST,
        noise=noise,
        on_step=lambda info: seen.append(info.x),
    )
    assert torch.equal(timesteps, golden["timesteps"])
    assert relative_error(torch.stack(seen), golden["trajectory"]) < 1e-6


def test_ddim_step_matches_diffusers_trailing() -> None:
    """diffusers steps to t - T // N, not to the next timestep of its list: hence single steps here."""
    golden = load_golden("schedulers", "ddim_eta05_trailing_12")
    timesteps = trailing_timesteps(12)
    assert torch.equal(timesteps, golden["timesteps"])
    x, seen = golden["trajectory"][0], [golden["trajectory"][0]]
    for step, t in enumerate(timesteps.tolist()):
        a_prev = LEVELS[t - 1000 // 12] if t >= 1000 // 12 else LEVELS[0]
        x, _ = ddim_step(x, fake_eps()(x, t), LEVELS[t], a_prev, 0.5, golden["noise"][step])
        seen.append(x)
    assert relative_error(torch.stack(seen), golden["trajectory"]) < 1e-6


@pytest.mark.parametrize("case", ["ddim_10_eta0", "ddim_10_eta1_cfg", "ddim_20_eta1"])
def test_ddim_sample_matches_ldm(case: str) -> None:
    golden = load_golden("ldm_sampler", case)
    guided = classifier_free_guidance(fake_eps, golden["in.c"], golden["in.uc"], golden.meta["guidance"])
    xs, x0s = [golden["in.x_T"]], [golden["in.x_T"]]  # LDM logs the start as the first pred_x0

    def keep(info: StepInfo) -> None:
        xs.append(info.x)
        x0s.append(info.pred_x0)

    out = ddim_sample(
        guided,
        golden["in.x_T"],
        ldm_timesteps(golden.meta["S"]),
        LEVELS,
        eta=golden.meta["eta"],
        final_alpha=FIRST,
        noise=lambda site, step, shape: golden["noise"][step],
        on_step=keep,
    )
    assert relative_error(out, golden["out.x"]) < 1e-6
    assert relative_error(torch.stack(xs), golden["out.x_inter"]) < 1e-6
    assert relative_error(torch.stack(x0s), golden["out.pred_x0"]) < 1e-6


def test_ddim_sigma_matches_ldm() -> None:
    golden = load_golden("ldm_sampler", "tables")
    for num_steps in (10, 20, 50):
        for eta in (0.0, 1.0):
            steps = step_levels(ldm_timesteps(num_steps), LEVELS, FIRST)[::-1]
            sigmas = torch.tensor([ddim_sigma(a_t, a_prev, eta) for _, a_t, a_prev in steps]).double()
            # LDM's own levels are float32, which 1 - a / a_prev magnifies near a = 1
            reference = golden[f"N{num_steps}_eta{eta}.sigmas"]
            torch.testing.assert_close(sigmas, reference, rtol=0, atol=1e-6)


def _latent(seed: int) -> tuple[Tensor, Tensor]:
    x, noise = torch.randn(2, 2, 4, 5, 6, generator=torch.Generator().manual_seed(seed)).unbind(0)
    return x.double(), noise.double()


@given(st.integers(1, 60), st.integers(0, 2**31))
def test_ddim_with_true_noise_recovers_x0(num_steps: int, seed: int) -> None:
    x0, noise = _latent(seed)
    timesteps = leading_timesteps(num_steps)
    start = q_sample(x0, int(timesteps[0]), LEVELS, noise)
    out = ddim_sample(lambda x, t: noise, start, timesteps, LEVELS)
    torch.testing.assert_close(out, x0, rtol=0, atol=1e-9)


@given(st.integers(1, 20), st.floats(0.01, 1))
def test_ddim_with_a_perfect_denoiser_recovers_x0_through_its_noise(num_steps: int, eta: float) -> None:
    x0, noise = _latent(num_steps)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        return (x - LEVELS[t].sqrt() * x0) / (1 - LEVELS[t]).sqrt()

    timesteps = leading_timesteps(num_steps)
    start = q_sample(x0, int(timesteps[0]), LEVELS, noise)
    generator = torch.Generator().manual_seed(1)
    out = ddim_sample(denoise, start, timesteps, LEVELS, eta=eta, generator=generator)
    torch.testing.assert_close(out, x0, rtol=0, atol=1e-9)


def test_ddim_eta0_draws_no_noise() -> None:
    x, _ = _latent(0)
    generator = torch.Generator().manual_seed(3)
    state = generator.get_state()
    ddim_sample(fake_eps(), x, leading_timesteps(7), LEVELS, generator=generator)
    assert torch.equal(generator.get_state(), state)


def test_ddim_asks_for_noise_at_its_documented_sites_only() -> None:
    x, _ = _latent(0)
    for final_alpha, steps in ((1.0, 6), (FIRST, 7)):  # a step into level 1 adds no noise
        asked, noise = recorded_noise()
        ddim_sample(
            fake_eps(), x, leading_timesteps(7), LEVELS, eta=0.3, final_alpha=final_alpha, noise=noise
        )
        assert asked == [("step", i, tuple(x.shape)) for i in range(steps)]


def test_ddim_step_of_eta_1_keeps_unit_variance() -> None:
    """Moments of one step under eps = sqrt(1 - a) x, which is exact for unit-variance data, follow eq. 12."""
    x = torch.randn(1, 1, 400, 400, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(1, 1, 400, 400, generator=torch.Generator().manual_seed(1))
    for _, a_t, a_prev in step_levels(leading_timesteps(5), LEVELS, FIRST):
        x_prev, _ = ddim_step(x, (1 - a_t) ** 0.5 * x, a_t, a_prev, 1.0, noise)
        signal = (a_prev * a_t) ** 0.5 + (1 - a_prev - ddim_sigma(a_t, a_prev, 1.0) ** 2) ** 0.5 * (
            1 - a_t
        ) ** 0.5
        expected = (signal**2 + ddim_sigma(a_t, a_prev, 1.0) ** 2) ** 0.5
        assert x_prev.std().item() == pytest.approx(expected, rel=0.01)


def test_ddim_inverts_itself_with_eta_0() -> None:
    x, eps = _latent(5)
    there, _ = ddim_step(x, eps, 0.4, 0.9)
    back, _ = ddim_step(there, eps, 0.9, 0.4)
    torch.testing.assert_close(back, x)


def test_ddim_step_of_a_clean_latent_changes_nothing() -> None:
    x, eps = _latent(6)
    for eta in (0.0, 1.0):
        assert torch.equal(ddim_step(x, eps, 1.0, 1.0, eta)[0], x)


@pytest.mark.parametrize(
    "a_t, a_prev, eta, noise, message",
    [
        (0.4, 0.9, 1.5, None, "eta"),
        (0.4, 0.9, -0.1, None, "eta"),
        (0.9, 0.4, 0.5, None, "noisier"),
        (0.0, 0.4, 0.0, None, "a_t"),
        (0.4, 0.9, 1.0, None, "noise is None"),
    ],
)
def test_ddim_step_refuses_what_has_no_meaning(
    a_t: float, a_prev: float, eta: float, noise: None, message: str
) -> None:
    x, eps = _latent(0)
    with pytest.raises(ValueError, match=message):
        ddim_step(x, eps, a_t, a_prev, eta, noise)


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.bfloat16, 0.03), (torch.float16, 4e-3), (torch.float32, 1e-5)]
)
def test_ddim_works_in_low_precision(dtype: torch.dtype, tolerance: float) -> None:
    x, _ = _latent(2)
    timesteps = leading_timesteps(10)

    def run(x: Tensor) -> Tensor:
        return ddim_sample(
            fake_eps(), x, timesteps, LEVELS, eta=1.0, generator=torch.Generator().manual_seed(0)
        )

    with NoDoubleOnLatents(dtype):
        out = run(x.to(dtype))
    assert out.dtype == dtype
    assert relative_error(out.double(), run(x)) < tolerance


def test_ddim_reports_every_step_and_hands_the_denoiser_a_scalar_timestep() -> None:
    x, _ = _latent(0)
    infos: list[StepInfo] = []
    told: list[Tensor] = []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        told.append(t)
        return fake_eps()(x, t)

    out = ddim_sample(denoise, x, [601, 301, 1], LEVELS, on_step=infos.append)
    assert [(i.step, i.total, i.t) for i in infos] == [(0, 3, 601), (1, 3, 301), (2, 3, 1)]
    assert torch.equal(infos[-1].x, out) and torch.equal(infos[-1].pred_x0, out)
    assert all(t.dtype == torch.int64 and t.dim() == 0 for t in told)


def test_ddim_limits_the_clean_latent_and_rederives_the_noise_where_asked() -> None:
    x, eps = torch.randn(2, 1, 4, 6, 5, generator=torch.Generator().manual_seed(4)).double().unbind(0)
    a_t, a_prev, limit = 0.3, 0.6, clip_sample(0.7)
    pred = limit((x - 0.7**0.5 * eps) / 0.3**0.5)
    for rederived, direction in ((False, eps), (True, (x - 0.3**0.5 * pred) / 0.7**0.5)):
        x_prev, pred_x0 = ddim_step(x, eps, a_t, a_prev, limit=limit, use_clipped_model_output=rederived)
        torch.testing.assert_close(pred_x0, pred)
        torch.testing.assert_close(x_prev, 0.6**0.5 * pred + 0.4**0.5 * direction)
    infos: list[StepInfo] = []
    ddim_sample(fake_eps(), 3 * x, leading_timesteps(5), LEVELS, limit=limit, on_step=infos.append)
    assert all(info.pred_x0.abs().max() <= 0.7 for info in infos)


def test_ddim_invert_leads_to_the_noise_that_leads_back() -> None:
    """The better the more steps: both ways take a step by what the net says at one of its ends."""
    x0 = torch.randn(1, 4, 6, 5, generator=torch.Generator().manual_seed(5)).double()
    errors = []
    for num_steps in (50, 100, 200):
        timesteps = leading_timesteps(num_steps)
        infos: list[StepInfo] = []
        noise = ddim_invert(
            fake_eps(), x0, timesteps.flip(0), LEVELS, start_alpha=FIRST, on_step=infos.append
        )
        assert [info.t for info in infos] == timesteps.flip(0).tolist() and torch.equal(infos[-1].x, noise)
        back = ddim_sample(fake_eps(), noise, timesteps, LEVELS, final_alpha=FIRST)
        errors.append(relative_error(back, x0))
    assert errors[0] < 0.2 and errors[1] < 0.6 * errors[0] and errors[2] < 0.6 * errors[1]


def test_ddim_invert_of_a_perfect_denoiser_adds_its_noise() -> None:
    x0, eps = torch.randn(2, 1, 4, 6, 5, generator=torch.Generator().manual_seed(6)).double().unbind(0)
    timesteps = leading_timesteps(7).flip(0)
    a = float(LEVELS[timesteps[-1]])
    for prediction in ("epsilon", "v_prediction"):
        levels = iter([1.0, *LEVELS[timesteps].tolist()])

        def answer(x: torch.Tensor, t: torch.Tensor, kind: str = prediction, levels=levels) -> torch.Tensor:
            own = next(levels)
            return eps if kind == "epsilon" else own**0.5 * eps - (1 - own) ** 0.5 * x0

        out = ddim_invert(answer, x0, timesteps, LEVELS, prediction=prediction)
        torch.testing.assert_close(out, a**0.5 * x0 + (1 - a) ** 0.5 * eps, rtol=0, atol=1e-12)


def test_ddim_invert_refuses_falling_timesteps() -> None:
    with pytest.raises(ValueError, match="strictly"):
        ddim_invert(fake_eps(), torch.zeros(1, 4, 2, 2), [21, 1], LEVELS)
    with pytest.raises(ValueError, match="final_alpha"):
        ddim_invert(fake_eps(), torch.zeros(1, 4, 2, 2), [1, 21], LEVELS, start_alpha=0.5)
