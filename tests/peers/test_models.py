"""Every field of the peers' configurations: of each net that diffusers builds by it, ours is equal or the
file is refused in one line that names the field. Nothing in between.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from msbd.latents import decode, encode
from msbd.loading.parts import load_net
from nets import unet as unet_net
from nets import vae as vae_net
from nets.unet import Timestep, UNetConfig, timestep_embedding
from nets.vae import VAEConfig
from tests.helpers.goldens import relative_error
from tests.helpers.seeded_weights import load_seeded, seeded_input
from tests.helpers.tiny_bundle import write_net_folder
from weights.fields import FREE_FIELDS, KNOWN_FIELDS, ONLY_FIELDS
from weights.files import WeightsError

diffusers = pytest.importorskip("diffusers")

UNET: dict[str, Any] = {
    "block_out_channels": (4, 8), "norm_num_groups": 4, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": 8, "attention_head_dim": 2, "layers_per_block": 1,
    "sample_size": 16,
}  # fmt: skip
WIDE = {"block_out_channels": (16, 32), "attention_head_dim": (8, 16)}
# Eight heads at a level of four channels without attention: the U-Net of diffusers' fast pipeline tests.
FAST = {
    "block_out_channels": (4, 8), "norm_num_groups": 2, "layers_per_block": 1, "attention_head_dim": 8, "cross_attention_dim": 32,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "time_cond_proj_dim": None,
}  # fmt: skip
EQUAL: dict[str, dict[str, Any]] = {
    "plain": {},
    "heads per level": WIDE,
    "eight heads where there is attention": FAST,
    "linear projections": {"use_linear_projection": True},
    "context width per level": {"cross_attention_dim": (8, 8)},
    "depth per level": {"transformer_layers_per_block": (2, 1)},
    "two layers": {"layers_per_block": 2},
    "no attention in the middle": {"mid_block_type": "UNetMidBlock2D"},
    "sines first": {"flip_sin_to_cos": False},
    "frequencies less one": {"freq_shift": 1},
    "groups": {"norm_num_groups": 2},
    "norm_eps": {"norm_eps": 1e-3},
    "attention upcast": {"upcast_attention": True},
    "dropout, which is of training": {"dropout": 0.5},
    "out_channels": {"out_channels": 4, "in_channels": 4},
    "act_fn swish": {"act_fn": "swish"},
    "act_fn SiLU": {"act_fn": "SiLU"},
    "act_fn gelu": {"act_fn": "gelu"},
    "act_fn mish": {"act_fn": "mish"},
    "act_fn relu": {"act_fn": "relu"},
    "center_input_sample": {"center_input_sample": True},
    "mid_block_scale_factor": {"mid_block_scale_factor": 1.7},
    "mid_block_scale_factor, no attention": {"mid_block_scale_factor": 0.6, "mid_block_type": "UNetMidBlock2D"},
    "downsample_padding": {"downsample_padding": 0},
    "timestep_post_act": {"timestep_post_act": "silu"},
    "timestep_post_act and act_fn": {"timestep_post_act": "gelu", "act_fn": "mish"},
    "time_embedding_act_fn": {"time_embedding_act_fn": "silu"},
    "time_embedding_dim as it is": {"time_embedding_dim": 16},
    "all at once": {
        "act_fn": "gelu", "center_input_sample": True, "mid_block_scale_factor": 2, "downsample_padding": 0, "timestep_post_act": "mish",
        "time_embedding_act_fn": "relu", "norm_eps": 1e-4,
    },
}  # fmt: skip
# What is built, and what the refusal names.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "only_cross_attention": ({"only_cross_attention": True}, "only_cross_attention"),
    "only_cross_attention of equal widths": ({"only_cross_attention": True, "cross_attention_dim": 4}, "only_cross_attention"),
    "only_cross_attention per level": ({"only_cross_attention": (True, False), "cross_attention_dim": 4}, "only_cross_attention"),
    "dual_cross_attention": ({"dual_cross_attention": True}, "dual_cross_attention"),
    "class_embed_type timestep": ({"class_embed_type": "timestep"}, "class_embed_type"),
    "class_embed_type identity": ({"class_embed_type": "identity"}, "class_embed_type"),
    "class_embed_type projection": ({"class_embed_type": "projection", "projection_class_embeddings_input_dim": 6}, "class_embed_type"),
    "simple_projection": ({"class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": 6}, "class_embed_type"),
    "class_embeddings_concat": (
        {"class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": 6, "class_embeddings_concat": True}, "class_embed",
    ),
    "num_class_embeds": ({"num_class_embeds": 5}, "num_class_embeds"),
    "encoder_hid_dim": ({"encoder_hid_dim": 5, "encoder_hid_dim_type": "text_proj"}, "encoder_hid_dim"),
    "scale_shift": ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift"),
    "fourier": ({"time_embedding_type": "fourier"}, "time_embedding_type"),
    "time_embedding_dim": ({"time_embedding_dim": 24}, "time_emb_proj"),
    "conv_in_kernel": ({"conv_in_kernel": 1}, "conv_in_kernel"),
    "conv_out_kernel": ({"conv_out_kernel": 5}, "conv_out_kernel"),
    "addition_embed_type text": ({"addition_embed_type": "text", "addition_embed_type_num_heads": 2}, "add_embedding"),
    "addition_embed_type text_time": (
        {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 32}, "SDXL",
    ),
    "attention_type gated": ({"attention_type": "gated", **WIDE}, "GLIGEN"),
    "cross_attention_norm": (
        {"cross_attention_norm": "layer_norm", "down_block_types": ("SimpleCrossAttnDownBlock2D", "DownBlock2D"),
         "up_block_types": ("UpBlock2D", "SimpleCrossAttnUpBlock2D"), "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
         "cross_attention_dim": 8}, "added keys",
    ),
    "simple cross attention": (
        {"down_block_types": ("SimpleCrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "SimpleCrossAttnUpBlock2D"),
         "mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "",
    ),
    "resnet_skip_time_act": ({"resnet_skip_time_act": True}, "resnet_skip_time_act"),
    "resnet_out_scale_factor": ({"resnet_out_scale_factor": 2.0}, "resnet_out_scale_factor"),
    "blocks of residual halving": (
        {"down_block_types": ("ResnetDownsampleBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "ResnetUpsampleBlock2D")}, "",
    ),
    "attention without context": ({"down_block_types": ("AttnDownBlock2D", "DownBlock2D")}, ""),
    "deeper on the way up": (
        {"transformer_layers_per_block": [[2], 1], "reverse_transformer_layers_per_block": [[1, 3], 1]}, "reverse_transformer_layers",
    ),
    "layers per level": ({"layers_per_block": (1, 2)}, ""),
    "context of two widths": ({"cross_attention_dim": (8, 16)}, ""),
}  # fmt: skip


def folder_of(oracle: Any, folder: Path) -> Path:
    """The net as diffusers saves it: tensors, and config.json with every field."""
    write_net_folder(
        folder, "diffusion_pytorch_model", oracle.state_dict(), json.loads(oracle.to_json_string())
    )
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(WeightsError) as refused:
        load_net(folder)
    said = str(refused.value)
    assert said.startswith(str(folder)) and "\n" not in said and len(said.removeprefix(str(folder))) < 300
    return said


def unet_of(config: dict[str, Any]) -> Any:
    oracle = diffusers.UNet2DConditionModel(**{**UNET, **config}).eval()
    load_seeded(oracle, seed=31)
    return oracle


@torch.no_grad()
@pytest.mark.parametrize("case", EQUAL)
def test_a_unet_of_this_configuration_is_diffusers(case: str, tmp_path: Path) -> None:
    oracle = unet_of(EQUAL[case])
    unet = load_net(folder_of(oracle, tmp_path / "unet"))
    for size in ((16, 16), (13, 10)):
        x, t, context = unet_inputs(oracle, size)
        assert relative_error(unet(x, t, context), oracle(x, t, context).sample) <= 1e-5


def unet_inputs(oracle: Any, size: tuple[int, int]) -> tuple[Tensor, Timestep, Tensor]:
    width = oracle.config.cross_attention_dim
    width = width if isinstance(width, int) else width[0]
    x = seeded_input("peers.x", (2, oracle.config.in_channels, *size), seed=32)
    return x, torch.tensor([10, 951]), seeded_input("peers.context", (2, 4, width), seed=32)


@pytest.mark.parametrize("case", REFUSED)
def test_a_unet_of_this_configuration_is_refused(case: str, tmp_path: Path) -> None:
    config, names = REFUSED[case]
    assert names in refusal(folder_of(unet_of(config), tmp_path / "unet"))


def test_no_field_of_diffusers_is_left_out_of_the_table() -> None:
    """A newer diffusers with a new field fails here: it has to be honoured or refused knowingly."""
    for family, net in {
        "unet": diffusers.UNet2DConditionModel, "controlnet": diffusers.ControlNetModel, "vae": diffusers.AutoencoderKL,
        "asymmetric_vae": diffusers.AsymmetricAutoencoderKL,
    }.items():  # fmt: skip
        assert net._get_init_keys(net) - {"self"} <= KNOWN_FIELDS, family
        assert not FREE_FIELDS[family].keys() & ONLY_FIELDS[family].keys()


# ---- autoencoders ------------------------------------------------------------------------------------------

VAE: dict[str, Any] = {
    "block_out_channels": (4, 8), "norm_num_groups": 4, "layers_per_block": 1, "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2, "latent_channels": 4,
}  # fmt: skip
VAE_EQUAL: dict[str, dict[str, Any]] = {
    "plain": {},
    "no attention": {"mid_block_add_attention": False},
    "scaling and precision": {"scaling_factor": 0.3, "force_upcast": False, "sample_size": 512},
    "groups": {"norm_num_groups": 2},
    "16 channels": {"latent_channels": 16},
    "act_fn relu": {"act_fn": "relu"},
    "act_fn gelu": {"act_fn": "gelu"},
    "act_fn mish": {"act_fn": "mish"},
    "shift_factor": {"shift_factor": 0.4, "scaling_factor": 0.5},
    "shift below 0": {"shift_factor": -0.4},
}
VAE_REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "latents_mean": ({"latents_mean": (0.1,) * 4, "latents_std": (1.0,) * 4}, "latents_mean"),
    "latents_std": ({"latents_std": (2.0,) * 4}, "latents_std"),
    "use_quant_conv": ({"use_quant_conv": False}, "use_quant_conv"),
    "use_post_quant_conv": ({"use_post_quant_conv": False}, "use_post_quant_conv"),
    "attention at a level": ({"down_block_types": ("AttnDownEncoderBlock2D", "DownEncoderBlock2D")}, ""),
}


def vae_of(config: dict[str, Any]) -> Any:
    oracle = diffusers.AutoencoderKL(**{**VAE, **config}).eval()
    load_seeded(oracle, seed=33)
    return oracle


@torch.no_grad()
@pytest.mark.parametrize("case", VAE_EQUAL)
def test_an_autoencoder_of_this_configuration_is_diffusers(case: str, tmp_path: Path) -> None:
    """Scaled latents and pictures, as diffusers' pipelines make them."""
    oracle = vae_of(VAE_EQUAL[case])
    vae = load_net(folder_of(oracle, tmp_path / "vae"))
    image = seeded_input("peers.image", (1, 3, 16, 24), seed=34).clamp(-1, 1)
    shift, scale = oracle.config.shift_factor or 0, oracle.config.scaling_factor
    expected = (oracle.encode(image).latent_dist.mode() - shift) * scale
    latent = encode(vae, image)
    assert relative_error(latent, expected) <= 1e-5
    picture = oracle.decode(expected / scale + shift).sample
    assert relative_error(decode(vae, expected), picture.clamp(-1, 1)) <= 1e-5


