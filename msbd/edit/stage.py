"""One stage of Algorithm 1: Blended Diffusion of some windows of a picture, from noise to clean latents.

Paper    Ackermann & Li 2022, arXiv:2210.12965; "line n" is a line of its Algorithm 1
Tensors  picture (1, 3, H, W) in [-1, 1]; latents (n, 4, h, w), scaled, h = H / 8; cells (1, 1, h, w), 1 =
         edit
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samplers.guidance import classifier_free_guidance
from samplers.repaint import blended_sample
from samplers.schedule import Denoiser, StepInfo

from ..latents import distilled_guidance, dtype_of, encode
from ..memory import in_batches, tiles_at_once, with_autoencoder
from ..noise import noise_windows
from ..pixels.box import Box
from ..pixels.masks import progressive_dilation
from ..pixels.tiles import TileBlend, covered
from ..solvers import make_solver
from .plan import EditPlan, Stage

Window = tuple[int, Box]  # number of the candidate, place in the stage's picture


@dataclass(frozen=True)
class Edit:
    """What stays the same through one edit: the nets, the plan, the texts, and who hears of the progress."""

    unet: nn.Module
    vae: Any
    alphas_cumprod: Tensor
    prediction_type: str  # one of PREDICTIONS
    plan: EditPlan
    cond: Tensor  # (1, 77, D), the prompt
    uncond: Tensor  # (1, 77, D), the negative prompt
    empty: Tensor  # (1, 77, D), ""
    report: Callable[[str, str, int, int], None]  # stage, task, step, total
    show: Callable[[str, Tensor], None]  # name, picture
    # Latents (n, 4, h, w) of candidates and a count -> the indices of so many of them, the best by CLIP.
    choose: Callable[[Tensor, int], Sequence[int]]
    large_vae: Any  # the autoencoder for whole stages: exact in tiles where they are large
    small_vae: Callable[[], Any] | None  # the same in less memory, where there is one
    seam_decoder: Any = None  # an AsymmetricAutoencoderKL, where the model has one
    notes: list[str] = field(default_factory=list)

    @property
    def sees_mask(self) -> bool:
        """Whether the U-Net is an inpainting one, which gets the mask and a masked latent besides."""
        channels = self.vae.config.latent_channels
        return getattr(getattr(self.unet, "config", None), "in_channels", channels) == 2 * channels + 1


@dataclass(frozen=True)
class Sampled:
    """How far a window is: x_t, at the end x_0, and the clean latent last seen in it, (1, 4, h, w) both."""

    x: Tensor
    pred_x0: Tensor


def sample_stage(edit: Edit, stage: Stage, x_tilde: Tensor, cells: Tensor) -> list[Tensor]:
    """The latent (1, 4, h, w) of each candidate that was kept or, where there is one, of each of the stage's
    windows.

    As many at once as memory allows; what a window becomes does not depend on its batch. `cells` is what to
    repaint: the stage's own, or all of it.
    """
    # lines 2-3: i = 1, ..., B
    windows = [(candidate, box) for candidate in range(stage.candidates) for box in stage.windows]
    begun: Mapping[Window, Sampled] = {}
    start, end = 0, len(stage.schedule)
    if stage.kept < stage.candidates:
        start = stage.halfway
        begun = _in_batches(edit, stage, x_tilde, cells, windows, {}, (0, start))
        best = edit.choose(torch.cat([begun[window].pred_x0 for window in windows]), stage.kept)
        windows = [windows[i] for i in best]
    # lines 4-14: `_blended_diffusion`
    finished = _in_batches(edit, stage, x_tilde, cells, windows, begun, (start, end))
    # line 15: x_0 joins the others
    # line 16: the next i
    return [finished[window].x for window in windows]


def with_vae(edit: Edit, stage: Stage, work: Callable[[Any], Tensor]) -> Tensor:
    """`work(vae)`; of a stage in one piece by the large one, out of memory by the small one."""
    if not stage.joint:
        return work(edit.vae)
    if edit.small_vae is None:
        return work(edit.large_vae)
    return with_autoencoder(
        work, edit.large_vae, edit.small_vae, lambda note: edit.notes.append(f"{stage.name}: {note}")
    )


def _in_batches(
    edit: Edit, stage: Stage, x_tilde: Tensor, cells: Tensor,
    windows: Sequence[Window], begun: Mapping[Window, Sampled], part: tuple[int, int],
) -> Mapping[Window, Sampled]:  # fmt: skip
    """The evaluations of `part` = (start, stop) of the schedule for each window, from `begun` on."""
    batch = edit.plan.config.tile_batch
    if stage.joint:
        batch = 1  # window; its tiles go in batches of their own
    elif stage.candidates > 1:
        batch = len(windows)
    elif batch is None:
        batch = _tiles_at_once(edit, stage)
    done: dict[Window, Sampled] = {}

    def sample(now: Sequence[Window]) -> Sequence[Sampled]:
        return _blended_diffusion(edit, stage, x_tilde, cells, now, begun, part, done=len(done))

    def halved(before: int, after: int) -> None:
        edit.notes.append(f"{stage.name}: out of memory with {before} at once, went on with {after}")

    for window, sampled in in_batches(windows, sample, batch, halved, alike=lambda window: window[1].size):
        done[window] = sampled
    return done


def _tiles_at_once(edit: Edit, stage: Stage) -> int:
    height, width = stage.boxes[0].divided(edit.vae.downscale).size
    return tiles_at_once(stage.mask.device, height * width)


def _blended_diffusion(
    edit: Edit, stage: Stage, x_tilde: Tensor, cells: Tensor,
    windows: Sequence[Window], begun: Mapping[Window, Sampled], part: tuple[int, int], *, done: int,
) -> list[Sampled]:  # fmt: skip
    """n windows of one size, `done` others of the stage having been through this `part` of the schedule."""
    config, rules, factor = edit.plan.config, edit.plan.rules, edit.vae.downscale
    boxes = list(dict.fromkeys(box for _, box in windows))  # one where all windows are candidates
    in_cells = [box.divided(factor).window for box in boxes]
    sources = torch.cat([x_tilde[..., *box.window] for box in boxes])
    known = with_vae(edit, stage, lambda vae: encode(vae, sources))
    beside = _beside_latents(edit, stage, sources, boxes) if edit.sees_mask else None
    noise = noise_windows(
        config.seed,
        stage.number,
        (cells.shape[-2], cells.shape[-1]),
        [(candidate, box.divided(factor)) for candidate, box in windows],
        shared=rules.shared_noise(stage.whole_run),
    )
    if stage.joint:  # the picture stays where no tile is computed
        computed = covered(torch.ones_like(cells), [box.divided(factor) for box in stage.boxes])
    else:
        computed = torch.ones_like(cells)

    def mask_at(k: int) -> Tensor:
        grown = progressive_dilation(cells, k / len(stage.schedule)) * computed
        return torch.cat([grown[..., *window] for window in in_cells])

    start, stop = part
    if start > 0:
        x = torch.cat([begun[window].x for window in windows])
    else:  # line 4: x_T ~ q(x_T | x~)
        n = noise("init", 0, (len(windows), *known.shape[1:])).to(known)
        from_noise = stage.whole_run and config.start_from == "noise"
        clean = known.expand(len(windows), -1, -1, -1)
        x = n if from_noise else rules.start_latent(clean, stage.schedule[0], edit.alphas_cumprod, n)
    tiles, total = len(stage.boxes) if stage.joint else 1, stage.evaluations
    before = (start * stage.candidates + done * (stop - start)) * tiles
    last: list[StepInfo] = []

    def on_step(info: StepInfo) -> None:
        last[:] = [info]
        now = (info.step + 1 - start) * len(windows) * tiles
        edit.report(stage.name, "sample", before + now, total)

    # lines 5-14: the plan that `algorithm_1` of samplers/repaint.py made, carried out
    x = blended_sample(
        _denoiser(edit, stage, beside),
        x,
        stage.schedule,
        known=known,
        mask=mask_at
        if config.dilate_mask
        else torch.cat([(cells * computed)[..., *window] for window in in_cells]),
        noise=noise,
        solver=make_solver(config.sampler, config.eta),
        prediction=edit.prediction_type,
        start=start,
        stop=stop,
        on_step=on_step,
    )
    return [Sampled(*each) for each in zip(x.split(1), last[0].pred_x0.split(1), strict=True)]


def _beside_latents(edit: Edit, stage: Stage, sources: Tensor, boxes: Sequence[Box]) -> Tensor:
    """What an inpainting U-Net gets beside the latents of these windows, (n, 5, h, w).

    Rombach et al. 2022 (arXiv:2112.10752), section 4.5, and its model's code: the mask, by the nearest pixel
    of each cell, and the encoded picture with grey in its place. Of a later stage the picture is x~, of which
    only what is not masked is seen. A mask that is dilated on the way is the blending's; the net gets m.
    """
    mask = (torch.cat([stage.mask[..., *box.window] for box in boxes]) >= 0.5).to(sources)
    hidden = with_vae(edit, stage, lambda vae: encode(vae, sources * (1 - mask)))
    return torch.cat([F.interpolate(mask, size=hidden.shape[-2:], mode="nearest").to(hidden), hidden], 1)


def _denoiser(edit: Edit, stage: Stage, beside: Tensor | None = None) -> Denoiser:
    """p_theta of lines 6, 11 and 23, as the U-Net predicts: guided by the prompt, or of the empty text.

    `beside` (n or 1, C, h, w) is what the U-Net gets beside the latents.
    """
    with_prompt = stage.number == 0 or edit.plan.config.conditional_upscale
    dtype, scale = dtype_of(edit.unet), edit.plan.config.guidance_scale if with_prompt else 1.0
    told, scale = distilled_guidance(edit.unet, scale)

    def model(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return edit.unet(x.to(dtype), t, context.to(dtype), **told).float()

    cond, uncond = (edit.cond, edit.uncond) if with_prompt else (edit.empty, edit.empty)
    whole = _of_tiles(edit, stage, model) if stage.joint else model
    if beside is not None:
        whole = partial(_with_beside, whole, beside)
    return classifier_free_guidance(whole, cond, uncond, scale)


def _with_beside(
    model: Callable[[Tensor, Tensor, Tensor], Tensor], beside: Tensor, x: Tensor, t: Tensor, context: Tensor
) -> Tensor:
    """`model` of latents x (k n, 4, h, w) with `beside` (n, C, h, w) as further channels."""
    return model(torch.cat([x, beside.repeat(len(x) // len(beside), 1, 1, 1)], 1), t, context)


def _of_tiles(
    edit: Edit, stage: Stage, model: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """`model` of a whole stage: what it predicts for each computed tile, crossfaded; elsewhere 0."""
    factor = edit.vae.downscale
    grid, tiles = ([box.divided(factor) for box in boxes] for boxes in (stage.grid, stage.boxes))
    batch = edit.plan.config.tile_batch or _tiles_at_once(edit, stage)

    def halved(before: int, after: int) -> None:
        nonlocal batch
        batch = after
        edit.notes.append(f"{stage.name}: out of memory with {before} at once, went on with {after}")

    def predict(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        def some(now: Sequence[Box]) -> Sequence[Tensor]:
            pieces = torch.cat([x[..., *tile.window] for tile in now])
            return model(pieces, t, context.repeat(len(now), 1, 1)).split(len(x))

        blend = TileBlend(grid, x.shape[-2], x.shape[-1])
        for tile, eps in in_batches(tiles, some, batch, halved, alike=lambda tile: tile.size):
            blend.add(tile, eps)
        return blend.result(x.new_zeros(()))

    return predict
