"""Files to a ready pipeline: the composition root.

A model is whatever weights/locate.py finds: a name of the registry, a folder, a single file, in any layout that weights/canonical.py
knows. What no shape tells (heads, schedule, prediction type, native size, ...) is in the file's metadata, as JSON under
`config`, or in the config.json and scheduler_config.json beside it; what is absent there is as in Stable Diffusion 1.x.
"""

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nets.clip import CLIPConfig, CLIPModel, CLIPTextModel
from nets.controlnet import ControlNet
from nets.pasd_unet import PASDUNet
from nets.rrdb import RRDBNet
from nets.tiled_vae import TiledAutoencoder
from nets.unet import UNet, UNetConfig
from nets.vae import AutoencoderKL, IdentityAutoencoder
from samplers.schedule import make_alphas_cumprod, make_betas, rescale_zero_terminal_snr
from weights.files import WeightsError, sha256
from weights.hub import Source
from weights.locate import Located, locate
from weights.merge import base_tensors
from weights.settings import read_normalisation, read_restoring, read_training
from weights.tokenizer import CONTEXT, PromptTokenizer, load_tokenizer

from .edit.config import ModelSpec
from .edit.pipeline import EditPipeline
from .loading.nets import build_net, read_lora_file
from .loading.parts import BASE, Shelf
from .loading.placement import make_placement
from .pixels.preprocess import CLIP_MEAN, CLIP_STD
from .restore.config import NOT_PASD, RestoreMeasures
from .restore.pipeline import RestorePipeline

Loras = Sequence[tuple[str | Path, float]]  # files, each with its weight
# What a known model of PASD's may lack where a base has it; of the scheduler SD 1.x's is then assumed.
SPARE = (*BASE, "tokenizer", "tokenizer_merges", "scheduler")


def load_edit_pipeline(
    model: str | Path = "mini",
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    loras: Loras = (),
) -> EditPipeline:
    """The ready `EditPipeline` of a model: a name ("mini", "sd-v1-5"), a folder or a file; with `loras` merged in.

    The U-Net gets `dtype`: float32, bfloat16 or float16. The VAE is float32 where that is float16, whose range its
    activations exceed; CLIP and the upscaler are float32 on a CPU. Either may be absent: then candidates are not ranked, and
    a second stage asks for upscaling_mode bilinear. WeightsError, one line, for an unknown name, or a file that is
    missing, damaged, of another kind, or does not go with the others; ValueError for another dtype.
    """
    place = make_placement(device, dtype)
    located = locate(model, companions=True)
    training = _read_training(located)
    shelf = Shelf(located, [(read_lora_file(path), weight) for path, weight in loras])
    unet, vae = shelf.net("unet"), shelf.net("vae")
    clip = shelf.net("clip") if "clip" in located.nets else None
    own = bool(loras) or "text_encoder" in located.nets
    text_encoder = shelf.net("text_encoder") if own or clip is None else _text_half(clip)
    upscaler = shelf.net("rrdb") if "rrdb" in located.nets else None
    tokenizer = _load_tokenizer(located)
    _check_together(located, unet.config, vae, text_encoder, clip, upscaler, tokenizer, training.spec)
    preprocessing = {} if clip is None else _clip_preprocessing(located.net("clip"), clip.config)
    unet = place.main(unet)
    return EditPipeline(
        unet=unet,
        prediction_type=training.prediction_type,
        vae=place.vae(vae),
        text_encoder=place.side(text_encoder),
        tokenizer=tokenizer,
        alphas_cumprod=training.alphas_cumprod,
        spec=training.spec,
        upscaler=None if upscaler is None else place.upscaler(upscaler),
        clip=None if clip is None else place.side(clip),
        **preprocessing,
    )  # fmt: skip


# What a name stands for in restoring, by mode.
_RESTORERS = {
    "mini": {"colorize": "mini-pasd-color", "": "mini-pasd"},
    "pasd": {"colorize": "pasd-light-color"},
}


