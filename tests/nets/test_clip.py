"""CLIP against stored reference outputs, and what holds for any of its sizes."""

import dataclasses
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from nets.clip import (
    CLIP_VIT_L14,
    SD15_TEXT,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
)
from tests.helpers.goldens import load_golden, read_shapes, relative_error
from tests.helpers.seeded_nets import seeded_clip, seeded_text
from tests.helpers.seeded_weights import load_seeded, seeded_input, shapes_of

TEXT = CLIPTextConfig(
    vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
    max_position_embeddings=12, hidden_act="gelu", eos_token_id=5,
)  # fmt: skip
VISION = CLIPVisionConfig(
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=12,
    patch_size=4,
)
SMALL = CLIPConfig(TEXT, VISION, projection_dim=8)


def small_text(**changes: Any) -> CLIPTextModel:
    model = CLIPTextModel(dataclasses.replace(TEXT, **changes)).eval()
    load_seeded(model, seed=3)
    return model


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield
    gc.collect()


def compare_text(case: str, tolerance: float) -> None:
    golden = load_golden("clip_text", case)
    model, ids = seeded_text(golden.meta), golden["in.ids"]
    assert relative_error(*golden.sampled("out.last_hidden_state", model(ids))) <= tolerance
    assert relative_error(*golden.sampled("out.penultimate_ln", model(ids, clip_skip=1))) <= tolerance
    assert relative_error(model.pooled(ids), golden["out.pooled"]) <= tolerance


def test_clip_text_equals_reference_when_tiny() -> None:
    compare_text("tiny_quick_gelu", 1e-5)


@pytest.mark.full
def test_clip_text_equals_reference_at_full_size() -> None:
    compare_text("full_vitl14", 1e-4)


def test_clip_text_has_the_reference_epsilon() -> None:
    golden = load_golden("clip_text", "tiny_eps_sensitive")
    out = seeded_text(golden.meta)(golden["in.ids"])
    torch.testing.assert_close(out, golden["out.last_hidden_state"], rtol=0, atol=2e-6)


def test_clip_equals_reference_when_tiny() -> None:
    golden = load_golden("clip_full", "tiny")
    model = seeded_clip(golden.meta)
    image = F.normalize(model.encode_image(golden["in.pixel_values"]))
    text = F.normalize(model.encode_text(golden["in.ids"]))
    assert relative_error(image, golden["out.image_embeds_normed"]) <= 1e-5
    assert relative_error(text, golden["out.text_embeds_normed"]) <= 1e-5
    assert relative_error(model.logit_scale.exp() * image @ text.T, golden["out.logits_per_image"]) <= 1e-5


@pytest.mark.full
def test_clip_equals_reference_at_full_size() -> None:
    golden = load_golden("clip_full", "vitl14_a")
    model = seeded_clip(golden.meta)
    cases = [name.split("/") for name in golden.meta["pixel_values_from"]]
    pixels = torch.cat([load_golden(family, case)["out.pixel_values"] for family, case in cases])
    image, text = model.encode_image(pixels), model.encode_text(golden["in.ids"])
    image_normed, text_normed = F.normalize(image), F.normalize(text)
    cosine = image_normed @ text_normed.T
    assert relative_error(text, golden["out.text_features"]) <= 1e-4
    assert relative_error(image, golden["out.image_features"]) <= 1e-4
    assert relative_error(text_normed, golden["out.text_embeds_normed"]) <= 1e-4
    assert relative_error(image_normed, golden["out.image_embeds_normed"]) <= 1e-4
    assert relative_error(cosine, golden["out.cosine"]) <= 1e-4
    assert relative_error(model.logit_scale.exp() * cosine, golden["out.logits_per_image"]) <= 1e-4
    states, pooled = model.vision_model(pixels), model.vision_model.pooled(pixels)
    assert relative_error(pooled, golden["out.vision_pooled"]) <= 1e-4
    assert relative_error(states[:, :8], golden["out.vision_last_hidden_slice"]) <= 1e-4


@pytest.mark.parametrize(
    ("model", "config", "manifest"),
    [(CLIPModel, CLIP_VIT_L14, "clip_vitl14_hf"), (CLIPTextModel, SD15_TEXT, "clip_text_vitl14_hf")],
)
def test_clip_keys_and_shapes_are_those_of_the_official_file(model: Any, config: Any, manifest: str) -> None:
    with torch.device("meta"):
        net = model(config)
    expected = read_shapes(manifest)
    assert shapes_of(net) == {k: v for k, v in expected.items() if not k.endswith("position_ids")}


