"""Full-size files with the keys and shapes of official ones, filled with seeded float16 noise, in the
containers that those come in.
"""

import json
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.helpers.goldens import read_shapes
from weights.files import write_safetensors


def manifest(name: str) -> dict[str, tuple[int, ...]]:
    """key -> shape of an official layout."""
    return read_shapes(name)


def fill(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Tensors of these shapes in float16, each seeded by its name,
    of a size that keeps a net's activations tame.
    """
    return {key: _tensor(key, shape) for key, shape in shapes.items()}


def _tensor(key: str, shape: tuple[int, ...]) -> Tensor:
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
    if len(shape) >= 2:
        return (noise / np.prod(shape[1:]) ** 0.5).half()
    return (0.05 * noise + (1.0 if key.endswith("weight") else 0.0)).half()


def write_lightning(path: Path, state: Mapping[str, Tensor]) -> Path:
    """A checkpoint as PyTorch Lightning wrote Stable Diffusion's: tensors under `state_dict`,
    beside them what training left.
    """
    name = "pytorch_lightning.callbacks.model_checkpoint"
    module, callback = ModuleType(name), type("ModelCheckpoint", (), {"__module__": name})
    module.ModelCheckpoint = callback  # type: ignore[attr-defined]
    parents = {part: ModuleType(part) for part in ("pytorch_lightning", "pytorch_lightning.callbacks")}
    content: dict[str, Any] = {
        "epoch": 25,
        "global_step": 470000,
        "pytorch-lightning_version": "1.4.2",
        "state_dict": dict(state),
        "callbacks": {
            callback: {"monitor": "val/loss", "best_model_score": np.float64(0.1), "current": callback()}
        },
        "optimizer_states": [],
        "lr_schedulers": [{"base_lrs": [np.float32(1e-4)], "last_epoch": np.int64(3)}],
    }
    sys.modules.update({**parents, name: module})
    try:
        torch.save(content, path)
    finally:
        for part in (*parents, name):
            del sys.modules[part]
    return path


def write_shards(folder: Path, stem: str, state: Mapping[str, Tensor], count: int = 2) -> Path:
    """`state` in `count` safetensors files and their index,
    as diffusers and transformers write large nets.
    """
    keys = list(state)
    names = {
        key: f"{stem}-{1 + i * count // len(keys):05}-of-{count:05}.safetensors" for i, key in enumerate(keys)
    }
    for name in set(names.values()):
        write_safetensors(folder / name, {key: state[key] for key in keys if names[key] == name})
    index = folder / f"{stem}.safetensors.index.json"
    total = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": names}))
    return index
