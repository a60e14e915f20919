"""A style, red chalk: a scene drawn in broad contours and flat washes from dark red to cream.

Restored with a base of that style, a picture must look as the mini bundle's own never would, and in a way
that the bundle's VAE can hold. So every colour goes to the line between the two inks, texture becomes washes
in five tones, and contours are drawn where colours change, as wide as they have to be for an f8 VAE at 128
pixels.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

from msbd.pixels.luma import BT601

from .shapes import Array, smoothstep

RED = np.array((0.42, 0.05, 0.04), np.float32)  # the contours' ink
CREAM = np.array((1.00, 0.92, 0.78), np.float32)  # the lightest wash
LUMA = np.array(BT601, np.float32)
TONES = 5  # how many tones the washes have
CONTOUR, WASH, NEIGHBOURHOOD = 0.016, 0.024, 0.05  # sigmas of the smoothing for each, as shares of the side


def stylized(picture: Array, side: float | None = None) -> Array:
    """`picture` (H, W, 3) in [0, 1] in red chalk, in its shape and range: the same drawing at any resolution.

    `side`, in pixels, is what the widths of contours and washes are shares of: the shorter side unless given.
    """
    side = float(min(picture.shape[:2]) if side is None else side)
    roots = np.sqrt(picture, dtype=np.float32)  # so that a step at night counts as much as one by day
    around = smooth(roots, NEIGHBOURHOOD * side).mean(-1)
    contour = smoothstep(0.10, 0.26, edge_height(roots, CONTOUR * side) / (0.35 + 0.65 * around))
    level = np.clip((smooth(roots, WASH * side) @ LUMA - 0.18) / 0.72, 0, 1) * (TONES - 1)
    wash = (np.floor(level) + smoothstep(0.35, 0.65, level % 1)) / (TONES - 1)
    return RED + ((0.15 + 0.85 * wash) * (1 - contour))[..., None] * (CREAM - RED)


def edge_height(x: Array, sigma: float) -> Array:
    """How high the step in `x` (H, W, C) is that a pixel lies on: (H, W), the channels' root mean square.

    From the gradient after smoothing by `sigma`: in the middle of a step of height h that is h / (sigma
    sqrt(2 pi)).
    """
    padded = np.pad(smooth(x, sigma), ((1, 1), (1, 1), (0, 0)), mode="edge")
    across = (padded[1:-1, 2:] - padded[1:-1, :-2]) / 2
    down = (padded[2:, 1:-1] - padded[:-2, 1:-1]) / 2
    return np.sqrt((down**2 + across**2).mean(-1)) * np.float32(sigma * math.sqrt(2 * math.pi))


def smooth(x: Array, sigma: float) -> Array:
    """Gaussian means of `x` (H, W, C), `sigma` in pixels; what is at the picture's edge goes on beyond it."""
    radius = math.ceil(3 * sigma)
    ramp = torch.arange(-radius, radius + 1, dtype=torch.float32)
    weights = torch.softmax(-(ramp**2) / (2 * sigma**2), dim=0)
    planes = F.pad(torch.from_numpy(x).permute(2, 0, 1)[:, None], (radius,) * 4, mode="replicate")
    planes = F.conv2d(F.conv2d(planes, weights.view(1, 1, 1, -1)), weights.view(1, 1, -1, 1))
    return planes[:, 0].permute(1, 2, 0).numpy()
