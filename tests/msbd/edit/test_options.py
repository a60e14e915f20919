"""The edit pipeline's decoder optimisation, baselines, ablations, preset official and callbacks,
with tiny nets.
"""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from msbd.edit import official
from msbd.edit.config import EditConfig
from msbd.edit.pipeline import EditStep
from msbd.edit.plan import stage_mask
from msbd.noise import noise_windows
from msbd.pixels.box import Box
from msbd.pixels.resize import resize, take
from tests.helpers.edit_scene import FAST, IMAGE, MASK, TARGET, rectangle, shown
from tests.helpers.tiny import SPEC, PullTowards, Recorder, latent_pipeline, pixel_pipeline, tiny_vae

# ---- decoder optimisation ----------------------------------------------------------------------------------


OPTIMIZE = replace(FAST, decoder_optimization=True, decoderopt_steps=25, decoderopt_lr=3e-3)


def test_decoder_optimization_lowers_the_background_error_and_leaves_the_vae_alone() -> None:
    vae = tiny_vae()
    weights = copy.deepcopy(vae.state_dict())
    pipeline = latent_pipeline(vae=vae)
    plain, before = shown(pipeline, FAST)
    result, after = shown(pipeline, OPTIMIZE)
    assert torch.equal(result.candidates, plain.candidates)  # as decoded before it
    for stage in result.plan.stages:
        reference = resize(take(IMAGE, result.plan.crop), stage.size)
        background = stage_mask(take(MASK, result.plan.crop), stage.size, FAST) == 0
        name = f"{stage.name}, result"
        was, now = (
            (pictures[name] - reference).square()[background.expand_as(reference)].mean()
            for pictures in (before, after)
        )
        assert now < 0.5 * was or was < 1e-6
    assert all(torch.equal(value, weights[name]) for name, value in vae.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in vae.parameters())


