import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from msbd.edit.decoder_opt import Segment, optimize_decoder, ring_segments
from msbd.edit.official import reencoded_segment
from nets.vae import AutoencoderKL, IdentityAutoencoder, VAEConfig
from tests.helpers.goldens import Golden, load_golden, relative_error
from tests.helpers.seeded_weights import seeded_state_dict
from tests.helpers.tiny import tiny_vae as f8_vae

CONFIG = VAEConfig(block_out_channels=(32, 64), layers_per_block=1, mid_attention=True)


def diffusers_name(ldm: str, levels: int = 2) -> str:
    """The LDM key of a VAE, as this net calls it (manifests/map_vae_ldm_to_diffusers.json,
    for any number of levels).
    """
    name = (
        ldm.removeprefix("first_stage_model.")
        .replace("norm_out", "conv_norm_out")
        .replace("nin_shortcut", "conv_shortcut")
    )
    name = name.replace("mid.block_1", "mid_block.resnets.0").replace("mid.block_2", "mid_block.resnets.1")
    name = name.replace("mid.attn_1.norm", "mid_block.attentions.0.group_norm")
    for old, new in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")):
        name = name.replace(f"mid.attn_1.{old}.", f"mid_block.attentions.0.{new}.")
    for level in range(levels):
        name = name.replace(f"down.{level}.block.", f"down_blocks.{level}.resnets.")
        name = name.replace(f"down.{level}.downsample.", f"down_blocks.{level}.downsamplers.0.")
        name = name.replace(f"up.{level}.block.", f"up_blocks.{levels - 1 - level}.resnets.")
        name = name.replace(f"up.{level}.upsample.", f"up_blocks.{levels - 1 - level}.upsamplers.0.")
    return name


def golden_vae(golden: Golden) -> AutoencoderKL:
    vae = AutoencoderKL(CONFIG)
    weights = golden.meta["weights"]
    state = {diffusers_name(k): v for k, v in seeded_state_dict(weights["shapes"], weights["seed"]).items()}
    own = vae.state_dict()
    vae.load_state_dict({name: value.reshape(own[name].shape) for name, value in state.items()})
    return vae


def tiny_vae(seed: int = 0) -> AutoencoderKL:
    torch.manual_seed(seed)
    return AutoencoderKL(
        VAEConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, mid_attention=False)
    )


