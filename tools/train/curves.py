"""The losses of training runs, drawn and put in numbers. Needs matplotlib (the extra `train`)."""

from collections.abc import Sequence
from pathlib import Path

from msbd.train.state import RunFolder

from .._report import new_figure, table

LOSSES = {"denoising": "denoising loss (Eq. 5)", "removal": "degradation removal loss"}
SMOOTH = 50  # logged lines that a point of the training curve is the mean of


def draw_curves(runs: Sequence[Path], path: Path) -> None:
    """Training and validation losses of `runs` as one PNG. ValueError for a folder without a log."""
    logs = {name: _read(run) for name, run in _named(runs).items()}
    names = [name for name in LOSSES if any(name in line for log in logs.values() for line in log)]
    figure = new_figure(5.2 * len(names), 3.6)
    axes = figure.subplots(1, len(names), squeeze=False)[0]
    for axis, name in zip(axes, names, strict=True):
        for number, (run, log) in enumerate(logs.items()):
            steps, values = _series(log, name)
            if not steps:
                continue
            color = f"C{number}"  # the same in every panel
            axis.plot(steps, _smoothed(values), color=color, alpha=0.4, linewidth=1)
            axis.plot(*_series(log, f"val_{name}"), color=color, marker=".", label=run)
        axis.set(title=LOSSES[name], xlabel="step", yscale="log")
        axis.legend(frameon=False)
    figure.supxlabel(
        "dots: held-out pictures, fixed timesteps and noise; pale: training batches, smoothed", fontsize=8
    )
    figure.savefig(path, dpi=100)


def tenths_table(runs: Sequence[Path]) -> str:
    """The mean validation losses in the first and the last tenth of each run."""
    lines = [["validation loss", "first tenth", "last tenth", "validations"]]
    for run, path in _named(runs).items():
        log = _read(path)
        last = max(line["step"] for line in log)
        for name in LOSSES:
            steps, values = _series(log, f"val_{name}")
            first = [v for s, v in zip(steps, values, strict=True) if s <= last / 10] or values[:1]
            final = [v for s, v in zip(steps, values, strict=True) if s > 0.9 * last] or values[-1:]
            if final:
                means = [f"{sum(part) / len(part):.5f}" for part in (first, final)]
                lines.append([f"{run}, {name}", *means, str(len(steps))])
    return table(lines) if len(lines) > 1 else "no validation losses"


def _named(runs: Sequence[Path]) -> dict[str, Path]:
    """The runs by their folders' names, or their paths where two are alike."""
    names = [run.name for run in runs]
    return {run.name if names.count(run.name) == 1 else str(run): run for run in runs}


def _read(run: Path) -> list[dict[str, float]]:
    log = RunFolder(run).read_log()
    if not log:
        raise ValueError(
            f"{run}: no log.jsonl with lines in it; expected the folder of a run of `tools.train`"
        )
    return log


def _series(log: list[dict[str, float]], name: str) -> tuple[list[float], list[float]]:
    found = [(line["step"], line[name]) for line in log if line.get(name) is not None]
    return [step for step, _ in found], [value for _, value in found]


def _smoothed(values: list[float]) -> list[float]:
    """The mean of each value and the `SMOOTH` - 1 before it."""
    return [
        sum(part) / len(part) for part in (values[max(0, i - SMOOTH + 1) : i + 1] for i in range(len(values)))
    ]
