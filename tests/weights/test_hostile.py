"""weights/files.py against hostile and broken files: one line that says what and what to do,
and no code run.
"""

import json
import os
import pickle
import pickletools
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.helpers import hostile
from tests.helpers.hostile import (
    BLOCKED,
    BOMBS,
    FILES,
    INERT,
    PICKLES,
    RUNNING,
    archive,
    container,
    entry,
    old,
    pickled,
    running,
)
from tests.helpers.hostile import saved as torch_saved
from weights.files import WeightsError, read_metadata, read_state_dict
from weights.hub import find_source, read_json, read_source, source_files, source_of
from weights.pickles import StandIn

FORMATS = pytest.mark.parametrize("make", [archive, old])
FUZZ = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)


def refusal(path: Path, read: Callable[[Path], object] = read_state_dict) -> str:
    """The one line with which `path` is refused, after its name; short, and for any terminal."""
    with pytest.raises(WeightsError) as caught:
        read(path)
    said = str(caught.value)
    assert said.startswith(f"{path}: ")
    said = said.removeprefix(f"{path}: ")
    assert len(said) < 300 and said.isprintable()
    assert "weights_only" not in said  # torch's advice to trust the file
    return said


# ---- pickles that run something ----------------------------------------------------------------------------


@FORMATS
def test_what_weights_have_no_use_for_is_refused_before_it_is_opened(
    tmp_path: Path, make: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("torch.load was reached")

    monkeypatch.setattr(torch, "load", load)
    path, canary, modules = tmp_path / "model.ckpt", tmp_path / "canary", set(sys.modules)
    for name, words in BLOCKED.items():
        call = running(name, canary, words)
        for body in (call, hostile.table(("a", hostile.tensor()), ("state_dict", call))):
            path.write_bytes(make(body))
            said = refusal(path)
            assert f"would run {name!r}" in said and "not opened" in said and "safetensors" in said
            assert not canary.exists()
    assert {name for name in set(sys.modules) - modules if not name.startswith("encodings.")} == set()


@FORMATS
def test_no_function_that_a_pickle_names_is_ever_called(
    tmp_path: Path, make: Callable[[bytes], bytes]
) -> None:
    """Stand-ins are called in their place, beside the tensors or alone;
    no module of the pickle's is imported.
    """
    path, canary, modules = tmp_path / "model.ckpt", tmp_path / "canary", set(sys.modules)
    for name, words in (RUNNING | INERT).items():
        call = running(name, canary, words)
        for body in (hostile.table(("a", hostile.tensor()), ("x", call)), call):
            path.write_bytes(make(body))
            try:
                assert torch.equal(read_state_dict(path)["a"], torch.zeros(2))
            except WeightsError as error:  # there are no tensors, or it is one of torch.load's own functions
                assert body is call or name.startswith(("torch.", "builtins.bytearray"))
                assert "\n" not in str(error)
            assert not canary.exists()
    assert {name for name in set(sys.modules) - modules if not name.startswith("encodings.")} == set()


@FORMATS
@pytest.mark.parametrize(
    "name", ["builtins.eval", "builtins.exec", "builtins.__import__", "subprocess.Popen", "pickle.loads"]
)
def test_what_stands_in_for_a_function_is_not_that_function(
    name: str, tmp_path: Path, make: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Any] = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: loaded.append(load(*a, **k)) or loaded[-1])
    body = hostile.table(("a", hostile.tensor()), ("itself", hostile.named(name)))
    (path := tmp_path / "model.ckpt").write_bytes(make(body))
    read_state_dict(path)
    assert loaded[0]["itself"] is StandIn
    assert type(loaded[0]["itself"]("anything", 2)) is StandIn


@FORMATS
@pytest.mark.parametrize("case", hostile.HARMLESS)
def test_oddities_that_do_no_harm(case: str, tmp_path: Path, make: Callable[[bytes], bytes]) -> None:
    (path := tmp_path / "model.ckpt").write_bytes(hostile.HARMLESS[case]())
    assert set(read_state_dict(path)) <= {"a", "b"}
    sound_or_refused(path)


