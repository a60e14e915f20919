"""`python -m tools.models` and `tools.edit` on hostile and broken files:
exit code 1 and one line on stderr, whatever it is.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.helpers.hostile import (
    BLOCKED,
    FILES,
    INERT,
    PICKLES,
    RUNNING,
    archive,
    container,
    entry,
    old,
    running,
    saved,
)
from tests.helpers.tiny_bundle import write_tiny_bundle
from tools import edit
from tools.models import __main__ as models
from weights.files import read_metadata, read_state_dict, write_safetensors

ROOT = Path(__file__).parents[2]
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(autouse=True)
def nothing_hangs() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def refused(capsys: pytest.CaptureFixture[str], main: Callable[[list[str]], int], *words: object) -> str:
    """The one line on stderr of a command that ends with exit code 1."""
    assert main([str(word) for word in words]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.endswith("\n") and error.count("\n") == 1
    assert error[:-1].isprintable() and len(error) < 600 and "Traceback" not in error
    return error


# ---- files that are no weights -----------------------------------------------------------------------------


def test_every_odd_file_is_told_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, canary = tmp_path / "model.ckpt", tmp_path / "canary"
    contents = [case.make() for case in FILES.values()]
    contents += [make(body) for body, _ in PICKLES.values() for make in (archive, old)]
    contents += [archive(running(name, canary, words)) for name, words in (BLOCKED | RUNNING | INERT).items()]
    for data in contents:
        path.write_bytes(data)
        for words in (("keys", path), ("convert", path, "-o", tmp_path / "out.safetensors", "--in-process")):
            assert str(path) in refused(capsys, models.main, *words)
    assert [file.name for file in tmp_path.iterdir()] == ["model.ckpt"]  # no canary, no output


def test_a_process_of_its_own_ends_the_same(tmp_path: Path) -> None:
    path, canary = tmp_path / "model.ckpt", tmp_path / "canary"
    path.write_bytes(archive(running("os.system", canary, ("touch {canary}",))))
    words = [sys.executable, "-m", "tools.models", "convert", str(path), "-o", str(tmp_path / "out")]
    run = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout) == (1, "") and not canary.exists()
    assert run.stderr.startswith(f"error: {path}: a pickle that would run 'os.system'")
    assert run.stderr.count("\n") == 1


def test_a_reader_that_is_killed_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, bundle: Path
) -> None:
    (path := tmp_path / "model.ckpt").write_bytes(saved(read_state_dict(bundle / "unet.safetensors")))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=-signal.SIGKILL))
    assert "ended by signal 9" in refused(
        capsys, models.main, "convert", path, "-o", tmp_path / "x.safetensors"
    )


@pytest.mark.parametrize("job", ["keys", "verify", "convert", "lora", "blend"])
def test_places_that_are_no_files(
    job: str, tmp_path: Path, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "pipe")  # to open it would wait for ever
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "empty").mkdir()
    to = ("-o", tmp_path / "out.safetensors", "--in-process")
    sound = ("convert", bundle / "unet.safetensors", *to)
    for place in ("pipe", "dangling", "loop", "empty", "nothing"):
        path = tmp_path / place
        words = {"keys": ("keys", path), "verify": ("verify", path), "convert": ("convert", path, *to),
                 "lora": (*sound, "--lora", f"{path}:1"), "blend": (*sound, "--blend", f"{path}:0.5")}  # fmt: skip
        assert place in refused(capsys, models.main, *words[job])
    assert not (tmp_path / "out.safetensors").exists()


# ---- nets that are none ------------------------------------------------------------------------------------


def changed(change: Callable[[Tensor], Tensor]) -> Callable[[State, State], State]:
    """Of a U-Net the first tensor changed."""
    return lambda unet, _: unet | {(first := next(iter(unet))): change(unet[first])}


NETS: dict[str, tuple[Callable[[State, State], State], str]] = {
    "one wrong shape": (changed(lambda tensor: torch.zeros(3, 3)), "has shape (3, 3), expected"),
    "eight axes": (changed(lambda tensor: torch.zeros(1, 1, 1, 1, 1, 1, 1, 1)), "has shape"),
    "an empty tensor": (changed(lambda tensor: torch.zeros(0)), "has shape (0,)"),
    "an empty tensor of many": (changed(lambda tensor: torch.zeros(0, 2**40)), "has shape"),
    "all of int8": (lambda unet, _: {key: value.to(torch.int8) for key, value in unet.items()}, "holds torch.int8"),
    "one of int64": (changed(Tensor.long), "holds torch.int64"),
    "one of bool": (changed(Tensor.bool), "holds torch.bool"),
    "NaN": (changed(lambda tensor: tensor * float("nan")), "not finite"),
    "infinity": (changed(lambda tensor: tensor.float() + float("inf")), "not finite"),
    "NaN in float8": (changed(lambda tensor: torch.full(tensor.shape, float("nan")).to(torch.float8_e4m3fn)), "not finite"),
    "one tensor missing": (lambda unet, _: dict(list(unet.items())[:-1]), "(1 misfits"),
    "half of them missing": (lambda unet, _: dict(list(unet.items())[::2]), "missing|misfits|tensors for|no family"),
    "one unknown tensor": (lambda unet, _: unet | {"evil.weight": torch.ones(1)}, "'evil.weight'"),
    "a very long name": (lambda unet, _: unet | {"e" * 100_000: torch.ones(1)}, "misfits"),
    "a name for terminals": (lambda unet, _: unet | {"e\x1b]0;pwned\x07\r\nx\u202e": torch.ones(1)}, "misfits"),
    "two nets": (lambda unet, vae: unet | vae, "misfits"),
    "two nets, by halves": (lambda unet, vae: unet | dict(list(vae.items())[::2]), "misfits"),
    "nothing": (lambda unet, _: {}, "no family known here"),
    "no name": (lambda unet, _: {"": torch.ones(1)}, "no family known here"),
    "no net's names": (lambda unet, _: {f"x{i}": torch.ones(1) for i in range(500)}, "no family known here"),
}  # fmt: skip


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
@pytest.mark.parametrize("case", NETS)
def test_nets_that_do_not_fit(
    case: str, suffix: str, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, says = NETS[case]
    unet, vae = (read_state_dict(bundle / f"{part}.safetensors") for part in ("unet", "vae"))
    state, path = change(unet, vae), tmp_path / f"model.{suffix}"
    if suffix == "ckpt":
        if any(tensor.element_size() == 1 and tensor.is_floating_point() for tensor in state.values()):
            pytest.skip("float8 is not read from pickles")
        path.write_bytes(saved(state))
        says = says if state else "no weights"
        (tmp_path / "config.json").write_text(json.dumps({"attention_head_dim": 2, "norm_num_groups": 4}))
        path = path.rename(
            tmp_path / "diffusion_pytorch_model.bin"
        )  # a name beside which config.json is read
    else:
        write_safetensors(path, state, read_metadata(bundle / "unet.safetensors"))
    words = ("convert", path, "-o", tmp_path / "out.safetensors", "--in-process")
    error = refused(capsys, models.main, *words)
    assert any(word in error for word in says.split("|")), error
    assert not (tmp_path / "out.safetensors").exists()
    try:
        models.main(["keys", str(path)])
    finally:
        assert all(line.isprintable() for line in capsys.readouterr().out.splitlines())


LIMIT = 10_000
MANY: dict[str, dict[str, tuple[int, ...]]] = {
    "levels": {
        "conv_in.weight": (1, 1, 1, 1), "time_embedding.linear_1.weight": (1, 1), "up_blocks.0.resnets.0.conv1.weight": (1, 1, 1, 1),
        "conv_out.weight": (1, 1, 1, 1), **{f"down_blocks.{i}.resnets.0.conv1.weight": (1, 1, 1, 1) for i in range(LIMIT)},
    },
    "layers": {
        "encoder.conv_in.weight": (1, 1, 1, 1), "decoder.conv_in.weight": (1, 1, 1, 1), "decoder.conv_out.weight": (1, 1, 1, 1),
        **{f"encoder.down_blocks.0.resnets.{i}.conv1.weight": (1, 1, 1, 1) for i in range(LIMIT)},
    },
    "LDM": {f"model.diffusion_model.input_blocks.{i}.0.weight": (1, 1, 1, 1) for i in range(LIMIT)},
    "LoRA": {f"lora_unet_mid_block_{i}.lora_down.weight": (1, 1) for i in range(LIMIT)},
    "CLIP": {
        "text_model.embeddings.token_embedding.weight": (1, 1), "text_model.embeddings.position_embedding.weight": (1, 1),
        **{f"text_model.encoder.layers.{i}.mlp.fc1.weight": (1, 1) for i in range(300)},
    },
    "RRDB": {
        "conv_first.weight": (1, 3, 1, 1), "conv_last.weight": (3, 1, 1, 1),
        **{f"body.{i}.rdb1.conv1.weight": (1, 1, 1, 1) for i in range(300)},
    },
    "axes of nothing": {"conv_in.weight": (2**40, 0, 1, 1), "time_embedding.linear_1.weight": (1, 1),
                        "up_blocks.0.resnets.0.conv1.weight": (1, 1, 1, 1), "down_blocks.0.resnets.0.conv1.weight": (2**40, 2**20, 0, 1)},
}  # fmt: skip


@pytest.mark.parametrize("case", MANY)
def test_thousands_of_layers_are_not_built(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    header, offset = {}, 0
    for name, shape in MANY[case].items():
        end = offset + 2 * prod(shape)
        header[name] = entry(list(shape), offset, end, "F16")
        offset = end
    (path := tmp_path / "model.safetensors").write_bytes(container(header, bytes(offset)))
    refused(capsys, models.main, "keys", path)


CONFIGS: dict[str, Any] = {
    "zero": 0, "negative": -1, "a text": "8", "a long text": "x" * 1_000_000, "a flag": True, "a fraction": 1.5, "infinity": float("inf"),
    "a table": {"a": 1}, "no heads": [], "heads of none": [0], "nested": [[[2]]], "a giant": 10**9, "beyond 64 bits": 10**30, "no divisor": 3,
    "deep": json.loads("[" * 600 + "]" * 600),
}  # fmt: skip


@pytest.mark.parametrize("place", ["beside", "inside"])
@pytest.mark.parametrize("name", ["attention_head_dim", "norm_num_groups"])
@pytest.mark.parametrize("case", CONFIGS)
def test_hostile_configs(
    case: str, name: str, place: str, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {"attention_head_dim": 2, "norm_num_groups": 4, name: CONFIGS[case]}
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    text = json.dumps(config)
    write_safetensors(
        path, read_state_dict(bundle / "unet.safetensors"), {"config": text} if place == "inside" else {}
    )
    if place == "beside":
        (tmp_path / "config.json").write_text(text)
    for words in (("keys", path), ("convert", path, "-o", tmp_path / "out.safetensors", "--in-process")):
        assert main_refuses(capsys, *words)
    assert not (tmp_path / "out.safetensors").exists()


def main_refuses(capsys: pytest.CaptureFixture[str], *words: object) -> bool:
    """As `refused`, but lines may be longer: a message shows the value."""
    code, error = models.main([str(word) for word in words]), capsys.readouterr().err
    return code == 1 and error.count("\n") == 1 and error[:-1].isprintable() and len(error) < 1200


# ---- files mixed up ----------------------------------------------------------------------------------------


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    state = {f"{name}.lora_down.weight": torch.ones(1, 8), f"{name}.lora_up.weight": torch.ones(8, 1)}
    write_safetensors(tmp_path / "lora.safetensors", state)
    return tmp_path / "lora.safetensors"


def test_a_lora_is_no_model(tmp_path: Path, lora: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "in.png")
    Image.fromarray(np.full((40, 40), 255, np.uint8)).save(tmp_path / "mask.png")
    files = ("-i", tmp_path / "in.png", "-m", tmp_path / "mask.png", "-o", tmp_path / "out.png")
    words = (*files, "-p", "x", "--device", "cpu")
    assert "lora" in refused(capsys, edit.main, *words, "--model", lora)
    (evil := tmp_path / "evil.ckpt").write_bytes(archive(running("os.system", tmp_path / "canary", ("touch {canary}",))))  # fmt: skip
    assert "would run 'os.system'" in refused(capsys, edit.main, *words, "--model", evil)
    assert not (tmp_path / "canary").exists() and not (tmp_path / "out.png").exists()


def test_a_model_is_no_lora(tmp_path: Path, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (evil := tmp_path / "evil.ckpt").write_bytes(archive(running("os.system", tmp_path / "canary", ("touch {canary}",))))  # fmt: skip
    words = ("convert", bundle / "unet.safetensors", "-o", tmp_path / "out.safetensors", "--in-process")
    for flag, file, says in (
        ("--lora", bundle / "vae.safetensors", "expected a LoRA"),
        ("--blend", bundle / "vae.safetensors", "unet"),
        ("--lora", evil, "would run"),
        ("--blend", evil, "would run"),
    ):
        assert says in refused(capsys, models.main, *words, flag, f"{file}:0.5")
    assert not (tmp_path / "canary").exists() and not (tmp_path / "out.safetensors").exists()
