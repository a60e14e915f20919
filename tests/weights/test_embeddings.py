"""weights/embeddings.py: textual inversions in every form they come in, and one line for what is none."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from weights.detect import refuse_foreign
from weights.embeddings import Embedding, is_embedding, read_embedding
from weights.files import WeightsError, read_state_dict

VECTORS = torch.randn(3, 768, generator=torch.Generator().manual_seed(0))


def webui(vectors: Any = VECTORS) -> dict[str, Any]:
    """As AUTOMATIC1111's interface saves one."""
    return {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": vectors},
        "name": "other",
        "step": 100,
        "sd_checkpoint": None,
    }


FORMS: dict[str, tuple[str, Callable[[], Any], tuple[str, ...]]] = {
    "webui": ("cat.pt", webui, ("cat",)),
    "webui, a parameter": ("cat.pt", lambda: webui(torch.nn.Parameter(VECTORS)), ("cat",)),
    "the paper's code": ("cat.pt", lambda: webui() | {"string_to_param": torch.nn.ParameterDict({"*": VECTORS})}, ("cat",)),
    "emb_params": ("bad hands v4.safetensors", lambda: {"emb_params": VECTORS}, ("bad hands v4",)),
    "diffusers": ("learned_embeds.safetensors", lambda: {"<cat-toy>": VECTORS}, ("learned_embeds", "<cat-toy>")),
    "diffusers, pickled": ("learned_embeds.bin", lambda: {"<cat-toy>": VECTORS[0]}, ("learned_embeds", "<cat-toy>")),
    "one tensor of any name": ("cat.safetensors", lambda: {"anything": VECTORS.half()}, ("cat",)),
    "bfloat16": ("cat.safetensors", lambda: {"emb_params": VECTORS.bfloat16()}, ("cat",)),
}  # fmt: skip


def write(path: Path, content: Any) -> Path:
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in content.items()}, path)
    else:
        torch.save(content, path)
    return path


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_its_word_and_vectors(form: str, tmp_path: Path) -> None:
    name, make, words = FORMS[form]
    path = write(tmp_path / name, make())
    read = read_embedding(path)
    assert read.words == words and read.vectors.dtype == torch.float32
    wanted = VECTORS[:1] if "pickled" in form else VECTORS
    tolerance = 1e-2 if form in ("one tensor of any name", "bfloat16") else 0
    torch.testing.assert_close(read.vectors, wanted, rtol=tolerance, atol=tolerance)
    assert is_embedding(read_state_dict(path))
    with pytest.raises(
        WeightsError, match="a textual inversion embedding, not a model; give it with --embedding"
    ):
        refuse_foreign(read_state_dict(path), path)
    read.check_width(768)


def test_describe_and_widths() -> None:
    one = Embedding("x.pt", ("x",), torch.ones(1, 1024))
    assert one.describe() == "a textual inversion of 1 vector of width 1024, word 'x'"
    with pytest.raises(
        WeightsError, match=r"x.pt: vectors of width 1024, as Stable Diffusion 2.x has; .* has 768"
    ):
        one.check_width(768)
    two = Embedding("x.pt", ("x", "<y>"), torch.ones(2, 16))
    assert two.describe().endswith("of 2 vectors of width 16, word 'x' or '<y>'")
    with pytest.raises(WeightsError, match=r"width 16; this model's text encoder has 768"):
        two.check_width(768)


REFUSED: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "SDXL": ({"clip_l": torch.ones(2, 768), "clip_g": torch.ones(2, 1280)}, "of SDXL"),
    "two words": ({"<a>": torch.ones(768), "<b>": torch.ones(768)}, "2 words in one file"),
    "a model": ({"a.weight": torch.ones(2, 3), "b.weight": torch.ones(2, 3)}, "2 tensors in one file"),
    "three axes": ({"emb_params": torch.ones(1, 2, 768)}, "expected 1 to 75 vectors"),
    "a number": ({"emb_params": torch.tensor(1.0)}, "expected 1 to 75 vectors"),
    "no vectors": ({"emb_params": torch.ones(0, 768)}, "expected 1 to 75 vectors"),
    "too many": ({"emb_params": torch.ones(76, 768)}, "expected 1 to 75 vectors"),
    "whole numbers": ({"emb_params": torch.ones(2, 768, dtype=torch.int64)}, "expected floating point"),
    "not a number": ({"emb_params": torch.full((2, 768), torch.nan)}, "not finite"),
    "infinite": ({"emb_params": torch.full((2, 768), torch.inf)}, "not finite"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_none_is_refused_in_a_line(case: str, tmp_path: Path) -> None:
    state, message = REFUSED[case]
    path = write(tmp_path / "x.safetensors", state)
    with pytest.raises(WeightsError, match=rf"^{re.escape(str(path))}: .*{message}") as caught:
        read_embedding(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_pickle_that_would_run_code_is_not_opened(tmp_path: Path) -> None:
    class Bad:
        def __reduce__(self) -> Any:
            return (print, ("no",))

    content = webui() | {"name": Bad()}
    assert read_embedding(write(tmp_path / "cat.pt", content)).words == ("cat",)  # a stand-in took its place
    torch.save({"string_to_param": {"*": "words"}}, tmp_path / "x.pt")
    with pytest.raises(WeightsError, match="a pickle without tensors"):
        read_embedding(tmp_path / "x.pt")


def test_an_ordinary_file_is_no_embedding() -> None:
    assert not is_embedding({"conv_in.weight": torch.ones(4, 4, 3, 3)})
    assert not is_embedding({"a": torch.ones(2, 16)})
    assert not is_embedding({})
