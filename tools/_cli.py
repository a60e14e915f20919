"""What the command lines share: options, the choice of a device, progress, and errors told in one line.

Nothing here imports torch when it is itself imported, so that `--help` answers at once.
"""

import argparse
import importlib.util
import math
import os
import sys
import tomllib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import combinations
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    import torch

    from msbd.pixels.files import Photo
    from msbd.progress import EditStep

ROOT = Path(__file__).resolve().parent.parent


# ---- options ----------------------------------------------------------------------------------------------------------------


def picture_parser(command: str, usage: str, description: str | None) -> argparse.ArgumentParser:
    """The bare parser of `python -m tools.COMMAND`; its -h is the caller's, to stand first in a group."""
    return argparse.ArgumentParser(
        prog=f"python -m tools.{command}",
        usage=f"python -m tools.{command} {usage}",
        description=description,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=28),
        allow_abbrev=False,
        add_help=False,
    )


def add_shared_options(parser: argparse.ArgumentParser, *, device: bool = True, dtype: bool = True) -> None:
    """--device, --dtype (unless these are false), --seed, --quiet, --debug and --version."""
    group = parser.add_argument_group("running")
    if device:
        group.add_argument(
            "--device",
            choices=("auto", "cpu", "cuda", "mps"),
            default="auto",
            help="where to compute (default: auto: the GPU if there is one)",
        )
    if dtype:
        group.add_argument(
            "--dtype",
            choices=("auto", "float32", "bfloat16", "float16"),
            default="auto",
            help="of the U-Net (default: auto: float16 on CUDA, float32 elsewhere)",
        )
    group.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of all that is drawn; the same seed gives the same result (default: 0)",
    )
    group.add_argument("--quiet", action="store_true", help="print nothing but errors")
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")
    group.add_argument("--version", action="version", version=f"msbd {version()}")


def version() -> str:
    """The project's version, from pyproject.toml: it runs from a checkout, installed nowhere."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]


@dataclass(frozen=True)
class Option:
    """One field of a config class."""

    name: str
    kind: type  # int, float, str or bool
    choices: tuple[str, ...]  # empty: anything of that kind
    default: Any


def config_options(config: type) -> dict[str, Option]:
    """The fields of a config dataclass: int, float, str, bool or a Literal of strings, bare or `| None`, each with a default."""
    hints = get_type_hints(config)
    return {field.name: _option(field.name, hints[field.name], field.default) for field in fields(config)}


def _option(name: str, hint: Any, default: Any) -> Option:
    parts = get_args(hint)
    kind = next(part for part in parts if part is not NoneType) if NoneType in parts else hint
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    return Option(name, str if choices else kind, choices, default)


def add_config_options(
    parser: argparse.ArgumentParser, options: Mapping[str, Option],
    table: Mapping[str, Mapping[str, str]], flags: Mapping[str, str],
) -> None:  # fmt: skip
    """A flag for each option of `table` (group -> field -> help text), in `table`'s order.

    Its name is the field's with hyphens, or what `flags` says. A flag that is not given leaves nothing behind, so that a
    preset shows through; `given_options` collects the others.
    """
    for title, rows in table.items():
        group = parser.add_argument_group(title)
        for name, text in rows.items():
            option = options[name]
            flag = flags.get(name, "--" + name.replace("_", "-"))
            settings: dict[str, Any] = {
                "dest": name,
                "default": argparse.SUPPRESS,
                "help": text + _default(option),
            }
            if option.kind is bool:
                group.add_argument(flag, action=argparse.BooleanOptionalAction, **settings)
            elif option.choices:
                group.add_argument(flag, choices=option.choices, **settings)
            else:
                kind, metavar = {int: (int, "N"), float: (finite, "X"), str: (str, "TEXT")}[option.kind]
                group.add_argument(flag, type=kind, metavar=metavar, **settings)


def given_options(args: argparse.Namespace, options: Mapping[str, Option]) -> dict[str, Any]:
    """The options that the command line gave, by field name."""
    return {name: value for name, value in vars(args).items() if name in options}


def finite(text: str) -> float:
    """A number for argparse; "nan" and "inf" are none."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def weighted_file(text: str) -> tuple[str, float]:
    """FILE:WEIGHT for argparse, or FILE alone at weight 1; a colon may be part of the file's name."""
    file, colon, weight = text.rpartition(":")
    return (file, finite(weight)) if colon and not os.path.exists(text) else (text, 1.0)


