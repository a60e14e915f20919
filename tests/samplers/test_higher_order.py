"""Heun, DPM2, LMS, DEIS, single-step DPM-Solver++, the SDE solvers and TCD: their orders, what they have in
common with the samplers they extend, and diffusers' trajectories.
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from samplers.ddim import ddim_sample
from samplers.dpm2 import dpm2_sample, middle_level
from samplers.dpm_single import dpm_single_sample, dpm_single_step, group_orders
from samplers.dpmpp import dpmpp_step
from samplers.dpmpp_sde import dpmpp_msde_sample, dpmpp_msde_step, dpmpp_sde_sample
from samplers.euler import euler_sample
from samplers.heun import heun_sample
from samplers.lcm import lcm_timesteps
from samplers.lms import deis_sample, lms_sample, lms_step, lms_weights
from samplers.schedule import (
    Denoiser,
    StepInfo,
    half_log_snr,
    karras_steps,
    linspace_timesteps,
    make_alphas_cumprod,
    make_betas,
    to_eps,
    trailing_timesteps,
)
from samplers.tcd import tcd_sample, tcd_step
from tests.helpers.gaussian import MEAN, START, STD, gaussian_eps, gaussian_flow, perfect, uneven_levels
from tests.helpers.goldens import relative_error

LEVELS = make_alphas_cumprod(make_betas())
X = torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(0)).double()
Sampler = Callable[..., Tensor]
SINGLES = (
    deis_sample,
    dpm_single_sample,
    dpmpp_msde_sample,
    dpmpp_sde_sample,
    dpm2_sample,
    heun_sample,
    lms_sample,
)


def between(levels: Tensor) -> Callable[[Tensor], float]:
    """The level of a timestep, in between linearly in log sigma, as the samplers tell it."""
    log_sigmas = [-half_log_snr(float(a)) for a in levels]

    def level(t: Tensor) -> float:
        low = min(int(t), len(log_sigmas) - 2)
        share = float(t) - low
        return 1 / (1 + math.exp(log_sigmas[low] + share * (log_sigmas[low + 1] - log_sigmas[low])) ** 2)

    return level


def error(sample: Sampler, num_steps: int, **options: Any) -> float:
    """Of a run of the Gaussian's ODE from entry N to entry 0 of an uneven table."""
    levels = uneven_levels(num_steps)
    first, last = float(levels[-1]), float(levels[0])
    level = between(levels)
    out = sample(
        lambda x, t: gaussian_eps(x, level(t)), START, range(num_steps, 0, -1), levels, final_alpha=last, **options
    )  # fmt: skip
    return float((out - gaussian_flow(START, first, last)).abs().max())


@pytest.mark.parametrize(
    "sample, order",
    [
        (heun_sample, 2),
        (dpm2_sample, 2),
        (partial(dpmpp_sde_sample, eta=0.0), 2),
        (partial(dpmpp_msde_sample, eta=0.0), 2),
        (partial(dpmpp_msde_sample, eta=0.0, solver_type="heun"), 2),
        (partial(dpm_single_sample, order=1), 1),
        (dpm_single_sample, 2),
        (partial(dpm_single_sample, solver_type="heun"), 2),
        (partial(dpm_single_sample, algorithm_type="dpmsolver"), 2),
        (partial(dpm_single_sample, order=3, solver_type="heun"), 2),
        (partial(lms_sample, order=1), 1),
        (partial(lms_sample, order=2), 2),
        (partial(deis_sample, order=2, lower_order_final=False), 2),
    ],
)
def test_the_error_falls_with_the_order_of_the_method(sample: Sampler, order: int) -> None:
    """Multistep methods of third and fourth order begin with steps of lower order, so they are left out. A
    group of three single steps is of third order only where its points are thirds of it.
    """
    n = 96
    assert math.log2(error(sample, n) / error(sample, 2 * n)) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize(
    "sample", [partial(lms_sample, order=3), partial(lms_sample, order=4), partial(deis_sample, order=3)]
)
def test_further_slopes_do_not_harm(sample: Sampler) -> None:
    assert error(sample, 96) < error(partial(lms_sample, order=1), 96) / 20


