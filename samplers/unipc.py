"""UniPC: a predictor and a corrector of order 1 to 3 from one evaluation a step (data prediction).

Paper    Zhao et al. 2023, arXiv:2302.04867. alpha and sigma there are sqrt(a) and sqrt(1 - a) of a level a
         here, lambda = log(alpha / sigma), h a difference of lambdas
Tensors  x, eps (B, C, h, w) of any floating dtype
Copying  needs schedule.py beside it, and torch

Where diffusers' scheduler gives NaN ("bh1" into level 1, whose h is infinite), this gives the clean
prediction: a step into level 1 is always of first order, and a first-order step has no B(h).
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


def unipc_step(
    x: Tensor,
    eps: Tensor,
    a_t: float | Tensor,
    a_prev: float | Tensor,
    history: tuple[Tensor, ...] = (),
    *,
    order: int = 2,
    variant: str = "bh2",
    corrector: bool = True,
    limit: Limit | None = None,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Correct `x` with its own `eps`, then predict from level `a_t` to `a_prev`.

    Returns (x_prev, pred_x0, history), the first two in x's dtype. x (B, C, h, w) is what the last
    call predicted and eps the denoiser's answer to it; correcting costs no evaluation. `history` is () at
    first, then what the last call returned: the levels of the predictions (n,) float64 on the CPU, the
    corrected x, the n predictions it was made from, newest first. The predictor's order grows with the
    history up to `order`; the corrector's is that of the prediction it corrects.
      order    1, 2 or 3: UniP-1 is DDIM with eta = 0. With the corrector, accurate to one order more
      variant  "bh1": B(h) = h, "bh2": B(h) = e^h - 1 (section 3.1); h is negative in data prediction
      limit    brings pred_x0 into range (`clip_sample`, `dynamic_threshold`), from which all goes on
    Raises ValueError for other options, or unless a_t is in (0, 1).
    """
    if order not in (1, 2, 3) or variant not in ("bh1", "bh2"):
        raise ValueError(f"order {order}, variant {variant!r}: UniPC here has orders 1 to 3, 'bh1' and 'bh2'")
    a_t, a_prev = float(a_t), float(a_prev)
    half_log_snr(a_t)  # refuses levels outside (0, 1)
    pred_x0 = predict_x0(x, eps, a_t, limit)
    current, levels, x0s = x.to(pred_x0.dtype), [a_t], [pred_x0]
    if history:
        last_levels, last_x, last_x0s = history[0].tolist(), history[1], history[2:]
        if corrector:  # UniC
            current = _advance(last_x, [*last_levels, a_t], [*last_x0s, pred_x0], a_t, variant)
        levels, x0s = [a_t, *last_levels], [pred_x0, *last_x0s]
    order = 1 if a_prev in (a_t, 1) else order  # h = 0, or infinite: there is nothing to extrapolate over
    levels, x0s = levels[:order], x0s[:order]
    x_prev = _advance(current, levels, x0s, a_prev, variant)  # UniP
    history = (torch.tensor(levels, dtype=torch.float64), current, *x0s)
    return x_prev.to(x.dtype), pred_x0.to(x.dtype), history


def unipc_sample(
    denoise: Denoiser,
    x: Tensor,
    timesteps: Sequence[float] | Tensor,
    alphas_cumprod: Tensor,
    *,
    order: int = 2,
    variant: str = "bh2",
    corrector: bool = True,
    lower_order_final: bool = True,
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
    with its `levels` (N,); alphas_cumprod (T,). order, variant, corrector and limit as in `unipc_step`; with
    `lower_order_final` the order falls to 1 over the last steps, which few steps need to be stable. The
    result is a prediction: nothing is evaluated there that could correct it. Draws no noise; `noise` and
    `generator` are there because every sampler has them. `prediction` says what `denoise` answers, one of
    PREDICTIONS, turned into noise at the latent's own level (`to_eps`). Gradients are not switched off here.
    """
    noise_source(noise, generator)  # refuses two sources
    steps = solver_steps(timesteps, alphas_cumprod, final_alpha, levels)
    history: tuple[Tensor, ...] = ()
    for step, (t, a_t, a_prev) in enumerate(steps):
        eps = to_eps(denoise(x, torch.tensor(t, device=x.device)), x, a_t, prediction)
        now = min(order, len(steps) - step) if lower_order_final else order
        x, pred_x0, history = unipc_step(
            x, eps, a_t, a_prev, history, order=now, variant=variant, corrector=corrector, limit=limit
        )
        if on_step is not None:
            on_step(StepInfo(step, len(steps), t, x, pred_x0))
    return x


def _advance(x: Tensor, levels: list[float], x0s: list[Tensor], a_to: float, variant: str) -> Tensor:
    """`x`, at levels[0], brought to level `a_to` by predictions at `levels`; the last may be a_to itself."""
    shrink = math.sqrt((1 - a_to) / (1 - levels[0]))  # sigma_t / sigma_s
    gain = math.sqrt(a_to) - shrink * math.sqrt(levels[0])  # -alpha_t (e^-h - 1), also where h is infinite
    advanced = shrink * x + gain * x0s[0]
    if len(levels) == 1:
        return advanced
    start, end = half_log_snr(levels[0]), half_log_snr(a_to)
    z = start - end  # -h
    scale = -math.sqrt(a_to) * (z if variant == "bh1" else math.expm1(z))  # -alpha_t B(-h)
    ratios = [(half_log_snr(a) - start) / (end - start) for a in levels[1:]]  # r_m; 1 at a_to
    for ratio, weight, x0 in zip(ratios, _weights(ratios, z, variant), x0s[1:], strict=True):
        advanced = advanced + (scale * weight / ratio) * (x0 - x0s[0])
    return advanced


def _weights(ratios: list[float], z: float, variant: str) -> list[float]:
    """The a_m of theorem 3.1: sum_m r_m^(k-1) a_m = z k! phi_{k+1}(z) / B(z) for k = 1, 2, ..., n."""
    if len(ratios) == 1:
        return [0.5]  # the limit of h = 0, accurate enough at this order and the paper's choice
    scale, phi, rhs = z if variant == "bh1" else math.expm1(z), math.expm1(z) / z, []
    for k in range(1, len(ratios) + 1):
        phi = (phi - 1 / math.factorial(k)) / z  # phi_{k+1} = (phi_k - 1 / k!) / z
        rhs.append(z * math.factorial(k) * phi / scale)
    r = torch.tensor(ratios, dtype=torch.float64)
    powers = torch.stack([r**k for k in range(len(ratios))])
    return torch.linalg.solve(powers, torch.tensor(rhs, dtype=torch.float64)).tolist()
