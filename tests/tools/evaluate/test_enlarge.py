"""`python -m tools.evaluate enlarge`: the measures, the tables, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from msbd.pixels.metrics import psnr
from nets.rrdb import RRDBConfig, RRDBNet
from tests.helpers.tiny_bundle import write_tiny_bundle
from tools.evaluate.__main__ import main
from tools.evaluate.enlarge import (
    enlarge_table,
    enlarged_strips,
    measure,
    middle,
    scikit_photographs,
    seam,
    whole_quarters,
)


@pytest.fixture(scope="module")
def upscaler(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_bundle(tmp_path_factory.mktemp("bundle")) / "rrdb.safetensors")


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 67, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_the_table_has_every_method_and_its_files_are_written(
    photo: Path, upscaler: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, report = tmp_path / "pictures", tmp_path / "report.json"
    words = ["enlarge", "-i", str(photo), "--upscalers", upscaler, "--steps", "1", "--device", "cpu"]
    assert main([*words, "--pictures", str(folder), "--json", str(report)]) == 0
    table = capsys.readouterr().out
    methods = ["truth", "bicubic", "mini, RRDB", "mini, PASD, fidelity 1", "rrdb.safetensors"]
    assert all(table.count(name) >= 2 for name in methods)  # the mean, and the picture's
    found = json.loads(report.read_text())
    values = found["results"][str(photo)]
    assert list(values) == methods and "PSNR-Y, dB" not in values["truth"]
    assert values["truth"]["SSIM-Y"] == 1 and found["settings"]["model"] == "mini"
    assert {path.name for path in folder.iterdir()} == {
        "photo.png",
        *(f"photo, {name}.png" for name in methods),
    }
    with Image.open(folder / "photo, truth.png") as truth, Image.open(photo) as source:
        assert truth.size == (64, 48) and np.array_equal(np.array(truth), np.array(source)[:48, :64])


def test_the_rim_does_not_count() -> None:
    truth = torch.rand(1, 3, 40, 40) * 2 - 1
    other = truth.clone()
    other[..., :4, :] = 0
    assert measure(other, truth) == measure(truth, truth)  # no PSNR, which would be infinite
    other[..., 10, 10] += 0.1
    inside = (one[..., 4:-4, 4:-4] for one in (other, truth))
    assert measure(other, truth)["PSNR-Y, dB"] == pytest.approx(psnr(*inside, luma=True).item())


def test_a_means_line_comes_first() -> None:
    rows = {"a.png": {"bicubic": {"GMSD": 0.1, "s": 1.0}}, "b.png": {"bicubic": {"GMSD": 0.3, "s": 2.0}}}
    lines = enlarge_table(rows).splitlines()[2:]
    assert [line.split() for line in lines] == [
        ["mean", "bicubic", "0.200", "1.5"], ["a.png", "bicubic", "0.100", "1.0"], ["b.png", "bicubic", "0.300", "2.0"]
    ]  # fmt: skip


def test_seams_vanish_where_a_piece_sees_all_that_the_net_does() -> None:
    torch.manual_seed(1)
    net = RRDBNet(RRDBConfig(num_feat=8, num_block=1, num_grow_ch=4)).eval()
    strip = torch.rand(1, 3, 24, 80) * 2 - 1
    whole, *pictures = enlarged_strips(net, strip, [0, 36])
    (near, most, _), (_, none, step) = (seam(one, whole) for one in pictures)
    assert near > 0 and most > 10 * none and none < 1e-2 and step == pytest.approx(1, abs=1e-3)


def test_the_table_of_seams(
    photo: Path, upscaler: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["enlarge", "-i", str(photo), "--upscalers", upscaler, "--seams", "4", "24", "--device", "cpu"]
    assert main([*words, "--json", str(tmp_path / "seams.json"), "--pictures", str(tmp_path / "strips")]) == 0
    assert len(list((tmp_path / "strips").iterdir())) == 4  # whole, two contexts, and all in a row
    rows = json.loads((tmp_path / "seams.json").read_text())["results"]
    assert [row["context"] for row in rows] == [4, 24] and rows[1]["most"] < rows[0]["most"]
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_the_photographs_of_scikit_image_are_found_and_cut_to_whole_quarters() -> None:
    assert all(path.is_file() for path in scikit_photographs())
    assert whole_quarters(torch.zeros(1, 3, 51, 66)).shape == (1, 3, 48, 64)
    assert middle(torch.zeros(1, 3, 51, 66), (48, 160)).shape == (1, 3, 48, 66)
