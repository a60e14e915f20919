"""How large the result of a restoration is, what memory that takes, and its transparency."""

import argparse
import os
from typing import TYPE_CHECKING, Any

from .._cli import wide

if TYPE_CHECKING:
    from torch import Tensor

    from msbd.pixels.files import Photo

# Of a result, while it is made without nets; `photo_check photos` measures it (docs/restore.md).
BYTES_A_PIXEL = 64


def asked_size(args: argparse.Namespace, size: tuple[int, int]) -> tuple[int, int]:
    """(H, W) of the result for a picture of `size`."""
    from msbd.restore.plan import ENLARGED

    if args.size is not None:
        return args.size
    scale = ENLARGED[args.mode] if args.scale is None else args.scale
    height, width = (max(1, round(side * scale)) for side in size)
    return height, width


def memory_needed(size: tuple[int, int]) -> int:
    """Bytes that a result of `size` (H, W) takes, without what nets need."""
    return BYTES_A_PIXEL * size[0] * size[1]


def check_memory(size: tuple[int, int]) -> None:
    """ValueError where a result of `size` (H, W) is larger than this machine's memory, or $MSBD_MAX_PIXELS,
    allows.
    """
    from msbd.pixels import decoded

    pixels = size[0] * size[1]
    most = decoded.largest_picture()
    if not os.environ.get(decoded.MAX_PIXELS):
        most = most * decoded.BYTES_A_PIXEL // BYTES_A_PIXEL
    if pixels > most:
        raise ValueError(
            f"the result would have {wide(size)} pixels and take {memory_needed(size) / 1e9:,.0f} GB of memory, of which "
            f"this machine allows {most:,} pixels; take a smaller --scale or --size, or set {decoded.MAX_PIXELS}"
        )


def resampled_alpha(photo: "Photo", size: tuple[int, int]) -> Any:
    """The picture's transparency (H, W), of its own type, at `size`; None for one without."""
    import numpy as np

    if photo.alpha is None:
        return None
    full = np.iinfo(photo.alpha.dtype).max
    return (_opaque(photo, size) * full).round().numpy().astype(photo.alpha.dtype)[0, 0]


def premultiplied(image: "Tensor", photo: "Photo") -> "Tensor":
    """The photo's `image` times its opacity, (1, 3, H, W) in [-1, 1]: what may be interpolated."""
    return (image + 1) * _opaque(photo, photo.size) - 1


def straight(image: "Tensor", photo: "Photo") -> "Tensor":
    """An interpolated picture (1, 3, H', W') in [-1, 1] divided by the opacity of `photo`, interpolated
    likewise.
    """
    import torch

    opaque = _opaque(photo, (image.shape[-2], image.shape[-1]))
    return torch.where(opaque > 0, (image + 1) / opaque.clamp_min(1e-6) - 1, 0).clamp(-1, 1)


def _opaque(photo: "Photo", size: tuple[int, int]) -> "Tensor":
    """Opacity (1, 1, H, W) in [0, 1] at `size`, by the kernel that bicubic pictures have."""
    import numpy as np
    import torch

    from msbd.pixels.resize import resize

    assert photo.alpha is not None
    alpha = torch.from_numpy(photo.alpha.astype(np.float32) / np.iinfo(photo.alpha.dtype).max)
    return resize(alpha[None, None], size, "bicubic").clamp(0, 1)
