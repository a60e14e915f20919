"""TIFFs of every depth: by libvips, and by others what that refuses or reads wrong.

Sources  TIFF 6.0; BigTIFF; what libvips 8.18 does was found with files drawn by tests/helpers/draw_files.py
Library  libvips (pyvips); Pillow; tifffile with imagecodecs
Copying  needs pixels/decoded.py, pixels/metadata.py, pixels/tags.py, pixels/vips.py; numpy, and these
         libraries
"""

import contextlib
import io
import math
from typing import Any, BinaryIO, Literal

import numpy as np

from .decoded import (
    DEFLATE,
    JPEG,
    LZW,
    ZSTD,
    Decoded,
    Model,
    check_claim,
    check_size,
    made_upright,
    of_pillow,
    opened_by_pillow,
    samples_of,
    split_alpha,
    stretched,
)
from .metadata import Metadata, read_metadata
from .tags import HEIGHT, ICC, WIDTH, Tags
from .vips import vips

# By TIFF's numbers of compressions; the last is packbits.
_TIFF_UNFOLDS = {1: 1, 5: LZW, 7: JPEG, 8: DEFLATE, 32946: DEFLATE, 32773: 64}


_TIFFFILES_OWN = (34925, 50000)  # LZMA and Zstandard, which the wheel of pyvips has not


def read_tiff(source: BinaryIO, head: bytes, floats: bool) -> Decoded:
    """The first page of a TIFF; errors as `decode`."""
    data = source.read()
    tags, metadata = read_metadata(None, tags=Tags.of(data))
    if tags.main:  # before libvips, which complains of some sizes on the terminal
        width, height = tags.integer(WIDTH, 0), tags.integer(HEIGHT, 0)
        check_size(width, height)
        _check_tiff(width, height, tags, data)
    bare, pages = _bare_tiff(data, tags)
    # libvips takes planes of grey and alpha for one, and refuses tiles in planes.
    planes = tags.planar and tags.samples > 1 and (tags.photometric != 2 or tags.get(322) is not None)
    if tags.photometric in (0, 1, 2) and (planes or tags.get(259) in _TIFFFILES_OWN):
        return _by_tifffile(bare, pages, tags, metadata, floats)
    if tags.photometric == 6 and tags.get(259) != 7:  # libvips leaves YCbCr as it is, outside JPEG
        return _by_pillow(bare, pages, tags, metadata)
    try:
        # With "truncated" libvips gives zeros for what it cannot decode.
        image = vips().Image.tiffload_buffer(bare, fail_on="error", unlimited=True)
    except vips().Error as error:
        return _that_vips_refuses(bare, pages, tags, metadata, floats, error)
    check_size(image.width, image.height)
    _check_tiff(image.width, image.height, tags, data)
    profile = tags.raw(ICC)
    if image.interpretation in ("lab", "labs", "labq"):
        image, profile = image.colourspace("srgb" if tags.bits <= 8 else "rgb16"), None
    elif image.interpretation == "scrgb" and not floats:
        raise ValueError(_NO_WHITE)
    samples = samples_of(image)
    colours = {"cmyk": 4, "b-w": 1, "grey16": 1}.get(image.interpretation, 3)
    if image.interpretation == "multiband":
        colours = 3 if samples.shape[-1] >= 3 else 1
    if samples.shape[-1] > colours and tags.unspecified_extra:
        samples = samples[..., :colours]
    return made_upright(
        *_of_full_range(samples, colours, tags, floats), profile, (), metadata, pages, tags.orientation
    )


# Tags that say how pixels are stored.
_PIXEL_TAGS = {
    *range(254, 260), 262, 266, 273, *range(277, 282), 284, 292, 293, 317, *range(320, 326), 332, 338, 339, 347,
    *range(512, 522), *range(529, 533),
}  # fmt: skip


def _bare_tiff(data: bytes, tags: Tags) -> tuple[bytes, int]:
    """The file with its first directory alone, and there with those tags alone that pixels need; and how many
    directories it had. An orientation of 0 and other such damage costs nothing so, which libvips counts as
    much as missing pixels. Pillow does not turn such a picture.
    """
    # Of one sample a pixel PlanarConfiguration means nothing (TIFF 6.0, page 38), and libraries read it
    # wrong.
    needed = _PIXEL_TAGS - {284} if tags.samples == 1 else _PIXEL_TAGS
    order: Literal["little", "big"] = "little" if data[:2] == b"II" else "big"
    offset, count, entry = (8, 8, 20) if b"+" in data[2:4] else (4, 2, 12)  # BigTIFF, TIFF; in bytes

    def number(at: int, size: int) -> int:
        return int.from_bytes(data[at : at + size], order)

    start = number(offset, offset)
    end = start + count + entry * number(start, count)
    if end > len(data):
        raise ValueError("not a readable picture (its directory is not whole)")
    kept = [data[at : at + entry] for at in range(start + count, end, entry) if number(at, 2) in needed]
    directory = len(kept).to_bytes(count, order) + b"".join(kept)
    starts, following = {start}, number(end, offset)
    while 0 < following < len(data) and following not in starts:
        starts.add(following)
        following = number(following + count + entry * number(following, count), offset)
    behind = end + offset
    return data[:start] + directory.ljust(behind - start, b"\0") + data[behind:], len(starts)


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
    colour, alpha = split_alpha(samples, colours)
    models: dict[int, Model] = {1: "grey", 3: "rgb", 4: "cmyk"}
    return colour, models[colours], alpha


