"""Clean pictures (hq), degraded ones (lq), and what was drawn for each: `python -m tools.evaluate degrade`.

Pair number i is drawn from (--seed, i) alone: the same pictures and options give the same files, on any
number of cores.
"""

import argparse
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from msbd.files import whole_file
from msbd.pixels.files import save_image
from msbd.train.data import PAIR, degrade_pair, random_crop, seeded, to_unit
from msbd.train.degrade import PASD, REAL_ESRGAN, Degradation
from msbd.train.pictures import PictureFolder, Pictures

from .._report import table
from ..scenes.data import RenderedScenes

RANGES = {"pasd": PASD, "real-esrgan": REAL_ESRGAN}
PARTS = ("hq", "lq", "parameters")  # folders under --output
SCENE_SIZE = 512


@dataclass(frozen=True)
class PairsPlan:
    """All that a worker process needs."""

    pictures: Pictures
    names: Sequence[str]  # the files' names, without folder and suffix; they may hold slashes
    out: Path
    ranges: str  # a key of RANGES
    scale: int
    size: int | None  # crops of that many pixels a side; None: whole pictures
    seed: int


@dataclass(frozen=True)
class Outcome:
    """What became of a pair: pixels of its clean picture, seconds for drawing and degrading, or an error."""

    pixels: int = 0
    seconds: float = 0.0
    error: str = ""


def degrade(args: argparse.Namespace) -> str:
    """Make the pairs that the options ask for; a table of how many and how fast.

    ValueError if a picture failed.
    """
    plan = make_plan(args)
    count = len(plan.names)
    workers = min(count, usable_cores())
    started = time.perf_counter()
    with ProcessPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        # In chunks: the plan, with the names of all pictures, is sent along with each.
        made = pool.map(partial(make_pair, plan), range(count), chunksize=max(1, count // (16 * workers)))
        outcomes = list(tqdm(made, total=count, disable=True if args.quiet else None, unit="pair"))
    seconds = time.perf_counter() - started
    failed = [outcome.error for outcome in outcomes if outcome.error]
    if failed:
        shown = "; ".join(failed[:3]) + ("; ..." if len(failed) > 3 else "")
        raise ValueError(f"{len(failed)} of {count} pictures could not be used, the others are done: {shown}")
    return throughput_table(outcomes, seconds, workers)


def usable_cores() -> int:
    """How many cores this process may use, which `taskset` and containers make fewer."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make_plan(args: argparse.Namespace) -> PairsPlan:
    """Which pairs to make, and their folders. ValueError for options that cannot be followed."""
    for flag in ("count", "scenes", "size", "scale"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise ValueError(f"--{flag} {value}: takes a number from 1 up")
    if args.scenes:
        size = args.size or SCENE_SIZE
        pictures: Pictures = RenderedScenes(args.scenes, size)
        names = [f"scene-{number:04}" for number in range(args.scenes)]
    else:
        size = args.size
        pictures = PictureFolder(args.image)
        names = pair_names(args.image, pictures.files)
        check_apart(args.image, args.output)
    if size and size < args.scale:
        raise ValueError(
            f"--size {size} cannot be degraded to 1/{args.scale}; take --size {args.scale} or more"
        )
    names = names[: args.count]
    for folder in {(args.output / part / name).parent for part in PARTS for name in names}:
        folder.mkdir(parents=True, exist_ok=True)
    return PairsPlan(pictures, names, args.output, args.ranges, args.scale, size, args.seed)


def pair_names(source: Path, files: Sequence[Path]) -> list[str]:
    """Where each picture goes below hq and lq, without suffix: its path below `source`.

    ValueError if two go to one place.
    """
    source = source.expanduser()
    taken: dict[str, Path] = {}
    for file in files:
        name = file.relative_to(source if source.is_dir() else source.parent).with_suffix("").as_posix()
        if name in taken:
            raise ValueError(f"{taken[name]} and {file} would both become {name}.png; rename one of them")
        taken[name] = file
    return list(taken)


def check_apart(source: Path, out: Path) -> None:
    """ValueError if writing to `out` could overwrite pictures of `source`, or add to them."""
    there = source.expanduser().resolve()
    for part in PARTS:
        folder = (out / part).resolve()
        if folder == there or folder in there.parents or there in folder.parents:
            raise ValueError(
                f"--output {out}: {folder} and the pictures in {source} are not apart; take another folder"
            )


def make_pair(plan: PairsPlan, index: int) -> Outcome:
    """Write pair `index`: hq, lq at 1/scale, parameters."""
    generator = seeded(plan.seed, PAIR, index)
    try:
        picture, caption = plan.pictures.read(index)
        clean = to_unit(cut(picture, plan, index, generator))
    except (OSError, ValueError) as error:
        return Outcome(error=str(error))
    started = time.perf_counter()
    target, lq, drawn = degrade_pair(clean, generator, ranges=RANGES[plan.ranges], scale=plan.scale)
    seconds = time.perf_counter() - started
    save_image(target * 2 - 1, plan.out / "hq" / f"{plan.names[index]}.png")
    save_image(lq * 2 - 1, plan.out / "lq" / f"{plan.names[index]}.png")
    record = {"index": index, "caption": caption, **sizes(target, lq), **parameters_record(plan, drawn)}
    with whole_file(plan.out / "parameters" / f"{plan.names[index]}.json") as unfinished:
        unfinished.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return Outcome(target.shape[-2] * target.shape[-1], seconds)


def cut(
    picture: Image.Image | NDArray[np.uint8], plan: PairsPlan, index: int, generator: torch.Generator
) -> Image.Image:
    """A random crop of `plan.size`, or the whole picture less what `plan.scale` does not divide."""
    picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    if plan.size:
        return random_crop(picture, plan.size, generator)
    width, height = (side // plan.scale * plan.scale for side in picture.size)
    if not width * height:
        raise ValueError(
            f"{plan.names[index]}: {picture.width} x {picture.height} pixels cannot be degraded to "
            f"1/{plan.scale}"
        )
    return picture.crop((0, 0, width, height))


def sizes(target: Tensor, lq: Tensor) -> dict[str, list[int]]:
    """Height and width of both."""
    return {"hq": list(target.shape[-2:]), "lq": list(lq.shape[-2:])}


def parameters_record(plan: PairsPlan, drawn: Degradation) -> dict[str, Any]:
    """What was drawn, and from what, as JSON can hold it."""
    steps = [{"step": type(step).__name__, **asdict(step)} for step in drawn.steps]
    return {"seed": plan.seed, "ranges": plan.ranges, "scale": plan.scale, "steps": steps}


def throughput_table(outcomes: Sequence[Outcome], seconds: float, workers: int) -> str:
    """How many pairs, how long and how fast, with reading and writing and without.

    The speed is also told by area, in pictures of 512 x 512 pixels.
    """
    areas = sum(outcome.pixels for outcome in outcomes) / 512**2
    busy = sum(outcome.seconds for outcome in outcomes) / workers
    return table([
        ["", "seconds", "pictures/s", "512 x 512 pictures/s"],
        ["everything", f"{seconds:.1f}", f"{len(outcomes) / seconds:.2f}", f"{areas / seconds:.2f}"],
        ["degradation alone", f"{busy:.1f}", f"{len(outcomes) / busy:.2f}", f"{areas / busy:.2f}"],
    ]) + f"\n{len(outcomes)} pairs, {workers} processes of one thread"  # fmt: skip
