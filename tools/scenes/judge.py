"""An independent judge of pictures of scenes: which object is in there, and in which colour?

It measures the mini bundle and serves nothing else: no net of the bundle is trained on it, and nothing is
chosen by it.

Object  A small convolutional net, trained here on scenes of its own (other seeds than the bundle's and than
        every test's): random views, softened as a VAE or an upscaler would, noisy, with colours shifted and
        swapped so that it goes by form.
Colour  No net: the entry of the scene's palette, under that time of day's light, nearest (CIE 1976 Lab) to
        the median colour of the object. Where the object is comes from the caller's mask, or, for a picture
        without one, from the net's second head, which draws the object's outline; the median is over its core
        (one of 32 x 32 cells eroded away). No outline, no colour: that counts as wrong.

Its own errors are measured on held-out pictures and stand beside every figure it gives.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from msbd.files import whole_file
from msbd.pixels.resize import resize

from .data import runs_folder
from .scenes import COLOURS, lit_palette, random_scene, render
from .shapes import OBJECTS, Array

KINDS = tuple(OBJECTS)
SIDE = 64  # pixels; what the net looks at
CELLS = 32  # side of the outline it draws
_SEED = 2_000_000  # the first training scene's seed; the bundle's held-out ones are below
_SCENES, _STEPS, _BATCH, _RATE = 4000, 500, 64, 4e-3
_VERSION = 1  # counts changes of the above: judges that earlier versions kept are not found any more


class JudgeNet(nn.Module):
    """A U-shaped net of 0.5 M parameters.

    (B, 3, 64, 64) in [-1, 1] -> kinds (B, 6), outline (B, 1, 32, 32), both logits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            [
                _convolution(3, 24, 2),
                _convolution(24, 48, 2),
                _convolution(48, 96, 2),
                _convolution(96, 128, 2),
            ]
        )
        self.middle = _convolution(128, 128)
        self.up = nn.ModuleList(
            [_convolution(128 + 96, 64), _convolution(64 + 48, 32), _convolution(32 + 24, 24)]
        )
        self.kind, self.outline = nn.Linear(128, len(KINDS)), nn.Conv2d(24, 1, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of both heads."""
        skips = []
        for block in self.down:
            x = block(x)
            skips.append(x)
        x = self.middle(x)
        kind = self.kind(x.mean(dim=(2, 3)))
        for block, skip in zip(self.up, skips[-2::-1], strict=True):
            x = block(torch.cat([F.interpolate(x, scale_factor=2.0), skip], dim=1))
        return kind, self.outline(x)


@dataclass(frozen=True)
class Judge:
    """A trained `net` and what it gets right on held-out scenes: `figures`, percentages by name."""

    net: JudgeNet
    figures: dict[str, float]

    def kinds(self, images: Tensor) -> list[str]:
        """The object in each of `images` (B, 3, H, W) in [-1, 1], any size, seen whole."""
        return [KINDS[i] for i in self._look(images)[0].argmax(1).tolist()]

    def colours(self, images: Tensor, times: Sequence[str]) -> list[str | None]:
        """The colour of the object in each of `images` (B, 3, H, W) in [-1, 1], taken at `times`.

        None where there is no object.
        """
        cores = [_core(outline) for outline in self._look(images)[1].sigmoid()]
        size = (images.shape[-2], images.shape[-1])
        masks = [F.interpolate(core[None], size=size)[0] for core in cores]
        return [
            nearest_colour(image, mask, time) for image, mask, time in zip(images, masks, times, strict=True)
        ]

    @torch.no_grad()
    def _look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.net(resize(images.float().cpu(), (SIDE, SIDE)))


def nearest_colour(image: Tensor, mask: Tensor, time: str) -> str | None:
    """The name in `COLOURS` nearest in Lab to the median of `image` (3, H, W) in [-1, 1] in `mask` (1, H, W).

    The palette is that of the light at `time`. None if the mask is empty.
    """
    inside = image.float().cpu()[:, mask[0].cpu() > 0.5] / 2 + 0.5  # (3, n)
    if inside.shape[1] == 0:
        return None
    middle = np.median(inside.numpy(), axis=1)
    distance = np.linalg.norm(srgb_to_lab(lit_palette(time)) - srgb_to_lab(middle), axis=-1)
    return list(COLOURS)[int(distance.argmin())]


def srgb_to_lab(colour: Array) -> Array:
    """CIE 1976 L*a*b* (..., 3) of sRGB colours (..., 3) in [0, 1]: IEC 61966-2-1, then CIE 15, white D65."""
    linear = np.where(colour <= 0.04045, colour / 12.92, ((np.maximum(colour, 0) + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = linear @ to_xyz.T / to_xyz.sum(1)  # white is (1, 1, 1)
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = f[..., 0], f[..., 1], f[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def load_judge(folder: Path | None = None) -> Judge:
    """The judge from `folder` (default: the runs folder), or trained now (two minutes on a core) and kept."""
    path = (runs_folder() if folder is None else folder) / f"judge-{_VERSION}.pt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        judge = train_judge()
        with whole_file(path) as unfinished:
            torch.save({"net": judge.net.state_dict(), "figures": judge.figures}, unfinished)
    stored = torch.load(path, map_location="cpu", weights_only=True)
    net = JudgeNet().eval().requires_grad_(False)
    net.load_state_dict(stored["net"])
    return Judge(net, stored["figures"])


def train_judge(scenes: int = _SCENES, steps: int = _STEPS, held_out: int = 600) -> Judge:
    """Train a judge from a fixed seed, on one thread so that it is the same everywhere, and examine it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = JudgeNet()
        _fit(net, scenes, steps)
        net.eval().requires_grad_(False)
        return Judge(net, _examine(net, held_out))
    finally:
        torch.set_num_threads(threads)


def _fit(net: JudgeNet, scenes: int, steps: int) -> None:
    images, masks, kinds, _ = _rendered(_SEED, scenes)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(net.parameters(), lr=_RATE, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, _RATE, total_steps=steps, pct_start=min(0.2, 100 / steps)
    )
    for _ in tqdm(range(steps), desc="judge", disable=None, leave=False):
        index = torch.randint(scenes, (_BATCH,), generator=generator)
        image, mask = _moved(images[index], masks[index], generator)
        kind, outline = net(_disturbed(image, generator))
        target = F.adaptive_avg_pool2d(mask, CELLS)
        loss = F.cross_entropy(kind, kinds[index]) + F.binary_cross_entropy_with_logits(outline, target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()


def _examine(net: JudgeNet, count: int) -> dict[str, float]:
    """Percentages right on scenes it was not trained on; "soft": shrunk to a third and enlarged again."""
    judge = Judge(net, {})
    images, _, kinds, scenes = _rendered(_SEED + 500_000, count)
    soft = resize(resize(images, (SIDE // 3, SIDE // 3)), (SIDE, SIDE))
    right = [KINDS[k] for k in kinds.tolist()]
    colours = judge.colours(images, [scene.time for scene in scenes])
    return {
        "object": _percentage(judge.kinds(images), right),
        "object, soft": _percentage(judge.kinds(soft), right),
        "colour": _percentage(colours, [scene.colour for scene in scenes]),
    }


def _rendered(first: int, count: int) -> tuple[Tensor, Tensor, Tensor, list]:
    """Images (n, 3, 64, 64) in [-1, 1], masks (n, 1, 64, 64), kinds (n,), the scenes from seed `first` on."""
    scenes = [random_scene(first + i) for i in range(count)]
    pictures = [render(scene, SIDE) for scene in scenes]
    images = torch.from_numpy(np.stack([p.image for p in pictures])).permute(0, 3, 1, 2).contiguous() * 2 - 1
    masks = torch.from_numpy(np.stack([p.mask for p in pictures]))[:, None]
    return images, masks, torch.tensor([KINDS.index(scene.kind) for scene in scenes]), scenes


def _moved(images: Tensor, masks: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pictures and masks (B, ., 64, 64) zoomed by 0.75 to 1.25, shifted, turned up to 6 degrees, flipped."""

    def spread(reach: float) -> Tensor:
        return (torch.rand(len(images), generator=generator) * 2 - 1) * reach

    zoom, turn, mirror = 1 + spread(0.25), spread(0.1), spread(1).sign()
    rows = [zoom * turn.cos() * mirror, -zoom * turn.sin(), spread(0.15),
            zoom * turn.sin() * mirror, zoom * turn.cos(), spread(0.15)]  # fmt: skip
    grid = F.affine_grid(
        torch.stack(rows, 1).view(-1, 2, 3), [len(images), 1, SIDE, SIDE], align_corners=False
    )
    moved = F.grid_sample(torch.cat([images, masks], 1), grid, padding_mode="reflection", align_corners=False)
    return moved[:, :3], moved[:, 3:]


def _disturbed(images: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures (B, 3, 64, 64) softened by one factor, 1 to 4, each with noise, gains, swapped channels."""

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    n = len(images)
    side = round(SIDE / (1 + 3 * max(0.0, draw(1).item() * 1.3 - 0.3)))
    images = resize(resize(images, (side, side)), (SIDE, SIDE))
    order = torch.argsort(draw(n, 3), 1)
    order = torch.where(draw(n, 1) < 0.4, order, torch.arange(3))  # colours of another world
    images = images.gather(1, order[:, :, None, None].expand_as(images))
    gain, shift = 0.75 + 0.5 * draw(n, 3, 1, 1), 0.3 * (draw(n, 3, 1, 1) - 0.5)
    noise = torch.randn(images.shape, generator=generator) * 0.12 * draw(n, 1, 1, 1) ** 2
    return (images * gain + shift + noise).clamp(-1, 1)


def _core(probability: Tensor) -> Tensor:
    """The inner cells {0, 1} of an outline (1, 32, 32): likely the object, like their eight neighbours."""
    outline = (probability > 0.5).float()
    inner = -F.max_pool2d(-F.pad(outline, (1, 1, 1, 1), value=1.0), 3, stride=1)
    return inner if inner.any() else outline  # an object too thin to have a core


def _percentage(given: Sequence[str | None], right: Sequence[str]) -> float:
    return 100 * sum(a == b for a, b in zip(given, right, strict=True)) / len(right)


def _convolution(channels: int, width: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
    )
