"""What files cost and keep, on real photographs: `python -m tests.helpers.photo_check photos FOLDER...` and
`... io`.

`photos` edits each picture of 3.5 to 26 megapixels (at most --count of them), and enlarges it by 1 and by 2,
with one known colour in place of nets, each command in a process of its own: what lies outside the mask, what
the source said of itself, seconds and memory. `io` restores 50 pictures of 128 x 128 by the mini bundle and
says how much of the time reading and writing took.
"""

import argparse
import hashlib
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
SMALLEST, LARGEST = 3.5, 26.0  # megapixels
METADATA = {0x010F: "make", 0x0132: "date", 0x8298: "copyright", 0x9003: "taken"}


def machine() -> str:
    """The processor and the versions, in a line."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next(
            (line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line),
            cpu,
        )
    return f"{cpu}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}"


# ---- photographs -------------------------------------------------------------------------------------------


def find_photos(folders: list[Path], count: int) -> list[Path]:
    """The first `count` pictures of SMALLEST to LARGEST megapixels, by the hash of their names: a mixed
    lot.
    """
    found = []
    for path in (path for folder in folders for path in folder.rglob("*")):
        if (
            path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff")
            and not path.is_symlink()
        ):
            with Image.open(path) as picture:
                if SMALLEST <= picture.width * picture.height / 1e6 <= LARGEST:
                    found.append(path)
    found.sort(key=lambda path: hashlib.sha256(str(path.relative_to(path.anchor)).encode()).hexdigest())
    return found[:count]


def run_one(words: list[str]) -> None:
    """In a process of its own: one command with faked nets, then what it took, in a line."""
    import msbd.load
    from tests.helpers.fill_pipeline import FillEditor, FillRestorer
    from tools import edit
    from tools.restore import __main__ as restore

    command, *arguments = words
    base = peak_memory()
    start = time.perf_counter()
    with (
        mock.patch.object(msbd.load, "load_edit_pipeline", lambda *_, **__: FillEditor()),
        mock.patch.object(msbd.load, "load_restore_pipeline", lambda *_, **__: FillRestorer()),
    ):
        code = (edit if command == "edit" else restore).main([*arguments, "--quiet"])
    seconds = time.perf_counter() - start
    print(code, seconds, peak_memory() - base)


def peak_memory() -> float:
    """The most that this process has had, in megabytes."""
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage says begins with the parent's
        return (
            next(int(line.split()[1]) for line in status.read_text().splitlines() if "VmHWM" in line) / 1024
        )
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measured(command: str, *words: object) -> tuple[float, float]:
    """Seconds and megabytes beyond the libraries' own; AssertionError where the command failed."""
    run = [sys.executable, "-m", "tests.helpers.photo_check", "one", command, *(str(word) for word in words)]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("0 "), done.stderr + done.stdout
    _, seconds, megabytes = done.stdout.split()
    return float(seconds), float(megabytes)


