"""ControlNet against stored reference outputs, and what holds for any of its sizes."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from nets.controlnet import (
    PASD_CONTROLNET,
    PASD_RRDB_CONTROLNET,
    ControlNet,
    ControlNetConfig,
    start_from_unet,
)
from nets.unet import SDXL_UNET, UNet
from tests.helpers.goldens import load_golden, read_shapes, relative_error
from tests.helpers.seeded_nets import seeded_controlnet
from tests.helpers.seeded_weights import load_seeded, seeded_input, shapes_of
from tests.helpers.tiny import SMALL_UNET

SMALL = ControlNetConfig(
    **dataclasses.asdict(SMALL_UNET), conditioning_embedding_out_channels=(4, 6, 8, 10), use_rrdb=True
)


def small_net(config: ControlNetConfig = SMALL) -> ControlNet:
    net = ControlNet(config)
    load_seeded(net, seed=3)
    return net.eval().requires_grad_(False)


def small_inputs(size: tuple[int, int] = (6, 8)) -> tuple[Tensor, Tensor, Tensor]:
    x = seeded_input("x", (2, 4, *size), seed=1)
    return x, torch.tensor([981, 3]), seeded_input("context", (2, 5, 12), seed=1)


def picture(height: int = 48, width: int = 64) -> Tensor:
    return seeded_input("image", (2, 3, height, width), seed=1).sigmoid()


def total(net: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


@pytest.mark.parametrize("case", ["tiny_a", "tiny_rrdb"])
@pytest.mark.parametrize("family", ["pasd", "pasd_light"])
def test_controlnet_equals_reference_when_tiny(family: str, case: str) -> None:
    golden = load_golden(family, case)
    net = seeded_controlnet(golden.meta)
    x, t, context, image = (golden[f"in.{name}"] for name in ("x", "t", "context", "cond"))
    control = net(x, t, context, image)
    found = {"cond_embedding": net.embed(image), "mid": control.mid}
    found |= {f"down{i}": residual for i, residual in enumerate(control.down)}
    assert len(found) == 14
    for name, tensor in found.items():
        strided = tensor.flatten()[:: golden.meta["intermediate"][name]["stride"]][:2048]
        assert relative_error(strided, golden[f"mid.{name}.strided"]) <= 1e-5, name
    assert len(control.to_rgbs) == 3
    for i, rgb in enumerate(control.to_rgbs):
        assert relative_error(rgb, golden[f"out.rgb{i}"]) <= 1e-5, i


@pytest.mark.parametrize(
    ("config", "manifest", "values"),
    [
        (PASD_CONTROLNET, "pasd_controlnet", 361_289_497),
        (PASD_RRDB_CONTROLNET, "pasd_rrdb_controlnet", 361_497_337),
    ],
)
def test_controlnet_keys_and_shapes_are_those_of_the_official_file(
    config: ControlNetConfig, manifest: str, values: int
) -> None:
    expected = read_shapes(manifest)
    with torch.device("meta"):
        net, headless = ControlNet(config), ControlNet(dataclasses.replace(config, to_rgb=False))
    assert shapes_of(net) == expected
    assert total(net) == values
    assert shapes_of(headless) == {key: s for key, s in expected.items() if ".to_rgbs." not in key}


def test_controlnet_config_holds_the_sdxl_shape() -> None:
    with torch.device("meta"):
        net = ControlNet(ControlNetConfig(**dataclasses.asdict(SDXL_UNET)))
    assert total(net) == 1_251_024_537


def test_controlnet_built_on_meta_equals_controlnet_built_on_cpu() -> None:
    net = small_net()
    with torch.device("meta"):
        other = ControlNet(SMALL)
    other.load_state_dict(net.state_dict(), strict=True, assign=True)
    other.requires_grad_(False)  # as `net` is: see tests/helpers/rounding.py
    assert not list(other.buffers())
    assert torch.equal(other(*small_inputs(), picture()).mid, net(*small_inputs(), picture()).mid)


def test_controlnet_gives_a_residual_of_the_size_of_each_skip() -> None:
    unet, net, (x, t, context) = UNet(SMALL_UNET), small_net(), small_inputs((13, 9))
    with torch.no_grad():
        skips, mid = unet.encode(unet.conv_in(x), unet.embed_time(x, t), context)
    control = net(x, t, context, picture(13 * 8, 9 * 8))
    assert [r.shape for r in control.down] == [skip.shape for skip in skips]
    assert control.mid.shape == mid.shape
    assert [rgb.shape[1:] for rgb in control.to_rgbs] == [(3, 52, 36), (3, 26, 18), (3, 13, 9)]


@pytest.mark.parametrize(("size", "cells"), [((1, 1), (1, 1)), ((97, 65), (13, 9)), ((104, 72), (13, 9))])
def test_controlnet_embeds_pictures_of_any_size(size: tuple[int, int], cells: tuple[int, int]) -> None:
    assert small_net().embed(picture(*size)).shape == (2, 8, *cells)


def test_controlnet_hint_equals_its_picture() -> None:
    net, inputs = small_net(), small_inputs()
    one, other = net(*inputs, picture()), net(*inputs, hint=net.embed(picture()))
    assert all(map(torch.equal, (*one.down, one.mid), (*other.down, other.mid)))
    assert len(one.to_rgbs) == 3 and other.to_rgbs == ()
    assert not torch.equal(net(*inputs, picture() * 0.5).mid, one.mid)


def test_controlnet_without_heads_gives_the_same_residuals() -> None:
    net, headless = small_net(), small_net(dataclasses.replace(SMALL, to_rgb=False))
    one, other = net(*small_inputs(), picture()), headless(*small_inputs(), picture())
    assert torch.equal(one.mid, other.mid) and other.to_rgbs == ()


def test_controlnet_scale_multiplies_every_residual() -> None:
    net, inputs = small_net(), (*small_inputs(), picture())
    whole, half, zero = (net(*inputs, scale) for scale in (1.0, 0.5, 0.0))
    assert all(map(torch.equal, (0.5 * r for r in (*whole.down, whole.mid)), (*half.down, half.mid)))
    assert not any(r.any() for r in (*zero.down, zero.mid))
    assert all(map(torch.equal, whole.to_rgbs, zero.to_rgbs))


def test_controlnet_starts_at_zero() -> None:
    net = ControlNet(SMALL)
    control = net(*small_inputs(), picture())
    assert not net.embed(picture()).any()
    assert not any(r.any() for r in (*control.down, control.mid))
    assert all(rgb.any() for rgb in control.to_rgbs)


def test_controlnet_takes_the_text_time_embedding() -> None:
    config = dataclasses.replace(
        SMALL,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=10 + 6 * 8,
    )
    net, added = small_net(config), (torch.ones(2, 10), torch.ones(2, 6))
    one = net(*small_inputs(), picture(), added=added)
    assert not torch.equal(one.mid, net(*small_inputs(), picture(), added=(added[0] + 1, added[1])).mid)


def test_controlnet_returns_bfloat16_for_bfloat16() -> None:
    net, (x, t, context) = small_net(), small_inputs()
    exact = net(x, t, context, picture())
    out = net.bfloat16()(x.bfloat16(), t, context.bfloat16(), picture().bfloat16())
    assert all(tensor.dtype == torch.bfloat16 for tensor in (*out.down, out.mid, *out.to_rgbs))
    assert relative_error(out.mid, exact.mid) <= 0.05


def test_controlnet_gradients_reach_every_parameter() -> None:
    net = small_net().requires_grad_(True)
    control = net(*small_inputs(), picture())
    torch.stack([r.square().mean() for r in (*control.down, control.mid, *control.to_rgbs)]).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in net.parameters())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "neither of `image` and `hint`"),
        ({"image": torch.zeros(2, 3, 48, 64), "hint": torch.zeros(2, 8, 6, 8)}, "both of `image` and `hint`"),
        ({"image": torch.zeros(2, 3, 48, 72)}, r"hint is \(6, 9\), the latent is \(6, 8\)"),
        ({"hint": torch.zeros(2, 8, 12, 8)}, r"hint is \(12, 8\), the latent is \(6, 8\)"),
    ],
)
def test_controlnet_refuses_a_picture_that_does_not_fit(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_net()(*small_inputs(), **given)


def test_start_from_unet_copies_the_way_down_and_the_middle() -> None:
    unet, net, (x, t, context) = UNet(SMALL_UNET), small_net(), small_inputs()
    unet.requires_grad_(False)  # as `net` is: see tests/helpers/rounding.py
    before = net.state_dict()
    state = start_from_unet(before, unet.state_dict())
    net.load_state_dict(state, strict=True, assign=True)
    temb = unet.embed_time(x, t)
    for mine, own in zip(
        net.encode(net.conv_in(x), temb, context)[0],
        unet.encode(unet.conv_in(x), temb, context)[0],
        strict=True,
    ):
        assert torch.equal(mine, own)
    assert torch.equal(net.embed_time(x, t), temb)
    assert all(state[key] is before[key] for key in state if key.startswith("controlnet_"))
    state["conv_in.weight"].zero_()
    assert unet.conv_in.weight.any()  # a copy: training the one leaves the other alone


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_channels": 9}, r"conv_in.weight is \(8, 9, 3, 3\) in the U-Net, expected \(8, 4, 3, 3\)"),
        ({"mid_block_type": "UNetMidBlock2D"}, "mid_block.attentions.0.norm.weight is missing in the U-Net"),
    ],
)
def test_start_from_unet_refuses_another_shape(changes: dict[str, Any], message: str) -> None:
    unet = UNet(dataclasses.replace(SMALL_UNET, **changes))
    with pytest.raises(ValueError, match=message):
        start_from_unet(ControlNet(SMALL).state_dict(), unet.state_dict())
