"""A registered file on this machine: found where it lies already, else downloaded, and checked before it is
used.

Looks in  the checkout, `$MSBD_WEIGHTS`, ~/.cache/msbd/weights, the Hugging Face cache; without any network
          call
Gets      hub files through huggingface_hub, with its settings (HF_HOME, HF_TOKEN, HF_ENDPOINT,
          HF_HUB_OFFLINE, ...); others by https, size-limited, continued after a break
Copying   this file, registry.py, files.py and pickles.py; huggingface_hub, and torch and safetensors through
          them
"""

import errno
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from http.client import HTTPException, HTTPMessage, HTTPResponse
from pathlib import Path
from typing import IO, Literal
from urllib.error import HTTPError
from urllib.request import HTTPRedirectHandler, Request, build_opener

from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .files import WeightsError, first_line, sha256
from .registry import MINI, RENAMED, Model, ModelFile, current_repo, needed_files

CHUNK = 2**20  # bytes read at a time
TIMEOUT = 30.0  # seconds without an answer
# Parts of other models that an edit can do without: it then ranks or enlarges less well.
OPTIONAL_PARTS = ("clip", "rrdb")

OnProgress = Callable[[int, int], None]  # bytes there, bytes in all


# ---- what is on this machine -------------------------------------------------------------------------------


def local_files(model: Model, optional: Collection[str] = ()) -> dict[str, Path]:
    """Part -> file, of a model and of the parts it needs from others; of these OPTIONAL_PARTS and `optional`
    only if they are there.

    No network call. Raises WeightsError where files are missing, naming the command that gets them and the
    size of the download, and for a file that is there but not of the registered size.
    """
    found = {file: find_local(file) for file in needed_files(model)}
    missing = [file for file, path in found.items() if path is None]
    if any(file in model.files or file.part not in (*OPTIONAL_PARTS, *optional) for file in missing):
        raise WeightsError(_what_to_do(model, missing))
    return {file.part: _of_right_size(path, file) for file, path in found.items() if path is not None}


def find_local(file: ModelFile) -> Path | None:
    """Where the file lies, None if it is not on this machine. No network call; size and content are not
    looked at.

    In the weights folders it lies under its repository's name
    (openai/clip-vit-large-patch14/model.safetensors), or under its bare name where that says what it is: that
    of a whole model, or of a file that is on no hub.
    """
    places = list(_places(file))
    if file.repo is not None:
        for repo in _names(file.repo):
            cached = try_to_load_from_cache(repo, file.file, revision=file.revision)
            if isinstance(cached, str):  # else None, or the mark of a file known not to exist
                places.append(Path(cached))
    return next((path for path in places if path.is_file()), None)


def weights_folder() -> Path:
    """Where downloads that are on no hub are put: `$MSBD_WEIGHTS`, else ~/.cache/msbd/weights."""
    return _folders()[0]


def download_size(files: Iterable[ModelFile]) -> str:
    """What downloading `files` takes, in words: "4.27 GB", "at least 1.89 GB" where some size is not known,
    "size not known".
    """
    sizes = {file: file.size or file.about or 0 for file in files}
    known = sum(sizes.values())
    # The .json and .txt files of a model are a few megabytes at most.
    partly = any(not size and not file.file.endswith((".json", ".txt")) for file, size in sizes.items())
    if not known:
        return "size not known" if partly else "a few MB"
    return f"at least {readable_size(known)}" if partly else readable_size(known)


def readable_size(count: int) -> str:
    """Bytes with a decimal unit: "67 MB", "4.27 GB"."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{max(1, round(count / 1e6))} MB"


def _folders() -> list[Path]:
    own = os.environ.get("MSBD_WEIGHTS")
    usual = Path("~/.cache/msbd/weights").expanduser()
    return [Path(own).expanduser(), usual] if own else [usual]


def _names(repo: str) -> list[str]:
    """Today's name of a repository, and the old ones, under which a cache may still have it."""
    today = current_repo(repo)
    return [today, *(old for old, new in RENAMED.items() if new == today)]


def _places(file: ModelFile) -> Iterator[Path]:
    if file.repo is file.url is file.page is None:
        yield MINI / file.file
        return
    for folder in _folders():
        if file.repo is not None:
            yield from (folder / repo / file.file for repo in _names(file.repo))
        if file.repo is None or file.part == "all":
            yield folder / Path(file.file).name


def _of_right_size(path: Path, file: ModelFile) -> Path:
    found = path.stat().st_size
    if file.size is not None and found != file.size:
        raise WeightsError(
            f"{path}: {found:,} bytes, expected {file.size:,} ({_label(file)}): damaged, or another file; move it away, then fetch again"
        )
    return path


