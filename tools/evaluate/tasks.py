"""What `presets` and `seams` edit: held-out scenes, or one picture of the command line."""

import argparse
import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from msbd.pixels.files import load_image
from msbd.pixels.mask_files import read_mask

from ..edit import check_mask
from .edit import EditTask, check_scenes, make_task


@dataclass(frozen=True, eq=False)
class PictureTask:
    """A picture (1, 3, H, W) in [-1, 1], its mask (1, 1, H, W) and the prompt; nobody knows the truth."""

    image: Tensor
    mask: Tensor
    prompt: str
    number: int = 0


Task = EditTask | PictureTask


def read_tasks(args: argparse.Namespace) -> tuple[argparse.Namespace, Callable[[int], Task], str]:
    """`args` with the scenes to do, the task of each, and words that tell these from others.

    A picture is the only scene. ValueError for options that do not go together, OSError for files.
    """
    given = (args.image, args.mask, args.prompt)
    if None not in given:
        photo, read = load_image(args.image), read_mask(args.mask)
        check_mask(read, args.mask, photo, args.image)
        task = PictureTask(photo.image, read.mask, args.prompt)
        pixels = task.image.numpy().tobytes() + task.mask.numpy().tobytes()
        digest = hashlib.sha256(pixels + args.prompt.encode()).hexdigest()[:10]
        one = {"scenes": 1, "start": 0, "count": None}
        return argparse.Namespace(**{**vars(args), **one}), lambda number: task, digest
    if given != (None, None, None):
        raise ValueError("--image, --mask and --prompt go together; give all three, or none for scenes")
    check_scenes(args)
    return args, lambda number: make_task(number, args.size), str(args.size)
