"""CLIP's tokenizer: prompts to token ids, and the same pipeline trained on other captions.

Paper    Radford et al. 2021, arXiv:2103.00020, section 2.4: lower-cased byte-pair encoding between a start
         and an end token
Tensors  list of B prompts -> (B, 77) int64
Weights  Hugging Face files: tokenizer.json, or vocab.json + merges.txt. CLIP's own come with its weights, not
         with this code
Copying  this file, files.py (for WeightsError) and pickles.py; torch, safetensors, tokenizers
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor

from .files import WeightsError, first_line

START = "<|startoftext|>"
END = "<|endoftext|>"
CONTEXT = 77  # tokens a prompt is cut or padded to, start and end included
WORD_END = "</w>"  # ends the last piece of a word, so that "cat" and the "cat" of "cattle" differ

# English contractions, runs of letters, single digits, runs of anything else; spaces fall away between them.
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class PromptTokenizer:
    """Prompts -> ids, as Hugging Face's fast CLIP tokenizer gives them with padding="max_length",
    truncation=True.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        start, end = tokenizer.token_to_id(START), tokenizer.token_to_id(END)
        if start is None or end is None:
            raise WeightsError(
                f"the tokenizer has no {START} or no {END} token; expected one of the CLIP family"
            )
        self.start_id: int = start
        self.end_id: int = end
        self._tokenizer = tokenizer
        self._tokenizer.no_padding()  # a tokenizer.json may ask for either; lengths are settled in __call__
        self._tokenizer.no_truncation()
        self._words: dict[str, list[int]] = {}  # added, in lower case -> their ids
        self._added: re.Pattern[str] | None = None

    @property
    def vocab_size(self) -> int:
        """Number of tokens, start and end included: the rows of the text encoder's token embedding."""
        return self._tokenizer.get_vocab_size()

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Token ids (B, 77): start, up to 75 tokens, end, then the end token again as padding.

        What does not fit is cut off; `length` says beforehand whether it fits. Raises TypeError for a bare
        string.
        """
        if isinstance(prompts, str):
            raise TypeError("prompts is one string, expected a list of strings: write [prompt]")
        return self.rows([self.pieces(prompt)[: CONTEXT - 2] for prompt in prompts])

    def rows(self, pieces: Sequence[Sequence[int]]) -> Tensor:
        """Token ids (B, 77) of B texts, of up to 75 ids each, between a start and an end."""
        rows = torch.full((len(pieces), CONTEXT), self.end_id, dtype=torch.int64)
        for row, inner in zip(rows, pieces, strict=True):
            row[: len(inner) + 1] = torch.tensor([self.start_id, *inner])
        return rows

    def length(self, prompt: str) -> int:
        """Tokens that `prompt` needs, start and end included; above 77 its tail is cut off."""
        return len(self.pieces(prompt)) + 2

    def add_word(self, word: str, ids: Sequence[int]) -> None:
        """Read `word`, where it stands by itself and in any case, as `ids`: a textual inversion's.

        As AUTOMATIC1111's interface names embeddings by their files, and ComfyUI writes "embedding:" before
        and the ending of a file behind. ValueError for a word of nothing.
        """
        if not (word := _normal(word)):
            raise ValueError("the word to add is empty")
        self._words[word] = list(ids)
        longest_first = sorted(self._words, key=len, reverse=True)
        words = "|".join(map(_by_itself, longest_first))
        self._added = re.compile(rf"(?:\bembedding:)?({words})(?:\.(?:pt|bin|safetensors)\b)?", re.IGNORECASE)

    def has_word(self, word: str, prompt: str) -> bool:
        """Whether an added `word` stands in `prompt`."""
        wanted = _normal(word)
        return self._added is not None and any(
            _normal(found[1]) == wanted for found in self._added.finditer(prompt)
        )

    def save(self, path: str | Path) -> None:
        """Write `tokenizer.json`, which `load_tokenizer` reads."""
        self._tokenizer.save(str(path))

    def pieces(self, prompt: str) -> list[int]:
        """The ids of `prompt`, however many, without start and end."""
        return [token for unit in self.units(prompt) for token in unit]

    def units(self, prompt: str) -> list[list[int]]:
        """`pieces`, each token by itself, those of an added word together."""
        units: list[list[int]] = []
        at = 0
        for found in self._added.finditer(prompt) if self._added else ():
            units += [[token] for token in self._pieces(prompt[at : found.start()])]
            units.append(self._words[_normal(found[1])])
            at = found.end()
        return units + [[token] for token in self._pieces(prompt[at:])]

    def _pieces(self, prompt: str) -> list[int]:
        # One prompt at a time: encode_batch starts threads, which then warn whenever the process forks data
        # workers.
        return self._tokenizer.encode(prompt, add_special_tokens=False).ids


def _normal(word: str) -> str:
    return " ".join(word.lower().split())


def _by_itself(word: str) -> str:
    """An expression for `word`, not as a part of a longer one."""
    before, after = (
        r"(?<!\w)" if re.match(r"\w", word) else "",
        r"(?!\w)" if re.match(r"\w", word[-1]) else "",
    )
    return before + r"\s+".join(map(re.escape, word.split(" "))) + after


def load_tokenizer(folder_or_file: str | Path) -> PromptTokenizer:
    """A callable `(prompts) -> (B, 77) int64` from `tokenizer.json`, or from `vocab.json` + `merges.txt`.

    `folder_or_file` is the folder that holds them, or the .json file itself (merges.txt is then looked for
    beside vocab.json). A folder that has both forms is read from tokenizer.json. Raises WeightsError when
    neither is there or a file does not hold what its name says.
    """
    path = Path(folder_or_file)
    if path.is_dir():
        found = [path / name for name in ("tokenizer.json", "vocab.json") if (path / name).is_file()]
        if not found:
            raise WeightsError(f"{path}: no tokenizer.json here, and no vocab.json + merges.txt either")
        path = found[0]
    if not path.is_file():
        raise WeightsError(
            f"{path}: no such file; expected tokenizer.json, or vocab.json with merges.txt beside it"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # ValueError covers bad JSON and bad UTF-8
        raise WeightsError(
            f"{path}: not a JSON file ({error}); expected tokenizer.json or vocab.json"
        ) from None
    whole = isinstance(content, dict) and {"model", "normalizer"} <= content.keys()  # a tokenizer.json
    return PromptTokenizer(read_tokenizer(path, content) if whole else _from_vocab(path, content))


def train_tokenizer(captions: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer with CLIP's pipeline and layout whose merges are learned from `captions`.

    Ids as CLIP orders them: 256 bytes, the same 256 ending a word, one per merge, start, end. So every text
    can be encoded, and the end token has the largest id. `vocab_size` counts all of these: at least 514,
    fewer in the result when the captions hold no more pairs. The same captions give the same tokenizer. Keep
    it with `.save(path)`.
    """
    least = 2 * 256 + 2
    if vocab_size < least:
        raise ValueError(
            f"vocab_size is {vocab_size}, expected at least {least}: 2 x 256 bytes, start and end"
        )
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: i for i, piece in enumerate(letters + [letter + WORD_END for letter in letters])}
    merges: list[tuple[str, str]] = []
    words = _count_words(captions)
    while len(vocab) < vocab_size - 2 and (pair := _commonest_pair(words)):
        merges.append(pair)
        vocab.setdefault("".join(pair), len(vocab))  # two merges may spell the same piece
        words = {_merge(word, pair): count for word, count in words.items()}
    for token in (START, END):
        vocab[token] = len(vocab)
    return _clip_tokenizer(vocab, merges)


