"""weights/fetch.py: what is downloaded is the right file, or is not kept;
every failure is one line with the way out.
"""

import errno
import os
import re
import shutil
import socket
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.errors as hub_errors
import pytest
from huggingface_hub import constants, hf_hub_download

from tests.helpers.fake_hub import (
    COMMIT,
    CONTENT,
    LATER,
    NET,
    NOW,
    OLD,
    Hub,
    Site,
    cache,
    digest,
    empty_machine,
    hub_running,
    put,
    refusal,
    running,
    use_endpoint,
)
from weights import fetch as module
from weights import fetch_hub
from weights.fetch import check_space, fetch, find_local, verify, weights_folder
from weights.files import WeightsError
from weights.registry import MODELS, ModelFile


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    sockets = not {"site", "served"}.isdisjoint(request.fixturenames)
    empty_machine(tmp_path, monkeypatch, sockets=sockets, figures=True)


# ---- from the hub ------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A stand-in for hf_hub_download: it puts `content` into the cache, under the name `blob`,
    or raises `error`.
    """
    hub = SimpleNamespace(content=CONTENT, blob=None, links=True, error=None, calls=[])

    def download(repo: str, path: str, *, revision: str | None) -> str:
        hub.calls.append((repo, path, revision))
        if hub.error:
            raise hub.error
        return str(cache(ModelFile("", path, repo), hub.content, blob=hub.blob, links=hub.links))

    monkeypatch.setattr(fetch_hub, "hf_hub_download", download)
    monkeypatch.setattr(fetch_hub, "_etag", lambda *_: None)  # a hub that does not say what it has
    return hub


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("known", [True, False])
def test_a_file_of_the_hub_is_downloaded_once(hub: SimpleNamespace, links: bool, known: bool) -> None:
    hub.links = links
    sha256, size = (digest(CONTENT), len(CONTENT)) if known else (None, None)
    file = ModelFile("unet", "net.safetensors", OLD, revision="main", size=size, sha256=sha256)
    path = fetch(file)
    assert path.read_bytes() == CONTENT and fetch(file) == path
    assert hub.calls == [(NOW, "net.safetensors", "main")]


@pytest.mark.parametrize("links", [True, False])
def test_a_wrong_file_of_the_hub_is_deleted(hub: SimpleNamespace, links: bool) -> None:
    hub.content, hub.links = CONTENT[::-1], links
    file = ModelFile("unet", "net.safetensors", "me/mine", size=len(CONTENT), sha256=digest(CONTENT))
    said = refusal(file)
    assert said.startswith("me/mine/net.safetensors: ") and digest(CONTENT) in said
    assert digest(CONTENT[::-1]) in said
    left = [path for path in Path(constants.HF_HUB_CACHE).rglob("*") if path.is_file() or path.is_symlink()]
    assert [path.parent.name for path in left] == ["refs"]


def test_content_that_the_hub_itself_names_otherwise_is_deleted(hub: SimpleNamespace) -> None:
    hub.blob = digest(b"what the hub has")
    assert hub.blob in refusal(NET) and find_local(NET) is None


def error(kind: Any, status: int) -> Exception:
    """A huggingface_hub error as an answer of that status makes it."""
    answer: Any = SimpleNamespace(status_code=status, headers={}, request=None)
    return kind("several\nlines", response=answer)


@pytest.mark.parametrize(
    "raised, said",
    [
        (error(hub_errors.GatedRepoError, 403), "its licence must be accepted first, at https://huggingface.co/me/mine.*HF_TOKEN"),
        (error(hub_errors.RepositoryNotFoundError, 401), "refused, 401; see https://huggingface.co/me/mine.*HF_TOKEN"),
        (error(hub_errors.HfHubHTTPError, 403), "refused, 403; .*HF_TOKEN"),
        (error(hub_errors.RemoteEntryNotFoundError, 404), "no such file there, see .*me/mine/unet/net.safetensors$"),
        (error(hub_errors.RevisionNotFoundError, 404), "no such file there"),
        (hub_errors.LocalEntryNotFoundError("no\nnet"), "https://huggingface.co cannot be reached.*HF_ENDPOINT"),
        (error(hub_errors.HfHubHTTPError, 503), "HTTP 503, https://huggingface.co itself fails; try later, .*HF_ENDPOINT"),
        (error(hub_errors.HfHubHTTPError, 418), r"the download failed \(several\)"),
        (OSError(errno.ENOSPC, "no space"), "the disk is full"),
        (ConnectionResetError("reset\nby peer"), r"the download failed \(reset\); check the connection"),
        (RuntimeError("something\nelse"), r"the download failed \(something\)"),
    ],
)  # fmt: skip
def test_what_the_hub_refuses_is_one_line_with_the_way_out(
    hub: SimpleNamespace, raised: Exception, said: str
) -> None:
    hub.error = raised
    with pytest.raises(WeightsError, match=f"^me/mine/unet/net.safetensors: {said}") as refused:
        fetch(NET)
    assert "\n" not in str(refused.value) and refused.value.__cause__ is raised


@pytest.mark.parametrize("name", ["sd-v1-5", "realesrgan-x4plus"])
def test_offline_nothing_is_asked_for(
    hub: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    file = MODELS[name].files[0]
    said = refusal(file)
    assert "HF_HUB_OFFLINE" in said and file.file in said and str(weights_folder()) in said
    assert not hub.calls
    os.truncate(put(weights_folder() / file.file), file.size or 0)
    assert fetch(file) == weights_folder() / file.file


def test_a_page_for_people_is_named(hub: SimpleNamespace) -> None:
    said = refusal(MODELS["majicmix-v7"].files[0])
    assert "by hand from https://civitai.com/models/43331" in said and str(weights_folder()) in said


@pytest.mark.parametrize(
    "name, variable", [("sd-v1-5-fp16", "HF_HOME"), ("realesrgan-x4plus", "MSBD_WEIGHTS")]
)
def test_a_full_disk_is_noticed_before_the_download(
    hub: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, name: str, variable: str
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**6))
    said = refusal(MODELS[name].files[0])
    assert "1 MB free" in said and variable in said and not hub.calls


# ---- by url ------------------------------------------------------------------------------------------------


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    site, check_scheme = Site(), module._check_scheme
    monkeypatch.setattr(
        module, "_check_scheme", lambda url: None if url.startswith(site.address) else check_scheme(url)
    )
    monkeypatch.setattr(module, "CHUNK", 100)
    with running(site):
        yield site


def left() -> set[str]:
    """What lies in the weights folder."""
    return {path.name for path in weights_folder().iterdir()} if weights_folder().exists() else set()


def test_a_url_is_downloaded_once_with_progress(site: Site) -> None:
    seen: list[tuple[int, int]] = []
    path = fetch(site.file(), on_progress=lambda done, total: seen.append((done, total)))
    assert path == weights_folder() / "net.pth" and path.read_bytes() == CONTENT and left() == {"net.pth"}
    assert seen == sorted(seen) and seen[0] == (100, 1024) and seen[-1] == (1024, 1024)
    assert fetch(site.file()) == path and site.asked == [None]


def test_a_broken_download_is_continued(site: Site) -> None:
    site.breaks_after = 400
    assert "broken off at 400 of 1,024 bytes; fetch again" in refusal(site.file()) and left() == {
        "net.pth.part"
    }
    assert "broken off at 800 of" in refusal(site.file())
    site.breaks_after = None
    assert fetch(site.file()).read_bytes() == CONTENT and left() == {"net.pth"}
    assert site.asked == [None, "bytes=400-", "bytes=800-"]


def test_a_server_without_ranges_sends_everything_again(site: Site) -> None:
    put(weights_folder() / "net.pth.part", b"x" * 400)
    site.ranges = False
    assert fetch(site.file()).read_bytes() == CONTENT and site.asked == ["bytes=400-"]


def test_a_whole_part_needs_only_its_check(site: Site) -> None:
    put(weights_folder() / "net.pth.part")
    assert fetch(site.file()).read_bytes() == CONTENT and site.asked == []


def test_a_part_longer_than_the_file_starts_over(site: Site) -> None:
    put(weights_folder() / "net.pth.part", CONTENT * 2)
    assert fetch(site.file()).read_bytes() == CONTENT and site.asked == [None]


@pytest.mark.parametrize("part", [b"", b"other beginning"])
def test_a_wrong_file_is_deleted(site: Site, part: bytes) -> None:
    if part:
        put(weights_folder() / "net.pth.part", part)
    else:
        site.content = CONTENT[::-1]
    said = refusal(site.file())
    found = part + CONTENT[len(part) :] if part else CONTENT[::-1]
    assert digest(found) in said and digest(CONTENT) in said and site.address in said and left() == set()


@pytest.mark.parametrize("part", [b"", CONTENT[:400]])
def test_more_than_the_registered_size_is_not_taken(site: Site, part: bytes) -> None:
    site.content = CONTENT * 1000
    if part:
        put(weights_folder() / "net.pth.part", part)
    most: list[int] = []
    with pytest.raises(WeightsError, match="more than the expected 1,024 bytes"):
        fetch(site.file(), on_progress=lambda done, _: most.append(done))
    assert len(most) <= 11 and left() == set()


def test_a_web_page_is_not_a_file(site: Site) -> None:
    site.kind = "text/html; charset=utf-8"
    assert "answered with a web page" in refusal(site.file()) and left() == set()


def test_another_range_than_asked_for_is_refused(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    part = put(weights_folder() / "net.pth.part", CONTENT[:400])
    monkeypatch.setattr(BaseHTTPRequestHandler, "send_header", lambda *_: None)
    assert "asked for the bytes from 400 on" in refusal(site.file())
    assert part.read_bytes() == CONTENT[:400]


@pytest.mark.parametrize(
    "status, meaning",
    [
        (403, "the server refuses"),
        (404, "the server does not give it"),
        (429, "too many requests"),
        (500, "the server itself fails"),
    ],
)
def test_an_error_status_is_named(site: Site, status: int, meaning: str) -> None:
    site.status = status
    said = refusal(site.file())
    assert f": HTTP Error {status}: " in said and meaning in said
    assert str(weights_folder() / "net.pth") in said and left() == set()


def test_a_part_that_the_server_cannot_continue_is_dropped(site: Site) -> None:
    put(weights_folder() / "net.pth.part", b"x" * 400)
    site.ranges, site.status = False, 416
    assert "416" in refusal(site.file()) and left() == set()


@pytest.mark.parametrize(
    "place, said",
    [
        ("http://127.0.0.1:9/x", "^http://127.0.0.1:9/x: expected an https address"),
        ("ftp://127.0.0.1/x", "^ftp://127.0.0.1/x: expected an https address"),
        ("file:///etc/passwd", "HTTP Error 302: "),
    ],
)
def test_a_redirect_away_from_https_is_not_followed(site: Site, place: str, said: str) -> None:
    site.location = place
    with pytest.raises(WeightsError, match=said):
        fetch(site.file())
    assert len(site.asked) == 1 and left() == set()


def test_redirects_are_followed_but_not_for_ever(site: Site) -> None:
    site.location = f"{site.address}/net.pth"
    assert "HTTP Error 302: " in refusal(site.file()) and len(site.asked) > 1 and left() == set()


def test_only_https_is_asked() -> None:
    file = ModelFile("rrdb", "a.pth", url="http://a.b/a.pth", size=3, sha256="0" * 64)
    assert refusal(file) == "http://a.b/a.pth: expected an https address"


def test_no_connection_is_one_line(site: Site) -> None:
    with socket.socket() as free:  # a port that nobody listens on
        free.bind(("127.0.0.1", 0))
        site.address = f"http://127.0.0.1:{free.getsockname()[1]}"
    assert "the download failed" in refusal(site.file()) and "check the connection" in refusal(site.file())


def test_a_disk_that_fills_up_and_a_folder_that_cannot_be_made(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "_starts_at", full)
        assert "the disk is full" in refusal(site.file())
    put(weights_folder().parent / "file")
    monkeypatch.setenv("MSBD_WEIGHTS", str(weights_folder().parent / "file" / "below"))
    assert "the download failed" in refusal(site.file())


# ---- huggingface_hub itself, with a hub on this machine ----------------------------------------------------


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that has NET."""
    hub = Hub()
    hub.put(NET)
    with hub_running(hub, monkeypatch):
        yield hub