@pytest.mark.parametrize("variable", ["sigma", "log_sigma"])
def test_weights_integrate_polynomials_exactly(variable: str) -> None:
    """Of slopes that are a polynomial of degree n - 1 in the variable."""
    sigmas, target = [3.0, 4.5, 7.0, 12.0], 1.75
    for degree in range(4):
        for count in range(degree + 1, 5):
            u = (lambda s: s) if variable == "sigma" else math.log
            weights = lms_weights(sigmas[:count], target, variable)
            got = sum(w * u(s) ** degree for w, s in zip(weights, sigmas, strict=False))
            grid = torch.linspace(3.0, target, 20001, dtype=torch.float64)
            values = (grid if variable == "sigma" else grid.log()) ** degree
            assert got == pytest.approx(float(torch.trapezoid(values, grid)), rel=1e-6)


def test_weights_into_sigma_0() -> None:
    assert lms_weights([2.0], 0.0) == lms_weights([2.0], 0.0, "log_sigma") == [-2.0]
    assert sum(lms_weights([2.0, 3.0, 5.0], 0.0, "log_sigma")) == pytest.approx(-2.0)


@pytest.mark.parametrize(
    "sample",
    [
        partial(lms_sample, order=1),
        partial(deis_sample, order=1),
        partial(dpm_single_sample, order=1),
        partial(tcd_sample, gamma=0.0),
    ],
)
def test_first_order_is_ddim(sample: Sampler) -> None:
    net: Denoiser = lambda x, t: torch.tanh(x) * (1 + t / 1000)  # noqa: E731
    timesteps = linspace_timesteps(7, drop_zero=True)
    wanted = ddim_sample(net, X, timesteps, LEVELS)
    assert relative_error(sample(net, X, timesteps, LEVELS), wanted) < 1e-12


def test_without_noise_the_multistep_sde_is_dpmpp() -> None:
    levels = [0.02, 0.1, 0.3, 0.6, 0.9]
    kinds: list[dict[str, Any]] = [
        {"order": 1},
        {"order": 2},
        {"order": 2, "solver_type": "heun"},
        {"order": 3},
    ]
    for options in kinds:
        x = y = X
        theirs: tuple[Tensor, ...] = ()
        ours: tuple[Tensor, ...] = ()
        for a_t, a_prev in pairwise(levels):
            x, _, theirs = dpmpp_step(x, torch.tanh(x), a_t, a_prev, theirs, **options)
            y, _, ours = dpmpp_msde_step(y, torch.tanh(y), a_t, a_prev, ours, eta=0.0, **options)
        assert relative_error(y, x) < 1e-12, options


@pytest.mark.parametrize(
    "sample",
    [dpmpp_msde_sample, partial(dpmpp_msde_sample, order=3), dpmpp_sde_sample, partial(dpm2_sample, eta=1.0)],
)
def test_noise_keeps_the_distribution(sample: Sampler) -> None:
    """Of 40,000 numbers: mean and deviation of the data, within some of their own errors."""
    levels = uneven_levels(60)
    level = between(levels)
    generator = torch.Generator().manual_seed(1)
    a = float(levels[-1])
    x = (
        math.sqrt(a) * MEAN
        + math.sqrt(a * STD**2 + 1 - a) * torch.randn(1, 1, 200, 200, generator=generator).double()
    )
    out = sample(
        lambda x, t: gaussian_eps(x, level(t)), x, range(60, 0, -1), levels, final_alpha=float(levels[0]), generator=generator
    )  # fmt: skip
    a = float(levels[0])
    assert float(out.mean()) == pytest.approx(math.sqrt(a) * MEAN, abs=0.015)
    assert float(out.std()) == pytest.approx(math.sqrt(a * STD**2 + 1 - a), rel=0.03)


