"""The autoencoder of nets/vae.py on pictures too large for it: exactly, or tile by tile with a small error.

Paper    Rombach et al. 2022, arXiv:2112.10752; the tiles are those of PASD's official code
Tensors  those of AutoencoderKL: image (B, 3, H, W) <-> latent (B, 4, H/8, W/8)
Weights  none of its own
Copying  needs vae.py

A convolution sees its neighbours only, so a map can be convolved in strips; GroupNorm and the attention in
the middle see all of it. `exact` holds every map whole and works through it in strips, layer by layer. `fast`
never holds more than a tile: it takes GroupNorm's statistics from a small copy of the picture and attends
within a tile.

The official code instead lets all tiles meet at every GroupNorm, but averages their variances without what
their means differ by, counts padding several times, and in the middle attends per tile and normalises twice;
so its result is neither. Its fast mode is ours but for the second normalisation.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .vae import (
    Attention,
    AutoencoderKL,
    Decoder,
    DiagonalGaussian,
    Downsample,
    Encoder,
    ResnetBlock,
    Upsample,
    VAEConfig,
)

_PAD = {"encoder": 32, "decoder": 11}  # what a tile sees around itself: pixels, latent cells
_STRIPS_PER_TILE = 16  # a strip's workspace is then small beside the maps; more would save little
_LEAST_CELLS = 8  # the short side of the small copy; fewer are mostly border and mislead by factors
_SCORES = 2**26  # attention scores held at once, should the backend hold them: 256 MiB in float32


@dataclass(frozen=True)
class TiledAutoencoder:
    """An AutoencoderKL for large pictures: the same `encode` and `decode`, without gradients.

    A picture (a latent) with no side above its tile and two pads of 32 pixels (11 cells) goes through `vae`.

    exact   equals `vae` to rounding, in about its time. Holds the finest resolution's two largest maps,
            whole, on `storage`: for SD 1.5 384 values per pixel, 4.8 GB in float32 at 2048 x 1536. With
            the mini net that is half of what `vae` holds.
    fast    holds one tile whatever the picture's size, and takes longer by the pads that neighbours share.
            Its statistics are estimates, worse the more a picture is shrunk to a tile: on photographs and
            the mini net, without attention, about 0.2 of 255 levels on average at 1.25 times a tile, 0.8 at
            2.5 times, 1.6 at 5 times.
    """

    vae: AutoencoderKL
    mode: Literal["exact", "fast"] = "exact"
    encoder_tile: int = 1024  # pixels along a side, a multiple of `downscale`
    decoder_tile: int = 224  # latent cells along a side
    storage: torch.device | str | None = None  # of the maps of `exact`; None: the input's device

    def __post_init__(self) -> None:
        if self.mode not in ("exact", "fast"):
            raise ValueError(f"TiledAutoencoder.mode is {self.mode!r}: expected 'exact' or 'fast'")
        _check_tile(self.encoder_tile, False, self.downscale)
        _check_tile(self.decoder_tile, True, self.downscale)

    @property
    def config(self) -> VAEConfig:
        """The sizes of `vae`."""
        return self.vae.config

    @property
    def downscale(self) -> int:
        """Pixels per latent cell along one side."""
        return self.vae.downscale

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of `vae`."""
        return self.vae.parameters()

    def float(self) -> "TiledAutoencoder":
        """This one, with the parameters of `vae` made float32, as nn.Module.float does that."""
        self.vae.float()
        return self

    @torch.no_grad()
    def encode(self, image: Tensor) -> DiagonalGaussian:
        """As AutoencoderKL.encode: the latents of `image` (B, in_channels, H, W), or its ValueError."""
        if min(image.shape[-2:]) < self.downscale or _fits(image, self.encoder_tile, _PAD["encoder"]):
            return self.vae.encode(image)
        moments = self.vae.quant_conv(self._run(self.vae.encoder, image))
        return DiagonalGaussian.from_moments(moments, self.vae.config.shift_factor)

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """As AutoencoderKL.decode: the picture of an unscaled latent (B, latent_channels, h, w)."""
        if _fits(latent, self.decoder_tile, _PAD["decoder"]):
            return self.vae.decode(latent)
        return self._run(self.vae.decoder, self.vae.post_quant_conv(self.vae.unshifted(latent)))

    def _run(self, half: Encoder | Decoder, x: Tensor) -> Tensor:
        tile = self.decoder_tile if isinstance(half, Decoder) else self.encoder_tile
        if self.mode == "fast":
            return _run_fast(half, x, tile, self.downscale)
        strips = math.ceil(_STRIPS_PER_TILE * x.shape[2] * x.shape[3] / tile**2)
        return _Walk(strips, x.device, torch.device(self.storage or x.device)).run(half, x).to(x.device)


