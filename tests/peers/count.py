"""`python -m tests.peers.count`: how many of diffusers' stored numbers our samplers give, file by file."""

import importlib
import sys
from collections import Counter
from pathlib import Path

from .cases import LACKING, STORED, Case


def all_cases() -> list[Case]:
    """The `CASES` of every test file of this folder."""
    cases: list[Case] = []
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        cases += getattr(importlib.import_module(f"{__package__}.{path.stem}"), "CASES", [])
    return cases


def reproduced(cases: list[Case]) -> Counter[str]:
    """By file, how many stored numbers our samplers give."""
    counts: Counter[str] = Counter()
    for case in cases:
        counts[case.file] += case.numbers - len(case.misses())
    return counts


def main() -> int:
    cases = all_cases()
    counts = reproduced(cases)
    for file, stored in STORED.items():
        reason = f"  {LACKING[file][0]} lack: {LACKING[file][1]}" if file in LACKING else ""
        print(f"{file:24} {counts[file]:3} of {stored:3}{reason}")
    print(f"{'all':24} {sum(counts.values()):3} of {sum(STORED.values()):3}")
    for case in cases:
        if case.because:
            print(f"{case.file} {case.name}: {'; '.join(case.misses())}: {case.because}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
