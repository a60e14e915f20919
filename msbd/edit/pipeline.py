"""Multi-Stage Blended Diffusion: repaint a masked region of a large picture from a text prompt.

Paper    Ackermann & Li 2022, arXiv:2210.12965; "line n" is a line of its Algorithm 1, "A.2" its appendix
Tensors  image (1, 3, H, W) in [-1, 1]; mask (1, 1, H, W), 1 = edit; latents (n, 4, h, w), scaled, h = H / 8
Nets     arrive loaded, in evaluation mode, on one device; a pixel-space model brings an identity autoencoder

Read `EditPipeline.__call__` first. One stage is in stage.py, the loop over t and r in samplers/repaint.py
(`algorithm_1`), latents become a picture in decode.py, and plan.py says beforehand what will be done at which
size.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..latents import decode
from ..memory import SMALL_TILES, until_it_fits
from ..pixels.box import Box
from ..pixels.masks import feather, mask_box, resize_mask
from ..pixels.preprocess import CLIP_MEAN, CLIP_STD
from ..pixels.resize import put_back, resize, take
from ..pixels.tiles import covered
from ..pixels.upscale import low_pass_reference, super_resolve
from ..progress import EditStep, reporter
from ..prompt_syntax import plain_words
from ..prompts import encode_prompts
from .config import EditConfig, ModelSpec
from .decode import decode_each, stage_picture
from .plan import EditPlan, EditResult, Stage, check_inputs, halve_tiles, plan_edit
from .rerank import clip_scores
from .stage import Edit, sample_stage


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
        prediction_type: str = "epsilon",
        spec: ModelSpec | None = None,
        upscaler: nn.Module | None = None,
        clip: Any = None,
        clip_tokenizer: Callable[[list[str]], Tensor] | None = None,
        clip_size: int = 224,
        clip_mean: Sequence[float] = CLIP_MEAN,
        clip_std: Sequence[float] = CLIP_STD,
        tiled_vae: Callable[..., Any] | None = None,
        seam_decoder: Any = None,
        notes: Sequence[str] = (),
    ) -> None:
        """`tiled_vae(encoder_tile=..., decoder_tile=..., storage=...)` is `vae` for pictures of any size
        (nets/tiled_vae.py), `seam_decoder` the autoencoder of seam "asymmetric" (nets/asymmetric_vae.py).
        `notes`, on how the nets came to be, stand before those of each result.
        """
        self.notes = tuple(notes)
        self.unet, self.vae, self.upscaler = unet, vae, upscaler
        self.text_encoder, self.tokenizer = text_encoder, tokenizer
        self.alphas_cumprod, self.prediction_type = alphas_cumprod, prediction_type
        self.tiled_vae, self.seam_decoder = tiled_vae, seam_decoder
        self.stage_picture = stage_picture  # lines 18 and 27; measurements put another in its place
        self.spec = ModelSpec() if spec is None else spec
        self.clip, self.clip_tokenizer = clip, clip_tokenizer or tokenizer
        self.clip_preprocessing = {"size": clip_size, "mean": clip_mean, "std": clip_std}

    def plan(self, mask: Tensor, config: EditConfig) -> EditPlan:
        """What an edit of `mask` (1, 1, H, W) would do; nothing is computed. ValueError as in `plan_edit`."""
        return plan_edit(
            (mask >= 0.5).float(),
            config,
            self.spec,
            self.alphas_cumprod,
            downscale=self.vae.downscale,
            has_upscaler=self.upscaler is not None,
        )

    @torch.no_grad()  # not inference_mode: decoder optimisation needs tensors that autograd may save
    def __call__(
        self,
        image: Tensor,
        mask: Tensor,
        prompt: str,
        *,
        config: EditConfig | None = None,
        plan: EditPlan | None = None,
        generator: torch.Generator | None = None,
        on_step: Callable[[EditStep], None] | None = None,
        on_picture: Callable[[str, Tensor], None] | None = None,
    ) -> EditResult:
        """Repaint `mask` (1, 1, H, W; 1 = edit) of `image` (1, 3, H, W in [-1, 1]) to match `prompt`.

        A mask in between is cut at one half. `plan` is what `self.plan(mask, config)` gave, where that was
        asked for before, and then takes the place of `config`. One number is drawn from `generator` to seed
        all noise; without one, the config's seed does. `on_step` follows the progress, `on_picture(name, (1,
        3, h, w))` sees every intermediate picture (the paper's figure 3). ValueError for sizes that do not
        match, an empty mask, options the model cannot follow.
        """
        check_inputs(image, mask)
        mask = (mask >= 0.5).float()
        if plan is None:
            plan = self.plan(mask, EditConfig() if config is None else config)
        elif config is not None:
            raise ValueError("plan and config are both given; pass one of them")
        elif plan.picture_size != tuple(image.shape[-2:]):
            raise ValueError(
                f"the plan is for a picture of {plan.picture_size}, this one has {tuple(image.shape[-2:])}; "
                "plan with this picture's mask"
            )
        if generator is not None:
            drawn = torch.randint(2**62, (), generator=generator, device=generator.device)
            plan = replace(plan, config=replace(plan.config, seed=int(drawn)))
        if plan.config.seam == "asymmetric" and self.seam_decoder is None:
            raise ValueError(
                "seam is asymmetric, but this pipeline was loaded without such a decoder: name one "
                "(`load_edit_pipeline(..., seam_decoder=...)`), or take another seam"
            )
        if plan.config.seam == "closed-form" and not hasattr(getattr(self.vae, "decoder", None), "conv_out"):
            raise ValueError(
                "seam is closed-form, which solves for the last convolution of an AutoencoderKL; this autoencoder "
                "is another: take another seam, as membrane"
            )
        looked_at = None
        if plan.config.rerank_area == "mask":
            looked_at = mask_box(resize_mask(take(mask, plan.crop), plan.stages[0].size))
        words = plain_words(prompt) if plan.config.prompt_syntax == "webui" else prompt
        score = partial(self._scores, words, looked_at)
        seconds: dict[str, float] = {}
        edit = self._begin(prompt, plan, score, reporter(on_step, seconds), on_picture)
        first, *later = edit.plan.stages
        x_in = take(image, plan.crop).to(first.mask)
        x_tilde = resize(x_in, first.size)  # line 1: Downsample(Crop(x_in, m))
        edit.show("first stage, source", x_tilde)
        edit.show("first stage, mask", first.mask.expand_as(x_tilde) * 2 - 1)
        latents = sample_stage(edit, first, x_tilde, first.cells)  # lines 2-16: B candidates
        candidates, scores, chosen = x_tilde[:0], None, 0
        if plan.config.method != "segments":  # that baseline has no candidates, it repaints tile by tile
            candidates = self._candidates(edit, first, latents)
            scores, chosen = self._rerank(edit, candidates, score)  # line 17: ClipReranking
            latents = [latents[chosen]]
        x = self.stage_picture(edit, first, x_tilde, latents)  # line 18: DecoderOptimization
        for stage in later:  # line 19: s = 2, ..., n_s
            x = self._later_stage(edit, stage, x_in, x)  # lines 20-27
            # line 28: the next s
        result, weight = self._composite(edit, image, mask, x)  # line 29: x_out
        notes = (*self.notes, *edit.notes)
        return EditResult(result, plan, candidates, scores, chosen, seconds, notes, weight=weight)

    def _later_stage(self, edit: Edit, stage: Stage, x_in: Tensor, previous: Tensor) -> Tensor:
        """The picture of a later stage: `previous` enlarged and refreshed, in tiles that fit into memory."""

        def smaller(stage: Stage) -> Stage | None:
            halved = halve_tiles(stage, edit.plan.config, self.spec)
            if halved is not None:
                before, after = max(stage.grid[0].size), max(halved.grid[0].size)
                edit.notes.append(
                    f"{stage.name}: out of memory with tiles of {before} pixels, went on with {after}"
                )
            return halved

        return until_it_fits(partial(self._refined, edit, x_in, previous), stage, smaller)

    def _refined(self, edit: Edit, x_in: Tensor, previous: Tensor, stage: Stage) -> Tensor:
        """SDEdit with Blended Diffusion on the enlarged picture of the stage before, (1, 3, H, W)."""
        config, mask, cells = edit.plan.config, stage.mask, stage.cells
        if not config.blended_upscale:  # the ablation: plain SDEdit of the whole crop
            mask, cells = torch.ones_like(mask), torch.ones_like(cells)
        at_size = resize(x_in, stage.size)
        rough = edit.plan.rules.before_upscaling(previous, stage.size, config.upscaling_mode)
        needed = covered(mask, stage.boxes)
        on_progress = partial(edit.report, stage.name, "upscale")
        enlarged = super_resolve(rough, stage.size, config.upscaling_mode, self.upscaler, needed, on_progress)
        edit.show(f"{stage.name}, upscaled", enlarged)
        input_size = (previous.shape[-2], previous.shape[-1])
        background = low_pass_reference(at_size, input_size, config.lowpass_reference)
        x_tilde = mask * enlarged + (1 - mask) * background  # line 20: m SR(x^(s-1)) + (1 - m) LP(x_in)
        edit.show(f"{stage.name}, input", x_tilde)
        latents = sample_stage(edit, stage, x_tilde, cells)  # lines 21-26: from T'_s, without repeats
        return self.stage_picture(edit, stage, at_size, latents)  # line 27: DecoderOptimization

    def _candidates(self, edit: Edit, stage: Stage, latents: Sequence[Tensor]) -> Tensor:
        """The first stage's pictures (B, 3, h, w), as the plain decoder gives them."""
        pictures = list(decode_each(edit, stage, self.vae, latents))
        for number, picture in enumerate(pictures):
            edit.show(f"first stage, candidate {number}", picture)
        return torch.cat(pictures)

    def _rerank(
        self, edit: Edit, candidates: Tensor, score: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor | None, int]:
        """CLIP's scores (B,) of the candidates (B, 3, h, w), and the index of the best."""
        config, count = edit.plan.config, len(candidates)
        if self.clip is None or not config.clip_reranking:
            if config.clip_reranking and count > 1:
                begun = edit.plan.stages[0].candidates
                edit.notes.append(f"no CLIP with this model: the first of {begun} candidates was taken")
            return None, 0
        scores = score(candidates)
        edit.report(edit.plan.stages[0].name, "rerank", 1, 1)
        return scores, int(scores.argmax())

    def _scores(self, prompt: str, box: Box | None, pictures: Tensor) -> Tensor:
        """CLIP's scores (n,) of pictures (n, 3, h, w) of the first stage, all of them or around `box`."""
        ids = self.clip_tokenizer([prompt]).to(pictures.device)
        return clip_scores(self.clip, ids, pictures, box=box, **self.clip_preprocessing)

    def _choose(self, score: Callable[[Tensor], Tensor], latents: Tensor, count: int) -> list[int]:
        """Which `count` of these latents (n, 4, h, w) CLIP likes best; without a CLIP the first."""
        if self.clip is None:
            return list(range(count))
        pictures = torch.cat([decode(self.vae, latent) for latent in latents.split(1)])
        return sorted(score(pictures).topk(count).indices.tolist())

    def _composite(self, edit: Edit, image: Tensor, mask: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """m x + (1 - m) x_in at full size, and the weight m; a feather acts inside the mask only."""
        edited = resize(x, edit.plan.crop.size).to(image.device)
        whole = put_back(image.float(), edited, edit.plan.crop)
        weight = feather(mask, edit.plan.config.feather).to(image.device, torch.float32)
        blended = weight * whole + (1 - weight) * image
        # A selection: exact outside the mask.
        return torch.where(weight > 0, blended.to(image), image), weight

    def _begin(
        self,
        prompt: str,
        plan: EditPlan,
        score: Callable[[Tensor], Tensor],
        report: Callable[[str, str, int, int], None],
        on_picture: Callable[[str, Tensor], None] | None,
    ) -> Edit:
        """The edit under way: the texts encoded once, the plan's masks moved to where the nets are."""
        device = next((p.device for p in self.unet.parameters()), plan.stages[0].mask.device)
        prompts, syntax = (prompt, plan.config.negative_prompt, ""), plan.config.prompt_syntax
        contexts = encode_prompts(prompts, self.tokenizer, self.text_encoder, device, syntax)
        cond, uncond, empty = contexts.split(1)
        tiled = self.tiled_vae
        return Edit(
            unet=self.unet,
            vae=self.vae,
            alphas_cumprod=self.alphas_cumprod,
            prediction_type=self.prediction_type,
            plan=plan.to(device),
            cond=cond,
            uncond=uncond,
            empty=empty,
            report=report,
            show=on_picture or (lambda name, picture: None),
            choose=partial(self._choose, score),
            large_vae=self.vae if tiled is None else tiled(),
            small_vae=None if tiled is None else partial(tiled, **SMALL_TILES, storage="cpu"),
            seam_decoder=self.seam_decoder,
        )
