"""The pictures of a command: those of a folder, or those of a list, and where each result goes."""

import argparse
import contextlib
import errno
import hashlib
import os
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from msbd.files import check_name

from .._cli import same_file
from .lists import Line, read_list

RESULTS = ("output", "compare", "candidates", "stages")  # flags that name what is written
IGNORED = {"desktop.ini", "thumbs.db"}  # what systems leave in folders of pictures, beside dot files


@dataclass(frozen=True)
class Task:
    """One picture: what is read, what is written, and what is said of this one alone (None: as of all)."""

    name: str  # its path below the folder, with slashes: what it is called, and what its seed is drawn from
    image: Path
    output: Path
    compare: Path | None = None
    candidates: Path | None = None
    stages: Path | None = None  # a folder
    mask: Path | None = None
    prompt: str | None = None
    seed: int | None = None
    margin: float | None = None
    error: str | None = None  # why nothing can be done
    folder: bool = False  # no picture, but a folder of them that could not be listed

    def of(self, args: argparse.Namespace) -> argparse.Namespace:
        """The command line of this picture alone."""
        files = {name: getattr(self, name) for name in ("image", "mask", *RESULTS)}
        own = {name: getattr(self, name) for name in ("prompt", "seed", "margin")}
        said = {name: value for name, value in own.items() if value is not None}
        return argparse.Namespace(**{**vars(args), **files, **said})

    @property
    def files(self) -> list[Path]:
        """The files that are written, the result first, but for those below `stages`."""
        return [path for path in (self.output, self.compare, self.candidates) if path]


def seed_of(seed: int, name: str) -> int:
    """The seed of one picture of a folder, 0 .. 2**32 - 1, drawn from the command's and the picture's path.

    The order of the pictures, and which others there are, do not change it.
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:4], "big")


def find_tasks(args: argparse.Namespace) -> tuple[list[Task], list[str]]:
    """The pictures of `args`, which names a folder or a list, and notes on what is left out.

    ValueError or OSError where a result cannot be written, or would overwrite something.
    """
    for flag in RESULTS:
        if (folder := getattr(args, flag, None)) is not None:
            _check_folder(f"--{flag}", folder, args.image)
    found, notes = _of_list(args) if args.jobs else _of_folder(args)
    tasks = _with_outputs(args, found)
    _check_outputs(tasks)
    if args.shard is not None:
        part, parts = args.shard
        tasks = tasks[part - 1 :: parts]
    return tasks, notes


# ---- folders -----------------------------------------------------------------------------------------------


def _of_folder(args: argparse.Namespace) -> tuple[list[Task], list[str]]:
    from msbd.pixels.formats import READ_SUFFIXES

    masks = getattr(args, "mask", None)
    beside = [masks, *(getattr(args, flag, None) for flag in RESULTS)]
    entries = Entries(args.image, recursive=args.recursive, apart=list(filter(None, beside)))
    if not entries.pictures:
        hint = "; --recursive reads its folders too" if entries.folders and not args.recursive else ""
        told = f"; {entries.left_out()}" if entries.left_out() else ""
        raise ValueError(f"{args.image}: no pictures there ({', '.join(READ_SUFFIXES)}){told}{hint}")
    tasks = [
        Task(name, args.image / name, Path(), seed=seed_of(args.seed, name)) for name in entries.pictures
    ]
    notes = [f"{args.image}: {told}"] if (told := entries.left_out()) else []
    tasks += [
        Task(name, args.image / name, Path(), error=error, folder=True) for name, error in entries.unread
    ]
    if masks is None:
        return tasks, notes
    if not masks.is_dir():
        return [replace(task, mask=masks) for task in tasks], notes
    tasks, unused = _with_masks(tasks, masks, recursive=args.recursive)
    if unused:
        notes.append(f"{masks}: {_some(unused)} of no picture")
    return tasks, notes


class Entries:
    """What is in a folder of pictures: every entry is a picture, left out, or a file that systems put there.

    `apart` are folders and files that are no pictures though they may lie in there: results, masks.
    """

    def __init__(self, folder: Path, *, recursive: bool, apart: Sequence[Path] = ()) -> None:
        from msbd.pixels.formats import READ_SUFFIXES

        self.pictures: list[str] = []
        self.unread: list[tuple[str, str]] = []  # folders below, and why
        self.folders = self.links = self.others = 0
        self.suffixes: Counter[str] = Counter()  # of the files that are left out
        waiting = [folder]
        for place in waiting:
            try:
                with os.scandir(place) as entries:
                    listed = sorted(entries, key=lambda entry: entry.name)
            except OSError as error:
                if place == folder:
                    raise
                self.unread.append((place.relative_to(folder).as_posix(), f"{place}: {error.strerror}"))
                continue
            for entry in listed:
                path = place / entry.name
                suffix = path.suffix.lower()
                if entry.name.startswith(".") or entry.name.lower() in IGNORED:
                    continue
                if entry.is_dir():
                    if any(same_file(path, other) for other in apart):
                        continue
                    if recursive and not entry.is_symlink():  # a link could lead in a circle
                        waiting.append(path)
                    else:
                        self.folders += 1
                elif _leads_nowhere(path):
                    self.links += 1
                elif not entry.is_file():
                    self.others += 1
                elif suffix not in READ_SUFFIXES:
                    self.suffixes[suffix or "no suffix"] += 1
                elif not any(same_file(path, other) for other in apart):
                    self.pictures.append(path.relative_to(folder).as_posix())
        self.pictures.sort(key=lambda name: name.split("/"))

    def left_out(self) -> str:
        """What is neither read nor ignored, in words; empty where there is nothing."""
        counts = [
            _count(self.folders, "folder"),
            _count(self.suffixes.total(), "file") + self._told_suffixes(),
            _count(self.links, "broken link"),
            _count(self.others, "special file"),
        ]
        told = ", ".join(filter(None, counts))
        return told and f"left out: {told}"

    def _told_suffixes(self) -> str:
        most = self.suffixes.most_common(8)
        more = ", ..." if len(self.suffixes) > len(most) else ""
        told = ", ".join(f"{suffix} {count}" if count > 1 else suffix for suffix, count in most)
        return told and f" ({told}{more})"


def _leads_nowhere(path: Path) -> bool:
    """Whether an entry of a folder is a link to what is not there. OSError where that cannot be found out."""
    try:
        path.stat()
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise
        return True
    return False


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' if number > 1 else ''}" if number else ""


def _some(names: Sequence[str]) -> str:
    """A list of names, in few words."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")


