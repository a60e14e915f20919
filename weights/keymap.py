"""Key maps: one layout's names for another's, as data that is used in both directions.

A map is a list of pairs of module paths; a key is renamed by the longest path that it begins with, and what
follows stays.
Copying  this file stands alone: standard library
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

Pairs = Iterable[tuple[str, str]]


@dataclass(frozen=True)
class Coverage:
    """What a map says of a list of keys."""

    renamed: Mapping[str, str]  # key -> its name in the other layout
    unknown: tuple[str, ...]  # keys that the map does not know


class KeyMap:
    """Module paths of two layouts, one to one. Raises ValueError where either side names a path twice."""

    def __init__(self, pairs: Pairs) -> None:
        self.pairs = tuple(pairs)
        self._there = dict(self.pairs)
        self._back = {ours: theirs for theirs, ours in self.pairs}
        if not len(self._there) == len(self._back) == len(self.pairs):
            raise ValueError("a key map names a module path twice; it could not be turned round")

    def there(self, keys: Iterable[str]) -> Coverage:
        """`keys` of the first layout, renamed to the second."""
        return _rename(keys, self._there)

    def back(self, keys: Iterable[str]) -> Coverage:
        """`keys` of the second layout, renamed to the first."""
        return _rename(keys, self._back)


def expand(templates: Pairs, places: Iterable[Mapping[str, int]]) -> Iterator[tuple[str, str]]:
    """Every pair of `templates` at each of `places`: ("in.{n}", "down.{i}") at {"n": 4, "i": 1} is ("in.4",
    "down.1").
    """
    templates = tuple(templates)
    for place in places:
        for theirs, ours in templates:
            yield theirs.format_map(place), ours.format_map(place)


def within(outer: tuple[str, str], inner: Pairs) -> list[tuple[str, str]]:
    """The pairs `inner`, each below the pair `outer`."""
    return [(f"{outer[0]}.{theirs}", f"{outer[1]}.{ours}") for theirs, ours in inner]


def count(keys: Iterable[str], template: str, step: int = 1) -> int:
    """How many of `template`, with {} = 0, step, 2 step, ..., begin a key, up to the first that does not."""
    head, _, tail = template.partition("{}")
    rests = (key.removeprefix(head) for key in keys if key.startswith(head))
    found = {rest.partition(tail)[0] for rest in rests if tail in rest}
    number = 0
    while str(step * number) in found:
        number += 1
    return number


def _rename(keys: Iterable[str], table: Mapping[str, str]) -> Coverage:
    renamed, unknown = {}, []
    for key in keys:
        path = key
        while path and path not in table:
            path = path.rpartition(".")[0]
        if path:
            renamed[key] = table[path] + key[len(path) :]
        else:
            unknown.append(key)
    return Coverage(renamed, tuple(unknown))
