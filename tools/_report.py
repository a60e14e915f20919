"""What the measuring commands share: figures with intervals, an aligned table, JSON, sheets of pictures.

And the state of the code that a figure was measured with, so that none is mistaken for another code's.
"""

import argparse
import hashlib
import json
import os
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from msbd.files import whole_file
from msbd.pixels.files import save_image, to_pixels
from msbd.pixels.metrics import bootstrap_interval, wilson_interval

from ._cli import ROOT, version

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas


@dataclass(frozen=True)
class Figure:
    """One measured number, its 95 % interval, on how many samples, and what was asked of it."""

    name: str
    value: float
    low: float
    high: float
    count: int
    unit: str = ""
    asked: float | None = None  # the least that would do

    @property
    def reached(self) -> bool | None:
        """Whether `value` is what was asked for; None if nothing was."""
        return None if self.asked is None else self.value >= self.asked

    @property
    def text(self) -> str:
        """The value and its interval, "91.7 (85.3 .. 95.4)"; a hyphen where nothing was measured."""
        digits = 1 if self.unit == "%" else 2
        if self.count == 0:
            return "-"
        return f"{self.value:.{digits}f} ({self.low:.{digits}f} .. {self.high:.{digits}f})"


def share(name: str, right: Sequence[bool], asked: float | None = None) -> Figure:
    """The percentage of `right`, with Wilson's interval."""
    if not right:
        return Figure(name, float("nan"), float("nan"), float("nan"), 0, "%", asked)
    low, high = wilson_interval(sum(right), len(right))
    return Figure(name, 100 * sum(right) / len(right), 100 * low, 100 * high, len(right), "%", asked)


def mean(name: str, values: Sequence[float], unit: str, asked: float | None = None) -> Figure:
    """The mean of `values`, with the bootstrap's interval."""
    if not values:
        return Figure(name, float("nan"), float("nan"), float("nan"), 0, unit, asked)
    low, high = bootstrap_interval(values)
    return Figure(name, sum(values) / len(values), low, high, len(values), unit, asked)


def figures_table(figures: Sequence[Figure]) -> str:
    """One line a figure: name, value, 95 % interval, n, what was asked and whether it was reached."""
    lines = [["", "unit", "value (95 % interval)", "n", "asked", ""]]
    for figure in figures:
        asked = "" if figure.asked is None else f">= {figure.asked:g}"
        lines.append([figure.name, figure.unit, figure.text, str(figure.count), asked,
                      {True: "reached", False: "NOT reached", None: ""}[figure.reached]])  # fmt: skip
    return table(lines)


def table(lines: Sequence[Sequence[str]]) -> str:
    """`lines` of equally many cells in columns: the first flush left, others right; a rule below the head."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def one(cells: Sequence[str]) -> str:
        padded = [c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return "  ".join(padded).rstrip()

    return "\n".join([one(lines[0]), "-" * (sum(widths) + 2 * len(widths) - 2), *map(one, lines[1:])])


def by_method(rows: Iterable[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, list[float]]]:
    """Method -> measure -> its values, of the rows (method -> measure -> value; one a picture) that have
    one.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        for method, values in row.items():
            for key, value in values.items():
                found.setdefault(method, {}).setdefault(key, []).append(value)
    return found


def write_json(path: Path, figures: Sequence[Figure], **more: Any) -> None:
    """The figures (those that were measured), the code's state, and what else belongs to the run, as JSON."""
    entries = [asdict(figure) | {"reached": figure.reached} for figure in figures if figure.count]
    with whole_file(path) as unfinished:
        unfinished.write_text(json.dumps({"code": code_state(), **more, "figures": entries}, indent=1) + "\n")


def new_figure(width: float, height: float) -> "Canvas":
    """An empty figure of matplotlib, in inches. ValueError without matplotlib."""
    try:
        from matplotlib.figure import Figure as Canvas
    except ImportError as error:
        raise ValueError(
            "curves are drawn by matplotlib, which is not installed: pip install matplotlib"
        ) from error
    return Canvas(figsize=(width, height), layout="constrained")


def make_folders(args: argparse.Namespace) -> None:
    """Make the folders that --pictures, --json and --plot need; a command may have any of them."""
    files = (getattr(args, name, None) for name in ("json", "plot"))
    for folder in (getattr(args, "pictures", None), *(file and file.parent for file in files)):
        if folder:
            folder.mkdir(parents=True, exist_ok=True)


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """The options that a figure depends on, as JSON can hold them; not where it goes and who is told."""
    left_out = ("job", "json", "pictures", "plot", "quiet", "debug", "fresh", "start", "count")
    kept = {name: value for name, value in vars(args).items() if name not in left_out or name == "start"}
    return json.loads(json.dumps(kept, default=str)) | {"threads": torch.get_num_threads()}


def code_state(root: Path = ROOT) -> str:
    """What code this is: the commit's first 12 digits, and "-dirty-" and a digest where Python files differ.

    The digest is of all changes to them and of new ones that git does not ignore: another after every change.
    Without git, or where `root` is not the top of a checkout, the project's version.
    """
    try:
        top = _git(root, "rev-parse", "--show-toplevel").decode().strip()
        if not top or not Path(top).samefile(root):
            return version()
        commit = _git(root, "rev-parse", "--short=12", "HEAD").decode().strip()
        changes = _git(root, "diff", "HEAD", "--no-ext-diff", "--", "*.py")
        new = _git(root, "ls-files", "--others", "--exclude-standard", "-z", "--", "*.py").split(b"\0")
    except (OSError, subprocess.SubprocessError):
        return version()
    digest = hashlib.sha256(changes)
    for name in filter(None, new):
        digest.update(name + b"\0" + (root / os.fsdecode(name)).read_bytes())
    return f"{commit}-dirty-{digest.hexdigest()[:8]}" if changes or any(new) else commit


def _git(root: Path, *words: str) -> bytes:
    return subprocess.run(
        ["git", "-C", str(root), *words], capture_output=True, check=True, timeout=60
    ).stdout


def write_sheet(
    path: Path, pictures: Sequence[Tensor], columns: int, wrong: Sequence[bool] | None = None
) -> None:
    """One PNG of equally large `pictures` (3, H, W) in [-1, 1], `columns` in a row, the `wrong` framed."""
    cells = []
    for number, picture in enumerate(pictures):
        bad = wrong is not None and wrong[number]
        cell = np.pad(to_pixels(picture[None].cpu()), ((3, 3), (3, 3), (0, 0)), constant_values=255)
        if bad:
            frame = np.ones(cell.shape[:2], bool)
            frame[3:-3, 3:-3] = False
            cell[frame] = (220, 0, 0)
        cells.append(cell)
    cells += [np.full_like(cells[0], 255)] * (-len(cells) % columns)
    rows = [np.concatenate(cells[i : i + columns], axis=1) for i in range(0, len(cells), columns)]
    save_image(np.concatenate(rows), path)
