"""What a picture's numbers mean: its ICC profile, or what a PNG says instead; to sRGB, and back.

Sources  PNG third edition, 4.3 and 11.3.2 (cICP before iCCP before sRGB before gAMA and cHRM); ITU-T H.273
         (the numbers of cICP), BT.2100 and BT.2408 (HDR)
Tensors  samples (H, W), (H, W, 3) or (H, W, 4) uint8 or uint16; sRGB (H, W, 3), float32 in [0, 1]
Copying  needs pixels/icc.py, pixels/luma.py, pixels/vips.py; numpy, Pillow, and pyvips for profiles with
         tables

Relative colorimetric throughout. A profile that is damaged, or not of the picture's own model, says nothing.
"""

import io
import math
import struct
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import ImageCms

from .icc import (
    SRGB,
    Chromaticities,
    Shaper,
    curve_table,
    light_to_srgb,
    made_profile,
    power_curve,
    srgb_curve,
    srgb_to_light,
    table_curve,
)
from .luma import BT601
from .vips import vips

_PRIMARIES: dict[int, Chromaticities] = {  # H.273, table 2
    1: SRGB,
    2: SRGB,  # unspecified
    4: (0.310, 0.316, 0.67, 0.33, 0.21, 0.71, 0.14, 0.08),
    5: (0.3127, 0.3290, 0.64, 0.33, 0.29, 0.60, 0.15, 0.06),
    6: (0.3127, 0.3290, 0.630, 0.340, 0.310, 0.595, 0.155, 0.070),
    7: (0.3127, 0.3290, 0.630, 0.340, 0.310, 0.595, 0.155, 0.070),
    8: (0.310, 0.316, 0.681, 0.319, 0.243, 0.692, 0.145, 0.049),
    9: (0.3127, 0.3290, 0.708, 0.292, 0.170, 0.797, 0.131, 0.046),
    10: (1 / 3, 1 / 3, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0),
    11: (0.314, 0.351, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),
    12: (0.3127, 0.3290, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),
    22: (0.3127, 0.3290, 0.630, 0.340, 0.295, 0.605, 0.155, 0.077),
}
_SDR_WHITE = 203.0  # candelas per square metre that count as white in an HDR picture (BT.2408)
_SIGNATURES = {"grey": b"GRAY", "rgb": b"RGB ", "cmyk": b"CMYK"}


def profile_of(
    model: str, icc: bytes | None, chunks: Iterable[tuple[bytes, bytes]], bits: int = 8
) -> bytes | None:
    """The profile that the numbers of a picture of `model` ("grey", "rgb", "cmyk") are in; None for sRGB, or
    where nothing usable says so.

    `icc` is the file's own profile, `chunks` a PNG's cICP, sRGB, gAMA and cHRM; `bits` a sample's, 8 or 16.
    """
    said = dict(reversed(list(chunks)))  # of two the first
    if made := _of_cicp(model, said.get(b"cICP", b""), bits):
        return made
    if icc is not None and icc[16:20] == _SIGNATURES[model] and _works(icc, model):
        return icc
    if b"sRGB" in said:
        return None
    gamma, numbers = _numbers(said.get(b"gAMA"), 1), _numbers(said.get(b"cHRM"), 8)
    if not (gamma and gamma[0]) and not numbers:
        return None
    places: Any = tuple(number / 100000 for number in numbers) if numbers else SRGB
    if made_profile("rgb", srgb_curve(), places) is None:  # impossible ones
        places = SRGB
    power = 100000 / gamma[0] if gamma and gamma[0] else 2.2
    if np.abs(np.array(places) - SRGB).max() < 0.004 and abs(power - 2.2) < 0.03:  # what PNGs of sRGB say
        return None
    return made_profile(model, power_curve(power) if gamma else srgb_curve(), places)


def unknown_colours(chunks: Iterable[tuple[bytes, bytes]]) -> str | None:
    """A note of a cICP that does not act, since what it says is not known here."""
    cicp = dict(reversed(list(chunks))).get(b"cICP", b"")
    if not cicp or cicp[:2] == _UNSPECIFIED or _of_cicp("rgb", cicp, 8):
        return None
    codes = ", ".join(map(str, cicp))
    return f"what it says of its colours by numbers (cICP, nclx: {codes}) is not known, and not read"


_UNSPECIFIED = bytes([2, 2])


def _of_cicp(model: str, cicp: bytes, bits: int) -> bytes | None:
    if len(cicp) != 4 or cicp[2] != 0 or cicp == _UNSPECIFIED + b"\0\1":
        return None
    curve, places = _transfer(cicp[1]), _PRIMARIES.get(cicp[0])
    if curve is None or places is None:
        return None
    if cicp[3] == 0:  # levels 16 to 235 of 8 bits, and of 16 these times 256
        step, most = 2 ** (bits - 8), 2**bits - 1
        levels = (np.linspace(0, 1, 4096) * most / step - 16) / 219
        light = curve_table(curve)
        curve = table_curve(np.interp(levels, np.linspace(0, 1, len(light)), light))
    return made_profile(model, curve, places)


def to_srgb(samples: np.ndarray, model: str, profile: bytes | None) -> np.ndarray:
    """`samples` as sRGB (H, W, 3), float32 in [0, 1]; by `profile`, or plainly without one."""
    if profile is not None and not is_srgb(profile, model):
        return _by_profile(samples, model, profile)
    levels = samples.astype(np.float32) / np.iinfo(samples.dtype).max
    if model == "cmyk":
        return (1 - levels[..., :3]) * (1 - levels[..., 3:])
    return levels if model == "rgb" else _as_rgb(levels)


