"""Latents to a stage's picture, made to meet the picture around it: each of EditConfig.seam's ways.

Papers   Ackermann & Li 2022, arXiv:2210.12965, eq. 1, lines 18 and 27 of Algorithm 1; Avrahami et al. 2022,
         arXiv:2206.02779 (Blended Latent Diffusion), background reconstruction; Zhu et al. 2023 (Asymmetric
         VQGAN), arXiv:2306.04632; Perez, Gangnet & Blake 2003 (Poisson image editing)
Tensors  latents (1, 4, h, w), scaled; pictures (1, 3, H, W) in [-1, 1]
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..latents import decode, dtype_of, encode
from ..pixels.box import Box
from ..pixels.masks import feather
from ..pixels.membrane import membrane
from . import official
from .closed_form import refit, with_features
from .decoder_opt import Segment, optimize_decoder, ring_segments
from .plan import Stage
from .stage import Edit, with_vae

_RING_BATCH = 8  # crops of the ring that Adam decodes together
Decode = Callable[[Tensor, Box], Tensor]  # a latent and its place in the stage's picture -> the picture there


def decode_each(edit: Edit, stage: Stage, vae: Any, latents: Sequence[Tensor]) -> Iterator[Tensor]:
    """The pictures of a stage's latents, one at a time."""
    for number, latent in enumerate(latents, 1):
        picture = decode(vae, latent)
        edit.report(stage.name, "decode", number, len(latents))
        yield picture


def stage_picture(edit: Edit, stage: Stage, x_in: Tensor, latents: Sequence[Tensor]) -> Tensor:
    """The stage's picture of its windows' latents, made to meet `x_in`, the source at its size."""
    config, last = edit.plan.config, stage.number == len(edit.plan.stages) - 1
    seam = config.seam if config.seam_stages == "all" or last else "none"
    if seam == "adam" and config.decoderopt_steps > 0:
        picture = _by_adam(edit, stage, x_in, latents)
    elif seam == "closed-form" and hasattr(edit.vae, "decoder"):
        picture = _by_closed_form(edit, stage, x_in, latents)
    elif seam == "asymmetric":
        picture = _by_asymmetric(edit, stage, x_in, latents)
    else:

        def plain(latent: Tensor, box: Box) -> Tensor:
            return with_vae(edit, stage, lambda vae: decode(vae, latent))

        picture = _blended(edit, stage, x_in, latents, stage.windows, plain)
        if seam == "membrane":
            picture = _by_membrane(edit, stage, x_in, picture)
    edit.show(f"{stage.name}, result", picture)
    return picture


def _by_membrane(edit: Edit, stage: Stage, x_in: Tensor, picture: Tensor) -> Tensor:
    """Poisson's correction, which fades out inside the mask: what does not belong there is not to be spread.

    Where the edit ends at the mask's edge, as a ball that fills it, the step there is its outline. The fade
    is a raised cosine: nearly all of the correction beside the edge, nothing of it from `membrane_reach` on.
    """
    met, reach = membrane(picture, x_in, stage.mask), edit.plan.config.membrane_reach
    if reach:
        kept = 0.5 + 0.5 * torch.cos(torch.pi * feather(stage.mask, reach))
        met = torch.where(stage.mask > 0, torch.lerp(picture, met, kept), met)  # `met` is the source there
    edit.report(stage.name, "seam", 1, 1)
    return met.clamp(-1, 1)


