"""Files that are written whole or not at all.

Copying  this file stands alone: the standard library only

weights/files.py has a `whole_file` of its own, since a leaf imports nothing but its siblings.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path, unfinished: Path | None = None) -> Iterator[Path]:
    """A path to write to, which then takes the place of `path`; where writing failed the old file is still
    there.

    It is `unfinished`, in the same folder, where one that was left behind by a killed process is to be
    overwritten by the next; by default a name that no other process has. What was written is on the disk
    before the old file goes.
    """
    unfinished = unfinished or path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield unfinished
        with unfinished.open("r+b") as file:  # Windows flushes only what may be written
            os.fsync(file.fileno())
        os.replace(unfinished, path)  # atomic within a folder
    finally:
        unfinished.unlink(missing_ok=True)  # gone already when all went well
