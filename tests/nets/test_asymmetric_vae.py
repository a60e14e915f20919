"""AsymmetricAutoencoderKL: what the decoder sees of the source, through which mask, and what stays the VAE's.

Its numbers are compared with diffusers' class in tests/parity/test_live_asymmetric_vae.py.
"""

import gc
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nets.asymmetric_vae import (
    ASYMMETRIC_VAE_X_1_5,
    ASYMMETRIC_VAE_X_2,
    AsymmetricAutoencoderKL,
    AsymmetricVAEConfig,
    _blend,
)
from nets.vae import AutoencoderKL
from tests.helpers.seeded_weights import load_seeded, seeded_input, shapes_of

SMALL = AsymmetricVAEConfig(
    down_block_out_channels=(8, 8, 16, 16), layers_per_down_block=1,
    up_block_out_channels=(8, 16, 24, 24), layers_per_up_block=1, norm_num_groups=4,
)  # fmt: skip
FINE = replace(SMALL, condition_layers=2)


def small_net(config: AsymmetricVAEConfig = SMALL) -> AsymmetricAutoencoderKL:
    net = AsymmetricAutoencoderKL(config).eval()
    load_seeded(net, seed=5)
    return net


def inputs(height: int = 3, width: int = 4, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """A latent, a source picture, and a mask: a rectangle that cuts through cells."""
    latent = seeded_input("latent", (batch, 4, height, width), seed=1)
    image = seeded_input("image", (batch, 3, 8 * height, 8 * width), seed=1, scale=0.4)
    mask = torch.zeros(batch, 1, 8 * height, 8 * width)
    mask[..., 5:18, 3:21] = 1
    return latent, image, mask


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield
    gc.collect()


@pytest.mark.parametrize("config", [SMALL, FINE], ids=["all", "fine"])
@pytest.mark.parametrize("cells", [(1, 1), (3, 4), (5, 2)])
def test_shapes_are_those_of_the_latent_times_the_cell(
    config: AsymmetricVAEConfig, cells: tuple[int, int]
) -> None:
    net, (latent, image, mask) = small_net(config), inputs(*cells, batch=2)
    assert net.downscale == 8
    assert net.encode(image).mode().shape == latent.shape
    for decoded in (net.decode(latent), net.decode(latent, image, mask)):
        assert decoded.shape == image.shape and decoded.isfinite().all()


@pytest.mark.parametrize("config", [SMALL, FINE], ids=["all", "fine"])
def test_with_everything_masked_the_source_has_no_influence(config: AsymmetricVAEConfig) -> None:
    net, (latent, image, _) = small_net(config), inputs()
    decoded = net.decode(latent, image, torch.ones(1, 1, 24, 32))
    assert torch.equal(decoded, net.decode(latent, -image, torch.ones(1, 1, 24, 32)))
    torch.testing.assert_close(decoded, net.decode(latent), rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", [SMALL, FINE], ids=["all", "fine"])
def test_only_what_is_kept_of_the_source_is_seen(config: AsymmetricVAEConfig) -> None:
    net, (latent, image, mask) = small_net(config), inputs()
    decoded = net.decode(latent, image, mask)
    assert torch.equal(net.decode(latent, torch.lerp(image, -image, mask), mask), decoded)
    changed = net.decode(latent, torch.lerp(-image, image, mask), mask)
    outside = mask.expand_as(image) == 0
    assert (changed - decoded)[outside].abs().mean() > 0.05
    assert (changed - decoded)[~outside].abs().max() > 0  # at the seam, and by the norms' statistics


@pytest.mark.parametrize("config", [SMALL, FINE], ids=["all", "fine"])
def test_with_nothing_masked_the_latent_has_no_influence(config: AsymmetricVAEConfig) -> None:
    net, (latent, image, mask) = small_net(config), inputs()
    assert torch.equal(
        net.decode(latent, image, torch.zeros_like(mask)), net.decode(-latent, image, torch.zeros_like(mask))
    )


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_of_the_condition_s_layers_the_finest_are_used(count: int) -> None:
    """Those that are there are all used; the widths are those of the features they are blended with."""
    net, (latent, image, mask) = small_net(replace(SMALL, condition_layers=count)), inputs()
    layers = dict(net.decoder.condition_encoder.layers.named_parameters())
    biases = [bias for name, bias in layers.items() if name.endswith(".bias")]
    assert [len(bias) for bias in biases] == [8, 16, 24, 24, 24][:count]
    decoded = net.decode(latent, image, mask)
    for bias in biases:
        before = bias.clone()
        bias += 1
        assert (net.decode(latent, image, mask) - decoded).abs().max() > 1e-3
        bias.copy_(before)


def test_a_cell_on_the_edge_is_the_latent_s_where_its_first_pixel_is_masked() -> None:
    """As in the official code. The cell (1, 1) begins at the pixel (8, 8)."""
    x, kept = torch.ones(1, 24, 3, 4), torch.zeros(1, 24, 3, 4)
    for first, count in ((8, 1), (9, 0)):
        mask = torch.zeros(1, 1, 24, 32)
        mask[..., first:16, first:16] = 1
        blended = _blend(x, kept, mask)
        assert blended.sum() == 24 * count and blended[0, 0, 1, 1] == count
    assert torch.equal(_blend(mask, mask * 0, mask), mask)


def test_a_soft_mask_mixes() -> None:
    net, (latent, image, mask) = small_net(), inputs()
    decoded = [net.decode(latent, image, mask * share) for share in (0.0, 0.5, 1.0)]
    assert not torch.equal(decoded[0], decoded[1]) and not torch.equal(decoded[1], decoded[2])


def test_the_source_and_the_mask_come_together_and_have_the_latent_s_size() -> None:
    net, (latent, image, mask) = small_net(), inputs()
    with pytest.raises(ValueError, match="got `image` without `mask`"):
        net.decode(latent, image)
    with pytest.raises(ValueError, match="got `mask` without `image`"):
        net.decode(latent, mask=mask)
    with pytest.raises(ValueError, match=r"`image` is \(24, 24\) pixels, expected \(24, 32\)"):
        net.decode(latent, image[..., :24], mask)
    with pytest.raises(ValueError, match=r"`mask` is \(3, 4\) pixels, expected \(24, 32\)"):
        net.decode(latent, image, F.max_pool2d(mask, 8))
    with pytest.raises(ValueError, match=r"\(3, 40\).*at least 8"):
        net.encode(torch.zeros(1, 3, 3, 40))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"up_block_out_channels": (8, 16, 24)}, "4 widths of the encoder and 3 of the decoder"),
        ({"up_block_out_channels": (8, 16, 24, 30)}, "up_block_out_channels.*multiples of norm_num_groups"),
        ({"down_block_out_channels": (8, 8, 16, 6)}, "down_block_out_channels.*multiples"),
        ({"condition_layers": 6}, "condition_layers is 6: expected 1 to 5"),
        ({"condition_layers": 0}, "condition_layers is 0: expected 1 to 5"),
    ],
)
def test_config_refuses_what_cannot_be_built(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)


