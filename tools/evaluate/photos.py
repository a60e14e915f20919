"""`python -m tools.evaluate photos | tiles`: real pictures restored, of unknown truth, and what tiles do.

A tile's border is a line of the result, in its pixels, where a tile of the latent begins or ends inside it.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from msbd.load import load_restore_pipeline
from msbd.pixels.box import Box
from msbd.pixels.files import READ_SUFFIXES, load_image, save_image, to_pixels
from msbd.pixels.metrics import psnr, sharpness
from msbd.pixels.resize import resize, take
from msbd.restore.config import RestoreConfig
from msbd.restore.pipeline import RestorePipeline
from msbd.restore.plan import RestorePlan
from msbd.train.data import degrade_pair

from .._cli import choose_device, wide
from .._report import by_method, mean, settings_of, table, write_json
from .._sheets import GAP, WIDEST
from ..scenes.data import held_out_scenes, to_8_bits
from ..scenes.scenes import render

ROWS, HEIGHT = 6, 256  # pictures in a sheet; pixels of each, less where a row would be too wide
# What `restore_photo` measures: the column's head, its digits, and which of many values is the worst.
MEASURES = {
    "colour": ("colour off by, levels", 2, max),
    "input": ("downscaled against input, dB", 2, min),
    "sharpness": ("sharpness", 2, min),
    "seam": ("seam, levels", 2, max),
    "worst seam": ("worst", 2, max),
    "seconds": ("s", 1, max),
}
HEADS = {
    "tile": "tile, pixels",
    "PSNR": "against untiled, dB",
    "step": "step, levels",
    "untiled step": "untiled",
    "seconds": "s",
}


def border_lines(plan: RestorePlan) -> list[tuple[int, list[int], list[int]]]:
    """(-2, rows just after tiles' borders, rows after other cells') of the result; (-1, columns, columns).

    Where a picture was enlarged for restoring and shrunk back, a border is taken to the nearest pixel.
    """
    rows = {end for box in plan.tiles for end in (box.top, box.bottom)}
    columns = {end for box in plan.tiles for end in (box.left, box.right)}
    offsets, found = (plan.padded_box.top, plan.padded_box.left), []
    for axis, (dim, ends) in enumerate(((-2, rows), (-1, columns))):
        ratio, cells = plan.output_size[axis] / plan.working_size[axis], range(plan.cells[axis] + 1)
        places = {cell: round((cell * plan.downscale + offsets[axis]) * ratio) for cell in cells}
        inside = {cell: place for cell, place in places.items() if 0 < place < plan.output_size[axis]}
        borders = {place for cell, place in inside.items() if cell in ends}
        found.append((dim, sorted(borders), sorted(set(inside.values()) - borders)))
    return found


def border_steps(image: Tensor, plan: RestorePlan) -> Tensor:
    """The step at each tile's border in `plan`'s result `image` (1, 3, H, W) in [-1, 1]: (L,), 8-bit levels.

    The gradient of a line of pixels is the mean |difference| to the line before it, over its length and the
    channels. A border's step is the gradient there, less the mean gradient at the borders in the same
    direction of those cells where no tile ends: a decoder may leave a grid of cells everywhere. What the
    picture itself shows at the borders is in it too, so only the difference between two pictures of one scene
    says something. L is 0 for a single tile.
    """
    steps = []
    for dim, borders, others in border_lines(plan):
        gradient = image.double().diff(dim=dim).abs().movedim(dim, 0).flatten(1).mean(1) * 127.5
        elsewhere = gradient[[line - 1 for line in others]] if others else gradient
        steps.append(gradient[[line - 1 for line in borders]] - elsewhere.mean())
    return torch.cat(steps)


# ---- photos ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Restored:
    """What a method made of a picture; `values` are by the names of MEASURES."""

    method: str
    image: Tensor  # (1, 3, H, W) in [-1, 1] on 256 levels
    size: str  # the picture's -> the result's
    tiles: int  # 0 without diffusion
    values: dict[str, float]


def photos(args: argparse.Namespace) -> str:
    """Every picture by every method: the table. ValueError for files that are no pictures."""
    images = {path: load_image(path).image for path in find_pictures(args.image)}
    device, dtype = choose_device(args.device, args.dtype)
    pipe = load_restore_pipeline(args.model, device=device, dtype=dtype)
    methods = make_methods(pipe, args.fidelity, args.steps, args.seed)
    rows: list[tuple[Path, list[Restored]]] = []
    for path, image in tqdm(images.items(), "photos", disable=True if args.quiet else None, leave=False):
        rows.append((path, restore_photo(pipe, image, args.scale, methods)))
        if args.pictures:
            for one in rows[-1][1]:
                save_image(one.image, args.pictures / f"{len(rows):02} {path.stem}, {one.method}.png")
            start = (len(rows) - 1) // ROWS * ROWS
            save_image(make_sheet(rows[start:]), args.pictures / f"photos {start // ROWS + 1}.png")
    if args.json:
        means = by_method(values_of(row) for _, row in rows).items()
        figures = [mean(f"{name}, {k}", values, "") for name, row in means for k, values in row.items()]
        results = {str(path): values_of(row) for path, row in rows}
        write_json(args.json, figures, settings=settings_of(args), results=results)
    return photo_table(rows)


def find_pictures(paths: Sequence[Path]) -> list[Path]:
    """`paths`, of a folder the pictures in it. ValueError where there are none."""
    found = []
    for path in paths:
        inside = sorted(path.iterdir()) if path.is_dir() else []
        pictures = [file for file in inside if file.suffix.lower() in READ_SUFFIXES]
        if path.is_dir() and not pictures:
            raise ValueError(f"{path}: no pictures there ({', '.join(READ_SUFFIXES)})")
        found += pictures or [path]
    return found


def make_methods(
    pipe: RestorePipeline, fidelities: Sequence[float], steps: int, seed: int = 0
) -> dict[str, RestoreConfig]:
    """What is compared: interpolation, the model's upscaler if it has one, and settings of the dial."""
    methods = {"bicubic": RestoreConfig(method="bicubic")}
    if pipe.upscaler is not None:
        methods["RRDB"] = RestoreConfig(method="rrdb")
    dial = [RestoreConfig(fidelity=value, num_inference_steps=steps, seed=seed) for value in fidelities]
    return methods | {f"fidelity {config.fidelity:g}": config for config in dial}


