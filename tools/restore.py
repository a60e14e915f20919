"""Restore photographs: enlarge and repair them, colour grey ones, restyle them; a picture or a folder of them.

  python -m tools.restore -i photo.jpg -o restored.png
  python -m tools.restore -i album -o restored --scale 2 --fidelity 0.8 --compare looks
  python -m tools.restore -i gray.png -o coloured.png --mode colorize -p "a red house on grass"
  python -m tools.restore -i photo.png -o drawn.png --mode stylize --lora mini-style:1

--fidelity goes from 0, which invents detail, to 1, which keeps to what is there; docs/restore.md shows what it does.
"""

import argparse
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msbd.restore_config import RestoreConfig

from ._cli import (
    Progress,
    add_config_options,
    add_shared_options,
    check_not_shadowed,
    choose_device,
    config_options,
    finite,
    given_options,
    report_errors,
    version,
    warn_of_long_prompts,
    weighted_file,
    wide,
)
from ._restore_tasks import Task, asked_size, find_tasks, resampled_alpha

if TYPE_CHECKING:
    import torch

    from msbd.captions import Kind
    from msbd.restore import RestorePipeline
    from msbd.restore_plan import RestorePlan, RestoreResult

# Preset -> what it sets; explicit flags overrule it. "official" is msbd.official_pasd.OPTIONS, which needs torch.
PRESETS: dict[str, dict[str, Any]] = {"paper": {}, "official": {}, "fast": {"num_inference_steps": 8}}

OPTIONS = config_options(RestoreConfig)
FLAGS = {"num_inference_steps": "--steps"}
KINDS: "tuple[Kind, ...]" = ("classification", "detection", "caption")
MEMORY = "take a smaller --latent-tiled-size, --tile-batch 1, --vae-tiling fast, or --device cpu"

# What --help says of every option but the mode and the seed, in its order. Their defaults are RestoreConfig's.
HELP: dict[str, dict[str, str]] = {
    "faithful or inventive": {
        "fidelity": "from 0, inventive, to 1, faithful: sets --alpha-a and --conditioning-scale (default: neither)",
        "alpha_a": "share of the degraded picture in the start latent, 0 (pure noise) to 1; Eq. 4 of the paper",
        "added_noise_level": "the same as a timestep, 0 to 999 (default: 900, the paper's)",
        "conditioning_scale": "how strongly the picture itself steers (default: 1)",
        "control_start": "share of the steps after which it begins to",
        "control_end": "share of the steps after which it no longer does",
        "color_fix": "give the result the colours of the input (default: wavelet; none for stylize and colorize)",
    },
    "prompts": {
        "guidance_scale": "how strongly to follow the prompts; 1: without guidance (default: the model's)",
        "guidance_start": "share of the steps after which guidance begins",
        "guidance_end": "share of the steps after which it ends",
        "added_prompt": 'words after the prompt (default: the model\'s, as a rule "clean, high-resolution, 8k")',
        "negative_prompt": "what to keep away from (default: the model's: blurry, noise, ...)",
    },
    "sampling": {
        "method": "PASD, or a baseline: its ControlNet without pixel attention, SD's img2img, RRDB, interpolation",
        "sampler": "the solver",
        "num_inference_steps": "diffusion steps",
        "spacing": "of the timesteps; auto: the sampler's usual one",
        "final_level": "where the last step ends: in no noise at all, or that of the first timestep",
        "eta": "fresh noise of ddim, 0 to 1",
        "init_latent_with_noise": "start from noise alone",
        "offset_noise_scale": "noise that is one value over each channel, added to such a start",
        "posterior": "the mean of the encoder's latents, or a sample",
        "strength": "of img2img: the share of the schedule that it runs through",
        "formulas": "whose sizes, rounding and tiles",
        "ans": "whether --added-noise-level is honoured, or as newer libraries have it misread",
    },
    "sizes and tiles": {
        "process_size": "pixels: a shorter side below it is enlarged to it, and the result shrunk back (default: 1.5 x the model's)",
        "latent_tiled_size": "latent cells of 8 pixels: side of a tile (default: twice the model's native size)",
        "latent_tiled_overlap": "latent cells: overlap of tiles (default: a quarter of the tile)",
        "tile_batch": "tiles at a time (default: what fits into memory)",
        "vae_tiling": "of large pictures in the autoencoder: equal to the whole, quicker and nearly so, or none",
        "encoder_tiled_size": "pixels: side of its encoder's tiles",
        "decoder_tiled_size": "latent cells: side of its decoder's tiles",
    },
}


