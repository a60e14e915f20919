"""PNDM's pseudo linear multistep method (PLMS), started by pseudo Runge-Kutta steps or by one of Euler's.

Paper    Liu et al. 2022, arXiv:2202.09778, section 3.3. Its transfer part is DDIM's step with eta = 0
Tensors  x, eps (B, C, h, w) of any floating dtype
Copying  needs schedule.py and ddim.py beside it, and torch

Started by Euler this is LDM's PLMS sampler and diffusers' PNDMScheduler with skip_prk_steps=True, which are
the same: N steps take N + 1 evaluations, the first step being made twice. Started by Runge-Kutta it is the
paper's own and diffusers' skip_prk_steps=False.

A run that begins part of the way starts anew at its first timestep. diffusers cuts its list of N + 1
evaluations there instead, which takes the repeated timestep out of it: its counter then treats the latent as
a step noisier than it is, and even a perfect denoiser misses the clean latent. That is not followed.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

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


# (x, t, level of x) -> what the net answers, in the form that is mixed
Ask = Callable[[Tensor, int, float], Tensor]
# (x, mixed answers, a_t, a_to) -> (x at a_to, pred_x0)
Move = Callable[[Tensor, Tensor, float, float], tuple[Tensor, Tensor]]


def pndm_step(
    x: Tensor, eps: Tensor, a_t: float | Tensor, a_prev: float | Tensor, history: tuple[Tensor, ...] = ()
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """One update from level `a_t` to `a_prev`; returns (x_prev, pred_x0, history).

    x and eps (B, C, h, w); the levels are values of alphas_cumprod. x_prev and pred_x0, the clean latent that
    the combined eps implies, come in x's dtype, unclipped. `history` is () at first, then what the last call
    returned: up to three earlier eps, newest first, in at least float32.
    """
    recent = (eps.to(working_dtype(x)), *history)
    x_prev, pred_x0 = ddim_step(x, _combined(recent), a_t, a_prev)
    return x_prev, pred_x0, recent[:3]


def pndm_sample(
    denoise: Denoiser,
    x: Tensor,
    timesteps: Sequence[int] | Tensor,
    alphas_cumprod: Tensor,
    *,
    skip_prk_steps: bool = True,
    mix: str = "noise",
    final_alpha: float = 1.0,
    prediction: str = "epsilon",
    noise: NoiseSource | None = None,
    generator: torch.Generator | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Denoise `x` (B, C, h, w), at the level of timesteps[0], over `timesteps`, to level `final_alpha`.

    timesteps (N,) descending, evenly spaced and none twice, as a rule `leading_timesteps`; alphas_cumprod
    (T,). The last step goes to `final_alpha`: LDM and Stable Diffusion 1.x's scheduler config use
    alphas_cumprod[0]. Every evaluation is reported, with the latent that the next one sees:
      skip_prk_steps  True: the first step is made by Euler and improved by a second evaluation, at the second
                      timestep; N > 1 steps are N + 1 evaluations. False: the first three steps, or N - 1 if
                      that is less, are Runge-Kutta's of four evaluations each, two of them half-way (Liu et
                      al., section 3.3)
      mix             what is combined over evaluations. "noise": each answer, turned into noise at its own
                      latent's level (`prediction`, one of PREDICTIONS; `to_eps`). "output": the answers as
                      they are, turned into noise afterwards at the level where the step begins, as diffusers
                      does; of an eps-prediction that is the same, of others it mixes several levels
    Draws no noise; `noise` and `generator` are there because every sampler has them. Gradients are not
    switched off here. Raises ValueError for another `mix`.
    """
    noise_source(noise, generator)  # refuses two sources
    if mix not in ("noise", "output"):
        raise ValueError(f"mix is {mix!r}; it must be 'noise' (the paper) or 'output' (diffusers)")
    before, after = (prediction, "epsilon") if mix == "noise" else ("epsilon", prediction)

    def ask(x: Tensor, t: int, level: float) -> Tensor:
        return to_eps(denoise(x, torch.tensor(t, device=x.device)), x, level, before)

    def move(x: Tensor, combined: Tensor, a_t: float, a_to: float) -> tuple[Tensor, Tensor]:
        return ddim_step(x, to_eps(combined, x, a_t, after), a_t, a_to)

    steps = step_levels(timesteps, alphas_cumprod, final_alpha)
    start = partial(_euler if skip_prk_steps else _runge_kutta, ask, move, alphas_cumprod)
    started = max(0, min(len(steps) - 1, 1 if skip_prk_steps else 3))  # steps of several evaluations
    total = len(steps) + started * (1 if skip_prk_steps else 3)
    history: tuple[Tensor, ...] = ()
    evaluation = 0
    for k, (t, a_t, a_prev) in enumerate(steps):
        first = ask(x, t, a_t)
        history = (first, *history[:3])
        if k < started:
            seen = start(x, first, steps[k], steps[k + 1][0])
        else:
            seen = iter([(t, *move(x, _combined(history), a_t, a_prev))])
        for told, x, pred_x0 in seen:
            if on_step is not None:
                on_step(StepInfo(evaluation, total, told, x, pred_x0))
            evaluation += 1
    return x


def _euler(
    ask: Ask, move: Move, alphas_cumprod: Tensor, x: Tensor, first: Tensor, step: tuple[int, float, float], t_next: int
) -> Iterator[tuple[int, Tensor, Tensor]]:  # fmt: skip
    """Pseudo improved Euler: the step with the mean of the answers at both ends. (t, x, pred_x0) as seen."""
    t, a_t, a_prev = step
    there, pred_x0 = move(x, first, a_t, a_prev)
    yield t, there, pred_x0
    yield t_next, *move(x, (ask(there, t_next, a_prev) + first) / 2, a_t, a_prev)


def _runge_kutta(
    ask: Ask, move: Move, alphas_cumprod: Tensor, x: Tensor, first: Tensor, step: tuple[int, float, float], t_next: int
) -> Iterator[tuple[int, Tensor, Tensor]]:  # fmt: skip
    """Pseudo Runge-Kutta, Liu et al., eq. 13: four evaluations, two of them half-way."""
    t, a_t, a_prev = step
    t_half = t_next + (t - t_next) // 2
    a_half = float(alphas_cumprod[t_half])
    there, pred_x0 = move(x, first, a_t, a_half)
    yield t, there, pred_x0
    second = ask(there, t_half, a_half)
    there, pred_x0 = move(x, second, a_t, a_half)
    yield t_half, there, pred_x0
    third = ask(there, t_half, a_half)
    there, pred_x0 = move(x, third, a_t, a_prev)
    yield t_half, there, pred_x0
    fourth = ask(there, t_next, a_prev)
    yield t_next, *move(x, (first + 2 * second + 2 * third + fourth) / 6, a_t, a_prev)


def _combined(recent: tuple[Tensor, ...]) -> Tensor:
    """What up to four answers, newest first, count for together."""
    weights = _ADAMS_BASHFORTH[len(recent) - 1]
    combined = weights[0] * recent[0]
    for weight, earlier in zip(weights[1:], recent[1:], strict=True):
        combined = combined + weight * earlier
    return combined
