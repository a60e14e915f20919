"""The training loop of the mini bundle's parts: falling rate, averaged weights, checkpoints, exact resume.

Step n draws everything from a generator seeded with (seed, n), so a run that was killed goes on as if it had
not been.

Why this is not msbd.train.loop's Trainer: the bundle's files were made by this loop, step by step, and its
rate, average (with no correction for the first steps), autocast and order of draws are all others than the
Trainer's, so that the published recipe would give other files. The Trainer also takes numbered samples of an
encoder, which a contrastive batch or a crop of the VAE's is not.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from msbd.files import whole_file

from ..scenes.data import runs_folder


@dataclass(frozen=True)
class Recipe:
    """How long and how fast a part is trained."""

    steps: int
    batch: int
    learning_rate: float  # at the end of the warm-up; falls to 0 as half a cosine
    weight_decay: float = 0.0
    warmup: int = 100  # steps of linear rise
    ema: float = 0.995  # decay of the averaged weights, which are the ones that are kept
    clip: float = 1.0  # largest gradient norm
    seed: int = 0
    bfloat16: bool = True  # autocast where that is fast; the narrow U-Net gains nothing from it


class Part(Protocol):
    """One net of the bundle and what it learns from."""

    name: str
    recipe: Recipe
    net: Any  # nn.Module

    def loss(self, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """Loss of one batch drawn with `generator`, and figures to log."""
        ...


def checkpoint_of(name: str, folder: Path | None = None) -> Path:
    """Where the checkpoint of the part `name` is, or will be."""
    return (runs_folder() if folder is None else folder) / f"{name}.pt"


def train(part: Part, *, device: torch.device, folder: Path | None = None) -> Any:
    """Train `part.net` to the end of its recipe, from the last checkpoint in `folder` on; return it averaged.

    Writes `<name>.pt` (every minute and at the end) and `<name>.jsonl` (a line every 50 steps).
    """
    folder = runs_folder() if folder is None else folder
    folder.mkdir(parents=True, exist_ok=True)
    recipe, net = part.recipe, part.net.to(device).train()
    if recipe.bfloat16 and fast_bfloat16(device):
        net.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema))
    checkpoint = checkpoint_of(part.name, folder)
    start = _resume(checkpoint, net, average, optimizer)
    saved = time.monotonic()
    with (folder / f"{part.name}.jsonl").open("a") as log:
        for step in tqdm(
            range(start, recipe.steps), initial=start, total=recipe.steps, desc=part.name, disable=None
        ):
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * _rate(step, recipe)
            figures = _one_step(part, optimizer, step, device)
            average.update_parameters(net)
            if step % 50 == 49:
                log.write(json.dumps({"step": step + 1, **figures}) + "\n")
                log.flush()
            if time.monotonic() - saved > 60 or step + 1 == recipe.steps:
                _save(checkpoint, net, average, optimizer, step + 1)
                saved = time.monotonic()
    return average.module.eval().requires_grad_(False)


def trained(part: Part, *, device: torch.device, folder: Path | None = None) -> Any:
    """The averaged weights of the last checkpoint, in evaluation mode. FileNotFoundError if there is none."""
    checkpoint = checkpoint_of(part.name, folder)
    if not checkpoint.exists():
        raise FileNotFoundError(
            f"{checkpoint} does not exist: run `python -m tools.mini train --part {part.name}` first"
        )
    state = torch.load(checkpoint, map_location=device, weights_only=True)["average"]
    part.net.load_state_dict({k.removeprefix("module."): v for k, v in state.items() if k != "n_averaged"})
    return part.net.to(device).eval().requires_grad_(False)


def _one_step(
    part: Part, optimizer: torch.optim.Optimizer, step: int, device: torch.device
) -> dict[str, float]:
    generator = torch.Generator().manual_seed(part.recipe.seed * 1_000_003 + step)
    with torch.autocast(device.type, torch.bfloat16, enabled=part.recipe.bfloat16 and fast_bfloat16(device)):
        loss, figures = part.loss(generator)
    if not torch.isfinite(loss):
        raise FloatingPointError(
            f"{part.name}: the loss of step {step} is {loss.item()}; lower the learning rate"
        )
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(part.net.parameters(), part.recipe.clip)
    optimizer.step()
    return {"loss": loss.item(), "gradient": norm.item(), **figures}


def fast_bfloat16(device: torch.device) -> bool:
    """Whether matrix work in bfloat16 is faster there: a GPU, or a CPU with AMX (2.4 x on the VAE's step)."""
    return device.type == "cuda" or (device.type == "cpu" and torch.cpu._is_amx_tile_supported())


def _rate(step: int, recipe: Recipe) -> float:
    """Learning rate at `step` as a fraction of the recipe's: linear rise, then half a cosine down to 0."""
    rise = min(1.0, (step + 1) / recipe.warmup)
    return rise * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / recipe.steps)).item())


def _resume(checkpoint: Path, net: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    if not checkpoint.exists():
        return 0
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    net.load_state_dict(state["net"])
    average.load_state_dict(state["average"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def _save(
    checkpoint: Path, net: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer, step: int
) -> None:
    state = {
        "net": net.state_dict(),
        "average": average.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
    }
    with whole_file(checkpoint) as unfinished:
        torch.save(state, unfinished)
