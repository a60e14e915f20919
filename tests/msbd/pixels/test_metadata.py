"""What a file says besides its pixels: kept in every format that has a place for it, changed where it
must be.
"""

import io
import json
import struct
import time
import zlib
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.TiffImagePlugin import IFDRational

from msbd.pixels.files import Photo, load_image, save_photo
from msbd.pixels.metadata import Metadata, iptc_of_photoshop, iptc_text, photoshop_of_iptc
from msbd.pixels.tags import MAKER_NOTE, USER_COMMENT, Tags, Value
from msbd.pixels.xmp import EDITED, ENHANCED, SOURCE_TYPES, with_source_type
from tests.helpers import draw_files as draw

PIXELS = np.random.default_rng(1).integers(0, 256, (24, 36, 3), dtype=np.uint8)
XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    b'<rdf:Description rdf:about="" xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6" '
    b'xmlns:dc="http://purl.org/dc/elements/1.1/" dc:creator="nobody"/></rdf:RDF></x:xmpmeta>'
)
IPTC = b"\x1c\x02\x78\x00\x07caption\x1c\x02\x50\x00\x06nobody"
OURS = {"prompt": "a red house", "seed": 7, "msbd": "0"}
MAKE, DATE, COPYRIGHT, ORIENTATION, EXIF, GPS = 0x010F, 0x0132, 0x8298, 0x0112, 0x8769, 0x8825


def source_exif(orientation: int = 6, **more: Any) -> Image.Exif:
    exif = Image.Exif()
    exif[MAKE], exif[DATE], exif[COPYRIGHT], exif[ORIENTATION] = (
        "TestCam",
        "2026:01:01 00:00:00",
        "nobody",
        orientation,
    )
    exif.get_ifd(EXIF).update({0x829A: IFDRational(1, 60), 0xA002: 36, 0xA003: 24})
    exif.get_ifd(GPS)[1] = "N"
    return exif


def source(kind: str, folder: Path) -> Path:
    """A picture of that kind, lying on its side, with all that the kind has places for."""
    path = folder / f"in.{kind}"
    exif, file = source_exif(), io.BytesIO()
    picture = Image.fromarray(PIXELS)
    if kind == "jpg":
        picture.save(file, "JPEG", quality=95, exif=exif, xmp=XMP, dpi=(300, 200), comment=b"a comment")
        block = b"Photoshop 3.0\0" + photoshop_of_iptc(IPTC)
        data = with_segments(file.getvalue(), (0xED, block))
    elif kind == "png":
        chunks = [
            (b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")),
            (b"pHYs", struct.pack(">IIB", 11811, 7874, 1)),
            (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP),
            (b"tEXt", b"Comment\0a comment"),
            (b"zTXt", b"Author\0\0" + zlib.compress(b"nobody")),
            iptc_text(IPTC),
        ]
        data = draw.png(PIXELS, chunks=chunks)
    elif kind == "webp":
        picture.save(file, "WEBP", lossless=True, exif=exif, xmp=XMP)
        data = file.getvalue()
    else:
        tags = {
            271: (2, b"TestCam\0", 8), 306: (2, b"2026:01:01 00:00:00\0", 20), 33432: (2, b"nobody\0", 7),
            274: (3, struct.pack("<H", 6), 1), 700: (1, XMP, len(XMP)), 33723: (7, IPTC, len(IPTC)),
            282: (5, struct.pack("<II", 300, 1), 1), 283: (5, struct.pack("<II", 200, 1), 1),
            296: (3, struct.pack("<H", 2), 1),
        }  # fmt: skip
        data = draw.tiff(PIXELS, tags=tags)
    path.write_bytes(data)
    return path


def reads(path: Path) -> tuple[Image.Image, Image.Exif, Metadata]:
    with Image.open(path) as picture:
        picture.load()
        return picture, picture.getexif(), load_image(path).metadata


@pytest.mark.parametrize("into", ["png", "jpg", "webp", "tif"])
@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "tif"])
def test_metadata_stays_from_every_format_into_every_format(kind: str, into: str, tmp_path: Path) -> None:
    photo = load_image(source(kind, tmp_path))
    assert photo.size == (36, 24)
    notes = save_photo(photo, tmp_path / f"out.{into}", ours=OURS, source_type=EDITED)
    _, exif, metadata = reads(tmp_path / f"out.{into}")
    assert (exif[MAKE], exif[DATE], exif[COPYRIGHT]) == ("TestCam", "2026:01:01 00:00:00", "nobody")
    assert exif.get(ORIENTATION, 1) == 1 and load_image(tmp_path / f"out.{into}").size == (36, 24)
    if kind != "tif":
        inside = exif.get_ifd(EXIF)
        assert inside[0x829A] == pytest.approx(1 / 60) and exif.get_ifd(GPS)[1] == "N"
        assert (inside[0xA002], inside[0xA003]) == (24, 36)
    assert metadata.xmp is not None and b'dc:creator="nobody"' in metadata.xmp
    assert b'tiff:Orientation="1"' in metadata.xmp and metadata.xmp.count(EDITED.encode()) == 1
    if kind != "webp":  # which has no place for them
        assert metadata.dpi == pytest.approx((200, 300), abs=0.02)  # turned, as the picture
        if into == "webp":
            assert any("IPTC" in note for note in notes)
        else:
            assert metadata.iptc is not None and metadata.iptc.startswith(IPTC)
    if kind in ("png", "jpg") and into != "webp":
        assert (
            metadata.comment == "a comment"
            or b"Comment\0a comment" in dict(metadata.texts).values()
            or into == "tif"
        )


