"""Folder jobs in processes that are forked from a warm one, in which all is imported and no thread runs.

For Linux and macOS.
"""

import contextlib
import gc
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, TypeVar
from unittest import mock

from tqdm import tqdm

from msbd import files
from msbd.pixels import vips
from tests.helpers.fuzzing import ROOT

Case = TypeVar("Case")

KILLED = -9  # exit code of a process that SIGKILL ended
NOT_REACHED, RAISED = 97, 98  # exit codes of a run whose fault never came, and of one with a traceback
DEADLINE = 60  # seconds that a run has
# What a command says line by line, if all is well or a picture fails.
SAID = re.compile(r"(note|error|warning): \S.*|\d+/\d+ \S.*|\d+ of \d+ pictures are there already")
MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Job:
    """A folder's job: its command, but for the folder of the results, and what it finds there."""

    tool: ModuleType
    words: tuple[str, ...]  # "-i" and the folder first; COMPARE stands for a folder beside the results
    images: tuple[str, ...]
    halfway: bool = False  # three pictures are done, one was being written, a line of the manifest is torn


class Fault(Protocol):
    """Something that happens in a process, once it is installed there."""

    def install(self) -> None:
        """Have it happen in this process."""
        ...

    def reached(self) -> bool:
        """Whether it has happened."""
        ...

    def counted(self) -> Any:
        """What was counted on the way there, for JSON."""
        ...


class Place:
    """Where runs of one job lie: inputs that all share, results of each, and what they said."""

    def __init__(self, job: Job, root: Path, number: int) -> None:
        self.job, self.root = job, root
        self.out, self.said = root / f"out-{number}", root.parent / f"said-{number}"
        self.images, self.results = Path(job.words[1]), self.out / "results"
        self._resumer: Connection | None = None

    def clear(self, halfway: Path | None = None) -> None:
        """Take the results away, or have those of an earlier run there."""
        shutil.rmtree(self.out, ignore_errors=True)
        if halfway is not None:
            shutil.copytree(halfway, self.out)

    def words(self) -> list[str]:
        """The command."""
        words = [str(self.out / "compare") if word == "COMPARE" else word for word in self.job.words]
        return [*words, "-o", str(self.results)]

    def start(self, *more: str, fault: Fault | None = None, told: Path | None = None) -> int:
        """The number of a process that does the job. `told` gets what was counted, and the modules that were
        imported.
        """
        words = [*self.words(), *more]
        if process := os.fork():
            return process
        code = RAISED
        try:
            self._begin()
            if fault is not None:
                fault.install()
            code = self.job.tool.main(words)
            if fault is not None and told is not None:
                told.write_text(json.dumps({"counted": fault.counted(), "modules": sorted(sys.modules)}))
            elif fault is not None and not fault.reached():
                code = NOT_REACHED
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def run(self, *more: str, fault: Fault | None = None, told: Path | None = None) -> int:
        """The exit code of a process that does the job; below 0 the number of the signal that ended it."""
        return code_of(self.start(*more, fault=fault, told=told))

    def _begin(self) -> None:
        """Have this process say what it says into a file, and end if the run takes too long."""
        signal.alarm(DEADLINE)
        file = os.open(self.said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(file, 2)
        os.dup2(file, 1)
        os.close(file)
        files._cleaned.clear()  # what this process, or its parent, has looked through

    def resume(self) -> int:
        """The exit code of the job with --resume, done by a process that resumes one run after the other: to
        fork one takes as long as the run.
        """
        if self._resumer is None:
            self._resumer = self._start_resumer()
        try:
            self._resumer.send("go on")
            return self._resumer.recv()
        except (EOFError, ConnectionError):
            self._resumer = None
            return RAISED

    def _start_resumer(self) -> Connection:
        """The connection to a new process, which ends when this one does."""
        ours, its = Pipe()
        if os.fork():
            its.close()
            return ours
        ours.close()
        try:
            while its.recv():  # EOFError where nobody asks any more
                self._begin()
                code = self.job.tool.main([*self.words(), "--resume"])
                signal.alarm(0)
                sys.stdout.flush()
                sys.stderr.flush()
                its.send(code)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(RAISED)

    def lines(self) -> list[str]:
        """What the last run said."""
        return self.said.read_text(errors="replace").splitlines()


def code_of(process: int) -> int:
    """Wait for a process; its exit code, or below 0 the number of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def report_of(module: str, folder: Path, *words: str) -> dict[str, Any]:
    """What a command of this folder reports, run by a process of one thread, which can be forked."""
    command = [sys.executable, "-m", f"tests.faults.{module}", "--json", str(folder / "report"), *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if not (folder / "report").exists():
        raise RuntimeError(done.stdout + done.stderr)
    return json.loads((folder / "report").read_text())


def in_forks(
    job: Job, root: Path, cases: Sequence[Case], work: Callable[[Place, Case], Any], processes: int = 0
) -> list[Any]:
    """What `work` gives for each case, in JSON, by processes beside each other (as many as the machine has
    processors), each with a place of its own.
    """
    workers, processes = [], processes or os.cpu_count() or 1
    for part in range(processes):
        answers = root.parent / f"answers-{part}"
        if worker := os.fork():
            workers.append((worker, answers))
            continue
        code = 1
        try:
            place = Place(job, root, part + 1)
            answers.write_text(json.dumps([work(place, case) for case in cases[part::processes]]))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    codes = [code_of(worker) for worker, _ in workers]
    if any(codes):
        raise RuntimeError("a process failed: see above")
    return [answer for _, answers in workers for answer in json.loads(answers.read_text())]


def warm_up(place: Place, images: Path) -> None:
    """Do the job here with a folder of PNGs, which need no libvips: its threads would not be forked."""
    words = place.words()
    words[1] = str(images)
    tqdm.monitor_interval = 0  # else it starts a thread
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        code = place.job.tool.main(words)
    if code or vips._process is not None or threading.active_count() > 1:
        raise RuntimeError("this process is not warm, or has threads")
    place.clear()
    gc.collect()
    gc.freeze()  # a collection in a fork would copy all memory


@contextlib.contextmanager
def prepared_once(place: Place) -> Iterator[None]:
    """What the command checks before it looks at pictures is checked here, once for all forks: the model."""
    tool = place.job.tool
    args = tool.build_parser().parse_args(place.words())
    ready = tool.prepare(args)
    tool.metadata(args, ready)  # whose hashes are kept
    with mock.patch.object(tool, "prepare", lambda args: ready):
        yield
