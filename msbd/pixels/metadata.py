"""What a picture file says besides its pixels: EXIF, XMP, IPTC, resolution, comments; kept, and what we add.

Sources  XMP part 3 (where each format has it), IPTC IIM 4.2, PNG third edition (chunks)
Copying  needs pixels/tags.py, pixels/xmp.py; Pillow

Nothing here may cost a picture: what is damaged is left out.
"""

import contextlib
import json
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from .tags import IPTC, ORIENTATION, SHORT, XMP, Tags
from .xmp import in_utf8, kept_xmp, orientation_of

_LONGEST = 1 << 24  # bytes that a compressed text or profile may unfold to
_XMP_KEY = b"XML:com.adobe.xmp"
_XMP_MARK = b"http://ns.adobe.com/xap/1.0/\0"
_PHOTOSHOP_MARK = b"Photoshop 3.0\0"

Chunk = tuple[bytes, bytes]  # of a PNG: name and data


@dataclass(frozen=True)
class Metadata:
    """What a file says of its picture, apart from colour; all of it optional."""

    exif: bytes | None = None  # a TIFF without pixels, upright, without thumbnail
    xmp: bytes | None = None
    iptc: bytes | None = None  # IIM records
    dpi: tuple[float, float] | None = None  # pixels an inch, across and down
    comment: str | None = None
    texts: tuple[Chunk, ...] = ()  # text chunks of a PNG as they are, but those we wrote

    def turned(self) -> "Metadata":
        """Of a picture whose sides were exchanged."""
        return replace(self, dpi=self.dpi and (self.dpi[1], self.dpi[0]))

    def scaled(self, across: float, down: float) -> "Metadata":
        """Of a picture that has `across` and `down` times as many pixels a side: on paper it stays as
        large.
        """
        return replace(self, dpi=self.dpi and (self.dpi[0] * across, self.dpi[1] * down))


def read_metadata(
    picture: Image.Image | None,
    chunks: Iterable[Chunk] = (),
    *,
    tags: Tags | None = None,
    xmp: bytes | None = None,
) -> tuple[Tags, Metadata]:
    """What an opened file says, and what is kept of it: `picture` as Pillow opened it, where it could;
    `chunks` of a PNG; `tags` and `xmp` where another reader found them.

    The tags have XMP's orientation where EXIF has none, and there is no TIFF.
    """
    info = {} if picture is None else picture.info
    segments = getattr(picture, "applist", [])  # of a JPEG
    chunks = list(chunks)
    texts = [one for one in chunks if one[0] in (b"tEXt", b"zTXt", b"iTXt")]
    profiles = _raw_profiles(texts)
    app1 = profiles.get("APP1", b"")
    turned_by_xmp = tags is None
    if tags is None:
        exif = next((data for name, data in chunks if name == b"eXIf"), b"") or profiles.get("exif", app1)
        tags = Tags.of(exif or info.get("exif") or b"")
    in_text = next((one for one in texts if one[1].startswith(_XMP_KEY + b"\0")), None)
    xmp = xmp or _as_bytes(info.get("xmp")) or tags.raw(XMP) or profiles.get("xmp")
    if xmp is None and in_text is not None:
        xmp = png_text(in_text)[1].encode()
    elif xmp is None and app1.startswith(_XMP_MARK):
        xmp = app1.removeprefix(_XMP_MARK)
    xmp = in_utf8(xmp) if xmp else None
    if turned_by_xmp and xmp and ORIENTATION not in tags.main and (turned := orientation_of(xmp)) > 1:
        tags.main[ORIENTATION] = tags.value(SHORT, turned)
    photoshop = b"".join(
        data.removeprefix(_PHOTOSHOP_MARK)
        for name, data in segments
        if name == "APP13" and data.startswith(_PHOTOSHOP_MARK)
    )
    records = profiles.get("iptc")
    iptc = iptc_of_photoshop(photoshop or records or profiles.get("8bim", b"")) or tags.raw(IPTC) or records
    comments = [data for name, data in segments if name == "COM"] or [info.get("comment")]
    comment = "\n".join(_text(one).rstrip("\0") for one in comments if isinstance(one, bytes) and one)
    is_jpeg = picture is not None and picture.format in ("JPEG", "MPO")
    kept = tags.kept()
    return tags, Metadata(
        exif=kept.to_bytes() if kept else None,
        xmp=kept_xmp(xmp) if xmp else None,
        iptc=iptc,
        dpi=_dpi_of_png(chunks) or _dpi({} if is_jpeg and "jfif" not in info else info) or tags.dpi,
        comment=comment or None,
        texts=_foreign(texts, profiles),
    )