weighted_file.__name__ = "FILE:WEIGHT"  # argparse: "invalid FILE:WEIGHT value: ..."
finite.__name__ = "number"  # argparse: "invalid number value: 'nan'"


def _default(option: Option) -> str:
    if option.default is None or option.default == "":
        return ""  # the text says what happens then
    shown = ("no", "yes")[option.default] if option.kind is bool else option.default
    return f" (default: {shown})"


def wide(size: tuple[int, int]) -> str:
    """A size (H, W) as people say it: width first."""
    return f"{size[1]} x {size[0]}"


# ---- files ------------------------------------------------------------------------------------------------------------------


def check_outputs(outputs: Mapping[str, Path], inputs: Mapping[str, Path]) -> None:
    """ValueError unless each of `outputs` (flag -> path) can be written, and is neither an input nor another output."""
    for flag, path in outputs.items():
        if path.is_dir():
            raise ValueError(f"{path}: a folder; {flag} takes a file name")
        if not path.parent.is_dir():
            raise ValueError(f"{path}: the folder {path.parent} does not exist; make it first")
        if not os.access(path.parent, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
            raise ValueError(
                f"{path}: no permission to write there; {flag} takes a place that you may write to"
            )
        for other, taken in inputs.items():
            if same_file(path, taken):
                raise ValueError(f"{path}: {flag} would overwrite what {other} reads; take another name")
    for (flag, path), (other, taken) in combinations(outputs.items(), 2):
        if same_file(path, taken):
            raise ValueError(f"{path}: both {flag} and {other} would be written there; take another name")


def check_transparency(photo: "Photo", image: Path, output: Path) -> None:
    """ValueError where `photo`, read from `image`, would lose its transparency at `output`."""
    if photo.alpha is not None and output.suffix.lower() in (".jpg", ".jpeg"):
        raise ValueError(f"{output}: JPEG has no transparency, which {image} has; write a .png or .webp")


def told_loras(loras: Iterable[tuple[str, float]]) -> list[str] | None:
    """LoRAs as a result's file names them: name, weight and the first digits of the file's hash; None for none."""
    from msbd.loading.nets import lora_file
    from weights.files import sha256

    return [
        f"{Path(path).name}:{weight:g} ({sha256(lora_file(path))[:10]})" for path, weight in loras
    ] or None


def same_file(one: Path, other: Path) -> bool:
    """Whether both paths lead to one file, by links or by spelling, existing or not."""
    return one.resolve() == other.resolve() or (one.exists() and other.exists() and one.samefile(other))


# ---- device -----------------------------------------------------------------------------------------------------------------


def choose_device(device: str, dtype: str) -> "tuple[torch.device, torch.dtype]":
    """What the words of --device and --dtype mean on this machine. ValueError for what it does not have."""
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        device = next(name for name, available in there.items() if available)
    if not there[device]:
        raise ValueError(f"--device {device}: this machine has none that torch can use; take --device cpu")
    if device == "cpu" and dtype == "float16":
        raise ValueError("--dtype float16 is for GPUs; on a CPU take float32 or bfloat16")
    if dtype == "auto":
        dtype = "float16" if device == "cuda" else "float32"
    return torch.device(device), getattr(torch, dtype)


# ---- progress ---------------------------------------------------------------------------------------------------------------


class Progress:
    """One line per task of a stage, with the time left; silent where stderr is not a terminal."""

    def __init__(self, *, quiet: bool) -> None:
        from tqdm import tqdm

        self._open = tqdm
        self._disable = True if quiet else None  # None: ask the terminal
        self._bar: Any = None
        self._title = ""

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, at: "EditStep") -> None:
        if at.total == 1:  # over at once, or it cannot say how far it is
            return
        title = f"{at.stage}, {at.task}"
        if title != self._title:
            self.__exit__()
            self._title = title
            self._bar = self._open(total=at.total, desc=title, disable=self._disable, dynamic_ncols=True)
        self._bar.update(at.step - self._bar.n)


