"""PNDM started by Runge-Kutta: test_scheduler_pndm.py."""

import pytest
import torch
from torch import Tensor

from samplers.pndm import pndm_sample
from samplers.schedule import leading_timesteps

from .cases import Case, case_id, check, levels_of, model, sample

LEVELS = levels_of()


def full_loop(beta_start: float = 1e-4, to_one: bool = False, prediction: str = "epsilon") -> Tensor:
    levels = levels_of(beta_start=beta_start)
    return pndm_sample(
        model, sample(), leading_timesteps(10, offset=0), levels, skip_prk_steps=False, mix="output",
        final_alpha=1.0 if to_one else float(levels[0]), prediction=prediction,
    )  # fmt: skip


def told() -> Tensor:
    """The timestep of every evaluation."""
    seen: list[float] = []
    pndm_sample(
        model,
        sample(),
        leading_timesteps(10),
        LEVELS,
        skip_prk_steps=False,
        on_step=lambda info: seen.append(info.t),
    )
    return torch.tensor(seen)


TOLD = [901, 851, 851, 801, 801, 751, 751, 701, 701, 651, 651, 601, 601, 501, 401, 301, 201, 101, 1]
CASES = [
    Case("pndm", "steps_offset", told, equals=TOLD),
    Case("pndm", "full_loop_no_noise", full_loop, sum=198.1318, mean=0.2580),
    Case("pndm", "full_loop_with_v_prediction", lambda: full_loop(prediction="v_prediction"), sum=67.3986, mean=0.0878),
    Case("pndm", "full_loop_with_set_alpha_to_one", lambda: full_loop(0.01, True), sum=230.0399, mean=0.2995),
    Case("pndm", "full_loop_with_no_set_alpha_to_one", lambda: full_loop(0.01), sum=186.9482, mean=0.2434),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_pndm_gives_the_stored_numbers(case: Case) -> None:
    check(case)
