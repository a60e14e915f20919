"""`python -m tools.evaluate presets`: what the presets of tools.edit give for their work, in pairs.

Every preset edits the same scenes (edit.py), or one picture, with the same seeds. Told are the asked colour
and object (of scenes), CLIP's score (the cosine of picture and asked caption, times 100), the step across the
mask's edge, how much more the colours change across the borders of tiles inside the mask than elsewhere in it
(1 is as much), and the work; then each preset less the first one, scene by scene. `--plot` draws quality
against work.
"""

import argparse
import math
import shlex
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor

from msbd.edit.config import EditConfig
from msbd.edit.pipeline import EditPipeline, EditResult
from msbd.load import load_edit_pipeline, model_hash
from msbd.loading.seam import choose_seam_decoder
from msbd.pixels.metrics import border_step, edge_step
from msbd.pixels.resize import take
from weights.locate import locate

from .._cli import (
    CommandParser,
    add_config_options,
    add_lora,
    add_options,
    choose_device,
    errors_by_flag,
    given_options,
)
from .._report import Figure, mean, new_figure, table
from ..edit import GROUPS, OPTIONS, PRESETS, preset_options
from ..scenes.judge import Judge
from .edit import (
    EditTask,
    EditTrial,
    Ledger,
    Record,
    check_names,
    clip_cosine,
    clip_score,
    measured,
    read_loras,
    run_trials,
    subject_record,
    tell,
    window_of,
)
from .tasks import Task, read_tasks

# Column -> a record's value and what it is told in.
MEASURES: dict[str, tuple[str, float]] = {
    "asked colour %": ("colour_right", 100.0),
    "asked object %": ("kind_right", 100.0),
    "CLIP score x 100": ("clip", 100.0),
    "edge step, levels": ("step", 1.0),
    "across tiles": ("border", 1.0),
    "evaluations, first stage": ("first_stage", 1.0),
    "evaluations": ("evaluations", 1.0),
    "seconds": ("seconds", 1.0),
}

QUALITY = ("colour_right", "kind_right", "clip")  # what --plot draws


def evaluate_presets(args: argparse.Namespace) -> str:
    """Edit with every preset what is not known yet; the table over all. ValueError, OSError, WeightsError."""
    args, task_of, words = read_tasks(args)
    if args.plot:
        new_figure(1, 1)  # refused now, not after hours
    device, dtype = choose_device(args.device, args.dtype)
    model, precision = locate(args.model, companions=True), str(dtype).removeprefix("torch.")
    given = {} if args.steps is None else {"num_steps": args.steps}
    given |= {} if args.seam is None else {"seam": args.seam}
    trials = [EditTrial(name, EditConfig(**{**preset_options(name, ()), **given})) for name in args.presets]
    trials += [tried(name, flags) for name, flags in args.also]
    check_names(trials)
    asymmetric = any(trial.config and trial.config.seam == "asymmetric" for trial in trials)
    decoder = choose_seam_decoder(model) if asymmetric else None
    pipes = {
        loras: load_edit_pipeline(
            model, device=device, dtype=dtype, loras=read_loras(loras), seam_decoder=decoder
        )
        for loras in dict.fromkeys(trial.loras for trial in trials)
    }
    if any(pipe.clip is None for pipe in pipes.values()):
        raise ValueError(f"{args.model}: no CLIP, by which presets are measured; fetch clip-vit-l14")
    ledger = Ledger(
        f"presets-{model_hash(model)}-{words}-{args.seed}-{device.type}-{precision}", fresh=args.fresh
    )

    def attempt(judge: Judge | None, task: Task, trial: EditTrial, seed: int) -> tuple[Tensor, Record]:
        return edited(pipes[trial.loras], judge, task, trial, seed)

    run_trials(attempt, trials, ledger, args, task_of, judged=args.image is None)
    settings = {"model": str(args.model), "device": device.type, "dtype": precision, "pictures": words}
    told = preset_report(trials, ledger, args, settings)
    if args.plot:
        draw_work(trials, ledger, range(args.scenes), args.plot)
    return told


def tried(name: str, flags: str) -> EditTrial:
    """The trial `name` of `flags` as tools.edit takes them, "--preset paper --steps 20", over the preset's.

    ValueError for others.
    """
    parser = CommandParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--preset", choices=PRESETS, default="default")
    add_lora(parser.add_argument, "the model")
    add_options(parser.add_argument_group(), OPTIONS, ("num_steps",))
    add_config_options(parser, OPTIONS, GROUPS)
    try:
        given, unknown = parser.parse_known_args(shlex.split(flags))
    except (argparse.ArgumentError, ValueError) as error:
        raise ValueError(f"--also {name}={flags}: {error}") from None
    if unknown:
        raise ValueError(
            f"--also {name}={flags}: {' '.join(unknown)} is not taken here; the options are those of tools.edit "
            "for sampling and seams, --preset and --lora"
        )
    with errors_by_flag(OPTIONS):
        options = preset_options(given.preset, given.lora) | given_options(given, OPTIONS)
        return EditTrial(name, EditConfig(**options), tuple(given.lora))


