"""`python -m tools.edit`: what --model auto takes, another upscaler and autoencoder, and what is noted."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from msbd.edit.config import FAST, EditConfig
from msbd.loading import choose
from nets.vae import AutoencoderKL
from tests.helpers.tiny_bundle import VAE, write_part, write_tiny_bundle
from tools import _cli
from tools.edit import Editor, build_parser, main, preset_options
from weights.files import WeightsError
from weights.lora import Lora
from weights.registry import MODELS, check_kind

QUICK = [
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


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture
def job(tmp_path: Path) -> list[str]:
    """A command without a model, for a picture that takes a second stage of the tiny bundle."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 96, 3), dtype=np.uint8)).save(
        tmp_path / "in.png"
    )
    mask = np.zeros((80, 96), np.uint8)
    mask[10:70, 15:80] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    files = [f"{flag}={tmp_path / name}" for flag, name in (("--image", "in.png"), ("--mask", "mask.png"))]
    return [*files, "-o", str(tmp_path / "out.png"), "-p", "a red house", *QUICK]


def stored(folder: Path) -> dict[str, object]:
    with Image.open(folder / "out.png") as picture:
        return json.loads(picture.info["msbd"])


@pytest.mark.parametrize(
    "here, model",
    [
        ((), "mini"),
        (("sd-v1-4", "sd-v1-5"), "sd-v1-5"),
        (("sd-v1-4", "sd-v1-5-fp16"), "sd-v1-5-fp16"),
        (("sd-v1-4-diffusers",), "sd-v1-4-diffusers"),
        (("pasd",), "mini"),
    ],
)
def test_auto_takes_stable_diffusion_where_it_is(
    here: tuple[str, ...], model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose, "is_here", lambda known, optional=(): known.name in here)
    choice = choose.choose_editor()
    assert choice.model == model and ("fetch sd-v1-5" in str(choice)) == (model == "mini")


def test_auto_says_what_is_missing_beside_a_file_that_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    own = MODELS["sd-v1-4"].files
    monkeypatch.setattr(choose, "find_local", lambda file: Path("x") if file in own else None)
    choice = choose.choose_editor()
    assert choice.model == "mini" and "what sd-v1-4 needs besides is not here" in str(choice)
    assert "fetch sd-v1-4 (1.78 GB)" in str(choice)  # without the file that is here


def test_without_a_model_the_mini_bundle_edits_and_a_note_says_why(
    job: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*job, "--dry-run"]) == 0
    note = capsys.readouterr().err
    assert (
        note.startswith("note: model mini: a test piece")
        and note.count("\n") == 1
        and "fetch sd-v1-5" in note
    )
    assert main([*job, "--quiet"]) == 0
    assert capsys.readouterr().err == "" and stored(tmp_path)["model"] == "mini"


def test_another_upscaler_and_autoencoder_change_the_result_and_stand_in_it(
    job: list[str], bundle: Path, tmp_path: Path
) -> None:
    other = write_tiny_bundle(tmp_path / "other")
    torch.manual_seed(8)
    write_part(other, "vae", AutoencoderKL(VAE))
    job += ["--model", str(bundle), "--quiet"]
    assert main(job) == 0
    before, facts = np.array(Image.open(tmp_path / "out.png")), stored(tmp_path)
    assert "vae" not in facts or facts["vae"] is None
    assert (
        main([*job, "--vae", str(other / "vae.safetensors"), "--upscaler", str(other / "rrdb.safetensors")])
        == 0
    )
    assert not np.array_equal(np.array(Image.open(tmp_path / "out.png")), before)
    facts = stored(tmp_path)
    for part in ("vae", "upscaler"):
        name = {"vae": "vae", "upscaler": "rrdb"}[part]
        assert re.fullmatch(rf"{name}\.safetensors \([0-9a-f]{{10}}\)", str(facts[part]))


def notes(*words: str) -> list[str]:
    """What is noted of an edit before it begins."""
    args = build_parser().parse_args(words)
    editor = Editor(args)
    return [*editor.notes, *editor.read(Editor.one_task(args)).notes]


def test_what_does_not_apply_is_noted(job: list[str], bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upscaler = ["--model", str(bundle), "--upscaler", str(bundle / "rrdb.safetensors")]
    assert notes(*job, *upscaler) == []
    (note,) = notes(*job, *upscaler, "--upscaling-mode", "bilinear")
    assert note == "--upscaler: not used with --upscaling-mode bilinear"
    monkeypatch.setattr("msbd.loading.nets.read_lora_file", lambda path: Lora(path, ()))
    args = build_parser().parse_args([*job, "--model", str(bundle), "--lora", "lcm-lora"])
    few = Editor(args).job
    assert few.config.sampler == "lcm" and few.config.num_steps == 2  # as `job` says
    said = "--sampler lcm --steps 4 --guidance-scale 1.0, as it was made for; your own flags come first"
    assert few.notes == [f"lcm-lora: {said}"]
    both = ["--lora", "lcm-lora", "--lora", "hyper-sd15-8step"]
    (note,) = notes(*job, "--model", str(bundle), *both)
    assert note == (
        "lcm-lora, hyper-sd15-8step: made for different samplings, none is set; give --sampler and --steps"
    )


def test_a_known_lora_is_sampled_as_it_was_made_for() -> None:
    lcm = preset_options("default", [("lcm-lora", 1.0)])
    assert (lcm["sampler"], lcm["num_steps"], lcm["guidance_scale"]) == ("lcm", 4, 1.0)
    hyper = EditConfig(**preset_options("paper", [("hyper-sd15-8step", 1.0)]))
    assert (hyper.sampler, hyper.spacing, hyper.num_steps, hyper.eta) == ("ddim", "trailing", 8, 0.0)
    assert preset_options("fast", [("unknown.safetensors", 1.0)]) == FAST


@pytest.mark.parametrize(
    "words, said",
    [
        ("--model lcm-lora", "a LoRA (.*), expected a base model .*; take it with --lora"),
        ("--model realesrgan-x4plus", "an upscaler (.*), expected .*; take it with --upscaler"),
        ("--model mini --upscaler clip-vit-l14", "a CLIP (.*), expected an upscaler or a base model"),
        ("--model mini --vae ultrasharp", "an upscaler (.*), expected an autoencoder"),
        ("--model mini --lora dreamshaper-8", "a base model (.*), expected a LoRA; take it with --base"),
    ],
)
def test_a_known_model_of_another_kind_is_refused_before_it_is_fetched(
    words: str, said: str, job: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*job, *words.split()]) == 1
    error = capsys.readouterr().err
    assert re.search(said, error) and "fetch" not in error and error.count("\n") == 1


