"""High-level information of a degraded picture, as text: what it shows, which objects are in it, a caption.

Paper    Yang et al. 2023 (PASD), arXiv:2308.14469, section 3.4: ResNet, YOLO and BLIP see the low-quality
         picture, and the U-Net reads what they say. The official code uses one of them at a time; here any
         combination
Tensors  image (1, 3, H, W) in [-1, 1], any size from 1 x 1; pixels as each net wants them
Weights  none here: loading/captions.py makes the models. A torchvision Faster R-CNN takes YOLO's place (why:
         there)
Copying  needs pixels/preprocess.py, pixels/resize.py
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..pixels.preprocess import blip_pixels, imagenet_pixels, zero_to_one
from ..pixels.resize import resize

Kind = Literal["classification", "detection", "caption"]

# How every caption began that BLIP was trained on (Li et al. 2022, arXiv:2201.12086).
BLIP_PROMPT = "a picture of"


@dataclass(frozen=True)
class Classifier:
    """Names what a picture shows."""

    net: Callable[[Tensor], Tensor]  # (1, 3, 224, 224), normalised as for ImageNet -> logits (1, classes)
    categories: Sequence[str]  # names of the classes
    device: torch.device = torch.device("cpu")  # where the net is


@dataclass(frozen=True)
class Detector:
    """Finds objects."""

    net: Callable[[list[Tensor]], list[dict[str, Tensor]]]  # [(3, H, W) in [0, 1]] -> [{"labels", "scores"}]
    categories: Sequence[str]  # names of the labels
    device: torch.device = torch.device("cpu")


@dataclass(frozen=True)
class Captioner:
    """Writes a caption: a BLIP of transformers and its tokenizer."""

    net: Any  # .generate(pixels, input_ids=..., ...) -> ids
    # With a start token, which the net replaces, and an end token, which it drops.
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]  # without special tokens
    size: int = 384  # pixels, side of the square that the net sees
    device: torch.device = torch.device("cpu")


def describe(image: Tensor, kinds: Sequence[Kind], models: Mapping[Kind, Any]) -> list[str]:
    """What the models of `kinds` say of `image` (1, 3, H, W) in [-1, 1]: class, detections, caption, in this
    order.

    `models` is what `loading.captions.load_captioners` gives. A net that is sure of nothing gives no piece.
    ValueError for a kind that is unknown or not loaded, or a picture of another shape.
    """
    if image.ndim != 4 or image.shape[:2] != (1, 3) or 0 in image.shape:
        raise ValueError(f"a picture of shape {tuple(image.shape)}; expected (1, 3, H, W)")
    for kind in kinds:
        if kind not in models:
            raise ValueError(f"{kind}: not among the loaded models ({', '.join(models) or 'none'}); load it")
    tell: dict[Kind, Callable[[Tensor, Any], str]]
    tell = {"classification": classify, "detection": detect, "caption": caption}
    pieces = [function(image, models[kind]) for kind, function in tell.items() if kind in kinds]
    return [piece for piece in pieces if piece]


@torch.no_grad()
def classify(image: Tensor, model: Classifier, *, threshold: float = 0.1) -> str:
    """The likeliest class of `image` (1, 3, H, W) in [-1, 1]; "" if its probability is below `threshold`."""
    logits = model.net(imagenet_pixels(image).to(model.device))
    probability, index = logits[0].float().softmax(0).max(0)
    return model.categories[int(index)] if probability >= threshold else ""


@torch.no_grad()
def detect(image: Tensor, model: Detector, *, threshold: float = 0.5) -> str:
    """How many objects of which class are in `image` (1, 3, H, W) in [-1, 1]: "2 dog, 1 person", or "".

    The commonest first, equally common ones by their best score. Singular, as the official code has it:
    English plurals follow no rule for half of COCO's names (people, mice, sheep, skis). `threshold`: at 0.5
    an object is likelier than all else together; the official 0.25 is YOLO's, whose scores are no
    probabilities, and a wrong word in a prompt costs more than a missing one.
    """
    # The net itself makes the longer side 1333 at most; its other side must have a pixel left then.
    height, width = image.shape[-2:]
    image = resize(
        image.float(), (max(height, math.ceil(width / 1000)), max(width, math.ceil(height / 1000)))
    )
    found = model.net([zero_to_one(image)[0].to(model.device)])[0]
    scores: dict[str, list[float]] = {}
    for label, score in zip(found["labels"].tolist(), found["scores"].tolist(), strict=True):
        if score >= threshold:
            scores.setdefault(model.categories[int(label)], []).append(score)
    ordered = sorted(scores, key=lambda name: (-len(scores[name]), -max(scores[name])))
    return ", ".join(f"{len(scores[name])} {name}" for name in ordered)


def caption(image: Tensor, model: Captioner) -> str:
    """What BLIP says of `image` (1, 3, H, W) in [-1, 1], without the beginning all its captions share."""
    prompt = torch.tensor([model.encode(BLIP_PROMPT)], device=model.device)
    ids = caption_ids(model.net, blip_pixels(image, model.size).to(model.device), prompt)
    return model.decode(ids[0].tolist()).strip().removeprefix(BLIP_PROMPT).strip()


@torch.no_grad()
def caption_ids(
    net: Any,
    pixels: Tensor,
    prompt: Tensor | None = None,
    *,
    beams: int = 3,
    min_length: int = 10,
    max_length: int = 30,
) -> Tensor:
    """Token ids (B, L) of the likeliest captions of `pixels` (B, 3, S, S), by beam search.

    The ids begin with the prompt's (B, P) and finish with the end token. Beams and lengths (in tokens, with
    the prompt) are those that the official code's BLIP uses.
    """
    return net.generate(
        pixels,
        input_ids=prompt,
        num_beams=beams,
        min_length=min_length,
        max_length=max_length,
        do_sample=False,
    )
