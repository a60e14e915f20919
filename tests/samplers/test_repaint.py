"""Blended sampling: RePaint's walk, the papers' plans and what sampling with them promises."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from samplers.ddim import ddim_sample
from samplers.repaint import blend_known, blended_sample, official_plan, repaint_plan, repaint_states
from samplers.schedule import (
    StepInfo,
    leading_timesteps,
    make_alphas_cumprod,
    make_betas,
    q_sample,
    start_timesteps,
)
from tests.helpers.fake_denoiser import NoDoubleOnLatents, fake_eps, recorded_noise
from tests.helpers.goldens import relative_error

LEVELS = make_alphas_cumprod(make_betas())
MASK = torch.zeros(1, 1, 6, 8)
MASK[..., 1:4, 2:6] = 1


def _latents(batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A start (B, 4, 6, 8) and a known latent (1, 4, 6, 8)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 4, 6, 8, generator=generator), torch.randn(1, 4, 6, 8, generator=generator)


# ---- RePaint's walk ----------------------------------------------------------------------------------------


def test_repaint_states_of_the_published_default() -> None:
    """T = 250, jump 10, 10 samples: 250 down, and 9 times 10 up and 10 down at each of 0, 10, ..., 230."""
    states = repaint_states(250, jump_length=10, jump_n_sample=10)
    assert len(states) == 1 + 250 + 24 * 9 * 20 == 4571
    assert states[:12] == [249, 248, 247, 246, 245, 244, 243, 242, 241, 240, 239, 238]
    assert states[19:32] == [230, 231, 232, 233, 234, 235, 236, 237, 238, 239, 240, 239, 238]
    assert states[-12:] == [10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0, -1]


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 5), st.booleans())
def test_repaint_states_walk_by_ones_and_jump_where_they_should(
    num_steps: int, jump_length: int, jump_n_sample: int, jump_from_final: bool
) -> None:
    states = repaint_states(
        num_steps, jump_length=jump_length, jump_n_sample=jump_n_sample, jump_from_final=jump_from_final
    )
    assert states[0] == num_steps - 1 and states[-1] == -1 and max(states) == num_steps - 1
    assert all(abs(a - b) == 1 for a, b in pairwise(states))
    descents = Counter(a for a, b in pairwise(states) if b < a)
    first = 0 if jump_from_final else 1
    whole = (
        first + max(num_steps - first, 0) // jump_length * jump_length
    )  # the blocks that fit, from the clean end
    expected = {k: jump_n_sample if first <= k < whole else 1 for k in range(num_steps)}
    assert descents == expected


@pytest.mark.parametrize(
    "options, states",
    [
        # RePaint's get_schedule_jump(8, 2, 2, 2, start_resampling=4)
        ({"num_steps": 8, "jump_length": 2, "jump_n_sample": 2, "n_sample": 2, "start_resampling": 4},
         "7 6 5 4 5 4 3 4 3 2 3 2 3 4 3 4 3 2 3 2 1 2 1 0 1 0 1 2 1 2 1 0 1 0 -1"),
        # get_schedule_jump(7, 1, 3, 2, 2, 2)
        ({"num_steps": 7, "jump_length": 3, "jump_n_sample": 2, "inner_jumps": [(2, 2)]},
         "6 5 4 5 6 5 4 3 4 5 6 5 4 5 6 5 4 3 2 3 4 3 2 1 0 1 2 1 0 1 2 3 2 3 4 3 2 1 0 1 2 1 0 -1"),
        # get_schedule_jump(6, 1, 3, 2, 2, 2, 1, 2)
        ({"num_steps": 6, "jump_length": 3, "jump_n_sample": 2, "inner_jumps": [(2, 2), (1, 2)]},
         "5 4 5 4 3 4 3 2 3 2 3 4 3 4 3 2 3 2 1 2 1 0 1 0 1 2 1 2 1 0 1 0 1 2 3 2 3 2 3 4 3 4 3 2 3 2 1 2 1 0 1 0 1 2 1 2 1 0 1 0 -1"),
    ],
)  # fmt: skip
def test_repaint_states_of_further_options_are_repaints(options: dict[str, Any], states: str) -> None:
    assert repaint_states(**options) == [int(state) for state in states.split()]


def test_repaint_states_refuses_counts_below_1() -> None:
    wrong: list[dict[str, Any]] = [{"n_sample": 0}, {"inner_jumps": [(0, 2)]}]
    for options in wrong:
        with pytest.raises(ValueError, match="at least 1"):
            repaint_states(5, jump_length=1, jump_n_sample=1, **options)
    for counts in ((0, 1, 1), (5, 0, 1), (5, 1, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            repaint_states(counts[0], jump_length=counts[1], jump_n_sample=counts[2])


# ---- the papers' plan --------------------------------------------------------------------------------------


@given(
    st.integers(1, 30),
    st.integers(0, 5),
    st.integers(1, 6),
    st.booleans(),
    st.sampled_from(["once", "fresh"]),
    st.sampled_from([1.0, float(LEVELS[0])]),
)
def test_repaint_plan_levels_are_those_the_latent_is_at(
    num_steps: int,
    repeats: int,
    jump_length: int,
    jump_from_final: bool,
    known_noise: str,
    final_alpha: float,
) -> None:
    assume(repeats == 0 or jump_length <= num_steps)
    plan = repaint_plan(
        leading_timesteps(num_steps),
        LEVELS,
        repeats=repeats,
        jump_length=jump_length,
        jump_from_final=jump_from_final,
        known_noise=known_noise,
        final_alpha=final_alpha,
    )
    level = float(LEVELS[leading_timesteps(num_steps)[0]])
    for evaluation in plan:
        assert evaluation.a_t == level == float(LEVELS[evaluation.t])
        assert evaluation.a_prev > evaluation.a_t and evaluation.a_known == evaluation.a_prev
        level = evaluation.a_prev if evaluation.renoise_to is None else evaluation.renoise_to
    assert level == final_alpha
    levels_by_id = {(e.known_id, e.a_known) for e in plan}
    assert len(levels_by_id) == len({e.known_id for e in plan})  # an x-hat is shared only at one level
    if known_noise == "fresh":
        assert len(levels_by_id) == len(plan)


@given(st.integers(1, 50), st.integers(0, 8))
def test_repaint_plan_is_algorithm_1(num_steps: int, repeats: int) -> None:
    timesteps = leading_timesteps(num_steps)
    plan = repaint_plan(timesteps, LEVELS, repeats=repeats)
    assert len(plan) == num_steps * (1 + repeats)
    assert [e.t for e in plan] == [t for t in timesteps.tolist() for _ in range(1 + repeats)]
    for i, evaluation in enumerate(plan):
        last_of_its_t = i % (1 + repeats) == repeats
        assert evaluation.renoise_to == (None if last_of_its_t else evaluation.a_t)
        assert evaluation.known_id == i // (1 + repeats)  # x-hat once per t
    assert plan[-1].a_prev == plan[-1].a_known == 1.0


def test_repaint_plan_of_the_published_repaint_default() -> None:
    timesteps = leading_timesteps(250)
    plan = repaint_plan(
        timesteps, LEVELS, repeats=9, jump_length=10, jump_from_final=False, known_noise="fresh"
    )
    assert len(plan) == 250 + 24 * 9 * 10
    assert sum(e.renoise_to is not None for e in plan) == 24 * 9
    assert plan[19 - 1].renoise_to == float(
        LEVELS[timesteps[249 - 240]]
    )  # from state 230, in one draw, to state 240


def test_repaint_plan_counts_of_the_mini_stages() -> None:
    timesteps = leading_timesteps(50)
    assert len(repaint_plan(timesteps, LEVELS, repeats=5)) == 300
    assert len(repaint_plan(start_timesteps(timesteps, 0.4), LEVELS)) == 20
    assert len(repaint_plan(start_timesteps(timesteps, 0.25), LEVELS)) == 13


def test_repaint_plan_with_the_known_at_the_current_level() -> None:
    plan = repaint_plan(leading_timesteps(10), LEVELS, known_level="current")
    assert all(e.a_known == e.a_t for e in plan)


def test_repaint_plan_refuses_what_it_does_not_know() -> None:
    wrongs: list[dict[str, Any]] = [
        {"known_level": "next"},
        {"known_noise": "twice"},
        {"repeats": -1},
        {"jump_length": 0},
    ]
    for wrong in wrongs:
        with pytest.raises(ValueError, match=str(next(iter(wrong)))):
            repaint_plan([21, 1], LEVELS, **wrong)
    with pytest.raises(ValueError, match="repeats"):
        official_plan([21, 1], LEVELS, repeats=-1)


# ---- blended sampling --------------------------------------------------------------------------------------


def test_blend_known_is_exact_on_both_sides() -> None:
    x, known = _latents()
    blended = blend_known(x, known, MASK)
    inside = MASK.bool().expand_as(x)
    assert torch.equal(blended[inside], x[inside])
    assert torch.equal(blended[~inside], known.expand_as(x)[~inside])
    torch.testing.assert_close(blend_known(x, known, MASK / 4), known + (x - known) * MASK / 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("repeats, jump_length", [(0, 1), (2, 1), (2, 3)])
def test_blended_sample_returns_the_background_exactly(
    dtype: torch.dtype, repeats: int, jump_length: int
) -> None:
    x, known = _latents()
    x, known = x.to(dtype), known.to(dtype)
    plan = repaint_plan(leading_timesteps(8), LEVELS, repeats=repeats, jump_length=jump_length)
    with NoDoubleOnLatents(dtype):
        out = blended_sample(
            fake_eps(), x, plan, known=known, mask=MASK, generator=torch.Generator().manual_seed(0)
        )
    outside = ~MASK.bool().expand_as(x)
    assert out.dtype == dtype and bool(out.isfinite().all())
    assert torch.equal(out[outside], known.expand_as(x)[outside])
    assert not torch.equal(out[~outside], known.expand_as(x)[~outside])


def test_blended_sample_in_bfloat16_stays_near_float32() -> None:
    x, known = _latents()
    plan = repaint_plan(leading_timesteps(8), LEVELS, repeats=1)

    def run(dtype: torch.dtype) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return blended_sample(fake_eps(), x.to(dtype), plan, known=known, mask=MASK, generator=generator)

    assert relative_error(run(torch.bfloat16), run(torch.float32)) < 0.05


def test_blended_sample_with_a_full_mask_is_ddim() -> None:
    x, known = _latents()
    timesteps = leading_timesteps(8)
    plan = [replace(e, a_known=None) for e in repaint_plan(timesteps, LEVELS)]
    for mask, steps in ((torch.ones(1, 1, 6, 8), repaint_plan(timesteps, LEVELS)), (MASK, plan)):
        out = blended_sample(
            fake_eps(), x, steps, known=known, mask=mask, noise=recorded_noise_by_site(), eta=1.0
        )
        ref = ddim_sample(fake_eps(), x, timesteps, LEVELS, eta=1.0, noise=recorded_noise_by_site())
        assert torch.equal(out, ref)


def recorded_noise_by_site(seed: int = 0) -> Callable[[str, int, tuple[int, ...]], Tensor]:
    """Noise that depends on site and step alone, not on the order of asking."""

    def noise(site: str, step: int, shape: tuple[int, ...]) -> Tensor:
        number = seed + 1000 * step + ["init", "step", "known", "renoise"].index(site)
        return torch.randn(shape, generator=torch.Generator().manual_seed(number))

    return noise


def test_blended_sample_asks_for_noise_at_its_documented_sites_in_order() -> None:
    x, known = _latents()
    own, single = tuple(x.shape), tuple(known.shape)
    plan = repaint_plan([401, 1], LEVELS, repeats=1)
    asked, noise = recorded_noise()
    blended_sample(fake_eps(), x, plan, known=known, mask=MASK, noise=noise)
    assert asked == [
        ("step", 0, own),
        ("known", 0, own),
        ("renoise", 0, own),
        ("step", 1, own),  # x-hat of t = 401 is used again
        ("renoise", 2, own),  # into level 1 there is no noise, neither in the step nor in the known latent
    ]
    asked, noise = recorded_noise()
    plan = repaint_plan([401, 1], LEVELS, repeats=1, known_noise="fresh", final_alpha=float(LEVELS[0]))
    blended_sample(fake_eps(), x, plan, known=known, mask=MASK, noise=noise, eta=0.0, share_known_noise=True)
    known_draws = [("known", i, single) for i in range(4)]
    assert asked == [
        known_draws[0],
        ("renoise", 0, own),
        *known_draws[1:3],
        ("renoise", 2, own),
        known_draws[3],
    ]


def test_blended_sample_reuses_one_x_hat_per_timestep() -> None:
    """Outside the mask the blend is x-hat: equal among the repeats of a t with "once", new with "fresh"."""
    x, known = _latents(1)
    for known_noise, distinct in (("once", 1), ("fresh", 3)):
        plan = [
            replace(e, renoise_to=None)
            for e in repaint_plan([401, 1], LEVELS, repeats=2, known_noise=known_noise)
        ]
        infos: list[StepInfo] = []
        generator = torch.Generator().manual_seed(0)
        blended_sample(
            fake_eps(), x, plan[:3], known=known, mask=MASK, generator=generator, on_step=infos.append
        )
        x_hats = torch.stack([info.x[..., 0, 0] for info in infos])
        assert len(x_hats.unique(dim=0)) == distinct
        assert not torch.equal(infos[0].x[..., 0, 0], known[..., 0, 0])


def test_blended_sample_gives_every_sample_its_own_known_noise_unless_shared() -> None:
    x, known = _latents(3)
    plan = repaint_plan([401, 201], LEVELS)[:1]
    for shared in (False, True):
        generator = torch.Generator().manual_seed(0)
        out = blended_sample(
            fake_eps(), x, plan, known=known, mask=MASK, generator=generator, share_known_noise=shared
        )
        assert torch.equal(out[0, :, 0, 0], out[1, :, 0, 0]) == shared


def test_blended_sample_holds_the_background_at_the_level_of_the_next_evaluation() -> None:
    """For a known latent of zeros, what the denoiser is shown outside the mask has power 1 - a_t."""
    known, x = (
        torch.zeros(1, 4, 64, 64),
        torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(0)),
    )
    timesteps = leading_timesteps(6)
    seen: list[tuple[int, float]] = []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        seen.append((int(t), x.square().mean().item()))
        return x

    plan = repaint_plan(timesteps, LEVELS, repeats=2)
    start = q_sample(known, int(timesteps[0]), LEVELS, x)
    blended_sample(
        denoise,
        start,
        plan,
        known=known,
        mask=torch.zeros(1, 1, 64, 64),
        generator=torch.Generator().manual_seed(1),
    )
    for t, power in seen:
        assert power == pytest.approx(1 - float(LEVELS[t]), rel=0.05)


def test_blended_sample_of_a_tile_depends_only_on_its_window() -> None:
    """With noise cut from one field and a pointwise denoiser, a tile equals its window of the whole."""
    x, known = _latents()
    plan = repaint_plan(leading_timesteps(6), LEVELS, repeats=1)
    field = recorded_noise_by_site(5)

    def run(top: int, left: int, height: int, width: int) -> Tensor:
        def cut(tensor: Tensor) -> Tensor:
            return tensor[..., top : top + height, left : left + width]

        def noise(site: str, step: int, shape: tuple[int, ...]) -> Tensor:
            return cut(field(site, step, (*shape[:2], 6, 8)))

        return blended_sample(fake_eps(), cut(x), plan, known=cut(known), mask=cut(MASK), noise=noise)

    whole = run(0, 0, 6, 8)
    for top, left, height, width in ((0, 0, 4, 5), (2, 3, 4, 5), (1, 2, 3, 3)):
        tile = run(top, left, height, width)
        torch.testing.assert_close(
            tile, whole[..., top : top + height, left : left + width], rtol=0, atol=1e-6
        )


def test_blended_sample_is_repeatable_and_leaves_its_inputs_alone() -> None:
    x, known = _latents()
    before = [x.clone(), known.clone(), MASK.clone()]
    plan = repaint_plan(leading_timesteps(5), LEVELS, repeats=1)
    outs = [
        blended_sample(
            fake_eps(), x, plan, known=known, mask=MASK, generator=torch.Generator().manual_seed(9)
        )
        for _ in range(2)
    ]
    assert torch.equal(*outs)
    assert all(torch.equal(a, b) for a, b in zip((x, known, MASK), before, strict=True))


def test_blended_sample_reports_every_evaluation_and_asks_for_its_mask() -> None:
    x, known = _latents()
    plan = repaint_plan([401, 201, 1], LEVELS, repeats=1)
    infos: list[StepInfo] = []
    asked: list[int] = []

    def mask(step: int) -> Tensor:
        asked.append(step)
        return MASK

    out = blended_sample(
        fake_eps(),
        x,
        plan,
        known=known,
        mask=mask,
        generator=torch.Generator().manual_seed(0),
        on_step=infos.append,
    )
    assert asked == [info.step for info in infos] == list(range(6))
    assert [info.t for info in infos] == [401, 401, 201, 201, 1, 1] and {info.total for info in infos} == {6}
    assert torch.equal(infos[-1].x, out)


def test_blended_sample_refuses_shapes_that_do_not_fit() -> None:
    x, known = _latents(3)
    plan = repaint_plan([401, 1], LEVELS)
    generator = torch.Generator()
    with pytest.raises(ValueError, match="known has shape"):
        blended_sample(fake_eps(), x, plan, known=known.expand(2, -1, -1, -1), mask=MASK, generator=generator)
    with pytest.raises(ValueError, match="mask has shape"):
        blended_sample(fake_eps(), x, plan, known=known, mask=MASK[..., :-1], generator=generator)
    with pytest.raises(ValueError, match="mask has shape"):
        blended_sample(fake_eps(), x, plan, known=known, mask=lambda _: MASK[0], generator=generator)


def test_a_jump_longer_than_the_run_is_refused() -> None:
    alphas = torch.linspace(0.99, 0.1, 100, dtype=torch.float64)
    assert len(repaint_plan([80, 60, 40], alphas, repeats=2, jump_length=3)) == 9
    assert len(repaint_plan([80, 60, 40], alphas, repeats=0, jump_length=4)) == 3
    with pytest.raises(ValueError, match="jump_length is 4, more than the 3 steps"):
        repaint_plan([80, 60, 40], alphas, repeats=2, jump_length=4)
