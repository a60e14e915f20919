"""Red chalk: the same drawing at every size; and measures of a style that are right where the answer is
known.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from msbd.loading.parts import load_net, load_pasd_nets
from msbd.restore.config import RestoreConfig
from tools.evaluate import style as trials
from tools.evaluate.restore import Pair, bicubic, make_pairs, restoring_method
from tools.mini import __main__, style
from tools.mini.style import StylizedPictures
from tools.scenes import chalk
from tools.scenes.chalk import CREAM, RED, edge_height, smooth, stylized
from tools.scenes.data import RenderedScenes
from tools.scenes.scenes import HELD_OUT, random_scene, render
from weights.files import read_metadata, write_safetensors
from weights.registry import MINI


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    return make_pairs(6, 64)


def clean(pairs: list[Pair]) -> Tensor:
    return torch.cat([pair.clean for pair in pairs])


# ---- the style ---------------------------------------------------------------------------------------------


def test_drawing_is_the_same_every_time_and_leaves_the_scene_alone() -> None:
    scene = render(random_scene(HELD_OUT), 64).image
    before = scene.copy()
    np.testing.assert_array_equal(stylized(scene), stylized(scene))
    np.testing.assert_array_equal(scene, before)


@pytest.mark.parametrize("size", [(1, 1), (3, 50), (33, 47)])
def test_any_picture_becomes_one_of_the_two_inks(size: tuple[int, int]) -> None:
    drawn = stylized(np.random.default_rng(0).random((*size, 3), np.float32))
    assert drawn.shape == (*size, 3) and drawn.dtype == np.float32
    amount = (drawn - RED) / (CREAM - RED)
    np.testing.assert_allclose(amount, amount[..., :1].repeat(3, -1), atol=1e-5)  # on the line between them
    assert amount.min() > -1e-5 and amount.max() < 1 + 1e-5


def test_black_and_white_become_the_darkest_and_the_lightest_wash() -> None:
    for value, amount in ((0, 0.15), (1, 1)):
        flat = np.full((32, 32, 3), value, np.float32)
        np.testing.assert_allclose(
            stylized(flat), np.broadcast_to(RED + amount * (CREAM - RED), flat.shape), atol=1e-5
        )


def test_contour_is_drawn_where_two_colours_of_one_luma_meet() -> None:
    picture = np.full((100, 100, 3), (1.0, 0.2, 0.2), np.float32)
    luma = picture[0, 0] @ chalk.LUMA
    picture[:, 50:] = luma
    amount = ((stylized(picture) - RED) / (CREAM - RED))[50, :, 0]
    dark = np.flatnonzero(amount < 0.15)
    assert 2 <= len(dark) <= 8 and abs(dark.mean() - 49.5) < 1  # percent of the side
    assert amount[:40].min() > 0.3 and amount[60:].min() > 0.3


@pytest.mark.parametrize("seed", [0, 3, 5, 9])
def test_drawing_is_the_same_at_twice_the_size(seed: int) -> None:
    scene = random_scene(HELD_OUT + seed)
    small, large = (stylized(render(scene, size).image) for size in (128, 256))
    halved = large.reshape(128, 2, 128, 2, 3).mean((1, 3))
    other = stylized(render(random_scene(HELD_OUT + seed + 1), 128).image)
    assert np.abs(halved - small).mean() < 0.02 < 0.08 < np.abs(other - small).mean()


def test_crop_is_drawn_as_in_the_whole_where_the_side_is_given() -> None:
    scene = render(random_scene(HELD_OUT), 192).image
    margin = 20  # as far as the widest smoothing reaches
    whole, crop = stylized(scene, 128)[32:160, 32:160], stylized(scene[32:160, 32:160], 128)
    inner = slice(margin, -margin)
    np.testing.assert_allclose(crop[inner, inner], whole[inner, inner], atol=1e-4)


def test_height_of_an_edge_does_not_depend_on_the_smoothing() -> None:
    step = np.zeros((80, 80, 1), np.float32)
    step[:, 40:] = 0.6
    assert [edge_height(step, sigma).max() for sigma in (3.0, 8.0)] == pytest.approx([0.6, 0.6], rel=0.05)


def test_smoothing_keeps_a_flat_picture_and_the_mean_of_a_spot() -> None:
    np.testing.assert_allclose(smooth(np.full((9, 20, 3), 0.3, np.float32), 4.0), 0.3, atol=1e-6)
    spot = np.zeros((41, 41, 1), np.float32)
    spot[20, 20] = 1
    blurred = smooth(spot, 3.0)
    assert blurred.sum() == pytest.approx(1, abs=1e-4)
    assert blurred.max() == pytest.approx(1 / (2 * np.pi * 9), rel=0.02)


def test_training_reads_scenes_drawn_with_their_captions() -> None:
    scenes = RenderedScenes(2, 64)
    pictures = StylizedPictures(scenes)
    picture, caption = pictures.read(1)
    assert len(pictures) == 2 and caption == scenes.read(1)[1]
    assert picture.dtype == np.uint8 and picture.shape == (64, 64, 3)
    assert trials.ink_distance(torch.from_numpy(picture).movedim(-1, 0)[None] / 127.5 - 1).item() < 1


def test_the_command_offers_the_style() -> None:
    for job in ("train", "export"):
        assert __main__.STYLE in __main__.build_parser().parse_args([job, "--part", "style"]).part


# ---- the measures ------------------------------------------------------------------------------------------


def test_edges_are_the_same_whatever_the_contrast_and_its_sign(pairs: list[Pair]) -> None:
    scenes = clean(pairs)
    for same in (scenes, -scenes, 0.3 * scenes + 0.2):
        assert trials.edge_correlation(same, scenes).tolist() == pytest.approx([1] * len(pairs), abs=1e-4)


def test_a_drawing_has_the_edges_of_its_scene_and_not_of_another(pairs: list[Pair]) -> None:
    scenes = clean(pairs)
    drawn = trials.stylized_pictures(scenes)
    own, another = (trials.edge_correlation(x, scenes) for x in (drawn, drawn.roll(1, 0)))
    assert own.mean() > 0.6 and another.mean() < 0.35 and (own > another).all()


def test_edges_of_a_flat_picture_are_like_none(pairs: list[Pair]) -> None:
    assert trials.edge_correlation(torch.zeros(1, 3, 64, 64), pairs[0].clean).item() == pytest.approx(
        0, abs=1e-6
    )


def test_distance_to_the_inks_is_across_their_line() -> None:
    red, cream = torch.from_numpy(RED).double(), torch.from_numpy(CREAM).double()
    across = torch.linalg.cross(cream - red, torch.tensor([0.0, 0, 1], dtype=torch.float64))
    across = across / across.norm()
    for amount in (0.0, 0.4, 1.0):  # how light it is does not count
        colour = red + amount * (cream - red) + 20 / 255 * across
        picture = (2 * colour - 1).view(1, 3, 1, 1).expand(1, 3, 4, 5)
        assert trials.ink_distance(picture).item() == pytest.approx(20, abs=1e-3)


def test_share_of_the_way_is_0_at_the_scene_and_1_at_the_drawing(pairs: list[Pair]) -> None:
    scenes = clean(pairs)
    drawn = trials.stylized_pictures(scenes)
    for share in (0.0, 0.25, 1.0):
        way = trials.style_share(torch.lerp(scenes, drawn, share), scenes, drawn)
        assert way.tolist() == pytest.approx([share] * len(pairs), abs=1e-4)


def test_table_measures_every_method_and_what_to_compare_it_with(pairs: list[Pair], tmp_path: Path) -> None:
    def draw(low: Tensor, captions: list[str], first_seed: int) -> Tensor:
        return trials.stylized_pictures(bicubic(low, captions, first_seed))

    results = trials.measure_styles({"drawn of the input": draw}, pairs, sheets=tmp_path, quiet=True)
    assert list(results) == ["the input", "drawn of the input", "drawn", "another drawn"]
    means = {name: {key: sum(v) / len(pairs) for key, v in found.items()} for name, found in results.items()}
    assert means["the input"]["edges"] == pytest.approx(1)
    assert means["drawn"]["share of the way"] == pytest.approx(1) and means["drawn"]["off the inks"] < 1
    assert means["drawn of the input"]["off the inks"] < 1 < 20 < means["the input"]["off the inks"]
    assert means["drawn"]["edges"] > 0.4 > means["another drawn"]["edges"]
    assert (tmp_path / "restored 1.png").is_file()
    table = trials.style_table(results).splitlines()
    assert [line.split("  ")[0] for line in table[2:]] == list(results)


# ---- bases of a style --------------------------------------------------------------------------------------


def test_lora_changes_the_base_below_pasd_and_nothing_else(tmp_path: Path) -> None:
    base = load_net(MINI / "unet.safetensors").state_dict()
    key = "up_blocks.2.attentions.0.transformer_blocks.0.attn2.to_v.weight"
    change = torch.outer(torch.arange(len(base[key])) / 100, torch.ones(base[key].shape[1]))  # of rank 1
    write_safetensors(tmp_path / "unet.safetensors", base | {key: base[key] + change.half()})
    assert style.write_style_lora(tmp_path / "lora.safetensors", tmp_path) == pytest.approx(1, abs=1e-4)

    plain, control = (net.float().state_dict() for net in load_pasd_nets("mini-pasd"))
    pipe = trials.styled_pipeline("mini", tmp_path / "lora.safetensors", 0.5)
    unet, controlnet = pipe.unet.state_dict(), pipe.controlnet.state_dict()
    assert {name for name in plain if not torch.equal(unet[name], plain[name])} == {key}
    torch.testing.assert_close(unet[key], base[key].float() + change / 2, atol=1e-3, rtol=0)
    assert all(torch.equal(controlnet[name], control[name]) for name in control)


def test_another_base_takes_the_place_of_its_own(tmp_path: Path) -> None:
    shutil.copytree(MINI, tmp_path / "base", ignore=shutil.ignore_patterns("pasd*"))
    base = {key: tensor + 0.01 for key, tensor in load_net(MINI / "unet.safetensors").state_dict().items()}
    write_safetensors(tmp_path / "base" / "unet.safetensors", base, read_metadata(MINI / "unet.safetensors"))
    state = trials.styled_pipeline("mini", tmp_path / "base").unet.state_dict()
    assert all(torch.equal(state[key], tensor.float()) for key, tensor in base.items())
    plain = trials.styled_pipeline("mini", None).unet.state_dict()
    assert all(torch.equal(state[key], plain[key]) for key in plain if key not in base)


def test_style_of_the_bundle_shows_and_the_picture_stays_what_it_was() -> None:
    config = RestoreConfig(mode="stylize", num_inference_steps=5)
    methods = {
        name or "none": restoring_method(trials.styled_pipeline("mini", name, 1.25), config)
        for name in (None, "mini-style")
    }
    results = trials.measure_styles(methods, make_pairs(4, start=2000), quiet=True)
    means = {name: {key: sum(v) / 4 for key, v in found.items()} for name, found in results.items()}
    assert means["mini-style"]["off the inks"] < 0.5 * means["none"]["off the inks"]
    assert means["mini-style"]["share of the way"] > 0.3 > 0.15 > means["none"]["share of the way"]
    assert means["mini-style"]["edges"] > 0.8 * means["none"]["edges"] > 2 * means["another drawn"]["edges"]
