"""Files of every kind that people share, through loading, an edit or a restoration, `keys` and `convert`:
each computes what the same model does in its plain form.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from msbd.edit.config import EditConfig
from msbd.load import load_edit_pipeline, load_restore_pipeline, locate_restorer, model_facts, model_notes
from msbd.loading.parts import load_net
from msbd.restore.config import RestoreConfig
from nets.controlnet import ControlNet, ControlNetConfig
from samplers.schedule import make_alphas_cumprod, make_betas, rescale_zero_terminal_snr
from tests.helpers.seeded_weights import load_seeded
from tests.helpers.tiny_bundle import (
    TRAINING,
    UNET,
    base_parts,
    write_net_folder,
    write_tiny_bundle,
)
from tests.weights.test_extras import in_scaled_8_bits
from tools.edit import main as edit_command
from tools.models.__main__ import main as models_command
from tools.restore.__main__ import main as restore_command
from weights.files import WeightsError, read_metadata, read_state_dict, write_safetensors
from weights.ldm import to_ldm
from weights.locate import locate

State = dict[str, Tensor]
SAID = {"attention_head_dim": 2, "norm_num_groups": 4, "scaling_factor": 0.5, "num_attention_heads": 2}
UNTOLD = {name: value for name, value in TRAINING.items() if name != "prediction_type"}
EMPTY = torch.empty(0)
MARKS = {
    "vpred_key": ({"v_pred": EMPTY}, {"prediction_type": "v_prediction"}),
    "vpred_ztsnr": ({"v_pred": torch.ones(1), "ztsnr": EMPTY}, {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}),
}  # fmt: skip
CONTROLNET = ControlNetConfig(**vars(UNET), conditioning_embedding_out_channels=(4, 4, 8, 8), to_rgb=False)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def single(bundle: Path) -> State:
    return to_ldm(base_parts(bundle))


def write_single(bundle: Path, path: Path, state: State, **said: Any) -> Path:
    """A single file that says nothing of what its U-Net predicts but by `state` and `said`."""
    path.parent.mkdir(exist_ok=True, parents=True)
    write_safetensors(path, state, {"config": json.dumps(SAID | UNTOLD | said)})
    shutil.copy(bundle / "tokenizer.json", path.parent)
    return path


def edited(model: Path, **options: Any) -> Tensor:
    torch.manual_seed(1)
    image, mask = torch.rand(1, 3, 48, 48) * 2 - 1, torch.zeros(1, 1, 48, 48)
    mask[..., 8:40, 10:36] = 1
    config = EditConfig(
        num_steps=2,
        first_stage_batch=1,
        repaint_steps=0,
        upscaling_mode="bilinear",
        decoder_optimization=False,
        clip_reranking=False,
    )
    pipeline = load_edit_pipeline(model, **options)
    return pipeline(
        image, mask, "a red house", config=config, generator=torch.Generator().manual_seed(4)
    ).image


def printed(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> str:
    capsys.readouterr()
    assert models_command([str(word) for word in words]) == code
    captured = capsys.readouterr()
    return captured.out + captured.err


# ---- marks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", MARKS)
def test_a_marked_file_edits_as_one_whose_metadata_say_so(
    bundle: Path, single: State, case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    marks, said = MARKS[case]
    marked = write_single(bundle, tmp_path / "marked" / f"{case}.safetensors", single | marks)
    told = write_single(bundle, tmp_path / "told" / "model.safetensors", single, **said)
    plain = write_single(bundle, tmp_path / "plain" / "model.safetensors", single)
    expected = edited(told)
    assert torch.equal(edited(marked), expected) and not torch.allclose(edited(plain), expected, atol=1e-3)
    facts = model_facts(locate(marked))
    betas = make_betas()
    betas = rescale_zero_terminal_snr(betas) if case == "vpred_ztsnr" else betas
    assert facts.prediction_type == "v_prediction"
    assert torch.equal(facts.alphas_cumprod, make_alphas_cumprod(betas).clamp(min=2**-24))
    listing = printed(capsys, "keys", marked)
    assert all(f"marked: {name} = {value}" in listing for name, value in said.items())
    for layout, out in (("canonical", tmp_path / "converted"), ("ldm", tmp_path / "one.safetensors")):
        printed(capsys, "convert", marked, "-o", out, "--layout", layout, "--in-process")
        found = out / "unet.safetensors" if layout == "canonical" else out
        config = json.loads(read_metadata(found)["config"])
        config = config.get("unet", config)
        assert said.items() <= config.items() and not read_state_dict(found).keys() & marks.keys()
    shutil.copy(bundle / "tokenizer.json", tmp_path)
    for again in (tmp_path / "converted", tmp_path / "one.safetensors"):
        assert torch.equal(edited(again), expected)


def test_the_kind_of_prediction_can_be_said(bundle: Path, single: State, tmp_path: Path) -> None:
    plain = write_single(bundle, tmp_path / "plain" / "model.safetensors", single)
    marked = write_single(bundle, tmp_path / "marked" / "model.safetensors", single | {"v_pred": EMPTY})
    assert torch.equal(edited(plain, prediction_type="v_prediction"), edited(marked))
    assert torch.equal(edited(marked, prediction_type="epsilon"), edited(plain))
    with pytest.raises(ValueError, match="prediction_type is 'noise'; expected epsilon, v_prediction"):
        load_edit_pipeline(plain, prediction_type="noise")
    found = locate_restorer(bundle, method="img2img", prediction_type="v_prediction")
    assert load_restore_pipeline(found).prediction_type == "v_prediction"
    assert (
        load_restore_pipeline(bundle, method="img2img", prediction_type="v_prediction").prediction_type
        == "v_prediction"
    )
    with pytest.raises(ValueError, match="prediction_type; give them to locate_restorer"):
        load_restore_pipeline(found, prediction_type="epsilon")


def test_on_the_command_line(
    bundle: Path, single: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A mark against the metadata stops the command with its way out, which works; a strange key is noted."""
    path = write_single(
        bundle,
        tmp_path / "m" / "model.safetensors",
        single | {"v_pred": EMPTY, "hello": EMPTY},
        prediction_type="epsilon",
    )
    Image.new("RGB", (32, 32), "grey").save(tmp_path / "in.png")
    Image.new("L", (32, 32), "white").save(tmp_path / "mask.png")
    words = [
        "-i",
        tmp_path / "in.png",
        "-o",
        tmp_path / "out.png",
        "--device",
        "cpu",
        "--model",
        path,
        "--steps",
        "1",
    ]
    more = [
        "-m",
        tmp_path / "mask.png",
        "-p",
        "a house",
        "--repaint-steps",
        "0",
        "--first-stage-batch",
        "1",
        "--seam",
        "none",
    ]
    command = [str(word) for word in (*words, *more)]
    assert edit_command(command) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "its metadata says 'epsilon'; say which with --prediction-type" in said
    pictures = {}
    for kind in ("epsilon", "v_prediction"):
        assert edit_command([*command, "--prediction-type", kind]) == 0
        assert (
            "1 tensors without values that are not known here were passed over, first 'hello'"
            in capsys.readouterr().err
        )
        pictures[kind] = (tmp_path / "out.png").read_bytes()
    with Image.open(tmp_path / "out.png") as picture:
        assert "Prediction type: v_prediction" in str(picture.text["parameters"])  # type: ignore[attr-defined]
    assert pictures["epsilon"] != pictures["v_prediction"]
    restore = [
        *words[:-2],
        "--method",
        "img2img",
        "--steps",
        "1",
        "--scale",
        "1",
        "--prediction-type",
        "v_prediction",
    ]
    assert restore_command([str(word) for word in restore]) == 0


