"""A located model's parts as nets: other models blended in, LoRAs merged."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from nets.controlnet import ControlNet
from nets.pasd_unet import PASDUNet
from weights.canonical import read_contents
from weights.files import WeightsError, release_pages
from weights.hub import Source, find_source, read_source, source_of
from weights.locate import Located, locate
from weights.lora import PARTS as LORA_PARTS
from weights.lora import Lora, is_finite, left_out, merge_loras
from weights.merge import added_tensors, base_tensors, blend

from .nets import build_net

BASE = ("unet", "vae", "text_encoder")  # what makes a base model, of which two can be blended


def load_net(path: str | Path, part: str | None = None) -> Any:
    """The net of an official file or a net's folder, in any layout: UNet, AutoencoderKL, CLIPTextModel,
    CLIPModel, RRDBNet, ...

    `part` ("unet", "vae", "text_encoder", ...) says which, where the file holds several. Loaded strictly, in
    the file's own dtype, on the CPU, in evaluation mode, without gradients. Raises WeightsError, one line,
    for anything else.
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
    if part in ("lora", "pasd_added", "asymmetric_added"):
        raise WeightsError(
            f"{path}: {contents.layout}: a change to a model, not a net; load it together with a base"
        )
    state = contents.tensors(part)
    check_finite(path, state)
    return build_net(state, source)


def load_pasd_nets(model: str | Path, base: str | Path | None = None) -> tuple[PASDUNet, ControlNet]:
    """PASD's two nets, of a name ("pasd", "mini-pasd"), a folder (unet/, controlnet/) or a compact export, on
    the CPU.

    With `base` (a name, folder or file of a Stable Diffusion 1.x model) only what PASD added to its U-Net is
    taken, and put on that base's; a compact export needs one, unless its name brings it. The tensors are in
    their files' own dtypes. Raises WeightsError.
    """
    located = locate(model)
    parts = ModelParts(located)
    controlnet = parts.net("controlnet")
    if base is None and "pasd_added" not in located.nets:
        return parts.net("unet"), controlnet
    if base is None and "unet" not in located.nets:
        raise WeightsError(
            f"{model}: what PASD adds to a U-Net, without the U-Net; give a Stable Diffusion 1.x model as base"
        )
    state, source = (parts if base is None else ModelParts(locate(base))).tensors("unet")
    return build_net(state | parts.added(), source), controlnet


def put_pasd_tensors(path: str | Path, unet: Any, controlnet: ControlNet) -> None:
    """Fill the two nets with what a file or folder of PASD has: what it adds to the U-Net, and the
    ControlNet. WeightsError.
    """
    parts = ModelParts(locate(path))
    control, source = parts.tensors("controlnet")
    expected = added_tensors(unet.state_dict())
    halves = [(controlnet, controlnet.state_dict(), control)]
    if expected:
        halves.append((unet, expected, parts.added()))
    for _, own, state in halves:
        wrong = sorted(own.keys() ^ state.keys())
        wrong += [key for key in own.keys() & state.keys() if own[key].shape != state[key].shape]
        if wrong:
            raise WeightsError(
                f"{source.path}: does not fit these nets, first {wrong[0]!r:.80}; take the same variant, toRGB heads and RRDBs"
            )
    for net, _, state in halves:
        net.load_state_dict(state, strict=False)


