"""What a LoRA file says of one weight: a low-rank product, two of them multiplied (LoHa, LoKr), or the whole
difference; and DoRA's rescaling of the sum.

Papers   Hu et al. 2021, arXiv:2106.09685, section 4.1; Yeh et al. 2023, arXiv:2309.14859, section 3 (LoCon,
         LoHa, LoKr, the Tucker form); Liu et al. 2024, arXiv:2402.09353, eq. 5 (DoRA)
Tensors  a change to a weight W (out, in[, kh, kw]) is a matrix (out, in * kh * kw), W flattened likewise
Copying  this file stands alone: torch only
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

MAX_RANK = 4  # times the layer's larger side; at half a square layer's side it stores as much as the layer
_POINT = ((), (1, 1))  # kernels of a linear layer and of the convolution that is the same


class ChangeError(ValueError):
    """Why tensors do not make a change, as the end of a sentence that names their layer."""


class Change(Protocol):
    """A change to one weight, not yet scaled."""

    @property
    def name(self) -> str:
        """What its kind is called."""
        ...

    @property
    def rank(self) -> int | None:
        """What alpha is divided by; None where nothing is factored."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's (out, in, kh, kw); (out, in * kh * kw) where no kernel is told; (n,) of a norm."""
        ...

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The change, (out, in * kh * kw), or (n,), computed in `dtype`."""
        ...


@dataclass(frozen=True, eq=False)
class LowRank:
    """up . down; in the Tucker form with `mid` between them (LoCon). ChangeError where they do not fit."""

    up: Tensor  # (out, r) or (out, r, 1, 1)
    down: Tensor  # (r, in) or (r, in, kh, kw)
    mid: Tensor | None = None  # (r, r, kh, kw), down then being (r, in) or (r, in, 1, 1)
    name: str = "LoRA"

    def __post_init__(self) -> None:
        tensors = {"down": self.down, "mid": self.mid, "up": self.up}
        if not self._fits():
            found = ", ".join(f"{role} {tuple(t.shape)}" for role, t in tensors.items() if t is not None)
            raise ChangeError(
                f"{found[:90]}: expected (r, in[, k, k]) and (out, r[, 1, 1]), r at most {MAX_RANK} times the "
                "layer's larger side"
            )

    def _fits(self) -> bool:
        up, down, mid = self.up, self.down, self.mid
        if any(t is not None and (t.ndim not in (2, 4) or 0 in t.shape) for t in (up, down, mid)):
            return False
        rank = len(down)
        fits = up.shape[1] == rank and up.shape[2:] in _POINT
        if mid is not None:
            fits = fits and mid.ndim == 4 and mid.shape[:2] == (rank, rank) and down.shape[2:] in _POINT
        return fits and rank <= MAX_RANK * max(len(up), down[0].numel())

    @property
    def rank(self) -> int:
        """r: columns of `up`, rows of `down`."""
        return len(self.down)

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in, kh, kw); a linear layer's kernel is 1 x 1."""
        kernel = (self.down if self.mid is None else self.mid).shape[2:] or (1, 1)
        return (len(self.up), self.down.shape[1], *kernel)

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(out, r) and (r, in * kh * kw), whose product is the change."""
        down = self.down.to(dtype).flatten(1)
        if self.mid is not None:
            down = torch.einsum("abhw,bi->aihw", self.mid.to(dtype), down).flatten(1)
        return self.up.to(dtype).flatten(1), down

    def matrix(self, dtype: torch.dtype) -> Tensor:
        up, down = self.factors(dtype)
        return up @ down


@dataclass(frozen=True, eq=False)
class Whole:
    """The difference itself, of any weight or of a norm's (n,)."""

    diff: Tensor
    name: str = "whole difference"
    rank: None = None

    def __post_init__(self) -> None:
        if self.diff.ndim not in (1, 2, 4) or 0 in self.diff.shape:
            raise ChangeError(f"shape {tuple(self.diff.shape)!s:.60}, expected a weight's")

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.diff.shape) if self.diff.ndim == 1 else (*self.diff.shape, 1, 1)[:4]

    def matrix(self, dtype: torch.dtype) -> Tensor:
        return self.diff.to(dtype).flatten(1) if self.diff.ndim > 1 else self.diff.to(dtype)


