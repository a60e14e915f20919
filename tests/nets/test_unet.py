"""UNet against stored reference outputs, and what holds for any of its sizes."""

import dataclasses
import gc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nets.unet import SD15_INPAINT_UNET, SD15_UNET, SDXL_UNET, UNet, UNetConfig, timestep_embedding
from tests.helpers.goldens import Golden, load_golden, read_shapes, relative_error
from tests.helpers.seeded_nets import seeded_unet
from tests.helpers.seeded_weights import load_seeded, seeded_input, shapes_of
from tests.helpers.tiny import SMALL_UNET as SMALL

TEXT_TIME = dataclasses.replace(
    SMALL,
    addition_embed_type="text_time",
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=10 + 6 * 8,
)


def small_unet(config: UNetConfig = SMALL) -> UNet:
    unet = UNet(config).eval()
    load_seeded(unet, seed=9)
    return unet


def small_inputs(batch: int = 2, size: tuple[int, int] = (6, 8)) -> tuple[Tensor, Tensor, Tensor]:
    x = seeded_input("x", (batch, 4, *size), seed=1)
    return x, torch.tensor([981, 3])[:batch], seeded_input("context", (batch, 5, 12), seed=1)


def control_of(down: list[Tensor], mid: Tensor) -> Any:
    return SimpleNamespace(down=down, mid=mid)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield
    gc.collect()


def recorder(seen: dict[str, Tensor], name: str) -> Callable[[nn.Module, Any, Any], None]:
    def record(_module: nn.Module, _inputs: Any, output: Any) -> None:
        seen[name] = (
            output[-1] if isinstance(output, list) else output
        )  # a down block gives its list of skips

    return record


def compare(unet: UNet, golden: Golden, tolerance: float) -> None:
    """Output and every stored intermediate."""
    seen: dict[str, Tensor] = {}
    names = [name for name in golden.meta["intermediate"] if name.startswith("mid.")]
    assert len(names) >= 8
    hooks = [
        unet.get_submodule(name.removeprefix("mid.")).register_forward_hook(recorder(seen, name))
        for name in names
    ]
    out = unet(golden["in.x"], golden["in.t"], golden["in.context"])
    for hook in hooks:
        hook.remove()
    for name in names:
        strided = seen[name].flatten()[:: golden.meta["intermediate"][name]["stride"]][:2048]
        assert relative_error(strided, golden[f"{name}.strided"]) <= tolerance, name
    assert relative_error(out, golden["out.eps"]) <= tolerance


@pytest.mark.parametrize("case", ["tiny_a", "tiny_b", "tiny_linear_proj", "tiny_odd_size"])
def test_unet_equals_reference_when_tiny(case: str) -> None:
    golden = load_golden("unet", case)
    compare(seeded_unet(golden.meta), golden, 1e-5)


@pytest.mark.full
def test_unet_equals_reference_at_full_size() -> None:
    """All cases share one set of weights; float64 and bfloat16 come last, as they change it."""
    goldens = [load_golden("unet", case) for case in ("full_16x16_t1", "full_16x16_t981", "full_24x16_t500")]
    unet = seeded_unet(goldens[0].meta)
    for golden in goldens:
        compare(unet, golden, 1e-4)
    x, t, context = (goldens[1][f"in.{name}"] for name in ("x", "t", "context"))
    reference = load_golden("unet", "full_16x16_t981_float64")
    assert relative_error(unet(x, t, context), reference["out.eps_float64"]) <= 2e-5
    gc.collect()
    unet.bfloat16()
    out = unet(x.bfloat16(), t, context.bfloat16())
    # The reference's own bfloat16 run is 0.020 away from float64; another order of sums gives another 0.02.
    assert relative_error(out, reference["out.eps_float64"]) <= 0.04
    assert relative_error(out, reference["out.eps_bfloat16"]) <= 0.04


def test_unet_equals_reference_with_control_residuals() -> None:
    golden = load_golden("unet", "tiny_b")
    unet, shapes = seeded_unet(golden.meta), golden.meta["intermediate"]["residual_shapes"]
    down = [seeded_input(f"tiny_b.res{i}", s, 11, 0.5) for i, s in enumerate(shapes["down"])]
    control = control_of(down, seeded_input("tiny_b.resmid", shapes["mid"], 11, 0.5))
    out = unet(golden["in.x"], golden["in.t"], golden["in.context"], control)
    assert relative_error(out, golden["out.eps_with_residuals"]) <= 1e-5


