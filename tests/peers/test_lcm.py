"""LCM: test_scheduler_lcm.py."""

import pytest
from torch import Tensor

from samplers.lcm import lcm_sample, lcm_timesteps

from .cases import Case, case_id, check, levels_of, model, sample, seeded

LEVELS = levels_of(1000, "scaled_linear", 0.00085, 0.012)


def full_loop(num_steps: int) -> Tensor:
    return lcm_sample(model, sample(), lcm_timesteps(num_steps), LEVELS, generator=seeded())


CASES = [
    Case("lcm", "full_loop_onestep", lambda: full_loop(1), sum=18.7097, mean=0.0244, sum_within=1e-3),
    Case("lcm", "full_loop_multistep", lambda: full_loop(10), sum=197.7616, mean=0.2575, sum_within=1e-3),
]


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_lcm_gives_the_stored_numbers(case: Case) -> None:
    check(case)
