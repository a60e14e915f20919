"""Degrade clean pictures: blur, resize, noise and JPEG, for training super-resolution.

Paper    Wang et al. 2021 (Real-ESRGAN), arXiv:2107.10833, section 3. This is its first-order part, with mild
         ranges; the second-order pipeline is a longer tuple of the same steps, plus the sinc filter
Tensors  image (B, 3, H, W) in [0, 1], Real-ESRGAN's range, NOT the [-1, 1] of the rest of msbd/; any H, W
         from 1 up
Copying  needs resize.py and crops.py (for its reflection padding)

Two halves, so that a degradation can be stored, shown and repeated: `sample_parameters` draws everything from
one generator, `apply` follows it and draws nothing but the noise fields, whose seeds are among the
parameters.
"""

import io
import math
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .resize import pad_reflect

RESIZE_MODES = ("area", "bilinear", "bicubic")
Option = TypeVar("Option")


@dataclass(frozen=True)
class Blur:
    """A Gaussian blur; isotropic when both sigmas are equal."""

    size: int  # side of the kernel, odd
    sigma_x: float  # pixels
    sigma_y: float  # pixels
    angle: float = 0.0  # radians, of the x axis of the Gaussian


@dataclass(frozen=True)
class Resize:
    """A change of size to `factor` times the ORIGINAL picture, so that the last Resize decides the size."""

    factor: float
    mode: str  # one of RESIZE_MODES
    antialias: bool = False  # Real-ESRGAN resizes without: its aliasing is part of the degradation


@dataclass(frozen=True)
class GaussianNoise:
    """White noise of standard deviation `sigma`, in units of the [0, 1] range."""

    sigma: float
    gray: bool  # one field for the three channels
    seed: int


@dataclass(frozen=True)
class PoissonNoise:
    """Shot noise: what Poisson counting would add, times `scale`."""

    scale: float
    gray: bool
    seed: int


@dataclass(frozen=True)
class Jpeg:
    """Pillow's JPEG, 4:2:0, there and back."""

    quality: int


Step = Blur | Resize | GaussianNoise | PoissonNoise | Jpeg


@dataclass(frozen=True)
class Degradation:
    """What `sample_parameters` drew: the steps in the order in which they are applied."""

    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Strength:
    """The ranges that are drawn from, pairs (low, high) uniformly; the defaults suit x4 at 64 to 128 pixels."""

    blur_probability: float = 0.8
    anisotropic_probability: float = 0.4  # of the blurs
    blur_sizes: tuple[int, ...] = (7, 9, 11, 13)
    blur_sigma: tuple[float, float] = (0.2, 1.5)  # pixels of the clean picture
    resize_probability: float = 0.3
    resize_factor: tuple[float, float] = (0.7, 1.2)
    noise_probability: float = 0.5
    poisson_probability: float = 0.5  # of the noises
    gray_noise_probability: float = 0.4  # of the noises
    gaussian_sigma: tuple[float, float] = (1 / 255, 10 / 255)
    poisson_scale: tuple[float, float] = (0.05, 1.0)
    jpeg_probability: float = 0.5
    jpeg_quality: tuple[int, int] = (60, 95)


MILD = Strength()


def sample_parameters(
    generator: torch.Generator, *, scale: int = 4, strength: Strength = MILD
) -> Degradation:
    """Draw one degradation: blur or not, resize or not, down to 1/`scale`, noise or not, JPEG or not.

    Draw order: per step a chance, then its numbers, then (noise) a seed. `generator` is a CPU generator.
    """
    steps: list[Step] = []
    if _chance(generator, strength.blur_probability):
        steps.append(_draw_blur(generator, strength))
    if _chance(generator, strength.resize_probability):
        steps.append(Resize(_uniform(generator, *strength.resize_factor), _choice(generator, RESIZE_MODES)))
    # Real-ESRGAN eq. 1: noise and JPEG come after the downscale, as in a camera; before it, x4 would average
    # them away. (In its second order a resize to the final size follows the noise.)
    steps.append(Resize(1 / scale, _choice(generator, ("bilinear", "bicubic")), antialias=True))
    if _chance(generator, strength.noise_probability):
        steps.append(_draw_noise(generator, strength))
    if _chance(generator, strength.jpeg_probability):
        low, high = strength.jpeg_quality
        steps.append(Jpeg(int(torch.randint(low, high + 1, (), generator=generator))))
    return Degradation(tuple(steps))


