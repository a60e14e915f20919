"""Multi-Stage Blended Diffusion: repaint a masked region of a large picture from a text prompt.

Paper    Ackermann & Li 2022, arXiv:2210.12965; "line n" below is a line of its Algorithm 1, "A.2" its appendix
Tensors  image (1, 3, H, W) in [-1, 1] · mask (1, 1, H, W), 1 = edit · latents (n, 4, h, w), scaled, h = H / 8
Nets     arrive loaded, in evaluation mode, on one device; a pixel-space model brings an identity autoencoder

Preset `official` replaces some formulas by those of the official code; each place says `official.` and why ours differs is
said there.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from samplers.guidance import classifier_free_guidance
from samplers.repaint import Evaluation, blended_sample, repaint_plan
from samplers.schedule import (
    Denoiser,
    NoiseSource,
    leading_timesteps,
    q_sample,
    start_timesteps,
)

from . import official
from .crops import Box, mask_box
from .decoder_opt import Segment, optimize_decoder
from .masks import feather, latent_mask, progressive_dilation
from .noise import noise_windows
from .plan import EditConfig, EditPlan, Measures, Stage, plan_edit, stage_mask
from .rerank import CLIP_MEAN, CLIP_STD, clip_scores
from .resize import low_pass, put_back, resize, take
from .tiles import TileBlend
from .upscale import super_resolve


@dataclass(frozen=True)
class EditStep:
    """Where an edit is: `step` of `total` (counted from 1) of a task ("sample", "decode" or "optimize") of a stage."""

    stage: str
    task: str
    step: int
    total: int


@dataclass(frozen=True)
class EditResult:
    """The edited picture, equal to the source bit for bit outside the mask, and how it came about."""

    image: Tensor  # (1, 3, H, W) in [-1, 1]
    plan: EditPlan
    candidates: Tensor  # (B, 3, h, w): first-stage pictures before decoder optimisation
    scores: Tensor | None  # (B,) CLIP's, higher = better; None without reranking
    chosen: int  # index of the candidate that was taken
    seconds: dict[str, float] = field(default_factory=dict)  # by stage and task


@dataclass(frozen=True)
class _Edit:
    """What stays the same through one edit."""

    plan: EditPlan
    source: Tensor  # x_in under the crop, (1, 3, h, w)
    mask: Tensor  # m under the crop, (1, 1, h, w)
    cond: Tensor  # (1, 77, D), the prompt
    uncond: Tensor  # (1, 77, D), the negative prompt
    empty: Tensor  # (1, 77, D), ""
    seed: int
    report: Callable[[str, str, int, int], None]
    show: Callable[[str, Tensor], None]

    @property
    def config(self) -> EditConfig:
        return self.plan.config

    def at(self, stage: Stage) -> tuple[Tensor, Tensor]:
        """x_in and m at the stage's size."""
        return resize(self.source, stage.size), stage_mask(self.mask, stage.size, self.config)


