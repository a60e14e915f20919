"""Textual inversions taught to a model: their words to its tokenizer, their vectors to its text encoders."""

from collections.abc import Callable, Sequence
from pathlib import Path

from nets.clip import CLIPModel, CLIPTextModel, add_vectors
from weights.embeddings import Embedding, read_embedding
from weights.files import WeightsError
from weights.tokenizer import PromptTokenizer

Embeddings = Sequence[str | Path | Embedding]


def teach_words(
    embeddings: Embeddings,
    tokenizer: PromptTokenizer,
    text_encoder: CLIPTextModel,
    clip: CLIPModel | None,
    fresh_tokenizer: Callable[[], PromptTokenizer],
) -> PromptTokenizer:
    """Add each of `embeddings` to `tokenizer` and `text_encoder`; the tokenizer for `clip`, which ranks.

    CLIP learns the words too where its text half is like the text encoder, as that of Stable Diffusion 1.x
    is; else it gets a tokenizer that takes them for ordinary words. WeightsError where a file is no textual
    inversion, has another width, or has the word of another one.
    """
    text = text_encoder.text_model
    alike = clip is not None and clip.config.text == text_encoder.config
    taught: dict[str, str] = {}
    for given in embeddings:
        embedding = given if isinstance(given, Embedding) else read_embedding(given)
        embedding.check_width(text_encoder.config.hidden_size)
        first = add_vectors(text, embedding.vectors)
        if clip is not None and alike and clip.text_model is not text:
            add_vectors(clip.text_model, embedding.vectors)
        for word in embedding.words:
            if other := taught.get(word.lower()):
                raise WeightsError(
                    f"{embedding.source}: the word {word!r} is that of {other} too; rename one file"
                )
            taught[word.lower()] = embedding.source
            tokenizer.add_word(word, range(first, first + len(embedding.vectors)))
    return tokenizer if alike or not embeddings else fresh_tokenizer()
