"""Measure edits on scenes whose truth is known, and make what measuring restoration takes.

python -m tools.evaluate edit            is the asked thing there, in the asked colour? The method beside its baselines
python -m tools.evaluate decoder-opt     what decoder optimisation does to the background and to the edge of the mask
python -m tools.evaluate restore         degraded scenes enlarged x4: PASD beside interpolation and the upscaler
python -m tools.evaluate fidelity        what `tools.restore --fidelity` does to them: PSNR, sharpness, likeness to the input
python -m tools.evaluate colorize        grey scenes coloured: luma, hue and colourfulness
python -m tools.evaluate photos          real pictures: colour and likeness to the input, sharpness, seams, seconds
python -m tools.evaluate tiles           a large picture restored in tiles beside the same in one piece
python -m tools.evaluate style           the same pictures restored with a base of another look: structure and style
python -m tools.evaluate degrade         pairs of clean and degraded pictures, and how fast they are made
python -m tools.evaluate jpeg            JPEG in tensor code beside Pillow's

Each edit's figures are kept under the runs folder as soon as they are there, by model and options: a run that was cut off goes
on, and parts of it (--start, --count) may run side by side. --fresh forgets them; do that after changing the code.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from msbd.edit.config import EditConfig, Method

from .._cli import (
    add_shared_options,
    check_not_shadowed,
    choose_device,
    finite,
    picture_size,
    report_errors,
    weighted_file,
)


def build_parser() -> argparse.ArgumentParser:
    """One sub-command per measurement."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    jobs = parser.add_subparsers(dest="job", required=True)
    edit = jobs.add_parser("edit", help="asked colour, CLIP's preference, asked object, seconds")
    edit.add_argument(
        "--modes",
        nargs="+",
        choices=get_args(Method),
        default=["msbd", "naive", "segments"],
        help="what to compare; msbd also runs with one candidate (default: msbd naive segments)",
    )
    edit.add_argument(
        "--first-stage-batch", type=int, default=5, metavar="B", help="msbd's candidates (default: 5)"
    )
    edit.add_argument(
        "--naive-batch",
        type=int,
        default=1,
        metavar="B",
        help="candidates of naive; one costs as much as 3.5 of msbd's (default: 1)",
    )
    edit.add_argument("--decoder-optimization", action="store_true", help="with it (default: without)")
    _add_common(edit, scenes=48)
    decoder = jobs.add_parser("decoder-opt", help="with and without decoder optimisation, paired")
    decoder.add_argument(
        "--first-stage-batch", type=int, default=1, metavar="B", help="candidates (default: 1)"
    )
    decoder.add_argument("--steps", type=int, default=100, metavar="N", help="of Adam (default: 100)")
    _add_common(decoder, scenes=16)
    _add_restore(jobs.add_parser("restore", help="PSNR, SSIM, GMSD, CLIP's distance, of scenes enlarged x4"))
    for job, about in (
        ("fidelity", "PSNR and sharpness over the dial, and with both readings of the start level"),
        ("colorize", "luma, hue, colourfulness of coloured grey scenes"),
    ):
        _add_mode(jobs.add_parser(job, help=about, description=about), job)
    about = (
        "real pictures restored, beside interpolation and the upscaler: what can be measured without a truth"
    )
    _add_photos(jobs.add_parser("photos", help=about, description=about))
    about = "what tiles of the latent do to a scene, flat grey, a gradient and a photo"
    _add_tiles(jobs.add_parser("tiles", help=about, description=about))
    about = "edges kept and style gained, of other bases and LoRAs under PASD"
    _add_style(jobs.add_parser("style", help=about, description=about))
    about = "pairs of clean and degraded pictures, for training or measuring restoration, on all cores"
    _add_degrade(jobs.add_parser("degrade", help=about, description=about))
    jpeg = jobs.add_parser("jpeg", help="PSNR between JPEG in tensor code and Pillow's, and seconds")
    jpeg.add_argument("-i", "--input", type=Path, nargs="+", required=True, metavar="FILE", help="pictures")
    jpeg.add_argument(
        "--qualities", type=int, nargs="+", default=[30, 60, 90], metavar="Q", help="(default: 30 60 90)"
    )
    jpeg.add_argument("--quiet", action="store_true", help="print nothing but errors")
    jpeg.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _add_restore(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", default="mini", help="the base: a name, folder or file (default: mini)")
    add("--pasd", action="append", type=named_path, metavar="NAME=PATH",
        help="nets to compare: a known name, or the folder of a run of `tools.train`, or its file; may be repeated "
        "(default: mini-pasd)")  # fmt: skip
    add("--scenes", type=int, default=64, metavar="N", help="held-out ones (default: 64)")
    add("--steps", type=int, default=20, metavar="N", help="of DDIM (default: 20)")
    add("--captions", action="store_true", help="tell PASD the scenes' captions (default: no text)")
    add("--guidance", type=finite, default=1.0, metavar="W", help="of the text (default: 1, without)")
    add("--negative", default="", metavar="TEXT", help="what guidance leads away from (default: no text)")
    add("--conditioning-scale", type=finite, default=1.0, metavar="X",
        help="of the ControlNet's residuals (default: 1)")  # fmt: skip
    add("--color-fix", choices=("wavelet", "none"), default="wavelet",
        help="large areas take the degraded picture's colours, as PASD's code has it (default: wavelet)")  # fmt: skip
    add("--start", type=int, default=0, metavar="N", help="first scene (default: 0)")
    add("--baseline", default="bicubic", metavar="NAME",
        help="what the others are compared with, in pairs (default: bicubic)")  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="also write the figures and every scene's values there")
    add("--pictures", type=Path, metavar="DIR", help="also write sheets of the pictures there")
    add("--quiet", action="store_true", help="print nothing but errors")
    add("--debug", action="store_true", help="show the traceback of an error")


