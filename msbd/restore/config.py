"""The options of a restoration, and the measures of the model that it is for.

Paper    Yang et al. 2023 (PASD), arXiv:2308.14469; names and values as in its official code, where that has them
Units    pixels or latent cells, as each line says
Copying  needs prompts.py; the standard library only, so that a command line can show every default without torch
"""

from dataclasses import dataclass, replace
from math import inf
from typing import Any, Literal, get_args, get_origin

from .prompts import ADDED, GRAY_NEGATIVE, NEGATIVE

Mode = Literal["sr", "stylize", "oldphoto", "colorize"]
Method = Literal["pasd", "controlnet", "img2img", "rrdb", "bicubic"]
Sampler = Literal["unipc", "ddim", "dpmpp", "euler", "euler_a", "pndm", "lcm"]
NET_FREE: tuple[Method, ...] = ("bicubic", "rrdb")  # methods without diffusion
NOT_PASD: tuple[Method, ...] = ("controlnet", "img2img")  # methods on the base's own U-Net

ADDED_NOISE_LEVEL = 900  # n of the paper's alpha_a = alphas_cumprod[n], section 4.2


@dataclass(frozen=True)
class RestoreMeasures:
    """The sizes and words that a model was made for; the defaults are those of PASD on Stable Diffusion 1.5."""

    native: int = 512  # pixels, side of its training pictures
    guidance_scale: float = 9.0
    conditioning_scale: float = 1.0
    prompts: bool = True  # whether the added and the negative prompt help it

    @property
    def process_size(self) -> int:
        """Pixels: the shorter side of what is restored, at least; 768 for PASD."""
        return 3 * self.native // 2


