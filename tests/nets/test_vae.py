"""AutoencoderKL against stored reference outputs, and what holds for any autoencoder."""

import gc
from pathlib import Path

import pytest
import torch

from nets.vae import AutoencoderKL, DiagonalGaussian, IdentityAutoencoder, VAEConfig
from tests.helpers.goldens import load_golden, read_shapes, relative_error
from tests.helpers.seeded_nets import seeded_vae
from tests.helpers.seeded_weights import load_seeded, seeded_input, shapes_of

SMALL = VAEConfig(block_out_channels=(8, 16, 16), layers_per_block=1, norm_num_groups=4, mid_attention=False)


def small_vae(config: VAEConfig = SMALL) -> AutoencoderKL:
    vae = AutoencoderKL(config).eval()
    load_seeded(vae, seed=7)
    return vae


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield
    gc.collect()


def compare(case: str, tolerance: float) -> None:
    golden = load_golden("vae", case)
    vae = seeded_vae(golden.meta)
    latents = vae.encode(golden["in.image"])
    outputs = {"mean": latents.mean, "logvar": latents.logvar, "sample": latents.sample(golden["in.noise"])}
    outputs["decoded"] = vae.decode(golden["in.latent"])
    for name, output in outputs.items():
        assert relative_error(output, golden[f"out.{name}"]) <= tolerance, name


@pytest.mark.parametrize("case", ["tiny_a", "tiny_b"])
def test_vae_equals_reference_when_tiny(case: str) -> None:
    compare(case, 1e-5)


@pytest.mark.full
@pytest.mark.parametrize("case", ["full_64x64", "full_96x64", "full_odd_70x62"])
def test_vae_equals_reference_at_full_size(case: str) -> None:
    compare(case, 1e-4)


@pytest.mark.full
def test_vae_equals_reference_in_float64() -> None:
    golden, reference = load_golden("vae", "full_64x64"), load_golden("vae", "full_64x64_float64")
    vae = seeded_vae(golden.meta).double()
    mean = vae.encode(golden["in.image"].double()).mean
    assert relative_error(mean, reference["out.mean_float64"]) <= 1e-12
    assert relative_error(vae.decode(golden["in.latent"].double()), reference["out.decoded_float64"]) <= 1e-12


def test_vae_has_the_reference_epsilons() -> None:
    golden = load_golden("vae", "tiny_eps_sensitive")
    vae = seeded_vae(golden.meta)
    latents, decoded = vae.encode(golden["in.image"]), vae.decode(golden["in.latent"])
    for name, output in {"mean": latents.mean, "logvar": latents.logvar, "decoded": decoded}.items():
        torch.testing.assert_close(output, golden[f"out.{name}"], rtol=0, atol=2e-6)


def test_vae_keys_and_shapes_are_those_of_the_official_file() -> None:
    with torch.device("meta"):
        vae = AutoencoderKL(VAEConfig())
    assert shapes_of(vae) == read_shapes("sd15_vae_diffusers")
    assert vae.downscale == 8


def test_vae_built_on_meta_equals_vae_built_on_cpu() -> None:
    vae = small_vae()
    with torch.device("meta"):
        other = AutoencoderKL(SMALL)
    other.load_state_dict(vae.state_dict(), strict=True, assign=True)
    image = seeded_input("image", (1, 3, 20, 12), seed=1)
    assert not list(other.buffers())
    assert torch.equal(other.eval().decode(other.encode(image).mode()), vae.decode(vae.encode(image).mode()))


@pytest.mark.parametrize("size", [(4, 4), (5, 7), (19, 10)])
def test_vae_rounds_odd_sizes_down(size: tuple[int, int]) -> None:
    vae = small_vae()
    latent = vae.encode(torch.zeros(2, 3, *size)).mode()
    assert latent.shape == (2, 4, size[0] // 4, size[1] // 4)
    assert vae.decode(latent).shape == (2, 3, size[0] // 4 * 4, size[1] // 4 * 4)


def test_vae_refuses_a_picture_smaller_than_one_cell() -> None:
    with pytest.raises(ValueError, match=r"\(3, 40\).*at least 4"):
        small_vae().encode(torch.zeros(1, 3, 3, 40))


def test_vae_config_refuses_channels_that_groups_do_not_divide() -> None:
    with pytest.raises(ValueError, match="norm_num_groups"):
        VAEConfig(block_out_channels=(32, 48))


def test_vae_mid_attention_flag_removes_only_the_attention() -> None:
    with_attention = AutoencoderKL(VAEConfig(block_out_channels=(8, 16), norm_num_groups=4))
    without = AutoencoderKL(VAEConfig(block_out_channels=(8, 16), norm_num_groups=4, mid_attention=False))
    extra = set(with_attention.state_dict()) - set(without.state_dict())
    assert set(without.state_dict()) < set(with_attention.state_dict())
    assert len(extra) == 20 and all(".mid_block.attentions.0." in name for name in extra)


def test_vae_logvar_is_clamped() -> None:
    vae = small_vae()
    assert vae.quant_conv.bias is not None
    vae.quant_conv.bias.data[4:] = torch.tensor([1e4, -1e4, 1e4, -1e4])
    latents = vae.encode(torch.zeros(1, 3, 8, 8))
    assert latents.logvar.amin() == -30 and latents.logvar.amax() == 20
    assert torch.isfinite(latents.sample(torch.ones(1, 4, 2, 2))).all()


def test_gaussian_sample_has_the_stated_mean_and_variance() -> None:
    latents = DiagonalGaussian(torch.full((1, 1, 1, 20000), 2.0), torch.full((1, 1, 1, 20000), -1.0))
    sample = latents.sample(seeded_input("noise", (1, 1, 1, 20000), seed=3))
    assert sample.mean().item() == pytest.approx(2.0, abs=0.02)
    assert sample.var().item() == pytest.approx(0.3679, rel=0.05)  # exp(-1)


def test_gaussian_kl_equals_that_of_torch() -> None:
    mean, logvar = seeded_input("mean", (2, 3, 4, 5), seed=1), seeded_input("logvar", (2, 3, 4, 5), seed=1)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, (0.5 * logvar).exp()), normal(0.0, 1.0))
    torch.testing.assert_close(DiagonalGaussian(mean, logvar).kl(), expected)


def test_identity_autoencoder_returns_the_picture_bit_for_bit() -> None:
    vae, image = IdentityAutoencoder(), seeded_input("image", (2, 3, 5, 7), seed=2)
    latents = vae.encode(image)
    assert torch.equal(vae.decode(latents.sample(torch.randn(image.shape))), image)
    assert (vae.downscale, vae.config.latent_channels, vae.config.scaling_factor) == (1, 3, 1.0)
    assert not vae.state_dict()


def test_vae_file_runs_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(__file__).parents[2] / "nets" / "vae.py"
    (tmp_path / "vae_alone.py").write_text(source.read_text())
    monkeypatch.syspath_prepend(tmp_path)
    module = __import__("vae_alone")
    vae = module.AutoencoderKL(module.VAEConfig(block_out_channels=(4, 8), norm_num_groups=2))
    assert vae.decode(vae.encode(torch.zeros(1, 3, 6, 6)).mode()).shape == (1, 3, 6, 6)