def _add_mode(parser: argparse.ArgumentParser, job: str) -> None:
    add = parser.add_argument
    add("--model", default="mini", help="a name, folder or file, as for tools.restore (default: mini)")
    add("--scenes", type=int, default=64, metavar="N", help="held-out ones (default: 64)")
    add("--start", type=int, default=0, metavar="N", help="first scene (default: 0)")
    add("--steps", type=int, default=20, metavar="N", help="of the sampler (default: 20)")
    if job == "fidelity":
        add("--plot", type=Path, metavar="FILE", help="also draw PSNR and sharpness over the dial")
    if job == "colorize":
        add(
            "--guidance",
            type=finite,
            nargs="+",
            default=[1.0],
            metavar="W",
            help="of the text (default: 1, without)",
        )
        add("--negative", metavar="TEXT", help="what guidance leads away from (default: the model's)")
    add("--json", type=Path, metavar="FILE", help="also write the figures and every scene's values there")
    add("--pictures", type=Path, metavar="DIR", help="also write sheets of the pictures there")
    add("--quiet", action="store_true", help="print nothing but errors")
    add("--debug", action="store_true", help="show the traceback of an error")


def _add_photos(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "-i",
        "--input",
        type=Path,
        nargs="+",
        required=True,
        metavar="PATH",
        help="pictures, or folders of some",
    )
    add("--model", default="mini", help="a name, folder or file, as for tools.restore (default: mini)")
    add("--scale", type=finite, default=4, metavar="X", help="how many times larger results are (default: 4)")
    add("--steps", type=int, default=20, metavar="N", help="of the sampler (default: 20)")
    add("--fidelity", type=finite, nargs="+", default=[0.0, 0.5, 1.0], metavar="X", help="(default: 0 0.5 1)")
    add("--json", type=Path, metavar="FILE", help="also write the figures and every picture's values there")
    add(
        "--pictures",
        type=Path,
        metavar="DIR",
        help="also write the results, and sheets of input | results, there",
    )
    add("--quiet", action="store_true", help="print nothing but errors")
    add("--debug", action="store_true", help="show the traceback of an error")


def _add_tiles(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-i", "--input", type=Path, metavar="FILE", help="a photo to do it with, too")
    add("--model", default="mini", help="a name, folder or file, as for tools.restore (default: mini)")
    add(
        "--size", type=picture_size, default=(768, 1024), metavar="WxH", help="of results (default: 1024x768)"
    )
    add("--steps", type=int, default=8, metavar="N", help="of the sampler (default: 8)")
    add("--latent-tiled-size", type=int, metavar="N", help="cells (default: as for tools.restore)")
    add("--latent-tiled-overlap", type=int, nargs="+", metavar="N",
        help="cells; several are compared (default: as for tools.restore)")  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="also write the figures there")
    add("--pictures", type=Path, metavar="DIR", help="also write the results there")
    add("--quiet", action="store_true", help="print nothing but errors")
    add("--debug", action="store_true", help="show the traceback of an error")


def _add_style(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", default="mini", help="PASD: a name, folder or file, as for tools.restore (default: mini)")
    add("--style", action="append", type=named_style, metavar="NAME=PATH:WEIGHT",
        help="a base or a LoRA, and how much it counts (1 if not said); may be repeated (default: mini-style at 1.25)")  # fmt: skip
    add("--scenes", type=int, default=64, metavar="N", help="held-out ones (default: 64)")
    add("--start", type=int, default=64, metavar="N", help="first scene (default: 64)")
    add("--steps", type=int, default=10, metavar="N", help="of the sampler (default: 10)")
    add("--conditioning-scale", type=finite, default=1.0, metavar="X",
        help="of the ControlNet's residuals (default: 1)")  # fmt: skip
    add("--captions", action=argparse.BooleanOptionalAction, default=True,
        help="tell the nets what the scenes show (default: yes)")  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="also write the figures and every scene's values there")
    add("--pictures", type=Path, metavar="DIR", help="also write sheets of the pictures there")
    add("--quiet", action="store_true", help="print nothing but errors")
    add("--debug", action="store_true", help="show the traceback of an error")


def named_style(text: str) -> tuple[str, str, float]:
    """NAME=PATH:WEIGHT for argparse."""
    name, file = named_path(text)
    return name, *weighted_file(file)


