"""What users of other tools ran into with their files (issue numbers in ../shared/cases are theirs): each
drawn here, with its right value, through the commands; nets give one known colour, so that only files matter.
"""

import json
import struct
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import torch
from PIL import Image

import msbd.load
from msbd.pixels.files import load_image
from msbd.pixels.icc import made_profile, power_curve
from tests.helpers import draw_files as draw
from tests.helpers.fill_pipeline import FILL, FillEditor, FillRestorer
from tests.helpers.tiny_bundle import write_pasd_folder, write_tiny_bundle
from tools import edit
from tools.restore import __main__ as restore

SIZE = 64, 96


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def pasd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pasd_folder(tmp_path_factory.mktemp("pasd"))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def editor(monkeypatch: pytest.MonkeyPatch) -> FillEditor:
    made = FillEditor()
    monkeypatch.setattr(msbd.load, "load_edit_pipeline", lambda *_, **__: made)
    return made


@pytest.fixture
def restorer(monkeypatch: pytest.MonkeyPatch) -> FillRestorer:
    made = FillRestorer()
    monkeypatch.setattr(msbd.load, "load_restore_pipeline", lambda *_, **__: made)
    return made


def photo(seed: int = 0, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Noise over a gradient, (H, W, 3) uint8: nothing in it is a mask."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(40, 200, size[1])[None, :, None]
    return (ramp + rng.normal(0, 25, (*size, 3))).clip(0, 255).astype(np.uint8)


def area(size: tuple[int, int] = SIZE) -> np.ndarray:
    inside = np.zeros(size, bool)
    inside[15:50, 30:66] = True
    return inside


def save(pixels: np.ndarray, path: Path, **options: Any) -> Path:
    Image.fromarray(pixels).save(path, **options)
    return path


def levels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.array(picture).astype(int)


def over_white(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        white = Image.new("RGBA", picture.size, "white")
        white.alpha_composite(picture.convert("RGBA"))
    return np.array(white)[..., :3].astype(int)


def run_edit(bundle: Path, image: Path, output: Path, *more: object, mask: Path | None = None) -> int:
    words = ["-i", image, "-o", output, "-p", "a red ball", "--model", bundle, "--device", "cpu", *more]
    words += [] if mask is None else ["-m", mask]
    return edit.main([str(word) for word in words])


def run_restore(image: Path, output: Path, *more: object) -> int:
    words = ["-i", image, "-o", output, "--device", "cpu", *more]
    return restore.main([str(word) for word in words])


BICUBIC = ("--method", "bicubic")


# ---- transparency ------------------------------------------------------------------------------------------


def disc(hidden: np.ndarray, colour: tuple[int, int, int] = (255, 255, 255)) -> np.ndarray:
    """A disc of one colour, `hidden` (H, W, 3) below the transparency around it."""
    rows, columns = np.indices((64, 64))
    inside = (rows - 32) ** 2 + (columns - 32) ** 2 < 20**2
    pixels = np.where(inside[..., None], colour, hidden)
    return np.dstack([pixels, np.where(inside, 255, 0)]).astype(np.uint8)


NOISE = np.random.default_rng(3).integers(0, 256, (64, 64, 3))


@pytest.mark.parametrize("method", ["bicubic", "rrdb"])
@pytest.mark.parametrize("scale", ["2", "4", "0.5"])
def test_case_1_no_halo_round_a_cut_out(method: str, scale: str, bundle: Path, tmp_path: Path) -> None:
    results = []
    for number, hidden in enumerate((np.zeros((64, 64, 3)), NOISE)):
        source = save(disc(hidden), tmp_path / f"{number}.png")
        more = ("--method", method, *(("--upscaler", bundle) if method == "rrdb" else ()))
        assert run_restore(source, tmp_path / f"out{number}.png", "--scale", scale, *more) == 0
        results.append(levels(tmp_path / f"out{number}.png"))
    assert over_white(tmp_path / "out0.png").min() >= 250 or method == "rrdb"  # the tiny net is random
    seen = results[0][..., 3] > 0
    assert np.array_equal(results[0][seen], results[1][seen])  # what is hidden does not matter


def test_a_red_disc_on_hidden_green_has_no_green_fringe(tmp_path: Path) -> None:
    source = save(disc(np.broadcast_to((0, 255, 0), (64, 64, 3)), (255, 0, 0)), tmp_path / "a.png")
    assert run_restore(source, tmp_path / "b.png", *BICUBIC, "--scale", "2") == 0
    shown = over_white(tmp_path / "b.png")
    assert (shown[..., 0] >= 253).all() and (np.abs(shown[..., 1] - shown[..., 2]) <= 2).all()


def test_half_transparent_colours_are_premultiplied_when_they_are_interpolated(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    pixels = rng.integers(0, 256, (32, 48, 4)).astype(np.uint8)
    source = save(pixels, tmp_path / "a.png")
    assert run_restore(source, tmp_path / "b.png", *BICUBIC, "--scale", "2") == 0
    right = Image.fromarray(pixels).resize((96, 64), Image.Resampling.BICUBIC)  # Pillow premultiplies
    white = Image.new("RGBA", right.size, "white")
    white.alpha_composite(right)
    apart = np.abs(over_white(tmp_path / "b.png") - np.array(white)[..., :3].astype(int))
    assert (
        apart.mean() < 2 and np.percentile(apart, 99) < 16
    )  # it clamps between its two passes, and is in 8 bits


@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
def test_case_2_what_is_painted_can_be_seen(
    suffix: str, bundle: Path, editor: FillEditor, tmp_path: Path
) -> None:
    pixels = np.dstack([photo(), np.full(SIZE, 255, np.uint8)])
    pixels[10:40, 20:60, 3] = 0
    pixels[..., 3] -= (np.arange(96) % 3).astype(np.uint8)[None] * (pixels[..., 3] == 255)
    mask = save((area() * 255).astype(np.uint8), tmp_path / "mask.png")
    assert run_edit(bundle, save(pixels, tmp_path / "in.png"), tmp_path / f"out.{suffix}", mask=mask) == 0
    made = load_image(tmp_path / f"out.{suffix}")
    assert made.alpha is not None
    assert (made.alpha[area()] == 255).all() and (made.pixels[area()] == FILL).all()
    assert np.array_equal(made.alpha[~area()], pixels[~area()][:, 3])
    assert np.array_equal(made.pixels[~area()], pixels[~area()][:, :3])


def test_a_feather_adds_as_much_opacity_as_paint(bundle: Path, editor: FillEditor, tmp_path: Path) -> None:
    pixels = np.dstack([photo(), np.zeros(SIZE, np.uint8)])
    mask = save((area() * 255).astype(np.uint8), tmp_path / "mask.png")
    source = save(pixels, tmp_path / "in.png")
    assert run_edit(bundle, source, tmp_path / "out.png", "--feather", "8", mask=mask) == 0
    alpha = levels(tmp_path / "out.png")[..., 3]
    assert (alpha[~area()] == 0).all() and alpha[32, 48] == 255 and 0 < alpha[15, 48] < 64


def test_hidden_colours_never_reach_the_nets(bundle: Path, editor: FillEditor, tmp_path: Path) -> None:
    mask = save((area() * 255).astype(np.uint8), tmp_path / "mask.png")
    for number, hidden in enumerate((0, 255)):
        pixels = np.dstack([photo(), np.full(SIZE, 255, np.uint8)])
        pixels[:20, :, 3], pixels[:20, :, :3] = 0, hidden
        source = save(pixels, tmp_path / f"{number}.png")
        assert run_edit(bundle, source, tmp_path / "out.png", mask=mask) == 0
        assert np.array_equal(levels(tmp_path / "out.png")[:15], pixels[:15])  # they stay in the file
    assert torch.equal(*editor.seen)


def test_comparisons_show_transparency_as_a_checkerboard(tmp_path: Path) -> None:
    source = save(disc(NOISE, (10, 10, 10)), tmp_path / "a.png")
    assert (
        run_restore(source, tmp_path / "b.png", *BICUBIC, "--scale", "1", "--compare", tmp_path / "c.png")
        == 0
    )
    shown = levels(tmp_path / "c.png")
    assert {tuple(colour) for colour in shown[:16, :16].reshape(-1, 3)} == {(204,) * 3, (255,) * 3}


# ---- masks -------------------------------------------------------------------------------------------------


def erased(pixels: np.ndarray) -> np.ndarray:
    return np.dstack([pixels, np.where(area(), 0, 255).astype(np.uint8)])


def test_case_3_an_erased_copy_as_the_mask(
    bundle: Path, editor: FillEditor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, mask = save(photo(), tmp_path / "in.png"), save(erased(photo()), tmp_path / "hole.png")
    assert run_edit(bundle, source, tmp_path / "out.png", mask=mask) == 1
    error = capsys.readouterr().err
    assert "looks like a photograph" in error and "--mask-from-alpha" in error and error.count("\n") == 1
    assert run_edit(bundle, source, tmp_path / "out.png", "--mask-from-alpha", mask=mask) == 0
    changed = (levels(tmp_path / "out.png") != photo()).any(-1)
    assert np.array_equal(changed, area())
    exchanged = save((area() * 255).astype(np.uint8), tmp_path / "mask.png")
    assert run_edit(bundle, exchanged, tmp_path / "out2.png", mask=source) == 1
    assert "looks like a photograph" in capsys.readouterr().err and not (tmp_path / "out2.png").exists()


def test_a_mask_from_the_alpha_of_another_file_keeps_the_pictures_own(
    bundle: Path, editor: FillEditor, tmp_path: Path
) -> None:
    pixels = np.dstack([photo(), np.full(SIZE, 128, np.uint8)])
    mask = save(erased(photo()), tmp_path / "hole.png")
    source = save(pixels, tmp_path / "in.png")
    assert run_edit(bundle, source, tmp_path / "out.png", "--mask-from-alpha", mask=mask) == 0
    assert np.array_equal(levels(tmp_path / "out.png")[..., 3], np.where(area(), 255, 128))


def test_case_17_two_far_spots_have_two_crops(
    bundle: Path, editor: FillEditor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spots = np.zeros((900, 900), np.uint8)
    spots[20:60, 20:60] = spots[820:860, 820:860] = 255
    source, mask = save(photo(size=(900, 900)), tmp_path / "in.png"), save(spots, tmp_path / "mask.png")
    assert run_edit(bundle, source, tmp_path / "out.png", "--dry-run", mask=mask) == 0
    crops = [line for line in capsys.readouterr().out.splitlines() if line.startswith("crop ")]
    assert len(crops) == 2 and all("900 x 900" not in line for line in crops)
    for words in (("--parts", "together"), ("--preset", "paper"), ("--preset", "official")):
        assert run_edit(bundle, source, tmp_path / "out.png", "--dry-run", *words, mask=mask) == 0
        assert capsys.readouterr().out.count("crop  ") == 1
    more = ("--candidates", tmp_path / "sheet.png")
    assert run_edit(bundle, source, tmp_path / "out.png", *more, mask=mask) == 0
    assert len(editor.seen) == 2 and editor.seeds == [0, 1]
    changed = (levels(tmp_path / "out.png") != levels(source)).any(-1)
    assert np.array_equal(changed, spots > 0)


@pytest.mark.parametrize("suffix, longest", [("webp", 16383), ("jpg", 65500), ("png", None)])
def test_a_sheet_of_candidates_is_made_smaller_where_its_format_does_not_hold_it(
    suffix: str,
    longest: int | None,
    bundle: Path,
    editor: FillEditor,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(edit, "candidates_of", lambda result: np.zeros((33000, 20, 3), np.uint8))
    spots = np.zeros((900, 900), np.uint8)
    spots[20:60, 20:60] = spots[820:860, 820:860] = 255
    source, mask = save(photo(size=(900, 900)), tmp_path / "in.png"), save(spots, tmp_path / "mask.png")
    sheet = tmp_path / f"sheet.{suffix}"
    assert run_edit(bundle, source, tmp_path / "out.png", "--candidates", sheet, mask=mask) == 0
    assert len(levels(sheet)) == (longest or 66000)
    told = (
        f"sheet.{suffix}: {20 * longest // 66000} x {longest} pixels in place of 20 x 66000"
        if longest
        else ""
    )
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, level, told",
    [("grey", 100, "brightest value is 100 of 255"), ("black", 0, "brightest value is 0 of 255")],
)
def test_case_20_an_empty_mask_says_what_is_in_it(
    name: str, level: int, told: str, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save(photo(), tmp_path / "in.png")
    mask = save(np.full(SIZE, level, np.uint8), tmp_path / "mask.png")
    assert run_edit(bundle, source, tmp_path / "out.png", mask=mask) == 1
    error = capsys.readouterr().err
    assert told in error and "--invert-mask" not in error


def test_case_20_a_mask_of_0_and_1(
    bundle: Path, editor: FillEditor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, mask = save(photo(), tmp_path / "in.png"), save(area().astype(np.uint8), tmp_path / "mask.png")
    assert run_edit(bundle, source, tmp_path / "out.png", mask=mask) == 0
    assert "brightest value is 1 of 255; taken as a mask of 0 and 1" in capsys.readouterr().err
    assert np.array_equal((levels(tmp_path / "out.png") != photo()).any(-1), area())


def test_an_inverted_mask_without_white_never_repaints_everything(
    bundle: Path, editor: FillEditor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, mask = (
        save(photo(), tmp_path / "in.png"),
        save((~area() * 2).astype(np.uint8), tmp_path / "mask.png"),
    )
    assert run_edit(bundle, source, tmp_path / "out.png", "--invert-mask", mask=mask) == 1
    error = capsys.readouterr().err
    assert "its brightest value is 2 of 255" in error and error.count("\n") == 1 and not editor.seen


# ---- metadata ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jpg", "webp", "png", "tif"])
def test_case_5_a_long_prompt_never_costs_the_picture(
    suffix: str, bundle: Path, editor: FillEditor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, mask = (
        save(photo(), tmp_path / "in.png"),
        save((area() * 255).astype(np.uint8), tmp_path / "mask.png"),
    )
    more = ("--negative-prompt", "not that " * 9000)
    words = ["-i", source, "-m", mask, "-o", tmp_path / f"out.{suffix}", "-p", "a long prompt " * 5200, *more]
    words += ["--model", bundle, "--device", "cpu"]
    assert edit.main([str(word) for word in words]) == 0
    assert load_image(tmp_path / f"out.{suffix}").size == SIZE
    err = capsys.readouterr().err
    assert ("64 kB" in err) == (suffix == "jpg")


def camera(path: Path) -> Path:
    exif = Image.Exif()
    exif[0x010F], exif[0x0132], exif[0x8298] = "TestCam", "2026:01:02 03:04:05", "(c) nobody"
    exif.get_ifd(0x8769)[0x9003] = "2026:01:02 03:04:05"
    return save(photo(), path, exif=exif, dpi=(300, 300))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("command", ["edit", "restore"])
def test_case_11_make_copyright_date_and_dpi_stay(
    command: str, suffix: str, bundle: Path, editor: FillEditor, tmp_path: Path
) -> None:
    source, output = camera(tmp_path / "in.jpg"), tmp_path / f"out.{suffix}"
    if command == "edit":
        mask = save((area() * 255).astype(np.uint8), tmp_path / "mask.png")
        assert run_edit(bundle, source, output, mask=mask) == 0
    else:
        assert run_restore(source, output, *BICUBIC, "--scale", "2") == 0
    with Image.open(output) as picture:
        exif = picture.getexif()
        assert exif.get_ifd(0x8769)[0x9003] == "2026:01:02 03:04:05"
        assert (exif[0x010F], exif[0x0132], exif[0x8298]) == ("TestCam", "2026:01:02 03:04:05", "(c) nobody")
    dpi = load_image(output).metadata.dpi
    assert dpi == pytest.approx((300, 300) if command == "edit" else (600, 600), abs=0.02)


def test_case_11_a_fax_keeps_its_shape(tmp_path: Path) -> None:
    Image.fromarray(area()).save(tmp_path / "fax.tif", compression="group4", dpi=(204, 98))
    for suffix in ("png", "tif", "jpg"):
        assert run_restore(tmp_path / "fax.tif", tmp_path / f"a.{suffix}", *BICUBIC, "--scale", "2") == 0
        assert load_image(tmp_path / f"a.{suffix}").metadata.dpi == pytest.approx((408, 196), abs=0.02)
        assert load_image(tmp_path / f"a.{suffix}").model == "grey"


def test_what_is_told_of_the_work_and_how_to_leave_it_out(
    bundle: Path, editor: FillEditor, tmp_path: Path
) -> None:
    source, mask = camera(tmp_path / "in.jpg"), save((area() * 255).astype(np.uint8), tmp_path / "mask.png")
    seen = {}
    for name, words in {"all": (), "none": ("--no-metadata",), "stripped": ("--strip-metadata",)}.items():
        assert run_edit(bundle, source, tmp_path / f"{name}.png", *words, mask=mask) == 0
        with Image.open(tmp_path / f"{name}.png") as picture:
            seen[name] = (picture.info, dict(picture.getexif()))
    info, exif = seen["all"]
    assert json.loads(info["msbd"])["prompt"] == "a red ball" and info["parameters"].startswith("a red ball")
    assert "compositeWithTrainedAlgorithmicMedia" in info["XML:com.adobe.xmp"] and exif[0x010F] == "TestCam"
    info, exif = seen["none"]
    assert not {"msbd", "parameters", "XML:com.adobe.xmp"} & info.keys() and exif[0x010F] == "TestCam"
    info, exif = seen["stripped"]
    assert not {"msbd", "parameters", "dpi"} & info.keys() and not exif
    assert run_restore(source, tmp_path / "r.png", *BICUBIC) == 0
    with Image.open(tmp_path / "r.png") as picture:
        assert "algorithmicallyEnhanced" in picture.info["XML:com.adobe.xmp"]


# ---- colours and depths ------------------------------------------------------------------------------------


def test_case_7_a_grey_profile_acts_and_stays(tmp_path: Path) -> None:
    profile = made_profile("grey", power_curve(1.0))
    source = save(np.full(SIZE, 128, np.uint8), tmp_path / "a.png", icc_profile=profile)
    assert run_restore(source, tmp_path / "b.png", *BICUBIC, "--scale", "1") == 0
    assert load_image(tmp_path / "b.png").pixels.mean() == pytest.approx(188, abs=1)
    with Image.open(tmp_path / "b.png") as picture:
        assert picture.mode == "L" and picture.info["icc_profile"] == profile


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_a_fill_comes_out_as_that_fill_also_when_restoring(
    suffix: str, pasd: Path, bundle: Path, restorer: FillRestorer, tmp_path: Path
) -> None:
    places = (0.3127, 0.3290, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060)
    source = save(photo(), tmp_path / "a.png", icc_profile=made_profile("rgb", power_curve(1.8), places))
    assert (
        run_restore(source, tmp_path / f"b.{suffix}", "--model", pasd, "--base", bundle, "--scale", "2") == 0
    )
    made = load_image(tmp_path / f"b.{suffix}")
    assert np.abs(made.pixels.astype(int) - FILL).max() <= 1 and not (made.samples[0, 0] == FILL).all()


CASE_8 = {
    "12 bits": lambda grey: draw.tiff((grey.astype(int) * 4095 + 127) // 255, 12, draw.BLACK_IS_ZERO),
    "16 bits, white is zero": lambda grey: draw.tiff(65535 - grey.astype(int) * 257, 16, draw.WHITE_IS_ZERO),
    "12 bits, white is zero": lambda grey: draw.tiff(4095 - (grey.astype(int) * 4095 + 127) // 255, 12, draw.WHITE_IS_ZERO),
    "8 bits, white is zero": lambda grey: draw.tiff(255 - grey.astype(int), 8, draw.WHITE_IS_ZERO),
}  # fmt: skip


@pytest.mark.parametrize("name", CASE_8)
def test_case_8_tiff_scans(name: str, tmp_path: Path) -> None:
    grey = photo()[..., 0]
    (tmp_path / "a.tif").write_bytes(CASE_8[name](grey))
    assert run_restore(tmp_path / "a.tif", tmp_path / "b.png", *BICUBIC, "--scale", "1") == 0
    made = imagecodecs.png_decode((tmp_path / "b.png").read_bytes())
    assert made.dtype == (np.uint8 if name.startswith("8") else np.uint16)
    assert np.abs(made / np.iinfo(made.dtype).max * 255 - grey).max() <= 1


@pytest.mark.parametrize("method", ["bicubic", "rrdb"])
def test_case_12_grey_stays_grey(method: str, bundle: Path, tmp_path: Path) -> None:
    more = ("--method", method, "--scale", "2", *(("--upscaler", bundle) if method == "rrdb" else ()))
    grey = photo()[..., 0]
    for name, pixels, most in (
        ("grey", grey, 0),
        ("three channels", np.dstack([grey] * 3), 0),
        ("tinted", np.dstack([grey, grey, grey.clip(2, 253) + (np.arange(96) % 3).astype(np.uint8) - 1]), 6),
    ):
        source = save(pixels, tmp_path / f"{name}.png")
        assert run_restore(source, tmp_path / "out.png", *more) == 0
        made = levels(tmp_path / "out.png")
        assert (made.ndim == 2) == (name == "grey")
        assert made.ndim == 2 or np.ptp(made, axis=-1).max() <= most


def test_case_12_pasd_keeps_a_scan_as_near_to_grey_as_it_was(
    pasd: Path, bundle: Path, tmp_path: Path
) -> None:
    grey = photo(size=(24, 32))[..., 0].clip(2, 250)
    source = save(np.dstack([grey, grey + 1, grey + 2]), tmp_path / "a.png")
    more = ("--model", pasd, "--base", bundle, "--scale", "2", "--steps", "2", "--process-size", "24")
    assert run_restore(source, tmp_path / "b.png", *more) == 0
    assert np.ptp(levels(tmp_path / "b.png"), axis=-1).max() <= 6


# ---- what is large, and what is left out -------------------------------------------------------------------


def test_case_15_what_the_tool_writes_it_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("1", (13500, 13400)).save(tmp_path / "huge.png")
    assert run_restore(tmp_path / "huge.png", tmp_path / "b.png", *BICUBIC, "--scale", "1", "--dry-run") == 0
    assert "13500 x 13400 -> 13500 x 13400" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_case_18_the_first_frame_is_said_to_be_the_first(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frames = [Image.fromarray(photo(number)) for number in range(3)]
    frames[0].save(tmp_path / "a", kind, save_all=True, append_images=frames[1:])
    assert run_restore(tmp_path / "a", tmp_path / "b.png", *BICUBIC, "--scale", "1") == 0
    assert (
        capsys.readouterr().err
        == f"note: {tmp_path / 'a'}: the first of 3 frames or pages; the others are not read\n"
    )


def test_case_19_heic_is_named_and_avif_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(600))
    assert run_restore(tmp_path / "a.heic", tmp_path / "b.png", *BICUBIC) == 1
    line = f"error: {tmp_path / 'a.heic'}: HEIC, which is not read; save it as JPEG or PNG\n"
    assert capsys.readouterr().err == line
    smooth = np.broadcast_to(np.linspace(0, 255, 96).round()[None, :, None], (*SIZE, 3)).astype(np.uint8)
    Image.fromarray(smooth).save(tmp_path / "a.avif", quality=95)
    assert run_restore(tmp_path / "a.avif", tmp_path / "b.png", *BICUBIC, "--scale", "1") == 0
    assert np.abs(levels(tmp_path / "b.png") - smooth).max() < 4


def test_case_22_other_programs_prompt_syntax_is_told_once_a_construct(
    bundle: Path, editor: FillEditor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, mask = (
        save(photo(), tmp_path / "in.png"),
        save((area() * 255).astype(np.uint8), tmp_path / "mask.png"),
    )
    prompt = "(a red ball:1.3), (a:1.1) <lora:style:0.8> BREAK [snow] ((very)) [a:b:0.5]"
    words = [
        "-i",
        source,
        "-m",
        mask,
        "-o",
        tmp_path / "o.png",
        "-p",
        prompt,
        "--model",
        bundle,
        "--device",
        "cpu",
    ]
    assert edit.main([str(word) for word in words]) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: prompt: ")]
    assert [note.removeprefix("note: prompt: ").split(": ")[0] for note in notes] == [
        "(a red ball:1.3)", "<lora:style:0.8>", "BREAK", "[a:b:0.5]", "[snow]",
    ]  # fmt: skip
    assert any("--lora style.safetensors:0.8" in note for note in notes)
    words[words.index(prompt)] = "a plain prompt (with brackets), and a \\(1.5:1\\) screen"
    assert edit.main([str(word) for word in words]) == 0
    assert "note: prompt" not in capsys.readouterr().err


def test_case_23_a_comparison_fits_every_format(tmp_path: Path) -> None:
    source = save(photo(size=(5000, 10)), tmp_path / "tall.png")
    assert run_restore(source, tmp_path / "out.png", *BICUBIC, "--compare", tmp_path / "c.webp") == 0
    with Image.open(tmp_path / "c.webp") as picture:
        assert max(picture.size) <= 1600
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.size == (40, 20000)


@pytest.mark.parametrize("into", ["png", "tif"])
def test_gama_is_read_kept_and_shown(into: str, bundle: Path, editor: FillEditor, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(draw.png(photo(), chunks=[(b"gAMA", struct.pack(">I", 100000))]))
    mask = save((area() * 255).astype(np.uint8), tmp_path / "mask.png")
    assert run_edit(bundle, tmp_path / "a.png", tmp_path / f"b.{into}", mask=mask) == 0
    made = load_image(tmp_path / f"b.{into}")
    assert np.array_equal(made.samples[~area()], photo()[~area()])
    assert np.abs(made.pixels[area()].astype(int) - FILL).max() <= 2


def test_a_signed_result(
    bundle: Path, editor: FillEditor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    c2pa = pytest.importorskip("c2pa")
    chain, key = write_credentials(tmp_path)
    source, mask = (
        save(photo(), tmp_path / "in.png"),
        save((area() * 255).astype(np.uint8), tmp_path / "mask.png"),
    )
    for suffix in ("png", "jpg", "webp", "tif"):
        output = tmp_path / f"out.{suffix}"
        assert run_edit(bundle, source, output, "--c2pa", chain, key, mask=mask) == 0, capsys.readouterr().err
        with c2pa.Reader(str(output)) as reader:
            stored = json.loads(reader.json())
        text = json.dumps(stored["manifests"][stored["active_manifest"]])
        assert stored["validation_state"] in ("Valid", "Trusted")
        assert "c2pa.edited" in text and "compositeWithTrainedAlgorithmicMedia" in text and "in.png" in text
        assert load_image(output).size == SIZE
    assert run_restore(source, tmp_path / "r.png", *BICUBIC, "--c2pa", chain, key) == 0
    with c2pa.Reader(str(tmp_path / "r.png")) as reader:
        assert "algorithmicallyEnhanced" in reader.json()
    assert run_edit(bundle, source, tmp_path / "x.png", "--c2pa", chain, tmp_path / "no.pem", mask=mask) == 1
    assert "no.pem: there is no such file; --c2pa takes a certificate chain" in capsys.readouterr().err
    assert run_edit(bundle, source, tmp_path / "x.png", "--c2pa", chain, chain, mask=mask) == 1
    assert "not a private key in PEM" in capsys.readouterr().err and not (tmp_path / "x.png").exists()


def write_credentials(folder: Path) -> tuple[Path, Path]:
    """A certificate by an authority of its own, and its key: nobody trusts them, but they sign."""
    import datetime

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives import serialization as coding
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    now = datetime.datetime.now(datetime.UTC)
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    names = [
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name), x509.NameAttribute(NameOID.ORGANIZATION_NAME, "nobody")])
        for name in ("authority", "signer")
    ]  # fmt: skip
    made = []
    for number, (name, key) in enumerate(zip(names, keys, strict=True)):
        authority = number == 0
        builder = (
            x509.CertificateBuilder().subject_name(name).issuer_name(names[0]).public_key(key.public_key())
        )
        builder = builder.serial_number(x509.random_serial_number())
        builder = builder.not_valid_before(now - datetime.timedelta(days=1))
        builder = builder.not_valid_after(now + datetime.timedelta(days=9))
        builder = builder.add_extension(x509.BasicConstraints(authority, None), True)
        usage = x509.KeyUsage(not authority, False, False, False, False, authority, authority, False, False)
        builder = builder.add_extension(usage, True)
        builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
        if not authority:
            builder = builder.add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), False
            )
            issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(keys[0].public_key())
            builder = builder.add_extension(issuer, False)
        made.append(builder.sign(keys[0], hashes.SHA256()).public_bytes(coding.Encoding.PEM))
    (folder / "chain.pem").write_bytes(made[1] + made[0])
    pem = keys[1].private_bytes(coding.Encoding.PEM, coding.PrivateFormat.PKCS8, coding.NoEncryption())
    (folder / "key.pem").write_bytes(pem)
    return folder / "chain.pem", folder / "key.pem"