@pytest.mark.parametrize("task", ["sample", "decode", "optimize"])
def test_an_exception_in_on_step_leaves_the_nets_as_they_were(task: str) -> None:
    vae = tiny_vae()
    weights = copy.deepcopy(vae.state_dict())
    pipeline = latent_pipeline(vae=vae)
    config = replace(OPTIMIZE, decoderopt_steps=4)
    expected = pipeline(IMAGE, MASK, "", config=config).image

    def stop(step: EditStep) -> None:
        if (step.task, step.stage) == (task, "stage 2") and step.step >= (3 if task == "optimize" else 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline(IMAGE, MASK, "", config=config, on_step=stop)
    assert all(torch.equal(value, weights[name]) for name, value in vae.state_dict().items())
    assert not any(p.requires_grad for p in vae.parameters())
    assert torch.equal(pipeline(IMAGE, MASK, "", config=config).image, expected)


# ---- methods, ablations, preset official -------------------------------------------------------------------


@pytest.mark.parametrize("method", ["naive", "segments", "first-stage-only"])
def test_baselines_paint_the_target(method: Any) -> None:
    unet = Recorder(PullTowards(list(TARGET)))
    result = pixel_pipeline(unet=unet)(IMAGE, MASK, "", config=replace(FAST, method=method))
    inner = (..., slice(60, 150), slice(50, 160))
    assert (result.image[inner] - torch.tensor(TARGET).view(1, 3, 1, 1)).abs().max() < 1e-4
    assert set(unet.timesteps) == {751, 501, 251, 1}  # one stage, from pure noise level
    (stage,) = result.plan.stages
    assert sum(len(batch) for batch in unet.batches) == 8 * stage.candidates * len(stage.boxes)
    if method == "segments":
        assert len(stage.boxes) > 4 and {tuple(batch.shape[-2:]) for batch in unet.batches} == {(64, 64)}
    elif method == "naive":
        assert stage.size == (112, 128)  # about (64 x 960 / 512)^2 pixels, in 16s


@pytest.mark.parametrize(
    "options",
    [
        {"blended_upscale": False},
        {"conditional_upscale": False},
        {"dilate_mask": True},
        {"straight_to_grid": True},
        {"upscaling_mode": "bicubic"},
        {"upscaling_mode": "sharpen"},
        {"upscaling_mode": "none"},
        {"lowpass_reference": "half"},
        {"latent_mask": "center"},
        {"eta": 0.0},
        {"background_noise": "fresh"},
        {"repaint_jump": 2},
        {"start_timestep": 0.6},
        {"decoder_optimization": True, "decoderopt_steps": 2, "decoderopt_latents": "reencode"},
        {"decoder_optimization": True, "decoderopt_steps": 2, "decoderopt_area": "ring"},
        {"decoder_optimization": True, "seam": "closed-form"},
        {"decoder_optimization": True, "seam": "closed-form", "tiles": "joint"},
        {"decoder_optimization": True, "seam": "membrane"},
        {"decoder_optimization": True, "seam": "membrane", "membrane_reach": 0, "seam_stages": "last"},
        {"tiles": "joint"},
        {"spacing": "trailing"},
    ],
    ids=str,
)
def test_every_option_changes_the_picture_inside_the_mask_only(options: dict[str, Any]) -> None:
    plain = latent_pipeline()(IMAGE, MASK, "a house", config=FAST).image
    result = latent_pipeline()(IMAGE, MASK, "a house", config=replace(FAST, **options)).image
    changed = (result != plain).any(dim=1, keepdim=True)
    assert changed[MASK == 1].float().mean() > 0.01 and not changed[MASK == 0].any()
    assert torch.isfinite(result).all()


def test_plain_sdedit_repaints_all_tiles() -> None:
    unet = Recorder(PullTowards(list(TARGET)))
    result, pictures = shown(pixel_pipeline(unet=unet), replace(FAST, blended_upscale=False))
    last = result.plan.stages[-1]
    assert last.boxes == last.grid
    corner = pictures[f"{last.name}, result"][..., :8, :8]
    torch.testing.assert_close(
        corner, torch.tensor(TARGET).view(1, 3, 1, 1).expand(1, 3, 8, 8), atol=1e-4, rtol=0
    )


def test_preset_official_runs_its_own_counts() -> None:
    unet = Recorder(PullTowards(list(TARGET)))
    config = EditConfig(**official.OPTIONS, upscaling_mode="bilinear", guidance_scale=1.0, tile_batch=1)
    pipeline = pixel_pipeline(unet=unet)
    result = pipeline(IMAGE, MASK, "", config=config)
    assert [len(stage.schedule) for stage in result.plan.stages] == [
        300,
        40,
        25,
    ]
    first, middle, last = result.plan.stages
    assert unet.timesteps[:300] == [t for t in range(981, 0, -20) for _ in range(6)]
    assert unet.timesteps[300:340] == list(range(391, 0, -10))
    assert unet.timesteps[340:] == list(range(241, 0, -10)) * len(last.boxes)
    noise = noise_windows(0, 0, (64, 64), [(k, Box(0, 0, 64, 64)) for k in range(5)])
    assert torch.equal(unet.batches[0], noise("init", 0, (5, 3, 64, 64)))  # pure noise
    inner = (..., slice(60, 150), slice(50, 160))
    target = torch.tensor(TARGET).view(1, 3, 1, 1)
    assert (result.image[inner] - target).abs().mean() < 0.03  # a little noise is left, and 8 bits
    outside = MASK.expand_as(IMAGE) == 0
    assert torch.equal(result.image[outside], IMAGE[outside])


def test_preset_official_takes_the_papers_background_where_it_is_asked_to() -> None:
    pipeline = latent_pipeline()
    config = EditConfig(**official.OPTIONS, upscaling_mode="bilinear")
    theirs, level, noise = (
        pipeline.plan(MASK, replace(config, **change)).stages[0].schedule
        for change in ({}, {"background_level": "prev"}, {"background_noise": "once"})
    )
    assert [e.t for e in theirs] == [e.t for e in level] == [e.t for e in noise]
    assert all(e.a_known in (None, e.a_t) for e in theirs)
    assert all(e.a_known in (None, e.a_prev) for e in level)
    drawn, drawn_once = ({e.known_id for e in plan} for plan in (theirs, noise))
    assert len(drawn) == len(theirs) > len(drawn_once) == len({e.t for e in noise})


def test_official_candidates_share_the_background_noise() -> None:
    for preset, shared in ((official.OPTIONS, True), ({}, False)):
        unet = Recorder(PullTowards(list(TARGET)))
        _, pictures = shown(pixel_pipeline(unet=unet), replace(FAST, repaint_steps=0, **preset))
        outside = pictures["first stage, mask"][0] < 0
        one, other = unet.batches[1]
        assert torch.equal(one[outside], other[outside]) == shared
        assert not torch.equal(unet.batches[0][0], unet.batches[0][1])


def test_preset_official_runs_with_an_autoencoder_and_thin_masks() -> None:
    config = replace(
        FAST, **official.OPTIONS, decoder_optimization=True, decoderopt_steps=2, upscaling_mode="rrdb"
    )
    upscaler = nn.Upsample(scale_factor=4)
    for mask in (MASK, rectangle(200, 220, Box(10, 101, 180, 1)), rectangle(200, 220, Box(100, 100, 1, 1))):
        result = latent_pipeline(upscaler=upscaler)(IMAGE, mask, "", config=config)
        outside = mask.expand_as(IMAGE) == 0
        assert torch.equal(result.image[outside], IMAGE[outside]) and torch.isfinite(result.image).all()


# ---- callbacks and refusals --------------------------------------------------------------------------------


def test_on_step_and_on_picture_follow_the_algorithm() -> None:
    events: list[EditStep | str] = []
    config = replace(OPTIMIZE, decoderopt_steps=2, tile_batch=3)
    pipeline = latent_pipeline()
    result = pipeline(
        IMAGE, MASK, "", config=config, on_step=events.append, on_picture=lambda name, _: events.append(name)
    )
    names = [event for event in events if isinstance(event, str)]
    first = [
        "first stage, source",
        "first stage, mask",
        "first stage, candidate 0",
        "first stage, candidate 1",
    ]
    later = [f"stage {k}, {what}" for k in (2, 3) for what in ("upscaled", "input", "result")]
    assert names == [*first, "first stage, result", *later]
    steps = [event for event in events if isinstance(event, EditStep)]
    tasks = list(dict.fromkeys((step.stage, step.task) for step in steps))
    stages = ["first stage", "stage 2", "stage 3"]
    assert [task for task in tasks if task[1] != "decode"] == [
        *((stages[0], task) for task in ("sample", "optimize")),
        *((stage, task) for stage in stages[1:] for task in ("upscale", "sample", "optimize")),
    ]
    assert set(tasks) == {tuple(key.split(", ")) for key in result.seconds}
    for stage in result.plan.stages:
        sampled = [step for step in steps if (step.stage, step.task) == (stage.name, "sample")]
        assert [step.step for step in sampled] == sorted({step.step for step in sampled})
        total = stage.evaluations
        assert sampled[-1].step == total and {step.total for step in sampled} == {total}
        optimized = [step.step for step in steps if (step.stage, step.task) == (stage.name, "optimize")]
        assert optimized == [1, 2]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"upscaling_mode": "rrdb"}, "without an upscaler"),
        ({"num_steps": 2000}, "num_steps is 2000"),
        ({"upscale_num_steps": 1001}, "num_steps is 1001"),
        ({"tile": 100}, "multiples of 16"),
    ],
)
def test_what_the_model_cannot_do_is_refused_before_anything_is_computed(
    options: dict[str, Any], message: str
) -> None:
    unet = Recorder(PullTowards(list(TARGET)))
    with pytest.raises(ValueError, match=message):
        pixel_pipeline(unet=unet)(IMAGE, MASK, "", config=replace(FAST, **options))
    with pytest.raises(ValueError, match=message):
        pixel_pipeline(unet=unet).plan(MASK, replace(FAST, **options))
    assert not unet.batches


def test_edit_refuses_pictures_and_masks_that_do_not_fit() -> None:
    pipeline = pixel_pipeline()
    with pytest.raises(ValueError, match="mask has shape"):
        pipeline(IMAGE, MASK[..., 1:], "", config=FAST)
    with pytest.raises(ValueError, match="image has shape"):
        pipeline(IMAGE[:, :1], MASK, "", config=FAST)
    with pytest.raises(ValueError, match="empty"):
        pipeline(IMAGE, 0 * MASK, "", config=FAST)


def test_the_test_picture_needs_every_kind_of_stage() -> None:
    """What the tests above rely on."""
    stages = pixel_pipeline().plan(MASK, FAST).stages
    assert [len(stage.grid) > 1 for stage in stages] == [False, False, True]
    assert stages[0].size == (SPEC.native, SPEC.native)
