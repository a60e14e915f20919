"""What became of every picture of a folder, a line of JSON each, in the folder of the results.

A line is written once the result is on the disk, so that what it says is true whatever ends the process; of
several lines on one picture the last counts.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from msbd.files import naming

from .tasks import Task

NAME = "msbd.jsonl"


@dataclass(frozen=True)
class Record:
    """What became of one picture."""

    path: str  # the task's name
    status: str  # "done" or "failed"
    output: str  # below the folder of the results, with slashes
    seed: int | None = None
    input_hash: str | None = None  # SHA-256 of the files, 64 digits
    mask_hash: str | None = None
    output_hash: str | None = None
    settings_hash: str | None = None  # of all that changes the result, but for the files
    seconds: float = 0.0
    made: str | None = None  # what, in words
    error: str | None = None
    notes: tuple[str, ...] = ()
    time: float = 0.0  # when it was finished, seconds since 1970
    # File -> its bytes, and when it was last changed, in ns.
    seen: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        """Whether the result is there."""
        return self.status == "done"


def settings_hash(settings: Mapping[str, Any]) -> str:
    """The same 16 digits for the same settings."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def seen(path: Path) -> tuple[int, int]:
    """What tells at once that a file is as it was: its bytes, and its time of change in nanoseconds."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def hash_of(path: Path) -> str:
    """SHA-256 of a file, 64 hexadecimal digits. OSError."""
    with naming(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Manifest:
    """The records in a folder of results, in a file for all or for a `part` of the work; all are read."""

    def __init__(self, folder: Path, part: str = "") -> None:
        self.folder = folder
        self.path = folder / (f"msbd-{part}.jsonl" if part else NAME)
        self.damaged = 0  # lines that `read` could not

    def read(self) -> dict[str, Record]:
        """The last record of each picture. OSError."""
        records: dict[str, Record] = {}
        self.damaged = 0
        for path in sorted(self.folder.glob("msbd*.jsonl")):
            with naming(path):
                data = path.read_bytes()
            for line in data.split(b"\n"):
                if not line.strip():
                    continue
                if (record := record_of(line)) is None:
                    self.damaged += 1
                elif record.path not in records or record.time >= records[record.path].time:
                    records[record.path] = record
        return records

    def add(self, record: Record) -> None:
        """Write a record, and have it on the disk. OSError."""
        line = json.dumps(asdict(record)).encode() + b"\n"
        with naming(self.path), open(self.path, "ab+", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            if size:
                file.seek(size - 1)
                if file.read(1) != b"\n":  # the end of a process that was killed here
                    line = b"\n" + line
            _write_all(file, line)
            os.fsync(file.fileno())


def _write_all(file: Any, data: bytes) -> None:
    while data:
        data = data[file.write(data) :]


def record_of(line: bytes) -> Record | None:
    """The record of a line; None for a line that was cut off, or is none."""
    try:
        values = json.loads(line)
        names = {item.name for item in fields(Record)}
        sizes = {str(name): (int(size), int(time)) for name, (size, time) in values["seen"].items()}
        notes = tuple(str(note) for note in values["notes"])
        values = {name: value for name, value in values.items() if name in names}
        record = Record(**{**values, "seen": sizes, "notes": notes})
        words = all(isinstance(value, str) for value in (record.path, record.status, record.output))
        return record if words and record.time >= 0 and record.seconds >= 0 else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
        return None


def still_holds(record: Record, task: Task, settings: str, results: Path) -> bool:
    """Whether what `record` says is done is what `task` with these settings would do, and is still there."""
    if not record.done or record.settings_hash != settings or results / record.output != task.output:
        return False
    files = {"input": (task.image, record.input_hash), "output": (task.output, record.output_hash)}
    if task.mask is not None:
        files["mask"] = (task.mask, record.mask_hash)
    if not all(path.is_file() for path in task.files[1:]):
        return False
    return all(_unchanged(path, digest, record.seen.get(name)) for name, (path, digest) in files.items())


def _unchanged(path: Path, digest: str | None, before: Iterable[int] | None) -> bool:
    """Whether a file is what it was: at once by its size and time, else by what it holds."""
    try:
        return (before is not None and seen(path) == tuple(before)) or hash_of(path) == digest
    except OSError:
        return False
