"""msbd/restore/captions.py and msbd/loading/captions.py: what the nets say becomes text,
and files become the nets, or one clear line.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn

from msbd.loading.captions import KINDS, available, load_captioners
from msbd.pixels.preprocess import IMAGENET_MEAN, IMAGENET_STD, blip_pixels, imagenet_pixels
from msbd.restore.captions import (
    BLIP_PROMPT,
    Captioner,
    Classifier,
    Detector,
    Kind,
    caption,
    caption_ids,
    classify,
    describe,
    detect,
)
from tests.helpers.fake_hub import cache, empty_machine, put
from tests.helpers.goldens import load_golden, read_shapes, relative_error
from tests.helpers.seeded_nets import seeded_state
from tests.helpers.seeded_weights import shapes_of
from weights.fetch import weights_folder
from weights.files import WeightsError, write_safetensors
from weights.registry import MODELS

SIZES = [(1, 1), (1, 5000), (5000, 1), (3, 2), (64, 97), (224, 224), (300, 200)]
RESNET, DETECTOR = "resnet50-11ad3fa6.pth", "fasterrcnn_resnet50_fpn_v2_coco-dd69338a.pth"
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
GREY = torch.zeros(1, 3, 40, 60)


def picture(height: int, width: int, seed: int = 0) -> Tensor:
    """A random picture in [-1, 1] that is smooth over 8 pixels."""
    coarse = torch.rand(1, 3, -(-height // 8), -(-width // 8), generator=torch.Generator().manual_seed(seed))
    size = (height, width)
    return nn.functional.interpolate(coarse, size=size, mode="bicubic").clamp(0, 1) * 2 - 1


class Boxes:
    """A detector that finds what it is told to, and keeps what it was given."""

    def __init__(self, *found: tuple[int, float]) -> None:
        self.found = found
        self.seen = torch.empty(0)

    def __call__(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        (self.seen,) = images
        labels, scores = zip(*self.found, strict=True) if self.found else ((), ())
        return [{"labels": torch.tensor(labels), "scores": torch.tensor(scores)}]


NAMES = ["__background__", "person", "dog", "cat"]


# ---- preprocessing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(300, 200), (97, 64), (233, 231), (40, 159), (224, 500), (10, 13)])
def test_imagenet_pixels_are_torchvisions(size: tuple[int, int]) -> None:
    image = picture(*size)
    oracle = torchvision.models.ResNet50_Weights.IMAGENET1K_V2.transforms()(image / 2 + 0.5)
    torch.testing.assert_close(imagenet_pixels(image), oracle, atol=1e-5, rtol=0)


def test_imagenet_pixels_of_a_long_picture_are_nearly_torchvisions() -> None:
    image = picture(40, 640)  # of which 160 columns are kept
    oracle = torchvision.models.ResNet50_Weights.IMAGENET1K_V2.transforms()(image / 2 + 0.5)
    levels = (imagenet_pixels(image) - oracle).abs() * 255 * 0.225
    assert levels.mean() < 1 and levels.max() < 10
    assert torch.equal(imagenet_pixels(image[..., 240:400]), imagenet_pixels(image))


@pytest.mark.parametrize("size", SIZES)
def test_pixels_of_any_size(size: tuple[int, int]) -> None:
    white = torch.ones(1, 3, *size)
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    torch.testing.assert_close(
        imagenet_pixels(white), ((1 - mean) / std).view(1, 3, 1, 1).expand(1, 3, 224, 224)
    )
    out = blip_pixels(white, 32)
    assert out.shape == (1, 3, 32, 32) and torch.allclose(out, out[..., :1, :1])


@pytest.mark.parametrize("size", [(300, 200), (97, 64), (500, 480)])
def test_blip_pixels_are_transformers(size: tuple[int, int]) -> None:
    transformers = pytest.importorskip("transformers")
    image = picture(*size)
    eight_bits = ((image[0] / 2 + 0.5) * 255).round().to(torch.uint8)
    oracle = transformers.BlipImageProcessor()(eight_bits, return_tensors="pt")["pixel_values"]
    levels = (blip_pixels(eight_bits[None] / 127.5 - 1) - oracle).abs() * 255 * 0.27
    assert levels.max() <= 2 and levels.mean() <= 0.5  # it calculates in 8 bits


# ---- classification ----------------------------------------------------------------------------------------


def constant_classifier(logits: Sequence[float]) -> Classifier:
    return Classifier(lambda pixels: torch.tensor([logits]), ["tench", "goldfish", "shark"])


def test_the_likeliest_class_is_named() -> None:
    assert classify(GREY, constant_classifier([0.0, 2.0, 1.0])) == "goldfish"
    assert classify(GREY, constant_classifier([0.0, 2.0, 3.0])) == "shark"


def test_an_unsure_classifier_says_nothing() -> None:
    model = constant_classifier([0.0, 0.1, 0.0])  # 0.356
    assert classify(GREY, model, threshold=0.35) == "goldfish"
    assert classify(GREY, model, threshold=0.36) == ""
    assert classify(GREY, constant_classifier([float("nan")] * 3)) == ""
    thousand = Classifier(lambda pixels: torch.zeros(1, 1000), ["x"] * 1000)
    assert classify(GREY, thousand) == "", "0.001 is below the official 0.1"


@pytest.mark.parametrize("size", SIZES)
def test_a_classifier_sees_its_own_size(size: tuple[int, int]) -> None:
    seen: list[tuple[int, ...]] = []
    model = Classifier(lambda pixels: (seen.append(tuple(pixels.shape)), torch.ones(1, 1))[1], ["x"])
    assert classify(torch.zeros(1, 3, *size, dtype=torch.float16), model) == "x"
    assert seen == [(1, 3, 224, 224)]


# ---- detection ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "found, text",
    [
        ([(2, 0.9), (1, 0.95), (2, 0.6)], "2 dog, 1 person"),
        ([(1, 0.6), (2, 0.7), (3, 0.9)], "1 cat, 1 dog, 1 person"),
        ([(1, 0.9), (2, 0.5), (3, 0.49)], "1 person, 1 dog"),
        ([(1, 0.4)], ""),
        ([], ""),
    ],
)
def test_objects_are_counted(found: list[tuple[int, float]], text: str) -> None:
    assert detect(GREY, Detector(Boxes(*found), NAMES)) == text


def test_the_threshold_can_be_the_official_one() -> None:
    model = Detector(Boxes((1, 0.3), (2, 0.2)), NAMES)
    assert detect(GREY, model, threshold=0.25) == "1 person" and detect(GREY, model) == ""


def test_a_detector_sees_the_whole_picture_from_0_to_1() -> None:
    net = Boxes()
    image = picture(33, 47)
    detect(image, Detector(net, NAMES))
    torch.testing.assert_close(net.seen, image[0] / 2 + 0.5)


@pytest.mark.parametrize(
    "size, seen",
    [((1, 1), (1, 1)), ((1, 1000), (1, 1000)), ((1, 5000), (5, 5000)), ((5000, 1), (5000, 5))],
)
def test_a_detector_gets_no_picture_that_it_would_make_empty(
    size: tuple[int, int], seen: tuple[int, int]
) -> None:
    net = Boxes()
    detect(torch.ones(1, 3, *size), Detector(net, NAMES))
    assert net.seen.shape == (3, *seen) and 1333 / max(seen) * min(seen) >= 1
    torch.testing.assert_close(net.seen, torch.ones_like(net.seen))


# ---- captions ----------------------------------------------------------------------------------------------

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "picture", "of", "dog", "bench", "on", "##es"]


def word_tokenizer() -> Tokenizer:
    """As BLIP's: WordPiece with BERT's frame."""
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.add_special_tokens(WORDS[:4])
    return tokenizer


class Speaker:
    """Continues any prompt with the words it is told to say, as BLIP's `generate` does."""

    def __init__(self, said: list[int]) -> None:
        self.said = said
        self.asked: dict[str, Any] = {}
        self.pixels = torch.empty(0)

    def generate(self, pixels: Tensor, **asked: Any) -> Tensor:
        self.pixels, self.asked = pixels, asked
        begin = asked["input_ids"][:, :-1].clone()
        begin[:, 0] = 99  # a start token that the tokenizer does not know
        return torch.cat([begin, torch.tensor([[*self.said, 3]])], dim=1)


