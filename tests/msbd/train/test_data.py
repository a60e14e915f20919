"""The data of PASD's training: sources of pictures, and examples that are pure functions of their number."""

import warnings
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from msbd.pixels.resize import round_to_8_bits
from msbd.train import data as train_data
from msbd.train.data import (
    MANY,
    Example,
    TrainingData,
    UnreadableError,
    collate,
    degrade_pair,
    enlarge,
    random_crop,
    seeded,
    to_unit,
)
from msbd.train.degrade import PASD, REAL_ESRGAN, usm_sharpen


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


class Arrays:
    """Pictures held in memory; those in `broken` cannot be read."""

    def __init__(self, pictures: Sequence[np.ndarray], broken: Sequence[int] = ()) -> None:
        self.pictures, self.broken = pictures, broken

    def __len__(self) -> int:
        return len(self.pictures)

    def read(self, index: int) -> tuple[np.ndarray, str]:
        if index in self.broken:
            raise ValueError(f"picture {index}: broken")
        return self.pictures[index], f"picture {index}"


def coordinates(height: int, width: int) -> np.ndarray:
    """(height, width, 3): red is the column, green the row, so that a crop tells where it comes from."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([columns, rows, np.full_like(rows, 77)], -1).astype(np.uint8)


def textured(height: int, width: int, seed: int = 0) -> np.ndarray:
    """(height, width, 3): soft blotches, as unlike their mirror image as can be."""
    grain = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return np.array(Image.fromarray(grain).resize((width, height), Image.Resampling.BICUBIC))


def several(count: int, broken: Sequence[int] = ()) -> Arrays:
    """`count` pictures of different sizes, some smaller than the crops of 32 that these tests take."""
    return Arrays([textured(24 + 7 * i, 60 - 5 * i, i) for i in range(count)], broken)


def levels(image: Tensor) -> Tensor:
    """[-1, 1] -> 0..255, which must be whole numbers."""
    scaled = (image + 1) * 127.5
    assert (scaled - scaled.round()).abs().max() < 1e-3
    return scaled.round()


def same(one: Example, other: Example) -> bool:
    return (
        torch.equal(one.clean, other.clean)
        and torch.equal(one.control, other.control)
        and (one.caption, one.index) == (other.caption, other.index)
    )


# ---- the order of examples


@given(count=st.integers(1, 12), seed=st.integers(-(2**40), 2**40), epoch=st.integers(0, 50))
@settings(max_examples=25)
def test_every_picture_comes_once_an_epoch(count: int, seed: int, epoch: int) -> None:
    data = TrainingData(Arrays([coordinates(4, 4)] * count), size=4, seed=seed, grayscale=True)
    captions = [data[epoch * count + i].caption for i in range(count)]
    assert sorted(captions) == sorted(f"picture {i}" for i in range(count))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    def order(epoch: int, seed: int) -> tuple[str, ...]:
        data = TrainingData(Arrays([coordinates(4, 4)] * 20), size=4, seed=seed, grayscale=True)
        return tuple(data[epoch * 20 + i].caption for i in range(20))

    assert len({order(epoch, seed) for epoch in range(4) for seed in range(3)}) == 12


def test_an_example_is_a_pure_function_of_its_number_and_the_seed() -> None:
    data = TrainingData(several(5), size=32, seed=3)
    torch.manual_seed(1)
    forward = [data[n] for n in range(12)]
    torch.manual_seed(2)
    other = TrainingData(several(5), size=32, seed=3)
    assert all(same(forward[n], other[n]) for n in reversed(range(12)))
    assert all(same(forward[n], data[n]) for n in (7, 0, 11, 7))
    assert [example.index for example in forward] == list(range(12))
    assert not same(TrainingData(several(5), size=32, seed=4)[0], forward[0])


def test_workers_and_ranks_change_nothing() -> None:
    expected = TrainingData(several(5), size=32)
    for rank in range(2):  # each rank takes numbers of its own, from 3 on
        loader = DataLoader(
            TrainingData(several(5), size=32), batch_size=2, sampler=range(3 + rank, 15, 2),  # pyright: ignore[reportArgumentType]
            num_workers=2, collate_fn=collate,
        )  # fmt: skip
        batches = list(loader)
        assert [n for batch in batches for n in batch.index] == list(range(3 + rank, 15, 2))
        for batch in batches:
            assert batch.clean.shape == batch.control.shape == (2, 3, 32, 32)
            for row, n in enumerate(batch.index):
                single = Example(batch.clean[row], batch.control[row], batch.captions[row], n)
                assert same(single, expected[n])


def test_generators_of_different_purposes_have_nothing_in_common() -> None:
    words = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (2**32, 0, 0), (-1, 0, 0), (0, 0, 2**33)]
    drawn = [tuple(torch.rand(3, generator=seeded(*word)).tolist()) for word in words]
    assert len(set(drawn)) == len(words)
    assert drawn[3] == tuple(torch.rand(3, generator=seeded(1, 0, 0)).tolist())


# ---- crops, flips, degradations


def test_the_target_is_a_crop_of_the_picture_flipped_or_not() -> None:
    data = TrainingData(Arrays([coordinates(40, 60)]), size=32)
    lefts, tops, flips = set(), set(), []
    for n in range(200):
        columns, rows, blue = levels(data[n].clean)
        flips.append(bool(columns[0, 0] > columns[0, -1]))
        columns = columns.flip(-1) if flips[-1] else columns
        left, top = int(columns[0, 0]), int(rows[0, 0])
        assert torch.equal(columns, torch.arange(left, left + 32.0).expand(32, 32))
        assert torch.equal(rows, torch.arange(top, top + 32.0)[:, None].expand(32, 32))
        assert (blue == 77).all()
        lefts.add(left)
        tops.add(top)
    assert 70 < sum(flips) < 130  # a fair coin, within 4 sigma
    assert tops == set(range(9)) and {0, 28} <= lefts <= set(range(29))


def test_target_and_control_are_flipped_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """The official code's bug 21: an unflipped target beside a control that may be flipped."""
    picture = (
        textured(64, 64) // 4 + np.linspace(0, 191, 64, dtype=np.uint8)[:, None]
    )  # dark left, bright right
    data = TrainingData(Arrays([picture]), size=64)  # no choice of crop: only the flip is left
    flipped = []
    for n in range(16):
        example = data[n]
        target = example.clean / 2 + 0.5
        right, wrong = ((example.control - other).square().mean() for other in (target, target.flip(-1)))
        assert right < 0.2 * wrong
        flipped.append(not torch.allclose(target, to_unit(Image.fromarray(picture))[0], atol=1e-6))
    assert set(flipped) == {True, False}
    # By construction: the control is made from the target that is returned, and from nothing else.
    monkeypatch.setattr(train_data, "apply", lambda image, _: image[..., ::4, ::4])
    for n in range(16):
        target = data[n].clean / 2 + 0.5
        assert (data[n].control - enlarge(target[None, :, ::4, ::4], (64, 64))).abs().max() < 1.01 / 255