def test_the_canary_sings(tmp_path: Path) -> None:
    """The same bytes leave a file behind where nothing looks at them first."""
    pickle.loads(pickled(running("os.system", tmp_path / "canary", BLOCKED["os.system"])))
    assert (tmp_path / "canary").exists()


# ---- everything else that is wrong -------------------------------------------------------------------------


@FORMATS
@pytest.mark.parametrize("case", PICKLES)
def test_odd_pickles_are_refused(case: str, tmp_path: Path, make: Callable[[bytes], bytes]) -> None:
    body, says = PICKLES[case]
    (path := tmp_path / "model.ckpt").write_bytes(make(body))
    assert re.search(says, refusal(path))


@pytest.mark.parametrize("case", FILES)
def test_broken_files_are_refused(case: str, tmp_path: Path) -> None:
    (path := tmp_path / "model.ckpt").write_bytes(FILES[case].make())
    assert re.search(FILES[case].says, refusal(path))
    if not path.read_bytes().startswith((b"PK\x03\x04", b"\x80")) or case == "a pickle's beginning":
        path = path.rename(tmp_path / "model.safetensors")  # the right name helps nothing
        assert re.search(FILES[case].says, refusal(path))
        try:
            assert isinstance(read_metadata(path), dict)  # where the fault lies behind the header
        except WeightsError as error:
            assert str(error).startswith(f"{path}: ")


def test_every_cut_of_a_checkpoint_is_refused(tmp_path: Path) -> None:
    for whole in (
        torch_saved({"a": torch.ones(2)}),
        torch_saved({"a": torch.ones(2)}, zipped=False),
        hostile.GOOD,
    ):
        for length in range(0, len(whole), 7):
            (path := tmp_path / "model.ckpt").write_bytes(whole[:length])
            refusal(path)


def test_places_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # nobody writes to it: to open it would wait for ever
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    expected = {
        tmp_path: "a folder",
        tmp_path / "pipe": "a device or pipe",
        Path("/dev/zero"): "a device or pipe",
        tmp_path / "dangling": "no such file",
        tmp_path / "loop": "no such file",
        tmp_path / "nothing": "no such file",
        tmp_path / "nothing" / "deeper": "no such file",
        tmp_path / ("x" * 300): "cannot be opened",
        tmp_path / "nul\0": "no such file",
    }
    for path, says in expected.items():
        for read in (read_state_dict, read_metadata):
            with pytest.raises(WeightsError, match=says) as caught:
                read(path)
            assert "\n" not in str(caught.value)


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path := tmp_path / "model.ckpt").write_bytes(hostile.GOOD)

    def refuse(*_: object, **__: object) -> None:  # as root everything may be read
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", refuse)
    assert refusal(path) == "cannot be opened (Permission denied)"


def test_names_with_line_ends_stay_in_one_line(tmp_path: Path) -> None:
    (path := tmp_path / "two\nlines.ckpt").write_bytes(b"")
    with pytest.raises(WeightsError) as caught:
        read_state_dict(path)
    assert str(caught.value).startswith(str(path).replace("\n", " "))


# ---- memory and time of headers ----------------------------------------------------------------------------

