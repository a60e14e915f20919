"""Latent consistency models: a clean latent from each evaluation, noised again in between.

Paper    Luo et al. 2023, arXiv:2310.04378 (multistep sampling: algorithm 3)
Tensors  x, eps, noise (B, C, h, w) of any floating dtype
Copying  needs schedule.py beside it, and torch

Only for nets distilled as such (LCM, LCM-LoRA), in 1 to 8 steps; others give a blur.
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

SIGMA_DATA = 0.5  # of the boundary condition; published models and LCM-LoRA are trained with these two
TIMESTEP_SCALING = 10.0


def lcm_timesteps(num_steps: int, *, distilled_steps: int = 50, num_train_timesteps: int = 1000) -> Tensor:
    """`num_steps` of the timesteps the model was distilled on, (N,) int64 descending: 999, 759, 499, 259.

    Those are T, T - k, ..., k with k = T // distilled_steps, less 1 each. Taken are numbers floor(i
    distilled_steps / N), i = 0, 1, ..., as diffusers does. Raises ValueError for more steps than were
    distilled, or fewer than 1.
    """
    if not 1 <= num_steps <= distilled_steps <= num_train_timesteps:
        raise ValueError(
            f"num_steps is {num_steps}; this model was distilled on {distilled_steps} timesteps, "
            f"of {num_train_timesteps}: take 1 to {distilled_steps}"
        )
    stride = num_train_timesteps // distilled_steps
    taken = [i * distilled_steps // num_steps for i in range(num_steps)]
    return torch.tensor([(distilled_steps - i) * stride - 1 for i in taken])


def lcm_step(
    x: Tensor,
    eps: Tensor,
    t: float,
    a_t: float | Tensor,
    a_prev: float | Tensor,
    noise: Tensor | None = None,
    *,
    limit: Limit | None = None,
) -> tuple[Tensor, Tensor]:
    """One consistency step from level `a_t` to `a_prev`; returns (x_prev, pred_x0) in x's dtype.

    x and eps (B, C, h, w); t the timestep, a_t its level. pred_x0 = c_skip x + c_out (clean latent implied by
    eps), where c_skip = 1 and c_out = 0 at t = 0. `noise`, of x's shape, is needed except into level 1;
    ValueError if it is then missing. `limit` (`clip_sample`, `dynamic_threshold`) brings the clean latent
    implied by eps into range.
    """
    a_t, a_prev = float(a_t), float(a_prev)
    scaled = TIMESTEP_SCALING * t
    c_skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
    c_out = scaled / math.hypot(scaled, SIGMA_DATA)
    pred_x0 = c_out * predict_x0(x, eps, a_t, limit)
    pred_x0 = pred_x0 + c_skip * x.to(pred_x0.dtype)
    if a_prev == 1:
        return pred_x0.to(x.dtype), pred_x0.to(x.dtype)
    if noise is None:
        raise ValueError(f"the step from level {a_t:.6f} to {a_prev:.6f} adds noise, but noise is None")
    x_prev = math.sqrt(a_prev) * pred_x0 + math.sqrt(1 - a_prev) * noise.to(pred_x0)
    return x_prev.to(x.dtype), pred_x0.to(x.dtype)


def lcm_sample(
    denoise: Denoiser,
    x: Tensor,
    timesteps: Sequence[int] | Tensor,
    alphas_cumprod: Tensor,
    *,
    prediction: str = "epsilon",
    limit: Limit | None = None,
    noise: NoiseSource | None = None,
    generator: torch.Generator | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Denoise `x` (B, C, h, w), at the level of timesteps[0], over `timesteps`, to a clean latent.

    timesteps (N,) descending, as a rule `lcm_timesteps`; alphas_cumprod (T,). The last step gives the
    prediction itself, so there is no final_alpha. Noise sites: "step" (x's shape; step = index of the
    evaluation), drawn in every step but the last. `prediction` says what `denoise` answers, one of
    PREDICTIONS, turned into noise at the latent's own level (`to_eps`); `limit` is `lcm_step`'s. Gradients
    are not switched off here.
    """
    draw = noise_source(noise, generator)
    steps = step_levels(timesteps, alphas_cumprod)
    for step, (t, a_t, a_prev) in enumerate(steps):
        eps = to_eps(denoise(x, torch.tensor(t, device=x.device)), x, a_t, prediction)
        step_noise = draw("step", step, tuple(x.shape)) if a_prev < 1 else None
        x, pred_x0 = lcm_step(x, eps, t, a_t, a_prev, step_noise, limit=limit)
        if on_step is not None:
            on_step(StepInfo(step, len(steps), t, x, pred_x0))
    return x
