"""DDPM: test_scheduler_{ddpm,ddpm_parallel}.py."""

import pytest
import torch
from torch import Tensor

from samplers.ddpm import ddpm_sample, ddpm_sigma, ddpm_step
from samplers.schedule import clip_sample, q_sample

from .cases import Case, case_id, check, levels_of, model, noise, sample, seeded

LEVELS = levels_of()


def full_loop(prediction: str = "epsilon") -> Tensor:
    timesteps = range(999, -1, -1)
    return ddpm_sample(
        model, sample(), timesteps, LEVELS, prediction=prediction, limit=clip_sample(), generator=seeded()
    )


def with_noise() -> Tensor:
    x = q_sample(sample(), 1, LEVELS, noise())
    return ddpm_sample(model, x, [1, 0], LEVELS, limit=clip_sample(), generator=seeded())


def variance(t: int) -> Tensor:
    return torch.tensor(ddpm_sigma(float(LEVELS[t]), float(LEVELS[t - 1]) if t else 1.0) ** 2)


def batch_step() -> Tensor:
    """Three batches at timesteps 0, 1 and 2 take a step of one timestep, without its noise."""
    steps = []
    for t, shift in enumerate((0.0, 0.1, -0.1)):
        x = sample() + shift
        eps, a_prev = model(x, torch.tensor(t)), LEVELS[t - 1] if t else 1.0
        steps.append(ddpm_step(x, eps, LEVELS[t], a_prev, torch.zeros_like(x), limit=clip_sample())[0])
    return torch.cat(steps)


def both(file: str) -> list[Case]:
    """What the plain and the parallel file store alike."""
    return [
        Case(file, "variance 0", lambda: variance(0), sum=0.0, sum_within=1e-5),
        Case(file, "variance 487", lambda: variance(487), sum=0.00979, sum_within=1e-5),
        Case(file, "variance 999", lambda: variance(999), sum=0.02, sum_within=1e-5),
        Case(file, "full_loop_no_noise", full_loop, sum=258.9606, mean=0.3372),
        Case(file, "full_loop_with_v_prediction", lambda: full_loop("v_prediction"), sum=202.0296, mean=0.2631),
        Case(file, "full_loop_with_noise", with_noise, sum=387.9466, mean=0.5051,
             because="their beta is 1 - a_t / a_prev in float32, 1.2e-4 of 1; in float64 they give ours", right_sum=387.96725),
    ]  # fmt: skip


CASES = [
    *both("ddpm"),
    *both("ddpm_parallel"),
    Case("ddpm_parallel", "batch_step_no_noise", batch_step, sum=1153.1833, mean=0.5005),
]


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_ddpm_gives_the_stored_numbers(case: Case) -> None:
    check(case)
