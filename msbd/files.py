"""Files that are written whole or not at all, in folders where a killed process leaves nothing for long.

Copying  this file stands alone: the standard library only

weights/files.py writes by a way of its own, since a leaf imports nothing but its siblings.
"""

import contextlib
import errno
import itertools
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, which does not remove a file that is open
    fcntl = None

TEMPORARY = re.compile(r"\.msbd-\d+-\d+\.tmp")
_DAY = 86400  # seconds
_numbers = itertools.count()
_cleaned: set[Path] = set()  # folders that this process has looked through for leftovers


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Have an OSError name `path` where it names no file, as those of reading and writing do not, or the
    short name under which `whole_file` writes.
    """
    try:
        yield
    except OSError as error:
        name = error.filename and os.path.basename(os.fsdecode(error.filename))
        if error.errno is not None and (name is None or TEMPORARY.fullmatch(name)):
            error.filename = str(path)
        raise


@contextlib.contextmanager
def whole_file(path: Path, unfinished: Path | None = None) -> Iterator[Path]:
    """A path to write to, which then takes the place of `path`; where writing failed the old file is still
    there. Where `path` is a link, what it leads to is replaced.

    The path is `unfinished`, in the same folder, where one that was left behind by a killed process is to be
    overwritten by the next; by default a short name that no other process has, `.msbd-PID-N.tmp`. What was
    written is on the disk before the old file goes, and its name before this returns. The first time that a
    process writes into a folder, what killed ones left there is removed. OSError, which names `path`.
    """
    named, path = path, Path(os.path.realpath(path))
    if path.parent not in _cleaned:
        _cleaned.add(path.parent)
        remove_leftovers([path.parent])
    with naming(named), contextlib.ExitStack() as stack:
        temporary = unfinished or stack.enter_context(_temporary(path.parent))
        stack.callback(remove, temporary)  # gone already when all went well
        yield temporary
        with temporary.open("r+b") as file:  # Windows flushes only what may be written
            os.fsync(file.fileno())
        os.replace(temporary, path)  # atomic within a folder
        sync_folder(path.parent)


@contextlib.contextmanager
def _temporary(folder: Path) -> Iterator[Path]:
    """A new file of this process in `folder`, locked: what has no lock is nobody's."""
    while True:
        path = folder / f".msbd-{os.getpid()}-{next(_numbers)}.tmp"
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:  # of an earlier process of this number, or of one on another machine
            continue
        with contextlib.ExitStack() as stack:
            stack.callback(_close, file)
            try:
                lock(file)
                # Another process may have taken it for a leftover before it was locked.
                ours = path.exists() and os.path.samestat(os.fstat(file), path.stat())
            except BaseException:
                remove(path)
                raise
            if fcntl is None:
                stack.close()
            if ours:
                yield path
                return


def lock(file: int) -> bool | None:
    """Lock an open file for this process: False if another process has it, None if nothing here locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return None
        raise
    return True


def _close(file: int) -> None:
    with contextlib.suppress(OSError):
        os.close(file)


def remove(path: Path) -> None:
    """Remove a file if it is there and can be removed."""
    with contextlib.suppress(OSError):
        path.unlink()


# What file systems say to what they do not know: locks, or a folder that is written to the disk.
_UNSUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK, errno.EBADF}


def sync_folder(folder: Path) -> None:
    """Have the names in `folder` on the disk, where its system does that. OSError."""
    if os.name != "posix":
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    finally:
        os.close(opened)


def remove_leftovers(folders: Iterable[Path]) -> int:
    """Remove from each of `folders` what killed processes left of `whole_file`; how many files those were.

    A file that a living process writes is locked, and stays; where nothing locks, one of the last day does.
    Whatever cannot be removed stays too.
    """
    removed = 0
    for folder in folders:
        names: list[str] = []
        with contextlib.suppress(OSError), os.scandir(folder) as entries:
            names = [entry.name for entry in entries if TEMPORARY.fullmatch(entry.name)]
        for name in names:
            with contextlib.suppress(OSError):
                removed += _remove_leftover(folder / name)
    return removed


def _remove_leftover(path: Path) -> bool:
    with contextlib.ExitStack() as stack:
        if fcntl is None:  # on Windows what is open can be removed by nobody
            locked = None
        else:
            file = os.open(path, os.O_RDWR)
            stack.callback(_close, file)
            locked = lock(file)
        if locked or (locked is None and time.time() - path.stat().st_mtime > _DAY):
            path.unlink()
            return True
    return False


def check_name(path: Path) -> None:
    """ValueError where the name of `path`, or all of it, is longer than its file system takes."""
    try:
        path.lstat()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            length = len(os.fsencode(path.name))
            raise ValueError(
                f"{path}: the name is too long for this file system ({length} bytes; most take 255, and 4,095 with all "
                "folders); take a shorter one"
            ) from None


def check_room(path: Path, size: int) -> None:
    """ValueError where the disk of `path`, whose folder need not be there yet, lacks `size` bytes of room."""
    folder = next(folder for folder in Path(os.path.realpath(path)).parents if folder.is_dir())
    free = shutil.disk_usage(folder).free
    if free < size:
        raise ValueError(
            f"{path}: may take {size / 1e6:,.1f} MB, and the disk has {free / 1e6:,.1f} MB free; make room, or "
            "write to another disk"
        )
