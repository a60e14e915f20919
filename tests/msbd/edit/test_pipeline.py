"""Algorithm 1 with tiny nets: what an edit promises, whatever its nets have learned."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from msbd.edit import official
from msbd.edit.config import EditConfig
from msbd.edit.pipeline import EditResult, EditStep
from msbd.edit.plan import stage_mask
from msbd.noise import noise_windows
from msbd.pixels.box import Box
from msbd.pixels.files import to_image, to_pixels
from msbd.pixels.resize import low_pass, resize, take
from samplers.schedule import q_sample
from tests.helpers.edit_scene import FAST, IMAGE, MASK, TARGET, picture, rectangle, shown
from tests.helpers.tiny import ALPHAS, PullTowards, Recorder, TinyNet, latent_pipeline, pixel_pipeline


def ragged_mask(height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return (
        resize(torch.rand(1, 1, height // 8, width // 8, generator=generator), (height, width)) > 0.5
    ).float()


# ---- outside the mask --------------------------------------------------------------------------------------


@pytest.mark.parametrize("feather", [0, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_edit_leaves_every_pixel_outside_the_mask_bit_for_bit(feather: int, dtype: torch.dtype) -> None:
    image, mask = picture(200, 220).to(dtype), ragged_mask(200, 220)
    result = pixel_pipeline()(image, mask, "", config=replace(FAST, feather=feather))
    outside = mask.expand_as(image) == 0
    assert result.image.dtype == dtype and torch.equal(result.image[outside], image[outside])
    assert (result.image[~outside] != image[~outside]).float().mean() > 0.9


@pytest.mark.parametrize("feather", [0, 6])
def test_edit_keeps_8_bit_levels_outside_the_mask(feather: int) -> None:
    mask = ragged_mask(200, 220)
    levels = to_pixels(picture(200, 220))
    levels.reshape(-1)[:256] = range(256)  # every level at least once, and those that truncation would darken
    result = pixel_pipeline()(to_image(levels), mask, "", config=replace(FAST, feather=feather))
    outside = mask[0, 0].numpy() == 0
    assert (to_pixels(result.image)[outside] == levels[outside]).all()
    assert (to_pixels(result.image)[outside] == levels[outside]).all()


def test_feather_fades_inside_the_mask_only() -> None:
    hard = pixel_pipeline()(IMAGE, MASK, "", config=FAST).image
    soft = pixel_pipeline()(IMAGE, MASK, "", config=replace(FAST, feather=20)).image
    torch.testing.assert_close(soft[..., 80:120, 80:120], hard[..., 80:120, 80:120])
    edge = (..., slice(90, 100), slice(30, 33))
    assert (soft[edge] - IMAGE[edge]).abs().mean() < 0.2 * (hard[edge] - IMAGE[edge]).abs().mean()


@pytest.mark.parametrize("kind", [torch.bool, torch.uint8, torch.float64])
def test_edit_takes_masks_of_any_dtype_and_cuts_soft_ones_at_one_half(kind: torch.dtype) -> None:
    config = replace(FAST, feather=5)
    expected = latent_pipeline()(IMAGE, MASK, "", config=config).image
    assert torch.equal(latent_pipeline()(IMAGE, MASK.to(kind), "", config=config).image, expected)
    soft = 0.6 * MASK
    soft[..., 20:30, 50:80] = 0.4  # not edited, at no stage
    assert torch.equal(latent_pipeline()(IMAGE, soft, "", config=config).image, expected)


def test_a_net_that_gives_no_numbers_gives_no_picture() -> None:
    with pytest.raises(ValueError, match="the U-Net gave NaN or infinity in place of a picture"):
        pixel_pipeline((float("nan"), float("inf"), 0.0))(IMAGE, MASK, "", config=FAST)


# ---- pictures of any shape, and diffusion in pixels --------------------------------------------------------


@pytest.mark.parametrize(
    "height, width, boxes",
    [
        (200, 220, [Box(40, 30, 130, 150)]),
        (37, 53, [Box(5, 7, 12, 20)]),
        (40, 600, [Box(18, 30, 5, 500)]),
        (120, 100, [Box(0, 0, 2, 100), Box(118, 0, 2, 100), Box(0, 0, 120, 2), Box(0, 98, 120, 2)]),
        (90, 130, [Box(0, 0, 90, 130)]),
    ],
    ids=["several stages", "37x53", "wide and thin", "all four borders", "whole picture"],
)
def test_pixel_space_diffusion_paints_the_target(height: int, width: int, boxes: list[Box]) -> None:
    """A.2: "also applicable to pixel-space diffusion models": the same pipeline,
    an identity for the autoencoder.
    """
    image, mask = picture(height, width), rectangle(height, width, *boxes)
    config = replace(FAST, decoder_optimization=True)  # nothing to optimise, and that is no error
    result = pixel_pipeline(TARGET)(image, mask, "", config=config)
    inside = mask.expand_as(image) == 1
    target = torch.tensor(TARGET).view(1, 3, 1, 1).expand_as(image)
    error = (result.image - target).abs()
    # shrunk back from an enlarged crop, the border pixels mix with what is around the mask
    assert (error[inside] < 1e-4).float().mean() > (
        0.99 if result.plan.stages[-1].size == result.plan.crop.size else 0.6
    )
    assert torch.equal(result.image[~inside], image[~inside])


def test_edit_of_a_single_pixel() -> None:
    image, mask = picture(60, 80), rectangle(60, 80, Box(33, 41, 1, 1))
    result = pixel_pipeline((0.9, 0.9, -0.9))(image, mask, "", config=FAST).image
    assert (result != image).nonzero()[:, 2:].unique(dim=0).tolist() == [[33, 41]]
    wanted = torch.tensor([0.9, 0.9, -0.9])
    assert (result[0, :, 33, 41] - wanted).abs().sum() < 0.7 * (image[0, :, 33, 41] - wanted).abs().sum()


# ---- algorithm 1: evaluations, timesteps, starts -----------------------------------------------------------


def test_edit_evaluates_the_papers_timesteps() -> None:
    unet = Recorder(PullTowards(list(TARGET)))
    config = EditConfig(upscaling_mode="bilinear", guidance_scale=1.0, tile_batch=1)
    pipeline = pixel_pipeline(unet=unet)
    plan = pipeline.plan(MASK, config)
    pipeline(IMAGE, MASK, "", config=config)
    whole = list(range(981, 0, -20))  # 50 of them
    first, middle, last = plan.stages
    expected = [t for t in whole for _ in range(6)]  # R = 5 repeats after the first evaluation
    expected += list(range(381, 0, -20))  # 0.4 T: 20
    expected += list(range(241, 0, -20)) * len(last.boxes)  # 0.25 T: 13
    assert unet.timesteps == expected
    counts = [50 * 6 * 5, 20, 13 * len(last.boxes)]
    assert [stage.evaluations for stage in plan.stages] == counts
    assert sum(len(batch) for batch in unet.batches) == sum(counts)
    assert [tuple(unet.batches[k].shape) for k in (0, 300, 320)] == [
        (5, 3, *first.size),
        (1, 3, *middle.size),
        (1, 3, *last.boxes[0].size),
    ]


def test_edit_under_guidance_evaluates_prompt_and_negative_prompt_together() -> None:
    unet = Recorder(TinyNet())
    config = replace(FAST, guidance_scale=3.0, negative_prompt="a" * 20, conditional_upscale=False)
    pipeline = latent_pipeline(unet=unet)
    first = len(pipeline.plan(MASK, config).stages[0].schedule)
    pipeline(IMAGE, MASK, "a" * 50, config=config)
    assert all(
        torch.allclose(torch.tensor(c), torch.tensor([0.2, 0.2, 0.5, 0.5])) for c in unet.contexts[:first]
    )
    assert all(set(context) == {0.0} for context in unet.contexts[first:])  # the empty prompt, once
    conditional = Recorder(TinyNet())
    latent_pipeline(unet=conditional)(IMAGE, MASK, "a" * 50, config=replace(config, conditional_upscale=True))
    torch.testing.assert_close(torch.tensor(conditional.contexts[-1]).unique(), torch.tensor([0.2, 0.5]))


def test_first_stage_starts_from_the_noised_source() -> None:
    """Line 4: x_T ~ q(x_T | x~); the official code starts from pure noise."""
    for start_from in ("source", "noise"):
        unet = Recorder(PullTowards(list(TARGET)))
        config = replace(FAST, start_from=start_from, seed=7)
        _, pictures = shown(pixel_pipeline(unet=unet), config)
        source = pictures["first stage, source"]
        windows = [(k, Box(0, 0, 64, 64)) for k in range(2)]
        noise = noise_windows(7, 0, (64, 64), windows)("init", 0, (2, 3, 64, 64))
        expected = q_sample(source, 751, ALPHAS, noise) if start_from == "source" else noise
        torch.testing.assert_close(unet.batches[0], expected, atol=1e-6, rtol=0)


def test_later_stages_start_from_their_noised_input_and_its_background_is_low_passed() -> None:
    """Lines 20 and 21, with LP as in A.2: down to the input size of the stage and up again."""
    unet = Recorder(PullTowards(list(TARGET)))
    result, pictures = shown(pixel_pipeline(unet=unet), replace(FAST, seed=3))
    previous = pictures["first stage, result"]
    stage = result.plan.stages[1]
    cropped = take(MASK, result.plan.crop)
    m, reference = stage_mask(cropped, stage.size, FAST), resize(take(IMAGE, result.plan.crop), stage.size)
    torch.testing.assert_close(pictures["stage 2, upscaled"], resize(previous, stage.size))
    x_tilde = m * pictures["stage 2, upscaled"] + (1 - m) * low_pass(reference, (64, 64))
    torch.testing.assert_close(pictures["stage 2, input"], x_tilde)
    whole = Box(0, 0, *stage.size)
    noise = noise_windows(3, 1, stage.size, [(0, whole)])("init", 0, (1, 3, *stage.size))
    start = unet.timesteps.index(251, 8)  # after the first stage's 8 evaluations
    torch.testing.assert_close(unet.batches[start], q_sample(x_tilde, 251, ALPHAS, noise), atol=1e-6, rtol=0)
    sharp = shown(pixel_pipeline(), replace(FAST, lowpass_reference="no"))[1]["stage 2, input"]
    assert torch.equal(sharp * (1 - m), reference * (1 - m))


def test_the_last_step_leaves_a_clean_background() -> None:
    """Blended at the level of the next evaluation, the finished background is the source itself."""
    result, pictures = shown(pixel_pipeline(), FAST)
    source, mask = pictures["first stage, source"], pictures["first stage, mask"] > 0
    for candidate in result.candidates:
        assert torch.equal(candidate[~mask[0]], source[0].clamp(-1, 1)[~mask[0]])
    noisy = shown(pixel_pipeline(), replace(FAST, background_level="current"))[0].candidates[0]
    assert 0.01 < (noisy - source[0])[~mask[0]].std() < 0.2


# ---- candidates and reranking ------------------------------------------------------------------------------


def test_candidates_differ_and_do_not_depend_on_how_many_there_are() -> None:
    config = replace(FAST, method="first-stage-only")
    few = latent_pipeline()(IMAGE, MASK, "", config=config).candidates
    many = latent_pipeline()(IMAGE, MASK, "", config=replace(config, first_stage_batch=4)).candidates
    torch.testing.assert_close(many[:2], few, atol=1e-5, rtol=0)
    differences = [(many[i] - many[j]).abs().max() for i in range(4) for j in range(i)]
    assert min(differences) > 1e-3


class LikesRed(nn.Module):
    """A CLIP whose score is how red the picture is; notes what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(0.0))
        self.seen: list[Tensor] = []

    def encode_image(self, pixels: Tensor) -> Tensor:
        self.seen.append(pixels)
        return torch.cat([pixels[:, :1].mean((2, 3)), torch.full((len(pixels), 1), 1.0)], dim=1)

    def encode_text(self, ids: Tensor) -> Tensor:
        return torch.tensor([[1.0, 0.0]])


