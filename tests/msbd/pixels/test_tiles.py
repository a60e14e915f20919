from collections.abc import Sequence

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from msbd.pixels.box import Box
from msbd.pixels.tiles import TileBlend, _axis_weights, _outer, covered, tile_boxes, touches


def tile_weights(boxes: Sequence[Box], height: int, width: int) -> list[Tensor]:
    """The weight (1, 1, h, w) of each box of a grid, which `TileBlend` does not hold all at once."""
    rows, columns = _axis_weights(boxes, height, width)
    return [_outer(rows[box.top, box.height], columns[box.left, box.width]) for box in boxes]


def summed(boxes: list[Box], height: int, width: int) -> torch.Tensor:
    total = torch.zeros(1, 1, height, width, dtype=torch.float64)
    for box, weight in zip(boxes, tile_weights(boxes, height, width), strict=True):
        total[..., box.top : box.bottom, box.left : box.right] += weight
    return total


@settings(max_examples=300, deadline=None)
@given(
    length=st.integers(1, 3000),
    tile=st.integers(1, 40),
    overlap=st.integers(0, 39),
    multiple=st.sampled_from([1, 8, 64]),
)
@example(length=1408, tile=12, overlap=2, multiple=64)  # official: 3 tiles
@example(length=1024, tile=10, overlap=3, multiple=64)  # official: never ends
def test_tile_boxes_cover_with_the_least_overlapping_tiles(
    length: int, tile: int, overlap: int, multiple: int
) -> None:
    tile, overlap = tile * multiple, min(overlap, tile - 1) * multiple
    boxes = tile_boxes(1, length, tile, overlap, multiple)
    assert boxes[0].left == 0 and boxes[-1].right == length
    assert all(box.left % multiple == 0 and 0 < box.width <= tile for box in boxes)
    for before, after in zip(boxes, boxes[1:], strict=False):
        assert before.left < after.left and before.right < length  # none is redundant
        assert before.right - after.left >= overlap
    fewest = 1 if length <= tile else -(-(length - overlap) // (tile - overlap))
    assert len(boxes) == fewest
    if length % multiple == 0:
        assert all(box.width == min(tile, length) for box in boxes)


def test_tile_boxes_of_the_papers_final_stage() -> None:
    boxes = tile_boxes(1408, 2816, 768, 128, 64)
    assert [box.top for box in boxes[::5]] == [0, 640] and len(boxes) == 10  # official: 15
    assert [box.left for box in boxes[:5]] == [0, 640, 1280, 1920, 2048]


@pytest.mark.parametrize("tile, overlap, multiple", [(64, 64, 8), (64, -8, 8), (64, 12, 8), (60, 8, 8)])
def test_tile_boxes_refuses_impossible_settings(tile: int, overlap: int, multiple: int) -> None:
    with pytest.raises(ValueError, match="overlap"):
        tile_boxes(100, 100, tile, overlap, multiple)


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 130), width=st.integers(1, 130), tile=st.integers(1, 60), overlap=st.integers(0, 59)
)
def test_tile_weights_are_a_partition_of_unity(height: int, width: int, tile: int, overlap: int) -> None:
    boxes = tile_boxes(height, width, max(tile, 8), min(overlap, max(tile, 8) - 3))
    weights = tile_weights(boxes, height, width)
    assert (summed(boxes, height, width) - 1).abs().max() <= 1e-6
    assert all(weight.min() > 0 and weight.max() <= 1 + 1e-6 for weight in weights)


def test_tile_weights_fade_symmetrically_over_the_whole_overlap() -> None:
    boxes = tile_boxes(1, 100, 60, 20)  # 0..60 and 40..100
    first, second = (weight.flatten() for weight in tile_weights(boxes, 1, 100))
    torch.testing.assert_close(first, second.flip(0))
    assert bool((first[:40] == 1).all()) and bool((first[40:].diff() < 0).all())
    assert first[40] > 0.99 and first[59] < 0.01 and abs(first[49] + first[50] - 1) < 1e-6


def test_covered_keeps_the_mask_under_the_boxes_only() -> None:
    mask = torch.ones(1, 1, 6, 8)
    kept = covered(mask, [Box(0, 0, 2, 3), Box(1, 2, 3, 2)])
    assert kept.sum() == 6 + 6 - 1 and bool((mask == 1).all())
    assert kept[0, 0, 1, 2] == 1 and kept[0, 0, 3, 3] == 1 and kept[0, 0, 4, 3] == 0
    assert covered(mask, []).sum() == 0


def test_tile_blend_equals_the_weighted_sum_and_fills_the_rest() -> None:
    height, width = 70, 90
    boxes = tile_boxes(height, width, 40, 12)
    patches = [
        torch.randn(2, 3, *box.size, generator=torch.Generator().manual_seed(k))
        for k, box in enumerate(boxes)
    ]
    expected = torch.zeros(2, 3, height, width)
    for box, patch, weight in zip(boxes, patches, tile_weights(boxes, height, width), strict=True):
        expected[..., box.top : box.bottom, box.left : box.right] += weight * patch
    blend = TileBlend(boxes, height, width)
    for box, patch in zip(boxes, patches, strict=True):
        blend.add(box, patch)
    torch.testing.assert_close(blend.result(torch.zeros(1)), expected)


@settings(max_examples=40, deadline=None)
@given(top=st.integers(0, 69), left=st.integers(0, 89), size=st.integers(1, 40))
def test_tile_blend_without_unmasked_tiles_agrees_where_the_mask_is_set(
    top: int, left: int, size: int
) -> None:
    mask = torch.zeros(1, 1, 70, 90)
    mask[..., top : top + size, left : left + size] = 1
    boxes = tile_boxes(70, 90, 40, 12)
    everything, masked = TileBlend(boxes, 70, 90), TileBlend(boxes, 70, 90)
    for k, box in enumerate(boxes):
        patch = torch.full((1, 3, *box.size), float(k))
        everything.add(box, patch)
        if touches(box, mask):
            masked.add(box, patch)
    set_ = (mask > 0).expand(1, 3, 70, 90)
    fill = torch.full((1, 3, 70, 90), -5.0)
    torch.testing.assert_close(masked.result(fill)[set_], everything.result(fill)[set_])


def test_tile_blend_with_no_tile_is_the_fill() -> None:
    fill = torch.rand(1, 3, 20, 30)
    assert torch.equal(TileBlend(tile_boxes(20, 30, 16, 4), 20, 30).result(fill), fill)


def test_tile_blend_refuses_a_patch_of_another_size() -> None:
    boxes = tile_boxes(20, 30, 16, 4)
    with pytest.raises(ValueError, match="does not fit"):
        TileBlend(boxes, 20, 30).add(boxes[0], torch.zeros(1, 3, 15, 16))


def test_tile_weights_refuse_boxes_with_a_hole() -> None:
    with pytest.raises(ValueError, match="do not cover"):
        tile_weights([Box(0, 0, 4, 4), Box(0, 6, 4, 4)], 4, 10)
