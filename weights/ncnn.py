"""ESRGAN's generator as the ncnn runtime stores it: a graph in text, NAME.param, and its numbers, NAME.bin.

Format   "param and model file structure" and "operation param weight table" of github.com/Tencent/ncnn/wiki;
         the graph is that of nets/rrdb.py at scale 4, as the official files of Real-ESRGAN and RealSR have it
Tensors  {basicsr name: float32} on the CPU; the file has weights (out, in, 3, 3) in float16 and biases (out,)
         in float32, so that all values are exact
Copying  this file, files.py (for WeightsError) and pickles.py; torch, safetensors through them
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from .files import WeightsError

MAGIC = b"7767517"  # the first line of a graph
FLOAT16 = (0x01306B47).to_bytes(4, "little")  # in front of weights that are stored in float16
MAX_GRAPH = 1_000_000  # bytes; 23 blocks have 117,030
MAX_WIDTH = 10_000  # channels; 64 in every official model

Params = Mapping[str, Sequence[float]]  # key as written -> values; of a list also its length, in front
_LEAKY: Params = {"9": [2], "-23310": [1, 0.2]}  # of a Convolution: a leaky ReLU of slope 0.2 behind it
_RESIDUAL: Params = {"0": [1], "-23301": [2, 0.2, 1]}  # of an Eltwise: 0.2 times the first, plus the second
_DOUBLE: Params = {"0": [1], "1": [2], "2": [2]}  # of an Interp: nearest neighbour, twice as high and wide


@dataclass(frozen=True)
class _Layer:
    """What a layer does. No Split is left: a layer reads layers, known by their number (0: the picture)."""

    kind: str
    reads: Sequence[int]
    params: Params
    place: str = field(compare=False)  # in a file, its line; in ours, the basicsr name

    def __str__(self) -> str:
        params = " ".join(f"{key}={','.join(f'{v:.9g}' for v in vs)}" for key, vs in self.params.items())
        return f"{self.kind:.20} of {str(self.reads):.40} with {params or 'no parameters':.80}"

    @property
    def weights(self) -> int:
        """How many weights a Convolution of ours has."""
        return int(self.params["6"][0])

    @property
    def size(self) -> int:
        """The bytes of its numbers: flag, weights up to a multiple of four bytes, biases."""
        return 4 + 2 * (self.weights + self.weights % 2) + 4 * int(self.params["0"][0])


def is_ncnn(path: str | Path) -> bool:
    """Whether the file is a graph of ncnn's, whatever the net; its first line tells. Never raises."""
    return _start(path).split(b"\n")[0].strip() == MAGIC


def is_ncnn_numbers(path: str | Path) -> bool:
    """Whether the file begins as ncnn's float16 numbers do: useless without the .param. Never raises."""
    return _start(path).startswith(FLOAT16)


def ncnn_files(param: str | Path) -> tuple[Path, Path]:
    """The two files of a model, NAME.param and NAME.bin beside it, there or not."""
    return Path(param), Path(param).with_suffix(".bin")


def read_ncnn(param: str | Path) -> dict[str, Tensor]:
    """The tensors of the net whose graph is `param`, under nets/rrdb.py's names: weights (out, in, 3, 3) and
    biases (out,), float32.

    Raises WeightsError unless every layer is what an RRDBNet of scale 4 (of any number of blocks and widths)
    has there, and NAME.bin holds its numbers, all finite, and nothing else.
    """
    with _messages_of(Path(param)):
        found = _read_graph(Path(param))
        convs = [layer for layer in _as_rrdbnet(found) if layer.kind == "Convolution"]
    graph, numbers = ncnn_files(param)
    with _messages_of(numbers):
        return dict(_tensors(convs, _read_numbers(numbers, sum(conv.size for conv in convs), graph.name)))


@contextmanager
def _messages_of(path: Path) -> Iterator[None]:
    try:
        yield
    except (WeightsError, OSError) as error:
        why = f"cannot be opened ({error.strerror})" if isinstance(error, OSError) else error
        raise WeightsError(f"{path}: {why}; take the .param and .bin of one ESRGAN model together") from None


def _start(path: str | Path) -> bytes:
    """The first 16 bytes; none of what is no file, or cannot be opened."""
    try:
        with open(path if Path(path).is_file() else os.devnull, "rb") as file:
            return file.read(16)
    except OSError:
        return b""


