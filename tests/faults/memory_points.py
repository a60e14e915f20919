"""Every allocation of the nets in one picture of a folder fails, one in each run; then the job is resumed.

  python -m tests.faults.memory_points                              # every job and allocation
  python -m tests.faults.memory_points --job edit --allocation 17   # one

The nets are real and tiny. An allocation is an operation of PyTorch with a result that is no view, while a
pipeline works; it raises what a GPU raises, and at every other one what a CPU does. Either the product takes
less at once, and says so, or it tells in one line which picture failed and what to do. For Linux and macOS.
"""

import argparse
import contextlib
import functools
import io
import json
import os
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import msbd.load
import tools.edit
import tools.restore.__main__
from msbd.edit.pipeline import EditPipeline
from msbd.restore.pipeline import RestorePipeline
from tests.faults.forks import MEMORY, SAID, Job, Place, in_forks, prepared_once, warm_up
from tests.helpers.folder_jobs import QUICK, faults_of_manifest, results_of, write_masks, write_pictures
from tests.helpers.tiny_bundle import write_pasd_folder, write_tiny_bundle

NAMES = ("a.png", "b.png")  # allocations of the first fail
SIZE = (16, 80)  # pixels, (H, W): two tiles of a restoration
# A batch of another size sums in another order: one level of 255.
NEAR = 1


