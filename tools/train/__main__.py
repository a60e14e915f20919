"""Train PASD on a frozen base, or fine-tune a base.

  python -m tools.train pasd --data PHOTOS --base sd-v1-5 -o runs/pasd             the paper's recipe, one GPU
  torchrun --nproc-per-node 8 -m tools.train pasd --data "train-{000..031}.tar" --base sd-v1-5 -o runs/pasd
  python -m tools.train pasd --preset mini --data scenes -o runs/mini              the bundle's own, on a CPU
  python -m tools.train base --data STYLE --base sd-v1-5 --rank 8 --lr 1e-4 --steps 2000 -o runs/style
  python -m tools.train curves runs/pasd -o curves.png                             what the log says

The same command goes on from the last checkpoint in the folder of -o. docs/training.md has the recipes.
"""

import argparse
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msbd.train.config import HELD_OUT, HINT_WIDTHS, MINI, OFFICIAL, PAPER, TrainConfig

from .._cli import (
    add_config_options,
    add_shared_options,
    check_not_shadowed,
    choose_device,
    config_options,
    given_options,
    report_errors,
)

if TYPE_CHECKING:
    from msbd.train.pictures import Pictures


FLAGS = {"learning_rate": "--lr"}
OPTIONS = config_options(TrainConfig, FLAGS)
MEMORY = (
    "take a smaller --batch (and more --accumulate), --checkpointing, --precision bf16, or a smaller --size"
)