def _read_graph(path: Path) -> list[_Layer]:
    """The layers in the file's order, each of one output; every output but the last is read, once, later."""
    if not is_ncnn(path):
        what = "not ncnn's graph" if path.is_file() else "no such file"
        what = "ncnn's numbers without their graph" if is_ncnn_numbers(path) else what
        raise WeightsError(f"{what}; expected a .param, text that begins with {MAGIC.decode()}")
    with open(path, "rb") as file:
        text = file.read(MAX_GRAPH + 1).decode("latin-1")
    if len(text) > MAX_GRAPH:
        raise WeightsError(f"more than {MAX_GRAPH:,} bytes of graph, no known model has so many")
    lines = [(f"line {i}", line.split()) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    layers: list[_Layer] = []
    names: set[tuple[str, str]] = set()  # of layers and of outputs
    unread: dict[str, int] = {}  # output -> number of the layer that made it
    for place, words in lines[2:]:
        kind, name, inputs, outputs, params = _parse(place, words)
        new = [("layer", name), *(("output", output) for output in outputs)]
        if len({*new}) < len(new) or not names.isdisjoint(new):
            raise WeightsError(f"{place} gives a layer or an output a name for the second time")
        names.update(new)
        reads = [unread.pop(blob, -1) for blob in inputs]
        if -1 in reads:
            raise WeightsError(f"{place} reads an output that is not there, or is read already")
        if kind == "Split" and len(reads) == 1 and not params:
            number = reads[0]
        elif len(outputs) == 1:
            number = len(layers)
            layers.append(_Layer(kind, reads, params, place))
        else:
            raise WeightsError(f"{place} has {len(outputs)} outputs, expected 1")
        unread |= dict.fromkeys(outputs, number)
    counts = f"{len(lines[2:])} {len(names) - len(lines[2:])}"
    said = [" ".join(words) for _, words in lines[:2]]
    if said != [MAGIC.decode(), counts]:
        raise WeightsError(
            f"has {counts} layers and outputs, and begins with {' / '.join(said)[:60]!r}: damaged"
        )
    if len(unread) != 1:
        raise WeightsError(f"{len(unread)} outputs that no layer reads; expected 1, the picture")
    return layers


def _parse(place: str, words: list[str]) -> tuple[str, str, list[str], list[str], Params]:
    """Kind, name, inputs, outputs and parameters of one line."""
    try:
        kind, name, *counts = words[:4]
        into, out = map(int, counts)
        inputs, outputs, rest = words[4 : 4 + into], words[4 + into : 4 + into + out], words[4 + into + out :]
        params = {key: [*map(float, values.split(","))] for key, values in (pair.split("=") for pair in rest)}
        if (len(inputs), len(outputs), len(params)) != (into, out, len(rest)):
            raise ValueError
    except ValueError:
        raise WeightsError(f"{place} is no layer ({' '.join(words)[:60]!r}), or damaged") from None
    return kind, name, inputs, outputs, params


def _as_rrdbnet(found: list[_Layer]) -> list[_Layer]:
    """The same layers as an RRDBNet has them, with its names. Its sizes are told from the convolutions."""
    widths = [layer.params.get("0", [0])[0] for layer in found if layer.kind == "Convolution"]
    blocks, rest = divmod(len(widths) - 6, 15)
    if rest or blocks < 1:
        raise WeightsError(
            f"{len(found)} layers, {len(widths)} of them Convolution; no ESRGAN has so many: another net"
        )
    if not all(width in range(1, MAX_WIDTH + 1) for width in widths[:2]):
        raise WeightsError(f"widths of {widths[0]} and {widths[1]} channels, no known model has such")
    layers = _rrdbnet(blocks, int(widths[0]), int(widths[1]))
    for layer, expected in zip(found, layers, strict=False):
        if layer != expected:
            raise WeightsError(f"{layer.place} is {layer}; ESRGAN has {expected} there")
    if len(found) != len(layers):
        raise WeightsError(f"{len(found)} layers without Splits; ESRGAN of {blocks} blocks has {len(layers)}")
    return layers


def _rrdbnet(blocks: int, feat: int, grow: int) -> list[_Layer]:
    """The layers of nets/rrdb.py's forward, in the only order that the files can have."""
    layers = [_Layer("Input", [], {}, "picture")]

    def add(kind: str, reads: list[int], params: Params, key: str = "") -> int:
        layers.append(_Layer(kind, reads, params, key))
        return len(layers) - 1

    def conv(key: str, read: int, into: int, out: int, activation: Params = _LEAKY) -> int:
        # 3 x 3, padded by 1, with biases
        sizes: Params = {"0": [out], "1": [3], "4": [1], "5": [1], "6": [9 * into * out]}
        return add("Convolution", [read], {**sizes, **activation}, key)

    trunk = first = conv("conv_first", 0, 3, feat, {})
    for i in range(blocks):
        block = trunk
        for k in (1, 2, 3):
            dense = [trunk]
            for c in (1, 2, 3, 4, 5):
                x = trunk if c == 1 else add("Concat", [*dense], {})
                out, activation = (feat, {}) if c == 5 else (grow, _LEAKY)
                dense.append(conv(f"body.{i}.rdb{k}.conv{c}", x, feat + (c - 1) * grow, out, activation))
            trunk = add("Eltwise", [dense[-1], trunk], _RESIDUAL)
        trunk = add("Eltwise", [trunk, block], _RESIDUAL)
    x = add("BinaryOp", [first, conv("conv_body", trunk, feat, feat, {})], {})  # their sum
    for key in ("conv_up1", "conv_up2"):
        x = conv(key, add("Interp", [x], _DOUBLE), feat, feat)
    conv("conv_last", conv("conv_hr", x, feat, feat), feat, 3, {})
    return layers


def _read_numbers(path: Path, need: int, graph: str) -> bytearray:
    """The whole file, which must have `need` bytes."""
    if not path.is_file():
        raise WeightsError(f"no such file; expected the {need:,} bytes of numbers for {graph}")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        data = bytearray(size if size == need else 0)
        if file.readinto(data) != need:
            raise WeightsError(
                f"{size:,} bytes, expected {need:,} for {graph}: cut off, another model's, or not in float16"
            )
    return data


def _tensors(convs: list[_Layer], data: bytearray) -> Iterator[tuple[str, Tensor]]:
    end = 0
    for conv in convs:
        start, end, out = end, end + conv.size, int(conv.params["0"][0])
        if data[start : start + 4] != FLOAT16:
            flag = data[start : start + 4].hex()
            raise WeightsError(f"{conv.place}.weight has the storage flag {flag}, expected {FLOAT16.hex()}")
        weight = torch.frombuffer(data, dtype=torch.float16, count=conv.weights, offset=start + 4)
        bias = torch.frombuffer(data, dtype=torch.float32, count=out, offset=end - 4 * out)
        for name, tensor in (("weight", weight.view(out, -1, 3, 3)), ("bias", bias)):
            if not tensor.isfinite().all():
                raise WeightsError(f"{conv.place}.{name} has values that are not finite; expected none")
            yield f"{conv.place}.{name}", tensor.to(torch.float32, copy=True)  # a copy, so that `data` goes