def _text(data: bytes) -> str:
    """UTF-8, or else Latin-1."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def _dpi(info: Mapping[Any, Any]) -> tuple[float, float] | None:
    """What the format itself says, where that is a density."""
    if "jfif" in info and info.get("jfif_unit") not in (1, 2):
        return None  # Pillow has made it up
    with contextlib.suppress(KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError):
        across, down = (float(side) for side in info["dpi"])
        if 1 < across < 1e6 and 1 < down < 1e6:
            return across, down
    return None


def _dpi_of_png(chunks: Iterable[Chunk]) -> tuple[float, float] | None:
    data = next((data for name, data in chunks if name == b"pHYs"), b"")
    if len(data) == 9 and data[8] == 1:  # a metre
        across, down = (side * 0.0254 for side in struct.unpack(">II", data[:8]))
        return _dpi({"dpi": (across, down)})
    return None


def _as_bytes(value: Any) -> bytes | None:
    if isinstance(value, str):
        return value.encode("utf-8", errors="replace")
    return bytes(value) if isinstance(value, (bytes, bytearray)) and value else None


# ---- chunks of PNG -----------------------------------------------------------------------------------------


def png_chunks(data: bytes) -> Iterator[Chunk]:
    """Name and data of a PNG's chunks up to its end, those of pixels without their data; none with a wrong
    checksum.
    """
    for at, end, name in chunk_places(data):
        if name == b"IEND":
            return
        if name in (b"IDAT", b"fdAT"):
            yield name, b""
        elif data[at:end] == png_chunk(name, body := data[at + 8 : end - 4]):
            yield name, body


def chunk_places(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Start, end and name of each chunk of a PNG, the last one maybe cut off."""
    at = 8
    while at + 8 <= len(data):
        length, name = struct.unpack(">I4s", data[at : at + 8])
        yield at, at + 12 + length, name
        at += 12 + length


def png_chunk(name: bytes, data: bytes) -> bytes:
    """A chunk as it stands in the file: length, name, data, checksum."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_text(chunk: Chunk) -> tuple[str, str]:
    """Keyword and text of a text chunk (11.3.3); the text is empty where it is damaged."""
    name, data = chunk
    key, _, rest = data.partition(b"\0")
    packed = name == b"zTXt"
    if name == b"iTXt":
        packed, rest = rest[:1] == b"\1", b"\0".join(rest[2:].split(b"\0", 2)[2:])
    elif packed:
        rest = rest[1:]
    return _text(key), _text(unfolded(rest) if packed else rest)


def unfolded(data: bytes) -> bytes:
    """What a compressed text or profile holds, up to 16 MB of it; nothing where it is damaged."""
    with contextlib.suppress(zlib.error):
        return zlib.decompressobj().decompress(data, _LONGEST)
    return b""


def text_chunk(keyword: str, text: str) -> Chunk:
    """tEXt for ASCII, iTXt else."""
    if text.isascii():
        return b"tEXt", keyword.encode("latin-1") + b"\0" + text.encode()
    return b"iTXt", keyword.encode("latin-1") + b"\0\0\0\0\0" + text.encode("utf-8", errors="replace")


def _foreign(texts: list[Chunk], profiles: Iterable[str]) -> tuple[Chunk, ...]:
    """Text chunks as they are, but XMP and EXIF, which have a place of their own, and what an earlier run of
    ours wrote; `profiles` were read.
    """
    keys = [data.split(b"\0", 1)[0] for _, data in texts]
    ours = [place for place, key in enumerate(keys) if key == b"msbd"]
    # Our "parameters" stand before our "msbd"; another tool's stay.
    dropped = set(ours) | {place - 1 for place in ours if place and keys[place - 1] == b"parameters"}
    own_place = {_XMP_KEY, *(_RAW + kind.encode() for kind in {"exif", "APP1", "xmp"} & set(profiles))}
    return tuple(
        one for place, one in enumerate(texts) if place not in dropped and keys[place] not in own_place
    )


_RAW = b"Raw profile type "


def _raw_profiles(texts: Iterable[Chunk]) -> dict[str, bytes]:
    """Other formats' blocks in text chunks, as ImageMagick and ExifTool write them: name, length and
    hexadecimal digits; by their kind.
    """
    found = {}
    for kind in ("exif", "APP1", "xmp", "iptc", "8bim"):
        mark = _RAW + kind.encode() + b"\0"
        if chunk := next((one for one in texts if one[1].startswith(mark)), None):
            with contextlib.suppress(ValueError):
                found[kind] = bytes.fromhex("".join(png_text(chunk)[1].split("\n")[3:]))
    return {kind: data for kind, data in found.items() if data}


# ---- IPTC --------------------------------------------------------------------------------------------------


def iptc_of_photoshop(blocks: bytes) -> bytes | None:
    """The IPTC records (0x0404) among Photoshop's resource blocks, of several blocks all."""
    at, found = 0, []
    while at + 12 <= len(blocks):
        at -= blocks[at - 1 : at + 3] == b"8BIM"  # behind a block of odd length that was not padded
        if blocks[at : at + 4] != b"8BIM":
            break
        number, name = struct.unpack(">HB", blocks[at + 4 : at + 7])
        at += 6 + (name + 2 & ~1)
        (length,) = struct.unpack(">I", blocks[at : at + 4].ljust(4, b"\0"))
        if number == 0x0404:
            found.append(blocks[at + 4 : at + 4 + length])
        at += 4 + (length + 1 & ~1)
    return b"".join(found) or None


