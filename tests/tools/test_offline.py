"""A model by its name, out of a filled Hugging Face cache, edits a picture without one network call."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nets.clip import CLIPTextConfig, CLIPTextModel
from nets.unet import UNet, UNetConfig
from nets.vae import AutoencoderKL, VAEConfig
from tests.helpers.fake_hub import cache, empty_machine
from tests.helpers.tiny_bundle import VOCABULARY
from tools.edit import main as edit
from tools.models.__main__ import main as models
from weights.files import write_safetensors
from weights.registry import MODELS
from weights.tokenizer import train_tokenizer

# Tiny, with Stable Diffusion's groups and heads.
NETS = {
    "unet": lambda: UNet(
        UNetConfig(
            block_out_channels=(32, 32),
            layers_per_block=1,
            cross_attention_dim=16,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )
    ),
    "vae": lambda: AutoencoderKL(VAEConfig(block_out_channels=(32, 32, 32, 32), layers_per_block=1)),
    "text_encoder": lambda: CLIPTextModel(
        CLIPTextConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=1,
            vocab_size=VOCABULARY,
        )
    ),
}


@pytest.fixture
def filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine whose only weights are those of sd-v1-5-diffusers, in the cache,
    and on which a socket fails the test.
    """
    empty_machine(tmp_path, monkeypatch, sockets=False)
    torch.manual_seed(0)
    for part, net in NETS.items():
        write_safetensors(tmp_path / part, {key: value.half() for key, value in net().state_dict().items()})
    train_tokenizer(["a red house on snow at night"], VOCABULARY).model.save(str(tmp_path))
    (tmp_path / "tokenizer").write_bytes((tmp_path / "vocab.json").read_bytes())
    (tmp_path / "tokenizer_merges").write_bytes((tmp_path / "merges.txt").read_bytes())
    (tmp_path / "scheduler").write_text(json.dumps({"beta_start": 0.00085, "prediction_type": "epsilon"}))
    for file in MODELS["sd-v1-5-diffusers"].files:
        cache(file, (tmp_path / file.part).read_bytes())
    return tmp_path


def test_an_edit_by_name(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (96, 80), (90, 120, 60)).save(filled / "in.png")
    mask = np.zeros((80, 96), np.uint8)
    mask[20:60, 30:70] = 255
    Image.fromarray(mask).save(filled / "mask.png")
    quick = ["--steps", "2", "--repaint-steps", "0", "--no-decoder-optimization", "--first-stage-batch", "2"]
    argv = ["-i", filled / "in.png", "-m", filled / "mask.png", "-o", filled / "out.png", "-p", "a red house"]
    assert edit([*map(str, argv), "--model", "sd-v1-5-diffusers", *quick, "--device", "cpu"]) == 0
    assert "no CLIP with this model: the first of 2 candidates was taken" in capsys.readouterr().err
    result = np.asarray(Image.open(filled / "out.png"))
    assert (result[mask == 0] == (90, 120, 60)).all() and (result[mask > 0] != (90, 120, 60)).any()


def test_fetch_and_verify_of_what_is_there(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # The registry of an `empty_machine` knows no hash, so the cache's, which the hub stated, are what counts.
    assert models(["verify", "sd-v1-5-diffusers"]) == 0
    text = capsys.readouterr().out
    assert text.count("wrong file") == 0 and text.count(": ok") == 6
    assert models(["list"]) == 0
    assert "sd-v1-5-diffusers" in capsys.readouterr().out
