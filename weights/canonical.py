"""Any weights file's tensors under canonical names, part by part, whatever layout the file has.

Tensors  {key in the file: tensor} -> {part: {canonical key: tensor}}, views of the same memory
Parts    unet, vae, asymmetric_vae, text_encoder, clip, clip_vision, controlnet, rrdb; lora (names as in the
         file); pasd_added (PASD's own tensors without their base), asymmetric_added (what a mask-conditioned
         decoder has over a plain autoencoder)
Copying  this file, keymap.py, ldm.py, hub.py, ncnn.py, esrgan.py, lora.py, lora_changes.py,
         lora_names.py, merge.py, detect.py, extras.py, fields.py, files.py, pickles.py and taesd.py;
         torch, safetensors
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from .detect import detect_family, refuse_channels, refuse_foreign
from .esrgan import esrgan_map
from .extras import find_marks, find_scales, is_valueless, scaled, unwrapped
from .files import WeightsError
from .hub import hub_map
from .keymap import KeyMap
from .ldm import IGNORED, ema_name, find_parts, linear, map_of
from .lora import is_lora
from .merge import is_decoder_delta, is_delta
from .taesd import taesd_map

State = Mapping[str, Tensor]
_PROJECTION = "text_projection.weight"
# Family -> part, where they differ.
_PARTS = {"clip_text": "text_encoder", "pasd_unet": "unet", "srvgg": "rrdb", "tiny_vae": "vae"}


@dataclass(frozen=True)
class Contents:
    """What a file holds: each of its keys is in `names`, `ignored` or `unknown`."""

    source: str  # where the tensors come from, for messages
    layout: str  # in words
    state: State  # the tensors under the file's own keys
    names: Mapping[str, tuple[str, str]]  # key in the file -> part, canonical key
    ignored: tuple[str, ...] = ()  # no weights of any net: schedule, counters, positions, training's losses
    unknown: tuple[str, ...] = ()  # of no part
    marks: tuple[str, ...] = ()  # what the file says of the model by tensors without values; see extras.MARKS
    notes: tuple[str, ...] = ()  # what was passed over that nobody here knows, in words
    scales: Mapping[str, str] = field(default_factory=dict)  # key of an 8-bit weight -> key of its scale

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts there are, in the file's order."""
        return tuple(dict.fromkeys(part for part, _ in self.names.values()))

    def tensors(self, part: str) -> dict[str, Tensor]:
        """One part's tensors under canonical keys. WeightsError if the file has no such part, or tensors of
        no part at all.
        """
        if self.unknown:
            raise WeightsError(
                f"{self.source}: {len(self.unknown)} tensors belong to no net of {self.layout}, first {self.unknown[0][:80]!r}; "
                "`python -m tools.models keys` lists them"
            )
        if not (found := self.renamed(part)):
            raise WeightsError(f"{self.source}: {self.layout}, has no {part}; it has {', '.join(self.parts)}")
        return found

    def renamed(self, part: str) -> dict[str, Tensor]:
        """One part's tensors under canonical keys, whatever else the file has; {} if it has no such part."""
        return {name: linear(name, self._tensor(key)) for key, (of, name) in self.names.items() if of == part}

    def _tensor(self, key: str) -> Tensor:
        if key not in self.scales:
            return self.state[key]
        try:
            return scaled(key, self.state[key], self.state[self.scales[key]])
        except WeightsError as error:
            raise WeightsError(f"{self.source}: {error}") from None


def read_contents(state: State, source: object = "the state dict") -> Contents:
    """Which nets these tensors are, and their canonical names. `source` (a path) begins the messages.

    Raises WeightsError for the models that nothing here runs, and for what is no model known here.
    """
    state = unwrapped(state)
    refuse_foreign(state, source)
    refuse_channels(state, source)
    try:
        marks = find_marks(state)
    except WeightsError as error:
        raise WeightsError(f"{source}: {error}") from None
    scales, unused = find_scales(state)
    strange = [
        key
        for key in state
        if key not in marks and not IGNORED.fullmatch(key) and is_valueless(key, state[key])
    ]
    aside = dict.fromkeys((*marks, *scales.values(), *unused, *strange))
    contents = _read({key: tensor for key, tensor in state.items() if key not in aside} or state, source)
    notes = ()
    if strange:
        first = ", ".join(f"{key!r:.40}" for key in strange[:3])
        notes = (
            f"{source}: {len(strange)} tensors without values that are not known here were passed over, first {first}",
        )
    return replace(
        contents,
        layout=contents.layout + (", in scaled 8 bits" if scales else ""),
        state=state,
        ignored=(*contents.ignored, *aside),
        marks=tuple(sorted(set(marks.values()))),
        notes=notes,
        scales=scales,
    )


