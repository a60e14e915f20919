"""Pictures to latents and back, in whatever precision the autoencoder runs.

An autoencoder of low precision that gives NaN or infinity is asked once more in float32, with a warning.

Tensors  images (n, 3, H, W) in [-1, 1]; latents (n, 4, H / 8, W / 8), times the autoencoder's scaling_factor;
         float32, both
Copying  this file stands alone: torch only. The VAE is any module with `encode`, `decode` and
         `config.scaling_factor`
"""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def encode(vae: Any, images: Tensor) -> Tensor:
    """The latents of `images`: the mean of the posterior, scaled.

    ValueError where the autoencoder gives NaN or infinity in float32 too.
    """
    latents = vae.encode(images.to(dtype_of(vae))).mean.float()
    if not latents.isfinite().all():
        latents = in_float32(vae, lambda vae: vae.encode(images.float()).mean)
    return latents * vae.config.scaling_factor


def decode(vae: Any, latents: Tensor) -> Tensor:
    """The pictures of `latents`, clamped to [-1, 1].

    ValueError where the autoencoder gives NaN or infinity in float32 too, and for latents that hold either.
    """
    unscaled = latents / vae.config.scaling_factor
    pictures = vae.decode(unscaled.to(dtype_of(vae))).float()
    if not pictures.isfinite().all():
        if not latents.isfinite().all():
            raise ValueError(
                "the U-Net gave NaN or infinity in place of a picture; take --dtype float32, or other weights"
            )
        pictures = in_float32(vae, lambda vae: vae.decode(unscaled.float()))
    return pictures.clamp(-1, 1)


def in_float32(vae: Any, work: Callable[[Any], Tensor]) -> Tensor:
    """`work(vae)` once more with the weights in float32, for what held NaN or infinity; a warning says so.

    ValueError where it does even then.
    """
    if (dtype := dtype_of(vae)) != torch.float32:
        told = str(dtype).removeprefix("torch.")
        warnings.warn(f"the autoencoder gave NaN in {told}; asked once more in float32", stacklevel=3)
        result = work(copy.deepcopy(vae).float())
        if result.isfinite().all():
            return result
    raise ValueError(
        "the autoencoder gave NaN or infinity in place of a picture; take another --vae or model"
    )


def dtype_of(net: nn.Module) -> torch.dtype:
    """The dtype of a net's parameters; float32 if it has none."""
    return next((parameter.dtype for parameter in net.parameters()), torch.float32)


def distilled_guidance(unet: Any, scale: float) -> tuple[dict[str, float], float]:
    """How `unet` is guided by `scale`: its further arguments, and the scale that is left to do outside.

    A net that was distilled with its guidance (config.time_cond_proj_dim: full LCM models) is told it, and
    asked for the prompt alone.
    """
    told = getattr(getattr(unet, "config", None), "time_cond_proj_dim", None) is not None
    return ({"guidance": scale}, 1.0) if told else ({}, scale)
