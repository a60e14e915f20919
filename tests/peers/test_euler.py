"""Euler and Euler ancestral: test_scheduler_euler.py and test_scheduler_euler_ancestral.py."""

import math

import pytest
import torch
from torch import Tensor

from samplers.euler import euler_sample, euler_sigmas
from samplers.schedule import karras_steps, sigma_range, solver_steps

from .cases import Case, case_id, check, levels_of, noise, rounded_levels_of, sample, scaling_model, seeded

LEVELS = levels_of(1100)
LINSPACE = torch.linspace(1099, 0, 10, dtype=torch.float64)
SIGMA_MAX = sigma_range(LEVELS)[1]


def run(
    exploding: Tensor, timesteps: Tensor, eta: float, levels: Tensor | None = None, table: Tensor = LEVELS,
    prediction: str = "epsilon",
) -> Tensor:  # fmt: skip
    """Their loop from a sample of the form x0 + sigma eps."""
    own = [a for _, a, _ in solver_steps(timesteps, table, levels=levels)]
    return euler_sample(
        scaling_model(own), exploding * math.sqrt(own[0]), timesteps, table, eta=eta, levels=levels,
        prediction=prediction, generator=seeded(),
    )  # fmt: skip


def full_loop(eta: float, prediction: str = "epsilon") -> Tensor:
    return run(sample() * SIGMA_MAX, LINSPACE, eta, prediction=prediction)


def karras() -> Tensor:
    timesteps, levels = karras_steps(10, LEVELS, rounded=False)
    return run(sample() * SIGMA_MAX, timesteps, 0, levels)


def with_noise(eta: float) -> Tensor:
    """The last two of 10 steps; their start is sigma_max times the sample, noised to where they begin."""
    table = rounded_levels_of(1100)  # their sum of 57000 is right to the seventh digit, theirs of float32
    sigma_max = sigma_range(table)[1]
    sigma = euler_sigmas(solver_steps(LINSPACE[8:], table)[0][1], 1.0)[0]
    return run(sample() * sigma_max + noise() * sigma, LINSPACE[8:], eta, table=table)


CASES = [
    Case("euler", "full_loop_no_noise", lambda: full_loop(0), sum=10.0807, mean=0.0131),
    Case("euler", "full_loop_with_v_prediction", lambda: full_loop(0, prediction="v_prediction"), sum=0.0002, mean=2.2676e-06),
    Case("euler", "full_loop_device", lambda: full_loop(0), sum=10.0807, mean=0.0131),
    Case("euler", "full_loop_device_karras_sigmas", lambda: karras(), sum=124.52299, mean=0.162139),
    Case("euler", "full_loop_with_noise", lambda: with_noise(0), sum=57062.9297, mean=74.3007),
    Case("euler_ancestral", "full_loop_no_noise", lambda: full_loop(1), sum=152.3192, mean=0.1983),
    Case("euler_ancestral", "full_loop_with_v_prediction", lambda: full_loop(1, prediction="v_prediction"), sum=108.4439, mean=0.1412),
    Case("euler_ancestral", "full_loop_device", lambda: full_loop(1), sum=152.3192, mean=0.1983),
    Case("euler_ancestral", "full_loop_with_noise", lambda: with_noise(1), sum=56163.0508, mean=73.1290),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_euler_gives_the_stored_numbers(case: Case) -> None:
    check(case)
