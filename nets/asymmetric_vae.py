"""Stable Diffusion's autoencoder with a decoder that sees what an edit keeps: Asymmetric VQGAN.

Paper    Zhu et al. 2023, arXiv:2306.04632, section 3
Tensors  image (B, 3, H, W) in [-1, 1] -> latent distribution (B, 4, H/8, W/8); latent, and the source
         (B, 3, H, W) with the mask (B, 1, H, W), 1 = edit -> image, not clamped
Weights  diffusers names of AsymmetricAutoencoderKL (diffusion_pytorch_model.safetensors)
Copying  this file and vae.py
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from .vae import Decoder, DiagonalGaussian, Encoder, VAEConfig


@dataclass(frozen=True)
class AsymmetricVAEConfig:
    """Sizes of an AsymmetricAutoencoderKL; the defaults are those of the official `x-1-5`."""

    in_channels: int = 3  # of the picture that goes in
    out_channels: int = 3  # of the picture that comes out, and of the source that the decoder sees
    down_block_out_channels: tuple[int, ...] = (128, 256, 512, 512)  # the encoder's, fine to coarse
    layers_per_down_block: int = 2  # residual blocks per resolution of the encoder
    # The decoder's, fine to coarse: as many as the encoder's.
    up_block_out_channels: tuple[int, ...] = (192, 384, 768, 768)
    layers_per_up_block: int = 3  # residual blocks per resolution of the decoder, less one
    latent_channels: int = 4  # of the latent
    norm_num_groups: int = 32  # of every GroupNorm; divides each width
    scaling_factor: float = 0.18215  # latent * this has unit variance; applied by callers, never in this file
    mid_attention: bool = True  # self-attention at the coarsest resolution, in both halves
    # At how many places, from the finest on, the decoder takes what is kept from the picture: after the last
    # resolution and before each. All five in the official files.
    condition_layers: int = 5
    act_fn: str = "silu"  # of the residual blocks, as in vae.py

    def __post_init__(self) -> None:
        if len(self.down_block_out_channels) != len(self.up_block_out_channels):
            raise ValueError(
                f"AsymmetricVAEConfig: {len(self.down_block_out_channels)} widths of the encoder and "
                f"{len(self.up_block_out_channels)} of the decoder: expected as many, since cells are of one size"
            )
        for name in ("down_block_out_channels", "up_block_out_channels"):
            widths = getattr(self, name)
            if not widths or any(width % self.norm_num_groups for width in widths):
                raise ValueError(
                    f"AsymmetricVAEConfig.{name} is {widths}: expected some multiples of norm_num_groups "
                    f"({self.norm_num_groups}); change either"
                )

        if not 1 <= self.condition_layers <= len(self.up_block_out_channels) + 1:
            raise ValueError(
                f"AsymmetricVAEConfig.condition_layers is {self.condition_layers}: expected 1 to "
                f"{len(self.up_block_out_channels) + 1}, one more than there are resolutions"
            )

    @property
    def encoder(self) -> VAEConfig:
        """The plain autoencoder's config that has the same encoder."""
        return self._half(self.down_block_out_channels, self.layers_per_down_block)

    @property
    def decoder(self) -> VAEConfig:
        """The plain autoencoder's config that has the same decoder, but for the condition's encoder."""
        return self._half(self.up_block_out_channels, self.layers_per_up_block)

    def _half(self, widths: tuple[int, ...], layers: int) -> VAEConfig:
        return VAEConfig(
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            block_out_channels=widths,
            layers_per_block=layers,
            latent_channels=self.latent_channels,
            norm_num_groups=self.norm_num_groups,
            scaling_factor=self.scaling_factor,
            mid_attention=self.mid_attention,
            act_fn=self.act_fn,
        )


