"""schedule.py and the samplers of ddim.py, ddpm.py, dpmpp.py, unipc.py, pndm.py, euler.py and lcm.py beside
diffusers' schedulers, on random trajectories.

diffusers steps by the integer T // N whatever its list of timesteps says,
so trajectories are compared where N divides T.
"""

from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from samplers.ddim import ddim_invert, ddim_sample
from samplers.ddpm import ddpm_sample
from samplers.dpmpp import dpmpp_sample
from samplers.euler import euler_sample
from samplers.lcm import lcm_sample, lcm_timesteps
from samplers.pndm import pndm_sample
from samplers.schedule import (
    Denoiser,
    beta_sigmas,
    clip_sample,
    diffusers_leading_timesteps,
    dynamic_threshold,
    eps_from_velocity,
    exponential_sigmas,
    karras_sigmas,
    leading_timesteps,
    linspace_timesteps,
    make_alphas_cumprod,
    make_betas,
    q_sample,
    rescale_zero_terminal_snr,
    sigma_range,
    sigma_steps,
    solver_steps,
    trailing_timesteps,
    v_prediction,
    velocity,
)
from samplers.unipc import unipc_sample
from tests.helpers.goldens import relative_error
from tests.helpers.seeded_weights import seeded_input

diffusers = pytest.importorskip("diffusers")

SHAPE = (2, 4, 5, 7)
DIVISORS = st.sampled_from([n for n in range(1, 251) if 1000 % n == 0])
SEEDS = st.integers(0, 10_000)
SCHEDULES = st.sampled_from(["scaled_linear", "linear"])
SPACINGS: dict[str, Callable[[int], Tensor]] = {"leading": leading_timesteps, "trailing": trailing_timesteps}


def random(tag: str, seed: int) -> Tensor:
    return seeded_input(f"live.{tag}", SHAPE, seed)


def model_of(seed: int) -> Denoiser:
    """A net whose output is half random, anew for each timestep, half a function of x."""
    return lambda x, t: 0.5 * random(f"t{int(t)}", seed) + 0.5 * torch.tanh(x)


def scheduler_of(name: str, schedule: str, **options: Any) -> Any:
    """diffusers' scheduler with Stable Diffusion 1.x's betas, nothing clipped."""
    options = {"clip_sample": False, "steps_offset": 1, **options}
    return getattr(diffusers, name)(beta_start=0.00085, beta_end=0.012, beta_schedule=schedule, **options)


def run(scheduler: Any, num_steps: int, model: Denoiser, x: Tensor, **options: Any) -> list[Tensor]:
    """diffusers' trajectory: the start and what every step gives."""
    scheduler.set_timesteps(num_steps)
    seen = [x]
    for step, t in enumerate(scheduler.timesteps):
        chosen = {name: value(step) if callable(value) else value for name, value in options.items()}
        seen.append(scheduler.step(model(seen[-1], t), t, seen[-1], **chosen).prev_sample)
    return seen


@settings(max_examples=30)
@given(
    DIVISORS,
    SEEDS,
    SCHEDULES,
    st.sampled_from([0.0, 0.3, 1.0]),
    st.sampled_from(sorted(SPACINGS)),
    st.booleans(),
)
def test_ddim_equals_diffusers(
    num_steps: int, seed: int, schedule: str, eta: float, spacing: str, to_one: bool
) -> None:
    scheduler = scheduler_of("DDIMScheduler", schedule, timestep_spacing=spacing, set_alpha_to_one=to_one)
    x, model = random("x", seed), model_of(seed)
    levels = make_alphas_cumprod(make_betas(schedule))
    expected = run(
        scheduler, num_steps, model, x, eta=eta, variance_noise=lambda step: random(f"noise{step}", seed)
    )
    seen = [x]
    ddim_sample(
        model,
        x,
        SPACINGS[spacing](num_steps),
        levels,
        eta=eta,
        final_alpha=1.0 if to_one else float(levels[0]),
        noise=lambda site, step, shape: random(f"noise{step}", seed),
        on_step=lambda info: seen.append(info.x),
    )
    assert relative_error(torch.stack(seen), torch.stack(expected)) <= 1e-5


@settings(max_examples=15)
@given(DIVISORS, SEEDS, SCHEDULES)
def test_ddim_of_a_net_that_predicts_v_equals_diffusers(num_steps: int, seed: int, schedule: str) -> None:
    scheduler = scheduler_of("DDIMScheduler", schedule, prediction_type="v_prediction")
    x, model = random("x", seed), model_of(seed)
    levels = make_alphas_cumprod(make_betas(schedule))
    expected = run(scheduler, num_steps, model, x)[-1]
    out = ddim_sample(v_prediction(model, levels), x, leading_timesteps(num_steps), levels)
    assert relative_error(out, expected) <= 1e-5


