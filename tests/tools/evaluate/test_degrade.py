"""`python -m tools.evaluate degrade`: pairs of clean and degraded pictures, and what was drawn for each."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from msbd.pixels.files import load_image
from msbd.pixels.resize import round_to_8_bits
from msbd.train.data import PAIR, seeded, to_unit
from msbd.train.degrade import REAL_ESRGAN, apply, sample_parameters, usm_sharpen
from tools.evaluate import degrade
from tools.evaluate.__main__ import main
from tools.evaluate.degrade import Outcome, throughput_table

Files = dict[str, bytes]


class Here:
    """A process pool's interface in this process: starting processes would take most of these tests' time."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def __enter__(self) -> "Here":
        return self

    def __exit__(self, *_: object) -> None: ...

    def map(self, function: Callable[[int], Outcome], numbers: range, *, chunksize: int) -> list[Outcome]:
        """`function` of each number; `chunksize` must be possible."""
        assert chunksize >= 1
        return [function(number) for number in numbers]


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(degrade, "ProcessPoolExecutor", Here)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three pictures, 40 x 33 and larger, one of them in a folder of its own and captioned."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for number, name in enumerate(["a.png", "b.jpg", "more/a.webp"]):
        grain = np.random.default_rng(number).integers(0, 256, (33 + number, 40 + number, 3), dtype=np.uint8)
        Image.fromarray(grain).save(folder / name, lossless=True)
    (folder / "more" / "a.txt").write_text("a caption\n")
    return folder


