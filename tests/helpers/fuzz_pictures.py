"""Damaged pictures for the readers: `python -m tests.helpers.fuzz_pictures --count 100000 --seed 1`.

Small pictures of every kind that is read are drawn here, damaged, and read as `load_image` and `read_mask`
read them; what is read is written again. Input number i of a seed is the same wherever the libraries are the
same. A fault is: an exception other than ValueError and ImportError; a text of more than one line; a picture
that is read but not written, or not read again as it was written; more than a second of the processor's time
or a gigabyte (for a picture that is read, more by its size); and the end of the process. For Linux and macOS.
"""

import argparse
import faulthandler
import functools
import io
import json
import os
import random
import signal
import struct
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from msbd.pixels.colours import made_profile
from msbd.pixels.encode import Output, encode
from msbd.pixels.files import Photo, load_image, save_photo
from msbd.pixels.mask_files import read_mask
from msbd.pixels.metadata import chunk_places, photoshop_of_iptc
from tests.helpers import draw_files as draw
from tests.helpers import fuzzing as damage
from tests.helpers.fuzzing import DEADLINE, feed_process, limit_addresses, memory

HEIGHT, WIDTH = 23, 37  # of most seeds: two numbers that stand nowhere else in their files
CHUNK = 20_000  # inputs that one process is fed
MOST_SECONDS, MOST_MEMORY = 1.0, 2**30  # for one input, of the processor's time and of memory
# A WebP of few bytes may rightly have 16383 pixels a side, and takes 4 bytes for each before it is found
# damaged.
WEBP_SECONDS, WEBP_MEMORY = 4.0, 5 * 2**28
PIXELS_A_SECOND, BYTES_A_PIXEL = 10_000_000, 32  # on top, for a picture that is read
LARGE = 4_000_000  # pixels from which on a picture is read, but not written


# ---- what is damaged ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seed:
    """A picture before it is damaged."""

    name: str
    suffix: str
    data: bytes
    photo: bool = True  # whether `load_image` reads it


@functools.lru_cache(maxsize=1)
def seeds() -> tuple[Seed, ...]:
    """Small pictures of every kind that is read, the same each time."""
    return (*_pngs(), *_jpegs(), *_webps(), *_gifs(), *_bmps(), *_tiffs(), *_avifs())


