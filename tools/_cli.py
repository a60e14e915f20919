"""What the command lines share: options, the choice of a device, progress, and errors told in one line.

Nothing here imports torch when it is itself imported, so that `--help` answers at once.
"""

import argparse
import functools
import importlib.util
import io
import math
import os
import re
import shutil
import signal
import sys
import tomllib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import Field, dataclass, field, fields
from itertools import combinations
from pathlib import Path
from threading import current_thread, main_thread
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    import torch

    from msbd.pixels.files import Photo
    from msbd.progress import EditStep
    from weights.embeddings import Embedding

ROOT = Path(__file__).resolve().parent.parent


# ---- options -----------------------------------------------------------------------------------------------

CELL = 8  # pixels, side of a latent cell


class CommandParser(argparse.ArgumentParser):
    """A parser that still understands the earlier names of its options, as do those of its sub-commands."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._renamed: dict[str, tuple[str, int]] = {}

    def add_renamed(self, old: str, new: str, *, times: int = 1) -> None:
        """Understand the flag `old` as `new`; it is in no help, and a note on stderr, unless --quiet, tells
        `new`.

        A whole number is multiplied by `times`: 8 where `old` counts latent cells and `new` pixels.
        """
        self._renamed[old] = (new, times)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As argparse's, after the earlier names in `args` were replaced by those of today."""
        prepare_console()
        words = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args(self._in_new_names(words), namespace)

    def _in_new_names(self, words: list[str]) -> list[str]:
        end = words.index("--") if "--" in words else len(words)
        result: list[str] = []
        notes: dict[str, str] = {}
        times = 1
        for word in words[:end]:
            flag, equals, value = word.partition("=")
            if flag in self._renamed:
                new, times = self._renamed[flag]
                unit = f", in pixels: {times} times the number of latent cells" if times > 1 else ""
                notes[flag] = f"note: {flag} is now {new}{unit}"
                result.append(f"{new}={_multiplied(value, times)}" if equals else new)
            else:
                times = 1 if re.match(r"-\D", word) else times  # another flag: its values are its own
                result.append(_multiplied(word, times))
        if "--quiet" not in words:
            for note in notes.values():
                print(note, file=sys.stderr)
        return result + words[end:]


def _multiplied(value: str, times: int) -> str:
    try:
        return str(times * int(value)) if times > 1 else value
    except ValueError:  # no number: for argparse to refuse
        return value