def speaking(said: list[int], size: int = 32) -> Captioner:
    tokenizer = word_tokenizer()
    return Captioner(
        Speaker(said),
        lambda text: tokenizer.encode(text).ids,
        lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
        size,
    )


def test_a_caption_is_without_the_prompt_and_special_tokens() -> None:
    model = speaking([4, 7, 9, 8, 10])
    assert caption(picture(20, 30), model) == "a dog on benches"
    assert model.net.asked["input_ids"].tolist() == [[2, 4, 5, 6, 3]], BLIP_PROMPT
    assert caption(GREY, speaking([4, 5, 6, 4, 7])) == "a picture of a dog", "said by the net itself"
    assert caption(GREY, speaking([])) == ""


def test_captions_are_asked_for_as_the_official_code_does() -> None:
    model = speaking([7])
    caption(picture(20, 30), model)
    model.net.asked.pop("input_ids")
    assert model.net.asked == {"num_beams": 3, "min_length": 10, "max_length": 30, "do_sample": False}
    torch.testing.assert_close(model.net.pixels, blip_pixels(picture(20, 30), 32))


# ---- together ----------------------------------------------------------------------------------------------

EVERY: dict[Kind, Any] = {
    "caption": speaking([4, 7]),
    "detection": Detector(Boxes((2, 0.9)), NAMES),
    "classification": constant_classifier([0.0, 2.0, 1.0]),
}


