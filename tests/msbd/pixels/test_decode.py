"""Every kind of file that some reader gets wrong, drawn sample by sample; what is right is what was drawn,
and what other libraries (imagecodecs, tifffile) read.
"""

import io
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import pyvips
import tifffile
from PIL import Image, ImageCms

from msbd.pixels import decoded as module
from msbd.pixels.decode import decode
from msbd.pixels.files import load_image
from msbd.pixels.formats import format_of
from tests.helpers import draw_files as draw

SIZE = 13, 17
RNG = np.random.default_rng(5)


def samples(bits: int, channels: int = 1) -> np.ndarray:
    shape = (*SIZE, channels) if channels > 1 else SIZE
    return RNG.integers(0, 2**bits, shape)


def full(bits: int) -> int:
    return 2**bits - 1


def read(data: bytes) -> np.ndarray:
    """Samples of [0, 1], with alpha behind the colours."""
    decoded = decode(io.BytesIO(data))
    most = np.iinfo(decoded.samples.dtype).max
    planes = decoded.samples if decoded.alpha is None else np.dstack([decoded.samples, decoded.alpha])
    return planes / most


def assert_equal(data: bytes, right: np.ndarray, bits: int) -> None:
    made = read(data)
    assert made.shape == right.shape and np.abs(made - right).max() <= 0.5 / max(255, full(bits)) + 1e-9


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 10, 12, 14, 16])
@pytest.mark.parametrize("white_is_zero", [False, True])
def test_grey_tiffs_of_every_depth(bits: int, white_is_zero: bool) -> None:
    drawn = samples(bits)
    data = draw.tiff(drawn, bits, draw.WHITE_IS_ZERO if white_is_zero else draw.BLACK_IS_ZERO)
    right = drawn / full(bits)
    assert_equal(data, 1 - right if white_is_zero else right, bits)
    assert decode(io.BytesIO(data)).samples.dtype == (np.uint8 if bits <= 8 else np.uint16)
    assert np.array_equal(tifffile.imread(io.BytesIO(data)).astype(int), drawn)  # another library's reading
    planes = draw.tiff(drawn, bits, draw.WHITE_IS_ZERO if white_is_zero else draw.BLACK_IS_ZERO, planar=True)
    assert np.array_equal(read(planes), read(data))


@pytest.mark.parametrize("bits", [4, 8, 10, 12, 16])
@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("deflated", [False, True])
def test_colour_tiffs_with_planes_together_and_apart(bits: int, planar: bool, deflated: bool) -> None:
    drawn = samples(bits, 3)
    for order in "<>" if bits == 16 else "<":
        data = draw.tiff(drawn, bits, planar=planar, deflated=deflated, order=order, rows_a_strip=5)
        assert_equal(data, drawn / full(bits), bits)


def test_twelve_grey_bits_need_no_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    drawn = samples(12)
    assert_equal(draw.tiff(drawn, 12, draw.BLACK_IS_ZERO), drawn / full(12), 12)
    with pytest.raises(ValueError, match="10 bits a sample, packed, .*extra `scans`; .* 8 or 16 bits"):
        decode(io.BytesIO(draw.tiff(samples(10), 10, draw.BLACK_IS_ZERO)))


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("planar", [False, True])
def test_cmyk_tiffs(bits: int, planar: bool) -> None:
    drawn = samples(bits, 4)
    data = draw.tiff(drawn, bits, draw.SEPARATED, planar=planar)
    assert decode(io.BytesIO(data)).model == "cmyk"
    assert_equal(data, drawn / full(bits), bits)


