"""DDIM: sampling over a sub-sequence of timesteps, deterministic or with noise.

Paper    Song et al. 2021, arXiv:2010.02502. Their alpha_t is a level here: alphas_cumprod[t]
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


def ddim_sigma(a_t: float, a_prev: float, eta: float) -> float:
    """Standard deviation of a step's noise (eq. 16); 0 for eta = 0 and into level 1.

    Raises ValueError for eta outside 0..1, and for eta > 0 with a step towards more noise (inversion has eta
    = 0).
    """
    if not 0 <= eta <= 1:
        raise ValueError(
            f"eta is {eta}; it must lie in 0..1 (0: deterministic DDIM, 1: as much noise as DDPM)"
        )
    if eta == 0 or a_prev == 1:
        return 0.0
    if a_prev < a_t:
        raise ValueError(
            f"a step from level {a_t} to the noisier {a_prev} is only defined for eta = 0, eta is {eta}"
        )
    return eta * math.sqrt((1 - a_prev) / (1 - a_t) * (1 - a_t / a_prev))


def ddim_step(
    x: Tensor,
    eps: Tensor,
    a_t: float | Tensor,
    a_prev: float | Tensor,
    eta: float = 0.0,
    noise: Tensor | None = None,
    *,
    limit: Limit | None = None,
    use_clipped_model_output: bool = False,
) -> tuple[Tensor, Tensor]:
    """One DDIM update from level `a_t` to `a_prev`; returns (x_prev, pred_x0) in x's dtype.

    x and eps (B, C, h, w); the levels are numbers or one-element tensors, values of alphas_cumprod. `noise`,
    of x's shape, is used only where `ddim_sigma` is above 0; ValueError if it is then missing, or if a_t is
    not in (0, 1]. `limit` (`clip_sample`, `dynamic_threshold`) brings pred_x0 into range; the direction back
    to the noise is that of eps all the same, unless `use_clipped_model_output` takes the noise that the
    limited pred_x0 implies (diffusers' word; GLIDE's and guided-diffusion's way).
    """
    a_t, a_prev = float(a_t), float(a_prev)
    sigma = ddim_sigma(a_t, a_prev, eta)
    pred_x0 = predict_x0(x, eps, a_t, limit)  # eq. 9
    if limit is not None and use_clipped_model_output:
        eps = to_eps(pred_x0, x, a_t, "sample")
    direction = math.sqrt(max(1 - a_prev - sigma**2, 0.0))  # rounding may put 0 a little below 0
    x_prev = math.sqrt(a_prev) * pred_x0 + direction * eps.to(pred_x0.dtype)  # eq. 12, without its noise term
    if sigma > 0:
        if noise is None:
            raise ValueError(
                f"eta = {eta} adds noise in the step from level {a_t:.6f} to {a_prev:.6f}, but noise is None"
            )
        x_prev = x_prev + sigma * noise.to(pred_x0)
    return x_prev.to(x.dtype), pred_x0.to(x.dtype)


def ddim_sample(
    denoise: Denoiser,
    x: Tensor,
    timesteps: Sequence[int] | Tensor,
    alphas_cumprod: Tensor,
    *,
    eta: float = 0.0,
    final_alpha: float = 1.0,
    prediction: str = "epsilon",
    limit: Limit | None = None,
    use_clipped_model_output: bool = False,
    noise: NoiseSource | None = None,
    generator: torch.Generator | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Denoise `x` (B, C, h, w), at the level of timesteps[0], over `timesteps`, to level `final_alpha`.

    timesteps (N,) descending; alphas_cumprod (T,). The last step goes to `final_alpha`: 1 is a clean latent,
    LDM and diffusers with set_alpha_to_one=False use alphas_cumprod[0]. Noise sites: "step" (x's shape; step
    = index of the evaluation), drawn only where the step adds noise, so never with eta = 0. `prediction` says
    what `denoise` answers, one of PREDICTIONS, turned into noise at the latent's own level (`to_eps`);
    `limit` and `use_clipped_model_output` are `ddim_step`'s. Gradients are not switched off here.
    """
    draw = noise_source(noise, generator)
    steps = step_levels(timesteps, alphas_cumprod, final_alpha)
    for step, (t, a_t, a_prev) in enumerate(steps):
        eps = to_eps(denoise(x, torch.tensor(t, device=x.device)), x, a_t, prediction)
        step_noise = draw("step", step, tuple(x.shape)) if ddim_sigma(a_t, a_prev, eta) > 0 else None
        x, pred_x0 = ddim_step(
            x,
            eps,
            a_t,
            a_prev,
            eta,
            step_noise,
            limit=limit,
            use_clipped_model_output=use_clipped_model_output,
        )
        if on_step is not None:
            on_step(StepInfo(step, len(steps), t, x, pred_x0))
    return x


def ddim_invert(
    denoise: Denoiser,
    x: Tensor,
    timesteps: Sequence[int] | Tensor,
    alphas_cumprod: Tensor,
    *,
    start_alpha: float = 1.0,
    prediction: str = "epsilon",
    limit: Limit | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """The noise that leads to `x`: DDIM's steps backwards, from `start_alpha` to the level of timesteps[-1].

    x (B, C, h, w), at level `start_alpha` (1: a clean latent); timesteps (N,) rising, as a rule those of the
    run that is to lead back, reversed; alphas_cumprod (T,). A step towards timestep t asks `denoise` there,
    about a latent that is one step cleaner (Song et al., section 4.3, eq. 13 reversed; diffusers'
    DDIMInverseScheduler), so `ddim_sample` over the same timesteps leads back the better the more there are.
    The step is of eta 0 and draws nothing. `prediction` and `limit` as in `ddim_sample`. Gradients are not
    switched off here. Raises ValueError unless the timesteps rise strictly inside the table and start_alpha
    is at least the first of their levels.
    """
    falling = step_levels(torch.as_tensor(timesteps).flip(0), alphas_cumprod, start_alpha)
    for step, (t, a_next, a_now) in enumerate(reversed(falling)):
        eps = to_eps(denoise(x, torch.tensor(t, device=x.device)), x, a_now, prediction)
        x, pred_x0 = ddim_step(x, eps, a_now, a_next, limit=limit)
        if on_step is not None:
            on_step(StepInfo(step, len(falling), t, x, pred_x0))
    return x
