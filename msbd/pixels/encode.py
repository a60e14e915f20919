"""A picture as the bytes of a PNG, WebP, JPEG or TIFF, at its own depth, with its profile and its metadata.

Tensors  samples (H, W) grey or (H, W, 3) RGB; alpha (H, W); both uint8 or uint16
Library  Pillow; libvips (pyvips) for PNGs of 16 bits
Copying  needs pixels/colours.py, pixels/metadata.py, pixels/samples.py,
         pixels/vips.py; numpy, Pillow and pyvips
"""

import io
import itertools
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from . import colours
from .metadata import (
    EXIF_IFD,
    IPTC,
    ORIENTATION,
    RESOLUTION_UNIT,
    USER_COMMENT,
    WIDTH_AND_HEIGHT,
    X_RESOLUTION,
    XMP,
    Y_RESOLUTION,
    Metadata,
    chunk_places,
    directory_of,
    exif_bytes,
    foreign_comment,
    iptc_text,
    keep_letters,
    load_exif,
    parameters_text,
    photoshop_of_iptc,
    png_chunk,
    sized_xmp,
    text_chunk,
    user_comment,
    with_source_type,
)
from .samples import in_8_bits
from .vips import vips

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
    if suffix == ".png":
        return _png(output), notes
    if suffix in TIFF_SUFFIXES:
        return _tiff(output, notes), notes
    return (_webp if suffix == ".webp" else _jpeg)(output, notes), notes


# ---- formats -----------------------------------------------------------------------------------------------


def _png(output: Output) -> bytes:
    metadata, chunks = output.metadata, []
    if output.colour_chunks:
        chunks += output.colour_chunks
    elif output.profile is not None:
        chunks.append((b"iCCP", b"icc\0\0" + zlib.compress(output.profile)))
    if metadata.dpi is not None:
        across, down = (max(1, round(side / 0.0254)) for side in metadata.dpi)
        chunks.append((b"pHYs", struct.pack(">IIB", across, down, 1)))
    if (exif := _exif(output)) is not None:
        chunks.append((b"eXIf", exif))
    if (xmp := _xmp(output)) is not None:
        chunks.append((b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp))
    if output.ours is not None:
        chunks.append(text_chunk("parameters", parameters_text(output.ours)))
        chunks.append((b"tEXt", b"msbd\0" + user_comment(output.ours)[8:]))
    chunks += metadata.texts
    keys = {data.split(b"\0", 1)[0].lower() for _, data in metadata.texts}
    if metadata.comment and b"comment" not in keys:
        chunks.append(text_chunk("Comment", metadata.comment))
    if metadata.iptc and b"raw profile type iptc" not in keys:
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
        notes.append("JPEG's metadata hold 64 kB: prompts were shortened, or settings left out")
        exif = _shortened(output, _ROOM["exif"])
    parts = {"xmp": _xmp(output), "iptc": metadata.iptc, "comment": _comment(metadata)}
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


_HELD_ELSEWHERE = (b"Comment", b"Raw profile type iptc")


