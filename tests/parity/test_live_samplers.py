"""schedule.py, ddim.py and ddpm.py beside diffusers' schedulers, on random trajectories.

diffusers steps by the integer T // N whatever its list of timesteps says,
so trajectories are compared where N divides T.
"""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from samplers.ddim import ddim_sample
from samplers.ddpm import ddpm_sample
from samplers.schedule import (
    Denoiser,
    eps_from_velocity,
    leading_timesteps,
    linspace_timesteps,
    make_alphas_cumprod,
    make_betas,
    q_sample,
    rescale_zero_terminal_snr,
    trailing_timesteps,
    v_prediction,
    velocity,
)
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


@pytest.mark.parametrize("schedule", ["scaled_linear", "linear"])
def test_tables_equal_diffusers(schedule: str) -> None:
    for zero_snr in (False, True):
        scheduler = scheduler_of("DDIMScheduler", schedule, rescale_betas_zero_snr=zero_snr)
        betas = rescale_zero_terminal_snr(make_betas(schedule)) if zero_snr else make_betas(schedule)
        assert relative_error(make_alphas_cumprod(betas), scheduler.alphas_cumprod) <= 1e-6
