"""A base of another look for the mini bundle: its U-Net tuned on scenes in red chalk (scenes/chalk.py)."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from msbd.train.base import extract_lora
from msbd.train.config import TrainConfig
from msbd.train.loop import World
from msbd.train.pictures import Pictures
from weights.files import read_state_dict, write_safetensors
from weights.merge import narrow
from weights.registry import MINI

from ..scenes.chalk import stylized
from ..scenes.data import NATIVE, ScenePictures, held_out_pictures, runs_folder, to_bytes
from ..train.run import BaseRun, TrainingJob

RANK = 8  # the rank of the LoRA that stands for the difference

STYLE = TrainConfig(
    steps=1400,
    batch=16,
    optimizer="adamw",
    learning_rate=5e-4,
    schedule="cosine",
    warmup=100,
    ema=0.995,
    precision="bf16",
    validate_every=200,
    save_every=100,
)


class StylizedPictures:
    """A source of training pictures, stylised when they are read; contours as wide as in NATIVE pixels."""

    def __init__(self, pictures: Pictures) -> None:
        self._pictures = pictures

    def __len__(self) -> int:
        return len(self._pictures)

    def read(self, i: int) -> tuple[NDArray[np.uint8], str]:
        """Picture number `i` (H, W, 3) and its caption."""
        picture, caption = self._pictures.read(i)
        return to_bytes(stylized(np.asarray(picture, np.float32) / 255, NATIVE)), caption


def train_style(device: torch.device) -> Path:
    """Tune the bundle's U-Net on stylised scenes, from the last checkpoint on; the folder of the model."""
    pictures, held_out = (StylizedPictures(each) for each in (ScenePictures(), held_out_pictures()))
    output = runs_folder() / "style"
    # In grey: a base has no use for a degraded picture.
    job = TrainingJob(pictures, held_out, output, data="stylized scenes", grayscale=True)
    return BaseRun(job, STYLE, device, World()).run()


def write_style_lora(path: Path, model: Path | None = None) -> float:
    """Write the LoRA of RANK, in float16, for what a U-Net has over the bundle's; the share that it keeps.

    The U-Net is that of the folder `model`, by default the run "style". The share is `extract_lora`'s.
    WeightsError.
    """
    folder = runs_folder() / "style" / "model" if model is None else model
    base, tuned = (read_state_dict(place / "unet.safetensors") for place in (MINI, folder))
    lora, share = extract_lora(base, tuned, RANK)
    write_safetensors(path, {key: narrow(tensor, torch.float16, key) for key, tensor in lora.items()})
    return share
