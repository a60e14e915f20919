"""Upscalers of every kind through the commands: keys, convert, a restoration and an edit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from msbd.loading.parts import load_net
from nets.rrdb import RRDBConfig, RRDBNet
from nets.srvgg import SRVGGConfig, SRVGGNet
from tests.helpers.tiny_bundle import write_tiny_bundle
from tools.edit import main as edit
from tools.models.__main__ import main as models
from tools.restore.__main__ import main as restore
from weights.files import write_safetensors

SMALL: dict[str, Any] = {"num_feat": 8, "num_block": 1, "num_grow_ch": 4}
NETS: dict[str, RRDBNet | SRVGGNet] = {
    "x1": RRDBNet(RRDBConfig(**SMALL, scale=1, unshuffle=1)),
    "x2 by one conv_up": RRDBNet(RRDBConfig(**SMALL, scale=2, unshuffle=1)),
    "x8": RRDBNet(RRDBConfig(**SMALL, scale=8)),
    "x16": RRDBNet(RRDBConfig(**SMALL, scale=16)),
    "plus": RRDBNet(RRDBConfig(**SMALL, plus=True)),
    "grey": RRDBNet(RRDBConfig(**SMALL, num_in_ch=1, num_out_ch=1)),
    "grey to RGB": RRDBNet(RRDBConfig(**SMALL, num_in_ch=1)),
    "with transparency": RRDBNet(RRDBConfig(**SMALL, num_in_ch=4, num_out_ch=4)),
    "small net": SRVGGNet(SRVGGConfig(num_feat=8, num_conv=2, upscale=4)),
}


def write_net(path: Path, name: str) -> Path:
    state = NETS[name].state_dict()
    middle = {key: torch.full_like(bias, 0.4) for key, bias in state.items() if key == "conv_last.bias"}
    write_safetensors(path, state | middle)
    return path


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    levels = np.random.default_rng(0).integers(0, 256, (10, 14, 3), dtype=np.uint8)
    Image.fromarray(levels).save(tmp_path / "in.png")
    return tmp_path / "in.png"


@pytest.mark.parametrize("name", NETS)
def test_each_upscaler_through_the_commands(
    name: str, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net, out = write_net(tmp_path / "net.safetensors", name), tmp_path / "out.png"
    assert models(["keys", str(net)]) == 0
    assert type(NETS[name].config).__name__ in capsys.readouterr().out
    again = tmp_path / "again.safetensors"
    assert models(["convert", str(net), "-o", str(again), "--in-process"]) == 0
    assert load_net(again).config == NETS[name].config
    assert (
        restore(
            ["--model", str(again), "-i", str(picture), "-o", str(out), "--scale", "3", "--device", "cpu"]
        )
        == 0
    )
    with Image.open(out) as made:
        assert made.size == (42, 30)
    told = capsys.readouterr().err
    scale = NETS[name].config.scale
    assert (f"the net enlarges {scale} times, the rest is bilinear" in told) == (scale < 3)


def test_a_grey_net_keeps_colours_and_greys(picture: Path, tmp_path: Path) -> None:
    net, out = write_net(tmp_path / "net.safetensors", "grey"), tmp_path / "out.png"
    flat = np.zeros((12, 12, 3), np.uint8) + np.array([200, 60, 40], np.uint8)
    Image.fromarray(flat).save(picture)
    assert restore(["--model", str(net), "-i", str(picture), "-o", str(out), "--device", "cpu"]) == 0
    made = np.asarray(Image.open(out)).astype(int)
    assert abs((made[..., 0] - made[..., 1]).mean() - 140) < 5
    Image.fromarray(flat[..., 0]).save(picture)
    assert restore(["--model", str(net), "-i", str(picture), "-o", str(out), "--device", "cpu"]) == 0
    made = np.asarray(Image.open(out).convert("RGB")).astype(int)
    assert (made.max(-1) == made.min(-1)).all()


@pytest.mark.parametrize("name", ["x2 by one conv_up", "small net", "grey"])
def test_an_edit_enlarges_with_it(name: str, tmp_path: Path) -> None:
    bundle, net = write_tiny_bundle(tmp_path / "bundle"), write_net(tmp_path / "net.safetensors", name)
    levels = np.random.default_rng(0).integers(0, 256, (80, 96, 3), dtype=np.uint8)
    Image.fromarray(levels).save(tmp_path / "in.png")
    mask = np.zeros((80, 96), np.uint8)
    mask[10:70, 15:80] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    files = [
        "-i",
        str(tmp_path / "in.png"),
        "-m",
        str(tmp_path / "mask.png"),
        "-o",
        str(tmp_path / "out.png"),
    ]
    quick = [
        "--steps",
        "2",
        "--repaint-steps",
        "0",
        "--first-stage-batch",
        "1",
        "--no-decoder-optimization",
        "--device",
        "cpu",
    ]
    assert edit(["--model", str(bundle), "--upscaler", str(net), *files, "-p", "a red house", *quick]) == 0
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.size == (96, 80)
