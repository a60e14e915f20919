"""Degrade clean pictures: blur, resize, noise and JPEG, twice over, for training super-resolution.

Paper    Wang et al. 2021 (Real-ESRGAN), arXiv:2107.10833, section 3: the second-order pipeline. PASD trains
         on it (Yang et al. 2023, arXiv:2308.14469, section 4), with milder ranges in its published parameters
Tensors  image (B, 3, H, W) in [0, 1], Real-ESRGAN's range, NOT the [-1, 1] of the rest of msbd/; any H, W
         from 1 up
Copying  needs pixels/luma.py, pixels/resize.py, train/blur_kernels.py, train/jpeg.py

Two halves, so that a degradation can be stored, shown and repeated: `sample_parameters` draws everything from
one generator, `apply` follows it and draws nothing but the noise fields, whose seeds are among the
parameters.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..pixels.luma import BT601_FOUR_DIGITS, luma
from ..pixels.resize import round_to_8_bits
from .blur_kernels import filter2d, gaussian_kernel, sinc_kernel
from .jpeg import pillow_jpeg

RESIZE_MODES = ("area", "bilinear", "bicubic")
FAMILIES = ("iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso")
Range = tuple[float, float]  # (low, high), drawn from uniformly
Option = TypeVar("Option")


@dataclass(frozen=True)
class Blur:
    """A bivariate Gaussian, generalised Gaussian or plateau blur: `gaussian_kernel`'s arguments."""

    size: int  # side of the kernel, odd
    sigma_x: float  # pixels
    sigma_y: float  # pixels
    angle: float = 0.0  # radians, of the x axis of the Gaussian
    beta: float = 1.0  # its shape; 1 is the plain Gaussian
    plateau: bool = False

    @property
    def family(self) -> str:
        """The one of FAMILIES that this kernel belongs to."""
        shape = "plateau_" if self.plateau else "generalized_" if self.beta != 1 else ""
        return shape + ("iso" if self.sigma_x == self.sigma_y else "aniso")

    def kernel(self) -> Tensor:
        """(size, size) float64 of sum 1."""
        return gaussian_kernel(
            self.size, self.sigma_x, self.sigma_y, self.angle, beta=self.beta, plateau=self.plateau
        )


@dataclass(frozen=True)
class Sinc:
    """A low-pass filter that rings, as pictures do that were sharpened or resampled well."""

    size: int  # side of the kernel, odd
    cutoff: float  # radians per pixel, (0, pi]

    def kernel(self) -> Tensor:
        """(size, size) float64 of sum 1."""
        return sinc_kernel(self.cutoff, self.size)


@dataclass(frozen=True)
class Resize:
    """A change of size to `factor` times the ORIGINAL picture, so that the last Resize decides the size.

    Rounded down, as in Real-ESRGAN's code, but at least 1.
    """

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
    """JPEG, 4:2:0, there and back."""

    quality: int  # 1..100


Step = Blur | Sinc | Resize | GaussianNoise | PoissonNoise | Jpeg


@dataclass(frozen=True)
class Degradation:
    """What `sample_parameters` drew: the steps in the order in which they are applied."""

    steps: tuple[Step, ...]


@dataclass(frozen=True)
class StageRanges:
    """What one of the two rounds of blur, resize, noise and JPEG is drawn from."""

    blur_probability: float
    blur_sigma: Range  # pixels
    up_down_keep: tuple[float, float, float]  # probabilities of a larger, a smaller and the same size
    resize_factor: Range  # around 1, of the original picture in stage 1, of the final size in stage 2
    gaussian_sigma: Range  # 8-bit levels
    poisson_scale: Range
    jpeg_quality: Range
    gaussian_probability: float = 0.5  # the other noises are Poisson's
    gray_noise_probability: float = 0.4


@dataclass(frozen=True)
class Ranges:
    """What `sample_parameters` draws from."""

    first: StageRanges
    second: StageRanges
    usm: bool  # whether the target of training is the clean picture after `usm_sharpen`
    kernel_sizes: tuple[int, ...] = (7, 9, 11, 13, 15, 17, 19, 21)
    family_probabilities: tuple[float, ...] = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)  # in the order of FAMILIES
    generalized_beta: Range = (0.5, 4)
    plateau_beta: Range = (1, 2)
    sinc_probability: float = 0.1  # that a stage's blur is a sinc
    final_sinc_probability: float = 0.8


REAL_ESRGAN = Ranges(
    first=StageRanges(
        blur_probability=1.0,
        blur_sigma=(0.2, 3),
        up_down_keep=(0.2, 0.7, 0.1),
        resize_factor=(0.15, 1.5),
        gaussian_sigma=(1, 30),
        poisson_scale=(0.05, 3),
        jpeg_quality=(30, 95),
    ),
    second=StageRanges(
        blur_probability=0.8,
        blur_sigma=(0.2, 1.5),
        up_down_keep=(0.3, 0.4, 0.3),
        resize_factor=(0.3, 1.2),
        gaussian_sigma=(1, 25),
        poisson_scale=(0.05, 2.5),
        jpeg_quality=(30, 95),
    ),
    usm=True,
)

