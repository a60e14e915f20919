"""The options of a restoration, and the sizes and words of the model that it is for.

Paper    Yang et al. 2023 (PASD), arXiv:2308.14469; names and values as in its official code, where that has
         them
Units    pixels, or latent cells of 8 x 8 pixels, as each field says
Copying  needs options.py, restore/prompts.py: the standard library only, so that a command line can show
         every default without torch
"""

from dataclasses import dataclass, fields
from math import inf
from typing import Any, Literal

from ..options import check_options, option
from .prompts import GRAY_NEGATIVE, NEGATIVE, QUALITY_PROMPT

Mode = Literal["sr", "stylize", "oldphoto", "colorize"]
Method = Literal["pasd", "controlnet", "img2img", "rrdb", "bicubic"]
Sampler = Literal[
    "unipc", "ddim", "dpmpp", "dpmpp_3m", "dpmpp_2s", "deis", "euler", "euler_a", "heun", "dpm2", "dpm2_a", "lms",
    "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde", "pndm", "lcm", "tcd",
]  # fmt: skip
NET_FREE: tuple[Method, ...] = ("bicubic", "rrdb")  # methods without diffusion
NOT_PASD: tuple[Method, ...] = ("controlnet", "img2img")  # methods on the base's own U-Net

ADDED_NOISE_LEVEL = 900  # n of the paper's alpha_a = alphas_cumprod[n], section 4.2


@dataclass(frozen=True)
class ModelSpec:
    """The sizes and words that a model was made for; the defaults are PASD's on Stable Diffusion 1.5."""

    native: int = 512  # pixels, side of its training pictures
    guidance_scale: float = 9.0
    conditioning_scale: float = 1.0
    uses_prompts: bool = True  # whether the added and the negative prompt help it

    @property
    def process_size(self) -> int:
        """Pixels: the shorter side of what is restored, at least; 768 for PASD."""
        return 3 * self.native // 2


