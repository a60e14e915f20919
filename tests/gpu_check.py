"""What a GPU does with this project, part by part: facts of the machine, whole runs in every precision,
the `cuda` tests.

  make gpu                      (GPU_PY=python3 OUT=docs/bench; installs nothing, needs no network)
  python -m tests.gpu_check --out FOLDER [--parts 0 1 2] [--pretend]

Each part is a process of its own with a limit of time. Its results are written to FOLDER/gpu-part-N.json
after every line, and FOLDER/gpu.md is written anew after every part, so a part that fails or is stopped takes
no other with it. Exit code 0: every part ran and was as expected; 1: one was not, or there is no GPU;
2: wrong usage.

`--pretend` runs the same parts on tests/helpers/pretend_cuda.py in place of a GPU, with smaller jobs, without
whole runs in float16 (minutes on a CPU) and with a sample of the tests: it shows that the parts run,
and says nothing of a GPU.

Needs torch 2.10, torchvision, numpy, Pillow, safetensors, tokenizers, huggingface_hub and tqdm; part 2 also
pytest, hypothesis and scikit-image. Tests beside libraries that are not there are skipped.
"""

import argparse
import contextlib
import json
import platform
import subprocess
import sys
import tempfile
import time
import traceback
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TITLES = {0: "the machine", 1: "end to end", 2: "tests marked cuda"}
LIMITS = {0: 60, 1: 240, 2: 300}  # seconds; on a pretended GPU four times as many
DTYPES = ("float32", "bfloat16", "float16")

# Mean |difference| from the float32 run on the CPU, of [-1, 1]; those of the tests of edit and restore on a
# GPU.
ALLOWED = {
    "edit": {"float32": 0.02, "bfloat16": 0.1, "float16": 0.05},
    "restore sr": {"float32": 0.01, "bfloat16": 0.1, "float16": 0.04},
    "restore colorize": {"float32": 0.01, "bfloat16": 0.1, "float16": 0.04},
}

# What part 2 runs; named, because to collect all tests takes a minute.
TEST_FILES = (
    "tests/parity/test_goldens.py",
    "tests/nets/test_tiled_vae.py",
    "tests/msbd/test_memory.py",
    "tests/msbd/edit/test_edit_cuda.py",
    "tests/msbd/restore/test_restore_cuda.py",
    "tests/msbd/restore/test_captions.py",
    "tests/msbd/train/test_jpeg.py",
    "tests/msbd/train/test_train.py",
)
PRETENDED_FILES = (
    "tests/nets/test_tiled_vae.py",
    "tests/msbd/test_memory.py",
    "tests/msbd/train/test_jpeg.py",
)

PACKAGES = (
    "torch",
    "torchvision",
    "numpy",
    "pillow",
    "safetensors",
    "tokenizers",
    "huggingface-hub",
    "transformers",
    "diffusers",
    "pytest",
    "hypothesis",
)


class Report:
    """The results of one part, written to its file at every addition.

    `facts` are a flat table; `rows` a table with the same columns in each row;
    `ok` whether all was as expected.
    """

    def __init__(self, part: int, out: Path) -> None:
        self.path = out / f"gpu-part-{part}.json"
        self.content: dict[str, Any] = {"part": part, "ok": None, "facts": {}, "rows": []}
        self.write()

    def write(self) -> None:
        """Flush what there is."""
        self.path.write_text(json.dumps(self.content, indent=1) + "\n")

    def fact(self, name: str, value: Any) -> None:
        """One line of the flat table."""
        self.content["facts"][name] = value
        self.write()
        print(f"  {name}: {value}", flush=True)

    def row(self, **values: Any) -> None:
        """One row of the table."""
        self.content["rows"].append(values)
        self.write()
        print("  " + ", ".join(f"{name} {value}" for name, value in values.items()), flush=True)


