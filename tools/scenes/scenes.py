"""Scenes: captioned pictures with an exact mask, at any resolution; what the mini bundle is trained on.

A scene is a handful of numbers (what stands where, its colour, the ground, the time of day, a seed for the
textures), and `render` evaluates it at any pixel grid: shapes are signed distances, textures are sums of
noise octaves that stop at the pixel size. So one scene is a 128-px training picture and a 3000-px
"photograph" to edit, and the same scene with another colour or object is the ground truth of that edit.

World coordinates: x to the right, y up, the object's foot at (0, 0), its larger side about 1.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from .shapes import OBJECTS, Array, Surface, coverage, fbm, smoothstep

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.80, 0.11, 0.12),
    "orange": (0.95, 0.50, 0.08),
    "yellow": (0.93, 0.86, 0.18),
    "green": (0.13, 0.56, 0.20),
    "blue": (0.14, 0.30, 0.85),
    "purple": (0.52, 0.17, 0.68),
    "pink": (0.97, 0.55, 0.72),
    "white": (0.96, 0.96, 0.95),
}
GROUNDS: dict[str, tuple[float, float, float]] = {
    "grass": (0.34, 0.50, 0.20),
    "sand": (0.80, 0.69, 0.47),
    "snow": (0.88, 0.91, 0.95),
    "stone": (0.47, 0.45, 0.43),
}
LIGHTS: dict[str, tuple[float, float, float]] = {  # what a white wall looks like at that time
    "day": (1.0, 1.0, 1.0),
    "sunset": (1.0, 0.80, 0.62),
    "night": (0.42, 0.48, 0.70),
}
SKIES: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {  # at the horizon, high up
    "day": ((0.78, 0.87, 0.95), (0.36, 0.58, 0.88)),
    "sunset": ((0.98, 0.70, 0.42), (0.46, 0.36, 0.58)),
    "night": ((0.16, 0.19, 0.34), (0.03, 0.04, 0.12)),
}
DEGRADED = ", blurry, noisy, low resolution"  # what a degraded training picture's caption ends with
CLOSE_UP = ", close up"  # and a view of part of the object
HELD_OUT = 1_000_000  # scenes with this seed or a larger one are never trained on
_BAND = 1 << 20  # pixels rendered at once, so that memory does not grow with the picture


@dataclass(frozen=True)
class View:
    """The window of the world that a picture shows: its centre and its shorter side, in world units."""

    x: float
    y: float
    extent: float


@dataclass(frozen=True)
class Scene:
    """Everything `render` needs. `seed` fixes textures, clutter and small variations of form."""

    colour: str
    kind: str
    ground: str
    time: str
    seed: int
    horizon: float = 0.45  # height of the skyline above the object's foot
    flip: bool = False  # light from the right instead of the left
    view: View = View(0.0, 0.4, 1.8)

    @property
    def caption(self) -> str:
        """ "a red house on snow at night"."""
        return f"{self.phrase} on {self.ground} at {self.time}"

    @property
    def phrase(self) -> str:
        """ "a red house"."""
        return f"{'an' if self.colour[0] in 'aeiou' else 'a'} {self.colour} {self.kind}"


@dataclass(frozen=True)
class Rendered:
    """A picture (H, W, 3) float32 in [0, 1], and how much the object covers each pixel (H, W) in [0, 1]."""

    image: Array
    mask: Array


def random_scene(seed: int) -> Scene:
    """Scene number `seed`: every attribute uniform, the object 35 to 85 % of the frame."""
    rng = np.random.default_rng(seed)
    kind = str(rng.choice(list(OBJECTS)))
    size = OBJECTS[kind].size
    extent = max(size) / rng.uniform(0.35, 0.85)
    slack = 0.5 * max(extent - max(size), 0.0)
    view = View(rng.uniform(-0.7, 0.7) * slack, 0.5 * size[1] + rng.uniform(-0.5, 0.7) * slack, extent)
    return Scene(
        colour=str(rng.choice(list(COLOURS))),
        kind=kind,
        ground=str(rng.choice(list(GROUNDS))),
        time=str(rng.choice(list(LIGHTS))),
        seed=seed,
        horizon=rng.uniform(0.2, 0.7),
        flip=bool(rng.random() < 0.5),
        view=view,
    )


def closer(scene: Scene, rng: np.random.Generator) -> Scene:
    """The same scene seen so near that only a part of the object is in the frame."""
    width, height = OBJECTS[scene.kind].size
    extent = max(width, height) * rng.uniform(0.15, 0.6)
    view = View(rng.uniform(-0.5, 0.5) * width, rng.uniform(0.0, 1.0) * height, extent)
    return replace(scene, view=view)


def all_captions() -> Iterator[str]:
    """Every full caption, in a fixed order."""
    for colour in COLOURS:
        for kind in OBJECTS:
            for ground in GROUNDS:
                for time in LIGHTS:
                    yield Scene(colour, kind, ground, time, 0).caption


def lit_palette(time: str) -> Array:
    """The palette as it looks at that time of day: (8, 3) in [0, 1], in the order of COLOURS."""
    return np.array(list(COLOURS.values()), np.float32) * np.array(LIGHTS[time], np.float32)


def render(scene: Scene, height: int, width: int | None = None) -> Rendered:
    """Draw `scene` on `height` x `width` pixels (square when width is left out)."""
    width = height if width is None else width
    pixel = scene.view.extent / min(height, width)
    x = scene.view.x + (np.arange(width, dtype=np.float32) + 0.5 - width / 2) * pixel
    y = scene.view.y - (np.arange(height, dtype=np.float32) + 0.5 - height / 2) * pixel
    rows = max(1, _BAND // width)
    bands = [_render_band(scene, x[None, :], y[i : i + rows, None], pixel) for i in range(0, height, rows)]
    return Rendered(np.concatenate([b.image for b in bands]), np.concatenate([b.mask for b in bands]))


def _render_band(scene: Scene, x: Array, y: Array, pixel: float) -> Rendered:
    x, y = np.broadcast_arrays(x, y)
    rng = np.random.default_rng([scene.seed, 7])
    side = -1.0 if scene.flip else 1.0  # the light's side: left is 1
    light = np.array(LIGHTS[scene.time], np.float32)
    image = _sky(scene, x, y, pixel, rng)
    ground, edge = _ground(scene, x, y, pixel, rng)
    image += edge[..., None] * (ground * light - image)
    image *= 1 - _contact_shadow(scene, x, y, side)[..., None] * edge[..., None] * np.float32(0.55)
    surface = OBJECTS[scene.kind].draw(x, y, pixel, side, scene.seed)
    albedo = _paint(scene, surface, x, y, pixel)
    image += surface.cover[..., None] * (albedo * light - image)
    grain = fbm(x, y, pixel, 24.0, scene.seed + 5, octaves=3, persistence=0.9)
    image += np.float32(0.012) * grain[..., None]  # so that flat areas are not perfectly flat
    return Rendered(np.clip(image, 0, 1).astype(np.float32), surface.cover.astype(np.float32))


def _paint(scene: Scene, surface: Surface, x: Array, y: Array, pixel: float) -> Array:
    """The object's colour (H, W, 3): its own where `tint` is 1, its parts' elsewhere; shaded and textured."""
    own = np.array(COLOURS[scene.colour], np.float32)
    texture = 1 + 0.10 * fbm(x, y, pixel, 3.0, scene.seed + 4, octaves=8, persistence=0.7)
    albedo = surface.other + surface.tint[..., None] * own
    return albedo * (surface.shade * texture)[..., None].astype(np.float32)


def _sky(scene: Scene, x: Array, y: Array, pixel: float, rng: np.random.Generator) -> Array:
    low, high = (np.array(c, np.float32) for c in SKIES[scene.time])
    up = smoothstep(0.0, 1.6, y - scene.horizon)[..., None]
    sky = low + up * (high - low)
    clouds = smoothstep(
        0.05, 0.7, fbm(0.6 * x, 1.6 * y, pixel, 1.0, scene.seed + 1, octaves=7, persistence=0.6)
    )
    cloud = np.array(LIGHTS[scene.time], np.float32) * np.float32(0.97 if scene.time != "night" else 0.45)
    sky += (rng.uniform(0.2, 0.9) * clouds)[..., None].astype(np.float32) * (cloud - sky)
    hill = (
        scene.horizon + 0.10 + 0.16 * fbm(x, 0 * y, pixel, 0.9, scene.seed + 2, octaves=6, persistence=0.45)
    )
    distant = 0.55 * sky + 0.45 * np.array(LIGHTS[scene.time], np.float32) * np.array(
        [0.36, 0.42, 0.46], np.float32
    )
    return sky + coverage(y - hill, pixel)[..., None] * (distant - sky)


def _ground(scene: Scene, x: Array, y: Array, pixel: float, rng: np.random.Generator) -> tuple[Array, Array]:
    """Ground colour (H, W, 3) and how much of each pixel is ground."""
    edge = coverage(y - scene.horizon, pixel)
    depth = np.clip(scene.horizon - y, 0.02, None)  # nearer to the viewer: larger
    stretch = 3.0 if scene.ground in ("sand", "snow") else 1.6  # seen at a low angle, texture is flattened
    contrast = {"grass": 0.26, "sand": 0.13, "snow": 0.07, "stone": 0.22}[scene.ground]
    grain = fbm(x, stretch * y, pixel, 2.5, scene.seed + 3, octaves=9, persistence=0.78)
    base = np.array(GROUNDS[scene.ground], np.float32) * np.float32(rng.uniform(0.9, 1.08))
    level = 1 + contrast * grain + 0.06 * np.log(depth + 0.3)
    for _ in range(rng.integers(3, 9)):  # clutter: pebbles and tufts
        px, py, r = rng.uniform(-2.0, 2.0), scene.horizon - rng.uniform(0.05, 1.2), rng.uniform(0.015, 0.05)
        d = np.hypot(x - px, 1.8 * (y - py)) - r
        level *= 1 - rng.uniform(-0.25, 0.5) * coverage(d, max(pixel, 0.01))
    return base * level[..., None].astype(np.float32), edge


def _contact_shadow(scene: Scene, x: Array, y: Array, side: float) -> Array:
    width = OBJECTS[scene.kind].size[0]
    d = np.hypot((x - side * 0.22 * width) / (0.72 * width), y / 0.13)
    return np.exp(-(d**2) * 1.6).astype(np.float32)
