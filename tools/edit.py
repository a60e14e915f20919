"""Repaint the masked part of a picture from a text prompt; every pixel outside the mask comes back as it was.

  python -m tools.edit -i examples/coffee.jpg -m examples/coffee_mask.png -p "a blue ball on sand at sunset" -o edited.png
  python -m tools.edit -i photo.png --mask-from-alpha -p "a red house on grass" -o edited.png --preset fast --compare look.jpg

The mask is white (128 of 255 and more) where the picture may change. PNG and WebP keep the rest byte for byte; JPEG cannot.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msbd.edit.config import EditConfig

from ._cli import (
    Progress,
    add_config_options,
    add_shared_options,
    check_not_shadowed,
    check_outputs,
    check_transparency,
    choose_device,
    config_options,
    given_options,
    picture_parser,
    report_errors,
    same_file,
    told_loras,
    version,
    warn_of_long_prompts,
    weighted_file,
    wide,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from msbd.edit.pipeline import EditResult
    from msbd.edit.plan import EditPlan
    from msbd.pixels.files import Photo
    from weights.locate import Located
    from weights.lora import Lora

# Preset -> what it sets; explicit flags overrule it. "official" is msbd.official.OPTIONS, which needs torch.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "official": {},
    "fast": {"repaint_steps": 1, "first_stage_batch": 2, "num_steps": 25},
}

OPTIONS = config_options(EditConfig)
FLAGS = {"num_steps": "--steps", "upscale_num_steps": "--upscale-steps"}

# What --help says of every option but the seed, in its order. Their defaults are EditConfig's.
HELP: dict[str, dict[str, str]] = {
    "sampling": {
        "num_steps": "diffusion steps of a whole run",
        "guidance_scale": "how strongly to follow the prompt; 1: without guidance (default: the model's)",
        "negative_prompt": "what to keep away from",
        "eta": "fresh noise per step, 0 (deterministic) to 1",
        "background_level": "level of the blended background: of the next evaluation, or of this one",
        "background_noise": "one noise for all repeats of a step, or fresh",
        "latent_mask": "which 8 x 8 cells are edited: with any masked pixel, or with a masked centre",
        "dilate_mask": "grow the mask early on; helps thin ones",
        "formulas": "whose counting of steps, ladder of sizes and blending of tiles",
    },
    "first stage": {
        "mode": "the paper's method or one of its baselines",
        "margin": "side of the crop, in lengths of the mask's longer side",
        "first_stage_size": "pixels: side of the square with the first stage's area (default: the model's own)",
        "first_stage_batch": "candidates to choose from",
        "repaint_steps": "RePaint's repeats of each step; 0: Blended Diffusion",
        "repaint_jump": "steps that each repeat goes back",
        "start_timestep": "fraction of the schedule to start from; below 1 the old content shows through",
        "start_from": "the noised picture, or pure noise; below --start-timestep 1 always the picture",
        "clip_reranking": "let CLIP choose the candidate; otherwise the first is taken",
        "rerank_area": "what CLIP looks at",
    },
    "later stages": {
        "max_edgelen": "pixels: side of the square with the middle stage's area (default: 1.5 x the model's own)",
        "straight_to_grid": "leave the middle stage out",
        "upscale_startstep": "fraction of the schedule that stages in one piece run through",
        "grid_startstep": "the same of tiled stages",
        "upscale_num_steps": "diffusion steps of a whole run there (default: as --steps)",
        "upscaling_mode": "how a stage's result is enlarged for the next",
        "lowpass_reference": "blur the background as much as the enlarged picture, by half, or not",
        "conditional_upscale": "give later stages the prompt; otherwise the empty one",
        "blended_upscale": "keep the background while they run",
        "tile": "pixels: side of a tile (default: 1.5 x the model's own)",
        "grid_overlap": "pixels: of neighbouring tiles (default: a sixth of the tile)",
        "tile_batch": "tiles at a time (default: what fits into memory)",
    },
    "decoder optimisation and composite": {
        "decoder_optimization": "fit the decoder to the background, so that no seam shows",
        "decoderopt_steps": "steps of Adam",
        "decoderopt_lr": "its learning rate",
        "decoderopt_weight": "weight of the background in its loss",
        "decoderopt_latents": "fit to the sampler's latents, or to the result encoded anew",
        "feather": "pixels inside the mask over which the edit fades in",
    },
}


def build_parser() -> argparse.ArgumentParser:
    """The command line; torch is not needed for it."""
    parser = picture_parser(
        "edit", "-i IMAGE (-m MASK | --mask-from-alpha) -p PROMPT -o OUTPUT [options]", __doc__
    )
    what = parser.add_argument_group("what to do")
    add = what.add_argument
    add("-h", "--help", action="help", help="show this and exit")
    add("-i", "--image", type=Path, required=True, help="the picture to edit")
    masks = what.add_mutually_exclusive_group(required=True)
    masks.add_argument("-m", "--mask", type=Path, help="a picture of the same size, white where to edit")
    masks.add_argument(
        "--mask-from-alpha",
        action="store_true",
        help="edit where the picture itself is transparent; the result is opaque",
    )
    add("-p", "--prompt", required=True, help="what to paint")
    add("-o", "--output", type=Path, required=True, help="the result: .png, .webp (both lossless) or .jpg")
    add("--model", default="mini", help="a known model's name, or a model's folder or file (default: mini)")
    add(
        "--lora",
        type=weighted_file,
        action="append",
        default=[],
        metavar="FILE:WEIGHT",
        help="add a LoRA to the model; may be repeated",
    )
    add(
        "--preset",
        choices=PRESETS,
        default="paper",
        help="paper: its formulas and settings; official: those of the official code, to measure the difference; "
        "fast: a fifteenth of paper's evaluations in the first stage, half of them later "
        "(--steps 25 --repaint-steps 1 --first-stage-batch 2). Other flags overrule it "
        "(default: paper)",
    )
    add("--invert-mask", action="store_true", help="edit where the mask is black (from alpha: opaque)")
    add("--resize-mask", action="store_true", help="accept a mask of another size, and stretch it")
    add = parser.add_argument_group("what else to write").add_argument
    add("--compare", type=Path, metavar="FILE", help="before, the mask's outline and after, side by side")
    add(
        "--candidates",
        type=Path,
        metavar="FILE",
        help="all candidates with CLIP's scores, the chosen one framed",
    )
    add("--stages", type=Path, metavar="FOLDER", help="every intermediate picture as a numbered PNG")
    add("--no-metadata", action="store_true", help="leave prompt, settings and versions out of the result")
    add("--dry-run", action="store_true", help="check everything, print what would be done, write nothing")
    add_shared_options(parser)
    add_config_options(parser, OPTIONS, HELP, FLAGS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one edit; exit code 0, 1 for an expected failure, 2 for wrong usage."""
    args = build_parser().parse_args(argv)
    with report_errors(debug=args.debug) as outcome:
        check_not_shadowed()
        job = prepare(args)
        if args.dry_run:
            print("\n".join(describe(job)))
        else:
            run(args, job)
    return outcome.exit_code