def command_output(*command: str) -> str:
    """What a command prints, or why it did not."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"not known ({type(error).__name__})"


def part_0(report: Report, pretend: bool) -> bool:
    """Versions, the GPU, the switches of TF32, and the attention that each head size and dtype gets."""
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    for name in PACKAGES:
        try:
            report.fact(name, metadata.version(name))
        except metadata.PackageNotFoundError:
            report.fact(name, "not installed")
    query = "name,driver_version,memory.total,compute_cap,power.limit"
    report.fact("python", platform.python_version())
    report.fact("commit", command_output("git", "-C", str(ROOT), "rev-parse", "HEAD"))
    report.fact("nvidia-smi", command_output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"))
    report.fact("CUDA", torch.version.cuda)
    report.fact("cuDNN", None if pretend else torch.backends.cudnn.version())
    report.fact("GPU", torch.cuda.get_device_name())
    report.fact("TF32 in convolutions", torch.backends.cudnn.allow_tf32)
    report.fact("TF32 in matrix products", torch.backends.cuda.matmul.allow_tf32)
    ran = True
    for head in (40, 160, 512):
        for dtype in DTYPES:
            q = torch.zeros(
                1, 1 if head == 512 else 8, 1024, head, device="cuda", dtype=getattr(torch, dtype)
            )
            runs = []
            for backend in (
                SDPBackend.FLASH_ATTENTION,
                SDPBackend.EFFICIENT_ATTENTION,
                SDPBackend.CUDNN_ATTENTION,
                SDPBackend.MATH,
            ):
                with contextlib.suppress(RuntimeError), sdpa_kernel(backend):
                    F.scaled_dot_product_attention(q, q, q)
                    runs.append(backend.name)
            chosen = SDPBackend(torch._fused_sdp_choice(q, q, q)).name  # type: ignore[attr-defined]
            report.row(head=head, dtype=dtype, chosen=chosen, runs=" ".join(runs))
            ran = ran and bool(runs)
    return ran


def timed(job: Callable[[], Any]) -> tuple[Any, float]:
    """What `job` gives, and its seconds, with the GPU's work done."""
    import torch

    torch.cuda.synchronize()
    start = time.perf_counter()
    result = job()
    torch.cuda.synchronize()
    return result, time.perf_counter() - start


