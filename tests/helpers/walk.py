"""How often one edit carries the picture or its mask into a function of msbd/:
`python -m tests.helpers.walk`.

Counts the calls, in one process and by `sys.setprofile`, of functions of msbd/ an argument of which is a
picture or a mask, a list of them, or a dataclass that holds one.
"""

import sys
import tempfile
from collections import Counter
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from tools.edit import main

ROOT = Path(__file__).resolve().parents[2]
MSBD = f"{ROOT / 'msbd'}/"
SMALL = ("--steps", "4", "--first-stage-batch", "2", "--decoderopt-steps", "3")


def count_calls(arguments: list[str]) -> Counter[str]:
    """The calls of one `tools.edit` with these arguments, by "file:function"."""
    calls: Counter[str] = Counter()

    def note(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(MSBD) or code.co_name.startswith("<"):
            return
        given = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        if any(_carries(frame.f_locals.get(name)) for name in given):
            calls[f"{code.co_filename.removeprefix(MSBD)}:{code.co_qualname}"] += 1

    sys.setprofile(note)
    try:
        failed = main(arguments)
    finally:
        sys.setprofile(None)
    assert not failed
    return calls


def example(output: Path) -> list[str]:
    """A small edit of the example picture: two stages, each in one piece."""
    examples = ROOT / "examples"
    paths = ("-i", str(examples / "coffee.jpg"), "-m", str(examples / "coffee_mask.png"), "-o", str(output))
    return [*paths, "-p", "a red house", "--model", "mini", "--preset", "paper", "--quiet", *SMALL]


def _carries(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.ndim == 4 and value.shape[1] in (1, 3)
    if isinstance(value, (list, tuple)):
        return any(isinstance(item, torch.Tensor) and _carries(item) for item in value)
    if is_dataclass(value):
        return any(
            isinstance(part := getattr(value, field.name, None), torch.Tensor) and _carries(part)
            for field in fields(value)
        )
    return False


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        counted = count_calls(example(Path(folder) / "edited.png"))
    print(f"{counted.total()} calls, of {len(counted)} functions")
    print("\n".join(f"{count:4} {name}" for name, count in counted.most_common()))
