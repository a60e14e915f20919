"""A picture file's samples at the depth it has, upright, and what they are samples of.

Library  Pillow for what has 8 bits a sample; libvips (pyvips) for what is deeper, for TIFF and AVIF
Copying  needs pixels/decoded.py, pixels/formats.py, pixels/icc.py, pixels/metadata.py, pixels/tags.py,
         pixels/tiff.py, pixels/vips.py; Pillow and pyvips

Why two libraries: docs/log.md, "Which library reads 16 bits".
"""

import contextlib
import io
import itertools
import re
import struct
import sys
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from .decoded import (
    DEFLATE,
    WAY_OUT,
    Decoded,
    Model,
    blob_of,
    check_claim,
    check_size,
    frames_of,
    made_upright,
    of_pillow,
    opened_by_pillow,
    samples_of,
    split_alpha,
    stretched,
    unmultiplied,
)
from .formats import HEAD, READ, format_of
from .icc import ADOBE_RGB, made_profile, power_curve
from .metadata import chunk_places, png_chunks, read_metadata, unfolded
from .tags import Tags
from .tiff import read_tiff
from .vips import vips


def decode(file: Path | BinaryIO, *, floats: bool = False) -> Decoded:
    """Read the first frame of a picture in one of the formats READ, told by its content.

    `floats`: take floating-point, signed and 32-bit samples too, as they are; they have no agreed white.
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
                f"not a readable picture: of no known format, or damaged at its start; {WAY_OUT}"
            )
        if kind not in READ:
            raise ValueError(f"{kind}, which is not read; {WAY_OUT}")
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
    """The file's samples as they are; errors as `load_image`, with the file's name where it has one."""
    path = Path(file) if isinstance(file, str | Path) else None
    if path is not None and not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file")
    if path is not None and path.is_dir():
        raise ValueError(f"{path}: a folder, not a readable picture; name a file")
    try:
        return decode(path or file, floats=floats)  # type: ignore[arg-type]
    except (ValueError, ImportError) as error:
        if not (name := name_of(file)):
            raise
        raise type(error)(f"{name}: {error}") from error


def name_of(file: str | Path | BinaryIO) -> str:
    """What messages call a file: its path, which an open one has in `name`; "" for bytes without one."""
    name = str(file) if isinstance(file, str | Path) else getattr(file, "name", "")
    return name if isinstance(name, str) else ""


def reason_of(error: Exception) -> str:
    """An error's text in one short line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].startswith("unable to"):
        lines = lines[1:]  # the name of libvips' own function
    # Left there by what went well.
    lines = [line for line in lines if not line.startswith("source: bad seek")] or lines
    return (lines[0] if lines else type(error).__name__)[:200]


def _readers() -> dict[str, Any]:
    by_pillow = dict.fromkeys(("WebP", "GIF"), _by_pillow)
    return {**by_pillow, "JPEG": _jpeg, "PNG": _png, "BMP": _bmp, "TIFF": read_tiff, "AVIF": _avif}


# ---- formats -----------------------------------------------------------------------------------------------


def _by_pillow(source: BinaryIO, head: bytes, floats: bool) -> Decoded:
    with opened_by_pillow(source) as picture:
        frames = frames_of(picture)
        picture.seek(0)
        picture.load()
        tags, metadata = read_metadata(picture)
        frame = getattr(picture, "dispose_extent", None)  # of a GIF: the part of it that has pixels
        if frame not in (None, (0, 0, *picture.size)):
            picture = _clear_outside(picture, frame)
        return of_pillow(picture, tags, metadata, frames)


