"""What diffusers' scheduler tests run over, and their stored numbers as cases for our samplers.

Their tests (tests/schedulers at commit 58eb52c) lead a fixed tensor through a scheduler, with a formula for a
net, and store the sum and the mean of the absolute result. A test file here lists those of one or several of
their files as `CASES` and checks them with `check`; `python -m tests.peers.count` counts them all.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from samplers.schedule import Denoiser, make_alphas_cumprod, make_betas

SHAPE = (4, 3, 8, 8)

# How many numbers each of their files stores: sums, means, single variances, and lists of timesteps, 1 each.
STORED = {
    "consistency_model": 6, "ddim": 17, "ddim_inverse": 9, "ddim_parallel": 19, "ddpm": 9, "ddpm_parallel": 11,
    "deis": 6, "dpm_multi": 9, "dpm_multi_inverse": 5, "dpm_sde": 24, "dpm_single": 9, "edm_dpmsolver_multistep": 5,
    "edm_euler": 4, "euler": 10, "euler_ancestral": 8, "heun": 17, "ipndm": 1, "kdpm2_ancestral": 8,
    "kdpm2_discrete": 14, "lcm": 4, "lms": 10, "pndm": 9, "sasolver": 16, "tcd": 4, "unclip": 10, "unipc": 16,
}  # fmt: skip

# File -> how many of its numbers no case here has, and why.
LACKING: dict[str, tuple[int, str]] = {
    "consistency_model": (6, "consistency models of EDM's parametrisation, which no model here has"),
    "dpm_sde": (24, "noise of torchsde's Brownian tree, which differs by device too"),
    "ipndm": (1, "a schedule of its own, which no model here has"),
    "sasolver": (16, "no such sampler here"),
    "unclip": (10, "unCLIP's prior with learned variances, which no model here has"),
}


@dataclass(frozen=True)
class Case:
    """One run of theirs and the numbers stored of it: of the absolute result, or the result itself."""

    file: str  # of test_scheduler_<file>.py
    name: str  # their test, without "test_"
    run: Callable[[], Tensor]  # our samplers' result
    sum: float | None = None
    mean: float | None = None
    equals: Sequence[int] | None = None  # timesteps
    sum_within: float = 1e-2  # their tolerances
    mean_within: float = 1e-3
    # Why a number cannot be reproduced, where that is theirs, and the sum that is right.
    because: str = ""
    right_sum: float | None = None

    def misses(self) -> list[str]:
        """What of the stored numbers the run does not give, in words."""
        result = self.run()
        found = [
            ("sum", self.sum, result.abs().sum().item(), self.sum_within),
            ("mean", self.mean, result.double().abs().mean().item(), self.mean_within),
        ]
        missed = [
            f"{what} {got:.6f}, stored {number}"
            for what, number, got, within in found
            if number is not None and not abs(got - number) < within
        ]
        if self.equals is not None and result.tolist() != list(self.equals):
            missed.append(f"{result.tolist()}, stored {list(self.equals)}")
        return missed

    @property
    def numbers(self) -> int:
        """How many numbers are stored of this run."""
        return sum(number is not None for number in (self.sum, self.mean, self.equals))


def check(case: Case) -> None:
    """Assert that our samplers give the stored numbers, or, in a case with a reason, the right ones."""
    missed = case.misses()
    if case.because:
        assert missed, f"{case.file} {case.name} is reproduced: take its reason away"
        assert case.right_sum is not None
        assert abs(case.run().abs().sum().item() - case.right_sum) < case.sum_within
    else:
        assert not missed, f"{case.file} {case.name}: {'; '.join(missed)}"


def case_id(case: Case) -> str:
    return f"{case.file}-{case.name}"


def levels_of(
    num_train_timesteps: int = 1000,
    schedule: str = "linear",
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
) -> Tensor:
    """alphas_cumprod (T,) of most of their tests: Ho et al.'s betas, whatever T is."""
    return make_alphas_cumprod(
        make_betas(
            schedule, beta_start=beta_start, beta_end=beta_end, num_train_timesteps=num_train_timesteps
        )
    )


def rounded_levels_of(num_train_timesteps: int = 1000) -> Tensor:
    """`levels_of` as theirs are computed, in float32: for numbers that show its roundings."""
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, num_train_timesteps), dim=0)


def sample(shape: tuple[int, ...] = SHAPE) -> Tensor:
    """Their fixed sample, float32: 0, 1, ... over the number of values, counted with the batch innermost."""
    return _counted(torch.arange(_size(shape)), shape)


def noise(shape: tuple[int, ...] = SHAPE) -> Tensor:
    """Their fixed noise, float32: the same numbers in falling order."""
    return _counted(torch.arange(_size(shape)).flip(0), shape)


def model(x: Tensor, t: Tensor) -> Tensor:
    """Their net: x t / (t + 1)."""
    t = torch.as_tensor(t).to(x.dtype)
    return x * t / (t + 1)


def scaling_model(levels: Sequence[float] | Tensor) -> Denoiser:
    """Their net in the loops with `scale_model_input`, which keep the scaled input as the sample.

    So every evaluation divides the sample once more by sqrt(sigma^2 + 1), whose reciprocal is the root of the
    level. Here the latent is scaled already when a net sees it; the second time is made up for in place. For
    one run: `levels` are those of its evaluations, in order.
    """
    following = iter([float(a) for a in levels])

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        output = model(x, t)
        x.mul_(math.sqrt(next(following)))
        return output

    return denoise


def seeded() -> torch.Generator:
    """The noise of their stochastic runs: torch's generator of seed 0, on the CPU."""
    return torch.Generator().manual_seed(0)


def _size(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _counted(numbers: Tensor, shape: tuple[int, ...]) -> Tensor:
    return (numbers.reshape(*shape[1:], shape[0]) / len(numbers)).movedim(-1, 0)