def restore_photo(
    pipe: RestorePipeline, image: Tensor, scale: float, methods: Mapping[str, RestoreConfig]
) -> list[Restored]:
    """`image` (1, 3, h, w) in [-1, 1] `scale` times as large by each of `methods`, first interpolation.

    Measures, of results on 256 levels. The result resized to the input's size (antialiased bicubic) and
    rounded again gives "colour", the |difference| of its mean to the input's in the channel where that is
    largest, in 8-bit levels, and "input", its PSNR against the input in dB, at most 99. "sharpness" is
    metrics.py's. With several tiles there are "seam" and "worst seam", the mean and the largest of its
    `border_steps` less the interpolated picture's: below 0 where edges of the picture that lie at borders are
    softer than interpolation has them.
    """
    given = (image.shape[-2], image.shape[-1])
    asked = (max(1, round(given[0] * scale)), max(1, round(given[1] * scale)))
    made: list[Restored] = []
    for method, config in methods.items():
        start = perf_counter()
        result = pipe(image, output_size=asked, config=config)
        seconds, restored = perf_counter() - start, to_8_bits(result.image.cpu())
        small = to_8_bits(resize(restored, given, "bicubic"))
        values = {
            "colour": ((small - image).mean(dim=(0, 2, 3)).abs().max() * 127.5).item(),
            "input": min(psnr(small, image).item(), 99.0),
            "sharpness": sharpness(restored).item(),
            "seconds": seconds,
        }
        size = (restored.shape[-2], restored.shape[-1])
        tiles = len(result.plan.tiles) if result.plan.evaluations else 0
        if tiles > 1 and size == asked:
            steps = border_steps(restored, result.plan) - border_steps(made[0].image, result.plan)
            values |= {"seam": steps.mean().item(), "worst seam": steps.max().item()}
        told = f"{wide(given)} -> {wide(size)}" + ("" if size == asked else f", NOT {wide(asked)}")
        made.append(Restored(method, restored, told, tiles, values))
    return made


