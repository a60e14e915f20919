"""What every reader of pictures gives and shares: samples, limits, the way up, and Pillow.

Tensors  samples (H, W) grey, (H, W, 3) RGB or (H, W, 4) CMYK; uint8, uint16, for masks any type
Copying  needs pixels/metadata.py, pixels/tags.py; numpy and Pillow
"""

import contextlib
import functools
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from PIL import Image

from .metadata import Metadata
from .tags import Tags

try:
    import resource
except ImportError:  # Windows
    resource = None

# What limits the memory of a container on Linux (cgroups, version 2 and 1), in bytes.
CONTAINER_LIMITS = tuple(
    Path("/sys/fs/cgroup", name) for name in ("memory.max", "memory/memory.limit_in_bytes")
)
BYTES_A_PIXEL = 16  # that working on a picture takes: its samples, and in floats the three channels
MAX_PIXELS = "MSBD_MAX_PIXELS"  # the environment variable that takes the place of the limit by memory

WAY_OUT = "save it as JPEG or PNG"

Model = Literal["grey", "rgb", "cmyk"]


@dataclass(frozen=True)
class Decoded:
    """A picture as it is in its file, but upright, and with sample values that use their type's whole
    range if that is uint8 or uint16.
    """

    samples: np.ndarray  # (H, W), (H, W, 3) or (H, W, 4), uint8, uint16; for masks of any type
    model: Model
    alpha: np.ndarray | None  # (H, W), of the samples' type, its greatest value opaque
    profile: bytes | None  # ICC, as it is in the file
    colour_chunks: tuple[tuple[bytes, bytes], ...]  # of a PNG: cICP, sRGB, gAMA, cHRM
    metadata: Metadata
    frames: int  # of which this is the first
    remarks: tuple[str, ...] = ()  # what else of the file was not read, or is in doubt

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the file should be told, a line each."""
        if self.frames < 2:
            return self.remarks
        return (f"the first of {self.frames} frames or pages; the others are not read", *self.remarks)


def check_size(width: int, height: int) -> None:
    """ValueError for a picture without pixels, or of more than this machine's memory, or $MSBD_MAX_PIXELS,
    allows.
    """
    if width < 1 or height < 1:
        raise ValueError(f"not a readable picture (it says {width} x {height} pixels)")
    most = largest_picture()
    if width * height > most:
        raise ValueError(
            f"{width} x {height} pixels, of which this machine's memory allows {most:,}; make it smaller, or set "
            f"{MAX_PIXELS}"
        )


_SMALL = 2**24  # bytes


def check_claim(width: int, height: int, held: int, bits: int, unfolds: int, *, small: int = _SMALL) -> None:
    """ValueError for a picture that a file of `held` bytes cannot hold, before its memory is asked for.

    `bits` a pixel; `unfolds`: bytes that one byte can at most unfold to. What is not above `small` bytes, its
    reader may tell.
    """
    if width * height * bits > 8 * max(small, held * unfolds):
        raise ValueError(
            f"not a readable picture (it says {width} x {height} pixels, more than {held:,} bytes can hold)"
        )


# By deflate 258 bytes come of two bits, by LZW of GIF or TIFF 4095 of twelve, by zstd 128 kB of four bytes.
DEFLATE, LZW, ZSTD = 1032, 2730, 2**15
# A block of 8 x 8 takes a bit (T.81; with Huffman's codes), and may stand for 16 x 16 by sampling.
JPEG = 2048


def largest_picture() -> int:
    """Pixels: $MSBD_MAX_PIXELS, or what fits into `memory_allowed` at BYTES_A_PIXEL."""
    given = os.environ.get(MAX_PIXELS, "")
    return int(given) if given.isdigit() else memory_allowed() // BYTES_A_PIXEL


@functools.cache
def memory_allowed() -> int:
    """Bytes: the machine's memory, or less where a container or `ulimit -v` sets a limit; asked for once."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        memory = 16 * 2**30
    if resource is not None and (limit := resource.getrlimit(resource.RLIMIT_AS)[0]) > 0:  # -1: none
        memory = min(memory, limit)
    for file in CONTAINER_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # not there, or "max"
            memory = min(memory, int(file.read_text()))
    return memory


