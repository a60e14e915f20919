"""Enlarging with the official weights of extra `enlarge`, and what holds for any upscaler."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from msbd.load import load_restore_pipeline
from msbd.pixels.files import load_image, to_pixels
from msbd.pixels.pieces import mirrored_pieces
from msbd.pixels.upscale import enlarge_by_net, super_resolve
from nets.rrdb import REALESRGAN_X2PLUS, REALESRGAN_X4PLUS, REALESRGAN_X4PLUS_ANIME_6B, RRDBConfig, RRDBNet
from tests.conftest import ROOT

OFFICIAL = ("realesrgan-x4plus", "realesrgan-anime", "realsr-df2k")
MINI = RRDBConfig(num_feat=32, num_block=3, num_grow_ch=16)


def coloured_net(**sizes: Any) -> RRDBNet:
    """A small net with random weights, which colours all that it sees."""
    torch.manual_seed(2)
    sizes = {"num_feat": 8, "num_block": 2, "num_grow_ch": 4} | sizes
    net = RRDBNet(RRDBConfig(**sizes)).eval().requires_grad_(False)
    state = net.state_dict()
    more = {"conv_last.weight": state["conv_last.weight"] * 200}  # a picture with contrast
    net.load_state_dict(state | more | {"conv_last.bias": torch.tensor([0.3, 0.5, 0.7])})
    return net


def spread(image: Tensor) -> float:
    """Largest difference of a pixel's channels, 8-bit levels."""
    return float((image.amax(1) - image.amin(1)).max()) * 127.5


def gray(levels: Tensor) -> Tensor:
    return (levels / 127.5 - 1).expand(1, 3, *levels.shape[-2:])


# ---- grey --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(80, 96), (50, 60), (20, 24)])
def test_a_grey_picture_stays_grey_to_the_bit(size: tuple[int, int]) -> None:
    image = gray(torch.randint(0, 256, (20, 24)).float())
    made = enlarge_by_net(image, size, coloured_net())
    pixels = to_pixels(made)
    assert (pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 1] == pixels[..., 2]).all()
    assert made.std() > 0.01


def test_a_nearly_grey_scan_is_not_coloured_further() -> None:
    levels = torch.randint(20, 230, (24, 28)).float()
    tinted = torch.stack((levels + 1, levels, levels - 1))[None] / 127.5 - 1
    assert spread(enlarge_by_net(tinted, (96, 112), coloured_net())) <= 3


def test_a_few_noisy_pixels_do_not_make_a_grey_picture_coloured_but_a_picture_is_its_nets() -> None:
    image = gray(torch.randint(20, 230, (40, 40)).float()).clone()
    image[..., 0, 3, 5] += 0.5
    far = enlarge_by_net(image, (160, 160), coloured_net())[..., 60:, 60:]
    assert spread(far) < 0.01
    coloured = torch.rand(1, 3, 24, 24) * 2 - 1
    net = coloured_net()
    made = enlarge_by_net(coloured, (96, 96), net)
    seen = nn.functional.pad(coloured / 2 + 0.5, (16,) * 4, mode="reflect")
    assert torch.allclose(made, (net(seen)[..., 64:-64, 64:-64] * 2 - 1).clamp(-1, 1), atol=1e-5)


# ---- pieces ------------------------------------------------------------------------------------------------


def test_the_context_follows_from_the_depth() -> None:
    found = [c.context for c in (MINI, REALESRGAN_X4PLUS_ANIME_6B, REALESRGAN_X4PLUS, REALESRGAN_X2PLUS)]
    assert found == [16, 48, 48, 96]


def test_pieces_see_their_context_and_a_rim_of_the_mirrored_picture() -> None:
    pieces = mirrored_pieces((300, 70), 256, 48, 4, 16)
    spans = [(p.seen.top, p.seen.bottom, p.kept.top, p.kept.bottom) for p in pieces]
    assert spans == [(-16, 304, 0, 256), (208, 316, 256, 300)]
    assert {(p.seen.left, p.seen.width) for p in pieces} == {(-16, 104)}  # 70 + 2 x 16, to a multiple of 4


def test_progress_goes_through_the_blocks_of_every_piece() -> None:
    net, told = coloured_net(num_block=3), []
    made = enlarge_by_net(
        torch.rand(1, 3, 16, 32) * 2 - 1, (64, 128), net, on_progress=lambda *at: told.append(at), piece=16
    )
    assert told == [(number, 8) for number in range(1, 9)]  # 2 pieces of 3 blocks and an end
    assert not any(block._forward_hooks for block in net.body) and made.shape == (1, 3, 64, 128)
    told.clear()
    super_resolve(torch.zeros(1, 3, 8, 8), (16, 16), "bicubic", on_progress=lambda *at: told.append(at))
    assert told == [(1, 1)]


def test_the_net_works_at_the_pictures_own_size_too() -> None:
    image = torch.rand(1, 3, 20, 24) * 2 - 1
    assert super_resolve(image, (20, 24), "rrdb", coloured_net()) is image
    assert not torch.equal(enlarge_by_net(image, (20, 24), coloured_net()), image)


# ---- the official weights ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photo() -> Tensor:
    """The fur and an eye of Chelsea the cat, 48 x 160."""
    return load_image(ROOT / "examples" / "chelsea.jpg").image[..., 170:218, 150:310]


@pytest.mark.enlarge
@pytest.mark.parametrize(
    "name",
    [name if name != "realsr-df2k" else pytest.param(name, marks=pytest.mark.long) for name in OFFICIAL],
)
def test_a_seam_of_the_official_nets_does_not_show(name: str, photo: Tensor) -> None:
    """Issue 15's measure: means within 4 pixels of the input, the step across the seam beside the whole's."""
    net = load_restore_pipeline(name).upscaler
    whole = enlarge_by_net(photo, (192, 640), net)
    tiled = enlarge_by_net(photo, (192, 640), net, piece=80)
    difference = (tiled - whole).abs() * 127.5
    assert 0 < difference.max() <= 8 and difference[..., 304:336].mean() <= 1

    def step(image: Tensor) -> Tensor:
        return (image[..., 320] - image[..., 319]).abs().mean()

    assert step(tiled) <= 1.2 * step(whole)


@pytest.mark.enlarge
@pytest.mark.parametrize("name", OFFICIAL)
def test_a_grey_photograph_stays_grey_with_the_official_nets(name: str, photo: Tensor) -> None:
    image = gray((photo[:, 1, :, :40] * 127.5 + 127.5).round())
    pixels = to_pixels(enlarge_by_net(image, (192, 160), load_restore_pipeline(name).upscaler))
    assert (pixels.max(-1) == pixels.min(-1)).all() and pixels.std() > 10


@pytest.mark.enlarge
def test_bfloat16_on_a_cpu_is_within_its_rounding(photo: Tensor) -> None:
    crop = photo[..., :40]
    made = [
        enlarge_by_net(crop, (192, 160), load_restore_pipeline("realsr-df2k", dtype=dtype).upscaler)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    difference = (made[0] - made[1]).abs() * 127.5
    assert 0 < difference.mean() < 1 and difference.max() < 24  # levels
