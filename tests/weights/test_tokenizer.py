"""weights/tokenizer.py: the pipeline on a small vocabulary always, on CLIP's own where it is at hand."""

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.goldens import read_json
from weights.files import WeightsError
from weights.tokenizer import CONTEXT, END, START, PromptTokenizer, load_tokenizer, train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
CAPTIONS = ["a red house on snow at night", "a blue car on grass at noon, blurry", "a red car on snow"] * 3
SMALL = PromptTokenizer(train_tokenizer(CAPTIONS, 600))


def clip_vocabulary() -> Path:
    """CLIP's files: not ours to commit, so from $MSBD_CLIP_TOKENIZER or ../shared/clip_tokenizer,
    else the test is skipped.
    """
    folder = Path(os.environ.get("MSBD_CLIP_TOKENIZER", ROOT.parent / "shared" / "clip_tokenizer"))
    if not (folder / "merges.txt").is_file():
        pytest.skip(f"no CLIP vocabulary in {folder}; set MSBD_CLIP_TOKENIZER")
    return folder


def save_as_vocab(folder: Path, captions: list[str] = CAPTIONS) -> None:
    """A trained tokenizer as the pair vocab.json + merges.txt."""
    model = json.loads(train_tokenizer(captions, 600).to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]) + "\n"
    )


def test_clip_ids_match_hf_fast() -> None:
    tokenizer = load_tokenizer(clip_vocabulary())
    cases = read_json("clip_tokenizer/ids.json")["cases"]
    ids = tokenizer([case["text"] for case in cases])
    for row, case in zip(ids.tolist(), cases, strict=True):
        assert row == case["padded77_hf_fast"], case["text"]
        assert tokenizer.length(case["text"]) == len(case["ids_hf_fast"]), case["text"]
    assert tokenizer.vocab_size == 49408


def test_ids_are_start_pieces_end_padding() -> None:
    ids = SMALL(["a red house", ""])
    assert ids.shape == (2, CONTEXT) and ids.dtype == torch.int64
    assert ids[0, 0] == SMALL.start_id and ids[0, 4] == SMALL.end_id  # each word was learned as one piece
    assert SMALL.length("a red house") == 5
    assert ids[1].tolist() == [SMALL.start_id] + [SMALL.end_id] * (CONTEXT - 1)


def test_long_prompt_is_cut_with_the_end_token_last() -> None:
    ids = SMALL(["house " * 100])[0].tolist()
    assert ids[-1] == SMALL.end_id and ids.count(SMALL.end_id) == 1
    assert SMALL.length("house " * 100) == 102


@pytest.mark.parametrize(
    "same",
    [
        ("A Red HOUSE", "a red house"),
        ("a  red\t\n house ", "a red house"),
        ("cafe\u0301", "caf\u00e9"),
        ("car,car", "car , car"),
    ],
    ids=["case", "spaces", "composed", "punctuation"],
)
def test_normalisation(same: tuple[str, str]) -> None:
    first, second = SMALL(list(same))
    assert torch.equal(first, second)


def test_words_do_not_merge_across_spaces() -> None:
    assert not torch.equal(*SMALL(["redcar", "red car"]))
    assert not torch.equal(*SMALL(["snow12", "snow 21"]))


@given(st.text(max_size=40))
def test_any_text_has_ids_below_the_end_token(text: str) -> None:
    pieces = SMALL([text.replace(START, "").replace(END, "")])[0]
    body = pieces[1 : (pieces == SMALL.end_id).nonzero()[0, 0]]
    assert (
        body < SMALL.start_id
    ).all()  # in particular no unknown token: the 512 byte pieces spell everything
    assert SMALL.end_id == SMALL.vocab_size - 1 == pieces.max()


@given(st.text(alphabet="abcré日 ", max_size=30))
def test_trained_ids_decode_to_the_words(text: str) -> None:
    tokenizer = train_tokenizer(CAPTIONS, 600)
    words = "".join(token.replace("</w>", " ") for token in [tokenizer.decode(tokenizer.encode(text).ids)])
    assert words.split() == text.split()


