"""DEIS, single-step DPM-Solver++, TCD, DPM-Solver++ towards noise, and two solvers on EDM's parametrisation:
test_scheduler_deis.py, _dpm_single.py, _tcd.py, _dpm_multi_inverse.py, _edm_euler.py and
_edm_dpmsolver_multistep.py.
"""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from samplers.ddim import ddim_step
from samplers.dpm_single import dpm_single_sample
from samplers.dpmpp import dpmpp_step
from samplers.euler import euler_step
from samplers.lcm import lcm_timesteps
from samplers.lms import deis_sample
from samplers.schedule import (
    Limit,
    dynamic_threshold,
    karras_sigmas,
    karras_steps,
    linspace_timesteps,
    q_sample,
    to_eps,
)
from samplers.tcd import tcd_sample

from .cases import Case, case_id, check, levels_of, model, noise, rounded_levels_of, sample

LEVELS = levels_of()
TIMESTEPS = linspace_timesteps(10, drop_zero=True)
SD_LEVELS = levels_of(1000, "scaled_linear", 0.00085, 0.012)
V: dict[str, Any] = {"prediction": "v_prediction"}


def deis(x: Tensor | None = None, timesteps: Tensor = TIMESTEPS, **options: Any) -> Tensor:
    """Their last step leads to the table's first level."""
    x = sample() if x is None else x
    return deis_sample(model, x, timesteps, LEVELS, final_alpha=float(LEVELS[0]), **options)


def deis_with_noise() -> Tensor:
    return deis(q_sample(sample(), TIMESTEPS[8], LEVELS, noise()), TIMESTEPS[8:])


def single(x: Tensor, timesteps: Tensor, **options: Any) -> Tensor:
    """Their settings: final_sigmas_type "sigma_min"."""
    return dpm_single_sample(model, x, timesteps, LEVELS, final_alpha=float(LEVELS[0]), **options)


def single_karras(**options: Any) -> Tensor:
    timesteps, levels = karras_steps(10, LEVELS)
    return single(sample(), timesteps, levels=levels, **options)


def single_from_within(x: Tensor, timesteps: Tensor) -> Tensor:
    """A run that begins with the second step of a group, which without the first one is of first order."""
    first, second = timesteps[:2].tolist()
    x, _ = ddim_step(x, model(x, timesteps[0]), LEVELS[first], LEVELS[second])
    return single(x, timesteps[1:])


def single_with_noise() -> Tensor:
    return single_from_within(q_sample(sample(), TIMESTEPS[5], LEVELS, noise()), TIMESTEPS[5:])


def tcd(num_steps: int) -> Tensor:
    return tcd_sample(
        model, sample(), lcm_timesteps(num_steps), SD_LEVELS, gamma=0.0, final_alpha=float(SD_LEVELS[0])
    )


def inverse(steps: tuple[Tensor, Tensor], last_level: float, **options: Any) -> Tensor:
    """Their inversion: the steps of DPM-Solver++ from the clean end up to `last_level`."""
    x, history = sample(), ()
    prediction, limit = options.get("prediction", "epsilon"), options.get("limit")
    timesteps, levels = steps
    for t, (a_t, a_prev) in zip(timesteps, pairwise([*levels.tolist(), last_level]), strict=True):
        x, _, history = dpmpp_step(
            x, to_eps(model(x, t), x, a_t, prediction), a_t, a_prev, history, limit=limit
        )
    return x


def inverse_loop(table: Tensor = LEVELS, **options: Any) -> Tensor:
    timesteps = torch.arange(10) * 999 / 10
    timesteps = timesteps.round().long()
    return inverse((timesteps, table[timesteps]), float(table[-1]), **options)


def inverse_karras() -> Tensor:
    timesteps, levels = (row.flip(0) for row in karras_steps(10, LEVELS))
    return inverse((timesteps, levels), float(levels[-1]), **V)


SIGMAS = karras_sigmas(10, 0.002, 80.0)
SIGMA_DATA = 0.5


def edm(x: Tensor, sigma: float, output: Tensor, sign: float = 1.0) -> Tensor:
    """The clean sample that EDM's net implies for x = x0 + sigma eps (Karras et al., eq. 7 and table 1)."""
    total = sigma**2 + SIGMA_DATA**2
    return SIGMA_DATA**2 / total * x + sign * sigma * SIGMA_DATA / math.sqrt(total) * output


