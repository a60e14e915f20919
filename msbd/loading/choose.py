"""What `--model auto` stands for: the best model that is on this machine and can do what was asked.

Edit     Stable Diffusion 1.5, then 1.4, in any of their files; else the mini bundle
Restore  PASD; where nothing but enlarging was asked for, an official upscaler; else the mini bundle
Network  none is asked: only files that lie here count
"""

from collections.abc import Collection
from dataclasses import dataclass

from weights.fetch import download_size, find_local, is_here
from weights.locate import ENLARGERS, find_enlarger
from weights.registry import INSTALL_UPSCALERS, MODELS, needed_files

EDITORS = ("sd-v1-5", "sd-v1-5-fp16", "sd-v1-5-diffusers", "sd-v1-4", "sd-v1-4-full-ema", "sd-v1-4-diffusers")
RESTORERS = ("pasd", "pasd-rrdb", "pasd-light", "pasd-light-rrdb")
COLOURERS = ("pasd-light-color",)
_TEST_PIECE = "a test piece that makes photographs worse than interpolation does, as {} is on this machine"


@dataclass(frozen=True)
class Choice:
    """A model, and what to tell of it."""

    model: str  # a name of the registry
    why: str
    better: str = ""  # the command that would get a better one, and what that is; empty: there is none

    def __str__(self) -> str:
        """The line that tells it."""
        return f"model {self.model}: {self.why}" + (f"; {self.better}" if self.better else "")


def choose_editor() -> Choice:
    """The model that an edit takes."""
    for name in EDITORS:
        if is_here(MODELS[name]):
            return Choice(name, "the first Stable Diffusion found on this machine")
    for name in EDITORS:
        if all(map(find_local, MODELS[name].files)):
            why = f"a test piece that knows its own scenes only, as what {name} needs besides is not here"
            return Choice("mini", why, f"for photographs run {_fetch(name)}")
    return Choice(
        "mini",
        "a test piece that knows its own scenes only, as no Stable Diffusion is on this machine",
        f"for photographs run {_fetch('sd-v1-5')}",
    )


def choose_restorer(*, mode: str = "sr", enlarge: bool = False, optional: Collection[str] = ()) -> Choice:
    """The model that a restoration in `mode` takes; with `enlarge` an upscaler will do.

    `optional` are parts that PASD need not have here, as a base brings them.
    """
    colour = mode == "colorize"
    names = COLOURERS if colour else RESTORERS
    for name in names:
        if is_here(MODELS[name], optional):
            return Choice(name, "PASD is on this machine")
    if enlarge:
        return choose_upscaler(f"{_fetch(names[0])} gets PASD, which is steered by words and a dial")
    better = f"for photographs run {_fetch(names[0])}"
    if mode in ("sr", "oldphoto") and (found := find_enlarger()) is not None:
        better += f", or take --method rrdb: {found.name}, which is here, enlarges without words and dials"
    return Choice("mini-pasd-color" if colour else "mini-pasd", _TEST_PIECE.format("no PASD"), better)


def choose_upscaler(better: str = "") -> Choice:
    """What enlarges without diffusion; `better` is the command that gets something better."""
    if (found := find_enlarger()) is not None:
        if found.name != ENLARGERS[0]:
            better = f"{INSTALL_UPSCALERS} gets Real-ESRGAN, which repairs too"
        return Choice(found.name, f"{MODELS[found.name].what}, is on this machine", better)
    return Choice("mini-pasd", _TEST_PIECE.format("no upscaler"), f"{INSTALL_UPSCALERS} gets Real-ESRGAN")


def _fetch(name: str) -> str:
    missing = [file for file in needed_files(MODELS[name]) if find_local(file) is None]
    return f"python -m tools.models fetch {name} ({download_size(missing)})"
