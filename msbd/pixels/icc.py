"""ICC profiles of curves and primaries, computed exactly: to light in sRGB's primaries, and back; and made.

Source   ICC.1:2022: 8.3 and 8.4 (monochrome and three-component matrix profiles), 10.6 and 10.18 (curves),
         annex E.3 (Bradford's adaptation), annex F.3 (the computation)
Tensors  samples (H, W) or (H, W, 3) in [0, 1], float32; light likewise, 1 = white, linear, of sRGB's
         primaries
Copying  this file stands alone: numpy only

Profiles with tables of colours (A2B) are another library's: `Shaper.of` returns None for them. Why these are
ours: docs/log.md, "Which library reads 16 bits".
"""

import struct
from dataclasses import dataclass

import numpy as np

# x and y of white, red, green and blue
Chromaticities = tuple[float, float, float, float, float, float, float, float]

SRGB: Chromaticities = (0.3127, 0.3290, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)
ADOBE_RGB: Chromaticities = (0.3127, 0.3290, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06)
_D50 = np.array([0.9642, 1.0, 0.8249])
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
_STEPS = 65536  # entries of a curve


@dataclass(frozen=True)
class Shaper:
    """A profile as a curve for each channel and a matrix to the light of sRGB's primaries (1 x 1 for
    grey).
    """

    curves: tuple[np.ndarray, ...]  # (_STEPS,) float32 each: light of samples 0 to 1
    matrix: np.ndarray  # (3, 3) or (1, 1)

    @staticmethod
    def of(profile: bytes) -> "Shaper | None":
        """Of an RGB or grey profile; None for one of another kind, or damaged."""
        try:
            with np.errstate(all="ignore"):  # of absurd exponents: what is not finite is refused
                return _shaper(profile)
        except (struct.error, ValueError, IndexError, OverflowError, np.linalg.LinAlgError):
            return None

    def light(self, samples: np.ndarray) -> np.ndarray:
        """Light of `samples`, uint8 or uint16, in the same shape; it may leave [0, 1]."""
        step = (_STEPS - 1) // int(np.iinfo(samples.dtype).max)  # 257 or 1
        if samples.ndim == 2:
            return self.curves[0][::step][samples]
        planes = [curve[::step][samples[..., c]] for c, curve in enumerate(self.curves)]
        return np.stack(planes, axis=-1) @ self.matrix.T.astype(np.float32)

    def samples(self, light: np.ndarray) -> np.ndarray:
        """Samples in [0, 1] of `light`; what the profile cannot show is cut off."""
        levels = np.linspace(0, 1, _STEPS, dtype=np.float32)
        if light.ndim == 2:
            return _inverse(light, self.curves[0], levels)
        own = light @ np.linalg.inv(self.matrix).T.astype(np.float32)
        return np.stack(
            [_inverse(own[..., c], curve, levels) for c, curve in enumerate(self.curves)], axis=-1
        )


def _inverse(light: np.ndarray, curve: np.ndarray, levels: np.ndarray) -> np.ndarray:
    curve = np.maximum.accumulate(curve)
    end = int(np.argmax(curve)) + 1  # the lowest level that is as bright as any
    return np.interp(light, curve[:end], levels[:end]).astype(np.float32)


def srgb_to_light(levels: np.ndarray) -> np.ndarray:
    """IEC 61966-2-1: sRGB's levels in [0, 1] as light."""
    high = ((np.maximum(levels, 0) + 0.055) / 1.055) ** 2.4
    return np.where(levels <= 0.04045, levels / 12.92, high).astype(np.float32)


def light_to_srgb(light: np.ndarray) -> np.ndarray:
    """IEC 61966-2-1: light as sRGB's levels, both in [0, 1], what is outside cut off."""
    light = np.clip(light, 0, 1)
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055).astype(np.float32)


def lab_to_light(lab: np.ndarray) -> np.ndarray:
    """CIE L*a*b* (H, W, 3), L* to 100, of the white D50, as light; it may leave [0, 1]."""
    root = (lab[..., :1] + 16) / 116
    roots = np.concatenate([root + lab[..., 1:2] / 500, root, root - lab[..., 2:] / 200], axis=-1)
    xyz = _D50 * np.where(roots > 6 / 29, roots**3, (roots - 4 / 29) * 3 * (6 / 29) ** 2)
    return xyz @ np.linalg.inv(_columns(SRGB)).T


def _shaper(profile: bytes) -> Shaper | None:
    tags = {}
    (count,) = struct.unpack(">I", profile[128:132])
    for number in range(min(count, 200)):
        name, start, length = struct.unpack(">4sII", profile[132 + 12 * number : 144 + 12 * number])
        if start + length > len(profile):
            return None
        tags.setdefault(name, profile[start : start + length])
    if profile[20:24] != b"XYZ " or any(name.startswith((b"A2B", b"D2B")) for name in tags):
        return None
    if profile[16:20] == b"GRAY":
        return Shaper((curve_table(tags.get(b"kTRC", b"")),), np.ones((1, 1)))
    if profile[16:20] != b"RGB ":
        return None
    curves = tuple(curve_table(tags.get(channel + b"TRC", b"")) for channel in (b"r", b"g", b"b"))
    columns = [_numbers(tags.get(channel + b"XYZ", b"")[8:20]) for channel in (b"r", b"g", b"b")]
    matrix = np.linalg.inv(_columns(SRGB)) @ np.stack(columns, axis=1)
    if abs(np.linalg.det(matrix)) < 1e-6:
        return None
    return Shaper(curves, matrix)


