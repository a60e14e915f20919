"""The names that a LoRA file gives its tensors, and PEFT's settings beside them: which module of which net
each one is for, and what of the change it is.

Weights  names of kohya and LyCORIS (lora_unet_..., lora_te_...), of diffusers and PEFT, old and new, and of
         ComfyUI (diffusion_model. ...); modules may be canonical or the original code's
Copying  this file, files.py (for WeightsError) and pickles.py; torch, safetensors through them
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .files import WeightsError

PARTS = {"unet": "U-Net", "text_encoder": "text encoder"}  # what a LoRA changes, and how to call it
MAX_NUMBER = 1e6  # of an alpha
METADATA_KEY = "lora_adapter_metadata"  # where diffusers writes PEFT's settings, JSON, since 2025
BUNDLED = "bundle_emb."  # embeddings that OneTrainer saves along

# The last part of a name: kohya; diffusers, old and older; PEFT with or without an adapter's name; LyCORIS.
_ROLE = re.compile(
    r"(?P<path>.+?)(?:"
    r"\.lora_(down|up|mid)\.weight"
    r"|(?:\.lora|_lora|\.lora_linear_layer)\.(down|up)\.weight"
    r"|\.lora_([AB])(?:\.[^.]+)?\.weight"
    r"|\.(lora_B)(?:\.[^.]+)?\.bias"
    r"|\.(lora_magnitude_vector)(?:\.[^.]+){0,2}"
    r"|\.(hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|lokr_t2|dora_scale|scalar|diff|diff_b|w_norm|b_norm)"
    r")",
    re.DOTALL,
)
_ALPHA = re.compile(r"(?P<path>.+?)(?:\.lora|_lora|\.lora_linear_layer)?\.alpha", re.DOTALL)
_SHORT = {"A": "down", "B": "up", "lora_B": "bias", "lora_magnitude_vector": "magnitude"}
_PREFIXES = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "unet.": "unet",
    "text_encoder.": "text_encoder",
    "model.diffusion_model.": "unet",
    "diffusion_model.": "unet",
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
_INSTEAD = "use one of Stable Diffusion 1.x"
_SDXL = f"a LoRA of SDXL; {_INSTEAD}"
_LATER = f"a LoRA of FLUX or Stable Diffusion 3; {_INSTEAD}"
_KIND = "which is not read; use a LoRA, LoCon, LoHa, LoKr or DoRA"
# Part of a key ("\n" is either of its ends) -> what it gives away, and the way out. The first that is found
# counts.
_FOREIGN = (
    ("\nlora_te2_", _SDXL),
    ("text_encoder_2.", _SDXL),
    ("add_embedding", _SDXL),
    ("label_emb", _SDXL),
    ("double_blocks", _LATER),
    ("single_blocks", _LATER),
    ("single_transformer_blocks", _LATER),
    ("joint_blocks", _LATER),
    ("\ntransformer.", _LATER),
    (".oft_", f"an OFT, {_KIND}"),
    (".boft_", f"a BOFT, {_KIND}"),
    (".ia3_", f"an (IA)^3, {_KIND}"),
    (".on_input\n", f"an (IA)^3, {_KIND}"),
    (".a1.weight\n", f"a GLoRA, {_KIND}"),
    (".set_weight\n", f"a file of whole weights, {_KIND}"),
    (".lora_embedding_", f"a LoRA with changed embeddings, {_KIND}"),
)
# The width of the text states that attention reads -> whose it is. Block names alone do not tell: SD 1.x has
# those of SDXL in the original code.
_CONTEXT = re.compile(
    r".*attn2[._](processor\.)?to_[kv](_lora)?(\.lora_down|\.lora_A(\.[^.]+)?|\.down|\.lora\.down)\.weight"
)
_WIDTHS = {1024: f"a LoRA of Stable Diffusion 2.x; {_INSTEAD}", 2048: _SDXL}
_DEEP = re.compile(r"transformer_blocks[._]([1-9])")  # SD 1.x has one block in each transformer


def is_lora(keys: Iterable[str]) -> bool:
    """Whether these are a LoRA's keys, of a kind that `read_lora` reads or of one that it knows to refuse."""
    text = "\n" + "\n".join(keys)
    return any(mark in text for mark in _MARKS)


def refuse_foreign(state: Mapping[str, Tensor]) -> None:
    text = "\n".join(("", *state, ""))
    for mark, what in _FOREIGN:
        if mark in text:
            key = next(key for key in state if mark in f"\n{key}\n")
            raise WeightsError(f"{what}; it has {short(key)}")
    for key, tensor in state.items():
        what = _WIDTHS.get(tensor.shape[1]) if tensor.ndim > 1 and _CONTEXT.fullmatch(key) else None
        if what is None and _DEEP.search(key):
            what = _SDXL
        if what is not None:
            raise WeightsError(f"{what}; it has {short(key)} of {tuple(tensor.shape)}")


