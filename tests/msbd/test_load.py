"""From files to a pipeline: what loads, how it is cast, and the one line that refuses what does not go together."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_bundle import RRDB, UNET, VAE, clip_config, write_part, write_tiny_bundle

from msbd.config import EditConfig, Measures
from msbd.edit import EditPipeline
from msbd.load import edit_planner, load_edit_pipeline, model_hash, model_parts
from msbd.rerank import CLIP_MEAN
from nets.clip import CLIPModel
from nets.rrdb import RRDBNet
from nets.unet import UNet
from nets.vae import AutoencoderKL
from samplers.schedule import eps_from_velocity, make_alphas_cumprod, make_betas
from weights.files import WeightsError, read_metadata, read_state_dict, write_safetensors
from weights.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    """A bundle that a test may spoil."""
    return Path(shutil.copytree(bundle, tmp_path / "model"))


def refusal(model: Path | str) -> str:
    """The one line with which a model is refused."""
    with pytest.raises(WeightsError) as refused:
        load_edit_pipeline(model)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def set_config(path: Path, **values: Any) -> None:
    """Write `values` into the file's `config` metadata; None takes an entry out."""
    config = json.loads(read_metadata(path)["config"]) | values
    config = {name: value for name, value in config.items() if value is not None}
    tensors = {key: tensor.clone() for key, tensor in read_state_dict(path).items()}
    write_safetensors(path, tensors, {"config": json.dumps(config)})


def dtype_of(net: Any) -> torch.dtype:
    (dtype,) = {parameter.dtype for parameter in net.parameters()}
    return dtype


def test_a_bundle_loads_with_its_weights_and_measures(bundle: Path) -> None:
    pipeline = load_edit_pipeline(bundle)
    assert isinstance(pipeline, EditPipeline) and pipeline.measures == Measures(32, 16, 3.0)
    for net, part in (
        (pipeline.unet, "unet"),
        (pipeline.vae, "vae"),
        (pipeline.clip, "clip"),
        (pipeline.upscaler, "rrdb"),
    ):
        assert net is not None and not net.training and not any(p.requires_grad for p in net.parameters())
        stored = read_state_dict(bundle / f"{part}.safetensors")
        assert all(torch.equal(value, stored[key].float()) for key, value in net.state_dict().items())
    assert pipeline.vae.config.scaling_factor == 0.5
    assert pipeline.clip_preprocessing == {"size": 32, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    assert torch.equal(pipeline.alphas_cumprod, make_alphas_cumprod(make_betas()))


def test_the_text_encoder_is_clips_text_half_and_shares_its_memory(bundle: Path) -> None:
    pipeline = load_edit_pipeline(bundle)
    ids = pipeline.tokenizer(["a red house", ""])
    states = pipeline.text_encoder(ids)
    assert states.shape == (2, 77, 16) and torch.equal(states, pipeline.clip.text_model(ids))
    encoder: Any = pipeline.text_encoder
    ours = encoder.text_model.embeddings.token_embedding.weight
    assert ours.data_ptr() == pipeline.clip.text_model.embeddings.token_embedding.weight.data_ptr()


@pytest.mark.parametrize(
    "dtype, unet, vae",
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16, torch.float32),
    ],
)
def test_the_vae_is_never_float16_and_clip_stays_float32_on_a_cpu(
    bundle: Path, dtype: torch.dtype, unet: torch.dtype, vae: torch.dtype
) -> None:
    pipeline = load_edit_pipeline(bundle, dtype=dtype)
    assert (dtype_of(pipeline.unet), dtype_of(pipeline.vae)) == (unet, vae)
    assert dtype_of(pipeline.clip) == dtype_of(pipeline.upscaler) == torch.float32


def test_another_dtype_is_refused(bundle: Path) -> None:
    with pytest.raises(ValueError, match=r"torch\.int8"):
        load_edit_pipeline(bundle, dtype=torch.int8)


