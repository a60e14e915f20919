"""LoRA files: small changes to a model's weights. Read them under any of their names, and merge them into a
base.

Papers   Hu et al. 2021, arXiv:2106.09685, section 4.1; Yeh et al. 2023, arXiv:2309.14859 (LoCon, LoHa, LoKr);
         Kalajdzievski 2023, arXiv:2312.03732 (rsLoRA); Liu et al. 2024, arXiv:2402.09353 (DoRA)
Tensors  W (out, in[, kh, kw]) + weight * scale * change; the change is up . down or what lora_changes.py has,
         the scale alpha / r, or alpha / sqrt(r) of an rsLoRA
Weights  names of kohya and LyCORIS (lora_unet_..., lora_te_...), of diffusers and PEFT, old and new, and of
         the original code's modules (input_blocks, ...); the base's are canonical
Copying  this file, lora_changes.py, lora_names.py, ldm.py, keymap.py, files.py (for WeightsError) and
         pickles.py; torch, safetensors through them
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from .files import WeightsError
from .ldm import map_to
from .lora_changes import Change, ChangeError, Hadamard, Kronecker, LowRank, Magnitude, Whole, fits, tucker
from .lora_names import (
    BUNDLED,
    MAX_NUMBER,
    METADATA_KEY,
    PARTS,
    UNKNOWN,
    PeftSettings,
    flatten_path,
    is_lora,
    module_name,
    parse_key,
    read_settings,
    refuse_foreign,
    short,
)

__all__ = [
    "METADATA_KEY", "PARTS", "Lora", "LoraLayer", "is_finite", "is_lora", "left_out", "merge_loras", "read_lora",
]  # fmt: skip

State = Mapping[str, Tensor]

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
STORED_DTYPES = (*DTYPES, torch.float8_e4m3fn, torch.float8_e5m2)
# An alpha may stay the integer that a trainer was given.
NUMBER_DTYPES = (*STORED_DTYPES, torch.int64, torch.int32)
_NUMBERS = ("alpha", "scalar")  # roles that are one number


@dataclass(frozen=True, eq=False)
class LoraLayer:
    """The change to one module, and which: `part`, and the module's path with "_" for dots."""

    part: str  # a key of PARTS
    module: str  # without a leading "text_model_"
    change: Change | None  # to its weight; None where only the bias changes
    alpha: float  # the change is to be scaled by alpha / rank
    scalar: float = 1.0  # and by this
    root: bool = False  # rsLoRA: by alpha / sqrt(rank)
    magnitude: Magnitude | None = None  # DoRA: what the changed weight is rescaled to
    bias: Tensor | None = None  # (out,), added to the bias
    scaled_bias: bool = False  # with the change's scale

    @property
    def rank(self) -> int | None:
        """r, which alpha is divided by; None where nothing is factored."""
        return None if self.change is None else self.change.rank

    @property
    def kind(self) -> str:
        """What the change is called: LoRA, LoHa, ..., DoRA."""
        name = "bias" if self.change is None else self.change.name
        return name if self.magnitude is None else "DoRA" if name == "LoRA" else f"{name} with DoRA"

    def scale(self, *, alpha: bool = True) -> float:
        """What the change is multiplied by; without `alpha` the scalar alone."""
        if not alpha or self.rank is None:
            return self.scalar * (self.alpha if alpha else 1.0)
        return self.scalar * self.alpha / (self.rank**0.5 if self.root else self.rank)


