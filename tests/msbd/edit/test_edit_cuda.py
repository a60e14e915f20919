"""A whole edit with the mini bundle on a GPU: everything lies on the right device, in every precision."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from msbd.edit.config import EditConfig
from msbd.load import load_edit_pipeline

CONFIG = EditConfig(num_steps=8, repaint_steps=1, first_stage_batch=2, decoderopt_steps=2)


def inputs() -> tuple[Tensor, Tensor]:
    """A picture of noise, and the mask of its middle."""
    image = torch.rand((1, 3, 320, 320), generator=torch.Generator().manual_seed(0)) - 0.5
    mask = torch.zeros(1, 1, 320, 320)
    mask[..., 60:260, 60:260] = 1
    return image, mask


@cache
def on_the_cpu() -> Any:
    """The edit in float32 on the CPU, which every precision is compared with."""
    return load_edit_pipeline("mini")(*inputs(), "a red ball", config=CONFIG)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype, tolerance", [("float32", 0.02), ("bfloat16", 0.1), ("float16", 0.05)])
def test_a_gpu_paints_what_the_cpu_does(dtype: str, tolerance: float) -> None:
    """The noise is drawn on the CPU, so the pictures differ by rounding alone,
    which a sampler amplifies; mean |difference|.
    """
    (image, mask), on_cpu = inputs(), on_the_cpu()
    pipeline = load_edit_pipeline("mini", device="cuda", dtype=getattr(torch, dtype))
    on_gpu = pipeline(image, mask, "a red ball", config=CONFIG)
    assert on_gpu.image.device.type == "cpu" and bool(on_gpu.image.isfinite().all())
    assert torch.equal(
        on_gpu.image[(mask == 0).expand(1, 3, -1, -1)], image[(mask == 0).expand(1, 3, -1, -1)]
    )
    assert on_cpu.scores is not None and on_gpu.scores is not None
    torch.testing.assert_close(on_gpu.scores.cpu(), on_cpu.scores, atol=1.0, rtol=0.1)
    assert (on_gpu.candidates.cpu() - on_cpu.candidates).abs().mean() < tolerance