@pytest.mark.parametrize("case", VAE_REFUSED)
def test_an_autoencoder_of_this_configuration_is_refused(case: str, tmp_path: Path) -> None:
    config, names = VAE_REFUSED[case]
    assert names in refusal(folder_of(vae_of(config), tmp_path / "vae"))


# ---- ControlNets -------------------------------------------------------------------------------------------

CONTROLNET = {
    name: value for name, value in UNET.items() if name not in ("up_block_types", "sample_size")
} | {"conditioning_embedding_out_channels": (4, 8, 8, 12)}
CONTROLNET_EQUAL: dict[str, dict[str, Any]] = {
    "plain": {},
    "bgr": {"controlnet_conditioning_channel_order": "bgr"},
    "one channel": {"conditioning_channels": 1},
    "act_fn": {"act_fn": "gelu"},
    "mid_block_scale_factor": {"mid_block_scale_factor": 2.0},
    "downsample_padding": {"downsample_padding": 0},
    "heads per level": WIDE,
    "num_attention_heads": {"num_attention_heads": 4, "attention_head_dim": 1},
}
CONTROLNET_REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "global_pool_conditions": ({"global_pool_conditions": True}, "global_pool_conditions"),
    "class_embed_type": ({"class_embed_type": "timestep"}, "class_embed_type"),
    "scale_shift": ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift"),
    "only_cross_attention": (
        {"only_cross_attention": True, "cross_attention_dim": 4},
        "only_cross_attention",
    ),
}


