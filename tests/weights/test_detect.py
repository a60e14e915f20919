"""weights/detect.py: a net's own state dict gives back its config; foreign and damaged ones give one line."""

import json
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nets.asymmetric_vae import ASYMMETRIC_VAE_X_2, AsymmetricAutoencoderKL, AsymmetricVAEConfig
from nets.clip import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel
from nets.controlnet import PASD_CONTROLNET, PASD_RRDB_CONTROLNET, ControlNet, ControlNetConfig
from nets.pasd_unet import PASD_LIGHT_UNET, PASD_UNET, PASDUNet, PASDUNetConfig
from nets.rrdb import RRDBConfig, RRDBNet
from nets.unet import SDXL_UNET, UNet, UNetConfig
from nets.vae import AutoencoderKL, VAEConfig
from weights.detect import FAMILIES, FOREIGN, detect_family, net_config, stored_config
from weights.fields import FREE_FIELDS
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
TINY_CONTROLNET = ControlNetConfig(
    **vars(replace(TINY_UNET, up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))),
    conditioning_channels=1, conditioning_embedding_out_channels=(4, 8, 12),
)  # fmt: skip


def tiny_pasd(variant: str, unet: UNetConfig = TINY_UNET) -> PASDUNetConfig:
    return PASDUNetConfig(**vars(unet), variant=variant)


CASES: dict[str, tuple[str, type[nn.Module], Any]] = {
    "sd15 unet": ("unet", UNet, UNetConfig()),
    "tiny unet": ("unet", UNet, TINY_UNET),
    "deep unet": ("unet", UNet, DEEP_UNET),
    "unet without attention": ("unet", UNet, PLAIN_UNET),
    "pasd": ("pasd_unet", PASDUNet, PASD_UNET),
    "pasd light": ("pasd_unet", PASDUNet, PASD_LIGHT_UNET),
    "tiny pasd full": ("pasd_unet", PASDUNet, tiny_pasd("full")),
    "tiny pasd light": ("pasd_unet", PASDUNet, tiny_pasd("light")),
    "tiny pasd eq2": ("pasd_unet", PASDUNet, tiny_pasd("eq2")),
    "tiny pasd full, deep": ("pasd_unet", PASDUNet, tiny_pasd("full", DEEP_UNET)),
    "controlnet": ("controlnet", ControlNet, PASD_CONTROLNET),
    "controlnet rrdb": ("controlnet", ControlNet, PASD_RRDB_CONTROLNET),
    "tiny controlnet": ("controlnet", ControlNet, TINY_CONTROLNET),
    "tiny controlnet rrdb": ("controlnet", ControlNet, replace(TINY_CONTROLNET, use_rrdb=True)),
    "tiny controlnet, no heads": ("controlnet", ControlNet, replace(TINY_CONTROLNET, to_rgb=False)),
    "sd15 vae": ("vae", AutoencoderKL, VAEConfig()),
    "mini vae": (
        "vae", AutoencoderKL,
        VAEConfig(block_out_channels=(8, 16, 24), layers_per_block=1, latent_channels=3, norm_num_groups=4, scaling_factor=0.5, mid_attention=False),
    ),
    "asymmetric x-1-5": ("asymmetric_vae", AsymmetricAutoencoderKL, AsymmetricVAEConfig()),
    "asymmetric x-2": ("asymmetric_vae", AsymmetricAutoencoderKL, ASYMMETRIC_VAE_X_2),
    "tiny asymmetric": (
        "asymmetric_vae", AsymmetricAutoencoderKL,
        AsymmetricVAEConfig(
            down_block_out_channels=(8, 8, 16, 16), layers_per_down_block=1, up_block_out_channels=(8, 16, 24, 24), layers_per_up_block=2,
            latent_channels=3, norm_num_groups=4, scaling_factor=0.5, mid_attention=False, condition_layers=3,
        ),
    ),
    "vit-l/14": ("clip", CLIPModel, CLIPConfig()),
    "tiny clip": ("clip", CLIPModel, CLIPConfig(text=TEXT, vision=VISION, projection_dim=20)),
    "clip text": ("clip_text", CLIPTextModel, TEXT),
    "clip vision": ("clip_vision", CLIPVisionModel, VISION),
    "x4": ("rrdb", RRDBNet, RRDBConfig(num_block=2, num_feat=8, num_grow_ch=4)),
    "x2": ("rrdb", RRDBNet, RRDBConfig(scale=2, num_block=1, num_feat=8, num_grow_ch=4)),
    "x1 grey": ("rrdb", RRDBNet, RRDBConfig(scale=1, num_block=1, num_feat=8, num_in_ch=1, num_out_ch=1)),
}  # fmt: skip