def test_other_tools_text_chunks_stay_byte_for_byte_and_ours_is_replaced(tmp_path: Path) -> None:
    theirs = (b"tEXt", b"parameters\0a castle")
    (tmp_path / "0.png").write_bytes(draw.png(PIXELS, chunks=[theirs, (b"tEXt", b"Author\0nobody")]))
    for number in range(3):
        photo = load_image(tmp_path / f"{number}.png")
        assert photo.metadata.texts == (theirs, (b"tEXt", b"Author\0nobody"))
        save_photo(photo, tmp_path / f"{number + 1}.png", ours={**OURS, "seed": number})
    with Image.open(tmp_path / "3.png") as picture:
        assert picture.info["parameters"] == "a castle" and picture.info["Author"] == "nobody"
        assert json.loads(picture.info["msbd"])["seed"] == 2
    assert (tmp_path / "3.png").read_bytes().count(b"msbd\0") == 1


def test_an_earlier_user_comment_is_kept_in_ours(tmp_path: Path) -> None:
    exif = source_exif(1)
    exif.get_ifd(EXIF)[0x9286] = b"UNICODE\0" + "ein Schloß".encode("utf-16-be")
    Image.fromarray(PIXELS).save(tmp_path / "0.jpg", exif=exif)
    for number in range(3):
        save_photo(load_image(tmp_path / f"{number}.jpg"), tmp_path / f"{number + 1}.jpg", ours=OURS)
        with Image.open(tmp_path / f"{number + 1}.jpg") as picture:
            comment = json.loads(bytes(picture.getexif().get_ifd(EXIF)[0x9286])[8:])
        assert comment == {**OURS, "source_comment": "ein Schloß"}


COMMENTS = {
    "UTF-16, as the file": b"UNICODE\0" + "你好".encode("utf-16-le"),
    "UTF-16, the other way": b"UNICODE\0" + "Schloß".encode("utf-16-be"),
    "UTF-16 with a mark": b"UNICODE\0" + b"\xfe\xff" + "你好".encode("utf-16-be"),
    "JIS": b"JIS\0\0\0\0\0" + "こんにちは".encode("iso2022_jp"),
    "Latin-1": b"ASCII\0\0\0" + "Schloß".encode("latin-1"),
    "UTF-8": bytes(8) + "你好".encode(),
}


@pytest.mark.parametrize("name", COMMENTS)
def test_user_comments_in_every_set_of_letters(name: str, tmp_path: Path) -> None:
    tags = Tags()
    tags.exif[USER_COMMENT] = Value(7, COMMENTS[name])
    exif = b"Exif\0\0" + tags.to_bytes()
    Image.fromarray(PIXELS).save(tmp_path / "a.jpg", exif=exif)
    photo = load_image(tmp_path / "a.jpg")
    save_photo(photo, tmp_path / "plain.tif")
    assert Tags.of((tmp_path / "plain.tif").read_bytes()).exif == tags.exif  # type and bytes
    save_photo(photo, tmp_path / "b.jpg", ours=OURS)
    with Image.open(tmp_path / "b.jpg") as picture:
        said = json.loads(bytes(Tags.of(picture.info["exif"]).exif[USER_COMMENT].data)[8:])["source_comment"]
    words = {"J": "こんにちは"}.get(
        name[0], "Schloß" if name in ("Latin-1", "UTF-16, the other way") else "你好"
    )
    assert said == words