KNOWN = ModelFile("unet", NET.file, NET.repo, size=len(CONTENT), sha256=digest(CONTENT))


def test_the_real_library_downloads_into_its_cache(served: Hub) -> None:
    path = fetch(NET)
    assert path.read_bytes() == CONTENT and Path(constants.HF_HUB_CACHE) in path.parents
    assert verify(path, NET).state == "ok"
    asked = len(served.asked)
    assert fetch(NET) == path and len(served.asked) == asked


@pytest.mark.parametrize("file", [NET, KNOWN])
def test_the_real_library_keeps_no_wrong_file(served: Hub, file: ModelFile) -> None:
    served.garbled = True
    assert digest(CONTENT) in refusal(file) and find_local(file) is None
    served.garbled = False
    assert fetch(file).read_bytes() == CONTENT


@pytest.mark.parametrize(
    "status, code, said",
    [
        (403, "GatedRepo", "its licence must be accepted first, at {hub}/me/mine; .*HF_TOKEN"),
        (401, "RepoNotFound", "refused, 401; see {hub}/me/mine .*HF_TOKEN"),
        (401, "", "refused, 401; see {hub}/me/mine .*HF_TOKEN"),
        (403, "", "refused, 403; see {hub}/me/mine .*HF_TOKEN"),
        (404, "EntryNotFound", "no such file there, see {hub}/me/mine"),
        (404, "RevisionNotFound", "no such file there, see {hub}/me/mine"),
        (
            429,
            "",
            "HTTP 429, too many requests .*: wait .*HF_TOKEN to an access token of {hub}/settings/tokens$",
        ),
        (500, "", "HTTP 500, {hub} itself fails; try later, or set HF_ENDPOINT"),
        (502, "", "HTTP 502, {hub} itself fails"),
        (503, "", "HTTP 503, {hub} itself fails"),
    ],
)
@pytest.mark.parametrize("file", [NET, KNOWN], ids=["unknown", "known"])
def test_an_answer_is_told_as_what_it_is_and_not_as_a_lost_connection(
    served: Hub, status: int, code: str, said: str, file: ModelFile
) -> None:
    served.status, served.code = status, code
    line = refusal(file)
    assert re.match(f"me/mine/unet/net.safetensors: {said.format(hub=re.escape(served.address))}", line), line
    assert "cannot be reached" not in line and not served.loaded()