UNKNOWN = "no LoRA key of a U-Net or a text encoder that is known here"


def parse_key(key: str) -> tuple[str | None, str, str]:
    """Part, dotted or flattened module path and role of a key; the part is None for another net's.

    WeightsError for a key of our nets whose role is not known: its change would be half of one.
    """
    found = _ROLE.fullmatch(key) or _ALPHA.fullmatch(key)
    path = (found["path"] if found else key).replace("base_model.model.", "")  # PEFT's wrapper
    prefix = next((prefix for prefix in _PREFIXES if path.startswith(prefix)), "")
    part = _PREFIXES[prefix] if prefix else _ROOTS.get(path.split(".")[0])
    if found is None and part is not None:
        raise WeightsError(f"{short(key)} is {UNKNOWN}")
    role = next(filter(None, found.groups()[1:]), "alpha") if found else ""
    return part, path.removeprefix(prefix).replace(".processor.", "."), _SHORT.get(role, role)


def flatten_path(path: str) -> str:
    """The path as kohya's names have it. transformers 5 drops `text_model.`, so that it is left out
    everywhere.
    """
    return path.replace(".", "_").removeprefix("text_model_")


def module_name(path: str) -> str:
    """`flatten_path` of a path as a file spells it, by the names of today."""
    name = flatten_path(path)
    for end, now in _OLD_ENDS:
        name = end.sub(now, name)
    return name


# ---- PEFT's settings ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PeftSettings:
    """What PEFT's settings say of the scale of one part's layers."""

    alpha: float | None = None
    rank: int | None = None
    root: bool = False
    patterns: tuple[tuple[re.Pattern[str], float], ...] = ()

    def alpha_of(self, path: str) -> float | None:
        """The alpha of the module of that path: the first pattern's that its end matches, else the one of
        all.
        """
        return next((alpha for pattern, alpha in self.patterns if pattern.match(path)), self.alpha)


# A pattern may be a path, or an expression of these pieces; others could take for ever to match.
_PATTERN = re.compile(r"(?:[\w.^$|()-]|\\[.d]\+?)+")


def read_settings(metadata: Mapping[str, str], part: str) -> PeftSettings:
    """The settings of `part` in the metadata: prefixed by the part, or bare in a file of one net."""
    try:
        table = json.loads(metadata.get(METADATA_KEY, "{}"))
    except (ValueError, RecursionError):
        table = None
    if not isinstance(table, dict):
        raise WeightsError(f"the metadata's {METADATA_KEY} is not a JSON table")

    def said(name: str) -> Any:
        return table.get(f"{part}.{name}", table.get(name))

    alpha, rank, root, patterns = (said(name) for name in ("lora_alpha", "r", "use_rslora", "alpha_pattern"))
    alpha = said("alpha") if alpha is None else alpha  # of LoHa and LoKr
    if root not in (None, True, False):
        raise WeightsError(f"its metadata says use_rslora {short(root)}, expected true or false")
    if not isinstance(patterns or {}, dict):
        raise WeightsError(f"its metadata says alpha_pattern {short(patterns)}, expected a table")
    return PeftSettings(
        alpha=None if alpha is None else _setting("lora_alpha", alpha),
        rank=rank if type(rank) is int and rank > 0 else None,
        root=bool(root),
        patterns=tuple(_read_patterns(patterns or {})),
    )


def _read_patterns(patterns: Mapping[str, Any]) -> Iterator[tuple[re.Pattern[str], float]]:
    for pattern, alpha in patterns.items():
        try:
            if not _PATTERN.fullmatch(pattern):
                raise re.error("")
            # As PEFT reads it: the whole path, or its end behind a dot.
            compiled = re.compile(rf"(.*\.)?({pattern})$")
        except (re.error, RecursionError, OverflowError):
            raise WeightsError(
                f"its metadata's alpha_pattern has {short(pattern)}, expected a module's path"
            ) from None
        yield compiled, _setting("alpha_pattern", alpha)


def _setting(name: str, value: Any) -> float:
    if type(value) not in (int, float) or not abs(value) <= MAX_NUMBER:
        raise WeightsError(f"its metadata says {name} {short(value)}, expected a number up to {MAX_NUMBER:g}")
    return float(value)


def short(value: object) -> str:
    """What stands in a message for a value from the file: one line, at most 100 characters."""
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."