def raw_profile(kind: str, data: bytes) -> tuple[bytes, bytes]:
    """As ImageMagick writes other formats' blocks."""
    digits = data.hex()
    lines = "\n".join(digits[at : at + 72] for at in range(0, len(digits), 72))
    text = f"\n{kind}\n{len(data):8}\n{lines}\n".encode()
    return b"zTXt", f"Raw profile type {kind}".encode() + b"\0\0" + zlib.compress(text)


@pytest.mark.parametrize("into", ["png", "jpg"])
def test_raw_profiles_of_pngs_are_read(into: str, tmp_path: Path) -> None:
    exif = source_exif().tobytes()
    chunks = [
        raw_profile("APP1", exif),
        raw_profile("xmp", XMP),
        raw_profile("8bim", photoshop_of_iptc(IPTC)),
    ]
    photo = load_image(io.BytesIO(draw.png(PIXELS, chunks=chunks)))
    assert photo.size == (36, 24)  # turned
    save_photo(photo, tmp_path / f"b.{into}", ours=OURS, source_type=EDITED)
    picture, kept, metadata = reads(tmp_path / f"b.{into}")
    assert kept[MAKE] == "TestCam" and picture.size == (24, 36)
    assert metadata.xmp is not None and b'tiff:Orientation="1"' in metadata.xmp and metadata.iptc == IPTC
    assert b"Raw profile type APP1" not in (tmp_path / f"b.{into}").read_bytes()
    only_xmp = [raw_profile("APP1", b"http://ns.adobe.com/xap/1.0/\0" + XMP), (b"tEXt", b"Author\0nobody")]
    assert load_image(io.BytesIO(draw.png(PIXELS, chunks=only_xmp))).metadata.xmp is not None
    damaged = [(b"tEXt", b"Raw profile type exif\0\nexif\n   3\nno digits\n")]
    assert load_image(io.BytesIO(draw.png(PIXELS, chunks=damaged))).metadata.texts == tuple(damaged)


@pytest.mark.parametrize("into", ["jpg", "tif"])
@pytest.mark.parametrize("kind", ["tEXt", "zTXt", "iTXt", "jpg"])
def test_comments_stay_in_their_letters(kind: str, into: str, tmp_path: Path) -> None:
    text = "Grüße, Łódź" if kind != "tEXt" else "Grüße"
    data = {
        "tEXt": text.encode("latin-1", "replace"), "zTXt": b"\0" + zlib.compress(text.encode()),
        "iTXt": b"\0\0de\0Kommentar\0" + text.encode(),
    }  # fmt: skip
    if kind == "jpg":
        Image.fromarray(PIXELS).save(tmp_path / "a", "JPEG", comment=text.encode())
    else:
        chunk = kind.encode(), b"Comment\0" + data[kind]
        (tmp_path / "a").write_bytes(draw.png(PIXELS, chunks=[chunk, chunk]))
        text = f"{text}\n{text}"
    assert not save_photo(load_image(tmp_path / "a"), tmp_path / f"b.{into}", ours=OURS)
    made = (tmp_path / f"b.{into}").read_bytes()
    assert (Tags.of(made).raw(270) == text.encode() + b"\0") if into == "tif" else text.encode() in made


def with_segments(data: bytes, *segments: tuple[int, bytes]) -> bytes:
    """A JPEG with these behind its first segment."""
    made = b"".join(
        b"\xff" + bytes([mark]) + struct.pack(">H", len(body) + 2) + body for mark, body in segments
    )
    return data[:20] + made + data[20:]


