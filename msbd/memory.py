"""How much fits into memory, whether an error says that it did not, and trying again with less.

Copying  this file stands alone: torch only
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch

Setting = TypeVar("Setting")
Item = TypeVar("Item")
Result = TypeVar("Result")

# Of a latent: both guidance halves of SD 1.5 in float16, attention not materialised.
_BYTES_PER_CELL = 400_000


def tiles_at_once(device: torch.device, cells: float) -> int:
    """How many tiles of `cells` latent cells to sample together: four on a CPU, on a GPU what half its free
    memory holds.

    An estimate: who runs out of memory all the same halves it and tries again.
    """
    if device.type != "cuda":
        return 4
    # What PyTorch has reserved and does not use is free as well.
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + cached
    return max(1, int(free / 2 / (cells * _BYTES_PER_CELL)))


# What libraries below PyTorch say where PyTorch has no class of its own for it. cuBLAS and cuDNN name the
# call that did not get its workspace; cuDNN without room for any algorithm's workspace finds no engine.
_OUT_OF_MEMORY = (
    "out of memory",
    "allocate memory",
    "alloc_failed",
    "allocation_failed",
    "unable to find an engine",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` is a device's or the machine's memory running out; MPS and the CPU have no class of
    their own for it.
    """
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(phrase in text for phrase in _OUT_OF_MEMORY)


def until_it_fits(
    attempt: Callable[[Setting], Result], setting: Setting, smaller: Callable[[Setting], Setting | None]
) -> Result:
    """`attempt(setting)`; out of memory, again with `smaller(setting)`, until that is None: it raises."""
    while True:
        try:
            return attempt(setting)
        except RuntimeError as error:
            less = smaller(setting) if is_out_of_memory(error) else None
            if less is None:
                raise
        setting = less  # tried outside the clause, so that the failed attempt's memory is free by then


# A tiled autoencoder's largest tiles, in pixels and latent cells, where memory is short.
SMALL_TILES = {"encoder_tile": 256, "decoder_tile": 32}


def with_autoencoder(
    work: Callable[[Setting], Result],
    usual: Setting,
    small: Callable[[], Setting],
    note: Callable[[str], None],
) -> Result:
    """`work(usual)`; out of memory, `note` is told and it is `work(small())`, with the maps on the CPU."""

    def smaller(vae: Setting) -> Setting | None:
        if vae is not usual:
            return None
        note("out of memory in the autoencoder, went on in small tiles with its maps on the CPU")
        return small()

    return until_it_fits(work, usual, smaller)


def in_batches(
    items: Sequence[Item],
    run: Callable[[Sequence[Item]], Iterable[Result]],
    batch: int,
    on_halved: Callable[[int, int], None],
    *,
    alike: Callable[[Item], object] = lambda item: None,
) -> Iterator[tuple[Item, Result]]:
    """Each of `items`, which differ from one another, with its result.

    `run` gets at most `batch` of them at once, all with the same `alike(item)`, and returns a result for
    each. A batch that does not fit into memory is halved, as are all later ones; `on_halved(before, after)`
    is told.
    """

    def attempt(now: Sequence[Item]) -> tuple[Sequence[Item], list[Result]]:
        return now, list(run(now))

    def half(now: Sequence[Item]) -> Sequence[Item] | None:
        if len(now) == 1:
            return None
        on_halved(len(now), len(now) // 2)
        return now[: len(now) // 2]

    waiting = list(items)
    while waiting:
        tried = [item for item in waiting if alike(item) == alike(waiting[0])][:batch]
        done, results = until_it_fits(attempt, tried, half)
        yield from zip(done, results, strict=True)
        waiting = [item for item in waiting if item not in done]
        if len(done) < len(tried):
            batch = len(done)
