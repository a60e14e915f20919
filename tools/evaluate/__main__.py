"""Measure edits and restorations of scenes whose truth is known, and restorations of photographs.

python -m tools.evaluate edit          the asked thing in the asked colour? The method beside its baselines
python -m tools.evaluate decoder-opt   what decoder optimisation does to the background and the mask's edge
python -m tools.evaluate presets       what the presets of tools.edit give for their work, in pairs
python -m tools.evaluate seams         each way to meet the background: ring, edge, inside, prompt, seconds
python -m tools.evaluate restore       degraded scenes enlarged x4: PASD beside interpolation and the upscaler
python -m tools.evaluate fidelity      what `tools.restore --fidelity` does to them: PSNR, sharpness, input
python -m tools.evaluate colorize      grey scenes coloured: luma, hue and colourfulness
python -m tools.evaluate photos        real pictures: likeness to the input, sharpness, seams, seconds
python -m tools.evaluate enlarge       photographs at a quarter of their size, enlarged: official upscalers
python -m tools.evaluate tiles         a large picture restored in tiles beside the same in one piece
python -m tools.evaluate style         degraded scenes restored with a base of another look
python -m tools.evaluate degrade       pairs of clean and degraded pictures, and how fast they are made

The figures of `edit`, `decoder-opt`, `presets` and `seams` are kept under the runs folder as soon as they are
there, by model, options and the state of the code: a run that was cut off goes on, and parts of it (--start,
--count) may run side by side.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import get_args

from msbd.edit.config import Method, Seam
from msbd.restore.config import Sampler

from .._cli import (
    CELL,
    CommandParser,
    add_shared_options,
    check_not_shadowed,
    finite,
    picture_size,
    report_errors,
    weighted_file,
)
from ..edit import PRESETS

Parser = argparse.ArgumentParser


# ---- options that several jobs have ------------------------------------------------------------------------


def _add_model(parser: Parser, about: str = "a name, folder or file, as for tools.restore") -> None:
    parser.add_argument("--model", default="mini", help=f"{about} (default: mini)")


def _add_scenes(parser: Parser, scenes: int = 64, start: int = 0) -> None:
    add = parser.add_argument
    add("--scenes", type=int, default=scenes, metavar="N", help=f"held-out scenes (default: {scenes})")
    add("--start", type=int, default=start, metavar="N", help=f"the first of them (default: {start})")


def _add_steps(parser: Parser, steps: int) -> None:
    parser.add_argument(
        "--steps", type=int, default=steps, metavar="N", help=f"diffusion steps (default: {steps})"
    )


def _add_guidance(parser: Parser, *, several: bool = False) -> None:
    add = parser.add_argument
    if several:
        add("--guidance-scale", type=finite, nargs="+", default=[1.0], metavar="W",
            help="weights of the text, each compared (default: 1, without)")  # fmt: skip
        add("--negative-prompt", metavar="TEXT", help="what guidance leads away from (default: the model's)")
    else:
        add(
            "--guidance-scale",
            type=finite,
            default=1.0,
            metavar="W",
            help="weight of the text (default: 1, without)",
        )
        add(
            "--negative-prompt",
            default="",
            metavar="TEXT",
            help="what guidance leads away from (default: no text)",
        )


def _add_conditioning(parser: Parser) -> None:
    parser.add_argument("--conditioning-scale", type=finite, default=1.0, metavar="X",
                        help="scale of the ControlNet's residuals (default: 1)")  # fmt: skip


def _add_reports(
    parser: Parser, values: str = "every scene's values", pictures: str = "sheets of the pictures"
) -> None:
    """What every measurement has: where else the figures go, and how it runs."""
    add = parser.add_argument
    add("--json", type=Path, metavar="FILE", help=f"also write the figures and {values} there")
    add("--pictures", type=Path, metavar="DIR", help=f"also write {pictures} there")
    add_shared_options(parser)


# ---- the jobs ----------------------------------------------------------------------------------------------


def _add_edit(parser: Parser) -> None:
    add = parser.add_argument
    add("--methods", nargs="+", choices=get_args(Method), default=["msbd", "naive", "segments"],
        help="what to compare; msbd also runs with one candidate (default: msbd naive segments)")  # fmt: skip
    add("--first-stage-batch", type=int, default=5, metavar="B", help="msbd's candidates (default: 5)")
    add("--naive-batch", type=int, default=1, metavar="B",
        help="candidates of naive; one costs as much as 3.5 of msbd's (default: 1)")  # fmt: skip
    add("--decoder-optimization", action="store_true", help="with it (default: without)")
    _add_edits(parser, scenes=48)


def _add_decoder(parser: Parser) -> None:
    add = parser.add_argument
    add("--first-stage-batch", type=int, default=1, metavar="B", help="candidates (default: 1)")
    add("--decoderopt-steps", type=int, default=100, metavar="N", help="steps of Adam (default: 100)")
    _add_edits(parser, scenes=16)


def _add_edits(parser: Parser, *, scenes: int) -> None:
    """What both jobs that edit scenes by the paper's method have."""
    _add_many_edits(parser, scenes=scenes)
    _add_steps(parser, 50)
    parser.add_argument("--repaint-steps", type=int, default=5, metavar="R", help="the edit's R (default: 5)")


