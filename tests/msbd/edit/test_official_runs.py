"""Whole runs of MSBD's official code, as its traces tell them,
beside our functions and our plan of preset `official`.

The sidecars `golden/msbd/msbd_*.json` list what the official generator did, call by call, with fake networks.
Its sizes, crops, tiles and step counts must come out of official.py exactly. Our plan differs from it in some
places on purpose: `DIFFERENCES` names each, with the official value, ours and the reason, and a test fails
both for a difference that is not in that table and for an entry that is no longer one.
"""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from msbd.edit import official
from msbd.edit.config import EditConfig, ModelSpec
from msbd.edit.plan import EditPlan, plan_edit
from msbd.pixels.box import Box
from msbd.pixels.masks import mask_box
from samplers.schedule import make_alphas_cumprod, make_betas
from tests.helpers.goldens import load_golden
from tests.helpers.official_rectangle import rectangle_size
from tests.helpers.tiny import tiny_vae

RUNS = ("msbd_full_1024_square", "msbd_small_square", "msbd_small_wide", "msbd_small_grid")
ALPHAS = make_alphas_cumprod(make_betas())

CUT = "official caps are swapped, so its crop is cut to the picture's other side and misses part of the mask; ours covers it"
ONE_CROP = "official stages are cut out anew, each from the rectangle around the mask; our plan has one crop, the first stage's"
OTHER_CROP = "follows from the other crop above"
WHOLE = "official tiles are cut out before the upscaler, rounded down; ours after it has enlarged the whole picture once"

W, G, S = "msbd_small_wide", "msbd_small_grid", "msbd_small_square"
WIDE, GRID = Box(0, 34, 256, 320), Box(0, 0, 320, 384)  # our crops

# (run, what) -> (official, ours, why). What is not here is equal.
DIFFERENCES: dict[tuple[str, str], tuple[Any, Any, str]] = {
    (S, "stage 4: upscaler inputs"): (
        [(h, w) for h in (85, 86, 43) for w in (85, 86, 43)],
        [(128, 128)],
        WHOLE,
    ),
    (W, "first crop"): (Box(0, 66, 256, 256), WIDE, CUT),
    (W, "stage 2: crop"): (Box(60, 66, 128, 256), WIDE, ONE_CROP),
    (W, "stage 2: upscaler inputs"): ([(32, 64)], [(64, 64)], OTHER_CROP),
    (W, "stage 2: size"): ((64, 128), (128, 128), OTHER_CROP),
    (W, "stage 2: tiles"): ([(64, 128)], [(128, 128)], OTHER_CROP),
    (W, "stage 3: crop"): (Box(60, 66, 128, 256), WIDE, ONE_CROP),
    (W, "stage 3: upscaler inputs"): ([(64, 128)], [(128, 128)], OTHER_CROP),
    (W, "stage 3: size"): ((64, 128), (128, 128), OTHER_CROP),
    (W, "stage 3: tiles"): ([(64, 128)], [(128, 128)], OTHER_CROP),
    (W, "stage 4: crop"): (Box(39, 66, 170, 256), WIDE, ONE_CROP),
    (W, "stage 4: upscaler inputs"): ([(85, 128)], [(128, 128)], OTHER_CROP),
    (W, "stage 4: size"): ((128, 192), (192, 192), OTHER_CROP),
    (W, "stage 4: tiles"): ([(128, 192)], [(192, 192)], OTHER_CROP),
    (W, "stage 5: crop"): (Box(60, 66, 128, 256), WIDE, ONE_CROP),
    (W, "stage 5: upscaler inputs"): ([(96, 144), (96, 96)], [(192, 192)], WHOLE),
    (W, "stage 5: size"): ((128, 256), (256, 320), OTHER_CROP),
    (W, "stage 5: tiles"): (
        [(128, 192), (128, 128)],
        [(h, w) for h in (192, 128) for w in (192, 192, 64)],
        OTHER_CROP,
    ),
    (G, "first crop"): (Box(0, 34, 320, 320), GRID, CUT),
    (G, "stage 2: crop"): (Box(0, 34, 320, 320), GRID, ONE_CROP),
    (G, "stage 3: crop"): (Box(0, 34, 320, 320), GRID, ONE_CROP),
    (G, "stage 4: crop"): (Box(0, 34, 320, 320), GRID, ONE_CROP),
    (G, "stage 4: upscaler inputs"): (
        [(h, w) for h in (51, 51, 51, 52, 26) for w in (51, 51, 51, 52, 26)],
        [(128, 128)],
        WHOLE,
    ),
    (G, "stage 4: size"): ((320, 320), (320, 384), OTHER_CROP),
    (G, "stage 4: tiles"): (
        [(h, w) for h in (128, 128, 128, 128, 64) for w in (128, 128, 128, 128, 64)],
        [(h, w) for h in (128, 128, 128, 128, 64) for w in (128, 128, 128, 128, 128, 64)],
        OTHER_CROP,
    ),
}