@pytest.mark.parametrize("area", ["crop", "mask"])
def test_reranking_takes_the_candidate_with_the_best_score(area: Any) -> None:
    config = replace(FAST, method="first-stage-only", first_stage_batch=6, rerank_area=area)
    clip, plain = LikesRed(), {"clip_size": 32, "clip_mean": (0, 0, 0), "clip_std": (1, 1, 1)}
    pipeline = latent_pipeline(clip=clip, **plain)
    picked = {}
    for seed in range(4):
        result, pictures = shown(pipeline, replace(config, seed=seed))
        looked_at = result.candidates[..., 10:54, 9:55] if area == "mask" else result.candidates
        redness = looked_at[:, 0].mean((1, 2))
        assert result.scores is not None and result.chosen == int(result.scores.argmax())
        assert abs(redness[result.chosen] - redness.max()) < 2e-3
        assert torch.equal(
            pictures["first stage, result"], result.candidates[result.chosen : result.chosen + 1]
        )
        picked[seed] = result.chosen
    assert set(picked.values()) != {0}
    off = pipeline(IMAGE, MASK, "", config=replace(config, clip_reranking=False))
    assert off.chosen == 0 and off.scores is None


# ---- tiles -------------------------------------------------------------------------------------------------


def test_edit_is_reproducible_and_does_not_depend_on_the_tile_batch() -> None:
    config = replace(FAST, num_steps=8)
    runs = {
        batch: latent_pipeline()(IMAGE, MASK, "", config=replace(config, tile_batch=batch))
        for batch in (1, 3, 16)
    }
    assert len(runs[1].plan.stages[-1].boxes) > 4
    again = latent_pipeline()(IMAGE, MASK, "", config=replace(config, tile_batch=3))
    assert torch.equal(again.image, runs[3].image)
    for batch in (1, 3):
        levels = abs(to_pixels(runs[batch].image).astype(int) - to_pixels(runs[16].image))
        assert levels.max() <= 1


