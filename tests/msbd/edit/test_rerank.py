import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from msbd.edit.rerank import clip_scores
from msbd.pixels.box import Box
from msbd.pixels.preprocess import CLIP_STD, clip_pixels
from tests.helpers.goldens import load_golden
from tests.helpers.rounding import assert_same_to_rounding


class ColourCLIP(nn.Module):
    """Embeds a picture as its mean colour and a prompt as the colour its first ids name."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(math.log(100.0)))
        self.texts = 0

    def encode_image(self, pixels: Tensor) -> Tensor:
        return pixels.mean(dim=(-2, -1)) + 2  # (B, 3), positive

    def encode_text(self, ids: Tensor) -> Tensor:
        self.texts += 1
        return ids[:, :3].float()


def coloured(*colours: tuple[float, float, float], size: tuple[int, int] = (40, 60)) -> Tensor:
    return torch.tensor(colours).view(-1, 3, 1, 1).expand(-1, -1, *size) * 2 - 1


@pytest.mark.parametrize("case", ["landscape_300x200", "portrait_170x260", "small_97x64"])
def test_clip_pixels_match_golden(case: str) -> None:
    golden = load_golden("clip_preprocess", case)
    image = golden["in.image_uint8_hwc"].permute(2, 0, 1)[None].float() / 127.5 - 1
    error = (clip_pixels(image) - golden["out.pixel_values"]).abs()
    levels = error * 255 * min(CLIP_STD)  # the reference rounds to 8 bits, and clips, twice on its way
    assert levels.mean() <= 0.5 and (levels > 2).float().mean() < 1e-3 and levels.max() <= 5


@pytest.mark.parametrize("size", [(1, 1), (10, 300), (300, 10), (224, 224)])
def test_clip_pixels_are_square_and_normalised(size: tuple[int, int]) -> None:
    out = clip_pixels(torch.ones(2, 3, *size), size=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    torch.testing.assert_close(out, torch.full((2, 3, 32, 32), 2.0))


def test_clip_scores_rank_by_cosine_and_encode_the_text_once() -> None:
    clip = ColourCLIP()
    images = coloured((1, 0, 0), (0, 1, 0), (0.5, 0.5, 0.5))
    scores = clip_scores(clip, torch.tensor([[0, 1, 0]]), images, size=16)
    assert scores.shape == (3,) and scores.argmax() == 1 and clip.texts == 1
    assert not scores.requires_grad and scores.max() <= 100
    pixels = clip_pixels(images, size=16).mean((-2, -1)) + 2
    expected = 100 * nn.functional.cosine_similarity(pixels, torch.tensor([[0.0, 1.0, 0.0]]))
    torch.testing.assert_close(scores, expected)


def test_clip_scores_of_the_mask_alone_ignore_the_background() -> None:
    images = coloured((0, 0, 1), (0, 0, 1)).clone()
    images[0, :, 10:20, 10:25] = torch.tensor([-1.0, 1, -1]).view(3, 1, 1)
    images[1, 1, 30:] = 1  # more green over the whole picture, none in the box
    ids, box = torch.tensor([[0, 1, 0]]), Box(10, 10, 10, 15)
    assert clip_scores(ColourCLIP(), ids, images, size=16).argmax() == 1
    assert clip_scores(ColourCLIP(), ids, images, size=16, box=box).argmax() == 0


@pytest.mark.parametrize("size", [(20, 60), (60, 20), (20, 50)])
def test_clip_scores_see_the_ends_of_a_long_picture(size: tuple[int, int]) -> None:
    images = torch.full((2, 3, *size), -1.0)
    images[0, 1].view(-1)[:100] = 1  # green at the top left only, which the centre square does not hold
    ids = torch.tensor([[0, 1, 0]])
    scores = clip_scores(ColourCLIP(), ids, images, size=16)
    assert scores[0] > scores[1]
    flipped = clip_scores(ColourCLIP(), ids, images.flip(-1, -2), size=16)
    torch.testing.assert_close(flipped, scores)


def test_clip_scores_do_not_depend_on_the_batch() -> None:
    images = torch.from_numpy(np.random.default_rng(0).random((3, 3, 20, 30), dtype=np.float32)) * 2 - 1
    ids = torch.tensor([[1, 2, 3]])
    alone = torch.cat([clip_scores(ColourCLIP(), ids, image[None]) for image in images])
    assert_same_to_rounding(clip_scores(ColourCLIP(), ids, images), alone)