def curve_table(tag: bytes) -> np.ndarray:
    """A curve as a table; ValueError for none, or a damaged one."""
    x = np.linspace(0, 1, _STEPS)
    if tag[:4] == b"curv":
        (count,) = struct.unpack(">I", tag[8:12])
        entries = np.frombuffer(tag[12 : 12 + 2 * count], ">u2")
        if len(entries) < count:
            raise ValueError
        if count == 0:
            made = x
        elif count == 1:
            made = x ** (float(entries[0]) / 256)
        else:
            made = np.interp(x, np.linspace(0, 1, count), entries / 65535)
    elif tag[:4] == b"para":
        (kind,) = struct.unpack(">H", tag[8:10])
        count = (1, 3, 4, 5, 7)[kind]
        numbers = _numbers(tag[12 : 12 + 4 * count])
        if len(numbers) < count:
            raise ValueError
        made = _parametric(x, kind, np.pad(numbers, (0, 7 - count)))
    else:
        raise ValueError
    if not np.isfinite(made).all() or np.ptp(made) < 1e-3:
        raise ValueError
    return made.clip(0, 1).astype(np.float32)


def _parametric(x: np.ndarray, kind: int, numbers: np.ndarray) -> np.ndarray:
    """ICC.1, table 68; 7 numbers."""
    g, a, b, c, d, e, f = numbers
    if kind == 0:
        return x**g
    power = np.maximum(a * x + b, 0) ** g
    if kind == 1:
        return np.where(x >= -b / a, power, 0)
    if kind == 2:
        return np.where(x >= -b / a, power + c, c)
    return np.where(x >= d, power + e, c * x + f)  # kind 3 has e = f = 0


def _numbers(data: bytes) -> np.ndarray:
    """s15Fixed16 numbers."""
    if len(data) % 4 or not data:
        raise ValueError
    return np.frombuffer(data, ">i4") / 65536


# ---- profiles of our own -----------------------------------------------------------------------------------


def made_profile(model: str, curve: bytes, chromaticities: Chromaticities = SRGB) -> bytes | None:
    """A profile (version 4) of `model` "rgb" or "grey", of one curve and, for "rgb", of primaries; None for
    impossible ones.
    """
    tags = {b"desc": _text("msbd"), b"cprt": _text("none"), b"wtpt": _xyz(_D50)}
    if model == "grey":
        tags[b"kTRC"] = curve
    else:
        columns = _columns(chromaticities)
        if not np.isfinite(columns).all():
            return None
        for name, column in zip((b"r", b"g", b"b"), columns.T, strict=True):
            tags |= {name + b"XYZ": _xyz(column), name + b"TRC": curve}
    table, body, at = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    places: dict[bytes, int] = {}
    for name, data in tags.items():
        if data not in places:  # equal ones share their place
            places[data] = at + len(body)
            body += data + b"\0" * (-len(data) % 4)
        table += name + struct.pack(">II", places[data], len(data))
    space = b"GRAY" if model == "grey" else b"RGB "
    header = struct.pack(">I4sI4s4s4s", at + len(body), b"", 0x04300000, b"mntr", space, b"XYZ ")
    header += struct.pack(">6H4s", 2026, 1, 1, 0, 0, 0, b"acsp") + bytes(28) + _xyz(_D50)[8:]
    return header.ljust(128, b"\0") + table + body


def power_curve(gamma: float) -> bytes:
    """Light is the level to the power `gamma`, which is held between 0.01 and 100."""
    return b"para" + bytes(8) + _fixed(min(max(gamma, 0.01), 100.0))


def srgb_curve() -> bytes:
    """IEC 61966-2-1: ((v + 0.055) / 1.055)**2.4, and v / 12.92 up to 0.04045."""
    numbers = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    return b"para" + bytes(4) + b"\0\3\0\0" + b"".join(_fixed(number) for number in numbers)


def table_curve(light: np.ndarray) -> bytes:
    """A curve of equal steps, cut off at 0 and 1."""
    levels = (light * 65535).round().clip(0, 65535).astype(">u2")
    return b"curv" + struct.pack(">II", 0, len(levels)) + levels.tobytes()


def _columns(chromaticities: Chromaticities) -> np.ndarray:
    """XYZ of red, green and blue as columns (3, 3), adapted to D50; not finite where they span no colours."""
    points = np.array(chromaticities, np.float64).reshape(4, 2)
    if (points < 0).any() or (points > 1).any() or points[0, 1] == 0:
        return np.full((3, 3), np.nan)
    white, *primaries = (np.array([x, y, 1 - x - y]) for x, y in points)
    white, matrix = white / white[1], np.stack(primaries, axis=1)
    if abs(np.linalg.det(matrix)) < 1e-6:
        return np.full((3, 3), np.nan)
    shares = np.linalg.solve(matrix, white)
    if (shares <= 0).any():  # white is no mixture of them
        return np.full((3, 3), np.nan)
    matrix = matrix * shares
    cones = (_BRADFORD @ _D50) / (_BRADFORD @ white)
    return np.linalg.inv(_BRADFORD) @ np.diag(cones) @ _BRADFORD @ matrix


def _fixed(number: float) -> bytes:
    return struct.pack(">i", round(number * 65536))


def _xyz(values: np.ndarray) -> bytes:
    return b"XYZ \0\0\0\0" + b"".join(_fixed(float(value)) for value in values)


def _text(words: str) -> bytes:
    return (
        b"mluc\0\0\0\0"
        + struct.pack(">II4sII", 1, 12, b"enUS", 2 * len(words), 28)
        + words.encode("utf-16-be")
    )