class ModelParts:
    """The nets of a located model, another model blended in, and LoRAs merged, where asked for."""

    def __init__(
        self,
        located: Located,
        loras: Sequence[tuple[Lora, float]] = (),
        other: Located | None = None,
        weight: float = 0.0,
    ) -> None:
        """`loras` come each with its weight. Of `other` the parts BASE are blended in: (1 - weight) own +
        weight other.
        """
        self._located, self._loras, self._weight = located, loras, weight
        self._other = ModelParts(other) if other else None
        self.notes: list[str] = []  # what of the LoRAs was left out, as far as parts were asked for
        self._stored: dict[str, tuple[dict[str, Tensor], Source]] = {}
        if self._other is not None and not self._available & self._other._available & set(BASE):
            theirs, ours = ", ".join(self._other.parts), ", ".join(self.parts)
            raise WeightsError(f"{self._other._located.name}: has {theirs}, nothing to blend with {ours}")

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts to load. `text_encoder` is listed beside `clip` only if it will differ from CLIP's text
        half.

        It does with a LoRA, and with another model's text encoder blended in.
        """
        own = tuple(self._located.nets)
        mixed = bool(self._loras) or (self._other is not None and "text_encoder" in self._other._available)
        derived = "text_encoder" in self._available and "text_encoder" not in own and mixed
        return (*own, "text_encoder") if derived else own

    @property
    def _available(self) -> set[str]:
        """The parts that the files hold; CLIP holds a text encoder too."""
        nets = set(self._located.nets)
        return nets | {"text_encoder"} if "clip" in nets else nets

    def net(self, part: str) -> Any:
        """The net of `part`. WeightsError where the model has none, or another net in its place."""
        return build_net(*self.tensors(part))

    def tensors(self, part: str) -> tuple[dict[str, Tensor], Source]:
        """The canonical tensors of `part` with all that is mixed in, and where they lie. WeightsError as
        `net`.
        """
        state, source = self._read(part)
        other = self._other if self._other and part in BASE and part in self._other._available else None
        if other or (self._loras and part in LORA_PARTS):
            state = _widened(state)
        if other:
            theirs, file = other._read(part)
            if part == "unet":
                _check_inputs(file.path, theirs, state)
            added = added_tensors(state) if part == "unet" else {}  # PASD's layers are never changed
            if added:
                state, theirs = base_tensors(state), base_tensors(theirs)
            try:
                state = blend(state, theirs, self._weight) | added
            except WeightsError as error:
                raise WeightsError(f"{file.path}: {error}") from None
        if self._loras and part in LORA_PARTS:
            for lora, _ in self._loras:
                self.notes += left_out(lora, {part: state})
            state = state | merge_loras({part: state}, self._loras).get(part, {})
        return state, source

    def added(self) -> dict[str, Tensor]:
        """The tensors that PASD added to its U-Net, of a whole model or of a compact export. WeightsError for
        no PASD.
        """
        state, source = self._read("pasd_added" if "pasd_added" in self._located.nets else "unet")
        if not (added := added_tensors(state)):
            raise WeightsError(f"{source.path}: a U-Net without what PASD adds; expected one of PASD's")
        return added

    def _read(self, part: str) -> tuple[dict[str, Tensor], Source]:
        """The tensors of `part` as they are stored, checked to be finite; the text encoder may be CLIP's text
        half.
        """
        if part not in self._stored:
            self._stored[part] = self._read_stored(part)
        return self._stored[part]

    def _read_stored(self, part: str) -> tuple[dict[str, Tensor], Source]:
        nets = self._located.nets
        if part == "text_encoder" and part not in nets and "clip" in nets:
            clip, source = self._read("clip")
            return {key: tensor for key, tensor in clip.items() if key.startswith("text_model.")}, source
        source = self._located.net(part)
        state = self._located.contents(part).tensors(part)
        check_finite(source.path, state)
        return state, source


def _widened(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of 8 bits in float16, which holds each of their values; a change would be lost in 8 bits."""
    return {key: tensor.half() if tensor.element_size() == 1 else tensor for key, tensor in state.items()}


def _check_inputs(path: Path, theirs: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """WeightsError for an inpainting U-Net to be blended with an ordinary one, or the other way round."""
    takes, expected = (state["conv_in.weight"].shape[1:2] for state in (theirs, own))
    if takes != expected:
        raise WeightsError(
            f"{path}: a U-Net of {takes[0]} channels in, to go with one of {expected[0]}; an inpainting model, of 9, takes a "
            "mask too: tools.edit runs it, as it is"
        )


def check_finite(path: Path, state: Mapping[str, Tensor]) -> None:
    """WeightsError where a value is NaN or infinite. The tensors are freshly read: their pages are let go."""
    for key, tensor in state.items():
        if tensor.is_floating_point() and not is_finite(tensor):
            raise WeightsError(
                f"{path}: {key!r:.80} holds values that are not finite; the file is damaged, take another"
            )
    release_pages(state.values())  # the look has made the whole file resident
