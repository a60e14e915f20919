"""Noise by address: windows of one field, whatever the batch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msbd.noise import noise_windows
from msbd.pixels.box import Box

SIZE = (24, 40)
BOXES = [Box(0, 0, 16, 16), Box(0, 12, 16, 16), Box(8, 12, 16, 16), Box(8, 24, 16, 16)]


def drawn(seed: int, stage: int, candidate: int, site: str, step: int) -> torch.Tensor:
    noise = noise_windows(seed, stage, SIZE, [(candidate, Box(0, 0, *SIZE))])
    return noise(site, step, (1, 4, *SIZE))


def test_noise_windows_are_windows_of_one_field() -> None:
    whole = drawn(0, 1, 0, "step", 3)
    tiles = noise_windows(0, 1, SIZE, [(0, box) for box in BOXES])("step", 3, (4, 4, 16, 16))
    for tile, box in zip(tiles, BOXES, strict=True):
        assert torch.equal(tile, whole[0, :, box.top : box.bottom, box.left : box.right])
    assert torch.equal(tiles[0][:, :, 12:], tiles[1][:, :, :4])  # so neighbours agree where they overlap


@settings(max_examples=20)
@given(st.permutations(range(4)), st.integers(1, 4))
def test_noise_windows_do_not_depend_on_batch_or_order(order: list[int], batch: int) -> None:
    together = noise_windows(5, 0, SIZE, [(0, box) for box in BOXES])("known", 7, (4, 4, 16, 16))
    for start in range(0, 4, batch):
        now = order[start : start + batch]
        part = noise_windows(5, 0, SIZE, [(0, BOXES[k]) for k in now])("known", 7, (len(now), 4, 16, 16))
        assert torch.equal(part, together[now])


def test_noise_windows_candidates_do_not_depend_on_how_many_there_are() -> None:
    box = Box(0, 0, *SIZE)
    five = noise_windows(0, 0, SIZE, [(k, box) for k in range(5)])("init", 0, (5, 4, *SIZE))
    assert all(torch.equal(five[k], drawn(0, 0, k, "init", 0)[0]) for k in range(5))
    assert len({float(field[0, 0, 0]) for field in five}) == 5


@pytest.mark.parametrize(
    "other",
    [(1, 1, 0, "step", 3), (0, 2, 0, "step", 3), (0, 1, 1, "step", 3), (0, 1, 0, "known", 3), (0, 1, 0, "step", 4)],
    ids=["seed", "stage", "candidate", "site", "step"],
)  # fmt: skip
def test_noise_windows_of_different_addresses_are_independent(other: tuple[int, int, int, str, int]) -> None:
    a, b = drawn(0, 1, 0, "step", 3).flatten(), drawn(*other).flatten()
    assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 0.08  # 5 sigma for 3840 pairs


def test_noise_windows_addresses_do_not_run_into_each_other() -> None:
    assert not torch.equal(drawn(1, 11, 0, "step", 0), drawn(11, 1, 0, "step", 0))
    assert not torch.equal(drawn(0, 1, 1, "step", 11), drawn(0, 11, 1, "step", 1))


def test_noise_windows_are_standard_normal_float32() -> None:
    field = torch.cat([drawn(0, 0, 0, "step", step) for step in range(10)])
    assert field.dtype == torch.float32
    assert abs(field.mean()) < 0.03 and abs(field.std() - 1) < 0.02


def test_noise_windows_shared_sites_have_the_first_candidates_field() -> None:
    windows = [(k, Box(0, 0, *SIZE)) for k in (2, 3)]  # candidate 0 is in another batch
    noise = noise_windows(0, 0, SIZE, windows, shared={"known"})
    known, step = noise("known", 5, (2, 4, *SIZE)), noise("step", 5, (2, 4, *SIZE))
    assert torch.equal(known[0], known[1]) and torch.equal(known[0], drawn(0, 0, 0, "known", 5)[0])
    assert torch.equal(step[1], drawn(0, 0, 3, "step", 5)[0])


def test_noise_windows_leave_the_global_stream_alone() -> None:
    before = torch.get_rng_state()
    a = drawn(0, 0, 0, "init", 0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(drawn(0, 0, 0, "init", 0), a)