def from_srgb(rgb: np.ndarray, model: str, profile: bytes | None) -> np.ndarray:
    """sRGB (H, W, 3), float32 in [0, 1], as samples of `model` ("grey" or "rgb") in `profile`: float32 in [0,
    1].

    A colour becomes the grey of its luma (ITU-R BT.601).
    """
    levels = rgb @ np.array(BT601, np.float32) if model == "grey" else rgb
    if profile is None or is_srgb(profile, model):
        return levels
    if (shaper := _shaper(profile)) is not None:
        return shaper.samples(srgb_to_light(levels))
    pyvips = vips()
    image = pyvips.Image.new_from_array(_in_16_bits(rgb if model == "rgb" else _as_rgb(levels)))
    lab = (
        image.copy(interpretation="rgb16")
        .icc_import(input_profile="srgb", intent="relative", pcs="lab")
        .copy()
    )
    lab.set_type(pyvips.GValue.blob_type, "icc-profile-data", profile)
    made = lab.icc_export(depth=16, intent="relative", pcs="lab").numpy()
    return made.reshape(levels.shape).astype(np.float32) / 65535


@lru_cache(maxsize=16)
def is_srgb(profile: bytes, model: str) -> bool:
    """Whether numbers in `profile` are sRGB's already: no colour of a grid of them moves by more than half a
    level of 255.
    """
    if model == "cmyk":
        return False
    steps = np.linspace(0, 255, 9).round().astype(np.uint8)
    grid = (
        steps[None] if model == "grey" else np.stack(np.meshgrid(steps, steps, steps), -1).reshape(1, -1, 3)
    )
    plain = grid.astype(np.float32) / 255
    moved = _by_profile(grid, model, profile) - (plain if model == "rgb" else _as_rgb(plain))
    return bool(np.abs(moved).max() <= 0.5 / 255)


def _by_profile(samples: np.ndarray, model: str, profile: bytes) -> np.ndarray:
    if (shaper := _shaper(profile)) is not None:
        shown = light_to_srgb(shaper.light(samples))
        return shown if model == "rgb" else _as_rgb(shown)
    pyvips = vips()
    image = pyvips.Image.new_from_array(np.ascontiguousarray(samples))
    deep = samples.dtype == np.uint16
    names = {"grey": ("b-w", "grey16"), "rgb": ("srgb", "rgb16"), "cmyk": ("cmyk", "cmyk")}
    image = image.copy(interpretation=names[model][deep])
    image.set_type(pyvips.GValue.blob_type, "icc-profile-data", profile)
    made = image.icc_transform("srgb", embedded=True, intent="relative", depth=16 if deep else 8).numpy()
    made = made.reshape(*samples.shape[:2], -1)
    return made[..., :3].astype(np.float32) / (65535 if deep else 255)


@lru_cache(maxsize=16)
def _shaper(profile: bytes) -> Shaper | None:
    return Shaper.of(profile)


@lru_cache(maxsize=16)
def _works(profile: bytes, model: str) -> bool:
    """Whether LittleCMS takes it for colours of `model`; libvips would quietly take another profile's
    place.
    """
    mode = {"grey": "L", "rgb": "RGB", "cmyk": "CMYK"}[model]
    try:
        ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB"), mode, "RGB"
        )
    except (ImageCms.PyCMSError, OSError, ValueError):
        return False
    return True


def _as_rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=-1)


def _in_16_bits(levels: np.ndarray) -> np.ndarray:
    return (levels * 65535).round().clip(0, 65535).astype(np.uint16)


def _transfer(number: int) -> bytes | None:
    """The curve of H.273's transfer characteristics, with full range; None for those that it does not
    have.
    """
    v = np.linspace(0, 1, 4096)
    if number in (1, 2, 6, 11, 12, 13, 14, 15):  # BT.709's are shown as sRGB, as browsers do
        return srgb_curve()
    if number in (4, 5, 8):
        return power_curve({4: 2.2, 5: 2.8, 8: 1.0}[number])
    if number == 7:  # SMPTE ST 240
        return table_curve(np.where(v < 0.0912, v / 4, ((v + 0.1115) / 1.1115) ** (1 / 0.45)))
    if number in (9, 10):  # logarithms over 2 and 2.5 decades
        return table_curve(np.where(v > 0, 10 ** ((v - 1) * {9: 2, 10: 2.5}[number]), 0))
    if number == 17:  # SMPTE ST 428-1
        return table_curve(v**2.6 * 52.37 / 48)
    if number == 16:  # SMPTE ST 2084, cut off above white
        root = v ** (1 / 78.84375)
        light = np.maximum(root - 0.8359375, 0) / (18.8515625 - 18.6875 * root)
        return table_curve(10000 * light ** (1 / 0.1593017578125) / _SDR_WHITE)
    if number == 18:  # ARIB STD-B67: 0.75 is white
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        light = np.where(v <= 0.5, v**2 / 3, (np.exp((v - c) / a) + b) / 12)
        return table_curve(light / ((math.exp((0.75 - c) / a) + b) / 12))
    return None


def _numbers(data: bytes | None, count: int) -> tuple[int, ...]:
    return struct.unpack(f">{count}I", data) if data is not None and len(data) == 4 * count else ()
