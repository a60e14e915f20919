"""One stage of Algorithm 1: Blended Diffusion of some windows of a picture, from noise to clean latents.

Paper    Ackermann & Li 2022, arXiv:2210.12965; "line n" is a line of its Algorithm 1
Tensors  picture (1, 3, H, W) in [-1, 1]; latents (n, 4, h, w), scaled, h = H / 8; cells (1, 1, h, w), 1 =
         edit
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from samplers.guidance import classifier_free_guidance
from samplers.repaint import blended_sample
from samplers.schedule import Denoiser, v_prediction

from ..latents import dtype_of, encode
from ..memory import in_batches, tiles_at_once
from ..noise import noise_windows
from ..pixels.box import Box
from ..pixels.masks import progressive_dilation
from .plan import EditPlan, Stage

Window = tuple[int, Box]  # number of the candidate, place in the stage's picture


@dataclass(frozen=True)
class Edit:
    """What stays the same through one edit: the nets, the plan, the texts, and who hears of the progress."""

    unet: nn.Module
    vae: Any
    alphas_cumprod: Tensor
    prediction_type: str  # epsilon or v_prediction
    plan: EditPlan
    cond: Tensor  # (1, 77, D), the prompt
    uncond: Tensor  # (1, 77, D), the negative prompt
    empty: Tensor  # (1, 77, D), ""
    report: Callable[[str, str, int, int], None]  # stage, task, step, total
    show: Callable[[str, Tensor], None]  # name, picture
    notes: list[str] = field(default_factory=list)


def sample_stage(edit: Edit, stage: Stage, x_tilde: Tensor, cells: Tensor) -> list[Tensor]:
    """The latent (1, 4, h, w) of each candidate or, where there is one, of each of the stage's boxes.

    As many at once as memory allows; what a window becomes does not depend on its batch. `cells` is what to
    repaint: the stage's own, or all of it.
    """
    # lines 2-3: i = 1, ..., B
    windows = [(candidate, box) for candidate in range(stage.candidates) for box in stage.boxes]
    batch = edit.plan.config.tile_batch
    if stage.candidates > 1:
        batch = stage.candidates
    elif batch is None:
        height, width = stage.boxes[0].divided(edit.vae.downscale).size
        batch = tiles_at_once(cells.device, height * width)
    latents: dict[Window, Tensor] = {}

    def sample(now: Sequence[Window]) -> Sequence[Tensor]:
        done = len(latents)
        # lines 4-14: `_blended_diffusion`
        return _blended_diffusion(edit, stage, x_tilde, cells, now, done=done, total=len(windows)).split(1)

    def halved(before: int, after: int) -> None:
        edit.notes.append(f"{stage.name}: out of memory with {before} at once, went on with {after}")

    for window, latent in in_batches(windows, sample, batch, halved, alike=lambda window: window[1].size):
        latents[window] = latent  # line 15: x_0 joins the others
    # line 16: the next i
    return [latents[window] for window in windows]


def _blended_diffusion(
    edit: Edit, stage: Stage, x_tilde: Tensor, cells: Tensor, windows: Sequence[Window], *, done: int, total: int
) -> Tensor:  # fmt: skip
    """Latents (n, 4, h, w) of n windows of one size, `done` of the stage's `total` being finished."""
    config, rules, factor = edit.plan.config, edit.plan.rules, edit.vae.downscale
    boxes = list(dict.fromkeys(box for _, box in windows))  # one where all windows are candidates
    in_cells = [box.divided(factor).window for box in boxes]
    known = encode(edit.vae, torch.cat([x_tilde[..., *box.window] for box in boxes]))
    noise = noise_windows(
        config.seed,
        stage.number,
        (cells.shape[-2], cells.shape[-1]),
        [(candidate, box.divided(factor)) for candidate, box in windows],
        shared=rules.shared_noise(stage.whole_run),
    )

    def mask_at(k: int) -> Tensor:
        grown = progressive_dilation(cells, k / len(stage.schedule))
        return torch.cat([grown[..., *window] for window in in_cells])

    # line 4: x_T ~ q(x_T | x~)
    n = noise("init", 0, (len(windows), *known.shape[1:])).to(known)
    from_noise = stage.whole_run and config.start_from == "noise"
    start = known.expand(len(windows), -1, -1, -1)
    x = n if from_noise else rules.start_latent(start, stage.schedule[0], edit.alphas_cumprod, n)
    # lines 5-14: the plan that `algorithm_1` of samplers/repaint.py made, carried out
    return blended_sample(
        _denoiser(edit, with_prompt=stage.number == 0 or config.conditional_upscale),
        x,
        stage.schedule,
        known=known,
        mask=mask_at if config.dilate_mask else torch.cat([cells[..., *window] for window in in_cells]),
        noise=noise,
        eta=config.eta,
        on_step=lambda info: edit.report(
            stage.name, "sample", done * info.total + (info.step + 1) * len(windows), total * info.total
        ),
    )


def _denoiser(edit: Edit, *, with_prompt: bool) -> Denoiser:
    """p_theta of lines 6, 11 and 23: guided by the prompt, or of the empty text alone."""
    dtype, scale = dtype_of(edit.unet), edit.plan.config.guidance_scale if with_prompt else 1.0

    def model(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return edit.unet(x.to(dtype), t, context.to(dtype)).float()

    cond, uncond = (edit.cond, edit.uncond) if with_prompt else (edit.empty, edit.empty)
    denoise = classifier_free_guidance(model, cond, uncond, scale)
    return v_prediction(denoise, edit.alphas_cumprod) if edit.prediction_type == "v_prediction" else denoise
