"""`python -m tools.edit` on a model of tiny random nets: what it writes,
and that it refuses before it writes.
"""

import ast
import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

import msbd.load
from msbd.edit import official
from msbd.edit.config import DEFAULT, EditConfig
from tests.helpers.tiny_bundle import write_tiny_bundle
from tools import _cli
from tools.edit import FLAGS, GROUPS, OPTIONS, PRESETS, build_parser, edit_config, main
from weights.files import write_safetensors

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
QUICK = ("--steps", "3", "--repaint-steps", "1", "--first-stage-batch", "2", "--decoderopt-steps", "1")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def write_picture(path: Path, height: int, width: int, channels: int = 3, **options: Any) -> np.ndarray:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return pixels


def write_mask(path: Path, size: tuple[int, int], *windows: tuple[slice, slice]) -> np.ndarray:
    mask = np.zeros(size, np.uint8)
    for window in windows:
        mask[window] = 255
    Image.fromarray(mask).save(path)
    return mask > 0


@pytest.fixture
def job(tmp_path: Path, model: Path) -> list[str]:
    """A sound command for a picture of 40 x 56 pixels, with quick settings."""
    write_picture(tmp_path / "in.png", 40, 56)
    write_mask(tmp_path / "mask.png", (40, 56), (slice(10, 30), slice(20, 44)))
    return command(tmp_path, model)


def command(folder: Path, model: Path) -> list[str]:
    files = ["-i", str(folder / "in.png"), "-m", str(folder / "mask.png"), "-o", str(folder / "out.png")]
    return [*files, "-p", "a red house", "--model", str(model), "--device", "cpu", *QUICK]


def replaced(job: list[str], flag: str, value: object) -> list[str]:
    place = job.index(flag) + 1
    return [*job[:place], str(value), *job[place + 1 :]]


