"""Mask files as people make them: grey, 1 bit, palette, 16 bits, floating point, 0 and 1, paint on
transparency.

Tensors  mask (1, 1, H, W) in {0, 1}, 1 = edit
Copying  needs pixels/colours.py, pixels/decode.py, pixels/luma.py; numpy and torch
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from . import colours
from .decode import decoded_file, name_of
from .luma import BT601

WHITE = 128  # of 255: from here on a pixel is edited
_PAINTS = 16  # colours that a drawn mask may have
_RUN = 12  # pixels of one colour that make a flat part of a row; more than the side of a JPEG's block
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
    no transparency, or none of it is opaque; for samples of no known white; for what looks like a photograph;
    and, with `invert`, for grey of which nothing is white.
    """
    decoded = decoded_file(file, floats=True)
    file = name_of(file) or "the mask"
    alpha, more = None, ()
    if decoded.alpha is not None:
        alpha, more = _levels(decoded.alpha, f"{file}: the greatest value of its alpha")
    if from_alpha:
        if alpha is None:
            raise ValueError(f"{file}: a picture without transparency; a mask from alpha needs some")
        if 0 < alpha.max() < WHITE and not invert:
            raise ValueError(
                f"{file}: --mask-from-alpha would edit all of it: the greatest value of its alpha is {alpha.max()} of 255; "
                f"{WHITE} and more is kept"
            )
        read = MaskFile(_transparent(alpha), int(255 - alpha.min()), int(255 - alpha.max()))
    else:
        # As drawn, without any profile: a mask is not for looking at.
        samples = decoded.samples
        if decoded.model == "cmyk":
            samples = colours.to_srgb(samples, "cmyk", None)
        samples, of_samples = _levels(samples, f"{file}: its brightest value")
        more += of_samples
        rgb = samples if samples.ndim == 3 else np.broadcast_to(samples[..., None], (*samples.shape, 3))
        read = _of_colours(rgb, alpha, file)
        if invert and 0 < read.brightest < WHITE:
            raise ValueError(
                f"{file}: --invert-mask would edit all of it: its brightest value is {read.brightest} of 255; {WHITE} and "
                "more is kept"
            )
    notes = (*(f"{file}: {note}" for note in decoded.notes), *more, *read.notes)
    return replace(read, mask=1 - read.mask if invert else read.mask, notes=notes)


def _transparent(alpha: np.ndarray) -> Tensor:
    """The mask (1, 1, H, W) of an (H, W) uint8 alpha: transparent (below one half) is 1, edit."""
    return torch.from_numpy(alpha < WHITE).float()[None, None]