# Group of --help -> its fields of TrainConfig, whose sentences it shows; --seed is among the shared options.
GROUPS: dict[str, tuple[str, ...]] = {
    "the descent": (
        "steps", "batch", "accumulate", "optimizer", "learning_rate", "schedule", "warmup", "weight_decay",
        "clip", "ema", "nan_limit",
    ),
    "the losses": ("gamma", "antialias", "null_prompts", "colour_weight"),
    "memory and files": ("precision", "zero", "checkpointing", "log_every", "validate_every", "save_every"),
}  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    """One sub-command per job; torch is not needed for it."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    jobs = parser.add_subparsers(dest="job", required=True)
    pasd = jobs.add_parser(
        "pasd",
        help="ControlNet and pixel-aware attention on a frozen base (the job where options come first)",
    )
    _add_data(pasd)
    add = pasd.add_argument_group("the nets").add_argument
    add("--variant", choices=("full", "light", "eq2", "none"), default="full",
        help="kind of pixel-aware attention: full, a transformer beside each of the U-Net's on its way up; "
        "light, one attention in each of those; eq2, the paper's equation alone; none, a ControlNet alone "
        "(default: full)")  # fmt: skip
    add("--mode", choices=("sr", "colorize"), default="sr", help="what to learn (default: sr)")
    add("--rrdb", action="store_true", help="two RRDBs in the degradation removal")
    add("--no-to-rgb", dest="to_rgb", action="store_false",
        help="without toRGB heads and their loss (Table 4 a of the paper)")  # fmt: skip
    add("--init", choices=("zero", "random"),
        help="how the new attention starts; random, as in the official code, disturbs the base "
        "(default: zero; official: random)")  # fmt: skip
    add("--start", type=Path, metavar="PATH", help="PASD's weights to start from: a file or folder")
    add("--degradation", choices=("real-esrgan", "pasd"),
        help="whose ranges (default: real-esrgan with --preset paper, else the milder pasd)")  # fmt: skip
    add("--scale", type=int, metavar="N", help="how many times smaller a degraded picture is (default: 4)")
    _add_running(pasd, GROUPS)
    base = jobs.add_parser("base", help="fine-tune a base: the U-Net whole, or a LoRA of it")
    _add_data(base)
    base.add_argument(
        "--rank", type=int, metavar="N", help="rank of a LoRA (default: the whole U-Net is trained)"
    )
    _add_running(base, GROUPS | {"the losses": ("null_prompts",)})
    curves = jobs.add_parser("curves", help="draw the losses of runs")
    curves.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs")
    curves.add_argument("-o", "--output", type=Path, required=True, metavar="PNG", help="the picture")
    curves.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _add_data(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("what to do").add_argument
    add("--data", nargs="+", required=True, metavar="DATA",
        help="a folder of pictures with captions in .txt files beside them, tar shards "
        '("train-{000..031}.tar"), or scenes: those of the mini bundle')  # fmt: skip
    add("--validation", nargs="+", metavar="DATA",
        help=f"the same, for validation (default: a twentieth of --data, {HELD_OUT} at most, which is then "
        "not trained on; of fewer than 20 pictures none is kept, training pictures are shown)")  # fmt: skip
    add("-o", "--output", type=Path, required=True, metavar="FOLDER", help="where the run is kept")
    add("--base", default="mini", metavar="MODEL", help="a name, folder or file (default: mini)")
    add("--preset", choices=("paper", "official", "mini"), default="paper",
        help="whose options, which any other flag overrules (default: paper); mini: the bundle's, whose "
        "degradation removal is half as wide too")  # fmt: skip
    add("--size", type=int, metavar="PIXELS", help="side of a training picture (default: the base's own)")
    add("--workers", type=int, default=0, metavar="N",
        help="processes that prepare the data (default: 0: the training process itself)")  # fmt: skip


def _add_running(parser: argparse.ArgumentParser, groups: dict[str, tuple[str, ...]]) -> None:
    add_config_options(parser, OPTIONS, groups)
    add_shared_options(parser, dtype=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one job; exit code 0, or 1 if it could not be done."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0].startswith("-") and words[0] not in ("-h", "--help"):
        words = ["pasd", *words]
    args = build_parser().parse_args(words)
    with report_errors(debug=args.debug, memory=MEMORY) as outcome:
        check_not_shadowed()
        {"pasd": _pasd, "base": _base, "curves": _curves}[args.job](args)
    return outcome.exit_code


def config_of(args: argparse.Namespace) -> TrainConfig:
    """The preset with the flags that were given."""
    preset = {"paper": PAPER, "official": OFFICIAL, "mini": MINI}[args.preset]
    return replace(preset, **given_options(args, OPTIONS))


def _pasd(args: argparse.Namespace) -> None:
    from msbd.train.degrade import PASD, REAL_ESRGAN

    from .run import PASDRun

    # Real-ESRGAN sharpens its targets; PASD, whose paper is silent and whose code does not, learns photos.
    ranges = {"pasd": PASD, "real-esrgan": replace(REAL_ESRGAN, usm=False)}
    refuse_useless(args)
    settings: dict[str, Any] = {"hint_widths": HINT_WIDTHS} if args.preset == "mini" else {}
    _train(
        args,
        PASDRun,
        variant=args.variant,
        use_rrdb=args.rrdb,
        to_rgb=args.to_rgb,
        zero_init=(args.init or ("random" if args.preset == "official" else "zero")) == "zero",
        start=args.start,
        grayscale=args.mode == "colorize",
        scale=4 if args.scale is None else args.scale,
        ranges=ranges[args.degradation or ("real-esrgan" if args.preset == "paper" else "pasd")],
        **settings,
    )


def refuse_useless(args: argparse.Namespace) -> None:
    """ValueError for an option that would change nothing beside another one."""
    given = given_options(args, OPTIONS)
    colour, heads = args.mode == "colorize", args.to_rgb
    for flag, useless, why in (
        ("--degradation", args.degradation and colour, "--mode colorize degrades nothing"),
        ("--scale", args.scale is not None and colour, "--mode colorize degrades nothing"),
        ("--gamma", "gamma" in given and not heads, "--no-to-rgb leaves that loss out"),
        ("--antialias", "antialias" in given and not heads, "--no-to-rgb leaves that loss out"),
        (
            "--colour-weight",
            "colour_weight" in given and not (heads and colour),
            "only with --mode colorize and toRGB heads",
        ),
        ("--init", args.init and args.variant == "none", "--variant none adds no attention"),
    ):
        if useless:
            raise ValueError(f"{flag} changes nothing here: {why}; leave it out")


def _base(args: argparse.Namespace) -> None:
    from .run import BaseRun

    _train(args, BaseRun, rank=args.rank, grayscale=True)  # there is no use for a degraded picture


def _train(args: argparse.Namespace, kind: Any, **settings: Any) -> None:
    from .processes import end_world, start_world
    from .run import TrainingJob

    config = config_of(args)
    if args.output.exists() and not args.output.is_dir():
        raise ValueError(f"--output {args.output}: a file; expected a folder, or a new name")
    device, _ = choose_device(args.device, "float32")
    data, held_out = read_data(args.data, args.validation)
    job = TrainingJob(
        data, held_out, args.output, data=" ".join(args.data), base=args.base, size=args.size,
        workers=args.workers, **settings,
    )  # fmt: skip
    world, device = start_world(device.type)
    run = kind(job, config, device, world)
    if run.trainer.done >= config.steps and not args.quiet:
        print(f"{args.output}: already at step {run.trainer.done}; nothing to train, --steps can be more")
    result = run.run(quiet=args.quiet)
    if world.rank == 0 and not args.quiet:
        print(run.summary())
        print(result)
    end_world()


def read_data(data: list[str], validation: list[str] | None) -> "tuple[Pictures, Pictures]":
    """The pictures to train on and those to validate with. ValueError where there are none."""
    from msbd.train.pictures import Part

    from ..scenes.data import held_out_pictures

    pictures = _pictures(data)
    if (validation or data) == ["scenes"]:
        return pictures, held_out_pictures()
    if validation:
        return pictures, _pictures(validation)
    count = min(HELD_OUT, len(pictures) // 20)
    if count == 0:
        warnings.warn(
            f"{len(pictures)} pictures are too few to keep some back: the validation losses are of training "
            "pictures, unless --validation names others",
            stacklevel=2,
        )
        return pictures, pictures
    step = len(pictures) // count
    held_out = range(0, step * count, step)  # from everywhere: folders are sorted by kind
    kept = sorted(set(range(len(pictures))) - set(held_out))
    return Part(pictures, kept), Part(pictures, held_out)


def _pictures(data: list[str]) -> "Pictures":
    from msbd.train.pictures import PictureFolder, TarShards

    from ..scenes.data import ScenePictures

    if data == ["scenes"]:
        return ScenePictures()
    if all(name.endswith(".tar") for name in data):
        return TarShards(data)
    if len(data) > 1:
        raise ValueError(f"--data {' '.join(data)}: expected one folder, tar files, or the word scenes")
    return PictureFolder(data[0])


def _curves(args: argparse.Namespace) -> None:
    from .curves import draw_curves, tenths_table

    text = tenths_table(args.runs)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    draw_curves(args.runs, args.output)
    print(f"{text}\n{args.output}")


if __name__ == "__main__":
    sys.exit(main())
