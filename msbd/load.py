"""Files to a ready pipeline: the composition root, the one file of msbd/ that joins nets and weights.

A model is a name of weights/registry.py, or a folder laid out as the mini bundle: unet.safetensors, vae.safetensors,
clip.safetensors (a whole CLIPModel, whose text half is also the U-Net's text encoder), rrdb.safetensors, tokenizer.json.
What no shape tells is in each file's metadata, as JSON under `config`; what is absent there is as in Stable Diffusion 1.x.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nets.clip import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPVisionConfig
from nets.rrdb import RRDBConfig, RRDBNet
from nets.unet import UNet, UNetConfig
from nets.vae import AutoencoderKL, IdentityAutoencoder, VAEConfig
from samplers.schedule import make_alphas_cumprod, make_betas, v_prediction
from weights.detect import net_config, stored_config
from weights.files import WeightsError, read_metadata, read_state_dict, sha256
from weights.registry import MODELS, model_files
from weights.tokenizer import CONTEXT, PromptTokenizer, load_tokenizer

from .config import Measures
from .edit import EditPipeline
from .rerank import CLIP_MEAN, CLIP_STD

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PARTS = {file.part: file.file for file in MODELS["mini"].files}  # part -> file name of a folder

# Part -> the net for what `weights.detect.net_config` says of its file.
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
    "rrdb": lambda sizes: RRDBNet(RRDBConfig(**sizes)),
}


def load_edit_pipeline(
    model: str | Path = "mini", *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> EditPipeline:
    """The ready `EditPipeline` of a model: a name ("mini"), or a folder laid out as weights/mini/.

    The U-Net gets `dtype`: float32, bfloat16 or float16. The VAE is float32 where that is float16, whose range its
    activations exceed; CLIP and the upscaler are float32 on a CPU. WeightsError, one line, for an unknown name, or a
    file that is missing, damaged, of another kind, or does not go with the others; ValueError for another dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype}; expected one of {', '.join(map(str, DTYPES))}")
    files, device = model_parts(model), torch.device(device)
    training = _read_training(files["unet"])
    unet, vae, clip, rrdb = (_load_net(part, files[part]) for part in ("unet", "vae", "clip", "rrdb"))
    tokenizer = load_tokenizer(files["tokenizer"])
    _check_together(files, unet.config, vae, clip.config, rrdb.config, tokenizer, training.measures)
    side_dtype = torch.float32 if device.type == "cpu" else dtype
    clip.to(device, side_dtype)
    mean, std = _read_normalisation(files["clip"])
    # oneDNN's convolutions are faster channels last: 1.2 to 1.5 times, measured on the mini bundle (docs/log.md).
    layout = torch.channels_last if device.type == "cpu" else torch.preserve_format
    unet = unet.to(device, dtype, memory_format=layout)
    return EditPipeline(
        unet=_VPrediction(unet, training.alphas_cumprod) if training.prediction_type == "v_prediction" else unet,
        vae=vae.to(device, torch.float32 if dtype == torch.float16 else dtype, memory_format=layout),
        text_encoder=_text_half(clip),
        tokenizer=tokenizer,
        alphas_cumprod=training.alphas_cumprod,
        measures=training.measures,
        upscaler=rrdb.to(device, side_dtype, memory_format=layout),
        clip=clip,
        clip_size=clip.config.vision.image_size,
        clip_mean=mean,
        clip_std=std,
    )  # fmt: skip


def edit_planner(model: str | Path = "mini") -> EditPipeline:
    """A pipeline without nets, for `plan` and `evaluations` only: it reads no more than the U-Net's metadata.

    So what an edit would do, and whether its options suit the model, is known before anything large is loaded. Raises
    WeightsError for a model that is not there.
    """
    training = _read_training(model_parts(model)["unet"])
    return EditPipeline(
        unet=nn.Identity(),
        vae=IdentityAutoencoder(),
        text_encoder=nn.Identity(),
        tokenizer=_no_tokenizer,
        alphas_cumprod=training.alphas_cumprod,
        measures=training.measures,
        upscaler=nn.Identity(),
        clip=nn.Identity(),
    )


def model_parts(model: str | Path) -> dict[str, Path]:
    """Part (unet, vae, clip, rrdb, tokenizer) -> file of a model given by name or folder. A name wins over a folder of that
    name (write ./name). Raises WeightsError for an unknown or not yet loadable name, and where a file is missing."""
    path = Path(model)
    if str(model) in MODELS or not path.exists():
        return model_files(str(model))  # refuses an unknown name and names the known ones
    if not path.is_dir():
        raise WeightsError(f"{path}: a file; expected a folder with {', '.join(PARTS.values())}")
    files = {part: path / file for part, file in PARTS.items()}
    if missing := [file for file in files.values() if not file.is_file()]:
        raise WeightsError(f"{missing[0]}: no such file; a model's folder has {', '.join(PARTS.values())}")
    return files


def model_hash(model: str | Path) -> str:
    """Ten hexadecimal digits that tell a model's files from any others': sha256 over the parts' sha256."""
    parts = (f"{part} {sha256(file)}\n" for part, file in sorted(model_parts(model).items()))
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:10]


# ---- one net ----------------------------------------------------------------------------------------------------------------