def test_built_on_meta_equals_built_on_cpu() -> None:
    net, (latent, image, mask) = small_net(), inputs()
    with torch.device("meta"):
        other = AsymmetricAutoencoderKL(SMALL)
    assert not list(other.buffers())
    other.load_state_dict(net.state_dict(), strict=True, assign=True)
    assert torch.equal(other.eval().decode(latent, image, mask), net.decode(latent, image, mask))


def test_without_a_source_it_is_the_plain_autoencoder_of_these_tensors() -> None:
    """With one width for both halves: its keys are the VAE's and the condition's encoder."""
    config = replace(SMALL, down_block_out_channels=(8, 16, 24, 24))
    net, (latent, image, _) = small_net(config), inputs()
    vae = AutoencoderKL(config.decoder)
    own = {key: tensor for key, tensor in net.state_dict().items() if ".condition_encoder." not in key}
    vae.load_state_dict(own, strict=True)
    assert torch.equal(net.decode(latent), vae.eval().decode(latent))
    assert torch.equal(net.encode(image).mode(), vae.encode(image).mode())


@pytest.mark.parametrize(
    "config, megabytes", [(ASYMMETRIC_VAE_X_1_5, 777.2), (ASYMMETRIC_VAE_X_2, 1624.5)], ids=["x-1-5", "x-2"]
)
def test_official_sizes_have_the_official_files_bytes(config: AsymmetricVAEConfig, megabytes: float) -> None:
    """The hub says 777 MB and 1.62 GB, which is float32."""
    with torch.device("meta"):
        shapes = shapes_of(AsymmetricAutoencoderKL(config))
    values = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert 4e-6 * values == pytest.approx(megabytes, abs=0.1)
    widest, width = config.up_block_out_channels[-1], config.up_block_out_channels[0]
    layers = [shapes[f"decoder.condition_encoder.layers.{i}.weight"] for i in range(5)]
    assert layers[0] == (width, 3, 3, 3) and layers[1] == (2 * width, width, 3, 3)
    assert layers[2] == (widest, 2 * width, 4, 4) and layers[3] == layers[4] == (widest, widest, 4, 4)
    assert "decoder.condition_encoder.layers.5.weight" not in shapes
