"""The options of a training run, and the two published recipes.

Paper    Yang et al. 2023 (PASD), arXiv:2308.14469, sections 3.4 and 4.1
Copying  this file stands alone: the standard library only, so that a command line can show every default without torch
"""

from dataclasses import dataclass, fields
from typing import Literal, get_args, get_origin

HELD_OUT = 64  # pictures at most to validate with


@dataclass(frozen=True)
class TrainConfig:
    """Every option of a run; the defaults are the paper's, for each of its 8 GPUs."""

    steps: int = 500_000  # updates of the weights
    batch: int = 4  # samples a process takes at once
    accumulate: int = 1  # batches a process adds up for one update
    optimizer: Literal["adam", "adamw"] = "adam"
    learning_rate: float = 5e-5
    schedule: Literal["constant", "cosine"] = "constant"  # cosine: half a wave, towards 0
    warmup: int = 0  # steps of linear rise
    weight_decay: float = 0.0
    clip: float = 1.0  # largest norm of the gradient; the paper is silent, the official code has 1
    gamma: float = 1.0  # weight of L_DR
    antialias: bool = True  # of the pyramid of clean pictures that L_DR compares with
    null_prompts: float = 0.5  # share of captions replaced by the empty one
    colour_weight: float = 0.001  # of the toRGB pictures' colourfulness, in grayscale training
    ema: float = 0.0  # decay of the averaged weights, which are then the ones that are kept; 0: no average
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # of the nets' work; weights are always float32
    checkpointing: bool = False  # compute activations twice instead of keeping them
    zero: bool = False  # spread the optimizer's state over the processes (ZeRO, stage 1)
    nan_limit: int = 20  # updates in a row that may be skipped for gradients that are not finite
    seed: int = 0  # of everything that is drawn
    log_every: int = 10  # steps
    validate_every: int = 1000  # steps; 0: never
    save_every: int = 1000  # steps between checkpoints

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if get_origin(field.type) is Literal and value not in get_args(field.type):
                allowed = ", ".join(map(str, get_args(field.type)))
                raise ValueError(f"{field.name} is {value!r}; expected one of {allowed}")
        for name in ("steps", "batch", "accumulate", "nan_limit", "log_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        for name in ("warmup", "weight_decay", "gamma", "colour_weight", "validate_every"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 0")
        for name in ("learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected more than 0")
        if not 0 <= self.null_prompts <= 1:
            raise ValueError(f"null_prompts is {self.null_prompts}; expected a share from 0 to 1")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema is {self.ema}; expected 0 (no average) or a decay below 1")


PAPER = TrainConfig()

# What the official script does where it differs. It means to accumulate 2 batches, but does not (reference bug 18: it
# updates after each, with halved gradients); here it does. The colour term, of weight 0.001, it adds up over a batch of 4
# and counts once a level, so three times.
OFFICIAL = TrainConfig(
    optimizer="adamw",
    weight_decay=1e-2,
    accumulate=2,
    antialias=False,
    colour_weight=0.012,
    precision="fp16",
    save_every=10_000,
)

# The bundle's own: `tools.mini train --part pasd`, on scenes of 128 pixels.
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
HINT_WIDTHS = (16, 32, 64, 96)  # of its degradation removal, half of the full net's where it is widest
