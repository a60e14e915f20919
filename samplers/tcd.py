"""Trajectory consistency distillation: a step to the clean side of the next level, and noise back to it.

Paper    Zheng et al. 2024, arXiv:2402.19159, section 4.3 ("strategic stochastic sampling", algorithm 4)
Tensors  x, eps, noise (B, C, h, w) of any floating dtype
Copying  needs schedule.py beside it, and torch

For nets distilled as such (TCD-LoRA, Hyper-SD); gamma = 0 is DDIM over the same timesteps. Those are
`lcm_timesteps` as a rule.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .schedule import Denoiser, NoiseSource, OnStep, StepInfo, noise_source, predict_x0, step_levels, to_eps


def tcd_step(
    x: Tensor,
    eps: Tensor,
    a_t: float | Tensor,
    a_s: float | Tensor,
    a_prev: float | Tensor,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step from level `a_t` to the cleaner `a_s`, and with noise to `a_prev`; (x_prev, pred_x0).

    x and eps (B, C, h, w); both results in x's dtype, unclipped. `noise`, of x's shape, is used only where
    a_prev < a_s; ValueError if it is then missing, or unless 0 < a_t <= 1 and a_prev <= a_s <= 1.
    """
    a_t, a_s, a_prev = float(a_t), float(a_s), float(a_prev)
    if not 0 <= a_prev <= a_s <= 1:
        raise ValueError(f"levels are {a_s} and {a_prev}; expected 0 <= a_prev <= a_s <= 1")
    pred_x0 = predict_x0(x, eps, a_t)
    x_s = math.sqrt(a_s) * pred_x0 + math.sqrt(1 - a_s) * eps.to(pred_x0.dtype)
    if a_prev < a_s:
        if noise is None:
            raise ValueError(
                f"the step to level {a_s:.6f} and back to {a_prev:.6f} adds noise, but noise is None"
            )
        ratio = a_prev / a_s
        x_s = math.sqrt(ratio) * x_s + math.sqrt(1 - ratio) * noise.to(pred_x0)
    return x_s.to(x.dtype), pred_x0.to(x.dtype)


def tcd_sample(
    denoise: Denoiser,
    x: Tensor,
    timesteps: Sequence[int] | Tensor,
    alphas_cumprod: Tensor,
    *,
    gamma: float = 0.3,
    final_alpha: float = 1.0,
    prediction: str = "epsilon",
    noise: NoiseSource | None = None,
    generator: torch.Generator | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Denoise `x` (B, C, h, w), at the level of timesteps[0], over `timesteps`, to level `final_alpha`.

    timesteps (N,) descending, as a rule `lcm_timesteps`; alphas_cumprod (T,). Each step goes to the timestep
    floor((1 - gamma) times the next one) and is noised back; the last goes to `final_alpha` and gets none.
    gamma in 0..1 is the paper's stochastic parameter: 0 deterministic, 1 as an LCM; diffusers calls it eta.
    Noise sites: "step" (x's shape; step = index of the evaluation). `prediction` says what `denoise` answers,
    one of PREDICTIONS, turned into noise at the latent's own level (`to_eps`). Gradients are not switched off
    here. ValueError for gamma outside 0..1.
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma is {gamma}; it must lie in 0..1 (0: deterministic)")
    draw = noise_source(noise, generator)
    steps = step_levels(timesteps, alphas_cumprod, final_alpha)
    for step, (t, a_t, a_prev) in enumerate(steps):
        eps = to_eps(denoise(x, torch.tensor(t, device=x.device)), x, a_t, prediction)
        a_s, step_noise = a_prev, None
        if step < len(steps) - 1 and gamma > 0:
            a_s = float(alphas_cumprod[math.floor((1 - gamma) * steps[step + 1][0])])
            step_noise = draw("step", step, tuple(x.shape))
        x, pred_x0 = tcd_step(x, eps, a_t, a_s, a_prev, step_noise)
        if on_step is not None:
            on_step(StepInfo(step, len(steps), t, x, pred_x0))
    return x