class _CommonHelp(argparse.Action):
    """-h: the help of the group of common options alone."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        # Argparse's own two groups are empty, the third is the common one.
        for group in parser._action_groups[3:]:
            for action in group._group_actions:
                action.help = argparse.SUPPRESS
        parser.print_help()
        parser.exit()


def picture_parser(
    command: str, usage: str, description: str | None
) -> tuple[CommandParser, argparse._ArgumentGroup]:
    """The parser of `python -m tools.COMMAND`, and its group of common options: all that --help shows.

    Every other group that is added to the parser is shown by --help-all.
    """
    parser = CommandParser(
        prog=f"python -m tools.{command}",
        usage=f"python -m tools.{command} {usage}",
        description=description,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=28),
        allow_abbrev=False,
        add_help=False,
    )
    common = parser.add_argument_group("common options")
    add = common.add_argument
    add("-h", "--help", action=_CommonHelp, nargs=0, default=argparse.SUPPRESS, help="show this and exit")
    add("--help-all", action="help", help="show every option, by subject, and exit")
    return parser, common


def add_shared_options(
    parser: argparse.ArgumentParser,
    *,
    device: bool = True,
    dtype: bool = True,
    common: argparse._ArgumentGroup | None = None,
) -> None:
    """--device, --dtype (unless these are false), --seed, --quiet, --debug and --version.

    --seed and --device go into the group `common`, where there is one, and else with the others.
    """
    running = parser.add_argument_group("running")
    often = running if common is None else common
    often.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of all that is drawn; the same seed gives the same result (default: 0)",
    )
    if device:
        often.add_argument(
            "--device",
            choices=("auto", "cpu", "cuda", "mps"),
            default="auto",
            help="where to compute (default: auto: the GPU if there is one)",
        )
    if dtype:
        running.add_argument(
            "--dtype",
            choices=("auto", "float32", "bfloat16", "float16"),
            default="auto",
            help="of the U-Net (default: auto: float16 on CUDA, float32 elsewhere)",
        )
    running.add_argument("--quiet", action="store_true", help="print nothing but errors")
    running.add_argument("--debug", action="store_true", help="show the traceback of an error")
    running.add_argument("--version", action="version", version=f"msbd {version()}")


def add_model_and_preset(
    common: argparse._ArgumentGroup, presets: Iterable[str], told: str, *, default: str = "paper"
) -> None:
    """--model and --preset; `told` says what those other than paper and official do."""
    common.add_argument(
        "--model",
        default="auto",
        help="a known model's name, or a model's folder or file (default: auto: the best one here)",
    )
    common.add_argument(
        "--preset",
        choices=presets,
        default=default,
        help="paper: its formulas and settings; official: those of the official code, to measure the difference; "
        f"{told}. Other flags overrule it (default: {default})",
    )


def add_lora(add: Callable[..., Any], to: str) -> None:
    """--lora, which adds LoRAs `to` something."""
    add(
        "--lora",
        type=weighted_file,
        action="append",
        default=[],
        metavar="FILE:WEIGHT",
        help=f"add a LoRA to {to}; may be repeated",
    )


def add_embedding(add: Callable[..., Any]) -> None:
    """--embedding, which teaches the text encoder words."""
    add(
        "--embedding",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="a textual inversion; the prompt names it as the file is named; may be repeated",
    )


def add_parts(add: Callable[..., Any], upscaler: str) -> None:
    """--vae, --upscaler and --prediction-type; `upscaler` says what that enlarges."""
    add("--vae", metavar="MODEL", help="take the autoencoder of another model, by its name, folder or file")
    add(
        "--upscaler",
        metavar="MODEL",
        help=f"{upscaler}, by its name, folder or file (realsr-df2k, 4x-anything.pth)",
    )
    add(
        "--prediction-type",
        choices=("epsilon", "v_prediction", "sample"),
        help="what the U-Net was trained to predict, where its files do not say it or say it wrong",
    )


def part_name(model: str, path: Path) -> str:
    """A part of another model as a result's file names it: that model, first digits of the part's hash."""
    from weights.files import sha256_once

    return f"{Path(model).name} ({sha256_once(path)[:10]})"


def print_notes(notes: Iterable[str], *, quiet: bool) -> None:
    """Each note on a line of stderr, unless `quiet`."""
    if not quiet:
        for note in notes:
            print(f"note: {as_typed(note)}", file=sys.stderr)


def as_typed(message: str) -> str:
    """`message` with its commands for the Python that runs, where plain `python` is another one or none."""
    python, usual = Path(sys.executable), shutil.which("python")
    if usual and Path(usual).absolute() == python.absolute():
        return message
    here = python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else python
    return re.sub(r"(?<![\w/.-])python -m ", lambda _: f"{here} -m ", message)


def add_result_options(common: argparse._ArgumentGroup, add: Callable[..., Any]) -> None:
    """--dry-run, a common option, --no-metadata, --strip-metadata and --c2pa."""
    common.add_argument(
        "--dry-run", action="store_true", help="check all, print what would be done, write nothing"
    )
    add("--no-metadata", action="store_true", help="leave prompt, settings and versions out of the result")
    add(
        "--strip-metadata",
        action="store_true",
        help="leave these out, and all that the source says but its colours: camera, place, date, dpi, comments",
    )
    add(
        "--c2pa",
        type=Path,
        nargs=2,
        metavar=("CERT", "KEY"),
        help="sign the result as an edit of the source: a certificate chain and its private key, PEM (extra c2pa)",
    )


def add_folder_options(parser: argparse.ArgumentParser, columns: str) -> None:
    """The options of many pictures; `columns` are those of --jobs."""
    add = parser.add_argument_group("folders").add_argument
    add(
        "--jobs",
        type=Path,
        metavar="FILE",
        help=f"a list of pictures, CSV or JSON lines, with the columns {columns}; image alone must be there. Names are "
        "relative to --image, or else to the list's folder",
    )
    add("--recursive", action="store_true", help="read the folders below too; results keep the tree")
    add(
        "--format",
        choices=("png", "webp", "tif", "jpg", "same"),
        default="png",
        help="of the results of a folder; same: each as its source, where that format is written (default: png)",
    )
    add(
        "--resume",
        action="store_true",
        help="leave out what the manifest, msbd.jsonl among the results, knows as done by these settings",
    )
    add("--skip-existing", action="store_true", help="leave out pictures whose result is there, however made")
    add("--shard", type=shard, metavar="I/N", help="make every N-th picture only, from the I-th on")
    add("--workers", type=count, default=1, metavar="N", help="processes beside each other (default: 1)")
    add(
        "--ray",
        type=count,
        nargs="?",
        const=0,
        metavar="N",
        help="let Ray Data share the pictures, among N processes, by default one for each GPU or else each machine: of "
        "the cluster that RAY_ADDRESS names, or of this machine (extra ray)",
    )
    add(
        "--threads",
        type=count,
        metavar="N",
        help="of the CPU, in each process; results are the same to the last bit for the same number (default: all)",
    )


@functools.cache
def version() -> str:
    """The project's version, from pyproject.toml: it runs from a checkout, installed nowhere."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]


