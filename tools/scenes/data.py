"""Training pictures for the mini bundle: rendered once, kept under the run folder, read back memory-mapped.

Every picture has a caption. Seven in ten show the whole object, two in ten a part of it ("..., close up"),
one in ten is degraded ("..., blurry, noisy, low resolution"), so that a negative prompt means something. A
third of the captions leave things out, so that "a red ball" alone is understood.
"""

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msbd.pixels.resize import round_to_8_bits
from msbd.train.config import HELD_OUT as VALIDATED
from msbd.train.degrade import apply

from .mild import sample_mild
from .scenes import CLOSE_UP, DEGRADED, HELD_OUT, Scene, closer, random_scene, render
from .shapes import Array, fbm, smoothstep

NATIVE = 128  # pixels; the mini U-Net's training size
SCENES = 6000  # captioned training pictures
ABSTRACTS = 1200  # uncaptioned ones for VAE and RRDB: any colour and edge, so that photographs survive too
STAGE = 192  # pixels; the size of a later stage and of its tiles
STAGES = 2400  # pictures of that size


def runs_folder() -> Path:
    """Where training keeps its data and checkpoints: `$MSBD_RUNS`, else ~/.cache/msbd/runs."""
    return Path(os.environ.get("MSBD_RUNS", "~/.cache/msbd/runs")).expanduser()


@dataclass(frozen=True)
class StoredPictures:
    """Pictures (N, H, W, 3) uint8, memory-mapped, and the caption of each."""

    images: NDArray[np.uint8]
    captions: list[str]

    def batch(self, index: Sequence[int] | Tensor) -> Tensor:
        """The pictures at `index` as (B, 3, H, W) float32 in [-1, 1]."""
        picked = torch.from_numpy(np.ascontiguousarray(self.images[np.asarray(index)]))
        return picked.permute(0, 3, 1, 2).float() / 127.5 - 1


def captioned_picture(seed: int, size: int = NATIVE) -> tuple[NDArray[np.uint8], str]:
    """Training picture number `seed` (size, size, 3) and its caption."""
    rng = np.random.default_rng([seed, 3])
    scene, caption = random_scene(seed), ""
    draw = rng.random()
    if draw < 0.2:
        scene, caption = closer(scene, rng), CLOSE_UP
    image = render(scene, size).image
    if draw > 0.9:
        image, caption = _degrade(image, seed), DEGRADED
    return to_bytes(image), _shortened(scene, rng) + caption


def stage_picture(seed: int) -> tuple[NDArray[np.uint8], str]:
    """Picture number `seed` (192, 192, 3) of a later stage: a whole view or, two times in three, a part.

    Never "close up".
    """
    rng = np.random.default_rng([seed, 6])
    scene = random_scene(seed)
    view = scene if seed % 3 == 0 else closer(scene, rng)
    return to_bytes(render(view, STAGE).image), _shortened(scene, rng)


def abstract_picture(seed: int, size: int = NATIVE) -> NDArray[np.uint8]:
    """Random photograph-like colours, gradients, edges and textures (size, size, 3)."""
    rng = np.random.default_rng([seed, 4])
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    x, y = np.meshgrid(axis, axis)

    def colour() -> Array:
        return np.clip(rng.uniform(0, 1) + rng.normal(0, 0.15, 3), 0, 1).astype(np.float32)

    image = np.broadcast_to(colour(), (size, size, 3)).copy()
    for layer in range(rng.integers(1, 4)):
        field = fbm(
            x, y, 1 / size, rng.uniform(1, 4), seed * 8 + layer, octaves=4, persistence=rng.uniform(0.2, 0.55)
        )
        edge = smoothstep(0.0, float(10 ** rng.uniform(-2, 0.2)), field - rng.uniform(-0.3, 0.3))
        image += edge[..., None] * (colour() - image)
    grain = fbm(x, y, 1 / size, 4.0, seed * 8 + 7, octaves=6, persistence=0.7)
    return to_bytes(image * (1 + rng.uniform(0, 0.2) * grain[..., None]))


def training_pictures() -> StoredPictures:
    """The captioned training set, rendered on first use (about two minutes on two cores)."""
    return _cached("scenes", SCENES, captioned_picture)


