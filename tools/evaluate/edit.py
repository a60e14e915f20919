"""The edits of `python -m tools.evaluate edit | decoder-opt`: which scenes, what is asked, what is measured.

An edit asks for another colour (even scenes) or another object in another colour (odd ones). A scene's mask
is its object, grown by a sixty-fourth of the picture's side. Another object is drawn from those that would
cover seven tenths of the old one if they stood in its place: a bottle asked for in the outline of a house
would leave what lies under the mask's middle undecided.

Besides the edits two pictures are measured that nothing has been done to: the `source` (the floor) and the
`truth`, the scene rendered with the asked colour and object (the ceiling). CLIP's preference at B > 1 is that
of the net that chose the candidate; at B = 1, and in the judge's view (tools/scenes/judge.py), nothing was
chosen by what measures it.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from msbd.edit.config import EditConfig
from msbd.edit.crops import crop_box
from msbd.edit.pipeline import EditPipeline, EditResult
from msbd.edit.rerank import clip_scores
from msbd.load import load_edit_pipeline, model_hash
from msbd.loading.nets import read_lora_file
from msbd.pixels.files import load_image, save_image
from msbd.pixels.masks import dilate, mask_box
from msbd.pixels.metrics import edge_step, psnr, squared_error
from msbd.pixels.resize import put_back, resize, take
from msbd.pixels.tiles import covered
from weights.locate import locate
from weights.lora import Lora

from .._cli import choose_device, lora_names
from .._report import Figure, code_state, mean, share, table, write_json, write_sheet
from ..scenes.data import picture, runs_folder
from ..scenes.judge import Judge, load_judge, nearest_colour
from ..scenes.scenes import COLOURS, HELD_OUT, Scene, random_scene, render
from ..scenes.shapes import OBJECTS

RING = 16  # pixels around the mask in which the background's error is measured
_FIRST = HELD_OUT + 50_000  # seed of the first scene
_COVER = 0.7  # how much of the old object a new one must cover
_SHOWN = 192  # pixels, side of a picture in the sheets

Record = dict[str, Any]


# ---- what is asked -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EditTask:
    """Scene `number` at `size` pixels and what it is to become."""

    number: int
    scene: Scene
    asked: Scene
    size: int

    @property
    def prompt(self) -> str:
        """The caption of the asked scene."""
        return self.asked.caption

    @cached_property
    def image(self) -> Tensor:
        """The source (1, 3, size, size) in [-1, 1], on 256 levels."""
        return picture(self.scene, self.size)

    @cached_property
    def truth(self) -> Tensor:
        """The asked scene (1, 3, size, size) in [-1, 1], on 256 levels."""
        return picture(self.asked, self.size)

    @cached_property
    def mask(self) -> Tensor:
        """The edit mask (1, 1, size, size): the object, grown by size / 64 pixels."""
        covered = torch.from_numpy(render(self.scene, self.size).mask > 0)
        return dilate(covered.float()[None, None], self.size // 64)

    @property
    def core(self) -> Tensor:
        """The mask eroded by size / 32 pixels, or by as much less as leaves some of it."""
        for radius in range(self.size // 32, 0, -1):
            core = 1 - dilate(1 - self.mask, radius)
            if core.any():
                return core
        return self.mask


def make_task(number: int, size: int) -> EditTask:
    """Task `number`: the same on every machine."""
    scene, rng = random_scene(_FIRST + number), np.random.default_rng([number, 5])
    colour = str(rng.choice([name for name in COLOURS if name != scene.colour]))
    kind = scene.kind if number % 2 == 0 else str(rng.choice(fitting_kinds(scene)))
    return EditTask(number, scene, replace(scene, colour=colour, kind=kind), size)


def fitting_kinds(scene: Scene) -> list[str]:
    """The other kinds that cover at least 7 tenths of the scene's object, standing where it stands."""
    old = render(scene, 64).mask > 0.5
    new = {kind: render(replace(scene, kind=kind), 64).mask > 0.5 for kind in OBJECTS if kind != scene.kind}
    shares = {kind: (old & mask).sum() / old.sum() for kind, mask in new.items()}
    return [kind for kind, part in shares.items() if part >= _COVER] or [max(shares, key=lambda k: shares[k])]


