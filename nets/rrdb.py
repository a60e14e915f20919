"""RRDBNet, the generator of ESRGAN, ESRGAN+ and Real-ESRGAN: enlarge a picture 1 to 16 times.

Papers   Wang et al. 2018, arXiv:1809.00219, section 3.1 (ESRGAN)
         Wang et al. 2021, arXiv:2107.10833, section 3.3 (Real-ESRGAN)
         Rakotonirina and Rasoanaivo 2020, arXiv:2001.08073, section 3.1 (ESRGAN+)
Tensors  x (B, 3, H, W) in [0, 1] (not [-1, 1]) -> (B, 3, scale*H, scale*W), not clamped
Weights  basicsr names (in official files below `params_ema`)
Copying  this file stands alone: torch only
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_RESIDUAL_SCALE = 0.2  # beta of the ESRGAN paper, section 3.1 and figure 4
_SCALES = (1, 2, 4, 8, 16)
# Scale -> side of the pixel blocks that Real-ESRGAN folds into channels (section 3.3).
_UNSHUFFLE = {2: 2, 1: 4}


@dataclass(frozen=True)
class RRDBConfig:
    """Sizes of an RRDBNet, named as in basicsr; the defaults are RealESRGAN_x4plus's."""

    num_in_ch: int = 3  # channels of the picture that goes in
    num_out_ch: int = 3  # channels of the picture that comes out
    scale: int = 4  # 1, 2, 4, 8 or 16: the output's side over the input's
    num_feat: int = 64  # width between blocks
    num_block: int = 23  # residual-in-residual dense blocks
    num_grow_ch: int = 32  # channels that each convolution of a dense block adds
    # Side of the pixel blocks folded into channels first, 1, 2 or 4; None: as Real-ESRGAN, 2 and 4 for scales
    # 2 and 1.
    unshuffle: int | None = None
    plus: bool = False  # ESRGAN+: further shortcuts within a dense block; its noise is training's alone

    def __post_init__(self) -> None:
        if self.scale not in _SCALES:
            raise ValueError(
                f"RRDBConfig.scale is {self.scale}: expected 1, 2, 4, 8 or 16; resize the result for other factors"
            )
        if self.unshuffle not in (None, 1, 2, 4):
            raise ValueError(f"RRDBConfig.unshuffle is {self.unshuffle}: expected 1, 2 or 4")

    @property
    def block(self) -> int:
        """Side of the pixel blocks folded into channels first; pictures are multiples of it."""
        return _UNSHUFFLE.get(self.scale, 1) if self.unshuffle is None else self.unshuffle

    @property
    def doublings(self) -> int:
        """How often the net doubles the size of its features."""
        return (self.scale * self.block).bit_length() - 1

    @property
    def context(self) -> int:
        """Pixels of the picture around a part of it that this part's result visibly depends on.

        16 for two blocks, 48 at most, at the size at which the blocks work; the net looks 15 pixels further
        with every block, but hardly. Measured with the official files: docs/restore.md, "Enlarging alone".
        """
        return min(max(16, 16 * (self.num_block // 2)), 48) * self.block


class ResidualDenseBlock(nn.Module):
    """Five 3x3 convolutions, each seeing the block's input and every earlier output.

    With `plus` the second one's output gets the block's input by a 1x1 convolution, and the fourth one's the
    second's (ESRGAN+, figure 2).
    """

    def __init__(self, num_feat: int, num_grow_ch: int, plus: bool = False) -> None:
        super().__init__()
        self.conv1x1 = nn.Conv2d(num_feat, num_grow_ch, 1, bias=False) if plus else None
        self.conv1 = nn.Conv2d(num_feat, num_grow_ch, 3, padding=1)
        self.conv2 = nn.Conv2d(num_feat + num_grow_ch, num_grow_ch, 3, padding=1)
        self.conv3 = nn.Conv2d(num_feat + 2 * num_grow_ch, num_grow_ch, 3, padding=1)
        self.conv4 = nn.Conv2d(num_feat + 3 * num_grow_ch, num_grow_ch, 3, padding=1)
        self.conv5 = nn.Conv2d(num_feat + 4 * num_grow_ch, num_feat, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, num_feat, h, w) -> (B, num_feat, h, w)."""
        dense, second = x, None
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            made = _leaky(conv(dense))
            if self.conv1x1 is not None and conv is self.conv2:
                made = second = made + self.conv1x1(x)
            elif second is not None and conv is self.conv4:
                made = made + second
            dense = torch.cat((dense, made), dim=1)  # num_grow_ch wider each time
        return torch.add(x, self.conv5(dense), alpha=_RESIDUAL_SCALE)


class RRDB(nn.Module):
    """Residual in residual: three dense blocks around one scaled shortcut."""

    def __init__(self, num_feat: int, num_grow_ch: int, plus: bool = False) -> None:
        super().__init__()
        self.rdb1 = ResidualDenseBlock(num_feat, num_grow_ch, plus)
        self.rdb2 = ResidualDenseBlock(num_feat, num_grow_ch, plus)
        self.rdb3 = ResidualDenseBlock(num_feat, num_grow_ch, plus)

    def forward(self, x: Tensor) -> Tensor:
        """(B, num_feat, h, w) -> (B, num_feat, h, w)."""
        return torch.add(x, self.rdb3(self.rdb2(self.rdb1(x))), alpha=_RESIDUAL_SCALE)


class RRDBNet(nn.Module):
    """Deep features at the input's size, where pixels are folded at a half or a quarter; then doublings."""

    def __init__(self, config: RRDBConfig) -> None:
        super().__init__()
        self.config = config
        width = config.num_feat
        self.conv_first = nn.Conv2d(config.num_in_ch * config.block**2, width, 3, padding=1)
        self.body = nn.Sequential(
            *(RRDB(width, config.num_grow_ch, config.plus) for _ in range(config.num_block))
        )
        self.conv_body = nn.Conv2d(width, width, 3, padding=1)
        for number in range(1, config.doublings + 1):
            self.add_module(f"conv_up{number}", nn.Conv2d(width, width, 3, padding=1))
        self.conv_hr = nn.Conv2d(width, width, 3, padding=1)
        self.conv_last = nn.Conv2d(width, config.num_out_ch, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Enlarge `x` (B, num_in_ch, H, W) in [0, 1] to (B, num_out_ch, scale*H, scale*W), not clamped.

        ValueError unless H and W are multiples of the pixel blocks that are folded, `config.block`.
        """
        block = self.config.block
        if x.shape[-2] % block or x.shape[-1] % block:
            raise ValueError(
                f"RRDBNet of scale {self.config.scale}: the picture is {tuple(x.shape[-2:])} pixels, "
                f"expected multiples of {block}; pad it by reflection and crop the result"
            )
        features = self.conv_first(F.pixel_unshuffle(x, block))  # (B, num_feat, H/block, W/block)
        features = features + self.conv_body(self.body(features))
        for number in range(1, self.config.doublings + 1):
            conv = self.get_submodule(f"conv_up{number}")
            features = _leaky(conv(F.interpolate(features, scale_factor=2.0, mode="nearest")))
        return self.conv_last(_leaky(self.conv_hr(features)))


def _leaky(x: Tensor) -> Tensor:
    """Leaky ReLU of slope 0.2, in place; training is right too, as no convolution needs its own output."""
    return F.leaky_relu(x, 0.2, inplace=True)


REALESRGAN_X4PLUS = RRDBConfig(scale=4)
REALESRGAN_X2PLUS = RRDBConfig(scale=2)
REALESRGAN_X4PLUS_ANIME_6B = RRDBConfig(scale=4, num_block=6)
