"""DDPM: ancestral sampling, over all timesteps or a sub-sequence of them.

Paper    Ho et al. 2020, arXiv:2006.11239. In a sub-sequence their alpha_t becomes a_t / a_prev
Tensors  x, eps, noise (B, C, h, w) of any floating dtype
Copying  needs schedule.py beside it, and torch
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .schedule import (
    Denoiser,
    Limit,
    NoiseSource,
    OnStep,
    StepInfo,
    noise_source,
    predict_x0,
    step_levels,
    to_eps,
)


def ddpm_sigma(a_t: float, a_prev: float, variance: str = "fixed_small") -> float:
    """Standard deviation of a step's noise (section 3.2); 0 into level 1 (algorithm 2, line 3).

    "fixed_small" is the posterior variance beta-tilde (eq. 7), the same as DDIM's with eta = 1; "fixed_large"
    is beta itself. Raises ValueError for any other name, or unless 0 < a_t <= a_prev <= 1.
    """
    if not 0 < a_t <= a_prev <= 1:
        raise ValueError(
            f"a step goes from a noisier level to a cleaner one, 0 < a_t <= a_prev <= 1, got {a_t} and {a_prev}"
        )
    if variance not in ("fixed_small", "fixed_large"):
        raise ValueError(f"variance {variance!r} is not known; it is 'fixed_small' or 'fixed_large'")
    if a_prev == 1:
        return 0.0
    beta = 1 - a_t / a_prev
    return math.sqrt(beta if variance == "fixed_large" else (1 - a_prev) / (1 - a_t) * beta)


def ddpm_step(
    x: Tensor,
    eps: Tensor,
    a_t: float | Tensor,
    a_prev: float | Tensor,
    noise: Tensor | None = None,
    variance: str = "fixed_small",
    *,
    limit: Limit | None = None,
) -> tuple[Tensor, Tensor]:
    """One ancestral update from level `a_t` to `a_prev`; returns (x_prev, pred_x0) in x's dtype.

    x and eps (B, C, h, w); the levels are numbers or one-element tensors, values of alphas_cumprod. `noise`,
    of x's shape, is needed except into level 1; ValueError if it is then missing. `limit` (`clip_sample`,
    `dynamic_threshold`) brings pred_x0 into range, from which the step goes on.
    """
    a_t, a_prev = float(a_t), float(a_prev)
    sigma = ddpm_sigma(a_t, a_prev, variance)
    pred_x0 = predict_x0(x, eps, a_t, limit)
    if a_prev == 1:  # eq. 7 is then x0 alone, whatever a_t; said outright, so that a_t = 1 gives no 0/0
        return pred_x0.to(x.dtype), pred_x0.to(x.dtype)
    if sigma > 0 and noise is None:
        raise ValueError(f"the step from level {a_t:.6f} to {a_prev:.6f} adds noise, but noise is None")
    alpha = a_t / a_prev
    weight_x0 = math.sqrt(a_prev) * (1 - alpha) / (1 - a_t)  # eq. 7
    weight_x = math.sqrt(alpha) * (1 - a_prev) / (1 - a_t)  # eq. 7
    x_prev = weight_x0 * pred_x0 + weight_x * x.to(pred_x0.dtype)
    if noise is not None:
        x_prev = x_prev + sigma * noise.to(pred_x0)
    return x_prev.to(x.dtype), pred_x0.to(x.dtype)


def ddpm_sample(
    denoise: Denoiser,
    x: Tensor,
    timesteps: Sequence[int] | Tensor,
    alphas_cumprod: Tensor,
    *,
    variance: str = "fixed_small",
    final_alpha: float = 1.0,
    prediction: str = "epsilon",
    limit: Limit | None = None,
    noise: NoiseSource | None = None,
    generator: torch.Generator | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Denoise `x` (B, C, h, w), at the level of timesteps[0], over `timesteps`, to level `final_alpha`.

    timesteps (N,) descending; alphas_cumprod (T,). Noise sites: "step" (x's shape; step = index of the
    evaluation), drawn in every step but one into level 1. `prediction` says what `denoise` answers, one of
    PREDICTIONS, turned into noise at the latent's own level (`to_eps`); `limit` is `ddpm_step`'s. Gradients
    are not switched off here.
    """
    draw = noise_source(noise, generator)
    steps = step_levels(timesteps, alphas_cumprod, final_alpha)
    for step, (t, a_t, a_prev) in enumerate(steps):
        eps = to_eps(denoise(x, torch.tensor(t, device=x.device)), x, a_t, prediction)
        step_noise = draw("step", step, tuple(x.shape)) if ddpm_sigma(a_t, a_prev, variance) > 0 else None
        x, pred_x0 = ddpm_step(x, eps, a_t, a_prev, step_noise, variance, limit=limit)
        if on_step is not None:
            on_step(StepInfo(step, len(steps), t, x, pred_x0))
    return x
