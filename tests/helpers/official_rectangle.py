"""The rectangle of MSBD's official code, which ours replaces by `crop_box`."""

import math

MULTIPLE = 64  # pixels; all official sizes are multiples of it


def rectangle_size(
    mask_size: tuple[int, int], picture_size: tuple[int, int], margin: float, native: int = 512
) -> tuple[int, int]:
    """The rectangle (H, W) that is edited around a mask of extents `mask_size`,
    at least `native` on each side.

    The extents there are last - first, one pixel short, of the mask before it is thresholded;
    `crops.mask_box` is exact.

    The caps are swapped: the height is capped by the picture's WIDTH and the width by its height, as PIL's
    size is (W, H), so a wide mask in a landscape picture is cut. Ours: `crops.crop_box`, which always covers
    the mask.
    """
    height, width = (math.ceil(side / MULTIPLE * margin) * MULTIPLE for side in mask_size)
    cap_height, cap_width = (side // MULTIPLE * MULTIPLE for side in (picture_size[1], picture_size[0]))
    return max(min(height, cap_height), native), max(min(width, cap_width), native)
