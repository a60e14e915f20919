"""SRVGGNetCompact, the small net of Real-ESRGAN: enlarge a picture by a row of convolutions.

Paper    Wang et al. 2021, arXiv:2107.10833 (Real-ESRGAN), and its code's "tiny models" of 2021 and 2022:
         realesr-general-x4v3, realesr-animevideov3
Tensors  x (B, 3, H, W) in [0, 1] (not [-1, 1]) -> (B, 3, scale*H, scale*W), not clamped
Weights  basicsr names (in official files below `params`)
Copying  this file stands alone: torch only
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class SRVGGConfig:
    """Sizes of an SRVGGNetCompact, named as in basicsr; the defaults are realesr-general-x4v3's."""

    num_in_ch: int = 3  # channels of the picture that goes in
    num_out_ch: int = 3  # channels of the picture that comes out; more than one from as many in
    num_feat: int = 64  # width
    num_conv: int = 32  # convolutions between the first and the last
    upscale: int = 4  # the output's side over the input's, 1 or more

    def __post_init__(self) -> None:
        if min(self.num_in_ch, self.num_out_ch, self.num_feat, self.upscale) < 1 or self.num_conv < 0:
            raise ValueError(f"SRVGGConfig holds a size below 1: {self}")
        if self.num_in_ch not in (1, self.num_out_ch):
            raise ValueError(
                f"SRVGGConfig has {self.num_in_ch} channels in and {self.num_out_ch} out: the picture is added "
                "to the result, so both are one number, or the first is 1"
            )

    @property
    def scale(self) -> int:
        """`upscale`, as RRDBConfig calls it."""
        return self.upscale

    @property
    def context(self) -> int:
        """Pixels of the picture around a part of it that this part's result depends on: all that it sees."""
        return self.num_conv + 2


class SRVGGNet(nn.Module):
    """Convolutions with PReLU at the input's size, the last one's channels spread over pixels; the enlarged
    picture is added.
    """

    def __init__(self, config: SRVGGConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.num_in_ch, *[config.num_feat] * (config.num_conv + 1)]
        self.body = nn.ModuleList()
        for before, width in zip(widths, widths[1:], strict=False):
            self.body.append(nn.Conv2d(before, width, 3, padding=1))
            self.body.append(nn.PReLU(width))
        self.body.append(nn.Conv2d(widths[-1], config.num_out_ch * config.upscale**2, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """Enlarge `x` (B, num_in_ch, H, W) in [0, 1] to (B, num_out_ch, scale*H, scale*W), not clamped."""
        made = x
        for layer in self.body:
            made = layer(made)
        made = F.pixel_shuffle(made, self.config.upscale)
        return made + F.interpolate(x, scale_factor=float(self.config.upscale), mode="nearest")


REALESR_GENERAL_X4V3 = SRVGGConfig()
REALESR_ANIMEVIDEOV3 = SRVGGConfig(num_conv=16)
