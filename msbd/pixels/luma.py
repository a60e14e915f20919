"""Luma: how light a picture is, without its colours.

Source   ITU-R BT.601; torchvision and Real-ESRGAN have four digits of its weights
Tensors  image (B, 3, H, W) in any range -> (B, 1, H, W), in its units and dtype
Copying  this file stands alone: torch only
"""

from torch import Tensor

BT601 = (0.299, 0.587, 0.114)  # weights of red, green and blue
BT601_FOUR_DIGITS = (0.2989, 0.587, 0.114)  # which sum to 0.9999


def luma(image: Tensor, weights: tuple[float, float, float] = BT601) -> Tensor:
    """0.299 R + 0.587 G + 0.114 B, (B, 1, H, W), of `image` (B, 3, H, W), in its units ("full range")."""
    red, green, blue = image.split(1, dim=1)
    return weights[0] * red + weights[1] * green + weights[2] * blue