def check_photo(path: Path, folder: Path) -> dict[str, tuple[float, float]]:
    """Command -> seconds and megabytes; AssertionError where something was lost."""
    from msbd.pixels.files import load_image

    source = load_image(path)
    height, width = source.size
    mask = np.zeros((height, width), bool)
    mask[height // 3 : height // 2, width // 3 : width // 2] = True
    Image.fromarray((mask * 255).astype(np.uint8)).save(folder / "mask.png")
    taken = {}
    common = ("--device", "cpu", "--model", "mini")
    words = ("-i", path, "-m", folder / "mask.png", "-p", "x", "-o", folder / "out.png", *common)
    taken["edit"] = measured("edit", *words)
    made = load_image(folder / "out.png")
    assert made.samples.dtype == source.samples.dtype and np.array_equal(
        made.samples[~mask], source.samples[~mask]
    )
    kept(source, made, 1)
    for scale in (1, 2):
        output = folder / f"x{scale}.png"
        taken[f"x{scale}"] = measured("restore", "-i", path, "-o", output, "--scale", scale, *common)
        enlarged = load_image(output)
        assert enlarged.size == (scale * height, scale * width)
        kept(source, enlarged, scale)
    return taken


def kept(source: object, made: object, scale: int) -> None:
    """AssertionError where `made` lost what `source` said of itself; both are Photos."""
    from msbd.pixels.files import Photo
    from msbd.pixels.tags import Tags

    assert isinstance(source, Photo) and isinstance(made, Photo)
    assert source.icc_profile == made.icc_profile and source.model == made.model
    assert (source.alpha is None) == (made.alpha is None)
    before, after = (Tags.of(photo.metadata.exif or b"") for photo in (source, made))
    for number in METADATA:
        assert before.main.get(number) == after.main.get(number), METADATA[number]
    if source.metadata.dpi:
        assert made.metadata.dpi is not None
        assert np.allclose(np.array(source.metadata.dpi) * scale, made.metadata.dpi, atol=0.05)


def photos(folders: list[Path], count: int) -> None:
    """The table."""
    print(machine())
    rows = []
    found = find_photos(folders, count)
    for path in found:
        with tempfile.TemporaryDirectory() as folder:
            taken = check_photo(path, Path(folder))
        with Image.open(path) as picture:
            pixels = picture.width * picture.height / 1e6
            told = f"{path.name[:40]:40} {picture.format} {picture.mode} {picture.width} x {picture.height}"
        parts = [f"{what} {s / pixels:.2f} s/MP {m / pixels:.0f} MB/MP" for what, (s, m) in taken.items()]
        print(f"{told}: {', '.join(parts)}", flush=True)
        rows.append([value / pixels for pair in taken.values() for value in pair])
    middle = np.median(np.array(rows), axis=0)
    names = [f"{what} {unit}" for what in ("edit", "x1", "x2") for unit in ("s/MP", "MB/MP")]
    told = ", ".join(f"{name} {value:.2f}" for name, value in zip(names, middle, strict=True))
    print(f"{len(found)} photographs, outside the mask equal, metadata kept; medians: {told}")


# ---- time inside input and output --------------------------------------------------------------------------


def io_share(count: int, steps: int) -> None:
    """How much of `count` restorations of 128 x 128 pixels is reading and writing."""
    from msbd.pixels import files
    from tools.restore import __main__ as restore

    spent = {"read": 0.0, "write": 0.0}

    def timed(name: str, work: object) -> object:
        def call(*args: object, **options: object) -> object:
            start = time.perf_counter()
            try:
                return work(*args, **options)  # type: ignore[operator]
            finally:
                spent[name] += time.perf_counter() - start

        return call

    with tempfile.TemporaryDirectory() as folder:
        album = Path(folder) / "album"
        album.mkdir()
        rng = np.random.default_rng(0)
        for number in range(count):
            small = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
            small.resize((128, 128), Image.Resampling.BICUBIC).save(album / f"{number:02}.png")
        words = [
            "-i",
            str(album),
            "-o",
            f"{folder}/out",
            "--model",
            "mini",
            "--method",
            "pasd",
            "--scale",
            "1",
        ]
        words += ["--steps", str(steps), "--device", "cpu", "--quiet"]
        start = time.perf_counter()
        with (
            mock.patch.object(files, "load_image", timed("read", files.load_image)),
            mock.patch.object(files, "save_photo", timed("write", files.save_photo)),
        ):
            assert restore.main(words) == 0
        whole = time.perf_counter() - start
    print(machine())
    inside = sum(spent.values())
    print(
        f"{count} restorations of 128 x 128, {steps} steps: {whole:.1f} s, of which reading {spent['read']:.2f} s and "
        f"writing {spent['write']:.2f} s: {100 * inside / whole:.2f} %"
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    real = commands.add_parser("photos")
    real.add_argument("folders", type=Path, nargs="+")
    real.add_argument("--count", type=int, default=20)
    share = commands.add_parser("io")
    share.add_argument("--count", type=int, default=50)
    share.add_argument("--steps", type=int, default=20)
    commands.add_parser("one").add_argument("words", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    if args.command == "one":
        run_one(args.words)
    elif args.command == "photos":
        photos(args.folders, args.count)
    else:
        io_share(args.count, args.steps)


if __name__ == "__main__":
    main()
