"""The samplers by name: their steps in blended sampling, and the timesteps of part of a run."""

from functools import partial
from typing import get_args

import pytest
import torch
from torch import Tensor

from msbd.edit.config import Sampler as EditSampler
from msbd.restore.config import Sampler as RestoreSampler
from msbd.solvers import evaluations, make_solver, make_steps, make_timesteps, partial_timesteps, sample
from samplers.dpmpp import dpmpp_sample
from samplers.dpmpp_sde import dpmpp_msde_sample
from samplers.euler import euler_sample
from samplers.lcm import lcm_sample
from samplers.lms import deis_sample, lms_sample
from samplers.repaint import blended_sample, repaint_plan
from samplers.schedule import StepInfo, make_alphas_cumprod, make_betas, sigma_range
from samplers.unipc import unipc_sample

ALPHAS = make_alphas_cumprod(make_betas())

SOLVED = {
    "unipc": unipc_sample, "dpmpp": dpmpp_sample, "dpmpp_3m": partial(dpmpp_sample, order=3, lower_order_final=False),
    "deis": partial(deis_sample, lower_order_final=False), "lms": lms_sample, "euler": euler_sample,
    "euler_a": partial(euler_sample, eta=1.0), "dpmpp_2m_sde": dpmpp_msde_sample,
    "dpmpp_3m_sde": partial(dpmpp_msde_sample, order=3), "lcm": lcm_sample,
}  # fmt: skip


@pytest.mark.parametrize("sampler", SOLVED)
def test_where_all_is_repainted_a_solver_is_its_own_sampler(sampler: str) -> None:
    timesteps = make_timesteps(sampler, 6)
    x = torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(1))

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x + t / 1000)

    def noise(site: str, step: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(step))

    plan = repaint_plan(timesteps, ALPHAS)
    ones = torch.ones(1, 1, 5, 6)
    solver = make_solver(sampler, 1.0)
    blended = blended_sample(
        denoise, x, plan, known=torch.zeros_like(x), mask=ones, noise=noise, solver=solver
    )
    alone = SOLVED[sampler](denoise, x, timesteps, ALPHAS, noise=noise)
    torch.testing.assert_close(blended, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sampler", ["ddim", *SOLVED])
def test_with_any_solver_the_known_part_comes_back_exactly(sampler: str) -> None:
    generator = torch.Generator().manual_seed(2)
    known, x = (torch.randn(1, 4, 6, 6, generator=generator) for _ in range(2))
    mask = torch.zeros(1, 1, 6, 6)
    mask[..., 2:, 2:] = 1
    plan = repaint_plan(make_timesteps(sampler, 5), ALPHAS, repeats=2)
    out = blended_sample(
        lambda x, t: torch.tanh(x), x, plan, known=known, mask=mask, generator=generator,
        solver=make_solver(sampler, 0.0),
    )  # fmt: skip
    assert torch.equal(out * (1 - mask), known * (1 - mask)) and torch.isfinite(out).all()


@pytest.mark.parametrize("sampler", ["ddim", "euler", "lcm"])  # methods of one step
def test_a_run_in_two_parts_is_the_run_in_one(sampler: str) -> None:
    x, known = (torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(s)) for s in (3, 4))
    mask = (x[:, :1] > 0).float()

    def noise(site: str, step: int, shape: tuple[int, ...]) -> Tensor:
        seed = step + {"step": 0, "known": 1000, "renoise": 2000}[site]
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    plan = repaint_plan(make_timesteps(sampler, 6), ALPHAS, repeats=1)
    settings = {"known": known, "mask": mask, "noise": noise, "solver": make_solver(sampler, 0.5)}

    def run(x: Tensor, start: int, stop: int) -> Tensor:
        return blended_sample(lambda x, t: torch.tanh(x), x, plan, start=start, stop=stop, **settings)

    assert torch.equal(run(run(x, 0, 4), 4, len(plan)), run(x, 0, len(plan)))


@pytest.mark.parametrize(
    "sampler, steps, start, expected",
    [
        ("ddim", 50, 0.4, list(range(381, 0, -20))),  # the paper's 20
        ("ddim", 5, 0.1, [1]),  # never none
        ("lcm", 8, 1.0, [999, 879, 759, 639, 499, 379, 259, 139]),
        ("lcm", 8, 0.25, [239, 119]),  # of whole runs only 119 would lie there
        ("lcm", 2, 0.25, [239]),
    ],
)
def test_part_of_a_run(sampler: str, steps: int, start: float, expected: list[int]) -> None:
    assert partial_timesteps(sampler, steps, start).tolist() == expected