def test_unet_has_the_reference_epsilons() -> None:
    golden = load_golden("unet", "tiny_eps_sensitive")
    out = seeded_unet(golden.meta)(golden["in.x"], golden["in.t"], golden["in.context"])
    torch.testing.assert_close(out, golden["out.eps"], rtol=0, atol=2e-6)


def test_unet_keys_and_shapes_are_those_of_the_official_file() -> None:
    expected = read_shapes("sd15_unet_diffusers")
    with torch.device("meta"):
        assert shapes_of(UNet(SD15_UNET)) == expected
        inpaint = shapes_of(UNet(SD15_INPAINT_UNET))
    assert inpaint == {**expected, "conv_in.weight": (320, 9, 3, 3)}


def test_unet_config_holds_the_sdxl_and_sd2_shapes() -> None:
    sd2 = dataclasses.replace(
        SD15_UNET, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True
    )
    with torch.device("meta"):
        counts = [sum(p.numel() for p in UNet(config).parameters()) for config in (SDXL_UNET, sd2)]
    assert counts == [2_567_463_684, 865_910_724]  # of the published files


def test_unet_built_on_meta_equals_unet_built_on_cpu() -> None:
    unet = small_unet()
    with torch.device("meta"):
        other = UNet(SMALL)
    other.load_state_dict(unet.state_dict(), strict=True, assign=True)
    assert not list(other.buffers())
    assert torch.equal(other.eval()(*small_inputs()), unet(*small_inputs()))


@pytest.mark.parametrize("size", [(1, 1), (5, 3), (7, 8), (2, 9)])
def test_unet_takes_any_size(size: tuple[int, int]) -> None:
    assert small_unet()(*small_inputs(size=size)).shape == (2, 4, *size)


def test_unet_takes_nine_channels() -> None:
    unet = small_unet(dataclasses.replace(SMALL, in_channels=9))
    x, t, context = small_inputs()
    nine = torch.cat((x, torch.zeros(2, 5, 6, 8)), dim=1)
    other = small_unet()
    other.load_state_dict({**unet.state_dict(), "conv_in.weight": unet.conv_in.weight[:, :4]})
    torch.testing.assert_close(unet(nine, t, context), other(x, t, context))


@pytest.mark.parametrize("t", [981, 981.0, torch.tensor(981), torch.tensor([981.0])])
def test_unet_takes_any_form_of_timestep(t: Any) -> None:
    unet, (x, _, context) = small_unet(), small_inputs()
    assert torch.equal(unet(x, t, context), unet(x, torch.tensor([981, 981]), context))
    assert not torch.allclose(unet(x, t, context), unet(x, 980.5, context))