@dataclass(frozen=True)
class OfficialStage:
    """One stage after the first, as traced."""

    crop: Box  # of the picture
    input_size: tuple[int, int]
    size: tuple[int, int]
    num_steps: int
    start: float
    tiles: tuple[
        tuple[tuple[int, int], tuple[int, int]], ...
    ]  # (input, output) sizes; none for a stage in one piece


@dataclass(frozen=True)
class Run:
    """A whole official run."""

    meta: dict[str, Any]
    mask: Tensor
    first_crop: Box
    first_size: tuple[int, int]
    stages: tuple[OfficialStage, ...]

    @property
    def native(self) -> int:
        return self.meta["default_size"]

    @property
    def max_edge(self) -> int:
        return self.meta["max_edgelen"]


def pair(values: list[int]) -> tuple[int, int]:
    return values[0], values[1]


def box(rows: list[int], columns: list[int]) -> Box:
    return Box(rows[0], columns[0], rows[1] - rows[0], columns[1] - columns[0])


def read(name: str) -> Run:
    """The run `name`: its trace, grouped by stage."""
    meta = load_golden("msbd", name).meta
    mask = torch.zeros(1, 1, *meta["image_hw"])
    for top, bottom, left, right in meta["mask_rects_r0_r1_c0_c1"]:
        mask[..., top:bottom, left:right] = 1
    first, *calls = meta["trace"]
    stages: list[OfficialStage] = []
    crop, upscales = calls[0], []
    for index, call in enumerate(calls):
        if call["fn"] == "upscale_recrop_image":
            crop, upscales = call, []
            continue
        upscales.append(call)
        if index + 1 < len(calls) and calls[index + 1]["fn"] != "upscale_recrop_image":
            continue  # a tile; the call for the whole stage comes last
        tiles = [(pair(tile["input_hw"]), pair(tile["target_hw"])) for tile in upscales[:-1]]
        stages.append(
            OfficialStage(
                box(crop["crop_x"], crop["crop_y"]),
                pair(call["input_hw"]),
                pair(call["target_hw"]),
                call["ddim_steps"],
                call["start_timestep"],
                tuple(tiles),
            )
        )
    first_crop = box(calls[0]["prev_x"], calls[0]["prev_y"])
    return Run(meta, mask, first_crop, pair(first["source_hw"]), tuple(stages))


def config_of(run: Run) -> EditConfig:
    """The options the run was made with: preset official, and the defaults of `multi_scale_generation`."""
    kwargs = run.meta["kwargs"]
    return EditConfig(
        **{
            **official.OPTIONS,
            "margin": 1.0,
            "num_steps": kwargs["ddim_steps"],
            "repaint_steps": kwargs.get("repaint_steps", 0),
            "upscale_startstep": 0.35,
            "grid_overlap": kwargs["grid_overlap"],
            "max_edgelen": run.max_edge,
            "tile": run.max_edge,
            "upscaling_mode": run.meta["upscaling_mode"],
        }
    )


def plan_of(run: Run) -> EditPlan:
    return plan_edit(run.mask, config_of(run), ModelSpec(native=run.native, multiple=64), ALPHAS)


def rectangle_of(run: Run) -> tuple[int, int]:
    mask = mask_box(run.mask)
    extents = (mask.height - 1, mask.width - 1)  # one pixel short, as there
    return rectangle_size(extents, pair(run.meta["image_hw"]), 1.0, run.native)


# ---- official.py against the traces: exact -----------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
def test_official_crop_and_stage_sizes_match_the_trace(name: str) -> None:
    run = read(name)
    rectangle = rectangle_of(run)
    side = max(rectangle)
    assert official.crop_around(run.mask, (side, side)) == run.first_crop
    assert run.first_size == (run.native, run.native)
    edges = official.stage_edges(side, run.native, run.max_edge)
    assert [official.stage_size(edge, rectangle) for edge in edges] == [stage.size for stage in run.stages]


@pytest.mark.parametrize("name", RUNS)
def test_official_crops_of_later_stages_match_the_trace(name: str) -> None:
    """Each is the crop around the mask that the stage's size amounts to at full resolution:
    int(size / zoom).
    """
    run = read(name)
    longest = max(rectangle_of(run))
    for stage in run.stages:
        zoom = max(stage.size) / longest
        size = (int(stage.size[0] / zoom), int(stage.size[1] / zoom))
        assert official.crop_around(run.mask, size) == stage.crop


