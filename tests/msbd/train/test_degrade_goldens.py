"""The degradation beside the official code's numbers: its parts, and whole degradations, draw for draw."""

import math
import random
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from msbd.train import degrade
from msbd.train.blur_kernels import filter2d, gaussian_kernel, sinc_kernel
from msbd.train.degrade import (
    PASD,
    REAL_ESRGAN,
    Blur,
    GaussianNoise,
    Jpeg,
    PoissonNoise,
    Ranges,
    Resize,
    Sinc,
    StageRanges,
)
from msbd.train.jpeg import tensor_jpeg
from tests.helpers.goldens import load_golden, relative_error


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def padded(kernel: Tensor, size: int) -> Tensor:
    """Zeros around `kernel`, as the reference has them to make a batch of kernels."""
    margin = max(0, (size - len(kernel)) // 2)
    return F.pad(kernel, (margin, margin, margin, margin))


def test_kernels_match_golden() -> None:
    golden = load_golden("degradation", "kernels")
    for spec in golden.meta["specs"]:
        ref, args = golden[f"kernel.{spec['i']}"], spec["args"]
        if spec["kind"] == "sinc":
            kernel = padded(sinc_kernel(*args[:2]), args[2])
        else:
            beta = args[4] if len(args) == 5 else 1.0
            kernel = gaussian_kernel(*args[:4], beta=beta, plateau=spec["kind"].startswith("plateau"))
        assert relative_error(kernel, ref) <= 1e-6, spec


@pytest.mark.parametrize("case", ["process_64x80", "process_55x70"])
def test_filter2d_and_usm_match_golden(case: str) -> None:
    golden = load_golden("degradation", case)
    image = golden["in.image"]
    assert relative_error(filter2d(image, golden["in.kernel"]), golden["out.filter2D"]) <= 2e-6
    assert relative_error(degrade.usm_sharpen(image), golden["out.usm_sharp"]) <= 2e-6
    rebuilt = gaussian_kernel(*golden.meta["kernel_args"])
    assert relative_error(rebuilt, golden["in.kernel"]) <= 1e-6


@pytest.mark.parametrize("name", ["area_0.5", "area_0.37", "area_1.3", "bilinear_0.5", "bicubic_0.5"])
def test_resize_matches_golden(name: str) -> None:
    # The others, bilinear and bicubic at 0.37 and 1.3, step by the factor instead of by the ratio of the
    # rounded sizes.
    golden = load_golden("degradation", "resize")
    ref = golden[f"out.{name}"]
    out = degrade.resize(golden["in.image"], (ref.shape[-2], ref.shape[-1]), name.split("_")[0])
    assert relative_error(out, ref) <= 1e-6


def test_gaussian_noise_matches_golden() -> None:
    golden, generator = load_golden("degradation", "noise_a"), seeded(123)
    image = golden["in.image"]  # the reference draws one gray field, then the colour fields of both pictures
    gray = degrade.add_gaussian_noise(image[1:], 20 / 255, gray=True, generator=generator)
    colour = degrade.add_gaussian_noise(image, 10 / 255, gray=False, generator=generator)
    assert relative_error(torch.cat([colour[:1], gray]).clamp(0, 1), golden["out.gauss"]) <= 1e-6


def test_poisson_noise_matches_golden() -> None:
    golden, generator = load_golden("degradation", "noise_a"), seeded(123)
    image = golden["in.image"]
    gray = degrade.add_poisson_noise(image, 2.0, gray=True, generator=generator)
    colour = degrade.add_poisson_noise(image, 1.0, gray=False, generator=generator)
    assert relative_error(torch.cat([colour[:1], gray[1:]]).clamp(0, 1), golden["out.poisson"]) <= 1e-6


@pytest.mark.parametrize("name", ["rand_gauss", "rand_poisson"])
def test_noise_drawn_from_the_ranges_matches_golden(name: str) -> None:
    golden, generator = load_golden("degradation", "noise_a"), seeded(123)
    image, stage = golden["in.image"], PASD.first
    if name == "rand_gauss":
        add, (low, high), unit = degrade.add_gaussian_noise, stage.gaussian_sigma, 255
    else:
        add, (low, high), unit = degrade.add_poisson_noise, stage.poisson_scale, 1
    amounts = (low + (high - low) * torch.rand(2, generator=generator)) / unit
    grays = torch.rand(2, generator=generator) < stage.gray_noise_probability
    assert grays.tolist() == [True, False]
    # Gray Gaussian noise is one field for the batch, gray Poisson noise one for each picture.
    given = image[:1] if name == "rand_gauss" else image
    gray = add(given, float(amounts[0]), gray=True, generator=generator)
    colour = add(image, float(amounts[1]), gray=False, generator=generator)
    assert relative_error(torch.cat([gray[:1], colour[1:]]).clamp(0, 1), golden[f"out.{name}"]) <= 1e-6


@pytest.fixture
def reference_draws(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """degrade.py draws from numpy's (numbers, chances) and python's (choices) generators,
    as the reference; seeds all.
    """

    def choice(_generator: object, options: tuple, probabilities: tuple[float, ...] | None = None) -> object:
        return random.choices(options, probabilities)[0] if probabilities else random.choice(options)

    # Nothing is drawn there for what is certain: the first blur, the factor of a kept size.
    monkeypatch.setattr(degrade, "chance", lambda _, p: p == 1 or np.random.uniform() < p)
    monkeypatch.setattr(degrade, "uniform", lambda _, a, b: a if a == b else np.random.uniform(a, b))
    monkeypatch.setattr(degrade, "choice", choice)

    def seed_all(seed: int) -> None:
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)

    return seed_all


def reference_kernels() -> tuple[Blur | Sinc, Blur | Sinc, list[Sinc]]:
    """The reference draws its three kernels first."""
    draw = partial(degrade._draw_blur, seeded(), PASD)
    return draw(PASD.first), draw(PASD.second), degrade._draw_final_sinc(seeded(), PASD)


@pytest.mark.parametrize("seed", range(6))
def test_drawn_kernels_match_golden(reference_draws: Callable[[int], None], seed: int) -> None:
    golden = load_golden("degradation", "random_kernels")
    reference_draws(seed)
    first, second, sinc = reference_kernels()
    nothing = Blur(21, 1e-3, 1e-3)
    for name, step in ("k1", first), ("k2", second), ("sinc", sinc[0] if sinc else nothing):
        assert relative_error(padded(step.kernel(), 21), golden[f"s{seed}.{name}"]) <= 1e-6, name


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_whole_degradation_matches_golden(
    reference_draws: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Every number drawn as the reference draws it; JPEG as it does it; then the same picture to a level."""
    golden, stages = load_golden("degradation", "degrade_process"), (PASD.first, PASD.second)
    reference_draws(seed)
    random.random()  # to mirror the picture or not
    first, second, sinc = reference_kernels()
    blurs = {PASD.first: first, PASD.second: second}

    # What the reference draws from torch it draws when it gets there: until then, steps only say in which
    # stage they are.
    def draw_noise(generator: torch.Generator, stage: StageRanges) -> GaussianNoise | PoissonNoise:
        gaussian = degrade.chance(generator, stage.gaussian_probability)
        return (GaussianNoise if gaussian else PoissonNoise)(0, False, seed=stages.index(stage))

    def add_noise(image: Tensor, step: GaussianNoise | PoissonNoise) -> Tensor:
        stage, gaussian = stages[step.seed], isinstance(step, GaussianNoise)
        low, high = stage.gaussian_sigma if gaussian else stage.poisson_scale
        amount = (low + (high - low) * float(torch.rand(1))) / (255 if gaussian else 1)
        gray = float(torch.rand(1)) < stage.gray_noise_probability
        add = degrade.add_gaussian_noise if gaussian else degrade.add_poisson_noise
        draw = partial(add, image, amount, generator=torch.default_generator)
        grayed = draw(gray=True) if gray else None  # and then the colours, although they are not used
        coloured = draw(gray=False)
        return coloured if grayed is None else grayed

    def resize_step(image: Tensor, step: Resize, size: tuple[int, int]) -> Tensor:
        if step.factor >= PASD.first.resize_factor[0]:  # in the first stage, which steps by the factor
            return F.interpolate(image, scale_factor=float(step.factor), mode=step.mode)
        height, width = (int(side * step.factor) for side in size)
        return degrade.resize(image, (height, width), step.mode)

    def jpeg(image: Tensor, quality: int) -> Tensor:
        drawn_quality = torch.zeros(1).uniform_(*stages[quality].jpeg_quality)
        return tensor_jpeg(image, drawn_quality, style="diffjpeg")

    monkeypatch.setattr(degrade, "_draw_blur", lambda _, __, stage: blurs[stage])
    monkeypatch.setattr(degrade, "_draw_final_sinc", lambda *_: sinc)
    monkeypatch.setattr(degrade, "_draw_noise", draw_noise)
    monkeypatch.setattr(degrade, "_draw_jpeg", lambda _, stage: Jpeg(stages.index(stage)))
    monkeypatch.setattr(degrade, "_add_noise", add_noise)
    monkeypatch.setattr(degrade, "_resize_step", resize_step)
    clean, reference = golden[f"s{seed}.gt"].float() / 255, golden[f"s{seed}.lq"].float() / 255
    out = degrade.apply(clean, degrade.sample_parameters(seeded(), ranges=PASD), jpeg=jpeg)
    enlarged = F.interpolate(
        out, size=(128, 128), mode="nearest"
    )  # the three stored ones are: 4 x 4 equal pixels
    error = ((enlarged - reference) * 255).abs()
    assert error.max() < 1.01 and error.mean() < 0.01


def test_degradations_are_as_strong_as_the_reference() -> None:
    """By the mean absolute difference from the clean picture:
    the mean over seeds beside that of the reference's three.
    """
    golden = load_golden("degradation", "degrade_process")

    def strengths(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        return torch.stack([(clean - degraded).abs().mean() for clean, degraded in pairs])

    def ours(ranges: Ranges) -> Tensor:
        generator = seeded()
        drawn = [degrade.sample_parameters(generator, ranges=ranges) for _ in range(40)]
        degraded = [degrade.apply(clean, parameters) for parameters in drawn]
        return strengths([(clean, F.interpolate(small, size=(128, 128))) for small in degraded])

    clean = golden["s0.gt"].float() / 255
    reference = strengths([(golden[f"s{s}.gt"] / 255, golden[f"s{s}.lq"] / 255) for s in range(3)])
    mild, harsh = ours(PASD), ours(REAL_ESRGAN)
    error_of_three = mild.std() / math.sqrt(3)
    assert (mild.mean() - reference.mean()).abs() < 2 * error_of_three
    assert harsh.mean() - reference.mean() > 2 * error_of_three  # so that this can tell the ranges apart
