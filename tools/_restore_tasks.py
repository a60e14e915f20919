"""The pictures of a `python -m tools.restore` command: which, where their results go, and how large those are."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._cli import check_outputs, same_file

if TYPE_CHECKING:
    from msbd.images import Photo


@dataclass(frozen=True)
class Task:
    """One picture."""

    image: Path
    output: Path
    compare: Path | None


def find_tasks(args: argparse.Namespace) -> list[Task]:
    """The pictures to restore and where they go. ValueError where one cannot be written, or would overwrite something."""
    from msbd.images import READ_SUFFIXES, check_output_path

    if not args.image.is_dir():
        if args.output.is_dir():
            args.output = args.output / f"{args.image.stem}.png"
        outputs = {"--output": args.output} | ({"--compare": args.compare} if args.compare else {})
        check_outputs(outputs, {"--image": args.image})
        for path in outputs.values():
            check_output_path(path)
        return [Task(args.image, args.output, args.compare)]
    names = [
        path
        for path in sorted(args.image.iterdir())
        if path.suffix.lower() in READ_SUFFIXES and path.is_file()
    ]
    if not names:
        raise ValueError(f"{args.image}: no pictures there ({', '.join(READ_SUFFIXES)})")
    for flag, folder in (("--output", args.output), ("--compare", args.compare)):
        if folder is None:
            continue
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder}: a file; {flag} takes a folder, as --image is one")
        if same_file(folder, args.image):
            raise ValueError(f"{folder}: {flag} is the folder of the pictures; take another one")
        if not args.dry_run:
            folder.mkdir(parents=True, exist_ok=True)
    stems = [path.stem for path in names]
    # a.jpg and a.png would both become a.png
    return [
        Task(path, args.output / f"{name}.png", args.compare and args.compare / f"{name}.jpg")
        for path, name in ((path, path.stem if stems.count(path.stem) == 1 else path.name) for path in names)
    ]


def asked_size(args: argparse.Namespace, size: tuple[int, int]) -> tuple[int, int]:
    """(H, W) of the result for a picture of `size`."""
    from msbd.restore_plan import ENLARGED

    if args.size is not None:
        return args.size
    scale = ENLARGED[args.mode] if args.scale is None else args.scale
    height, width = (max(1, round(side * scale)) for side in size)
    return height, width


def resampled_alpha(photo: "Photo", size: tuple[int, int]) -> Any:
    """The picture's transparency (H, W) uint8 at `size`; None for one without."""
    import numpy as np
    from PIL import Image

    if photo.alpha is None:
        return None
    resized = Image.fromarray(photo.alpha).resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return np.asarray(resized)