def edited(
    pipe: EditPipeline, judge: Judge | None, task: Task, trial: EditTrial, seed: int
) -> tuple[Tensor, Record]:
    """The picture that `trial` gives of `task`, and its record. Colour and object are judged in scenes."""
    assert trial.config is not None
    config = replace(trial.config, seed=seed * 100_000 + task.number)
    started = time.perf_counter()
    result = pipe(task.image, task.mask, task.prompt, config=config)
    seconds = time.perf_counter() - started
    record: Record = {}
    if isinstance(task, EditTask) and judge is not None:
        seen = subject_record(pipe, judge, task, result.image)
        record["colour_right"] = seen["colour"] == seen["asked"][0]
        record["kind_right"] = seen["kind"] == seen["asked"][1]
        score = seen["clip"]
    else:
        score = clip_score(pipe, window_of(result.image, task.mask), task.prompt)
    return result.image, {
        **record,
        "clip": clip_cosine(pipe, score),
        **picture_record(task.image, task.mask, result),
        "seconds": round(seconds, 2),
    }


def picture_record(image: Tensor, mask: Tensor, result: EditResult) -> Record:
    """What needs no truth: the step at the edge, the one at the tiles' borders, and the evaluations."""
    last, crop = result.plan.stages[-1], result.plan.crop
    record: Record = {
        "step": (edge_step(result.image, mask) - edge_step(image, mask)).item(),
        "evaluations": result.plan.evaluations,
        "first_stage": result.plan.stages[0].evaluations,
    }
    if len(last.grid) > 1 and last.size == crop.size:
        rows = _middles({(box.top, box.height) for box in last.grid})
        columns = _middles({(box.left, box.width) for box in last.grid})
        inside = take(mask, crop)
        border = border_step(take(result.image, crop), inside, rows, columns, result.plan.config.tile // 6)
        record |= {} if math.isnan(border) else {"border": border}
    return record


def _middles(spans: set[tuple[int, int]]) -> list[int]:
    """Where neighbouring spans (start, length) are crossfaded half and half."""
    return [(a + length + b) // 2 for (a, length), (b, _) in pairwise(sorted(spans))]


def preset_report(
    trials: Sequence[EditTrial], ledger: Ledger, args: argparse.Namespace, settings: dict[str, Any]
) -> str:
    """The table over everything in the ledger; writes JSON and sheets where asked to."""
    first, *others = trials
    known = {t: {n: r for n in range(args.scenes) if (r := ledger.get(n, t))} for t in trials}
    every = [record for records in known.values() for record in records.values()]
    measures = {label: told for label, told in MEASURES.items() if any(told[0] in r for r in every)}
    figures: list[Figure] = []

    def row(name: str, records: Sequence[Record], less: Sequence[Record] = ()) -> list[str]:
        found = measured(name, records, measures, less)
        figures.extend(found)
        return [name, str(len(records)), *(figure.text for figure in found)]

    lines = [["mean (95 % interval)", "n", *measures]]
    lines += [row(trial.name, list(known[trial].values())) for trial in trials]
    for trial in others:
        both = sorted(known[trial].keys() & known[first].keys())
        pairs = [known[trial][n] for n in both], [known[first][n] for n in both]
        lines.append(row(f"{trial.name} - {first.name}", *pairs))
    return tell(table(lines), figures, trials, ledger, args, settings)


def draw_work(trials: Sequence[EditTrial], ledger: Ledger, numbers: Sequence[int], path: Path) -> None:
    """CLIP's score, asked colours and objects over the evaluations of an edit, with their 95 % intervals.

    Each less the first trial's on the same scenes. ValueError without matplotlib.
    """
    first, *others = trials
    pairs_of = {
        trial: [(a, b) for n in numbers if (a := ledger.get(n, trial)) and (b := ledger.get(n, first))]
        for trial in others
    }
    pairs_of = {trial: pairs for trial, pairs in pairs_of.items() if pairs}
    known = {key for pairs in pairs_of.values() for key in pairs[0][0]}
    drawn = {label: told for label, told in MEASURES.items() if told[0] in known & {*QUALITY}}
    at_first = [b["evaluations"] for pairs in pairs_of.values() for _, b in pairs]
    canvas = new_figure(3.1 * max(len(drawn), 1), 3.8)
    axes = canvas.subplots(1, max(len(drawn), 1), sharex=True, squeeze=False)[0]
    for axis, (label, (key, factor)) in zip(axes, drawn.items(), strict=False):
        for trial, pairs in pairs_of.items():
            less = mean(label, [factor * (a[key] - b[key]) for a, b in pairs], "")
            work = sum(a["evaluations"] for a, _ in pairs) / len(pairs)
            spread = [[less.value - less.low], [less.high - less.value]]
            axis.errorbar([work], [less.value], spread, marker="o", capsize=3, label=trial.name)
        axis.plot([sum(at_first) / len(at_first)], [0], "k*", label=first.name)
        axis.axhline(0, color="0.5", linewidth=1)
        axis.set(xlabel="evaluations of the U-Net", xscale="log", title=f"{label}, less {first.name}'s")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("")
    canvas.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    canvas.savefig(path, dpi=110)