class Allocations(TorchDispatchMode):
    """The allocations of the pipelines in this process, of which one fails."""

    def __init__(self, at: int = 0, picture: int = 1) -> None:
        super().__init__()
        self.at, self.made = at, 0
        self.until, self.pictures = picture, 0  # counted up to this picture

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(result.alias_info is None for result in func._schema.returns):
            self.made += 1
            if self.made == self.at and self.at % 2:
                raise torch.OutOfMemoryError("CUDA out of memory. It is pretended")
            if self.made == self.at:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: it is pretended")
        return func(*args, **(kwargs or {}))

    def reached(self) -> bool:
        """Whether the allocation that fails was asked for."""
        return 0 < self.at <= self.made

    def counted(self) -> int:
        """How many there were."""
        return self.made

    def install(self) -> None:
        """Count, and fail, what pipelines allocate from now on."""
        for kind in (EditPipeline, RestorePipeline):
            kind.__call__ = self._watched(kind.__call__)  # type: ignore[method-assign]

    def _watched(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def watched(*args: Any, **named: Any) -> Any:
            self.pictures += 1
            if self.pictures > self.until:
                return call(*args, **named)
            with self:
                return call(*args, **named)

        return watched


def make_jobs(folder: Path, model: Path) -> dict[str, Job]:
    """The jobs by their names; their pictures are written into `folder`, the models into `model`."""
    images = write_pictures(folder / "in", NAMES, size=SIZE)
    masks, bundle = write_masks(folder / "masks", NAMES, size=SIZE), write_tiny_bundle(model / "bundle")
    of_pasd = ("--model", str(write_pasd_folder(model / "pasd")), "--base", str(bundle))
    restore = (*of_pasd, "--process-size", "16", "--tile", "64", "--tile-overlap", "0", "--scale", "1")
    edit = ("-m", str(masks), "-p", "a blue ball", "--model", str(bundle), "--repaint-steps", "0")
    edit += ("--first-stage-batch", "2", "--candidates-kept", "1", "--clip-reranking", "--seam", "adam")
    common = (*QUICK, "--steps", "1")
    return {
        "restore": Job(tools.restore.__main__, ("-i", str(images), *restore, *common), NAMES),
        "edit": Job(tools.edit, ("-i", str(images), *edit, "--decoderopt-steps", "1", *common), NAMES),
    }


@contextlib.contextmanager
def loaded_once() -> Iterator[None]:
    """Pipelines are read here, once for all forks."""
    pipelines: dict[str, Any] = {}

    def once(name: str, read: Callable[..., Any]) -> Callable[..., Any]:
        def loaded(*args: Any, **named: Any) -> Any:
            if name not in pipelines:
                pipelines[name] = read(*args, **named)
            return pipelines[name]

        return loaded

    with contextlib.ExitStack() as stack:
        for name in ("load_edit_pipeline", "load_restore_pipeline"):
            stack.enter_context(mock.patch.object(msbd.load, name, once(name, getattr(msbd.load, name))))
        yield


@dataclass
class Report:
    """What was found."""

    allocations: dict[str, int] = field(default_factory=dict)  # job -> of its first picture
    tried: dict[str, int] = field(default_factory=dict)
    ended: Counter[str] = field(default_factory=Counter)
    farthest: dict[str, int] = field(default_factory=dict)  # levels of 255, of results made with less at once
    faults: list[str] = field(default_factory=list)


def pixels(data: bytes) -> np.ndarray:
    """A picture's samples, (H, W, 3)."""
    with Image.open(io.BytesIO(data)) as picture:
        return np.asarray(picture).astype(int)


def try_case(
    place: Place, allocation: int, expected: dict[str, bytes], fixed: np.ndarray | None
) -> tuple[int, str, int, list[str]]:
    """The run in which an allocation fails, and the run that resumes it: how the first ended, how far its
    result is from an undisturbed run's, and all that is wrong. `fixed` (H, W) is where no result may differ.
    """
    place.clear()
    code, (first, second) = place.run(fault=Allocations(allocation)), NAMES
    results, lines = results_of(place.results), place.lines()
    wrong = [f"said {line!r}" for line in lines if not SAID.fullmatch(line)]
    if results.get(second) != expected[second]:
        wrong.append(f"{second} is not as in an undisturbed run")
    if results.keys() - expected.keys():
        wrong.append(f"left over: {sorted(results.keys() - expected.keys())}")
    how, far = f"exit code {code}", 0
    errors = [line for line in lines if line.startswith("error: ")]
    if code == 1:
        told = re.escape(f"error: {place.images / first}: out of memory; take ") + ".*--.*"
        if len(errors) != 2 or not re.fullmatch(told, errors[0]) or first in results:
            wrong.append(f"{first} failed, and the errors are {errors}")
    elif code == 0:
        difference = abs(pixels(results[first]) - pixels(expected[first]))
        far = int(difference.max())
        less = [line for line in lines if "out of memory" in line and line.startswith("note: ")]
        how += ", with less at once" if less else ""
        if errors or not less:
            wrong.append(f"made without a note, {far} levels away; errors {errors}")
        if fixed is not None and difference[fixed].any():
            wrong.append("other pixels outside the mask")
        if fixed is None and far > NEAR:
            wrong.append(f"other pixels by {far} levels")
    else:
        wrong.append(f"exit code {code}: {lines[-1:]}")
    resumed = place.resume()
    again = results_of(place.results)
    if resumed or again != (expected if code else results):
        wrong.append(f"resumed with exit code {resumed}, and other results")
    wrong += [f"resumed: {what}" for what in faults_of_manifest(place.results, place.images, set(NAMES))]
    return allocation, how, far, wrong


def run_job(name: str, job: Job, root: Path, report: Report, wanted: Callable[[int], bool]) -> None:
    """Every wanted allocation of a job."""
    place = Place(job, root, 0)
    warm_up(place, root / "in")
    told = root.parent / "told.json"
    code = place.run(fault=Allocations(), told=told)
    assert code == 0, place.lines()
    expected, count = results_of(place.results), json.loads(told.read_text())["counted"]
    fixed = None
    if name == "edit":
        with Image.open(root / "masks" / NAMES[0]) as mask:
            fixed = np.asarray(mask) < 128
    cases = [number for number in range(1, count + 1) if wanted(number)]

    def tried(place: Place, allocation: int) -> Any:
        return try_case(place, allocation, expected, fixed)

    answers = in_forks(job, root, cases, tried)
    report.allocations[name], report.tried[name] = count, len(cases)
    report.farthest[name] = max([far for _, _, far, _ in answers], default=0)
    for number, how, _, wrong in answers:
        report.ended[f"{name}: {how}"] += 1
        report.faults += [f"{name}, allocation {number}: {what}" for what in wrong]


def run(jobs: Sequence[str] = (), share: float = 1, seed: int = 0, allocation: int = 0) -> Report:
    """Every allocation of `jobs` (all of them), or a `share` of these, drawn with `seed`; or one."""
    torch.set_num_threads(1)
    report, chance = Report(), random.Random(seed)
    with tempfile.TemporaryDirectory(dir=MEMORY if os.access(MEMORY, os.W_OK) else None) as scratch:
        root = Path(scratch, "job")
        root.mkdir()
        with loaded_once():
            for name, job in make_jobs(root, Path(scratch)).items():
                if not jobs or name in jobs:
                    with prepared_once(Place(job, root, 0)):
                        wanted = lambda number: chance.random() < share and allocation in (0, number)  # noqa: E731
                        run_job(name, job, root, report, wanted)
    return report


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--job", action="append", default=[], help="one of the jobs (default: all)")
    parser.add_argument("--allocation", type=int, default=0, metavar="N", help="the N-th alone")
    parser.add_argument(
        "--share", type=float, default=1, metavar="X", help="a part of all, drawn with --seed"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the report goes")
    given = parser.parse_args()
    started = time.monotonic()
    report = run(given.job, given.share, given.seed, given.allocation)
    for name, count in report.allocations.items():
        print(
            f"{name}: {count:,} allocations, {report.tried[name]:,} tried; {report.farthest[name]} levels away"
        )
    print("; ".join(f"{how} {count:,}" for how, count in report.ended.most_common()))
    print(f"{sum(report.tried.values()):,} runs in {time.monotonic() - started:,.0f} s")
    for fault in report.faults:
        print(f"fault: {fault}")
    print(f"faults: {len(report.faults)}")
    if given.json:
        given.json.write_text(json.dumps(vars(report)))
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
