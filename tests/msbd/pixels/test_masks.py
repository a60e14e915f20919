import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msbd.pixels import masks
from tests.helpers.goldens import load_golden


def square(height: int, width: int, top: int, left: int, size: int) -> torch.Tensor:
    mask = torch.zeros(1, 1, height, width)
    mask[..., top : top + size, left : left + size] = 1
    return mask


@pytest.mark.parametrize("case", ["interp_70x90_to_128x64", "interp_96x80_to_64"])
def test_sample_mask_matches_golden(case: str) -> None:
    golden = load_golden("msbd", case)
    height, width = golden["out.mask_pixel"].shape[-2:]
    assert torch.equal(masks.sample_mask(golden["in.mask"], (height, width)), golden["out.mask_pixel"])
    assert torch.equal(
        masks.sample_mask(golden["in.mask"], (height // 8, width // 8)), golden["out.mask_latent"]
    )


def test_dilation_matches_golden() -> None:
    golden = load_golden("msbd", "dilated_mask")
    for quarter, kernel in enumerate((7, 5, 3, 1)):
        out = masks.progressive_dilation(golden["in.mask"], (quarter + 0.5) / 4)
        assert torch.equal(out, golden[f"out.k{kernel}"])
    assert torch.equal(masks.progressive_dilation(golden["in.mask"], 1.7), golden["out.k1"])


@settings(max_examples=80, deadline=None)
@given(
    height=st.integers(1, 200),
    width=st.integers(1, 200),
    pixel=st.tuples(st.integers(0, 199), st.integers(0, 199)),
    size=st.tuples(st.integers(1, 250), st.integers(1, 250)),
)
def test_resize_mask_never_loses_a_pixel(
    height: int, width: int, pixel: tuple[int, int], size: tuple[int, int]
) -> None:
    mask = square(height, width, pixel[0] % height, pixel[1] % width, 1)
    small = masks.resize_mask(mask, size)
    assert small.shape[-2:] == size and small.max() == 1
    assert masks.resize_mask(mask * 0, size).max() == 0


@settings(max_examples=80, deadline=None)
@given(
    height=st.integers(1, 100), width=st.integers(1, 100), row=st.integers(0, 99), column=st.integers(0, 99)
)
def test_latent_mask_any_sets_exactly_the_cell_of_a_pixel(
    height: int, width: int, row: int, column: int
) -> None:
    row, column = row % height, column % width
    cells = masks.latent_mask(square(height, width, row, column, 1), 8)
    assert cells.shape[-2:] == (-(-height // 8), -(-width // 8))
    assert cells.sum() == 1 and cells[0, 0, row // 8, column // 8] == 1


def test_latent_mask_center_misses_what_any_keeps() -> None:
    edge = square(64, 64, 0, 0, 8 + 3)  # three pixels into the next cells
    assert masks.latent_mask(edge, 8, "any").sum() == 4
    assert masks.latent_mask(edge, 8, "center").sum() == 1
    with pytest.raises(ValueError, match="rule"):
        masks.latent_mask(edge, 8, "corner")  # pyright: ignore[reportArgumentType]


def test_dilate_grows_by_its_radius_on_every_side() -> None:
    out = masks.dilate(square(20, 20, 9, 9, 2), 3)
    assert torch.equal(out, square(20, 20, 6, 6, 8))
    assert torch.equal(masks.dilate(out, 0), out)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 999), width=st.integers(0, 9), size=st.tuples(st.integers(1, 30), st.integers(1, 30))
)
def test_feather_equals_the_distance_to_the_nearest_kept_pixel(
    seed: int, width: int, size: tuple[int, int]
) -> None:
    mask = (torch.rand((1, 1, *size), generator=torch.Generator().manual_seed(seed)) > 0.03).float()
    out = masks.feather(mask, width)
    kept = (mask[0, 0] == 0).nonzero().float()
    pixels = torch.cartesian_prod(torch.arange(size[0]), torch.arange(size[1])).view(-1, 2).float()
    if len(kept) == 0 or width == 0:
        expected = mask
    else:
        distance = torch.cdist(pixels, kept).amin(1).view(mask.shape)
        expected = ((distance - 0.5) / width).clamp(0, 1) * mask
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=0)


def test_feather_is_exactly_zero_outside_and_one_inside() -> None:
    mask = square(60, 60, 10, 10, 40)
    out = masks.feather(mask, 8)
    assert bool((out[mask == 0] == 0).all()) and bool((out[..., 18:42, 18:42] == 1).all())
    ramp = out[0, 0, 30, 10:18]
    assert 0 < ramp[0] < 0.1 and bool((ramp.diff() > 0).all())


def test_feather_does_not_fade_at_the_pictures_border() -> None:
    assert bool((masks.feather(torch.ones(1, 1, 12, 9), 5) == 1).all())
