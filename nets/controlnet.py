"""ControlNet with PASD's degradation removal: residuals for a U-Net, from a degraded picture.

Paper    Zhang et al. 2023, arXiv:2302.05543, section 3 (ControlNet)
         Yang et al. 2023, arXiv:2308.14469, section 3.1 and Eq. 1 (PASD)
Tensors  x (B, 4, h, w) latent, t (B,) timestep, context (B, 77, 768) text states, image (B, 3, 8h, 8w)
         in [0, 1] (not [-1, 1]) -> a residual for each skip of the U-Net and one for its middle
Weights  diffusers names (controlnet/diffusion_pytorch_model.safetensors)
Copying  this file, unet.py and rrdb.py
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from .rrdb import RRDB
from .unet import TextTime, Timestep, UNetConfig, UNetEncoder


@dataclass(frozen=True)
class ControlNetConfig(UNetConfig):
    """Sizes of a ControlNet: its U-Net's (the way up does not matter) and those of the picture's encoder."""

    conditioning_channels: int = 3  # of the picture
    conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256)  # widths at 1, 1/2, 1/4, 1/8
    use_rrdb: bool = False  # two RRDBs at the picture's full size: the `_rrdb` checkpoints
    to_rgb: bool = True  # heads that show the picture at 1/2, 1/4, 1/8: for training, absent in some files
    controlnet_conditioning_channel_order: str = "rgb"  # what its encoder was trained on: "rgb" or "bgr"

    def __post_init__(self) -> None:
        super().__post_init__()
        if (order := self.controlnet_conditioning_channel_order) not in ("rgb", "bgr"):
            raise ValueError(
                f"ControlNetConfig.controlnet_conditioning_channel_order is {order!r}: expected 'rgb' or 'bgr'"
            )


class ControlOutput(NamedTuple):
    """What a ControlNet gives for one call, residuals already scaled."""

    down: tuple[Tensor, ...]  # one for each skip, in the order of the way down; 12 for SD 1.x
    mid: Tensor  # for the middle
    # (B, 3, H/2, W/2), ... H/8, trained towards the clean picture in [-1, 1]
    to_rgbs: tuple[Tensor, ...] = ()


class DegradationRemoval(nn.Module):
    """Encoder from the degraded picture to the latent's grid, by halvings (section 3.1 of the PASD paper)."""

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__()
        widths = config.conditioning_embedding_out_channels
        self.bgr = config.controlnet_conditioning_channel_order == "bgr"
        self.conv_in = nn.Conv2d(config.conditioning_channels, widths[0], 3, padding=1)
        rrdbs = (RRDB(widths[0], num_grow_ch=widths[0]) for _ in range(2 if config.use_rrdb else 0))
        self.preprocesser = nn.Sequential(*rrdbs)  # sic, on disk
        self.blocks = nn.ModuleList()
        for width, coarser in pairwise(widths):
            self.blocks.append(nn.Conv2d(width, width, 3, padding=1))
            self.blocks.append(nn.Conv2d(width, coarser, 3, padding=1, stride=2))
        heads = widths[1:] if config.to_rgb else ()
        self.to_rgbs = nn.ModuleList(nn.Conv2d(width, 3, 3, padding=1) for width in heads)
        self.conv_out = _zero_conv(widths[-1], config.block_out_channels[0], 3)

    def forward(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(B, 3, H, W) -> hint (B, C, ceil(H/8), ceil(W/8)), and the features that the toRGB heads see."""
        x = self.preprocesser(F.silu(self.conv_in(image.flip(1) if self.bgr else image)))
        pyramid = []
        for i, conv in enumerate(self.blocks):
            x = F.silu(conv(x))
            if i % 2:  # it halved
                pyramid.append(x)
        return self.conv_out(x), pyramid


class ControlNet(UNetEncoder):
    """A copy of the U-Net's way down and middle that sees the picture too; new ones give zeros (Eq. 1)."""

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__(config)
        self.controlnet_cond_embedding = DegradationRemoval(config)
        widths = config.skip_channels()
        self.controlnet_down_blocks = nn.ModuleList(_zero_conv(width, width, 1) for width in widths)
        self.controlnet_mid_block = _zero_conv(widths[-1], widths[-1], 1)

    def embed(self, image: Tensor) -> Tensor:
        """The hint (B, C, ceil(H/8), ceil(W/8)) of `image` (B, 3, H, W) in [0, 1], the same at every step.

        A picture that is cut into tiles is embedded once and whole; each tile takes its window of the hint.
        """
        return self.controlnet_cond_embedding(image)[0]

    def forward(
        self,
        x: Tensor,
        t: Timestep,
        context: Tensor,
        image: Tensor | None = None,
        scale: float = 1.0,
        *,
        hint: Tensor | None = None,
        added: TextTime | None = None,
    ) -> ControlOutput:
        """Residuals times `scale`, for x (B, in_channels, h, w) and t, context, added as in `UNet.forward`.

        Takes `image` (B, 3, H, W) in [0, 1], 8 times x's size, or its `hint` from `embed`; with a hint, and
        in a net without heads, `to_rgbs` is empty. ValueError for both or neither, and for another size.
        """
        if (image is None) == (hint is None):
            found = "neither" if image is None else "both"
            raise ValueError(f"ControlNet got {found} of `image` and `hint`: expected one of them")
        to_rgbs = ()
        if image is not None:
            hint, pyramid = self.controlnet_cond_embedding(image)
            heads = self.controlnet_cond_embedding.to_rgbs
            to_rgbs = tuple(head(features) for head, features in zip(heads, pyramid, strict=False))
        assert hint is not None
        if hint.shape[2:] != x.shape[2:]:
            found, expected = tuple(hint.shape[2:]), tuple(x.shape[2:])
            raise ValueError(
                f"ControlNet: the picture's hint is {found}, the latent is {expected}: expected the same; "
                "give the picture that the latent stands for, or the hint's window of the tile"
            )
        temb = self.embed_time(x, t, added)
        skips, mid = self.encode(self.conv_in(x) + hint, temb, context)
        convs = zip(self.controlnet_down_blocks, skips, strict=True)
        return ControlOutput(
            tuple(conv(skip) * scale for conv, skip in convs), self.controlnet_mid_block(mid) * scale, to_rgbs
        )


def start_from_unet(controlnet: Mapping[str, Tensor], unet: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a ControlNet whose way down and middle are copies of a U-Net's, as training begins.

    What only the ControlNet has (the picture's encoder, zero convolutions) is kept; what only the U-Net has
    (the way up) is left out. ValueError where a tensor is missing or has another shape.
    """
    state = dict(controlnet)
    for key, tensor in controlnet.items():
        if key.startswith("controlnet_"):
            continue
        found = tuple(unet[key].shape) if key in unet else "missing"
        if found != tuple(tensor.shape):
            raise ValueError(
                f"start_from_unet: {key} is {found} in the U-Net, expected {tuple(tensor.shape)}"
            )
        state[key] = unet[key].clone()
    return state


def _zero_conv(in_channels: int, out_channels: int, side: int) -> nn.Conv2d:
    """A convolution that starts as zero, so that training begins at the U-Net itself (Z in Eq. 1)."""
    conv = nn.Conv2d(in_channels, out_channels, side, padding=side // 2)
    for parameter in conv.parameters():
        nn.init.zeros_(parameter)
    return conv


PASD_CONTROLNET = ControlNetConfig()
PASD_RRDB_CONTROLNET = ControlNetConfig(use_rrdb=True)
