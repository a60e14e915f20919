"""docs/parity.md: complete, and what one machine measured survives another's run."""

from pathlib import Path

import pytest
import torch

from tests.helpers import parity_table
from tests.helpers.parity_cases import CASES
from tests.helpers.parity_table import OWN


def test_the_file_has_every_case() -> None:
    assert list(parity_table.read()[1]) == [case.label for case in CASES], "run `make parity-table`"


def test_a_run_without_a_gpu_keeps_the_columns_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity_table, "FILE", tmp_path / "parity.md")
    monkeypatch.setattr(parity_table, "CASES", CASES[:1])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    label, column = CASES[0].label, "float32, CUDA"
    before = parity_table.page({"CUDA": "a GPU"}, {label: {column: "1.0e-06 (1e-04)"}})
    parity_table.FILE.write_text(before)
    assert parity_table.main() == 0
    machines, cells = parity_table.read()
    assert machines["CUDA"] == "a GPU" and machines["CPU"] != parity_table.NOT_RUN
    assert cells[label][column] == "1.0e-06 (1e-04)" and cells[label]["float32, CPU"].endswith(" (1e-05)")


@pytest.mark.parametrize("installed", [False, True])
def test_the_references_own_column_is_kept_without_the_references(
    installed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if installed and not parity_table.are_installed():
        pytest.skip("needs the extra `parity`")
    monkeypatch.setattr(parity_table, "FILE", tmp_path / "parity.md")
    monkeypatch.setattr(parity_table, "CASES", CASES[:1])
    monkeypatch.setattr(parity_table, "are_installed", lambda: installed)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    label = CASES[0].label
    parity_table.FILE.write_text(parity_table.page({"references": "before"}, {label: {OWN: "before"}}))
    assert parity_table.main() == 0
    machines, cells = parity_table.read()
    assert (machines["references"] == "before") == (cells[label][OWN] == "before") == (not installed)
    assert not installed or 0.001 < float(cells[label][OWN]) < 0.04


def test_the_references_own_column_is_for_what_a_library_can_run_again() -> None:
    cells = {case.label: dict.fromkeys(parity_table.COLUMNS, "measured") for case in CASES}
    page = parity_table.page({}, cells)
    lines = [line for line in page.splitlines() if line.startswith("| ") and "/" in line]
    column = 2 + parity_table.COLUMNS.index(OWN)
    own = {line.split(" | ")[0].removeprefix("| "): line.split("|")[column].strip() for line in lines}
    assert list(own) == [case.label for case in CASES]
    assert {own[f"{family}/tiny_a"] for family in ("unet", "vae")} == {"measured"}
    assert {cell for label, cell in own.items() if label.startswith(("pasd", "lora", "unet_ldm"))} == {"–"}
    assert {own["rrdbnet/tiny_x4"], own["unet/tiny_eps_sensitive"]} == {"–"}


def test_an_error_above_its_tolerance_is_bold() -> None:
    assert parity_table.written(CASES[0], "float32, CPU", 2e-5) == "**2.0e-05 (1e-05)**"
    assert parity_table.written(CASES[0], "float32, CPU", 2e-6) == "2.0e-06 (1e-05)"
