"""Full-size files of every official layout: they load strictly, into the net whose numbers they are,
in little memory and time.
"""

import copy
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from msbd.loading.parts import load_net, load_pasd_nets
from nets.clip import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel
from nets.controlnet import ControlNet, ControlNetConfig, ControlOutput
from nets.pasd_unet import PASDUNet, PASDUNetConfig
from nets.rrdb import REALESRGAN_X2PLUS, REALESRGAN_X4PLUS, REALESRGAN_X4PLUS_ANIME_6B, RRDBNet
from nets.unet import UNet, UNetConfig
from nets.vae import AutoencoderKL, VAEConfig
from tests.conftest import ROOT
from tests.helpers.goldens import read_json
from tests.helpers.synthetic import fill, manifest, write_lightning, write_shards
from weights.files import write_safetensors
from weights.merge import pack_delta
from weights.tokenizer import train_tokenizer

pytestmark = pytest.mark.large

State = dict[str, Tensor]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


X, T, CONTEXT, HINT = noise(1, 4, 8, 8), torch.tensor([500]), noise(1, 77, 768), noise(1, 3, 64, 64)
IDS = torch.arange(1, 78)[None]


def control() -> ControlOutput:
    """Residuals of SD 1.x's shapes for the 8 x 8 latent, as a ControlNet would give them."""
    widths = [(320, 8)] * 3 + [(320, 4), (640, 4), (640, 4), (640, 2), (1280, 2), (1280, 2)] + [(1280, 1)] * 3
    return ControlOutput(tuple(0.1 * noise(1, c, s, s) for c, s in widths), 0.1 * noise(1, 1280, 1, 1))


RUN: dict[type, Callable[[Any], list[Tensor]]] = {
    UNet: lambda net: [net(X, T, CONTEXT)],
    PASDUNet: lambda net: [net(X, T, CONTEXT, control())],
    ControlNet: lambda net: (lambda out: [*out.down, out.mid, *out.to_rgbs])(net(X, T, CONTEXT, HINT.abs())),
    AutoencoderKL: lambda net: [net.encode(HINT).mean, net.decode(X)],
    CLIPTextModel: lambda net: [net(IDS)],
    CLIPModel: lambda net: [net.encode_text(IDS), net.encode_image(noise(1, 3, 224, 224))],
    RRDBNet: lambda net: [net(noise(1, 3, 16, 16))],
}


def filled(net: Callable[[], nn.Module], state: Mapping[str, Tensor]) -> nn.Module:
    """The net with these tensors under its own names: what loading must come to."""
    with torch.device("meta"):
        empty = net()
    empty.load_state_dict(state, strict=True, assign=True)
    return empty.eval()


def check_equal(loaded: nn.Module, direct: nn.Module) -> None:
    types = [{p.dtype for p in net.parameters()} for net in (loaded, direct)]
    assert (
        types[0] == types[1]
    )  # the file's own; run in float32, since some processors take minutes in float16
    outputs = [RUN[type(direct)](copy.deepcopy(net).float()) for net in (loaded, direct)]
    assert type(loaded) is type(direct) and loaded.config == direct.config
    for ours, theirs in zip(*outputs, strict=True):
        assert bool(theirs.isfinite().all()) and theirs.std() > 0
        assert torch.equal(ours, theirs)


def official_map(part: str) -> dict[str, str]:
    """LDM key -> canonical key, as the official conversion has it; no map of ours."""
    content = read_json(f"manifests/map_{part}_ldm_to_diffusers.json")
    return {
        key: name for key, name in content.items() if key.startswith(("model.", "first_stage_model."))
    } or content["map"]


@pytest.fixture(scope="module")
def ldm() -> State:
    """The U-Net, VAE, text encoder and schedule of sd-v1-4.ckpt, under its names."""
    return fill(manifest("sd_v1_ldm"))


def canonical(ldm: State, part: str) -> State:
    if part == "text_encoder":
        prefix = "cond_stage_model.transformer."
        return {key.removeprefix(prefix): tensor for key, tensor in ldm.items() if key.startswith(prefix)}
    state = {name: ldm[key] for key, name in official_map(part).items()}
    return {
        key: t.flatten(1) if ".mid_block.attentions." in key and t.ndim == 4 and part == "vae" else t
        for key, t in state.items()
    }


PARTS = {
    "unet": lambda: UNet(UNetConfig()),
    "vae": lambda: AutoencoderKL(VAEConfig()),
    "text_encoder": lambda: CLIPTextModel(CLIPTextConfig()),
}


@pytest.mark.parametrize("container", ["ckpt", "safetensors"])
def test_single_file(tmp_path: Path, ldm: State, container: str) -> None:
    path = tmp_path / f"model.{container}"
    write_lightning(path, ldm) if container == "ckpt" else write_safetensors(path, ldm)
    for part, net in PARTS.items():
        check_equal(load_net(path, part), filled(net, canonical(ldm, part)))


def test_single_file_with_averaged_weights_as_released(tmp_path: Path, ldm: State) -> None:
    positions = {"cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None]}
    counters = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(470000)}
    averages = {
        "model_ema." + key.removeprefix("model.").replace(".", ""): tensor.flip(0)
        for key, tensor in ldm.items()
        if key.startswith("model.diffusion_model.")
    }
    path = write_lightning(tmp_path / "full-ema.ckpt", ldm | averages | counters | positions)
    expected = {key: tensor.flip(0) for key, tensor in canonical(ldm, "unet").items()}
    check_equal(load_net(path, "unet"), filled(PARTS["unet"], expected))