@pytest.mark.parametrize("sampler", ["ddim", *SOLVED])
@pytest.mark.parametrize("start", [0.05, 0.25, 0.4, 0.77])
def test_part_of_a_run_starts_where_it_is_asked_to(sampler: str, start: float) -> None:
    timesteps = partial_timesteps(sampler, 20, start).tolist()
    assert timesteps == sorted(set(timesteps), reverse=True) and timesteps[-1] > 0
    assert timesteps[0] <= 1000 * start


def test_every_sampler_of_the_options_is_one() -> None:
    assert set(get_args(EditSampler)) == {"ddim", *SOLVED}
    for sampler in get_args(RestoreSampler):
        assert len(make_timesteps(sampler, 4)) == 4


SPACINGS = ("auto", "linspace", "leading", "trailing", "karras", "exponential", "beta")


@pytest.mark.parametrize("sampler", get_args(RestoreSampler))
@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_sampler_over_every_spacing(sampler: str, spacing: str) -> None:
    """A net that knows the clean latent is believed, and a net is asked as often as said."""
    if sampler in ("lcm", "tcd") and spacing != "auto":
        with pytest.raises(
            ValueError, match=f"{sampler} (has timesteps of its own|steps over whole timesteps)"
        ):
            make_steps(sampler, 5, spacing, ALPHAS)
        return
    if sampler in ("ddim", "pndm") and spacing in SPACINGS[4:]:
        with pytest.raises(ValueError, match="euler takes ddim's steps"):
            make_steps(sampler, 5, spacing, ALPHAS)
        return
    timesteps, levels = make_steps(sampler, 5, spacing, ALPHAS)
    assert (levels is None) == (spacing in SPACINGS[:4]) and len(timesteps) == 5
    x0, x = (torch.randn(1, 2, 3, 4, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    for final_alpha in (1.0, float(ALPHAS[0])):
        for prediction in ("sample", "epsilon"):
            asked: list[float] = []
            seen: list[StepInfo] = []

            def net(x: Tensor, t: Tensor, prediction: str = prediction, asked: list[float] = asked) -> Tensor:
                asked.append(float(t))
                return x0 if prediction == "sample" else torch.tanh(x)

            out = sample(
                sampler, net, x, timesteps, ALPHAS, levels=levels, final_alpha=final_alpha, prediction=prediction,
                noise=lambda site, step, shape: torch.zeros(shape), on_step=seen.append,
            )  # fmt: skip
            assert len(asked) == len(seen) == evaluations(sampler, 5, clean=final_alpha == 1)
            assert out.isfinite().all() and all(0 <= t <= 999 for t in asked)
            if prediction == "sample" and final_alpha == 1:
                torch.testing.assert_close(out, x0, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("spacing", SPACINGS[4:])
def test_own_ranges_of_sigma(spacing: str) -> None:
    least, most = sigma_range(ALPHAS)
    timesteps, levels = make_steps("euler", 6, spacing, ALPHAS)
    assert levels is not None
    sigmas = ((1 - levels) / levels).sqrt()
    assert sigmas.tolist()[::5] == pytest.approx([most, least]) and timesteps.tolist()[::5] == pytest.approx(
        [999, 0], abs=1e-6
    )
    timesteps, levels = make_steps("dpmpp", 6, spacing, ALPHAS, 0.1, 10.0)
    assert levels is not None and not timesteps.is_floating_point()
    assert ((1 - levels) / levels).sqrt().tolist()[::5] == pytest.approx([10.0, 0.1])
    for wrong in ((0.5, 0.4), (0.001, None), (None, 20.0)):
        with pytest.raises(ValueError, match="sigma_min is .* and sigma_max .*; expected 0.0"):
            make_steps("euler", 6, spacing, ALPHAS, *wrong)
    with pytest.raises(ValueError, match="sigma_min and sigma_max are for spacing karras, exponential, beta"):
        make_steps("euler", 6, "auto", ALPHAS, 0.1)


@pytest.mark.parametrize("spacing", SPACINGS[4:])
@pytest.mark.parametrize("sampler", ["ddim", "dpmpp", "euler"])
def test_part_of_a_run_over_sigmas(sampler: str, spacing: str) -> None:
    """The nearest timesteps, none twice, from the start on."""
    whole = partial_timesteps(sampler, 30, 1.0, spacing, ALPHAS)
    assert whole[0] == 999 and whole[-1] == 0 and (whole.diff() < 0).all() and 15 < len(whole) <= 30
    part = partial_timesteps(sampler, 30, 0.4, spacing, ALPHAS)
    assert part.tolist() == [t for t in whole.tolist() if t <= 400]
    with pytest.raises(ValueError, match="lcm has timesteps of its own"):
        partial_timesteps("lcm", 4, 1.0, spacing, ALPHAS)
