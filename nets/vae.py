"""Stable Diffusion 1.x autoencoder: picture <-> latent an eighth of its size.

Paper    Rombach et al. 2022, arXiv:2112.10752, section 3.1 and appendix G (KL-regularised, f = 8, 4 channels)
Tensors  image (B, 3, H, W) in [-1, 1] -> latent distribution (B, 4, H/8, W/8); latent -> image, not clamped
Weights  diffusers names (vae/diffusion_pytorch_model.safetensors)
Copying  this file stands alone: torch only
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_EPS = 1e-6  # of every GroupNorm in this net; the U-Net's residual blocks have 1e-5
_LOGVAR_RANGE = (-30.0, 20.0)  # keeps exp(logvar) finite, as the LDM code does
# Of the residual blocks, by the names that config.json has for them, in small letters. Before conv_out it is
# SiLU in every file.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu, "swish": F.silu, "gelu": F.gelu, "mish": F.mish, "relu": F.relu,
}  # fmt: skip


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of an AutoencoderKL; the defaults are Stable Diffusion 1.x's."""

    in_channels: int = 3  # of the picture that goes in
    out_channels: int = 3  # of the picture that comes out
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)  # one entry per resolution, fine to coarse
    layers_per_block: int = 2  # residual blocks per resolution of the encoder; the decoder has one more
    latent_channels: int = 4  # of the latent
    norm_num_groups: int = 32  # of every GroupNorm; divides each of block_out_channels
    scaling_factor: float = 0.18215  # latent * this has unit variance; applied by callers, never in this file
    mid_attention: bool = True  # self-attention over all cells at the coarsest resolution
    act_fn: str = "silu"  # of the residual blocks; see ACTIVATIONS
    shift_factor: float = 0.0  # the latents' mean, which `encode` takes off and `decode` puts back

    def __post_init__(self) -> None:
        if self.act_fn not in ACTIVATIONS:
            raise ValueError(f"VAEConfig.act_fn is {self.act_fn!r}: expected one of {tuple(ACTIVATIONS)}")
        if not self.block_out_channels or any(c % self.norm_num_groups for c in self.block_out_channels):
            raise ValueError(
                f"VAEConfig.block_out_channels is {self.block_out_channels}: expected some multiples of "
                f"norm_num_groups ({self.norm_num_groups}); change either"
            )


@dataclass(frozen=True)
class DiagonalGaussian:
    """The encoder's distribution over latents, one independent normal per cell and channel, not scaled."""

    mean: Tensor  # (B, latent_channels, h, w)
    logvar: Tensor  # (B, latent_channels, h, w), natural logarithm of the variance

    @classmethod
    def from_moments(cls, moments: Tensor, shift: float = 0.0) -> "DiagonalGaussian":
        """The distribution `quant_conv` gives, (B, 2 * latent_channels, h, w): mean, then log variance; the
        mean less `shift`.
        """
        mean, logvar = moments.chunk(2, dim=1)
        return cls(mean - shift if shift else mean, logvar.clamp(*_LOGVAR_RANGE))

    def mode(self) -> Tensor:
        """The likeliest latent, (B, latent_channels, h, w): the mean."""
        return self.mean

    def sample(self, noise: Tensor) -> Tensor:
        """The latent mean + sigma * noise, for standard normal `noise` of the mean's shape.

        Kingma & Welling 2014, arXiv:1312.6114, section 2.4.
        """
        return self.mean + torch.exp(0.5 * self.logvar) * noise.to(self.mean)

    def kl(self) -> Tensor:
        """Divergence from N(0, 1) in nats, per cell and channel: (B, latent_channels, h, w).

        Kingma & Welling 2014, arXiv:1312.6114, appendix B.
        """
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar)


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions, each after GroupNorm and an activation, around a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, groups: int, act_fn: str = "silu") -> None:
        super().__init__()
        self.act = ACTIVATIONS[act_fn]
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=_EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=_EPS)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.conv_shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, h, w) -> (B, out_channels, h, w)."""
        h = self.conv1(self.act(self.norm1(x)))
        h = self.conv2(self.act(self.norm2(h)))
        return self.conv_shortcut(x) + h


class Attention(nn.Module):
    """Self-attention with one head over all cells of a feature map, added to it."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=_EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])  # a list on disk; index 1 was dropout

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        tokens = self.group_norm(x).flatten(2).transpose(1, 2).unsqueeze(1)  # (B, 1, h*w, C)
        q, k, v = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        out = self.to_out[0](F.scaled_dot_product_attention(q, k, v))  # (B, 1, h*w, C)
        return x + out.squeeze(1).transpose(1, 2).unflatten(2, x.shape[2:])


class Downsample(nn.Module):
    """Halve height and width, rounded down, by a strided convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h // 2, w // 2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # padded below and to the right only, as LDM trained it


class Upsample(nn.Module):
    """Double height and width by repetition, then convolve."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, 2h, 2w)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _resnets(in_channels: int, out_channels: int, count: int, config: VAEConfig) -> nn.ModuleList:
    """`count` residual blocks one after the other, the first from `in_channels`."""
    ins = [in_channels] + [out_channels] * (count - 1)
    return nn.ModuleList(
        ResnetBlock(inner, out_channels, config.norm_num_groups, config.act_fn) for inner in ins[:count]
    )


