"""`python -m tools.restore` on tiny random nets: what it writes,
and that it refuses before it reads weights.
"""

import dataclasses
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

import msbd.load
from msbd.loading import choose
from msbd.pixels.files import load_image
from msbd.restore import official
from msbd.restore.config import RestoreConfig
from msbd.restore.pipeline import RestorePipeline
from nets.vae import AutoencoderKL
from tests.helpers.tiny_bundle import VAE, write_part, write_pasd_folder, write_tiny_bundle
from tools import _cli
from tools.restore import __main__ as command_line
from tools.restore.__main__ import FLAGS, GROUPS, OPTIONS, PRESETS, build_parser, main, restore_config
from weights.files import write_safetensors
from weights.locate import ENLARGERS, Located
from weights.locate import locate as locate_model
from weights.registry import MINI

ROOT = Path(__file__).parents[2]
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, with a tokenizer, CLIP and an enlarger."""
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PASD's two nets."""
    return write_pasd_folder(tmp_path_factory.mktemp("pasd"))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is to be found out before weights are read."""
    monkeypatch.setattr(msbd.load, "load_restore_pipeline", None)


def write_picture(
    path: Path, height: int = 12, width: int = 15, channels: int = 3, **options: Any
) -> np.ndarray:
    path.parent.mkdir(exist_ok=True)
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, channels), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return pixels


def quick(source: Path, output: Path, model: Path, base: Path) -> list[str]:
    files = ["-i", str(source), "-o", str(output), "--model", str(model), "--base", str(base)]
    return [*files, "--device", "cpu", "--steps", "2", "--process-size", "24", "-p", "a red house"]


@pytest.fixture
def job(tmp_path: Path, model: Path, base: Path) -> list[str]:
    """A sound command for a picture of 15 x 12 pixels, with quick settings."""
    write_picture(tmp_path / "in.png")
    return quick(tmp_path / "in.png", tmp_path / "out.png", model, base)


@pytest.fixture
def album(tmp_path: Path, model: Path, base: Path) -> list[str]:
    """The same of a folder, one of whose three pictures cannot be read."""
    write_picture(tmp_path / "album" / "a.png")
    (tmp_path / "album" / "b.png").write_text("not a picture")
    write_picture(tmp_path / "album" / "c.jpg", 9, 8)
    (tmp_path / "album" / "notes.txt").write_text("no picture either")
    return quick(tmp_path / "album", tmp_path / "restored", model, base)


def replaced(job: list[str], flag: str, value: object) -> list[str]:
    place = job.index(flag) + 1
    return [*job[:place], str(value), *job[place + 1 :]]


def read(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.array(picture)


def stored(path: Path) -> dict[str, Any]:
    with Image.open(path) as picture:
        return json.loads(picture.info["msbd"])


def refused(job: list[str], capsys: pytest.CaptureFixture[str], folder: Path) -> str:
    """The one line on stderr of a command that exits with 1 and writes nothing."""
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert main(job) == 1
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n")
    return err


# ---- what it writes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more, size",
    [
        ([], (48, 60)),
        (["--scale", "2.7"], (32, 40)),
        (["--scale", "0.5"], (6, 8)),
        (["--size", "31x77"], (77, 31)),
        (["--size", "7X5"], (5, 7)),
        (["--mode", "colorize"], (12, 15)),
        (["--mode", "stylize"], (12, 15)),
        (["--mode", "oldphoto"], (48, 60)),
        (["--method", "bicubic", "--scale", "3"], (36, 45)),
        (["--method", "rrdb"], (48, 60)),
        (["--method", "controlnet"], (48, 60)),
        (["--method", "img2img"], (48, 60)),
    ],
)
def test_a_file_becomes_one_of_the_asked_size(
    more: list[str], size: tuple[int, int], job: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*job, *more]) == 0
    assert read(tmp_path / "out.png").shape == (*size, 3)
    out, err = capsys.readouterr()
    free = "bicubic" in more or "rrdb" in more
    done = "" if free else r"(, stretched)?(, restored at \d+ x \d+)?, \d evaluations"
    assert re.fullmatch(rf".*out\.png: 15 x 12 -> {size[1]} x {size[0]}{done}, \d+\.\d s\n", out)
    # No progress bar where stderr is no terminal.
    notes = err.splitlines()
    assert all(note.startswith("note: --") for note in notes) and bool(notes) == free


def test_into_a_folder_goes_a_png_of_the_same_name(job: list[str], tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    assert main(replaced(job, "-o", tmp_path / "there")) == 0
    assert read(tmp_path / "there" / "in.png").shape == (48, 60, 3)


def test_the_same_command_gives_the_same_bytes_and_another_seed_others(
    job: list[str], tmp_path: Path
) -> None:
    contents = []
    for seed in (0, 0, 1):
        assert main([*job, "--seed", str(seed), "--no-metadata"]) == 0
        contents.append((tmp_path / "out.png").read_bytes())
    assert contents[0] == contents[1] != contents[2]


def test_the_file_says_how_it_was_made(job: list[str], tmp_path: Path, model: Path, base: Path) -> None:
    assert (
        main(
            [*job, "--seed", "7", "--negative-prompt", "grainy", "--base-weight", "0.5", "--fidelity", "0.4"]
        )
        == 0
    )
    with Image.open(tmp_path / "out.png") as picture:
        text = picture.info["parameters"]
    assert (
        text.startswith("a red house, clean, high-resolution, 8k\nNegative prompt: grainy\n")
        and "Seed: 7" in text
    )
    assert str(tmp_path) not in text  # nobody's folders
    found = stored(tmp_path / "out.png")
    expected = {
        "seed": 7, "num_inference_steps": 2, "guidance_scale": 9.0, "process_size": 24, "fidelity": 0.4,
        "size": "60 x 48", "preset": "paper", "model": model.name, "model_hash": msbd.load.model_hash(model),
        "base": f"{base.name}:0.5 ({msbd.load.model_hash(base)})", "loras": None,
        "msbd": _cli.version(), "torch": torch.__version__, "device": "cpu", "notes": None,
    }  # fmt: skip
    assert found.items() >= expected.items()
    assert found.keys() >= {field.name for field in dataclasses.fields(RestoreConfig)}
    assert None not in [
        found[name]
        for name in found.keys()
        & OPTIONS.keys() - {"added_noise_level", "tile_batch", "sigma_min", "sigma_max"}
    ]
    again = RestoreConfig(**{name: value for name, value in found.items() if name in OPTIONS})
    assert again.seed == 7  # the settings in the file are settings


@pytest.mark.parametrize("suffix", ["png", "webp", "jpg"])
def test_no_metadata_leaves_them_out(suffix: str, job: list[str], tmp_path: Path) -> None:
    job = replaced(job, "-o", tmp_path / f"out.{suffix}")
    assert main(job) == 0
    assert b"a red house" in (tmp_path / f"out.{suffix}").read_bytes()
    assert main([*job, "--no-metadata"]) == 0
    assert b"a red house" not in (tmp_path / f"out.{suffix}").read_bytes()


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_transparency_is_resampled_and_the_colour_profile_kept(
    suffix: str, job: list[str], tmp_path: Path
) -> None:
    pixels = write_picture(tmp_path / "in.png", 12, 15, 4)
    pixels[..., 3] |= 1  # nothing is hidden
    Image.fromarray(pixels).save(tmp_path / "in.png", icc_profile=SRGB)
    assert main(replaced(job, "-o", tmp_path / f"out.{suffix}")) == 0
    with Image.open(tmp_path / f"out.{suffix}") as picture:
        result, profile = np.array(picture), picture.info["icc_profile"]
    alpha = Image.fromarray(pixels[..., 3]).resize((60, 48), Image.Resampling.BICUBIC)
    assert profile == SRGB and result.shape == (48, 60, 4)
    assert (
        np.abs(result[..., 3].astype(int) - np.array(alpha)).mean() < 1
    )  # Pillow clamps between its two passes
    Image.fromarray(pixels[..., :3]).save(tmp_path / "in.png")  # the colours do not depend on it
    assert main(job) == 0
    assert np.array_equal(read(tmp_path / "out.png"), result[..., :3])


def test_a_lora_changes_the_picture_and_is_named_in_the_file(job: list[str], tmp_path: Path) -> None:
    tensors = {
        "unet.conv_in.lora_A.weight": torch.ones(2, 4, 3, 3),
        "unet.conv_in.lora_B.weight": torch.ones(8, 2, 1, 1),
    }
    write_safetensors(tmp_path / "style.safetensors", tensors)
    assert main(job) == 0
    before = read(tmp_path / "out.png")
    assert main([*job, "--lora", f"{tmp_path / 'style.safetensors'}:0.5"]) == 0
    assert not np.array_equal(before, read(tmp_path / "out.png"))
    (named,) = stored(tmp_path / "out.png")["loras"]
    assert re.fullmatch(r"style\.safetensors:0\.5 \([0-9a-f]{10}\)", named)


def test_a_comparison_shows_the_input_beside_the_result(job: list[str], tmp_path: Path) -> None:
    assert main([*job, "--compare", str(tmp_path / "compare.png")]) == 0
    sheet = read(tmp_path / "compare.png")
    assert sheet.shape == (48, 60 + 8 + 60, 3) and np.array_equal(sheet[:, 68:], read(tmp_path / "out.png"))
    enlarged = Image.open(tmp_path / "in.png").resize((60, 48), Image.Resampling.LANCZOS)
    assert np.array_equal(sheet[:, :60], np.array(enlarged))


# ---- --model auto ------------------------------------------------------------------------------------------

INSTALL = 'python -m pip install -e ".[enlarge]"'


@pytest.fixture
def small(tmp_path: Path) -> list[str]:
    """A command without a model, for a picture of 16 x 20 pixels."""
    write_picture(tmp_path / "in.png", 20, 16)
    return ["-i", str(tmp_path / "in.png"), "-o", str(tmp_path / "out.png"), "--device", "cpu"]


def have(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Let models of these names be on this machine, as far as choosing goes."""
    found = next((Located(name, {}) for name in ENLARGERS if name in names), None)
    monkeypatch.setattr(choose, "is_here", lambda model, optional=(): model.name in names)
    monkeypatch.setattr(choose, "find_enlarger", lambda: found)


