"""Scenes: the same picture at every resolution, an exact mask, captions that say what is there."""

from dataclasses import replace

import numpy as np
import pytest

from tools.scenes.scenes import (
    COLOURS,
    HELD_OUT,
    LIGHTS,
    all_captions,
    closer,
    lit_palette,
    random_scene,
    render,
)
from tools.scenes.shapes import OBJECTS, fbm


def area_mean(image: np.ndarray, factor: int) -> np.ndarray:
    height, width = image.shape[0] // factor, image.shape[1] // factor
    return image.reshape(height, factor, width, factor, -1).mean((1, 3))


@pytest.mark.parametrize("kind", OBJECTS)
def test_scene_is_the_same_at_four_times_the_size(kind: str) -> None:
    scene = replace(random_scene(5), kind=kind)
    small, large = render(scene, 64), render(scene, 256)
    assert np.abs(area_mean(large.mask[..., None], 4)[..., 0] - small.mask).mean() < 0.01
    assert np.abs(area_mean(large.image, 4) - small.image).mean() < 0.03


def test_scene_has_more_detail_at_a_higher_resolution() -> None:
    scene = replace(random_scene(5), ground="grass", time="day")
    large = render(scene, 256).image
    smooth = np.repeat(np.repeat(area_mean(large, 4), 4, 0), 4, 1)
    assert np.abs(large - smooth).mean() > 0.004


@pytest.mark.parametrize("kind", OBJECTS)
@pytest.mark.parametrize("time", LIGHTS)
def test_median_colour_of_every_object_is_nearest_to_its_own(kind: str, time: str) -> None:
    for index, colour in enumerate(COLOURS):
        drawn = render(replace(random_scene(7), kind=kind, colour=colour, time=time), 64)
        median = np.median(drawn.image[drawn.mask > 0.99], axis=0)
        assert np.linalg.norm(lit_palette(time) - median, axis=1).argmin() == index, (colour, median)


def test_mask_is_what_changes_with_the_colour() -> None:
    scene = replace(random_scene(11), kind="ball", colour="red", view=replace(random_scene(11).view))
    other = replace(scene, colour="blue")
    a, b = render(scene, 96), render(other, 96)
    changed = np.abs(a.image - b.image).max(-1) > 1e-6
    assert not changed[a.mask == 0].any()
    assert changed[a.mask == 1].mean() > 0.95


def test_scene_number_is_reproducible_and_numbers_differ() -> None:
    assert random_scene(HELD_OUT + 3) == random_scene(HELD_OUT + 3)
    assert np.array_equal(render(random_scene(3), 48).image, render(random_scene(3), 48).image)
    assert len({random_scene(i) for i in range(50)}) == 50


def test_captions_are_all_different_and_name_every_attribute() -> None:
    captions = list(all_captions())
    assert len(captions) == len(set(captions)) == 576
    assert "a red house on snow at night" in captions
    assert "an orange ball on grass at day" in captions


def test_bands_do_not_show_in_a_large_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = render(random_scene(4), 60, 90).image
    monkeypatch.setattr("tools.scenes.scenes._BAND", 90 * 7)
    assert np.array_equal(whole, render(random_scene(4), 60, 90).image)


def test_closer_view_shows_less_of_the_object() -> None:
    scene = random_scene(2)
    near = closer(scene, np.random.default_rng(0))
    assert near.view.extent < 0.7 * max(OBJECTS[scene.kind].size)
    assert near.caption == scene.caption


def test_noise_does_not_alias() -> None:
    x = np.linspace(0, 1, 64, dtype=np.float32)[None].repeat(64, 0)
    coarse = fbm(x, x.T, 1 / 8, 4.0, 1, octaves=8, persistence=0.7)
    assert (
        np.abs(coarse).max() < 1.5 and np.abs(fbm(x, x.T, 1.0, 4.0, 1, octaves=8, persistence=0.7)).max() == 0
    )