@dataclass(frozen=True)
class Option:
    """One field of a config class, and the flag that sets it."""

    name: str
    kind: type  # int, float, str or bool
    choices: tuple[str, ...]  # empty: anything of that kind
    default: Any
    flag: str = field(default="", compare=False)
    help: str = field(default="", compare=False)
    times: int = field(default=1, compare=False)  # a field in latent cells has a flag in pixels: 8 for each


def config_options(
    config: type, flags: Mapping[str, str] | None = None, preset: Mapping[str, Any] | None = None
) -> dict[str, Option]:
    """The fields of a config dataclass: int, float, str, bool or a Literal of strings, bare or `| None`.

    A field's flag is its name with hyphens, or what `flags` says. Its help is the sentence that
    `msbd.options.option` got, with the default of the command's own `preset` where that is another.
    """
    hints = get_type_hints(config)
    items = [(item, (preset or {}).get(item.name, item.default)) for item in fields(config)]
    return {item.name: _option(item, default, hints[item.name], flags or {}) for item, default in items}


def _option(item: "Field[Any]", default: Any, hint: Any, flags: Mapping[str, str]) -> Option:
    parts = get_args(hint)
    kind = next(part for part in parts if part is not NoneType) if NoneType in parts else hint
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    flag = flags.get(item.name, "--" + item.name.replace("_", "-"))
    times = CELL if item.metadata.get("unit") == "latent cells" else 1
    told = _help(item, default, times)
    return Option(item.name, str if choices else kind, choices, item.default, flag, told, times)


def _help(item: "Field[Any]", default: Any, times: int) -> str:
    """A field's sentence, unit and default, as --help has them."""
    sentence, unit, unset = (item.metadata.get(key, "") for key in ("sentence", "unit", "unset"))
    if unit:
        sentence += f", in {'pixels' if times > 1 else unit}"
    if default is None:
        default = unset
    elif isinstance(default, bool):
        default = "yes" if default else "no"
    elif isinstance(default, int):
        default *= times
    return sentence if default == "" else f"{sentence} (default: {default})"


def add_config_options(
    parser: argparse.ArgumentParser, options: Mapping[str, Option], table: Mapping[str, Sequence[str]]
) -> None:
    """A flag for each option of `table` (the title of a group -> names of fields), in `table`'s order."""
    for title, names in table.items():
        add_options(parser.add_argument_group(title), options, names)


def add_options(group: argparse._ArgumentGroup, options: Mapping[str, Option], names: Sequence[str]) -> None:
    """The flags of the fields `names`; one not given leaves nothing, so that a preset shows through."""
    for option in (options[name] for name in names):
        settings: dict[str, Any] = {"dest": option.name, "default": argparse.SUPPRESS, "help": option.help}
        if option.kind is bool:
            group.add_argument(option.flag, action=argparse.BooleanOptionalAction, **settings)
        elif option.choices:
            group.add_argument(option.flag, choices=option.choices, **settings)
        else:
            kind, metavar = {int: (int, "N"), float: (finite, "X"), str: (str, "TEXT")}[option.kind]
            group.add_argument(option.flag, type=kind, metavar=metavar, **settings)


def given_options(args: argparse.Namespace, options: Mapping[str, Option]) -> dict[str, Any]:
    """The options that the command line gave, by field name.

    ValueError for pixels that are no whole latent cells.
    """
    given = {name: value for name, value in vars(args).items() if name in options}
    for option in (options[name] for name in given):
        if option.times > 1:
            given[option.name] = pixels_in_cells(given[option.name], option.flag)
    return given