@pytest.mark.parametrize("sample", SINGLES)
def test_a_perfect_denoiser_is_believed_and_each_evaluation_reported(sample: Sampler) -> None:
    """From any noise, to data that is one picture, in few steps; with Karras' sigmas too."""
    x0 = X.flip(0)
    for timesteps, levels in ((trailing_timesteps(5), None), karras_steps(5, LEVELS, rounded=False)):
        seen: list[StepInfo] = []
        asked = 0

        def net(x: Tensor, t: Tensor) -> Tensor:
            nonlocal asked
            asked += 1
            return x0

        out = sample(
            net, X, timesteps, LEVELS, levels=levels, prediction="sample", on_step=seen.append,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        assert relative_error(out, x0) < 1e-9
        assert len(seen) == asked == seen[0].total and [info.step for info in seen] == [*range(asked)]
        assert torch.equal(seen[-1].x, out)


@pytest.mark.parametrize("sample", SINGLES)
@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_what_the_net_predicts_makes_no_difference(sample: Sampler, prediction: str) -> None:
    """A net asked for v, or for the clean latent, that knows the same: the same run, also where timesteps are
    rounded and say another level than the latent's.
    """
    timesteps, levels = karras_steps(6, LEVELS, rounded=False)
    level = between(LEVELS)

    def eps(x: Tensor, t: Tensor) -> Tensor:
        return gaussian_eps(x, level(t))

    def net(x: Tensor, t: Tensor) -> Tensor:
        a, e = level(t), eps(x, t)
        x0 = (x - math.sqrt(1 - a) * e) / math.sqrt(a)
        return x0 if prediction == "sample" else math.sqrt(a) * e - math.sqrt(1 - a) * x0

    def run(model: Denoiser, **how: Any) -> Tensor:
        return sample(
            model, X, timesteps, LEVELS, levels=levels, generator=torch.Generator().manual_seed(0), **how
        )

    assert relative_error(run(net, prediction=prediction), run(eps)) < 1e-6


def test_groups_of_single_steps() -> None:
    assert group_orders(5, 1) == [1] * 5
    assert group_orders(4, 2) == [1, 2, 1, 2] and group_orders(5, 2) == [1, 2, 1, 2, 1]
    assert group_orders(6, 3) == [1, 2, 3, 1, 2, 1] and group_orders(7, 3) == [1, 2, 3, 1, 2, 3, 1]
    assert (
        group_orders(8, 3) == [1, 2, 3, 1, 2, 3, 1, 2]
        and group_orders(3, 3) == [1, 2, 1]
        and group_orders(1, 3) == [1]
    )
    with pytest.raises(ValueError, match="orders 1 to 3"):
        group_orders(4, 4)


def test_tcd_noises_back_to_the_level_of_the_next_step() -> None:
    x0, noise = torch.full((1, 1, 100, 100), 0.5).double(), torch.randn(1, 1, 100, 100).double()
    eps = torch.randn(1, 1, 100, 100).double()
    x = math.sqrt(0.2) * x0 + math.sqrt(0.8) * eps
    there, pred_x0 = tcd_step(x, eps, 0.2, 0.9, 0.6, noise)
    wanted = (
        math.sqrt(0.6) * x0 + math.sqrt(0.6 / 0.9) * math.sqrt(0.1) * eps + math.sqrt(1 - 0.6 / 0.9) * noise
    )
    torch.testing.assert_close(there, wanted)
    torch.testing.assert_close(pred_x0, x0)
    out = tcd_sample(
        perfect(x0, LEVELS), x, lcm_timesteps(4), LEVELS, generator=torch.Generator().manual_seed(0)
    )
    torch.testing.assert_close(out, x0)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: lms_weights([1.0, 1.0], 0.5), "must differ"),
        (lambda: lms_weights([1.0], 0.5, "rho"), "variable 'rho' is not known"),
        (lambda: lms_step(X, X, 0.5, 0.6, order=0), "order is 0"),
        (lambda: lms_step(X, X, 0.5, 0.0), "a_prev 0.0"),
        (lambda: middle_level(0.5, 1.0), "which has no middle"),
        (lambda: dpm_single_step(X, [X], [0.5], 0.6, solver_type="x"), "solver_type 'x'"),
        (lambda: dpmpp_msde_step(X, X, 0.5, 0.6, order=4), "order 4"),
        (lambda: dpmpp_msde_step(X, X, 0.5, 0.6), "noise is None"),
        (lambda: dpmpp_msde_step(X, X, 0.5, 0.4, noise=X), "goes to a cleaner level"),
        (lambda: tcd_step(X, X, 0.5, 0.6, 0.7), "a_prev <= a_s"),
        (lambda: tcd_step(X, X, 0.5, 0.9, 0.7), "noise is None"),
        (lambda: tcd_sample(lambda x, t: x, X, [5], LEVELS, gamma=2.0), "gamma is 2.0"),
    ],
)
def test_wrong_use_is_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# ---- live --------------------------------------------------------------------------------------------------


def theirs(scheduler: Any, x: Tensor, num_steps: int, **how: Any) -> tuple[Tensor, Tensor]:
    """diffusers' run from unit noise `x`, and its timesteps."""
    scheduler.set_timesteps(num_steps)
    x = x * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(net(scheduler.scale_model_input(x, t), t), t, x, **how).prev_sample
    return x, scheduler.timesteps