@pytest.mark.parametrize(
    "kinds, pieces",
    [
        (KINDS, ["goldfish", "1 dog", "a dog"]),
        (("caption", "classification", "caption"), ["goldfish", "a dog"]),
        (("detection",), ["1 dog"]),
        ((), []),
    ],
)
def test_the_pieces_come_in_one_order(kinds: Sequence[Kind], pieces: list[str]) -> None:
    assert describe(GREY, kinds, EVERY) == pieces


@pytest.mark.parametrize("size", SIZES)
def test_any_picture_can_be_described(size: tuple[int, int]) -> None:
    assert describe(torch.zeros(1, 3, *size), KINDS, EVERY) == ["goldfish", "1 dog", "a dog"]


def test_nets_that_are_sure_of_nothing_give_no_piece() -> None:
    unsure: dict[Kind, Any] = {"detection": Detector(Boxes(), NAMES), "caption": speaking([])}
    assert describe(GREY, ("detection", "caption"), unsure) == []


def test_describing_draws_nothing_and_keeps_the_picture() -> None:
    image = picture(30, 40)
    before, state = image.clone(), torch.get_rng_state()
    describe(image, KINDS, EVERY)
    assert torch.equal(image, before) and torch.equal(state, torch.get_rng_state())


def test_what_was_not_loaded_and_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^detection: not among the loaded models \(caption\)"):
        describe(GREY, ("detection",), {"caption": EVERY["caption"]})
    for shape in [(3, 8, 8), (2, 3, 8, 8), (1, 1, 8, 8), (1, 3, 0, 8)]:
        with pytest.raises(ValueError, match=r"expected \(1, 3, H, W\)"):
            describe(torch.zeros(shape), (), {})


