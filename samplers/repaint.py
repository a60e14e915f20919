"""Blended sampling (Blended Diffusion, RePaint): repaint a masked region, hold the rest to a known latent.

Papers   Avrahami et al. 2022, arXiv:2111.14818, 2206.02779 (Blended Diffusion); Lugmayr et al. 2022,
         arXiv:2201.09865 (RePaint); Ackermann and Li 2022, arXiv:2210.12965, algorithm 1 (both: MSBD)
Tensors  x (B, C, h, w) latent · known (1 or B, C, h, w) clean latent · mask (1 or B, 1, h, w), 1 = repaint
Copying  needs schedule.py and ddim.py beside it, and torch

The schedule is data: a *plan* is a tuple of `Evaluation`s, carried out by `blended_sample`. `algorithm_1` is
the paper's double loop, read top to bottom. Below it stand the general jump walk of RePaint
(`repaint_states`, `repaint_plan`) and the counting of MSBD's official code (`official_plan`). Blended
Diffusion is RePaint with no repeats.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from .ddim import ddim_sigma, ddim_step
from .schedule import (
    Denoiser,
    NoiseSource,
    OnStep,
    StepInfo,
    noise_source,
    q_sample_between,
    step_levels,
    to_eps,
)

# What a step leaves to the next one of the same kind: a multistep method's predictions, else nothing.
History = tuple[Tensor, ...]


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of the denoiser and what follows it. Levels are values of alphas_cumprod (1 = clean)."""

    t: int  # timestep the denoiser is told
    a_t: float  # level the latent is at
    a_prev: float  # level the DDIM step leads to
    a_known: float | None  # level the known latent is blended in at, after the step; None: no blending
    known_id: int  # which draw of the noised known latent; evaluations with equal ids share one
    renoise_to: float | None  # level the whole latent is noised to after blending; None: it stays at a_prev


# (x, eps, evaluation, history, noise) -> (x at a_prev, pred_x0, history). `noise()` draws what the step adds,
# of x's shape, where it adds some.
Solver = Callable[[Tensor, Tensor, Evaluation, History, Callable[[], Tensor]], tuple[Tensor, Tensor, History]]


def ddim_solver(eta: float) -> Solver:
    """DDIM's step (`samplers.ddim.ddim_step`) for `blended_sample`; it has no history."""

    def solve(
        x: Tensor, eps: Tensor, now: Evaluation, history: History, noise: Callable[[], Tensor]
    ) -> tuple[Tensor, Tensor, History]:
        step_noise = noise() if ddim_sigma(now.a_t, now.a_prev, eta) > 0 else None
        return *ddim_step(x, eps, now.a_t, now.a_prev, eta, step_noise), ()

    return solve


def algorithm_1(
    timesteps: Sequence[int] | Tensor, alphas_cumprod: Tensor, *, repeats: int = 0, final_alpha: float = 1.0
) -> tuple[Evaluation, ...]:
    """Lines 5-14 of MSBD's Algorithm 1 as a plan: Blended Diffusion, each step repeated `repeats` = R times.

    timesteps (N,) descending, alphas_cumprod (T,). N (1 + R) evaluations; with R = 0 they are lines 22-26.
    The last step leads to `final_alpha`: 1, a clean latent. ValueError for R below 0 and timesteps outside
    the table.
    """
    if repeats < 0:
        raise ValueError(f"repeats is {repeats}; it must be 0 (no repeats) or more")
    plan: list[Evaluation] = []
    levels = step_levels(timesteps, alphas_cumprod, final_alpha)
    for k, (t, a_t, a_prev) in enumerate(levels):  # line 5: t = T, ..., 0
        # line 6: x_t -> x_{t-1}; line 7: x^ at the level of x_{t-1}, drawn once per t; line 8: blended in
        step = Evaluation(t, a_t, a_prev, a_known=a_prev, known_id=k, renoise_to=None)
        plan.append(step)
        for _ in range(repeats):  # line 9: r = 1, ..., R
            plan[-1] = replace(plan[-1], renoise_to=a_t)  # line 10: x_{t-1} -> x_t
            plan.append(step)  # line 11: x_t -> x_{t-1} again; line 12: the same x^ blended in
        # line 13: the next r
    # line 14: the next t
    return tuple(plan)