def controlnet_of(config: dict[str, Any]) -> Any:
    oracle = diffusers.ControlNetModel(**{**CONTROLNET, **config}).eval()
    load_seeded(oracle, seed=35)
    return oracle


@torch.no_grad()
@pytest.mark.parametrize("case", CONTROLNET_EQUAL)
def test_a_controlnet_of_this_configuration_is_diffusers(case: str, tmp_path: Path) -> None:
    oracle = controlnet_of(CONTROLNET_EQUAL[case])
    controlnet = load_net(folder_of(oracle, tmp_path / "controlnet"))
    channels = oracle.config.conditioning_channels
    x, t, context = unet_inputs(oracle, (8, 8))
    image = seeded_input("peers.hint", (2, channels, 64, 64), seed=36).clamp(0, 1)
    down, mid = oracle(x, t, context, image, 0.7, return_dict=False)
    ours = controlnet(x, t, context, image, 0.7)
    for found, expected in zip((*ours.down, ours.mid), (*down, mid), strict=True):
        assert relative_error(found, expected) <= 1e-5


@pytest.mark.parametrize("case", CONTROLNET_REFUSED)
def test_a_controlnet_of_this_configuration_is_refused(case: str, tmp_path: Path) -> None:
    config, names = CONTROLNET_REFUSED[case]
    assert names in refusal(folder_of(controlnet_of(config), tmp_path / "controlnet"))