def _levels(bits: int = 8, channels: int = 3, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Samples (height, width, channels): slopes with some noise, unsigned below 2**bits."""
    down, across = np.mgrid[:height, :width]
    slopes = [across / width, down / height, (across + down) / (width + height), 1 - down / height / 2]
    noise = np.random.default_rng(bits * 10 + channels).random((height, width, channels)) * 0.15
    values = (np.stack(slopes[:channels], -1) * 0.85 + noise) * (2**bits - 1)
    return values.round().astype(np.uint16 if bits > 8 else np.uint8)


def _saved(picture: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def _coloured() -> Image.Image:
    return Image.fromarray(_levels())


def _frames_of(picture: Image.Image) -> list[Image.Image]:
    return [picture.rotate(90 * turn) for turn in (1, 2)]


_RECORDS = b"\x1c\x02\x78\0\x07Caption\x1c\x02\x50\0\x04Name"  # IPTC
_PACKET = (
    b'<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF '
    b'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="" '
    b'xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
)
_CURVE = b"para" + bytes(8) + struct.pack(">i", round(1.8 * 65536))


def _exif(orientation: int = 6) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x011A], exif[0x011B], exif[0x0128] = (
        orientation,
        "Maker",
        300.0,
        300.0,
        2,
    )
    exif.get_ifd(0x8769).update(
        {0x9286: b"ASCII\0\0\0a comment", 0xA002: WIDTH, 0xA003: HEIGHT, 0x829A: 0.01}
    )
    exif.get_ifd(0x8769)[0x927C] = b"Maker\0\0notes" * 3
    exif.get_ifd(0x8825).update({1: "N", 2: (52.0, 31.0, 12.5)})
    return exif


def _exif_bytes() -> bytes:
    return _exif().tobytes().removeprefix(b"Exif\0\0")


def _profile(model: str) -> bytes:
    """A small ICC profile: of a curve, of curves and primaries, or, for "cmyk", of a table."""
    if model != "cmyk":
        places = (0.3127, 0.3290, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06)
        made = made_profile(model, _CURVE, places)
        assert made is not None
        return made
    ink = np.indices((2, 2, 2, 2)).reshape(4, -1).T
    table = np.stack([255 - ink.sum(1) * 60, 128 + ink[:, 0] * 40, 128 - ink[:, 2] * 40], -1).astype(np.uint8)
    straight = bytes(range(256))
    matrix = b"".join(struct.pack(">i", 65536 * (place % 4 == 0)) for place in range(9))
    lut = b"mft1" + bytes(4) + b"\4\3\2\0" + matrix + straight * 4 + table.tobytes() + straight * 3
    white = b"XYZ " + bytes(4) + struct.pack(">iii", 63190, 65536, 54061)
    tags = {
        b"A2B0": lut,
        b"wtpt": white,
        b"desc": b"desc" + bytes(4) + struct.pack(">I", 5) + b"inks\0" + bytes(79),
    }
    at, directory, body = 128 + 4 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        directory += name + struct.pack(">II", at + len(body), len(data))
        body += data + b"\0" * (-len(data) % 4)
    head = struct.pack(">I4sI4s4s4s", at + len(body), bytes(4), 0x02400000, b"prtr", b"CMYK", b"Lab ")
    head += struct.pack(">6H4s", 2026, 1, 1, 0, 0, 0, b"acsp") + bytes(28) + white[8:]
    return head.ljust(128, b"\0") + directory + body


def _pngs() -> Iterator[Seed]:
    def seed(name: str, data: bytes) -> Seed:
        return Seed(f"PNG {name}", ".png", data)

    colours = _levels(8, 3, 1, 16)[0]
    for bits in (1, 2, 4, 8, 16):
        clear = struct.pack(">H", 1) if bits < 8 else None
        yield seed(f"grey {bits}", draw.png(_levels(bits, 1), bits, draw.GREY, transparent=clear))
    for bits in (1, 2, 4, 8):
        clear = b"\0\x80" if bits == 4 else None
        indices = _levels(min(bits, 4), 1)
        yield seed(
            f"palette {bits}",
            draw.png(
                indices,
                bits,
                draw.PALETTE,
                palette=colours[:: 16 >> min(bits, 4)],
                transparent=clear,
                interlaced=bits == 2,
            ),
        )
    numbers = [(b"gAMA", struct.pack(">I", 55555)), (b"sRGB", b"\0")]
    places = struct.pack(">8I", 31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000)
    profiled = [
        (b"iCCP", b"icc\0\0" + zlib.compress(_profile("rgb"))),
        (b"pHYs", struct.pack(">IIB", 11811, 11811, 1)),
    ]
    texts = [
        (b"eXIf", _exif_bytes()),
        (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + _PACKET),
        (b"zTXt", b"Comment\0\0" + zlib.compress(b"words " * 20)),
        (b"tEXt", b"parameters\0a house"),
        (b"tEXt", b'msbd\0{"seed": 1}'),
    ]
    iptc = "\niptc\n      40\n" + photoshop_of_iptc(_RECORDS).hex() + "\n"
    texts.append((b"zTXt", b"Raw profile type iptc\0\0" + zlib.compress(iptc.encode())))
    yield seed("RGB 8", draw.png(_levels(), chunks=[*numbers, *texts]))
    yield seed("RGB 8 interlaced", draw.png(_levels(), chunks=profiled, interlaced=True))
    yield seed("RGB 8 tRNS", draw.png(_levels(), chunks=[(b"cICP", b"\x0c\x0d\0\1")], transparent=bytes(6)))
    yield seed("RGB 16", draw.png(_levels(16), 16, chunks=[*profiled, *texts]))
    chromatic = [(b"gAMA", struct.pack(">I", 45455)), (b"cHRM", places)]
    yield seed("RGB 16 interlaced", draw.png(_levels(16), 16, chunks=chromatic, interlaced=True))
    yield seed(
        "RGB 16 tRNS", draw.png(_levels(16), 16, chunks=[(b"cICP", b"\x09\x10\0\1")], transparent=bytes(6))
    )
    grey = [(b"iCCP", b"icc\0\0" + zlib.compress(_profile("grey")))]
    yield seed("grey alpha 8", draw.png(_levels(8, 2), 8, draw.GREY_ALPHA, chunks=grey))
    yield seed("grey alpha 16", draw.png(_levels(16, 2), 16, draw.GREY_ALPHA, chunks=texts[:2]))
    yield seed("RGBA 8", draw.png(_levels(8, 4), 8, draw.RGBA, chunks=texts, interlaced=True))
    yield seed("RGBA 16", draw.png(_levels(16, 4), 16, draw.RGBA, chunks=numbers))
    flat = np.zeros((HEIGHT, WIDTH), np.uint8)
    flat[5:15, 8:30] = 1
    yield seed("mask", draw.png(flat, 1, draw.GREY))
    frames = _frames_of(_coloured())
    yield seed("animated", _saved(_coloured(), "PNG", save_all=True, append_images=frames, duration=100))


def _jpegs() -> Iterator[Seed]:
    def seed(name: str, picture: Image.Image, **options: Any) -> Seed:
        return Seed(f"JPEG {name}", ".jpg", _saved(picture, "JPEG", **options))

    about = {
        "exif": _exif(),
        "xmp": _PACKET,
        "icc_profile": _profile("rgb"),
        "comment": "words",
        "dpi": (300, 300),
    }
    plain = seed("with everything", _coloured(), **about)
    block = b"Photoshop 3.0\0" + photoshop_of_iptc(_RECORDS)
    at = 4 + struct.unpack(">H", plain.data[4:6])[0]
    segment = b"\xff\xed" + struct.pack(">H", len(block) + 2) + block
    yield Seed(plain.name, ".jpg", plain.data[:at] + segment + plain.data[at:])
    yield seed("baseline 4:2:0", _coloured(), quality=60)
    yield seed("4:4:4, restarts", _coloured(), subsampling=0, restart_marker_blocks=2)
    yield seed("progressive", _coloured(), progressive=True, exif=_exif(3))
    yield seed("grey", _coloured().convert("L"), icc_profile=_profile("grey"))
    yield seed("grey progressive", _coloured().convert("L"), progressive=True, optimize=True)
    yield seed("CMYK", _coloured().convert("CMYK"), icc_profile=_profile("cmyk"))
    yield seed("CMYK progressive", _coloured().convert("CMYK"), progressive=True)
    frames = _frames_of(_coloured())[:1]
    yield Seed("JPEG MPO", ".jpg", _saved(_coloured(), "MPO", save_all=True, append_images=frames))


def _webps() -> Iterator[Seed]:
    def seed(name: str, picture: Image.Image, **options: Any) -> Seed:
        return Seed(f"WebP {name}", ".webp", _saved(picture, "WEBP", **options))

    clear = Image.fromarray(_levels(8, 4))
    about = {"exif": _exif(), "xmp": _PACKET, "icc_profile": _profile("rgb")}
    yield seed("lossy", _coloured())
    yield seed("lossless", _coloured(), lossless=True)
    yield seed("lossless palette", _coloured().quantize(8).convert("RGB"), lossless=True)
    yield seed("with everything", clear, lossless=True, **about)
    yield seed("lossy alpha", clear, quality=50)
    yield seed("animated", clear, save_all=True, append_images=_frames_of(clear), duration=100)


def _gifs() -> Iterator[Seed]:
    def seed(name: str, picture: Image.Image, **options: Any) -> Seed:
        return Seed(f"GIF {name}", ".gif", _saved(picture, "GIF", **options))

    few = _coloured().quantize(16)
    yield seed("plain", few)
    yield seed("grey interlaced", _coloured().convert("L"), interlace=1, comment=b"words")
    yield seed("transparent", few, transparency=3)
    yield seed("animated", few, save_all=True, append_images=_frames_of(few), duration=100, loop=0)


def _bmp(bits: int, rows: bytes, compression: int = 0, between: bytes = b"") -> bytes:
    """A BMP with a header of 40 bytes; `between` it and `rows` stand masks or a palette."""
    head = struct.pack("<IiiHHIIiiII", 40, WIDTH, HEIGHT, 1, bits, compression, len(rows), 2835, 2835, 0, 0)
    at = 14 + len(head) + len(between)
    return b"BM" + struct.pack("<IHHI", at + len(rows), 0, 0, at) + head + between + rows


def _bmps() -> Iterator[Seed]:
    def seed(name: str, data: bytes) -> Seed:
        return Seed(f"BMP {name}", ".bmp", data)

    for mode in ("1", "L", "P", "RGB", "RGBA"):
        picture = Image.fromarray(_levels(8, 4)) if mode == "RGBA" else _coloured().convert(mode)
        yield seed(mode, _saved(picture, "BMP"))
    palette = np.pad(_levels(8, 3, 1, 16)[0], ((0, 0), (0, 1))).tobytes()
    nibbles = draw.packed(_levels(4, 1)[..., 0], 4)
    yield seed("4", _bmp(4, b"".join(row.ljust(20, b"\0") for row in nibbles), between=palette))
    words = draw.packed(_levels(16, 1)[..., 0], 16, "<")
    yield seed(
        "565", _bmp(16, b"".join(row + b"\0\0" for row in words), 3, struct.pack("<III", 63488, 2016, 31))
    )
    runs = b"".join(bytes([20, row % 7, 17, row % 5, 0, 0]) for row in range(HEIGHT)) + b"\0\1"
    yield seed("RLE8", _bmp(8, runs, 1, palette * 16))
    yield seed("RLE4", _bmp(4, runs, 2, palette))


def _tiffs() -> Iterator[Seed]:
    import tifffile

    def seed(name: str, data: bytes, *, photo: bool = True) -> Seed:
        return Seed(f"TIFF {name}", ".tif", data, photo)

    def packed(name: str, samples: np.ndarray, *, photo: bool = True, **options: Any) -> Seed:
        file = io.BytesIO()
        tifffile.imwrite(file, samples, metadata=None, software=None, **options)
        return seed(name, file.getvalue(), photo=photo)

    for bits in (1, 2, 4, 8, 10, 12, 14, 16):
        yield seed(
            f"grey {bits}", draw.tiff(_levels(bits, 1), bits, draw.BLACK_IS_ZERO, deflated=bits in (4, 16))
        )
    profile = {34675: (7, _profile("rgb"), len(_profile("rgb")))}
    xmp = {700: (1, _PACKET, len(_PACKET)), 274: (3, struct.pack("<H", 8), 1)}
    yield seed("RGB 8", draw.tiff(_levels(), tags=profile | xmp, rows_a_strip=7))
    yield seed("RGB 16 planes", draw.tiff(_levels(16), 16, planar=True, deflated=True, order=">"))
    yield seed("RGB 12", draw.tiff(_levels(12), 12))
    yield seed("RGB 10 planes", draw.tiff(_levels(10), 10, planar=True))
    yield seed("RGBA 8", draw.tiff(_levels(8, 4), extra=1, rows_a_strip=7))
    yield seed("RGBA 16", draw.tiff(_levels(16, 4), 16, extra=2, order=">"))
    yield seed("white is zero", draw.tiff(_levels(8, 1), 8, draw.WHITE_IS_ZERO))
    palette = struct.pack("<768H", *range(0, 768 * 80, 80))
    yield seed("palette", draw.tiff(_levels(8, 1), 8, draw.TIFF_PALETTE, tags={320: (3, palette, 768)}))
    inks = {34675: (7, _profile("cmyk"), len(_profile("cmyk")))}
    yield seed("CMYK", draw.tiff(_levels(8, 4), 8, draw.SEPARATED, tags=inks))
    yield seed("Lab", draw.tiff(_levels(), 8, draw.LAB))
    floats = _levels(16).astype(np.float32) / 65535
    yield seed("floats", draw.tiff(floats.view(np.uint32), 32, sample_format=3), photo=False)
    for name, mode, options in (
        ("LZW", "RGB", {"compression": "tiff_lzw", "exif": _exif(), "dpi": (300, 300)}),
        ("packbits", "RGB", {"compression": "packbits"}),
        ("JPEG", "RGB", {"compression": "jpeg", "icc_profile": _profile("rgb")}),
        ("YCbCr", "YCbCr", {}),
        ("G4", "1", {"compression": "group4"}),
        ("G3", "1", {"compression": "group3"}),
        ("pages", "L", {"save_all": True, "append_images": [_coloured().convert("L")]}),
    ):
        yield seed(name, _saved(_coloured().convert(mode), "TIFF", **options))
    yield packed("tiles", _levels(), tile=(16, 16), compression="zlib", predictor=True, photometric="rgb")
    yield packed("JPEG tiles", _levels(), tile=(16, 16), compression="jpeg", photometric="rgb")
    yield packed("16 LZW", _levels(16), compression="lzw", photometric="rgb", byteorder=">")
    yield packed("big", _levels(8, 1)[..., 0], bigtiff=True)
    yield packed("zstd", _levels(), compression="zstd", photometric="rgb")


def _avifs() -> Iterator[Seed]:
    import pyvips

    def seed(name: str, data: bytes) -> Seed:
        return Seed(f"AVIF {name}", ".avif", data)

    about = {"exif": _exif(), "xmp": _PACKET, "icc_profile": _profile("rgb")}
    yield seed("RGB", _saved(_coloured(), "AVIF", **about))
    yield seed("RGBA", _saved(Image.fromarray(_levels(8, 4)), "AVIF"))
    yield seed("grey", _saved(_coloured().convert("L"), "AVIF"))
    yield seed("animated", _saved(_coloured(), "AVIF", save_all=True, append_images=_frames_of(_coloured())))
    deep: Any = pyvips.Image.new_from_array(_levels(16))
    deep = deep.copy(interpretation="rgb16")
    yield seed("RGB 10", deep.heifsave_buffer(compression="av1", bitdepth=10, Q=60, effort=1))


# ---- how it is damaged -------------------------------------------------------------------------------------

Damage = Callable[[random.Random, bytearray, Seed], bytearray]


def damaged(seed: int, number: int) -> tuple[Seed, bytes]:
    """Input `number` of `seed`: a picture, and its data after some kinds of damage."""
    chance = random.Random(f"{seed}/{number}")
    source = chance.choice(seeds())
    data = bytearray(source.data)
    for _ in range(chance.choice((1, 1, 1, 2, 2, 3, 4, 6))):
        if data:
            data = chance.choice(_DAMAGES)(chance, data, source)
    if source.suffix == ".png" and chance.random() < 0.7:
        data = _with_right_checksums(data)
    return source, bytes(data)


def _splice(chance: random.Random, data: bytearray, source: Seed) -> bytearray:
    """The start of this one and the end of another of its format."""
    other = chance.choice([one for one in seeds() if one.suffix == source.suffix]).data
    at = damage.place(chance, data)
    return data[:at] + other[at if chance.random() < 0.5 else chance.randrange(len(other)) :]


def _resize(chance: random.Random, data: bytearray, source: Seed) -> bytearray:
    """Another width or height wherever the file says it, up to the greatest that a format holds."""
    sides = [(side, _claimed(chance, side)) for side in (WIDTH, HEIGHT)]
    if source.suffix == ".webp":
        _resize_lossless(data, sides)
        pairs = [
            ((old - 1).to_bytes(3, "little"), (new - 1 & 0xFFFFFF).to_bytes(3, "little"))
            for old, new in sides
        ]
        pairs += [(struct.pack("<H", old), struct.pack("<H", new & 16383)) for old, new in sides]
    else:
        order = {".png": ">I", ".jpg": ">H", ".gif": "<H", ".bmp": "<I", ".avif": ">I"}.get(source.suffix)
        order = order or chance.choice(("<H", ">H", "<I", ">I"))
        most = 0xFFFF if order[1] == "H" else 0xFFFFFFFF
        pairs = [(struct.pack(order, old), struct.pack(order, new & most)) for old, new in sides]
    for old, new in pairs:
        data = data.replace(old, new)
    return data


def _resize_lossless(data: bytearray, sides: list[tuple[int, int]]) -> None:
    """In a lossless WebP: 14 bits each, less one, behind the chunk's head and a byte."""
    at = data.find(b"VP8L") + 9
    if at > 9 and at + 4 <= len(data):
        packed, below = struct.unpack_from("<I", data, at)[0], 2**28 - 1
        (_, width), (_, height) = sides
        if packed & below == WIDTH - 1 | HEIGHT - 1 << 14:
            new = (width - 1 & 16383) | (height - 1 & 16383) << 14
            struct.pack_into("<I", data, at, packed & ~below | new)


def _claimed(chance: random.Random, side: int) -> int:
    if chance.random() < 0.3:
        return side
    return chance.choice((int(2 ** chance.uniform(0, 17)), chance.choice(damage.LARGE_NUMBERS)))


_DAMAGES: tuple[Damage, ...] = (
    damage.flip, damage.flip, damage.substitute, damage.substitute, damage.extreme, damage.extreme, damage.extreme,
    damage.delete, damage.insert, damage.truncate, damage.duplicate, damage.overwrite, _splice, _resize, _resize,
)  # fmt: skip


def _with_right_checksums(data: bytearray) -> bytearray:
    """A PNG whose chunks, as far as their lengths lead, have the checksums of what they hold."""
    for at, end, _ in chunk_places(bytes(data)):
        if end > len(data):
            break
        struct.pack_into(">I", data, end - 4, zlib.crc32(data[at + 4 : end - 4]))
    return data


# ---- one input ---------------------------------------------------------------------------------------------


@dataclass
class Result:
    """What became of one input."""

    number: int
    read: bool = False
    pixels: int = 0  # of what was read
    seconds: float = 0  # of the processor
    memory: int = 0  # bytes on top of what the process had
    peak: int = 0  # bytes of the process
    faults: list[str] = field(default_factory=list)


def feed(data: bytes, chance: random.Random, scratch: Path) -> Result:
    """Read, show and write the picture `data`, or sometimes read it as a mask; `scratch` is a folder."""
    result = Result(0)
    if chance.random() < 0.15:
        clear = chance.random() < 0.3
        what = "as a mask"
        mask = _tried(result, what, lambda: read_mask(io.BytesIO(data), from_alpha=clear), may_refuse=True)
        result.read, result.pixels = mask is not None, 0 if mask is None else mask.mask.numel()
        return result
    photo = _tried(result, "reading", lambda: load_image(io.BytesIO(data)), may_refuse=True)
    if photo is not None:
        result.read, result.pixels = True, photo.size[0] * photo.size[1]
        if result.pixels <= LARGE:
            _use(result, photo, chance, scratch)
    return result


def _use(result: Result, photo: Photo, chance: random.Random, scratch: Path) -> None:
    shown = _tried(result, "its colours", lambda: photo.pixels)
    if shown is not None and (shown.shape != (*photo.size, 3) or shown.dtype != np.uint8):
        result.faults.append(f"its colours: {shown.dtype} {shown.shape}")
    if chance.random() < 0.25:
        _tried(result, "its tensor", lambda: photo.image)
    ours = {"prompt": "a house", "seed": 1} if chance.random() < 0.5 else None
    word = "algorithmicallyEnhanced" if ours else None
    output = Output(
        photo.samples, photo.alpha, photo.icc_profile, photo.colour_chunks, photo.metadata, ours, word
    )
    suffixes = [".png"] + ([chance.choice((".webp", ".tif", ".jpg"))] if chance.random() < 0.4 else [])
    for suffix in suffixes:
        if (
            suffix == ".jpg"
            and photo.alpha is not None
            or suffix in (".jpg", ".webp")
            and max(photo.size) > 16383
        ):
            continue
        written = _tried(result, f"writing {suffix}", lambda name=suffix: encode(output, name)[0])
        if written is not None and chance.random() < 0.3:
            again = _tried(
                result, f"reading the {suffix} written", lambda file=written: load_image(io.BytesIO(file))
            )
            if again is not None and suffix in (".png", ".tif") and not _equal(photo, again):
                result.faults.append(f"another picture in the {suffix} written")
    if chance.random() < 0.02:
        _tried(result, "saving", lambda: save_photo(photo, scratch / "a.png", ours=ours, source_type=word))


def _equal(one: Photo, other: Photo) -> bool:
    if (one.alpha is None) != (other.alpha is None) or not np.array_equal(one.samples, other.samples):
        return False
    return one.alpha is None or other.alpha is None or np.array_equal(one.alpha, other.alpha)


def _tried(result: Result, what: str, call: Callable[[], Any], *, may_refuse: bool = False) -> Any:
    """What `call` gives, or None; a fault for an exception that it may not raise."""
    try:
        return call()
    except (ValueError, ImportError) as error:
        if not may_refuse:
            result.faults.append(f"{what}: {_told(error)}")
        elif len(lines := str(error).splitlines()) != 1:
            result.faults.append(f"{what}: a text of {len(lines)} lines: {str(error)[:200]!r}")
    except Exception as error:
        result.faults.append(f"{what}: {_told(error)}")
    return None


def _told(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "msbd" in Path(frame.filename).parts]
    where = " < ".join(f"{Path(one.filename).name}:{one.lineno}" for one in (frames[-1], *ours[-1:]))
    return f"{type(error).__name__} at {where}: {str(error)[:200]}"


# ---- the process that is fed -------------------------------------------------------------------------------


def serve(seed: int, first: int, end: int) -> None:
    """Feed inputs `first` to `end` and write a line of JSON for each, in order; what libraries print goes to
    the standard error stream.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    faulthandler.enable()
    with tempfile.TemporaryDirectory() as folder:
        for source in seeds():  # what is imported and loaded once, no input pays for
            result = feed(source.data, random.Random(2), Path(folder))  # 2: not as a mask
            if result.faults or result.read != source.photo:
                raise ValueError(f"{source.name}: {result.faults or 'not as expected, undamaged'}")
            if source.photo and load_image(io.BytesIO(source.data)).pixels.std() < 10:
                raise ValueError(f"{source.name}: read, but not its pixels")
        limit_addresses()
        for number in range(first, end):
            source, data = damaged(seed, number)
            before, started = memory(forget=True)[0], time.process_time()
            signal.setitimer(signal.ITIMER_PROF, DEADLINE)  # at its end the process ends
            result = feed(data, random.Random(f"{seed}/{number}/use"), Path(folder))
            signal.setitimer(signal.ITIMER_PROF, 0)
            result.number, result.seconds = number, time.process_time() - started
            result.peak = memory()[1]
            result.memory = result.peak - before
            webp = source.suffix == ".webp"
            seconds, most = (WEBP_SECONDS, WEBP_MEMORY) if webp else (MOST_SECONDS, MOST_MEMORY)
            if result.seconds > seconds + result.pixels / PIXELS_A_SECOND:
                result.faults.append(f"too slow, {source.suffix}")
            if result.memory > most + result.pixels * BYTES_A_PIXEL:
                result.faults.append(f"too much memory, {source.suffix}")
            answers.write(json.dumps(vars(result)) + "\n")
            answers.flush()


# ---- the command -------------------------------------------------------------------------------------------


@dataclass
class Report:
    """What became of all inputs."""

    tried: int = 0
    read: int = 0
    slowest: tuple[float, int] = (0.0, -1)  # seconds of the processor, and which input
    peak: int = 0  # bytes
    peak_of: int = -1
    faults: list[tuple[int, str]] = field(default_factory=list)  # which input, and what
    kinds: Counter[tuple[str, bool]] = field(default_factory=Counter)  # suffix, whether read
    words: Counter[str] = field(default_factory=Counter)  # that libraries printed, numbers as #

    def add(self, result: Result, suffix: str) -> None:
        self.tried += 1
        self.read += result.read
        self.kinds[suffix, result.read] += 1
        self.slowest = max(self.slowest, (result.seconds, result.number))
        if result.peak > self.peak:
            self.peak, self.peak_of = result.peak, result.number
        self.faults += [(result.number, fault) for fault in result.faults]


def run(
    count: int,
    seed: int,
    seconds: float | None = None,
    keep: Path | None = None,
    first: int = 0,
    tell: Callable[[Report], None] | None = None,
) -> Report:
    """Feed inputs `first` to `count` of `seed`, for `seconds` at most; faulty ones go into folder `keep`.

    `tell` is called with what is known after each process.
    """
    report = Report()
    until = None if seconds is None else time.monotonic() + seconds
    number = first
    while number < count and (until is None or time.monotonic() < until):
        number = _one_process(report, seed, number, min(count, number + CHUNK), until)
        if tell is not None:
            tell(report)
    if keep is not None and report.faults:
        keep.mkdir(parents=True, exist_ok=True)
        for faulty in {number for number, _ in report.faults}:
            source, data = damaged(seed, faulty)
            (keep / f"{seed}-{faulty}{source.suffix}").write_bytes(data)
    return report


def _one_process(report: Report, seed: int, first: int, end: int, until: float | None) -> int:
    """Feed a process from input `first` on; where the next one has to go on."""

    def answered(line: bytes) -> int:
        result = Result(**json.loads(line))
        report.add(result, _source(seed, result.number)[0].suffix)
        return result.number

    module = __spec__.name if __spec__ else "tests.helpers.fuzz_pictures"
    number, why = feed_process(module, seed, first, end, until, answered, report.words)
    if why:
        report.faults.append((number - 1, why))
        report.tried += 1
    return number


def _source(seed: int, number: int) -> tuple[Seed, random.Random]:
    """Of which picture input `number` was made."""
    chance = random.Random(f"{seed}/{number}")
    return chance.choice(seeds()), chance


def main() -> int:
    """The command; 1 where there were faults."""
    parser = argparse.ArgumentParser(
        description="Feed damaged pictures to the readers and writers of msbd/pixels."
    )
    parser.add_argument("--count", type=int, default=10_000, help="inputs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, metavar="I", help="the input to begin with")
    parser.add_argument("--seconds", type=float, help="stop after these")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where faulty inputs go")
    parser.add_argument("--serve", type=int, nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(given.seed, *given.serve)
        return 0
    started = time.monotonic()
    report = run(given.count, given.seed, given.seconds, given.keep, given.first, _tell)
    print_report(report, given.seed, time.monotonic() - started)
    return 1 if report.faults else 0


def _tell(report: Report) -> None:
    last = ", the last of input {}: {}".format(*report.faults[-1]) if report.faults else ""
    print(f"{report.tried:,} inputs, {len(report.faults)} faults{last}", file=sys.stderr, flush=True)


def print_report(report: Report, seed: int, seconds: float) -> None:
    """The figures of a run that took `seconds`."""
    import PIL
    import pyvips

    libvips = ".".join(str(pyvips.version(place)) for place in range(3))
    print(
        f"{os.cpu_count()} processors, Python {sys.version.split()[0]}, Pillow {PIL.__version__}, libvips {libvips}"
    )
    print(
        f"{report.tried:,} inputs of seed {seed} in {seconds:,.0f} s ({report.tried / seconds:.0f} a second)"
    )
    print(
        f"{report.read:,} read, {report.tried - report.read:,} refused or faulty; of {len(seeds())} pictures"
    )
    for suffix in dict.fromkeys(one.suffix for one in seeds()):
        read, refused = report.kinds[suffix, True], report.kinds[suffix, False]
        print(f"  {suffix:6} {read:8,} read {refused:8,} refused")
    print(f"slowest: {report.slowest[0] * 1000:,.0f} ms of the processor, input {report.slowest[1]}")
    print(f"most memory: {report.peak / 2**20:,.0f} MB, input {report.peak_of}")
    print(f"lines that libraries printed: {report.words.total()}")
    for line, count in report.words.most_common(10):
        print(f"  {count:6} x {line}")
    print(f"faults: {len(report.faults)}")
    classes: dict[str, list[int]] = {}
    for number, fault in report.faults:
        classes.setdefault(fault[:110], []).append(number)
    for fault, numbers in sorted(classes.items(), key=lambda item: -len(item[1])):
        print(f"  {len(numbers):6} x {fault}  (input {numbers[0]})")


if __name__ == "__main__":
    sys.exit(main())
