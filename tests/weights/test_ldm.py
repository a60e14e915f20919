"""weights/ldm.py: LDM's names are the official ones in both directions, for every size,
and the nets behind them compute the same.
"""

import gc
from collections.abc import Iterable
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nets.pasd_unet import PASDUNet, PASDUNetConfig
from nets.unet import UNet, UNetConfig
from nets.vae import AutoencoderKL, VAEConfig
from tests.helpers.goldens import load_golden, read_json, read_shapes, relative_error
from tests.helpers.seeded_nets import seeded_state, seeded_unet_ldm, seeded_vae_ldm
from weights.canonical import read_contents
from weights.ldm import IGNORED, PREFIXES, ema_name, find_parts, linear, map_of, map_to, to_ldm

OFFICIAL = ["unet", "vae"]
Shapes = dict[str, tuple[int, ...]]


def official_map(part: str) -> dict[str, str]:
    """{LDM key without prefix: canonical key} as the reference implementations have it."""
    stored = read_json(f"manifests/map_{part}_ldm_to_diffusers.json")
    return {
        theirs.removeprefix(PREFIXES[part][0]): ours for theirs, ours in stored.get("map", stored).items()
    }


def manifest(name: str) -> Shapes:
    return read_shapes(name)


def shapes_of(state: dict[str, Tensor]) -> Shapes:
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