def with_known(
    plan: Sequence[Evaluation], *, level: str = "prev", noise: str = "once"
) -> tuple[Evaluation, ...]:
    """`plan` with the known latent blended in at another level, or drawn more often.

      level  "prev": the level the step leads to (Algorithm 1, line 7); "current": the level it came from, as
             the official code does
      noise  "once": all evaluations of a timestep share one x^, drawn outside Algorithm 1's inner loop;
             "fresh": every evaluation draws its own, as RePaint does
    ValueError for other words.
    """
    if level not in ("prev", "current"):
        raise ValueError(
            f"known_level is {level!r}; it must be 'prev' (the papers) or 'current' (official code)"
        )
    if noise not in ("once", "fresh"):
        raise ValueError(f"known_noise is {noise!r}; it must be 'once' (algorithm 1) or 'fresh' (RePaint)")
    order = {t: number for number, t in enumerate(dict.fromkeys(e.t for e in plan))}
    return tuple(
        replace(
            e,
            a_known=e.a_prev if level == "prev" else e.a_t,
            known_id=order[e.t] if noise == "once" else number,
        )
        for number, e in enumerate(plan)
    )


# ---- the general jump walk ---------------------------------------------------------------------------------


def repaint_states(
    num_steps: int,
    *,
    jump_length: int,
    jump_n_sample: int,
    jump_from_final: bool = False,
    inner_jumps: Sequence[tuple[int, int]] = (),
    n_sample: int = 1,
    start_resampling: int | None = None,
) -> list[int]:
    """The states RePaint walks through, num_steps - 1 first, -1 last: down by 1 denoises, up by 1 noises.

    A state says how noisy a latent is: in a run of N steps, state k is the level of the k-th smallest
    timestep, N - 1 the start and -1 the finished latent. One evaluation of the denoiser leads from state k to
    k - 1.

    Whenever a state 0, jump_length, 2 jump_length, ... is reached from which a jump fits, the walk goes up
    jump_length states and down again, jump_n_sample - 1 times (RePaint, section 4.2 and appendix; published:
    250, 10, 10 -> 4571 states). RePaint counts these states from 0, so its last evaluation is never repeated.
    With `jump_from_final` they are counted from -1, the finished latent: then blocks of jump_length steps are
    repeated whole, the last block too, and jump_length 1 is MSBD's Algorithm 1.

    The rest are options of RePaint's get_schedule_jump that its published runs do not use:
      inner_jumps       its jump2 and jump3, (length, n_sample) each, the longer first: walks within the walk,
                        anew after each jump of those before them
      n_sample          every state below N - 2 is left by one step up and reached again n_sample - 1 times
      start_resampling  nothing goes up above this state
    ValueError for a number below 1.
    """
    kinds = [*reversed(inner_jumps), (jump_length, jump_n_sample)]  # from the innermost out
    if min(num_steps, n_sample, *(number for kind in kinds for number in kind)) < 1:
        raise ValueError(
            "num_steps, jump_length, jump_n_sample and n_sample must be at least 1, got "
            f"{num_steps}, {jump_length}, {jump_n_sample}, {n_sample} and inner jumps {list(inner_jumps)} "
            "(1 sample: no repeats)"
        )
    lowest = -1 if jump_from_final else 0
    highest = num_steps if start_resampling is None else start_resampling

    def all_of(length: int, samples: int) -> dict[int, int]:
        return dict.fromkeys(range(lowest, num_steps - length, length), samples - 1)

    jumps_left = [all_of(*kind) for kind in kinds]
    states = [num_steps - 1]
    while states[-1] >= 0:
        state = states[-1] - 1
        states.append(state)
        if 0 <= state < min(num_steps - 2, highest + 1):
            states += [state + 1, state] * (n_sample - 1)
        for i, (length, _) in enumerate(kinds):
            state = states[-1]
            if jumps_left[i].get(state, 0) > 0 and state + length <= highest:
                jumps_left[i][state] -= 1
                states.extend(range(state + 1, state + length + 1))
                jumps_left[:i] = [all_of(*kind) for kind in kinds[:i]]
    return states


def repaint_plan(
    timesteps: Sequence[int] | Tensor,
    alphas_cumprod: Tensor,
    *,
    repeats: int = 0,
    jump_length: int = 1,
    jump_from_final: bool = True,
    known_level: str = "prev",
    known_noise: str = "once",
    final_alpha: float = 1.0,
) -> tuple[Evaluation, ...]:
    """The papers' plans: `algorithm_1`, or a walk whose repeats go back `jump_length` steps at once.

    timesteps (N,) descending, alphas_cumprod (T,). The last step leads to `final_alpha`, 1 for a clean
    latent.
      repeats      further evaluations of each timestep: N (1 + R) in all. RePaint's jump_n_sample is 1 + R
      jump_length, jump_from_final   as in `repaint_states`
      known_level, known_noise       as in `with_known`
    ValueError for other words or counts, and for a jump longer than the run.
    """
    if jump_length == 1 and jump_from_final:
        plan = algorithm_1(timesteps, alphas_cumprod, repeats=repeats, final_alpha=final_alpha)
    else:
        plan = _jump_walk(timesteps, alphas_cumprod, repeats, jump_length, jump_from_final, final_alpha)
    return with_known(plan, level=known_level, noise=known_noise)


