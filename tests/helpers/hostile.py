"""Hostile and broken files to order: pickles put together operation by operation,
and the archives around them.
"""

import io
import json
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

# ---- pickle operations, as bytes ---------------------------------------------------------------------------

NONE, TRUE, FALSE, MARK, STOP = b"N", b"\x88", b"\x89", b"(", b"."
TUPLE1, TUPLE2, TUPLE, REDUCE, BUILD, NEWOBJ = b"\x85", b"\x86", b"t", b"R", b"b", b"\x81"
EMPTY_LIST, EMPTY_DICT, EMPTY_TUPLE = b"]", b"}", b")"


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    if 0 <= value < 256:
        return b"K" + bytes([value])
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a" + bytes([value.bit_length() // 8 + 1]) + value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)  # fmt: skip


def named(dotted: str) -> bytes:
    """GLOBAL: a module, and behind its last dot a name in it."""
    module, _, name = dotted.rpartition(".")
    return f"c{module}\n{name}\n".encode()


def row(*values: bytes) -> bytes:
    return MARK + b"".join(values) + TUPLE


def listed(*values: bytes) -> bytes:
    return EMPTY_LIST + MARK + b"".join(values) + b"e"


def call(function: str | bytes, *arguments: bytes) -> bytes:
    return (named(function) if isinstance(function, str) else function) + row(*arguments) + REDUCE


def table(*items: tuple[str, bytes]) -> bytes:
    return EMPTY_DICT + MARK + b"".join(text(key) + value for key, value in items) + b"u"


def put(place: int) -> bytes:
    return b"r" + struct.pack("<I", place)


def get(place: int) -> bytes:
    return b"j" + struct.pack("<I", place)


def storage(
    length: int = 2, key: bytes = text("0"), kind: bytes = named("torch.FloatStorage"), *more: bytes
) -> bytes:
    return row(text("storage"), kind, key, text("cpu"), number(length), *more) + b"Q"


def tensor(
    size: tuple[int, ...] = (2,), stride: tuple[int, ...] = (1,), offset: int = 0, held: bytes | None = None
) -> bytes:
    """_rebuild_tensor_v2 of `held`, of a storage of two numbers where that is None."""
    return call(
        "torch._utils._rebuild_tensor_v2",
        storage() if held is None else held,
        number(offset),
        row(*map(number, size)),
        row(*map(number, stride)),
        FALSE,
        call("collections.OrderedDict"),
    )


def pickled(body: bytes) -> bytes:
    return b"\x80\x02" + body + STOP


SOUND = table(("a", tensor()))


# ---- files around them -------------------------------------------------------------------------------------


