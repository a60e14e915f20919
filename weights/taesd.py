"""The names of TAESD in its authors' files: two halves, taesd_encoder and taesd_decoder, numbered as in a
Sequential; or both in one file, below "encoder." and "decoder.".

Source   github.com/madebyollin/taesd; today's names are those of diffusers' AutoencoderTiny
Copying  this file and keymap.py; standard library
"""

import re
from collections.abc import Iterable
from pathlib import Path

from .keymap import KeyMap

HALVES = ("encoder", "decoder")
_LAYER = re.compile(r"(\d{1,3})\.(?:conv\.[024]\.)?(?:weight|bias)")


def half_of(keys: Iterable[str]) -> str | None:
    """ "encoder" or "decoder" where these are the keys of one half alone; None for anything else."""
    keys = set(keys)
    if not keys or not all(_LAYER.fullmatch(key) for key in keys):
        return None
    if {"0.weight", "1.conv.0.weight"} <= keys:
        return "encoder"
    return "decoder" if {"1.weight", "3.conv.0.weight"} <= keys and "0.weight" not in keys else None


def other_half(path: Path, half: str) -> Path:
    """Where the other half of the file at `path` lies: beside it, with that in its name."""
    other = HALVES[1 - HALVES.index(half)]
    return path.with_name(
        path.name.replace(half, other) if half in path.name else f"taesd_{other}{path.suffix}"
    )


def taesd_map(keys: Iterable[str]) -> KeyMap | None:
    """The map to today's names for a net with these keys of both halves; None for any other."""
    numbers: dict[str, set[int]] = {half: set() for half in HALVES}
    for key in keys:
        half, _, rest = key.partition(".")
        if half not in numbers or not (found := _LAYER.fullmatch(rest)):
            return None
        numbers[half].add(int(found[1]))
    if not all(numbers.values()):
        return None
    shift = {"encoder": 0, "decoder": 1}  # the decoder's first layer has no weights
    return KeyMap(
        (f"{half}.{n}", f"{half}.layers.{n - shift[half]}") for half in HALVES for n in sorted(numbers[half])
    )