def _jump_walk(
    timesteps: Sequence[int] | Tensor,
    alphas_cumprod: Tensor,
    repeats: int,
    jump_length: int,
    jump_from_final: bool,
    final_alpha: float,
) -> tuple[Evaluation, ...]:
    """`repaint_states` as a plan."""
    if repeats < 0:
        raise ValueError(f"repeats is {repeats}; it must be 0 (no repeats) or more")
    steps = step_levels(timesteps, alphas_cumprod, final_alpha)[::-1]  # steps[k] leads from state k to k - 1
    if repeats and jump_length > len(steps):
        raise ValueError(
            f"jump_length is {jump_length}, more than the {len(steps)} steps of the run: nothing would be repeated; "
            "take a shorter jump, or 0 repeats"
        )
    states = repaint_states(
        len(steps), jump_length=jump_length, jump_n_sample=repeats + 1, jump_from_final=jump_from_final
    )
    plan: list[Evaluation] = []
    for state, following in pairwise(states):
        if following > state:
            # A jump over several states is one draw: q is Markov, noising in one go is the same distribution.
            plan[-1] = replace(plan[-1], renoise_to=steps[following][1])
            continue
        t, a_t, a_prev = steps[state]
        plan.append(Evaluation(t, a_t, a_prev, a_prev, known_id=len(plan), renoise_to=None))
    return tuple(plan)


# ---- the official counting ---------------------------------------------------------------------------------


def official_indices(num_steps: int, *, repeats: int, jump: int = 0) -> list[int]:
    """Which step index, num_steps - 1 first and 0 last, each evaluation of MSBD's official code uses.

    jump = 0: every index 1 + repeats times. jump > 0: a walk like RePaint's with jump_n_sample = repeats
    (sic: one repeat less), where the code also evaluates the state that it jumps back from, and counts these
    states from the start: N - 2 jump, N - 3 jump, ... down to 0. Where jump divides N they are RePaint's.
    Of a jump longer than the run the code evaluates the last index twice. Raises ValueError for negative
    numbers.
    """
    if repeats < 0 or jump < 0:
        raise ValueError(f"repeats and jump must be 0 or more, got {repeats} and {jump}")
    if jump == 0:
        return [k for k in reversed(range(num_steps)) for _ in range(1 + repeats)]
    jumps_left = dict.fromkeys(range(num_steps - 2 * jump, -1, -jump), repeats - 1)
    indices = [num_steps - 1]
    while indices[-1] > 0 or jumps_left.get(0, 0) > 0:
        state = indices[-1]
        if jumps_left.get(state, 0) > 0:
            jumps_left[state] -= 1
            indices.append(state + jump)
        else:
            indices.append(state - 1)
    return [*indices, 0] if repeats and jump > num_steps else indices


def official_plan(
    timesteps: Sequence[int] | Tensor, alphas_cumprod: Tensor, *, repeats: int = 0, jump: int = 0
) -> tuple[Evaluation, ...]:
    """The plan of MSBD's official code, for preset `official`; counts as `official_indices` does.

    Where it leaves the papers: the known latent is blended at the current level, one step too noisy, with
    fresh noise each time; the last step leads to alphas_cumprod[0], so the result is not quite clean; nothing
    is re-noised after the first evaluation nor at index 0 (there the code compares with a negative index, its
    largest timestep), so those repeats run on a latent less noisy than they are told. The level a latent is
    at is therefore not always `a_t`. The official code also shares one noised known latent among the pictures
    of a batch (`blended_sample(share_known_noise=True)`), starts full runs from pure noise, and partial ones
    from `q_sample_between(known, alphas_cumprod[0], alphas_cumprod[timesteps[0]], noise)`.
    """
    steps = step_levels(timesteps, alphas_cumprod, float(alphas_cumprod[0]))[::-1]
    indices = official_indices(len(steps), repeats=repeats, jump=jump)
    plan: list[Evaluation] = []
    for i, k in enumerate(indices):
        t, a_t, a_prev = steps[k]
        renoise_to = None
        if 0 < i < len(indices) - 1 and k > 0 and steps[indices[i + 1]][1] < a_prev:
            renoise_to = steps[indices[i + 1]][1]
        plan.append(Evaluation(t, a_t, a_prev, a_known=a_t, known_id=i, renoise_to=renoise_to))
    return tuple(plan)


# ---- carrying a plan out -----------------------------------------------------------------------------------


