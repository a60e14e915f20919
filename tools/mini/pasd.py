"""The mini PASD: what its variants are trained with, by `python -m tools.train`'s own code, and on what."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from msbd.train.config import HINT_WIDTHS, MINI
from msbd.train.loop import World

from ..scenes.data import ScenePictures, held_out_pictures, runs_folder
from ..train.run import PASDRun, TrainingJob

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
    # For the ablations: figures only. All have as many steps, the full one too.
    "pasd-short": Variant(steps=SHORT),
    "pasd-none": Variant("none", steps=SHORT),  # Fig. 9 b of the paper
    "pasd-no-rgb": Variant(to_rgb=False, steps=SHORT),  # Table 4 a
}


def train_variant(name: str, device: torch.device) -> Path:
    """Train `name` of VARIANTS under the runs folder, from its last checkpoint on; the file it is in then."""
    one = VARIANTS[name]
    job = TrainingJob(
        ScenePictures(),
        held_out_pictures(),
        runs_folder() / name,
        variant=one.variant,
        to_rgb=one.to_rgb,
        grayscale=one.grayscale,
        hint_widths=HINT_WIDTHS,
    )
    return PASDRun(job, replace(MINI, steps=one.steps), device, World()).run()
