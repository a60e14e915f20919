"""weights/detect.py: a net's own state dict gives back its config; foreign and damaged ones give one line."""

import json
from dataclasses import asdict, is_dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nets.clip import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel
from nets.rrdb import RRDBConfig, RRDBNet
from nets.unet import UNet, UNetConfig
from nets.vae import AutoencoderKL, VAEConfig
from weights.detect import FAMILIES, detect_family, net_config, stored_config
from weights.files import WeightsError

TEXT = CLIPTextConfig(
    vocab_size=600,
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=3,
    eos_token_id=599,
)
VISION = CLIPVisionConfig(
    hidden_size=64,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    image_size=64,
    patch_size=16,
)
TINY_UNET = UNetConfig(
    block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=24, attention_head_dim=4, norm_num_groups=8,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
)  # fmt: skip
DEEP_UNET = UNetConfig(
    in_channels=5, out_channels=8, block_out_channels=(8, 16, 24), layers_per_block=2, cross_attention_dim=12,
    attention_head_dim=(1, 2, 4), transformer_layers_per_block=(1, 2, 3), norm_num_groups=4, use_linear_projection=True,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
)  # fmt: skip
PLAIN_UNET = UNetConfig(
    block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, mid_block_type="UNetMidBlock2D",
    down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
)  # fmt: skip
CASES: dict[str, tuple[str, type[nn.Module], Any]] = {
    "sd15 unet": ("unet", UNet, UNetConfig()),
    "tiny unet": ("unet", UNet, TINY_UNET),
    "deep unet": ("unet", UNet, DEEP_UNET),
    "unet without attention": ("unet", UNet, PLAIN_UNET),
    "sd15 vae": ("vae", AutoencoderKL, VAEConfig()),
    "mini vae": (
        "vae", AutoencoderKL,
        VAEConfig(block_out_channels=(8, 16, 24), layers_per_block=1, latent_channels=3, norm_num_groups=4, scaling_factor=0.5, mid_attention=False),
    ),
    "vit-l/14": ("clip", CLIPModel, CLIPConfig()),
    "tiny clip": ("clip", CLIPModel, CLIPConfig(text=TEXT, vision=VISION, projection_dim=20)),
    "clip text": ("clip_text", CLIPTextModel, TEXT),
    "clip vision": ("clip_vision", CLIPVisionModel, VISION),
    "x4": ("rrdb", RRDBNet, RRDBConfig(num_block=2, num_feat=8, num_grow_ch=4)),
    "x2": ("rrdb", RRDBNet, RRDBConfig(scale=2, num_block=1, num_feat=8, num_grow_ch=4)),
    "x1 grey": ("rrdb", RRDBNet, RRDBConfig(scale=1, num_block=1, num_feat=8, num_in_ch=1, num_out_ch=1)),
}  # fmt: skip


def meta_state(net: type[nn.Module], config: Any) -> dict[str, Tensor]:
    with torch.device("meta"):
        return net(config).state_dict()


def build(template: Any, kwargs: dict[str, Any]) -> Any:
    """The config class of `template` from plain keyword arguments, nested ones included."""
    nested = {
        key: build(getattr(template, key), value) if isinstance(value, dict) else value
        for key, value in kwargs.items()
    }
    return type(template)(**nested)


def metadata(config: Any, **more: Any) -> dict[str, str]:
    return {
        "config": json.dumps(
            (asdict(config) if is_dataclass(config) and not isinstance(config, type) else config) | more
        )
    }


@pytest.mark.parametrize("case", CASES)
def test_shapes_and_metadata_give_back_the_config(case: str) -> None:
    family, net, config = CASES[case]
    found, kwargs = net_config(
        meta_state(net, config), metadata(config, prediction_type="epsilon", native_size=128)
    )
    assert (found, build(config, kwargs)) == (family, config)


@pytest.mark.parametrize("case", ["sd15 unet", "sd15 vae", "vit-l/14", "x4"])
def test_official_sizes_need_no_metadata(case: str) -> None:
    family, net, config = CASES[case]
    found, kwargs = net_config(meta_state(net, config))
    assert (found, build(config, kwargs)) == (family, config)


@pytest.mark.parametrize("case", CASES)
def test_detected_config_builds_a_net_that_loads_strictly(case: str) -> None:
    _, net, config = CASES[case]
    state = meta_state(net, config)
    _, kwargs = net_config(state, metadata(config))
    with torch.device("meta"):
        net(build(config, kwargs)).load_state_dict(state, strict=True, assign=True)


