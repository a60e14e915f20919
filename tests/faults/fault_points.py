"""Every I/O call of a folder's job fails, or ends the process, one in each run; then the job is resumed.

  python -m tests.faults.fault_points                                    # every job, call and fault
  python -m tests.faults.fault_points --job edit --call 17 --fault EIO   # one

A run is a process that is forked from a warm one, in which all is imported and no thread was started. What is
expected of it stands in `check_broken` and `check_resumed`. It ends with a report, and 1 where anything else
was found. For Linux and macOS.
"""

import argparse
import importlib
import json
import math
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

import tools.edit
import tools.restore.__main__
from tests.faults.forks import KILLED, MEMORY, SAID, Job, Place, in_forks, prepared_once, warm_up
from tests.faults.io_calls import FAULTS, Calls, faults_of
from tests.helpers.folder_jobs import (
    BICUBIC,
    QUICK,
    faults_of_manifest,
    files_of,
    quick_pipelines,
    results_of,
    write_masks,
    write_pictures,
)
from tests.helpers.tiny_bundle import write_pasd_folder, write_tiny_bundle

FLAT = ("a.png", "b.png", "c.png", "d.png", "e.png", "f.png")
TREE = ("a.png", "sub/b.jpg", "sub/c.webp", "sub/deep/d.tif", "e.png", "f.jpg")
EDITED = ("a.png", "sub/b.jpg", "sub/c.webp", "sub/deep/d.png", "e.png", "f.jpg")
WRITING = {"open for writing", "write", "replace"}
LEFT = ".msbd-1-0.tmp"  # what the job that was ended before was writing


Case = tuple[int, tuple[str, str], str]  # the number of a call, its name and path, the fault
Cases = list[Case]


def make_jobs(folder: Path, model: Path) -> dict[str, Job]:
    """The jobs by their names; their pictures are written into `folder`, the models into `model`."""
    restore, edit = tools.restore.__main__, tools.edit
    flat, tree = write_pictures(folder / "flat", FLAT), write_pictures(folder / "tree", TREE)
    edited, masks = write_pictures(folder / "edited", EDITED), write_masks(folder / "masks", (*EDITED, *FLAT))
    bundle = write_tiny_bundle(model / "bundle")
    pasd = ("--model", str(write_pasd_folder(model / "pasd")), "--base", str(bundle))
    nets = (*QUICK, *pasd, "--steps", "2", "--scale", "2", "-p", "a red house")
    on_flat, on_tree = ("-i", str(flat)), ("-i", str(tree), "--recursive")
    on_edited = ("-i", str(edited), "--recursive", "-m", str(masks))
    prompted = ("-p", "a blue ball", "--model", str(bundle), *QUICK)
    return {
        "restore": Job(restore, (*on_flat, *BICUBIC), FLAT),
        "restore with nets": Job(
            restore, (*on_tree, *nets, "--format", "same", "--compare", "COMPARE"), TREE
        ),
        "edit": Job(edit, (*on_edited, *prompted, "--compare", "COMPARE"), EDITED),
        "restore, ended once before": Job(restore, (*on_flat, *BICUBIC), FLAT, halfway=True),
    }


@dataclass
class Report:
    """What was found."""

    calls: dict[str, Counter[str]] = field(default_factory=dict)  # job -> how often each call is made
    tried: dict[str, Counter[str]] = field(default_factory=dict)  # job -> runs with each fault
    ended: Counter[str] = field(default_factory=Counter)  # how the runs with a fault ended
    faults: list[str] = field(default_factory=list)

    @property
    def points(self) -> int:
        """Calls, of all jobs, that had each fault."""
        return sum(calls.total() for calls in self.calls.values())


# ---- one run -----------------------------------------------------------------------------------------------


