"""weights/fields.py: what a configuration says is followed, passed over knowingly, or refused by name."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from msbd.loading.nets import fit_net
from nets.asymmetric_vae import AsymmetricAutoencoderKL, AsymmetricVAEConfig
from nets.clip import CLIPTextModel, CLIPVisionModel
from nets.controlnet import ControlNet, ControlNetConfig
from nets.pasd_unet import PASDUNet, PASDUNetConfig
from nets.unet import UNet
from nets.vae import AutoencoderKL, VAEConfig
from tests.helpers.tiny_bundle import UNET, clip_config, write_net_folder
from weights.fields import FREE_FIELDS, KNOWN_FIELDS, ONLY_FIELDS, read_fields
from weights.files import WeightsError, write_safetensors
from weights.hub import Source, find_source

CLIP = clip_config(20)
NETS: dict[str, Any] = {
    "unet": UNet(UNET),
    "pasd_unet": PASDUNet(PASDUNetConfig(**vars(UNET), variant="light")),
    "controlnet": ControlNet(ControlNetConfig(**vars(UNET), conditioning_embedding_out_channels=(4, 4, 8, 8), to_rgb=False)),
    "vae": AutoencoderKL(VAEConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)),
    "asymmetric_vae": AsymmetricAutoencoderKL(
        AsymmetricVAEConfig(down_block_out_channels=(8, 8), layers_per_down_block=1, up_block_out_channels=(8, 8), layers_per_up_block=1,
                            norm_num_groups=4, condition_layers=3)
    ),
    "clip_text": CLIPTextModel(CLIP.text),
    "clip_vision": CLIPVisionModel(CLIP.vision),
}  # fmt: skip
USUAL = {"attention_head_dim": 2, "norm_num_groups": 4, "num_attention_heads": 2, "condition_layers": 3}
NONSENSE: list[Any] = [
    "", "x", "silu ", -1, 0, 1, 2, 7, 10**400, -(10**400), 2**31, 1e-400, 1e308, float("nan"), float("inf"), -0.5, True, False, [], [1], [2, 2],
    [2, 2, 2], [[2], 2], [None], {}, {"a": 1}, [2] * 10_000, "y" * 100_000, [10**400] * 3,
]  # fmt: skip


def states(folder: Path) -> dict[str, Path]:
    places = {}
    for family, net in NETS.items():
        write_net_folder(folder / family, "diffusion_pytorch_model", net.state_dict(), {})
        places[family] = folder / family
    return places


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return states(tmp_path_factory.mktemp("nets"))


def outcome(folder: Path, family: str, config: dict[str, Any]) -> str | None:
    """The one line with which a configuration is refused; None where a net can be made of it."""
    state = NETS[family].state_dict()
    source = replace(
        find_source(folder),
        config={**{name: value for name, value in USUAL.items() if name in FREE_FIELDS[family]}, **config},
    )
    try:
        fit_net(state, source)
    except WeightsError as error:
        said = str(error)
        assert said.startswith(str(source.path)) and "\n" not in said
        return said.removeprefix(f"{source.path}: ")
    return None


@pytest.mark.parametrize("family", NETS)
def test_nonsense_in_any_field_is_refused_in_one_line(folders: dict[str, Path], family: str) -> None:
    for name in {*FREE_FIELDS[family], *ONLY_FIELDS.get(family, {})}:
        accepted = []
        for value in NONSENSE:
            line = outcome(folders[family], family, {name: value})
            if line is None:
                accepted.append(value)
            else:
                assert name in line and len(line) < 300, line
        assert len(accepted) <= 9, (name, accepted)


@pytest.mark.parametrize("family", ["unet", "vae", "asymmetric_vae", "controlnet"])
@pytest.mark.parametrize("value", ["text", 1, 0.5, True, [1], {"a": 1}])
def test_a_field_that_nobody_knows_is_refused_by_name(
    folders: dict[str, Path], family: str, value: Any
) -> None:
    line = outcome(folders[family], family, {"future_field": value})
    assert line is not None and "'future_field'" in line and "not known here; take it out" in line


@pytest.mark.parametrize("family", NETS)
@pytest.mark.parametrize("value", [None, False, "", [], {}])
def test_a_field_that_says_nothing_is_passed_over(folders: dict[str, Path], family: str, value: Any) -> None:
    assert (
        outcome(
            folders[family], family, {"future_field": value, "_class_name": "x", "_diffusers_version": "9"}
        )
        is None
    )
    for name in ONLY_FIELDS.get(family, {}):
        if ONLY_FIELDS[family][name] is not True:
            assert outcome(folders[family], family, {name: value}) is None


def test_pasds_nets_may_have_fields_of_their_own(folders: dict[str, Path], tmp_path: Path) -> None:
    assert outcome(folders["pasd_unet"], "pasd_unet", {"use_pasd": True, "light": "yes"}) is None
    said = outcome(folders["pasd_unet"], "pasd_unet", {"only_cross_attention": True})
    assert said is not None and "only_cross_attention" in said
    heads = ControlNet(replace(NETS["controlnet"].config, to_rgb=True))
    write_net_folder(
        tmp_path,
        "diffusion_pytorch_model",
        heads.state_dict(),
        USUAL | {"return_rgbs": True, "use_rrdb": False, "fg": 1},
    )
    assert fit_net(heads.state_dict(), find_source(tmp_path)).family == "controlnet"


@pytest.mark.parametrize("family", ["unet", "controlnet", "vae"])
def test_the_metadata_are_read_as_strictly_but_may_say_more(family: str, tmp_path: Path) -> None:
    net = NETS[family]
    path = tmp_path / "x.safetensors"

    def read(**more: Any) -> Any:
        write_safetensors(path, net.state_dict(), {"config": json.dumps(asdict(net.config) | more)})
        return fit_net(net.state_dict(), Source(path)).net.config

    assert read(native=32, trained_on="pictures", guidance_scale=3) == net.config
    name, only = next(iter(ONLY_FIELDS[family].items()))
    with pytest.raises(WeightsError, match=f"configured for {name} = .*expected {only}"):
        read(**{name: "something"})
    changed = read(act_fn="gelu")
    assert changed == replace(net.config, act_fn="gelu") and read(**asdict(changed)) == changed


def test_every_field_is_in_one_list_of_a_family() -> None:
    for family, free in FREE_FIELDS.items():
        assert not free.keys() & ONLY_FIELDS.get(family, {}).keys()
        assert {*free, *ONLY_FIELDS.get(family, {})} <= KNOWN_FIELDS


def test_activations_are_read_in_any_case_and_null_is_as_if_it_were_not_there() -> None:
    assert read_fields("unet", {"act_fn": "SiLU", "timestep_post_act": None, "norm_eps": 1e-4}) == {
        "act_fn": "silu",
        "norm_eps": 1e-4,
    }
    with pytest.raises(
        WeightsError, match="act_fn = 'tanh', expected an activation .silu, swish, gelu, mish, relu"
    ):
        read_fields("vae", {"act_fn": "tanh"})


def test_a_config_is_what_the_net_computes_by() -> None:
    """Each field that is followed changes the output."""
    torch.manual_seed(0)
    x, t, context = torch.randn(1, 4, 8, 8), torch.tensor([7]), torch.randn(1, 3, 16)
    state = NETS["unet"].state_dict()

    def run(**fields: Any) -> torch.Tensor:
        net = UNet(replace(UNET, **fields))
        net.load_state_dict(state)
        with torch.no_grad():
            return net(x, t, context)

    changes = {
        "attention_head_dim": 4, "norm_num_groups": 2, "norm_eps": 0.1, "flip_sin_to_cos": False, "freq_shift": 1, "act_fn": "gelu",
        "downsample_padding": 0, "mid_block_scale_factor": 3.0, "center_input_sample": True, "timestep_post_act": "silu",
        "time_embedding_act_fn": "gelu",
    }  # fmt: skip
    assert {*changes, "addition_time_embed_dim"} == set(FREE_FIELDS["unet"])
    plain = run()
    for name, value in changes.items():
        assert not torch.allclose(run(**{name: value}), plain, atol=1e-6), name