@dataclass(frozen=True, eq=False)
class Lora:
    """A LoRA file's layers, at least one; the tensors are those of the file."""

    source: str
    layers: tuple[LoraLayer, ...]
    notes: tuple[str, ...] = ()  # what of the file is left out, a line each that begins with `source`

    def count(self) -> dict[str, int]:
        """Number of layers of each part that has some, in the order of PARTS."""
        found = Counter(layer.part for layer in self.layers)
        return {part: found[part] for part in PARTS if found[part]}

    def describe(self) -> str:
        """One line such as "192 layers of the U-Net, 72 layers of the text encoder, rank 4 (alpha 2)"; kinds
        other than LoRA are named in front.
        """
        counts = [
            f"{n} {'layer' if n == 1 else 'layers'} of the {PARTS[part]}" for part, n in self.count().items()
        ]
        kinds = list(dict.fromkeys(layer.kind for layer in self.layers))
        factored = [layer for layer in self.layers if layer.rank is not None]
        ranks, alphas = [layer.rank or 0 for layer in factored], [layer.alpha for layer in factored]
        front = "" if kinds == ["LoRA"] else f"{', '.join(kinds)}: "
        rank = f", rank {_span(ranks)} (alpha {_span(alphas)})" if factored else ""
        return f"{front}{', '.join(counts)}{rank}"


def read_lora(state: State, source: object = "the LoRA", metadata: Mapping[str, str] | None = None) -> Lora:
    """The layers of a LoRA file's tensors, checked but not copied. `source` (a path) begins every message.

    A layer's alpha is its own tensor's, else the one that PEFT's settings in the safetensors `metadata` give
    it (lora_alpha, alpha_pattern; use_rslora), else its rank, that is scale 1. Left out, with a line in
    `notes`: bundled embeddings, and modules of other nets where they are at most half of the file. Raises
    WeightsError for other kinds (OFT, ...), other models (SDXL, ...), names of our nets that are not known,
    layers that are incomplete or do not fit in themselves, and numbers that are not finite.
    """
    try:
        refuse_foreign(state)
        notes: list[str] = []
        groups = _group(state, notes)
        settings = {part: read_settings(metadata or {}, part) for part in PARTS}
        layers = tuple(
            _layer(part, module, group, settings[part]) for (part, module), group in groups.items()
        )
    except WeightsError as error:
        raise WeightsError(f"{source}: {error}") from None
    return Lora(str(source), layers, tuple(f"{source}: {note}" for note in notes))


def merge_loras(
    base: Mapping[str, State],
    loras: Sequence[tuple[Lora, float]],
    *,
    alpha: Literal["honour", "ignore"] = "honour",
) -> dict[str, dict[str, Tensor]]:
    """The changed tensors, and only those, of `base` {part: state dict} with each of `loras` added at its
    weight.

    W + sum of weight * scale * change, summed in float32 (float64 for a float64 W) and rounded once to W's
    dtype; "ignore" leaves alpha / rank out, as PASD's code does. Of a DoRA the change is the difference
    between the rescaled sum at weight 1 and W, so weight 0 leaves W as it is. `base` stays as it is, so its
    own tensors undo the merge. A part that `base` has not is skipped, and so are modules that it has not
    where they are at most half of a LoRA's (`left_out` names them). Raises WeightsError where more are
    missing, for a layer that does not fit its module, and for a sum that is not finite.
    """
    if alpha not in ("honour", "ignore"):
        raise ValueError(f"alpha is {alpha!r}: expected 'honour' or 'ignore'")
    modules = {part: _modules(part, base[part]) for part in PARTS if part in base}
    changes: dict[tuple[str, str], list[_Term]] = {}
    for lora, weight in loras:
        _check_fit(lora, base, modules)
        for layer in lora.layers:
            path = modules.get(layer.part, {}).get(layer.module)
            if path is None:
                continue
            scale = layer.scale(alpha=alpha == "honour")
            if layer.change is not None:
                term = _Term(layer.change, weight, scale, layer.magnitude)
                changes.setdefault((layer.part, f"{path}.weight"), []).append(term)
            if layer.bias is not None:
                term = _Term(Whole(layer.bias), weight, scale if layer.scaled_bias else 1.0)
                changes.setdefault((layer.part, f"{path}.bias"), []).append(term)
    merged: dict[str, dict[str, Tensor]] = {}
    for (part, key), terms in changes.items():
        merged.setdefault(part, {})[key] = _add(base[part][key], terms, key)
    return merged


