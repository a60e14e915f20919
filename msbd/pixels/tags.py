"""The tags of a TIFF, as EXIF has them too: read, changed, and written again.

Sources  TIFF 6.0, section 2; BigTIFF; EXIF 3.0, 4.6.3 (tags that lead to further directories)
Copying  this file stands alone: the standard library only

Values stay the bytes that they are, of their type and in their byte order, and a maker's note stays at its
place: what a camera wrote there only its maker can read. Damaged entries are left out.
"""

import math
import struct
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal

WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, SAMPLES = 256, 257, 258, 259, 262, 277
DESCRIPTION, PLANAR, EXTRA, XMP, IPTC, ICC = 270, 284, 338, 700, 33723, 34675
ORIENTATION, X_RESOLUTION, Y_RESOLUTION, RESOLUTION_UNIT = 274, 282, 283, 296
USER_COMMENT, MAKER_NOTE = 0x9286, 0x927C  # these and the next two stand in the EXIF directory
WIDTH_AND_HEIGHT = (0xA002, 0xA003)  # of the picture
EXIF_POINTER, GPS_POINTER, INTEROP_POINTER = 0x8769, 0x8825, 0xA005

BYTE, ASCII, SHORT, LONG, RATIONAL, UNDEFINED = 1, 2, 3, 4, 5, 7
_NUMBERS = {
    1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 11: "f", 12: "d", 13: "I", 16: "Q", 17: "q", 18: "Q",
}  # fmt: skip
_SIZES = {kind: struct.calcsize(code) for kind, code in _NUMBERS.items()} | {2: 1, 5: 8, 7: 1, 10: 8, 129: 1}
_BIG_TYPES = (16, 17, 18)  # of BigTIFF alone
# Of tags that say how pixels are stored, which the writer decides, and of what is kept elsewhere.
_STRUCTURE = {
    *range(254, 260), 262, 263, 264, 265, 266, 273, 277, 278, 279, 280, 281, 284, 288, 289, 290, 291, 292, 293, 297,
    301, 317, 318, 319, 320, 321, 322, 323, 324, 325, 326, 327, 328, 330, 332, 333, 334, 336, 337, 338, 339, 340,
    341, 342, 347, *range(512, 522), 529, 530, 531, 532, 34675, 33723, 34377, 700, 37724, 50706, 50707, 50708, 50838, 50839,
}  # fmt: skip
_OF_PIXELS = b"ImageJ=", b'{"shape"', b"<OME "  # descriptions of the stack that a file was
_FARTHEST_NOTE = 1 << 16  # bytes into a file at which a maker's note keeps its place


@dataclass(frozen=True)
class Value:
    """A tag's values, as they stand in the file."""

    type: int  # TIFF's number
    data: bytes


Directory = dict[int, Value]