def net(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(x) * (1 + 0.3 * torch.sin(torch.as_tensor(t).to(x) / 100))


def scheduler(name: str, **options: Any) -> Any:
    diffusers = pytest.importorskip("diffusers")
    return getattr(diffusers, name)(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **options
    )


@pytest.mark.parametrize("karras", [False, True])
@pytest.mark.parametrize(
    "name, sample",
    [
        ("HeunDiscreteScheduler", heun_sample),
        ("LMSDiscreteScheduler", lms_sample),
        ("KDPM2DiscreteScheduler", dpm2_sample),
    ],
)
def test_sigma_solvers_are_diffusers(name: str, sample: Sampler, karras: bool) -> None:
    if name == "KDPM2DiscreteScheduler" and karras:
        pytest.skip("theirs rounds Karras' timesteps")
    x = X.float()
    wanted, _ = theirs(scheduler(name, use_karras_sigmas=karras), x, 8)
    timesteps, levels = torch.linspace(999, 0, 8, dtype=torch.float64), None
    if karras:
        timesteps, levels = karras_steps(8, LEVELS, rounded=False)
    a = float(LEVELS[999])
    got = sample(net, math.sqrt(1 - a) * x, timesteps, LEVELS, levels=levels)
    assert relative_error(got, wanted) < 2e-4


@pytest.mark.parametrize("steps", [8, 20])
@pytest.mark.parametrize(
    "name, options, sample",
    [
        ("DEISMultistepScheduler", {"solver_order": 2, "lower_order_final": False}, partial(deis_sample, order=2, lower_order_final=False)),
        ("DEISMultistepScheduler", {"solver_order": 3, "lower_order_final": False}, partial(deis_sample, order=3, lower_order_final=False)),
        ("DPMSolverSinglestepScheduler", {"solver_order": 2, "final_sigmas_type": "sigma_min"}, dpm_single_sample),
        ("DPMSolverSinglestepScheduler", {"solver_order": 3, "final_sigmas_type": "sigma_min"}, partial(dpm_single_sample, order=3)),
        ("DPMSolverSinglestepScheduler", {"solver_order": 3, "solver_type": "heun", "final_sigmas_type": "sigma_min"}, partial(dpm_single_sample, order=3, solver_type="heun")),
    ],
)  # fmt: skip
def test_exponential_solvers_are_diffusers(
    name: str, options: dict[str, Any], sample: Sampler, steps: int
) -> None:
    x = X.float()
    wanted, timesteps = theirs(scheduler(name, **options), x, steps)
    assert torch.equal(timesteps, linspace_timesteps(steps, drop_zero=True))
    got = sample(net, x, timesteps, LEVELS, final_alpha=float(LEVELS[0]))
    assert relative_error(got, wanted) < 2e-4


@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
def test_2m_sde_is_diffusers(solver_type: str) -> None:
    one = scheduler(
        "DPMSolverMultistepScheduler",
        algorithm_type="sde-dpmsolver++",
        solver_type=solver_type,
        lower_order_final=False,
    )
    one.set_timesteps(8)
    x, noises = X.float(), torch.randn(8, *X.shape, generator=torch.Generator().manual_seed(2))
    for step, t in enumerate(one.timesteps):
        x = one.step(net(x, t), t, x, variance_noise=noises[step]).prev_sample
    got = dpmpp_msde_sample(
        net,
        X.float(),
        one.timesteps,
        LEVELS,
        solver_type=solver_type,
        noise=lambda site, step, shape: noises[step],
    )
    assert relative_error(got, x) < 2e-4


def test_tcd_is_diffusers() -> None:
    one = scheduler("TCDScheduler")
    one.set_timesteps(4)
    x, generator = X.float(), torch.Generator().manual_seed(3)
    for t in one.timesteps:
        x = one.step(net(x, t), t, x, eta=0.3, generator=generator).prev_sample
    got = tcd_sample(
        net,
        X.float(),
        one.timesteps,
        LEVELS,
        gamma=0.3,
        final_alpha=float(LEVELS[0]),
        generator=torch.Generator().manual_seed(3),
    )
    assert relative_error(got, x) < 1e-4


def test_heun_of_one_step_is_eulers() -> None:
    timesteps = torch.tensor([999])
    assert torch.equal(heun_sample(net, X, timesteps, LEVELS), euler_sample(net, X, timesteps, LEVELS))
    eps = net(X, timesteps[0])
    assert torch.equal(to_eps(eps, X, 0.5), eps)
