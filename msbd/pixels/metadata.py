"""What a picture file says besides its pixels: EXIF, XMP, IPTC, resolution, comments; kept, and what we add.

Sources  EXIF 3.0, TIFF 6.0 (tag numbers), XMP part 3 (where each format has it), IPTC IIM 4.2 and its photo
         metadata 2024 (Digital Source Type), PNG third edition (chunks)
Copying  this file stands alone: Pillow

Nothing here may cost a picture: what is damaged is left out.
"""

import contextlib
import io
import json
import re
import struct
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

from PIL import Image

ORIENTATION, X_RESOLUTION, Y_RESOLUTION, RESOLUTION_UNIT = 0x0112, 0x011A, 0x011B, 0x0128
EXIF_IFD, GPS_IFD, INTEROP_IFD = 0x8769, 0x8825, 0xA005
XMP, IPTC, PHOTOSHOP, ICC = 700, 33723, 34377, 34675  # tags of TIFF
USER_COMMENT = 0x9286
WIDTH_AND_HEIGHT = (0xA002, 0xA003)  # of the picture, in the EXIF directory
# Tags of TIFF that say how its pixels are stored, which the writer decides, and what is kept elsewhere.
_STRUCTURE = {
    *range(254, 260), 262, 263, 264, 265, 266, 273, 277, 278, 279, 280, 281, 284, 288, 289, 290, 291, 292, 293, 297,
    301, 317, 318, 319, 320, 321, 322, 323, 324, 325, 326, 327, 328, 330, 332, 333, 334, 336, 337, 338, 339, 340,
    341, 342, 347, *range(512, 522), 529, 530, 531, 532, 34675, 33723, 34377, 700, 50706, 50707, 50708,
}  # fmt: skip
_TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt")
_XMP_KEY = b"XML:com.adobe.xmp"
_LONGEST_TEXT = 1 << 24  # bytes that a compressed text may unfold to

EDITED = "compositeWithTrainedAlgorithmicMedia"  # IPTC's words for pictures that a model painted into,
ENHANCED = "algorithmicallyEnhanced"  # and for those that were only enlarged
SOURCE_TYPES = "http://cv.iptc.org/newscodes/digitalsourcetype/"
_IPTC_EXT = "http://iptc.org/std/Iptc4xmpExt/2008-02-29/"


@dataclass(frozen=True)
class Metadata:
    """What a file says of its picture, apart from colour; all of it optional."""

    exif: bytes | None = None  # a TIFF without pixels, upright, without thumbnail
    xmp: bytes | None = None
    iptc: bytes | None = None  # IIM records
    dpi: tuple[float, float] | None = None  # pixels an inch, across and down
    comment: str | None = None
    texts: tuple[tuple[bytes, bytes], ...] = ()  # text chunks of a PNG as they are, but those we wrote

    def turned(self) -> "Metadata":
        """Of a picture whose sides were exchanged."""
        return replace(self, dpi=self.dpi and (self.dpi[1], self.dpi[0]))

    def scaled(self, across: float, down: float) -> "Metadata":
        """Of a picture that has `across` and `down` times as many pixels a side: on paper it stays as
        large.
        """
        return replace(self, dpi=self.dpi and (self.dpi[0] * across, self.dpi[1] * down))