def apply(image: Tensor, parameters: Degradation) -> Tensor:
    """Degrade `image` (B, 3, H, W) in [0, 1]; every picture of the batch gets the same steps.

    Returns (B, 3, round(H * f), round(W * f)), f being the last Resize's factor, in [0, 1] and rounded to 8
    bits as a file would be. Deterministic: noise comes from the seeds in `parameters`.
    """
    if image.ndim != 4 or image.shape[1] != 3:
        raise ValueError(
            f"degrade.apply wants a (B, 3, H, W) picture in [0, 1], got shape {tuple(image.shape)}"
        )
    original_size = (image.shape[-2], image.shape[-1])
    for step in parameters.steps:
        image = _apply_step(image, step, original_size).clamp(0, 1)
    return _round_to_8_bits(image)


def _apply_step(image: Tensor, step: Step, original_size: tuple[int, int]) -> Tensor:
    match step:
        case Blur():
            kernel = gaussian_kernel(step.size, step.sigma_x, step.sigma_y, step.angle)
            return filter2d(image, kernel)
        case Resize():
            height, width = (max(1, round(side * step.factor)) for side in original_size)
            return resize(image, (height, width), step.mode, antialias=step.antialias)
        case GaussianNoise():
            return add_gaussian_noise(image, step.sigma, gray=step.gray, generator=_seeded(step.seed))
        case PoissonNoise():
            return add_poisson_noise(image, step.scale, gray=step.gray, generator=_seeded(step.seed))
        case Jpeg():
            return jpeg(image, step.quality)


def gaussian_kernel(
    size: int, sigma_x: float, sigma_y: float, angle: float = 0.0, *, beta: float = 1.0, plateau: bool = False
) -> Tensor:
    """A bivariate blur kernel (size, size) of sum 1, float64; Real-ESRGAN section 3.1 and Liu et al. 2020.

    With q = x^T Sigma^-1 x: the Gaussian exp(-q/2); for beta != 1 the generalised Gaussian exp(-q^beta / 2);
    with `plateau` 1 / (1 + q^beta). `sigma_x` and `sigma_y` in pixels along axes turned by `angle` radians.
    ValueError if `size` is even.
    """
    if size % 2 == 0 or size < 1:
        raise ValueError(f"a blur kernel needs an odd size, so that it has a centre; got {size}")
    ramp = torch.arange(size, dtype=torch.float64) - size // 2
    y, x = torch.meshgrid(ramp, ramp, indexing="ij")  # (size, size), rows are y
    along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    q = (along / sigma_x) ** 2 + (across / sigma_y) ** 2
    kernel = 1 / (1 + q**beta) if plateau else torch.exp(-0.5 * q**beta)
    return kernel / kernel.sum()