# One process with torch in it, which for each file starts a child of its own: {file: [how it ended, message,
# peak in KiB]}.
MEASURE = """
import json, os, signal, sys
from weights.files import WeightsError, read_state_dict
found = {}
for path in sys.argv[1:]:
    into, out = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(20)
        try:
            read_state_dict(path)
        except WeightsError as error:
            os.write(out, str(error).encode())
        os._exit(0)
    os.close(out)
    _, status, usage = os.wait4(child, 0)
    found[path] = status, os.read(into, 10_000).decode(), usage.ru_maxrss
    os.close(into)
print(json.dumps(found))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does")
def test_headers_take_neither_memory_nor_time(tmp_path: Path) -> None:
    files = {tmp_path / f"{i}.ckpt": case for i, case in enumerate(BOMBS.values())}
    for path, case in files.items():
        path.write_bytes(case.make())
    (sound := tmp_path / "sound.ckpt").write_bytes(archive(hostile.SOUND))
    words = [sys.executable, "-c", MEASURE, *map(str, (sound, *files))]
    root = Path(__file__).parents[2]
    run = subprocess.run(words, cwd=root, capture_output=True, text=True, check=True, timeout=300)
    found = json.loads(run.stdout)
    status, said, baseline = found[str(sound)]
    assert (status, said) == (0, "")
    for (path, case), name in zip(files.items(), BOMBS, strict=True):
        status, said, peak = found[str(path)]
        assert status == 0, f"{name}: took too long, or broke Python"
        assert re.search(case.says, said) and "\n" not in said and len(said) < 300, f"{name}: {said}"
        assert peak - baseline < 400_000, f"{name}: {(peak - baseline) // 1000} MB"


# ---- what lies beside the weights --------------------------------------------------------------------------

TABLES: dict[str, tuple[bytes, str]] = {
    "deep": (b"[" * 100_000, "not a JSON file"),
    "100 MB of spaces": (b" " * 100_000_000, "100,000,000 bytes"),
    "not UTF-8": (b'{"a": "\xff"}', "not a JSON file"),
    "not JSON": (b"{'a': 1}", "not a JSON file"),
    "half": (b'{"a": ', "not a JSON file"),
    "empty": (b"", "not a JSON file"),
    "a list": (b"[1]", "no JSON table"),
    "a number of 5,000 digits": (b'{"a": ' + b"9" * 5000 + b"}", "not a JSON file"),
}


@pytest.mark.parametrize("case", TABLES)
def test_broken_configs_are_refused(case: str, tmp_path: Path) -> None:
    content, says = TABLES[case]
    (tmp_path / "config.json").write_bytes(content)
    (tmp_path / "model.safetensors").write_bytes(hostile.GOOD)
    assert re.search(says, refusal(tmp_path / "config.json", read_json))
    for read in (find_source, lambda folder: source_of(folder / "model.safetensors")):
        with pytest.raises(WeightsError, match=says):
            read(tmp_path)


def test_a_config_that_is_no_file_is_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    (tmp_path / "model.safetensors").write_bytes(hostile.GOOD)
    assert find_source(tmp_path).config == {}


INDEXES: dict[str, Any] = {
    "outside": {"a": "../secret.safetensors"},
    "outside by a full path": {"a": "/etc/passwd"},
    "in a folder below": {"a": "below/x.safetensors"},
    "the folder above": {"a": ".."},
    "this folder": {"a": "."},
    "itself": {"a": "model.safetensors.index.json"},
    "no file": {"a": "model-00001-of-00002.safetensors"},
    "no name": {"a": ""},
    "a NUL": {"a": "x\0y"},
    "a line end": {"a": "x\ny"},
    "a number": {"a": 1},
    "a list": {"a": ["x.safetensors"]},
    "a table": {"a": {}},
    "nothing": {},
    "a list of shards": ["x.safetensors"],
    "a text": "x.safetensors",
    "one tensor too many": {"a": "shard.safetensors", "b": "shard.safetensors"},
    "a tensor that is not said": {"b": "shard.safetensors"},
    "20,000 shards": {str(i): f"{i}.safetensors" for i in range(20_000)},
    "a very long name": {"a": "x" * 5000},
}


@pytest.mark.parametrize("case", INDEXES)
def test_indexes_of_shards_lead_nowhere_else(case: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.safetensors").write_bytes(hostile.GOOD)
    (folder / "shard.safetensors").write_bytes(hostile.GOOD)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": INDEXES[case]}))
    for read in (read_source, source_files):
        try:
            read(find_source(folder))
            assert read is source_files
        except WeightsError as error:
            assert str(error).startswith(str(folder)) and "\n" not in str(error)
            assert len(str(error)) < 300 + 2 * len(str(folder)) or case == "a very long name"


# ---- chance ------------------------------------------------------------------------------------------------

SOUND = [
    torch_saved({"state_dict": {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2).half()}, "n": 1}),
    torch_saved({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2).half()}, zipped=False),
    container(
        {"a": entry([2], 0, 8), "b": entry([1, 2], 8, 12, "F16"), "__metadata__": {"k": "v"}}, bytes(12)
    ),
    archive(hostile.SOUND),
]


def sound_or_refused(path: Path) -> None:
    """Either tensors with all their values in memory, or one line."""
    try:
        for tensor in read_state_dict(path).values():
            assert tensor.device.type == "cpu" and tensor.layout == torch.strided
            assert tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
            tensor.clone()
    except WeightsError as error:
        assert str(error).startswith(f"{path}: ") and str(error).isprintable()
    try:
        assert all(isinstance(value, str) for value in read_metadata(path).values())
    except WeightsError as error:
        assert str(error).startswith(f"{path}: ") and str(error).isprintable()


@pytest.mark.parametrize("which", range(len(SOUND)))
@FUZZ
@given(data=st.data())
def test_damaged_bytes_never_raise_anything_else(which: int, tmp_path: Path, data: st.DataObject) -> None:
    damaged = bytearray(SOUND[which])
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, max(0, len(damaged) - 1)))
        match data.draw(st.sampled_from(("change", "cut", "insert", "remove"))):
            case "change":
                damaged[place : place + 1] = bytes([data.draw(st.integers(0, 255))])
            case "cut":
                del damaged[place:]
            case "insert":
                damaged[place:place] = data.draw(st.binary(max_size=20))
            case "remove":
                del damaged[place : place + data.draw(st.integers(1, 20))]
    (path := tmp_path / "model.ckpt").write_bytes(damaged)
    sound_or_refused(path)


def operations(pickle: bytes) -> list[bytes]:
    """The pickle's single operations, without PROTO and STOP."""
    places = [place for _, _, place in pickletools.genops(pickle)] + [len(pickle)]
    return [pickle[begin:end] for begin, end in zip(places, places[1:], strict=False)][1:-1]