def _label(file: ModelFile) -> str:
    """The file as a message names it."""
    return f"{current_repo(file.repo)}/{file.file}" if file.repo else file.url or file.file


def _what_to_do(model: Model, missing: list[ModelFile]) -> str:
    """Why `local_files` refuses a model."""
    first = missing[0]
    if first.repo is first.url is first.page is None:
        return f"{MINI / first.file}: missing, though it is part of the checkout; restore it with `git checkout weights/mini`"
    others = f"and what else it needs ({len(missing)} files) are" if len(missing) > 1 else "is"
    ways = [
        f"get {file.file} by hand from {file.page} into {weights_folder()}" for file in missing if file.page
    ]
    direct = [file for file in missing if file.page is None]
    if direct:
        ways.append(f"run `python -m tools.models fetch {model.name}` ({download_size(direct)})")
    return f"{model.name}: {_label(first)} {others} not on this machine; {', and '.join(ways)}"


# ---- is it the right file? ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """What hashing a file gave."""

    path: Path
    state: Literal["ok", "unknown", "wrong"]  # unknown: there is nothing to compare with
    size: int  # bytes found
    sha256: str  # found
    expected: str | None  # a sha256; where the size tells already, the size in words
    source: str | None  # who expects it

    def __str__(self) -> str:
        if self.state == "unknown":
            return f"{self.path}: unknown hash: sha256 {self.sha256}, {self.size:,} bytes, nothing to compare with"
        if self.state == "ok":
            return f"{self.path}: ok: sha256 as {self.source} has it"
        return f"{self.path}: wrong file: found sha256 {self.sha256} ({self.size:,} bytes), {self.source} expects {self.expected}"


def verify(path: Path, file: ModelFile, found: str | None = None) -> Check:
    """Hash the file and compare it with the registry, or else with the name that the Hugging Face cache gave
    its content.

    That name is the sha256 for large files (weights), as the hub stated it when the file was downloaded.
    Takes about two seconds a gigabyte, none where `found`, the file's sha256, is known already.
    """
    size, found = path.stat().st_size, found or sha256(path)
    blob = _blob(path)
    if file.size is not None and size != file.size:
        return Check(path, "wrong", size, found, f"{file.size:,} bytes", "the registry")
    if file.sha256 is not None:
        expected, source = file.sha256, "the registry"
    elif blob is not None and re.fullmatch("[0-9a-f]{64}", blob.name):
        expected, source = blob.name, "the Hugging Face hub"
    else:
        return Check(path, "unknown", size, found, None, None)
    return Check(path, "ok" if found == expected else "wrong", size, found, expected, source)


def _blob(path: Path) -> Path | None:
    """The file that a link in the Hugging Face cache points to. Only one step: that itself may be a link into
    a shared store.
    """
    if not path.is_symlink():
        return None
    blob = path.parent / path.readlink()
    return blob if blob.parent.name == "blobs" else None


def _keep_only_right(path: Path, file: ModelFile) -> None:
    """Delete what was just downloaded, and raise WeightsError, if it is not the registered file."""
    check = verify(path, file)
    if check.state != "wrong":
        return
    blob = _blob(path)
    path.unlink()
    if blob is not None:
        blob.unlink(missing_ok=True)
    raise WeightsError(
        f"{_label(file)}: found sha256 {check.sha256} ({check.size:,} bytes), {check.source} expects {check.expected}; "
        "deleted it: damaged on its way, or not the file known here; fetch again"
    )


# ---- getting it --------------------------------------------------------------------------------------------


def fetch(file: ModelFile, *, on_progress: OnProgress | None = None) -> Path:
    """The file on this machine, downloaded if need be. One that is there already costs no network call.

    `on_progress(bytes_there, bytes_in_all)` follows a download by url; huggingface_hub shows its own bar for
    the others. Whatever was downloaded is hashed: what the registry or the hub does not confirm is deleted.
    Raises WeightsError, one line with the way out, for that, and where there is no network, access, space, or
    direct download.
    """
    path = find_local(file)
    if path is not None:
        return _of_right_size(path, file)
    folder = weights_folder()
    if file.page is not None:
        raise WeightsError(
            f"{file.file}: to be downloaded by hand, from {file.page}; put it into {folder} under that name"
        )
    if file.repo is file.url is None:
        raise WeightsError(
            f"{MINI / file.file}: part of the checkout; `git checkout weights/mini` restores it"
        )
    if constants.HF_HUB_OFFLINE:
        raise WeightsError(
            f"{_label(file)}: not on this machine, and HF_HUB_OFFLINE forbids to get it; unset it, or put the file at {next(_places(file))}"
        )
    if file.repo is not None:
        return _from_hub(file, file.repo)
    return _from_url(file, folder, on_progress or (lambda *_: None))