@dataclass(frozen=True)
class Tags:
    """The first directory of a TIFF or of EXIF, and those below it; to be changed in place."""

    order: Literal["<", ">"] = "<"  # of bytes: "<" little-endian, ">" big-endian
    main: Directory = field(default_factory=dict)
    exif: Directory = field(default_factory=dict)
    gps: Directory = field(default_factory=dict)
    interop: Directory = field(default_factory=dict)
    note_at: int = 0  # where the maker's note stood in the file; 0 for nowhere

    @staticmethod
    def of(data: bytes) -> "Tags":
        """Of a TIFF, a BigTIFF, or EXIF, also behind its mark; of other data none."""
        data = data[data.find(b"Exif\0\0", 0, 16) + 6 :] if b"Exif\0\0" in data[:16] else data
        order = "<" if data[:2] == b"II" else ">"
        mark = data[2:4].strip(b"\0")
        if data[:2] not in (b"II", b"MM") or mark not in (b"*", b"+"):
            return Tags()
        reader = _Reader(data, order, big=mark == b"+")
        main = reader.directory(reader.number(8, 8) if reader.big else reader.number(4, 4))
        reader.places.clear()
        exif = reader.below(main, EXIF_POINTER)
        note_at = reader.places.get(MAKER_NOTE, 0)
        return Tags(
            order, main, exif, reader.below(main, GPS_POINTER), reader.below(exif, INTEROP_POINTER),
            note_at if 8 <= note_at < _FARTHEST_NOTE else 0,
        )  # fmt: skip

    def kept(self) -> "Tags":
        """Those that another file of the same picture, upright, may have: none that say how its pixels are
        stored, and no thumbnail.
        """
        pointers = (EXIF_POINTER, GPS_POINTER, INTEROP_POINTER)

        def of(directory: Directory, without: set[int]) -> Directory:
            without |= {number for number, value in directory.items() if value.type in _BIG_TYPES}
            return {
                number: value for number, value in directory.items() if number not in without | {*pointers}
            }

        main = of(self.main, {*_STRUCTURE})
        if any(mark in main.get(DESCRIPTION, Value(ASCII, b"")).data for mark in _OF_PIXELS):
            del main[DESCRIPTION]
        if ORIENTATION in main:
            main[ORIENTATION] = self.value(SHORT, 1)
        exif, gps, interop = (of(one, set()) for one in (self.exif, self.gps, self.interop))
        return Tags(self.order, main, exif, gps, interop, self.note_at)

    def __bool__(self) -> bool:
        return any((self.main, self.exif, self.gps, self.interop))

    # ---- values --------------------------------------------------------------------------------------------

    def value(self, kind: int, *numbers: float) -> Value:
        """`numbers` as a value of that type; of ratios those up to a million."""
        if kind != RATIONAL:
            return Value(kind, struct.pack(f"{self.order}{len(numbers)}{_NUMBERS[kind]}", *numbers))
        ratios = [Fraction(min(number, 1e6)).limit_denominator(4000) for number in numbers]
        parts = [part for ratio in ratios for part in (ratio.numerator, ratio.denominator)]
        return Value(kind, struct.pack(f"{self.order}{len(parts)}I", *parts))

    def numbers(self, number: int) -> tuple[float, ...]:
        """The values of a tag of the main directory; none where it is missing, or holds no numbers."""
        value = self.main.get(number)
        if value is None:
            return ()
        if value.type in (5, 10):
            parts = struct.unpack(
                f"{self.order}{len(value.data) // 4}{'I' if value.type == 5 else 'i'}", value.data
            )
            return tuple(a / b if b else math.nan for a, b in zip(parts[::2], parts[1::2], strict=True))
        if (code := _NUMBERS.get(value.type)) is None:
            return ()
        return struct.unpack(f"{self.order}{len(value.data) // _SIZES[value.type]}{code}", value.data)

    def get(self, number: int, default: Any = None) -> Any:
        """A number of the main directory; of several the first."""
        return next(iter(self.numbers(number)), default)

    def raw(self, number: int) -> bytes | None:
        """A tag's bytes, whatever they are marked as: IPTC is often said to be words of 4 bytes."""
        value = self.main.get(number)
        return None if value is None else value.data

    def integer(self, number: int, default: int) -> int:
        """As `get`, but of whole numbers alone."""
        value = self.get(number)
        return value if isinstance(value, int) else default

    @property
    def orientation(self) -> int:
        """1 to 8; 1 where it is missing or no such number."""
        value = self.integer(ORIENTATION, 1)
        return value if 1 <= value <= 8 else 1

    @property
    def dpi(self) -> tuple[float, float] | None:
        """Pixels an inch, across and down."""
        unit = {2: 1.0, 3: 2.54}.get(self.get(RESOLUTION_UNIT, 2))
        across, down = self.get(X_RESOLUTION, math.nan), self.get(Y_RESOLUTION, math.nan)
        if unit and 0 < across < 1e6 and 0 < down < 1e6:
            return across * unit, down * unit
        return None

    @property
    def bits(self) -> int:
        """A sample's."""
        return self.integer(BITS, 1)

    @property
    def samples(self) -> int:
        """A pixel's."""
        return self.integer(SAMPLES, 1)

    @property
    def photometric(self) -> int:
        """0 white is zero, 1 black is zero, 2 RGB, 3 palette, 5 CMYK, 6 YCbCr, 8 and 9 Lab."""
        return self.integer(PHOTOMETRIC, 1)

    @property
    def planar(self) -> bool:
        return self.get(PLANAR) == 2

    # ---- writing -------------------------------------------------------------------------------------------

    def to_bytes(self) -> bytes:
        """A TIFF of these directories, to which pixels may be appended."""
        note = self.exif.get(MAKER_NOTE)
        writer = _Writer(self.order, note if self.note_at else None, self.note_at)
        main, exif = dict(self.main), dict(self.exif)
        below = [
            (main, EXIF_POINTER, exif),
            (main, GPS_POINTER, self.gps),
            (exif, INTEROP_POINTER, self.interop),
        ]
        for directory, pointer, inside in reversed(below):
            if inside:
                directory[pointer] = self.value(LONG, 0)
        writer.put(main)
        for directory, pointer, inside in below:
            if pointer in directory:
                writer.put(inside, pointer)
        return bytes(writer.data)


