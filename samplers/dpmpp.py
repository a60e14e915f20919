"""DPM-Solver++ and DPM-Solver, multistep: order 1 to 3 from one evaluation a step and the ones before it.

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
    algorithm_type: str = "dpmsolver++",
    limit: Limit | None = None,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """One update from level `a_t` to `a_prev`; returns (x_prev, pred_x0, history).

    x and eps (B, C, h, w); the levels are values of alphas_cumprod. x_prev and pred_x0 come in x's dtype.
    `history` is () at first, then what the last call returned: the levels of its predictions (n,) float64 on
    the CPU, and these (clean latents, or noises), newest first, in at least float32. The order grows with it
    up to `order`. A step of first order is DDIM's with eta = 0; so is every step into level 1, where lambda
    is infinite.
      order           1, 2 or 3
      solver_type     of second order: "midpoint" (algorithm 2) or "heun", which integrates the line through
                      both predictions exactly
      algorithm_type  "dpmsolver++" extrapolates clean latents; "dpmsolver" noises (Lu et al. 2022,
                      arXiv:2206.00927), by the same formulas with signal and noise exchanged
      limit           brings pred_x0 into range (`clip_sample`, `dynamic_threshold`), from which the step
                      goes on
    Raises ValueError for other options, or unless a_t is in (0, 1).
    """
    if order not in (1, 2, 3) or solver_type not in ("midpoint", "heun"):
        raise ValueError(
            f"order {order}, solver_type {solver_type!r}: DPM-Solver++ has orders 1 to 3, 'midpoint' and 'heun'"
        )
    if algorithm_type not in ("dpmsolver++", "dpmsolver"):
        raise ValueError(f"algorithm_type is {algorithm_type!r}; it must be 'dpmsolver++' or 'dpmsolver'")
    a_t, a_prev = float(a_t), float(a_prev)
    now = half_log_snr(a_t)
    pred_x0 = predict_x0(x, eps, a_t, limit)
    # What is kept of x falls with the noise, or with the signal, and what is extrapolated makes up for it.
    if algorithm_type == "dpmsolver++":
        predicted, sign = pred_x0, -1
        shrink = math.sqrt((1 - a_prev) / (1 - a_t))  # sigma_i / sigma_{i-1}
        share, share_before = math.sqrt(a_prev), math.sqrt(a_t)
    else:
        predicted, sign = eps.to(pred_x0.dtype) if limit is None else to_eps(pred_x0, x, a_t, "sample"), 1
        shrink = math.sqrt(a_prev / a_t)
        share, share_before = math.sqrt(1 - a_prev), math.sqrt(1 - a_t)
    levels, recent = [a_t], [predicted]
    if history:
        levels, recent = [a_t, *history[0].tolist()], [predicted, *history[1:]]
    gain = share - shrink * share_before  # -alpha_i (e^-h - 1), also where h is infinite
    # Of h = 0, or infinite, there is nothing to extrapolate over.
    used = 1 if a_prev in (a_t, 1) else min(order, len(levels))
    mean, beyond = predicted, 0.0
    if used > 1:
        lambdas = [half_log_snr(level) for level in levels[:used]]
        h = half_log_snr(a_prev) - now
        z = sign * h
        change = (h / (now - lambdas[1])) * (predicted - recent[1])  # over this step; h / h_{i-1} = 1 / r_i
        linear = 1 - math.expm1(z) / z  # what a change in proportion to lambda counts for
        if used == 3:
            earlier = (h / (lambdas[1] - lambdas[2])) * (recent[1] - recent[2])
            bend = (h / (now - lambdas[2])) * (change - earlier)
            # The official code's weight: a parabola through the three would count its bend twice as much.
            square = (math.expm1(z) - z) / z**2 - 0.5
            change = change + (now - lambdas[1]) / h * bend
            beyond = share * (linear * change - square * bend)
        elif solver_type == "heun":
            beyond = share * linear * change
        else:
            mean = predicted + change / 2  # D_i, line 9
    x_prev = shrink * x.to(predicted.dtype) + gain * mean + beyond  # line 10
    history = (torch.tensor(levels[:2], dtype=torch.float64), *recent[:2])
    return x_prev.to(x.dtype), pred_x0.to(x.dtype), history


def dpmpp_sample(
    denoise: Denoiser,
    x: Tensor,
    timesteps: Sequence[float] | Tensor,
    alphas_cumprod: Tensor,
    *,
    order: int = 2,
    solver_type: str = "midpoint",
    algorithm_type: str = "dpmsolver++",
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
    with its `levels` (N,); alphas_cumprod (T,). order, solver_type, algorithm_type and limit as in
    `dpmpp_step`. With `lower_order_final` the last step of runs of fewer than 15 is of first order and the
    one before it of second at most, which few steps need to be stable; `euler_at_final` takes the last step
    of every run in first order. Into level 1 it always is. diffusers' final_sigmas_type "zero" is final_alpha
    = 1, its "sigma_min" is alphas_cumprod[0]. Draws no noise; `noise` and `generator` are there because every
    sampler has them. `prediction` says what `denoise` answers, one of PREDICTIONS, turned into noise at the
    latent's own level (`to_eps`). Gradients are not switched off here.
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
            x,
            eps,
            a_t,
            a_prev,
            history,
            order=now,
            solver_type=solver_type,
            algorithm_type=algorithm_type,
            limit=limit,
        )
        if on_step is not None:
            on_step(StepInfo(step, len(steps), t, x, pred_x0))
    return x
