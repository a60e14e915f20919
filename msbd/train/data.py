"""The data of PASD's training: pictures cropped, flipped and degraded.

Paper    Yang et al. 2023 (PASD), arXiv:2308.14469, section 4.1: Real-ESRGAN's degradations of clean pictures
Tensors  clean (3, S, S) float32 in [-1, 1]; control (3, S, S) float32 in [0, 1] on 256 levels: what the
         ControlNet sees
Copying  needs pixels/resize.py, train/degrade.py, train/pictures.py; numpy, torch and Pillow

`TrainingData(pictures)[n]` is example number n of a run without end, a pure function of n and the seed. So a
run goes on exactly from the number of examples it has seen, each rank takes numbers of its own, and neither
the order of access nor the number of DataLoader workers changes anything:

    DataLoader(data, sampler=range(seen + rank, 10**9, ranks), batch_size=4, num_workers=8,
    collate_fn=collate)
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from ..pixels.resize import enlarge, round_to_8_bits
from .degrade import PASD, Degradation, Ranges, apply, chance, sample_parameters, usm_sharpen
from .pictures import Pictures

MANY = 16  # unreadable pictures in a row after which a run stops
ORDER, EXAMPLE, PAIR = range(3)  # what a generator is for; PAIR: tools.evaluate degrade


@dataclass(frozen=True)
class Example:
    """One pair to train on."""

    clean: Tensor  # (3, S, S) in [-1, 1]: the target
    control: Tensor  # (3, S, S) in [0, 1] on 256 levels: the same picture degraded, at the same size
    caption: str  # "" for none
    index: int  # the example's number in the run


@dataclass(frozen=True)
class Batch:
    """Several examples."""

    clean: Tensor  # (B, 3, S, S) in [-1, 1]
    control: Tensor  # (B, 3, S, S) in [0, 1]
    captions: list[str]
    index: list[int]

    def pin_memory(self) -> "Batch":
        """The same in page-locked memory: what a DataLoader's `pin_memory` calls."""
        return replace(self, clean=self.clean.pin_memory(), control=self.control.pin_memory())


def collate(examples: Sequence[Example]) -> Batch:
    """The examples as one batch, in order: a DataLoader's `collate_fn`."""
    return Batch(
        torch.stack([example.clean for example in examples]),
        torch.stack([example.control for example in examples]),
        [example.caption for example in examples],
        [example.index for example in examples],
    )


