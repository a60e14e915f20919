"""The samples of a picture file at the depth it has, upright, and what they are samples of.

Tensors  samples (H, W) grey, (H, W, 3) RGB or (H, W, 4) CMYK; uint8, uint16, or float32 in [0, 1]
Library  Pillow for what has 8 bits a sample; libvips (pyvips) for what is deeper, for TIFF and AVIF
Copying  needs pixels/formats.py, pixels/metadata.py, pixels/vips.py; numpy, Pillow and pyvips, for packed
         TIFFs tifffile with imagecodecs

Why two libraries: docs/log.md, "Which library reads 16 bits".
"""

import contextlib
import io
import math
import os
import struct
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from PIL import Image

from .formats import HEAD, READ, format_of
from .metadata import Metadata, Tags, chunk_places, png_chunks, read_metadata, read_tags
from .vips import vips

BYTES_A_PIXEL = 16  # that working on a picture takes: its samples, and in floats the three channels
MAX_PIXELS = "MSBD_MAX_PIXELS"  # the environment variable that takes the place of the limit by memory

Model = Literal["grey", "rgb", "cmyk"]


@dataclass(frozen=True)
class Decoded:
    """A picture as it is in its file, but upright, and with sample values that use their type's whole
    range.
    """

    samples: np.ndarray  # (H, W), (H, W, 3) or (H, W, 4), uint8, uint16 or float32 in [0, 1]
    model: Model
    alpha: np.ndarray | None  # (H, W), of the samples' type, its greatest value opaque
    profile: bytes | None  # ICC, as it is in the file
    colour_chunks: tuple[tuple[bytes, bytes], ...]  # of a PNG: cICP, sRGB, gAMA, cHRM
    metadata: Metadata
    frames: int  # of which this is the first


def decode(file: Path | BinaryIO, *, floats: bool = False) -> Decoded:
    """Read the first frame of a picture in one of the formats READ, told by its content.

    `floats`: take floating-point samples too, clamped to [0, 1]; a picture of them has no agreed white.
    ValueError with the reason, without the file's name, for whatever cannot be read; ImportError where pyvips
    is needed and missing.
    """
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(file.open("rb")) if isinstance(file, Path) else file
        head = source.read(HEAD)
        source.seek(0)
        if not head:
            raise ValueError("the file is empty")
        kind = format_of(head)
        if kind == "HEIC" and (decoded := _heic(source)):
            return decoded
        if kind is None:
            raise ValueError(
                f"not a readable picture: of no known format, or damaged at its start; {_WAY_OUT}"
            )
        if kind not in READ:
            raise ValueError(f"{kind}, which is not read; {_WAY_OUT}")
        stack.enter_context(_quiet())
        try:
            return _readers()[kind](source, head, floats)
        except UnicodeError as error:  # of pyvips, over a name in the file that libvips' error holds
            raise ValueError("not a readable picture (damaged)") from error
        except (ValueError, ImportError):
            raise
        except MemoryError as error:
            raise ValueError("too large for the memory that is free; make it smaller") from error
        except Exception as error:  # of broken files plugins raise OSError, SyntaxError, struct.error, ...
            raise ValueError(f"not a readable picture ({reason_of(error)})") from error


def decoded_file(file: str | Path | BinaryIO, *, floats: bool = False) -> Decoded:
    """The file's samples as they are; errors as `load_image`, with the file's name."""
    path = Path(file) if isinstance(file, str | Path) else None
    if path is not None and not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file")
    if path is not None and path.is_dir():
        raise ValueError(f"{path}: a folder, not a readable picture; name a file")
    try:
        return decode(path or file, floats=floats)  # type: ignore[arg-type]
    except (ValueError, ImportError) as error:
        if path is None:
            raise
        raise type(error)(f"{path}: {error}") from error


_WAY_OUT = "save it as JPEG or PNG"


