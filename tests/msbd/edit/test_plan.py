"""What an edit will do: crop, stages, tiles, before anything is computed."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from msbd.edit import official
from msbd.edit import plan as planning
from msbd.edit.config import EditConfig, ModelSpec
from msbd.edit.plan import EditPlan, check_inputs, halve_tiles, stage_cells, stage_mask
from msbd.pixels.box import Box
from msbd.pixels.masks import mask_box
from msbd.pixels.resize import take
from msbd.pixels.tiles import covered, touches
from tests.helpers.tiny import ALPHAS

SD = ModelSpec()
MINI = ModelSpec(native=128, multiple=16, guidance_scale=4.0)
TINY = ModelSpec(native=64, multiple=16)
OFFICIAL = EditConfig(**official.OPTIONS)


def plan_edit(mask: Tensor, config: EditConfig, spec: ModelSpec) -> EditPlan:
    """With Stable Diffusion's levels."""
    return planning.plan_edit(mask, config, spec, ALPHAS)


def rectangle(height: int, width: int, box: Box) -> Tensor:
    mask = torch.zeros(1, 1, height, width)
    mask[..., box.top : box.bottom, box.left : box.right] = 1
    return mask


def in_the_picture(crop: Box, picture: Tensor) -> Tensor:
    """(1, 1, h, w): 1 where the crop lies inside the picture."""
    rows = torch.arange(crop.top, crop.bottom)[:, None]
    columns = torch.arange(crop.left, crop.right)
    height, width = picture.shape[-2:]
    return ((rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)).float()[None, None]


def check_plan(plan: EditPlan, mask: Tensor, spec: ModelSpec) -> None:
    """What holds for every plan of the paper's method."""
    config, last = plan.config, plan.stages[-1]
    assert plan.crop.contains(mask_box(mask))
    assert all(side % spec.multiple == 0 for stage in plan.stages for side in stage.size)
    first = plan.stages[0].size
    assert 0.6 < first[0] * first[1] / spec.native**2 < 1.5 and max(first) <= 2.5 * min(first)
    if plan.crop.height * plan.crop.width > 1.5 * spec.native**2:
        assert last.size == plan.crop.size  # it ends at the picture's own resolution
    for before, after in pairwise(plan.stages):
        assert all(1 <= b / a <= 4 for a, b in zip(before.size, after.size, strict=True))
        assert before.size != after.size
    for number, stage in enumerate(plan.stages):
        m = stage_mask(take(mask, plan.crop) * in_the_picture(plan.crop, mask), stage.size, config)
        assert stage.number == number and set(stage.boxes) <= set(stage.grid)
        covered = torch.zeros_like(m)
        for box in stage.grid:
            assert Box(0, 0, *stage.size).contains(box)
            assert max(box.size) <= config.tile or len(stage.grid) == 1
            inside = m[..., box.top : box.bottom, box.left : box.right].any()
            assert (box in stage.boxes) == bool(inside)
            covered[..., box.top : box.bottom, box.left : box.right] = 1
        assert covered.all() and stage.boxes
        if number:
            start = config.grid_startstep if len(stage.grid) > 1 else config.upscale_startstep
            assert (stage.start, stage.repeats, stage.candidates) == (start, 0, 1)


# ---- the paper's figures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1166, 2297), (2297, 1166)])
def test_plan_of_the_papers_mask(size: tuple[int, int]) -> None:
    mask = rectangle(3000, 4000, Box(400, 800, *size))
    plan = plan_edit(mask, EditConfig(margin=1.2), SD)
    check_plan(plan, mask, SD)
    assert [stage.size for stage in plan.stages] == [(512, 512), (768, 768), (2816, 2816)]
    assert plan.crop.size == (2816, 2816)
    first, middle, last = plan.stages
    assert (first.num_steps, first.start, first.repeats, first.candidates) == (50, 1.0, 5, 5)
    assert (middle.num_steps, middle.start, len(middle.grid)) == (50, 0.4, 1)
    assert (last.num_steps, last.start) == (50, 0.25)
    assert all(box.size == (768, 768) for box in last.grid)
    starts = sorted({box.top for box in last.grid})
    assert all(before + 768 - after >= 128 for before, after in pairwise(starts)) and len(last.grid) == 25
    assert 0 < len(last.boxes) < len(last.grid)  # the corners of the square hold no mask


@pytest.mark.parametrize("size", [(1166, 2297), (2297, 1166)])
def test_plan_inserts_a_stage_where_a_jump_would_exceed_the_upscaler(size: tuple[int, int]) -> None:
    mask = rectangle(4000, 4000, Box(400, 800, *size))
    plan = plan_edit(mask, EditConfig(), SD)  # 1.4 x 2297: 3264 pixels, 4.25 x 768
    check_plan(plan, mask, SD)
    assert [plan.stages[k].size for k in (0, 1, 3)] == [(512, 512), (768, 768), (3264, 3264)]
    assert len(plan.stages) == 4 and plan.stages[2].start == 0.25 and len(plan.stages[2].grid) > 1