@dataclass(frozen=True)
class Job:
    """A checked command: nothing that the command line or its files can be blamed for is left."""

    photo: "Photo"
    mask: "Tensor"  # (1, 1, H, W)
    config: "EditConfig"
    plan: "EditPlan"
    model: "Located"
    loras: "list[tuple[Lora, float]]"
    device: "torch.device"
    dtype: "torch.dtype"


def prepare(args: argparse.Namespace) -> Job:
    """Read and check everything but the model's weights, and write nothing. ValueError or OSError, in one line."""
    from msbd.edit.plan import plan_edit
    from msbd.load import plan_facts
    from msbd.loading.nets import read_lora_file
    from weights.locate import locate

    check_paths(args)
    device, dtype = choose_device(args.device, args.dtype)
    config = edit_config(args)
    model = locate(args.model, companions=True)
    facts = plan_facts(model)
    loras = [(read_lora_file(path), weight) for path, weight in args.lora]  # refused now, not after minutes
    config.for_model(facts.spec)  # refuses unsuitable sizes before pictures are read
    photo, mask = read_pictures(args)
    plan = plan_edit(
        mask,
        config,
        facts.spec,
        facts.alphas_cumprod,
        downscale=facts.downscale,
        has_upscaler=facts.has_upscaler,
    )
    return Job(photo, mask, config, plan, model, loras, device, dtype)


def edit_config(args: argparse.Namespace) -> EditConfig:
    """The preset's options, overruled by the flags that were given."""
    from msbd.edit.official import OPTIONS as OFFICIAL

    preset = OFFICIAL if args.preset == "official" else PRESETS[args.preset]
    return EditConfig(**{**preset, **given_options(args, OPTIONS)})


def check_paths(args: argparse.Namespace) -> None:
    """ValueError where an output cannot be written, or would overwrite something."""
    from msbd.pixels.files import check_output_path

    outputs = {
        f"--{name}": getattr(args, name)
        for name in ("output", "compare", "candidates")
        if getattr(args, name)
    }
    inputs = {f"--{name}": getattr(args, name) for name in ("image", "mask") if getattr(args, name)}
    check_outputs(outputs, inputs)
    for path in outputs.values():
        check_output_path(path)
    if args.stages is None:
        return
    if args.stages.exists() and not args.stages.is_dir():
        raise ValueError(f"{args.stages}: a file; --stages takes a folder")
    check_outputs({"--stages": args.stages / "00.png" if args.stages.is_dir() else args.stages}, {})
    for flag, path in (outputs | inputs).items():
        numbered = re.fullmatch(r"\d{2,}-.*\.png", path.name) and same_file(path.parent, args.stages)
        if numbered or same_file(path, args.stages):
            raise ValueError(f"{path}: --stages could overwrite what {flag} names; take another folder")


