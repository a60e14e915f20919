"""Where the pictures of a training come from: folders, tar shards.

Layout   a folder: pictures, the caption of NAME.png in NAME.txt. Shards: uncompressed tar files as webdataset
         writes them
Copying  needs pixels/files.py; numpy and Pillow
"""

import glob
import io
import re
import tarfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..pixels.files import load_image

FILE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")
CAPTION_ENDINGS = (".txt", ".caption")
MEMBER_ENDINGS = ("jpg", "png", "jpeg", "webp")  # how pictures in a shard end; webdataset's names
MEMBER_CAPTIONS = ("text", "txt", "caption")


class Pictures(Protocol):
    """Clean pictures with captions, numbered from 0.

    Pickled into DataLoader workers: it holds no open files.
    """

    def __len__(self) -> int:
        """How many there are."""
        ...

    def read(self, index: int, /) -> tuple[Image.Image | NDArray[np.uint8], str]:
        """Picture `index`, RGB, as a Pillow image or (H, W, 3) uint8, and its caption, "" for none.

        ValueError or OSError if it cannot be read: the run then takes the next one.
        """
        ...


class PictureFolder:
    """Every picture in `folder` and the folders below it, by path; or one picture, if `folder` is a file.

    The caption is the first line of the file of the same stem that ends in .txt or .caption. Hidden files are
    left out. FileNotFoundError if there is no such folder, ValueError if it holds no picture.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder).expanduser()
        if not folder.exists():
            raise FileNotFoundError(f"{folder}: there is no such folder; give one that holds pictures")
        # glob, unlike rglob, follows linked folders: data sets are often linked in.
        found = glob.glob("**/*", root_dir=folder, recursive=True) if folder.is_dir() else [""]
        self.files = sorted(folder / name for name in found if (folder / name).suffix.lower() in FILE_ENDINGS)
        if not self.files:
            raise ValueError(f"{folder}: no picture in it; looked for names in {', '.join(FILE_ENDINGS)}")

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> tuple[Image.Image, str]:
        """Picture `index` upright and RGB, transparency over white, and its caption."""
        path = self.files[index]
        return _decode(path, str(path)), _caption_beside(path)


class TarShards:
    """Pictures in uncompressed tar files, as webdataset lays them out: NAME.jpg and NAME.txt are one example.

    Only the headers are read here, so that any member can be read later, in any order. `files`: what
    `expand_shards` takes. FileNotFoundError or ValueError for shards that are missing, cut off, compressed or
    without pictures; members without a picture are left out, with a warning.
    """

    def __init__(self, files: str | Path | Sequence[str | Path]) -> None:
        self.files = expand_shards(files)
        self.names: list[str] = []
        places: list[NDArray[np.int64]] = []
        for number, file in enumerate(self.files):
            names, place = _index_shard(file)
            self.names += names
            places.append(np.insert(place, 0, number, axis=1))
        # (N, 5): shard, then offset and size of the picture, offset and size of the caption
        self._places = np.concatenate(places)

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> tuple[Image.Image, str]:
        """Picture `index` upright and RGB, transparency over white, and its caption."""
        shard, start, size, caption_start, caption_size = self._places[index].tolist()
        # Opened each time (microseconds): worker processes would share the position of an open file.
        with open(self.files[shard], "rb") as file:
            file.seek(start)
            data = file.read(size)
            file.seek(caption_start)
            caption = file.read(caption_size)
        return _decode(io.BytesIO(data), f"{self.files[shard]}: {self.names[index]}"), _first_line(caption)


class Part:
    """Some of another source's pictures, `indices` of them: to keep a few for validation."""

    def __init__(self, pictures: Pictures, indices: Sequence[int]) -> None:
        self.pictures, self.indices = pictures, indices

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> tuple[Image.Image | NDArray[np.uint8], str]:
        """Picture `index` of the part, and its caption."""
        return self.pictures.read(self.indices[index])


