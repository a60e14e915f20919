"""That the counted calls are those which a process makes, and that each fault does what it says."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.forks import KILLED, code_of
from tests.faults.io_calls import Calls

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the calls are made in a fork")

DATA = b"0123456789"
CALLS = [
    "mkdir",
    "open for writing",
    "write",
    "fsync",
    "close",
    "replace",
    "stat",
    "open",
    "read",
    "read",
    "close",
]


def work(folder: Path) -> None:
    """Some calls."""
    (folder / "sub").mkdir()
    with open(folder / "sub" / "new", "wb", buffering=0) as file:
        file.write(DATA)
        os.fsync(file.fileno())
    os.replace(folder / "sub" / "new", folder / "sub" / "file")
    assert (folder / "sub" / "file").exists()
    with open(folder / "sub" / "file", "rb", buffering=0) as file:
        assert file.readall() == DATA and file.read(1) == b""
    assert Path(__file__).exists() and Path(__file__).read_bytes()  # elsewhere


def forked(act: Callable[[], int]) -> int:
    """The exit code of a process that does this; 70 where it raises."""
    if process := os.fork():
        return code_of(process)
    code = 70
    try:
        code = act()
    finally:
        os._exit(code)


def worked(folder: Path, at: int, fault: str) -> int:
    """The exit code of a process that works with a fault: 0, or the number of the error that it got."""

    def act() -> int:
        calls = Calls(folder, at, fault)
        calls.install()
        try:
            work(folder)
        except OSError as error:
            return error.errno or 70
        return 0

    return forked(act)


def test_every_call_below_the_folder_is_counted_and_no_other(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()

    def act() -> int:
        calls = Calls(tmp_path / "in")
        calls.install()
        work(tmp_path / "in")
        (tmp_path / "told").write_text(json.dumps(calls.counted()))
        return 0

    assert forked(act) == 0
    made, opened = json.loads((tmp_path / "told").read_text())
    assert [name for name, _ in made] == CALLS and opened == 2
    assert {path for _, path in made} == {"sub", "sub/new", "sub/file"}


@pytest.mark.parametrize("at", range(1, len(CALLS) + 1))
def test_a_call_fails_once_or_ends_the_process(at: int, tmp_path: Path) -> None:
    def there(fault: str, code: int) -> dict[str, bytes]:
        folder = tmp_path / fault
        folder.mkdir()
        assert worked(folder, at, fault) == code
        return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    name = CALLS[at - 1]
    failed = there("EIO", errno.EIO)
    assert (there("ENOSPC", errno.ENOSPC) == failed) and (failed == {"new": DATA[:5]}) == (name == "write")
    before, after = there("killed before", KILLED), there("killed after", KILLED)
    changes = {"open for writing": ({}, {"new": b""}), "write": ({"new": b""}, {"new": DATA}),
               "replace": ({"new": DATA}, {"file": DATA})}  # fmt: skip
    assert (before, after) == changes.get(name, (before, before))
    if name == "write":
        assert there("killed halfway", KILLED) == {"new": DATA[:5]}
        assert there("short", 70) == {"file": DATA[:5]}  # as work says, which takes no care


def test_a_full_disk_stays_full_and_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "old").write_bytes(DATA)

    def act() -> int:
        Calls(tmp_path, 1, "full").install()
        failed = 0
        for name in ("a", "b"):
            try:
                (tmp_path / name).write_bytes(DATA)
            except OSError as error:
                failed += error.errno == errno.ENOSPC
        return failed if (tmp_path / "old").read_bytes() == DATA else 70

    assert forked(act) == 2
