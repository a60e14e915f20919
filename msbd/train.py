"""Train PASD's ControlNet and pixel-aware attention on a frozen base: Eq. 5 and the degradation removal loss.

Paper    Yang et al. 2023 (PASD), arXiv:2308.14469, Eq. 5 and sections 3.1, 3.4
Tensors  clean pictures (B, 3, H, W) in [-1, 1], control pictures (B, 3, H, W) in [0, 1], latents
         (B, 4, H / 8, W / 8) times the VAE's scaling_factor, text states (B, 77, D)
Copying  needs train_config.py, train_state.py, latents.py, samplers/schedule.py; nets come as arguments

Sample number n of a run draws its timestep, noise and null prompt from a generator of its own (`draw_sample`), so the
run is the same however its samples are spread over processes, accumulated batches and interruptions.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from samplers.schedule import q_sample, velocity

from .latents import dtype_of
from .train_config import TrainConfig
from .train_state import Average, RunFolder

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GOLDEN = (math.sqrt(5) - 1) / 2
Figures = dict[str, float]


# ---- losses -----------------------------------------------------------------------------------------------------------------


def removal_loss(to_rgbs: Sequence[Tensor], clean: Tensor, *, antialias: bool = True) -> Tensor:
    """L_DR of section 3.1: over the levels s, the sum of the mean |I_hq^s - I_sr^s|.

    `to_rgbs` (B, 3, h_s, w_s) are the heads' pictures, `clean` (B, 3, H, W) the one they stand for, in [-1, 1], which is
    resized to each. The paper writes a norm: a mean, as in the official code, does not grow with the picture. That code
    resizes without antialiasing, which is no pyramid: `antialias=False`.
    """
    total = clean.new_zeros(())
    for picture in to_rgbs:
        target = F.interpolate(
            clean, picture.shape[2:], mode="bilinear", align_corners=False, antialias=antialias
        )
        total = total + F.l1_loss(picture.to(target), target)
    return total


def colourfulness_loss(pictures: Tensor) -> Tensor:
    """1 - colourfulness, the mean over `pictures` (B, 3, H, W) in [-1, 1]: low for vivid colours (Hasler & Suesstrunk 2003).

    Colourfulness is sqrt(var(rg) + var(yb)) + 0.3 sqrt(mean(rg)^2 + mean(yb)^2), of the opponents rg = |R - G| and
    yb = |(R + G) / 2 - B|; the official code's form, whose opponents are magnitudes, but it adds up over a batch.
    """
    r, g, b = pictures.float().unbind(1)
    rg, yb = (r - g).abs().flatten(1), ((r + g) / 2 - b).abs().flatten(1)  # (B, H * W)
    spread, offset = rg.var(1) + yb.var(1), rg.mean(1) ** 2 + yb.mean(1) ** 2
    return (1 - (spread.sqrt() + 0.3 * offset.sqrt())).mean()


# ---- what one sample draws ----------------------------------------------------------------------------------------------------


class Draws(NamedTuple):
    """The randomness of a batch, sample by sample."""

    t: Tensor  # (B,) timesteps
    noise: Tensor  # (B, 4, h, w), eps of Eq. 5
    posterior: Tensor  # (B, 4, h, w), which of the latents that stand for the picture
    null: list[bool]  # whose caption is left out


def draw_samples(
    seed: int, indices: Iterable[int], shape: tuple[int, ...], *, null_prompts: float, timesteps: int = 1000
) -> Draws:
    """What the samples `indices` of a run draw, for latents of `shape` (C, h, w): each from (seed, index) alone.

    Timesteps are uniform, and evenly spread over any consecutive samples (steps of the golden ratio): a batch without
    chance's clusters has a gradient with less noise (cf. Kingma et al. 2021, "Variational Diffusion Models", appendix I.1).
    """
    offset = torch.rand((), dtype=torch.float64, generator=torch.Generator().manual_seed(seed % 2**63)).item()
    rows = []
    for index in indices:
        generator = torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + index) % 2**63)
        t = torch.tensor(int((offset + index * GOLDEN) % 1 * timesteps))
        null = float(torch.rand((), generator=generator)) < null_prompts
        noise = torch.randn(2, *shape, generator=generator)
        rows.append((t, noise[0], noise[1], null))
    t, noise, posterior, null = zip(*rows, strict=True)
    return Draws(torch.stack(t), torch.stack(noise), torch.stack(posterior), list(null))


class Inputs(NamedTuple):
    """One batch as the objective takes it."""

    z: Tensor  # (B, 4, h, w) clean latents
    t: Tensor  # (B,)
    noise: Tensor  # (B, 4, h, w)
    context: Tensor  # (B, 77, D)
    clean: Tensor  # (B, 3, H, W) in [-1, 1]
    control: Tensor  # (B, 3, H, W) in [0, 1]


class Encoder:
    """Pictures and captions to what the nets are trained on, by a frozen autoencoder and a frozen text encoder."""

    def __init__(
        self, vae: Any, text_encoder: nn.Module, tokenizer: Callable[[Sequence[str]], Tensor]
    ) -> None:
        self.vae, self.text_encoder, self.tokenizer = vae, text_encoder, tokenizer

    @torch.no_grad()
    def __call__(self, batch: Any, draw: Callable[[Sequence[int], tuple[int, ...]], Draws]) -> Inputs:
        """`batch` has clean, control, captions and index, as train_data.Batch; `draw` gives its samples' draws."""
        device = next(self.vae.parameters()).device
        clean = batch.clean.to(device, non_blocking=True)
        posterior = self.vae.encode(clean.to(dtype_of(self.vae)))
        t, noise, which, null = draw(batch.index, tuple(posterior.mean.shape[1:]))
        z = posterior.sample(which.to(posterior.mean)).float() * self.vae.config.scaling_factor
        captions = ["" if nothing else text for text, nothing in zip(batch.captions, null, strict=True)]
        context = self.text_encoder(self.tokenizer(captions).to(device)).float()
        control = batch.control.to(device, non_blocking=True)
        return Inputs(z, t.to(device), noise.to(device), context, clean.float(), control.float())


