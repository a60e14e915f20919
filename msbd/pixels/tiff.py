"""TIFFs of every depth: by libvips, and by others what that refuses or reads wrong.

Sources  TIFF 6.0; BigTIFF; what libvips 8.18 does was found with files drawn by tests/helpers/draw_files.py
Library  libvips (pyvips); Pillow; tifffile with imagecodecs
Copying  needs pixels/decoded.py, pixels/icc.py, pixels/metadata.py, pixels/tags.py, pixels/vips.py; numpy,
         and these libraries
"""

import contextlib
import io
import math
from dataclasses import replace
from typing import Any, BinaryIO, Literal

import numpy as np

from .decoded import (
    DEFLATE,
    JPEG,
    LZW,
    WAY_OUT,
    ZSTD,
    Decoded,
    Model,
    check_claim,
    check_size,
    made_upright,
    of_pillow,
    opened_by_pillow,
    samples_of,
    stretched,
    unmultiplied,
)
from .icc import lab_to_light, light_to_srgb
from .metadata import Metadata, read_metadata
from .tags import HEIGHT, ICC, WIDTH, Tags
from .vips import vips

# By TIFF's numbers of compressions; the last is packbits.
_TIFF_UNFOLDS = {1: 1, 5: LZW, 7: JPEG, 8: DEFLATE, 32946: DEFLATE, 32773: 64}


_TIFFFILES_OWN = (34925, 50000)  # LZMA and Zstandard, which the wheel of pyvips has not


def read_tiff(source: BinaryIO, head: bytes, floats: bool) -> Decoded:
    """The first page of a TIFF that is no thumbnail; errors as `decode`."""
    data = _past_thumbnails(source.read())
    tags, metadata = read_metadata(None, tags=Tags.of(data))
    decoded = _read(data, tags, metadata, floats)
    remarks = ["Lab, which becomes sRGB"] if tags.photometric in _LAB else []
    if tags.raw(37724):  # ImageSourceData
        remarks.append("its layers are not read, and not kept")
    return replace(decoded, remarks=(*decoded.remarks, *remarks))


def _read(data: bytes, tags: Tags, metadata: Metadata, floats: bool) -> Decoded:
    if tags.main:  # before libvips, which complains of some sizes on the terminal
        width, height = tags.integer(WIDTH, 0), tags.integer(HEIGHT, 0)
        check_size(width, height)
        _check_kind(tags)
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
    if image.interpretation == "scrgb" and not floats:
        raise ValueError(_NO_WHITE)
    samples, profile = samples_of(image), tags.raw(ICC)
    if tags.photometric in _LAB:
        samples[..., :3], profile = _of_lab(samples[..., :3], tags.photometric == 9), None
    colours = {"cmyk": 4, "b-w": 1, "grey16": 1}.get(image.interpretation, 3)
    if image.interpretation == "multiband":
        colours = 3 if samples.shape[-1] >= 3 else 1
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
    order, offset, count, entry = _layout(data)

    def number(at: int, size: int) -> int:
        return int.from_bytes(data[at : at + size], order)

    starts = _chain(data)
    start = starts[0]
    end = start + count + entry * number(start, count)
    if end > len(data):
        raise ValueError("not a readable picture (its directory is not whole)")
    kept = [data[at : at + entry] for at in range(start + count, end, entry) if number(at, 2) in needed]
    if tags.photometric in _LAB:  # of which libvips makes other things; RGB's numbers it leaves alone
        rgb = b"".join(part.to_bytes(size, order) for part, size in ((262, 2), (3, 2), (1, offset), (2, 2)))
        kept = [rgb.ljust(entry, b"\0") if one[:2] == rgb[:2] else one for one in kept]
    directory = len(kept).to_bytes(count, order) + b"".join(kept)
    behind = end + offset
    return data[:start] + directory.ljust(behind - start, b"\0") + data[behind:], len(starts)


