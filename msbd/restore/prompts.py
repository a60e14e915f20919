"""The two prompts of a restoration, from what the user wrote and what the high-level nets said of the
picture.

Paper    Yang et al. 2023 (PASD), arXiv:2308.14469, section 3.4: high-level information reaches the U-Net as
         text, and a negative prompt says what to lead away from. How the pieces are joined is not in the
         paper; the words are the official code's, but not its glue, which runs them together ("a dog on a
         benchclean, high-resolution, 8k")
Copying  this file stands alone, standard library only
"""

import re
from collections.abc import Iterable, Sequence

QUALITY_PROMPT = "clean, high-resolution, 8k"  # ends every prompt, but for grey pictures
NEGATIVE = "blurry, dotted, noise, raster lines, unclear, lowres, over-smoothed"
GRAY_NEGATIVE = "b&w, color bleeding"  # when a grey picture is given colours

# A caption tells what is wrong with the picture; the prompt is to say how it should be.
RESTORED = {"blurry": "clear", "noisy": "clean"}
COLOURED = {"black and white": "color"}


def build_prompt(prompt: str, *, added: str, information: Sequence[str] = (), grayscale: bool = False) -> str:
    """The positive prompt: the user's words, each piece of `information`, and `added`, joined by ", ".

    `information` is what `captions.describe` gives, in its order; words in it that name a defect are turned
    into their opposites, and for `grayscale` (a grey picture that is to get colours) "black and white" into
    "color". The user's words come first, because CLIP reads only 77 tokens, and are kept as they are. Empty
    pieces leave no trace.
    """
    return join_pieces([prompt, *(as_restored(piece, grayscale=grayscale) for piece in information), added])


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