@settings(max_examples=30)
@given(
    DIVISORS,
    SEEDS,
    SCHEDULES,
    st.sampled_from(["fixed_small", "fixed_large"]),
    st.sampled_from(sorted(SPACINGS)),
)
def test_ddpm_equals_diffusers(num_steps: int, seed: int, schedule: str, variance: str, spacing: str) -> None:
    """But for the last step of "fixed_large": diffusers adds noise there, algorithm 2 of Ho et al.
    does not.
    """
    scheduler = scheduler_of("DDPMScheduler", schedule, timestep_spacing=spacing, variance_type=variance)
    x, model = random("x", seed), model_of(seed)
    theirs, ours = (torch.Generator().manual_seed(seed) for _ in range(2))  # diffusers draws in x's shape too
    expected, seen = run(scheduler, num_steps, model, x, generator=theirs), [x]
    ddpm_sample(
        model,
        x,
        SPACINGS[spacing](num_steps),
        make_alphas_cumprod(make_betas(schedule)),
        variance=variance,
        generator=ours,
        on_step=lambda info: seen.append(info.x),
    )
    last = None if variance == "fixed_small" else -1
    assert relative_error(torch.stack(seen[:last]), torch.stack(expected[:last])) <= 1e-5


@given(st.integers(2, 999))
def test_timesteps_equal_diffusers_but_where_a_half_is_rounded(num_steps: int) -> None:
    """499.5 becomes 499 or 500 by the last bit of either formula.

    For some N, diffusers' "trailing" has N + 1 entries.
    """
    for spacing, ours, steps in (
        ("linspace", linspace_timesteps, Fraction(999, num_steps - 1)),
        ("trailing", trailing_timesteps, Fraction(1000, num_steps)),
    ):
        scheduler = scheduler_of("DDIMScheduler", "scaled_linear", timestep_spacing=spacing)
        scheduler.set_timesteps(num_steps)
        theirs = scheduler.timesteps.tolist()[:num_steps]
        for k, (mine, their) in enumerate(zip(ours(num_steps).tolist(), theirs, strict=True)):
            assert mine == their or (abs(mine - their) == 1 and (k * steps).denominator == 2), (spacing, k)


@given(SEEDS, st.lists(st.integers(0, 999), min_size=2, max_size=2), SCHEDULES)
def test_noising_and_velocity_equal_diffusers(seed: int, t: list[int], schedule: str) -> None:
    scheduler, timesteps = scheduler_of("DDIMScheduler", schedule), torch.tensor(t)
    levels = make_alphas_cumprod(make_betas(schedule))
    x0, noise = random("x0", seed), random("noise", seed)
    noised, v = q_sample(x0, timesteps, levels, noise), velocity(x0, noise, timesteps, levels)
    # Not 1e-6 as the tables: diffusers takes its roots in float32, ours are of float64 tables (found:
    # 1.1e-6).
    assert relative_error(noised, scheduler.add_noise(x0, noise, timesteps)) <= 2e-6
    assert relative_error(v, scheduler.get_velocity(x0, noise, timesteps)) <= 2e-6
    assert relative_error(eps_from_velocity(v, noised, timesteps, levels), noise) <= 2e-6


@pytest.mark.parametrize("schedule", ["scaled_linear", "linear", "squaredcos_cap_v2"])
def test_tables_equal_diffusers(schedule: str) -> None:
    for zero_snr in (False, True):
        scheduler = scheduler_of("DDIMScheduler", schedule, rescale_betas_zero_snr=zero_snr)
        betas = rescale_zero_terminal_snr(make_betas(schedule)) if zero_snr else make_betas(schedule)
        assert relative_error(make_alphas_cumprod(betas), scheduler.alphas_cumprod) <= 1e-6


# ---- options -----------------------------------------------------------------------------------------------

PREDICTION = st.sampled_from(["epsilon", "v_prediction", "sample"])
LIMITS: dict[str, tuple[Any, dict[str, Any]]] = {
    "none": (None, {"clip_sample": False}),
    "clip": (clip_sample(1.3), {"clip_sample": True, "clip_sample_range": 1.3}),
    "threshold": (
        dynamic_threshold(0.9, 1.4),
        {
            "clip_sample": False,
            "thresholding": True,
            "dynamic_thresholding_ratio": 0.9,
            "sample_max_value": 1.4,
        },
    ),
}
SPACED = {"karras": karras_sigmas, "exponential": exponential_sigmas, "beta": beta_sigmas}
LEVELS = make_alphas_cumprod(make_betas())