# ---- stored slices of single blocks and layers -------------------------------------------------------------

# diffusers tests/models/unets/test_unet_2d_blocks.py: the last 3 x 3 of the last channel. The weights are
# what torch draws after the inputs, in the order in which diffusers builds its layers: its block is built and
# copied.
BLOCKS: dict[str, tuple[dict[str, Any], list[float]]] = {
    "DownBlock2D": ({}, [-0.0232, -0.9869, 0.8054, -0.0637, -0.1688, -1.4264, 0.4470, -1.3394, 0.0904]),
    "CrossAttnDownBlock2D": ({"cross_attention_dim": 32}, [0.2238, -0.7396, -0.2255, -0.3829, 0.1925, 1.1665, 0.0603, -0.7295, 0.1983]),
    "UNetMidBlock2DCrossAttn": ({"cross_attention_dim": 32}, [0.0187, 2.4220, 0.4484, 1.1203, -0.6121, -1.5122, -0.8270, 0.7851, 1.8335]),
    "UpBlock2D": ({}, [-0.2041, -0.4165, -0.3022, 0.0041, -0.6628, -0.7053, 0.1928, -0.0325, 0.0523]),
    "CrossAttnUpBlock2D": ({"cross_attention_dim": 32}, [-0.1403, -0.3515, -0.0420, -0.1425, 0.3167, 0.5094, -0.2181, 0.5931, 0.5582]),
    "UpDecoderBlock2D": ({}, [0.4404, 0.1998, -0.9886, -0.3320, -0.3128, -0.7034, -0.6955, -0.2338, -0.3137]),
}  # fmt: skip


