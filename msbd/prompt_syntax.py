"""The prompt syntax of AUTOMATIC1111's web interface: weights in brackets, and BREAK.

As its wiki's page "Features" and the options' descriptions have it, sections "Attention/emphasis", "BREAK
keyword" and "Prompt word wrap length limit".

Tensors  states (k, 77, D) of a prompt's k pieces, multipliers (k, 77)
Copying  this file stands alone: torch only
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

ROUND, SQUARE = 1.1, 1 / 1.1  # (word) and [word]
ROOM = 75  # tokens of a piece, without start and end
WRAP = 20  # tokens: so much of a sentence goes into the next piece in one
MAX_WEIGHT = 10_000
BREAK = None  # in the place of a span
_NO_MEAN = 1e-4  # of the root mean square: less is rounding

_NETWORK = re.compile(r"<[a-z]+:[^>]*>")
_TOKEN = re.compile(r"\\[\\()\[\]]|\\|[()\[\]]|:\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*\)|[^\\()\[\]:]+|:")


@dataclass(frozen=True)
class Span:
    """Words that share one weight."""

    text: str
    weight: float


def parse_prompt(prompt: str) -> list[Span | None]:
    """The spans of a prompt, None for a BREAK.

    (a) is 1.1 times as strong, [a] 1 / 1.1 times, (a:1.3) 1.3 times, brackets in brackets multiply; a
    backslash takes a bracket for a letter. A bracket that is never closed reaches to the end, one that was
    never opened is a letter. Networks, <lora:name:1>, are left out. ValueError for a weight beyond 10,000.
    """
    words: list[str] = []
    round_ones: list[int] = []  # where brackets that are still open begin, in words
    square_ones: list[int] = []
    stronger: list[tuple[int, int, float]] = []  # from which word to which, and how much

    def close(starts: list[int], factor: float) -> None:
        stronger.append((starts.pop(), len(words), factor))

    for found in _TOKEN.finditer(_NETWORK.sub("", prompt)):
        piece, weight = found[0], found[1]
        if piece == "(":
            round_ones.append(len(words))
        elif piece == "[":
            square_ones.append(len(words))
        elif weight is not None and round_ones:
            close(round_ones, float(weight))
        elif piece == ")" and round_ones:
            close(round_ones, ROUND)
        elif piece == "]" and square_ones:
            close(square_ones, SQUARE)
        else:
            words.append(piece[1] if len(piece) == 2 and piece[0] == "\\" else piece)
    while round_ones:
        close(round_ones, ROUND)
    while square_ones:
        close(square_ones, SQUARE)
    weights = torch.ones(len(words), dtype=torch.float64)
    for start, end, factor in stronger:
        weights[start:end] *= factor
    if len(words) and not float(weights.abs().max()) <= MAX_WEIGHT:
        raise ValueError(
            f"a word of the prompt has a weight beyond {MAX_WEIGHT:,}; take fewer brackets, or smaller numbers"
        )
    return _joined(words, weights.tolist())


def _joined(words: Sequence[str], weights: Sequence[float]) -> list[Span | None]:
    """Neighbours of one weight as one span, cut at each BREAK."""
    joined: list[Span | None] = []
    for weight, alike in groupby(zip(words, weights, strict=True), key=lambda pair: pair[1]):
        parts = re.split(r"\bBREAK\b", "".join(word for word, _ in alike))
        for number, part in enumerate(parts):
            part = part.lstrip() if number else part
            part = part.rstrip() if number < len(parts) - 1 else part
            joined += ([BREAK] if number else []) + ([Span(part, weight)] if part else [])
    return joined


def plain_words(prompt: str) -> str:
    """The prompt without its syntax, for a reader that knows none."""
    return " ".join("".join(" " if span is None else span.text for span in parse_prompt(prompt)).split())


@dataclass(frozen=True)
class Piece:
    """Up to 75 tokens of a prompt, each with its weight."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]


def split_prompt(
    prompt: str, units: Callable[[str], Sequence[Sequence[int]]], comma: int | None
) -> list[Piece]:
    """The prompt's pieces of 75 tokens, at least one.

    `units(text)` gives the ids of a text, those that belong together (a textual inversion's) in one list. A
    BREAK ends a piece. Where a piece is full, what follows its last `comma` goes into the next one, if that
    is at most 20 tokens.
    """
    pieces: list[Piece] = []
    now: list[tuple[int, float]] = []
    last_comma = -1  # tokens up to and with the last comma

    def close(upto: int) -> None:
        nonlocal now, last_comma
        pieces.append(Piece(tuple(i for i, _ in now[:upto]), tuple(w for _, w in now[:upto])))
        now, last_comma = now[upto:], -1

    for span in parse_prompt(prompt):
        if span is None:
            close(len(now))
            continue
        for unit in units(span.text):
            if len(now) + len(unit) > ROOM:
                wraps = last_comma != -1 and list(unit) != [comma] and len(now) - last_comma <= WRAP
                close(last_comma if wraps else len(now))
            now += [(token, span.weight) for token in unit]
            if list(unit) == [comma]:
                last_comma = len(now)
    if now or not pieces:
        close(len(now))
    return pieces


def weighted(states: Tensor, pieces: Sequence[Piece]) -> Tensor:
    """`states` (k, 77, D) of `pieces` with each token's times its weight, brought back to their mean.

    The mean is each piece's, over its tokens and channels, start and end included; where it is nearly 0, as
    of an untrained net, there is nothing to bring back. Pieces without weights come back as they are.
    """
    done = []
    for state, piece in zip(states, pieces, strict=True):
        if all(weight == 1 for weight in piece.weights):
            done.append(state)
            continue
        factors = torch.ones(len(state), dtype=torch.float32)
        factors[1 : 1 + len(piece.weights)] = torch.tensor(piece.weights)
        stronger = state.float() * factors.to(state.device)[:, None]
        means = state.float().mean(), stronger.mean()
        if min(abs(float(mean)) for mean in means) > _NO_MEAN * float(stronger.square().mean().sqrt()):
            stronger = stronger * (means[0] / means[1])
        done.append(stronger.to(state))
    return torch.stack(done)
