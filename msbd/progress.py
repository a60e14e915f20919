"""Progress: what a pipeline says while it works, and where its time went.

Copying  this file stands alone: the standard library only
"""

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class EditStep:
    """Where an edit is: `step` of `total` (counted from 1) of a task of a stage.

    "sample" counts evaluations of the U-Net, each candidate and tile by itself, so that several are done at
    once; "decode" counts tiles or candidates, "optimize" steps of Adam; "upscale" counts the upscaler's
    blocks and pieces, and is one step without a net; "rerank" is one step.
    """

    stage: str
    task: str
    step: int
    total: int


def reporter(
    on_step: Callable[[EditStep], None] | None, seconds: dict[str, float]
) -> Callable[[str, str, int, int], None]:
    """`report(stage, task, step, total)`: calls `on_step`, and adds up in `seconds` how long each "stage,
    task" took.
    """
    last = time.perf_counter()

    def report(stage: str, task: str, step: int, total: int) -> None:
        nonlocal last
        now = time.perf_counter()
        key = f"{stage}, {task}"
        seconds[key] = seconds.get(key, 0.0) + now - last
        last = now
        if on_step is not None:
            on_step(EditStep(stage, task, step, total))

    return report
