"""TAESD, a tiny autoencoder for Stable Diffusion's latents: pictures at a fraction of the time, less exact.

Source   TAESD, github.com/madebyollin/taesd (MIT): its README's figure and its files; diffusers calls the net
         AutoencoderTiny
Tensors  image (B, 3, H, W) in [-1, 1] <-> latent (B, 4, h, w), *scaled* as the U-Net sees it, h = H / 8
Weights  diffusers names: encoder.layers.N, decoder.layers.N, N as in the authors' Sequential, less 1 in the
         decoder, whose first layer has no weights
Copying  needs vae.py beside it (for DiagonalGaussian), and torch
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .vae import DiagonalGaussian

_MAGNITUDE = 3.0  # latents are brought into -3..3 before they are decoded


@dataclass(frozen=True)
class TinyVAEConfig:
    """Sizes of a TAESD; the defaults are its for Stable Diffusion 1.x."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    width: int = 64
    encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)  # per resolution, fine to coarse
    decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)  # coarse to fine
    scaling_factor: float = 1.0  # its latents are scaled already

    def __post_init__(self) -> None:
        if len(self.encoder_blocks) != len(self.decoder_blocks) or not self.encoder_blocks:
            raise ValueError(
                f"TinyVAEConfig has {len(self.encoder_blocks)} resolutions down and {len(self.decoder_blocks)} up"
            )


class Block(nn.Module):
    """Three convolutions beside a shortcut, and ReLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for number in range(3):
            layers += [nn.ReLU()] if number else []
            layers.append(nn.Conv2d(width, width, 3, padding=1))
        self.conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, h, w) -> (B, width, h, w)."""
        return F.relu(self.conv(x) + x)


class Encoder(nn.Module):
    """A convolution, then per resolution blocks, with a halving between."""

    def __init__(self, config: TinyVAEConfig) -> None:
        super().__init__()
        width = config.width
        self.layers = nn.Sequential(nn.Conv2d(config.in_channels, width, 3, padding=1))
        for level, blocks in enumerate(config.encoder_blocks):
            if level:
                self.layers.append(nn.Conv2d(width, width, 3, padding=1, stride=2, bias=False))
            self.layers.extend([Block(width) for _ in range(blocks)])
        self.layers.append(nn.Conv2d(width, config.latent_channels, 3, padding=1))

    def forward(self, image: Tensor) -> Tensor:
        """(B, in_channels, H, W) in [0, 1] -> (B, latent_channels, h, w)."""
        return self.layers(image)


class Decoder(nn.Module):
    """Latents within bounds, a convolution, then per resolution blocks, with a doubling between."""

    def __init__(self, config: TinyVAEConfig) -> None:
        super().__init__()
        width, last = config.width, len(config.decoder_blocks) - 1
        self.layers = nn.Sequential(nn.Conv2d(config.latent_channels, width, 3, padding=1), nn.ReLU())
        for level, blocks in enumerate(config.decoder_blocks):
            self.layers.extend([Block(width) for _ in range(blocks)])
            if level < last:
                self.layers.append(nn.Upsample(scale_factor=2.0))
                self.layers.append(nn.Conv2d(width, width, 3, padding=1, bias=False))
        self.layers.append(nn.Conv2d(width, config.out_channels, 3, padding=1))

    def forward(self, latent: Tensor) -> Tensor:
        """(B, latent_channels, h, w) -> (B, out_channels, H, W), about [0, 1]."""
        return self.layers(torch.tanh(latent / _MAGNITUDE) * _MAGNITUDE)


class AutoencoderTiny(nn.Module):
    """TAESD, with the surface of AutoencoderKL: `encode` and `decode`."""

    def __init__(self, config: TinyVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    @property
    def downscale(self) -> int:
        """Pixels per latent cell along one side: 8 for four resolutions."""
        return 2 ** (len(self.config.encoder_blocks) - 1)

    def encode(self, image: Tensor) -> DiagonalGaussian:
        """The latent of `image` (B, in_channels, H, W) in [-1, 1], for certain: variance 0.

        ValueError for a picture smaller than a cell.
        """
        if min(image.shape[-2:]) < self.downscale:
            raise ValueError(
                f"AutoencoderTiny.encode: the picture is {tuple(image.shape[-2:])} pixels, expected at least "
                f"{self.downscale} along each side; pad it first"
            )
        latent = self.encoder(image / 2 + 0.5)
        return DiagonalGaussian(latent, torch.full_like(latent, float("-inf")))

    def decode(self, latent: Tensor) -> Tensor:
        """Picture of a latent (B, latent_channels, h, w), about [-1, 1] and not clamped."""
        return self.decoder(latent) * 2 - 1


SD15_TAESD = TinyVAEConfig()
