"""A picture as the bytes of a PNG, WebP, JPEG or TIFF, at its own depth, with its profile and its metadata.

Tensors  samples (H, W) grey or (H, W, 3) RGB; alpha (H, W); both uint8 or uint16
Library  Pillow; libvips (pyvips) for PNGs of 16 bits
Copying  needs pixels/colours.py, pixels/metadata.py, pixels/samples.py, pixels/tags.py, pixels/vips.py,
         pixels/xmp.py; numpy, Pillow and pyvips
"""

import io
import itertools
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image

from . import colours
from .metadata import (
    Metadata,
    chunk_places,
    foreign_comment,
    iptc_text,
    is_ours,
    parameters_text,
    photoshop_of_iptc,
    png_chunk,
    png_text,
    text_chunk,
    user_comment,
)
from .samples import in_8_bits
from .tags import (
    ASCII,
    BITS,
    BYTE,
    COMPRESSION,
    DESCRIPTION,
    EXTRA,
    HEIGHT,
    ICC,
    IPTC,
    LONG,
    MAKER_NOTE,
    ORIENTATION,
    PHOTOMETRIC,
    PLANAR,
    RATIONAL,
    RESOLUTION_UNIT,
    SAMPLES,
    SHORT,
    UNDEFINED,
    USER_COMMENT,
    WIDTH,
    WIDTH_AND_HEIGHT,
    X_RESOLUTION,
    XMP,
    Y_RESOLUTION,
    Tags,
    Value,
)
from .vips import vips
from .xmp import with_size, with_source_type

JPEG_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".jpe")
TIFF_SUFFIXES = (".tif", ".tiff")
SUFFIXES = (".png", *JPEG_SUFFIXES, ".webp", *TIFF_SUFFIXES)  # that are written
LONGEST = {".webp": 16383} | dict.fromkeys(JPEG_SUFFIXES, 65500)  # pixels a side that a format can hold
_SEGMENT = 65533  # bytes that a segment of a JPEG can hold
_ROOM = {"exif": _SEGMENT - 6, "xmp": _SEGMENT - 29, "iptc": _SEGMENT - 14 - 12, "comment": _SEGMENT}
_STRIP = 1 << 20  # bytes of samples in a strip of a TIFF, about


@dataclass(frozen=True)
class Output:
    """A picture to be written."""

    samples: np.ndarray  # (H, W) or (H, W, 3), uint8 or uint16
    alpha: np.ndarray | None = None
    profile: bytes | None = None  # ICC
    colour_chunks: tuple[tuple[bytes, bytes], ...] = ()  # for a PNG, in place of `profile`
    metadata: Metadata = field(default_factory=Metadata)
    ours: Mapping[str, Any] | None = None  # what made it
    source_type: str | None = None  # IPTC's word for how it was made
    quality: int = 95  # of a JPEG


def encode(output: Output, suffix: str) -> tuple[bytes, list[str]]:
    """The file's bytes, and a note for everything that the format could not hold.

    `suffix` is one of SUFFIXES. ValueError for transparency in a JPEG.
    """
    notes: list[str] = []
    if suffix != ".png" and suffix not in TIFF_SUFFIXES and output.samples.dtype == np.uint16:
        notes.append(f"16 bits a sample became 8, which is what {suffix} holds; .png and .tif keep them")
    writers = {".png": _png, ".webp": _webp} | dict.fromkeys(TIFF_SUFFIXES, _tiff)
    return writers.get(suffix, _jpeg)(output, notes), notes


# ---- formats -----------------------------------------------------------------------------------------------


