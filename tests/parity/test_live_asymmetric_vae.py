"""AsymmetricAutoencoderKL beside diffusers' class: its weights under its own keys, a source or none."""

from typing import Any

import pytest
import torch
from torch import Tensor

from nets.asymmetric_vae import AsymmetricAutoencoderKL, AsymmetricVAEConfig
from tests.helpers.goldens import relative_error
from tests.helpers.places import Place
from tests.helpers.seeded_nets import config_of
from tests.helpers.seeded_weights import load_seeded, seeded_input

diffusers = pytest.importorskip("diffusers")

BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
TINY: dict[str, Any] = {
    "down_block_out_channels": (16, 16, 32, 32), "layers_per_down_block": 1,
    "up_block_out_channels": (16, 32, 48, 48), "layers_per_up_block": 2, "norm_num_groups": 8,
}  # fmt: skip
# Name -> constructor arguments of the oracle, a latent's size.
CASES: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "wide": (TINY, (5, 7)),
    "one_cell": (TINY, (1, 1)),
    "mini": ({**TINY, "down_block_out_channels": (32, 64, 96, 96), "up_block_out_channels": (32, 64, 96, 96), "layers_per_up_block": 1}, (6, 3)),
    "eight_latent_channels": ({**TINY, "latent_channels": 8, "layers_per_down_block": 2}, (2, 9)),
}  # fmt: skip


def ours_of(oracle: Any) -> AsymmetricAutoencoderKL:
    """Our net with the oracle's config and weights; it shares their memory."""
    with torch.device("meta"):
        net = AsymmetricAutoencoderKL(config_of(AsymmetricVAEConfig, oracle.config))
    net.load_state_dict(oracle.state_dict(), strict=True, assign=True)
    return net.eval()


def drawn(channels: int, cells: tuple[int, int], batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """A latent, a source, and a mask of single pixels and blobs, which no grid of cells knows of."""
    size = (8 * cells[0], 8 * cells[1])
    latent = seeded_input("live.latent", (batch, channels, *cells), seed=42)
    image = seeded_input("live.image", (batch, 3, *size), seed=42, scale=0.4)
    noise = seeded_input("live.mask", (batch, 1, *size), seed=42)
    blobs = torch.nn.functional.avg_pool2d(noise, 5, stride=1, padding=2) > 0.05
    return latent, image, (blobs | (noise > 2)).float()


@pytest.mark.parametrize("case", CASES)
def test_asymmetric_vae_equals_diffusers(case: str, place: Place) -> None:
    config, cells = CASES[case]
    oracle = diffusers.AsymmetricAutoencoderKL(**BLOCKS, **config).eval()
    load_seeded(oracle, seed=41)
    net = ours_of(oracle.to(place.oracle)).to(place.device, place.dtype)
    latent, image, mask = (x.to(place.oracle) for x in drawn(config.get("latent_channels", 4), cells))
    assert 0 < mask.mean() < 1
    there = place.put(latent, image, mask)
    assert (
        relative_error(net.decode(*there), oracle.decode(latent, image=image, mask=mask).sample)
        <= place.tolerance
    )
    assert relative_error(net.decode(there[0]), oracle.decode(latent).sample) <= place.tolerance
    assert relative_error(net.encode(there[1]).mean, oracle.encode(image).latent_dist.mean) <= place.tolerance


@pytest.mark.full
def test_asymmetric_vae_equals_diffusers_at_the_size_of_x_1_5() -> None:
    config = {
        "down_block_out_channels": (128, 256, 512, 512), "layers_per_down_block": 2,
        "up_block_out_channels": (192, 384, 768, 768), "layers_per_up_block": 3,
    }  # fmt: skip
    oracle = diffusers.AsymmetricAutoencoderKL(**BLOCKS, **config).eval()
    load_seeded(oracle, seed=43)
    net = ours_of(oracle)
    assert net.config == AsymmetricVAEConfig()
    latent, image, mask = drawn(4, (8, 12), batch=1)
    assert relative_error(net.encode(image).mean, oracle.encode(image).latent_dist.mean) <= 1e-4
    assert relative_error(net.decode(latent), oracle.decode(latent).sample) <= 1e-4
    expected = oracle.decode(latent, image=image, mask=mask).sample
    assert relative_error(net.decode(latent, image, mask), expected) <= 1e-4
