"""Stable Diffusion 1.x U-Net: predict the noise in a latent, given a timestep and a text context.

Paper    Rombach et al. 2022, arXiv:2112.10752, section 3.3; Ho et al. 2020, arXiv:2006.11239, appendix B
Tensors  x (B, 4, h, w) latent, t (B,) timestep, context (B, 77, 768) text states -> eps (B, 4, h, w)
         below: C channels of a level, D = 4 * block_out_channels[0] of the time embedding, N = h * w cells
Weights  diffusers names (unet/diffusion_pytorch_model.safetensors)
Copying  this file stands alone: torch only

`UNetConfig` holds the SDXL shape too (`SDXL_UNET`, with its text_time embedding). That is for copiers: it is
built and tested here, but no loader of this project builds it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_TRANSFORMER_NORM_EPS = 1e-6  # of the GroupNorm that leads into a transformer, whatever norm_eps is
Timestep = Tensor | float  # of the training schedule, 0 to 999; (B,) or a scalar, any real number
# SDXL's: pooled text (B, 1280); original size, crop, target size (B, 6) in pixels.
TextTime = tuple[Tensor, Tensor]

# Kinds of blocks as config.json names them; "CrossAttn" in a name means attention.
_DOWN_KINDS = ("DownBlock2D", "CrossAttnDownBlock2D")
_MID_KINDS = ("UNetMidBlock2D", "UNetMidBlock2DCrossAttn")
_UP_KINDS = ("UpBlock2D", "CrossAttnUpBlock2D")

# Activations by the names that config.json has for them, in small letters.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu, "swish": F.silu, "gelu": F.gelu, "mish": F.mish, "relu": F.relu,
}  # fmt: skip


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of a U-Net, named as in config.json, levels fine to coarse; the defaults are SD 1.x's."""

    in_channels: int = 4  # of x: 4, or 9 for the inpainting models (latent, mask, masked latent)
    out_channels: int = 4  # of the prediction
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)  # one entry per level
    layers_per_block: int = 2  # residual blocks per level on the way down; one more on the way up
    cross_attention_dim: int = 768  # width of `context`; 768 is CLIP ViT-L/14's
    attention_head_dim: int | tuple[int, ...] = 8  # sic: the number of heads, for all levels or for each
    transformer_layers_per_block: int | tuple[int, ...] = 1  # depth of each transformer, likewise
    down_block_types: tuple[str, ...] = (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D")  # fine to coarse
    mid_block_type: str = "UNetMidBlock2DCrossAttn"  # or "UNetMidBlock2D": one residual block alone
    up_block_types: tuple[str, ...] = ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3)  # coarse to fine
    use_linear_projection: bool = False  # projections around a transformer stored as (C, C), not (C, C, 1, 1)
    norm_num_groups: int = 32  # of every GroupNorm
    norm_eps: float = 1e-5  # of the GroupNorms in residual blocks and before conv_out
    flip_sin_to_cos: bool = True  # timestep embedding: cosines first
    freq_shift: int = 0  # timestep embedding: subtracted from the number of frequencies
    act_fn: str = "silu"  # of the residual blocks, the time embedding and before conv_out; see ACTIVATIONS
    timestep_post_act: str | None = None  # activation after the time embedding's second layer
    time_embedding_act_fn: str | None = None  # activation of the sum of all embeddings, before act_fn
    center_input_sample: bool = False  # x becomes 2 x - 1 before conv_in; of a U-Net, not of a ControlNet
    mid_block_scale_factor: float = 1.0  # the outputs of the middle's residual blocks are divided by it
    # Of the convolutions that halve: 1, or 0 for a row and a column of zeros below and to the right only.
    downsample_padding: int = 1
    addition_embed_type: str | None = None  # "text_time": SDXL's pooled text and sizes, see `UNet.embed_time`
    addition_time_embed_dim: int = 256  # text_time: sinusoids per size
    projection_class_embeddings_input_dim: int = 2816  # text_time: 1280 of pooled text + 6 sizes * 256
    # Of a U-Net distilled with its guidance (full LCM models): sinusoids of the scale, see `UNet.forward`.
    time_cond_proj_dim: int | None = None

    def __post_init__(self) -> None:
        levels = len(self.block_out_channels)
        for name, kinds in (("down_block_types", _DOWN_KINDS), ("up_block_types", _UP_KINDS)):
            found = getattr(self, name)
            if len(found) != levels or not set(found) <= set(kinds):
                raise ValueError(f"UNetConfig.{name} is {found}: expected {levels} (per level) of {kinds}")
        acts = tuple(ACTIVATIONS)
        for name, known in (
            ("mid_block_type", _MID_KINDS), ("addition_embed_type", (None, "text_time")), ("downsample_padding", (0, 1)),
            ("act_fn", acts), ("timestep_post_act", (None, *acts)), ("time_embedding_act_fn", (None, *acts)),
        ):  # fmt: skip
            if getattr(self, name) not in known:
                raise ValueError(f"UNetConfig.{name} is {getattr(self, name)!r}: expected one of {known}")
        for name in ("attention_head_dim", "transformer_layers_per_block"):
            if len(self.per_level(found := getattr(self, name))) != levels:
                raise ValueError(
                    f"UNetConfig.{name} is {found}: expected one number, or {levels} (per level)"
                )
        if self.freq_shift >= self.block_out_channels[0] // 2:
            raise ValueError(
                f"UNetConfig.freq_shift is {self.freq_shift}: expected less than the number of frequencies, "
                f"{self.block_out_channels[0] // 2}"
            )
        all_heads = self.per_level(self.attention_head_dim)
        for level, (width, heads) in enumerate(zip(self.block_out_channels, all_heads, strict=True)):
            if width % self.norm_num_groups or (width % heads and self._attends(level)):
                raise ValueError(
                    f"UNetConfig.block_out_channels has {width}: expected a multiple of norm_num_groups "
                    f"({self.norm_num_groups}) and, where there is attention, of its level's heads ({heads}, "
                    "attention_head_dim)"
                )

    def _attends(self, level: int) -> bool:
        """Whether a level, counted from the finest, has attention on the way down, up or in the middle."""
        kinds = [self.down_block_types[level], self.up_block_types[-1 - level]]
        if level == len(self.block_out_channels) - 1:
            kinds.append(self.mid_block_type)
        return any("CrossAttn" in kind for kind in kinds)

    def per_level(self, value: int | tuple[int, ...]) -> tuple[int, ...]:
        """One number per level, of a field that may hold a single one for all."""
        return (value,) * len(self.block_out_channels) if isinstance(value, int) else tuple(value)

    def skip_channels(self) -> list[int]:
        """Channels of the skips, in the order in which the way down makes them."""
        widths, layers = self.block_out_channels, self.layers_per_block
        skips = [widths[0]] + [width for width in widths for _ in range(layers + 1)]
        return skips[:-1]  # the coarsest level has no halving