def build_parser() -> argparse.ArgumentParser:
    """The command line; torch is not needed for it."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.restore",
        usage="python -m tools.restore -i FILE_OR_FOLDER -o FILE_OR_FOLDER [options]",
        description=__doc__,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=28),
        allow_abbrev=False,
        add_help=False,
    )
    what = parser.add_argument_group("what to do")
    add = what.add_argument
    add("-h", "--help", action="help", help="show this and exit")
    add("-i", "--image", type=Path, required=True, metavar="PATH", help="a picture, or a folder of them")
    add(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="PATH",
        help="a .png, .webp (both lossless) or .jpg; for a folder a folder",
    )
    sizes = what.add_mutually_exclusive_group()
    sizes.add_argument(
        "--scale", type=finite, metavar="X", help="times larger (default: 4; stylize and colorize: 1)"
    )
    sizes.add_argument("--size", type=picture_size, metavar="WxH", help="pixels of the result")
    add("--mode", choices=OPTIONS["mode"].choices, default="sr", help="super-resolution and repair; another style by another "
        "base or a LoRA; an old photograph, likewise; colours for a grey picture (default: sr)")  # fmt: skip
    add("--model", default="mini", help="a known model's name, or a model's folder or file (default: mini)")
    add(
        "--base",
        metavar="FILE",
        help="another Stable Diffusion 1.x model in the place of the one PASD was trained on",
    )
    add("--base-weight", type=finite, default=1.0, metavar="X", help="its share, 0 to 1 (default: 1)")
    add(
        "--lora", type=weighted_file, action="append", default=[], metavar="FILE:WEIGHT",
        help="add a LoRA to the base; may be repeated",
    )  # fmt: skip
    add("-p", "--prompt", default="", help="what is in the picture, in words")
    add(
        "--high-level-info", type=kinds_of, metavar="KINDS",
        help="what to recognise in the picture and put into the prompt: classification, detection, caption, with commas "
        "between; none (default: those whose weights were fetched, for a model that prompts help)",
    )  # fmt: skip
    add(
        "--preset", choices=PRESETS, default="paper",
        help="paper: its formulas and settings; official: those of the official code, to measure the difference; "
        "fast: 8 steps. Other flags overrule it (default: paper)",
    )  # fmt: skip
    add = parser.add_argument_group("what else to write").add_argument
    add("--compare", type=Path, metavar="PATH", help="input and result side by side; for a folder a folder")
    add("--skip-existing", action="store_true", help="leave out pictures whose result is there already")
    add("--no-metadata", action="store_true", help="leave prompt, settings and versions out of the result")
    add("--dry-run", action="store_true", help="check everything, print what would be done, write nothing")
    add_shared_options(parser)
    add_config_options(parser, OPTIONS, HELP, FLAGS)
    return parser


def picture_size(text: str) -> tuple[int, int]:
    """WxH for argparse, as (H, W)."""
    found = re.fullmatch(r"(\d{1,6})[xX×](\d{1,6})", text)
    if not found:
        raise ValueError
    return int(found[2]), int(found[1])


def kinds_of(text: str) -> "tuple[Kind, ...]":
    """Kinds of high-level information for argparse, in the order in which they enter the prompt."""
    asked = {part.strip() for part in text.split(",")} - {"none", ""}
    if not asked <= set(KINDS):
        raise ValueError
    return tuple(kind for kind in KINDS if kind in asked)


picture_size.__name__ = "WxH"  # argparse: "invalid WxH value: ..."
kinds_of.__name__ = f"list (of {', '.join(KINDS)}, or none)"


def main(argv: Sequence[str] | None = None) -> int:
    """Restore what is asked for; exit code 0, 1 for an expected failure, 2 for wrong usage."""
    args = build_parser().parse_args(argv)
    with report_errors(debug=args.debug, memory=MEMORY) as outcome:
        check_not_shadowed()
        job = prepare(args)
        if args.dry_run:
            print("\n".join(describe(args, job)))
        elif failed := run(args, job):
            raise ValueError(f"{failed} of {len(job.tasks)} pictures were not restored; see above")
    return outcome.exit_code


# ---- before it runs ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A checked command: nothing that the command line can be blamed for is left."""

    tasks: list[Task]
    config: RestoreConfig
    kinds: "tuple[Kind, ...]"
    device: "torch.device"
    dtype: "torch.dtype"