def _check_space(folder: Path, need: int, file: ModelFile, variable: str) -> None:
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < need:
        raise WeightsError(
            f"{_label(file)}: {readable_size(need)} to download, but {folder} has {readable_size(free)} free; make room, "
            f"or set {variable} to a folder on another disk"
        )


def _from_hub(file: ModelFile, repo: str) -> Path:
    _check_space(Path(constants.HF_HUB_CACHE), file.size or file.about or 0, file, "HF_HOME")
    try:
        path = Path(hf_hub_download(current_repo(repo), file.file, revision=file.revision))
    except Exception as error:
        # Bare, because its HTTP library, whose errors reach us, is another one in every major release.
        raise WeightsError(
            f"{_label(file)}: {_hub_reason(error, current_repo(repo), next(_places(file)))}"
        ) from error
    _keep_only_right(path, file)
    return path


def _hub_reason(error: Exception, repo: str, place: Path) -> str:
    """What went wrong at the hub, and the way out; `place` is where a file got by other means is found."""
    page = f"{constants.ENDPOINT}/{repo}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, GatedRepoError):
        return f"its licence must be accepted first, at {page}; then make an access token there and set HF_TOKEN to it"
    if isinstance(error, LocalEntryNotFoundError):  # what the library makes of a failed connection
        return f"{constants.ENDPOINT} cannot be reached; check the connection, or set HF_ENDPOINT to a mirror"
    if isinstance(error, RevisionNotFoundError | EntryNotFoundError):
        return f"no such file there, see {page}; get it elsewhere, and put it at {place}"
    if isinstance(error, RepositoryNotFoundError) or status in (401, 403):
        return f"refused, {status or 'no such repository'}; see {page} with your browser, and set HF_TOKEN if it needs a log-in"
    return _transport_reason(error)


def _transport_reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "the disk is full; make room, then fetch again"
    return f"the download failed ({first_line(error)}); check the connection, then fetch again"


def _from_url(file: ModelFile, folder: Path, on_progress: OnProgress) -> Path:
    """Download to FILE.part, check that, then rename it. A part that is there is continued."""
    target = folder / file.file
    part = target.with_name(f"{target.name}.part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _complete(part, file, on_progress)
        _keep_only_right(part, file)
        os.replace(part, target)  # not `whole_file`: a part that is there is continued
    except HTTPError as error:
        if error.code == 416:  # the part is longer than what the server has: nothing to continue
            part.unlink(missing_ok=True)
        raise WeightsError(
            f"{file.url}: {first_line(error)}; fetch again later, or with your browser, and put it at {target}"
        ) from error
    except (OSError, HTTPException) as error:
        raise WeightsError(f"{file.url}: {_transport_reason(error)}") from error
    return target


def _complete(part: Path, file: ModelFile, on_progress: OnProgress) -> None:
    """Download what `part` lacks of the registered size."""
    assert file.url is not None and file.size is not None, "ModelFile sees to it"
    done = part.stat().st_size if part.is_file() else 0
    if done == file.size:
        return
    if done > file.size:
        done = 0
    _check_space(part.parent, file.size - done, file, "MSBD_WEIGHTS")
    with _open(file.url, done) as response:
        done = _starts_at(response, file.url, done)
        with open(part, "ab" if done else "wb") as out:
            while done <= file.size and (chunk := response.read(CHUNK)):
                out.write(chunk)
                done += len(chunk)
                on_progress(min(done, file.size), file.size)
    if done > file.size:
        part.unlink()
        raise WeightsError(
            f"{file.url}: more than the expected {file.size:,} bytes came; this is another file"
        )
    if done < file.size:
        raise WeightsError(
            f"{file.url}: broken off at {done:,} of {file.size:,} bytes; fetch again to continue there"
        )


def _starts_at(response: HTTPResponse, url: str, asked: int) -> int:
    """The byte that the answer begins with: `asked`, or 0 where the server sends the whole file."""
    if response.headers.get_content_type() == "text/html":
        raise WeightsError(f"{url}: answered with a web page (log-in, licence or error), not with the file")
    if asked and response.status == 206:
        given = response.headers.get("Content-Range", "")
        if not given.startswith(f"bytes {asked}-"):
            raise WeightsError(
                f"{url}: asked for the bytes from {asked:,} on, and given {given!r}; fetch again later"
            )
        return asked
    return 0


def _open(url: str, start: int) -> HTTPResponse:
    _check_scheme(url)
    request = Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    return build_opener(_SafeRedirects).open(request, timeout=TIMEOUT)


def _check_scheme(url: str) -> None:
    if not url.startswith("https://"):
        raise WeightsError(f"{url}: expected an https address")


class _SafeRedirects(HTTPRedirectHandler):
    """Follows no redirect that leaves https."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        _check_scheme(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)