def _load_net(part: str, path: Path) -> Any:
    """The net of a file in the file's own dtype, on the CPU, in evaluation mode, without gradients."""
    state = read_state_dict(path)
    family, sizes = net_config(state, read_metadata(path), path)
    if family != part:
        raise WeightsError(
            f"{path}: holds a net of family {family}, expected {part}; are two files mixed up?"
        )
    state = {key: tensor for key, tensor in state.items() if not key.endswith("position_ids")}
    try:
        with torch.device("meta"):  # no memory and no random numbers for weights that are replaced at once
            net = _NETS[part](sizes)
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{path}: {error}") from None
    _check_fits(path, {key: tuple(value.shape) for key, value in net.state_dict().items()}, state)
    net.load_state_dict(state, strict=True, assign=True)
    return net.eval().requires_grad_(False)


def _check_fits(path: Path, expected: Mapping[str, tuple[int, ...]], state: Mapping[str, Tensor]) -> None:
    """One line for what `load_state_dict` would say in many."""
    for keys, what in ((expected.keys() - state, "missing"), (state.keys() - expected, "unknown")):
        if keys:
            raise WeightsError(
                f"{path}: {len(keys)} tensors are {what}, first {min(keys)!r}; take a complete file of this net"
            )
    for key, tensor in state.items():
        if tuple(tensor.shape) != expected[key]:
            raise WeightsError(f"{path}: {key!r} has shape {tuple(tensor.shape)}, expected {expected[key]}")
        if not tensor.is_floating_point():
            raise WeightsError(f"{path}: {key!r} holds {tensor.dtype}, expected floating point")


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


# ---- what a file's metadata says besides sizes -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Training:
    """How a U-Net was trained."""

    measures: Measures
    alphas_cumprod: Tensor  # (1000,) float64
    prediction_type: str  # epsilon or v_prediction


def _read_training(path: Path) -> _Training:
    config = _read_config(path)
    usual = Measures()
    kind = config.get("prediction_type", "epsilon")
    if kind not in ("epsilon", "v_prediction"):
        raise WeightsError(
            f"{path}: the metadata says prediction_type = {kind!r}, expected epsilon or v_prediction"
        )
    start = _number(path, config, "beta_start", 0.00085)
    end = _number(path, config, "beta_end", 0.012)
    if not start < end < 1:
        raise WeightsError(
            f"{path}: the metadata says betas from {start} to {end}, expected 0 < start < end < 1"
        )
    try:
        betas = make_betas(config.get("beta_schedule", "scaled_linear"), beta_start=start, beta_end=end)
    except ValueError as error:
        raise WeightsError(f"{path}: {error}") from None
    native = _count(path, config, "native", usual.native)
    multiple = _count(path, config, "multiple", usual.multiple)
    if native % multiple:
        raise WeightsError(f"{path}: the metadata says native = {native}, expected a multiple of {multiple}")
    measures = Measures(native, multiple, _number(path, config, "guidance_scale", usual.guidance_scale))
    return _Training(measures, make_alphas_cumprod(betas), kind)


def _read_normalisation(path: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation, RGB in [0, 1], of the pictures a CLIP was trained on."""
    config = _read_config(path)
    mean, std = config.get("image_mean", CLIP_MEAN), config.get("image_std", CLIP_STD)
    for name, values in (("image_mean", mean), ("image_std", std)):
        numbers = isinstance(values, tuple) and all(type(value) in (int, float) for value in values)
        if not numbers or len(values) != 3 or (name == "image_std" and min(values) <= 0):
            raise WeightsError(f"{path}: the metadata says {name} = {values!r}, expected three numbers")
    return mean, std


def _read_config(path: Path) -> dict[str, Any]:
    metadata = read_metadata(path)
    try:
        return stored_config(metadata)
    except WeightsError as error:  # it has not seen the path
        raise WeightsError(f"{path}: {error}") from None


def _number(path: Path, config: Mapping[str, Any], name: str, usual: float) -> float:
    value = config.get(name, usual)
    if type(value) not in (int, float) or not 0 < value < float("inf"):
        raise WeightsError(f"{path}: the metadata says {name} = {value!r}, expected a number above 0")
    return float(value)


def _count(path: Path, config: Mapping[str, Any], name: str, usual: int) -> int:
    value = config.get(name, usual)
    if type(value) is not int or value < 1:
        raise WeightsError(f"{path}: the metadata says {name} = {value!r}, expected pixels, 1 or more")
    return value


# ---- do the parts go together? -----------------------------------------------------------------------------------------------


def _check_together(
    files: Mapping[str, Path], unet: UNetConfig, vae: AutoencoderKL, clip: CLIPConfig, rrdb: RRDBConfig,
    tokenizer: PromptTokenizer, measures: Measures,
) -> None:  # fmt: skip
    """WeightsError where the parts are each sound but of different models."""
    latent = vae.config.latent_channels
    # part, what it has, found, with what it must agree, expected
    equal = (
        ("unet", "latent channels in", unet.in_channels, "vae", latent),
        ("unet", "latent channels out", unet.out_channels, "vae", latent),
        ("unet", "context width", unet.cross_attention_dim, "clip", clip.text.hidden_size),
        ("vae", "colour channels in", vae.config.in_channels, "an RGB picture", 3),
        ("vae", "colour channels out", vae.config.out_channels, "an RGB picture", 3),
        ("clip", "colour channels", clip.vision.num_channels, "an RGB picture", 3),
        ("rrdb", "colour channels", rrdb.num_in_ch, "an RGB picture", 3),
        ("clip", "text length", clip.text.max_position_embeddings, "the tokenizer", CONTEXT),
    )
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
    if tokenizer.vocab_size > clip.text.vocab_size:
        raise WeightsError(
            f"{files['tokenizer']}: {tokenizer.vocab_size} tokens, but {files['clip'].name} knows {clip.text.vocab_size}; "
            "these files are not of one model"
        )
