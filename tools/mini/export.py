"""Write the trained parts as the bundle's files: float16 safetensors with their config in the metadata."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from msbd.loading.parts import load_net
from msbd.loading.seam import write_seam_decoder
from weights.files import read_metadata, read_state_dict, write_safetensors
from weights.registry import MINI

from ..scenes.data import NATIVE, runs_folder
from .asymmetric import AsymmetricPart
from .few_step import write_few_step_lora
from .parts import GUIDANCE, PARTS, latents, mini_tokenizer
from .pasd import VARIANTS
from .style import write_style_lora
from .train import trained

# What restoring takes: guidance makes the first worse and the second, which is told a caption, better; words
# about quality help neither.
RESTORING: dict[str, dict[str, Any]] = {
    "pasd": {"guidance_scale": 1.0, "conditioning_scale": 1.5, "prompts": False},
    "pasd-color": {"guidance_scale": 2.0, "prompts": False},
}


def export(names: list[str], folder: Path = MINI) -> list[Path]:
    """Write the parts `names`, from their last checkpoints, and the tokenizer into `folder`; the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    mini_tokenizer().save(folder / "tokenizer.json")
    written = [folder / "tokenizer.json"]
    for name in names:
        if name == "few-step":
            written.append(folder / "few-step-lora.safetensors")
            write_few_step_lora(written[-1])
            continue
        if name == "style":
            written.append(folder / "style-lora.safetensors")
            write_style_lora(written[-1])
            continue
        if name == AsymmetricPart.name:
            written.append(folder / f"{name}.safetensors")
            net = trained(AsymmetricPart(), device=torch.device("cpu"))
            write_seam_decoder(written[-1], net, load_net(MINI / "vae.safetensors"))
            continue
        if name in VARIANTS:
            written.append(folder / f"{name}.safetensors")
            _export_pasd(runs_folder() / name / "pasd.safetensors", written[-1], RESTORING.get(name, {}))
            continue
        part = PARTS[name]()
        state = trained(part, device=torch.device("cpu")).state_dict()
        tensors = {key: value.to(torch.float16).contiguous() for key, value in state.items()}
        written.append(folder / f"{name}.safetensors")
        write_safetensors(
            written[-1], tensors, {"config": json.dumps(asdict(part.net.config) | _beside(name))}
        )
    return written


def _export_pasd(run: Path, path: Path, restoring: dict[str, Any]) -> None:
    """Write the file of a run of PASD to `path`, with the `restoring` settings beside the sizes."""
    config = json.loads(read_metadata(run)["config"])
    config["controlnet"] |= restoring
    write_safetensors(path, read_state_dict(run), {"config": json.dumps(config)})


def _beside(name: str) -> dict[str, Any]:
    """What is not a size of the net but needed to use it."""
    if name == "vae":
        return {"scaling_factor": latents()[1]}
    if name == "unet":
        return {
            "native": NATIVE,
            "multiple": 16,
            "guidance_scale": GUIDANCE,
            "prediction_type": "epsilon",
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
        }
    if name == "clip":
        return {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return {}
