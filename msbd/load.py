"""Files to ready nets and pipelines: the composition root, the one file of msbd/ that joins nets and weights.

A model is whatever weights/locate.py finds: a name of the registry, a folder, a single file, in any layout that weights/canonical.py
knows. What no shape tells (heads, schedule, prediction type, native size, ...) is in the file's metadata, as JSON under
`config`, or in the config.json and scheduler_config.json beside it; what is absent there is as in Stable Diffusion 1.x.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nets.clip import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel
from nets.controlnet import ControlNet, ControlNetConfig
from nets.pasd_unet import PASDUNet, PASDUNetConfig
from nets.rrdb import RRDBConfig, RRDBNet
from nets.unet import UNet, UNetConfig
from nets.vae import AutoencoderKL, IdentityAutoencoder, VAEConfig
from samplers.schedule import make_alphas_cumprod, make_betas, rescale_zero_terminal_snr, v_prediction
from weights.canonical import Contents, read_contents
from weights.detect import net_config
from weights.files import WeightsError, read_metadata, read_state_dict, sha256
from weights.hub import Source, find_source, read_source, source_of
from weights.locate import Located, locate
from weights.lora import Lora, merge_loras, read_lora
from weights.merge import added_tensors
from weights.settings import read_normalisation, read_training
from weights.tokenizer import CONTEXT, PromptTokenizer, load_tokenizer

from .config import Measures
from .edit import EditPipeline
from .rerank import CLIP_MEAN, CLIP_STD

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Loras = Sequence[tuple[str | Path, float]]  # files, each with its weight

# Family -> the net of the sizes that `weights.detect.net_config` gives.
_NETS: dict[str, Callable[[dict[str, Any]], nn.Module]] = {
    "unet": lambda sizes: UNet(UNetConfig(**sizes)),
    "vae": lambda sizes: AutoencoderKL(VAEConfig(**sizes)),
    "clip": lambda sizes: CLIPModel(
        CLIPConfig(
            text=CLIPTextConfig(**sizes["text"]),
            vision=CLIPVisionConfig(**sizes["vision"]),
            projection_dim=sizes["projection_dim"],
        )
    ),
    "clip_text": lambda sizes: CLIPTextModel(CLIPTextConfig(**sizes)),
    "clip_vision": lambda sizes: CLIPVisionModel(CLIPVisionConfig(**sizes)),
    "pasd_unet": lambda sizes: PASDUNet(PASDUNetConfig(**sizes)),
    "controlnet": lambda sizes: ControlNet(ControlNetConfig(**sizes)),
    "rrdb": lambda sizes: RRDBNet(RRDBConfig(**sizes)),
}


def load_edit_pipeline(
    model: str | Path = "mini",
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    loras: Loras = (),
) -> EditPipeline:
    """The ready `EditPipeline` of a model: a name ("mini", "sd-v1-5"), a folder or a file; with `loras` merged in.

    The U-Net gets `dtype`: float32, bfloat16 or float16. The VAE is float32 where that is float16, whose range its
    activations exceed; CLIP and the upscaler are float32 on a CPU. CLIP and upscaler may be absent: then candidates are not
    ranked, and pictures are enlarged by interpolation only. WeightsError, one line, for an unknown name, or a file that is
    missing, damaged, of another kind, or does not go with the others; ValueError for another dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype}; expected one of {', '.join(map(str, DTYPES))}")
    located, device = locate(model), torch.device(device)
    training = _read_training(located)
    shelf = Shelf(located, [(read_lora_file(path), weight) for path, weight in loras])
    unet, vae = shelf.net("unet"), shelf.net("vae")
    clip = shelf.net("clip") if "clip" in located.nets else None
    own = bool(loras) or "text_encoder" in located.nets
    text_encoder = shelf.net("text_encoder") if own or clip is None else _text_half(clip)
    upscaler = shelf.net("rrdb") if "rrdb" in located.nets else None
    tokenizer = _load_tokenizer(located)
    _check_together(located, unet.config, vae, text_encoder, clip, upscaler, tokenizer, training.measures)
    side_dtype = torch.float32 if device.type == "cpu" else dtype
    # oneDNN's convolutions are faster channels last: 1.2 to 1.5 times, measured on the mini bundle (docs/log.md).
    wide = device.type == "cpu" and dtype != torch.float16  # which is for GPUs: a CPU only holds it
    layout = torch.channels_last if wide else torch.preserve_format
    if upscaler is not None:
        upscaler.to(device, side_dtype, memory_format=layout)
    preprocessing = {} if clip is None else _clip_preprocessing(located.net("clip"), clip.config)
    unet = unet.to(device, dtype, memory_format=layout)
    return EditPipeline(
        unet=_VPrediction(unet, training.alphas_cumprod) if training.prediction_type == "v_prediction" else unet,
        vae=vae.to(device, torch.float32 if dtype == torch.float16 else dtype, memory_format=layout),
        text_encoder=text_encoder.to(device, side_dtype),
        tokenizer=tokenizer,
        alphas_cumprod=training.alphas_cumprod,
        measures=training.measures,
        upscaler=upscaler,
        clip=None if clip is None else clip.to(device, side_dtype),
        **preprocessing,
    )  # fmt: skip


