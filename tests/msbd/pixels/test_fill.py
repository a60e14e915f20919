import numpy as np
import torch

from msbd.pixels.fill import fill_hidden


def picture(size: tuple[int, int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    image = torch.from_numpy(rng.random((1, 3, *size)).astype(np.float32))
    visible = torch.from_numpy(rng.random((1, 1, *size)) > 0.8)
    return image, visible


def test_what_is_visible_stays_and_what_is_hidden_does_not_matter() -> None:
    for size in ((1, 1), (1, 9), (7, 5), (16, 16), (33, 70)):
        image, visible = picture(size)
        visible[..., 0, 0] = True
        filled = fill_hidden(image, visible)
        assert torch.equal(torch.where(visible, filled, 0), torch.where(visible, image, 0))
        others = torch.where(visible, image, 1e6)
        assert torch.equal(fill_hidden(others, visible), filled)
        seen = image[:, :, visible[0, 0]]
        assert bool((filled >= seen.amin() - 1e-5).all()) and bool((filled <= seen.amax() + 1e-5).all())


def test_near_colours_are_taken_before_far_ones() -> None:
    image = torch.zeros(1, 3, 64, 64)
    image[..., :16], image[..., 48:] = 1, -1
    visible = torch.zeros(1, 1, 64, 64, dtype=torch.bool)
    visible[..., :16], visible[..., 48:] = True, True
    filled = fill_hidden(image, visible)
    assert bool((filled[..., 16:24] == 1).all()) and bool((filled[..., 40:48] == -1).all())


def test_all_or_nothing_visible() -> None:
    image, visible = picture((8, 8))
    assert fill_hidden(image, torch.ones_like(visible)) is image
    assert bool((fill_hidden(image, torch.zeros_like(visible)) == 0).all())