def test_only_a_lost_connection_is_told_as_one(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    served.is_hub = False  # a proxy's page, say
    assert "does not answer as a hub does; check HF_ENDPOINT and your proxy" in refusal(NET)
    with socket.socket() as free:  # a port that nobody listens on
        free.bind(("127.0.0.1", 0))
        use_endpoint(f"http://127.0.0.1:{free.getsockname()[1]}", monkeypatch)
    assert f"{constants.ENDPOINT} cannot be reached; check the connection" in refusal(NET)


def test_another_file_on_the_hub_is_told_before_it_is_downloaded(served: Hub) -> None:
    served.put(KNOWN, CONTENT[::-1])
    said = refusal(KNOWN)
    assert (
        f"the hub now has another file (sha256 {digest(CONTENT[::-1])}) than the one known here ({digest(CONTENT)})"
        in said
    )
    assert "fetch again" not in said and str(weights_folder() / "me/mine/unet/net.safetensors") in said
    assert not served.loaded()


def test_the_second_source_has_what_the_first_has_no_more(served: Hub) -> None:
    copy = replace(KNOWN, repo="you/copy")
    file = replace(
        KNOWN, others=(copy, replace(KNOWN, repo=None, page="https://example.com/1", file="net.safetensors"))
    )
    served.put(KNOWN, CONTENT[::-1])
    said = refusal(file)
    assert "the hub now has another file" in said and "; you/copy/unet/net.safetensors failed too" in said
    assert said.endswith(
        f", or get net.safetensors by hand from https://example.com/1 into {weights_folder()}"
    )
    served.put(copy)
    path = fetch(file)
    assert path.read_bytes() == CONTENT and "models--you--copy" in str(path) and find_local(file) == path
    assert [line.split("/resolve")[0] for line in served.loaded()] == ["you/copy"]


def test_a_pinned_file_is_the_pinned_one_whatever_main_has(served: Hub) -> None:
    pinned = replace(NET, revision=COMMIT)
    served.main = LATER
    served.put(NET, b"newer")
    path = fetch(pinned)
    assert path.read_bytes() == CONTENT and COMMIT in path.parts
    assert served.loaded() == [f"me/mine/resolve/{COMMIT}/unet/net.safetensors"]


def test_what_was_fetched_is_not_fetched_again_when_main_moves_on(served: Hub) -> None:
    more = replace(NET, file="config.json")
    path = fetch(NET)
    served.main = LATER
    served.put(more, b"{}")
    fetch(more)  # now the cache's main is LATER, which lacks the net
    asked = len(served.asked)
    assert fetch(NET) == path and len(served.asked) == asked


@pytest.mark.parametrize("half", ["vocab.json", "merges.txt", "nothing"])
def test_vocabulary_and_merges_come_from_one_commit(served: Hub, half: str) -> None:
    merges = ModelFile("tokenizer_merges", "tokenizer/merges.txt", "me/mine")
    vocab = ModelFile("tokenizer", "tokenizer/vocab.json", "me/mine", beside=merges)
    served.small = (".json", ".txt")
    for commit in (COMMIT, LATER):
        for file in (vocab, merges):
            served.put(file, f"{file.part} of {commit}".encode(), commit)
    for file in (vocab, merges):
        if file.file.endswith(half):  # as an interrupted fetch leaves it
            hf_hub_download("me/mine", file.file)
    served.main = LATER
    path = fetch(vocab)
    assert path.read_text().split()[-1] == path.with_name("merges.txt").read_text().split()[-1]
    asked = len(served.asked)
    assert find_local(vocab) == path and fetch(merges).is_file() and len(served.asked) == asked


# ---- room for all of it ------------------------------------------------------------------------------------


@pytest.fixture
def disks(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The bytes that are free: of a disk for the Hugging Face cache ("hub") and one for the rest."""
    free = {"hub": 10**12, "rest": 10**12}
    of_hub = Path(constants.HF_HUB_CACHE)
    monkeypatch.setattr(module, "_existing", lambda folder: folder)
    monkeypatch.setattr(module, "_disk", lambda folder: folder == of_hub)
    monkeypatch.setattr(
        shutil, "disk_usage", lambda folder: SimpleNamespace(free=free["hub" if folder == of_hub else "rest"])
    )
    return free


GB = [
    ModelFile("unet", "a.safetensors", "me/mine", size=4 * 10**9),
    ModelFile("vae", "b.safetensors", "me/mine", about=2 * 10**9),
    ModelFile("rrdb", "c.pth", url="https://a.b/c.pth", size=10**9, sha256="0" * 64),
    ModelFile("all", "d.safetensors", page="https://a.b/d", size=9 * 10**9),
]


def test_the_whole_need_is_compared_with_the_room_of_each_disk(disks: dict[str, int]) -> None:
    check_space(GB, "m")
    disks["hub"] = 5 * 10**9  # enough for each file
    with pytest.raises(WeightsError) as refused:
        check_space([*GB, GB[0]], "m")
    assert str(refused.value) == (
        f"m: 6.00 GB to download, but {constants.HF_HUB_CACHE} has 5.00 GB free, 1.00 GB too little; make room, "
        "or set HF_HOME to a folder on another disk"
    )
    os.truncate(cache(GB[0]), 0)
    check_space(GB, "m")  # what is here needs no room
    disks["rest"] = 10**8
    with pytest.raises(WeightsError, match="^m: 1.00 GB to .*900 MB too little; .*set MSBD_WEIGHTS to"):
        check_space(GB, "m")


def test_two_folders_on_one_disk_add_up(disks: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_disk", lambda _: 0)
    disks["hub"] = disks["rest"] = 6_500_000_000
    with pytest.raises(WeightsError, match="7.00 GB to .* 500 MB too little; .*HF_HOME or MSBD_WEIGHTS to"):
        check_space(GB, "m")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    check_space(GB, "m")  # nothing will be downloaded


def test_a_folder_is_on_the_disk_of_the_one_above_it(tmp_path: Path) -> None:
    assert module._disk(tmp_path / "a" / "b") == tmp_path.stat().st_dev