def reason_of(error: Exception) -> str:
    """An error's text in one short line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].startswith("unable to"):
        lines = lines[1:]  # the name of libvips' own function
    # Left there by what went well.
    lines = [line for line in lines if not line.startswith("source: bad seek")] or lines
    return (lines[0] if lines else type(error).__name__)[:200]


def _readers() -> dict[str, Any]:
    by_pillow = dict.fromkeys(("JPEG", "WebP", "BMP", "GIF"), _by_pillow)
    return {**by_pillow, "PNG": _png, "TIFF": _tiff, "AVIF": _avif}


# ---- by Pillow ---------------------------------------------------------------------------------------------


def _by_pillow(source: BinaryIO, head: bytes, floats: bool) -> Decoded:
    with _opened(source) as picture:
        frames = _frames(picture)
        picture.seek(0)
        picture.load()
        tags = read_tags(picture)
        return _of_pillow(picture, tags, read_metadata(picture, tags, ()), frames)


@contextlib.contextmanager
def _opened(source: BinaryIO) -> Iterator[Image.Image]:
    """The file as Pillow opens it, of a size that fits into memory."""
    kinds = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "DIB", "GIF", "AVIF")  # not EPS, which runs Ghostscript
    held = source.seek(0, io.SEEK_END)
    source.seek(0)
    gif = source.read(4) == b"GIF8"  # whose frames Pillow asks memory for while it opens it, and counts them
    source.seek(0)
    with _limited_to(max(_SMALL, held * _LZW) if gif else None):
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
                _check_claim(opened.width, opened.height, held, *bound)
            yield opened


def _bound(opened: Image.Image) -> tuple[int, int] | None:
    """Bits a pixel at least, and bytes that one of the file can unfold to; None where there is no bound."""
    if opened.format == "BMP" or opened.format == "DIB":
        if opened.info.get("compression") in (1, 2):  # run lengths: 255 pixels by two bytes
            return 8, 128
        return {"RGB": 16, "RGBA": 16}.get(opened.mode, 1), 1
    if opened.format == "WEBP":  # an animation's canvas may be larger than its frames
        return (8, _JPEG) if getattr(opened, "is_animated", False) else None
    unfolds = {"GIF": _LZW, "JPEG": _JPEG, "MPO": _JPEG}.get(opened.format or "")
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


def _frames(picture: Image.Image) -> int:
    return int(getattr(picture, "n_frames", 1) or 1)


def _of_pillow(
    picture: Image.Image, tags: Tags, metadata: Metadata, frames: int, *, turned: bool = False
) -> Decoded:
    """A loaded picture of 8 bits a sample; `turned`: Pillow has turned it upright, as it does TIFFs."""
    profile = picture.info.get("icc_profile") or None
    alpha = None
    if picture.has_transparency_data or picture.mode in ("La", "RGBa"):
        grey = picture.mode in ("L", "LA", "La", "1")
        straight = picture.convert("LA") if picture.mode == "La" else picture
        straight = straight.convert("LA" if grey else "RGBA")
        alpha = np.array(straight.getchannel("A"))
        picture = straight.convert("L" if grey else "RGB")
    elif picture.mode == "LAB":
        picture, profile = picture.convert("RGB"), None  # Lab is its own colour space
    elif picture.mode not in ("L", "RGB", "CMYK"):
        picture = picture.convert("L" if picture.mode == "1" else "RGB")
    model: Model = {"L": "grey", "RGB": "rgb", "CMYK": "cmyk"}[picture.mode]  # type: ignore[assignment]
    return _upright(
        np.array(picture), model, alpha, profile, (), metadata, frames, tags.orientation, turned=turned
    )


# ---- PNG ---------------------------------------------------------------------------------------------------


def _png(source: BinaryIO, head: bytes, floats: bool) -> Decoded:
    chunks = list(png_chunks(source))
    source.seek(0)
    with _opened(source) as picture:
        depth, colour = head[24], head[25]
        channels = {2: 3, 4: 2, 6: 4}.get(colour, 1)
        held = source.seek(0, io.SEEK_END)
        _check_claim(picture.width, picture.height, held, depth * channels, _DEFLATE, small=0)
        frames, tags = _frames(picture), read_tags(picture)
        metadata = read_metadata(picture, tags, chunks)
        colours = tuple(one for one in chunks if one[0] in (b"cICP", b"sRGB", b"gAMA", b"cHRM"))
        # Pillow cuts 16-bit colours off at 8, and loses tRNS of grey samples that have not 8 bits.
        if depth == 16 or (colour in (0, 2) and any(name == b"tRNS" for name, _ in chunks)):
            image = vips().Image.pngload_buffer(_bare_png(source), fail_on="truncated", unlimited=True)
            samples, alpha = _split(_samples(image), 1 if colour in (0, 4) else 3)
            decoded = _upright(
                samples, "grey" if samples.ndim == 2 else "rgb", alpha, picture.info.get("icc_profile"), colours,
                metadata, frames, tags.orientation,
            )  # fmt: skip
        else:
            picture.seek(0)
            picture.load()
            decoded = replace(_of_pillow(picture, tags, metadata, frames), colour_chunks=colours)
    return decoded


def _bare_png(source: BinaryIO) -> bytes:
    """The file with those chunks alone that pixels need: damage elsewhere costs nothing."""
    source.seek(0)
    data = source.read()
    needed = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
    return data[:8] + b"".join(data[at:end] for at, end, name in chunk_places(data) if name in needed)


# ---- TIFF and AVIF -----------------------------------------------------------------------------------------


def _tiff(source: BinaryIO, head: bytes, floats: bool) -> Decoded:
    data = source.read()
    tags = Tags.of_tiff(data)
    metadata = read_metadata(None, tags, ())
    if tags.exif:  # before libvips, which complains of some sizes on the terminal
        check_size(tags.width, tags.height)
        _check_tiff(tags.width, tags.height, tags, data)
    if tags.planar and tags.samples == 1:
        data = _with_planes_together(data)
        tags = Tags.of_tiff(data)
    if tags.planar and tags.samples > 1 and tags.photometric in (0, 1) and tags.get(339, 1) == 1:
        # libvips takes the planes of grey and alpha for one.
        check_size(tags.width, tags.height)
        _check_tiff(tags.width, tags.height, tags, data)
        return _by_tifffile(data, tags, metadata, floats)
    if tags.photometric == 6 and tags.get(259) not in (6, 7):  # libvips leaves YCbCr as it is, outside JPEG
        with _opened(io.BytesIO(data)) as picture:
            picture.load()
            return _of_pillow(picture, tags, metadata, _frames(picture), turned=True)
    bare, pages = _bare_tiff(data)
    try:
        # With "truncated" libvips gives zeros for what it cannot decode.
        image = vips().Image.tiffload_buffer(bare, fail_on="error", unlimited=True)
    except vips().Error as error:
        return _tiff_that_vips_refuses(data, tags, metadata, floats, error)
    check_size(image.width, image.height)
    _check_tiff(image.width, image.height, tags, data)
    profile = tags.profile
    if image.interpretation in ("lab", "labs", "labq"):
        image, profile = image.colourspace("srgb" if tags.bits <= 8 else "rgb16"), None
    elif image.interpretation == "scrgb" and not floats:
        raise ValueError(_NO_WHITE)
    samples = _samples(image)
    colours = {"cmyk": 4, "b-w": 1, "grey16": 1}.get(image.interpretation, 3)
    if image.interpretation == "multiband":
        colours = 3 if samples.shape[-1] >= 3 else 1
    if samples.shape[-1] > colours and tags.unspecified_extra:
        samples = samples[..., :colours]
    return _upright(
        *_of_full_range(samples, colours, tags, floats), profile, (), metadata, pages, tags.orientation
    )


# Tags that say how pixels are stored.
_PIXEL_TAGS = {
    *range(254, 260), 262, 266, 273, *range(277, 282), 284, 292, 293, 317, *range(320, 326), 332, 338, 339, 347,
    *range(512, 522), *range(529, 533),
}  # fmt: skip


def _bare_tiff(data: bytes) -> tuple[bytes, int]:
    """The file with its first directory alone, and there with those tags alone that pixels need; and how many
    directories it had. An orientation of 0 and other such damage costs nothing so, which libvips counts as
    much as missing pixels.
    """
    order: Literal["little", "big"] = "little" if data[:2] == b"II" else "big"
    offset, count, entry = (8, 8, 20) if b"+" in data[2:4] else (4, 2, 12)  # BigTIFF, TIFF; in bytes

    def number(at: int, size: int) -> int:
        return int.from_bytes(data[at : at + size], order)

    start = number(offset, offset)
    end = start + count + entry * number(start, count)
    if end > len(data):
        raise ValueError("not a readable picture (its directory is not whole)")
    kept = [data[at : at + entry] for at in range(start + count, end, entry) if number(at, 2) in _PIXEL_TAGS]
    directory = len(kept).to_bytes(count, order) + b"".join(kept)
    starts, following = {start}, number(end, offset)
    while 0 < following < len(data) and following not in starts:
        starts.add(following)
        following = number(following + count + entry * number(following, count), offset)
    behind = end + offset
    return data[:start] + directory.ljust(behind - start, b"\0") + data[behind:], len(starts)


def _with_planes_together(data: bytes) -> bytes:
    """A TIFF of one sample a pixel with PlanarConfiguration 1, which then means nothing (TIFF 6.0, page 38);
    with 2 libraries read it wrong.
    """
    order = "<" if data[:2] == b"II" else ">"
    if data[2:4] not in (b"*\0", b"\0*"):
        return data
    (start,) = struct.unpack(order + "I", data[4:8])
    (count,) = struct.unpack(order + "H", data[start : start + 2])
    for at in range(start + 2, start + 2 + 12 * count, 12):
        if struct.unpack(order + "HH", data[at : at + 4]) == (284, 3):
            return data[: at + 8] + struct.pack(order + "H", 1) + data[at + 10 :]
    return data


_NO_WHITE = (
    "floating-point, signed or 32-bit samples, which have no agreed white; save it with 8 or 16 bits a sample"
)


def _of_full_range(
    samples: np.ndarray, colours: int, tags: Tags, floats: bool
) -> tuple[np.ndarray, Model, np.ndarray | None]:
    """Samples (H, W, C) split into colours and alpha; floats clamped to [0, 1], where they are taken at
    all.
    """
    if samples.dtype.kind == "f" and floats:
        samples = np.nan_to_num(samples.astype(np.float32)).clip(0, 1)
    elif samples.dtype == np.uint32 and floats:
        samples = (samples / (2**32 - 1)).astype(np.float32)
    elif samples.dtype not in (np.dtype(np.uint8), np.dtype(np.uint16)):
        raise ValueError(_NO_WHITE)
    colour, alpha = _split(samples, colours)
    models: dict[int, Model] = {1: "grey", 3: "rgb", 4: "cmyk"}
    return colour, models[colours], alpha


def _tiff_that_vips_refuses(
    data: bytes, tags: Tags, metadata: Metadata, floats: bool, error: Exception
) -> Decoded:
    """Lab with 8 bits and grey with 12 by Pillow; other packed depths by tifffile, where it is installed."""
    if tags.bits == 12 and tags.samples == 1:
        with contextlib.suppress(ValueError), _opened(io.BytesIO(data)) as picture:
            picture.load()
            if picture.mode == "I;16":  # 0 to 4095, as they are in the file
                samples = _stretched(np.asarray(picture), 12)
                profile, frames = tags.profile, _frames(picture)
                return _upright(
                    samples, "grey", None, profile, (), metadata, frames, tags.orientation, turned=True
                )
    if tags.photometric in (8, 9) and tags.bits == 8:
        with _opened(io.BytesIO(data)) as picture:
            picture.load()
            return _of_pillow(picture, tags, metadata, _frames(picture), turned=True)
    if tags.bits in (8, 16) or not 2 <= tags.bits <= 15 or tags.photometric not in (0, 1, 2):
        raise error
    return _by_tifffile(data, tags, metadata, floats)


def _by_tifffile(data: bytes, tags: Tags, metadata: Metadata, floats: bool) -> Decoded:
    """Grey or RGB with 1 to 16 bits a sample, packed, together or in planes."""
    try:
        import imagecodecs  # noqa: F401  # what tifffile unpacks with
        import tifffile
    except ImportError:
        raise ValueError(
            f"{tags.bits} bits a sample, {'in planes' if tags.planar else 'packed'}, which are not read without the "
            "extra `scans`; install it, or save the picture with 8 or 16 bits"
        ) from None
    with tifffile.TiffFile(io.BytesIO(data)) as whole:
        page: Any = whole.pages[0]
        parts = math.prod(page.chunked)  # those that are missing tifffile leaves as they are in memory
        if min(len(page.dataoffsets), len(page.databytecounts)) < parts or 0 in page.databytecounts[:parts]:
            raise ValueError("not a readable picture (parts of it are missing)")
        read = page.asarray()
        frames = len(whole.pages)
    read = np.moveaxis(read, 0, -1) if tags.planar and read.ndim == 3 else np.atleast_3d(read)
    most, colours = 2**tags.bits - 1, 3 if tags.photometric == 2 else 1
    if tags.photometric == 0:
        read[..., :colours] = most - read[..., :colours]
    if tags.get(338) == 1 and read.shape[-1] > colours:  # multiplied with the alpha
        opaque = read[..., colours:].clip(1)
        read[..., :colours] = (read[..., :colours].astype(np.uint64) * most // opaque).clip(0, most)
    colour, model, alpha = _of_full_range(_stretched(read, tags.bits), colours, tags, floats)
    alpha = None if tags.unspecified_extra else alpha
    return _upright(colour, model, alpha, tags.profile, (), metadata, frames, tags.orientation)


def _check_tiff(width: int, height: int, tags: Tags, data: bytes) -> None:
    """ValueError for a TIFF that says more pixels than `data` can hold."""
    compression, held = tags.get(259), len(data)
    if compression in (2, 3, 4):  # fax: a bit a row at least; where it ends early, libtiff goes on in white
        if height > 8 * held:
            raise ValueError(f"not a readable picture ({height} rows, more than {held:,} bytes can hold)")
    else:
        halved = compression == 7 or tags.photometric == 6  # colours, maybe: a byte a pixel at least
        bits = 8 if halved else tags.bits * tags.samples
        _check_claim(width, height, held, bits, _TIFF_UNFOLDS.get(compression, _ZSTD))


def _stretched(samples: np.ndarray, bits: int) -> np.ndarray:
    """Samples of 0 .. 2**bits - 1 in 0 .. 65535, or for 8 bits and fewer in 0 .. 255."""
    kind, full = (np.uint8, 255) if bits <= 8 else (np.uint16, 65535)
    most = 2**bits - 1
    return ((samples.astype(np.uint64) * (2 * full) + most) // (2 * most)).clip(0, full).astype(kind)


def _avif(source: BinaryIO, head: bytes, floats: bool) -> Decoded:
    data = source.read()
    image = vips().Image.heifload_buffer(data, fail_on="truncated")
    check_size(image.width, image.height)
    if image.width * image.height > 2**28:  # among libheif's limits, against broken files, is 1 GB of samples
        image = vips().Image.heifload_buffer(data, fail_on="truncated", unlimited=True)
    if max(image.width, image.height) > 65535:  # what AV1 can say
        raise ValueError(f"not a readable picture (it says {image.width} x {image.height} pixels)")
    tags = Tags()
    with contextlib.suppress(Exception), _opened(io.BytesIO(data)) as picture:
        tags = read_tags(picture)
    metadata = read_metadata(None, tags, (), xmp=_blob(image, "xmp-data"))
    pages = image.get("n-pages") if image.get_typeof("n-pages") else 1
    samples, alpha = _split(_samples(image), 1 if image.bands < 3 else 3)
    model: Model = "grey" if samples.ndim == 2 else "rgb"
    # The decoder has turned it already.
    return _upright(samples, model, alpha, _blob(image, "icc-profile-data"), (), metadata, pages, 1)


def _heic(source: BinaryIO) -> Decoded | None:
    """A HEIC where this machine's libvips has a decoder for it, which the wheel of pyvips has not; else
    None.
    """
    start = source.tell()
    try:
        return _avif(source, b"", False)
    except Exception:
        source.seek(start)
        return None


# ---- shared ------------------------------------------------------------------------------------------------


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


def _check_claim(width: int, height: int, held: int, bits: int, unfolds: int, *, small: int = _SMALL) -> None:
    """ValueError for a picture that a file of `held` bytes cannot hold, before its memory is asked for.

    `bits` a pixel; `unfolds`: bytes that one byte can at most unfold to. What is not above `small` bytes, its
    reader may tell.
    """
    if width * height * bits > 8 * max(small, held * unfolds):
        raise ValueError(
            f"not a readable picture (it says {width} x {height} pixels, more than {held:,} bytes can hold)"
        )


# By deflate 258 bytes come of two bits, by LZW of GIF or TIFF 4095 of twelve, by zstd 128 kB of four bytes.
_DEFLATE, _LZW, _ZSTD = 1032, 2730, 2**15
# A block of 8 x 8 takes a bit (T.81; with Huffman's codes), and may stand for 16 x 16 by sampling.
_JPEG = 2048
# By TIFF's numbers of compressions; the last is packbits.
_TIFF_UNFOLDS = {1: 1, 5: _LZW, 7: _JPEG, 8: _DEFLATE, 32946: _DEFLATE, 32773: 64}


def largest_picture() -> int:
    """Pixels: $MSBD_MAX_PIXELS, or what fits into this machine's memory at BYTES_A_PIXEL."""
    if (given := os.environ.get(MAX_PIXELS, "")).isdigit():
        return int(given)
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        memory = 16 * 2**30
    return memory // BYTES_A_PIXEL