def stage_pictures() -> StoredPictures:
    """What the later stages of an edit look like: whole and partial views at 192 px, captioned alike."""
    return _cached("stages", STAGES, stage_picture)


def abstract_pictures() -> StoredPictures:
    """The uncaptioned training set, rendered on first use."""
    return _cached("abstracts", ABSTRACTS, _uncaptioned)


def held_out_scenes(count: int, start: int = 0) -> list[Scene]:
    """Scenes no net was trained on."""
    return [random_scene(HELD_OUT + start + i) for i in range(count)]


class RenderedScenes:
    """A source of training pictures: `count` held-out scenes from number `start` on, at `size` pixels."""

    def __init__(self, count: int, size: int, start: int = 0) -> None:
        self.scenes, self.size = held_out_scenes(count, start), size

    def __len__(self) -> int:
        return len(self.scenes)

    def read(self, index: int) -> tuple[NDArray[np.uint8], str]:
        """Scene `index`, (size, size, 3), and its caption."""
        scene = self.scenes[index]
        return to_bytes(render(scene, self.size).image), scene.caption


def _uncaptioned(seed: int) -> tuple[NDArray[np.uint8], str]:
    return abstract_picture(seed), ""


def _cached(name: str, count: int, make: Callable[[int], tuple[NDArray[np.uint8], str]]) -> StoredPictures:
    folder = runs_folder() / "data"
    stored, captions = folder / f"{name}-{count}.npy", folder / f"{name}-{count}.json"
    if not captions.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with ProcessPoolExecutor(initializer=torch.set_num_threads, initargs=(1,)) as pool:
            made = list(pool.map(make, range(count), chunksize=64))
        np.save(stored, np.stack([image for image, _ in made]))
        # Last: its presence says the set is whole.
        captions.write_text(json.dumps([caption for _, caption in made]))
    return StoredPictures(np.load(stored, mmap_mode="r"), json.loads(captions.read_text()))


def _shortened(scene: Scene, rng: np.random.Generator) -> str:
    """The scene's caption, in a third of the cases with parts left out or in another form."""
    forms = [scene.phrase, f"{scene.phrase} on {scene.ground}", f"{scene.phrase} at {scene.time}",
             f"{scene.phrase}, {scene.ground}, {scene.time}", f"a photo of {scene.caption}"]  # fmt: skip
    return scene.caption if rng.random() < 0.67 else str(rng.choice(forms))


def _degrade(image: Array, seed: int) -> Array:
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None]
    small = apply(tensor, sample_mild(generator))
    large = torch.nn.functional.interpolate(small, image.shape[:2], mode="bicubic", align_corners=False)
    return large[0].permute(1, 2, 0).clamp(0, 1).numpy()


def to_bytes(image: Array) -> NDArray[np.uint8]:
    """(H, W, 3) in [0, 1] -> the same in 8 bits, clamped and rounded."""
    return (np.clip(image, 0, 1) * 255).round().astype(np.uint8)


def picture(scene: Scene, size: int) -> Tensor:
    """`scene` as read from a file: (1, 3, size, size) in [-1, 1], on 256 levels."""
    return to_8_bits(torch.from_numpy(render(scene, size).image).permute(2, 0, 1)[None] * 2 - 1)


def to_8_bits(image: Tensor) -> Tensor:
    """`image` in [-1, 1], clamped, in float32 on 256 levels."""
    return round_to_8_bits(image.float(), -1.0)


class ScenePictures:
    """A source of training pictures: captioned scenes, whole and in part, and abstract ones; not degraded."""

    def __init__(self) -> None:
        sources = (training_pictures(), stage_pictures(), abstract_pictures())
        self._rows = [
            (source, i)
            for source in sources
            for i, caption in enumerate(source.captions)
            if not caption.endswith(DEGRADED)
        ]

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, i: int) -> tuple[NDArray[np.uint8], str]:
        """Picture number `i` (H, W, 3), 128 or 192 pixels a side, and its caption."""
        source, row = self._rows[i]
        return np.array(source.images[row]), source.captions[row]


def held_out_pictures() -> RenderedScenes:
    """Scenes that no net was trained on, and no table is made of, to validate with."""
    return RenderedScenes(VALIDATED, NATIVE, start=20_000)
