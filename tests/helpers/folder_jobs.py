"""Small folders of pictures, the commands that work on them, and pipelines in place of nets that are quick.

What a pipeline here paints depends on the picture, the prompt and the seed, so that a mix-up shows.
"""

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from msbd.edit.plan import EditPlan, EditResult
from msbd.restore.config import ModelSpec, RestoreConfig
from msbd.restore.plan import RestoreResult, plan_restore
from samplers.schedule import make_alphas_cumprod, make_betas
from tools.folders.manifest import Manifest, hash_of

SIZE = (16, 24)
BICUBIC = ("--method", "bicubic", "--scale", "2", "--device", "cpu", "--threads", "1")
QUICK = ("--device", "cpu", "--threads", "1", "--seed", "7")
EDIT_QUICK = (*QUICK, "-p", "a blue ball", "--model", "mini")
ALPHAS = make_alphas_cumprod(make_betas())


def drawn(words: str, shape: tuple[int, ...]) -> Tensor:
    """Values in [-0.2, 0.2], the same for the same words."""
    seed = int.from_bytes(hashlib.sha256(words.encode()).digest()[:4], "big")
    return 0.4 * torch.rand(shape, generator=torch.Generator().manual_seed(seed)) - 0.2


class QuickEditor:
    """In place of an EditPipeline."""

    tokenizer = None

    def __call__(self, image: Tensor, mask: Tensor, prompt: str, *, plan: EditPlan, **_: Any) -> EditResult:
        painted = (-image + drawn(f"{plan.config.seed} {prompt}", tuple(image.shape))).clamp(-1, 1)
        weight = (mask > 0).float()
        return EditResult(torch.where(mask > 0, painted, image), plan, image[:0], None, 0, weight=weight)


class QuickRestorer:
    """In place of a RestorePipeline."""

    tokenizer = None

    def __call__(
        self, image: Tensor, prompt: str, *, output_size: tuple[int, int], config: RestoreConfig, **_: Any
    ) -> RestoreResult:
        size = (image.shape[-2], image.shape[-1])
        plan = plan_restore(size, output_size, config, ModelSpec(), 8, ALPHAS)
        enlarged = F.interpolate(image, output_size, mode="nearest")
        made = (enlarged + drawn(f"{config.seed} {prompt}", (1, 3, *output_size))).clamp(-1, 1)
        return RestoreResult(made, plan, prompt, "", {})


@contextlib.contextmanager
def quick_pipelines() -> Iterator[None]:
    """Both commands take the pipelines of this file."""
    with (
        mock.patch("msbd.load.load_edit_pipeline", lambda *_, **__: QuickEditor()),
        mock.patch("msbd.load.load_restore_pipeline", lambda *_, **__: QuickRestorer()),
    ):
        yield


def write_pictures(folder: Path, names: tuple[str, ...], *, size: tuple[int, int] = SIZE) -> Path:
    """A picture of other pixels for each name, whose suffix says the format, and whose folders are made."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path, lossless=True)
    return folder


def write_masks(folder: Path, names: tuple[str, ...], *, size: tuple[int, int] = SIZE) -> Path:
    """A PNG for each name's stem, with a rectangle of another place each."""
    for number, name in enumerate(names):
        mask = np.zeros(size, np.uint8)
        mask[2 + number : 10 + number, 3 : 12 + number] = 255
        path = (folder / name).with_suffix(".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(path)
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    """What every file below a folder holds, by its path there."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if not path.is_dir()
    }


def results_of(folder: Path) -> dict[str, bytes]:
    """As `files_of`, without the manifest, whose times are those of the run."""
    return {name: data for name, data in files_of(folder).items() if not name.endswith(".jsonl")}


def faults_of_manifest(folder: Path, images: Path, names: set[str]) -> list[str]:
    """What is wrong with the manifest of a folder in which all pictures, `names` below `images`, are done."""
    manifest = Manifest(folder)
    records = manifest.read()
    wrong = [f"the manifest has {sorted(records)}"] if records.keys() != names else []
    for name, record in records.items():
        if not record.done:
            wrong.append(f"{name}: recorded as {record.status}: {record.error}")
        elif record.output_hash != hash_of(folder / record.output):
            wrong.append(f"{name}: another output than the manifest says")
        elif record.input_hash != hash_of(images / name):
            wrong.append(f"{name}: another input than the manifest says")
    return wrong
