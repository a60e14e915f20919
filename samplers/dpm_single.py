"""DPM-Solver++ and DPM-Solver, single-step: groups of one to three steps, each made again from its group's
start.

Papers   Lu et al. 2022, arXiv:2211.01095, algorithm 1 (2S); arXiv:2206.00927, algorithms 1 and 2 and
         appendix D (orders 2 and 3, and which steps make a group)
Tensors  x, eps (B, C, h, w) of any floating dtype
Copying  needs schedule.py beside it, and torch

The steps of a group are where the papers' intermediate points are, so N steps take N evaluations: after the
first one x is DDIM's, after the second it is of second order, and so on; then the next group begins. Order 3
is the official code's: of third order where a group's points are thirds of it in lambda, else of second.
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


def group_orders(num_steps: int, order: int) -> list[int]:
    """The order of each of `num_steps` steps: 1, 2, 1, 2, ... for `order` 2, 1, 2, 3, ... for 3.

    The last groups are shorter, so that the run ends in a step of first or second order (arXiv:2206.00927,
    appendix D.1). Raises ValueError for another order than 1 to 3.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"order is {order}; DPM-Solver has orders 1 to 3")
    group, count = [*range(1, order + 1)], num_steps // order
    if order == 3 and num_steps % 3 == 0:
        return [*group * (count - 1), 1, 2, 1][:num_steps]
    return [*group * count, *group[: num_steps % order]]


def dpm_single_step(
    start: Tensor,
    predicted: Sequence[Tensor],
    levels: Sequence[float],
    a_prev: float | Tensor,
    *,
    solver_type: str = "midpoint",
    algorithm_type: str = "dpmsolver++",
) -> Tensor:
    """The latent at level `a_prev`, from the one where its group began; in the predictions' dtype.

    start (B, C, h, w) is at level levels[-1]. predicted, one to three of them, newest first, are what was
    predicted at `levels`: clean latents for "dpmsolver++", noises for "dpmsolver". Their number is the order.
      solver_type  "midpoint": as if the change went on at its last rate; "heun": by the line, or the
                   parabola, through all predictions
    Raises ValueError for other options, and for levels outside (0, 1).
    """
    if solver_type not in ("midpoint", "heun") or algorithm_type not in ("dpmsolver++", "dpmsolver"):
        raise ValueError(
            f"solver_type {solver_type!r}, algorithm_type {algorithm_type!r}: expected 'midpoint' or 'heun', "
            "'dpmsolver++' or 'dpmsolver'"
        )
    a_prev, a_start = float(a_prev), levels[-1]
    lambdas = [half_log_snr(level) for level in levels]
    if algorithm_type == "dpmsolver++":
        shrink, share, before = math.sqrt((1 - a_prev) / (1 - a_start)), math.sqrt(a_prev), math.sqrt(a_start)
    else:
        shrink, share, before = math.sqrt(a_prev / a_start), math.sqrt(1 - a_prev), math.sqrt(1 - a_start)
    first = predicted[-1]
    x = shrink * start.to(first.dtype) + (share - shrink * before) * first
    if len(predicted) == 1:
        return x
    h = half_log_snr(a_prev) - lambdas[-1]
    z = -h if algorithm_type == "dpmsolver++" else h
    linear = 1 - math.expm1(z) / z
    ratios = [(value - lambdas[-1]) / h for value in lambdas[:-1]]  # r_0, and r_1 of order 3
    rates = [(one - first) / ratio for one, ratio in zip(predicted[:-1], ratios, strict=True)]
    if len(predicted) == 2:
        middle = (share - shrink * before) / 2  # of the change, where "heun" has its exact integral
        return x + (middle if solver_type == "midpoint" else share * linear) * rates[0]
    if solver_type == "midpoint":
        return x + share * linear * rates[0]
    rate = (ratios[0] * rates[1] - ratios[1] * rates[0]) / (ratios[0] - ratios[1])
    bend = 2 * (rates[0] - rates[1]) / (ratios[0] - ratios[1])
    return x + share * (linear * rate - ((math.expm1(z) - z) / z**2 - 0.5) * bend)


def dpm_single_sample(
    denoise: Denoiser,
    x: Tensor,
    timesteps: Sequence[float] | Tensor,
    alphas_cumprod: Tensor,
    *,
    order: int = 2,
    solver_type: str = "midpoint",
    algorithm_type: str = "dpmsolver++",
    levels: Sequence[float] | Tensor | None = None,
    final_alpha: float = 1.0,
    prediction: str = "epsilon",
    noise: NoiseSource | None = None,
    generator: torch.Generator | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Denoise `x` (B, C, h, w), at the level of timesteps[0], over `timesteps`, to level `final_alpha`.

    timesteps (N,) descending, as a rule `linspace_timesteps(N, drop_zero=True)`, or `karras_steps` together
    with its `levels` (N,); alphas_cumprod (T,). The orders are those of `group_orders`, the options those of
    `dpm_single_step`; a step into level 1, where lambda is infinite, is of first order. Draws no noise;
    `noise` and `generator` are there because every sampler has them. `prediction` says what `denoise`
    answers, one of PREDICTIONS, turned into noise at the latent's own level (`to_eps`). Gradients are not
    switched off here.
    """
    noise_source(noise, generator)  # refuses two sources
    steps = solver_steps(timesteps, alphas_cumprod, final_alpha, levels)
    start, recent, places = x, [], []
    for step, ((t, a_t, a_prev), now) in enumerate(zip(steps, group_orders(len(steps), order), strict=True)):
        eps = to_eps(denoise(x, torch.tensor(t, device=x.device)), x, a_t, prediction)
        pred_x0 = predict_x0(x, eps, a_t)
        if now == 1 or a_prev == 1:
            start, recent, places = x, [], []
        recent = [pred_x0 if algorithm_type == "dpmsolver++" else eps.to(pred_x0.dtype), *recent]
        places = [a_t, *places]
        x = dpm_single_step(
            start, recent, places, a_prev, solver_type=solver_type, algorithm_type=algorithm_type
        ).to(x.dtype)
        if on_step is not None:
            on_step(StepInfo(step, len(steps), t, x, pred_x0.to(x.dtype)))
    return x