# ---- objectives -----------------------------------------------------------------------------------------------------------------


class PASDObjective(nn.Module):
    """Eq. 5 + gamma L_DR as one module, so that DistributedDataParallel wraps U-Net and ControlNet once, together.

    (The official code wraps each and lets neither synchronise when it should: reference bug 18.) Only the ControlNet and
    what PASD adds to the U-Net, told by the parameters' names in `added`, are trained.
    """

    def __init__(
        self,
        unet: nn.Module,
        controlnet: nn.Module,
        alphas_cumprod: Tensor,
        config: TrainConfig,
        *,
        added: Sequence[str],
        prediction_type: str = "epsilon",
        grayscale: bool = False,
    ) -> None:
        super().__init__()
        self.unet, self.controlnet, self.config = unet, controlnet, config
        self.alphas_cumprod = alphas_cumprod.double().cpu()
        self.v_prediction, self.grayscale = prediction_type == "v_prediction", grayscale
        controlnet.train().requires_grad_(True)
        unet.train()
        for name, parameter in unet.named_parameters():
            parameter.requires_grad_(any(mark in f".{name}" for mark in added))

    def forward(self, inputs: Inputs) -> dict[str, Tensor]:
        """The losses of a batch: "loss" is the one to descend, the others are its parts."""
        z, t, noise, context, clean, control = inputs
        x = q_sample(z, t, self.alphas_cumprod, noise)
        residuals = self.controlnet(x, t, context, control)
        prediction = self.unet(x, t, context, residuals)
        target = velocity(z, noise, t, self.alphas_cumprod) if self.v_prediction else noise
        denoising = F.mse_loss(prediction.to(target), target)  # Eq. 5
        losses = {"loss": denoising, "denoising": denoising}
        if residuals.to_rgbs:
            removal = removal_loss(residuals.to_rgbs, clean, antialias=self.config.antialias)
            losses |= {"loss": denoising + self.config.gamma * removal, "removal": removal}
            if self.grayscale:
                colour = torch.stack([colourfulness_loss(picture) for picture in residuals.to_rgbs]).sum()
                losses |= {"loss": losses["loss"] + self.config.colour_weight * colour, "colour": colour}
        return losses


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def checkpoint_activations(net: nn.Module, kinds: tuple[type[nn.Module], ...]) -> None:
    """Let every module of `kinds` in `net` compute its activations again in the backward pass instead of keeping them."""
    for module in net.modules():
        if isinstance(module, kinds):
            forward = partial(checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False)
            module.forward = forward  # pyright: ignore[reportAttributeAccessIssue]