def _with_masks(tasks: list[Task], masks: Path, *, recursive: bool) -> tuple[list[Task], list[str]]:
    """Each task with the mask of its name, or of its name but for the suffix; and the masks of no picture."""
    entries = Entries(masks, recursive=recursive)
    there = entries.pictures
    names, by_stem = set(there), dict[str, list[str]]()
    for name in there:
        by_stem.setdefault(_stem(name), []).append(name)
    used: set[str] = set()

    def masked(task: Task) -> Task:
        fitting = [task.name] if task.name in names else by_stem.get(_stem(task.name), [])
        used.update(fitting)
        if len(fitting) == 1:
            return replace(task, mask=masks / fitting[0])
        if task.error:
            return task
        if not fitting and (
            why := next((why for at, why in entries.unread if task.name.startswith(f"{at}/")), "")
        ):
            return replace(task, error=f"{task.image}: its mask is not found: {why}")
        why = f"{len(fitting)} masks ({_some(fitting)})" if fitting else "no mask"
        return replace(task, error=f"{task.image}: {why} of that name in {masks}")

    tasks = [masked(task) for task in tasks]
    return tasks, [name for name in there if name not in used]


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))


# ---- lists -------------------------------------------------------------------------------------------------


def _of_list(args: argparse.Namespace) -> tuple[list[Task], list[str]]:
    """The pictures of --jobs; names are relative to --image, or else to the folder of the list."""
    base = args.image or args.jobs.parent
    columns = ("image", "mask", "prompt", "seed", "margin", "output")
    if not hasattr(args, "mask"):
        columns = ("image", "prompt", "seed", "output")
    return [_of_line(args, base, line) for line in read_list(args.jobs, columns)], []


