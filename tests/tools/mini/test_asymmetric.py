"""The mask-conditioned decoder's recipe: what is trained, from what start, on which masks; its figures."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from msbd.loading.parts import load_net
from msbd.loading.seam import read_seam_decoder
from nets.asymmetric_vae import AsymmetricAutoencoderKL
from nets.vae import AutoencoderKL
from tools.mini import __main__, asymmetric, figures
from tools.mini.asymmetric import (
    PASSAGE,
    TRAINED,
    AsymmetricPart,
    fit_condition,
    loss_weight,
    passage,
    random_mask,
)
from tools.mini.train import checkpoint_of, train, trained
from tools.scenes.data import StoredPictures
from weights.registry import MINI

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> AsymmetricPart:
    """The part on a few smooth pictures, with batches of three."""
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.uniform(0, 255, (6, 3, 9, 9)))
    images = torch.nn.functional.interpolate(coarse, (128, 128), mode="bilinear").byte()
    few = StoredPictures(images.permute(0, 2, 3, 1).numpy(), ["a ball"] * 6)
    for name in ("training_pictures", "stage_pictures", "abstract_pictures"):
        monkeypatch.setattr(asymmetric, name, lambda: few)
    return AsymmetricPart()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_only_the_fine_end_and_the_condition_are_trained(part: AsymmetricPart) -> None:
    names = {name: parameter.requires_grad for name, parameter in part.net.named_parameters()}
    assert all(trained == name.startswith(TRAINED) for name, trained in names.items())
    assert all(any(name.startswith(start) for name in names) for start in TRAINED)
    values = sum(p.numel() for p in part.net.parameters() if p.requires_grad)
    assert 2 * values < 1_600_000  # bytes in float16
    loss, found = part.loss(generator())
    loss.backward()
    assert loss.isfinite() and all(math.isfinite(value) for value in found.values())
    assert all((p.grad is not None) == p.requires_grad for p in part.net.parameters())


def test_the_loss_of_a_step_is_the_same_again(part: AsymmetricPart) -> None:
    first, second, other = (part.loss(generator(seed))[0].item() for seed in (1, 1, 2))
    assert first == second != other


def test_it_starts_as_the_bundle_s_vae_and_its_condition_gives_the_decoder_s_features(
    part: AsymmetricPart,
) -> None:
    vae = load_net(MINI / "vae.safetensors").float()
    net, pictures = part.net, part._pictures(6, 64, generator())
    mask = torch.zeros(6, 1, 64, 64)
    mask[..., 20:50, 10:40] = 1
    with torch.no_grad():
        latent = vae.encode(pictures).mean
        plain = vae.decode(latent)
        assert torch.equal(net.decode(latent), plain)
        before = (net.decode(latent, pictures, mask) - plain).abs().mean()
        fit_condition(net, pictures)
        after = (net.decode(latent, pictures, mask) - plain).abs().mean()
    assert after < 0.6 * before


def test_masks_are_of_every_size_and_whole_only_where_asked() -> None:
    masks = torch.stack([random_mask(64, generator(seed)) for seed in range(200)])
    assert masks.shape == (200, 1, 64, 64) and masks.unique().tolist() == [0, 1]
    shares = masks.mean(dim=(1, 2, 3))
    assert (
        5 <= (shares == 1).sum() <= 25
        and (shares < 0.05).sum() > 5
        and ((shares > 0.2) & (shares < 0.8)).sum() > 60
    )
    assert torch.equal(random_mask(64, generator(3)), random_mask(64, generator(3)))
    assert not any(bool((random_mask(64, generator(seed), whole=False) == 1).all()) for seed in range(60))


def test_the_seam_weighs_most_and_the_inside_more_than_the_outside() -> None:
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., :, 32:] = 1
    row = loss_weight(mask)[0, 0, 5]
    assert row.tolist() == [1.0] * 24 + [4.0] * 8 + [8.0] * PASSAGE + [4.0] * (8 - PASSAGE) + [2.0] * 24


def test_an_edited_latent_is_new_in_the_cells_and_the_source_s_elsewhere(
    part: AsymmetricPart, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, new = part._pictures(4, 64, generator()).chunk(2)
    cells = torch.zeros(2, 1, 8, 8)
    cells[..., 3:5, 3:6] = 1
    with torch.no_grad():
        kept, wanted = (part.net.encode(picture).mode() for picture in (source, new))
        off = part._edited_latent(source, new, cells, generator())
        monkeypatch.setattr(torch, "randn", lambda *size, **_: torch.zeros(*size))
        found = part._edited_latent(source, new, cells, generator())
    torch.testing.assert_close(found, torch.lerp(kept, wanted, cells))
    assert 0 < (off - found).abs().mean() < 0.2


def test_a_foreign_edit_passes_from_the_source_to_what_is_new() -> None:
    mask = torch.zeros(1, 1, 40, 40)
    mask[..., :, 20:] = 1
    row = passage(mask)[0, 0, 7]
    assert row[:21].sum() == 0 and row[20 + PASSAGE :].min() == 1
    assert (row[20 : 20 + PASSAGE + 1].diff() > 0).all()
    assert passage(torch.ones(1, 1, 9, 9)).min() == 1  # beyond the picture's border it goes on


def test_it_trains_resumes_and_is_exported(
    part: AsymmetricPart, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tools.mini.export import export

    monkeypatch.setenv("MSBD_RUNS", str(tmp_path))
    monkeypatch.setattr(
        AsymmetricPart, "recipe", asymmetric.Recipe(steps=2, batch=3, learning_rate=1e-3, warmup=1)
    )
    net = train(AsymmetricPart(), device=CPU)
    assert checkpoint_of("asymmetric").is_file()
    assert torch.equal(
        trained(AsymmetricPart(), device=CPU).decoder.conv_out.weight, net.decoder.conv_out.weight
    )
    path = export(["asymmetric"], tmp_path / "out")[-1]
    vae = load_net(MINI / "vae.safetensors")
    found = read_seam_decoder(path, vae)
    assert found.config == net.config and path.stat().st_size < 1_600_000
    torch.testing.assert_close(
        found.decoder.conv_out.weight.float(), net.decoder.conv_out.weight, atol=1e-3, rtol=1e-3
    )


def test_the_command_offers_it() -> None:
    for job in ("train", "export"):
        arguments = __main__.build_parser().parse_args([job, "--part", "asymmetric"])
        assert AsymmetricPart.name in arguments.part
    assert AsymmetricPart.name == __main__.ASYMMETRIC


class Perfect(AsymmetricAutoencoderKL):
    """A decoder that gives what is kept to a level of 255, and grey inside."""

    def decode(self, latent: Tensor, image: Any = None, mask: Any = None) -> Tensor:
        return image * (1 - mask) + 1 / 127.5


def test_figures_of_a_decoder_that_keeps_what_is_kept(part: AsymmetricPart) -> None:
    vae: AutoencoderKL = load_net(MINI / "vae.safetensors").float()
    perfect = Perfect(part.net.config)
    found = {figure.name: figure.value for figure in figures.seam_figures(vae, perfect, 2, size=64)}
    assert found["seam decoder, ring"] > 45 and 15 < found["plain decoder, ring"] < 40
    assert (
        found["seam decoder, step, perfect edits"] > found["plain decoder, step, perfect edits"]
    )  # grey inside
    assert found["plain decoder, step, foreign edits"] > 2 * abs(found["plain decoder, step, perfect edits"])