def tiny_segment(seed: int = 0, size: int = 16, weight: Tensor | None = None) -> Segment:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(1, 1, size, size)
    mask[..., 4:10, 4:10] = 1
    latent = 0.18 * torch.randn((1, 4, size // 2, size // 2), generator=generator)
    return Segment(latent, torch.rand((1, 3, size, size), generator=generator) * 2 - 1, mask, weight)


def loss_of(
    vae: AutoencoderKL, original: AutoencoderKL, segment: Segment, background_weight: float = 100
) -> float:
    """Eq. 1 written out, as means over all elements."""
    latent = segment.latent / vae.config.scaling_factor
    with torch.no_grad():
        out, x_out, mask = vae.decode(latent), original.decode(latent), segment.mask
        edit = (mask * (out - x_out) ** 2).mean()
        background = ((1 - mask) * (out - segment.reference) ** 2).mean()
    return float(edit + background_weight * background)


def test_official_decoder_optimisation_matches_golden() -> None:
    golden = load_golden("msbd", "decoder_opt_a")
    vae = golden_vae(golden)
    segment = reencoded_segment(vae, golden["in.sample"], golden["in.reference"], golden["in.mask"])
    with torch.no_grad():
        before = vae.decode(segment.latent / vae.config.scaling_factor)
    if golden["out.before"].min() >= 0:
        before = (before / 2 + 0.5).clamp(0, 1)
    assert relative_error(before, golden["out.before"]) <= 1e-4
    tuned = optimize_decoder(
        vae,
        [segment],
        steps=golden.meta["iterations"],
        lr=golden.meta["learn_rate"],
        background_weight=golden.meta["background_preserve_weight"],
    )
    with torch.no_grad():
        after = tuned.decode(segment.latent / vae.config.scaling_factor)
    # Adam amplifies rounding: the reference itself moves by 2.6e-4 between float32 and float64.
    assert relative_error((after / 2 + 0.5).clamp(0, 1), golden["out.optimised_01"]) <= 1e-3


def test_the_given_vae_is_never_touched_even_by_a_failure() -> None:
    vae = tiny_vae().requires_grad_(False)
    vae.encoder.requires_grad_(True)
    before, flags = copy.deepcopy(vae.state_dict()), [p.requires_grad for p in vae.parameters()]

    def fail(step: int, loss: float) -> None:
        if step == 1:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        optimize_decoder(vae, [tiny_segment()], steps=3, lr=1e-2, on_step=fail)
    optimize_decoder(vae, [tiny_segment()], steps=3, lr=1e-2)
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())
    assert [p.requires_grad for p in vae.parameters()] == flags
    assert all(p.grad is None for p in vae.parameters())


def test_only_the_decoder_changes_and_nothing_requires_grad_afterwards() -> None:
    vae = tiny_vae()
    tuned = optimize_decoder(vae, [tiny_segment()], steps=2)
    changed = {
        name for name, value in tuned.state_dict().items() if not torch.equal(value, vae.state_dict()[name])
    }
    assert changed == {name for name in vae.state_dict() if name.startswith("decoder.")}
    assert not any(p.requires_grad for p in tuned.parameters())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_optimisation_lowers_equation_1_also_without_gradients_around_it(context: type) -> None:
    vae, losses = tiny_vae(), []
    with context():
        segment = tiny_segment()
        tuned = optimize_decoder(
            vae, [segment], steps=30, lr=1e-3, on_step=lambda step, loss: losses.append(loss)
        )
    assert losses[0] == pytest.approx(loss_of(vae, vae, segment), rel=1e-4)
    assert loss_of(tuned, vae, segment) < losses[-1] < 0.9 * losses[0]


def test_segments_share_one_loss_normalised_over_all_of_them() -> None:
    vae, losses = tiny_vae(), []
    first, second = tiny_segment(1), tiny_segment(2, size=32)
    optimize_decoder(vae, [first, second], steps=1, on_step=lambda step, loss: losses.append(loss))
    expected = (loss_of(vae, vae, first) * 16**2 + loss_of(vae, vae, second) * 32**2) / (16**2 + 32**2)
    assert losses[0] == pytest.approx(expected, rel=1e-4)


def test_a_segment_twice_at_half_weight_each_steps_like_once() -> None:
    vae, segment = tiny_vae(), tiny_segment()
    once = optimize_decoder(vae, [segment], steps=3, lr=1e-3)
    twice = optimize_decoder(vae, [segment, segment], steps=3, lr=1e-3)
    for a, b in zip(once.parameters(), twice.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_weight_zero_silences_an_error() -> None:
    weight = torch.zeros(1, 1, 16, 16)
    losses = []
    optimize_decoder(
        tiny_vae(), [tiny_segment(weight=weight)], steps=1, on_step=lambda step, loss: losses.append(loss)
    )
    assert losses == [0.0]


def test_a_pixel_space_autoencoder_has_nothing_to_optimise() -> None:
    picture = torch.rand(1, 3, 8, 8)
    vae = optimize_decoder(IdentityAutoencoder(), [Segment(picture, picture, torch.ones(1, 1, 8, 8))])
    assert torch.equal(vae.decode(picture), picture)


def test_bad_segments_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one segment"):
        optimize_decoder(tiny_vae(), [])
    good = tiny_segment()
    with pytest.raises(ValueError, match="sizes differ"):
        optimize_decoder(tiny_vae(), [Segment(good.latent, good.reference[..., :8], good.mask)])


class SmallMemory(AutoencoderKL):
    """Runs out of memory when it decodes more than `cells` latent cells with gradients."""

    cells = 256

    def decode(self, latent: Tensor) -> Tensor:
        if torch.is_grad_enabled() and latent.shape[-1] * latent.shape[-2] > self.cells:
            raise torch.OutOfMemoryError("pretended")
        return super().decode(latent)


def test_segments_are_halved_until_they_fit_into_memory() -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4}
    vae = SmallMemory(VAEConfig(**sizes, mid_attention=False))
    segment = tiny_segment(size=64)  # 32 x 32 cells
    splits: list[None] = []
    losses: list[float] = []
    tuned = optimize_decoder(
        vae,
        [segment],
        steps=4,
        lr=1e-3,
        on_step=lambda _, loss: losses.append(loss),
        on_split=lambda: splits.append(None),
    )
    assert len(splits) == 2 and len(losses) == 4 and losses[-1] < losses[0]
    with torch.no_grad():
        before, after = (
            ((1 - segment.mask) * (net.decode(segment.latent / 0.18215) - segment.reference) ** 2).sum()
            for net in (vae, tuned)
        )
    assert after < before
    with pytest.raises(torch.OutOfMemoryError):
        vae.cells = 10  # not even the smallest
        optimize_decoder(vae, [segment], steps=1)


def test_batches_shrink_before_segments_do() -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4}

    class OneByOne(AutoencoderKL):
        """No more than two pictures at once."""

        def decode(self, latent: Tensor) -> Tensor:
            if len(latent) > 2:
                raise torch.OutOfMemoryError("pretended")
            return super().decode(latent)

    vae = OneByOne(VAEConfig(**sizes, mid_attention=False))
    splits: list[None] = []
    losses: dict[int, list[float]] = {2: [], 8: []}
    for batch, seen in losses.items():
        optimize_decoder(
            vae, [tiny_segment(size=64)] * 5, steps=2, batch=batch,
            on_step=lambda _, loss, seen=seen: seen.append(loss), on_split=lambda: splits.append(None),
        )  # fmt: skip
    assert not splits and losses[8] == losses[2]


