"""`python -m tools.evaluate seams`: the same sampled latents, made to meet their background in each way.

One edit a picture, by preset default; what its last stage sampled is decoded once by each of `--seams`. Told
are the error in the ring around the mask (the pixels at most 16 rows and columns from it, as decoded), the
step across the mask's edge after compositing (edit.background_record), how far the inside is from what the
plain decoder gives, CLIP's score of the result, and seconds.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from msbd.edit.config import EditConfig
from msbd.edit.decode import stage_picture
from msbd.edit.pipeline import EditPipeline
from msbd.edit.plan import Stage
from msbd.edit.rerank import clip_scores
from msbd.edit.stage import Edit
from msbd.load import load_edit_pipeline
from msbd.loading.seam import choose_seam_decoder
from msbd.pixels.files import load_image, load_mask, save_image
from msbd.pixels.masks import dilate, resize_mask
from msbd.pixels.metrics import edge_step, psnr
from weights.locate import locate

from .._cli import choose_device
from .._report import Figure, by_method, mean, settings_of, table, write_json
from .edit import RING, make_task

# Column -> of a record.
MEASURES = {
    "ring PSNR, dB": "psnr",
    "edge step, levels": "step",
    "change inside, levels": "change",
    "CLIP score": "clip",
    "seconds": "seconds",
}


def evaluate_seams(args: argparse.Namespace) -> str:
    """Edit every picture once and decode it in each way; the table. ValueError, OSError, WeightsError."""
    if (args.image is None) != (args.mask is None) or (args.image is None) != (args.prompt is None):
        raise ValueError("--image, --mask and --prompt go together; give all three, or none for scenes")
    device, dtype = choose_device(args.device, args.dtype)
    model = locate(args.model, companions=True)
    decoder = choose_seam_decoder(model) if "asymmetric" in args.seams else None
    pipe = load_edit_pipeline(model, device=device, dtype=dtype, seam_decoder=decoder)
    given = {} if args.steps is None else {"num_steps": args.steps}
    config = EditConfig.default(decoderopt_steps=args.decoderopt_steps, seed=args.seed, **given)
    rows: list[dict[str, dict[str, float]]] = []
    pictures = [None] if args.image else range(args.start, args.start + args.scenes)
    for number in tqdm(pictures, desc="seams", disable=True if args.quiet else None):
        image, mask, prompt = _task(args, number)
        found = compare_seams(pipe, image, mask, prompt, config, args.seams)
        rows.append({seam: values for seam, (values, _) in found.items()})
        if args.pictures:
            name = args.image.stem if number is None else f"{number:03d}"
            for seam, (_, picture) in found.items():
                save_image(picture, args.pictures / f"{name} {seam}.png")
    found_values = by_method(rows)
    figures: list[Figure] = []
    lines = [["mean (95 % interval)", *MEASURES]]
    for seam in args.seams:
        row = [
            mean(f"{seam}: {label}", found_values[seam].get(key, []), "") for label, key in MEASURES.items()
        ]
        lines.append([seam, *(figure.text for figure in row)])
        figures += row
    if args.json:
        write_json(args.json, figures, settings=settings_of(args), rows=rows)
    return table(lines)


def _task(args: argparse.Namespace, number: int | None) -> tuple[Tensor, Tensor, str]:
    """Picture, mask and prompt: the command line's, or those of a scene."""
    if number is None:
        photo = load_image(args.image)
        return photo.image, resize_mask(load_mask(args.mask), photo.size), args.prompt
    task = make_task(number, args.size)
    return task.image, task.mask, task.asked.caption


def compare_seams(
    pipe: EditPipeline, image: Tensor, mask: Tensor, prompt: str, config: EditConfig, seams: Sequence[str]
) -> dict[str, tuple[dict[str, float], Tensor]]:
    """Seam -> its measures and its picture of the last stage, the crop (1, 3, H, W) in [-1, 1]."""
    last: list[tuple[Edit, Stage, Tensor, Sequence[Tensor]]] = []

    def remember(edit: Edit, stage: Stage, x_in: Tensor, latents: Sequence[Tensor]) -> Tensor:
        last[:] = [(edit, stage, x_in, latents)]
        return stage_picture(edit, stage, x_in, latents)

    pipe.stage_picture = remember
    try:
        pipe(image, mask, prompt, config=config)
    finally:
        pipe.stage_picture = stage_picture
    edit, stage, x_in, latents = last[0]
    ring = dilate(stage.mask, RING) - stage.mask
    decoded: dict[str, Tensor] = {}
    seconds: dict[str, float] = {}
    for seam in dict.fromkeys(["none", *seams]):
        plan = replace(edit.plan, config=replace(edit.plan.config, seam=seam))
        started = time.perf_counter()
        with torch.no_grad():
            decoded[seam] = stage_picture(replace(edit, plan=plan), stage, x_in, latents)
        seconds[seam] = time.perf_counter() - started
    found = {}
    for seam in seams:
        picture = stage.mask * decoded[seam] + (1 - stage.mask) * x_in
        values: dict[str, Any] = {
            "step": (edge_step(picture, stage.mask) - edge_step(x_in, stage.mask)).item(),
            "change": _inside(decoded[seam] - decoded["none"], stage.mask),
            "seconds": seconds[seam],
        }
        if not torch.equal(decoded[seam] * ring, x_in * ring):  # the membrane's ring is the source itself
            values["psnr"] = psnr(decoded[seam], x_in, ring).item()
        if pipe.clip is not None:
            ids = pipe.clip_tokenizer([prompt]).to(picture.device)
            values["clip"] = clip_scores(pipe.clip, ids, picture, **pipe.clip_preprocessing).item()
        found[seam] = (values, picture)
    return found


def _inside(difference: Tensor, mask: Tensor) -> float:
    """The mean |difference| where `mask` is set, in 8-bit levels."""
    return (difference.abs() * mask).sum().item() / (mask.sum().item() * difference.shape[1]) * 127.5