def edm_euler() -> Tensor:
    x = sample() * math.sqrt(80.0**2 + 1)
    for sigma, following in pairwise([*SIGMAS.tolist(), 0.0]):
        scaled = x / math.sqrt(sigma**2 + SIGMA_DATA**2)
        x0 = edm(x, sigma, model(scaled, torch.tensor(math.log(sigma) / 4)))
        a_t, a_prev = 1 / (1 + sigma**2), 1 / (1 + following**2)
        vp, _ = euler_step(math.sqrt(a_t) * x, (x - x0) / sigma, a_t, a_prev)
        x = vp / math.sqrt(a_prev)
    return x


def edm_dpm(start: int = 0, sign: float = 1.0, limit: Limit | None = None) -> Tensor:
    """Their loop hands the net the unscaled sample; the last step is of no length."""
    x, history = sample(), ()
    if start:
        x = x + noise() * float(SIGMAS[start])
    for sigma, following in pairwise([*SIGMAS[start:].tolist(), 0.002]):
        x0 = edm(x, sigma, model(x, torch.tensor(math.log(sigma) / 4)), sign)
        a_t, a_prev = 1 / (1 + sigma**2), 1 / (1 + following**2)
        vp, _, history = dpmpp_step(math.sqrt(a_t) * x, (x - x0) / sigma, a_t, a_prev, history, limit=limit)
        x = vp / math.sqrt(a_prev)
    return x


THRESHOLD = dynamic_threshold(0.87, 0.5)
CASES = [
    Case("deis", "full_loop_no_noise", deis, mean=0.23916),
    Case("deis", "switch", deis, mean=0.23916),
    Case("deis", "switch back", deis, mean=0.23916),
    Case("deis", "full_loop_with_v_prediction", lambda: deis(**V), mean=0.091),
    Case("deis", "full_loop_with_noise", deis_with_noise, sum=315.3016, mean=0.41054),
    *(
        Case("dpm_single", name, lambda: single(sample(), TIMESTEPS), mean=0.2791)
        for name in ("full_loop_no_noise", "switch", "switch back")
    ),
    Case("dpm_single", "full_uneven_loop", lambda: single_from_within(sample(), linspace_timesteps(50, drop_zero=True)[3:]), mean=0.2574),
    Case("dpm_single", "full_loop_with_karras", single_karras, mean=0.2248),
    Case("dpm_single", "full_loop_with_v_prediction", lambda: single(sample(), TIMESTEPS, **V), mean=0.1453),
    Case("dpm_single", "full_loop_with_karras_and_v_prediction", lambda: single_karras(**V), mean=0.0649),
    Case("dpm_single", "full_loop_with_noise", single_with_noise, sum=269.2187, mean=0.3505),
    Case("dpm_multi_inverse", "full_loop_no_noise", inverse_loop, mean=0.7047),
    Case("dpm_multi_inverse", "full_loop_no_noise_thres", lambda: inverse_loop(rounded_levels_of(), limit=THRESHOLD), mean=19.8933),
    Case("dpm_multi_inverse", "full_loop_with_v_prediction", lambda: inverse_loop(**V), mean=1.5194),
    Case("dpm_multi_inverse", "full_loop_with_karras_and_v_prediction", inverse_karras, mean=1.7833, mean_within=2e-3),
    Case("dpm_multi_inverse", "switch", inverse_loop, mean=0.7047),
    Case("edm_euler", "full_loop_no_noise", edm_euler, sum=34.1855, mean=0.044, sum_within=1e-3),
    Case("edm_euler", "full_loop_device", edm_euler, sum=34.1855, mean=0.044, sum_within=1e-3),
    Case("edm_dpmsolver_multistep", "full_loop_no_noise", edm_dpm, mean=0.0001),
    Case("edm_dpmsolver_multistep", "full_loop_with_noise", lambda: edm_dpm(5), sum=8.1661, mean=0.0106),
    Case("edm_dpmsolver_multistep", "full_loop_no_noise_thres", lambda: edm_dpm(limit=THRESHOLD), mean=0.0080),
    Case("edm_dpmsolver_multistep", "full_loop_with_v_prediction", lambda: edm_dpm(sign=-1.0), mean=0.0092),
    Case("tcd", "full_loop_onestep_deter", lambda: tcd(1), sum=29.8715, mean=0.0389, sum_within=1e-3),
    Case("tcd", "full_loop_multistep_deter", lambda: tcd(10), sum=181.2040, mean=0.2359, sum_within=1e-3),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_the_exponential_solvers_give_the_stored_numbers(case: Case) -> None:
    check(case)
