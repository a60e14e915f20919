"""Pixel-Aware Stable Diffusion (PASD): enlarge, repair, colour or restyle a picture, its structure kept pixel by pixel.

Paper    Yang et al. 2023, arXiv:2308.14469, section 3 and figure 2
Tensors  image (1, 3, H, W) in [-1, 1]; control (1, 3, h, w) in [0, 1], h and w multiples of 8; latents (1, 4, h / 8, w / 8), scaled
Nets     arrive loaded, in evaluation mode, on one device

Large pictures are sampled in overlapping tiles: at every step the tiles' predictions are faded into one for the whole latent
(MultiDiffusion, arXiv:2302.08113), so that there is one latent, one noise field and one step. Preset `official` replaces
sizes, rounding and the blending of tiles by the official code's; each place says `official`, and official.py explains it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from samplers.ans import ans_start
from samplers.guidance import classifier_free_guidance
from samplers.schedule import Denoiser, NoiseSource, q_sample, v_prediction

from ..latents import decode, dtype_of
from ..memory import is_out_of_memory, tiles_at_once
from ..noise import noise_windows
from ..pixels.box import Box
from ..pixels.resize import enlarge, resize, take
from ..pixels.tiles import TileBlend, tile_boxes
from ..pixels.upscale import super_resolve
from ..progress import EditStep, reporter
from . import official
from .color import adain_color_fix, is_gray, to_gray, transfer_chroma, wavelet_color_fix
from .config import NET_FREE, RestoreConfig, RestoreMeasures
from .plan import RestorePlan, RestoreResult, plan_restore
from .prompts import build_prompt
from .solvers import sample

# Pixels: of the hint at a time, and seen around it; its convolutions see 23, with RRDBs 53.
_PIECE, _CONTEXT = 1024, 64
_SMALL = {"encoder_tile": 256, "decoder_tile": 32}  # pixels, latent cells: where memory is short


@dataclass(frozen=True)
class _Run:
    """What stays the same through one restoration."""

    plan: RestorePlan
    cond: Tensor  # (1, 77, D), the prompt
    uncond: Tensor  # (1, 77, D), the negative prompt
    noise: NoiseSource
    report: Callable[[str, int, int], None]  # task, step, total
    notes: list[str] = field(default_factory=list)

    @property
    def config(self) -> RestoreConfig:
        return self.plan.config


class RestorePipeline:
    """PASD over ready nets: `pipeline(image, prompt, output_size=..., config=...)`."""

    def __init__(
        self,
        *,
        unet: nn.Module,
        vae: Any,
        text_encoder: Callable[[Tensor], Tensor],
        tokenizer: Callable[[list[str]], Tensor],
        alphas_cumprod: Tensor,
        controlnet: Any = None,
        prediction_type: str = "epsilon",
        measures: RestoreMeasures | None = None,
        upscaler: nn.Module | None = None,
        tiled_vae: Callable[..., Any] | None = None,
    ) -> None:
        """`tiled_vae(mode=..., encoder_tile=..., decoder_tile=...)` is `vae` for pictures of any size (nets/tiled_vae.py)."""
        self.unet, self.controlnet, self.vae, self.tiled_vae = unet, controlnet, vae, tiled_vae
        self.text_encoder, self.tokenizer = text_encoder, tokenizer
        self.alphas_cumprod, self.prediction_type = alphas_cumprod, prediction_type
        self.measures = RestoreMeasures() if measures is None else measures
        self.upscaler = upscaler

    @property
    def device(self) -> torch.device:
        """Where the nets are."""
        return next((parameter.device for parameter in self.unet.parameters()), torch.device("cpu"))

    def plan(
        self, size: tuple[int, int], output_size: tuple[int, int] | None = None, config: RestoreConfig | None = None
    ) -> RestorePlan:  # fmt: skip
        """What restoring a picture of `size` (H, W) would do; nothing is computed. ValueError for unsuitable options."""
        plan = plan_restore(size, output_size, config or RestoreConfig(), self.measures, self.vae.downscale)
        if plan.config.method in ("pasd", "controlnet") and self.controlnet is None:
            raise ValueError(f"method {plan.config.method} needs a ControlNet, and this model has none")
        if plan.config.method == "rrdb" and self.upscaler is None:
            raise ValueError(
                "method rrdb needs an upscaler, and this model comes without one: `python -m tools.models fetch "
                "realesrgan-x4plus` gets it"
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
    ) -> RestoreResult:
        """Restore `image` (1, 3, H, W) in [-1, 1] at `output_size` (H, W); without one four times as large, in some modes as it is.

        `information` is what was recognised in it, for the prompt (captions.py). One number is drawn from `generator` to seed
        all noise; without one, `config.seed` does; or `noise` gives it, at the sites "posterior", "start", "more", "offset" and
        the sampler's. `on_step` follows the progress. ValueError for another shape, and options the model cannot follow.
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
        tell, device = reporter(on_step, seconds), image.device
        image = image.to(self.device, torch.float32)
        if plan.config.method in NET_FREE:
            enlarged = super_resolve(image, plan.output, plan.config.method, self.upscaler)
            tell("restore", "upscale", 1, 1)
            return RestoreResult(enlarged.to(device), plan, "", "", seconds)
        prompts = self._prompts(prompt, information, plan.config)
        cond, uncond = self.text_encoder(self.tokenizer(list(prompts)).to(self.device)).split(1)
        run = _Run(plan, cond, uncond, noise or self._noise(plan), lambda *at: tell("restore", *at))
        control = self._control(image, plan)
        restored = self._diffuse(run, take(control, plan.frame))
        restored = take(restored, Box(-plan.frame.top, -plan.frame.left, *plan.work))
        finished = self._finish(run, image, restored, control * 2 - 1)
        return RestoreResult(finished.to(device), plan, *prompts, seconds, tuple(run.notes))

    def _prompts(self, prompt: str, information: Sequence[str], config: RestoreConfig) -> tuple[str, str]:
        gray = config.mode == "colorize"
        positive = build_prompt(prompt, information=information, added=config.added_prompt, grayscale=gray)
        return positive, config.negative_prompt or ""

    def _noise(self, plan: RestorePlan) -> NoiseSource:
        whole = Box(0, 0, *plan.cells)
        return noise_windows(plan.config.seed or 0, 0, plan.cells, [(0, whole)])

    # ---- pixels -----------------------------------------------------------------------------------------------------------------

    def _control(self, image: Tensor, plan: RestorePlan) -> Tensor:
        """The picture as the ControlNet gets to see it, (1, 3, h, w) in [0, 1], at the size at which it is restored."""
        gray = plan.config.mode == "colorize"
        if plan.config.formulas == "official":
            upscale = plan.output[0] / plan.size[0]
            return official.prepare(image, upscale, plan.config.process_size or 1, grayscale=gray) / 2 + 0.5
        control = enlarge(image / 2 + 0.5, plan.work)
        return to_gray(control) if gray else control

    def _finish(self, run: _Run, image: Tensor, restored: Tensor, control: Tensor) -> Tensor:
        """The restored picture, all in [-1, 1], with its colours put right, at the size that was asked for."""
        config, output = run.config, run.plan.output
        as_official = config.formulas == "official"
        restored = official.round_to_levels(restored) if as_official else restored
        if config.mode == "colorize":
            source = resize(image, output, "bicubic").clamp(-1, 1)
            if as_official:
                return official.transfer_chroma_official(restored, source)
            return transfer_chroma(resize(restored, output, "bicubic").clamp(-1, 1), to_gray(source))
        fixes = {"wavelet": wavelet_color_fix, "adain": adain_color_fix}
        if fix := fixes.get(config.color_fix or ""):
            restored = fix(restored, control)
        if as_official:
            return official.finish(restored, output)
        if fix and is_gray(image):  # it stays grey, at fine edges too, which the official code tints
            restored = to_gray(restored)
        return resize(restored, output, "bicubic").clamp(-1, 1)

    def _in_memory_that_is_there(self, run: _Run, work: Callable[[Any], Tensor]) -> Tensor:
        """`work` with the autoencoder, in tiles where the picture is large; out of memory, with small ones and maps on the CPU."""
        config = run.config
        if self.tiled_vae is None or config.vae_tiling == "off":
            return work(self.vae)
        tiles = {"encoder_tile": config.encoder_tiled_size, "decoder_tile": config.decoder_tiled_size}
        try:
            return work(self.tiled_vae(mode=config.vae_tiling, **tiles))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        run.notes.append("out of memory in the autoencoder, went on in small tiles with its maps on the CPU")
        # Outside the clause, so that the first try's memory is free by then.
        small = {name: min(tile, _SMALL[name]) for name, tile in tiles.items()}
        return work(self.tiled_vae(mode="exact", storage="cpu", **small))

    # ---- diffusion --------------------------------------------------------------------------------------------------------------

    def _diffuse(self, run: _Run, control: Tensor) -> Tensor:
        """What the nets make of `control` (1, 3, h, w) in [0, 1]: a picture of its size, in [-1, 1]."""
        config, plan = run.config, run.plan
        hints = self._hints(run, control) if config.method != "img2img" else None
        x = sample(
            config.sampler,
            self._denoiser(run, hints),
            self._start(run, control),
            plan.timesteps,
            self.alphas_cumprod,
            noise=run.noise,
            eta=config.eta,
            final_alpha=1.0 if config.final_level == "clean" else float(self.alphas_cumprod[0]),
            on_step=lambda info: run.report("sample", (info.step + 1) * len(plan.tiles), plan.evaluations),
        )
        picture = self._in_memory_that_is_there(run, lambda vae: decode(vae, x))
        run.report("decode", 1, 1)
        return picture

    def _start(self, run: _Run, control: Tensor) -> Tensor:
        """The latent at the first timestep, in float32: Eq. 4; pure noise; or SDEdit's for img2img."""
        config, plan = run.config, run.plan
        first = int(plan.timesteps[0])
        if config.init_latent_with_noise:
            shape = (1, self.vae.config.latent_channels, *plan.cells)
            n = run.noise("start", 0, shape).to(self.device)
            if config.offset_noise_scale:
                offset = run.noise("offset", 0, (*shape[:2], 1, 1))[..., :1, :1]  # ours draws whole fields
                n = n + config.offset_noise_scale * offset.to(n)
            return n
        z_lr = self._in_memory_that_is_there(run, lambda vae: self._encode(run, vae, control))
        run.report("encode", 1, 1)
        n = run.noise("start", 0, tuple(z_lr.shape))
        if config.method == "img2img":
            return q_sample(z_lr, first, self.alphas_cumprod, n)
        a_a = config.alpha_a
        if a_a is None:
            fallback = config.ans == "fallback" and config.sampler in official.FALLING_BACK
            level = config.added_noise_level or 0
            a_a = official.start_level(level, plan.timesteps, self.alphas_cumprod, fallback)
        more = run.noise("more", 0, tuple(z_lr.shape)) if config.formulas == "official" else None
        return ans_start(z_lr, float(self.alphas_cumprod[first]), a_a, n, more)

    def _encode(self, run: _Run, vae: Any, control: Tensor) -> Tensor:
        """z_LR, scaled: the posterior's mean, or as the official code has it a sample."""
        posterior = vae.encode((control * 2 - 1).to(dtype_of(self.vae)))
        z = posterior.mode()
        if run.config.posterior == "sample":
            z = posterior.sample(run.noise("posterior", 0, tuple(z.shape)))
        return z.float() * vae.config.scaling_factor

    def _hints(self, run: _Run, control: Tensor) -> dict[Box, Tensor]:
        """The control's features (1, C, h, w) for each tile, cut from those of the whole picture.

        The official code computes them from each tile's pixels, so that they end in zeros at the tile's edges.
        """
        cell, tiles = self.vae.downscale, run.plan.tiles
        if run.config.formulas == "official":
            return {box: self._hint(take(control, box.times(cell))) for box in tiles}
        hint = self._hint(control)
        return {box: take(hint, box) for box in tiles}

    def _hint(self, control: Tensor) -> Tensor:
        """The control's features (1, C, h, w) on the latent's grid; of a large picture piece by piece, the same to rounding."""
        cell = self.vae.downscale
        boxes = tile_boxes(control.shape[-2], control.shape[-1], _PIECE + 2 * _CONTEXT, 2 * _CONTEXT, cell)
        control, hint = control.to(dtype_of(self.controlnet)), None
        for box in boxes:
            piece = self.controlnet.embed(take(control, box))
            if hint is None:
                hint = piece.new_empty(1, piece.shape[1], *(side // cell for side in control.shape[-2:]))
            inner = _without(box, _CONTEXT, control.shape[-2:])
            own = Box(inner.top - box.top, inner.left - box.left, *inner.size).divided(cell)
            hint[..., *inner.divided(cell).window] = piece[..., *own.window]
        assert hint is not None
        return hint

    def _denoiser(self, run: _Run, hints: dict[Box, Tensor] | None) -> Denoiser:
        """eps(x, t) of the whole latent: guided, from tiles, in float32."""
        config, ts = run.config, [float(t) for t in run.plan.timesteps]
        controlled = set(_interval(ts, config.control_start, config.control_end))
        same = torch.equal(run.cond, run.uncond)  # nothing to lead away from
        guided = [] if same else _interval(ts, config.guidance_start, config.guidance_end)
        batch = config.tile_batch or tiles_at_once(
            self.device, max(b.height * b.width for b in run.plan.tiles)
        )

        def predict(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
            nonlocal batch
            seen = hints if float(t) in controlled else None
            blend = self._blend(run)
            todo = list(run.plan.tiles)
            while todo:
                now = [box for box in todo if box.size == todo[0].size][:batch]
                try:
                    predictions = self._predict(x, t, context, seen, now, config.conditioning_scale)
                except RuntimeError as error:
                    if len(now) == 1 or not is_out_of_memory(error):
                        raise
                    batch = len(now) // 2
                    run.notes.append(f"out of memory with {len(now)} tiles at once, went on with {batch}")
                    continue  # retried outside this clause, so that the failed batch's memory is free by then
                for box, prediction in zip(now, predictions, strict=True):
                    blend.add(box, prediction)
                    todo.remove(box)
            return blend.result(x.new_zeros(()))

        scale = config.guidance_scale if guided else 1.0
        interval = (guided[-1], guided[0]) if guided else None
        denoise = classifier_free_guidance(predict, run.cond, run.uncond, scale or 0.0, interval)
        return (
            v_prediction(denoise, self.alphas_cumprod) if self.prediction_type == "v_prediction" else denoise
        )

    def _predict(
        self, x: Tensor, t: Tensor, context: Tensor, hints: dict[Box, Tensor] | None,
        boxes: Sequence[Box],
        conditioning_scale: float | None,
    ) -> list[Tensor]:  # fmt: skip
        """The nets' prediction for each box of x (b, 4, h, w), context (b, 77, D): (b, 4, h', w') each, in float32."""
        tiles = torch.cat([take(x, box) for box in boxes]).to(dtype_of(self.unet))
        context = context.to(tiles.dtype).repeat(len(boxes), 1, 1)  # box by box, as the tiles
        residuals = None
        if hints is not None:
            hint = torch.cat([hints[box].expand(len(x), -1, -1, -1) for box in boxes])
            residuals = self.controlnet(tiles, t, context, scale=conditioning_scale, hint=hint)
        return list(self.unet(tiles, t, context, residuals).float().split(len(x)))

    def _blend(self, run: _Run) -> TileBlend:
        kind = official.GaussianBlend if run.config.formulas == "official" else TileBlend
        return kind(run.plan.tiles, *run.plan.cells)


def _interval(timesteps: Sequence[float], start: float, end: float) -> list[float]:
    """The timesteps of the steps that lie wholly within the shares `start` to `end` of the run."""
    count = len(timesteps)
    return [t for i, t in enumerate(timesteps) if i / count >= start and (i + 1) / count <= end]


def _without(box: Box, margin: int, size: Sequence[int]) -> Box:
    """`box` less `margin` pixels on each side that is not the border of a picture of `size`."""
    top, left = (start + (margin if start else 0) for start in (box.top, box.left))
    bottom, right = (
        end - (margin if end < side else 0) for end, side in zip((box.bottom, box.right), size, strict=True)
    )
    return Box(top, left, bottom - top, right - left)
