"""Repaint the masked part of a picture from a text prompt; every pixel outside the mask comes back as it was.

  python -m tools.edit -i examples/coffee.jpg -m examples/coffee_mask.png -p "a blue ball" -o edited.png
  python -m tools.edit -i photo.png --mask-from-alpha -p "a red house on grass" -o edited.png --preset fast

The mask is white (128 of 255 and more) where the picture may change. PNG, TIFF and WebP keep the rest
exactly; JPEG cannot.
"""

import argparse
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msbd.edit.config import DEFAULT, FAST, EditConfig
from msbd.files import check_room

from ._c2pa import Credentials, read_credentials, signing
from ._cli import (
    EDIT_MEMORY,
    CommandParser,
    Progress,
    add_config_options,
    add_embedding,
    add_folder_options,
    add_lora,
    add_model_and_preset,
    add_options,
    add_parts,
    add_result_options,
    add_shared_options,
    check_not_shadowed,
    check_outputs,
    check_prompt,
    check_transparency,
    choose_device,
    config_options,
    embedding_names,
    errors_by_flag,
    given_options,
    long_prompts,
    lora_names,
    machine_facts,
    part_name,
    picture_parser,
    prompt_notes,
    report_errors,
    same_file,
    sampling_notes,
    sampling_of,
    wide,
    without_machine,
    word_notes,
)
from ._pictures import FileBytes, check_result, read_mask, read_photo
from .folders.run import carry_out, check_usage
from .folders.tasks import RESULTS, Task
from .folders.tool import Made, Opening, Planned, Tell

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from msbd.edit.parts import Part
    from msbd.edit.pipeline import EditPipeline, EditResult
    from msbd.edit.plan import EditPlan
    from msbd.load import PlanFacts
    from msbd.pixels.box import Box
    from msbd.pixels.files import Photo
    from msbd.pixels.mask_files import MaskFile
    from weights.embeddings import Embedding
    from weights.locate import Located
    from weights.lora import Lora

# Preset -> what it sets; explicit flags overrule it. "official" is msbd.edit.official.OPTIONS, which needs
# torch.
PRESETS: dict[str, dict[str, Any]] = {"default": DEFAULT, "fast": FAST, "paper": {}, "official": {}}

FLAGS = {"num_steps": "--steps", "upscale_num_steps": "--upscale-steps"}
OPTIONS = config_options(EditConfig, FLAGS, DEFAULT)

# Subject of --help-all -> its fields of EditConfig, whose sentences it shows. --steps stands among the common
# options, --seed among those that all commands share.
GROUPS: dict[str, tuple[str, ...]] = {
    "sampling": (
        "method", "sampler", "spacing", "guidance_scale", "negative_prompt", "prompt_syntax", "eta", "background_level", "background_noise",
        "latent_mask", "dilate_mask", "formulas",
    ),
    "first stage": (
        "margin", "first_stage_size", "first_stage_batch", "candidates_kept", "repaint_steps", "repaint_jump",
        "repaint_end", "start_timestep", "start_from", "clip_reranking", "rerank_area",
    ),
    "later stages": (
        "max_edgelen", "straight_to_grid", "upscale_startstep", "grid_startstep", "upscale_num_steps",
        "upscaling_mode", "lowpass_reference", "conditional_upscale", "blended_upscale", "tiles", "tile",
        "grid_overlap", "tile_batch",
    ),
    "seam and composite": (
        "seam", "seam_stages", "decoder_optimization", "decoderopt_steps", "decoderopt_lr", "decoderopt_weight",
        "decoderopt_latents", "decoderopt_area", "decoderopt_dtype", "decoderopt_stop", "membrane_reach", "feather",
    ),
}  # fmt: skip