@dataclass(frozen=True)
class EditTrial:
    """One way of editing; None for `source` and `truth`, which are only looked at."""

    name: str
    config: EditConfig | None
    loras: tuple[tuple[str, float], ...] = ()  # each a known name or a file, and its weight

    @cached_property
    def key(self) -> str:
        """Its name and a digest of its options, and of the files of its LoRAs."""
        options = "" if self.config is None else json.dumps(asdict(self.config), sort_keys=True)
        options += json.dumps(lora_names(self.loras)) if self.loras else ""
        return f"{self.name}-{hashlib.sha256(options.encode()).hexdigest()[:8]}"


SOURCE, TRUTH = EditTrial("source", None), EditTrial("truth", None)


def check_scenes(args: argparse.Namespace) -> None:
    """ValueError for scenes that are none, or too small to edit."""
    if args.scenes < 1 or args.start < 0 or args.size < 64:
        raise ValueError("--scenes is at least 1, --start at least 0, --size at least 64")


def check_names(trials: Sequence[EditTrial]) -> None:
    """ValueError unless each trial has a name of its own that a file can have."""
    names = [trial.name for trial in trials]
    for name in names:
        if names.count(name) > 1 or not name or "/" in name or "\\" in name:
            raise ValueError(
                f"{name!r} is the name of {names.count(name)} settings; expected different names without slashes"
            )


def make_trials(args: argparse.Namespace, base: EditConfig) -> list[EditTrial]:
    """The trials that the command line asks for; ValueError for options out of range."""
    check_scenes(args)
    if args.job == "decoder-opt":
        steps = args.decoderopt_steps
        config = replace(base, first_stage_batch=args.first_stage_batch, decoderopt_steps=steps)
        return [EditTrial(word, replace(config, decoder_optimization=word == "on")) for word in ("off", "on")]
    base = replace(base, decoder_optimization=args.decoder_optimization)
    trials = [SOURCE, TRUTH]
    for method in dict.fromkeys(args.methods):
        candidates = {"naive": [args.naive_batch], "segments": [1]}.get(method, [args.first_stage_batch, 1])
        for batch in dict.fromkeys(candidates):
            config = replace(base, method=method, first_stage_batch=batch)
            trials.append(EditTrial(f"{method}, B = {batch}", config))
    return trials


# ---- doing it ----------------------------------------------------------------------------------------------


def evaluate_edits(args: argparse.Namespace) -> str:
    """Do the edits that the options ask for and that are not known yet; the table over all.

    ValueError, WeightsError.
    """
    device, dtype = choose_device(args.device, args.dtype)
    base = EditConfig(num_steps=args.steps, repaint_steps=args.repaint_steps)
    trials = make_trials(args, base)
    model, precision = locate(args.model, companions=True), str(dtype).removeprefix("torch.")
    digest = model_hash(model)
    pipe = load_edit_pipeline(model, device=device, dtype=dtype)
    words = f"{args.job}-{digest}-{args.size}-{args.seed}-{device.type}-{precision}"
    ledger = Ledger(words, fresh=args.fresh)

    def task_of(number: int) -> EditTask:
        return make_task(number, args.size)

    run_trials(lambda *each: _try(pipe, *each), trials, ledger, args, task_of, judged=args.job == "edit")
    report = edit_report if args.job == "edit" else decoder_report
    settings = {"model": str(args.model), "hash": digest, "device": device.type, "dtype": precision}
    settings |= {"size": args.size, "seed": args.seed}
    return report(trials, ledger, args, settings)


