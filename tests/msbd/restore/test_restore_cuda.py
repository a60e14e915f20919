"""A whole restoration with the mini bundle on a GPU: everything lies on the right device, in every precision."""

import pytest
import torch

from msbd.load import load_restore_pipeline
from msbd.restore.config import RestoreConfig


@pytest.mark.cuda
@pytest.mark.parametrize("dtype, tolerance", [("float32", 0.01), ("bfloat16", 0.1), ("float16", 0.04)])
@pytest.mark.parametrize("mode", ["sr", "colorize"])
def test_a_gpu_restores_what_the_cpu_does(mode: str, dtype: str, tolerance: float) -> None:
    """The noise is drawn on the CPU, so the pictures differ by rounding alone, which a sampler amplifies; mean |difference|."""
    image = torch.rand((1, 3, 80, 100), generator=torch.Generator().manual_seed(0)) - 0.5
    config = RestoreConfig(mode=mode, num_inference_steps=6)  # type: ignore[arg-type]
    on_cpu = load_restore_pipeline("mini", mode=mode)(
        image, "a red ball", output_size=(320, 400), config=config
    )
    pipeline = load_restore_pipeline("mini", mode=mode, device="cuda", dtype=getattr(torch, dtype))
    on_gpu = pipeline(image, "a red ball", output_size=(320, 400), config=config)
    assert on_gpu.image.device.type == "cpu" and bool(on_gpu.image.isfinite().all())
    assert len(on_gpu.plan.tiles) > 1
    assert (on_gpu.image - on_cpu.image).abs().mean() < tolerance
