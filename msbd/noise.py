"""Noise that does not depend on how a picture is cut up or in which order it is worked through.

Every normal field of an edit has an address: seed, stage, candidate, site, step. It is drawn at the stage's
full size from a generator seeded with that address, on the CPU in float32, and each tile takes its window of
it. So neighbouring tiles agree where they overlap, a tile can be left out or computed alone, and device,
dtype and batch size change nothing.

Copying  needs pixels/box.py
"""

import hashlib
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from .pixels.box import Box


def noise_windows(
    seed: int,
    stage: int,
    size: tuple[int, int],
    windows: Sequence[tuple[int, Box]],
    *,
    shared: Collection[str] = (),
) -> Callable[[str, int, tuple[int, ...]], Tensor]:
    """A sampler's `noise(site, step, shape)` for a batch whose member i is `windows[i]` = (candidate, box in
    latent cells).

    `size` is the stage's (h, w) in latent cells. At the sites in `shared` every candidate gets candidate 0's
    field.
    """

    def noise(site: str, step: int, shape: tuple[int, ...]) -> Tensor:
        fields: dict[int, Tensor] = {}
        parts = []
        for candidate, box in windows:
            candidate = 0 if site in shared else candidate
            if candidate not in fields:
                fields[candidate] = _field((seed, stage, candidate, site, step), (shape[1], *size))
            parts.append(fields[candidate][:, *box.window])
        return torch.stack(parts)

    return noise


def _field(address: tuple[object, ...], shape: tuple[int, ...]) -> Tensor:
    digest = hashlib.blake2b("/".join(map(str, address)).encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
    return torch.randn(shape, generator=generator)
