"""Change the size of pictures, and cut and pad them, as tensors.

Tensors  image (B, C, H, W) float in any range (the pipelines use [-1, 1]); sizes are (H, W) in pixels
Copying  needs pixels/box.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .box import Box


def resize(image: Tensor, size: tuple[int, int], mode: str = "bilinear") -> Tensor:
    """`image` (B, C, H, W) at `size` (H, W): antialiased "bilinear" (the paper's choice) or "bicubic".

    Bilinear stays inside the range of the input; bicubic may overshoot it by a few per cent. The same size is
    returned as it is.
    """
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    if min(size) < 1:
        raise ValueError(
            f"a picture cannot be resized to {size[0]} x {size[1]} pixels; both sides must be at least 1"
        )
    # PyTorch has no antialiased kernel for half precision on the CPU, so half tensors pass through float32.
    full = image.float() if image.dtype in (torch.float16, torch.bfloat16) else image
    return F.interpolate(full, size=size, mode=mode, align_corners=False, antialias=True).to(image.dtype)


def enlarge(image: Tensor, size: tuple[int, int]) -> Tensor:
    """A degraded picture (B, 3, h, w) in [0, 1] as PASD's ControlNet gets it: at `size`, bicubic, on 256
    levels.
    """
    return round_to_8_bits(resize(image, size, "bicubic"))


def round_to_8_bits(image: Tensor, least: float = 0.0) -> Tensor:
    """`image` in [least, 1], clamped, on 256 levels; `least` is 0, or -1 for the pipelines' pictures."""
    levels = 255 / (1 - least)
    return ((image - least) * levels).round().clamp(0, 255) / levels + least


def low_pass(image: Tensor, size: tuple[int, int]) -> Tensor:
    """`image` (B, C, H, W) resized down to `size` (H, W) and up again: LP of the paper's appendix A.2.

    With the stage's input size it has the sharpness of that stage's upscaled edit (Algorithm 1, line 20).
    """
    return resize(resize(image, size), (image.shape[-2], image.shape[-1]))


def sharpen(image: Tensor, kernel_size: int = 11, sigma: float = 7.0) -> Tensor:
    """Unsharp mask, 2 x - blur(x), of `image` (B, C, H, W) in [-1, 1], clamped to that range.

    The official code's "sharpen" upscaler is a bilinear resize followed by this; `sigma` is in pixels.
    """
    ramp = torch.arange(kernel_size, dtype=torch.float64) - kernel_size // 2
    line = torch.exp(-0.5 * (ramp / sigma) ** 2)
    line = (line / line.sum()).to(image)
    channels, half = image.shape[1], kernel_size // 2
    blurred = pad_reflect(image, half, half, half, half)
    blurred = F.conv2d(blurred, line.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
    blurred = F.conv2d(blurred, line.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)
    return (2 * image - blurred).clamp(-1, 1)


def reflected_indices(start: int, stop: int, length: int) -> Tensor:
    """Source index in [0, length) of each position start..stop-1, mirrored as often as it takes.

    The border sample is not repeated (2 1 0 1 2), as in torch's "reflect", but any distance is allowed, and
    a length of 1.
    """
    period = max(2 * (length - 1), 1)  # length 1: every position is that one sample
    position = torch.arange(start, stop).remainder(period)
    return torch.minimum(position, period - position) if length > 1 else torch.zeros_like(position)


def pad_reflect(image: Tensor, top: int, bottom: int, left: int, right: int) -> Tensor:
    """`image` (B, C, H, W) mirrored outwards by the given numbers of pixels, which may exceed its size."""
    height, width = image.shape[-2:]
    return take(image, Box(-top, -left, top + height + bottom, left + width + right))


def take(image: Tensor, box: Box) -> Tensor:
    """The part of `image` (B, C, H, W) under `box`.

    Where the box leaves the picture, the picture is mirrored (repeatedly).
    """
    height, width = image.shape[-2:]
    inside = box.top >= 0 and box.left >= 0 and box.bottom <= height and box.right <= width
    if inside:
        return image[..., *box.window]
    rows = reflected_indices(box.top, box.bottom, height).to(image.device)
    cols = reflected_indices(box.left, box.right, width).to(image.device)
    return image.index_select(-2, rows).index_select(-1, cols)


def put_back(image: Tensor, patch: Tensor, box: Box) -> Tensor:
    """A copy of `image` (B, C, H, W) with `patch` (B, C, box.height, box.width) laid over `box`.

    What lies outside is dropped.
    """
    height, width = image.shape[-2:]
    if tuple(patch.shape[-2:]) != (box.height, box.width):
        raise ValueError(
            f"a patch of {tuple(patch.shape[-2:])} pixels does not fit a box of {(box.height, box.width)}"
        )
    top, bottom = max(box.top, 0), min(box.bottom, height)
    left, right = max(box.left, 0), min(box.right, width)
    result = image.clone()
    if top < bottom and left < right:
        result[..., top:bottom, left:right] = patch[
            ..., top - box.top : bottom - box.top, left - box.left : right - box.left
        ]
    return result


def truncate_to_8_bits(image: Tensor) -> Tensor:
    """`image` in [-1, 1] through 8 bits without rounding, as between all official stages.

    Levels 1..63 lose one. Ours stays in float.
    """
    return ((image.clamp(-1, 1) + 1) / 2 * 255).to(torch.uint8).float() / 127.5 - 1
