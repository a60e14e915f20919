"""Pictures in and out of a command: read once, with what libraries say of them; checked before the work."""

import contextlib
import hashlib
import io
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from msbd.files import check_room, naming

if TYPE_CHECKING:
    from msbd.pixels.files import Photo
    from msbd.pixels.mask_files import MaskFile

Picture = TypeVar("Picture")


class FileBytes(io.BytesIO):
    """What a file held when it was read: all that is made of it is made of one state of the file."""

    def __init__(self, path: Path) -> None:
        """FileNotFoundError, ValueError for a folder, OSError."""
        if not path.exists():
            raise FileNotFoundError(f"{path}: there is no such file")
        if path.is_dir():
            raise ValueError(f"{path}: a folder, not a readable picture; name a file")
        with naming(path), path.open("rb") as file:
            status = os.fstat(file.fileno())
            super().__init__(file.read())
        self.name = str(path)  # as files have it, for messages
        self.seen = status.st_size, status.st_mtime_ns
        self.digest = hashlib.sha256(self.getbuffer()).hexdigest()


def read_photo(file: FileBytes) -> "Photo":
    """`msbd.pixels.files.load_image`, with what libraries write to stderr as a note."""
    from msbd.pixels.files import load_image

    photo, said = _heard(lambda: load_image(file))
    return replace(photo, notes=(*photo.notes, *said))


def read_mask(file: FileBytes, *, invert: bool, from_alpha: bool) -> "MaskFile":
    """`msbd.pixels.mask_files.read_mask`, with what libraries write to stderr as a note."""
    from msbd.pixels import mask_files

    mask, said = _heard(lambda: mask_files.read_mask(file, invert=invert, from_alpha=from_alpha))
    return replace(mask, notes=(*mask.notes, *(f"{file.name}: {line}" for line in said)))


def _heard(read: Callable[[], Picture]) -> tuple[Picture, list[str]]:
    """What `read` gives, and in a line what C libraries wrote to stderr meanwhile."""
    with stderr_caught() as lines:
        picture = read()
    if not lines:
        return picture, []
    more = f" (and {len(lines) - 1} more lines)" if len(lines) > 1 else ""
    return picture, [f"its library says: {' '.join(lines[0].split())[:200]}{more}"]


@contextlib.contextmanager
def stderr_caught() -> Iterator[list[str]]:
    """Lines that are written to file descriptor 2 within, there when it is over, in place of being shown."""
    lines: list[str] = []
    if sys.stderr is not None:
        sys.stderr.flush()
    try:
        shown = os.dup(2)
    except OSError:  # there is none
        yield lines
        return
    with _nameless_file() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(shown, 2)
            os.close(shown)
            file.seek(0)
            text = file.read(2**20).decode(errors="replace")
            lines += [line for line in text.splitlines() if line.strip()]


def _nameless_file() -> Any:
    """A file that no disk needs room for, where the system has such."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("stderr"), "w+b")
    return tempfile.TemporaryFile()


def check_result(path: Path, size: tuple[int, int], *, like: "Photo") -> None:
    """ValueError where a picture (H, W) of the samples that `like` has could not be written to `path`: its
    folder, which need not be there yet, its name, its format's limits, its disk.
    """
    from msbd.pixels.encode import JPEG_SUFFIXES, TIFF_SUFFIXES
    from msbd.pixels.files import check_output_path

    channels = (1 if like.model == "grey" else 3) + (like.alpha is not None)
    raw = size[0] * size[1] * channels * like.samples.itemsize
    there = next(folder for folder in path.absolute().parents if folder.is_dir())
    suffix = check_output_path(path if path.parent.is_dir() else there / path.name, size)
    if suffix in TIFF_SUFFIXES and raw >= 2**32:
        raise ValueError(f"{path}: a TIFF holds 4 GB, and this one may have {raw / 1e9:.1f}; write a .png")
    check_room(path, raw // 4 if suffix in JPEG_SUFFIXES else raw)
