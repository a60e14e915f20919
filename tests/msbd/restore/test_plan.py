"""The options of a restoration, the sizes and tiles that follow from them, and the samplers by name."""

import dataclasses
import inspect
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from msbd.pixels.box import Box
from msbd.restore import official, paper
from msbd.restore.config import (
    NET_FREE,
    Method,
    Mode,
    ModelSpec,
    ResolvedRestoreConfig,
    RestoreConfig,
    Sampler,
    dial,
)
from msbd.restore.paper import SMALLEST, padded_box, working_size
from msbd.restore.plan import ENLARGED, RestorePlan, plan_restore
from msbd.restore.prompts import GRAY_NEGATIVE, NEGATIVE, QUALITY_PROMPT
from msbd.restore.rules import RULES, Rules
from msbd.solvers import evaluations, make_timesteps, sample
from samplers.ddim import ddim_sample
from samplers.schedule import q_sample
from tests.helpers.tiny import ALPHAS

SD, MINI = ModelSpec(), ModelSpec(128, 3.0, uses_prompts=False)
SAMPLERS: tuple[Sampler, ...] = get_args(Sampler)
FIELDS = {field.name for field in dataclasses.fields(RestoreConfig)}

# ---- refusals ----------------------------------------------------------------------------------------------

OUTSIDE: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("mode", "method", "sampler", "spacing", "final_level", "posterior"), ("best", "")),
    **dict.fromkeys(("vae_tiling", "color_fix", "formulas", "ans"), ("best", "")),
    **dict.fromkeys(("fidelity", "alpha_a", "eta"), (-0.01, 1.01, float("nan"))),
    **dict.fromkeys(("guidance_start", "guidance_end", "control_start", "control_end"), (-0.01, 1.01)),
    **dict.fromkeys(("guidance_scale", "conditioning_scale", "offset_noise_scale"), (-0.1, float("nan"))),
    **dict.fromkeys(("num_inference_steps", "tile_batch"), (0, -3)),
    **dict.fromkeys(("process_size", "latent_tiled_size", "decoder_tiled_size"), (7, 0)),
    "encoder_tiled_size": (63, 100),
    "latent_tiled_overlap": (-1,),
    "added_noise_level": (-1, 1000),
    "strength": (0.0, 1.1),
    **dict.fromkeys(("sigma_min", "sigma_max"), (0.0, -1.0, float("nan"))),
}


def test_every_option_but_words_and_switches_has_its_limits() -> None:
    free = {"added_prompt", "negative_prompt", "prompt_syntax", "init_latent_with_noise", "seed"}
    assert OUTSIDE.keys() == FIELDS - free


@pytest.mark.parametrize("name, value", [(name, value) for name, row in OUTSIDE.items() for value in row])
def test_a_value_outside_its_limits_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match="expected") as refused:
        RestoreConfig(**{name: value})
    assert str(refused.value).startswith(f"{name} is {value!r}; expected ") and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"alpha_a": 0.5, "added_noise_level": 900}, "alpha_a and added_noise_level"),
        ({"guidance_start": 0.6, "guidance_end": 0.5}, "guidance_start is 0.6, after guidance_end, 0.5"),
        ({"control_start": 0.6, "control_end": 0.5}, "control_start is 0.6, after control_end, 0.5"),
        ({"mode": "colorize", "method": "rrdb"}, "method rrdb knows no colours"),
        ({"method": "img2img", "init_latent_with_noise": True}, "no init_latent_with_noise"),
    ],
)
def test_options_that_exclude_each_other_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as refused:
        RestoreConfig(**options)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("tile, overlap", [(16, 16), (None, 32), (8, 100)])
def test_tiles_that_overlap_wholly_are_refused(tile: int | None, overlap: int) -> None:
    config = RestoreConfig(latent_tiled_size=tile, latent_tiled_overlap=overlap)
    with pytest.raises(ValueError, match=f"latent_tiled_overlap is {overlap}; expected less"):
        config.for_model(MINI)


