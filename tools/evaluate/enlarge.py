"""`python -m tools.evaluate enlarge`: photographs of known truth, reduced to a quarter and enlarged again.

By interpolation, by the mini bundle's upscaler and PASD, and by official upscalers. With --seams: a strip of
each photograph enlarged in two pieces beside the same in one, by how much a piece sees around itself.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

from torch import Tensor
from tqdm import tqdm

from msbd.load import load_restore_pipeline
from msbd.pixels.files import load_image, save_image, to_pixels
from msbd.pixels.metrics import gmsd, psnr, sharpness, ssim
from msbd.pixels.resize import resize
from msbd.pixels.upscale import enlarge_by_net
from msbd.restore.config import RestoreConfig

from .._cli import choose_device
from .._report import by_method, mean, settings_of, table, write_json
from .._sheets import labelled_row
from ..scenes.data import to_8_bits
from .photos import find_pictures, middle

SCALE = 4
RIM = 4  # pixels at the border that do not count
PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")  # of scikit-image
MEASURES: dict[str, tuple[int, Callable[[Tensor, Tensor], Tensor]]] = {
    "PSNR-Y, dB": (2, lambda made, truth: psnr(made, truth, luma=True)),
    "SSIM-Y": (3, lambda made, truth: ssim(made, truth, luma=True)),
    "GMSD": (3, gmsd),
    "sharpness": (2, lambda made, truth: sharpness(made)),
}
Enlarge = Callable[[Tensor, tuple[int, int]], Tensor]  # (1, 3, h, w) in [-1, 1], (H, W) -> (1, 3, H, W)


def enlarge(args: argparse.Namespace) -> str:
    """Every picture by every method: the table. ValueError for files that are no pictures; WeightsError."""
    if args.seams:
        return seams(args)
    paths, methods = find_pictures(args.image or scikit_photographs()), dict(methods_of(args))
    truths = {path: whole_quarters(load_image(path).image) for path in paths}
    results: dict[str, dict[str, dict[str, float]]] = {}
    for path, truth in tqdm(truths.items(), "photographs", disable=True if args.quiet else None, leave=False):
        size = (truth.shape[-2], truth.shape[-1])
        low = to_8_bits(resize(truth, (size[0] // SCALE, size[1] // SCALE), "bicubic"))
        made, seconds = {"truth": truth}, {"truth": 0.0}
        for name, method in methods.items():
            start = perf_counter()
            made[name] = to_8_bits(method(low, size).cpu())
            seconds[name] = perf_counter() - start
        results[str(path)] = {
            name: measure(one, truth) | ({} if one is truth else {"s": seconds[name]})
            for name, one in made.items()
        }
        if args.pictures:
            write_pictures(args.pictures, path.stem, made)
    if args.json:
        figures = [
            mean(f"{name}, {key}", values, "") for name, row in by_method(results.values()).items() for key, values in row.items()
        ]  # fmt: skip
        write_json(args.json, figures, settings=settings_of(args), results=results)
    return enlarge_table(results)


def scikit_photographs() -> list[Path]:
    """The photographs that lie inside the scikit-image wheel. ValueError without it."""
    spec = find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            'scikit-image, whose photographs are taken without --image, is not installed: pip install -e ".[test]"'
        )
    return [Path(spec.submodule_search_locations[0], "data", name) for name in PHOTOGRAPHS]


def whole_quarters(image: Tensor) -> Tensor:
    """`image` (1, 3, H, W) less what is over a multiple of SCALE, at the right and below."""
    height, width = (side // SCALE * SCALE for side in image.shape[-2:])
    return image[..., :height, :width]


def methods_of(args: argparse.Namespace) -> Iterator[tuple[str, Enlarge]]:
    """What is compared, loaded."""
    device, dtype = choose_device(args.device, args.dtype)

    def method(model: str, config: RestoreConfig) -> Enlarge:
        pipe = load_restore_pipeline(model, method=config.method, device=device, dtype=dtype)
        return lambda low, size: pipe(low, output_size=size, config=config).image

    dial = RestoreConfig(fidelity=args.fidelity, num_inference_steps=args.steps, seed=args.seed)
    yield "bicubic", method(args.model, RestoreConfig(method="bicubic"))
    yield f"{args.model}, RRDB", method(args.model, RestoreConfig(method="rrdb"))
    yield f"{args.model}, PASD, fidelity {args.fidelity:g}", method(args.model, dial)
    for name in args.upscalers:
        yield Path(name).name, method(name, RestoreConfig(method="rrdb"))


def measure(made: Tensor, truth: Tensor) -> dict[str, float]:
    """MEASURES of two pictures (1, 3, H, W) in [-1, 1], their rim left out; no PSNR of the truth itself."""
    inside = slice(RIM, -RIM)
    made, truth = (one[..., inside, inside] for one in (made, truth))
    values = {key: of(made, truth).item() for key, (_, of) in MEASURES.items()}
    return {key: value for key, value in values.items() if value != float("inf")}


def enlarge_table(results: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """A line a method with the means, then one a picture and method."""
    digits = {key: count for key, (count, _) in MEASURES.items()} | {"s": 1}

    def cells(values: Mapping[str, float]) -> list[str]:
        return [f"{values[key]:.{count}f}" if key in values else "" for key, count in digits.items()]

    lines: list[Sequence[str]] = [["", "", *digits]]
    for name, measured in by_method(results.values()).items():
        lines.append(["mean", name, *cells({key: sum(v) / len(v) for key, v in measured.items()})])
    for path, row in results.items():
        lines += [[Path(path).name, name, *cells(values)] for name, values in row.items()]
    return table(lines)


def write_pictures(folder: Path, stem: str, made: Mapping[str, Tensor]) -> None:
    """Each result as a PNG, and all of them labelled side by side."""
    pixels = {name: to_pixels(one) for name, one in made.items()}
    for name, one in pixels.items():
        save_image(one, folder / f"{stem}, {name}.png")
    save_image(labelled_row(pixels), folder / f"{stem}.png")


# ---- seams -------------------------------------------------------------------------------------------------

STRIP, NEAR = (48, 160), 4  # (H, W) of a strip, cut in its middle; pixels beside the cut that count as near


def seams(args: argparse.Namespace) -> str:
    """The middle of every picture by every upscaler and context: the table. ValueError, WeightsError."""
    device, dtype = choose_device(args.device, args.dtype)
    paths = find_pictures(args.image or scikit_photographs())
    strips = [middle(load_image(path).image, STRIP).to(device) for path in paths]
    rows: list[dict[str, str | float]] = []
    for name in tqdm(args.upscalers, "upscalers", disable=True if args.quiet else None, leave=False):
        net = load_restore_pipeline(name, method="rrdb", device=device, dtype=dtype).upscaler
        found = []
        for path, strip in zip(paths, strips, strict=True):
            pictures = enlarged_strips(net, strip, args.seams)
            found.append([seam(one, pictures[0]) for one in pictures[1:]])
            if args.pictures:
                made = dict(
                    zip(["in one piece", *(f"{n} pixels" for n in args.seams)], pictures, strict=True)
                )
                write_pictures(args.pictures, f"{path.stem}, {Path(name).name}", made)
        for number, context in enumerate(args.seams):
            near, most, steps = zip(*(of_strip[number] for of_strip in found), strict=True)
            values = {"near": max(near), "most": max(most), "step": max(steps)}
            rows.append({"upscaler": Path(name).name, "context": context, **values})
    if args.json:
        write_json(args.json, [], settings=settings_of(args), results=rows)
    heads = ["", "context, px", "mean near the seam, levels", "largest", "step, of the whole's"]
    lines = [[str(v) if isinstance(v, str | int) else f"{v:.2f}" for v in row.values()] for row in rows]
    return table([heads, *lines])


def enlarged_strips(net: Any, strip: Tensor, contexts: Sequence[int]) -> list[Tensor]:
    """`strip` (1, 3, h, w) by `net` in one piece, and cut in its middle with each context: (1, 3, 4h, 4w)."""
    wide = strip.shape[-1]
    pieces = [(wide, None), *((wide // 2, context) for context in contexts)]
    size = (SCALE * strip.shape[-2], SCALE * wide)
    return [enlarge_by_net(strip, size, net, piece=piece, context=context) for piece, context in pieces]


def seam(made: Tensor, whole: Tensor) -> tuple[float, float, float]:
    """Of a strip enlarged in two pieces (1, 3, H, W) in [-1, 1], and in one: the mean |difference| within
    NEAR pixels (of what was enlarged) of the cut, the largest anywhere, both in 8-bit levels, and the step
    across the cut over that of the one piece.
    """
    cut = SCALE * (whole.shape[-1] // SCALE // 2)
    off = (made - whole).abs() * 127.5
    near = off[..., cut - SCALE * NEAR : cut + SCALE * NEAR].mean()
    step, usual = ((one[..., cut] - one[..., cut - 1]).abs().mean() for one in (made, whole))
    return near.item(), off.max().item(), (step / usual).item()
