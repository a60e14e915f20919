import pytest
import torch
from torch.nn import functional as F

from msbd.edit import official
from msbd.pixels.box import Box
from msbd.pixels.files import to_image, to_pixels
from msbd.pixels.resize import truncate_to_8_bits
from msbd.pixels.tiles import tile_boxes
from tests.helpers.goldens import load_golden
from tests.helpers.official_rectangle import rectangle_size


def boxes_of(meta: dict) -> list[Box]:
    return [
        Box(top, left, bottom - top, right - left)
        for (top, bottom), (left, right) in zip(meta["crops_x"], meta["crops_y"], strict=True)
    ]


CROPS = load_golden("msbd", "crop_coords").meta["cases"]
SPLITS = load_golden("msbd", "upsampling_split").meta["cases"]


@pytest.mark.parametrize("case", CROPS, ids=lambda case: f"{case['image_hw']}-{case['crop_hw']}")
def test_crop_around_matches_golden(case: dict) -> None:
    mask = torch.zeros(1, 1, *case["image_hw"])
    for top, bottom, left, right in case["mask_rects_r0_r1_c0_c1"]:
        mask[..., top:bottom, left:right] = 1
    size = tuple(case["crop_hw"])
    if "error" in case:
        with pytest.raises(ValueError, match="does not fit"):
            official.crop_around(mask, (size[0], size[1]))
        return
    crop = official.crop_around(mask, (size[0], size[1]))
    assert [crop.top, crop.bottom] == case["crop_x_rows"]
    assert [crop.left, crop.right] == case["crop_y_cols"]
    assert mask[..., crop.top : crop.bottom, crop.left : crop.right].sum() == case["mask_in_crop_sum"]


@pytest.mark.parametrize(
    "case", SPLITS, ids=lambda case: f"{case['target_hw']}-{case['max_edgelen']}-{case['overlap']}"
)
def test_tile_grid_matches_golden(case: dict) -> None:
    height, width = case["target_hw"]
    tile, overlap, smallest = case["max_edgelen"], case["overlap"], case["default_size"]
    ours = tile_boxes(height, width, tile, overlap)
    if "error" in case:  # the reference loops forever; ours has a grid
        with pytest.raises(ValueError, match="never ends"):
            official.tile_grid(height, width, tile=tile, overlap=overlap, smallest=smallest)
        assert len(ours) == 4
        return
    expected = boxes_of(case)
    assert official.tile_grid(height, width, tile=tile, overlap=overlap, smallest=smallest) == expected
    assert len(ours) <= len(expected)


@pytest.mark.parametrize("case, without_last_tiles", [((2048, 1536), 3), ((1024, 1024), 0)])
def test_our_grid_differs_from_the_golden_only_by_redundant_and_short_tiles(
    case: tuple[int, int], without_last_tiles: int
) -> None:
    theirs = official.tile_grid(*case)
    ours = tile_boxes(*case, 768, 128)
    assert len(theirs) - len(ours) == without_last_tiles
    assert {box for box in ours if max(box.bottom, box.right) < 1024} <= set(theirs)
    assert all(box.size == (768, 768) for box in ours)  # their last tile is 512


@pytest.mark.parametrize("case", ["alpha_160x160", "alpha_128x200"])
def test_alpha_masks_and_composition_match_golden(case: str) -> None:
    golden = load_golden("msbd", case)
    height, width = golden.meta["target_hw"]
    overlap, boxes = golden.meta["overlap"], boxes_of(golden.meta)
    grid = official.tile_grid(
        height, width, tile=golden.meta["max_edgelen"], overlap=overlap, smallest=golden.meta["default_size"]
    )
    assert grid == boxes
    for k, box in enumerate(boxes):
        alpha = official.alpha_mask(box, (height, width), overlap)
        torch.testing.assert_close(alpha, golden[f"alpha.{k}"], atol=1e-6, rtol=0)
    tiles = [golden[f"in.segment.{k}_uint8"].permute(1, 2, 0).numpy() for k in range(len(boxes))]
    base = to_pixels(F.interpolate(golden["in.source"], size=(height, width), mode="bicubic"))
    out = official.compose_tiles(base, tiles, boxes, overlap)
    error = torch.from_numpy(out).int() - golden["out.composited_uint8"][0].permute(1, 2, 0).int()
    assert error.abs().max() <= 1


@pytest.mark.parametrize(
    "longest, max_edge, edges",
    [
        (512, 768, [512]),
        (704, 768, [704]),
        (768, 768, [768, 768]),
        (2816, 768, [768, 2816]),
        (2816, 960, [768, 2816]),
        (2816, 1536, [768, 1024, 1472, 2816]),
    ],
)
def test_stage_edges_of_known_pictures(longest: int, max_edge: int, edges: list[int]) -> None:
    assert official.stage_edges(longest, 512, max_edge) == edges
    assert official.stage_edges(longest, 512, max_edge, straight_to_grid=True) == [longest]


def test_stage_size_rounds_the_short_edge_up() -> None:
    assert official.stage_size(768, (1408, 2816)) == (384, 768)
    assert official.stage_size(768, (2816, 1472)) == (768, 448)


def test_rectangle_size_swaps_the_picture_s_sides() -> None:
    assert rectangle_size((100, 2000), (1000, 3000), 1.2) == (
        512,
        960,
    )  # a wide mask is cut to the height
    assert rectangle_size((2000, 600), (3000, 1000), 1.2) == (960, 768)
    assert rectangle_size((900, 600), (4000, 4000), 1.2) == (1088, 768)


def test_decoder_segments_cover_without_overlap_but_the_last() -> None:
    boxes = official.decoder_segments(1024, 1280)
    assert [box.left for box in boxes[:3]] == [0, 512, 768] and len(boxes) == 6
    assert all(box.size == (512, 512) for box in boxes)
    assert official.decoder_segments(300, 600)[-1] == Box(0, 88, 300, 512)


def test_truncation_darkens_exactly_the_levels_1_to_63() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    image = (levels.float() / 255 * 2 - 1).view(1, 1, 1, 256)
    out = to_pixels(truncate_to_8_bits(image)).flatten()
    lost = (levels.int() - torch.from_numpy(out).int()).tolist()
    assert lost == [0] + [1] * 63 + [0] * 192
    assert to_image(out.reshape(1, -1, 1)).shape == (1, 1, 1, 256)
