"""Numbers mean colours: by ICC, against LittleCMS (Pillow); by a PNG's chunks, against the formulas
themselves.
"""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from msbd.pixels.colours import from_srgb, is_srgb, profile_of, to_srgb
from msbd.pixels.files import Photo, load_image, save_photo
from msbd.pixels.icc import Chromaticities, Shaper, made_profile, power_curve, srgb_curve
from msbd.pixels.tags import ASCII, SHORT, Tags, Value
from tests.helpers import draw_files as draw

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
P3 = (0.3127, 0.3290, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060)
FILM = (0.310, 0.316, 0.681, 0.319, 0.243, 0.692, 0.145, 0.049)  # H.273, table 2
XYZ = (1 / 3, 1 / 3, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0)
EBU = (0.3127, 0.3290, 0.630, 0.340, 0.295, 0.605, 0.155, 0.077)
SWAPPED = (0.3127, 0.3290, 0.30, 0.60, 0.64, 0.33, 0.15, 0.06)  # red's numbers are shown green
FILL = (200, 60, 60)


def gamma_profile(model: str, gamma: float, places: Chromaticities = P3) -> bytes:
    made = made_profile(model, power_curve(gamma), places)
    assert made is not None
    return made


PROFILES = {
    "display p3": made_profile("rgb", srgb_curve(), P3),
    "linear": gamma_profile("rgb", 1.0),
    "gamma 1.8": gamma_profile("rgb", 1.8),
    "red and green exchanged": made_profile("rgb", srgb_curve(), SWAPPED),
}
GREY_PROFILES = {"linear": gamma_profile("grey", 1.0), "gamma 1.8": gamma_profile("grey", 1.8)}


def noise(*shape: int, bits: int = 8) -> np.ndarray:
    kind = np.uint8 if bits == 8 else np.uint16
    return np.random.default_rng(2).integers(0, 2**bits, shape).astype(kind)


def by_littlecms(pixels: np.ndarray, profile: bytes, mode: str = "RGB") -> np.ndarray:
    """8 bits to sRGB through Pillow's LittleCMS, relative colorimetric."""
    source, srgb = (ImageCms.ImageCmsProfile(io.BytesIO(one)) for one in (profile, SRGB))
    transform = ImageCms.buildTransform(source, srgb, mode, "RGB", ImageCms.Intent.RELATIVE_COLORIMETRIC)
    made: Any = ImageCms.applyTransform(Image.fromarray(pixels, mode), transform)
    return np.array(made)


def srgb_of_light(light: np.ndarray) -> np.ndarray:
    """IEC 61966-2-1, levels of 255."""
    return 255 * np.where(
        light <= 0.0031308, 12.92 * light, 1.055 * np.maximum(light, 1e-9) ** (1 / 2.4) - 0.055
    )


@pytest.mark.parametrize("name", PROFILES)
def test_samples_mean_what_their_profile_says(name: str) -> None:
    profile = PROFILES[name]
    assert profile is not None
    pixels = noise(30, 40, 3)
    right = by_littlecms(pixels, profile).astype(int)
    assert np.abs(to_srgb(pixels, "rgb", profile) * 255 - right).max() <= 1
    deep = pixels.astype(np.uint16) * 257
    assert np.abs(to_srgb(deep, "rgb", profile) * 255 - right).max() <= 1