def load_restore_pipeline(
    model: str | Path = "mini",
    *,
    mode: str = "sr",
    method: str = "pasd",
    base: str | Path | None = None,
    base_weight: float = 1.0,
    loras: Loras = (),
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> RestorePipeline:
    """The ready `RestorePipeline` of a model of PASD's: a name ("mini", "pasd"), a folder, or a file together with its base.

    `base`, a Stable Diffusion 1.x model, takes the place of the model's own U-Net, VAE and text encoder, or with a
    `base_weight` below 1 a share of it (a part that the model has not is the base's whole); what PASD added stays. `loras`
    come on top. For the methods controlnet and img2img the U-Net is the base's alone. Precision as in `load_edit_pipeline`. WeightsError, one line, for what is missing, damaged, of
    another kind, or does not go with the others; ValueError for another dtype.
    """
    place = make_placement(device, dtype)
    located = _locate_restorer(restorer_name(model, mode), base, method)
    other = None if base is None else locate(base)
    training = _read_training(located)
    if other is not None and (theirs := _read_training(other).prediction_type) != training.prediction_type:
        raise WeightsError(
            f"{other.name}: predicts {theirs}, but {located.name} {training.prediction_type}; take another base"
        )
    shelf = Shelf(located, [(read_lora_file(path), weight) for path, weight in loras], other, base_weight)
    state, source = shelf.tensors("unet")
    state = base_tensors(state) if method in NOT_PASD else state
    if "pasd_added" in located.nets and method not in NOT_PASD:
        state |= shelf.added()
    unet, vae, text_encoder = build_net(state, source), shelf.net("vae"), shelf.net("text_encoder")
    tokenizer = _load_tokenizer(located)
    upscaler = shelf.net("rrdb") if "rrdb" in located.nets else None
    controlnet = shelf.net("controlnet") if "controlnet" in located.nets else None
    _check_together(
        located, unet.config, vae, text_encoder, None, upscaler, tokenizer, training.spec, controlnet
    )
    vae = place.vae(vae)
    return RestorePipeline(
        unet=place.main(unet),
        controlnet=None if controlnet is None else place.main(controlnet),
        vae=vae,
        tiled_vae=lambda **settings: TiledAutoencoder(vae, **settings),
        text_encoder=place.side(text_encoder),
        tokenizer=tokenizer,
        alphas_cumprod=training.alphas_cumprod,
        prediction_type=training.prediction_type,
        measures=_restore_measures(located, training),
        upscaler=None if upscaler is None else place.upscaler(upscaler),
    )


def restorer_name(model: str | Path, mode: str) -> str | Path:
    """The model that `model` stands for in `mode`: the mini bundle and PASD have one of their own for colour."""
    names = _RESTORERS.get(str(model), {})
    return names.get(mode, names.get("", model))


def restore_measures(
    model: str | Path, *, mode: str = "sr", method: str = "pasd", base: str | Path | None = None
) -> RestoreMeasures:
    """The measures of the pipeline that `load_restore_pipeline` would give; no weights are read. WeightsError if it is not there."""
    located = _locate_restorer(restorer_name(model, mode), base, method)
    for part in BASE:
        if part != "text_encoder" or "clip" not in located.nets:
            located.net(part)
    _load_tokenizer(located)
    return _restore_measures(located, _read_training(located))


def _restore_measures(located: Located, training: "_Training") -> RestoreMeasures:
    usual = RestoreMeasures(training.spec.native)
    if "controlnet" not in located.nets:
        return usual
    return replace(usual, **read_restoring(located.net("controlnet")))


def _locate_restorer(model: str | Path, base: str | Path | None, method: str) -> Located:
    """PASD's model, with the parts that it lacks from `base`. WeightsError without what `method` cannot do without."""
    if base is None:
        located = locate(model, companions=True)
    else:
        located, other = locate(model, companions=True, spare=SPARE), locate(base, companions=True)
        other.net("unet")  # a LoRA has none
        theirs = dict(other.nets)
        if "clip" in located.nets:  # of which its own text encoder is a half
            theirs.pop("text_encoder", None)
        located = replace(
            located,
            nets=theirs | dict(located.nets),
            tokenizer=located.tokenizer or other.tokenizer,
            scheduler=located.scheduler or other.scheduler,
        )
    if method in ("pasd", "controlnet"):
        located.net("controlnet")
    return located


@dataclass(frozen=True)
class TrainingParts:
    """What a base brings to the training of something on top of it, all frozen and in float32 on the CPU."""

    unet: UNet
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: PromptTokenizer
    alphas_cumprod: Tensor  # (1000,) float64
    prediction_type: str  # epsilon or v_prediction
    spec: ModelSpec


def load_training_parts(model: str | Path = "mini") -> TrainingParts:
    """The parts of a base model, `model` as in `load_edit_pipeline`. WeightsError."""
    located = locate(model, companions=True)
    training, shelf = _read_training(located), Shelf(located)
    unet, vae = shelf.net("unet").float(), shelf.net("vae").float()
    if isinstance(unet, PASDUNet):
        raise WeightsError(
            f"{located.name}: PASD's own U-Net, not a base; give its base, and PASD as what to start from"
        )
    text_encoder, tokenizer = shelf.net("text_encoder").float(), _load_tokenizer(located)
    _check_together(located, unet.config, vae, text_encoder, None, None, tokenizer, training.spec)
    return TrainingParts(
        unet,
        vae,
        text_encoder,
        tokenizer,
        training.alphas_cumprod,
        training.prediction_type,
        training.spec,
    )


def edit_planner(model: str | Path = "mini") -> EditPipeline:
    """A pipeline without nets, for `plan` and `evaluations` only: it reads the settings and the tokenizer, no weights.

    So what an edit would do, and whether its options suit the model, is known before anything large is loaded. Raises
    WeightsError for a model that is not there.
    """
    located = locate(model, companions=True)
    training = _read_training(located)
    located.net("vae")
    tokenizer = _load_tokenizer(located)
    return EditPipeline(
        unet=nn.Identity(),
        vae=IdentityAutoencoder(),
        text_encoder=nn.Identity(),
        tokenizer=tokenizer,
        alphas_cumprod=training.alphas_cumprod,
        spec=training.spec,
        upscaler=nn.Identity() if "rrdb" in located.nets else None,
        clip=nn.Identity() if "clip" in located.nets else None,
    )


def model_hash(model: str | Path, *, spare: Collection[str] = ()) -> str:
    """Ten hexadecimal digits that tell a model's files from any others': sha256 over the parts' sha256.

    `spare` are parts that a known model may lack, as in `locate`.
    """
    located = locate(model, companions=True, spare=spare)
    parts = sorted((part, file) for part, files in located.files().items() for file in files)
    digests = {file: _digest(file) for _, file in parts}  # a file of several parts is read once
    text = "".join(f"{part} {digests[file]}\n" for part, file in parts)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _digest(path: Path) -> str:
    # The Hugging Face cache names the content of a large file by its sha256, and links to it.
    name = path.readlink().name if path.is_symlink() else ""
    return name if len(name) == 64 and set(name) <= set("0123456789abcdef") else sha256(path)


def _load_tokenizer(located: Located) -> PromptTokenizer:
    if located.tokenizer is None:
        raise WeightsError(
            f"{located.name}: no tokenizer with it; `python -m tools.models fetch clip-vit-l14` gets CLIP's, or put tokenizer.json (or "
            "vocab.json and merges.txt) of openai/clip-vit-large-patch14 beside the model's files"
        )
    return load_tokenizer(located.tokenizer)


def _clip_preprocessing(source: Source, config: CLIPConfig) -> dict[str, Any]:
    mean, std = read_normalisation(source, CLIP_MEAN, CLIP_STD)
    return {"clip_size": config.vision.image_size, "clip_mean": mean, "clip_std": std}


def _text_half(clip: CLIPModel) -> CLIPTextModel:
    """The text encoder, on the very weights of `clip`."""
    with torch.device("meta"):
        text = CLIPTextModel(clip.config.text)
    text.text_model = clip.text_model
    return text.eval().requires_grad_(False)


# ---- how it was trained -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Training:
    """What sampling needs to know."""

    spec: ModelSpec
    alphas_cumprod: Tensor  # (1000,) float64
    prediction_type: str  # epsilon or v_prediction


def _read_training(located: Located) -> _Training:
    source, usual = located.net("unet"), ModelSpec()
    said = read_training(source, located.scheduler)
    native, multiple = said.native or usual.native, said.multiple or usual.multiple
    if native % multiple:
        raise WeightsError(
            f"{source.path}: configured for native = {native}, expected a multiple of {multiple}"
        )
    try:
        betas = make_betas(said.beta_schedule, beta_start=said.beta_start, beta_end=said.beta_end)
    except ValueError as error:
        raise WeightsError(f"{source.path}: {error}") from None
    if said.rescale_betas_zero_snr:
        betas = rescale_zero_terminal_snr(betas)
    alphas_cumprod = make_alphas_cumprod(betas).clamp(min=2**-24)  # it is divided by
    guidance = usual.guidance_scale if said.guidance_scale is None else said.guidance_scale
    return _Training(ModelSpec(native, multiple, guidance), alphas_cumprod, said.prediction_type)


# ---- do the parts go together? -----------------------------------------------------------------------------------------------


def _check_together(
    located: Located, unet: UNetConfig, vae: AutoencoderKL, text_encoder: CLIPTextModel, clip: CLIPModel | None,
    rrdb: RRDBNet | None, tokenizer: PromptTokenizer, spec: ModelSpec, controlnet: ControlNet | None = None,
) -> None:  # fmt: skip
    """WeightsError where the parts are each sound but of different models."""
    files = {part: source.path for part, source in located.nets.items()}
    text = "text_encoder" if "text_encoder" in files else "clip"
    latent = vae.config.latent_channels
    # part, what it has, found, with what it must agree, expected
    equal = [
        ("unet", "latent channels in", unet.in_channels, "vae", latent),
        ("unet", "latent channels out", unet.out_channels, "vae", latent),
        ("unet", "context width", unet.cross_attention_dim, text, text_encoder.config.hidden_size),
        ("vae", "colour channels in", vae.config.in_channels, "an RGB picture", 3),
        ("vae", "colour channels out", vae.config.out_channels, "an RGB picture", 3),
        (text, "text length", text_encoder.config.max_position_embeddings, "the tokenizer", CONTEXT),
    ]
    if clip is not None:
        equal.append(("clip", "colour channels", clip.config.vision.num_channels, "an RGB picture", 3))
    if rrdb is not None:
        equal.append(("rrdb", "colour channels", rrdb.config.num_in_ch, "an RGB picture", 3))
    if controlnet is not None:
        control = controlnet.config
        equal += [
            ("controlnet", "latent channels", control.in_channels, "unet", unet.in_channels),
            ("controlnet", "context width", control.cross_attention_dim, "unet", unet.cross_attention_dim),
            ("controlnet", "residuals of widths", control.skip_channels(), "unet", unet.skip_channels()),
        ]
    for part, what, found, other, expected in equal:
        if found != expected:
            other = files[other].name if other in files else other
            raise WeightsError(
                f"{files[part]}: {what} {found}, but {other} has {expected}; these files are not of one model"
            )
    if spec.multiple % vae.downscale:
        raise WeightsError(
            f"{files['unet']}: sizes in multiples of {spec.multiple} pixels, but {files['vae'].name} has cells of "
            f"{vae.downscale}; these files are not of one model"
        )
    if tokenizer.vocab_size > text_encoder.config.vocab_size:
        raise WeightsError(
            f"{located.tokenizer}: {tokenizer.vocab_size} tokens, but {files[text].name} knows "
            f"{text_encoder.config.vocab_size}; these files are not of one model"
        )