def build_parser() -> CommandParser:
    """The command line; torch is not needed for it."""
    parser, common = picture_parser(
        "edit", "-i PATH (-m PATH | --mask-from-alpha) -p PROMPT -o PATH [options]", __doc__
    )
    add = common.add_argument
    add("-i", "--image", type=Path, metavar="PATH", help="the picture to edit, or a folder of them")
    add(
        "-m",
        "--mask",
        type=Path,
        metavar="PATH",
        help="a picture of the same size, white where to edit; for a folder one for all, or a folder of masks that are "
        "called as their pictures",
    )
    add(
        "--mask-from-alpha",
        action="store_true",
        help="edit where the mask is transparent, or without one the picture, whose result is opaque then",
    )
    add("-p", "--prompt", help="what to paint")
    add(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="PATH",
        help="the result: .png, .tif, .webp (lossless, all three) or .jpg; for a folder a folder",
    )
    add_model_and_preset(
        common,
        PRESETS,
        "default: a fraction of paper's evaluations, joint tiles, the membrane as seam; fast: the least of them",
        default="default",
    )
    add_options(common, OPTIONS, ("num_steps",))
    add("--compare", type=Path, metavar="PATH", help="before, the mask's outline and after, side by side")
    add = parser.add_argument_group("model and mask").add_argument
    add_lora(add, "the model")
    add_embedding(add)
    add_parts(add, "the net that enlarges one stage's result for the next")
    add(
        "--seam-decoder",
        metavar="MODEL",
        help="what --seam asymmetric decodes with, by its name, folder or file",
    )
    add("--invert-mask", action="store_true", help="edit where the mask is black (from alpha: opaque)")
    add("--resize-mask", action="store_true", help="accept a mask of another size, and stretch it")
    add(
        "--parts",
        choices=("apart", "together"),
        help="parts of the mask that are far apart: one after the other, each in a crop of its own, or all in one "
        "(default: apart; together with preset paper or official)",
    )
    add_config_options(parser, OPTIONS, GROUPS)
    parser.add_renamed("--mode", "--method")
    add_folder_options(parser, "image, mask, prompt, seed, margin, output")
    add = parser.add_argument_group("what else to write").add_argument
    add(
        "--candidates",
        type=Path,
        metavar="FILE",
        help="the candidates that were kept, with CLIP's scores, the chosen one framed; for a folder a folder, as "
        "--stages has one in it for each picture",
    )
    add("--stages", type=Path, metavar="FOLDER", help="every intermediate picture as a numbered PNG there")
    add_result_options(common, add)
    add_shared_options(parser, common=common)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Edit what is asked for; exit code 0, 1 for an expected failure, 2 for wrong usage."""
    parser = build_parser()
    args = parser.parse_args(argv)
    check_usage(parser, args)
    if args.mask is None and not args.mask_from_alpha and args.jobs is None:
        parser.error("one of the arguments -m/--mask --mask-from-alpha is required")
    if args.prompt is None and args.jobs is None:
        parser.error("the following arguments are required: -p/--prompt")
    with report_errors(debug=args.debug) as outcome:
        check_not_shadowed()
        carry_out(Opening("tools.edit", "Editor", args), Editor)
    return outcome.exit_code


@dataclass(frozen=True)
class EditJob:
    """A checked command: nothing that the command line can be blamed for is left, but for its pictures."""

    model: "Located"
    facts: "PlanFacts"
    config: EditConfig
    seam_decoder: str | None  # where the seam is asymmetric
    loras: "list[tuple[Lora, float]]"
    embeddings: "list[Embedding]"
    device: "torch.device"
    dtype: "torch.dtype"
    notes: list[str]
    credentials: Credentials | None = None


@dataclass(frozen=True)
class EditTask:
    """A picture that was read and checked, with all that is to be done to it."""

    args: argparse.Namespace  # the command line, for this picture
    source: FileBytes
    mask_source: FileBytes | None
    photo: "Photo"
    mask: "Tensor"  # (1, 1, H, W)
    parts: "list[tuple[Part, EditPlan]]"  # of the mask, edited one after the other
    notes: list[str]

    @property
    def config(self) -> EditConfig:
        """The settings that all parts have."""
        return self.parts[0][1].config


def prepare(args: argparse.Namespace) -> EditJob:
    """Check everything but weights and pictures, and write nothing. ValueError or OSError, in one line."""
    from msbd.load import locate_editor, model_notes, plan_facts
    from msbd.loading.choose import choose_editor
    from msbd.loading.nets import read_lora_file
    from msbd.loading.seam import choose_seam_decoder, find_seam_decoder
    from weights.embeddings import read_embedding

    device, dtype = choose_device(args.device, args.dtype, args.threads)
    with errors_by_flag(OPTIONS):
        config = edit_config(args)
    check_prompt("--prompt", args.prompt)
    check_prompt("--negative-prompt", config.negative_prompt)
    name, notes = args.model, []
    if name == "auto":
        choice = choose_editor()
        name, notes = choice.model, [str(choice)]
    model = locate_editor(name, upscaler=args.upscaler, vae=args.vae, prediction_type=args.prediction_type)
    facts = plan_facts(model)
    notes += model_notes(model)
    loras = [(read_lora_file(path), weight) for path, weight in args.lora]  # refused now, not after minutes
    notes += [note for lora, _ in loras for note in lora.notes]
    embeddings = [read_embedding(path) for path in args.embedding]
    with errors_by_flag(OPTIONS):
        seam = config.for_model(facts.spec).seam  # and refuses unsuitable sizes before pictures are read
    decoder = None
    if seam == "asymmetric":
        decoder = args.seam_decoder or choose_seam_decoder(model)
        find_seam_decoder(decoder)
    elif args.seam_decoder:
        notes.append(f"--seam-decoder: not used with --seam {seam}")
    notes += sampling_notes(
        {name: few_steps(sampling) for name, sampling in sampling_of(args.lora).items()}, OPTIONS
    )
    credentials = read_credentials(*args.c2pa) if args.c2pa else None
    return EditJob(model, facts, config, decoder, loras, embeddings, device, dtype, notes, credentials)


class Editor:
    """The command that was checked, and its nets once the first picture was read."""

    memory = EDIT_MEMORY

    def __init__(self, args: argparse.Namespace) -> None:
        """ValueError or OSError."""
        self.args, self.job = args, prepare(args)
        self.notes, self.part = self.job.notes, ""
        self._pipeline: EditPipeline | None = None

    @cached_property
    def _facts(self) -> dict[str, Any]:
        return metadata(self.args, self.job)

    @staticmethod
    def one_task(args: argparse.Namespace) -> Task:
        """The picture of a command that names one, and where its result goes."""
        check_paths(args)
        results = {name: getattr(args, name) for name in RESULTS}
        return Task(args.image.name, args.image, mask=args.mask, **results)

    def settings(self, task: Task) -> dict[str, Any]:
        """All that changes the result of one picture, but for what its files hold, and the machine."""
        args = task.of(self.args)
        named = (
            "prompt",
            "mask_from_alpha",
            "invert_mask",
            "resize_mask",
            "parts",
            "upscaler",
            "no_metadata",
        )
        settings = without_machine(self._facts) | asdict(edit_config(args))
        settings |= {name: getattr(args, name) for name in (*named, "strip_metadata", "dtype")}
        return settings | {"signed": args.c2pa is not None}

    def plan(self, task: Task) -> Planned:
        """What would be done to one picture. ValueError or OSError."""
        edit = self.read(task)
        evaluations = sum(plan.evaluations for _, plan in edit.parts)
        line = f"{task.name}: {edit_text(edit)}, {evaluations:,} evaluations"
        return Planned(line, tuple(describe(edit)), evaluations, tuple(edit.notes))

    def summary(self, evaluations: int) -> str:
        """How the pictures would be edited, all of them."""
        guided = self.job.config.for_model(self.job.facts.spec).guidance_scale != 1
        how = "each for the prompt and for the negative one" if guided else "without guidance"
        return f"in all       {evaluations:,} evaluations, {how}"

    def make(self, task: Task, tell: Tell) -> Made:
        """Read, edit and write one picture. ValueError or OSError."""
        edit = self.read(task)
        tell(edit.notes)
        prompts = (edit.args.prompt, edit.config.negative_prompt)
        tell(long_prompts(self._nets.tokenizer, prompts, edit.config.prompt_syntax))
        tell(word_notes(self._nets.tokenizer, self.job.embeddings, prompts))
        lines = self._edit(edit, tell)
        mask = edit.mask_source
        return Made(
            f"{task.output}: {edit_text(edit)}",
            edit.source.digest,
            edit.source.seen,
            mask and mask.digest,
            mask and mask.seen,
            lines=tuple(lines),
        )

    def read(self, task: Task) -> EditTask:
        """The picture and its mask, of one size, with something to edit, once it is certain that the result
        can be written. ValueError or OSError.
        """
        from msbd.pixels.masks import resize_mask

        args = task.of(self.args)
        if args.mask is None and not args.mask_from_alpha:
            raise ValueError(f"{task.image}: no mask; give one, or --mask-from-alpha")
        if not args.prompt:
            raise ValueError(f"{task.image}: no prompt; give one, or --prompt for all")
        check_prompt(f"{task.image}: its prompt", args.prompt)
        source = FileBytes(task.image)
        photo = read_photo(source)
        check_result(args.output, photo.size, like=photo)
        if not becomes_opaque(args):
            check_transparency(photo, args.image, args.output)
        mask_source = FileBytes(args.mask) if args.mask else None
        file = mask_source or source
        file.seek(0)
        read = read_mask(file, invert=args.invert_mask, from_alpha=args.mask_from_alpha)
        mask = resize_mask(read.mask, photo.size) if args.resize_mask else read.mask
        check_mask(
            replace(read, mask=mask),
            args.mask or args.image,
            photo,
            args.image,
            invert=args.invert_mask,
            from_alpha=args.mask_from_alpha,
        )
        with errors_by_flag(OPTIONS):
            parts = plan_parts(args, mask, edit_config(args), self.job.facts)
        if args.stages:
            check_room(args.stages / "00.png", stages_bytes([plan for _, plan in parts]))
        notes = [f"{args.image}: {note}" for note in photo.notes] + list(read.notes)
        notes = list(dict.fromkeys(notes))  # of one file both say the same
        notes += not_upscaled(args, [plan for _, plan in parts])
        config = parts[0][1].config
        notes += prompt_notes(
            args.prompt, config.negative_prompt, syntax=config.prompt_syntax, embeddings=args.embedding
        )
        return EditTask(args, source, mask_source, photo, mask, parts, notes)

    @property
    def _nets(self) -> "EditPipeline":
        """The pipeline, which is read when it is first asked for."""
        from msbd.load import load_edit_pipeline

        if self._pipeline is None:
            job = self.job
            self._pipeline = load_edit_pipeline(
                job.model, device=job.device, dtype=job.dtype, loras=job.loras, embeddings=job.embeddings,
                seam_decoder=job.seam_decoder,
            )  # fmt: skip
        return self._pipeline

    def _edit(self, edit: EditTask, tell: Tell) -> list[str]:
        """Edit and write a picture; what was done, line by line."""
        import torch

        from ._sheets import StagePictures

        args, image, sheets, lines, notes = edit.args, edit.photo.image, [], [], []
        weight = torch.zeros_like(edit.mask)
        stages = StagePictures(args.stages) if args.stages else None
        with Progress(quiet=args.quiet) as progress:
            for number, (cells, plan) in enumerate(edit.parts, 1):
                part = f"part {number} of {len(edit.parts)}, " if len(edit.parts) > 1 else ""
                progress.part = self.part + part
                if stages:
                    stages.part = part
                result = self._nets(
                    image, cells.of(edit.mask), args.prompt, plan=plan, on_step=progress, on_picture=stages
                )
                image, weight = result.image, torch.maximum(weight, result.weight)
                notes += [part + note for note in result.notes]
                lines += [part + line for line in timings(result)]
                if args.candidates:
                    sheets.append(candidates_of(result))
        # The source's samples wherever they were kept.
        tell(notes + self._write(edit, edit.photo.painted(image, weight), sheets, notes))
        written = {
            "result": args.output,
            "comparison": args.compare,
            "candidates": args.candidates,
            "stages": args.stages,
        }
        return [*lines, *(f"{what:12} {path}" for what, path in written.items() if path)]

    def _write(self, edit: EditTask, edited: "Photo", sheets: list[Any], made: list[str]) -> list[str]:
        """Write the result, which keeps the notes `made`, and the pictures about it; further notes."""
        from msbd.pixels.files import save_image, save_photo
        from msbd.pixels.metadata import Metadata
        from msbd.pixels.xmp import EDITED

        from ._sheets import comparison, fitting, shown, stacked

        args = edit.args
        silent = args.no_metadata or args.strip_metadata
        if becomes_opaque(args):
            edited = replace(edited, alpha=None)
        if args.strip_metadata:
            edited = replace(edited, metadata=Metadata())
        notes = save_photo(
            edited,
            args.output,
            ours=None if silent else self._written(edit) | {"notes": "; ".join(made) or None},
            source_type=None if silent else EDITED,
            sign=signing(self.job.credentials, edit.source, EDITED),
        )
        if args.compare:
            save_image(comparison(shown(edit.photo), shown(edited), edit.mask), args.compare)
        if args.candidates:
            sheet = stacked(sheets)
            fitted = fitting(sheet, args.candidates)
            save_image(fitted, args.candidates)
            if fitted.shape != sheet.shape:
                size, held = wide(sheet.shape[:2]), wide(fitted.shape[:2])
                notes.append(f"{args.candidates}: {held} pixels in place of {size}; a .png holds all of them")
        return notes

    def _written(self, edit: EditTask) -> dict[str, Any]:
        """What the file says of how it was made."""
        args, mask = edit.args, edit.mask_source
        own = {
            "prompt": args.prompt,
            "image_hash": edit.source.digest[:10],
            "mask_hash": mask and mask.digest[:10],
            "mask_from_alpha": args.mask_from_alpha,
            "invert_mask": args.invert_mask,
            "resize_mask": args.resize_mask,
            "parts": len(edit.parts),
        }
        facts = self._facts
        if not upscales(args, [plan for _, plan in edit.parts]):
            facts = facts | {"upscaler": None}
        return own | facts | asdict(edit.config) | machine_facts(self.job.device, self.job.dtype)


def plan_parts(
    args: argparse.Namespace, mask: "Tensor", config: EditConfig, facts: "PlanFacts"
) -> "list[tuple[Part, EditPlan]]":
    """The parts of the mask (1, 1, H, W) that are edited one after the other, each with its plan."""
    from msbd.edit.crops import crop_box
    from msbd.edit.parts import Part, split_mask
    from msbd.edit.plan import plan_edit

    def crop_of(box: "Box") -> "Box":
        return crop_box(box, (mask.shape[-2], mask.shape[-1]), config.margin, facts.spec.multiple)

    def plan(number: int, part: Part) -> "EditPlan":
        return plan_edit(
            part.of(mask),
            replace(config, seed=seed + number),  # else two parts would show the same
            facts.spec,
            facts.alphas_cumprod,
            downscale=facts.downscale,
            has_upscaler=facts.has_upscaler,
        )

    seed = config.seed or 0
    apart = (args.parts or ("together" if args.preset in ("paper", "official") else "apart")) == "apart"
    parts = split_mask(mask, crop_of) if apart and mask.any() else [Part(None, 1)]
    return [(part, plan(number, part)) for number, part in enumerate(parts)]


def not_upscaled(args: argparse.Namespace, plans: "Sequence[EditPlan]") -> list[str]:
    """A note where --upscaler was given and is not used."""
    if not args.upscaler or upscales(args, plans):
        return []
    mode = plans[0].config.upscaling_mode
    why = f"with --upscaling-mode {mode}" if mode != "rrdb" else "in this edit, no stage of which grows"
    return [f"--upscaler: not used {why}"]


def upscales(args: argparse.Namespace, plans: "Sequence[EditPlan]") -> bool:
    """Whether --upscaler was given and is used."""
    grows = any(after.size != before.size for plan in plans for before, after in pairwise(plan.stages))
    return bool(args.upscaler) and grows and plans[0].config.upscaling_mode == "rrdb"


def edit_config(args: argparse.Namespace) -> EditConfig:
    """The preset's options, overruled by what a known LoRA was made for, and that by the flags."""
    given = given_options(args, OPTIONS)
    if given.get("decoder_optimization") is False and given.get("seam", "none") != "none":
        raise ValueError(
            f"--seam {given['seam']} and --no-decoder-optimization, which is --seam none; give one of them"
        )
    return EditConfig(**{**preset_options(args.preset, args.lora), **given})


