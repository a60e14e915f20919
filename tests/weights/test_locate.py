"""weights/locate.py: a model, however it is given, to its parts; what is beside it and on this machine,
and nothing else.
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.fake_hub import cache, empty_machine, put
from tests.helpers.tiny_bundle import (
    base_parts,
    write_hub_folder,
    write_ldm_file,
    write_pasd_folder,
    write_tiny_bundle,
)
from weights.files import WeightsError, read_state_dict, write_safetensors
from weights.ldm import to_ldm
from weights.locate import Located, locate
from weights.merge import pack_delta
from weights.registry import MINI, MODELS

BASE = {"unet", "vae", "text_encoder"}
CLIP = "openai/clip-vit-large-patch14"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tiny model as a flat folder, a single file and a diffusers folder; and PASD.
    Not to be written to.
    """
    root = tmp_path_factory.mktemp("models")
    bundle = write_tiny_bundle(root / "flat")
    write_ldm_file(bundle, root / "ldm" / "model.safetensors")
    write_hub_folder(bundle, root / "hub")
    write_pasd_folder(root / "pasd")
    return root


@pytest.fixture(autouse=True)
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty machine without a network, and its MSBD_WEIGHTS."""
    empty_machine(tmp_path, monkeypatch, sockets=False)
    monkeypatch.setenv("MSBD_WEIGHTS", str(tmp_path / "weights"))
    return tmp_path / "weights"


def put_companions(weights: Path) -> None:
    """CLIP with its tokenizer, and the enlarger; nothing opens them here."""
    put(weights / CLIP / "model.safetensors")
    put(weights / CLIP / "tokenizer.json")
    put(weights / "RealESRGAN_x4plus.pth")


def refusal(act: Callable[[], Any]) -> str:
    """The one line of a WeightsError."""
    with pytest.raises(WeightsError) as refused:
        act()
    assert "\n" not in str(refused.value)
    return str(refused.value)


def paths(located: Located) -> dict[str, Path]:
    return {part: source.path for part, source in located.nets.items()}


# ---- every way to give a model -----------------------------------------------------------------------------


def test_a_flat_folder(models: Path, weights: Path) -> None:
    put_companions(weights)  # of no use to a folder that has its own
    folder = models / "flat"
    located = locate(folder)
    assert paths(located) == {part: folder / f"{part}.safetensors" for part in ("unet", "vae", "clip", "rrdb")}  # fmt: skip
    assert (located.name, located.tokenizer, located.scheduler) == (
        str(folder),
        folder / "tokenizer.json",
        {},
    )
    assert located.files() == {part: [path] for part, path in paths(located).items()} | {
        "tokenizer": [folder / "tokenizer.json"]
    }


def test_a_single_file(models: Path) -> None:
    file = models / "ldm" / "model.safetensors"
    for given in (file, str(file)):
        located = locate(given)
        assert paths(located) == dict.fromkeys(BASE, file)
        assert located.tokenizer == models / "ldm" / "tokenizer.json" and located.name == str(file)
    assert set(located.files()) == {*BASE, "tokenizer"}


def test_a_single_file_may_be_a_pickle_and_lack_parts(tmp_path: Path, models: Path) -> None:
    parts = base_parts(models / "flat")
    torch.save({"state_dict": to_ldm({"unet": parts["unet"], "vae": parts["vae"]})}, tmp_path / "x.ckpt")
    located = locate(tmp_path / "x.ckpt")
    assert set(located.nets) == {"unet", "vae"} and located.tokenizer is None
    line = refusal(lambda: located.net("text_encoder"))
    assert line.startswith(f"{tmp_path / 'x.ckpt'}: no text_encoder there; it has unet, vae. Add text_enc")


def test_a_diffusers_folder(models: Path) -> None:
    folder = models / "hub"
    located = locate(folder)
    assert paths(located) == {
        "unet": folder / "unet" / "diffusion_pytorch_model.safetensors",
        "vae": folder / "vae" / "diffusion_pytorch_model.safetensors",
        "text_encoder": folder / "text_encoder" / "model.safetensors",
    }
    assert located.net("unet").config["sample_size"] == 16
    assert located.tokenizer == folder / "tokenizer" / "tokenizer.json"
    assert located.scheduler["beta_start"] == 0.001


def test_a_pasd_folder(models: Path) -> None:
    located = locate(models / "pasd")
    assert set(located.nets) == {"unet", "controlnet"} and located.tokenizer is None
    assert located.net("controlnet").config["block_out_channels"] == [320, 640, 1280, 1280]  # not believed


def test_a_compact_export(tmp_path: Path, models: Path, weights: Path) -> None:
    put_companions(weights)  # which it does not need
    unet, controlnet = (
        read_state_dict(models / "pasd" / part / "diffusion_pytorch_model.safetensors")
        for part in ("unet", "controlnet")
    )
    write_safetensors(tmp_path / "small.safetensors", pack_delta(unet, controlnet))
    located = locate(tmp_path / "small.safetensors")
    assert paths(located) == dict.fromkeys(("pasd_added", "controlnet"), tmp_path / "small.safetensors")


def test_a_flat_folder_of_one_net(tmp_path: Path) -> None:
    put(tmp_path / "rrdb.safetensors")
    assert set(locate(tmp_path).nets) == {"rrdb"}


# ---- names -------------------------------------------------------------------------------------------------


def test_a_name_wins_over_a_folder_of_that_name(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(models / "hub", tmp_path / "mini")
    monkeypatch.chdir(tmp_path)
    assert paths(locate("mini")) == {part: MINI / f"{part}.safetensors" for part in ("unet", "vae", "clip", "rrdb")}  # fmt: skip
    assert locate("mini").tokenizer == MINI / "tokenizer.json"
    assert set(locate("./mini").nets) == BASE


def as_large_as(size: int | None, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a stand-in of that size be the known model's first file."""
    model = MODELS[name]
    monkeypatch.setitem(
        MODELS, name, replace(model, files=(replace(model.files[0], size=size), *model.files[1:]))
    )


