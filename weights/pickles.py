"""The tensors of what `torch.save` writes (.ckpt, .pth, .bin), and never any code.

Reads    zip archives (PyTorch 1.6 and later) and the bare pickles before them, with
         torch.load(weights_only=True), which makes tensors and plain containers only. Objects beside the
         tensors (a trainer's settings, callbacks, numpy arrays) are no reason to refuse a checkpoint: a
         stand-in that does nothing takes the place of each class or function that the pickle names, whatever
         it is. The real one is never looked up, nor its module imported.
Tensors  {key: tensor} on the CPU, views of the mapped file where it is a zip archive
Copying  this file stands alone: torch only
"""

import _compat_pickle
import pickletools
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

WRAPPERS = ("state_dict", "params_ema", "params", "model")  # where the tensors lie, the better ones first
WORDS = "string_to_param"  # where those of a textual inversion lie; they keep that name in front
_BLOCKED = ("sys", "os", "posix", "nt")  # modules of which torch.load lets nothing pass, not even a stand-in
_OLD_FORMAT = 5  # pickles in it: magic number, version, system, content, keys of the storages
_PROTOCOL = 2  # of every file that torch.save writes unless it is told otherwise


class PickleError(ValueError):
    """Why a file's tensors are not read, in one line without the file's name."""


class StandIn:
    """Takes the place of any class or function: made from any arguments, holds nothing, does nothing."""

    def __new__(cls, *_: object) -> Any:
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None: ...


class _TableStandIn:
    """The same for a kind of dict, which is filled item by item."""

    def __new__(cls, *_: object) -> Any:
        return OrderedDict()


class _ListStandIn:
    """The same for a kind of list."""

    def __new__(cls, *_: object) -> Any:
        return []


def read_pickle(path: Path, *, zipped: bool) -> dict[str, Tensor]:
    """The tensors in `state_dict`, `params_ema`, `params` or `model` where they lie in there, else those at
    the top.

    `zipped` says which of the two formats it is. Raises PickleError for a file that is no checkpoint, or
    without tensors; zipfile, pickle and torch raise whatever they like for a damaged one.
    """
    with warnings.catch_warnings(action="ignore"):  # pickletools' and torch's, of what nobody here wrote
        names = _names_in_archive(path) if zipped else _names_in_pickles(path)
        stand_ins: list[Any] = [(_stand_in(name), name) for name in names]
        with torch.serialization.safe_globals(stand_ins):
            tensors = _find_tensors(torch.load(path, map_location="cpu", weights_only=True, mmap=zipped))
    if not tensors:
        arrays = (
            ", but with numpy arrays, which are not read" if any("numpy" in name for name in names) else ""
        )
        raise PickleError(
            f"no weights: a pickle without tensors at its top or in {', '.join(WRAPPERS)}{arrays}"
        )
    for key, tensor in tensors.items():
        if not _is_plain(tensor):
            raise PickleError(
                f"{key!r:.80} is sparse, quantised, expanded or without values; expected plain tensors"
            )
    return tensors


def _stand_in(name: str) -> type:
    """What takes the place of `name`; of torch.load's own classes, which it looks up first, nothing does."""
    kind = name.lower()
    if kind.endswith("dict"):
        return _TableStandIn
    return _ListStandIn if kind.endswith(("list", "deque")) else StandIn


def _find_tensors(content: Any, depth: int = 3) -> dict[str, Tensor]:
    """The tensors of a pickle's content in WRAPPERS, else at its top; {} if there are none."""
    if not isinstance(content, dict):
        return {}
    items = dict(dict.items(content))  # an OrderedDict's own methods can be hidden by the pickle's
    for name in WRAPPERS if depth else ():  # `model` may hold a `state_dict`
        if found := _find_tensors(items.get(name), depth - 1):
            return found
    if found := _tensors_in(_parameters(items.get(WORDS))):
        return {f"{WORDS}.{word}": tensor for word, tensor in found.items()}
    return _tensors_in(items)


def _parameters(table: Any) -> dict[Any, Any]:
    """A table of parameters: a dict, or the stand-in of torch's ParameterDict, which holds one."""
    inner = getattr(table, "__dict__", {}).get("_parameters")
    held = inner if isinstance(inner, dict) else table
    return dict(dict.items(held)) if isinstance(held, dict) else {}


def _tensors_in(items: dict[Any, Any]) -> dict[str, Tensor]:
    return {k: v.detach() for k, v in items.items() if isinstance(k, str) and isinstance(v, Tensor)}


def _is_plain(tensor: Tensor) -> bool:
    """Whether each of its values is in memory, as a number."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _names_in_archive(path: Path) -> set[str]:
    """The names in the pickle of a zip archive. PickleError for archives of other things."""
    with zipfile.ZipFile(path) as archive:
        files = {member.filename.partition("/")[2]: member for member in archive.infolist()}
        if "constants.pkl" in files:
            raise PickleError(
                "a TorchScript archive, which is a program (OpenAI's CLIP files are); take the Hugging Face files, "
                "for CLIP those of openai/clip-vit-large-patch14"
            )
        if "data.pkl" not in files:
            raise PickleError("a zip archive of other files; unpack it, and give the weights file in it")
        if any(member.compress_type != zipfile.ZIP_STORED for member in files.values()):
            raise PickleError(
                "a zip archive with packed files, not as torch.save writes it; take the original file"
            )
        with archive.open(files["data.pkl"]) as file:
            return _names(file)


def _names_in_pickles(path: Path) -> set[str]:
    """The names in the pickles of the old format, in front of the tensors' values."""
    with open(path, "rb") as file:
        return set().union(*(_names(file) for _ in range(_OLD_FORMAT)))


def _names(file: IO[bytes]) -> set[str]:
    """The classes and functions that one pickle names, under Python 2's names and 3's. PickleError for
    _BLOCKED ones.
    """
    names = set()
    for step, argument, _ in pickletools.genops(file):
        if step.name == "PROTO" and int(argument or 0) > _PROTOCOL:
            raise PickleError(
                f"a pickle of protocol {argument}, expected {_PROTOCOL}, as torch.save writes by itself; take a safetensors file"
            )
        if step.name == "GLOBAL":
            old_module, _, old_name = str(argument).partition(" ")
            module, name = _compat_pickle.NAME_MAPPING.get((old_module, old_name), (old_module, old_name))
            module = _compat_pickle.IMPORT_MAPPING.get(module, module)
            if module in _BLOCKED:
                raise PickleError(
                    f"a pickle that would run {f'{module}.{name}'!r:.80}, which weights have no use for; it was not opened. "
                    "Take a safetensors file"
                )
            # Both, as torch.load translates Python 2's names by a table of its own.
            names |= {f"{old_module}.{old_name}", f"{module}.{name}"}
    return names