def test_plan_measures_follow_the_model() -> None:
    sd, mini = EditConfig().for_model(SD), EditConfig().for_model(MINI)
    assert (sd.first_stage_size, sd.max_edgelen, sd.tile, sd.grid_overlap) == (512, 768, 768, 128)
    assert (mini.first_stage_size, mini.max_edgelen, mini.tile, mini.grid_overlap) == (128, 192, 192, 32)
    assert (sd.guidance_scale, mini.guidance_scale, sd.upscale_num_steps, sd.seed) == (7.5, 4.0, 50, 0)
    joint = replace(EditConfig(), tiles="joint")
    assert [joint.for_model(spec).grid_overlap for spec in (SD, MINI)] == [256, 64]
    given_ones = EditConfig(tile=256, grid_overlap=64, guidance_scale=1.0, seed=3, upscale_num_steps=7)
    full = given_ones.for_model(SD)
    assert (full.tile, full.grid_overlap, full.guidance_scale, full.seed) == (256, 64, 1.0, 3)
    assert full.upscale_num_steps == 7 and full.for_model(MINI) == full


def test_defaults_are_the_papers() -> None:
    """Appendix A.2, "Hyperparameters"; eta, lambda and the starts are DESIGN section 4's reading of it."""
    config = EditConfig()
    assert (config.num_steps, config.first_stage_batch, config.repaint_steps) == (50, 5, 5)
    assert (config.upscale_startstep, config.grid_startstep, config.start_from) == (0.4, 0.25, "source")
    assert (config.decoderopt_steps, config.decoderopt_lr, config.decoderopt_weight) == (100, 1e-4, 100)
    assert (config.background_level, config.background_noise, config.eta) == ("prev", "once", 1)
    assert (config.lowpass_reference, config.upscaling_mode, config.latent_mask) == (
        "matching",
        "rrdb",
        "any",
    )
    assert config.clip_reranking and config.decoder_optimization and config.feather == 0


# ---- any picture -------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.data())
def test_plan_of_any_picture_and_mask(data: st.DataObject) -> None:
    height, width = data.draw(st.integers(1, 400)), data.draw(st.integers(1, 400))
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    box = Box(top, left, data.draw(st.integers(1, height - top)), data.draw(st.integers(1, width - left)))
    mask = rectangle(height, width, box)
    margin = data.draw(st.sampled_from([1.0, 1.2, 1.4, 3.0]))
    check_plan(plan_edit(mask, EditConfig(margin=margin), TINY), mask, TINY)


EXTREMES = {
    "37x53": (37, 53, Box(5, 7, 12, 20)),
    "wide and thin": (400, 6000, Box(190, 300, 12, 5000)),
    "one pixel": (300, 300, Box(150, 150, 1, 1)),
    "whole picture": (1000, 700, Box(0, 0, 1000, 700)),
    "1x1": (1, 1, Box(0, 0, 1, 1)),
}


@pytest.mark.parametrize(
    "name, spec", [*((name, SD) for name in EXTREMES), ("37x53", MINI), ("whole picture", MINI)]
)
def test_plan_of_extreme_pictures(name: str, spec: ModelSpec) -> None:
    height, width, box = EXTREMES[name]
    mask = rectangle(height, width, box)
    check_plan(plan_edit(mask, EditConfig(), spec), mask, spec)


def test_plan_of_a_mask_at_all_four_borders() -> None:
    mask = torch.zeros(1, 1, 300, 420)
    mask[..., :3, :] = mask[..., -3:, :] = mask[..., :3] = mask[..., -3:] = 1
    plan = plan_edit(mask, EditConfig(), TINY)
    check_plan(plan, mask, TINY)
    assert plan.crop.contains(Box(0, 0, 300, 420))
    assert 0 < len(plan.stages[-1].boxes) < len(plan.stages[-1].grid)  # nothing to do in the middle


@pytest.mark.parametrize("picture", [(1280, 1920), (4000, 6000), (1700, 900), (1100, 2000)])
def test_the_middle_stage_is_one_piece_whatever_its_aspect(picture: tuple[int, int]) -> None:
    """(640, 960) is what 768^2 pixels of a 2:3 crop round to: more than 768^2 of them,
    and no reason for tiles.
    """
    for spec in (SD, MINI):
        plan = plan_edit(rectangle(*picture, Box(0, 0, *picture)), EditConfig(), spec)
        middle = [stage for stage in plan.stages[1:] if max(stage.size) <= 3 * spec.native]
        assert middle and all(len(stage.grid) == 1 and stage.start == 0.4 for stage in middle)
        last = plan.stages[-1]
        assert last in middle or (len(last.grid) > 1 and last.start == 0.25)


