"""How much fits into a device's memory.

Copying  this file stands alone: torch only
"""

import torch

_BYTES_PER_CELL = (
    400_000  # of a latent: both guidance halves of SD 1.5 in float16, attention not materialised
)


def tiles_at_once(device: torch.device, cells: float) -> int:
    """How many tiles of `cells` latent cells to sample together: four on a CPU, on a GPU what half its free memory holds.

    An estimate: who runs out of memory all the same halves it and tries again.
    """
    if device.type != "cuda":
        return 4
    return max(1, int(torch.cuda.mem_get_info(device)[0] / 2 / (cells * _BYTES_PER_CELL)))
