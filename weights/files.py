"""Weights files to state dicts and back: the one place that opens them. The format is told from the content, not the name.

Reads    safetensors, and the pickles that torch.save writes (.ckpt, .pth, .bin), tensors only and never any code;
         what else a download can turn out to be is refused in one line that says what it is
Tensors  {key: tensor} on the CPU, in the file's own dtypes, keys untouched
Copying  this file stands alone: torch, safetensors
"""

import hashlib
import io
import json
import os
import pickletools
import re
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

# More than this only fills the memory: SDXL's single file has 2,500 tensors, and 300,000 bytes that say what and where they are.
MAX_HEADER = 10_000_000  # bytes that describe the tensors, in any format
MAX_TENSORS, MAX_AXES = 100_000, 8
METADATA = "__metadata__"

# The format's names of what torch can hold (github.com/huggingface/safetensors, README "Format").
DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class WeightsError(ValueError):
    """A weights file does not fit: not there, another format, damaged, the wrong family, keys or shapes. One printable line."""

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() else " " for c in message[:1000]))


def first_line(error: Exception) -> str:
    """The first line of a library's message, at most 120 characters: what fits into a WeightsError."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return line if len(line) <= 120 else line[:117] + "..."


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a weights file, on the CPU. Raises WeightsError for anything else.

    Those of a pickle are taken out of `state_dict`, `params_ema`, `params` or `model` where they lie in there. The tensors are
    views of the file (it is mapped, not copied) wherever the format allows: cheap to open, and to be treated as read-only.
    """
    path = Path(path)
    with _messages_of(path):
        start = _beginning(path)
        if not _is_pickle(start):
            _read_header(path, start)  # first, because its refusals say more than the library's
            return load_file(path)
        if path.suffix.lower() == ".safetensors":  # whoever asked for the safe format did not ask for this
            raise WeightsError("named .safetensors, but is a PyTorch pickle; if you trust it, name it .ckpt")
        return _read_pickle(path, zipped=start.startswith(b"PK"))


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a safetensors file, without reading tensors; {} if it has none, or is a pickle. Raises WeightsError."""
    path = Path(path)
    with _messages_of(path):
        start = _beginning(path)
        metadata = {} if _is_pickle(start) else _read_header(path, start).get(METADATA, {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise WeightsError("its metadata is not a table of strings, as the safetensors format asks")
        return metadata


def is_pickle(path: str | Path) -> bool:
    """Whether the file is a pickle by its content, whatever its name. Raises WeightsError where there is no file."""
    with _messages_of(Path(path)):
        return _is_pickle(_beginning(Path(path)))


def write_safetensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write `tensors` and `metadata` (strings) as a safetensors file: complete, or not at all.

    The same content gives the same bytes; the library's own writer shuffles the metadata, which changes the sha256.
    `format: pt` is added to the metadata, since Hugging Face's loaders ask for it. Raises ValueError for what the
    format cannot hold.
    """
    path = Path(path)
    # Wide dtypes first keeps every tensor aligned to its item size.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header = _make_header(ordered, {"format": "pt", **(metadata or {})})
    with whole_file(path) as unfinished, open(unfinished, "xb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for _, tensor in ordered:
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it takes `path`'s place at the end, so that a failure leaves the old file."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)  # gone already when all went well


def sha256(path: str | Path) -> str:
    """SHA-256 of the whole file, 64 hexadecimal digits, as the registry and the Hugging Face hub give it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _make_header(ordered: list[tuple[str, Tensor]], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {METADATA: dict(sorted(metadata.items()))}
    offset = 0
    for name, tensor in ordered:
        if name == METADATA or tensor.dtype not in DTYPE_NAMES:
            raise ValueError(f"tensor {name!r} of {tensor.dtype} cannot be stored as safetensors")
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [offset, end]}  # fmt: skip
        offset = end
    if not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("safetensors metadata holds strings only; write anything else as JSON text")
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return text.ljust(-(-len(text) // 8) * 8)  # spaces up to a multiple of 8, where the tensors begin


@contextmanager
def _messages_of(path: Path) -> Iterator[None]:
    """Whatever goes wrong with reading `path` becomes a WeightsError that begins with it."""
    try:
        yield
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
    except OSError as error:
        raise WeightsError(f"{path}: cannot be opened ({error.strerror or first_line(error)})") from None
    except Exception as error:
        # A damaged pickle can raise anything at all. torch's own advice is to load it without weights_only.
        why = type(error).__name__ if "weights_only" in str(error) else first_line(error)
        raise WeightsError(f"{path}: damaged, or no weights ({why}); download it again") from None


def _beginning(path: Path) -> bytes:
    """The first 512 bytes."""
    if not path.is_file():
        what = "a folder" if path.is_dir() else "a device or pipe" if path.exists() else "no such file"
        raise WeightsError(f"{what}; expected a weights file")
    with open(path, "rb") as file:
        return file.read(512)


def _is_pickle(start: bytes) -> bool:
    # A safetensors header of 0x280 bytes begins like a pickle, but its ninth byte is always "{".
    return start.startswith((b"PK\x03\x04", b"\x80")) and start[8:9] != b"{"


# What the first bytes say the file is when it is none of ours: beginning (in lower case) -> what, and the way out.
_PACKED = "a packed archive; unpack it, and give the weights file in it"
_FOREIGN = {
    (b"<!doctype", b"<html", b"<?xml"): "a web page, not weights: a log-in, licence or error came instead; download it again",
    (b"version https://git-lfs",): "a Git LFS pointer, not the weights themselves: run `git lfs pull`, or download the file",
    (b"gguf",): "a GGUF file; expected safetensors",
    (b"\x89hdf",): "a Keras or TensorFlow file (HDF5); take the model's safetensors file",
    (b"7z\xbc\xaf", b"rar!", b"\x1f\x8b", b"\xfd7zxz", b"bzh", b"(\xb5/\xfd"): _PACKED,
    (b"\x89png", b"\xff\xd8\xff", b"riff", b"gif8"): "a picture, not weights; expected safetensors",
    tuple(bytes((8, version, 18)) for version in range(3, 20)): "an ONNX file; take the model's safetensors file",
    (b"{", b"["): "a JSON text file, not weights; expected safetensors",
}  # fmt: skip


def _read_header(path: Path, start: bytes) -> dict[str, Any]:
    """The JSON header: {tensor name: {dtype, shape, data_offsets}, METADATA: {...}}."""
    size, length = path.stat().st_size, int.from_bytes(start[:8], "little")
    if start[8:9] != b"{":
        what = (what for begin, what in _FOREIGN.items() if start.lstrip().lower().startswith(begin))
        unknown = f"not a weights file ({size:,} bytes, {start[:8]!r} ...); expected safetensors"
        raise WeightsError(_PACKED if start[257:262] == b"ustar" else next(what, unknown))
    if length > MAX_HEADER:
        raise WeightsError(f"{length:,} bytes of header, no known model has so many")
    if 8 + length > size:
        raise WeightsError(f"cut off in its header ({size:,} bytes of {8 + length:,}); download it again")
    with open(path, "rb") as file:
        text = file.read(8 + length)[8:]
    try:
        header = json.loads(text)
        entries = [entry for name, entry in header.items() if name != METADATA]
        need = 8 + length + max((entry["data_offsets"][1] for entry in entries), default=0)
        axes = max((len(entry["shape"]) for entry in entries), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        raise WeightsError("damaged: its safetensors header is not readable; download it again") from None
    if len(entries) > MAX_TENSORS or axes > MAX_AXES:
        raise WeightsError(f"{len(entries):,} tensors of up to {axes:,} axes, no known model has so many")
    if need > size:
        raise WeightsError(f"cut off ({size:,} bytes of {need:,}); download it again")
    return header


# ---- pickles ----------------------------------------------------------------------------------------------------------------

# torch.load(weights_only=True) calls only a few functions of its own; but a pickle can have these fill the memory, take hours, or
# give tensors beyond their storage. So it is followed first, without making anything, and loaded if torch.save writes such ones.
MAX_STEPS = 500_000  # a tensor takes about 35
MAX_WORK = 100_000_000  # a step costs 16 (LONG1, whose hashes can slow tables down, 2000), its letters, and what it takes
_STEPS = re.compile(
    "PROTO|STOP|MARK|(LONG_)?BIN(PUT|GET)|NONE|NEWTRUE|NEWFALSE|BININT[12]?|LONG1|BINFLOAT|BINUNICODE|SHORT_BINSTRING"
    "|EMPTY_(TUPLE|LIST|DICT)|TUPLE[123]?|APPENDS?|SETITEMS?|GLOBAL|REDUCE|NEWOBJ|BUILD|BINPERSID"
)
_BYTES = {"Double": 8, "Long": 8, "Float": 4, "Int": 4, "Half": 2, "BFloat16": 2, "Short": 2, "Char": 1, "Byte": 1, "Bool": 1}  # fmt: skip
# What a pickle may name: first what torch.load makes tensors and tables of; then what occurs in checkpoints of honest trainers
# beside the tensors, and is never called: a stand-in takes its place.
_NAMES = re.compile(
    rf"torch\.({'|'.join(_BYTES)})Storage|torch\._utils\._rebuild_(tensor|tensor_v2|parameter)|torch\.(Size|device|bool|u?int\d+"
    r"|b?float\d+)|collections\.(OrderedDict|Counter|defaultdict)|_codecs\.encode|builtins\.(set|complex|dict|list|tuple|frozenset"
    r"|str|int|float|bool|bytes|object)|(numpy|(pytorch_)?lightning|lightning_fabric|omegaconf|pathlib|argparse|typing|datetime)(\.\w+)+"
)
_UNLIKE = "not as torch.save writes it; it was not opened. Take a safetensors file"
_WRAPPERS = ("state_dict", "params_ema", "params", "model")  # where the tensors lie, the better ones first


class _StandIn:
    """Takes the place of any object that is not a tensor: made from anything, holds nothing, does nothing."""

    def __new__(cls, *_: object) -> Any:
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None: ...


# The stand-in of tables other than dict, which are filled item by item.
_Table = type("_Table", (), {"__new__": lambda *_: OrderedDict()})


@dataclass(frozen=True)
class _Thing:
    """Of a value in a pickle: the "name" of a function or class, what was "made" by calling that, or a "storage"'s length."""

    kind: str
    what: Any


def _read_pickle(path: Path, *, zipped: bool) -> dict[str, Tensor]:
    """The tensors of what torch.save wrote, as a zip archive or (before PyTorch 1.6) as bare pickles."""
    with warnings.catch_warnings(action="ignore"):
        names = _scan_archive(path) if zipped else _scan_pickles(path)
        made: list[Any] = [(_Table if name.lower().endswith("dict") else _StandIn, name) for name in names]
        with torch.serialization.safe_globals(made):
            tensors = _find_tensors(torch.load(path, map_location="cpu", weights_only=True, mmap=zipped))
    if not tensors:
        raise WeightsError(f"no weights: a pickle without tensors at its top or in {', '.join(_WRAPPERS)}")
    return tensors


def _find_tensors(content: Any, depth: int = 3) -> dict[str, Tensor]:
    """The tensors of a pickle's content in _WRAPPERS, else at its top; {} if there are none."""
    if not isinstance(content, dict):
        return {}
    items = dict(dict.items(content))  # an OrderedDict's own methods can be hidden by the pickle's
    for name in _WRAPPERS if depth else ():  # `model` may hold a `state_dict`
        if found := _find_tensors(items.get(name), depth - 1):
            return found
    return {k: v.detach() for k, v in items.items() if isinstance(k, str) and isinstance(v, Tensor)}


def _scan_archive(path: Path) -> set[str]:
    """The names in the pickle of a zip archive. WeightsError unless it is a plain archive as torch.save writes them."""
    _check_directory(path)
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        files = {member.filename.partition("/")[2]: member for member in members}
        if "constants.pkl" in files:
            raise WeightsError(
                "a TorchScript archive, which is a program (OpenAI's CLIP files are); take the Hugging Face files, "
                "for CLIP those of openai/clip-vit-large-patch14"
            )
        if "data.pkl" not in files:
            raise WeightsError("a zip archive of other files; unpack it, and give the weights file in it")
        names = {member.filename.lower() for member in members}  # torch.load minds no case
        folders = {name.partition("/")[0] for name in names}
        odd = len(folders) > 1 or len(names) < len(members) or len(members) > MAX_TENSORS
        if odd or files["data.pkl"].extra or not all(map(_is_plain, members)):
            raise WeightsError(f"a zip archive of packed, too many, or oddly named files, {_UNLIKE}")
        storages: dict[str, int] = {}
        found = _scan(io.BytesIO(archive.read(files["data.pkl"])), storages)
    for key, size in storages.items():
        if f"data/{key}" not in files or files[f"data/{key}"].file_size < size:
            raise WeightsError(f"damaged: values of a tensor are missing (data/{key:.40}); download it again")
    return found


def _is_plain(member: zipfile.ZipInfo) -> bool:
    """Whether it is stored as it is, under the name that torch.load sees, and holds values if it is large."""
    small = member.file_size <= MAX_HEADER or "/data/" in member.filename
    return small and member.compress_type == zipfile.ZIP_STORED and member.filename == member.orig_filename


def _check_directory(path: Path) -> None:
    """WeightsError unless the archive ends with its one directory, so that every reader finds the same files in it."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 98))
        end, place = file.read(), file.tell() - 22
    said, length, start = place, *struct.unpack("<2L", end[-10:-2])
    if end[56:60] == b"PK\x06\x07":  # the wide form, which torch.save writes in front of the other
        place, said = place - 76, int.from_bytes(end[64:72], "little")
        length, start = struct.unpack("<2Q", end[40:56])
    plain = end[-22:-18] == b"PK\x05\x06" and end[-2:] == b"\0\0" and said == place == start + length
    if not plain or length > MAX_HEADER:
        raise WeightsError("a zip archive that is cut off, or with other data behind it; download it again")


def _scan_pickles(path: Path) -> set[str]:
    """The names in the five pickles of the old format: magic number, version, system, content, keys of the storages."""
    storages: dict[str, int] = {}
    with open(path, "rb") as file:
        pickles = io.BytesIO(file.read(MAX_HEADER))
    names = set().union(*(_scan(pickles, storages) for _ in range(5)))
    need, size = pickles.tell() + sum(8 + size for size in storages.values()), path.stat().st_size
    if need > size:
        raise WeightsError(f"cut off ({size:,} bytes of {need:,}); download it again")
    return names


def _scan(pickle: IO[bytes], storages: dict[str, int]) -> set[str]:
    """Follow one pickle: the names in it, and into `storages` those it uses, {key: bytes}. WeightsError unless it is sound."""
    names, stack, outer, memo, work = set(), [], [], {}, 0  # of [what, cost]
    for count, (code, argument, _) in enumerate(pickletools.genops(pickle)):
        step, before, taken = code.name, code.stack_before, []
        if not _STEPS.fullmatch(step) or count > MAX_STEPS or work > MAX_WORK:
            raise WeightsError(f"a pickle with {step} as step {count:,}, {_UNLIKE}")
        if step == "MARK":
            outer.append(stack)
            stack = []
        elif step.endswith("PUT"):
            memo[argument] = stack[-1]
        elif step.endswith("GET"):
            stack.append(memo[argument])
        elif step not in ("PROTO", "STOP"):
            if pickletools.markobject in before:
                taken, stack, before = stack, outer.pop(), before[: before.index(pickletools.markobject)]
            taken = [stack.pop() for _ in before][::-1] + taken
            what = _follow(step, argument, [what for what, _ in taken], storages)
            names |= {what.what} if step == "GLOBAL" else set()
            # These change the first value that they take.
            value = taken.pop(0) if step.startswith(("APPEND", "SETITEM", "BUILD")) else [what, 0]
            cost = (2000 if step == "LONG1" else 16 + len(str(argument))) + sum(cost for _, cost in taken)
            value[1], work = value[1] + cost, work + cost
            stack.append(value)
    return names


def _follow(step: str, argument: Any, taken: list[Any], storages: dict[str, int]) -> Any:
    """What `step` makes of the values it takes: a literal, a tuple's values in a list, a _Thing, or ... WeightsError if odd."""
    match step, taken:
        case "GLOBAL", _:
            name = re.sub(r"\A__builtin__\.", "builtins.", argument.replace(" ", ".", 1))
            if not _NAMES.fullmatch(name):
                raise WeightsError(
                    f"a pickle that would run {name!r:.80}, which weights have no use for, {_UNLIKE}"
                )
            return _Thing("name", name)
        case "REDUCE", [_Thing("name", "_codecs.encode"), [_, "latin1"]]:  # some other encodings take hours
            return ...
        case "REDUCE", [_Thing("name", name), [*arguments]] if "._rebuild_tensor" in name:
            if len(arguments) in (4, 6) and _is_within(*arguments[:4]):
                return ...
        case "REDUCE" | "NEWOBJ", [_Thing("name", name), list()] if name != "_codecs.encode":
            return _Thing("made", name)
        case "BUILD", [_Thing("made", name), _] if not name.startswith("torch."):
            return ...
        case "BINPERSID", [["storage", _Thing("name", kind), str(key), str(), int(length), *view]]:
            size = length * _BYTES.get(kind[6:-7], -1)
            if view in ([], [None]) and length >= 0 and storages.setdefault(key, size) == size >= 0:
                return _Thing("storage", length)
    if step in ("REDUCE", "NEWOBJ", "BUILD", "BINPERSID"):
        raise WeightsError(f"a pickle with an odd {step}, {_UNLIKE}")
    return taken if "TUPLE" in step else argument if argument is not None or step == "NONE" else ...


def _is_within(storage: Any, offset: Any, size: Any, stride: Any) -> bool:
    """Whether a tensor has each of its values in the storage."""
    match storage, size, stride:
        case _Thing("storage", length), list(), list() if len(size) == len(stride) <= MAX_AXES:
            if all(type(number) is int and number >= 0 for number in (offset, *size, *stride)):
                last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
                return 0 in size or max(last + 1, prod(size)) <= length
    return False
