"""A whole restoration with the mini bundle on a GPU: everything lies on the right device,
in every precision.
"""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from msbd.load import load_restore_pipeline
from msbd.restore.config import Mode, RestoreConfig

SIZE = (320, 400)


def picture() -> Tensor:
    """Noise of a quarter of the result's size."""
    return torch.rand((1, 3, 80, 100), generator=torch.Generator().manual_seed(0)) - 0.5


@cache
def on_the_cpu(mode: Mode) -> Any:
    """The restoration in float32 on the CPU, which every precision is compared with."""
    config = RestoreConfig(mode=mode, num_inference_steps=6)
    return load_restore_pipeline("mini", mode=mode)(picture(), "a red ball", output_size=SIZE, config=config)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype, tolerance", [("float32", 0.01), ("bfloat16", 0.1), ("float16", 0.04)])
@pytest.mark.parametrize("mode", ["sr", "colorize"])
def test_a_gpu_restores_what_the_cpu_does(mode: Mode, dtype: str, tolerance: float) -> None:
    """The noise is drawn on the CPU, so the pictures differ by rounding alone,
    which a sampler amplifies; mean |difference|.
    """
    config = RestoreConfig(mode=mode, num_inference_steps=6)
    on_cpu = on_the_cpu(mode)
    pipeline = load_restore_pipeline("mini", mode=mode, device="cuda", dtype=getattr(torch, dtype))
    on_gpu = pipeline(picture(), "a red ball", output_size=SIZE, config=config)
    assert on_gpu.image.device.type == "cpu" and bool(on_gpu.image.isfinite().all())
    # Colorizing restores at the model's own size and enlarges the result: one tile.
    assert mode == "colorize" or len(on_gpu.plan.tiles) > 1
    assert (on_gpu.image - on_cpu.image).abs().mean() < tolerance