def sampling_of(loras: Iterable[tuple[str, float]]) -> dict[str, dict[str, Any]]:
    """Name -> what its card asks for, by RestoreConfig's names, of the known LoRAs that ask for something."""
    from weights.registry import MODELS

    known = (MODELS[name] for name, _ in loras if name in MODELS)
    return {model.name: dict(model.sampling) for model in known if model.sampling}


def sampling_notes(made_for: Mapping[str, Mapping[str, Any]], options: Mapping[str, Option]) -> list[str]:
    """What a LoRA that was made for few steps sets, as flags. Those of several would mix: none is set."""
    if len(made_for) > 1:
        return [
            f"{', '.join(made_for)}: made for different samplings, none is set; give --sampler and --steps"
        ]
    return [
        f"{name}: {flags_of(sampling, options)}, as it was made for; your own flags come first"
        for name, sampling in made_for.items()
    ]


def flags_of(settings: Mapping[str, Any], options: Mapping[str, Option]) -> str:
    """Values of a config's fields as one would type them."""
    return " ".join(f"{options[name].flag} {value}" for name, value in settings.items())


@contextmanager
def errors_by_flag(options: Mapping[str, Option]) -> Iterator[None]:
    """Let a config's ValueError, "FIELD is 4; expected at least 8 (latent cells)", name flag and pixels."""
    try:
        yield
    except ValueError as error:
        found = re.fullmatch(r"(\w+) is (.+?); expected (.+)", str(error))
        option = options.get(found[1]) if found else None
        if found is None or option is None:
            raise
        value, expected = found[2], found[3].replace("latent cells", "pixels")
        for other in options.values():
            expected = re.sub(rf"\b{other.name}\b", other.flag, expected)
        if (times := option.times) > 1:
            value, expected = (
                re.sub(r"(?<![\w-])\d+", lambda number: str(times * int(number[0])), text)
                for text in (value, expected)
            )
        raise ValueError(f"{option.flag} is {value}; expected {expected}") from None


def pixels_in_cells(pixels: int, flag: str) -> int:
    """A length in latent cells, of one that `flag` gave in pixels.

    ValueError where that is no multiple of 8.
    """
    if pixels % CELL:
        raise ValueError(f"{flag} is {pixels}; expected pixels, a multiple of {CELL}")
    return pixels // CELL


def finite(text: str) -> float:
    """A number for argparse; "nan" and "inf" are none."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def weighted_file(text: str) -> tuple[str, float]:
    """FILE:WEIGHT for argparse, or FILE alone at weight 1; a colon may be part of the file's name.

    So is one of a drive: "C:\\loras\\x.safetensors".
    """
    file, colon, weight = text.rpartition(":")
    of_the_name = re.search(r"[/\\]|\.[a-z]", weight) or os.path.exists(text)
    return (file, finite(weight)) if colon and not of_the_name else (text, 1.0)


def picture_size(text: str) -> tuple[int, int]:
    """WxH for argparse, as (H, W)."""
    found = re.fullmatch(r"([1-9]\d{0,5})[xX×]([1-9]\d{0,5})", text)
    if not found:
        raise ValueError
    return int(found[2]), int(found[1])


def count(text: str) -> int:
    """A whole number from 1 for argparse."""
    if (value := int(text)) < 1:
        raise ValueError
    return value


def shard(text: str) -> tuple[int, int]:
    """I/N for argparse: the I-th of N parts, from 1."""
    part, parts = (count(word) for word in text.split("/"))
    if part > parts:
        raise ValueError
    return part, parts


# What argparse says of a word that is none: "invalid number value: 'nan'".
finite.__name__ = "number"
weighted_file.__name__ = "FILE:WEIGHT"
picture_size.__name__ = "WxH"
count.__name__ = "number (from 1)"
shard.__name__ = "part (I/N, I from 1 to N)"


def wide(size: tuple[int, int]) -> str:
    """A size (H, W) as people say it: width first."""
    return f"{size[1]} x {size[0]}"


# ---- files -------------------------------------------------------------------------------------------------


def check_outputs(outputs: Mapping[str, Path], inputs: Mapping[str, Path]) -> None:
    """ValueError unless each of `outputs` (flag -> path) can be written and is no input or other output."""
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
    from msbd.pixels.files import holds_transparency

    if photo.alpha is not None and not holds_transparency(output):
        raise ValueError(
            f"{output}: JPEG has no transparency, which {image} has; write a .png, .webp or .tif"
        )


def embedding_names(files: Iterable[Path]) -> list[str] | None:
    """Textual inversions as a result's file names them: name, first digits of the hash; None for none."""
    from weights.files import sha256

    return [f"{path.name} ({sha256(path)[:10]})" for path in files] or None


