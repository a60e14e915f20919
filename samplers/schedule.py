"""Noise schedules and the forward process, and the types every sampler here shares.

Papers   Ho et al. 2020, arXiv:2006.11239 (betas, q); Nichol and Dhariwal 2021, arXiv:2102.09672 (cosine);
         Song et al. 2021, arXiv:2010.02502 (sub-sequences);
         Salimans and Ho 2022, arXiv:2202.00512 (v); Lin et al. 2024, arXiv:2305.08891 (zero terminal SNR);
         Karras et al. 2022, arXiv:2206.00364 (sigmas); Lee et al. 2024, arXiv:2407.12173 (Beta spacing);
         Saharia et al. 2022, arXiv:2205.11487 (dynamic thresholding)
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

Between two timesteps t is float32 (`solver_steps`). Samplers that are told `prediction` take a v or a clean
latent for the answer (`to_eps`)."""

PREDICTIONS = ("epsilon", "v_prediction", "sample")
"""What a denoiser's answer may be: the noise, Salimans and Ho's v, or the clean latent."""

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


BETA_SCHEDULES = ("scaled_linear", "linear", "squaredcos_cap_v2")


def make_betas(
    schedule: str = "scaled_linear",
    *,
    beta_start: float = 0.00085,
    beta_end: float = 0.012,
    num_train_timesteps: int = 1000,
) -> Tensor:
    """Variances beta_t of the forward process, (T,) float64; the defaults are Stable Diffusion 1.x's.

    "scaled_linear" is linear in sqrt(beta) (LDM's code calls this one "linear"), "linear" is linear in beta
    (Ho et al., section 4). "squaredcos_cap_v2" is the cosine schedule (Nichol and Dhariwal, eq. 17; no beta
    above 0.999), which has no ends to choose. A model's own betas ("trained_betas") need none of this: pass
    them to `make_alphas_cumprod` as a tensor. Raises ValueError for any other name.
    """
    if schedule == "scaled_linear":
        return torch.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=torch.float64) ** 2
    if schedule == "linear":
        return torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float64)
    if schedule == "squaredcos_cap_v2":
        t = torch.arange(num_train_timesteps + 1, dtype=torch.float64) / num_train_timesteps
        # The levels themselves but for a factor, which their ratios do not have.
        levels = torch.cos((t + 0.008) / 1.008 * (math.pi / 2)) ** 2
        return (1 - levels[1:] / levels[:-1]).clamp(max=0.999)
    raise ValueError(f"beta schedule {schedule!r} is not known; it is one of {', '.join(BETA_SCHEDULES)}")


def make_alphas_cumprod(betas: Tensor) -> Tensor:
    """alphas_cumprod_t = prod_{s <= t} (1 - beta_s), (T,) float64 on the CPU (Ho et al., eq. 4)."""
    return torch.cumprod(1 - betas.to("cpu", torch.float64), dim=0)


def rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Betas whose last level is 0: the last timestep is pure noise (Lin et al., algorithm 1). (T,) float64.

    An eps-prediction says nothing at level 0 (it would be divided by); samplers refuse it. Use v-prediction,
    and `lift_zero_level` before sampling.
    """
    roots = make_alphas_cumprod(betas).sqrt()
    roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])  # last becomes 0, first stays
    levels = roots**2
    alphas = torch.cat([levels[:1], levels[1:] / levels[:-1]])
    return 1 - alphas


def lift_zero_level(alphas_cumprod: Tensor, least: float = 2**-24) -> Tensor:
    """`alphas_cumprod` (T,) with a last level of 0 replaced by `least`, for sampling. float64 on the CPU.

    2**-24 is diffusers' number (sigma 4096). Where the level before it is smaller still (1.5e-9 with Ho et
    al.'s betas at T = 1100), half of that is taken instead, so that levels fall strictly; diffusers' sigmas
    then rise and fall again.
    """
    levels = alphas_cumprod.to("cpu", torch.float64).clone()
    if float(levels[-1]) == 0:
        levels[-1] = min(least, float(levels[-2]) / 2) if len(levels) > 1 else least
    return levels


# ---- which timesteps to visit ------------------------------------------------------------------------------


def leading_timesteps(num_steps: int, *, num_train_timesteps: int = 1000, offset: int = 1) -> Tensor:
    """Exactly `num_steps` timesteps floor(k T / N) + offset, (N,) int64: 981, 961, ..., 1 for 50 steps.

    Where N divides T this is LDM's spacing and diffusers' "leading" with steps_offset = 1. Elsewhere both
    step by the integer T // N, which covers ever less of the schedule (600 steps would start at t = 600): LDM
    then takes more steps than asked (`ldm_timesteps`), diffusers starts late (`diffusers_leading_timesteps`;
    958 for 30 steps, here 967); here the steps stay spread over the whole schedule.
    """
    _check_num_steps(num_steps, num_train_timesteps)
    ascending = [k * num_train_timesteps // num_steps for k in range(num_steps)]
    offset = min(offset, num_train_timesteps - 1 - ascending[-1])  # N = T leaves no room for an offset
    return torch.tensor([t + offset for t in reversed(ascending)])


def diffusers_leading_timesteps(
    num_steps: int, *, num_train_timesteps: int = 1000, offset: int = 1, drop_zero: bool = False
) -> Tensor:
    """diffusers' "leading", for parity: k (T // N) + offset, k = N - 1, ..., 0. (N,) int64.

    Its schedulers of DDIM, DDPM, PNDM, Euler and their kind; the same as `leading_timesteps` where N divides
    T. `drop_zero` is the multistep solvers' (DPM-Solver++, UniPC, DEIS): k (T // (N + 1)) + offset for k = N,
    ..., 1, so 941 first for 20 steps.
    """
    _check_num_steps(num_steps, num_train_timesteps - int(drop_zero))
    stride = num_train_timesteps // (num_steps + drop_zero)
    ascending = (torch.arange(num_steps) + int(drop_zero)) * stride
    offset = min(offset, num_train_timesteps - 1 - int(ascending[-1]))  # N = T leaves no room for an offset
    return (ascending + offset).flip(0)


def linspace_timesteps(
    num_steps: int, *, num_train_timesteps: int = 1000, drop_zero: bool = False, rounded: bool = True
) -> Tensor:
    """Exactly `num_steps` evenly spaced, rounded timesteps, T - 1 to 0, (N,) int64: diffusers' "linspace".

    `drop_zero` leaves out the 0 of N + 1 such timesteps, as multistep solvers do: 999, 749, 500, 250 for 4
    steps. `rounded` False gives the fractions, (N,) float64, as diffusers' Euler and its kind take them (999,
    946.4, ..., 0), for samplers that know fractions (`solver_steps`). One step alone is at T - 1 (diffusers'
    DDIM would take t = 0, which denoises nothing).
    """
    points = num_steps + 1 if drop_zero else num_steps
    _check_num_steps(num_steps, num_train_timesteps - int(drop_zero))
    if points == 1:
        return torch.tensor([num_train_timesteps - 1], dtype=torch.int64 if rounded else torch.float64)
    # Not torch.linspace, which counts from both ends: at a tie (499.5 of 30 steps) it rounds otherwise than
    # numpy.
    ascending = torch.arange(points, dtype=torch.float64) * ((num_train_timesteps - 1) / (points - 1))
    return (ascending.round().long() if rounded else ascending).flip(0)[:num_steps]


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
    if len(given) != len(ts):
        raise ValueError(f"{len(ts)} timesteps need as many levels, got {len(given)}")
    for k, (now, following) in enumerate(pairwise(given)):
        if not now < following:
            raise ValueError(
                f"levels must be rising strictly, but step {k} of {len(given)}, at timestep {ts[k]}, has level {now} "
                f"and the next {following}"
            )
    return list(zip(ts, given, _following(given, final_alpha), strict=True))


def karras_steps(
    num_steps: int,
    alphas_cumprod: Tensor,
    *,
    rho: float = 7.0,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    rounded: bool = True,
) -> tuple[Tensor, Tensor]:
    """`sigma_steps` of `karras_sigmas`: timesteps (N,) and levels (N,) float64 of N sigmas.

    From the sigma of the last table entry to that of the first, unless `sigma_max` and `sigma_min` say
    otherwise. `rounded` tells the net whole timesteps (int64), as diffusers' DPM-Solver++ and UniPC do; False
    tells it the fractions (float64), as diffusers' Euler and k-diffusion do. Pass both on:
    `dpmpp_sample(..., timesteps, alphas_cumprod, levels=levels)`.
    """
    _check_num_steps(num_steps, len(alphas_cumprod))
    least, most = sigma_range(alphas_cumprod)
    low = least if sigma_min is None else sigma_min
    high = most if sigma_max is None else sigma_max
    return sigma_steps(karras_sigmas(num_steps, low, high, rho), alphas_cumprod, rounded=rounded)


def karras_sigmas(num_steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """N sigmas from `sigma_max` down to `sigma_min`, evenly in sigma^(1 / rho). (N,) float64.

    Karras et al., eq. 5. One sigma alone is sigma_max. Raises ValueError unless 0 < sigma_min <= sigma_max
    and rho > 0.
    """
    _check_sigmas(num_steps, sigma_min, sigma_max)
    if not rho > 0:
        raise ValueError(f"rho is {rho}; it must be above 0 (7: Karras et al.)")
    inner = _between(sigma_max ** (1 / rho), sigma_min ** (1 / rho), _ramp(num_steps)) ** rho
    return _with_ends(inner, sigma_min, sigma_max)


def exponential_sigmas(num_steps: int, sigma_min: float, sigma_max: float) -> Tensor:
    """N sigmas from `sigma_max` down to `sigma_min`, evenly in log sigma. (N,) float64.

    That is evenly in lambda = -log sigma: the "uniform logSNR" steps of Lu et al. (arXiv:2206.00927, section
    3.4), diffusers' `use_exponential_sigmas` and its `use_lu_lambdas` alike. One sigma alone is sigma_max.
    Raises ValueError unless 0 < sigma_min <= sigma_max.
    """
    _check_sigmas(num_steps, sigma_min, sigma_max)
    inner = _between(math.log(sigma_max), math.log(sigma_min), _ramp(num_steps)).exp()
    return _with_ends(inner, sigma_min, sigma_max)


def beta_sigmas(
    num_steps: int, sigma_min: float, sigma_max: float, alpha: float = 0.6, beta: float = 0.6
) -> Tensor:
    """N sigmas from `sigma_max` down to `sigma_min`, spaced as quantiles of Beta(alpha, beta). (N,) float64.

    Lee et al. ("Beta sampling"): below 1 both parameters put steps at both ends. The quantiles of 1, ..., 0
    are taken of sigma itself, as in diffusers' `use_beta_sigmas`. One sigma alone is sigma_max. Raises
    ValueError unless 0 < sigma_min <= sigma_max and alpha and beta are above 0.
    """
    _check_sigmas(num_steps, sigma_min, sigma_max)
    if not (alpha > 0 and beta > 0):
        raise ValueError(f"alpha and beta are {alpha} and {beta}; a Beta distribution needs both above 0")
    inner = _between(sigma_min, sigma_max, beta_quantiles(1 - _ramp(num_steps), alpha, beta))
    return _with_ends(inner, sigma_min, sigma_max)


def sigma_steps(
    sigmas: Sequence[float] | Tensor, alphas_cumprod: Tensor, *, rounded: bool = False
) -> tuple[Tensor, Tensor]:
    """Timesteps (N,) and levels (N,) float64 of N falling sigmas, for samplers that take `levels`.

    Sigmas lie between the table's, or beyond its ends; the timestep a net is told there is found linearly in
    log sigma and kept inside the table. It is a fraction (float64), as in diffusers' Euler and k-diffusion;
    `rounded` gives whole ones (int64), which towards the clean end may repeat, as in diffusers' DPM-Solver++.
    Raises ValueError unless the sigmas fall strictly and are above 0; the step to 0 is `final_alpha`.
    """
    values = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu")
    if values.dim() != 1 or not bool((values > 0).all()) or bool((values.diff() >= 0).any()):
        raise ValueError(f"sigmas must be a row of falling numbers above 0, got {values.tolist()}")
    levels = alphas_cumprod.to("cpu", torch.float64)
    sigma_range(levels)  # refuses a level of 0
    table = ((1 - levels) / levels).sqrt()  # (T,) sigmas, rising
    high = torch.searchsorted(table, values).clamp(1, len(table) - 1)
    low_log, high_log = table[high - 1].log(), table[high].log()
    timesteps = high - 1 + ((values.log() - low_log) / (high_log - low_log)).clamp(0, 1)
    found = 1 / (1 + values**2)
    for end in (0, -1):  # exactly the table's ends, which the way to sigma and back may miss by a rounding
        found = torch.where(values == table[end], levels[end], found)
    return timesteps.round().long() if rounded else timesteps, found


def sigma_range(alphas_cumprod: Tensor) -> tuple[float, float]:
    """(sigma_min, sigma_max) of a table (T,): the sigmas of its first and last level, sqrt((1 - a) / a)."""
    return _sigma_of(float(alphas_cumprod[0])), _sigma_of(float(alphas_cumprod[-1]))


def beta_quantiles(probabilities: Tensor, alpha: float, beta: float) -> Tensor:
    """The quantiles in 0..1 of Beta(alpha, beta) at `probabilities` (N,) in 0..1; (N,) float64.

    The inverse of the regularised incomplete beta function, by halving: right to 1e-14 or so, absolutely.
    """
    wanted = probabilities.to("cpu", torch.float64)
    low, high = torch.zeros_like(wanted), torch.ones_like(wanted)
    for _ in range(54):
        middle = (low + high) / 2
        below = incomplete_beta(middle, alpha, beta) < wanted
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    quantiles = (low + high) / 2
    return torch.where(wanted <= 0, 0.0, torch.where(wanted >= 1, 1.0, quantiles))


def incomplete_beta(x: Tensor, alpha: float, beta: float) -> Tensor:
    """The regularised incomplete beta function I_x(alpha, beta), the distribution of Beta. (N,) float64.

    x (N,) in 0..1. Its continued fraction (DLMF 8.17.22, dlmf.nist.gov), which converges fast below the mean;
    above it I_x(a, b) = 1 - I_{1-x}(b, a) (DLMF 8.17.4).
    """
    mirrored = x > (alpha + 1) / (alpha + beta + 2)
    lower = _incomplete_beta_below(torch.where(mirrored, 0.0, x), alpha, beta)
    upper = _incomplete_beta_below(torch.where(mirrored, 1 - x, 0.0), beta, alpha)
    return torch.where(mirrored, 1 - upper, lower)


def _incomplete_beta_below(x: Tensor, a: float, b: float, terms: int = 64) -> Tensor:
    """I_x(a, b) for x at most (a + 1) / (a + b + 2): DLMF 8.17.22, from the last term to the first."""
    fraction = torch.ones_like(x)
    for n in range(terms, 0, -1):
        m = n // 2
        if n % 2:
            d = -(a + m) * (a + b + m) / ((a + 2 * m) * (a + 2 * m + 1))  # d_{2m+1} / x
        else:
            d = m * (b - m) / ((a + 2 * m - 1) * (a + 2 * m))  # d_{2m} / x
        fraction = 1 + d * x / fraction
    log_scale = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) - math.log(a)  # 1 / (a B(a, b))
    return torch.exp(log_scale + a * x.log() + b * torch.log1p(-x)) / fraction


def _ramp(num_steps: int) -> Tensor:
    """0 to 1 in `num_steps` numbers; one alone is 0."""
    return torch.arange(num_steps, dtype=torch.float64) / max(num_steps - 1, 1)


def _between(start: float, end: float, fraction: Tensor) -> Tensor:
    return torch.lerp(
        torch.tensor(start, dtype=torch.float64), torch.tensor(end, dtype=torch.float64), fraction
    )


def _with_ends(sigmas: Tensor, sigma_min: float, sigma_max: float) -> Tensor:
    """`sigmas` with the ends that were asked for, which a power and its root may miss by a rounding."""
    sigmas[-1], sigmas[0] = sigma_min, sigma_max
    return sigmas


def _check_sigmas(num_steps: int, sigma_min: float, sigma_max: float) -> None:
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; it must be at least 1")
    if not 0 < sigma_min <= sigma_max < math.inf:
        raise ValueError(f"sigmas run from {sigma_max} to {sigma_min}; expected 0 < sigma_min <= sigma_max")


def _level_at(t: float, alphas_cumprod: Tensor) -> float:
    """The level of a timestep that may be a fraction, sigma being linear in between."""
    low, fraction = int(t), t - int(t)
    if fraction == 0:
        return float(alphas_cumprod[low])
    before, after = map(_sigma_of, alphas_cumprod[low : low + 2].tolist())
    return 1 / (1 + (before + fraction * (after - before)) ** 2)


def _sigma_of(level: float) -> float:
    if not 0 < level <= 1:
        raise ValueError(
            f"level is {level}; sigma needs 0 < level <= 1 (zero terminal SNR: `lift_zero_level`, 2**-24)"
        )
    return math.sqrt((1 - level) / level)


def _following(levels: list[float], final_alpha: float) -> list[float]:
    """The level that each step leads to."""
    if levels and not levels[-1] <= final_alpha <= 1:
        raise ValueError(
            f"final_alpha is {final_alpha}; it must lie between the last step's level {levels[-1]:.6f} and 1"
        )
    return [*levels[1:], float(final_alpha)] if levels else []


# ---- the forward process -----------------------------------------------------------------------------------


def q_sample(x0: Tensor, t: float | Tensor, alphas_cumprod: Tensor, noise: Tensor) -> Tensor:
    """x_t ~ q(x_t | x0): the clean latent x0 noised to timestep t (Ho et al., eq. 4). Dtype and device of x0.

    x0 and noise (B, C, h, w) or broadcastable, t one timestep or (B,) of them, fractions too (as in
    `solver_steps`). Raises ValueError for a timestep outside the table.
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