class UnreadableError(ValueError):
    """Too many pictures in a row could not be read.

    The message is one line, though a DataLoader puts a worker's traceback before it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


class TrainingData(Dataset[Example]):
    """Examples 0, 1, 2, ... without end: every picture once an epoch, in another order and crop each time.

    A random crop of `size` pixels a side, of the picture or, if that is smaller, of its enlargement; flipped
    or not; degraded by `ranges` to 1/`scale` and enlarged again. Degrading starts from the finished target,
    so that both are always flipped alike (the official code at HEAD can flip the degraded one only).
    `grayscale`: the control is the target's luma instead, not degraded (colourisation). ValueError if there
    are no pictures or `size` < `scale`.

    A picture that cannot be read is replaced by the next of the epoch's order, with one warning per picture;
    after MANY in a row: UnreadableError.
    """

    def __init__(
        self, pictures: Pictures, *, size: int = 512, ranges: Ranges = PASD, scale: int = 4,
        grayscale: bool = False, seed: int = 0,
    ) -> None:  # fmt: skip
        if len(pictures) == 0:
            raise ValueError("no pictures to train on; training needs one at least")
        if not 1 <= scale <= size:
            raise ValueError(
                f"crops of {size} pixels cannot be degraded to 1/{scale}; take 1 <= scale <= size"
            )
        self.pictures, self.size, self.ranges, self.scale = pictures, size, ranges, scale
        self.grayscale, self.seed = grayscale, seed
        self._order = (-1, torch.empty(0, dtype=torch.int64))  # the last epoch asked for
        # Shared by all DataLoader workers, so that each picture is warned of once.
        self._unreadable = torch.zeros(len(pictures), dtype=torch.bool).share_memory_()

    def __getitem__(self, n: int) -> Example:
        """Example `n`, from 0 up, without an upper end. IndexError below 0."""
        if n < 0:
            raise IndexError(f"example {n}: examples are numbered from 0")
        picture, caption = self._read(n)
        generator = seeded(self.seed, EXAMPLE, n)
        crop = random_crop(picture, self.size, generator)
        if chance(generator, 0.5):
            crop = ImageOps.mirror(crop)
        if self.grayscale:
            clean, control = to_unit(crop), to_unit(crop.convert("L").convert("RGB"))
        else:
            clean, lq, _ = degrade_pair(to_unit(crop), generator, ranges=self.ranges, scale=self.scale)
            control = enlarge(lq, (self.size, self.size))
        return Example(clean[0] * 2 - 1, control[0], caption, int(n))

    def _read(self, n: int) -> tuple[Image.Image, str]:
        epoch, position = divmod(n, len(self.pictures))
        order, failure = self._epoch_order(epoch), None
        for ahead in range(min(MANY, len(order))):
            index = int(order[(position + ahead) % len(order)])
            try:
                picture, caption = self.pictures.read(index)
            except (OSError, ValueError) as error:
                failure = error
                self._report(index, error)
            else:
                return picture if isinstance(picture, Image.Image) else Image.fromarray(picture), caption
        raise UnreadableError(
            f"{min(MANY, len(order))} pictures in a row could not be read; is the data there and whole? "
            f"The last: {failure}"
        )

    def _epoch_order(self, epoch: int) -> Tensor:
        if self._order[0] != epoch:
            generator = seeded(self.seed, ORDER, epoch)
            self._order = epoch, torch.randperm(len(self.pictures), generator=generator)
        return self._order[1]

    def _report(self, index: int, error: Exception) -> None:
        if not self._unreadable[index]:
            self._unreadable[index] = True
            warnings.warn(f"{error}; the next picture is taken instead", stacklevel=4)


def random_crop(picture: Image.Image, size: int, generator: torch.Generator) -> Image.Image:
    """A random square of `size` pixels a side.

    A picture whose shorter side is less is enlarged first (bicubic) until that side is `size`. The official
    code adds 0.02 to the factor, against rounding, which the clamp here does not need.
    """
    factor = max(1.0, size / min(picture.size))
    width, height = (max(size, int(side * factor)) for side in picture.size)
    left = int(torch.randint(width - size + 1, (), generator=generator))
    top = int(torch.randint(height - size + 1, (), generator=generator))
    if factor == 1:
        return picture.crop((left, top, left + size, top + size))
    # Only the crop is enlarged: a strip of 1 x 10 000 pixels would fill gigabytes.
    right, bottom = (
        min(side, (at + size) / factor) for side, at in zip(picture.size, (left, top), strict=True)
    )
    box = (left / factor, top / factor, right, bottom)
    return picture.resize((size, size), Image.Resampling.BICUBIC, box=box)


def degrade_pair(
    clean: Tensor, generator: torch.Generator, *, ranges: Ranges = PASD, scale: int = 4
) -> tuple[Tensor, Tensor, Degradation]:
    """The target, its degraded version, and what was drawn.

    `clean` (B, 3, H, W) in [0, 1] on 256 levels, as both results are. The target is `clean`, sharpened if
    `ranges.usm`; the degraded version, of 1/`scale` of its size, is made from the target.
    """
    target = round_to_8_bits(usm_sharpen(clean)) if ranges.usm else clean
    parameters = sample_parameters(generator, ranges=ranges, scale=scale)
    return target, apply(target, parameters), parameters


def to_unit(picture: Image.Image) -> Tensor:
    """An RGB picture as (1, 3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255


def seeded(seed: int, purpose: int, number: int) -> torch.Generator:
    """A CPU generator for one purpose and number.

    Hashed, so that neighbours have nothing in common; of torch's CPU generators there are 2^32.
    """
    state = np.random.SeedSequence(seed % 2**64, spawn_key=(purpose, number)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))