def make_halfway(place: Place) -> Path:
    """The results of a run that was ended when three pictures were done."""
    place.clear()
    assert place.run() == 0
    results, halfway = place.out / "results", place.root / "halfway"
    lines = (results / "msbd.jsonl").read_bytes().splitlines(keepends=True)
    (results / "msbd.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:40])
    for name in FLAT[4:]:
        (results / name).unlink()
    (results / LEFT).write_bytes((results / FLAT[3]).read_bytes()[:50])
    shutil.copytree(place.out, halfway)
    return halfway


# ---- what is expected --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expected:
    """What an undisturbed run gives, and what the folders of the inputs hold."""

    results: dict[str, bytes]
    inputs: dict[str, tuple[bytes, int]]


def state_of(folder: Path) -> dict[str, tuple[bytes, int]]:
    """What every file holds, and when it was changed."""
    return {name: (data, (folder / name).stat().st_mtime_ns) for name, data in files_of(folder).items()}


def inputs_of(root: Path) -> dict[str, tuple[bytes, int]]:
    """The state of the pictures and masks."""
    return {
        f"{folder}/{name}": state
        for folder in ("flat", "tree", "edited", "masks")
        for name, state in state_of(root / folder).items()
    }


def check_broken(place: Place, expected: Expected, code: int, call: tuple[str, str], fault: str) -> list[str]:
    """What is wrong after a run with a fault: anything but whole files under final names, and one line for
    each error, among them one that names the file on which the call failed.
    """
    wrong, results = [], results_of(place.out)
    wrong += [f"{name}: not as in an undisturbed run" for name in _others(results, expected.results)]
    wrong += ["inputs were changed"] if inputs_of(place.root) != expected.inputs else []
    if fault.startswith("killed"):
        return wrong + ([f"exit code {code} where it was to be killed"] if code != KILLED else [])
    lines = place.lines()
    wrong += [f"said {line!r}" for line in lines if not SAID.fullmatch(line)]
    left = results.keys() - _whole(results).keys() - {f"results/{LEFT}"}
    if left and call[0] != "unlink":
        wrong.append(f"left over: {sorted(left)}")
    if code not in (0, 1):
        wrong.append(f"exit code {code}")
    if code == 0 and _whole(results) != expected.results:
        wrong.append("exit code 0, and not all results are there")
    if code == 0:
        wrong += faults_of_manifest(place.results, place.images, set(place.job.images))
    if fault == "short" and code != 0:
        wrong.append(f"exit code {code}, where only a part was written at first")
    if code == 1 and fault != "short":
        errors = [line for line in lines if line.startswith("error: ")]
        files = [call[1], f"{place.out.name}/results/msbd.jsonl"][: 1 + (fault == "full")]
        if not any(_names(line, place, file) for line in errors for file in files):
            wrong.append(f"no error names {call[1]}: {errors}")
    return wrong


def check_others(place: Place, made: list[tuple[str, str]]) -> list[str]:
    """What is wrong where a call failed for a picture, the last of those that were `made`: but this one
    picture all are there.
    """
    read = [path for call, path in made if call == "read" and (place.root / path).suffix != ".jsonl"]
    if not read:  # pictures were looked for, none was begun
        return []
    there = {Path(name).stem for name in _whole(results_of(place.results))}
    lost = len(place.job.images) - len(there)
    last = place.lines()[-1]
    one = re.fullmatch(r"error: 1 of \d+ pictures failed; see above", last)
    return [] if one and lost <= 1 else [f"{lost} results are missing; the last line is {last!r}"]


def check_resumed(place: Place, expected: Expected, code: int) -> list[str]:
    """What is wrong after --resume: anything but the results of an undisturbed run, and nothing else."""
    wrong, results = [], results_of(place.out)
    wrong += [f"exit code {code}"] if code != 0 else []
    if results != expected.results:
        names = sorted(name for name in expected.results if results.get(name) != expected.results[name])
        wrong.append(f"other results: {names}, left over: {sorted(results.keys() - expected.results.keys())}")
    wrong += ["inputs were changed"] if inputs_of(place.root) != expected.inputs else []
    wrong += [f"said {line!r}" for line in place.lines() if not SAID.fullmatch(line)]
    wrong += faults_of_manifest(place.out / "results", place.images, set(place.job.images))
    return wrong


def _whole(results: dict[str, bytes]) -> dict[str, bytes]:
    """Without what is written under a name of its own, which a failed call can leave."""
    return {name: data for name, data in results.items() if not name.endswith(".tmp")}


def _others(results: dict[str, bytes], expected: dict[str, bytes]) -> list[str]:
    return [name for name, data in _whole(results).items() if expected.get(name) != data]


def _names(line: str, place: Place, path: str) -> bool:
    """Whether an error names a file, or, of one under a name of its own, one that is written beside it."""
    whole = place.root / path
    if whole.suffix == ".tmp":
        return str(whole.parent) in line and ".tmp" not in line
    return str(whole) in line


# ---- all of them -------------------------------------------------------------------------------------------


def run_job(name: str, job: Job, root: Path, report: Report, draw: Callable[[Cases], Cases]) -> None:
    """Every call and fault of a job that is drawn of all."""
    place = Place(job, root, 0)
    warm_up(place, root / "flat")
    halfway = make_halfway(place) if job.halfway else None
    again = ("--resume",) if job.halfway else ()
    place.clear()
    if place.run():
        raise RuntimeError("\n".join(place.lines()))
    expected = Expected(results_of(place.out), inputs_of(root))
    place.clear(halfway)
    told, counter = root.parent / "told.json", Calls(root)
    assert place.run(*again, fault=counter, told=told) == 0, place.lines()
    assert results_of(place.out) == expected.results
    answer = json.loads(told.read_text())
    made, heard = [(call, path) for call, path in answer["counted"][0]], answer["counted"][1]
    opened = sum(call.startswith("open") for call, _ in made)
    if opened != heard:
        report.faults.append(f"{name}: {heard} files were opened, and {opened} counted")
    for module in answer["modules"]:
        if module.split(".")[0] in ("msbd", "nets", "samplers", "tools", "weights", "PIL", "pyvips", "numpy"):
            importlib.import_module(module)
    report.calls[name] = Counter(call for call, _ in made)
    report.tried[name] = Counter()
    places = enumerate(made, 1)
    cases = draw([(number, call, fault) for number, call in places for fault in faults_of(call[0])])

    def tried(place: Place, case: Case) -> tuple[int, str, str, list[str]]:
        return try_case(place, expected, made, halfway, again, case[0], case[2])

    for number, fault, how, wrong in in_forks(job, root, cases, tried):
        report.tried[name][fault] += 1
        report.ended[how] += 1
        call, path = made[number - 1]
        report.faults += [f"{name}, call {number} ({call} {path}), {fault}: {what}" for what in wrong]


def try_case(
    place: Place,
    expected: Expected,
    made: list[tuple[str, str]],
    halfway: Path | None,
    again: tuple[str, ...],
    number: int,
    fault: str,
) -> tuple[int, str, str, list[str]]:
    """The run with a fault in call `number`, and the run that resumes it: how the first ended, and all that
    is wrong.
    """
    place.clear(halfway)
    call = made[number - 1]
    path = re.sub(r"^out-\d+", place.out.name, call[1])
    code = place.run(*again, fault=Calls(place.root, number, fault))
    wrong = check_broken(place, expected, code, (call[0], path), fault)
    if code == 1 and fault in ("EIO", "ENOSPC") and not path.endswith(".jsonl"):
        wrong += check_others(place, made[:number])
    wrong = [f"broken: {what}" for what in wrong]
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    code = place.resume()
    wrong += [f"resumed: {what}" for what in check_resumed(place, expected, code)]
    return number, fault, how, wrong


def some(cases: Cases, share: float, chance: random.Random) -> Cases:
    """A share of the cases, at random, but some of each kind of writing call and of file."""
    kinds: dict[tuple[str, ...], Cases] = {}
    for case in cases:
        _, (call, path), fault = case
        kind = (call, Path(path).suffix, fault) if call in WRITING else ()
        kinds.setdefault(kind, []).append(case)
    drawn = [chance.sample(alike, math.ceil(share * len(alike))) for alike in kinds.values()]
    return sorted(case for part in drawn for case in part)


def run(jobs: Sequence[str] = (), share: float = 1, seed: int = 0, call: int = 0, fault: str = "") -> Report:
    """Every fault of every call of `jobs` (all of them), or a `share` of these, drawn with `seed`; or one."""
    torch.set_num_threads(1)
    report, chance = Report(), random.Random(seed)
    with tempfile.TemporaryDirectory(dir=MEMORY if os.access(MEMORY, os.W_OK) else None) as scratch:
        root = Path(scratch, "job")
        root.mkdir()
        made = make_jobs(root, Path(scratch))

        def draw(cases: Cases) -> Cases:
            if call or fault:
                return [case for case in cases if call in (0, case[0]) and fault in ("", case[2])]
            return some(cases, share, chance)

        with quick_pipelines():
            for name, job in made.items():
                if jobs and name not in jobs:
                    continue
                with prepared_once(Place(job, root, 0)):
                    run_job(name, job, root, report, draw)
    return report


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--job", action="append", default=[], help="one of the jobs (default: all)")
    parser.add_argument("--call", type=int, default=0, metavar="N", help="the N-th call alone")
    parser.add_argument("--fault", choices=FAULTS, default="", help="this fault alone")
    parser.add_argument(
        "--share", type=float, default=1, metavar="X", help="a part of all, drawn with --seed"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the report goes")
    given = parser.parse_args()
    started = time.monotonic()
    report = run(given.job, given.share, given.seed, given.call, given.fault)
    print_report(report, time.monotonic() - started)
    if given.json:
        given.json.write_text(json.dumps(vars(report)))
    return 1 if report.faults else 0


def print_report(report: Report, seconds: float) -> None:
    """The figures of all runs, which took `seconds`."""
    for name, calls in report.calls.items():
        told = ", ".join(f"{call} {count}" for call, count in calls.most_common())
        print(f"{name}: {calls.total()} calls ({told})")
        runs = ", ".join(f"{fault} {count}" for fault, count in report.tried[name].items())
        print(f"  {report.tried[name].total():,} runs: {runs}")
    print("ended by " + ", ".join(f"{how} {count:,}" for how, count in report.ended.most_common()))
    print(f"{sum(tried.total() for tried in report.tried.values()):,} runs in {seconds:,.0f} s")
    for fault in report.faults:
        print(f"fault: {fault}")
    print(f"faults: {len(report.faults)}")


if __name__ == "__main__":
    sys.exit(main())