def prepare(args: argparse.Namespace) -> Job:
    """Check everything but pictures and weights, and write nothing. ValueError or OSError, in one line."""
    from msbd.load import restore_measures
    from msbd.load_captions import available, load_captioners
    from msbd.load_nets import read_lora_file

    tasks = find_tasks(args)
    device, dtype = choose_device(args.device, args.dtype)
    if args.scale is not None and not 0 < args.scale <= 64:
        raise ValueError(f"--scale is {args.scale}; expected above 0, and 64 at most")
    if not 0 <= args.base_weight <= 1:
        raise ValueError(f"--base-weight is {args.base_weight}; expected 0 (without it) to 1 (it alone)")
    config = restore_config(args)
    measures = restore_measures(args.model, mode=args.mode, base=args.base)
    config.for_model(measures)
    for path, _ in args.lora:
        read_lora_file(path)  # told now, and not after minutes
    kinds = args.high_level_info
    if kinds is None:
        kinds = available() if measures.prompts and config.method not in ("rrdb", "bicubic") else ()
    elif kinds and not args.dry_run:
        load_captioners(kinds)
    return Job(tasks, config, tuple(kinds), device, dtype)


def restore_config(args: argparse.Namespace) -> RestoreConfig:
    """The preset's options, overruled by the flags that were given."""
    from msbd.official_pasd import OPTIONS as OFFICIAL

    preset = OFFICIAL if args.preset == "official" else PRESETS[args.preset]
    return RestoreConfig(**{**preset, **given_options(args, OPTIONS)})


def describe(args: argparse.Namespace, job: Job) -> list[str]:
    """What would be done, line by line."""
    from msbd.images import load_image
    from msbd.load import restore_measures
    from msbd.restore_plan import plan_restore

    measures, lines, total = restore_measures(args.model, mode=args.mode, base=args.base), [], 0
    for task in job.tasks:
        size = load_image(task.image).size
        plan = plan_restore(size, asked_size(args, size), job.config, measures)
        total += plan.evaluations
        lines.append(f"{task.image.name}: {plan_text(plan)}")
    guided = (
        "without guidance" if job.config.for_model(measures).guidance_scale == 1 else "each for both prompts"
    )
    return [*lines, f"in all {total:,} evaluations, {guided}"]


def plan_text(plan: "RestorePlan") -> str:
    """Sizes, tiles and evaluations in words."""
    tiles = f", {len(plan.tiles)} tiles" if len(plan.tiles) > 1 else ""
    at = f", restored at {wide(plan.work)}" if plan.work != plan.output else ""
    return f"{wide(plan.size)} -> {wide(plan.output)}{at}{tiles}, {plan.evaluations:,} evaluations"