def _layout(data: bytes) -> tuple[Literal["little", "big"], int, int, int]:
    """A file's order of bytes, and in bytes: an offset, which is also where the first directory's stands; the
    count and an entry of a directory.
    """
    order = "little" if data[:2] == b"II" else "big"
    return (order, 8, 8, 20) if b"+" in data[2:4] else (order, 4, 2, 12)  # BigTIFF, TIFF


def _chain(data: bytes) -> list[int]:
    """Where the file's directories start, but those that others hold."""
    order, offset, count, entry = _layout(data)
    starts, at = {}, offset
    while (start := int.from_bytes(data[at : at + offset], order)) not in starts:
        if starts and not 0 < start < len(data):
            break
        starts[start] = None
        at = start + count + entry * int.from_bytes(data[start : start + count], order)
    return list(starts)


def _past_thumbnails(data: bytes) -> bytes:
    """The file, beginning with its first directory that is neither a smaller copy of another one's picture
    nor its mask; as it is where all are. ValueError where the picture is in a directory below.
    """
    order, offset, _, _ = _layout(data)
    first = Tags.of(data)
    if not first.integer(254, 0) & 5:  # NewSubfileType
        return data
    if first.get(50706) is not None:  # DNGVersion
        raise ValueError(f"raw (DNG), {_UNREAD}")
    for start in _chain(data)[1:20]:
        moved = data[:offset] + start.to_bytes(offset, order) + data[2 * offset :]
        if not Tags.of(moved).integer(254, 0) & 5:
            return moved
    if first.get(330) is not None:
        raise ValueError(f"a thumbnail, and its picture in a directory below, {_UNREAD}")
    return data


_UNREAD = f"which is not read; {WAY_OUT}"
_LAB = (8, 9)  # photometric interpretations: CIE L*a*b*, and with a and b as ICC has them
_YCBCR = (0.299, 0.587, 0.114, 0, 255, 128, 255, 128, 255)  # its coefficients and range, where none are said


def _check_kind(tags: Tags) -> None:
    """ValueError for a TIFF of a kind that is not read, or that a library reads as another."""
    kind, bits = tags.photometric, tags.numbers(258)[: tags.samples]
    found = None
    if kind in (32803, 34892):
        raise ValueError(f"raw (DNG, or another camera's), {_UNREAD}")
    if kind not in (0, 1, 2, 3, 5, 6, *_LAB):
        found = f"the photometric interpretation {kind}"
    elif len(set(bits)) > 1:
        found = f"samples with {', '.join(map(str, bits))} bits"
    elif kind == 5 and (tags.get(332, 1) != 1 or tags.samples < 4):
        found = "inks other than CMYK"
    elif {1, 2} <= set(tags.numbers(338)):
        found = "two kinds of transparency"
    elif kind == 3 and tags.planar and tags.samples > 1:
        found = "a palette with more samples, in planes"
    elif kind in _LAB and (tags.samples < 3 or tags.bits not in (8, 16)):
        found = f"Lab with {tags.samples} samples of {tags.bits} bits"
    elif kind in _LAB and 1 in tags.numbers(338):
        found = "Lab multiplied with its alpha"
    elif kind == 6 and tags.get(259) == 1:  # which Pillow takes for the usual
        said = (*(tags.numbers(529) or _YCBCR[:3]), *(tags.numbers(532) or _YCBCR[3:]))
        if len(said) != 9 or not np.allclose(np.array(said, float), _YCBCR, atol=1e-3):
            found = "YCbCr with other coefficients, or in another range, than the usual"
    if found:
        raise ValueError(f"a TIFF of {found}, {_UNREAD}")


