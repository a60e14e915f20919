"""A model's folder laid out as the mini bundle, of the smallest nets there can be, with random weights."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nets.clip import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig
from nets.rrdb import RRDBConfig, RRDBNet
from nets.unet import UNet, UNetConfig
from nets.vae import AutoencoderKL, VAEConfig
from weights.files import write_safetensors
from weights.tokenizer import train_tokenizer

VOCABULARY = 530
UNET = UNetConfig(
    block_out_channels=(8, 8),
    layers_per_block=1,
    cross_attention_dim=16,
    attention_head_dim=2,
    norm_num_groups=4,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)
VAE = VAEConfig(
    block_out_channels=(8, 8, 8, 8),
    layers_per_block=1,
    norm_num_groups=4,
    scaling_factor=0.5,
    mid_attention=False,
)
RRDB = RRDBConfig(scale=4, num_feat=8, num_block=1, num_grow_ch=4)
TRAINING = {
    "native": 32,
    "multiple": 16,
    "guidance_scale": 3.0,
    "prediction_type": "epsilon",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
}


def clip_config(vocabulary: int) -> CLIPConfig:
    """Text and vision of one layer and 16 channels, for pictures of 32 pixels."""
    size: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    text = CLIPTextConfig(**size, vocab_size=vocabulary, eos_token_id=vocabulary - 1)
    return CLIPConfig(text, CLIPVisionConfig(**size, image_size=32, patch_size=16), projection_dim=8)


def write_part(folder: Path, part: str, net: nn.Module, **beside: Any) -> None:
    """`net` as <part>.safetensors in float16, with its config and `beside` in the metadata."""
    config: Any = net.config
    tensors = {key: value.half() for key, value in net.state_dict().items()}
    write_safetensors(
        folder / f"{part}.safetensors", tensors, {"config": json.dumps(asdict(config) | beside)}
    )


def write_tiny_bundle(folder: Path, **training: Any) -> Path:
    """All five files; `training` overrules what the U-Net's metadata say besides its sizes."""
    torch.manual_seed(0)
    folder.mkdir(exist_ok=True)
    tokenizer = train_tokenizer(["a red house on snow at night"], VOCABULARY)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_part(folder, "unet", UNet(UNET), **TRAINING | training)
    write_part(folder, "vae", AutoencoderKL(VAE))
    clip = CLIPModel(clip_config(tokenizer.get_vocab_size()))
    write_part(folder, "clip", clip, image_mean=[0.5] * 3, image_std=[0.25] * 3)
    write_part(folder, "rrdb", RRDBNet(RRDB))
    return folder