@dataclass(frozen=True)
class Tags:
    """The EXIF tags of a file of any format, which in a TIFF also say how its pixels are stored."""

    exif: Image.Exif | None = None

    @staticmethod
    def of_tiff(data: bytes) -> "Tags":
        """Of a TIFF of any depth, read by its directory alone."""
        exif = Image.Exif()
        with contextlib.suppress(Exception):
            if data[2:4] in (b"+\0", b"\0+"):
                _load_big(exif, data)
            else:
                exif.load(data)
        return Tags(exif)

    def get(self, number: int, default: Any = None) -> Any:
        """A tag of the main directory; of several values the first."""
        with contextlib.suppress(Exception):
            value = None if self.exif is None else self.exif.get(number)
            if isinstance(value, tuple):
                value = value[0] if value else None
            return default if value is None else value
        return default

    def count(self, number: int) -> int:
        """How many values a tag of the main directory has."""
        with contextlib.suppress(Exception):
            value = None if self.exif is None else self.exif.get(number)
            return len(value) if isinstance(value, tuple) else int(value is not None)
        return 0

    def raw(self, number: int) -> bytes | None:
        """A tag's bytes as they stand in the file, whatever they are marked as: IPTC is often said to be
        words of 4 bytes.
        """
        with contextlib.suppress(Exception):
            directory = getattr(self.exif, "_info", None)
            return _as_bytes(directory._tagdata.get(number) or directory.get(number))  # type: ignore[union-attr]
        return None

    @property
    def orientation(self) -> int:
        """1 to 8; 1 where it is missing or no such number."""
        value = self.get(ORIENTATION)
        return value if isinstance(value, int) and 1 <= value <= 8 else 1

    def _number(self, number: int, default: int) -> int:
        value = self.get(number)
        return value if isinstance(value, int) else default

    @property
    def bits(self) -> int:
        """A sample's."""
        return self._number(258, 1)

    @property
    def samples(self) -> int:
        """A pixel's."""
        return self._number(277, 1)

    @property
    def photometric(self) -> int:
        """0 white is zero, 1 black is zero, 2 RGB, 3 palette, 5 CMYK, 6 YCbCr, 8 and 9 Lab."""
        return self._number(262, 1)

    @property
    def planar(self) -> bool:
        return self._number(284, 1) == 2

    @property
    def width(self) -> int:
        return self._number(256, 0)

    @property
    def height(self) -> int:
        return self._number(257, 0)

    @property
    def unspecified_extra(self) -> bool:
        """Whether what lies behind the colours is no transparency, by ExtraSamples."""
        return self._number(338, 2) == 0

    @property
    def profile(self) -> bytes | None:
        """The ICC profile of a TIFF."""
        return _as_bytes(None if self.exif is None else self.exif.get(ICC))

    @property
    def dpi(self) -> tuple[float, float] | None:
        """Pixels an inch, across and down."""
        unit = {2: 1.0, 3: 2.54}.get(self.get(RESOLUTION_UNIT, 2))
        with contextlib.suppress(TypeError, ValueError, ZeroDivisionError, OverflowError):
            across, down = float(self.get(X_RESOLUTION)), float(self.get(Y_RESOLUTION))
            if unit and 0 < across < 1e6 and 0 < down < 1e6:
                return across * unit, down * unit
        return None


def _load_big(exif: Image.Exif, data: bytes) -> None:
    """What `Exif.load` does, for a BigTIFF, which it takes for none."""
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

    exif.fp = io.BytesIO(data)
    exif.head = b"II+\0" + data[4:16]  # the one mark of a BigTIFF that Pillow knows
    exif._info = ImageFileDirectory_v2(exif.head, prefix=data[:2])
    exif.fp.seek(exif._info.next)
    exif._info.load(exif.fp)


def read_tags(picture: Image.Image) -> Tags:
    """The tags of a picture that Pillow has opened; none where they are damaged."""
    with contextlib.suppress(Exception):
        return Tags(picture.getexif())
    return Tags()


