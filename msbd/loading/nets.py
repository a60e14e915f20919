"""Files to nets: any official file to the net that it is, strictly, on the file's own tensors.

This folder and msbd/load.py are the only code of msbd/ that joins nets and weights. No copy of a tensor is
made here: what was mapped stays mapped until a caller moves or converts the net.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nets.asymmetric_vae import AsymmetricAutoencoderKL, AsymmetricVAEConfig
from nets.clip import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel
from nets.controlnet import ControlNet, ControlNetConfig, start_from_unet
from nets.pasd_unet import PASDUNet, PASDUNetConfig
from nets.rrdb import RRDBConfig, RRDBNet
from nets.srvgg import SRVGGConfig, SRVGGNet
from nets.taesd import AutoencoderTiny, TinyVAEConfig
from nets.unet import UNet, UNetConfig
from nets.vae import AutoencoderKL, VAEConfig
from weights.canonical import read_contents
from weights.detect import net_config
from weights.fetch import local_files
from weights.files import WeightsError, read_metadata, read_state_dict
from weights.hub import Source, read_json, source_metadata
from weights.lora import METADATA_KEY, Lora, read_lora
from weights.registry import MODELS, check_kind

# Family -> the net of the sizes that `weights.detect.net_config` gives.
_NETS: dict[str, Callable[[dict[str, Any]], nn.Module]] = {
    "unet": lambda sizes: UNet(UNetConfig(**sizes)),
    "vae": lambda sizes: AutoencoderKL(VAEConfig(**sizes)),
    "tiny_vae": lambda sizes: AutoencoderTiny(TinyVAEConfig(**sizes)),
    "asymmetric_vae": lambda sizes: AsymmetricAutoencoderKL(AsymmetricVAEConfig(**sizes)),
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
    "srvgg": lambda sizes: SRVGGNet(SRVGGConfig(**sizes)),
}


def start_pasd_nets(
    unet: UNet,
    *,
    variant: str = "full",
    zero_init: bool = True,
    use_rrdb: bool = False,
    to_rgb: bool = True,
    hint_widths: Sequence[int] = (16, 32, 96, 256),
    seed: int = 0,
) -> tuple[PASDUNet, ControlNet]:
    """PASD's two nets as training begins, on a base's U-Net: its weights, a ControlNet copied from it, the
    rest new.

    `zero_init` starts the pixel-aware attention at zero, so that the new net is its base with a ControlNet's
    residuals; without it, at random as the official code does, which disturbs the frozen base (reference bug
    24). `hint_widths` are those of the degradation removal. What is new is drawn from `seed`. The base's
    tensors are shared, not copied.
    """
    sizes = asdict(unet.config)
    base = unet.state_dict()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pasd = PASDUNet(PASDUNetConfig(**sizes, variant=variant, zero_init=zero_init))
        widths = tuple(hint_widths)
        config = ControlNetConfig(
            **sizes, conditioning_embedding_out_channels=widths, use_rrdb=use_rrdb, to_rgb=to_rgb
        )
        controlnet = ControlNet(config)
    pasd.load_state_dict(pasd.state_dict() | base, assign=True)
    controlnet.load_state_dict(start_from_unet(controlnet.state_dict(), base))
    return pasd, controlnet


def read_lora_file(path: str | Path) -> Lora:
    """The LoRA of a file, of the folder that PEFT or diffusers saved it in, or of a known model's name.
    Raises WeightsError.
    """
    file = lora_file(path)
    contents = read_contents(read_state_dict(file), file)
    if contents.parts != ("lora",):
        raise WeightsError(f"{file}: {contents.layout}, expected a LoRA")
    beside = file.with_name("adapter_config.json")  # where PEFT keeps alpha
    settings = {METADATA_KEY: json.dumps(read_json(beside))} if file.stem == "adapter_model" else {}
    return read_lora(contents.state, file, settings | read_metadata(file))


def lora_file(path: str | Path) -> Path:
    """The file that `read_lora_file` reads. WeightsError for a known name whose file is not here."""
    file = Path(path)
    check_kind(path, "LoRA")
    if str(path) in MODELS:
        file = local_files(MODELS[str(path)]).get("lora", file)
    if file.is_dir():
        names = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors", "adapter_model.bin")
        file = next((file / name for name in names if (file / name).is_file()), file / names[0])
    return file


@dataclass(frozen=True)
class Fit:
    """How a state dict compares with the net that its keys and shapes ask for."""

    family: str
    net: Any  # on the meta device: sizes in `.config`, no weights
    missing: tuple[str, ...]  # keys of the net that the state has not
    unknown: tuple[str, ...]  # keys of the state that the net has not
    misshapen: tuple[str, ...]  # "'key' has shape (1, 2), expected (2, 1)", or holds no floats


def fit_net(state: Mapping[str, Tensor], source: Source) -> Fit:
    """The net for these canonical tensors, and what does not fit it. WeightsError where the sizes cannot be
    told.
    """
    path = source.path
    metadata = source_metadata(source)
    try:
        family, sizes = net_config(state, metadata, path, source.config)
        with torch.device("meta"):  # no memory and no random numbers for weights that are replaced at once
            net = _NETS[family](sizes)
    except WeightsError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:  # sizes that no tensor can have, configs too deep
        raise WeightsError(f"{path}: {error!s:.250}") from None
    expected = net.state_dict()
    wrong = []
    for key in expected.keys() & state.keys():
        found, shape = tuple(state[key].shape), tuple(expected[key].shape)
        if found != shape:
            wrong.append(f"{key!r:.80} has shape {found}, expected {shape}")
        elif not state[key].is_floating_point():
            wrong.append(f"{key!r:.80} holds {state[key].dtype}, expected floating point")
    missing, unknown = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    return Fit(family, net, tuple(missing), tuple(unknown), tuple(sorted(wrong)))


def build_net(state: Mapping[str, Tensor], source: Source) -> Any:
    """The net that these canonical tensors are, on them: no copy is made. WeightsError unless every key and
    shape fits.
    """
    fit = fit_net(state, source)
    for keys, what in ((fit.missing, "missing"), (fit.unknown, "unknown")):
        if keys:
            raise WeightsError(
                f"{source.path}: {len(keys)} tensors are {what}, first {keys[0]!r:.80}; take a complete file of this net"
            )
    if fit.misshapen:
        raise WeightsError(f"{source.path}: {fit.misshapen[0]}")
    fit.net.load_state_dict(state, strict=True, assign=True)
    return fit.net.eval().requires_grad_(False)