def expand_shards(patterns: str | Path | Sequence[str | Path]) -> list[Path]:
    """The files that "train-{000..017}.tar", "train-*.tar", names, or several of these stand for, in order.

    FileNotFoundError for a file that is not there or a glob that matches none; ValueError for an empty range.
    """
    if isinstance(patterns, str | Path):
        patterns = [patterns]
    names = [name for pattern in patterns for name in _expand_ranges(str(Path(pattern).expanduser()))]
    files: list[Path] = []
    for name in names:
        found = [name] if Path(name).is_file() else sorted(glob.glob(name, recursive=True))
        if not found:
            raise FileNotFoundError(f"{name}: there is no such shard; a range is written {{000..017}}")
        files += map(Path, found)
    if not files:
        raise ValueError("no shards were named; give tar files, or a pattern such as train-{000..017}.tar")
    return files


def _expand_ranges(pattern: str) -> list[str]:
    """Bash's {first..last}, as often as it occurs; numbers at least as wide as `first`."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not found:
        return [pattern]
    first, last = found.groups()
    if int(first) > int(last):
        raise ValueError(f"{pattern}: {found[0]} is an empty range; write the lower end first")
    numbers = [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]
    rests = _expand_ranges(pattern[found.end() :])
    return [pattern[: found.start()] + number + rest for number in numbers for rest in rests]


def _index_shard(file: Path) -> tuple[list[str], NDArray[np.int64]]:
    """Names (N) of a shard's pictures, and (N, 4) offset and size of each picture and of its caption."""
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                folder, slash, name = member.name.rpartition("/")
                stem, _, ending = name.partition(".")  # webdataset: "7.seg.png" is the "seg.png" of "7"
                if stem and member.isfile() and not member.issparse():
                    samples.setdefault(folder + slash + stem, {}).setdefault(ending.lower(), member)
            # tarfile stops without a word at a damaged header; a whole archive ends in zeros.
            with file.open("rb") as raw:
                raw.seek(tar.offset)
                if raw.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError("cut off, or damaged in the middle")
    # What tarfile makes of sizes that no file has, and of numbers that are none, is not always a TarError.
    except (tarfile.TarError, ValueError, OverflowError, MemoryError) as error:
        why = str(error) or "a header that says too much"
        raise ValueError(f"{file}: not a whole, uncompressed tar file ({why})") from error
    names: list[str] = []
    places: list[tuple[int, int, int, int]] = []
    for members in samples.values():
        picture = _first(members, MEMBER_ENDINGS)
        caption = _first(members, MEMBER_CAPTIONS) or tarfile.TarInfo()  # which has size 0
        if picture:
            names.append(picture.name)
            places.append((picture.offset_data, picture.size, caption.offset_data, caption.size))
    if not names:
        raise ValueError(f"{file}: no picture in it; looked for members in {', '.join(MEMBER_ENDINGS)}")
    if len(names) < len(samples):
        lacking = f"{len(samples) - len(names)} of {len(samples)} examples have no picture"
        warnings.warn(f"{file}: {lacking} and are left out", stacklevel=3)
    return names, np.array(places, dtype=np.int64)


def _first(members: dict[str, tarfile.TarInfo], endings: Sequence[str]) -> tarfile.TarInfo | None:
    return next((members[ending] for ending in endings if ending in members), None)


def _decode(file: Path | BinaryIO, name: str) -> Image.Image:
    """The first frame: upright, 8-bit sRGB, transparency over white. ValueError."""
    try:
        photo = load_image(file)
    except (ValueError, OSError) as error:
        shown = "".join(c if c.isprintable() else " " for c in name)  # that of a member says what it likes
        raise ValueError(f"{shown}: {str(error).removeprefix(f'{file}: ')}") from error
    return Image.fromarray(photo.over(255))


def _caption_beside(path: Path) -> str:
    files = (path.with_suffix(ending) for ending in CAPTION_ENDINGS)
    return next((_first_line(file.read_bytes()) for file in files if file.is_file()), "")


def _first_line(text: bytes) -> str:
    return next(iter(text.decode("utf-8-sig", errors="replace").strip().splitlines()), "").strip()
