"""Schedules, spacings and the forward process: definitions, and LDM's and diffusers' tables."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from samplers.euler import euler_sample
from samplers.schedule import (
    PREDICTIONS,
    beta_quantiles,
    beta_sigmas,
    clip_sample,
    diffusers_leading_timesteps,
    dynamic_threshold,
    eps_from_velocity,
    exponential_sigmas,
    half_log_snr,
    incomplete_beta,
    karras_sigmas,
    karras_steps,
    ldm_start_timesteps,
    ldm_timesteps,
    leading_timesteps,
    lift_zero_level,
    linspace_timesteps,
    make_alphas_cumprod,
    make_betas,
    noise_source,
    predict_x0,
    q_sample,
    q_sample_between,
    rescale_zero_terminal_snr,
    sigma_range,
    sigma_steps,
    solver_steps,
    start_timesteps,
    step_levels,
    to_eps,
    trailing_timesteps,
    training_target,
    v_prediction,
    velocity,
)
from tests.helpers.goldens import load_golden, relative_error

LEVELS = make_alphas_cumprod(make_betas())
SPACINGS = [leading_timesteps, linspace_timesteps, trailing_timesteps]


def test_betas_match_ldm_and_diffusers() -> None:
    ldm, hub = load_golden("ldm_sampler", "tables"), load_golden("schedulers", "tables")
    assert relative_error(make_betas(), ldm["betas_float64"]) < 1e-12
    assert relative_error(make_betas(), hub["betas"]) < 1e-6
    assert relative_error(LEVELS, ldm["alphas_cumprod_float32"]) < 1e-6
    assert relative_error(LEVELS, hub["alphas_cumprod"]) < 1e-6
    assert LEVELS[0].item() == pytest.approx(hub["final_alpha_cumprod"].item(), rel=1e-6)


def test_betas_linear_ends_where_asked_and_unknown_name_is_refused() -> None:
    betas = make_betas("linear", beta_start=1e-4, beta_end=0.02)
    assert betas.dtype == torch.float64
    torch.testing.assert_close(betas[[0, 1, -1]], torch.tensor([1e-4, 1e-4 + 0.0199 / 999, 0.02]).double())
    with pytest.raises(ValueError, match="cosine"):
        make_betas("cosine")


@given(st.sampled_from(SPACINGS), st.integers(1, 1000))
@example(leading_timesteps, 1000)
@example(trailing_timesteps, 1000)
@example(linspace_timesteps, 1)
def test_spacings_give_exactly_the_steps_asked_for(spacing, num_steps: int) -> None:
    timesteps = spacing(num_steps)
    assert timesteps.dtype == torch.int64 and len(timesteps) == num_steps
    assert timesteps[-1] >= 0 and timesteps[0] <= 999 and bool((timesteps.diff() < 0).all())
    assert timesteps[0] >= 999 - 1000 / num_steps  # never starts late


@pytest.mark.parametrize("drop_zero", [False, True])
def test_linspace_timesteps_are_numpys_for_every_count(drop_zero: bool) -> None:
    for num_steps in range(2, 1000):
        points = np.linspace(0, 999, num_steps + drop_zero).round()[::-1][:num_steps]
        assert linspace_timesteps(num_steps, drop_zero=drop_zero).tolist() == points.tolist()


def test_spacings_refuse_impossible_counts() -> None:
    for spacing in [*SPACINGS, ldm_timesteps]:
        for num_steps in (0, 1001):
            with pytest.raises(ValueError, match="num_steps"):
                spacing(num_steps)
    assert linspace_timesteps(999, drop_zero=True)[-1] == 1
    with pytest.raises(ValueError, match="999"):
        linspace_timesteps(1000, drop_zero=True)


@pytest.mark.parametrize(
    "case, spacing",
    [
        ("ddim_leading", leading_timesteps),
        ("ddpm_leading", leading_timesteps),
        ("euler_leading", leading_timesteps),
        ("ddim_trailing", trailing_timesteps),
        ("ddim_linspace", linspace_timesteps),
        ("unipc_sd15json", lambda n: linspace_timesteps(n, drop_zero=True)),
        ("dpmpp2m_sd15json", lambda n: linspace_timesteps(n, drop_zero=True)),
    ],
)
def test_spacings_match_diffusers(case: str, spacing) -> None:
    for num_steps, expected in load_golden("schedulers", "tables").meta["timesteps"][case].items():
        assert spacing(int(num_steps)).tolist() == expected, f"{case} {num_steps}"


def test_ldm_timesteps_match_ldm() -> None:
    table = load_golden("ldm_sampler", "tables").meta["ddim_timesteps_uniform"]
    for num_steps, ascending in table.items():
        assert ldm_timesteps(int(num_steps)).tolist() == ascending[::-1]
    assert len(ldm_timesteps(30)) == 31
    assert ldm_timesteps(9)[0] == 889  # LDM's own table goes on to 1000, which no schedule holds


@given(st.integers(1, 1000))
def test_ldm_timesteps_stay_in_the_table(num_steps: int) -> None:
    timesteps = ldm_timesteps(num_steps)
    assert timesteps[-1] == 1 and timesteps[0] <= 999 and bool((timesteps.diff() < 0).all())


def test_step_levels_match_ldm_alphas() -> None:
    golden = load_golden("ldm_sampler", "tables")
    for num_steps in (10, 20, 50):
        steps = step_levels(ldm_timesteps(num_steps), LEVELS, float(LEVELS[0]))[::-1]
        assert relative_error(torch.tensor([s[1] for s in steps]), golden[f"N{num_steps}.alphas"]) < 1e-6
        assert relative_error(torch.tensor([s[2] for s in steps]), golden[f"N{num_steps}.alphas_prev"]) < 1e-6


@pytest.mark.parametrize("timesteps", [[1, 21], [21, 21], [1000, 1], [21, -1]])
def test_step_levels_refuses_timesteps_that_do_not_fall_inside_the_table(timesteps: list[int]) -> None:
    with pytest.raises(ValueError, match="timesteps"):
        step_levels(timesteps, LEVELS)


def test_step_levels_refuses_a_final_level_noisier_than_the_last_step() -> None:
    with pytest.raises(ValueError, match="final_alpha"):
        step_levels([41, 21], LEVELS, float(LEVELS[22]))


@pytest.mark.parametrize(
    "fraction, count, first", [(0.4, 20, 381), (0.25, 13, 241), (1.0, 50, 981), (1e-9, 1, 1)]
)
def test_start_timesteps_counts(fraction: float, count: int, first: int) -> None:
    kept = start_timesteps(leading_timesteps(50), fraction)
    assert (len(kept), kept[0].item(), kept[-1].item()) == (count, first, 1)


def test_start_timesteps_forgives_float_rounding() -> None:
    assert start_timesteps(torch.tensor([200, 100, 1]), 1 - 0.9).tolist() == [100, 1]


@given(st.integers(1, 1000), st.floats(0, 1, exclude_min=True))
def test_start_timesteps_keeps_the_clean_end(num_steps: int, fraction: float) -> None:
    timesteps = leading_timesteps(num_steps)
    for kept in (start_timesteps(timesteps, fraction), ldm_start_timesteps(timesteps, fraction)):
        assert len(kept) >= 1 and kept.tolist() == timesteps[-len(kept) :].tolist()


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.01, math.nan])
def test_start_timesteps_refuses_fractions_outside_0_to_1(fraction: float) -> None:
    for start in (start_timesteps, ldm_start_timesteps):
        with pytest.raises(ValueError, match="fraction"):
            start(leading_timesteps(50), fraction)


def test_ldm_start_timesteps_truncates_as_the_official_code() -> None:
    timesteps = ldm_timesteps(100)
    counts = [len(ldm_start_timesteps(timesteps, f)) for f in (0.4, 0.25, 0.29, 0.57, 0.001)]
    assert counts == [40, 25, 28, 56, 1]  # 29 and 57 lose a step to truncation; 0.001 crashes there


def test_q_sample_and_velocity_match_diffusers() -> None:
    golden = load_golden("schedulers", "tables")
    x, noise, t = golden["add_noise.x"], golden["add_noise.noise"], golden["add_noise.t"]
    assert relative_error(q_sample(x, t, LEVELS, noise), golden["add_noise.out"]) < 1e-6
    assert relative_error(velocity(x, noise, t, LEVELS), golden["velocity.out"]) < 1e-6
    one_by_one = torch.cat(
        [q_sample(x[i : i + 1], int(t[i]), LEVELS, noise[i : i + 1]) for i in range(len(t))]
    )
    torch.testing.assert_close(one_by_one, q_sample(x, t, LEVELS, noise), rtol=0, atol=0)


def _pair(seed: int, *, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, noise = torch.randn(2, 3, 4, 5, 6, generator=generator).unbind(0)
    return x.to(dtype), noise


@given(st.integers(0, 999))
def test_q_sample_between_from_a_clean_latent_is_q_sample(t: int) -> None:
    x, noise = _pair(t)
    torch.testing.assert_close(q_sample_between(x, 1.0, LEVELS[t], noise), q_sample(x, t, LEVELS, noise))


@given(st.floats(0.01, 1), st.floats(0.01, 1), st.floats(0.01, 1))
def test_q_sample_between_keeps_mean_and_variance_on_the_schedule(a: float, b: float, c: float) -> None:
    """Two hops have the signal and noise power of one: the Markov form (lucidrains' RePaint had another)."""
    a, b, c = sorted((a, b, c), reverse=True)
    one, zero = torch.ones(1, 1, 1, 1).double(), torch.zeros(1, 1, 1, 1).double()
    signal = q_sample_between(q_sample_between(one, a, b, zero), b, c, zero)
    first = q_sample_between(q_sample_between(zero, a, b, one), b, c, zero)
    second = q_sample_between(q_sample_between(zero, a, b, zero), b, c, one)
    assert signal.item() == pytest.approx(math.sqrt(c / a))
    assert (first**2 + second**2).item() == pytest.approx(1 - c / a, abs=1e-12)


@pytest.mark.parametrize("a_from, a_to", [(0.2, 0.3), (1.1, 0.5), (0.5, -0.1), (0.0, 0.0)])
def test_q_sample_between_refuses_to_remove_noise(a_from: float, a_to: float) -> None:
    x, noise = _pair(0)
    with pytest.raises(ValueError, match="level"):
        q_sample_between(x, a_from, a_to, noise)


@given(st.integers(0, 999))
def test_predict_x0_undoes_q_sample(t: int) -> None:
    x, noise = _pair(t)
    noised = q_sample(x, t, LEVELS, noise)
    torch.testing.assert_close(predict_x0(noised, noise.double(), float(LEVELS[t])), x, rtol=0, atol=1e-10)


@given(st.integers(0, 999))
def test_v_prediction_recovers_the_noise(t: int) -> None:
    x, noise = _pair(t)
    noised = q_sample(x, t, LEVELS, noise)
    denoise = v_prediction(lambda _, at: velocity(x, noise, at, LEVELS), LEVELS)
    torch.testing.assert_close(denoise(noised, torch.tensor(t)), noise.double())
    per_sample = torch.full((x.shape[0],), t)
    v = velocity(x, noise, per_sample, LEVELS)
    torch.testing.assert_close(eps_from_velocity(v, noised, per_sample, LEVELS), noise.double())


def test_rescaled_betas_have_zero_terminal_snr_and_the_same_start() -> None:
    levels = make_alphas_cumprod(rescale_zero_terminal_snr(make_betas()))
    assert levels[-1] == 0 and bool((levels.diff() < 0).all())
    assert levels[0].item() == pytest.approx(LEVELS[0].item())
    roots, before = levels.sqrt(), LEVELS.sqrt()
    torch.testing.assert_close(
        roots.diff() / roots.diff()[0], before.diff() / before.diff()[0]
    )  # affine in sqrt
    with pytest.raises(ValueError, match="2\\*\\*-24"):
        predict_x0(*_pair(0), float(levels[-1]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_forward_process_keeps_the_latents_dtype_and_rounds_once(dtype: torch.dtype) -> None:
    x, noise = _pair(3, dtype=dtype)
    exact = q_sample(x.double(), 500, LEVELS, noise)
    for out in (q_sample(x, 500, LEVELS, noise), q_sample_between(x, 1.0, LEVELS[500], noise)):
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), exact, rtol=torch.finfo(dtype).eps + 1e-6, atol=1e-6)


def test_noise_source_from_a_generator_is_float32_and_repeatable() -> None:
    draws = [noise_source(None, torch.Generator().manual_seed(7))("step", 0, (2, 3)) for _ in range(2)]
    assert draws[0].dtype == torch.float32 and torch.equal(*draws)
    assert torch.equal(draws[0], torch.randn(2, 3, generator=torch.Generator().manual_seed(7)))


def test_noise_source_refuses_two_sources_none_and_wrong_shapes() -> None:
    with pytest.raises(ValueError, match="both"):
        noise_source(lambda *_: torch.zeros(1), torch.Generator())
    with pytest.raises(ValueError, match="generator="):
        noise_source(None, None)("step", 3, (1,))
    with pytest.raises(ValueError, match="asked for"):
        noise_source(lambda *_: torch.zeros(1, 2), None)("step", 3, (2, 2))


def test_solver_steps_are_step_levels_at_whole_timesteps() -> None:
    for spacing in SPACINGS:
        for final_alpha in (1.0, float(LEVELS[0])):
            steps = solver_steps(spacing(20).float(), LEVELS, final_alpha)
            assert steps == step_levels(spacing(20), LEVELS, final_alpha)
            assert all(isinstance(t, int) for t, _, _ in steps)


def test_solver_steps_between_timesteps_have_sigmas_on_a_line() -> None:
    sigmas = ((1 - LEVELS) / LEVELS).sqrt()
    steps = solver_steps([999, 946.25, 0.5], LEVELS)
    assert [t for t, _, _ in steps] == [999, 946.25, 0.5]
    expected = [sigmas[999], 0.75 * sigmas[946] + 0.25 * sigmas[947], (sigmas[0] + sigmas[1]) / 2]
    for (_, a_t, _), sigma in zip(steps, expected, strict=True):
        assert math.sqrt((1 - a_t) / a_t) == pytest.approx(sigma.item(), rel=1e-12)


@pytest.mark.parametrize(
    "timesteps, levels, message",
    [
        ([999.5, 1], None, "0..999"),
        ([21, -0.5], None, "0..999"),
        ([1, 21], None, "rising"),
        ([21, 21], None, "rising"),
        ([21, 1], [0.5], "as many"),
        ([21, 1], [0.5, 0.5], "rising"),
        ([21, 1], [math.nan, math.nan], "rising"),
        ([21, 1], [0.5, 1.1], "final_alpha"),
    ],
)
def test_solver_steps_refuses_levels_that_do_not_rise(
    timesteps: list[float], levels: list[float] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        solver_steps(timesteps, LEVELS, levels=levels)


@given(st.integers(1, 1000))
def test_karras_steps_span_the_table_evenly_in_the_seventh_root_of_sigma(num_steps: int) -> None:
    timesteps, levels = karras_steps(num_steps, LEVELS)
    assert timesteps.dtype == torch.int64 and levels.dtype == torch.float64 and len(levels) == num_steps
    assert timesteps[0] == 999 and bool((timesteps.diff() <= 0).all())
    solver_steps(timesteps, LEVELS, float(LEVELS[0]), levels)  # rise strictly, inside the table
    # the timestep told is the nearest: its neighbours' levels enclose the latent's
    assert bool((LEVELS[(timesteps + 1).clamp(max=999)] <= levels + 1e-12).all())
    assert bool((LEVELS[(timesteps - 1).clamp(min=0)] >= levels - 1e-12).all())
    if num_steps > 2:
        roots = ((1 - levels) / levels) ** (1 / 14)
        torch.testing.assert_close(roots.diff(), roots.diff()[:1].expand(num_steps - 1), rtol=1e-6, atol=1e-9)
        assert (timesteps[-1], levels[-1].item()) == (0, pytest.approx(LEVELS[0].item(), rel=1e-12))


def test_karras_levels_stay_in_the_table_whatever_the_rounding() -> None:
    """A root and its power need not give back the table's ends: with these betas the last would exceed it."""
    levels = make_alphas_cumprod(make_betas("linear", beta_start=1e-4, beta_end=0.02))
    timesteps, rising = karras_steps(8, levels)
    steps = solver_steps(timesteps, levels, float(levels[0]), rising)
    assert steps[-1][1] == steps[-1][2] == float(levels[0])


def test_karras_sigmas_match_diffusers() -> None:
    golden = load_golden("schedulers", "dpmpp2m_karras_12")
    timesteps, levels = karras_steps(12, LEVELS)
    assert torch.equal(timesteps, golden["timesteps"])
    assert relative_error(((1 - levels) / levels).sqrt(), golden["sigmas"][:-1]) < 1e-6


def test_half_log_snr_is_0_where_signal_and_noise_are_even() -> None:
    assert half_log_snr(0.5) == 0
    assert half_log_snr(0.2) == pytest.approx(math.log(0.2 / 0.8) / 2)
    for level in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="level"):
            half_log_snr(level)


def test_cosine_betas_give_the_papers_levels() -> None:
    """Nichol and Dhariwal, eq. 17: levels are cos^2 over its start, but where a beta would exceed 0.999."""
    betas = make_betas("squaredcos_cap_v2")
    assert betas.dtype == torch.float64 and len(betas) == 1000
    root = math.cos(0.008 / 1.008 * math.pi / 2)
    t = (torch.arange(1, 1000, dtype=torch.float64) / 1000 + 0.008) / 1.008 * math.pi / 2
    torch.testing.assert_close(make_alphas_cumprod(betas)[:-1], (t.cos() / root) ** 2, rtol=1e-9, atol=0)
    assert betas[-1] == 0.999 and betas[-2] < 0.999


@given(st.integers(1, 499), st.booleans())
def test_diffusers_leading_steps_by_whole_strides(num_steps: int, drop_zero: bool) -> None:
    timesteps = diffusers_leading_timesteps(num_steps, drop_zero=drop_zero)
    assert len(timesteps) == num_steps and timesteps[0] <= 999
    stride = 1000 // (num_steps + drop_zero)
    assert timesteps[-1] == stride * drop_zero + 1 and bool((timesteps.diff() == -stride).all())


def test_diffusers_leading_and_ours_differ_where_the_stride_is_no_whole_number() -> None:
    for num_steps in (1, 8, 20, 50, 250, 1000):
        assert torch.equal(diffusers_leading_timesteps(num_steps), leading_timesteps(num_steps))
    assert (diffusers_leading_timesteps(30)[0], leading_timesteps(30)[0]) == (958, 967)
    assert diffusers_leading_timesteps(20, drop_zero=True)[0] == 941


def test_linspace_unrounded_is_diffusers_eulers() -> None:
    timesteps = linspace_timesteps(20, rounded=False)
    torch.testing.assert_close(timesteps, torch.linspace(999, 0, 20, dtype=torch.float64))
    assert torch.equal(timesteps.round().long(), linspace_timesteps(20))
    assert linspace_timesteps(1, rounded=False).tolist() == [999.0]


# ---- sigma spacings ----------------------------------------------------------------------------------------

SPACED = [karras_sigmas, exponential_sigmas, beta_sigmas]


@given(st.sampled_from(SPACED), st.integers(1, 60), st.floats(0.001, 1), st.floats(1.5, 1000))
def test_sigmas_fall_strictly_between_the_ends_asked_for(
    spaced, num_steps: int, low: float, high: float
) -> None:
    sigmas = spaced(num_steps, low, high)
    assert sigmas.dtype == torch.float64 and len(sigmas) == num_steps
    assert sigmas[0] == high and (num_steps == 1 or sigmas[-1] == low)
    assert bool((sigmas.diff() < 0).all())


def test_sigmas_are_even_in_what_they_say() -> None:
    for rho in (1.0, 3.0, 7.0):
        roots = karras_sigmas(9, 0.03, 15, rho) ** (1 / rho)
        torch.testing.assert_close(roots.diff(), roots.diff()[:1].expand(8))
    logs = exponential_sigmas(9, 0.03, 15).log()
    torch.testing.assert_close(logs.diff(), logs.diff()[:1].expand(8))
    torch.testing.assert_close(beta_sigmas(9, 1, 3, 1, 1).diff(), torch.full((8,), -0.25).double())  # uniform


@pytest.mark.parametrize("alpha, beta", [(0.6, 0.6), (1, 1), (0.3, 4), (5, 0.5), (20, 30)])
def test_beta_quantiles_match_scipy(alpha: float, beta: float) -> None:
    stats = pytest.importorskip("scipy.stats")
    p = torch.linspace(0, 1, 33, dtype=torch.float64)
    expected = torch.as_tensor(stats.beta.ppf(p.numpy(), alpha, beta))
    torch.testing.assert_close(beta_quantiles(p, alpha, beta), expected, rtol=0, atol=1e-12)
    expected = torch.as_tensor(stats.beta.cdf(p.numpy(), alpha, beta))
    torch.testing.assert_close(incomplete_beta(p, alpha, beta), expected, rtol=0, atol=1e-12)


@given(st.integers(0, 64), st.floats(0.2, 8), st.floats(0.2, 8))
def test_incomplete_beta_is_mirrored(k: int, a: float, b: float) -> None:
    point = torch.tensor([k / 64]).double()
    torch.testing.assert_close(
        incomplete_beta(point, a, b), 1 - incomplete_beta(1 - point, b, a), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize(
    "arguments", [(0, 0.1, 1), (3, 0, 1), (3, 2, 1), (3, 0.1, math.inf), (3, math.nan, 1)]
)
def test_sigmas_refuse_impossible_ranges(arguments: tuple) -> None:
    for spaced in SPACED:
        with pytest.raises(ValueError, match="num_steps|sigma_min"):
            spaced(*arguments)
    with pytest.raises(ValueError, match="rho"):
        karras_sigmas(3, 0.1, 1, 0)
    with pytest.raises(ValueError, match="Beta"):
        beta_sigmas(3, 0.1, 1, 0.6, 0)


def test_sigma_steps_gives_back_the_table_and_its_timesteps() -> None:
    sigmas = ((1 - LEVELS) / LEVELS).sqrt().flip(0)
    timesteps, levels = sigma_steps(sigmas, LEVELS)
    assert relative_error(timesteps, torch.arange(999, -1, -1).double()) < 1e-9
    torch.testing.assert_close(levels, LEVELS.flip(0), rtol=1e-14, atol=0)
    assert torch.equal(sigma_steps(sigmas, LEVELS, rounded=True)[0], torch.arange(999, -1, -1))
    assert levels[0] == LEVELS[-1] and levels[-1] == LEVELS[0]


def test_sigma_steps_lie_between_neighbours_in_log_sigma_and_stay_in_the_table() -> None:
    table = ((1 - LEVELS) / LEVELS).sqrt()
    middle = float((table[400] * table[401]).sqrt())
    timesteps, levels = sigma_steps([1e3, middle, 1e-3], LEVELS)
    assert timesteps.tolist() == pytest.approx([999, 400.5, 0])
    torch.testing.assert_close(((1 - levels) / levels).sqrt(), torch.tensor([1e3, middle, 1e-3]).double())
    for sigmas in ([1.0, 1.0], [1.0, 2.0], [1.0, 0.0], [math.nan]):
        with pytest.raises(ValueError, match="sigmas"):
            sigma_steps(sigmas, LEVELS)


def test_karras_steps_take_own_ranges_and_unrounded_timesteps() -> None:
    timesteps, levels = karras_steps(5, LEVELS, sigma_min=0.1, sigma_max=10, rho=5, rounded=False)
    torch.testing.assert_close(((1 - levels) / levels).sqrt(), karras_sigmas(5, 0.1, 10, 5))
    assert timesteps.dtype == torch.float64
    assert torch.equal(
        timesteps.round().long(), karras_steps(5, LEVELS, sigma_min=0.1, sigma_max=10, rho=5)[0]
    )
    assert sigma_range(LEVELS) == pytest.approx((0.0292, 14.6146), abs=1e-4)  # Stable Diffusion's


# ---- zero terminal SNR and predictions ---------------------------------------------------------------------


def test_lift_zero_level_leaves_levels_falling() -> None:
    """With Ho et al.'s betas at T = 1100 the last level but one is below 2^-24 already."""
    for betas in (
        make_betas(),
        make_betas("linear", beta_start=1e-4, beta_end=0.02, num_train_timesteps=1100),
    ):
        zero = make_alphas_cumprod(rescale_zero_terminal_snr(betas))
        levels = lift_zero_level(zero)
        assert torch.equal(levels[:-1], zero[:-1]) and bool((levels.diff() < 0).all()) and levels[-1] > 0
        assert len(solver_steps(range(len(levels) - 1, -1, -1), levels)) == len(levels)
    assert levels[-2] < 2**-24 and float(lift_zero_level(LEVELS)[-1]) == float(LEVELS[-1])
    assert lift_zero_level(make_alphas_cumprod(rescale_zero_terminal_snr(make_betas())))[-1] == 2**-24


@given(st.floats(0.001, 0.999), st.integers(0, 3))
def test_to_eps_finds_the_noise_in_every_prediction(a: float, seed: int) -> None:
    x0, noise = (one.double() for one in _pair(seed))
    x = math.sqrt(a) * x0 + math.sqrt(1 - a) * noise
    outputs = {"epsilon": noise, "v_prediction": math.sqrt(a) * noise - math.sqrt(1 - a) * x0, "sample": x0}
    for prediction in PREDICTIONS:
        torch.testing.assert_close(to_eps(outputs[prediction], x, a, prediction), noise, rtol=0, atol=1e-10)
    assert to_eps(noise.half(), x.half(), a).dtype == torch.float32


def test_to_eps_refuses_what_has_no_meaning() -> None:
    x, noise = _pair(0)
    with pytest.raises(ValueError, match="'x0' is not known; it is one of epsilon, v_prediction, sample"):
        to_eps(noise, x, 0.5, "x0")
    with pytest.raises(ValueError, match="level a_t is 1.0"):
        to_eps(noise, x, 1.0, "sample")


@pytest.mark.parametrize("num_steps", [10, 20, 25, 30, 50])
def test_v_prediction_at_fractions_is_the_samplers_own(num_steps: int) -> None:
    """diffusers' "linspace" of Euler names fractions of timesteps; a table knows only whole ones."""
    x, _ = _pair(5)
    v = lambda x, t: 0.4 * torch.tanh(x) - 0.1  # noqa: E731
    timesteps = torch.linspace(999, 0, num_steps, dtype=torch.float64)
    wrapped = euler_sample(v_prediction(v, LEVELS), x, timesteps, LEVELS)
    own = euler_sample(v, x, timesteps, LEVELS, prediction="v_prediction")
    assert relative_error(wrapped, own) < 1e-6  # the wrapper is told t in float32
    for outside in (999.5, -0.5, 1000, -1):
        with pytest.raises(ValueError, match="0..999"):
            v_prediction(v, LEVELS)(x, torch.tensor(outside))


def test_the_latents_own_level_counts_where_the_timestep_is_rounded() -> None:
    """A net that answers the true v of a known x0 at the latent's level: only that level recovers x0."""
    x0, noise = (one.double() for one in _pair(6))
    timesteps, levels = karras_steps(8, LEVELS)
    own = iter(levels.tolist())

    def v(x: Tensor, t: Tensor) -> Tensor:
        a = next(own)
        return (math.sqrt(a) * x - x0) / math.sqrt(1 - a)

    out = euler_sample(v, noise, timesteps, LEVELS, levels=levels, prediction="v_prediction")
    torch.testing.assert_close(out, x0, rtol=0, atol=1e-9)


def test_training_targets_are_what_to_eps_takes_back() -> None:
    x0, noise = (one.double() for one in _pair(7))
    t = torch.tensor([3, 400, 990])
    x = q_sample(x0, t, LEVELS, noise)
    for prediction in PREDICTIONS:
        target = training_target(x0, noise, t, LEVELS, prediction)
        for k in range(3):
            found = to_eps(target[k], x[k], LEVELS[t[k]], prediction)
            torch.testing.assert_close(found, noise[k], rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="'x0' is not known"):
        training_target(x0, noise, t, LEVELS, "x0")


# ---- keeping predictions in range --------------------------------------------------------------------------


def test_clip_sample_cuts_both_ends() -> None:
    x0 = torch.tensor([[-3.0, -0.5, 0.2, 2.0]])
    assert clip_sample()(x0).tolist() == [[-1, -0.5, pytest.approx(0.2), 1]]
    assert clip_sample(2.5)(x0).tolist() == [[-2.5, -0.5, pytest.approx(0.2), 2]]


@given(st.floats(0, 1), st.sampled_from([0.5, 1.0, 1.7, math.inf]), st.integers(0, 5))
def test_dynamic_threshold_is_the_papers_picture_by_picture(ratio: float, most: float, seed: int) -> None:
    x0, _ = _pair(seed)
    for whole, one in zip(dynamic_threshold(ratio, most)(3 * x0), 3 * x0, strict=True):
        s = min(max(np.quantile(one.abs().numpy(), ratio), 1), most)
        np.testing.assert_allclose(whole.numpy(), np.clip(one.numpy(), -s, s) / s, rtol=0, atol=1e-12)


@pytest.mark.parametrize("make", [lambda: clip_sample(0), lambda: clip_sample(math.nan),
                                  lambda: dynamic_threshold(1.1), lambda: dynamic_threshold(0.9, 0)])  # fmt: skip
def test_limits_refuse_impossible_ranges(make) -> None:
    with pytest.raises(ValueError, match="above 0"):
        make()


def test_a_level_of_0_is_refused_where_a_sigma_is_asked_for() -> None:
    zero = make_alphas_cumprod(rescale_zero_terminal_snr(make_betas()))
    for ask in (
        lambda: sigma_range(zero),
        lambda: karras_steps(4, zero),
        lambda: sigma_steps([3.0, 1.0], zero),
        lambda: solver_steps([998.5, 1], zero),
    ):
        with pytest.raises(ValueError, match="lift_zero_level"):
            ask()
