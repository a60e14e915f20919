"""weights/merge.py: blends are exact at both ends, PASD's tensors move to another base and into a file of
their own and back.
"""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers.goldens import read_shapes
from tests.helpers.seeded_weights import seeded_tensor
from weights.canonical import read_contents
from weights.files import WeightsError, read_state_dict, write_safetensors
from weights.merge import (
    added_tensors,
    base_tensors,
    blend,
    completed,
    difference,
    fingerprint,
    is_decoder_delta,
    is_delta,
    pack_delta,
)

State = dict[str, Tensor]
FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
BASE_SHAPES = {
    "conv_in.weight": (4, 3, 3, 3),
    "conv_in.bias": (4,),
    "up_blocks.0.attentions.0.proj_in.weight": (4, 4),
}
FULL_SHAPES = {
    "up_blocks.0.pixel_attentions.0.proj_in.weight": (4, 4, 1, 1),
    "up_blocks.3.pixel_attentions.2.norm.bias": (4,),
}
LIGHT_SHAPES = {
    "up_blocks.1.attentions.0.proj_in_plus.weight": (3, 3, 1, 1),
    "up_blocks.1.attentions.0.transformer_blocks.0.norm2_plus.weight": (4,),
    "up_blocks.1.attentions.0.transformer_blocks.0.attn2_plus.to_q.weight": (4, 4),
}
CONTROLNET_SHAPES = {
    "controlnet_cond_embedding.conv_in.weight": (2, 3, 3, 3),
    "down_blocks.0.resnets.0.norm1.weight": (4,),
}


def make(shapes: Mapping[str, tuple[int, ...]], seed: int = 1, dtype: torch.dtype = torch.float32) -> State:
    return {key: seeded_tensor(key, shape, seed).to(dtype) for key, shape in shapes.items()}


def same(first: State, second: State) -> bool:
    """Bit for bit, keys in the same order."""
    return list(first) == list(second) and all(
        value.dtype == second[key].dtype and torch.equal(value, second[key]) for key, value in first.items()
    )


def copy(state: State) -> State:
    return {key: value.clone() for key, value in state.items()}


def check_line(error: WeightsError) -> None:
    assert "\n" not in str(error) and len(str(error)) < 300, str(error)


# --- blend --------------------------------------------------------------------------------------------------


@given(weight=st.floats(0, 1), dtype=st.sampled_from(FLOATS), other_dtype=st.sampled_from(FLOATS))
def test_blend_is_the_weighted_mean(weight: float, dtype: torch.dtype, other_dtype: torch.dtype) -> None:
    base, other = make(BASE_SHAPES, 1, dtype), make(BASE_SHAPES, 2, other_dtype)
    before = copy(base), copy(other)
    blended = blend(base, other, weight)
    for key, value in blended.items():
        wanted = (1 - weight) * base[key].double() + weight * other[key].double()
        assert value.dtype == dtype
        torch.testing.assert_close(value.double(), wanted, rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert same(base, before[0]) and same(other, before[1])


@pytest.mark.parametrize("dtype", FLOATS)
def test_blend_is_exact_at_both_ends_and_between_equals(dtype: torch.dtype) -> None:
    base, other = make(BASE_SHAPES, 1, dtype), make(BASE_SHAPES, 2, dtype)
    assert same(blend(base, other, 0), base) and same(blend(base, other, 1), other)
    assert all(value is base[key] for key, value in blend(base, other, 0).items())  # and costs nothing
    assert all(value is other[key] for key, value in blend(base, other, 1).items())
    assert same(blend(base, copy(base), 0.3), base)
    assert same(
        blend(base, make(BASE_SHAPES, 2, torch.float64), 1), make(BASE_SHAPES, 2, torch.float64) | other
    )


def test_blend_is_rounded_once() -> None:
    """Between 1 and the next float16, 0.6 of the way gives the next;
    the two products in float16 would not add up to it.
    """
    step = 2**-10
    base, other = (
        {"w": torch.ones(1, dtype=torch.float16)},
        {"w": torch.full((1,), 1 + step, dtype=torch.float16)},
    )
    assert blend(base, other, 0.4)["w"].item() == 1 and blend(base, other, 0.6)["w"].item() == 1 + step


@pytest.mark.parametrize(
    "other, message",
    [
        ({}, "lacks 3 keys and has 0 that do not belong, first 'conv_in.bias'"),
        (make(BASE_SHAPES) | {"more": torch.ones(1)}, "lacks 0 keys and has 1 that do not belong, first 'more'"),
        (make(BASE_SHAPES) | {"x" * 999 + "\n": torch.ones(1)}, "first 'xxx"),
        (make(BASE_SHAPES | {"conv_in.weight": (4, 9, 3, 3)}), r"'conv_in.weight' of shape \(4, 9, 3, 3\), expected \(4, 3, 3, 3\)"),
    ],
)  # fmt: skip
def test_blend_wants_the_same_net(other: State, message: str) -> None:
    with pytest.raises(WeightsError, match=message) as caught:
        blend(make(BASE_SHAPES), other, 0.5)
    check_line(caught.value)


@pytest.mark.parametrize("weight", [-0.1, 1.1, float("nan")])
def test_blending_weights_outside_0_to_1_are_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="expected 0 .* to 1"):
        blend(make(BASE_SHAPES), make(BASE_SHAPES), weight)


# --- PASD's tensors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, count", [("pasd_unet", 312), ("pasd_light_unet", 81)])
def test_added_tensors_of_the_official_models(name: str, count: int) -> None:
    state = {key: torch.empty(shape, device="meta") for key, shape in read_shapes(name).items()}
    added, base = added_tensors(state), base_tensors(state)
    assert len(added) == count and added.keys().isdisjoint(base) and added | base == state
    shapes = {key: tuple(value.shape) for key, value in base.items()}
    assert shapes == read_shapes("sd15_unet_diffusers")


