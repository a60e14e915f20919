"""Decoder optimisation: fine-tune the VAE's decoder on one edit, so that it meets the untouched background.

Paper    Avrahami et al. 2022 (Blended Latent Diffusion), arXiv:2206.02779, background reconstruction;
         Ackermann & Li 2022, arXiv:2210.12965, eq. 1
Tensors  latent (1, 4, h, w), already x scaling_factor; images (1, 3, H, W) in [-1, 1]; masks (1, 1, H, W), 1
         = edit
Copying  needs memory.py, pixels/masks.py, pixels/tiles.py. The VAE is any module with `decode`,
         `config.scaling_factor` and a part `decoder`
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from ..memory import until_it_fits
from ..pixels.masks import dilate
from ..pixels.tiles import tile_boxes

_PATIENCE = 10  # steps over which `stop` looks back
_BESIDE = 16  # pixels on either side of the mask's edge that are fitted
_FEWEST_CELLS = 16  # of a segment's side when memory is short


class Autoencoder(Protocol):
    """What is needed of a VAE: a module that decodes unscaled latents; its part `decoder` is trained."""

    config: Any

    def decode(self, latent: Tensor, /) -> Tensor: ...


VAE = TypeVar("VAE", bound=Autoencoder)


@dataclass(frozen=True)
class Segment:
    """One piece of a picture that the decoder is fitted to; a small picture is one segment."""

    latent: Tensor  # (1, 4, h, w): z_out of eq. 1, as the sampler left it
    reference: Tensor  # (1, 3, H, W) in [-1, 1]: x_in, the untouched picture
    mask: Tensor  # (1, 1, H, W), 1 = edit
    weight: Tensor | None = None  # (1, 1, H, W), of each pixel's error: 1 / coverage where segments overlap


def ring_segments(segments: Sequence[Segment], side: int, downscale: int) -> list[Segment]:
    """The crops of `side` pixels (less where a segment is smaller) within 16 pixels of the mask's edge.

    They are of a grid over each segment. All segments where no edge is.
    """
    crops = []
    for segment in segments:
        height, width = segment.mask.shape[-2:]
        beside = dilate(segment.mask, _BESIDE) * dilate(1 - segment.mask, _BESIDE)
        for box in tile_boxes(height, width, side, 0, downscale):
            if beside[..., *box.window].any():
                masked = segment.mask[..., *box.window]
                weight = None if segment.weight is None else segment.weight[..., *box.window]
                latent = segment.latent[..., *box.divided(downscale).window]
                crops.append(Segment(latent, segment.reference[..., *box.window], masked, weight))
    return crops or list(segments)


def optimize_decoder(
    vae: VAE,
    segments: Sequence[Segment],
    *,
    steps: int = 100,
    lr: float = 1e-4,
    background_weight: float = 100.0,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    stop: float = 0.0,
    on_step: Callable[[int, float], None] | None = None,
    on_split: Callable[[], None] | None = None,
) -> VAE:
    """A float32 copy of `vae` whose decoder was fitted to all `segments` together (eq. 1), by Adam.

    One step follows the gradient of the whole loss, gathered batch by batch of segments, so that only one
    batch's activations are held: of one segment 5.7 GiB for 512 x 512 pixels and Stable Diffusion's VAE.
    Where that does not fit, it starts again with half the batch, and from a batch of one on with all segments
    cut in two, after `on_split()`. Only `decoder` is trained (post_quant_conv is not, as in the official
    code). `vae` itself is never touched, whatever happens; the official code trains it in place and, after an
    out-of-memory error, keeps the result. `background_weight` is eq. 1's lambda: the paper does not give it,
    the official code has 100. `on_step(step, loss)` is called after each step. ValueError without a segment.

    What the papers do not have, for speed: `batch` segments of one size are decoded together, in `dtype`
    (bfloat16: by autocast, the trained weights stay in float32), and it ends before `steps` when ten of them
    lower the loss by less than the share `stop`.
    """
    if not segments:
        raise ValueError("decoder optimisation needs at least one segment, got none")

    def fit(work: tuple[Sequence[Segment], int]) -> VAE:
        pieces, together = work
        return _fit(vae, pieces, steps, lr, background_weight, together, dtype, stop, on_step)

    def smaller(work: tuple[Sequence[Segment], int]) -> tuple[Sequence[Segment], int] | None:
        pieces, together = work
        if together > 1:
            return pieces, together // 2
        halves = [half for piece in pieces for half in _halves(piece)]
        if len(halves) == len(pieces):
            return None
        if on_split is not None:
            on_split()
        return halves, 1

    return until_it_fits(fit, (segments, min(batch, len(segments))), smaller)


def _fit(
    vae: Any, segments: Sequence[Segment], steps: int, lr: float, background_weight: float, batch: int,
    dtype: torch.dtype, stop: float, on_step: Callable[[int, float], None] | None,
) -> Any:  # fmt: skip
    with torch.inference_mode(False), torch.enable_grad():  # whatever the caller is in
        tuned: Any = copy.deepcopy(vae)
        tuned.float().eval().requires_grad_(False)
        prepared = [_prepared(tuned, segment) for segment in segments]  # x_out by the weights before any step
        work = prepared if batch == 1 else _batched(prepared, batch)
        if not hasattr(tuned, "decoder"):  # a pixel-space model's identity: there is nothing to make up for
            return tuned
        parameters = list(tuned.decoder.requires_grad_(True).parameters())
        # Normalised by all elements of all segments: with one segment, the plain means of the official code.
        elements = sum(reference.numel() for _, _, reference, _, _ in work)
        optimizer = torch.optim.Adam(parameters, lr=lr)
        low = dtype != torch.float32
        losses: list[float] = []
        for step in range(steps):
            optimizer.zero_grad(set_to_none=True)
            total = 0.0
            for latent, x_out, reference, mask, weight in work:
                with torch.autocast(latent.device.type, dtype if low else None, enabled=low):
                    decoded = tuned.decode(latent)
                decoded = decoded.float()
                edit = mask * (decoded - x_out) ** 2  # eq. 1: the sum of w m (D - x_out)^2
                background = (1 - mask) * (decoded - reference) ** 2  # + lambda w (1 - m) (D - x_in)^2
                error = edit + background_weight * background
                loss = (error if weight is None else weight * error).sum() / elements
                loss.backward()
                total += loss.item()
            optimizer.step()
            if on_step is not None:
                on_step(step, total)
            losses.append(total)
            if stop and step >= _PATIENCE and losses[-1 - _PATIENCE] - total < stop * losses[-1 - _PATIENCE]:
                break
        optimizer.zero_grad(set_to_none=True)
        return tuned.requires_grad_(False)


Work = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]  # latent, x_out, reference, mask, weight


def _batched(work: Sequence[Work], batch: int) -> list[Work]:
    """The same pieces, at most `batch` of one size together."""
    alike: dict[tuple[object, ...], list[Work]] = {}
    for piece in work:
        alike.setdefault((piece[0].shape, piece[4] is None), []).append(piece)
    groups = [same[i : i + batch] for same in alike.values() for i in range(0, len(same), batch)]
    joined: list[Work] = []
    for group in groups:
        latent, x_out, reference, mask = (torch.cat([p[i] for p in group]) for i in range(4))  # pyright: ignore
        weights = [p[4] for p in group if p[4] is not None]
        joined.append((latent, x_out, reference, mask, torch.cat(weights) if weights else None))
    return joined


def _halves(segment: Segment) -> list[Segment]:
    """`segment` cut in two across its longer side; itself if that is short. Beyond the cut the decoder then
    sees zeros.
    """
    height, width = segment.latent.shape[-2:]
    dim = -2 if height >= width else -1
    cells = segment.latent.shape[dim]
    if cells < 2 * _FEWEST_CELLS:
        return [segment]
    factor = segment.reference.shape[dim] // cells

    def part(x: Tensor | None, start: int, stop: int) -> Any:
        return None if x is None else x.narrow(dim, start, stop - start)

    return [
        Segment(
            part(segment.latent, a, b),
            *(part(x, a * factor, b * factor) for x in (segment.reference, segment.mask, segment.weight)),
        )
        for a, b in ((0, cells // 2), (cells // 2, cells))
    ]


def _prepared(vae: Any, segment: Segment) -> Work:
    """(unscaled latent, x_out, reference, mask, weight) of a segment, float32, fit for autograd."""
    device = next((p.device for p in vae.parameters()), segment.latent.device)
    given = (segment.latent / vae.config.scaling_factor, segment.reference, segment.mask, segment.weight)
    latent, reference, mask, weight = (
        None if x is None else x.detach().to(device, torch.float32).clone() for x in given
    )
    assert latent is not None and reference is not None and mask is not None
    with torch.no_grad():
        x_out = vae.decode(latent)
    if x_out.shape != reference.shape or mask.shape[-2:] != reference.shape[-2:]:
        raise ValueError(
            f"a segment's sizes differ: latent {tuple(latent.shape)} decodes to {tuple(x_out.shape)}, its reference is "
            f"{tuple(reference.shape)} and its mask {tuple(mask.shape)}"
        )
    return latent, x_out, reference, mask, weight