def _levels(plane: np.ndarray, what: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """A plane of any type in 0 .. 255, and a note where its greatest value says that its white is not its
    type's: programs save 0 and 1, and 0 .. 255, in all of them. What is negative or no number is 0.
    """
    floats = plane.dtype.kind == "f"
    full = 1 if floats else int(np.iinfo(plane.dtype).max)
    whites = (1, 255, 65535) if floats else (*(white for white in (1, 255, 65535) if white < full), full)
    greatest = np.fmax.reduce(plane, axis=None).item()  # NaN only where there is nothing else
    slack = 1.99 if floats else 1  # interpolation goes beyond white
    white = next((white for white in whites if greatest <= white * slack), 0)
    told = f"{what} is {greatest:.6g} of {full:,}"
    if not white or (greatest < white / 510 and plane.any()):
        raise ValueError(f"{told}, as no mask has it; save it with 8 bits a sample")
    notes = (f"{told}; taken as a mask of 0 {'and' if white == 1 else 'to'} {white}",)
    if greatest <= 0 or (white == full and greatest <= 1.001 * full):
        notes = ()
    if white == 255 and plane.dtype == np.uint8:
        return plane, notes
    with np.errstate(over="ignore", invalid="ignore"):  # of what is no number, or none that a mask has
        levels = np.nan_to_num(plane * np.float32(255 / white))
    return levels.clip(0, 255).round().astype(np.uint8), notes


def _of_colours(rgb: np.ndarray, alpha: np.ndarray | None, file: object) -> MaskFile:
    if alpha is not None:
        painted = rgb[alpha >= WHITE]
        if len(painted) and alpha.min() < WHITE and np.ptp(painted, axis=0).max() <= 16:
            return MaskFile(1 - _transparent(alpha), int(alpha.max()), int(alpha.min()))
        rgb = (rgb * (alpha[..., None] / np.float32(255))).round().astype(np.uint8)
    grey = (rgb @ np.array(BT601, np.float32)).round().astype(np.uint8)
    notes: tuple[str, ...] = ()
    brightest, darkest = max(int(grey.max()), int(rgb.any())), int(grey.min())  # dark blue is not 0
    if looks_like_a_photograph(rgb):
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

    Soft edges and gradients are smooth, and flat paint has few colours, also after JPEG; maps of many colours
    are flat, and scans of a mask have two levels; photographs are none of these.
    """
    step = max(1, rgb.shape[0] * rgb.shape[1] // _MANY)
    part = rgb[::step]  # whole rows: texture is looked for along them
    spread = np.ptp(part, axis=-1)
    coloured = part[spread > 24] >> 5
    if len(coloured) > 0.02 * spread.size:
        bins = np.bincount(coloured @ np.array([64, 8, 1]), minlength=512)
        if np.sort(bins)[:-_PAINTS].sum() > 0.1 * len(coloured):
            return not _is_flat(part)
    grey = part.mean(-1)
    if len(np.unique(grey.round())) <= _PAINTS:
        return False
    near, deep = _bends(grey, 3), _bends(grey, 9)
    textured = len(near) > 0.35 * grey.size and near.mean() > 2
    if len(deep) > 0.1 * grey.size:  # a small picture on white; the rings of a small JPEG are few
        textured |= deep.mean() > 2 and np.median(deep) > 1
    scanned = len(coloured) <= 0.02 * spread.size and _has_two_levels(grey)
    return bool(textured and not scanned and not _is_flat(part))


def _bends(grey: np.ndarray, run: int) -> np.ndarray:
    """Second differences along rows, in the middle of `run` pixels that are neither dark nor bright: none of
    the soft edge of a letter.
    """
    if grey.shape[1] < run:
        return np.empty(0)
    middle = (grey > 20) & (grey < 235)
    inside = np.asarray(np.lib.stride_tricks.sliding_window_view(middle, run, axis=1).all(-1))
    bends = np.abs(grey[:, 2:] - 2 * grey[:, 1:-1] + grey[:, :-2])
    return bends[:, run // 2 - 1 :][:, : inside.shape[1]][inside]


def _is_flat(rgb: np.ndarray) -> bool:
    """Whether few colours fill long parts of the rows, also beside black, white and the commonest colour,
    which may be the background of a photograph. The squares of a pixelated one stand in a grid.
    """
    colour = rgb.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], np.int32)
    changes = np.ones(colour.shape, bool)
    changes[:, 1:] = colour[:, 1:] != colour[:, :-1]
    edges = int(changes[:, 1:].any(0).sum())  # columns in which a colour begins
    values, counts = np.unique(colour, return_counts=True)
    if np.sort(counts)[-256:].sum() < 0.97 * colour.size or 8 <= edges < 0.2 * colour.shape[1]:
        return False
    runs = np.cumsum(changes.ravel()) - 1
    flat = (np.bincount(runs) >= _RUN)[runs].reshape(colour.shape)
    inside = ~np.isin(colour, [0, 0xFFFFFF, values[counts.argmax()]])
    return bool(flat[inside].mean() > 0.97) if inside.any() else True


def _has_two_levels(grey: np.ndarray) -> bool:
    """Whether grey is dark and bright alone, each with little noise, and far apart."""
    dark, bright = grey[grey < WHITE], grey[grey >= WHITE]
    if min(len(dark), len(bright)) < 0.01 * grey.size:
        return False
    (low, below), (above, high) = np.percentile(dark, [2, 90]), np.percentile(bright, [10, 98])
    return bool(max(below - low, high - above) <= 18 and above - below >= 96)