def _clear_outside(picture: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    """`picture` transparent outside `box`, as everything shows a GIF whose first frame leaves that open."""
    clear = picture.convert("LA" if picture.mode == "L" else "RGBA")
    opaque = Image.new("L", picture.size)
    opaque.paste(clear.getchannel("A").crop(box), box)
    clear.putalpha(opaque)
    return clear


def _jpeg(source: BinaryIO, head: bytes, floats: bool) -> Decoded:
    decoded = _by_pillow(source, head, floats)
    source.seek(0)
    data = source.read()
    remarks = []
    if any(mark in data for mark in _GAIN_MAPS):
        remarks.append("its gain map, which brightens it on HDR screens, is not read")
    if _EXTENDED_XMP in data:
        remarks.append("its extended XMP (depth maps, earlier versions of the picture) is not kept")
    if damage := _damage_of_jpeg(data):
        remarks.append(f"damaged ({damage}); look at the picture: parts of it may be missing, or wrong")
    profile = decoded.profile
    index = Tags.of(decoded.metadata.exif or b"").interop.get(1)  # InteroperabilityIndex, by DCF 2.0
    if profile is None and decoded.model == "rgb" and index is not None and index.data[:3] == b"R03":
        profile = made_profile("rgb", power_curve(563 / 256), ADOBE_RGB)
    return replace(decoded, profile=profile, remarks=tuple(remarks))


_GAIN_MAPS = b"hdrgm:Version", b"urn:iso:std:iso:ts:21496:-1\0"
_EXTENDED_XMP = b"http://ns.adobe.com/xmp/extension/\0"  # XMP part 3, 1.1.3.1


def _damage_of_jpeg(data: bytes) -> str | None:
    """What libjpeg warns of and Pillow does not tell: a grey rest, where samples were lost; None where pyvips
    is missing.
    """
    with contextlib.suppress(ImportError):
        library = vips()
        try:
            library.Image.jpegload_buffer(data, fail_on="warning", unlimited=True).avg()
        except (library.Error, UnicodeError) as error:
            found = re.search(r"Corrupt JPEG data: ([^\n]*)", str(error))
            # Bytes too many before a mark harm nothing.
            return found[1] if found and "extraneous" not in found[1] else None
    return None


def _bmp(source: BinaryIO, head: bytes, floats: bool) -> Decoded:
    decoded = _by_pillow(source, head, floats)
    size, bits, compression = struct.unpack("<I10xHI", head[14:34].ljust(20, b"\0"))
    if decoded.alpha is None and size >= 56 and bits == 16 and compression == 3 and any(head[66:70]):
        return replace(decoded, remarks=("a BMP of 16 bits a pixel, whose transparency is not read",))
    return decoded


# ---- PNG ---------------------------------------------------------------------------------------------------


def _png(source: BinaryIO, head: bytes, floats: bool) -> Decoded:
    data = source.read()
    bare = _bare_png(data)
    width, height, depth, colour = struct.unpack(">IIBB", head[16:26])
    channels = {2: 3, 4: 2, 6: 4}.get(colour, 1)
    check_size(width, height)
    check_claim(width, height, len(bare), depth * channels, DEFLATE, small=0)
    chunks = list(png_chunks(data))
    first = dict(reversed(chunks))
    frames = int.from_bytes(first.get(b"acTL", b"\0\0\0\1")[:4], "big")
    tags, metadata = read_metadata(None, chunks)
    # What stands behind the pixels says nothing of their colours.
    before = list(itertools.takewhile(lambda one: one[0] != b"IDAT", chunks))
    colours = tuple(one for one in before if one[0] in (b"cICP", b"sRGB", b"gAMA", b"cHRM"))
    profile = unfolded(dict(reversed(before)).get(b"iCCP", b"").partition(b"\0")[2][1:])
    # Pillow cuts 16-bit colours off at 8, and loses tRNS of grey samples that have not 8 bits.
    if depth == 16 or (colour in (0, 2) and b"tRNS" in first):
        image = vips().Image.pngload_buffer(bare, fail_on="truncated", unlimited=True)
        samples, alpha = split_alpha(samples_of(image), 1 if colour in (0, 4) else 3)
        model: Model = "grey" if samples.ndim == 2 else "rgb"
        decoded = made_upright(samples, model, alpha, None, (), metadata, frames, tags.orientation)
    else:
        with opened_by_pillow(io.BytesIO(bare)) as picture:
            picture.load()
            decoded = of_pillow(picture, tags, metadata, frames)
    return replace(decoded, profile=profile or None, colour_chunks=colours)


def _bare_png(data: bytes) -> bytes:
    """The file with those chunks alone that pixels need: damage elsewhere costs nothing. ValueError for a
    wrong checksum in one of them, of which Pillow looks at some.
    """
    kept = [data[:8]]
    for at, end, name in chunk_places(data):
        if name in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"):
            whole = data[at:end]
            if name != b"IEND" and zlib.crc32(whole[4:-4]) != int.from_bytes(whole[-4:], "big"):
                raise ValueError(
                    f"not a readable picture (damaged, by the checksum of a chunk {name.decode()})"
                )
            kept.append(whole)
    return b"".join(kept)


# ---- AVIF -----------------------------------------------------------------------------------------


def _avif(source: BinaryIO, head: bytes, floats: bool) -> Decoded:
    data = source.read()
    image = vips().Image.heifload_buffer(data, fail_on="truncated")
    check_size(image.width, image.height)
    if image.width * image.height > 2**28:  # among libheif's limits, against broken files, is 1 GB of samples
        image = vips().Image.heifload_buffer(data, fail_on="truncated", unlimited=True)
    if max(image.width, image.height) > 65535:  # what AV1 can say
        raise ValueError(f"not a readable picture (it says {image.width} x {image.height} pixels)")
    codes, full_range = _nclx(data)
    monochrome, seen = _is_monochrome(data), None
    if monochrome and full_range is None:  # the coded picture itself says it then, which Pillow follows
        with contextlib.suppress(Exception), opened_by_pillow(io.BytesIO(data)) as picture:
            seen = picture.convert("L").getextrema()
    tags = Tags.of(blob_of(image, "exif-data") or b"")
    _, metadata = read_metadata(None, tags=tags, xmp=blob_of(image, "xmp-data"))
    pages = image.get("n-pages") if image.get_typeof("n-pages") else 1
    samples = samples_of(image)
    if samples.dtype == np.uint16:  # whose lowest bits libvips leaves 0
        bits = image.get("heif-bitdepth")
        samples = stretched(samples >> (16 - bits), bits)
    samples, alpha = split_alpha(samples, 1 if image.bands < 3 else 3)
    most = int(np.iinfo(samples.dtype).max)
    if monochrome and samples.ndim == 3:
        samples = samples[..., 1]
        full = _of_narrow_range(samples)  # libheif leaves it as it is
        if seen is None:
            samples = samples if full_range else full
        else:
            samples = min((samples, full), key=lambda one: abs(_extremes(one) * 255 / most - seen).sum())
    if alpha is not None and _is_multiplied(data):
        samples = unmultiplied(samples, alpha, most)
    model: Model = "grey" if samples.ndim == 2 else "rgb"
    profile = blob_of(image, "icc-profile-data")
    chunks = () if profile or codes is None else ((b"cICP", codes),)
    # The decoder has turned it already.
    return made_upright(samples, model, alpha, profile, chunks, metadata, pages, 1)


def _of_narrow_range(samples: np.ndarray) -> np.ndarray:
    """16 to 235 of 255 as the whole range."""
    most = np.iinfo(samples.dtype).max
    levels = (samples / most * 255 - 16) / 219
    return (levels * most).round().clip(0, most).astype(samples.dtype)


def _extremes(samples: np.ndarray) -> np.ndarray:
    return np.array([samples.min(), samples.max()], float)


def _is_multiplied(data: bytes) -> bool:
    """Whether an AVIF's colours are multiplied with its alpha, by the references between its items (MIAF)."""
    at = data.find(b"iref", 0, _BOXES)
    size = int.from_bytes(data[max(at - 4, 0) : max(at, 0)], "big")
    return b"prem" in data[at : at + size]


def _nclx(data: bytes) -> tuple[bytes | None, bool | None]:
    """What an AVIF's box of colours says (ISO 23091-2), as a PNG's cICP would, and whether its range is full;
    None without one.
    """
    at = data.find(b"colrnclx", 0, _BOXES) + 8
    if at < 8 or at + 7 > len(data):
        return None, None
    primaries, transfer, _, flags = struct.unpack(">HHHB", data[at : at + 7])
    codes = bytes([primaries, transfer, 0, 1]) if max(primaries, transfer) < 256 else None
    return codes, flags >= 128


def _is_monochrome(data: bytes) -> bool:
    """Whether every item of an AVIF is coded without chroma (AV1-ISOBMFF, 2.3): alpha is so always, and of a
    coloured picture its colours are not.
    """
    places = [found.end() for found in re.finditer(b"av1C", data[:_BOXES])]
    return bool(places) and all(data[at + 2 : at + 3] and data[at + 2] & 16 for at in places)


_BOXES = 1 << 16  # bytes at the start of an AVIF in which its properties stand


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
