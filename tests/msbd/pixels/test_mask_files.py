import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageDraw, ImageFilter

from msbd.pixels.mask_files import load_mask, looks_like_a_photograph, read_mask
from tests.helpers import draw_files as draw

ROOT = Path(__file__).parents[3]
AREA = np.zeros((40, 60), bool)
AREA[10:30, 20:45] = True
GREY = np.where(AREA, 255, 0).astype(np.uint8)
RED_ON_NOTHING = np.dstack([np.full((40, 60), 255), *[np.zeros((40, 60), int)] * 2, GREY]).astype(np.uint8)


def coded(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def opaque(level: int) -> Image.Image:
    return Image.fromarray(np.dstack([GREY] * 3 + [np.full_like(GREY, level)]))


MASKS = {
    "grey": coded(Image.fromarray(GREY)),
    "1 bit": draw.png(AREA, 1, draw.GREY),
    "2 bits": draw.png(AREA * 3, 2, draw.GREY),
    "16 bits": draw.png(AREA * 65535, 16, draw.GREY),
    "palette": draw.png(AREA, 1, draw.PALETTE, palette=np.array([[0, 0, 0], [255, 255, 255]])),
    "colour": coded(Image.fromarray(GREY).convert("RGB")),
    "jpeg": coded(Image.fromarray(GREY), "JPEG", quality=60),
    "float": draw.tiff(AREA.astype(np.float32).view(np.uint32), 32, draw.BLACK_IS_ZERO, sample_format=3),
    "32 bits": draw.tiff(AREA.astype(np.int64) * (2**32 - 1), 32, draw.BLACK_IS_ZERO),
    "12 bits": draw.tiff(AREA * 4095, 12, draw.BLACK_IS_ZERO),
    "white is zero": draw.tiff(~AREA, 1, draw.WHITE_IS_ZERO),
    "0 and 1": coded(Image.fromarray(AREA.astype(np.uint8))),
    "red on transparent": coded(Image.fromarray(RED_ON_NOTHING)),
    "white on transparent": coded(Image.fromarray(np.dstack([np.full((40, 60, 3), 255, np.uint8), GREY]))),
    "black on transparent": coded(Image.fromarray(np.dstack([np.zeros((40, 60, 3), np.uint8), GREY]))),
    "with an opaque alpha": coded(opaque(255)),
    "with a gamma": draw.png(GREY, 8, draw.GREY, chunks=[(b"gAMA", (250000).to_bytes(4, "big"))]),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_as_people_make_them(name: str) -> None:
    read = read_mask(io.BytesIO(MASKS[name]))
    assert read.mask.shape == (1, 1, 40, 60) and np.array_equal(read.mask[0, 0].numpy() > 0, AREA)
    inverted = load_mask(io.BytesIO(MASKS[name]), invert=True)
    assert np.array_equal(inverted[0, 0].numpy() > 0, ~AREA)
    assert bool(read.notes) == (name == "0 and 1")


def saved(samples: np.ndarray) -> bytes:
    """As numpy's users save what they have."""
    file = io.BytesIO()
    photometric = "minisblack" if samples.ndim == 2 else "rgb"
    tifffile.imwrite(file, samples, photometric=photometric, metadata=None)
    return file.getvalue()


@pytest.mark.parametrize("white", [1, 255, 65535])
@pytest.mark.parametrize(
    "kind", ["int8", "uint16", "int16", "int32", "uint32", "int64", "uint64", "float32", "float64"]
)
def test_the_greatest_value_says_what_is_white(kind: str, white: int) -> None:
    full = 1 if kind.startswith("float") else np.iinfo(kind).max
    if full < white and not kind.startswith("float"):
        pytest.skip("more than the type holds")
    soft = np.array(Image.fromarray(GREY).filter(ImageFilter.GaussianBlur(2))) / 255
    values = (AREA if white == 1 < full else soft) * white
    for drawn in (values, np.dstack([values] * 3)):
        read = read_mask(io.BytesIO(saved(drawn.astype(kind))))
        assert np.array_equal(read.mask[0, 0].numpy() > 0, values >= white / 2)
        said = [
            note
            for note in read.notes
            if f"taken as a mask of 0 {'and' if white == 1 else 'to'} {white}" in note
        ]
        assert len(said) == (white != full)


def test_a_16_bit_png_of_0_and_1() -> None:
    file = draw.png(AREA, 16, draw.GREY)
    for invert in (False, True):
        read = read_mask(io.BytesIO(file), invert=invert)
        assert np.array_equal(read.mask[0, 0].numpy() > 0, invert != AREA)
        assert "brightest value is 1 of 65,535; taken as a mask of 0 and 1" in read.notes[0]


@pytest.mark.parametrize("white", [1, 255, 65535])
def test_an_alpha_is_read_by_its_greatest_value_too(white: int) -> None:
    file = draw.png(np.dstack([AREA * 0, ~AREA * white]), 16, draw.GREY_ALPHA)
    read = read_mask(io.BytesIO(file), from_alpha=True)
    assert np.array_equal(read.mask[0, 0].numpy() > 0, AREA)
    assert ("the greatest value of its alpha is" in "".join(read.notes)) == (white < 65535)


@pytest.mark.filterwarnings("error")
def test_what_is_no_number_negative_or_a_little_beyond_white_is_clamped() -> None:
    values = np.where(AREA, 1.0, -1.0)
    values[0, 0], values[1, 1], values[12, 22] = np.nan, -3e38, 1.2
    read = read_mask(io.BytesIO(saved(values.astype(np.float32))))
    assert np.array_equal(read.mask[0, 0].numpy() > 0, AREA)
    assert "brightest value is 1.2 of 1; taken as a mask of 0 and 1" in read.notes[0]


@pytest.mark.parametrize(
    "values",
    [
        AREA * np.float32(1e6),
        np.where(AREA, np.float32(np.inf), 0),
        np.where(AREA, np.float32(np.nan), np.nan),
        np.where(AREA, np.int8(-1), 0),  # 255, cast
        AREA * np.int32(70_000),
    ],
    ids=["more than 65535", "infinite", "no number", "negative", "nearly black"],
)
def test_samples_of_no_known_white_are_refused(values: np.ndarray) -> None:
    for invert in (False, True):
        with pytest.raises(
            ValueError, match="its brightest value is .*, as no mask has it; save it with 8 bits"
        ):
            read_mask(io.BytesIO(saved(values)), invert=invert)


@pytest.mark.parametrize("kind", ["int16", "int32", "float32", "float64"])
def test_white_as_zero_is_not_taken_of_signed_samples(kind: str) -> None:
    file = io.BytesIO()
    tifffile.imwrite(file, AREA.astype(kind), photometric="miniswhite")
    file.seek(0)
    with pytest.raises(ValueError, match="no agreed white"):
        read_mask(file)


def test_an_inverted_mask_without_white_is_refused() -> None:
    for labels, bits in ((AREA * 3, 16), (AREA * 2, 8), (AREA * 1000, 16)):
        with pytest.raises(
            ValueError, match=r"would edit all of it: its brightest value is \d+ of 255; 128 and more"
        ):
            read_mask(io.BytesIO(draw.png(labels, bits, draw.GREY)), invert=True)
    blue = np.where(AREA[..., None], np.array([0, 0, 2]), 0).astype(np.uint8)
    with pytest.raises(ValueError, match="its brightest value is 1 of 255"):
        load_mask(io.BytesIO(coded(Image.fromarray(blue))), invert=True)
    assert load_mask(io.BytesIO(draw.png(AREA * 0, 8, draw.GREY)), invert=True).all()


def test_what_was_not_read_of_a_mask_is_said() -> None:
    frames = [Image.fromarray(GREY), Image.fromarray(255 - GREY)]
    read = read_mask(io.BytesIO(coded(frames[0], "GIF", save_all=True, append_images=frames[1:])))
    assert len(read.notes) == 1 and "the first of 2 frames" in read.notes[0]


def photograph() -> Image.Image:
    with Image.open(ROOT / "examples" / "coffee.jpg") as picture:
        return picture.convert("RGB").resize((120, 80))


def erased() -> bytes:
    """A copy of the picture with an area erased, its colours left below."""
    alpha = Image.new("L", (120, 80), 255)
    alpha.paste(0, (30, 20, 70, 60))
    picture = photograph()
    picture.putalpha(alpha)
    return coded(picture)


def test_an_erased_copy_of_the_picture_is_a_mask_by_its_alpha(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(erased())
    right = np.zeros((80, 120), bool)
    right[20:60, 30:70] = True
    assert np.array_equal(load_mask(tmp_path / "a.png", from_alpha=True)[0, 0].numpy() > 0, right)
    with pytest.raises(
        ValueError, match=r"a\.png: looks like a photograph.*pixels would be painted.*--mask-from-alpha"
    ):
        load_mask(tmp_path / "a.png")


@pytest.mark.parametrize("name", ["coffee.jpg", "chelsea.jpg", "coffee_small.jpg"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_photograph_is_no_mask(name: str, mode: str, tmp_path: Path) -> None:
    with Image.open(ROOT / "examples" / name) as picture:
        shown = picture.convert(mode)
    shown.save(tmp_path / "a.png")
    count = int((np.array(shown.convert("L")) >= 128).sum())
    with pytest.raises(ValueError, match="looks like a photograph") as caught:
        load_mask(tmp_path / "a.png")
    told = int(str(caught.value).split(" of ")[-2].split()[-1].replace(",", ""))
    assert abs(told - count) <= 0.01 * count and f"of {shown.width * shown.height:,} pixels" in str(
        caught.value
    )


def test_soft_edges_gradients_letters_labels_and_noise_are_masks() -> None:
    blurred = [
        np.array(Image.fromarray(GREY).filter(ImageFilter.GaussianBlur(radius))) for radius in (1, 3, 8)
    ]
    gradient = np.tile(np.linspace(0, 255, 400).round().astype(np.uint8), (300, 1))
    letters = Image.new("L", (400, 300))
    for line in range(0, 300, 12):
        ImageDraw.Draw(letters).text((5, line), "a mask of many letters 12345 " * 3, fill=255)
    small = np.array(letters.resize((350, 260), Image.Resampling.LANCZOS))
    noise = np.where(np.random.default_rng(0).random((300, 400)) > 0.5, 255, 0).astype(np.uint8)
    for grey in (*blurred, gradient, gradient.T, np.array(letters), small, noise):
        assert not looks_like_a_photograph(np.repeat(grey[..., None], 3, axis=-1))
    labels = np.zeros((300, 400, 3), np.uint8)
    for number, colour in enumerate([(128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128)]):
        labels[40 * number : 40 * number + 30] = colour
    assert not looks_like_a_photograph(labels)
    red = np.where(AREA[..., None], (255, 0, 0), (255, 255, 255)).astype(np.uint8)
    for quality in (20, 60, 95):
        with Image.open(io.BytesIO(coded(Image.fromarray(red), "JPEG", quality=quality))) as picture:
            assert not looks_like_a_photograph(np.array(picture))


def areas(count: int) -> np.ndarray:
    """A map of `count` areas, (300, 400), each nearest to one of as many points."""
    rows, columns = np.indices((300, 400))
    points = np.random.default_rng(0).uniform(0, 1, (count, 2)) * (300, 400)
    return ((rows[..., None] - points[:, 0]) ** 2 + (columns[..., None] - points[:, 1]) ** 2).argmin(-1)


@pytest.mark.parametrize("count", [20, 40, 60])
def test_maps_of_many_flat_colours_are_masks(count: int) -> None:
    palette = np.random.default_rng(1).integers(0, 256, (count, 3))
    assert not looks_like_a_photograph(palette[areas(count)].astype(np.uint8))
    instances = (areas(count) * (240 // count) + 10).astype(np.uint8)
    assert not looks_like_a_photograph(np.repeat(instances[..., None], 3, axis=-1))
    # The map's edges are smooth at a usual size.
    large = Image.fromarray(palette[areas(count)].astype(np.uint8)).resize(
        (3200, 2400), Image.Resampling.NEAREST
    )
    if count == 20:
        assert not looks_like_a_photograph(np.array(large.resize((1600, 1200), Image.Resampling.BOX)))


@pytest.mark.parametrize("blur", [0, 0.7])
def test_a_scan_of_a_mask_is_one(blur: float) -> None:
    noise = np.random.default_rng(0).normal(0, 3, (300, 400))
    levels = Image.fromarray(np.where(areas(2) == 1, 200, 40).astype(np.uint8))
    scan = (
        (np.array(levels.filter(ImageFilter.GaussianBlur(blur))) + noise)
        .round()
        .clip(0, 255)
        .astype(np.uint8)
    )
    read = read_mask(io.BytesIO(coded(Image.fromarray(scan))))
    assert np.array_equal(read.mask[0, 0].numpy() > 0, scan >= 128)


@pytest.mark.parametrize("mode, qualities", [("RGB", (5, 10, 40, 75, 95)), ("L", (10, 40, 75, 95))])
@pytest.mark.parametrize("name", ["coffee.jpg", "chelsea.jpg"])
def test_a_photograph_stays_one_as_jpeg(name: str, mode: str, qualities: tuple[int, ...]) -> None:
    with Image.open(ROOT / "examples" / name) as picture:
        shown = picture.convert(mode)
    for quality in qualities:
        with Image.open(io.BytesIO(coded(shown, "JPEG", quality=quality))) as again:
            assert looks_like_a_photograph(np.array(again.convert("RGB")))


def test_a_photograph_stays_one_pixelated_in_few_colours_and_on_white() -> None:
    with Image.open(ROOT / "examples" / "coffee.jpg") as picture:
        shown = picture.convert("RGB")
    white = Image.new("RGB", (2 * shown.width, 2 * shown.height), "white")
    white.paste(shown)
    pixelated = shown.resize((30, 20)).resize((600, 400), Image.Resampling.NEAREST)
    for made in (white, pixelated, shown.quantize(64, dither=Image.Dither.NONE).convert("RGB")):
        assert looks_like_a_photograph(np.array(made))


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("name", ["coffee.jpg", "chelsea.jpg"])
def test_a_small_photograph_on_white_stays_one(name: str, mode: str) -> None:
    with Image.open(ROOT / "examples" / name) as picture:
        shown = picture.convert(mode).convert("RGB")
    white = Image.new("RGB", (round(2.2 * shown.width), round(2.2 * shown.height)), "white")
    white.paste(shown, (shown.width // 2, shown.height // 2))
    assert looks_like_a_photograph(np.array(white))


@pytest.mark.parametrize("most", [120, 4095])
def test_an_alpha_that_is_never_opaque_does_not_select_everything(most: int) -> None:
    """As of 12 bits in 16."""
    alpha = np.where(AREA, 0, most).astype(np.uint16 if most > 255 else np.uint8)
    colours = np.full((*AREA.shape, 3), 90, alpha.dtype)
    file = io.BytesIO()
    tifffile.imwrite(file, np.dstack([colours, alpha]), photometric="rgb", extrasamples=["unassalpha"])
    with pytest.raises(
        ValueError, match="--mask-from-alpha would edit all of it: the greatest value of its alpha"
    ):
        read_mask(io.BytesIO(file.getvalue()), from_alpha=True)


def test_noise_stays_a_photograph() -> None:
    rng = np.random.default_rng(0)
    for sigma in (3, 8, 25):
        ramp = np.linspace(40, 220, 400)[None, :, None] + rng.normal(0, sigma, (300, 400, 3))
        grey = np.repeat(ramp[..., :1], 3, axis=-1)
        for drawn in (ramp, grey):
            picture = Image.fromarray(drawn.round().clip(0, 255).astype(np.uint8))
            assert looks_like_a_photograph(np.array(picture))
            with Image.open(io.BytesIO(coded(picture, "JPEG", quality=95))) as again:
                assert looks_like_a_photograph(np.array(again))


def test_a_soft_mask_is_cut_at_one_half_and_that_is_said(tmp_path: Path) -> None:
    soft = Image.fromarray(GREY).filter(ImageFilter.GaussianBlur(6))
    soft.save(tmp_path / "a.png")
    read = read_mask(tmp_path / "a.png")
    assert np.array_equal(read.mask[0, 0].numpy() > 0, np.array(soft) >= 128)
    assert len(read.notes) == 1 and "neither black nor white; 128 of 255 and more is edited" in read.notes[0]


def test_the_extremes_are_told(tmp_path: Path) -> None:
    Image.new("L", (9, 9), 100).save(tmp_path / "a.png")
    read = read_mask(tmp_path / "a.png")
    assert (read.brightest, read.darkest, int(read.mask.sum())) == (100, 100, 0)