def warn_of_long_prompts(tokenizer: Any, prompts: Iterable[str]) -> None:
    """Say on stderr where the end of a prompt is not read; `tokenizer` is a pipeline's."""
    from weights.tokenizer import CONTEXT, PromptTokenizer

    for prompt in prompts:
        if isinstance(tokenizer, PromptTokenizer) and (length := tokenizer.length(prompt)) > CONTEXT:
            print(
                f"note: a prompt has {length} tokens, the last {length - CONTEXT} are cut off",
                file=sys.stderr,
            )


class Transfer:
    """A bar of bytes for one download, shown once there is something to download; silent where stderr is not a terminal."""

    def __init__(self, title: str, *, quiet: bool) -> None:
        self._title, self._quiet = title, quiet
        self._bar: Any = None

    def __enter__(self) -> "Transfer":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, done: int, total: int) -> None:
        if self._bar is None:
            from tqdm import tqdm

            disable = True if self._quiet else None  # None: ask the terminal
            self._bar = tqdm(total=total, desc=self._title, unit="B", unit_scale=True, disable=disable)
        self._bar.update(done - self._bar.n)


# ---- errors -----------------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """How a run ended: `exit_code` 0, 1 for an expected failure, 130 when interrupted."""

    exit_code: int = 0


EDIT_MEMORY = "take fewer candidates, smaller tiles (--tile, --tile-batch 1), --no-decoder-optimization, or --device cpu"


@contextmanager
def report_errors(*, debug: bool = False, memory: str = EDIT_MEMORY) -> Iterator[Outcome]:
    """Turn what can be expected to go wrong into one line on stderr and an exit code; with `debug` let it pass.

    `memory` is the way out when there is not enough of it.
    """
    outcome, before = Outcome(), warnings.formatwarning
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"  # in one line too
    try:
        yield outcome
    except KeyboardInterrupt as interrupt:
        if debug:
            raise
        outcome.exit_code = 130  # 128 + SIGINT, as shells have it
        print(str(interrupt) or "interrupted", file=sys.stderr)
    except BrokenPipeError:  # whoever reads our output, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        message = None if debug else expected_failure(error, memory)
        if message is None:
            raise
        outcome.exit_code = 1
        print("error: " + " ".join(message.split()), file=sys.stderr)
    finally:
        warnings.formatwarning = before


def expected_failure(error: Exception, way_out: str) -> str | None:
    """The line for an error that is the user's to solve; None for one that is ours. `way_out`: when memory is short."""
    text = str(error) or type(error).__name__
    memory = sys.modules.get("msbd.memory")  # imported with the nets, before anything large
    if isinstance(error, MemoryError) or (memory and memory.is_out_of_memory(error)):
        return f"out of memory; {way_out}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return text if isinstance(error, (ValueError, OSError, ImportError)) else None


def check_not_shadowed() -> None:
    """Fail early if another `nets`, `samplers`, `weights` or `msbd` on sys.path hides ours. Raises ImportError."""
    for name in ("msbd", "nets", "samplers", "weights"):
        spec = importlib.util.find_spec(name)  # finds, does not import
        origin = Path(spec.origin).resolve() if spec and spec.origin else None
        if origin != ROOT / name / "__init__.py":
            raise ImportError(
                f"`{name}` resolves to {origin}, not to {ROOT / name}: run `python -m tools.edit` from {ROOT}"
            )
