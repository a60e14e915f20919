"""weights/ncnn.py: small files line for line like the official ones, what is refused, and the official files
themselves where a package has brought them.
"""

import hashlib
import itertools
import re
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from nets.rrdb import RRDBConfig, RRDBNet
from tests.helpers.goldens import load_golden, relative_error
from tests.helpers.ncnn_files import FLAG, REAL, graph_text, in_float16, installed, numbers, write_ncnn
from tests.helpers.seeded_weights import load_seeded
from weights.files import WeightsError, sha256, write_safetensors
from weights.ncnn import MAX_GRAPH, is_ncnn, is_ncnn_numbers, ncnn_files, read_ncnn

SAMPLE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
# Odd widths: the first convolution of a dense block has 135 weights, and two bytes to fill up.
SMALL = RRDBConfig(num_feat=5, num_grow_ch=3, num_block=2)


def small_state(config: RRDBConfig = SMALL) -> dict[str, Tensor]:
    net = RRDBNet(config)
    load_seeded(net, seed=31)
    return net.state_dict()


STATE = small_state()
TEXT, BYTES = graph_text(2, 5, 3), numbers(STATE)
EXPECTED = in_float16(STATE)


def written(folder: Path, text: str | bytes = TEXT, data: bytes | None = BYTES) -> Path:
    """A model of these contents; None: without its numbers."""
    param = folder / "net.param"
    param.write_bytes(text if isinstance(text, bytes) else text.encode("latin-1"))
    param.with_suffix(".bin").unlink(missing_ok=True)
    if data is not None:
        param.with_suffix(".bin").write_bytes(data)
    return param


def equal(state: dict[str, Tensor]) -> bool:
    return list(state) == list(EXPECTED) and all(torch.equal(state[key], EXPECTED[key]) for key in EXPECTED)


def refused(param: Path, match: str) -> str:
    """The message, which is one line that names the file and the way out."""
    with pytest.raises(WeightsError, match=match) as caught:
        read_ncnn(param)
    message = str(caught.value)
    assert message.startswith(str(param.parent)) and message.isprintable() and len(message) < 700
    assert message.endswith("; take the .param and .bin of one ESRGAN model together")
    return message


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize(
    "config", [SMALL, RRDBConfig(num_feat=8, num_block=1, num_grow_ch=4), RRDBConfig(num_feat=2, num_block=7)]
)
def test_reads_what_was_written(tmp_path: Path, config: RRDBConfig, line_end: str) -> None:
    state = small_state(config)
    write_ncnn(tmp_path / "net.param", state, line_end=line_end)
    read = read_ncnn(str(tmp_path / "net.param"))
    expected = in_float16(state)
    assert list(read) == list(expected)
    assert all(torch.equal(read[key], expected[key]) for key in expected)
    RRDBNet(config).load_state_dict(read, strict=True)
    assert {tensor.dtype for tensor in read.values()} == {torch.float32}


def test_the_bytes_of_the_file_are_let_go(tmp_path: Path) -> None:
    param = tmp_path / "net.param"
    write_ncnn(param, small_state(RRDBConfig(num_block=1)))
    read_ncnn(param)  # what is made once and stays
    tracemalloc.start()
    state = read_ncnn(param)
    held, _ = tracemalloc.get_traced_memory()  # without tensors' own memory
    tracemalloc.stop()
    assert state and held < param.with_suffix(".bin").stat().st_size / 4


@pytest.mark.parametrize(
    ("blocks", "digest"),  # of the official files with LF, as public scripts pin them
    [
        (23, "35330ececcea33b6c397a72548e788d5d53becee4734c50b7fada36e89f10a86"),
        (6, "2b8fb6e0ae4d2d85704ca08c119a2f5ea40add4f2ecd512eb7f4cd44b6127ed4"),
    ],
)
def test_our_own_files_are_like_the_official_ones(blocks: int, digest: str) -> None:
    assert hashlib.sha256(graph_text(blocks, 64, 32).encode()).hexdigest() == digest