class ConditionEncoder(nn.Module):
    """The kept part of a picture -> features for each place in the decoder where they are blended in.

    They are as wide as the decoder's own, to be mixed with them: two at the picture's size, then one at every
    halving.
    """

    def __init__(self, in_channels: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        ins = (in_channels, *widths)
        self.layers = nn.ModuleList(
            nn.Conv2d(ins[i], width, 3, padding=1) if i < 2 else nn.Conv2d(ins[i], width, 4, 2, padding=1)
            for i, width in enumerate(widths)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, in_channels, H, W) -> each layer's features before its ReLU, fine to coarse."""
        features = []
        for layer in self.layers:
            x = layer(x if not features else F.relu(x))
            features.append(x)
        return features


class MaskConditionDecoder(Decoder):
    """The plain decoder; before each resolution, and after the last, what is kept comes from the picture."""

    def __init__(self, config: AsymmetricVAEConfig) -> None:
        super().__init__(config.decoder)
        widths = (*config.up_block_out_channels, config.up_block_out_channels[-1])
        self.condition_encoder = ConditionEncoder(config.out_channels, widths[: config.condition_layers])

    def forward(self, z: Tensor, image: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """(B, latent_channels, h, w) and, both or neither, `image` and `mask` -> (B, out_channels, H, W)."""
        if image is None or mask is None:
            return super().forward(z)
        kept = self.condition_encoder((1 - mask) * image)
        x = self.mid_block(self.conv_in(z))
        for place, block in zip(range(len(self.up_blocks), 0, -1), self.up_blocks, strict=True):
            if place < len(kept):
                x = _blend(x, kept[place], mask)
            x = block(x)
        x = _blend(x, kept[0], mask)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class AsymmetricAutoencoderKL(nn.Module):
    """The variational autoencoder, whose `decode` can be shown the source picture and the mask."""

    def __init__(self, config: AsymmetricVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config.encoder)
        self.decoder = MaskConditionDecoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    @property
    def downscale(self) -> int:
        """Pixels per latent cell along one side: 8 for four resolutions."""
        return 2 ** (len(self.config.down_block_out_channels) - 1)

    def encode(self, image: Tensor) -> DiagonalGaussian:
        """Distribution of latents for `image` (B, in_channels, H, W) in [-1, 1], any size from `downscale`.

        A latent has H // downscale by W // downscale cells, not scaled. ValueError for a smaller picture.
        """
        if min(image.shape[-2:]) < self.downscale:
            raise ValueError(
                f"AsymmetricAutoencoderKL.encode: the picture is {tuple(image.shape[-2:])} pixels, expected at "
                f"least {self.downscale} along each side; pad it first"
            )
        return DiagonalGaussian.from_moments(self.quant_conv(self.encoder(image)))

    def decode(self, latent: Tensor, image: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Picture of an unscaled latent (B, latent_channels, h, w), about [-1, 1] and not clamped.

        Its shape is (B, out_channels, downscale * h, downscale * w). With `image`, the source of that shape
        in [-1, 1], and `mask` (B, 1, ...) of that size, both or neither, what is kept is taken from the
        source. The mask is 1 where the picture is edited and 0 where it is kept, as everywhere here and in
        diffusers' class; of the source under a 1 nothing is seen. ValueError for one of the two alone, and
        for another size.
        """
        if (image is None) != (mask is None):
            given, lacking = ("image", "mask") if mask is None else ("mask", "image")
            raise ValueError(
                f"AsymmetricAutoencoderKL.decode got `{given}` without `{lacking}`: expected both or neither"
            )
        size = tuple(side * self.downscale for side in latent.shape[-2:])
        for name, tensor in (("image", image), ("mask", mask)):
            if tensor is not None and tuple(tensor.shape[-2:]) != size:
                raise ValueError(
                    f"AsymmetricAutoencoderKL.decode: `{name}` is {tuple(tensor.shape[-2:])} pixels, expected "
                    f"{size}, which the latent stands for"
                )
        return self.decoder(self.post_quant_conv(latent), image, mask)


def _blend(x: Tensor, kept: Tensor, mask: Tensor) -> Tensor:
    """`x` where the mask is 1, `kept` where it is 0; a coarser cell's mask is that of its first pixel."""
    mask = F.interpolate(mask, x.shape[-2:], mode="nearest")
    return x * mask + kept * (1 - mask)


ASYMMETRIC_VAE_X_1_5 = AsymmetricVAEConfig()
ASYMMETRIC_VAE_X_2 = AsymmetricVAEConfig(up_block_out_channels=(256, 512, 1024, 1024), layers_per_up_block=5)
