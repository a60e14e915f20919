"""TAESD: diffusers' AutoencoderTiny, its authors' names, and its place in the pipelines."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from msbd.loading.parts import load_net
from nets.taesd import AutoencoderTiny, TinyVAEConfig
from tests.helpers.goldens import relative_error
from tests.helpers.tiny_bundle import write_pasd_folder, write_tiny_bundle
from tools.edit import main as edit
from tools.models.__main__ import main as models
from tools.restore.__main__ import main as restore
from weights.files import WeightsError, write_safetensors
from weights.taesd import half_of, taesd_map

SMALL = TinyVAEConfig(width=8, encoder_blocks=(1, 2, 1, 1), decoder_blocks=(1, 1, 2, 1))
State = dict[str, Tensor]


def tiny(config: TinyVAEConfig = SMALL) -> AutoencoderTiny:
    torch.manual_seed(3)
    return AutoencoderTiny(config).eval().requires_grad_(False)


def halves(state: State) -> tuple[State, State]:
    """The authors' two files: numbers of a Sequential, the decoder's one higher."""
    encoder = {k.removeprefix("encoder.layers."): v for k, v in state.items() if k.startswith("encoder.")}
    decoder = {}
    for key, value in state.items():
        if key.startswith("decoder."):
            number, _, rest = key.removeprefix("decoder.layers.").partition(".")
            decoder[f"{int(number) + 1}.{rest}"] = value
    return encoder, decoder


@pytest.mark.parametrize("config", [TinyVAEConfig(), SMALL], ids=["official sizes", "small"])
def test_it_is_diffusers_autoencoder_tiny(config: TinyVAEConfig) -> None:
    diffusers = pytest.importorskip("diffusers")
    widths = (config.width,) * 4
    theirs = diffusers.AutoencoderTiny(
        encoder_block_out_channels=widths, decoder_block_out_channels=widths,
        num_encoder_blocks=config.encoder_blocks, num_decoder_blocks=config.decoder_blocks,
    ).eval()  # fmt: skip
    ours = tiny(config)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    image = torch.rand(1, 3, 24, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    latent = 3 * torch.randn(2, 4, 3, 4, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert relative_error(ours.encode(image).mode(), theirs.encode(image).latents) < 1e-6
        assert relative_error(ours.decode(latent), theirs.decode(latent).sample) < 1e-6
    assert ours.downscale == 8


def write(folder: Path, form: str, state: State) -> Path:
    """`state` in one of its layouts; the file to name."""
    encoder, decoder = halves(state)
    both = {f"encoder.{k}": v for k, v in encoder.items()} | {f"decoder.{k}": v for k, v in decoder.items()}
    files = {
        "diffusers": {"vae.safetensors": state},
        "one file": {"taesd.safetensors": both},
        "encoder": {"taesd_encoder.safetensors": encoder, "taesd_decoder.safetensors": decoder},
        "decoder": {"taesd_decoder.safetensors": decoder, "taesd_encoder.safetensors": encoder},
        "pickles": {"taesd_decoder.pth": decoder, "taesd_encoder.pth": encoder},
    }[form]
    for name, tensors in files.items():
        torch.save(tensors, folder / name) if name.endswith(".pth") else write_safetensors(
            folder / name, tensors
        )
    return folder / next(iter(files))


@pytest.mark.parametrize("form", ["diffusers", "one file", "encoder", "decoder", "pickles"])
def test_every_layout_loads_and_converts(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net = tiny()
    path = write(tmp_path, form, net.state_dict())
    assert models(["keys", str(path)]) == 0
    assert "TinyVAEConfig(" in capsys.readouterr().out
    assert models(["convert", str(path), "-o", str(tmp_path / "again.safetensors"), "--in-process"]) == 0
    for file in (path, tmp_path / "again.safetensors"):
        read = load_net(file)
        assert read.config == net.config
        assert all(torch.equal(value, net.state_dict()[key]) for key, value in read.state_dict().items())


def test_names() -> None:
    encoder, decoder = halves(tiny().state_dict())
    assert half_of(encoder) == "encoder" and half_of(decoder) == "decoder"
    assert half_of({}) is half_of(tiny().state_dict()) is half_of({"0.weight": 1, "x": 1}) is None
    assert taesd_map(tiny().state_dict()) is taesd_map(encoder) is None


HOSTILE: dict[str, tuple[Any, str]] = {
    "the encoder alone": (lambda encoder, decoder: {"taesd_encoder.safetensors": encoder}, "the encoder of TAESD alone; put taesd_decoder.safetensors beside it"),
    "two encoders": (lambda encoder, decoder: {"taesd_encoder.safetensors": encoder, "taesd_decoder.safetensors": encoder}, "not its other half"),
    "a convolution missing": (lambda encoder, decoder: {"taesd_encoder.safetensors": {k: v for k, v in encoder.items() if k != "1.conv.2.weight"}, "taesd_decoder.safetensors": decoder}, "1 tensors are missing"),
    "unlike halves": (lambda encoder, decoder: {"taesd_encoder.safetensors": encoder, "taesd_decoder.safetensors": decoder | {"1.weight": torch.ones(9, 4, 3, 3)}}, "has shape"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_what_is_not_whole_is_refused_in_a_line(case: str, tmp_path: Path) -> None:
    make, message = HOSTILE[case]
    for name, state in make(*halves(tiny().state_dict())).items():
        write_safetensors(tmp_path / name, state)
    with pytest.raises(WeightsError, match=message) as caught:
        load_net(tmp_path / "taesd_encoder.safetensors")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_an_edit_and_a_restoration_by_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = write_tiny_bundle(tmp_path / "bundle")
    down = load_net(bundle / "vae.safetensors")
    levels = (1,) * len(down.config.block_out_channels)
    config = TinyVAEConfig(
        width=8, latent_channels=down.config.latent_channels, encoder_blocks=levels, decoder_blocks=levels
    )
    write_safetensors(tmp_path / "taesd.safetensors", tiny(config).state_dict())
    Image.fromarray(np.full((64, 64, 3), 90, np.uint8)).save(tmp_path / "in.png")
    Image.fromarray(np.pad(np.full((32, 32), 255, np.uint8), 16)).save(tmp_path / "mask.png")
    files = [
        "-i",
        str(tmp_path / "in.png"),
        "-o",
        str(tmp_path / "out.png"),
        "--device",
        "cpu",
        "--vae",
        str(tmp_path / "taesd.safetensors"),
    ]
    quick = [
        "-m",
        str(tmp_path / "mask.png"),
        "-p",
        "a red house",
        "--steps",
        "2",
        "--repaint-steps",
        "0",
        "--first-stage-batch",
        "1",
    ]
    for seam in ("membrane", "adam", "none"):
        assert edit(["--model", str(bundle), *files, *quick, "--seam", seam, "--decoderopt-steps", "2"]) == 0
    capsys.readouterr()
    assert edit(["--model", str(bundle), *files, *quick, "--seam", "closed-form"]) == 1
    assert "this autoencoder is another: take another seam" in capsys.readouterr().err
    pasd = write_pasd_folder(tmp_path / "pasd")
    Image.fromarray(np.full((16, 16, 3), 90, np.uint8)).save(tmp_path / "in.png")
    assert restore(["--model", str(pasd), "--base", str(bundle), *files, "--scale", "2", "--steps", "2"]) == 0
