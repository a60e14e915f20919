"""Pixel-Aware Stable Diffusion (PASD): enlarge, repair, colour or restyle a picture, its structure kept pixel
by pixel.

Paper    Yang et al. 2023, arXiv:2308.14469, section 3 and figure 2; sections and equations stand at the lines
Tensors  image (1, 3, H, W) in [-1, 1]; control (1, 3, h, w) in [0, 1], h and w multiples of 8;
         latents (1, 4, h / 8, w / 8), scaled
Nets     arrive loaded, in evaluation mode, on one device
Copying  needs latents.py, memory.py, noise.py, pixels/box.py, pixels/pieces.py, pixels/resize.py,
         pixels/upscale.py, progress.py, prompts.py, restore/config.py, restore/plan.py, restore/prompts.py,
         solvers.py, samplers/guidance.py, samplers/schedule.py

Large pictures are sampled in overlapping tiles: at every step the tiles' predictions are faded into one for
the whole latent (MultiDiffusion, arXiv:2302.08113), so that there is one latent, one noise field and one
step. What `plan.rules` does is in paper.py, and for preset `official` in official.py.

Section 3.5 (another style by another base) needs no line here: the nets that arrive are then another base's.
Section 3.6 is training: msbd/train.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from samplers.guidance import classifier_free_guidance
from samplers.schedule import (
    Denoiser,
    NoiseSource,
    make_alphas_cumprod,
    make_betas,
    q_sample_between,
)

from ..latents import decode, distilled_guidance, dtype_of, in_float32
from ..memory import SMALL_TILES, in_batches, tiles_at_once, with_autoencoder
from ..noise import noise_windows
from ..pixels.box import Box
from ..pixels.pieces import inner_pieces, run_in_pieces
from ..pixels.resize import take
from ..pixels.upscale import enlarge_by_net, super_resolve
from ..progress import EditStep, reporter
from ..prompts import encode_prompts
from ..solvers import sample
from .config import NET_FREE, ModelSpec, ResolvedRestoreConfig, RestoreConfig
from .plan import RestorePlan, RestoreResult, plan_restore
from .prompts import build_prompt

# Pixels. _PIECE: side of the pieces in which the control picture's features are computed. _CONTEXT: margin
# around each; the receptive field of degradation removal reaches 23 pixels (53 with RRDBs).
_PIECE, _CONTEXT = 1024, 64


@dataclass
class _Run:
    """One restoration: its plan, what stays the same through it, and what went otherwise."""

    plan: RestorePlan
    cond: Tensor  # c (1, 77, D), the prompt
    uncond: Tensor  # c_neg (1, 77, D), the negative prompt
    noise: NoiseSource
    report: Callable[[str, int, int], None]  # task, step, total
    tile_batch: int = 1  # tiles at once; smaller after memory ran out
    notes: list[str] = field(default_factory=list)

    @property
    def config(self) -> ResolvedRestoreConfig:
        return self.plan.config

    def halve(self, before: int, after: int) -> None:
        """Go on with `after` tiles at once, and note it."""
        self.tile_batch = after
        self.notes.append(f"out of memory with {before} tiles at once, went on with {after}")


class RestorePipeline:
    """PASD over ready nets: `pipeline(image, prompt, output_size=..., config=...)`.

    To see what nets make of a control picture and no more, pass that picture as `image`, its own size as
    `output_size`, and `RestoreConfig(**PLAIN)` of config.py: DDIM from Eq. 3, no prompts of its own, no
    colour fix. train/validate.py looks at a training run so.
    """

    def __init__(
        self,
        *,
        unet: Any = None,
        vae: Any = None,
        text_encoder: Any = None,
        tokenizer: Any = None,
        alphas_cumprod: Tensor | None = None,
        controlnet: Any = None,
        prediction_type: str = "epsilon",
        spec: ModelSpec | None = None,
        upscaler: Any = None,
        tiled_vae: Callable[..., Any] | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        """Nets and what they were trained with; of an enlarger alone `upscaler` and nothing else.

        `text_encoder` takes the ids (B, 77) that `tokenizer` makes of prompts, to (B, 77, D).
        `alphas_cumprod` (T,) is the schedule (None: Stable Diffusion 1.x's); `prediction_type`, one of
        PREDICTIONS in samplers/schedule.py, says what `unet` predicts; `spec` (None: PASD's on Stable
        Diffusion 1.5) fills in what a config leaves open. `controlnet` and `upscaler` are needed by some
        methods only. `tiled_vae(mode=..., encoder_tile=..., decoder_tile=...)` is `vae` for pictures of any
        size (nets/tiled_vae.py). `notes`, on how the nets came to be, stand before those of each result.
        """
        self.notes = tuple(notes)
        self.unet, self.controlnet, self.vae, self.tiled_vae = unet, controlnet, vae, tiled_vae
        self.text_encoder, self.tokenizer = text_encoder, tokenizer
        if alphas_cumprod is None:
            alphas_cumprod = make_alphas_cumprod(make_betas())
        self.alphas_cumprod = alphas_cumprod
        self.prediction_type = prediction_type
        self.spec = ModelSpec() if spec is None else spec
        self.upscaler = upscaler

    @property
    def device(self) -> torch.device:
        """Where the nets are."""
        nets = (net for net in (self.unet, self.upscaler) if hasattr(net, "parameters"))
        return next((parameter.device for net in nets for parameter in net.parameters()), torch.device("cpu"))

    def plan(
        self,
        input_size: tuple[int, int],
        output_size: tuple[int, int] | None = None,
        config: RestoreConfig | None = None,
    ) -> RestorePlan:
        """What restoring a picture of `input_size` (H, W) would do; nothing is computed.

        ValueError for unsuitable options, and for a method whose net is not there.
        """
        plan = plan_restore(
            input_size, output_size, config or RestoreConfig(), self.spec,
            8 if self.vae is None else self.vae.downscale, self.alphas_cumprod,
        )  # fmt: skip
        if plan.config.method not in NET_FREE and self.unet is None:
            raise ValueError(
                f"method {plan.config.method} needs a U-Net, and this model only enlarges; take method "
                + ("bicubic" if self.upscaler is None else "rrdb")
            )
        if plan.config.method in ("pasd", "controlnet") and self.controlnet is None:
            raise ValueError(f"method {plan.config.method} needs a ControlNet, and this model has none")
        if plan.config.method == "rrdb" and self.upscaler is None:
            raise ValueError(
                "method rrdb needs an upscaler, and this model comes without one; load it with one, "
                'load_restore_pipeline(..., upscaler="realesrgan-x4plus")'
            )
        return plan

    @torch.inference_mode()
    def __call__(
        self,
        image: Tensor,
        prompt: str = "",
        *,
        output_size: tuple[int, int] | None = None,
        information: Sequence[str] = (),
        config: RestoreConfig | None = None,
        generator: torch.Generator | None = None,
        noise: NoiseSource | None = None,
        on_step: Callable[[EditStep], None] | None = None,
        on_picture: Callable[[str, Tensor], None] | None = None,
    ) -> RestoreResult:
        """Restore `image` (1, 3, H, W) in [-1, 1] at `output_size` (H, W); None: the mode's usual, 4 or 1
        times as large.

        `information` is what was recognised in it, for the prompt (captions.py). One number is drawn from
        `generator` to seed all noise; without one, `config.seed` does; or `noise` gives it, at the sites
        "posterior", "start", "more", "offset" and the sampler's. `on_step` follows the progress.
        `on_picture(name, (1, 3, h, w) in [-1, 1])` sees "control", "restored" (before its colours are put
        right) and "result". ValueError for another shape, and for options that the model cannot follow.
        """
        if image.ndim != 4 or tuple(image.shape[:2]) != (1, 3):
            raise ValueError(f"the picture has shape {tuple(image.shape)}; expected (1, 3, H, W)")
        if noise is not None and generator is not None:
            raise ValueError("noise and generator are both given; pass one of them")
        config = RestoreConfig() if config is None else config
        if generator is not None:
            drawn = torch.randint(2**62, (), generator=generator, device=generator.device)
            config = replace(config, seed=int(drawn))
        plan = self.plan((image.shape[-2], image.shape[-1]), output_size, config)
        seconds: dict[str, float] = {}
        report, show, device = reporter(on_step, seconds), on_picture or _look_away, image.device
        image = image.to(self.device, torch.float32)  # I_lq
        if plan.config.method in NET_FREE:
            on_progress = partial(report, "restore", "upscale")
            if plan.config.method == "rrdb":
                result = enlarge_by_net(image, plan.output_size, self.upscaler, on_progress=on_progress)
            else:
                result = super_resolve(image, plan.output_size, "bicubic", on_progress=on_progress)
            show("result", result)
            notes = (*self.notes, *self._rest_is_bilinear(plan))
            return RestoreResult(result.to(device), plan, "", "", seconds, notes)

        prompts = self._prompts(prompt, information, plan.config)  # section 3.4
        syntax = plan.config.prompt_syntax
        contexts = encode_prompts(prompts, self.tokenizer, self.text_encoder, self.device, syntax)
        cond, uncond = contexts.split(1)  # c, c_neg
        run = _Run(plan, cond, uncond, noise or _noise_of(plan), partial(report, "restore"))
        rules, colours = plan.rules, plan.config.mode == "colorize"
        control = rules.prepare(  # figure 2: the LQ image at the size of the picture to come
            image, plan.output_size, plan.working_size, plan.config.process_size, grayscale=colours
        )
        show("control", control * 2 - 1)
        padded = take(control, plan.padded_box)
        hints = self._hints(run, padded)  # section 3.1
        run.tile_batch = self._tile_batch(plan)  # asked after the hints, which take memory too
        z_n = self._start(run, padded)  # section 3.3, Eqs. 3 and 4
        z_0 = self._sample(run, z_n, self._denoiser(run, hints))  # sections 3.2 and 3.4, Eqs. 1 and 2
        restored = take(self._decode(run, z_0), plan.inside)
        show("restored", restored)
        if colours:
            result = rules.finish_coloured(restored, image, plan.output_size)
        else:
            result = rules.finish(restored, control * 2 - 1, image, plan.output_size, plan.config.color_fix)
        show("result", result)
        return RestoreResult(result.to(device), plan, *prompts, seconds, (*self.notes, *run.notes))

    def _rest_is_bilinear(self, plan: RestorePlan) -> list[str]:
        """A note where the upscaler enlarges less than was asked for."""
        scale = getattr(getattr(self.upscaler, "config", None), "scale", None)
        asked = max(after / before for after, before in zip(plan.output_size, plan.input_size, strict=True))
        if plan.config.method != "rrdb" or scale is None or asked <= scale + 0.01:
            return []
        return [f"the net enlarges {scale} times, the rest is bilinear"]

    def _prompts(
        self, prompt: str, information: Sequence[str], config: ResolvedRestoreConfig
    ) -> tuple[str, str]:
        """Section 3.4: high-level information and the user's words as text, and the negative prompt."""
        gray = config.mode == "colorize"
        positive = build_prompt(prompt, information=information, added=config.added_prompt, grayscale=gray)
        return positive, config.negative_prompt

    def _tile_batch(self, plan: RestorePlan) -> int:
        """How many tiles to predict at once."""
        return plan.config.tile_batch or tiles_at_once(
            self.device, plan.tiles[0].height * plan.tiles[0].width
        )

    # ---- before the diffusion ------------------------------------------------------------------------------

    def _hints(self, run: _Run, control: Tensor) -> dict[Box, Tensor] | None:
        """Section 3.1: what the degradation removal module makes of `control` (1, 3, h, w), for each tile."""
        if run.config.method == "img2img":  # a baseline without a ControlNet
            return None
        return run.plan.rules.hints(self._embed, control, run.plan.tiles, run.plan.downscale)

    def _embed(self, picture: Tensor) -> Tensor:
        """Features (1, C, h, w) of `picture` (1, 3, 8h, 8w) in [0, 1]; of a large one in pieces, equal to
        rounding.
        """
        size = (picture.shape[-2], picture.shape[-1])
        pieces = inner_pieces(size, _PIECE, _CONTEXT, self.vae.downscale)
        return run_in_pieces(self.controlnet.embed, picture.to(dtype_of(self.controlnet)), pieces)

    def _start(self, run: _Run, control: Tensor) -> Tensor:
        """z_N (1, 4, h, w), in float32, at the first timestep: Eq. 4; for the baselines pure noise, or
        SDEdit's start.
        """
        config, plan = run.config, run.plan
        if config.init_latent_with_noise:
            return self._pure_noise(run)
        z_lr = self._with_vae(run, lambda vae: self._encode(run, vae, control))
        run.report("encode", 1, 1)
        n = int(plan.timesteps[0])  # N
        a_n = float(self.alphas_cumprod[n] if plan.levels is None else plan.levels[0])
        if config.method == "img2img":
            return q_sample_between(z_lr, 1.0, a_n, run.noise("start", 0, tuple(z_lr.shape)))
        return plan.rules.start(z_lr, a_n, plan.a_a, run.noise)  # Eq. 4

    def _pure_noise(self, run: _Run) -> Tensor:
        shape = (1, self.vae.config.latent_channels, *run.plan.cells)
        noise = run.noise("start", 0, shape).to(self.device)
        if run.config.offset_noise_scale:
            offset = run.noise("offset", 0, (*shape[:2], 1, 1))[..., :1, :1]  # ours draws whole fields
            noise = noise + run.config.offset_noise_scale * offset.to(noise)
        return noise

    def _encode(self, run: _Run, vae: Any, control: Tensor) -> Tensor:
        """z_LR, scaled: the posterior's mean, or as the official code has it a sample."""

        def latent(vae: Any, image: Tensor) -> Tensor:
            posterior = vae.encode(image)
            z = posterior.mode()
            if run.config.posterior == "sample":
                z = posterior.sample(run.noise("posterior", 0, tuple(z.shape)))
            return z

        image = control * 2 - 1
        z = latent(vae, image.to(dtype_of(vae))).float()
        if not z.isfinite().all():
            z = in_float32(vae, lambda vae: latent(vae, image.float()))
        return z * vae.config.scaling_factor

    # ---- diffusion -----------------------------------------------------------------------------------------

    def _sample(self, run: _Run, z_n: Tensor, denoise: Denoiser) -> Tensor:
        """z_0 (1, 4, h, w) from z_N, by the solver of the plan."""
        config, plan = run.config, run.plan
        return sample(
            config.sampler,
            denoise,
            z_n,
            plan.timesteps,
            self.alphas_cumprod,
            noise=run.noise,
            levels=plan.levels,
            eta=config.eta,
            final_alpha=1.0 if config.final_level == "clean" else float(self.alphas_cumprod[0]),
            prediction=self.prediction_type,
            on_step=lambda info: run.report("sample", (info.step + 1) * len(plan.tiles), plan.evaluations),
        )

    def _denoiser(self, run: _Run, hints: dict[Box, Tensor] | None) -> Denoiser:
        """eps~(z_t) of the whole latent, guided: (1, 4, h, w), float32."""
        plan = run.plan

        def predict(z_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
            """eps(z_t, c) for each of b latents and texts: (b, 4, h, w), float32, from tiles."""
            acting = hints if plan.controls(float(t)) else None
            of_tiles = partial(self._predict, run.config, acting, z_t, t, context)
            blend = plan.rules.blend(plan.tiles, *plan.cells)
            for tile, eps in in_batches(plan.tiles, of_tiles, run.tile_batch, run.halve):
                blend.add(tile, eps)
            return blend.result(z_t.new_zeros(()))

        # Section 3.4 prints eps~(z_t, c) = eps(z_t, c) + w eps(z_t, c_neg), by which a larger w leads
        # *towards* the negative prompt. Computed is, as in Ho and Salimans and in the official code, eps~ =
        # eps(z_t, c_neg) + w (eps(z_t, c) - eps(z_t, c_neg)).
        interval = plan.guidance_interval
        if torch.equal(run.cond, run.uncond):  # nothing to lead away from
            interval = None
        _, scale = distilled_guidance(self.unet, 1.0 if interval is None else run.config.guidance_scale)  # w
        return classifier_free_guidance(predict, run.cond, run.uncond, scale, interval)

    def _predict(
        self,
        config: ResolvedRestoreConfig,
        hints: dict[Box, Tensor] | None,
        z_t: Tensor,
        t: Tensor,
        context: Tensor,
        tiles: Sequence[Box],
    ) -> list[Tensor]:
        """eps(z_t, c) of each tile: (b, 4, h', w'), float32, of z_t (b, 4, h, w) and context (b, 77, D)."""
        x = torch.cat([take(z_t, tile) for tile in tiles]).to(dtype_of(self.unet))
        context = context.repeat(len(tiles), 1, 1).to(x.dtype)
        y = None
        if hints is not None:
            hint = torch.cat([hints[tile].expand(len(z_t), -1, -1, -1) for tile in tiles])
            y = self.controlnet(x, t, context, scale=config.conditioning_scale, hint=hint)  # Z(y) of Eq. 1
        told, _ = distilled_guidance(self.unet, config.guidance_scale)
        # Eq. 1 at the skips, Eq. 2 (PACA) after each layer of the way up
        eps = self.unet(x, t, context, y, **told)
        return list(eps.float().split(len(z_t)))

    def _decode(self, run: _Run, z_0: Tensor) -> Tensor:
        """The picture (1, 3, h, w) in [-1, 1] of z_0."""
        picture = self._with_vae(run, lambda vae: decode(vae, z_0))
        run.report("decode", 1, 1)
        return picture

    def _with_vae(self, run: _Run, work: Callable[[Any], Tensor]) -> Tensor:
        """`work(vae)`, tiled for large pictures; out of memory, in small tiles with maps on the CPU."""
        config, tiled_vae = run.config, self.tiled_vae
        if tiled_vae is None or config.vae_tiling == "off":
            return work(self.vae)
        tiles = {"encoder_tile": config.encoder_tiled_size, "decoder_tile": config.decoder_tiled_size}
        usual = tiled_vae(mode=config.vae_tiling, **tiles)
        small = {name: min(tile, SMALL_TILES[name]) for name, tile in tiles.items()}
        return with_autoencoder(
            work, usual, lambda: tiled_vae(mode="exact", storage="cpu", **small), run.notes.append
        )


def _noise_of(plan: RestorePlan) -> NoiseSource:
    """The noise of the plan's seed, drawn for the whole latent."""
    return noise_windows(plan.config.seed, 0, plan.cells, [(0, Box(0, 0, *plan.cells))])


def _look_away(name: str, picture: Tensor) -> None:
    """`on_picture` where nobody looks."""