def test_edit_computes_only_tiles_with_mask() -> None:
    image = picture(320, 320)
    mask = rectangle(320, 320, Box(0, 0, 20, 20), Box(300, 300, 20, 20))
    unet = Recorder(PullTowards(list(TARGET)))
    config = replace(FAST, margin=1.0, tile_batch=1, num_steps=50, repaint_steps=0, first_stage_batch=1)
    result = pixel_pipeline(unet=unet)(image, mask, "", config=config)
    last = result.plan.stages[-1]
    assert len(last.grid) == 16 and len(unet.batches) == 50 + 20 + 2 * 13
    assert (result.image[..., :20, :20] - torch.tensor(TARGET).view(1, 3, 1, 1)).abs().max() < 1e-4


@pytest.mark.parametrize("failures", [1, 2])
def test_out_of_memory_halves_the_batch_and_gives_the_same_picture(failures: int) -> None:
    config = replace(FAST, tile_batch=4, first_stage_batch=1)
    whole = latent_pipeline()(IMAGE, MASK, "", config=config)
    unet = Recorder(TinyNet(), failures=failures)
    steps: list[EditStep] = []
    short = latent_pipeline(unet=unet)(IMAGE, MASK, "", config=config, on_step=steps.append)
    assert unet.failures == 0 and max(len(batch) for batch in unet.batches[-3:]) == 4 // 2**failures
    assert abs(to_pixels(short.image).astype(int) - to_pixels(whole.image)).max() <= 1
    assert steps[-2].step <= steps[-2].total


