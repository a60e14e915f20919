"""The older names of ESRGAN's generator: of its first code (numbers of a Sequential), and of its second
(RRDB_trunk, HRconv).

Paper    Wang et al. 2018, arXiv:1809.00219, and its published models; today's names are basicsr's, as
         Real-ESRGAN's files have them
Copying  this file and keymap.py; standard library
"""

import re
from collections.abc import Iterable

from .keymap import KeyMap, count, expand

# (older, basicsr); block i of n, dense block k, convolution c
_FIRST_BLOCKS = (("model.1.sub.{i}.RDB{k}.conv{c}.0", "body.{i}.rdb{k}.conv{c}"),)
_FIRST_PLUS = (("model.1.sub.{i}.RDB{k}.conv1x1", "body.{i}.rdb{k}.conv1x1"),)  # of ESRGAN+
_SECOND_ENDS = (
    ("conv_first", "conv_first"),
    ("trunk_conv", "conv_body"),
    ("HRconv", "conv_hr"),
    ("conv_last", "conv_last"),
)
_SECOND_BLOCKS = (("RRDB_trunk.{i}.RDB{k}.conv{c}", "body.{i}.rdb{k}.conv{c}"),)
_MOST_DOUBLINGS = 4
_OF_SCALE_4 = (3, 6, 8, 10)  # numbers in the Sequential of two doublings and the two last convolutions


def esrgan_map(keys: Iterable[str]) -> KeyMap | None:
    """The map to today's names for a generator with these keys; None for one with these, or for no ESRGAN."""
    keys = list(keys)
    if number := count(keys, "model.1.sub.{}.RDB1."):
        dense = [{"i": i, "k": k} for i in range(number) for k in range(1, 4)]
        convolutions = [place | {"c": c} for place in dense for c in range(1, 6)]
        ends = _first_ends(keys, number)
        return KeyMap((*ends, *expand(_FIRST_BLOCKS, convolutions), *expand(_FIRST_PLUS, dense)))
    if number := count(keys, "RRDB_trunk.{}.RDB1."):
        places = [{"i": i, "k": k, "c": c} for i in range(number) for k in range(1, 4) for c in range(1, 6)]
        ups = [(f"upconv{n}", f"conv_up{n}") for n in range(1, _MOST_DOUBLINGS + 1)]
        return KeyMap((*_SECOND_ENDS, *ups, *expand(_SECOND_BLOCKS, places)))
    return None


def _first_ends(keys: list[str], number: int) -> list[tuple[str, str]]:
    """What is no block: numbers of the Sequential, by their order, as a doubling takes three of them."""
    found = {re.fullmatch(r"model\.(\d{1,3})\.(?:weight|bias)", key) for key in keys} - {None}
    numbers = sorted({int(one[1]) for one in found if one} - {0, 1})
    *ups, high, last = numbers[-(_MOST_DOUBLINGS + 2) :] if len(numbers) > 1 else _OF_SCALE_4
    names = [*(f"conv_up{n}" for n in range(1, len(ups) + 1)), "conv_hr", "conv_last"]
    ends = zip((*ups, high, last), names, strict=True)
    return [
        ("model.0", "conv_first"),
        (f"model.1.sub.{number}", "conv_body"),
        *((f"model.{n}", name) for n, name in ends),
    ]
