"""Heun, LMS, DPM2 and DPM2 ancestral: test_scheduler_heun.py, _lms.py, _kdpm2_discrete.py and
_kdpm2_ancestral.py. Numbers that theirs store for the CPU and for CUDA are one case each.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from samplers.dpm2 import dpm2_sample, middle_level
from samplers.euler import euler_sigmas
from samplers.heun import heun_sample
from samplers.lms import lms_sample
from samplers.schedule import karras_steps, sigma_range, solver_steps

from .cases import Case, case_id, check, levels_of, noise, rounded_levels_of, sample, scaling_model, seeded

LEVELS = levels_of(1100)
ROUNDED = rounded_levels_of(1100)  # for sums right to the seventh digit, theirs of float32
LINSPACE = torch.linspace(1099, 0, 10, dtype=torch.float64)
V: dict[str, Any] = {"prediction": "v_prediction"}
Sampler = Callable[..., Tensor]


def evaluated(sampler: Sampler, steps: list[tuple[float, float, float]], eta: float) -> list[float]:
    """The levels of a run's evaluations, in order."""
    if sampler is lms_sample:
        return [a for _, a, _ in steps]
    visited = []
    for _, a, a_prev in steps:
        second = a_prev if sampler is heun_sample or a_prev == 1 else middle_level(a, a_prev, eta)
        visited += [a] if a_prev == 1 else [a, second]
    return visited


def run(
    sampler: Sampler, exploding: Tensor, timesteps: Tensor, *, table: Tensor = LEVELS, eta: float = 0.0, **options: Any
) -> Tensor:  # fmt: skip
    """Their loop from a sample of the form x0 + sigma eps."""
    steps = solver_steps(timesteps, table, levels=options.get("levels"))
    more = options | ({"eta": eta} if sampler is dpm2_sample else {})
    net = scaling_model(evaluated(sampler, steps, eta))
    return sampler(net, exploding * math.sqrt(steps[0][1]), timesteps, table, generator=seeded(), **more)


def full_loop(sampler: Sampler, table: Tensor = LEVELS, **options: Any) -> Tensor:
    return run(sampler, sample() * sigma_range(table)[1], LINSPACE, table=table, **options)


def karras(sampler: Sampler, table: Tensor = LEVELS) -> Tensor:
    timesteps, levels = karras_steps(10, table, rounded=False)
    return run(sampler, sample() * sigma_range(table)[1], timesteps, table=table, levels=levels)


def with_noise(sampler: Sampler, eta: float = 0.0) -> Tensor:
    """The last two of 10 steps; their start is sigma_max times the sample, noised to where they begin."""
    sigma = euler_sigmas(solver_steps(LINSPACE[8:], ROUNDED)[0][1], 1.0)[0]
    start = sample() * sigma_range(ROUNDED)[1] + noise() * sigma
    return run(sampler, start, LINSPACE[8:], table=ROUNDED, eta=eta)


CASES = [
    *(
        Case("heun", name, lambda: full_loop(heun_sample), sum=0.1233, mean=0.0002)
        for name in ("full_loop_no_noise", "full_loop_no_noise, CUDA", "full_loop_device", "full_loop_device, CUDA")
    ),
    Case("heun", "full_loop_device, mps", lambda: full_loop(heun_sample), mean=0.0002, mean_within=1e-2),
    Case("heun", "full_loop_with_v_prediction", lambda: full_loop(heun_sample, **V), sum=4.6934e-07, mean=6.1112e-10),
    Case("heun", "full_loop_with_v_prediction, CUDA", lambda: full_loop(heun_sample, **V), sum=4.693428650170972e-07, mean=0.0002),
    Case("heun", "full_loop_device_karras_sigmas", lambda: karras(heun_sample), sum=0.00015, mean=1.9869554535034695e-07, mean_within=1e-2),
    Case("heun", "full_loop_with_noise", lambda: with_noise(heun_sample), sum=75074.8906, mean=97.7538),
    Case("lms", "full_loop_no_noise", lambda: full_loop(lms_sample), sum=1006.388, mean=1.31),
    Case("lms", "full_loop_with_v_prediction", lambda: full_loop(lms_sample, **V), sum=0.0017, mean=2.2676e-06),
    Case("lms", "full_loop_device", lambda: full_loop(lms_sample), sum=1006.388, mean=1.31),
    Case("lms", "full_loop_device_karras_sigmas", lambda: karras(lms_sample, ROUNDED), sum=3812.9927, mean=4.9648, sum_within=2e-2),
    Case("lms", "full_loop_with_noise", lambda: with_noise(lms_sample), sum=27663.6895, mean=36.0204,
         because="a run that starts part of the way weighs its first slope as if three more were there", right_sum=57074.7617),
    *(
        Case("kdpm2_discrete", name, lambda: full_loop(dpm2_sample), sum=20.4125, mean=0.0266)
        for name in ("full_loop_no_noise", "full_loop_no_noise, CUDA", "full_loop_device", "full_loop_device, CUDA")
    ),
    Case("kdpm2_discrete", "full_loop_with_v_prediction", lambda: full_loop(dpm2_sample, **V), sum=4.6934e-07, mean=6.1112e-10),
    Case("kdpm2_discrete", "full_loop_with_v_prediction, CUDA", lambda: full_loop(dpm2_sample, **V), sum=4.693428650170972e-07, mean=0.0002),
    Case("kdpm2_discrete", "full_loop_with_noise", lambda: with_noise(dpm2_sample), sum=70408.4062, mean=91.6776),
    Case("kdpm2_ancestral", "full_loop_no_noise", lambda: full_loop(dpm2_sample, ROUNDED, eta=1.0), sum=13979.9433, mean=18.2030, mean_within=5e-3),
    Case("kdpm2_ancestral", "full_loop_with_v_prediction", lambda: full_loop(dpm2_sample, eta=1.0, **V), sum=331.8133, mean=0.4320),
    Case("kdpm2_ancestral", "full_loop_device", lambda: full_loop(dpm2_sample, ROUNDED, eta=1.0), sum=13979.9433, mean=18.2030, sum_within=1e-1),
    Case("kdpm2_ancestral", "full_loop_with_noise", lambda: with_noise(dpm2_sample, 1.0), sum=93087.3437, mean=121.2074, mean_within=5e-3),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_the_sigma_solvers_give_the_stored_numbers(case: Case) -> None:
    check(case)