def edit_planner(model: str | Path = "mini") -> EditPipeline:
    """A pipeline without nets, for `plan` and `evaluations` only: it reads no more than the U-Net's settings.

    So what an edit would do, and whether its options suit the model, is known before anything large is loaded. Raises
    WeightsError for a model that is not there.
    """
    located = locate(model)
    training = _read_training(located)
    return EditPipeline(
        unet=nn.Identity(),
        vae=IdentityAutoencoder(),
        text_encoder=nn.Identity(),
        tokenizer=_no_tokenizer,
        alphas_cumprod=training.alphas_cumprod,
        measures=training.measures,
        upscaler=nn.Identity() if "rrdb" in located.nets else None,
        clip=nn.Identity() if "clip" in located.nets else None,
    )


def model_hash(model: str | Path) -> str:
    """Ten hexadecimal digits that tell a model's files from any others': sha256 over the parts' sha256."""
    parts = sorted((part, file) for part, files in locate(model).files().items() for file in files)
    digests = {file: _digest(file) for _, file in parts}  # a file of several parts is read once
    text = "".join(f"{part} {digests[file]}\n" for part, file in parts)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _digest(path: Path) -> str:
    # The Hugging Face cache names the content of a large file by its sha256, and links to it.
    name = path.readlink().name if path.is_symlink() else ""
    return name if len(name) == 64 and set(name) <= set("0123456789abcdef") else sha256(path)


# ---- one net ----------------------------------------------------------------------------------------------------------------


def load_net(path: str | Path, part: str | None = None) -> Any:
    """The net of an official file or a net's folder, in any layout: UNet, AutoencoderKL, CLIPTextModel, CLIPModel, RRDBNet, ...

    `part` ("unet", "vae", "text_encoder", ...) says which, where the file holds several. Loaded strictly, in the file's own
    dtype, on the CPU, in evaluation mode, without gradients. Raises WeightsError, one line, for anything else.
    """
    path = Path(path)
    source = find_source(path) if path.is_dir() else source_of(path)
    contents = read_contents(read_source(source), source.path)
    if part is None:
        if len(contents.parts) != 1:
            raise WeightsError(
                f"{path}: {contents.layout}, has {', '.join(contents.parts)}; say which part to load"
            )
        (part,) = contents.parts
    _check_finite(path, contents.tensors(part))
    return build_net(contents.tensors(part), source)


