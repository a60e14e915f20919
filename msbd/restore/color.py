"""Give a restored picture the colours of another: those it was made from, or new ones on its own luma.

Paper    Wang et al. 2024 (StableSR), arXiv:2305.07015, section 3.4 and appendix: the wavelet correction and
         AdaIN; Huang & Belongie 2017, arXiv:1703.06868, Eq. 8 (AdaIN). PASD's code applies the first one to
         every result
Tensors  images (B, C, H, W) in [-1, 1]; what is returned may leave that range a little
Copying  needs pixels/luma.py; torch
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..pixels.luma import luma


def wavelet_color_fix(image: Tensor, reference: Tensor, levels: int = 5) -> Tensor:
    """The fine structure of `image` on the coarse one of `reference`: its colours and lights. Shapes (B, C,
    H, W).

    ValueError unless both have one size.
    """
    if image.shape != reference.shape:
        raise ValueError(
            f"the picture is {tuple(image.shape)}, the one with its colours {tuple(reference.shape)}; resize one"
        )
    return image + low_frequencies(reference - image, levels)  # which is linear


def low_frequencies(image: Tensor, levels: int = 5) -> Tensor:
    """`image` (B, C, H, W) smoothed by (1 2 1)/4 with holes of 1, 2, 4, ... pixels: an à trous wavelet's
    residue.
    """
    row = image.new_tensor([0.25, 0.5, 0.25])
    kernel = torch.outer(row, row).expand(image.shape[1], 1, 3, 3)
    for level in range(levels):
        hole = 2**level
        padded = F.pad(image, (hole,) * 4, mode="replicate")
        image = F.conv2d(padded, kernel, groups=image.shape[1], dilation=hole)
    return image


def adain_color_fix(image: Tensor, reference: Tensor) -> Tensor:
    """`image` with the mean and the standard deviation of each channel of `reference`, which may have another
    size.
    """
    eps = 4e-5  # under the root: 1e-5 of the [0, 1] range, as in the official code

    def moments(x: Tensor) -> tuple[Tensor, Tensor]:
        samples = x.shape[2] * x.shape[3]
        variance, mean = torch.var_mean(x, dim=(2, 3), keepdim=True, correction=min(1, samples - 1))
        return mean, (variance + eps).sqrt()

    (mean, std), (wanted_mean, wanted_std) = moments(image), moments(reference)
    return (image - mean) / std * wanted_std + wanted_mean


# Name in RestoreConfig.color_fix -> (restored, the picture with its colours) -> the restored picture with
# them.
COLOR_FIXES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "wavelet": wavelet_color_fix,
    "adain": adain_color_fix,
    "none": lambda image, reference: image,
}


def to_gray(image: Tensor) -> Tensor:
    """`image` (B, 3, H, W) without its colours: its luma in all three channels."""
    return luma(image).expand_as(image)


def is_gray(image: Tensor) -> bool:
    """Whether no pixel of `image` (B, 3, H, W) in [-1, 1] has channels more than one 8-bit level apart."""
    return bool((image.amax(1) - image.amin(1)).max() <= 1.001 / 127.5)


def transfer_chroma(image: Tensor, gray_source: Tensor) -> Tensor:
    """The colours of `image` (B, 3, H, W) on the luma Y of `gray_source` (B, 1 or 3, H, W), both in [-1, 1].

    At each pixel Y + s (c - luma(c)), c being `image`'s colour, with the largest s in [0, 1] that keeps the
    three channels in [-1, 1]: a channel d of the difference is held by s d <= 1 - Y, or s |d| <= 1 + Y where
    d < 0. The difference has no luma, so the result has Y for any s; and s keeps the ratios of R - Y, G - Y
    and B - Y, so the hue too. Rounding to 8 bits moves each channel by half a level at most, and so the luma,
    their weighted mean. `gray_source` is clamped. ValueError unless of one size.
    """
    if image.shape[-2:] != gray_source.shape[-2:]:
        raise ValueError(
            f"the coloured picture is {tuple(image.shape)}, "
            f"the one with the luma {tuple(gray_source.shape)}; resize one"
        )
    y = (luma(gray_source) if gray_source.shape[1] == 3 else gray_source).clamp(-1, 1)
    chroma = image - luma(image)
    room = torch.where(chroma > 0, 1 - y, 1 + y)
    smallest = torch.finfo(chroma.dtype).tiny
    s = (room / chroma.abs().clamp_min(smallest)).amin(1, keepdim=True).clamp_max(1)
    return (y + s * chroma).clamp(-1, 1)  # rounding may leave it by an ulp
