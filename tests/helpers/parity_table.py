"""`make parity-table`: write docs/parity.md, how far each net is from its reference, by precision and device.

Columns that need a GPU, or the extra `parity`, stay as they stand in the file where there is none. Exit code
1 when an error is above its tolerance.
"""

import datetime
import gc
import itertools
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from tests.helpers.parity_cases import CASES, SENSITIVE, Case, error_of, moved
from tests.helpers.parity_oracles import are_installed, has_oracle, oracle_of, versions

FILE = Path(__file__).resolve().parents[2] / "docs" / "parity.md"
PLACES = {
    "float32, CPU": ("cpu", torch.float32),
    "bfloat16, CPU": ("cpu", torch.bfloat16),
    "float32, CUDA": ("cuda", torch.float32),
    "bfloat16, CUDA": ("cuda", torch.bfloat16),
    "float16, CUDA": ("cuda", torch.float16),
}
OWN = "reference's own bfloat16"
COLUMNS = ["float32, CPU", "bfloat16, CPU", OWN, "float32, CUDA", "bfloat16, CUDA", "float16, CUDA"]
MACHINES = ("CPU", "CUDA", "references")
NOT_RUN = "not run"
TEXT = """\
# Parity

Written by `make parity-table`; what it measures is listed in `tests/helpers/parity_cases.py`.

Our nets beside stored outputs of the official code's, with the same weights and inputs;
`tests/golden/<net>/<case>.json` says how they were made. A cell is max|difference| / max|reference|, the
largest over the case's outputs, with its tolerance in brackets; "abs" is max|difference| alone, where weights
are so small that a wrong epsilon would show. float32 is without TF32. The tolerances of bfloat16 and float16
are ours: 4e-2 and 1e-2, more for CLIP, whose cosine is small beside what it sums, and for the bfloat16 of
pasd, which is two nets, one after the other.

"reference's own bfloat16" says how much of our bfloat16's error is bfloat16's: the library that the reference
came from (spandrel for RRDBNet, whose reference is basicsr's), with the same weights, run in bfloat16 on the
CPU and compared in the same way with the same stored output; `tests/helpers/parity_oracles.py` does it where
the extra `parity` is installed.

–: not measured. The autoencoder never runs in float16; the small weights are for float32 alone; LDM's and
PASD's code and peft (the LoRA cases) are in no library of the extra; spandrel knows RRDBNet with the official
growth (32 channels) alone.

"""

Cells = dict[str, dict[str, str]]  # net/case -> column -> what stands there


def measure(devices: list[str]) -> Iterator[tuple[Case, str, float]]:
    """Case, column and error of all that can run on these devices; one net and its copy at a time."""
    for _, group in itertools.groupby(CASES, key=lambda case: case.net):
        cases = list(group)
        net = cases[0].build(cases[0].source.meta)
        for column, (device, dtype) in PLACES.items():
            if device in devices and cases[0].allowed(device, dtype) is not None:
                there = moved(net, device, dtype)
                for case in cases:
                    yield case, column, error_of(case, there, device, dtype)
                del there
                gc.collect()
        if has_own(cases[0]) and are_installed():
            oracle = oracle_of(cases[0], net).to(torch.bfloat16)
            for case in cases:
                yield case, OWN, error_of(case, oracle, "cpu", torch.bfloat16)
            del oracle
        del net
        gc.collect()


def has_own(case: Case) -> bool:
    """Whether the case has a cell in the column `OWN`."""
    return case.allowed("cpu", torch.bfloat16) is not None and has_oracle(case)


def written(case: Case, column: str, error: float) -> str:
    """A cell: the error and its tolerance, bold when it is above it; the reference's own has none."""
    if column == OWN:
        return f"{error:.1e}"
    device, dtype = PLACES[column]
    unit = " abs" if case.tolerance == SENSITIVE else ""
    allowed = case.allowed(device, dtype)
    cell = f"{error:.1e}{unit} ({allowed:.0e})"
    return cell if allowed is not None and error <= allowed else f"**{cell}**"


def machine(device: str) -> str:
    """Model, torch and date, in one line."""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if device == "cpu" and cpuinfo.exists():
        models = [
            line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line
        ]
        name = f"{(models or [name])[0]}, threads: {torch.get_num_threads()}"
    return f"{name}, torch {torch.__version__}, {datetime.date.today()}"


def read() -> tuple[dict[str, str], Cells]:
    """What ran, by MACHINES, and cells of the file as it stands; both empty where there is none."""
    machines: dict[str, str] = {}
    cells: Cells = {}
    for line in FILE.read_text().splitlines() if FILE.exists() else []:
        if line.startswith(tuple(f"- {name}: " for name in MACHINES)):
            device, rest = line.removeprefix("- ").split(": ", 1)
            machines[device] = rest
        elif line.startswith("| ") and "/" in (cell := [part.strip() for part in line.split("|")[1:-1]])[0]:
            cells[cell[0]] = dict(zip(COLUMNS, cell[1:], strict=True))
    return machines, cells


def page(machines: dict[str, str], cells: Cells) -> str:
    """The whole file."""
    lines = [f"- {name}: {machines.get(name, NOT_RUN)}" for name in MACHINES]
    lines += ["", "| case | " + " | ".join(COLUMNS) + " |", "|---" * (1 + len(COLUMNS)) + "|"]
    for case in CASES:
        row = dict.fromkeys(COLUMNS, NOT_RUN) | cells.get(case.label, {})
        row |= {column: "–" for column, place in PLACES.items() if case.allowed(*place) is None}
        row |= {} if has_own(case) else {OWN: "–"}
        lines.append(f"| {case.label} | " + " | ".join(row[column] for column in COLUMNS) + " |")
    return TEXT + "\n".join(lines) + "\n"


def main() -> int:
    """Measure, write the file; 1 when an error is above its tolerance."""
    torch.backends.cudnn.allow_tf32 = False
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    machines, cells = read()
    machines |= {device.upper(): machine(device) for device in devices}
    if are_installed():
        machines["references"] = f"{versions()}, {machine('cpu')}"
    missed = False
    for case, column, error in measure(devices):
        cell = written(case, column, error)
        cells.setdefault(case.label, {})[column] = cell
        missed |= cell.startswith("**")
        sys.stderr.write(f"{case.label}, {column}: {cell}\n")
    FILE.write_text(page(machines, cells))
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
