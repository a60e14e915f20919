"""What attention layers make of a text is the same at every step: kept, so that it is made once.

Tensors  context (B, 77, D) text states -> keys and values (B, 77, C) of each layer that attends to them
Copying  this file stands alone: torch only. The net is any module whose layers named attentions.<...>.attn2 have
         `keys_values(context)` and take a callable as their context (nets/unet.py, and what is made of it)
"""

import re
from collections.abc import Callable

from torch import Tensor, nn

_TEXT = re.compile(r"(.*\.)?attentions\..*\.attn2")  # not pixel_attentions: what those attend to changes


def remember_text(net: nn.Module, context: Tensor) -> Callable[[nn.Module, int], tuple[Tensor, Tensor]]:
    """To be passed to `net` in the place of `context` (B, M, D).

    It serves a batch of B, and one of n * B as n repetitions of the texts, in their order.
    """
    layers = [layer for path, layer in net.named_modules() if _TEXT.fullmatch(path)]
    made: dict[nn.Module, tuple[Tensor, Tensor]] = {layer: layer.keys_values(context) for layer in layers}  # type: ignore[operator]

    def recall(layer: nn.Module, batch: int) -> tuple[Tensor, Tensor]:
        keys, values = made[layer]
        times = batch // len(context)
        return keys.repeat(times, 1, 1), values.repeat(times, 1, 1)

    return recall