@settings(max_examples=20)
@given(DIVISORS, SEEDS, PREDICTION, st.sampled_from(sorted(LIMITS)), st.booleans())
def test_ddim_ddpm_and_inversion_with_limits_equal_diffusers(
    num_steps: int, seed: int, prediction: str, limited: str, rederived: bool
) -> None:
    """Of what is predicted and how it is kept in range; `use_clipped_model_output` is DDIM's alone."""
    limit, said = LIMITS[limited]
    x, model = random("x", seed), model_of(seed)
    timesteps = leading_timesteps(num_steps)
    options: dict[str, Any] = {"prediction_type": prediction, **said}
    ddim = scheduler_of("DDIMScheduler", "scaled_linear", set_alpha_to_one=True, **options)
    expected = run(ddim, num_steps, model, x, use_clipped_model_output=rederived)[-1]
    out = ddim_sample(
        model, x, timesteps, LEVELS, prediction=prediction, limit=limit, use_clipped_model_output=rederived
    )
    assert relative_error(out, expected) <= 2e-5
    ours, theirs = (torch.Generator().manual_seed(seed) for _ in range(2))
    ddpm = scheduler_of("DDPMScheduler", "scaled_linear", timestep_spacing="leading", **options)
    expected = run(ddpm, num_steps, model, x, generator=theirs)[-1]
    out = ddpm_sample(model, x, timesteps, LEVELS, prediction=prediction, limit=limit, generator=ours)
    assert relative_error(out, expected) <= 2e-5
    if limited != "threshold" and prediction != "sample":
        inverse = scheduler_of("DDIMInverseScheduler", "scaled_linear", set_alpha_to_one=True, **options)
        expected = run(inverse, num_steps, model, x)[-1]
        out = ddim_invert(model, x, timesteps.flip(0), LEVELS, prediction=prediction, limit=limit)
        assert relative_error(out, expected) <= 2e-5


def compare(
    name: str, num_steps: int, seed: int, options: dict[str, Any], sample: Callable[..., Tensor]
) -> float:
    """How far a run of `sample(model, x, timesteps)`, told diffusers' timesteps, is from diffusers' own."""
    scheduler = getattr(diffusers, name)(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **options
    )
    x, model = random("x", seed), model_of(seed)
    expected = run(scheduler, num_steps, model, x)[-1]
    return relative_error(sample(model, x, scheduler.timesteps), expected)


@settings(max_examples=20)
@given(
    st.integers(2, 40), SEEDS, PREDICTION, st.booleans(), st.booleans(), st.sampled_from([1, 2, 3]),
    st.sampled_from(["midpoint", "heun"]), st.booleans(), st.booleans(),
)  # fmt: skip
def test_multistep_solvers_with_options_equal_diffusers(
    num_steps: int, seed: int, prediction: str, to_zero: bool, threshold: bool, order: int, kind: str,
    lower_order_final: bool, euler_at_final: bool,
) -> None:  # fmt: skip
    """Into level 1 diffusers' UniPC is NaN but for "bh2" with lower_order_final: it runs like this. And its
    "dpmsolver" does not go there.
    """
    lower_order_final = lower_order_final or to_zero
    limit, said = LIMITS["threshold" if threshold else "none"]
    options: dict[str, Any] = {name: value for name, value in said.items() if name != "clip_sample"}
    options |= {"prediction_type": prediction, "solver_order": order, "lower_order_final": lower_order_final}
    options["final_sigmas_type"] = "zero" if to_zero else "sigma_min"
    final_alpha = 1.0 if to_zero else float(LEVELS[0])

    def ours(sample: Callable[..., Tensor], **more: Any) -> Callable[..., Tensor]:
        return lambda model, x, timesteps: sample(
            model, x, timesteps, LEVELS, order=order, lower_order_final=lower_order_final, final_alpha=final_alpha,
            prediction=prediction, limit=limit, **more,
        )  # fmt: skip

    more = {"solver_type": kind, "euler_at_final": euler_at_final}
    for algorithm_type in ("dpmsolver++",) if to_zero else ("dpmsolver++", "dpmsolver"):
        more["algorithm_type"] = algorithm_type
        dpmpp = ours(dpmpp_sample, **more)
        assert compare("DPMSolverMultistepScheduler", num_steps, seed, options | more, dpmpp) <= 1e-4
    variant = "bh2" if to_zero or kind == "midpoint" else "bh1"
    unipc = ours(unipc_sample, variant=variant)
    assert (
        compare("UniPCMultistepScheduler", num_steps, seed, options | {"solver_type": variant}, unipc) <= 1e-4
    )