def end_to_end(pretend: bool) -> dict[str, Callable[[str, Any], Any]]:
    """Task -> a function (device, dtype) that gives its picture, (1, 3, H, W) in [-1, 1],
    on the mini bundle.
    """
    import torch

    from msbd.edit.config import EditConfig
    from msbd.load import load_edit_pipeline, load_restore_pipeline
    from msbd.restore.config import RestoreConfig

    side, steps = (160, 2) if pretend else (320, 8)
    generator = torch.Generator().manual_seed(0)
    photo = torch.rand((1, 3, side, side), generator=generator) - 0.5
    mask = torch.zeros(1, 1, side, side)
    mask[..., side // 5 : -side // 5, side // 5 : -side // 5] = 1
    small = torch.rand((1, 3, side // 4, side // 4 + 8), generator=generator) - 0.5

    def edit(device: str, dtype: Any) -> Any:
        config = EditConfig(
            num_steps=steps, repaint_steps=1, first_stage_batch=2, decoderopt_steps=steps // 2
        )
        pipeline = load_edit_pipeline("mini", device=device, dtype=dtype)
        # The candidates are the sampler's work; outside of the mask a picture says nothing.
        return pipeline(photo, mask, "a red ball", config=config).candidates.cpu()

    def restore(mode: Any) -> Callable[[str, Any], Any]:
        def run(device: str, dtype: Any) -> Any:
            config = RestoreConfig(mode=mode, num_inference_steps=min(steps, 6))
            pipeline = load_restore_pipeline("mini", mode=mode, device=device, dtype=dtype)
            size = (4 * small.shape[-2], 4 * small.shape[-1])
            return pipeline(small, "a red ball", output_size=size, config=config).image

        return run

    return {"edit": edit, "restore sr": restore("sr"), "restore colorize": restore("colorize")}


def part_1(report: Report, pretend: bool) -> bool:
    """Whole runs with the mini bundle in every precision beside the CPU's, and each command once."""
    import torch

    as_expected = True
    for task, run in end_to_end(pretend).items():
        expected = run("cpu", torch.float32)
        for name in DTYPES[:2] if pretend else DTYPES:
            torch.cuda.reset_peak_memory_stats()
            values: dict[str, Any] = {"task": task, "dtype": name}
            try:
                picture, seconds = timed(lambda name=name, run=run: run("cuda", getattr(torch, name)))
                distance = (picture.cpu() - expected).abs().mean().item()
                ok = bool(picture.isfinite().all()) and distance < ALLOWED[task][name]
                values |= {"mean_difference": round(distance, 5), "allowed": ALLOWED[task][name]}
                values |= {"seconds": round(seconds, 2), "peak_mib": torch.cuda.max_memory_allocated() >> 20}
            except Exception as error:  # the next precision is to run all the same
                ok = False
                values |= {"error": f"{type(error).__name__}: {error}"[:500]}
                traceback.print_exc()
            report.row(**values, ok=ok)
            as_expected = as_expected and ok
    with tempfile.TemporaryDirectory() as folder:
        return commands(report, pretend, Path(folder)) and as_expected


def shrunk_examples(folder: Path) -> Path:
    """A folder inside of `folder` with the example pictures at a few dozen pixels a side."""
    from PIL import Image

    small = folder / "examples"
    small.mkdir(exist_ok=True)
    for name, side in (("coffee.jpg", 160), ("coffee_mask.png", 160), ("coffee_small.jpg", 48)):
        with Image.open(ROOT / "examples" / name) as picture:
            picture.resize((side, side)).save(small / name)
    return small


def commands(report: Report, pretend: bool, folder: Path) -> bool:
    """`tools.edit` and `tools.restore` on the GPU, once each, in this process;
    their pictures go into `folder`.
    """
    import importlib

    import torch

    steps, as_expected = "2" if pretend else "20", True
    shared = ["--device", "cuda", "--model", "mini", "--quiet"]
    shared += ["--steps", steps]
    examples = shrunk_examples(folder) if pretend else ROOT / "examples"
    edit = ["-i", str(examples / "coffee.jpg"), "-m", str(examples / "coffee_mask.png"), "-p", "a blue ball"]
    edit += ["-o", str(folder / "gpu-edit.png"), "--preset", "fast", *shared]
    restore = ["-i", str(examples / "coffee_small.jpg"), "-o", str(folder / "gpu-restore.png"), *shared]
    for module, options in (("tools.edit", edit), ("tools.restore.__main__", restore)):
        torch.cuda.reset_peak_memory_stats()
        name = f"python -m {module.removesuffix('.__main__')}"
        try:
            code, seconds = timed(
                lambda module=module, options=options: importlib.import_module(module).main(options)
            )
        except (Exception, SystemExit) as error:
            report.row(task=name, dtype="auto", error=f"{type(error).__name__}: {error}"[:500], ok=False)
            traceback.print_exc()
            as_expected = False
            continue
        peak = torch.cuda.max_memory_allocated() >> 20
        report.row(task=name, dtype="auto", seconds=round(seconds, 2), peak_mib=peak, ok=code == 0)
        as_expected = as_expected and code == 0
    return as_expected


def part_2(report: Report, pretend: bool) -> bool:
    """The tests marked `cuda` but for nets of full size; without TF32, as conftest.py sets it for them."""
    import pytest

    junit = report.path.parent / "gpu-tests.xml"
    files = PRETENDED_FILES if pretend else TEST_FILES
    options = ["-q", "-m", "cuda and not full", "-p", "no:cacheprovider", f"--junitxml={junit}"]
    code = pytest.main([*options, *(str(ROOT / file) for file in files)])
    suite = next(ET.parse(junit).getroot().iter("testsuite"))
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    for name, count in counts.items():
        report.fact(name, count)
    report.fact("seconds", round(float(suite.get("time", 0)), 1))
    for case in suite.iter("testcase"):
        if any(case.find(kind) is not None for kind in ("failure", "error")):
            report.row(test=f"{case.get('classname')}::{case.get('name')}")
    return code == 0 and counts["tests"] > counts["skipped"]


PARTS: dict[int, Callable[[Report, bool], bool]] = {0: part_0, 1: part_1, 2: part_2}


def run_part(part: int, out: Path, pretend: bool) -> int:
    """One part in this process; exit code 0 where all was as expected."""
    report = Report(part, out)
    with contextlib.ExitStack() as stack:
        if pretend:
            from tests.helpers.pretend_cuda import pretend_cuda

            stack.enter_context(pretend_cuda())
        start = time.perf_counter()
        try:
            report.content["ok"] = PARTS[part](report, pretend)
        except Exception:
            report.content |= {"ok": False, "error": traceback.format_exc()[-3000:]}
            traceback.print_exc()
        report.content["seconds"] = round(time.perf_counter() - start, 1)
        report.write()
    return 0 if report.content["ok"] else 1


def read_part(part: int, out: Path) -> dict[str, Any]:
    """The part's file as far as it came; a note where there is none that can be read."""
    try:
        return json.loads((out / f"gpu-part-{part}.json").read_text())
    except (OSError, ValueError) as error:
        return {"part": part, "ok": False, "facts": {}, "rows": [], "error": f"no results: {error}"}


def markdown(parts: Sequence[int], out: Path, pretend: bool) -> str:
    """Everything there is so far, as tables."""
    lines = ["# What a GPU does with this project", ""]
    lines += ["Written by `make gpu`. " + "**On a pretended GPU: no figure here is a GPU's.**" * pretend, ""]
    for part in parts:
        content = read_part(part, out)
        verdict = {True: "as expected", False: "NOT as expected", None: "did not end"}[content["ok"]]
        lines += [f"## Part {part}, {TITLES[part]}: {verdict}, {content.get('seconds', '?')} s", ""]
        if content["facts"]:
            lines += ["| | |", "|---|---|"]
            lines += [f"| {name} | {value} |" for name, value in content["facts"].items()] + [""]
        columns = list(dict.fromkeys(name for row in content["rows"] for name in row))
        if columns:
            lines += ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
            lines += [
                "| " + " | ".join(str(row.get(c, "")) for c in columns) + " |" for row in content["rows"]
            ]
            lines += [""]
        if "error" in content:
            lines += ["```", str(content["error"]).strip(), "```", ""]
    return "\n".join(lines)


def run_all(parts: Sequence[int], out: Path, pretend: bool) -> int:
    """Each part in a process of its own; exit code 0 where all were as expected."""
    failed = []
    for number, part in enumerate(parts, start=1):
        (out / f"gpu-part-{part}.json").unlink(missing_ok=True)
        limit = LIMITS[part] * (4 if pretend else 1)
        print(f"part {part}, {TITLES[part]} (at most {limit} s)", flush=True)
        command = [sys.executable, "-m", "tests.gpu_check", "--out", str(out), "--run-part", str(part)]
        try:
            code = subprocess.run(
                command + ["--pretend"] * pretend, cwd=ROOT, timeout=limit, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            code = -1
            content = read_part(part, out) | {"ok": False, "error": f"stopped after {limit} s"}
            (out / f"gpu-part-{part}.json").write_text(json.dumps(content, indent=1) + "\n")
        if code:
            failed.append(part)
        (out / "gpu.md").write_text(markdown(parts[:number], out, pretend))
    print(f"wrote {out / 'gpu.md'}" + (f"; not as expected: parts {failed}" if failed else ""), flush=True)
    return 1 if failed else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts; exit code 0 where all were as expected, 1 where one was not or there is no GPU."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu_check", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the results; made where it is not"
    )
    parser.add_argument("--parts", type=int, nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--pretend", action="store_true", help="on a pretended GPU, with smaller jobs")
    parser.add_argument("--run-part", type=int, choices=list(PARTS), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    import torch

    if not args.pretend and not torch.cuda.is_available():
        print(
            f"error: torch {torch.__version__} finds no NVIDIA GPU; --pretend runs the parts without one",
            file=sys.stderr,
        )
        return 1
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if args.run_part is not None:
        return run_part(args.run_part, out, args.pretend)
    return run_all(args.parts, out, args.pretend)


if __name__ == "__main__":
    sys.exit(main())
