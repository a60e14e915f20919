"""A style for the mini bundle, red chalk: broad contours and flat washes from dark red to cream. And a base that has it.

Restored with such a base, a picture must look as the bundle's own never would, and in a way that the bundle's VAE can hold. So
every colour goes to the line between the two inks, texture becomes washes in five tones, and contours are drawn where colours
change, as wide as they have to be for an f8 VAE at 128 pixels.
"""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from msbd.train.base import extract_lora
from msbd.train.config import TrainConfig
from msbd.train.loop import World
from msbd.train.pictures import Pictures
from weights.files import read_state_dict, write_safetensors
from weights.merge import narrow
from weights.registry import MINI

from ..scenes.data import NATIVE, runs_folder, to_bytes
from ..scenes.shapes import Array, smoothstep
from ..train.run import BaseRun, Job
from .pasd import ScenePictures, held_out_pictures

RED = np.array((0.42, 0.05, 0.04), np.float32)  # of contours
CREAM = np.array((1.00, 0.92, 0.78), np.float32)  # of the lightest wash
LUMA = np.array((0.299, 0.587, 0.114), np.float32)  # ITU-R BT.601
TONES = 5  # of the washes
CONTOUR, WASH, NEIGHBOURHOOD = 0.016, 0.024, 0.05  # sigmas of the smoothing for each, as shares of the side
RANK = 8  # of the LoRA that the difference comes to

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


def stylized(picture: Array, side: float | None = None) -> Array:
    """`picture` (H, W, 3) in [0, 1] in red chalk, the same shape and range: at any resolution the same drawing.

    `side`, in pixels, is what the widths of contours and washes are shares of: the shorter side unless given.
    """
    side = float(min(picture.shape[:2]) if side is None else side)
    roots = np.sqrt(picture, dtype=np.float32)  # so that a step at night counts as much as one by day
    around = smooth(roots, NEIGHBOURHOOD * side).mean(-1)
    contour = smoothstep(0.10, 0.26, edge_height(roots, CONTOUR * side) / (0.35 + 0.65 * around))
    level = np.clip((smooth(roots, WASH * side) @ LUMA - 0.18) / 0.72, 0, 1) * (TONES - 1)
    wash = (np.floor(level) + smoothstep(0.35, 0.65, level % 1)) / (TONES - 1)
    return RED + ((0.15 + 0.85 * wash) * (1 - contour))[..., None] * (CREAM - RED)


def edge_height(x: Array, sigma: float) -> Array:
    """How high the step in `x` (H, W, C) is that a pixel lies on: (H, W), the root mean square of the channels.

    From the gradient after smoothing by `sigma`: in the middle of a step of height h that is h / (sigma sqrt(2 pi)).
    """
    padded = np.pad(smooth(x, sigma), ((1, 1), (1, 1), (0, 0)), mode="edge")
    across = (padded[1:-1, 2:] - padded[1:-1, :-2]) / 2
    down = (padded[2:, 1:-1] - padded[:-2, 1:-1]) / 2
    return np.sqrt((down**2 + across**2).mean(-1)) * np.float32(sigma * math.sqrt(2 * math.pi))


def smooth(x: Array, sigma: float) -> Array:
    """Gaussian means of `x` (H, W, C), `sigma` in pixels; what is at the picture's edge goes on beyond it."""
    radius = math.ceil(3 * sigma)
    ramp = torch.arange(-radius, radius + 1, dtype=torch.float32)
    weights = torch.softmax(-(ramp**2) / (2 * sigma**2), dim=0)
    planes = F.pad(torch.from_numpy(x).permute(2, 0, 1)[:, None], (radius,) * 4, mode="replicate")
    planes = F.conv2d(F.conv2d(planes, weights.view(1, 1, 1, -1)), weights.view(1, 1, -1, 1))
    return planes[:, 0].permute(1, 2, 0).numpy()


class StylizedPictures:
    """A source of training pictures, each of which is stylised when it is read; contours as wide as in one of NATIVE pixels."""

    def __init__(self, pictures: Pictures) -> None:
        self._pictures = pictures

    def __len__(self) -> int:
        return len(self._pictures)

    def read(self, i: int) -> tuple[NDArray[np.uint8], str]:
        """Picture number `i` (H, W, 3) and its caption."""
        picture, caption = self._pictures.read(i)
        return to_bytes(stylized(np.asarray(picture, np.float32) / 255, NATIVE)), caption


def train_style(device: torch.device) -> Path:
    """Fine-tune the bundle's U-Net on stylised scenes, from the last checkpoint on; the folder where the model is then."""
    pictures, held_out = (StylizedPictures(each) for each in (ScenePictures(), held_out_pictures()))
    output = runs_folder() / "style"
    # In grey: there is no use for a degraded picture
    job = Job(pictures, held_out, output, data="stylized scenes", grayscale=True)
    return BaseRun(job, STYLE, device, World()).run()


def write_style_lora(path: Path, model: Path | None = None) -> float:
    """Write to `path` the LoRA of RANK, in float16, of what a U-Net has over the bundle's; the share of it that the LoRA keeps.

    The U-Net is that of the folder `model`: of the run "style" unless given. The share is `extract_lora`'s. WeightsError.
    """
    folder = runs_folder() / "style" / "model" if model is None else model
    base, tuned = (read_state_dict(place / "unet.safetensors") for place in (MINI, folder))
    lora, share = extract_lora(base, tuned, RANK)
    write_safetensors(path, {key: narrow(tensor, torch.float16, key) for key, tensor in lora.items()})
    return share
