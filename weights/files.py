"""Weights files to state dicts and back: the one place that opens them. The format is told from the content, not the name.

Reads    safetensors; what else a download can turn out to be is refused in one line that says what it is
Tensors  {key: tensor} on the CPU, in the file's own dtypes, keys untouched
Copying  this file stands alone: torch, safetensors
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

MAX_HEADER = 100_000_000  # bytes: the format's own limit
MAX_TENSORS = 100_000  # SDXL's single file has about 2,500; a header of millions only costs memory
METADATA = "__metadata__"

# The format's names of what torch can hold (github.com/huggingface/safetensors, README "Format").
DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class WeightsError(ValueError):
    """A weights file does not fit: not there, another format, damaged, the wrong family, keys or shapes. One line."""


def first_line(error: Exception) -> str:
    """The first line of a library's message, at most 120 characters: what fits into a WeightsError."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return line if len(line) <= 120 else line[:117] + "..."


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU. Raises WeightsError for anything else.

    The tensors are views of the file (it is mapped, not copied): cheap to open, and to be treated as read-only.
    """
    path = Path(path)
    _read_header(path)  # first, because its refusals say more than the library's
    try:
        return load_file(path)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise WeightsError(
            f"{path}: its header does not describe its content ({first_line(error)})"
        ) from None


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a safetensors file, {} if it has none, without reading tensors. Raises WeightsError."""
    metadata = _read_header(Path(path)).get(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise WeightsError(f"{path}: its metadata is not a table of strings, as the safetensors format asks")
    return metadata


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
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    if not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("safetensors metadata holds strings only; write anything else as JSON text")
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return text.ljust(-(-len(text) // 8) * 8)  # spaces up to a multiple of 8, where the tensors begin


def _read_header(path: Path) -> dict[str, Any]:
    """The JSON header: {tensor name: {dtype, shape, data_offsets}, METADATA: {...}}."""
    if not path.is_file():
        what = "a folder, expected a file" if path.is_dir() else "no such file"
        raise WeightsError(f"{path}: {what}")
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(64)
        length = int.from_bytes(start[:8], "little")
        # This first: a header of 0x280 bytes begins like a pickle.
        if start[8:9] != b"{" or length > MAX_HEADER:
            unknown = f"not a safetensors file ({size:,} bytes, beginning {start[:8].hex(' ') or 'nowhere'})"
            raise WeightsError(f"{path}: {_foreign_format(start) or unknown}")
        if 8 + length > size:
            raise WeightsError(
                f"{path}: cut off inside its header ({size:,} bytes of at least {8 + length:,}); download it again"
            )
        file.seek(8)
        text = file.read(length)
    try:
        header = json.loads(text)
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != METADATA]
        need = 8 + length + max(ends, default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        raise WeightsError(
            f"{path}: damaged: its safetensors header is not readable; download it again"
        ) from None
    if len(ends) > MAX_TENSORS:
        raise WeightsError(
            f"{path}: {len(ends):,} tensors, no model known here has more than {MAX_TENSORS:,}"
        )
    if need > size:
        raise WeightsError(f"{path}: cut off ({size:,} bytes of {need:,}); download it again")
    return header


def _foreign_format(start: bytes) -> str | None:
    """What the first bytes say the file is when it is not safetensors, and the way out."""
    text = start.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page, not weights: the download was answered with a page (log-in, licence or error); fetch it again"
    if text.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the weights themselves: run `git lfs pull`, or download the file from its page"
    if start.startswith((b"PK\x03\x04", b"\x80")):
        kind = "zip archive" if start.startswith(b"PK") else "pickle"
        return (
            f"a {kind} as PyTorch writes .ckpt, .pth and .bin files; pickles are not read yet. Use the model's .safetensors "
            "file, or convert it: torch.load(FILE, weights_only=True), and its tensors alone (they may lie under `state_dict` "
            "or `params_ema`) to safetensors.torch.save_file"
        )
    if start.startswith(b"GGUF"):
        return "a GGUF file; expected safetensors"
    if text.startswith((b"{", b"[")):
        return "a JSON text file, not weights; expected safetensors"
    return None
