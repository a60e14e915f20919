"""The samplers of samplers/ by name, each with the timesteps that it is usually run over.

`sample` is a whole run, for restoring; `make_solver` gives the steps alone, for blended sampling.

Tensors  as in the samplers: x (B, C, h, w); timesteps (N,)
Copying  needs samplers/ddim.py, samplers/dpm2.py, samplers/dpm_single.py, samplers/dpmpp.py,
         samplers/dpmpp_sde.py, samplers/euler.py, samplers/heun.py, samplers/lcm.py, samplers/lms.py,
         samplers/pndm.py, samplers/repaint.py, samplers/schedule.py, samplers/tcd.py, samplers/unipc.py
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from samplers.ddim import ddim_sample
from samplers.dpm2 import dpm2_sample
from samplers.dpm_single import dpm_single_sample
from samplers.dpmpp import dpmpp_sample, dpmpp_step
from samplers.dpmpp_sde import dpmpp_msde_sample, dpmpp_msde_step, dpmpp_sde_sample
from samplers.euler import euler_sample, euler_sigmas, euler_step
from samplers.heun import heun_sample
from samplers.lcm import lcm_sample, lcm_step, lcm_timesteps
from samplers.lms import deis_sample, lms_sample, lms_step
from samplers.pndm import pndm_sample
from samplers.repaint import Evaluation, History, Solver, ddim_solver
from samplers.schedule import (
    Denoiser,
    NoiseSource,
    OnStep,
    beta_sigmas,
    exponential_sigmas,
    karras_sigmas,
    leading_timesteps,
    linspace_timesteps,
    sigma_range,
    sigma_steps,
    start_timesteps,
    trailing_timesteps,
)
from samplers.tcd import tcd_sample
from samplers.unipc import unipc_sample, unipc_step

_SPACINGS: dict[str, Callable[[int], Tensor]] = {
    # 999 first, 0 left out: the solvers end in level 1 from it.
    "linspace": partial(linspace_timesteps, drop_zero=True),
    "leading": leading_timesteps,  # Stable Diffusion 1.x's: 951 first for 20 steps
    "trailing": trailing_timesteps,  # 999 first, where Eq. 3 of PASD starts
}
_SIGMA_SPACINGS: dict[str, Callable[[int, float, float], Tensor]] = {
    "karras": karras_sigmas,
    "exponential": exponential_sigmas,
    "beta": beta_sigmas,
}
# Name -> its usual spacing. DDIM's and Euler's are not SD's own "leading": restoring starts at the last
# timestep.
_IN_SIGMA = ("euler", "euler_a", "heun", "dpm2", "dpm2_a", "lms", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde")
_USUAL = {
    **dict.fromkeys(("unipc", "dpmpp", "dpmpp_3m", "dpmpp_2s", "deis"), "linspace"),
    **dict.fromkeys(("ddim", *_IN_SIGMA), "trailing"),
    "pndm": "leading",
}
_DISTILLED = ("lcm", "tcd")  # have timesteps of their own
_BY_TIMESTEP = ("ddim", "pndm", *_DISTILLED)  # their formulas are of the table's levels
_TWICE = ("heun", "dpm2", "dpm2_a", "dpmpp_sde")  # ask the nets twice in a step


def make_steps(
    sampler: str, num_steps: int, spacing: str, alphas_cumprod: Tensor, sigma_min: float | None = None,
    sigma_max: float | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The timesteps (N,) of a run of `sampler`, and the levels (N,) where they are not the table's.

    Spacings "karras", "exponential" and "beta" spread the sigmas, from `sigma_max` to `sigma_min` or from end
    to end of the table; the nets are told fractions of timesteps by the solvers in sigma, whole ones by the
    others, as diffusers does. ValueError for a sampler of timesteps with such a spacing, a range that is
    none, and a range with another spacing.
    """
    if spacing not in _SIGMA_SPACINGS:
        if sigma_min is not None or sigma_max is not None:
            raise ValueError(
                f"sigma_min and sigma_max are for spacing {', '.join(_SIGMA_SPACINGS)}; spacing is {spacing!r}"
            )
        return make_timesteps(sampler, num_steps, spacing), None
    if sampler in _BY_TIMESTEP:
        raise ValueError(
            f"spacing is {spacing!r}; {sampler} steps over whole timesteps, expected another spacing or sampler "
            "(euler takes ddim's steps)"
        )
    least, most = sigma_range(alphas_cumprod)
    low, high = least if sigma_min is None else sigma_min, most if sigma_max is None else sigma_max
    if not low < high or high > most * (1 + 1e-6) or low < least * (1 - 1e-6):
        raise ValueError(
            f"sigma_min is {low:g} and sigma_max {high:g}; expected {least:.4g} <= sigma_min < sigma_max <= {most:.4g}"
        )
    sigmas = _SIGMA_SPACINGS[spacing](num_steps, low, min(high, most))
    return sigma_steps(sigmas, alphas_cumprod, rounded=sampler not in _IN_SIGMA)


