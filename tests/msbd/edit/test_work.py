"""What makes an edit cheaper: other solvers, tiles sampled jointly, candidates dropped half-way, presets."""

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from msbd.edit.config import DEFAULT, EditConfig, Sampler
from msbd.edit.config import FAST as FAST_PRESET
from msbd.edit.plan import plan_edit
from msbd.pixels.box import Box
from msbd.pixels.masks import feather
from msbd.pixels.resize import resize, take
from nets.tiled_vae import TiledAutoencoder
from samplers.schedule import make_alphas_cumprod, make_betas
from tests.helpers.edit_scene import FAST, IMAGE, MASK, rectangle, shown
from tests.helpers.tiny import SPEC, Recorder, TinyNet, latent_pipeline, pixel_pipeline, tiny_vae

ALPHAS = make_alphas_cumprod(make_betas())


# ---- solvers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", get_args(Sampler))
@pytest.mark.parametrize("tiles", ["separate", "joint"])
def test_every_solver_paints_inside_the_mask_only(sampler: Any, tiles: Any) -> None:
    config = replace(FAST, sampler=sampler, tiles=tiles, num_steps=6)
    result = latent_pipeline()(IMAGE, MASK, "a house", config=config).image
    changed = (result != IMAGE).any(dim=1, keepdim=True)
    assert changed[MASK == 1].float().mean() > 0.9 and not changed[MASK == 0].any()
    assert torch.isfinite(result).all()


@pytest.mark.parametrize("sampler", get_args(Sampler))
def test_every_solver_paints_the_target(sampler: Any) -> None:
    result = pixel_pipeline()(IMAGE, MASK, "", config=replace(FAST, sampler=sampler, num_steps=6))
    inner = result.image[..., 60:150, 50:160]
    assert (inner - torch.tensor([0.5, -0.5, 0.0]).view(1, 3, 1, 1)).abs().max() < 2e-3


def test_steps_are_repeated_where_the_layout_is_decided_only() -> None:
    config = replace(FAST, num_steps=10, repaint_steps=3, repaint_end=0.5)
    first, *_ = latent_pipeline().plan(MASK, config).stages
    asked = [evaluation.t for evaluation in first.schedule]
    assert asked == [t for t in range(901, 0, -100) for _ in range(4 if t >= 500 else 1)]
    assert [e.a_t for e in first.schedule[1:]] == [
        e.a_prev if e.renoise_to is None else e.renoise_to for e in first.schedule[:-1]
    ]


