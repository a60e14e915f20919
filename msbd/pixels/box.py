"""A box of whole pixels, and sides that are whole multiples.

Units    pixels; sizes are (H, W); a box may lie partly outside its picture, which is then mirrored
         (resize.take)
Copying  this file stands alone: the standard library only
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Box:
    """Rows top..bottom-1 and columns left..right-1 of a picture; it may lie partly outside it."""

    top: int
    left: int
    height: int
    width: int

    @property
    def bottom(self) -> int:
        return self.top + self.height

    @property
    def right(self) -> int:
        return self.left + self.width

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.height, self.width

    @property
    def window(self) -> tuple[slice, slice]:
        """Rows and columns, to index a picture with: `image[..., *box.window]`."""
        return slice(self.top, self.bottom), slice(self.left, self.right)

    def contains(self, other: "Box") -> bool:
        """Whether `other` lies wholly inside this box."""
        return (
            self.top <= other.top
            and self.left <= other.left
            and other.bottom <= self.bottom
            and other.right <= self.right
        )

    def times(self, factor: int) -> "Box":
        """The same box in a picture `factor` times larger."""
        return Box(self.top * factor, self.left * factor, self.height * factor, self.width * factor)

    def divided(self, factor: int) -> "Box":
        """The box in latent cells of `factor` pixels; ValueError if it does not lie on whole cells."""
        numbers = (self.top, self.left, self.height, self.width)
        if any(number % factor for number in numbers):
            raise ValueError(
                f"{self} does not lie on cells of {factor} pixels; its numbers must be multiples of {factor}"
            )
        return Box(*(number // factor for number in numbers))


def round_up(value: float, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `value`."""
    # rounded first, because 640 * 1.1 is 704.0000000000001
    return math.ceil(round(value / multiple, 6)) * multiple