def values_of(row: Sequence[Restored]) -> dict[str, dict[str, float]]:
    """Method -> measure -> its value, of one picture."""
    return {one.method: one.values for one in row}


def photo_table(rows: Sequence[tuple[Path, list[Restored]]]) -> str:
    """A line a picture and method; below, each method's mean and worst value, of sharpness the least."""

    def cells(values: Mapping[str, float]) -> list[str]:
        return [f"{values[k]:.{digits}f}" if k in values else "" for k, (_, digits, _) in MEASURES.items()]

    lines = [["", "", "tiles", *(head for head, _, _ in MEASURES.values()), "size"]]
    for path, row in rows:
        for one in row:
            lines.append([path.name, one.method, str(one.tiles or ""), *cells(one.values), one.size])
    for name, measured in by_method(values_of(row) for _, row in rows).items():
        lines.append(["mean", name, "", *cells({k: sum(v) / len(v) for k, v in measured.items()}), ""])
        lines.append(["worst", name, "", *cells({k: MEASURES[k][2](v) for k, v in measured.items()}), ""])
    right = ["NOT" not in one.size for _, row in rows for one in row]
    told = f"{sum(right)} of {len(right)} results have the asked size"
    return f"{table(lines)}\n{told}; threads: {torch.get_num_threads()}"


def make_sheet(rows: Sequence[tuple[Path, list[Restored]]]) -> np.ndarray:
    """(H, WIDEST, 3) uint8. A row a picture: it, enlarged by repeating pixels | every method's result."""
    lines = []
    for path, row in rows:
        height, width = row[0].image.shape[-2:]
        room = WIDEST // (len(row) + 1) - GAP
        scale = min(HEIGHT / height, room / width)
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        panels = [Image.fromarray(to_pixels(one.image)).resize(size, Image.Resampling.LANCZOS) for one in row]
        photo = Image.fromarray(load_image(path).pixels)
        line = Image.new("RGB", (WIDEST, size[1] + GAP), "white")
        for number, panel in enumerate([photo.resize(size, Image.Resampling.NEAREST), *panels]):
            line.paste(panel, (number * (size[0] + GAP), 0))
        lines.append(np.array(line))
    return np.concatenate(lines)


# ---- tiles -------------------------------------------------------------------------------------------------


def tiles(args: argparse.Namespace) -> str:
    """In tiles and in one piece, from the same noise: the table. ValueError where one tile is enough."""
    device, dtype = choose_device(args.device, args.dtype)
    pipe = load_restore_pipeline(args.model, device=device, dtype=dtype)
    tile, overlaps = tiles_in_cells(args, pipe.vae.downscale)
    base = RestoreConfig(num_inference_steps=args.steps, latent_tiled_size=tile, seed=args.seed)
    tiled = [replace(base, latent_tiled_overlap=cells) for cells in overlaps or [None]]
    if any(len(pipe.plan((1, 1), args.size, config).tiles) == 1 for config in tiled):
        raise ValueError(f"--size {wide(args.size)}: a single tile; take a larger --size or smaller tiles")
    rows: list[dict[str, Any]] = []
    for name, low in make_cases(args.size, args.image):
        values = compare_tiles(pipe, low, args.size, tiled, name, args.pictures)
        rows += ({"case": name} | found for found in values)
    if args.json:
        write_json(args.json, [], settings=settings_of(args), results=rows)
    lines = [[HEADS.get(key, key) for key in rows[0]]]
    for row in rows:
        lines.append([f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()])
    return f"{table(lines)}\nthreads: {torch.get_num_threads()}"