def photoshop_of_iptc(iptc: bytes) -> bytes:
    """IPTC records as Photoshop's resource block 0x0404."""
    return b"8BIM\x04\x04\0\0" + struct.pack(">I", len(iptc)) + iptc + b"\0" * (len(iptc) % 2)


def iptc_text(iptc: bytes) -> tuple[bytes, bytes]:
    """IPTC records as a PNG's "Raw profile type iptc"."""
    raw = photoshop_of_iptc(iptc)
    digits = raw.hex()
    lines = "\n".join(digits[at : at + 72] for at in range(0, len(digits), 72))
    text = f"\niptc\n{len(raw):8}\n{lines}\n".encode("ascii")
    return b"zTXt", b"Raw profile type iptc\0\0" + zlib.compress(text)


# ---- what we add -------------------------------------------------------------------------------------------


def parameters_text(ours: Mapping[str, Any]) -> str:
    """`ours` for people: prompt, negative prompt, then "Key: value" pairs on one line."""
    rest = {
        key: value
        for key, value in ours.items()
        if key not in ("prompt", "negative_prompt") and value is not None
    }
    lines = [str(ours.get("prompt", ""))]
    if ours.get("negative_prompt"):
        lines.append(f"Negative prompt: {ours['negative_prompt']}")
    lines.append(", ".join(f"{key.replace('_', ' ').capitalize()}: {value}" for key, value in rest.items()))
    return "\n".join(line for line in lines if line)


def user_comment(ours: Mapping[str, Any]) -> bytes:
    """`ours` as JSON for EXIF's tag UserComment, whose first 8 bytes name the character set."""
    return b"ASCII\0\0\0" + json.dumps(dict(ours)).encode("ascii")


def is_ours(comment: bytes) -> bool:
    """Whether an EXIF user comment is one that `user_comment` made."""
    with contextlib.suppress(ValueError, RecursionError):
        former = json.loads(_text(comment[8:]))
        return isinstance(former, dict) and "msbd" in former
    return False


def foreign_comment(comment: bytes, order: str) -> str | None:
    """The text of an EXIF user comment, unless it is blank or ours; `order` of its file's bytes."""
    mark, body = comment[:8], comment[8:]
    if mark == b"UNICODE\0":
        # Most letters have a byte of 0: which one, tells.
        high, low = body[0::2].count(0), body[1::2].count(0)
        little = order == "<" if high == low else low > high
        if body[:2] in (b"\xff\xfe", b"\xfe\xff"):
            little, body = body[:1] == b"\xff", body[2:]
        text = body.decode("utf-16-le" if little else "utf-16-be", errors="replace")
    elif mark == b"JIS\0\0\0\0\0":
        text = body.decode("iso2022_jp", errors="replace")
    else:
        text = _text(body)
    text = text.strip("\0 ")
    if not text:
        return None
    if is_ours(comment):
        text = json.loads(_text(comment[8:])).get("source_comment")
    return text if isinstance(text, str) else None