def test_control_is_the_degraded_picture_enlarged_as_pillow_does(monkeypatch: pytest.MonkeyPatch) -> None:
    small: list[Tensor] = []
    whole = train_data.apply
    monkeypatch.setattr(
        train_data, "apply", lambda image, parameters: small.append(whole(image, parameters)) or small[-1]
    )
    data = TrainingData(several(3), size=32)
    for n in range(6):
        control = (data[n].control * 255).round()
        assert small[-1].shape == (1, 3, 8, 8)
        lq = Image.fromarray((small[-1][0] * 255).round().byte().permute(1, 2, 0).numpy())
        expected = np.array(lq.resize((32, 32), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        far = np.abs(control.numpy() - expected)
        assert far.mean() < 0.4 and (far > 1).mean() < 0.03  # Pillow rounds and clips between its two passes


@pytest.mark.parametrize("grayscale", [False, True])
@pytest.mark.parametrize("ranges", [PASD, REAL_ESRGAN], ids=["pasd", "real-esrgan"])
@pytest.mark.parametrize(("size", "scale"), [(32, 4), (33, 4), (20, 3), (8, 8), (1, 1)])
def test_shapes_ranges_and_levels(grayscale: bool, ranges: train_data.Ranges, size: int, scale: int) -> None:
    data = TrainingData(several(4), size=size, ranges=ranges, scale=scale, grayscale=grayscale)
    for n in range(4):
        example = data[n]
        for image in (example.clean, example.control):
            assert image.shape == (3, size, size) and image.dtype == torch.float32
            assert image.isfinite().all()
        assert example.clean.abs().max() <= 1
        assert example.control.min() >= 0 and example.control.max() <= 1
        levels(example.control * 2 - 1)


def test_small_pictures_are_enlarged_to_the_crop() -> None:
    for height, width in [(20, 30), (25, 10), (1, 1), (8, 32), (2, 300)]:
        picture = Image.fromarray(textured(height, width))
        factor = 32 / min(height, width)
        large = picture.resize((round(width * factor), round(height * factor)), Image.Resampling.BICUBIC)
        for number in range(4):
            crop = random_crop(picture, 32, seeded(0, 0, number))
            generator = seeded(0, 0, number)
            left, top = (int(torch.randint(side - 31, (), generator=generator)) for side in large.size)
            expected = np.array(large.crop((left, top, left + 32, top + 32)), np.int16)
            assert crop.size == (32, 32) and np.abs(np.array(crop, np.int16) - expected).max() <= 1


def test_a_long_strip_takes_no_memory() -> None:
    crop = random_crop(
        Image.new("RGB", (60_000, 1), (1, 2, 3)), 512, seeded(0, 0, 0)
    )  # enlarged: 31 million wide
    assert crop.size == (512, 512) and crop.getpixel((511, 511)) == (1, 2, 3)


def test_one_picture_gives_other_examples_in_other_epochs() -> None:
    data = TrainingData(Arrays([textured(64, 64)]), size=64)
    examples = [data[n] for n in range(6)]
    assert len({example.control.numpy().tobytes() for example in examples}) == 6
    data = TrainingData(Arrays([textured(64, 64)]), size=16)
    assert len({data[n].clean.numpy().tobytes() for n in range(6)}) == 6


def test_real_esrgan_sharpens_the_target_and_pasd_does_not() -> None:
    clean = to_unit(Image.fromarray(textured(40, 40)))
    target, lq, drawn = degrade_pair(clean, seeded(0, 0, 0), ranges=REAL_ESRGAN)
    assert torch.equal(target, round_to_8_bits(usm_sharpen(clean))) and not torch.equal(target, clean)
    assert torch.equal(lq, train_data.apply(target, drawn))  # degraded from the sharpened one
    target, lq, drawn = degrade_pair(clean, seeded(0, 0, 0), ranges=PASD)
    assert torch.equal(target, clean) and torch.equal(lq, train_data.apply(clean, drawn))
    plain, sharp = (
        TrainingData(Arrays([textured(40, 40)]), size=40, ranges=r)[0].clean for r in (PASD, REAL_ESRGAN)
    )
    sharpened = usm_sharpen(plain[None] / 2 + 0.5)[0] * 2 - 1
    assert torch.allclose(sharpened, sharp, atol=1.01 / 255)  # half a level


def test_grayscale_control_is_the_luma_of_the_target_undegraded() -> None:
    data = TrainingData(several(4), size=32, grayscale=True)
    for n in range(8):
        example = data[n]
        target = Image.fromarray(levels(example.clean).byte().permute(1, 2, 0).numpy())
        expected = torch.from_numpy(np.array(target.convert("L"))).float() / 255
        assert torch.equal(example.control, expected.expand(3, 32, 32))
        red, green, blue = levels(example.clean)
        luma = 0.299 * red + 0.587 * green + 0.114 * blue
        assert (example.control[0] * 255 - luma).abs().max() <= 0.51


# ---- pictures that cannot be read


def test_a_broken_picture_is_skipped_counted_and_told_once() -> None:
    pictures = several(5, broken=[1, 3])
    data = TrainingData(pictures, size=16)
    with pytest.warns(UserWarning) as told:
        examples = [data[n] for n in range(15)]
    texts = sorted(str(warning.message) for warning in told)
    assert texts == [f"picture {i}: broken; the next picture is taken instead" for i in (1, 3)]
    assert data._unreadable.sum() == 2
    assert {example.caption for example in examples} == {"picture 0", "picture 2", "picture 4"}
    whole = TrainingData(several(5), size=16)
    for example in examples:
        expected = whole[example.index]
        if expected.caption not in ("picture 1", "picture 3"):
            assert same(example, expected)  # the others do not move
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = TrainingData(pictures, size=16)
        assert all(same(again[n], examples[n]) for n in reversed(range(15)))


@pytest.mark.filterwarnings("ignore:picture")
def test_a_run_ends_where_nothing_can_be_read() -> None:
    data = TrainingData(Arrays([coordinates(4, 4)] * (MANY + 1), broken=range(1, MANY + 1)), size=4)
    only = next(n for n in range(MANY + 1) if TrainingData(Arrays([coordinates(4, 4)] * (MANY + 1)), size=4)[n].caption == "picture 0")  # fmt: skip
    assert data[(only + 2) % (MANY + 1)].caption == "picture 0"  # MANY - 1 in a row go by
    with pytest.raises(UnreadableError, match=rf"^{MANY} pictures in a row could not be read[^\n]*broken$"):
        _ = data[only + 1]
    with pytest.raises(UnreadableError, match="^1 pictures in a row"):
        _ = TrainingData(Arrays([coordinates(4, 4)], broken=[0]), size=4)[0]


@pytest.mark.filterwarnings("ignore")
def test_workers_report_to_the_process_that_trains() -> None:
    data = TrainingData(several(6, broken=[0, 4]), size=16)
    list(DataLoader(data, sampler=range(12), num_workers=2, collate_fn=collate))  # pyright: ignore[reportArgumentType]
    assert data._unreadable.sum() == 2


@pytest.mark.filterwarnings("ignore")
def test_a_worker_that_gives_up_is_told_in_one_line() -> None:
    data, line = TrainingData(Arrays([coordinates(4, 4)], broken=[0]), size=4), ""
    try:
        list(DataLoader(data, sampler=range(2), num_workers=1, collate_fn=collate))  # pyright: ignore[reportArgumentType]
    except UnreadableError as error:
        line = str(error)
        error.with_traceback(
            None
        )  # it holds the loader: left to the garbage collector, its workers take 5 s to end
    assert line.startswith("1 pictures in a row could not be read")
    assert line.endswith("picture 0: broken") and "\n" not in line


def test_impossible_settings_are_told() -> None:
    with pytest.raises(ValueError, match="no pictures to train on"):
        TrainingData(Arrays([]))
    for size, scale in ((3, 4), (0, 0), (8, 0)):
        with pytest.raises(ValueError, match=f"crops of {size} pixels cannot be degraded to 1/{scale}"):
            TrainingData(several(1), size=size, scale=scale)
    with pytest.raises(IndexError, match="numbered from 0"):
        _ = TrainingData(several(1), size=16)[-1]
