"""DPM-Solver-2 in sigma: a step by the slope at its middle, deterministic or ancestral.

Papers   Karras et al. 2022, arXiv:2206.00364, appendix D.2 (second-order methods in sigma); Lu et al. 2022,
         arXiv:2206.00927, algorithm 4 with r_1 = 1/2, whose middle is that of log sigma; ancestral: Song et
         al. 2021, arXiv:2010.02502, eq. 16 with eta = 1
Tensors  x, eps, noise (B, C, h, w) of any floating dtype
Copying  needs schedule.py and euler.py beside it, and torch

k-diffusion and diffusers call these "DPM2" and "DPM2 a". Two evaluations a step; N steps into a clean latent
take 2 N - 1.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .euler import euler_sigmas, euler_step
from .schedule import (
    Denoiser,
    NoiseSource,
    OnStep,
    StepInfo,
    noise_source,
    predict_x0,
    sigma_steps,
    solver_steps,
    to_eps,
)


def middle_level(a_t: float, a_prev: float, eta: float = 0.0) -> float:
    """The level halfway in log sigma between `a_t` and the end of a step's deterministic part.

    Raises ValueError as `euler_sigmas`, and for a step into level 1, which has no middle.
    """
    sigma, down, _ = euler_sigmas(a_t, a_prev, eta)
    if down == 0:
        raise ValueError(
            f"the step from level {a_t} leads to sigma 0, which has no middle in log sigma; take Euler's"
        )
    return 1 / (1 + sigma * down)  # the middle's sigma squared is their product


def dpm2_step(
    x: Tensor,
    eps_middle: Tensor,
    a_t: float | Tensor,
    a_prev: float | Tensor,
    eta: float = 0.0,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step from level `a_t` to `a_prev` by the slope at its middle; (x_prev, pred_x0) in x's dtype.

    x (B, C, h, w); eps_middle is the noise predicted at `middle_level` for what `euler_step` makes of x
    there. With `eta` = 1 the step is ancestral and adds `noise`, of x's shape. Raises ValueError as
    `euler_step`.
    """
    return euler_step(x, eps_middle, a_t, a_prev, eta, noise)


def dpm2_sample(
    denoise: Denoiser,
    x: Tensor,
    timesteps: Sequence[float] | Tensor,
    alphas_cumprod: Tensor,
    *,
    eta: float = 0.0,
    levels: Sequence[float] | Tensor | None = None,
    final_alpha: float = 1.0,
    prediction: str = "epsilon",
    noise: NoiseSource | None = None,
    generator: torch.Generator | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Denoise `x` (B, C, h, w), at the level of timesteps[0], over `timesteps`, to level `final_alpha`.

    timesteps (N,) descending, as a rule fractions or `karras_steps` together with its `levels` (N,), see
    `solver_steps`; alphas_cumprod (T,). The timestep of a middle is found linearly in log sigma
    (`sigma_steps`). A step into level 1 is Euler's. eta = 1 is ancestral. Noise sites: "step" (x's shape;
    step = index of the step), drawn only where the step adds noise. Each evaluation is reported: after the
    first of a step x is at its middle. `prediction` says what `denoise` answers, one of PREDICTIONS, turned
    into noise at the latent's own level (`to_eps`). Gradients are not switched off here.
    """
    draw = noise_source(noise, generator)
    steps = solver_steps(timesteps, alphas_cumprod, final_alpha, levels)
    total = sum(1 + (a_prev < 1) for _, _, a_prev in steps)
    done = 0
    for step, (t, a_t, a_prev) in enumerate(steps):
        eps = to_eps(denoise(x, torch.tensor(t, device=x.device)), x, a_t, prediction)
        halfway = a_prev if a_prev == 1 else middle_level(a_t, a_prev, eta)
        there, pred_x0 = euler_step(x, eps, a_t, halfway)
        if on_step is not None:
            on_step(StepInfo(done, total, t, there, pred_x0))
        done += 1
        if a_prev == 1:
            return there
        told, _ = sigma_steps([math.sqrt((1 - halfway) / halfway)], alphas_cumprod)
        t_middle = float(told)
        answer = denoise(there, torch.tensor(t_middle, device=x.device))
        eps_middle = to_eps(answer, there, halfway, prediction)
        pred_x0 = predict_x0(there, eps_middle, halfway).to(x.dtype)
        step_noise = draw("step", step, tuple(x.shape)) if euler_sigmas(a_t, a_prev, eta)[2] > 0 else None
        x, _ = dpm2_step(x, eps_middle, a_t, a_prev, eta, step_noise)
        if on_step is not None:
            on_step(StepInfo(done, total, t_middle, x, pred_x0))
        done += 1
    return x