def test_unet_in_shards(tmp_path: Path) -> None:
    state = fill(manifest("sd15_unet_diffusers"))
    write_shards(tmp_path, "diffusion_pytorch_model", state, count=3)
    (tmp_path / "config.json").write_text(json.dumps({"attention_head_dim": 8, "sample_size": 64}))
    check_equal(load_net(tmp_path), filled(PARTS["unet"], state))


def test_vae_as_bin_and_with_its_old_names(tmp_path: Path) -> None:
    state = fill(manifest("sd15_vae_diffusers"))
    torch.save(state, tmp_path / "diffusion_pytorch_model.bin")
    direct = filled(PARTS["vae"], state)
    check_equal(load_net(tmp_path), direct)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for key, tensor in state.items():
        for new, name in old.items():
            key = key.replace(f".attentions.0.{new}.", f".attentions.0.{name}.")
        renamed[key] = tensor
    assert renamed.keys() != state.keys()
    write_safetensors(tmp_path / "old.safetensors", renamed)
    check_equal(load_net(tmp_path / "old.safetensors"), direct)


@pytest.mark.parametrize("name", ["clip_text_vitl14_hf", "clip_text_vitl14_hf_tf5"])
def test_clip_text(tmp_path: Path, name: str) -> None:
    state = fill(manifest(name))
    write_safetensors(tmp_path / "model.safetensors", state)
    whole = {
        key if key.startswith("text_model.") else f"text_model.{key}": tensor for key, tensor in state.items()
    }
    check_equal(load_net(tmp_path), filled(PARTS["text_encoder"], whole))


@pytest.mark.parametrize("name", ["clip_vitl14_hf", "clip_vitl14_hf_tf5"])
def test_clip(tmp_path: Path, name: str) -> None:
    state = fill(manifest(name))
    write_safetensors(tmp_path / "model.safetensors", state)
    check_equal(load_net(tmp_path / "model.safetensors"), filled(lambda: CLIPModel(CLIPConfig()), state))


@pytest.mark.parametrize(
    "name, config",
    [
        ("rrdbnet_x4plus", REALESRGAN_X4PLUS),
        ("rrdbnet_x2plus", REALESRGAN_X2PLUS),
        ("rrdbnet_x4plus_anime_6B", REALESRGAN_X4PLUS_ANIME_6B),
    ],
)
def test_real_esrgan(tmp_path: Path, name: str, config: object) -> None:
    state = fill(manifest(name))
    torch.save({"params_ema": state, "params": fill({"conv_first.bias": (64,)})}, tmp_path / "net.pth")
    check_equal(load_net(tmp_path / "net.pth"), filled(lambda: RRDBNet(config), state))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["pasd", "pasd_light", "pasd_rrdb", "pasd_light_rrdb"])
def test_pasd(tmp_path: Path, name: str) -> None:
    light, rrdb = "light" in name, "rrdb" in name
    parts = {
        "unet": fill(manifest(name.removesuffix("_rrdb") + "_unet")),
        "controlnet": fill(manifest(f"{name}_controlnet")),
    }
    for part, state in parts.items():
        (tmp_path / part).mkdir()
        write_safetensors(tmp_path / part / "diffusion_pytorch_model.safetensors", state)
        # A config.json of another net, as official folders have had them: sizes come from the tensors.
        (tmp_path / part / "config.json").write_text(
            json.dumps({"use_rrdb": not rrdb, "block_out_channels": [8, 8]})
        )
    unet, controlnet = load_pasd_nets(tmp_path)
    variant = PASDUNetConfig(variant="light" if light else "full")
    direct = filled(lambda: PASDUNet(variant), parts["unet"])
    check_equal(unet, direct)
    check_equal(controlnet, filled(lambda: ControlNet(ControlNetConfig(use_rrdb=rrdb)), parts["controlnet"]))
    if name == "pasd_light":
        write_safetensors(tmp_path / "delta.safetensors", pack_delta(parts["unet"], parts["controlnet"]))
        base = fill(manifest("sd15_unet_diffusers"))
        (tmp_path / "base").mkdir()
        write_safetensors(tmp_path / "base" / "unet.safetensors", base)
        for model in (tmp_path, tmp_path / "delta.safetensors"):
            check_equal(
                load_pasd_nets(model, tmp_path / "base")[0], direct
            )  # the same base, by its keys' seeds


LOAD = """
import re, sys, time
from pathlib import Path
import torch
from msbd.load import load_edit_pipeline
from msbd.loading.parts import load_net
began = time.perf_counter()
kept = load_edit_pipeline(sys.argv[1], dtype=torch.float16) if sys.argv[2] == "pipeline" else load_net(sys.argv[1], "unet")
seconds = time.perf_counter() - began
# Not getrusage, whose maximum begins with that of the process that started this one.
peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
print(int(peak[1]) * 1024 / 1e9, seconds)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux's account of memory")
@pytest.mark.parametrize("container", ["ckpt", "safetensors"])
@pytest.mark.parametrize("what", ["pipeline", "unet"])
def test_loading_takes_little_memory_and_time(tmp_path: Path, ldm: State, container: str, what: str) -> None:
    path = tmp_path / f"model.{container}"
    write_lightning(path, ldm) if container == "ckpt" else write_safetensors(path, ldm)
    train_tokenizer(["a red house"], 530).save(str(tmp_path / "tokenizer.json"))
    size = path.stat().st_size / 1e9
    path.read_bytes()  # cached
    run = subprocess.run(
        [sys.executable, "-c", LOAD, str(path), what],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    peak, seconds = map(float, run.stdout.split())
    assert peak <= 1.3 * size + 0.6, f"{peak:.2f} GB resident for a file of {size:.2f} GB"
    assert seconds <= 10, f"{seconds:.1f} s for a file of {size:.2f} GB"