# ---- what is left to the model and the mode ----------------------------------------------------------------


def maybe(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | values


share = st.floats(0, 1)
CONFIGS = st.fixed_dictionaries(
    {
        "mode": st.sampled_from(get_args(Mode)),
        "method": st.sampled_from(get_args(Method)),
        "fidelity": maybe(share),
        "guidance_scale": maybe(st.floats(0, 20)),
        "conditioning_scale": maybe(st.floats(0, 2)),
        "added_prompt": maybe(st.text(max_size=3)),
        "negative_prompt": maybe(st.text(max_size=3)),
        "process_size": maybe(st.integers(8, 900)),
        "latent_tiled_size": maybe(st.integers(8, 320)),
        "tile_batch": maybe(st.integers(1, 9)),
        "color_fix": st.sampled_from([None, "wavelet", "adain", "none"]),
        "seed": maybe(st.integers()),
    }
).filter(lambda options: options["mode"] != "colorize" or options["method"] not in NET_FREE)
LEVELS = maybe(
    share.map(lambda a: ("alpha_a", a)) | st.integers(0, 999).map(lambda n: ("added_noise_level", n))
)


@given(CONFIGS, LEVELS, st.sampled_from([SD, MINI]))
def test_a_model_fills_in_all_that_is_open(
    options: dict[str, Any], level: tuple[str, Any] | None, spec: ModelSpec
) -> None:
    options = options | dict([level] if level else [])
    full = RestoreConfig(**options).for_model(spec)
    open_fields = {name for name in FIELDS if getattr(full, name) is None}
    open_fields -= {"tile_batch", "fidelity", "sigma_min", "sigma_max"}
    assert len(open_fields) == 1 and open_fields <= {"alpha_a", "added_noise_level"}  # one says the level
    for name, value in options.items():
        if name == "color_fix" and options["mode"] == "colorize":
            assert full.color_fix == "none"  # the chroma is what changes there
        else:
            assert value is None or getattr(full, name) == value  # what was said stays
    assert isinstance(full, ResolvedRestoreConfig)
    assert full.fidelity == options["fidelity"] and full.tile_batch == options["tile_batch"]
    assert full.for_model(spec) == full


def test_the_models_own_values() -> None:
    full = RestoreConfig().for_model(SD)
    expected = {
        "guidance_scale": 9.0, "conditioning_scale": 1.0, "added_noise_level": 900, "alpha_a": None, "process_size": 768,
        "latent_tiled_size": 128, "latent_tiled_overlap": 32, "color_fix": "wavelet", "seed": 0,
        "added_prompt": QUALITY_PROMPT, "negative_prompt": NEGATIVE,
    }  # fmt: skip
    assert {name: getattr(full, name) for name in expected} == expected
    mini = RestoreConfig().for_model(MINI)
    assert (mini.process_size, mini.latent_tiled_size, mini.guidance_scale) == (192, 32, 3.0)
    assert (mini.added_prompt, mini.negative_prompt) == ("", "")
    assert RestoreConfig(mode="stylize").for_model(SD).color_fix == "none"
    gray = RestoreConfig(mode="colorize").for_model(SD)
    assert (gray.color_fix, gray.added_prompt, gray.negative_prompt) == ("none", "", GRAY_NEGATIVE)
    assert RestoreConfig(latent_tiled_size=20).for_model(SD).latent_tiled_overlap == 5


def test_the_defaults_of_a_resolved_config_are_those_of_stable_diffusion() -> None:
    assert RestoreConfig(added_noise_level=900).for_model(SD) == ResolvedRestoreConfig(added_noise_level=900)


def test_the_dial_sets_level_and_scale_and_is_overruled_by_them() -> None:
    full = RestoreConfig(fidelity=0.7).for_model(SD)
    assert (full.alpha_a, full.conditioning_scale) == dial(0.7) and full.added_noise_level is None
    named = RestoreConfig(fidelity=0.7, added_noise_level=100, conditioning_scale=0.2).for_model(SD)
    assert (named.alpha_a, named.added_noise_level, named.conditioning_scale) == (None, 100, 0.2)
    level = RestoreConfig(fidelity=0.7, alpha_a=0.1).for_model(SD)
    assert (level.alpha_a, level.conditioning_scale) == (0.1, dial(0.7)[1])


@given(share, share)
def test_the_dial_is_monotone_and_within_limits(one: float, other: float) -> None:
    low, high = dial(min(one, other)), dial(max(one, other))
    assert low[0] <= high[0] and low[1] <= high[1]
    RestoreConfig(alpha_a=high[0], conditioning_scale=high[1])


# ---- sizes -------------------------------------------------------------------------------------------------

sides = st.integers(1, 5000)
sizes = st.tuples(sides, sides)


@given(sizes, st.integers(8, 900), st.booleans())
def test_the_work_size_keeps_the_aspect_and_its_limits(
    size: tuple[int, int], least: int, shrink: bool
) -> None:
    work = working_size(size, least, shrink=shrink)
    assert min(work) >= 1
    long = size.index(max(size))
    exact = size[1 - long] * work[long] / size[long]
    assert abs(work[1 - long] - exact) <= 1 or work[1 - long] == 1
    if shrink:
        assert max(work) <= 2 * least + 1 and min(work) <= least + 1
    else:
        assert work[0] >= size[0] and work[1] >= size[1]
        assert work == size or (min(work) <= least + 1 and max(work) <= 2 * least + 1)
        assert min(work) >= least - 1 or work == size or max(work) >= 2 * least - 1


@pytest.mark.parametrize(
    "size, work, gray",
    [
        ((100, 200), (768, 1536), (768, 1536)),
        ((100, 150), (768, 1152), (768, 1152)),
        ((1000, 900), (1000, 900), (853, 768)),
        ((3, 500), (9, 1536), (9, 1536)),  # twice 768 along its longer side, and no more
        ((12, 2000), (12, 2000), (9, 1536)),
        ((1, 1), (768, 768), (768, 768)),
        ((4000, 1000), (4000, 1000), (1536, 384)),
    ],
)
def test_work_sizes(size: tuple[int, int], work: tuple[int, int], gray: tuple[int, int]) -> None:
    assert (working_size(size, 768), working_size(size, 768, shrink=True)) == (work, gray)


@given(sizes, st.sampled_from([1, 4, 8]))
def test_a_padded_box_is_of_whole_cells_around_the_picture(work: tuple[int, int], cell: int) -> None:
    box = padded_box(work, cell)
    for start, length, side in ((box.top, box.height, work[0]), (box.left, box.width, work[1])):
        assert length % cell == 0 and length >= SMALLEST and start <= 0 and start + length >= side
        assert length < max(side, SMALLEST) + cell
        assert abs(-start - (length - side) / 2) <= 0.5  # in its middle


@given(sizes, st.sampled_from(get_args(Mode)), st.sampled_from([SD, MINI]))
def test_a_plan_holds_together(size: tuple[int, int], mode: Mode, spec: ModelSpec) -> None:
    plan = plan_restore(size, None, RestoreConfig(mode=mode, latent_tiled_size=100), spec)
    assert plan.output_size == (ENLARGED[mode] * size[0], ENLARGED[mode] * size[1])
    assert plan.input_size == size
    assert plan.cells == (plan.padded_box.height // 8, plan.padded_box.width // 8)
    assert plan.padded_box.contains(Box(0, 0, *plan.working_size))
    covered = torch.zeros(plan.cells, dtype=torch.bool)
    for box in plan.tiles:
        assert max(box.size) <= 100
        covered[box.window] = True
    assert covered.all() and (len(plan.tiles) == 1) == (max(plan.cells) <= 100)
    assert len({box.size for box in plan.tiles}) == 1
    assert plan.evaluations == 20 * len(plan.tiles)


@pytest.mark.parametrize(
    "options, a_a",
    [
        ({}, ALPHAS[900]),
        ({"added_noise_level": 500}, ALPHAS[500]),
        ({"alpha_a": 0.3}, 0.3),
        ({"fidelity": 0.25}, 0.25),
        ({"ans": "fallback"}, ALPHAS[50]),  # 900 is not among unipc's timesteps
        ({"ans": "fallback", "sampler": "ddim"}, ALPHAS[900]),
        ({"ans": "fallback", "alpha_a": 0.0}, 0.0),
    ],
)
def test_a_plan_knows_the_level_of_the_start(options: dict[str, Any], a_a: float) -> None:
    assert plan_restore((9, 9), None, RestoreConfig(**options), SD).a_a == float(a_a)
    other = ALPHAS.flip(0)
    plan = plan_restore((9, 9), None, RestoreConfig(), SD, alphas_cumprod=other)
    assert plan.a_a == float(other[900])


def test_a_plan_knows_when_the_control_and_the_guidance_act() -> None:
    config = RestoreConfig(num_inference_steps=8, control_start=0.25, control_end=0.75, guidance_start=0.5)
    plan = plan_restore((9, 9), None, config, SD)
    timesteps = plan.timesteps.tolist()
    assert plan.controlled == tuple(timesteps[2:6]) and plan.guided == tuple(timesteps[4:])


def test_both_rules_have_the_same_functions() -> None:
    """So that one may stand for the other; `Rules` names them."""
    names = [name for name in vars(Rules) if not name.startswith("_")]
    assert len(names) == 9 and {"paper": paper, "official": official} == RULES
    for name in names:
        kinds = [inspect.signature(getattr(module, name)) for module in (paper, official)]
        assert kinds[0] == kinds[1], name
        assert list(kinds[0].parameters) == list(inspect.signature(getattr(Rules, name)).parameters)[1:]


@pytest.mark.parametrize("size, output", [((0, 5), None), ((5, 5), (0, 3)), ((5, 5), (3, -1))])
def test_sizes_without_pixels_are_refused(size: tuple[int, int], output: tuple[int, int] | None) -> None:
    with pytest.raises(ValueError, match="at least 1 pixel") as refused:
        plan_restore(size, output, RestoreConfig(), SD)
    assert "\n" not in str(refused.value)


def official_run(size: tuple[int, int], output: tuple[int, int] | None = None, **options: Any) -> RestorePlan:
    return plan_restore(size, output, RestoreConfig(**{**official.OPTIONS, **options}), SD)


def test_official_plans_are_the_official_codes() -> None:
    plan = official_run((101, 151))
    assert plan.working_size == official.prepared_size((101, 151), 4, 768) == plan.padded_box.size
    assert plan.padded_box == Box(0, 0, *plan.working_size) and plan.output_size == (404, 604)
    gray = official_run((101, 151), mode="colorize")
    assert gray.working_size == official.prepared_size((101, 151), 1, 768, grayscale=True)
    large = official_run((700, 700))
    assert large.tiles == tuple(official.latent_tiles(350, 350, 320, 8)) and len(large.tiles) == 4


@pytest.mark.parametrize(
    "output, reason",
    [
        ((404, 603), "enlarges both sides alike"),
        ((101 * 3 // 2, 151 * 3 // 2), "enlarges both sides alike"),
        ((50, 75), "enlarges both sides alike"),
    ],
)
def test_official_plans_refuse_other_shapes(output: tuple[int, int], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        official_run((101, 151), output)


@pytest.mark.parametrize("output", [(150, 225), (50, 75)])
def test_official_plans_refuse_shares_of_a_scale(output: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="whole numbers only"):
        official_run((100, 150), output)


# ---- samplers by name --------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 7, 20])
def test_timesteps_fall_from_where_the_picture_starts(sampler: Sampler, steps: int) -> None:
    timesteps = make_timesteps(sampler, steps).tolist()
    assert len(timesteps) == steps and timesteps == sorted(set(timesteps), reverse=True)
    assert timesteps[0] == 999 or sampler == "pndm"
    twice = sampler in ("heun", "dpm2", "dpm2_a", "dpmpp_sde")
    assert evaluations(sampler, steps) == (
        2 * steps - 1 if twice else steps + (sampler == "pndm" and steps > 1)
    )


@pytest.mark.parametrize("spacing, first", [("linspace", 999), ("leading", 951), ("trailing", 999)])
def test_another_spacing(spacing: str, first: int) -> None:
    for sampler in SAMPLERS:
        if sampler in ("lcm", "tcd"):
            with pytest.raises(ValueError, match=f"{sampler} has timesteps of its own"):
                make_timesteps(sampler, 20, spacing)
        else:
            assert make_timesteps(sampler, 20, spacing)[0] == first


def test_img2img_plans_its_share_of_the_schedule() -> None:
    plan = plan_restore((9, 9), None, RestoreConfig(method="img2img", strength=0.3), SD)
    whole = make_timesteps("unipc", 20)
    assert plan.timesteps.tolist() == [t for t in whole.tolist() if t <= 300]
    least = plan_restore((9, 9), None, RestoreConfig(method="img2img", strength=0.001), SD)
    assert len(least.timesteps) == 1
    everything = plan_restore((9, 9), None, RestoreConfig(method="img2img", strength=1.0), SD)
    assert everything.timesteps.tolist() == whole.tolist()


@pytest.mark.parametrize("method", ["bicubic", "rrdb"])
def test_methods_without_diffusion_plan_no_evaluation(method: Method) -> None:
    assert plan_restore((9, 9), None, RestoreConfig(method=method), SD).evaluations == 0


def run(sampler: str, x: Tensor, steps: int = 20, **options: Any) -> Tensor:
    """Sampling a net that knows the clean latent, (0.5, -0.25, ...)."""
    clean = torch.linspace(-0.5, 0.5, x.numel()).view_as(x)

    noise = torch.Generator().manual_seed(7)

    def draw(site: str, step: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=noise)

    timesteps = make_timesteps(sampler, steps)
    told = {"prediction": "sample", "noise": draw} | options
    return sample(sampler, lambda at, t: clean, x, timesteps, ALPHAS, **told) - clean


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_each_sampler_finds_the_clean_latent(sampler: Sampler) -> None:
    x = q_sample(
        torch.zeros(1, 4, 4, 4), int(make_timesteps(sampler, 20)[0]), ALPHAS, torch.randn(1, 4, 4, 4)
    )
    assert run(sampler, x).abs().max() < 1e-3
    noisy = run(sampler, x, final_alpha=float(ALPHAS[0])).std()
    assert noisy < 1e-3 if sampler == "lcm" else 0.005 < noisy < 0.1  # LCM always ends in the clean latent


def test_eta_is_ddims_and_euler_a_is_euler_with_fresh_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 4, 4, 4)
    seen: list[tuple[str, int]] = []

    def denoise(at: Tensor, t: Tensor) -> Tensor:
        return 0.5 * torch.tanh(at)

    def draw(site: str, step: int, shape: tuple[int, ...]) -> Tensor:
        seen.append((site, step))
        return torch.ones(shape)

    timesteps = make_timesteps("ddim", 4)
    found = sample("ddim", denoise, x, timesteps, ALPHAS, noise=draw, eta=0.6)
    torch.testing.assert_close(found, ddim_sample(denoise, x, timesteps, ALPHAS, noise=draw, eta=0.6))
    assert len(seen) in (6, 8)
    for sampler, draws in (
        ("euler", False),
        ("euler_a", True),
        ("unipc", False),
        ("dpmpp", False),
        ("pndm", False),
    ):
        seen.clear()
        plain = sample(sampler, denoise, x, make_timesteps(sampler, 4), ALPHAS, noise=draw, eta=0.0)
        assert bool(seen) == draws
        assert torch.equal(
            plain, sample(sampler, denoise, x, make_timesteps(sampler, 4), ALPHAS, noise=draw, eta=0.6)
        )