def run(folder: Path, *options: str | Path) -> Files:
    """The files that a run writes to `folder`, by their path below it."""
    assert main(["degrade", "-o", str(folder), "--quiet", *map(str, options)]) == 0
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def pair(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    return load_image(folder / f"hq/{name}.png").pixels, load_image(folder / f"lq/{name}.png").pixels


@pytest.mark.usefixtures("one_process")
def test_whole_pictures_lose_what_the_scale_does_not_divide(photos: Path, tmp_path: Path) -> None:
    files = run(tmp_path / "out", "-i", photos)
    names = ["a", "b", "more/a"]
    assert set(files) == {f"{part}/{n}" for part, end in [("hq", "png"), ("lq", "png"), ("parameters", "json")]
                          for n in (f"{name}.{end}" for name in names)}  # fmt: skip
    for name, file in zip(names, ["a.png", "b.jpg", "more/a.webp"], strict=True):
        hq, lq = pair(tmp_path / "out", name)
        assert hq.shape[0] == 4 * lq.shape[0] == 32 and hq.shape[1] == 4 * lq.shape[1] == 40
        assert np.array_equal(hq, load_image(photos / file).pixels[:32, :40])


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("scale", [2, 3])
def test_parameters_are_those_that_made_the_pair(photos: Path, tmp_path: Path, scale: int) -> None:
    files = run(
        tmp_path / "out", "-i", photos, "--scale", str(scale), "--ranges", "real-esrgan", "--seed", "5"
    )
    record = json.loads(files["parameters/more/a.json"])
    assert record["caption"] == "a caption" and (record["seed"], record["ranges"]) == (5, "real-esrgan")
    whole = to_unit(Image.fromarray(load_image(photos / "more" / "a.webp").pixels))
    clean = whole[..., : 35 // scale * scale, : 42 // scale * scale]
    drawn = sample_parameters(seeded(5, PAIR, 2), ranges=REAL_ESRGAN, scale=scale)
    assert record["steps"] == [{"step": type(step).__name__, **asdict(step)} for step in drawn.steps]
    hq, lq = pair(tmp_path / "out", "more/a")
    target = round_to_8_bits(usm_sharpen(clean))  # so that the files of a pair belong together
    assert record["hq"] == list(target.shape[-2:]) and record["lq"] == list(lq.shape[:2])
    expected = (apply(target, drawn)[0] * 255).round().permute(1, 2, 0).numpy()
    assert np.array_equal(lq, expected)
    assert torch.equal(to_unit(Image.fromarray(hq)), target)


@pytest.mark.usefixtures("one_process")
def test_crops_counts_and_seeds(photos: Path, tmp_path: Path) -> None:
    files = run(tmp_path / "1", "-i", photos, "--size", "36", "--count", "2")
    assert {name for name in files if name.startswith("hq")} == {"hq/a.png", "hq/b.png"}
    hq, lq = pair(tmp_path / "1", "a")
    assert hq.shape == (36, 36, 3) and lq.shape == (9, 9, 3)  # of 33 x 40: enlarged
    assert run(tmp_path / "2", "-i", photos, "--size", "36", "--count", "2") == files
    assert run(tmp_path / "3", "-i", photos, "--size", "36", "--count", "1") == {
        name: data for name, data in files.items() if name.split("/")[1].startswith("a.")
    }
    assert run(tmp_path / "4", "-i", photos, "--size", "36", "--count", "2", "--seed", "1") != files
    single = run(tmp_path / "5", "-i", photos / "a.png", "--size", "36")
    assert single["lq/a.png"] == files["lq/a.png"]


def test_processes_give_the_same_files(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    in_processes = run(tmp_path / "1", "-i", photos)
    monkeypatch.setattr(degrade, "ProcessPoolExecutor", Here)
    assert run(tmp_path / "2", "-i", photos) == in_processes


@pytest.mark.usefixtures("one_process")
def test_scenes_are_rendered_at_the_size_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["degrade", "--scenes", "2", "--size", "64", "-o", str(tmp_path)]) == 0
    hq, lq = pair(tmp_path, "scene-0001")
    assert hq.shape == (64, 64, 3) and lq.shape == (16, 16, 3) and hq.std() > 5
    assert " " in json.loads((tmp_path / "parameters" / "scene-0001.json").read_text())["caption"]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line] == [
        "seconds",
        lines[1],
        "everything",
        "degradation",
        "2",
    ]
    assert "2 pairs" in lines[-1] and "processes" in lines[-1]


def test_throughput_counts_processes_and_area() -> None:
    outcomes = [Outcome(512 * 1024, 0.5)] * 8  # twice 512 x 512 each; 4 s of work, in two processes 2 s
    lines = throughput_table(outcomes, 10.0, 2).splitlines()
    assert lines[2].split() == ["everything", "10.0", "0.80", "1.60"]
    assert lines[3].split() == ["degradation", "alone", "2.0", "4.00", "8.00"]
    assert lines[4] == "8 pairs, 2 processes of one thread"


@pytest.mark.usefixtures("one_process")
def test_unreadable_pictures_do_not_stop_the_others(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "a1.png").write_text("no picture")
    Image.new("RGB", (3, 50)).save(photos / "a2.png")
    assert main(["degrade", "-i", str(photos), "-o", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: 2 of 5 pictures could not be used, the others are done: ")
    assert "a1.png: not a readable picture: of no known format" in error
    assert "; a2: 3 x 50 pixels cannot" in error
    assert error.count("\n") == 1
    done = sorted(path.stem for path in (tmp_path / "out" / "lq").rglob("*.png"))
    assert done == ["a", "a", "b"]


@pytest.mark.usefixtures("one_process")
def test_impossible_requests_are_one_line(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, given = str(tmp_path / "out"), str(photos)
    Image.new("RGB", (8, 8)).save(photos / "more" / "a.bmp")
    (tmp_path / "hq").symlink_to(photos)
    cases = {
        ("-i", str(tmp_path / "nowhere"), "-o", out): "there is no such folder",
        ("-i", given, "-o", out): "would both become more/a.png",
        ("-i", str(photos / "a.png"), "-o", out, "--size", "3"): "--size 3 cannot be degraded to 1/4",
        ("-i", str(photos / "a.png"), "-o", out, "--scale", "0"): "--scale 0: takes a number from 1 up",
        ("--scenes", "0", "-o", out): "--scenes 0: takes",
        ("-i", str(photos / "b.jpg"), "-o", str(tmp_path)): "are not apart",  # its hq leads to the photos
    }
    for options, reason in cases.items():
        assert main(["degrade", *options]) == 1
        error = capsys.readouterr().err
        assert reason in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    for options in ((), ("-i", given, "--scenes", "2")):  # one of the two
        with pytest.raises(SystemExit, match="2"):
            main(["degrade", "-o", out, *options])