# ---- files -------------------------------------------------------------------------------------------------


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without weights, on which a socket fails the test."""
    empty_machine(tmp_path, monkeypatch, sockets=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("MSBD_WEIGHTS", str(tmp_path / "weights"))
    (tmp_path / "weights").mkdir()
    return tmp_path


def small_resnet(weights: None = None) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 1000))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """A net of one layer in ResNet-50's place; its weights make the green pictures class 7,
    and others class 9.
    """
    monkeypatch.setattr(torchvision.models, "resnet50", small_resnet)
    state = {"2.weight": torch.zeros(1000, 3), "2.bias": torch.full((1000,), -20.0)}
    state["2.weight"][7] = torch.tensor([-1.0, 9.0, -1.0])
    state["2.bias"][7], state["2.bias"][9] = 0, 5
    return state


GREEN = torch.tensor([-1.0, 1.0, -1.0]).view(1, 3, 1, 1).expand(1, 3, 50, 40)


@pytest.mark.parametrize("place", ["weights", "torch/hub/checkpoints"])
def test_a_classifier_is_found_and_names_what_it_sees(
    place: str, machine: Path, small: dict[str, Tensor]
) -> None:
    assert available() == ()
    (machine / place).mkdir(parents=True, exist_ok=True)
    torch.save(small, machine / place / RESNET)
    assert available() == ("classification",)
    state = torch.get_rng_state()
    loaded = load_captioners(("classification", "classification"))
    assert torch.equal(state, torch.get_rng_state()), "loading draws from nobody's stream"
    names = torchvision.models.ResNet50_Weights.IMAGENET1K_V2.meta["categories"]
    assert describe(GREEN, ("classification",), loaded) == [names[7]]
    assert describe(-GREEN, ("classification",), loaded) == [names[9]]
    net = loaded["classification"].net
    assert not net.training and not any(p.requires_grad for p in net.parameters())


def refusal(kind: Kind) -> str:
    with pytest.raises((WeightsError, ImportError)) as refused:
        load_captioners((kind,))
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    "kind, name, size",
    [
        ("classification", "resnet50", "103 MB"),
        ("detection", "fasterrcnn-resnet50-v2", "175 MB"),
        ("caption", "blip-base", "991 MB"),
    ],
)
def test_missing_weights_are_said_with_the_places_and_the_way_out(
    kind: Kind, name: str, size: str, machine: Path
) -> None:
    said = refusal(kind)
    assert said.startswith(f"{kind}: {name} is not on this machine (looked in {weights_folder()}, ")
    assert f"{machine / 'torch/hub/checkpoints'})" in said
    assert f"`python -m tools.models fetch {name}` ({size}), or go without {kind}" in said
    assert load_captioners(()) == {} and available() == ()


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^'pose': no kind .*expected classification, detection, caption$"):
        load_captioners(("pose",))  # pyright: ignore[reportArgumentType]


def test_files_that_are_none_of_this_net_are_refused(machine: Path, small: dict[str, Tensor]) -> None:
    path = machine / "weights" / RESNET
    for state, said in [
        ({**small, "fc.bias": torch.zeros(3)}, "not the weights of this net .*fc.bias"),
        ({"2.bias": small["2.bias"]}, "not the weights of this net .*2.weight"),
        ({**small, "2.bias": torch.zeros(10)}, r"not the weights of this net .*2\.bias"),
        ({**small, "2.bias": torch.full((1000,), float("nan"))}, "'2.bias' holds values that are not finite"),
    ]:
        torch.save(state, path)
        with pytest.raises(WeightsError, match=said) as refused:
            load_captioners(("classification",))
        assert str(refused.value).startswith(f"{path}: ") and "\n" not in str(refused.value)
    path.write_text("<!DOCTYPE html>")
    assert "a web page" in refusal("classification")


def test_a_library_that_is_missing_or_broken_is_said(
    machine: Path, small: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (RESNET, DETECTOR):
        torch.save(small, machine / "weights" / name)
    put_blip({"x": torch.zeros(1)})

    def broken(*_: object) -> None:
        raise RuntimeError("operator torchvision::nms does not exist\nmore of it")

    monkeypatch.setattr(torchvision.ops, "nms", broken)
    assert refusal("detection") == (
        "detection: torchvision cannot be used (operator torchvision::nms does not exist); install the torchvision that goes with "
        "this torch"
    )
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert refusal("classification").startswith("classification: torchvision cannot be used (import of ")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert '`pip install -e ".[captions]"`' in refusal("caption")


# ---- torchvision's nets in full ----------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize("device", DEVICES)
def test_resnet50_from_its_file_equals_the_golden(
    machine: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    golden = load_golden("metrics", "resnet50")
    state = seeded_state(golden.meta["weights"])
    torch.save(state, machine / "weights" / RESNET)
    model = load_captioners(("classification",), device)["classification"]
    assert shapes_of(model.net) == read_shapes("resnet50_torchvision")
    assert relative_error(model.net(golden["in.x"].to(device)), golden["out.logits"]) <= (
        1e-4 if device == "cpu" else 1e-3
    )
    # The classes of such weights are all unsure; a bias makes one certain.
    assert classify(GREEN, model) == ""
    model.net.fc.bias[207] += 100
    assert classify(GREEN, model) == "golden retriever"


@pytest.mark.full
@pytest.mark.parametrize("device", DEVICES)
def test_the_detector_from_its_file_counts_through_torchvisions_operators(machine: Path, device: str) -> None:
    net = torchvision.models.detection.fasterrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None)
    state = net.state_dict()
    for tensor in state.values():
        if tensor.ndim > 1:
            tensor.normal_(std=tensor[0].numel() ** -0.5)
    for name in ("cls_score.weight", "bbox_pred.weight", "bbox_pred.bias"):  # the boxes are the proposals
        state[f"roi_heads.box_predictor.{name}"].zero_()
    bias = state["roi_heads.box_predictor.cls_score.bias"].fill_(-20.0)
    bias[18], bias[17] = 1.0, 0.0  # dog 0.73, cat 0.27
    write_safetensors(machine / "weights" / DETECTOR, state)
    assert available() == ("detection",)
    model = load_captioners(("detection",), device)["detection"]
    model.net.transform.min_size = (96,)
    model.net.rpn._post_nms_top_n["testing"] = 40  # proposals, for speed
    dogs = detect(picture(48, 64), model)
    count, name = dogs.split(" ")
    assert name == "dog" and 1 < int(count) <= 40
    assert detect(picture(48, 64), model, threshold=0.2) == f"{dogs}, {count} cat"
    assert detect(picture(1, 3000), model, threshold=0.8) == ""


# ---- transformers' BLIP ------------------------------------------------------------------------------------


def blip_state() -> dict[str, Tensor]:
    """The golden's weights under the names of an old file."""
    state = seeded_state(load_golden("blip", "tiny_a").meta["weights"])
    decoder = "text_decoder.cls.predictions"
    state[f"{decoder}.bias"] = state[f"{decoder}.decoder.bias"]
    state["text_decoder.bert.embeddings.position_ids"] = torch.arange(32)[None]
    return state


