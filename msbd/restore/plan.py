"""What a restoration will do before it does it, and what it gives: sizes, tiles and timesteps; the result.

Paper    Yang et al. 2023 (PASD), arXiv:2308.14469
Units    pixels unless a name says otherwise; sizes are (H, W)
Copying  needs pixels/box.py, restore/config.py, restore/rules.py, solvers.py, samplers/schedule.py
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from samplers.schedule import make_alphas_cumprod, make_betas, start_timesteps

from ..pixels.box import Box
from ..solvers import evaluations, make_steps
from .config import ADDED_NOISE_LEVEL, NET_FREE, ModelSpec, ResolvedRestoreConfig, RestoreConfig
from .rules import ANS, RULES, Rules

# Mode -> how many times larger its result is where no size is asked for.
ENLARGED = {"sr": 4, "oldphoto": 4, "stylize": 1, "colorize": 1}


@dataclass(frozen=True)
class RestorePlan:
    """All that a restoration needs to know before anything is computed."""

    config: ResolvedRestoreConfig
    input_size: tuple[int, int]
    output_size: tuple[int, int]
    working_size: tuple[int, int]  # at which the picture is restored
    padded_box: Box  # what the nets get of that: whole cells; where it lies outside, the picture is mirrored
    downscale: int  # pixels a side of a latent cell
    tiles: tuple[Box, ...]  # latent cells, all of one size; one tile for a picture in one piece
    timesteps: Tensor  # (N,) of the evaluations, falling; the first is N of Eqs. 3 and 4
    controlled: tuple[float, ...]  # the timesteps at which the ControlNet acts
    guided: tuple[float, ...]  # those with classifier-free guidance
    a_a: float  # adjustable level of Eq. 4, 0 (pure noise) to 1 (Eq. 3)
    levels: Tensor | None = None  # (N,) of the latent, where they are not those of the timesteps

    def controls(self, t: float) -> bool:
        """Whether the ControlNet acts at timestep `t`, which may lie within a step: then as at its start."""
        return min((float(own) for own in self.timesteps if own >= t), default=t) in self.controlled

    @property
    def guidance_interval(self) -> tuple[float, float] | None:
        """Lowest and highest timestep with guidance, those within the last guided step included; None for
        none.
        """
        if not self.guided:
            return None
        after = [float(t) for t in self.timesteps if t < self.guided[-1]]
        return (after[0] + 1e-3 if after else 0.0), self.guided[0]

    @property
    def rules(self) -> Rules:
        """The functions of `config.formulas`."""
        return RULES[self.config.formulas]

    @property
    def cells(self) -> tuple[int, int]:
        """(h, w) of the latent."""
        return self.padded_box.height // self.downscale, self.padded_box.width // self.downscale

    @property
    def inside(self) -> Box:
        """The picture at its working size, as a box in the padded picture."""
        return Box(-self.padded_box.top, -self.padded_box.left, *self.working_size)

    @property
    def evaluations(self) -> int:
        """Evaluations of the nets: each tile by itself, both halves of the guidance as one."""
        if self.config.method in NET_FREE:
            return 0
        clean = self.config.final_level == "clean"
        return evaluations(self.config.sampler, len(self.timesteps), clean=clean) * len(self.tiles)


@dataclass(frozen=True)
class RestoreResult:
    """The restored picture and how it came about."""

    image: Tensor  # (1, 3, H, W) in [-1, 1], at the asked size
    # Its config.seed is the one that was used, drawn from a generator or not (unless `noise` was given).
    plan: RestorePlan
    prompt: str  # what the nets read
    negative_prompt: str
    seconds: dict[str, float] = field(default_factory=dict)  # by task
    notes: tuple[str, ...] = ()  # what did not go as planned: batches of tiles halved to fit into memory


def plan_restore(
    input_size: tuple[int, int],
    output_size: tuple[int, int] | None,
    config: RestoreConfig,
    spec: ModelSpec,
    downscale: int = 8,
    alphas_cumprod: Tensor | None = None,
) -> RestorePlan:
    """How a picture of `input_size` becomes one of `output_size` (None: as its mode has it).

    `alphas_cumprod` (T,) is the model's schedule (None: Stable Diffusion 1.x's). ValueError for unsuitable
    options.
    """
    full = config.for_model(spec)
    rules = RULES[full.formulas]
    times = ENLARGED[full.mode]
    output_size = output_size or (times * input_size[0], times * input_size[1])
    if min(*input_size, *output_size) < 1:
        raise ValueError(
            f"a picture of {input_size} cannot become one of {output_size}; both sides must be at least 1 pixel"
        )
    working_size, padded_box = rules.plan_sizes(
        input_size, output_size, full.process_size, downscale, grayscale=full.mode == "colorize"
    )
    cells = padded_box.height // downscale, padded_box.width // downscale
    tiles = rules.latent_tiles(*cells, full.latent_tiled_size, full.latent_tiled_overlap)
    if alphas_cumprod is None:
        alphas_cumprod = make_alphas_cumprod(make_betas())
    timesteps, levels = make_steps(
        full.sampler, full.num_inference_steps, full.spacing, alphas_cumprod, full.sigma_min, full.sigma_max
    )
    if full.method == "img2img":
        timesteps = start_timesteps(timesteps, full.strength)
        levels = None if levels is None else levels[-len(timesteps) :]
    return RestorePlan(
        config=full,
        input_size=input_size,
        output_size=output_size,
        working_size=working_size,
        padded_box=padded_box,
        downscale=downscale,
        tiles=tuple(tiles),
        timesteps=timesteps,
        controlled=_within(timesteps.tolist(), full.control_start, full.control_end),
        guided=_within(timesteps.tolist(), full.guidance_start, full.guidance_end),
        a_a=_adjustable_level(full, timesteps, alphas_cumprod),
        levels=levels,
    )


def _adjustable_level(config: ResolvedRestoreConfig, timesteps: Tensor, alphas_cumprod: Tensor) -> float:
    """a_a of Eq. 4: `alpha_a`, or what `added_noise_level` stands for."""
    if config.init_latent_with_noise or config.method in (*NET_FREE, "img2img"):
        return 0.0  # these do not start from Eq. 4
    if config.alpha_a is not None:
        return config.alpha_a
    n = ADDED_NOISE_LEVEL if config.added_noise_level is None else config.added_noise_level
    return ANS[config.ans].start_level(n, config.sampler, timesteps, alphas_cumprod)


def _within(timesteps: Sequence[float], start: float, end: float) -> tuple[float, ...]:
    """The timesteps of the steps that lie wholly within the shares `start` to `end` of the run."""
    count = len(timesteps)
    return tuple(t for i, t in enumerate(timesteps) if i / count >= start and (i + 1) / count <= end)