def _read(state: State, source: object) -> Contents:
    if is_lora(state):
        return Contents(str(source), "a LoRA", state, {key: ("lora", key) for key in state})
    if is_delta(state):
        return _delta(state, str(source))
    if is_decoder_delta(state):
        names = {key: ("asymmetric_added", key) for key in state}
        return Contents(str(source), "a mask-conditioned decoder without its autoencoder", state, names)
    if prefixes := find_parts(state):
        return _ldm(state, str(source), prefixes)
    return _one_net(state, str(source))


def _one_net(state: State, source: str) -> Contents:
    keys = [key for key in state if not IGNORED.fullmatch(key)]
    old = hub_map(keys) or esrgan_map(keys) or taesd_map(keys)
    renamed = _renamed(old, keys, source)
    family = detect_family({new: state[key] for key, new in renamed.items()}, source)
    # Beside a text encoder it leads to CLIP's common space, where no U-Net looks.
    unused = {_PROJECTION} if family == "clip_text" else set()
    names = {key: (_PARTS.get(family, family), new) for key, new in renamed.items() if new not in unused}
    ignored = tuple(key for key in state if key not in names)
    return Contents(source, f"one net ({family}{', older names' if old else ''})", state, names, ignored)


def _ldm(state: State, source: str, prefixes: Mapping[str, str]) -> Contents:
    """A file of the latent diffusion code: the nets by their prefixes, averaged weights instead of the last
    ones.
    """
    names: dict[str, tuple[str, str]] = {}
    alone = {"vae": "LDM's autoencoder", "controlnet": "a ControlNet in its authors' layout"}
    layout = alone.get("".join(prefixes), "a Stable Diffusion 1.x single file")
    for part, prefix in prefixes.items():
        keys = [key for key in state if key.startswith(prefix) and not IGNORED.fullmatch(key)]
        inner = [key.removeprefix(prefix) for key in keys]
        old = hub_map(inner) if part == "text_encoder" else map_of(part, inner)
        renamed = _renamed(old, inner, source)
        averages = {key: ema_name(key) for key in keys} if part == "unet" else {}
        averaged = bool(averages) and all(name in state for name in averages.values())
        if averaged:
            layout += " with averaged (EMA) weights, which are taken"
        for key, name in zip(keys, renamed.values(), strict=True):
            names[averages[key] if averaged else key] = (part, name)
    rest = [key for key in state if key not in names]
    passed_over = {key for key in rest if ema_name(key) in names}
    ignored = {key: None for key in rest if IGNORED.fullmatch(key) or key in passed_over}  # a set in order
    unknown = tuple(key for key in rest if key not in ignored)
    return Contents(source, layout, state, names, tuple(ignored), unknown)


def _delta(state: State, source: str) -> Contents:
    names = {}
    for key in state:
        head, _, name = key.partition(".")
        names[key] = ("pasd_added" if head == "unet" else "controlnet", name)
    return Contents(source, "PASD without its base (compact export)", state, names)


def _renamed(old: KeyMap | None, keys: Iterable[str], source: str) -> dict[str, str]:
    """key -> canonical key, in order; what the map does not know keeps its name, for strict loading."""
    keys = list(keys)
    known = old.there(keys).renamed if old else {}
    renamed = {key: known.get(key, key) for key in keys}
    if len(set(renamed.values())) < len(keys):
        raise WeightsError(
            f"{source}: two of its tensors are the same one of the net, under different names; a damaged merge"
        )
    return renamed