class EditPipeline:
    """Algorithm 1 over ready nets: `pipeline(image, mask, prompt, config=...)`."""

    def __init__(
        self,
        *,
        unet: nn.Module,
        vae: Any,
        text_encoder: Callable[[Tensor], Tensor],
        tokenizer: Callable[[list[str]], Tensor],
        alphas_cumprod: Tensor,
        measures: Measures | None = None,
        upscaler: nn.Module | None = None,
        clip: Any = None,
        clip_tokenizer: Callable[[list[str]], Tensor] | None = None,
        clip_size: int = 224,
        clip_mean: Sequence[float] = CLIP_MEAN,
        clip_std: Sequence[float] = CLIP_STD,
    ) -> None:
        self.unet, self.vae, self.upscaler = unet, vae, upscaler
        self.text_encoder, self.tokenizer = text_encoder, tokenizer
        self.alphas_cumprod = alphas_cumprod
        self.measures = Measures() if measures is None else measures
        self.clip, self.clip_tokenizer = clip, clip_tokenizer or tokenizer
        self.clip_pixels = {"size": clip_size, "mean": clip_mean, "std": clip_std}

    def plan(self, mask: Tensor, config: EditConfig) -> EditPlan:
        """What an edit of `mask` (1, 1, H, W) would do; nothing is computed. ValueError for an empty mask or unsuitable options."""
        return plan_edit(mask, config, self.measures)

    def evaluations(self, stage: Stage, config: EditConfig) -> int:
        """Evaluations of the U-Net for `stage`, counting each candidate and tile once and both halves of the guidance as one."""
        return len(self._schedule(stage, config)) * stage.candidates * len(stage.boxes)

    @torch.no_grad()  # not inference_mode: decoder optimisation needs tensors that autograd may save
    def __call__(
        self,
        image: Tensor,
        mask: Tensor,
        prompt: str,
        *,
        config: EditConfig | None = None,
        generator: torch.Generator | None = None,
        on_step: Callable[[EditStep], None] | None = None,
        on_picture: Callable[[str, Tensor], None] | None = None,
    ) -> EditResult:
        """Repaint `mask` (1, 1, H, W; 1 = edit) of `image` (1, 3, H, W in [-1, 1]) to match `prompt`.

        One number is drawn from `generator` to seed all noise; without one, `config.seed` does. `on_step` follows the progress,
        `on_picture(name, (1, 3, h, w))` sees every intermediate picture (the paper's figure 3). ValueError for sizes that do
        not match, an empty mask, options the model cannot follow.
        """
        self._check(image, mask)
        plan = self.plan(mask, EditConfig() if config is None else config)
        seconds: dict[str, float] = {}
        edit = self._begin(image, mask, prompt, plan, generator, _reporter(on_step, seconds), on_picture)
        if plan.config.mode == "segments":
            return self._finish(edit, image, mask, self._segments(edit), seconds)
        candidates, latents = self._first_stage(edit)  # lines 1-16
        scores, chosen = self._rerank(edit, candidates, prompt)  # line 17
        edited = self._to_picture(edit, 0, [latents[chosen : chosen + 1]])  # line 18
        for number in range(1, len(plan.stages)):
            edited = self._upscale_stage(edit, number, edited)  # lines 19-28
        result = self._finish(edit, image, mask, edited, seconds)  # line 29
        return replace(result, candidates=candidates, scores=scores, chosen=chosen)

    # ---- the stages of Algorithm 1 ----------------------------------------------------------------------------------------------

    def _first_stage(self, edit: _Edit) -> tuple[Tensor, Tensor]:
        """Blended Diffusion with RePaint at the model's own size: B pictures (B, 3, h, w) and their latents."""
        stage = edit.plan.stages[0]
        source, mask = edit.at(stage)  # x~
        edit.show("first stage, source", source)
        edit.show("first stage, mask", mask.expand_as(source) * 2 - 1)
        windows = [(candidate, stage.boxes[0]) for candidate in range(stage.candidates)]
        latents = self._blended_diffusion(edit, 0, source, mask, windows)
        pictures = torch.cat([self._decode(self.vae, latent[None]) for latent in latents])
        for number, picture in enumerate(pictures):
            edit.show(f"first stage, candidate {number}", picture[None])
        return pictures, latents

    def _rerank(self, edit: _Edit, candidates: Tensor, prompt: str) -> tuple[Tensor | None, int]:
        """CLIP's scores of the candidates and the index of the best."""
        if self.clip is None or not edit.config.clip_reranking:
            return None, 0
        ids = self.clip_tokenizer([prompt]).to(candidates.device)
        box = mask_box(edit.at(edit.plan.stages[0])[1]) if edit.config.rerank_area == "mask" else None
        scores = clip_scores(self.clip, ids, candidates, box=box, **self.clip_pixels)
        return scores, int(scores.argmax())

    def _upscale_stage(self, edit: _Edit, number: int, previous: Tensor) -> Tensor:
        """Enlarge the last stage's picture, refresh it by SDEdit and Blended Diffusion, in tiles where it is large."""
        stage, config = edit.plan.stages[number], edit.config
        reference, mask = edit.at(stage)
        input_size = (previous.shape[-2], previous.shape[-1])
        if config.formulas == "official":
            previous = official.truncate_to_8_bits(previous)
        enlarged = super_resolve(previous, stage.size, config.upscaling_mode, self.upscaler)
        edit.show(f"{stage.name}, upscaled", enlarged)
        if not config.blended_upscale:  # ablation: plain SDEdit of the whole crop
            mask, x_tilde = torch.ones_like(mask), enlarged
        else:
            x_tilde = mask * enlarged + (1 - mask) * self._low_pass(reference, input_size, config)  # line 20
        edit.show(f"{stage.name}, input", x_tilde)
        boxes = stage.boxes if config.blended_upscale else stage.grid
        latents = self._in_batches(edit, number, x_tilde, mask, boxes)  # lines 21-26
        picture = self._to_picture(edit, number, latents)  # line 27
        edit.show(f"{stage.name}, result", picture)
        return picture

    def _segments(self, edit: _Edit) -> Tensor:
        """The paper's second baseline: each segment of the full-size crop is repainted by itself, from pure prompt."""
        source, mask = edit.at(edit.plan.stages[0])
        return self._to_picture(edit, 0, self._in_batches(edit, 0, source, mask, edit.plan.stages[0].boxes))

    def _finish(
        self, edit: _Edit, image: Tensor, mask: Tensor, edited: Tensor, seconds: dict[str, float]
    ) -> EditResult:
        """x_out = m x + (1 - m) x_in at full size; a feather acts inside the mask only."""
        whole = put_back(
            image.float(), resize(edited, edit.plan.crop.size).to(image.device, torch.float32), edit.plan.crop
        )
        weight = feather(mask, edit.config.feather).to(image.device, torch.float32)
        blended = weight * whole + (1 - weight) * image
        result = torch.where(weight > 0, blended.to(image), image)  # a selection: exact outside the mask
        return EditResult(result, edit.plan, edited, None, 0, seconds)

    # ---- sampling ---------------------------------------------------------------------------------------------------------------

    def _blended_diffusion(
        self, edit: _Edit, number: int, source: Tensor, mask: Tensor, windows: Sequence[tuple[int, Box]]
    ) -> Tensor:
        """Latents (n, 4, h, w) sampled for `windows` = (candidate, box in pixels) of `source`, all boxes of one size."""
        stage, config, factor = edit.plan.stages[number], edit.config, self.vae.downscale
        boxes = [box for _, box in windows]
        sources = torch.cat(
            [take(source, box) for box in dict.fromkeys(boxes)]
        )  # one if all windows are the same
        known = self._encode(sources)
        masks = torch.cat([take(mask, box) for box in dict.fromkeys(boxes)])
        m = latent_mask(masks, factor, config.latent_mask).to(known)
        plan = self._schedule(stage, config)
        cells = tuple(-(-side // factor) for side in stage.size)
        noise = noise_windows(edit.seed, number, cells, [(c, box.divided(factor)) for c, box in windows])
        from_noise = number == 0 and stage.start == 1 and config.start_from == "noise"
        x = self._start(known.expand(len(windows), -1, -1, -1), plan[0], noise, config, from_noise)

        def grown(step: int) -> Tensor:
            return progressive_dilation(m, step / len(plan))

        return blended_sample(
            self._denoiser(edit, first=number == 0),
            x,
            plan,
            known=known,
            mask=grown if config.dilate_mask else m,
            noise=noise,
            eta=config.eta,
            share_known_noise=config.formulas == "official",
            on_step=lambda info: edit.report(stage.name, "sample", info.step + 1, info.total),
        )

    def _in_batches(
        self, edit: _Edit, number: int, source: Tensor, mask: Tensor, boxes: Sequence[Box]
    ) -> list[Tensor]:
        """`_blended_diffusion` of every box, as many at once as memory allows; latents (1, 4, h, w) in the order of `boxes`."""
        stage = edit.plan.stages[number]
        quiet = replace(edit, report=lambda *_: None)
        batch = edit.config.tile_batch or self._tile_batch(boxes[0])
        latents: dict[Box, Tensor] = {}
        while len(latents) < len(boxes):
            left = [box for box in boxes if box not in latents]
            now = [box for box in left if box.size == left[0].size][:batch]
            try:
                sampled = self._blended_diffusion(quiet, number, source, mask, [(0, box) for box in now])
            except torch.OutOfMemoryError:
                if batch == 1:
                    raise
                batch //= (
                    2  # retried below, outside this clause, so that the failed batch's memory is free by then
                )
                continue
            latents.update(zip(now, sampled[:, None], strict=True))
            edit.report(stage.name, "sample", len(latents), len(boxes))
        return [latents[box] for box in boxes]

    def _schedule(self, stage: Stage, config: EditConfig) -> tuple[Evaluation, ...]:
        """Which timesteps a stage evaluates, and what is blended in and re-noised after each."""
        if config.formulas == "official":
            return official.evaluations(
                stage.num_steps, stage.start, stage.repeats, config.repaint_jump, self.alphas_cumprod
            )
        return repaint_plan(
            start_timesteps(leading_timesteps(stage.num_steps), stage.start),
            self.alphas_cumprod,
            repeats=stage.repeats,
            jump_length=config.repaint_jump,
            known_level=config.background_level,
            known_noise=config.background_noise,
        )

    def _start(
        self, known: Tensor, first: Evaluation, noise: NoiseSource, config: EditConfig, from_noise: bool
    ) -> Tensor:
        """x_T ~ q(x_T | x~), lines 4 and 21; with `from_noise` pure noise."""
        n = noise("init", 0, tuple(known.shape)).to(known)
        if from_noise:
            return n
        if config.formulas == "official":
            return official.start_latent(known, first.a_t, self.alphas_cumprod, n)
        return q_sample(known, first.t, self.alphas_cumprod, n)

    def _denoiser(self, edit: _Edit, *, first: bool) -> Denoiser:
        """p_theta( . | c) with classifier-free guidance."""
        dtype = next((p.dtype for p in self.unet.parameters()), torch.float32)

        def model(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
            return self.unet(x.to(dtype), t, context.to(dtype)).float()

        cond = edit.cond if first or edit.config.conditional_upscale else edit.empty
        uncond = edit.uncond if first or edit.config.conditional_upscale else edit.empty
        scale = 1.0 if cond is uncond else float(edit.config.guidance_scale or 0)
        return classifier_free_guidance(model, cond, uncond, scale)

    def _low_pass(self, reference: Tensor, input_size: tuple[int, int], config: EditConfig) -> Tensor:
        """LP(x_in) of line 20: as sharp as the picture that was enlarged (A.2)."""
        if config.lowpass_reference == "no":
            return reference
        if config.lowpass_reference == "half":
            return low_pass(reference, (max(1, reference.shape[-2] // 2), max(1, reference.shape[-1] // 2)))
        return low_pass(reference, input_size)

    # ---- latents and pictures ---------------------------------------------------------------------------------------------------

    def _encode(self, images: Tensor) -> Tensor:
        """Scaled latents (n, 4, h, w) of `images`: the posterior's mean."""
        dtype = next((p.dtype for p in self.vae.parameters()), torch.float32)
        return self.vae.encode(images.to(dtype)).mean.float() * self.vae.config.scaling_factor

    def _decode(self, vae: Any, latent: Tensor) -> Tensor:
        """The picture (n, 3, H, W) of scaled latents, clamped to [-1, 1]."""
        dtype = next((p.dtype for p in vae.parameters()), torch.float32)
        return vae.decode((latent / vae.config.scaling_factor).to(dtype)).float().clamp(-1, 1)

    def _to_picture(self, edit: _Edit, number: int, latents: Sequence[Tensor]) -> Tensor:
        """One picture (1, 3, H, W) of the stage from its tiles' latents, by the optimised decoder where that is asked for."""
        stage, config = edit.plan.stages[number], edit.config
        boxes = stage.boxes if len(latents) == len(stage.boxes) else stage.grid
        reference, mask = edit.at(stage)
        if not config.decoder_optimization or config.decoderopt_steps == 0:
            return self._blend(edit, stage, [self._decode(self.vae, z) for z in latents], boxes, reference)
        if config.decoderopt_latents == "reencode":
            plain = self._blend(edit, stage, [self._decode(self.vae, z) for z in latents], boxes, reference)
            segments = [
                official.reencoded_segment(self.vae, take(plain, box), take(reference, box), take(mask, box))
                for box in official.decoder_segments(*stage.size, tile=self.measures.native)
            ]
            latents = [self._encode(take(plain, box)) for box in boxes]
        else:
            segments = [
                Segment(z, take(reference, box), take(mask, box))
                for z, box in zip(latents, boxes, strict=True)
            ]
        tuned = optimize_decoder(
            self.vae,
            segments,
            steps=config.decoderopt_steps,
            lr=config.decoderopt_lr,
            background_weight=config.decoderopt_weight,
            on_step=lambda step, _: edit.report(stage.name, "optimize", step + 1, config.decoderopt_steps),
        )
        return self._blend(edit, stage, [self._decode(tuned, z) for z in latents], boxes, reference)

    def _blend(
        self, edit: _Edit, stage: Stage, pictures: Sequence[Tensor], boxes: Sequence[Box], reference: Tensor
    ) -> Tensor:
        """Crossfade the tiles' pictures; where no tile was computed the untouched picture shows."""
        if edit.config.formulas == "official" and len(boxes) > 1:
            return official.compose(reference, pictures, boxes, edit.config.grid_overlap or 0)
        blend = TileBlend(stage.grid, *stage.size)
        for box, picture in zip(boxes, pictures, strict=True):
            blend.add(box, picture)
        return blend.result(reference)

    def _tile_batch(self, box: Box) -> int:
        """How many tiles to sample at once: four on a CPU; on a GPU what half its free memory holds."""
        device = next((p.device for p in self.unet.parameters()), torch.device("cpu"))
        if device.type != "cuda":
            return 4
        cells = box.height * box.width / self.vae.downscale**2
        bytes_per_cell = 400_000  # both guidance halves of SD 1.5 in float16, attention not materialised
        return max(1, int(torch.cuda.mem_get_info(device)[0] / 2 / (cells * bytes_per_cell)))

    # ---- before it begins -------------------------------------------------------------------------------------------------------

    def _begin(
        self, image: Tensor, mask: Tensor, prompt: str, plan: EditPlan, generator: torch.Generator | None,
        report: Callable[[str, str, int, int], None], on_picture: Callable[[str, Tensor], None] | None,
    ) -> _Edit:  # fmt: skip
        device = next((p.device for p in self.unet.parameters()), image.device)
        ids = self.tokenizer([prompt, plan.config.negative_prompt, ""]).to(device)
        contexts = self.text_encoder(ids)  # once for all stages and tiles
        return _Edit(
            plan=plan,
            source=take(image, plan.crop).to(device, torch.float32),
            mask=take(mask, plan.crop).to(device, torch.float32),
            cond=contexts[0:1],
            uncond=contexts[1:2],
            empty=contexts[2:3],
            seed=plan.config.seed or 0 if generator is None else _draw_seed(generator),
            report=report,
            show=on_picture or (lambda name, picture: None),
        )

    def _check(self, image: Tensor, mask: Tensor) -> None:
        if image.ndim != 4 or image.shape[:2] != (1, 3):
            raise ValueError(f"image has shape {tuple(image.shape)}; expected (1, 3, H, W) in [-1, 1]")
        if mask.shape != (1, 1, *image.shape[-2:]):
            raise ValueError(
                f"mask has shape {tuple(mask.shape)}; expected (1, 1, {image.shape[-2]}, {image.shape[-1]}), the picture's size"
            )


def _draw_seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**62, (), generator=generator, device=generator.device))


def _reporter(
    on_step: Callable[[EditStep], None] | None, seconds: dict[str, float]
) -> Callable[[str, str, int, int], None]:
    """Pass progress on to `on_step`, and add up in `seconds` how long each task took."""
    last = time.perf_counter()

    def report(stage: str, task: str, step: int, total: int) -> None:
        nonlocal last
        now = time.perf_counter()
        key = f"{stage}, {task}"
        seconds[key] = seconds.get(key, 0.0) + now - last
        last = now
        if on_step is not None:
            on_step(EditStep(stage, task, step, total))

    return report
