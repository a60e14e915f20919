"""Degraded scenes enlarged x4 by several methods, and the measures of `python -m tools.evaluate restore`.

Every method is given the same pictures, held out from training and degraded with fixed seeds, and their
captions. What it makes of them is rounded to 8 bits, as in a file, and compared with the clean picture.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from msbd.edit.pipeline import EditPipeline
from msbd.pixels.metrics import gmsd, psnr, ssim
from msbd.pixels.preprocess import clip_pixels
from msbd.pixels.resize import enlarge
from msbd.restore.config import RestoreConfig
from msbd.restore.pipeline import RestorePipeline
from msbd.train.data import degrade_pair
from msbd.train.degrade import PASD, Ranges
from msbd.train.validate import restore_pictures

from .._report import Figure, mean, table, write_sheet
from ..scenes.data import held_out_scenes, picture, to_8_bits

SCALE = 4
FEW = 8  # pairs; an interval of fewer says nothing
SEEDS = 100_000  # scenes that a --seed has seeds for
_BATCH = 16  # pictures that a method is given at a time
_ROWS = 8  # scenes in a sheet

Method = Callable[[Tensor, list[str], int], Tensor]
"""(low (B, 3, h, w) in [0, 1], their captions, first seed) -> (B, 3, 4h, 4w) in [-1, 1], on any device.

What is random in picture i of the batch comes from seed first + i, the scene's number, so that neither
batches nor the choice of scenes matter; another --seed adds multiples of SEEDS.
"""
Features = Callable[[Tensor], Tensor]  # pictures (B, 3, H, W) in [-1, 1] -> embeddings (B, D)
Results = dict[str, dict[str, list[float]]]  # method -> metric -> a value for every pair


@dataclass(frozen=True)
class Pair:
    """A scene and what is left of it; `number` is the scene's."""

    clean: Tensor  # (1, 3, S, S) in [-1, 1] on 256 levels
    low: Tensor  # (1, 3, S / 4, S / 4) in [0, 1] on 256 levels
    caption: str
    number: int


@dataclass(frozen=True)
class Metric:
    """How a measure is shown."""

    name: str
    unit: str
    digits: int
    larger_is_better: bool

    @property
    def title(self) -> str:
        """The head of its column, "PSNR, dB (up)": where better is."""
        unit = f", {self.unit}" if self.unit else ""
        return f"{self.name}{unit} ({'up' if self.larger_is_better else 'down'})"


METRICS = (
    Metric("PSNR", "dB", 2, True),
    Metric("SSIM", "", 4, True),
    Metric("GMSD", "", 4, False),
    Metric("feature distance", "", 4, False),
)


# ---- pictures and methods ----------------------------------------------------------------------------------


def make_pairs(count: int, size: int = 128, ranges: Ranges = PASD, start: int = 0) -> list[Pair]:
    """`count` held-out scenes from number `start` on, at `size`, number i degraded with seed i.

    Where `ranges` say so the clean picture is sharpened first. ValueError for no pairs, or a size that is no
    multiple of 4.
    """
    if count < 1 or size < 1 or size % SCALE:
        raise ValueError(
            f"{count} pairs of {size} pixels: there must be one at least, and its side a multiple of {SCALE}"
        )
    pairs = []
    for number, scene in enumerate(held_out_scenes(count, start=start), start):
        generator = torch.Generator().manual_seed(number)
        clean, low, _ = degrade_pair(picture(scene, size) / 2 + 0.5, generator, ranges=ranges, scale=SCALE)
        pairs.append(Pair(clean * 2 - 1, low, scene.caption, number))
    return pairs


def bicubic(low: Tensor, captions: list[str], first_seed: int) -> Tensor:
    """The method that knows nothing: interpolation with Pillow's kernel, which PASD is given to see too."""
    height, width = low.shape[-2:]
    return enlarge(low, (SCALE * height, SCALE * width)) * 2 - 1


def upscaler_method(pipe: EditPipeline) -> Method:
    """The pipeline's x4 upscaler alone."""
    upscaler = pipe.upscaler
    assert upscaler is not None, "the bundle has an upscaler"
    weight = next(upscaler.parameters())

    def restore(low: Tensor, captions: list[str], first_seed: int) -> Tensor:
        return upscaler(low.to(weight)).float() * 2 - 1

    return restore


def restoring_method(
    pipe: RestorePipeline, config: RestoreConfig, *, captions: bool = True, seed: int = 0
) -> Method:
    """Pictures restored by `pipe`, one at a time, told what they show or not."""

    def method(low: Tensor, texts: list[str], first_seed: int) -> Tensor:
        size = (SCALE * low.shape[-2], SCALE * low.shape[-1])
        told = texts if captions else [""] * len(texts)
        return restore_pictures(pipe, low, told, size, config, first_seed=seed * SEEDS + first_seed)

    return method


def clip_features(pipe: EditPipeline) -> Features:
    """The image embeddings of the pipeline's CLIP."""
    clip = pipe.clip
    assert clip is not None, "the bundle has a CLIP"

    def embed(images: Tensor) -> Tensor:
        pixels = clip_pixels(images, **pipe.clip_preprocessing).to(clip.logit_scale)
        return torch.cat([clip.encode_image(part).float().cpu() for part in pixels.split(_BATCH)])

    return embed