def preset_options(preset: str, loras: Sequence[tuple[str, float]]) -> dict[str, Any]:
    """What a preset sets, overruled by what the one known LoRA among `loras` was made for."""
    from msbd.edit.official import OPTIONS as OFFICIAL

    options = OFFICIAL if preset == "official" else PRESETS[preset]
    made_for = sampling_of(loras)
    if len(made_for) == 1:  # several would mix
        options = options | few_steps(next(iter(made_for.values())))
    return options


def few_steps(sampling: dict[str, Any]) -> dict[str, Any]:
    """A LoRA's `sampling`, which is told in RestoreConfig's names, in ours: there ddim has no fresh noise."""
    renamed = {"num_inference_steps": "num_steps"}
    eta = {"eta": 0.0} if sampling["sampler"] == "ddim" else {}
    return {renamed.get(name, name): value for name, value in sampling.items()} | eta


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
        numbered = (
            re.fullmatch(r"\d{2,}-.*\.png", one.name) and same_file(one.parent, args.stages)
            for one in (path, path.resolve())  # a link's own place, and what it leads to
        )
        if any(numbered) or same_file(path, args.stages):
            raise ValueError(f"{path}: --stages could overwrite what {flag} names; take another folder")


def becomes_opaque(args: argparse.Namespace) -> bool:
    """Whether the result has no transparency: where the picture's own was the mask."""
    return args.mask_from_alpha and args.mask is None


