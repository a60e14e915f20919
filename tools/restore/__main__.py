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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msbd.restore.config import NET_FREE, RestoreConfig, RestoreMeasures

from .._cli import (
    Progress,
    add_config_options,
    add_shared_options,
    check_not_shadowed,
    choose_device,
    config_options,
    expected_failure,
    finite,
    given_options,
    picture_parser,
    report_errors,
    told_loras,
    version,
    warn_of_long_prompts,
    weighted_file,
    wide,
)
from .tasks import Task, asked_size, find_tasks, read_picture, resampled_alpha

if TYPE_CHECKING:
    import torch

    from msbd.load import RestoreModel
    from msbd.restore.captions import Kind
    from msbd.restore.pipeline import RestorePipeline
    from msbd.restore.plan import RestorePlan, RestoreResult
    from weights.lora import Lora

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
        "conditioning_scale": "how strongly the picture itself steers (default: the model's, as a rule 1)",
        "control_start": "share of the steps after which the picture begins to steer",
        "control_end": "share of the steps after which it no longer steers",
        "color_fix": "give the result the colours of the input (default: wavelet; none for stylize, never for colorize)",
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
        "ans": "whether --added-noise-level is honoured, or misread as newer libraries do with unipc and dpmpp",
    },
    "sizes and tiles": {
        "process_size": "pixels: a shorter side below it is enlarged to it (the longer one at most to twice it), and the result shrunk back "
        "(default: 1.5 x the model's)",
        "latent_tiled_size": "latent cells of 8 pixels: side of a tile (default: twice the model's native size)",
        "latent_tiled_overlap": "latent cells: overlap of tiles (default: a quarter of the tile)",
        "tile_batch": "tiles at a time (default: what fits into memory)",
        "vae_tiling": "of large pictures in the autoencoder: equal to the whole; nearly so, in less memory; or none",
        "encoder_tiled_size": "pixels: side of its encoder's tiles",
        "decoder_tiled_size": "latent cells: side of its decoder's tiles",
    },
}


def build_parser() -> argparse.ArgumentParser:
    """The command line; torch is not needed for it."""
    parser = picture_parser("restore", "-i FILE_OR_FOLDER -o FILE_OR_FOLDER [options]", __doc__)
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
    add(
        "--base-weight",
        type=finite,
        default=1.0,
        metavar="X",
        help="its share where the model has a base of its own, 0 to 1 (default: 1)",
    )
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
    found = re.fullmatch(r"([1-9]\d{0,5})[xX×]([1-9]\d{0,5})", text)
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
        failed = describe(args, job) if args.dry_run else run(args, job)
        if failed:
            raise ValueError(f"{failed} of {len(job.tasks)} pictures failed; see above")
    return outcome.exit_code


# ---- before it runs ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A checked command: nothing that the command line can be blamed for is left."""

    tasks: list[Task]
    config: RestoreConfig
    model: "RestoreModel"
    loras: "list[tuple[Lora, float]]"
    measures: RestoreMeasures
    kinds: "tuple[Kind, ...]"
    device: "torch.device"
    dtype: "torch.dtype"


def prepare(args: argparse.Namespace) -> Job:
    """Check everything but weights and the pictures of a folder, and write nothing. ValueError or OSError, in one line."""
    from msbd.load import locate_restorer, restore_measures
    from msbd.loading.captions import available, load_captioners
    from msbd.loading.nets import read_lora_file
    from msbd.restore.plan import plan_restore

    tasks = find_tasks(args)
    device, dtype = choose_device(args.device, args.dtype)
    if args.scale is not None and not 0 < args.scale <= 64:
        raise ValueError(f"--scale is {args.scale}; expected above 0, and 64 at most")
    if not 0 <= args.base_weight <= 1:
        raise ValueError(f"--base-weight is {args.base_weight}; expected 0 (without it) to 1 (it alone)")
    if args.base is None and args.base_weight != 1:
        raise ValueError(f"--base-weight is {args.base_weight}, but of no --base; give one")
    config = restore_config(args)
    model = locate_restorer(args.model, mode=args.mode, method=config.method, base=args.base)
    measures = restore_measures(model)
    plan_restore((64, 64), None, config, measures)  # what suits no picture
    loras = [
        (read_lora_file(path), weight) for path, weight in args.lora
    ]  # refused now, and not after minutes
    kinds = args.high_level_info
    if kinds is None:
        kinds = available() if measures.prompts and config.method not in NET_FREE else ()
    elif kinds:
        there = available()
        if missing := [kind for kind in kinds if kind not in there]:
            load_captioners(missing)  # says what it lacks
    job = Job(tasks, config, model, loras, measures, tuple(kinds), device, dtype)
    if not args.image.is_dir():
        plan_picture(args, job, tasks[0])
    if args.skip_existing:
        job = replace(job, tasks=[task for task in tasks if not task.output.exists()])
    return job


def restore_config(args: argparse.Namespace) -> RestoreConfig:
    """The preset's options, overruled by the flags that were given."""
    from msbd.restore.official import OPTIONS as OFFICIAL

    preset = OFFICIAL if args.preset == "official" else PRESETS[args.preset]
    return RestoreConfig(**{**preset, **given_options(args, OPTIONS)})


