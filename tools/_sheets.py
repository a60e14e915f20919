"""Pictures about pictures: an edit before and after, its candidates beside each other, its stages.

Sheets are (H, W, 3) uint8.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from msbd.pixels.encode import LONGEST
from msbd.pixels.files import Photo, save_image
from msbd.pixels.masks import dilate, resize_mask
from msbd.pixels.samples import to_pixels

WIDEST = 1600  # pixels, the longer side of a comparison
GAP = 8  # pixels between panels
CHECK, CHECKS = 8, (204, 255)  # pixels, and levels, of the board that is seen through transparency
PAPER, FRAME = (255, 255, 255), (220, 30, 30)


def shown(photo: Photo) -> np.ndarray:
    """A photo as it is seen, (H, W, 3) uint8 sRGB: through its profile, over a checkerboard where
    transparent.
    """
    if photo.alpha is None:
        return photo.pixels
    rows, columns = (np.arange(side) // CHECK for side in photo.size)
    board = np.take(CHECKS, (rows[:, None] + columns) % 2)[..., None]
    return photo.over(board)


def comparison(before: np.ndarray, after: np.ndarray, mask: Tensor) -> np.ndarray:
    """Before, before with the outline of `mask` (1, 1, H, W), after, side by side, about WIDEST at most."""
    size = _panel(before.shape[:2], 3)
    panels = [_shrunk(before, size), _shrunk(before, size), _shrunk(after, size)]
    small = resize_mask(mask.cpu(), size)
    padded = F.pad(1 - small, (1, 1, 1, 1), value=1)  # the border is an edge too
    kept = 1 - dilate(padded, 1)[..., 1:-1, 1:-1]
    outline = (dilate(small, 1) - kept)[0, 0].numpy() > 0
    panels[1][outline] = FRAME
    return _row(panels)


def before_and_after(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """A degraded picture at the size of what it became, and that, side by side, about WIDEST at most."""
    size = _panel(after.shape[:2], 2)
    return _row([_shrunk(before, size), _shrunk(after, size)])


def _panel(size: tuple[int, ...], count: int) -> tuple[int, int]:
    """The size (H, W) at which `count` pictures of `size` stand side by side: no side of it all beyond
    WIDEST.
    """
    height, width = size
    scale = min(1.0, (WIDEST - (count - 1) * GAP) / (count * width), WIDEST / height)
    return max(1, round(height * scale)), max(1, round(width * scale))


def contact_sheet(candidates: Tensor, scores: Tensor | None, chosen: int, *, columns: int = 5) -> np.ndarray:
    """`candidates` (B, 3, h, w) in [-1, 1], `columns` in a row, numbered, with scores; the chosen framed."""
    panels = []
    for number, candidate in enumerate(candidates):
        label = f"{number}" if scores is None else f"{number}: {float(scores[number]):.2f}"
        panels.append(_labelled(to_pixels(candidate[None]), label, framed=number == chosen))
    rows = [_row(panels[start : start + columns]) for start in range(0, len(panels), columns)]
    width = max(row.shape[1] for row in rows)
    return np.concatenate(
        [np.pad(row, ((0, GAP), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
    )


def stacked(sheets: Sequence[np.ndarray]) -> np.ndarray:
    """Sheets below each other, on paper as wide as the widest."""
    width = max(sheet.shape[1] for sheet in sheets)
    wide = [
        np.pad(sheet, ((0, 0), (0, width - sheet.shape[1]), (0, 0)), constant_values=255) for sheet in sheets
    ]
    return np.concatenate(wide)


def fitting(sheet: np.ndarray, path: Path) -> np.ndarray:
    """A sheet, made smaller where the format of `path` does not hold it."""
    height, width = sheet.shape[:2]
    scale = LONGEST.get(path.suffix.lower(), max(height, width)) / max(height, width)
    return sheet if scale >= 1 else _shrunk(sheet, (max(1, int(height * scale)), max(1, int(width * scale))))


def labelled_row(pictures: Mapping[str, np.ndarray]) -> np.ndarray:
    """Pictures (H, W, 3) of one size, side by side at that size, each with its name below."""
    cards = [_labelled(pixels, name, framed=False) for name, pixels in pictures.items()]
    height = max(len(card) for card in cards)  # letters differ in height
    return _row(
        [np.pad(card, ((0, height - len(card)), (0, 0), (0, 0)), constant_values=255) for card in cards]
    )


def _labelled(pixels: np.ndarray, label: str, *, framed: bool) -> np.ndarray:
    height, width = pixels.shape[:2]
    font = ImageFont.load_default()
    left, top, right, bottom = (round(edge) for edge in font.getbbox(label))
    card = Image.new("RGB", (max(width, right - left) + 2 * GAP, height + bottom - top + 3 * GAP), PAPER)
    draw = ImageDraw.Draw(card)
    if framed:
        draw.rectangle((0, 0, width + 2 * GAP - 1, height + 2 * GAP - 1), fill=FRAME)
    card.paste(Image.fromarray(pixels), (GAP, GAP))
    draw.text((GAP - left, height + 2 * GAP + 2 - top), label, fill=FRAME if framed else (0, 0, 0), font=font)
    return np.array(card)


def _row(panels: list[np.ndarray]) -> np.ndarray:
    gap = np.full((panels[0].shape[0], GAP, 3), 255, np.uint8)
    parts = [part for panel in panels for part in (gap, panel)][1:]
    return np.concatenate(parts, axis=1)


def _shrunk(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.array(Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling.LANCZOS))


class StagePictures:
    """Writes every intermediate picture of an edit as a numbered PNG."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._count = folder, 0
        self.part = ""  # in front of the names: which part of a mask is being edited

    def __call__(self, name: str, picture: Tensor) -> None:
        self._count += 1
        words = re.sub(r"[^a-z0-9]+", "-", (self.part + name).lower())
        save_image(picture, self._folder / f"{self._count:02}-{words}.png")
