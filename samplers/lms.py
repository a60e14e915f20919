"""Linear multistep methods with exact integrals: LMS in sigma, DEIS in log sigma.

Papers   Liu et al. 2022, arXiv:2202.09778, section 3.2 (linear multistep); Karras et al. 2022,
         arXiv:2206.00364 (the ODE dx / dsigma = eps); Zhang and Chen 2023, arXiv:2204.13902, proposition 3
         and section 3 (DEIS: an eps interpolated by a polynomial, integrated exactly; "log rho")
Tensors  x, eps (B, C, h, w) of any floating dtype
Copying  needs schedule.py beside it, and torch

Where the last eps are interpolated by a polynomial in sigma this is the LMS of k-diffusion and diffusers, in
log sigma DEIS: sigma is the paper's rho for variance-preserving latents.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .schedule import Denoiser, NoiseSource, OnStep, StepInfo, noise_source, predict_x0, solver_steps, to_eps

VARIABLES = ("sigma", "log_sigma")


def lms_weights(sigmas: Sequence[float], target: float, variable: str = "sigma") -> list[float]:
    """Weights w_k such that sigma goes from sigmas[0] to `target` by x + sum_k w_k eps_k.

    sigmas (n,), newest first, are where the eps were predicted; w_k is the integral over sigma, from
    sigmas[0] to `target`, of the polynomial that is 1 at sigmas[k] and 0 at the others. Raises ValueError
    unless the sigmas are different and above 0 and `target` is not negative, and for another variable.
    """
    if variable not in VARIABLES:
        raise ValueError(f"variable {variable!r} is not known; it is one of {', '.join(VARIABLES)}")
    if len(set(sigmas)) < len(sigmas) or not all(sigma > 0 for sigma in sigmas) or target < 0:
        raise ValueError(f"sigmas {list(sigmas)} must differ and be above 0, the target {target} at least 0")
    integral = _of_powers if variable == "sigma" else _of_log_powers
    knots = [sigma if variable == "sigma" else math.log(sigma) for sigma in sigmas]
    moments = [
        end - start
        for start, end in zip(integral(sigmas[0], len(knots)), integral(target, len(knots)), strict=True)
    ]
    weights = []
    for k, knot in enumerate(knots):
        polynomial = [1.0]  # coefficients of powers, lowest first
        for other in (*knots[:k], *knots[k + 1 :]):
            shifted = [0.0, *polynomial]  # times u
            scaled = [*(-other * c for c in polynomial), 0.0]
            polynomial = [(a + b) / (knot - other) for a, b in zip(shifted, scaled, strict=True)]
        weights.append(sum(c * moment for c, moment in zip(polynomial, moments, strict=True)))
    return weights


def _of_powers(sigma: float, count: int) -> list[float]:
    """Antiderivatives of sigma^k, k = 0, 1, ..."""
    return [sigma ** (k + 1) / (k + 1) for k in range(count)]


def _of_log_powers(sigma: float, count: int) -> list[float]:
    """Antiderivatives of (log sigma)^k, k = 0, 1, ...: sigma times a polynomial in log sigma; 0 at 0."""
    if sigma == 0:
        return [0.0] * count
    log, values = math.log(sigma), [sigma]
    for k in range(1, count):
        values.append(sigma * log**k - k * values[-1])  # by parts
    return values


def lms_step(
    x: Tensor,
    eps: Tensor,
    a_t: float | Tensor,
    a_prev: float | Tensor,
    history: tuple[Tensor, ...] = (),
    *,
    order: int = 4,
    variable: str = "sigma",
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """One update from level `a_t` to `a_prev`; returns (x_prev, pred_x0, history).

    x and eps (B, C, h, w); the levels are values of alphas_cumprod. x_prev and pred_x0, the clean latent that
    `eps` implies, come in x's dtype, unclipped. `history` is () at first, then what the last call returned:
    the levels of the earlier eps (n,) float64 on the CPU, and these, newest first, in at least float32. The
    order grows with it up to `order`; 1 is Euler's step. Raises ValueError as `lms_weights`, and unless the
    levels are in (0, 1].
    """
    a_t, a_prev = float(a_t), float(a_prev)
    pred_x0 = predict_x0(x, eps, a_t)
    if order < 1 or not 0 < a_prev <= 1:
        raise ValueError(
            f"order is {order} and level a_prev {a_prev}; expected 1 or more, and 0 < a_prev <= 1"
        )
    before = history[0].tolist() if history else []
    levels, recent = [a_t, *before][:order], [eps.to(pred_x0.dtype), *history[1:]][:order]
    sigmas = [math.sqrt((1 - a) / a) for a in levels]
    weights = lms_weights(sigmas, math.sqrt((1 - a_prev) / a_prev), variable)
    exploding = x.to(pred_x0.dtype) / math.sqrt(a_t)
    for weight, one in zip(weights, recent, strict=True):
        exploding = exploding + weight * one
    history = (torch.tensor(levels, dtype=torch.float64), *recent)
    return (math.sqrt(a_prev) * exploding).to(x.dtype), pred_x0.to(x.dtype), history


def lms_sample(
    denoise: Denoiser,
    x: Tensor,
    timesteps: Sequence[float] | Tensor,
    alphas_cumprod: Tensor,
    *,
    order: int = 4,
    variable: str = "sigma",
    lower_order_final: bool = False,
    levels: Sequence[float] | Tensor | None = None,
    final_alpha: float = 1.0,
    prediction: str = "epsilon",
    noise: NoiseSource | None = None,
    generator: torch.Generator | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Denoise `x` (B, C, h, w), at the level of timesteps[0], over `timesteps`, to level `final_alpha`.

    timesteps (N,) descending, as a rule fractions or `karras_steps` together with its `levels` (N,), see
    `solver_steps`; alphas_cumprod (T,). order and variable as in `lms_step`; with `lower_order_final` the
    order falls to 1 over the last steps. Draws no noise; `noise` and `generator` are there because every
    sampler has them. `prediction` says what `denoise` answers, one of PREDICTIONS, turned into noise at the
    latent's own level (`to_eps`). Gradients are not switched off here.
    """
    noise_source(noise, generator)  # refuses two sources
    steps = solver_steps(timesteps, alphas_cumprod, final_alpha, levels)
    history: tuple[Tensor, ...] = ()
    for step, (t, a_t, a_prev) in enumerate(steps):
        eps = to_eps(denoise(x, torch.tensor(t, device=x.device)), x, a_t, prediction)
        now = min(order, len(steps) - step) if lower_order_final else order
        x, pred_x0, history = lms_step(x, eps, a_t, a_prev, history, order=now, variable=variable)
        if on_step is not None:
            on_step(StepInfo(step, len(steps), t, x, pred_x0))
    return x


def deis_sample(
    denoise: Denoiser,
    x: Tensor,
    timesteps: Sequence[float] | Tensor,
    alphas_cumprod: Tensor,
    *,
    order: int = 2,
    lower_order_final: bool = True,
    levels: Sequence[float] | Tensor | None = None,
    final_alpha: float = 1.0,
    prediction: str = "epsilon",
    noise: NoiseSource | None = None,
    generator: torch.Generator | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """`lms_sample` in log sigma: DEIS of Zhang and Chen, with diffusers' defaults; as a rule over
    `linspace_timesteps(N, drop_zero=True)`.
    """
    return lms_sample(
        denoise, x, timesteps, alphas_cumprod, order=order, variable="log_sigma", lower_order_final=lower_order_final,
        levels=levels, final_alpha=final_alpha, prediction=prediction, noise=noise, generator=generator, on_step=on_step,
    )  # fmt: skip