class Control(Protocol):
    """A ControlNet's residuals, already scaled: one for each skip, in their order, and the middle's."""

    @property
    def down(self) -> Sequence[Tensor]: ...
    @property
    def mid(self) -> Tensor: ...


def timestep_embedding(t: Tensor, dim: int, *, flip_sin_to_cos: bool = True, freq_shift: int = 0) -> Tensor:
    """Sinusoids (n, dim), float32, of any real `t` (n,); `dim` even (Vaswani et al. 2017, section 3.5)."""
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t.device) / (half - freq_shift)
    angles = t.float()[:, None] * torch.exp(-math.log(10000.0) * exponents)  # (n, dim/2)
    waves = (angles.cos(), angles.sin()) if flip_sin_to_cos else (angles.sin(), angles.cos())
    return torch.cat(waves, dim=-1)


def guidance_embedding(scale: Tensor, dim: int) -> Tensor:
    """Sinusoids (n, dim), float32, of guidance scales (n,), 1 being none; sines first.

    Of 1000 w, w = scale - 1, as in Luo et al. 2023 (arXiv:2310.04378, section 4.2) and its code.
    """
    return timestep_embedding(1000 * (scale - 1), dim, flip_sin_to_cos=False, freq_shift=1)


class TimestepEmbedding(nn.Module):
    """Two linear layers from sinusoids to the time embedding."""

    def __init__(
        self, in_features: int, features: int, act_fn: str = "silu", post_act: str | None = None
    ) -> None:
        """`act_fn` between the layers, `post_act` behind them, both of ACTIVATIONS."""
        super().__init__()
        self.act, self.post_act = ACTIVATIONS[act_fn], ACTIVATIONS[post_act] if post_act else None
        self.linear_1 = nn.Linear(in_features, features)
        self.linear_2 = nn.Linear(features, features)
        self.cond_proj: nn.Linear | None = None  # of a U-Net distilled with its guidance

    def forward(self, waves: Tensor) -> Tensor:
        """(B, in_features) -> (B, features)."""
        embedding = self.linear_2(self.act(self.linear_1(waves)))
        return self.post_act(embedding) if self.post_act else embedding


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut, the time embedding added between them."""

    def __init__(self, in_channels: int, out_channels: int, config: UNetConfig) -> None:
        super().__init__()
        groups, eps = config.norm_num_groups, config.norm_eps
        self.act = ACTIVATIONS[config.act_fn]
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(4 * config.block_out_channels[0], out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.conv_shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        """x (B, in_channels, h, w), temb (B, D) after its activation -> (B, out_channels, h, w)."""
        h = self.conv1(self.act(self.norm1(x))) + self.time_emb_proj(temb)[:, :, None, None]
        h = self.conv2(self.act(self.norm2(h)))
        return self.conv_shortcut(x) + h


class CrossAttention(nn.Module):
    """Attention from image tokens to `context`; self-attention when context is None."""

    def __init__(self, width: int, context_width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width, width, bias=False)
        self.to_v = nn.Linear(context_width, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])  # a list on disk; index 1 was dropout

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x (B, N, C), context (B, M, context_width) -> (B, N, C)."""
        context = x if context is None else context
        qkv = self.to_q(x), self.to_k(context), self.to_v(context)  # (B, N, C), twice (B, M, C)
        q, k, v = (a.unflatten(-1, (self.heads, -1)).transpose(1, 2) for a in qkv)  # (B, heads, ., C/heads)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)  # (B, N, C)
        return self.to_out[0](out)


