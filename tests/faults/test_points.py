"""Folder jobs of both tools, each I/O call of which fails or ends the process once: fault_points.py."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults.io_calls import FAULTS
from tests.helpers.fuzzing import ROOT

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the runs are forked")

CALLS = {"restore": 300, "restore with nets": 500, "edit": 600, "restore, ended once before": 200}  # at least


def report_of(folder: Path, *words: str) -> dict[str, Any]:
    """What the runs gave, made by a process of one thread."""
    command = [sys.executable, "-m", "tests.faults.fault_points", "--json", str(folder / "report"), *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (folder / "report").exists(), done.stdout + done.stderr
    return json.loads((folder / "report").read_text())


def test_a_part_of_the_calls_fails_and_the_job_is_resumed(tmp_path: Path) -> None:
    report = report_of(tmp_path, "--share", "0.05", "--seed", "1")
    assert report["faults"] == []
    for job, least in CALLS.items():
        calls, tried = (sum(report[kind][job].values()) for kind in ("calls", "tried"))
        assert calls > least and 0.03 < tried / (4 * calls) < 0.08


@pytest.mark.long
def test_every_call_fails_in_every_way_and_the_job_is_resumed(tmp_path: Path) -> None:
    report = report_of(tmp_path)
    assert report["faults"] == []
    for job, least in CALLS.items():
        calls, tried = report["calls"][job], report["tried"][job]
        assert sum(calls.values()) > least and tried.keys() == set(FAULTS)
        for fault in ("EIO", "ENOSPC", "killed before", "killed after"):
            assert tried[fault] == sum(calls.values())
        for fault in ("killed halfway", "short"):
            assert tried[fault] == calls["write"]
    assert set(report["ended"]) == {"signal 9", "exit code 0", "exit code 1"}
