"""weights/files.py: round trips, equal bytes, and checkpoints as trainers write them.
What it refuses: test_hostile.py.
"""

import argparse
import collections
import datetime
import json
import pathlib
import random
import sys
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.helpers.hostile import (
    BUILD,
    archive,
    call,
    container,
    entry,
    named,
    number,
    old,
    row,
    saved,
    table,
    text,
)
from tests.helpers.hostile import tensor as held
from weights.files import (
    DTYPE_NAMES,
    WeightsError,
    read_metadata,
    read_state_dict,
    release_pages,
    sha256,
    write_safetensors,
)

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


@pytest.mark.parametrize("header_length", [0, 1], ids=["aligned", "unaligned"])
def test_zeros_behind_the_last_tensor_are_padding(tmp_path: Path, header_length: int) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {
        "a": torch.randn(3, 5), "b": torch.arange(7), "c": torch.ones(2, 3, dtype=torch.float16), "d": torch.ones(0, 4), "e": torch.tensor(2.0)
    }  # fmt: skip
    write_safetensors(path, tensors, {"note": "x"})
    length = int.from_bytes(path.read_bytes()[:8], "little")
    content = path.read_bytes()
    header = content[8 : 8 + length] + b" " * header_length
    content = len(header).to_bytes(8, "little") + header + content[8 + length :]
    for padding in (1, 64, 5000):
        path.write_bytes(content + bytes(padding))
        back = read_state_dict(path)
        assert back.keys() == tensors.keys() and read_metadata(path)["note"] == "x"
        assert all(
            torch.equal(back[name], value) and back[name].dtype == value.dtype
            for name, value in tensors.items()
        )
    path.write_bytes(content + bytes(60) + b"more")
    message = (
        rf"64 bytes behind its last tensor that are no padding; .* or cut this one to {len(content):,} bytes"
    )
    with pytest.raises(WeightsError, match=message):
        read_state_dict(path)


def test_a_padded_file_whose_header_is_wrong_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": torch.ones(4), "b": torch.ones(4)})
    content = path.read_bytes() + bytes(8)
    for there, wrong in (
        (b"[16,32]", b"[20,36]"),
        (b"[4]", b"[5]"),
        (b"[0,16]", b"[0,12]"),
        (b'"F32"', b'"F99"'),
    ):
        path.write_bytes(content.replace(there, wrong))
        with pytest.raises(WeightsError, match="damaged"):
            read_state_dict(path)


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


# ---- checkpoints of torch.save -----------------------------------------------------------------------------

FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
)  # fmt: skip


def through_file(folder: Path, content: object, *, zipped: bool) -> dict[str, Tensor]:
    (folder / "model.ckpt").write_bytes(saved(content, zipped=zipped))
    return read_state_dict(folder / "model.ckpt")


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """The same keys in the same order, and the same dtypes, shapes and bits."""
    pairs = list(zip(one.values(), other.values(), strict=False))
    return list(one) == list(other) and all(
        a.dtype == b.dtype and a.shape == b.shape and not a.requires_grad and torch.equal(bits(a), bits(b))
        for a, b in pairs
    )


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def a_state() -> dict[str, Tensor]:
    """Tensors of every dtype, with what no number says (NaN), views, shared storages,
    parameters and empty ones.
    """
    whole = torch.randn(5, 6)
    state = {str(dtype): torch.randn(3, 2).mul(9).to(dtype) for dtype in DTYPES}
    special = torch.tensor([float("nan"), float("-inf"), -0.0])
    return state | {
        "special": special, "whole": whole, "turned": whole.T, "part": whole[1:4, 2], "flipped": whole.flip(0), "scalar": whole[2, 3],
        "again": whole, "parameter": torch.nn.Parameter(whole[:2]), "empty": torch.empty(0, 3),
        "channels last": torch.randn(1, 2, 3, 4).to(memory_format=torch.channels_last),
    }  # fmt: skip


@FORMATS
def test_every_bit_of_a_checkpoint_comes_back(tmp_path: Path, zipped: bool) -> None:
    state = a_state()
    back = through_file(tmp_path, state, zipped=zipped)
    assert same(back, state) and back["turned"].stride() == state["turned"].stride()
    assert back["whole"].data_ptr() == back["again"].data_ptr()  # one storage, as it was


@FORMATS
@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state, "epoch": 3, "global_step": torch.tensor(7)},
        lambda state: {"params": {"worse": torch.ones(1)}, "params_ema": state},
        lambda state: {"params": state},
        lambda state: {"model": state, "optimizer": {"state": {0: {"exp_avg": torch.ones(1)}}}},
        lambda state: {"model": {"state_dict": state}, "rng": torch.get_rng_state()},
        lambda state: {"model": {"name": "unet"}, **state},
        lambda state: {"state_dict": {}, "params": OrderedDict(state)},
        lambda state: {**state, 7: torch.ones(1), "step": 7, "betas": (0.9, 0.999), "none": None},
        OrderedDict,
    ],
)
def test_tensors_are_found_where_trainers_put_them(wrap: Any, tmp_path: Path, zipped: bool) -> None:
    state = {"a.weight": torch.randn(2, 3), "a.bias": torch.randn(2)}
    assert same(through_file(tmp_path, wrap(state), zipped=zipped), state)