BODY = operations(
    pickled(hostile.table(("state_dict", hostile.SOUND), ("b", hostile.tensor((1, 2), (2, 1))), ("n", hostile.number(-5))))
)  # fmt: skip
# Single operations to be put anywhere: all those that there are, and arguments that matter.
PARTS = [
    *{code.code.encode("latin-1") for code in pickletools.opcodes if code.arg is None}, *map(hostile.put, range(3)), *map(hostile.get, range(3)),
    *map(hostile.number, (0, 1, 2, 3, -1, 2**31, 2**63, -(2**70))), *map(hostile.text, ("", "0", "1", "storage", "state_dict", "latin1")),
    *map(hostile.named, ("torch._utils._rebuild_tensor", "torch._utils._rebuild_parameter", "torch.Size", "torch.DoubleStorage",
                         "torch.float16", "collections.OrderedDict", "collections.Counter", "collections.defaultdict", "_codecs.encode",
                         "__builtin__.set", "numpy.dtype", "os.system")), *set(BODY),
]  # fmt: skip


@FORMATS
@FUZZ
@given(data=st.data())
def test_shuffled_operations_never_raise_anything_else(
    make: Callable[[bytes], bytes], tmp_path: Path, data: st.DataObject
) -> None:
    body = list(BODY)
    for _ in range(data.draw(st.integers(1, 5))):
        place = data.draw(st.integers(0, len(body) - 1))
        match data.draw(st.sampled_from(("replace", "insert", "remove", "swap", "repeat"))):
            case "replace":
                body[place] = data.draw(st.sampled_from(PARTS))
            case "insert":
                body.insert(place, data.draw(st.sampled_from(PARTS)))
            case "remove" if len(body) > 1:
                del body[place]
            case "swap":
                other = data.draw(st.integers(0, len(body) - 1))
                body[place], body[other] = body[other], body[place]
            case "repeat":
                body[place:place] = body[place : place + data.draw(st.integers(1, 8))]
    (path := tmp_path / "model.ckpt").write_bytes(make(b"".join(body)))
    sound_or_refused(path)
