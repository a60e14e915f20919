"""From files to a pipeline: what loads, how it is cast,
and the one line that refuses what does not go together.
"""

import importlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from msbd.edit.config import EditConfig, ModelSpec
from msbd.edit.pipeline import EditPipeline
from msbd.edit.plan import EditPlan, plan_edit
from msbd.load import (
    BASE_PARTS,
    PlanFacts,
    load_edit_pipeline,
    load_restore_pipeline,
    load_training_parts,
    model_hash,
    plan_facts,
    restore_facts,
    restorer_name,
)
from msbd.loading.parts import load_net, load_pasd_nets
from msbd.pixels.preprocess import CLIP_MEAN
from msbd.restore.config import ModelSpec as RestoreSpec
from msbd.restore.config import RestoreConfig
from msbd.restore.pipeline import RestorePipeline
from msbd.restore.plan import plan_restore
from nets.clip import CLIPModel, CLIPTextModel, CLIPVisionModel
from nets.controlnet import ControlNet, ControlNetConfig
from nets.pasd_unet import PASDUNet
from nets.rrdb import RRDBNet
from nets.unet import UNet
from nets.vae import AutoencoderKL
from samplers.schedule import eps_from_velocity, make_alphas_cumprod, make_betas
from tests.helpers.tiny_bundle import (
    RRDB,
    UNET,
    VAE,
    base_parts,
    clip_config,
    write_hub_folder,
    write_ldm_file,
    write_part,
    write_pasd_folder,
    write_tiny_bundle,
)
from tools.edit import main as edit_command
from tools.restore.__main__ import main as restore_command
from weights import files
from weights.files import WeightsError, read_metadata, read_state_dict, write_safetensors
from weights.ldm import to_ldm
from weights.locate import locate
from weights.merge import added_tensors, base_tensors, pack_delta
from weights.registry import MINI, MODELS
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
    assert isinstance(pipeline, EditPipeline) and pipeline.spec == ModelSpec(32, 16, 3.0)
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
def test_vae_and_upscaler_are_never_float16_and_clip_stays_float32_on_a_cpu(
    bundle: Path, dtype: torch.dtype, unet: torch.dtype, vae: torch.dtype
) -> None:
    pipeline = load_edit_pipeline(bundle, dtype=dtype)
    assert (dtype_of(pipeline.unet), dtype_of(pipeline.vae)) == (unet, vae)
    assert dtype_of(pipeline.clip) == torch.float32
    assert dtype_of(pipeline.upscaler) == vae


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