def predict_x0(x: Tensor, eps: Tensor, a_t: float, limit: "Limit | None" = None) -> Tensor:
    """The clean latent that `eps` implies for `x` at level `a_t`, in the working dtype (Song et al., eq. 9).

    Kept in range by `limit`, if there is one. Raises ValueError unless 0 < a_t <= 1.
    """
    if not 0 < a_t <= 1:
        raise ValueError(
            f"level a_t is {a_t}; an eps-prediction needs 0 < a_t <= 1 (zero terminal SNR: `lift_zero_level`, 2**-24)"
        )
    dtype = working_dtype(x)
    pred_x0 = (x.to(dtype) - math.sqrt(1 - a_t) * eps.to(dtype)) / math.sqrt(a_t)
    return pred_x0 if limit is None else limit(pred_x0)


def half_log_snr(level: float) -> float:
    """lambda = log(sqrt(a) / sqrt(1 - a)) of a level: what exponential integrators count steps in.

    Raises ValueError unless 0 < level < 1.
    """
    if not 0 < level < 1:
        raise ValueError(
            f"level is {level}; log(signal / noise) needs 0 < level < 1 (zero terminal SNR: `lift_zero_level`, 2**-24)"
        )
    return (math.log(level) - math.log1p(-level)) / 2


# ---- keeping predictions in range --------------------------------------------------------------------------