class GEGLU(nn.Module):
    """Linear layer whose one half gates the other through GELU (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_features, 2 * out_features)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, in_features) -> (B, N, out_features)."""
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """A gated layer four times as wide, and back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers = GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)  # Identity: was dropout
        self.net = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        return self.net[2](self.net[0](x))


class TransformerBlock(nn.Module):
    """Self-attention, attention to the context, feed-forward, each after LayerNorm and in a shortcut."""

    def __init__(self, width: int, context_width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = CrossAttention(width, width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = CrossAttention(width, context_width, heads)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x (B, N, C), context (B, M, context_width) -> (B, N, C)."""
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer(nn.Module):
    """Transformer over the cells of one level's feature map, added to it."""

    def __init__(self, level: int, config: UNetConfig, block: Callable[..., nn.Module] | None = None) -> None:
        """`block(width=..., heads=...)` makes one layer; by default one that attends to the text."""
        super().__init__()
        width, self.use_linear_projection = config.block_out_channels[level], config.use_linear_projection
        heads = config.per_level(config.attention_head_dim)[level]
        depth = config.per_level(config.transformer_layers_per_block)[level]
        self.norm = nn.GroupNorm(config.norm_num_groups, width, eps=_TRANSFORMER_NORM_EPS)
        self.proj_in = self.projection(width)
        block = block or partial(TransformerBlock, context_width=config.cross_attention_dim)
        self.transformer_blocks = nn.ModuleList(block(width=width, heads=heads) for _ in range(depth))
        self.proj_out = self.projection(width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x (B, C, h, w), context (B, M, context_width) -> (B, C, h, w)."""
        tokens = self.to_tokens(self.proj_in, self.norm(x))
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        return x + self.to_map(self.proj_out, tokens, x.shape[2:])

    def projection(self, width: int) -> nn.Module:
        """The layer of `to_tokens` and `to_map`, from `width` channels to as many."""
        return nn.Linear(width, width) if self.use_linear_projection else nn.Conv2d(width, width, 1)

    def to_tokens(self, project: nn.Module, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, N, C): a 1x1 convolution before the flattening, or a linear layer after."""
        if self.use_linear_projection:
            return project(x.flatten(2).transpose(1, 2))
        return project(x).flatten(2).transpose(1, 2)

    def to_map(self, project: nn.Module, tokens: Tensor, size: Sequence[int]) -> Tensor:
        """(B, N, C) -> (B, C, h, w) with `size` = (h, w), the way back."""
        if self.use_linear_projection:
            tokens = project(tokens)
        x = tokens.transpose(1, 2).unflatten(2, tuple(size))
        return x if self.use_linear_projection else project(x)


class Downsample(nn.Module):
    """A 3x3 convolution that halves height and width."""

    def __init__(self, channels: int, padding: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, ceil(h/2), ceil(w/2)); with padding 0, rounded down."""
        return self.conv(x if self.conv.padding[0] else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Enlargement by repeating cells, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """(B, C, h, w) -> (B, C, h', w') with `size` = (h', w')."""
        return self.conv(F.interpolate(x, size=tuple(size), mode="nearest"))


class DownBlock(nn.Module):
    """One level down: residual blocks, transformers where the kind has them, a halving unless coarsest."""

    def __init__(self, level: int, config: UNetConfig) -> None:
        super().__init__()
        width = config.block_out_channels[level]
        widths = [config.block_out_channels[max(level - 1, 0)]] + [width] * config.layers_per_block
        self.resnets = nn.ModuleList(ResnetBlock(inner, width, config) for inner in widths[:-1])
        count = config.layers_per_block if "CrossAttn" in config.down_block_types[level] else 0
        self.attentions = nn.ModuleList(Transformer(level, config) for _ in range(count))
        coarsest = level == len(config.block_out_channels) - 1
        self.downsamplers = nn.ModuleList([] if coarsest else [Downsample(width, config.downsample_padding)])

    def forward(self, x: Tensor, temb: Tensor, context: Tensor) -> list[Tensor]:
        """Every layer's output in order, all of them skips, the last also what the next level gets."""
        outputs = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, temb)
            if self.attentions:
                x = self.attentions[i](x, context)
            outputs.append(x)
        outputs += [downsample(x) for downsample in self.downsamplers]
        return outputs


