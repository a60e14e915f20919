"""SR and LP of algorithm 1, line 20."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msbd.pixels.box import Box
from msbd.pixels.resize import low_pass, resize, take
from msbd.pixels.upscale import low_pass_reference, super_resolve
from nets.rrdb import RRDBConfig, RRDBNet


def picture(height: int, width: int, seed: int = 0) -> Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


class Blurred(nn.Module):
    """x `scale` by repetition after a 5 x 5 blur: an upscaler that looks at no more than 2 pixels around."""

    def __init__(self, scale: int = 4, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((3, 1, 5, 5), 0.04, dtype=dtype))
        self.scale = scale
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        x = F.conv2d(F.pad(x, (2, 2, 2, 2)), self.weight, groups=3)
        return x.repeat_interleave(self.scale, -1).repeat_interleave(self.scale, -2)


@pytest.mark.parametrize("mode", ["rrdb", "bilinear", "bicubic", "sharpen", "none"])
@pytest.mark.parametrize("size", [(48, 80), (37, 53), (16, 16)])
def test_super_resolve_gives_the_size_and_stays_in_range(mode: str, size: tuple[int, int]) -> None:
    out = super_resolve(picture(24, 40), size, mode, Blurred())
    assert tuple(out.shape) == (1, 3, *size)
    assert out.min() >= -1 and out.max() <= 1


@pytest.mark.parametrize("mode", ["rrdb", "bilinear", "bicubic", "sharpen", "none"])
def test_super_resolve_keeps_a_flat_picture_and_the_same_size(mode: str) -> None:
    flat = torch.full((1, 3, 20, 28), 0.25)
    net = nn.Upsample(scale_factor=4)
    torch.testing.assert_close(super_resolve(flat, (60, 84), mode, net), torch.full((1, 3, 60, 84), 0.25))
    assert super_resolve(flat, (20, 28), mode, None) is flat


def test_super_resolve_gives_the_net_zero_to_one_and_scales_down_bilinearly() -> None:
    image, net = picture(24, 40), Blurred()
    out = super_resolve(image, (60, 100), "rrdb", net)
    assert all(seen.min() >= 0 and seen.max() <= 1 for seen in net.seen)
    padded = take(image, Box(-16, -16, 56, 72)) / 2 + 0.5
    large = net(padded)[..., 64 : 64 + 96, 64 : 64 + 160] * 2 - 1
    torch.testing.assert_close(out, resize(large, (60, 100)))


def test_super_resolve_in_pieces_equals_the_whole() -> None:
    image, net = picture(270, 520), Blurred(scale=2)
    out = super_resolve(image, (540, 1040), "rrdb", net)
    assert len(net.seen) == 6 and max(max(seen.shape[-2:]) for seen in net.seen) <= 256 + 32
    whole = net(take(image, Box(-16, -16, 302, 552)) / 2 + 0.5)[..., 32:-32, 32:-32] * 2 - 1
    torch.testing.assert_close(out, whole)


def test_super_resolve_runs_the_net_where_it_is_needed_only() -> None:
    image, net = picture(270, 520), Blurred()
    everywhere = super_resolve(image, (810, 1560), "rrdb", net)
    net.seen.clear()
    needed = torch.zeros(1, 1, 810, 1560)
    needed[..., 700:720, 760:770] = 1  # across the border of two of the six pieces
    part = super_resolve(image, (810, 1560), "rrdb", net, needed)
    assert len(net.seen) == 2
    torch.testing.assert_close(part * needed, everywhere * needed)
    bilinear = resize(resize(image, (1080, 2080)), (810, 1560))
    torch.testing.assert_close(part[..., 780:, :], bilinear[..., 780:, :])


@pytest.mark.parametrize("scale", [2, 4])
def test_super_resolve_takes_odd_sizes_and_tiny_pictures_through_rrdb(scale: int) -> None:
    net = RRDBNet(RRDBConfig(scale=scale, num_feat=8, num_block=1, num_grow_ch=4)).eval()
    assert super_resolve(picture(33, 47), (100, 140), "rrdb", net).shape == (1, 3, 100, 140)
    assert super_resolve(picture(1, 3), (2, 6), "rrdb", net).shape == (1, 3, 2, 6)


def test_super_resolve_runs_the_net_in_its_own_dtype() -> None:
    net = Blurred(dtype=torch.bfloat16)
    out = super_resolve(picture(16, 16), (64, 64), "rrdb", net)
    assert net.seen[0].dtype == torch.bfloat16 and out.dtype == torch.float32


def test_super_resolve_refuses_a_missing_upscaler_and_other_words() -> None:
    with pytest.raises(ValueError, match="no upscaler"):
        super_resolve(picture(8, 8), (16, 16), "rrdb", None)
    with pytest.raises(ValueError, match="lanczos"):
        super_resolve(picture(8, 8), (16, 16), "lanczos", None)


def test_low_pass_reference_removes_what_the_input_size_cannot_hold() -> None:
    stripes = torch.ones(1, 3, 64, 64)
    stripes[..., ::2] = -1  # one pixel wide: gone at half the size and below
    assert low_pass_reference(stripes, (64, 64), "no") is stripes
    for mode, size in (("matching", (16, 16)), ("half", (64, 64))):
        assert low_pass_reference(stripes, size, mode)[..., 8:-8].abs().max() < 0.2
    waves = picture(64, 64)
    torch.testing.assert_close(low_pass_reference(waves, (24, 24), "matching"), low_pass(waves, (24, 24)))
    torch.testing.assert_close(low_pass_reference(waves, (24, 24), "half"), low_pass(waves, (32, 32)))
    assert torch.equal(low_pass_reference(waves, (64, 64), "matching"), waves)  # a stage of the same size