def make_timesteps(sampler: str, num_steps: int, spacing: str = "auto") -> Tensor:
    """The timesteps (N,) of a run of `sampler`, all of the table's. ValueError for one of distilled nets with
    another spacing than its own.
    """
    if sampler in _DISTILLED:
        if spacing != "auto":
            raise ValueError(f"spacing is {spacing!r}; {sampler} has timesteps of its own, expected 'auto'")
        return lcm_timesteps(num_steps)
    return _SPACINGS[_USUAL[sampler] if spacing == "auto" else spacing](num_steps)


def partial_timesteps(
    sampler: str, num_steps: int, start: float, spacing: str = "auto", alphas_cumprod: Tensor | None = None
) -> Tensor:
    """The timesteps of a run of an edit that begins at the fraction `start` of the schedule (MSBD's T' / T).

    Those of `num_steps` of a whole run that lie there; DDIM's are then spaced as the paper's, "leading". Of
    an LCM's few hardly one would: it takes as many as the fraction has of them, from its own grid below it.
    Spacings "karras", "exponential" and "beta" need `alphas_cumprod` (T,): they give the timesteps nearest to
    those sigmas, each at its own level; where two sigmas have one nearest timestep, it comes once.
    """
    if spacing in _SIGMA_SPACINGS and alphas_cumprod is not None and sampler not in _DISTILLED:
        sigmas = _SIGMA_SPACINGS[spacing](num_steps, *sigma_range(alphas_cumprod))
        timesteps, _ = sigma_steps(sigmas, alphas_cumprod, rounded=True)
        return start_timesteps(timesteps.unique().flip(0), start)
    if sampler == "lcm" and spacing == "auto" and start < 1:
        distilled = max(1, round(50 * start))
        few = min(max(1, round(num_steps * start)), distilled)
        return lcm_timesteps(few, distilled_steps=distilled, num_train_timesteps=20 * distilled)
    if sampler == "ddim" and spacing == "auto":
        spacing = "leading"
    return start_timesteps(make_timesteps(sampler, num_steps, spacing), start)


def evaluations(sampler: str, num_steps: int, *, clean: bool = True) -> int:
    """How often the nets are asked in a run, which ends `clean` or at the table's first level.

    pndm asks once more, at its second timestep; the solvers that ask twice do not in a step that ends clean,
    nor Heun's in any last step.
    """
    if sampler == "pndm":
        return num_steps + (num_steps > 1)
    if sampler in _TWICE:
        return 2 * num_steps - (clean or sampler == "heun")
    return num_steps