def left_out(lora: Lora, base: Mapping[str, State]) -> list[str]:
    """A line on the modules that `merge_loras` leaves out for the lack of them in `base`; [] for none."""
    modules = {part: _modules(part, base[part]) for part in PARTS if part in base}
    layers = [layer for layer in lora.layers if layer.part in base]
    if not (missing := [layer for layer in layers if layer.module not in modules[layer.part]]):
        return []
    first = f"{short(missing[0].module)} of the {PARTS[missing[0].part]}"
    number = _of(len(missing), len(layers))
    return [f"{lora.source}: {number} left out, which the base has not; first {first}"]


@dataclass(frozen=True, eq=False)
class _Term:
    """One change to a tensor: weight * (what it adds)."""

    change: Change
    weight: float
    scale: float
    magnitude: Magnitude | None = None


def _add(tensor: Tensor, terms: list[_Term], key: str) -> Tensor:
    """`tensor` plus all `terms`, in a new one of its dtype."""
    wide = torch.promote_types(tensor.dtype, torch.float32)
    total = tensor.to(wide, copy=True, memory_format=torch.contiguous_format)
    for term in terms:
        if term.magnitude is not None:
            own = tensor.to(wide)
            changed = own + term.scale * term.change.matrix(wide).reshape(tensor.shape)
            total.add_(term.magnitude.rescaled(changed) - own, alpha=term.weight)
        elif isinstance(term.change, LowRank):  # without the change in memory
            total.view(len(total), -1).addmm_(*term.change.factors(wide), alpha=term.weight * term.scale)
        else:
            total.add_(term.change.matrix(wide).reshape(total.shape), alpha=term.weight * term.scale)
    total = total.to(tensor.dtype)
    if not is_finite(total):
        raise WeightsError(
            f"{short(key)} with the LoRA added is not finite in {total.dtype}; lower its weight"
        )
    return total


def _modules(part: str, state: State) -> dict[str, str]:
    """{flattened module path: path}; of a U-Net under the original code's paths too."""
    paths = [key.removesuffix(".weight") for key in state if key.endswith(".weight")]
    names = {flatten_path(path): path for path in paths}
    if part == "unet":
        theirs = map_to("unet", state).back(paths).renamed
        names = {flatten_path(name): path for path, name in theirs.items()} | names
    return names


def _check_fit(lora: Lora, base: Mapping[str, State], modules: Mapping[str, Mapping[str, str]]) -> None:
    layers = [layer for layer in lora.layers if layer.part in base]
    problems = [
        (layer, problem)
        for layer in layers
        if (problem := _misfit(layer, base[layer.part], modules[layer.part]))
    ]
    misshapen = [(layer, problem) for layer, problem in problems if problem is not _NO_MODULE]
    if not misshapen and len(problems) <= len(layers) / 2:  # `left_out` tells of these
        return
    layer, problem = [*misshapen, *problems][0]
    raise WeightsError(
        f"{lora.source}: {len(problems)} of {len(layers)} layers do not fit the base; the first, {short(layer.module)} of "
        f"the {PARTS[layer.part]}, {problem}; is it a LoRA of another model?"
    )


_NO_MODULE = "is no module of the base"


def _misfit(layer: LoraLayer, state: State, modules: Mapping[str, str]) -> str | None:
    if layer.module not in modules:
        return _NO_MODULE
    path = modules[layer.module]
    weight, bias = state[f"{path}.weight"], state.get(f"{path}.bias")
    if layer.change is not None and not fits(layer.change, weight):
        return f"changes a weight of shape {layer.change.shape}, the base's is {tuple(weight.shape)}"
    if layer.magnitude is not None and not layer.magnitude.fits(weight):
        return f"has {layer.magnitude.values.numel():,} lengths for a weight of {tuple(weight.shape)}"
    if layer.bias is not None and (bias is None or bias.shape != layer.bias.shape):
        found = "has none" if bias is None else f"is of {tuple(bias.shape)}"
        return f"changes a bias of shape {tuple(layer.bias.shape)}, the base's {found}"
    changed = [weight] if layer.change is not None else []
    changed += [bias] if layer.bias is not None and bias is not None else []
    wrong = next((tensor.dtype for tensor in changed if tensor.dtype not in DTYPES), None)
    return wrong and f"would change a weight of {wrong}"