def test_another_error_than_memory_is_not_tried_again() -> None:
    def fail(step: int, loss: float) -> None:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        optimize_decoder(tiny_vae(), [tiny_segment(size=64)], steps=1, on_step=fail)


# ---- cheaper than the papers -------------------------------------------------------------------------------


def test_ring_segments_are_the_crops_on_both_sides_of_the_edge() -> None:
    generator = torch.Generator().manual_seed(3)
    latent, reference = torch.randn(1, 4, 12, 16, generator=generator), torch.zeros(1, 3, 96, 128)
    mask = torch.zeros(1, 1, 96, 128)
    # Row 64 lies on the grid: three crops above and three below; column 80 runs through one more.
    mask[..., :64, :80] = 1
    crops = ring_segments([Segment(latent, reference, mask)], 32, 8)
    assert sorted(crop.mask.mean().item() for crop in crops) == [0, 0, 0, 0.5, 0.5, 1, 1]
    assert all(crop.latent.shape == (1, 4, 4, 4) and crop.reference.shape[-2:] == (32, 32) for crop in crops)
    whole = [Segment(latent, reference, torch.ones_like(mask))]
    assert ring_segments(whole, 32, 8) == whole


def test_batches_follow_the_same_gradient() -> None:
    """Together or one by one, the sum is the same but for rounding; bfloat16 comes close."""
    vae = f8_vae()
    generator = torch.Generator().manual_seed(4)
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 16:] = 1
    segments = [
        Segment(
            torch.randn(1, 4, 4, 4, generator=generator) * vae.config.scaling_factor,
            torch.randn(1, 3, 32, 32, generator=generator).clamp(-1, 1),
            mask,
        )
        for _ in range(3)
    ]

    def losses(**options: Any) -> list[float]:
        seen: list[float] = []
        optimize_decoder(
            vae, segments, steps=8, lr=1e-3, on_step=lambda k, loss: seen.append(loss), **options
        )
        return seen

    alone = losses()
    assert losses(batch=2) == pytest.approx(alone, rel=1e-4)
    assert losses(batch=8, dtype=torch.bfloat16) == pytest.approx(alone, rel=0.05)


def test_it_stops_where_steps_no_longer_help() -> None:
    vae = f8_vae()
    latent = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(5))
    segment = Segment(latent, torch.zeros(1, 3, 32, 32), torch.zeros(1, 1, 32, 32))
    seen: list[float] = []
    optimize_decoder(vae, [segment], steps=200, lr=1e-6, stop=0.5, on_step=lambda k, loss: seen.append(loss))
    assert len(seen) == 11  # hardly anything was gained in the first ten