def stretched(samples: np.ndarray, bits: int) -> np.ndarray:
    """Samples of 0 .. 2**bits - 1 in 0 .. 65535, or for 8 bits and fewer in 0 .. 255."""
    kind, full = (np.uint8, 255) if bits <= 8 else (np.uint16, 65535)
    most = 2**bits - 1
    return ((samples.astype(np.uint64) * (2 * full) + most) // (2 * most)).clip(0, full).astype(kind)


def samples_of(image: Any) -> np.ndarray:
    """What libvips has read, (H, W, C), also of one pixel."""
    return image.numpy().reshape(image.height, image.width, image.bands)


def split_alpha(samples: np.ndarray, colours: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Colours (H, W) or (H, W, C), and the alpha behind them, where there is one."""
    samples = samples[..., None] if samples.ndim == 2 else samples
    alpha = samples[..., colours] if samples.shape[-1] > colours else None
    colour = samples[..., 0] if colours == 1 else samples[..., :colours]
    return colour, alpha


def unmultiplied(colours: np.ndarray, alpha: np.ndarray, most: int) -> np.ndarray:
    """Colours (H, W) or (H, W, C) that were multiplied with their alpha, as they were before."""
    opaque = (alpha if colours.ndim == 2 else alpha[..., None]).clip(1)
    return ((colours.astype(np.uint64) * most + opaque // 2) // opaque).clip(0, most).astype(colours.dtype)


def made_upright(
    samples: np.ndarray, model: Model, alpha: np.ndarray | None, profile: bytes | None,
    chunks: tuple[tuple[bytes, bytes], ...], metadata: Metadata, frames: int, orientation: int,
) -> Decoded:  # fmt: skip
    """The picture turned and mirrored by its EXIF orientation (1 to 8)."""
    if not samples.size or samples.shape[2:] != {"grey": (), "rgb": (3,), "cmyk": (4,)}[model]:
        raise ValueError("not a readable picture (what it says of its samples does not hold)")

    def upright(plane: np.ndarray) -> np.ndarray:
        if orientation >= 5:
            plane = plane.swapaxes(0, 1)
        # After the exchange of sides: 6 turns to the right, 7 both, 8 to the left.
        plane = plane[:, ::-1] if orientation in (2, 3, 6, 7) else plane
        plane = plane[::-1] if orientation in (3, 4, 7, 8) else plane
        return np.ascontiguousarray(plane)

    if orientation >= 5:
        metadata = metadata.turned()
    alpha = None if alpha is None else upright(alpha)
    return Decoded(upright(samples), model, alpha, profile or None, chunks, metadata, frames)


def blob_of(image: Any, name: str) -> bytes | None:
    return bytes(image.get(name)) if image.get_typeof(name) else None


# ---- by Pillow ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def opened_by_pillow(source: BinaryIO) -> Iterator[Image.Image]:
    """The file as Pillow opens it, of a size that fits into memory."""
    kinds = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "DIB", "GIF", "AVIF")  # not EPS, which runs Ghostscript
    held = source.seek(0, io.SEEK_END)
    source.seek(0)
    gif = source.read(4) == b"GIF8"  # whose frames Pillow asks memory for while it opens it, and counts them
    source.seek(0)
    with _limited_to(max(_SMALL, held * LZW) if gif else None):
        try:
            opened = Image.open(source, formats=kinds)
        except Image.DecompressionBombError as error:
            raise ValueError(
                f"not a readable picture (it says more pixels than {held:,} bytes can hold)"
            ) from error
        except Image.UnidentifiedImageError as error:
            raise ValueError("not a readable picture (damaged, or of a kind that is not read)") from error
        with opened:
            check_size(opened.width, opened.height)
            if (bound := _bound(opened)) is not None:
                check_claim(opened.width, opened.height, held, *bound)
            yield opened


def _bound(opened: Image.Image) -> tuple[int, int] | None:
    """Bits a pixel at least, and bytes that one of the file can unfold to; None where there is no bound."""
    if opened.format == "BMP" or opened.format == "DIB":
        if opened.info.get("compression") in (1, 2):  # run lengths: 255 pixels by two bytes
            return 8, 128
        return {"RGB": 16, "RGBA": 16}.get(opened.mode, 1), 1
    if opened.format == "WEBP":  # an animation's canvas may be larger than its frames
        return (8, JPEG) if getattr(opened, "is_animated", False) else None
    unfolds = {"GIF": LZW, "JPEG": JPEG, "MPO": JPEG}.get(opened.format or "")
    return None if unfolds is None else (8, unfolds)


@contextlib.contextmanager
def _limited_to(pixels: int | None) -> Iterator[None]:
    """Pillow with this limit, or without one, in place of its own of 179 million: `check_size` has ours."""
    # Up to twice as many it only warns.
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None if pixels is None else pixels // 2
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def frames_of(picture: Image.Image) -> int:
    return int(getattr(picture, "n_frames", 1) or 1)


def of_pillow(picture: Image.Image, tags: Tags, metadata: Metadata, frames: int) -> Decoded:
    """A loaded picture of 8 bits a sample."""
    profile = picture.info.get("icc_profile") or None
    alpha = None
    if picture.has_transparency_data or picture.mode in ("La", "RGBa"):
        grey = picture.mode in ("L", "LA", "La", "1")
        straight = picture.convert("LA") if picture.mode == "La" else picture
        straight = straight.convert("LA" if grey else "RGBA")
        alpha = np.array(straight.getchannel("A"))
        picture = straight.convert("L" if grey else "RGB")
    elif picture.mode not in ("L", "RGB", "CMYK"):
        picture = picture.convert("L" if picture.mode == "1" else "RGB")
    model: Model = {"L": "grey", "RGB": "rgb", "CMYK": "cmyk"}[picture.mode]  # type: ignore[assignment]
    return made_upright(np.array(picture), model, alpha, profile, (), metadata, frames, tags.orientation)