class DownBlock(nn.Module):
    """One resolution of the encoder: residual blocks, then a halving unless it is the coarsest."""

    def __init__(
        self, in_channels: int, out_channels: int, layers: int, config: VAEConfig, *, downsample: bool
    ) -> None:
        super().__init__()
        self.resnets = _resnets(in_channels, out_channels, layers, config)
        self.downsamplers = nn.ModuleList([Downsample(out_channels)] if downsample else [])

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, h, w) -> (B, out_channels, h, w), or half that size."""
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class UpBlock(nn.Module):
    """One resolution of the decoder: residual blocks, then a doubling unless it is the finest."""

    def __init__(
        self, in_channels: int, out_channels: int, layers: int, config: VAEConfig, *, upsample: bool
    ) -> None:
        super().__init__()
        self.resnets = _resnets(in_channels, out_channels, layers, config)
        self.upsamplers = nn.ModuleList([Upsample(out_channels)] if upsample else [])

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, h, w) -> (B, out_channels, h, w), or twice that size."""
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


class MidBlock(nn.Module):
    """Residual block, attention where the config has it, residual block."""

    def __init__(self, channels: int, config: VAEConfig) -> None:
        super().__init__()
        attentions = [Attention(channels, config.norm_num_groups)] if config.mid_attention else []
        self.attentions = nn.ModuleList(attentions)
        self.resnets = _resnets(channels, channels, 2, config)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class Encoder(nn.Module):
    """Picture -> mean and log variance, before the 1x1 `quant_conv`."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownBlock(
                widths[max(i - 1, 0)], width, config.layers_per_block, config, downsample=i < len(widths) - 1
            )
            for i, width in enumerate(widths)
        )
        self.mid_block = MidBlock(widths[-1], config)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=_EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, 2 * latent_channels, h, w)."""
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Decoder(nn.Module):
    """Latent, after the 1x1 `post_quant_conv`, -> picture."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups  # coarse to fine
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], config)
        self.up_blocks = nn.ModuleList(
            UpBlock(
                widths[max(i - 1, 0)],
                width,
                config.layers_per_block + 1,
                config,
                upsample=i < len(widths) - 1,
            )
            for i, width in enumerate(widths)
        )
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=_EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """(B, latent_channels, h, w) -> (B, out_channels, H, W)."""
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class AutoencoderKL(nn.Module):
    """The variational autoencoder: `encode` and `decode` are its two halves; there is no `forward`."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    @property
    def downscale(self) -> int:
        """Pixels per latent cell along one side: 8 for four resolutions."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    def encode(self, image: Tensor) -> DiagonalGaussian:
        """Distribution of latents for `image` (B, in_channels, H, W) in [-1, 1], any size from `downscale`.

        A latent has H // downscale by W // downscale cells, not scaled. ValueError for a smaller picture.
        """
        if min(image.shape[-2:]) < self.downscale:
            raise ValueError(
                f"AutoencoderKL.encode: the picture is {tuple(image.shape[-2:])} pixels, expected at least "
                f"{self.downscale} along each side; pad it first"
            )
        return DiagonalGaussian.from_moments(self.quant_conv(self.encoder(image)), self.config.shift_factor)

    def decode(self, latent: Tensor) -> Tensor:
        """Picture of an unscaled latent (B, latent_channels, h, w), about [-1, 1] and not clamped.

        Its shape is (B, out_channels, downscale * h, downscale * w).
        """
        return self.decoder(self.post_quant_conv(self.unshifted(latent)))

    def unshifted(self, latent: Tensor) -> Tensor:
        """`latent` plus the config's shift_factor: what `post_quant_conv` takes."""
        return latent + self.config.shift_factor if self.config.shift_factor else latent


class IdentityAutoencoder(nn.Module):
    """An autoencoder whose latent is the picture: diffusion in pixels (MSBD, arXiv:2210.12965, appendix A.2).

    The same surface as AutoencoderKL, with no weights: `downscale` 1, three channels, scaling factor 1.
    """

    def __init__(self) -> None:
        super().__init__()
        self.config = IDENTITY_VAE

    @property
    def downscale(self) -> int:
        """Pixels per latent cell along one side: 1."""
        return 1

    def encode(self, image: Tensor) -> DiagonalGaussian:
        """The distribution that is `image` (B, 3, H, W) for certain: variance 0, every sample equal to it."""
        return DiagonalGaussian(image, torch.full_like(image, float("-inf")))

    def decode(self, latent: Tensor) -> Tensor:
        """`latent` (B, 3, H, W) itself."""
        return latent


SD15_VAE = VAEConfig()
IDENTITY_VAE = VAEConfig(
    block_out_channels=(1,),
    layers_per_block=0,
    latent_channels=3,
    norm_num_groups=1,
    scaling_factor=1.0,
    mid_attention=False,
)