def load_pasd_nets(model: str | Path, base: str | Path | None = None) -> tuple[PASDUNet, ControlNet]:
    """PASD's two nets, of a name ("pasd"), a folder (unet/, controlnet/) or a compact export, on the CPU.

    With `base` (a name, folder or file of a Stable Diffusion 1.x model) only what PASD added to its U-Net is taken, and put
    on that base's; a compact export needs one. The tensors are in their files' own dtypes. Raises WeightsError.
    """
    located = locate(model)
    shelf = Shelf(located)
    controlnet = shelf.net("controlnet")
    if base is None:
        if "pasd_added" in located.nets:
            raise WeightsError(
                f"{model}: what PASD adds to a U-Net, without the U-Net; give a Stable Diffusion 1.x model as base"
            )
        return shelf.net("unet"), controlnet
    state, source = Shelf(locate(base)).tensors("unet")
    return build_net(state | shelf.added(), source), controlnet


@dataclass(frozen=True)
class Fit:
    """How a state dict compares with the net that its keys and shapes ask for."""

    family: str
    net: Any  # on the meta device: sizes in `.config`, no weights
    missing: tuple[str, ...]  # keys of the net that the state has not
    unknown: tuple[str, ...]  # keys of the state that the net has not
    misshapen: tuple[str, ...]  # "'key' has shape (1, 2), expected (2, 1)", or holds no floats


def fit_net(state: Mapping[str, Tensor], source: Source) -> Fit:
    """The net for these canonical tensors, and what does not fit it. WeightsError where the sizes cannot be told."""
    path = source.path
    metadata = {} if path.name.endswith(".json") else read_metadata(path)
    family, sizes = net_config(state, metadata, path, source.config)
    try:
        with torch.device("meta"):  # no memory and no random numbers for weights that are replaced at once
            net = _NETS[family](sizes)
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{path}: {error}") from None
    expected = net.state_dict()
    wrong = []
    for key in expected.keys() & state.keys():
        found, shape = tuple(state[key].shape), tuple(expected[key].shape)
        if found != shape:
            wrong.append(f"{key!r} has shape {found}, expected {shape}")
        elif not state[key].is_floating_point():
            wrong.append(f"{key!r} holds {state[key].dtype}, expected floating point")
    missing, unknown = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    return Fit(family, net, tuple(missing), tuple(unknown), tuple(sorted(wrong)))


def build_net(state: Mapping[str, Tensor], source: Source) -> Any:
    """The net that these canonical tensors are, on them: no copy is made. WeightsError unless every key and shape fits."""
    fit = fit_net(state, source)
    for keys, what in ((fit.missing, "missing"), (fit.unknown, "unknown")):
        if keys:
            raise WeightsError(
                f"{source.path}: {len(keys)} tensors are {what}, first {keys[0]!r}; take a complete file of this net"
            )
    if fit.misshapen:
        raise WeightsError(f"{source.path}: {fit.misshapen[0]}")
    fit.net.load_state_dict(state, strict=True, assign=True)
    return fit.net.eval().requires_grad_(False)


class Shelf:
    """A located model's parts, every file opened once, LoRAs merged into its nets."""

    def __init__(self, located: Located, loras: Sequence[tuple[Lora, float]] = ()) -> None:
        self._located, self._loras = located, loras
        self._contents: dict[Path, Contents] = {}

    def net(self, part: str) -> Any:
        """The net of `part`. WeightsError where the model has none, or another net in its place."""
        if part == "text_encoder" and part not in self._located.nets and "clip" in self._located.nets:
            clip, source = self.tensors("clip")
            state = {key: tensor for key, tensor in clip.items() if key.startswith("text_model.")}
        else:
            state, source = self.tensors(part)
        if part in ("unet", "text_encoder"):
            state |= merge_loras({part: state}, self._loras).get(part, {})
        return build_net(state, source)

    def tensors(self, part: str) -> tuple[dict[str, Tensor], Source]:
        """The canonical tensors of `part`, and where they lie."""
        source = self._located.net(part)
        contents = self._open(source)
        if len(contents.parts) == 1 and part not in contents.parts:
            raise WeightsError(
                f"{source.path}: holds a {contents.parts[0]}, expected {part}; are two files mixed up?"
            )
        state = contents.tensors(part)
        # In a reading of its own, since what it touches of a mapped file stays in memory until that is let go.
        _check_finite(source.path, read_contents(read_source(source), source.path).tensors(part))
        return state, source

    def added(self) -> dict[str, Tensor]:
        """What PASD added to its U-Net, of a whole model or of a compact export."""
        state, source = self.tensors("pasd_added" if "pasd_added" in self._located.nets else "unet")
        if not (added := added_tensors(state)):
            raise WeightsError(f"{source.path}: a U-Net without what PASD adds; expected one of PASD's")
        return added

    def _open(self, source: Source) -> Contents:
        if source.path not in self._contents:
            self._contents[source.path] = read_contents(read_source(source), source.path)
        return self._contents[source.path]


