"""The options of an edit, and what it has to know of the model that it is for.

Paper    Ackermann & Li 2022 (Multi-Stage Blended Diffusion), arXiv:2210.12965, appendix A.2,
         "Hyperparameters"
Units    pixels unless a name says otherwise
Copying  needs options.py: the standard library only, so that a command line can show every default without
         torch
"""

from dataclasses import dataclass, fields
from math import inf
from typing import Any, Literal

from ..options import check_options, option

Method = Literal["msbd", "naive", "segments", "first-stage-only"]
Sampler = Literal[
    "ddim", "unipc", "dpmpp", "dpmpp_3m", "deis", "lms", "euler", "euler_a", "dpmpp_2m_sde", "dpmpp_3m_sde", "lcm"
]  # fmt: skip
Seam = Literal["adam", "closed-form", "asymmetric", "membrane", "none"]


@dataclass(frozen=True)
class ModelSpec:
    """The sizes a diffusion model was trained for; the size of every stage follows from them."""

    native: int = 512  # pixels, side of its training pictures
    multiple: int = 64  # pixels; picture sides it likes are multiples of this
    guidance_scale: float = 7.5  # the paper's, for Stable Diffusion


@dataclass(frozen=True)
class EditConfig:
    """Every option of an edit. The defaults are the paper's; None means "as suits the model"."""

    method: Method = option(
        "msbd",
        "the paper's method, or a baseline: the crop in one piece, in tiles, or no more than the first stage",
    )
    margin: float = option(1.4, "side of the crop, in lengths of the mask's longer side")
    seed: int | None = option(None, "seed of all noise, where the call gets no generator", unset="0")

    # Sampling: all stages
    sampler: Sampler = option("ddim", "the solver; lcm is for models and LoRAs distilled for it")
    spacing: Literal["auto", "linspace", "leading", "trailing", "karras", "exponential", "beta"] = option(
        "auto",
        "how the timesteps, or the sigmas, are spread; auto is the sampler's usual way, leading for ddim",
    )
    num_steps: int = option(50, "diffusion steps of a whole run, T of the paper")
    eta: float = option(
        1.0, "fresh noise of each step of ddim, from 0 (deterministic) to 1 (as much as DDPM)"
    )
    guidance_scale: float | None = option(
        None, "how strongly to follow the prompt; 1 is without guidance", unset="the model's, 7.5 as a rule"
    )
    negative_prompt: str = option("", "what to keep away from")
    prompt_syntax: Literal["plain", "webui"] = option(
        "plain",
        "how prompts are read: as words, or with (weights:1.3) and BREAK as the web interface reads them",
    )
    background_level: Literal["prev", "current"] = option(
        "prev", "noise level of the blended background: that of the next evaluation (line 7), or of this one"
    )
    background_noise: Literal["once", "fresh"] = option(
        "once", "one noise for all repeats of a step, or a fresh one for each of them"
    )
    latent_mask: Literal["any", "center"] = option(
        "any", "which latent cells of 8 x 8 pixels are edited: with any masked pixel, or with a masked centre"
    )
    dilate_mask: bool = option(
        False, "grow the latent mask early on, by 3, 2 and 1 latent cells; helps thin masks"
    )

    # First stage
    first_stage_size: int | None = option(
        None, "side of the square with the first stage's area", unit="pixels", unset="the model's native size"
    )
    first_stage_batch: int = option(5, "candidates to choose from, B of the paper")
    candidates_kept: int | None = option(
        None, "how many of them go on after half of the first stage, the best by CLIP", unset="all"
    )
    repaint_steps: int = option(
        5, "RePaint's repeats of each step after its first evaluation, R of the paper; 0 is Blended Diffusion"
    )
    repaint_jump: int = option(1, "steps that each repeat goes back")
    repaint_end: float = option(
        0.0, "fraction of the schedule below which no step is repeated: the layout is settled by then"
    )
    start_timestep: float = option(
        1.0, "fraction of the schedule to start from; below 1 the old content shows through"
    )
    start_from: Literal["source", "noise"] = option(
        "source",
        "start from the noised picture (line 4), or from pure noise; in part of a schedule always the first",
    )
    clip_reranking: bool = option(True, "let CLIP choose the candidate; otherwise the first is taken")
    rerank_area: Literal["crop", "mask"] = option("crop", "what CLIP looks at: the crop, or the mask's box")

    # Later stages
    max_edgelen: int | None = option(
        None, "side of the square with the middle stage's area", unit="pixels", unset="1.5 x the native size"
    )
    straight_to_grid: bool = option(False, "leave the middle stage out")
    upscale_startstep: float = option(
        0.4, "fraction of the schedule that a stage in one piece runs through, T'/T of the paper"
    )
    grid_startstep: float = option(0.25, "fraction of the schedule that a tiled stage runs through")
    upscale_num_steps: int | None = option(
        None, "diffusion steps of a whole run in later stages", unset="as in the first; official: twice that"
    )
    upscaling_mode: Literal["rrdb", "bilinear", "bicubic", "sharpen", "none"] = option(
        "rrdb",
        "how a stage's result is enlarged for the next; rrdb is the model's own net, none the nearest pixel",
    )
    lowpass_reference: Literal["matching", "half", "no"] = option(
        "matching",
        "blur the background as much as the enlarged picture (LP of line 20), by half of it, or not",
    )
    conditional_upscale: bool = option(True, "give later stages the prompt; otherwise the empty one")
    blended_upscale: bool = option(
        True, "keep the background while later stages run; otherwise they are SDEdit of the whole crop"
    )
    tiles: Literal["separate", "joint"] = option(
        "separate",
        "sample each tile by itself and crossfade their pictures, or all together as one latent",
    )
    tile: int | None = option(None, "side of a tile", unit="pixels", unset="1.5 x the native size")
    grid_overlap: int | None = option(
        None,
        "overlap of neighbouring tiles",
        unit="pixels",
        unset="a third of the tile where tiles are joint, else a sixth",
    )
    tile_batch: int | None = option(None, "tiles that are sampled at once", unset="what fits into memory")

    # The seam
    seam: Seam = option(
        "adam",
        "how the result is made to meet the picture around it: by decoder optimisation, by its last layer "
        "alone, by a decoder that sees the picture, by the smoothest correction, or not at all",
    )
    seam_stages: Literal["all", "last"] = option(
        "all",
        "after which stages the result is made to meet the picture; later stages enlarge what the first ones did",
    )
    decoder_optimization: bool = option(True, "if not, seam is none")
    decoderopt_steps: int = option(100, "steps of Adam in decoder optimisation")
    decoderopt_lr: float = option(1e-4, "learning rate of decoder optimisation")
    # The paper does not give lambda; the official code has 100.
    decoderopt_weight: float = option(
        100.0, "weight of the background in the decoder's loss, lambda of eq. 1"
    )
    decoderopt_latents: Literal["sampler", "reencode"] = option(
        "sampler", "what the decoder is fitted to: the sampler's latents (eq. 1), or the result encoded anew"
    )

    decoderopt_area: Literal["tiles", "ring"] = option(
        "tiles", "what Adam fits the decoder to: whole tiles, or only crops that the mask's edge runs through"
    )
    decoderopt_dtype: Literal["float32", "bfloat16"] = option(
        "float32", "precision of its decoding; the weights are trained in float32"
    )
    decoderopt_stop: float = option(
        0.0, "end it when ten steps lower the loss by less than this share; 0 is never"
    )
    membrane_reach: int = option(
        6,
        "pixels of the stage, from the mask's edge inwards, over which the membrane fades out; with 0 it does not",
    )

    # Composite
    feather: int = option(0, "pixels inside the mask over which the edit fades in")
    formulas: Literal["paper", "official"] = option(
        "paper", "whose counting of steps, start levels, ladder of sizes and blending of tiles"
    )

    @classmethod
    def default(cls, **options: Any) -> "EditConfig":
        """What `python -m tools.edit` does without a flag, DEFAULT, and `options` over it."""
        return cls(**{**DEFAULT, **options})

    def __post_init__(self) -> None:
        check_options(self, _RANGES)
        for name in ("start_timestep", "upscale_startstep", "grid_startstep"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a fraction above 0, at most 1")
        if self.formulas == "official":
            for name, only in (
                ("sampler", "ddim"),
                ("spacing", "auto"),
                ("repaint_end", 0.0),
                ("tiles", "separate"),
            ):
                if getattr(self, name) != only:
                    raise ValueError(
                        f"{name} is {getattr(self, name)}; expected {only}, as formulas is official"
                    )
        if self.repaint_jump == 0 and self.formulas == "paper":
            raise ValueError("repaint_jump is 0, the official code's word for one step; expected 1 or more")

    def for_model(self, spec: ModelSpec) -> "ResolvedEditConfig":
        """The same options with everything filled in. ValueError where a size does not suit the model."""
        side = spec.native * 3 // 2
        tile = self.tile or side
        part = 3 if self.tiles == "joint" else 6  # A.2: 128 of 768
        overlap = tile // part // spec.multiple * spec.multiple or spec.multiple
        usual = {
            "seed": 0,
            "guidance_scale": spec.guidance_scale,
            "first_stage_size": spec.native,
            "max_edgelen": side,
            "upscale_num_steps": self.num_steps * _LATER_STEPS[self.formulas],
            "tile": tile,
            "grid_overlap": overlap if overlap < tile else 0,
        }
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        if not self.decoder_optimization:
            given["seam"] = "none"
        missing = {name: value for name, value in usual.items() if given[name] is None}
        full = ResolvedEditConfig(**(given | missing))
        for name in ("first_stage_size", "max_edgelen", "tile", "grid_overlap"):
            if getattr(full, name) % spec.multiple:
                raise ValueError(
                    f"{name} is {getattr(full, name)}; this model needs multiples of {spec.multiple} pixels"
                )
        return full


@dataclass(frozen=True)
class ResolvedEditConfig(EditConfig):
    """An EditConfig completed for a model. Only `tile_batch` may still be None: free memory decides it, when
    it runs.
    """

    seed: int = 0
    guidance_scale: float = 7.5
    first_stage_size: int = 512
    max_edgelen: int = 768
    upscale_num_steps: int = 50
    tile: int = 768
    grid_overlap: int = 128


# What the command does without a flag. `python -m tools.evaluate presets` measures it beside the paper's.
DEFAULT: dict[str, Any] = {
    "sampler": "dpmpp",
    "num_steps": 16,
    "repaint_steps": 0,
    "first_stage_batch": 3,
    "tiles": "joint",
    "seam": "membrane",
    "seam_stages": "last",
    "decoderopt_area": "ring",
    "decoderopt_stop": 0.02,
}
# The same with the least work.
FAST: dict[str, Any] = {**DEFAULT, "num_steps": 12, "first_stage_batch": 2}

_LATER_STEPS = {"paper": 1, "official": 2}  # T of the later stages in lengths of the first stage's

_RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(
        ("num_steps", "upscale_num_steps", "first_stage_batch", "candidates_kept", "tile_batch", "margin"),
        (1, inf),
    ),
    **dict.fromkeys(("first_stage_size", "max_edgelen", "tile"), (1, inf)),
    **dict.fromkeys(("repaint_steps", "repaint_jump", "grid_overlap", "feather"), (0, inf)),
    **dict.fromkeys(("decoderopt_steps", "decoderopt_lr", "decoderopt_weight", "membrane_reach"), (0, inf)),
    "decoderopt_stop": (0, 1),
    "eta": (0, 1),
    "repaint_end": (0, 1),
}
