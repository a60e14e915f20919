"""Lists of pictures to work on: CSV with a header line, or JSON lines, one picture a line."""

import csv
import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msbd.files import naming


@dataclass(frozen=True)
class Line:
    """A line of a list, and what it gives by the name of its column."""

    file: Path
    number: int  # from 1, in the file
    values: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.file}, line {self.number}"


_READ: dict[str, Callable[[str], Any]] = {"seed": int, "margin": float}  # all others are words


def read_list(path: Path, columns: Sequence[str]) -> list[Line]:
    """Every line of a list, with some of `columns`, "image" always among them; an empty cell says nothing.

    A file whose first letter is `{` is JSON lines, any other CSV, with a comma, a semicolon or a tab between
    cells. FileNotFoundError, or ValueError that names the line.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file; --jobs takes a list, CSV or JSON lines")
    if path.is_dir():
        raise ValueError(f"{path}: a folder; --jobs takes a list, CSV or JSON lines, and --image folders")
    try:
        with naming(path):
            text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 (at byte {error.start:,}); save the list as UTF-8") from None
    rows = _json_rows(path, text) if text.lstrip().startswith("{") else _csv_rows(path, text)
    lines = [_line(path, number, row, columns) for number, row in rows]
    if not lines:
        raise ValueError(f"{path}: no pictures in this list; it takes the columns {', '.join(columns)}")
    return lines


def _json_rows(path: Path, text: str) -> list[tuple[int, dict[str, Any]]]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise ValueError(f'{path}, line {number}: expected an object, as {{"image": "a.png"}}')
        rows.append((number, row))
    return rows


def _csv_rows(path: Path, text: str) -> list[tuple[int, dict[str, Any]]]:
    header = text.split("\n", 1)[0]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=header.count), strict=True)
    rows: list[tuple[int, dict[str, Any]]] = []
    names: list[str] = []
    start = 1  # of a row, which quoted cells can make several lines long
    try:
        for cells in reader:
            if not names:
                names = [cell.strip() for cell in cells]
            elif any(cell.strip() for cell in cells):
                if len(cells) > len(names):
                    raise ValueError(
                        f"{path}, line {start}: {len(cells)} cells, of {len(names)} columns; put quotes round a cell "
                        "with a comma"
                    )
                rows.append((start, dict(zip(names, cells, strict=False))))
            start = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, line {start}: not CSV ({error})") from None
    return rows


def _line(path: Path, number: int, row: dict[str, Any], columns: Sequence[str]) -> Line:
    at = f"{path}, line {number}"
    if unknown := [str(name) for name in row if name not in columns]:
        raise ValueError(f"{at}: no column is called {unknown[0]!r:.60}; they are {', '.join(columns)}")
    values: dict[str, Any] = {}
    for name, value in row.items():
        if value is None or (isinstance(value, str) and not value.strip()):
            continue
        if not isinstance(value, str | int | float) or isinstance(value, bool):
            raise ValueError(f"{at}: {name} is {json.dumps(value):.60}; expected a word or a number")
        try:
            values[name] = _READ.get(name, str)(str(value) if name == "prompt" else str(value).strip())
        except ValueError:
            raise ValueError(f"{at}: {name} is {str(value)!r:.60}; expected a number") from None
        if isinstance(values[name], str) and (bad := re.search(r"[\0\ud800-\udfff]", values[name])):
            raise ValueError(f"{at}: {name} holds {bad[0]!a}, which no file name and no prompt has")
    if "image" not in values:
        raise ValueError(f"{at}: no image; every line names one")
    return Line(path, number, values)
