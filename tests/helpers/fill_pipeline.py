"""Pipelines that paint one known colour in place of nets: what is left is what files and commands do."""

from typing import Any

import torch
from torch import Tensor

from msbd.edit.plan import EditPlan, EditResult
from msbd.pixels.masks import feather
from msbd.restore.config import RestoreConfig
from msbd.restore.plan import RestoreResult, plan_restore

FILL = (200, 60, 60)


def filled(size: tuple[int, int], fill: tuple[int, int, int]) -> Tensor:
    """(1, 3, H, W) in [-1, 1] of one colour in levels of 255."""
    return torch.tensor(fill).view(1, 3, 1, 1).expand(1, 3, *size) / 127.5 - 1


class FillEditor:
    """In place of an EditPipeline: the mask of a picture in one colour; what it was given is in `seen`."""

    tokenizer = None

    def __init__(self, fill: tuple[int, int, int] = FILL) -> None:
        self.fill, self.seen, self.seeds = fill, [], []
        self.pictures: tuple[str, ...] = ()  # names of what it shows on the way

    def __call__(
        self, image: Tensor, mask: Tensor, prompt: str, *, plan: EditPlan, on_picture: Any = None, **_: Any
    ) -> EditResult:
        self.seen.append(image)
        for name in self.pictures if on_picture else ():
            on_picture(name, image)
        self.seeds.append(plan.config.seed)
        size = (image.shape[-2], image.shape[-1])
        painted = torch.where(mask > 0, filled(size, self.fill), image)
        return EditResult(painted, plan, image[:0], None, 0, weight=feather(mask, plan.config.feather))


class FillRestorer:
    """In place of a RestorePipeline: a whole picture in one colour, at the size asked for."""

    tokenizer = None

    def __init__(self, fill: tuple[int, int, int] = FILL) -> None:
        self.fill, self.seen = fill, []

    def __call__(
        self, image: Tensor, prompt: str, *, output_size: tuple[int, int], config: RestoreConfig, **_: Any
    ) -> RestoreResult:
        self.seen.append(image)
        from msbd.restore.config import ModelSpec
        from samplers.schedule import make_alphas_cumprod, make_betas

        size = (image.shape[-2], image.shape[-1])
        plan = plan_restore(size, output_size, config, ModelSpec(), 8, make_alphas_cumprod(make_betas()))
        return RestoreResult(filled(output_size, self.fill), plan, "", "", {})