PASD = Ranges(
    first=StageRanges(
        blur_probability=1.0,
        blur_sigma=(0.2, 3),
        up_down_keep=(0.2, 0.7, 0.1),
        resize_factor=(0.3, 1.5),
        gaussian_sigma=(1, 15),
        poisson_scale=(0.05, 2),
        jpeg_quality=(60, 95),
    ),
    second=StageRanges(
        blur_probability=0.5,
        blur_sigma=(0.2, 1.5),
        up_down_keep=(0.3, 0.4, 0.3),
        resize_factor=(0.6, 1.2),
        gaussian_sigma=(1, 12),
        poisson_scale=(0.05, 1),
        jpeg_quality=(60, 100),
    ),
    usm=False,
)


def sample_parameters(generator: torch.Generator, *, ranges: Ranges = PASD, scale: int = 4) -> Degradation:
    """Draw one degradation down to 1/`scale` of the size, in the order of Real-ESRGAN's figure 2.

    Blur, resize, noise, JPEG; blur, resize, noise; then, in either order, JPEG and the resize to the final
    size with its sinc. Everything is drawn in the order in which it is applied, from `generator`, a CPU one.
    """
    first = [*_draw_stage(generator, ranges, ranges.first), _draw_jpeg(generator, ranges.first)]
    second = _draw_stage(generator, ranges, ranges.second, 1 / scale)
    final = [Resize(1 / scale, choice(generator, RESIZE_MODES)), *_draw_final_sinc(generator, ranges)]
    coding = [_draw_jpeg(generator, ranges.second)]
    last = final + coding if chance(generator, 0.5) else coding + final
    return Degradation((*first, *second, *last))


def apply(
    image: Tensor, parameters: Degradation, *, jpeg: Callable[[Tensor, int], Tensor] = pillow_jpeg
) -> Tensor:
    """Degrade `image` (B, 3, H, W) in [0, 1], float32 or float64: all by the same steps and seeds.

    Returns (B, 3, max(1, H // scale), max(1, W // scale)) for the `scale` given to `sample_parameters`, in
    [0, 1] and rounded to 8 bits as a file would be. Deterministic: `parameters` has the seeds of its noise.
    `jpeg` takes pictures (B, 3, h, w) in [0, 1] and a quality 1..100; jpeg.py has one that runs on a GPU.
    ValueError for another shape or dtype.
    """
    if image.ndim != 4 or image.shape[1] != 3 or image.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"degrade.apply wants a (B, 3, H, W) picture in [0, 1] as float32 or float64, got "
            f"{tuple(image.shape)} {image.dtype}"
        )
    original_size = (image.shape[-2], image.shape[-1])
    for step in parameters.steps:
        match step:
            case Jpeg(quality):
                image = jpeg(image.clamp(0, 1), quality)
            case Resize():
                image = _resize_step(image, step, original_size)
            case Blur() | Sinc():
                image = filter2d(image, step.kernel())
            case GaussianNoise() | PoissonNoise():
                image = torch.cat([_add_noise(picture, step) for picture in image.split(1)]).clamp(0, 1)
            case _:
                raise TypeError(f"degrade.apply: {step!r:.80} is no step of a Degradation")
    return round_to_8_bits(image)


def _resize_step(image: Tensor, step: Resize, original_size: tuple[int, int]) -> Tensor:
    """`image` at `step`'s size, rounded down as in Real-ESRGAN's code.

    In its first stage bilinear and bicubic step by the factor, not by the ratio of the rounded sizes: at 0.15
    the last 5 of 512 pixels are lost and the rest is stretched over them. Ours stays in register.
    """
    height, width = (max(1, int(side * step.factor + 1e-6)) for side in original_size)  # 49 * (1 / 49) < 1
    return resize(image, (height, width), step.mode, antialias=step.antialias)


def _add_noise(image: Tensor, step: GaussianNoise | PoissonNoise) -> Tensor:
    generator = torch.Generator().manual_seed(step.seed)
    if isinstance(step, GaussianNoise):
        return add_gaussian_noise(image, step.sigma, gray=step.gray, generator=generator)
    return add_poisson_noise(image, step.scale, gray=step.gray, generator=generator)