def test_clip_built_on_meta_equals_clip_built_on_cpu() -> None:
    model = CLIPModel(SMALL).eval()
    with torch.device("meta"):
        other = CLIPModel(SMALL)
    other.load_state_dict(model.state_dict(), strict=True, assign=True)
    pixels, ids = seeded_input("pixels", (2, 3, 12, 12), seed=1), torch.tensor([[4, 9, 30, 5, 5, 5]])
    assert not list(other.buffers())
    assert torch.equal(other.eval().encode_image(pixels), model.encode_image(pixels))
    assert torch.equal(other.encode_text(ids), model.encode_text(ids))


def test_clip_halves_alone_equal_the_halves_of_the_whole() -> None:
    whole = CLIPModel(SMALL).eval()
    text, vision = CLIPTextModel(TEXT).eval(), CLIPVisionModel(VISION).eval()
    text.load_state_dict({k: v for k, v in whole.state_dict().items() if k.startswith("text_model.")})
    vision.load_state_dict({k: v for k, v in whole.state_dict().items() if k.startswith("vision_model.")})
    pixels, ids = seeded_input("pixels", (2, 3, 12, 12), seed=1), torch.tensor([[4, 9, 30, 5, 5, 5]])
    assert torch.equal(whole.text_projection(text.pooled(ids)), whole.encode_text(ids))
    assert torch.equal(whole.visual_projection(vision.pooled(pixels)), whole.encode_image(pixels))
    assert vision(pixels).shape == (2, 1 + 9, 16)


def test_clip_text_is_causal() -> None:
    model, ids = small_text(), torch.tensor([[4, 9, 30, 11, 5]])
    changed = ids.clone()
    changed[0, 3] = 12
    out, other = model(ids), model(changed)
    torch.testing.assert_close(out[:, :3], other[:, :3])
    assert not torch.allclose(out[:, 3:], other[:, 3:])


@pytest.mark.parametrize(("eos", "positions"), [(5, [2, 3]), (2, [1, 0])])
def test_clip_text_pools_at_the_first_end_token(eos: int, positions: list[int]) -> None:
    """eos 2 is the legacy value and means the largest id."""
    model, ids = small_text(eos_token_id=eos), torch.tensor([[4, 30, 5, 5, 30], [49, 3, 9, 5, 30]])
    out = model(ids)
    assert torch.equal(model.pooled(ids), torch.stack([out[0, positions[0]], out[1, positions[1]]]))


def test_clip_text_skips_its_last_layers() -> None:
    model, ids = small_text(), torch.tensor([[4, 9, 30, 11, 5]])
    shorter = CLIPTextModel(dataclasses.replace(TEXT, num_hidden_layers=1)).eval()
    shorter.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(model(ids, clip_skip=2), shorter(ids))
    assert not torch.allclose(model(ids), shorter(ids))


def test_clip_text_activation_follows_its_config() -> None:
    ids = torch.tensor([[4, 9, 30, 11, 5]])
    exact, quick = small_text()(ids), small_text(hidden_act="quick_gelu")(ids)
    assert 1e-4 < (exact - quick).abs().max().item() < 0.2  # quick GELU is within 0.021 of GELU


@pytest.mark.parametrize("clip_skip", [-1, 3])
def test_clip_text_refuses_to_skip_every_layer(clip_skip: int) -> None:
    with pytest.raises(ValueError, match="clip_skip"):
        small_text()(torch.tensor([[4, 5]]), clip_skip=clip_skip)


def test_clip_text_refuses_a_sequence_that_is_too_long() -> None:
    with pytest.raises(ValueError, match="up to 12"):
        small_text()(torch.zeros(1, 13, dtype=torch.long))


def test_clip_vision_refuses_another_picture_size() -> None:
    with pytest.raises(ValueError, match=r"\(12, 12\)"):
        CLIPVisionModel(VISION)(torch.zeros(1, 3, 12, 16))


@pytest.mark.parametrize(
    ("changes", "message"), [({"hidden_act": "relu"}, "hidden_act"), ({"num_attention_heads": 3}, "divisor")]
)
def test_clip_config_refuses_what_it_cannot_build(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TEXT, **changes)


def test_clip_file_runs_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(__file__).parents[2] / "nets" / "clip.py"
    (tmp_path / "clip_alone.py").write_text(source.read_text())
    monkeypatch.syspath_prepend(tmp_path)
    module = __import__("clip_alone")
    config = module.CLIPTextConfig(
        vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    assert module.CLIPTextModel(config)(torch.zeros(1, 4, dtype=torch.long)).shape == (1, 4, 8)