@pytest.mark.parametrize(
    "option",
    [{"sampler": "euler"}, {"spacing": "trailing"}, {"repaint_end": 0.3}, {"tiles": "joint"}],
    ids=str,
)
def test_the_official_formulas_have_no_such_option(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected .*, as formulas is official"):
        EditConfig(formulas="official", repaint_jump=0, **option)


# ---- joint tiles -------------------------------------------------------------------------------------------


class Pointwise(TinyNet):
    """A denoiser that sees no neighbours: tiles then change nothing."""

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return torch.tanh(0.5 * x + context.mean())


def test_joint_tiles_are_the_whole_where_the_net_sees_no_neighbours() -> None:
    config = replace(FAST, grid_startstep=FAST.upscale_startstep)
    tiled = pixel_pipeline(unet=Pointwise())(IMAGE, MASK, "", config=replace(config, tiles="joint"))
    whole = pixel_pipeline(unet=Pointwise())(IMAGE, MASK, "", config=replace(config, tile=208))
    assert len(tiled.plan.stages[-1].boxes) > 1 and len(whole.plan.stages[-1].boxes) == 1
    torch.testing.assert_close(tiled.image, whole.image, rtol=0, atol=1e-5)


def test_joint_tiles_agree_where_separate_ones_drift_apart() -> None:
    """A net that paints each tile in its mean colour: apart, each keeps its own."""

    class Meaning(TinyNet):
        def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
            a = ALPHAS[int(t)].float()
            x0 = (x / a.sqrt()).mean(dim=(2, 3), keepdim=True).clamp(-0.9, 0.9)
            return (x - a.sqrt() * x0) / (1 - a).sqrt()

    def spread(tiles: Any) -> float:
        config = replace(FAST, tiles=tiles, num_steps=20, first_stage_batch=1, grid_overlap=16)
        result = pixel_pipeline(unet=Meaning())(IMAGE, MASK, "", config=config)
        inner = result.image[..., 50:160, 40:170]
        return inner.diff(dim=-1).abs().mean().item()

    assert spread("joint") < 0.8 * spread("separate")


def test_joint_tiles_are_counted_and_seen_one_by_one() -> None:
    net = Recorder(TinyNet())
    steps: list[tuple[int, int]] = []
    result = latent_pipeline(unet=net)(
        IMAGE, MASK, "", config=replace(FAST, tiles="joint", tile_batch=2),
        on_step=lambda step: steps.append((step.step, step.total)) if step.task == "sample" else None,
    )  # fmt: skip
    last = result.plan.stages[-1]
    assert last.joint and last.windows == (Box(0, 0, *last.size),)
    assert sum(len(batch) for batch in net.batches) == result.plan.evaluations
    assert steps[-1] == (last.evaluations, last.evaluations)
    assert max(len(batch) for batch in net.batches[-4:]) <= 2


def test_joint_tiles_are_halved_where_memory_runs_out() -> None:
    result = latent_pipeline(unet=Recorder(TinyNet(), failures=1))(
        IMAGE, MASK, "", config=replace(FAST, tiles="joint", first_stage_batch=1)
    )
    plain = latent_pipeline()(IMAGE, MASK, "", config=replace(FAST, tiles="joint", first_stage_batch=1))
    assert any("out of memory" in note for note in result.notes)
    torch.testing.assert_close(result.image, plain.image, rtol=0, atol=2 / 255)


# ---- candidates --------------------------------------------------------------------------------------------


class Likes:
    """A CLIP that likes what is bright; it notes how many pictures it saw."""

    def __init__(self) -> None:
        self.logit_scale = torch.tensor(0.0)
        self.seen = 0

    def encode_image(self, pixels: Tensor) -> Tensor:
        self.seen += len(pixels)
        brightness = pixels.mean(dim=(1, 2, 3))
        return torch.stack([brightness, torch.ones_like(brightness)], 1)

    def encode_text(self, ids: Tensor) -> Tensor:
        return torch.tensor([[1.0, 0.0]])


def test_candidates_are_dropped_half_way_by_clip() -> None:
    clip, net = Likes(), Recorder(TinyNet())
    config = replace(FAST, first_stage_batch=5, candidates_kept=2, num_steps=6, repaint_steps=0)
    pipeline = latent_pipeline(unet=net, clip=clip)
    result = pipeline(IMAGE, MASK, "", config=config)
    first = result.plan.stages[0]
    assert first.halfway == 3 and first.evaluations == 3 * 5 + 3 * 2
    assert [len(batch) for batch in net.batches[:6]] == [5, 5, 5, 2, 2, 2]
    assert result.scores is not None and clip.seen == 5 + 2
    assert len(result.candidates) == len(result.scores) == 2
    everyone = latent_pipeline(clip=Likes())(IMAGE, MASK, "", config=replace(config, candidates_kept=None))
    # What goes on is what it would have become among all of them.
    for candidate in result.candidates:
        assert min((candidate - other).abs().max() for other in everyone.candidates) < 1e-4


def test_without_a_clip_the_first_candidates_go_on() -> None:
    config = replace(FAST, first_stage_batch=3, candidates_kept=1, repaint_steps=0)
    result = latent_pipeline()(IMAGE, MASK, "", config=config)
    assert len(result.candidates) == 1 and result.chosen == 0


def test_candidates_are_not_dropped_where_clip_is_not_to_choose() -> None:
    config = replace(FAST, first_stage_batch=3, candidates_kept=1, repaint_steps=0, clip_reranking=False)
    clip = Likes()
    result = latent_pipeline(clip=clip)(IMAGE, MASK, "", config=config)
    assert len(result.candidates) == 3 and clip.seen == 0


def test_candidates_are_not_dropped_where_there_is_no_half_way() -> None:
    config = replace(FAST, first_stage_batch=3, candidates_kept=1, repaint_steps=0, num_steps=1)
    result = latent_pipeline(clip=Likes())(IMAGE, MASK, "", config=config)
    assert len(result.candidates) == 3 and len(result.plan.stages[0].schedule) == 1


@pytest.mark.parametrize("kept", [3, 7])
def test_keeping_as_many_as_there_are_drops_none(kept: int) -> None:
    config = replace(FAST, first_stage_batch=3, candidates_kept=kept)
    plan = latent_pipeline().plan(MASK, config)
    assert plan.stages[0].kept == 3 and plan.evaluations == latent_pipeline().plan(
        MASK, replace(config, candidates_kept=None)
    ).evaluations  # fmt: skip


# ---- presets -----------------------------------------------------------------------------------------------


def test_the_presets_are_as_cheap_as_promised() -> None:
    """`default` in a fifth of `paper`'s evaluations, in `fast` 16 of the first stage for a candidate."""
    mask = rectangle(384, 384, Box(60, 80, 200, 180))
    work = {
        name: plan_edit(mask, EditConfig(**options), SPEC, ALPHAS)
        for name, options in (("paper", {}), ("default", DEFAULT), ("fast", FAST_PRESET))
    }
    assert EditConfig() == EditConfig.default(**{name: getattr(EditConfig(), name) for name in DEFAULT})
    assert work["default"].evaluations <= work["paper"].evaluations / 5
    assert len(work["fast"].stages[0].schedule) <= 16
    assert work["fast"].evaluations < work["default"].evaluations


def test_a_seam_that_the_model_has_no_decoder_for_is_refused() -> None:
    with pytest.raises(
        ValueError, match="seam is asymmetric, but this pipeline was loaded without such a decoder"
    ):
        latent_pipeline()(IMAGE, MASK, "", config=replace(FAST, decoder_optimization=True, seam="asymmetric"))


def test_no_decoder_optimization_is_no_seam() -> None:
    pipeline = latent_pipeline()
    assert pipeline.plan(MASK, FAST).config.seam == "none"
    none = replace(FAST, decoder_optimization=True, seam="none")
    _, plain = shown(pipeline, FAST)
    _, named = shown(pipeline, none)
    assert all(torch.equal(plain[name], named[name]) for name in plain)


def test_a_membrane_is_the_source_around_the_mask() -> None:
    result, pictures = shown(latent_pipeline(), replace(FAST, decoder_optimization=True, seam="membrane"))
    for stage in result.plan.stages:
        source = resize(take(IMAGE, result.plan.crop), stage.size)
        outside = 1 - stage.mask
        assert torch.equal(pictures[f"{stage.name}, result"] * outside, source * outside)


def test_a_membrane_meets_the_edge_and_leaves_the_inside() -> None:
    base = EditConfig.default(num_steps=2, first_stage_batch=1, guidance_scale=1.0, upscaling_mode="bilinear")
    found = {
        (seam, reach): shown(latent_pipeline(), replace(base, seam=seam, membrane_reach=reach))
        for seam, reach in (("none", 6), ("membrane", 6), ("membrane", 0))
    }
    last = found["none", 6][0].plan.stages[-1]
    plain, faded, whole = (pictures[f"{last.name}, result"] for _, pictures in found.values())
    depth = feather(last.mask, 6)
    deep, edge = (depth == 1).expand_as(plain), ((depth > 0) & (depth < 0.1)).expand_as(plain)
    assert deep.any() and torch.equal(faded[deep], plain[deep])
    step = (whole - plain)[edge].abs()
    assert step.mean() > 0.05 and (whole - faded)[edge].abs().mean() < 0.03 * step.mean()


def test_a_whole_stage_too_large_for_the_autoencoder_is_decoded_in_small_tiles() -> None:
    vae = tiny_vae()
    asked: list[dict[str, Any]] = []

    class Full(nn.Module):
        """An autoencoder for whole stages that runs out of memory unless its maps lie on the CPU."""

        def __init__(self, **settings: Any) -> None:
            super().__init__()
            asked.append(settings)
            self.config, self.downscale = vae.config, vae.downscale
            self.tiled = None if not settings else TiledAutoencoder(vae, **settings)

        def decode(self, latent: Tensor) -> Tensor:
            if self.tiled is None:
                raise torch.OutOfMemoryError("out of memory")
            return self.tiled.decode(latent)

        def encode(self, image: Tensor) -> Any:
            return vae.encode(image)

    config = replace(FAST, tiles="joint")
    plain = latent_pipeline(vae=vae)(IMAGE, MASK, "", config=config)
    result = latent_pipeline(vae=vae, tiled_vae=Full)(IMAGE, MASK, "", config=config)
    assert asked == [{}, {"encoder_tile": 256, "decoder_tile": 32, "storage": "cpu"}]
    assert any("out of memory in the autoencoder, went on in small tiles" in note for note in result.notes)
    torch.testing.assert_close(result.image, plain.image, rtol=0, atol=2 / 255)
