"""Training in two processes (gloo, on the CPU) is training in one: the gradients, the weights,
what is skipped, what is kept.
"""

import dataclasses
from typing import Any

import pytest
import torch

from msbd.train.config import TrainConfig
from msbd.train.loop import Trainer
from tests.helpers.tiny_training import difference, feed, finish, gradients, objective, spread, start, trained

TOLERANCE = 1e-9  # in float64, of gradients and weights of about 1


def config(batch: int, accumulate: int = 1, **changes: Any) -> TrainConfig:
    options: dict[str, Any] = {"learning_rate": 1e-3, "schedule": "cosine", "warmup": 1, "ema": 0.9}
    return TrainConfig(**{"steps": 3, "batch": batch, "accumulate": accumulate, **options, **changes})


ZERO = config(1, 2, zero=True, optimizer="adamw")
PLAIN = dataclasses.replace(ZERO, zero=False)

# What two ranks do: 4 samples a step, however they are split. The official code fails with `accumulated` (bug
# 18).
CASES: dict[str, dict[str, Any]] = {
    "full": {"config": config(2)},
    "accumulated": {"config": config(1, 2)},
    "light, clipped, checkpointed": {"config": config(1, 2, clip=0.01), "variant": "light", "thrifty": True},
    "eq2, from zero": {"config": config(2), "variant": "eq2", "fresh": True},
    "none, without heads, resumed": {"config": config(2), "variant": "none", "to_rgb": False, "resume": 2},
    "zero": {"config": ZERO, "variant": "none", "resume": 1},
    "zero, at first not": {"config": ZERO, "variant": "none", "resume": 1, "before": PLAIN},
    "poisoned": {"config": config(1, 2), "poison": (1, [2])},  # rank 1, in the first half of step 2
    "fp16": {"config": config(2, precision="fp16"), "dtype": torch.float32, "poison": (0, [1])},
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks found, by case."""
    folder = tmp_path_factory.mktemp("ranks")
    processes = [start(spread, CASES, rank, 2, folder) for rank in range(2)]
    assert finish(*processes) == [0, 0]
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("poisoned", "fp16")])
def test_two_ranks_are_one_process_with_the_joint_batch(ranks: list[dict[str, Any]], case: str) -> None:
    own = ("config", "thrifty", "resume", "before")
    options = {name: value for name, value in CASES[case].items() if name not in own}
    one = dataclasses.replace(CASES[case]["config"], batch=4, accumulate=1, zero=False)
    alone = trained(one, **options)
    assert len(alone["gradients"]) == 3
    for rank in ranks:
        found = rank[case]
        for ours, theirs in zip(found["gradients"], alone["gradients"], strict=True):
            assert difference(ours, theirs) <= TOLERANCE
        assert difference(found["weights"], alone["weights"]) <= TOLERANCE
        assert difference(found["kept"], alone["kept"]) <= TOLERANCE
        for ours, theirs in zip(found["figures"], alone["figures"], strict=True):
            assert without_clock(ours) == pytest.approx(without_clock(theirs), abs=TOLERANCE)


def without_clock(figures: dict[str, float]) -> dict[str, float]:
    return {name: figure for name, figure in figures.items() if name != "seconds"}


def test_the_comparison_can_fail(ranks: list[dict[str, Any]]) -> None:
    """One rank's own batch alone, or gradients that were not averaged,
    are far more than the tolerance away.
    """
    own = trained(config(2), variant="full")
    assert difference(ranks[0]["full"]["gradients"][0], own["gradients"][0]) > 1e-3
    assert difference(ranks[0]["full"]["weights"], own["weights"]) > 1e-4


@pytest.mark.parametrize("case", CASES)
def test_the_ranks_agree_to_the_bit(ranks: list[dict[str, Any]], case: str) -> None:
    first, second = (rank[case] for rank in ranks)
    for a, b in zip(first["gradients"], second["gradients"], strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) or a[name].isnan().any() for name in a)
    assert difference(first["weights"], second["weights"]) == 0
    assert difference(first["kept"], second["kept"]) == 0
    for a, b in zip(first["figures"], second["figures"], strict=True):
        assert without_clock(a) == pytest.approx(without_clock(b), rel=0, abs=0, nan_ok=True)


def test_an_update_that_is_not_finite_in_one_rank_is_left_out_in_both(ranks: list[dict[str, Any]]) -> None:
    """The other two updates are made: as in one process whose second update is left out."""
    alone = trained(config(4), poison=(0, [1]))
    for rank in ranks:
        found = rank["poisoned"]
        assert [figures["skipped"] for figures in found["figures"]] == [0, 1, 1]
        assert difference(found["weights"], alone["weights"]) <= TOLERANCE
        moments = found["state"]["optimizer"]["state"].values()
        assert {int(one["step"]) for one in moments} == {2}
        assert found["state"]["average"]["updates"] == 2


def test_an_overflow_in_one_rank_halves_the_scale_in_both(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        found = rank["fp16"]
        assert [figures["skipped"] for figures in found["figures"]] == [0, 1, 1]
        assert found["state"]["scaler"]["scale"] == 2.0**15


@pytest.mark.parametrize("case", ["accumulated", "zero"])
def test_a_run_of_two_ranks_goes_on_in_one_process(ranks: list[dict[str, Any]], case: str) -> None:
    """Its names are those of one process, its next sample the next one."""
    variant, optimizer = CASES[case].get("variant", "full"), CASES[case]["config"].optimizer
    longer = config(2, 2, steps=5, schedule="constant", optimizer=optimizer)
    trainer = Trainer(objective(longer, variant, dtype=torch.float64), longer)
    trainer.load_state(ranks[0][case]["state"])
    assert next(trainer.batches()) == [12, 13]
    trainer.step(feed(trainer, torch.float64))
    alone = trained(config(4, optimizer=optimizer), variant=variant)["state"]
    other = Trainer(
        objective(longer, variant, dtype=torch.float64), dataclasses.replace(longer, batch=4, accumulate=1)
    )
    other.load_state(alone)
    other.step(feed(other, torch.float64))
    assert difference(gradients(trainer), gradients(other)) <= TOLERANCE
    assert difference(trainer.state()["weights"], other.state()["weights"]) <= TOLERANCE
