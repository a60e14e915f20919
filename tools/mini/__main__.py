"""The mini bundle: train it, write its files, measure it, look at its scenes.

python -m tools.mini train --part vae     from its last checkpoint on; so clip, unet, rrdb, pasd, ...
python -m tools.mini export               the trained parts -> weights/mini/*.safetensors
python -m tools.mini evaluate             held-out figures of the bundle
python -m tools.mini scenes -o scenes.png a page of scenes
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from .._cli import report_errors
from . import evaluate

PARTS = ("vae", "clip", "unet", "rrdb")  # in the order in which they are trained
PASD = ("pasd", "pasd-color")  # what is trained on the finished bundle, by the code of `tools.train`
ASYMMETRIC = "asymmetric"  # the decoder that sees what an edit keeps, on the finished VAE
FEW_STEP = "few-step"  # a LoRA distilled from the bundle's U-Net
STYLE = "style"  # the U-Net with another look, by the code of `tools.train base`; exported as a LoRA
ABLATIONS = ("pasd-short", "pasd-none", "pasd-no-rgb")  # trained for figures only


def build_parser() -> argparse.ArgumentParser:
    """One sub-command per job."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.mini", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    jobs = parser.add_subparsers(dest="job", required=True)
    train = jobs.add_parser("train", help="train one part, from its last checkpoint on")
    train.add_argument(
        "--part", choices=(*PARTS, *PASD, ASYMMETRIC, FEW_STEP, STYLE, *ABLATIONS), required=True
    )
    train.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="where (default: auto)"
    )
    train.add_argument("--threads", type=int, help="CPU threads (default: all)")
    export = jobs.add_parser("export", help="write the bundle's files from the last checkpoints")
    export.add_argument(
        "--part",
        choices=(*PARTS, *PASD, ASYMMETRIC, FEW_STEP, STYLE),
        action="append",
        help="only this part; may be repeated",
    )
    export.add_argument("--folder", type=Path, help="where to (default: weights/mini)")
    scenes = jobs.add_parser("scenes", help="draw scenes")
    scenes.add_argument("-o", "--output", type=Path, required=True)
    scenes.add_argument("--count", type=int, default=60, help="how many, ten in a row (default: 60)")
    scenes.add_argument("--size", type=int, default=128, help="pixels (default: 128)")
    scenes.add_argument("--seed", type=int, default=0, help="the first scene's seed (default: 0)")
    evaluate.add_arguments(jobs.add_parser("evaluate", help="held-out figures of the bundle"))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one job; exit code 0, or 1 for an expected failure."""
    args = build_parser().parse_args(argv)
    if args.job == "evaluate":
        return evaluate.run(args)
    with report_errors() as outcome:
        {"train": _train, "export": _export, "scenes": _scenes}[args.job](args)
    return outcome.exit_code


def _train(args: argparse.Namespace) -> None:
    import torch

    from . import parts
    from .train import checkpoint_of, train

    if args.threads:
        torch.set_num_threads(args.threads)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    if args.part in parts.PARTS:
        train(parts.PARTS[args.part](), device=torch.device(device))
    elif args.part == ASYMMETRIC:
        from .asymmetric import AsymmetricPart

        train(
            AsymmetricPart(start=not checkpoint_of(AsymmetricPart.name).exists()), device=torch.device(device)
        )
    elif args.part == FEW_STEP:
        from .few_step import FewStepPart

        train(FewStepPart(), device=torch.device(device))
    elif args.part == STYLE:
        from .style import train_style

        print(train_style(torch.device(device)))
    else:
        from .pasd import train_variant

        print(train_variant(args.part, torch.device(device)))


def _export(args: argparse.Namespace) -> None:
    from weights.registry import MINI

    from .export import export

    for path in export(args.part or [*PARTS, *PASD, ASYMMETRIC, FEW_STEP, STYLE], args.folder or MINI):
        print(f"{path}  {path.stat().st_size:,} bytes")


def _scenes(args: argparse.Namespace) -> None:
    import numpy as np

    from msbd.pixels.files import save_image

    from ..scenes.data import to_bytes
    from ..scenes.scenes import random_scene, render

    pictures = [render(random_scene(args.seed + i), args.size).image for i in range(args.count)]
    pictures += [np.ones_like(pictures[0])] * (-len(pictures) % 10 if len(pictures) > 10 else 0)
    rows = [np.concatenate(pictures[i : i + 10], 1) for i in range(0, len(pictures), 10)]
    save_image(to_bytes(np.concatenate(rows)), args.output)
    for i in range(args.count):
        print(args.seed + i, random_scene(args.seed + i).caption)


if __name__ == "__main__":
    raise SystemExit(main())