def _add_picture(parser: Parser) -> None:
    """What jobs have that edit one picture as well as scenes."""
    add = parser.add_argument
    add("-i", "--image", type=Path, metavar="FILE", help="a picture (default: held-out scenes)")
    add("-m", "--mask", type=Path, metavar="FILE", help="its mask, white where to edit")
    add("-p", "--prompt", metavar="TEXT", help="what to paint there")


def _add_many_edits(parser: Parser, *, scenes: int, size: int = 384) -> None:
    """What all jobs have that edit scenes and keep what is known."""
    add = parser.add_argument
    _add_model(parser, "a name, or a folder laid out as weights/mini")
    _add_scenes(parser, scenes)
    add("--count", type=int, metavar="N", help="scenes to compute now (default: all from --start)")
    add("--size", type=int, default=size, metavar="PIXELS", help=f"side of a scene (default: {size})")
    add("--fresh", action="store_true", help="forget earlier figures for these options")
    _add_reports(parser, "every edit's record", "every result, and rows of source | truth | results,")


def _add_presets(parser: Parser) -> None:
    add = parser.add_argument
    _add_picture(parser)
    add("--presets", nargs="+", choices=list(PRESETS), default=["paper", "default", "fast"],
        help="what to compare; the others with the first (default: paper default fast)")  # fmt: skip
    add("--also", action="append", type=named_path, default=[], metavar="NAME=FLAGS",
        help="a setting beside them, in flags of tools.edit over preset default, as "
        "'four=--lora lcm-lora --steps 4'; may be repeated")  # fmt: skip
    add("--seam", choices=get_args(Seam), help="one for all presets (default: each its own)")
    add("--steps", type=int, metavar="N", help="diffusion steps of all presets (default: each its own)")
    add("--plot", type=Path, metavar="FILE", help="also draw quality over evaluations")
    _add_many_edits(parser, scenes=96)


def _add_seams(parser: Parser) -> None:
    add = parser.add_argument
    _add_picture(parser)
    seams = ("none", "adam", "adam-ring", "closed-form", "asymmetric", "membrane")
    add("--seams", nargs="+", choices=seams, default=list(seams), help="what to compare (default: all)")
    add("--steps", type=int, metavar="N", help="diffusion steps (default: preset default's)")
    add("--decoderopt-steps", type=int, default=100, metavar="N", help="steps of Adam (default: 100)")
    _add_many_edits(parser, scenes=16, size=768)


def _add_restore(parser: Parser) -> None:
    add = parser.add_argument
    _add_model(parser, "the base: a name, folder or file")
    add("--pasd", action="append", type=named_path, metavar="NAME=PATH",
        help="nets to compare: a known name, or the folder of a run of `tools.train`, or its file; may be "
        "repeated (default: mini-pasd)")  # fmt: skip
    _add_scenes(parser)
    _add_steps(parser, 20)
    add("--sampler", choices=get_args(Sampler), default="unipc", help="(default: unipc, tools.restore's)")
    add("--alpha-a", type=finite, metavar="X",
        help="the start's level, 1 for Eq. 3 of the paper (default: tools.restore's, n = 900)")  # fmt: skip
    add("--process-size", type=int, metavar="PIXELS",
        help="what is smaller is enlarged to it and shrunk back (default: tools.restore's)")  # fmt: skip
    add("--captions", action="store_true", help="tell PASD the scenes' captions (default: no text)")
    _add_guidance(parser)
    _add_conditioning(parser)
    add("--own-settings", action="store_true",
        help="instead of these three: guidance, prompts and scale as in tools.restore")  # fmt: skip
    add("--color-fix", choices=("wavelet", "none"), default="wavelet",
        help="wavelet: large areas take the degraded picture's colours (default: wavelet)")  # fmt: skip
    add("--baseline", default="bicubic", metavar="NAME",
        help="what the others are compared with, in pairs (default: bicubic)")  # fmt: skip
    _add_reports(parser)