@dataclass
class _Group:
    """What a file says of one module."""

    path: str  # as the file spells it, without the part
    tensors: dict[str, Tensor] = field(default_factory=dict)  # role -> tensor


def _group(state: State, notes: list[str]) -> dict[tuple[str, str], _Group]:
    """{(part, module): group} of all keys but those left out, which a line in `notes` tells of."""
    groups: dict[tuple[str, str], _Group] = {}
    bundled: dict[str, None] = {}  # a set in order
    strange: dict[str, str] = {}  # path -> first key
    for key, tensor in state.items():
        if key.startswith(BUNDLED):
            bundled[key.removeprefix(BUNDLED).split(".")[0]] = None
            continue
        part, path, role = parse_key(key)
        if part is None:
            strange.setdefault(path, key)
            continue
        group = groups.setdefault((part, module_name(path)), _Group(path)).tensors
        if role in group:
            raise WeightsError(f"{short(key)} gives {role!r} of its layer a second time")
        _check_numbers(key, role, tensor)
        group[role] = tensor
    if not groups and not strange:
        raise WeightsError("no tensors of a LoRA" if bundled else "no tensors; expected a LoRA")
    if len(strange) > len(groups):
        raise WeightsError(f"{short(next(iter(strange.values())))} is {UNKNOWN}")
    if strange:
        total = len(groups) + len(strange)
        notes.append(
            f"{_of(len(strange), total)} left out, of no net here; first {short(next(iter(strange)))}"
        )
    if bundled:
        names = ", ".join(map(short, bundled))
        notes.append(
            f"{len(bundled)} bundled embedding{'s'[: len(bundled) > 1]} left out ({names}): it is the LoRA that is read"
        )
    return groups


def _check_numbers(key: str, role: str, tensor: Tensor) -> None:
    if tensor.dtype not in (NUMBER_DTYPES if role in _NUMBERS else STORED_DTYPES):
        raise WeightsError(f"{short(key)} is of {tensor.dtype}, expected floating point")
    if role in _NUMBERS and (tensor.numel() != 1 or not abs(tensor.item()) <= MAX_NUMBER):
        found = f"shape {short(tuple(tensor.shape))}" if tensor.numel() != 1 else f"{tensor.item():g}"
        raise WeightsError(f"{short(key)} is {found}, expected one number up to {MAX_NUMBER:g}")
    if not is_finite(tensor):
        raise WeightsError(
            f"{short(key)} has numbers that are not finite: the file is damaged, or its training failed"
        )


# ---- one layer ---------------------------------------------------------------------------------------------

