"""The pipeline of PASD with tiny nets: what a restoration promises, whatever its nets have learned."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from msbd.latents import decode, encode
from msbd.pixels.files import to_pixels
from msbd.pixels.luma import luma
from msbd.pixels.resize import enlarge, resize, take
from msbd.progress import EditStep
from msbd.restore import official, paper
from msbd.restore import pipeline as module
from msbd.restore.color import to_gray
from msbd.restore.config import PLAIN, RestoreConfig, Sampler
from msbd.restore.plan import RestoreResult
from msbd.restore.prompts import GRAY_NEGATIVE, NEGATIVE, QUALITY_PROMPT
from samplers.ddim import ddim_sample
from samplers.guidance import classifier_free_guidance
from samplers.schedule import (
    Denoiser,
    make_alphas_cumprod,
    make_betas,
    q_sample,
    q_sample_between,
    rescale_zero_terminal_snr,
    trailing_timesteps,
)
from tests.helpers.edit_scene import picture
from tests.helpers.rounding import assert_same_to_rounding
from tests.helpers.tiny import ALPHAS
from tests.helpers.tiny_restore import (
    SPEC,
    FakeControlNet,
    FakeSamplePrediction,
    FakeUNet,
    FakeVAE,
    FakeVPrediction,
    fake_nets,
    letters_as_context,
    pipeline,
    real_nets,
)

SMALL = picture(32, 40)
QUICK = RestoreConfig(num_inference_steps=3, seed=1)
TILED = replace(QUICK, latent_tiled_size=8, latent_tiled_overlap=2)  # 16 x 20 cells: 3 x 3 tiles of one size


def close(one: Tensor, other: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(one, other, atol=tolerance, rtol=0)


def run(
    nets: dict[str, Any], config: RestoreConfig = QUICK, image: Tensor = SMALL, **asked: Any
) -> RestoreResult:
    return pipeline(nets)(image, "a house", config=config, **asked)


class Spy:
    """Calls what it stands for, and keeps what it was called with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, *modules: Any) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.results: list[Any] = []
        self._real = getattr(modules[0], name)
        for place in modules:
            monkeypatch.setattr(place, name, self)

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.calls.append((*args, *options.values()))
        self.results.append(self._real(*args, **options))
        return self.results[-1]


# ---- sizes, seeds ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size, output",
    [
        ((1, 1), (4, 4)),
        ((3, 500), (12, 2000)),
        ((500, 3), (2000, 12)),
        ((33, 47), (132, 188)),
        ((33, 47), (33, 47)),
        ((33, 47), (89, 127)),  # x 2.7
        ((50, 40), (333, 777)),
        ((90, 60), (7, 5)),
    ],
)
def test_any_size_becomes_any_other(size: tuple[int, int], output: tuple[int, int]) -> None:
    config = replace(QUICK, num_inference_steps=1, latent_tiled_size=64)
    result = run(real_nets(), config, picture(*size), output_size=output)
    assert result.image.shape == (1, 3, *output) and result.image.dtype == torch.float32
    assert result.image.isfinite().all() and result.image.abs().max() <= 1


@pytest.mark.parametrize("mode, times", [("sr", 4), ("oldphoto", 4), ("stylize", 1), ("colorize", 1)])
def test_without_a_size_the_mode_decides(mode: Any, times: int) -> None:
    assert run(fake_nets(), replace(QUICK, mode=mode)).image.shape == (1, 3, 32 * times, 40 * times)


def test_a_seed_gives_the_same_picture_again_and_another_seed_another() -> None:
    nets = real_nets()
    results = [run(nets, replace(QUICK, seed=seed)).image for seed in (1, 1, 2)]
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_a_generator_seeds_all_noise_and_the_plan_says_how() -> None:
    config = replace(QUICK, sampler="euler_a", posterior="sample", formulas="official")

    def seeded(seed: int, count: int = 1) -> list[RestoreResult]:
        generator = torch.Generator().manual_seed(seed)
        return [run(fake_nets(), config, generator=generator) for _ in range(count)]

    (first, second), (again,), (other,) = seeded(3, 2), seeded(3), seeded(4)
    assert torch.equal(first.image, again.image) and first.plan.config.seed == again.plan.config.seed
    assert not torch.equal(first.image, second.image) and not torch.equal(first.image, other.image)
    repeated = run(fake_nets(), replace(config, seed=first.plan.config.seed))
    assert torch.equal(repeated.image, first.image)


