"""`python -m tools.evaluate presets`: what the presets of tools.edit give for their work, in pairs.

Every preset edits the same scenes (edit.py) with the same seeds. Told are the asked colour and object, CLIP's
score (the cosine of picture and asked caption, in a hundredth), the step across the mask's edge, and the
work; then each preset less the first one, scene by scene.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from tqdm import tqdm

from msbd.edit.config import EditConfig
from msbd.edit.pipeline import EditPipeline
from msbd.load import load_edit_pipeline, model_hash
from msbd.pixels.files import save_image
from msbd.pixels.metrics import edge_step
from weights.locate import locate

from .._cli import choose_device
from .._report import Figure, mean, table
from ..edit import preset_options
from ..scenes.judge import Judge, load_judge
from .edit import (
    SOURCE,
    EditTask,
    EditTrial,
    Ledger,
    Record,
    make_task,
    picture_path,
    read_loras,
    subject_record,
    tell,
)

# Column -> a record's value, and how far below the first preset the 95 % interval may reach.
MEASURES: dict[str, tuple[str, float, float]] = {
    "asked colour %": ("colour_right", 100.0, -8.0),
    "asked object %": ("kind_right", 100.0, -8.0),
    "CLIP score x 100": ("clip", 100.0, -1.0),
    "edge step, levels": ("step", 1.0, 0.5),
    "evaluations, first stage": ("first_stage", 1.0, 0.0),
    "evaluations": ("evaluations", 1.0, 0.0),
    "seconds": ("seconds", 1.0, 0.0),
}


def evaluate_presets(args: argparse.Namespace) -> str:
    """Edit with every preset what is not known yet; the table over all. ValueError, WeightsError."""
    if args.scenes < 1 or args.start < 0 or args.size < 64:
        raise ValueError("--scenes is at least 1, --start at least 0, --size at least 64")
    device, dtype = choose_device(args.device, args.dtype)
    model, precision = locate(args.model, companions=True), str(dtype).removeprefix("torch.")
    given = {} if args.steps is None else {"num_steps": args.steps}
    given |= {} if args.seam is None else {"seam": args.seam}
    trials = [
        EditTrial(name, EditConfig(**{**preset_options(name, args.lora), **given})) for name in args.presets
    ]
    pipe = load_edit_pipeline(model, device=device, dtype=dtype, loras=read_loras(args.lora))
    loras = "".join(f"-{name}:{weight:g}" for name, weight in args.lora)
    words = f"presets-{model_hash(model)}{loras}-{args.size}-{args.seed}-{device.type}-{precision}"
    ledger = Ledger(words, fresh=args.fresh)
    stop = args.scenes if args.count is None else min(args.scenes, args.start + args.count)
    numbers = range(args.start, stop)
    todo = [(n, trial) for n in numbers for trial in trials if ledger.get(n, trial) is None]
    judge = load_judge() if todo else None
    task = None
    for number, trial in tqdm(todo, desc="presets", disable=True if args.quiet else None):
        assert judge is not None
        task = make_task(number, args.size) if task is None or task.number != number else task
        image, record = edited(pipe, judge, task, trial, args.seed)
        if args.pictures:
            save_image(task.image, picture_path(args, number, SOURCE))
            save_image(image, picture_path(args, number, trial))
        ledger.add(number, trial, record)
    settings = {"model": str(args.model), "device": device.type, "dtype": precision, "size": args.size}
    return preset_report(trials, ledger, args, settings)


def edited(
    pipe: EditPipeline, judge: Judge, task: EditTask, trial: EditTrial, seed: int
) -> tuple[Tensor, Record]:
    """The picture that `trial` gives of `task`, and its record."""
    assert trial.config is not None
    config = replace(trial.config, seed=seed * 100_000 + task.number)
    started = time.perf_counter()
    result = pipe(task.image, task.mask, task.asked.caption, config=config)
    seconds = time.perf_counter() - started
    record = subject_record(pipe, judge, task, result.image)
    assert pipe.clip is not None
    step = edge_step(result.image, task.mask) - edge_step(task.image, task.mask)
    return result.image, {
        "seconds": round(seconds, 2),
        "evaluations": result.plan.evaluations,
        "first_stage": result.plan.stages[0].evaluations,
        "colour_right": record["colour"] == record["asked"][0],
        "kind_right": record["kind"] == record["asked"][1],
        "clip": record["clip"] / pipe.clip.logit_scale.exp().item(),
        "step": step.item(),
    }


def preset_report(
    trials: Sequence[EditTrial], ledger: Ledger, args: argparse.Namespace, settings: dict[str, Any]
) -> str:
    """The table over everything in the ledger; writes JSON and sheets where asked to."""
    head = ["95 % intervals", "n", *MEASURES]
    lines, pairs, figures = [head], [], list[Figure]()
    first = trials[0]
    for trial in trials:
        records = {n: r for n in range(args.scenes) if (r := ledger.get(n, trial))}
        row = [
            mean(f"{trial.name}: {label}", [factor * r[key] for r in records.values()], "")
            for label, (key, factor, _) in MEASURES.items()
        ]
        lines.append([trial.name, str(len(records)), *(figure.text for figure in row)])
        figures += row
        if trial == first:
            continue
        both = [(a, r) for n, r in records.items() if (a := ledger.get(n, first))]
        row = [
            mean(f"{trial.name} - {first.name}: {label}", [factor * (r[key] - a[key]) for a, r in both], "")
            for label, (key, factor, _) in MEASURES.items()
        ]
        pairs.append([f"{trial.name} - {first.name}", str(len(both)), *(figure.text for figure in row)])
        figures += row
    return tell(table([*lines, *pairs]), figures, trials, ledger, args, settings)