class _Reader:
    def __init__(self, data: bytes, order: str, *, big: bool) -> None:
        self.data, self.order, self.big = data, order, big
        self.room = len(data)  # bytes of values, which in a whole file do not overlap
        self.read: set[int] = set()  # where directories began
        self.places: dict[int, int] = {}  # of long values

    def number(self, at: int, size: int) -> int:
        return int.from_bytes(self.data[at : at + size], "little" if self.order == "<" else "big")

    def below(self, directory: Directory, pointer: int) -> Directory:
        value = directory.get(pointer)
        if value is None or len(value.data) not in (4, 8):
            return {}
        return self.directory(int.from_bytes(value.data, "little" if self.order == "<" else "big"))

    def directory(self, start: int) -> Directory:
        found: Directory = {}
        if start in self.read:
            return found
        self.read.add(start)
        head, entry, inline, form = (8, 20, 8, "HHQ") if self.big else (2, 12, 4, "HHI")
        for at in range(start + head, start + head + entry * min(self.number(start, head), 65535), entry):
            if at + entry > len(self.data):
                break
            number, kind, count = struct.unpack_from(self.order + form, self.data, at)
            size = count * _SIZES.get(kind, 0)
            place = at + entry - inline if size <= inline else self.number(at + entry - inline, inline)
            if not 0 < size <= self.room or place + size > len(self.data) or number in found:
                continue
            self.room -= size
            found[number] = Value(kind, self.data[place : place + size])
            if size > inline:
                self.places[number] = place
        return found


class _Writer:
    """Directories one behind the other, each with its values; `note` stands at `note_at`, and they around
    it.
    """

    def __init__(self, order: str, note: Value | None, note_at: int) -> None:
        self.order, self.note, self.note_at = order, note, note_at
        self.note_end = note_at + len(note.data) if note is not None else 0
        mark = b"II*\0" if order == "<" else b"MM\0*"
        self.data = bytearray(mark + struct.pack(order + "I", 0))
        self.pointers: dict[int, int] = {}  # where the places of directories are to be written

    def put(self, directory: Directory, pointer: int | None = None) -> None:
        """Write `directory`, to which the tag `pointer` of an earlier one leads, or the file's head."""
        start = self._room(2 + 12 * len(directory) + 4)
        struct.pack_into(self.order + "I", self.data, 4 if pointer is None else self.pointers[pointer], start)
        struct.pack_into(self.order + "H", self.data, start, len(directory))
        for at, (number, value) in zip(
            range(start + 2, 1 << 32, 12), sorted(directory.items()), strict=False
        ):
            count = len(value.data) // _SIZES[value.type]
            struct.pack_into(self.order + "HHI", self.data, at, number, value.type, count)
            place = self.pointers[number] = at + 8
            if len(value.data) > 4:
                place = self.note_at if value is self.note else self._room(len(value.data))
                struct.pack_into(self.order + "I", self.data, at + 8, place)
            if place + len(value.data) > len(self.data):
                self.data.extend(bytes(place + len(value.data) - len(self.data)))
            self.data[place : place + len(value.data)] = value.data

    def _room(self, size: int) -> int:
        """Where so many bytes have room, at an even place."""
        start = len(self.data) + len(self.data) % 2
        if self.note_at < start + size and start < self.note_end:
            start = self.note_end + self.note_end % 2
        self.data.extend(bytes(start + size - len(self.data)))
        return start
