"""weights/extras.py: what stands around the weights of a file is told from them, and never costs the file."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nets.unet import UNet
from tests.helpers.tiny_bundle import UNET
from weights.canonical import read_contents
from weights.extras import MARKS, find_marks, find_scales, is_valueless, scaled, told, unwrapped
from weights.files import WeightsError, read_state_dict, write_safetensors
from weights.hub import Source
from weights.ldm import to_ldm
from weights.settings import Training, read_training

State = dict[str, Tensor]
U, T = "model.diffusion_model.", "cond_stage_model.transformer."
EMPTY, ONE, MANY = torch.empty(0), torch.ones(1), torch.zeros(1_000_000)

torch.manual_seed(0)
UNET_STATE: State = UNet(UNET).state_dict()
LDM = to_ldm({"unet": UNET_STATE})


def refusal(state: State) -> str:
    with pytest.raises(WeightsError) as refused:
        read_contents(state, "x.ckpt").tensors("unet")
    line = str(refused.value)
    assert line.startswith("x.ckpt: ") and "\n" not in line and len(line) < 300
    return line


def same(found: State, expected: State) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


# ---- wrappers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prefix", ["module.", "state_dict.", "_orig_mod.", "module._orig_mod.", "state_dict.module.", "model.", "net.", "model.module."]
)  # fmt: skip
@pytest.mark.parametrize("inner", [LDM, UNET_STATE], ids=["ldm", "diffusers"])
def test_a_prefix_before_every_key_is_taken_off(prefix: str, inner: State) -> None:
    wrapped = {prefix + key: tensor for key, tensor in inner.items()}
    for more in ({}, {"v_pred": EMPTY}, {"global_step": torch.tensor(7)}, {f"{prefix}v_pred": EMPTY}):
        contents = read_contents(wrapped | more, "x.ckpt")
        assert same(contents.tensors("unet"), UNET_STATE)
        assert bool(contents.marks) is any("v_pred" in key for key in more)


def test_what_is_no_wrapper_stays() -> None:
    for state in (LDM, {"model.0.weight": ONE, "model.1.sub.0.RDB1.conv1.0.weight": ONE}, {"a.b": ONE}, {}):
        assert unwrapped(state) is state
    mixed = {"module.a": ONE, "other.b": ONE}
    assert unwrapped(mixed) is mixed


# ---- marks -------------------------------------------------------------------------------------------------

V = {"v_pred": EMPTY}
ZTSNR = {"v_pred": EMPTY, "ztsnr": EMPTY}


@pytest.mark.parametrize(
    "value",
    [EMPTY, ONE, torch.zeros(1), torch.tensor(1.0), torch.tensor(True), torch.tensor([], dtype=torch.int64)],
)
def test_a_mark_says_it_by_being_there(value: Tensor) -> None:
    for prefix in ("", U, "diffusion_model."):
        contents = read_contents(LDM | {f"{prefix}v_pred": value, "ztsnr": value}, "x.ckpt")
        assert contents.marks == ("v_pred", "ztsnr") and not contents.unknown and not contents.notes
        assert same(contents.tensors("unet"), UNET_STATE)
        assert told(contents.marks) == {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}


@pytest.mark.parametrize("mark", [*MARKS, "scaled_fp8", f"{U}v_pred"])
def test_a_mark_with_values_is_refused(mark: str) -> None:
    assert "1,000,000 values; expected a mark" in refusal(LDM | {mark: MANY})


@pytest.mark.parametrize("mark", ["edm_mean", "edm_vpred.sigma_max", f"{U}edm_std"])
def test_the_marks_of_edm_are_refused_truly(mark: str) -> None:
    line = refusal(LDM | {mark: ONE})
    assert "noise levels of EDM" in line and "Stable Diffusion 1.x" in line


def test_unknown_keys_without_values_are_noted_and_refuse_nothing() -> None:
    strange = {
        "hello": EMPTY,
        "global_step": torch.tensor(100),
        f"{U}some.flag": EMPTY,
        "logvar": torch.zeros(1000),
    }
    contents = read_contents(LDM | strange, "x.ckpt")
    assert same(contents.tensors("unet"), UNET_STATE) and set(strange) <= set(contents.ignored)
    (note,) = contents.notes
    assert note.startswith("x.ckpt: 3 tensors without values") and "'hello'" in note and "logvar" not in note
    assert {*contents.names, *contents.ignored, *contents.unknown} == contents.state.keys()


@pytest.mark.parametrize(
    ("key", "tensor", "expected"),
    [("a", EMPTY, True), ("a", torch.tensor(1), True), ("a", ONE, False), ("a.b", EMPTY, True), ("a.b", torch.tensor(1.0), False),
     ("a.weight", EMPTY, False), ("a.bias", EMPTY, False), ("logit_scale", torch.tensor(1.0), False), ("a", MANY, False)],
)  # fmt: skip
def test_what_has_no_values(key: str, tensor: Tensor, expected: bool) -> None:
    assert is_valueless(key, tensor) is expected


def test_an_empty_weight_is_still_a_fault() -> None:
    assert "1 tensors belong to no net" in refusal({**LDM, "extra.weight": EMPTY})
    contents = read_contents({**UNET_STATE, "conv_in.weight": torch.empty(0, 4, 3, 3)})
    assert "conv_in.weight" in contents.tensors("unet") and not contents.notes


# ---- who is believed of the training -----------------------------------------------------------------------


def training(folder: Path, marks: tuple[str, ...], said: dict[str, Any] | None = None, *, yaml: bool = False, spec: str = "",
             scheduler: dict[str, Any] | None = None, prediction_type: str | None = None) -> Training:  # fmt: skip
    path = folder / "model.safetensors"
    metadata = {"config": json.dumps(said)} if said else {}
    write_safetensors(path, {"a": ONE}, metadata | ({"modelspec.prediction_type": spec} if spec else {}))
    if yaml:
        path.with_suffix(".yaml").write_text("model:\n  params:\n    parameterization: v\n")
    return read_training(Source(path), scheduler or {}, marks, prediction_type)


def test_marks_say_how_a_model_was_trained(tmp_path: Path) -> None:
    assert training(tmp_path, ()) == Training()
    assert training(tmp_path, ("v_pred",)) == Training("v_prediction")
    assert training(tmp_path, ("v_pred", "ztsnr")) == Training("v_prediction", rescale_betas_zero_snr=True)
    assert training(tmp_path, ("ztsnr",)) == Training(rescale_betas_zero_snr=True)
    assert training(tmp_path, ("scaled_fp8",)) == Training()
    same = training(tmp_path, ("v_pred",), {"prediction_type": "v_prediction"}, spec="v")
    assert same == Training("v_prediction") == training(tmp_path, ("v_pred",), yaml=True)
    # What schedulers have by default contradicts nothing.
    dumped = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": False}
    assert training(tmp_path, ("v_pred", "ztsnr"), scheduler=dumped).rescale_betas_zero_snr


@pytest.mark.parametrize(
    "beside",
    [{"said": {"prediction_type": "epsilon"}}, {"said": {"unet": {"prediction_type": "epsilon"}}}, {"spec": "epsilon"},
     {"scheduler": {"prediction_type": "epsilon"}}],
)  # fmt: skip
def test_contradictions_are_refused_unless_the_user_says_which(
    tmp_path: Path, beside: dict[str, Any]
) -> None:
    with pytest.raises(
        WeightsError,
        match="marked for prediction_type = v_prediction, but .* says 'epsilon'; .*--prediction-type",
    ):
        training(tmp_path, ("v_pred",), **beside)
    for kind in ("epsilon", "v_prediction"):
        assert training(tmp_path, ("v_pred",), **beside, prediction_type=kind).prediction_type == kind


def test_betas_that_a_mark_and_the_metadata_tell_otherwise_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        WeightsError, match="marked for rescale_betas_zero_snr = True, but its metadata says False"
    ):
        training(tmp_path, ("ztsnr",), {"rescale_betas_zero_snr": False})


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_user_overrules_every_file(tmp_path: Path, kind: str) -> None:
    other = "v_prediction" if kind == "epsilon" else "epsilon"
    found = training(
        tmp_path,
        (),
        {"prediction_type": other},
        yaml=True,
        scheduler={"prediction_type": other},
        prediction_type=kind,
    )
    assert found.prediction_type == kind


# ---- scaled 8 bits -----------------------------------------------------------------------------------------


def in_scaled_8_bits(state: State, *, dtype: torch.dtype = torch.float8_e4m3fn, names: tuple[str, str] = ("scale_weight", "scale_input"),
                     rows: bool = False) -> tuple[State, State]:  # fmt: skip
    """`state` with its linear and convolution weights in 8 bits and scales beside them, and what is meant."""
    stored, meant = {}, {}
    for key, tensor in state.items():
        if not key.endswith(".weight") or tensor.ndim < 2:
            stored[key] = meant[key] = tensor.half()
            continue
        peak = tensor.abs().amax(dim=tuple(range(1, tensor.ndim))) if rows else tensor.abs().max()
        scale = peak.clamp_min(1e-6) / 400
        shape = (-1, *[1] * (tensor.ndim - 1)) if rows else ()
        stored[key] = (tensor / scale.reshape(shape)).to(dtype)
        meant[key] = stored[key].float() * scale.reshape(shape)
        module = key.removesuffix("weight")
        stored[module + names[0]] = scale[:, None] if rows else scale
        stored[module + names[1]] = torch.tensor(0.5)
    return stored, meant


@pytest.mark.parametrize(
    "names",
    [("scale_weight", "scale_input"), ("weight_scale", "input_scale"), ("weight_scale", "comfy_quant")],
)
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_weight_in_scaled_8_bits_is_their_product(
    tmp_path: Path, dtype: torch.dtype, rows: bool, names: tuple[str, str]
) -> None:
    stored, meant = in_scaled_8_bits(LDM, dtype=dtype, names=names, rows=rows)
    path = tmp_path / "x.safetensors"
    write_safetensors(path, stored | {f"{U}scaled_fp8": torch.empty(0, dtype=dtype)})
    contents = read_contents(read_state_dict(path), "x.ckpt")
    expected = read_contents(meant).tensors("unet")
    assert same(contents.tensors("unet"), expected)
    assert contents.layout.endswith("in scaled 8 bits") and contents.marks == ("scaled_fp8",)
    assert {*contents.names, *contents.ignored, *contents.unknown} == contents.state.keys()


def test_a_scale_of_another_shape_is_refused() -> None:
    stored, _ = in_scaled_8_bits(LDM)
    key = next(key for key in stored if key.endswith("scale_weight"))
    for scale in (torch.ones(5), torch.ones(2, 2), torch.ones((), dtype=torch.int64), torch.ones(0)):
        assert "has a scale of shape" in refusal({**stored, key: scale})
    with pytest.raises(WeightsError):
        scaled("x", torch.tensor(1.0), torch.ones(3))


def test_scales_belong_to_weights_alone() -> None:
    assert find_scales({"a.scale_weight": ONE}) == ({}, [])
    assert find_scales({"a.scale_weight": ONE, "a.weight": torch.ones(2, dtype=torch.int8)}) == ({}, [])
    assert find_marks({"a.weight": ONE}) == {}