@pytest.mark.parametrize("bits", [8, 16])
def test_alpha_of_tiffs_plain_associated_and_none(bits: int) -> None:
    drawn = samples(bits, 4)
    drawn[..., 3] |= 2 ** (bits - 1)  # not so thin that dividing by it says nothing
    assert_equal(draw.tiff(drawn, bits, extra=2), drawn / full(bits), bits)
    assert_equal(
        draw.tiff(drawn, bits, extra=0), drawn[..., :3] / full(bits), bits
    )  # no transparency, something
    multiplied = drawn.copy()
    multiplied[..., :3] = drawn[..., :3] * drawn[..., 3:] // full(bits)
    for planar in (False, True):
        made = read(draw.tiff(multiplied, bits, extra=1, planar=planar))
        assert np.abs(made - drawn / full(bits)).max() < 3.1 / 255
        grey = multiplied[..., [0, 3]]
        made = read(draw.tiff(grey, bits, draw.BLACK_IS_ZERO, extra=1, planar=planar))
        assert np.abs(made - drawn[..., [0, 3]] / full(bits)).max() < 3.1 / 255
    grey = drawn[..., [0, 3]]
    assert_equal(draw.tiff(grey, bits, draw.BLACK_IS_ZERO, extra=2), grey / full(bits), bits)
    assert decode(io.BytesIO(draw.tiff(grey[..., :2], bits, draw.BLACK_IS_ZERO, extra=1))).alpha is not None


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_transparency_of_grey_pngs_by_trns_at_their_own_depth(bits: int, interlaced: bool) -> None:
    drawn = samples(bits)
    level = int(drawn[0, 0])
    data = draw.png(drawn, bits, draw.GREY, transparent=struct.pack(">H", level), interlaced=interlaced)
    right = np.dstack([drawn / full(bits), drawn != level])
    assert_equal(data, right, bits)
    other = imagecodecs.png_decode(data)
    assert np.array_equal(other[..., 1] > 0, drawn != level)


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("colour", [draw.RGB, draw.GREY_ALPHA, draw.RGBA])
def test_pngs_of_8_and_16_bits(colour: int, bits: int, interlaced: bool) -> None:
    drawn = samples(bits, draw.CHANNELS[colour])
    data = draw.png(drawn, bits, colour, interlaced=interlaced)
    assert_equal(data, drawn / full(bits), bits)
    assert np.array_equal(imagecodecs.png_decode(data), drawn)
    if colour == draw.RGB:
        transparent = struct.pack(">3H", *(int(level) for level in drawn[2, 3]))
        data = draw.png(drawn, bits, colour, transparent=transparent, interlaced=interlaced)
        assert_equal(data, np.dstack([drawn / full(bits), (drawn != drawn[2, 3]).any(-1)]), bits)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_palettes_with_and_without_transparency(bits: int) -> None:
    drawn, palette = samples(bits), RNG.integers(0, 256, (2**bits, 3))
    alpha = np.full(2**bits, 255)
    alpha[: 2**bits // 2] = RNG.integers(0, 256, 2**bits // 2)
    assert_equal(draw.png(drawn, bits, draw.PALETTE, palette=palette), palette[drawn] / 255, 8)
    transparent = bytes(alpha[: 2**bits // 2].tolist())
    data = draw.png(drawn, bits, draw.PALETTE, palette=palette, transparent=transparent)
    assert_equal(data, np.dstack([palette[drawn], alpha[drawn]]) / 255, 8)
    table = struct.pack(f"<{3 * 2**bits}H", *(257 * palette.T).flatten().tolist())
    data = draw.tiff(drawn, bits, draw.TIFF_PALETTE, tags={320: (3, table, 3 * 2**bits)})
    assert_equal(data, palette[drawn] / 255, 8)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("extra", [None, 0, 2])
@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("photometric", [draw.LAB, draw.ICC_LAB])
def test_lab_becomes_srgb(photometric: int, planar: bool, extra: int | None, bits: int) -> None:
    """By LittleCMS, whose Lab in floating point has the white D50, as TIFF's."""
    levels, a, b = RNG.integers(40, 230, SIZE), *RNG.integers(-60, 60, (2, *SIZE))
    source = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    srgb = imagecodecs.cms_profile("srgb")
    lab = np.dstack([levels / 2.55, a, b])
    right = imagecodecs.cms_transform(lab, source, srgb, colorspace="lab", outcolorspace="rgb", intent=1)
    step = 1 if bits == 8 else 256
    if photometric == draw.LAB:
        drawn = [levels * (full(bits) // 255), a * step % 2**bits, b * step % 2**bits]
    else:
        drawn = [levels * step, (a + 128) * step, (b + 128) * step]
    alpha = samples(bits)
    pixels = np.dstack([*drawn, *([] if extra is None else [alpha])])
    made = read(draw.tiff(pixels, bits, photometric, planar=planar, extra=extra))
    assert np.abs(made[..., :3] - right.clip(0, 1)).max() * 255 <= 0.6
    assert made.shape[2] == (4 if extra == 2 else 3)
    assert extra != 2 or np.array_equal(made[..., 3], alpha / full(bits))


RATIONALS = struct.pack("<6I", 2126, 10000, 7152, 10000, 722, 10000)
NARROW = struct.pack("<12I", 16, 1, 235, 1, 128, 1, 240, 1, 128, 1, 240, 1)


@pytest.mark.parametrize(
    "channels, photometric, options, found",
    [
        (3, draw.TIFF_RGB, {"tags": {258: (3, struct.pack("<3H", 5, 6, 5), 3)}}, "samples with 5, 6, 5 bits"),
        (4, draw.SEPARATED, {"tags": {332: (3, b"\2\0", 1)}}, "inks other than CMYK"),
        (3, draw.SEPARATED, {}, "inks other than CMYK"),
        (2, draw.TIFF_PALETTE, {"planar": True, "extra": 2}, "a palette with more samples, in planes"),
        (3, 10, {}, "the photometric interpretation 10"),
        (1, 4, {}, "the photometric interpretation 4"),
        (1, draw.LAB, {}, "Lab with 1 samples of 8 bits"),
        (4, draw.LAB, {"extra": 1}, "Lab multiplied with its alpha"),
        (3, draw.YCBCR, {"tags": {529: (5, RATIONALS, 3)}}, "YCbCr with other coefficients"),
        (3, draw.YCBCR, {"tags": {532: (5, NARROW, 6)}}, "YCbCr with other coefficients"),
    ],
)
def test_kinds_of_tiffs_that_libraries_read_wrong_are_refused(
    channels: int, photometric: int, options: dict[str, Any], found: str
) -> None:
    data = draw.tiff(samples(8, channels), 8, photometric, **options)
    with pytest.raises(ValueError, match=f"a TIFF of {found}.*, which is not read; save it as JPEG or PNG"):
        decode(io.BytesIO(data))


def test_ycbcr_with_the_usual_numbers_is_read() -> None:
    usual = struct.pack("<12I", 0, 1, 255, 1, 128, 1, 255, 1, 128, 1, 255, 1)
    tags = {529: (5, struct.pack("<6I", 299, 1000, 587, 1000, 114, 1000), 3), 532: (5, usual, 6)}
    drawn = np.broadcast_to(np.array([200, 128, 128]), (*SIZE, 3))
    assert_equal(draw.tiff(drawn, 8, draw.YCBCR, tags=tags), np.full((*SIZE, 3), 200 / 255), 8)


@pytest.mark.parametrize("bits", [8, 10, 16])
@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("extras", [(0, 2), (2, 0), (0, 1), (0, 0, 2), (0, 0)])
def test_alpha_may_stand_behind_other_extra_samples(extras: tuple[int, ...], planar: bool, bits: int) -> None:
    for colours, photometric in ((1, draw.BLACK_IS_ZERO), (3, draw.TIFF_RGB)):
        drawn = samples(bits, colours + len(extras))
        place = next((colours + n for n, kind in enumerate(extras) if kind), None)
        right = [*range(colours), *([] if place is None else [place])]
        tags = {338: (3, struct.pack(f"<{len(extras)}H", *extras), len(extras))}
        stored = drawn.copy()
        if 1 in extras:
            drawn[..., place] = stored[..., place] = full(bits) // 2
            stored[..., :colours] = drawn[..., :colours] // 2
        made = read(draw.tiff(stored, bits, photometric, planar=planar, tags=tags))
        wanted = drawn[..., right[0]] if len(right) == 1 else drawn[..., right]
        assert made.shape == wanted.shape
        assert np.abs(made - wanted / full(bits)).max() * 255 <= (3 if 1 in extras else 0.5)


def test_a_thumbnail_is_not_taken_for_the_picture() -> None:
    drawn = RNG.integers(0, 256, (*SIZE, 3)).astype(np.uint8)

    def tiff(below: bool, **options: Any) -> bytes:
        file = io.BytesIO()
        with tifffile.TiffWriter(file, bigtiff=bool(options.pop("big", False))) as writer:
            small: Any = writer
            small.write(
                drawn[::4, ::4], photometric="rgb", subfiletype=1, subifds=1 if below else None, **options
            )
            small.write(drawn, photometric="rgb")
        return file.getvalue()

    for data in (tiff(False), tiff(False, big=True)):
        decoded = decode(io.BytesIO(data))
        assert np.array_equal(decoded.samples, drawn) and not decoded.notes
    with pytest.raises(ValueError, match="a thumbnail, and its picture in a directory below, which is not"):
        decode(io.BytesIO(tiff(True)))
    with pytest.raises(ValueError, match=r"raw \(DNG\), which is not read; save it as JPEG or PNG"):
        decode(io.BytesIO(tiff(True, extratags=[(50706, 1, 4, (1, 4, 0, 0), True)])))
    with pytest.raises(ValueError, match=r"raw \(DNG, or another camera's\), which is not read"):
        decode(io.BytesIO(draw.tiff(samples(16), 16, 32803)))
    alone = io.BytesIO()
    tifffile.imwrite(alone, drawn, photometric="rgb", subfiletype=1)
    assert np.array_equal(decode(io.BytesIO(alone.getvalue())).samples, drawn)


@pytest.mark.parametrize(
    "compression", ["raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "group4"]
)
def test_compressed_tiffs_as_pillow_reads_them(compression: str) -> None:
    pixels = RNG.integers(0, 256, (24, 31, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels).convert("1") if compression == "group4" else Image.fromarray(pixels)
    file = io.BytesIO()
    picture.save(file, "TIFF", compression=compression)
    with Image.open(io.BytesIO(file.getvalue())) as opened:
        right = np.array(opened.convert("L" if compression == "group4" else "RGB"))
    assert np.abs(read(file.getvalue()) * 255 - right).max() <= (2 if compression == "jpeg" else 0)


@pytest.mark.parametrize("compression", ["zstd", "lzma"])
@pytest.mark.parametrize("shape", [(24, 31), (24, 31, 3)])
def test_tiffs_in_compressions_of_tifffile_alone(compression: str, shape: tuple[int, ...]) -> None:
    for bits in (8, 16):
        drawn = RNG.integers(0, 2**bits, shape).astype(np.uint8 if bits == 8 else np.uint16)
        file = io.BytesIO()
        kind = "rgb" if len(shape) == 3 else "minisblack"
        tifffile.imwrite(file, drawn, compression=compression, photometric=kind)
        assert_equal(file.getvalue(), drawn / full(bits), bits)


@pytest.mark.parametrize("compression", [None, "jpeg"])
def test_ycbcr_tiffs_are_rgb(compression: str | None) -> None:
    picture = Image.new("RGB", (32, 24), (200, 60, 60)).convert("YCbCr")
    file = io.BytesIO()
    picture.save(file, "TIFF", compression=compression)
    assert np.abs(read(file.getvalue()) * 255 - (200, 60, 60)).max() <= 2


@pytest.mark.parametrize(
    "data",
    [
        draw.tiff(
            RNG.random(SIZE).astype(np.float32).view(np.uint32), 32, draw.BLACK_IS_ZERO, sample_format=3
        ),
        draw.tiff(samples(32), 32, draw.BLACK_IS_ZERO),
        draw.tiff(samples(16), 16, draw.BLACK_IS_ZERO, sample_format=2),
        draw.tiff(samples(8), 8, draw.BLACK_IS_ZERO, sample_format=2),
    ],
    ids=["float", "32 bits", "signed 16", "signed 8"],
)
def test_samples_without_an_agreed_white_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="no agreed white; save it with 8 or 16 bits a sample"):
        decode(io.BytesIO(data))


ORIENTED = {
    1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1), 8: lambda a: np.rot90(a, 1),
}  # fmt: skip


@pytest.mark.parametrize("orientation", ORIENTED)
def test_tiffs_and_deep_pngs_are_turned_with_their_alpha(orientation: int) -> None:
    drawn = samples(16, 4)
    right = ORIENTED[orientation](drawn) / full(16)
    tags = {274: (3, struct.pack("<H", orientation), 1)}
    assert_equal(draw.tiff(drawn, 16, extra=2, tags=tags), right, 16)
    grey = samples(12)
    made = read(draw.tiff(grey, 12, draw.BLACK_IS_ZERO, tags=tags))
    assert np.abs(made - ORIENTED[orientation](grey / full(12))).max() < 1e-4
    made = read(draw.tiff(np.dstack([grey >> 4, 0 * grey + 128, 0 * grey + 128]), 8, draw.YCBCR, tags=tags))
    assert np.abs(made[..., 0] - ORIENTED[orientation]((grey >> 4) / 255)).max() < 2 / 255
    exif = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0" + struct.pack("<HH", orientation, 0) + b"\0\0\0\0"
    assert_equal(draw.png(drawn, 16, draw.RGBA, chunks=[(b"eXIf", exif)]), right, 16)


def animation(kind: str) -> bytes:
    frames = [Image.new("RGB", (20, 16), (80 * n, 0, 0)) for n in range(3)]
    file = io.BytesIO()
    frames[0].save(file, kind, save_all=True, append_images=frames[1:])
    return file.getvalue()


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_several_frames_the_first_is_read_and_that_is_said(kind: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(animation(kind))
    photo = load_image(tmp_path / "a")
    assert photo.pixels.max() <= 4
    assert photo.notes == ("the first of 3 frames or pages; the others are not read",)


@pytest.mark.parametrize("mode", ["P", "L"])
def test_a_gif_is_transparent_where_its_first_frame_has_no_pixels(mode: str) -> None:
    """As browsers show it: none paints the canvas in the background's colour."""
    picture = Image.fromarray(samples(8, 3).astype(np.uint8)).convert(mode)
    file = io.BytesIO()
    picture.save(file, "GIF")
    data = bytearray(file.getvalue())
    at = data.index(b"," + struct.pack("<4H", 0, 0, SIZE[1], SIZE[0]))
    data[6:10] = struct.pack("<HH", SIZE[1] + 9, SIZE[0] + 5)  # a larger canvas
    data[at + 1 : at + 5] = struct.pack("<HH", 4, 3)  # and the frame inside it
    decoded = decode(io.BytesIO(bytes(data)))
    assert decoded.alpha is not None
    inside = np.zeros((SIZE[0] + 5, SIZE[1] + 9), bool)
    inside[3 : 3 + SIZE[0], 4 : 4 + SIZE[1]] = True
    assert np.array_equal(decoded.alpha == 255, inside) and np.array_equal(decoded.alpha == 0, ~inside)
    other = pyvips.Image.gifload_buffer(bytes(data)).numpy()
    colours = decoded.samples if decoded.samples.ndim == 3 else np.stack([decoded.samples] * 3, -1)
    assert np.array_equal(colours[inside], other[inside][:, :3])


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_that_lost_samples_is_said_to_be_damaged(progressive: bool) -> None:
    file = io.BytesIO()
    Image.fromarray(samples_of_a_slope()).save(file, "JPEG", quality=90, progressive=progressive)
    data = file.getvalue()
    half, scan = len(data) // 2, data.index(b"\xff\xda")
    assert not decode(io.BytesIO(data)).notes and not decode(io.BytesIO(data + bytes(99))).notes
    harmless = data[:scan] + bytes(3) + data[scan:]  # which decoders skip
    assert not decode(io.BytesIO(harmless)).notes
    for kept in (half, len(data) - 40):
        damaged = data[:kept] + b"\xff\xd9"
        (note,) = decode(io.BytesIO(damaged)).notes
        assert note.startswith("damaged (")


def samples_of_a_slope() -> np.ndarray:
    rows, columns = np.mgrid[:64, :64]
    noise = np.random.default_rng(3).integers(0, 60, (64, 64, 3))
    return (np.stack([rows, columns, rows + columns], -1) + noise).astype(np.uint8)


def test_transparency_of_bmps_of_16_bits_is_said_to_be_lost() -> None:
    words = samples(16).astype("<u2")
    rows = b"".join(row.tobytes().ljust(36, b"\0") for row in words)

    def bmp(masks: tuple[int, ...]) -> bytes:
        header = struct.pack("<IiiHHIIiiII", 108, SIZE[1], SIZE[0], 1, 16, 3, len(rows), 2835, 2835, 0, 0)
        header = (header + struct.pack("<4I", *masks)).ljust(108, b"\0")
        return b"BM" + struct.pack("<IHHI", 14 + 108 + len(rows), 0, 0, 14 + 108) + header + rows

    assert decode(io.BytesIO(bmp((0x7C00, 0x3E0, 0x1F, 0x8000)))).notes
    assert not decode(io.BytesIO(bmp((0x7C00, 0x3E0, 0x1F, 0)))).notes


def test_avif_is_read() -> None:
    pixels = np.zeros((24, 32, 3), np.uint8) + np.array([200, 60, 60], np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "AVIF", quality=90)
    assert np.abs(read(file.getvalue()) * 255 - pixels).max() <= 4


def avif(pixels: np.ndarray, **options: object) -> bytes:
    import pyvips

    image: Any = pyvips.Image.new_from_array(pixels)
    image = image.copy(interpretation="rgb16" if pixels.dtype == np.uint16 else "srgb")
    return image.heifsave_buffer(compression="av1", **options)


def test_deep_avifs_use_the_whole_range() -> None:
    white = np.full((32, 32, 3), 65535, np.uint16)
    for bits in (10, 12):
        decoded = decode(io.BytesIO(avif(white, bitdepth=bits, lossless=True)))
        assert decoded.samples.dtype == np.uint16 and decoded.samples.min() == 65535


def test_grey_avifs_stay_grey_in_their_whole_range() -> None:
    ramp = np.repeat(np.linspace(0, 255, 64).round().astype(np.uint8)[None], 48, axis=0)
    for option in ("full", "limited"):
        file = io.BytesIO()
        Image.fromarray(ramp).save(file, "AVIF", quality=100, subsampling="4:0:0", range=option)
        decoded = decode(io.BytesIO(file.getvalue()))
        assert decoded.model == "grey" and np.abs(decoded.samples.astype(int) - ramp).max() <= 3


@pytest.mark.parametrize("full_range, bits", [(False, 8), (True, 8), (True, 10), (True, 12)])
def test_the_range_of_a_grey_avif_without_a_box_of_colours(full_range: bool, bits: int) -> None:
    """It stands in the coded picture alone."""
    ramp = np.repeat(np.linspace(20, 230, 64).round().astype(np.uint8)[None], 48, axis=0)
    file = io.BytesIO()
    if bits == 8:
        option = "full" if full_range else "limited"
        Image.fromarray(ramp).save(file, "AVIF", quality=100, subsampling="4:0:0", range=option)
    else:
        deep = (ramp.astype(np.uint32) * full(bits) // 255).astype(np.uint16)
        file.write(imagecodecs.avif_encode(deep, bitspersample=bits, level=100, numthreads=1))
    decoded = decode(io.BytesIO(file.getvalue().replace(b"colrnclx", b"freenclx")))
    most = np.iinfo(decoded.samples.dtype).max
    assert decoded.model == "grey" and np.abs(decoded.samples / most * 255 - ramp).max() <= 2


def test_colours_of_an_avif_that_are_multiplied_with_its_alpha() -> None:
    pixels = np.zeros((32, 48, 4), np.uint8) + np.array([200, 60, 100, 0], np.uint8)
    pixels[..., 3] = np.where(np.arange(48) < 16, 90, np.where(np.arange(48) < 32, 180, 255))
    for drawn, subsampling in ((pixels, "4:4:4"), (pixels[..., [0, 0, 0, 3]], "4:0:0")):
        file = io.BytesIO()
        options: dict[str, Any] = {"quality": 100, "subsampling": subsampling}
        Image.fromarray(drawn).save(file, "AVIF", alpha_premultiplied=True, **options)
        decoded = decode(io.BytesIO(file.getvalue()))
        other = np.array(Image.open(file))
        grey = decoded.model == "grey"
        assert np.abs(decoded.samples.astype(int) - (other[..., 0] if grey else other[..., :3])).max() <= 1
        assert np.abs(decoded.samples.astype(int) - (drawn[..., 0] if grey else drawn[..., :3])).max() <= 4
        assert decoded.alpha is not None and np.array_equal(decoded.alpha, drawn[..., 3])


def test_what_an_avif_says_of_its_colours_counts() -> None:
    data = avif(np.full((32, 32, 3), 128, np.uint8), lossless=True)
    at = data.index(b"colrnclx") + 8
    wide = data[:at] + struct.pack(">HH", 12, 13) + data[at + 4 :]  # Display P3
    assert decode(io.BytesIO(wide)).colour_chunks == ((b"cICP", bytes([12, 13, 0, 1])),)
    assert load_image(io.BytesIO(wide)).icc_profile is not None


@pytest.mark.parametrize("colour, bits", [(draw.RGB, 8), (draw.GREY, 8), (draw.GREY, 4), (draw.RGB, 16)])
def test_a_damaged_png_is_refused_not_painted_black(colour: int, bits: int) -> None:
    whole = draw.png(samples(bits, draw.CHANNELS[colour]), bits, colour)
    for at in range(whole.index(b"IDAT") + 4, whole.index(b"IEND") - 8, 7):
        with pytest.raises(ValueError, match="not a readable picture"):
            decode(io.BytesIO(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :]))


@pytest.mark.parametrize("bits", [8, 16])
def test_tiffs_of_tiles_in_planes(bits: int) -> None:
    drawn = RNG.integers(0, 2**bits, (40, 50, 3)).astype(np.uint8 if bits == 8 else np.uint16)
    file = io.BytesIO()
    planes = np.moveaxis(drawn, -1, 0)
    tifffile.imwrite(file, planes, photometric="rgb", planarconfig="separate", tile=(16, 32))
    assert_equal(file.getvalue(), drawn / full(bits), bits)


def test_a_tiff_with_fewer_tiles_than_pixels_is_refused() -> None:
    drawn = RNG.integers(0, 256, (40, 50, 3)).astype(np.uint8)
    file = io.BytesIO()
    tifffile.imwrite(file, drawn, photometric="rgb", tile=(16, 16))
    data = file.getvalue()
    wide = data.replace(struct.pack("<HHII", 256, 3, 1, 50), struct.pack("<HHII", 256, 4, 1, 100_000))
    wide = wide.replace(struct.pack("<HHII", 256, 4, 1, 50), struct.pack("<HHII", 256, 4, 1, 100_000))
    assert wide != data
    with pytest.raises(ValueError, match="12 of its 18,750 tiles are there"):
        decode(io.BytesIO(wide))


UNREAD = {
    b"\0\0\0\x18ftypheic\0\0\0\0mif1heic": "HEIC",
    b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic": "HEIC",
    b"\xff\x0a\xfa\x1f": "JPEG XL",
    b"\0\0\0\x0cJXL \r\n\x87\n": "JPEG XL",
    b"\0\0\0\x0cjP  \r\n\x87\n": "JPEG 2000",
    b"8BPS\0\1": "Photoshop (PSD)",
    b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'/>": "SVG",
    b"\n<!DOCTYPE html><html>": "web page",
    b"P6\n4 4\n255\n": "PPM",
    b"\0\0\2" + bytes(9) + b"\4\0\4\0\x18\0": "TGA",
    b"\n\5\1\1": "PCX",
    b"\0\0\0\x18ftypisom\0\0\0\0isommp42": "video (MP4 or MOV)",
}


@pytest.mark.parametrize("head", UNREAD, ids=UNREAD.values())
def test_what_is_not_read_is_named_with_the_way_out(head: bytes) -> None:
    assert format_of(head) == UNREAD[head]
    with pytest.raises(ValueError) as caught:
        decode(io.BytesIO(head + bytes(600)))
    assert str(caught.value) == f"{UNREAD[head]}, which is not read; save it as JPEG or PNG"


def test_the_limit_is_the_machines_memory_or_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    data = draw.png(np.zeros((40, 50), np.uint8), 1, draw.GREY)
    monkeypatch.setenv(module.MAX_PIXELS, "1999")
    with pytest.raises(
        ValueError, match="50 x 40 pixels, .* allows 1,999; make it smaller, or set MSBD_MAX_PIXELS"
    ):
        decode(io.BytesIO(data))
    monkeypatch.setenv(module.MAX_PIXELS, "2000")
    assert decode(io.BytesIO(data)).samples.shape == (40, 50)
    monkeypatch.delenv(module.MAX_PIXELS)
    assert module.largest_picture() > 10_000_000


@pytest.fixture
def asked_anew() -> Iterator[Callable[[], int]]:
    """`memory_allowed`, which is else asked for once."""

    def ask() -> int:
        module.memory_allowed.cache_clear()
        return module.memory_allowed()

    yield ask
    module.memory_allowed.cache_clear()


def test_a_containers_limit_of_memory_counts(
    asked_anew: Callable[[], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [tmp_path / "memory.max", tmp_path / "memory.limit_in_bytes", tmp_path / "none"]
    files[0].write_text("max\n")
    files[1].write_text(f"{2**63 - 4096}\n")
    monkeypatch.setattr(module, "CONTAINER_LIMITS", files)
    whole = asked_anew()
    files[0].write_text("64000000\n")
    assert asked_anew() == 64_000_000 < whole
    monkeypatch.delenv(module.MAX_PIXELS, raising=False)
    assert module.largest_picture() == 4_000_000


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
def test_a_limit_of_the_shell_counts(asked_anew: Callable[[], int], monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda _: (10**9, 10**9))
    assert asked_anew() == 10**9
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    assert asked_anew() > 10**9


FORKED = """
import io, os, signal, sys
from tests.helpers import draw_files as draw
from msbd.pixels.decode import decode
import numpy as np
data = draw.tiff(np.zeros((9, 9, 3)), 16)
decode(io.BytesIO(data))
if os.fork() == 0:
    signal.alarm(60)
    try:
        decode(io.BytesIO(data))
    except ImportError as error:
        os._exit(7 if "start workers by spawn" in str(error) else 8)
    os._exit(9)
sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_is_told_rather_than_hanging() -> None:
    """libvips hung in about one forked process of ten."""
    done = subprocess.run([sys.executable, "-c", FORKED], cwd=Path(__file__).parents[3], timeout=120)
    assert done.returncode == 7
