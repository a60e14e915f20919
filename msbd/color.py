"""Give a restored picture the colours of the picture that it was made from.

Paper    Wang et al. 2024 (StableSR), arXiv:2305.07015, section 3.4 and appendix: the wavelet correction and AdaIN;
         Huang & Belongie 2017, arXiv:1703.06868, Eq. 8 (AdaIN). PASD's code applies the first one to every result
Tensors  images (B, C, H, W) in [-1, 1]; what is returned may leave that range a little
Copying  this file stands alone: torch only
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def wavelet_color_fix(image: Tensor, reference: Tensor, levels: int = 5) -> Tensor:
    """The fine structure of `image` on the coarse one of `reference`, its colours and lights. ValueError unless of one size."""
    if image.shape != reference.shape:
        raise ValueError(
            f"the picture is {tuple(image.shape)}, the one with its colours {tuple(reference.shape)}; resize one"
        )
    return image + low_frequencies(reference - image, levels)  # which is linear


def low_frequencies(image: Tensor, levels: int = 5) -> Tensor:
    """`image` smoothed by the binomial filter (1 2 1)/4 with holes of 1, 2, 4, ... pixels: an à trous wavelet's residue."""
    row = image.new_tensor([0.25, 0.5, 0.25])
    kernel = torch.outer(row, row).expand(image.shape[1], 1, 3, 3)
    for level in range(levels):
        hole = 2**level
        padded = F.pad(image, (hole,) * 4, mode="replicate")
        image = F.conv2d(padded, kernel, groups=image.shape[1], dilation=hole)
    return image


def adain_color_fix(image: Tensor, reference: Tensor) -> Tensor:
    """`image` with the mean and the standard deviation of each channel of `reference`, which may have another size."""
    eps = 4e-5  # under the root: 1e-5 of the [0, 1] range, as in the official code

    def moments(x: Tensor) -> tuple[Tensor, Tensor]:
        samples = x.shape[2] * x.shape[3]
        variance, mean = torch.var_mean(x, dim=(2, 3), keepdim=True, correction=min(1, samples - 1))
        return mean, (variance + eps).sqrt()

    (mean, std), (wanted_mean, wanted_std) = moments(image), moments(reference)
    return (image - mean) / std * wanted_std + wanted_mean
