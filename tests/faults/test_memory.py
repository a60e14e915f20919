"""Folder jobs of both tools, in which each allocation of the nets fails once: memory_points.py."""

import os
from pathlib import Path

import pytest

from tests.faults.forks import report_of

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the runs are forked")

ALLOCATIONS = {"restore": 500, "edit": 1000}  # at least
WAYS = {f"{job}: {how}" for job in ALLOCATIONS for how in ("exit code 1", "exit code 0, with less at once")}


def test_some_allocations_fail_and_the_job_is_resumed(tmp_path: Path) -> None:
    report = report_of("memory_points", tmp_path, "--share", "0.01", "--seed", "1")
    assert report["faults"] == []
    assert all(report["allocations"][job] > least for job, least in ALLOCATIONS.items())
    assert set(report["ended"]) == WAYS


@pytest.mark.long
def test_every_allocation_fails_and_the_job_is_resumed(tmp_path: Path) -> None:
    report = report_of("memory_points", tmp_path)
    assert report["faults"] == []
    assert report["tried"] == report["allocations"]
    assert all(report["allocations"][job] > least for job, least in ALLOCATIONS.items())
    assert set(report["ended"]) == WAYS
