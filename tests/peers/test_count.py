"""Every number that diffusers stores has a case here, or a reason why not."""

import pytest

from .cases import LACKING, STORED
from .count import all_cases, main, reproduced

ALL = all_cases()


@pytest.mark.parametrize("file", STORED)
def test_every_stored_number_is_accounted_for(file: str) -> None:
    cases = [case for case in ALL if case.file == file]
    assert sum(case.numbers for case in cases) + LACKING.get(file, (0, ""))[0] == STORED[file]
    assert len({case.name for case in cases}) == len(cases)


def test_the_counter_counts_what_is_reproduced(capsys: pytest.CaptureFixture[str]) -> None:
    assert {case.file for case in ALL} <= set(STORED) and sum(STORED.values()) == 260
    misses = sum(len(case.misses()) for case in ALL if case.because)
    total = sum(case.numbers for case in ALL) - misses
    assert sum(reproduced(ALL).values()) == total
    assert main() == 0 and f"all                      {total:3} of 260" in capsys.readouterr().out