def read_metadata(
    picture: Image.Image | None, tags: Tags, chunks: Iterable[tuple[bytes, bytes]], xmp: bytes | None = None
) -> Metadata:
    """What is kept of an opened file: `picture` as Pillow opened it, where it could; `chunks` of a PNG."""
    info = {} if picture is None else picture.info
    is_jpeg = picture is not None and picture.format in ("JPEG", "MPO")
    texts = _foreign(list(chunks))
    iptc = tags.raw(IPTC)
    blocks = info.get("photoshop")
    if isinstance(blocks, dict):
        iptc = iptc or _as_bytes(blocks.get(0x0404))
    iptc = iptc or _iptc_of_png(texts)
    xmp = (
        xmp
        or _as_bytes(info.get("xmp"))
        or (_as_bytes(tags.exif.get(XMP)) if tags.exif is not None else None)
    )
    comment = info.get("comment")
    if isinstance(comment, bytes):
        comment = _text(comment)
    return Metadata(
        exif=_clean_exif(tags.exif),
        xmp=_kept_xmp(xmp) if xmp else None,
        iptc=iptc,
        dpi=_dpi({} if is_jpeg and "jfif" not in info else info) or tags.dpi,
        comment=comment if isinstance(comment, str) and comment else None,
        texts=texts,
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


def _as_bytes(value: Any) -> bytes | None:
    if isinstance(value, str):
        return value.encode("utf-8", errors="replace")
    return bytes(value) if isinstance(value, (bytes, bytearray)) and value else None


def _clean_exif(exif: Image.Exif | None) -> bytes | None:
    """EXIF as a TIFF without pixels: upright, without thumbnail, without tags about the file that it
    was in.
    """
    if exif is None or not len(exif):
        return None
    kept = Image.Exif()
    for number in list(exif):
        with contextlib.suppress(Exception):
            if number not in _STRUCTURE and number not in (EXIF_IFD, GPS_IFD, INTEROP_IFD):
                kept[number] = exif[number]
    for directory in (EXIF_IFD, GPS_IFD):
        with contextlib.suppress(Exception):
            if inside := directory_of(exif, directory):
                inside = {number: value for number, value in inside.items() if number != INTEROP_IFD}
                kept.get_ifd(directory).update(inside)
    if ORIENTATION in kept:
        kept[ORIENTATION] = 1
    return exif_bytes(kept)


def keep_letters(exif: Image.Exif) -> None:
    """Texts of other letters than ASCII's as the bytes that they were read from: as texts Pillow writes
    "?".
    """
    for inside in (exif, *(directory_of(exif, number) for number in (EXIF_IFD, GPS_IFD))):
        for number in list(inside):
            with contextlib.suppress(Exception):
                if isinstance(value := inside[number], str) and not value.isascii():
                    inside[number] = value.encode("latin-1")


def exif_bytes(exif: Image.Exif) -> bytes | None:
    """A TIFF without pixels, of as many of the tags as can be written; None for none."""
    keep_letters(exif)
    with contextlib.suppress(Exception):
        return exif.tobytes().removeprefix(b"Exif\0\0") if len(exif) or exif._ifds else None
    writable = Image.Exif()  # one of them cannot: find out which
    for number in list(exif):
        if number not in (EXIF_IFD, GPS_IFD):
            _add(writable, writable, number, exif)
    for directory in (EXIF_IFD, GPS_IFD):
        with contextlib.suppress(Exception):
            inside = directory_of(exif, directory)
            for number in list(inside):
                _add(writable, writable.get_ifd(directory), number, inside)
    with contextlib.suppress(Exception):
        return writable.tobytes().removeprefix(b"Exif\0\0")
    return None


def _add(whole: Image.Exif, into: Any, number: int, source: Any) -> None:
    """Tag `number` of `source`, unless the whole could no longer be written."""
    try:
        into[number] = source[number]
        whole.tobytes()
    except Exception:
        into.pop(number, None) if isinstance(into, dict) else _remove(into, number)


def _remove(exif: Image.Exif, number: int) -> None:
    with contextlib.suppress(KeyError):
        del exif[number]


def directory_of(exif: Image.Exif, number: int) -> dict[int, Any]:
    """The tags of a directory below the main one, to be changed; an empty dict of nobody's where it has
    none.
    """
    # Asked for, Pillow makes an empty directory, and writes it.
    return exif.get_ifd(number) if number in exif or number in exif._ifds else {}


def load_exif(data: bytes | None) -> Image.Exif:
    """The EXIF that `exif_bytes` made, with its directories, to be changed."""
    exif = Image.Exif()
    if data:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what a camera wrote, and Pillow doubts
            exif.load(data)
        for directory in (EXIF_IFD, GPS_IFD):
            directory_of(exif, directory)
    return exif


# ---- XMP ---------------------------------------------------------------------------------------------------


def _kept_xmp(xmp: bytes) -> bytes:
    """Upright, without thumbnails of the former picture, and without the name of an extended packet, which
    is not kept: it holds depth maps, or earlier versions of the picture.
    """
    xmp = re.sub(rb"(tiff:Orientation\s*=\s*[\"'])\d(?=[\"'])", rb"\g<1>1", xmp)
    xmp = re.sub(rb"(<tiff:Orientation>\s*)\d(?=\s*</tiff:Orientation>)", rb"\g<1>1", xmp)
    for name in ("xmp:Thumbnails", "xap:Thumbnails", "xmpNote:HasExtendedXMP"):
        xmp = _without_property(xmp, name)
    return xmp


def _without_property(xmp: bytes, name: str) -> bytes:
    """`xmp` without its property `name`, be it an attribute or an element; what does not end stays."""
    xmp = re.sub(name.encode() + rb"\s*=\s*(\"[^\"]{0,300}\"|'[^']{0,300}')", b"", xmp)
    start, end = f"<{name}>".encode(), f"</{name}>".encode()
    first, *parts = xmp.split(start)
    for part in parts:  # no regular expression: its time would grow by the square of what is never closed
        _, ended, after = part.partition(end)
        first += after if ended else start + part
    return first


def sized_xmp(xmp: bytes, width: int, height: int, dpi: tuple[float, float] | None) -> bytes:
    """`xmp` with the size in pixels, and the resolution, that its picture has now, where it says them."""
    values = {"tiff:ImageWidth": f"{width}", "tiff:ImageLength": f"{height}"}
    values |= {"exif:PixelXDimension": f"{width}", "exif:PixelYDimension": f"{height}"}
    if dpi is not None:
        across, down = (f"{round(side * 10000)}/10000" for side in dpi)
        values |= {"tiff:XResolution": across, "tiff:YResolution": down, "tiff:ResolutionUnit": "2"}
    for name, value in values.items():
        said = name.encode()
        pattern = said + rb"(\s*=\s*[\"']|>\s*)[\d/]+"
        xmp = re.sub(pattern, said + rb"\g<1>" + value.encode(), xmp)
    return xmp


def with_source_type(xmp: bytes | None, word: str) -> bytes | None:
    """`xmp` with IPTC's Digital Source Type `word`; a packet of its own where there is none, None where the
    one there is cannot be added to.
    """
    property_ = (
        f'<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="{_IPTC_EXT}" '
        f'Iptc4xmpExt:DigitalSourceType="{SOURCE_TYPES}{word}"/>'
    ).encode()
    if not xmp:
        return (
            (
                '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
                '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
            ).encode()
            + property_
            + b'</rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
        )
    # At most one: what a file said before was of its former picture.
    xmp = _without_property(xmp, "Iptc4xmpExt:DigitalSourceType")
    emptied = rb'<rdf:Description rdf:about=""\s+xmlns:Iptc4xmpExt="[^"]{0,300}"\s*/>'
    before, end, after = re.sub(emptied, b"", xmp).rpartition(b"</rdf:RDF>")
    return before + property_ + end + after if end else None


# ---- chunks of PNG -----------------------------------------------------------------------------------------


def png_chunks(file: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    """Name and data of a PNG's chunks, those of pixels without their data; up to the end, or to damage."""
    file.seek(8)
    while len(head := file.read(8)) == 8:
        length, name = struct.unpack(">I4s", head)
        if name == b"IEND" or length > 2**31 - 1:
            return
        if name in (b"IDAT", b"fdAT"):
            file.seek(length + 4, 1)
            continue
        data = file.read(length)
        if len(data) < length:
            return
        file.seek(4, 1)
        yield name, data


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


def text_chunk(keyword: str, text: str) -> tuple[bytes, bytes]:
    """tEXt for ASCII, iTXt else."""
    if text.isascii():
        return b"tEXt", keyword.encode("latin-1") + b"\0" + text.encode()
    return b"iTXt", keyword.encode("latin-1") + b"\0\0\0\0\0" + text.encode("utf-8", errors="replace")


def _foreign(chunks: list[tuple[bytes, bytes]]) -> tuple[tuple[bytes, bytes], ...]:
    """Text chunks as they are, but XMP and EXIF, which have a place of their own, and what an earlier run of
    ours wrote.
    """
    texts = [(name, data) for name, data in chunks if name in _TEXT_CHUNKS]
    keys = [data.split(b"\0", 1)[0] for _, data in texts]
    ours = [place for place, key in enumerate(keys) if key == b"msbd"]
    # Our "parameters" stand before our "msbd"; another tool's stay.
    dropped = set(ours) | {place - 1 for place in ours if place and keys[place - 1] == b"parameters"}
    own_place = (_XMP_KEY, b"Raw profile type exif", b"Raw profile type APP1")
    return tuple(
        one for place, one in enumerate(texts) if place not in dropped and keys[place] not in own_place
    )


def _iptc_of_png(texts: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    """From "Raw profile type iptc": name, length and hexadecimal digits, as ImageMagick and ExifTool
    have it.
    """
    for name, data in texts:
        key, _, rest = data.partition(b"\0")
        if key == b"Raw profile type iptc" and name in (b"tEXt", b"zTXt"):
            with contextlib.suppress(Exception):
                text = rest if name == b"tEXt" else zlib.decompressobj().decompress(rest[1:], _LONGEST_TEXT)
                raw = bytes.fromhex(b"".join(text.split(b"\n")[3:]).decode("ascii"))
                return iptc_of_photoshop(raw) or raw
    return None


def iptc_of_photoshop(blocks: bytes) -> bytes | None:
    """The IPTC records (0x0404) among Photoshop's resource blocks."""
    at = 0
    while blocks[at : at + 4] == b"8BIM" and at + 12 <= len(blocks):
        number, name = struct.unpack(">HB", blocks[at + 4 : at + 7])
        at += 6 + (name + 2 & ~1)
        (length,) = struct.unpack(">I", blocks[at : at + 4].ljust(4, b"\0"))
        if number == 0x0404:
            return blocks[at + 4 : at + 4 + length]
        at += 4 + (length + 1 & ~1)
    return None


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


def foreign_comment(comment: Any) -> str | None:
    """The text of an EXIF user comment, unless it is blank or ours."""
    if not isinstance(comment, bytes):
        return comment if isinstance(comment, str) and comment.strip() else None
    mark, body = comment[:8], comment[8:]
    if mark == b"UNICODE\0":
        text = body.decode("utf-16-be" if body[:1] == b"\0" else "utf-16-le", errors="replace")
    else:
        text = body.decode("utf-8", errors="replace")
    text = text.strip("\0 ")
    if not text:
        return None
    with contextlib.suppress(ValueError):
        former = json.loads(text)
        if isinstance(former, dict) and "msbd" in former:
            return former.get("source_comment")
    return text
