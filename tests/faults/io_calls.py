"""The N-th I/O call of a process fails or ends it: SQLite's method (sqlite.org/testing.html, "I/O Error
Testing" and "Crash Testing").

`Calls.install` puts counted functions in the place of those by which Python code reaches files: the functions
of `os` that take a path or a file's number, `open` and all that the files which it gives read, write and
close, and `fcntl.flock`. Only what concerns a folder is counted. It is for a process that was forked for this
and ends soon: nothing is put back.

Not covered: what a library opens in C (nothing in a folder's job does: pictures are read and encoded in
memory), the entries that a listing gives after it was opened, and `lseek`. What a kill loses of the system's
cache is not covered either: files are as the calls left them, whether or not they were on the disk by then.
`opened` gathers from Python's audit events what was opened, to compare with what was counted.
"""

import builtins
import errno
import io
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows, which has no fork either
    fcntl: Any = None

PATHS = (
    "access", "chmod", "link", "listdir", "lstat", "mkdir", "open", "readlink", "remove", "rename", "replace",
    "rmdir", "scandir", "stat", "statvfs", "symlink", "truncate", "unlink", "utime",
)  # fmt: skip
NUMBERS = ("close", "fdatasync", "fstat", "fsync", "ftruncate", "pread", "pwrite", "read", "write")
ROOM = {"open for writing", "mkdir", "write", "fsync"}  # calls that a full disk can fail

# What becomes of the call: it fails once; it and all later ones that need room fail; the process is killed
# before it, after it, or when half of the bytes are written; half of them are written, which is no error.
EVERY_CALL = ("EIO", "ENOSPC", "killed before", "killed after")
WRITES = ("killed halfway", "short")
FAULTS = (*EVERY_CALL, "full", *WRITES)


def faults_of(name: str) -> tuple[str, ...]:
    """The faults that a call of this name can have."""
    return EVERY_CALL + ("full",) * (name in ROOM) + WRITES * (name == "write")


class Calls:
    """The I/O calls of this process below a folder, and the fault that one of them has."""

    def __init__(self, folder: Path, at: int = 0, fault: str = "") -> None:
        self.folder = os.path.join(os.path.abspath(folder), "")
        self.at, self.fault = at, fault
        self.made: list[tuple[str, str]] = []  # the call's name, and the path below the folder
        self.numbers: dict[int, str] = {}  # open files
        self.opened = 0  # as Python's audit events tell

    def below(self, path: Any) -> str | None:
        """The path as it is below the folder; None for another. A number is that of an open file."""
        if isinstance(path, int):
            return self.numbers.get(path)
        try:
            path = os.path.abspath(os.fsdecode(path))
        except TypeError:
            return None
        return path[len(self.folder) :] if path.startswith(self.folder) else None

    def reached(self) -> bool:
        """Whether the call that has the fault was made."""
        return 0 < self.at <= len(self.made)

    def counted(self) -> Any:
        """The calls, and how many of them opened a file by what Python's audit events tell."""
        return self.made, self.opened

    def install(self) -> None:
        """Count, and fail, what this process does from now on."""
        for name in PATHS + NUMBERS:
            if hasattr(os, name):
                setattr(os, name, _counted(self, name, getattr(os, name)))
        builtins.open = io.open = _counted_open(self, io.open)
        if fcntl is not None:
            fcntl.flock = _counted(self, "flock", fcntl.flock)
        sys.addaudithook(self._heard)

    def _heard(self, event: str, words: Any) -> None:
        if event == "open" and not isinstance(words[0], int) and self.below(words[0]) is not None:
            self.opened += 1

    def call(
        self, name: str, path: str, act: Callable[[], Any], *, half: Callable[[], Any] | None = None
    ) -> Any:
        """Make a call, with the fault if it is its turn; `half` does the first half of it."""
        self.made.append((name, path))
        fault = self.fault if len(self.made) == self.at else ""
        if self.fault == "full" and self.reached() and name in ROOM:
            fault = "ENOSPC"
        if fault in ("EIO", "ENOSPC"):
            if half is not None:
                half()
            if name == "close":
                act()  # the file is closed all the same
            number = errno.EIO if fault == "EIO" else errno.ENOSPC
            raise OSError(number, os.strerror(number))
        if fault == "killed before":
            kill()
        if fault in ("killed halfway", "short"):
            assert half is not None
            written = half()
            if fault == "killed halfway":
                kill()
            return written
        try:
            return act()
        finally:
            if fault == "killed after":
                kill()


