"""Pictures to latents and back, in whatever precision the autoencoder runs.

Tensors  images (n, 3, H, W) in [-1, 1]; latents (n, 4, H / 8, W / 8), times the autoencoder's scaling_factor;
         float32, both
Copying  this file stands alone: torch only. The VAE is any module with `encode`, `decode` and
         `config.scaling_factor`
"""

from typing import Any

import torch
from torch import Tensor, nn


def encode(vae: Any, images: Tensor) -> Tensor:
    """The latents of `images`: the mean of the posterior, scaled."""
    return vae.encode(images.to(dtype_of(vae))).mean.float() * vae.config.scaling_factor


def decode(vae: Any, latents: Tensor) -> Tensor:
    """The pictures of `latents`, clamped to [-1, 1]."""
    return vae.decode((latents / vae.config.scaling_factor).to(dtype_of(vae))).float().clamp(-1, 1)


def dtype_of(net: nn.Module) -> torch.dtype:
    """The dtype of a net's parameters; float32 if it has none."""
    return next((parameter.dtype for parameter in net.parameters()), torch.float32)