def on_meta(shapes: Shapes) -> dict[str, Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def meta_state(net: type[nn.Module], config: Any) -> dict[str, Tensor]:
    with torch.device("meta"):
        return net(config).state_dict()


# ---- the official names ------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", OFFICIAL)
def test_the_map_is_the_official_one_in_both_directions(part: str) -> None:
    official = official_map(part)
    assert len(official) == {"unet": 686, "vae": 248}[part]
    there = map_of(part, official).there(official)
    assert there.renamed == official and not there.unknown
    back = map_to(part, official.values()).back(official.values())
    assert back.renamed == {ours: theirs for theirs, ours in official.items()} and not back.unknown


def test_the_official_single_file_has_every_tensor_of_three_nets_and_nothing_else() -> None:
    state = on_meta(manifest("sd_v1_ldm"))
    contents = read_contents(state)
    assert contents.parts == ("unet", "vae", "text_encoder") and not contents.unknown
    for part, name in (("unet", "sd15_unet_diffusers"), ("vae", "sd15_vae_diffusers")):
        assert shapes_of(contents.tensors(part)) == manifest(name)
    text = {key: s for key, s in manifest("clip_text_vitl14_hf").items() if not key.endswith("position_ids")}
    assert shapes_of(contents.tensors("text_encoder")) == text
    schedule = [key for key in state if "." not in key]
    assert len(schedule) == 12 and list(contents.ignored) == schedule


def test_the_official_single_file_is_written_back_under_its_names() -> None:
    official = manifest("sd_v1_ldm")
    contents = read_contents(on_meta(official))
    written = to_ldm({part: contents.tensors(part) for part in contents.parts})
    assert shapes_of(written) == {key: official[key] for key in official if key not in contents.ignored}


# ---- what is behind the names ------------------------------------------------------------------------------


def compare_unet(case: str, tolerance: float) -> None:
    golden = load_golden("unet_ldm", case)
    out = seeded_unet_ldm(golden.meta)(golden["in.x"], golden["in.t"], golden["in.context"])
    assert relative_error(out, golden["out.eps"]) <= tolerance


def compare_vae(case: str, tolerance: float) -> None:
    golden = load_golden("vae_ldm", case)
    vae = seeded_vae_ldm(golden.meta)
    encoded = vae.encode(golden["in.image"])
    assert relative_error(encoded.mean, golden["out.mean"]) <= tolerance
    assert relative_error(encoded.logvar, golden["out.logvar"]) <= tolerance
    assert relative_error(vae.decode(golden["in.latent"]), golden["out.decoded"]) <= tolerance


def test_a_tiny_unet_from_ldm_equals_ldms() -> None:
    compare_unet("ldm_tiny_a", 1e-5)


def test_a_tiny_autoencoder_from_ldm_equals_ldms() -> None:
    compare_vae("ldm_tiny", 1e-5)


@pytest.mark.full
def test_the_unet_from_ldm_equals_ldms_at_full_size() -> None:
    compare_unet("ldm_full_16x16_t981", 1e-4)
    gc.collect()


@pytest.mark.full
def test_the_autoencoder_from_ldm_equals_ldms_at_full_size() -> None:
    compare_vae("ldm_full_64x64", 1e-4)


@pytest.mark.parametrize(
    ("family", "case", "part"), [("unet_ldm", "ldm_tiny_a", "unet"), ("vae_ldm", "ldm_tiny", "vae")]
)
def test_there_and_back_is_bit_equal(family: str, case: str, part: str) -> None:
    state = seeded_state(load_golden(family, case).meta["weights"])
    written = to_ldm({part: read_contents(state).tensors(part)})
    assert shapes_of(written) == shapes_of(state)
    assert all(torch.equal(written[key], tensor) for key, tensor in state.items())


# ---- other sizes -------------------------------------------------------------------------------------------


def unet_config(levels: int, layers: int, attention: int) -> UNetConfig:
    """`attention`: a bit per level, finest first, that says whether it has transformers."""
    has = [bool(attention >> level & 1) for level in range(levels)]
    return UNetConfig(
        block_out_channels=(8,) * levels,
        layers_per_block=layers,
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
        down_block_types=tuple("CrossAttnDownBlock2D" if each else "DownBlock2D" for each in has),
        up_block_types=tuple("CrossAttnUpBlock2D" if each else "UpBlock2D" for each in reversed(has)),
    )


def check_any_size(part: str, state: dict[str, Tensor]) -> None:
    """Every key gets an LDM name, and that leads back to the key: with and without the prefix,
    and other nets' keys beside.
    """
    written = to_ldm({part: state})
    assert len(written) == len(state)
    assert all(key.startswith(PREFIXES[part][0]) for key in written)
    for prefix in PREFIXES[part]:
        bare = {prefix + key.removeprefix(PREFIXES[part][0]): tensor for key, tensor in written.items()}
        assert find_parts(bare) == {part: prefix}
        assert shapes_of(read_contents(bare).tensors(part)) == shapes_of(state)


@settings(max_examples=30)
@given(levels=st.integers(1, 5), layers=st.integers(1, 3), attention=st.integers(0, 31))
def test_unets_of_every_size_go_there_and_back(levels: int, layers: int, attention: int) -> None:
    check_any_size("unet", meta_state(UNet, unet_config(levels, layers, attention)))


@pytest.mark.parametrize(("levels", "layers", "attention"), [*product([1, 2, 3, 5], [1, 2], [False, True])])
def test_autoencoders_of_every_size_go_there_and_back(levels: int, layers: int, attention: bool) -> None:
    widths = (4, 8, 8, 12, 8)[:levels]
    config = VAEConfig(
        block_out_channels=widths, layers_per_block=layers, norm_num_groups=4, mid_attention=attention
    )
    check_any_size("vae", meta_state(AutoencoderKL, config))


@settings(max_examples=20)
@given(levels=st.integers(1, 4), layers=st.integers(1, 3), data=st.data())
def test_no_path_of_the_maps_leads_into_another(levels: int, layers: int, data: st.DataObject) -> None:
    """So a map turned round undoes the map, whatever follows the paths."""
    attention = data.draw(st.lists(st.booleans(), min_size=levels, max_size=levels))
    unet = unet_config(levels, layers, sum(has << i for i, has in enumerate(reversed(attention))))
    maps = map_to("unet", meta_state(UNet, unet)), map_to("vae", official_map("vae").values())
    for known in maps:
        for side in zip(*known.pairs, strict=True):
            paths = sorted(f"{path}." for path in side)
            assert not any(after.startswith(path) for path, after in zip(paths, paths[1:], strict=False))


def test_made_up_sizes_do_not_fill_the_memory() -> None:
    claims = [f"encoder.down.{i}.x" for i in range(2000)] + [
        f"encoder.down.0.block.{i}.x" for i in range(2000)
    ]
    assert len(map_of("vae", claims).pairs) < 20 * len(claims)
    canonical = [key.replace("down.", "down_blocks.").replace("block.", "resnets.") for key in claims]
    assert len(map_to("vae", canonical).pairs) < 20 * len(claims)
    canonical = [key.removeprefix("encoder.") for key in canonical]
    assert len(map_to("unet", canonical).pairs) < 40 * len(claims)
    claims = [f"input_blocks.{i}.0.op.weight" for i in range(4000)]
    assert len(map_of("unet", claims).pairs) < 40 * len(claims)


# ---- the rest of the file ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key",
    ["betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_one_minus_alphas_cumprod", "sqrt_recipm1_alphas_cumprod",
     "log_one_minus_alphas_cumprod", "posterior_mean_coef1", "posterior_log_variance_clipped", "lvlb_weights", "logvar",
     "scale_factor", "model_ema.decay", "model_ema.num_updates", "model_ema.diffusion_modelout2bias", "loss.logvar",
     "first_stage_model.loss.discriminator.main.0.weight", "text_model.embeddings.position_ids", "position_ids"],
)  # fmt: skip
def test_what_is_no_weight_of_a_net_is_ignored(key: str) -> None:
    assert IGNORED.fullmatch(key)


