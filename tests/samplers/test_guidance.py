"""Classifier-free guidance against its formula, and what it evaluates."""

import pytest
import torch
from torch import Tensor

from samplers.guidance import classifier_free_guidance

COND, UNCOND = torch.full((1, 7, 8), 0.5), torch.full((1, 7, 8), -0.25)
X = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0))


class Recorder:
    """A fake net, eps = x * mean(context) + t / 1000, that keeps what it was called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        self.calls.append((x, t, context))
        per_sample = context.mean(dim=(1, 2)).reshape(-1, 1, 1, 1)
        return x * per_sample.to(x) + torch.as_tensor(t).reshape(-1, 1, 1, 1).to(x) / 1000


@pytest.mark.parametrize("batch", [1, 3])
def test_guidance_is_one_batched_call_of_uncond_then_cond(batch: int) -> None:
    model = Recorder()
    cond, uncond = COND.expand(batch, -1, -1), UNCOND.expand(batch, -1, -1)
    eps = classifier_free_guidance(model, cond, uncond, 7.5)(X, torch.tensor(40))
    torch.testing.assert_close(eps, X * (-0.25 + 7.5 * 0.75) + 0.04)
    ((x, t, context),) = model.calls
    assert torch.equal(x, torch.cat([X, X])) and t.dim() == 0
    assert context.shape == (6, 7, 8) and context[:, 0, 0].tolist() == [-0.25] * 3 + [0.5] * 3


def test_guidance_doubles_per_sample_timesteps() -> None:
    model = Recorder()
    t = torch.tensor([1, 2, 3])
    eps = classifier_free_guidance(model, COND, UNCOND, 2.0)(X, t)
    assert model.calls[0][1].tolist() == [1, 2, 3, 1, 2, 3]
    torch.testing.assert_close(eps, X * 1.25 + t.reshape(3, 1, 1, 1) / 1000)


def test_guidance_of_scale_1_evaluates_the_conditional_only() -> None:
    model = Recorder()
    eps = classifier_free_guidance(model, COND, UNCOND, 1.0)(X, torch.tensor(0))
    assert torch.equal(eps, X * 0.5) and model.calls[0][0].shape == X.shape


def test_guidance_of_scale_0_is_the_unconditional() -> None:
    eps = classifier_free_guidance(Recorder(), COND, UNCOND, 0.0)(X, torch.tensor(0))
    torch.testing.assert_close(eps, X * -0.25)


@pytest.mark.parametrize("t, guided", [(99, False), (100, True), (500, True), (501, False)])
def test_guidance_is_off_outside_its_interval(t: int, guided: bool) -> None:
    model = Recorder()
    classifier_free_guidance(model, COND, UNCOND, 7.5, interval=(100, 500))(X, torch.tensor(t))
    assert model.calls[0][0].shape[0] == (6 if guided else 3)


def test_guidance_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="interval"):
        classifier_free_guidance(Recorder(), COND, UNCOND, 7.5, interval=(500, 100))
    with pytest.raises(ValueError, match="cond context has batch 2"):
        classifier_free_guidance(Recorder(), COND.expand(2, -1, -1), UNCOND, 7.5)(X, torch.tensor(1))
    with pytest.raises(ValueError, match="both sides"):
        classifier_free_guidance(Recorder(), COND, UNCOND, 7.5, (0, 2))(X, torch.tensor([1, 2, 3]))


def test_guidance_combines_bfloat16_in_float32() -> None:
    x = X.bfloat16()
    eps = classifier_free_guidance(Recorder(), COND, UNCOND, 7.5)(x, torch.tensor(0))
    assert eps.dtype == torch.float32
    torch.testing.assert_close(eps, x.float() * (-0.25 + 7.5 * 0.75), rtol=1e-6, atol=1e-6)