def test_all_comments_and_iptc_blocks_of_a_jpeg_are_kept() -> None:
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "JPEG")
    more = b"\x1c\x02\x19\0\4word"
    odd = b"8BIM\x03\xed\3abc" + struct.pack(">I", 3) + b"xyz"  # without the byte that makes it even
    data = with_segments(
        file.getvalue(), (0xFE, b"one"), (0xED, b"Photoshop 3.0\0" + photoshop_of_iptc(IPTC) + odd),
        (0xED, b"Photoshop 3.0\0" + photoshop_of_iptc(more)), (0xFE, "zwölf".encode()),
    )  # fmt: skip
    metadata = load_image(io.BytesIO(data)).metadata
    assert metadata.iptc == IPTC + more and metadata.comment == "one\nzwölf"
    block = photoshop_of_iptc(IPTC)
    parts = [(0xED, b"Photoshop 3.0\0" + part) for part in (block[:9], block[9:])]
    assert load_image(io.BytesIO(with_segments(file.getvalue(), *parts))).metadata.iptc == IPTC


def test_a_gain_map_is_said_not_to_be_read() -> None:
    file = io.BytesIO()
    gain = XMP.replace(
        b"dc:creator=", b'xmlns:hdrgm="http://ns.adobe.com/hdr-gain-map/1.0/" hdrgm:Version="1.0" dc:creator='
    )
    Image.fromarray(PIXELS).save(file, "JPEG", xmp=gain)
    photo = load_image(io.BytesIO(file.getvalue()))
    assert [note for note in photo.notes if "gain map" in note]
    assert photo.metadata.xmp is not None and b"hdrgm:Version" not in photo.metadata.xmp


@pytest.mark.parametrize("wanted", ["maker", "other"])
def test_a_jpegs_note_says_what_of_the_exif_was_lost(wanted: str, tmp_path: Path) -> None:
    tags = Tags()
    tags.main[MAKE] = Value(2, b"TestCam\0")
    tags.exif[MAKER_NOTE if wanted == "maker" else 0x9400] = Value(7, bytes(70000))
    photo = Photo(PIXELS, metadata=Metadata(exif=tags.to_bytes()))
    (note,) = save_photo(photo, tmp_path / "a.jpg", ours=OURS)
    assert ("the maker's note" if wanted == "maker" else "longer than 4096 bytes") in note
    with Image.open(tmp_path / "a.jpg") as picture:
        kept = Tags.of(picture.info["exif"])
    assert kept.raw(MAKE) == b"TestCam\0" and b"a red house" in kept.exif[USER_COMMENT].data


@pytest.mark.parametrize("into", ["png", "jpg", "webp", "tif"])
def test_metadata_never_costs_the_picture(into: str, tmp_path: Path) -> None:
    """A JPEG's segment holds 64 kB: what is too long is shortened or left out, with a note."""
    exif = source_exif(1)
    exif[270] = "description " * 4000
    long = Metadata(
        exif=exif.tobytes().removeprefix(b"Exif\0\0"), xmp=XMP + b" " * 70000, iptc=IPTC + bytes(70000),
        comment="comment " * 9000,
    )  # fmt: skip
    ours = {"prompt": "words " * 20000, "negative_prompt": "words " * 20000, "seed": 7}
    notes = save_photo(Photo(PIXELS, metadata=long), tmp_path / f"a.{into}", ours=ours, source_type=EDITED)
    made = load_image(tmp_path / f"a.{into}")
    assert made.size == (24, 36) and bool(notes) == (into != "png")
    if into == "jpg":
        assert len(notes) == 4
        with Image.open(tmp_path / "a.jpg") as picture:
            kept = picture.getexif()
            assert kept[MAKE] == "TestCam" and json.loads(bytes(kept.get_ifd(EXIF)[0x9286])[8:])["seed"] == 7