def put_blip(state: dict[str, Tensor], name: str = "blip-base") -> dict[str, Path]:
    """A BLIP of the golden's sizes in the weights folder: part -> file."""
    meta = load_golden("blip", "tiny_a").meta
    text = {**meta["text_config"], "tie_word_embeddings": False}
    config = {"text_config": text, "vision_config": meta["vision_config"], "tie_word_embeddings": False}
    paths = {file.part: weights_folder() / str(file.repo) / file.file for file in MODELS[name].files}
    put(paths["caption_config"], json.dumps(config).encode())
    put(paths["caption_tokenizer"], word_tokenizer().to_str().encode())
    if paths["caption"].suffix == ".bin":
        torch.save(state, paths["caption"])
    else:
        write_safetensors(paths["caption"], state)
    return paths


def test_blip_from_the_hubs_cache_equals_the_golden(machine: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    for (_, path), file in zip(put_blip(blip_state()).items(), MODELS["blip-base"].files, strict=True):
        cache(file, path.read_bytes())
        path.unlink()
    assert available() == ("caption",)
    state = torch.get_rng_state()
    model = load_captioners(("caption",))["caption"]
    assert torch.equal(state, torch.get_rng_state())
    assert capfd.readouterr() == ("", ""), "only tools/ prints"
    golden = load_golden("blip", "tiny_a")
    pixels = golden["in.pixel_values"]
    with torch.no_grad():
        logits = model.net(pixel_values=pixels, input_ids=golden["in.ids"]).logits
    assert relative_error(logits, golden["out.logits"]) <= 1e-5
    for beams, name in ((1, "out.generated_greedy"), (3, "out.generated_beam3")):
        ids = caption_ids(model.net, pixels, beams=beams, min_length=0, max_length=9)
        assert torch.equal(ids, golden[name])
    assert model.size == 32
    asked = torch.tensor([model.encode(BLIP_PROMPT)] * 2)
    ids = caption_ids(model.net, pixels, asked)
    assert ids[:, :4].tolist() == [[118, 4, 5, 6]] * 2 and 10 <= ids.shape[1] <= 30


@pytest.mark.parametrize("device", DEVICES)
def test_blip_captions_a_picture_of_any_size(machine: Path, device: str) -> None:
    pytest.importorskip("transformers")
    state = blip_state()
    bias = torch.full((120,), -50.0)  # which decides: "dog", until the shortest length allows to end
    bias[7], bias[102] = 50.0, 90.0
    for name in ("bias", "decoder.bias"):
        state[f"text_decoder.cls.predictions.{name}"] = bias
    put_blip(state, "blip-large")
    model = load_captioners(("caption",), device)["caption"]
    for size in [(1, 1), (50, 70)]:
        assert caption(torch.zeros(1, 3, *size), model) == "dog dog dog dog dog dog"


def test_a_blip_that_does_not_fit_is_refused(machine: Path) -> None:
    pytest.importorskip("transformers")
    name, state = "vision_model.post_layernorm.weight", blip_state()
    put_blip({key: tensor for key, tensor in state.items() if key != name})
    assert f"not the weights of this net, first '{name}'" in refusal("caption")
    put_blip({**state, "text_decoder.odd": torch.zeros(3)})
    assert "not the weights of this net, first 'text_decoder.odd'" in refusal("caption")
    put_blip({**state, name: torch.zeros(3)})
    assert "transformers makes no BLIP of it (" in refusal("caption")


def test_damaged_files_of_blip_are_refused(machine: Path) -> None:
    pytest.importorskip("transformers")
    paths = put_blip(blip_state())
    put(paths["caption_tokenizer"], b"{}")
    assert "the tokenizers library cannot read it (" in refusal("caption")
    put(paths["caption_config"], json.dumps({"text_config": {"hidden_size": 7}}).encode())
    assert "transformers makes no BLIP of it (" in refusal("caption")
    put(paths["caption"], b"nothing")
    assert "not a weights file" in refusal("caption")