def _of_lab(samples: np.ndarray, offset: bool) -> np.ndarray:
    """Lab (H, W, 3) as sRGB of as many bits; a and b are signed, or `offset` by half their range."""
    step, most = (1, 255) if samples.dtype == np.uint8 else (256, 65535)
    made = np.empty_like(samples)
    for top in range(0, len(samples), 64):  # for the sake of memory
        part = samples[top : top + 64]
        places = part[..., 1:] - 128.0 * step if offset else part[..., 1:].view(f"i{part.itemsize}")
        lightness = part[..., :1] * (100 / (255 * step if offset else most))
        lab = np.concatenate([lightness, places / step], axis=-1)
        made[top : top + 64] = (light_to_srgb(lab_to_light(lab)) * most).round()
    return made


_NO_WHITE = (
    "floating-point, signed or 32-bit samples, which have no agreed white; save it with 8 or 16 bits a sample"
)


def _of_full_range(
    samples: np.ndarray, colours: int, tags: Tags, floats: bool
) -> tuple[np.ndarray, Model, np.ndarray | None]:
    """Samples (H, W, C) split into colours and alpha; those without an agreed white stay as they are, where
    they are taken at all.
    """
    taken = "u" if tags.photometric == 0 else "iuf"  # libvips turns what is unsigned, where white is zero
    if samples.dtype not in (np.uint8, np.uint16) and not (
        floats and colours < 4 and samples.dtype.kind in taken
    ):
        raise ValueError(_NO_WHITE)
    colour, alpha = samples[..., 0] if colours == 1 else samples[..., :colours], None
    place, _ = _alpha_place(tags, colours)
    if colours <= place < samples.shape[-1]:
        alpha = samples[..., place]
    models: dict[int, Model] = {1: "grey", 3: "rgb", 4: "cmyk"}
    return colour, models[colours], alpha


def _alpha_place(tags: Tags, colours: int) -> tuple[int, bool]:
    """Which of the samples is transparency, 0 for none, and whether the colours are multiplied with it: by
    ExtraSamples the first that is (1 and 2), without them the first behind the colours.
    """
    extras = tags.numbers(338) or (2,)
    return next(((colours + n, kind == 1) for n, kind in enumerate(extras) if kind != 0), (0, False))


def _by_pillow(bare: bytes, pages: int, tags: Tags, metadata: Metadata) -> Decoded:
    with opened_by_pillow(io.BytesIO(bare)) as picture:
        picture.load()
        return of_pillow(picture, tags, metadata, pages)


def _that_vips_refuses(
    bare: bytes, pages: int, tags: Tags, metadata: Metadata, floats: bool, error: Exception
) -> Decoded:
    """Grey with 12 bits by Pillow; packed depths by tifffile, where it is installed."""
    if tags.bits == 12 and tags.samples == 1:
        with contextlib.suppress(ValueError), opened_by_pillow(io.BytesIO(bare)) as picture:
            picture.load()
            if picture.mode == "I;16":  # 0 to 4095, as they are in the file
                samples = stretched(np.asarray(picture), 12)
                return made_upright(
                    samples, "grey", None, tags.raw(ICC), (), metadata, pages, tags.orientation
                )
    if tags.bits not in (1, 8, 16) and tags.photometric in (0, 1, 2):
        return _by_tifffile(bare, pages, tags, metadata, floats)
    raise error


def _by_tifffile(bare: bytes, pages: int, tags: Tags, metadata: Metadata, floats: bool) -> Decoded:
    """Grey or RGB with 1 to 16 bits a sample, packed, together or in planes; with `floats` of 64 bits too."""
    wide = floats and tags.bits == 64 and tags.photometric != 0 and 1 not in tags.numbers(338)
    if not wide and (tags.get(339, 1) != 1 or not 1 <= tags.bits <= 16):
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
    place, multiplied = _alpha_place(tags, colours)
    if multiplied and place < read.shape[-1]:
        read[..., :colours] = unmultiplied(read[..., :colours], read[..., place], most)
    read = read if wide else stretched(read, tags.bits)
    colour, model, alpha = _of_full_range(read, colours, tags, floats)
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
