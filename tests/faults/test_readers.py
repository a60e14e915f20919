import sys
from pathlib import Path

import pytest

from tests.faults.fuzz_readers import READERS, Report, damaged, run, seeds

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the process that is fed needs POSIX")


def read_by_each(report: Report) -> dict[str, int]:
    """How many damaged files each reader read."""
    return {reader: report.readers[reader, True] for reader in READERS}


def test_damaged_files_are_read_or_refused_in_one_line(tmp_path: Path) -> None:
    report = run(1500, seed=1, keep=tmp_path)
    assert report.faults == []
    assert report.tried == 1500 and report.read > 150


@pytest.mark.long
def test_many_damaged_files_are_read_or_refused_in_one_line(tmp_path: Path) -> None:
    report = run(60_000, seed=2, keep=tmp_path)
    assert report.faults == []
    assert report.tried == 60_000
    assert min(read_by_each(report).values()) > 100


def test_an_input_is_the_same_each_time_and_every_reader_has_some() -> None:
    assert {seed.reader for seed in seeds()} == READERS.keys()
    inputs = [damaged(3, number) for number in range(300)]
    assert inputs == [damaged(3, number) for number in range(300)]
    assert {source.reader for source, _ in inputs} == READERS.keys()
    assert sum(files != source.files for source, files in inputs) > 270
