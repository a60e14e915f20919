"""AutoencoderKL beside diffusers' AutoencoderKL: its weights under its own keys, its config, fresh inputs."""

from typing import Any

import pytest
import torch

from nets.vae import AutoencoderKL, VAEConfig
from tests.helpers.goldens import relative_error
from tests.helpers.places import Place
from tests.helpers.seeded_nets import config_of
from tests.helpers.seeded_weights import load_seeded, seeded_input

diffusers = pytest.importorskip("diffusers")


def blocks(*widths: int) -> dict[str, Any]:
    """The oracle's constructor arguments for these widths, fine to coarse."""
    return {
        "block_out_channels": widths,
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
    }


# Name -> constructor arguments of the oracle, the picture's size and a latent's.
CASES: dict[str, tuple[dict[str, Any], tuple[int, int], tuple[int, int]]] = {
    "sd": ({**blocks(32, 64, 96, 96), "layers_per_block": 2}, (64, 48), (8, 6)),
    "odd": ({**blocks(32, 64, 96, 96), "layers_per_block": 2}, (61, 47), (7, 5)),
    "two_levels": ({**blocks(16, 32), "norm_num_groups": 8}, (15, 22), (9, 13)),
    "no_mid_attention": ({**blocks(32, 32, 64), "mid_block_add_attention": False}, (33, 30), (1, 3)),
    "sixteen_latent_channels": ({**blocks(32, 64), "latent_channels": 16}, (16, 16), (5, 5)),
}


def ours_of(oracle: Any) -> AutoencoderKL:
    """Our net with the oracle's config and weights; it shares their memory."""
    config = {**oracle.config, "mid_attention": oracle.config.mid_block_add_attention}
    with torch.device("meta"):
        vae = AutoencoderKL(config_of(VAEConfig, config))
    vae.load_state_dict(oracle.state_dict(), strict=True, assign=True)
    return vae.eval()


@pytest.mark.parametrize("case", CASES)
def test_vae_equals_diffusers(case: str, place: Place) -> None:
    config, size, latent_size = CASES[case]
    oracle = diffusers.AutoencoderKL(**config).eval()
    load_seeded(oracle, seed=31)
    vae = ours_of(oracle.to(place.oracle)).to(place.device, place.dtype)
    image = seeded_input("live.image", (2, 3, *size), seed=32, scale=0.4).to(place.oracle)
    latent = seeded_input("live.latent", (2, config.get("latent_channels", 4), *latent_size), seed=32)
    expected, decoded = oracle.encode(image).latent_dist, oracle.decode(latent.to(place.oracle)).sample
    out = vae.encode(image.to(place.device, place.dtype))
    assert relative_error(out.mean, expected.mean) <= place.tolerance
    assert relative_error(out.logvar, expected.logvar) <= place.tolerance
    assert relative_error(vae.decode(latent.to(place.device, place.dtype)), decoded) <= place.tolerance


@pytest.mark.full
def test_vae_equals_diffusers_at_full_size() -> None:
    config = {**blocks(128, 256, 512, 512), "layers_per_block": 2}
    oracle = diffusers.AutoencoderKL(**config).eval()
    vae, image = ours_of(oracle), seeded_input("live.image", (1, 3, 75, 66), seed=33, scale=0.4)
    expected = oracle.encode(image).latent_dist.mean
    mean = vae.encode(image).mean
    assert relative_error(mean, expected) <= 1e-4
    assert relative_error(vae.decode(mean), oracle.decode(mean).sample) <= 1e-4
