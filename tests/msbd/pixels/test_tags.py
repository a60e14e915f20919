"""Tags read and written again: the same types, the same bytes, whatever the order; as Pillow and tifffile see
them.
"""

import io
import struct
from typing import Literal

import numpy as np
import pytest
import tifffile
from PIL import Image

from msbd.pixels.encode import Output, encode
from msbd.pixels.metadata import Metadata
from msbd.pixels.tags import EXIF_POINTER, GPS_POINTER, MAKER_NOTE, USER_COMMENT, Tags, Value

ORDERS = pytest.mark.parametrize("order", ["<", ">"])


def everything(order: str) -> Tags:
    """A value of every type in each directory."""
    numbers = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 11: "f", 12: "d"}
    values = {kind: Value(kind, struct.pack(f"{order}3{code}", 1, 2, 3)) for kind, code in numbers.items()}
    values |= {2: Value(2, "für\0".encode()), 7: Value(7, bytes(range(7))), 129: Value(129, "für\0".encode())}
    values |= {
        5: Value(5, struct.pack(order + "4I", 1, 3, 0, 0)),
        10: Value(10, struct.pack(order + "2i", -1, 3)),
    }
    some = {0x9400 + kind: value for kind, value in values.items()}
    note = Value(7, b"a camera's own words, longer than four bytes")
    made = Tags.of(b"II*\0" if order == "<" else b"MM\0*")
    assert made.order == order and not made
    made.main.update(some)
    made.exif.update(some | {MAKER_NOTE: note})
    made.gps.update(some)
    made.interop.update({1: Value(2, b"R98\0")})
    return made


@ORDERS
def test_every_value_comes_back_with_its_type_and_bytes(order: str) -> None:
    tags = everything(order)
    read = Tags.of(tags.to_bytes())
    pointers = {EXIF_POINTER, GPS_POINTER}
    assert read.order == order
    assert {number: value for number, value in read.main.items() if number not in pointers} == tags.main
    assert {number: value for number, value in read.exif.items() if number != 0xA005} == tags.exif
    assert read.gps == tags.gps and read.interop == tags.interop
    assert read.kept().to_bytes() == Tags.of(read.kept().to_bytes()).kept().to_bytes()  # nothing grows
    assert Tags.of(b"Exif\0\0" + tags.to_bytes()).main == read.main


@ORDERS
def test_pillow_reads_what_is_written(order: str) -> None:
    exif = Image.Exif()
    exif.load(everything(order).to_bytes())
    assert exif[0x9403] == (1, 2, 3) and exif.get_ifd(0x8769)[0x9404] == (1, 2, 3)
    assert exif.get_ifd(0x8825)[0x940A] == pytest.approx(-1 / 3) and exif.get_ifd(0x8769)[0x940C] == (1, 2, 3)


@ORDERS
@pytest.mark.parametrize("longer", [0, 5000])
def test_a_makers_note_stays_where_it_was(order: str, longer: int) -> None:
    """Many hold offsets into the file, which nobody but their maker can change."""
    tags = Tags.of(everything(order).to_bytes())
    note = tags.exif[MAKER_NOTE].data
    assert tags.to_bytes()[tags.note_at :].startswith(note)
    tags.main[270] = Value(2, b"x" * longer + b"\0")
    tags.exif[USER_COMMENT] = Value(7, b"ASCII\0\0\0" + b"y" * longer)
    made = tags.to_bytes()
    assert made[tags.note_at :].startswith(note) and Tags.of(made).exif[MAKER_NOTE].data == note
    assert (
        Tags.of(made).main[270] == tags.main[270]
        and Tags.of(made).exif[USER_COMMENT] == tags.exif[USER_COMMENT]
    )
    assert tags.kept().to_bytes()[tags.note_at :].startswith(note)


@ORDERS
@pytest.mark.parametrize("big", [False, True])
def test_the_tags_of_a_tiff_as_tifffile_writes_them(order: Literal["<", ">"], big: bool) -> None:
    file = io.BytesIO()
    pixels = np.zeros((300, 5, 3), np.uint16)
    tifffile.imwrite(
        file, pixels, byteorder=order, bigtiff=big, rowsperstrip=7, photometric="rgb", description="words",
        resolution=(300, 150), metadata=None,
    )  # fmt: skip
    tags = Tags.of(file.getvalue())
    assert (tags.bits, tags.samples, tags.photometric, tags.planar) == (16, 3, 2, False)
    assert len(tags.numbers(273)) == 43 and tags.raw(270) == b"words\0"
    assert tags.numbers(282) == (300.0,) and (tags.get(257), tags.get(256)) == (300, 5)
    kept = tags.kept()
    assert 273 not in kept.main and 270 in kept.main
    assert all(value.type not in (16, 17, 18) for value in kept.main.values())


def test_damage_costs_the_damaged_tags_alone() -> None:
    good = everything("<").to_bytes()
    assert (
        not Tags.of(b"")
        and not Tags.of(b"II")
        and not Tags.of(b"II*\0\xff\xff\xff\xff")
        and not Tags.of(good[4:])
    )
    for end in range(0, len(good), 7):
        Tags.of(good[:end]).kept().to_bytes()
    endless = struct.pack("<2sHIH", b"II", 42, 8, 1) + struct.pack("<HHII", EXIF_POINTER, 4, 1, 8) + bytes(4)
    assert not Tags.of(endless).exif
    same = struct.pack("<HHII", 700, 7, 1 << 20, 0)  # 65,535 tags of the same megabyte
    many = b"".join(same[:0] + struct.pack("<H", number) + same[2:] for number in range(65535))
    bomb = struct.pack("<2sHIH", b"II", 42, 8, 65535) + many + bytes(1 << 20)
    assert len(Tags.of(bomb).main) < 10


@pytest.mark.parametrize("bits", [8, 16])
@ORDERS
def test_a_tiff_keeps_the_order_of_its_exif(order: str, bits: int) -> None:
    samples = np.random.default_rng(0).integers(0, 2**bits, (40, 30, 3)).astype(f"uint{bits}")
    output = Output(samples, metadata=Metadata(exif=everything(order).kept().to_bytes(), dpi=(300, 300)))
    data, notes = encode(output, ".tif")
    assert data[:2] == (b"II" if order == "<" else b"MM") and not notes
    assert np.array_equal(tifffile.imread(io.BytesIO(data)), samples)
    assert Tags.of(data).exif[MAKER_NOTE] == everything(order).exif[MAKER_NOTE] and Tags.of(data).dpi == (
        300,
        300,
    )
