"""The restoration table: pairs the same everywhere, measures right where the answer is known."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msbd.pixels.files import load_image
from msbd.pixels.metrics import ssim
from msbd.train.degrade import REAL_ESRGAN, apply, sample_parameters
from tests.helpers.tiny import pixel_pipeline
from tools._report import write_json
from tools.evaluate.restore import (
    METRICS,
    Method,
    Pair,
    bicubic,
    clip_features,
    make_pairs,
    measure,
    paired,
    restore_figures,
    restore_table,
    upscaler_method,
    write_rows,
)
from tools.scenes.data import held_out_scenes, to_8_bits

NAMES = ["PSNR", "SSIM", "GMSD", "feature distance"]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    return make_pairs(18, 32)  # more than a batch


class Corners(nn.Module):
    """A CLIP that sees what colour the corner of a picture is."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.zeros(()))

    def encode_image(self, pixels: Tensor) -> Tensor:
        return pixels[..., 0, 0]


class Doubled(nn.Module):
    """An upscaler that repeats pixels, twice as bright."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * F.interpolate(x, scale_factor=4, mode="nearest")


def plain_features(images: Tensor) -> Tensor:
    """The pixels themselves."""
    return images.flatten(1)


def moved(pairs: list[Pair], by: float) -> Method:
    """A method that knows the answer and is off by `by` levels of 255, away from the ends of the range."""

    def restore(low: Tensor, captions: list[str], first_seed: int) -> Tensor:
        clean = torch.cat([pair.clean for pair in pairs[first_seed : first_seed + len(low)]])
        return clean - clean.sign() * by / 127.5

    return restore


def test_pairs_are_the_same_however_many(pairs: list[Pair]) -> None:
    for few, many, scene in zip(make_pairs(3, 32), pairs[:3], held_out_scenes(3), strict=True):
        assert few.caption == many.caption == scene.caption
        assert torch.equal(few.clean, many.clean) and torch.equal(few.low, many.low)


def test_pairs_are_files_of_8_bits_a_quarter_as_large(pairs: list[Pair]) -> None:
    for pair in pairs[:4]:
        assert pair.clean.shape == (1, 3, 32, 32) and pair.low.shape == (1, 3, 8, 8)
        for levels in (pair.clean * 127.5 + 127.5, pair.low * 255):
            assert levels.min() >= 0 and 1 < levels.max() <= 255.01
            torch.testing.assert_close(levels, levels.round(), atol=1e-3, rtol=0)


def test_pair_i_is_degraded_with_seed_i(pairs: list[Pair]) -> None:
    def degraded(pair: Pair, seed: int) -> Tensor:
        return apply(pair.clean / 2 + 0.5, sample_parameters(torch.Generator().manual_seed(seed)))

    for number in (0, 5, 17):
        assert torch.equal(pairs[number].low, degraded(pairs[number], number))
        assert not torch.equal(pairs[number].low, degraded(pairs[number], number + 1))


def test_the_clean_picture_is_sharpened_where_the_ranges_say_so(pairs: list[Pair]) -> None:
    sharp, plain = make_pairs(1, 32, REAL_ESRGAN)[0].clean, pairs[0].clean
    assert not torch.equal(sharp, plain)
    assert sharp.diff(dim=-1).abs().sum() > plain.diff(dim=-1).abs().sum()


@pytest.mark.parametrize(("count", "size"), [(0, 32), (1, 30), (1, 0)])
def test_pairs_need_a_number_and_a_multiple_of_4(count: int, size: int) -> None:
    with pytest.raises(ValueError, match=f"{count} pairs of {size} pixels.*multiple of 4"):
        make_pairs(count, size)


def test_bicubic_keeps_a_flat_colour_and_stays_in_range() -> None:
    flat = torch.tensor([0.0, 0.2, 1.0]).view(1, 3, 1, 1).expand(1, 3, 5, 7)
    torch.testing.assert_close(bicubic(flat, [""], 0), (flat * 2 - 1)[..., :1, :1].expand(1, 3, 20, 28))
    step = (torch.arange(8) > 3).float().expand(1, 3, 8, 8)
    assert bicubic(step, [""], 0).abs().max() == 1


def test_the_upscaler_works_in_its_own_range() -> None:
    method = upscaler_method(pixel_pipeline(upscaler=Doubled()))
    low = torch.full((2, 3, 4, 4), 0.4)
    with torch.no_grad():
        torch.testing.assert_close(method(low, ["", ""], 0), torch.full((2, 3, 16, 16), 0.6))


def test_features_are_the_clips_own_in_order() -> None:
    pipe = pixel_pipeline(clip=Corners(), clip_size=8, clip_mean=(0.5, 0.5, 0.5), clip_std=(0.5, 0.5, 0.5))
    colours = torch.rand(20, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    images = colours[..., None, None].expand(20, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(clip_features(pipe)(images), colours, atol=1e-5, rtol=0)


def test_a_method_that_knows_the_answer_is_perfect(pairs: list[Pair]) -> None:
    results = measure({"clean": moved(pairs, 0.4)}, pairs, plain_features, quiet=True)  # 0.4 rounds away
    assert list(results["clean"]) == NAMES == [metric.name for metric in METRICS]
    for name, ideal in zip(NAMES, (math.inf, 1, 0, 0), strict=True):
        assert results["clean"][name] == pytest.approx([ideal] * 18, abs=1e-6), name


def test_ssim_is_that_of_luma_and_of_8_bits(pairs: list[Pair]) -> None:
    pair = pairs[0]
    results = measure({"bicubic": bicubic}, [pair], plain_features, quiet=True)
    expected = ssim(to_8_bits(bicubic(pair.low, [""], 0)), pair.clean, luma=True)
    assert results["bicubic"]["SSIM"] == pytest.approx(expected.tolist(), abs=1e-9)


def test_one_level_off_is_48_db_and_a_turned_feature_its_cosine(pairs: list[Pair]) -> None:
    def features(images: Tensor) -> Tensor:
        return torch.tensor([[1.0, 0.0]] * 18 if torch.equal(images, clean) else [[3.0, 4.0]] * 18)

    clean = torch.cat([pair.clean for pair in pairs])
    results = measure({"off": moved(pairs, 1)}, pairs, features, quiet=True)["off"]
    assert results["PSNR"] == pytest.approx([20 * math.log10(255)] * 18, abs=1e-3)
    assert results["feature distance"] == pytest.approx([1 - 0.6] * 18, abs=1e-6)


def test_methods_are_given_captions_and_the_seed_of_their_first_picture(pairs: list[Pair]) -> None:
    seen: list[tuple[int, int]] = []

    def spy(low: Tensor, captions: list[str], first_seed: int) -> Tensor:
        assert captions == [pair.caption for pair in pairs[first_seed : first_seed + len(low)]]
        assert torch.equal(low[-1:], pairs[first_seed + len(low) - 1].low)
        seen.append((first_seed, len(low)))
        return bicubic(low, captions, first_seed)

    results = measure({"spy": spy, "bicubic": bicubic}, pairs, plain_features, quiet=True)
    assert seen == [(0, 16), (16, 2)]
    assert results["spy"] == results["bicubic"]


def test_what_is_worse_is_worse_by_every_measure(pairs: list[Pair]) -> None:
    def blurred(low: Tensor, captions: list[str], first_seed: int) -> Tensor:
        return F.avg_pool2d(bicubic(low, captions, 0), 9, 1, 4, count_include_pad=False)

    results = measure({"bicubic": bicubic, "blurred": blurred}, pairs, plain_features, quiet=True)
    for metric in METRICS:
        better, worse = (sum(results[name][metric.name]) for name in ("bicubic", "blurred"))
        assert better > worse if metric.larger_is_better else better < worse, metric


RESULTS = {
    "bicubic": {name: [1.0, 2.0, 3.0] for name in NAMES},
    "other": {
        "PSNR": [2.0, 3.0, 4.0],
        "SSIM": [1.0, 2.0, 3.0],
        "GMSD": [0.5, 1.5, 2.5],
        "feature distance": [0.0, 2.0, 4.0],
    },
}


def test_differences_are_paired_and_the_baseline_has_none() -> None:
    assert paired(RESULTS, "bicubic") == {
        "other": {
            "PSNR": [1, 1, 1],
            "SSIM": [0, 0, 0],
            "GMSD": [-0.5, -0.5, -0.5],
            "feature distance": [-1, 0, 1],
        }
    }
    assert list(paired(RESULTS, "other")) == ["bicubic"]
    with pytest.raises(ValueError, match="'nothing'; there are some of bicubic, other"):
        paired(RESULTS, "nothing")


def test_the_table_has_both_parts_and_a_star_where_zero_is_left_out() -> None:
    many = {method: {name: values * 3 for name, values in row.items()} for method, row in RESULTS.items()}
    lines = restore_table(many).splitlines()
    assert "PSNR, dB (up)" in lines[0] and "GMSD (down)" in lines[0]
    assert lines[2].split()[:3] == ["bicubic", "9", "2.00"]
    assert lines[5].startswith("less bicubic, paired")
    assert lines[7].split()[:2] == ["other", "9"]
    assert "+1.00 (+1.00 .. +1.00) *" in lines[7] and "-0.5000 (-0.5000 .. -0.5000) *" in lines[7]
    assert lines[7].count("*") == 2
    assert "*" not in restore_table(RESULTS).splitlines()[7]  # three scenes say nothing
    assert "less" not in restore_table({"bicubic": RESULTS["bicubic"]})


def test_results_and_figures_go_through_json(tmp_path: Path) -> None:
    write_json(tmp_path / "r.json", restore_figures(RESULTS), results=RESULTS)
    stored = json.loads((tmp_path / "r.json").read_text())
    assert stored["results"] == RESULTS
    figures = {figure["name"]: figure for figure in stored["figures"]}
    assert len(figures) == 12
    assert figures["other, PSNR"]["value"] == 3 and figures["other, PSNR"]["unit"] == "dB"
    assert figures["other less bicubic, GMSD"]["high"] == -0.5


def test_sheets_show_low_methods_and_clean(pairs: list[Pair], tmp_path: Path) -> None:
    made = torch.full((10, 3, 32, 32), -1.0)
    write_rows(tmp_path, pairs[:10], {"black": made})
    first, second = (load_image(tmp_path / f"restored {i}.png").image for i in (1, 2))
    assert first.shape[-2:] == (8 * 38, 3 * 38) and second.shape[-2:] == (2 * 38, 3 * 38)
    low, black, clean = (second[..., 41:73, 38 * i + 3 : 38 * i + 35] for i in range(3))  # of the last pair
    torch.testing.assert_close(low[..., ::4, ::4], pairs[9].low * 2 - 1, atol=1e-3, rtol=0)
    assert (black == -1).all()
    torch.testing.assert_close(clean, pairs[9].clean, atol=1e-3, rtol=0)