DAMAGED = {
    "garbage": b"II*\0\x08\0\0\0\xff\xff" + bytes(range(256)),
    "empty": b"",
    "cut off": b"II*\0\x08\0\0\0\x05\0\x0f\x01\x02\0",
    "rational 0/0": b"II*\0\x08\0\0\0\x01\0\x1a\x01\x05\0\x01\0\0\0\x1a\0\0\0\0\0\0\0" + bytes(8),
    "orientation in words": b"II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x04\0\0\0six\0\0\0\0\0",
    "orientation twice": b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x02\0\0\0\x06\0\x03\0\0\0\0\0",
    "itself as directory": b"II*\0\x08\0\0\0\x01\0\x69\x87\x04\0\x01\0\0\0\x08\0\0\0\0\0\0\0",
}


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("into", ["png", "jpg", "webp", "tif"])
def test_damaged_exif_is_left_out(name: str, into: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(draw.png(PIXELS, chunks=[(b"eXIf", DAMAGED[name])]))
    photo = load_image(tmp_path / "a.png")
    save_photo(photo, tmp_path / f"b.{into}", ours=OURS, source_type=EDITED)
    assert load_image(tmp_path / f"b.{into}").size == photo.size


def test_a_thumbnail_does_not_stay(tmp_path: Path) -> None:
    """It would show the picture before the edit."""
    thumbnail = io.BytesIO()
    Image.fromarray(PIXELS[:8, :8]).save(thumbnail, "JPEG")
    start = 8 + 2 + 12 + 4
    second = struct.pack("<HHHIIHHII", 2, 0x0201, 4, 1, start + 30, 0x0202, 4, 1, len(thumbnail.getvalue()))
    exif = (
        b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHI4sI", 0x010F, 2, 4, b"Cam\0", start) + second + bytes(4)
    )
    (tmp_path / "a.png").write_bytes(draw.png(PIXELS, chunks=[(b"eXIf", exif + thumbnail.getvalue())]))
    save_photo(load_image(tmp_path / "a.png"), tmp_path / "b.jpg", ours=OURS)
    assert b"Cam" in (tmp_path / "b.jpg").read_bytes()[:400]
    assert (tmp_path / "b.jpg").read_bytes().count(b"\xff\xd8\xff") == 1


ABOUT_PIXELS = (
    b'<rdf:Description rdf:about="" xmlns:xmp="http://ns.adobe.com/xap/1.0/" '
    b'xmlns:tiff="http://ns.adobe.com/tiff/1.0/" xmlns:exif="http://ns.adobe.com/exif/1.0/" tiff:ImageWidth="36" '
    b'tiff:XResolution="300/1" tiff:ResolutionUnit="3"><tiff:ImageLength>24</tiff:ImageLength>'
    b"<exif:PixelXDimension>36</exif:PixelXDimension><exif:PixelYDimension>24</exif:PixelYDimension>"
    b"<xmp:Thumbnails><rdf:Alt>the picture before</rdf:Alt></xmp:Thumbnails></rdf:Description></rdf:RDF>"
)


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "tif"])
def test_xmp_says_the_size_of_the_result_and_shows_no_former_picture(kind: str, tmp_path: Path) -> None:
    xmp = XMP.replace(b"</rdf:RDF>", ABOUT_PIXELS)
    chunks = [
        (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp),
        (b"pHYs", struct.pack(">IIB", 11811, 11811, 1)),
    ]
    photo = load_image(io.BytesIO(draw.png(PIXELS, chunks=chunks)))
    assert photo.size == (36, 24)  # turned, as XMP says
    height, width = (2 * side for side in photo.size)
    enlarged = photo.remade(torch.zeros(1, 3, height, width), None)
    save_photo(enlarged, tmp_path / f"b.{kind}", ours=OURS, source_type=ENHANCED)
    kept = load_image(tmp_path / f"b.{kind}").metadata.xmp
    assert kept is not None and b"picture before" not in kept and b"Thumbnails" not in kept
    for said in (
        f'tiff:ImageWidth="{width}"', f"<tiff:ImageLength>{height}<", f"<exif:PixelXDimension>{width}<",
        f"<exif:PixelYDimension>{height}<", 'tiff:ResolutionUnit="2"',
    ):  # fmt: skip
        assert said.encode() in kept
    across, below = kept.split(b'tiff:XResolution="')[1].split(b'"')[0].split(b"/")
    assert int(across) / int(below) == pytest.approx(600, abs=0.1)
    ElementTree.fromstring(kept[kept.index(b"<x:xmpmeta") :].split(b"<?xpacket")[0])