def read_pictures(args: argparse.Namespace) -> "tuple[Photo, Tensor]":
    """Picture and mask, of one size, with something to edit."""
    from msbd.pixels.files import check_output_path, load_image, load_mask
    from msbd.pixels.masks import resize_mask

    photo = load_image(args.image)
    check_output_path(args.output, photo.size)
    if not args.mask_from_alpha:
        check_transparency(photo, args.image, args.output)
    source = args.image if args.mask_from_alpha else args.mask
    mask = load_mask(source, invert=args.invert_mask, from_alpha=args.mask_from_alpha)
    size = (mask.shape[-2], mask.shape[-1])
    if size != photo.size and not args.resize_mask:
        raise ValueError(
            f"{source}: the mask has {wide(size)} pixels, {args.image} has {wide(photo.size)}; "
            "draw it on the picture, or stretch it with --resize-mask"
        )
    mask = resize_mask(mask, photo.size)
    if not mask.any():
        raise ValueError(
            f"{source}: the mask is empty: no pixel is to be edited; white is, or black with --invert-mask"
        )
    return photo, mask


def describe(job: Job) -> list[str]:
    """What an edit would do, line by line."""
    crop = job.plan.crop
    lines = [
        f"picture      {wide(job.photo.size)} pixels, {int(job.mask.sum()):,} of them masked",
        f"crop         {wide(crop.size)} at ({crop.left}, {crop.top})",
    ]
    for stage in job.plan.stages:
        tiles = f"{len(stage.boxes)} of {len(stage.grid)} tiles, " if len(stage.grid) > 1 else ""
        candidates = f"{stage.candidates} candidates, " if stage.candidates > 1 else ""
        lines.append(
            f"{stage.name:12} {wide(stage.size)}, {tiles}{candidates}{stage.evaluations:,} evaluations of the U-Net"
        )
    guided = (
        "each for the prompt and for the negative one"
        if job.plan.config.guidance_scale != 1
        else "without guidance"
    )
    return [*lines, f"in all       {job.plan.evaluations:,} evaluations, {guided}"]


def run(args: argparse.Namespace, job: Job) -> None:
    """Load the model, edit, write."""
    from msbd.load import load_edit_pipeline
    from msbd.pixels.files import save_image, to_pixels
    from msbd.pixels.resize import take

    from ._sheets import StagePictures, comparison, contact_sheet

    pipeline = load_edit_pipeline(job.model, device=job.device, dtype=job.dtype, loras=job.loras)
    if not args.quiet:
        warn_of_long_prompts(pipeline.tokenizer, (args.prompt, job.config.negative_prompt))
    facts = None if args.no_metadata else metadata(args, job)
    with Progress(quiet=args.quiet) as progress:
        result = pipeline(
            job.photo.image,
            job.mask,
            args.prompt,
            plan=job.plan,
            on_step=progress,
            on_picture=StagePictures(args.stages) if args.stages else None,
        )
    pixels = to_pixels(result.image)  # the source's bytes wherever it was kept
    save_image(
        pixels,
        args.output,
        metadata=facts and facts | {"notes": "; ".join(result.notes) or None},
        alpha=None if args.mask_from_alpha else job.photo.alpha,
        icc_profile=job.photo.icc_profile,
    )
    if args.compare:
        save_image(
            comparison(job.photo.pixels, pixels, job.mask), args.compare, icc_profile=job.photo.icc_profile
        )
    if args.candidates:
        candidates = result.candidates if len(result.candidates) else take(result.image, job.plan.crop)
        save_image(
            contact_sheet(candidates, result.scores, result.chosen),
            args.candidates,
            icc_profile=job.photo.icc_profile,
        )
    if not args.quiet:
        for note in result.notes:
            print(f"note: {note}", file=sys.stderr)
        written = {
            "result": args.output,
            "comparison": args.compare,
            "candidates": args.candidates,
            "stages": args.stages,
        }
        print("\n".join([*timings(result), *(f"{what:12} {path}" for what, path in written.items() if path)]))


def metadata(args: argparse.Namespace, job: Job) -> dict[str, Any]:
    """What is needed to make the picture again, for its file; asked before the edit, as the model's files may change meanwhile."""
    import torch

    from msbd.load import model_hash

    model = Path(args.model).name  # of a folder no more than its own name
    return {
        "prompt": args.prompt,
        "model": model,
        "model_hash": model_hash(job.model),
        "loras": told_loras(args.lora),
        "preset": args.preset,
        **asdict(job.plan.config),
        "device": job.device.type,
        "dtype": str(job.dtype).removeprefix("torch."),
        "msbd": version(),
        "torch": str(torch.__version__),
    }


# ---- while it runs ----------------------------------------------------------------------------------------------------------


def timings(result: "EditResult") -> list[str]:
    """One line per stage: its seconds, and those of its tasks."""
    stages: dict[str, dict[str, float]] = {}
    for key, seconds in result.seconds.items():
        stage, _, task = key.rpartition(", ")
        stages.setdefault(stage, {})[task] = seconds
    return [
        f"{stage:12} {sum(tasks.values()):.1f} s ({', '.join(f'{task} {s:.1f}' for task, s in tasks.items())})"
        for stage, tasks in stages.items()
    ]


if __name__ == "__main__":
    raise SystemExit(main())