def kill() -> None:
    """End this process as the system does where memory is short: nothing is cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)


class _File(io.FileIO):
    """A file whose every call is counted."""

    def __init__(self, calls: Calls, file: Any, mode: str, closefd: bool, opener: Any) -> None:
        self._calls, self._below = calls, calls.below(file) or ""
        start = super().__init__
        if isinstance(file, int):
            start(file, mode, closefd, opener)
            return
        name = "open" if mode == "r" else "open for writing"
        _named(file, lambda: calls.call(name, self._below, lambda: start(file, mode, closefd, opener)))

    def readinto(self, buffer: Any) -> Any:
        return self._calls.call("read", self._below, lambda: super(_File, self).readinto(buffer))

    def readall(self) -> Any:
        return self._calls.call("read", self._below, super().readall)

    def read(self, size: int | None = -1) -> Any:
        return self._calls.call("read", self._below, lambda: super(_File, self).read(size))

    def write(self, data: Any) -> Any:
        write = super().write
        first = bytes(data)[: len(bytes(data)) // 2]
        return self._calls.call("write", self._below, lambda: write(data), half=lambda: write(first))

    def truncate(self, size: int | None = None) -> Any:
        return self._calls.call("truncate", self._below, lambda: super(_File, self).truncate(size))

    def fileno(self) -> int:
        number = super().fileno()
        self._calls.numbers[number] = self._below
        return number

    def close(self) -> None:
        if self.closed:
            return
        self._calls.numbers.pop(super().fileno(), None)
        self._calls.call("close", self._below, super().close)


def _named(path: Any, act: Callable[[], Any], other: Any = None) -> Any:
    """`act()`, whose error names the path, as those of the system's calls that take one do."""
    try:
        return act()
    except OSError as error:
        if error.filename is None and not isinstance(path, int):
            error.filename = os.fspath(path)
            if other is not None:
                error.filename2 = os.fspath(other)
        raise


def _counted_open(calls: Calls, plain: Callable[..., Any]) -> Callable[..., Any]:
    def counted(
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        closefd: bool = True,
        opener: Any = None,
    ) -> Any:
        if calls.below(file) is None:
            return plain(file, mode, buffering, encoding, errors, newline, closefd, opener)
        raw = _File(calls, file, mode.replace("b", "").replace("t", ""), closefd, opener)
        if buffering == 0:
            return raw
        size = buffering if buffering > 1 else io.DEFAULT_BUFFER_SIZE
        if "+" in mode:
            file = io.BufferedRandom(raw, size)
        else:
            file = io.BufferedReader(raw, size) if "r" in mode else io.BufferedWriter(raw, size)
        return file if "b" in mode else io.TextIOWrapper(file, encoding, errors, newline)

    return counted


def _counted(calls: Calls, name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    def counted(path: Any = ".", *rest: Any, **named: Any) -> Any:
        if (below := calls.below(path)) is None:
            return plain(path, *rest, **named)
        other = rest[0] if name in ("rename", "replace", "link", "symlink") else None
        what, half = name, None
        if name == "open" and rest and rest[0] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            what = "open for writing"
        if name == "write":
            half = lambda: plain(path, bytes(rest[0])[: len(rest[0]) // 2])  # noqa: E731
        if name == "close":
            del calls.numbers[path]
        act = lambda: plain(path, *rest, **named)  # noqa: E731
        try:
            result = _named(path, lambda: calls.call(what, below, act, half=half), other)
        except OSError:
            if name == "access":  # which has no errors
                return False
            raise
        if name == "open":
            calls.numbers[result] = below
        return result

    return counted
