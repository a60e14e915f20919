import math

import pytest
import torch
from goldens import load_golden, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

from msbd import degrade
from msbd.degrade import Blur, Degradation, GaussianNoise, Jpeg, PoissonNoise, Resize, Strength

ALWAYS = Strength(
    blur_probability=1,
    anisotropic_probability=1,
    resize_probability=1,
    noise_probability=1,
    jpeg_probability=1,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(height: int = 64, width: int = 80, batch: int = 1, seed: int = 0) -> torch.Tensor:
    small = torch.rand((batch, 3, max(height // 8, 1), max(width // 8, 1)), generator=seeded(seed))
    return degrade.resize(small, (height, width), "bicubic").clamp(0, 1)


def test_kernels_match_golden() -> None:
    golden = load_golden("degradation", "kernels")
    for spec in golden.meta["specs"]:
        ref, args = golden[f"kernel.{spec['i']}"], spec["args"]
        if spec["kind"] == "sinc":
            kernel = degrade.sinc_kernel(*args)
        else:
            beta = args[4] if len(args) == 5 else 1.0
            kernel = degrade.gaussian_kernel(*args[:4], beta=beta, plateau=spec["kind"].startswith("plateau"))
        assert relative_error(kernel, ref) <= 1e-6, spec


@pytest.mark.parametrize("case", ["process_64x80", "process_55x70"])
def test_filter2d_matches_golden(case: str) -> None:
    golden = load_golden("degradation", case)
    assert (
        relative_error(degrade.filter2d(golden["in.image"], golden["in.kernel"]), golden["out.filter2D"])
        <= 1e-5
    )
    rebuilt = degrade.gaussian_kernel(*golden.meta["kernel_args"])
    assert relative_error(rebuilt, golden["in.kernel"]) <= 1e-6


@pytest.mark.parametrize("name", ["area_0.5", "area_0.37", "area_1.3", "bilinear_0.5", "bicubic_0.5"])
def test_resize_matches_golden(name: str) -> None:
    # bilinear and bicubic at 0.37 and 1.3 step by the factor instead of by the ratio of the rounded sizes; we always do the latter.
    golden = load_golden("degradation", "resize")
    ref = golden[f"out.{name}"]
    out = degrade.resize(golden["in.image"], (ref.shape[-2], ref.shape[-1]), name.split("_")[0])
    assert relative_error(out, ref) <= 1e-5


def test_gaussian_noise_matches_golden() -> None:
    golden, generator = load_golden("degradation", "noise_a"), seeded(123)
    image = golden["in.image"]  # the reference draws one gray field, then the colour fields of both pictures
    gray = degrade.add_gaussian_noise(image[1:], 20 / 255, gray=True, generator=generator)
    colour = degrade.add_gaussian_noise(image, 10 / 255, gray=False, generator=generator)
    assert relative_error(torch.cat([colour[:1], gray]).clamp(0, 1), golden["out.gauss"]) <= 1e-5


def test_poisson_noise_matches_golden() -> None:
    golden, generator = load_golden("degradation", "noise_a"), seeded(123)
    image = golden["in.image"]
    gray = degrade.add_poisson_noise(image, 2.0, gray=True, generator=generator)
    colour = degrade.add_poisson_noise(image, 1.0, gray=False, generator=generator)
    assert relative_error(torch.cat([colour[:1], gray[1:]]).clamp(0, 1), golden["out.poisson"]) <= 1e-5


def test_gaussian_kernel_of_even_size_is_refused() -> None:
    with pytest.raises(ValueError, match="odd size"):
        degrade.gaussian_kernel(8, 1.0, 1.0)


@pytest.mark.parametrize("size", [(1, 1), (3, 40), (5, 5)])
def test_filter2d_keeps_a_flat_picture_flat_even_when_smaller_than_the_kernel(size: tuple[int, int]) -> None:
    flat = torch.full((1, 3, *size), 0.3)
    out = degrade.filter2d(flat, degrade.gaussian_kernel(21, 3.0, 1.0, 0.4))
    torch.testing.assert_close(out, flat)


@settings(max_examples=20, deadline=None)
@given(
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    scale=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 999),
)
def test_apply_gives_the_promised_size_in_8_bit_levels(
    height: int, width: int, scale: int, seed: int
) -> None:
    parameters = degrade.sample_parameters(seeded(seed), scale=scale, strength=ALWAYS)
    out = degrade.apply(picture(height, width), parameters)
    assert out.shape == (1, 3, max(1, round(height / scale)), max(1, round(width / scale)))
    assert out.min() >= 0 and out.max() <= 1
    assert ((out * 255) - (out * 255).round()).abs().max() < 1e-4


def test_apply_is_deterministic_and_leaves_the_picture_alone() -> None:
    image = picture(batch=2)
    before = image.clone()
    parameters = degrade.sample_parameters(seeded(3), strength=ALWAYS)
    torch.randn(5)  # the global generator plays no part
    assert torch.equal(degrade.apply(image, parameters), degrade.apply(image, parameters))
    assert torch.equal(image, before)


def test_sample_parameters_follows_the_generator() -> None:
    def drawn(seed: int) -> list[Degradation]:
        generator = seeded(seed)
        return [degrade.sample_parameters(generator) for _ in range(20)]

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)
    assert len(set(drawn(0))) == 20


def test_sample_parameters_stays_in_its_ranges_and_uses_every_step() -> None:
    generator, seen = seeded(), set()
    for _ in range(300):
        steps = degrade.sample_parameters(generator).steps
        seen |= {type(step) for step in steps}
        for step in steps:
            match step:
                case Blur():
                    assert min(step.sigma_x, step.sigma_y) >= 0.2 and max(step.sigma_x, step.sigma_y) <= 1.5
                case GaussianNoise():
                    assert 1 / 255 <= step.sigma <= 10 / 255
                case Jpeg():
                    assert 60 <= step.quality <= 95
    assert seen == {Blur, Resize, GaussianNoise, PoissonNoise, Jpeg}


def test_each_step_alone_does_what_it_says() -> None:
    image = picture()
    blurred = degrade.apply(image, Degradation((Blur(13, 1.5, 1.5),)))
    noisy = degrade.apply(image * 0.5 + 0.25, Degradation((GaussianNoise(0.03, False, 1),)))
    coded = degrade.apply(image, Degradation((Jpeg(60),)))
    assert blurred.diff(dim=-1).abs().mean() < image.diff(dim=-1).abs().mean()
    assert 0.027 < (noisy - (image * 0.5 + 0.25)).std() < 0.033
    assert 0 < (coded - image).abs().mean() < 0.05


def test_gray_noise_is_the_same_in_every_channel_and_colour_noise_is_not() -> None:
    image = torch.full((1, 3, 32, 32), 0.5)
    for add in (degrade.add_gaussian_noise, degrade.add_poisson_noise):
        gray = add(image, 0.1, gray=True, generator=seeded()) - image
        colour = add(image, 0.1, gray=False, generator=seeded()) - image
        torch.testing.assert_close(gray[:, 0], gray[:, 2])
        assert not torch.allclose(colour[:, 0], colour[:, 2])


def test_jpeg_gets_closer_with_quality() -> None:
    image = picture()
    errors = [float((degrade.jpeg(image, quality) - image).abs().mean()) for quality in (30, 60, 95)]
    assert errors[0] > errors[1] > errors[2] and not math.isnan(errors[2])


def test_apply_refuses_a_picture_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        degrade.apply(torch.zeros(3, 8, 8), Degradation(()))