def resize(image: Tensor, size: tuple[int, int], mode: str, *, antialias: bool = False) -> Tensor:
    """`image` (B, C, H, W) at `size` (H, W) by one of RESIZE_MODES; "bicubic" may overshoot the range.

    ValueError for another mode.
    """
    if mode not in RESIZE_MODES:
        raise ValueError(f"unknown resize mode {mode!r}; expected one of {', '.join(RESIZE_MODES)}")
    if tuple(image.shape[-2:]) == size:
        return image
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

    With `gray` it is the noise of its luma, on all channels. The photon count at white is the number of 8-bit
    levels a picture uses, rounded up to a power of two, as in Real-ESRGAN's code.
    """
    # Torchvision's luma, as the official code has it: the draws of Poisson's noise follow its last digit.
    signal = round_to_8_bits(luma(image, BT601_FOUR_DIGITS) if gray else image).cpu().float()
    used = [(255 * x).round().int().flatten().bincount().count_nonzero().item() for x in signal]
    counts = torch.tensor([2.0 ** math.ceil(math.log2(levels)) for levels in used]).view(-1, 1, 1, 1)
    noise = torch.poisson(signal * counts, generator=generator) / counts - signal
    return image + scale * noise.to(image)


def usm_sharpen(image: Tensor, weight: float = 0.5, radius: int = 50, threshold: float = 10) -> Tensor:
    """`image` (B, 3, H, W) in [0, 1] with an unsharp mask, as Real-ESRGAN sharpens its training targets.

    Only where it differs from its blur by more than `threshold` 8-bit levels, with soft borders of that
    region. `radius` in pixels, made odd to be the side of the kernel; `weight` of what the blur takes away.
    """
    side = radius + 1 - radius % 2
    sigma = 0.3 * ((side - 1) / 2 - 1) + 0.8  # OpenCV's rule for a kernel of that side
    kernel = gaussian_kernel(side, sigma, sigma)
    detail = image - filter2d(image, kernel)
    where = filter2d((detail.abs() * 255 > threshold).to(image), kernel)
    return torch.lerp(image, (image + weight * detail).clamp(0, 1), where)


def _draw_stage(
    generator: torch.Generator, ranges: Ranges, stage: StageRanges, of_original: float = 1.0
) -> list[Step]:
    """Blur or not, resize to about `of_original` times the original size, noise."""
    steps: list[Step] = []
    if chance(generator, stage.blur_probability):
        steps.append(_draw_blur(generator, ranges, stage))
    low, high = stage.resize_factor
    bounds = choice(generator, ((1, high), (low, 1), (1, 1)), stage.up_down_keep)
    factor = uniform(generator, *bounds) * of_original
    return [*steps, Resize(factor, choice(generator, RESIZE_MODES)), _draw_noise(generator, stage)]


def _draw_blur(generator: torch.Generator, ranges: Ranges, stage: StageRanges) -> Blur | Sinc:
    size = choice(generator, ranges.kernel_sizes)
    if chance(generator, ranges.sinc_probability):
        lowest = math.pi / 3 if size < 13 else math.pi / 5  # a slower ring does not fit into a small kernel
        return Sinc(size, uniform(generator, lowest, math.pi))
    shape, _, symmetry = choice(generator, FAMILIES, ranges.family_probabilities).rpartition("_")
    sigma_x = sigma_y = uniform(generator, *stage.blur_sigma)
    angle, beta = 0.0, 1.0
    if symmetry == "aniso":
        sigma_y, angle = uniform(generator, *stage.blur_sigma), uniform(generator, -math.pi, math.pi)
    if shape:  # Real-ESRGAN's code draws from below and from above 1 equally often, whatever their widths
        low, high = ranges.plateau_beta if shape == "plateau" else ranges.generalized_beta
        beta = uniform(generator, low, 1) if chance(generator, 0.5) else uniform(generator, 1, high)
    return Blur(size, sigma_x, sigma_y, angle, beta, plateau=shape == "plateau")


def _draw_noise(generator: torch.Generator, stage: StageRanges) -> GaussianNoise | PoissonNoise:
    gaussian = chance(generator, stage.gaussian_probability)
    amount = uniform(generator, *(stage.gaussian_sigma if gaussian else stage.poisson_scale))
    gray = chance(generator, stage.gray_noise_probability)
    seed = draw_seed(generator)
    return GaussianNoise(amount / 255, gray, seed) if gaussian else PoissonNoise(amount, gray, seed)


def _draw_jpeg(generator: torch.Generator, stage: StageRanges) -> Jpeg:
    """The whole number nearest to the drawn one: files have no others, but Real-ESRGAN's coder does."""
    return Jpeg(round(uniform(generator, *stage.jpeg_quality)))


def _draw_final_sinc(generator: torch.Generator, ranges: Ranges) -> list[Sinc]:
    """One or none."""
    if not chance(generator, ranges.final_sinc_probability):
        return []
    size = choice(generator, ranges.kernel_sizes)
    return [Sinc(size, uniform(generator, math.pi / 3, math.pi))]


def uniform(generator: torch.Generator, low: float, high: float) -> float:
    """A number in [low, high)."""
    return low + (high - low) * float(torch.rand((), generator=generator))


def chance(generator: torch.Generator, probability: float) -> bool:
    """True with `probability`."""
    return float(torch.rand((), generator=generator)) < probability


def choice(
    generator: torch.Generator, options: tuple[Option, ...], probabilities: tuple[float, ...] | None = None
) -> Option:
    """One of `options`, equally likely unless `probabilities` are given."""
    if probabilities is None:
        return options[int(torch.randint(len(options), (), generator=generator))]
    return options[int(torch.multinomial(torch.tensor(probabilities), 1, generator=generator))]


def draw_seed(generator: torch.Generator) -> int:
    """A seed for a noise field."""
    return int(torch.randint(2**31, (), generator=generator))