@settings(max_examples=20)
@given(st.integers(2, 20), SEEDS, PREDICTION, st.sampled_from(sorted(SPACED)))
def test_sigma_spacings_equal_diffusers(num_steps: int, seed: int, prediction: str, spaced: str) -> None:
    """The latents' levels are ours, the timesteps theirs: rounded or cut off, where ours are fractions.

    More steps repeat timesteps, on which diffusers' solvers stop.
    """
    options: dict[str, Any] = {"prediction_type": prediction, f"use_{spaced}_sigmas": True}
    fractions, levels = sigma_steps(SPACED[spaced](num_steps, *sigma_range(LEVELS)), LEVELS)

    def ours(sample: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(model: Denoiser, x: Tensor, timesteps: Tensor) -> Tensor:
            assert (timesteps - fractions).abs().max() <= 1 + 1e-3
            return sample(model, x, timesteps, LEVELS, levels=levels, prediction=prediction)

        return run

    assert compare("DPMSolverMultistepScheduler", num_steps, seed, options, ours(dpmpp_sample)) <= 1e-4
    assert compare("UniPCMultistepScheduler", num_steps, seed, options, ours(unipc_sample)) <= 1e-4


@settings(max_examples=20)
@given(
    st.integers(2, 40),
    SEEDS,
    st.sampled_from(["epsilon", "v_prediction"]),
    st.sampled_from(["none", *SPACED]),
)
def test_euler_at_fractions_equals_diffusers(num_steps: int, seed: int, prediction: str, spaced: str) -> None:
    options: dict[str, Any] = {"prediction_type": prediction}
    timesteps, levels = linspace_timesteps(num_steps, rounded=False), None
    if spaced != "none":
        options[f"use_{spaced}_sigmas"] = True
        timesteps, levels = sigma_steps(SPACED[spaced](num_steps, *sigma_range(LEVELS)), LEVELS)
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **options
    )
    scheduler.set_timesteps(num_steps)
    torch.testing.assert_close(scheduler.timesteps.double(), timesteps, rtol=1e-5, atol=2e-3)
    timesteps = scheduler.timesteps  # of the same value, but a net is told the integer part in this test
    x, model = random("x", seed), model_of(seed)
    expected = x * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        output = model(scheduler.scale_model_input(expected, t), t)
        expected = scheduler.step(output, t, expected).prev_sample
    level = solver_steps(timesteps, LEVELS, levels=levels)[0][1]
    start = x * scheduler.init_noise_sigma * level**0.5
    out = euler_sample(model, start, timesteps, LEVELS, levels=levels, prediction=prediction)
    assert relative_error(out, expected) <= 1e-4


@settings(max_examples=20)
@given(
    st.sampled_from([4, 5, 10, 20, 25, 50]),
    SEEDS,
    st.sampled_from(["epsilon", "v_prediction"]),
    st.booleans(),
)
def test_pndm_equals_diffusers(num_steps: int, seed: int, prediction: str, skip_prk_steps: bool) -> None:
    """Of even strides: half-way of an odd one diffusers tells a timestep one off the latent's level."""
    options: dict[str, Any] = {
        "prediction_type": prediction,
        "skip_prk_steps": skip_prk_steps,
        "steps_offset": 1,
    }
    ours = partial(
        pndm_sample, timesteps=leading_timesteps(num_steps), alphas_cumprod=LEVELS, final_alpha=float(LEVELS[0]),
        prediction=prediction, skip_prk_steps=skip_prk_steps, mix="output",
    )  # fmt: skip
    found = compare("PNDMScheduler", num_steps, seed, options, lambda model, x, told: ours(model, x))
    assert found <= 2e-5


@settings(max_examples=20)
@given(st.integers(1, 12), SEEDS, PREDICTION, st.sampled_from(sorted(LIMITS)))
def test_lcm_with_limits_equals_diffusers(num_steps: int, seed: int, prediction: str, limited: str) -> None:
    limit, said = LIMITS[limited]
    scheduler = diffusers.LCMScheduler(prediction_type=prediction, **said)
    x, model = random("x", seed), model_of(seed)
    ours, theirs = (torch.Generator().manual_seed(seed) for _ in range(2))
    expected = run(scheduler, num_steps, model, x, generator=theirs)[-1]
    timesteps = lcm_timesteps(num_steps)
    assert scheduler.timesteps.tolist() == timesteps.tolist()
    out = lcm_sample(model, x, timesteps, LEVELS, prediction=prediction, limit=limit, generator=ours)
    assert relative_error(out, expected) <= 2e-5


@given(st.integers(1, 999), st.integers(0, 1))
def test_leading_spacing_equals_diffusers(num_steps: int, offset: int) -> None:
    for name, drop_zero in (("DDIMScheduler", False), ("UniPCMultistepScheduler", True)):
        scheduler = getattr(diffusers, name)(timestep_spacing="leading", steps_offset=offset)
        scheduler.set_timesteps(num_steps)
        ours = diffusers_leading_timesteps(num_steps, offset=offset, drop_zero=drop_zero)
        theirs = scheduler.timesteps
        assert torch.equal(ours, theirs) or theirs.max() > 999, (name, num_steps)