@cache  # building a full-size net takes tenths of a second, and no test changes what it gets
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


OFFICIAL = ["sd15 unet", "sd15 vae", "asymmetric x-1-5", "asymmetric x-2", "vit-l/14", "x4", "pasd", "pasd light", "controlnet",
            "controlnet rrdb"]  # fmt: skip


@pytest.mark.parametrize("case", OFFICIAL)
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


# ---- config.json beside the file ---------------------------------------------------------------------------


def free_fields(config: Any, family: str) -> dict[str, Any]:
    """What a config.json of this net has to say; the rest its tensors say."""
    if family == "clip":
        halves = {
            f"{half}_config": free_fields(getattr(config, half), f"clip_{half}")
            for half in ("text", "vision")
        }
        return halves | {"projection_dim": 5, "text_config_dict": None}
    return {name: getattr(config, name) for name in FREE_FIELDS[family]}


LIES: Mapping[str, Any] = {
    "_class_name": "UNet2DConditionModel", "in_channels": 9, "out_channels": 1, "block_out_channels": [320], "layers_per_block": 7,
    "cross_attention_dim": 1280, "down_block_types": ["AttnDownBlock2D"], "up_block_types": None, "use_linear_projection": "yes",
    "latent_channels": 16, "hidden_size": 3, "num_hidden_layers": 99, "vocab_size": 1, "transformer_layers_per_block": [1, 2, 10],
    "addition_embed_type": "text_time", "num_feat": 1, "variant": "none", "use_rrdb": "perhaps", "sample_size": 64,
}  # fmt: skip


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith(("sd15", "vit"))])
def test_a_config_json_fills_in_what_shapes_leave_open_and_its_sizes_are_not_followed(case: str) -> None:
    family, net, config = CASES[case]
    state, beside = meta_state(net, config), {**LIES, **free_fields(config, family)}
    found, kwargs = net_config(state, None, "x", json.loads(json.dumps(beside)))
    assert (found, build(config, kwargs)) == (family, config)
    assert net_config(state, None, "x", {}) == net_config(
        state, None, "x", dict.fromkeys(FREE_FIELDS[family])
    )


def test_the_metadata_go_before_the_config_json() -> None:
    state = meta_state(UNet, TINY_UNET)
    _, kwargs = net_config(state, metadata({"norm_eps": 1e-3}), "x", {"norm_eps": 1e-4, "norm_num_groups": 2})
    assert (kwargs["norm_eps"], kwargs["norm_num_groups"]) == (1e-3, 2)


@pytest.mark.parametrize(
    "free",
    [
        {"attention_head_dim": 0},
        {"norm_eps": {}},
        {"norm_eps": [[1]]},
        {"freq_shift": 10.5},
        {"norm_eps": [1e-5, 1e-5]},
        {"flip_sin_to_cos": []},
        {"attention_head_dim": [4, [4]]},
        {"attention_head_dim": [4.0, 4]},
    ],
)
def test_a_config_json_with_impossible_values_gives_one_line(free: dict[str, Any]) -> None:
    with pytest.raises(WeightsError, match=f"^x: .*{next(iter(free))} = .*, expected a") as caught:
        net_config(meta_state(UNet, TINY_UNET), None, "x", free)
    assert "\n" not in str(caught.value)


# ---- models that nothing here runs -------------------------------------------------------------------------

