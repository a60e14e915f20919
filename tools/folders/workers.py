"""Pictures beside each other: processes of one machine, each with the nets in its memory.

Every picture is made by the same code with as many threads as in one process, so that it has the same bytes.
A process that dies, short of memory say, is replaced and its picture tried once more.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

from msbd.files import remove_leftovers

from .._cli import Ended, ending_cleanly
from .manifest import Record
from .tasks import Task
from .tool import Opening, attempt, failed

TRIES = 2  # of a picture whose process dies
PATIENCE = 5  # seconds that a process gets to end by itself


def records(opening: Opening, tasks: Sequence[Task], count: int) -> Generator[Record]:
    """What becomes of each task, by `count` processes, in the order in which they are finished."""
    waiting = deque((task, 1) for task in tasks)
    workers = [_Worker(opening, number) for number in range(count)]
    try:
        while waiting or any(worker.task for worker in workers):
            for worker in workers:
                if waiting and worker.task is None:
                    worker.start(*waiting.popleft())
            for ready in wait([worker.connection for worker in workers if worker.task]):
                worker = next(worker for worker in workers if worker.connection is ready)
                task, tries = worker.task, worker.tries
                assert task is not None
                try:
                    record = worker.result()
                except EOFError:
                    how = worker.restart()
                    remove_leftovers({path.parent for path in task.files})
                    if tries < TRIES:
                        waiting.appendleft((task, tries + 1))
                        continue
                    record = lost(opening, task, f" ({how})")
                yield record
    finally:
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            worker.end()


class _Worker:
    """A process, and the task that it works on."""

    def __init__(self, opening: Opening, number: int) -> None:
        self._opening, self._number = opening, number
        self.task: Task | None = None
        self.tries = 0
        self.process, self.connection = self._new()

    def _new(self) -> tuple[SpawnProcess, Connection]:
        context = multiprocessing.get_context("spawn")  # a fork of threads and of CUDA does not work
        ours, its = context.Pipe()
        process = context.Process(target=_work, args=(self._opening, self._number, its), daemon=True)
        # More threads than cores would wait for each other in a loop that keeps the cores from working.
        before = os.environ.get("OMP_WAIT_POLICY")
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        try:
            process.start()
        finally:
            if before is None:
                del os.environ["OMP_WAIT_POLICY"]
            else:
                os.environ["OMP_WAIT_POLICY"] = before
        its.close()  # so that its end is seen here
        return process, ours

    def start(self, task: Task, tries: int) -> None:
        self.task, self.tries = task, tries
        with suppress(OSError):  # it has died: `result` tells
            self.connection.send(task)

    def result(self) -> Record:
        """What became of the task. EOFError where the process has died; any error that it raised."""
        try:
            answer = self.connection.recv()
        except OSError as error:
            raise EOFError from error
        self.task = None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def restart(self) -> str:
        """Take another process in place of one that has died; how that ended."""
        self.end()
        code = self.process.exitcode or 0
        self.task = None
        self.process, self.connection = self._new()
        return ended(code)

    def end(self) -> None:
        end(self.process)
        self.connection.close()


def end(process: SpawnProcess) -> None:
    """Wait for a process to end by itself, or make it."""
    process.join(PATIENCE)
    if process.is_alive():
        process.kill()
        process.join()


def ended(code: int) -> str:
    """An exit code, or a signal that has one below 0, in words."""
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def lost(opening: Opening, task: Task, how: str) -> Record:
    """What is to be said of a picture whose process died at every try; `how`, in brackets or empty."""
    why = f"{task.image}: the process that made it died {TRIES} times{how}; is there enough memory?"
    return failed(task, opening.args, why)


def _work(opening: Opening, number: int, connection: Connection) -> None:
    """A worker process: makes what it is told to until nothing comes any more."""
    end_with_parent()
    opening.args.quiet = True  # bars of several would be mixed
    with suppress(EOFError, OSError, Ended), ending_cleanly():
        try:
            _take_device(number)
            tool = opening()
        except Exception as error:
            connection.send(error)
            return
        while True:
            task = connection.recv()
            try:
                answer: Record | Exception = attempt(tool, task, opening.args)
            except Exception as error:  # with --debug
                answer = error
            connection.send(answer)


def end_with_parent() -> None:
    """Have this process end when its parent does, which would else write on, and not by Ctrl-C, which reaches
    all of them: the parent ends the others.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _take_device(number: int) -> None:
    """Have the GPUs of this machine taken in turn."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())
