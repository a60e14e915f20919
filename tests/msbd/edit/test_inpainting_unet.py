"""Inpainting U-Nets, of nine channels, as a model of edit: what they get, in every stage and tile."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from msbd.edit.config import EditConfig
from msbd.load import load_edit_pipeline, load_restore_pipeline
from msbd.loading.parts import load_net
from nets.unet import UNet
from tests.helpers.tiny_bundle import (
    TRAINING,
    write_ldm_file,
    write_part,
    write_pasd_folder,
    write_tiny_bundle,
)
from tools.edit import main as edit
from tools.models.__main__ import main as models
from tools.restore.__main__ import main as restore
from weights.files import WeightsError

QUICK = EditConfig(
    num_steps=3, repaint_steps=0, first_stage_batch=2, decoder_optimization=False, guidance_scale=3.0
)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A tiny model; the same with five further channels of weight 0; and with channels that act."""
    made = []
    for name, weight in (("plain", None), ("deaf", 0.0), ("seeing", 0.5)):
        torch.manual_seed(0)
        folder = write_tiny_bundle(tmp_path_factory.mktemp(name))
        if weight is not None:
            four = load_net(made[0] / "unet.safetensors")
            nine = UNet(replace(four.config, in_channels=9))
            state = four.state_dict()
            first = state["conv_in.weight"]
            more = weight * torch.randn(len(first), 5, 3, 3, generator=torch.Generator().manual_seed(1))
            nine.load_state_dict(state | {"conv_in.weight": torch.cat([first, more], 1)})
            write_part(folder, "unet", nine, **TRAINING)
        made.append(folder)
    return made[0], made[1], made[2]


def inputs() -> tuple[Tensor, Tensor]:
    image = torch.rand(1, 3, 96, 112, generator=torch.Generator().manual_seed(2)) * 2 - 1
    mask = torch.zeros(1, 1, 96, 112)
    mask[..., 20:80, 24:90] = 1
    return image, mask


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tiles": "joint"},
        {"method": "segments"},
        {"method": "naive"},
        {"dilate_mask": False},
        {"repaint_steps": 1},
    ],
)
def test_channels_of_weight_0_change_nothing(
    options: dict[str, Any], bundles: tuple[Path, Path, Path]
) -> None:
    """As the original's training began: in all stages and tiles it is the model without them."""
    image, mask = inputs()
    config = replace(QUICK, **options)
    plain, deaf, seeing = (
        load_edit_pipeline(folder)(image, mask, "a red house", config=config).image for folder in bundles
    )
    torch.testing.assert_close(deaf, plain, rtol=1e-4, atol=1e-4)
    assert (seeing - plain).abs().max() > 0.01
    assert torch.equal(seeing * (1 - mask), image * (1 - mask))


def test_the_net_gets_mask_and_masked_latent_of_each_window(bundles: tuple[Path, Path, Path]) -> None:
    """The mask by the nearest pixel of each cell, the encoded picture with grey in its place."""
    image, mask = inputs()
    pipeline = load_edit_pipeline(bundles[2])
    seen: list[Tensor] = []
    forward = pipeline.unet.forward

    def recorded(x: Tensor, *more: Any, **options: Any) -> Tensor:
        seen.append(x.clone())
        return forward(x, *more, **options)

    pipeline.unet.forward = recorded
    pictures: dict[str, Tensor] = {}
    pipeline(image, mask, "a red house", config=QUICK, on_picture=pictures.__setitem__)
    first = seen[0]
    source = pictures["first stage, source"]
    hole = (pictures["first stage, mask"][:, :1] > 0).float()
    cells = first.shape[-2:]
    scale = pipeline.vae.config.scaling_factor
    hidden = pipeline.vae.encode(source * (1 - hole)).mode() * scale
    assert first.shape[:2] == (4, 9)  # two candidates, each with the negative prompt and the prompt
    for one in first:
        assert torch.equal(one[4:5], F.interpolate(hole, size=cells, mode="nearest")[0])
        torch.testing.assert_close(one[5:], hidden[0], rtol=1e-4, atol=1e-4)
    assert all(x.shape[1] == 9 and set(x[:, 4].unique().tolist()) <= {0.0, 1.0} for x in seen)


def test_through_the_commands(
    bundles: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, mask = inputs()
    Image.fromarray(((image[0] + 1) * 127.5).byte().permute(1, 2, 0).numpy()).save(tmp_path / "in.png")
    Image.fromarray((mask[0, 0] * 255).byte().numpy()).save(tmp_path / "mask.png")
    files = [
        "-i",
        str(tmp_path / "in.png"),
        "-m",
        str(tmp_path / "mask.png"),
        "-p",
        "a red house",
        "--device",
        "cpu",
    ]
    quick = [
        "--steps",
        "2",
        "--repaint-steps",
        "0",
        "--first-stage-batch",
        "1",
        "--no-decoder-optimization",
        "--upscaling-mode",
        "bilinear",
    ]
    assert models(["keys", str(bundles[2] / "unet.safetensors")]) == 0
    assert "in_channels=9" in capsys.readouterr().out
    single = write_ldm_file(bundles[2], tmp_path / "inpainting.safetensors")
    assert models(["convert", str(single), "-o", str(tmp_path / "folder"), "--in-process"]) == 0
    results = []
    for number, model in enumerate((bundles[2], tmp_path / "folder")):
        out = tmp_path / f"{number}.png"
        if not (model / "tokenizer.json").exists():
            (model / "tokenizer.json").write_bytes((bundles[2] / "tokenizer.json").read_bytes())
        assert edit(["--model", str(model), "-o", str(out), *files, *quick]) == 0, capsys.readouterr().err
        results.append(np.asarray(Image.open(out)).astype(int))
    assert np.abs(results[0] - results[1]).max() <= 1
    Image.fromarray(np.full((16, 16, 3), 90, np.uint8)).save(tmp_path / "small.png")
    for more in (
        ["--model", str(write_pasd_folder(tmp_path / "pasd")), "--base", str(bundles[2])],
        ["--model", str(bundles[2]), "--method", "img2img"],
    ):
        assert (
            restore(
                [*more, "-i", str(tmp_path / "small.png"), "-o", str(tmp_path / "r.png"), "--device", "cpu"]
            )
            == 1
        )
        assert "tools.edit runs it" in capsys.readouterr().err


@pytest.mark.parametrize(
    "channels, message", [(6, "latent channels in 6"), (8, "instruct-pix2pix"), (10, "latent channels in 10")]
)
def test_other_numbers_of_channels_are_refused(
    channels: int, message: str, bundles: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    folder = write_tiny_bundle(tmp_path / "bundle")
    write_part(
        folder, "unet", UNet(replace(load_net(bundles[0] / "unet.safetensors").config, in_channels=channels))
    )
    with pytest.raises(WeightsError, match=message) as caught:
        load_edit_pipeline(folder)
    assert "\n" not in str(caught.value)
    with pytest.raises(WeightsError, match="inpainting U-Net"):
        load_restore_pipeline(bundles[2], method="img2img")