def check_mask(
    read: "MaskFile",
    source: Path,
    photo: "Photo",
    image: Path,
    *,
    invert: bool = False,
    from_alpha: bool = False,
) -> None:
    """ValueError for a mask of another size than the photo, and for one with nothing to edit.

    `invert` and `from_alpha` say how it was read.
    """
    size = (read.mask.shape[-2], read.mask.shape[-1])
    if size != photo.size:
        raise ValueError(
            f"{source}: the mask has {wide(size)} pixels, {image} has {wide(photo.size)}; draw it on the picture, or "
            "stretch it with --resize-mask"
        )
    if read.mask.any():
        return
    if from_alpha:
        why = f"its most {'opaque' if invert else 'transparent'} pixel is so by "
        why += f"{255 - read.darkest if invert else read.brightest} of 255; 128 and more is edited"
    elif invert:
        why = f"its darkest value is {read.darkest} of 255; below 128 is edited, with --invert-mask"
    else:
        why = f"its brightest value is {read.brightest} of 255; 128 and more is edited"
    raise ValueError(f"{source}: the mask is empty: no pixel is to be edited; {why}")


def stages_bytes(plans: "Sequence[EditPlan]") -> int:
    """The most bytes that the pictures of --stages may take: of each stage four, and its candidates."""
    stages = [stage for plan in plans for stage in plan.stages]
    return sum(3 * stage.size[0] * stage.size[1] * (4 + stage.candidates) for stage in stages)


