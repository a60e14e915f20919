import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from msbd.pixels import membrane as module
from msbd.pixels.masks import dilate
from msbd.pixels.membrane import membrane

LEVEL = 2 / 255  # an 8-bit level in [-1, 1]
CLOSE = 0.1 * LEVEL  # what is promised


def pictures(height: int, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A picture and a source (1, 3, H, W) in [-1, 1], both noise."""
    generator = torch.Generator().manual_seed(seed)
    picture, source = torch.rand((2, 1, 3, height, width), generator=generator) * 2 - 1
    return picture, source


def blobs(height: int, width: int, seed: int, threshold: float = 0.0, cell: int = 8) -> torch.Tensor:
    """A mask (1, 1, H, W) of several parts with holes, some at the border; a lower threshold sets more."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((1, 1, height // cell + 2, width // cell + 2), generator=generator)
    return (F.interpolate(noise, size=(height, width), mode="bicubic") > threshold).float()


def maze(height: int, width: int) -> torch.Tensor:
    """A mask whose one part is a corridor of 9 pixels, to and fro."""
    mask = torch.ones(1, 1, height, width)
    mask[..., 9::20, : width - 9] = 0
    mask[..., 19::20, 9:] = 0
    return mask


def all_but(height: int, width: int, *kept: tuple[int, int]) -> torch.Tensor:
    mask = torch.ones(1, 1, height, width)
    for row, column in kept:
        mask[..., row, column] = 0
    return mask


def solved_directly(picture: torch.Tensor, source: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What `membrane` must give, by SciPy's sparse LU in float64."""
    sparse = pytest.importorskip("scipy.sparse")
    linalg = pytest.importorskip("scipy.sparse.linalg")
    height, width = mask.shape[-2:]
    numbers = torch.arange(height * width).view(height, width)
    inside = mask.flatten() > 0.5
    pairs = torch.cat(
        (
            torch.stack((numbers[:, 1:].flatten(), numbers[:, :-1].flatten())),
            torch.stack((numbers[1:].flatten(), numbers[:-1].flatten())),
        ),
        dim=1,
    )
    pairs = torch.cat((pairs, pairs.flip(0)), dim=1)
    pairs = pairs[:, inside[pairs[0]]]  # an equation for each masked pixel
    here, there = pairs.numpy()
    shape = (height * width, height * width)
    ones = torch.ones(pairs.shape[1], dtype=torch.float64).numpy()
    laplacian = sparse.coo_matrix((ones, (here, here)), shape) - sparse.coo_matrix(
        (ones, (here, there)), shape
    )
    laplacian = laplacian.tocsr()[inside.numpy()]
    step = (source.double() - picture.double())[0].flatten(1)  # (3, H * W)
    load = -(laplacian[:, (~inside).numpy()] @ step[:, ~inside].T.numpy())
    result = source.double().flatten(2)
    u = torch.from_numpy(linalg.spsolve(laplacian[:, inside.numpy()].tocsc(), load))
    result[..., inside] = picture.double().flatten(2)[..., inside] + u.view(-1, 3).T
    return result.view(source.shape)


@pytest.mark.parametrize(
    "mask",
    [
        pytest.param(blobs(90, 120, seed=1), id="blobs"),
        pytest.param(blobs(131, 77, seed=2, threshold=-0.8, cell=20), id="large blobs"),
        pytest.param(blobs(64, 64, seed=3, threshold=0.3, cell=1), id="speckle"),
        pytest.param(F.pad(torch.ones(1, 1, 100, 100), (1, 1, 1, 1)), id="square"),
        pytest.param(F.pad(torch.ones(1, 1, 1, 90), (3, 4, 5, 6)), id="stroke"),
        pytest.param(F.pad(torch.ones(1, 1, 1, 1), (3, 4, 5, 6)), id="pixel"),
        pytest.param(maze(80, 100), id="maze"),
        pytest.param(all_but(60, 83, (0, 0), (30, 40), (59, 82)), id="three pixels kept"),
        pytest.param(F.pad(torch.ones(1, 1, 50, 70), (1, 0)), id="all but a column"),
        pytest.param(F.pad(torch.ones(1, 1, 1, 200), (1, 1)), id="row"),
        pytest.param(F.pad(torch.ones(1, 1, 200, 1), (0, 0, 1, 1)), id="column"),
        pytest.param(F.pad(torch.ones(1, 1, 50, 40), (30, 0, 20, 0)), id="corner"),
        pytest.param((torch.arange(60) % 2).float().expand(1, 1, 41, 60), id="comb"),
    ],
)
def test_membrane_equals_a_direct_solution(mask: torch.Tensor) -> None:
    picture, source = pictures(*mask.shape[-2:])
    source = source * 0.5 + torch.linspace(-0.5, 0.5, mask.shape[-1])
    out = membrane(picture, source, mask)
    assert out.shape == picture.shape and out.dtype == picture.dtype
    assert torch.equal(out[(mask == 0).expand_as(out)], source[(mask == 0).expand_as(out)])
    torch.testing.assert_close(out.double(), solved_directly(picture, source, mask), atol=CLOSE, rtol=0)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 999),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    threshold=st.floats(-1.5, 1.5),
    cell=st.integers(1, 12),
)
def test_any_mask_is_solved(seed: int, size: tuple[int, int], threshold: float, cell: int) -> None:
    mask = blobs(*size, seed, threshold, cell)
    if bool(mask.all()) or not bool(mask.any()):
        return
    picture, source = pictures(*size, seed)
    expected = solved_directly(picture, source, mask)
    torch.testing.assert_close(membrane(picture, source, mask).double(), expected, atol=CLOSE, rtol=0)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 999),
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    threshold=st.floats(-1.5, 1.5),
    cell=st.integers(1, 12),
)
def test_the_correction_lies_between_the_least_and_the_largest_step(
    seed: int, size: tuple[int, int], threshold: float, cell: int
) -> None:
    mask = blobs(*size, seed, threshold, cell)
    picture, source = pictures(*size, seed)
    out = membrane(picture, source, mask)
    kept = mask == 0
    assert torch.equal(out[kept.expand_as(out)], source[kept.expand_as(out)])
    if not bool(kept.any()):
        assert torch.equal(out, picture)
        return
    if not bool(mask.any()):
        return
    beside = F.max_pool2d(mask, (3, 1), 1, (1, 0)) + F.max_pool2d(mask, (1, 3), 1, (0, 1)) > 0
    read = (kept & beside)[0, 0]
    step, u = (source - picture)[0, :, read], (out - picture)[0, :, ~kept[0, 0]]  # (3, pixels)
    assert bool((u.amax(1) <= step.amax(1) + CLOSE).all())
    assert bool((u.amin(1) >= step.amin(1) - CLOSE).all())


