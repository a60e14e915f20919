"""JPEG in tensors beside Pillow's files and beside the stored outputs of DiffJPEG."""

from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import features
from skimage import data
from torch import Tensor

from msbd.train.jpeg import pillow_jpeg, tensor_jpeg
from tests.helpers.goldens import load_golden, relative_error
from tests.helpers.rounding import assert_same_to_rounding

Style = Literal["libjpeg", "diffjpeg"]
STYLES: tuple[Style, ...] = ("libjpeg", "diffjpeg")
needs_turbo = pytest.mark.skipif(
    not features.check("libjpeg_turbo"), reason="this Pillow has another libjpeg"
)


def photo(name: str) -> Tensor:
    return torch.from_numpy(np.array(getattr(data, name)())).permute(2, 0, 1)[None] / 255


def noise(batch: int, height: int, width: int, seed: int = 0) -> Tensor:
    return torch.rand((batch, 3, height, width), generator=torch.Generator().manual_seed(seed))


def psnr(image: Tensor, reference: Tensor) -> float:
    return float(-10 * (image - reference).double().square().mean().log10())


# In float64, as the coefficient nearest to a tie is 3.5e-5 of a step away: no block has to be left out.
@pytest.mark.parametrize("case", ["process_64x80", "process_55x70"])
def test_diffjpeg_matches_golden(case: str) -> None:
    golden = load_golden("degradation", case)
    image, qualities = golden["in.image"].double(), golden.meta["jpeg_qualities"]
    for quality in qualities:
        hard = tensor_jpeg(image, quality, style="diffjpeg")
        smooth = tensor_jpeg(image, quality, style="diffjpeg", rounding="smooth")
        assert relative_error(hard, golden[f"out.jpeg_q{quality}"]) <= 1e-6
        assert relative_error(smooth, golden[f"out.jpeg_diff_q{quality}"]) <= 1e-6
    batch = tensor_jpeg(image.expand(2, -1, -1, -1), torch.tensor(qualities), style="diffjpeg")
    assert relative_error(batch, golden["out.jpeg_batch"]) <= 1e-6


@pytest.mark.parametrize("case", ["process_64x80", "process_55x70"])
def test_libjpeg_matches_opencv(case: str) -> None:
    golden = load_golden("degradation", case)
    quality = golden.meta["jpeg_qualities"][0]
    image = tensor_jpeg(golden["in.image"].double(), quality)
    reference = golden[f"info.cv2_jpeg_q{quality}_rgb_uint8"].permute(2, 0, 1)[None]
    assert torch.equal((image * 255).round().byte(), reference)


@needs_turbo
@pytest.mark.parametrize("name", ["coffee", "astronaut", "chelsea"])
@pytest.mark.parametrize("quality", [30, 60, 90])
def test_libjpeg_is_pillow(name: str, quality: int) -> None:
    image = photo(name)
    reference = pillow_jpeg(image, quality)
    assert torch.equal(tensor_jpeg(image.double(), quality), pillow_jpeg(image.double(), quality))
    single = tensor_jpeg(image, quality)
    assert psnr(single, reference) > 90  # infinite, but for 96.3 dB of coffee at 90
    assert (single != reference).float().mean() < 1e-4


@needs_turbo
def test_libjpeg_is_pillow_at_small_sizes() -> None:
    for height in (1, 2, 3, 8, 9):
        for width in range(1, 10):
            image = noise(1, height, width).double()
            assert torch.equal(tensor_jpeg(image, 40), pillow_jpeg(image, 40)), (height, width)


@needs_turbo
@settings(max_examples=50)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 100), st.integers(0, 2**31))
def test_libjpeg_is_pillow_at_any_size_and_quality(height: int, width: int, quality: int, seed: int) -> None:
    image = noise(1, height, width, seed).double()
    assert torch.equal(tensor_jpeg(image, quality), pillow_jpeg(image, quality))


