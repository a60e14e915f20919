"""The pictures of a `python -m tools.restore` command: which, where results go, and how large those are."""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._cli import check_outputs, check_transparency, same_file

if TYPE_CHECKING:
    from torch import Tensor

    from msbd.pixels.files import Photo


@dataclass(frozen=True)
class RestoreTask:
    """One picture."""

    image: Path
    output: Path
    compare: Path | None


def find_tasks(args: argparse.Namespace) -> list[RestoreTask]:
    """The pictures to restore and where they go.

    ValueError where one cannot be written, or would overwrite something.
    """
    from msbd.pixels.files import READ_SUFFIXES, check_output_path

    if not args.image.is_dir():
        output = args.output / f"{args.image.stem}.png" if args.output.is_dir() else args.output
        outputs = {"--output": output} | ({"--compare": args.compare} if args.compare else {})
        check_outputs(outputs, {"--image": args.image})
        for path in outputs.values():
            check_output_path(path)
        return [RestoreTask(args.image, output, args.compare)]
    names = [
        path
        for path in sorted(args.image.iterdir())
        if path.suffix.lower() in READ_SUFFIXES and path.is_file()
    ]
    if not names:
        raise ValueError(f"{args.image}: no pictures there ({', '.join(READ_SUFFIXES)})")
    for flag, folder in (("--output", args.output), ("--compare", args.compare)):
        if folder is not None:
            _check_folder(flag, folder, args.image)
    stems = [path.stem for path in names]

    def name_of(path: Path) -> str:
        # a.jpg and a.png would both become a.png, and a.jpg.png what the first of them then becomes
        alone = stems.count(path.stem) == 1 and Path(path.stem).suffix.lower() not in READ_SUFFIXES
        return path.stem if alone else path.name

    return [
        RestoreTask(path, args.output / f"{name}.png", args.compare and args.compare / f"{name}.jpg")
        for path, name in ((path, name_of(path)) for path in names)
    ]


def _check_folder(flag: str, folder: Path, images: Path) -> None:
    """ValueError unless results can be written into `folder`, which need not be there yet."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: a file; {flag} takes a folder, as --image is one")
    if same_file(folder, images):
        raise ValueError(f"{folder}: {flag} is the folder of the pictures; take another one")
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not os.access(there, os.W_OK):
        raise ValueError(
            f"{folder}: no permission to write there; {flag} takes a place that you may write to"
        )


def read_picture(task: RestoreTask) -> "Photo":
    """The picture of `task`.

    ValueError or OSError where it cannot be read, or its result would lose its transparency.
    """
    from msbd.pixels.files import load_image

    photo = load_image(task.image)
    check_transparency(photo, task.image, task.output)
    return photo


def asked_size(args: argparse.Namespace, size: tuple[int, int]) -> tuple[int, int]:
    """(H, W) of the result for a picture of `size`."""
    from msbd.restore.plan import ENLARGED

    if args.size is not None:
        return args.size
    scale = ENLARGED[args.mode] if args.scale is None else args.scale
    height, width = (max(1, round(side * scale)) for side in size)
    return height, width


def resampled_alpha(photo: "Photo", size: tuple[int, int]) -> Any:
    """The picture's transparency (H, W), of its own type, at `size`; None for one without."""
    import numpy as np

    if photo.alpha is None:
        return None
    full = np.iinfo(photo.alpha.dtype).max
    return (_opaque(photo, size) * full).round().numpy().astype(photo.alpha.dtype)[0, 0]


def premultiplied(image: "Tensor", photo: "Photo") -> "Tensor":
    """The photo's `image` times its opacity, (1, 3, H, W) in [-1, 1]: what may be interpolated."""
    return (image + 1) * _opaque(photo, photo.size) - 1


def straight(image: "Tensor", photo: "Photo") -> "Tensor":
    """An interpolated picture (1, 3, H', W') in [-1, 1] divided by the opacity of `photo`, interpolated
    likewise.
    """
    import torch

    opaque = _opaque(photo, (image.shape[-2], image.shape[-1]))
    return torch.where(opaque > 0, (image + 1) / opaque.clamp_min(1e-6) - 1, 0).clamp(-1, 1)


def _opaque(photo: "Photo", size: tuple[int, int]) -> "Tensor":
    """Opacity (1, 1, H, W) in [0, 1] at `size`, by the kernel that bicubic pictures have."""
    import numpy as np
    import torch

    from msbd.pixels.resize import resize

    assert photo.alpha is not None
    alpha = torch.from_numpy(photo.alpha.astype(np.float32) / np.iinfo(photo.alpha.dtype).max)
    return resize(alpha[None, None], size, "bicubic").clamp(0, 1)
