"""DPM-Solver++(2M): test_scheduler_dpm_multi.py."""

from typing import Any

import pytest
from torch import Tensor

from samplers.dpmpp import dpmpp_sample
from samplers.schedule import (
    dynamic_threshold,
    exponential_sigmas,
    karras_steps,
    linspace_timesteps,
    q_sample,
    sigma_range,
    sigma_steps,
)

from .cases import Case, case_id, check, levels_of, model, noise, sample

LEVELS = levels_of()
TIMESTEPS = linspace_timesteps(10, drop_zero=True)
V = {"prediction": "v_prediction"}


def run(x: Tensor, timesteps: Tensor, **options: Any) -> Tensor:
    """Their settings: final_sigmas_type "sigma_min", and no lower order at the end."""
    final_alpha = float(LEVELS[0])
    return dpmpp_sample(
        model, x, timesteps, LEVELS, final_alpha=final_alpha, lower_order_final=False, **options
    )


def full_loop(**options: Any) -> Tensor:
    return run(sample(), TIMESTEPS, **options)


def at_sigmas(steps: tuple[Tensor, Tensor]) -> Tensor:
    timesteps, levels = steps
    return run(sample(), timesteps, levels=levels, **V)


def karras() -> Tensor:
    return at_sigmas(karras_steps(10, LEVELS))


def lu() -> Tensor:
    return at_sigmas(sigma_steps(exponential_sigmas(10, *sigma_range(LEVELS)), LEVELS, rounded=True))


def with_noise() -> Tensor:
    return run(q_sample(sample(), TIMESTEPS[5], LEVELS, noise()), TIMESTEPS[5:])


CASES = [
    Case("dpm_multi", "full_loop_no_noise", full_loop, mean=0.3301),
    Case("dpm_multi", "full_loop_with_noise", with_noise, sum=318.4111, mean=0.4146),
    Case("dpm_multi", "full_loop_no_noise_thres", lambda: full_loop(limit=dynamic_threshold(0.87, 0.5)), mean=1.1364),
    Case("dpm_multi", "full_loop_with_v_prediction", lambda: full_loop(**V), mean=0.2251),
    Case("dpm_multi", "full_loop_with_karras_and_v_prediction", karras, mean=0.2096),
    Case("dpm_multi", "full_loop_with_lu_and_v_prediction", lu, mean=0.1554),
    Case("dpm_multi", "switch", full_loop, mean=0.3301),
    Case("dpm_multi", "switch back", full_loop, mean=0.3301),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_dpmpp_gives_the_stored_numbers(case: Case) -> None:
    check(case)
