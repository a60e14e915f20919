"""What attention layers make of a text, kept: the nets give the same, and project it once."""

from typing import Any

import pytest
import torch
from torch import Tensor

from msbd.text_memory import remember_text
from tests.helpers.tiny_restore import WIDTH, real_nets


def call(nets: dict[str, Any], context: Any, batch: int) -> Tensor:
    """The U-Net under control, of a batch of different latents."""
    generator = torch.Generator().manual_seed(0)
    x, hint = (torch.randn(batch, channels, 6, 5, generator=generator) for channels in (4, 8))
    t = torch.tensor(500)
    unet, controlnet = nets["unet"], nets["controlnet"]
    contexts = context if isinstance(context, tuple) else (context, context)
    return unet(x, t, contexts[0], controlnet(x, t, contexts[1], hint=hint))


def remembered(nets: dict[str, Any], context: Tensor) -> tuple[Any, Any]:
    return remember_text(nets["unet"], context), remember_text(nets["controlnet"], context)


@pytest.mark.parametrize("variant", ["full", "light", "eq2", "none"])
@pytest.mark.parametrize("times", [1, 3])
def test_nets_give_the_same_from_memory_for_texts_in_turn(variant: str, times: int) -> None:
    nets, context = real_nets(variant), torch.randn(2, 77, WIDTH)
    torch.testing.assert_close(
        call(nets, remembered(nets, context), 2 * times), call(nets, context.repeat(times, 1, 1), 2 * times)
    )
    swapped = call(nets, remembered(nets, context.flip(0)), 2 * times)
    assert not torch.allclose(swapped, call(nets, remembered(nets, context), 2 * times), atol=1e-4)


@pytest.mark.parametrize("variant", ["full", "light"])
def test_only_attention_to_the_text_is_remembered(variant: str) -> None:
    """Pixel attentions attend to what changes at every step."""
    nets = real_nets(variant)
    calls: dict[str, int] = {}
    for path, layer in nets["unet"].named_modules():
        if path.endswith((".to_k", ".to_v")):
            layer.register_forward_hook(lambda *_, path=path: calls.update({path: calls.get(path, 0) + 1}))
    memory = remembered(nets, torch.randn(1, 77, WIDTH))
    assert calls and all(".attentions." in path and ".attn2.to_" in path for path in calls)
    projected = dict(calls)
    for _ in range(2):
        call(nets, memory, 3)
    assert {path: calls[path] for path in projected} == projected == dict.fromkeys(projected, 1)
    others = calls.keys() - projected.keys()
    assert {calls[path] for path in others} == {2}
    assert any(("pixel_attentions" if variant == "full" else "attn2_plus") in path for path in others)


def test_a_net_without_attention_to_text_has_nothing_to_remember() -> None:
    memory = remember_text(torch.nn.Conv2d(1, 1, 1), torch.zeros(1, 77, 4))
    assert callable(memory)
