"""Same machine, versions, seed, threads, tile size and batch: the same bytes,
in every process and at every address.

Where a tensor lies can change how it is summed: on an AMD EPYC (AVX-512), MKL's product of a matrix with one
row, and with two or three, gives other last digits where the matrix begins 4, 8 or 12 bytes behind a multiple
of 16. So this promise rests on two facts: PyTorch allocates at multiples of 64, and a file of weights is
mapped, which puts each of its tensors at the same place in a page of memory in every run. The first two tests
hold these facts, the others the promise itself.
"""

import hashlib
import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.helpers.tiny_bundle import write_pasd_folder, write_tiny_bundle
from weights.files import read_metadata, read_state_dict, write_safetensors

ROOT = Path(__file__).resolve().parents[2]
FEW, MANY = 2, 20  # runs
EDIT = ("--steps", "3", "--repaint-steps", "1", "--first-stage-batch", "1", "--decoderopt-steps", "1")


def place_in_page(tensor: Tensor) -> int:
    """Bytes between the beginning of a page of memory and the tensor's first value."""
    return tensor.data_ptr() % mmap.PAGESIZE


@pytest.mark.parametrize("layout", ["safetensors", "zip"])
@pytest.mark.parametrize("pad", range(0, 64, 8))
def test_mapped_tensors_lie_at_the_same_place_of_their_page(layout: str, pad: int, tmp_path: Path) -> None:
    tensors = {"a.weight": torch.rand(5, 7), "b.weight": torch.rand(33, 40), "c.bias": torch.rand(3)}
    if layout == "safetensors":
        write_safetensors(tmp_path / "file", tensors, {"padding": pad * " "})
    else:
        torch.save({"state_dict": tensors, "padding": pad * " "}, tmp_path / "file")
    kept, places = [], []
    for size in (1, 1000, 12_345):
        kept += [bytearray(size), torch.empty(size), read_state_dict(tmp_path / "file")]
        places.append({name: place_in_page(tensor) for name, tensor in kept[-1].items()})
    assert places[0] == places[1] == places[2] and places[0].keys() == tensors.keys()


@pytest.mark.parametrize("values", [1, 3, 17, 1000, 100_003])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64])
def test_new_tensors_lie_at_multiples_of_64(values: int, dtype: torch.dtype) -> None:
    kept = [torch.empty(values, dtype=dtype) for _ in range(20)]
    kept += [tensor.clone() for tensor in kept]
    assert {tensor.data_ptr() % 64 for tensor in kept} == {0}


# ---- the commands ------------------------------------------------------------------------------------------


def digest(command: list[str], output: Path, run: int) -> str:
    """sha256 of the file that a process of its own writes; each has other addresses,
    and another order of sets.
    """
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "PYTHONHASHSEED": str(run),
        "PADDING": run * 100 * "x",
    }
    done = subprocess.run(
        [sys.executable, "-m", *command, "-o", str(output), "--device", "cpu", "--quiet"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return hashlib.sha256(output.read_bytes()).hexdigest()


def as_float32_off_by_8(path: Path) -> None:
    """Rewrite a file of weights in float32, which nets on a CPU take as it is mapped,
    8 bytes behind a multiple of 16.
    """
    tensors = {name: tensor.float() for name, tensor in read_state_dict(path).items()}
    metadata = read_metadata(path)
    for pad in range(0, 64, 8):
        write_safetensors(path, tensors, metadata | {"padding": pad * " "})
        if all(
            tensor.data_ptr() % 16 == 8 for tensor in read_state_dict(path).values() if tensor.numel() > 1
        ):
            return
    raise AssertionError("no padding shifts the tensors by 8")


@pytest.fixture
def job(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    """A command without its output: an edit, or a restoration, of random pixels by random nets."""
    model = write_tiny_bundle(tmp_path / "bundle")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "in.png")
    files = ["-i", str(tmp_path / "in.png"), "-p", "a red house", "--model"]
    if request.param == "restore":
        pasd = write_pasd_folder(tmp_path / "pasd")
        return [
            "tools.restore",
            *files,
            str(pasd),
            "--base",
            str(model),
            "--steps",
            "2",
            "--process-size",
            "24",
        ]
    mask = np.zeros((40, 56), np.uint8)
    mask[10:30, 20:44] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    if request.param == "edit, weights off by 8, one row":
        as_float32_off_by_8(model / "unet.safetensors")
        files = ["--guidance-scale", "1", *files]
    return ["tools.edit", "-m", str(tmp_path / "mask.png"), *EDIT, *files, str(model)]


@pytest.mark.parametrize("job", ["edit", "edit, weights off by 8, one row", "restore"], indirect=True)
def test_a_command_gives_the_same_bytes_in_every_process(job: list[str], tmp_path: Path) -> None:
    assert len({digest(job, tmp_path / "out.png", run) for run in range(FEW)}) == 1


@pytest.mark.long
@pytest.mark.parametrize("command", ["edit", "restore"])
def test_twenty_runs_with_the_mini_bundle_give_the_same_bytes(command: str, tmp_path: Path) -> None:
    photo, small = (str(ROOT / "examples" / name) for name in ("coffee.jpg", "coffee_small.jpg"))
    mask = str(ROOT / "examples" / "coffee_mask.png")
    quick = ["--steps", "4", "--first-stage-batch", "2", "--decoderopt-steps", "2"]
    job = {
        "edit": ["tools.edit", "-i", photo, "-m", mask, "-p", "a red house", *quick],
        "restore": ["tools.restore", "-i", small, "--steps", "3", "--fidelity", "0.75"],
    }[command]
    assert len({digest([*job, "--model", "mini"], tmp_path / "out.png", run) for run in range(MANY)}) == 1