def _check_finite(path: Path, state: Mapping[str, Tensor]) -> None:
    for key, tensor in state.items():
        if not tensor.numel() or not tensor.is_floating_point():
            continue
        values = tensor if tensor.element_size() > 1 else tensor.float()  # float8 knows no order
        if not torch.stack(values.aminmax()).isfinite().all():
            raise WeightsError(
                f"{path}: {key!r} holds values that are not finite; the file is damaged, take another"
            )


def read_lora_file(path: str | Path) -> Lora:
    contents = read_contents(read_state_dict(path), path)
    if contents.parts != ("lora",):
        raise WeightsError(f"{path}: {contents.layout}, expected a LoRA")
    return read_lora(contents.state, path, read_metadata(path))


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


class _VPrediction(nn.Module):
    """A U-Net that predicts v, seen as one that predicts the noise."""

    def __init__(self, unet: nn.Module, alphas_cumprod: Tensor) -> None:
        super().__init__()
        self.unet, self.alphas_cumprod = unet, alphas_cumprod

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """x (B, 4, h, w), t (B,) or scalar, context (B, 77, D) -> eps (B, 4, h, w) in float32."""
        model = v_prediction(lambda _, at: self.unet(x, at, context).float(), self.alphas_cumprod)
        return model(x.float(), t)


def _no_tokenizer(prompts: list[str]) -> Tensor:
    raise AssertionError("a planner has no nets; use load_edit_pipeline")


# ---- how it was trained -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Training:
    """What sampling needs to know."""

    measures: Measures
    alphas_cumprod: Tensor  # (1000,) float64
    prediction_type: str  # epsilon or v_prediction


def _read_training(located: Located) -> _Training:
    source, usual = located.net("unet"), Measures()
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
    return _Training(Measures(native, multiple, guidance), alphas_cumprod, said.prediction_type)


# ---- do the parts go together? -----------------------------------------------------------------------------------------------


def _check_together(
    located: Located, unet: UNetConfig, vae: AutoencoderKL, text_encoder: CLIPTextModel, clip: CLIPModel | None,
    rrdb: RRDBNet | None, tokenizer: PromptTokenizer, measures: Measures,
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
    for part, what, found, other, expected in equal:
        if found != expected:
            other = files[other].name if other in files else other
            raise WeightsError(
                f"{files[part]}: {what} {found}, but {other} has {expected}; these files are not of one model"
            )
    if measures.multiple % vae.downscale:
        raise WeightsError(
            f"{files['unet']}: sizes in multiples of {measures.multiple} pixels, but {files['vae'].name} has cells of "
            f"{vae.downscale}; these files are not of one model"
        )
    if tokenizer.vocab_size > text_encoder.config.vocab_size:
        raise WeightsError(
            f"{located.tokenizer}: {tokenizer.vocab_size} tokens, but {files[text].name} knows "
            f"{text_encoder.config.vocab_size}; these files are not of one model"
        )