def test_plan_leaves_out_tiles_without_mask() -> None:
    mask = torch.zeros(1, 1, 320, 320)
    mask[..., :20, :20] = mask[..., -20:, -20:] = 1
    stage = plan_edit(mask, EditConfig(margin=1), TINY).stages[-1]
    assert len(stage.grid) == 16 and stage.boxes == (stage.grid[0], stage.grid[-1])
    sdedit = plan_edit(mask, EditConfig(margin=1, blended_upscale=False), TINY).stages[-1]
    assert sdedit.boxes == sdedit.grid  # it repaints the whole crop


def test_plan_leaves_out_tiles_that_only_the_mirrored_mask_touches() -> None:
    mask = rectangle(
        20, 640, Box(8, 40, 4, 560)
    )  # a crop of 640 x 320: the picture lies in it 16 times, mirrored
    plan = plan_edit(mask, EditConfig(), TINY)
    assert plan.crop == Box(-150, 0, 320, 640)
    picture = Box(150, 0, 20, 640)
    stage = plan.stages[-1]
    assert stage.size == plan.crop.size and 0 < len(stage.boxes) <= len(stage.grid) // 2
    assert all(box.top < picture.bottom and box.bottom > picture.top for box in stage.boxes)
    smaller = halve_tiles(stage, plan.config, TINY)
    assert smaller is not None and len(smaller.boxes) > len(stage.boxes)
    spots = covered(torch.ones(1, 1, *stage.size), stage.boxes)
    assert all(touches(box, spots) for box in smaller.boxes)


# ---- modes and options -------------------------------------------------------------------------------------


def test_plan_of_the_baselines() -> None:
    mask = rectangle(3000, 4000, Box(400, 800, 1166, 2297))
    config = EditConfig(margin=1.2)
    (naive,) = plan_edit(mask, replace(config, method="naive"), SD).stages
    assert (naive.size, naive.candidates, naive.repeats, len(naive.grid)) == ((960, 960), 5, 5, 1)
    (segments,) = plan_edit(mask, replace(config, method="segments"), SD).stages
    assert (segments.size, segments.candidates, segments.start) == ((2816, 2816), 1, 1.0)
    assert all(box.size == (512, 512) for box in segments.grid)
    (first,) = plan_edit(mask, replace(config, method="first-stage-only"), SD).stages
    assert first == plan_edit(mask, config, SD).stages[0]
    small = rectangle(3000, 4000, Box(400, 800, 50, 50))
    (enlarged,) = plan_edit(small, replace(config, method="segments"), SD).stages
    assert (enlarged.size, enlarged.candidates) == ((512, 512), 1)


def test_plan_straight_to_grid_leaves_out_the_intermediate_stage() -> None:
    mask = rectangle(3000, 4000, Box(400, 800, 1000, 1500))
    plan = plan_edit(mask, EditConfig(margin=1.2, straight_to_grid=True), SD)
    assert [stage.size for stage in plan.stages] == [(512, 512), (1856, 1856)]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"method": "magic"}, "method is 'magic'.*msbd, naive"),
        ({"num_steps": 0}, "num_steps is 0.*at least 1"),
        ({"margin": 0.9}, "margin is 0.9"),
        ({"margin": float("nan")}, "margin is nan"),
        ({"eta": 1.5}, "eta is 1.5"),
        ({"feather": -1}, "feather is -1"),
        ({"grid_startstep": 0.0}, "grid_startstep is 0.0.*fraction above 0"),
        ({"upscale_startstep": 1.1}, "upscale_startstep is 1.1"),
        ({"repaint_jump": 0}, "repaint_jump is 0"),
        ({"tile_batch": 0}, "tile_batch is 0"),
    ],
)
def test_config_refuses_what_makes_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EditConfig(**options)


def test_plan_refuses_empty_masks_and_sizes_off_the_grid() -> None:
    mask = rectangle(300, 300, Box(10, 10, 50, 50))
    with pytest.raises(ValueError, match="empty"):
        plan_edit(torch.zeros(1, 1, 30, 30), EditConfig(), SD)
    with pytest.raises(ValueError, match="tile is 100.*multiples of 64"):
        plan_edit(mask, EditConfig(tile=100), SD)


def test_check_inputs_names_what_does_not_fit() -> None:
    image, mask = torch.zeros(1, 3, 8, 9), torch.zeros(1, 1, 8, 9)
    check_inputs(image, mask)
    for wrong in (image[0], image.expand(2, -1, -1, -1), image[:, :1], image.to(torch.uint8)):
        with pytest.raises(ValueError, match=r"expected \(1, 3, H, W\)"):
            check_inputs(wrong, mask)
    with pytest.raises(ValueError, match=r"expected \(1, 1, 8, 9\)"):
        check_inputs(image, torch.zeros(1, 1, 9, 8))


