"""`python -m tools.evaluate fidelity | colorize`: scenes of known truth restored with several options."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor
from tqdm import tqdm

from msbd.load import load_restore_pipeline
from msbd.pixels.luma import luma
from msbd.pixels.metrics import colourfulness, hue_error, psnr, sharpness
from msbd.pixels.resize import resize
from msbd.restore.color import to_gray
from msbd.restore.config import RestoreConfig
from msbd.restore.pipeline import RestorePipeline

from .._cli import choose_device
from .._report import Figure, mean, new_figure, settings_of, table, write_json
from ..scenes.data import to_8_bits
from .restore import SCALE, SEEDS, Pair, make_pairs, write_rows

DIAL = (0.0, 0.25, 0.5, 0.75, 1.0)
Values = dict[str, list[float]]  # a measure's value for every scene


@dataclass(frozen=True)
class RestoreTrial:
    """One setting of the options; its config's seed is that of the command line."""

    config: RestoreConfig
    captions: bool = False  # tell the nets the scene's caption


def restored(pipe: RestorePipeline, pair: Pair, trial: RestoreTrial, image: Tensor) -> Tensor:
    """`image` (1, 3, h, w) in [-1, 1] of `pair` restored at the truth's size, on 256 levels."""
    size = (pair.clean.shape[-2], pair.clean.shape[-1])
    prompt = pair.caption if trial.captions else ""
    config = replace(trial.config, seed=(trial.config.seed or 0) * SEEDS + pair.number)
    return to_8_bits(pipe(image, prompt, output_size=size, config=config).image.cpu())


def run_trials(
    pipe: RestorePipeline, trials: Mapping[str, RestoreTrial], pairs: Sequence[Pair],
    see: Callable[[Pair], Tensor], measure: Callable[[Pair, Tensor], Mapping[str, float]], *, quiet: bool,
) -> tuple[dict[str, Values], dict[str, Tensor]]:  # fmt: skip
    """Every trial's measures and restored pictures (N, 3, S, S), made of what `see` makes of each pair."""
    results: dict[str, Values] = {}
    pictures: dict[str, Tensor] = {}
    for name, trial in trials.items():
        made, values = [], {}
        for pair in tqdm(pairs, desc=name, disable=True if quiet else None, leave=False):
            start = perf_counter()
            image = restored(pipe, pair, trial, see(pair))
            measured = {**measure(pair, image), "seconds": perf_counter() - start}
            for key, value in measured.items():
                values.setdefault(key, []).append(value)
            made.append(image)
        results[name], pictures[name] = values, torch.cat(made)
    return results, pictures


# ---- fidelity ----------------------------------------------------------------------------------------------


def fidelity(args: argparse.Namespace) -> str:
    """The dial over five settings, and the start level of the paper, honoured and misread."""
    device, dtype = choose_device(args.device, args.dtype)
    pipe = load_restore_pipeline(args.model, device=device, dtype=dtype)
    base = RestoreConfig(num_inference_steps=args.steps, seed=args.seed)
    trials = {f"fidelity {value:g}": RestoreTrial(replace(base, fidelity=value)) for value in DIAL}
    paper = replace(base, conditioning_scale=1.0)  # the paper's, whatever the model likes
    trials["n = 900"] = RestoreTrial(paper)
    trials["n = 900, misread"] = RestoreTrial(replace(paper, ans="fallback"))
    pairs = make_pairs(args.scenes, start=args.start)
    results, pictures = run_trials(
        pipe, trials, pairs, lambda pair: pair.low * 2 - 1, _against_truth_and_input, quiet=args.quiet
    )
    truth = sum(sharpness(pair.clean).item() for pair in pairs) / len(pairs)
    _write(args, results, pairs, pictures)
    if args.plot:
        draw_dial({value: results[f"fidelity {value:g}"] for value in DIAL}, truth, args.plot)
    head = ["", "alpha_a", "scale", "PSNR, dB", "sharpness", "downscaled against input, dB", "least", "s"]
    lines = [head]
    for name, values in results.items():
        alpha_a, scale = start_and_scale(pipe, trials[name].config)
        cells = [_mean(values["PSNR"], 2), _mean(values["sharpness"], 2), _mean(values["input"], 2)]
        seconds = _mean(values["seconds"], 2)
        lines.append([name, f"{alpha_a:.3f}", f"{scale:.2f}", *cells, f"{min(values['input']):.2f}", seconds])
    told = (
        f"{len(pairs)} scenes; sharpness: mean gradient of luma in levels a pixel, the truth's is {truth:.2f}"
    )
    return table(lines) + "\n" + told


def start_and_scale(pipe: RestorePipeline, config: RestoreConfig) -> tuple[float, float]:
    """(alpha_a, conditioning_scale) with which `pipe` restores a scene under `config`."""
    plan = pipe.plan((1, 1), (SCALE, SCALE), config)
    return plan.a_a, plan.config.conditioning_scale


