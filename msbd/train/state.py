"""What a training run keeps: averaged weights, a checkpoint, a log.

Files    last.pt  (torch, weights only) everything an exact continuation needs, the frozen weights left out
         log.jsonl  a line per logged step
         run.json  the options that the run began with
Copying  needs files.py; torch only
"""

import json
import math
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import whole_file


class Average:
    """An exponential moving average of weights, in their own dtype.

    After n updates it is the mean of theta_1 ... theta_n weighted by decay^(n - i), so that where training
    began does not count: w <- w + (1 - decay) / (1 - decay^n) (theta - w), which is Adam's bias correction
    (Kingma & Ba 2015, section 3).
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.weights = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: Mapping[str, Tensor]) -> None:
        """Take the weights after an update in."""
        self.updates += 1
        share = (1 - self.decay) / (1 - self.decay**self.updates)
        for name, weight in self.weights.items():
            weight.lerp_(parameters[name].detach(), share)

    def state(self) -> dict[str, Any]:
        """For `load_state`."""
        return {"weights": self.weights, "updates": self.updates}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        for name, tensor in self.weights.items():
            tensor.copy_(state["weights"][name])
        self.updates = int(state["updates"])


class RunFolder:
    """The folder of a run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoint, self.log_file = path / "last.pt", path / "log.jsonl"
        self.options_file = path / "run.json"

    def save(self, state: dict[str, Any]) -> None:
        """Replace the checkpoint, at once and whole: a run that is killed while saving has its last one.

        OSError.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with whole_file(self.checkpoint, self.checkpoint.with_suffix(".unfinished")) as unfinished:
                torch.save(state, unfinished)
        except RuntimeError as error:  # what torch makes of a full disk
            raise OSError(
                f"{self.checkpoint}: could not be written; is the disk full? The one before is kept. "
                f"({str(error):.80})"
            ) from error

    def load(self, *, cut_log: bool = True) -> dict[str, Any] | None:
        """The checkpoint, a table with the `step` it was saved after, or None. ValueError for a damaged one.

        With `cut_log` (one process of a run) the log loses what was written after it was saved.
        """
        state = None
        if self.checkpoint.exists():
            damaged = f"{self.checkpoint}: damaged; put a copy back, or take another folder"
            try:
                # torch warns of pickles that it does not write.
                with warnings.catch_warnings(action="ignore"):
                    state = torch.load(self.checkpoint, map_location="cpu", weights_only=True, mmap=True)
            except Exception as error:  # a damaged pickle can raise anything at all
                raise ValueError(damaged) from error
            if not isinstance(state, dict) or type(state.get("step")) is not int:
                raise ValueError(damaged)
        if cut_log and self.log_file.exists():
            step = state["step"] if state else 0
            lines = [json.dumps(line) + "\n" for line in self.read_log() if line["step"] <= step]
            with whole_file(self.log_file, self.log_file.with_suffix(".unfinished")) as unfinished:
                unfinished.write_text("".join(lines))
        return state

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Add a line to the log; numbers that are not finite as null, which JSON has."""
        sound = {name: value if math.isfinite(value) else None for name, value in figures.items()}
        self.path.mkdir(parents=True, exist_ok=True)
        with self.log_file.open("a") as file:
            file.write(json.dumps({"step": step, **sound}) + "\n")

    def read_log(self) -> list[dict[str, float]]:
        """The logged lines, up to the first that is damaged, as a last one is that was cut off."""
        if not self.log_file.exists():
            return []
        lines = []
        for text in self.log_file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                break
            if not _is_logged(line):
                break
            lines.append(line)
        return lines

    def read_options(self) -> dict[str, Any]:
        """What run.json says. FileNotFoundError without one, ValueError for a damaged one."""
        try:
            options = json.loads(self.options_file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.options_file}: damaged ({error}); take another folder") from error
        if not isinstance(options, dict):
            raise ValueError(f"{self.options_file}: damaged (no JSON table); take another folder")
        return options


def _is_logged(line: object) -> bool:
    """Whether it is a table of a step and of numbers, null for those that were not finite."""
    if not isinstance(line, dict) or type(line.get("step")) is not int:
        return False
    numbers = [value for value in line.values() if value is not None]
    return all(type(value) in (int, float) and abs(value) <= sys.float_info.max for value in numbers)