def _count_words(captions: Iterable[str]) -> dict[tuple[str, ...], int]:
    """How often each word occurs, as CLIP's pipeline splits them; a word is a tuple of letters, the last with
    WORD_END.
    """
    pipeline = _clip_pipeline(models.BPE())
    normalizer, splitter = pipeline.normalizer, pipeline.pre_tokenizer
    assert normalizer is not None and splitter is not None
    counts = Counter(
        word
        for caption in captions
        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(caption))
    )
    return {(*word[:-1], word[-1] + WORD_END): count for word, count in counts.items()}


def _commonest_pair(words: dict[tuple[str, ...], int]) -> tuple[str, str] | None:
    """The neighbours that occur most often, the alphabetically first of equals; None when every word is one
    piece.

    One step of Sennrich et al. 2016, arXiv:1508.07909, algorithm 1. The library's trainer breaks ties at
    random.
    """
    counts: Counter[tuple[str, str]] = Counter()
    for word, count in words.items():
        for pair in pairwise(word):
            counts[pair] += count
    return min(counts, key=lambda pair: (-counts[pair], pair), default=None)


def _merge(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    """`word` with every occurrence of `pair`, from the left, joined into one piece."""
    joined: list[str] = []
    for piece in word:
        if joined and (joined[-1], piece) == pair:
            joined[-1] += piece  # cannot be the first half of `pair` again: it is longer than it
        else:
            joined.append(piece)
    return tuple(joined)


def read_tokenizer(path: Path, content: Any = None) -> Tokenizer:
    """The tokenizer of a tokenizer.json, of CLIP or not; `content` is its JSON, where that is read already.
    Raises WeightsError for what is none, and for one that would fail at a text with an unknown piece.
    """
    if content is None:
        with suppress(ValueError, RecursionError, OSError):  # for the library to refuse
            content = json.loads(path.read_text(encoding="utf-8"))
    _check_steps(path, content)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for whatever it cannot read
        raise WeightsError(f"{path}: the tokenizers library cannot read it ({first_line(error)})") from None
    unknown = getattr(tokenizer.model, "unk_token", None)
    if unknown is not None and tokenizer.model.token_to_id(unknown) is None:
        raise WeightsError(f"{path}: its token for unknown pieces, {unknown!r:.80}, is not in its vocabulary")
    return tokenizer


def _check_steps(path: Path, content: Any) -> None:
    """WeightsError for a step of a tokenizer.json at which the library ends the process, where it does not
    refuse it: one without a type, which it guesses, and a prefix of no letters.
    """
    if not isinstance(content, dict):
        return  # for the library to refuse
    for name in ("normalizer", "pre_tokenizer"):
        steps = [content.get(name) or {"type": ""}]
        for step in steps:
            if not isinstance(step, dict) or not isinstance(kind := step.get("type"), str):
                raise WeightsError(f"{path}: its {name} has a step without a type, {step!r:.60}")
            if kind == "Prepend" and not step.get("prepend"):
                raise WeightsError(f"{path}: its {name} has a step Prepend that puts nothing before a text")
            for within in ("normalizers", "pretokenizers"):
                steps += step[within] if isinstance(step.get(within), list) else []


def _from_vocab(path: Path, vocab: object) -> Tokenizer:
    if not isinstance(vocab, dict) or not all(type(index) is int and index >= 0 for index in vocab.values()):
        raise WeightsError(f"{path}: neither a tokenizer.json nor a vocab.json (token -> id)")
    if missing := [token for token in (START, END) if token not in vocab]:
        raise WeightsError(
            f"{path}: no {missing[0]} among {len(vocab)} tokens; expected a vocabulary of the CLIP family"
        )
    merges = path.with_name("merges.txt")
    if not merges.is_file():
        raise WeightsError(f"{merges}: no such file; vocab.json needs it, tokenizer.json alone does not")
    try:
        return _clip_tokenizer(*models.BPE.read_file(str(path), str(merges)))
    except Exception as error:  # bare Exception here too
        raise WeightsError(
            f"{path} with {merges.name}: they do not fit together ({first_line(error)})"
        ) from None


def _clip_tokenizer(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    tokenizer = _clip_pipeline(models.BPE(vocab, merges, end_of_word_suffix=WORD_END, unk_token=END))
    tokenizer.add_special_tokens([AddedToken(token, normalized=True, special=True) for token in (START, END)])
    return tokenizer


def _clip_pipeline(model: models.BPE) -> Tokenizer:
    """Text -> composed, single-spaced, lower-case -> words -> bytes as letters -> `model`."""
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