class MidBlock(nn.Module):
    """The coarsest level's middle: residual block, and where the kind has it transformer, residual block."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        width, count = config.block_out_channels[-1], int("CrossAttn" in config.mid_block_type)
        self.scale = config.mid_block_scale_factor
        self.attentions = nn.ModuleList(Transformer(-1, config) for _ in range(count))
        self.resnets = nn.ModuleList(ResnetBlock(width, width, config) for _ in range(1 + count))

    def forward(self, x: Tensor, temb: Tensor, context: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        x = self.resnets[0](x, temb) / self.scale
        for attention, resnet in zip(self.attentions, self.resnets[1:], strict=True):
            x = resnet(attention(x, context), temb) / self.scale
        return x


class UpBlock(nn.Module):
    """One level up: residual blocks that take one skip each, transformers, an enlargement unless finest."""

    def __init__(self, level: int, in_channels: int, skips: Sequence[int], config: UNetConfig) -> None:
        """`level` counts from the finest; `skips` are the skips' channels in the order of use."""
        super().__init__()
        width = config.block_out_channels[level]
        widths = [a + b for a, b in zip([in_channels] + [width] * (len(skips) - 1), skips, strict=True)]
        self.resnets = nn.ModuleList(ResnetBlock(channels, width, config) for channels in widths)
        count = len(skips) if "CrossAttn" in config.up_block_types[-1 - level] else 0
        self.attentions = nn.ModuleList(Transformer(level, config) for _ in range(count))
        self.upsamplers = nn.ModuleList([Upsample(width)] if level else [])

    def forward(
        self, x: Tensor, skips: list[Tensor], temb: Tensor, context: Tensor, residuals: list[Tensor] | None
    ) -> Tensor:
        """x (B, in_channels, h, w) -> (B, C, h', w'); takes skips and residuals off the lists' ends."""
        for i, resnet in enumerate(self.resnets):
            skip = skips.pop() if residuals is None else skips.pop() + residuals.pop()
            x = resnet(torch.cat((x, skip), dim=1), temb)
            if self.attentions:
                x = self.attentions[i](x, context)
        for upsample in self.upsamplers:
            x = upsample(x, skips[-1].shape[2:])  # not always twice the size: the way down rounds odd ones up
        return x


