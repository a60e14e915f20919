"""Where `formulas` is decided: the paper's functions and the official code's, side by side under the same
names.

Copying  needs pixels/box.py, pixels/tiles.py, restore/official.py, restore/paper.py, samplers/schedule.py

A plan carries the chosen ones as `plan.rules`, and nothing else asks for `formulas`. What each computes, and
why they differ, stands in official.py.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from samplers.schedule import NoiseSource

from ..pixels.box import Box
from ..pixels.tiles import TileBlend
from . import official, paper


class Rules(Protocol):
    """What paper.py and official.py each have; shapes and ranges stand in paper.py."""

    def plan_sizes(
        self, input_size: tuple[int, int], output_size: tuple[int, int], process_size: int, downscale: int,
        *, grayscale: bool,
    ) -> tuple[tuple[int, int], Box]:  # fmt: skip
        """Working size, and the box of whole latent cells that the nets get of it."""
        ...

    def latent_tiles(self, height: int, width: int, tile: int, overlap: int) -> list[Box]:
        """The tiles of a latent, in cells, all of one size."""
        ...

    def blend(self, tiles: Sequence[Box], height: int, width: int) -> TileBlend:
        """What makes one prediction of the tiles'."""
        ...

    def prepare(
        self, image: Tensor, output_size: tuple[int, int], working_size: tuple[int, int], process_size: int, *, grayscale: bool
    ) -> Tensor:  # fmt: skip
        """The control picture."""
        ...

    def hints(
        self, embed: Callable[[Tensor], Tensor], control: Tensor, tiles: Sequence[Box], downscale: int
    ) -> dict[Box, Tensor]:
        """The control's features for each tile."""
        ...

    def start_level(
        self, added_noise_level: int, sampler: str, timesteps: Sequence[int] | Tensor, alphas_cumprod: Tensor
    ) -> float:
        """a_a of Eq. 4, from a timestep. Chosen by `ans`, not by `formulas`."""
        ...

    def start(self, z_lr: Tensor, a_n: float, a_a: float, noise: NoiseSource) -> Tensor:
        """The start latent, Eq. 4."""
        ...

    def finish(
        self, restored: Tensor, control: Tensor, image: Tensor, output_size: tuple[int, int], color_fix: str
    ) -> Tensor:
        """The result, with its colours put right, at the size that was asked for."""
        ...

    def finish_coloured(self, restored: Tensor, image: Tensor, output_size: tuple[int, int]) -> Tensor:
        """The result of mode colorize."""
        ...


RULES: dict[str, Rules] = {"paper": paper, "official": official}  # by RestoreConfig.formulas
ANS: dict[str, Rules] = {"honoured": paper, "fallback": official}  # by RestoreConfig.ans: whose `start_level`