def test_every_tool_of_a_model_hears_its_marks(bundle: Path, tmp_path: Path) -> None:
    """In a folder of parts the U-Net's file has them."""
    folder = Path(shutil.copytree(bundle, tmp_path / "model"))
    path = folder / "unet.safetensors"
    metadata = json.loads(read_metadata(path)["config"])
    del metadata["prediction_type"]
    state = {key: tensor.clone() for key, tensor in read_state_dict(path).items()}
    write_safetensors(path, state | {"v_pred": EMPTY, "odd": EMPTY}, {"config": json.dumps(metadata)})
    assert load_edit_pipeline(folder).prediction_type == "v_prediction"
    assert load_restore_pipeline(folder, method="img2img").prediction_type == "v_prediction"
    (note,) = model_notes(locate(folder))
    assert note.startswith(str(path)) and "'odd'" in note


# ---- ControlNets of their authors --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def control() -> State:
    net = ControlNet(CONTROLNET)
    load_seeded(net, seed=8)
    return net.state_dict()


def restored(model: Path) -> Tensor:
    torch.manual_seed(2)
    image, pipeline = torch.rand(1, 3, 24, 24), load_restore_pipeline(model, method="controlnet")
    config = RestoreConfig(method="controlnet", num_inference_steps=1, process_size=24)
    return pipeline(image, config=config, output_size=(24, 24)).image


