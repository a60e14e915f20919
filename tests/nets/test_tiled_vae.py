"""TiledAutoencoder against the net that it tiles, and against what holds of the official code's tiles."""

import copy
import dataclasses
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from msbd.latents import decode, dtype_of, encode
from msbd.loading.parts import load_net
from nets import tiled_vae
from nets.tiled_vae import TiledAutoencoder, VAETile, vae_tiles
from nets.vae import Attention, AutoencoderKL, VAEConfig
from tests.helpers.goldens import Golden, load_golden, relative_error
from tests.helpers.seeded_nets import config_of
from tests.helpers.seeded_weights import load_seeded, seeded_input

SMALL = VAEConfig(block_out_channels=(8, 16, 16), layers_per_block=1, norm_num_groups=4)
TILES: dict[str, Any] = {"encoder_tile": 16, "decoder_tile": 8}
SIZES = [(150, 71), (33, 161), (4, 300)]  # pictures; the first is cut into strips of several rows and a rest
LEVELS = 3.0  # of 255, the mean error of `fast` below; measured 2.4
MINI = Path(__file__).parents[2] / "weights" / "mini" / "vae.safetensors"


def small_vae(config: VAEConfig = SMALL) -> AutoencoderKL:
    vae = AutoencoderKL(config).eval()
    load_seeded(vae, seed=7)
    return vae


def slanted(channels: int, size: tuple[int, int], batch: int = 2) -> Tensor:
    """Noise on a slope, so that strips and tiles differ in mean and not in variance alone."""
    slope = torch.linspace(-2, 2, size[0])[:, None] + torch.linspace(-1, 1, size[1])
    return 0.3 * seeded_input("x", (batch, channels, *size), seed=len(size)) + slope


