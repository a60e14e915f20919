"""Picture files drawn sample by sample, at any depth, without a picture library: PNG and TIFF.

What libraries cannot write (12 bits a sample, planes apart, white as zero, transparency by tRNS below 8 bits)
is what readers get wrong; here the right samples are known, since they were put there.
"""

import struct
import zlib
from collections.abc import Iterable, Mapping

import numpy as np

GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6  # colour types of PNG
CHANNELS = {GREY: 1, RGB: 3, PALETTE: 1, GREY_ALPHA: 2, RGBA: 4}
# The seven passes of Adam7: first row, first column, row step, column step (PNG, third edition, 8.2).
ADAM7 = (
    (0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1),
)  # fmt: skip


def packed(samples: np.ndarray, bits: int, order: str = ">") -> list[bytes]:
    """Rows of `samples` (H, N), unsigned below 2**bits, as bytes: high bits first, each row from a new
    byte.
    """
    if bits in (8, 16, 32):
        return [row.tobytes() for row in samples.astype(f"{order}u{bits // 8}")]
    shifts = np.arange(bits - 1, -1, -1)
    digits = (samples.astype(np.int64)[..., None] >> shifts & 1).astype(np.uint8)
    return [row.tobytes() for row in np.packbits(digits.reshape(len(samples), -1), axis=1)]


def chunk(name: bytes, data: bytes) -> bytes:
    """A chunk of a PNG: length, name, data, checksum."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(
    samples: np.ndarray,
    bits: int = 8,
    colour: int = RGB,
    *,
    chunks: Iterable[tuple[bytes, bytes]] = (),
    palette: np.ndarray | None = None,
    transparent: bytes | None = None,
    interlaced: bool = False,
) -> bytes:
    """A PNG of `samples` (H, W) or (H, W, C), unsigned; `palette` (N, 3) uint8; `transparent` is tRNS's data.

    `chunks` stand before the pixels, and before the palette.
    """
    samples = samples[..., None] if samples.ndim == 2 else samples
    height, width, channels = samples.shape
    assert channels == CHANNELS[colour]
    passes = ADAM7 if interlaced else ((0, 0, 1, 1),)
    rows = b""
    for top, left, down, right in passes:
        part = samples[top::down, left::right]
        if part.size:
            rows += b"".join(b"\0" + row for row in packed(part.reshape(len(part), -1), bits))
    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, int(interlaced)))]
    parts += [chunk(*one) for one in chunks]
    parts += [chunk(b"PLTE", palette.astype(np.uint8).tobytes())] if palette is not None else []
    parts += [chunk(b"tRNS", transparent)] if transparent is not None else []
    return b"\x89PNG\r\n\x1a\n" + b"".join([*parts, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")])


WHITE_IS_ZERO, BLACK_IS_ZERO, TIFF_RGB, TIFF_PALETTE, SEPARATED, YCBCR, LAB, ICC_LAB = 0, 1, 2, 3, 5, 6, 8, 9
DEFLATE = 8


def tiff(
    samples: np.ndarray,
    bits: int = 8,
    photometric: int = TIFF_RGB,
    *,
    planar: bool = False,
    deflated: bool = False,
    order: str = "<",
    extra: int | None = None,
    sample_format: int = 1,
    tags: Mapping[int, tuple[int, bytes, int]] | None = None,
    rows_a_strip: int | None = None,
) -> bytes:
    """A TIFF of `samples` (H, W) or (H, W, C); signed ones (`sample_format` 2) as their two's complement,
    floats (3) as their bits.

    `extra`: ExtraSamples of the last channel (1 associated, 2 plain alpha). `tags`: number -> type, data,
    count.
    """
    samples = samples[..., None] if samples.ndim == 2 else samples
    height, width, channels = samples.shape
    planes = [samples[..., c] for c in range(channels)] if planar else [samples.reshape(height, -1)]
    step = rows_a_strip or height
    pack = zlib.compress if deflated else bytes
    strips = [
        pack(b"".join(packed(plane[top : top + step], bits, order)))
        for plane in planes
        for top in range(0, height, step)
    ]

    def words(*numbers: int) -> tuple[int, bytes, int]:
        return 3, struct.pack(f"{order}{len(numbers)}H", *numbers), len(numbers)

    def longs(numbers: list[int]) -> tuple[int, bytes, int]:
        return 4, struct.pack(f"{order}{len(numbers)}I", *numbers), len(numbers)

    offsets = list(np.cumsum([8] + [len(strip) for strip in strips[:-1]]))
    entries = {
        256: longs([width]), 257: longs([height]), 258: words(*[bits] * channels),
        259: words(DEFLATE if deflated else 1), 262: words(photometric), 273: longs(offsets),
        277: words(channels), 278: longs([step]), 279: longs([len(strip) for strip in strips]),
        284: words(2 if planar else 1), 339: words(*[sample_format] * channels),
    }  # fmt: skip
    entries |= {338: words(extra)} if extra is not None else {}
    entries |= dict(tags or {})
    body = b"".join(strips)
    body += b"\0" * (len(body) % 2)
    start = 8 + len(body)
    far = start + 2 + 12 * len(entries) + 4
    directory, behind = struct.pack(f"{order}H", len(entries)), b""
    for number, (kind, data, count) in sorted(entries.items()):
        place = data.ljust(4, b"\0")
        if len(data) > 4:
            place = struct.pack(f"{order}I", far + len(behind))
            behind += data + b"\0" * (len(data) % 2)
        directory += struct.pack(f"{order}HHI", number, kind, count) + place
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return mark + struct.pack(f"{order}I", start) + body + directory + b"\0\0\0\0" + behind
