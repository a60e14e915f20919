"""ESRGAN and Real-ESRGAN's small net in every form that spandrel reads: read from its state dict, ours
computes what its own net does. And the product takes each, over pieces as over the whole.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from msbd.loading.parts import load_net
from msbd.pixels.upscale import enlarge_by_net
from tests.helpers.goldens import relative_error
from weights.files import WeightsError, write_safetensors

State = dict[str, Tensor]


def net_of(module: str, name: str, **sizes: Any) -> nn.Module:
    """spandrel's own class, with seeded weights of some contrast."""
    spandrel = pytest.importorskip("spandrel")
    torch.manual_seed(4)
    net = getattr(getattr(spandrel.architectures, module), name)(**sizes)
    for parameter in net.parameters():
        if parameter.ndim == 4:
            nn.init.normal_(parameter, std=1.5 / parameter[0].numel() ** 0.5)
    return net.eval().requires_grad_(False)


def esrgan(**sizes: Any) -> nn.Module:
    return net_of("ESRGAN", "ESRGAN", **({"num_filters": 16, "num_blocks": 1} | sizes))


def compact(**sizes: Any) -> nn.Module:
    return net_of("Compact", "Compact", **({"num_feat": 16, "num_conv": 3} | sizes))


def numbers(state: State) -> list[int]:
    """The convolutions outside the blocks of the first layout, but the first."""
    return sorted({int(key.split(".")[1]) for key in state if key.count(".") == 2} - {0})


def renamed(
    state: State, trunk: str, dense: str, after: str, names: Callable[[int], str], high: str
) -> State:
    """The first layout under other names."""
    *ups, last_but_one, last = numbers(state)
    ends = {0: "conv_first", last_but_one: high, last: "conv_last"}
    ends |= {number: names(n) for n, number in enumerate(ups, 1)}
    blocks = 1 + max(int(key.split(".")[3]) for key in state if ".sub." in key and ".RDB" in key)
    out = {}
    for key, tensor in state.items():
        head, number, *rest = key.split(".")
        if rest[0] != "sub":
            out[f"{ends[int(number)]}.{rest[-1]}"] = tensor
        elif int(rest[1]) == blocks:
            out[f"{after}.{rest[-1]}"] = tensor
        else:
            block = rest[2].replace("RDB", dense)
            out[f"{trunk}.{rest[1]}.{block}.{rest[3]}.{rest[-1]}"] = tensor
    return out


def first(state: State) -> State:
    return state


def second(state: State) -> State:
    return renamed(state, "RRDB_trunk", "RDB", "trunk_conv", lambda n: f"upconv{n}", "HRconv")


def today(state: State) -> State:
    return renamed(state, "body", "rdb", "conv_body", lambda n: f"conv_up{n}", "conv_hr")


def wrapped(*path: str) -> Callable[[State], Any]:
    """In tables of these names, as trainers save them."""

    def wrap(state: State) -> Any:
        content: Any = today(state) if "conv" not in next(iter(state)) else state
        for name in path:
            content = {name: content}
        return content

    return wrap


def prefixed(prefix: str) -> Callable[[State], State]:
    return lambda state: {prefix + key: tensor for key, tensor in state.items()}