def _webp(output: Output, notes: list[str]) -> bytes:
    metadata = output.metadata
    exif, xmp = _exif(output, ours=output.ours, resolution=True), _xmp(output)
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
    """Deflated strips with horizontal differences (TIFF 6.0, sections 8 and 14), behind the directory that
    Pillow writes for EXIF.
    """
    metadata = output.metadata
    together = np.atleast_3d(_together(output.samples, output.alpha))
    height, width, channels = together.shape
    little = together.astype(together.dtype.newbyteorder("<"), copy=False)
    rows = max(1, _STRIP // (width * channels * little.itemsize))
    strips = []
    for top in range(0, height, rows):
        part = little[top : top + rows].copy()
        part[:, 1:] -= little[top : top + rows, :-1]  # modulo 2**bits
        strips.append(zlib.compress(part.tobytes()))
    if metadata.texts:
        notes.append("text chunks of the source were left out; .png keeps them")
    exif = load_exif(_exif(output, ours=output.ours))
    exif[256], exif[257], exif[259], exif[284], exif[317] = width, height, 8, 1, 2
    exif[258], exif[277] = (8 * little.itemsize,) * channels, channels
    exif[262] = 1 if output.samples.ndim == 2 else 2
    exif[278], exif[279], exif[ORIENTATION] = rows, tuple(len(strip) for strip in strips), 1
    if output.alpha is not None:
        exif[338] = 2  # plain transparency
    for number, data in ((XMP, _xmp(output)), (IPTC, metadata.iptc), (34675, output.profile)):
        if data is not None:
            exif[number] = data
    if metadata.dpi is not None:
        exif[X_RESOLUTION], exif[Y_RESOLUTION], exif[RESOLUTION_UNIT] = *metadata.dpi, 2
    if metadata.comment and 270 in exif:
        notes.append("the source's comment was left out: it has a description, which TIFF keeps in its place")
    elif metadata.comment:
        exif[270] = metadata.comment
    offsets = [0, *itertools.accumulate(len(strip) for strip in strips)]
    if offsets.pop() >= 2**32 - 2**20:
        raise ValueError("a TIFF holds 4 GB, and this one would be larger; write a .png")
    return b"".join([_directory(exif, offsets), *strips])


def _directory(exif: Image.Exif, offsets: Sequence[int]) -> bytes:
    """The head of a TIFF with the tags of `exif`; `offsets` of strips, from the end of what is returned."""
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

    keep_letters(exif)
    directory = ImageFileDirectory_v2(ifh=b"II*\0\x08\0\0\0")
    for number in list(exif):
        if number not in (EXIF_IFD, 0x8825):
            directory[number] = exif[number]
    for number in (EXIF_IFD, 0x8825):
        if inside := directory_of(exif, number):
            directory[number] = dict(inside)
    directory.tagtype |= dict.fromkeys((256, 257, 273, 278, 279), 4)  # LONG
    directory[273] = tuple(offsets)  # Pillow adds the length of the directory
    for number in (700, 33723, 34675):
        if number in directory:
            directory.tagtype[number] = 7 if number == 34675 else 1
    return b"II*\0\x08\0\0\0" + directory.tobytes(8)


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
    resolution = metadata.dpi is not None and resolution
    if metadata.exif is None and ours is None and not resolution:
        return None
    exif = load_exif(metadata.exif)
    inside = directory_of(exif, EXIF_IFD) if ours is None else exif.get_ifd(EXIF_IFD)
    for number, side in zip(WIDTH_AND_HEIGHT, output.samples.shape[1::-1], strict=True):
        if number in inside:
            inside[number] = side
    if metadata.dpi is not None and (resolution or X_RESOLUTION in exif):
        exif[X_RESOLUTION], exif[Y_RESOLUTION], exif[RESOLUTION_UNIT] = *metadata.dpi, 2
    if ours is not None:
        former = foreign_comment(inside.get(USER_COMMENT))
        inside[USER_COMMENT] = user_comment({**ours, "source_comment": former} if former else ours)
    return exif_bytes(exif)


def _shortened(output: Output, room: int) -> bytes | None:
    """The EXIF with the long texts of `ours` cut until it fits; without `ours`, and then without the
    source's.
    """
    for letters in (2000, 200, 20):
        ours = {
            key: value[:letters] + "..." if isinstance(value, str) and len(value) > letters else value
            for key, value in (output.ours or {}).items()
        }
        exif = _exif(output, ours=ours)
        if exif is not None and len(exif) <= room:
            return exif
    exif = _exif(output)
    return exif if exif is not None and len(exif) <= room else None


def _xmp(output: Output) -> bytes | None:
    xmp = output.metadata.xmp
    if xmp is not None:
        height, width = output.samples.shape[:2]
        xmp = sized_xmp(xmp, width, height, output.metadata.dpi)
    return xmp if output.source_type is None else with_source_type(xmp, output.source_type) or xmp


def _comment(metadata: Metadata) -> bytes | None:
    if metadata.comment:
        return metadata.comment.encode("utf-8", errors="replace")
    for name, data in metadata.texts:
        key, _, text = data.partition(b"\0")
        if name == b"tEXt" and key.lower() == b"comment":
            return text
    return None
