"""A U-Net that was distilled with its guidance (full LCM models): diffusers' net and embedding, and the
pipelines, which ask it once.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from msbd.edit.config import EditConfig
from msbd.load import load_edit_pipeline
from msbd.loading.parts import load_net
from nets.unet import UNet, UNetConfig, guidance_embedding
from tests.helpers.goldens import relative_error
from tests.helpers.tiny_bundle import UNET, write_part, write_tiny_bundle
from tools.edit import main as edit
from tools.models.__main__ import main as models
from tools.restore.__main__ import main as restore
from weights.files import WeightsError, read_metadata, read_state_dict, write_safetensors

DIM = 12
LCM = UNetConfig(**{**UNET.__dict__, "time_cond_proj_dim": DIM})


def net() -> UNet:
    torch.manual_seed(1)
    return UNet(LCM).eval().requires_grad_(False)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A tiny model whose U-Net was distilled."""
    folder = write_tiny_bundle(tmp_path / "bundle")
    known = load_net(folder / "unet.safetensors").config.__dict__
    write_part(folder, "unet", UNet(UNetConfig(**{**known, "time_cond_proj_dim": DIM})))
    return folder


@pytest.mark.parametrize("dim", [12, 256])
def test_the_embedding_is_diffusers(dim: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    scales = torch.tensor([1.0, 4.5, 8.0])
    theirs = diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, scales - 1, dim)
    torch.testing.assert_close(
        guidance_embedding(scales, dim), theirs, rtol=1e-5, atol=1e-3
    )  # of up to 7000 radians


def test_the_net_is_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    ours = net()
    names = (
        "in_channels", "out_channels", "block_out_channels", "layers_per_block", "cross_attention_dim", "attention_head_dim",
        "down_block_types", "up_block_types", "norm_num_groups", "time_cond_proj_dim",
    )  # fmt: skip
    theirs = diffusers.UNet2DConditionModel(**{name: getattr(LCM, name) for name in names}).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x, context = torch.randn(2, LCM.in_channels, 8, 8), torch.randn(2, 5, LCM.cross_attention_dim)
    for scale in (1.0, 7.5):
        cond = guidance_embedding(torch.tensor([scale]), DIM).expand(2, -1)
        with torch.no_grad():
            wanted = theirs(x, 499, context, timestep_cond=cond).sample
        assert relative_error(ours(x, 499, context, guidance=scale), wanted) < 1e-5
    with torch.no_grad():
        assert relative_error(ours(x, 499, context), theirs(x, 499, context).sample) < 1e-5
    assert (
        relative_error(ours(x, 499, context, guidance=torch.tensor([1.0, 7.5])), ours(x, 499, context)) > 1e-4
    )


def test_guidance_of_a_net_that_has_none_is_refused() -> None:
    with pytest.raises(ValueError, match="it was not distilled with it"):
        UNet(UNET)(
            torch.ones(1, UNET.in_channels, 8, 8), 1, torch.ones(1, 5, UNET.cross_attention_dim), guidance=2.0
        )


def test_keys_and_convert(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert models(["keys", str(bundle / "unet.safetensors")]) == 0
    assert f"time_cond_proj_dim={DIM}" in capsys.readouterr().out
    assert models(["convert", str(bundle), "-o", str(tmp_path / "again"), "--in-process"]) == 0
    assert load_net(tmp_path / "again" / "unet.safetensors").config.time_cond_proj_dim == DIM


def test_an_edit_and_a_restoration_ask_the_net_once(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(np.full((64, 64, 3), 90, np.uint8)).save(tmp_path / "in.png")
    Image.fromarray(np.pad(np.full((32, 32), 255, np.uint8), 16)).save(tmp_path / "mask.png")
    made = []
    for scale in ("1", "8"):
        files = [
            "-i",
            str(tmp_path / "in.png"),
            "-m",
            str(tmp_path / "mask.png"),
            "-o",
            str(tmp_path / "out.png"),
        ]
        few = [
            "--sampler",
            "lcm",
            "--steps",
            "2",
            "--repaint-steps",
            "0",
            "--first-stage-batch",
            "1",
            "--no-decoder-optimization",
        ]
        command = [
            "--model",
            str(bundle),
            "-p",
            "a red house",
            "--guidance-scale",
            scale,
            "--device",
            "cpu",
            *files,
            *few,
        ]
        assert edit(command) == 0
        made.append(np.asarray(Image.open(tmp_path / "out.png")).astype(int))
    assert "a latent consistency model, made for --sampler lcm --steps 4" in capsys.readouterr().err
    assert (made[0] != made[1]).any()
    small = tmp_path / "small.png"
    Image.fromarray(np.full((16, 16, 3), 90, np.uint8)).save(small)
    method = ["--method", "img2img", "--strength", "0.5", "--sampler", "lcm", "--steps", "2", "--scale", "2"]
    assert (
        restore(
            [
                "--model",
                str(bundle),
                "-i",
                str(small),
                "-o",
                str(tmp_path / "r.png"),
                "--device",
                "cpu",
                *method,
            ]
        )
        == 0
    )
    pipeline = load_edit_pipeline(bundle)
    asked: list[tuple[int, float | None]] = []
    forward = pipeline.unet.forward
    pipeline.unet.forward = lambda x, *more, guidance=None: (
        asked.append((len(x), guidance)),
        forward(x, *more, guidance=guidance),
    )[1]
    image, mask = torch.zeros(1, 3, 64, 64), torch.zeros(1, 1, 64, 64)
    mask[..., 16:48, 16:48] = 1
    quick = EditConfig(
        sampler="lcm",
        num_steps=2,
        repaint_steps=0,
        first_stage_batch=1,
        decoder_optimization=False,
        guidance_scale=5.0,
    )
    pipeline(image, mask, "a red house", config=quick)
    assert {size for size, _ in asked} == {1} and 5.0 in {scale for _, scale in asked}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: torch.ones(9, DIM), "has shape"),
        (lambda w: torch.ones(DIM), "expected 2 axes"),
        (lambda w: torch.full_like(w, torch.nan), "not finite"),
    ],
)
def test_damaged_files_are_refused_in_a_line(
    change: Callable[[Tensor], Tensor], message: str, bundle: Path
) -> None:
    file, key = bundle / "unet.safetensors", "time_embedding.cond_proj.weight"
    metadata = read_metadata(file)
    state = {name: tensor.clone() for name, tensor in read_state_dict(file).items()}
    write_safetensors(file, state | {key: change(state[key])}, metadata)
    with pytest.raises(WeightsError, match=message) as caught:
        load_edit_pipeline(bundle)
    assert "\n" not in str(caught.value)
