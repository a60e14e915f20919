"""A break on CUDA is seen without a GPU: edit, restore,
a training step and `make gpu` on the pretended one.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from msbd.edit.config import EditConfig
from msbd.load import load_edit_pipeline, load_restore_pipeline
from msbd.restore.config import RestoreConfig
from msbd.train.config import TrainConfig
from msbd.train.loop import Trainer
from msbd.train.objective import Inputs
from tests.gpu_check import Report, run_all
from tests.helpers.pretend_cuda import pretend_cuda
from tests.helpers.tiny_training import feed, objective

ROOT = Path(__file__).resolve().parents[1]


def noise_picture(height: int, width: int) -> Tensor:
    return torch.rand((1, 3, height, width), generator=torch.Generator().manual_seed(0)) - 0.5


def edit(device: str) -> Tensor:
    """The result of a short edit with the mini bundle: three stages, the last one in tiles."""
    config = EditConfig(num_steps=4, repaint_steps=1, first_stage_batch=2, decoderopt_steps=1)
    image, mask = noise_picture(256, 256), torch.zeros(1, 1, 256, 256)
    mask[..., 40:216, 40:216] = 1
    pipeline = load_edit_pipeline("mini", device=device)
    return pipeline(image, mask, "a red ball", config=config).image


def by_seam(seam: Any) -> Any:
    """A short edit by preset default, whose last stage is in joint tiles, with that seam."""

    def run(device: str) -> Tensor:
        config = EditConfig.default(num_steps=2, candidates_kept=2, decoderopt_steps=1, seam=seam)
        image, mask = noise_picture(256, 256), torch.zeros(1, 1, 256, 256)
        mask[..., 40:216, 40:216] = 1
        decoder = "mini-asymmetric" if seam == "asymmetric" else None
        pipeline = load_edit_pipeline("mini", device=device, seam_decoder=decoder)
        result = pipeline(image, mask, "a red ball", config=config)
        assert result.plan.stages[-1].joint and len(result.plan.stages[-1].boxes) > 1
        return result.image

    return run


def restore(device: str) -> Tensor:
    """The result of a short restoration with the mini bundle, in tiles."""
    pipeline = load_restore_pipeline("mini", device=device)
    config = RestoreConfig(num_inference_steps=2)
    result = pipeline(noise_picture(64, 80), "a red ball", output_size=(256, 320), config=config)
    assert len(result.plan.tiles) > 1
    return result.image


def training_loss(device: str) -> float:
    """The loss of the second training step of tiny PASD nets: one update lies before it."""
    config = TrainConfig(steps=4, batch=2)
    trainer = Trainer(objective(config).to(device), config)
    batches = (Inputs(*(field.to(device) for field in batch)) for batch in feed(trainer))
    trainer.step(batches)
    return trainer.step(batches)["loss"]


class WithoutMove(TorchFunctionMode):
    """A planted fault: the first `.to(device)` to the GPU that `file` asks for leaves the tensor where it
    is.
    """

    def __init__(self, file: str) -> None:
        super().__init__()
        self.file, self.planted = file, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        device = next((a for a in args[1:] if isinstance(a, torch.device)), None)
        if not self.planted and func is Tensor.to and device is not None and device.type == "cuda":
            caller = sys._getframe(1).f_code.co_filename
            if caller.endswith(self.file):
                self.planted = True
                args = tuple(a for a in args if a is not device)
                return func(*args, **kwargs or {}) if len(args) > 1 or kwargs else args[0]
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(
    "task",
    [
        pytest.param(edit, id="edit"),
        pytest.param(restore, id="restore"),
        pytest.param(by_seam("membrane"), id="membrane"),
        *(
            pytest.param(by_seam(seam), id=seam, marks=pytest.mark.long)
            for seam in ("adam", "closed-form", "asymmetric")
        ),
    ],
)
def test_a_pretended_gpu_gives_the_picture_of_the_cpu(task: Any) -> None:
    with pretend_cuda() as gpu:
        image = task("cuda")
    assert image.device.type == "cpu" and gpu.memory.peak > 0 and gpu.crossings
    assert (image - task("cpu")).abs().max() < 1 / 255  # half a level: least squares magnify rounding


def test_a_pretended_gpu_trains_as_the_cpu() -> None:
    with pretend_cuda():
        loss = training_loss("cuda")
    assert loss == pytest.approx(training_loss("cpu"), rel=1e-5)


@pytest.mark.parametrize(
    ("task", "file"), [(edit, "msbd/edit/pipeline.py"), (restore, "msbd/restore/pipeline.py")]
)
def test_a_move_that_is_missing_is_found(task: Any, file: str) -> None:
    with pretend_cuda(), WithoutMove(file) as fault, pytest.raises(RuntimeError, match="same device"):
        task("cuda")
    assert fault.planted


def test_what_does_not_fit_into_its_memory_is_an_out_of_memory_error() -> None:
    with pretend_cuda(memory=2**20) as gpu:
        kept = torch.zeros(2**17, device="cuda")
        with pytest.raises(torch.OutOfMemoryError):
            torch.zeros(2**18, device="cuda")
        del kept
        assert torch.zeros(2**17, device="cuda").sum().item() == 0
    assert 2**19 <= gpu.memory.peak <= 2**20


@pytest.mark.parametrize(
    "wrong",
    [
        lambda here, there: here + there,
        lambda here, there: torch.cat([here, there]),
        lambda here, there: there.numpy(),
        lambda here, there: there.normal_(generator=torch.Generator()),
    ],
    ids=["sum", "cat", "numpy", "generator"],
)
def test_what_cuda_refuses_is_refused(wrong: Any) -> None:
    with pretend_cuda(), pytest.raises((RuntimeError, TypeError)):
        wrong(torch.zeros(3), torch.zeros(3, device="cuda"))


@pytest.mark.long
def test_the_small_cuda_tests_pass_on_the_pretended_gpu() -> None:
    """What the marker `cuda` has without nets of full size, in a process of its own."""
    files = ("nets/test_tiled_vae.py", "msbd/test_memory.py", "msbd/train/test_jpeg.py")
    files = (
        *files,
        "msbd/train/test_train.py",
        "msbd/restore/test_restore_cuda.py",
        "msbd/edit/test_edit_cuda.py",
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "tests.helpers.pretend_cuda",
        "-m",
        "cuda and not full",
    ]
    done = subprocess.run(
        [*command, *(f"tests/{file}" for file in files)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]


def gpu_check(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """`make gpu` without make."""
    command = [sys.executable, "-m", "tests.gpu_check", "--out", str(out), *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_make_gpu_without_a_gpu_says_so_in_one_line(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = gpu_check(tmp_path)
    assert done.returncode == 1 and done.stdout == "" and not list(tmp_path.iterdir())
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "GPU" in done.stderr


def test_the_first_part_of_make_gpu_runs_on_the_pretended_gpu(tmp_path: Path) -> None:
    done = gpu_check(tmp_path, "--pretend", "--parts", "0")
    assert done.returncode == 0, done.stderr[-2000:]
    content = json.loads((tmp_path / "gpu-part-0.json").read_text())
    assert content["ok"] and len(content["rows"]) == 9 and "torch" in content["facts"]
    assert "On a pretended GPU" in (tmp_path / "gpu.md").read_text()


def test_a_part_that_fails_or_takes_too_long_does_not_stop_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = {
        0: lambda: subprocess.CompletedProcess([], 1),
        1: None,
        2: lambda: subprocess.CompletedProcess([], 0),
    }

    def run(command: list[str], timeout: float, **_: Any) -> Any:
        part = int(command[command.index("--run-part") + 1])
        report = Report(part, tmp_path)
        if (end := ended[part]) is None:
            report.row(task="half of it", ok=True)
            raise subprocess.TimeoutExpired(command, timeout)
        report.content["ok"] = part == 2
        report.write()
        return end()

    monkeypatch.setattr(subprocess, "run", run)
    assert run_all([0, 1, 2], tmp_path, pretend=False) == 1
    told = (tmp_path / "gpu.md").read_text()
    assert "Part 0, the machine: NOT as expected" in told and "Part 2, tests marked cuda: as expected" in told
    assert "stopped after 240 s" in told and "half of it" in told


@pytest.mark.long
def test_all_parts_of_make_gpu_run_on_the_pretended_gpu(tmp_path: Path) -> None:
    done = gpu_check(tmp_path, "--pretend")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
