"""A model's folder laid out as the mini bundle, of the smallest nets there can be, with random weights."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nets.clip import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig
from nets.controlnet import ControlNet, ControlNetConfig
from nets.pasd_unet import PASDUNet, PASDUNetConfig
from nets.rrdb import RRDBConfig, RRDBNet
from nets.unet import UNet, UNetConfig
from nets.vae import AutoencoderKL, VAEConfig
from tests.helpers.seeded_weights import load_seeded
from weights.files import read_metadata, read_state_dict, write_safetensors
from weights.ldm import to_ldm
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


# ---- the same model in other layouts -----------------------------------------------------------------------


def base_parts(bundle: Path) -> dict[str, dict[str, Tensor]]:
    """Canonical tensors of the parts that a Stable Diffusion file has."""
    parts = {part: read_state_dict(bundle / f"{part}.safetensors") for part in ("unet", "vae", "clip")}
    clip = parts.pop("clip")
    text = {key: tensor for key, tensor in clip.items() if key.startswith("text_model.")}
    return {**parts, "text_encoder": text}


def write_ldm_file(bundle: Path, path: Path) -> Path:
    """A single file in LDM's layout, its metadata saying what no shape tells, and the tokenizer beside it."""
    said = {"attention_head_dim": 2, "norm_num_groups": 4, "scaling_factor": 0.5, "num_attention_heads": 2}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(path, to_ldm(base_parts(bundle)), {"config": json.dumps(said | TRAINING)})
    shutil.copy(bundle / "tokenizer.json", path.parent)
    return path


def write_hub_folder(bundle: Path, folder: Path) -> Path:
    """A diffusers folder: each net with its config.json, the schedule, the tokenizer; no metadata."""
    text = json.loads(read_metadata(bundle / "clip.safetensors")["config"])["text"]
    said: dict[str, dict[str, Any]] = {"unet": asdict(UNET), "vae": asdict(VAE), "text_encoder": text}
    said["unet"]["sample_size"] = 16  # cells: 128 pixels
    for part, tensors in base_parts(bundle).items():
        name = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        write_net_folder(folder / part, name, tensors, said[part])
    for name in ("tokenizer", "scheduler"):
        (folder / name).mkdir()
    shutil.copy(bundle / "tokenizer.json", folder / "tokenizer")
    schedule = {"_class_name": "PNDMScheduler", "beta_start": 0.001, "trained_betas": None, "steps_offset": 1}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(schedule))
    (folder / "model_index.json").write_text("{}")
    return folder


def write_pasd_folder(folder: Path, variant: str = "full", **controlnet: Any) -> Path:
    """PASD's two nets on the bundle's sizes; their config.json lies about sizes, as the official ones do."""
    sizes = {"conditioning_embedding_out_channels": (4, 4, 8, 8), **controlnet}
    nets = {
        "unet": PASDUNet(PASDUNetConfig(**vars(UNET), variant=variant)),
        "controlnet": ControlNet(ControlNetConfig(**{**vars(UNET), **sizes})),
    }
    said = {"attention_head_dim": 2, "norm_num_groups": 4, "block_out_channels": [320, 640, 1280, 1280]}
    for part, net in nets.items():
        load_seeded(net, seed=3)
        write_net_folder(folder / part, "diffusion_pytorch_model", net.state_dict(), said)
    return folder


def write_net_folder(folder: Path, name: str, tensors: Mapping[str, Tensor], said: Mapping[str, Any]) -> None:
    """One net as the Hugging Face hub has it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / f"{name}.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(said))
