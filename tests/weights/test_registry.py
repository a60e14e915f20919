"""weights/registry.py: the table is well formed, complete for what it promises,
and free of guesses that can be noticed.
"""

import re
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from weights.files import WeightsError
from weights.registry import MINI, MODELS, RENAMED, Model, ModelFile, current_repo, find_model, needed_files

REPO = re.compile(r"[\w.-]+/[\w.-]+")
FILES = [
    pytest.param(file, id=f"{model.name}-{file.part}") for model in MODELS.values() for file in model.files
]


@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_well_formed(name: str) -> None:
    model = find_model(name)
    assert model.name == name and re.fullmatch("[a-z0-9-]+", name)
    assert model.licence and model.what and "\n" not in model.what + model.licence
    assert len({file.part for file in model.files}) == len(model.files) > 0
    assert all(needed in MODELS and needed != name for needed in model.needs)


@pytest.mark.parametrize("file", FILES)
def test_every_file_is_well_formed(file: ModelFile) -> None:
    assert re.fullmatch("[a-z_]+", file.part)
    assert file.sha256 is None or re.fullmatch("[0-9a-f]{64}", file.sha256)
    assert file.size is None or (type(file.size) is int and file.size > 0 and file.about is None)
    assert file.about is None or (type(file.about) is int and file.about >= 10**6)
    path = Path(file.file)
    assert not path.is_absolute() and ".." not in path.parts and "\\" not in file.file
    assert file.repo is not None or path.name == file.file


@pytest.mark.parametrize("file", FILES)
def test_every_file_comes_from_one_place(file: ModelFile) -> None:
    assert sum(place is not None for place in (file.repo, file.url, file.page)) <= 1
    assert file.repo is None or REPO.fullmatch(file.repo)
    for address in (file.url, file.page):
        if address is not None:
            parts = urlsplit(address)
            assert parts.scheme == "https" and parts.hostname and not parts.username and not parts.query
    if file.url is not None:
        assert file.url.endswith(f"/{file.file}")


def test_exactly_the_bundle_is_part_of_the_checkout() -> None:
    inside = [
        (model.name, file.file)
        for model in MODELS.values()
        for file in model.files
        if file.repo is file.url is file.page is None
    ]
    assert {name for name, _ in inside} == {"mini", "mini-pasd", "mini-pasd-color", "mini-style"}
    there = {path.name for path in MINI.iterdir()} - {"README.md"}
    assert sorted(file for _, file in inside) == sorted(there)
    assert {"unet", "vae", "clip", "rrdb", "tokenizer"} == {file.part for file in MODELS["mini"].files}


def test_no_two_files_share_a_hash_or_a_place() -> None:
    files = [file for model in MODELS.values() for file in model.files]
    hashes = [file.sha256 for file in files if file.sha256]
    places = [(file.repo, file.url, file.page, file.file) for file in files]
    assert len(set(hashes)) == len(hashes) and len(set(places)) == len(places)


def test_what_is_downloaded_by_url_can_be_checked() -> None:
    with pytest.raises(ValueError, match=r"^https://a\.b/c: .*size and sha256"):
        ModelFile("rrdb", "c", url="https://a.b/c", size=3)


def test_the_models_that_the_design_names_are_there() -> None:
    assert {"mini", "sd-v1-4", "sd-v1-5", "pasd", "pasd-light"} <= MODELS.keys()
    restrictive = [name for name in MODELS if name.startswith(("sd-", "pasd"))]
    assert all("OpenRAIL-M" in MODELS[name].licence for name in restrictive)


@pytest.mark.parametrize("name", [name for name, model in MODELS.items() if model.needs])
def test_a_model_and_what_it_needs_make_a_pipeline(name: str) -> None:
    parts = {file.part for file in needed_files(MODELS[name])}
    nets = {"unet", "vae"} if "all" not in parts else set()
    assert parts & {"all", "text_encoder", "clip"}
    assert nets | {"tokenizer"} <= parts
    assert {"controlnet", "controlnet_config", "unet_config", "scheduler"} <= parts or {
        "clip",
        "rrdb",
    } <= parts


def test_a_models_own_parts_come_first() -> None:
    files = {file.part: file for file in needed_files(MODELS["pasd-light-color"])}
    assert files["unet"].repo == files["scheduler"].repo == "yangtao9009/PASD"
    assert files["vae"].repo == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    merges = {file.part: file for file in needed_files(MODELS["sd-v1-5-diffusers"])}
    assert merges["tokenizer"].repo == merges["tokenizer_merges"].repo, "load_tokenizer reads them together"
    assert needed_files(MODELS["mini"]) == MODELS["mini"].files


def test_renamed_repositories_lead_to_ones_in_use() -> None:
    used = {file.repo for model in MODELS.values() for file in model.files}
    for old, new in RENAMED.items():
        assert REPO.fullmatch(old) and new in used and old not in used
        assert current_repo(old) == current_repo(new) == new
    assert current_repo("someone/else") == "someone/else"


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(
        WeightsError, match="'sd-v9'.*mini, mini-pasd, .*sd-v1-4, .*sd-v1-5, .*pasd"
    ) as caught:
        find_model("sd-v9")
    assert "\n" not in str(caught.value)


def test_models_and_files_can_be_made_by_others() -> None:
    model = Model("mine", "a model of mine", "MIT", (ModelFile("unet", "a.safetensors", "me/mine"),))
    assert needed_files(model) == model.files