# ---- the loop -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """This process among those that train together; torchrun starts them."""

    rank: int = 0
    size: int = 1

    def sum(self, values: Tensor) -> Tensor:
        """The sum of `values` over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values


class DivergedError(ValueError):
    """Too many updates in a row had gradients that are not finite."""


class Trainer:
    """Descends an objective, one update per `step`, and keeps all that an exact continuation needs."""

    def __init__(self, objective: nn.Module, config: TrainConfig, *, world: World | None = None) -> None:
        self.config, self.world = config, world or World()
        self.parameters = trainable(objective)
        self.device = next(iter(self.parameters.values())).device
        self.objective: nn.Module = objective
        if self.world.size > 1:
            devices = [self.device] if self.device.type == "cuda" else None
            self.objective = DistributedDataParallel(objective, device_ids=devices)
        self.optimizer = self._make_optimizer()
        fp16 = config.precision == "fp16"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=fp16)
        self.average = Average(self.parameters, config.ema) if config.ema else None
        self.done = 0  # updates, the skipped ones included
        self.skipped = 0  # updates, since the run began
        self._in_a_row = 0

    def _make_optimizer(self) -> torch.optim.Optimizer:
        config, weights = self.config, list(self.parameters.values())
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
        options = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
        if config.zero and self.world.size > 1:
            spread: Any = ZeroRedundancyOptimizer
            return spread(weights, optimizer_class=kind, **options)
        return kind(weights, **options)

    @property
    def samples_per_step(self) -> int:
        """Samples of one update, over all processes."""
        return self.config.batch * self.config.accumulate * self.world.size

    def batches(self) -> Iterator[list[int]]:
        """The sample numbers of this process's batches, from the next step to the last."""
        config, world = self.config, self.world
        for step in range(self.done, config.steps):
            for micro in range(config.accumulate):
                first = (step * config.accumulate + micro) * world.size + world.rank
                yield list(range(first * config.batch, (first + 1) * config.batch))

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision that the nets work in."""
        dtype = _DTYPES[self.config.precision]
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def step(self, inputs: Iterator[Inputs]) -> Figures:
        """One update, from the next `accumulate` of this process's batches; the losses, averaged over all processes."""
        config, started = self.config, time.perf_counter()
        rate = config.learning_rate * learning_rate_factor(self.done, config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        totals: dict[str, Tensor] = {}
        for micro in range(config.accumulate):
            batch = next(inputs)  # which may encode it, in a precision of its own
            with self._synchronised(micro + 1 == config.accumulate):
                with self.autocast():
                    losses = self.objective(batch)
                self.scaler.scale(losses["loss"] / config.accumulate).backward()
            for name, value in losses.items():
                totals[name] = totals.get(name, 0) + value.detach() / config.accumulate
        norm = self._update()
        self.done += 1
        summed = self.world.sum(torch.stack([value.double() for value in totals.values()]))
        figures = dict(zip(totals, (summed / self.world.size).tolist(), strict=True))
        seconds = time.perf_counter() - started
        return figures | {"gradient": norm, "rate": rate, "skipped": self.skipped, "seconds": seconds}

    def _synchronised(self, last: bool) -> AbstractContextManager[Any]:
        """Gradients are summed over the processes with the last batch of an update only."""
        if isinstance(self.objective, DistributedDataParallel) and not last:
            return self.objective.no_sync()
        return nullcontext()

    def _update(self) -> float:
        """Change the weights, unless a gradient is not finite (in any process: they are summed by now); the norm."""
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.config.clip).item()
        if math.isfinite(norm):
            self.scaler.step(self.optimizer)
            self._in_a_row = 0
            if self.average:
                self.average.update(self.parameters)
        else:
            self.skipped += 1
            self._in_a_row += 1
        # In float16 the scaler starts too high on purpose, and halves itself at each overflow: those are no sign of trouble.
        self.scaler.update()
        if self._in_a_row > self.config.nan_limit:
            raise DivergedError(
                f"step {self.done + 1}: the gradients of {self._in_a_row} updates in a row were not finite; continue from the last "
                "checkpoint with a lower learning rate, or in bf16 or fp32"
            )
        return norm

    def state(self) -> dict[str, Any]:
        """Everything that changes during a run, for `load_state`. All processes call it, one may save it."""
        if isinstance(self.optimizer, ZeroRedundancyOptimizer):
            self.optimizer.consolidate_state_dict()  # to process 0
            if self.world.rank:
                return {}
        return {
            "step": self.done,
            "skipped": [self.skipped, self._in_a_row],
            "weights": {name: parameter.detach() for name, parameter in self.parameters.items()},
            "average": self.average.state() if self.average else {},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. ValueError where it is another net's."""
        shapes = {name: p.shape for name, p in self.parameters.items()}
        found = {name: tensor.shape for name, tensor in state["weights"].items()}
        if differing := [name for name in shapes | found if shapes.get(name) != found.get(name)]:
            raise ValueError(
                f"the checkpoint is of another net: {len(differing)} parameters differ, first {differing[0]}; expected the options "
                "that its run began with"
            )
        for name, parameter in self.parameters.items():
            parameter.copy_(state["weights"][name])
        if self.average and state["average"]:
            self.average.load_state(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.done, (self.skipped, self._in_a_row) = int(state["step"]), state["skipped"]

    def kept(self) -> dict[str, Tensor]:
        """The weights to keep: the averaged ones where there are, by the parameters' names."""
        if self.average:
            return self.average.weights
        return {name: parameter.detach() for name, parameter in self.parameters.items()}


def learning_rate_factor(step: int, config: TrainConfig) -> float:
    """The learning rate of `step` (from 0) as a share of the configured one."""
    rise = min(1.0, (step + 1) / (config.warmup + 1))
    fall = 0.5 * (1 + math.cos(math.pi * step / config.steps)) if config.schedule == "cosine" else 1.0
    return rise * fall


def train(
    trainer: Trainer,
    encoder: Encoder,
    batches: Iterable[Any],
    folder: RunFolder,
    *,
    validate: Callable[[int], Figures] | None = None,
    on_step: Callable[[int, Figures], None] | None = None,
) -> None:
    """Run `trainer` to its last step: log, validate, save, as its config says. `batches` belong to `trainer.batches()`."""
    config = trainer.config

    def draw(index: Sequence[int], shape: tuple[int, ...]) -> Draws:
        return draw_samples(
            config.seed, index, shape, null_prompts=config.null_prompts, timesteps=len(alphas)
        )

    alphas = _unwrapped(trainer.objective).alphas_cumprod
    inputs = (encoder(batch, draw) for batch in batches)
    while trainer.done < config.steps:
        figures = trainer.step(inputs)
        last = trainer.done == config.steps
        if validate and config.validate_every and (trainer.done % config.validate_every == 0 or last):
            figures |= validate(trainer.done)
        told = (
            trainer.done % config.log_every == 0 or last or any(name.startswith("val_") for name in figures)
        )
        if told and trainer.world.rank == 0:
            folder.log(trainer.done, figures)
        if trainer.done % config.save_every == 0 or last:
            state = trainer.state()
            if trainer.world.rank == 0:
                folder.save(state)
        if on_step:
            on_step(trainer.done, figures)


def _unwrapped(objective: nn.Module) -> Any:
    return objective.module if isinstance(objective, DistributedDataParallel) else objective