class Ledger:
    """Records by (scene, trial), kept line by line in a file of the runs folder.

    The file's name holds `words` and the code's state, so that no figure is told that other code measured.
    ValueError for a file with a line that is no record, as one that was cut off.
    """

    def __init__(self, words: str, *, fresh: bool = False) -> None:
        self.path = runs_folder() / "evaluate" / f"{words}-{code_state()}.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if fresh:
            self.path.unlink(missing_ok=True)
        lines = self.path.read_bytes().splitlines() if self.path.exists() else []
        self._records: dict[tuple[int, str], Record] = {}
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                self._records[record["scene"], record["trial"]] = record
            except (ValueError, RecursionError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{self.path}: line {number} is no record; take it out, or begin anew with --fresh"
                ) from error

    def get(self, number: int, trial: EditTrial) -> Record | None:
        """What is known of `trial` on scene `number`."""
        return self._records.get((number, trial.key))

    def add(self, number: int, trial: EditTrial, record: Record) -> None:
        """Keep `record`, at once."""
        record = {"scene": number, "trial": trial.key, **record}
        self._records[number, trial.key] = record
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def run_trials(
    attempt: Callable[[Any, Any, EditTrial, int], tuple[Tensor, Record]], trials: Sequence[EditTrial],
    ledger: Ledger, args: argparse.Namespace, task_of: Callable[[int], Any], *, judged: bool,
) -> None:  # fmt: skip
    """Compute what `ledger` does not have yet of the scenes that `args` asks for now.

    `attempt(judge, task, trial, seed)` gives a trial's picture and record; `judge` is None unless `judged`.
    `task_of(number)` is what is edited.
    """
    stop = args.scenes if args.count is None else min(args.scenes, args.start + args.count)
    todo = [(n, t) for n in range(args.start, stop) for t in trials if not _is_done(ledger, n, t, args)]
    judge = load_judge() if judged and todo else None
    task = None
    for number, trial in tqdm(todo, desc=args.job, disable=True if args.quiet else None):
        if task is None or task.number != number:
            task = task_of(number)
        image, record = attempt(judge, task, trial, args.seed)
        if args.pictures:
            save_image(task.image, picture_path(args, number, SOURCE))
            save_image(image, picture_path(args, number, trial))
        ledger.add(number, trial, record)


def _try(
    pipe: EditPipeline, judge: Judge | None, task: EditTask, trial: EditTrial, seed: int
) -> tuple[Tensor, Record]:
    """The picture that `trial` gives of `task`, and its record."""
    if trial.config is None:
        image, seconds, record = (task.image if trial == SOURCE else task.truth), 0.0, {}
    else:
        config = replace(trial.config, seed=seed * 100_000 + task.number)
        shown: dict[str, Tensor] = {}
        started = time.perf_counter()
        result = pipe(
            task.image,
            task.mask,
            task.asked.caption,
            config=config,
            on_picture=lambda k, v: shown.update({k: v}),
        )
        image, seconds = result.image, time.perf_counter() - started
        record = {} if judge else background_record(task, result, shown)
    if judge:
        record = subject_record(pipe, judge, task, image)
    return image, {"seconds": round(seconds, 2), **record}


def subject_record(pipe: EditPipeline, judge: Judge, task: EditTask, image: Tensor) -> Record:
    """Is what was asked for there? Colour, CLIP's scores of the asked and the old caption, the object.

    Colour: nearest lit palette entry to the median of the eroded mask. CLIP and the judge look at the square
    around the mask that an edit works on, 1.4 times the mask's longer side.
    """
    window = window_of(image, task.mask)
    new, old = (clip_score(pipe, window, scene.caption) for scene in (task.asked, task.scene))
    return {
        "asked": [task.asked.colour, task.asked.kind],
        "colour": nearest_colour(image[0], task.core[0], task.asked.time),
        "kind": judge.kinds(window)[0],
        "clip": new,
        "clip_gain": new - old,
    }


def window_of(image: Tensor, mask: Tensor) -> Tensor:
    """The square around the mask that an edit works on."""
    size = (image.shape[-2], image.shape[-1])
    return take(image, crop_box(mask_box(mask), size, EditConfig().margin, 1))


