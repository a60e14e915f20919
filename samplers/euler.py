"""Euler's method in sigma, deterministic or ancestral.

Papers   Karras et al. 2022, arXiv:2206.00364 (the ODE in sigma); Song et al. 2021, arXiv:2010.02502 (noise)
Tensors  x, eps, noise (B, C, h, w) of any floating dtype
Copying  needs schedule.py beside it, and torch

Latents are variance preserving at the edge, as everywhere here: x = sqrt(a) x0 + sqrt(1 - a) eps at level a.
Inside, and in diffusers and k-diffusion throughout, the latent is x / sqrt(a) = x0 + sigma eps with sigma =
sqrt((1 - a) / a). diffusers' `scale_model_input` is the way back, so `denoise` sees the same x. Its start,
`init_noise_sigma` times unit noise, is here unit noise (spacing "leading") or sqrt(1 - a) times it
("linspace", "trailing").

In exact arithmetic a step here is DDIM's of the same eta.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .schedule import Denoiser, NoiseSource, OnStep, StepInfo, noise_source, predict_x0, solver_steps, to_eps


def euler_sigmas(a_t: float, a_prev: float, eta: float = 0.0) -> tuple[float, float, float]:
    """(sigma, sigma_down, sigma_up) of a step: where it starts, where its deterministic part ends, its noise.

    sigma_down^2 + sigma_up^2 is the sigma of `a_prev`, squared. `eta` scales the noise: 0 for Euler, 1 for
    Euler ancestral. No noise is added into level 1. Raises ValueError for a level outside (0, 1], for eta
    outside 0..1, and for eta > 0 with a step towards more noise.
    """
    if not (0 < a_t <= 1 and 0 < a_prev <= 1):
        raise ValueError(
            f"levels are {a_t} and {a_prev}; sigma needs 0 < a <= 1 (zero terminal SNR: `lift_zero_level`, 2**-24)"
        )
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}; it must lie in 0..1 (0: Euler, 1: Euler ancestral)")
    sigma, target = math.sqrt((1 - a_t) / a_t), math.sqrt((1 - a_prev) / a_prev)
    if eta == 0 or target == 0:
        return sigma, target, 0.0
    if target > sigma:
        raise ValueError(
            f"a step from level {a_t} to the noisier {a_prev} is only defined for eta = 0, eta is {eta}"
        )
    up = eta * target * math.sqrt(1 - (target / sigma) ** 2)
    return sigma, math.sqrt(max(target**2 - up**2, 0.0)), up


def euler_step(
    x: Tensor,
    eps: Tensor,
    a_t: float | Tensor,
    a_prev: float | Tensor,
    eta: float = 0.0,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One Euler step from level `a_t` to `a_prev`; returns (x_prev, pred_x0) in x's dtype, unclipped.

    x and eps (B, C, h, w); the levels are values of alphas_cumprod. `noise`, of x's shape, is used only where
    `euler_sigmas` has a sigma_up above 0; ValueError if it is then missing.
    """
    a_t, a_prev = float(a_t), float(a_prev)
    sigma, down, up = euler_sigmas(a_t, a_prev, eta)
    pred_x0 = predict_x0(x, eps, a_t)
    exploding = x.to(pred_x0.dtype) / math.sqrt(a_t) + (down - sigma) * eps.to(pred_x0.dtype)
    if up > 0:
        if noise is None:
            raise ValueError(
                f"eta = {eta} adds noise in the step from level {a_t:.6f} to {a_prev:.6f}, but noise is None"
            )
        exploding = exploding + up * noise.to(pred_x0)
    return (math.sqrt(a_prev) * exploding).to(x.dtype), pred_x0.to(x.dtype)


def euler_sample(
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

    timesteps (N,) descending; alphas_cumprod (T,). The timesteps may be fractions (diffusers' "linspace" is
    `linspace_timesteps(N, rounded=False)`) and are then handed to `denoise` as float32; or those of
    `sigma_steps` (`karras_steps(..., rounded=False)`) together with their `levels` (N,): see `solver_steps`.
    eta = 1 is Euler ancestral. Noise sites: "step" (x's shape; step = index of the evaluation), drawn only
    where the step adds noise: never with eta = 0 nor into level 1. `prediction` says what `denoise` answers,
    one of PREDICTIONS, turned into noise at the latent's own level (`to_eps`). Gradients are not switched off
    here.
    """
    draw = noise_source(noise, generator)
    steps = solver_steps(timesteps, alphas_cumprod, final_alpha, levels)
    for step, (t, a_t, a_prev) in enumerate(steps):
        eps = to_eps(denoise(x, torch.tensor(t, device=x.device)), x, a_t, prediction)
        step_noise = draw("step", step, tuple(x.shape)) if euler_sigmas(a_t, a_prev, eta)[2] > 0 else None
        x, pred_x0 = euler_step(x, eps, a_t, a_prev, eta, step_noise)
        if on_step is not None:
            on_step(StepInfo(step, len(steps), t, x, pred_x0))
    return x