def test_the_pipeline_runs_in_bfloat16(bundle: Path) -> None:
    pipeline = load_edit_pipeline(bundle, dtype=torch.bfloat16)
    image, mask = torch.zeros(1, 3, 32, 32), torch.zeros(1, 1, 32, 32)
    mask[..., 8:24, 8:24] = 1
    config = EditConfig(num_steps=2, first_stage_batch=2, repaint_steps=0, decoderopt_steps=1)
    result = pipeline(image, mask, "a house", config=config)
    assert result.image.dtype == torch.float32 and bool(result.image.isfinite().all())
    assert torch.equal(result.image[mask.expand_as(image) == 0], image[mask.expand_as(image) == 0])


def test_a_v_prediction_unet_is_wrapped(bundle: Path, copy: Path) -> None:
    set_config(copy / "unet.safetensors", prediction_type="v_prediction")
    x, t, context = torch.randn(1, 4, 4, 4), torch.tensor([500]), torch.randn(1, 77, 16)
    v = load_edit_pipeline(bundle).unet(x, t, context)
    eps = load_edit_pipeline(copy).unet(x, t, context)
    assert torch.allclose(eps, eps_from_velocity(v, x, t, make_alphas_cumprod(make_betas())))
    assert not torch.allclose(eps, v)


def test_what_the_metadata_leave_out_is_as_in_stable_diffusion(copy: Path) -> None:
    absent = (
        "native",
        "multiple",
        "guidance_scale",
        "prediction_type",
        "beta_schedule",
        "beta_start",
        "beta_end",
    )
    set_config(copy / "unet.safetensors", **dict.fromkeys(absent))
    set_config(copy / "clip.safetensors", image_mean=None, image_std=None)
    pipeline = load_edit_pipeline(copy)
    assert pipeline.measures == Measures() and pipeline.clip_preprocessing["mean"] == CLIP_MEAN
    assert torch.equal(pipeline.alphas_cumprod, make_alphas_cumprod(make_betas()))