@pytest.mark.parametrize(
    "key",
    ["model.diffusion_model.out.2.bias", "betas.weight", "alphas", "model.betas", "model_ema_decay", "logvar.weight", "loss",
     "first_stage_model.quant_conv.bias", "decoder.loss_conv.bias", "embeddings.position_embedding.weight", "posterior.weight"],
)  # fmt: skip
def test_nothing_else_is(key: str) -> None:
    assert not IGNORED.fullmatch(key)


def test_no_tensor_of_the_official_nets_is_ignored() -> None:
    for name in ("sd15_unet_diffusers", "sd15_vae_diffusers", "pasd_unet", "pasd_rrdb_controlnet"):
        assert not [key for key in manifest(name) if IGNORED.fullmatch(key)]


def test_averages_lie_under_names_without_dots() -> None:
    key = "model.diffusion_model.input_blocks.1.0.in_layers.0.weight"
    assert ema_name(key) == "model_ema.diffusion_modelinput_blocks10in_layers0weight"
    names = [ema_name(PREFIXES["unet"][0] + key) for key in official_map("unet")]
    assert len(set(names)) == len(names) and all(IGNORED.fullmatch(name) for name in names)


def test_only_the_autoencoders_attention_becomes_linear_and_is_a_view() -> None:
    square = torch.randn(8, 8, 1, 1)
    found = linear("encoder.mid_block.attentions.0.to_q.weight", square)
    assert found.shape == (8, 8) and found.data_ptr() == square.data_ptr()
    for key, tensor in (
        ("encoder.mid_block.attentions.0.to_q.bias", torch.zeros(8)),
        ("encoder.mid_block.attentions.0.to_q.weight", torch.zeros(8, 8)),
        ("encoder.mid_block.attentions.0.to_q.weight", torch.zeros(8, 8, 3, 3)),
        ("quant_conv.weight", square),
    ):
        assert linear(key, tensor) is tensor


def without(state: dict[str, Tensor], keys: Iterable[str]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in state.items() if key not in set(keys)}


def test_what_the_layout_has_no_name_for_is_refused() -> None:
    unet = meta_state(UNet, unet_config(2, 1, 1))
    with pytest.raises(
        ValueError, match="rrdb: LDM's layout has no place for it; expected unet, vae, text_enc"
    ):
        to_ldm({"rrdb": {}})
    with pytest.raises(ValueError, match="unet: LDM's layout has no name for 'add_embedding.linear_1.bias'"):
        to_ldm({"unet": unet | {"add_embedding.linear_1.bias": torch.zeros(1)}})
    pasd = PASDUNetConfig(**vars(unet_config(2, 1, 1)))
    with pytest.raises(ValueError, match="no name for 'up_blocks.0.pixel_attentions.0"):
        to_ldm({"unet": meta_state(PASDUNet, pasd)})
    missing = without(unet, ["mid_block.resnets.1.conv2.bias"])
    assert len(to_ldm({"unet": missing})) == len(missing)  # what is not there is for strict loading to miss
