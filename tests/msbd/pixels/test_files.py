import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, UnidentifiedImageError

from msbd.pixels.files import (
    Photo,
    check_output_path,
    load_image,
    load_mask,
    save_image,
)
from msbd.pixels.samples import to_image, to_pixels

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def noise(height: int = 20, width: int = 30, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def stored(picture: Image.Image, path: Path, **options: Any) -> Path:
    picture.save(path, **options)
    return path


def test_pixels_to_image_and_back_keeps_all_256_levels() -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    image = to_image(pixels)
    assert image.shape == (1, 3, 16, 16) and image.min() == -1 and image.max() == 1
    assert np.array_equal(to_pixels(image), pixels)


def test_to_pixels_rounds_and_clamps() -> None:
    image = torch.tensor([-2.0, 100.4 / 127.5 - 1, 100.6 / 127.5 - 1, 3.0]).view(1, 1, 1, 4)
    assert to_pixels(image).flatten().tolist() == [0, 100, 101, 255]


def test_save_then_load_png_returns_the_same_bytes(tmp_path: Path) -> None:
    pixels, alpha = noise(), noise(channels=1)[..., 0]
    save_image(pixels, tmp_path / "a.png", alpha=alpha, icc_profile=SRGB)
    photo = load_image(tmp_path / "a.png")
    assert np.array_equal(photo.pixels, pixels) and photo.size == (20, 30)
    assert photo.alpha is not None and np.array_equal(photo.alpha, alpha)
    assert photo.icc_profile == SRGB
    save_image(to_image(pixels), tmp_path / "b.png")
    assert np.array_equal(load_image(tmp_path / "b.png").pixels, pixels)
    assert load_image(tmp_path / "b.png").alpha is None


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16"])
def test_load_image_and_mask_of_every_mode(mode: str, tmp_path: Path) -> None:
    white = np.zeros((20, 30, 3), np.uint8)
    white[5:15, 10:20] = 255
    deep = mode == "I;16"
    picture = Image.fromarray(white[..., 0].astype(np.uint16) * 257 if deep else white)
    picture = picture if deep else picture.convert(mode)
    suffix = "png" if mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16") else "tif"
    path = tmp_path / f"a.{suffix}"
    picture.save(path)
    photo = load_image(path)
    assert photo.pixels.shape == (20, 30, 3) and photo.pixels.dtype == np.uint8
    assert np.abs(photo.pixels.astype(int) - white).max() <= 2
    assert photo.model == ("grey" if mode in ("1", "L", "LA", "I;16") else "rgb")
    assert photo.samples.dtype == (np.uint16 if mode == "I;16" else np.uint8)
    assert (photo.alpha is not None) == (mode in ("LA", "RGBA"))
    mask = load_mask(path)
    assert mask.shape == (1, 1, 20, 30) and np.array_equal(mask[0, 0].numpy() > 0, white[..., 0] > 0)


def test_16_bit_grey_keeps_its_depth_and_is_shown_rounded(tmp_path: Path) -> None:
    levels = np.array([[0, 128, 129, 257 * 77, 65535]], dtype=np.uint16)
    path = stored(Image.fromarray(levels), tmp_path / "a.png")
    photo = load_image(path)
    assert np.array_equal(photo.samples, levels)
    assert photo.pixels[0, :, 0].tolist() == [0, 0, 1, 77, 255]


def test_load_image_of_a_transparent_palette_keeps_colours_and_alpha(tmp_path: Path) -> None:
    picture = Image.fromarray(noise()).quantize(8)
    path = stored(picture, tmp_path / "a.png", transparency=3)
    photo = load_image(path)
    assert photo.alpha is not None and np.array_equal(photo.alpha == 0, np.array(picture) == 3)
    assert np.array_equal(photo.pixels, np.array(picture.convert("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_load_image_applies_the_exif_orientation_once(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = {1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1]} | {
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, 1),
    }
    pixels = noise()
    path = stored(Image.fromarray(pixels), tmp_path / "a.png", exif=exif)
    photo = load_image(path)
    assert np.array_equal(photo.pixels, upright[orientation](pixels))
    save_image(photo.pixels, tmp_path / "b.png")
    assert np.array_equal(load_image(tmp_path / "b.png").pixels, photo.pixels)


def test_a_profile_that_is_srgb_changes_no_level_and_a_damaged_one_says_nothing(tmp_path: Path) -> None:
    pixels = noise()
    path = stored(Image.fromarray(pixels), tmp_path / "a.png", icc_profile=SRGB)
    photo = load_image(path)
    assert photo.icc_profile == SRGB
    assert np.array_equal(photo.pixels, pixels) and np.array_equal(to_pixels(photo.image), pixels)
    photo = load_image(stored(Image.fromarray(pixels), tmp_path / "b.png", icc_profile=b"not a profile"))
    assert np.array_equal(photo.pixels, pixels) and photo.icc_profile is None


def png_that_claims(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


def broken_files() -> dict[str, bytes]:
    png, jpg = io.BytesIO(), io.BytesIO()
    Image.fromarray(noise(64, 64)).save(png, "PNG")
    Image.fromarray(noise(64, 64)).save(jpg, "JPEG")
    return {
        "empty.png": b"",
        "text.png": b"this is not a picture",
        "cut.png": png.getvalue()[:900],
        "cut.jpg": jpg.getvalue()[:900],
        "bomb.png": png_that_claims(60000, 60000),
        "header.png": png.getvalue()[:20],
        "postscript.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n",
    }


@pytest.mark.parametrize("name", broken_files())
def test_unreadable_files_are_one_clear_line(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(broken_files()[name])
    for load in (load_image, load_mask):
        with pytest.raises(ValueError, match=name) as caught:
            load(path)
        assert "\n" not in str(caught.value) and not isinstance(caught.value, UnidentifiedImageError)


def test_postscript_never_reaches_ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(broken_files()["postscript.jpg"])
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(ValueError, match="PostScript, which is not read"):
        load_image(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name, longest", [("a.webp", 16383), ("a.jpg", 65500), ("a.jpeg", 65500)])
def test_a_format_that_cannot_hold_the_size_is_refused_early(name: str, longest: int, tmp_path: Path) -> None:
    assert check_output_path(tmp_path / name, (longest, 10)) == Path(name).suffix
    with pytest.raises(ValueError, match=f"at most {longest} pixels a side, not {longest + 1}; write a .png"):
        check_output_path(tmp_path / name, (10, longest + 1))
    assert check_output_path(tmp_path / "a.png", (10, 100_000)) == ".png"


def test_a_missing_file_and_a_folder_are_said_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_image(tmp_path / "none.png")
    with pytest.raises(ValueError, match="not a readable picture"):
        load_image(tmp_path)


def test_load_mask_threshold_invert_and_alpha(tmp_path: Path) -> None:
    grey = np.array([[0, 127, 128, 255]], dtype=np.uint8)
    path = stored(Image.fromarray(grey), tmp_path / "m.png")
    assert load_mask(path).flatten().tolist() == [0, 0, 1, 1]
    assert load_mask(path, invert=True).flatten().tolist() == [1, 1, 0, 0]
    with pytest.raises(ValueError, match="transparency"):
        load_mask(path, from_alpha=True)
    rgba = np.dstack([np.full((1, 4, 3), 255, np.uint8), grey])
    path = stored(Image.fromarray(rgba), tmp_path / "a.png")
    assert load_mask(path, from_alpha=True).flatten().tolist() == [1, 1, 0, 0]
    assert load_mask(path).flatten().tolist() == [0, 0, 1, 1]  # transparent white is black


def test_png_metadata_can_be_read_back(tmp_path: Path) -> None:
    metadata = {
        "prompt": "ein Haus – 家",
        "negative_prompt": "blurry",
        "seed": 7,
        "steps": 50,
        "tile": [768, 768],
    }
    save_image(noise(), tmp_path / "a.png", metadata=metadata)
    with Image.open(tmp_path / "a.png") as picture:
        assert json.loads(picture.info["msbd"]) == metadata
        first, second, third = picture.info["parameters"].split("\n")
    assert first == metadata["prompt"] and second == "Negative prompt: blurry"
    assert third.startswith("Seed: 7, Steps: 50")


def test_webp_is_lossless_also_under_transparency(tmp_path: Path) -> None:
    pixels, alpha = noise(), np.zeros_like(noise()[..., 0])
    save_image(pixels, tmp_path / "a.webp", alpha=alpha)
    photo = load_image(tmp_path / "a.webp")
    assert np.array_equal(photo.pixels, pixels)
    assert photo.alpha is not None and np.array_equal(photo.alpha, alpha)


@pytest.mark.parametrize("suffix", ["jpg", "JPEG", "webp"])
def test_other_formats_than_png_are_close_and_carry_metadata(suffix: str, tmp_path: Path) -> None:
    pixels = np.linspace(0, 255, 40 * 60 * 3).reshape(40, 60, 3).astype(np.uint8)
    path = tmp_path / f"a.{suffix}"
    save_image(pixels, path, metadata={"prompt": "Größe", "seed": 7}, icc_profile=SRGB)
    photo = load_image(path)
    assert np.abs(photo.pixels.astype(int) - pixels).mean() < 3 and photo.icc_profile == SRGB
    with Image.open(path) as picture:
        comment = picture.getexif().get_ifd(0x8769)[0x9286]
    assert json.loads(bytes(comment)[8:])["prompt"] == "Größe"


@pytest.mark.parametrize(
    "name, reason", [("a.bmp", "type '.bmp'"), ("a", "no suffix"), ("none/a.png", "does not exist")]
)
def test_save_image_refuses_a_bad_path_before_it_writes(name: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=reason):
        save_image(noise(), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_save_image_refuses_transparency_in_a_jpeg(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="transparency"):
        save_image(noise(), tmp_path / "a.jpg", alpha=noise(channels=1)[..., 0])


def test_save_image_leaves_the_old_file_when_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.png"
    save_image(noise(seed=1), path)
    before = path.read_bytes()

    def fail_half_way(self: Path, data: bytes) -> None:
        with self.open("wb") as file:
            file.write(data[:4])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", fail_half_way)
    with pytest.raises(OSError, match="disk full"):
        save_image(noise(seed=2), path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_photo_image_is_the_pixels_in_minus_one_to_one() -> None:
    pixels = noise()
    assert np.array_equal(to_pixels(Photo(pixels).image), pixels)
