"""weights/files.py: round trips, equal bytes, and one line for whatever a download can turn out to be."""

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from weights.files import DTYPE_NAMES, WeightsError, read_metadata, read_state_dict, sha256, write_safetensors

SHARED_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)


@SHARED_FOLDER
@given(
    specs=st.dictionaries(
        texts.filter(lambda name: name != "__metadata__"),
        st.tuples(shapes, st.sampled_from(list(DTYPE_NAMES))),
    ),
    metadata=st.dictionaries(texts.filter(lambda key: key != "format"), texts, max_size=3),
)
def test_round_trip(
    tmp_path: Path, specs: dict[str, tuple[tuple[int, ...], torch.dtype]], metadata: dict[str, str]
) -> None:
    tensors = {name: torch.randint(0, 2, shape).to(dtype) for name, (shape, dtype) in specs.items()}
    path = tmp_path / "weights.anything"
    write_safetensors(path, tensors, metadata)
    assert read_metadata(path) == {"format": "pt", **metadata}
    for back in (read_state_dict(path), load_file(path)):  # the second: the library alone reads what we wrote
        assert back.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert back[name].dtype == tensor.dtype and back[name].shape == tensor.shape
            assert torch.equal(back[name].float(), tensor.float())


def test_views_and_shared_tensors_are_written_by_value(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    write_safetensors(
        tmp_path / "x", {"whole": whole, "again": whole, "turned": whole.T, "part": whole[:, 1]}
    )
    back = read_state_dict(tmp_path / "x")
    assert (
        torch.equal(back["turned"], whole.T)
        and torch.equal(back["part"], whole[:, 1])
        and torch.equal(back["again"], whole)
    )


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    tensors = {"b": torch.ones(3), "a": torch.zeros(2, dtype=torch.float16)}
    metadata = {str(i): "x" for i in range(20)}
    write_safetensors(tmp_path / "first", tensors, metadata)
    write_safetensors(tmp_path / "second", dict(reversed(tensors.items())), dict(reversed(metadata.items())))
    assert sha256(tmp_path / "first") == sha256(tmp_path / "second")
    write_safetensors(tmp_path / "second", tensors | {"b": torch.full((3,), 2.0)}, metadata)
    assert sha256(tmp_path / "first") != sha256(tmp_path / "second")


def test_sha256_of_known_bytes(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    assert (
        sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )  # FIPS 180-4


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": torch.ones(2)})
    before = path.read_bytes()
    with pytest.raises(ValueError, match="complex64"):
        write_safetensors(path, {"a": torch.ones(2, dtype=torch.complex64)})
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_safetensors(path, {"a": torch.zeros(2)})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def container(header: object, data: bytes = b"") -> bytes:
    """A safetensors file with any header at all."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def torch_file(**how: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(2)}, buffer, **how)
    return buffer.getvalue()


GOOD = container({"a": entry([2], 0, 8)}, bytes(8))
HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "not a safetensors file"),
    "short": (lambda: b"\x08\0\0", "not a safetensors file"),
    "web page": (lambda: b"\n<!DOCTYPE html><html>Log in</html>", "web page"),
    "LFS pointer": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n", "Git LFS pointer"),
    "zip checkpoint": (torch_file, "zip archive.*not read yet.*convert"),
    "legacy checkpoint": (lambda: torch_file(_use_new_zipfile_serialization=False), "pickle.*not read yet.*convert"),
    "bare pickle": (lambda: pickle.dumps({"a": 1}), "pickle.*not read yet"),
    "GGUF": (lambda: b"GGUF" + bytes(60), "GGUF"),
    "JSON": (lambda: b'{"weight_map": {}}', "JSON"),
    "noise": (lambda: bytes(range(100, 200)), "not a safetensors file"),
    "cut off in the header": (lambda: GOOD[:20], "cut off inside its header"),
    "cut off in the data": (lambda: GOOD[:-1], "cut off"),
    "header length beyond the limit": (lambda: (2**63).to_bytes(8, "little") + GOOD[8:], "not a safetensors file"),
    "header length too small": (lambda: (9).to_bytes(8, "little") + GOOD[8:], "damaged"),
    "header not UTF-8": (lambda: container(b'{"\xff": 1}'), "damaged"),
    "header deep": (lambda: container(b'{"a":' + b"[" * 100_000), "damaged"),
    "header without offsets": (lambda: container({"a": {"dtype": "F32", "shape": [2]}}), "damaged"),
    "offsets are words": (lambda: container({"a": {"data_offsets": ["x", "y"]}}), "damaged"),
    "shape lies": (lambda: container({"a": entry([3], 0, 8)}, bytes(8)), "does not describe"),
    "shape overflows": (lambda: container({"a": entry([2**40, 2**40], 0, 8)}, bytes(8)), "does not describe"),
    "negative shape": (lambda: container({"a": entry([-2], 0, 8)}, bytes(8)), "does not describe"),
    "unknown dtype": (lambda: container({"a": entry([2], 0, 8, "F99")}, bytes(8)), "does not describe"),
    "overlap": (lambda: container({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12)), "does not describe"),
    "bytes left over": (lambda: GOOD + b"\0", "does not describe"),
    "too many entries": (lambda: container({str(i): entry([0], 0, 0) for i in range(100_001)}), "no model known"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_give_one_line(tmp_path: Path, case: str) -> None:
    make, message = HOSTILE[case]
    path = tmp_path / "model.safetensors"  # the right extension proves nothing
    path.write_bytes(make())
    with pytest.raises(WeightsError, match=message) as caught:
        read_state_dict(path)
    message = str(caught.value).removeprefix(f"{path}: ")
    assert message != str(caught.value) and "\n" not in message and len(message) < 300


def test_a_header_that_begins_like_a_pickle_is_read(tmp_path: Path) -> None:
    # 0x0280 bytes of header: the file begins 80 02, which is also how a pickle of protocol 2 begins.
    text = json.dumps({"a": entry([2], 0, 8)}).encode().ljust(0x280)
    (tmp_path / "x").write_bytes(container(text, bytes(8)))
    assert torch.equal(read_state_dict(tmp_path / "x")["a"], torch.zeros(2))


def test_metadata_without_tensors_read_and_checked(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "plain")
    assert read_metadata(tmp_path / "plain") == {}
    (tmp_path / "odd").write_bytes(
        container({"__metadata__": {"config": {"a": 1}}, "a": entry([2], 0, 8)}, bytes(8))
    )
    with pytest.raises(WeightsError, match="table of strings"):
        read_metadata(tmp_path / "odd")
    with pytest.raises(ValueError, match="strings only"):
        write_safetensors(tmp_path / "x", {}, {"steps": 3})  # type: ignore[dict-item]


def test_missing_file_and_folder_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no such file"):
        read_state_dict(tmp_path / "none.safetensors")
    with pytest.raises(WeightsError, match="a folder"):
        read_state_dict(tmp_path)


@SHARED_FOLDER
@given(data=st.data())
def test_damaged_bytes_never_raise_anything_else(tmp_path: Path, data: st.DataObject) -> None:
    damaged = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "x"
    path.write_bytes(bytes(damaged[: data.draw(st.integers(0, len(damaged)))]))
    try:
        read_state_dict(path)
        read_metadata(path)
    except WeightsError as error:
        assert "\n" not in str(error)
