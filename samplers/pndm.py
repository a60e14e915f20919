"""PNDM's pseudo linear multistep method (PLMS), started by one pseudo improved Euler step.

Paper    Liu et al. 2022, arXiv:2202.09778, section 3.3. Its transfer part is DDIM's step with eta = 0
Tensors  x, eps (B, C, h, w) of any floating dtype
Copying  needs schedule.py and ddim.py beside it, and torch

This is LDM's PLMS sampler and diffusers' PNDMScheduler with skip_prk_steps=True, which are the same: N steps
take N + 1 evaluations, the first step being made twice.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .ddim import ddim_step
from .schedule import (
    Denoiser,
    NoiseSource,
    OnStep,
    StepInfo,
    noise_source,
    step_levels,
    to_eps,
    working_dtype,
)

# Adams-Bashforth weights of the newest eps and those before it, by their number, for evenly spaced steps.
_ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def pndm_step(
    x: Tensor, eps: Tensor, a_t: float | Tensor, a_prev: float | Tensor, history: tuple[Tensor, ...] = ()
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """One update from level `a_t` to `a_prev`; returns (x_prev, pred_x0, history).

    x and eps (B, C, h, w); the levels are values of alphas_cumprod. x_prev and pred_x0, the clean latent that
    the combined eps implies, come in x's dtype, unclipped. `history` is () at first, then what the last call
    returned: up to three earlier eps, newest first, in at least float32.
    """
    recent = (eps.to(working_dtype(x)), *history)
    weights = _ADAMS_BASHFORTH[len(history)]
    combined = weights[0] * recent[0]
    for weight, earlier in zip(weights[1:], history, strict=True):
        combined = combined + weight * earlier
    x_prev, pred_x0 = ddim_step(x, combined, a_t, a_prev)
    return x_prev, pred_x0, recent[:3]


def pndm_sample(
    denoise: Denoiser,
    x: Tensor,
    timesteps: Sequence[int] | Tensor,
    alphas_cumprod: Tensor,
    *,
    final_alpha: float = 1.0,
    prediction: str = "epsilon",
    noise: NoiseSource | None = None,
    generator: torch.Generator | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Denoise `x` (B, C, h, w), at the level of timesteps[0], over `timesteps`, to level `final_alpha`.

    timesteps (N,) descending, evenly spaced and none twice, as a rule `leading_timesteps`; alphas_cumprod
    (T,). The last step goes to `final_alpha`: LDM and Stable Diffusion 1.x's scheduler config use
    alphas_cumprod[0]. The second timestep is evaluated twice, so N > 1 steps report N + 1 evaluations: after
    the second, x is the first step's result improved. Draws no noise; `noise` and `generator` are there
    because every sampler has them. `prediction` says what `denoise` answers, one of PREDICTIONS, turned into
    noise at the latent's own level (`to_eps`). Gradients are not switched off here.
    """
    noise_source(noise, generator)  # refuses two sources
    steps = step_levels(timesteps, alphas_cumprod, final_alpha)
    if len(steps) > 1:
        _, a_t, a_prev = steps[0]
        steps.insert(1, (steps[1][0], a_t, a_prev))  # the first step again, evaluated where it led to
    start = x
    history: tuple[Tensor, ...] = ()
    for step, (t, a_t, a_prev) in enumerate(steps):
        eps = to_eps(
            denoise(x, torch.tensor(t, device=x.device)), x, a_prev if step == 1 else a_t, prediction
        )
        if step == 1:  # pseudo improved Euler: with the mean of the eps at both ends; history holds the first
            x, pred_x0 = ddim_step(start, sum(history, eps) / 2, a_t, a_prev)
        else:
            x, pred_x0, history = pndm_step(x, eps, a_t, a_prev, history)
        if on_step is not None:
            on_step(StepInfo(step, len(steps), t, x, pred_x0))
    return x