# Name -> spandrel's net, and how its file is laid out.
VARIANTS: dict[str, tuple[Callable[[], nn.Module], Callable[[State], Any]]] = {
    "x4": (lambda: esrgan(), first),
    "x4, second names": (lambda: esrgan(), second),
    "x4, today's names": (lambda: esrgan(), today),
    "x1": (lambda: esrgan(scale=1), first),
    "x1, second names": (lambda: esrgan(scale=1), second),
    "x1, today's names": (lambda: esrgan(scale=1), today),
    "x2": (lambda: esrgan(scale=2), first),
    "x2, second names": (lambda: esrgan(scale=2), second),
    "x2 by one conv_up": (lambda: esrgan(scale=2), today),
    "x8": (lambda: esrgan(scale=8), first),
    "x8, second names": (lambda: esrgan(scale=8), second),
    "x8, today's names": (lambda: esrgan(scale=8), today),
    "x16": (lambda: esrgan(scale=16), first),
    "x16, today's names": (lambda: esrgan(scale=16), today),
    "unshuffle 2": (lambda: esrgan(in_nc=12, out_nc=3, scale=4, shuffle_factor=2), today),
    "unshuffle 4": (lambda: esrgan(in_nc=48, out_nc=3, scale=4, shuffle_factor=4), today),
    "unshuffle 2, first names": (lambda: esrgan(in_nc=12, out_nc=3, scale=4, shuffle_factor=2), first),
    "x4 of unshuffle 2": (lambda: esrgan(in_nc=12, out_nc=3, scale=8, shuffle_factor=2), today),
    "grey": (lambda: esrgan(in_nc=1, out_nc=1), first),
    "grey, x1": (lambda: esrgan(in_nc=1, out_nc=1, scale=1), first),
    "grey to RGB, x2": (lambda: esrgan(in_nc=1, out_nc=3, scale=2, num_blocks=2), first),
    "RGB to grey": (lambda: esrgan(in_nc=3, out_nc=1), today),
    "with transparency": (lambda: esrgan(in_nc=4, out_nc=4), first),
    "with transparency, x8": (lambda: esrgan(in_nc=4, out_nc=4, scale=8), first),
    "ESRGAN+": (lambda: esrgan(plus=True), first),
    "ESRGAN+, x2, two blocks": (lambda: esrgan(plus=True, scale=2, num_blocks=2), first),
    "six blocks, wider": (lambda: esrgan(num_blocks=6, num_filters=24), today),
    "params_ema": (lambda: esrgan(), wrapped("params_ema")),
    "params": (lambda: esrgan(), wrapped("params")),
    "state_dict in a checkpoint": (lambda: esrgan(), wrapped("state_dict")),
    "module.": (lambda: esrgan(), prefixed("module.")),
    "half": (lambda: esrgan(), lambda state: {key: tensor.half() for key, tensor in state.items()}),
    "small net, x4": (lambda: compact(upscale=4), first),
    "small net, x2": (lambda: compact(upscale=2), first),
    "small net, x1": (lambda: compact(upscale=1), first),
    "small net, grey": (lambda: compact(num_in_ch=1, num_out_ch=1, upscale=4), first),
    "small net, deeper": (lambda: compact(num_conv=16, num_feat=24, upscale=4), first),
    "small net, params": (lambda: compact(upscale=4), lambda state: {"params": state}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_each_variant_is_spandrels_net(name: str, tmp_path: Path) -> None:
    make, lay_out = VARIANTS[name]
    theirs = make()
    torch.save(lay_out(dict(theirs.state_dict())), tmp_path / "net.pth")
    ours = load_net(tmp_path / "net.pth")
    if name == "half":
        ours, theirs = ours.float(), theirs.half().float()
    config = ours.config
    x = torch.rand(1, config.num_in_ch, 12, 8, generator=torch.Generator().manual_seed(1))
    wanted = theirs(x)
    assert wanted.shape[-1] == 8 * config.scale
    assert relative_error(ours(x), wanted) <= 2e-6
    image = torch.rand(1, 3, 20, 24, generator=torch.Generator().manual_seed(2)) * 2 - 1
    made = enlarge_by_net(image, (40, 48), ours)
    assert made.shape == (1, 3, 40, 48) and made.isfinite().all()
    write_safetensors(tmp_path / "again.safetensors", ours.state_dict())
    assert load_net(tmp_path / "again.safetensors").config == config


def test_at_least_28_of_32_variants_of_esrgan() -> None:
    assert sum(not name.startswith("small net") for name in VARIANTS) == 32


@pytest.mark.parametrize("name", ["small net, x4", "small net, x2"])
def test_pieces_of_the_small_net_are_the_whole(name: str, tmp_path: Path) -> None:
    torch.save(VARIANTS[name][0]().state_dict(), tmp_path / "net.pth")
    net = load_net(tmp_path / "net.pth")
    image = torch.rand(1, 3, 40, 52, generator=torch.Generator().manual_seed(3)) * 2 - 1
    size = (40 * net.config.scale, 52 * net.config.scale)
    whole = enlarge_by_net(image, size, net, piece=64)
    torch.testing.assert_close(enlarge_by_net(image, size, net, piece=16), whole, rtol=1e-4, atol=1e-4)


def without(state: State, key: str) -> State:
    return {name: tensor for name, tensor in state.items() if name != key}


HOSTILE: dict[str, tuple[Callable[[], State], str]] = {
    "no last convolution": (lambda: without(today(dict(esrgan().state_dict())), "conv_last.weight"), "'conv_last.weight' is missing"),
    "a doubling left out": (lambda: without(today(dict(esrgan(scale=8).state_dict())), "conv_up2.weight"), "tensors are unknown|tensors are missing"),
    "half of ESRGAN+": (lambda: without(dict(esrgan(plus=True).state_dict()), "model.1.sub.0.RDB2.conv1x1.weight"), "1 tensors are missing"),
    "x32": (lambda: today(dict(esrgan(scale=32).state_dict())), "5 doublings of size; expected scale"),
    "small net, cut": (lambda: without(dict(compact().state_dict()), "body.8.weight"), "has shape \\(16,\\), expected 4 axes"),
    "small net, no activation": (lambda: without(dict(compact().state_dict()), "body.1.weight"), "no family known here"),
    "small net, absurd depth": (lambda: dict(compact().state_dict()) | {"body.9998.weight": torch.ones(48, 16, 3, 3)}, "too few for its layers"),
    "small net, odd spread": (lambda: dict(compact().state_dict()) | {"body.8.weight": torch.ones(47, 16, 3, 3)}, "gives 47 channels"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_none_of_these_is_refused_in_a_line(name: str, tmp_path: Path) -> None:
    make, message = HOSTILE[name]
    torch.save(make(), tmp_path / "net.pth")
    with pytest.raises(WeightsError, match=message) as caught:
        load_net(tmp_path / "net.pth")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