def test_every_known_model_has_a_kind() -> None:
    kinds = {name: model.kind for name, model in MODELS.items()}
    assert {kinds[name] for name in ("mini", "sd-v1-5", "sd-v1-5-diffusers", "toonyou")} == {"base"}
    assert {kinds[name] for name in ("mini-pasd", "mini-pasd-color", "pasd", "pasd-light-color")} == {
        "restorer"
    }
    assert {kinds[name] for name in ("realsr-df2k", "realesrgan-x2plus", "ultrasharp")} == {"upscaler"}
    assert {kinds[name] for name in ("mini-style", "lcm-lora", "hyper-sd15-4step")} == {"LoRA"}
    assert (kinds["sd-vae-ft-mse"], kinds["clip-vit-l14"], kinds["blip-base"]) == (
        "autoencoder",
        "CLIP",
        "recogniser",
    )
    check_kind("a/path.safetensors", "base")
    with pytest.raises(WeightsError, match=r"resnet50: what recognises .*expected a LoRA$"):
        check_kind("resnet50", "LoRA")


def test_a_command_in_a_message_is_for_the_python_that_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / ".venv" / "bin" / "python"
    monkeypatch.setattr("sys.executable", str(python))
    monkeypatch.setattr("shutil.which", lambda _: "/usr/bin/python")
    monkeypatch.chdir(tmp_path)
    said = "run `python -m tools.models fetch pasd`, not /usr/bin/python -m x"
    assert (
        _cli.as_typed(said) == "run `.venv/bin/python -m tools.models fetch pasd`, not /usr/bin/python -m x"
    )
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert f"`{python} -m tools" in _cli.as_typed(said)
    monkeypatch.setattr("shutil.which", lambda _: str(python))
    assert _cli.as_typed(said) == said


# ---- the decoder that sees the picture ---------------------------------------------------------------------


def seamed(job: list[str]) -> list[str]:
    """`job` with the seam of its preset."""
    return [word for word in job if word != "--no-decoder-optimization"]


def test_two_words_for_the_seam_may_not_contradict(
    job: list[str], bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*seamed(job), "--model", str(bundle), "--no-decoder-optimization", "--seam"]
    assert main([*words, "adam", "--dry-run"]) == 1
    assert "--seam adam and --no-decoder-optimization, which is --seam none" in capsys.readouterr().err
    assert main([*words, "none", "--dry-run"]) == 0


def test_an_asymmetric_seam_takes_the_bundles_own_decoder(job: list[str], tmp_path: Path) -> None:
    asymmetric = ["--model", "mini", "--seam", "asymmetric", "--quiet"]
    assert main([*seamed(job), *asymmetric]) == 0
    with Image.open(tmp_path / "out.png") as picture:
        stored = json.loads(picture.info["msbd"])
    assert stored["seam"] == "asymmetric"
    assert re.fullmatch(r"mini-asymmetric \([0-9a-f]{10}\)", stored["seam_decoder"])


def test_the_bundle_is_known_by_its_folder_too(
    job: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(_cli.ROOT)
    words = [*seamed(job), "--seam", "asymmetric", "--dry-run"]
    assert main([*words, "--model", "weights/mini"]) == 0
    assert main([*words, "--model", "mini", "--seam-decoder", "nosuch"]) == 1  # before any net is read
    assert "nosuch" in capsys.readouterr().err


def test_without_a_decoder_for_it_the_seam_is_refused_before_the_work(
    job: list[str], bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*seamed(job), "--model", str(bundle), "--seam", "asymmetric"]) == 1
    error = capsys.readouterr().err
    assert "no mask-conditioned decoder is on this machine" in error and error.count("\n") == 1
    assert "models fetch asymmetric-vae-x-1-5" in error and not (tmp_path / "out.png").exists()
    wrong = ["--model", str(bundle), "--seam", "asymmetric", "--seam-decoder", "mini-asymmetric"]
    assert main([*seamed(job), *wrong]) == 1  # made for another autoencoder
    assert "a change to another autoencoder than this model's" in capsys.readouterr().err


def test_a_decoder_that_is_not_used_is_noted(job: list[str], bundle: Path) -> None:
    decoder = ["--model", str(bundle), "--seam-decoder", "mini-asymmetric"]
    assert notes(*seamed(job), *decoder) == ["--seam-decoder: not used with --seam membrane"]
