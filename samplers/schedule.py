"""Noise schedules and the forward process, and the types every sampler here shares.

Papers   Ho et al. 2020, arXiv:2006.11239 (betas, q); Song et al. 2021, arXiv:2010.02502 (sub-sequences);
         Salimans and Ho 2022, arXiv:2202.00512 (v); Lin et al. 2024, arXiv:2305.08891 (zero terminal SNR);
         Karras et al. 2022, arXiv:2206.00364 (sigmas)
Tensors  x (B, C, h, w) latents of any floating dtype · alphas_cumprod (T,) float64 · timesteps (N,) int64
Copying  this file stands alone: torch only

"Level" means a value of alphas_cumprod: 1 is clean, 0 is pure noise; a latent at level a is sqrt(a) x0 +
sqrt(1 - a) noise; its sigma is sqrt((1 - a) / a), noise over signal. Tables stay in float64 on the CPU. Only
Python floats and float32 tensors made from them meet a latent, since some devices have no float64; formulas
are evaluated in at least float32 and rounded once to the latent's dtype.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""`denoise(x, t) -> eps`: x, eps (B, C, h, w), t a 0-dim int64 tensor on x's device; all else closed over.

Between two timesteps t is float32 (`solver_steps`)."""

NoiseSource = Callable[[str, int, tuple[int, ...]], Tensor]
"""`noise(site, step, shape) -> Tensor`: standard normal, float32, of that shape; samplers list sites."""


@dataclass(frozen=True)
class StepInfo:
    """What a sampler shows after one evaluation. Read only: the tensors are the sampler's own."""

    step: int  # 0-based index of the evaluation
    total: int  # number of evaluations
    t: float  # training timestep the denoiser was evaluated at; an int but for `solver_steps`' fractions
    x: Tensor  # the latent that the next evaluation will see
    pred_x0: Tensor  # the clean latent the denoiser predicted


OnStep = Callable[[StepInfo], None]


def noise_source(noise: NoiseSource | None, generator: torch.Generator | None) -> NoiseSource:
    """The one noise source behind a sampler's `noise` and `generator` arguments.

    A generator is drawn from on its own device in float32, so the latent's device and dtype never change the
    stream. Raises ValueError if both are given; at the first draw if neither is, or if `noise` answers with
    another shape than was asked for.
    """
    if noise is not None and generator is not None:
        raise ValueError(
            "noise and generator are both given; a sampler has one source of randomness, pass one of them"
        )

    def draw(site: str, step: int, shape: tuple[int, ...]) -> Tensor:
        if noise is not None:
            drawn = noise(site, step, shape)
            if tuple(drawn.shape) != shape:
                raise ValueError(
                    f"noise({site!r}, {step}, ...) has shape {tuple(drawn.shape)}, asked for {shape}"
                )
            return drawn
        if generator is None:
            raise ValueError(f"noise is needed at site {site!r}, step {step}: pass generator= or noise=")
        return torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32)

    return draw


def working_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which formulas on `x` are evaluated: float32, or float64 for a float64 latent."""
    return torch.promote_types(x.dtype, torch.float32)


# ---- betas and levels --------------------------------------------------------------------------------------


def make_betas(
    schedule: str = "scaled_linear",
    *,
    beta_start: float = 0.00085,
    beta_end: float = 0.012,
    num_train_timesteps: int = 1000,
) -> Tensor:
    """Variances beta_t of the forward process, (T,) float64; the defaults are Stable Diffusion 1.x's.

    "scaled_linear" is linear in sqrt(beta) (LDM's code calls this one "linear"), "linear" is linear in beta
    (Ho et al., section 4). Raises ValueError for any other name.
    """
    if schedule == "scaled_linear":
        return torch.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=torch.float64) ** 2
    if schedule == "linear":
        return torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float64)
    raise ValueError(f"beta schedule {schedule!r} is not known; it is 'scaled_linear' or 'linear'")


def make_alphas_cumprod(betas: Tensor) -> Tensor:
    """alphas_cumprod_t = prod_{s <= t} (1 - beta_s), (T,) float64 on the CPU (Ho et al., eq. 4)."""
    return torch.cumprod(1 - betas.to("cpu", torch.float64), dim=0)


def rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Betas whose last level is 0: the last timestep is pure noise (Lin et al., algorithm 1). (T,) float64.

    An eps-prediction says nothing at level 0 (it would be divided by); samplers refuse it. Use v-prediction,
    and clamp alphas_cumprod to a tiny positive number such as 2**-24 before sampling.
    """
    roots = make_alphas_cumprod(betas).sqrt()
    roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])  # last becomes 0, first stays
    levels = roots**2
    alphas = torch.cat([levels[:1], levels[1:] / levels[:-1]])
    return 1 - alphas


