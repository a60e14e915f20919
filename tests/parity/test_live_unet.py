"""UNet beside diffusers' UNet2DConditionModel: its weights under its own keys, its config, fresh inputs."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from nets.unet import UNet, UNetConfig
from tests.helpers.goldens import relative_error
from tests.helpers.places import Place
from tests.helpers.seeded_nets import config_of
from tests.helpers.seeded_weights import load_seeded, seeded_input

diffusers = pytest.importorskip("diffusers")

TWO_LEVELS = {
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
SD = {
    **TWO_LEVELS,
    "block_out_channels": (32, 64, 96, 96),
    "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
    "layers_per_block": 2,
    "norm_num_groups": 32,
}
LINEAR = {
    **TWO_LEVELS,
    "block_out_channels": (16, 32, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": (2, 4, 8),
    "use_linear_projection": True,
}
SDXL = {
    **LINEAR,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 3),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 20 + 6 * 8,
}
# Nine frequencies less one: divided by a power of two, they are rounded alike in float32 by any formula.
EMBEDDING = {
    **TWO_LEVELS,
    "block_out_channels": (18, 36),
    "attention_head_dim": 2,
    "norm_num_groups": 9,
    "norm_eps": 1e-6,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
}
# Name -> constructor arguments of the oracle, and the latent's size.
CASES: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "sd": (SD, (16, 24)),
    "sd_odd": (SD, (13, 9)),
    "two_levels": (TWO_LEVELS, (7, 5)),
    "linear_odd": (LINEAR, (7, 5)),
    "sdxl": (SDXL, (8, 12)),
    "sdxl_odd": (SDXL, (13, 9)),
    "nine_channels": ({**TWO_LEVELS, "in_channels": 9}, (8, 8)),
    "other_embedding": (EMBEDDING, (8, 8)),
    "no_mid_attention": ({**TWO_LEVELS, "mid_block_type": "UNetMidBlock2D"}, (8, 8)),
}


def ours_of(oracle: Any) -> UNet:
    """Our net with the oracle's config and weights; it shares their memory."""
    config = {name: value for name, value in oracle.config.items() if value is not None}
    with torch.device("meta"):
        unet = UNet(config_of(UNetConfig, config))
    unet.load_state_dict(oracle.state_dict(), strict=True, assign=True)
    return unet.eval()


def pair(config: dict[str, Any], place: Place) -> tuple[Any, UNet]:
    oracle = diffusers.UNet2DConditionModel(**config).eval()
    load_seeded(oracle, seed=21)
    unet = ours_of(oracle.to(place.oracle))
    return oracle, unet.to(place.device, place.dtype)


def inputs_of(config: dict[str, Any], size: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    """x (2, C, h, w), t (2,), context (2, 7, D); for text_time also pooled text and sizes."""
    x = seeded_input("live.x", (2, config.get("in_channels", 4), *size), seed=22)
    context = seeded_input("live.context", (2, 7, config["cross_attention_dim"]), seed=22)
    inputs = [x.to(dtype), torch.tensor([981, 7]), context.to(dtype)]
    if "addition_embed_type" in config:
        text = seeded_input("live.text", (2, 20), seed=22).to(dtype)
        inputs += [text, torch.tensor([[96, 64, 0, 0, 96, 64], [512, 513, 3, 5, 640, 8]])]
    return inputs


@pytest.mark.parametrize("case", CASES)
def test_unet_equals_diffusers(case: str, place: Place) -> None:
    config, size = CASES[case]
    oracle, unet = pair(config, place)
    x, t, context, *added = inputs = inputs_of(config, size, place.oracle)
    conditions = dict(zip(("text_embeds", "time_ids"), added, strict=True)) if added else None
    expected = oracle(x, t, context, added_cond_kwargs=conditions).sample
    x, t, context, *added = place.put(*inputs)
    out = unet(x, t, context, added=(added[0], added[1]) if added else None)
    assert relative_error(out, expected) <= place.tolerance


@pytest.mark.parametrize("case", ["sd", "sd_odd", "linear_odd"])
def test_unet_with_a_controlnet_equals_diffusers(case: str, place: Place) -> None:
    """With the residuals that diffusers' own ControlNet makes."""
    config, size = CASES[case]
    oracle, unet = pair(config, place)
    controlnet = diffusers.ControlNetModel.from_unet(oracle, load_weights_from_unet=False).eval()
    load_seeded(controlnet, seed=23)
    x, t, context = inputs = inputs_of(config, size, place.oracle)
    image = seeded_input("live.image", (2, 3, 8 * size[0], 8 * size[1]), seed=22, scale=0.3, shift=0.5)
    down, mid = controlnet.to(place.oracle)(x, t, context, image.to(place.oracle), return_dict=False)
    expected = oracle(
        x, t, context, down_block_additional_residuals=down, mid_block_additional_residual=mid
    ).sample
    x, t, context, mid, *down = place.put(*inputs, mid, *down)
    out = unet(x, t, context, control=SimpleNamespace(down=down, mid=mid))
    assert relative_error(out, expected) <= place.tolerance
    assert relative_error(unet(x, t, context), expected) > 0.01


@pytest.mark.full
def test_unet_equals_diffusers_at_full_size() -> None:
    oracle = diffusers.UNet2DConditionModel(cross_attention_dim=768).eval()
    x, context = (
        seeded_input("live.x", (1, 4, 16, 16), seed=24),
        seeded_input("live.c", (1, 77, 768), seed=24),
    )
    expected = oracle(x, torch.tensor([601]), context).sample
    assert relative_error(ours_of(oracle)(x, torch.tensor([601]), context), expected) <= 1e-4
