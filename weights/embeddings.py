"""Textual inversion: files that teach the text encoder a word, as one or more vectors in place of tokens.

Paper    Gal et al. 2022, arXiv:2208.01618, section 3
Tensors  vectors (n, D) of the text encoder's token embedding, one for each position the word takes
Weights  AUTOMATIC1111's pickles and those of the paper's code (string_to_param), safetensors with emb_params,
         diffusers' learned_embeds ({"<word>": vector}), and any file of one such tensor
Copying  this file, files.py and pickles.py; torch, safetensors through them
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .files import WeightsError, read_state_dict

MAX_VECTORS = 75  # what a prompt has room for
PARAM = "string_to_param."  # begins the key under which pickles.py hands on what lies in a table of that name
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_OTHERS = {1024: "Stable Diffusion 2.x", 1280: "SDXL"}  # widths of other text encoders
_SDXL = ("clip_g", "text_encoders_g")


@dataclass(frozen=True, eq=False)
class Embedding:
    """A word and its vectors."""

    source: str  # the file, for messages
    words: tuple[str, ...]  # what stands for it in a prompt, the first one usually
    vectors: Tensor  # (n, D) float32

    def describe(self) -> str:
        """Such as "a textual inversion of 4 vectors of width 768, word 'cat-toy'"."""
        count, width = self.vectors.shape
        words = " or ".join(map(repr, self.words))
        return f"a textual inversion of {count} {'vector' if count == 1 else 'vectors'} of width {width}, word {words}"

    def check_width(self, width: int) -> None:
        """WeightsError unless the vectors fit a text encoder of that width."""
        found = self.vectors.shape[1]
        if found != width:
            whose = f", as {_OTHERS[found]} has" if found in _OTHERS else ""
            raise WeightsError(
                f"{self.source}: vectors of width {found}{whose}; this model's text encoder has {width}"
            )


def is_embedding(state: Mapping[str, Tensor]) -> bool:
    """Whether these tensors are certainly a textual inversion's: by their names, or one alone of a text
    encoder's width.
    """
    if any(key.startswith((PARAM, "<")) or key in ("emb_params", *_SDXL) for key in state):
        return True
    return len(state) == 1 and all(
        t.ndim in (1, 2) and t.shape[-1] in (768, *_OTHERS) for t in state.values()
    )


def read_embedding(path: str | Path) -> Embedding:
    """The word and vectors of a file. The word is the file's name without its ending, and the `<word>` that
    diffusers wrote, where there is one.

    Raises WeightsError for what is no textual inversion, one of SDXL, more vectors than a prompt has room
    for, and numbers that are not finite.
    """
    path = Path(path)
    return embedding_of(read_state_dict(path), path)


def embedding_of(state: Mapping[str, Tensor], path: Path) -> Embedding:
    """`read_embedding` of tensors that were read from `path`."""
    if any(key in state for key in _SDXL):
        raise WeightsError(f"{path}: a textual inversion of SDXL; take one of Stable Diffusion 1.x")
    named = {key: t for key, t in state.items() if key.startswith((PARAM, "<")) or key == "emb_params"}
    found = named or state
    if len(found) != 1:
        what = "words" if named else "tensors"
        raise WeightsError(
            f"{path}: {len(found):,} {what} in one file, expected a textual inversion of one word"
        )
    ((key, tensor),) = found.items()
    vectors = tensor[None] if tensor.ndim == 1 else tensor
    if vectors.ndim != 2 or 0 in vectors.shape or len(vectors) > MAX_VECTORS:
        raise WeightsError(
            f"{path}: {key!r:.60} has shape {tuple(tensor.shape)!s:.60}; expected 1 to {MAX_VECTORS} vectors, (n, width)"
        )
    if tensor.dtype not in _DTYPES:
        raise WeightsError(f"{path}: {key!r:.60} is of {tensor.dtype}, expected floating point")
    vectors = vectors.detach().to(torch.float32, copy=True)
    if not bool(vectors.isfinite().all()):
        raise WeightsError(f"{path}: {key!r:.60} has numbers that are not finite; the file is damaged")
    own = (key,) if key.startswith("<") and key.endswith(">") and key != path.stem else ()
    return Embedding(str(path), (path.stem, *own), vectors)
