"""Options: the fields of a config class, each with the one sentence that `--help` and readers of the class
see.

Copying  this file stands alone: the standard library only, so that a command line can show every default
         without torch
"""

from collections.abc import Mapping
from dataclasses import field, fields
from functools import cache
from math import inf
from typing import Any, Literal, get_args, get_origin, get_type_hints


def option(default: Any, sentence: str, *, unit: str = "", unset: str = "") -> Any:
    """A field of a config dataclass: `num_steps: int = option(50, "diffusion steps of a whole run")`.

    `unit` is what a number counts ("pixels", "latent cells"), where the sentence does not say it. `unset`
    says what a default of None stands for ("the model's native size").
    """
    return field(default=default, metadata={"sentence": sentence, "unit": unit, "unset": unset})


def words(hint: Any) -> tuple[str, ...]:
    """The words that a field of this type may hold, where they are fixed: a Literal, bare or `| None`."""
    return next((get_args(part) for part in (hint, *get_args(hint)) if get_origin(part) is Literal), ())


@cache
def _words(config: type) -> dict[str, tuple[str, ...]]:
    """The fields of a config class that have fixed words, with these."""
    return {name: allowed for name, hint in get_type_hints(config).items() if (allowed := words(hint))}


def check_options(config: Any, ranges: Mapping[str, tuple[float, float]]) -> None:
    """ValueError where a field of `config` holds none of its words, or a number outside its range; None
    passes.

    `ranges` is field -> (least, most), both allowed; most may be `inf`.
    """
    for name, allowed in _words(type(config)).items():
        value = getattr(config, name)
        if value is not None and value not in allowed:
            raise ValueError(f"{name} is {value!r}; expected one of {', '.join(allowed)}")
    units = {item.name: item.metadata.get("unit") for item in fields(config)}
    for name, (least, most) in ranges.items():
        value = getattr(config, name)
        if value is not None and not least <= value <= most:  # `not`: nan fails too
            expected = f"{least} to {most}" if most < inf else f"at least {least}"
            unit = f" ({units[name]})" if units[name] else ""
            raise ValueError(f"{name} is {value}; expected {expected}{unit}")