U, V = "model.diffusion_model.", "first_stage_model."
REFUSED = {
    "SD 2 single file": (keys(f"{U}out.2.bias", "cond_stage_model.model.ln_final.weight"), "2.x single file"),
    "SDXL single file": (keys(f"{U}out.2.bias", "conditioner.embedders.0.transformer.x"), "SDXL single file"),
    "SDXL U-Net, LDM": (keys(f"{U}label_emb.0.0.weight"), "SDXL single file"),
    "SD 3": (keys(f"{U}joint_blocks.0.x_block.attn.qkv.weight"), "Stable Diffusion 3"),
    "FLUX": (keys("double_blocks.0.img_attn.norm.key_norm.scale"), "FLUX"),
    "SD 2 U-Net": (meta_state(UNet, UNetConfig(cross_attention_dim=1024, use_linear_projection=True)), "Stable Diffusion 2.x"),
    "SD 2 U-Net, LDM": (keys(**{f"{U}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024)}), "Stable Diffusion 2.x"),
    "SDXL U-Net": (meta_state(UNet, SDXL_UNET), "SDXL U-Net"),
    "SDXL U-Net without its embedding": (meta_state(UNet, replace(SDXL_UNET, addition_embed_type=None)), "U-Net of SDXL"),
    "AnimateDiff": (keys("down_blocks.0.motion_modules.0.temporal_transformer.norm.weight"), "AnimateDiff"),
    "OpenAI CLIP": (keys("visual.transformer.resblocks.0.ln_1.weight"), "OpenAI's layout"),
    "OpenAI CLIP text": (keys("transformer.resblocks.0.ln_1.weight"), "OpenAI's layout"),
    "embedding": (keys("emb_params"), "textual inversion"),
    "old embedding": (keys("string_to_param", "string_to_token"), "textual inversion"),
    "Asymmetric VQGAN": (keys("encoder.conv_in.weight", "decoder.encoder.layers.0.weight"), "Asymmetric VQGAN in its authors' layout"),
    "VQ autoencoder": (keys("encoder.conv_in.weight", "quantize.embedding.weight"), "VQ autoencoder"),
    "LDM names": (keys(f"{U}input_blocks.0.0.weight", f"{V}encoder.conv_in.weight", "betas"), "no family known here .3 keys"),
    "LoRA": (keys("lora_unet_down_blocks_0.alpha"), "no family known here"),
    "old ESRGAN": (keys("conv_first.weight", "RRDB_trunk.0.RDB1.conv1.weight"), "no family known here"),
    "something else": (keys("layer.weight"), "no family known here .1 keys, first 'layer.weight'"),
    "nothing": ({}, "no family known here .0 keys"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_foreign_families_are_named_in_one_line(case: str) -> None:
    state, message = REFUSED[case]
    with pytest.raises(WeightsError, match=f"^x.ckpt: .*{message}") as caught:
        detect_family(state, "x.ckpt")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250


@pytest.mark.parametrize(("mark", "what"), FOREIGN)
def test_every_foreign_mark_is_found_at_the_beginning_of_a_key(mark: str, what: str) -> None:
    state = keys("a.weight", f"{mark.removeprefix(chr(10))}0.weight", "z.weight")
    with pytest.raises(WeightsError) as caught:
        detect_family(state, "x.ckpt")
    assert str(caught.value) == f"x.ckpt: {what}"


@pytest.mark.parametrize("case", CASES)
def test_none_of_ours_is_taken_for_a_foreign_one(case: str) -> None:
    family, net, config = CASES[case]
    for prefix in ("", "x."):  # whatever stands before the keys
        state = {prefix + key: tensor for key, tensor in meta_state(net, config).items()}
        if not prefix:
            assert detect_family(state) == family
        else:
            with pytest.raises(WeightsError, match="no family known here"):
                detect_family(state)


def test_a_plain_unet_with_pasds_residuals_is_a_plain_unet() -> None:
    assert detect_family(meta_state(PASDUNet, tiny_pasd("none"))) == "unet"


# ---- damage ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    ["tiny unet", "mini vae", "tiny asymmetric", "tiny clip", "clip vision", "x4", "tiny pasd full", "tiny pasd light", "tiny controlnet"],
)  # fmt: skip
def test_incomplete_or_misshapen_states_raise_nothing_else(case: str) -> None:
    _, net, config = CASES[case]
    state = meta_state(net, config)
    for key in state:
        for damaged in (
            {k: v for k, v in state.items() if k != key},
            state | keys(**{key: (0,)}),
            state | keys(**{key: ()}),
            state | keys(**{key: (7, 11, 2, 2)}),
        ):
            try:
                family, _ = net_config(damaged, metadata(config))
                assert family in (*FAMILIES, "pasd_unet")
            except WeightsError as error:
                assert "\n" not in str(error)


def test_made_up_sizes_are_refused_before_a_net_is_built() -> None:
    """300 levels of 300 layers would be gigabytes, on the meta device too."""
    unet, vae = meta_state(UNet, TINY_UNET), meta_state(AutoencoderKL, CASES["mini vae"][2])
    width = torch.empty(16, 16, 3, 3, device="meta")
    seeing = meta_state(AsymmetricAutoencoderKL, CASES["tiny asymmetric"][2])
    places = (
        (unet, "down_blocks"),
        (vae, "encoder.down_blocks"),
        (seeing, "encoder.down_blocks"),
        (seeing, "decoder.up_blocks"),
    )
    for state, place in places:
        claimed = [f"{place}.{i}.resnets.0" for i in range(300)] + [
            f"{place}.0.resnets.{i}" for i in range(300)
        ]
        with pytest.raises(WeightsError, match=r"^x: \d+ tensors, too few for its layers"):
            net_config(state | {f"{path}.conv1.weight": width for path in claimed}, None, "x")
    deep = {f"down_blocks.1.attentions.0.transformer_blocks.{i}.norm1.weight": width for i in range(300)}
    with pytest.raises(WeightsError, match=r"^x: \d+ tensors, too few for its layers"):
        net_config(unet | deep, None, "x")
