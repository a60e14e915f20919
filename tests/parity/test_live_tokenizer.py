"""weights/tokenizer.py beside transformers' CLIPTokenizerFast, with a vocabulary that ours has learned."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weights.tokenizer import CONTEXT, END, START, PromptTokenizer, load_tokenizer, train_tokenizer

transformers = pytest.importorskip("transformers")

CAPTIONS = ["a red house on snow at night", "a blue car on grass at noon, blurry", "it's a caf\u00e9"] * 3
TRAINED = train_tokenizer(CAPTIONS, 620)
OURS = PromptTokenizer(TRAINED)
WORDS = st.sampled_from(
    [
        "red",
        "House",
        "snow!!",
        "it's",
        "caf\u00e9",
        "cafe\u0301",
        "12",
        "\u65e5\u672c",
        "\U0001f600",
        START,
        END,
    ]
)
PROMPTS = st.one_of(
    st.text(max_size=60),
    st.lists(WORDS, max_size=100).map(" ".join),
    st.lists(WORDS, max_size=10).map("".join),
)


def from_vocabulary() -> Any:
    model = json.loads(TRAINED.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    return transformers.CLIPTokenizerFast(vocab=model["vocab"], merges=merges)


def rows(oracle: Any, prompts: list[str]) -> list[list[int]]:
    return oracle(prompts, padding="max_length", truncation=True, max_length=CONTEXT).input_ids


ORACLE = from_vocabulary()


@given(st.lists(PROMPTS, min_size=1, max_size=4))
def test_ids_equal_transformers(prompts: list[str]) -> None:
    assert OURS(prompts).tolist() == rows(ORACLE, prompts)
    assert [OURS.length(prompt) for prompt in prompts] == [len(ids) for ids in ORACLE(prompts).input_ids]


def test_each_reads_the_others_file(tmp_path: Path) -> None:
    prompts = [
        *CAPTIONS,
        "A red\n CAR, 12!",
        "",
        "snow " * 90,
        f"a {START} b {END}",
        "\u65e5\u672c \U0001f600",
    ]
    ORACLE.save_pretrained(tmp_path / "theirs")
    assert load_tokenizer(tmp_path / "theirs")(prompts).tolist() == rows(ORACLE, prompts)
    (tmp_path / "ours").mkdir()
    OURS.save(tmp_path / "ours" / "tokenizer.json")
    oracle = transformers.CLIPTokenizerFast.from_pretrained(tmp_path / "ours")
    assert rows(oracle, prompts) == OURS(prompts).tolist()
