"""Folder jobs of both tools, each I/O call of which fails or ends the process once: fault_points.py."""

import os
from pathlib import Path

import pytest

from tests.faults.forks import report_of
from tests.faults.io_calls import FAULTS

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the runs are forked")

CALLS = {"restore": 300, "restore with nets": 500, "edit": 600, "restore, ended once before": 200}  # at least


def test_a_part_of_the_calls_fails_and_the_job_is_resumed(tmp_path: Path) -> None:
    report = report_of("fault_points", tmp_path, "--share", "0.05", "--seed", "1")
    assert report["faults"] == []
    for job, least in CALLS.items():
        calls, tried = (sum(report[kind][job].values()) for kind in ("calls", "tried"))
        assert calls > least and 0.03 < tried / (4 * calls) < 0.08


@pytest.mark.long
def test_every_call_fails_in_every_way_and_the_job_is_resumed(tmp_path: Path) -> None:
    report = report_of("fault_points", tmp_path)
    assert report["faults"] == []
    for job, least in CALLS.items():
        calls, tried = report["calls"][job], report["tried"][job]
        assert sum(calls.values()) > least and tried.keys() == set(FAULTS)
        for fault in ("EIO", "ENOSPC", "killed before", "killed after"):
            assert tried[fault] == sum(calls.values())
        for fault in ("killed halfway", "short"):
            assert tried[fault] == calls["write"]
    assert set(report["ended"]) == {"signal 9", "exit code 0", "exit code 1"}
