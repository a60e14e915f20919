"""Latents to a stage's picture: decoder optimisation, decoding window by window, and the crossfade of tiles.

Papers   Ackermann & Li 2022, arXiv:2210.12965, eq. 1, lines 18 and 27 of Algorithm 1; Avrahami et al. 2022,
         arXiv:2206.02779 (Blended Latent Diffusion), background reconstruction
Tensors  latents (1, 4, h, w), scaled; pictures (1, 3, H, W) in [-1, 1]
"""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from ..latents import decode, encode
from . import official
from .decoder_opt import Segment, optimize_decoder
from .plan import Stage
from .stage import Edit


def decode_each(edit: Edit, stage: Stage, vae: Any, latents: Sequence[Tensor]) -> Iterator[Tensor]:
    """The pictures of a stage's latents, one at a time."""
    for number, latent in enumerate(latents, 1):
        picture = decode(vae, latent)
        edit.report(stage.name, "decode", number, len(latents))
        yield picture


def stage_picture(edit: Edit, stage: Stage, x_in: Tensor, latents: Sequence[Tensor]) -> Tensor:
    """The stage's picture from its boxes' latents, by a decoder fitted to `x_in`, the source at its size."""
    config, vae = edit.plan.config, edit.vae
    if config.decoder_optimization and config.decoderopt_steps > 0:
        if config.decoderopt_latents == "sampler":  # eq. 1: z_out is what the sampler left
            segments = [
                Segment(latent, x_in[..., *box.window], stage.mask[..., *box.window])
                for latent, box in zip(latents, stage.boxes, strict=True)
            ]
        else:
            latents, segments = _reencoded(edit, stage, x_in, latents)
        vae = optimize_decoder(
            vae,
            segments,
            steps=config.decoderopt_steps,
            lr=config.decoderopt_lr,
            background_weight=config.decoderopt_weight,
            on_step=lambda k, _: edit.report(stage.name, "optimize", k + 1, config.decoderopt_steps),
            on_split=lambda: edit.notes.append(
                f"{stage.name}: out of memory in decoder optimisation, went on with smaller segments"
            ),
        )
    picture = _blended(edit, stage, x_in, vae, latents)
    edit.show(f"{stage.name}, result", picture)
    return picture


def _reencoded(
    edit: Edit, stage: Stage, x_in: Tensor, latents: Sequence[Tensor]
) -> tuple[list[Tensor], list[Segment]]:
    """The latents, and the segments to fit to, of the official code: of the decoded picture, encoded anew."""
    plain = _blended(edit, stage, x_in, edit.vae, latents)
    tile = edit.plan.spec.native if len(stage.grid) > 1 else max(stage.size)
    segments = official.reencoded_segments(edit.vae, plain, x_in, stage.mask, tile)
    return [encode(edit.vae, plain[..., *box.window]) for box in stage.boxes], segments


def _blended(edit: Edit, stage: Stage, x_in: Tensor, vae: Any, latents: Sequence[Tensor]) -> Tensor:
    """The decoded boxes as one picture; where no tile was computed the untouched `x_in` shows."""
    pictures = decode_each(edit, stage, vae, latents)
    return edit.plan.rules.blend(pictures, stage.boxes, stage.grid, x_in, edit.plan.config.grid_overlap)