@pytest.mark.parametrize("name", PROFILES)
def test_there_and_back_gives_the_same_samples(name: str) -> None:
    profile = PROFILES[name]
    pixels = noise(30, 40, 3, bits=16) // 4 + 24000
    shown = to_srgb(pixels, "rgb", profile)
    inside = ((shown > 0) & (shown < 1)).all(-1)  # sRGB's gamut
    back = from_srgb(shown, "rgb", profile) * 65535
    assert inside.mean() > 0.5 and np.abs(back - pixels)[inside].max() <= 2


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize("bits", [8, 16])
def test_what_is_painted_is_shown_as_it_was_meant(name: str, bits: int, tmp_path: Path) -> None:
    """The worst case of the corpora was green for red."""
    pixels = noise(40, 50, 3, bits=bits)
    profile = PROFILES[name]
    photo = Photo(pixels, icc_profile=profile)
    weight = torch.zeros(1, 1, 40, 50)
    weight[..., 10:30, 5:35] = 1
    fill = torch.tensor(FILL).view(1, 3, 1, 1).expand(1, 3, 40, 50) / 127.5 - 1
    painted = photo.painted(fill, weight)
    inside = weight[0, 0].numpy() > 0
    assert np.array_equal(painted.samples[~inside], pixels[~inside])
    save_photo(painted, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.info["icc_profile"] == profile
    written = imagecodecs.png_decode((tmp_path / "a.png").read_bytes())
    assert profile is not None and written.dtype == pixels.dtype
    shown = by_littlecms((written / (257 if bits == 16 else 1)).round().astype(np.uint8), profile)
    assert np.abs(shown[inside].astype(int) - FILL).max() <= 2


@pytest.mark.parametrize("name", GREY_PROFILES)
def test_grey_profiles_act_and_stay(name: str, tmp_path: Path) -> None:
    profile = GREY_PROFILES[name]
    level = np.full((8, 9), 128, np.uint8)
    gamma = 1.0 if name == "linear" else 1.8
    right = srgb_of_light(np.array((128 / 255) ** gamma))  # 188 of the linear one
    assert gamma != 1 or abs(float(right) - 188) < 0.6
    file = io.BytesIO()
    Image.fromarray(level).save(file, "PNG", icc_profile=profile)
    (tmp_path / "a.png").write_bytes(file.getvalue())
    photo = load_image(tmp_path / "a.png")
    assert np.abs(photo.pixels - right).max() <= 1 and np.array_equal(photo.samples, level)
    assert abs(float(photo.image.mean()) - (right / 127.5 - 1)) < 1 / 127.5
    back = photo.samples_of(photo.image)
    assert np.abs(back.astype(int) - 128).max() <= 1
    for suffix in (".png", ".jpg", ".tif"):
        save_photo(photo, tmp_path / f"b{suffix}")
        again = load_image(tmp_path / f"b{suffix}")
        assert again.icc_profile == profile and again.model == "grey"


def test_a_colour_on_a_grey_picture_becomes_its_luma() -> None:
    fill = torch.tensor(FILL).view(1, 3, 1, 1).expand(1, 3, 4, 4) / 127.5 - 1
    right = int(np.array(Image.new("RGB", (1, 1), FILL).convert("L"))[0, 0])
    for profile in (None, *GREY_PROFILES.values()):
        photo = Photo(np.zeros((4, 4), np.uint8), icc_profile=profile)
        made = Photo(photo.samples_of(fill), icc_profile=profile)
        assert made.model == "grey" and np.abs(made.pixels.astype(int) - right).max() <= 1


GAMMAS = [100000, 55556, 40000, 250000, 35000]


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("bits", [8, 16])
def test_gama_of_a_png_is_read_and_kept(gamma: int, bits: int, tmp_path: Path) -> None:
    drawn = noise(20, 30, 3, bits=bits)
    (tmp_path / "a.png").write_bytes(draw.png(drawn, bits, chunks=[(b"gAMA", struct.pack(">I", gamma))]))
    photo = load_image(tmp_path / "a.png")
    right = srgb_of_light((drawn / (2**bits - 1)) ** (100000 / gamma))
    bright = right > 20  # in the dark one level of 8 bits is many of sRGB's
    assert np.abs(photo.pixels - right)[bright].max() <= (1.01 if bits == 16 or gamma > 40000 else 2)
    save_photo(photo, tmp_path / "b.png")
    with Image.open(tmp_path / "b.png") as picture:
        assert picture.info["gamma"] == gamma / 100000 and "icc_profile" not in picture.info
    save_photo(photo, tmp_path / "b.tif")  # which knows no gAMA, and gets a profile
    again = load_image(tmp_path / "b.tif")
    assert np.array_equal(again.samples, photo.samples) and np.array_equal(again.pixels, photo.pixels)


def test_chrm_of_a_png_moves_colours_as_its_primaries_say(tmp_path: Path) -> None:
    drawn = noise(20, 30, 3) // 2 + 60
    places = struct.pack(">8I", *(round(100000 * number) for number in P3))
    chunks = [(b"gAMA", struct.pack(">I", 45455)), (b"cHRM", places)]
    (tmp_path / "a.png").write_bytes(draw.png(drawn, chunks=chunks))
    # Display P3 to sRGB, both of D65: the matrix of CSS Color 4, section 10.
    matrix = np.array([[1.2249, -0.2247, 0], [-0.0420, 1.0419, 0], [-0.0197, -0.0786, 1.0979]])
    light = (drawn / 255) ** 2.2 @ matrix.T
    right = srgb_of_light(light.clip(0, 1))
    assert np.abs(load_image(tmp_path / "a.png").pixels - right).max() <= 3


def test_what_says_a_pngs_colours_by_precedence() -> None:
    """cICP before iCCP before sRGB before gAMA and cHRM (PNG, third edition, 4.3)."""
    gamma, standard = (b"gAMA", struct.pack(">I", 100000)), (b"sRGB", b"\0")
    cicp = (b"cICP", bytes([12, 13, 0, 1]))  # Display P3
    icc = PROFILES["linear"]
    linear = profile_of("rgb", None, [gamma])
    assert linear is not None and linear != icc
    assert profile_of("rgb", None, [gamma, standard]) is None
    assert profile_of("rgb", icc, [gamma, standard]) == icc
    assert profile_of("rgb", icc, [cicp, gamma]) == PROFILES["display p3"]
    assert profile_of("rgb", icc, [(b"cICP", bytes([12, 255, 0, 1]))]) == icc  # a transfer that nobody knows
    assert profile_of("rgb", None, [(b"gAMA", struct.pack(">I", 45455))]) is None  # what PNGs of sRGB say
    assert profile_of("rgb", None, [(b"gAMA", struct.pack(">I", 0))]) is None
    assert profile_of("rgb", None, [(b"cHRM", bytes(32))]) is None


def test_what_stands_behind_a_pngs_pixels_says_nothing_of_its_colours(tmp_path: Path) -> None:
    drawn = noise(9, 7, 3)
    data = draw.png(drawn)
    end = data.index(b"IEND") - 4
    profile = b"x\0\0" + zlib.compress(PROFILES["linear"] or b"")
    for name, said in ((b"gAMA", struct.pack(">I", 100000)), (b"cICP", b"\1\x08\0\1"), (b"iCCP", profile)):
        (tmp_path / "a.png").write_bytes(draw.png(drawn, chunks=[(name, said)]))
        assert load_image(tmp_path / "a.png").icc_profile is not None
        (tmp_path / "a.png").write_bytes(data[:end] + draw.chunk(name, said) + data[end:])
        assert np.array_equal(load_image(tmp_path / "a.png").pixels, drawn)


@pytest.mark.parametrize(
    "places",
    [bytes(32), struct.pack(">8I", *[31270, 32900, 64000, 33000, 64000, 33000, 15000, 6000])],
    ids=["nothing", "two the same"],
)
def test_impossible_primaries_leave_the_gamma_in_force(places: bytes) -> None:
    gamma = (b"gAMA", struct.pack(">I", 100000))
    assert profile_of("rgb", None, [gamma, (b"cHRM", places)]) == profile_of("rgb", None, [gamma])
    white_outside = (0.3127, 0.3290, 0.7347, 0.2653, 0.0, 1.0, 0.0001, 1.0)
    assert made_profile("rgb", srgb_curve(), white_outside) is None


@pytest.mark.parametrize("code, places", [(8, FILM), (10, XYZ), (22, EBU)])
def test_primaries_of_film_xyz_and_ebu(code: int, places: Chromaticities) -> None:
    """By the definition of primaries, and sRGB's matrix (IEC 61966-2-1)."""
    profile = profile_of("rgb", None, [(b"cICP", bytes([code, 8, 0, 1]))])
    points = np.array(places).reshape(4, 2)
    xyz = np.column_stack([points, 1 - points.sum(1)])
    own = xyz[1:].T * np.linalg.solve(xyz[1:].T, xyz[0] / xyz[0, 1])
    # Von Kries' adaptation of the white, by Bradford's cones, to D65.
    cones = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    scale = (cones @ [0.3127 / 0.329, 1, 0.3583 / 0.329]) / (cones @ own.sum(1))
    own = np.linalg.inv(cones) @ np.diag(scale) @ cones @ own
    to_light = np.array([[3.2406, -1.5372, -0.4986], [-0.9689, 1.8758, 0.0415], [0.0557, -0.2040, 1.0570]])
    pixels = noise(20, 30, 3)
    right = srgb_of_light((pixels / 255 @ own.T @ to_light.T).clip(0, 1))
    assert np.abs(to_srgb(pixels, "rgb", profile) * 255 - right).max() <= 1.5


@pytest.mark.parametrize(
    "transfer, level, light",  # H.273, table 3
    [(7, 0.08, 0.02), (7, 0.7, (0.8115 / 1.1115) ** (1 / 0.45)), (9, 0.5, 0.1), (10, 0.6, 0.1),
     (17, 0.5, 52.37 / 48 * 0.5**2.6)],
)  # fmt: skip
def test_transfers_of_film_and_of_old_hdtv(transfer: int, level: float, light: float) -> None:
    profile = profile_of("grey", None, [(b"cICP", bytes([1, transfer, 0, 1]))])
    shown = to_srgb(np.full((1, 1), round(level * 65535), np.uint16), "grey", profile)
    assert np.abs(shown * 255 - srgb_of_light(np.array(light))).max() < 0.5


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("model", ["rgb", "grey"])
def test_the_narrow_range_of_a_cicp_is_read_and_painted_in(model: str, bits: int, tmp_path: Path) -> None:
    drawn = noise(20, 30, *([3] if model == "rgb" else []), bits=bits)
    chunks = [(b"cICP", bytes([1, 13, 0, 0]))]
    colour = draw.RGB if model == "rgb" else draw.GREY
    (tmp_path / "a.png").write_bytes(draw.png(drawn, bits, colour, chunks=chunks))
    photo = load_image(tmp_path / "a.png")
    right = ((drawn / 2 ** (bits - 8) - 16) / 219 * 255).clip(0, 255)
    right = right if model == "rgb" else np.repeat(right[..., None], 3, -1)
    assert np.abs(photo.pixels - right).max() <= 1 and not photo.notes
    for shown, narrow in ((-1, 16), (1, 235), (0, 125.5)):
        painted = photo.samples_of(torch.full((1, 3, 1, 1), float(shown))) / 2 ** (bits - 8)
        assert np.abs(painted - narrow).max() <= 0.6
    for name in ("b.png", "b.tif"):  # TIFF gets a profile
        save_photo(photo, tmp_path / name)
        again = load_image(tmp_path / name)
        assert np.array_equal(again.samples, drawn) and np.array_equal(again.pixels, photo.pixels)


@pytest.mark.parametrize("codes, said", [([3, 13, 0, 1], True), ([1, 255, 0, 1], True), ([9, 16, 9, 1], True),
                                         ([2, 2, 0, 1], False), ([1, 2, 0, 1], False)])  # fmt: skip
def test_a_cicp_that_is_not_known_is_said_not_to_act(codes: list[int], said: bool, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(draw.png(noise(9, 7, 3), chunks=[(b"cICP", bytes(codes))]))
    notes = load_image(tmp_path / "a.png").notes
    assert len(notes) == said and all(str(codes)[1:-1] in note for note in notes)


def test_white_painted_into_an_hdr_picture_is_its_white_not_its_brightest() -> None:
    profile = profile_of("rgb", None, [(b"cICP", bytes([9, 16, 0, 1]))])
    assert np.abs(from_srgb(np.ones((1, 1, 3), np.float32), "rgb", profile) - 0.5807).max() < 1e-3


@pytest.mark.parametrize("transfer, white", [(16, 0.5807), (18, 0.75)])  # PQ: 203 of 10,000 candelas; HLG
def test_hdr_pngs_show_their_white_as_white(transfer: int, white: float) -> None:
    profile = profile_of("rgb", None, [(b"cICP", bytes([9, transfer, 0, 1]))])
    levels = np.full((1, 2, 3), round(white * 65535), np.uint16)
    levels[0, 1] = 65535  # brighter is cut off there
    shown = to_srgb(levels, "rgb", profile)
    assert shown.min() >= 0.998


def test_a_profile_of_another_model_or_a_damaged_one_says_nothing() -> None:
    grey, rgb = GREY_PROFILES["linear"], PROFILES["linear"]
    assert profile_of("rgb", grey, []) is None and profile_of("grey", rgb, []) is None
    for broken in (b"", b"no", grey[:100], rgb[:180] if rgb else b"", bytes(200)):
        assert profile_of("rgb", broken, []) is None
    assert is_srgb(SRGB, "rgb") and not is_srgb(rgb or b"", "rgb")


@pytest.mark.parametrize("bits", [8, 16])
def test_cmyk_without_a_profile_is_pillows_plain_formula(bits: int, tmp_path: Path) -> None:
    pixels = noise(20, 30, 4)
    right = np.array(Image.fromarray(pixels, "CMYK").convert("RGB")).astype(int)
    drawn = pixels if bits == 8 else pixels.astype(int) * 257
    (tmp_path / "a.tif").write_bytes(draw.tiff(drawn, bits, draw.SEPARATED))
    photo = load_image(tmp_path / "a.tif")
    assert np.abs(photo.pixels - right).max() <= 1 and photo.samples.dtype == (
        np.uint8 if bits == 8 else np.uint16
    )
    assert photo.icc_profile is None and photo.notes == ("CMYK, which becomes sRGB",)


def test_profiles_with_tables_go_through_them(tmp_path: Path) -> None:
    """libvips brings a profile of a press; what LittleCMS makes of it is right."""
    import pyvips

    image: Any = (
        pyvips.Image.black(8, 8, bands=3).copy(interpretation="srgb").icc_export(output_profile="cmyk")
    )
    profile = bytes(image.get("icc-profile-data"))
    assert Shaper.of(profile) is None
    pixels = noise(20, 30, 4)
    Image.fromarray(pixels, "CMYK").save(tmp_path / "a.tif", icc_profile=profile)
    right = by_littlecms(pixels, profile, mode="CMYK").astype(int)
    assert np.abs(load_image(tmp_path / "a.tif").pixels - right).max() <= 2


def test_curves_of_every_kind_are_littlecmss() -> None:
    """Parametric ones and tables, as LittleCMS applies them in floating point."""
    x = np.linspace(0, 1, 256, dtype=np.float32)
    pixels = np.repeat((x[None, :, None] * 255).round().astype(np.uint8), 3, axis=-1)
    numbers = {0: (1.8,), 1: (1.8, 0.9, 0.1), 2: (1.8, 0.8, 0.1, 0.05), 3: (2.4, 0.95, 0.05, 0.08, 0.04),
               4: (2.4, 0.9, 0.05, 0.08, 0.04, 0.02, 0.01)}  # fmt: skip
    curves = [
        b"para\0\0\0\0"
        + struct.pack(">HH", kind, 0)
        + b"".join(struct.pack(">i", round(n * 65536)) for n in values)
        for kind, values in numbers.items()
    ]
    curves += [b"curv" + bytes(8), b"curv" + struct.pack(">IIH", 0, 1, 563)]
    curves += [
        b"curv" + struct.pack(">II", 0, 64) + (np.linspace(0, 1, 64) ** 1.5 * 65535).astype(">u2").tobytes()
    ]
    srgb = imagecodecs.cms_profile("srgb")
    for curve in curves:
        profile = made_profile("rgb", curve)
        assert profile is not None and Shaper.of(profile) is not None
        right = imagecodecs.cms_transform(
            pixels.astype(np.float32) / 255, profile, srgb, colorspace="rgb", outcolorspace="rgb", intent=1
        )
        assert np.abs(to_srgb(pixels, "rgb", profile) - right.clip(0, 1)).max() * 255 <= 0.5


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "kind, numbers",
    [
        (1, (1.8, 0.0, 0.1)),
        (2, (1.8, 0.0, 0.0, 0.1)),
        (1, (1.8,)),
        (0, (-3.0,)),
        (3, (3e4, 3e4, 0, 0, 0)),
        (5, (1.0,)),
    ],
    ids=["a = 0", "a = b = 0", "cut off", "infinite", "absurd", "of no such kind"],
)
def test_an_impossible_curve_says_nothing(kind: int, numbers: tuple[float, ...]) -> None:
    curve = (
        b"para\0\0\0\0"
        + struct.pack(">HH", kind, 0)
        + b"".join(struct.pack(">i", round(number * 65536)) for number in numbers)
    )
    for model in ("rgb", "grey"):
        profile = made_profile(model, curve)
        assert profile is not None and Shaper.of(profile) is None


def test_a_camera_says_adobe_rgb_by_exif_alone() -> None:
    """DCF 2.0's optional colour space, with no profile."""
    tags = Tags()
    tags.exif[0xA001] = tags.value(SHORT, 65535)
    tags.interop[1] = Value(ASCII, b"R03\0")
    green = Image.new("RGB", (16, 16), (90, 200, 80))
    said, plain = io.BytesIO(), io.BytesIO()
    green.save(said, "JPEG", quality=100, subsampling=0, exif=b"Exif\0\0" + tags.to_bytes())
    green.save(plain, "JPEG", quality=100, subsampling=0)
    adobe, srgb = (imagecodecs.cms_profile(name) for name in ("adobergb", "srgb"))
    right = imagecodecs.cms_transform(
        np.array(green), adobe, srgb, colorspace="rgb", outcolorspace="rgb", intent=1
    )
    assert np.abs(load_image(io.BytesIO(said.getvalue())).pixels.astype(int) - right).max() <= 2
    assert np.abs(load_image(io.BytesIO(plain.getvalue())).pixels.astype(int) - right).max() > 20
