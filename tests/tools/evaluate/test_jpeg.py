"""`python -m tools.evaluate jpeg`: the table, and bad input."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tools.evaluate.__main__ import main


def test_the_table_has_a_row_for_each_picture_and_quality(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    coarse = np.random.default_rng(0).integers(0, 255, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((50, 40), Image.Resampling.BICUBIC).save(tmp_path / "a.png")
    assert main(["jpeg", "-i", str(tmp_path / "a.png"), "--qualities", "20", "80"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("a.png")]
    assert [row[1] for row in rows] == ["20", "80"]
    assert all(
        float(row[2]) > 60 > float(row[3]) for row in rows
    )  # as near as float32 gets, and another coder


@pytest.mark.parametrize("words", [["-i", "nowhere.png"], ["-i", "PICTURE", "--qualities", "0"]])
def test_bad_input_gets_one_line(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    words = [word.replace("PICTURE", str(tmp_path / "a.png")) for word in words]
    assert main(["jpeg", *words]) == 1
    assert capsys.readouterr().err.count("\n") == 1
