"""Folder jobs whose processes die or are ended, whose pictures change or go, and who are not alone."""

import errno
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from msbd.files import lock
from tests.faults.forks import report_of
from tests.helpers.dying_tool import ALWAYS, ONCE, DyingRestorer, tries_of
from tests.helpers.folder_jobs import BICUBIC, faults_of_manifest, results_of, write_pictures
from tests.helpers.fuzzing import ROOT
from tests.helpers.tiny_bundle import write_pasd_folder, write_tiny_bundle
from tools.folders import run
from tools.folders.manifest import Manifest
from tools.folders.run import carry_out
from tools.folders.tool import Opening, attempt
from tools.restore.__main__ import Restorer, build_parser, main

NAMES = ("a.png", "b.png", "c.png", "d.png", "e.png", "f.png")
posix = pytest.mark.skipif(sys.platform == "win32", reason="signals")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_pictures(tmp_path / "in", NAMES)


def restore(images: Path, results: Path, *words: str) -> int:
    return main(["-i", str(images), "-o", str(results), *BICUBIC, *words])


def undisturbed(images: Path, *words: str) -> dict[str, bytes]:
    results = images.with_name(f"undisturbed {images.name}")
    assert restore(images, results, *words) == 0
    return results_of(results)


def start(images: Path, results: Path, *words: str) -> "subprocess.Popen[str]":
    """The command in a process of its own."""
    command = [sys.executable, "-m", "tools.restore", "-i", str(images), "-o", str(results), *BICUBIC, *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that started the tests in the background has it ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def until(what: Callable[[], Any], seconds: float = 60) -> None:
    """Wait for something."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


# ---- workers -----------------------------------------------------------------------------------------------


@posix
def test_a_worker_that_dies_is_replaced_and_its_picture_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("a.png", "b.png", f"{ONCE}.png", "z.png")
    images, results = write_pictures(tmp_path / "in", names), tmp_path / "out"
    args = build_parser().parse_args(["-i", str(images), "-o", str(results), *BICUBIC, "--workers", "2"])
    carry_out(Opening(DyingRestorer.__module__, "DyingRestorer", args), DyingRestorer)
    assert tries_of(results / f"{ONCE}.png").read_text() == "xx"
    assert results_of(results) == undisturbed(images)  # and what the dead one had begun is gone
    assert faults_of_manifest(results, images, set(names)) == []
    assert "error" not in capsys.readouterr().err


@posix
def test_a_picture_whose_worker_dies_each_time_is_recorded_and_the_others_are_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("a.png", f"{ALWAYS}.png", "y.png", "z.png")
    images, results = write_pictures(tmp_path / "in", names), tmp_path / "out"
    args = build_parser().parse_args(["-i", str(images), "-o", str(results), *BICUBIC, "--workers", "2"])
    with pytest.raises(ValueError, match="^1 of 4 pictures failed"):
        carry_out(Opening(DyingRestorer.__module__, "DyingRestorer", args), DyingRestorer)
    assert tries_of(results / f"{ALWAYS}.png").read_text() == "xx"
    record = Manifest(results).read()[f"{ALWAYS}.png"]
    why = f"{images / ALWAYS}.png: the process that made it died 2 times (signal 9); is there enough memory?"
    assert not record.done and record.error == why
    assert capsys.readouterr().err.splitlines() == [f"error: {why}"]
    expected = undisturbed(images)
    del expected[f"{ALWAYS}.png"]
    assert results_of(results) == expected
    assert restore(images, results, "--resume") == 0
    assert results_of(results) == undisturbed(images)


# ---- inputs ------------------------------------------------------------------------------------------------


def change(path: Path) -> None:
    """Have other pixels there."""
    with Image.open(path) as picture:
        pixels = np.asarray(picture)
    Image.fromarray(255 - pixels).save(path)


def test_pictures_that_change_in_mid_run_are_made_of_what_was_read_and_made_again(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before, results = undisturbed(images), tmp_path / "out"

    def attempted(tool: Any, task: Any, args: Any) -> Any:
        if task.name == "c.png":
            change(images / "a.png")  # was read
            change(images / "e.png")  # was not
        return attempt(tool, task, args)

    restored = Restorer._restored

    def restored_late(tool: Any, task: Any, *rest: Any) -> Any:
        if task.name == "d.png":
            change(images / "d.png")  # was read, is not yet written
        return restored(tool, task, *rest)

    monkeypatch.setattr(run, "attempt", attempted)
    monkeypatch.setattr(Restorer, "_restored", restored_late)
    assert restore(images, results) == 0
    monkeypatch.undo()
    images.with_name("undisturbed in").rename(tmp_path / "before")
    after, mixed = undisturbed(images), results_of(results)
    changed = {name for name in NAMES if before[name] != after[name]}
    assert changed == {"a.png", "d.png", "e.png"}
    assert mixed == before | {"e.png": after["e.png"]}
    told = faults_of_manifest(results, images, set(NAMES))
    assert told == [f"{name}: another input than the manifest says" for name in ("a.png", "d.png")]
    capsys.readouterr()
    assert restore(images, results, "--resume") == 0
    assert "4 of 6 pictures are there already" in capsys.readouterr().out
    assert results_of(results) == after and faults_of_manifest(results, images, set(NAMES)) == []


def test_a_picture_that_is_deleted_in_mid_run_is_told_and_the_others_are_made(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected, results = undisturbed(images), tmp_path / "out"

    def attempted(tool: Any, task: Any, args: Any) -> Any:
        if task.name == "b.png":
            (images / "d.png").unlink()
        return attempt(tool, task, args)

    monkeypatch.setattr(run, "attempt", attempted)
    capsys.readouterr()
    assert restore(images, results) == 1
    del expected["d.png"]
    assert results_of(results) == expected
    errors = [f"error: {images / 'd.png'}: there is no such file", "error: 1 of 6 pictures failed; see above"]
    assert capsys.readouterr().err.splitlines() == errors


def test_a_result_that_was_changed_or_taken_away_is_made_again(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected, results = undisturbed(images), tmp_path / "out"
    assert restore(images, results) == 0
    change(results / "a.png")
    (results / "b.png").unlink()
    same_size = bytearray(expected["c.png"])
    same_size[-1] ^= 1
    (results / "c.png").write_bytes(same_size)
    os.utime(results / "d.png")  # touched alone
    capsys.readouterr()
    assert restore(images, results, "--resume") == 0
    assert "3 of 6 pictures are there already" in capsys.readouterr().out
    assert results_of(results) == expected


def test_a_comparison_that_was_taken_away_is_made_again_and_so_is_all_with_other_settings(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results, compare = tmp_path / "out", ("--compare", str(tmp_path / "compare"))
    assert restore(images, results, *compare) == 0
    expected = results_of(tmp_path / "compare")
    (tmp_path / "compare" / "b.jpg").unlink()
    for more, there in (((), 5), ((), 6), (("--strip-metadata",), 0)):
        capsys.readouterr()
        assert restore(images, results, *compare, "--resume", *more) == 0
        told = f"{there} of 6 pictures are there already" if there else "1/6 "
        assert capsys.readouterr().out.startswith(told)
        assert results_of(tmp_path / "compare") == expected


# ---- signals -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A folder that takes a second, and what is made of it."""
    names = tuple(f"{i:02}.png" for i in range(10))
    images = write_pictures(tmp_path_factory.mktemp("many") / "in", names, size=(240, 320))
    return images, undisturbed(images)


@posix
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_that_is_ended_from_outside_ends_at_once_and_is_resumed(
    number: signal.Signals,
    code: int,
    workers: int,
    many: tuple[Path, dict[str, bytes]],
    tmp_path: Path,
) -> None:
    (images, expected), results = many, tmp_path / "out"
    process = start(images, results, "--workers", str(workers))
    until(lambda: (results / "msbd.jsonl").exists())
    process.send_signal(number)
    _, said = process.communicate(timeout=20)  # less than a second where nothing else runs
    assert process.returncode == code
    end = {143: "ended from outside", 130: "interrupted"}[code]
    (*notes, tried, last) = said.splitlines()
    assert last == end and "pictures tried; --resume goes on from there" in tried and not notes
    made = results_of(results)
    assert 0 < len(made) < len(expected) and made.items() <= expected.items()
    assert restore(images, results, "--resume") == 0
    assert results_of(results) == expected
    assert faults_of_manifest(results, images, set(expected)) == []


@posix
@pytest.mark.long
def test_a_job_that_is_killed_a_hundred_times_is_done_in_the_end(tmp_path: Path) -> None:
    report = report_of("random_kills", tmp_path, "--kills", "100", "--pictures", "200")
    assert report["faults"] == [] and report["kills"] == 100
    assert len(set(report["there"])) > 10  # different moments


@posix
def test_a_job_that_is_killed_a_few_times_is_done_in_the_end(tmp_path: Path) -> None:
    report = report_of("random_kills", tmp_path, "--kills", "5", "--pictures", "20")
    assert report["faults"] == [] and report["kills"] == 5


@posix
def test_workers_end_with_the_command_that_is_killed(
    many: tuple[Path, dict[str, bytes]], tmp_path: Path
) -> None:
    (images, expected), results = many, tmp_path / "out"
    process = start(images, results, "--workers", "2")
    until(lambda: (results / "msbd.jsonl").exists())
    process.kill()
    process.communicate(timeout=60)  # the ends of both pipes, which workers have too
    assert _whole(results_of(results)).items() <= expected.items()
    assert restore(images, results, "--resume") == 0
    assert results_of(results) == expected
    assert faults_of_manifest(results, images, set(expected)) == []


def _whole(results: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in results.items() if not name.endswith(".tmp")}


# ---- beside each other -------------------------------------------------------------------------------------


@posix
def test_two_commands_into_one_folder_do_no_harm(many: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    (images, expected), results = many, tmp_path / "out"
    processes = [start(images, results), start(images, results)]
    said = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert results_of(results) == expected
    assert faults_of_manifest(results, images, set(expected)) == []
    assert Manifest(results).damaged == 0


@posix
def test_what_a_killed_run_on_ray_left_is_taken_over(images: Path, tmp_path: Path) -> None:
    results = tmp_path / "out"
    assert restore(images, results) == 0
    before = results_of(results)
    times = {path.name: path.stat().st_mtime_ns for path in results.glob("*.png")}
    (results / "msbd.jsonl").rename(results / "msbd-ray-17-3.jsonl")
    (results / ".msbd-ray/17/checkpoint").mkdir(parents=True)
    with (results / ".msbd-ray/lock").open("wb") as file:
        assert lock(file.fileno())
        assert restore(images, results, "--resume") == 0
        assert (results / ".msbd-ray/17").exists()
    assert restore(images, results, "--resume") == 0
    assert results_of(results) == before
    assert {path.name: path.stat().st_mtime_ns for path in results.glob("*.png")} == times
    assert {path.name for path in results.iterdir()} == {*NAMES, "msbd.jsonl"}
    assert faults_of_manifest(results, images, set(NAMES)) == []


def test_order_shards_workers_and_resuming_do_not_change_a_picture(tmp_path: Path) -> None:
    names = ("a.png", "b.png", "sub/c.png", "sub/d.png")
    images = write_pictures(tmp_path / "in", names)
    nets = ["--model", str(write_pasd_folder(tmp_path / "pasd"))]
    nets += ["--base", str(write_tiny_bundle(tmp_path / "bundle"))]
    nets += ["--steps", "1", "--process-size", "24", "--scale", "1", "--device", "cpu", "--threads", "1"]
    # Workers see the weights of installed packages, which tests do not: these enter the model's hash.
    nets += ["--no-metadata"]
    number = itertools.count()

    def made(*runs: tuple[str, ...], source: tuple[str, ...] = ("-i", str(images), "--recursive")) -> Any:
        results = tmp_path / f"out-{next(number)}"
        for words in runs:
            assert main([*source, "-o", str(results), *nets, "--seed", "3", "--quiet", *words]) == 0
        return results_of(results)

    expected = made(())
    assert expected.keys() == set(names) and len(set(expected.values())) == 4
    assert made(("--shard", "3/3"), ("--shard", "1/3"), ("--shard", "2/3")) == expected
    assert made(("--workers", "2")) == expected
    assert made(("--shard", "2/2"), ("--resume",)) == expected
    backwards = images / "list.jsonl"
    backwards.write_text("".join(json.dumps({"image": name}) + "\n" for name in reversed(names)))
    assert made((), source=("--jobs", str(backwards))) == expected
    assert made(("--seed", "4")) != expected
    assert all(data != expected[name] for name, data in made(("--seed", "4")).items())


def test_a_folder_that_cannot_be_listed_is_told_and_leaves_no_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names, results = ("a.png", "sub/b.png"), tmp_path / "out"
    images = write_pictures(tmp_path / "in", names)
    plain = os.scandir

    def listed(path: Any) -> Any:
        if Path(path) == images / "sub":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return plain(path)

    monkeypatch.setattr(os, "scandir", listed)
    assert restore(images, results, "--recursive", "--quiet") == 1
    errors = [f"error: {images / 'sub'}: Permission denied", "error: 1 of 2 pictures failed; see above"]
    assert capsys.readouterr().err.splitlines() == errors
    monkeypatch.undo()
    assert restore(images, results, "--recursive", "--resume") == 0
    assert faults_of_manifest(results, images, set(names)) == []