class UNetEncoder(nn.Module):
    """The half that U-Net and ControlNet share: time embedding, the way down, the middle."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        width = config.block_out_channels[0]
        self.conv_in = nn.Conv2d(config.in_channels, width, 3, padding=1)
        self.time_embedding = TimestepEmbedding(width, 4 * width, config.act_fn, config.timestep_post_act)
        if config.addition_embed_type == "text_time":
            self.add_embedding = TimestepEmbedding(config.projection_class_embeddings_input_dim, 4 * width)
        self.down_blocks = nn.ModuleList(DownBlock(i, config) for i in range(len(config.block_out_channels)))
        self.mid_block = MidBlock(config)

    def embed_time(
        self, x: Tensor, t: Timestep, added: TextTime | None = None, guidance: float | Tensor | None = None
    ) -> Tensor:
        """The time embedding (B, D) after its activation, in x's dtype; t (B,) or scalar, any real number.

        `added` goes with the config's addition_embed_type "text_time", `guidance` with time_cond_proj_dim.
        ValueError for one without the other; but without `guidance` its embedding is left out.
        """
        config = self.config
        if config.addition_embed_type == "text_time" and added is None:
            raise ValueError(
                "UNet got no `added`, but its addition_embed_type is 'text_time': pass pooled text and sizes"
            )
        if config.addition_embed_type is None and added is not None:
            raise ValueError("UNet got `added`, but its addition_embed_type is None: expected no `added`")
        flags = {"flip_sin_to_cos": config.flip_sin_to_cos, "freq_shift": config.freq_shift}
        t = torch.as_tensor(t, device=x.device).expand(len(x))
        waves = timestep_embedding(t, config.block_out_channels[0], **flags).to(x.dtype)
        if guidance is not None:
            if self.time_embedding.cond_proj is None:
                raise ValueError(
                    "UNet got `guidance`, but its time_cond_proj_dim is None: it was not distilled with it"
                )
            scale = torch.as_tensor(guidance, device=x.device, dtype=torch.float32).expand(len(x))
            waves = waves + self.time_embedding.cond_proj(
                guidance_embedding(scale, config.time_cond_proj_dim or 0).to(x.dtype)
            )
        temb = self.time_embedding(waves)
        if added is not None:
            text, sizes = added
            waves = timestep_embedding(sizes.flatten(), config.addition_time_embed_dim, **flags)
            waves = waves.unflatten(0, sizes.shape).flatten(1)  # (B * 6, 256) -> (B, 6 * 256)
            temb = temb + self.add_embedding(torch.cat((text.to(x.dtype), waves.to(x.dtype)), dim=-1))
        if config.time_embedding_act_fn is not None:
            temb = ACTIVATIONS[config.time_embedding_act_fn](temb)
        return ACTIVATIONS[config.act_fn](temb)  # once, for every residual block: each begins with it

    def encode(self, x: Tensor, temb: Tensor, context: Tensor) -> tuple[list[Tensor], Tensor]:
        """The skips, fine to coarse, and the middle's output; x (B, C, h, w) is what `conv_in` gives."""
        skips = [x]
        for block in self.down_blocks:
            skips += block(skips[-1], temb, context)
        return skips, self.mid_block(skips[-1], temb, context)


class UNet(UNetEncoder):
    """The noise predictor."""

    up_block = UpBlock  # what the way up is made of

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        widths, skips = config.block_out_channels, config.skip_channels()
        if config.time_cond_proj_dim is not None:
            self.time_embedding.cond_proj = nn.Linear(config.time_cond_proj_dim, widths[0], bias=False)
        blocks, inner = [], widths[-1]
        for level in reversed(range(len(widths))):
            own = [skips.pop() for _ in range(config.layers_per_block + 1)]
            blocks.append(self.up_block(level, inner, own, config))
            inner = widths[level]
        self.up_blocks = nn.ModuleList(blocks)
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], eps=config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def forward(
        self,
        x: Tensor,
        t: Timestep,
        context: Tensor,
        control: Control | None = None,
        added: TextTime | None = None,
        guidance: float | Tensor | None = None,
    ) -> Tensor:
        """Noise (B, out_channels, h, w) in x (B, in_channels, h, w), any h, w. ValueError for wrong
        residuals.

        `guidance` is the scale, one or (B,), for a net that was distilled with it (time_cond_proj_dim), which
        then is asked once, with the prompt.
        """
        temb = self.embed_time(x, t, added, guidance)  # (B, D)
        x = 2 * x - 1 if self.config.center_input_sample else x
        skips, x = self.encode(self.conv_in(x), temb, context)
        residuals = None
        if control is not None:
            residuals, x = list(control.down), x + control.mid
            if len(residuals) != len(skips):
                found = f"{len(residuals)} residuals, expected {len(skips)}"
                raise ValueError(f"UNet: control has {found}: wrong ControlNet?")
        for block in self.up_blocks:
            x = block(x, skips, temb, context, residuals)
        return self.conv_out(ACTIVATIONS[self.config.act_fn](self.conv_norm_out(x)))


SD15_UNET = UNetConfig()
SD15_INPAINT_UNET = UNetConfig(in_channels=9)
SDXL_UNET = UNetConfig(
    block_out_channels=(320, 640, 1280),
    cross_attention_dim=2048,
    attention_head_dim=(5, 10, 20),
    transformer_layers_per_block=(1, 2, 10),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    use_linear_projection=True,
    addition_embed_type="text_time",
)