def describe(args: argparse.Namespace, job: Job) -> int:
    """Print what would be done, line by line; the number of pictures that cannot be restored."""
    total = 0

    def plan_one(head: str, task: Task) -> None:
        nonlocal total
        plan = plan_picture(args, job, task)
        total += plan.evaluations
        print(f"{head}{task.image.name}: {plan_text(plan)}")

    failed = for_each(args, job, plan_one)
    unguided = job.config.for_model(job.measures).guidance_scale == 1
    print(f"in all {total:,} evaluations, {'without guidance' if unguided else 'each for both prompts'}")
    return failed


def plan_picture(args: argparse.Namespace, job: Job, task: Task) -> "RestorePlan":
    """What restoring one picture would do. ValueError or OSError for one that cannot be."""
    from msbd.pixels.files import check_output_path
    from msbd.restore.plan import plan_restore

    size = read_picture(task).size
    if not args.image.is_dir():  # into a folder go PNGs, which hold any size
        check_output_path(task.output, asked_size(args, size))
    return plan_restore(size, asked_size(args, size), job.config, job.measures)


def for_each(args: argparse.Namespace, job: Job, work: Callable[[str, Task], None]) -> int:
    """`work(head, task)` for every picture; how many failed, each told in a line. The failure of a single one is raised."""
    failed = 0
    for number, task in enumerate(job.tasks, 1):
        head = f"{number}/{len(job.tasks)} " if len(job.tasks) > 1 else ""
        try:
            work(head, task)
        except Exception as error:
            message = expected_failure(error, MEMORY)
            if message is None or args.debug or len(job.tasks) == 1:
                raise
            failed += 1
            about = "" if task.image.name in message else f"{task.image}: "
            print(f"{head}error: {about}{' '.join(message.split())}", file=sys.stderr)
    return failed


def plan_text(plan: "RestorePlan") -> str:
    """Sizes, tiles and evaluations in words."""
    if not plan.evaluations:  # a method without nets, which enlarges at once
        return f"{wide(plan.size)} -> {wide(plan.output)}"
    tiles = f", {len(plan.tiles)} tiles" if len(plan.tiles) > 1 else ""
    at = f", restored at {wide(plan.work)}" if plan.work != plan.output else ""
    (height, width), (high, broad) = plan.size, plan.output
    stretched = ", stretched" if abs(high * width - broad * height) > height + width else ""
    return f"{wide(plan.size)} -> {wide(plan.output)}{stretched}{at}{tiles}, {plan.evaluations:,} evaluations"


# ---- running ----------------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace, job: Job) -> int:
    """Load the model, restore, write; the number of pictures that failed."""
    from msbd.load import load_restore_pipeline
    from msbd.loading.captions import load_captioners

    if not job.tasks:
        return 0
    pipeline = load_restore_pipeline(
        job.model, method=job.config.method, base_weight=args.base_weight,
        loras=job.loras, device=job.device, dtype=job.dtype,
    )  # fmt: skip
    models = load_captioners(job.kinds, job.device) if job.kinds else {}
    facts = None if args.no_metadata else metadata(args, job)
    if args.image.is_dir():
        for folder in filter(None, (args.output, args.compare)):
            folder.mkdir(parents=True, exist_ok=True)

    def restore_and_tell(head: str, task: Task) -> None:
        start = time.perf_counter()
        result = restore_one(args, job, task, pipeline, models, facts)
        if args.quiet:
            return
        for note in result.notes:
            print(f"note: {note}", file=sys.stderr)
        print(f"{head}{task.output}: {plan_text(result.plan)}, {time.perf_counter() - start:.1f} s")

    return for_each(args, job, restore_and_tell)


def restore_one(
    args: argparse.Namespace, job: Job, task: Task, pipeline: "RestorePipeline", models: Any, facts: dict[str, Any] | None
) -> "RestoreResult":  # fmt: skip
    """Read, restore and write one picture."""
    from msbd.pixels.files import save_image, to_pixels
    from msbd.restore.captions import describe as recognise

    from .._sheets import before_and_after

    photo = read_picture(task)
    size = asked_size(args, photo.size)
    information = recognise(photo.image.to(job.device), job.kinds, models) if job.kinds else []
    with Progress(quiet=args.quiet) as progress:
        result = pipeline(
            photo.image, args.prompt, output_size=size, information=information, config=job.config, on_step=progress
        )  # fmt: skip
    if not args.quiet:
        warn_of_long_prompts(pipeline.tokenizer, (result.prompt, result.negative_prompt))
    pixels = to_pixels(result.image)
    written = None
    if facts is not None:
        told = {"prompt": result.prompt, "negative_prompt": result.negative_prompt}
        told |= {"user_prompt": args.prompt, "information": ", ".join(information) or None}
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


def metadata(args: argparse.Namespace, job: Job) -> dict[str, Any]:
    """What is needed to make the picture again, but the settings themselves."""
    import torch

    from msbd.load import model_hash, restorer_name

    base = job.model.base
    return {
        "model": Path(restorer_name(args.model, args.mode)).name,  # of a folder no more than its own name
        "model_hash": model_hash(job.model.own),
        "base": base and f"{Path(args.base).name}:{args.base_weight:g} ({model_hash(base)})",
        "loras": told_loras(args.lora),
        "preset": args.preset,
        "device": job.device.type,
        "dtype": str(job.dtype).removeprefix("torch."),
        "msbd": version(),
        "torch": str(torch.__version__),
    }


if __name__ == "__main__":
    raise SystemExit(main())