def blend_known(x: Tensor, known: Tensor, mask: Tensor) -> Tensor:
    """mask * x + (1 - mask) * known: exactly x where mask is 1, exactly `known` where it is 0.

    x (B, C, h, w), known (1 or B, C, h, w), mask (1 or B, 1, h, w) in 0..1. Dtype and device of x. RePaint
    eq. 8c; algorithm 1, line 8.
    """
    mask = mask.to(x)
    return mask * x + (1 - mask) * known.to(x)


def blended_sample(
    denoise: Denoiser,
    x: Tensor,
    plan: Sequence[Evaluation],
    *,
    known: Tensor,
    mask: Tensor | Callable[[int], Tensor],
    noise: NoiseSource | None = None,
    generator: torch.Generator | None = None,
    eta: float = 1.0,
    solver: Solver | None = None,
    prediction: str = "epsilon",
    share_known_noise: bool = False,
    start: int = 0,
    stop: int | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Carry out `plan` from `x` (B, C, h, w), at level plan[0].a_t: repaint `mask`, hold the rest to `known`.

    known (1 or B, C, h, w): the clean source latent. mask (1 or B, 1, h, w) in 0..1, or a function from the
    evaluation's index to one. The result is at the last evaluation's a_prev; where that and its a_known are
    1, it equals `known` exactly wherever mask is 0.

    `solver` takes the steps, by default DDIM with this `eta`. What a multistep method remembers is forgotten
    where the latent is noised again. `start` and `stop` carry out plan[start:stop] only, with the noise that
    the whole run has there; `x` is then at plan[start].a_t.

    Noise sites, in the order of drawing within an evaluation, each drawn only when used:
      "step"    x's shape, step = index of the evaluation; with DDIM where sigma > 0: not with eta = 0 or into
                level 1
      "known"   x's shape, step = known_id, once per id; where a_known < 1. With share_known_noise in
                `known`'s shape: a single source then has one noise for the whole batch, as in official MSBD
      "renoise" x's shape, step = index of the evaluation; where renoise_to is set
    The start is the caller's: q_sample of `known` with noise of site "init", step 0. `prediction` says what
    `denoise` answers, one of PREDICTIONS, turned into noise at the latent's own level (`to_eps`). Gradients
    are not switched off here. Raises ValueError if shapes do not fit.
    """
    _check_shape("known", known, x, x.shape[1])
    draw = noise_source(noise, generator)
    solve = ddim_solver(eta) if solver is None else solver
    known_shape = tuple(known.shape if share_known_noise else x.shape)
    known = known.to(x)
    last_use = {evaluation.known_id: step for step, evaluation in enumerate(plan)}
    x_hats: dict[int, Tensor] = {}  # noised known latents still to be used again, by known_id
    history: History = ()
    for step, now in list(enumerate(plan))[start:stop]:
        eps = to_eps(denoise(x, torch.tensor(now.t, device=x.device)), x, now.a_t, prediction)
        # algorithm 1, lines 6 and 11
        x, pred_x0, history = solve(x, eps, now, history, partial(draw, "step", step, tuple(x.shape)))
        if now.a_known is not None:
            if now.known_id not in x_hats:
                x_hats[now.known_id] = _noised(known, now.a_known, draw, now.known_id, known_shape)  # line 7
            x_hat = x_hats[now.known_id] if step < last_use[now.known_id] else x_hats.pop(now.known_id)
            x = blend_known(x, x_hat, _mask_at(mask, step, x))  # lines 8 and 12
        if now.renoise_to is not None:
            renoise = draw("renoise", step, tuple(x.shape))
            x, history = q_sample_between(x, now.a_prev, now.renoise_to, renoise), ()  # line 10
        if on_step is not None:
            on_step(StepInfo(step, len(plan), now.t, x, pred_x0))
    return x


def _noised(known: Tensor, level: float, draw: NoiseSource, known_id: int, shape: tuple[int, ...]) -> Tensor:
    """The known latent at `level`; at level 1 itself, without a draw."""
    return known if level == 1 else q_sample_between(known, 1.0, level, draw("known", known_id, shape))


def _mask_at(mask: Tensor | Callable[[int], Tensor], step: int, x: Tensor) -> Tensor:
    """The mask of evaluation `step`, its shape checked."""
    found = mask if isinstance(mask, Tensor) else mask(step)
    _check_shape("mask", found, x, 1)
    return found


def _check_shape(name: str, tensor: Tensor, x: Tensor, channels: int) -> None:
    B, _, h, w = x.shape
    if tuple(tensor.shape) not in ((1, channels, h, w), (B, channels, h, w)):
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; expected (1 or {B}, {channels}, {h}, {w}), as the latent"
        )
