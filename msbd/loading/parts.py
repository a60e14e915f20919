"""A located model's parts as nets: other models blended in, LoRAs merged."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from nets.controlnet import ControlNet
from nets.pasd_unet import PASDUNet
from weights.canonical import Contents, read_contents
from weights.files import WeightsError
from weights.hub import Source, find_source, read_source, source_of
from weights.locate import Located, locate
from weights.lora import PARTS as LORA_PARTS
from weights.lora import Lora, is_finite, merge_loras
from weights.merge import added_tensors, base_tensors, blend

from .nets import build_net

BASE = ("unet", "vae", "text_encoder")  # what makes a base model, of which two can be blended


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
    """PASD's two nets, of a name ("pasd", "mini-pasd"), a folder (unet/, controlnet/) or a compact export, on the CPU.

    With `base` (a name, folder or file of a Stable Diffusion 1.x model) only what PASD added to its U-Net is taken, and put
    on that base's; a compact export needs one, unless its name brings it. The tensors are in their files' own dtypes. Raises
    WeightsError.
    """
    located = locate(model)
    shelf = Shelf(located)
    controlnet = shelf.net("controlnet")
    if base is None and "pasd_added" not in located.nets:
        return shelf.net("unet"), controlnet
    if base is None and "unet" not in located.nets:
        raise WeightsError(
            f"{model}: what PASD adds to a U-Net, without the U-Net; give a Stable Diffusion 1.x model as base"
        )
    state, source = (shelf if base is None else Shelf(locate(base))).tensors("unet")
    return build_net(state | shelf.added(), source), controlnet


def put_pasd_tensors(path: str | Path, unet: Any, controlnet: ControlNet) -> None:
    """Fill the two nets with what a file or folder of PASD has: what it adds to the U-Net, and the ControlNet. WeightsError."""
    shelf = Shelf(locate(path))
    control, source = shelf.tensors("controlnet")
    expected = added_tensors(unet.state_dict())
    parts = [(controlnet, controlnet.state_dict(), control)]
    if expected:
        parts.append((unet, expected, shelf.added()))
    for _, own, state in parts:
        wrong = sorted(own.keys() ^ state.keys())
        wrong += [key for key in own.keys() & state.keys() if own[key].shape != state[key].shape]
        if wrong:
            raise WeightsError(
                f"{source.path}: does not fit these nets, first {wrong[0]!r:.80}; take the same variant, toRGB heads and RRDBs"
            )
    for net, _, state in parts:
        net.load_state_dict(state, strict=False)


class Shelf:
    """A located model's parts, every file opened once; another model blended in, and LoRAs merged, where asked for."""

    def __init__(
        self,
        located: Located,
        loras: Sequence[tuple[Lora, float]] = (),
        other: Located | None = None,
        weight: float = 0.0,
    ) -> None:
        """`loras` each with its weight; `other` counts `weight`, from 0 to 1, in what it has of BASE."""
        self._located, self._loras, self._weight = located, loras, weight
        self._other = Shelf(other) if other else None
        self._contents: dict[Path, Contents] = {}
        if self._other is not None and not self._there & self._other._there & set(BASE):
            theirs, ours = ", ".join(self._other.parts), ", ".join(self.parts)
            raise WeightsError(f"{self._other._located.name}: has {theirs}, nothing to blend with {ours}")

    @property
    def parts(self) -> tuple[str, ...]:
        """What there is; a text encoder that is only a half of CLIP counts where it will differ from that."""
        own = tuple(self._located.nets)
        mixed = bool(self._loras) or (self._other is not None and "text_encoder" in self._other._there)
        derived = "text_encoder" in self._there and "text_encoder" not in own and mixed
        return (*own, "text_encoder") if derived else own

    @property
    def _there(self) -> set[str]:
        nets = set(self._located.nets)
        return nets | {"text_encoder"} if "clip" in nets else nets

    def net(self, part: str) -> Any:
        """The net of `part`. WeightsError where the model has none, or another net in its place."""
        return build_net(*self.tensors(part))

    def tensors(self, part: str) -> tuple[dict[str, Tensor], Source]:
        """The canonical tensors of `part` with all that is mixed in, and where they lie."""
        state, source = self._own(part)
        if self._other is not None and part in BASE and part in self._other._there:
            theirs, file = self._other._own(part)
            added = added_tensors(state) if part == "unet" else {}  # PASD's own stays, whatever the other is
            if added:
                state, theirs = base_tensors(state), base_tensors(theirs)
            try:
                state = blend(state, theirs, self._weight) | added
            except WeightsError as error:
                raise WeightsError(f"{file.path}: {error}") from None
        if self._loras and part in LORA_PARTS:
            state |= merge_loras({part: state}, self._loras).get(part, {})
        return state, source

    def added(self) -> dict[str, Tensor]:
        """What PASD added to its U-Net, of a whole model or of a compact export."""
        state, source = self._own("pasd_added" if "pasd_added" in self._located.nets else "unet")
        if not (added := added_tensors(state)):
            raise WeightsError(f"{source.path}: a U-Net without what PASD adds; expected one of PASD's")
        return added

    def _own(self, part: str) -> tuple[dict[str, Tensor], Source]:
        """The tensors of `part` as they are stored; the text encoder may be a half of CLIP."""
        nets = self._located.nets
        if part == "text_encoder" and part not in nets and "clip" in nets:
            clip, source = self._own("clip")
            return {key: tensor for key, tensor in clip.items() if key.startswith("text_model.")}, source
        source = self._located.net(part)
        if source.path not in self._contents:
            self._contents[source.path] = read_contents(read_source(source), source.path)
        contents = self._contents[source.path]
        if len(contents.parts) == 1 and part not in contents.parts:
            raise WeightsError(
                f"{source.path}: holds a {contents.parts[0]}, expected {part}; are two files mixed up?"
            )
        state = contents.tensors(part)
        # In a reading of its own, since what it touches of a mapped file stays in memory until that is let go.
        _check_finite(source.path, read_contents(read_source(source), source.path).tensors(part))
        return state, source


def _check_finite(path: Path, state: Mapping[str, Tensor]) -> None:
    for key, tensor in state.items():
        if tensor.is_floating_point() and not is_finite(tensor):
            raise WeightsError(
                f"{path}: {key!r:.80} holds values that are not finite; the file is damaged, take another"
            )