def _by_pillow(bare: bytes, pages: int, tags: Tags, metadata: Metadata) -> Decoded:
    with opened_by_pillow(io.BytesIO(bare)) as picture:
        picture.load()
        return of_pillow(picture, tags, metadata, pages)


def _that_vips_refuses(
    bare: bytes, pages: int, tags: Tags, metadata: Metadata, floats: bool, error: Exception
) -> Decoded:
    """Lab with 8 bits and grey with 12 by Pillow; packed depths by tifffile, where it is installed."""
    if tags.bits == 12 and tags.samples == 1:
        with contextlib.suppress(ValueError), opened_by_pillow(io.BytesIO(bare)) as picture:
            picture.load()
            if picture.mode == "I;16":  # 0 to 4095, as they are in the file
                samples = stretched(np.asarray(picture), 12)
                return made_upright(
                    samples, "grey", None, tags.raw(ICC), (), metadata, pages, tags.orientation
                )
    if tags.photometric in (8, 9) and tags.bits == 8:
        return _by_pillow(bare, pages, tags, metadata)
    if tags.bits not in (1, 8, 16) and tags.photometric in (0, 1, 2):
        return _by_tifffile(bare, pages, tags, metadata, floats)
    raise error


def _by_tifffile(bare: bytes, pages: int, tags: Tags, metadata: Metadata, floats: bool) -> Decoded:
    """Grey or RGB with 1 to 16 bits a sample, packed, together or in planes."""
    if tags.get(339, 1) != 1 or not 1 <= tags.bits <= 16:
        raise ValueError(_NO_WHITE)
    try:
        import imagecodecs  # noqa: F401  # what tifffile unpacks with
        import tifffile
    except ImportError:
        raise ValueError(
            f"{tags.bits} bits a sample, {'in planes' if tags.planar else 'packed'}, compression {tags.get(259)}, which "
            "is not read without the extra `scans`; install it, or save the picture with 8 or 16 bits as PNG"
        ) from None
    with tifffile.TiffFile(io.BytesIO(bare)) as whole:
        page: Any = whole.pages[0]
        parts = math.prod(page.chunked)  # those that are missing tifffile leaves as they are in memory
        if min(len(page.dataoffsets), len(page.databytecounts)) < parts or 0 in page.databytecounts[:parts]:
            raise ValueError("not a readable picture (parts of it are missing)")
        read = page.asarray()
    read = np.moveaxis(read, 0, -1) if tags.planar and read.ndim == 3 else np.atleast_3d(read)
    most, colours = 2**tags.bits - 1, 3 if tags.photometric == 2 else 1
    if tags.photometric == 0:
        read[..., :colours] = most - read[..., :colours]
    if tags.get(338) == 1 and read.shape[-1] > colours:  # multiplied with the alpha
        opaque = read[..., colours:].clip(1)
        read[..., :colours] = (read[..., :colours].astype(np.uint64) * most // opaque).clip(0, most)
    colour, model, alpha = _of_full_range(stretched(read, tags.bits), colours, tags, floats)
    alpha = None if tags.unspecified_extra else alpha
    return made_upright(colour, model, alpha, tags.raw(ICC), (), metadata, pages, tags.orientation)


def _check_tiff(width: int, height: int, tags: Tags, data: bytes) -> None:
    """ValueError for a TIFF that says more pixels than `data` can hold, or than it has tiles for."""
    if (across := tags.get(322)) and (down := tags.get(323)):
        needed = -(-width // across) * -(-height // down) * (tags.samples if tags.planar else 1)
        there = max(len(tags.numbers(324)), len(tags.numbers(273)))  # some programs call tiles strips
        if there < needed:  # libtiff takes its time for those that are missing, and leaves them black
            raise ValueError(f"not a readable picture ({there} of its {needed:,} tiles are there)")
    compression, held = tags.get(259), len(data)
    if compression in (2, 3, 4):  # fax: a bit a row at least; where it ends early, libtiff goes on in white
        if height > 8 * held:
            raise ValueError(f"not a readable picture ({height} rows, more than {held:,} bytes can hold)")
    else:
        halved = compression == 7 or tags.photometric == 6  # colours, maybe: a byte a pixel at least
        bits = 8 if halved else tags.bits * tags.samples
        check_claim(width, height, held, bits, _TIFF_UNFOLDS.get(compression, ZSTD))