def tiles_in_cells(args: argparse.Namespace, cell: int) -> tuple[int | None, list[int] | None]:
    """--tile and --tile-overlap in latent cells of `cell` pixels. ValueError unless these are whole cells."""
    for flag, value in (("--tile", args.tile), *(("--tile-overlap", one) for one in args.tile_overlap or ())):
        if value is not None and value % cell:
            raise ValueError(
                f"{flag} {value}: expected a multiple of {cell} pixels, the side of a latent cell"
            )
    tile = None if args.tile is None else args.tile // cell
    return tile, None if args.tile_overlap is None else [pixels // cell for pixels in args.tile_overlap]


def make_cases(size: tuple[int, int], photo: Path | None) -> Iterator[tuple[str, Tensor]]:
    """What to restore at `size` (H, W), by name: pictures (1, 3, H / 4, W / 4) in [-1, 1] on 256 levels.

    "scene", rendered at `size` and degraded as training data is; "flat", grey of level 128; "gradient", grey
    from 64 in the upper left corner to 191 in the lower right one, linear in both directions; and, in its own
    resolution, the middle of `photo` in the shape of `size`.
    """
    height, width = size
    clean = torch.from_numpy(render(held_out_scenes(1)[0], height, width).image).permute(2, 0, 1)[None]
    low = degrade_pair(to_8_bits(clean * 2 - 1) / 2 + 0.5, torch.Generator().manual_seed(0))[1]
    yield "scene", low * 2 - 1
    small = (height // 4, width // 4)
    yield "flat", torch.full((1, 3, *small), 128 / 127.5 - 1)
    rise = torch.linspace(0, 0.5, small[0])[:, None] + torch.linspace(0, 0.5, small[1])
    yield "gradient", ((64 + 127 * rise).round() / 127.5 - 1).expand(1, 3, *small)
    if photo:
        image = load_image(photo).image
        factor = min(image.shape[-2] / height, image.shape[-1] / width)
        h, w = max(1, round(height * factor)), max(1, round(width * factor))
        yield photo.stem, middle(image, (h, w))


def middle(image: Tensor, size: tuple[int, int]) -> Tensor:
    """The middle of `image` (1, 3, H, W), `size` large, or as large as it is."""
    high, wide = (min(one, other) for one, other in zip(size, image.shape[-2:], strict=True))
    return take(image, Box((image.shape[-2] - high) // 2, (image.shape[-1] - wide) // 2, high, wide))


def compare_tiles(
    pipe: RestorePipeline, low: Tensor, size: tuple[int, int], tiled: Sequence[RestoreConfig],
    name: str, folder: Path | None,
) -> Iterator[dict[str, float]]:  # fmt: skip
    """`low` restored at `size` with each of `tiled`: PSNR against untiled in dB, steps at tiles' borders.

    "step" is the mean of `border_steps`, "untiled step" that of the untiled result at the same lines; "seam"
    is the mean of the differences line by line, and "worst seam" the largest. They are in 8-bit levels, of
    results that were not rounded to any. `folder` takes the pictures, `name` among their names.
    """
    untiled = replace(tiled[0], latent_tiled_size=2**20, latent_tiled_overlap=0)
    whole = pipe(low, output_size=size, config=untiled).image.cpu()
    if folder:
        save_image(whole, folder / f"{name}, untiled.png")
    for config in tiled:
        start = perf_counter()
        result = pipe(low, output_size=size, config=config)
        seconds, image, plan = perf_counter() - start, result.image.cpu(), result.plan
        cells = plan.config.latent_tiled_size, plan.config.latent_tiled_overlap
        tile, overlap = (plan.downscale * side for side in cells)  # pixels
        if folder:
            save_image(image, folder / f"{name}, tiles of {tile}, overlap {overlap}.png")
        steps, reference = border_steps(image, plan), border_steps(whole, plan)
        yield {
            **{"tile": tile, "overlap": overlap, "tiles": len(plan.tiles), "PSNR": psnr(image, whole).item()},
            **{"step": steps.mean().item(), "untiled step": reference.mean().item()},
            **{"seam": (steps - reference).mean().item(), "worst seam": (steps - reference).max().item()},
            "seconds": seconds,
        }