Limit = Callable[[Tensor], Tensor]
"""`limit(pred_x0) -> pred_x0`: a predicted clean latent (B, C, h, w) brought into range, same dtype."""


def clip_sample(most: float = 1.0) -> Limit:
    """A limit that cuts every value at -most and most (Ho et al.'s code; diffusers' `clip_sample_range`).

    For nets of pictures in -1..1; latents of Stable Diffusion reach past 4. Raises ValueError unless most is
    above 0.
    """
    if not most > 0:
        raise ValueError(f"clip_sample is {most}; it must be above 0 (1: pictures in -1..1)")
    return lambda pred_x0: pred_x0.clamp(-most, most)


def dynamic_threshold(ratio: float = 0.995, most: float = 1.0) -> Limit:
    """A limit that cuts at s and divides by s, each picture by its own (Saharia et al., section 2.3).

    s is the quantile `ratio` of the absolute values, at least 1 and at most `most` (diffusers'
    `sample_max_value`, which wins where it is below 1). With the usual `most` of 1 this is `clip_sample(1)`;
    Imagen has no such cap: math.inf. Raises ValueError for a ratio outside 0..1 and unless most is above 0.
    """
    if not (0 <= ratio <= 1 and most > 0):
        raise ValueError(f"dynamic thresholding has ratio {ratio} and most {most}; expected 0..1 and above 0")

    def limit(pred_x0: Tensor) -> Tensor:
        quantiles = torch.stack([one.abs().flatten().quantile(ratio) for one in pred_x0])
        s = quantiles.clamp(min=1).clamp(max=most).reshape(-1, *([1] * (pred_x0.dim() - 1)))
        return torch.minimum(torch.maximum(pred_x0, -s), s) / s

    return limit