def _beside() -> dict[str, object]:
    """What training checkpoints hold besides tensors, of classes that are there,
    and of others that are not where it is read.
    """
    generator = np.random.default_rng(0)
    optimizer = torch.optim.Adam([{"params": [torch.nn.Parameter(torch.ones(3))]} for _ in range(2)])
    return {
        "numpy scalar": np.float64(0.5), "numpy array": np.arange(5, dtype=np.int16), "numpy generator": generator,
        "numpy state": np.random.get_state(), "python state": random.getstate(), "torch state": torch.get_rng_state(),
        "namespace": argparse.Namespace(lr=1e-4, sizes=[1, 2], inner=argparse.Namespace()),
        "defaultdict": defaultdict(list, {"loss": [0.1, 0.2]}), "counter": Counter("abca"), "path": pathlib.PurePosixPath("a/b"),
        "time": datetime.datetime(2022, 8, 10, tzinfo=datetime.UTC), "delta": datetime.timedelta(1), "set": {1, 2}, "frozen": frozenset([1]),
        "bytes": b"\x00\xff", "no bytes": b"", "complex": 1 + 2j, "large": 2**70, "negative": -(2**40), "class": dict, "dtype": torch.float16,
        "device": torch.device("cpu"), "size": torch.ones(2, 3).shape, "optimizer": optimizer.state_dict(), "nested": [((1, (2,)), {})],
    }  # fmt: skip


@FORMATS
@pytest.mark.parametrize("what", _beside())
def test_what_lies_beside_the_tensors_is_passed_over(what: str, tmp_path: Path, zipped: bool) -> None:
    state = {"a": torch.randn(3)}
    assert same(through_file(tmp_path, {"extra": _beside()[what], "state_dict": state}, zipped=zipped), state)


class Pretended:
    """Objects of packages that are there only while the file is written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    def make(self, module: str, name: str, *bases: type, **attributes: Any) -> Any:
        """A new class `module`.`name`."""
        made = type(name, bases, {"__module__": module, **attributes})
        for i, _ in enumerate(parts := module.split(".")):
            path = ".".join(parts[: i + 1])
            self._monkeypatch.setitem(sys.modules, path, sys.modules.get(path) or ModuleType(path))
        setattr(sys.modules[module], name, made)
        return made


@FORMATS
def test_a_lightning_checkpoint_loads_without_lightning(
    tmp_path: Path, zipped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {"model.diffusion_model.out.2.bias": torch.randn(4)}
    with monkeypatch.context() as context:
        make = Pretended(context).make
        callback = make("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint")
        table = make("pytorch_lightning.utilities.parsing", "AttributeDict", dict)
        node = make("omegaconf.nodes", "AnyNode")()
        config = make("omegaconf.dictconfig", "DictConfig")()
        meta = make("omegaconf.base", "ContainerMetadata")()
        vars(meta).update(ref_type=Any, object_type=dict, optional=True, flags={})
        vars(node).update(_val=0.5, _parent=config)
        vars(config).update(_metadata=meta, _parent=None, _content={"lr": node})  # refers to itself
        content = {
            "epoch": 6, "global_step": 470_000, "pytorch-lightning_version": "1.4.2", "state_dict": state, "hyper_parameters": config,
            "callbacks": {callback: {"best_model_score": torch.tensor(0.1), "best_model_path": "x"}}, "hparams": table(a=1, b=[2]),
        }  # fmt: skip
        data = saved(content, zipped=zipped)
    (tmp_path / "last.ckpt").write_bytes(data)
    allowed = set(torch.serialization.get_safe_globals())
    assert "pytorch_lightning" not in sys.modules and "omegaconf" not in sys.modules
    assert same(read_state_dict(tmp_path / "last.ckpt"), state)
    assert "pytorch_lightning" not in sys.modules and "omegaconf" not in sys.modules
    assert (
        set(torch.serialization.get_safe_globals()) == allowed
    )  # what is let pass for one file is not left so


@FORMATS
def test_objects_of_any_package_beside_the_tensors_are_passed_over(
    tmp_path: Path, zipped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of trainers' own modules and scripts: nothing of theirs is imported, and nothing need be there."""
    state = {"model.diffusion_model.out.2.bias": torch.randn(4)}
    with monkeypatch.context() as context:
        make, beside = Pretended(context).make, {}
        for module, name, *bases in (
            ("diffusers.training_utils_old", "EMAModel"),
            ("ldm_old.modules.ema", "LitEma"),
            ("pytorch_lightning.callbacks.timer", "Timer"),
            ("transformers_old.configuration_utils", "PretrainedConfig"),
            ("my_training_script", "Settings"),
            ("my_training_script", "LossList", list),
            ("my_training_script", "TableDict", dict),
        ):
            kept = (made := make(module, name, *bases))()
            if not bases:
                vars(kept).update(decay=0.9999, owner=kept)
            elif isinstance(kept, dict):
                kept.update(a=1, b=[2])
            else:
                kept.extend([0.1, 0.2])
            beside[f"{module}.{name}"] = [kept, made]
        beside["window"] = collections.deque([0.1, 0.2], maxlen=5)
        content = {"state_dict": state, "epoch": 3, **beside}
        data = saved(content, zipped=zipped)
        script = make("__main__", "Args")()
        vars(script).update(lr=1e-4)
        more = saved({"state_dict": state, "args": script, "optimizer": torch.optim.Adam}, zipped=zipped)
    for content in (data, more):
        (tmp_path / "last.ckpt").write_bytes(content)
        assert same(read_state_dict(tmp_path / "last.ckpt"), state)
    assert not {"ldm_old", "my_training_script", "transformers_old"} & set(sys.modules)


