"""An error of reading, writing or flushing names the file, which the system's own error does not."""

import errno
import io
import os
from pathlib import Path
from typing import Any

import pytest

from msbd.files import naming, whole_file
from tests.helpers.folder_jobs import BICUBIC, EDIT_QUICK, write_masks, write_pictures
from tools import edit
from tools._pictures import FileBytes
from tools.folders.lists import read_list
from tools.folders.manifest import Manifest, Record, hash_of
from tools.restore import __main__ as restore


def fails(*_: Any) -> Any:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_an_error_without_a_name_gets_one_and_one_with_a_name_keeps_it(tmp_path: Path) -> None:
    for named, expected in ((None, "given"), ("other", "other"), (str(tmp_path / ".msbd-7-0.tmp"), "given")):
        with pytest.raises(OSError) as caught, naming(Path("given")):
            raise OSError(errno.EIO, "broken", named)
        assert caught.value.filename == expected
    with pytest.raises(OSError, match="^a sentence of its own$") as caught, naming(Path("given")):
        raise OSError("a sentence of its own")
    assert caught.value.filename is None


@pytest.mark.parametrize("call", ["fsync", "replace", "open"])
def test_a_file_that_cannot_be_written_is_named_as_it_was_given(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to("real")
    plain = getattr(os, call)

    def failing(path: Any, *rest: Any) -> Any:
        if call == "open" and not str(path).endswith(".tmp"):
            return plain(path, *rest)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), None if call == "fsync" else os.fspath(path))

    monkeypatch.setattr(os, call, failing)
    with pytest.raises(OSError) as caught, whole_file(tmp_path / "link") as unfinished:
        unfinished.write_bytes(b"new")
    assert caught.value.filename == str(tmp_path / "link") and caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["link"]


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "msbd.jsonl"
    path.write_text('{"image": "a.png"}\n')

    class Broken(io.FileIO):
        pass

    for name in ("readinto", "readall", "read"):
        setattr(Broken, name, fails)
    monkeypatch.setattr(io, "open", lambda *_, **__: Broken(path))
    for read in (
        hash_of,
        FileBytes,
        lambda _: read_list(path, ("image",)),
        lambda _: Manifest(tmp_path).read(),
    ):
        with pytest.raises(OSError) as caught:
            read(path)
        assert caught.value.filename == str(path)


def test_a_manifest_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", fails)
    manifest = Manifest(tmp_path)
    with pytest.raises(OSError) as caught:
        manifest.add(Record("a.png", "done", "a.png"))
    assert caught.value.filename == str(manifest.path)


def test_a_picture_that_failed_is_told_also_where_the_manifest_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images = write_pictures(tmp_path / "in", ("a.png", "b.png"))
    (images / "a.png").write_bytes(b"no picture")
    monkeypatch.setattr(Manifest, "add", fails)
    assert restore.main(["-i", str(images), "-o", str(tmp_path / "out"), *BICUBIC, "--quiet"]) == 1
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith(f"error: {images / 'a.png'}: not a readable picture") and last.startswith(
        "error: "
    )


def test_masks_in_a_folder_that_cannot_be_read_are_not_called_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("a.png", "sub/b.png")
    images, masks = write_pictures(tmp_path / "in", names), write_masks(tmp_path / "masks", names)
    plain = os.scandir

    def listed(path: Any) -> Any:
        if Path(path) == masks / "sub":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return plain(path)

    monkeypatch.setattr(os, "scandir", listed)
    words = ["-i", str(images), "-m", str(masks), "-o", str(tmp_path / "out"), "--recursive", *EDIT_QUICK]
    assert edit.main([*words, "--dry-run"]) == 1
    error = next(line for line in capsys.readouterr().err.splitlines() if "error: " in line)
    told = f"{images / 'sub/b.png'}: its mask is not found: {masks / 'sub'}: Permission denied"
    assert error == f"2/2 error: {told}"