def test_with_nothing_here_auto_is_the_mini_bundle_and_says_how_to_get_better(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*small, "--steps", "1", "--scale", "2"]) == 0
    assert read(tmp_path / "out.png").shape == (40, 32, 3)
    found = stored(tmp_path / "out.png")
    assert (found["model"], found["base"], found["method"]) == ("mini-pasd", None, "pasd")
    note = capsys.readouterr().err
    assert note.startswith("note: model mini-pasd: a test piece that makes photographs worse")
    assert note.count("\n") == 1 and INSTALL in note


@pytest.mark.parametrize(
    "here, more, model, method, said",
    [
        ((), "", "mini-pasd", "pasd", INSTALL),
        ((), "-p x", "mini-pasd", "pasd", "fetch pasd"),
        ((), "--mode colorize", "mini-pasd-color", "pasd", "fetch pasd-light-color"),
        ((), "--method rrdb", "mini-pasd", "rrdb", INSTALL),
        ((), "--method bicubic", "mini", "bicubic", ""),
        (("realesrgan-x4plus", "realsr-df2k"), "", "realesrgan-x4plus", "rrdb", "fetch pasd"),
        (("realsr-df2k",), "", "realsr-df2k", "rrdb", INSTALL),
        (("realesrgan-x4plus",), "--steps 3", "realesrgan-x4plus", "rrdb", "fetch pasd"),
        (("realesrgan-x4plus",), "--method rrdb", "realesrgan-x4plus", "rrdb", ""),
        (("realesrgan-x4plus",), "--method pasd", "mini-pasd", "pasd", "fetch pasd"),
        (("realesrgan-x4plus",), "-p x", "mini-pasd", "pasd", "fetch pasd"),
        (("realesrgan-x4plus",), "--fidelity 1", "mini-pasd", "pasd", "fetch pasd"),
        (("realesrgan-x4plus",), "--lora mini-style", "mini-pasd", "pasd", "fetch pasd"),
        (("realesrgan-x4plus",), "--base mini", "mini-pasd", "pasd", "fetch pasd"),
        (("realesrgan-x4plus",), "--mode oldphoto", "mini-pasd", "pasd", "fetch pasd"),
        (("realesrgan-x4plus",), "--mode stylize", "mini-pasd", "pasd", "fetch pasd"),
        (("realesrgan-x4plus", "pasd"), "", "pasd", "pasd", ""),
        (("pasd-light",), "-p x", "pasd-light", "pasd", ""),
        (("pasd-light-color",), "--mode colorize", "pasd-light-color", "pasd", ""),
        (("pasd",), "--mode colorize", "mini-pasd-color", "pasd", "fetch pasd-light-color"),
    ],
)
def test_auto_takes_the_best_that_can_do_it(
    here: tuple[str, ...], more: str, model: str, method: str, said: str, small: list[str],
    monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    have(monkeypatch, *here)
    asked: dict[str, Any] = {}

    def locate(name: str, **options: Any) -> Any:
        asked.update(options, name=name)
        method = options["method"] or ("rrdb" if name in ENLARGERS else "pasd")
        return msbd.load.RestoreModel(method, Located(name, {}), None, Located(name, {}))

    monkeypatch.setattr(msbd.load, "locate_restorer", locate)
    args = build_parser().parse_args([*small, *more.split()])
    found, notes = command_line.find_model(args)
    assert (asked["name"], found.method) == (model, method)
    if method == "bicubic":
        assert notes == []
    else:
        (note,) = notes
        assert note.startswith(f"model {model}: ") and said in note and "\n" not in note
        assert ("python -m" in note) == bool(said)


@pytest.mark.parametrize("mode", ["colorize", "stylize"])
def test_an_upscaler_has_no_other_modes(
    mode: str, small: list[str], base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused([*small, "--model", str(base / "rrdb.safetensors"), "--mode", mode], capsys, tmp_path)
    assert f"an upscaler, which has no --mode {mode}" in line


def test_an_upscaler_alone_is_a_model_and_runs_without_any_other_net(
    small: list[str], base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    upscaler = str(base / "rrdb.safetensors")
    assert main([*small, "--model", upscaler]) == 0
    assert capsys.readouterr().err == ""
    found, pixels = stored(tmp_path / "out.png"), read(tmp_path / "out.png")
    assert (found["model"], found["method"]) == ("rrdb.safetensors", "rrdb") and pixels.shape == (80, 64, 3)
    for other in (["--model", str(base), "--method", "rrdb"], ["--upscaler", upscaler]):
        assert main([*small, *other]) == 0
        assert np.array_equal(read(tmp_path / "out.png"), pixels)
    assert main([*small, "--model", upscaler, "--method", "pasd"]) == 1
    assert "rrdb.safetensors: an upscaler and nothing else, no controlnet there" in capsys.readouterr().err


def test_an_upscaler_that_is_none_is_refused_and_another_ones_is_named(
    small: list[str],
    base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    upscaler = locate_model(base / "rrdb.safetensors")
    monkeypatch.setattr(msbd.load, "find_enlarger", lambda: upscaler)
    for words in (["--upscaler", "mini-style"], ["--model", "mini-style", "--method", "rrdb"]):
        line = refused([*small, *words], capsys, tmp_path)
        assert "mini-style: a LoRA (" in line and line.endswith("take it with --lora\n")
    line = refused([*small, "--upscaler", str(base / "vae.safetensors")], capsys, tmp_path)
    assert "no rrdb there; it has vae" in line
    model = str(MINI / "pasd.safetensors")
    assert main([*small, "--model", model, "--method", "rrdb"]) == 0
    note = f"note: {model} comes without an upscaler: {base / 'rrdb.safetensors'} enlarges, which is on this machine"
    assert note in capsys.readouterr().err
    assert stored(tmp_path / "out.png")["model"] == "rrdb.safetensors"


def test_what_is_not_used_is_not_in_the_results_metadata(
    small: list[str], base: Path, tmp_path: Path
) -> None:
    more = ["--lora", "not-there.safetensors", "--vae", "neither", "--upscaler", "nor-this"]
    assert (
        main([*small, "--model", str(base / "rrdb.safetensors"), "--method", "rrdb", *more[:4], "--quiet"])
        == 0
    )
    found = stored(tmp_path / "out.png")
    assert (found["vae"], found["loras"]) == (None, None)
    assert main([*small, "--method", "bicubic", *more, "--quiet"]) == 0
    assert stored(tmp_path / "out.png")["model"] is None


def test_loras_of_two_samplings_set_none(job: list[str]) -> None:
    args = build_parser().parse_args([*job, "--lora", "lcm-lora", "--lora", "hyper-sd15-4step"])
    assert restore_config(args).sampler == "unipc"
    (note,) = command_line.remarks(
        args, msbd.load.RestoreModel("pasd", Located("x", {}), None, Located("x", {}))
    )
    assert note.startswith("lcm-lora, hyper-sd15-4step: made for different samplings, none is set")


def test_rrdb_cleans_a_picture_at_its_own_size_too(small: list[str], base: Path, tmp_path: Path) -> None:
    assert main([*small, "--model", str(base / "rrdb.safetensors"), "--scale", "1"]) == 0
    result, source = read(tmp_path / "out.png"), read(tmp_path / "in.png")
    assert result.shape == source.shape and not np.array_equal(result, source)


def test_what_does_not_apply_is_noted(
    small: list[str], base: Path, job: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    more = [
        "--model",
        str(base / "rrdb.safetensors"),
        "--steps",
        "3",
        "-p",
        "x",
        "--preset",
        "fast",
        "--dry-run",
    ]
    assert main([*small, *more]) == 0
    out, err = capsys.readouterr()
    assert (
        err.startswith("note: --preset, --prompt, --steps: not used by method rrdb") and err.count("\n") == 1
    )
    assert "without diffusion" in out
    assert main([*job, "--upscaler", str(base / "rrdb.safetensors"), "--dry-run"]) == 0
    assert "note: --upscaler: not used by method pasd; --method rrdb uses it" in capsys.readouterr().err


def test_a_known_lora_brings_its_sampling_and_flags_overrule_it(job: list[str]) -> None:
    args = build_parser().parse_args(
        [*[word for word in job if word not in ("--steps", "2")], "--lora", "lcm-lora"]
    )
    config = restore_config(args)
    assert (config.sampler, config.num_inference_steps, config.guidance_scale) == ("lcm", 4, 1.0)
    args = build_parser().parse_args(
        [*job, "--lora", "lcm-lora", "--preset", "fast", "--guidance-scale", "2"]
    )
    config = restore_config(args)
    assert (config.sampler, config.num_inference_steps, config.guidance_scale) == ("lcm", 2, 2.0)
    model = msbd.load.RestoreModel("pasd", Located("x", {}), None, Located("x", {}))
    (note,) = command_line.remarks(args, model)
    assert note.startswith("lcm-lora: --sampler lcm --steps 4 --guidance-scale 1.0, as it was made for")


def test_another_autoencoder_is_taken(job: list[str], tmp_path: Path) -> None:
    torch.manual_seed(9)
    write_part(tmp_path, "vae", AutoencoderKL(VAE))
    assert main(job) == 0
    before = read(tmp_path / "out.png")
    assert main([*job, "--vae", str(tmp_path / "vae.safetensors")]) == 0
    assert not np.array_equal(read(tmp_path / "out.png"), before)
    assert re.fullmatch(r"vae\.safetensors \([0-9a-f]{10}\)", stored(tmp_path / "out.png")["vae"])


@pytest.mark.enlarge
def test_a_photograph_is_enlarged_by_real_weights_without_a_flag(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = load_image(ROOT / "examples" / "coffee.jpg").pixels[120:152, 300:340]
    Image.fromarray(photo).save(tmp_path / "photo.jpg", quality=95)
    assert main(["-i", str(tmp_path / "photo.jpg"), "-o", str(tmp_path / "large.png")]) == 0
    assert "note: model realesrgan-x4plus: " in capsys.readouterr().err
    found = stored(tmp_path / "large.png")
    assert (found["model"], found["method"]) == ("realesrgan-x4plus", "rrdb")
    large = read(tmp_path / "large.png").astype(float)
    assert large.shape == (128, 160, 3)
    small = np.asarray(Image.fromarray(large.astype(np.uint8)).resize((40, 32), Image.Resampling.BOX))
    assert abs(small.astype(float) - photo).mean() < 8  # levels: it shows the same


# ---- a folder ----------------------------------------------------------------------------------------------


def test_a_bad_file_of_a_folder_does_not_stop_the_others(
    album: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*album, "--compare", str(tmp_path / "looks")]) == 1
    assert sorted(path.name for path in (tmp_path / "restored").glob("*.png")) == ["a.png", "c.png"]
    assert sorted(path.name for path in (tmp_path / "looks").iterdir()) == ["a.jpg", "c.jpg"]
    assert read(tmp_path / "restored" / "c.png").shape == (36, 32, 3)
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()] == ["1/3", "2/3", "3/3"]
    assert out.splitlines()[1].startswith(f"2/3 failed: {tmp_path / 'album' / 'b.png'}: not a readable")
    left_out, first, last = err.splitlines()
    assert left_out == f"note: {tmp_path / 'album'}: left out: 1 file (.txt)"
    assert first.startswith(f"error: {tmp_path / 'album' / 'b.png'}: not a readable picture")
    assert last == "error: 1 of 3 pictures failed; see above"


def test_skip_existing_restores_only_what_is_missing(
    album: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "restored").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "restored" / name).write_text("there already")
    assert main([*album, "--skip-existing"]) == 0
    assert (tmp_path / "restored" / "a.png").read_text() == "there already"
    assert read(tmp_path / "restored" / "c.png").shape == (36, 32, 3)
    told, line = capsys.readouterr().out.splitlines()
    assert told == "2 of 3 pictures are there already" and line.startswith("1/1 ")
    monkeypatch.setattr(msbd.load, "load_restore_pipeline", None)  # nothing left: no weights are read
    assert main([*album, "--skip-existing"]) == 0
    assert main([*album, "--skip-existing", "--dry-run"]) == 0


def test_pictures_of_a_folder_never_share_a_result(
    tmp_path: Path, model: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.png", "a.jpg", "a.jpg.png", "b.png"):
        write_picture(tmp_path / "album" / name)
    job = quick(tmp_path / "album", tmp_path / "restored", model, base)
    assert main([*job, "--method", "bicubic", "--quiet"]) == 0
    names = {path.name for path in (tmp_path / "restored").glob("*.png")}
    assert names == {"a.png.png", "a.jpg.png", "a.jpg.png.png", "b.png"}


def test_a_picture_too_large_for_memory_does_not_stop_the_others(
    album: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "album" / "b.png").unlink()
    whole = RestorePipeline.__call__

    def limited(self: RestorePipeline, image: torch.Tensor, *args: Any, **options: Any) -> Any:
        if image.shape[-1] == 15:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried ...")
        return whole(self, image, *args, **options)

    monkeypatch.setattr(RestorePipeline, "__call__", limited)
    assert main(album) == 1
    assert [path.name for path in (tmp_path / "restored").glob("*.png")] == ["c.png"]
    _, first, _ = capsys.readouterr().err.splitlines()
    assert first.startswith(f"error: {tmp_path / 'album' / 'a.png'}: out of memory; take a smaller --scale")


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    "change, reason",
    [
        (["-o", "{folder}/album"], "--output is the folder of the pictures"),
        (["-o", "{folder}/album/a.png"], "--output takes a folder, as there are many"),
        (["-i", "{folder}/empty"], "no pictures there (.png, .jpg"),
        (["--steps", "0"], "--steps is 0"),
        (["--steps", "1000"], "num_steps is 1000"),
        (["--fidelity", "2"], "fidelity is 2.0"),
        (["--sampler", "lcm", "--spacing", "leading"], "lcm has timesteps of its own"),
    ],
)
def test_a_folder_is_refused_before_anything_is_written(
    change: list[str], reason: str, album: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    words = [word.format(folder=tmp_path) for word in change]
    job = replaced(album, *words) if words[0] in ("-i", "-o", "--steps") else [*album, *words]
    assert reason in refused(job, capsys, tmp_path)


@pytest.mark.usefixtures("no_model")
def test_a_comparison_of_a_folder_takes_a_folder(
    album: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "looks.jpg").touch()
    reason = refused([*album, "--compare", str(tmp_path / "looks.jpg")], capsys, tmp_path)
    assert "--compare takes a folder" in reason


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("kind", ["job", "album"])
def test_a_place_without_permission_is_refused(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    words = request.getfixturevalue(kind)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    assert "no permission" in refused(words, capsys, tmp_path)


# ---- dry runs, silence, progress ---------------------------------------------------------------------------


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(msbd.load, "ModelParts", None)


@pytest.mark.usefixtures("no_weights")
def test_dry_run_says_what_would_be_done_and_writes_nothing(
    job: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    more = ["--size", "1000x900", "--tile", "512", "--compare", str(tmp_path / "compare.png")]
    assert main([*replaced(job, "--steps", 500), *more, "--dry-run"]) == 0
    assert sorted(tmp_path.rglob("*")) == before
    assert capsys.readouterr().out.splitlines() == [
        "in.png: 15 x 12 -> 1000 x 900, stretched, 9 tiles, 4,500 evaluations",
        "in all 4,500 evaluations, each for both prompts",
    ]


@pytest.mark.usefixtures("no_weights")
def test_dry_run_of_a_folder_counts_all_and_names_what_cannot_be_read(
    album: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert main([*album, "--dry-run", "--guidance-scale", "1", "--process-size", "8"]) == 1
    assert sorted(tmp_path.rglob("*")) == before
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "1/3 a.png: 15 x 12 -> 60 x 48, 2 evaluations",
        "3/3 c.jpg: 8 x 9 -> 32 x 36, 2 evaluations",
        "in all 4 evaluations, without guidance",
    ]
    assert "\n2/3 error: " in err and err.endswith("error: 1 of 3 pictures failed; see above\n")


def test_quiet_prints_nothing(job: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*replaced(job, "-p", "a " * 100), "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


def test_a_prompt_that_is_cut_off_is_noted(job: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*replaced(job, "-p", "a " * 100), "--added-prompt", ""]) == 0
    assert capsys.readouterr().err == "note: a prompt has 102 tokens, the last 25 are cut off\n" * 1


def test_progress_counts_evaluations(job: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, int, int]] = []
    monkeypatch.setattr(_cli.Progress, "__call__", lambda _, at: told.append((at.task, at.step, at.total)))
    assert main(job) == 0
    assert told == [("encode", 1, 1), ("sample", 1, 2), ("sample", 2, 2), ("decode", 1, 1)]


def test_notes_are_printed_and_written(
    job: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = RestorePipeline.__call__
    monkeypatch.setattr(
        RestorePipeline,
        "__call__",
        lambda *a, **k: dataclasses.replace(whole(*a, **k), notes=("went on with 2",)),
    )
    assert main(job) == 0
    assert capsys.readouterr().err == "note: went on with 2\n"
    assert stored(tmp_path / "out.png")["notes"] == "went on with 2"


# ---- what it refuses ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    "flag, value, reason",
    [
        ("-i", "{folder}/none.png", "none.png: there is no such file"),
        ("-i", "{folder}/text.png", "not a readable picture"),
        ("--model", "no-such-model", "known: mini"),
        ("--model", "pasd", "python -m tools.models fetch pasd"),
        ("--model", "{base}", "no controlnet there"),
        ("--base", "{folder}/in.png", "in.png: "),
        ("--base", "no-such-model", "known: mini"),
        ("-o", "{folder}/none/out.png", "does not exist"),
        ("-o", "{folder}/out.bmp", "cannot write pictures of type"),
        ("-o", "{folder}/out", "no suffix"),
        ("-o", "{folder}/in.png", "--output would overwrite what --image reads"),
        ("-o", "{folder}", "--output would overwrite what --image reads"),
        ("-o", "{folder}/link.png", "--output would overwrite what --image reads"),
        ("--steps", "0", "--steps is 0"),
        ("--process-size", "3", "--process-size is 3"),
    ],
)
def test_a_bad_value_is_refused_in_one_line(
    flag: str, value: str, reason: str, job: list[str], tmp_path: Path, base: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "link.png").symlink_to(tmp_path / "in.png")
    assert reason in refused(replaced(job, flag, value.format(folder=tmp_path, base=base)), capsys, tmp_path)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    "more, reason",
    [
        (["--scale", "0"], "--scale is 0.0"),
        (["--scale", "65"], "--scale is 65.0"),
        (["--base-weight", "1.5"], "--base-weight is 1.5"),
        (["--compare", "{folder}/out.png"], "both --output and --compare"),
        (["--compare", "{folder}/a.gif"], "cannot write pictures of type"),
        (["--compare", "{folder}/in.png"], "--compare would overwrite what --image reads"),
        (["--alpha-a", "0.5", "--added-noise-level", "900"], "give one of them"),
        (["--fidelity", "1.5"], "fidelity is 1.5"),
        (["--vae-encoder-tile", "100"], "--vae-encoder-tile is 100; expected a multiple of 8"),
        (["--tile", "128", "--tile-overlap", "128"], "--tile-overlap is 128; expected less than --tile, 128"),
        (["--tile-overlap", "8000"], "--tile-overlap is 8000; expected less than --tile, 1024"),
        (["--tile", "100"], "--tile is 100; expected pixels, a multiple of 8"),
        (["--tile-overlap", "-4"], "--tile-overlap is -4; expected pixels, a multiple of 8"),
        (["--vae-decoder-tile", "63"], "--vae-decoder-tile is 63; expected pixels, a multiple of 8"),
        (["--tile", "32"], "--tile is 32; expected at least 64 (pixels)"),
        (["--preset", "official", "--scale", "2.7"], "enlarges by whole numbers only"),
        (["--preset", "official", "--scale", "1", "--size", "45x36"], None),
        (["--preset", "official", "--size", "45x30"], "enlarges both sides alike"),
        (["--dtype", "float16"], "float32 or bfloat16"),
        (["--lora", "{folder}/none.safetensors"], "none.safetensors"),
        (["--lora", "{base}/unet.safetensors"], "expected a LoRA"),
        (["-o", "{folder}/out.jpg", "--size", "70000x3"], "holds at most 65500 pixels"),
        (["--high-level-info", "caption"], "blip-base"),
    ],
)
def test_a_bad_option_is_refused_in_one_line(
    more: list[str], reason: str | None, job: list[str], tmp_path: Path, base: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    words = [*job, *(word.format(folder=tmp_path, base=base) for word in more)]
    if reason is None:  # --scale and --size
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 2 and "not allowed with argument" in capsys.readouterr().err
    else:
        assert reason in refused(words, capsys, tmp_path)


@pytest.mark.usefixtures("no_model")
def test_a_share_of_no_base_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_picture(tmp_path / "in.png")
    job = ["-i", str(tmp_path / "in.png"), "-o", str(tmp_path / "out.png"), "--model", "mini"]
    assert "of no --base" in refused([*job, "--base-weight", "0.5"], capsys, tmp_path)


@pytest.mark.usefixtures("no_model")
def test_a_transparent_picture_cannot_become_a_jpeg(
    job: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_picture(tmp_path / "in.png", 12, 15, 4)
    assert "transparency" in refused(replaced(job, "-o", tmp_path / "out.jpg"), capsys, tmp_path)


@pytest.mark.parametrize(
    "error, code, line",
    [
        (
            torch.OutOfMemoryError("CUDA out of memory.\nTried ..."),
            1,
            "error: out of memory; take a smaller --scale",
        ),
        (OSError(28, "No space left on device", "x.png"), 1, "error: x.png: No space left on device"),
        (ValueError("two\nlines"), 1, "error: two lines"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
@pytest.mark.parametrize("where", ["load_restore_pipeline", "call"])
def test_errors_while_it_runs_are_one_line(
    where: str, error: BaseException, code: int, line: str, job: list[str], tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def fail(*_: object, **__: object) -> None:
        raise error

    if where == "call":
        monkeypatch.setattr(RestorePipeline, "__call__", fail)
    else:
        monkeypatch.setattr(msbd.load, where, fail)
    assert main(job) == code
    err = capsys.readouterr().err
    assert err.startswith(line) and err.count("\n") == 1 and not (tmp_path / "out.png").exists()
    with pytest.raises(type(error)):
        main([*job, "--debug"])


def test_our_own_mistakes_are_not_hidden(
    album: list[str], job: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(RestorePipeline, "__call__", lambda *_, **__: {}["x"])
    assert main(album) == 1  # a night's work is not lost by one picture
    assert "a.png: KeyError: 'x': a fault of this program; --debug shows where" in capsys.readouterr().err
    for words in (job, [*album, "--debug"]):
        with pytest.raises(KeyError):
            main(words)


@pytest.mark.parametrize(
    "change",
    [
        ["--scale", "nan"],
        ["--scale", "2", "--size", "5x5"],
        ["--size", "5"],
        ["--size", "0x5"],
        ["--size", "5x-5"],
        ["--mode", "best"],
        ["--high-level-info", "captions"],
        ["--lora", "x:y"],
        ["--step", "3"],
        ["--frob"],
    ],
)
def test_wrong_usage_exits_with_2(
    change: list[str], job: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*job, *change])
    assert ended.value.code == 2 and "usage: python -m tools.restore" in capsys.readouterr().err


# ---- options -----------------------------------------------------------------------------------------------


def config_of(*more: str) -> RestoreConfig:
    return restore_config(build_parser().parse_args(["-i", "a", "-o", "b", *more]))


def test_every_option_has_a_flag_and_a_help_text() -> None:
    assert list(OPTIONS) == [field.name for field in dataclasses.fields(RestoreConfig)]
    grouped = [name for names in GROUPS.values() for name in names]
    assert sorted([*grouped, "mode", "fidelity", "num_inference_steps", "seed"]) == sorted(OPTIONS)
    assert set(FLAGS) <= set(OPTIONS)
    assert all(item.metadata["sentence"] for item in dataclasses.fields(RestoreConfig))


# A value of each option that is not its default.
OTHERS: dict[str, str | None] = {
    "fidelity": "0.3", "alpha_a": "0.3", "added_noise_level": "300", "conditioning_scale": "0.3",
    "control_start": "0.3", "control_end": "0.3", "color_fix": "adain", "guidance_scale": "3",
    "guidance_start": "0.3", "guidance_end": "0.3", "added_prompt": "x", "negative_prompt": "x", "prompt_syntax": "webui", "sigma_min": "0.1", "sigma_max": "10",
    "method": "img2img", "sampler": "ddim", "num_inference_steps": "3", "spacing": "leading",
    "final_level": "first", "eta": "0.3", "init_latent_with_noise": None, "offset_noise_scale": "0.3",
    "posterior": "sample", "strength": "0.3", "formulas": "official", "ans": "fallback", "process_size": "300",
    "latent_tiled_size": "240", "latent_tiled_overlap": "24", "tile_batch": "3", "vae_tiling": "fast",
    "encoder_tiled_size": "304", "decoder_tiled_size": "240", "mode": "colorize", "seed": "3",
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_every_flag_reaches_its_option(name: str) -> None:
    flag, value = FLAGS.get(name, "--" + name.replace("_", "-")), OTHERS[name]
    expected: Any = True if value is None else OPTIONS[name].kind(value)
    if name in ("latent_tiled_size", "latent_tiled_overlap", "decoder_tiled_size"):  # flags in pixels
        expected = expected // 8
    found = config_of(flag, *([] if value is None else [value]))
    assert found == dataclasses.replace(config_of(), **{name: expected}) != config_of()


def test_presets_set_values_that_explicit_flags_overrule() -> None:
    assert config_of() == RestoreConfig(seed=0)
    assert config_of("--preset", "official") == RestoreConfig(**official.OPTIONS, seed=0)
    assert config_of("--preset", "fast") == RestoreConfig(num_inference_steps=8, seed=0)
    overruled = config_of("--preset", "official", "--steps", "7", "--posterior", "mean")
    assert overruled == RestoreConfig(
        **{**official.OPTIONS, "num_inference_steps": 7, "posterior": "mean", "seed": 0}
    )
    with pytest.raises(ValueError, match="give one of them"):
        config_of("--alpha-a", "0.1", "--added-noise-level", "3")


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_run(preset: str, job: list[str], tmp_path: Path) -> None:
    assert main([*job, "--preset", preset, "--quiet"]) == 0
    assert stored(tmp_path / "out.png")["preset"] == preset


# Options that change the picture, and what else it takes for that.
CHANGES: list[list[str]] = [
    ["--fidelity", "1"], ["--alpha-a", "1"], ["--added-noise-level", "10"], ["--conditioning-scale", "0.1"],
    ["--control-start", "0.5"], ["--control-end", "0.5"], ["--color-fix", "none"], ["--guidance-scale", "1"],
    ["--guidance-start", "0.5"], ["--guidance-end", "0.5"], ["--added-prompt", "x"], ["--negative-prompt", "x"],
    ["--method", "img2img"], ["--sampler", "ddim"], ["--steps", "3"], ["--spacing", "leading"],
    ["--final-level", "first"], ["--sampler", "ddim", "--eta", "1"], ["--init-latent-with-noise"],
    ["--init-latent-with-noise", "--offset-noise-scale", "1"], ["--posterior", "sample"],
    ["--method", "img2img", "--strength", "1"], ["--formulas", "official"], ["--ans", "fallback"],
    ["--process-size", "200"], ["--tile", "64"], ["--tile", "64", "--tile-overlap", "32"],
    ["--vae-tiling", "fast", "--vae-encoder-tile", "64"],
    ["--vae-tiling", "fast", "--vae-decoder-tile", "64"], ["--base-weight", "0.5"], ["-p", "snow"], ["--seed", "3"],
    ["--mode", "colorize", "--scale", "4"],
]  # fmt: skip


def test_every_option_does_something(
    tmp_path: Path, model: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each picture differs from all others."""
    write_picture(tmp_path / "in.png", 20, 64)
    job = [*quick(tmp_path / "in.png", tmp_path / "out.png", model, base), "--quiet", "--no-metadata"]
    pictures: dict[bytes, list[str]] = {}
    with monkeypatch.context() as patch:
        load = msbd.load.load_restore_pipeline
        loaded: dict[str, RestorePipeline] = {}

        def load_once(*args: Any, **options: Any) -> RestorePipeline:
            key = str((args, options))
            if key not in loaded:
                loaded[key] = load(*args, **options)
            return loaded[key]

        patch.setattr(msbd.load, "load_restore_pipeline", load_once)
        for more in ([], *CHANGES):
            assert main([*job, *more]) == 0
            content = (tmp_path / "out.png").read_bytes()
            assert content not in pictures, f"{more} gives the picture of {pictures[content]}"
            pictures[content] = more
    # What changes none: --tile-batch, but memory; --high-level-info, --device and --dtype have tests of their
    # own.


def test_help_says_what_the_fields_say() -> None:
    flat = " ".join(build_parser().format_help().split())
    assert "--steps N diffusion steps (default: 20)" in flat and "--scale X times larger (default: 4;" in flat
    assert (
        "--vae-decoder-tile N side of the tiles of its decoder, in pixels (default: 1792)" in flat
    )  # 224 latent cells


@pytest.mark.parametrize(
    "given, expected",
    [([], ("detection",)), (["--high-level-info", "none"], ()), (["--method", "bicubic"], ())],
)
def test_what_is_recognised_enters_the_prompt(
    given: list[str],
    expected: tuple[str, ...],
    job: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[str, ...]] = []

    def load(kinds: tuple[str, ...], *_: object) -> dict[str, str]:
        asked.append(tuple(kinds))
        return {}

    recognise: Callable[..., list[str]] = lambda image, kinds, models: ["a noisy dog"]  # noqa: E731
    monkeypatch.setattr("msbd.loading.captions.available", lambda: ("detection",))
    monkeypatch.setattr("msbd.loading.captions.load_captioners", load)
    monkeypatch.setattr("msbd.restore.captions.describe", recognise)
    assert main([*job, *given]) == 0
    assert asked == [expected] * bool(expected)
    if expected:
        assert stored(tmp_path / "out.png")["prompt"].startswith("a red house, a clean dog, clean, ")
    assert command_line.KINDS == ("classification", "detection", "caption")
