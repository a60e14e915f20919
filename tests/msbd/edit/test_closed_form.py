"""Eq. 1 solved for the last convolution: it is the minimum, and no more than the edge is touched."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msbd.edit.closed_form import refit, with_features
from msbd.latents import decode
from msbd.pixels.box import Box
from nets.tiled_vae import TiledAutoencoder
from tests.helpers.edit_scene import FAST, rectangle, shown
from tests.helpers.tiny import latent_pipeline, tiny_vae

LAMBDA, RIDGE = 100.0, 1e-3


def layer(channels: int, seed: int) -> nn.Conv2d:
    """A last convolution with weights of its own."""
    torch.manual_seed(seed)
    return nn.Conv2d(channels, 3, 3, padding=1).requires_grad_(False)


def features(channels: int, height: int, width: int) -> Tensor:
    return F.silu(torch.randn(1, channels, height, width, generator=torch.Generator().manual_seed(5)))


def test_one_window_is_the_minimum_of_equation_1() -> None:
    """The gradient of the loss, with its ridge, vanishes there: by autograd, in float64."""
    phi, conv, mask = features(4, 24, 20), layer(4, 1), rectangle(24, 20, Box(0, 0, 24, 9))
    reference = layer(4, 2)(phi) + 0.1 * torch.randn(1, 3, 24, 20, generator=torch.Generator().manual_seed(6))
    picture = refit(phi, conv, reference, mask, background_weight=LAMBDA, ridge=RIDGE, window=32, stride=16)
    x_out = conv(phi)
    patches = F.unfold(F.pad(phi, (1, 1, 1, 1)), 3)[0].double()
    patches = torch.cat([patches, torch.ones_like(patches[:1])])  # (37, 480)
    weight = torch.where(mask.flatten() > 0, 1.0, LAMBDA).double()
    moved = (picture - x_out).flatten(2)[0].double()  # D phi
    change = torch.linalg.lstsq(patches.T, moved.T).solution.requires_grad_(True)
    rho = RIDGE * ((patches * weight) @ patches.T).diagonal().mean()
    target = torch.where(mask.flatten() > 0, x_out.flatten(2)[0], reference.flatten(2)[0]).double()
    decoded = x_out.flatten(2)[0].double() + change.T @ patches
    loss = (weight * (decoded - target).square()).sum() + rho * change.square().sum()
    loss.backward()
    assert change.grad is not None
    scale = (weight * (x_out.flatten(2)[0].double() - target).square()).sum()
    assert change.grad.abs().max() < 1e-4 * scale


def test_a_background_that_the_layer_can_draw_is_met_and_the_inside_stays() -> None:
    phi, conv = features(6, 96, 160), layer(6, 1)
    mask = rectangle(96, 160, Box(20, 20, 50, 40))
    reference = layer(6, 2)(phi)
    picture = refit(phi, conv, reference, mask, background_weight=1e4, ridge=1e-8)
    near = rectangle(96, 160, Box(10, 10, 70, 60)) * (1 - mask)
    error, before = (((x - reference) * near).square().sum() for x in (picture, conv(phi)))
    assert error < 1e-4 * before
    far = rectangle(96, 160, Box(0, 128, 96, 32))  # no window that touches the mask reaches there
    assert torch.equal(picture * far, conv(phi) * far)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_without_an_edge_nothing_is_changed(value: float) -> None:
    phi, conv = features(4, 40, 72), layer(4, 1)
    mask = torch.full((1, 1, 40, 72), value)
    assert torch.equal(refit(phi, conv, torch.zeros(1, 3, 40, 72), mask), conv(phi))


def test_a_heavier_background_is_met_better() -> None:
    phi, conv = features(4, 64, 64), layer(4, 1)
    mask, reference = rectangle(64, 64, Box(0, 0, 64, 30)), features(3, 64, 64)
    errors = [
        ((refit(phi, conv, reference, mask, background_weight=w) - reference) * (1 - mask)).square().sum()
        for w in (1.0, 10.0, 100.0)
    ]
    assert errors[0] > errors[1] > errors[2]


def test_sizes_must_agree() -> None:
    with pytest.raises(ValueError, match="differ in size; expected one height and width"):
        refit(features(4, 8, 8), layer(4, 1), torch.zeros(1, 3, 8, 8), torch.zeros(1, 1, 8, 9))


def test_features_are_what_the_last_convolution_gets() -> None:
    vae, latent = tiny_vae(), torch.randn(1, 4, 40, 33, generator=torch.Generator().manual_seed(1))
    whole, tiled = (
        with_features(vae).decode(latent),
        with_features(TiledAutoencoder(vae, decoder_tile=8)).decode(latent),
    )
    torch.testing.assert_close(vae.decoder.conv_out(whole), vae.decode(latent))
    torch.testing.assert_close(tiled, whole, rtol=1e-4, atol=1e-4)
    assert vae.decoder.conv_out.out_channels == 3  # itself it is unchanged


def test_it_lowers_the_background_error_of_every_stage_of_an_edit() -> None:
    pipeline = latent_pipeline(vae=tiny_vae())
    plain, before = shown(pipeline, FAST)
    result, after = shown(pipeline, replace(FAST, decoder_optimization=True, seam="closed-form"))
    assert torch.equal(result.candidates, plain.candidates)  # as decoded before it
    assert decode(pipeline.vae, torch.zeros(1, 4, 4, 4)).shape == (1, 3, 32, 32)
    for stage in result.plan.stages:
        name = f"{stage.name}, result"
        assert not torch.equal(after[name], before[name])
