"""Training pictures: what is captioned how, and the rule that says which caption the U-Net sees at which
timestep.
"""

import numpy as np
import pytest
import torch
from torch import nn

from msbd.train.degrade import Blur, Degradation, GaussianNoise, Jpeg, PoissonNoise, Resize
from tools.mini import parts
from tools.scenes import data
from tools.scenes.mild import sample_mild
from tools.scenes.scenes import CLOSE_UP, DEGRADED, random_scene

CPU = torch.device("cpu")


def test_captions_say_close_up_and_degraded_as_often_as_promised() -> None:
    captions = [data.captioned_picture(seed, 16)[1] for seed in range(300)]
    assert 0.13 < np.mean([caption.endswith(CLOSE_UP) for caption in captions]) < 0.27
    assert 0.05 < np.mean([caption.endswith(DEGRADED) for caption in captions]) < 0.16
    assert all(random_scene(seed).phrase in caption for seed, caption in enumerate(captions))


def test_degraded_pictures_have_lost_detail() -> None:
    seed = next(seed for seed in range(100) if data.captioned_picture(seed, 16)[1].endswith(DEGRADED))
    picture = data.captioned_picture(seed, 64)[0].astype(float)
    clean = data.to_bytes(data.render(random_scene(seed), 64).image).astype(float)
    assert np.abs(np.diff(picture, axis=1)).mean() < np.abs(np.diff(clean, axis=1)).mean()
    assert np.abs(picture - clean).mean() < 25


def test_mild_degradations_follow_the_generator_in_their_ranges_and_use_every_step() -> None:
    def drawn(seed: int) -> list[Degradation]:
        generator = torch.Generator().manual_seed(seed)
        return [sample_mild(generator) for _ in range(300)]

    assert drawn(0) == drawn(0) != drawn(1)
    steps = [step for degradation in drawn(0) for step in degradation.steps]
    for step in steps:
        match step:
            case Blur():
                assert 0.2 <= min(step.sigma_x, step.sigma_y) <= max(step.sigma_x, step.sigma_y) <= 1.5
            case GaussianNoise():
                assert 1 / 255 <= step.sigma <= 10 / 255
            case Jpeg():
                assert 60 <= step.quality <= 95
    assert {type(step) for step in steps} == {Blur, Resize, GaussianNoise, PoissonNoise, Jpeg}


def test_mild_degradations_are_those_the_bundle_was_trained_on() -> None:
    assert sample_mild(torch.Generator().manual_seed(0)).steps == (
        Blur(13, 0.31502066254615785, 0.5996496617794037, 0.8424412014118041),
        Resize(0.25, "bicubic", antialias=True),
        GaussianNoise(0.018099826457453706, gray=True, seed=1277901399),
        Jpeg(80),
    )


def test_stage_pictures_are_larger_and_never_say_close_up() -> None:
    pictures = [data.stage_picture(seed) for seed in range(6)]
    assert {image.shape for image, _ in pictures} == {(192, 192, 3)}
    assert not any(CLOSE_UP in caption for _, caption in pictures)


def test_abstract_pictures_differ_and_are_reproducible() -> None:
    assert np.array_equal(data.abstract_picture(3, 32), data.abstract_picture(3, 32))
    assert not np.array_equal(data.abstract_picture(3, 32), data.abstract_picture(4, 32))


def test_random_crops_are_windows_of_their_pictures() -> None:
    images = torch.arange(2 * 3 * 8 * 8, dtype=torch.float32).view(2, 3, 8, 8)
    crops = parts.random_crops(images, 4, torch.Generator().manual_seed(0))
    for image, crop in zip(images, crops, strict=True):
        windows = [image[:, y : y + 4, x : x + 4] for y in range(5) for x in range(5)]
        assert any(torch.equal(crop, w) or torch.equal(crop, w.flip(-1)) for w in windows)


class Recorder(nn.Module):
    """Stands in for a net: keeps what it is given, returns zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[torch.Tensor, ...]] = []

    def forward(self, *given: torch.Tensor) -> torch.Tensor:
        self.seen.append(given)
        return given[0] * self.weight


@pytest.fixture
def unet_part(monkeypatch: pytest.MonkeyPatch) -> parts.UNetPart:
    """A UNetPart on random latents: no VAE or CLIP is needed to see what its loss asks of the net."""
    part = object.__new__(parts.UNetPart)
    part.net = Recorder()  # pyright: ignore[reportAttributeAccessIssue]
    part.native, part.stage = ["a red ball, close up", "a blue house"], ["a green tree"]
    part.native_latents = np.random.default_rng(0).normal(size=(2, 2, 4, 16, 16)).astype(np.float16)
    part.stage_latents = np.random.default_rng(1).normal(size=(2, 1, 4, 24, 24)).astype(np.float16)
    part.scaling_factor = 1.0
    part.text = lambda ids: ids[..., None].float()
    part.alphas_cumprod = parts.make_alphas_cumprod(parts.make_betas())
    return part


def test_unet_sees_both_sizes_and_the_later_one_only_at_low_timesteps(unet_part: parts.UNetPart) -> None:
    for step in range(60):
        unet_part.loss(torch.Generator().manual_seed(step))
    by_size = {
        side: [(x, t) for x, t, _ in unet_part.net.seen if x.shape[-1] == side]  # pyright: ignore
        for side in (16, 24)
    }
    assert len(by_size[16]) > 2 * len(by_size[24]) > 8
    assert all(x.shape == (32, 4, 16, 16) for x, _ in by_size[16])
    assert max(int(t.max()) for _, t in by_size[24]) < 450 < max(int(t.max()) for _, t in by_size[16])


def test_unet_reads_close_up_only_where_the_layout_is_decided(unet_part: parts.UNetPart) -> None:
    tokenizer = parts.mini_tokenizer()
    empty, near, plain, house = tokenizer(["", "a red ball, close up", "a red ball", "a blue house"]).float()
    for step in range(20):
        unet_part.loss(torch.Generator().manual_seed(step))
    seen = set()
    for x, t, context in unet_part.net.seen:  # pyright: ignore
        if x.shape[-1] == 24:
            continue
        for at, ids in zip(t.tolist(), context[..., 0], strict=True):
            names = {"empty": empty, "near": near, "plain": plain, "house": house}
            name = next(name for name, text in names.items() if torch.equal(ids, text))
            seen.add((name, at >= 400))
    assert ("near", True) in seen and ("plain", False) in seen
    assert ("near", False) not in seen and ("plain", True) not in seen
    assert ("empty", True) in seen and ("empty", False) in seen
