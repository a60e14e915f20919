"""The samplers of samplers/ by name, each with the timesteps that it is usually run over.

`sample` is a whole run, for restoring; `make_solver` gives the steps alone, for blended sampling.

Tensors  as in the samplers: x (B, C, h, w); timesteps (N,)
Copying  needs samplers/ddim.py, samplers/dpmpp.py, samplers/euler.py, samplers/lcm.py, samplers/pndm.py,
         samplers/repaint.py, samplers/schedule.py, samplers/unipc.py
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from samplers.ddim import ddim_sample
from samplers.dpmpp import dpmpp_sample, dpmpp_step
from samplers.euler import euler_sample, euler_step
from samplers.lcm import lcm_sample, lcm_step, lcm_timesteps
from samplers.pndm import pndm_sample
from samplers.repaint import Evaluation, History, Solver, ddim_solver
from samplers.schedule import (
    Denoiser,
    NoiseSource,
    OnStep,
    leading_timesteps,
    linspace_timesteps,
    start_timesteps,
    trailing_timesteps,
)
from samplers.unipc import unipc_sample, unipc_step

_SPACINGS: dict[str, Callable[[int], Tensor]] = {
    # 999 first, 0 left out: the solvers end in level 1 from it.
    "linspace": partial(linspace_timesteps, drop_zero=True),
    "leading": leading_timesteps,  # Stable Diffusion 1.x's: 951 first for 20 steps
    "trailing": trailing_timesteps,  # 999 first, where Eq. 3 of PASD starts
}
# Name -> its usual spacing. DDIM's and Euler's are not SD's own "leading": restoring starts at the last
# timestep.
_USUAL = {
    **dict.fromkeys(("unipc", "dpmpp"), "linspace"),
    **dict.fromkeys(("ddim", "euler", "euler_a"), "trailing"),
    "pndm": "leading",
}


def make_timesteps(sampler: str, num_steps: int, spacing: str = "auto") -> Tensor:
    """The timesteps (N,) of a run of `sampler`. ValueError for an LCM with another spacing than its own."""
    if sampler == "lcm":
        if spacing != "auto":
            raise ValueError(f"spacing is {spacing!r}; lcm has timesteps of its own, expected 'auto'")
        return lcm_timesteps(num_steps)
    return _SPACINGS[_USUAL[sampler] if spacing == "auto" else spacing](num_steps)


def partial_timesteps(sampler: str, num_steps: int, start: float, spacing: str = "auto") -> Tensor:
    """The timesteps of a run of an edit that begins at the fraction `start` of the schedule (MSBD's T' / T).

    Those of `num_steps` of a whole run that lie there; DDIM's are then spaced as the paper's, "leading". Of
    an LCM's few hardly one would: it takes as many as the fraction has of them, from its own grid below it.
    """
    if sampler == "lcm" and spacing == "auto" and start < 1:
        distilled = max(1, round(50 * start))
        few = min(max(1, round(num_steps * start)), distilled)
        return lcm_timesteps(few, distilled_steps=distilled, num_train_timesteps=20 * distilled)
    if sampler == "ddim" and spacing == "auto":
        spacing = "leading"
    return start_timesteps(make_timesteps(sampler, num_steps, spacing), start)


def evaluations(sampler: str, num_steps: int) -> int:
    """How often the nets are asked in a run; pndm asks once more, at its second timestep."""
    return num_steps + (sampler == "pndm" and num_steps > 1)


def sample(
    sampler: str, denoise: Denoiser, x: Tensor, timesteps: Tensor, alphas_cumprod: Tensor, *, noise: NoiseSource,
    eta: float = 0.0, final_alpha: float = 1.0, prediction: str = "epsilon", on_step: OnStep | None = None,
) -> Tensor:  # fmt: skip
    """The clean latent (B, C, h, w), from `x` at the level of timesteps[0], by the sampler of that name.

    Only ddim heeds `eta`, and lcm alone does not heed `final_alpha`, the level that the last step leads to.
    `prediction` says what `denoise` answers.
    """
    if sampler == "lcm":
        return lcm_sample(
            denoise, x, timesteps, alphas_cumprod, prediction=prediction, noise=noise, on_step=on_step
        )
    run = {
        "unipc": unipc_sample,
        "dpmpp": dpmpp_sample,
        "pndm": pndm_sample,
        "ddim": partial(ddim_sample, eta=eta),
        "euler": euler_sample,
        "euler_a": partial(euler_sample, eta=1.0),
    }[sampler]
    return run(
        denoise, x, timesteps, alphas_cumprod, final_alpha=final_alpha, prediction=prediction, noise=noise, on_step=on_step
    )  # fmt: skip


def make_solver(sampler: str, eta: float) -> Solver:
    """The steps of "ddim" (which alone heeds `eta`), "unipc", "dpmpp", "euler" or "lcm"."""
    return ddim_solver(eta) if sampler == "ddim" else _SOLVERS[sampler]


def _unipc(
    x: Tensor, eps: Tensor, now: Evaluation, history: History, noise: Callable[[], Tensor]
) -> tuple[Tensor, Tensor, History]:
    # What the corrector starts from is not blended; only the part that is repainted is kept of the result.
    return unipc_step(x, eps, now.a_t, now.a_prev, history)


def _dpmpp(
    x: Tensor, eps: Tensor, now: Evaluation, history: History, noise: Callable[[], Tensor]
) -> tuple[Tensor, Tensor, History]:
    return dpmpp_step(x, eps, now.a_t, now.a_prev, history)


def _euler(
    x: Tensor, eps: Tensor, now: Evaluation, history: History, noise: Callable[[], Tensor]
) -> tuple[Tensor, Tensor, History]:
    return *euler_step(x, eps, now.a_t, now.a_prev), ()


def _lcm(
    x: Tensor, eps: Tensor, now: Evaluation, history: History, noise: Callable[[], Tensor]
) -> tuple[Tensor, Tensor, History]:
    return *lcm_step(x, eps, now.t, now.a_t, now.a_prev, noise() if now.a_prev < 1 else None), ()


_SOLVERS: dict[str, Solver] = {"unipc": _unipc, "dpmpp": _dpmpp, "euler": _euler, "lcm": _lcm}