def test_extended_xmp_is_left_out_with_a_note(tmp_path: Path) -> None:
    guid = b"0123456789ABCDEF0123456789ABCDEF"
    named = (
        b'xmlns:xmpNote="http://ns.adobe.com/xmp/note/" xmpNote:HasExtendedXMP="' + guid + b'" dc:creator='
    )
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "JPEG", xmp=XMP.replace(b"dc:creator=", named))
    extended = b"http://ns.adobe.com/xmp/extension/\0" + guid + struct.pack(">II", 5, 0) + b"depth"
    photo = load_image(io.BytesIO(with_segments(file.getvalue(), (0xE1, extended))))
    assert photo.metadata.xmp is not None and b"HasExtended" not in photo.metadata.xmp
    assert [note for note in photo.notes if "extended XMP" in note]
    file.seek(0)
    assert not load_image(file).notes


@pytest.mark.parametrize("packed", [False, True])
def test_a_long_text_of_a_png_costs_nothing(packed: bool) -> None:
    """As workflows that other programs store; Pillow refuses those that unfold to more than 1 MB."""
    text = b"word " * 300_000
    chunk = (b"zTXt", b"workflow\0\0" + zlib.compress(text)) if packed else (b"tEXt", b"workflow\0" + text)
    photo = load_image(io.BytesIO(draw.png(PIXELS, chunks=[chunk])))
    assert np.array_equal(photo.samples, PIXELS) and photo.metadata.texts == (chunk,)


def test_a_damaged_chunk_says_nothing() -> None:
    chunks = [(b"gAMA", struct.pack(">I", 100000)), (b"eXIf", source_exif().tobytes()[6:])]
    data = bytearray(draw.png(PIXELS, chunks=chunks))
    for name in (b"gAMA", b"eXIf"):
        data[data.index(name) + 4] ^= 1
    photo = load_image(io.BytesIO(data))
    assert photo.size == (24, 36) and photo.icc_profile is None and photo.metadata == Metadata()


def test_layers_and_descriptions_of_stacks_are_not_kept(tmp_path: Path) -> None:
    layers = b"Adobe Photoshop Document Data Block\0" + bytes(5000)
    said = b"ImageJ=1.53\nimages=3\n\0"
    tags = {37724: (7, layers, len(layers)), 270: (2, said, len(said)), 271: (2, b"TestCam\0", 8)}
    photo = load_image(io.BytesIO(draw.tiff(PIXELS, tags=tags)))
    assert [note for note in photo.notes if "layers" in note]
    save_photo(photo, tmp_path / "b.tif", ours=OURS)
    kept = Tags.of((tmp_path / "b.tif").read_bytes())
    assert kept.raw(271) == b"TestCam\0" and not {37724, 270} & set(kept.main)


def test_a_png_does_not_say_what_an_earlier_run_of_ours_did(tmp_path: Path) -> None:
    save_photo(Photo(PIXELS), tmp_path / "a.jpg", ours={**OURS, "source_comment": "a barn"})
    save_photo(load_image(tmp_path / "a.jpg"), tmp_path / "b.png", ours={"prompt": "second", "msbd": "0"})
    data = (tmp_path / "b.png").read_bytes()
    assert b"a red house" not in data and b"second" in data
    tags = Tags.of(data[data.index(b"eXIf") + 4 :])
    assert tags.exif[USER_COMMENT].data == b"UNICODE\0" + "a barn".encode("utf-16-le")


@pytest.mark.parametrize("source", [7, {"a": 1}, "\ud800 alone", ""])
@pytest.mark.parametrize("into", ["png", "jpg"])
def test_no_earlier_comment_costs_the_picture(source: object, into: str, tmp_path: Path) -> None:
    tags = Tags()
    tags.exif[USER_COMMENT] = Value(
        7, b"ASCII\0\0\0" + json.dumps({"msbd": "0", "source_comment": source}).encode()
    )
    photo = Photo(PIXELS, metadata=Metadata(exif=tags.to_bytes(), dpi=(9e7, 9e7)))
    save_photo(photo, tmp_path / f"a.{into}", ours=OURS)
    assert load_image(tmp_path / f"a.{into}").size == photo.size


