"""What `python -m tools.evaluate jpeg` measures: the JPEG in tensor code beside Pillow's."""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from msbd.pixels.files import load_image
from msbd.pixels.metrics import psnr
from msbd.train.jpeg import pillow_jpeg, tensor_jpeg

from .._report import table


def compare_jpeg(args: argparse.Namespace) -> str:
    """PSNR between Pillow's result and both styles of ours, a row a picture and quality, and seconds. ValueError, OSError."""
    lines = [
        [
            "",
            "quality",
            "libjpeg, dB",
            "diffjpeg, dB",
            "picture, dB",
            "Pillow, s",
            "libjpeg, s",
            "diffjpeg, s",
        ]
    ]
    for path in args.input:
        image = load_image(path).image / 2 + 0.5
        for quality in args.qualities:
            reference, seconds = _timed(pillow_jpeg, image, quality)
            plain, plain_seconds = _timed(tensor_jpeg, image, quality)
            other, other_seconds = _timed(lambda x, q: tensor_jpeg(x, q, style="diffjpeg"), image, quality)
            errors = [psnr(x * 2 - 1, reference * 2 - 1).item() for x in (plain, other, image)]
            times = (seconds, plain_seconds, other_seconds)
            lines.append(
                [Path(path).name, str(quality), *(f"{e:.1f}" for e in errors), *(f"{s:.3f}" for s in times)]
            )
    return (
        table(lines)
        + "\nPSNR to what Pillow's encoder and decoder leave; `picture`: of the picture itself, not compressed"
    )


def _timed(jpeg: Callable[[Tensor, int], Tensor], image: Tensor, quality: int) -> tuple[Tensor, float]:
    started = time.perf_counter()
    result = jpeg(image, quality)
    return result.clamp(0, 1), time.perf_counter() - started
