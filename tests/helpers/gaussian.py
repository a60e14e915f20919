"""Data that is one Gaussian: its exact denoiser, where its ODE leads, and so a solver's error."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from samplers.schedule import Denoiser

MEAN, STD = 0.7, 0.4
START = torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(1, 1, 3, 3)


def std_at(a: float) -> float:
    """Standard deviation of the noised data at level a."""
    return math.sqrt(a * STD**2 + 1 - a)


def gaussian_eps(x: Tensor, a: float) -> Tensor:
    """The exact answer to x at level a: E[eps | x]."""
    return math.sqrt(1 - a) * (x - math.sqrt(a) * MEAN) / std_at(a) ** 2


def gaussian_flow(x: Tensor, a_from: float, a_to: float) -> Tensor:
    """Where the probability-flow ODE leads x: distances from the mean, in deviations, stay as they are."""
    return math.sqrt(a_to) * MEAN + std_at(a_to) / std_at(a_from) * (x - math.sqrt(a_from) * MEAN)


def uneven_levels(num_steps: int) -> Tensor:
    """A table for any step count: num_steps + 1 levels, falling, log SNRs smooth but not evenly spaced."""
    u = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
    return torch.sigmoid(2 * (1.5 - 3 * u + 0.4 * torch.sin(3 * u)))


def convergence_order(sample: Callable[..., Tensor], num_steps: int = 64, **options: Any) -> float:
    """p of error ~ h^p: how often the error halves when the steps do. Runs lead from entry N to entry 0."""
    errors = []
    for n in (num_steps, 2 * num_steps):
        levels = uneven_levels(n)
        first, last = float(levels[-1]), float(levels[0])

        def denoise(x: Tensor, t: Tensor, levels: Tensor = levels) -> Tensor:
            return gaussian_eps(x, float(levels[t]))

        out = sample(denoise, START, range(n, 0, -1), levels, final_alpha=last, **options)
        errors.append((out - gaussian_flow(START, first, last)).abs().max().item())
    return math.log2(errors[0] / errors[1])


def perfect(x0: Tensor, alphas_cumprod: Tensor) -> Denoiser:
    """The denoiser of data that is x0 alone."""
    return lambda x, t: (x - alphas_cumprod[t].sqrt() * x0) / (1 - alphas_cumprod[t]).sqrt()
