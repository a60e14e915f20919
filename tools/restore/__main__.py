"""Restore photographs: enlarge, repair, colour or restyle a picture, or a folder of pictures.

  python -m tools.restore -i photo.jpg -o restored.png
  python -m tools.restore -i album -o restored --scale 2 --fidelity 0.8 --compare looks
  python -m tools.restore -i gray.png -o coloured.png --mode colorize -p "a red house on grass"
  python -m tools.restore -i photo.png -o drawn.png --mode stylize --lora mini-style:1 --model mini

Without --model the best one here is taken: PASD, for enlarging alone else an upscaler, else the mini bundle.
--fidelity goes from 0, which invents detail, to 1, which keeps to what is there (shown in docs/restore.md).
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msbd.restore.config import NET_FREE, RestoreConfig

from .._c2pa import Credentials, read_credentials, signing
from .._cli import (
    CELL,
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
    finite,
    given_options,
    long_prompts,
    lora_names,
    machine_facts,
    part_name,
    picture_parser,
    picture_size,
    prompt_notes,
    report_errors,
    sampling_notes,
    sampling_of,
    wide,
    without_machine,
    word_notes,
)
from .._pictures import FileBytes, check_result, read_photo
from ..folders.run import carry_out, check_usage
from ..folders.tasks import Task
from ..folders.tool import Made, Opening, Planned, Tell
from .sizes import asked_size, check_memory, memory_needed, premultiplied, resampled_alpha, straight

if TYPE_CHECKING:
    import torch

    from msbd.load import RestoreFacts, RestoreModel
    from msbd.pixels.files import Photo
    from msbd.restore.captions import Kind
    from msbd.restore.pipeline import RestorePipeline
    from msbd.restore.plan import RestorePlan, RestoreResult
    from weights.embeddings import Embedding
    from weights.lora import Lora

# Preset -> what it sets; explicit flags overrule it. "official" is msbd.restore.official.OPTIONS, which needs
# torch.
PRESETS: dict[str, dict[str, Any]] = {"paper": {}, "official": {}, "fast": {"num_inference_steps": 8}}

FLAGS = {
    "num_inference_steps": "--steps",
    "latent_tiled_size": "--tile",
    "latent_tiled_overlap": "--tile-overlap",
    "encoder_tiled_size": "--vae-encoder-tile",
    "decoder_tiled_size": "--vae-decoder-tile",
}
OPTIONS = config_options(RestoreConfig, FLAGS)
KINDS: "tuple[Kind, ...]" = ("classification", "detection", "caption")
MEMORY = "take a smaller --scale or --size; nets need less with a smaller --tile, --tile-batch 1, --vae-tiling fast"

# Subject of --help-all -> its fields of RestoreConfig, whose sentences it shows. --mode, --fidelity and
# --steps stand among the common options, --seed among those that all commands share.
GROUPS: dict[str, tuple[str, ...]] = {
    "faithful or inventive": (
        "alpha_a", "added_noise_level", "conditioning_scale", "control_start", "control_end", "color_fix",
    ),
    "prompts": ("guidance_scale", "guidance_start", "guidance_end", "added_prompt", "negative_prompt", "prompt_syntax"),
    "sampling": (
        "method", "sampler", "spacing", "sigma_min", "sigma_max", "final_level", "eta", "init_latent_with_noise", "offset_noise_scale",
        "posterior", "strength", "formulas", "ans",
    ),
    "sizes and tiles": (
        "process_size", "latent_tiled_size", "latent_tiled_overlap", "tile_batch", "vae_tiling",
        "encoder_tiled_size", "decoder_tiled_size",
    ),
}  # fmt: skip


def build_parser() -> CommandParser:
    """The command line; torch is not needed for it."""
    parser, common = picture_parser("restore", "-i FILE_OR_FOLDER -o FILE_OR_FOLDER [options]", __doc__)
    add = common.add_argument
    add("-i", "--image", type=Path, metavar="PATH", help="a picture, or a folder of them")
    add(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="PATH",
        help="a .png, .webp (both lossless) or .jpg; for a folder a folder",
    )
    sizes = common.add_mutually_exclusive_group()
    sizes.add_argument(
        "--scale", type=finite, metavar="X", help="times larger (default: 4; stylize and colorize: 1)"
    )
    sizes.add_argument("--size", type=picture_size, metavar="WxH", help="pixels of the result")
    add_options(common, OPTIONS, ("mode", "fidelity"))
    # No preset sets the mode, and sizes and the model depend on it.
    parser.set_defaults(mode=OPTIONS["mode"].default)
    add("-p", "--prompt", default="", help="what is in the picture, in words")
    add_model_and_preset(common, PRESETS, "fast: 8 steps")
    add_options(common, OPTIONS, ("num_inference_steps",))
    add("--compare", type=Path, metavar="PATH", help="input and result side by side; for a folder a folder")
    add = parser.add_argument_group("model and prompt").add_argument
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
    add_lora(add, "the base")
    add_embedding(add)
    add_parts(add, "enlarge with this net: it is what --method rrdb runs, and without --model implies that")
    add(
        "--high-level-info",
        type=kinds_of,
        metavar="KINDS",
        help="what to recognise in the picture and put into the prompt: classification, detection, caption, with "
        "commas between; none (default: those whose weights were fetched, for a model that prompts help)",
    )
    add_config_options(parser, OPTIONS, GROUPS)
    for old, new, times in (
        ("--latent-tiled-size", "--tile", CELL),
        ("--latent-tiled-overlap", "--tile-overlap", CELL),
        ("--encoder-tiled-size", "--vae-encoder-tile", 1),
        ("--decoder-tiled-size", "--vae-decoder-tile", CELL),
    ):
        parser.add_renamed(old, new, times=times)
    add_folder_options(parser, "image, prompt, seed, output")
    add = parser.add_argument_group("what else to write").add_argument
    add_result_options(common, add)
    add_shared_options(parser, common=common)
    return parser


def kinds_of(text: str) -> "tuple[Kind, ...]":
    """Kinds of high-level information for argparse, in the order in which they enter the prompt."""
    asked = {part.strip() for part in text.split(",")} - {"none", ""}
    if not asked <= set(KINDS):
        raise ValueError
    return tuple(kind for kind in KINDS if kind in asked)


kinds_of.__name__ = f"list (of {', '.join(KINDS)}, or none)"


def main(argv: Sequence[str] | None = None) -> int:
    """Restore what is asked for; exit code 0, 1 for an expected failure, 2 for wrong usage."""
    parser = build_parser()
    args = parser.parse_args(argv)
    check_usage(parser, args)
    with report_errors(debug=args.debug, memory=MEMORY) as outcome:
        check_not_shadowed()
        carry_out(Opening("tools.restore.__main__", "Restorer", args), Restorer)
    return outcome.exit_code


# ---- before it runs ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RestoreJob:
    """A checked command: nothing that the command line can be blamed for is left, but for its pictures."""

    config: RestoreConfig
    model: "RestoreModel"
    loras: "list[tuple[Lora, float]]"
    embeddings: "list[Embedding]"
    facts: "RestoreFacts"
    kinds: "tuple[Kind, ...]"
    device: "torch.device"
    dtype: "torch.dtype"
    notes: list[str]
    credentials: Credentials | None = None


def prepare(args: argparse.Namespace) -> RestoreJob:
    """Check everything but weights and pictures, and write nothing. ValueError or OSError, in one line."""
    from msbd.load import model_notes, restore_facts
    from msbd.loading.nets import read_lora_file
    from msbd.restore.plan import plan_restore
    from weights.embeddings import read_embedding

    device, dtype = choose_device(args.device, args.dtype, args.threads)
    if args.scale is not None and not 0 < args.scale <= 64:
        raise ValueError(f"--scale is {args.scale}; expected above 0, and 64 at most")
    if not 0 <= args.base_weight <= 1:
        raise ValueError(f"--base-weight is {args.base_weight}; expected 0 (without it) to 1 (it alone)")
    if args.base is None and args.base_weight != 1:
        raise ValueError(f"--base-weight is {args.base_weight}, but of no --base; give one")
    with errors_by_flag(OPTIONS):
        config = restore_config(args)
    check_prompt("--prompt", args.prompt)
    check_prompt("--negative-prompt", config.negative_prompt)
    check_prompt("--added-prompt", config.added_prompt)
    model, notes = find_model(args)
    config = replace(config, method=model.method)
    facts = restore_facts(model)
    notes += model_notes(model.both)
    with errors_by_flag(OPTIONS):
        plan_restore((64, 64), None, config, **vars(facts))  # what suits no picture
    notes += remarks(args, model) + prompt_notes(
        args.prompt, config.negative_prompt or "", syntax=config.prompt_syntax, embeddings=args.embedding
    )
    loras: list[tuple[Lora, float]] = []
    embeddings: list[Embedding] = []
    kinds: tuple[Kind, ...] = ()
    if config.method not in NET_FREE:
        # Refused now, not after minutes.
        loras = [(read_lora_file(path), weight) for path, weight in args.lora]
        notes += [note for lora, _ in loras for note in lora.notes]
        embeddings = [read_embedding(path) for path in args.embedding]
        kinds = kinds_to_recognise(args, facts)
    credentials = read_credentials(*args.c2pa) if args.c2pa else None
    return RestoreJob(config, model, loras, embeddings, facts, kinds, device, dtype, notes, credentials)


def find_model(args: argparse.Namespace) -> "tuple[RestoreModel, list[str]]":
    """The model that runs, and what to tell of the choice. WeightsError as `locate_restorer`, ValueError for
    a mode that it has not.
    """
    from msbd.load import BASE_PARTS, locate_restorer
    from msbd.loading.choose import choose_restorer, choose_upscaler

    given = given_options(args, OPTIONS)
    auto = args.model == "auto"
    method = given.get("method", "rrdb" if auto and args.upscaler else None)
    name, notes = args.model, []
    if auto and (method == "bicubic" or (method == "rrdb" and args.upscaler)):
        name = "mini"  # of which nothing is used
    elif auto:
        enlarges = args.mode == "sr" and not (args.prompt or args.lora or args.base or "fidelity" in given)
        if method == "rrdb":
            choice = choose_upscaler()
        else:
            choice = choose_restorer(
                mode=args.mode,
                enlarge=enlarges and method is None,
                optional=BASE_PARTS if args.base else (),
            )
        name, notes = choice.model, [str(choice)]
    model = locate_restorer(
        name, mode=args.mode, method=method, base=args.base, upscaler=args.upscaler, vae=args.vae,
        prediction_type=args.prediction_type,
    )  # fmt: skip
    if model.method == "rrdb" and args.mode in ("stylize", "colorize"):
        raise ValueError(
            f"{model.own.name}: an upscaler, which has no --mode {args.mode}; take a model of PASD's with --method pasd"
        )
    if model.origin == "machine" and not auto:
        notes.append(f"{name} comes without an upscaler: {model.own.name} enlarges, which is on this machine")
    return model, notes


def remarks(args: argparse.Namespace, model: "RestoreModel") -> list[str]:
    """Notes on what LoRAs set, and on what was asked for and does not apply to the method."""
    if model.method not in NET_FREE:
        notes = sampling_notes(sampling_of(args.lora), OPTIONS)
        unused = [f"--upscaler: not used by method {model.method}; --method rrdb uses it"]
        return notes + (unused if args.upscaler else [])
    fields = given_options(args, OPTIONS).keys() - {"mode", "method", "seed"}
    flags = {OPTIONS[name].flag for name in fields}
    others = ("prompt", "lora", "embedding", "vae", "high_level_info", "prediction_type")
    flags |= {f"--{name.replace('_', '-')}" for name in others if getattr(args, name)}
    flags |= {"--preset"} if args.preset != "paper" else set()
    flags |= {"--base"} if args.base and model.origin != "base" else set()
    flags |= {"--base-weight"} if args.base_weight != 1 else set()
    notes = []
    if args.model != "auto" and model.origin in (None, "upscaler"):
        notes.append(f"--model: not used, {what_enlarges(model)} enlarges")
    if flags:
        told = ", ".join(sorted(flags))
        way_out = "for that take a model of PASD's, as --model pasd is"
        notes.append(f"{told}: not used by method {model.method}, which has no diffusion; {way_out}")
    if args.upscaler and model.method == "bicubic":
        notes.append("--upscaler: not used by method bicubic; --method rrdb uses it")
    return notes


def what_enlarges(model: "RestoreModel") -> str:
    """The upscaler of a method without diffusion, in a word."""
    return model.own.name if model.own.nets else "interpolation"


def kinds_to_recognise(args: argparse.Namespace, facts: "RestoreFacts") -> "tuple[Kind, ...]":
    """What to recognise in the picture: as asked, or else what this machine can, where prompts help."""
    from msbd.loading.captions import available, load_captioners

    there = available()
    if args.high_level_info is None:
        return there if facts.spec.uses_prompts else ()
    if missing := [kind for kind in args.high_level_info if kind not in there]:
        load_captioners(missing)  # says what it lacks
    return args.high_level_info


def restore_config(args: argparse.Namespace) -> RestoreConfig:
    """The preset's options, overruled by what a known LoRA was made for, and that by the flags."""
    from msbd.restore.official import OPTIONS as OFFICIAL

    preset = OFFICIAL if args.preset == "official" else PRESETS[args.preset]
    given = given_options(args, OPTIONS)
    tile, overlap = (given.get(name) for name in ("latent_tiled_size", "latent_tiled_overlap"))
    if tile is not None and overlap is not None and overlap >= tile:  # in pixels, as they were given
        raise ValueError(f"--tile-overlap is {CELL * overlap}; expected less than --tile, {CELL * tile}")
    made_for = sampling_of(args.lora)
    if len(made_for) == 1:  # several would mix
        preset = preset | next(iter(made_for.values()))
    return RestoreConfig(**{**preset, **given})