def named_path(text: str) -> tuple[str, str]:
    """NAME=PATH for argparse."""
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise ValueError
    return name, path


named_style.__name__ = "NAME=PATH:WEIGHT"
named_path.__name__ = "NAME=PATH"  # argparse: "invalid NAME=PATH value: ..."


def _add_degrade(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("-i", "--input", type=Path, metavar="PATH", help="a picture, or a folder of pictures")
    source.add_argument(
        "--scenes", type=int, metavar="N", help="instead: the first N held-out scenes of the mini bundle"
    )
    parser.add_argument(
        "-o", "--out", type=Path, required=True, metavar="DIR",
        help="takes hq/NAME.png, lq/NAME.png and parameters/NAME.json of every pair",
    )  # fmt: skip
    parser.add_argument("--count", type=int, metavar="N", help="only the first N pictures (default: all)")
    parser.add_argument(
        "--ranges",
        choices=("pasd", "real-esrgan"),
        default="pasd",
        help="how strong; with real-esrgan hq is sharpened, as its training does (default: pasd)",
    )
    parser.add_argument(
        "--scale", type=int, default=4, metavar="N", help="lq is 1/N of hq's size (default: 4)"
    )
    parser.add_argument(
        "--size",
        type=int,
        metavar="PIXELS",
        help="a random square crop of that side (default: whole pictures, cut to multiples of --scale; scenes: rendered at that "
        "size, 512)",
    )
    add_shared_options(parser, device=False, dtype=False)


def _add_common(parser: argparse.ArgumentParser, *, scenes: int) -> None:
    parser.add_argument(
        "--model", default="mini", help="a name, or a folder laid out as weights/mini (default: mini)"
    )
    parser.add_argument("--scenes", type=int, default=scenes, metavar="N", help=f"in all (default: {scenes})")
    parser.add_argument(
        "--size", type=int, default=384, metavar="PIXELS", help="of a scene's sides (default: 384)"
    )
    parser.add_argument("--num-steps", type=int, default=50, metavar="N", help="T of the edit (default: 50)")
    parser.add_argument(
        "--repaint-steps", type=int, default=5, metavar="R", help="R of the edit (default: 5)"
    )
    parser.add_argument(
        "--start", type=int, default=0, metavar="N", help="first scene to compute now (default: 0)"
    )
    parser.add_argument(
        "--count", type=int, metavar="N", help="scenes to compute now (default: all from --start)"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the figures and every edit's record there"
    )
    parser.add_argument(
        "--pictures",
        type=Path,
        metavar="DIR",
        help="also write every result, and rows of source | truth | results, there",
    )
    parser.add_argument("--fresh", action="store_true", help="forget earlier figures for these options")
    add_shared_options(parser)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one measurement; exit code 0, or 1 if it could not be done. A figure not reached is no failure."""
    args = build_parser().parse_args(argv)
    with report_errors(debug=args.debug) as outcome:
        check_not_shadowed()
        jobs = {
            "degrade": _degrade,
            "restore": _restore,
            "jpeg": _jpeg,
            "fidelity": _mode,
            "colorize": _mode,
            "style": _style,
        }
        jobs |= {"photos": _photos, "tiles": _photos}
        text = jobs.get(args.job, _measure)(args)
        if not args.quiet:
            print(text)
    return outcome.exit_code


def _degrade(args: argparse.Namespace) -> str:
    from .degrade import degrade

    return degrade(args)


def _restore(args: argparse.Namespace) -> str:
    from .methods import restore

    return restore(args)


def _mode(args: argparse.Namespace) -> str:
    from . import dial

    return {"fidelity": dial.fidelity, "colorize": dial.colorize}[args.job](args)


def _photos(args: argparse.Namespace) -> str:
    from . import photos

    return {"photos": photos.photos, "tiles": photos.tiles}[args.job](args)


def _style(args: argparse.Namespace) -> str:
    from .style import style

    args.style = args.style or [("mini-style", "mini-style", 1.25)]
    return style(args)


def _jpeg(args: argparse.Namespace) -> str:
    from .jpeg import compare_jpeg

    return compare_jpeg(args)


def _measure(args: argparse.Namespace) -> str:
    from msbd.load import load_edit_pipeline, model_hash

    from .edit import Ledger, decoder_report, edit_report, make_trials, run_trials

    device, dtype = choose_device(args.device, args.dtype)
    base = EditConfig(num_steps=args.num_steps, repaint_steps=args.repaint_steps)
    trials = make_trials(args, base)
    for folder in (args.pictures, args.json and args.json.parent):
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
    digest = model_hash(args.model)
    pipe = load_edit_pipeline(args.model, device=device, dtype=dtype)
    words = f"{args.job}-{digest}-{args.size}-{args.seed}-{device.type}-{str(dtype).removeprefix('torch.')}"
    ledger = Ledger(words, fresh=args.fresh)
    run_trials(pipe, trials, ledger, args)
    report = edit_report if args.job == "edit" else decoder_report
    settings = {"model": str(args.model), "hash": digest, "device": device.type, "size": args.size}
    return report(trials, ledger, args, settings)


if __name__ == "__main__":
    sys.exit(main())