def _png(output: Output, notes: list[str]) -> bytes:
    metadata, chunks = output.metadata, []
    if output.colour_chunks:
        chunks += output.colour_chunks
    elif output.profile is not None:
        chunks.append((b"iCCP", b"icc\0\0" + zlib.compress(output.profile)))
    if metadata.dpi is not None:
        across, down = (min(max(1, round(side / 0.0254)), 2**31 - 1) for side in metadata.dpi)
        chunks.append((b"pHYs", struct.pack(">IIB", across, down, 1)))
    if (exif := _exif(output)) is not None:
        chunks.append((b"eXIf", exif))
    if (xmp := _xmp(output, notes)) is not None:
        chunks.append((b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp))
    if output.ours is not None:
        chunks.append(text_chunk("parameters", parameters_text(output.ours)))
        chunks.append((b"tEXt", b"msbd\0" + user_comment(output.ours)[8:]))
    chunks += metadata.texts
    keys = {data.split(b"\0", 1)[0].lower() for _, data in metadata.texts}
    if metadata.comment and b"comment" not in keys:
        chunks.append(text_chunk("Comment", metadata.comment))
    if metadata.iptc and not keys & {b"raw profile type iptc", b"raw profile type 8bim"}:
        chunks.append(iptc_text(metadata.iptc))
    plain = _plain_png(output.samples, output.alpha)
    places = list(chunk_places(plain))
    kept = (plain[at:end] for at, end, name in places[1:] if name in (b"IDAT", b"IEND"))
    return b"".join([plain[: places[0][1]], *(png_chunk(*one) for one in chunks), *kept])


def _plain_png(samples: np.ndarray, alpha: np.ndarray | None) -> bytes:
    if samples.dtype == np.uint8:
        file = io.BytesIO()
        _picture(samples, alpha).save(file, "PNG")
        return file.getvalue()
    image: Any = vips().Image.new_from_array(np.ascontiguousarray(_together(samples, alpha)))
    return image.copy(interpretation="grey16" if samples.ndim == 2 else "rgb16").pngsave_buffer(keep="none")


def _jpeg(output: Output, notes: list[str]) -> bytes:
    if output.alpha is not None:
        raise ValueError("JPEG has no transparency, which the picture has; save it as .png, .webp or .tif")
    metadata = output.metadata
    exif = _exif(output, ours=output.ours)
    if exif is not None and len(exif) > _ROOM["exif"]:
        exif = _shortened(output, _ROOM["exif"], notes)
    comment = _comment(metadata)
    parts = {
        "xmp": _xmp(output, notes), "iptc": metadata.iptc, "comment": None if comment is None else comment.encode(),
    }  # fmt: skip
    for name, data in parts.items():
        if data is not None and len(data) > _ROOM[name]:
            notes.append(
                f"{name.upper() if name != 'comment' else name}: {len(data):,} bytes, left out; a JPEG holds 64 kB"
            )
            parts[name] = None
    if metadata.texts and any(data.split(b"\0")[0] not in _HELD_ELSEWHERE for _, data in metadata.texts):
        notes.append("text chunks of the source were left out; .png keeps them")
    # 4:4:4: halved colour would show at the edge of an edit
    options: dict[str, Any] = {"quality": output.quality, "subsampling": 0}
    if exif is not None:
        options["exif"] = b"Exif\0\0" + exif
    if parts["xmp"]:
        options["xmp"] = parts["xmp"]
    if parts["comment"]:
        options["comment"] = parts["comment"]
    if output.profile is not None:
        options["icc_profile"] = output.profile
    if metadata.dpi is not None and max(metadata.dpi) < 65535:
        options["dpi"] = tuple(max(1, round(side)) for side in metadata.dpi)
    file = io.BytesIO()
    _picture(in_8_bits(output.samples), None).save(file, "JPEG", **options)
    data = file.getvalue()
    if parts["iptc"]:
        block = b"Photoshop 3.0\0" + photoshop_of_iptc(parts["iptc"])
        # Behind JFIF's segment, which Pillow writes first.
        at = 4 + struct.unpack(">H", data[4:6])[0] if data[2:4] == b"\xff\xe0" else 2
        data = data[:at] + b"\xff\xed" + struct.pack(">H", len(block) + 2) + block + data[at:]
    return data


_HELD_ELSEWHERE = (b"Comment", b"Raw profile type iptc", b"Raw profile type 8bim")


