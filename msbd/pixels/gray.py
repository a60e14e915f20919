"""Pictures that are grey but for the noise of a scan or of JPEG: what a net makes of them is to stay so.

Source   ours: nets trained on colours tint greys at fine edges
Tensors  images (B, 3, H, W) in [-1, 1]
Copying  needs pixels/luma.py, pixels/resize.py; torch
"""

from torch import Tensor

from .luma import luma
from .resize import resize

# A picture is taken for grey where this share of its pixels has channels at most so many 8-bit levels apart.
_SHARE, _LEVELS = 0.99, 8


def looks_gray(image: Tensor) -> bool:
    """Whether 99 of 100 pixels of `image` (B, 3, H, W) have channels at most 8 levels of 255 apart."""
    spread = (image.amax(1) - image.amin(1)) * 127.5
    return bool((spread <= _LEVELS + 0.01).float().mean() >= _SHARE)


def with_chroma_of(image: Tensor, made: Tensor) -> Tensor:
    """The luma of `made` (B, 3, H', W') with the chroma of `image`, enlarged; equal channels stay equal."""
    from_green = resize(image - image[:, 1:2], (made.shape[-2], made.shape[-1]))
    return luma(made) - luma(from_green) + from_green
