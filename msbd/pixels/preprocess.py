"""Pictures as CLIP, ImageNet's classifiers and BLIP want to see them.

Tensors  images (B, 3, H, W) in [-1, 1] -> (B, 3, S, S), normalised
Copying  needs pixels/resize.py
"""

from collections.abc import Sequence

from torch import Tensor

from .resize import resize

# Mean and deviation of the pictures that CLIP was trained on, RGB in [0, 1].
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def clip_pixels(
    images: Tensor, *, size: int = 224, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD
) -> Tensor:
    """CLIP's preprocessing of `images` (B, 3, H, W) in [-1, 1]: (B, 3, size, size), normalised.

    Bicubic, antialiased, to `size` on the shorter side; the centre square; (x - mean) / std. In float
    throughout, where the original resizes 8-bit pictures: within two levels of it but for a few pixels at
    hard edges. An odd remainder is cut as Hugging Face's processor does it; OpenAI's recipe may be one pixel
    to the right.
    """
    height, width = images.shape[-2:]
    short = min(height, width)
    shape = (size * height // short, size * width // short)
    zero_to_one = (resize(images.float(), shape, "bicubic") / 2 + 0.5).clamp(0, 1)
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    centre = zero_to_one[..., top : top + size, left : left + size]
    shift, spread = (centre.new_tensor(values).view(1, 3, 1, 1) for values in (mean, std))
    return (centre - shift) / spread


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # RGB in [0, 1]


def imagenet_pixels(image: Tensor, *, short: int = 232, size: int = 224) -> Tensor:
    """`image` (B, 3, H, W) in [-1, 1] as ResNet-50's V2 weights want it: (B, 3, size, size), normalised.

    The shorter side to `short`, bilinear and antialiased, then the centre square. What lies beyond four times
    the shorter side is cut off first: it is far outside that square, and would only fill the memory.
    """
    height, width = image.shape[-2:]
    longest = 4 * min(height, width)
    top, left = max(height - longest, 0) // 2, max(width - longest, 0) // 2
    image = image[..., top : top + longest, left : left + longest].float()
    height, width = image.shape[-2:]
    least = min(height, width)
    image = resize(image, (int(short * height / least), int(short * width / least)))
    top, left = (round((side - size) / 2) for side in image.shape[-2:])
    return _normalised(image[..., top : top + size, left : left + size], IMAGENET_MEAN, IMAGENET_STD)


def blip_pixels(image: Tensor, size: int = 384) -> Tensor:
    """`image` (B, 3, H, W) in [-1, 1] as BLIP wants it: all of it, squashed to (B, 3, size, size), bicubic,
    normalised.
    """
    return _normalised(resize(image.float(), (size, size), "bicubic"), CLIP_MEAN, CLIP_STD)


def zero_to_one(image: Tensor) -> Tensor:
    """`image` in [-1, 1] as float32 in [0, 1], clamped."""
    return (image.float() / 2 + 0.5).clamp(0, 1)


def _normalised(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    shift, spread = (image.new_tensor(values).view(1, 3, 1, 1) for values in (mean, std))
    return (zero_to_one(image) - shift) / spread
