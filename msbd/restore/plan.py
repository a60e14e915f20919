"""What a restoration will do before it does it, and what it gives: sizes, tiles and timesteps; the result.

Paper    Yang et al. 2023 (PASD), arXiv:2308.14469; the official code's preparation is in official.py
Units    pixels unless a name says otherwise; sizes are (H, W)
Copying  needs restore_config.py, prompts.py, crops.py, tiles.py, solvers.py and official.py, and what those need
"""

from dataclasses import dataclass, field

from torch import Tensor

from samplers.schedule import start_timesteps

from ..pixels.box import Box, round_up
from ..pixels.tiles import tile_boxes
from . import official
from .config import NET_FREE, RestoreConfig, RestoreMeasures
from .solvers import evaluations, make_timesteps

SMALLEST = 64  # pixels a side that the nets get to see; a smaller picture is mirrored outwards
ENLARGED = {
    "sr": 4,
    "oldphoto": 4,
    "stylize": 1,
    "colorize": 1,
}  # mode -> how many times larger its result is


@dataclass(frozen=True)
class RestorePlan:
    """Sizes, tiles and timesteps of a restoration.

    `config` has no None left but `tile_batch`, and one of the two names of the level of the start.
    """

    size: tuple[int, int]  # of the picture
    output: tuple[int, int]  # of the result
    work: tuple[int, int]  # at which it is restored
    frame: Box  # what the nets get of that: whole cells; it may lie outside, where the picture is mirrored
    cell: int  # pixels a side of a latent cell
    tiles: tuple[Box, ...]  # latent cells; one for a picture in one piece
    timesteps: Tensor  # (N,) of the evaluations
    config: RestoreConfig

    @property
    def cells(self) -> tuple[int, int]:
        """(h, w) of the latent."""
        return self.frame.height // self.cell, self.frame.width // self.cell

    @property
    def evaluations(self) -> int:
        """Evaluations of the nets: each tile by itself, both halves of the guidance as one."""
        if self.config.method in NET_FREE:
            return 0
        return evaluations(self.config.sampler, len(self.timesteps)) * len(self.tiles)


@dataclass(frozen=True)
class RestoreResult:
    """The restored picture and how it came about."""

    image: Tensor  # (1, 3, H, W) in [-1, 1], at the asked size
    plan: RestorePlan  # its config.seed is the one that was used, drawn from a generator or not (unless `noise` was given)
    prompt: str  # what the nets read
    negative_prompt: str
    seconds: dict[str, float] = field(default_factory=dict)  # by task
    notes: tuple[str, ...] = ()  # what did not go as planned: batches of tiles halved to fit into memory


def plan_restore(
    size: tuple[int, int], output: tuple[int, int] | None, config: RestoreConfig, measures: RestoreMeasures, cell: int = 8
) -> RestorePlan:  # fmt: skip
    """How a picture of `size` becomes one of `output` (None: as its mode has it). ValueError for unsuitable options."""
    full = config.for_model(measures)
    output = output or (ENLARGED[full.mode] * size[0], ENLARGED[full.mode] * size[1])
    if min(*size, *output) < 1:
        raise ValueError(
            f"a picture of {size} cannot become one of {output}; both sides must be at least 1 pixel"
        )
    gray, least = full.mode == "colorize", full.process_size or 1
    if full.formulas == "official":
        if output[0] * size[1] != output[1] * size[0]:
            raise ValueError(
                f"preset official enlarges both sides alike; {size} cannot become {output} with it"
            )
        work = official.prepared_size(size, output[0] / size[0], least, grayscale=gray)
        frame = Box(0, 0, *work)
    else:
        work = work_size(size if gray else output, least, shrink=gray)
        frame = framed(work, cell)
    tiles = _tiles((frame.height // cell, frame.width // cell), full)
    timesteps = make_timesteps(full.sampler, full.num_inference_steps, spacing=full.spacing)
    if full.method == "img2img":
        timesteps = start_timesteps(timesteps, full.strength)
    return RestorePlan(size, output, work, frame, cell, tuple(tiles), timesteps, full)


def work_size(size: tuple[int, int], least: int, *, shrink: bool = False) -> tuple[int, int]:
    """The size at which a picture is restored: its shorter side at least `least`, but its longer at most twice that by it.

    The nets know pictures of about that size; the official code enlarges without an end, a strip of 3 x 500 to 768 x 128000.
    With `shrink` a larger one is made smaller too: colours need no more, and the luma comes from the picture itself.
    """
    factor = min(least / min(size), 2 * least / max(size))
    factor = factor if shrink else max(1.0, factor)
    height, width = (max(1, round(side * factor)) for side in size)
    return height, width


def framed(work: tuple[int, int], cell: int) -> Box:
    """The smallest box of whole cells, `SMALLEST` a side at least, with a picture of size `work` in its middle."""
    height, width = (round_up(max(side, SMALLEST), cell) for side in work)
    return Box((work[0] - height) // 2, (work[1] - width) // 2, height, width)


def _tiles(cells: tuple[int, int], config: RestoreConfig) -> list[Box]:
    tile, overlap = config.latent_tiled_size or 0, config.latent_tiled_overlap or 0
    if config.formulas == "official":
        return official.latent_tiles(*cells, tile, overlap)
    return tile_boxes(*cells, tile, overlap)