def corner(x: Tensor) -> Tensor:
    return x[0, -1, -3:, -3:].flatten()


@torch.no_grad()
@pytest.mark.parametrize("kind", BLOCKS)
def test_a_block_gives_the_stored_slice(kind: str) -> None:
    from diffusers.models.unets import unet_2d_blocks

    more, stored = BLOCKS[kind]
    of_vae, up, mid = "coder" in kind, kind.find("Up") >= 0, "Mid" in kind
    torch.manual_seed(0)
    x = torch.randn(4, 32, 32, 32)
    temb = torch.empty(0) if of_vae else torch.randn(4, 128)
    if up and not of_vae:
        torch.manual_seed(1)
    skip = torch.randn(4, 32, 32, 32) if up and not of_vae else None
    arguments = {
        "in_channels": 32,
        **({} if mid else {"out_channels": 32}),
        **({} if of_vae else {"temb_channels": 128}),
    }
    arguments |= {"prev_output_channel": 32} if skip is not None else {}
    oracle = getattr(unet_2d_blocks, kind)(**arguments, **more).eval()
    block = (
        vae_net.UpBlock(32, 32, 1, VAEConfig(block_out_channels=(32,)), upsample=True)
        if of_vae
        else unet_block(kind)
    )
    block.load_state_dict(oracle.state_dict())
    if of_vae:
        found = block(x)
    elif mid:
        found = block(x, F.silu(temb), None)
    elif up:
        found = block(x, [torch.empty(4, 1, 64, 64), skip], F.silu(temb), None, None)
    else:
        found = block(x, F.silu(temb), None)[-1]
    torch.testing.assert_close(corner(found), torch.tensor(stored), rtol=0, atol=1e-4)


def unet_block(kind: str) -> Any:
    """Our block of that kind, from 32 channels to 32, one layer, one head."""
    config = UNetConfig(
        block_out_channels=(32, 32), layers_per_block=1, cross_attention_dim=32, attention_head_dim=1, norm_eps=1e-6,
        down_block_types=(kind, kind) if "Down" in kind else ("DownBlock2D",) * 2, up_block_types=(kind, kind) if "Up" in kind else ("UpBlock2D",) * 2,
    )  # fmt: skip
    if "Mid" in kind:
        return unet_net.MidBlock(config)
    return unet_net.UpBlock(1, 32, [32], config) if "Up" in kind else unet_net.DownBlock(0, config)


# diffusers tests/models/test_layers_utils.py.
@pytest.mark.parametrize(
    ("scale", "flags", "stored"),
    [
        (1, {"flip_sin_to_cos": False, "freq_shift": 1}, [0.9646, 0.9804, 0.9892, 0.9615, 0.9787, 0.9882, 0.9582, 0.9769, 0.9872]),
        (1, {"flip_sin_to_cos": True, "freq_shift": 0}, [0.3019, 0.2280, 0.1716, 0.3146, 0.2377, 0.1790, 0.3272, 0.2474, 0.1864]),
        (1000, {"flip_sin_to_cos": False, "freq_shift": 1}, [-0.9801, -0.9464, -0.9349, -0.3952, 0.8887, -0.9709, 0.5299, -0.2853, -0.9927]),
    ],
)  # fmt: skip
def test_the_sinusoids_have_the_stored_values(scale: int, flags: dict[str, Any], stored: list[float]) -> None:
    waves = timestep_embedding(scale * torch.arange(128), 64, **flags)[23:26, 47:50]
    torch.testing.assert_close(
        waves.flatten(), torch.tensor(stored), rtol=0, atol=2e-4 if scale == 1 else 1e-3
    )


