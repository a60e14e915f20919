"""`python -m tools.evaluate fidelity | colorize`: the levels in the table are those that were used,
and the tables.
"""

import json
from pathlib import Path

import pytest
import torch

from msbd.load import load_restore_pipeline
from msbd.restore.config import RestoreConfig
from msbd.restore.pipeline import RestorePipeline
from tools.evaluate import dial
from tools.evaluate.__main__ import main
from tools.evaluate.dial import start_and_scale


@pytest.fixture(scope="module")
def pipe() -> RestorePipeline:
    """The mini bundle's PASD, whose schedule is that of Stable Diffusion 1.x."""
    torch.set_num_threads(1)
    return load_restore_pipeline("mini")


@pytest.mark.parametrize(("steps", "misread"), [(8, 0.862), (10, 0.894), (20, 0.952), (50, 0.981)])
def test_the_misread_level_is_that_of_the_steps_asked_for(
    pipe: RestorePipeline, steps: int, misread: float
) -> None:
    for ans, level in (("honoured", 0.01415), ("fallback", misread)):
        config = RestoreConfig(num_inference_steps=steps, ans=ans, conditioning_scale=0.7)  # pyright: ignore[reportArgumentType]
        assert start_and_scale(pipe, config) == (pytest.approx(level, abs=5e-4), 0.7)


def test_the_dial_sets_both(pipe: RestorePipeline) -> None:
    assert start_and_scale(pipe, RestoreConfig(fidelity=0.25)) == (0.25, pytest.approx(0.9))


def test_fidelity_tells_what_was_used(
    pipe: RestorePipeline,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(dial, "load_restore_pipeline", lambda model, **_: pipe)
    words = [
        "fidelity",
        "--scenes",
        "1",
        "--steps",
        "2",
        "--json",
        str(tmp_path / "new" / "f.json"),
        "--debug",
    ]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in lines if line.startswith("fidelity")] == [
        "0.000", "0.250", "0.500", "0.750", "1.000",
    ]  # fmt: skip
    expected = start_and_scale(pipe, RestoreConfig(num_inference_steps=2, ans="fallback"))[0]
    misread = next(line for line in lines if line.startswith("n = 900, misread"))
    assert misread.split()[4] == f"{expected:.3f}" != "0.952"
    assert next(line for line in lines if line.startswith("n = 900 ")).split()[3] == "0.014"
    settings = json.loads((tmp_path / "new" / "f.json").read_text())["settings"]
    assert (settings["scenes"], settings["steps"], settings["seed"]) == (1, 2, 0)


def test_colorize_compares_guidances(
    pipe: RestorePipeline, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dial, "load_restore_pipeline", lambda model, **_: pipe)
    assert main(["colorize", "--scenes", "1", "--steps", "1", "--guidance-scale", "1", "2", "--debug"]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split("  ")[0] for line in lines] == [
        "caption, guidance 1", "no text, guidance 1", "caption, guidance 2", "no text, guidance 2", "grey",
        "1 scenes; luma: the largest of all pixels of all scenes",
    ]  # fmt: skip