@dataclass(frozen=True)
class RestoreConfig:
    """Every choice of a restoration; the defaults are the paper's. None: as the model or the mode has it."""

    # What to do
    mode: Mode = "sr"
    method: Method = (
        "pasd"  # or a baseline: PASD's ControlNet without PACA, SD's img2img, RRDB alone, interpolation
    )
    fidelity: float | None = (
        None  # 0 inventive .. 1 faithful: sets alpha_a and conditioning_scale, see `dial`
    )
    # Sampling
    sampler: Sampler = "unipc"  # second order, B2(h)
    num_inference_steps: int = 20
    spacing: Literal["auto", "linspace", "leading", "trailing"] = (
        "auto"  # of the timesteps; auto: the sampler's usual
    )
    final_level: Literal["clean", "first"] = (
        "clean"  # where the last step ends: no noise, or the first timestep's
    )
    eta: float = 0.0  # of ddim
    guidance_scale: float | None = None  # eps_neg + w (eps_pos - eps_neg); the model's: 9 for SD
    guidance_start: float = 0.0  # guidance is on from this share of the steps ...
    guidance_end: float = 1.0  # ... to this one
    added_prompt: str | None = None  # after the user's and what was recognised
    negative_prompt: str | None = None
    # Control
    conditioning_scale: float | None = (
        None  # of the residuals, in skips and PACA; None: the dial's, else the model's: 1 for PASD
    )
    control_start: float = 0.0  # the ControlNet acts from this share of the steps ...
    control_end: float = 1.0  # ... to this one
    # The start
    alpha_a: float | None = None  # adjustable level of Eq. 4, 0 (pure noise) to 1 (Eq. 3)
    added_noise_level: int | None = None  # the same as a timestep n: alpha_a = alphas_cumprod[n]; None: 900
    init_latent_with_noise: bool = False  # start from noise alone
    offset_noise_scale: float = 0.0  # of noise equal over a channel, added to such a start
    posterior: Literal["mean", "sample"] = "mean"  # of the encoder, at the start
    strength: float = 0.6  # of img2img: share of the schedule that it runs through
    # Sizes
    process_size: int | None = (
        None  # pixels: a smaller shorter side is enlarged to it, and the result shrunk back
    )
    latent_tiled_size: int | None = None  # cells: side of a tile; None: twice the model's native size
    latent_tiled_overlap: int | None = None  # cells; None: a quarter of the tile
    tile_batch: int | None = None  # tiles at a time; None: what fits into memory
    vae_tiling: Literal["exact", "fast", "off"] = "exact"
    encoder_tiled_size: int = 1024  # pixels
    decoder_tiled_size: int = 224  # cells
    # The end
    color_fix: Literal["wavelet", "adain", "none"] | None = (
        None  # None: wavelet; none where the style may change it
    )
    formulas: Literal["paper", "official"] = (
        "paper"  # official: its sizes, 8-bit rounding, tiles and their weights
    )
    ans: Literal["honoured", "fallback"] = (
        "honoured"  # fallback: 900 silently misread, as with newer libraries
    )
    seed: int | None = None  # of all noise; None: 0

    def __post_init__(self) -> None:
        for name, hint in RestoreConfig.__annotations__.items():
            value, words = getattr(self, name), _words(hint)
            if words and value is not None and value not in words:
                raise ValueError(f"{name} is {value!r}; expected one of {', '.join(words)}")
        for name, (least, most) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                expected = f"{least} to {most}" if most < inf else f"at least {least}"
                raise ValueError(f"{name} is {value}; expected {expected}")
        if self.encoder_tiled_size % 8:
            raise ValueError(f"encoder_tiled_size is {self.encoder_tiled_size}; expected a multiple of 8")
        if self.alpha_a is not None and self.added_noise_level is not None:
            raise ValueError("alpha_a and added_noise_level are one level said in two ways; give one of them")
        if self.mode == "colorize" and self.method in NET_FREE:
            raise ValueError(f"method {self.method} knows no colours; mode colorize takes another")
        if self.method == "img2img" and self.init_latent_with_noise and self.strength < 1:
            raise ValueError(
                "img2img starts from the picture below strength 1; expected no init_latent_with_noise"
            )
        for name in ("guidance", "control"):
            start, end = getattr(self, f"{name}_start"), getattr(self, f"{name}_end")
            if start > end:
                raise ValueError(f"{name}_start is {start}, after {name}_end, {end}; expected it before")

    def for_model(self, measures: RestoreMeasures) -> "RestoreConfig":
        """The same options with every None but `tile_batch` filled in. ValueError for tiles that cannot overlap so.

        The level of the start is then in one of alpha_a and added_noise_level, and fidelity stays as it was.
        """
        words = (ADDED, NEGATIVE) if self.mode != "colorize" else ("", GRAY_NEGATIVE)
        alpha_a, scale = (None, measures.conditioning_scale) if self.fidelity is None else dial(self.fidelity)
        levels: dict[str, float | None] = {}  # of the start: one of the two names
        if self.added_noise_level is None:
            levels = {"added_noise_level": ADDED_NOISE_LEVEL} if alpha_a is None else {"alpha_a": alpha_a}
        if self.alpha_a is not None:
            levels = {}
        tile = self.latent_tiled_size or max(8, measures.native // 4)
        filled = {
            **levels,
            "added_prompt": words[0] if measures.prompts else "",
            "negative_prompt": words[1] if measures.prompts else "",
            "conditioning_scale": scale,
            "guidance_scale": measures.guidance_scale,
            "process_size": measures.process_size,
            "latent_tiled_size": tile,
            "latent_tiled_overlap": tile // 4,
            "color_fix": "none" if self.mode in ("stylize", "colorize") else "wavelet",
            "seed": 0,
        }
        full = replace(self, **{name: value for name, value in filled.items() if getattr(self, name) is None})
        if self.mode == "colorize":  # the luma is the source's, the chroma is to change
            full = replace(full, color_fix="none")
        overlap = full.latent_tiled_overlap or 0
        if overlap >= tile:
            raise ValueError(
                f"latent_tiled_overlap is {overlap}; expected less than latent_tiled_size, {tile}"
            )
        return full


def dial(fidelity: float) -> tuple[float, float]:
    """(alpha_a, conditioning_scale) of a `fidelity` from 0, inventive, to 1, faithful; docs/restore.md plots what it does."""
    return fidelity, 0.7 + 0.8 * fidelity


_RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("fidelity", "alpha_a", "eta"), (0, 1)),
    **dict.fromkeys(("guidance_start", "guidance_end", "control_start", "control_end"), (0, 1)),
    **dict.fromkeys(("guidance_scale", "conditioning_scale", "offset_noise_scale"), (0, inf)),
    **dict.fromkeys(("num_inference_steps", "tile_batch"), (1, inf)),
    **dict.fromkeys(("process_size", "latent_tiled_size", "decoder_tiled_size"), (8, inf)),
    "latent_tiled_overlap": (0, inf),
    "encoder_tiled_size": (64, inf),
    "added_noise_level": (0, 999),
    "strength": (0.001, 1),
}


def _words(hint: Any) -> tuple[str, ...]:
    """The words that a field may hold, where they are fixed."""
    return next((get_args(part) for part in (hint, *get_args(hint)) if get_origin(part) is Literal), ())
