"""weights/hub.py: which file of a folder is read, shards and their index, and the JSON beside them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from weights.files import WeightsError, write_safetensors
from weights.hub import (
    Source,
    find_source,
    find_sources,
    hub_map,
    read_json,
    read_source,
    source_files,
    source_of,
)

# What a net's folder may hold, the file to be read first. All are names that diffusers or transformers write.
PREFERENCE = [
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.fp16.safetensors.index.json",
    "diffusion_pytorch_model.safetensors.index.fp16.json",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.bin.index.json",
    "diffusion_pytorch_model.fp16.bin",
    "diffusion_pytorch_model.bin.index.fp16.json",
]
NEVER = [
    "diffusion_pytorch_model.non_ema.safetensors",
    "diffusion_pytorch_model.non_ema.bin",
    "diffusion_flax_model.msgpack",
    "model.onnx",
    "diffusion_pytorch_model-00001-of-00002.safetensors",
    "diffusion_pytorch_model.safetensors.part",
    "openvino_model.bin",
]
INDEX = "diffusion_pytorch_model.safetensors.index.json"


def refusal(act: Callable[[], Any]) -> str:
    """The one line of a WeightsError."""
    with pytest.raises(WeightsError) as refused:
        act()
    assert "\n" not in str(refused.value)
    return str(refused.value)


def put(path: Path, text: str = "{}") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


# ---- which file --------------------------------------------------------------------------------------------


def test_the_best_file_is_taken_in_order(tmp_path: Path) -> None:
    for name in (*PREFERENCE, *NEVER):
        put(tmp_path / name)
    for name in PREFERENCE:
        assert find_source(tmp_path).path == tmp_path / name
        (tmp_path / name).unlink()
    assert refusal(lambda: find_source(tmp_path)) == (
        f"{tmp_path}: no weights here; expected one of diffusion_pytorch_model.safetensors, model.safetensors, "
        "pytorch_model.safetensors (or .bin)"
    )


def test_a_text_encoders_safe_file_goes_before_its_pickle(tmp_path: Path) -> None:
    for name in ("pytorch_model.bin", "model.fp16.safetensors", "model.safetensors", "tf_model.h5"):
        put(tmp_path / name)
    assert find_source(tmp_path).path.name == "model.safetensors"
    (tmp_path / "model.safetensors").unlink()
    assert find_source(tmp_path).path.name == "model.fp16.safetensors"
    (tmp_path / "model.fp16.safetensors").unlink()
    assert find_source(tmp_path).path.name == "pytorch_model.bin"


def test_a_folder_of_that_name_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    assert "no weights here" in refusal(lambda: find_source(tmp_path))
    assert "no weights here" in refusal(lambda: find_source(tmp_path / "absent"))


def test_a_models_folders_are_its_parts(tmp_path: Path) -> None:
    assert find_sources(tmp_path) == {}
    for name in ("unet", "vae", "controlnet"):
        put(tmp_path / name / "diffusion_pytorch_model.safetensors")
    put(tmp_path / "text_encoder" / "model.safetensors")
    put(tmp_path / "safety_checker" / "model.safetensors")
    put(tmp_path / "text_encoder_2" / "model.safetensors")
    put(tmp_path / "vae" / "config.json", '{"scaling_factor": 0.5}')
    found = find_sources(tmp_path)
    assert set(found) == {"unet", "vae", "text_encoder", "controlnet"}
    assert found["vae"] == Source(
        tmp_path / "vae" / "diffusion_pytorch_model.safetensors", {"scaling_factor": 0.5}
    )
    assert found["unet"].config == {}
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert refusal(lambda: find_sources(tmp_path)).startswith(f"{tmp_path / 'unet'}: no weights here")


def test_a_file_with_a_nets_name_has_its_config_beside_it(tmp_path: Path) -> None:
    put(tmp_path / "config.json", '{"norm_eps": 0.5}')
    for name in ("diffusion_pytorch_model.fp16.safetensors", "model.safetensors", "pytorch_model.bin", INDEX):
        assert source_of(tmp_path / name) == Source(tmp_path / name, {"norm_eps": 0.5})
    for name in ("v1-5-pruned.safetensors", "unet.safetensors", "my_model.safetensors", "modelx.ckpt"):
        assert source_of(tmp_path / name) == Source(tmp_path / name, {})


# ---- tensors -----------------------------------------------------------------------------------------------


def tensors() -> dict[str, Tensor]:
    return {f"block.{i}.weight": torch.full((2, 3), float(i)).half() for i in range(5)}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("ending", ["safetensors", "fp16.safetensors", "bin", "fp16.bin"])
def test_one_file_is_read_whatever_its_format(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"diffusion_pytorch_model.{ending}"
    if ending.endswith("bin"):
        torch.save(tensors(), path)
    else:
        write_safetensors(path, tensors())
    source = find_source(tmp_path)
    assert same(read_source(source), tensors()) and source_files(source) == [path]


def write_shards(folder: Path, index: str = INDEX, ending: str = "safetensors") -> dict[str, str]:
    """Two shards and their index; the index's `weight_map`."""
    keys, names = list(tensors()), [f"model-0000{i}-of-00002.{ending}" for i in (1, 2)]
    weight_map = {key: names[number > 2] for number, key in enumerate(keys)}
    for name in names:
        part = {key: tensor for key, tensor in tensors().items() if weight_map[key] == name}
        if ending == "bin":
            torch.save(part, folder / name)
        else:
            write_safetensors(folder / name, part)
    put(folder / index, json.dumps({"metadata": {"total_size": 60}, "weight_map": weight_map}))
    return weight_map


