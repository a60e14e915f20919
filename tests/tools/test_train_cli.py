"""`python -m tools.train`: from a folder of pictures to a file that loads, in one go or in several."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from msbd.load import load_edit_pipeline
from msbd.loading.nets import read_lora_file
from msbd.loading.parts import load_net, load_pasd_nets
from msbd.train.config import OFFICIAL, PAPER
from msbd.train.state import RunFolder
from nets.vae import AutoencoderKL
from tests.helpers.tiny_bundle import write_tiny_bundle
from tools.train import processes
from tools.train import run as train_run
from tools.train.__main__ import build_parser, config_of, main, read_data
from tools.train.processes import stop_signals
from weights.files import read_metadata, read_state_dict, write_safetensors

ROOT = Path(__file__).parents[2]
QUICK = [
    "--preset",
    "official",
    "--precision",
    "fp32",
    "--batch",
    "2",
    "--accumulate",
    "1",
    "--log-every",
    "1",
]


@pytest.fixture(autouse=True)
def one_picture_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each validation, in place of six: half of a run's time."""
    monkeypatch.setattr(train_run, "SHOWN", 1)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for number in range(6):
        coarse = rng.integers(0, 255, (5, 6, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((48, 40), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("a red house on snow at night\n")
    return folder


def run(job: str, photos: Path, bundle: Path, output: Path, *more: str, steps: int = 4) -> int:
    words = [
        job,
        "--data",
        str(photos),
        "--base",
        str(bundle),
        "-o",
        str(output),
        *QUICK,
        "--steps",
        str(steps),
    ]
    return main([*words, "--validate-every", "2", "--save-every", "2", "--quiet", "--device", "cpu", *more])


def curve(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


@pytest.fixture
def listening() -> Iterator[None]:
    """Ctrl-C as in a terminal: a process started in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("listening")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_interrupted_is_saved(
    number: signal.Signals, photos: Path, bundle: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    def log(self: RunFolder, step: int, figures: Any) -> None:
        whole_log(self, step, figures)
        if step == 3:
            signal.raise_signal(number)

    more = ("--save-every", "100", "--validate-every", "0")
    assert run("pasd", photos, bundle, tmp_path / "whole", *more, steps=5) == 0
    whole_log = RunFolder.log
    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "log", log)
        assert run("pasd", photos, bundle, tmp_path / "parts", *more, steps=5) == 130
    assert capsys.readouterr().err.startswith("interrupted after step 3, which is saved: the same command")
    assert torch.load(tmp_path / "parts" / "last.pt")["step"] == 3
    assert run("pasd", photos, bundle, tmp_path / "parts", *more, steps=5) == 0
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")


@pytest.mark.usefixtures("listening")
def test_a_second_interruption_does_not_wait(monkeypatch: Any) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), stop_signals() as stop:  # noqa: PT012 (the first ones must not raise)
        assert not stop()
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # the same, delivered twice
        assert stop()
        monkeypatch.setattr(processes, "TWICE", -1.0)
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_that_was_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop()
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("variant", ["full", "light", "eq2"])
def test_what_is_trained_loads_on_its_base(variant: str, photos: Path, bundle: Path, tmp_path: Path) -> None:
    assert run("pasd", photos, bundle, tmp_path, "--variant", variant) == 0
    unet, controlnet = load_pasd_nets(tmp_path / "pasd.safetensors", bundle)
    assert getattr(unet.config, "variant", None) == variant
    assert unet.config.attention_head_dim == 2  # what no shape tells
    assert any(value.abs().max() > 0 for value in controlnet.controlnet_mid_block.parameters())
    base = read_state_dict(bundle / "unet.safetensors")
    assert all(torch.equal(unet.state_dict()[key], tensor) for key, tensor in base.items())
    log = curve(tmp_path)
    assert [line["step"] for line in log] == [1, 2, 3, 4]
    assert [line["step"] for line in log if "val_denoising" in line] == [2, 4]
    assert (tmp_path / "pictures" / "0000004.png").exists()


def test_a_controlnet_alone(photos: Path, bundle: Path, tmp_path: Path) -> None:
    assert run("pasd", photos, bundle, tmp_path, "--variant", "none", "--no-to-rgb", "--rrdb") == 0
    controlnet = load_net(tmp_path / "controlnet.safetensors")
    assert (controlnet.config.to_rgb, controlnet.config.use_rrdb) == (False, True)
    assert "removal" not in curve(tmp_path)[-1]


def test_a_run_goes_on_where_it_was(photos: Path, bundle: Path, tmp_path: Path) -> None:
    """In two goes, the second with a worker process: the same log and weights as in one."""
    torch.set_num_threads(1)  # a worker process has one
    more = ("--ema", "0.5", "--accumulate", "2", "--lr", "1e-2")
    assert run("pasd", photos, bundle, tmp_path / "whole", *more) == 0
    assert run("pasd", photos, bundle, tmp_path / "parts", *more, steps=2) == 0
    halfway = read_state_dict(tmp_path / "parts" / "pasd.safetensors")
    assert run("pasd", photos, bundle, tmp_path / "parts", *more, "--workers", "1") == 0
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    whole, parts = (read_state_dict(tmp_path / name / "pasd.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert any(not torch.equal(whole[key], halfway[key]) for key in whole)
    assert run("pasd", photos, bundle, tmp_path / "parts", *more) == 0  # nothing left to do
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")


def test_other_options_are_refused(
    photos: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("pasd", photos, bundle, tmp_path, steps=2) == 0
    for words, said in (
        (("--gamma", "0.1"), "gamma = 1.0, now 0.1"),
        (("--degradation", "real-esrgan"), "ranges = "),
        (("--batch", "4"), "samples_per_step = 2, now 4"),
        (("--seed", "1"), "seed = 0, now 1"),
    ):
        assert run("pasd", photos, bundle, tmp_path, *words, steps=2) == 1
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    # What a run that diverged is advised to change, and what does not change it.
    for words in (
        ("--lr", "1e-6"),
        ("--precision", "bf16"),
        ("--batch", "1", "--accumulate", "2"),
        ("--log-every", "5"),
    ):
        assert run("pasd", photos, bundle, tmp_path, *words, steps=2) == 0
    capsys.readouterr()
    for name, content, said in (
        ("run.json", "{", "run.json: damaged"),
        ("run.json", None, "run.json: missing"),
    ):
        (tmp_path / name).unlink()
        if content is not None:
            (tmp_path / name).write_text(content)
        assert run("pasd", photos, bundle, tmp_path, steps=2) == 1
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


def test_a_damaged_checkpoint_is_named(photos: Path, bundle: Path, tmp_path: Path, capsys: Any) -> None:
    assert run("pasd", photos, bundle, tmp_path, steps=2) == 0
    checkpoint = tmp_path / "last.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    assert run("pasd", photos, bundle, tmp_path, steps=4) == 1
    error = capsys.readouterr().err
    assert "last.pt: damaged; put a copy back" in error and error.count("\n") == 1


def test_a_runs_folder_stands_for_what_it_trained(photos: Path, bundle: Path, tmp_path: Path) -> None:
    assert run("pasd", photos, bundle, tmp_path / "first", steps=1) == 0
    start = ("--start", str(tmp_path / "first"), "--lr", "1e-9")
    assert run("pasd", photos, bundle, tmp_path / "second", *start, steps=1) == 0
    assert len(load_pasd_nets(tmp_path / "second", bundle)) == 2


def test_warnings_and_what_is_done_already_are_told(
    photos: Path, bundle: Path, tmp_path: Path, capsys: Any
) -> None:
    words = [
        "pasd",
        "--data",
        str(photos),
        "--base",
        str(bundle),
        "-o",
        str(tmp_path),
        *QUICK,
        "--device",
        "cpu",
    ]
    for _ in range(2):
        with warnings.catch_warnings():  # pytest's own would keep them
            warnings.simplefilter("always")
            warnings.showwarning = lambda *told, **_: sys.stderr.write(warnings.formatwarning(*told[:4]))
            assert main([*words, "--steps", "1"]) == 0
    told = capsys.readouterr()
    lines = [line for line in told.err.splitlines() if "warning" in line]
    assert len(lines) == 2 and lines[0].startswith("warning: 6 pictures are too few")
    assert told.out.count("already at step 1") == 1


def test_a_file_is_no_place_for_a_run(photos: Path, bundle: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "file").touch()
    assert run("pasd", photos, bundle, tmp_path / "file") == 1
    assert "file: a file; expected a folder" in capsys.readouterr().err


def test_pictures_may_move(photos: Path, bundle: Path, tmp_path: Path) -> None:
    assert run("pasd", photos, bundle, tmp_path / "run", steps=2) == 0
    moved = Path(shutil.copytree(photos, tmp_path / "moved"))
    assert run("pasd", moved, bundle, tmp_path / "run", steps=4) == 0
    (moved / "0.png").unlink()
    assert run("pasd", moved, bundle, tmp_path / "run", steps=6) == 1


def test_weights_to_start_from_are_complete(photos: Path, bundle: Path, tmp_path: Path, capsys: Any) -> None:
    assert run("pasd", photos, bundle, tmp_path / "first", steps=1) == 0
    whole = tmp_path / "first" / "pasd.safetensors"
    tensors = read_state_dict(whole)
    part = {key: tensor for key, tensor in tensors.items() if "pixel_attentions.1" not in key}
    assert 0 < len(part) < len(tensors)
    write_safetensors(tmp_path / "part.safetensors", part, read_metadata(whole))
    assert (
        run("pasd", photos, bundle, tmp_path / "second", "--start", str(tmp_path / "part.safetensors")) == 1
    )
    error = capsys.readouterr().err
    assert "part.safetensors: does not fit these nets, first 'up_blocks" in error


def test_training_goes_on_from_other_weights(photos: Path, bundle: Path, tmp_path: Path) -> None:
    assert run("pasd", photos, bundle, tmp_path / "first") == 0
    start = tmp_path / "first" / "pasd.safetensors"
    assert (
        run("pasd", photos, bundle, tmp_path / "second", "--start", str(start), "--lr", "1e-9", steps=1) == 0
    )
    first, second = (read_state_dict(tmp_path / name / "pasd.safetensors") for name in ("first", "second"))
    assert all(torch.allclose(first[key].float(), second[key].float(), atol=1e-3) for key in first)
    assert run("pasd", photos, bundle, tmp_path / "third", "--start", str(start), "--variant", "light") == 1


def test_a_controlnet_goes_on_from_another(photos: Path, bundle: Path, tmp_path: Path) -> None:
    assert run("pasd", photos, bundle, tmp_path / "first", "--variant", "none", steps=1) == 0
    start = ("--start", str(tmp_path / "first" / "controlnet.safetensors"))
    assert run("pasd", photos, bundle, tmp_path / "second", "--variant", "none", *start, steps=1) == 0


def test_a_base_that_predicts_v(photos: Path, tmp_path: Path) -> None:
    base = write_tiny_bundle(tmp_path / "base", prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert run("pasd", photos, base, tmp_path / "run", steps=2) == 0
    assert np.isfinite(curve(tmp_path / "run")[-1]["val_denoising"])
    assert run("base", photos, base, tmp_path / "tuned", steps=2) == 0
    assert "v_prediction" in read_metadata(tmp_path / "tuned" / "model" / "unet.safetensors")["config"]


def test_the_autoencoder_never_works_in_float16(
    photos: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()
    convolve = torch.nn.Conv2d.forward

    def watched(module: torch.nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
        result = convolve(module, x)
        seen.add((module in autoencoder, result.dtype))
        return result

    autoencoder: set[Any] = set()
    decode = AutoencoderKL.decode
    monkeypatch.setattr(torch.nn.Conv2d, "forward", watched)
    monkeypatch.setattr(
        AutoencoderKL, "decode", lambda vae, z: (autoencoder.update(vae.modules()), decode(vae, z))[1]
    )
    assert run("pasd", photos, bundle, tmp_path / "pasd", "--precision", "fp16", steps=2) == 0
    assert run("base", photos, bundle, tmp_path / "base", "--precision", "fp16", steps=2) == 0
    assert (False, torch.float16) in seen  # the nets do
    assert (True, torch.float32) in seen and (True, torch.float16) not in seen


def test_colourisation(photos: Path, bundle: Path, tmp_path: Path) -> None:
    assert run("pasd", photos, bundle, tmp_path, "--mode", "colorize", "--variant", "light", steps=2) == 0
    assert "colour" in curve(tmp_path)[-1]


def test_a_base_is_tuned(photos: Path, bundle: Path, tmp_path: Path) -> None:
    assert run("base", photos, bundle, tmp_path / "whole", "--lr", "1e-3") == 0
    tuned = load_net(tmp_path / "whole" / "model" / "unet.safetensors")
    assert tuned.config.attention_head_dim == 2
    assert (
        read_metadata(tmp_path / "whole" / "model" / "unet.safetensors")["config"].count("prediction_type")
        == 1
    )
    assert run("base", photos, bundle, tmp_path / "lora", "--rank", "2", "--lr", "1e-3") == 0
    lora = tmp_path / "lora" / "lora.safetensors"
    assert read_lora_file(lora).layers
    plain, changed = (
        load_edit_pipeline(bundle, loras=loras).unet.state_dict() for loras in ((), ((lora, 1.0),))
    )
    assert any(not torch.equal(plain[key], changed[key]) for key in plain)


def test_the_curves_are_drawn(photos: Path, bundle: Path, tmp_path: Path, capsys: Any) -> None:
    assert run("pasd", photos, bundle, tmp_path / "run") == 0
    assert main(["curves", str(tmp_path / "run"), "-o", str(tmp_path / "curves.png")]) == 0
    assert Image.open(tmp_path / "curves.png").width > 500
    assert "run, denoising" in capsys.readouterr().out


def test_two_processes(photos: Path, bundle: Path, tmp_path: Path) -> None:
    """torchrun's environment, gloo: the same curve as one process with twice the batch, in two goes,
    the state spread.
    """
    assert run("pasd", photos, bundle, tmp_path / "one", "--batch", "2", steps=4) == 0
    for steps in ("2", "4"):
        assert two_processes(photos, bundle, tmp_path / "two", "--steps", steps, "--zero") == [0, 0]
    one, two = curve(tmp_path / "one"), curve(tmp_path / "two")
    assert [line["step"] for line in two] == [1, 2, 3, 4]
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_processes_with_folders_of_their_own_are_refused(photos: Path, bundle: Path, tmp_path: Path) -> None:
    """As on two machines that share no disk: one would begin anew beside the other's checkpoint."""
    for expected, steps in ((0, "1"), (1, "2")):
        words = ("--steps", steps, "--save-every", "1", "--validate-every", "0")
        assert two_processes(photos, bundle, tmp_path, *words, apart=True) == [expected] * 2


def test_processes_stop_together(photos: Path, bundle: Path, tmp_path: Path) -> None:
    """A signal to one of them, the one that does not save, and, as torchrun does it,
    to the worker that reads for it.
    """

    def stop(processes: list[subprocess.Popen[bytes]]) -> None:
        while len(RunFolder(tmp_path).read_log()) < 2:
            assert processes[1].poll() is None
            time.sleep(0.05)
        os.killpg(processes[1].pid, signal.SIGTERM)

    words = ("--steps", "100000", "--save-every", "100000", "--validate-every", "0", "--workers", "1")
    assert two_processes(photos, bundle, tmp_path, *words, then=stop) == [130, 130]
    assert torch.load(tmp_path / "last.pt")["step"] == curve(tmp_path)[-1]["step"] < 100_000


def two_processes(
    photos: Path, bundle: Path, output: Path, *more: str, apart: bool = False, then: Any = None
) -> list[int]:
    """Their exit codes; `apart`: each with a folder of its own; `then` is called with both, running."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    words = ["--data", str(photos), "--base", str(bundle), *QUICK, "--batch", "1"]
    words += ["--validate-every", "2", "--save-every", "2", "--device", "cpu", "--quiet", *more]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tools.train", *words, "-o", str(output / str(rank) if apart else output)],
            cwd=ROOT,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": "."},
            start_new_session=True,
        )
        for rank in range(2)
    ]
    if then:
        then(processes)
    return [process.wait(timeout=300) for process in processes]


def test_presets() -> None:
    def config(*words: str) -> Any:
        return config_of(build_parser().parse_args(["pasd", "--data", "x", "-o", "y", *words]))

    assert config() == PAPER
    assert config("--preset", "official") == OFFICIAL
    assert config("--preset", "official", "--lr", "1e-3", "--seed", "3").learning_rate == 1e-3
    assert (PAPER.optimizer, PAPER.learning_rate, PAPER.batch, PAPER.gamma, PAPER.steps) == (
        "adam",
        5e-5,
        4,
        1.0,
        500_000,
    )
    assert (PAPER.null_prompts, OFFICIAL.weight_decay, OFFICIAL.accumulate) == (0.5, 1e-2, 2)


def test_pictures_for_validation_are_not_trained_on(tmp_path: Path) -> None:
    for number in range(40):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / f"{number:02d}.png")
    training, held_out = read_data([str(tmp_path)], None)

    def reds(pictures: Any) -> set[int]:
        return {pictures.read(i)[0].getpixel((0, 0))[0] for i in range(len(pictures))}

    assert len(held_out) == 2 and len(training) == 38
    assert reds(training) | reds(held_out) == set(range(40))
    assert not reds(training) & reds(held_out)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data", "nowhere"], "nowhere"),
        (["--data", "a.tar", "b"], "expected one folder"),
        (["--data", "scenes", "--steps", "0"], "steps is 0"),
        (["--data", "scenes", "--base", "nosuch"], "nosuch"),
        (["--data", "scenes", "--scale", "999"], "999"),
        (["--data", "scenes", "--size", "100"], "a multiple of 8"),
        (["--data", "scenes", "--size", "0"], "a multiple of 8"),
        (["--data", "scenes", "--mode", "colorize", "--scale", "2"], "--scale changes nothing here"),
        (["--data", "scenes", "--no-to-rgb", "--gamma", "2"], "--gamma changes nothing here"),
        (["--data", "scenes", "--colour-weight", "2"], "--colour-weight changes nothing here"),
        (["--data", "scenes", "--variant", "none", "--init", "zero"], "--init changes nothing here"),
    ],
)
def test_bad_input_gets_one_line(
    words: list[str],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tools.scenes.data.ScenePictures", lambda: [None])
    assert main([*words, "-o", str(tmp_path / "run"), "--device", "cpu"]) == 1  # the job pasd is understood
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
