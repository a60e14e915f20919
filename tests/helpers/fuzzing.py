"""What the fuzzers share: damage to bytes, and a process that is fed with what is damaged, and may die of it.

For Linux and macOS.
"""

import contextlib
import os
import random
import re
import select
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEADLINE, SILENCE = 20, 300  # seconds of the processor, and on the wall, after which a process is stopped
ADDRESSES = 8 * 2**30  # bytes that a process may ask for on top, so that none takes the machine's memory

# ---- damage ------------------------------------------------------------------------------------------------

BYTES = (0, 1, 0x7F, 0x80, 0xFF)
NUMBERS = (0, 1, 2, 0x7F, 0xFF, 0x100, 0x7FFF, 0x8000, 0xFFFE, 0xFFFF)
LARGE_NUMBERS = (*NUMBERS, 0x10000, 0xFFFFFF, 0x10000000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)


def place(chance: random.Random, data: bytearray) -> int:
    """Anywhere, or among the first bytes, where headers are."""
    return chance.randrange(min(len(data), 128) if chance.random() < 0.3 else len(data))


def some_slice(chance: random.Random, data: bytearray) -> tuple[int, int]:
    """Where a short part begins and ends."""
    start = place(chance, data)
    return start, min(len(data), start + chance.choice((1, 1, 2, 3, 4, 8, 16, 50, 200)))


def flip(chance: random.Random, data: bytearray, source: object = None) -> bytearray:
    """Some bits."""
    for _ in range(chance.choice((1, 1, 2, 8))):
        data[place(chance, data)] ^= 1 << chance.randrange(8)
    return data


def substitute(chance: random.Random, data: bytearray, source: object = None) -> bytearray:
    """Other bytes in some places."""
    for _ in range(chance.choice((1, 1, 2, 8))):
        data[place(chance, data)] = chance.choice((*BYTES, chance.randrange(256)))
    return data


def extreme(chance: random.Random, data: bytearray, source: object = None) -> bytearray:
    """An extreme number of two or four bytes over what is there."""
    at, kind = place(chance, data), chance.choice((">H", "<H", ">I", "<I"))
    number = chance.choice(NUMBERS if kind[1] == "H" else LARGE_NUMBERS)
    new = struct.pack(kind, number)
    data[at : at + len(new)] = new
    return data


def delete(chance: random.Random, data: bytearray, source: object = None) -> bytearray:
    """A slice taken out."""
    start, end = some_slice(chance, data)
    del data[start:end]
    return data


def insert(chance: random.Random, data: bytearray, source: object = None) -> bytearray:
    """Bytes put in between."""
    at, count = place(chance, data), chance.choice((1, 1, 2, 4, 16, 100))
    data[at:at] = chance.randbytes(count) if chance.random() < 0.5 else bytes([chance.choice(BYTES)]) * count
    return data


def truncate(chance: random.Random, data: bytearray, source: object = None) -> bytearray:
    """Cut off."""
    return data[: place(chance, data)]


def duplicate(chance: random.Random, data: bytearray, source: object = None) -> bytearray:
    """A slice put in again, once or often."""
    start, end = some_slice(chance, data)
    at = end if chance.random() < 0.5 else place(chance, data)
    data[at:at] = data[start:end] * chance.choice((1, 1, 1, 2, 30))
    return data


def overwrite(chance: random.Random, data: bytearray, source: object = None) -> bytearray:
    """A slice copied over another place."""
    start, end = some_slice(chance, data)
    at = place(chance, data)
    data[at : at + end - start] = data[start:end]
    return data


# ---- what a process takes ----------------------------------------------------------------------------------


def memory(*, forget: bool = False) -> tuple[int, int]:
    """Bytes that this process has, and the most that it had, since the last call with `forget`."""
    try:
        if forget:
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
        sizes = {
            line[:5]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("VmRSS", "VmHWM"))
        }
        return sizes["VmRSS"], sizes["VmHWM"]
    except OSError:  # macOS, which knows the most of all time
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most, most


def limit_addresses() -> None:
    """Let this process have at most ADDRESSES bytes more, where the system can."""
    import resource

    with contextlib.suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + ADDRESSES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


# ---- the process that is fed -------------------------------------------------------------------------------


def feed_process(
    module: str,
    seed: int,
    first: int,
    end: int,
    until: float | None,
    answered: Callable[[bytes], int],
    words: Counter[str],
) -> tuple[int, str]:
    """Feed `python -m module --serve` from input `first` on; where the next one has to go on, and why this
    one ended at the input before that, "" where nothing is wrong.

    `answered(line)` takes what the process says of an input, and gives the input's number. What libraries
    print is counted in `words`, numbers as #. At `until` the process is stopped.
    """
    command = [sys.executable, "-m", module, "--seed", str(seed), "--serve", str(first), str(end)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=said, env={**os.environ, "PYTHONPATH": path}
        )
        assert process.stdout is not None
        number, rest, silent = first, b"", False
        try:
            while number < end:
                left = SILENCE if until is None else min(SILENCE, until - time.monotonic())
                if left <= 0 or not select.select([process.stdout], [], [], left)[0]:
                    silent = until is None or time.monotonic() < until
                    break
                if not (part := os.read(process.stdout.fileno(), 1 << 16)):
                    break
                *lines, rest = (rest + part).split(b"\n")
                for line in lines:
                    number = answered(line) + 1
        finally:
            stopped = until is not None and time.monotonic() >= until
            if stopped or silent or number >= end:
                process.kill()
            code = process.wait()
            process.stdout.close()
        said.seek(0)
        printed = said.read().decode(errors="replace")
    words.update(re.sub(r"[0-9]+", "#", line)[:160] for line in printed.splitlines() if line.strip())
    if number >= end or stopped:
        return number, ""
    if code == 1 and number == first:  # this tool is wrong, not the input
        raise RuntimeError(f"the process ended: {printed[-2000:]}")
    if silent:
        why = "no answer"
    elif code == -signal.SIGPROF:
        why = f"more than {DEADLINE} s of the processor"
    else:
        why = f"the process ended by {signal.Signals(-code).name if code < 0 else code}"
    at = next((line.strip() for line in printed.splitlines() if line.startswith("  File")), "")
    return number + 1, f"{why} {at}".strip()
