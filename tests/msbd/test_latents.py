import copy
import warnings
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from msbd.latents import decode, encode
from nets.tiled_vae import TiledAutoencoder
from nets.vae import AutoencoderKL, VAEConfig
from tests.helpers.seeded_weights import load_seeded, seeded_input

TINY = VAEConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=2, mid_attention=False)


class Overflows(nn.Module):
    """A layer that float16 and bfloat16 do not survive."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.dtype == torch.float32 else x * torch.inf


class Lost(nn.Module):
    """A layer that nothing survives."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.nan


def vae_with(layer: nn.Module) -> AutoencoderKL:
    vae = load_seeded(AutoencoderKL(TINY), seed=1)
    vae.quant_conv = nn.Sequential(layer, vae.quant_conv)  # type: ignore[assignment]
    vae.post_quant_conv = nn.Sequential(layer, vae.post_quant_conv)  # type: ignore[assignment]
    return cast("AutoencoderKL", vae.eval())


@pytest.mark.parametrize("tiled", [False, True])
@torch.no_grad()
def test_what_overflows_is_asked_once_more_in_float32(tiled: bool) -> None:
    exact, half = vae_with(nn.Identity()), vae_with(Overflows()).bfloat16()
    half_before = copy.deepcopy(half.state_dict())
    # The weights as bfloat16 has them are what float32 is asked with.
    exact.load_state_dict({name: value.float() for name, value in half.state_dict().items()})
    net: Any = TiledAutoencoder(half, encoder_tile=32, decoder_tile=16) if tiled else half
    images = seeded_input("images", (1, 3, 120, 40), seed=2).clamp(-1, 1)
    latents = encode(exact, images)
    with pytest.warns(UserWarning, match="gave NaN in bfloat16; asked once more in float32"):
        torch.testing.assert_close(encode(net, images), latents)
    with pytest.warns(UserWarning, match="gave NaN in bfloat16; asked once more in float32"):
        torch.testing.assert_close(decode(net, latents), decode(exact, latents))
    assert all(torch.equal(value, half_before[name]) for name, value in half.state_dict().items())
    assert next(half.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_what_gives_no_numbers_in_float32_either_is_refused(dtype: torch.dtype) -> None:
    vae = vae_with(Lost()).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="the autoencoder gave NaN"):
            encode(vae, torch.zeros(1, 3, 16, 16))
        with pytest.raises(ValueError, match="the autoencoder gave NaN"):
            decode(vae, torch.zeros(1, 4, 8, 8))


def test_latents_that_are_no_numbers_are_the_u_nets() -> None:
    with pytest.raises(ValueError, match="the U-Net gave NaN"):
        decode(vae_with(nn.Identity()), torch.full((1, 4, 8, 8), torch.nan))