def _samples(image: Any) -> np.ndarray:
    """What libvips has read, (H, W, C), also of one pixel."""
    return image.numpy().reshape(image.height, image.width, image.bands)


def _split(samples: np.ndarray, colours: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Colours (H, W) or (H, W, C), and the alpha behind them, where there is one."""
    samples = samples[..., None] if samples.ndim == 2 else samples
    alpha = samples[..., colours] if samples.shape[-1] > colours else None
    colour = samples[..., 0] if colours == 1 else samples[..., :colours]
    return colour, alpha


def _upright(
    samples: np.ndarray, model: Model, alpha: np.ndarray | None, profile: bytes | None,
    chunks: tuple[tuple[bytes, bytes], ...], metadata: Metadata, frames: int, orientation: int, *,
    turned: bool = False,
) -> Decoded:  # fmt: skip
    """The picture turned and mirrored by its EXIF orientation (1 to 8), unless it is `turned` already."""
    if not samples.size or samples.shape[2:] != {"grey": (), "rgb": (3,), "cmyk": (4,)}[model]:
        raise ValueError("not a readable picture (what it says of its samples does not hold)")

    def upright(plane: np.ndarray) -> np.ndarray:
        if turned:
            return plane
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


def _blob(image: Any, name: str) -> bytes | None:
    return bytes(image.get(name)) if image.get_typeof(name) else None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No Python warning and no word of Pillow's logger: what is wrong with a file, its error says."""
    import logging

    logger = logging.getLogger("PIL")
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)  # of its plugins' loggers too, which `disabled` leaves alone
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
        sys.stderr.flush()
