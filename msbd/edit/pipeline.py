"""Multi-Stage Blended Diffusion: repaint a masked region of a large picture from a text prompt.

Paper    Ackermann & Li 2022, arXiv:2210.12965; "line n" below is a line of its Algorithm 1, "A.2" its appendix
Tensors  image (1, 3, H, W) in [-1, 1] · mask (1, 1, H, W), 1 = edit · latents (n, 4, h, w), scaled, h = H / 8
Nets     arrive loaded, in evaluation mode, on one device; a pixel-space model brings an identity autoencoder

Preset `official` replaces some formulas by the official code's; each place says `official`, and official.py explains it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from samplers.guidance import classifier_free_guidance
from samplers.repaint import Evaluation, blended_sample, repaint_plan
from samplers.schedule import Denoiser, NoiseSource, leading_timesteps, q_sample, start_timesteps

from ..latents import decode, dtype_of, encode
from ..memory import is_out_of_memory, tiles_at_once
from ..noise import noise_windows
from ..pixels.box import Box
from ..pixels.masks import feather, mask_box, progressive_dilation, resize_mask
from ..pixels.preprocess import CLIP_MEAN, CLIP_STD
from ..pixels.resize import put_back, resize, take, truncate_to_8_bits
from ..pixels.tiles import TileBlend, covered
from ..pixels.upscale import low_pass_reference, super_resolve
from ..progress import EditStep, reporter
from . import official
from .config import EditConfig, Measures
from .decoder_opt import Segment, optimize_decoder
from .plan import EditPlan, EditResult, Stage, check_inputs, halve_tiles, plan_edit, stage_cells, stage_mask
from .rerank import clip_scores


@dataclass(frozen=True)
class _Edit:
    """What stays the same through one edit."""

    plan: EditPlan
    source: Tensor  # x_in under the crop, (1, 3, h, w)
    mask: Tensor  # m under the crop, (1, 1, h, w)
    cond: Tensor  # (1, 77, D), the prompt
    uncond: Tensor  # (1, 77, D), the negative prompt
    empty: Tensor  # (1, 77, D), ""
    report: Callable[[str, str, int, int], None]
    show: Callable[[str, Tensor], None]
    notes: list[str] = field(default_factory=list)

    @property
    def config(self) -> EditConfig:
        return self.plan.config

    def at(self, stage: Stage) -> tuple[Tensor, Tensor]:
        """x_in and m at the stage's size."""
        return resize(self.source, stage.size), stage_mask(self.mask, stage.size, self.config)

    def cells(self, stage: Stage, factor: int) -> Tensor:
        """m at the stage's size in latent cells of `factor` pixels."""
        return stage_cells(self.mask, stage, self.config, factor)


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
        self.clip_preprocessing = {"size": clip_size, "mean": clip_mean, "std": clip_std}

    def plan(self, mask: Tensor, config: EditConfig) -> EditPlan:
        """What an edit of `mask` (1, 1, H, W) would do; nothing is computed. ValueError for an empty mask or unsuitable options."""
        plan = plan_edit((mask >= 0.5).float(), config, self.measures)
        grows = any(after.size != before.size for before, after in pairwise(plan.stages))
        if grows and plan.config.upscaling_mode == "rrdb" and self.upscaler is None:
            raise ValueError(
                "upscaling_mode is rrdb, but this model comes without an upscaler: `python -m tools.models fetch "
                "realesrgan-x4plus` gets one, --upscaling-mode bilinear does without"
            )
        for stage in plan.stages:
            self._schedule(stage, plan.config)  # ValueError for more steps than the schedule has room for
        return plan

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
        `on_picture(name, (1, 3, h, w))` sees every intermediate picture (the paper's figure 3). A mask in between is cut at one
        half. ValueError for sizes that do not match, an empty mask, options the model cannot follow.
        """
        check_inputs(image, mask)
        mask = (mask >= 0.5).float()
        config = EditConfig() if config is None else config
        if generator is not None:
            drawn = torch.randint(2**62, (), generator=generator, device=generator.device)
            config = replace(config, seed=int(drawn))
        plan = self.plan(mask, config)
        seconds: dict[str, float] = {}
        edit = self._begin(image, mask, prompt, plan, reporter(on_step, seconds), on_picture)
        if plan.config.mode == "segments":
            return self._finish(edit, image, mask, self._segments(edit), seconds)
        candidates, latents = self._first_stage(edit)  # lines 1-16
        scores, chosen = self._rerank(edit, candidates, prompt)  # line 17
        edited = self._to_picture(edit, plan.stages[0], [latents[chosen]])  # line 18
        for stage in plan.stages[1:]:
            edited = self._in_tiles_that_fit(edit, stage, edited)  # lines 19-28
        result = self._finish(edit, image, mask, edited, seconds)  # line 29
        return replace(result, candidates=candidates, scores=scores, chosen=chosen)

    # ---- the stages of Algorithm 1 ----------------------------------------------------------------------------------------------

    def _first_stage(self, edit: _Edit) -> tuple[Tensor, list[Tensor]]:
        """Blended Diffusion with RePaint at the model's own size: B pictures (B, 3, h, w) and their latents (1, 4, h, w)."""
        stage = edit.plan.stages[0]
        source, mask = edit.at(stage)  # x~
        edit.show("first stage, source", source)
        edit.show("first stage, mask", mask.expand_as(source) * 2 - 1)
        windows = [(candidate, stage.boxes[0]) for candidate in range(stage.candidates)]
        latents = self._sample(edit, stage, source, edit.cells(stage, self.vae.downscale), windows)
        pictures = list(self._decode_all(edit, stage, self.vae, latents))
        for number, picture in enumerate(pictures):
            edit.show(f"first stage, candidate {number}", picture)
        return torch.cat(pictures), latents

    def _rerank(self, edit: _Edit, candidates: Tensor, prompt: str) -> tuple[Tensor | None, int]:
        """CLIP's scores of the candidates and the index of the best."""
        wanted, count = edit.config.clip_reranking, len(candidates)
        if self.clip is None or not wanted:
            if wanted and count > 1:
                edit.notes.append(f"no CLIP with this model: the first of {count} candidates was taken")
            return None, 0
        ids = self.clip_tokenizer([prompt]).to(candidates.device)
        size = edit.plan.stages[0].size
        box = mask_box(resize_mask(edit.mask, size)) if edit.config.rerank_area == "mask" else None
        scores = clip_scores(self.clip, ids, candidates, box=box, **self.clip_preprocessing)
        edit.report(edit.plan.stages[0].name, "rerank", 1, 1)
        return scores, int(scores.argmax())

    def _in_tiles_that_fit(self, edit: _Edit, stage: Stage, previous: Tensor) -> Tensor:
        """`_upscale_stage`, with tiles halved as often as the device's memory asks for it."""
        while True:
            try:
                return self._upscale_stage(edit, stage, previous)
            except RuntimeError as error:
                smaller = halve_tiles(stage, edit.mask, edit.config, self.measures)
                if smaller is None or not is_out_of_memory(error):
                    raise
            before, after = max(stage.grid[0].size), max(smaller.grid[0].size)
            edit.notes.append(
                f"{stage.name}: out of memory with tiles of {before} pixels, went on with {after}"
            )
            stage = smaller

    def _upscale_stage(self, edit: _Edit, stage: Stage, previous: Tensor) -> Tensor:
        """Enlarge the last stage's picture, refresh it by SDEdit and Blended Diffusion, in tiles where it is large."""
        config = edit.config
        reference, mask = edit.at(stage)
        input_size = (previous.shape[-2], previous.shape[-1])
        if config.formulas == "official" and config.upscaling_mode == "rrdb" and input_size != stage.size:
            previous = truncate_to_8_bits(previous)
        m = edit.cells(stage, self.vae.downscale)
        if not config.blended_upscale:  # ablation: plain SDEdit of the whole crop
            mask, m = torch.ones_like(mask), torch.ones_like(m)
        needed = covered(mask, stage.boxes)
        enlarged = super_resolve(previous, stage.size, config.upscaling_mode, self.upscaler, needed)
        edit.report(stage.name, "upscale", 1, 1)
        edit.show(f"{stage.name}, upscaled", enlarged)
        background = low_pass_reference(reference, input_size, config.lowpass_reference)
        x_tilde = mask * enlarged + (1 - mask) * background  # line 20
        edit.show(f"{stage.name}, input", x_tilde)
        latents = self._sample(edit, stage, x_tilde, m, [(0, box) for box in stage.boxes])  # lines 21-26
        return self._to_picture(edit, stage, latents)  # line 27

    def _segments(self, edit: _Edit) -> Tensor:
        """The paper's second baseline: each segment of the full-size crop is repainted by itself, from pure prompt."""
        stage = edit.plan.stages[0]
        windows = [(0, box) for box in stage.boxes]
        latents = self._sample(edit, stage, edit.at(stage)[0], edit.cells(stage, self.vae.downscale), windows)
        return self._to_picture(edit, stage, latents)

    def _finish(
        self, edit: _Edit, image: Tensor, mask: Tensor, edited: Tensor, seconds: dict[str, float]
    ) -> EditResult:
        """x_out = m x + (1 - m) x_in at full size; a feather acts inside the mask only."""
        edited = resize(edited, edit.plan.crop.size).to(image.device)
        whole = put_back(image.float(), edited, edit.plan.crop)
        weight = feather(mask, edit.config.feather).to(image.device, torch.float32)
        blended = weight * whole + (1 - weight) * image
        result = torch.where(weight > 0, blended.to(image), image)  # a selection: exact outside the mask
        return EditResult(result, edit.plan, edited, None, 0, seconds, tuple(edit.notes))

    # ---- sampling ---------------------------------------------------------------------------------------------------------------

    def _sample(
        self, edit: _Edit, stage: Stage, source: Tensor, m: Tensor, windows: Sequence[tuple[int, Box]]
    ) -> list[Tensor]:
        """Latents (1, 4, h, w) of `windows` = (candidate, box in pixels) of `source`, as many at once as memory allows.

        `m` (1, 1, h, w) is the latent mask of the whole stage. What a window becomes does not depend on its batch.
        """
        box, batch = windows[0][1], edit.config.tile_batch
        if stage.candidates > 1:
            batch = stage.candidates
        elif batch is None:
            batch = tiles_at_once(m.device, box.height * box.width / self.vae.downscale**2)
        latents: dict[tuple[int, Box], Tensor] = {}
        while todo := [window for window in windows if window not in latents]:
            now = [window for window in todo if window[1].size == todo[0][1].size][:batch]
            try:
                progress = (len(latents), len(windows))
                sampled = self._blended_diffusion(edit, stage, source, m, now, progress)
            except RuntimeError as error:
                if len(now) == 1 or not is_out_of_memory(error):
                    raise
                batch = len(now) // 2
                edit.notes.append(
                    f"{stage.name}: out of memory with {len(now)} at once, went on with {batch}"
                )
                continue  # retried outside this clause, so that the failed batch's memory is free by then
            latents.update(zip(now, sampled[:, None], strict=True))
        return [latents[window] for window in windows]

    def _blended_diffusion(
        self, edit: _Edit, stage: Stage, source: Tensor, m: Tensor, windows: Sequence[tuple[int, Box]],
        progress: tuple[int, int],
    ) -> Tensor:  # fmt: skip
        """Latents (n, 4, h, w) for one batch of `_sample`, all boxes of one size; `progress`: windows done, of how many."""
        config, factor = edit.config, self.vae.downscale
        boxes = list(dict.fromkeys(box for _, box in windows))  # one where all windows are candidates

        def cut(mask: Tensor) -> Tensor:
            return torch.cat([take(mask, box.divided(factor)) for box in boxes])

        known = encode(self.vae, torch.cat([take(source, box) for box in boxes]))
        plan = self._schedule(stage, config)
        whole_run = stage.number == 0 and stage.start == 1
        noise = noise_windows(
            edit.config.seed or 0,
            stage.number,
            (m.shape[-2], m.shape[-1]),
            [(candidate, box.divided(factor)) for candidate, box in windows],
            shared={"known"} if config.formulas == "official" and whole_run else (),  # one x-hat for all
        )
        from_noise = whole_run and config.start_from == "noise"
        x = self._start(known.expand(len(windows), -1, -1, -1), plan[0], noise, config, from_noise)
        done, total = progress
        return blended_sample(
            self._denoiser(edit, first=stage.number == 0),
            x,
            plan,
            known=known,
            mask=(lambda k: cut(progressive_dilation(m, k / len(plan)))) if config.dilate_mask else cut(m),
            noise=noise,
            eta=config.eta,
            on_step=lambda info: edit.report(
                stage.name, "sample", done * info.total + (info.step + 1) * len(windows), total * info.total
            ),
        )

    def _schedule(self, stage: Stage, config: EditConfig) -> tuple[Evaluation, ...]:
        """Which timesteps a stage evaluates, and what is blended in and re-noised after each."""
        if config.formulas == "official":
            return official.evaluations(
                stage.num_steps, stage.start, stage.repeats, config.repaint_jump, self.alphas_cumprod,
                known_level=config.background_level, known_noise=config.background_noise,
            )  # fmt: skip
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
        dtype = dtype_of(self.unet)

        def model(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
            return self.unet(x.to(dtype), t, context.to(dtype)).float()

        cond = edit.cond if first or edit.config.conditional_upscale else edit.empty
        uncond = edit.uncond if first or edit.config.conditional_upscale else edit.empty
        scale = 1.0 if cond is uncond else float(edit.config.guidance_scale or 0)
        return classifier_free_guidance(model, cond, uncond, scale)

    # ---- latents and pictures ---------------------------------------------------------------------------------------------------

    def _decode_all(self, edit: _Edit, stage: Stage, vae: Any, latents: Sequence[Tensor]) -> Iterator[Tensor]:
        """The pictures of a stage's latents (1, 4, h, w), one at a time."""
        for number, latent in enumerate(latents, 1):
            picture = decode(vae, latent)
            edit.report(stage.name, "decode", number, len(latents))
            yield picture

    def _to_picture(self, edit: _Edit, stage: Stage, latents: Sequence[Tensor]) -> Tensor:
        """One picture (1, 3, H, W) of the stage from its tiles' latents, by the optimised decoder where that is asked for."""
        config, vae = edit.config, self.vae
        reference, mask = edit.at(stage)
        if config.decoder_optimization and config.decoderopt_steps > 0:
            if config.decoderopt_latents == "reencode":
                plain = self._blend(edit, stage, self._decode_all(edit, stage, vae, latents), reference)
                tile = self.measures.native if len(stage.grid) > 1 else max(stage.size)
                segments = official.reencoded_segments(vae, plain, reference, mask, tile)
                latents = [encode(self.vae, take(plain, box)) for box in stage.boxes]
            else:  # eq. 1
                segments = [
                    Segment(latent, take(reference, box), take(mask, box))
                    for latent, box in zip(latents, stage.boxes, strict=True)
                ]
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
        picture = self._blend(edit, stage, self._decode_all(edit, stage, vae, latents), reference)
        edit.show(f"{stage.name}, result", picture)
        return picture

    def _blend(self, edit: _Edit, stage: Stage, pictures: Iterable[Tensor], reference: Tensor) -> Tensor:
        """Crossfade the tiles' pictures; where no tile was computed the untouched picture shows."""
        if edit.config.formulas == "official" and len(stage.grid) > 1:
            return official.compose(reference, list(pictures), stage.boxes, edit.config.grid_overlap or 0)
        blend = TileBlend(stage.grid, *stage.size)
        for box, picture in zip(stage.boxes, pictures, strict=True):
            blend.add(box, picture)
        return blend.result(reference)

    # ---- before it begins -------------------------------------------------------------------------------------------------------

    def _begin(
        self, image: Tensor, mask: Tensor, prompt: str, plan: EditPlan, report: Callable[[str, str, int, int], None],
        on_picture: Callable[[str, Tensor], None] | None,
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
            report=report,
            show=on_picture or (lambda name, picture: None),
        )