def _against_truth_and_input(pair: Pair, image: Tensor) -> dict[str, float]:
    size = (pair.low.shape[-2], pair.low.shape[-1])
    small = to_8_bits(resize(image, size, "bicubic"))
    return {
        "PSNR": psnr(image, pair.clean).item(),
        "sharpness": sharpness(image).item(),
        "input": psnr(small, pair.low * 2 - 1).item(),
    }


def draw_dial(results: Mapping[float, Values], truth: float, path: Path) -> None:
    """PSNR and sharpness over the dial, as figure 3 of the paper has PSNR and QAlign.

    ValueError without matplotlib.
    """
    canvas = new_figure(5.2, 3.4)
    left = canvas.subplots()
    right = left.twinx()
    for axis, key, color, label in (
        (left, "PSNR", "C0", "PSNR against the truth, dB"),
        (right, "sharpness", "C1", "sharpness, levels a pixel"),
    ):
        figures = [mean(key, values[key], "") for values in results.values()]
        spread = [[f.value - f.low for f in figures], [f.high - f.value for f in figures]]
        axis.errorbar(list(results), [f.value for f in figures], spread, color=color, marker="o", capsize=3)
        axis.set_ylabel(label, color=color)
    right.axhline(truth, color="C1", linestyle=":", linewidth=1)
    left.set(xlabel="--fidelity", xticks=list(results))
    canvas.savefig(path, dpi=110)


# ---- colour ------------------------------------------------------------------------------------------------


def colorize(args: argparse.Namespace) -> str:
    """Grey scenes coloured, told what they show and not told."""
    device, dtype = choose_device(args.device, args.dtype)
    pipe = load_restore_pipeline(args.model, mode="colorize", device=device, dtype=dtype)
    trials = {}
    for guidance in args.guidance_scale:
        config = RestoreConfig(
            mode="colorize",
            num_inference_steps=args.steps,
            guidance_scale=guidance,
            negative_prompt=args.negative_prompt,
            seed=args.seed,
        )
        trials |= {
            f"{'caption' if told else 'no text'}, guidance {guidance:g}": RestoreTrial(config, told)
            for told in (True, False)
        }
    pairs = make_pairs(args.scenes, start=args.start)
    results, pictures = run_trials(pipe, trials, pairs, grey, _colours, quiet=args.quiet)
    _write(args, results, pairs, {"grey": torch.cat([grey(pair) for pair in pairs]), **pictures})
    lines = [
        ["", "luma off by, levels", "hue error, degrees", "colourfulness, % of the truth's", "PSNR, dB", "s"]
    ]
    for name, values in results.items():
        share = 100 * sum(values["colourfulness"]) / sum(values["truth"])
        hue = mean("hue", values["hue"], "")
        lines.append([
            name, f"{max(values['luma']):.2f}", f"{hue.value:.1f} ({hue.low:.1f} .. {hue.high:.1f})",
            f"{share:.0f}", _mean(values["PSNR"], 2), _mean(values["seconds"], 2),
        ])  # fmt: skip
    without = [psnr(grey(pair), pair.clean).item() for pair in pairs]
    lines.append(["grey", "0.00", "90.0 (by definition)", "0", _mean(without, 2), ""])
    return table(lines) + f"\n{len(pairs)} scenes; luma: the largest of all pixels of all scenes"


def grey(pair: Pair) -> Tensor:
    """The scene without colour, as a file has it."""
    return to_8_bits(to_gray(pair.clean))


def _colours(pair: Pair, image: Tensor) -> dict[str, float]:
    return {
        "luma": ((luma(image) - luma(grey(pair))).abs().max() * 127.5).item(),
        "hue": hue_error(image, pair.clean).item(),
        "colourfulness": colourfulness(image).item(),
        "truth": colourfulness(pair.clean).item(),
        "PSNR": psnr(image, pair.clean).item(),
    }


# ---- telling -----------------------------------------------------------------------------------------------


def _mean(values: Sequence[float], digits: int) -> str:
    return f"{sum(values) / len(values):.{digits}f}"


def _write(
    args: argparse.Namespace, results: Mapping[str, Values], pairs: Sequence[Pair],
    pictures: Mapping[str, Tensor],
) -> None:  # fmt: skip
    """Figures as JSON and pictures as sheets, where the options ask for them."""
    if args.pictures:
        write_rows(args.pictures, pairs, pictures, low=args.job != "colorize")
    if args.json:
        figures: list[Figure] = [
            mean(f"{name}, {key}", values, "")
            for name, rows in results.items()
            for key, values in rows.items()
        ]
        write_json(args.json, figures, settings=settings_of(args), results=results)