def test_a_constant_step_is_taken_off_exactly() -> None:
    source = pictures(100, 90)[1]
    offset = torch.tensor([0.25, -0.125, 0.0]).view(1, 3, 1, 1)
    for mask in (blobs(100, 90, seed=4), all_but(100, 90, (99, 0)), maze(100, 90)):
        out = membrane(source + offset, source, mask)
        torch.testing.assert_close(out, source, atol=2e-6, rtol=0)  # a few roundings


def test_steps_that_are_harmonic_continue_inside() -> None:
    rows, columns = torch.linspace(-1, 1, 150)[:, None], torch.linspace(-1, 1, 150)
    fields = (rows + 0.5 * columns, rows**2 - columns**2, rows * columns)  # discretely harmonic as well
    step = torch.stack([field.expand(150, 150) for field in fields])[None]
    picture = pictures(150, 150)[0]
    mask = blobs(150, 150, seed=5, threshold=-0.5, cell=30)
    mask[..., :1], mask[..., -1:], mask[..., :1, :], mask[..., -1:, :] = 0, 0, 0, 0
    torch.testing.assert_close(membrane(picture, picture + step, mask), picture + step, atol=CLOSE, rtol=0)


def test_the_pictures_border_is_free() -> None:
    source = torch.full((1, 3, 40, 30), 0.5)
    source[..., 20:, :] = -0.5
    mask = torch.ones_like(source[:, :1])
    mask[..., 0, :], mask[..., 20:, :] = 0, 0
    out = membrane(torch.zeros_like(source), source, mask)  # a ramp down the rows, flat along them
    ramp = torch.linspace(0.5, -0.5, 21)[:20, None].expand(1, 3, 20, 30)
    torch.testing.assert_close(out[..., :20, :], ramp, atol=CLOSE, rtol=0)