def outputs(vae: Any, size: tuple[int, int], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A picture of `size` encoded, and a latent of half as many cells decoded."""
    with torch.no_grad():
        moments = vae.encode(slanted(3, size).to(dtype))
        decoded = vae.decode(slanted(4, (max(1, size[0] // 2), size[1] // 2)).to(dtype))
    return {"mean": moments.mean, "logvar": moments.logvar, "decoded": decoded}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_exact_equals_the_untiled_net(size: tuple[int, int], dtype: torch.dtype, tolerance: float) -> None:
    vae = small_vae().to(dtype)
    tiled_net = TiledAutoencoder(vae, encoder_tile=48, decoder_tile=24)
    plain, tiled = outputs(vae, size, dtype), outputs(tiled_net, size, dtype)
    for name in plain:
        assert relative_error(tiled[name], plain[name]) <= tolerance, name


@pytest.mark.parametrize("widths", [(8, 16, 8), (16, 8, 8), (8,)])
def test_exact_equals_the_untiled_net_of_other_shapes(widths: tuple[int, ...]) -> None:
    config = VAEConfig(block_out_channels=widths, norm_num_groups=2, mid_attention=False)
    vae = small_vae(config).double().to(memory_format=torch.channels_last)
    plain = outputs(vae, (97, 35), torch.float64)
    tiled = outputs(TiledAutoencoder(vae, **TILES), (97, 35), torch.float64)
    for name in plain:
        assert relative_error(tiled[name], plain[name]) <= 1e-12, name


def test_exact_in_bfloat16_is_as_near_to_float32_as_the_untiled_net() -> None:
    vae = small_vae()
    truth = outputs(vae, (90, 71))
    half = copy.deepcopy(vae).bfloat16()
    plain = outputs(half, (90, 71), torch.bfloat16)
    tiled = outputs(TiledAutoencoder(half, **TILES), (90, 71), torch.bfloat16)
    for name in truth:
        assert tiled[name].dtype == torch.bfloat16
        assert relative_error(tiled[name], truth[name]) <= 1.5 * relative_error(plain[name], truth[name]), (
            name
        )


def test_statistics_are_pooled_in_float32_over_unequal_strips() -> None:
    x = (50 + slanted(8, (22, 9))).bfloat16()  # five strips of 5 rows and of 2
    norm = torch.nn.GroupNorm(2, 8)
    load_seeded(norm, seed=3)
    scale, shift = tiled_vae._Walk(5, x.device, x.device)._measure(norm, x)
    expected = norm.double()(x.double())
    assert relative_error(x.double() * scale + shift, expected) <= 1e-5


def test_exact_convolves_strips_and_attends_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """What bounds the memory beside the maps."""
    convolved, scores = [], []
    conv2d, attention = F.conv2d, F.scaled_dot_product_attention

    def convolve(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        convolved.append(x.shape[2] * x.shape[3])
        return conv2d(x, *args, **kwargs)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores.append(q.shape[0] * q.shape[2] * k.shape[2])
        return attention(q, k, v)

    vae, latent = small_vae(), slanted(4, (40, 36))
    with torch.no_grad():
        plain = vae.decode(latent)
    monkeypatch.setattr(F, "conv2d", convolve)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    monkeypatch.setattr(tiled_vae, "_SCORES", 100_000)
    decoded = TiledAutoencoder(vae, decoder_tile=16).decode(latent)
    assert relative_error(decoded, plain) <= 1e-5
    assert max(convolved) <= 160 * 144 / 16  # post_quant_conv, on the latent, is the largest
    assert len(scores) > 1 and max(scores) <= 100_000


@given(
    height=st.integers(1, 700),
    width=st.integers(1, 700),
    cells=st.integers(1, 40),
    is_decoder=st.booleans(),
)
def test_tiles_make_up_the_output_and_see_their_pad(
    height: int, width: int, cells: int, is_decoder: bool
) -> None:
    tile, pad = (cells, 11) if is_decoder else (8 * cells, 32)
    if is_decoder:
        height, width = max(1, height // 8), max(1, width // 8)
    convert = (lambda n: n * 8) if is_decoder else (lambda n: n // 8)
    covered = np.zeros((convert(height), convert(width)), int)
    for piece in vae_tiles(height, width, tile, is_decoder=is_decoder):
        covered[piece.target] += 1
        for axis, length in enumerate((height, width)):
            source, crop, target = piece.source[axis], piece.crop[axis], piece.target[axis]
            inner = source.stop - source.start - 2 * pad
            assert 0 <= source.start < source.stop <= length
            assert inner <= tile and crop.stop - crop.start == target.stop - target.start
            assert target.start == convert(source.start) + crop.start
            assert source.start == 0 or crop.start == convert(pad)
            assert source.stop == length or convert(source.stop) - target.stop == convert(pad)
    assert (covered == 1).all()


def edges(pieces: list[VAETile], field: str) -> list[list[int]]:
    """[left, right, top, bottom] of each, as the reference has them."""
    slices = [getattr(piece, field) for piece in pieces]
    return [[columns.start, columns.stop, rows.start, rows.stop] for rows, columns in slices]


def test_tiles_are_those_of_the_reference() -> None:
    cases = load_golden("pasd_helpers", "vae_tile_grid").meta["cases"]
    assert cases
    for case in cases:
        pieces = vae_tiles(case["h"], case["w"], case["tile"], is_decoder=case["is_decoder"])
        assert edges(pieces, "source") == case["input_bboxes"]
        assert edges(pieces, "target") == case["output_bboxes"]


def test_fast_with_the_whole_pictures_statistics_equals_the_untiled_net(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And with a net that sees less far than the pad, so that only the tiling is left to err."""
    monkeypatch.setattr(tiled_vae, "_shrink", lambda x, *_: x)
    config = VAEConfig(block_out_channels=(8, 8), layers_per_block=0, norm_num_groups=2, mid_attention=False)
    vae = small_vae(config).double()
    plain = outputs(vae, (161, 133), torch.float64)
    tiled = outputs(TiledAutoencoder(vae, "fast", **TILES), (161, 133), torch.float64)
    for name in plain:
        assert relative_error(tiled[name], plain[name]) <= 1e-12, name


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_samples_of_a_batch_do_not_see_each_other(mode: Any) -> None:
    tiled = TiledAutoencoder(small_vae(), mode, **TILES)
    image, latent = slanted(3, (90, 71)), slanted(4, (33, 40))
    image[1] *= 3
    latent[1] *= 3
    both = tiled.encode(image).mean, tiled.decode(latent)
    for i in range(2):
        assert relative_error(tiled.encode(image[i : i + 1]).mean, both[0][i : i + 1]) <= 1e-5
        assert relative_error(tiled.decode(latent[i : i + 1]), both[1][i : i + 1]) <= 1e-5


@pytest.mark.parametrize("size", [(4, 300), (300, 5), (82, 82)])
def test_fast_takes_any_shape_and_a_picture_of_one_colour(size: tuple[int, int]) -> None:
    tiled = TiledAutoencoder(small_vae(), "fast", **TILES)
    latent = tiled.encode(torch.full((1, 3, *size), 0.5)).mean
    assert latent.shape == (1, 4, size[0] // 4, size[1] // 4)
    decoded = tiled.decode(latent)
    assert decoded.shape == (1, 3, size[0] // 4 * 4, size[1] // 4 * 4)
    assert torch.isfinite(latent).all() and torch.isfinite(decoded).all()


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_inputs_stay_and_results_have_no_gradient(mode: Any) -> None:
    tiled = TiledAutoencoder(small_vae(), mode, **TILES)
    assert all(parameter.requires_grad for parameter in tiled.parameters())
    image, latent = slanted(3, (90, 71)), slanted(4, (33, 40))
    before = image.clone(), latent.clone()
    results = tiled.encode(image).mean, tiled.decode(latent)
    assert torch.equal(image, before[0]) and torch.equal(latent, before[1])
    assert not any(result.requires_grad for result in results)


@pytest.mark.parametrize(("mode", "size"), [("exact", (80, 80)), ("fast", (80, 80)), ("fast", (60, 20))])
def test_small_pictures_go_through_the_plain_net(mode: Any, size: tuple[int, int]) -> None:
    vae = small_vae()
    tiled = TiledAutoencoder(vae, mode, encoder_tile=16, decoder_tile=18)
    plain, own = outputs(vae, size), outputs(tiled, size)
    assert all(torch.equal(own[name], plain[name]) for name in plain)


def test_the_surface_is_that_of_the_net() -> None:
    vae = small_vae().bfloat16()
    tiled = TiledAutoencoder(vae, **TILES)
    assert tiled.config is vae.config and tiled.downscale == 4
    assert dtype_of(cast(Any, tiled)) == torch.bfloat16
    latent = encode(tiled, slanted(3, (90, 71)))
    assert latent.shape == (2, 4, 22, 17) and latent.dtype == torch.float32
    assert decode(tiled, latent).shape == (2, 3, 88, 68)
    with pytest.raises(ValueError, match=r"\(3, 400\).*at least 4"):
        tiled.encode(torch.zeros(1, 3, 3, 400))


def test_settings_are_changed_by_replace_and_wrong_ones_refused() -> None:
    tiled = TiledAutoencoder(small_vae())
    assert (tiled.mode, tiled.encoder_tile, tiled.decoder_tile) == ("exact", 1024, 224)
    assert dataclasses.replace(tiled, mode="fast", decoder_tile=9).decoder_tile == 9
    for wrong in ({"mode": "quick"}, {"encoder_tile": 18}, {"encoder_tile": 0}, {"decoder_tile": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            dataclasses.replace(tiled, **wrong)
    with pytest.raises(ValueError, match="encoder_tile"):
        vae_tiles(500, 500, 100, is_decoder=False)


class Hook:
    """A stored run of the official VAEHook, its net, and its tiles."""

    def __init__(self, case: str) -> None:
        self.golden: Golden = load_golden("pasd_helpers", case)
        self.meta = self.golden.meta
        self.vae = small_vae(config_of(VAEConfig, self.meta["vae_config"]))
        load_seeded(self.vae, seed=self.meta["weights"]["seed"])
        data = pytest.importorskip("skimage.data")
        picture = torch.from_numpy(data.astronaut()[20:228, 100:276])
        self.image = picture.permute(2, 0, 1)[None].float() / 127.5 - 1
        self.tiles: dict[str, Any] = {key: self.meta[key] for key in ("encoder_tile", "decoder_tile")}

    def distances(self, vae: Any) -> dict[str, float]:
        """How far `vae` is from what VAEHook gave, by the sidecar's names."""
        with torch.no_grad():
            out, stored = self.golden.sampled("out.tiled", vae.decode(self.golden["in.latent"]))
            decoded = (out - stored).abs()
            encoded = (vae.encode(self.image).mean - self.golden["out.enc_mean"]).abs()
        return {
            "plain_vs_tiled_strided_max_abs": decoded.max().item(),
            "plain_vs_tiled_strided_mean_abs": decoded.mean().item(),
            "enc_plain_vs_tiled_max_abs": encoded.max().item(),
        }


@pytest.mark.parametrize("case", ["vaehook_40x48", "vaehook_fast_40x48"])
def test_plain_and_exact_are_as_far_from_the_reference_as_its_own_plain_net(case: str) -> None:
    """What VAEHook gives is not its net's output.

    It averages variances without what the tiles' means differ by, counts padding several times, and in the
    middle attends per tile and normalises twice. None of it is imitated, so its output is not reproduced; its
    distance from the plain net is, by our plain net and by ours in tiles.
    """
    hook = Hook(case)
    for vae in (hook.vae, TiledAutoencoder(hook.vae, **hook.tiles)):
        for name, distance in hook.distances(vae).items():
            assert distance == pytest.approx(hook.meta[name], abs=2e-5), name


def test_fast_equals_the_reference_but_for_its_second_normalisation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles, pads, crops and statistics are the reference's; here the attention normalises once more, too."""
    hook = Hook("vaehook_fast_40x48")
    fast = TiledAutoencoder(hook.vae, "fast", **hook.tiles)
    ours = hook.distances(fast)
    assert ours["plain_vs_tiled_strided_max_abs"] > 0.1 and ours["enc_plain_vs_tiled_max_abs"] > 0.1

    def attend_twice_normalised(walk: Any, block: Attention, x: Tensor) -> Tensor:
        once = walk._normalise(block.group_norm, x, x)
        return x + block(once) - once

    monkeypatch.setattr(tiled_vae._Walk, "_attend", attend_twice_normalised)
    assert max(hook.distances(fast).values()) <= 2e-5


def test_fast_errs_by_a_few_levels_on_the_trained_net() -> None:
    """Worse than on any picture worth tiling, for it is shrunk to less than a half; `exact` does not err."""
    data = pytest.importorskip("skimage.data")
    image = torch.from_numpy(data.astronaut()[:320, :320]).permute(2, 0, 1)[None].float() / 127.5 - 1
    vae = load_net(MINI).float()
    fast = TiledAutoencoder(vae, "fast", encoder_tile=128, decoder_tile=16)
    exact = dataclasses.replace(fast, mode="exact")
    with torch.no_grad():
        latent = vae.encode(image).mean
        decoded = vae.decode(latent)
    levels = 127.5 * (fast.decode(latent).clamp(-1, 1) - decoded.clamp(-1, 1)).abs()
    assert 0 < levels.mean() <= LEVELS
    assert (fast.encode(image).mean - latent).abs().mean() <= 0.05 * latent.std()
    assert relative_error(exact.encode(image).mean, latent) <= 1e-5
    assert relative_error(exact.decode(latent), decoded) <= 1e-5


@pytest.mark.cuda
@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_maps_can_be_stored_off_the_gpu(mode: Any) -> None:
    vae = small_vae().double()
    on_cpu = TiledAutoencoder(vae, mode, **TILES)
    expected = on_cpu.encode(slanted(3, (90, 71)).double()).mean, on_cpu.decode(slanted(4, (33, 40)).double())
    on_gpu = TiledAutoencoder(copy.deepcopy(vae).cuda(), mode, **TILES, storage="cpu")
    mean = on_gpu.encode(slanted(3, (90, 71)).double().cuda()).mean
    decoded = on_gpu.decode(slanted(4, (33, 40)).double().cuda())
    assert mean.is_cuda and decoded.is_cuda
    assert relative_error(mean, expected[0]) <= 1e-12 and relative_error(decoded, expected[1]) <= 1e-12