# ---- which timesteps to visit ------------------------------------------------------------------------------


def leading_timesteps(num_steps: int, *, num_train_timesteps: int = 1000, offset: int = 1) -> Tensor:
    """Exactly `num_steps` timesteps floor(k T / N) + offset, (N,) int64: 981, 961, ..., 1 for 50 steps.

    Where N divides T this is LDM's spacing and diffusers' "leading" with steps_offset = 1. Elsewhere both
    step by the integer T // N, which covers ever less of the schedule (600 steps would start at t = 600): LDM
    then takes more steps than asked (`ldm_timesteps`), diffusers starts late; here the steps stay spread over
    the whole schedule.
    """
    _check_num_steps(num_steps, num_train_timesteps)
    ascending = [k * num_train_timesteps // num_steps for k in range(num_steps)]
    offset = min(offset, num_train_timesteps - 1 - ascending[-1])  # N = T leaves no room for an offset
    return torch.tensor([t + offset for t in reversed(ascending)])


def linspace_timesteps(num_steps: int, *, num_train_timesteps: int = 1000, drop_zero: bool = False) -> Tensor:
    """Exactly `num_steps` evenly spaced, rounded timesteps, T - 1 to 0, (N,) int64: diffusers' "linspace".

    `drop_zero` leaves out the 0 of N + 1 such timesteps, as multistep solvers do: 999, 749, 500, 250 for 4
    steps. One step alone is at T - 1 (diffusers' DDIM would take t = 0, which denoises nothing).
    """
    points = num_steps + 1 if drop_zero else num_steps
    _check_num_steps(num_steps, num_train_timesteps - int(drop_zero))
    if points == 1:
        return torch.tensor([num_train_timesteps - 1])
    # Not torch.linspace, which counts from both ends: at a tie (499.5 of 30 steps) it rounds otherwise than
    # numpy.
    ascending = torch.arange(points, dtype=torch.float64) * ((num_train_timesteps - 1) / (points - 1))
    return ascending.round().long().flip(0)[:num_steps]


def trailing_timesteps(num_steps: int, *, num_train_timesteps: int = 1000) -> Tensor:
    """Exactly `num_steps` timesteps round(T - k T / N) - 1, k = 0, 1, ...: from T - 1 down, (N,) int64.

    Lin et al., section 3.3, "trailing".
    """
    _check_num_steps(num_steps, num_train_timesteps)
    stride = num_train_timesteps / num_steps
    return torch.tensor([round(num_train_timesteps - k * stride) - 1 for k in range(num_steps)])


def ldm_timesteps(num_steps: int, *, num_train_timesteps: int = 1000) -> Tensor:
    """The timesteps of LDM and official MSBD, for parity: 1, 1 + c, 1 + 2c, ... with c = T // N, descending.

    Where N does not divide T these are *more* than asked for: 31 for 30, 16 for 15. An entry equal to T, on
    which the official code stops with an IndexError (N = 9, 27, 37, ... and all N > 500), is left out.
    """
    _check_num_steps(num_steps, num_train_timesteps)
    return torch.arange(1, num_train_timesteps, num_train_timesteps // num_steps).flip(0)


def start_timesteps(timesteps: Tensor, fraction: float, *, num_train_timesteps: int = 1000) -> Tensor:
    """The timesteps of a run that starts part of the way (SDEdit, MSBD's T'): those <= fraction * T.

    timesteps (N,) descending. 0.4 of 50 leading steps: 381, ..., 1 (20 of them); 0.25: 241, ..., 1 (13); 1:
    all. Raises ValueError unless 0 < fraction <= 1: at 0 there would be nothing to sample.
    """
    _check_fraction(fraction)
    latest = int(fraction * num_train_timesteps + 1e-6)  # 1e-6: (1 - 0.9) * 1000 is a little below 100
    kept = timesteps[timesteps <= latest]
    return kept if len(kept) else timesteps[-1:]


def ldm_start_timesteps(timesteps: Tensor, fraction: float) -> Tensor:
    """The timesteps of a partial run as official MSBD counts them: the last int(N * fraction), at least one.

    timesteps (N,) descending. The truncation is the official one (0.29 of 100 gives 28); where it gives 0 the
    official code stops with an error and we take the smallest timestep. Raises ValueError unless 0 < fraction
    <= 1.
    """
    _check_fraction(fraction)
    return timesteps[-max(1, int(len(timesteps) * fraction)) :]


def _check_num_steps(num_steps: int, most: int) -> None:
    if not 1 <= num_steps <= most:
        raise ValueError(f"num_steps is {num_steps}; this schedule has room for 1 to {most} steps")


def _check_fraction(fraction: float) -> None:
    if not 0 < fraction <= 1:
        raise ValueError(
            f"start fraction is {fraction}; it must be above 0 and at most 1 (1: the whole schedule)"
        )


def step_levels(
    timesteps: Iterable[int] | Tensor, alphas_cumprod: Tensor, final_alpha: float = 1.0
) -> list[tuple[int, float, float]]:
    """(t, a_t, a_prev) of every step: from its own level to the next timestep's, at last to `final_alpha`.

    Raises ValueError unless the timesteps fall strictly, lie inside the table, and `final_alpha` is at least
    the last level.
    """
    ts = [int(t) for t in timesteps]
    if any(a <= b for a, b in pairwise(ts)) or any(not 0 <= t < len(alphas_cumprod) for t in ts):
        raise ValueError(f"timesteps must fall strictly and lie in 0..{len(alphas_cumprod) - 1}, got {ts}")
    levels = [float(alphas_cumprod[t]) for t in ts]
    return list(zip(ts, levels, _following(levels, final_alpha), strict=True))


def solver_steps(
    timesteps: Sequence[float] | Tensor,
    alphas_cumprod: Tensor,
    final_alpha: float = 1.0,
    levels: Sequence[float] | Tensor | None = None,
) -> list[tuple[float, float, float]]:
    """`step_levels` for timesteps that are fractions, or that are not where the latent is.

    At a fraction of a timestep sigma is linear between its two neighbours, as in diffusers' Euler schedulers.
    With `levels` (N,) those are the latent's, and t is only what the denoiser is told (`karras_steps`). Whole
    timesteps come back as int. Raises ValueError unless the timesteps lie inside the table and the levels
    rise strictly, up to `final_alpha`.
    """
    ts = [int(t) if t.is_integer() else t for t in map(float, timesteps)]
    if any(not 0 <= t <= len(alphas_cumprod) - 1 for t in ts):
        raise ValueError(f"timesteps must lie in 0..{len(alphas_cumprod) - 1}, got {ts}")
    given = [_level_at(t, alphas_cumprod) for t in ts] if levels is None else [float(a) for a in levels]
    if len(given) != len(ts) or not all(a < b for a, b in pairwise(given)):
        raise ValueError(f"{len(ts)} timesteps need as many levels, rising strictly; got {given}")
    return list(zip(ts, given, _following(given, final_alpha), strict=True))


def karras_steps(num_steps: int, alphas_cumprod: Tensor, *, rho: float = 7.0) -> tuple[Tensor, Tensor]:
    """Timesteps (N,) int64 and levels (N,) float64 of N sigmas spaced as by Karras et al., eq. 5.

    From the sigma of the last table entry to that of the first, evenly in sigma^(1 / rho). Sigmas lie between
    the table's; the timestep a net is told there is found linearly in log sigma and rounded, as in diffusers'
    DPM-Solver++, so towards the clean end it may repeat. Pass both: `dpmpp_sample(..., timesteps,
    alphas_cumprod, levels=levels)`.
    """
    _check_num_steps(num_steps, len(alphas_cumprod))
    levels = alphas_cumprod.to("cpu", torch.float64)
    table = ((1 - levels) / levels).sqrt()  # (T,) sigmas, rising
    fraction = torch.arange(num_steps, dtype=torch.float64) / max(num_steps - 1, 1)
    sigmas = torch.lerp(table[-1] ** (1 / rho), table[0] ** (1 / rho), fraction) ** rho
    high = torch.searchsorted(table, sigmas).clamp(1, len(table) - 1)
    low_log, high_log = table[high - 1].log(), table[high].log()
    timesteps = high - 1 + (sigmas.log() - low_log) / (high_log - low_log)
    return timesteps.round().long(), (1 / (1 + sigmas**2)).clamp(levels[-1], levels[0])


def _level_at(t: float, alphas_cumprod: Tensor) -> float:
    """The level of a timestep that may be a fraction, sigma being linear in between."""
    low, fraction = int(t), t - int(t)
    if fraction == 0:
        return float(alphas_cumprod[low])
    before, after = (math.sqrt((1 - a) / a) for a in map(float, alphas_cumprod[low : low + 2]))
    return 1 / (1 + (before + fraction * (after - before)) ** 2)


def _following(levels: list[float], final_alpha: float) -> list[float]:
    """The level that each step leads to."""
    if levels and not levels[-1] <= final_alpha <= 1:
        raise ValueError(
            f"final_alpha is {final_alpha}; it must lie between the last step's level {levels[-1]:.6f} and 1"
        )
    return [*levels[1:], float(final_alpha)] if levels else []


# ---- the forward process -----------------------------------------------------------------------------------


def q_sample(x0: Tensor, t: int | Tensor, alphas_cumprod: Tensor, noise: Tensor) -> Tensor:
    """x_t ~ q(x_t | x0): the clean latent x0 noised to timestep t (Ho et al., eq. 4). Dtype and device of x0.

    x0 and noise (B, C, h, w) or broadcastable, t one timestep or (B,) of them.
    """
    root_a, root_1_a = _level_roots(alphas_cumprod, t, x0)
    return (root_a * x0 + root_1_a * noise.to(x0.device)).to(x0.dtype)


def q_sample_between(x: Tensor, a_from: float | Tensor, a_to: float | Tensor, noise: Tensor) -> Tensor:
    """Noise a latent further, from level `a_from` to `a_to`: q's Markov form. Dtype and device of x.

    x and noise (B, C, h, w) or broadcastable; levels are numbers. With r = a_to / a_from, x' = sqrt(r) x +
    sqrt(1 - r) noise: Ho et al., eq. 2, over several steps at once. From level 1 it is q_sample. Official
    MSBD takes a clean latent to be at alphas_cumprod[0] when it starts part of the way:
    `q_sample_between(z, alphas_cumprod[0], alphas_cumprod[t], noise)`. Raises ValueError unless
    0 <= a_to <= a_from <= 1: noise cannot be taken away.
    """
    a_from, a_to = float(a_from), float(a_to)
    if not 0 <= a_to <= a_from <= 1 or a_from == 0:
        raise ValueError(
            f"cannot noise from level {a_from} to level {a_to}: levels lie in 0..1 and fall as noise is added"
        )
    ratio = a_to / a_from
    dtype = working_dtype(x)
    noised = math.sqrt(ratio) * x.to(dtype) + math.sqrt(1 - ratio) * noise.to(x.device, dtype)
    return noised.to(x.dtype)


def predict_x0(x: Tensor, eps: Tensor, a_t: float) -> Tensor:
    """The clean latent that `eps` implies for `x` at level `a_t`, in the working dtype (Song et al., eq. 9).

    Raises ValueError unless 0 < a_t <= 1.
    """
    if not 0 < a_t <= 1:
        raise ValueError(
            f"level a_t is {a_t}; an eps-prediction needs 0 < a_t <= 1 (zero terminal SNR: clamp to 2**-24)"
        )
    dtype = working_dtype(x)
    return (x.to(dtype) - math.sqrt(1 - a_t) * eps.to(dtype)) / math.sqrt(a_t)


def half_log_snr(level: float) -> float:
    """lambda = log(sqrt(a) / sqrt(1 - a)) of a level: what exponential integrators count steps in.

    Raises ValueError unless 0 < level < 1.
    """
    if not 0 < level < 1:
        raise ValueError(
            f"level is {level}; log(signal / noise) needs 0 < level < 1 (zero terminal SNR: clamp to 2**-24)"
        )
    return (math.log(level) - math.log1p(-level)) / 2


# ---- v-prediction ------------------------------------------------------------------------------------------


def velocity(x0: Tensor, noise: Tensor, t: int | Tensor, alphas_cumprod: Tensor) -> Tensor:
    """v = sqrt(a_t) noise - sqrt(1 - a_t) x0, the target of a v-predicting net. Shapes as in q_sample.

    Salimans and Ho, section 4.
    """
    root_a, root_1_a = _level_roots(alphas_cumprod, t, x0)
    return (root_a * noise.to(x0.device) - root_1_a * x0).to(x0.dtype)


def eps_from_velocity(v: Tensor, x: Tensor, t: int | Tensor, alphas_cumprod: Tensor) -> Tensor:
    """eps = sqrt(a_t) v + sqrt(1 - a_t) x, the noise that `v` implies for `x`; in the working dtype."""
    root_a, root_1_a = _level_roots(alphas_cumprod, t, x)
    return root_a * v + root_1_a * x


def v_prediction(model: Denoiser, alphas_cumprod: Tensor) -> Denoiser:
    """A denoiser (x, t -> eps) out of a model that predicts v."""

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        return eps_from_velocity(model(x, t), x, t, alphas_cumprod)

    return denoise


def _level_roots(alphas_cumprod: Tensor, t: int | Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(a_t) and sqrt(1 - a_t), each (1 or B, 1, 1, 1), made in float64 on the CPU."""
    a_t = alphas_cumprod.to("cpu", torch.float64)[torch.as_tensor(t, device="cpu")]
    a_t = a_t.reshape(-1, *([1] * (x.dim() - 1)))
    dtype = working_dtype(x)
    return a_t.sqrt().to(dtype).to(x.device), (1 - a_t).sqrt().to(dtype).to(x.device)