def lora_names(loras: Iterable[tuple[str, float]]) -> list[str] | None:
    """LoRAs as a result's file names them: name, weight, first digits of the file's hash; None for none."""
    from msbd.loading.nets import lora_file
    from weights.files import sha256

    return [
        f"{Path(path).name}:{weight:g} ({sha256(lora_file(path))[:10]})" for path, weight in loras
    ] or None


def without_machine(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What a result's file says, but for `machine_facts`."""
    return {name: value for name, value in facts.items() if name not in ("device", "dtype", "msbd", "torch")}


def machine_facts(device: "torch.device", dtype: "torch.dtype") -> dict[str, str]:
    """What a result's file says of the run itself: device, precision and versions."""
    import torch

    return {
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "msbd": version(),
        "torch": str(torch.__version__),
    }


def same_file(one: Path, other: Path) -> bool:
    """Whether both paths lead to one file, by links or by spelling, existing or not."""
    return one.resolve() == other.resolve() or (one.exists() and other.exists() and one.samefile(other))


# ---- device ------------------------------------------------------------------------------------------------


def choose_device(device: str, dtype: str, threads: int | None = None) -> "tuple[torch.device, torch.dtype]":
    """What the words of --device and --dtype mean on this machine; `threads` are set. ValueError for what it
    does not have.
    """
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
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


# ---- progress ----------------------------------------------------------------------------------------------


class Progress:
    """One line per task of a stage, with the time left; silent where stderr is not a terminal."""

    def __init__(self, *, quiet: bool, part: str = "") -> None:
        from tqdm import tqdm

        self._open = tqdm
        self._disable = True if quiet else None  # None: ask the terminal
        self._bar: Any = None
        self._title = ""
        self.part = part  # in front of the title: which part of the work this is

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, at: "EditStep") -> None:
        if at.total == 1:  # over at once, or it cannot say how far it is
            return
        title = f"{self.part}{at.stage}, {at.task}"
        if title != self._title:
            self.__exit__()
            self._title = title
            self._bar = self._open(total=at.total, desc=title, disable=self._disable, dynamic_ncols=True)
        self._bar.update(at.step - self._bar.n)


def long_prompts(tokenizer: Any, prompts: Iterable[str], syntax: str = "plain") -> list[str]:
    """A note for each prompt whose end is not read; `tokenizer` is a pipeline's."""
    from weights.tokenizer import CONTEXT, PromptTokenizer

    if syntax != "plain" or not isinstance(tokenizer, PromptTokenizer):
        return []
    lengths = [tokenizer.length(prompt) for prompt in prompts]
    return [
        f"a prompt has {length} tokens, the last {length - CONTEXT} are cut off"
        for length in lengths
        if length > CONTEXT
    ]


def word_notes(tokenizer: Any, embeddings: "Iterable[Embedding]", prompts: Sequence[str]) -> list[str]:
    """A note for each of `embeddings` that no prompt names; `tokenizer` is a pipeline's."""
    return [
        f"--embedding {embedding.source}: no prompt names it; its word is {embedding.words[0]!r}"
        for embedding in embeddings
        if not any(tokenizer.has_word(word, prompt) for word in embedding.words for prompt in prompts)
    ]


def check_prompt(flag: str, prompt: str | None) -> None:
    """ValueError for a prompt with bytes that are no letters in the terminal's encoding."""
    if found := re.search(r"[\ud800-\udfff]+", prompt or ""):
        raise ValueError(
            f"{flag}: holds {found[0]!a} where letters are expected: bytes that are not {sys.getfilesystemencoding()}; "
            "type it in a terminal of that encoding, or give it in --jobs"
        )