@dataclass(frozen=True)
class VAETile:
    """One tile of `fast`; each field is (rows, columns), to index the last two dimensions."""

    source: tuple[slice, slice]  # of the input: the tile and its pad
    crop: tuple[slice, slice]  # of what comes out for `source`
    target: tuple[slice, slice]  # of the output: where the crop goes


def vae_tiles(height: int, width: int, tile: int, *, is_decoder: bool, scale: int = 8) -> list[VAETile]:
    """The tiles, by rows, of a latent (decoder) or a picture (encoder) of `height` x `width`.

    Equal tiles of at most `tile` a side, rounded up to a multiple of 32 (or of 16, 8, ..) where that is no
    more than `tile`. Those at the border own the pad there too, so that all targets together are the output,
    each cell once. `scale` is the net's `downscale`. This is the official code's split. ValueError for an
    encoder tile that is not a multiple of `scale`.
    """
    _check_tile(tile, is_decoder, scale)
    rows, columns = (_axis_tiles(length, tile, is_decoder, scale) for length in (height, width))
    return [
        VAETile(source=(row[0], column[0]), crop=(row[1], column[1]), target=(row[2], column[2]))
        for row in rows
        for column in columns
    ]


def _axis_tiles(length: int, tile: int, is_decoder: bool, scale: int) -> list[tuple[slice, slice, slice]]:
    """(source, crop, target) of each tile along one axis."""
    pad = _PAD["decoder" if is_decoder else "encoder"]
    inner = max(length - 2 * pad, 1)  # without the pads at both ends
    size = math.ceil(inner / math.ceil(inner / tile))
    rounded = (math.ceil(size / multiple) * multiple for multiple in (32, 16, 8, 4, 2))
    size = next((candidate for candidate in rounded if candidate <= tile), size)
    tiles = []
    for start in range(0, inner, size):
        last = start + size >= inner
        source = slice(start, length if last else start + size + 2 * pad)
        low, high = (start + pad if start else 0), (length if last else start + size + pad)
        low, high, origin = (k * scale if is_decoder else k // scale for k in (low, high, start))
        tiles.append((source, slice(low - origin, high - origin), slice(low, high)))
    return tiles


def _check_tile(tile: int, is_decoder: bool, scale: int) -> None:
    multiple = 1 if is_decoder else scale
    if tile < 1 or tile % multiple or _PAD["encoder"] % scale:
        kind = "decoder_tile, in latent cells," if is_decoder else "encoder_tile, in pixels,"
        raise ValueError(
            f"{kind} is {tile} for a net of {scale} pixels per cell: expected a positive "
            f"multiple of {multiple}, and a net of at most {_PAD['encoder']} pixels per cell"
        )


def _fits(x: Tensor, tile: int, pad: int) -> bool:
    return max(x.shape[-2:]) <= tile + 2 * pad


def _run_fast(half: Encoder | Decoder, x: Tensor, tile: int, scale: int) -> Tensor:
    """`half` tile by tile, all GroupNorms with what they did to a small copy of `x`."""
    walk = _Walk(_STRIPS_PER_TILE, x.device, x.device)
    is_decoder, (height, width) = isinstance(half, Decoder), x.shape[-2:]
    walk.run(half, _shrink(x, tile, _LEAST_CELLS * (1 if is_decoder else scale)))
    size = [side * scale if is_decoder else side // scale for side in (height, width)]
    out = x.new_empty(x.shape[0], half.conv_out.out_channels, *size)
    for piece in vae_tiles(height, width, tile, is_decoder=is_decoder, scale=scale):
        out[..., *piece.target] = walk.run(half, x[..., *piece.source])[..., *piece.crop]
    return out


def _shrink(x: Tensor, tile: int, least: int) -> Tensor:
    """A copy of `x` with a long side of `tile`, a short one from `least`; its mean, deviation and range kept.

    Every so many-th pixel is taken as it is: averaging would blur, and hide what the statistics are of.
    """
    short, long = sorted(x.shape[-2:])
    factor = min(max(tile / long, (least + 1) / short), 1.0)  # + 1: safe from rounding down
    small = F.interpolate(x, scale_factor=factor, mode="nearest-exact")
    wide = torch.promote_types(x.dtype, torch.float32)
    deviation, mean = torch.std_mean(x.to(wide), dim=(2, 3), keepdim=True)
    own_deviation, own_mean = torch.std_mean(small.to(wide), dim=(2, 3), keepdim=True)
    small = (small - own_mean) * (deviation / own_deviation.clamp_min(1e-6)) + mean
    low, high = (limit((1, 2, 3), keepdim=True).to(wide) for limit in (x.amin, x.amax))
    return small.clamp(low, high).to(x.dtype)


class _Walk:
    """Passes through a half of the net, layer by layer, in strips of rows over maps that are held whole.

    Maps are on `storage`, strips are computed on `device`. What a GroupNorm does is found out at its first
    map and kept, so that a second pass through the same walk has the first one's statistics.
    """

    def __init__(self, strips: int, device: torch.device, storage: torch.device) -> None:
        self._strips, self._device, self._storage = strips, device, storage
        self._affine: dict[nn.GroupNorm, tuple[Tensor, Tensor]] = {}

    def run(self, half: Encoder | Decoder, x: Tensor) -> Tensor:
        """half(x), on `storage`; `x` is not changed."""
        x = self._convolve(half.conv_in, x)
        for layer in _layers(half):
            x = self._layer(layer, x)
        return self._convolve(half.conv_out, x, norm=half.conv_norm_out)

    def _layer(self, layer: nn.Module, x: Tensor) -> Tensor:
        """layer(x); may overwrite `x`."""
        if isinstance(layer, ResnetBlock):
            return self._resnet(layer, x)
        if isinstance(layer, Attention):
            return self._attend(layer, x)
        if isinstance(layer, Downsample):
            return self._convolve(layer.conv, x)
        assert isinstance(layer, Upsample), type(layer).__name__
        return self._convolve(layer.conv, x, enlarge=2)

    def _resnet(self, block: ResnetBlock, x: Tensor) -> Tensor:
        h = self._convolve(block.conv1, x, norm=block.norm1, act=block.act)
        shortcut = block.conv_shortcut
        if isinstance(shortcut, nn.Conv2d):  # of one cell each, so it can overwrite what it reads
            room = x[:, : shortcut.out_channels] if shortcut.out_channels <= x.shape[1] else None
            x = self._convolve(shortcut, x, out=room)
        return self._convolve(block.conv2, h, norm=block.norm2, act=block.act, out=x, add=True)

    def _attend(self, block: Attention, x: Tensor) -> Tensor:
        """Every cell attends to all cells, so few queries at a time that no N x N scores are ever held."""
        tokens = self._normalise(block.group_norm, x, x.to(self._device))
        tokens = tokens.flatten(2).transpose(1, 2).unsqueeze(1)  # (B, 1, h*w, C)
        k, v = block.to_k(tokens), block.to_v(tokens)
        queries = max(1, _SCORES // (x.shape[0] * tokens.shape[2]))
        parts = [
            block.to_out[0](F.scaled_dot_product_attention(block.to_q(part), k, v))
            for part in tokens.split(queries, dim=2)
        ]
        change = torch.cat(parts, dim=2).squeeze(1).transpose(1, 2).unflatten(2, x.shape[2:])
        return x.add_(change.to(x.device))

    def _convolve(
        self,
        conv: nn.Conv2d,
        x: Tensor,
        *,
        norm: nn.GroupNorm | None = None,
        act: Callable[[Tensor], Tensor] = F.silu,
        enlarge: int = 1,
        out: Tensor | None = None,
        add: bool = False,
    ) -> Tensor:
        """conv(act(norm(x))) of `x` repeated `enlarge` times: a new map, or put in (added to) `out`."""
        pads = _pads(conv)
        height, width = (
            (side * enlarge + sum(pads) - conv.kernel_size[0]) // conv.stride[0] + 1 for side in x.shape[2:]
        )
        for top, bottom in _spans(height, self._strips):
            part = self._rows(conv, x, top, bottom, norm, act, enlarge)
            out = self._map_like(part, height, width) if out is None else out
            rows = out[:, :, top:bottom]
            if add:
                rows += part.to(out.device)
            else:
                rows.copy_(part)
        assert out is not None
        return out

    def _rows(
        self, conv: nn.Conv2d, x: Tensor, top: int, bottom: int, norm: nn.GroupNorm | None,
        act: Callable[[Tensor], Tensor], enlarge: int,
    ) -> Tensor:  # fmt: skip
        """Rows `top` to `bottom` of what `_convolve` gives; zeros only beyond the map's borders."""
        before, after = _pads(conv)
        low = top * conv.stride[0] - before  # the rows that the kernel sees: from low to high
        high = (bottom - 1) * conv.stride[0] - before + conv.kernel_size[0]
        first, last = max(low, 0), min(high, x.shape[2] * enlarge)  # of these, what there is
        part = x[:, :, first // enlarge : math.ceil(last / enlarge)].to(self._device)
        if norm is not None:
            part = self._normalise(norm, x, part)
            part = F.silu(part, inplace=True) if act is F.silu else act(part)
        if enlarge > 1:
            part = F.interpolate(part, scale_factor=float(enlarge), mode="nearest")
            part = part[:, :, first % enlarge :][:, :, : last - first]
        part = F.pad(part, (before, after, first - low, high - last))
        return F.conv2d(part, conv.weight, conv.bias, stride=conv.stride)

    def _map_like(self, part: Tensor, height: int, width: int) -> Tensor:
        """An empty map on `storage`, in the dtype and memory format of `part`."""
        last = part.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if last else torch.contiguous_format
        shape = (part.shape[0], part.shape[1], height, width)
        return torch.empty(shape, dtype=part.dtype, device=self._storage, memory_format=layout)

    def _normalise(self, norm: nn.GroupNorm, x: Tensor, part: Tensor) -> Tensor:
        """norm(x) at `part`, which is some rows of `x`, in the dtype of `x`."""
        if norm not in self._affine:
            self._affine[norm] = self._measure(norm, x)
        scale, shift = self._affine[norm]
        return (part * scale).add_(shift).to(x.dtype)

    def _measure(self, norm: nn.GroupNorm, x: Tensor) -> tuple[Tensor, Tensor]:
        """GroupNorm on the whole map `x` (Wu & He 2018, arXiv:1803.08494) as scale and shift (B, C, 1, 1).

        Law of total variance: that of a map is its strips' mean variance plus the variance of their means.
        Measured in float32 at least.
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        spans = _spans(x.shape[2], self._strips)
        strips = (x[:, :, top:bottom].to(self._device, wide) for top, bottom in spans)
        moments = [
            torch.var_mean(strip.unflatten(1, (norm.num_groups, -1)), dim=(2, 3, 4), correction=0)
            for strip in strips
        ]
        # Each (strips, B, groups); in float64 on the CPU, which every device can reach.
        variances, means = (torch.stack(each).cpu().double() for each in zip(*moments, strict=True))
        share = torch.tensor([[[bottom - top]] for top, bottom in spans], dtype=torch.float64) / x.shape[2]
        mean = (share * means).sum(0)
        variance = (share * (variances + (means - mean).square())).sum(0)
        repeat = x.shape[1] // norm.num_groups
        mean, variance = (each.repeat_interleave(repeat, dim=1) for each in (mean, variance))  # (B, C)
        scale = norm.weight.detach().cpu().double() * (variance + norm.eps).rsqrt()
        shift = norm.bias.detach().cpu().double() - mean * scale
        return scale[:, :, None, None].to(self._device, wide), shift[:, :, None, None].to(self._device, wide)


def _layers(half: Encoder | Decoder) -> list[nn.Module]:
    """What lies between `conv_in` and `conv_norm_out`, in order of execution."""
    net: Any = half  # whose lists of modules no type describes
    middle = net.mid_block
    mid = [middle.resnets[0], *middle.attentions, middle.resnets[1]]
    if isinstance(half, Decoder):
        return [*mid, *(layer for block in net.up_blocks for layer in (*block.resnets, *block.upsamplers))]
    return [*(layer for block in net.down_blocks for layer in (*block.resnets, *block.downsamplers)), *mid]


def _pads(conv: nn.Conv2d) -> tuple[int, int]:
    """Zeros before and after a map, along both sides; Downsample pads outside its convolution."""
    padding = int(conv.padding[0])
    return (0, 1) if conv.stride[0] == 2 else (padding, padding)


def _spans(length: int, parts: int) -> list[tuple[int, int]]:
    """(start, end) of at most `parts` equal pieces, the last one perhaps shorter."""
    size = math.ceil(length / parts)
    return [(start, min(start + size, length)) for start in range(0, length, size)]
