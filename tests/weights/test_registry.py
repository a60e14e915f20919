"""weights/registry.py: the table is well formed, and each way of asking for the wrong thing is one line."""

import re
from pathlib import Path

import pytest

from weights import registry
from weights.files import WeightsError
from weights.registry import MODELS, find_model, model_files


@pytest.mark.parametrize("name", MODELS)
def test_every_entry_is_well_formed(name: str) -> None:
    model = find_model(name)
    assert model.name == name and model.licence and "\n" not in model.what
    assert len({file.part for file in model.files}) == len(model.files) > 0
    for file in model.files:
        assert file.sha256 is None or re.fullmatch("[0-9a-f]{64}", file.sha256)
        assert file.size is None or file.size > 0
        assert not Path(file.file).is_absolute() and ".." not in Path(file.file).parts
        inside = file.repo is None and file.url is None
        assert inside == (name == "mini"), "exactly the bundle is part of the checkout"


def test_no_two_files_share_a_hash_unless_they_are_one_file() -> None:
    by_hash = {
        file.sha256: (file.repo, file.url, file.file) for model in MODELS.values() for file in model.files
    }
    for model in MODELS.values():
        for file in model.files:
            assert file.sha256 is None or by_hash[file.sha256] == (file.repo, file.url, file.file)


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(WeightsError, match="'sd-v9'.*mini, sd-v1-4, sd-v1-5, pasd") as caught:
        model_files("sd-v9")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [name for name, model in MODELS.items() if not model.loadable])
def test_known_but_not_loadable_says_so(name: str) -> None:
    with pytest.raises(
        WeightsError, match=f"^{name} is known but loads from the next release; this one loads: mini"
    ):
        model_files(name)


def test_mini_resolves_to_files_of_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "MINI", tmp_path)
    for file in MODELS["mini"].files:
        (tmp_path / file.file).touch()
    paths = model_files("mini")
    assert {"unet", "vae", "clip", "tokenizer"} <= paths.keys()
    assert all(path.parent == tmp_path for path in paths.values())
    paths["unet"].unlink()
    with pytest.raises(WeightsError, match=r"unet.safetensors: missing.*git checkout"):
        model_files("mini")
