"""The same pictures on Ray Data: beside each other on this machine, or on those of a cluster.

Ray is started by a process of its own, in ray_job.py: an actor for each GPU, or else for each machine, holds
the nets and makes one picture after the other. An actor writes what became of a picture into a manifest of
its own before Ray hears of it, so that nothing is lost with the process that shares the work out; here these
are read, told and brought together.
"""

import contextlib
import importlib.util
import multiprocessing
import shutil
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

from msbd.files import lock

from .manifest import Manifest, Record, record_of
from .tasks import Task
from .tool import Opening
from .workers import end, ended, lost

POLL = 0.2  # seconds between two looks for what was made


def records(
    opening: Opening, tasks: Sequence[Task], waiting: Sequence[Task], manifest: Manifest
) -> Generator[Record]:
    """What becomes of each of the `waiting` among `tasks`, in the order in which they are finished.

    ImportError without the extra `ray`. ValueError where Ray fails, and where another process has it work on
    the same manifest. OSError.
    """
    if importlib.util.find_spec("ray") is None or importlib.util.find_spec("pyarrow") is None:
        raise ImportError('--ray needs the extra `ray`: pip install "ray[data]"')
    with _working_folder(_place(manifest)) as folder:
        parts = _Parts(manifest)
        parts.take_in()  # of a run that was killed
        finished: set[str] = set()
        for record in _made(opening, tasks, waiting, folder, parts):
            if record.path not in finished:  # its actor may have died before Ray heard of it
                finished.add(record.path)
                yield record
        for task in waiting:
            if task.name not in finished:
                yield lost(opening, task, "")
        parts.remove()


def take_over(manifest: Manifest) -> None:
    """Have in the manifest what a run on Ray left that was killed, and nothing else of it. A run that works
    there now is let be. OSError.
    """
    if (place := _place(manifest)).is_dir():
        with (place / "lock").open("wb") as file:
            if lock(file.fileno()):
                _Parts(manifest).take_in()
                shutil.rmtree(place)


def _place(manifest: Manifest) -> Path:
    """The folder that Ray works in."""
    return manifest.folder / f".{manifest.path.stem}-ray"


def _made(
    opening: Opening, tasks: Sequence[Task], waiting: Sequence[Task], folder: Path, parts: "_Parts"
) -> Generator[Record]:
    """What the actors write, until Ray has done all. ValueError where it fails."""
    from .ray_job import share_out

    names = {task.name for task in waiting}
    done = [task for task in tasks if task.name not in names]
    context = multiprocessing.get_context("spawn")
    ours, its = context.Pipe(duplex=False)
    job = context.Process(
        target=share_out, args=(opening, tasks, done, folder, parts.prefix, its), daemon=True
    )
    job.start()
    its.close()
    try:
        while True:
            over = not job.is_alive()  # asked first, so that nothing comes after the last look
            yield from parts.news()
            if over:
                break
            job.join(POLL)
        try:
            error = ours.recv()
        except EOFError:
            error = f"it ended with {ended(job.exitcode or 0)}"
        if error:
            raise ValueError(f"Ray failed: {error}; what it said is in {folder / 'log'}")
    finally:
        job.terminate()
        end(job)
        ours.close()


@contextlib.contextmanager
def _working_folder(path: Path) -> Iterator[Path]:
    """A new folder below `path`, which is this process's until the end and is then removed; after an error
    it stays until the next begins. ValueError where another process has it.
    """
    path.mkdir(exist_ok=True)
    with (path / "lock").open("wb") as file:
        if lock(file.fileno()) is False:
            raise ValueError(f"{path.parent}: another command has Ray work on this folder; wait for its end")
        for former in path.iterdir():
            if former.is_dir():
                shutil.rmtree(former, ignore_errors=True)
        # A new name: what the actors of a killed run may still write goes elsewhere.
        folder = (path / str(time.time_ns())).absolute()
        folder.mkdir()
        yield folder
        shutil.rmtree(path)


class _Parts:
    """The manifests of actors, beside the one that all their records go into."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._read: dict[Path, int] = {}  # bytes of each file that were read
        self.prefix = f"{manifest.path.stem}-ray-".removeprefix("msbd-")

    def _files(self) -> list[Path]:
        return sorted(self._manifest.folder.glob(f"msbd-{self.prefix}*.jsonl"))

    def take_in(self) -> None:
        """Have the records that are there in the manifest, and the files no more. OSError."""
        for record in self.news():
            self._manifest.add(record)
        self.remove()

    def news(self) -> Iterator[Record]:
        """What was not read yet. OSError."""
        for path in self._files():
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                lines = file.read()
            whole = lines[: lines.rfind(b"\n") + 1]
            self._read[path] = self._read.get(path, 0) + len(whole)
            yield from filter(None, map(record_of, whole.splitlines()))

    def remove(self) -> None:
        """Remove the files. OSError."""
        for path in self._files():
            path.unlink()