def test_a_controlnet_of_its_authors_is_the_same_net(
    bundle: Path, single: State, control: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Alone, without its prefix, and in one file with its model: strict loading, keys, convert, restoring."""
    said = {"config": json.dumps(SAID)}
    authors = to_ldm({"controlnet": control})
    bare = {key.removeprefix("control_model."): tensor for key, tensor in authors.items()}
    assert (
        bare.keys() != authors.keys()
        and "input_hint_block.14.weight" in bare
        and "middle_block_out.0.bias" in bare
    )
    files = {"authors": authors, "bare": bare, "diffusers": control}
    pictures = []
    for name, state in files.items():
        folder = Path(shutil.copytree(bundle, tmp_path / name))
        path = folder / "controlnet.safetensors"
        write_safetensors(path, state, said)
        net = load_net(path)
        assert isinstance(net, ControlNet) and net.config == CONTROLNET
        assert all(torch.equal(tensor, control[key]) for key, tensor in net.state_dict().items())
        pictures.append(restored(folder))
        listing = printed(capsys, "keys", path)
        assert ("authors' layout" in listing) is (name != "diffusers") and "unknown" not in listing
    assert torch.equal(pictures[0], pictures[2]) and torch.equal(pictures[1], pictures[2])
    whole = write_single(bundle, tmp_path / "one" / "model.safetensors", {})
    tables = {"unet": SAID | TRAINING, "vae": SAID, "text_encoder": SAID, "controlnet": SAID}
    write_safetensors(whole, single | authors, {"config": json.dumps(tables)})
    assert torch.equal(restored(whole), pictures[2])
    out = tmp_path / "control.safetensors"
    printed(capsys, "convert", tmp_path / "authors" / "controlnet.safetensors", "-o", out, "--in-process")
    assert all(torch.equal(tensor, control[key]) for key, tensor in read_state_dict(out).items())


@pytest.mark.parametrize(
    ("key", "tensor", "said"),
    [("zero_convs.2.0.weight", None, "1 tensors are missing"), ("zero_convs.1.0.bias", torch.zeros(3), "has shape (3,)"),
     ("input_hint_block.99.weight", torch.zeros(2), "1 tensors are unknown"), ("output_blocks.0.0.x", torch.zeros(2), "1 tensors are unknown")],
)  # fmt: skip
def test_a_damaged_controlnet_of_its_authors_is_refused(
    control: State, tmp_path: Path, key: str, tensor: Tensor | None, said: str
) -> None:
    state = to_ldm({"controlnet": control})
    state.pop(f"control_model.{key}", None)
    if tensor is not None:
        state[f"control_model.{key}"] = tensor
    write_safetensors(tmp_path / "x.safetensors", state, {"config": json.dumps(SAID)})
    with pytest.raises(WeightsError) as refused:
        load_net(tmp_path / "x.safetensors")
    assert said in str(refused.value) and "\n" not in str(refused.value)


# ---- 8 bits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_model_in_8_bits_edits_as_its_values_do(
    bundle: Path,
    single: State,
    tmp_path: Path,
    dtype: torch.dtype,
    scaled: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """U-Net and text encoder in 8 bits, as ComfyUI's files have them, with and without scales."""
    large = {key: tensor for key, tensor in single.items() if not key.startswith("first_stage_model.")}
    if scaled:
        stored, meant = in_scaled_8_bits({key: tensor.float() for key, tensor in large.items()}, dtype=dtype)
        stored["model.diffusion_model.scaled_fp8"] = torch.empty(0, dtype=dtype)
    else:
        stored = {key: tensor.to(dtype) for key, tensor in large.items()}
        meant = {key: tensor.float() for key, tensor in stored.items()}
    narrow = write_single(
        bundle, tmp_path / "narrow" / "model.safetensors", single | stored, prediction_type="epsilon"
    )
    wide = write_single(
        bundle, tmp_path / "wide" / "model.safetensors", single | meant, prediction_type="epsilon"
    )
    assert torch.equal(edited(narrow), edited(wide))
    listing = printed(capsys, "keys", narrow)
    assert ("in scaled 8 bits" in listing) is scaled
    printed(capsys, "convert", narrow, "-o", tmp_path / "out", "--dtype", "float32", "--in-process")
    assert torch.equal(edited(tmp_path / "out"), edited(wide))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float16])