def test_files_are_known_by_their_beginning(tmp_path: Path) -> None:
    param = written(tmp_path)
    assert ncnn_files(str(param)) == (param, tmp_path / "net.bin")
    kinds = {
        "net.param": (True, False),
        "net.bin": (False, True),
        ".": (False, False),
        "gone": (False, False),
    }
    for name, kind in kinds.items():
        assert (is_ncnn(tmp_path / name), is_ncnn_numbers(str(tmp_path / name))) == kind
    for start, expected in {
        b"7767517": True,
        b"7767517\r\n9": True,
        b"77675170\n": False,
        b"": False,
    }.items():
        param.write_bytes(start)
        assert is_ncnn(param) is expected


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    param = written(tmp_path)

    def forbidden(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", forbidden)
    assert not is_ncnn(param) and not is_ncnn_numbers(param)
    monkeypatch.setattr("weights.ncnn.is_ncnn", lambda _: True)
    refused(param, "cannot be opened .Permission denied.")


def lines(text: str = TEXT) -> list[str]:
    """The lines of the layers."""
    return text.splitlines()[2:]


def counted(layers: Sequence[str]) -> str:
    """A graph of these lines, whose second line is right."""
    outputs = sum(int(layer.split()[3]) for layer in layers)
    return "\n".join(["7767517", f"{len(layers)} {outputs}", *layers, ""])


def swapped(kind: str) -> str:
    """The first layer of this kind with its first two inputs the other way round."""
    line = next(line for line in lines() if line.startswith(kind))
    first, second = line.split()[4:6]
    return TEXT.replace(line, line.replace(f" {first} {second} ", f" {second} {first} "))


def without(start: str) -> str:
    """No layer whose kind or name begins so; what read its output reads its input."""
    layers = []
    name: dict[str, str] = {}
    for line in lines():
        words = [name.get(word, word) for word in line.split()]
        if line.split()[1].startswith(start):
            name[words[4 + int(words[2])]] = words[4]
        else:
            layers.append(" ".join(words))
    return counted(layers)


SRVGG = counted(
    """\
Input input.1 0 1 data
Split splitncnn_input0 1 2 data input.1_splitncnn_0 input.1_splitncnn_1
Convolution Conv_0 1 1 input.1_splitncnn_1 54 0=64 1=3 4=1 5=1 6=1728
PReLU PRelu_1 1 1 54 56 0=64
Convolution Conv_34 1 1 56 105 0=48 1=3 4=1 5=1 6=27648
PixelShuffle DepthToSpace_35 1 1 105 106 0=4
Interp Resize_37 1 1 input.1_splitncnn_0 111 0=1 1=4.000000e+00 2=4.000000e+00
BinaryOp Add_38 2 1 106 111 output""".splitlines()
)
NAN, INFINITE = b"\x00\x7e", b"\x00\x7c"  # in float16
AGAIN = BYTES.index(FLAG, 4)
SLOPE, RIM = " 9=2 -23310=1,2.000000e-01", " 4=1 5=1"
CONV, SPLIT, CONCAT, SUM = lines()[1], lines()[2], lines()[5], lines()[14]

# What is changed: graph, numbers (None: no file), and what the message says.
REFUSED: dict[str, tuple[str | bytes, bytes | None, str]] = {
    "numbers without the last byte": (TEXT, BYTES[:-1], r"net\.bin: [\d,]+ bytes, expected [\d,]+ for net\.param"),
    "numbers without the last value": (TEXT, BYTES[:-4], "cut off"),
    "half the numbers": (TEXT, BYTES[: len(BYTES) // 2], "cut off"),
    "no numbers": (TEXT, b"", "0 bytes"),
    "one byte more": (TEXT, BYTES + b"\0", "another model's"),
    "one value more": (TEXT, BYTES + bytes(4), "another model's"),
    "numbers of other widths": (TEXT, numbers(small_state(RRDBConfig(num_feat=6, num_grow_ch=3, num_block=2))), "another model's"),
    "numbers of more blocks": (TEXT, numbers(small_state(RRDBConfig(num_feat=5, num_grow_ch=3, num_block=3))), "another model's"),
    "numbers are missing": (TEXT, None, r"net\.bin: no such file; expected the [\d,]+ bytes"),
    "the flag of float32": (TEXT, bytes(4) + BYTES[4:], r"conv_first.weight has the storage flag 00000000, expected 476b3001"),
    "the flag of int8": (TEXT, b"\x38\x4b\x0d\0" + BYTES[4:], "storage flag 384b0d00"),
    "another flag later": (TEXT, BYTES[:AGAIN] + bytes(4) + BYTES[AGAIN + 4 :], "body.0.rdb1.conv1.weight has the storage flag"),
    "a weight that is no number": (TEXT, FLAG + NAN + BYTES[6:], "conv_first.weight has values that are not finite"),
    "an infinite weight": (TEXT, FLAG + INFINITE + BYTES[6:], "conv_first.weight has values that are not finite"),
    "an infinite bias": (TEXT, BYTES[:-4] + b"\0\0\x80\x7f", "conv_last.bias has values that are not finite"),
    "another slope": (TEXT.replace("-23310=1,2.0", "-23310=1,1.0", 1), BYTES, "line 6 is Convolution of .1. with .*=1,0.1; ESRGAN has .*=1,0.2 there"),
    "a slope nearly right": (TEXT.replace("-23310=1,2.000000", "-23310=1,2.000001", 1), BYTES, "line 6 is"),
    "no activation": (TEXT.replace(SLOPE, "", 1), BYTES, "line 6 is"),
    "another activation": (TEXT.replace("9=2", "9=1", 1), BYTES, "line 6 is"),
    "an activation too many": (TEXT.replace(RIM + " 6=135", RIM + " 6=135" + SLOPE, 1), BYTES, "line 4 is"),
    "another weight of the residual": (TEXT.replace("2,2.0", "2,1.0", 1), BYTES, "is Eltwise of"),
    "a product for a sum": (TEXT.replace("0=1 -23301", "0=0 -23301", 1), BYTES, "is Eltwise of"),
    "a product at the end": (re.sub("(BinaryOp.*)", r"\1 0=2", TEXT), BYTES, "is BinaryOp of .* 0=2; ESRGAN has BinaryOp of .* no parameters"),
    "a smooth enlargement": (TEXT.replace("0=1 1=2.0", "0=2 1=2.0", 1), BYTES, "is Interp of"),
    "three times as high": (TEXT.replace("1=2.0", "1=3.0", 1), BYTES, "is Interp of"),
    "no rim": (TEXT.replace(" 4=1", "", 1), BYTES, "line 4 is Convolution"),
    "a stride": (TEXT.replace(RIM, RIM + " 3=2", 1), BYTES, "line 4 is Convolution"),
    "no biases": (TEXT.replace(" 5=1", " 5=0", 1), BYTES, "line 4 is Convolution"),
    "a kernel of 1": (TEXT.replace(" 1=3", " 1=1", 1), BYTES, "line 4 is Convolution"),
    "a weight less": (TEXT.replace("6=135", "6=134", 1), BYTES, "line 4 is Convolution"),
    "joined along another axis": (TEXT.replace(CONCAT, CONCAT + " 0=1"), BYTES, "is Concat of"),
    "a parameter twice": (TEXT.replace(RIM, RIM + " 5=1", 1), BYTES, "line 4 is no layer"),
    "residual the other way round": (swapped("Eltwise"), BYTES, "is Eltwise of"),
    "joined the other way round": (swapped("Concat"), BYTES, "is Concat of"),
    "a grey picture": (TEXT.replace("0=5 1=3 4=1 5=1 6=135", "0=5 1=3 4=1 5=1 6=45", 1), BYTES, "line 4 is Convolution"),
    "a line less": (TEXT.replace(SUM + "\n", ""), BYTES, "reads an output that is not there"),
    "a line twice": (TEXT.replace(CONV, CONV + "\n" + CONV), BYTES, "for the second time"),
    "an enlargement less": (without("Resize_106"), BYTES, "ESRGAN has Interp"),
    "a residual less": (without("Add_102"), BYTES, "2 outputs that no layer reads"),
    "a convolution less": (without("Conv_113"), BYTES, "35 of them Convolution"),
    "an Eltwise more": (counted([*lines(), "Eltwise more 1 1 output more"]), BYTES, "layers without Splits; ESRGAN of 2 blocks has"),
    "a name twice": (TEXT.replace("Concat_3 ", "Conv_1 "), BYTES, "for the second time"),
    "an output twice": (TEXT.replace(" output ", " 177 "), BYTES, "for the second time"),
    "an output twice in a line": (TEXT.replace(SPLIT, re.sub("_7$", "_6", SPLIT)), BYTES, "for the second time"),
    "two outputs": (TEXT.replace(CONV, CONV.replace("1 1 data", "1 2 data x")), BYTES, "has 2 outputs"),
    "an output nobody reads": (TEXT.replace(SPLIT, SPLIT.replace(" 1 8 ", " 1 9 ") + " more").replace("96 165", "96 166"), BYTES, "2 outputs that no layer reads"),
    "an input of its own": (counted(["Input more 0 1 more", *lines()]), BYTES, "2 outputs that no layer reads"),
    "Split with parameters": (TEXT.replace(SPLIT, SPLIT + " 0=1"), BYTES, "has 8 outputs"),
    "layers miscounted": (TEXT.replace("\n96 165\n", "\n97 165\n"), BYTES, r"has 96 165 layers and outputs, and begins with '7767517 / 97 165': damaged"),
    "outputs miscounted": (TEXT.replace("\n96 165\n", "\n96 164\n"), BYTES, "has 96 165 layers"),
    "no counts": (TEXT.replace("96 165\n", "", 1), BYTES, "line 3|damaged"),
    "SRVGGNet": (SRVGG, BYTES, "7 layers, 2 of them Convolution; no ESRGAN has so many"),
    "only the first line": ("7767517\n", BYTES, "0 0 layers and outputs"),
    "nothing": ("", BYTES, "not ncnn's graph; expected a .param, text that begins with 7767517"),
    "a text": ("Dear reader,\n", BYTES, "not ncnn's graph"),
    "a text behind the first line": ("7767517\n3 3\nDear reader, this is no graph\n", BYTES, "line 3 is no layer"),
    "control characters": ("7767517\n3 3\n\x1b]0;x\x07 \x00 1 1 a b 0=\x1b\n", BYTES, "line 3 is no layer"),
    "bytes": (b"7767517\n" + bytes(range(256)) * 20, BYTES, "line 3 is no layer"),
    "numbers for the graph": (BYTES, BYTES, "ncnn's numbers without their graph; expected a .param"),
    "the binary graph": (b"\xdd\x85\x76\x00" + bytes(60), BYTES, "not ncnn's graph"),
    "too much text": (TEXT + " " * MAX_GRAPH, BYTES, "bytes of graph, no known model has so many"),
    "very wide": (TEXT.replace("0=5 1=3", "0=99999999999 1=3"), BYTES, "widths of .* no known model has such"),
    "infinitely wide": (TEXT.replace("0=5 1=3", "0=1e999 1=3"), BYTES, "widths of inf"),
    "of no width": (TEXT.replace("0=5 1=3", "0=nan 1=3"), BYTES, "widths of nan"),
    "half a channel": (TEXT.replace("0=5 1=3", "0=4.5 1=3"), BYTES, "widths of 4.5"),
    "wide as far as allowed": (graph_text(1, 10_000, 10_000), BYTES, r"expected [\d,]{14} for net.param"),
    "many inputs": (TEXT.replace("1 1 data", "99999999999 1 data"), BYTES, "line 4 is no layer"),
    "fewer than no inputs": (TEXT.replace("1 1 data", "-1 1 data"), BYTES, "line 4 is no layer"),
    "a number of 5,000 digits": (TEXT.replace("1 1 data", "9" * 5000 + " 1 data"), BYTES, "line 4 is no layer"),
    "a parameter of 5,000 digits": (TEXT.replace("1=3", "1=" + "9" * 5000, 1), BYTES, "line 4 is"),
    "a thousand parameters": (TEXT.replace(RIM, RIM + "".join(f" {i}=1" for i in range(30, 1030)), 1), BYTES, "line 4 is"),
    "a thousand values": (TEXT.replace(RIM, RIM + " 30=" + ",".join("1" * 1000), 1), BYTES, "line 4 is"),
    "a long kind": (TEXT.replace("Input ", "Input" * 1000, 1), BYTES, "line 3 is InputInput"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(tmp_path: Path, case: str) -> None:
    text, data, match = REFUSED[case]
    assert (text, data) != (TEXT, BYTES), "the case changes nothing"
    refused(written(tmp_path, text, data), match)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    assert "not there.param: no such file" in refused(tmp_path / "not there.param", "expected a .param")
    written(tmp_path, data=None)
    (tmp_path / "net.bin").mkdir()
    refused(tmp_path / "net.param", "net.bin: no such file")
    with pytest.raises(WeightsError, match="no such file"):
        read_ncnn(tmp_path)


def same_or_refused(folder: Path, text: str) -> bool:
    """Whether the graph is read; then the tensors are the same. No other error is let through."""
    try:
        state = read_ncnn(written(folder, text))
    except WeightsError as error:
        assert str(error).isprintable() and str(folder) in str(error)
        return False
    assert equal(state), "other weights, without a word"
    return True


NUMBERS = [match.span() for match in re.finditer(r"\d+", TEXT)]
NAMES = [match.span() for match in re.finditer(r"(?<=_)\d+(?= +\d \d )|(?<=input\.)1", TEXT)]


def changed(span: tuple[int, int], step: int) -> str:
    """The graph with a number that is more by `step`."""
    number = TEXT[slice(*span)]
    return TEXT[: span[0]] + str(abs(int(number) + step)).zfill(len(number)) + TEXT[span[1] :]


def exchanged(first: int, second: int) -> str:
    layers = lines()
    layers[first], layers[second] = layers[second], layers[first]
    return counted(layers)


def test_no_line_can_be_left_out(tmp_path: Path) -> None:
    layers = lines()
    for i in range(len(layers)):
        rest = layers[:i] + layers[i + 1 :]
        assert not same_or_refused(tmp_path, counted(rest)), i
    assert equal(read_ncnn(written(tmp_path, counted(layers))))


@SAMPLE
@given(pair=st.lists(st.integers(0, len(lines()) - 1), min_size=2, max_size=2, unique=True))
def test_no_two_lines_can_change_places(tmp_path: Path, pair: list[int]) -> None:
    assert not same_or_refused(tmp_path, exchanged(*pair))


@SAMPLE
@given(span=st.sampled_from(NUMBERS), step=st.sampled_from([-1, 1]))
def test_no_number_changes_unseen(tmp_path: Path, span: tuple[int, int], step: int) -> None:
    """Only in the name of a layer does it mean nothing."""
    assert not same_or_refused(tmp_path, changed(span, step)) or span in NAMES


@SAMPLE
@given(at=st.integers(0, len(TEXT) - 1), byte=st.integers(0, 255), length=st.integers(0, 3))
def test_no_damage_raises_anything_else(tmp_path: Path, at: int, byte: int, length: int) -> None:
    same_or_refused(tmp_path, TEXT[:at] + chr(byte) * length + TEXT[at + 1 :])


@pytest.mark.long
@pytest.mark.parametrize("of", ["lines", "numbers"])
def test_every_exchange_and_every_number(tmp_path: Path, of: str) -> None:
    if of == "lines":
        for pair in itertools.combinations(range(len(lines())), 2):
            assert not same_or_refused(tmp_path, exchanged(*pair)), pair
    else:
        for span, step in itertools.product(NUMBERS, (-1, 1)):
            assert not same_or_refused(tmp_path, changed(span, step)) or span in NAMES, span


# The files themselves.

# Tensors, values, blocks, and the sha256 as a safetensors file; the first two are another reader's as well.
OFFICIAL: dict[str, tuple[int, int, int, str]] = {
    "realesrgan_x4plus": (702, 16_697_987, 23, "9ef53cd5a9344aa407676638692a4b07d7053a937974447b8b7cef1d0d653a9d"),
    "realesrgan_x4plus_anime": (192, 4_467_779, 6, "15bbbd55eb0fe77c7242638ecf054871fce2c9c9418bd3d67e754fec0294c07a"),
    "realsr_df2k": (702, 16_697_987, 23, "078ecb32ddd0939bec485b83de2dc776c0c40091673c8f1d21c8568cfd048a98"),
}  # fmt: skip


def official(case: str) -> dict[str, Tensor]:
    """The tensors; skips without the package that brings the files."""
    return read_ncnn(installed(*REAL[case]) or pytest.skip(f"no {REAL[case][0]} installed"))


@pytest.mark.parametrize("case", REAL)
def test_the_official_files(tmp_path: Path, case: str) -> None:
    state = official(case)
    write_safetensors(tmp_path / "x.safetensors", state)
    tensors, values, _, digest = OFFICIAL[case]
    assert (len(state), sum(tensor.numel() for tensor in state.values())) == (tensors, values)
    assert sha256(tmp_path / "x.safetensors") == digest


@torch.no_grad()
@pytest.mark.parametrize("case", REAL)
def test_the_official_files_give_what_ncnn_gives(case: str) -> None:
    with torch.device("meta"):
        net = RRDBNet(RRDBConfig(num_block=OFFICIAL[case][2]))
    net.load_state_dict(official(case), strict=True, assign=True)
    golden = load_golden("ncnn", case)
    out = net(golden["in.image"].permute(2, 0, 1)[None] / 255)
    assert relative_error(out[0, :, ::3, ::3], golden["out.y.thirds"]) <= 1e-5


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_the_other_net_of_the_package_is_refused(scale: int) -> None:
    module, _ = REAL["realesrgan_x4plus"]
    param = installed(module, f"models/REALESRGAN_ANIMAVIDEOV3_UP{scale}X.param")
    refused(param or pytest.skip(f"no {module} installed"), "18 of them Convolution; no ESRGAN has so many")