def clip_score(pipe: EditPipeline, window: Tensor, prompt: str) -> float:
    """CLIP's score of a picture (1, 3, h, w) for `prompt`: their cosine times the net's own scale."""
    assert pipe.clip is not None, "the model has no CLIP"
    device = pipe.clip.logit_scale.device
    ids = pipe.clip_tokenizer([prompt]).to(device)
    return clip_scores(pipe.clip, ids, window.to(device), **pipe.clip_preprocessing).item()


def clip_cosine(pipe: EditPipeline, score: float) -> float:
    """The cosine in a `clip_score` of this pipeline's CLIP."""
    assert pipe.clip is not None, "the model has no CLIP"
    return score / pipe.clip.logit_scale.exp().item()


def background_record(task: EditTask, result: EditResult, shown: dict[str, Tensor]) -> Record:
    """How well the decoder meets the background: `mse` and `psnr` in a ring, the `step` at the mask's edge.

    Ring, before compositing: the unmasked pixels at most 16 rows and columns from a masked one, where a tile
    was computed. There the last stage's picture, as decoded, is compared with the source. Step, after it: the
    mean difference, in 8-bit levels, between neighbouring pixels on either side of the mask's edge in the
    result, less that of the same pairs in the source, where the edge runs through background: 0 means that
    nothing shows.
    """
    crop, stage = result.plan.crop, result.plan.stages[-1]
    decoded = resize(shown[f"{stage.name}, result"].cpu().float(), crop.size)
    decoded = put_back(task.image, decoded, crop)
    computed = covered(torch.ones(1, 1, *stage.size), stage.boxes)
    computed = put_back(torch.zeros_like(task.mask), resize(computed, crop.size), crop)
    ring = (dilate(task.mask, RING) - task.mask) * (computed > 0.999)
    step = edge_step(result.image, task.mask) - edge_step(task.image, task.mask)
    return {
        "mse": squared_error(decoded, task.image, ring).item(),
        "psnr": psnr(decoded, task.image, ring).item(),
        "step": step.item(),
    }


# ---- telling it --------------------------------------------------------------------------------------------


def edit_report(
    trials: Sequence[EditTrial], ledger: Ledger, args: argparse.Namespace, settings: dict[str, Any]
) -> str:
    """The table of `evaluate edit` over everything in the ledger; writes JSON and sheets where asked to."""
    numbers, figures = range(args.scenes), []
    head = ["95 % intervals", "n", "asked colour %", "CLIP prefers asked %", "asked object %", "seconds"]
    lines = [head]
    for part, chosen in (
        ("", numbers),
        ("  other colour", numbers[::2]),
        ("  other object too", numbers[1::2]),
    ):
        if part:
            lines.append([part.strip() + ":"] + [""] * 5)
        for trial in trials:
            records = known_records(ledger, chosen, trial)
            row = _subject_figures(
                f"{trial.name}{part}", records, asked=trial.name.startswith("msbd") and not part
            )
            figures += row
            taken = "" if trial.config is None else row[-1].text
            lines.append(
                [("  " if part else "") + trial.name, str(len(records)), *(f.text for f in row[:3]), taken]
            )
    return tell(table(lines), figures, trials, ledger, args, settings)


def _subject_figures(name: str, records: Sequence[Record], *, asked: bool) -> list[Figure]:
    goal = 90.0 if asked else None
    return [
        share(f"{name}: asked colour", [r["colour"] == r["asked"][0] for r in records], goal),
        share(f"{name}: CLIP prefers asked", [r["clip_gain"] > 0 for r in records], goal),
        share(f"{name}: asked object", [r["kind"] == r["asked"][1] for r in records]),
        mean(f"{name}: seconds", [r["seconds"] for r in records], "s"),
    ]


