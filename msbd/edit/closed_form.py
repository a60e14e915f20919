"""Decoder optimisation without steps: eq. 1 solved for the decoder's last convolution, window by window.

Papers   Avrahami et al. 2022 (Blended Latent Diffusion), arXiv:2206.02779, background reconstruction;
         Ackermann & Li 2022, arXiv:2210.12965, eq. 1, which is quadratic in the last layer
Tensors  features (1, C, H, W), what goes into the last convolution; pictures (1, 3, H, W) in [-1, 1], not
         clamped; masks (1, 1, H, W), 1 = edit
Copying  this file stands alone: torch only
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_AT_ONCE = 2**27  # bytes of patches that are held together


def refit(
    features: Tensor,
    conv: nn.Conv2d,
    reference: Tensor,
    mask: Tensor,
    *,
    background_weight: float = 100.0,
    ridge: float = 1e-3,
    window: int = 32,
    stride: int = 16,
) -> Tensor:
    """The picture (1, 3, H, W), float32, of `features` by a last layer `conv` that meets `reference`.

    In each window of `window` pixels, one every `stride`, that holds both masked pixels and others, the
    layer's weights and bias change by D, the least squares solution of eq. 1,

        sum over m = 1 of |D phi|^2 + lambda sum over m = 0 of |x_out + D phi - x_in|^2 + rho |D|^2,

    where phi are a pixel's features under the kernel, x_out = conv(features), x_in = `reference`, lambda =
    `background_weight`, and rho = `ridge` times the mean diagonal of the sum's matrix. Windows are blended by
    Hann's function; where all is masked, D is 0. ValueError for sizes that differ.
    """
    if not features.shape[-2:] == reference.shape[-2:] == mask.shape[-2:]:
        raise ValueError(
            f"features {tuple(features.shape)}, reference {tuple(reference.shape)} and mask {tuple(mask.shape)} "
            "differ in size; expected one height and width"
        )
    features, reference, mask = features.float(), reference.float(), mask.float()
    x_out = F.conv2d(features, conv.weight.float(), _bias(conv), padding=conv.padding[0])
    height, width = mask.shape[-2:]
    size = (min(window, height), min(window, width))
    places = [
        (top, left) for top in _starts(height, size[0], stride) for left in _starts(width, size[1], stride)
    ]
    hann = (_hann(size[0])[:, None] * _hann(size[1])[None]).to(features)
    change, weight = torch.zeros_like(x_out), torch.zeros_like(mask)
    edge, masked_at = [], mask.cpu()  # asked once for each window: a GPU would be waited for each time
    for top, left in places:
        at = (..., slice(top, top + size[0]), slice(left, left + size[1]))
        masked = masked_at[at]
        if masked.any():
            weight[at] += hann
            if not masked.all():
                edge.append(at)
    missing, pad = reference - x_out, int(conv.padding[0])
    padded = F.pad(features, (pad, pad, pad, pad))
    patch_bytes = 4 * (features.shape[1] * conv.weight[0, 0].numel() + 1) * hann.numel()
    for some in _split(edge, max(1, _AT_ONCE // patch_bytes)):
        moved = _moved(padded, conv.kernel_size[0], missing, mask, some, background_weight, ridge)
        for at, one in zip(some, moved, strict=True):
            change[at] += hann * one
    return x_out + change / weight.clamp_min(1e-12)


def with_features(vae: Any) -> Any:
    """`vae` on the same weights, but `decode` gives what goes into its last convolution, (1, C, H, W).

    An AutoencoderKL, or one in tiles.
    """
    if not isinstance(vae, nn.Module):  # nets.tiled_vae.TiledAutoencoder
        return replace(vae, vae=with_features(vae.vae))
    shown: Any = copy.copy(vae)
    decoder: Any = copy.copy(shown.decoder)
    shown._modules, decoder._modules = dict(shown._modules), dict(decoder._modules)
    like = decoder.conv_out.weight
    channels = like.shape[1]
    same = nn.Conv2d(channels, channels, 1, bias=False, device=like.device, dtype=like.dtype)
    same.weight = nn.Parameter(torch.eye(channels).to(like)[:, :, None, None], requires_grad=False)
    decoder.conv_out, shown.decoder = same, decoder
    return shown


def _moved(
    padded: Tensor, kernel: int, missing: Tensor, mask: Tensor, windows: Sequence, background_weight: float, ridge: float
) -> Tensor:  # fmt: skip
    """D phi (n, 3, h, w) of n windows; `padded` are the features, `missing` is x_in - x_out."""
    patches, kept, wanted = [], [], []
    for window in windows:
        rows, columns = window[1], window[2]
        seen = padded[..., rows.start : rows.stop + kernel - 1, columns.start : columns.stop + kernel - 1]
        patches.append(F.unfold(seen, kernel))
        kept.append(1 - mask[window].flatten())
        wanted.append(missing[window].flatten(2)[0])
    phi = torch.cat(patches)  # (n, 9 C, h w)
    phi = torch.cat([phi, torch.ones_like(phi[:, :1])], 1)  # and the bias
    outside, missing = torch.stack(kept)[:, None], torch.stack(wanted)  # (n, 1, h w), (n, 3, h w)
    scaled = phi * (1 + (background_weight - 1) * outside).sqrt()
    gram = (scaled @ scaled.mT).cpu().double()  # MPS has no float64
    right = background_weight * ((phi * outside) @ missing.mT).cpu().double()  # inside, D phi is to be 0
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    diagonal += ridge * diagonal.mean(-1, keepdim=True)
    change = torch.cholesky_solve(right, torch.linalg.cholesky(gram)).to(phi)  # (n, 9 C + 1, 3)
    height, width = windows[0][1].stop - windows[0][1].start, windows[0][2].stop - windows[0][2].start
    return (change.mT @ phi).unflatten(2, (height, width))


def _bias(conv: nn.Conv2d) -> Tensor | None:
    return None if conv.bias is None else conv.bias.float()


def _starts(length: int, window: int, stride: int) -> list[int]:
    return [*range(0, length - window, stride), length - window]


def _hann(length: int) -> Tensor:
    """sin^2, at pixel centres, so that no weight is 0."""
    return torch.sin((torch.arange(length) + 0.5) * (math.pi / length)).square()


def _split(items: Sequence, count: int) -> list[Sequence]:
    return [items[i : i + count] for i in range(0, len(items), count)]
