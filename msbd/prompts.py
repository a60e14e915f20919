"""Prompts to contexts: what the nets attend to.

Tensors  ids (B, 77) -> contexts (B, 77 k, D), k = 1 but for long prompts of --prompt-syntax webui
Copying  needs prompt_syntax.py beside it; torch
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .prompt_syntax import Piece, split_prompt, weighted

Encode = Callable[[Tensor], Tensor]  # ids (B, 77) -> states (B, 77, D)


def encode_prompts(
    prompts: Sequence[str], tokenizer: Any, text_encoder: Encode, device: torch.device, syntax: str = "plain"
) -> Tensor:
    """Contexts (B, 77 k, D) of B prompts.

    syntax "plain" takes a prompt as words and cuts off what is beyond 77 tokens; "webui" reads weights in
    brackets and BREAK, and cuts a long prompt into k pieces (prompt_syntax.py), shorter ones being filled up
    with empty pieces. ValueError for "webui" with a tokenizer that has no `units` and `rows`.
    """
    if syntax == "plain":
        return text_encoder(tokenizer(list(prompts)).to(device))
    if not (hasattr(tokenizer, "units") and hasattr(tokenizer, "rows")):
        raise ValueError(
            "prompt_syntax webui needs a PromptTokenizer, which tells a prompt's tokens one by one"
        )
    (comma,) = tokenizer.pieces(",")
    split = [split_prompt(prompt, tokenizer.units, comma) for prompt in prompts]
    most = max(map(len, split))
    filled = [piece for pieces in split for piece in (*pieces, *[Piece((), ())] * (most - len(pieces)))]
    states = text_encoder(tokenizer.rows([piece.ids for piece in filled]).to(device))  # (B k, 77, D)
    return weighted(states, filled).unflatten(0, (len(prompts), most)).flatten(1, 2)