def decoder_report(
    trials: Sequence[EditTrial], ledger: Ledger, args: argparse.Namespace, settings: dict[str, Any]
) -> str:
    """The table of `evaluate decoder-opt`: off, on, and on less off over the scenes that have both."""
    off, on = trials
    pairs = [(ledger.get(n, off), ledger.get(n, on)) for n in range(args.scenes)]
    both = [(a, b) for a, b in pairs if a and b]
    figures: list[Figure] = []
    lines = [["", "off", "on", "on - off (95 % interval)", "better with it"]]
    scaled: list[tuple[str, str, float, bool | None]] = [
        ("background error in the ring, squared x 1e4", "mse", 1e4, False),
        ("background PSNR in the ring, dB", "psnr", 1, True),
        ("step across the mask's edge, 8-bit levels", "step", 1, False),
        ("seconds", "seconds", 1, None),
    ]
    for label, name, factor, more_is_better in scaled:
        values = [(a[name] * factor, b[name] * factor) for a, b in both]
        columns = ([a for a, _ in values], [b for _, b in values], [b - a for a, b in values])
        row = [
            mean(f"{label}, {word}", v, "")
            for word, v in zip(("off", "on", "on - off"), columns, strict=True)
        ]
        better = sum((b > a) == more_is_better for a, b in values if a != b)
        judged = "" if more_is_better is None else f"{better} of {len(values)}"
        lines.append([label, *(figure.text for figure in row), judged])
        figures += row
    return tell(table(lines), figures, trials, ledger, args, settings)


def read_loras(loras: Sequence[tuple[str, float]]) -> list[tuple[Lora, float]]:
    """The LoRAs of a command line."""
    return [(read_lora_file(path), weight) for path, weight in loras]


def measured(
    name: str,
    records: Sequence[Record],
    measures: Mapping[str, tuple[str, float]],
    less: Sequence[Record] = (),
) -> list[Figure]:
    """The mean of each of `measures` (label -> a record's key, a factor); less that of `less`, in pairs."""
    return [
        mean(
            f"{name}: {label}",
            [
                factor * (record[key] - (other[key] if other else 0))
                for record, other in zip_longest(records, less)
                if key in record and (not other or key in other)
            ],
            "",
        )
        for label, (key, factor) in measures.items()
    ]


def tell(
    text: str, figures: Sequence[Figure], trials: Sequence[EditTrial], ledger: Ledger,
    args: argparse.Namespace, settings: dict[str, Any],
) -> str:  # fmt: skip
    """The table and where its records are; writes JSON and sheets where asked to."""
    if args.json:
        records = {trial.name: known_records(ledger, range(args.scenes), trial) for trial in trials}
        write_json(args.json, figures, **settings, records=records)
    if args.pictures:
        columns = [SOURCE, *(trial for trial in trials if trial != SOURCE)]
        text += f"\nrows in {args.pictures}: " + " | ".join(trial.name for trial in columns)
        _write_rows(columns, args)
    return f"{text}\nrecords: {ledger.path}"


def _write_rows(columns: Sequence[EditTrial], args: argparse.Namespace) -> None:
    """Sheets of eight scenes, each scene a row, of those that have every picture."""
    rows = []
    for number in range(args.scenes):
        paths = [picture_path(args, number, trial) for trial in columns]
        if all(path.exists() for path in paths):
            rows.append([resize(load_image(path).image, (_SHOWN, _SHOWN))[0] for path in paths])
    for first in range(0, len(rows), 8):
        shown = [image for row in rows[first : first + 8] for image in row]
        write_sheet(args.pictures / f"rows {first // 8 + 1}.png", shown, len(columns))


def known_records(ledger: Ledger, numbers: Sequence[int], trial: EditTrial) -> list[Record]:
    """What `ledger` has of `trial` on these scenes."""
    return [record for n in numbers if (record := ledger.get(n, trial)) is not None]


def picture_path(args: argparse.Namespace, number: int, trial: EditTrial) -> Path:
    return args.pictures / f"{number:03d} {trial.name.replace(', B = ', ' ')}.png"


def _is_done(ledger: Ledger, number: int, trial: EditTrial, args: argparse.Namespace) -> bool:
    drawn = args.pictures is None or picture_path(args, number, trial).exists()
    return drawn and ledger.get(number, trial) is not None
