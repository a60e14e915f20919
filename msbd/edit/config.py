"""The options of an edit, and what it has to know of the model that it is for.

Paper    Ackermann & Li 2022 (Multi-Stage Blended Diffusion), arXiv:2210.12965, appendix A.2, "Hyperparameters"
Units    pixels unless a name says otherwise
Copying  this file stands alone: the standard library only, so that a command line can show every default without torch
"""

from dataclasses import dataclass, fields
from typing import Literal, get_args, get_origin

Method = Literal["msbd", "naive", "segments", "first-stage-only"]


@dataclass(frozen=True)
class ModelSpec:
    """The sizes a diffusion model was trained for; the size of every stage follows from them."""

    native: int = 512  # pixels, side of its training pictures
    multiple: int = 64  # pixels; picture sides it likes are multiples of this
    guidance_scale: float = 7.5  # the paper's, for Stable Diffusion


@dataclass(frozen=True)
class EditConfig:
    """Every option of an edit. The defaults are the paper's; None means "as suits the model"."""

    method: Method = "msbd"  # the paper's method, or one of its baselines
    margin: float = 1.4  # side of the crop over the longer side of the mask, at least 1
    seed: int | None = None  # of all noise, where the call gets no generator; None: 0
    # Sampling: all stages
    num_steps: int = 50  # T of the paper: DDIM steps of a whole run
    eta: float = 1.0  # 0: deterministic DDIM, 1: as much noise as DDPM
    guidance_scale: float | None = None  # 1: the prompt alone, without guidance
    negative_prompt: str = ""
    background_level: Literal["prev", "current"] = "prev"  # of the next evaluation (line 7), or of this one
    background_noise: Literal["once", "fresh"] = "once"  # one x-hat for all repeats of a step, or for each
    latent_mask: Literal["any", "center"] = "any"  # cells with any masked pixel, or with a masked centre
    dilate_mask: bool = False  # grow the latent mask early on, by 3, 2, 1 cells, then not
    # First stage
    first_stage_size: int | None = None  # side of the square with its area; None: native
    first_stage_batch: int = 5  # B: candidates to choose from
    repaint_steps: int = 5  # R: repeats of each step after its first evaluation; 0: Blended Diffusion
    repaint_jump: int = 1  # steps each repeat goes back
    start_timestep: float = 1.0  # fraction of the schedule to start from
    start_from: Literal["source", "noise"] = "source"  # q(x_T | x~), line 4, or pure noise (whole runs only)
    clip_reranking: bool = True  # choose by CLIP; otherwise the first candidate
    rerank_area: Literal["crop", "mask"] = "crop"  # what CLIP looks at
    # Later stages
    max_edgelen: int | None = None  # side of the square with the middle stage's area; None: 1.5 x native
    straight_to_grid: bool = False  # leave the intermediate stage out
    upscale_startstep: float = 0.4  # T' / T of stages in one piece
    grid_startstep: float = 0.25  # T' / T of tiled stages
    upscale_num_steps: int | None = None  # T of the later stages; None: num_steps (official: twice that)
    upscaling_mode: Literal["rrdb", "bilinear", "bicubic", "sharpen", "none"] = "rrdb"  # none: nearest pixel
    lowpass_reference: Literal["matching", "half", "no"] = "matching"  # LP of line 20
    conditional_upscale: bool = True  # with the prompt; otherwise with the empty one
    blended_upscale: bool = True  # keep the background; otherwise SDEdit of the whole crop
    tile: int | None = None  # side of a tile; None: 1.5 x native
    grid_overlap: int | None = None  # of neighbouring tiles; None: a sixth of the tile
    tile_batch: int | None = None  # tiles sampled at once; None: what fits into memory
    # Decoder optimisation
    decoder_optimization: bool = True
    decoderopt_steps: int = 100  # of Adam
    decoderopt_lr: float = 1e-4
    decoderopt_weight: float = 100.0  # lambda of eq. 1; the paper does not give it, the official code has 100
    decoderopt_latents: Literal["sampler", "reencode"] = "sampler"  # z_out of eq. 1, or E(x_out)
    # Composite
    feather: int = 0  # pixels inside the mask over which the edit fades in
    formulas: Literal["paper", "official"] = "paper"  # whose counting, starts, ladder and tile blending

    def __post_init__(self) -> None:
        for field in fields(self):
            if get_origin(field.type) is Literal and getattr(self, field.name) not in get_args(field.type):
                allowed = ", ".join(map(str, get_args(field.type)))
                raise ValueError(f"{field.name} is {getattr(self, field.name)!r}; expected one of {allowed}")
        for name, least in (("num_steps", 1), ("first_stage_batch", 1), ("repaint_steps", 0), ("repaint_jump", 0),
                            ("margin", 1), ("eta", 0), ("feather", 0), ("decoderopt_steps", 0), ("decoderopt_lr", 0),
                            ("decoderopt_weight", 0), ("tile_batch", 1), ("first_stage_size", 1), ("max_edgelen", 1),
                            ("tile", 1), ("grid_overlap", 0), ("upscale_num_steps", 1)):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise ValueError(f"{name} is {value}; expected at least {least}")
        if self.eta > 1:
            raise ValueError(
                f"eta is {self.eta}; expected 0 (deterministic DDIM) to 1 (as much noise as DDPM)"
            )
        for name in ("start_timestep", "upscale_startstep", "grid_startstep"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a fraction above 0, at most 1")
        if self.repaint_jump == 0 and self.formulas == "paper":
            raise ValueError("repaint_jump is 0, the official code's word for one step; expected 1 or more")

    def for_model(self, spec: ModelSpec) -> "ResolvedEditConfig":
        """The same options with everything filled in. ValueError where a size does not suit the model."""
        side = spec.native * 3 // 2
        tile = self.tile or side
        overlap = tile // 6 // spec.multiple * spec.multiple or spec.multiple
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
    """An EditConfig completed for a model. Only `tile_batch` may still be None: free memory decides it, when it runs."""

    seed: int = 0
    guidance_scale: float = 7.5
    first_stage_size: int = 512
    max_edgelen: int = 768
    upscale_num_steps: int = 50
    tile: int = 768
    grid_overlap: int = 128


_LATER_STEPS = {"paper": 1, "official": 2}  # T of the later stages in lengths of the first stage's