def read(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.array(picture)


def refused(job: list[str], capsys: pytest.CaptureFixture[str], folder: Path) -> str:
    """The one line on stderr of a command that exits with 1 and writes nothing."""
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert main(job) == 1
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n")
    return err


# ---- what it writes ----------------------------------------------------------------------------------------

SHAPES = {
    "odd size": ((53, 37), [(slice(12, 40), slice(5, 30))]),
    "one pixel": ((40, 40), [(slice(7, 8), slice(30, 31))]),
    "whole picture": ((48, 40), [(slice(None), slice(None))]),
    "wide and thin": ((40, 600), [(slice(18, 22), slice(10, 590))]),
    "along all borders": ((44, 60), [(slice(0, 2), slice(None)), (slice(-2, None), slice(None)),
                                     (slice(None), slice(0, 2)), (slice(None), slice(-2, None))]),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_outside_the_mask_every_byte_is_the_sources(shape: str, tmp_path: Path, model: Path) -> None:
    size, windows = SHAPES[shape]
    pixels = write_picture(tmp_path / "in.png", *size)
    mask = write_mask(tmp_path / "mask.png", size, *windows)
    assert main(command(tmp_path, model)) == 0
    result = read(tmp_path / "out.png")
    assert result.shape == pixels.shape and np.array_equal(result[~mask], pixels[~mask])
    assert not np.array_equal(result[mask], pixels[mask])


def test_the_same_command_gives_the_same_bytes_and_another_seed_others(
    job: list[str], tmp_path: Path
) -> None:
    assert main(job) == 0
    first = (tmp_path / "out.png").read_bytes()
    assert main(job) == 0
    assert (tmp_path / "out.png").read_bytes() == first
    assert main([*job, "--seed", "1"]) == 0
    assert not np.array_equal(read(tmp_path / "out.png"), read_bytes(first))


def read_bytes(data: bytes) -> np.ndarray:
    import io

    return np.array(Image.open(io.BytesIO(data)))


def test_the_file_says_how_it_was_made(job: list[str], tmp_path: Path, model: Path) -> None:
    assert main([*job, "--seed", "7", "--negative-prompt", "blurry"]) == 0
    with Image.open(tmp_path / "out.png") as picture:
        stored, text = json.loads(picture.info["msbd"]), picture.info["parameters"]
    assert text.startswith("a red house\nNegative prompt: blurry\n") and "Seed: 7" in text
    expected = {
        "prompt": "a red house",
        "seed": 7,
        "num_steps": 3,
        "guidance_scale": 3.0,
        "tile": 48,
        "preset": "default",
    }
    assert stored.items() >= expected.items()
    assert stored["model"] == model.name and stored["model_hash"] == msbd.load.model_hash(model)
    assert stored["method"] == "msbd" and stored.keys() >= {
        item.name for item in dataclasses.fields(EditConfig)
    }
    assert stored["msbd"] == _cli.version() and stored["torch"] == torch.__version__
    assert str(tmp_path) not in text  # nobody's folders
    assert main([*job, "--no-metadata"]) == 0
    with Image.open(tmp_path / "out.png") as picture:
        assert not {"msbd", "parameters"} & picture.info.keys()


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_transparency_and_colour_profile_are_kept(suffix: str, job: list[str], tmp_path: Path) -> None:
    pixels = write_picture(tmp_path / "in.png", 40, 56, 4, icc_profile=SRGB)
    mask = read(tmp_path / "mask.png") > 0
    assert main(replaced(job, "-o", tmp_path / f"out.{suffix}")) == 0
    with Image.open(tmp_path / f"out.{suffix}") as picture:
        result, profile = np.array(picture), picture.info["icc_profile"]
    assert profile == SRGB and np.array_equal(result[~mask], pixels[~mask])
    assert (result[mask][:, 3] == 255).all()  # what was painted can be seen


def test_mask_from_alpha_edits_what_is_transparent_and_gives_an_opaque_picture(
    tmp_path: Path, model: Path
) -> None:
    pixels = write_picture(tmp_path / "in.png", 40, 56, 4)
    pixels[..., 3] = 255
    pixels[10:30, 20:44, 3] = 0
    Image.fromarray(pixels).save(tmp_path / "in.png")
    job = command(tmp_path, model)
    job[2:4] = ["--mask-from-alpha"]
    assert main(replaced(job, "-o", tmp_path / "out.jpg")) == 0  # opaque, so that a JPEG can hold it
    assert main(job) == 0
    result = read(tmp_path / "out.png")
    hidden = pixels[..., 3] == 0
    assert result.shape == (40, 56, 3) and np.array_equal(result[~hidden], pixels[~hidden][:, :3])


def test_invert_mask_swaps_what_is_edited(job: list[str], tmp_path: Path) -> None:
    assert main([*job, "--invert-mask"]) == 0
    mask = read(tmp_path / "mask.png") > 0
    pixels, result = read(tmp_path / "in.png"), read(tmp_path / "out.png")
    assert np.array_equal(result[mask], pixels[mask]) and not np.array_equal(result[~mask], pixels[~mask])


def test_resize_mask_stretches_a_mask_of_another_size(job: list[str], tmp_path: Path) -> None:
    write_mask(tmp_path / "mask.png", (20, 28), (slice(5, 15), slice(10, 22)))
    assert main([*job, "--resize-mask"]) == 0
    pixels, result = read(tmp_path / "in.png"), read(tmp_path / "out.png")
    changed = (pixels != result).any(axis=2)
    assert changed[10:30, 20:44].mean() > 0.9 and not changed[:10].any() and not changed[:, :20].any()


def test_sheets_and_stage_pictures_are_written(
    job: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_picture(tmp_path / "in.png", 120, 900)
    write_mask(tmp_path / "mask.png", (120, 900), (slice(20, 100), slice(100, 260)))
    more = {"--compare": "compare.jpg", "--candidates": "candidates.png", "--stages": "stages"}
    assert main([*job, *(word for flag, name in more.items() for word in (flag, str(tmp_path / name)))]) == 0
    assert read(tmp_path / "compare.jpg").shape[1] == pytest.approx(1600, abs=4)
    sheet = read(tmp_path / "candidates.png")
    assert (sheet == (220, 30, 30)).all(axis=2).sum() > 300  # the frame of the chosen one
    names = sorted(path.name for path in (tmp_path / "stages").iterdir())
    assert names[:3] == [
        "01-first-stage-source.png",
        "02-first-stage-mask.png",
        "03-first-stage-candidate-0.png",
    ]
    assert [name[:2] for name in names] == [f"{n:02}" for n in range(1, len(names) + 1)]
    out, err = capsys.readouterr()
    assert re.search(r"^first stage +\d+\.\d s \(sample", out)
    said = dict(line.split(None, 1) for line in out.splitlines()[-4:])
    names_said = {
        "result": "out.png",
        "comparison": "compare.jpg",
        "candidates": "candidates.png",
        "stages": "stages",
    }
    assert said == {what: str(tmp_path / name) for what, name in names_said.items()}
    assert "stage 2" in out and err == ""  # no progress bar where stderr is no terminal


def test_quiet_prints_nothing(job: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*job, "--quiet", "--negative-prompt", "a " * 100]) == 0
    assert capsys.readouterr() == ("", "")


def test_a_prompt_that_is_cut_off_is_noted(job: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(replaced(job, "-p", "a " * 100)) == 0
    assert capsys.readouterr().err == "note: a prompt has 102 tokens, the last 25 are cut off\n"


def test_a_lora_changes_the_picture_and_is_named_in_the_file(job: list[str], tmp_path: Path) -> None:
    tensors = {
        "unet.conv_in.lora_A.weight": torch.ones(2, 4, 3, 3),
        "unet.conv_in.lora_B.weight": torch.ones(8, 2, 1, 1),
    }
    write_safetensors(tmp_path / "style.safetensors", tensors)
    assert main(job) == 0
    before = np.asarray(Image.open(tmp_path / "out.png"))
    assert main([*job, "--lora", f"{tmp_path / 'style.safetensors'}:0.5"]) == 0
    after = Image.open(tmp_path / "out.png")
    assert not np.array_equal(before, np.asarray(after))
    assert any("style.safetensors:0.5" in str(text) for text in after.info.values())


def test_dry_run_counts_and_writes_nothing(
    job: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(msbd.load, "ModelParts", None)  # and needs no weights
    before = sorted(tmp_path.rglob("*"))
    more = ["--stages", str(tmp_path / "stages"), "--compare", str(tmp_path / "compare.png")]
    assert main([*job, *more, "--dry-run"]) == 0
    assert sorted(tmp_path.rglob("*")) == before
    out = capsys.readouterr().out
    assert "56 x 40 pixels, 480 of them masked" in out
    assert "2 candidates, 12 evaluations" in out  # 3 steps, each repeated once, x 2


def test_mode_is_understood_as_method(job: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*job, "--method", "segments", "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert main([*job, "--mode", "segments", "--dry-run"]) == 0
    assert capsys.readouterr() == (plan, "note: --mode is now --method\n")


# ---- what it refuses ---------------------------------------------------------------------------------------


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is to be found out before weights are read."""
    monkeypatch.setattr(msbd.load, "load_edit_pipeline", None)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    "flag, value, reason",
    [
        ("-i", "{folder}/none.png", "there is no such file"),
        ("-i", "{folder}/text.png", "not a readable picture"),
        ("-i", "{folder}", "--output takes a folder, as there are many pictures"),
        ("-m", "{folder}/none.png", "there is no such file"),
        ("-m", "{folder}/small.png", "--resize-mask"),
        ("-m", "{folder}/black.png", "the mask is empty"),
        ("--model", "no-such-model", "known: mini"),
        ("--model", "sd-v1-5", "python -m tools.models fetch sd-v1-5"),
        ("--model", "{folder}", "no model's folder"),
        ("-o", "{folder}/none/out.png", "does not exist"),
        ("-o", "{folder}", "a folder"),
        ("-o", "{folder}/out.bmp", "cannot write pictures of type"),
        ("-o", "{folder}/out", "no suffix"),
        ("-o", "{folder}/in.png", "--output would overwrite what --image reads"),
        ("-o", "{folder}/sub/../mask.png", "--output would overwrite what --mask reads"),
        ("-o", "{folder}/link.png", "--output would overwrite what --image reads"),
        ("--steps", "0", "--steps is 0"),
        ("--steps", "1001", "num_steps is 1001"),
        ("--first-stage-batch", "0", "--first-stage-batch is 0"),
    ],
)
def test_a_bad_value_is_refused_in_one_line(
    flag: str, value: str, reason: str, job: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "link.png").symlink_to(tmp_path / "in.png")
    write_mask(tmp_path / "small.png", (20, 28), (slice(0, 9), slice(0, 9)))
    write_mask(tmp_path / "black.png", (40, 56))
    assert reason in refused(replaced(job, flag, value.format(folder=tmp_path)), capsys, tmp_path)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    "more, reason",
    [
        (["--compare", "{folder}/out.png"], "both --output and --compare"),
        (
            ["--compare", "{folder}/a.png", "--candidates", "{folder}/a.png"],
            "both --compare and --candidates",
        ),
        (["--candidates", "{folder}/mask.png"], "--candidates would overwrite what --mask reads"),
        (["--compare", "{folder}/a.gif"], "cannot write pictures of type"),
        (["--stages", "{folder}/none/stages"], "does not exist"),
        (["--stages", "{folder}/in.png"], "takes a folder"),
        (["--stages", "{folder}/out.png"], "--stages could overwrite what --output names"),
        (["--eta", "2"], "eta is 2"),
        (["--tile", "50"], "multiples of 16"),
        (["--grid-overlap", "48"], "overlap"),
        (["--margin", "0.5"], "margin is 0.5"),
        (["--repaint-jump", "0"], "--repaint-jump is 0"),
        (["--dtype", "float16"], "float32 or bfloat16"),
        (["--invert-mask", "-m", "{folder}/white.png"], "the mask is empty"),
    ],
)
def test_a_bad_option_is_refused_in_one_line(
    more: list[str], reason: str, job: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_mask(tmp_path / "white.png", (40, 56), (slice(None), slice(None)))
    if "--grid-overlap" in more:  # only a picture that needs tiles finds out
        write_picture(tmp_path / "in.png", 120, 120)
        write_mask(tmp_path / "mask.png", (120, 120), (slice(5, 110), slice(5, 110)))
    assert reason in refused([*job, *(word.format(folder=tmp_path) for word in more)], capsys, tmp_path)


@pytest.mark.usefixtures("no_model")
def test_stages_do_not_overwrite_an_input(
    job: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.png").rename(tmp_path / "01-first-stage-source.png")
    moved = replaced(job, "-i", tmp_path / "01-first-stage-source.png")
    assert "what --image names" in refused([*moved, "--stages", str(tmp_path)], capsys, tmp_path)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("flag, name", [("--image", "in.png"), ("--mask", "mask.png")])
def test_stages_do_not_overwrite_what_a_link_leads_to(
    flag: str, name: str, job: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "stages").mkdir()
    target = (tmp_path / name).rename(tmp_path / "stages" / "01-first-stage-source.png")
    (tmp_path / name).symlink_to(target)
    reason = f"{name}: --stages could overwrite what {flag} names; take another folder"
    assert reason in refused([*job, "--stages", str(tmp_path / "stages")], capsys, tmp_path)


@pytest.mark.usefixtures("no_model")
def test_a_transparent_picture_cannot_become_a_jpeg(
    job: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_picture(tmp_path / "in.png", 40, 56, 4)
    assert "transparency" in refused(replaced(job, "-o", tmp_path / "out.jpg"), capsys, tmp_path)


@pytest.mark.usefixtures("no_model")
def test_mask_from_alpha_needs_transparency(
    job: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job[2:4] = ["--mask-from-alpha"]
    assert "without transparency" in refused(job, capsys, tmp_path)


@pytest.mark.usefixtures("no_model")
def test_a_place_without_permission_is_refused(
    job: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    assert "no permission" in refused(job, capsys, tmp_path)


@pytest.mark.parametrize(
    "error, code, line",
    [
        (torch.OutOfMemoryError("CUDA out of memory.\nTried ..."), 1, "error: out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "error: out of memory"),
        (OSError(28, "No space left on device", "x.png"), 1, "error: x.png: No space left on device"),
        (ValueError("two\nlines"), 1, "error: two lines"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_while_it_runs_are_one_line(
    error: BaseException, code: int, line: str, job: list[str], tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(msbd.load, "load_edit_pipeline", fail)
    assert main(job) == code
    err = capsys.readouterr().err
    assert err.startswith(line) and err.count("\n") == 1 and not (tmp_path / "out.png").exists()
    with pytest.raises(type(error)):
        main([*job, "--debug"])


def test_our_own_mistakes_are_not_hidden() -> None:
    with pytest.raises(KeyError), _cli.report_errors():
        {}["x"]


@pytest.mark.parametrize(
    "change",
    [
        ["--first-stage-batch", "two"],
        ["--eta", "nan"],
        ["--parts", "half"],
        ["--method", "best"],
        ["--step", "3"],
        ["--frob"],
    ],
)
def test_wrong_usage_exits_with_2(
    change: list[str], job: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*job, *change])
    assert ended.value.code == 2 and "usage: python -m tools.edit" in capsys.readouterr().err


def test_a_mask_is_required() -> None:
    with pytest.raises(SystemExit) as ended:
        main(["-i", "a.png", "-p", "x", "-o", "b.png", "--model", "mini"])
    assert ended.value.code == 2


# ---- options -----------------------------------------------------------------------------------------------


def config_of(*more: str) -> EditConfig:
    return edit_config(build_parser().parse_args(["-i", "a", "-m", "b", "-p", "c", "-o", "d", *more]))


def test_options_have_the_kind_choices_and_default_of_their_fields() -> None:
    assert list(OPTIONS) == [field.name for field in dataclasses.fields(EditConfig)]
    assert OPTIONS["grid_overlap"] == _cli.Option("grid_overlap", int, (), None)
    assert OPTIONS["margin"] == _cli.Option("margin", float, (), 1.4)
    assert OPTIONS["dilate_mask"] == _cli.Option("dilate_mask", bool, (), False)
    assert OPTIONS["rerank_area"] == _cli.Option("rerank_area", str, ("crop", "mask"), "crop")


def test_every_option_has_a_flag_and_a_help_text() -> None:
    grouped = [name for names in GROUPS.values() for name in names]
    assert sorted([*grouped, "num_steps", "seed"]) == sorted(OPTIONS)
    assert set(FLAGS) <= set(OPTIONS)
    assert all(item.metadata["sentence"] for item in dataclasses.fields(EditConfig))


def test_presets_set_values_that_explicit_flags_overrule() -> None:
    assert config_of() == EditConfig.default(seed=0)
    assert config_of("--preset", "paper") == EditConfig(seed=0)
    assert config_of("--no-decoder-optimization") == EditConfig.default(decoder_optimization=False, seed=0)
    assert config_of("--preset", "official") == EditConfig(**{**official.OPTIONS, "seed": 0})
    assert config_of("--preset", "fast") == EditConfig(**PRESETS["fast"], seed=0)
    assert config_of("--preset", "fast", "--steps", "7", "--no-clip-reranking") == EditConfig(
        **{**PRESETS["fast"], "num_steps": 7, "clip_reranking": False, "seed": 0}
    )
    # A flag that says what EditConfig says anyway still overrules the preset.
    assert config_of("--preset", "official", "--margin", "1.4").margin == 1.4


def test_presets_run(job: list[str], tmp_path: Path) -> None:
    for preset in PRESETS:
        assert main([*job, "--preset", preset, "--quiet"]) == 0
        with Image.open(tmp_path / "out.png") as picture:
            assert json.loads(picture.info["msbd"])["preset"] == preset


def test_help_says_what_the_fields_say() -> None:
    flat = " ".join(build_parser().format_help().split())
    assert (
        f"--steps N diffusion steps of a whole run, T of the paper (default: {DEFAULT['num_steps']})" in flat
        and "--eta X" in flat
    )


def test_the_shadow_guard_names_the_intruder(tmp_path: Path) -> None:
    (tmp_path / "nets").mkdir()
    (tmp_path / "nets" / "__init__.py").touch()
    source = ast.unparse(
        ast.parse(
            "import sys; sys.path.insert(0, sys.argv[1]); import tools.edit as e; sys.exit(e.main(sys.argv[2:]))"
        )
    )
    words = ["-i", "a", "-m", "b", "-p", "c", "-o", "d", "--model", "mini"]
    command = [sys.executable, "-c", source, str(tmp_path), *words]
    run = subprocess.run(command, cwd=_cli.ROOT, capture_output=True, text=True)
    assert (
        run.returncode == 1
        and run.stderr.startswith("error: `nets` resolves to")
        and run.stderr.count("\n") == 1
    )
