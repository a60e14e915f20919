"""The degradation of training pictures: what is drawn, what is done, and their blurs; any size, any seed."""

import math
import re
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from msbd.train import degrade
from msbd.train.blur_kernels import filter2d, gaussian_kernel
from msbd.train.degrade import (
    FAMILIES,
    PASD,
    REAL_ESRGAN,
    RESIZE_MODES,
    Blur,
    Degradation,
    GaussianNoise,
    Jpeg,
    PoissonNoise,
    Ranges,
    Resize,
    Sinc,
    StageRanges,
    Step,
)
from tests.helpers.goldens import relative_error
from tests.helpers.rounding import assert_same_to_rounding

PRESETS = pytest.mark.parametrize("ranges", [PASD, REAL_ESRGAN], ids=["PASD", "REAL_ESRGAN"])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(height: int = 64, width: int = 80, batch: int = 1, seed: int = 0) -> Tensor:
    small = torch.rand((batch, 3, max(height // 8, 1), max(width // 8, 1)), generator=seeded(seed))
    return degrade.resize(small, (height, width), "bicubic").clamp(0, 1)


def drawn(ranges: Ranges, count: int) -> list[tuple[Step, ...]]:
    """The steps of `count` degradations."""
    generator = seeded()
    return [degrade.sample_parameters(generator, ranges=ranges).steps for _ in range(count)]


# ---- what is drawn -----------------------------------------------------------------------------------------


@PRESETS
def test_the_steps_come_in_the_published_order(ranges: Ranges) -> None:
    letters = {Blur: "B", Sinc: "S", Resize: "R", GaussianNoise: "N", PoissonNoise: "N", Jpeg: "J"}
    seen: tuple[set[str], ...] = (set(), set(), set())
    for steps in drawn(ranges, 300):
        order = "".join(letters[type(step)] for step in steps)
        parts = re.fullmatch("([BS])RNJ([BS]?)RN(RS?J|JRS?)", order)
        assert parts, order
        for kinds, part in zip(seen, parts.groups(), strict=True):
            kinds.add(part)
    assert seen == ({"B", "S"}, {"B", "S", ""}, {"RSJ", "RJ", "JRS", "JR"})


def uses(ranges: Ranges, count: int) -> tuple[Counter[str], Counter[str]]:
    """How often each choice was open, and how often it fell so."""
    opened, fell = Counter[str](), Counter[str]()

    def note(name: str, happened: bool) -> None:
        opened[name] += 1
        fell[name] += happened

    for steps in drawn(ranges, count):
        first, second = steps[:4], steps[4:]
        for family in FAMILIES:
            note(family, isinstance(first[0], Blur) and first[0].family == family)
        note("second blur", isinstance(second[0], Blur | Sinc))
        note("code last", isinstance(steps[-1], Jpeg))
        note("final sinc", any(isinstance(step, Sinc) for step in steps[-2:]))
        sizes = [step for step in steps if isinstance(step, Resize)]
        for stage, factor in ("first", sizes[0].factor), ("second", sizes[1].factor * 4):
            note(f"{stage} up", factor > 1)
            note(f"{stage} keep", factor == 1)
        noises = [step for step in steps if isinstance(step, GaussianNoise | PoissonNoise)]
        for noise in noises:
            note("gaussian", isinstance(noise, GaussianNoise))
            note("gray", noise.gray)
        for mode in RESIZE_MODES:
            note(mode, sizes[0].mode == mode)
    return opened, fell


@PRESETS
def test_everything_happens_as_often_as_promised(ranges: Ranges) -> None:
    opened, fell = uses(ranges, 2000)
    promised = {
        **{
            family: 0.9 * probability
            for family, probability in zip(FAMILIES, (0.45, 0.25, 0.12, 0.03, 0.12, 0.03), strict=True)
        },
        "second blur": 0.5 if ranges is PASD else 0.8,
        "code last": 0.5,
        "final sinc": 0.8,
        **{"first up": 0.2, "first keep": 0.1, "second up": 0.3, "second keep": 0.3},
        **{"gaussian": 0.5, "gray": 0.4},
        **dict.fromkeys(RESIZE_MODES, 1 / 3),
    }
    assert promised.keys() == opened.keys()
    for name, p in promised.items():
        deviation = math.sqrt(p * (1 - p) / opened[name])  # of a binomial share
        assert abs(fell[name] / opened[name] - p) < 4.5 * deviation, name


def fills(values: list[float], low: float, high: float) -> None:
    """`values` lie in [low, high] and reach both ends up to a tenth of the range."""
    margin = (high - low) / 10
    assert low <= min(values) < low + margin and high - margin < max(values) <= high


@PRESETS
def test_every_number_fills_its_range(ranges: Ranges) -> None:
    all_steps = drawn(ranges, 1000)
    firsts = [steps[:4] for steps in all_steps]
    seconds = [steps[4:] for steps in all_steps]
    for stage, kept, scale in (ranges.first, firsts, 1), (ranges.second, seconds, 4):
        fill_stage(stage, [step for steps in kept for step in steps], scale)
    steps = [step for steps in all_steps for step in steps]
    blurs = [step for step in steps if isinstance(step, Blur)]
    fills([b.angle for b in blurs if b.sigma_x != b.sigma_y], -math.pi, math.pi)
    fills([b.beta for b in blurs if b.family.startswith("generalized")], *ranges.generalized_beta)
    fills([b.beta for b in blurs if b.plateau], *ranges.plateau_beta)
    sincs = [step for step in steps if isinstance(step, Sinc)]
    fills([sinc.cutoff for sinc in sincs], math.pi / 5, math.pi)
    assert min(sinc.cutoff for sinc in sincs if sinc.size < 13) >= math.pi / 3
    assert {step.size for step in [*blurs, *sincs]} == set(range(7, 22, 2))


def fill_stage(stage: StageRanges, steps: list[Step], scale: int) -> None:
    blurs = [step for step in steps if isinstance(step, Blur)]
    fills([b.sigma_x for b in blurs] + [b.sigma_y for b in blurs], *stage.blur_sigma)
    fills([step.factor * scale for step in steps if isinstance(step, Resize)], *stage.resize_factor)
    fills([255 * step.sigma for step in steps if isinstance(step, GaussianNoise)], *stage.gaussian_sigma)
    fills([step.scale for step in steps if isinstance(step, PoissonNoise)], *stage.poisson_scale)
    fills([step.quality for step in steps if isinstance(step, Jpeg)], *stage.jpeg_quality)


def test_sample_parameters_follows_its_generator_and_no_other() -> None:
    state = torch.get_rng_state()
    assert drawn(PASD, 20) == drawn(PASD, 20)
    assert len(set(drawn(PASD, 20))) == 20
    assert degrade.sample_parameters(seeded(0)) != degrade.sample_parameters(seeded(1))
    assert torch.equal(torch.get_rng_state(), state)


# ---- what is done ------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    scale=st.integers(1, 60),
    ranges=st.sampled_from([PASD, REAL_ESRGAN]),
    seed=st.integers(0, 999),
)
@example(height=98, width=49, scale=49, ranges=PASD, seed=0)  # 98 * (1 / 49) is below 2
def test_apply_gives_the_promised_size_in_8_bit_levels(
    height: int, width: int, scale: int, ranges: Ranges, seed: int
) -> None:
    parameters = degrade.sample_parameters(seeded(seed), ranges=ranges, scale=scale)
    out = degrade.apply(picture(height, width), parameters)
    assert out.shape == (1, 3, max(1, height // scale), max(1, width // scale))
    assert out.min() >= 0 and out.max() <= 1
    assert ((out * 255) - (out * 255).round()).abs().max() < 1e-4


@pytest.mark.parametrize("size", [(1, 1), (3, 50)])
def test_tiny_pictures_pass_every_kind_of_degradation(size: tuple[int, int]) -> None:
    for steps in drawn(REAL_ESRGAN, 60):
        out = degrade.apply(picture(*size), Degradation(steps))
        assert out.shape == (1, 3, 1, max(1, size[1] // 4)) and out.isfinite().all()


@pytest.mark.parametrize("seed", range(6))
def test_apply_is_deterministic_and_treats_a_batch_as_its_pictures(seed: int) -> None:
    images = picture(batch=3)
    before = images.clone()
    parameters = degrade.sample_parameters(seeded(seed))
    together = degrade.apply(images, parameters)
    torch.randn(5)  # the global generator plays no part
    assert torch.equal(degrade.apply(images, parameters), together)
    alone = torch.cat([degrade.apply(image, parameters) for image in images.split(1)])
    # Another batch rounds otherwise, and JPEG's coefficients may fall to the other side: a block of 16 x 16
    # or so.
    assert_same_to_rounding(alone, together, flipped=0.1)
    assert torch.equal(images, before)


def test_each_step_alone_does_what_it_says() -> None:
    image = picture()
    blurred = degrade.apply(image, Degradation((Blur(13, 1.5, 1.5),)))
    noisy = degrade.apply(image * 0.5 + 0.25, Degradation((GaussianNoise(0.03, False, 1),)))
    coded = degrade.apply(image, Degradation((Jpeg(60),)))
    assert blurred.diff(dim=-1).abs().mean() < image.diff(dim=-1).abs().mean()
    assert 0.027 < (noisy - (image * 0.5 + 0.25)).std() < 0.033
    assert 0 < (coded - image).abs().mean() < 0.05


def test_noise_saturates_as_a_sensor_does() -> None:
    white = torch.ones(1, 3, 40, 40)
    for noise in (GaussianNoise(0.2, False, 1), PoissonNoise(2.0, True, 1)):
        out = degrade.apply(white, Degradation((noise, Blur(21, 3, 3))))
        assert out.mean() < 0.95  # what is above 1 cannot make up for what is below


def test_jpeg_is_whatever_apply_is_given() -> None:
    seen = []

    def jpeg(image: Tensor, quality: int) -> Tensor:
        seen.append(quality)
        assert image.min() >= 0 and image.max() <= 1
        return 1 - image

    image = picture()
    steps = (Jpeg(40), Resize(1.3, "bicubic"), Jpeg(90), Resize(1.0, "area"))
    out = degrade.apply(image, Degradation(steps), jpeg=jpeg)
    assert seen == [40, 90] and (out - image).abs().mean() < 0.01


def test_resized_pictures_stay_in_register() -> None:
    # A ramp's value says where a pixel was: its centre. (Stepping by the factor, the last of 17 columns would
    # be 0.93, not 0.97.)
    ramp = ((torch.arange(48) + 0.5) / 48).expand(1, 3, 48, 48)
    for mode in ("bilinear", "bicubic"):
        out = degrade.apply(ramp, Degradation((Resize(0.37, mode),)))
        assert out.shape[-1] == 17
        torch.testing.assert_close(out[0, 0, 0], (torch.arange(17) + 0.5) / 17, atol=2 / 255, rtol=0)


def test_gray_noise_is_the_same_in_every_channel_and_colour_noise_is_not() -> None:
    image = torch.full((1, 3, 32, 32), 0.5)
    for add in (degrade.add_gaussian_noise, degrade.add_poisson_noise):
        gray = add(image, 0.1, gray=True, generator=seeded()) - image
        colour = add(image, 0.1, gray=False, generator=seeded()) - image
        torch.testing.assert_close(gray[:, 0], gray[:, 2])
        assert not torch.allclose(colour[:, 0], colour[:, 2])


def test_poisson_noise_has_the_variance_of_photon_counts() -> None:
    image = torch.full((1, 3, 200, 200), 0.25)
    image[..., :16, :16] = torch.arange(256).view(16, 16) / 255  # so that all 256 levels are there
    noise = (degrade.add_poisson_noise(image, 2.0, gray=False, generator=seeded()) - image)[..., 16:, :]
    assert abs(noise.mean()) < 5e-4
    assert abs(noise.std() / (2 * math.sqrt(0.25 / 256)) - 1) < 0.02


def test_apply_refuses_a_picture_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        degrade.apply(torch.zeros(3, 8, 8), Degradation(()))


def test_usm_sharpens_edges_and_leaves_faint_texture_alone() -> None:
    edge = torch.zeros(1, 3, 90, 90) + 0.3
    edge[..., 45:] = 0.7
    sharp = degrade.usm_sharpen(edge)
    assert sharp[0, 0, 45, 45] > 0.75 and sharp[0, 0, 45, 44] < 0.25
    faint = 0.5 + 0.03 * torch.rand((1, 3, 90, 90), generator=seeded())
    torch.testing.assert_close(degrade.usm_sharpen(faint), faint, atol=1e-6, rtol=0)


# ---- blur --------------------------------------------------------------------------------------------------


def test_gaussian_kernel_of_even_size_is_refused() -> None:
    with pytest.raises(ValueError, match="odd size"):
        gaussian_kernel(8, 1.0, 1.0)


@settings(max_examples=30, deadline=None)
@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    size=st.sampled_from([7, 13, 21]),
    angle=st.floats(-3.14, 3.14),
)
def test_filter2d_is_a_correlation_with_reflected_borders(
    height: int, width: int, size: int, angle: float
) -> None:
    image = torch.rand((2, 3, height, width), generator=seeded())
    kernel = gaussian_kernel(size, 3.0, 0.8, angle)
    kernel[0, -1] += 0.1  # no symmetry to hide behind
    half = size // 2
    padded = np.pad(image.double().numpy(), [(0, 0), (0, 0), (half, half), (half, half)], mode="reflect")
    reference = F.conv2d(torch.from_numpy(padded).view(6, 1, *padded.shape[2:]), kernel[None, None])
    assert relative_error(filter2d(image, kernel).reshape(reference.shape), reference) <= 1e-6


def test_what_is_no_step_is_refused() -> None:
    with pytest.raises(TypeError, match=r"'jpeg'.* is no step"):
        degrade.apply(torch.zeros(1, 3, 8, 8), Degradation(({"step": "jpeg"},)))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("image", [torch.zeros(1, 1, 8, 8), torch.zeros(1, 3, 8, 8, dtype=torch.float16)])
def test_other_pictures_are_refused(image: Tensor) -> None:
    with pytest.raises(ValueError, match="wants a .B, 3, H, W. picture"):
        degrade.apply(image, Degradation(()))
