"""weights/keymap.py: a map turns round, the longest path decides, and nothing is lost or named twice."""

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weights.keymap import KeyMap, count, expand, within

SEGMENTS = st.sampled_from(["a", "b", "ab", "0", "1", "10", "conv"])
PATHS = st.lists(SEGMENTS, min_size=1, max_size=4).map(".".join)
# Paths of one length, so that none leads into another: what makes a map one to one on keys, too.
EVEN = st.tuples(SEGMENTS, SEGMENTS).map(".".join)


@st.composite
def even_maps(draw: st.DrawFn) -> list[tuple[str, str]]:
    theirs = draw(st.lists(EVEN, min_size=1, max_size=8, unique=True))
    ours = draw(st.lists(EVEN, min_size=len(theirs), max_size=len(theirs), unique=True))
    return list(zip(theirs, ours, strict=True))


@given(pairs=even_maps(), ends=st.lists(PATHS, min_size=1, max_size=3))
def test_there_and_back_is_the_identity(pairs: list[tuple[str, str]], ends: list[str]) -> None:
    keys = [path for path, _ in pairs] + [f"{path}.{end}" for path, _ in pairs for end in ends]
    keys = list(dict.fromkeys(keys))
    there = KeyMap(pairs).there(keys)
    assert list(there.renamed) == keys and not there.unknown
    back = KeyMap(pairs).back(there.renamed.values())
    assert back.renamed == {new: key for key, new in there.renamed.items()} and not back.unknown
    assert KeyMap((ours, theirs) for theirs, ours in pairs).there(there.renamed.values()) == back


def by_longest_path(key: str, table: Mapping[str, str]) -> str | None:
    fitting = [path for path in table if f"{key}.".startswith(f"{path}.")]
    return table[max(fitting, key=len)] + key[len(max(fitting, key=len)) :] if fitting else None


@given(
    table=st.dictionaries(PATHS, st.integers(0, 99).map("x{}".format), min_size=1, max_size=8).filter(
        lambda table: len(set(table.values())) == len(table)
    ),
    keys=st.lists(PATHS, unique=True, max_size=12),
)
def test_the_longest_path_wins_and_every_key_is_renamed_or_unknown(
    table: dict[str, str], keys: list[str]
) -> None:
    coverage = KeyMap(table.items()).there(keys)
    expected = {key: by_longest_path(key, table) for key in keys}
    assert dict(coverage.renamed) == {key: name for key, name in expected.items() if name is not None}
    assert coverage.unknown == tuple(key for key in keys if expected[key] is None)


def test_a_path_is_of_whole_names() -> None:
    known = KeyMap([("in.1", "down.0"), ("in.1.norm", "norm")])
    keys = ["in.1.weight", "in.10.weight", "in.1.norm.bias", "in.1.norm2.bias", "in.1", "in", "xin.1.w", ""]
    coverage = known.there(keys)
    assert coverage.renamed == {
        "in.1.weight": "down.0.weight",
        "in.1.norm.bias": "norm.bias",
        "in.1.norm2.bias": "down.0.norm2.bias",
        "in.1": "down.0",
    }
    assert coverage.unknown == ("in.10.weight", "in", "xin.1.w", "")


@given(pairs=even_maps(), data=st.data())
def test_a_path_named_twice_is_refused(pairs: list[tuple[str, str]], data: st.DataObject) -> None:
    theirs, ours = data.draw(st.sampled_from(pairs))
    for again in ((theirs, "other.name"), ("other.name", ours), (theirs, ours)):
        with pytest.raises(ValueError, match="twice"):
            KeyMap([*pairs, again])


def test_expand_fills_every_template_at_every_place() -> None:
    templates = (("in.{n}.0", "down.{i}.resnets.{j}"), ("in.{n}.1", "down.{i}.attentions.{j}"))
    places = [{"n": 1, "i": 0, "j": 0}, {"n": 5, "i": 1, "j": 1}]
    assert list(expand(iter(templates), places)) == [
        ("in.1.0", "down.0.resnets.0"),
        ("in.1.1", "down.0.attentions.0"),
        ("in.5.0", "down.1.resnets.1"),
        ("in.5.1", "down.1.attentions.1"),
    ]
    assert list(expand(templates, [])) == []


def test_within_puts_pairs_below_a_pair() -> None:
    assert within(("in.{n}", "down.{i}"), [("a", "b"), ("c.0", "d")]) == [
        ("in.{n}.a", "down.{i}.b"),
        ("in.{n}.c.0", "down.{i}.d"),
    ]


@given(numbers=st.sets(st.integers(0, 12)), other=st.sampled_from(["x.0.y", "block", "block.0", "block.x.0"]))
def test_count_ends_at_the_first_gap(numbers: set[int], other: str) -> None:
    keys = [f"block.{number}.conv.weight" for number in numbers] + [other]
    assert count(iter(keys), "block.{}.") == next(n for n in range(20) if n not in numbers)


def test_count_asks_for_the_whole_template() -> None:
    keys = ["sub.0.RDB1.conv1.0.weight", "sub.1.RDB1.conv1.0.weight", "sub.2.weight", "osub.2.RDB1.x"]
    assert count(keys, "sub.{}.RDB1.") == 2 and count(keys, "sub.{}.") == 3


def test_count_of_many_keys_is_quick() -> None:
    keys = [f"block.{number}.weight" for number in range(50_000)]
    assert count(keys, "block.{}.") == 50_000  # in milliseconds; in minutes if each number looked at each key