# Constructs of other programs' prompts: how each is found, and what is said of it in a plain prompt and in
# one of the web interface's syntax; {0} is what was found. "" says nothing: it is read.
_WEBUI = "{0}: taken for words; --prompt-syntax webui"
_PROMPT_SYNTAX = (
    (r"(?<!\\)\([^()]*:\s*[\d.]+\s*\)", f"{_WEBUI} reads weights in brackets", ""),
    (r"<lora:([^:>]+)(?::([^:>]*))?[^>]*>", "{0}: taken for words; give --lora {1}.safetensors:{2}",
     "{0}: left out; give --lora {1}.safetensors:{2}"),
    (r"<(?:hypernet|lyco|embedding):[^>]*>", *["{0}: not read; networks are given by --lora and --embedding"] * 2),
    (r"\bembedding:([\w.-]+)", *["{0}: taken for words; give --embedding {1}.safetensors"] * 2),
    (r"\bBREAK\b", "BREAK: taken for a word; --prompt-syntax webui cuts a prompt there", ""),
    (r"\bAND\b", *["AND: taken for a word; prompts are not composed"] * 2),
    (r"\[[^\[\]]*[:|][^\[\]]*\]", *["{0}: taken for words; prompts do not change on the way"] * 2),
    (r"\(\([^()]*\)\)|\[[^\[\]:|]*\]", f"{_WEBUI} strengthens or weakens them", ""),
)  # fmt: skip


def prompt_notes(*prompts: str, syntax: str = "plain", embeddings: Iterable[Path] = ()) -> list[str]:
    """A note for each construct that other programs act on and this one, in that `syntax`, does not."""
    text = "\n".join(prompts)
    given = {path.stem for path in embeddings}
    notes = []
    for pattern, plain, webui in _PROMPT_SYNTAX:
        note, found = plain if syntax == "plain" else webui, re.search(pattern, text)
        if found and note:
            name, weight = (found.groups() + (None, None))[:2]
            if name is None or Path(name).stem not in given:
                notes.append("prompt: " + note.format(found[0], name, weight or 1))
    return notes


class Transfer:
    """A bar of bytes for one download, shown once some came; silent where stderr is not a terminal."""

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


# ---- errors ------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """How a run ended: `exit_code` 0, 1 for an expected failure, 130 and 143 when it was ended."""

    exit_code: int = 0


class Ended(KeyboardInterrupt):
    """The process was asked to end, by signal number `args[0]`: what cleans up after Ctrl-C does so here."""


@contextmanager
def ending_cleanly() -> Iterator[None]:
    """Let SIGTERM, of a scheduler or Docker, and SIGHUP raise `Ended` where they would end the process."""

    def end(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_IGN)  # once is enough
        raise Ended(number)

    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    numbers = [getattr(signal, name) for name in names] if current_thread() is main_thread() else []
    taken = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]  # nohup ignores one
    for number in taken:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def prepare_console() -> None:
    """Have every line shown at once, in a file or a pipe too, and escape what the console cannot show."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace", line_buffering=True)


EDIT_MEMORY = "take fewer candidates, smaller tiles (--tile, --tile-batch 1), --no-decoder-optimization, or --device cpu"


@contextmanager
def report_errors(*, debug: bool = False, memory: str = EDIT_MEMORY) -> Iterator[Outcome]:
    """Turn an expected failure into one line on stderr and an exit code; with `debug` let it pass.

    `memory` is the way out when there is not enough of it.
    """
    outcome, before = Outcome(), warnings.formatwarning
    # In one line too.
    warnings.formatwarning = lambda message, *_: f"warning: {as_typed(' '.join(str(message).split()))}\n"
    prepare_console()
    try:
        with ending_cleanly():
            yield outcome
    except Ended as end:
        outcome.exit_code = 128 + end.args[0]
        print("ended from outside", file=sys.stderr)
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
        print("error: " + as_typed(" ".join(message.split())), file=sys.stderr)
    finally:
        warnings.formatwarning = before


def expected_failure(error: Exception, way_out: str) -> str | None:
    """The line for an error that is the user's to solve; None for one that is ours.

    `way_out`: when memory is short.
    """
    text = str(error) or type(error).__name__
    memory = sys.modules.get("msbd.memory")  # imported with the nets, before anything large
    if isinstance(error, MemoryError) or (memory and memory.is_out_of_memory(error)):
        return f"out of memory; {way_out}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return text if isinstance(error, (ValueError, OSError, ImportError)) else None


def check_not_shadowed() -> None:
    """Fail early if another `nets`, `samplers`, `weights` or `msbd` on sys.path hides ours.

    Raises ImportError.
    """
    for name in ("msbd", "nets", "samplers", "weights"):
        spec = importlib.util.find_spec(name)  # finds, does not import
        origin = Path(spec.origin).resolve() if spec and spec.origin else None
        if origin != ROOT / name / "__init__.py":
            raise ImportError(
                f"`{name}` resolves to {origin}, not to {ROOT / name}: run `python -m tools.edit` from {ROOT}"
            )