@pytest.mark.parametrize("name", RUNS)
def test_official_upscaler_inputs_match_the_trace(name: str) -> None:
    """The last output's long edge, and the new crop's aspect, truncated;
    a tile's part of it by the row factor.
    """
    run = read(name)
    previous = run.first_size
    for stage in run.stages:
        long = max(previous)
        height, width = stage.crop.size
        other = int(long * min(height, width) / max(height, width))
        assert stage.input_size == ((long, other) if height >= width else (other, long))
        if stage.tiles:
            boxes = official.tile_grid(
                *stage.size,
                tile=run.max_edge,
                overlap=run.meta["kwargs"]["grid_overlap"],
                smallest=run.native,
            )
            assert [size for _, size in stage.tiles] == [tile.size for tile in boxes]
            factor = stage.size[0] / stage.input_size[0]
            for (seen, _), tile in zip(stage.tiles, boxes, strict=True):
                assert seen == (
                    int(tile.bottom / factor) - int(tile.top / factor),
                    int(tile.right / factor) - int(tile.left / factor),
                )
        else:
            assert max(stage.size) <= run.max_edge
        previous = stage.size


# ---- our plan of preset official against the traces --------------------------------------------------------


def compare(name: str) -> dict[tuple[str, str], tuple[Any, Any]]:
    """Everything in which our plan differs from the trace: (run, what) -> (official, ours)."""
    run, plan = read(name), plan_of(read(name))
    pairs: dict[str, tuple[Any, Any]] = {
        "number of stages": (len(run.stages) + 1, len(plan.stages)),
        "first crop": (run.first_crop, plan.crop),
        "first size": (run.first_size, plan.stages[0].size),
        "first steps": (run.meta["trace"][0]["steps"], plan.stages[0].num_steps),
        "guidance": (run.meta["trace"][0]["scale"], plan.config.guidance_scale),
    }
    for before, theirs, ours in zip(plan.stages, run.stages, plan.stages[1:], strict=False):
        pairs |= {
            f"{ours.name}: crop": (theirs.crop, plan.crop),
            f"{ours.name}: upscaler inputs": (
                [seen for seen, _ in theirs.tiles] or [theirs.input_size],
                [before.size],
            ),
            f"{ours.name}: size": (theirs.size, ours.size),
            f"{ours.name}: steps": (theirs.num_steps, ours.num_steps),
            f"{ours.name}: start": (theirs.start, ours.start),
            f"{ours.name}: tiles": (
                [size for _, size in theirs.tiles] or [theirs.size],
                [tile.size for tile in ours.grid],
            ),
        }
    return {(name, what): values for what, values in pairs.items() if values[0] != values[1]}


@pytest.mark.parametrize("name", RUNS)
def test_official_plan_differs_from_the_trace_only_where_the_table_says(name: str) -> None:
    named = {key: (theirs, ours) for key, (theirs, ours, _) in DIFFERENCES.items() if key[0] == name}
    assert compare(name) == named


@pytest.mark.parametrize("name", RUNS)
def test_official_plan_takes_the_timesteps_of_the_traced_steps(name: str) -> None:
    """tau_k = 1 + k (1000 // N), the first int(N start) of them, descending;
    each 1 + R times in the first stage.
    """
    run, plan = read(name), plan_of(read(name))
    traced = [(run.meta["trace"][0]["steps"], 1.0), *((stage.num_steps, stage.start) for stage in run.stages)]
    repeats = run.meta["kwargs"].get("repaint_steps", 0)
    for stage, (num_steps, start) in zip(plan.stages, traced, strict=True):
        all_of_them = list(range(1, 1000, 1000 // num_steps))
        kept = all_of_them[: int(len(all_of_them) * start)][::-1]
        times = 1 + (repeats if stage.number == 0 else 0)
        evaluations = official.evaluations(
            stage.num_steps, stage.start, stage.repeats, plan.config.repaint_jump, ALPHAS
        )
        assert [now.t for now in evaluations] == [t for t in kept for _ in range(times)]


@pytest.mark.parametrize("name", RUNS)
def test_our_crop_covers_the_mask_where_the_official_one_may_not(name: str) -> None:
    run = read(name)
    mask = mask_box(run.mask)
    assert plan_of(run).crop.contains(mask)
    cut = not run.stages[-1].crop.contains(mask)
    assert cut == ((name, "first crop") in DIFFERENCES)
    assert math.prod(mask.size) == run.mask.sum()  # one rectangle: the box is the mask


def test_official_decoder_segments_weigh_every_pixel_once() -> None:
    mask = torch.zeros(1, 1, 96, 160)
    mask[..., 20:60, 30:100] = 1
    image = torch.rand(1, 3, 96, 160) * 2 - 1
    segments = official.reencoded_segments(tiny_vae(), image, -image, mask, 64)
    boxes = official.decoder_segments(96, 160, 64)
    assert len(segments) == len(boxes) == 6  # the last of each axis overlaps the one before it
    total = torch.zeros(1, 1, 96, 160)
    for segment, at in zip(segments, boxes, strict=True):
        window = (..., slice(at.top, at.bottom), slice(at.left, at.right))
        assert segment.weight is not None
        total[window] += segment.weight
        assert torch.equal(segment.reference, -image[window]) and torch.equal(segment.mask, mask[window])
        assert segment.latent.shape == (1, 4, 8, 8)
    torch.testing.assert_close(total, torch.ones_like(total))
