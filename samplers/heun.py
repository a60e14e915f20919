"""Heun's method in sigma: Euler's step, averaged with the slope where it leads.

Paper    Karras et al. 2022, arXiv:2206.00364, algorithm 1, without its churn (S_churn = 0)
Tensors  x, eps (B, C, h, w) of any floating dtype
Copying  needs schedule.py and euler.py beside it, and torch

Second order from two evaluations a step; N steps into a clean latent take 2 N - 1.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .euler import euler_step
from .schedule import Denoiser, NoiseSource, OnStep, StepInfo, noise_source, predict_x0, solver_steps, to_eps


def heun_step(
    x: Tensor, eps: Tensor, eps_there: Tensor, a_t: float | Tensor, a_prev: float | Tensor
) -> tuple[Tensor, Tensor]:
    """One step from level `a_t` to `a_prev` by the mean of two slopes; (x_prev, pred_x0) in x's dtype.

    x (B, C, h, w); eps is the noise predicted for x, eps_there the one for what `euler_step` makes of them,
    at `a_prev`. pred_x0 is the clean latent that the mean implies, unclipped. ValueError unless the levels
    are in (0, 1].
    """
    mean = (eps.to(torch.promote_types(eps.dtype, torch.float32)) + eps_there) / 2
    return euler_step(x, mean, a_t, a_prev)


def heun_sample(
    denoise: Denoiser,
    x: Tensor,
    timesteps: Sequence[float] | Tensor,
    alphas_cumprod: Tensor,
    *,
    levels: Sequence[float] | Tensor | None = None,
    final_alpha: float = 1.0,
    prediction: str = "epsilon",
    noise: NoiseSource | None = None,
    generator: torch.Generator | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Denoise `x` (B, C, h, w), at the level of timesteps[0], over `timesteps`, to level `final_alpha`.

    timesteps (N,) descending, as a rule fractions or `karras_steps` together with its `levels` (N,), see
    `solver_steps`; alphas_cumprod (T,). The last step, at whose end no timestep is given, is Euler's. Each
    evaluation is reported: after the first of a step x is Euler's prediction. Draws no noise; `noise` and
    `generator` are there because every sampler has them. `prediction` says what `denoise` answers, one of
    PREDICTIONS, turned into noise at the latent's own level (`to_eps`). Gradients are not switched off here.
    """
    noise_source(noise, generator)  # refuses two sources
    steps = solver_steps(timesteps, alphas_cumprod, final_alpha, levels)
    total = max(2 * len(steps) - 1, 0)
    for step, (t, a_t, a_prev) in enumerate(steps):
        eps = to_eps(denoise(x, torch.tensor(t, device=x.device)), x, a_t, prediction)
        there, pred_x0 = euler_step(x, eps, a_t, a_prev)
        if on_step is not None:
            on_step(StepInfo(2 * step, total, t, there, pred_x0))
        if step == len(steps) - 1:
            return there
        t_prev = steps[step + 1][0]
        eps_there = to_eps(denoise(there, torch.tensor(t_prev, device=x.device)), there, a_prev, prediction)
        pred_x0 = predict_x0(there, eps_there, a_prev).to(x.dtype)
        x, _ = heun_step(x, eps, eps_there, a_t, a_prev)
        if on_step is not None:
            on_step(StepInfo(2 * step + 1, total, t_prev, x, pred_x0))
    return x