# ---- one prediction for the whole latent -------------------------------------------------------------------


def denoiser_of(
    nets: dict[str, Any], config: RestoreConfig, monkeypatch: pytest.MonkeyPatch
) -> tuple[Denoiser, RestoreResult]:
    """What a run gave to its sampler, and the run's result."""
    with monkeypatch.context() as patch:
        spy = Spy(patch, "sample", module)
        result = run(nets, config)
    return spy.calls[0][1], result


@pytest.mark.parametrize("variant", ["full", "light", "eq2"])
def test_a_picture_of_one_tile_is_what_the_nets_say_of_it(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guidance, control and prompts together are the plain call of the two nets."""
    nets = real_nets(variant)
    config = replace(QUICK, conditioning_scale=0.8, guidance_scale=3.0, latent_tiled_size=32)
    denoise, result = denoiser_of(nets, config, monkeypatch)
    assert len(result.plan.tiles) == 1 and result.prompt == f"a house, {QUALITY_PROMPT}"
    assert result.negative_prompt == NEGATIVE
    control = take(enlarge(SMALL / 2 + 0.5, result.plan.working_size), result.plan.padded_box)
    lengths = torch.tensor([len(result.prompt), len(result.negative_prompt)])[:, None].expand(-1, 77)
    cond, uncond = letters_as_context(lengths).split(1)
    unet, controlnet = nets["unet"], nets["controlnet"]

    def model(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        both = control.expand(len(x), -1, -1, -1)
        return unet(x, t, context, controlnet(x, t, context, both, scale=0.8))

    x, t = torch.randn(1, 4, *result.plan.cells), result.plan.timesteps[1]
    with torch.inference_mode():
        # The kept text and the joined halves are other batches: equal up to rounding, by the largest value.
        assert_same_to_rounding(denoise(x, t), classifier_free_guidance(model, cond, uncond, 3.0)(x, t))


@pytest.mark.parametrize("formulas", ["paper", "official"])
def test_tiles_of_nets_that_see_one_cell_give_the_untiled_picture(formulas: Any) -> None:
    nets, config = fake_nets(), replace(QUICK, formulas=formulas, process_size=64)
    whole = run(nets, replace(config, latent_tiled_size=64))
    tiled = run(nets, replace(config, latent_tiled_size=8, latent_tiled_overlap=2, tile_batch=3))
    assert len(whole.plan.tiles) == 1 < len(tiled.plan.tiles)
    # the official result is cut to 8 bits, where rounding may tip over by a level
    close(tiled.image, whole.image, 1e-5 if formulas == "paper" else 0.008)
    assert ((tiled.image - whole.image).abs() > 1e-5).float().mean() < 0.01


def test_the_result_does_not_depend_on_the_tile_batch() -> None:
    nets = real_nets()
    results = [run(nets, replace(TILED, tile_batch=batch)) for batch in (1, 3, 64)]
    assert len(results[0].plan.tiles) == 9
    for result in results[1:]:
        close(result.image, results[0].image)


def test_a_large_picture_is_embedded_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    nets = real_nets()
    restorer = pipeline(nets)
    for size in ((304, 264), (64, 520), (72, 64)):
        control = torch.rand(1, 3, *size)
        with torch.inference_mode():
            monkeypatch.setattr(module, "_PIECE", 1024)
            whole = restorer._embed(control)
            monkeypatch.setattr(module, "_PIECE", 32)
            pieces = restorer._embed(control)
            close(whole, nets["controlnet"].embed(control), 0)
        close(pieces, whole)


def test_pieces_of_the_hint_are_no_larger_than_said(monkeypatch: pytest.MonkeyPatch) -> None:
    nets = fake_nets()
    monkeypatch.setattr(module, "_PIECE", 32)
    pipeline(nets)._embed(torch.rand(1, 3, 304, 264))
    sizes = [tuple(image.shape[-2:]) for image in nets["controlnet"].embedded]
    assert len(sizes) > 1 and max(max(size) for size in sizes) == 32 + 2 * 64


# ---- memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_out_of_memory_halves_the_batch_and_is_noted(error: type[RuntimeError]) -> None:
    plain = run(fake_nets(), replace(TILED, tile_batch=8))
    nets = fake_nets()
    nets["unet"].most, nets["unet"].error = 4, error
    result = run(nets, replace(TILED, tile_batch=8))
    assert plain.notes == () and result.notes == (
        "out of memory with 8 tiles at once, went on with 4",
        "out of memory with 4 tiles at once, went on with 2",
    )
    close(result.image, plain.image)
    sizes = [batch for _, batch, _ in nets["unet"].calls]
    # Two halves of the guidance each, and never more again.
    assert sizes[:3] == [16, 8, 4] and max(sizes[2:]) == 4


def test_out_of_memory_with_one_tile_is_raised() -> None:
    nets = fake_nets()
    nets["unet"].most = 1
    with pytest.raises(torch.OutOfMemoryError):
        run(nets, TILED)


def test_an_autoencoder_that_runs_out_of_memory_goes_on_with_its_maps_on_the_cpu() -> None:
    nets, asked = fake_nets(), []

    def tiled(**settings: Any) -> Any:
        asked.append(settings)
        if "storage" not in settings:
            return Full()
        return nets["vae"]

    class Full(FakeVAE):
        def decode(self, latent: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("out of memory, it is pretended")

    result = pipeline(nets, tiled_vae=tiled)(SMALL, config=QUICK)
    assert torch.equal(result.image, pipeline(fake_nets())(SMALL, config=QUICK).image)
    assert [settings.pop("storage", None) for settings in asked] == [
        None,
        None,
        "cpu",
    ]  # encode, decode twice
    assert asked[0] == {"mode": "exact", "encoder_tile": 1024, "decoder_tile": 224}
    assert asked[2] == {"mode": "exact", "encoder_tile": 256, "decoder_tile": 32}  # small enough to matter
    assert any("autoencoder" in note for note in result.notes)


def test_another_error_is_not_taken_for_it() -> None:
    class Broken(FakeUNet):
        def forward(self, x: Tensor, t: Tensor, context: Any, control: Any = None) -> Tensor:
            raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="multiplied"):
        run(fake_nets() | {"unet": Broken()}, TILED)


# ---- control, guidance, texts ------------------------------------------------------------------------------


def test_control_and_guidance_act_in_their_intervals() -> None:
    nets = fake_nets()
    config = replace(QUICK, num_inference_steps=8, control_start=0.25, control_end=0.75, guidance_start=0.5)
    run(nets, replace(config, latent_tiled_size=64))
    calls = nets["unet"].calls
    assert [controlled for _, _, controlled in calls] == [False] * 2 + [True] * 4 + [False] * 2
    assert [batch for _, batch, _ in calls] == [1] * 4 + [2] * 4
    assert len(nets["controlnet"].scales) == 4


@pytest.mark.parametrize("change", [{"guidance_scale": 1.0}, {"guidance_start": 0.5, "guidance_end": 0.5}])
def test_without_guidance_only_the_prompt_is_evaluated(change: dict[str, float]) -> None:
    nets = fake_nets()
    run(nets, replace(QUICK, latent_tiled_size=64, **change))  # type: ignore[arg-type]
    assert [batch for _, batch, _ in nets["unet"].calls] == [1, 1, 1]


@pytest.mark.parametrize("scale", [0.0, 0.6, 1.7])
def test_the_conditioning_scale_reaches_the_controlnet(scale: float) -> None:
    nets = fake_nets()
    run(nets, replace(QUICK, conditioning_scale=scale))
    assert set(nets["controlnet"].scales) == {scale}


def test_guidance_scale_0_is_the_negative_prompt_alone() -> None:
    negative = run(fake_nets(), replace(QUICK, guidance_scale=0.0, negative_prompt="dark")).image
    prompt = pipeline(fake_nets())(SMALL, "dark", config=replace(QUICK, guidance_scale=1.0, added_prompt=""))
    close(negative, prompt.image)


def test_texts_and_hint_are_made_once() -> None:
    nets, encoded = fake_nets(), []

    def text_encoder(ids: Tensor) -> Tensor:
        encoded.append(ids)
        return letters_as_context(ids)

    restorer = pipeline(nets, text_encoder=text_encoder)
    restorer(SMALL, "a house", config=TILED)
    assert len(encoded) == 1 and len(nets["controlnet"].embedded) == 1
    assert len(nets["unet"].calls) == 9  # 3 steps, 9 tiles four at a time
    restorer(SMALL, "a house", config=replace(TILED, guidance_end=0.4))  # both prompts, then one of them
    assert len(encoded) == 2


def test_real_nets_project_texts_and_pixels_once_a_step() -> None:
    nets = real_nets()
    counts: dict[str, int] = {}

    def count(path: str) -> Callable[..., None]:
        return lambda *_: counts.update({path: counts.get(path, 0) + 1})

    for kind in ("unet", "controlnet"):
        for path, layer in nets[kind].named_modules():
            if path.endswith("attn2.to_k"):
                layer.register_forward_hook(count(f"{kind} {path}"))
    run(nets, replace(QUICK, latent_tiled_size=64))
    pixels = {path for path in counts if "pixel_attentions" in path}
    assert len(pixels) == 4 and len(counts) > 6
    assert set(counts.values()) == {3}  # steps


def test_each_picture_on_the_way_is_shown() -> None:
    for mode in ("sr", "colorize"):
        shown: dict[str, Tensor] = {}
        result = run(fake_nets(), replace(QUICK, mode=mode), on_picture=shown.__setitem__)
        assert list(shown) == ["control", "restored", "result"]
        assert shown["result"] is result.image
        for name in ("control", "restored"):
            assert shown[name].shape == (1, 3, *result.plan.working_size)
            assert shown[name].abs().max() <= 1
        control = enlarge(SMALL / 2 + 0.5, result.plan.working_size) * 2 - 1
        close(shown["control"], control if mode == "sr" else to_gray(control))
        assert not torch.allclose(
            resize(shown["restored"], (32, 40)), resize(result.image, (32, 40)), atol=0.05
        )
    shown = {}
    result = run(fake_nets(), replace(QUICK, method="bicubic"), on_picture=shown.__setitem__)
    assert list(shown) == ["result"] and shown["result"] is result.image


def test_information_and_the_users_words_make_the_prompt() -> None:
    result = run(fake_nets(), information=["a blurry dog"])
    assert result.prompt == f"a house, a clear dog, {QUALITY_PROMPT}"
    own = run(fake_nets(), replace(QUICK, added_prompt="sharp", negative_prompt=""))
    assert (own.prompt, own.negative_prompt) == ("a house, sharp", "")
    plain = pipeline(fake_nets(), spec=replace(SPEC, uses_prompts=False))(SMALL, "", config=QUICK)
    assert (plain.prompt, plain.negative_prompt) == ("", "")


# ---- predictions and schedules -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("unet", "prediction"), [(FakeVPrediction, "v_prediction"), (FakeSamplePrediction, "sample")]
)
def test_a_net_that_predicts_otherwise_gives_the_same_picture(unet: type[FakeUNet], prediction: str) -> None:
    nets = fake_nets()
    expected = run(nets)
    found = pipeline(nets | {"unet": unet()}, prediction_type=prediction)(SMALL, "a house", config=QUICK)
    close(found.image, expected.image, 1e-4)
    assert expected.image.std() > 0.1


SAMPLERS: tuple[Sampler, ...] = get_args(Sampler)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_schedule_that_ends_in_pure_noise_runs(sampler: Sampler) -> None:
    alphas = make_alphas_cumprod(rescale_zero_terminal_snr(make_betas())).clamp(min=2**-24)
    restorer = pipeline(fake_nets(), alphas_cumprod=alphas, prediction_type="v_prediction")
    config = replace(QUICK, sampler=sampler, num_inference_steps=6)
    result = restorer(SMALL, config=config)
    assert result.image.isfinite().all() and result.image.std() > 0.01


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_each_sampler_evaluates_as_often_as_planned(sampler: Sampler, steps: int) -> None:
    nets, told = fake_nets(), []
    config = replace(TILED, sampler=sampler, num_inference_steps=steps, eta=0.5, final_level="first")
    result = run(nets, config, on_step=told.append)
    assert sum(batch for _, batch, _ in nets["unet"].calls) == 2 * result.plan.evaluations
    steps_told = [at for at in told if at.task == "sample"]
    assert [at.step for at in steps_told] == sorted({at.step for at in steps_told})
    assert steps_told[-1].step == steps_told[-1].total == result.plan.evaluations
    assert told[-1] == EditStep("restore", "decode", 1, 1) and set(result.seconds) == {
        "restore, encode", "restore, sample", "restore, decode",
    }  # fmt: skip


# ---- the start ---------------------------------------------------------------------------------------------


def start(nets: dict[str, Any], config: RestoreConfig, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Spy]:
    """The latent that a run started from, and the calls of `ans_start`."""
    with monkeypatch.context() as patch:
        samples = Spy(patch, "sample", module)
        starts = Spy(patch, "ans_start", paper, official)
        run(nets, config)
    return samples.calls[0][2], starts


@pytest.mark.parametrize(
    "change, level",
    [
        ({}, float(ALPHAS[900])),
        ({"added_noise_level": 500}, float(ALPHAS[500])),
        ({"alpha_a": 0.3}, 0.3),
        ({"alpha_a": 0.0}, 0.0),
        ({"fidelity": 1.0}, None),
        ({"ans": "fallback"}, float(ALPHAS[50])),  # 900 is not among unipc's timesteps
        ({"ans": "fallback", "sampler": "ddim"}, float(ALPHAS[900])),  # which has no such defect
    ],
)
def test_the_level_of_the_start(
    change: dict[str, Any], level: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(QUICK, num_inference_steps=20, **change)
    x, starts = start(fake_nets(), config, monkeypatch)
    ((z_lr, a_n, a_a, noise, *more),) = starts.calls
    assert a_n == float(ALPHAS[999]) and not more
    expected = RestoreConfig(**change).for_model(SPEC).alpha_a if level is None else level
    assert a_a == pytest.approx(expected)
    close(x, q_sample_between(z_lr, 1.0, a_n * a_a, noise))


def test_the_start_is_the_posteriors_mean_or_one_sample_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    sites: list[str] = []
    zeros = torch.zeros(1, 4, 16, 20)

    def noise(site: str, step: int, shape: tuple[int, ...]) -> Tensor:
        sites.append(site)
        assert shape == tuple(zeros.shape)
        return zeros + (site == "posterior")

    latents = {}
    for posterior in ("mean", "sample"):
        with monkeypatch.context() as patch:
            starts = Spy(patch, "ans_start", paper)
            run(fake_nets(), replace(QUICK, posterior=posterior), noise=noise)
        latents[posterior] = starts.calls[0][0]
    assert sites == ["start", "posterior", "start"]
    close(latents["sample"] - latents["mean"], zeros + 0.5 * torch.tensor(-1.0).exp())  # 0.5 scales latents


def test_a_start_from_noise_does_not_look_at_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    nets = fake_nets()
    config = replace(QUICK, init_latent_with_noise=True)
    plain, starts = start(nets, config, monkeypatch)
    assert not nets["vae"].encoded and not starts.calls and 0.8 < plain.std() < 1.2
    offset = start(nets, replace(config, offset_noise_scale=0.5), monkeypatch)[0] - plain
    close(offset, offset[..., :1, :1].expand_as(offset))  # one value over each channel
    assert offset[0, :, 0, 0].unique().numel() == 4


def test_the_official_start_draws_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(QUICK, formulas="official", process_size=64)
    _, starts = start(fake_nets(), config, monkeypatch)
    ((_, _, _, noise, more),) = starts.calls
    assert more.shape == noise.shape and not torch.allclose(more, noise)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_plain_run_is_ddim_from_eq_3_and_nothing_else(guidance: float) -> None:
    """What training's validation and `tools.evaluate` ask of the pipeline, written out."""
    nets = real_nets()
    control = enlarge(picture(64, 80) / 2 + 0.5, (64, 80))
    n = torch.randn(1, 4, 8, 10, generator=torch.Generator().manual_seed(0))
    options = PLAIN | {"num_inference_steps": 5, "guidance_scale": guidance, "negative_prompt": "dark"}
    result = pipeline(nets)(
        control * 2 - 1, "a house", output_size=(64, 80), config=RestoreConfig(**options), noise=lambda *_: n
    )
    assert (result.prompt, result.negative_prompt) == ("a house", "dark") and len(result.plan.tiles) == 1
    unet, controlnet, vae = nets["unet"], nets["controlnet"], nets["vae"]

    def model(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return unet(x, t, context, controlnet(x, t, context, control.expand(len(x), -1, -1, -1)))

    lengths = torch.tensor([len("a house"), len("dark")])[:, None].expand(-1, 77)
    cond, uncond = letters_as_context(lengths).split(1)
    timesteps = trailing_timesteps(5)
    with torch.inference_mode():
        denoise = classifier_free_guidance(model, cond, uncond, guidance)
        start = q_sample(encode(vae, control * 2 - 1), int(timesteps[0]), ALPHAS, n)
        expected = decode(vae, ddim_sample(denoise, start, timesteps, ALPHAS))
    close(result.image, expected)


# ---- methods -----------------------------------------------------------------------------------------------


class Doubler(nn.Module):
    """An upscaler: pixels repeated."""

    def forward(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(2, -1).repeat_interleave(2, -2)


@pytest.mark.parametrize("method", ["bicubic", "rrdb"])
def test_methods_without_diffusion_use_no_net(method: Any) -> None:
    nets = fake_nets()
    result = pipeline(nets, upscaler=Doubler(), tokenizer=None)(
        SMALL, "x", config=replace(QUICK, method=method)
    )
    assert result.plan.evaluations == 0 and (result.prompt, result.negative_prompt) == ("", "")
    assert not nets["unet"].calls and not nets["vae"].encoded and not nets["controlnet"].embedded
    if method == "bicubic":
        close(result.image, resize(SMALL, (128, 160), "bicubic").clamp(-1, 1))
    else:
        close(result.image, resize(Doubler()(SMALL), (128, 160)), 1e-5)


def test_img2img_runs_its_share_of_the_schedule_without_control(monkeypatch: pytest.MonkeyPatch) -> None:
    nets = fake_nets()
    config = replace(QUICK, method="img2img", num_inference_steps=10, strength=0.6, latent_tiled_size=64)
    x, starts = start(nets, config, monkeypatch)
    assert not starts.calls and not nets["controlnet"].embedded and not nets["controlnet"].scales
    timesteps = [t for t, _, _ in nets["unet"].calls]
    assert (
        len(timesteps) == 6
        and max(timesteps) <= 600
        and not any(controlled for _, _, controlled in nets["unet"].calls)
    )
    z_lr = 0.5 * nets["vae"].encode(nets["vae"].encoded[0]).mode()
    a = float(ALPHAS[timesteps[0]])
    noise = (x - a**0.5 * z_lr) / (1 - a) ** 0.5
    close(x, q_sample(z_lr, timesteps[0], ALPHAS, noise))
    assert 0.8 < noise.std() < 1.2
    pipeline({**fake_nets(), "controlnet": None})(SMALL, config=config)  # and needs none


def test_plain_controlnet_is_steered() -> None:
    nets = fake_nets()
    run(nets, replace(QUICK, method="controlnet"))
    assert all(controlled for _, _, controlled in nets["unet"].calls)


@pytest.mark.parametrize(
    "config, reason",
    [
        (QUICK, "method pasd needs a ControlNet, and this model has none"),
        (replace(QUICK, method="controlnet"), "method controlnet needs a ControlNet"),
        (replace(QUICK, method="rrdb"), "method rrdb needs an upscaler"),
    ],
)
def test_what_a_method_lacks_is_named(config: RestoreConfig, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as refused:
        run({**fake_nets(), "controlnet": None}, config)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 3, 8, 8), (1, 4, 8, 8)])
def test_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected \(1, 3, H, W\)"):
        run(fake_nets(), image=torch.zeros(shape))


# ---- colours -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [None, (40, 50), (11, 9)])
def test_colorize_keeps_the_luma_of_the_source(size: tuple[int, int] | None) -> None:
    nets = real_nets()
    result = run(nets, replace(QUICK, mode="colorize"), picture(32, 40), output_size=size)
    source = resize(picture(32, 40), size or (32, 40), "bicubic").clamp(-1, 1)
    levels = torch.from_numpy(to_pixels(result.image)).permute(2, 0, 1)[None].float()
    assert (luma(levels) - (luma(source) + 1) * 127.5).abs().max() <= 1
    colours = result.image - luma(result.image)
    assert colours.abs().mean() > 0.02 and (colours - (source - luma(source))).abs().mean() > 0.02
    assert (result.prompt, result.negative_prompt) == ("a house", GRAY_NEGATIVE)


def test_colorize_shows_the_nets_a_grey_picture() -> None:
    nets = fake_nets()
    result = run(nets, replace(QUICK, mode="colorize"), picture(100, 90))
    (control,) = nets["controlnet"].embedded
    close(control[:, :1].expand_as(control), control)
    assert result.plan.working_size == (53, 48)  # a large one is shrunk, as its luma is not needed


def test_the_wavelet_fix_keeps_the_mean_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    faint = module.decode  # what leaves [-1, 1] is cut off, and that moves the mean
    monkeypatch.setattr(module, "decode", lambda vae, x: 0.4 * faint(vae, x))
    image, nets = 0.5 * picture(24, 30), real_nets()

    def shift(config: RestoreConfig, size: tuple[int, int] | None) -> Tensor:
        result = run(nets, config, image, output_size=size)
        return (resize(result.image, (24, 30)).mean((2, 3)) - image.mean((2, 3))).abs().max() * 127.5

    for size in (None, (60, 77), (250, 310)):
        assert shift(QUICK, size) <= 2
        assert shift(replace(QUICK, color_fix="none"), size) > 4


def test_the_adain_fix_gives_the_moments_of_the_control() -> None:
    image = 0.5 * picture(24, 30)
    result = run(fake_nets(), replace(QUICK, color_fix="adain"), image, output_size=(48, 60))
    control = enlarge(image / 2 + 0.5, (48, 60)) * 2 - 1
    close(result.image.mean((2, 3)), control.mean((2, 3)), 0.01)
    close(result.image.std((2, 3)), control.std((2, 3)), 0.02)


def test_a_grey_picture_stays_grey_where_colours_are_put_right() -> None:
    gray = picture(30, 40).mean(1, keepdim=True).expand(1, 3, 30, 40)
    for config, kept in ((QUICK, True), (replace(QUICK, color_fix="none"), False)):
        result = run(fake_nets(), config, gray).image
        assert bool((result.amax(1) - result.amin(1)).max() < 1e-5) == kept
    tinted = gray.clone()
    tinted[:, 0, 3, 4] -= 0.1
    assert float((run(fake_nets(), QUICK, tinted).image.std(1)).max()) > 1e-3


def test_stylize_leaves_the_colours_to_the_style() -> None:
    nets = fake_nets()
    result = run(nets, replace(QUICK, mode="stylize"))
    assert result.plan.config.color_fix == "none"
    close(result.image, run(nets, replace(QUICK, color_fix="none"), output_size=(32, 40)).image, 0)


# ---- the official formulas ---------------------------------------------------------------------------------


def test_official_formulas_work_at_the_official_size_on_whole_levels() -> None:
    config = replace(QUICK, formulas="official", process_size=50, ans="fallback", posterior="sample")
    nets = fake_nets()
    result = run(nets, config, picture(13, 17), output_size=(26, 34))
    assert (
        result.plan.working_size == (48, 64) == tuple(nets["vae"].encoded[0].shape[-2:])
    )  # 50 x 65, cut to multiples of 8
    assert result.image.shape == (1, 3, 26, 34)
    levels = (result.image + 1) * 127.5
    close(levels, levels.round(), 1e-3)
    assert len(nets["controlnet"].embedded) == len(result.plan.tiles)


def test_official_formulas_colour_on_the_sources_own_size() -> None:
    config = replace(QUICK, formulas="official", mode="colorize")
    result = run(fake_nets(), config, picture(70, 90))
    assert result.plan.working_size == (48, 56) and result.image.shape == (1, 3, 70, 90)


@pytest.mark.parametrize("output", [(26, 35), (13, 34), (39, 34)])
def test_official_formulas_refuse_to_squash(output: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="enlarges both sides alike") as refused:
        run(fake_nets(), replace(QUICK, formulas="official"), picture(13, 17), output_size=output)
    assert "\n" not in str(refused.value)


def test_a_fake_controlnet_alone_changes_the_picture() -> None:
    """Else the tests above could pass with the control left out."""
    controlled = run(fake_nets()).image
    assert not torch.allclose(controlled, run(fake_nets(), replace(QUICK, control_end=0.0)).image, atol=0.01)
    assert isinstance(fake_nets()["controlnet"], FakeControlNet)