def _webp(output: Output, notes: list[str]) -> bytes:
    metadata = output.metadata
    exif, xmp = _exif(output, ours=output.ours, resolution=True), _xmp(output, notes)
    lost = [
        name
        for name, value in (("IPTC", metadata.iptc), ("comments", metadata.comment or metadata.texts))
        if value
    ]
    if lost:
        notes.append(f"{' and '.join(lost)} of the source were left out, for which WebP has no place")
    # exact: without it colours under full transparency are thrown away
    options: dict[str, Any] = {"lossless": True, "exact": True}
    options |= {"exif": b"Exif\0\0" + exif} if exif is not None else {}
    options |= {"xmp": xmp} if xmp is not None else {}
    samples, profile = output.samples, output.profile
    if samples.ndim == 2:  # WebP has no grey, nor a profile for it
        samples = (colours.to_srgb(samples, "grey", profile) * 255).round().astype(np.uint8)
        if profile is not None:
            notes.append("WebP has no grey: the result is in sRGB, without the grey profile")
            profile = None
    options |= {"icc_profile": profile} if profile is not None else {}
    file = io.BytesIO()
    alpha = None if output.alpha is None else in_8_bits(output.alpha)
    _picture(in_8_bits(samples), alpha).save(file, "WEBP", **options)
    return file.getvalue()


def _tiff(output: Output, notes: list[str]) -> bytes:
    """Deflated strips with horizontal differences (TIFF 6.0, sections 8 and 14), behind the directories that
    the source's EXIF has; in their byte order.
    """
    metadata = output.metadata
    tags = Tags.of(_exif(output, ours=output.ours) or b"")
    together = np.atleast_3d(_together(output.samples, output.alpha))
    height, width, channels = together.shape
    ordered = together.astype(together.dtype.newbyteorder(tags.order), copy=False)
    rows = max(1, _STRIP // (width * channels * ordered.itemsize))
    strips = []
    for top in range(0, height, rows):
        part = ordered[top : top + rows].copy()
        part[:, 1:] -= ordered[top : top + rows, :-1]  # modulo 2**bits
        strips.append(zlib.compress(part.tobytes()))
    short, long = (lambda *n: tags.value(SHORT, *n)), (lambda *n: tags.value(LONG, *n))
    tags.main.update({
        WIDTH: long(width), HEIGHT: long(height), ORIENTATION: short(1),
        BITS: short(*(8 * ordered.itemsize,) * channels), SAMPLES: short(channels),
        PHOTOMETRIC: short(1 if output.samples.ndim == 2 else 2), PLANAR: short(1), COMPRESSION: short(8),
        _PREDICTOR: short(2), _ROWS: long(rows), _LENGTHS: long(*(len(strip) for strip in strips)),
    })  # fmt: skip
    if output.alpha is not None:
        tags.main[EXTRA] = short(2)  # plain transparency
    blocks = (
        (XMP, BYTE, _xmp(output, notes)),
        (IPTC, UNDEFINED, metadata.iptc),
        (ICC, UNDEFINED, output.profile),
    )
    tags.main.update({number: Value(kind, data) for number, kind, data in blocks if data})
    if metadata.dpi is not None:
        _set_resolution(tags, metadata.dpi)
    comment = _comment(metadata)
    if comment and DESCRIPTION in tags.main:
        notes.append("the source's comment was left out: it has a description, which TIFF keeps in its place")
    elif comment:
        tags.main[DESCRIPTION] = Value(ASCII, comment.encode() + b"\0")
    if any(data.split(b"\0")[0] not in _HELD_ELSEWHERE for _, data in metadata.texts):
        notes.append("text chunks of the source were left out; .png keeps them")
    *offsets, end = 0, *itertools.accumulate(len(strip) for strip in strips)
    if end >= 2**32 - 2**24:
        raise ValueError("a TIFF holds 4 GB, and this one would be larger; write a .png")
    tags.main[_OFFSETS] = long(*offsets)
    start = len(tags.to_bytes())
    tags.main[_OFFSETS] = long(*(start + offset for offset in offsets))
    return b"".join([tags.to_bytes(), *strips])


_OFFSETS, _ROWS, _LENGTHS, _PREDICTOR = 273, 278, 279, 317


# ---- shared ------------------------------------------------------------------------------------------------


def _picture(samples: np.ndarray, alpha: np.ndarray | None) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(_together(samples, alpha)))


def _together(samples: np.ndarray, alpha: np.ndarray | None) -> np.ndarray:
    return samples if alpha is None else np.dstack([samples, alpha])