def test_a_lora_or_another_base_is_not_lost_in_8_bits(
    bundle: Path, single: State, tmp_path: Path, dtype: torch.dtype
) -> None:
    """What is merged into a model of 8 bits is kept in 16, whatever the change's size."""
    path = write_single(
        bundle,
        tmp_path / "n" / "model.safetensors",
        {key: tensor.to(dtype) for key, tensor in single.items()},
    )
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    lora = {
        f"{name}.lora_down.weight": torch.full((1, 8), 0.1),
        f"{name}.lora_up.weight": torch.full((8, 1), 0.1),
    }
    write_safetensors(tmp_path / "lora.safetensors", lora)
    from msbd.loading.nets import read_lora_file
    from msbd.loading.parts import ModelParts

    key = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    before = ModelParts(locate(path)).tensors("unet")[0][key].float()
    merged = ModelParts(locate(path), [(read_lora_file(tmp_path / "lora.safetensors"), 1.0)]).tensors("unet")[
        0
    ][key]
    assert merged.dtype == torch.float16
    torch.testing.assert_close(merged.float() - before, torch.full_like(before, 1e-2), rtol=0, atol=2e-4)
    blended = ModelParts(locate(path), [], locate(bundle), 0.5).tensors("unet")[0][key]
    other = read_state_dict(bundle / "unet.safetensors")[key].float()
    torch.testing.assert_close(blended.float(), (before + other) / 2, rtol=1e-3, atol=1e-4)


# ---- configurations ----------------------------------------------------------------------------------------


def test_a_refused_configuration_is_refused_by_every_tool(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = base_parts(bundle)
    for field, value in (("only_cross_attention", True), ("future_field", "x"), ("act_fn", "tanh")):
        folder = tmp_path / field
        write_net_folder(
            folder,
            "diffusion_pytorch_model",
            parts["unet"],
            {"attention_head_dim": 2, "norm_num_groups": 4, field: value},
        )
        assert "configured for " in printed(capsys, "keys", folder, code=1)
        assert field in printed(
            capsys,
            "convert",
            folder / "diffusion_pytorch_model.safetensors",
            "-o",
            tmp_path / "o.safetensors",
            "--in-process",
            code=1,
        )
        with pytest.raises(WeightsError, match=field):
            load_net(folder)


def test_a_followed_configuration_survives_converting(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = {
        "act_fn": "gelu",
        "center_input_sample": True,
        "mid_block_scale_factor": 2.0,
        "downsample_padding": 0,
        "timestep_post_act": "silu",
    }
    write_net_folder(tmp_path / "unet", "diffusion_pytorch_model", base_parts(bundle)["unet"],
                     {"attention_head_dim": 2, "norm_num_groups": 4, **fields})  # fmt: skip
    out = tmp_path / "out.safetensors"
    printed(
        capsys,
        "convert",
        tmp_path / "unet" / "diffusion_pytorch_model.safetensors",
        "-o",
        out,
        "--in-process",
    )
    assert load_net(out).config == load_net(tmp_path / "unet").config
    assert all(getattr(load_net(out).config, name) == value for name, value in fields.items())
    assert all(field in printed(capsys, "keys", out).replace("\n        ", " ") for field in fields)
