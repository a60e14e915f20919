"""The objects of a scene as signed distances with shading, and the noise their textures are made of."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]  # float32 nearly everywhere

_LATTICE = np.random.default_rng(20221024).uniform(-1, 1, (256, 256)).astype(np.float32)
_DARK = np.array([0.09, 0.09, 0.11], np.float32)  # tyres, doors
_WOOD = np.array([0.36, 0.24, 0.15], np.float32)
_GLASS = np.array([0.62, 0.72, 0.80], np.float32)


def smoothstep(low: float, high: float, value: Any) -> Array:
    """0 below `low`, 1 above `high`, a cubic between."""
    s = np.clip((value - low) / (high - low), 0, 1)
    return (s * s * (3 - 2 * s)).astype(np.float32)


def _value_noise(x: Array, y: Array) -> Array:
    """Smooth noise in about [-1, 1] with one random value per unit cell."""
    x0, y0 = np.floor(x), np.floor(y)
    u, v = x - x0, y - y0
    u, v = u * u * (3 - 2 * u), v * v * (3 - 2 * v)
    i, j = x0.astype(np.int64) & 255, y0.astype(np.int64) & 255
    i1, j1 = (i + 1) & 255, (j + 1) & 255
    near = _LATTICE[j, i] + u * (_LATTICE[j, i1] - _LATTICE[j, i])
    far = _LATTICE[j1, i] + u * (_LATTICE[j1, i1] - _LATTICE[j1, i])
    return near + v * (far - near)


def fbm(
    x: Array, y: Array, pixel: float, frequency: float, seed: int, *, octaves: int, persistence: float
) -> Array:
    """Sum of noise octaves at `frequency`, 2x, 4x, ... cells a unit, each `persistence` times the one before.

    Octaves finer than two pixels (`pixel` is a pixel's size in units of x) fade out: more detail shows at a
    higher resolution, and none of it aliases. With persistence near 0.7 the spectrum is close to a
    photograph's 1/f.
    """
    rng = np.random.default_rng([seed, octaves])
    total, amplitude = np.zeros(np.broadcast(x, y).shape, np.float32), 1.0
    for _ in range(octaves):
        turn, dx, dy = rng.uniform(0, 2 * np.pi), *rng.uniform(0, 256, 2)
        fade = float(np.clip(1.0 / (frequency * pixel) - 1.0, 0, 1))
        if fade > 0:
            c, s = np.float32(np.cos(turn) * frequency), np.float32(np.sin(turn) * frequency)
            noise = _value_noise(c * x - s * y + np.float32(dx), s * x + c * y + np.float32(dy))
            total += np.float32(amplitude * fade) * noise
        frequency, amplitude = 2 * frequency, amplitude * persistence
    return total


@dataclass(frozen=True)
class Surface:
    """An object over a pixel grid (H, W): coverage, brightness, where it has its own colour, the other."""

    cover: Array  # 0..1
    shade: Array  # about 0.6..1.2, median near 1
    tint: Array  # 1: the object's colour, 0: `other`
    other: Array  # (H, W, 3) in [0, 1], already times 1 - tint


@dataclass(frozen=True)
class Shape:
    """`draw(x, y, pixel, side, seed)` and the object's width and height in world units."""

    size: tuple[float, float]
    draw: Callable[[Array, Array, float, float, int], Surface]


def _box(x: Array, y: Array, w: Array | float, h: float, r: float = 0.0) -> Array:
    """Signed distance to a box of half sizes w, h with corners rounded by r."""
    dx, dy = np.abs(x) - (w - r), np.abs(y) - (h - r)
    return np.hypot(np.maximum(dx, 0), np.maximum(dy, 0)) + np.minimum(np.maximum(dx, dy), 0) - r


def _wedge(x: Array, y: Array, half: float, height: float) -> Array:
    """Signed distance (below the slopes) of a triangle standing on y = 0 with its tip at (0, height)."""
    slope = (height * np.abs(x) + half * y - half * height) / np.hypot(height, half)
    return np.maximum(slope, -y)


def coverage(distance: Array, pixel: float) -> Array:
    """How much of a pixel lies where the signed distance is negative."""
    return np.clip(0.5 - distance / pixel, 0, 1).astype(np.float32)


def _plain(x: Array) -> tuple[Array, Array]:
    """An all-own-colour tint and an `other` to paint details into."""
    return np.ones(x.shape, np.float32), np.zeros((*x.shape, 3), np.float32)


def _detail(tint: Array, other: Array, cover: Array, colour: Array) -> None:
    """Paint a part that does not have the object's own colour over what is there."""
    tint *= 1 - cover
    other += cover[..., None] * (colour - other)


def _ball(x: Array, y: Array, pixel: float, side: float, seed: int) -> Surface:
    u, v = x / 0.5, (y - 0.5) / 0.5
    z = np.sqrt(np.clip(1 - u * u - v * v, 0, 1))
    lit = np.clip(-0.45 * side * u + 0.55 * v + 0.70 * z, 0, 1)
    tint, other = _plain(x)
    gloss = smoothstep(0.955, 0.995, lit) * 0.6
    _detail(tint, other, gloss, np.ones(3, np.float32))
    return Surface(
        coverage(np.hypot(x, y - 0.5) - 0.5, pixel), (0.52 + 0.62 * lit).astype(np.float32), tint, other
    )


def _house(x: Array, y: Array, pixel: float, side: float, seed: int) -> Surface:
    body, roof = _box(x, y - 0.29, 0.45, 0.29), _wedge(x, y - 0.55, 0.58, 0.42)
    tint, other = _plain(x)
    rng = np.random.default_rng([seed, 11])
    door = rng.choice([-0.22, 0.0, 0.22])
    _detail(tint, other, coverage(_box(x - door, y - 0.14, 0.075, 0.14), pixel), _WOOD)
    for wx in (-0.26, 0.26):
        if abs(wx - door) > 0.15:
            _detail(tint, other, coverage(_box(x - wx, y - 0.33, 0.075, 0.075), pixel), _GLASS)
    shade = 1.02 - 0.16 * side * x
    under = smoothstep(0.0, 0.10, 0.57 - y)  # the eaves' shadow
    shade = np.where(y > 0.55, 0.74 - 0.10 * side * np.sign(x), shade * (0.78 + 0.22 * under))
    tiles = 1 + 0.05 * np.sign(np.sin(2 * np.pi * y / 0.06))
    shade = np.where(y > 0.55, shade * (tiles if pixel < 0.02 else 1.0), shade)
    return Surface(coverage(np.minimum(body, roof), pixel), shade.astype(np.float32), tint, other)


def _tree(x: Array, y: Array, pixel: float, side: float, seed: int) -> Surface:
    rng = np.random.default_rng([seed, 12])
    crown = np.full(x.shape, 9.0, np.float32)
    light = np.zeros(x.shape, np.float32)
    for a in np.linspace(0, 2 * np.pi, 6, endpoint=False):
        cx, cy = 0.2 * np.cos(a), 0.72 + 0.16 * np.sin(a)
        r = rng.uniform(0.19, 0.25)
        d = np.hypot(x - cx, y - cy) - r
        nearer = d < crown
        light = np.where(nearer, 0.5 * (-side * (x - cx) + 1.3 * (y - cy)) / r, light)
        crown = np.minimum(crown, d)
    crown = np.minimum(crown, np.hypot(x, y - 0.70) - 0.24)
    crown = crown + 0.022 * fbm(x, y, pixel, 9.0, seed + 21, octaves=5, persistence=0.7)
    trunk = _box(x, y - 0.25, 0.055 - 0.02 * np.clip(y, 0, 0.5), 0.25)
    leaves = coverage(crown, pixel)
    tint, other = leaves.copy(), (1 - leaves)[..., None] * _WOOD
    mottle = 0.16 * fbm(x, y, pixel, 9.0, seed + 22, octaves=6, persistence=0.75)
    shade = np.where(leaves > 0, 0.97 + 0.22 * light + mottle, 1.0 - 4 * side * x)
    return Surface(np.maximum(leaves, coverage(trunk, pixel)), shade.astype(np.float32), tint, other)


def _car(x: Array, y: Array, pixel: float, side: float, seed: int) -> Surface:
    x = x * side  # it faces its light
    body = _box(x, y - 0.26, 0.62, 0.14, 0.07)
    cabin = np.maximum(_wedge(x + 0.06, y - 0.30, 0.52, 0.52), y - 0.60)
    tint, other = _plain(x)
    pane = np.maximum(np.maximum(_wedge(x + 0.06, y - 0.30, 0.44, 0.44), y - 0.55), 0.40 - y)
    pane = np.maximum(pane, 0.022 - np.abs(x + 0.06))
    _detail(tint, other, coverage(pane, pixel), _GLASS * np.float32(0.6))
    cover = coverage(np.minimum(body, cabin), pixel)
    for wx in (-0.36, 0.36):
        tyre = coverage(np.hypot(x - wx, y - 0.13) - 0.13, pixel)
        _detail(tint, other, tyre, _DARK)
        _detail(tint, other, coverage(np.hypot(x - wx, y - 0.13) - 0.06, pixel), np.full(3, 0.62, np.float32))
        cover = np.maximum(cover, tyre)
    lamp = coverage(np.hypot(x - 0.57, y - 0.29) - 0.035, pixel)
    _detail(tint, other, lamp, np.array([1, 0.95, 0.7], np.float32))
    shade = 0.80 + 0.42 * smoothstep(0.12, 0.42, y)
    return Surface(cover, shade, tint, other)


def _tent(x: Array, y: Array, pixel: float, side: float, seed: int) -> Surface:
    tint, other = _plain(x)
    _detail(tint, other, coverage(_wedge(x, y, 0.13, 0.46), pixel), _DARK)
    folds = 0.07 * np.sin(16 * x / (1.02 - y).clip(0.2, None))
    shade = 1.0 - 0.17 * side * np.sign(x) + folds + 0.12 * (y - 0.4)
    return Surface(coverage(_wedge(x, y, 0.62, 0.85), pixel), shade.astype(np.float32), tint, other)


def _bottle(x: Array, y: Array, pixel: float, side: float, seed: int) -> Surface:
    half = 0.085 + 0.155 * smoothstep(0.86, 0.55, y)  # half width: neck, shoulder, body
    half = np.where(y > 0.90, 0.105, half)
    d = np.maximum(np.abs(x) - half, np.abs(y - 0.5) - 0.5)
    u = np.clip(x / half, -1, 1)
    lit = np.clip(-0.5 * side * u + 0.85 * np.sqrt(1 - u * u), 0, 1)
    tint, other = _plain(x)
    label = np.array([0.93, 0.90, 0.80], np.float32)
    _detail(tint, other, coverage(np.maximum(np.abs(y - 0.27) - 0.07, np.abs(x) - 0.239), pixel), label)
    _detail(tint, other, coverage(np.maximum(0.93 - y, d), pixel), _WOOD)
    _detail(tint, other, 0.55 * smoothstep(0.05, 0.0, np.abs(u + 0.45 * side) - 0.05), np.ones(3, np.float32))
    return Surface(coverage(d, pixel), (0.58 + 0.52 * lit).astype(np.float32), tint, other)


OBJECTS: dict[str, Shape] = {
    "ball": Shape((1.0, 1.0), _ball),
    "house": Shape((1.16, 0.97), _house),
    "tree": Shape((0.9, 1.1), _tree),
    "car": Shape((1.24, 0.60), _car),
    "tent": Shape((1.24, 0.85), _tent),
    "bottle": Shape((0.48, 1.0), _bottle),
}
