"""LoRAs of every kind through the commands: keys, convert, merging into a model, an edit; and what is left
out is told.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from msbd.load import load_edit_pipeline
from msbd.loading.nets import read_lora_file
from msbd.loading.parts import load_net
from tests.helpers.tiny_bundle import write_tiny_bundle
from tools.edit import main as edit
from tools.models.__main__ import main as models
from weights.files import read_state_dict, write_safetensors
from weights.ldm import map_to
from weights.lora import merge_loras

CONV = "down_blocks.0.resnets.0.conv1"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle"))


def kinds(weights: dict[str, Tensor]) -> dict[str, tuple[dict[str, Tensor], str]]:
    """Name -> a file that changes one convolution, and how `keys` calls it."""
    out, inner, height, width = weights[f"{CONV}.weight"].shape
    name, small = f"lora_unet_{CONV.replace('.', '_')}", torch.Generator().manual_seed(1)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=small) / 4

    up, down = numbers(out, 2, 1, 1), numbers(2, inner, height, width)
    pair = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
    theirs = map_to("unet", weights).back([CONV]).renamed[CONV].replace(".", "_")
    flat = inner * height * width
    return {
        "LoRA": (pair, "1 layer of the U-Net, rank 2"),
        "LDM names": ({key.replace(name, f"lora_unet_{theirs}"): value for key, value in pair.items()}, "1 layer of the U-Net, rank 2"),
        "DoRA": (pair | {f"{name}.dora_scale": numbers(out, 1, 1, 1).abs() + 1}, "DoRA: 1 layer"),
        "LoHa": (
            {f"{name}.hada_w{n}_{end}": numbers(*shape) for n in (1, 2) for end, shape in (("a", (out, 2)), ("b", (2, flat)))},
            "LoHa: 1 layer",
        ),
        "LoKr": ({f"{name}.lokr_w1": numbers(2, 2), f"{name}.lokr_w2": numbers(out // 2, inner // 2, height, width)}, "LoKr: 1 layer"),
        "whole": ({f"{name}.diff": numbers(out, inner, height, width), f"{name}.diff_b": numbers(out)}, "whole difference: 1 layer"),
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["LoRA", "LDM names", "DoRA", "LoHa", "LoKr", "whole"])
def test_each_kind_through_the_commands(
    kind: str, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = load_net(bundle / "unet.safetensors").state_dict()
    state, called = kinds(before)[kind]
    file, copy = tmp_path / "lora.safetensors", tmp_path / "copy.safetensors"
    write_safetensors(file, state)
    assert models(["keys", str(file)]) == 0
    assert called in capsys.readouterr().out
    assert models(["convert", str(file), "-o", str(copy), "--in-process"]) == 0
    assert read_state_dict(copy).keys() == state.keys()
    wanted = before | merge_loras({"unet": before}, [(read_lora_file(copy), 0.5)])["unet"]
    command = ["convert", str(bundle), "-o", str(tmp_path / "unet.safetensors"), "--part", "unet"]
    assert models([*command, "--in-process", "--lora", f"{file}:0.5"]) == 0
    merged = load_net(tmp_path / "unet.safetensors").state_dict()
    loaded = load_edit_pipeline(bundle, loras=[(file, 0.5)]).unet.state_dict()
    for key, value in wanted.items():
        assert torch.equal(merged[key], value) and torch.equal(loaded[key], value.float())
    assert not torch.equal(merged[f"{CONV}.weight"], before[f"{CONV}.weight"])


def test_an_edit_tells_what_it_leaves_out_of_a_lora(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An embedding, a module of another net, and one that this U-Net has not."""
    state, _ = kinds(load_net(bundle / "unet.safetensors").state_dict())["LoHa"]
    state["bundle_emb.cat.string_to_param"] = torch.ones(2, 16)
    state["lora_vae_x.lora_up.weight"] = torch.ones(2, 2)
    state |= {f"lora_unet_down_blocks_9_x.lora_{role}.weight": torch.ones(2, 2) for role in ("up", "down")}
    write_safetensors(tmp_path / "lora.safetensors", state)
    Image.fromarray(np.full((64, 64, 3), 90, np.uint8)).save(tmp_path / "in.png")
    Image.fromarray(np.pad(np.full((32, 32), 255, np.uint8), 16)).save(tmp_path / "mask.png")
    command = [
        "--model",
        str(bundle),
        "-i",
        str(tmp_path / "in.png"),
        "-m",
        str(tmp_path / "mask.png"),
        "-p",
        "a red house",
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
    out = tmp_path / "out.png"
    assert edit([*command, *quick, "-o", str(out), "--lora", f"{tmp_path / 'lora.safetensors'}:0.5"]) == 0
    told = capsys.readouterr().err
    for line in (
        "lora.safetensors: 1 of 3 modules left out, of no net here; first 'lora_vae_x'",
        "lora.safetensors: 1 bundled embedding left out ('cat')",
        "lora.safetensors: 1 of 2 modules left out, which the base has not; first 'down_blocks_9_x' of the U-Net",
    ):
        assert told.count(line) == 1, told
    with Image.open(out) as picture:
        assert "down_blocks_9_x" in json.loads(picture.info["msbd"])["notes"]
    assert edit([*command, *quick, "-o", str(out), "--lora", "C:\\loras\\x.safetensors"]) == 1
    assert "C:\\loras\\x.safetensors: no such file" in capsys.readouterr().err