@pytest.mark.parametrize("make", [archive, old])
def test_a_table_that_hides_its_own_methods_is_read_all_the_same(tmp_path: Path, make: Any) -> None:
    hiding = table(*((name, number(0)) for name in ("items", "get", "keys", "values", "__iter__")))
    body = call("collections.OrderedDict") + text("a") + held() + b"s" + hiding + BUILD
    (tmp_path / "x.ckpt").write_bytes(make(body))
    assert torch.equal(read_state_dict(tmp_path / "x.ckpt")["a"], torch.zeros(2))


def test_what_the_hostile_files_are_made_of_is_sound(tmp_path: Path) -> None:
    """So that each of them is refused for what is wrong with it."""
    body = table(
        ("state_dict", table(("a", held()), ("b", held((1, 1), (9, 9), 1)))), ("n", number(-(2**40)))
    )
    beside = table(
        ("a", held()), ("x", named("numpy.dtype") + row(text("f4")) + b"R" + row(number(3)) + b"b")
    )
    for make in (archive, old):
        for content in (body, beside):
            (tmp_path / "x.ckpt").write_bytes(make(content))
            assert torch.equal(read_state_dict(tmp_path / "x.ckpt")["a"], torch.zeros(2))


def test_a_zip_checkpoint_is_mapped_not_copied(tmp_path: Path) -> None:
    (path := tmp_path / "model.ckpt").write_bytes(saved({"a": torch.ones(1000)}))
    mapped = Path("/proc/self/maps")
    if not mapped.exists():
        pytest.skip("only Linux tells what is mapped")
    back = read_state_dict(path)
    lines = [line for line in mapped.read_text().splitlines() if str(path) in line]
    begin, end = (int(place, 16) for place in lines[0].split()[0].split("-"))
    assert begin <= back["a"].data_ptr() < end
    back["a"].zero_()  # a private mapping: the file stays as it is
    assert torch.equal(read_state_dict(path)["a"], torch.ones(1000))


def test_the_content_decides_not_the_name(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.ckpt", {"a": torch.ones(2)}, {"b": "c"})
    assert read_metadata(tmp_path / "model.ckpt")["b"] == "c"
    assert torch.equal(read_state_dict(tmp_path / "model.ckpt")["a"], torch.ones(2))
    for zipped, name in ((True, "a.safetensors"), (False, "b.SafeTensors")):
        (path := tmp_path / name).write_bytes(saved({"a": torch.ones(2)}, zipped=zipped))
        assert read_metadata(path) == {}
        with pytest.raises(
            WeightsError, match=r"named \.safetensors, but is a PyTorch pickle.*name it \.ckpt"
        ):
            read_state_dict(path)
        path.rename(tmp_path / "anything")
        assert torch.equal(read_state_dict(tmp_path / "anything")["a"], torch.ones(2))


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux's account of memory")
@pytest.mark.parametrize("container", ["pth", "safetensors"])
def test_released_pages_take_no_memory_and_are_read_again(tmp_path: Path, container: str) -> None:
    def resident() -> int:  # kB
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))

    tensors = {"a": torch.randn(2000, 2000), "b": torch.randn(2000, 2000)}  # 16 MB each
    path = tmp_path / f"net.{container}"
    torch.save(tensors, path) if container == "pth" else write_safetensors(path, tensors)
    read, anonymous = read_state_dict(path), torch.randn(1000)
    kept = anonymous.clone()
    assert all(bool(tensor.isfinite().all()) for tensor in read.values())
    looked_at = resident()
    release_pages([read["a"], read["b"], anonymous])
    assert looked_at - resident() > 25_000
    assert torch.equal(anonymous, kept)
    assert all(torch.equal(read[key], tensor) for key, tensor in tensors.items())


def test_releasing_pages_leaves_what_is_no_mapped_file(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(300, 300)}
    torch.save(tensors, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    read = read_state_dict(tmp_path / "old.pth") | {"empty": torch.empty(0), "kept": torch.ones(5)}
    release_pages(read.values())
    assert torch.equal(read["a"], tensors["a"]) and torch.equal(read["kept"], torch.ones(5))