@pytest.mark.parametrize("name, low, high", [("coffee", 33, 40), ("astronaut", 34, 41), ("chelsea", 35, 43)])
def test_diffjpeg_is_not_what_files_look_like(name: str, low: float, high: float) -> None:
    image = photo(name)
    found = [
        psnr(tensor_jpeg(image, quality, style="diffjpeg"), pillow_jpeg(image, quality))
        for quality in (30, 90)
    ]
    assert low < found[0] < found[1] < high


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("size", [(1, 1), (1, 17), (16, 3), (7, 9), (33, 47)])
def test_every_picture_has_its_quality(style: Style, size: tuple[int, int]) -> None:
    # In float64, where libjpeg's sums are exact: in float32 another batch may round a half to the other side.
    image, qualities = noise(4, *size).double(), [5, 49, 50, 97]
    batch = tensor_jpeg(image, torch.tensor(qualities), style=style)
    single = [tensor_jpeg(image[i : i + 1], quality, style=style) for i, quality in enumerate(qualities)]
    torch.testing.assert_close(batch, torch.cat(single), atol=1e-5, rtol=0)
    assert batch.shape == image.shape and batch.min() >= 0 and batch.max() <= 1


def test_pillow_takes_a_quality_per_picture() -> None:
    image = noise(2, 20, 30)
    batch = pillow_jpeg(image, [20, 90])
    single = [pillow_jpeg(image[:1], 20), pillow_jpeg(image[1:], torch.tensor(90))]
    assert torch.equal(batch, torch.cat(single))


# A flat picture is one coefficient a block and plane: of half a step at most it may be wrong.
@pytest.mark.parametrize("color", [(0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (0.5, 0.5, 0.5), (0.2, 0.6, 0.3)])
def test_flat_pictures_stay_flat(color: tuple[float, float, float]) -> None:
    image = torch.tensor(color).view(1, 3, 1, 1).expand(1, 3, 21, 34)
    for out in (tensor_jpeg(image, 90), pillow_jpeg(image, 90)):
        torch.testing.assert_close(out, out[..., :1, :1].expand_as(out), atol=0, rtol=0)
        torch.testing.assert_close(out, image, atol=2 / 255, rtol=0)
    image = image[..., :16, :32]  # without DiffJPEG's black edges
    out = tensor_jpeg(image, 90, style="diffjpeg")
    torch.testing.assert_close(out, out[..., :1, :1].expand_as(out), atol=1e-6, rtol=0)
    torch.testing.assert_close(out, image, atol=2 / 255, rtol=0)


def test_diffjpeg_pads_with_black() -> None:
    image = torch.full((1, 3, 16, 20), 0.7)
    error = (tensor_jpeg(image, 10, style="diffjpeg") - image).abs()
    assert error[..., :16].max() < 0.01 and error[..., 16:].max() > 0.1
    assert tensor_jpeg(image, 10).unique().numel() == 1


def test_values_outside_the_range_are_clamped() -> None:
    image = noise(1, 16, 16) * 2 - 0.5
    inside = image.clamp(0, 1)
    assert torch.equal(tensor_jpeg(image, 80, style="diffjpeg"), tensor_jpeg(inside, 80, style="diffjpeg"))
    assert torch.equal(tensor_jpeg(image, 80), tensor_jpeg(inside, 80))
    assert torch.equal(pillow_jpeg(image, 80), pillow_jpeg(inside, 80))


@pytest.mark.parametrize("style", STYLES)
def test_quality_100_is_nearly_lossless(style: Style) -> None:
    image = photo("astronaut")[..., :64, :64].mean(1, keepdim=True).expand(-1, 3, -1, -1)
    assert psnr(tensor_jpeg(image, 100, style=style), image) > 50


def test_diffjpeg_takes_any_number_as_quality() -> None:
    image = noise(1, 16, 16)
    a, b, c = (tensor_jpeg(image, quality, style="diffjpeg") for quality in (60, 60.5, 61))
    assert not torch.equal(a, b) and not torch.equal(b, c)


def test_smooth_rounding_has_the_derivative_of_its_formula() -> None:
    image, direction = noise(1, 20, 20).double() * 0.8 + 0.1, noise(1, 20, 20, 1).double() - 0.5
    image.requires_grad_()

    def loss(picture: Tensor) -> Tensor:
        out = tensor_jpeg(picture, 40, style="diffjpeg", rounding="smooth")
        return (out * noise(1, 20, 20, 2)).sum()

    (gradient,) = torch.autograd.grad(loss(image), image)
    with torch.no_grad():
        step = 1e-6 * direction
        slope = (loss(image + step) - loss(image - step)) / 2e-6
    assert (gradient * direction).sum().item() == pytest.approx(slope.item(), rel=1e-4)


def test_gradient_flows_through_the_roundings_of_libjpeg() -> None:
    image = photo("chelsea")[..., 100:165, 100:171]
    leaf = image.clone().requires_grad_()
    out = tensor_jpeg(leaf, 60, rounding="smooth")
    target = image.flip(-1)
    (gradient,) = torch.autograd.grad((out - target).square().sum(), leaf)
    plain = 2 * (image - target)
    assert bool(gradient.isfinite().all())
    assert torch.cosine_similarity(gradient.flatten(), plain.flatten(), dim=0) > 0.5
    # In float64 the sums of libjpeg's whole numbers are exact, in whichever order a product of matrices makes
    # them.
    assert_same_to_rounding(
        tensor_jpeg(leaf.double(), 60, rounding="smooth"), tensor_jpeg(image.double(), 60, rounding="smooth")
    )
    assert psnr(out.detach(), pillow_jpeg(image, 60)) > 40
    assert not tensor_jpeg(leaf, 60).requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("jpeg", [pillow_jpeg, tensor_jpeg])
def test_dtype_is_kept(jpeg: Any, dtype: torch.dtype) -> None:
    image = photo("astronaut")[..., :40, :40].to(dtype)
    out = jpeg(image, 70)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), pillow_jpeg(image.double(), 70), atol=4e-3, rtol=0)


