"""UniPC: test_scheduler_unipc.py, over pictures and over rows."""

from functools import partial

import pytest
from torch import Tensor

from samplers.schedule import karras_steps, linspace_timesteps, q_sample
from samplers.unipc import unipc_sample

from .cases import SHAPE, Case, case_id, check, levels_of, model, noise, sample

LEVELS = levels_of()
TIMESTEPS = linspace_timesteps(10, drop_zero=True)
ROWS = (4, 3, 8)


def full_loop(shape: tuple[int, ...], karras: bool = False, prediction: str = "epsilon") -> Tensor:
    """Their setting: final_sigmas_type "sigma_min"."""
    timesteps, levels = karras_steps(10, LEVELS) if karras else (TIMESTEPS, None)
    return unipc_sample(
        model,
        sample(shape),
        timesteps,
        LEVELS,
        levels=levels,
        final_alpha=float(LEVELS[0]),
        prediction=prediction,
    )


def with_noise(shape: tuple[int, ...]) -> Tensor:
    timesteps = TIMESTEPS[8:]
    x = q_sample(sample(shape), timesteps[0], LEVELS, noise(shape))
    return unipc_sample(model, x, timesteps, LEVELS, final_alpha=float(LEVELS[0]))


def of(shape: tuple[int, ...], kind: str, means: tuple[float, ...], last: tuple[float, float]) -> list[Case]:
    plain, karras, v, karras_v = means
    loop = partial(full_loop, shape)
    return [
        Case("unipc", f"switch{kind}", loop, mean=plain),
        Case("unipc", f"switch{kind} back", loop, mean=plain),
        Case("unipc", f"full_loop_no_noise{kind}", loop, mean=plain),
        Case("unipc", f"full_loop_with_karras{kind}", lambda: loop(True), mean=karras),
        Case("unipc", f"full_loop_with_v_prediction{kind}", lambda: loop(False, "v_prediction"), mean=v),
        Case("unipc", f"full_loop_with_karras_and_v_prediction{kind}", lambda: loop(True, "v_prediction"), mean=karras_v),
        Case("unipc", f"full_loop_with_noise{kind}", lambda: with_noise(shape), sum=last[0], mean=last[1]),
    ]  # fmt: skip


CASES = [
    *of(SHAPE, "", (0.2464, 0.2925, 0.1014, 0.1966), (315.5757, 0.4109)),
    *of(ROWS, " of rows", (0.2441, 0.2898, 0.1014, 0.1944), (39.0870, 0.4072)),
]


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_unipc_gives_the_stored_numbers(case: Case) -> None:
    check(case)