def _of_line(args: argparse.Namespace, base: Path, line: Line) -> Task:
    said: dict[str, Any] = line.values
    name = PurePosixPath(said.get("output") or said["image"].replace(os.sep, "/"))
    if said.get("output") and (name.is_absolute() or ".." in name.parts):
        raise ValueError(f"{line}: the output {name} is not below --output; take a path relative to it")
    if name.is_absolute() or ".." in name.parts:
        name = PurePosixPath(name.name)
    mask = base / said["mask"] if said.get("mask") else getattr(args, "mask", None)
    return Task(
        str(name),
        base / said["image"],
        Path(said["output"]) if said.get("output") else Path(),
        mask=mask,
        prompt=said.get("prompt"),
        seed=seed_of(args.seed, str(name)) if said.get("seed") is None else said["seed"],
        margin=said.get("margin"),
    )


# ---- results -----------------------------------------------------------------------------------------------


def _with_outputs(args: argparse.Namespace, tasks: list[Task]) -> list[Task]:
    """Each task with its outputs below --output, --compare, ..: its own name, with another suffix."""
    from msbd.pixels.formats import READ_SUFFIXES

    stems = Counter(_folded(_stem(task.name)) for task in tasks)

    def with_output(task: Task) -> Task:
        stem, suffix = _stem(task.name), _suffix(args.format, task.image)
        # a.jpg and a.png would both become a.png, and a.jpg.png what the first of them then becomes
        alone = stems[_folded(stem)] == 1 and PurePosixPath(stem).suffix.lower() not in READ_SUFFIXES
        name = stem if alone else task.name
        if task.output != Path():  # of a list
            output = task.output
        elif args.format == "same" and task.image.suffix.lower() == suffix:
            output = Path(task.name)
        else:
            output = Path(name + suffix)
        compare, candidates, stages = (getattr(args, flag, None) for flag in RESULTS[1:])
        task = replace(
            task,
            output=args.output / output,
            compare=compare and compare / f"{name}.jpg",
            candidates=candidates and candidates / f"{name}.jpg",
            stages=stages and stages / name,
        )
        try:
            for path in task.files:
                check_name(path)
        except ValueError as error:
            return replace(task, error=task.error or str(error))
        return task

    return [with_output(task) for task in tasks]


def _suffix(asked: str, image: Path) -> str:
    """The suffix of a result by --format."""
    from msbd.pixels.encode import SUFFIXES

    if asked != "same":
        return f".{asked}"
    return image.suffix.lower() if image.suffix.lower() in SUFFIXES else ".png"


def _folded(name: str) -> str:
    """What file systems that fold case and accents take for the same name."""
    return unicodedata.normalize("NFC", name).casefold()


def _check_outputs(tasks: Sequence[Task]) -> None:
    """ValueError where a result has no suffix to write, is an input, or is that of another picture too."""
    from msbd.pixels.encode import SUFFIXES

    inputs = {_identity(path): path for task in tasks for path in _there(task.image, task.mask)}
    taken: dict[str, str] = {}
    for task in tasks:
        if task.output.suffix.lower() not in SUFFIXES:
            raise ValueError(
                f"{task.output}: cannot write pictures of type {task.output.suffix or '(no suffix)'!r}; use one of "
                f"{', '.join(SUFFIXES)}"
            )
        for path in task.files:
            for there in _there(path):
                if read := inputs.get(_identity(there)):
                    raise ValueError(f"{path}: would overwrite {read}, which is read; take another folder")
                if there.is_dir():
                    raise ValueError(
                        f"{path}: a folder, where a result would be; move it or take another one"
                    )
            if other := taken.get(_folded(str(path))):
                raise ValueError(
                    f"{path}: would be the result of both {other} and {task.name}; give each an `output` of its own"
                )
            taken[_folded(str(path))] = task.name


def _there(*paths: Path | None) -> Iterator[Path]:
    for path in filter(None, paths):
        with contextlib.suppress(OSError):  # of a name that is too long
            if path.exists():
                yield path


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _check_folder(flag: str, folder: Path, images: Path | None) -> None:
    """ValueError unless results can be written into `folder`, which need not be there yet."""
    from msbd.pixels.encode import SUFFIXES

    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: a file; {flag} takes a folder, as there are many pictures")
    if not folder.exists() and folder.suffix.lower() in SUFFIXES:
        raise ValueError(f"{folder}: a picture's name; {flag} takes a folder, as there are many pictures")
    if images is not None and same_file(folder, images):
        raise ValueError(f"{folder}: {flag} is the folder of the pictures; take another one")
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not os.access(there, os.W_OK):
        raise ValueError(
            f"{folder}: no permission to write there; {flag} takes a place that you may write to"
        )
