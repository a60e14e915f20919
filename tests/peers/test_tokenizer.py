"""CLIP's tokenizer on the small vocabulary of transformers' own test (test_tokenization_clip.py,
test_full_tokenizer): its pieces and ids.
"""

import json
from pathlib import Path

from weights.tokenizer import END, START, load_tokenizer

VOCABULARY = [
    "l", "o", "w", "e", "r", "s", "t", "i", "d", "n", "lo", "l</w>", "w</w>", "r</w>", "t</w>", "low</w>", "er</w>",
    "lowest</w>", "newer</w>", "wider", "<unk>", START, END,
]  # fmt: skip
MERGES = ["l o", "lo w</w>", "e r</w>"]


def test_the_stored_ids(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text(
        json.dumps({token: number for number, token in enumerate(VOCABULARY)})
    )
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]))
    tokenizer = load_tokenizer(tmp_path)
    pieces = tokenizer.pieces("lower newer")
    assert pieces == [10, 2, 16, 9, 3, 2, 16]
    assert [VOCABULARY[i] for i in pieces] == ["lo", "w", "er</w>", "n", "e", "w", "er</w>"]