def test_a_name_of_one_file(models: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_large_as(None, "toonyou", monkeypatch)
    assert "toonyou_beta3.safetensors" in refusal(lambda: locate("toonyou"))
    shutil.copytree(models / "ldm", weights)
    file = (weights / "model.safetensors").rename(weights / "toonyou_beta3.safetensors")
    assert "tools.models fetch toonyou" in refusal(lambda: locate("toonyou"))  # for the tokenizer
    assert locate("toonyou", optional=("tokenizer",)).tokenizer is None
    tokenizer = put(weights / CLIP / "tokenizer.json")
    located = locate("toonyou")
    assert paths(located) == dict.fromkeys(BASE, file) and located.tokenizer == tokenizer
    upscaler = put(weights / "RealESRGAN_x4plus.pth")
    with pytest.warns(
        UserWarning, match=rf"{upscaler}: 1,024 bytes, expected 67,040,989 .*; going on without it"
    ):
        assert "rrdb" not in locate("toonyou").nets  # an edit can do without


def test_a_name_of_a_folder_on_the_hub(weights: Path) -> None:
    model = MODELS["sd-v1-4-diffusers"]
    for file in model.files:
        put(weights / str(file.repo) / file.file, b'{"beta_end": 0.5}' if file.part == "scheduler" else b"")
    root = weights / "CompVis" / "stable-diffusion-v1-4"
    located = locate("sd-v1-4-diffusers")
    assert paths(located) == {file.part: root / file.file for file in model.files if file.part in BASE}
    assert located.tokenizer == root / "tokenizer" / "vocab.json" and located.scheduler == {"beta_end": 0.5}
    cached = cache(
        MODELS["clip-vit-l14"].files[1]
    )  # CLIP's own tokenizer, in the Hugging Face cache: not needed
    assert cached.is_file() and locate("sd-v1-4-diffusers").tokenizer == located.tokenizer


def test_the_name_pasd_has_its_base_and_the_configs_of_its_own_nets(weights: Path) -> None:
    for name in ("pasd", "sd-v1-5-diffusers"):
        for file in MODELS[name].files:
            content = b'{"norm_eps": 0.5}' if file.part.endswith("_config") else b"{}"
            put(weights / str(file.repo) / file.file, content)
    located = locate("pasd")
    assert set(located.nets) == {*BASE, "controlnet"}
    for part in ("unet", "controlnet"):
        assert "pasd/checkpoint-100000" in str(located.net(part).path)
        assert located.net(part).config == {"norm_eps": 0.5}
    assert located.net("vae").config == {} and "stable-diffusion-v1-5" in str(located.net("vae").path)


def test_a_name_that_is_no_base_model_has_no_net_to_edit_with(weights: Path) -> None:
    put(weights / "latent-consistency/lcm-lora-sdv1-5/pytorch_lora_weights.safetensors")
    assert "lcm-lora: a LoRA, which changes a model and is none" in refusal(
        lambda: locate("lcm-lora").net("unet")
    )


# ---- what lies beside --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ldm", "hub", "flat"])
def test_the_tokenizer_is_found_beside_in_order(tmp_path: Path, models: Path, kind: str) -> None:
    folder = Path(shutil.copytree(models / kind, tmp_path / kind))
    given = folder / "model.safetensors" if kind == "ldm" else folder
    names = ["tokenizer.json", "tokenizer/tokenizer.json", "vocab.json", "tokenizer/vocab.json"]
    for name in names:
        put(folder / name)
    for name in names:
        assert locate(given).tokenizer == folder / name
        (folder / name).unlink()
    assert locate(given).tokenizer is None


@pytest.mark.parametrize("kind", ["ldm", "hub"])
def test_companions_are_found_on_this_machine(
    tmp_path: Path, models: Path, weights: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(models / kind, tmp_path / kind))
    given = folder / "model.safetensors" if kind == "ldm" else folder
    assert set(locate(given, companions=True).nets) == BASE
    own = locate(given, companions=True).tokenizer
    put_companions(weights)
    with pytest.warns(
        UserWarning, match=r"RealESRGAN_x4plus\.pth: 1,024 bytes, expected .*; going on without it"
    ):
        assert set(locate(given, companions=True).nets) == {*BASE, "clip"}
    as_large_as(1024, "realesrgan-x4plus", monkeypatch)
    located = locate(given, companions=True)
    assert set(located.nets) == {*BASE, "clip", "rrdb"} and located.tokenizer == own  # its own goes first
    assert located.net("clip").path == weights / CLIP / "model.safetensors"
    assert own and located.scheduler == locate(given, companions=True).scheduler
    own.unlink()
    assert locate(given, companions=True).tokenizer == weights / CLIP / "tokenizer.json"


def test_companions_are_found_in_the_hugging_face_cache(models: Path) -> None:
    clip = cache(MODELS["clip-vit-l14"].files[0])
    assert locate(models / "hub", companions=True).net("clip").path == clip


# ---- nothing there -----------------------------------------------------------------------------------------


def test_nothing_found_is_one_line(tmp_path: Path) -> None:
    assert "no model is called 'nowhere'; known: mini, mini-pasd, " in refusal(lambda: locate("nowhere"))
    (tmp_path / "empty").mkdir()
    assert refusal(lambda: locate(tmp_path / "empty")) == (
        f"{tmp_path / 'empty'}: no model's folder; expected a diffusers folder (unet/, vae/, text_encoder/), or files named "
        "unet.safetensors, vae.safetensors, text_encoder.safetensors, clip.safetensors, rrdb.safetensors, controlnet.safetensors"
    )
    (tmp_path / "hub" / "unet").mkdir(parents=True)
    assert "no weights here" in refusal(lambda: locate(tmp_path / "hub"))
    assert "python -m tools.models fetch sd-v1-5" in refusal(lambda: locate("sd-v1-5"))


@pytest.mark.parametrize("name", ["x" * 5000, "x\0y", "unet/"])
def test_a_name_that_can_be_no_file_is_an_unknown_one(name: str) -> None:
    assert "no model is called" in refusal(lambda: locate(name))


def test_a_file_that_is_none_or_holds_no_net_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "page.safetensors", b"<html>")
    assert "a web page" in refusal(lambda: locate(tmp_path / "page.safetensors"))
    write_safetensors(tmp_path / "x.safetensors", {"layer.weight": torch.zeros(1)})
    assert "no family known here" in refusal(lambda: locate(tmp_path / "x.safetensors"))
