"""The training loop: it learns, it resumes as if it had not been interrupted."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tools.mini import __main__, parts
from tools.mini.train import Recipe, train, trained

CPU = torch.device("cpu")


class Line:
    """y = 2x + 1, learned from noisy batches."""

    name = "line"

    def __init__(self, steps: int = 120, seed: int = 0) -> None:
        torch.manual_seed(1)
        self.recipe = Recipe(
            steps=steps, batch=16, learning_rate=0.05, warmup=5, ema=0.9, seed=seed, bfloat16=False
        )
        self.net: Any = nn.Linear(1, 1)
        self.fail_at: int | None = None
        self.calls = 0

    def loss(self, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        self.calls += 1
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        x = torch.randn(self.recipe.batch, 1, generator=generator)
        return (self.net(x) - 2 * x - 1).square().mean(), {}


def test_the_command_offers_every_part() -> None:
    assert tuple(parts.PARTS) == __main__.PARTS  # named there too, so that --help need not import torch


def test_train_learns_and_logs(tmp_path: Path) -> None:
    net = train(Line(), device=CPU, folder=tmp_path)
    assert net.weight.item() == pytest.approx(2, abs=0.1)
    lines = [json.loads(line) for line in (tmp_path / "line.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [50, 100]
    assert lines[1]["loss"] < lines[0]["loss"]


def test_train_resumes_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(Line(), device=CPU, folder=tmp_path / "whole")
    clock = iter(range(0, 1_000_000, 1000))
    monkeypatch.setattr(
        "tools.mini.train.time.monotonic", lambda: next(clock)
    )  # a checkpoint after every step
    interrupted = Line()
    interrupted.fail_at = 61
    with pytest.raises(KeyboardInterrupt):
        train(interrupted, device=CPU, folder=tmp_path / "parts")
    again = Line()
    resumed = train(again, device=CPU, folder=tmp_path / "parts")
    assert again.calls == 60
    assert torch.equal(whole.weight, resumed.weight) and torch.equal(whole.bias, resumed.bias)


def test_trained_reads_the_averaged_weights(tmp_path: Path) -> None:
    net = train(Line(), device=CPU, folder=tmp_path)
    assert torch.equal(trained(Line(), device=CPU, folder=tmp_path).weight, net.weight)
    with pytest.raises(FileNotFoundError, match="train --part line"):
        trained(Line(), device=CPU, folder=tmp_path / "nothing")


def test_train_stops_at_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    part = Line()
    with torch.no_grad():
        part.net.weight.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match="line: the loss of step 0"):
        train(part, device=CPU, folder=tmp_path)