def plan_text(plan: "RestorePlan") -> str:
    """Sizes, tiles and evaluations in words."""
    tiles = f", {len(plan.tiles)} tiles" if len(plan.tiles) > 1 else ""
    at = f", restored at {wide(plan.working_size)}" if plan.working_size != plan.output_size else ""
    (height, width), (high, broad) = plan.input_size, plan.output_size
    stretched = ", stretched" if abs(high * width - broad * height) > height + width else ""
    if not plan.evaluations:  # a method without diffusion, which enlarges at once
        return f"{wide(plan.input_size)} -> {wide(plan.output_size)}{stretched}"
    return f"{wide(plan.input_size)} -> {wide(plan.output_size)}{stretched}{at}{tiles}, {plan.evaluations:,} evaluations"


# ---- running -----------------------------------------------------------------------------------------------


class Restorer:
    """The command that was checked, and its nets once the first picture was read."""

    memory = MEMORY

    def __init__(self, args: argparse.Namespace) -> None:
        """ValueError or OSError."""
        self.args, self.job = args, prepare(args)
        self.notes, self.part = self.job.notes, ""
        self._pipeline: RestorePipeline | None = None
        self._captioners: Any = {}

    @cached_property
    def _facts(self) -> dict[str, Any]:
        return metadata(self.args, self.job)

    @staticmethod
    def one_task(args: argparse.Namespace) -> Task:
        """The picture of a command that names one, and where its result goes."""
        from msbd.pixels.files import check_output_path

        output = args.output / f"{args.image.stem}.png" if args.output.is_dir() else args.output
        outputs = {"--output": output} | ({"--compare": args.compare} if args.compare else {})
        check_outputs(outputs, {"--image": args.image})
        for path in outputs.values():
            check_output_path(path)
        return Task(args.image.name, args.image, output, args.compare)

    def settings(self, task: Task) -> dict[str, Any]:
        """All that changes the result of one picture, but for what its files hold, and the machine."""
        args = task.of(self.args)
        named = ("prompt", "scale", "size", "no_metadata", "strip_metadata", "dtype")
        settings = without_machine(self._facts) | asdict(self._config(task))
        settings |= {name: getattr(args, name) for name in named}
        return settings | {"kinds": self.job.kinds, "signed": args.c2pa is not None}

    def plan(self, task: Task) -> Planned:
        """What would be made of one picture. ValueError or OSError."""
        plan = self._read(task, FileBytes(task.image))[1]
        needed = memory_needed(plan.output_size) / 1e9
        told = f", {needed:,.0f} GB of memory without nets" if needed >= 1 else ""
        return Planned(f"{task.image.name}: {plan_text(plan)}{told}", evaluations=plan.evaluations)

    def summary(self, evaluations: int) -> str:
        """How the pictures would be made, all of them."""
        if self.job.config.method in NET_FREE:
            return f"by {what_enlarges(self.job.model)}, without diffusion"
        unguided = self.job.config.for_model(self.job.facts.spec).guidance_scale == 1
        return f"in all {evaluations:,} evaluations, {'without guidance' if unguided else 'each for both prompts'}"

    def make(self, task: Task, tell: Tell) -> Made:
        """Read, restore and write one picture. ValueError or OSError."""
        from msbd.pixels.files import save_image, save_photo
        from msbd.pixels.xmp import EDITED, ENHANCED

        from .._sheets import before_and_after, shown

        start, source = time.perf_counter(), FileBytes(task.image)
        photo, plan = self._read(task, source)
        tell([f"{task.image}: {note}" for note in photo.notes])
        restored, result, information = self._restored(task, photo, plan.output_size)
        written = self._written(task, source, result, information)
        source_type = ENHANCED if self.job.config.method in NET_FREE else EDITED
        tokenizer, prompts = self._nets.tokenizer, (result.prompt, result.negative_prompt)
        tell([*result.notes, *long_prompts(tokenizer, prompts, self.job.config.prompt_syntax)])
        tell(word_notes(tokenizer, self.job.embeddings, prompts))
        notes = save_photo(
            restored,
            task.output,
            ours=written,
            source_type=None if written is None else source_type,
            sign=signing(self.job.credentials, source, source_type),
        )
        tell(notes)
        if task.compare:
            save_image(before_and_after(shown(photo), shown(restored)), task.compare)
        line = f"{task.output}: {plan_text(result.plan)}"
        told = (f"{line}, {time.perf_counter() - start:.1f} s",)
        return Made(line, source.digest, source.seen, lines=told)

    @property
    def _nets(self) -> "RestorePipeline":
        """The pipeline, which is read when it is first asked for."""
        from msbd.load import load_restore_pipeline
        from msbd.loading.captions import load_captioners

        if self._pipeline is None:
            job = self.job
            self._pipeline = load_restore_pipeline(
                job.model, base_weight=self.args.base_weight if job.model.base else 1.0,
                loras=job.loras, embeddings=job.embeddings, device=job.device, dtype=job.dtype,
            )  # fmt: skip
            self._captioners = load_captioners(job.kinds, job.device) if job.kinds else {}
        return self._pipeline

    def _config(self, task: Task) -> RestoreConfig:
        return self.job.config if task.seed is None else replace(self.job.config, seed=task.seed)

    def _read(self, task: Task, source: FileBytes) -> "tuple[Photo, RestorePlan]":
        """The picture, and what is to be done, once it is certain that the result can be written."""
        from msbd.restore.plan import plan_restore

        photo = read_photo(source)
        check_transparency(photo, task.image, task.output)
        size = asked_size(self.args, photo.size)
        plan = plan_restore(photo.size, size, self._config(task), **vars(self.job.facts))
        check_memory(size)
        check_result(task.output, size, like=photo)
        return photo, plan

    def _restored(
        self, task: Task, photo: "Photo", size: tuple[int, int]
    ) -> "tuple[Photo, RestoreResult, list[str]]":
        """The photo as it is to be written, what the nets gave, and what was recognised in it."""
        from msbd.pixels.metadata import Metadata
        from msbd.restore.captions import describe as recognise
        from msbd.restore.color import is_gray

        job, pipeline, image = self.job, self._nets, photo.image
        information = recognise(image.to(job.device), job.kinds, self._captioners) if job.kinds else []
        interpolated = job.config.method == "bicubic" and photo.alpha is not None and size != photo.size
        with Progress(quiet=self.args.quiet, part=self.part) as progress:
            result = pipeline(
                premultiplied(image, photo) if interpolated else image, task.of(self.args).prompt, output_size=size,
                information=information, config=self._config(task), on_step=progress
            )  # fmt: skip
        made = straight(result.image, photo) if interpolated else result.image
        coloured = job.config.mode in ("stylize", "colorize") and not is_gray(made)
        restored = photo.remade(made, resampled_alpha(photo, size), before=image, coloured=coloured)
        if self.args.strip_metadata:
            restored = replace(restored, metadata=Metadata())
        return restored, result, information

    def _written(
        self, task: Task, source: FileBytes, result: "RestoreResult", information: list[str]
    ) -> dict[str, Any] | None:
        """What the file says of how it was made; None where it is to say nothing."""
        if self.args.no_metadata or self.args.strip_metadata:
            return None
        plan = result.plan
        settings = asdict(plan.config) | {
            "size": wide(plan.output_size),
            "notes": "; ".join(result.notes) or None,
            "image_hash": source.digest[:10],
        }
        if self.job.config.method in NET_FREE:  # whose other settings do nothing
            kept = ("mode", "method", "size", "notes", "image_hash")
            return self._facts | {name: settings[name] for name in kept}
        prompts = {
            "prompt": result.prompt,
            "negative_prompt": result.negative_prompt,
            "user_prompt": task.of(self.args).prompt,
            "information": ", ".join(information) or None,
        }
        return prompts | self._facts | {name: v for name, v in settings.items() if name not in prompts}


def metadata(args: argparse.Namespace, job: RestoreJob) -> dict[str, Any]:
    """What is needed to make the picture again, but the settings themselves."""
    from msbd.load import model_hash

    base, own, both = job.model.base, job.model.own, job.model.both
    diffusion = job.config.method not in NET_FREE
    return {
        "model": Path(own.name).name if own.nets else None,  # of a folder no more than its own name
        "model_hash": model_hash(own) if own.nets else None,
        "vae": part_name(args.vae, both.net("vae").path) if diffusion and args.vae else None,
        "base": base and f"{Path(args.base).name}:{args.base_weight:g} ({model_hash(base)})",
        "prediction_type": args.prediction_type if diffusion else None,
        "loras": lora_names(args.lora) if diffusion else None,
        "embeddings": embedding_names(args.embedding) if diffusion else None,
        "preset": args.preset if diffusion else None,
        **machine_facts(job.device, job.dtype),
    }


if __name__ == "__main__":
    raise SystemExit(main())
