"""LoRA files: low-rank changes to a model's weights. Read them under any of their names, and merge them into
a base.

Paper    Hu et al. 2021, arXiv:2106.09685, section 4.1; convolutions: Yeh et al. 2023, arXiv:2309.14859
         (LoCon, Tucker form)
Tensors  down (r, in[, kh, kw]), up (out, r[, 1, 1]), scale alpha / r: W (out, in[, kh, kw]) + weight * scale
         * up . down in the Tucker form down (r, in, 1, 1) and up (out, r, 1, 1) with mid (r, r, kh, kw)
         between them
Weights  kohya names (lora_unet_..., lora_te_...) and those of diffusers and PEFT, old and new; the base's are
         canonical
Copying  this file, files.py (for WeightsError) and pickles.py; torch, safetensors through them
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .files import WeightsError

State = Mapping[str, Tensor]

PARTS = {"unet": "U-Net", "text_encoder": "text encoder"}  # what a LoRA changes, and how to call it
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
ALPHA_DTYPES = (*DTYPES, torch.int64, torch.int32)  # an alpha may stay the integer that a trainer was given
MAX_ALPHA = 1e6
MAX_RANK = 4  # times the layer's larger side; at half a square layer's side it stores as much as the layer
_SETTINGS = ("lora_alpha", "alpha_pattern", "use_rslora")  # of PEFT, as far as they touch a layer's scale
METADATA_KEY = "lora_adapter_metadata"  # where diffusers writes PEFT's settings, JSON, since 2025

# The last part of a name: kohya; diffusers, old and older; PEFT with or without an adapter's name.
_ROLE = re.compile(
    r"(?P<path>.+?)(?:\.lora_(down|up|mid)|(?:\.lora|_lora|\.lora_linear_layer)\.(down|up)|\.lora_([AB])(?:\.[^.]+)?)\.weight",
    re.DOTALL,
)
_ALPHA = re.compile(r"(?P<path>.+?)(?:\.lora|_lora|\.lora_linear_layer)?\.alpha", re.DOTALL)
_PREFIXES = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "unet.": "unet",
    "text_encoder.": "text_encoder",
}
# First parts of names that come without a prefix, from files that hold one net.
_ROOTS = {
    "conv_in": "unet",
    "time_embedding": "unet",
    "down_blocks": "unet",
    "mid_block": "unet",
    "up_blocks": "unet",
    "conv_out": "unet",
    "text_model": "text_encoder",
}
# Ends of flattened names that old diffusers files write for every attention -> what the nets call them.
_OLD_ENDS = (
    (re.compile(r"(?<=self_attn_)to_([qkv])$"), r"\1_proj"),
    (re.compile(r"(?<=self_attn_)to_out$"), "out_proj"),
    (re.compile(r"(?<=_to_out)$"), "_0"),
)

_MARKS = ("\nlora_", ".lora_", ".lora.", "_lora.", ".hada_", ".lokr_")  # "\n" marks a key's beginning
_SDXL = "a LoRA of SDXL; use one of Stable Diffusion 1.x"
_LATER = "a LoRA of FLUX or Stable Diffusion 3; use one of Stable Diffusion 1.x"
_KIND = "which is not read; use a plain LoRA or LoCon"
# Part of a key ("\n" is either of its ends) -> what it gives away, and the way out. The first that is found
# counts.
_FOREIGN = (
    ("\nlora_te2_", _SDXL),
    ("text_encoder_2.", _SDXL),
    ("\nlora_unet_input_blocks_", _SDXL),
    ("\nlora_unet_middle_block_", _SDXL),
    ("\nlora_unet_output_blocks_", _SDXL),
    ("add_embedding", _SDXL),
    ("double_blocks", _LATER),
    ("single_blocks", _LATER),
    ("joint_blocks", _LATER),
    ("\ntransformer.", _LATER),
    (".hada_", f"a LoHa, {_KIND}"),
    (".lokr_", f"a LoKr, {_KIND}"),
    (".dora_scale", f"a DoRA, {_KIND}"),
    (".lora_magnitude_vector", f"a DoRA, {_KIND}"),
    (".oft_", f"an OFT, {_KIND}"),
    (".diff\n", f"a file of whole differences, {_KIND}"),
    (".w_norm", f"a file with changed norms, {_KIND}"),
    (".lora_embedding_", f"a LoRA with changed embeddings, {_KIND}"),
)


@dataclass(frozen=True, eq=False)
class LoraLayer:
    """The change to one module's weight, and which: `part`, and the module's path with "_" for dots."""

    part: str  # a key of PARTS
    module: str  # without a leading "text_model_"
    down: Tensor  # (r, in) or (r, in, kh, kw)
    up: Tensor  # (out, r) or (out, r, 1, 1)
    mid: Tensor | None  # (r, r, kh, kw), of the Tucker form
    alpha: float  # the change is to be scaled by alpha / rank

    @property
    def rank(self) -> int:
        """r: columns of `up`, rows of `down`."""
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape (out, in, kh, kw); a linear layer's kernel is 1 x 1."""
        kernel = (self.down if self.mid is None else self.mid).shape[2:] or (1, 1)
        return (self.up.shape[0], self.down.shape[1], *kernel)

    def change(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Matrices (out, r) and (r, in * kh * kw) in `dtype`, whose product is the unscaled change."""
        down = self.down.to(dtype).flatten(1)
        if self.mid is not None:
            down = torch.einsum("abhw,bi->aihw", self.mid.to(dtype), down).flatten(1)
        return self.up.to(dtype).flatten(1), down


@dataclass(frozen=True, eq=False)
class Lora:
    """A LoRA file's layers, at least one; the tensors are those of the file."""

    source: str
    layers: tuple[LoraLayer, ...]

    def count(self) -> dict[str, int]:
        """Number of layers of each part that has some, in the order of PARTS."""
        found = Counter(layer.part for layer in self.layers)
        return {part: found[part] for part in PARTS if found[part]}

    def describe(self) -> str:
        """One line such as "192 layers of the U-Net, 72 layers of the text encoder, rank 4 (alpha 2)"."""
        counts = [
            f"{n} {'layer' if n == 1 else 'layers'} of the {PARTS[part]}" for part, n in self.count().items()
        ]
        ranks, alphas = [layer.rank for layer in self.layers], [layer.alpha for layer in self.layers]
        return f"{', '.join(counts)}, rank {_span(ranks)} (alpha {_span(alphas)})"


def is_lora(keys: Iterable[str]) -> bool:
    """Whether these are a LoRA's keys, of a kind that `read_lora` reads or of one that it knows to refuse."""
    text = "\n" + "\n".join(keys)
    return any(mark in text for mark in _MARKS)


def read_lora(state: State, source: object = "the LoRA", metadata: Mapping[str, str] | None = None) -> Lora:
    """The layers of a LoRA file's tensors, checked but not copied. `source` (a path) begins every message.

    A layer's alpha is its own tensor's, else the one that diffusers wrote into the safetensors `metadata`,
    else its rank, that is scale 1. Raises WeightsError for other kinds (LoHa, LoKr, DoRA, ...), other models
    (SDXL, ...), names that are not known, layers that are incomplete or do not fit in themselves, and numbers
    that are not finite.
    """
    try:
        _refuse_foreign(state)
        groups: dict[tuple[str, str], dict[str, Tensor]] = {}
        for key, tensor in state.items():
            part, module, role = _parse(key)
            group = groups.setdefault((part, module), {})
            if role in group:
                raise WeightsError(f"{_short(key)} gives {role!r} of its layer a second time")
            _check_numbers(key, role, tensor)
            group[role] = tensor
        if not groups:
            raise WeightsError("no tensors; expected a LoRA")
        alphas = _stored_alphas(metadata or {})
        layers = tuple(_layer(*place, group, alphas) for place, group in groups.items())
    except WeightsError as error:
        raise WeightsError(f"{source}: {error}") from None
    return Lora(str(source), layers)


def merge_loras(
    base: Mapping[str, State],
    loras: Sequence[tuple[Lora, float]],
    *,
    alpha: Literal["honour", "ignore"] = "honour",
) -> dict[str, dict[str, Tensor]]:
    """The changed tensors, and only those, of `base` {part: state dict} with each of `loras` added at its
    weight.

    W + sum of weight * alpha / rank * (up . down), summed in float32 (float64 for a float64 W) and rounded
    once to W's dtype; "ignore" leaves alpha / rank out, as PASD's code does. `base` stays as it is, so its
    own tensors undo the merge. A part that `base` has not is skipped. Raises WeightsError for a layer whose
    module the base lacks, or which does not fit it, and for a sum that is not finite.
    """
    if alpha not in ("honour", "ignore"):
        raise ValueError(f"alpha is {alpha!r}: expected 'honour' or 'ignore'")
    modules = {part: _modules(base[part]) for part in PARTS if part in base}
    changes: dict[tuple[str, str], list[tuple[LoraLayer, float]]] = {}
    for lora, weight in loras:
        _check_fit(lora, base, modules)
        for layer in lora.layers:
            if layer.part in base:
                scale = layer.alpha / layer.rank if alpha == "honour" else 1.0
                target = layer.part, modules[layer.part][layer.module]
                changes.setdefault(target, []).append((layer, weight * scale))
    merged: dict[str, dict[str, Tensor]] = {}
    for (part, key), terms in changes.items():
        merged.setdefault(part, {})[key] = _add(base[part][key], terms, key)
    return merged


def _add(weight: Tensor, terms: list[tuple[LoraLayer, float]], key: str) -> Tensor:
    """`weight` plus all scaled `terms`, in a new tensor of its dtype."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    total = weight.to(wide, copy=True, memory_format=torch.contiguous_format)
    for layer, scale in terms:
        total.view(len(total), -1).addmm_(*layer.change(wide), alpha=scale)
    total = total.to(weight.dtype)
    if not is_finite(total):
        raise WeightsError(
            f"{_short(key)} with the LoRA added is not finite in {total.dtype}; lower its weight"
        )
    return total


def _modules(state: State) -> dict[str, str]:
    """{flattened module path: key of its weight}."""
    weights = (key for key in state if key.endswith(".weight"))
    return {_flatten(key.removesuffix(".weight")): key for key in weights}


def _flatten(path: str) -> str:
    """The path as kohya's names have it. transformers 5 drops `text_model.`, so that it is left out
    everywhere.
    """
    return path.replace(".", "_").removeprefix("text_model_")


def _check_fit(lora: Lora, base: Mapping[str, State], modules: Mapping[str, Mapping[str, str]]) -> None:
    layers = [layer for layer in lora.layers if layer.part in base]
    misfits = [
        (layer, problem)
        for layer in layers
        if (problem := _misfit(layer, base[layer.part], modules[layer.part]))
    ]
    if misfits:
        layer, problem = misfits[0]
        raise WeightsError(
            f"{lora.source}: {len(misfits)} of {len(layers)} layers do not fit the base; the first, {_short(layer.module)} of "
            f"the {PARTS[layer.part]}, {problem}; is it a LoRA of another model?"
        )


def _misfit(layer: LoraLayer, state: State, modules: Mapping[str, str]) -> str | None:
    if layer.module not in modules:
        return "is no module of the base"
    weight = state[modules[layer.module]]
    if weight.ndim not in (2, 4) or (*weight.shape, 1, 1)[:4] != layer.shape:
        return f"changes a weight of shape {layer.shape}, the base's is {tuple(weight.shape)}"
    return None if weight.dtype in DTYPES else f"would change a weight of {weight.dtype}"


def _refuse_foreign(state: State) -> None:
    text = "\n".join(("", *state, ""))
    for mark, what in _FOREIGN:
        if mark in text:
            key = next(key for key in state if mark in f"\n{key}\n")
            raise WeightsError(f"{what}; it has {_short(key)}")


def _parse(key: str) -> tuple[str, str, str]:
    """Part, flattened module path and role ("down", "up", "mid" or "alpha") of a key."""
    found = _ROLE.fullmatch(key) or _ALPHA.fullmatch(key)
    path = found["path"].replace("base_model.model.", "") if found else ""  # PEFT's wrapper
    role = next(filter(None, found.groups()[1:]), "alpha") if found else ""
    prefix = next((prefix for prefix in _PREFIXES if path.startswith(prefix)), "")
    part = _PREFIXES[prefix] if prefix else _ROOTS.get(path.split(".")[0])
    if part is None:
        raise WeightsError(f"{_short(key)} is no LoRA key of a U-Net or a text encoder that is known here")
    module = _flatten(path.removeprefix(prefix).replace(".processor.", "."))
    for end, name in _OLD_ENDS:
        module = end.sub(name, module)
    return part, module, {"A": "down", "B": "up"}.get(role, role)


def _check_numbers(key: str, role: str, tensor: Tensor) -> None:
    if tensor.dtype not in (ALPHA_DTYPES if role == "alpha" else DTYPES):
        raise WeightsError(
            f"{_short(key)} is of {tensor.dtype}, expected float32, float16, bfloat16 or float64"
        )
    if role == "alpha" and (tensor.numel() != 1 or not abs(tensor.item()) <= MAX_ALPHA):
        found = f"shape {_short(tuple(tensor.shape))}" if tensor.numel() != 1 else f"{tensor.item():g}"
        raise WeightsError(f"{_short(key)} is {found}, expected one number up to {MAX_ALPHA:g}")
    if not is_finite(tensor):
        raise WeightsError(
            f"{_short(key)} has numbers that are not finite: the file is damaged, or its training failed"
        )


def _layer(part: str, module: str, group: Mapping[str, Tensor], alphas: Mapping[str, float]) -> LoraLayer:
    missing = [role for role in ("down", "up") if role not in group]
    if missing:
        raise WeightsError(
            f"{_short(module)} of the {PARTS[part]} has {' and '.join(group)} but no {' and no '.join(missing)}"
        )
    down, up, mid = group["down"], group["up"], group.get("mid")
    if not _fits_itself(down, up, mid):
        found = ", ".join(
            f"{role} {tuple(group[role].shape)}" for role in ("down", "mid", "up") if role in group
        )
        raise WeightsError(
            f"{_short(module)} of the {PARTS[part]} has {found[:90]}: expected (r, in[, k, k]) and (out, r[, 1, 1]), r at most "
            f"{MAX_RANK} times the layer's larger side"
        )
    alpha = float(group["alpha"].item()) if "alpha" in group else alphas.get(part, float(len(down)))
    return LoraLayer(part, module, down, up, mid, alpha)


def _fits_itself(down: Tensor, up: Tensor, mid: Tensor | None) -> bool:
    tensors = (down, up) if mid is None else (down, up, mid)
    if any(tensor.ndim not in (2, 4) or 0 in tensor.shape for tensor in tensors):
        return False
    rank, point = len(down), ((), (1, 1))
    fits = up.shape[1] == rank and up.shape[2:] in point
    if mid is not None:
        fits = fits and mid.ndim == 4 and mid.shape[:2] == (rank, rank) and down.shape[2:] in point
    return fits and rank <= MAX_RANK * max(len(up), down[0].numel())


def _stored_alphas(metadata: Mapping[str, str]) -> dict[str, float]:
    """{part: alpha} as PEFT's settings in the metadata say, prefixed by the part, or bare in a file of one
    net.
    """
    try:
        settings = json.loads(metadata.get(METADATA_KEY, "{}"))
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise WeightsError(f"the metadata's {METADATA_KEY} is not a JSON table")
    alphas = {}
    for part in PARTS:
        alpha, pattern, root = (settings.get(f"{part}.{name}", settings.get(name)) for name in _SETTINGS)
        if pattern or root:
            raise WeightsError(
                "its metadata asks for rsLoRA or for an alpha per layer (alpha_pattern), which are not read"
            )
        if alpha is None:
            continue
        if type(alpha) not in (int, float) or not abs(alpha) <= MAX_ALPHA:
            raise WeightsError(
                f"its metadata says lora_alpha {_short(alpha)}, expected a number up to {MAX_ALPHA:g}"
            )
        alphas[part] = float(alpha)
    return alphas


def is_finite(tensor: Tensor) -> bool:
    """Whether every value is. In one pass; torch.isfinite takes tens of times as long. A NaN is both the
    least and the greatest.
    """
    values = tensor if tensor.element_size() > 1 else tensor.float()  # float8 knows no order
    return tensor.numel() == 0 or all(bound.isfinite() for bound in values.aminmax())


def _span(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _short(value: object) -> str:
    """What stands in a message for a value from the file: one line, at most 100 characters."""
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."
