"""The Hugging Face hub: where its cache has a registered file, and getting one, its refusals in plain words.

Gets      through huggingface_hub, with its settings (HF_HOME, HF_TOKEN, HF_ENDPOINT, ...)
Copying   this file, registry.py, files.py and pickles.py; huggingface_hub, and torch and safetensors through
          them
"""

import errno
import re
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import (
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from .files import WeightsError, first_line
from .registry import RENAMED, ModelFile, current_repo

_SHA256 = re.compile("[0-9a-f]{64}")


def repo_names(repo: str) -> list[str]:
    """Today's name of a repository, and the old ones, under which a cache may still have it."""
    today = current_repo(repo)
    return [today, *(old for old, new in RENAMED.items() if new == today)]


def cached(file: ModelFile, repo: str) -> Iterator[Path]:
    """Where the cache may have a file of `repo`: in the snapshot of its revision, in that of main, then in
    any other, the newest first. No network call.

    A file that the hub named by another sha256 than the registered one is left out: it is another file.
    """
    for name in repo_names(repo):
        known = [_in_snapshot(name, file.file, at) for at in (file.revision, None)]
        paths = [path for path in known if path is not None]
        snapshots = Path(constants.HF_HUB_CACHE, f"models--{name.replace('/', '--')}", "snapshots")
        folders = snapshots.iterdir() if snapshots.is_dir() else ()
        paths += [folder / file.file for folder in sorted(folders, key=_age)]
        yield from (path for path in paths if not _is_another(stated_sha256(path), file))


def _in_snapshot(repo: str, name: str, revision: str | None) -> Path | None:
    """Where the cache has a file of a revision, None for main; None if it has not, or what it says of the
    revision is no commit.
    """
    try:
        path = try_to_load_from_cache(repo, name, revision=revision)
    except (OSError, ValueError):  # ValueError covers bytes that are no text
        return None
    return Path(path) if isinstance(path, str) else None  # else a file known not to exist


def _is_another(stated: str | None, file: ModelFile) -> bool:
    """Whether a sha256 that the hub stated tells another file than the registered one."""
    return stated is not None and file.sha256 is not None and stated != file.sha256


def _age(folder: Path) -> float:
    return -folder.stat().st_mtime


def blob_of(path: Path) -> Path | None:
    """The file that a link in the cache points to. Only one step: that itself may be a link into a shared
    store.
    """
    if not path.is_symlink():
        return None
    blob = path.parent / path.readlink()
    return blob if blob.parent.name == "blobs" else None


def stated_sha256(path: Path) -> str | None:
    """The sha256 that the hub stated when it gave this file of the cache; it does so for large ones."""
    blob = blob_of(path)
    return blob.name if blob is not None and _SHA256.fullmatch(blob.name) else None


def download(file: ModelFile, repo: str, place: Path) -> Path:
    """The file, and the one that belongs beside it, in the cache; what is there already is not loaded again.

    Raises WeightsError, one line with the way out, for all that can go wrong, and before anything is loaded
    where the hub has another file than the registered one. `place` is where a file got by other means is
    found.
    """
    repo = current_repo(repo)
    try:
        stated = _etag(file, repo)
        if _is_another(stated, file):
            raise WeightsError(
                f"{file.label}: the hub now has another file (sha256 {stated}) than the one known here ({file.sha256}); "
                f"if you have that one, put it at {place}"
            )
        path = Path(hf_hub_download(repo, file.file, revision=file.revision))
        if file.beside is not None:  # of the same snapshot, though main may have moved on
            snapshot = path.parents[len(Path(file.file).parts) - 1]
            hf_hub_download(repo, file.beside.file, revision=snapshot.name)
        return path
    except WeightsError:
        raise
    except Exception as error:
        # Bare, because its HTTP library, whose errors reach us, is another one in every major release.
        raise WeightsError(f"{file.label}: {_reason(error, repo, place)}") from error


def _etag(file: ModelFile, repo: str) -> str | None:
    """The sha256 of what the hub would give; None where it states none, or cannot be asked."""
    if file.sha256 is None:
        return None
    try:
        etag = get_hf_file_metadata(hf_hub_url(repo, file.file, revision=file.revision)).etag
    except Exception:  # the download meets it again, after a few tries, and tells it
        return None
    return etag if etag and _SHA256.fullmatch(etag) else None


def _reason(error: Exception, repo: str, place: Path) -> str:
    """What went wrong at the hub, and the way out."""
    page, status = f"{constants.ENDPOINT}/{repo}", _status(error)
    if isinstance(error, GatedRepoError):
        return f"its licence must be accepted first, at {page}; then make an access token there and set HF_TOKEN to it"
    if status == 429:
        return (
            f"HTTP 429, too many requests without a token: wait some minutes, or set HF_TOKEN to an access token of "
            f"{constants.ENDPOINT}/settings/tokens"
        )
    if status in (401, 403) or isinstance(error, RepositoryNotFoundError):
        return f"refused, {status or 'no such repository'}; see {page} with your browser, and set HF_TOKEN if it needs a log-in"
    if status is not None and status >= 500:
        return f"HTTP {status}, {constants.ENDPOINT} itself fails; try later, or set HF_ENDPOINT to a mirror"
    if isinstance(error, LocalEntryNotFoundError) and status is None:  # what failed is its cause
        if isinstance(error.__cause__, FileMetadataError):
            return f"{constants.ENDPOINT} does not answer as a hub does; check HF_ENDPOINT and your proxy"
        return f"{constants.ENDPOINT} cannot be reached; check the connection, or set HF_ENDPOINT to a mirror"
    if isinstance(error, EntryNotFoundError) or status == 404:
        return f"no such file there, see {page}; get it elsewhere, and put it at {place}"
    return transport_reason(error)


def _status(error: BaseException | None) -> int | None:
    """The HTTP status behind an error of huggingface_hub, which hides most behind "not in the cache"."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            return status
        error = error.__cause__
    return None


def transport_reason(error: Exception) -> str:
    """Why a download broke off, and the way out."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "the disk is full; make room, then fetch again"
    return f"the download failed ({first_line(error)}); check the connection, then fetch again"
