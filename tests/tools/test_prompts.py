"""Textual inversions and the web interface's prompt syntax through the commands."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from msbd.load import load_edit_pipeline, load_restore_pipeline
from tests.helpers.tiny_bundle import write_pasd_folder, write_tiny_bundle
from tools.edit import main as edit
from tools.models.__main__ import main as models
from tools.restore.__main__ import main as restore
from weights.files import WeightsError, write_safetensors
from weights.tokenizer import PromptTokenizer

QUICK = [
    "--steps",
    "2",
    "--repaint-steps",
    "0",
    "--first-stage-batch",
    "2",
    "--no-decoder-optimization",
    "--device",
    "cpu",
]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture
def word(tmp_path: Path) -> Path:
    """A textual inversion of two vectors, of the tiny text encoder's width."""
    path = tmp_path / "cat-toy.safetensors"
    write_safetensors(
        path, {"emb_params": 3 * torch.randn(2, 16, generator=torch.Generator().manual_seed(1))}
    )
    return path


@pytest.fixture
def job(tmp_path: Path, bundle: Path) -> list[str]:
    Image.fromarray(np.full((64, 64, 3), 90, np.uint8)).save(tmp_path / "in.png")
    Image.fromarray(np.pad(np.full((32, 32), 255, np.uint8), 16)).save(tmp_path / "mask.png")
    files = [
        "-i",
        str(tmp_path / "in.png"),
        "-m",
        str(tmp_path / "mask.png"),
        "-o",
        str(tmp_path / "out.png"),
    ]
    return ["--model", str(bundle), *files, *QUICK]


def levels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def told(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]


def test_an_edit_with_a_learned_word(
    job: list[str], word: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taught = [*job, "--embedding", str(word)]
    assert edit([*job, "-p", "a red cat-toy"]) == 0
    without = levels(tmp_path / "out.png")
    assert edit([*taught, "-p", "a red cat-toy"]) == 0
    capsys.readouterr()
    out = tmp_path / "out.png"
    assert (levels(out) != without).any()
    with Image.open(out) as picture:
        (name,) = json.loads(picture.info["msbd"])["embeddings"]
    assert name.startswith("cat-toy.safetensors (")
    assert edit([*taught, "-p", "a house", "--negative-prompt", "an embedding:cat-toy"]) == 0
    assert told(capsys) == []
    assert edit([*taught, "-p", "a house"]) == 0
    (note,) = told(capsys)
    assert note == f"note: --embedding {word}: no prompt names it; its word is 'cat-toy'"
    assert edit([*job, "-p", "a embedding:house"]) == 0
    (note,) = told(capsys)
    assert "embedding:house: taken for words; give --embedding house.safetensors" in note


def test_an_edit_in_the_web_interfaces_syntax(
    job: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, prompt = tmp_path / "out.png", "(a red ball:1.5) BREAK [on] sand <lora:style:0.8>"
    assert edit([*job, "-p", prompt]) == 0
    plain = levels(out)
    assert len(told(capsys)) == 4
    assert edit([*job, "-p", prompt, "--prompt-syntax", "webui"]) == 0
    assert (levels(out) != plain).any()
    (note,) = told(capsys)
    assert note.endswith("<lora:style:0.8>: left out; give --lora style.safetensors:0.8")
    with Image.open(out) as picture:
        said = json.loads(picture.info["msbd"])
    assert said["prompt"] == prompt and said["prompt_syntax"] == "webui"
    assert edit([*job, "-p", "a red ball", "--prompt-syntax", "webui"]) == 0
    same = levels(out)
    assert edit([*job, "-p", "a red ball"]) == 0
    assert (levels(out) == same).all()
    assert edit([*job, "-p", "a house " * 60, "--prompt-syntax", "webui", "--dry-run"]) == 0
    assert edit([*job, "-p", "a house " * 60, "--prompt-syntax", "webui"]) == 0
    assert told(capsys) == []


def test_a_restoration_with_both(
    bundle: Path, word: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_pasd_folder(tmp_path / "pasd")
    Image.fromarray(np.full((16, 16, 3), 90, np.uint8)).save(tmp_path / "in.png")
    command = [
        "--model",
        str(model),
        "--base",
        str(bundle),
        "-i",
        str(tmp_path / "in.png"),
        "--scale",
        "2",
        "--steps",
        "2",
    ]
    results = []
    for number, more in enumerate(([], ["--embedding", str(word)], ["--prompt-syntax", "webui"])):
        out = tmp_path / f"{number}.png"
        prompt = ["-p", "(a cat-toy:1.4)", "--guidance-scale", "3", "-o", str(out), "--device", "cpu"]
        assert restore([*command, *prompt, *more]) == 0, capsys.readouterr().err
        results.append(levels(out))
    assert (results[0] != results[1]).any() and (results[0] != results[2]).any()
    capsys.readouterr()
    arguments = ["--method", "bicubic", "-i", str(tmp_path / "in.png"), "-o", str(tmp_path / "b.png")]
    assert restore([*arguments, "--embedding", str(word)]) == 0
    assert any("--embedding: not used by method bicubic" in note for note in told(capsys))


def test_keys_names_a_textual_inversion(
    word: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert models(["keys", str(word)]) == 0
    assert "a textual inversion of 2 vectors of width 16, word 'cat-toy'" in capsys.readouterr().out
    assert models(["convert", str(word), "-o", str(tmp_path / "x.safetensors"), "--in-process"]) == 1
    assert "not a model; give it with --embedding" in capsys.readouterr().err


def test_files_that_do_not_fit_are_refused_before_the_work(
    job: list[str], word: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wide, other = tmp_path / "wide.safetensors", tmp_path / "sub" / "CAT-TOY.safetensors"
    other.parent.mkdir()
    write_safetensors(wide, {"emb_params": torch.ones(2, 768)})
    write_safetensors(other, {"emb_params": torch.ones(2, 16)})
    for files, message in (
        ([wide], "vectors of width 768; this model's text encoder has 16"),
        ([word, other], "the word 'CAT-TOY' is that of"),
        ([tmp_path / "none.pt"], "none.pt: no such file"),
    ):
        more = [argument for file in files for argument in ("--embedding", str(file))]
        assert edit([*job, "-p", "a red ball", *more]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out.png").exists()


def test_the_pipelines_take_them_too(bundle: Path, word: Path) -> None:
    pipeline = load_edit_pipeline(bundle, embeddings=[word])
    tokenizer = pipeline.tokenizer
    assert isinstance(tokenizer, PromptTokenizer) and pipeline.clip_tokenizer is tokenizer
    assert tokenizer.has_word("cat-toy", "my Cat-Toy")
    assert pipeline.clip.encode_text(pipeline.clip_tokenizer(["a cat-toy"])).isfinite().all()
    with pytest.raises(ValueError, match="no loras, embeddings"):
        load_restore_pipeline(bundle, method="bicubic", embeddings=[word])
    wide = word.with_name("wide.safetensors")
    write_safetensors(wide, {"emb_params": torch.ones(1, 20)})
    with pytest.raises(WeightsError, match="vectors of width 20"):
        load_edit_pipeline(bundle, embeddings=[wide])
