"""The paper can be read in msbd/edit: each line of Algorithm 1 stands there once, in order."""

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from msbd.edit import official, paper, stage
from msbd.edit.pipeline import EditPipeline
from samplers import repaint
from tests.helpers.walk import count_calls, example

# Which lines of the paper's Algorithm 1 each function's comments name. Where one names a range, the function
# it calls there is another row.
PAGES: list[tuple[Callable[..., Any], int, int]] = [
    (EditPipeline.__call__, 1, 29),
    (stage.sample_stage, 2, 16),
    (stage._blended_diffusion, 4, 14),
    (repaint.algorithm_1, 5, 14),
    (EditPipeline._refined, 20, 27),
]
SAMPLED = (21, 26)  # the later stages' loop is `sample_stage` too, of a schedule without repeats


def lines_named(function: Callable[..., Any]) -> list[int]:
    """The numbers in a function's comments, "line 4" and "lines 5-14",
    in the order in which they stand there.
    """
    numbers: list[int] = []
    for text in inspect.getsource(function).splitlines():
        _, _, comment = text.partition("# ")
        for first, last in re.findall(r"\blines? (\d+)(?:-(\d+))?", comment):
            numbers += range(int(first), int(last or first) + 1)
    return numbers


@pytest.mark.parametrize(
    "function, first, last", PAGES, ids=lambda value: getattr(value, "__qualname__", str(value))
)
def test_each_line_of_algorithm_1_stands_there_once_and_in_order(
    function: Callable[..., Any], first: int, last: int
) -> None:
    assert lines_named(function) == list(range(first, last + 1))


def test_every_range_of_lines_is_a_page_of_its_own() -> None:
    pages = {(first, last) for _, first, last in PAGES}
    for function, *_ in PAGES:
        source = inspect.getsource(function)
        for first, last in re.findall(r"# lines (\d+)-(\d+)", source):
            span = (int(first), int(last))
            assert span in pages | {SAMPLED} or span[1] - span[0] == 1, (
                f"{function.__qualname__}: lines {span}"
            )


def test_paper_and_official_have_the_same_functions() -> None:
    """What `plan.rules` is asked for is on both pages, with the same parameters."""
    ours = {
        name: list(inspect.signature(function).parameters)
        for name, function in vars(paper).items()
        if inspect.isfunction(function) and function.__module__ == paper.__name__
    }
    assert len(ours) == 9
    for name, parameters in ours.items():
        assert list(inspect.signature(getattr(official, name)).parameters) == parameters, name


def test_the_picture_is_not_carried_around_for_nothing(tmp_path: Path) -> None:
    """Before the plan held each stage's mask and tiles, the same edit made 160 such calls."""
    assert count_calls(example(tmp_path / "edited.png")).total() <= 95
