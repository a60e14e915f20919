"""The measurements behind `python -m tools.evaluate style`: degraded scenes restored with a base of another look.

PASD stays as it is; the U-Net below it is replaced, or changed by a LoRA (Yang et al. 2023, section 3.5). Of what it then makes
two things are asked: whether the picture is still that of the input, and how far its look went to the new one's.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from msbd.load import load_restore_pipeline
from msbd.pixels.metrics import to_luma
from msbd.restore.config import RestoreConfig
from msbd.restore.pipeline import RestorePipeline
from weights.locate import locate

from .._report import mean, table, write_json
from ..scenes.chalk import CREAM, RED, stylized
from ..scenes.data import to_8_bits
from .restore import SCALE, Method, Metric, Pair, Results, bicubic, make_pairs, write_rows

_BATCH = 16  # pictures that a method is given at a time
METRICS = (
    Metric("edges", "", 3, True),  # edge_correlation with the input
    Metric("off the inks", "levels", 1, False),  # ink_distance
    Metric("share of the way", "", 2, True),  # style_share from the clean scene to the drawn one
)


# ---- measures ----------------------------------------------------------------------------------------------


def edge_correlation(image: Tensor, reference: Tensor) -> Tensor:
    """Whether edges are where they are in `reference`: (B,) in [-1, 1], of pictures (B, 3, H, W) in [-1, 1].

    Pearson's correlation over the pixels of `edge_strength`, so that neither contrast nor the sign of a step counts.
    """
    x, y = (edge_strength(picture).flatten(1) for picture in (image, reference))
    x, y = (z - z.mean(1, keepdim=True) for z in (x, y))
    return F.cosine_similarity(x, y)


def edge_strength(image: Tensor) -> Tensor:
    """The luma gradient's root mean square over windows of 6 x 6 pixels: (B, 1, H / 2, W / 2).

    Central differences of the means of 2 x 2 pixels, over 3 x 3 of these: a contour has a gradient on either side, where the
    edge that it was drawn for has one in the middle; a window holds both.
    """
    luma = F.pad(F.avg_pool2d(to_luma(image, full_range=True), 2), (1, 1, 1, 1), mode="replicate")
    across = luma[..., 1:-1, 2:] - luma[..., 1:-1, :-2]
    down = luma[..., 2:, 1:-1] - luma[..., :-2, 1:-1]
    energy = F.pad(across.square() + down.square(), (1, 1, 1, 1), mode="replicate")
    return F.avg_pool2d(energy, 3, stride=1).sqrt()


def ink_distance(image: Tensor) -> Tensor:
    """How far colours are from red chalk's, in 8-bit levels: (B,), of pictures (B, 3, H, W) in [-1, 1].

    The root mean square distance, in RGB, of the pixels to the line through the style's two inks: how light or dark a pixel is
    does not count.
    """
    red, cream = (127.5 * (2 * image.new_tensor(ink) - 1) for ink in (RED, CREAM))
    axis = F.normalize(cream - red, dim=0)
    away = 127.5 * image.movedim(1, -1) - red  # (B, H, W, 3)
    away = away - (away @ axis)[..., None] * axis
    return away.square().sum(-1).mean((1, 2)).sqrt()


def style_share(image: Tensor, clean: Tensor, styled: Tensor) -> Tensor:
    """Where on the way from `clean` to `styled` a picture is: (B,), 0 at the first, 1 at the second; all (B, 3, H, W).

    The place of its projection on the line between the two, <image - clean, styled - clean> / |styled - clean|^2.
    """
    way, gone = (styled - clean).flatten(1), (image - clean).flatten(1)
    return (gone * way).sum(1) / way.square().sum(1)


def stylized_pictures(images: Tensor) -> Tensor:
    """The pictures (B, 3, H, W) in [-1, 1] in the style, drawn, not generated."""
    drawn = [torch.from_numpy(stylized((image / 2 + 0.5).movedim(0, -1).numpy())) for image in images]
    return torch.stack(drawn).movedim(-1, 1) * 2 - 1


# ---- methods -----------------------------------------------------------------------------------------------


def styled_pipeline(model: str, style: str | Path | None, weight: float = 1.0) -> RestorePipeline:
    """The pipeline of `model` as it is (`style` None), on another base that counts `weight`, or with a LoRA of that weight."""
    if style is None:
        return load_restore_pipeline(model, mode="stylize")
    if "unet" in locate(style).nets:
        return load_restore_pipeline(model, mode="stylize", base=style, base_weight=weight)
    return load_restore_pipeline(model, mode="stylize", loras=[(style, weight)])


def styled_method(pipe: RestorePipeline, config: RestoreConfig, *, captions: bool = True) -> Method:
    """Pictures restored by `pipe`, one at a time, told what they show or not."""

    def method(low: Tensor, texts: list[str], first_seed: int) -> Tensor:
        size = (SCALE * low.shape[-2], SCALE * low.shape[-1])
        made = []
        for number, (picture, text) in enumerate(zip(low.split(1), texts, strict=True), first_seed):
            prompt, own = text if captions else "", replace(config, seed=number)
            made.append(pipe(picture * 2 - 1, prompt, output_size=size, config=own).image)
        return torch.cat(made)

    return method


# ---- measuring ---------------------------------------------------------------------------------------------


@torch.no_grad()
def measure_styles(
    methods: Mapping[str, Method], pairs: Sequence[Pair], *, sheets: Path | None = None, quiet: bool = False
) -> Results:
    """What every method makes of `pairs`, by the three `METRICS`, and what there is to compare it with.

    Beside the methods: the scene drawn in the style, which is how much of the input's edges the style itself keeps, and another
    scene drawn so, which is how much of them two scenes have in common. `sheets` is a folder that exists, for pictures.
    """
    clean = torch.cat([pair.clean for pair in pairs])
    seen, styled = _made("the input", bicubic, pairs, quiet=True), to_8_bits(stylized_pictures(clean))
    made = {name: _made(name, method, pairs, quiet=quiet) for name, method in methods.items()}
    if sheets:
        write_rows(sheets, pairs, made | {"drawn": styled})
    made = {"the input": seen, **made, "drawn": styled, "another drawn": styled.roll(1, 0)}
    return {
        name: {
            "edges": edge_correlation(images, seen).tolist(),
            "off the inks": ink_distance(images).tolist(),
            "share of the way": style_share(images, clean, styled).tolist(),
        }
        for name, images in made.items()
    }


def _made(name: str, method: Method, pairs: Sequence[Pair], *, quiet: bool) -> Tensor:
    """What `method` makes of all `pairs` (N, 3, S, S), on 256 levels."""
    made = []
    for first in tqdm(range(0, len(pairs), _BATCH), desc=name, disable=True if quiet else None, leave=False):
        group = pairs[first : first + _BATCH]
        low = torch.cat([pair.low for pair in group])
        made.append(to_8_bits(method(low, [pair.caption for pair in group], group[0].number)))
    return torch.cat(made)


def style_table(results: Results) -> str:
    """Means and 95 % intervals, a row a method."""
    lines = [["95 % intervals", "n", *(metric.title for metric in METRICS)]]
    for name, measured in results.items():
        cells = [mean(name, measured[metric.name], metric.unit) for metric in METRICS]
        texts = [
            f"{cell.value:.{metric.digits}f} ({cell.low:.{metric.digits}f} .. {cell.high:.{metric.digits}f})"
            for metric, cell in zip(METRICS, cells, strict=True)
        ]
        lines.append([name, str(cells[0].count), *texts])
    return table(lines)


def style(args: argparse.Namespace) -> str:
    """Measure PASD with each of `args.style`, (name, base or LoRA, weight), beside its own base; the table. WeightsError, ValueError."""
    for folder in filter(None, (args.pictures, args.json and args.json.parent)):
        folder.mkdir(parents=True, exist_ok=True)
    scale, steps = args.conditioning_scale, args.steps
    config = RestoreConfig(mode="stylize", num_inference_steps=steps, conditioning_scale=scale)
    methods = {
        name: styled_method(styled_pipeline(args.model, path, weight), config, captions=args.captions)
        for name, path, weight in [("its own base", None, 1.0), *args.style]
    }
    pairs = make_pairs(args.scenes, start=args.start)
    results = measure_styles(methods, pairs, sheets=args.pictures, quiet=args.quiet)
    if args.json:
        settings = {name: getattr(args, name) for name in ("model", "scenes", "start", "steps", "captions")}
        figures = [
            mean(f"{name}, {m.name}", results[name][m.name], m.unit) for name in results for m in METRICS
        ]
        write_json(args.json, figures, settings=settings | {"conditioning_scale": scale}, results=results)
    return style_table(results)