def sinc_kernel(cutoff: float, size: int, pad_to: int = 0) -> Tensor:
    """A circular low-pass kernel of sum 1, float64, that rings (Real-ESRGAN section 3.3).

    `cutoff` in radians per pixel, (0, pi]; (size, size), zero-padded to (pad_to, pad_to) when that is larger.
    """
    ramp = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    radius = (ramp[:, None] ** 2 + ramp[None, :] ** 2).sqrt()
    ring = cutoff * torch.special.bessel_j1(cutoff * radius) / (2 * math.pi * radius)
    ring = torch.where(radius == 0, cutoff**2 / (4 * math.pi), ring)  # J1(z) / z -> 1/2
    margin = max(0, (pad_to - size) // 2)
    return F.pad(ring / ring.sum(), (margin, margin, margin, margin))


def filter2d(image: Tensor, kernel: Tensor) -> Tensor:
    """Every channel of `image` (B, C, H, W) correlated with `kernel` (k, k), k odd; borders are reflected."""
    channels, half = image.shape[1], kernel.shape[-1] // 2
    weight = kernel.to(image).expand(channels, 1, -1, -1)
    return F.conv2d(pad_reflect(image, half, half, half, half), weight, groups=channels)


def resize(image: Tensor, size: tuple[int, int], mode: str, *, antialias: bool = False) -> Tensor:
    """`image` (B, C, H, W) at `size` (H, W), by "area", "bilinear" or "bicubic" (which may overshoot [0, 1])."""
    if mode not in RESIZE_MODES:
        raise ValueError(f"unknown resize mode {mode!r}; expected one of {', '.join(RESIZE_MODES)}")
    if mode == "area":
        return F.interpolate(image, size=size, mode="area")  # averages whole cells: antialiased already
    return F.interpolate(image, size=size, mode=mode, align_corners=False, antialias=antialias)


def add_gaussian_noise(image: Tensor, sigma: float, *, gray: bool, generator: torch.Generator) -> Tensor:
    """`image` (B, 3, H, W) plus white noise of standard deviation `sigma`, not clamped.

    `gray`: one field for all channels.
    """
    shape = (image.shape[0], 1 if gray else image.shape[1], *image.shape[2:])
    return image + sigma * torch.randn(shape, generator=generator).to(image)


def add_poisson_noise(image: Tensor, scale: float, *, gray: bool, generator: torch.Generator) -> Tensor:
    """`image` (B, 3, H, W) in [0, 1] plus `scale` times its shot noise, not clamped.

    `gray`: that of its luma, on all channels.
    The photon count at white is the number of 8-bit levels a picture uses, rounded up to a power of two, as
    in Real-ESRGAN's code.
    """
    signal = _round_to_8_bits(_luma(image) if gray else image).cpu().float()
    levels = [2 ** math.ceil(math.log2(len(torch.unique(picture)))) for picture in signal]
    counts = torch.tensor(levels, dtype=torch.float32).view(-1, 1, 1, 1)
    noise = torch.poisson(signal * counts, generator=generator) / counts - signal
    return image + scale * noise.to(image)


def jpeg(image: Tensor, quality: int) -> Tensor:
    """`image` (B, 3, H, W) in [0, 1] through Pillow's JPEG encoder at `quality` 1..95 (4:2:0) and back; no gradient."""
    decoded = []
    for picture in (image.detach().clamp(0, 1) * 255).round().to(torch.uint8).cpu():
        buffer = io.BytesIO()
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=quality, subsampling=2)
        decoded.append(torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1))
    return torch.stack(decoded).to(image) / 255


def _draw_blur(generator: torch.Generator, strength: Strength) -> Blur:
    size = _choice(generator, strength.blur_sizes)
    sigma = _uniform(generator, *strength.blur_sigma)
    if not _chance(generator, strength.anisotropic_probability):
        return Blur(size, sigma, sigma)
    return Blur(
        size, sigma, _uniform(generator, *strength.blur_sigma), _uniform(generator, -math.pi, math.pi)
    )


def _draw_noise(generator: torch.Generator, strength: Strength) -> GaussianNoise | PoissonNoise:
    poisson = _chance(generator, strength.poisson_probability)
    gray = _chance(generator, strength.gray_noise_probability)
    amount = _uniform(generator, *(strength.poisson_scale if poisson else strength.gaussian_sigma))
    seed = int(torch.randint(2**31, (), generator=generator))
    return PoissonNoise(amount, gray, seed) if poisson else GaussianNoise(amount, gray, seed)


def _uniform(generator: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def _chance(generator: torch.Generator, probability: float) -> bool:
    return float(torch.rand((), generator=generator)) < probability


def _choice(generator: torch.Generator, options: tuple[Option, ...]) -> Option:
    return options[int(torch.randint(len(options), (), generator=generator))]


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _luma(image: Tensor) -> Tensor:
    """ITU-R 601 luma (B, 1, H, W), with the four digits that torchvision and Real-ESRGAN use."""
    return (image * image.new_tensor([0.2989, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)


def _round_to_8_bits(image: Tensor) -> Tensor:
    return (image.clamp(0, 1) * 255).round() / 255
