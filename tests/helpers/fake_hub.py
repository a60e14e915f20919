"""A hub, its cache and a web server, all on this machine, for the tests of weights/fetch.py."""

import hashlib
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from weights.fetch import fetch
from weights.files import WeightsError
from weights.registry import ModelFile

COMMIT = "c0ffee" + "0" * 34
NOW, OLD = "stable-diffusion-v1-5/stable-diffusion-v1-5", "runwayml/stable-diffusion-v1-5"
CONTENT = bytes(range(256)) * 4
NET = ModelFile("unet", "unet/net.safetensors", "me/mine")


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def empty_machine(folder: Path, monkeypatch: pytest.MonkeyPatch, *, sockets: bool) -> None:
    """Empty caches below `folder`, no settings; and, unless `sockets`, every network call fails the test."""
    monkeypatch.setenv("HOME", str(folder / "home"))
    for name in [name for name in os.environ if name == "MSBD_WEIGHTS" or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    if not sockets:
        monkeypatch.setattr(socket, "socket", _refuse)
        monkeypatch.setattr(socket, "getaddrinfo", _refuse)


def _refuse(*_: object, **__: object) -> None:
    raise AssertionError("a network call, where none may be made")


def cache(file: ModelFile, content: bytes = CONTENT, *, links: bool = True, blob: str | None = None,
          repo: str | None = None, revision: str = "main") -> Path:  # fmt: skip
    """Lay `content` out as huggingface_hub would have cached it; the path it would return."""
    root = Path(constants.HF_HUB_CACHE) / f"models--{(repo or str(file.repo)).replace('/', '--')}"
    pointer = root / "snapshots" / COMMIT / file.file
    pointer.parent.mkdir(parents=True, exist_ok=True)
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / revision).write_text(COMMIT)
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


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that hangs up on an answer it does not want


@contextmanager
def running(site: Site) -> Iterator[None]:
    """Serve `site` from a thread; its address is set before."""
    server = _Server(("127.0.0.1", 0), _handler(site))
    site.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
