"""Prompts to contexts: the web interface's syntax, pieces of 75 tokens, weights, and learned words."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from msbd.prompt_syntax import Piece, Span, parse_prompt, plain_words, split_prompt, weighted
from msbd.prompts import encode_prompts
from nets.clip import CLIPTextConfig, CLIPTextModel, add_vectors
from weights.tokenizer import CONTEXT, PromptTokenizer, train_tokenizer

CPU = torch.device("cpu")


def tokenizer() -> PromptTokenizer:
    return PromptTokenizer(train_tokenizer(["a red ball on sand", "a blue house"], 530))


def text_encoder(vocabulary: int) -> CLIPTextModel:
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    return CLIPTextModel(config).eval().requires_grad_(False)


def spans(prompt: str) -> list[tuple[str, float] | None]:
    return [span and (span.text, round(span.weight, 4)) for span in parse_prompt(prompt)]


@pytest.mark.parametrize(
    "prompt, wanted",
    [
        ("", []),
        ("a red ball", [("a red ball", 1)]),
        ("a (red) ball", [("a ", 1), ("red", 1.1), (" ball", 1)]),
        ("((red))", [("red", 1.21)]),
        ("[red]", [("red", 0.9091)]),
        ("(red:1.3)", [("red", 1.3)]),
        ("(red: .5 ) ball", [("red", 0.5), (" ball", 1)]),
        ("(red:-1)", [("red", -1)]),
        ("((red:1.3) ball)", [("red", 1.43), (" ball", 1.1)]),
        ("[(red)]", [("red", 1)]),
        (r"\(red\) \[x\] a\\b", [(r"(red) [x] a\b", 1)]),
        ("(red", [("red", 1.1)]),
        ("[red", [("red", 0.9091)]),
        ("red) ball]", [("red) ball]", 1)]),
        ("red:1.3)", [("red:1.3)", 1)]),
        ("(16:9) (a:b)", [("16", 9), (" ", 1), ("a:b", 1.1)]),
        ("at 10:30", [("at 10:30", 1)]),
        ("a BREAK b", [("a", 1), None, ("b", 1)]),
        ("(a BREAK b:1.2)BREAK", [("a", 1.2), None, ("b", 1.2), None]),
        ("BREAKFAST", [("BREAKFAST", 1)]),
        ("a <lora:style:0.8> b", [("a  b", 1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [("a ", 1), ("house", 1.573), (" ", 1.1), ("on", 1), (" a ", 1.1), ("hill", 0.55), (", sun, ", 1.1), ("sky", 1.4641), (".", 1.1)],
        ),
    ],
)  # fmt: skip
def test_the_syntax(prompt: str, wanted: list[tuple[str, float] | None]) -> None:
    assert spans(prompt) == wanted


@given(st.text(st.sampled_from("ab ,:.()[]\\<>1BREAK")))
def test_every_prompt_has_a_reading_and_no_letter_is_invented(prompt: str) -> None:
    read = [span for span in parse_prompt(prompt) if span is not None]
    assert all(isinstance(span, Span) and span.text and span.weight == span.weight for span in read)
    letters = iter(prompt)
    assert all(letter in letters for span in read for letter in span.text)  # in order


@pytest.mark.parametrize("prompt", ["(" * 200 + "a", "(a:99999)", "(a:" + "9" * 400 + ")"])
def test_a_weight_beyond_all_sense_is_refused(prompt: str) -> None:
    with pytest.raises(ValueError, match="a weight beyond 10,000"):
        parse_prompt(prompt)


@pytest.mark.parametrize(
    "prompt", ["(a[" * 50 + "b" * 50_000, " " * 50_000 + "BREAKx", "a, " * 20_000, "<" * 50_000]
)
def test_long_prompts_take_no_time_to_speak_of(prompt: str) -> None:
    """Each would take minutes if every bracket, or every blank, looked at all the rest."""
    assert parse_prompt(prompt) and split_prompt(prompt, units, comma=0)


def units(text: str) -> list[list[int]]:
    """A token for each letter; 5 for every X, which belong together; 0 for a comma."""
    return [[9] * 5 if letter == "X" else [0 if letter == "," else ord(letter)] for letter in text]


def lengths(prompt: str) -> list[int]:
    return [len(piece.ids) for piece in split_prompt(prompt, units, comma=0)]


def test_pieces_of_75_tokens() -> None:
    assert lengths("") == [0]
    assert lengths("a" * 75) == [75]
    assert lengths("a" * 76) == [75, 1]
    assert lengths("a" * 151) == [75, 75, 1]
    assert lengths("a" * 73 + "X") == [73, 5]
    assert lengths("a BREAK b BREAK") == [1, 1]
    assert lengths("a BREAK BREAK b") == [1, 0, 1]
    # What follows a comma goes along where that is at most 20 tokens.
    assert lengths("a" * 60 + "," + "b" * 20) == [61, 20]
    assert lengths("a" * 50 + "," + "b" * 30) == [75, 6]
    assert lengths("a" * 75 + ",") == [75, 1]
    piece, _ = split_prompt("(a:1.3)b" + "c" * 80, units, comma=0)
    assert piece.weights == (1.3, *[1.0] * 74)


def test_weights_multiply_the_states_and_keep_their_mean() -> None:
    """As the formula says, in float64."""
    states = torch.randn(2, CONTEXT, 6, generator=torch.Generator().manual_seed(3)) + 0.5
    pieces = [Piece((1, 2, 3), (1.0, 1.3, 0.5)), Piece((), ())]
    done = weighted(states, pieces)
    wanted = states[0].double()
    mean = wanted.mean()
    wanted = wanted.clone()
    wanted[2] *= 1.3
    wanted[3] *= 0.5
    torch.testing.assert_close(done[0].double(), wanted * (mean / wanted.mean()), rtol=1e-6, atol=1e-6)
    assert torch.equal(done[1], states[1])


@given(st.lists(st.sampled_from(["a", "red", "ball", ",", "sand", "10:30", "x"]), max_size=20))
def test_words_without_syntax_are_read_alike(words: list[str]) -> None:
    prompt, tokens = " ".join(words), tokenizer()
    encoder = text_encoder(tokens.vocab_size)
    one, two = (encode_prompts([prompt, ""], tokens, encoder, CPU, syntax) for syntax in ("plain", "webui"))
    assert torch.equal(one, two)


def test_contexts_of_long_prompts_are_of_one_length() -> None:
    tokens = tokenizer()
    encoder = text_encoder(tokens.vocab_size)
    short, long = "a red ball", "a red ball BREAK (a blue house:1.5)"
    both = encode_prompts([short, long], tokens, encoder, CPU, "webui")
    assert both.shape == (2, 2 * CONTEXT, 16)
    torch.testing.assert_close(both[0, :CONTEXT], encode_prompts([short], tokens, encoder, CPU)[0])
    torch.testing.assert_close(both[0, CONTEXT:], encode_prompts([""], tokens, encoder, CPU)[0])
    house = encode_prompts(["a blue house"], tokens, encoder, CPU)[0]
    weights = [1.5] * (tokens.length("a blue house") - 2)
    stronger = weighted(house[None], [Piece(tuple(range(len(weights))), tuple(weights))])[0]
    torch.testing.assert_close(both[1, CONTEXT:], stronger)
    assert not torch.equal(stronger, house)


def test_a_tokenizer_without_single_tokens_is_refused_for_webui() -> None:
    def count(prompts: list[str]) -> Tensor:
        return torch.tensor([[len(prompt)] for prompt in prompts])

    assert encode_prompts(["abc"], count, lambda ids: ids, CPU).tolist() == [[3]]
    with pytest.raises(ValueError, match="webui needs a PromptTokenizer"):
        encode_prompts(["abc"], count, lambda ids: ids, CPU, "webui")


def test_the_words_for_clip() -> None:
    assert plain_words(r"(a red:1.3) ball BREAK [on] \(sand\) <lora:x:1>") == "a red ball on (sand)"


# ---- learned words -----------------------------------------------------------------------------------------


def test_a_word_stands_for_its_vectors() -> None:
    """The states are those of a text encoder whose table has the vectors as further rows."""
    tokens = tokenizer()
    encoder, wider = text_encoder(tokens.vocab_size), text_encoder(tokens.vocab_size + 5)
    vectors = torch.randn(5, 16, generator=torch.Generator().manual_seed(2))
    state = encoder.state_dict()
    table = "text_model.embeddings.token_embedding.weight"
    wider.load_state_dict(state | {table: torch.cat([state[table], vectors])})
    assert add_vectors(encoder.text_model, vectors[:2]) == tokens.vocab_size
    assert add_vectors(encoder.text_model, vectors[2:]) == tokens.vocab_size + 2
    tokens.add_word("Cat-Toy", [tokens.vocab_size, tokens.vocab_size + 1])
    tokens.add_word("<dog>", range(tokens.vocab_size + 2, tokens.vocab_size + 5))
    ids = tokens(["a red cat-toy, embedding:CAT-TOY.pt on<dog>.", "cat-toys and concat-toy"])
    new = tokens.vocab_size
    assert [i - new for i in ids[0].tolist() if i >= new] == [0, 1, 0, 1, 2, 3, 4]
    assert (ids[1] < new).all()
    assert torch.equal(encoder(ids), wider(ids))
    assert encoder.state_dict().keys() == state.keys()
    plain = tokens(["a red ball"])
    assert torch.equal(encoder(plain), wider(plain))
    # Of ids that are added no one is taken for the end of the text.
    assert torch.equal(encoder.pooled(ids)[0], encoder(ids)[0, ids[0].tolist().index(tokens.end_id)])


def test_a_long_word_is_not_torn() -> None:
    tokens = tokenizer()
    tokens.add_word("x y", range(1000, 1010))
    prompt = "a " * 70 + "x  Y"
    assert tokens.length(prompt) == 82 and tokens.has_word("X y", prompt)
    pieces = split_prompt(prompt, tokens.units, comma=None)
    assert [len(piece.ids) for piece in pieces] == [70, 10]


@pytest.mark.parametrize("word", ["", "  "])
def test_an_empty_word_is_refused(word: str) -> None:
    with pytest.raises(ValueError, match="the word to add is empty"):
        tokenizer().add_word(word, [1])


@pytest.mark.parametrize("shape", [(2, 15), (16,)])
def test_vectors_of_another_width_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected \(n, 16\)"):
        add_vectors(text_encoder(530).text_model, torch.ones(shape))