# ---- what a net predicts -----------------------------------------------------------------------------------


def to_eps(output: Tensor, x: Tensor, a_t: float | Tensor, prediction: str = "epsilon") -> Tensor:
    """The noise that a net's `output` implies for the latent `x` at level `a_t`, in the working dtype.

    output and x (B, C, h, w); a_t in 0..1. `prediction` is one of PREDICTIONS:
      "epsilon"       output itself
      "v_prediction"  sqrt(a) v + sqrt(1 - a) x  (Salimans and Ho, appendix D)
      "sample"        (x - sqrt(a) x0) / sqrt(1 - a), the clean latent turned round (Song et al., eq. 9)
    Samplers ask it with the level that the latent is at, whichever timestep the net was told. Raises
    ValueError for any other word, and for "sample" at level 1, where there is no noise to name.
    """
    a_t = float(a_t)
    dtype = working_dtype(x)
    output = output.to(dtype)
    if prediction == "epsilon":
        return output
    if prediction == "v_prediction":
        return math.sqrt(a_t) * output + math.sqrt(1 - a_t) * x.to(dtype)
    if prediction == "sample":
        if not 0 <= a_t < 1:
            raise ValueError(f"level a_t is {a_t}; a predicted clean latent implies a noise only below 1")
        return (x.to(dtype) - math.sqrt(a_t) * output) / math.sqrt(1 - a_t)
    raise ValueError(f"prediction {prediction!r} is not known; it is one of {', '.join(PREDICTIONS)}")