def _by_adam(edit: Edit, stage: Stage, x_in: Tensor, latents: Sequence[Tensor]) -> Tensor:
    """Decoder optimisation, eq. 1: the decoder's weights are fitted to `x_in` around the mask."""
    config, latents = edit.plan.config, _of_boxes(edit, stage, latents)
    if config.decoderopt_latents == "sampler":  # eq. 1: z_out is what the sampler left
        segments = [
            Segment(latent, x_in[..., *box.window], stage.mask[..., *box.window])
            for latent, box in zip(latents, stage.boxes, strict=True)
        ]
    else:
        latents, segments = _reencoded(edit, stage, x_in, latents)
    if config.decoderopt_area == "ring":
        segments = ring_segments(segments, edit.plan.spec.native, edit.vae.downscale)
    vae = optimize_decoder(
        edit.vae,
        segments,
        steps=config.decoderopt_steps,
        lr=config.decoderopt_lr,
        background_weight=config.decoderopt_weight,
        batch=1 if config.decoderopt_area == "tiles" else _RING_BATCH,
        dtype=getattr(torch, config.decoderopt_dtype),
        stop=config.decoderopt_stop,
        on_step=lambda k, _: edit.report(stage.name, "optimize", k + 1, config.decoderopt_steps),
        on_split=lambda: edit.notes.append(
            f"{stage.name}: out of memory in decoder optimisation, went on with smaller segments"
        ),
    )
    return _blended(edit, stage, x_in, latents, stage.boxes, lambda latent, box: decode(vae, latent))


def _by_closed_form(edit: Edit, stage: Stage, x_in: Tensor, latents: Sequence[Tensor]) -> Tensor:
    """Eq. 1 for the decoder's last convolution alone."""
    conv, weight = edit.vae.decoder.conv_out, edit.plan.config.decoderopt_weight

    def refitted(latent: Tensor, box: Box) -> Tensor:
        unscaled = (latent / edit.vae.config.scaling_factor).to(dtype_of(edit.vae))
        features = with_vae(edit, stage, lambda vae: with_features(vae).decode(unscaled))
        around, mask = x_in[..., *box.window], stage.mask[..., *box.window]
        return refit(features, conv, around, mask, background_weight=weight).clamp(-1, 1)

    return _blended(edit, stage, x_in, latents, stage.windows, refitted)


def _by_asymmetric(edit: Edit, stage: Stage, x_in: Tensor, latents: Sequence[Tensor]) -> Tensor:
    """The decoder that sees the picture around the mask, tile by tile."""
    net = edit.seam_decoder

    def decode_beside(latent: Tensor, box: Box) -> Tensor:
        dtype = dtype_of(net)
        unscaled = (latent / net.config.scaling_factor).to(dtype)
        around, mask = (x[..., *box.window].to(dtype) for x in (x_in, stage.mask))
        return net.decode(unscaled, around, mask).float().clamp(-1, 1)

    return _blended(edit, stage, x_in, _of_boxes(edit, stage, latents), stage.boxes, decode_beside)


def _of_boxes(edit: Edit, stage: Stage, latents: Sequence[Tensor]) -> Sequence[Tensor]:
    """The latent of each computed tile, cut out where the tiles were sampled jointly."""
    if not stage.joint:
        return latents
    return [latents[0][..., *box.divided(edit.vae.downscale).window] for box in stage.boxes]


def _reencoded(
    edit: Edit, stage: Stage, x_in: Tensor, latents: Sequence[Tensor]
) -> tuple[list[Tensor], list[Segment]]:
    """The latents, and the segments to fit to, of the official code: of the decoded picture, encoded anew."""
    plain = _blended(edit, stage, x_in, latents, stage.boxes, lambda latent, box: decode(edit.vae, latent))
    tile = edit.plan.spec.native if len(stage.grid) > 1 else max(stage.size)
    segments = official.reencoded_segments(edit.vae, plain, x_in, stage.mask, tile)
    return [encode(edit.vae, plain[..., *box.window]) for box in stage.boxes], segments


def _blended(
    edit: Edit, stage: Stage, x_in: Tensor, latents: Sequence[Tensor], boxes: Sequence[Box], decode_at: Decode
) -> Tensor:
    """The decoded boxes as one picture; where no tile was computed the untouched `x_in` shows."""

    def pictures() -> Iterator[Tensor]:
        for number, (latent, box) in enumerate(zip(latents, boxes, strict=True), 1):
            picture = decode_at(latent, box)
            edit.report(stage.name, "decode", number, len(boxes))
            yield picture

    grid = stage.grid if boxes == stage.boxes else boxes
    return edit.plan.rules.blend(pictures(), boxes, grid, x_in, edit.plan.config.grid_overlap)