# --- delta files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_delta_file_gives_pasd_back(tmp_path: Any, dtype: torch.dtype) -> None:
    unet, controlnet = make(LIGHT_SHAPES | BASE_SHAPES), make(CONTROLNET_SHAPES)
    packed = pack_delta(unet, controlnet, dtype)
    assert is_delta(packed) and len(packed) == len(LIGHT_SHAPES) + len(CONTROLNET_SHAPES)
    write_safetensors(tmp_path / "delta.safetensors", packed)
    contents = read_contents(read_state_dict(tmp_path / "delta.safetensors"))
    added, other = contents.tensors("pasd_added"), contents.tensors("controlnet")
    assert same(dict(sorted(added.items())), dict(sorted(make(LIGHT_SHAPES, dtype=dtype).items())))
    assert same(dict(sorted(other.items())), dict(sorted(make(CONTROLNET_SHAPES, dtype=dtype).items())))
    assert same(unet, make(LIGHT_SHAPES | BASE_SHAPES)) and same(controlnet, make(CONTROLNET_SHAPES))


def test_a_delta_is_in_float16_unless_told_otherwise() -> None:
    packed = pack_delta(make(FULL_SHAPES | BASE_SHAPES), make(CONTROLNET_SHAPES))
    assert {value.dtype for value in packed.values()} == {torch.float16}
    large = make(CONTROLNET_SHAPES) | {"controlnet_mid_block.bias": torch.full((3,), 1e5)}
    with pytest.raises(
        WeightsError, match="'controlnet.controlnet_mid_block.bias' .*not finite in torch.float16"
    ) as caught:
        pack_delta(make(FULL_SHAPES | BASE_SHAPES), large)
    check_line(caught.value)


def test_pack_wants_both_halves() -> None:
    with pytest.raises(WeightsError, match="'unet.'"):
        pack_delta(make(BASE_SHAPES), make(CONTROLNET_SHAPES))
    with pytest.raises(WeightsError, match="'controlnet.'"):
        pack_delta(make(FULL_SHAPES), {})


NOT_DELTAS: dict[str, Callable[[State], State]] = {
    "empty": lambda delta: {},
    "U-Net alone": lambda delta: {key: value for key, value in delta.items() if key.startswith("unet.")},
    "ControlNet alone": lambda delta: {
        key: value for key, value in delta.items() if key.startswith("controlnet.")
    },
    "a base tensor too": lambda delta: delta | {"unet.conv_in.weight": torch.ones(1)},
    "something else": lambda delta: delta | {"x" * 999 + "\n": torch.ones(1)},
    "no prefixes": lambda delta: make(FULL_SHAPES | BASE_SHAPES),
    "a LoRA": lambda delta: {"unet.conv_in.lora_A.weight": torch.ones(2, 2)},
}


@pytest.mark.parametrize("case", NOT_DELTAS)
def test_what_is_no_delta_is_told(case: str) -> None:
    state = NOT_DELTAS[case](pack_delta(make(FULL_SHAPES | BASE_SHAPES), make(CONTROLNET_SHAPES)))
    assert not is_delta(state)


# ---- what a net has over another ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_difference_laid_over_its_base_is_the_whole(dtype: torch.dtype) -> None:
    base = make(BASE_SHAPES, dtype=dtype)
    whole = base | {"conv_in.bias": base["conv_in.bias"] + 1} | make({"new.weight": (2, 2)}, dtype=dtype)
    part = difference(whole, base)
    assert list(part) == ["conv_in.bias", "new.weight"]
    assert all(tensor.dtype == torch.float16 for tensor in part.values())
    found = completed(part, base)
    assert found.keys() == whole.keys() and all(tensor.dtype == dtype for tensor in found.values())
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, whole[key], rtol=1e-3, atol=0)
    assert found["conv_in.weight"] is base["conv_in.weight"]


def test_a_difference_to_the_widened_base_is_the_same() -> None:
    base = make(BASE_SHAPES, dtype=torch.float16)
    wide = {key: tensor.float() for key, tensor in base.items()}
    assert difference(wide, base) == difference(base, wide) == {}
    assert fingerprint(base) == fingerprint(wide) == fingerprint(dict(reversed(base.items())))


def test_the_fingerprint_tells_names_and_values_apart() -> None:
    base = make(BASE_SHAPES)
    changed = base | {"conv_in.bias": base["conv_in.bias"] + 0.01}
    renamed = {key.replace("bias", "bios"): tensor for key, tensor in base.items()}
    assert len({fingerprint(state) for state in (base, changed, renamed, {})}) == 4


def test_a_difference_of_another_shape_or_too_large_is_refused() -> None:
    base = make(BASE_SHAPES)
    with pytest.raises(WeightsError, match=r"'conv_in.bias' has shape \(5,\), expected \(4,\)"):
        completed({"conv_in.bias": torch.zeros(5)}, base)
    with pytest.raises(WeightsError, match="'conv_in.bias' has numbers that are not finite"):
        difference(base | {"conv_in.bias": torch.full((4,), 1e6)}, base)


def test_a_decoder_without_its_autoencoder_is_told_by_its_keys() -> None:
    condition = "decoder.condition_encoder.layers.0.weight"
    assert is_decoder_delta([condition, "decoder.conv_out.bias"])
    assert not is_decoder_delta([condition, "encoder.conv_in.weight"])  # the whole
    assert not is_decoder_delta(["decoder.conv_out.bias"]) and not is_decoder_delta([])
    contents = read_contents({condition: torch.zeros(2, 3, 3, 3)}, "x")
    assert contents.parts == ("asymmetric_added",) and "without its autoencoder" in contents.layout