def test_out_of_memory_in_the_first_stage_splits_the_candidates() -> None:
    config = replace(FAST, method="first-stage-only", first_stage_batch=4)
    for preset in ({}, official.OPTIONS):
        whole = latent_pipeline()(IMAGE, MASK, "", config=replace(config, **preset))
        unet = Recorder(TinyNet(), failures=1)
        split = latent_pipeline(unet=unet)(IMAGE, MASK, "", config=replace(config, **preset))
        assert len(unet.batches[-1]) == 2
        torch.testing.assert_close(split.candidates, whole.candidates, atol=1e-5, rtol=0)


def test_out_of_memory_for_a_single_tile_is_an_error() -> None:
    class Never(nn.Module):
        def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("pretended")

    with pytest.raises(torch.OutOfMemoryError):
        pixel_pipeline(unet=Never())(IMAGE, MASK, "", config=FAST)


# ---- randomness --------------------------------------------------------------------------------------------


def test_seed_and_generator_decide_the_picture_and_nothing_else_does() -> None:
    pipeline = latent_pipeline()

    def run(generator: int | None = None, **options: Any) -> EditResult:
        made = None if generator is None else torch.Generator().manual_seed(generator)
        return pipeline(IMAGE, MASK, "", config=replace(FAST, **options), generator=made)

    zero = run()
    before = torch.get_rng_state()
    assert torch.equal(run(seed=0).image, zero.image)  # None: 0
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(run(seed=1).image, zero.image)
    drawn = run(generator=5, seed=1)
    torch.manual_seed(1234)
    assert torch.equal(
        run(generator=5).image, drawn.image
    )  # the generator wins, the global stream is not used
    assert not torch.equal(run(generator=6).image, drawn.image)
    assert torch.equal(
        run(seed=drawn.plan.config.seed).image, drawn.image
    )  # and the result says how to repeat it
    generator = torch.Generator().manual_seed(5)
    pipeline(IMAGE, MASK, "", config=FAST, generator=generator)
    after_one = torch.Generator().manual_seed(5)
    torch.randint(2**62, (), generator=after_one)
    assert torch.equal(generator.get_state(), after_one.get_state())  # one number


def test_tiles_that_do_not_fit_are_halved_and_the_result_says_so() -> None:
    class Small(PullTowards):
        def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
            if x.shape[-1] > 64:
                raise torch.OutOfMemoryError("pretended")
            return super().forward(x, t, context)

    whole = pixel_pipeline()(IMAGE, MASK, "", config=FAST)
    result = pixel_pipeline(unet=Small(list(TARGET)))(IMAGE, MASK, "", config=FAST)
    inside = MASK.expand_as(IMAGE) > 0
    assert max(whole.plan.stages[-1].grid[0].size) > 64 and "memory" not in str(whole.notes)
    assert any("tiles of 96 pixels, went on with 48" in note for note in result.notes)
    assert (result.image - whole.image)[
        inside
    ].abs().max() < 1e-3  # a denoiser of one colour does not mind the tiles
    assert torch.equal(result.image[~inside], IMAGE[~inside])
