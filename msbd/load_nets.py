"""Files to nets: any official file to the net that it is, strictly, on the file's own tensors.

With load.py the only code of msbd/ that knows both nets and weights. No copy of a tensor is made here: what was mapped stays
mapped until a caller moves or converts the net.
"""

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
from nets.vae import AutoencoderKL, VAEConfig
from weights.canonical import Contents, read_contents
from weights.detect import net_config
from weights.files import WeightsError, read_metadata, read_state_dict
from weights.hub import Source, find_source, read_source, source_of
from weights.locate import Located, locate
from weights.lora import Lora, merge_loras, read_lora
from weights.merge import added_tensors

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
    if part in ("lora", "pasd_added"):
        raise WeightsError(
            f"{path}: {contents.layout}: a change to a model, not a net; load it together with a base"
        )
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


def read_lora_file(path: str | Path) -> Lora:
    """The LoRA of a file, checked. Raises WeightsError."""
    contents = read_contents(read_state_dict(path), path)
    if contents.parts != ("lora",):
        raise WeightsError(f"{path}: {contents.layout}, expected a LoRA")
    return read_lora(contents.state, path, read_metadata(path))


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
    """The net that these canonical tensors are, on them: no copy is made. WeightsError unless every key and shape fits."""
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
                f"{path}: {key!r:.80} holds values that are not finite; the file is damaged, take another"
            )
