"""A run that is interrupted, killed or looked at goes on as if nothing had been; its folder, its average,
its validation.
"""

import copy
import dataclasses
import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from msbd.restore.pipeline import RestorePipeline
from msbd.train import state as train_state
from msbd.train.config import TrainConfig
from msbd.train.loop import DivergedError, Trainer
from msbd.train.objective import draw_samples
from msbd.train.state import Average, RunFolder
from msbd.train.validate import LOOK, kept_weights, restore_pictures, validation_draws, validation_losses
from nets.controlnet import ControlOutput
from nets.vae import IdentityAutoencoder
from tests.helpers.tiny import ALPHAS
from tests.helpers.tiny_training import (
    LATENT,
    RUN,
    difference,
    feed,
    finish,
    numbered,
    objective,
    run,
    run_and_die,
    spoil,
    start,
)

CONFIG = TrainConfig(steps=8, batch=2, learning_rate=1e-3, ema=0.9)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def log_of(folder: Path) -> list[dict[str, float]]:
    """The log without what a clock says; not by `read_log`, which forgives."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert all(line.pop("seconds") > 0 for line in lines)
    return lines


def tensors_of(state: Any) -> dict[str, Tensor]:
    """Every tensor and number of a checkpoint, by its path."""
    if isinstance(state, dict):
        pairs = state.items()
    elif isinstance(state, list | tuple):
        pairs = enumerate(state)
    else:
        return {"": torch.as_tensor(state)} if isinstance(state, Tensor | float | int) else {}
    return {f"{key}.{path}": tensor for key, value in pairs for path, tensor in tensors_of(value).items()}


def assert_same(a: Any, b: Any) -> None:
    """Two checkpoints, to the bit."""
    a, b = tensors_of(a), tensors_of(b)
    assert len(a) > 500
    assert a.keys() == b.keys()
    assert [path for path in a if not torch.equal(a[path], b[path])] == []


# ---- kill -9 -----------------------------------------------------------------------------------------------


def test_a_run_that_is_killed_twice_is_the_run_that_was_not(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    folder, unharmed = RunFolder(killed), start(run_and_die, whole)

    assert finish(start(run_and_die, killed, 4)) == [-signal.SIGKILL]  # the last checkpoint is of step 3
    assert [line["step"] for line in log_of(killed)] == [1, 2, 3, 4]
    assert torch.load(folder.checkpoint)["step"] == 3

    assert finish(start(run_and_die, killed, None, 6)) == [-signal.SIGKILL]  # half through that of step 6
    assert torch.load(folder.checkpoint)["step"] == 3
    assert [path.name for path in killed.glob("*unfinished*")] == ["last.unfinished"]
    assert [line["step"] for line in log_of(killed)] == [1, 2, 3, 4, 5, 6]
    with folder.log_file.open("a") as log:
        log.write('{"step": 7, "loss": 0.9')  # as a line that was being written

    assert finish(start(run_and_die, killed), unharmed) == [0, 0]
    assert [line["step"] for line in log_of(whole)] == [*range(1, 10)]
    assert [line["step"] for line in log_of(whole) if "val_loss" in line] == [4, 8, 9]
    assert log_of(killed) == log_of(whole)
    states = [torch.load(path / "last.pt") for path in (whole, killed)]
    assert_same(*states)
    assert states[0]["step"] == 9
    assert difference(states[0]["weights"], states[0]["average"]["weights"]) > 0
    assert [path.name for path in killed.glob("*unfinished*")] == []


# ---- interruptions in one process --------------------------------------------------------------------------


class Interrupt(BaseException):
    """Ctrl-C, or a machine that is taken away."""


def interrupt_at(*steps: int) -> Callable[[int], None]:
    waiting = list(steps)

    def on_step(step: int) -> None:
        if waiting and step == waiting[0]:
            waiting.pop(0)
            raise Interrupt

    return on_step


def interrupted(folder: Path, config: TrainConfig, *steps: int) -> None:
    """A run that is interrupted after each of `steps`, and goes on each time."""
    on_step = interrupt_at(*steps)
    for _ in steps:
        with pytest.raises(Interrupt):
            run(folder, config, on_step=on_step)
    run(folder, config, on_step=on_step)


SHORT = dataclasses.replace(RUN, steps=4, save_every=2, validate_every=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "bf16", "ema": 0.0},
        {"precision": "fp16"},
        {"optimizer": "adamw", "weight_decay": 0.1, "seed": 3},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_every_kind_of_run_goes_on_exactly(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = dataclasses.replace(SHORT, batch=1, **changes)
    run(tmp_path / "whole", config)
    interrupted(tmp_path / "parts", config, 2, 3)
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")
    assert_same(*(torch.load(tmp_path / name / "last.pt") for name in ("whole", "parts")))


def test_a_run_that_ends_before_its_first_checkpoint_begins_its_log_again(tmp_path: Path) -> None:
    interrupted(tmp_path, SHORT, 1)
    assert [line["step"] for line in log_of(tmp_path)] == [1, 2, 3, 4]


def test_a_run_that_is_done_has_nothing_to_do(tmp_path: Path) -> None:
    run(tmp_path, SHORT)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    steps = []
    trainer = run(tmp_path, SHORT, on_step=steps.append)
    assert trainer.done == 4 and steps == []
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_is_logged_and_when(tmp_path: Path) -> None:
    run(tmp_path, dataclasses.replace(SHORT, steps=5, log_every=3, validate_every=2))
    lines = log_of(tmp_path)
    assert {line["step"]: "val_loss" in line for line in lines} == {2: True, 3: False, 4: True, 5: True}
    assert lines[1].keys() == {"step", "loss", "denoising", "removal", "gradient", "rate", "skipped"}


def test_skipped_updates_are_remembered_but_a_streak_begins_anew() -> None:
    """Whoever goes on was told to change something, so one more is not the last."""
    config = dataclasses.replace(CONFIG, nan_limit=2)
    first = Trainer(objective(config), config)
    spoil(first.objective, [1, 2])
    batches = feed(first)
    for _ in range(3):
        first.step(batches)
    second = Trainer(objective(config), config)
    spoil(second.objective, [0, 1, 2])
    second.load_state(first.state())
    assert second.skipped == 2
    batches = feed(second)
    for _ in range(2):
        second.step(batches)
    with pytest.raises(DivergedError, match="3 updates in a row"):
        second.step(batches)


# ---- checkpoints of other runs -----------------------------------------------------------------------------


def test_a_checkpoint_of_another_net_is_refused() -> None:
    trainer, other = (Trainer(objective(CONFIG, variant), CONFIG) for variant in ("full", "light"))
    before = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    with pytest.raises(ValueError) as raised:
        trainer.load_state(other.state())
    assert "\n" not in str(raised.value) and "expected" in str(raised.value)
    assert difference(before, trainer.state()["weights"]) == 0 and trainer.done == 0


def test_a_checkpoint_of_a_net_of_another_size_is_refused_and_nothing_taken_over() -> None:
    trainer = Trainer(objective(CONFIG), CONFIG)
    other = Trainer(objective(CONFIG, fresh=True, hint_widths=(4, 6, 8, 12)), CONFIG)
    assert trainer.parameters.keys() == other.parameters.keys()
    before = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    with pytest.raises(ValueError, match="conv_out|blocks|to_rgbs"):
        trainer.load_state(other.state())
    assert difference(before, trainer.state()["weights"]) == 0


def test_a_run_that_overflowed_in_float16_can_go_on_in_float32() -> None:
    """What DivergedError advises."""
    half = dataclasses.replace(CONFIG, precision="fp16")
    first = Trainer(objective(half), half)
    first.step(feed(first))
    slower = dataclasses.replace(CONFIG, learning_rate=5e-4)
    second = Trainer(objective(slower), slower)
    second.load_state(first.state())
    assert second.step(feed(second))["rate"] == 5e-4
    assert second.done == 2


def test_a_run_may_go_on_in_float16() -> None:
    half = dataclasses.replace(CONFIG, precision="fp16")
    trainer = Trainer(objective(half, "none"), half)
    trainer.load_state(Trainer(objective(CONFIG, "none"), CONFIG).state())
    assert trainer.scaler.get_scale() == 2.0**16


# ---- the folder --------------------------------------------------------------------------------------------


def test_a_folder_gives_back_what_was_saved(tmp_path: Path) -> None:
    trainer = Trainer(objective(CONFIG), CONFIG)
    trainer.step(feed(trainer))
    folder = RunFolder(tmp_path / "new" / "run")
    assert folder.load() is None and folder.read_log() == []
    folder.save(trainer.state())
    found = folder.load()
    assert found is not None
    assert_same(found, trainer.state())
    assert set(os.listdir(folder.path)) <= {"last.pt", "log.jsonl"}


def test_a_checkpoint_leaves_the_frozen_weights_out(tmp_path: Path) -> None:
    trainer = Trainer(objective(CONFIG, "none"), CONFIG)
    state = trainer.state()
    assert all(name.startswith("controlnet.") for name in state["weights"])
    assert state["weights"].keys() == trainer.parameters.keys()


@settings(max_examples=30)
@given(
    logged=st.lists(st.integers(1, 30), unique=True).map(sorted),
    step=st.integers(0, 30),
    rest=st.sampled_from(["", "{", '{"step": 31, "lo', '{"step"']),
)
def test_the_log_is_cut_back_to_the_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, logged: list[int], step: int, rest: str
) -> None:
    folder = RunFolder(tmp_path_factory.mktemp("run"))
    for number in logged:
        folder.log(number, {"loss": 1 / number})
    with folder.log_file.open("a") as log:
        log.write(rest)
    assert [line["step"] for line in folder.read_log()] == logged
    folder.save({"step": step})
    assert folder.load() == {"step": step}
    folder.log(99, {"loss": math.pi})
    kept = [number for number in logged if number <= step]
    lines = [json.loads(line) for line in folder.log_file.read_text().splitlines()]
    assert lines == [*({"step": n, "loss": 1 / n} for n in kept), {"step": 99, "loss": math.pi}]


def test_the_log_is_never_seen_half_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill -9 then, or another process of the run that does the same, would lose it."""
    folder = RunFolder(tmp_path)
    for step in (1, 2, 3):
        folder.log(step, {"loss": 0.5})
    folder.save({"step": 2})
    seen = []
    whole_write = Path.write_text

    def watched(path: Path, text: str, *arguments: Any, **options: Any) -> int:
        path.open("w").close()
        seen.append(len(folder.read_log()))
        return whole_write(path, text, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", watched)
    folder.load()
    assert len(folder.read_log()) == 2
    assert all(count >= 2 for count in seen)


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path)
    folder.save({"step": 1})

    def full(state: Any, path: Path) -> None:
        path.write_bytes(b"half of")
        raise RuntimeError(
            "[enforce fail at inline_container.cc:671] . unexpected pos 64 vs 0"
        )  # as torch says it

    monkeypatch.setattr(train_state.torch, "save", full)
    with pytest.raises(OSError, match="is the disk full"):
        folder.save({"step": 2})
    assert folder.load() == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