def test_training_is_reproducible_and_bounded() -> None:
    first, second = (train_tokenizer(CAPTIONS, 540) for _ in range(2))
    assert first.to_str() == second.to_str()
    assert first.get_vocab_size() == 540
    with pytest.raises(ValueError, match="at least 514"):
        train_tokenizer(CAPTIONS, 513)


def test_both_file_forms_give_the_same_ids(tmp_path: Path) -> None:
    save_as_vocab(tmp_path)
    pair = load_tokenizer(tmp_path)
    train_tokenizer(CAPTIONS, 600).save(str(tmp_path / "tokenizer.json"))
    single, folder = load_tokenizer(tmp_path / "tokenizer.json"), load_tokenizer(tmp_path)
    prompts = ["A red house, at noon!", "", "zebra \U0001f600", "snow " * 90, f"a {START} b"]
    for other in (single, folder, load_tokenizer(tmp_path / "vocab.json"), SMALL):
        assert torch.equal(pair(prompts), other(prompts))


def test_stored_padding_and_truncation_are_ignored(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(CAPTIONS, 600)
    tokenizer.enable_padding(length=9)
    tokenizer.enable_truncation(5)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert torch.equal(load_tokenizer(tmp_path)(["house " * 20]), SMALL(["house " * 20]))


def test_a_bare_string_is_refused() -> None:
    with pytest.raises(TypeError, match="list of strings"):
        SMALL("a red house")


HOSTILE = {
    "not JSON": ("vocab.json", "<html>"),
    "not UTF-8": ("vocab.json", "\udcff"),
    "deep": ("tokenizer.json", "[" * 200_000),
    "a list": ("vocab.json", "[1, 2]"),
    "ids are words": ("vocab.json", '{"a": "b"}'),
    "no end token": ("vocab.json", json.dumps({START: 0, "a": 1})),
    "unreadable pipeline": ("tokenizer.json", '{"model": {"type": "Evil"}, "normalizer": null}'),
    "no unknown piece": (
        "tokenizer.json",
        '{"version": "1.0", "added_tokens": [], "normalizer": null, "model": {"type": "BPE", "unk_token": "x", "vocab": {}, "merges": []}}',
    ),
    "other family": (
        "tokenizer.json",
        '{"version": "1.0", "added_tokens": [], "normalizer": null, "model": {"type": "BPE", "vocab": {}, "merges": []}}',
    ),
}


@pytest.mark.parametrize("step", [[""], {"type": "Prepend", "prepend": ""}])
def test_steps_that_would_end_the_process_are_refused(tmp_path: Path, step: object) -> None:
    """The tokenizers library panics at them."""
    save(tmp_path / "tokenizer.json", {"type": "Sequence", "normalizers": [step, {"type": "Lowercase"}]})
    with pytest.raises(WeightsError, match="tokenizer.json: its normalizer has a step"):
        load_tokenizer(tmp_path)
    save(tmp_path / "tokenizer.json", {"type": "Prepend", "prepend": "a"})
    load_tokenizer(tmp_path)(["house"])


def save(path: Path, normalizer: object) -> None:
    """A trained tokenizer with another normalizer."""
    content = json.loads(train_tokenizer(CAPTIONS, 600).to_str())
    path.write_text(json.dumps(content | {"normalizer": normalizer}))


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_give_one_line(tmp_path: Path, case: str) -> None:
    name, text = HOSTILE[case]
    (tmp_path / name).write_bytes(text.encode(errors="surrogateescape"))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(WeightsError) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no tokenizer.json here"):
        load_tokenizer(tmp_path)
    save_as_vocab(tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\nxq zq\n")
    with pytest.raises(WeightsError, match="do not fit together"):
        load_tokenizer(tmp_path)
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(WeightsError, match="merges.txt: no such file"):
        load_tokenizer(tmp_path)
