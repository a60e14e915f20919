"""Files to the models of restore/captions.py: what classifies, detects and captions.

Kinds    classification: torchvision's ResNet-50, IMAGENET1K_V2, as in the official code (80.9 % top-1)
         detection: torchvision's Faster R-CNN ResNet-50 FPN v2. Not the official YOLOv8n, whose library and
         weights are AGPL-3.0. The most accurate of torchvision's (46.7 box mAP on COCO; YOLOv8n 37.3,
         fasterrcnn_mobilenet_v3_large_320_fpn 22.8): its 175 MB and few seconds on a CPU are little beside
         Stable Diffusion's
         caption: BLIP base, the net of the official `--use_blip`, or BLIP large where only that is there
Weights  found on this machine only, nothing is downloaded: where weights/fetch.py looks, then torch.hub's own
         folder, where torchvision leaves them. Read by weights/files.py, loaded strictly
Needs    torchvision, with its compiled operators for detection; transformers (extra `captions`). Each is
         imported by its kind only
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from weights.fetch import download_size, find_local, weights_folder
from weights.files import WeightsError, first_line, read_state_dict
from weights.hub import read_json
from weights.lora import is_finite
from weights.registry import MODELS, ModelFile
from weights.tokenizer import read_tokenizer

from ..restore.captions import Captioner, Classifier, Detector, Kind

KINDS: tuple[Kind, ...] = get_args(Kind)

# Kind -> the registry's names of what can do it, the first one preferred; and the library that runs it.
_MODELS = {
    "classification": ("resnet50",),
    "detection": ("fasterrcnn-resnet50-v2",),
    "caption": ("blip-base", "blip-large"),
}
_LIBRARIES = {"classification": "torchvision", "detection": "torchvision", "caption": "transformers"}
_INSTALL = {
    "torchvision": "install the torchvision that goes with this torch",
    "transformers": 'install it with `pip install -e ".[captions]"`',
}


def available() -> tuple[Kind, ...]:
    """The kinds whose weights and library are on this machine. No network call, no library imported."""
    return tuple(kind for kind in KINDS if _find(kind) and find_spec(_LIBRARIES[kind]))


def load_captioners(kinds: Sequence[Kind], device: str | torch.device = "cpu") -> dict[Kind, Any]:
    """The models of `kinds` for `captions.describe`, in float32 on `device`.

    WeightsError, one line with the way out, where a file is missing, damaged or another net's; ImportError
    where a library is missing or does not work; ValueError for an unknown kind.
    """
    load: dict[Kind, Callable[[torch.device], Any]] = {
        "classification": load_classifier,
        "detection": load_detector,
        "caption": load_captioner,
    }
    for kind in kinds:
        if kind not in load:
            raise ValueError(f"{kind!r}: no kind of information; expected {', '.join(KINDS)}")
    return {kind: load[kind](torch.device(device)) for kind in KINDS if kind in kinds}


def load_classifier(device: torch.device) -> Classifier:
    """ResNet-50 with ImageNet's names. Raises as `load_captioners`."""
    path = _files("classification")["classifier"]
    models = _torchvision("classification").models
    net = _filled(lambda: models.resnet50(weights=None), path)
    return Classifier(net.to(device), models.ResNet50_Weights.IMAGENET1K_V2.meta["categories"], device)


def load_detector(device: torch.device) -> Detector:
    """Faster R-CNN with COCO's names. Raises as `load_captioners`."""
    path = _files("detection")["detector"]
    torchvision = _torchvision("detection")
    models = torchvision.models.detection
    try:  # they are loaded on their own, and may lack the device's part
        torchvision.ops.nms(torch.zeros(1, 4, device=device), torch.zeros(1, device=device), 0.5)
    except (RuntimeError, AttributeError) as error:
        raise _unusable("detection", "torchvision", error) from error
    net = _filled(lambda: models.fasterrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None), path)
    categories = models.FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1.meta["categories"]
    return Detector(net.to(device), categories, device)


def load_captioner(device: torch.device) -> Captioner:
    """BLIP with its tokenizer. Raises as `load_captioners`."""
    files = _files("caption")
    net = _blip(files["caption"], read_json(files["caption_config"]))
    tokenizer = _tokenizer(files["caption_tokenizer"])
    return Captioner(
        net.to(device),
        lambda text: tokenizer.encode(text).ids,
        lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
        net.config.vision_config.image_size,
        device,
    )


# ---- files -------------------------------------------------------------------------------------------------


