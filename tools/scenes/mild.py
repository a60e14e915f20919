"""Mild first-order degradations for the mini bundle: what its RRDB learns to undo, its degraded pictures.

They have the steps of msbd/train/degrade.py, fewer and weaker: two full rounds would leave nothing of a 64-px
crop.
"""

import math
from dataclasses import dataclass

import torch

from msbd.train.degrade import (
    RESIZE_MODES,
    Blur,
    Degradation,
    GaussianNoise,
    Jpeg,
    PoissonNoise,
    Range,
    Resize,
    Step,
    chance,
    choice,
    draw_seed,
    uniform,
)


@dataclass(frozen=True)
class Strength:
    """The ranges that are drawn from uniformly; the defaults suit x4 at 64 to 128 pixels."""

    blur_probability: float = 0.8
    anisotropic_probability: float = 0.4  # that a blur is anisotropic
    blur_sizes: tuple[int, ...] = (7, 9, 11, 13)
    blur_sigma: Range = (0.2, 1.5)  # pixels of the clean picture
    resize_probability: float = 0.3
    resize_factor: Range = (0.7, 1.2)
    noise_probability: float = 0.5
    poisson_probability: float = 0.5  # that noise is Poisson's
    gray_noise_probability: float = 0.4  # that noise is one field for the three channels
    gaussian_sigma: Range = (1 / 255, 10 / 255)
    poisson_scale: Range = (0.05, 1.0)
    jpeg_probability: float = 0.5
    jpeg_quality: tuple[int, int] = (60, 95)


MILD = Strength()


def sample_mild(generator: torch.Generator, *, scale: int = 4, strength: Strength = MILD) -> Degradation:
    """Draw one degradation: blur or not, resize or not, down to 1/`scale`, noise or not, JPEG or not.

    Draw order: per step a chance, then its numbers, then (noise) a seed. `generator` is a CPU generator.
    """
    steps: list[Step] = []
    if chance(generator, strength.blur_probability):
        steps.append(_draw_blur(generator, strength))
    if chance(generator, strength.resize_probability):
        steps.append(Resize(uniform(generator, *strength.resize_factor), choice(generator, RESIZE_MODES)))
    # Real-ESRGAN eq. 1: noise and JPEG come after the downscale, as in a camera; before it, x4 would average
    # them away. (In its second order a resize to the final size follows the noise.)
    steps.append(Resize(1 / scale, choice(generator, ("bilinear", "bicubic")), antialias=True))
    if chance(generator, strength.noise_probability):
        steps.append(_draw_noise(generator, strength))
    if chance(generator, strength.jpeg_probability):
        low, high = strength.jpeg_quality
        steps.append(Jpeg(int(torch.randint(low, high + 1, (), generator=generator))))
    return Degradation(tuple(steps))


def _draw_blur(generator: torch.Generator, strength: Strength) -> Blur:
    size = choice(generator, strength.blur_sizes)
    sigma = uniform(generator, *strength.blur_sigma)
    if not chance(generator, strength.anisotropic_probability):
        return Blur(size, sigma, sigma)
    sigma_y = uniform(generator, *strength.blur_sigma)
    return Blur(size, sigma, sigma_y, uniform(generator, -math.pi, math.pi))


def _draw_noise(generator: torch.Generator, strength: Strength) -> GaussianNoise | PoissonNoise:
    poisson = chance(generator, strength.poisson_probability)
    gray = chance(generator, strength.gray_noise_probability)
    amount = uniform(generator, *(strength.poisson_scale if poisson else strength.gaussian_sigma))
    seed = draw_seed(generator)
    return PoissonNoise(amount, gray, seed) if poisson else GaussianNoise(amount, gray, seed)
