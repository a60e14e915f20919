"""What every test beside an oracle gets: its place, no gradients, no TF32."""

import gc
from collections.abc import Iterator

import pytest
import torch

from tests.helpers.places import PLACES, Place


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Place:
    """Each place in turn."""
    return request.param


@pytest.fixture(autouse=True)
def inference(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No gradients, no TF32, and memory given back at the end."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with torch.no_grad():
        yield
    gc.collect()
    torch.cuda.empty_cache()