def _exif(output: Output, *, ours: Mapping[str, Any] | None = None, resolution: bool = False) -> bytes | None:
    """The source's EXIF with this picture's size and resolution, and with `ours`, what made it, as user
    comment.

    `resolution`: where no other place of the format says it.
    """
    metadata = output.metadata
    tags = Tags.of(metadata.exif or b"")
    for number, side in zip(WIDTH_AND_HEIGHT, output.samples.shape[1::-1], strict=True):
        if number in tags.exif:
            tags.exif[number] = tags.value(LONG, side)
    if metadata.dpi is not None and (resolution or X_RESOLUTION in tags.main):
        _set_resolution(tags, metadata.dpi)
    former = tags.exif.get(USER_COMMENT, Value(UNDEFINED, b"")).data
    source = foreign_comment(former, tags.order)
    if ours is not None:
        comment = user_comment({**ours, "source_comment": source} if source else ours)
        tags.exif[USER_COMMENT] = Value(UNDEFINED, comment)
    elif is_ours(former):  # of an earlier run
        del tags.exif[USER_COMMENT]
        if source:
            text = source.encode(_UTF16[tags.order], errors="replace")
            tags.exif[USER_COMMENT] = Value(UNDEFINED, b"UNICODE\0" + text)
    if output.profile is None and tags.interop.get(1, _SRGB).data[:3] == b"R03":  # Adobe RGB, by EXIF alone
        tags.interop[1] = _SRGB
    return tags.to_bytes() if tags else None


_UTF16 = {"<": "utf-16-le", ">": "utf-16-be"}
_SRGB = Value(ASCII, b"R98\0")  # InteroperabilityIndex, by DCF 2.0
_LONG = 4096  # bytes of a value that is left out before the whole EXIF is


def _set_resolution(tags: Tags, dpi: tuple[float, float]) -> None:
    tags.main[X_RESOLUTION], tags.main[Y_RESOLUTION] = (tags.value(RATIONAL, side) for side in dpi)
    tags.main[RESOLUTION_UNIT] = tags.value(SHORT, 2)


def _shortened(output: Output, room: int, notes: list[str]) -> bytes | None:
    """The EXIF in `room` bytes: without the maker's note, with the long texts of `ours` cut, without `ours`,
    without the source's, as much of it as must be.
    """

    def with_exif(tags: Tags) -> Output:
        exif = tags.to_bytes() if tags else None
        return replace(output, metadata=replace(output.metadata, exif=exif))

    tags = Tags.of(output.metadata.exif or b"")
    lost = ["the maker's note was left out"] if tags.exif.pop(MAKER_NOTE, None) else []
    light = with_exif(tags)
    ways = [(light, output.ours, lost)]
    for letters in (2000, 200, 20):
        ways.append(
            (light, _cut(output.ours, letters), [*lost, "long texts of what made the picture were cut"])
        )
    ways.append((light, None, [*lost, "what made the picture was left out"]))
    for directory in (tags.main, tags.exif, tags.gps):
        for number in [number for number, value in directory.items() if len(value.data) > _LONG]:
            del directory[number]
    lost = [f"what of the source's EXIF is longer than {_LONG} bytes was left out"]
    ways.append((with_exif(tags), _cut(output.ours, 20), lost))
    ways.append((with_exif(Tags()), _cut(output.ours, 20), ["the source's EXIF was left out"]))
    for way, ours, what in ways:
        exif = _exif(way, ours=ours)
        if exif is None or len(exif) <= room:
            notes.append(f"JPEG's metadata hold 64 kB: {', '.join(what)}")
            return exif
    notes.append("JPEG's metadata hold 64 kB: all EXIF was left out")
    return None


def _cut(ours: Mapping[str, Any] | None, letters: int) -> Mapping[str, Any] | None:
    return ours and {
        key: value[:letters] + "..." if isinstance(value, str) and len(value) > letters else value
        for key, value in ours.items()
    }


def _xmp(output: Output, notes: list[str]) -> bytes | None:
    xmp = output.metadata.xmp
    if xmp is not None:
        height, width = output.samples.shape[:2]
        xmp = with_size(xmp, width, height, output.metadata.dpi)
    if output.source_type is None:
        return xmp
    marked = with_source_type(xmp, output.source_type)
    if marked is None:
        notes.append("the source's XMP is damaged: IPTC's Digital Source Type was not added")
    return marked or xmp


def _comment(metadata: Metadata) -> str | None:
    """The source's comment, or those among its text chunks."""
    chunks = (png_text(one) for one in metadata.texts if one[1][:8].lower() == b"comment\0")
    return metadata.comment or "\n".join(text for _, text in chunks if text) or None
