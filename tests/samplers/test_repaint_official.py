"""Blended sampling with the official counting, against stored runs of official MSBD and of LDM's masked
sampling.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from samplers.guidance import classifier_free_guidance
from samplers.repaint import blend_known, blended_sample, official_indices, official_plan, repaint_plan
from samplers.schedule import (
    ldm_start_timesteps,
    ldm_timesteps,
    make_alphas_cumprod,
    make_betas,
    q_sample,
    q_sample_between,
)
from tests.helpers.fake_denoiser import fake_eps
from tests.helpers.goldens import Golden, load_golden, relative_error

LEVELS = make_alphas_cumprod(make_betas())


def test_official_indices_match_the_official_schedules() -> None:
    schedules = load_golden("msbd", "repaint_schedule").meta["schedules"]
    for name, indices in schedules.items():
        num_steps, repeats, jump = (int(part[1:]) for part in name.split("_"))
        assert official_indices(num_steps, repeats=repeats, jump=jump) == indices, name


@pytest.mark.parametrize(
    ("num_steps", "repeats", "jump", "indices"),
    [
        (9, 2, 4, "8 7 6 5 4 3 2 1 5 4 3 2 1 0"),
        (7, 2, 2, "6 5 4 3 5 4 3 2 1 3 2 1 0"),
        (5, 3, 2, "4 3 2 1 3 2 1 3 2 1 0"),
        (4, 2, 3, "3 2 1 0"),
        (3, 2, 4, "2 1 0 0"),  # a jump longer than the run
        (6, 1, 2, "5 4 3 2 1 0"),
    ],
)
def test_official_indices_where_the_jump_does_not_divide_the_run(
    num_steps: int, repeats: int, jump: int, indices: str
) -> None:
    """The official function's lists: jumps are counted from the first step, unlike RePaint's."""
    found = official_indices(num_steps, repeats=repeats, jump=jump)
    assert found == [int(index) for index in indices.split()]
    plan = official_plan(range(num_steps, 0, -1), LEVELS, repeats=repeats, jump=jump)
    assert [evaluation.t - 1 for evaluation in plan] == found


def _stored_noise(golden: Golden) -> dict[tuple[str, int], Tensor]:
    """The stored draws by our (site, step)."""
    ours = {"p_sample_ddim": "step", "q_sample(source)": "known", "repaint_jump_back": "renoise"}
    draws: dict[tuple[str, int], Tensor] = {}
    step = -1
    for k, site in enumerate(golden.meta["noise_sites_in_order"]):
        step += site == "p_sample_ddim"
        draws[ours.get(site, "init"), max(step, 0)] = golden[f"noise.{k:03d}"]
    return draws


def _shrinking_mask(mask: Tensor) -> Callable[[int], Tensor]:
    """The official dilation of a 10-step run: box kernels 7, 5, 3, 1, a quarter of the run each."""

    def at(step: int) -> Tensor:
        size = (7, 5, 3, 1)[min(4 * step // 10, 3)]
        return F.max_pool2d(mask, size, stride=1, padding=size // 2)

    return at


@pytest.mark.parametrize(
    "case",
    [
        "bld_10_dilate",
        "bld_10_eta0_cfg_b2",
        "bld_10_eta1",
        "bld_10_repaint2_jump0",
        "bld_10_repaint2_jump1",
        "bld_20_sdedit035",
    ],
)
def test_blended_sample_with_the_official_plan_matches_msbd(case: str) -> None:
    golden = load_golden("msbd", case)
    args, draws = golden.meta["args"], _stored_noise(golden)
    timesteps = ldm_start_timesteps(ldm_timesteps(args["num_ddim_steps"]), args["start_timestep"])
    plan = official_plan(timesteps, LEVELS, repeats=args["repaint_steps"], jump=args["repaint_jump"])
    assert [evaluation.t for evaluation in plan] == golden.meta["time_range"]

    source, x = golden["in.source"], draws["init", 0]
    if args["start_timestep"] < 1:
        x = q_sample_between(source, LEVELS[0], plan[0].a_t, x)
    seen, used = [x], {("init", 0)}

    def noise(site: str, step: int, shape: tuple[int, ...]) -> Tensor:
        used.add((site, step))
        return draws[site, step]

    out = blended_sample(
        classifier_free_guidance(
            fake_eps, golden["in.c"], golden["in.uc"], args["unconditional_guidance_scale"]
        ),
        x,
        plan,
        known=source,
        mask=_shrinking_mask(golden["in.mask"]) if args["dilate_mask"] else golden["in.mask"],
        noise=noise,
        eta=args["eta"],
        share_known_noise=True,
        on_step=lambda info: seen.append(info.x),
    )
    assert relative_error(out, golden["out.x"]) < 2e-6
    assert relative_error(torch.stack(seen), golden["out.x_inter"]) < 2e-6
    unused = {site for site, _ in draws.keys() - used}
    assert unused == ({"step"} if args["eta"] == 0 else set())  # official code draws it there in vain


def test_blended_sample_matches_ldm_masked_sampling() -> None:
    """LDM blends before each step: the same as at the start and after every step but the last."""
    golden = load_golden("ldm_sampler", "ddim_10_mask")
    timesteps, known, keep = ldm_timesteps(10), golden["in.x0"], golden["in.mask"]  # their mask: 1 = keep
    x = q_sample(known, int(timesteps[0]), LEVELS, golden["noise"][0])
    plan = list(repaint_plan(timesteps, LEVELS, final_alpha=float(LEVELS[0])))
    plan[-1] = replace(plan[-1], a_known=None)
    seen: list[Tensor] = []
    out = blended_sample(
        classifier_free_guidance(fake_eps, golden["in.c"], golden["in.uc"], 1.0),
        blend_known(golden["in.x_T"], x, 1 - keep),
        plan,
        known=known,
        mask=1 - keep,
        noise=lambda site, step, shape: golden["noise"][2 * step + (1 if site == "step" else 2)],
        on_step=lambda info: seen.append(info.pred_x0),
    )
    assert relative_error(out, golden["out.x"]) < 1e-6
    assert relative_error(torch.stack(seen), golden["out.pred_x0"][1:]) < 1e-6


def test_official_plan_has_the_official_quirks() -> None:
    plan = official_plan(ldm_timesteps(50), LEVELS, repeats=5)
    assert len(plan) == 300 and plan[-1].a_prev == float(LEVELS[0])
    assert all(e.a_known == e.a_t for e in plan)  # one step too noisy
    assert [e.known_id for e in plan] == list(range(300))  # fresh every time
    renoised = [i for i, e in enumerate(plan) if e.renoise_to is not None]
    # after each but the last of the six evaluations of an index; not after the very first, not at index 0
    assert renoised == [i for i in range(1, 294) if i % 6 != 5]
