"""Weights files to state dicts and back: the one place that opens them. The format is told from the content,
not the name.

Reads    safetensors, and by way of pickles.py what torch.save writes (.ckpt, .pth, .bin), tensors only and
         never any code; what else a download can turn out to be is refused in one line that says what it is
Tensors  {key: tensor} on the CPU, in the file's own dtypes, keys untouched
Copying  this file and pickles.py; torch, safetensors
"""

import ctypes
import hashlib
import json
import math
import mmap
import os
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from .pickles import PickleError, read_pickle

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# What a header of safetensors may say: SDXL's single file has 2,500 tensors, and 300,000 bytes that say what
# and where they are.
MAX_HEADER = 10_000_000  # bytes
MAX_TENSORS, MAX_AXES = 100_000, 8
METADATA = "__metadata__"

# The format's names of what torch can hold (github.com/huggingface/safetensors, README "Format").
DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class WeightsError(ValueError):
    """A weights file does not fit: not there, another format, damaged, the wrong family, keys or shapes. One
    printable line.
    """

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() else " " for c in message[:1000]))


def first_line(error: Exception) -> str:
    """The first line of a library's message, at most 120 characters: what fits into a WeightsError."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return line if len(line) <= 120 else line[:117] + "..."


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a weights file, on the CPU. Raises WeightsError for anything else.

    Those of a pickle are taken out of `state_dict`, `params_ema`, `params` or `model` where they lie in
    there. The tensors are views of the file (it is mapped, not copied) wherever the format allows: cheap to
    open, and to be treated as read-only.
    """
    path = Path(path)
    with _messages_of(path):
        start = _beginning(path)
        if not _begins_as_pickle(start):
            header = _read_header(path, start)  # first, because its refusals say more than the library's
            return _load_padded(path, header, start) if _is_padded(path, header, start) else load_file(path)
        if path.suffix.lower() == ".safetensors":  # whoever asked for the safe format did not ask for this
            raise WeightsError("named .safetensors, but is a PyTorch pickle; if you trust it, name it .ckpt")
        return read_pickle(path, zipped=start.startswith(b"PK"))


def release_pages(tensors: Iterable[Tensor]) -> None:
    """Give back the memory that looking through mapped tensors took; the next look reads the file again.

    For tensors as `read_state_dict` gave them: what was written into one since is lost. Tensors that are not
    views of a mapped file stay as they are. Needs Linux's table of mappings; without it nothing happens.
    """
    table = Path("/proc/self/maps")
    if not table.is_file():
        return
    addresses = [tensor.data_ptr() for tensor in tensors]
    libc = ctypes.CDLL(None)
    for line in table.read_text().splitlines():  # man 5 proc_pid_maps
        span, mode, _, _, inode = line.split(maxsplit=5)[:5]
        start, end = (int(side, 16) for side in span.split("-"))
        private_file = inode != "0" and mode.endswith("p")  # of memory without a file this would be the end
        if private_file and any(start <= address < end for address in addresses):
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a safetensors file, without reading tensors; {} if it has none, or is a pickle. Raises
    WeightsError.
    """
    path = Path(path)
    with _messages_of(path):
        start = _beginning(path)
        metadata = {} if _begins_as_pickle(start) else _read_header(path, start).get(METADATA, {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise WeightsError("its metadata is not a table of strings, as the safetensors format asks")
        return metadata


def write_safetensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write `tensors` and `metadata` (strings) as a safetensors file: complete, or not at all.

    The same content gives the same bytes; the library's own writer shuffles the metadata, which changes the
    sha256. `format: pt` is added to the metadata, since Hugging Face's loaders ask for it. Raises ValueError
    for what the format cannot hold.
    """
    path = Path(path)
    # Wide dtypes first keeps every tensor aligned to its item size.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header = _make_header(ordered, {"format": "pt", **(metadata or {})})
    path = Path(os.path.realpath(path))  # of a link, what it leads to
    unfinished = path.with_name(f".msbd-{os.getpid()}-{time.monotonic_ns()}.tmp")
    try:
        with open(unfinished, "xb") as file:
            # Without a lock msbd.files.remove_leftovers takes it for one that a killed process left.
            if fcntl is not None:
                with suppress(OSError):
                    fcntl.flock(file, fcntl.LOCK_EX)
            file.write(len(header).to_bytes(8, "little") + header)
            for _, tensor in ordered:
                file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)  # gone already when all went well