# Roles that make a change, each kind's needed ones first.
_KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "LoRA": (("down", "up"), ("mid",)),
    "LoHa": (("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), ("hada_t1", "hada_t2")),
    "LoKr": (
        ("lokr_w1", "lokr_w2"),
        ("lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    ),
    "whole difference": (("diff",), ()),
    "norm": (("w_norm",), ()),
}
_BIASES = ("bias", "diff_b", "b_norm")


def _layer(part: str, module: str, found: _Group, settings: PeftSettings) -> LoraLayer:
    group, where = found.tensors, f"{short(module)} of the {PARTS[part]}"
    kinds = [kind for kind, roles in _KINDS.items() if any(role in group for role in (*roles[0], *roles[1]))]
    if len(kinds) > 1:
        raise WeightsError(f"{where} has a {kinds[0]} and a {kinds[1]}; expected one change to a module")
    biases = [role for role in _BIASES if role in group]
    if len(biases) > 1:
        raise WeightsError(f"{where} has {' and '.join(biases)}; expected one change to its bias")
    try:
        change = _change(kinds[0] if kinds else None, group, bool(biases))
        magnitude = _magnitude(group, change)
        bias = group[biases[0]] if biases else None
        if bias is not None and (bias.ndim != 1 or not len(bias)):
            raise ChangeError(f"{biases[0]} {tuple(bias.shape)!s:.60}: expected (out,)")
    except ChangeError as error:
        raise WeightsError(f"{where} has {error}") from None
    scalar = float(group["scalar"].item()) if "scalar" in group else 1.0
    alpha = _alpha(found, change, settings)
    scaled = "bias" in biases
    return LoraLayer(part, module, change, alpha, scalar, settings.root, magnitude, bias, scaled)


def _alpha(found: _Group, change: Change | None, settings: PeftSettings) -> float:
    """What is divided by the rank, or its root, for the scale; the scale itself where nothing is factored."""
    own = found.tensors.get("alpha")
    said = settings.alpha_of(found.path) if own is None else float(own.item())
    rank = None if change is None else change.rank
    if rank is None:  # LyCORIS scales what is factored only; PEFT knows the rank of a whole LoKr too
        if not isinstance(change, Kronecker) or own is not None or said is None or settings.rank is None:
            return 1.0
        return said / settings.rank
    if said is not None:
        return said
    return rank**0.5 if settings.root else float(rank)


def _change(kind: str | None, group: Mapping[str, Tensor], has_bias: bool) -> Change | None:
    """The change of that kind; None where only a bias changes. ChangeError where roles are missing or do not
    fit.
    """
    if kind is None and has_bias:
        return None
    needed, _ = _KINDS[kind or "LoRA"]
    if kind == "LoKr":
        return Kronecker(
            _lokr_factor(group, "lokr_w1", None), _lokr_factor(group, "lokr_w2", group.get("lokr_t2"))
        )
    _check_roles(group, needed)
    if kind == "LoHa":
        first, second = (
            tucker(group[f"hada_w{n}_a"], group[f"hada_w{n}_b"], group.get(f"hada_t{n}")) for n in (1, 2)
        )
        return Hadamard(first, second)
    if kind in ("whole difference", "norm"):
        return Whole(group[needed[0]], kind)
    return LowRank(group["up"], group["down"], group.get("mid"))


def _lokr_factor(group: Mapping[str, Tensor], name: str, middle: Tensor | None) -> LowRank | Whole:
    if name in group:
        if f"{name}_a" in group or f"{name}_b" in group:
            raise ChangeError(f"{name} whole and in factors")
        return Whole(group[name])
    _check_roles(group, (f"{name}_a", f"{name}_b"))
    return tucker(group[f"{name}_a"], group[f"{name}_b"], middle)


def _check_roles(group: Mapping[str, Tensor], needed: Sequence[str]) -> None:
    if missing := [role for role in needed if role not in group]:
        raise ChangeError(f"{' and '.join(group)} but no {' and no '.join(missing)}")


def _magnitude(group: Mapping[str, Tensor], change: Change | None) -> Magnitude | None:
    """DoRA's lengths, which PEFT has for each output, LyCORIS for each output (out, 1, ...) or input (1, in,
    ...).
    """
    names = [role for role in ("magnitude", "dora_scale") if role in group]
    if not names:
        return None
    values = group[names[0]]
    if change is None or isinstance(change, Whole) or len(names) > 1:
        raise ChangeError(f"{' and '.join(names)} without one change that is rescaled by it")
    longest = max(values.shape, default=0)
    if longest == 0 or values.numel() != longest:
        raise ChangeError(f"{names[0]} {tuple(values.shape)!s:.60}: expected one row of numbers")
    rows = names[0] == "magnitude" or values.ndim == 1 or values.shape[0] == change.shape[0]
    return Magnitude(values, rows)


# ---- words and numbers -------------------------------------------------------------------------------------


def is_finite(tensor: Tensor) -> bool:
    """Whether every value is. In one pass; torch.isfinite takes tens of times as long. A NaN is both the
    least and the greatest.
    """
    values = tensor if tensor.element_size() > 1 else tensor.float()  # float8 knows no order
    return tensor.numel() == 0 or all(bound.isfinite() for bound in values.aminmax())


def _span(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _of(some: int, total: int) -> str:
    return f"{some} of {total} modules"
