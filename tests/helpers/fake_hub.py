"""A hub, its cache and a web server, all on this machine, for the tests of weights/fetch.py."""

import hashlib
import os
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from weights.fetch import fetch
from weights.files import WeightsError
from weights.registry import MODELS, ModelFile

COMMIT, LATER = "c0ffee" + "0" * 34, "decaf" + "0" * 35
NOW, OLD = "stable-diffusion-v1-5/stable-diffusion-v1-5", "runwayml/stable-diffusion-v1-5"
CONTENT = bytes(range(256)) * 4
NET = ModelFile("unet", "unet/net.safetensors", "me/mine")


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def empty_machine(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, sockets: bool, figures: bool = False
) -> None:
    """Empty caches below `folder`, no settings; and, unless `sockets`, every network call fails the test.

    Unless `figures`, the registry knows sizes and hashes of nothing but what comes by url: a few bytes can
    stand for any other file then.
    """
    monkeypatch.setenv("HOME", str(folder / "home"))
    for name in [name for name in os.environ if name == "MSBD_WEIGHTS" or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    if not sockets:
        monkeypatch.setattr(socket, "socket", _refuse)
        monkeypatch.setattr(socket, "getaddrinfo", _refuse)
    for name, model in MODELS.items() if not figures else ():
        monkeypatch.setitem(MODELS, name, replace(model, files=tuple(map(without_figures, model.files))))


def without_figures(file: ModelFile) -> ModelFile:
    """The file with neither size nor hash, where it may lack them."""
    others = tuple(map(without_figures, file.others))
    if file.url or file.package:
        return replace(file, others=others)
    second = file.beside and without_figures(file.beside)
    return replace(file, size=None, about=file.size or file.about, sha256=None, beside=second, others=others)


def _refuse(*_: object, **__: object) -> None:
    raise AssertionError("a network call, where none may be made")


def cache(file: ModelFile, content: bytes = CONTENT, *, links: bool = True, blob: str | None = None,
          repo: str | None = None, revision: str = "main", commit: str = COMMIT) -> Path:  # fmt: skip
    """Lay `content` out as huggingface_hub would have cached it; the path it would return."""
    root = Path(constants.HF_HUB_CACHE) / f"models--{(repo or str(file.repo)).replace('/', '--')}"
    pointer = root / "snapshots" / commit / file.file
    pointer.parent.mkdir(parents=True, exist_ok=True)
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / revision).write_text(commit)
    if not links:
        pointer.write_bytes(content)
        return pointer
    stored = root / "blobs" / (blob or digest(content))
    stored.parent.mkdir(exist_ok=True)
    stored.write_bytes(content)
    pointer.symlink_to(os.path.relpath(stored, pointer.parent))
    return pointer


def put(path: Path, content: bytes = CONTENT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def refusal(file: ModelFile) -> str:
    """The one line with which a file is refused."""
    with pytest.raises(WeightsError) as refused:
        fetch(file)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@dataclass
class Site:
    """A web server on this machine with one file, and its moods."""

    address: str = ""
    content: bytes = CONTENT
    kind: str = "application/octet-stream"
    status: int = 200
    ranges: bool = True  # False: sends the whole file, whatever part was asked for
    breaks_after: int | None = None  # bytes of an answer, then the connection ends
    location: str | None = None  # redirects there
    headers: dict[str, str] = field(default_factory=dict)  # more of them
    asked: list[str | None] = field(default_factory=list)  # the Range header of each request

    def file(self) -> ModelFile:
        """CONTENT at this server, as the registry would have it."""
        return ModelFile(
            "rrdb", "net.pth", url=f"{self.address}/net.pth", size=len(CONTENT), sha256=digest(CONTENT)
        )


def _handler(site: Site) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers["Range"]
            site.asked.append(wanted)
            start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and site.ranges else 0
            body = site.content[start:]
            self.send_response(302 if site.location else 206 if start else site.status)
            if site.location:
                self.send_header("Location", site.location)
            if start:
                self.send_header(
                    "Content-Range", f"bytes {start}-{len(site.content) - 1}/{len(site.content)}"
                )
            self.send_header("Content-Type", site.kind)
            self.send_header("Content-Length", str(len(body)))
            for name, value in site.headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body[: site.breaks_after])

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler


@dataclass
class Hub:
    """A Hugging Face hub on this machine: what huggingface_hub asks for a file, and what it wants to hear."""

    address: str = ""
    main: str = COMMIT
    files: dict[tuple[str, str], bytes] = field(default_factory=dict)  # (commit, path) -> content
    small: tuple[str, ...] = ()  # endings of paths whose hash is git's own, not a sha256
    status: int = 200
    code: str = ""  # X-Error-Code
    is_hub: bool = True  # False: some other server, without the headers
    garbled: bool = False  # what comes is not what was announced
    asked: list[str] = field(default_factory=list)  # "HEAD me/mine/resolve/main/net.safetensors"

    def put(self, file: ModelFile, content: bytes = CONTENT, commit: str | None = None) -> None:
        self.files[commit or self.main, f"{file.repo}/{file.file}"] = content

    def loaded(self) -> list[str]:
        """The files that were downloaded."""
        return [line.removeprefix("GET ") for line in self.asked if line.startswith("GET")]


def _hub_handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            hub.asked.append(f"{self.command} {self.path[1:]}")
            found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
            assert found, self.path
            repo, revision, path = found.groups()
            commit = hub.main if revision == "main" else revision
            content = hub.files.get((commit, f"{repo}/{path}"))
            status, code = (hub.status, hub.code) if content is not None else (404, "EntryNotFound")
            body = content if content is not None and status == 200 else b""
            headers = {"Content-Length": str(len(body)), "X-Error-Code": code}
            if hub.is_hub:
                algorithm = hashlib.sha1 if path.endswith(hub.small) and hub.small else hashlib.sha256
                headers |= {"X-Repo-Commit": commit, "ETag": f'"{algorithm(body).hexdigest()}"'}
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body[::-1] if hub.garbled else body)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler


@contextmanager
def hub_running(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Serve `hub`, as HF_ENDPOINT, and let huggingface_hub try again at once."""
    with _serving(_hub_handler(hub)) as hub.address:
        use_endpoint(hub.address, monkeypatch)
        yield


def use_endpoint(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT does, without the pauses between tries."""
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    for name in ("TELEMETRY", "IMPLICIT_TOKEN", "PROGRESS_BARS"):
        monkeypatch.setattr(constants, f"HF_HUB_DISABLE_{name}", True)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that hangs up on an answer it does not want


@contextmanager
def running(site: Site) -> Iterator[None]:
    """Serve `site`; its address is set before."""
    with _serving(_handler(site)) as site.address:
        yield


@contextmanager
def _serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """A server's address, while it answers from a thread."""
    server = _Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
