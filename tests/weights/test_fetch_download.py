"""weights/fetch.py: what is downloaded is the right file, or is not kept;
every failure is one line with the way out.
"""

import errno
import os
import shutil
import socket
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.errors as hub_errors
import pytest
from huggingface_hub import constants

from tests.helpers.fake_hub import (
    COMMIT,
    CONTENT,
    NET,
    NOW,
    OLD,
    Site,
    cache,
    digest,
    empty_machine,
    put,
    refusal,
    running,
)
from weights import fetch as module
from weights.fetch import fetch, find_local, verify, weights_folder
from weights.files import WeightsError
from weights.registry import MODELS, ModelFile


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    empty_machine(tmp_path, monkeypatch, sockets="site" in request.fixturenames)


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

    monkeypatch.setattr(module, "hf_hub_download", download)
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
        (error(hub_errors.HfHubHTTPError, 500), "the download failed"),
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
    said = refusal(MODELS["toonyou"].files[0])
    assert "by hand, from https://civitai.com/models/30240" in said and str(weights_folder()) in said


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


@pytest.mark.parametrize("status", [403, 404, 500])
def test_an_error_status_is_named(site: Site, status: int) -> None:
    site.status = status
    said = refusal(site.file())
    assert (
        f": HTTP Error {status}: " in said and str(weights_folder() / "net.pth") in said and left() == set()
    )


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
def mirror(site: Site, monkeypatch: pytest.MonkeyPatch) -> Site:
    """The server as HF_ENDPOINT: it has me/mine/unet/net.safetensors, whatever the path."""
    monkeypatch.setattr(constants, "ENDPOINT", site.address)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        f"{site.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
    )
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    site.headers = {constants.HUGGINGFACE_HEADER_X_REPO_COMMIT: COMMIT, "ETag": f'"{digest(CONTENT)}"'}
    return site


def test_the_real_library_downloads_into_its_cache(mirror: Site) -> None:
    path = fetch(NET)
    assert path.read_bytes() == CONTENT and Path(constants.HF_HUB_CACHE) in path.parents
    assert verify(path, NET).state == "ok"
    asked = len(mirror.asked)
    assert fetch(NET) == path and len(mirror.asked) == asked


def test_the_real_library_keeps_no_wrong_file(mirror: Site) -> None:
    mirror.content = CONTENT[::-1]
    assert digest(CONTENT) in refusal(NET) and find_local(NET) is None
    mirror.content = CONTENT
    assert fetch(NET).read_bytes() == CONTENT


@pytest.mark.parametrize(
    "status, code, said",
    [
        (403, "GatedRepo", "licence must be accepted first"),
        (401, "RepoNotFound", "refused, 401"),
        (404, "EntryNotFound", "no such file there"),
        (404, "RevisionNotFound", "no such file there"),
    ],
)
def test_the_real_librarys_errors_are_understood(mirror: Site, status: int, code: str, said: str) -> None:
    mirror.status, mirror.content = status, b""
    mirror.headers["X-Error-Code"] = code
    assert said in refusal(NET) and mirror.address in refusal(NET)