def test_parts_of_a_mask_do_not_touch_each_other() -> None:
    picture, source = pictures(80, 120)
    left, right = torch.zeros(2, 1, 1, 80, 120)
    left[..., 10:60, 5:50], right[..., 30:, 52:90] = 1, 1
    both = membrane(picture, source, left + right)
    for mask in (left, right):
        alone = membrane(picture, source, mask)
        torch.testing.assert_close(both * mask, alone * mask, atol=2 * CLOSE, rtol=0)


def test_masks_over_everything_and_nothing() -> None:
    picture, source = pictures(20, 30)
    assert torch.equal(membrane(picture, source, torch.ones(1, 1, 20, 30)), picture)
    assert torch.equal(membrane(picture, source, torch.zeros(1, 1, 20, 30)), source)


def test_only_the_pictures_pixels_around_the_mask_matter() -> None:
    picture, source = pictures(90, 110)
    mask = blobs(90, 110, seed=8, threshold=1.5, cell=12)
    near = dilate(mask, 1)
    assert near.mean() < 0.9
    other = torch.where(near > 0, picture, 50.0)
    before = [tensor.clone() for tensor in (picture, source, mask)]
    out = membrane(picture, source, mask)
    torch.testing.assert_close(membrane(other, source, mask), out, atol=CLOSE, rtol=0)
    for tensor, copy in zip((picture, source, mask), before, strict=True):
        assert torch.equal(tensor, copy)


@settings(max_examples=30, deadline=None)
@given(height=st.integers(1, 20), width=st.integers(1, 20), seed=st.integers(0, 99))
def test_restriction_is_the_transpose_of_the_interpolation(height: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    fine = torch.randn((1, 1, height, width), generator=generator, dtype=torch.float64)
    size = (-(-height // 2), -(-width // 2))
    coarse = torch.randn((1, 1, *size), generator=generator, dtype=torch.float64)
    up = F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False)[..., :height, :width]
    down = module._restricted(fine)
    assert down.shape == coarse.shape
    torch.testing.assert_close((down * coarse).sum(), (fine * up).sum())


def test_few_iterations_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    picture, source = pictures(400, 300)
    monkeypatch.setattr(module, "MOST_ITERATIONS", 12)
    for mask in (blobs(400, 300, 6, cell=60), maze(400, 300), all_but(400, 300, (0, 0), (200, 299))):
        few = membrane(picture, source, mask)
        with monkeypatch.context() as more:
            more.setattr(module, "MOST_ITERATIONS", 100)
            torch.testing.assert_close(few, membrane(picture, source, mask), atol=CLOSE, rtol=0)


def test_what_does_not_fit_is_refused() -> None:
    picture, source = pictures(20, 30)
    mask = torch.ones(1, 1, 20, 30)
    with pytest.raises(ValueError, match="twice"):
        membrane(picture, source[..., 1:], mask)
    with pytest.raises(ValueError, match="twice"):
        membrane(picture[:, :1], source[:, :1], mask)
    with pytest.raises(ValueError, match="a mask of shape"):
        membrane(picture, source, mask[..., 1:])


@pytest.mark.cuda
def test_a_gpu_gives_the_same() -> None:
    picture, source = pictures(200, 150)
    mask = blobs(200, 150, seed=7, cell=30)
    out = membrane(picture.cuda(), source.cuda(), mask.cuda())
    torch.testing.assert_close(out.cpu(), membrane(picture, source, mask), atol=CLOSE, rtol=0)
