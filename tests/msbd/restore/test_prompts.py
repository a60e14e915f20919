"""Tidy prompts from any pieces; and the official code's, letter for letter, which have the same pieces."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msbd.restore.config import ModelSpec, RestoreConfig
from msbd.restore.prompts import (
    COLOURED,
    GRAY_NEGATIVE,
    NEGATIVE,
    QUALITY_PROMPT,
    RESTORED,
    as_restored,
    build_prompt,
    join_pieces,
)

MESSY = st.text(alphabet="ab ,\n\t", max_size=12)


def test_the_words_are_the_official_ones() -> None:
    assert QUALITY_PROMPT == "clean, high-resolution, 8k"
    assert NEGATIVE == "blurry, dotted, noise, raster lines, unclear, lowres, over-smoothed"
    assert GRAY_NEGATIVE == "b&w, color bleeding"


# ---- ours --------------------------------------------------------------------------------------------------


@given(st.lists(MESSY, max_size=5))
def test_pieces_are_joined_by_single_separators(pieces: list[str]) -> None:
    text = join_pieces(pieces)
    items = text.split(", ") if text else []
    assert all(item and item == item.strip(" ,") and "," not in item for item in items)
    assert not any(bad in text for bad in ("  ", "\n", "\t"))
    words = "".join(pieces).replace(",", "").split()
    assert "".join(text.replace(",", "").split()) == "".join(words), "nothing but separators is changed"
    assert join_pieces([text]) == text


def test_the_users_words_come_first_and_added_last() -> None:
    said = ["Pembroke", "2 dog, 1 person, ", "a blurry dog on a bench "]
    assert build_prompt("my dog ,", information=said, added=QUALITY_PROMPT) == (
        "my dog, Pembroke, 2 dog, 1 person, a clear dog on a bench, clean, high-resolution, 8k"
    )
    assert build_prompt("", information=["", " , "], added=QUALITY_PROMPT) == QUALITY_PROMPT
    assert build_prompt("", added="") == "" == build_prompt(" ", grayscale=True, added="")
    assert build_prompt("a dog", information=["1 dog"], added="sharp,") == "a dog, 1 dog, sharp"


def test_grey_pictures_get_no_added_words_unless_told() -> None:
    said = ["a black and white photo of a noisy street"]
    usual = RestoreConfig(mode="colorize").for_model(ModelSpec()).added_prompt
    assert (
        build_prompt("", information=said, grayscale=True, added=usual) == "a color photo of a clean street"
    )
    usual = RestoreConfig().for_model(ModelSpec()).added_prompt
    coloured = build_prompt("", information=said, added=usual)
    assert coloured.startswith("a black and white photo of a clean street, clean,")
    assert build_prompt("", information=said, grayscale=True, added="8k").endswith("street, 8k")


def test_only_what_the_nets_say_is_turned_round() -> None:
    assert build_prompt("a blurry poster", information=["a blurry poster"], added="") == (
        "a blurry poster, a clear poster"
    )


@pytest.mark.parametrize(
    "text, restored",
    [
        ("a blurry, noisy picture", "a clear, clean picture"),
        ("Blurry and NOISY", "clear and clean"),
        ("a blurrying of unnoisy things", "a blurrying of unnoisy things"),
        ("black and white", "black and white"),
        ("", ""),
    ],
)
def test_whole_words_are_replaced(text: str, restored: str) -> None:
    assert as_restored(text) == restored


def test_the_negative_is_the_users_or_the_usual_one() -> None:
    def negative(**options: Any) -> str:
        return RestoreConfig(**options).for_model(ModelSpec()).negative_prompt

    assert negative() == NEGATIVE and negative(mode="colorize") == GRAY_NEGATIVE
    assert negative(negative_prompt="") == "" == negative(negative_prompt="", mode="colorize")
    assert negative(negative_prompt="ugly, dull", mode="colorize") == "ugly, dull"
    assert join_pieces([" ugly ,, dull, "]) == "ugly, dull"


# ---- the official code's -----------------------------------------------------------------------------------


def official_prompt(
    prompt: str,
    text: str = "",
    *,
    kind: str | None = None,
    added: str = QUALITY_PROMPT,
    grayscale: bool = False,
) -> str:
    """The official code's positive prompt, letter for letter: what its glue makes of the same pieces.

    It knows one kind of `text` at a time: "classification" or "detection" ("" if nothing was found),
    "caption" (BLIP's), "coca" (the caption of its default net), None for no text. Nothing separates `added`
    from a user's prompt or BLIP's caption before it: "a dog on a benchclean, high-resolution, 8k".
    """
    if kind in ("caption", "coca"):
        for word, instead in (RESTORED | (COLOURED if grayscale else {})).items():
            text = text.replace(word, instead)
        blip = f"{text}, {prompt}" if prompt else text
        return (blip if kind == "caption" else f"{text} {prompt}") + added
    if kind is None or not text:
        return prompt + added
    return (f"{prompt}, {text}, " if prompt else f"{text}, ") + added


@pytest.mark.parametrize(
    "kind, prompt, text, official",
    [
        ("classification", "", "Pembroke", "Pembroke, clean, high-resolution, 8k"),
        ("classification", "a dog", "Pembroke", "a dog, Pembroke, clean, high-resolution, 8k"),
        ("classification", "a dog", "", "a dogclean, high-resolution, 8k"),
        ("detection", "", "2 dog, 1 person", "2 dog, 1 person, clean, high-resolution, 8k"),
        ("detection", "a dog", "2 dog", "a dog, 2 dog, clean, high-resolution, 8k"),
        ("caption", "", "a dog on a bench", "a dog on a benchclean, high-resolution, 8k"),
        ("caption", "old", "a dog on a bench", "a dog on a bench, oldclean, high-resolution, 8k"),
        ("coca", "", "a hand on her chest .", "a hand on her chest . clean, high-resolution, 8k"),
        ("coca", "old", "a noisy photo .", "a clean photo . oldclean, high-resolution, 8k"),
        (None, "a dog", "", "a dogclean, high-resolution, 8k"),
        (None, "", "", "clean, high-resolution, 8k"),
    ],
)
def test_the_official_glue(kind: str | None, prompt: str, text: str, official: str) -> None:
    assert official_prompt(prompt, text, kind=kind) == official


def test_the_official_replacements_reach_into_words_and_only_captions() -> None:
    assert official_prompt("", "unblurry", kind="caption", added="") == "unclear"
    assert official_prompt("", "blurry", kind="classification", added="") == "blurry, "
    assert (
        official_prompt("", "black and white, noisy", kind="caption")
        == f"black and white, clean{QUALITY_PROMPT}"
    )
    assert (
        official_prompt("", "a black and white dog", kind="caption", added="", grayscale=True)
        == "a color dog"
    )
    assert official_prompt("noisy", "x", kind="caption", added="") == "x, noisy"


@pytest.mark.parametrize("kind", ["classification", "detection", "caption", None])
@pytest.mark.parametrize("prompt", ["", "my dog"])
@pytest.mark.parametrize("text", ["", "a blurry dog"])
def test_ours_has_the_official_pieces(kind: str | None, prompt: str, text: str) -> None:
    official = official_prompt(prompt, text, kind=kind, added="@")
    ours = build_prompt(prompt, information=[text] if kind else [], added="@")
    assert set(ours.split(", ")) <= {"my dog", "a clear dog", "@"}
    for piece in ("my dog", "@"):
        assert (piece in ours) == (piece in official)
    assert ("dog" in ours.replace("my dog", "")) == ("dog" in official.replace("my dog", ""))
