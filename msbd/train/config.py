"""The options of a training run, and the two published recipes.

Paper    Yang et al. 2023 (PASD), arXiv:2308.14469: gamma and the null prompts are section 3.6's; Adam, its
         rate, the batch and the number of updates section 4.1's
Copying  needs options.py: the standard library only, so that a command line can show every default without
         torch
"""

from dataclasses import dataclass
from math import inf
from typing import Literal

from ..options import check_options, option

HELD_OUT = 64  # pictures at most to validate with


@dataclass(frozen=True)
class TrainConfig:
    """Every option of a run; the defaults are the paper's, for each of its 8 GPUs."""

    steps: int = option(500_000, "updates of the weights")
    batch: int = option(4, "samples that a process takes at once")
    accumulate: int = option(1, "batches that a process adds up for one update")
    optimizer: Literal["adam", "adamw"] = option("adam", "which optimizer")
    learning_rate: float = option(5e-5, "learning rate of the optimizer")
    schedule: Literal["constant", "cosine"] = option(
        "constant", "course of the learning rate; cosine falls towards 0 in half a wave"
    )
    warmup: int = option(0, "steps over which the learning rate rises from 0")
    weight_decay: float = option(0.0, "weight decay of the optimizer")
    clip: float = option(1.0, "largest norm of the gradient")  # the official code's; the paper is silent
    gamma: float = option(1.0, "weight of the degradation removal loss, L_DR")
    antialias: bool = option(True, "antialias the pyramid of clean pictures that L_DR compares with")
    null_prompts: float = option(0.5, "share of the captions that are replaced by the empty one")
    colour_weight: float = option(
        0.001, "weight of the colourfulness of the toRGB pictures, in grayscale training"
    )
    ema: float = option(
        0.0, "decay of the averaged weights, which are then the ones that are kept; 0 is without an average"
    )
    precision: Literal["fp32", "bf16", "fp16"] = option(
        "fp32", "number format of the nets' work; the weights that are trained are float32"
    )
    checkpointing: bool = option(False, "compute activations twice instead of keeping them")
    zero: bool = option(False, "spread the optimizer's state over the processes (ZeRO, stage 1)")
    nan_limit: int = option(20, "updates in a row that may be skipped for gradients that are not finite")
    seed: int = option(0, "seed of everything that is drawn")
    log_every: int = option(10, "steps between lines of log.jsonl")
    validate_every: int = option(1000, "steps between validations; 0 is none")
    save_every: int = option(1000, "steps between checkpoints")

    def __post_init__(self) -> None:
        check_options(self, _RANGES)
        for name in ("learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected more than 0")
        if not 0 <= self.null_prompts <= 1:
            raise ValueError(f"null_prompts is {self.null_prompts}; expected a share from 0 to 1")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema is {self.ema}; expected 0 (no average) or a decay below 1")


_RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("steps", "batch", "accumulate", "nan_limit", "log_every", "save_every"), (1, inf)),
    **dict.fromkeys(("warmup", "weight_decay", "gamma", "colour_weight", "validate_every"), (0, inf)),
}

PAPER = TrainConfig()

# What the official script does where it differs. It means to accumulate 2 batches, but does not (it updates
# after each, with halved gradients: reference bug 18); here it does. Its colour term, of weight 0.001, is
# added up over a batch of 4 and counted once a level, so three times.
OFFICIAL = TrainConfig(
    optimizer="adamw",
    weight_decay=1e-2,
    accumulate=2,
    antialias=False,
    colour_weight=0.012,
    precision="fp16",
    save_every=10_000,
)

# The bundle's own: `tools.mini train --part pasd`, on scenes of 128 pixels. The rate is ten times the paper's
# (at twenty times the full variant diverged, docs/log.md), and as there it does not fall: so a run can be
# prolonged, and its first steps are the run of a shorter one. The averaged weights are kept.
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
# The channels of its degradation removal, at the widest fewer than half of the full net's.
HINT_WIDTHS = (16, 32, 64, 96)