def test_autocast_changes_nothing() -> None:
    image = photo("astronaut")[..., :40, :40]
    with torch.autocast("cpu", torch.bfloat16):
        inside = tensor_jpeg(image, 70)
    assert torch.equal(inside, tensor_jpeg(image, 70))


@pytest.mark.cuda
@pytest.mark.parametrize("style", STYLES)
def test_a_gpu_gives_what_the_cpu_does(style: Style) -> None:
    image, qualities = photo("astronaut").expand(2, -1, -1, -1).double(), torch.tensor([30, 90])
    out = tensor_jpeg(image.cuda(), qualities.cuda(), style=style)
    assert out.is_cuda
    torch.testing.assert_close(out.cpu(), tensor_jpeg(image, qualities, style=style), atol=1e-6, rtol=0)


@pytest.mark.parametrize("jpeg", [pillow_jpeg, tensor_jpeg])
def test_what_is_no_picture_or_quality_is_refused(jpeg: Any) -> None:
    image = noise(2, 8, 8)
    for quality in (0, 101, -1, 60.5, float("nan"), [50, 0]):
        with pytest.raises(ValueError, match="whole number from 1 to 100"):
            jpeg(image, quality)
    with pytest.raises(ValueError, match="3 JPEG qualities for 2 pictures"):
        jpeg(image, [1, 2, 3])
    for wrong in (image[0], image[:, :1], image[..., :0], image[:0], (image * 255).byte()):
        with pytest.raises(ValueError, match=r"JPEG wants float \(B, 3, H, W\)"):
            jpeg(wrong, 50)


def test_an_unknown_style_or_rounding_is_refused() -> None:
    wrong: Any = "mozjpeg"
    with pytest.raises(ValueError, match="'mozjpeg'; expected libjpeg or diffjpeg"):
        tensor_jpeg(noise(1, 8, 8), 50, style=wrong)
    with pytest.raises(ValueError, match="'mozjpeg'; expected hard or smooth"):
        tensor_jpeg(noise(1, 8, 8), 50, rounding=wrong)