def zipped(members: Mapping[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data, method)  # of 1980, so that it is the same each time
    return buffer.getvalue()


def archive(body: bytes, more: Mapping[str, bytes] | None = None, method: int = zipfile.ZIP_STORED) -> bytes:
    """What torch.save writes, around any pickle operations at all; one storage of eight bytes."""
    members = {"data.pkl": pickled(body), "byteorder": b"little", "data/0": bytes(8), "version": b"3\n"}
    return zipped({f"model/{name}": data for name, data in (members | dict(more or {})).items()}, method)


def old(body: bytes, keys: bytes = listed(text("0")), data: bytes = struct.pack("<q", 2) + bytes(8)) -> bytes:
    """The same in the format before PyTorch 1.6; the storage entry's view is then None."""
    content = body.replace(number(2) + TUPLE + b"Q", number(2) + NONE + TUPLE + b"Q")
    return (
        b"".join(
            pickled(part)
            for part in (number(0x1950A86A20F9469CFC6C), number(1001), EMPTY_DICT, content, keys)
        )
        + data
    )


def saved(content: object, *, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def container(header: object, data: bytes = b"") -> bytes:
    """A safetensors file with any header at all."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


GOOD = container({"a": entry([2], 0, 8)}, bytes(8))


# ---- pickles that run something ----------------------------------------------------------------------------

SHELL = "touch {canary}"
PYTHON = "open({canary!r}, 'w').close()"
# Name -> arguments with which it would leave a file at {canary}, in words of its own. Refused for their
# names:
BLOCKED: dict[str, tuple[str, ...]] = {
    "os.system": (SHELL,),
    "posix.system": (SHELL,),
    "nt.system": (SHELL,),
    "os.popen": (SHELL,),
    "sys.exit": ("x",),
}
# These are read beside the tensors, and stand-ins take their place; or they are torch.load's own, which takes
# no such arguments.
RUNNING: dict[str, tuple[str, ...]] = {
    "builtins.eval": (PYTHON,),
    "builtins.exec": (PYTHON,),
    "__builtin__.eval": (PYTHON,),
    "__builtin__.execfile": ("{canary}",),
    "builtins.open": ("{canary}", "w"),
    "io.open": ("{canary}", "w"),
    "_io.FileIO": ("{canary}", "w"),
    "builtins.__import__": ("antigravity",),
    "builtins.getattr": ("x", "upper"),
    "builtins.compile": (PYTHON, "x", "exec"),
    "builtins.bytearray": ("x",),
    "subprocess.Popen": (SHELL,),
    "subprocess.getoutput": (SHELL,),
    "commands.getoutput": (SHELL,),  # Python 2's name, which unpicklers translate
    "importlib.import_module": ("antigravity",),
    "functools.partial": ("x",),
    "operator.attrgetter": ("x",),
    "operator.methodcaller": ("x",),
    "pickle.loads": ("x",),
    "_pickle.loads": ("x",),
    "marshal.loads": ("x",),
    "runpy.run_path": ("{canary}",),
    "timeit.timeit": (PYTHON,),
    "cProfile.run": (PYTHON,),
    "pdb.run": (PYTHON,),
    "code.interact": (),
    "pty.spawn": ("{canary}",),
    "shutil.rmtree": ("{canary}",),
    "webbrowser.open": ("{canary}",),
    "types.CodeType": (),
    "torch.load": ("{canary}",),
    "torch.jit.load": ("{canary}",),
    "torch.hub.load": ("{canary}", "x"),
    "torch.storage._load_from_bytes": ("x",),
    "torch.storage.UntypedStorage": ("x",),
    "torch.utils.cpp_extension.load": ("x", "{canary}"),
    "torch._tensor._rebuild_from_type_v2": ("x",),
    "torch._utils._rebuild_wrapper_subclass": ("x",),
    "torch._utils._rebuild_sparse_tensor": ("x",),
    "torch._utils._rebuild_qtensor": ("x",),
    "torch._utils._rebuild_meta_tensor_no_storage": ("x",),
    "torch._utils._rebuild_tensor_v2.__call__": ("x",),
    "torch._utils._rebuild_tensor_v2 ": ("x",),
    "torch.serialization._get_layout": ("x",),
    "torch.Tensor": ("x",),
    "torch.nn.modules.linear.Linear": (),  # a whole model
    "collections.OrderedDict.__init__": ("x",),
    "collections.namedtuple": ("x", "y"),
    "collections._sys.exit": ("x",),
    "xcollections.OrderedDict": (),
    "numpyx.core.multiarray.scalar": (),
    "lightning_evil.run": (),
}

# These lie in packages that honest checkpoints name.
INERT: dict[str, tuple[str, ...]] = {
    "numpy.testing._private.utils.runstring": (PYTHON, "x"),
    "numpy.f2py.compile": ("x",),
    "numpy.load": ("{canary}",),
    "numpy.fromfile": ("{canary}",),
    "numpy.core.multiarray._reconstruct": ("x",),
    "numpy.os.system": (SHELL,),
    "pathlib.os.system": (SHELL,),
    "pathlib.Path.touch": ("{canary}",),
    "argparse._sys.exit": ("x",),
    "argparse.FileType": ("w",),
    "typing.sys.exit": ("x",),
    "datetime.sys.exit": ("x",),
    "pytorch_lightning.os.system": (SHELL,),
    "omegaconf.OmegaConf.create": ("x",),
}


def running(dotted: str, canary: Path, words: tuple[str, ...]) -> bytes:
    """The call that leaves a file at `canary`."""
    return call(dotted, *(text(word.format(canary=str(canary))) for word in words))


# ---- everything else ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A file, and what the one line about it says (a regular expression)."""

    make: Callable[[], bytes]
    says: str


SYSTEM = call("os.system", text("true"))
DAMAGED = "damaged, or no weights"
NO_TENSORS = "a pickle without tensors"
NOT_PLAIN = "sparse, quantised, expanded or without values"


def _tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("pickle"), io.BytesIO())
    return buffer.getvalue()


def _twice(name: bytes, first: bytes, second: bytes) -> bytes:
    """A zip archive whose second member has another name than it was made with."""
    members = {"m/data.pkl": first, "m/data_pkl": second, "m/data/0": bytes(8), "m/version": b"3\n"}
    return zipped(members).replace(b"m/data_pkl", name)


def _with_ending(directory: int, start: int) -> bytes:
    """A zip archive whose ending says another place of its directory."""
    whole = archive(SOUND)
    return whole[:-10] + struct.pack("<2L", directory, start) + b"\0\0"


def _shifted() -> bytes:
    """Two archives behind each other: some readers see the first directory, some the second."""
    first, second = archive(table(("a", tensor()), ("x", SYSTEM))), archive(SOUND)
    return first + second


PICKLES: dict[str, tuple[bytes, str]] = {
    # Ways to call a function that torch.save does not use.
    "INST": (MARK + text("true") + b"ios\nsystem\n", DAMAGED),
    "OBJ": (MARK + named("os.system") + text("true") + b"o", "would run 'os.system'"),
    "NEWOBJ": (named("os.system") + row(text("true")) + NEWOBJ, "would run 'os.system'"),
    "NEWOBJ_EX": (named("numpy.dtype") + EMPTY_TUPLE + EMPTY_DICT + b"\x92", DAMAGED),
    "STACK_GLOBAL": (text("os") + text("system") + b"\x93" + row(text("true")) + REDUCE, DAMAGED),
    "short STACK_GLOBAL": (b"\x8c\x02os\x8c\x06system\x93" + EMPTY_TUPLE + REDUCE, DAMAGED),
    "EXT1": (b"\x82\x01" + EMPTY_TUPLE + REDUCE, DAMAGED),
    "EXT2": (b"\x83\x01\x00" + EMPTY_TUPLE + REDUCE, DAMAGED),
    "EXT4": (b"\x84\x01\x00\x00\x00" + EMPTY_TUPLE + REDUCE, DAMAGED),
    "PERSID": (b"Pstorage\n", DAMAGED),
    "protocol 5, buffers out of band": (b"\x97\x98", DAMAGED),
    "a call of what was made": (call("numpy.dtype") + EMPTY_TUPLE + REDUCE, DAMAGED),
    "a call of a text": (text("os.system") + EMPTY_TUPLE + REDUCE, DAMAGED),
    "a call of a nested list": (listed(listed()) + EMPTY_TUPLE + REDUCE, DAMAGED),
    "a call without a tuple": (named("numpy.dtype") + EMPTY_LIST + REDUCE, f"{NO_TENSORS}|{DAMAGED}"),
    "BUILD on a class": (named("numpy.dtype") + EMPTY_DICT + BUILD, DAMAGED),
    "BUILD on a tensor": (tensor() + row(storage(), number(0), row(number(9)), row(number(1))) + BUILD, DAMAGED),
    "BUILD on a storage": (storage() + table(("dtype", named("torch.float64"))) + BUILD, f"{NO_TENSORS}|{DAMAGED}"),
    "BUILD on a dict": (EMPTY_DICT + EMPTY_DICT + BUILD, DAMAGED),
    "a name with a line end": (b"cnumpy.\\nos\nsystem\n" + EMPTY_TUPLE + REDUCE, DAMAGED),
    "a name not in UTF-8": (b"c\xff\nx\n", DAMAGED),
    "an encoding that takes hours": (call("_codecs.encode", text("\xe4" * 10_000), text("punycode")), f"{NO_TENSORS}|{DAMAGED}"),
    "bytes of a made-up encoding": (call("_codecs.encode", text("x"), text("zlib_codec")), DAMAGED),
    # Tensors that are not there.
    "size beyond the storage": (tensor(size=(3,)), DAMAGED),
    "size far beyond the storage": (tensor(size=(10**10,)), DAMAGED),
    "offset beyond the storage": (tensor(size=(1,), offset=2), DAMAGED),
    "stride beyond the storage": (tensor(stride=(2,)), DAMAGED),
    "stride 0 giant": (tensor(size=(10**12,), stride=(0,)), f"{NO_TENSORS}|{DAMAGED}"),
    "negative size": (tensor(size=(-1,)), DAMAGED),
    "negative stride": (tensor(stride=(-1,)), DAMAGED),
    "negative offset": (tensor(offset=-1), DAMAGED),
    "sizes overflow": (tensor(size=(2**62, 2**62), stride=(1, 1)), DAMAGED),
    "sizes beyond 64 bits": (tensor(size=(2**200,)), DAMAGED),
    "more sizes than strides": (tensor(size=(1, 2)), DAMAGED),
    "a thousand axes": (tensor(size=(1,) * 1000, stride=(1,) * 1000), f"{NO_TENSORS}|{DAMAGED}"),
    "sizes are texts": (tensor().replace(number(2) + TUPLE + MARK + number(1), text("2") + TUPLE + MARK + number(1)), DAMAGED),
    "a tensor of a tensor": (tensor(held=tensor()), DAMAGED),
    "a tensor of nothing": (tensor(held=NONE), DAMAGED),
    "metadata of a tensor": (tensor()[:-2] + table(("conj", TRUE)) + TUPLE + REDUCE, DAMAGED),
    "negative storage": (tensor(held=storage(-2)), DAMAGED),
    "storage of another kind": (tensor(held=row(text("module"), named("torch.FloatStorage"), text("0"), text("cpu"), number(2)) + b"Q"), DAMAGED),
    "storage of no class": (tensor(held=storage(2, text("0"), text("FloatStorage"))), DAMAGED),
    "storage of a class that is none": (tensor(held=storage(2, text("0"), named("torch.float32"))), DAMAGED),
    "storage with a view": (tensor(held=storage(2, text("0"), named("torch.FloatStorage"), row(text("0"), number(0), number(9)))), f"{NO_TENSORS}|{DAMAGED}"),
    "storage key of a tuple": (tensor(held=storage(2, row(text("0")))), DAMAGED),
    "storage known by a number": (number(7) + b"Q", DAMAGED),
    "quantised storage": (tensor(held=storage(2, text("0"), named("torch.QInt8Storage"))), f"{NO_TENSORS}|{DAMAGED}"),
    "no tensors": (table(("a", number(1))), f"{NO_TENSORS}|{DAMAGED}"),
    "a bare tensor": (tensor(), "without tensors"),
    "a list of tensors": (listed(tensor()), "without tensors"),
    "tensors under numbers": (EMPTY_DICT + number(1) + tensor() + b"s", "without tensors"),
    # Stacks that do not add up.
    "empty pickle": (b"", DAMAGED),
    "nothing to take": (TUPLE2, DAMAGED),
    "no mark": (text("x") + TUPLE, DAMAGED),
    "reaching below a mark": (text("x") + MARK + TUPLE1, DAMAGED),
    "memo of nothing": (put(0), DAMAGED),
    "memo that is not there": (get(5), DAMAGED),
    "unknown operation": (b"\xff", DAMAGED),
    "a list filled that is a table": (EMPTY_DICT + NONE + b"a", DAMAGED),
    "a key that is a list": (EMPTY_DICT + EMPTY_LIST + NONE + b"s", DAMAGED),
}  # fmt: skip

# Not as torch.save writes them, and read all the same: nothing in them does any harm.
HARMLESS: dict[str, Callable[[], bytes]] = {
    "storage longer than its file": lambda: archive(table(("a", tensor((9,), held=storage(9))))),
    "zip with one name twice": lambda: _twice(b"m/data.pkl", pickled(SYSTEM), pickled(SOUND)),
    "zip with a comment": lambda: archive(SOUND)[:-2] + b"\x05\0hello",
    "one storage, two lengths": lambda: archive(table(("a", tensor()), ("b", tensor((1,), held=storage(1))))),
}

BOMBS: dict[str, Case] = {  # headers to fill the memory, or never to end
    "a header of 12 MB": Case(lambda: container(b'{"a":[' + b"[]," * 4_000_000), "bytes of header"),
    "a header of lists": Case(lambda: container(b'{"a":[' + b"[]," * 400_000 + b"0]}"), "not readable"),
    "100,001 tensors": Case(lambda: container({str(i): entry([0], 0, 0) for i in range(100_001)}), "no known model"),
    "a million axes": Case(lambda: container({"a": entry([1] * 1_000_000, 0, 4)}, bytes(4)), "no known model"),
}  # fmt: skip

FILES: dict[str, Case] = {
    "empty": Case(lambda: b"", r"0 bytes"),
    "one byte": Case(lambda: b"\x80", DAMAGED),
    "three bytes": Case(lambda: b"\x08\0\0", "not a weights file"),
    "noise": Case(lambda: bytes(range(100, 200)), "not a weights file"),
    "control characters": Case(lambda: b"\x1b]0;x\x07\n\n" * 9, "not a weights file"),
    "web page": Case(lambda: b"\n<!DOCTYPE html><html>Log in</html>", "web page"),
    "LFS pointer": Case(lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n", "Git LFS"),
    "JSON": Case(lambda: b'{"weight_map": {}}', "JSON"),
    "GGUF": Case(lambda: b"GGUF" + bytes(60), "GGUF"),
    "HDF5": Case(lambda: b"\x89HDF\r\n\x1a\n" + bytes(60), "HDF5"),
    "ONNX": Case(lambda: b"\x08\x07\x12\x07pytorch" + bytes(60), "ONNX"),
    "JPEG": Case(lambda: b"\xff\xd8\xff\xe0\0\x10JFIF" + bytes(60), "picture"),
    "PNG": Case(lambda: b"\x89PNG\r\n\x1a\n" + bytes(60), "picture"),
    "gzip": Case(lambda: zlib.compress(b"x", wbits=31), "packed archive"),
    "7z": Case(lambda: b"7z\xbc\xaf\x27\x1c" + bytes(60), "packed archive"),
    "rar": Case(lambda: b"Rar!\x1a\x07\x01\0" + bytes(60), "packed archive"),
    "xz": Case(lambda: b"\xfd7zXZ\0" + bytes(60), "packed archive"),
    "zstd": Case(lambda: b"\x28\xb5\x2f\xfd" + bytes(60), "packed archive"),
    "tar": Case(_tar, "packed archive"),
    "bare pickle": Case(lambda: pickle.dumps({"a": 1}), "protocol"),
    "bare pickle of protocol 2": Case(lambda: pickle.dumps({"a": 1}, 2), DAMAGED),
    # checkpoints of torch.save
    "a frame": Case(lambda: archive(b"\x95" + bytes(8) + SOUND), DAMAGED),
    "protocol 4": Case(lambda: archive(pickle.dumps({"a": 1}, 4)[2:-1]), DAMAGED),
    "protocol 0": Case(lambda: b"cos\nsystem\n(S'true'\ntR.", "not a weights file"),
    "storage that is not there": Case(lambda: archive(table(("a", tensor(held=storage(2, text("1")))))), DAMAGED),
    "storage key climbs out": Case(lambda: archive(table(("a", tensor(held=storage(2, text("../data.pkl")))))), DAMAGED),
    "sparse tensor": Case(lambda: saved({"a": torch.eye(2).to_sparse()}), NOT_PLAIN),
    "meta tensor": Case(lambda: saved({"a": torch.empty(2, device="meta")}), NOT_PLAIN),
    "expanded tensor": Case(lambda: saved({"a": torch.ones(1).expand(1000)}), NOT_PLAIN),
    "a whole model": Case(lambda: saved(torch.nn.Linear(2, 2)), NO_TENSORS),
    "cut off inside a text": Case(lambda: zipped({"m/data.pkl": b"\x80\x02X\xff\xff\xff\x7fabc"}), DAMAGED),
    "no STOP": Case(lambda: zipped({"m/data.pkl": b"\x80\x02}"}), DAMAGED),
    # zip archives
    "zip of nothing": Case(lambda: zipped({}), "not a weights file"),
    "zip of a picture": Case(lambda: zipped({"a.png": b"x"}), "zip archive of other files"),
    "zip of a checkpoint": Case(lambda: zipped({"model.ckpt": archive(SOUND)}), "zip archive of other files"),
    "zip without data.pkl": Case(lambda: zipped({"m/data/0": bytes(8), "m/version": b"3"}), "zip archive of other files"),
    "zip that climbs out": Case(lambda: zipped({"../../../tmp/x": b"x", "m/data.pkl": pickled(SOUND)}), DAMAGED),
    "zip with an absolute name": Case(lambda: zipped({"/tmp/x": b"x", "m/data.pkl": pickled(SOUND)}), DAMAGED),
    "zip of two folders": Case(lambda: zipped({"evil/data.pkl": pickled(SYSTEM), "m/data.pkl": pickled(SOUND)}), DAMAGED),
    "zip with one name in two cases": Case(lambda: _twice(b"m/DATA.pkl", pickled(SYSTEM), pickled(SOUND)), "would run 'os.system'"),
    "zip with a NUL in a name": Case(lambda: _twice(b"m/data.pk\0", pickled(SYSTEM), pickled(SOUND)), "would run 'os.system'"),
    "zip behind a zip": Case(_shifted, DAMAGED),
    "zip cut off": Case(lambda: archive(SOUND)[:-30], "cut off"),
    "zip of the first 100 bytes": Case(lambda: archive(SOUND)[:100], "cut off"),
    "zip of the first 10 bytes": Case(lambda: archive(SOUND)[:10], "cut off"),
    "zip with a directory of 4 GB": Case(lambda: _with_ending(2**32 - 2, 0), "cut off"),
    "zip with a directory elsewhere": Case(lambda: _with_ending(10, 0), "cut off"),
    "zip with a broken pickle": Case(lambda: archive(SOUND).replace(b"collections", b"kollections", 1), "cut off, or damaged"),
    "TorchScript": Case(lambda: archive(SOUND, {"constants.pkl": b"\x80\x02)."}), "TorchScript"),
    "zip of an unknown byte order": Case(lambda: archive(SOUND, {"byteorder": b"middle"}), DAMAGED),
    "zip without a version": Case(lambda: zipped({"m/data.pkl": pickled(SOUND), "m/data/0": bytes(8)}), DAMAGED),
    "packed pickle": Case(lambda: archive(NONE * 1000, method=zipfile.ZIP_DEFLATED), "packed"),
    "packed storage": Case(lambda: archive(SOUND, {"data/0": bytes(1000)}, zipfile.ZIP_DEFLATED), "packed"),
    "packed with LZMA": Case(lambda: archive(SOUND, method=zipfile.ZIP_LZMA), "packed"),
    # pickles of the old format
    "old: cut off in the magic number": Case(lambda: old(SOUND)[:8], DAMAGED),
    "old: cut off in the content": Case(lambda: old(SOUND)[:100], DAMAGED),
    "old: cut off in the keys": Case(lambda: old(SOUND, data=b"")[:-4], DAMAGED),
    "old: cut off in the data": Case(lambda: old(SOUND)[:-1], DAMAGED),
    "old: without data": Case(lambda: old(SOUND, data=b""), DAMAGED),
    "old: another magic number": Case(lambda: old(SOUND).replace(b"\x6c\xfc\x9c", b"\x6c\xfc\x9d"), DAMAGED),
    "old: keys of nothing": Case(lambda: old(SOUND, keys=listed(text("7"))), DAMAGED),
    "old: keys are tables": Case(lambda: old(SOUND, keys=listed(EMPTY_DICT)), DAMAGED),
    "old: length of the data lies": Case(lambda: old(SOUND, data=struct.pack("<q", 2**40) + bytes(8)), DAMAGED),
    "old: runs in the keys": Case(lambda: old(SOUND, keys=SYSTEM), "would run 'os.system'"),
    "old: runs in the system's table": Case(lambda: old(SOUND).replace(EMPTY_DICT, SYSTEM, 1), "would run 'os.system'"),
    "old: with a module's source": Case(lambda: old(row(text("module"), named("numpy.x"), text("/etc/passwd"), text("y")) + b"Q"), DAMAGED),
    "old: also a tar archive": Case(lambda: _tar_and_pickle(), DAMAGED),
    # safetensors
    "cut off in the header": Case(lambda: GOOD[:20], "cut off in its header"),
    "cut off in the data": Case(lambda: GOOD[:-1], "cut off"),
    "header length beyond the limit": Case(lambda: (2**63).to_bytes(8, "little") + GOOD[8:], "bytes of header"),
    "header length too small": Case(lambda: (9).to_bytes(8, "little") + GOOD[8:], "damaged"),
    "header not UTF-8": Case(lambda: container(b'{"\xff": 1}'), "damaged"),
    "header deep": Case(lambda: container(b'{"a":' + b"[" * 100_000), "damaged"),
    "header is a list": Case(lambda: GOOD[:8] + b"{}" + GOOD[10:], "damaged"),
    "header without offsets": Case(lambda: container({"a": {"dtype": "F32", "shape": [2]}}), "damaged"),
    "header without a shape": Case(lambda: container({"a": {"dtype": "F32", "data_offsets": [0, 8]}}), "damaged"),
    "offsets are words": Case(lambda: container({"a": {"data_offsets": ["x", "y"]}}), "damaged"),
    "offsets in front of the data": Case(lambda: container({"a": entry([2], -8, 0)}, bytes(8)), "does not lie where its header says"),
    "offsets backwards": Case(lambda: container({"a": entry([2], 8, 0)}, bytes(8)), "does not lie where its header says"),
    "offsets beyond 64 bits": Case(lambda: container({"a": entry([2], 0, 10**30)}, bytes(8)), "cut off"),
    "shape lies": Case(lambda: container({"a": entry([3], 0, 8)}, bytes(8)), DAMAGED),
    "shape overflows": Case(lambda: container({"a": entry([2**40, 2**40], 0, 8)}, bytes(8)), DAMAGED),
    "negative shape": Case(lambda: container({"a": entry([-2], 0, 8)}, bytes(8)), DAMAGED),
    "shape of numbers with points": Case(lambda: container({"a": {**entry([], 0, 8), "shape": [2.0]}}, bytes(8)), DAMAGED),
    "unknown dtype": Case(lambda: container({"a": entry([2], 0, 8, "F99")}, bytes(8)), DAMAGED),
    "overlap": Case(lambda: container({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12)), DAMAGED),
    "a gap": Case(lambda: container({"a": entry([2], 0, 8), "b": entry([2], 16, 24)}, bytes(24)), DAMAGED),
    "bytes left over": Case(lambda: GOOD + b"\1", "1 bytes behind its last tensor that are no padding"),
    "a pickle's beginning": Case(lambda: b"\x80\x02" + bytes(6) + b"{" + bytes(0x27F), "damaged"),
}  # fmt: skip


def _tar_and_pickle() -> bytes:
    """A tar archive, as torch.save wrote before 2017, whose first member's name is a pickle."""
    data = bytearray(_tar())
    data[:100] = old(SOUND)[:20].ljust(100, b"\0")
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    return bytes(data)