def _add_fidelity(parser: Parser) -> None:
    _add_model(parser)
    _add_scenes(parser)
    _add_steps(parser, 20)
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="also draw PSNR and sharpness over the dial"
    )
    _add_reports(parser)


def _add_colorize(parser: Parser) -> None:
    _add_model(parser)
    _add_scenes(parser)
    _add_steps(parser, 20)
    _add_guidance(parser, several=True)
    _add_reports(parser)


def _add_photos(parser: Parser) -> None:
    add = parser.add_argument
    add(
        "-i",
        "--image",
        type=Path,
        nargs="+",
        required=True,
        metavar="PATH",
        help="pictures, or folders of some",
    )
    _add_model(parser)
    add("--scale", type=finite, default=4, metavar="X", help="how many times larger results are (default: 4)")
    _add_steps(parser, 20)
    add("--fidelity", type=finite, nargs="+", default=[0.0, 0.5, 1.0], metavar="X", help="(default: 0 0.5 1)")
    _add_reports(parser, "every picture's values", "the results, and sheets of input | results,")


def _add_enlarge(parser: Parser) -> None:
    add = parser.add_argument
    add("-i", "--image", type=Path, nargs="+", metavar="PATH",
        help="pictures, or folders of some (default: four photographs of scikit-image)")  # fmt: skip
    _add_model(parser)
    add("--upscalers", nargs="*", default=["realesrgan-x4plus", "realsr-df2k"], metavar="MODEL",
        help="names, folders or files (default: realesrgan-x4plus realsr-df2k)")  # fmt: skip
    _add_steps(parser, 20)
    add("--fidelity", type=finite, default=1.0, metavar="X", help="of PASD (default: 1)")
    add("--seams", type=int, nargs="+", metavar="PIXELS",
        help="measure instead what the upscalers' pieces leave that see so many pixels around them")  # fmt: skip
    _add_reports(parser, "every picture's values", "the results, and rows of truth | results,")


def _add_tiles(parser: Parser) -> None:
    add = parser.add_argument
    add("-i", "--image", type=Path, metavar="FILE", help="a photo to do it with, too")
    _add_model(parser)
    add(
        "--size",
        type=picture_size,
        default=(768, 1024),
        metavar="WxH",
        help="size of results (default: 1024x768)",
    )
    _add_steps(parser, 8)
    add("--tile", type=int, metavar="PIXELS", help="side of a tile (default: as for tools.restore)")
    add("--tile-overlap", type=int, nargs="+", metavar="PIXELS",
        help="several are compared (default: as for tools.restore)")  # fmt: skip
    _add_reports(parser, "every result's values", "the results")


def _add_style(parser: Parser) -> None:
    add = parser.add_argument
    _add_model(parser, "PASD: a name, folder or file, as for tools.restore")
    add("--style", action="append", type=named_style, metavar="NAME=PATH:WEIGHT",
        help="a base or a LoRA, and how much it counts (1 if not said); may be repeated "
        "(default: mini-style at 1.25)")  # fmt: skip
    _add_scenes(parser, start=64)
    _add_steps(parser, 10)
    _add_conditioning(parser)
    add("--captions", action=argparse.BooleanOptionalAction, default=True,
        help="tell the nets what the scenes show (default: yes)")  # fmt: skip
    _add_reports(parser)


