"""Mask files as people make them: grey, 1 bit, palette, 16 bits, floating point, 0 and 1, paint on
transparency.

Tensors  mask (1, 1, H, W) in {0, 1}, 1 = edit
Copying  needs pixels/colours.py, pixels/decode.py, pixels/luma.py, pixels/samples.py; numpy and torch
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from . import colours
from .decode import decoded_file
from .luma import BT601
from .samples import in_8_bits

WHITE = 128  # of 255: from here on a pixel is edited
_PAINTS = 16  # colours that a drawn mask may have
_MANY = 1_000_000  # pixels that are looked at to tell a photograph from a mask


@dataclass(frozen=True)
class MaskFile:
    """A mask as read."""

    mask: Tensor  # (1, 1, H, W) in {0, 1}
    brightest: int  # of its values, 0 to 255; of transparency, how transparent
    darkest: int
    notes: tuple[str, ...] = ()


def load_mask(file: str | Path | BinaryIO, *, invert: bool = False, from_alpha: bool = False) -> Tensor:
    """The mask of a file, (1, 1, H, W) in {0, 1}; as `read_mask`."""
    return read_mask(file, invert=invert, from_alpha=from_alpha).mask


def read_mask(file: str | Path | BinaryIO, *, invert: bool = False, from_alpha: bool = False) -> MaskFile:
    """Read a mask: 128 of 255 and more, or one half, is 1, edit.

    `from_alpha`: transparent is edit. Otherwise grey counts. Of one colour on transparency, the painted part
    is edit, whatever the colour; in other pictures transparent is black. A mask of nothing but 0 and 1 is one
    of black and white. `invert` swaps the two at the end. ValueError as `load_image`; if `from_alpha` finds
    no transparency; and for what looks like a photograph.
    """
    decoded = decoded_file(file, floats=True)
    alpha = None if decoded.alpha is None else _levels(decoded.alpha)
    if from_alpha:
        if alpha is None:
            raise ValueError(f"{file}: a picture without transparency; a mask from alpha needs some")
        read = MaskFile(mask_from_alpha(alpha), int(255 - alpha.min()), int(255 - alpha.max()))
    else:
        # As drawn, without any profile: a mask is not for looking at.
        samples = _levels(decoded.samples)
        if decoded.model == "cmyk":
            samples = (colours.to_srgb(samples, "cmyk", None) * 255).round().astype(np.uint8)
        rgb = samples if samples.ndim == 3 else np.broadcast_to(samples[..., None], (*samples.shape, 3))
        read = _of_colours(rgb, alpha, file)
    notes = (*(f"{file}: {note}" for note in decoded.notes), *read.notes)
    return replace(read, mask=1 - read.mask if invert else read.mask, notes=notes)


def mask_from_alpha(alpha: np.ndarray) -> Tensor:
    """The mask (1, 1, H, W) of an (H, W) alpha channel: transparent (below one half) is 1, edit."""
    return torch.from_numpy(_levels(alpha) < WHITE).float()[None, None]


def _levels(plane: np.ndarray) -> np.ndarray:
    """A plane of any type in 0 .. 255."""
    return (plane * 255).round().astype(np.uint8) if plane.dtype == np.float32 else in_8_bits(plane)


def _of_colours(rgb: np.ndarray, alpha: np.ndarray | None, file: object) -> MaskFile:
    if alpha is not None:
        painted = rgb[alpha >= WHITE]
        if len(painted) and alpha.min() < WHITE and np.ptp(painted, axis=0).max() <= 16:
            return MaskFile(1 - mask_from_alpha(alpha), int(alpha.max()), int(alpha.min()))
        rgb = (rgb * (alpha[..., None] / np.float32(255))).round().astype(np.uint8)
    grey = (rgb @ np.array(BT601, np.float32)).round().astype(np.uint8)
    notes: tuple[str, ...] = ()
    brightest, darkest = int(grey.max()), int(grey.min())
    if brightest == 1:
        notes = (f"{file}: its brightest value is 1 of 255; taken as a mask of 0 and 1",)
        grey = grey * 255
    elif looks_like_a_photograph(rgb):
        count = int((grey >= WHITE).sum())
        way_out = "" if alpha is None else "; to take its transparency as the mask, give --mask-from-alpha"
        raise ValueError(
            f"{file}: looks like a photograph, not like a mask, which is white where to edit and black elsewhere: "
            f"{count:,} of {grey.size:,} pixels would be painted{way_out}"
        )
    elif (share := float(((grey > 16) & (grey < 239)).mean())) > 0.05:
        notes = (
            f"{file}: {share:.0%} of it is neither black nor white; {WHITE} of 255 and more is edited, all of it",
        )
    return MaskFile(torch.from_numpy(grey >= WHITE).float()[None, None], brightest, darkest, notes)


def looks_like_a_photograph(rgb: np.ndarray) -> bool:
    """Whether (H, W, 3) uint8 has more colours, or more texture in its greys, than masks have.

    Soft edges and gradients are smooth, and flat paint has few colours, also after JPEG; photographs are
    neither.
    """
    step = max(1, rgb.shape[0] * rgb.shape[1] // _MANY)
    part = rgb[::step]  # whole rows: texture is looked for along them
    spread = np.ptp(part, axis=-1)
    coloured = part[spread > 24] >> 5
    if len(coloured) > 0.02 * spread.size:
        bins = np.bincount(coloured @ np.array([64, 8, 1]), minlength=512)
        if np.sort(bins)[:-_PAINTS].sum() > 0.1 * len(coloured):
            return True
    grey = part.mean(-1)
    if len(np.unique(grey.round())) <= _PAINTS:
        return False
    middle = (grey > 20) & (grey < 235)
    inside = middle[:, 2:] & middle[:, 1:-1] & middle[:, :-2]  # not the soft edge of a letter
    bend = np.abs(grey[:, 2:] - 2 * grey[:, 1:-1] + grey[:, :-2])[inside]
    return bool(len(bend) > 0.35 * grey.size and bend.mean() > 2)