def sha256(path: str | Path) -> str:
    """SHA-256 of the whole file, 64 hexadecimal digits, as the registry and the Hugging Face hub give it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_once(path: Path) -> str:
    """`sha256` of a file, computed once as long as its size and its time of change stay."""
    status = path.stat()
    return _sha256_of(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=256)
def _sha256_of(path: Path, size: int, changed: int) -> str:
    return sha256(path)


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


def _end(header: Mapping[str, Any], start: bytes) -> int:
    """The size of a safetensors file that ends with its last tensor."""
    last = max((entry["data_offsets"][1] for name, entry in header.items() if name != METADATA), default=0)
    return 8 + int.from_bytes(start[:8], "little") + last


def _is_padded(path: Path, header: Mapping[str, Any], start: bytes) -> bool:
    """Whether zeros follow the last tensor, as programs that write in blocks leave them. WeightsError for
    other bytes there, which the format forbids.
    """
    end, size = _end(header, start), path.stat().st_size
    with open(path, "rb") as file:
        file.seek(end)
        while behind := file.read(1 << 20):
            if any(behind):
                raise WeightsError(
                    f"{size - end:,} bytes behind its last tensor that are no padding; a safetensors file ends there: "
                    f"take another, or cut this one to {end:,} bytes"
                )
    return size > end


def _load_padded(path: Path, header: Mapping[str, Any], start: bytes) -> dict[str, Tensor]:
    """What the library's `load_file` gives of a file without its padding: views of the mapped file."""
    dtypes = {name: dtype for dtype, name in DTYPE_NAMES.items()}
    begin = 8 + int.from_bytes(start[:8], "little")
    content = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)[begin:]
    tensors, covered = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1].get("data_offsets", [0])):
        if name == METADATA:
            continue
        dtype, shape, (first, last) = dtypes[entry["dtype"]], entry["shape"], entry["data_offsets"]
        if first != covered or last - first != math.prod(shape) * dtype.itemsize:
            raise WeightsError(
                f"damaged: tensor {name!r:.80} does not lie where its header says; download it again"
            )
        values = content[first:last]
        aligned = (begin + first) % dtype.itemsize == 0
        tensors[name] = (values if aligned else values.clone()).view(dtype).reshape(shape)
        covered = last
    return tensors


@contextmanager
def _messages_of(path: Path) -> Iterator[None]:
    """Whatever goes wrong with reading `path` becomes a WeightsError that begins with it."""
    try:
        yield
    except (WeightsError, PickleError) as error:
        raise WeightsError(f"{path}: {error}") from None
    except zipfile.BadZipFile:
        raise WeightsError(f"{path}: a zip archive that is cut off, or damaged; download it again") from None
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


def _begins_as_pickle(start: bytes) -> bool:
    # A safetensors header of 0x280 bytes begins like a pickle, but its ninth byte is always "{".
    return start.startswith((b"PK\x03\x04", b"\x80")) and start[8:9] != b"{"


# What the first bytes say the file is when it is none of ours: beginning (in lower case) -> what, and the way
# out.
_PACKED = "a packed archive; unpack it, and give the weights file in it"
_FOREIGN = {
    (b"<!doctype", b"<html", b"<?xml"): "a web page, not weights: a log-in, licence or error came instead; download it again",
    (b"version https://git-lfs",): "a Git LFS pointer, not the weights themselves: run `git lfs pull`, or download the file",
    (b"gguf",): "a GGUF file; expected safetensors",
    (b"gk0\x01",): "the numbers of an ncnn model; give the .param file beside it, which says what they are",
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
        need = _end(header, start)
        axes = max((len(entry["shape"]) for entry in entries), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        raise WeightsError("damaged: its safetensors header is not readable; download it again") from None
    if len(entries) > MAX_TENSORS or axes > MAX_AXES:
        raise WeightsError(f"{len(entries):,} tensors of up to {axes:,} axes, no known model has so many")
    if need > size:
        raise WeightsError(f"cut off ({size:,} bytes of {need:,}); download it again")
    return header
