"""RRDBNet against stored reference outputs, and what holds for any of its sizes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msbd.pixels import upscale
from nets.rrdb import REALESRGAN_X2PLUS, REALESRGAN_X4PLUS, REALESRGAN_X4PLUS_ANIME_6B, RRDBConfig, RRDBNet
from tests.helpers.goldens import load_golden, read_shapes, relative_error
from tests.helpers.seeded_nets import seeded_rrdb
from tests.helpers.seeded_weights import load_seeded, seeded_input, shapes_of


def small_net(scale: int = 4) -> RRDBNet:
    net = RRDBNet(RRDBConfig(scale=scale, num_feat=8, num_block=1, num_grow_ch=4)).eval()
    load_seeded(net, seed=5)
    return net


def recorder(seen: dict[str, Tensor], name: str) -> Callable[[nn.Module, Any, Tensor], None]:
    def record(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        seen[name] = output.clone()

    return record


@torch.no_grad()
def compare(case: str, tolerance: float) -> None:
    golden = load_golden("rrdbnet", case)
    net = seeded_rrdb(golden.meta)
    seen: dict[str, Tensor] = {}
    for name in ("conv_first", "body.0", "body"):
        net.get_submodule(name).register_forward_hook(recorder(seen, name))
    assert relative_error(net(golden["in.x"]), golden["out.y"]) <= tolerance
    for name, output in seen.items():
        stride = golden.meta["intermediate"][name]["stride"]
        strided = output.flatten()[::stride][:2048]
        assert relative_error(strided, golden[f"mid.{name}.strided"]) <= tolerance, name


@pytest.mark.parametrize("case", ["tiny_x2", "tiny_x4"])
def test_rrdb_equals_reference_when_tiny(case: str) -> None:
    compare(case, 1e-5)


@pytest.mark.full
@pytest.mark.parametrize("case", ["full_x2plus_24x20", "full_x4plus_24x20"])
def test_rrdb_equals_reference_at_full_size(case: str) -> None:
    compare(case, 1e-4)


def wrapper_case(case: str) -> tuple[RRDBNet, Tensor, Tensor]:
    """The net, the picture that RealESRGANer got and what it gave: RGB (1, 3, H, W), 0 to 255."""
    golden = load_golden("rrdbnet", case)
    net = seeded_rrdb(load_golden(*golden.meta["weights"]["same_as"].split("/")).meta)
    pictures = golden["in.image_rgb_uint8"], golden["out.image_bgr_uint8"].flip(-1)
    x, y = (picture.permute(2, 0, 1)[None].float() for picture in pictures)
    return net, x, y


def test_rrdb_equals_the_official_wrapper() -> None:
    """Its `pre_pad` reflects 10 pixels below and to the right; the result is rounded to 8 bits."""
    net, x, y = wrapper_case("esrganer_notile")
    out = net(F.pad(x / 255, (0, 10, 0, 10), mode="reflect"))[..., : y.shape[-2], : y.shape[-1]]
    assert ((out.clamp(0, 1) * 255).round() - y).abs().max() <= 1


@pytest.mark.parametrize(
    ("case", "piece", "context", "inside"),
    [
        ("esrganer_notile", 256, 16, slice(16, None)),  # pads above and to the left with zeros
        ("esrganer_tile24", 24, 4, slice(16, -16)),  # and all around; tiles of 24 pixels and 4 around
    ],
)
def test_upscaling_equals_the_official_wrapper_away_from_where_it_pads_with_zeros(
    case: str, piece: int, context: int, inside: slice, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, x, y = wrapper_case(case)
    monkeypatch.setattr(upscale, "_PIECE", piece)
    monkeypatch.setattr(upscale, "_CONTEXT", context)
    monkeypatch.setattr(RRDBConfig, "context", context)
    out = upscale.super_resolve(x / 127.5 - 1, (y.shape[-2], y.shape[-1]), "rrdb", net)
    assert (((out + 1) * 127.5).round() - y)[..., inside, inside].abs().max() <= 1


@pytest.mark.parametrize(
    ("config", "manifest"),
    [
        (REALESRGAN_X4PLUS, "rrdbnet_x4plus"),
        (REALESRGAN_X2PLUS, "rrdbnet_x2plus"),
        (REALESRGAN_X4PLUS_ANIME_6B, "rrdbnet_x4plus_anime_6B"),
    ],
)
def test_rrdb_keys_and_shapes_are_those_of_the_official_file(config: RRDBConfig, manifest: str) -> None:
    with torch.device("meta"):
        net = RRDBNet(config)
    assert shapes_of(net) == read_shapes(manifest)


def test_rrdb_built_on_meta_equals_rrdb_built_on_cpu() -> None:
    net = small_net()
    with torch.device("meta"):
        other = RRDBNet(net.config)
    other.load_state_dict(net.state_dict(), strict=True, assign=True)
    x = seeded_input("x", (1, 3, 5, 6), seed=1)
    assert not list(other.buffers())
    assert torch.equal(other.eval()(x), net(x))


@pytest.mark.parametrize(("scale", "size"), [(4, (5, 7)), (4, (1, 1)), (2, (6, 10)), (1, (4, 12))])
def test_rrdb_enlarges_by_its_scale(scale: int, size: tuple[int, int]) -> None:
    y = small_net(scale)(torch.rand(2, 3, *size))
    assert y.shape == (2, 3, scale * size[0], scale * size[1])


@pytest.mark.parametrize(("scale", "size"), [(2, (6, 5)), (1, (6, 8))])
def test_rrdb_refuses_sizes_it_cannot_unshuffle(scale: int, size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="multiples of"):
        small_net(scale)(torch.rand(1, 3, *size))


def test_rrdb_config_refuses_other_scales() -> None:
    with pytest.raises(ValueError, match="scale is 3"):
        RRDBConfig(scale=3)


def test_rrdb_gradient_equals_finite_difference() -> None:
    """The in-place activations must not change what autograd computes."""
    net = small_net().double()
    x = torch.rand(1, 3, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight = net.get_parameter("body.0.rdb1.conv2.weight")
    net(x).square().sum().backward()
    step = torch.zeros_like(weight).index_fill_(0, torch.tensor([1]), 1e-6)
    with torch.no_grad():
        weight += step
        above = net(x).square().sum()
        weight -= 2 * step
        below = net(x).square().sum()
    assert weight.grad is not None
    assert (above - below).item() / 2e-6 == pytest.approx(weight.grad[1].sum().item(), rel=1e-6)


def test_rrdb_file_runs_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(__file__).parents[2] / "nets" / "rrdb.py"
    (tmp_path / "rrdb_alone.py").write_text(source.read_text())
    monkeypatch.syspath_prepend(tmp_path)
    module = __import__("rrdb_alone")
    net = module.RRDBNet(module.RRDBConfig(num_feat=4, num_block=1, num_grow_ch=2))
    assert net(torch.rand(1, 3, 2, 3)).shape == (1, 3, 8, 12)
