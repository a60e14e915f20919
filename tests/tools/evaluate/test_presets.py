"""`tools.evaluate presets` and `seams`: what they ask for and what they tell."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from msbd.edit.config import EditConfig
from msbd.edit.decode import stage_picture
from msbd.load import load_edit_pipeline
from tools.evaluate import presets
from tools.evaluate.__main__ import main
from tools.evaluate.edit import EditTrial, make_task
from tools.evaluate.presets import picture_record, tried
from tools.evaluate.seams import SEAMS, decode_by, sample

TINY = ("--scenes", "2", "--size", "96", "--steps", "2", "--device", "cpu")


def test_presets_are_measured_in_parts_and_in_pairs(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["presets", "--model", model, *TINY, "--presets", "fast", "--seam", "none"]
    words += ["--also", "default=--steps 2 --seam none"]
    assert main([*words, "--start", "1", "--quiet", "--pictures", str(tmp_path / "p")]) == 0
    assert main([*words, "--json", str(tmp_path / "f.json")]) == 0
    table = capsys.readouterr().out
    assert "default - fast" in table and "asked object" in table
    assert len(list((tmp_path / "p").glob("001 *.png"))) == 3  # source and two presets
    figures = {f["name"]: f for f in json.loads((tmp_path / "f.json").read_text())["figures"]}
    work, less = figures["default: evaluations"], figures["default - fast: evaluations"]
    assert less["count"] == work["count"] == 2
    assert less["value"] == pytest.approx(work["value"] - figures["fast: evaluations"]["value"])
    monkeypatch.setattr(presets, "edited", None)  # all of it is known
    assert main(words) == 0


def test_any_setting_can_be_measured_beside_the_presets() -> None:
    assert tried("a", "") == EditTrial("a", EditConfig.default())
    assert tried("a", "--steps 16 --repaint-steps 0").config == EditConfig.default(
        num_steps=16, repaint_steps=0
    )
    assert tried("a", "--preset paper --seam none").config == EditConfig(seam="none")
    few = tried("few", "--lora mini-few-step:0.5")
    assert few.loras == (("mini-few-step", 0.5),)
    assert few.config is not None and few.config.sampler == "lcm"
    assert few.key != EditTrial("few", few.config).key
    for flags, said in (
        ("--steps", "--steps"),
        ("--wrong 3", "--also a=--wrong 3: --wrong 3 is not taken here"),
        ("--sampler 'ddim", "--also a=--sampler 'ddim: No closing quotation"),
        ("--steps 0", "--steps"),
    ):
        with pytest.raises(ValueError, match=said):
            tried("a", flags)


def test_a_setting_may_have_a_lora_and_all_of_them_are_drawn(model: str, tmp_path: Path) -> None:
    zeros = {"lora_A": torch.zeros(2, 4, 3, 3), "lora_B": torch.zeros(8, 2, 1, 1)}
    save_file({f"unet.conv_in.{part}.weight": t for part, t in zeros.items()}, tmp_path / "none.safetensors")
    flags = "--steps 2 --seam none --first-stage-batch 1"
    words = ["presets", "--model", model, *TINY, "--presets", "fast", "--seam", "none"]
    words += ["--also", f"without={flags}", "--also", f"with={flags} --lora {tmp_path / 'none.safetensors'}"]
    words += ["--plot", str(tmp_path / "new" / "work.png"), "--json", str(tmp_path / "f.json")]
    assert main(words) == 0
    figures = {f["name"]: f["value"] for f in json.loads((tmp_path / "f.json").read_text())["figures"]}
    assert figures["with: CLIP score x 100"] == figures["without: CLIP score x 100"]  # it changes nothing
    assert Image.open(tmp_path / "new" / "work.png").size[0] > 600


def test_a_tiled_edit_is_told_what_its_tiles_do(model: str) -> None:
    task = make_task(3, 192)
    pipe = load_edit_pipeline(model)
    result = pipe(task.image, task.mask, "", config=EditConfig.default(num_steps=2, tile=48, grid_overlap=16))
    record = picture_record(task.image, task.mask, result)
    assert record["evaluations"] == result.plan.evaluations
    assert len(result.plan.stages[-1].grid) > 4 and 0 < record["border"] < 10


def test_seams_are_compared_on_the_same_latents(model: str) -> None:
    pipe = load_edit_pipeline(model)
    sampled = sample(pipe, make_task(0, 96), EditConfig.default(num_steps=2, decoderopt_steps=2))
    assert pipe.stage_picture is stage_picture  # the pipeline was left as it was
    found = {seam: decode_by(pipe, sampled, SEAMS[seam]) for seam in SEAMS if seam != "asymmetric"}
    values = {seam: record for seam, (_, record) in found.items()}
    assert values["none"]["change"] == 0 and "psnr" not in values["membrane"]
    assert values["closed-form"]["psnr"] > values["none"]["psnr"]
    assert values["membrane"]["step"] < values["none"]["step"]
    assert values["adam"]["change"] > 0 and values["adam-ring"]["change"] > 0
    assert torch.equal(decode_by(pipe, sampled, SEAMS["none"])[0], found["none"][0])


def test_seams_of_scenes_and_of_a_picture(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    some = ["--seams", "none", "membrane", "--model", model]
    assert main(["seams", *TINY, *some, "--pictures", str(tmp_path), "--json", str(tmp_path / "s.json")]) == 0
    assert "change inside, levels" in capsys.readouterr().out
    names = {path.name for path in tmp_path.glob("000*")}
    assert names == {"000 source.png", "000 none.png", "000 membrane.png"}
    figures = {f["name"]: f for f in json.loads((tmp_path / "s.json").read_text())["figures"]}
    assert figures["none: change inside, levels"]["count"] == 2
    examples = Path(__file__).parents[3] / "examples"
    picture = ["-i", str(examples / "coffee.jpg"), "-m", str(examples / "coffee_mask.png"), "-p", "a ball"]
    assert main(["seams", *picture, *some, "--steps", "2"]) == 0
    assert "membrane" in capsys.readouterr().out
    assert main(["seams", *picture[:2], *some]) == 1
    assert "--image, --mask and --prompt go together" in capsys.readouterr().err


def test_presets_of_a_picture_tell_what_needs_no_truth(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    examples = Path(__file__).parents[3] / "examples"
    picture = ["-i", str(examples / "coffee.jpg"), "-m", str(examples / "coffee_mask.png"), "-p", "a ball"]
    words = ["presets", "--model", model, *picture, "--presets", "fast", "default", "--steps", "1"]
    assert main([*words, "--plot", str(tmp_path / "work.png")]) == 0
    assert (tmp_path / "work.png").exists()
    head, _, *lines = capsys.readouterr().out.splitlines()
    assert "across tiles" in head and "asked" not in head
    assert [line.split()[0] for line in lines[:3]] == ["fast", "default", "default"]
    for wrong, said in (
        (["--also", "fast=--steps 1"], "'fast' is the name of 2 settings"),
        (["--also", "a/b=--steps 1"], "without slashes"),
        (["-m", str(examples / "chelsea_mask.png")], "the mask has 451 x 300 pixels"),
    ):
        assert main([*words, *wrong]) == 1
        assert said in capsys.readouterr().err