def test_the_sinusoids_are_what_the_peers_expect_of_them() -> None:
    waves = timestep_embedding(torch.arange(16), 256, flip_sin_to_cos=False, freq_shift=1)
    assert waves[0, :128].abs().max() == 0 and (waves[0, 128:] - 1).abs().max() == 0
    assert (waves[:, -1] - 1).abs().sum() < 1e-5
    steps = torch.gradient(waves, dim=1)[0].abs().mean(dim=1)
    assert bool((steps.diff() > 0).all())
    t = torch.arange(10)
    flipped = timestep_embedding(t, 16, flip_sin_to_cos=True).roll(8, dims=1)
    assert torch.equal(flipped, timestep_embedding(t, 16, flip_sin_to_cos=False))
    lower = (timestep_embedding(t, 16, freq_shift=0) - timestep_embedding(t, 16, freq_shift=1))[:, :8]
    assert bool((lower[1:3].abs() < 2).all()) and lower[0].abs().max() == 0


UPSAMPLED = [0.7145, 1.3773, 0.3492, 0.8448, 1.0839, -0.3341, 0.5956, 0.1250, -0.4841]
DOWNSAMPLED = [0.9267, 0.5878, 0.3337, 1.2321, -0.1191, -0.3984, -0.7532, -0.0715, -0.3913]


@torch.no_grad()
def test_the_layers_give_the_stored_slices() -> None:
    """torch alone draws these weights: nn.Conv2d after the sample."""
    for net in (unet_net.Upsample, vae_net.Upsample):
        torch.manual_seed(0)
        x, layer = torch.randn(1, 32, 32, 32), net(32)
        found = layer(x, (64, 64)) if net is unet_net.Upsample else layer(x)
        torch.testing.assert_close(corner(found), torch.tensor(UPSAMPLED), rtol=0, atol=1e-4)
    torch.manual_seed(0)
    x, down = torch.randn(1, 32, 64, 64), unet_net.Downsample(32)
    torch.testing.assert_close(corner(down(x)), torch.tensor(DOWNSAMPLED), rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_residual_block_and_a_transformer_give_the_stored_slices() -> None:
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    config = UNetConfig(
        block_out_channels=(32, 64), norm_eps=1e-6, cross_attention_dim=64, attention_head_dim=2, layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
    )  # fmt: skip
    torch.manual_seed(0)
    x, temb = torch.randn(1, 32, 64, 64), torch.randn(1, 128)
    oracle, resnet = ResnetBlock2D(in_channels=32, temb_channels=128), unet_net.ResnetBlock(32, 32, config)
    resnet.load_state_dict(oracle.state_dict())
    stored = [-1.9010, -0.2974, -0.8245, -1.3533, 0.8742, -0.9645, -2.0584, 1.3387, -0.4746]
    torch.testing.assert_close(corner(resnet(x, F.silu(temb))), torch.tensor(stored), rtol=0, atol=1e-4)

    torch.manual_seed(0)
    x = torch.randn(1, 64, 64, 64)
    oracle = Transformer2DModel(
        in_channels=64, num_attention_heads=2, attention_head_dim=32, dropout=0.0, cross_attention_dim=64
    ).eval()
    context, transformer = torch.randn(1, 4, 64), unet_net.Transformer(1, config)
    stored = [0.0143, -0.6909, -2.1547, -1.8893, 1.4097, 0.1359, -0.2521, -1.3359, 0.2598]
    transformer.load_state_dict(oracle.state_dict())
    torch.testing.assert_close(corner(transformer(x, context)), torch.tensor(stored), rtol=0, atol=1e-4)