def test_other_betas_are_followed(copy: Path) -> None:
    set_config(copy / "unet.safetensors", beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
    expected = make_alphas_cumprod(make_betas("linear", beta_start=1e-4, beta_end=0.02))
    assert torch.equal(load_edit_pipeline(copy).alphas_cumprod, expected)


def test_a_planner_plans_like_the_pipeline_and_reads_no_weights(bundle: Path, copy: Path) -> None:
    mask = torch.zeros(1, 1, 120, 100)
    mask[..., 20:110, 20:90] = 1
    pipeline, planner = load_edit_pipeline(bundle), edit_planner(bundle)
    config = EditConfig(num_steps=10)
    plan = planner.plan(mask, config)
    assert plan == pipeline.plan(mask, config) and len(plan.stages) > 1
    for stage in plan.stages:
        assert planner.evaluations(stage, plan.config) == pipeline.evaluations(stage, plan.config) > 0
    for part in ("vae", "clip", "rrdb"):
        (copy / f"{part}.safetensors").write_bytes(b"")
    assert edit_planner(copy).measures == planner.measures


@pytest.mark.parametrize("one, other", [("unet", "vae"), ("clip", "rrdb"), ("vae", "clip")])
def test_mixed_up_files_are_refused(copy: Path, one: str, other: str) -> None:
    first, second = copy / f"{one}.safetensors", copy / f"{other}.safetensors"
    shutil.move(first, copy / "aside")
    shutil.move(second, first)
    shutil.move(copy / "aside", second)
    if one == "unet":
        assert "mixed up" in refusal(copy) and "unet.safetensors" in refusal(copy)
    else:
        assert "expected" in refusal(copy)


@pytest.mark.parametrize("file", ["unet.safetensors", "rrdb.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(copy: Path, file: str) -> None:
    (copy / file).unlink()
    assert str(copy / file) in refusal(copy) and "no such file" in refusal(copy)


def spoil(copy: Path, key: str, value: torch.Tensor | None) -> None:
    tensors = {name: tensor.clone() for name, tensor in read_state_dict(copy / "unet.safetensors").items()}
    tensors.pop(key, None)
    if value is not None:
        tensors[key] = value
    write_safetensors(copy / "unet.safetensors", tensors, read_metadata(copy / "unet.safetensors"))


@pytest.mark.parametrize(
    "key, value, reason",
    [
        ("mid_block.resnets.0.conv1.bias", None, "1 tensors are missing"),
        ("extra.weight", torch.zeros(1), "1 tensors are unknown, first 'extra.weight'"),
        ("mid_block.resnets.0.conv1.bias", torch.zeros(3), r"has shape (3,), expected (8,)"),
        ("mid_block.resnets.0.conv1.bias", torch.zeros(8, dtype=torch.int8), "expected floating point"),
    ],
)
def test_loading_is_strict(copy: Path, key: str, value: torch.Tensor | None, reason: str) -> None:
    spoil(copy, key, value)
    assert reason in refusal(copy)


def test_position_ids_are_ignored(copy: Path) -> None:
    path = copy / "clip.safetensors"
    tensors = {name: tensor.clone() for name, tensor in read_state_dict(path).items()}
    tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    write_safetensors(path, tensors, read_metadata(path))
    assert "text_model.embeddings.position_ids" not in load_edit_pipeline(copy).clip.state_dict()


@pytest.mark.parametrize(
    "part, values, reason",
    [
        ("unet", {"native": "big"}, "native = 'big'"),
        ("unet", {"native": 40}, "expected a multiple of 16"),
        ("unet", {"multiple": 4}, "not of one model"),
        ("unet", {"guidance_scale": True}, "guidance_scale = True"),
        ("unet", {"prediction_type": "sample"}, "prediction_type = 'sample'"),
        ("unet", {"beta_start": 0.5}, "betas from 0.5"),
        ("unet", {"beta_schedule": "cosine"}, "cosine"),
        ("unet", {"attention_head_dim": 3}, "multiple"),
        ("clip", {"image_mean": [1, 2]}, "three numbers"),
        ("clip", {"image_std": [1, 0, 1]}, "three numbers"),
    ],
)
def test_metadata_that_cannot_be_are_refused(
    copy: Path, part: str, values: dict[str, Any], reason: str
) -> None:
    set_config(copy / f"{part}.safetensors", **values)
    assert reason in refusal(copy) and f"{part}.safetensors" in refusal(copy)


def test_parts_of_different_models_are_refused(copy: Path) -> None:
    train_tokenizer(["a red house on snow at night", "some other words entirely"], 560).save(
        str(copy / "tokenizer.json")
    )
    assert "tokens, but clip.safetensors knows" in refusal(copy)
    narrow = {**vars(UNET), "cross_attention_dim": 8}
    write_part(copy, "unet", UNet(type(UNET)(**narrow)))
    assert "context width 8, but clip.safetensors has 16" in refusal(copy)


def test_names_that_do_not_load_are_refused(tmp_path: Path) -> None:
    assert "next release" in refusal("sd-v1-5")
    assert "known: mini" in refusal("no-such-model")
    (tmp_path / "model.ckpt").write_bytes(b"x")
    assert "expected a folder" in refusal(tmp_path / "model.ckpt")
    assert "no such file" in refusal(tmp_path)


def test_model_parts_gives_every_file(bundle: Path) -> None:
    assert set(model_parts(bundle)) == {"unet", "vae", "clip", "rrdb", "tokenizer"}


def test_model_hash_changes_with_any_part(bundle: Path, copy: Path) -> None:
    assert model_hash(bundle) == model_hash(copy) and len(model_hash(bundle)) == 10
    seen = {model_hash(copy)}
    for part, net in (
        ("vae", AutoencoderKL(VAE)),
        ("rrdb", RRDBNet(RRDB)),
        ("clip", CLIPModel(clip_config(514))),
    ):
        write_part(copy, part, net)
        seen.add(model_hash(copy))
    assert len(seen) == 4
