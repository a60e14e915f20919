"""A folder's job is killed at random moments and resumed each time, until it is done.

  python -m tests.faults.random_kills --kills 100 --pictures 200

For Linux and macOS.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

import tools.restore.__main__
from tests.faults.forks import MEMORY, SAID, Job, Place, code_of, prepared_once, warm_up
from tests.helpers.folder_jobs import BICUBIC, faults_of_manifest, results_of, write_pictures


def run(kills: int, pictures: int, seed: int) -> dict[str, object]:
    """Kill `kills` runs over a folder of so many; where it is done before that, begin another one.

    What was found: the number of kills, how many of them left a file that was being written, how many results
    were there at each, and all that is wrong.
    """
    torch.set_num_threads(1)
    chance, names = random.Random(seed), tuple(f"{i:04}.png" for i in range(pictures))
    with tempfile.TemporaryDirectory(dir=MEMORY if os.access(MEMORY, os.W_OK) else None) as scratch:
        root = Path(scratch, "job")
        images = write_pictures(root / "in", names)
        job = Job(tools.restore.__main__, ("-i", str(images), *BICUBIC), names)
        place = Place(job, root, 0)
        with prepared_once(place):
            warm_up(place, images)
            started = time.monotonic()
            assert place.run() == 0, place.lines()
            whole, expected = time.monotonic() - started, results_of(place.results)
            started = time.monotonic()
            assert place.run("--resume") == 0, place.lines()
            least = time.monotonic() - started
            each = (whole - least) / pictures * (pictures / kills)  # of the pictures that a run is to make
            place.clear()
            there, unfinished, wrong = [], 0, []
            while len(there) < kills:
                process = place.start("--resume")
                time.sleep(chance.uniform(0, least + 2 * each))
                os.kill(process, signal.SIGKILL)
                if (code := code_of(process)) != -signal.SIGKILL:
                    wrong += [f"exit code {code}: {place.lines()[-1:]}"] if code else []
                    wrong += _others(place, expected)
                    place.clear()
                    continue
                results = results_of(place.results)
                unfinished += any(name.endswith(".tmp") for name in results)
                done = {name: data for name, data in results.items() if not name.endswith(".tmp")}
                wrong += [f"not whole: {name}" for name in done if done[name] != expected.get(name)]
                there.append(len(done))
            if code := place.run("--resume"):
                wrong.append(f"exit code {code}: {place.lines()[-1:]}")
            wrong += _others(place, expected)
            wrong += [f"said {line!r}" for line in place.lines() if not SAID.fullmatch(line)]
            wrong += faults_of_manifest(place.results, images, set(names))
    return {"kills": len(there), "unfinished": unfinished, "there": there, "faults": wrong}


def _others(place: Place, expected: dict[str, bytes]) -> list[str]:
    results = results_of(place.results)
    different = {name for name in expected if results.get(name) != expected[name]}
    names = sorted((results.keys() - expected.keys()) | different)
    return [f"other results: {names}"] if names else []


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the report goes")
    given = parser.parse_args()
    started = time.monotonic()
    report = run(given.kills, given.pictures, given.seed)
    for name, found in report.items():
        print(f"{name}: {found}")
    print(f"{time.monotonic() - started:,.0f} s")
    if given.json:
        given.json.write_text(json.dumps(report))
    return 1 if report["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
