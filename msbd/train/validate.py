"""Look at a training run: its losses on fixed samples, and what its nets restore.

Paper    Yang et al. 2023 (PASD), arXiv:2308.14469, Eq. 3 (the start)
Tensors  as in loop.py
Copying  needs restore/config.py, restore/pipeline.py, train/loop.py, train/objective.py
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..restore.config import PLAIN, RestoreConfig
from ..restore.pipeline import RestorePipeline
from .loop import Figures, Trainer
from .objective import Draws, Inputs, draw_samples


def validation_draws(seed: int, count: int, *, timesteps: int = 1000) -> Callable[..., Draws]:
    """`draw` for an Encoder: samples 0 to `count` - 1 at evenly spread timesteps, so that few tell much."""

    def draw(index: Sequence[int], shape: tuple[int, ...]) -> Draws:
        draws = draw_samples(seed + 1_000_003, index, shape, null_prompts=0.0, timesteps=timesteps)
        even = [int((n + 0.5) * timesteps / count) for n in index]
        return draws._replace(t=torch.tensor(even))

    return draw


@contextmanager
def kept_weights(trainer: Trainer) -> Iterator[None]:
    """Within it the nets have the weights that would be kept: the averaged ones, where there are."""
    kept = trainer.kept()
    own = {name: parameter.data for name, parameter in trainer.parameters.items()}
    for name, parameter in trainer.parameters.items():
        parameter.data = kept[name].to(parameter.dtype)
    try:
        yield
    finally:
        for name, parameter in trainer.parameters.items():
            parameter.data = own[name]


@torch.no_grad()
def validation_losses(trainer: Trainer, objective: Any, batches: Sequence[Inputs]) -> Figures:
    """The mean losses of the kept weights over `batches`, "val_" before their names."""
    totals: dict[str, float] = {}
    count = sum(len(batch.z) for batch in batches)
    with kept_weights(trainer), trainer.autocast():
        for batch in batches:
            for name, value in objective(batch).items():
                totals[f"val_{name}"] = totals.get(f"val_{name}", 0.0) + value.item() * len(batch.z) / count
    return totals


# How a run is looked at: from Eq. 3, without guidance or added words, at its own size, colours not mended.
LOOK = RestoreConfig(**PLAIN)


def restore_pictures(
    pipe: RestorePipeline,
    images: Tensor,
    captions: Sequence[str],
    size: tuple[int, int],
    config: RestoreConfig = LOOK,
    *,
    first_seed: int = 0,
) -> Tensor:
    """What `pipe` makes of each of `images` (B, 3, h, w) in [0, 1] at `size` (H, W): (B, 3, H, W) in [-1, 1].

    Picture i is told `captions[i]`, and all that is random in it comes from seed first_seed + i, not
    `config`'s: so it does not matter how pictures are put into batches.
    """
    made = []
    for number, (image, caption) in enumerate(zip(images.split(1), captions, strict=True), first_seed):
        own = replace(config, seed=number)
        made.append(pipe(image * 2 - 1, caption, output_size=size, config=own).image)
    return torch.cat(made)
