"""The judge: its colours by the formulas, its outline, and that it is trained the same way each time."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from skimage.color import rgb2lab

from tools.scenes import judge
from tools.scenes.data import held_out_scenes
from tools.scenes.judge import Judge, JudgeNet, load_judge, nearest_colour, srgb_to_lab, train_judge
from tools.scenes.scenes import render


def test_lab_is_that_of_scikit_image() -> None:
    colours = np.random.default_rng(0).random((500, 3))
    assert (
        np.abs(srgb_to_lab(colours) - rgb2lab(colours)).max() < 0.05
    )  # their white differs in the fifth digit


def test_white_and_black_have_no_hue() -> None:
    assert srgb_to_lab(np.ones(3)) == pytest.approx([100, 0, 0], abs=1e-6)
    assert srgb_to_lab(np.zeros(3)) == pytest.approx([0, 0, 0], abs=1e-6)


def test_nearest_colour_is_the_scenes_own_at_every_time_of_day() -> None:
    right = []
    for scene in held_out_scenes(60, start=900):
        rendered = render(scene, 48)
        image = torch.from_numpy(rendered.image).permute(2, 0, 1) * 2 - 1
        mask = torch.from_numpy(rendered.mask > 0.9).float()[None]
        right.append(nearest_colour(image, mask, scene.time) == scene.colour)
    assert sum(right) >= 59


def test_no_outline_is_no_colour() -> None:
    assert nearest_colour(torch.zeros(3, 8, 8), torch.zeros(1, 8, 8), "day") is None


def test_core_is_the_outline_without_its_rim() -> None:
    outline = torch.zeros(1, 32, 32)
    outline[:, 10:20, 5:9] = 0.9
    core = judge._core(outline)
    assert core.sum() == 8 * 2 and core[:, 11:19, 6:8].all()
    thin = torch.zeros(1, 32, 32)
    thin[:, 3, :] = 0.9
    assert torch.equal(judge._core(thin), (thin > 0).float())  # nothing would be left


def test_training_is_repeatable_and_leaves_nothing_behind() -> None:
    torch.set_num_threads(1)
    before = torch.random.get_rng_state()
    one, other = (train_judge(scenes=24, steps=2, held_out=6) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    weights = zip(one.net.state_dict().values(), other.net.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)
    assert one.figures == other.figures and set(one.figures) == {"object", "object, soft", "colour"}


def test_training_teaches_both_heads() -> None:
    """A twentieth of the training already does better than chance on the pictures it saw."""
    torch.set_num_threads(1)
    net = JudgeNet()
    judge._fit(net, scenes=24, steps=24)
    images, masks, kinds, _ = judge._rendered(judge._SEED, 24)
    right = [judge.KINDS[k] for k in kinds.tolist()]
    assert judge._percentage(Judge(net.eval(), {}).kinds(images), right) > 35  # 50 to 70 with other seeds
    with torch.no_grad():
        drawn = net(images)[1] > 0
    true = F.adaptive_avg_pool2d(masks, judge.CELLS) > 0.5
    assert (drawn & true).sum() / (drawn | true).sum() > 0.45  # 0.6


def test_judge_is_trained_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []

    def quick() -> Judge:
        trained.append(1)
        return Judge(JudgeNet().eval(), {"object": 50.0})

    monkeypatch.setattr(judge, "train_judge", quick)
    first, second = load_judge(tmp_path), load_judge(tmp_path)
    assert len(trained) == 1 and first.figures == second.figures == {"object": 50.0}
    images = torch.randn(3, 3, 96, 80).clamp(-1, 1)
    assert first.kinds(images) == second.kinds(images) and len(first.colours(images, ["day"] * 3)) == 3
