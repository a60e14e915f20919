"""`python -m tools.evaluate style`: degraded scenes restored with a base of another look.

PASD stays as it is; the U-Net below it is replaced, or changed by a LoRA (Yang et al. 2023, section 3.5). Two
things are asked of what it then makes: whether the picture is still the input's, and how far its look went to
the new one's.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from msbd.load import load_restore_pipeline
from msbd.pixels.metrics import to_luma
from msbd.restore.config import RestoreConfig
from msbd.restore.pipeline import RestorePipeline
from weights.locate import locate

from .._cli import choose_device
from .._report import mean, settings_of, table, write_json
from ..scenes.chalk import CREAM, RED, stylized
from ..scenes.data import to_8_bits
from .restore import (
    Method,
    Metric,
    Pair,
    Results,
    bicubic,
    make_pairs,
    restoring_method,
    run_method,
    write_rows,
)

METRICS = (
    Metric("edges", "", 3, True),  # edge_correlation with the input
    Metric("off the inks", "levels", 1, False),  # ink_distance
    Metric("share of the way", "", 2, True),  # style_share from the clean scene to the drawn one
)


# ---- measures ----------------------------------------------------------------------------------------------


def edge_correlation(image: Tensor, reference: Tensor) -> Tensor:
    """Whether edges are where they are in `reference`: (B,) in [-1, 1], of pictures (B, 3, H, W) in [-1, 1].

    Pearson's correlation over the pixels of `edge_strength`, so that neither contrast nor the sign of a step
    counts.
    """
    x, y = (edge_strength(picture).flatten(1) for picture in (image, reference))
    x, y = (z - z.mean(1, keepdim=True) for z in (x, y))
    return F.cosine_similarity(x, y)


def edge_strength(image: Tensor) -> Tensor:
    """The luma gradient's root mean square over windows of 6 x 6 pixels: (B, 1, H / 2, W / 2).

    Central differences of the means of 2 x 2 pixels, over 3 x 3 of these: a contour has a gradient on either
    side, where the edge that it was drawn for has one in the middle; a window holds both.
    """
    luma = F.pad(F.avg_pool2d(to_luma(image, full_range=True), 2), (1, 1, 1, 1), mode="replicate")
    across = luma[..., 1:-1, 2:] - luma[..., 1:-1, :-2]
    down = luma[..., 2:, 1:-1] - luma[..., :-2, 1:-1]
    energy = F.pad(across.square() + down.square(), (1, 1, 1, 1), mode="replicate")
    return F.avg_pool2d(energy, 3, stride=1).sqrt()


def ink_distance(image: Tensor) -> Tensor:
    """How far colours are from red chalk's, in 8-bit levels: (B,), of pictures (B, 3, H, W) in [-1, 1].

    The root mean square distance, in RGB, of the pixels to the line through the style's two inks: how light
    or dark a pixel is does not count.
    """
    red, cream = (127.5 * (2 * image.new_tensor(ink) - 1) for ink in (RED, CREAM))
    axis = F.normalize(cream - red, dim=0)
    away = 127.5 * image.movedim(1, -1) - red  # (B, H, W, 3)
    away = away - (away @ axis)[..., None] * axis
    return away.square().sum(-1).mean((1, 2)).sqrt()


def style_share(image: Tensor, clean: Tensor, styled: Tensor) -> Tensor:
    """Where on the way from `clean` (0) to `styled` (1) a picture is: (B,), for pictures (B, 3, H, W).

    The place of its projection on the line between the two, <image - clean, styled - clean> / |styled -
    clean|^2.
    """
    way, gone = (styled - clean).flatten(1), (image - clean).flatten(1)
    return (gone * way).sum(1) / way.square().sum(1)


def stylized_pictures(images: Tensor) -> Tensor:
    """The pictures (B, 3, H, W) in [-1, 1] in the style, drawn, not generated."""
    drawn = [torch.from_numpy(stylized((image / 2 + 0.5).movedim(0, -1).numpy())) for image in images]
    return torch.stack(drawn).movedim(-1, 1) * 2 - 1


# ---- methods -----------------------------------------------------------------------------------------------


def styled_pipeline(
    model: str, style: str | Path | None, weight: float = 1.0, **placement: Any
) -> RestorePipeline:
    """The pipeline of `model` on its own base (`style` None), on another that counts `weight`, or a LoRA.

    `placement` is the device and dtype of `load_restore_pipeline`. WeightsError.
    """
    change: dict[str, Any] = {}
    if style is not None:
        is_base = "unet" in locate(style).nets
        change = {"base": style, "base_weight": weight} if is_base else {"loras": [(style, weight)]}
    return load_restore_pipeline(model, mode="stylize", **change, **placement)


# ---- measuring ---------------------------------------------------------------------------------------------


@torch.no_grad()
def measure_styles(
    methods: Mapping[str, Method], pairs: Sequence[Pair], *, sheets: Path | None = None, quiet: bool = False
) -> Results:
    """What every method makes of `pairs`, by the three `METRICS`, and what there is to compare it with.

    Beside the methods: the scene drawn in the style, which is how much of the input's edges the style itself
    keeps, and another scene drawn so, which is how much of them two scenes have in common. `sheets` is a
    folder that exists, for pictures.
    """
    clean = torch.cat([pair.clean for pair in pairs])
    seen, styled = run_method("the input", bicubic, pairs, quiet=True), to_8_bits(stylized_pictures(clean))
    made = {name: run_method(name, method, pairs, quiet=quiet) for name, method in methods.items()}
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
    """Measure PASD with each of `args.style`, (name, base or LoRA, weight), beside its own base; the table.

    WeightsError, ValueError.
    """
    device, dtype = choose_device(args.device, args.dtype)
    styles = args.style or [("mini-style", "mini-style", 1.25)]
    scale, steps = args.conditioning_scale, args.steps
    config = RestoreConfig(mode="stylize", num_inference_steps=steps, conditioning_scale=scale)
    methods: dict[str, Method] = {}
    for name, path, weight in [("its own base", None, 1.0), *styles]:
        pipe = styled_pipeline(args.model, path, weight, device=device, dtype=dtype)
        methods[name] = restoring_method(pipe, config, captions=args.captions, seed=args.seed)
    pairs = make_pairs(args.scenes, start=args.start)
    results = measure_styles(methods, pairs, sheets=args.pictures, quiet=args.quiet)
    if args.json:
        figures = [
            mean(f"{name}, {m.name}", results[name][m.name], m.unit) for name in results for m in METRICS
        ]
        write_json(args.json, figures, settings=settings_of(args), results=results)
    return style_table(results)
