"""Pictures about pictures: an edit before and after, its candidates beside each other, its stages.

Sheets are (H, W, 3) uint8.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from msbd.pixels.files import save_image, to_pixels
from msbd.pixels.masks import dilate, resize_mask

WIDEST = 1600  # pixels, the width of a comparison
GAP = 8  # pixels between panels
PAPER, FRAME = (255, 255, 255), (220, 30, 30)


def comparison(before: np.ndarray, after: np.ndarray, mask: Tensor) -> np.ndarray:
    """Before, before with the outline of `mask` (1, 1, H, W), after, side by side, about WIDEST at most."""
    height, width = before.shape[:2]
    scale = min(1.0, (WIDEST - 2 * GAP) / (3 * width))
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    panels = [_shrunk(before, size), _shrunk(before, size), _shrunk(after, size)]
    small = resize_mask(mask.cpu(), size)
    padded = F.pad(1 - small, (1, 1, 1, 1), value=1)  # the border is an edge too
    kept = 1 - dilate(padded, 1)[..., 1:-1, 1:-1]
    outline = (dilate(small, 1) - kept)[0, 0].numpy() > 0
    panels[1][outline] = FRAME
    return _row(panels)


def before_and_after(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """A degraded picture at the size of what it became, and that, side by side, about WIDEST at most."""
    height, width = after.shape[:2]
    scale = min(1.0, (WIDEST - GAP) / (2 * width))
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    return _row([_shrunk(before, size), _shrunk(after, size)])


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
        folder.mkdir(exist_ok=True)
        self._folder, self._count = folder, 0

    def __call__(self, name: str, picture: Tensor) -> None:
        self._count += 1
        words = re.sub(r"[^a-z0-9]+", "-", name.lower())
        save_image(picture, self._folder / f"{self._count:02}-{words}.png")
