"""The two prompts of a restoration, from what the user wrote and what the high-level nets said of the picture.

Paper    Yang et al. 2024 (PASD), arXiv:2308.14469, section 3.4: high-level information reaches the U-Net as text. How the
         pieces are joined is not in the paper; the words are the official code's, its glue only in `official_prompt`
Copying  this file stands alone, standard library only
"""

import re
from collections.abc import Iterable, Sequence

ADDED = "clean, high-resolution, 8k"  # ends every prompt, but for grey pictures
NEGATIVE = "blurry, dotted, noise, raster lines, unclear, lowres, over-smoothed"
GRAY_NEGATIVE = "b&w, color bleeding"  # when a grey picture is given colours

# A caption tells what is wrong with the picture; the prompt is to say how it should be.
RESTORED = {"blurry": "clear", "noisy": "clean"}
COLOURED = {"black and white": "color"}


def build_prompt(
    prompt: str, *, information: Sequence[str] = (), added: str | None = None, grayscale: bool = False
) -> str:
    """The positive prompt: the user's words, each piece of `information`, and `added`, joined by ", ".

    `information` is what `captions.describe` gives, in its order; words in it that name a defect are turned into their opposites.
    The user's words come first, because CLIP reads only 77 tokens, and are kept as they are. `added` None is ADDED, or nothing
    for `grayscale` (a grey picture that is to get colours). Empty pieces leave no trace.
    """
    if added is None:
        added = "" if grayscale else ADDED
    return join_pieces([prompt, *(as_restored(piece, grayscale=grayscale) for piece in information), added])


def build_negative(negative: str | None = None, *, grayscale: bool = False) -> str:
    """The negative prompt: the user's ("" for none at all), or the usual one."""
    if negative is None:
        negative = GRAY_NEGATIVE if grayscale else NEGATIVE
    return join_pieces([negative])


def as_restored(text: str, *, grayscale: bool = False) -> str:
    """`text` with the words for a defect turned into their opposites: RESTORED, and COLOURED for `grayscale`.

    Whole words in any case only, where the official code replaces letters anywhere.
    """
    words = RESTORED | (COLOURED if grayscale else {})
    for word, instead in words.items():
        text = re.sub(rf"\b{word}\b", instead, text, flags=re.IGNORECASE)
    return text


def join_pieces(pieces: Iterable[str]) -> str:
    """The pieces joined by ", ", each without spaces and commas at its ends, and with single ones inside."""
    tidy = (re.sub(r"\s*,[\s,]*", ", ", re.sub(r"\s+", " ", piece)).strip(" ,") for piece in pieces)
    return ", ".join(piece for piece in tidy if piece)


def official_prompt(
    prompt: str, text: str = "", *, kind: str | None = None, added: str | None = None, grayscale: bool = False
) -> str:
    """The official code's positive prompt, letter for letter, for measuring what its glue costs.

    It knows one kind of `text` at a time: "classification" or "detection" ("" if nothing was found), "caption" (BLIP's), "coca"
    (the caption of its default net), None for no text. Nothing separates `added` from a user's prompt or BLIP's caption before it:
    "a dog on a benchclean, high-resolution, 8k". `added` None as in `build_prompt`.
    """
    if added is None:
        added = "" if grayscale else ADDED
    if kind in ("caption", "coca"):
        for word, instead in (RESTORED | (COLOURED if grayscale else {})).items():
            text = text.replace(word, instead)
        blip = f"{text}, {prompt}" if prompt else text
        return (blip if kind == "caption" else f"{text} {prompt}") + added
    if kind is None or not text:
        return prompt + added
    return (f"{prompt}, {text}, " if prompt else f"{text}, ") + added
