"""Folders and lists of pictures in both tools: what is found, where results go, what the manifest says."""

import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import msbd.load
from msbd.pixels import files
from tests.helpers.fill_pipeline import FillEditor, FillRestorer
from tools import edit
from tools._cli import prepare_console
from tools.folders.lists import read_list
from tools.folders.manifest import Manifest
from tools.folders.tasks import seed_of
from tools.restore.__main__ import main as restore

ROOT = Path(__file__).parents[2]
SIZE = (16, 24)  # (H, W) of the pictures


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def editor(monkeypatch: pytest.MonkeyPatch) -> FillEditor:
    """What every edit is done by."""
    editor = FillEditor()
    monkeypatch.setattr(msbd.load, "load_edit_pipeline", lambda *_, **__: editor)
    return editor


def write_picture(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    formats = {".jfif": "JPEG", ".jpe": "JPEG"}
    Image.fromarray(pixels).save(path, format=formats.get(path.suffix.lower()))
    return path


def write_mask(path: Path, columns: int = 8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = np.zeros(SIZE, np.uint8)
    mask[:, :columns] = 255
    Image.fromarray(mask).save(path)
    return path


def enlarge(folder: Path, *more: str) -> list[str]:
    """A command that enlarges `folder`/album without nets."""
    return ["-i", f"{folder}/album", "-o", f"{folder}/out", "--method", "bicubic", "--scale", "2", *more]


def repaint(folder: Path, *more: str) -> list[str]:
    paths = ["-i", f"{folder}/album", "-o", f"{folder}/out", "--model", "mini", "--preset", "fast"]
    return [*paths, "-p", "a red ball", *more]


def below(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, but for manifests."""
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".jsonl")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def records(folder: Path) -> dict[str, dict[str, Any]]:
    return {name: vars(record) for name, record in Manifest(folder).read().items()}


# ---- what is found -----------------------------------------------------------------------------------------


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """An album with all that albums hold."""
    album = tmp_path / "album"
    for number, name in enumerate(("a.jpg", "a.png", "x.JPG", "photo.jfif", "photo2.jpe", "图片.png")):
        write_picture(album / name, number)
    write_picture(album / "sub/b.png", 7)
    write_picture(album / "sub/deeper/c.webp", 8)
    write_picture(album / ".hidden.png")
    for name in ("._a.jpg", "desktop.ini", "Thumbs.db", "one.cr2", "two.CR2", "film.mov", "README"):
        (album / name).write_bytes(b"\0\5\26\7")
    (album / "broken.png").symlink_to("nowhere.png")
    (album / "again").symlink_to(".")
    os.mkfifo(album / "pipe.png")
    return tmp_path


def test_every_entry_is_accounted_for(mixed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert restore(enlarge(mixed)) == 0
    out, err = capsys.readouterr()
    assert err == (
        f"note: {mixed}/album: left out: 2 folders, 4 files (.cr2 2, no suffix, .mov), 1 broken link, 1 special file\n"
    )
    names = ["a.jpg.png", "a.png.png", "photo.png", "photo2.png", "x.png", "图片.png"]
    assert sorted(below(mixed / "out")) == names
    assert [line.split("/")[0] for line in out.splitlines()] == list("123456")


def test_recursive_keeps_the_tree_and_follows_no_links(
    mixed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert restore(enlarge(mixed, "--recursive", "--compare", f"{mixed}/looks")) == 0
    assert "left out: 1 folder, 4 files" in capsys.readouterr().err
    assert {"sub/b.png", "sub/deeper/c.png"} < below(mixed / "out").keys()
    assert {"sub/b.jpg", "sub/deeper/c.jpg", "a.jpg.jpg"} < below(mixed / "looks").keys()
    assert len(below(mixed / "out")) == len(below(mixed / "looks")) == 8


def test_an_album_of_folders_alone_is_told_of_recursive(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_picture(tmp_path / "album/sub/a.png")
    assert restore(enlarge(tmp_path)) == 1
    err = capsys.readouterr().err
    assert "no pictures there" in err and "left out: 1 folder; --recursive reads its folders too" in err
    assert not (tmp_path / "out").exists()


def test_results_may_lie_in_the_album(tmp_path: Path) -> None:
    write_picture(tmp_path / "album/a.png")
    job = [*enlarge(tmp_path, "--recursive"), "-o", f"{tmp_path}/album/large"]
    for _ in range(2):
        assert restore(job) == 0
        assert below(tmp_path / "album").keys() == {"a.png", "large/a.png"}


def test_of_an_animation_the_first_frame_is_taken_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frames = [Image.new("RGB", SIZE, colour) for colour in ("red", "blue")]
    write_picture(tmp_path / "album/a.png")
    frames[0].save(tmp_path / "album/b.webp", save_all=True, append_images=frames[1:], lossless=True)
    assert restore(enlarge(tmp_path)) == 0
    (note,) = capsys.readouterr().err.splitlines()
    assert note.startswith(f"note: {tmp_path}/album/b.webp: ") and "frame" in note
    assert np.array(Image.open(tmp_path / "out/b.png"))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    "asked, suffixes", [("jpg", [".jpg"] * 3), ("tif", [".tif"] * 3), ("same", [".jpg", ".png", ".webp"])]
)
def test_the_format_of_results_is_asked_for(asked: str, suffixes: list[str], tmp_path: Path) -> None:
    for name in ("a.jpg", "b.png", "c.webp"):
        write_picture(tmp_path / "album" / name)
    assert restore(enlarge(tmp_path, "--format", asked)) == 0
    assert [Path(name).suffix for name in below(tmp_path / "out")] == suffixes
    kinds = {"jpg": "JPEG", "png": "PNG", "tif": "TIFF", "webp": "WEBP"}
    for path in (tmp_path / "out").glob("?.*"):
        assert Image.open(path).format == kinds[path.suffix[1:]]


# ---- masks -------------------------------------------------------------------------------------------------


def edited_columns(folder: Path, name: str) -> int:
    """How many columns of a picture an edit changed."""
    before, after = (
        np.array(Image.open(path).convert("RGB"))
        for path in (folder / "album" / name, folder / "out" / f"{Path(name).with_suffix('.png')}")
    )
    return int((before != after).any(axis=(0, 2)).sum())


def test_masks_are_found_by_their_pictures_names(
    tmp_path: Path, editor: FillEditor, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, name in enumerate(("a.png", "b.jpg", "c.png", "d.png", "sub/a.png")):
        write_picture(tmp_path / "album" / name, number)
    for columns, name in (
        (4, "a.png"),
        (12, "b.png"),
        (9, "d.webp"),
        (9, "d.tif"),
        (16, "sub/a.webp"),
        (1, "e.png"),
    ):
        write_mask(tmp_path / "masks" / name, columns)  # fmt: skip
    assert edit.main(repaint(tmp_path, "-m", f"{tmp_path}/masks", "--recursive")) == 1
    out, err = capsys.readouterr()
    assert f"note: {tmp_path}/masks: e.png of no picture" in err
    assert f"error: {tmp_path}/album/c.png: no mask of that name in {tmp_path}/masks" in err
    assert f"error: {tmp_path}/album/d.png: 2 masks (d.tif, d.webp) of that name" in err
    assert err.endswith("error: 2 of 5 pictures failed; see above\n") and len(out.splitlines()) == 5
    assert [edited_columns(tmp_path, name) for name in ("a.png", "b.jpg", "sub/a.png")] == [4, 12, 16]


def test_one_mask_is_for_all_pictures(tmp_path: Path, editor: FillEditor) -> None:
    for number in range(3):
        write_picture(tmp_path / f"album/{number}.png", number)
    mask = write_mask(tmp_path / "album/mask.png", 5)  # in the folder of the pictures, but none of them
    assert edit.main(repaint(tmp_path, "-m", str(mask))) == 0
    assert below(tmp_path / "out").keys() == {"0.png", "1.png", "2.png"}
    assert [edited_columns(tmp_path, f"{number}.png") for number in range(3)] == [5, 5, 5]


def test_what_else_is_written_goes_into_folders(tmp_path: Path, editor: FillEditor) -> None:
    for name in ("a.png", "sub/b.jpg"):
        write_picture(tmp_path / "album" / name)
    mask = write_mask(tmp_path / "mask.png")
    more = [f"--{what}={tmp_path}/{what}" for what in ("compare", "candidates", "stages")]
    editor.pictures = ("first stage, result",)
    assert edit.main(repaint(tmp_path, "-m", str(mask), "--recursive", *more)) == 0
    for what in ("compare", "candidates"):
        assert below(tmp_path / what).keys() == {"a.jpg", "sub/b.jpg"}
    stages = {f"{name}/01-first-stage-result.png" for name in ("a", "sub/b")}
    assert below(tmp_path / "stages").keys() == stages


# ---- lists -------------------------------------------------------------------------------------------------


def test_a_list_says_of_each_picture_what_is_to_be_done(tmp_path: Path, editor: FillEditor) -> None:
    for number, name in enumerate(("a.png", "b.png")):
        write_picture(tmp_path / "album" / name, number)
    write_mask(tmp_path / "album/m.png", 3)
    rows = [
        {"image": "a.png", "mask": "m.png", "prompt": "a, red ball", "seed": 7, "output": "first.png"},
        {"image": "a.png", "mask": "m.png", "output": "second/x.jpg"},
        {"image": "b.png", "mask": "m.png", "margin": 1.5},
    ]
    columns = ("image", "mask", "prompt", "seed", "margin", "output")
    lines = [";".join(str(row.get(name, "")) for name in columns) for row in rows]
    lists = {
        "rows.jsonl": "\n".join(map(json.dumps, rows)),
        "rows.csv": "\ufeff" + "\r\n".join([";".join(columns), *lines]),
    }
    results = []
    for name, text in lists.items():
        (tmp_path / name).write_text(text, encoding="utf-8", newline="")
        editor.seeds.clear()
        job = [*repaint(tmp_path, "--jobs", f"{tmp_path}/{name}"), "-o", f"{tmp_path}/{name}.out"]
        assert edit.main(job) == 0
        assert editor.seeds == [7, seed_of(0, "second/x.jpg"), seed_of(0, "b.png")]
        results.append(below(tmp_path / f"{name}.out"))
    assert results[0].keys() == {"first.png", "second/x.jpg", "b.png"} and results[0] == results[1]
    told = [
        json.loads(Image.open(io.BytesIO(results[0][name])).info["msbd"]) for name in ("first.png", "b.png")
    ]
    assert [facts["prompt"] for facts in told] == ["a, red ball", "a red ball"]
    assert [facts["margin"] for facts in told][1] == 1.5


@pytest.mark.parametrize(
    "text, reason",
    [
        ("", "no pictures in this list"),
        ("image,prompt\n", "no pictures in this list"),
        ("picture\na.png", "line 2: no column is called 'picture'"),
        ("image,prompt\n\n,x", "line 3: no image"),
        ("image,prompt\na.png,x,y", "line 2: 3 cells, of 2 columns"),
        ('image,prompt\na.png,"x', "line 2: not CSV"),
        ("image,seed\na.png,7.5", "line 2: seed is '7.5'; expected a number"),
        ('{"image": "a.png"}\n{"image": ["a"]}', 'line 2: image is ["a"]; expected a word'),
        ('{"image": "a.png"}\n{"image"', "line 2: not JSON"),
        ('{"image": "a.png", "prompt": "\\ud800"}', "line 1: prompt holds '\\ud800'"),
        ("image\na\0.png", "line 2: image holds '\\x00'"),
    ],
)
def test_a_list_that_cannot_be_followed_is_refused_by_line(text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "list").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError) as raised:
        read_list(tmp_path / "list", ("image", "prompt", "seed"))
    assert f"{tmp_path}/list" in str(raised.value) and reason in str(raised.value)


@pytest.mark.parametrize(
    "rows, reason",
    [
        (["a.png", "a.png"], "would be the result of both a.png and a.png; give each an `output` of its own"),
        (["a.png", "b.png;../c.png"], "line 3: the output ../c.png is not below --output"),
        (["a.png;c.bmp"], "c.bmp: cannot write pictures of type '.bmp'"),
    ],
)
def test_results_of_a_list_never_meet(
    rows: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.png", "b.png"):
        write_picture(tmp_path / "album" / name)
    (tmp_path / "list.csv").write_text("\n".join(["image;output", *rows]))
    assert restore(enlarge(tmp_path, "--jobs", f"{tmp_path}/list.csv")) == 1
    assert reason in capsys.readouterr().err and not (tmp_path / "out").exists()


# ---- the manifest ------------------------------------------------------------------------------------------


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_the_manifest_says_what_became_of_every_picture(tmp_path: Path, editor: FillEditor) -> None:
    write_picture(tmp_path / "album/a.png")
    (tmp_path / "album/b.png").write_bytes(b"no picture")
    mask = write_mask(tmp_path / "mask.png")
    assert edit.main(repaint(tmp_path, "-m", str(mask), "--seed", "5")) == 1
    found = records(tmp_path / "out")
    assert list(found) == ["a.png", "b.png"]
    a, b = found.values()
    assert (a["status"], b["status"]) == ("done", "failed") and a["error"] is None
    assert a["input_hash"] == digest((tmp_path / "album/a.png").read_bytes())
    assert a["mask_hash"] == digest(mask.read_bytes())
    assert a["output_hash"] == digest((tmp_path / "out/a.png").read_bytes())
    assert a["seed"] == seed_of(5, "a.png") == editor.seeds[0] and a["seconds"] > 0
    assert len(a["settings_hash"]) == 16 and "b.png: not a readable picture" in b["error"]


def change_input(folder: Path) -> None:
    write_picture(folder / "album/b.png", 99)


def change_result(folder: Path) -> None:
    data = bytearray((folder / "out/b.png").read_bytes())
    data[-20] ^= 1
    (folder / "out/b.png").write_bytes(data)


def cut_manifest(folder: Path) -> None:
    path = folder / "out/msbd.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:-30] + b"\n" + lines[2])


def touch(folder: Path) -> None:
    os.utime(folder / "album/b.png", (1, 1))
    os.utime(folder / "out/b.png", (1, 1))


@pytest.mark.parametrize(
    "change, remade",
    [
        (lambda _: None, []),
        (touch, []),
        (change_input, ["b.png"]),
        (change_result, ["b.png"]),
        (lambda folder: (folder / "out/b.png").unlink(), ["b.png"]),
        (lambda folder: (folder / "looks/b.jpg").unlink(), ["b.png"]),
        (cut_manifest, ["b.png"]),
        (lambda folder: (folder / "out/msbd.jsonl").unlink(), ["a.png", "b.png", "c.png"]),
    ],
)
def test_resume_makes_what_does_not_hold_any_more(
    change: Callable[[Path], object], remade: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, name in enumerate(("a.png", "b.png", "c.png")):
        write_picture(tmp_path / "album" / name, number)
    job = enlarge(tmp_path, "--compare", f"{tmp_path}/looks")
    assert restore(job) == 0
    change(tmp_path)
    capsys.readouterr()
    assert restore([*job, "--resume"]) == 0
    out, err = capsys.readouterr()
    lines = [line for line in out.splitlines() if "are there already" not in line]
    assert [Path(line.split()[1].rstrip(":")).name for line in lines] == remade
    assert ("1 lines of the manifest are cut off" in err) == (change is cut_manifest)
    resumed = below(tmp_path / "out")
    assert restore(job) == 0 and below(tmp_path / "out") == resumed
    assert all(record["status"] == "done" for record in records(tmp_path / "out").values())


@pytest.mark.parametrize("more", [["--scale", "3"], ["--no-metadata"], ["--strip-metadata"]])
def test_resume_makes_anew_what_was_made_by_other_settings(more: list[str], tmp_path: Path) -> None:
    write_picture(tmp_path / "album/a.png")
    assert restore(enlarge(tmp_path)) == 0
    assert restore(enlarge(tmp_path, *more, "--resume")) == 0
    resumed = below(tmp_path / "out")
    assert restore(enlarge(tmp_path, *more)) == 0 and below(tmp_path / "out") == resumed


def test_resume_tries_failed_pictures_again(tmp_path: Path) -> None:
    write_picture(tmp_path / "album/a.png")
    (tmp_path / "album/b.png").write_bytes(b"no picture")
    assert restore(enlarge(tmp_path)) == 1
    write_picture(tmp_path / "album/b.png")
    assert restore(enlarge(tmp_path, "--resume")) == 0
    assert [record["status"] for record in records(tmp_path / "out").values()] == ["done", "done"]


def test_a_seed_is_drawn_from_the_pictures_path_alone(tmp_path: Path, editor: FillEditor) -> None:
    for name in ("a.png", "b.png", "sub/a.png"):
        write_picture(tmp_path / "album" / name)
    mask = write_mask(tmp_path / "mask.png")
    job = repaint(tmp_path, "-m", str(mask), "--recursive", "--seed", "3")
    assert edit.main(job) == 0
    seeds = dict(zip(("a.png", "b.png", "sub/a.png"), editor.seeds, strict=True))
    assert len(set(seeds.values())) == 3 and seeds == {name: seed_of(3, name) for name in seeds}
    all_of_them = below(tmp_path / "out")
    (tmp_path / "album/a.png").unlink()
    (tmp_path / "out").rename(tmp_path / "before")
    assert edit.main(job) == 0
    assert below(tmp_path / "out") == {name: data for name, data in all_of_them.items() if name != "a.png"}


def test_shards_make_all_pictures_once(tmp_path: Path) -> None:
    for number in range(7):
        write_picture(tmp_path / f"album/{number}.png", number)
    assert restore(enlarge(tmp_path)) == 0
    whole = below(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "whole")
    for part in (2, 3, 1):
        before = below(tmp_path / "out").keys()
        assert restore(enlarge(tmp_path, "--shard", f"{part}/3")) == 0
        assert len(below(tmp_path / "out").keys() - before) == (3 if part == 1 else 2)
    assert below(tmp_path / "out") == whole
    assert sorted(path.name for path in (tmp_path / "out").glob("*.jsonl")) == [
        f"msbd-{part}-of-3.jsonl" for part in (1, 2, 3)
    ]
    assert records(tmp_path / "out").keys() == whole.keys()


def test_resume_after_shards_makes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(3):
        write_picture(tmp_path / f"album/{number}.png", number)
    for part in (1, 2):
        assert restore(enlarge(tmp_path, "--shard", f"{part}/2")) == 0
    capsys.readouterr()
    assert restore(enlarge(tmp_path, "--resume")) == 0
    assert capsys.readouterr().out == "3 of 3 pictures are there already\n"


# ---- what is said ------------------------------------------------------------------------------------------


def damage(path: Path, kind: int) -> None:
    data = path.read_bytes()
    path.write_bytes((b"", data[:60], b"GIF89a nothing", b"\0" * 100, data[:33] + data[40:])[kind % 5])


def resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_20_damaged_pictures_of_200_are_listed_and_memory_stays_flat(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(4)
    names = [
        f"{'/'.join(chance.sample('abc', chance.randrange(3)))}/{number:03}.png".lstrip("/")
        for number in range(200)
    ]
    for number, name in enumerate(names):
        write_picture(tmp_path / "album" / name, number)
    damaged = sorted(chance.sample(names, 20))
    for kind, name in enumerate(damaged):
        damage(tmp_path / "album" / name, kind)
    memory: list[int] = []
    add = Manifest.add
    monkeypatch.setattr(Manifest, "add", lambda *args: (add(*args), memory.append(resident())))
    assert restore(enlarge(tmp_path, "--recursive")) == 1
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert lines[-1] == "error: 20 of 200 pictures failed; see above" and len(lines) == 21
    named = [next(name for name in damaged if f"{tmp_path}/album/{name}: " in line) for line in lines[:-1]]
    assert sorted(named) == damaged and all(line.startswith("error: ") for line in lines)
    assert len(out.splitlines()) == 200 and sum(" failed: " in line for line in out.splitlines()) == 20
    found = records(tmp_path / "out")
    assert sorted(name for name, record in found.items() if record["status"] == "failed") == damaged
    assert below(tmp_path / "out").keys() == set(names) - set(damaged) and len(found) == 200
    assert memory[-1] - memory[50] < 8 * 2**20


def test_a_note_on_a_picture_of_many_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python's warnings too, each once."""

    class Warning(FillRestorer):
        def __call__(self, *args: Any, **options: Any) -> Any:
            for _ in range(2):
                warnings.warn("one\nthing", stacklevel=1)
            return super().__call__(*args, **options)

    monkeypatch.setattr(msbd.load, "load_restore_pipeline", lambda *_, **__: Warning())
    for name in ("a.png", "b.png"):
        write_picture(tmp_path / "album" / name)
    assert restore(enlarge(tmp_path)) == 0
    assert capsys.readouterr().err == "note: a.png: one thing\nnote: b.png: one thing\n"
    assert restore([*enlarge(tmp_path), "-i", f"{tmp_path}/album/a.png", "-o", f"{tmp_path}/a.png"]) == 0
    assert capsys.readouterr().err == "note: one thing\n"


def test_lines_come_at_once_and_what_a_console_cannot_show_is_escaped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="cp1252"))
    prepare_console()
    print("图 \udce9 é")  # noqa: T201
    assert shown.getvalue() == b"\\u56fe \\udce9 \xe9\n"


def test_a_redirected_log_is_alive_and_sigterm_ends_a_run_that_resume_completes(tmp_path: Path) -> None:
    for number in range(300):
        write_picture(tmp_path / f"album/图{number:03}.png", number)
    words = [sys.executable, "-m", "tools.restore", *enlarge(tmp_path)]
    surroundings = {**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONPATH": str(ROOT)}
    with (tmp_path / "log").open("wb") as log:
        run = subprocess.Popen(words, stdout=log, stderr=subprocess.PIPE, cwd=ROOT, env=surroundings)
        while run.poll() is None and (tmp_path / "log").stat().st_size == 0:
            time.sleep(0.01)
        run.send_signal(signal.SIGTERM)
        err = run.communicate(timeout=30)[1].decode()
    lines = (tmp_path / "log").read_text("cp1252").splitlines()
    assert 0 < len(lines) < 300 and lines[0].startswith(f"1/300 {tmp_path}/out/\\u56fe000.png: ")
    assert run.returncode == 143
    told, tail = err.split(" ", 1)
    assert tail == "of 300 pictures tried; --resume goes on from there\nended from outside\n"
    # The end may have come between a picture's record and its line.
    assert len(lines) <= int(told) <= len(records(tmp_path / "out")) <= len(lines) + 1
    assert restore(enlarge(tmp_path, "--resume")) == 0
    assert len(below(tmp_path / "out")) == 300


def test_options_for_many_are_noted_for_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_picture(tmp_path / "a.png")
    job = ["-i", f"{tmp_path}/a.png", "-o", f"{tmp_path}/b.png", "--method", "bicubic"]
    assert restore([*job, "--resume", "--format", "jpg", "--workers", "2"]) == 0
    note = "note: --format, --resume, --workers: not used for one picture, but for folders and lists\n"
    assert capsys.readouterr().err == note
    assert restore([*job, "--skip-existing"]) == 0 and capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "more, reason",
    [
        (["--workers", "2", "--ray"], "--ray: not allowed with argument --workers"),
        (["--workers", "0"], "invalid number (from 1) value: '0'"),
        (["--shard", "4/3"], "invalid part (I/N, I from 1 to N) value: '4/3'"),
    ],
)
def test_wrong_usage_of_folders_exits_with_2(
    more: Sequence[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_picture(tmp_path / "album/a.png")
    with pytest.raises(SystemExit) as ended:
        restore(enlarge(tmp_path, *more))
    assert ended.value.code == 2 and reason in capsys.readouterr().err


def test_damaged_tiffs_say_one_line_each(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    chance = random.Random(1)
    for number in range(60):
        compression = ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "group4", "packbits", None)[number % 6]
        pixels = np.random.default_rng(number).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
        file = io.BytesIO()
        picture = Image.fromarray(pixels).convert("1" if compression == "group4" else "RGB")
        picture.save(file, "TIFF", compression=compression)
        data = bytearray(file.getvalue())
        for _ in range(chance.randrange(1, 12)):
            data[chance.randrange(8, len(data))] = chance.randrange(256)
        (tmp_path / "album").mkdir(exist_ok=True)
        (tmp_path / f"album/{number:02}.tif").write_bytes(data)
    assert restore(enlarge(tmp_path)) == 1
    *lines, last = capfd.readouterr().err.splitlines()
    failed = sum(line.startswith("error: ") for line in lines)
    assert last == f"error: {failed} of 60 pictures failed; see above" and 10 < failed < 60
    named = [next(n for n in range(60) if f" {tmp_path}/album/{n:02}.tif: " in line) for line in lines]
    assert len(named) == len(set(named))


def test_what_a_library_in_c_prints_is_one_note_with_the_files_name(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It writes to the process's stderr, past Python's."""
    load = files.load_image

    def noisy(file: Any) -> Any:
        os.write(2, b"TIFFReadDirectory: Warning,  odd tag.\nanother\n\nand another\n")
        return load(file)

    monkeypatch.setattr(files, "load_image", noisy)
    write_picture(tmp_path / "album/a.png")
    assert restore(enlarge(tmp_path)) == 0
    said = "its library says: TIFFReadDirectory: Warning, odd tag. (and 2 more lines)"
    assert capfd.readouterr().err == f"note: {tmp_path}/album/a.png: {said}\n"
