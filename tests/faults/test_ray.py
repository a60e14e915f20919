"""The folder job on Ray Data: actors and the process that shares the work out are killed."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers.dying_tool import ALWAYS, DyingRestorer, tries_of
from tests.helpers.folder_jobs import BICUBIC, write_pictures
from tests.helpers.fuzzing import ROOT
from tools.folders.manifest import Manifest
from tools.folders.run import carry_out
from tools.folders.tool import Opening
from tools.restore.__main__ import build_parser

pytest.importorskip("ray")
pytestmark = pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="actors are found in /proc")

PATIENCE = 120  # seconds


def write_album(folder: Path, count: int, *, size: tuple[int, int] = (96, 128)) -> None:
    """Pictures in a tree, and one that cannot be read."""
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
        path = folder / "album" / ("sub" if number % 3 else ".") / f"é{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    (folder / "album/broken.png").write_bytes(b"no picture")


class Run:
    """A command of its own process, in `folder`, with results in `out`."""

    def __init__(self, folder: Path, out: str, *more: str) -> None:
        self.out = folder / out
        words = ["-m", "tools.restore", "-i", f"{folder}/album", "-o", str(self.out), "--recursive", *more]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": "/tmp"}
        self.process = subprocess.Popen(
            [sys.executable, *words], cwd=folder, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def wait_for(self, happened: Callable[[], bool]) -> None:
        """Until something happened, or the command ended."""
        end = time.monotonic() + PATIENCE
        while not happened() and self.process.poll() is None:
            assert time.monotonic() < end
            time.sleep(0.02)

    def ended(self) -> tuple[int, str, str]:
        """Exit code, stdout and stderr."""
        out, err = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, out, err


def pictures(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix == ".png"
    }


def actors() -> list[int]:
    """The processes that make pictures."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"MapWorker(MapBatches(Maker))" in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:  # it has ended
            continue
    return found


def checkpointed(out: Path) -> set[str]:
    """The names that Ray's checkpoint says are made."""
    from pyarrow import parquet

    files = [path for path in out.glob(".msbd-ray/*/checkpoint/*.parquet") if ".pending" not in path.name]
    return {name for path in files for name in parquet.read_table(path)["path"].to_pylist()}


NETLESS = ("--method", "bicubic", "--scale", "4")
# Nets, and seeds that matter.
WITH_NETS = ("--model", "mini", "--scale", "1", "--steps", "2", "--process-size", "64", "--tile", "96", "--vae-tiling", "fast")  # fmt: skip


def check_one_actor_killed(folder: Path, count: int, options: tuple[str, ...]) -> None:
    write_album(folder, count)
    assert Run(folder, "alone", *options).ended()[0] == 1
    run = Run(folder, "out", *options, "--ray", "2")
    run.wait_for(lambda: sum(record.done for record in Manifest(run.out).read().values()) >= 2)
    victims = actors()
    assert len(victims) == 2
    os.kill(victims[0], signal.SIGKILL)
    code, out, err = run.ended()
    assert code == 1, err
    assert err.splitlines()[-2:] == [
        f"error: {folder}/album/broken.png: not a readable picture: of no known format, or damaged at its start; "
        "save it as JPEG or PNG",
        f"error: 1 of {count + 1} pictures failed; see above",
    ]
    assert all(line.startswith(("note: ", "error: ")) for line in err.splitlines()), err
    assert all(line[0].isdigit() for line in out.splitlines()), out
    assert len(out.splitlines()) == count + 1
    made, alone = pictures(run.out), pictures(folder / "alone")
    assert made == alone and len(made) == count
    records, expected = (Manifest(folder / name).read() for name in ("out", "alone"))
    assert records.keys() == expected.keys()
    for name, record in records.items():
        one = expected[name]
        assert (record.status, record.output_hash, record.settings_hash, record.seed) == (
            one.status, one.output_hash, one.settings_hash, one.seed
        )  # fmt: skip
    assert {path.name for path in run.out.iterdir()} == {path.name for path in (folder / "alone").iterdir()}


def test_an_actor_that_is_killed_is_replaced_and_every_picture_is_as_by_one_process(tmp_path: Path) -> None:
    check_one_actor_killed(tmp_path, 24, NETLESS)


@pytest.mark.long
def test_actors_hold_nets_and_give_what_one_process_gives(tmp_path: Path) -> None:
    check_one_actor_killed(tmp_path, 6, WITH_NETS)


@pytest.mark.long
def test_a_picture_whose_actor_dies_each_time_takes_no_other_down(tmp_path: Path) -> None:
    dying = [f"{ALWAYS}{number}.png" for number in range(3)]
    others = ["a.png", "b.png", "c.png", "x.png", "y.png", "z.png"]
    images, results = write_pictures(tmp_path / "in", (*dying, *others)), tmp_path / "out"
    args = build_parser().parse_args(["-i", str(images), "-o", str(results), *BICUBIC, "--ray", "1"])
    with pytest.raises(ValueError, match="^3 of 9 pictures failed"):
        carry_out(Opening(DyingRestorer.__module__, "DyingRestorer", args), DyingRestorer)
    assert {tries_of(results / name).read_text() for name in dying} == {"xx"}
    assert sorted(pictures(results)) == others
    assert {name for name, record in Manifest(results).read().items() if not record.done} == set(dying)


@pytest.mark.long
def test_20_times_killed_while_it_shares_the_work_out(tmp_path: Path) -> None:
    count, kills, chance = 60, 20, random.Random(1)
    write_album(tmp_path, count)
    assert Run(tmp_path, "alone", *NETLESS).ended()[0] == 1
    alone, out = pictures(tmp_path / "alone"), tmp_path / "out"
    for _ in range(kills):
        before = len(pictures(out))
        run = Run(tmp_path, "out", *NETLESS, "--ray", "2", "--resume")
        more = chance.randrange(4)
        run.wait_for(lambda before=before, more=more: len(pictures(out)) >= before + more and bool(actors()))
        time.sleep(chance.uniform(0, 0.3))
        run.process.kill()
        assert run.ended()[0] == -signal.SIGKILL
        made, records = pictures(out), Manifest(out).read()
        assert made.items() <= alone.items()
        names = checkpointed(out)
        assert names <= records.keys()
        assert all(records[name].output in made for name in names if records[name].done)
    assert 0 < len(pictures(out)) < count
    code, _, err = Run(tmp_path, "out", *NETLESS, "--ray", "2", "--resume").ended()
    assert code == 1 and f"error: 1 of {count + 1} pictures failed; see above" in err
    assert pictures(out) == alone
    records = Manifest(out).read()
    assert sorted(record.output for record in records.values() if record.done) == sorted(alone)
    assert {path.name for path in out.iterdir()} == {path.name for path in (tmp_path / "alone").iterdir()}