class NoiseOfVelocity(torch.nn.Module):
    """A net that predicts v, seen as one that predicts the noise."""

    def __init__(self, unet: torch.nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        v = self.unet(x, t, context)
        return eps_from_velocity(v, x, t.reshape(-1)[:1], make_alphas_cumprod(make_betas()))


def test_a_unet_that_predicts_v_edits_as_one_that_says_the_same_as_noise(copy: Path) -> None:
    set_config(copy / "unet.safetensors", prediction_type="v_prediction")
    image, mask = torch.rand(1, 3, 48, 48) * 2 - 1, torch.zeros(1, 1, 48, 48)
    mask[..., 8:40, 10:36] = 1
    config = EditConfig(num_steps=2, first_stage_batch=1, repaint_steps=0, decoder_optimization=False)

    def edit(pipeline: EditPipeline) -> Tensor:
        generator = torch.Generator().manual_seed(4)
        return pipeline(image, mask, "a red house", config=config, generator=generator).image

    pipeline = load_edit_pipeline(copy)
    assert pipeline.prediction_type == "v_prediction" and type(pipeline.unet) is UNet
    edited = edit(pipeline)
    pipeline.prediction_type = "epsilon"
    assert not torch.allclose(edit(pipeline), edited, atol=1e-2)
    pipeline.unet = NoiseOfVelocity(pipeline.unet)
    torch.testing.assert_close(edit(pipeline), edited, rtol=0, atol=1e-4)


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
    assert pipeline.spec == ModelSpec() and pipeline.clip_preprocessing["mean"] == CLIP_MEAN
    assert torch.equal(pipeline.alphas_cumprod, make_alphas_cumprod(make_betas()))


def test_other_betas_are_followed(copy: Path) -> None:
    set_config(copy / "unet.safetensors", beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
    expected = make_alphas_cumprod(make_betas("linear", beta_start=1e-4, beta_end=0.02))
    assert torch.equal(load_edit_pipeline(copy).alphas_cumprod, expected)
    set_config(copy / "unet.safetensors", beta_schedule="squaredcos_cap_v2")
    assert torch.equal(plan_facts(copy).alphas_cumprod, make_alphas_cumprod(make_betas("squaredcos_cap_v2")))
    betas = torch.linspace(0.001, 0.02, 1000, dtype=torch.float64)
    set_config(copy / "unet.safetensors", trained_betas=betas.tolist(), prediction_type="sample")
    facts = load_training_parts(copy)
    assert torch.equal(facts.alphas_cumprod, make_alphas_cumprod(betas)) and facts.prediction_type == "sample"


def plan_of(facts: PlanFacts, mask: torch.Tensor, config: EditConfig) -> EditPlan:
    """The plan by what is known before any net is loaded."""
    levels, upscaler = facts.alphas_cumprod, facts.has_upscaler
    return plan_edit(mask, config, facts.spec, levels, downscale=facts.downscale, has_upscaler=upscaler)


def test_the_facts_of_a_plan_serve_like_the_pipeline_and_need_no_weights(bundle: Path, copy: Path) -> None:
    mask = torch.zeros(1, 1, 120, 100)
    mask[..., 20:110, 20:90] = 1
    pipeline, facts = load_edit_pipeline(bundle), plan_facts(bundle)
    config = EditConfig(num_steps=10)
    plan = plan_of(facts, mask, config)
    assert plan == pipeline.plan(mask, config) and len(plan.stages) > 1 and plan.evaluations > 0
    for part in ("clip", "rrdb"):
        (copy / f"{part}.safetensors").write_bytes(b"")
    assert plan_facts(copy).spec == facts.spec


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


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_a_missing_part_is_named(copy: Path, part: str) -> None:
    (copy / f"{part}.safetensors").unlink()
    assert f"{copy}: no {part} there" in refusal(copy) and f"Add {part}.safetensors" in refusal(copy)


def test_a_missing_tokenizer_is_named_with_where_to_get_it(copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    assert "no tokenizer with it; `python -m tools.models fetch clip-vit-l14`" in refusal(copy)


def test_ranking_and_enlarging_are_optional(copy: Path) -> None:
    (copy / "rrdb.safetensors").unlink()
    clip = read_state_dict(copy / "clip.safetensors")
    text = {key: tensor for key, tensor in clip.items() if key.startswith("text_model.")}
    config = json.loads(read_metadata(copy / "clip.safetensors")["config"])["text"]
    write_safetensors(copy / "text_encoder.safetensors", text, {"config": json.dumps(config)})
    (copy / "clip.safetensors").unlink()
    pipeline = load_edit_pipeline(copy)
    assert pipeline.clip is None and pipeline.upscaler is None
    assert not plan_facts(copy).has_upscaler


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
        ("unet", {"prediction_type": "x0"}, "prediction_type = 'x0'"),
        ("unet", {"trained_betas": [0.99] * 1000}, "betas that leave no picture"),
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
    assert "python -m tools.models fetch sd-v1-5" in refusal("sd-v1-5")
    assert "known: mini" in refusal("no-such-model")
    (tmp_path / "model.ckpt").write_bytes(b"x")
    assert "not a weights file" in refusal(tmp_path / "model.ckpt")
    assert "no model's folder" in refusal(tmp_path)


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


# ---- other layouts of the same model -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def layouts(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The bundle as it is, as an LDM file, and as a diffusers folder."""
    root = tmp_path_factory.mktemp("layouts")
    single = write_ldm_file(bundle, root / "ldm" / "model.safetensors")
    return {"flat": bundle, "ldm": single, "hub": write_hub_folder(bundle, root / "hub")}


def put_companions(bundle: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundle's CLIP and enlarger as this machine's, in the places and formats of the official ones."""
    monkeypatch.setenv("MSBD_WEIGHTS", str(weights))
    clip = weights / "openai" / "clip-vit-large-patch14"
    clip.mkdir(parents=True)
    shutil.copy(bundle / "clip.safetensors", clip / "model.safetensors")
    rrdb = {key: tensor.clone() for key, tensor in read_state_dict(bundle / "rrdb.safetensors").items()}
    torch.save({"params_ema": rrdb}, weights / "RealESRGAN_x4plus.pth")
    for name, path in (
        ("realesrgan-x4plus", weights / "RealESRGAN_x4plus.pth"),
        ("clip-vit-l14", clip / "model.safetensors"),
    ):
        first, *others = MODELS[name].files
        small = replace(first, size=path.stat().st_size)
        monkeypatch.setitem(MODELS, name, replace(MODELS[name], files=(small, *others)))


@pytest.mark.parametrize("kind", ["ldm", "hub"])
def test_every_layout_gives_the_same_nets(layouts: dict[str, Path], kind: str) -> None:
    flat, other = load_edit_pipeline(layouts["flat"]), load_edit_pipeline(layouts[kind])
    x, t, context = torch.randn(2, 4, 5, 6), torch.tensor([981, 3]), torch.randn(2, 77, 16)
    assert torch.equal(flat.unet(x, t, context), other.unet(x, t, context))
    assert torch.equal(flat.vae.decode(x), other.vae.decode(x))
    ids = flat.tokenizer(["a red house", "snow"])
    assert torch.equal(ids, other.tokenizer(["a red house", "snow"]))
    assert torch.equal(flat.text_encoder(ids), other.text_encoder(ids))
    assert other.vae.config == flat.vae.config and other.clip is None and other.upscaler is None


def test_settings_come_from_the_metadata_or_the_folders_json(layouts: dict[str, Path]) -> None:
    single, folder = load_edit_pipeline(layouts["ldm"]), load_edit_pipeline(layouts["hub"])
    assert single.spec == ModelSpec(32, 16, 3.0) and folder.spec == ModelSpec(native=128)
    assert torch.equal(single.alphas_cumprod, make_alphas_cumprod(make_betas()))
    assert torch.equal(folder.alphas_cumprod, make_alphas_cumprod(make_betas(beta_start=0.001)))


def test_a_single_file_edits_as_the_flat_folder_with_what_this_machine_has(
    layouts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_companions(layouts["flat"], tmp_path, monkeypatch)
    image, mask = torch.rand(1, 3, 48, 48) * 2 - 1, torch.zeros(1, 1, 48, 48)
    mask[..., 8:40, 10:36] = 1
    config = EditConfig(num_steps=2, first_stage_batch=2, repaint_steps=0, decoderopt_steps=1)

    def edit(model: Path) -> Tensor:
        pipeline = load_edit_pipeline(model)
        assert pipeline.clip is not None and pipeline.upscaler is not None
        generator = torch.Generator().manual_seed(4)
        return pipeline(image, mask, "a red house", config=config, generator=generator).image

    assert torch.equal(edit(layouts["flat"]), edit(layouts["ldm"]))


@pytest.mark.parametrize("kind", ["ldm", "hub"])
def test_the_facts_of_a_plan_serve_like_the_pipeline_in_every_layout(
    layouts: dict[str, Path], kind: str
) -> None:
    mask = torch.zeros(1, 1, 200, 180)
    mask[..., 20:190, 20:170] = 1
    pipeline, facts = load_edit_pipeline(layouts[kind]), plan_facts(layouts[kind])
    config = EditConfig(upscaling_mode="bilinear")
    assert plan_of(facts, mask, config) == pipeline.plan(mask, config)
    assert facts.spec == pipeline.spec and not facts.has_upscaler and pipeline.upscaler is None


def test_the_facts_of_a_plan_need_no_weights_of_a_diffusers_folder(
    layouts: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(layouts["hub"], tmp_path / "hub"))
    write_safetensors(folder / "unet" / "diffusion_pytorch_model.safetensors", {"a": torch.zeros(1)}, {})
    vae = folder / "vae" / "diffusion_pytorch_model.safetensors"
    nan = {key: torch.full_like(tensor, torch.nan) for key, tensor in read_state_dict(vae).items()}
    write_safetensors(vae, nan, {})  # its shapes say the size of a latent cell, its values nothing
    assert plan_facts(folder).spec == ModelSpec(native=128)
    assert plan_facts(folder).downscale == load_edit_pipeline(layouts["hub"]).vae.downscale


def test_a_single_file_may_be_a_checkpoint_with_averaged_weights(
    layouts: dict[str, Path], tmp_path: Path
) -> None:
    state = {key: tensor.clone() for key, tensor in read_state_dict(layouts["ldm"]).items()}
    unet = {key: tensor for key, tensor in state.items() if key.startswith("model.")}
    averages = {"model_ema." + key.removeprefix("model.").replace(".", ""): t for key, t in unet.items()}
    raw = {key: torch.full_like(tensor, float("nan")) for key, tensor in unet.items()}  # not looked at
    torch.save({"state_dict": {**state, **raw, **averages}}, tmp_path / "model.ckpt")
    (tmp_path / "config.json").write_text(
        '{"attention_head_dim": 2, "norm_num_groups": 4}'
    )  # as beside any net
    check_net(load_net(tmp_path / "model.ckpt", "unet"), UNet, base_parts(layouts["flat"])["unet"])


def test_model_hash_of_other_layouts(layouts: dict[str, Path], tmp_path: Path) -> None:
    assert len({model_hash(path) for path in layouts.values()}) == 3
    folder = Path(shutil.copytree(layouts["hub"], tmp_path / "hub"))
    assert model_hash(folder) == model_hash(layouts["hub"])
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    assert model_hash(folder) != model_hash(layouts["hub"])


# ---- LoRAs -------------------------------------------------------------------------------------------------

CHANGED = {
    "unet": ("down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q", "lora_unet", 8),
    "text_encoder": ("text_model.encoder.layers.0.self_attn.v_proj", "lora_te", 16),
}


def write_lora(path: Path, *parts: str) -> dict[str, Tensor]:
    """A LoRA of rank 2 and alpha 1 in kohya's names; {part: what it adds at weight 1}."""
    tensors, changes = {}, {}
    for part in parts:
        module, prefix, width = CHANGED[part]
        name = f"{prefix}_{module.replace('.', '_')}"
        down, up = torch.randn(2, width), torch.randn(width, 2)
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(1.0)}  # fmt: skip
        changes[part] = 0.5 * up @ down
    write_safetensors(path, tensors)
    return changes


@pytest.mark.parametrize("kind", ["flat", "ldm", "hub"])
def test_a_lora_changes_unet_and_text_encoder_and_nothing_else(
    layouts: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    changes = write_lora(tmp_path / "style.safetensors", "unet", "text_encoder")
    plain = load_edit_pipeline(layouts[kind])
    styled = load_edit_pipeline(layouts[kind], loras=[(tmp_path / "style.safetensors", 0.7)])
    for part in ("unet", "vae", "text_encoder", "clip", "upscaler"):
        before, after = getattr(plain, part), getattr(styled, part)
        if before is None:
            assert after is None and kind != "flat"
            continue
        before, after = before.state_dict(), after.state_dict()
        changed = {key for key, tensor in before.items() if not torch.equal(tensor, after[key])}
        assert changed == ({f"{CHANGED[part][0]}.weight"} if part in CHANGED else set())
        for key in changed:
            torch.testing.assert_close(after[key], before[key] + 0.7 * changes[part], rtol=2e-3, atol=2e-3)


def test_several_loras_add_up_and_weight_0_is_none(bundle: Path, tmp_path: Path) -> None:
    write_lora(tmp_path / "a.safetensors", "unet")
    write_lora(tmp_path / "b.safetensors", "unet", "text_encoder")

    def weight(**loras: float) -> Tensor:
        pipeline = load_edit_pipeline(
            bundle, loras=[(tmp_path / f"{name}.safetensors", at) for name, at in loras.items()]
        )
        return pipeline.unet.get_parameter(f"{CHANGED['unet'][0]}.weight")

    assert torch.equal(weight(a=0, b=0), weight())
    both = weight(a=1) + weight(b=-0.5) - weight()
    torch.testing.assert_close(weight(a=1, b=-0.5), both, rtol=2e-3, atol=5e-3)


def test_what_is_no_lora_of_this_model_is_refused(bundle: Path, tmp_path: Path) -> None:
    write_lora(tmp_path / "style.safetensors", "unet")
    with pytest.raises(WeightsError, match=r"unet.safetensors: one net \(unet\), expected a LoRA$"):
        load_edit_pipeline(bundle, loras=[(bundle / "unet.safetensors", 1.0)])
    assert "style.safetensors: a LoRA, which changes a model" in refusal(tmp_path / "style.safetensors")
    other = {"lora_unet_conv_in.lora_up.weight": torch.ones(8, 1, 1, 1), "lora_unet_conv_in.lora_down.weight": torch.ones(1, 9, 3, 3)}  # fmt: skip
    write_safetensors(tmp_path / "other.safetensors", other)
    with pytest.raises(WeightsError, match=r"other.safetensors: .*is it a LoRA of another model"):
        load_edit_pipeline(bundle, loras=[(tmp_path / "other.safetensors", 1.0)])


# ---- one net -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pasd(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pasd")
    return {variant: write_pasd_folder(root / variant, variant) for variant in ("full", "light", "eq2")}


def net_files(folder: Path) -> dict[str, Tensor]:
    return read_state_dict(folder / "diffusion_pytorch_model.safetensors")


def check_net(net: Any, kind: type, state: dict[str, Tensor]) -> None:
    assert type(net) is kind and not net.training and not any(p.requires_grad for p in net.parameters())
    found = net.state_dict()
    assert found.keys() == state.keys()
    for key, tensor in state.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key


@pytest.mark.parametrize(
    ("part", "kind"), [("unet", UNet), ("vae", AutoencoderKL), ("clip", CLIPModel), ("rrdb", RRDBNet)]
)
def test_load_net_of_a_file_of_one_net(bundle: Path, part: str, kind: type) -> None:
    path = bundle / f"{part}.safetensors"
    check_net(load_net(path), kind, read_state_dict(path))
    check_net(load_net(path, part), kind, read_state_dict(path))


@pytest.mark.parametrize(
    ("part", "kind"), [("unet", UNet), ("vae", AutoencoderKL), ("text_encoder", CLIPTextModel)]
)
def test_load_net_of_a_single_file_and_of_a_nets_folder(
    layouts: dict[str, Path], part: str, kind: type
) -> None:
    state = base_parts(layouts["flat"])[part]
    check_net(load_net(str(layouts["ldm"]), part), kind, state)
    net = load_net(layouts["hub"] / part)
    check_net(net, kind, state)
    assert net.config == load_net(layouts["ldm"], part).config or part == "text_encoder"


@pytest.mark.parametrize("variant", ["full", "light", "eq2"])
def test_load_net_of_pasds_nets(pasd: dict[str, Path], variant: str) -> None:
    unet, controlnet = load_net(pasd[variant] / "unet"), load_net(pasd[variant] / "controlnet")
    check_net(unet, PASDUNet, net_files(pasd[variant] / "unet"))
    check_net(controlnet, ControlNet, net_files(pasd[variant] / "controlnet"))
    assert unet.config.variant == variant and unet.config.block_out_channels == (8, 8)
    assert unet.config.attention_head_dim == controlnet.config.attention_head_dim == 2


@pytest.mark.parametrize(
    "changes", [{"use_rrdb": True}, {"to_rgb": False}, {"use_rrdb": True, "to_rgb": False}]
)
def test_load_net_of_a_controlnet_with_rrdb_or_without_heads(
    tmp_path: Path, changes: dict[str, bool]
) -> None:
    folder = write_pasd_folder(tmp_path, "light", **changes) / "controlnet"
    net = load_net(folder)
    check_net(net, ControlNet, net_files(folder))
    assert {name: getattr(net.config, name) for name in changes} == changes


def test_load_net_of_clips_vision_half_and_an_old_esrgan(bundle: Path, tmp_path: Path) -> None:
    clip = {key: tensor.clone() for key, tensor in read_state_dict(bundle / "clip.safetensors").items()}
    vision = {key: tensor for key, tensor in clip.items() if key.startswith("vision_model.")}
    write_safetensors(tmp_path / "vision.safetensors", vision, {"config": '{"num_attention_heads": 2}'})
    check_net(load_net(tmp_path / "vision.safetensors"), CLIPVisionModel, vision)
    rrdb = {key: tensor.clone() for key, tensor in read_state_dict(bundle / "rrdb.safetensors").items()}
    second = {"body.0.rdb": "RRDB_trunk.0.RDB", "conv_body": "trunk_conv", "conv_up": "upconv", "conv_hr": "HRconv"}  # fmt: skip
    old = {}
    for key, tensor in rrdb.items():
        start = next((start for start in second if key.startswith(start)), "")
        old[second.get(start, "") + key.removeprefix(start)] = tensor
    torch.save(old, tmp_path / "old.pth")
    check_net(load_net(tmp_path / "old.pth"), RRDBNet, rrdb)


def net_refusal(path: Path, part: str | None = None) -> str:
    with pytest.raises(WeightsError) as refused:
        load_net(path, part)
    line = str(refused.value)
    assert "\n" not in line and line.startswith(str(path))
    return line


def test_load_net_refuses_what_is_not_one_net(layouts: dict[str, Path], tmp_path: Path) -> None:
    assert net_refusal(layouts["ldm"]).endswith("has unet, vae, text_encoder; say which part to load")
    assert "has no controlnet; it has unet, vae, text_encoder" in net_refusal(layouts["ldm"], "controlnet")
    assert "one net (unet), has no vae; it has unet" in net_refusal(layouts["flat"] / "unet.safetensors", "vae")  # fmt: skip
    assert "no weights here" in net_refusal(layouts["hub"])
    write_lora(tmp_path / "lora.safetensors", "unet")
    net_refusal(tmp_path / "lora.safetensors")
    with_stray = dict(read_state_dict(layouts["ldm"])) | {"extra": torch.zeros(1)}
    write_safetensors(tmp_path / "stray.safetensors", with_stray)
    assert "1 tensors belong to no net" in net_refusal(tmp_path / "stray.safetensors", "unet")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(
    bundle: Path, tmp_path: Path, dtype: torch.dtype, value: float | None
) -> None:
    state = {key: tensor.to(dtype) for key, tensor in read_state_dict(bundle / "unet.safetensors").items()}
    path, key = tmp_path / "unet.safetensors", "mid_block.resnets.0.conv1.weight"
    if value is not None:
        spoilt = state[key].float()
        spoilt[0, 0, 0, 0] = value
        state[key] = spoilt.to(dtype)
    write_safetensors(path, state, read_metadata(bundle / "unet.safetensors"))
    if value is None:
        assert dtype_of(load_net(path)) == dtype
    else:
        assert f"{key!r} holds values that are not finite; the file is damaged" in net_refusal(path)


@pytest.mark.parametrize("part", ["unet", "vae", "clip", "rrdb"])
def test_a_pipeline_of_a_damaged_part_is_refused(copy: Path, part: str) -> None:
    path = copy / f"{part}.safetensors"
    state = {key: tensor.clone() for key, tensor in read_state_dict(path).items()}
    key = sorted(state)[len(state) // 2]
    state[key].view(-1)[-1] = float("nan")
    write_safetensors(path, state, read_metadata(path))
    assert refusal(copy).startswith(f"{path}: {key!r} holds values that are not finite")


def test_a_single_file_with_a_damaged_part_is_refused(layouts: dict[str, Path], tmp_path: Path) -> None:
    state = {key: tensor.clone() for key, tensor in read_state_dict(layouts["ldm"]).items()}
    state["first_stage_model.quant_conv.bias"][0] = float("inf")
    write_safetensors(tmp_path / "x.safetensors", state, read_metadata(layouts["ldm"]))
    assert "'quant_conv.bias' holds values that are not finite" in refusal(tmp_path / "x.safetensors")


# ---- PASD --------------------------------------------------------------------------------------------------


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("variant", ["full", "light", "eq2"])
def test_pasds_nets_load_and_run_together(pasd: dict[str, Path], variant: str) -> None:
    unet, controlnet = load_pasd_nets(pasd[variant])
    check_net(unet, PASDUNet, net_files(pasd[variant] / "unet"))
    check_net(controlnet, ControlNet, net_files(pasd[variant] / "controlnet"))
    x, t, context = torch.randn(1, 4, 4, 6), torch.tensor([500]), torch.randn(1, 77, 16)
    control = controlnet(x, t, context, torch.rand(1, 3, 32, 48))
    assert not torch.allclose(unet(x, t, context, control), unet(x, t, context))


@pytest.mark.parametrize(("variant", "kind"), [("full", "flat"), ("light", "ldm"), ("full", "hub")])
def test_pasd_on_another_base_has_its_own_additions_and_the_bases_rest(
    pasd: dict[str, Path], layouts: dict[str, Path], variant: str, kind: str
) -> None:
    unet, controlnet = load_pasd_nets(pasd[variant], layouts[kind])
    assert type(unet) is PASDUNet and asdict(unet.config)["variant"] == variant
    assert unet.config.attention_head_dim == 2
    found, own = unet.state_dict(), net_files(pasd[variant] / "unet")
    assert same(base_tensors(found), base_parts(layouts["flat"])["unet"])
    assert same(added_tensors(found), added_tensors(own)) and added_tensors(own)
    check_net(controlnet, ControlNet, net_files(pasd[variant] / "controlnet"))


def test_pasd_on_a_base_that_is_pasds_itself_keeps_its_own_additions(
    pasd: dict[str, Path], tmp_path: Path
) -> None:
    folder, own = Path(shutil.copytree(pasd["full"], tmp_path / "other")), net_files(pasd["full"] / "unet")
    halves = {key: tensor / 2 for key, tensor in own.items()}
    write_safetensors(folder / "unet" / "diffusion_pytorch_model.safetensors", halves)
    found = load_pasd_nets(pasd["full"], folder)[0].state_dict()
    assert same(found, base_tensors(halves) | added_tensors(own))


@pytest.mark.parametrize("variant", ["full", "light"])
def test_a_compact_export_needs_a_base(
    pasd: dict[str, Path], layouts: dict[str, Path], tmp_path: Path, variant: str
) -> None:
    own = net_files(pasd[variant] / "unet")
    compact = pack_delta(own, net_files(pasd[variant] / "controlnet"), torch.bfloat16)
    path = tmp_path / "compact.safetensors"
    write_safetensors(path, compact, {"config": '{"norm_num_groups": 4, "attention_head_dim": 2}'})
    with pytest.raises(WeightsError) as refused:
        load_pasd_nets(path)
    assert str(refused.value) == (
        f"{path}: what PASD adds to a U-Net, without the U-Net; give a Stable Diffusion 1.x model as base"
    )
    unet, controlnet = load_pasd_nets(path, layouts["ldm"])
    added = {key: tensor.bfloat16() for key, tensor in added_tensors(own).items()}
    assert asdict(unet.config)["variant"] == variant and same(added_tensors(unet.state_dict()), added)
    assert same(base_tensors(unet.state_dict()), base_parts(layouts["flat"])["unet"])
    control = net_files(pasd[variant] / "controlnet")
    check_net(controlnet, ControlNet, {key: tensor.bfloat16() for key, tensor in control.items()})


@pytest.mark.parametrize(("name", "variant"), [("mini-pasd", "full"), ("mini-pasd-color", "light")])
def test_a_compact_export_of_a_known_name_brings_its_base(name: str, variant: str) -> None:
    unet, controlnet = load_pasd_nets(name)
    assert asdict(unet.config)["variant"] == variant and asdict(controlnet.config)["to_rgb"]
    assert same(base_tensors(unet.state_dict()), base_parts(MINI)["unet"])
    assert all(
        same(net.state_dict(), other.state_dict())
        for net, other in zip((unet, controlnet), load_pasd_nets(name, "mini"), strict=True)
    )


def pasd_refusal(model: Path, base: Path | str | None = None) -> str:
    with pytest.raises(WeightsError) as refused:
        load_pasd_nets(model, base)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_pasd_refuses_what_does_not_go_together(
    pasd: dict[str, Path], layouts: dict[str, Path], tmp_path: Path
) -> None:
    assert "no controlnet there; it has unet, vae, text_encoder" in pasd_refusal(layouts["hub"])
    assert "no model is called 'nowhere'" in pasd_refusal(pasd["full"], "nowhere")
    folder = Path(shutil.copytree(pasd["full"], tmp_path / "plain"))
    shutil.copy(layouts["hub"] / "unet" / "diffusion_pytorch_model.safetensors", folder / "unet")
    assert "a U-Net without what PASD adds; expected one of PASD's" in pasd_refusal(folder, layouts["hub"])
    wide = UNet(type(UNET)(**{**vars(UNET), "block_out_channels": (8, 16)}))
    (tmp_path / "wide").mkdir()
    write_part(tmp_path / "wide", "unet", wide)
    line = pasd_refusal(pasd["full"], tmp_path / "wide")
    assert line.startswith(str(tmp_path / "wide" / "unet.safetensors")) and "has shape" in line


def test_pasd_with_numbers_that_are_not_finite_is_refused(pasd: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pasd["light"], tmp_path / "pasd"))
    path = folder / "controlnet" / "diffusion_pytorch_model.safetensors"
    state = {key: tensor.clone() for key, tensor in read_state_dict(path).items()}
    state["controlnet_mid_block.bias"][0] = float("nan")
    write_safetensors(path, state)
    assert "'controlnet_mid_block.bias' holds values that are not finite" in pasd_refusal(folder)


def test_a_spoilt_ldm_file_is_refused_by_key(layouts: dict[str, Path], tmp_path: Path) -> None:
    """Strictly, under canonical names: one tensor less, one too many, one of another shape."""
    parts = base_parts(layouts["flat"])
    shutil.copy(layouts["flat"] / "tokenizer.json", tmp_path)
    key = "mid_block.resnets.0.conv1.bias"
    less = {name: tensor for name, tensor in parts["unet"].items() if name != key}
    said = read_metadata(layouts["ldm"])
    for unet, more, reason in (
        (less, {}, f"1 tensors are missing, first {key!r}"),
        (parts["unet"], {"model.diffusion_model.extra.weight": torch.zeros(1)}, "1 tensors are unknown, first 'extra.weight'"),
        (parts["unet"] | {key: torch.zeros(3)}, {}, f"{key!r} has shape (3,), expected (8,)"),
        (parts["unet"], {"extra": torch.zeros(1)}, "1 tensors belong to no net"),
    ):  # fmt: skip
        write_safetensors(tmp_path / "x.safetensors", to_ldm(parts | {"unet": unet}) | more, said)
        assert reason in refusal(tmp_path / "x.safetensors")


# ---- restoring ---------------------------------------------------------------------------------------------

PIXELS = torch.linspace(-0.5, 0.5, 3 * 24 * 40).view(1, 3, 24, 40)


@pytest.fixture(scope="module")
def restorers(
    pasd: dict[str, Path], layouts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """One PASD: a folder with all it takes, the two nets alone, and what it added in one file."""
    root = tmp_path_factory.mktemp("restorers")
    whole = Path(shutil.copytree(layouts["hub"], root / "whole"))
    for part in ("unet", "controlnet"):
        shutil.copytree(pasd["full"] / part, whole / part, dirs_exist_ok=True)
    (root / "delta").mkdir()
    delta = pack_delta(
        net_files(pasd["full"] / "unet"), net_files(pasd["full"] / "controlnet"), torch.float32
    )
    said = {"norm_num_groups": 4, "attention_head_dim": 2, "guidance_scale": 1.5, "prompts": False}
    write_safetensors(root / "delta" / "x.safetensors", delta, {"config": json.dumps(said)})
    return {"whole": whole, "nets": pasd["full"], "delta": root / "delta" / "x.safetensors"}


@pytest.fixture(scope="module")
def other(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another base: the bundle's tensors, halved."""
    folder = Path(shutil.copytree(bundle, tmp_path_factory.mktemp("other") / "base"))
    for part in ("unet", "vae", "clip"):
        path = folder / f"{part}.safetensors"
        halves = {key: tensor / 2 for key, tensor in read_state_dict(path).items()}
        write_safetensors(path, halves, read_metadata(path))
    return folder


def parts_of(restorer: RestorePipeline) -> dict[str, dict[str, Tensor]]:
    nets: dict[str, Any] = {part: getattr(restorer, part) for part in ("unet", "vae", "text_encoder")}
    return {part: net.state_dict() for part, net in nets.items()}


def in_float32(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.float() for key, tensor in state.items()}


def restore_refusal(model: Path | str, **options: Any) -> str:
    with pytest.raises(WeightsError) as refused:
        load_restore_pipeline(model, **options)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_restorer_loads_with_its_own_parts(restorers: dict[str, Path], layouts: dict[str, Path]) -> None:
    restorer = load_restore_pipeline(restorers["whole"])
    own = net_files(restorers["whole"] / "unet")
    assert same(restorer.unet.state_dict(), own) and len(added_tensors(own)) > 0
    assert same(restorer.controlnet.state_dict(), net_files(restorers["whole"] / "controlnet"))
    base = base_parts(layouts["flat"])
    for part in ("vae", "text_encoder"):
        assert same(parts_of(restorer)[part], in_float32(base[part]))
    assert restorer.spec == RestoreSpec(512) and restorer.prediction_type == "epsilon"
    config = RestoreConfig(num_inference_steps=1, process_size=24)
    assert restorer(PIXELS, "a house", config=config, output_size=(24, 40)).image.shape == PIXELS.shape


@pytest.mark.parametrize("kind", ["whole", "nets", "delta"])
@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_a_base_takes_the_place_of_all_but_what_pasd_added(
    restorers: dict[str, Path], other: Path, kind: str, weight: float
) -> None:
    restorer = load_restore_pipeline(restorers[kind], base=other, base_weight=weight)
    found, theirs = parts_of(restorer), base_parts(other)
    own = net_files(restorers["whole"] / "unet")
    assert same(added_tensors(found["unet"]), added_tensors(own))
    assert same(restorer.controlnet.state_dict(), net_files(restorers["whole"] / "controlnet"))
    mine = {part: parts_of(load_restore_pipeline(restorers["whole"]))[part] for part in found}
    for part, state in found.items():
        state = base_tensors(state)
        # a model that lacks a part has the base's whole, whatever its share
        lacks = {"delta": ("unet", "vae", "text_encoder"), "nets": ("vae", "text_encoder")}.get(kind, ())
        share = 1.0 if part in lacks else weight
        for key, tensor in state.items():
            expected = torch.lerp(mine[part][key], theirs[part][key].float(), share)
            torch.testing.assert_close(tensor, expected, atol=1e-3, rtol=1e-3)


def test_a_base_of_weight_0_changes_nothing(restorers: dict[str, Path], other: Path) -> None:
    found = parts_of(load_restore_pipeline(restorers["whole"], base=other, base_weight=0.0))
    plain = parts_of(load_restore_pipeline(restorers["whole"]))
    assert all(same(found[part], plain[part]) for part in plain)


@pytest.mark.parametrize("kind", ["flat", "ldm", "hub"])
def test_a_base_may_come_in_any_layout(
    restorers: dict[str, Path], layouts: dict[str, Path], kind: str
) -> None:
    found = parts_of(load_restore_pipeline(restorers["nets"], base=layouts[kind]))
    for part, state in base_parts(layouts["flat"]).items():
        assert same(base_tensors(found[part]), in_float32(state)), part


def test_a_base_that_is_a_pasd_itself_gives_its_base(restorers: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(restorers["whole"], tmp_path / "other"))
    own = net_files(restorers["whole"] / "unet")
    halves = {key: tensor / 2 for key, tensor in own.items()}
    write_safetensors(folder / "unet" / "diffusion_pytorch_model.safetensors", halves)
    found = load_restore_pipeline(restorers["whole"], base=folder).unet.state_dict()
    assert same(found, base_tensors(halves) | added_tensors(own))


def test_loras_come_on_top_of_the_base(restorers: dict[str, Path], other: Path, tmp_path: Path) -> None:
    changes = write_lora(tmp_path / "style.safetensors", "unet", "text_encoder")
    plain = parts_of(load_restore_pipeline(restorers["whole"], base=other))
    styled = parts_of(
        load_restore_pipeline(restorers["whole"], base=other, loras=[(tmp_path / "style.safetensors", 0.7)])
    )
    for part, before in plain.items():
        changed = {key for key, tensor in before.items() if not torch.equal(tensor, styled[part][key])}
        assert changed == ({f"{CHANGED[part][0]}.weight"} if part in CHANGED else set())
        for key in changed:
            torch.testing.assert_close(
                styled[part][key], before[key] + 0.7 * changes[part], atol=2e-3, rtol=2e-3
            )


@pytest.mark.parametrize("kind", ["whole", "delta"])
@pytest.mark.parametrize("method", ["controlnet", "img2img"])
def test_the_baselines_run_on_the_bases_own_net(
    restorers: dict[str, Path], other: Path, kind: str, method: str
) -> None:
    restorer = load_restore_pipeline(restorers[kind], method=method, base=other)
    assert type(restorer.unet) is UNet
    assert same(restorer.unet.state_dict(), in_float32(base_parts(other)["unet"]))


def test_measures_are_what_the_files_say(restorers: dict[str, Path], bundle: Path) -> None:
    for kind, expected in (
        ("delta", RestoreSpec(32, 1.5, uses_prompts=False)),  # native of the base, the rest of the ControlNet
        ("nets", RestoreSpec(512)),
    ):
        assert load_restore_pipeline(restorers[kind], base=bundle).spec == expected
        assert restore_facts(restorers[kind], base=bundle).spec == expected


def test_measures_need_no_weights(
    restorers: dict[str, Path], other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load_restore_pipeline(restorers["whole"], base=other).spec
    monkeypatch.setattr("msbd.load.ModelParts", None)
    assert restore_facts(restorers["whole"], base=other).spec == expected


def test_a_restorer_that_predicts_v_is_told_so(
    restorers: dict[str, Path], copy: Path, tmp_path: Path
) -> None:
    whole = Path(shutil.copytree(restorers["whole"], tmp_path / "v"))
    settings = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    (whole / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings))
    restorer = load_restore_pipeline(whole)
    assert restorer.prediction_type == "v_prediction" and float(restorer.alphas_cumprod[-1]) == 2**-24
    assert type(restorer.unet) is PASDUNet  # the pipeline itself turns what it predicts into noise
    # The base below the official colour model predicts epsilon: its own layers make v of it.
    assert load_restore_pipeline(whole, base=copy).prediction_type == "v_prediction"
    set_config(copy / "unet.safetensors", prediction_type="v_prediction")
    assert load_restore_pipeline(whole, base=copy).prediction_type == "v_prediction"
    line = restore_refusal(restorers["whole"], base=copy)
    assert line == f"{copy}: predicts v_prediction, but {restorers['whole']} epsilon; take another base"


def test_what_cannot_be_a_base_is_refused(restorers: dict[str, Path], bundle: Path, tmp_path: Path) -> None:
    write_lora(tmp_path / "style.safetensors", "unet")
    for kind in ("whole", "delta"):
        line = restore_refusal(restorers[kind], base=tmp_path / "style.safetensors")
        assert "style.safetensors: a LoRA, which changes a model and is none; take it with --lora" in line
        line = restore_refusal(restorers[kind], base=bundle / "vae.safetensors")
        assert line.startswith(f"{bundle / 'vae.safetensors'}: no unet there; it has vae")
        assert "nowhere.safetensors: no such file" in restore_refusal(
            restorers[kind], base="/nowhere.safetensors"
        )
    (tmp_path / "wide").mkdir()
    write_part(tmp_path / "wide", "unet", UNet(type(UNET)(**{**vars(UNET), "block_out_channels": (8, 16)})))
    line = restore_refusal(restorers["whole"], base=tmp_path / "wide")
    assert line.startswith(f"{tmp_path / 'wide' / 'unet.safetensors'}: the model to blend in lacks")


@pytest.mark.parametrize("method", ["pasd", "controlnet"])
def test_a_method_without_its_controlnet_is_refused_at_once(bundle: Path, method: str) -> None:
    for refuse in (restore_refusal, measures_refusal):
        assert refuse(bundle, method=method).startswith(
            f"{bundle}: no controlnet there; it has unet, vae, clip, rrdb"
        )
    restorer = load_restore_pipeline(bundle, method="img2img")
    assert restorer.controlnet is None and type(restorer.unet) is UNet
    assert restore_facts(bundle, method="img2img").spec == RestoreSpec(32)


def measures_refusal(model: Path | str, **options: Any) -> str:
    with pytest.raises(WeightsError) as refused:
        restore_facts(model, **options)
    return str(refused.value)


def test_a_restorer_without_its_base_is_refused(restorers: dict[str, Path]) -> None:
    for kind, missing in (("nets", "vae"), ("delta", "unet")):
        for refuse in (restore_refusal, measures_refusal):
            assert f"{restorers[kind]}: no {missing} there" in refuse(restorers[kind])


def test_a_controlnet_of_another_model_is_refused(restorers: dict[str, Path], tmp_path: Path) -> None:
    whole = Path(shutil.copytree(restorers["whole"], tmp_path / "mixed"))
    sizes = {**vars(UNET), "conditioning_embedding_out_channels": (4, 4, 8, 8)}
    for change, reason in (
        ({"block_out_channels": (8, 16)}, r"residuals of widths \[8, 8, 8, 16\], but .* has \[8, 8, 8, 8\]"),
        ({"cross_attention_dim": 12}, "context width 12, but .* has 16"),
        ({"in_channels": 5}, "latent channels 5, but .* has 4"),
    ):
        net = ControlNet(ControlNetConfig(**{**sizes, **change}))
        write_safetensors(whole / "controlnet" / "diffusion_pytorch_model.safetensors", net.state_dict())
        with pytest.raises(
            WeightsError, match=rf"^{whole}/controlnet.*: {reason}; these files are not of one model$"
        ):
            load_restore_pipeline(whole)


def test_precision_is_as_in_editing(restorers: dict[str, Path]) -> None:
    restorer = load_restore_pipeline(restorers["whole"], dtype=torch.float16)
    assert dtype_of(restorer.unet) == dtype_of(restorer.controlnet) == torch.float16
    assert dtype_of(restorer.vae) == dtype_of(restorer.text_encoder) == torch.float32
    half = load_restore_pipeline(restorers["whole"], dtype=torch.bfloat16)
    assert dtype_of(half.vae) == torch.bfloat16
    result = half(PIXELS, config=RestoreConfig(num_inference_steps=1, process_size=24), output_size=(24, 40))
    assert result.image.dtype == torch.float32 and bool(result.image.isfinite().all())
    with pytest.raises(ValueError, match=r"torch\.int8"):
        load_restore_pipeline(restorers["whole"], dtype=torch.int8)


def test_a_known_name_takes_what_was_not_fetched_from_its_base(
    restorers: dict[str, Path], layouts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of pasd only its two nets: Stable Diffusion 1.5, and the small files beside it,
    come with the user's own base.
    """
    monkeypatch.setenv("MSBD_WEIGHTS", str(tmp_path))
    there = tmp_path / "yangtao9009" / "PASD" / "pasd" / "checkpoint-100000"
    for part in ("unet", "controlnet"):
        shutil.copytree(restorers["nets"] / part, there / part)
    assert "python -m tools.models fetch pasd" in restore_refusal("pasd")
    found = parts_of(load_restore_pipeline("pasd", base=layouts["ldm"]))
    expected = parts_of(load_restore_pipeline(restorers["nets"], base=layouts["ldm"]))
    assert all(same(found[part], expected[part]) for part in expected)
    assert (
        restore_facts("pasd", base=layouts["ldm"]).spec
        == restore_facts(restorers["nets"], base=layouts["ldm"]).spec
    )
    assert model_hash(locate("pasd", companions=True, optional=BASE_PARTS)) != model_hash(layouts["ldm"])
    shutil.rmtree(there / "controlnet")
    assert "python -m tools.models fetch pasd" in restore_refusal("pasd", base=layouts["ldm"])


@pytest.mark.parametrize(
    ("mode", "name", "variant"), [("sr", "mini-pasd", "full"), ("colorize", "mini-pasd-color", "light")]
)
def test_the_mini_bundle_has_a_restorer_for_each_mode(mode: str, name: str, variant: str) -> None:
    assert restorer_name("mini", mode) == name and restorer_name("pasd", "sr") == "pasd"
    measures = restore_facts("mini", mode=mode).spec
    assert measures.native == 128 and measures == restore_facts(name).spec
    unet: Any = load_restore_pipeline("mini", mode=mode).unet
    assert unet.config.variant == variant


# ---- each file once ----------------------------------------------------------------------------------------


class Counter:
    """How often a function was called for each file."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *places: str) -> None:
        self.calls: list[Path] = []
        for place in places:
            module, _, name = place.rpartition(".")
            real = getattr(importlib.import_module(module), name)
            monkeypatch.setattr(place, self._counted(real))

    def _counted(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Path, *args: Any, **options: Any) -> Any:
            self.calls.append(path)
            return real(path, *args, **options)

        return call


@pytest.fixture
def command(layouts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Pictures for a command, and CLIP and the upscaler on this machine; no hash is known yet."""
    files._sha256_of.cache_clear()
    put_companions(layouts["flat"], tmp_path / "weights", monkeypatch)
    write_lora(tmp_path / "style.safetensors", "unet", "text_encoder")
    pixels = torch.randint(0, 256, (40, 56, 3), dtype=torch.uint8).numpy()
    Image.fromarray(pixels).save(tmp_path / "in.png")
    Image.fromarray(pixels[..., 0] // 128 * 255).save(tmp_path / "mask.png")
    words = ["-i", tmp_path / "in.png", "-o", tmp_path / "out.png", "--device", "cpu", "--quiet"]
    return [str(word) for word in (*words, "--lora", f"{tmp_path / 'style.safetensors'}:1")]


READERS = ("weights.hub.read_state_dict", "msbd.loading.nets.read_state_dict")


@pytest.mark.parametrize("kind", ["flat", "ldm", "hub", "ckpt", "old"])
def test_an_edit_locates_reads_and_hashes_each_file_once(
    layouts: dict[str, Path], kind: str, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = layouts.get(kind)
    if model is None:
        model = tmp_path / "model.ckpt"
        state = {key: tensor.clone() for key, tensor in read_state_dict(layouts["ldm"]).items()}
        torch.save({"state_dict": state}, model, _use_new_zipfile_serialization=kind == "ckpt")
        shutil.copy(layouts["ldm"].parent / "tokenizer.json", tmp_path)
        (tmp_path / "config.json").write_text('{"attention_head_dim": 2, "norm_num_groups": 4}')
    located = Counter(monkeypatch, "weights.locate.locate", "msbd.load.locate")
    read, hashed = Counter(monkeypatch, *READERS), Counter(monkeypatch, "weights.files.sha256")
    more = ["-p", "a red house", "--steps", "1", "--repaint-steps", "0", "--no-decoder-optimization"]
    mask = ["-m", str(tmp_path / "mask.png"), "--first-stage-batch", "2", "--upscaling-mode", "rrdb"]
    assert edit_command([*command, *more, *mask, "--model", str(model)]) == 0
    assert located.calls == [str(model)]
    opened = sorted(read.calls)
    files = {
        file
        for part, files in locate(model, companions=True).files().items()
        for file in files
        if part != "tokenizer"
    }
    assert opened == sorted([*files, tmp_path / "style.safetensors"])
    assert len(hashed.calls) == len(set(hashed.calls)) >= len(files)


@pytest.mark.parametrize("kind", ["whole", "nets", "delta"])
def test_a_restoration_locates_reads_and_hashes_each_file_once(
    restorers: dict[str, Path], layouts: dict[str, Path], kind: str, command: list[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    model, base = restorers[kind], layouts["ldm"]
    located = Counter(monkeypatch, "weights.locate.locate", "msbd.load.locate")
    read, hashed = Counter(monkeypatch, *READERS), Counter(monkeypatch, "weights.files.sha256")
    more = ["--steps", "1", "--process-size", "24", "--base-weight", "0.5", "--high-level-info", "none"]
    assert restore_command([*command, *more, "--model", str(model), "--base", str(base)]) == 0
    assert located.calls == [str(model), str(base)]
    assert len(read.calls) == len(set(read.calls)) and base in read.calls
    assert len(hashed.calls) == len(set(hashed.calls)) and base in hashed.calls


def test_what_was_read_is_let_go_when_the_nets_are_built(layouts: dict[str, Path]) -> None:
    located = locate(layouts["ldm"], companions=True)
    assert located.contents("unet") is located.contents("vae")
    pipeline = load_edit_pipeline(located)
    again = load_edit_pipeline(located)
    x, t, context = torch.randn(1, 4, 4, 4), torch.tensor([500]), torch.randn(1, 77, 16)
    assert torch.equal(pipeline.unet(x, t, context), again.unet(x, t, context))


def test_training_writes_into_no_tensors_but_its_own(layouts: dict[str, Path]) -> None:
    located = locate(layouts["ldm"], companions=True)
    trained = load_training_parts(located).unet
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.fill_(7)
    again = load_training_parts(located).unet
    assert not any(bool((parameter == 7).all()) for parameter in again.parameters())
    assert all(bool((parameter == 7).all()) for parameter in trained.parameters())


@pytest.mark.parametrize("kind", ["flat", "ldm", "hub"])
def test_what_a_plan_asks_is_what_the_pipeline_has(layouts: dict[str, Path], kind: str) -> None:
    facts, pipeline = plan_facts(layouts[kind]), load_edit_pipeline(layouts[kind])
    assert facts.spec == pipeline.spec and facts.downscale == pipeline.vae.downscale
    assert torch.equal(facts.alphas_cumprod, pipeline.alphas_cumprod)
    assert facts.has_upscaler == (pipeline.upscaler is not None)


@pytest.mark.parametrize("kind", ["whole", "v", "nets", "delta"])
def test_what_a_restoration_plan_asks_is_what_the_pipeline_has(
    restorers: dict[str, Path], layouts: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    model, base = restorers.get(kind, tmp_path / "v"), None if kind in ("whole", "v") else layouts["ldm"]
    if kind == "v":  # another schedule than Stable Diffusion 1.x's
        shutil.copytree(restorers["whole"], model)
        settings = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
        (model / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings))
    facts, pipeline = restore_facts(model, base=base), load_restore_pipeline(model, base=base)
    assert facts.spec == pipeline.spec and facts.downscale == pipeline.vae.downscale
    assert torch.equal(facts.alphas_cumprod, pipeline.alphas_cumprod)
    config = RestoreConfig(num_inference_steps=3)
    ours, theirs = (
        plan_restore((20, 30), None, config, **vars(facts)),
        pipeline.plan((20, 30), None, config),
    )
    assert ours.a_a == theirs.a_a and ours.tiles == theirs.tiles and ours.padded_box == theirs.padded_box
