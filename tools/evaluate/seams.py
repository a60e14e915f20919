"""`python -m tools.evaluate seams`: the same sampled latents, made to meet their background in each way.

One edit a picture, by preset default; what its last stage sampled is decoded by each of `--seams`. `adam` is
eq. 1 as the paper has it, on all tiles; `adam-ring` on the crops that the mask's edge runs through, ended
when the loss stands still. Told are the error in the ring around the mask (the pixels at most 16 rows and
columns from it, as decoded), the step across the mask's edge after compositing (edit.background_record), how
far the inside is from what the plain decoder gives, CLIP's score of the result (the cosine, times 100), and
seconds.
"""

import argparse
import time
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from msbd.edit.config import EditConfig
from msbd.edit.decode import stage_picture
from msbd.edit.pipeline import EditPipeline
from msbd.edit.plan import Stage
from msbd.edit.stage import Edit
from msbd.load import load_edit_pipeline, model_hash
from msbd.loading.seam import choose_seam_decoder
from msbd.pixels.masks import dilate
from msbd.pixels.metrics import edge_step, psnr
from weights.locate import locate

from .._cli import choose_device
from .._report import table
from .edit import (
    RING,
    EditTrial,
    Ledger,
    Record,
    clip_cosine,
    clip_score,
    known_records,
    measured,
    run_trials,
    tell,
)
from .tasks import Task, read_tasks

# Name -> the options of an edit that it stands for.
SEAMS: dict[str, dict[str, Any]] = {
    "none": {"seam": "none"},
    "adam": {"seam": "adam", "decoderopt_area": "tiles", "decoderopt_stop": 0.0},
    "adam-ring": {"seam": "adam", "decoderopt_area": "ring", "decoderopt_stop": 0.02},
    "closed-form": {"seam": "closed-form"},
    "asymmetric": {"seam": "asymmetric"},
    "membrane": {"seam": "membrane"},
}
# Column -> a record's value and what it is told in.
MEASURES = {
    "ring PSNR, dB": ("psnr", 1.0),
    "edge step, levels": ("step", 1.0),
    "change inside, levels": ("change", 1.0),
    "CLIP score x 100": ("clip", 100.0),
    "seconds": ("seconds", 1.0),
}


def evaluate_seams(args: argparse.Namespace) -> str:
    """Decode every picture in each way that is not known yet; the table over all.

    ValueError, OSError, WeightsError.
    """
    args, task_of, words = read_tasks(args)
    device, dtype = choose_device(args.device, args.dtype)
    model, precision = locate(args.model, companions=True), str(dtype).removeprefix("torch.")
    given = {} if args.steps is None else {"num_steps": args.steps}
    config = EditConfig.default(decoderopt_steps=args.decoderopt_steps, **given)
    trials = [EditTrial(name, replace(config, **SEAMS[name])) for name in dict.fromkeys(args.seams)]
    decoder = choose_seam_decoder(model) if "asymmetric" in args.seams else None
    pipe = load_edit_pipeline(model, device=device, dtype=dtype, seam_decoder=decoder)

    @lru_cache(maxsize=1)
    def sampled_once(task: Task, seed: int) -> "Sampled":
        return sample(pipe, task, replace(config, seed=seed * 100_000 + task.number))

    def attempt(judge: None, task: Task, trial: EditTrial, seed: int) -> tuple[Tensor, Record]:
        return decode_by(pipe, sampled_once(task, seed), SEAMS[trial.name])

    ledger = Ledger(
        f"seams-{model_hash(model)}-{words}-{args.seed}-{device.type}-{precision}", fresh=args.fresh
    )
    run_trials(attempt, trials, ledger, args, task_of, judged=False)
    known = {trial.name: known_records(ledger, range(args.scenes), trial) for trial in trials}
    rows = {name: measured(name, records, MEASURES) for name, records in known.items()}
    lines = [["mean (95 % interval)", "n", *MEASURES]]
    lines += [[name, str(len(known[name])), *(f.text for f in figures)] for name, figures in rows.items()]
    settings = {"model": str(args.model), "device": device.type, "dtype": precision, "pictures": words}
    return tell(table(lines), [f for row in rows.values() for f in row], trials, ledger, args, settings)


@dataclass(frozen=True)
class Sampled:
    """The latents that the last stage of an edit sampled, what they are to meet, and the plain decoding."""

    edit: Edit
    stage: Stage
    x_in: Tensor  # (1, 3, h, w) in [-1, 1], the source at the stage's size
    latents: tuple[Tensor, ...]
    prompt: str
    plain: Tensor  # (1, 3, h, w) in [-1, 1]


def sample(pipe: EditPipeline, task: Task, config: EditConfig) -> Sampled:
    """Edit without a seam, and keep what the last stage had."""
    last: dict[str, Any] = {}

    def remember(edit: Edit, stage: Stage, x_in: Tensor, latents: Any) -> Tensor:
        last.update(edit=edit, stage=stage, x_in=x_in, latents=tuple(latents))
        last["plain"] = stage_picture(edit, stage, x_in, latents)
        return last["plain"]

    pipe.stage_picture = remember
    try:
        pipe(task.image, task.mask, task.prompt, config=replace(config, seam="none"))
    finally:
        pipe.stage_picture = stage_picture
    return Sampled(prompt=task.prompt, **last)


@torch.no_grad()
def decode_by(pipe: EditPipeline, sampled: Sampled, options: dict[str, Any]) -> tuple[Tensor, Record]:
    """The crop's result (1, 3, h, w) in [-1, 1] under these options of the seam, and its record."""
    edit, stage, x_in = sampled.edit, sampled.stage, sampled.x_in
    plan = replace(edit.plan, config=replace(edit.plan.config, **options))
    started = time.perf_counter()
    decoded = stage_picture(replace(edit, plan=plan), stage, x_in, sampled.latents)
    seconds = time.perf_counter() - started
    picture = stage.mask * decoded + (1 - stage.mask) * x_in
    ring = dilate(stage.mask, RING) - stage.mask
    inside = stage.mask.sum().item() * decoded.shape[1]
    record: Record = {
        "step": (edge_step(picture, stage.mask) - edge_step(x_in, stage.mask)).item(),
        "change": ((decoded - sampled.plain).abs() * stage.mask).sum().item() / inside * 127.5,
        "seconds": round(seconds, 2),
    }
    if not torch.equal(decoded * ring, x_in * ring):  # the membrane's ring is the source itself
        record["psnr"] = psnr(decoded, x_in, ring).item()
    if pipe.clip is not None:
        record["clip"] = clip_cosine(pipe, clip_score(pipe, picture, sampled.prompt))
    return picture, record