def test_unet_treats_each_item_of_a_batch_alone() -> None:
    unet, (x, t, context) = small_unet(), small_inputs()
    alone = torch.cat([unet(x[i : i + 1], t[i : i + 1], context[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(unet(x, t, context), alone, rtol=0, atol=1e-5)


def test_unet_returns_bfloat16_for_bfloat16() -> None:
    unet, (x, t, context) = small_unet(), small_inputs()
    exact = unet(x, t, context)
    out = unet.bfloat16()(x.bfloat16(), t, context.bfloat16())
    assert out.dtype == torch.bfloat16
    assert relative_error(out, exact) <= 0.05


def test_unet_zero_control_equals_none() -> None:
    unet, inputs = small_unet(), small_inputs()
    shapes = [(8, 6, 8), (8, 6, 8), (8, 3, 4), (16, 3, 4)]
    zeros = control_of([torch.zeros(2, *shape) for shape in shapes], torch.zeros(2, 16, 3, 4))
    ones = control_of(zeros.down, torch.ones(2, 16, 3, 4))
    assert torch.equal(unet(*inputs, zeros), unet(*inputs))
    assert not torch.allclose(unet(*inputs, ones), unet(*inputs))


def test_unet_refuses_another_nets_control() -> None:
    with pytest.raises(ValueError, match="3 residuals, expected 4"):
        small_unet()(*small_inputs(), control_of([torch.zeros(2, 8, 6, 8)] * 3, torch.zeros(2, 16, 3, 4)))


def test_unet_text_time_embedding_follows_its_inputs() -> None:
    unet, inputs = small_unet(TEXT_TIME), small_inputs()
    text, sizes = seeded_input("text", (2, 10), seed=1), torch.tensor([[64, 48, 0, 0, 64, 48]] * 2)
    out = unet(*inputs, added=(text, sizes))
    assert out.shape == (2, 4, 6, 8)
    assert not torch.allclose(out, unet(*inputs, added=(text, sizes + 1)))
    assert not torch.allclose(out, unet(*inputs, added=(text + 1, sizes)))


@pytest.mark.parametrize("config", [SMALL, TEXT_TIME])
def test_unet_refuses_added_inputs_that_do_not_fit(config: UNetConfig) -> None:
    added = (torch.zeros(2, 10), torch.zeros(2, 6)) if config is SMALL else None
    with pytest.raises(ValueError, match="addition_embed_type"):
        small_unet(config)(*small_inputs(), added=added)


@pytest.mark.parametrize("linear", [False, True])
def test_unet_calls_every_layer_so_that_hooks_and_replaced_layers_count(linear: bool) -> None:
    """As LoRA by replacement (peft), quantised layers and forward hooks need it, projections included."""
    unet = small_unet(dataclasses.replace(SMALL, use_linear_projection=linear))
    layers = {name: m for name, m in unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    called: list[str] = []
    for name, layer in layers.items():
        layer.register_forward_hook(lambda *_, name=name: called.append(name))
    before = unet(*small_inputs())
    assert set(called) == layers.keys()
    for name in layers:
        if name.endswith(("proj_in", "proj_out")):
            unet.set_submodule(name, Doubled(unet.get_submodule(name)))
    after = unet(*small_inputs())
    for name, layer in layers.items():
        if name.endswith(("proj_in", "proj_out")):
            for parameter in layer.parameters():
                parameter.mul_(2)
            unet.set_submodule(name, layer)
    assert relative_error(unet(*small_inputs()), after) <= 1e-5
    assert relative_error(before, after) > 0.01


class Doubled(nn.Module):
    """Stands in for a layer, and knows no `weight`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.layer(x)


@pytest.mark.parametrize("mid", ["UNetMidBlock2D", "UNetMidBlock2DCrossAttn"])
def test_unet_without_attention_ignores_the_context(mid: str) -> None:
    config = dataclasses.replace(
        SMALL, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, mid_block_type=mid
    )
    unet, (x, t, context) = small_unet(config), small_inputs()
    same = torch.equal(unet(x, t, context), unet(x, t, context + 1))
    assert same == (mid == "UNetMidBlock2D")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"down_block_types": ("DownBlock2D",)}, "down_block_types.*expected 2"),
        ({"up_block_types": ("UpBlock2D", "AttnUpBlock2D")}, "up_block_types"),
        ({"mid_block_type": "None"}, "mid_block_type"),
        ({"addition_embed_type": "image"}, "addition_embed_type"),
        ({"norm_num_groups": 16}, "norm_num_groups"),
        ({"attention_head_dim": (2, 3)}, "attention_head_dim"),
    ],
)
def test_unet_config_refuses_what_it_cannot_build(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **changes)


def test_timestep_embedding_is_float32_sinusoids() -> None:
    t = torch.tensor([0, 999], dtype=torch.int64)
    waves = timestep_embedding(t.bfloat16(), 6)
    assert waves.dtype == torch.float32
    assert torch.equal(waves[0], torch.tensor([1.0, 1, 1, 0, 0, 0]))  # cos 0, then sin 0
    angles = 999 * 10000.0 ** (-torch.arange(3, dtype=torch.float64) / 3)
    expected = torch.cat((angles.cos(), angles.sin()))
    torch.testing.assert_close(timestep_embedding(t, 6)[1].double(), expected, rtol=0, atol=2e-4)
    swapped = timestep_embedding(t, 6, flip_sin_to_cos=False, freq_shift=1)[1]
    assert swapped[2].item() == pytest.approx(torch.tensor(0.0999).sin().item(), rel=1e-5)


def test_unet_file_runs_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(__file__).parents[2] / "nets" / "unet.py"
    (tmp_path / "unet_alone.py").write_text(source.read_text())
    monkeypatch.syspath_prepend(tmp_path)
    module = __import__("unet_alone")
    unet = module.UNet(module.UNetConfig(**dataclasses.asdict(SMALL)))
    assert unet(*small_inputs()).shape == (2, 4, 6, 8)