def _files(kind: Kind) -> dict[str, Path]:
    """Part -> file, of what can do `kind`. WeightsError, with places and the way out, where nothing can."""
    if files := _find(kind):
        return files
    model = MODELS[_MODELS[kind][0]]
    raise WeightsError(
        f"{kind}: {model.name} is not on this machine (looked in {weights_folder()}, the Hugging Face cache and {_torch_hub()}); run "
        f"`python -m tools.models fetch {model.name}` ({download_size(model.files)}), or go without {kind}"
    )


def _find(kind: Kind) -> dict[str, Path] | None:
    """Part -> file, of the first model for `kind` whose files are all here; None if there is none."""
    for name in _MODELS[kind]:
        found = {file.part: find_local(file) or _from_torch_hub(file) for file in MODELS[name].files}
        files = {part: path for part, path in found.items() if path is not None}
        if len(files) == len(found):
            return files
    return None


def _torch_hub() -> Path:
    return Path(torch.hub.get_dir(), "checkpoints")


def _from_torch_hub(file: ModelFile) -> Path | None:
    """The file as torchvision itself downloads it, under its own name; None if it has not."""
    path = _torch_hub() / file.file
    return path if file.url is not None and path.is_file() else None


# ---- libraries ---------------------------------------------------------------------------------------------


def _torchvision(kind: Kind) -> Any:
    """torchvision. ImportError, one line, where it is missing or does not go with torch."""
    try:
        import torchvision
    except (ImportError, RuntimeError, OSError) as error:  # what its compiled part raises varies
        raise _unusable(kind, "torchvision", error) from error
    return torchvision


def _transformers() -> tuple[Any, Any, Any]:
    """transformers' BlipConfig, BlipForConditionalGeneration and logging. ImportError, one line, where it is
    missing or fails.
    """
    try:
        from transformers import (  # pyright: ignore[reportMissingImports]
            BlipConfig,
            BlipForConditionalGeneration,
        )
        from transformers.utils import logging  # pyright: ignore[reportMissingImports]
    except (ImportError, RuntimeError, OSError) as error:  # it imports its parts on use
        raise _unusable("caption", "transformers", error) from error
    return BlipConfig, BlipForConditionalGeneration, logging


def _unusable(kind: Kind, library: str, error: Exception) -> ImportError:
    return ImportError(f"{kind}: {library} cannot be used ({first_line(error)}); {_INSTALL[library]}")


# ---- nets --------------------------------------------------------------------------------------------------


def _filled(make: Callable[[], nn.Module], path: Path) -> nn.Module:
    """The net of `make` with the weights of `path`, for inference. WeightsError unless every key and shape
    fits.
    """
    state = _read(path)
    with torch.random.fork_rng(devices=[]):  # the random weights are replaced, the stream is not to show
        net = make()
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        why = " ".join(str(error).split())
        raise WeightsError(f"{path}: not the weights of this net ({why:.200}); fetch them again") from None
    return net.float().eval().requires_grad_(False)


def _blip(path: Path, config: dict[str, Any]) -> Any:
    """The BLIP of these sizes with the weights of `path`, for inference. WeightsError unless every key and
    shape fits.
    """
    blip_config, blip, logging = _transformers()
    state = {key: tensor for key, tensor in _read(path).items() if not key.endswith("position_ids")}
    try:
        with _quiet(logging):
            sizes = blip_config.from_dict(config)
            net, report = blip.from_pretrained(None, config=sizes, state_dict=state, output_loading_info=True)
    except Exception as error:  # bare, because they differ from version to version
        raise WeightsError(f"{path}: transformers makes no BLIP of it ({first_line(error)})") from error
    if wrong := sorted({*report["missing_keys"], *report["unexpected_keys"]}):
        raise WeightsError(f"{path}: not the weights of this net, first {wrong[0]!r:.80}; fetch them again")
    return net.float().eval().requires_grad_(False)


def _tokenizer(path: Path) -> Any:
    """The tokenizer of a tokenizer.json. WeightsError where it is damaged."""
    try:
        return read_tokenizer(path)
    except WeightsError as error:
        raise WeightsError(f"{error}; fetch it again") from None


def _read(path: Path) -> dict[str, Tensor]:
    """The file's tensors. WeightsError where it is damaged or holds values that are not finite."""
    state = read_state_dict(path)
    for key, tensor in state.items():
        if tensor.is_floating_point() and not is_finite(tensor):
            raise WeightsError(f"{path}: {key!r:.80} holds values that are not finite; fetch it again")
    return state


@contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    """Without transformers' warnings and progress bar: only tools/ prints."""
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