_RUNS: dict[str, Callable[..., Tensor]] = {
    "unipc": unipc_sample,
    "dpmpp": dpmpp_sample,
    "dpmpp_3m": partial(dpmpp_sample, order=3),
    "dpmpp_2s": dpm_single_sample,
    "deis": deis_sample,
    "pndm": pndm_sample,
    "ddim": ddim_sample,
    "euler": euler_sample,
    "euler_a": partial(euler_sample, eta=1.0),
    "heun": heun_sample,
    "dpm2": dpm2_sample,
    "dpm2_a": partial(dpm2_sample, eta=1.0),
    "lms": lms_sample,
    "dpmpp_sde": dpmpp_sde_sample,
    "dpmpp_2m_sde": dpmpp_msde_sample,
    "dpmpp_3m_sde": partial(dpmpp_msde_sample, order=3),
    "lcm": lcm_sample,
    "tcd": tcd_sample,
}


def sample(
    sampler: str, denoise: Denoiser, x: Tensor, timesteps: Tensor, alphas_cumprod: Tensor, *, noise: NoiseSource,
    levels: Tensor | None = None, eta: float = 0.0, final_alpha: float = 1.0, prediction: str = "epsilon",
    on_step: OnStep | None = None,
) -> Tensor:  # fmt: skip
    """The clean latent (B, C, h, w), from `x` at the first level, by the sampler of that name.

    `levels` as `make_steps` gives them; only ddim heeds `eta`, and lcm alone does not heed `final_alpha`, the
    level that the last step leads to. `prediction` says what `denoise` answers.
    """
    options: dict[str, Any] = {"prediction": prediction, "noise": noise, "on_step": on_step}
    options |= {} if sampler == "lcm" else {"final_alpha": final_alpha}
    options |= {"eta": eta} if sampler == "ddim" else {}
    options |= {} if levels is None else {"levels": levels}
    return _RUNS[sampler](denoise, x, timesteps, alphas_cumprod, **options)


def make_solver(sampler: str, eta: float) -> Solver:
    """The steps of "ddim" (which alone heeds `eta`) or of another that asks the net once a step."""
    return ddim_solver(eta) if sampler == "ddim" else _SOLVERS[sampler]


def _multistep(step: Callable[..., tuple[Tensor, Tensor, History]], **options: Any) -> Solver:
    """The solver of a `*_step` with a history, which draws nothing.

    Of UniPC's, what the corrector starts from is not blended; only what is repainted is kept of the result.
    """

    def solve(
        x: Tensor, eps: Tensor, now: Evaluation, history: History, noise: Callable[[], Tensor]
    ) -> tuple[Tensor, Tensor, History]:
        return step(x, eps, now.a_t, now.a_prev, history, **options)

    return solve


def _euler(eta: float) -> Solver:
    def solve(
        x: Tensor, eps: Tensor, now: Evaluation, history: History, noise: Callable[[], Tensor]
    ) -> tuple[Tensor, Tensor, History]:
        drawn = noise() if euler_sigmas(now.a_t, now.a_prev, eta)[2] > 0 else None
        return *euler_step(x, eps, now.a_t, now.a_prev, eta, drawn), ()

    return solve


def _msde(order: int) -> Solver:
    def solve(
        x: Tensor, eps: Tensor, now: Evaluation, history: History, noise: Callable[[], Tensor]
    ) -> tuple[Tensor, Tensor, History]:
        drawn = noise() if now.a_prev < 1 else None
        return dpmpp_msde_step(x, eps, now.a_t, now.a_prev, history, order=order, noise=drawn)

    return solve


def _lcm(
    x: Tensor, eps: Tensor, now: Evaluation, history: History, noise: Callable[[], Tensor]
) -> tuple[Tensor, Tensor, History]:
    return *lcm_step(x, eps, now.t, now.a_t, now.a_prev, noise() if now.a_prev < 1 else None), ()


_SOLVERS: dict[str, Solver] = {
    "unipc": _multistep(unipc_step),
    "dpmpp": _multistep(dpmpp_step),
    "dpmpp_3m": _multistep(dpmpp_step, order=3),
    "deis": _multistep(lms_step, order=2, variable="log_sigma"),
    "lms": _multistep(lms_step),
    "euler": _euler(0.0),
    "euler_a": _euler(1.0),
    "dpmpp_2m_sde": _msde(2),
    "dpmpp_3m_sde": _msde(3),
    "lcm": _lcm,
}
