"""Edits of pictures of every kind, drawn by hypothesis: the nets give one known colour, and what was not
painted is the source's, at its own depth, as other libraries read both.
"""

import io
import struct
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

import msbd.load
from msbd.pixels.icc import made_profile, power_curve, srgb_curve
from tests.helpers import draw_files as draw
from tests.helpers.fill_pipeline import FillEditor
from tests.helpers.tiny_bundle import write_tiny_bundle
from tools import edit

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
WIDE = (0.3127, 0.3290, 0.708, 0.292, 0.170, 0.797, 0.131, 0.046)
PROFILES = {
    "none": {"rgb": None, "grey": None},
    "gamma 1.8": {model: made_profile(model, power_curve(1.8), WIDE) for model in ("rgb", "grey")},
    "linear": {model: made_profile(model, power_curve(1.0)) for model in ("rgb", "grey")},
    "display p3": {model: made_profile(model, srgb_curve(), (0.3127, 0.3290, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06))
                   for model in ("rgb", "grey")},
}  # fmt: skip
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"/></x:xmpmeta>'
FILLS = ((200, 60, 60), (120, 120, 120), (60, 140, 90))
TURNED = {
    1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1), 8: lambda a: np.rot90(a, 1),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A picture and an edit of it."""

    kind: str  # png, tiff, webp, jpeg
    model: str  # grey, rgb, palette
    bits: int
    alpha: str  # none, plain, key (one colour or level, by tRNS)
    size: tuple[int, int]
    orientation: int
    profile: str
    gamma: int  # gAMA; 0 for none
    interlaced: bool
    planar: bool
    white_is_zero: bool
    dpi: tuple[int, int] | None
    into: str
    fill: tuple[int, int, int]
    seed: int


@st.composite
def cases(draw_one: st.DrawFn) -> Case:
    pick = draw_one
    kind = pick(st.sampled_from(("png", "png", "png", "tiff", "tiff", "webp", "jpeg")))
    model = pick(st.sampled_from(("grey", "rgb", "palette") if kind == "png" else ("grey", "rgb")))
    if kind == "png":
        bits = pick(
            st.sampled_from({"grey": (1, 2, 4, 8, 16), "rgb": (8, 16), "palette": (1, 2, 4, 8)}[model])
        )
        alpha = pick(
            st.sampled_from(("none", "key", *(("plain",) if bits >= 8 and model != "palette" else ())))
        )
    elif kind == "tiff":
        bits = pick(st.integers(1, 16).filter(lambda n: n in (1, 2, 4, 8, 10, 12, 14, 16)))
        bits = max(bits, 4) if model == "rgb" else bits
        alpha = pick(st.sampled_from(("none", "plain"))) if bits in (8, 16) else "none"
    else:
        bits, alpha, model = 8, pick(st.sampled_from(("none", "plain"))) if kind == "webp" else "none", "rgb"
    side = st.one_of(st.integers(1, 40), st.integers(41, 400))
    small = st.integers(1, 60)
    size = (pick(side), pick(small)) if pick(st.booleans()) else (pick(small), pick(side))
    profile = pick(st.sampled_from(sorted(PROFILES)))
    profile = "none" if kind == "webp" and model == "grey" else profile
    outputs = ["png", "tif"] + (["webp"] if bits <= 8 and model != "grey" else [])
    return Case(
        kind, model, bits, alpha, size, pick(st.integers(1, 8)), profile,
        pick(st.sampled_from((0, 0, 100000, 55556))) if kind == "png" and profile == "none" else 0,
        pick(st.booleans()), pick(st.booleans()), pick(st.booleans()) and model == "grey",
        pick(st.sampled_from((None, (300, 300), (204, 98)))), pick(st.sampled_from(outputs)),
        pick(st.sampled_from(FILLS)), pick(st.integers(0, 2**31)),
    )  # fmt: skip


def exif_of(case: Case) -> bytes:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x8298] = case.orientation, "TestCam", "nobody"
    return exif.tobytes().removeprefix(b"Exif\0\0")


def drawn(case: Case) -> tuple[bytes, np.ndarray, np.ndarray | None]:
    """The file, and what is in it, upright, in the whole range of 8 or 16 bits: colours, and alpha or
    None.
    """
    rng = np.random.default_rng(case.seed)
    channels = 3 if case.model == "rgb" else 1
    samples = rng.integers(0, 2**case.bits, (*case.size, channels))
    most, full = 2**case.bits - 1, 255 if case.bits <= 8 else 65535
    profile = PROFILES[case.profile]["rgb" if case.model != "grey" else "grey"]
    alpha = rng.integers(0, 2**case.bits, case.size) if case.alpha == "plain" else None
    together = samples if alpha is None else np.dstack([samples, alpha])
    if case.kind == "png":
        data, colours, alpha = drawn_png(case, samples, together, alpha, profile, rng)
    elif case.kind == "tiff":
        data = drawn_tiff(case, together, profile)
        colours = most - samples if case.white_is_zero else samples
    else:
        file = io.BytesIO()
        options: dict[str, Any] = {"exif": b"Exif\0\0" + exif_of(case), "xmp": XMP}
        options |= {"icc_profile": profile} if profile else {}
        options |= {"dpi": case.dpi} if case.dpi and case.kind == "jpeg" else {}
        picture = Image.fromarray(together.astype(np.uint8))
        more: dict[str, Any] = {"lossless": True, "exact": True} if case.kind == "webp" else {"quality": 95}
        picture.save(file, case.kind.upper(), **options, **more)
        data = file.getvalue()
        with Image.open(io.BytesIO(data)) as opened:
            colours = np.array(opened)[..., :3]
    scaled = (
        (colours.astype(np.int64) * (2 * full) + most) // (2 * most) if case.model != "palette" else colours
    )
    turned = TURNED[case.orientation]
    kind = np.uint8 if full == 255 else np.uint16
    return (
        data,
        turned(scaled).astype(kind),
        None if alpha is None else turned(alpha_levels(alpha, most, full)).astype(kind),
    )


def alpha_levels(alpha: np.ndarray, most: int, full: int) -> np.ndarray:
    return alpha if alpha.max() > most else (alpha.astype(np.int64) * (2 * full) + most) // (2 * most)


def drawn_png(
    case: Case, samples: np.ndarray, together: np.ndarray, alpha: np.ndarray | None, profile: bytes | None,
    rng: np.random.Generator,
) -> tuple[bytes, np.ndarray, np.ndarray | None]:  # fmt: skip
    chunks = [
        (b"eXIf", exif_of(case)),
        (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP),
        (b"tEXt", b"Author\0nobody"),
    ]
    chunks += [(b"iCCP", b"icc\0\0" + zlib.compress(profile))] if profile else []
    chunks += [(b"gAMA", struct.pack(">I", case.gamma))] if case.gamma else []
    if case.dpi:
        chunks.append((b"pHYs", struct.pack(">IIB", *(round(side / 0.0254) for side in case.dpi), 1)))
    options: dict[str, Any] = {"chunks": chunks, "interlaced": case.interlaced}
    full = 255 if case.bits <= 8 else 65535
    if case.model == "palette":
        palette = rng.integers(0, 256, (2**case.bits, 3))
        opacity = rng.integers(0, 256, 2**case.bits) if case.alpha == "key" else None
        transparent = None if opacity is None else bytes(opacity.tolist())
        data = draw.png(samples, case.bits, draw.PALETTE, palette=palette, transparent=transparent, **options)
        index = samples[..., 0]
        return data, palette[index], None if opacity is None else opacity[index]
    grey = case.model == "grey"
    if case.alpha == "key":
        key = samples[0, 0]
        transparent = struct.pack(f">{len(key)}H", *(int(level) for level in key))
        alpha = np.where((samples != key).any(-1), full, 0)
        colour = draw.GREY if grey else draw.RGB
        return draw.png(samples, case.bits, colour, transparent=transparent, **options), samples, alpha + 0
    colour = (
        (draw.GREY_ALPHA if grey else draw.RGBA)
        if case.alpha == "plain"
        else (draw.GREY if grey else draw.RGB)
    )
    return draw.png(together, case.bits, colour, **options), samples, alpha


def drawn_tiff(case: Case, together: np.ndarray, profile: bytes | None) -> bytes:
    photometric = draw.TIFF_RGB if case.model == "rgb" else draw.BLACK_IS_ZERO
    photometric = draw.WHITE_IS_ZERO if case.white_is_zero else photometric
    tags = {
        274: (3, struct.pack("<H", case.orientation), 1), 271: (2, b"TestCam\0", 8), 33432: (2, b"nobody\0", 7),
        700: (1, XMP, len(XMP)),
    }  # fmt: skip
    tags |= {34675: (7, profile, len(profile))} if profile else {}
    if case.dpi:
        tags |= {
            number: (5, struct.pack("<II", side, 1), 1)
            for number, side in zip((282, 283), case.dpi, strict=True)
        }
        tags |= {296: (3, struct.pack("<H", 2), 1)}
    extra = 2 if case.alpha == "plain" else None
    return draw.tiff(
        together, case.bits, photometric, planar=case.planar, deflated=case.interlaced, extra=extra, tags=tags,
        rows_a_strip=7,
    )  # fmt: skip


def written(path: Path) -> np.ndarray:
    """(H, W, C), as another library reads it."""
    data = path.read_bytes()
    read = {".png": imagecodecs.png_decode, ".webp": imagecodecs.webp_decode}
    made = read[path.suffix](data) if path.suffix in read else tifffile.imread(path)
    return made[..., None] if made.ndim == 2 else made


def shown(colours: np.ndarray, profile: bytes | None, gamma: int) -> np.ndarray:
    """(N, C) samples as sRGB levels of 255, (N, 3): by the formula of gAMA, or by LittleCMS in floating
    point.
    """
    levels = colours / np.iinfo(colours.dtype).max
    rgb = levels if levels.shape[-1] == 3 else np.repeat(levels, 3, axis=-1)
    if gamma:
        light = rgb ** (100000 / gamma)
        return 255 * np.where(
            light <= 0.0031308, 12.92 * light, 1.055 * np.maximum(light, 1e-9) ** (1 / 2.4) - 0.055
        )
    if profile is None:
        return rgb * 255
    space = "rgb" if levels.shape[-1] == 3 else "gray"
    made = imagecodecs.cms_transform(
        levels.astype(np.float32)[None] if space == "rgb" else levels.astype(np.float32)[..., 0][None], profile,
        imagecodecs.cms_profile("srgb"), colorspace=space, outcolorspace="rgb", intent=1,
    )  # fmt: skip
    return made[0] * 255


def check(case: Case, bundle: Path, folder: Path) -> None:
    data, colours, alpha = drawn(case)
    height, width = colours.shape[:2]
    rng = np.random.default_rng(case.seed + 1)
    top, left = int(rng.integers(0, height)), int(rng.integers(0, width))
    inside = np.zeros((height, width), bool)
    inside[top : top + int(rng.integers(1, height + 1)), left : left + int(rng.integers(1, width + 1))] = True
    (folder / "in").write_bytes(data)
    Image.fromarray((inside * 255).astype(np.uint8)).save(folder / "mask.png")
    output = folder / f"out.{case.into}"
    words = ["-i", folder / "in", "-m", folder / "mask.png", "-o", output, "-p", "x", "--model", bundle]
    with mock.patch.object(msbd.load, "load_edit_pipeline", lambda *_, **__: FillEditor(case.fill)):
        assert edit.main([*(str(word) for word in words), "--device", "cpu", "--quiet"]) == 0
    made = written(output)
    planes = colours if colours.ndim == 3 else colours[..., None]
    channels = 3 if case.into == "webp" else planes.shape[-1]
    right = np.repeat(planes, 3, axis=-1) if planes.shape[-1] < channels else planes
    if (
        case.into == "webp" and alpha is not None and made.shape[-1] == 3
    ):  # which leaves out what is all opaque
        made = np.dstack([made, np.full(made.shape[:2], 255, np.uint8)])
    assert made.dtype == right.dtype and made.shape[-1] == channels + (alpha is not None)
    assert np.array_equal(made[~inside][:, :channels], right[~inside])
    profile = PROFILES[case.profile]["rgb" if case.model != "grey" else "grey"]
    seen = shown(made[inside][:, :channels], profile, case.gamma)
    luma = round(sum(weight * level for weight, level in zip((0.299, 0.587, 0.114), case.fill, strict=True)))
    meant = case.fill if case.model != "grey" else (luma,) * 3
    assert np.abs(seen - meant).max() <= 2
    if alpha is not None:
        assert (made[inside][:, -1] == np.iinfo(made.dtype).max).all()
        assert np.array_equal(made[~inside][:, -1], alpha[~inside])
    assert_metadata(case, output, profile, made.dtype)


def assert_metadata(case: Case, output: Path, profile: bytes | None, kind: Any) -> None:
    content = output.read_bytes()
    assert b"TestCam" in content and b"nobody" in content and b"x:xmpmeta" in content
    if case.into == "tif":
        with tifffile.TiffFile(output) as file:
            tags: Any = file.pages[0].tags  # type: ignore[union-attr]
            assert tags[274].value == 1 and (profile is None or tags[34675].value == profile)
            resolution = (
                None if 282 not in tags else [tags[n].value[0] / tags[n].value[1] for n in (282, 283)]
            )
    else:
        with Image.open(output) as picture:
            assert picture.getexif().get(0x0112, 1) == 1
            assert picture.info.get("icc_profile") == profile or case.gamma
            resolution = picture.info.get("dpi") or [picture.getexif().get(n) for n in (0x011A, 0x011B)]
    if case.dpi and case.kind != "webp":
        turned = case.dpi[::-1] if case.orientation >= 5 else case.dpi
        assert resolution is not None and [float(str(side)) for side in resolution] == pytest.approx(
            turned, abs=0.02
        )


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle"))


QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=40, **QUIET)
@given(cases())
def test_an_edit_changes_the_mask_and_nothing_else(bundle: Path, case: Case) -> None:
    with tempfile.TemporaryDirectory() as folder:
        check(case, bundle, Path(folder))


@pytest.mark.long
@settings(max_examples=300, **QUIET)
@given(cases())
def test_three_hundred_edits_change_the_mask_and_nothing_else(bundle: Path, case: Case) -> None:
    with tempfile.TemporaryDirectory() as folder:
        check(case, bundle, Path(folder))


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_ten_edits_in_a_row_leave_the_outside_unchanged(suffix: str, bundle: Path, tmp_path: Path) -> None:
    """In a picture of 16 bits, of linear light, lying on its side; in WebP, which has 8, from the first
    edit on.
    """
    rng = np.random.default_rng(4)
    case = Case(
        "png",
        "rgb",
        16,
        "plain",
        (50, 70),
        6,
        "linear",
        0,
        False,
        False,
        False,
        (300, 200),
        suffix,
        FILLS[0],
        9,
    )
    data, colours, alpha = drawn(case)
    path = tmp_path / "0"
    path.write_bytes(data)
    painted = np.zeros(colours.shape[:2], bool)
    first: np.ndarray | None = None
    sizes = []
    for number in range(10):
        inside = np.zeros_like(painted)
        top, left = rng.integers(0, 40, 2)
        inside[top : top + 20, left : left + 20] = True
        painted |= inside
        Image.fromarray((inside * 255).astype(np.uint8)).save(tmp_path / "mask.png")
        output = tmp_path / f"{number + 1}.{suffix}"
        words = ["-i", path, "-m", tmp_path / "mask.png", "-o", output, "-p", "x", "--model", bundle]
        with mock.patch.object(msbd.load, "load_edit_pipeline", lambda *_, **__: FillEditor()):
            assert edit.main([*(str(word) for word in words), "--device", "cpu", "--quiet"]) == 0
        path = output
        made = written(path)
        first = made if first is None else first
        right = first if suffix == "webp" else np.dstack([colours, alpha])  # type: ignore[list-item]
        assert np.array_equal(made[~painted], right[~painted])
        sizes.append(path.stat().st_size)
    assert sizes[-1] < sizes[0] * 1.2  # metadata do not pile up