def velocity(x0: Tensor, noise: Tensor, t: float | Tensor, alphas_cumprod: Tensor) -> Tensor:
    """v = sqrt(a_t) noise - sqrt(1 - a_t) x0, the target of a v-predicting net. Shapes as in q_sample.

    Salimans and Ho, section 4.
    """
    root_a, root_1_a = _level_roots(alphas_cumprod, t, x0)
    return (root_a * noise.to(x0.device) - root_1_a * x0).to(x0.dtype)


def training_target(
    x0: Tensor, noise: Tensor, t: float | Tensor, alphas_cumprod: Tensor, prediction: str = "epsilon"
) -> Tensor:
    """What a net that predicts `prediction` (one of PREDICTIONS) should answer. Shapes as in q_sample.

    Raises ValueError for any other word.
    """
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction {prediction!r} is not known; it is one of {', '.join(PREDICTIONS)}")
    if prediction == "v_prediction":
        return velocity(x0, noise, t, alphas_cumprod)
    return noise if prediction == "epsilon" else x0


def eps_from_velocity(v: Tensor, x: Tensor, t: float | Tensor, alphas_cumprod: Tensor) -> Tensor:
    """eps = sqrt(a_t) v + sqrt(1 - a_t) x, the noise that `v` implies for `x`; in the working dtype.

    By timestep, one or (B,) of them, fractions too (as in `solver_steps`); `to_eps` is the same by level.
    """
    root_a, root_1_a = _level_roots(alphas_cumprod, t, x)
    return root_a * v + root_1_a * x


def v_prediction(model: Denoiser, alphas_cumprod: Tensor) -> Denoiser:
    """A denoiser (x, t -> eps) out of a model that predicts v, which takes x to be at the level of t.

    That is so in every run without `levels`, fractions of timesteps included. With `levels` (`karras_steps`
    and the like) a rounded t is not where the latent is (6e-5 to 1e-4 of the result): pass the model itself
    and `prediction="v_prediction"` to the sampler, which asks by the latent's own level and is right in every
    run.
    """

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        return eps_from_velocity(model(x, t), x, t, alphas_cumprod)

    return denoise


def _level_roots(alphas_cumprod: Tensor, t: float | Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(a_t) and sqrt(1 - a_t), each (1 or B, 1, 1, 1), made in float64 on the CPU."""
    t = torch.as_tensor(t, device="cpu").reshape(-1)
    table = alphas_cumprod.to("cpu", torch.float64)
    if not bool(((t >= 0) & (t <= len(table) - 1)).all()):
        raise ValueError(f"timesteps must lie in 0..{len(table) - 1}, got {t.tolist()}")
    if t.is_floating_point():
        a_t = torch.tensor([_level_at(one, table) for one in t.tolist()], dtype=torch.float64)
    else:
        a_t = table[t]
    a_t = a_t.reshape(-1, *([1] * (x.dim() - 1)))
    dtype = working_dtype(x)
    return a_t.sqrt().to(dtype).to(x.device), (1 - a_t).sqrt().to(dtype).to(x.device)