def _add_degrade(parser: Parser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("-i", "--image", type=Path, metavar="PATH", help="a picture, or a folder of pictures")
    source.add_argument(
        "--scenes", type=int, metavar="N", help="instead: the first N held-out scenes of the mini bundle"
    )
    add = parser.add_argument
    add("-o", "--output", type=Path, required=True, metavar="DIR",
        help="takes hq/NAME.png, lq/NAME.png and parameters/NAME.json of every pair")  # fmt: skip
    add("--count", type=int, metavar="N", help="only the first N pictures (default: all)")
    add("--ranges", choices=("pasd", "real-esrgan"), default="pasd",
        help="how strong; real-esrgan sharpens hq, as its training does (default: pasd)")  # fmt: skip
    add("--scale", type=int, default=4, metavar="N", help="lq is 1/N of hq's size (default: 4)")
    add("--size", type=int, metavar="PIXELS",
        help="a random square crop of that side (default: whole pictures, cut to multiples of --scale; "
        "scenes: rendered at that size, 512)")  # fmt: skip
    add_shared_options(parser, device=False, dtype=False)


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

# Job -> its options, the function that does it (module.function), and what it is about.
JOBS: dict[str, tuple[Callable[[Parser], None], str, str]] = {
    "edit": (_add_edit, "edit.evaluate_edits", "asked colour, CLIP's preference, asked object, seconds"),
    "decoder-opt": (_add_decoder, "edit.evaluate_edits", "with and without decoder optimisation, paired"),
    "presets": (_add_presets, "presets.evaluate_presets", "quality and work of tools.edit's presets, paired"),
    "seams": (_add_seams, "seams.evaluate_seams", "each way to make an edit meet its background"),
    "restore": (_add_restore, "methods.restore", "PSNR, SSIM, GMSD, CLIP's distance, of scenes enlarged x4"),
    "fidelity": (_add_fidelity, "dial.fidelity",
                 "PSNR and sharpness over the dial, and with both readings of the start level"),
    "colorize": (_add_colorize, "dial.colorize", "luma, hue, colourfulness of coloured grey scenes"),
    "photos": (_add_photos, "photos.photos",
               "real pictures restored, beside interpolation and the upscaler: what needs no truth"),
    "enlarge": (_add_enlarge, "enlarge.enlarge",
                "photographs reduced to a quarter and enlarged again, by official upscalers too"),
    "tiles": (_add_tiles, "photos.tiles", "what tiles of the latent do to a scene, grey, a gradient, photos"),
    "style": (_add_style, "style.style", "edges kept and style gained, of other bases and LoRAs under PASD"),
    "degrade": (_add_degrade, "degrade.degrade",
                "pairs of clean and degraded pictures, for training or measuring restoration, on all cores"),
}  # fmt: skip

# Job -> flags by their names before, which go on working.
OLD_FLAGS: dict[str, dict[str, str]] = {
    "edit": {"--modes": "--methods", "--num-steps": "--steps"},
    "decoder-opt": {"--num-steps": "--steps"},
    "restore": {"--guidance": "--guidance-scale", "--negative": "--negative-prompt"},
    "colorize": {"--guidance": "--guidance-scale", "--negative": "--negative-prompt"},
    "photos": {"--input": "--image"},
    "tiles": {"--input": "--image"},
    "degrade": {"--input": "--image", "--out": "--output"},
}
# The same for flags that counted latent cells; today's count pixels.
OLD_CELLS: dict[str, dict[str, str]] = {
    "tiles": {"--latent-tiled-size": "--tile", "--latent-tiled-overlap": "--tile-overlap"},
}


def build_parser() -> CommandParser:
    """One sub-command per measurement."""
    parser = CommandParser(
        prog="python -m tools.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    jobs = parser.add_subparsers(dest="job", required=True)
    for name, (add_options, _, about) in JOBS.items():
        job = jobs.add_parser(name, help=about, description=about, allow_abbrev=False)
        add_options(job)
        for old, new in OLD_FLAGS.get(name, {}).items():
            job.add_renamed(old, new)
        for old, new in OLD_CELLS.get(name, {}).items():
            job.add_renamed(old, new, times=CELL)
    return parser


def today(words: Sequence[str]) -> list[str]:
    """The command line `words`, where --steps of `decoder-opt` counted Adam's with its name of today."""
    flags = [word.partition("=")[0] for word in words]
    if "decoder-opt" not in words or "--steps" not in flags:
        return list(words)
    tell = not {"--quiet", "--help", "-h"} & set(words)
    if "--num-steps" not in flags:
        if tell:
            note = "note: --steps are diffusion steps here as everywhere; Adam's are --decoderopt-steps"
            print(note, file=sys.stderr)
        return list(words)
    new = "--decoderopt-steps"  # beside --num-steps, as a command of before has it, --steps were Adam's
    if tell:
        print(f"note: --steps beside --num-steps is now {new}", file=sys.stderr)
    pairs = zip(words, flags, strict=True)
    return [new + word[len(flag) :] if flag == "--steps" else word for word, flag in pairs]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one measurement; exit code 0, or 1 if it could not be done. A figure not reached is no failure."""
    args = build_parser().parse_args(today(sys.argv[1:] if argv is None else argv))
    memory = "take fewer or smaller pictures (--scenes, --size), or --device cpu"
    with report_errors(debug=args.debug, memory=memory) as outcome:
        check_not_shadowed()
        # Imported late: torch comes with it, which --help does not wait for.
        from .._report import make_folders

        make_folders(args)
        module, function = JOBS[args.job][1].split(".")
        text = getattr(import_module(f"{__package__}.{module}"), function)(args)
        if not args.quiet:
            print(text)
    return outcome.exit_code


if __name__ == "__main__":
    sys.exit(main())