# ---- running ----------------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace, job: Job) -> int:
    """Load the model, restore, write; the number of pictures that failed. The one of a single picture is raised."""
    from msbd.load import load_restore_pipeline
    from msbd.load_captions import load_captioners

    pipeline = load_restore_pipeline(
        args.model, mode=args.mode, method=job.config.method, base=args.base, base_weight=args.base_weight,
        loras=args.lora, device=job.device, dtype=job.dtype,
    )  # fmt: skip
    models = load_captioners(job.kinds, job.device) if job.kinds else {}
    facts = None if args.no_metadata else metadata(args)
    failed = 0
    for number, task in enumerate(job.tasks, 1):
        head = f"{number}/{len(job.tasks)} " if len(job.tasks) > 1 else ""
        if args.skip_existing and task.output.exists():
            continue
        try:
            start = time.perf_counter()
            result = restore_one(args, job, task, pipeline, models, facts)
        except (ValueError, OSError) as error:
            if len(job.tasks) == 1:
                raise
            failed += 1
            print(f"{head}error: {' '.join(str(error).split())}", file=sys.stderr)
            continue
        if not args.quiet:
            for note in result.notes:
                print(f"note: {note}", file=sys.stderr)
            print(f"{head}{task.output}: {plan_text(result.plan)}, {time.perf_counter() - start:.1f} s")
    return failed


def restore_one(
    args: argparse.Namespace, job: Job, task: Task, pipeline: "RestorePipeline", models: Any, facts: dict[str, Any] | None
) -> "RestoreResult":  # fmt: skip
    """Read, restore and write one picture."""
    from msbd.captions import describe as recognise
    from msbd.images import check_output_path, load_image, save_image, to_pixels

    from ._sheets import before_and_after

    photo = load_image(task.image)
    size = asked_size(args, photo.size)
    check_output_path(task.output, size)
    if photo.alpha is not None and task.output.suffix.lower() in (".jpg", ".jpeg"):
        raise ValueError(
            f"{task.output}: JPEG has no transparency, which {task.image} has; write a .png or .webp"
        )
    information = recognise(photo.image.to(job.device), job.kinds, models) if job.kinds else []
    with Progress(quiet=args.quiet) as progress:
        result = pipeline(
            photo.image,
            args.prompt,
            output_size=size,
            information=information,
            config=job.config,
            on_step=progress,
        )
    if not args.quiet:
        warn_of_long_prompts(pipeline.tokenizer, (result.prompt, result.negative_prompt))
    pixels = to_pixels(result.image)
    written = None
    if facts is not None:
        told = {"prompt": result.prompt, "negative_prompt": result.negative_prompt}
        settings = asdict(result.plan.config) | {"size": wide(size), "notes": "; ".join(result.notes) or None}
        written = told | facts | {name: value for name, value in settings.items() if name not in told}
    save_image(
        pixels,
        task.output,
        metadata=written,
        alpha=resampled_alpha(photo, size),
        icc_profile=photo.icc_profile,
    )
    if task.compare:
        save_image(before_and_after(photo.pixels, pixels), task.compare, icc_profile=photo.icc_profile)
    return result


def metadata(args: argparse.Namespace) -> dict[str, Any]:
    """What is needed to make the picture again, but the settings themselves."""
    import torch

    from msbd.load import model_hash, restorer_name
    from msbd.load_nets import BASE, lora_file
    from weights.files import sha256

    model = restorer_name(args.model, args.mode)
    return {
        "model": Path(model).name,  # of a folder no more than its own name
        "model_hash": model_hash(model, spare=BASE if args.base else ()),
        "base": args.base and f"{Path(args.base).name}:{args.base_weight:g} ({model_hash(args.base)})",
        "loras": [
            f"{Path(path).name}:{weight:g} ({sha256(lora_file(path))[:10]})" for path, weight in args.lora
        ]
        or None,
        "preset": args.preset,
        "device": args.device,
        "msbd": version(),
        "torch": str(torch.__version__),
    }


if __name__ == "__main__":
    raise SystemExit(main())
