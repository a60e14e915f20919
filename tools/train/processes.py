"""The processes of a training run: how they find each other, are stopped, and fail in one line."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from msbd.train.loop import World

TWICE = 2.0  # seconds within which launchers and queue systems deliver one request to stop a second time
_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def start_world(device: str) -> tuple[World, torch.device]:
    """This process's place among those that torchrun started, and its device; alone where it started none."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World(), torch.device(device)
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"process {local} of this machine has no GPU, there are {torch.cuda.device_count()}; start "
                "as many processes"
            )
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    here = torch.device("cuda", local) if device == "cuda" else torch.device(device)
    return World(dist.get_rank(), size), here


def end_world() -> None:
    """Leave the other processes in order."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Within it Ctrl-C, SIGTERM and SIGHUP only ask to stop; a second one stops at once.

    Yields whether one came.
    """
    came: list[float] = []

    def handle(number: int, frame: object) -> None:
        now = time.monotonic()
        if came and now - came[0] > TWICE:
            restore()
            signal.raise_signal(number)
        elif not came:
            came.append(now)
            os.write(2, b"\nstopping after this step; once more stops at once\n")

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    before = {number: handler for number, handler in handlers.items() if handler is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, handle)
    try:
        yield lambda: bool(came)
    finally:
        restore()


def ignore_signals(worker: int) -> None:
    """How a data worker starts: the training process stops it, and needs it to the end of the step."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def plain_failures() -> Iterator[None]:
    """What torch makes of a process that died elsewhere, in one line. ValueError, OSError."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" in str(error):
            raise OSError(
                f"a process that prepares data died ({str(error):.100}); take fewer --workers, and in a "
                "container a larger /dev/shm"
            ) from error
        if isinstance(error, dist.DistError) or "closed by peer" in str(error):
            raise ValueError("another process of this run ended; its own line says why") from error
        raise
