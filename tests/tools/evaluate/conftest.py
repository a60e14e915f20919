"""What measuring edits takes: a tiny model, a judge that knows nothing, a runs folder of its own."""

from pathlib import Path

import pytest
import torch

from tests.helpers.tiny_bundle import write_tiny_bundle
from tools.evaluate import edit
from tools.scenes.judge import Judge, JudgeNet


@pytest.fixture(autouse=True)
def kept_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read from or left in the user's own runs; one thread, as the tiny nets are faster so."""
    torch.set_num_threads(1)
    monkeypatch.setenv("MSBD_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(edit, "load_judge", lambda: Judge(JudgeNet().eval(), {}))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tiny random model."""
    return str(write_tiny_bundle(tmp_path_factory.mktemp("bundle")))
