"""How much fits into a device's memory, and whether an error says that something did not.

Copying  this file stands alone: torch only
"""

import torch

# Of a latent: both guidance halves of SD 1.5 in float16, attention not materialised.
_BYTES_PER_CELL = 400_000


def tiles_at_once(device: torch.device, cells: float) -> int:
    """How many tiles of `cells` latent cells to sample together: four on a CPU, on a GPU what half its free memory holds.

    An estimate: who runs out of memory all the same halves it and tries again.
    """
    if device.type != "cuda":
        return 4
    # What PyTorch has reserved and does not use is free as well.
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + cached
    return max(1, int(free / 2 / (cells * _BYTES_PER_CELL)))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` is a device's or the machine's memory running out; MPS and the CPU have no class of their own for it."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("out of memory" in text or "allocate memory" in text)
