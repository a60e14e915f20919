"""DPM-Solver++ for the reverse SDE: "DPM++ SDE" of two evaluations a step, "2M SDE" and "3M SDE" of one.

Papers   Lu et al. 2022, arXiv:2211.01095, section 5.3 and appendix (SDE-DPM-Solver++, eta = 1); Karras et al.
         2022, arXiv:2206.00364 (sigma). The amount of noise eta, DPM++ SDE and 3M SDE are k-diffusion's
Tensors  x, eps, noise (B, C, h, w) of any floating dtype
Copying  needs schedule.py and euler.py beside it, and torch

Inside, the latent is x / sqrt(a) = x0 + sigma eps, and lambda = -log sigma, as in k-diffusion. Its Brownian
tree is a source of noise: independent normal numbers for each step have the same law.
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
    half_log_snr,
    noise_source,
    predict_x0,
    sigma_steps,
    solver_steps,
    to_eps,
)


def dpmpp_msde_step(
    x: Tensor,
    eps: Tensor,
    a_t: float | Tensor,
    a_prev: float | Tensor,
    history: tuple[Tensor, ...] = (),
    *,
    order: int = 2,
    solver_type: str = "midpoint",
    eta: float = 1.0,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """One multistep update from level `a_t` to `a_prev`; returns (x_prev, pred_x0, history).

    x and eps (B, C, h, w); the levels are values of alphas_cumprod. x_prev and pred_x0 come in x's dtype,
    unclipped. `history` is () at first, then what the last call returned: the levels of its predictions (n,)
    float64 on the CPU, and these, newest first, in at least float32. Into level 1 a step gives it.
      order        1, 2 ("2M SDE") or 3 ("3M SDE"); it grows with the history
      solver_type  of second order: "midpoint" or "heun"
      eta          noise added in the step: 1 as much as the reverse SDE has, 0 none, which is DPM-Solver++
    `noise`, of x's shape, is used unless eta is 0 or a_prev 1; ValueError if it is then missing, for other
    options, a step towards more noise, and unless a_t is in (0, 1).
    """
    if order not in (1, 2, 3) or solver_type not in ("midpoint", "heun") or not eta >= 0:
        raise ValueError(
            f"order {order}, solver_type {solver_type!r}, eta {eta}: expected 1 to 3, 'midpoint' or 'heun', 0 or more"
        )
    a_t, a_prev = float(a_t), float(a_prev)
    now = half_log_snr(a_t)
    pred_x0 = predict_x0(x, eps, a_t)
    levels, recent = [a_t], [pred_x0]
    if history:
        levels, recent = [a_t, *history[0].tolist()], [pred_x0, *history[1:]]
    history = (torch.tensor(levels[:2], dtype=torch.float64), *recent[:2])
    if a_prev == 1:
        return pred_x0.to(x.dtype), pred_x0.to(x.dtype), history
    h = half_log_snr(a_prev) - now
    if h == 0:
        return x, pred_x0.to(x.dtype), history
    if h < 0:
        raise ValueError(f"a step of the SDE goes to a cleaner level, got {a_t} and {a_prev}")
    whole = h * (1 + eta)
    rest = -math.expm1(-whole)  # 1 - e^(-h (1 + eta)): how much of the way to the prediction
    exploding = (1 - rest) * x.to(pred_x0.dtype) / math.sqrt(a_t) + rest * pred_x0
    used = min(order, len(levels))
    if used > 1:
        before = [half_log_snr(level) for level in levels[1:used]]
        rate = h / (now - before[0]) * (pred_x0 - recent[1])  # of the prediction, over this step
        linear = 1 - rest / whole  # phi_2
        if used == 3:
            earlier = h / (before[0] - before[1]) * (recent[1] - recent[2])
            bend = (rate - earlier) * (h / (now - before[1]))
            rate = rate + bend * ((now - before[0]) / h)
            exploding = exploding + linear * rate - (linear / whole - 0.5) * bend
        else:
            exploding = exploding + (linear if solver_type == "heun" else rest / 2) * rate
    if eta > 0:
        if noise is None:
            raise ValueError(
                f"eta = {eta} adds noise in the step from level {a_t:.6f} to {a_prev:.6f}, but noise is None"
            )
        sigma = math.sqrt((1 - a_prev) / a_prev) * math.sqrt(-math.expm1(-2 * eta * h))
        exploding = exploding + sigma * noise.to(pred_x0)
    return (math.sqrt(a_prev) * exploding).to(x.dtype), pred_x0.to(x.dtype), history


def dpmpp_msde_sample(
    denoise: Denoiser,
    x: Tensor,
    timesteps: Sequence[float] | Tensor,
    alphas_cumprod: Tensor,
    *,
    order: int = 2,
    solver_type: str = "midpoint",
    eta: float = 1.0,
    levels: Sequence[float] | Tensor | None = None,
    final_alpha: float = 1.0,
    prediction: str = "epsilon",
    noise: NoiseSource | None = None,
    generator: torch.Generator | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Denoise `x` (B, C, h, w), at the level of timesteps[0], over `timesteps`, to level `final_alpha`.

    timesteps (N,) descending, as a rule fractions or `karras_steps` together with its `levels` (N,), see
    `solver_steps`; alphas_cumprod (T,). order, solver_type and eta as in `dpmpp_msde_step`. Noise sites:
    "step" (x's shape; step = index of the evaluation), drawn only where the step adds noise. `prediction`
    says what `denoise` answers, one of PREDICTIONS, turned into noise at the latent's own level (`to_eps`).
    Gradients are not switched off here.
    """
    draw = noise_source(noise, generator)
    steps = solver_steps(timesteps, alphas_cumprod, final_alpha, levels)
    history: tuple[Tensor, ...] = ()
    for step, (t, a_t, a_prev) in enumerate(steps):
        eps = to_eps(denoise(x, torch.tensor(t, device=x.device)), x, a_t, prediction)
        step_noise = draw("step", step, tuple(x.shape)) if eta > 0 and a_prev < 1 else None
        x, pred_x0, history = dpmpp_msde_step(
            x, eps, a_t, a_prev, history, order=order, solver_type=solver_type, eta=eta, noise=step_noise
        )
        if on_step is not None:
            on_step(StepInfo(step, len(steps), t, x, pred_x0))
    return x


