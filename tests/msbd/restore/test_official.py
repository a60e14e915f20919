"""What the official PASD code computes: stored references, figures worked out by hand, where ours differs."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from msbd.pixels.box import Box
from msbd.pixels.files import to_image, to_pixels
from msbd.pixels.luma import luma
from msbd.pixels.tiles import TileBlend, tile_boxes
from msbd.restore import official, paper
from msbd.restore.color import transfer_chroma, wavelet_color_fix
from samplers.schedule import linspace_timesteps, make_alphas_cumprod, make_betas
from tests.helpers.goldens import load_golden, relative_error

LEVELS = make_alphas_cumprod(make_betas())
GRIDS = load_golden("pasd_helpers", "latent_tile_grid").meta["cases"]
SIZES = load_golden("pasd_helpers", "prepare_sizes").meta["cases"]


def image_of(pixels: Tensor | np.ndarray | list[Any]) -> Tensor:
    array = pixels.numpy() if isinstance(pixels, Tensor) else np.array(pixels, np.uint8)
    return to_image(array)


# ---- the picture before and after --------------------------------------------------------------------------


@pytest.mark.parametrize("case", SIZES, ids=lambda case: f"{case['input_wh']}-x{case['upscale']}")
def test_prepared_size_is_the_stored_one(case: dict[str, Any]) -> None:
    (width, height), grayscale = case["input_wh"], case["control_type"] == "grayscale"
    size = official.prepared_size((height, width), case["upscale"], case["process_size"], grayscale=grayscale)
    assert size[::-1] == tuple(case["prepared_wh"])


@pytest.mark.parametrize("case", ["prepare_realisr_60x44", "prepare_gray_66x90"])
def test_prepare_is_the_stored_picture_byte_for_byte(case: str) -> None:
    golden = load_golden("pasd_helpers", case)
    grayscale = golden.meta["control_type"] == "grayscale"
    prepared = official.prepared(
        image_of(golden["in.image_uint8"]),
        golden.meta["upscale"],
        golden.meta["process_size"],
        grayscale=grayscale,
    )
    assert np.array_equal(to_pixels(prepared), golden["out.prepared_uint8"].numpy())


@given(
    height=st.integers(1, 300),
    width=st.integers(1, 300),
    upscale=st.integers(1, 4),
    process=st.sampled_from([8, 96, 250]),
    grayscale=st.booleans(),
)
def test_prepared_sizes_have_whole_cells_and_the_process_size(
    height: int, width: int, upscale: int, process: int, grayscale: bool
) -> None:
    try:
        size = official.prepared_size((height, width), upscale, process, grayscale=grayscale)
    except ValueError:
        assert grayscale and max(height, width) * 8 > min(height, width) * 2 * process * 7 / 8
        return
    assert all(side % 8 == 0 and side >= 8 for side in size)
    if grayscale:
        assert max(size) <= 2 * process and min(size) <= process
    else:
        assert min(size) > max(process, upscale * min(height, width)) - 8


def test_prepare_refuses_what_the_official_code_cannot_do() -> None:
    with pytest.raises(ValueError, match=r"whole numbers only, not 2.7 times; preset paper can$"):
        official.prepared_size((40, 60), 2.7, 96)
    assert official.prepared_size((40, 60), 2.7, 96, grayscale=True) == (96, 144)  # has no upscale
    with pytest.raises(ValueError, match=r"work on 3 x 900 pixels at 5 x 1536, but a side needs at least 8"):
        official.prepared(torch.zeros(1, 3, 3, 900), 1, 768, grayscale=True)


@pytest.mark.parametrize("case", ["colorfix_48x64", "colorfix_70x50"])
def test_the_result_is_cut_off_like_the_official_colour_fix(case: str) -> None:
    golden = load_golden("pasd_helpers", case)
    fixed = wavelet_color_fix(image_of(golden["in.target_uint8"]), image_of(golden["in.source_uint8"]))
    expected = golden["out.wavelet_uint8"].numpy()
    size = (expected.shape[0], expected.shape[1])
    assert np.array_equal(to_pixels(official.truncated(fixed, size)), expected)
    lost = to_pixels(fixed).astype(int) - expected
    assert set(np.unique(lost)) == {0, 1} and 0.4 < lost.mean() < 0.6  # half a level darker than rounded


def test_the_bytes_are_resized_by_pillow() -> None:
    image = image_of(np.random.default_rng(0).integers(0, 256, (20, 31, 3))).double()
    bytes_ = to_pixels(official.truncated(image, (20, 31)))
    expected = Image.fromarray(bytes_).resize((25, 47), Image.Resampling.BICUBIC)
    resized = official.truncated(image, (47, 25))
    assert np.array_equal(to_pixels(resized), np.asarray(expected)) and resized.dtype == torch.float64


# ---- the start latent --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "level, fallback, share",  # of the degraded picture's latent in the start latent
    [
        (900, False, 0.008121),
        (900, True, 0.066592),  # what the newer libraries make of it
        (400, False, 0.044476),
        (400, True, 0.044476),  # on the grid of 20 steps
    ],
)
def test_start_level_gives_the_known_shares_of_the_picture(level: int, fallback: bool, share: float) -> None:
    timesteps = linspace_timesteps(20, drop_zero=True)
    rules = official if fallback else paper
    a_a = rules.start_level(level, "unipc", timesteps, LEVELS)
    assert math.sqrt(a_a * LEVELS[timesteps[0]]) == pytest.approx(share, abs=5e-7)
    assert rules.start_level(level, "unipc", timesteps.tolist(), LEVELS) == a_a


def test_no_usual_number_of_steps_reaches_900() -> None:
    for steps in range(4, 61):
        timesteps = linspace_timesteps(steps, drop_zero=True)
        a_a = official.start_level(900, "dpmpp", timesteps, LEVELS)
        assert official.start_level(900, "ddim", timesteps, LEVELS) == LEVELS[900]  # has no such defect
        assert a_a == LEVELS[timesteps[-1]] != LEVELS[900]


def test_start_level_refuses_a_level_outside_the_schedule() -> None:
    for level in (-1, 1000):
        with pytest.raises(
            ValueError, match=rf"^the added noise level is a timestep, 0 to 999; got {level}$"
        ):
            official.start_level(level, "unipc", [999], LEVELS)


# ---- tiles -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", GRIDS, ids=lambda case: f"{case['h']}x{case['w']}")
def test_latent_tiles_are_the_stored_ones_in_their_order(case: dict[str, Any]) -> None:
    boxes = official.latent_tiles(
        case["h"], case["w"], case["latent_tiled_size"], case["latent_tiled_overlap"]
    )
    assert boxes == [Box(top, left, h, w) for left, top, w, h, _, _ in case["tiles_x_y_w_h_condw_condh"]]


@pytest.mark.parametrize("case", GRIDS, ids=lambda case: f"{case['h']}x{case['w']}")
def test_the_blend_gives_back_what_was_cut(case: dict[str, Any]) -> None:
    height, width = case["h"], case["w"]
    latent = torch.arange(2.0 * height * width).view(1, 2, height, width)
    boxes = official.latent_tiles(height, width, case["latent_tiled_size"], case["latent_tiled_overlap"])
    blend = official.GaussianBlend(boxes, height, width)
    for box in boxes:
        blend.add(box, latent[..., *box.window])
    assert relative_error(blend.result(torch.zeros(1)), latent) < 1e-6


@given(
    height=st.integers(1, 90), width=st.integers(1, 90), tile=st.integers(1, 40), overlap=st.integers(0, 40)
)
def test_tiles_cover_every_cell(height: int, width: int, tile: int, overlap: int) -> None:
    side = min(tile, height, width)
    if height * width > tile**2 and overlap >= side:  # the official code never ends
        with pytest.raises(ValueError, match=rf"tiles of {side} .* overlap must be from 0 to {side - 1}$"):
            official.latent_tiles(height, width, tile, overlap)
        return
    covered = torch.zeros(height, width, dtype=torch.int)
    boxes = official.latent_tiles(height, width, tile, overlap)
    for box in boxes:
        assert box.size == ((height, width) if len(boxes) == 1 else (side, side))
        covered[box.window] += 1
    assert covered.min() >= 1 and len(set(boxes)) == len(boxes)


def test_a_strip_is_cut_into_more_tiles_than_ours() -> None:
    assert len(official.latent_tiles(32, 96, 24, 8)) == len(tile_boxes(32, 96, 24, 8)) == 12
    assert official.latent_tiles(20, 200, 64, 8) == [Box(0, 0, 20, 200)]  # one box, as 64^2 > 20 * 200
    strip = official.latent_tiles(20, 300, 64, 8)
    assert len(strip) == 25 and len(tile_boxes(20, 300, 64, 8)) == 6


def gaussian_weights(height: int, width: int) -> Tensor:
    """The weights (1, 1, height, width), float64, that `GaussianBlend` gives a tile of this size."""
    blend: Any = official.blend([Box(0, 0, height, width)], height, width)
    return (blend._rows[0, height][:, None] * blend._columns[0, width][None, :])[None, None]


@pytest.mark.parametrize("side", [5, 8, 16])
def test_gaussian_weights_are_the_stored_ones(side: int) -> None:
    weights = gaussian_weights(side, side)
    assert weights.dtype == torch.float64 and weights.shape == (1, 1, side, side)
    assert (
        relative_error(weights[0, 0], load_golden("pasd_helpers", "gaussian_weights")[f"w{side}x{side}"])
        < 1e-14
    )


def test_gaussian_weights_are_symmetric_across_but_not_down() -> None:
    weights = gaussian_weights(12, 20)
    torch.testing.assert_close(weights, weights.flip(-1), rtol=1e-12, atol=0)
    assert (weights.argmax(-2) == 6).all()  # of rows 0 to 11, whose middle is 5.5
    assert (weights[..., 0, :] < weights[..., -1, :]).all()


def test_the_blend_is_the_mean_by_gaussian_weights() -> None:
    boxes = official.latent_tiles(33, 47, 20, 6)
    patches = torch.randn(len(boxes), 1, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    weights = gaussian_weights(20, 20)
    total, weight = torch.zeros(1, 3, 33, 47, dtype=torch.float64), torch.zeros(1, 1, 33, 47).double()
    blend: TileBlend = official.GaussianBlend(boxes, 33, 47)
    for box, patch in zip(boxes, patches, strict=True):
        blend.add(box, patch)
        total[..., *box.window] += weights * patch
        weight[..., *box.window] += weights
    result = blend.result(torch.zeros(1))
    assert result.dtype == torch.float32 and relative_error(result, total / weight) < 1e-6


def test_the_official_fade_begins_with_a_step_and_ours_does_not() -> None:
    boxes = official.latent_tiles(320, 632, 320, 8)  # the official size and overlap
    blends = [kind(boxes, 320, 632) for kind in (official.GaussianBlend, TileBlend)]
    for blend in blends:
        for number, box in enumerate(boxes):
            blend.add(box, torch.full((1, 1, *box.size), float(number)))
    theirs, ours = (blend.result(torch.zeros(1))[0, 0, 100, 311:321].tolist() for blend in blends)
    assert theirs[0] == ours[0] == 0 and theirs[-1] == ours[-1] == 1
    assert theirs[1] == pytest.approx(0.26, abs=0.005) and ours[1] < 0.01


# ---- colourisation -----------------------------------------------------------------------------------------


def test_chroma_is_the_stored_one_byte_for_byte() -> None:
    golden = load_golden("pasd_helpers", "prepare_gray_66x90")
    image, source = (image_of(golden[f"in.{name}_uint8"]) for name in ("generated_rgb", "image"))
    result = to_pixels(official.transfer_chroma_official(image, source))
    assert np.array_equal(result[..., ::-1], golden["out.colorised_bgr_uint8"].numpy())


def test_chroma_enlarged_and_at_the_borders_is_that_of_opencv() -> None:
    image = [
        [[250, 20, 40], [10, 200, 90], [70, 60, 220]],
        [[128, 130, 127], [240, 235, 10], [5, 15, 25]],
    ]
    source = np.arange(0, 240, 12).reshape(4, 5, 1).repeat(3, axis=2)
    expected = [  # by opencv-python-headless 4.10.0
        [[145, 0, 0], [59, 0, 0], [0, 93, 0], [0, 51, 103], [37, 27, 186]],
        [[179, 7, 21], [110, 64, 15], [1, 142, 3], [57, 109, 129], [98, 92, 216]],
        [[159, 103, 106], [153, 136, 59], [136, 179, 0], [148, 168, 117], [159, 164, 213]],
        [[179, 181, 178], [203, 202, 111], [233, 229, 3], [223, 227, 143], [220, 230, 240]],
    ]
    result = official.transfer_chroma_official(image_of(image), image_of(source))
    assert to_pixels(result).tolist() == expected


def test_a_grey_picture_gives_a_grey_result() -> None:
    source = image_of(np.arange(256).reshape(16, 16, 1).repeat(3, axis=2))
    grey = torch.zeros(1, 3, 5, 7)
    torch.testing.assert_close(official.transfer_chroma_official(grey, source), source)


def test_clipping_changes_the_luma_and_ours_does_not() -> None:
    image = image_of([[[255, 0, 0]]]).expand(1, 3, 4, 4)
    source = torch.full((1, 3, 4, 4), 0.8)
    theirs = official.transfer_chroma_official(image, source)
    ours = image_of(to_pixels(transfer_chroma(image, source)))
    off = [(luma(picture) - 0.8).abs().max().item() * 127.5 for picture in (theirs, ours)]
    assert off[0] > 20 and off[1] < 0.6
