"""Where a pipeline's nets go, in which precision, and how their weights lie.

Copying  this file stands alone: torch only
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Move = Callable[[Any], Any]  # a net, to itself


class Placement(NamedTuple):
    """What moves each kind of net."""

    main: Move  # U-Net and ControlNet, in the dtype that was asked for
    vae: Move  # float32 where that is float16, whose range its activations exceed
    upscaler: Move  # in that dtype too; float32 for float16 on a CPU, which only holds it
    side: Move  # text encoder and CLIP: float32 on a CPU


def make_placement(device: str | torch.device, dtype: torch.dtype) -> Placement:
    """For nets on `device`, the main ones in `dtype`. ValueError for a dtype not in DTYPES."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype}; expected one of {', '.join(map(str, DTYPES))}")
    device = torch.device(device)
    side = torch.float32 if device.type == "cpu" else dtype
    # oneDNN's convolutions are faster channels last: 1.2 to 1.5 times, measured on the mini bundle
    # (docs/log.md).
    wide = device.type == "cpu" and dtype != torch.float16  # which is for GPUs: a CPU only holds it
    layout = torch.channels_last if wide else torch.preserve_format
    return Placement(
        main=lambda net: net.to(device, dtype, memory_format=layout),
        vae=lambda net: net.to(
            device, torch.float32 if dtype == torch.float16 else dtype, memory_format=layout
        ),
        upscaler=lambda net: net.to(device, side if dtype == torch.float16 else dtype, memory_format=layout),
        side=lambda net: net.to(device, side),
    )
