"""DDIM, forwards and backwards: test_scheduler_{ddim,ddim_parallel,ddim_inverse}.py."""

import pytest
import torch
from torch import Tensor

from samplers.ddim import ddim_invert, ddim_sample, ddim_sigma, ddim_step
from samplers.schedule import clip_sample, leading_timesteps, q_sample

from .cases import Case, case_id, check, levels_of, model, noise, sample

LEVELS = levels_of()
TIMESTEPS = leading_timesteps(10, offset=0)


def full_loop(beta_start: float = 1e-4, to_one: bool = True, prediction: str = "epsilon") -> Tensor:
    levels = levels_of(beta_start=beta_start)
    final_alpha = 1.0 if to_one else float(levels[0])
    return ddim_sample(
        model,
        sample(),
        TIMESTEPS,
        levels,
        final_alpha=final_alpha,
        prediction=prediction,
        limit=clip_sample(),
    )


def with_noise() -> Tensor:
    timesteps = TIMESTEPS[8:]
    x = q_sample(sample(), timesteps[0], LEVELS, noise())
    return ddim_sample(model, x, timesteps, LEVELS, limit=clip_sample())


def variance(t: int, t_prev: int) -> Tensor:
    """That of a step with eta 1; between a timestep and itself there is none."""
    return torch.tensor(ddim_sigma(float(LEVELS[t]), float(LEVELS[t_prev]), 1.0) ** 2)


def batch_step() -> Tensor:
    """Three batches at timesteps 0, 1 and 2 take a step of 100 timesteps, so into level 1."""
    steps = []
    for t, shift in enumerate((0.0, 0.1, -0.1)):
        x = sample() + shift
        steps.append(ddim_step(x, model(x, torch.tensor(t)), LEVELS[t], 1.0, limit=clip_sample())[0])
    return torch.cat(steps)


def inverse(beta_start: float = 1e-4, to_one: bool = True, prediction: str = "epsilon") -> Tensor:
    levels = levels_of(beta_start=beta_start)
    start_alpha = 1.0 if to_one else float(levels[0])
    return ddim_invert(
        model,
        sample(),
        TIMESTEPS.flip(0),
        levels,
        start_alpha=start_alpha,
        prediction=prediction,
        limit=clip_sample(),
    )


def both(file: str) -> list[Case]:
    """What the plain and the parallel file store alike."""
    return [
        Case(file, "steps_offset", lambda: leading_timesteps(5), equals=[801, 601, 401, 201, 1]),
        Case(file, "variance 0 0", lambda: variance(0, 0), sum=0.0, sum_within=1e-5),
        Case(file, "variance 420 400", lambda: variance(420, 400), sum=0.14771, sum_within=1e-5),
        Case(file, "variance 980 960", lambda: variance(980, 960), sum=0.32460, sum_within=1e-5),
        Case(file, "variance 0 0 again", lambda: variance(0, 0), sum=0.0, sum_within=1e-5),
        Case(file, "variance 487 486", lambda: variance(487, 486), sum=0.00979, sum_within=1e-5),
        Case(file, "variance 999 998", lambda: variance(999, 998), sum=0.02, sum_within=1e-5),
        Case(file, "full_loop_no_noise", full_loop, sum=172.0067, mean=0.223967),
        Case(file, "full_loop_with_v_prediction", lambda: full_loop(prediction="v_prediction"), sum=52.5302, mean=0.0684),
        Case(file, "full_loop_with_set_alpha_to_one", lambda: full_loop(0.01), sum=149.8295, mean=0.1951),
        Case(file, "full_loop_with_no_set_alpha_to_one", lambda: full_loop(0.01, False), sum=149.0784, mean=0.1941),
        Case(file, "full_loop_with_noise", with_noise, sum=354.5418, mean=0.4616),
    ]  # fmt: skip


INVERSE = [
    Case("ddim_inverse", "steps_offset", lambda: leading_timesteps(5).flip(0), equals=[1, 201, 401, 601, 801]),
    Case("ddim_inverse", "full_loop_no_noise", inverse, sum=671.6816, mean=0.8746),
    Case("ddim_inverse", "full_loop_with_v_prediction", lambda: inverse(prediction="v_prediction"), sum=1394.2185, mean=1.8154),
    Case("ddim_inverse", "full_loop_with_set_alpha_to_one", lambda: inverse(0.01), sum=539.9622, mean=0.7031),
    Case("ddim_inverse", "full_loop_with_no_set_alpha_to_one", lambda: inverse(0.01, False), sum=542.6722, mean=0.7066),
]  # fmt: skip
CASES = [
    *both("ddim"),
    *both("ddim_parallel"),
    Case("ddim_parallel", "batch_step_no_noise", batch_step, sum=1147.7904, mean=0.4982),
    *INVERSE,
]


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_ddim_gives_the_stored_numbers(case: Case) -> None:
    check(case)
