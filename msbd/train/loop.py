"""The training loop: several processes, accumulation, mixed precision, averaged weights, exact continuation.

Paper    Yang et al. 2023 (PASD), arXiv:2308.14469, section 3.6
Copying  needs train/config.py, train/objective.py, train/state.py; the objective comes as an argument

Sample number n of a run draws its timestep, noise and null prompt from a generator of its own
(`draw_samples`), so the run is the same however its samples are spread over processes, accumulated batches
and interruptions.
"""

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from .config import TrainConfig
from .objective import Draws, Encoder, Inputs, draw_samples
from .state import Average, RunFolder

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Figures = dict[str, float]
# What a checkpoint has, as `Trainer.state` and `Average.state` make it.
_STATE = {"step": int, "skipped": int, "weights": dict, "average": dict, "optimizer": dict, "scaler": dict}
_AVERAGE = {"weights": dict, "updates": int}


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def checkpoint_activations(net: nn.Module, kinds: tuple[type[nn.Module], ...]) -> None:
    """Let every module of `kinds` in `net` compute its activations twice instead of keeping them."""
    for module in net.modules():
        if isinstance(module, kinds):
            forward = partial(checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False)
            module.forward = forward  # pyright: ignore[reportAttributeAccessIssue]


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

    def all(self, value: Any) -> list[Any]:
        """What `value` is in each process."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values


class _WideAttention(TorchFunctionMode):
    """Attention in float32 under bfloat16 autocast on a CPU, whose backward pass takes 4.5 times as long."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        with torch.autocast("cpu", enabled=False):
            return func(*(tensor.float() for tensor in args), **(kwargs or {}))


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
            self.objective = DistributedDataParallel(
                objective, device_ids=devices, gradient_as_bucket_view=True
            )
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
        options: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
        # ZeRO puts Adam's counts on the CPU when it loads a state, which the fused kernel refuses.
        if self.device.type == "cuda" and not (config.zero and self.world.size > 1):
            options["fused"] = True
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

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """The precision that the nets work in."""
        kind, dtype = self.device.type, _DTYPES[self.config.precision]
        # Checkpointed activations are computed again in the backward pass, where the mode would not hold.
        wide = kind == "cpu" and dtype == torch.bfloat16 and not self.config.checkpointing
        mode = _WideAttention() if wide else nullcontext()
        with torch.autocast(kind, dtype, enabled=dtype != torch.float32), mode:
            yield

    def step(self, inputs: Iterator[Inputs]) -> Figures:
        """One update, from this process's next `accumulate` batches; the losses, averaged over processes."""
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
        summed = self.world.sum(torch.stack(list(totals.values())))
        figures = dict(zip(totals, (summed / self.world.size).tolist(), strict=True))
        seconds = time.perf_counter() - started
        return figures | {"gradient": norm, "rate": rate, "skipped": self.skipped, "seconds": seconds}

    def anywhere(self, value: bool) -> bool:
        """Whether `value` is true in one of the processes."""
        return bool(self.world.sum(torch.tensor(float(value), device=self.device)))

    def _synchronised(self, last: bool) -> AbstractContextManager[Any]:
        """Gradients are summed over the processes with the last batch of an update only."""
        if isinstance(self.objective, DistributedDataParallel) and not last:
            return self.objective.no_sync()
        return nullcontext()

    def _update(self) -> float:
        """Change the weights unless a gradient, summed over all processes by now, is not finite; its norm."""
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
        # In float16 the scaler starts too high on purpose and halves itself at overflows: no sign of trouble.
        self.scaler.update()
        if self._in_a_row > self.config.nan_limit:
            raise DivergedError(
                f"step {self.done + 1}: the gradients of {self._in_a_row} updates in a row were not finite; "
                "continue from the last checkpoint with a lower learning rate, or in bf16 or fp32"
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
            "skipped": self.skipped,
            "weights": {name: parameter.detach() for name, parameter in self.parameters.items()},
            "average": self.average.state() if self.average else {},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def resume(self, folder: RunFolder, *, cut_log: bool = True) -> None:
        """Go on from the folder's checkpoint, if it has one; `cut_log` as in `RunFolder.load`.

        ValueError, which begins with the file, where that is damaged or another net's.
        """
        if state := folder.load(cut_log=cut_log):
            try:
                self.load_state(state)
            except ValueError as error:
                raise ValueError(f"{folder.checkpoint}: {error}") from error

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. ValueError where it is another net's, or damaged."""
        _check_kinds(state, _STATE)
        self._check_shapes(state["weights"])
        for name, parameter in self.parameters.items():
            parameter.copy_(state["weights"][name])
        if self.average and state["average"]:
            _check_kinds(state["average"], _AVERAGE)
            self._check_shapes(state["average"]["weights"])
            self.average.load_state(state["average"])
        optimizer, fused = state["optimizer"], self.optimizer.param_groups[0].get("fused")
        if self.device.type == "cpu":  # where it would go on in the checkpoint's own, mapped memory
            optimizer = copy.deepcopy(optimizer)
        try:
            for group in optimizer["param_groups"]:
                group["fused"] = fused
            self.optimizer.load_state_dict(optimizer)
            if state["scaler"]:  # the run was in float16
                self.scaler.load_state_dict(state["scaler"])
        except (KeyError, TypeError, AttributeError, RecursionError) as error:  # torch checks numbers only
            raise ValueError(
                f"the checkpoint is damaged: its optimizer is not one ({error!r:.80})"
            ) from error
        self.done, self.skipped = state["step"], state["skipped"]

    def _check_shapes(self, found: dict[str, Any]) -> None:
        """ValueError unless `found` has a tensor of the same name and shape for each parameter."""
        shapes = {name: p.shape for name, p in self.parameters.items()}
        differing = [
            name
            for name in shapes | found
            if name not in shapes or getattr(found.get(name), "shape", None) != shapes[name]
        ]
        if differing:
            raise ValueError(
                f"the checkpoint is of another net: {len(differing)} parameters differ, first "
                f"{differing[0]!s:.80}; expected the options that its run began with"
            )

    def kept(self) -> dict[str, Tensor]:
        """The weights to keep: the averaged ones where there are, by the parameters' names."""
        if self.average:
            return self.average.weights
        return {name: parameter.detach() for name, parameter in self.parameters.items()}


def _check_kinds(state: dict[str, Any], kinds: Mapping[str, type]) -> None:
    """ValueError unless `state` has a value of its kind for each name in `kinds`."""
    if wrong := [name for name, kind in kinds.items() if type(state.get(name)) is not kind]:
        raise ValueError(f"the checkpoint is damaged: {wrong[0]} is missing, or of another kind")


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
    stop: Callable[[], bool] | None = None,
) -> None:
    """Run `trainer` to its last step: log, validate, save, as its config says.

    `batches` belong to `trainer.batches()`.

    After the step in which `stop()` is first true, in any process, the run is saved and left; `trainer.done`
    tells.
    """
    config = trainer.config
    timesteps = len(_unwrapped(trainer.objective).alphas_cumprod)

    def draw(index: Sequence[int], shape: tuple[int, ...]) -> Draws:
        return draw_samples(config.seed, index, shape, null_prompts=config.null_prompts, timesteps=timesteps)

    inputs = (encoder(batch, draw) for batch in batches)
    while trainer.done < config.steps:
        figures = trainer.step(inputs)
        last = trainer.done == config.steps
        due = bool(config.validate_every) and (trainer.done % config.validate_every == 0 or last)
        if validate and due:
            figures |= validate(trainer.done)
        if trainer.world.rank == 0 and (trainer.done % config.log_every == 0 or last or (validate and due)):
            folder.log(trainer.done, figures)
        left = stop is not None and trainer.anywhere(stop())
        if trainer.done % config.save_every == 0 or last or left:
            state = trainer.state()
            if trainer.world.rank == 0:
                folder.save(state)
        if on_step:
            on_step(trainer.done, figures)
        if left:
            trainer.world.all(None)  # wait for the one that saves
            return


def _unwrapped(objective: nn.Module) -> Any:
    return objective.module if isinstance(objective, DistributedDataParallel) else objective