def dpmpp_sde_sample(
    denoise: Denoiser,
    x: Tensor,
    timesteps: Sequence[float] | Tensor,
    alphas_cumprod: Tensor,
    *,
    eta: float = 1.0,
    levels: Sequence[float] | Tensor | None = None,
    final_alpha: float = 1.0,
    prediction: str = "epsilon",
    noise: NoiseSource | None = None,
    generator: torch.Generator | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Denoise `x` (B, C, h, w), at the level of timesteps[0], over `timesteps`, to level `final_alpha`.

    Each step goes to its middle in lambda, and then whole, from its start, by what is predicted there (2S).
    timesteps (N,) descending, as a rule fractions or `karras_steps` together with its `levels` (N,), see
    `solver_steps`; alphas_cumprod (T,). The timestep of a middle is found linearly in log sigma
    (`sigma_steps`); a step into level 1 gives the prediction. eta in 0..1 is the amount of noise, as in
    `euler_sigmas`. Noise sites: "middle" and "step" (x's shape; step = index of the step): the parts of a
    Brownian path in sigma up to the middle and from it on. Each evaluation is reported. `prediction` says
    what `denoise` answers, one of PREDICTIONS, turned into noise at the latent's own level (`to_eps`).
    Gradients are not switched off here.
    """
    draw = noise_source(noise, generator)
    steps = solver_steps(timesteps, alphas_cumprod, final_alpha, levels)
    total = sum(1 + (a_prev < 1) for _, _, a_prev in steps)
    done = 0
    for step, (t, a_t, a_prev) in enumerate(steps):
        eps = to_eps(denoise(x, torch.tensor(t, device=x.device)), x, a_t, prediction)
        if a_prev == 1:
            x, pred_x0 = euler_step(x, eps, a_t, 1.0)
            if on_step is not None:
                on_step(StepInfo(done, total, t, x, pred_x0))
            return x
        sigma, end = (math.sqrt((1 - a) / a) for a in (a_t, a_prev))
        middle = math.sqrt(sigma * end)
        a_middle = 1 / (1 + middle**2)
        halfway = whole = None
        if euler_sigmas(a_t, a_prev, eta)[2] > 0:
            halfway, rest = draw("middle", step, tuple(x.shape)), draw("step", step, tuple(x.shape))
            share = (sigma - middle) / (sigma - end)
            whole = math.sqrt(share) * halfway + math.sqrt(1 - share) * rest
        there, pred_x0 = euler_step(x, eps, a_t, a_middle, eta, halfway)
        if on_step is not None:
            on_step(StepInfo(done, total, t, there, pred_x0))
        told, _ = sigma_steps([middle], alphas_cumprod)
        answer = denoise(there, torch.tensor(float(told), device=x.device))
        pred_x0 = predict_x0(there, to_eps(answer, there, a_middle, prediction), a_middle)
        x, _ = euler_step(x, to_eps(pred_x0, x, a_t, "sample"), a_t, a_prev, eta, whole)
        if on_step is not None:
            on_step(StepInfo(done + 1, total, float(told), x, pred_x0.to(x.dtype)))
        done += 2
    return x
