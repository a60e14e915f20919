"""A tool that makes pictures, as the commands for many pictures know it, and what became of one."""

import argparse
import importlib
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

from .._cli import expected_failure
from .manifest import Record, hash_of, seen, settings_hash
from .tasks import Task

Tell = Callable[[Iterable[str]], None]  # takes notes on a picture


@dataclass(frozen=True)
class Made:
    """One picture that was made and written."""

    line: str  # what was made, in words
    input_hash: str
    input_seen: tuple[int, int]
    mask_hash: str | None = None
    mask_seen: tuple[int, int] | None = None
    lines: tuple[str, ...] = ()  # more words, of a picture that is the only one


@dataclass(frozen=True)
class Planned:
    """What would be made of one picture."""

    line: str
    lines: tuple[str, ...] = ()  # in place of `line`, of a picture that is the only one
    evaluations: int = 0
    notes: tuple[str, ...] = ()


class Tool(Protocol):
    """A command that was checked, but for its pictures; its nets are read for the first of them."""

    memory: str  # the way out where memory is short
    notes: list[str]
    part: str  # which of the pictures is being made, in front of its progress

    def __init__(self, args: argparse.Namespace) -> None: ...

    @staticmethod
    def one_task(args: argparse.Namespace) -> Task:
        """The picture of a command that names one, and where its result goes."""
        ...

    def settings(self, task: Task) -> dict[str, Any]:
        """All that changes the result of one picture, but for what its files hold, and the machine."""
        ...

    def plan(self, task: Task) -> Planned:
        """What would be made of one picture. ValueError or OSError."""
        ...

    def summary(self, evaluations: int) -> str:
        """How the pictures would be made, all of them."""
        ...

    def make(self, task: Task, tell: Tell) -> Made:
        """Read, make and write one picture; `tell` notes on it. ValueError or OSError."""
        ...


@dataclass(frozen=True)
class Opening:
    """How any process gets the tool of a command: a class, in a module, and the command line."""

    module: str
    name: str
    args: argparse.Namespace

    def __call__(self) -> Tool:
        """The tool. ValueError or OSError."""
        return getattr(importlib.import_module(self.module), self.name)(self.args)


@contextmanager
def warnings_told(tell: Tell) -> Iterator[None]:
    """Let warnings within be notes on the picture that is being made, each once."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        finally:
            tell(dict.fromkeys(" ".join(str(warning.message).split()) for warning in caught))


def attempt(tool: Tool, task: Task, args: argparse.Namespace) -> Record:
    """Make one picture, and say what became of it. With --debug every error is raised."""
    start, notes = time.perf_counter(), []
    record = failed(task, args, None)
    try:
        if task.error:
            raise ValueError(task.error)
        for path in (*task.files, *filter(None, [task.stages])):
            path.parent.mkdir(parents=True, exist_ok=True)
        settings = settings_hash(tool.settings(task))
        with warnings_told(notes.extend):
            made = tool.make(task, notes.extend)
        files = {"input": made.input_seen, "mask": made.mask_seen, "output": seen(task.output)}
        record = replace(
            record,
            status="done",
            input_hash=made.input_hash,
            mask_hash=made.mask_hash,
            output_hash=hash_of(task.output),
            settings_hash=settings,
            made=made.line,
            seen={name: size for name, size in files.items() if size},
        )
    except Exception as error:
        if args.debug:
            raise
        record = replace(record, error=error_line(error, task, tool.memory))
    seconds = round(time.perf_counter() - start, 3)
    return replace(record, seconds=seconds, time=time.time(), notes=tuple(notes))


def failed(task: Task, args: argparse.Namespace, why: str | None) -> Record:
    """What is to be said of a picture that could not be made."""
    output = task.output.relative_to(args.output).as_posix()
    return Record(task.name, "failed", output, task.seed, error=why, time=time.time())


def error_line(error: Exception, task: Task, way_out: str) -> str:
    """An error in one line that names the picture."""
    message = expected_failure(error, way_out)
    if message is None:
        message = (
            f"{type(error).__name__}: {error}: a fault of this program; --debug shows where, please report it"
        )
    message = " ".join(message.split())
    return message if task.image.name in message else f"{task.image}: {message}"
