"""Stand-ins for the sampler tests: the goldens' net, a noise source that takes notes, a watch on dtypes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Asked = list[tuple[str, int, tuple[int, ...]]]


def fake_eps(x: Tensor | None = None, t: Tensor | int = 0, context: Tensor | None = None) -> Any:
    """The goldens' net, tanh(0.3 x + 0.001 t + mean of the sample's context); without x,
    a denoiser (x, t).
    """
    if x is None:
        return lambda x, t: torch.tanh(0.3 * x + 0.001 * t)
    shift = 0.0 if context is None else context.mean(dim=(1, 2)).reshape(-1, 1, 1, 1)
    return torch.tanh(0.3 * x + 0.001 * t + shift)


def recorded_noise(seed: int = 0) -> tuple[Asked, Callable[[str, int, tuple[int, ...]], Tensor]]:
    """A list that fills with the sites asked for, and the noise source that fills it."""
    asked: Asked = []
    generator = torch.Generator().manual_seed(seed)

    def noise(site: str, step: int, shape: tuple[int, ...]) -> Tensor:
        asked.append((site, step, shape))
        return torch.randn(shape, generator=generator)

    return asked, noise


class NoDoubleOnLatents(TorchDispatchMode):
    """Fails when an operation mixes a float64 tensor with one of the latent's dtype, as a device might."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        dtypes = {a.dtype for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)}
        assert not {torch.float64, self.dtype} <= dtypes, f"{func} mixes float64 with {self.dtype}"
        return func(*args, **(kwargs or {}))