@dataclass(frozen=True, eq=False)
class Hadamard:
    """LoHa: two low-rank matrices, multiplied value by value (Yeh et al., eq. 5)."""

    first: LowRank
    second: LowRank
    name: str = "LoHa"

    def __post_init__(self) -> None:
        first, second = self.first, self.second
        if first.shape != second.shape or first.rank != second.rank:
            raise ChangeError(
                f"factors of shapes {first.shape} and {second.shape}, ranks {first.rank} and {second.rank}; "
                "both halves of a LoHa are alike"
            )

    @property
    def rank(self) -> int:
        return self.first.rank

    @property
    def shape(self) -> tuple[int, ...]:
        out, inner, *_ = self.first.shape
        return (out, inner) if self.first.mid is None else self.first.shape

    def matrix(self, dtype: torch.dtype) -> Tensor:
        return self.first.matrix(dtype).mul_(self.second.matrix(dtype))


@dataclass(frozen=True, eq=False)
class Kronecker:
    """LoKr: the Kronecker product of a small matrix and a larger one, each whole or of low rank (Yeh et al.,
    eq. 6). The kernel, where there is one, is the larger one's.
    """

    first: LowRank | Whole
    second: LowRank | Whole
    name: str = "LoKr"

    def __post_init__(self) -> None:
        ranks = [part.rank for part in (self.first, self.second) if part.rank is not None]
        if len(set(ranks)) > 1:
            raise ChangeError(f"factors of ranks {min(ranks)} and {max(ranks)}; a LoKr has one rank")
        if len(self.first.shape) != 4 or self.first.shape[2:] != (1, 1) or len(self.second.shape) != 4:
            raise ChangeError(
                f"factors of shapes {self.first.shape} and {self.second.shape}, expected matrices"
            )

    @property
    def rank(self) -> int | None:
        return self.first.rank or self.second.rank

    @property
    def shape(self) -> tuple[int, ...]:
        (a, b, *_), (c, d, *kernel) = self.first.shape, self.second.shape
        told = isinstance(self.second, Whole) or self.second.mid is not None
        return (a * c, b * d, *kernel) if told else (a * c, b * d)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        return torch.kron(self.first.matrix(dtype), self.second.matrix(dtype))


def fits(change: Change, weight: Tensor) -> bool:
    """Whether `change` is one to a weight of this shape; a 1 x 1 convolution and a linear layer are alike."""
    shape, found = change.shape, tuple(weight.shape)
    if len(shape) == 1 or len(found) not in (2, 4):
        return shape == found
    if len(shape) == 4:
        return (*found, 1, 1)[:4] == shape
    return (found[0], math.prod(found[1:])) == shape


@dataclass(frozen=True, eq=False)
class Magnitude:
    """DoRA's m: the length that each row of the changed weight gets (eq. 5), or each input's column, as
    LyCORIS has it by default.
    """

    values: Tensor
    rows: bool  # of the outputs; False: of the inputs

    def fits(self, weight: Tensor) -> bool:
        """Whether there is one length for each row, or for each input."""
        return weight.ndim > 1 and self.values.numel() == weight.shape[0 if self.rows else 1]

    def rescaled(self, weight: Tensor) -> Tensor:
        """`weight` (out, in[, kh, kw]) with its rows, or inputs, brought to these lengths."""
        axis = 0 if self.rows else 1
        others = [i for i in range(weight.ndim) if i != axis]
        norm = torch.linalg.vector_norm(weight, dim=others, keepdim=True)
        lengths = self.values.to(weight).reshape(norm.shape)
        return weight * (lengths / norm.clamp(min=torch.finfo(weight.dtype).tiny))


def tucker(a: Tensor, b: Tensor, middle: Tensor | None) -> LowRank:
    """A factor of a LoHa or a LoKr: a . b, a (out, r) and b (r, in * kh * kw); with `middle` (r, r, kh, kw)
    a is stored the other way round, (r, out). ChangeError where they do not fit.
    """
    if middle is not None and a.ndim == 2:
        a = a.T
    return LowRank(a, b, middle)