# ---- measuring ---------------------------------------------------------------------------------------------


@torch.no_grad()
def measure(
    methods: Mapping[str, Method],
    pairs: Sequence[Pair],
    features: Features,
    *,
    sheets: Path | None = None,
    quiet: bool = False,
) -> Results:
    """What every method makes of `pairs`, by the four `METRICS`.

    PSNR of RGB, SSIM of luma, GMSD, and 1 - the cosine between the `features` of the restored and the clean
    picture. `sheets` is a folder that exists, for pictures (`write_rows`).
    """
    clean = torch.cat([pair.clean for pair in pairs])
    restored = {name: run_method(name, method, pairs, quiet=quiet) for name, method in methods.items()}
    if sheets:
        write_rows(sheets, pairs, restored)
    embedded = features(clean).double()
    return {
        name: {
            "PSNR": psnr(images, clean).tolist(),
            "SSIM": ssim(images, clean, luma=True).tolist(),
            "GMSD": gmsd(images, clean).tolist(),
            "feature distance": (1 - F.cosine_similarity(features(images).double(), embedded)).tolist(),
        }
        for name, images in restored.items()
    }


@torch.no_grad()
def run_method(name: str, method: Method, pairs: Sequence[Pair], *, quiet: bool) -> Tensor:
    """What `method` makes of all `pairs`: (N, 3, S, S) in [-1, 1] on 256 levels."""
    made = []
    for first in tqdm(range(0, len(pairs), _BATCH), desc=name, disable=True if quiet else None, leave=False):
        batch = pairs[first : first + _BATCH]
        low = torch.cat([pair.low for pair in batch])
        made.append(to_8_bits(method(low, [pair.caption for pair in batch], batch[0].number).cpu()))
    return torch.cat(made)


def write_rows(
    folder: Path, pairs: Sequence[Pair], restored: Mapping[str, Tensor], *, low: bool = True
) -> None:
    """Sheets of eight scenes, a row each: degraded, pixels repeated (if `low`) | by every method | clean."""
    shown = []
    for number, pair in enumerate(pairs):
        row = [images[number] for images in restored.values()]
        if low:
            row.insert(0, F.interpolate(pair.low * 2 - 1, scale_factor=SCALE, mode="nearest")[0])
        shown.append([*row, pair.clean[0]])
    for first in range(0, len(shown), _ROWS):
        pictures = [image for row in shown[first : first + _ROWS] for image in row]
        write_sheet(folder / f"restored {first // _ROWS + 1}.png", pictures, len(shown[0]))


# ---- telling -----------------------------------------------------------------------------------------------


def paired(results: Results, baseline: str) -> Results:
    """Every other method's values less those of `baseline`, pair by pair; ValueError where it has none."""
    if baseline not in results:
        raise ValueError(f"no results of the baseline {baseline!r}; there are some of {', '.join(results)}")
    return {
        name: {
            metric: [a - b for a, b in zip(values, results[baseline][metric], strict=True)]
            for metric, values in measured.items()
        }
        for name, measured in results.items()
        if name != baseline
    }


def restore_figures(results: Results, baseline: str = "bicubic") -> list[Figure]:
    """What `restore_table` shows, for `write_json`: "a, GMSD" and, paired, "a less bicubic, GMSD"."""
    shown = results | {f"{name} less {baseline}": v for name, v in paired(results, baseline).items()}
    return [mean(f"{name}, {m.name}", shown[name][m.name], m.unit) for name in shown for m in METRICS]


def restore_table(results: Results, baseline: str = "bicubic") -> str:
    """Means and 95 % intervals, a row a method; below, of the others, `paired` differences to `baseline`.

    A star stands where the interval of a difference of `FEW` scenes or more leaves out zero.
    """
    differences = paired(results, baseline)
    text = _means("95 % intervals", results)
    if differences:
        text += "\n\n" + _means(f"less {baseline}, paired", differences, signed=True)
        text += f"\n* zero is not in the interval, of {FEW} scenes or more"
    return text + "\nPSNR of RGB, SSIM of luma; feature distance: 1 - the cosine of CLIP's embeddings"


def _means(head: str, results: Results, *, signed: bool = False) -> str:
    lines = [[head, "n", *(metric.title for metric in METRICS)]]
    for name, measured in results.items():
        figures = [(metric, mean(name, measured[metric.name], metric.unit)) for metric in METRICS]
        cells = [_text(metric, figure, signed=signed) for metric, figure in figures]
        lines.append([name, str(figures[0][1].count), *cells])
    return table(lines)


def _text(metric: Metric, figure: Figure, *, signed: bool) -> str:
    form = f"{'+' if signed else ''}.{metric.digits}f"
    text = f"{figure.value:{form}} ({figure.low:{form}} .. {figure.high:{form}})"
    if not signed:
        return text
    told = figure.count >= FEW and (figure.low > 0 or figure.high < 0)
    return text + (" *" if told else "  ")