def edit_text(edit: EditTask) -> str:
    """A picture and its mask in words."""
    parts = f" in {len(edit.parts)} parts" if len(edit.parts) > 1 else ""
    return f"{wide(edit.photo.size)}, {int(edit.mask.sum()):,} pixels masked{parts}"


def describe(edit: EditTask) -> list[str]:
    """What an edit would do, line by line."""
    lines = [f"picture      {wide(edit.photo.size)} pixels, {int(edit.mask.sum()):,} of them masked"]
    for _, plan in edit.parts:
        crop = plan.crop
        lines.append(f"crop         {wide(crop.size)} at ({crop.left}, {crop.top})")
        for stage in plan.stages:
            tiles = f"{len(stage.boxes)} of {len(stage.grid)} tiles, " if len(stage.grid) > 1 else ""
            candidates = f"{stage.candidates} candidates, " if stage.candidates > 1 else ""
            lines.append(
                f"{stage.name:12} {wide(stage.size)}, {tiles}{candidates}{stage.evaluations:,} evaluations of the U-Net"
            )
    return lines


def candidates_of(result: "EditResult") -> Any:
    """The candidates of one edit on a sheet, (H, W, 3) uint8; without any the result's crop."""
    from msbd.pixels.resize import take

    from ._sheets import contact_sheet

    candidates = result.candidates if len(result.candidates) else take(result.image, result.plan.crop)
    return contact_sheet(candidates, result.scores, result.chosen)


def metadata(args: argparse.Namespace, job: EditJob) -> dict[str, Any]:
    """What a result's file says of the model; asked once, as the model's files may change."""
    from msbd.load import model_hash
    from msbd.loading.seam import find_seam_decoder

    decoder = job.seam_decoder
    return {
        "model": Path(job.model.name).name,  # of a folder no more than its own name
        "vae": part_name(args.vae, job.model.net("vae").path) if args.vae else None,
        "upscaler": part_name(args.upscaler, job.model.net("rrdb").path) if args.upscaler else None,
        "prediction_type": args.prediction_type,
        "seam_decoder": decoder and part_name(decoder, find_seam_decoder(decoder).path),
        "model_hash": model_hash(job.model),
        "loras": lora_names(args.lora),
        "embeddings": embedding_names(args.embedding),
        "preset": args.preset,
    }


# ---- while it runs -----------------------------------------------------------------------------------------


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