def test_metadata_that_contradicts_the_shapes_is_refused() -> None:
    state = meta_state(UNet, TINY_UNET)
    with pytest.raises(
        WeightsError,
        match=r"^a.safetensors: the metadata says cross_attention_dim = 768, the tensors say 24$",
    ):
        net_config(state, metadata({"cross_attention_dim": 768}), "a.safetensors")
    for same in (1, [1, 1]):
        assert net_config(state, metadata({"transformer_layers_per_block": same}))[0] == "unet"


@pytest.mark.parametrize(
    "config",
    ['{"attention_head_dim": 0}', '{"attention_head_dim": [4, "x"]}', '{"norm_eps": "1"}', '{"norm_num_groups": true}',
     '{"norm_eps": NaN}', '{"block_out_channels": [{}, {}]}', "[]", "{", "[" * 100_000],
)  # fmt: skip
def test_hostile_metadata_gives_one_line(config: str) -> None:
    with pytest.raises(WeightsError) as caught:
        net_config(meta_state(UNet, TINY_UNET), {"config": config}, "a.safetensors")
    assert "\n" not in str(caught.value) and str(caught.value).startswith("a.safetensors: ")


def test_stored_config_keeps_what_is_not_the_nets() -> None:
    assert stored_config({"config": '{"betas": [0.1, 0.2], "prediction_type": "epsilon"}'}) == {
        "betas": (0.1, 0.2),
        "prediction_type": "epsilon",
    }
    assert stored_config({}) == stored_config(None) == {}


def keys(*names: str, **shaped: tuple[int, ...]) -> dict[str, Tensor]:
    return {name: torch.empty(1, device="meta") for name in names} | {
        name: torch.empty(shape, device="meta") for name, shape in shaped.items()
    }


SD_1 = keys(
    "model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.encoder.conv_in.weight", "betas"
)
FOREIGN = {
    "single file": (SD_1, "Stable Diffusion 1.x single file"),
    "SD 2 single file": (SD_1 | keys("cond_stage_model.model.ln_final.weight"), "2.x single file"),
    "SDXL single file": (SD_1 | keys("conditioner.embedders.0.transformer.x"), "SDXL single file"),
    "SD 3": (keys("model.diffusion_model.joint_blocks.0.x"), "Stable Diffusion 3"),
    "inpainting single file": (SD_1 | {"model.diffusion_model.input_blocks.0.0.weight": torch.empty(320, 9, 3, 3, device="meta")}, "9-channel"),
    "inpainting U-Net": (meta_state(UNet, UNetConfig(in_channels=9)), "9-channel"),
    "SD 2 U-Net": (meta_state(UNet, UNetConfig(cross_attention_dim=1024, use_linear_projection=True)), "2.x U-Net"),
    "SDXL U-Net": (meta_state(UNet, UNetConfig(addition_embed_type="text_time")), "SDXL U-Net"),
    "LoRA": (keys("lora_unet_down_blocks_0.alpha"), "LoRA"),
    "peft LoRA": (keys("unet.down_blocks.0.to_q.lora_A.weight"), "LoRA"),
    "ControlNet": (meta_state(UNet, TINY_UNET) | keys("controlnet_down_blocks.0.weight"), "ControlNet"),
    "PASD": (meta_state(UNet, TINY_UNET) | keys("up_blocks.0.pixel_attentions.0.norm.weight"), "PASD"),
    "old VAE": (meta_state(AutoencoderKL, VAEConfig()) | keys("encoder.mid_block.attentions.0.query.weight"), "old diffusers"),
    "old ESRGAN": (keys("conv_first.weight", "RRDB_trunk.0.RDB1.conv1.weight"), "ESRGAN"),
    "OpenAI CLIP": (keys("visual.transformer.resblocks.0.ln_1.weight"), "OpenAI's layout"),
    "something else": (keys("layer.weight"), "no family known here .1 keys, first 'layer.weight'"),
    "nothing": ({}, "no family known here .0 keys"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_families_are_named_in_one_line(case: str) -> None:
    state, message = FOREIGN[case]
    with pytest.raises(WeightsError, match=f"^x.ckpt: .*{message}") as caught:
        detect_family(state, "x.ckpt")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250


@pytest.mark.parametrize("case", ["tiny unet", "mini vae", "tiny clip", "clip vision", "x4"])
def test_incomplete_or_misshapen_states_raise_nothing_else(case: str) -> None:
    _, net, config = CASES[case]
    state = meta_state(net, config)
    for key in state:
        for damaged in (
            {k: v for k, v in state.items() if k != key},
            state | keys(**{key: (0,)}),
            state | keys(**{key: (7, 11, 2, 2)}),
        ):
            try:
                family, _ = net_config(damaged, metadata(config))
                assert family in FAMILIES
            except WeightsError as error:
                assert "\n" not in str(error)
