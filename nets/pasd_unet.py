"""PASD's U-Net: Stable Diffusion's, whose way up attends to a ControlNet's residuals (PACA).

Paper    Yang et al. 2023, arXiv:2308.14469, section 3.2
Tensors  as in unet.py, and a ControlNet's residuals, one (B, K, h, w) for each skip and one for the middle
         below: K channels of a skip, C of a level, N = h * w cells, pixels (B, N, K) a residual as tokens
Weights  diffusers names and the official code's for what it adds (unet/diffusion_pytorch_model.safetensors)
Copying  this file and unet.py

Eq. 2 of the paper is an attention and no more. The released models have more: "full" a transformer
(self-attention, Eq. 2, feed-forward) after each layer of the way up, "light" one attention more inside the
text transformers. Every variant also adds the residuals to the skips and the middle, as ControlNet (Eq. 1)
and the official code do; the paper does not say.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .unet import CrossAttention, Transformer, TransformerBlock, UNet, UNetConfig, UpBlock

_VARIANTS = ("full", "light", "eq2", "none")


@dataclass(frozen=True)
class PASDUNetConfig(UNetConfig):
    """Sizes of the U-Net, and its kind of pixel-aware cross attention; the defaults are those of `pasd`."""

    variant: str = "full"  # or "light", "eq2" (the paper's equation alone) or "none" (residuals only)
    zero_init: bool = False  # start PACA's outputs at zero, so that a new net is the U-Net with residuals

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in _VARIANTS:
            raise ValueError(f"PASDUNetConfig.variant is {self.variant!r}: expected one of {_VARIANTS}")


class PixelTransformer(Transformer):
    """PACA of "full": a transformer of the level's depth and heads, its context the residual."""

    def __init__(self, level: int, pixel_width: int, config: PASDUNetConfig) -> None:
        super().__init__(level, config, partial(TransformerBlock, context_width=pixel_width))
        if config.zero_init:
            _zero(self.proj_out)


class PixelAttention(nn.Module):
    """PACA of "eq2": Eq. 2 as it stands, for each of the level's heads, added to x."""

    def __init__(self, level: int, pixel_width: int, config: PASDUNetConfig) -> None:
        super().__init__()
        width = config.block_out_channels[level]
        self.heads = config.per_level(config.attention_head_dim)[level]
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(pixel_width, width, bias=False)
        self.to_v = nn.Linear(pixel_width, width, bias=False)
        if config.zero_init:
            _zero(self.to_v)

    def forward(self, x: Tensor, pixels: Tensor) -> Tensor:
        """x (B, C, h, w), pixels (B, N, K) -> (B, C, h, w)."""
        qkv = self.to_q(x.flatten(2).transpose(1, 2)), self.to_k(pixels), self.to_v(pixels)  # (B, N, C) each
        q, k, v = (a.unflatten(-1, (self.heads, -1)).transpose(1, 2) for a in qkv)  # (B, heads, N, C/heads)
        paca = F.scaled_dot_product_attention(q, k, v)  # Eq. 2, d = C/heads
        return x + paca.transpose(2, 3).flatten(1, 2).unflatten(2, x.shape[2:])


class LightBlock(TransformerBlock):
    """A transformer block of "light", with an attention to the residual after the one to the text."""

    def __init__(self, width: int, context_width: int, heads: int, pixel_width: int, zero_init: bool) -> None:
        super().__init__(width, context_width, heads)
        self.norm2_plus = nn.LayerNorm(width)
        self.attn2_plus = CrossAttention(width, pixel_width, heads)
        if zero_init:
            _zero(self.attn2_plus.to_out)

    def forward(self, x: Tensor, context: Tensor, pixels: Tensor | None = None) -> Tensor:
        """x (B, N, C), context (B, M, context_width), pixels (B, N, K) -> (B, N, C)."""
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        if pixels is not None:
            x = x + self.attn2_plus(self.norm2_plus(x), pixels)
        return x + self.ff(self.norm3(x))


class LightTransformer(Transformer):
    """A text transformer of "light", that looks at the residual too."""

    def __init__(self, level: int, pixel_width: int, config: PASDUNetConfig) -> None:
        widths = {"context_width": config.cross_attention_dim, "pixel_width": pixel_width}
        super().__init__(level, config, partial(LightBlock, **widths, zero_init=config.zero_init))
        self.proj_in_plus = self.projection(pixel_width)

    def forward(self, x: Tensor, context: Tensor, residual: Tensor | None = None) -> Tensor:
        """x (B, C, h, w), context (B, M, context_width), residual (B, K, h, w) -> (B, C, h, w)."""
        pixels = None if residual is None else self.to_tokens(self.proj_in_plus, residual)  # (B, N, K)
        tokens = self.to_tokens(self.proj_in, self.norm(x))  # (B, N, C)
        for block in self.transformer_blocks:
            tokens = block(tokens, context, pixels)
        return x + self.to_map(self.proj_out, tokens, x.shape[2:])


class PASDUpBlock(UpBlock):
    """One level up, whose layers attend to the residuals of their skips."""

    def __init__(self, level: int, in_channels: int, skips: Sequence[int], config: PASDUNetConfig) -> None:
        super().__init__(level, in_channels, skips, config)
        self.light = config.variant == "light"
        if self.light and self.attentions:
            self.attentions = nn.ModuleList(LightTransformer(level, width, config) for width in skips)
        paca = {"full": PixelTransformer, "eq2": PixelAttention}.get(config.variant)
        self.pixel_attentions = nn.ModuleList(paca(level, width, config) for width in skips if paca)

    def forward(
        self, x: Tensor, skips: list[Tensor], temb: Tensor, context: Tensor, residuals: list[Tensor] | None
    ) -> Tensor:
        """x (B, in_channels, h, w) -> (B, C, h', w'); takes skips and residuals off the lists' ends."""
        if residuals is None:
            return super().forward(x, skips, temb, context, residuals)
        for i, resnet in enumerate(self.resnets):
            residual = residuals.pop()  # (B, K, h, w)
            x = resnet(torch.cat((x, skips.pop() + residual), dim=1), temb)  # Eq. 1
            if self.attentions:
                attention = self.attentions[i]
                x = attention(x, context, residual) if self.light else attention(x, context)
            if self.pixel_attentions:
                pixels = residual.flatten(2).transpose(1, 2)  # (B, N, K)
                x = self.pixel_attentions[i](x, pixels)
        for upsample in self.upsamplers:
            x = upsample(x, skips[-1].shape[2:])
        return x


class PASDUNet(UNet):
    """The noise predictor, called as `UNet` with the output of a ControlNet as `control`.

    Without control there is nothing to attend to, and this is the plain U-Net. With control of scale 0 that
    holds for "eq2" and "none" only: the transformers of "full" and the biases of "light" still act.
    """

    up_block = PASDUpBlock

    def __init__(self, config: PASDUNetConfig) -> None:
        super().__init__(config)


def _zero(module: nn.Module) -> None:
    """Weights and biases 0; on the meta device, nothing."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)


PASD_UNET = PASDUNetConfig()
PASD_LIGHT_UNET = PASDUNetConfig(variant="light")
