"""The mini PASD: what its variants are trained with, by `python -m tools.train`'s own code, and on what."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from msbd.train.config import HELD_OUT, TrainConfig
from msbd.train.loop import World

from ..scenes.data import (
    NATIVE,
    RenderedScenes,
    abstract_pictures,
    runs_folder,
    stage_pictures,
    training_pictures,
)
from ..scenes.scenes import DEGRADED
from ..train.run import Job, PASDRun

HINT_WIDTHS = (16, 32, 64, 96)  # of the degradation removal, half of the full net's where it is widest

# The rate is ten times the paper's (at twenty times the full variant diverged, docs/log.md), and as there it does not fall:
# so a run can be prolonged, and its first steps are the run of a shorter one. The averaged weights are kept.
MINI = TrainConfig(
    steps=9_000,
    batch=16,
    optimizer="adamw",
    learning_rate=5e-4,
    warmup=100,
    weight_decay=1e-2,
    ema=0.999,
    precision="bf16",
    validate_every=200,
    save_every=200,
)
SHORT = 4000  # steps of the ablations


@dataclass(frozen=True)
class Variant:
    """One net of the family and how it is trained."""

    variant: str = "full"
    to_rgb: bool = True
    grayscale: bool = False
    steps: int = MINI.steps


VARIANTS = {
    "pasd": Variant(),
    "pasd-color": Variant("light", grayscale=True),
    # For the ablations: figures only. All for as many steps, the full one too
    "pasd-short": Variant(steps=SHORT),
    "pasd-none": Variant("none", steps=SHORT),  # Fig. 9 b of the paper
    "pasd-no-rgb": Variant(to_rgb=False, steps=SHORT),  # Table 4 a
}


def train_variant(name: str, device: torch.device) -> Path:
    """Train `name` of VARIANTS under the runs folder, from its last checkpoint on; the file it is in then."""
    one = VARIANTS[name]
    job = Job(
        ScenePictures(),
        held_out_pictures(),
        runs_folder() / name,
        variant=one.variant,
        to_rgb=one.to_rgb,
        grayscale=one.grayscale,
        hint_widths=HINT_WIDTHS,
    )
    return PASDRun(job, replace(MINI, steps=one.steps), device, World()).run()


class ScenePictures:
    """Captioned scenes, whole and in part, and abstract pictures, none of them degraded, as a source of training data."""

    def __init__(self) -> None:
        sources = (training_pictures(), stage_pictures(), abstract_pictures())
        self._rows = [
            (source, i)
            for source in sources
            for i, caption in enumerate(source.captions)
            if not caption.endswith(DEGRADED)
        ]

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, i: int) -> tuple[NDArray[np.uint8], str]:
        """Picture number `i` (H, W, 3), 128 or 192 pixels a side, and its caption."""
        source, row = self._rows[i]
        return np.array(source.images[row]), source.captions[row]


def held_out_pictures() -> RenderedScenes:
    """Scenes that no net was trained on, and no table is made of, to validate with."""
    return RenderedScenes(HELD_OUT, NATIVE, start=20_000)
