"""DPM-Solver++ (1M, 2M, 3M): order 1 to 3 from one evaluation a step, by remembering earlier predictions.

Paper    Lu et al. 2022, arXiv:2211.01095, algorithm 2; order 3 is its official code's. alpha and sigma
         there are sqrt(a) and sqrt(1 - a) of a level a here, lambda = log(alpha / sigma), h a step in lambda
Tensors  x, eps (B, C, h, w) of any floating dtype
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
    half_log_snr,
    noise_source,
    predict_x0,
    solver_steps,
    to_eps,
)


def dpmpp_step(
    x: Tensor,
    eps: Tensor,
    a_t: float | Tensor,
    a_prev: float | Tensor,
    history: tuple[Tensor, ...] = (),
    *,
    order: int = 2,
    solver_type: str = "midpoint",
    limit: Limit | None = None,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """One update from level `a_t` to `a_prev`; returns (x_prev, pred_x0, history).

    x and eps (B, C, h, w); the levels are values of alphas_cumprod. x_prev and pred_x0 come in x's dtype.
    `history` is () at first, then what the last call returned: the levels of its predictions (n,) float64 on
    the CPU, and these, newest first, in at least float32. The order grows with it up to `order`. A step of
    first order is DDIM's with eta = 0; so is every step into level 1, where lambda is infinite.
      order        1, 2 or 3
      solver_type  of second order: "midpoint" (algorithm 2) or "heun", which integrates the line through both
                   predictions exactly
      limit        brings pred_x0 into range (`clip_sample`, `dynamic_threshold`), from which the step goes on
    Raises ValueError for other options, or unless a_t is in (0, 1).
    """
    if order not in (1, 2, 3) or solver_type not in ("midpoint", "heun"):
        raise ValueError(
            f"order {order}, solver_type {solver_type!r}: DPM-Solver++ has orders 1 to 3, 'midpoint' and 'heun'"
        )
    a_t, a_prev = float(a_t), float(a_prev)
    now = half_log_snr(a_t)
    pred_x0 = predict_x0(x, eps, a_t, limit)
    levels, x0s = [a_t], [pred_x0]
    if history:
        levels, x0s = [a_t, *history[0].tolist()], [pred_x0, *history[1:]]
    shrink = math.sqrt((1 - a_prev) / (1 - a_t))  # sigma_i / sigma_{i-1}
    gain = math.sqrt(a_prev) - shrink * math.sqrt(a_t)  # -alpha_i (e^-h - 1), also where h is infinite
    # Of h = 0, or infinite, there is nothing to extrapolate over.
    used = 1 if a_prev in (a_t, 1) else min(order, len(levels))
    mean, beyond = pred_x0, 0.0
    if used > 1:
        lambdas = [half_log_snr(level) for level in levels[:used]]
        h = half_log_snr(a_prev) - now
        change = (h / (now - lambdas[1])) * (pred_x0 - x0s[1])  # of x0 over this step; h / h_{i-1} = 1 / r_i
        linear = math.expm1(-h) / h + 1  # what a change in proportion to lambda counts for
        if used == 3:
            earlier = (h / (lambdas[1] - lambdas[2])) * (x0s[1] - x0s[2])
            bend = (h / (now - lambdas[2])) * (change - earlier)
            # The official code's weight: a parabola through the three would count its bend twice as much.
            square = (math.expm1(-h) + h) / h**2 - 0.5
            change = change + (now - lambdas[1]) / h * bend
            beyond = math.sqrt(a_prev) * (linear * change - square * bend)
        elif solver_type == "heun":
            beyond = math.sqrt(a_prev) * linear * change
        else:
            mean = pred_x0 + change / 2  # D_i, line 9
    x_prev = shrink * x.to(pred_x0.dtype) + gain * mean + beyond  # line 10
    history = (torch.tensor(levels[:2], dtype=torch.float64), *x0s[:2])
    return x_prev.to(x.dtype), pred_x0.to(x.dtype), history


def dpmpp_sample(
    denoise: Denoiser,
    x: Tensor,
    timesteps: Sequence[float] | Tensor,
    alphas_cumprod: Tensor,
    *,
    order: int = 2,
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
    euler_at_final: bool = False,
    levels: Sequence[float] | Tensor | None = None,
    final_alpha: float = 1.0,
    prediction: str = "epsilon",
    limit: Limit | None = None,
    noise: NoiseSource | None = None,
    generator: torch.Generator | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Denoise `x` (B, C, h, w), at the level of timesteps[0], over `timesteps`, to level `final_alpha`.

    timesteps (N,) descending, as a rule `linspace_timesteps(N, drop_zero=True)`, or `karras_steps` together
    with its `levels` (N,); alphas_cumprod (T,). order, solver_type and limit as in `dpmpp_step`. With
    `lower_order_final` the last step of runs of fewer than 15 is of first order and the one before it of
    second at most, which few steps need to be stable; `euler_at_final` takes the last step of every run in
    first order. Into level 1 it always is. diffusers' final_sigmas_type "zero" is final_alpha = 1, its
    "sigma_min" is alphas_cumprod[0]. Draws no noise; `noise` and `generator` are there because every sampler
    has them. `prediction` says what `denoise` answers, one of PREDICTIONS, turned into noise at the latent's
    own level (`to_eps`). Gradients are not switched off here.
    """
    noise_source(noise, generator)  # refuses two sources
    steps = solver_steps(timesteps, alphas_cumprod, final_alpha, levels)
    history: tuple[Tensor, ...] = ()
    for step, (t, a_t, a_prev) in enumerate(steps):
        eps = to_eps(denoise(x, torch.tensor(t, device=x.device)), x, a_t, prediction)
        left = len(steps) - step
        now = min(order, left) if lower_order_final and len(steps) < 15 else order
        if euler_at_final and left == 1:
            now = 1
        x, pred_x0, history = dpmpp_step(
            x, eps, a_t, a_prev, history, order=now, solver_type=solver_type, limit=limit
        )
        if on_step is not None:
            on_step(StepInfo(step, len(steps), t, x, pred_x0))
    return x
