"""RRDBNet, the generator of ESRGAN and Real-ESRGAN: enlarge a picture 4, 2 or 1 times.

Paper    Wang et al. 2018, arXiv:1809.00219, section 3.1 (ESRGAN)
         Wang et al. 2021, arXiv:2107.10833, section 3.3 (Real-ESRGAN)
Tensors  x (B, 3, H, W) in [0, 1] (not [-1, 1]) -> (B, 3, scale*H, scale*W), not clamped
Weights  basicsr names (in official files below `params_ema`)
Copying  this file stands alone: torch only
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_RESIDUAL_SCALE = 0.2  # beta of the ESRGAN paper, section 3.1 and figure 4
_UNSHUFFLE = {4: 1, 2: 2, 1: 4}  # scale -> side of the pixel blocks folded into channels (section 3.3)


@dataclass(frozen=True)
class RRDBConfig:
    """Sizes of an RRDBNet, named as in basicsr; the defaults are RealESRGAN_x4plus's."""

    num_in_ch: int = 3  # channels of the picture that goes in
    num_out_ch: int = 3  # channels of the picture that comes out
    scale: int = 4  # 4, 2 or 1: the output's side over the input's; 2 and 1 shrink the input first
    num_feat: int = 64  # width between blocks
    num_block: int = 23  # residual-in-residual dense blocks
    num_grow_ch: int = 32  # channels that each convolution of a dense block adds

    def __post_init__(self) -> None:
        if self.scale not in _UNSHUFFLE:
            raise ValueError(
                f"RRDBConfig.scale is {self.scale}: expected 4, 2 or 1; resize the result for other factors"
            )

    @property
    def context(self) -> int:
        """Pixels of the picture around a part of it that this part's result visibly depends on.

        16 for two blocks, 48 at most, at the size at which the blocks work; the net looks 15 pixels further
        with every block, but hardly. Measured with the official files: docs/restore.md, "Enlarging alone".
        """
        return min(max(16, 16 * (self.num_block // 2)), 48) * _UNSHUFFLE[self.scale]


class ResidualDenseBlock(nn.Module):
    """Five 3x3 convolutions, each seeing the block's input and every earlier output."""

    def __init__(self, num_feat: int, num_grow_ch: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(num_feat, num_grow_ch, 3, padding=1)
        self.conv2 = nn.Conv2d(num_feat + num_grow_ch, num_grow_ch, 3, padding=1)
        self.conv3 = nn.Conv2d(num_feat + 2 * num_grow_ch, num_grow_ch, 3, padding=1)
        self.conv4 = nn.Conv2d(num_feat + 3 * num_grow_ch, num_grow_ch, 3, padding=1)
        self.conv5 = nn.Conv2d(num_feat + 4 * num_grow_ch, num_feat, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, num_feat, h, w) -> (B, num_feat, h, w)."""
        dense = x
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            dense = torch.cat((dense, _leaky(conv(dense))), dim=1)  # num_grow_ch wider each time
        return torch.add(x, self.conv5(dense), alpha=_RESIDUAL_SCALE)


class RRDB(nn.Module):
    """Residual in residual: three dense blocks around one scaled shortcut."""

    def __init__(self, num_feat: int, num_grow_ch: int) -> None:
        super().__init__()
        self.rdb1 = ResidualDenseBlock(num_feat, num_grow_ch)
        self.rdb2 = ResidualDenseBlock(num_feat, num_grow_ch)
        self.rdb3 = ResidualDenseBlock(num_feat, num_grow_ch)

    def forward(self, x: Tensor) -> Tensor:
        """(B, num_feat, h, w) -> (B, num_feat, h, w)."""
        return torch.add(x, self.rdb3(self.rdb2(self.rdb1(x))), alpha=_RESIDUAL_SCALE)


class RRDBNet(nn.Module):
    """Deep features at the input's size (for scale 2 and 1: at a half and a quarter), then two doublings."""

    def __init__(self, config: RRDBConfig) -> None:
        super().__init__()
        self.config = config
        width = config.num_feat
        self.conv_first = nn.Conv2d(config.num_in_ch * _UNSHUFFLE[config.scale] ** 2, width, 3, padding=1)
        self.body = nn.Sequential(*(RRDB(width, config.num_grow_ch) for _ in range(config.num_block)))
        self.conv_body = nn.Conv2d(width, width, 3, padding=1)
        self.conv_up1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv_up2 = nn.Conv2d(width, width, 3, padding=1)
        self.conv_hr = nn.Conv2d(width, width, 3, padding=1)
        self.conv_last = nn.Conv2d(width, config.num_out_ch, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Enlarge `x` (B, num_in_ch, H, W) in [0, 1] to (B, num_out_ch, scale*H, scale*W), not clamped.

        ValueError unless H and W are multiples of 2 (scale 2) or 4 (scale 1); scale 4 takes any size.
        """
        block = _UNSHUFFLE[self.config.scale]
        if x.shape[-2] % block or x.shape[-1] % block:
            raise ValueError(
                f"RRDBNet of scale {self.config.scale}: the picture is {tuple(x.shape[-2:])} pixels, "
                f"expected multiples of {block}; pad it by reflection and crop the result"
            )
        features = self.conv_first(F.pixel_unshuffle(x, block))  # (B, num_feat, H/block, W/block)
        features = features + self.conv_body(self.body(features))
        features = _leaky(self.conv_up1(F.interpolate(features, scale_factor=2.0, mode="nearest")))
        features = _leaky(self.conv_up2(F.interpolate(features, scale_factor=2.0, mode="nearest")))
        return self.conv_last(_leaky(self.conv_hr(features)))


def _leaky(x: Tensor) -> Tensor:
    """Leaky ReLU of slope 0.2, in place; training is right too, as no convolution needs its own output."""
    return F.leaky_relu(x, 0.2, inplace=True)


REALESRGAN_X4PLUS = RRDBConfig(scale=4)
REALESRGAN_X2PLUS = RRDBConfig(scale=2)
REALESRGAN_X4PLUS_ANIME_6B = RRDBConfig(scale=4, num_block=6)
