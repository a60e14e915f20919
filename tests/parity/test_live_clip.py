"""CLIP beside transformers' CLIPTextModel, CLIPVisionModel and CLIPModel: their weights and configs,
fresh inputs.

transformers 5 leaves the prefix `text_model.` or `vision_model.` out of the names of a half alone, in files
too; older versions, and the official files, have it.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from nets.clip import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel
from tests.helpers.goldens import relative_error
from tests.helpers.places import Place
from tests.helpers.seeded_nets import config_of
from tests.helpers.seeded_weights import load_seeded, seeded_input

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 3}
TEXT = {**SIZES, "vocab_size": 60, "max_position_embeddings": 20, "bos_token_id": 58, "eos_token_id": 59}
VISION = {**SIZES, "image_size": 21, "patch_size": 7, "num_attention_heads": 2}


def ids_of(length: int, vocabulary: int, seed: int) -> Tensor:
    """Random ids (3, length) whose largest, the end token, stands at the end, in the middle, and in both."""
    ids = torch.randint(0, vocabulary - 2, (3, length), generator=torch.Generator().manual_seed(seed))
    ids[0, -1] = ids[1, length // 2] = ids[2, length // 2] = ids[2, -1] = vocabulary - 1
    return ids


def text_pair(config: dict[str, Any], place: Place) -> tuple[Any, CLIPTextModel]:
    oracle = transformers.CLIPTextModel(transformers.CLIPTextConfig(**config)).eval()
    load_seeded(oracle, seed=41).to(place.oracle)
    ours = CLIPTextModel(config_of(CLIPTextConfig, config)).eval()
    ours.to(place.oracle).text_model.load_state_dict(oracle.state_dict(), strict=True)
    return oracle, ours.to(place.device, place.dtype)


@pytest.mark.parametrize("length", [1, 7, 20])
@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("eos", [2, 59])  # 2: the legacy value, the largest id of the row
def test_clip_text_equals_transformers(act: str, eos: int, length: int, place: Place) -> None:
    oracle, ours = text_pair({**TEXT, "hidden_act": act, "eos_token_id": eos}, place)
    ids = ids_of(length, 60, seed=length)
    expected = oracle(ids, output_hidden_states=True)
    penultimate = oracle.final_layer_norm(expected.hidden_states[-2])
    ids = ids.to(place.device)
    assert relative_error(ours(ids), expected.last_hidden_state) <= place.tolerance
    assert relative_error(ours.pooled(ids), expected.pooler_output) <= place.tolerance
    assert relative_error(ours(ids, clip_skip=1), penultimate) <= place.tolerance


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("size", [7, 21])
def test_clip_vision_equals_transformers(act: str, size: int, place: Place) -> None:
    config = {**VISION, "hidden_act": act, "image_size": size}
    oracle = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**config)).eval()
    load_seeded(oracle, seed=42).to(place.oracle)
    ours = CLIPVisionModel(config_of(CLIPVisionConfig, config)).eval()
    ours.to(place.oracle).vision_model.load_state_dict(oracle.state_dict(), strict=True)
    pixels = seeded_input("live.pixels", (2, 3, size, size), seed=43).to(place.oracle)
    expected = oracle(pixels)
    pixels = pixels.to(place.device, place.dtype)
    ours = ours.to(place.device, place.dtype)
    assert relative_error(ours(pixels), expected.last_hidden_state) <= place.tolerance
    assert relative_error(ours.pooled(pixels), expected.pooler_output) <= place.tolerance


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_clip_equals_transformers(act: str, place: Place) -> None:
    text, vision = {**TEXT, "hidden_act": act}, {**VISION, "hidden_act": act}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=10)
    oracle = transformers.CLIPModel(config).eval()
    load_seeded(oracle, seed=44).to(place.oracle)
    ours = CLIPModel(CLIPConfig(config_of(CLIPTextConfig, text), config_of(CLIPVisionConfig, vision), 10))
    ours.eval().to(place.oracle).load_state_dict(oracle.state_dict(), strict=True)
    ours, ids = ours.to(place.device, place.dtype), ids_of(13, 60, seed=45)
    pixels = seeded_input("live.pixels", (2, 3, 21, 21), seed=45).to(place.oracle)
    expected = oracle(input_ids=ids, pixel_values=pixels)
    image = torch.nn.functional.normalize(ours.encode_image(pixels.to(place.device, place.dtype)))
    text_embeds = torch.nn.functional.normalize(ours.encode_text(ids.to(place.device)))
    logits = ours.logit_scale.exp() * image @ text_embeds.T
    assert relative_error(image, expected.image_embeds) <= place.tolerance
    assert relative_error(text_embeds, expected.text_embeds) <= place.tolerance
    assert relative_error(logits, expected.logits_per_image) <= place.tolerance


@pytest.mark.full
def test_clip_text_equals_transformers_at_full_size() -> None:
    config = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "eos_token_id": 49407}
    oracle = transformers.CLIPTextModel(transformers.CLIPTextConfig(**config)).eval()
    ours = CLIPTextModel(config_of(CLIPTextConfig, config)).eval()
    ours.text_model.load_state_dict(oracle.state_dict(), strict=True)
    ids = ids_of(77, 49408, seed=46)
    expected = oracle(ids)
    assert relative_error(ours(ids), expected.last_hidden_state) <= 1e-4
    assert relative_error(ours.pooled(ids), expected.pooler_output) <= 1e-4