class Payload:
    """What must not run when a checkpoint is read."""

    def __reduce__(self) -> Any:
        return os.abort, ()


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    torch.save({"step": 1, "weights": Payload()}, folder.checkpoint)
    with pytest.raises(ValueError, match=r"last\.pt: damaged") as refused:
        folder.load()
    assert "weights_only" in str(refused.value.__cause__)


@pytest.mark.parametrize(
    "state", [3, [], {"skipped": 0}, {"step": "1"}, {"step": None}], ids=lambda state: repr(state)
)
def test_a_checkpoint_without_a_step_is_damaged(state: object, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    torch.save(state, folder.checkpoint)
    with pytest.raises(ValueError, match=r"last\.pt: damaged"):
        folder.load()


@pytest.mark.parametrize(
    "changes",
    [{"optimizer": {}}, {"weights": 3}, {"skipped": "0"}, {"average": {"updates": 1}}, {"scaler": {"a": 1}}],
    ids=lambda changes: next(iter(changes)),
)
def test_a_checkpoint_that_lacks_something_is_damaged(changes: dict[str, Any], tmp_path: Path) -> None:
    folder, trainer = (
        RunFolder(tmp_path),
        Trainer(nn.Linear(3, 2), dataclasses.replace(CONFIG, precision="fp16")),
    )
    folder.save(trainer.state() | changes)
    with pytest.raises(ValueError, match=rf"^{folder.checkpoint}: the checkpoint is damaged: [^\n]+$"):
        trainer.resume(folder)


@pytest.mark.parametrize(
    "line", [b"3", b"[]", b'{"loss": 1}', b'{"step": "2"}', b'{"step": 2, "loss": "x"}', b'{"step": 2, "loss": NaN}',
             b"[" * 100_000, b'{"step": ' + b"9" * 5000 + b"}", b"\xff"]
)  # fmt: skip
def test_the_log_is_read_up_to_a_damaged_line(line: bytes, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.log(1, {"loss": 1.0})
    with folder.log_file.open("ab") as log:
        log.write(line + b"\n")
    assert folder.read_log() == [{"step": 1, "loss": 1.0}]


@pytest.mark.parametrize("text", [b"{", b"[]", b"\xff", b"[" * 100_000], ids=["cut", "list", "bytes", "deep"])
def test_damaged_options_are_named(text: bytes, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.options_file.write_bytes(text)
    with pytest.raises(ValueError, match=r"^[^\n]*run\.json: damaged \([^\n]+$"):
        folder.read_options()


# ---- the average -------------------------------------------------------------------------------------------


def test_the_average_of_weights_that_stand_still_is_these_weights() -> None:
    weights = {"a": torch.tensor([0.1, -2.0, 3e-7]), "b": torch.tensor(1e9)}
    average = Average({name: torch.zeros_like(tensor) for name, tensor in weights.items()}, 0.999)
    for _ in range(50):
        average.update(weights)
    assert difference(average.weights, weights) == 0


def test_an_average_is_a_copy_and_goes_on_where_it_was() -> None:
    def weights(step: int) -> dict[str, Tensor]:
        return {"a": torch.tensor([step**2.0, -step])}

    whole, parts = Average(weights(0), 0.9), Average(weights(0), 0.9)
    live = weights(0)
    for step in range(1, 6):
        whole.update(weights(step))
        live["a"].copy_(weights(step)["a"])
        parts.update(live)
        fresh = Average(weights(0), 0.9)
        fresh.load_state(parts.state())
        parts = fresh
    assert difference(whole.weights, parts.weights) == 0
    assert parts.weights["a"].data_ptr() != live["a"].data_ptr()


# ---- looking at a run --------------------------------------------------------------------------------------


def after_steps(count: int, config: TrainConfig = CONFIG, dtype: torch.dtype = torch.float32) -> Trainer:
    trainer = Trainer(objective(config, dtype=dtype), config)
    batches = feed(trainer, dtype)
    for _ in range(count):
        trainer.step(batches)
    return trainer


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_kept_weights_are_put_in_for_a_while_only(ema: float) -> None:
    trainer = after_steps(2, dataclasses.replace(CONFIG, ema=ema))
    own = {name: (p, p.data_ptr(), p.detach().clone()) for name, p in trainer.parameters.items()}
    kept = {name: tensor.clone() for name, tensor in trainer.kept().items()}
    taken_out: dict[str, Tensor] = {}
    with pytest.raises(Interrupt), kept_weights(trainer):
        assert all(torch.equal(p, kept[name]) for name, p in trainer.parameters.items())
        taken_out |= trainer.objective.state_dict()
        raise Interrupt
    for name, p in trainer.parameters.items():
        assert p is own[name][0] and p.data_ptr() == own[name][1] and torch.equal(p, own[name][2])
    assert all(torch.equal(taken_out[name], tensor) for name, tensor in kept.items())
    assert difference(trainer.kept(), kept) == 0


def test_validation_is_a_mean_over_samples_however_they_are_batched() -> None:
    trainer = after_steps(2, dtype=torch.float64)
    groups = ([[0, 1, 2, 3, 4]], [[0, 1], [2, 3], [4]], [[4], [3, 1, 0], [2]])
    losses = [
        validation_losses(
            trainer, trainer.objective, [numbered(index, torch.float64, seed=7) for index in group]
        )
        for group in groups
    ]
    assert losses[0].keys() == {"val_loss", "val_denoising", "val_removal"}
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], abs=1e-12)
    with torch.no_grad(), kept_weights(trainer):
        expected = trainer.objective(numbered(range(5), torch.float64, seed=7))
    assert losses[0] == pytest.approx({f"val_{k}": v.item() for k, v in expected.items()}, abs=1e-12)


def test_looking_at_a_run_changes_nothing_of_it() -> None:
    held_out = [numbered([900, 901])]
    seen, unseen = Trainer(objective(CONFIG), CONFIG), Trainer(objective(CONFIG), CONFIG)
    batches, others = feed(seen), feed(unseen)
    at_first = validation_losses(seen, seen.objective, held_out)
    start = copy.deepcopy(seen.state())
    for _ in range(3):
        seen.step(batches)
        unseen.step(others)
        validation_losses(seen, seen.objective, held_out)
    assert_same(seen.state(), unseen.state())
    assert validation_losses(seen, seen.objective, held_out) != at_first
    again = Trainer(objective(CONFIG), CONFIG)
    again.load_state(start)
    assert validation_losses(again, again.objective, held_out) == at_first
    assert all(p.requires_grad for p in seen.parameters.values())


def test_validation_draws_cover_the_timesteps_and_are_none_of_training() -> None:
    draw = validation_draws(0, 10)
    together = draw(range(10), LATENT)
    assert together.t.tolist() == [50, 150, 250, 350, 450, 550, 650, 750, 850, 950]
    assert together.null == [False] * 10
    assert torch.equal(draw([3, 7], LATENT).noise, together.noise[[3, 7]])
    assert draw([3, 7], LATENT).t.tolist() == [350, 750]
    training = draw_samples(0, range(300), LATENT, null_prompts=0.5).noise
    assert len(torch.cat([training, together.noise]).flatten(1).unique(dim=0)) == 310
    assert validation_draws(0, 4, timesteps=100)(range(4), LATENT).t.tolist() == [12, 37, 62, 87]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_restoring_with_nets_that_know_the_picture_gives_the_picture(prediction_type: str) -> None:
    """Whatever the noise; the ControlNet is asked at every step, with the hint of the picture."""
    target = torch.tensor([0.3, -0.2, 0.5]).view(1, 3, 1, 1)
    asked: list[tuple[Tensor, float]] = []

    class Control(nn.Module):
        def embed(self, image: Tensor) -> Tensor:
            return image.mean(dim=(2, 3), keepdim=True).expand(-1, -1, *image.shape[2:])

        def forward(self, x: Tensor, t: Tensor, context: Any, *, scale: float, hint: Tensor) -> ControlOutput:
            asked.append((hint, scale))
            return ControlOutput((), x)

    class Knowing(nn.Module):
        def forward(self, x: Tensor, t: Tensor, context: Any, control: ControlOutput) -> Tensor:
            assert torch.equal(control.mid, x)
            a = ALPHAS[int(t)].float()
            eps = (x - a.sqrt() * target) / (1 - a).sqrt()
            return eps if prediction_type == "epsilon" else a.sqrt() * eps - (1 - a).sqrt() * target

    pipe = RestorePipeline(
        unet=Knowing(),
        controlnet=Control(),
        vae=IdentityAutoencoder(),
        text_encoder=lambda ids: torch.zeros(len(ids), 5, 12),
        tokenizer=lambda prompts: torch.zeros(len(prompts), 5, dtype=torch.int64),
        alphas_cumprod=ALPHAS,
        prediction_type=prediction_type,
    )
    control = torch.randint(256, (2, 3, 64, 64)) / 255
    config = dataclasses.replace(LOOK, num_inference_steps=5, conditioning_scale=0.5)
    found = restore_pictures(pipe, control, ["", "a house"], (64, 64), config, first_seed=3)
    assert torch.allclose(found, target.expand(2, 3, 64, 64), atol=1e-5)
    assert len(asked) == 10 and all(scale == 0.5 for _, scale in asked)
    for picture, calls in zip(control.split(1), (asked[:5], asked[5:]), strict=True):
        hint = picture.mean(dim=(2, 3), keepdim=True).expand_as(picture)
        assert all(torch.allclose(seen, hint, atol=1e-6) for seen, _ in calls)