# ---- masks -------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 2**31), st.sampled_from([1, 8]))
def test_no_masked_pixel_is_lost_on_the_way_to_the_cells(
    height: int, width: int, seed: int, factor: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(1, 1, height, width)
    for _ in range(3):
        row, column = (int(torch.randint(side, (), generator=generator)) for side in (height, width))
        mask[..., row, column] = 1
    plan = plan_edit(mask, EditConfig(), TINY)
    cropped = take(mask, plan.crop)
    for stage in plan.stages:
        cells = stage_cells(cropped, stage.mask, stage.number, plan.config, factor)
        assert torch.equal(stage.mask, stage_mask(cropped, stage.size, plan.config))
        pixels = F.interpolate(cells, size=stage.size, mode="nearest")
        assert (pixels >= stage_mask(cropped, stage.size, plan.config)).all()
        for row, column in cropped[0, 0].nonzero().tolist():  # where each pixel's centre ends up
            y, x = (
                int((p + 0.5) * s / c)
                for p, s, c in zip((row, column), stage.size, plan.crop.size, strict=True)
            )
            assert pixels[0, 0, y, x] == 1


# ---- preset official ---------------------------------------------------------------------------------------


def test_official_plan_of_the_papers_mask() -> None:
    mask = rectangle(3000, 4000, Box(400, 800, 1166, 2297))
    plan = plan_edit(mask, OFFICIAL, SD)
    assert [stage.size for stage in plan.stages] == [(512, 512), (768, 768), (2816, 2816)]
    assert [stage.num_steps for stage in plan.stages] == [50, 100, 100]  # twice as many later
    assert [stage.start for stage in plan.stages] == [1.0, 0.4, 0.25]
    assert plan.crop == official.crop_around(mask, (2816, 2816))
    assert list(plan.stages[-1].grid) == official.tile_grid(2816, 2816)
    assert plan_edit(mask, replace(OFFICIAL, num_steps=20), SD).stages[1].num_steps == 40


def test_official_plan_follows_the_centre_of_mass() -> None:
    mask = rectangle(2000, 2000, Box(500, 500, 900, 100))
    mask[..., 500:600, 500:1400] = 1  # an L: its centre of mass is far from its box's
    theirs, ours = plan_edit(mask, OFFICIAL, SD).crop, plan_edit(mask, EditConfig(margin=1.2), SD).crop
    assert theirs.size == ours.size and theirs != ours and theirs.contains(mask_box(mask))


@pytest.mark.parametrize("side", [1, 100, 420])
def test_official_plan_repeats_the_native_size_for_small_masks(side: int) -> None:
    mask = rectangle(900, 900, Box(300, 300, side, side))
    plan = plan_edit(mask, OFFICIAL, SD)
    assert plan.crop.size == (512, 512) and [stage.size for stage in plan.stages] == [(512, 512)] * 2


@pytest.mark.parametrize("size", [(37, 53), (100, 600), (600, 100), (64, 64), (200, 200)])
@pytest.mark.parametrize("whole", [True, False])
def test_official_plan_never_shrinks_where_the_official_code_stops(
    size: tuple[int, int], whole: bool
) -> None:
    mask = torch.ones(1, 1, *size) if whole else rectangle(*size, Box(9, 9, 1, 1))
    plan = plan_edit(mask, OFFICIAL, MINI)
    areas = [stage.size[0] * stage.size[1] for stage in plan.stages]
    assert areas == sorted(areas) and plan.crop.contains(mask_box(mask))
    assert all(stage.boxes for stage in plan.stages)


def test_official_plan_tiles_by_the_longer_side() -> None:
    mask = rectangle(400, 2400, Box(150, 600, 100, 1000))
    long = plan_edit(mask, replace(OFFICIAL, margin=1.0), SD).stages[-1]
    assert max(long.size) > 768 and long.start == 0.25 and len(long.grid) > 1


def test_a_mask_lost_by_the_centre_rule_still_has_boxes_and_starts_from_the_crop() -> None:
    mask = rectangle(2000, 2000, Box(0, 1001, 2000, 1))  # one pixel wide
    plan = plan_edit(mask, OFFICIAL, SD)
    cropped = take(mask, plan.crop)
    first = plan.stages[0]
    lost = stage_mask(cropped, first.size, plan.config)
    assert not lost.any() or not first.cells.any()
    assert all(stage.boxes for stage in plan.stages)
    direct = F.interpolate(cropped, size=(64, 64), mode="bilinear", align_corners=False) > 0
    assert torch.equal(first.cells, direct.float())