@pytest.mark.parametrize(
    "comment",
    [b"ASCII\0\0\0" + b"[" * 50_000, b'UNICODE\0{"msbd": "0"}'],
    ids=["JSON nested deeply", "letters of another set"],
)
@pytest.mark.parametrize("into", ["png", "tif"])
def test_no_comment_like_ours_costs_the_picture(comment: bytes, into: str, tmp_path: Path) -> None:
    tags = Tags()
    tags.exif[USER_COMMENT] = Value(7, comment)
    photo = Photo(PIXELS, metadata=Metadata(exif=tags.to_bytes()))
    save_photo(photo, tmp_path / f"a.{into}", ours=OURS)
    assert load_image(tmp_path / f"a.{into}").size == photo.size


def test_adobe_rgb_is_said_by_exif_only_where_it_is(tmp_path: Path) -> None:
    tags = Tags()
    tags.interop[1] = Value(2, b"R03\0")
    data = draw.png(PIXELS, chunks=[(b"eXIf", tags.to_bytes())])
    save_photo(load_image(io.BytesIO(data)), tmp_path / "b.jpg")
    assert load_image(tmp_path / "b.jpg").icc_profile is None


def test_hostile_xmp_takes_no_time() -> None:
    """What regular expressions would search again from every start."""
    for part in (b"<xmp:Thumbnails>", b" ", b'xmpNote:HasExtendedXMP="', b"Iptc4xmpExt:DigitalSourceType='"):
        xmp = part * (2_000_000 // len(part)) + b"</rdf:RDF>"
        chunks = [(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp)]
        start = time.process_time()
        metadata = load_image(io.BytesIO(draw.png(PIXELS, chunks=chunks))).metadata
        assert with_source_type(metadata.xmp, EDITED) is not None
        assert time.process_time() - start < 5


def test_a_resolution_is_one_of_inches(tmp_path: Path) -> None:
    def tiff(unit: int) -> Metadata:
        tags = {number: (5, struct.pack("<II", 100, 1), 1) for number in (282, 283)}
        data = draw.tiff(PIXELS, tags={**tags, 296: (3, struct.pack("<H", unit), 1)})
        return load_image(io.BytesIO(data)).metadata

    assert tiff(2).dpi == (100, 100) and tiff(3).dpi == pytest.approx((254, 254)) and tiff(1).dpi is None
    assert tiff(2).scaled(2, 3).dpi == (200, 300)


def test_iptc_in_photoshops_blocks_and_back() -> None:
    other = b"8BIM\x04\x04"[:4] + b"\x03\xed\x03abc" + struct.pack(">I", 3) + b"xyz\0"
    assert iptc_of_photoshop(other + photoshop_of_iptc(IPTC)) == IPTC
    assert iptc_of_photoshop(b"8BIM") is None and iptc_of_photoshop(b"") is None


@pytest.mark.parametrize("order", ["<", ">"])
def test_iptc_that_a_tiff_marks_as_words_comes_back_in_its_order(order: str) -> None:
    padded = IPTC + bytes(-len(IPTC) % 4)
    tags = {33723: (4, padded, len(padded) // 4)}
    metadata = load_image(io.BytesIO(draw.tiff(PIXELS, order=order, tags=tags))).metadata
    assert metadata.iptc == padded


def test_the_source_type_is_said_once_whatever_stood_there() -> None:
    first = with_source_type(XMP, EDITED)
    assert first is not None and first.count(b"DigitalSourceType=") == 1
    second = with_source_type(first, ENHANCED)
    assert second is not None and second.count(b"DigitalSourceType=") == 1 and EDITED.encode() not in second
    assert len(with_source_type(second, EDITED) or b"") == len(first)  # nothing piles up
    alone = with_source_type(None, EDITED)
    assert alone is not None and with_source_type(alone, EDITED) == alone
    assert with_source_type(b"no packet", EDITED) is None


RDF = b'xmlns:%s="http://www.w3.org/1999/02/22-rdf-syntax-ns#"'
IPTC_EXT = b"http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
PACKETS = {
    "another prefix": b"<r:RDF " + RDF % b"r" + b"><r:Description/></r:RDF >",
    "empty": b"<rdf:RDF " + RDF % b"rdf" + b"/>",
    "said by another prefix": b"<rdf:RDF " + RDF % b"rdf" + b'><rdf:Description xmlns:i="' + IPTC_EXT
    + b'" i:DigitalSourceType="digitalCapture"/></rdf:RDF>',
    "said as an element": b"<rdf:RDF " + RDF % b"rdf" + b'><rdf:Description xmlns:Iptc4xmpExt="' + IPTC_EXT
    + b'"><Iptc4xmpExt:DigitalSourceType rdf:resource="digitalCapture"/></rdf:Description></rdf:RDF>',
    "said as text": b"<rdf:RDF " + RDF % b"rdf" + b'><rdf:Description xmlns:i="' + IPTC_EXT
    + b'"><i:DigitalSourceType>digitalCapture</i:DigitalSourceType></rdf:Description></rdf:RDF>',
}  # fmt: skip


@pytest.mark.parametrize("name", PACKETS)
def test_the_source_type_is_added_to_every_form_of_xmp(name: str) -> None:
    made = with_source_type(b'<x:xmpmeta xmlns:x="adobe:ns:meta/">' + PACKETS[name] + b"</x:xmpmeta>", EDITED)
    assert made is not None and b"digitalCapture" not in made
    said = f"{{{IPTC_EXT.decode()}}}DigitalSourceType"
    assert [one.attrib[said] for one in ElementTree.fromstring(made).iter() if said in one.attrib] == [
        SOURCE_TYPES + EDITED
    ]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-16-be", "utf-32-le"])
def test_xmp_turns_a_picture_by_whatever_prefix_and_encoding(encoding: str) -> None:
    xmp = (
        XMP.replace(b"tiff:Orientation", b"t:Orientation")
        .replace(b"xmlns:tiff", b"xmlns:t")
        .decode()
        .encode(encoding)
    )
    chunks = [raw_profile("xmp", xmp)]
    photo = load_image(io.BytesIO(draw.png(PIXELS, chunks=chunks)))
    assert photo.size == (36, 24) and photo.metadata.xmp is not None
    assert b't:Orientation="1"' in photo.metadata.xmp


def test_strip_and_no_metadata_leave_the_colours(tmp_path: Path) -> None:
    save_photo(Photo(PIXELS, colour_chunks=((b"gAMA", struct.pack(">I", 100000)),)), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.info["gamma"] == 1.0 and not picture.getexif()


@pytest.mark.parametrize("into", ["png", "jpg", "webp", "tif"])
def test_letters_of_other_languages_stay(into: str, tmp_path: Path) -> None:
    text = "© Müller 2026".encode()
    exif = Image.Exif()
    exif[COPYRIGHT] = text
    Image.fromarray(PIXELS).save(tmp_path / "a.jpg", exif=exif, comment="Grüße".encode("latin-1"))
    photo = load_image(tmp_path / "a.jpg")
    assert photo.metadata.comment == "Grüße"
    save_photo(photo, tmp_path / f"b.{into}", ours=OURS)
    assert text in (tmp_path / f"b.{into}").read_bytes()
    assert load_image(tmp_path / f"b.{into}").metadata.comment == ("Grüße" if into in ("jpg",) else ANY[into])


ANY = {"png": None, "webp": None, "tif": None}  # there it is a text chunk, is lost, or a description


def test_no_pointer_leads_out_of_the_exif(tmp_path: Path) -> None:
    exif = source_exif(1)
    exif.get_ifd(EXIF)[0xA005] = 4000
    Image.fromarray(PIXELS).save(tmp_path / "a.jpg", exif=exif)
    save_photo(load_image(tmp_path / "a.jpg"), tmp_path / "b.jpg")
    with Image.open(tmp_path / "b.jpg") as picture:
        assert 0xA005 not in picture.getexif().get_ifd(EXIF) and picture.getexif().get_ifd(EXIF)


def test_a_density_that_nobody_said_is_none(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[MAKE] = "TestCam"
    Image.fromarray(PIXELS).save(tmp_path / "a.jpg", exif=exif)
    assert load_image(tmp_path / "a.jpg").metadata.dpi is None
    save_photo(load_image(tmp_path / "a.jpg"), tmp_path / "b.png")
    assert b"pHYs" not in (tmp_path / "b.png").read_bytes()
    data = (tmp_path / "a.jpg").read_bytes()
    at = data.index(b"\xff\xe0")
    (tmp_path / "c.jpg").write_bytes(
        data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") :]
    )
    assert load_image(tmp_path / "c.jpg").metadata.dpi is None  # without JFIF
