"""The restorer of `python -m tools.restore`, whose process is killed by pictures of certain names."""

import multiprocessing
import os
import signal
import sys
from pathlib import Path

from msbd.files import whole_file
from tools.folders.tasks import Task
from tools.folders.tool import Made, Tell
from tools.restore.__main__ import Restorer

ONCE, ALWAYS = "dies-once", "dies-always"  # names begin so


class DyingRestorer(Restorer):
    """As any other, but for those pictures: there a process that works for another, or that Ray started, is
    killed as it writes.
    """

    def make(self, task: Task, tell: Tell) -> Made:
        works_for_another = multiprocessing.parent_process() is not None or "ray" in sys.modules
        if task.name.startswith((ONCE, ALWAYS)) and works_for_another:
            tries = tries_of(task.output)
            tries.write_text(tries.read_text() + "x" if tries.exists() else "x")
            if task.name.startswith(ALWAYS) or tries.read_text() == "x":
                with whole_file(task.output) as unfinished:
                    unfinished.write_bytes(b"half of a picture")
                    os.kill(os.getpid(), signal.SIGKILL)
        return super().make(task, tell)


def tries_of(output: Path) -> Path:
    """A file with a letter for each time that a picture, to be written to `output`, was tried."""
    return output.parent.with_name(f"tries of {output.name}")