@pytest.mark.parametrize("index", [name for name in PREFERENCE if name.endswith(".json")])
def test_shards_are_read_through_their_index(tmp_path: Path, index: str) -> None:
    ending = "bin" if ".bin." in index else "safetensors"
    weight_map = write_shards(tmp_path, index, ending)
    put(tmp_path / "config.json", '{"sample_size": 64}')
    source = find_source(tmp_path)
    assert source == Source(tmp_path / index, {"sample_size": 64})
    assert same(read_source(source), tensors())
    assert source_files(source) == [tmp_path / index, *(tmp_path / n for n in sorted(set(weight_map.values())))]  # fmt: skip


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    line = refusal(lambda: read_source(Source(tmp_path / INDEX)))
    assert line.startswith(f"{tmp_path / 'model-00002-of-00002.safetensors'}: no such file")


@pytest.mark.parametrize("change", [{"block.9.weight": "model-00001-of-00002.safetensors"}, {"block.1.weight": None}])  # fmt: skip
def test_an_index_that_lies_is_refused(tmp_path: Path, change: dict[str, str | None]) -> None:
    weight_map = {**write_shards(tmp_path), **change}
    weight_map = {key: name for key, name in weight_map.items() if name}
    put(tmp_path / INDEX, json.dumps({"weight_map": weight_map}))
    line = refusal(lambda: read_source(Source(tmp_path / INDEX)))
    assert f"1 tensors are in the index or in the shards but not in both, first {next(iter(change))!r}" in line  # fmt: skip


@pytest.mark.parametrize(
    "weight_map",
    [None, {}, [], "x", 1, [["a", "b"]], {"a": 1}, {"a": None}, {"a": ["x"]}, {"a": {}}, {"a": ""}, {"a": "."}, {"a": "x/"},
     {"a": "../secret.safetensors"}, {"a": "/etc/passwd"}, {"a": "sub/x.safetensors"}, {"a": "./x.safetensors"}],
)  # fmt: skip
def test_an_index_that_is_none_or_leads_elsewhere_is_refused(tmp_path: Path, weight_map: Any) -> None:
    folder = tmp_path / "net"
    put(folder / INDEX, json.dumps({"weight_map": weight_map}))
    write_safetensors(tmp_path / "secret.safetensors", {"a": torch.zeros(1)})
    for act in (read_source, source_files):
        line = refusal(lambda act=act: act(Source(folder / INDEX)))
        assert line.startswith(f"{folder / INDEX}: no index of shards; expected a `weight_map`")


@pytest.mark.parametrize("name", ["..", "config.json", "x\0y", "net"])
def test_a_shard_that_is_no_weights_file_is_refused(tmp_path: Path, name: str) -> None:
    put(tmp_path / "config.json")
    (tmp_path / "net").mkdir()
    put(tmp_path / INDEX, json.dumps({"weight_map": {"a": name}}))
    refusal(lambda: read_source(Source(tmp_path / INDEX)))


# ---- JSON --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"{", "not a JSON file"), (b"", "not a JSON file"), (b'{"a": \xff}', "not a JSON file"), (b"[" * 100_000, "not a JSON file"),
     (b'{"a": ' + b"1" * 5000 + b"}", "not a JSON file"), (b"[1]", "holds no JSON table"), (b"null", "holds no JSON table"),
     (b"<html>\n</html>", "not a JSON file")],
)  # fmt: skip
def test_broken_json_is_refused_in_one_line(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    put(tmp_path / "model.safetensors")
    for act in (
        lambda: read_json(tmp_path / "config.json"),
        lambda: find_source(tmp_path),
        lambda: source_of(tmp_path / "model.safetensors"),
    ):
        line = refusal(act)
        assert line.startswith(f"{tmp_path / 'config.json'}: {reason}") and len(line) < 300


def test_no_json_file_is_an_empty_table(tmp_path: Path) -> None:
    assert read_json(tmp_path / "config.json") == {}
    assert read_json(put(tmp_path / "x.json", '{"ä": [1, null]}')) == {"ä": [1, None]}


def test_canonical_names_need_no_map() -> None:
    for key in ("text_model.embeddings.token_embedding.weight", "encoder.mid_block.attentions.0.to_q.weight",
                "vision_model.embeddings.patch_embedding.weight", "conv_in.weight", "embeddings.weight"):  # fmt: skip
        assert hub_map([key]) is None
    assert hub_map([]) is None