@dataclass(frozen=True)
class RestoreConfig:
    """Every choice of a restoration; the defaults are the paper's. None: as the model or the mode has it."""

    # What to do
    mode: Mode = option(
        "sr",
        "what to do: enlarge and repair, give another style, repair an old photograph, or colour a grey one",
    )
    method: Method = option(
        "pasd",
        "PASD, or a baseline: its ControlNet without pixel attention, SD's img2img, RRDB, interpolation",
    )
    fidelity: float | None = option(
        None,
        "from 0, inventive, to 1, faithful: sets the start level and the conditioning scale",
        unset="neither",
    )

    # Sampling
    sampler: Sampler = option("unipc", "the solver; unipc is of second order, with B2(h)")
    num_inference_steps: int = option(20, "diffusion steps")
    spacing: Literal["auto", "linspace", "leading", "trailing", "karras", "exponential", "beta"] = option(
        "auto", "how the timesteps, or the sigmas, are spread; auto is the sampler's usual way"
    )
    sigma_min: float | None = option(
        None, "least sigma of spacing karras, exponential and beta", unset="that of the first timestep"
    )
    sigma_max: float | None = option(
        None, "greatest sigma of these, where the run starts", unset="that of the last timestep"
    )
    final_level: Literal["clean", "first"] = option(
        "clean", "where the last step ends: in no noise at all, or at the level of the first timestep"
    )
    eta: float = option(0.0, "fresh noise of each step of ddim, from 0 (none) to 1")
    # eps_neg + w (eps_pos - eps_neg)
    guidance_scale: float | None = option(
        None, "how strongly to follow the prompts; 1 is without guidance", unset="the model's, 9 as a rule"
    )
    guidance_start: float = option(0.0, "share of the steps after which guidance begins")
    guidance_end: float = option(1.0, "share of the steps after which guidance ends")
    added_prompt: str | None = option(
        None, "words after the prompt", unset='the model\'s, as a rule "clean, high-resolution, 8k"'
    )
    prompt_syntax: Literal["plain", "webui"] = option(
        "plain",
        "how prompts are read: as words, or with (weights:1.3) and BREAK as the web interface reads them",
    )
    negative_prompt: str | None = option(
        None, "what to keep away from", unset="the model's: blurry, noise, ..."
    )

    # Control
    conditioning_scale: float | None = option(
        None, "how strongly the picture itself steers", unset="by the fidelity, else the model's, 1 as a rule"
    )
    control_start: float = option(0.0, "share of the steps after which the picture begins to steer")
    control_end: float = option(1.0, "share of the steps after which it no longer steers")

    # The start
    alpha_a: float | None = option(
        None,
        "share of the degraded picture in the start latent, from 0 (pure noise) to 1; Eq. 4 of the paper",
    )
    added_noise_level: int | None = option(
        None, "the same as a timestep n, 0 to 999: alpha_a is alphas_cumprod[n]", unset="900, the paper's"
    )
    init_latent_with_noise: bool = option(False, "start from noise alone")
    offset_noise_scale: float = option(
        0.0, "noise that is one value over each channel, added to a start from noise alone"
    )
    posterior: Literal["mean", "sample"] = option(
        "mean", "which latent the start takes: the mean of the encoder's, or a sample"
    )
    strength: float = option(0.6, "share of the schedule that img2img runs through")

    # Sizes
    process_size: int | None = option(
        None,
        "the shorter side of a smaller picture is enlarged to it, the longer one at most to twice it, and back",
        unit="pixels",
        unset="1.5 x the model's native size",
    )
    latent_tiled_size: int | None = option(
        None, "side of a tile", unit="latent cells", unset="twice the model's native size"
    )
    latent_tiled_overlap: int | None = option(
        None, "overlap of neighbouring tiles", unit="latent cells", unset="a quarter of the tile"
    )
    tile_batch: int | None = option(None, "tiles that are sampled at once", unset="what fits into memory")
    vae_tiling: Literal["exact", "fast", "off"] = option(
        "exact", "tiles of the autoencoder: equal to the whole picture; nearly so, in less memory; or none"
    )
    encoder_tiled_size: int = option(1024, "side of the tiles of the autoencoder's encoder", unit="pixels")
    decoder_tiled_size: int = option(224, "side of the tiles of its decoder", unit="latent cells")

    # The end
    color_fix: Literal["wavelet", "adain", "none"] | None = option(
        None,
        "give the result the colours of the input",
        unset="wavelet; none for stylize, never for colorize",
    )
    formulas: Literal["paper", "official"] = option(
        "paper", "whose sizes, 8-bit rounding, tiles and weights of tiles"
    )
    ans: Literal["honoured", "fallback"] = option(
        "honoured",
        "whether the start level is honoured, or misread as newer libraries do with unipc and dpmpp",
    )
    seed: int | None = option(None, "seed of all noise, where the call gets no generator", unset="0")

    def __post_init__(self) -> None:
        check_options(self, _RANGES)
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

    def for_model(self, spec: ModelSpec) -> "ResolvedRestoreConfig":
        """The same options with all that is open filled in. ValueError for tiles that cannot overlap so.

        Fidelity sets the level of the start and the conditioning scale, unless they are given themselves.
        """
        gray = self.mode == "colorize"
        quality, negative = ("", GRAY_NEGATIVE) if gray else (QUALITY_PROMPT, NEGATIVE)
        alpha_a, conditioning_scale = None, spec.conditioning_scale
        if self.fidelity is not None:
            alpha_a, conditioning_scale = dial(self.fidelity)
        level: dict[str, Any] = {}  # where the start's is not given under either of its two names
        if self.alpha_a is None and self.added_noise_level is None:
            level = {"added_noise_level": ADDED_NOISE_LEVEL} if alpha_a is None else {"alpha_a": alpha_a}
        tile = self.latent_tiled_size or max(8, spec.native // 4)
        usual = {
            "added_prompt": quality if spec.uses_prompts else "",
            "negative_prompt": negative if spec.uses_prompts else "",
            "conditioning_scale": conditioning_scale,
            "guidance_scale": spec.guidance_scale,
            "process_size": spec.process_size,
            "latent_tiled_size": tile,
            "latent_tiled_overlap": tile // 4,
            "color_fix": "none" if self.mode == "stylize" else "wavelet",  # the style may change the colours
            "seed": 0,
        }
        said = {field.name: getattr(self, field.name) for field in fields(RestoreConfig)}
        if gray:  # the luma is the source's, the chroma is to change
            said["color_fix"] = "none"
        filled = {name: value for name, value in usual.items() if said[name] is None}
        config = ResolvedRestoreConfig(**{**said, **level, **filled})
        if config.latent_tiled_overlap >= tile:
            raise ValueError(
                f"latent_tiled_overlap is {config.latent_tiled_overlap}; "
                f"expected less than latent_tiled_size, {tile}"
            )
        return config


@dataclass(frozen=True)
class ResolvedRestoreConfig(RestoreConfig):
    """A RestoreConfig for one model: nothing that a run needs is open. `RestoreConfig.for_model` makes it.

    Its defaults are PASD's on Stable Diffusion 1.5, in mode sr. Three fields are as they were said:
    `fidelity`; `alpha_a` and `added_noise_level`, which say the level that `RestorePlan.a_a` holds.
    `tile_batch` None is what fits into memory when it runs; `sigma_min` and `sigma_max` None are the ends of
    the model's schedule.
    """

    guidance_scale: float = ModelSpec.guidance_scale
    added_prompt: str = QUALITY_PROMPT
    negative_prompt: str = NEGATIVE
    conditioning_scale: float = ModelSpec.conditioning_scale
    process_size: int = ModelSpec().process_size
    latent_tiled_size: int = ModelSpec.native // 4
    latent_tiled_overlap: int = ModelSpec.native // 16
    color_fix: Literal["wavelet", "adain", "none"] = "wavelet"
    seed: int = 0


# What nets make of a control picture and no more: DDIM from Eq. 3 at the picture's own size (64 pixels at
# least), without guidance, words or colours of the command's own, in one tile. By RestoreConfig's names, to
# be overruled one by one.
PLAIN: dict[str, Any] = {
    "sampler": "ddim",
    "alpha_a": 1.0,
    "guidance_scale": 1.0,
    "conditioning_scale": 1.0,
    "added_prompt": "",
    "negative_prompt": "",
    "process_size": 8,
    "latent_tiled_size": 2**20,
    "latent_tiled_overlap": 0,
    "color_fix": "none",
}


def dial(fidelity: float) -> tuple[float, float]:
    """(alpha_a, conditioning_scale) of a `fidelity` from 0, inventive, to 1, faithful.

    docs/restore.md plots what it does.
    """
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
    **dict.fromkeys(("sigma_min", "sigma_max"), (1e-6, 1e6)),
    "strength": (0.001, 1),
}
