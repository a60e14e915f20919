"""DPM-Solver++(2M): second order from one evaluation a step, by remembering the last prediction.

Paper    Lu et al. 2022, arXiv:2211.01095, algorithm 2. alpha and sigma there are sqrt(a) and sqrt(1 - a) of a
         level a here, lambda = log(alpha / sigma)
Tensors  x, eps (B, C, h, w) of any floating dtype
Copying  needs schedule.py beside it, and torch
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .schedule import (
    Denoiser,
    NoiseSource,
    OnStep,
    StepInfo,
    half_log_snr,
    noise_source,
    predict_x0,
    solver_steps,
    to_eps,
)


def dpmpp_step(
    x: Tensor, eps: Tensor, a_t: float | Tensor, a_prev: float | Tensor, history: tuple[Tensor, ...] = ()
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """One update from level `a_t` to `a_prev`; returns (x_prev, pred_x0, history).

    x and eps (B, C, h, w); the levels are values of alphas_cumprod. x_prev and pred_x0 come in x's dtype,
    unclipped. `history` is what the last call returned: its prediction in at least float32, and its level, a
    float64 number on the CPU. With () the step is of first order, which is DDIM's with eta = 0; so is every
    step into level 1, where lambda is infinite. Raises ValueError unless a_t is in (0, 1).
    """
    a_t, a_prev = float(a_t), float(a_prev)
    now = half_log_snr(a_t)
    pred_x0 = predict_x0(x, eps, a_t)
    mean = pred_x0
    if history and a_prev < 1:
        last_x0, last_level = history
        # h_i / h_{i-1} = 1 / r_i
        ratio = (half_log_snr(a_prev) - now) / (now - half_log_snr(float(last_level)))
        mean = pred_x0 + (ratio / 2) * (pred_x0 - last_x0)  # D_i, line 9
    shrink = math.sqrt((1 - a_prev) / (1 - a_t))  # sigma_i / sigma_{i-1}
    gain = math.sqrt(a_prev) - shrink * math.sqrt(a_t)  # -alpha_i (e^-h - 1), also where h is infinite
    x_prev = shrink * x.to(pred_x0.dtype) + gain * mean  # line 10
    history = (pred_x0, torch.tensor(a_t, dtype=torch.float64))
    return x_prev.to(x.dtype), pred_x0.to(x.dtype), history


def dpmpp_sample(
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

    timesteps (N,) descending, as a rule `linspace_timesteps(N, drop_zero=True)`, or `karras_steps` together
    with its `levels` (N,); alphas_cumprod (T,). The last step is of first order in runs of fewer than 15
    ("lower order final", which few steps need to be stable), and always into level 1. Draws no noise; `noise`
    and `generator` are there because every sampler has them. `prediction` says what `denoise` answers, one of
    PREDICTIONS, turned into noise at the latent's own level (`to_eps`). Gradients are not switched off here.
    """
    noise_source(noise, generator)  # refuses two sources
    steps = solver_steps(timesteps, alphas_cumprod, final_alpha, levels)
    history: tuple[Tensor, ...] = ()
    for step, (t, a_t, a_prev) in enumerate(steps):
        eps = to_eps(denoise(x, torch.tensor(t, device=x.device)), x, a_t, prediction)
        if step == len(steps) - 1 < 14:
            history = ()
        x, pred_x0, history = dpmpp_step(x, eps, a_t, a_prev, history)
        if on_step is not None:
            on_step(StepInfo(step, len(steps), t, x, pred_x0))
    return x
