"""Tiny PASD nets and runs of them: for tests of the trainer, and for the processes that those tests start."""

import copy
import functools
import itertools
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from msbd.loading.nets import start_pasd_nets
from msbd.train import state as train_state
from msbd.train.config import TrainConfig
from msbd.train.loop import Trainer, World, checkpoint_activations, train
from msbd.train.objective import Draws, Inputs, PASDObjective, draw_samples
from msbd.train.state import RunFolder
from msbd.train.validate import validation_losses
from nets.controlnet import ControlNet
from nets.pasd_unet import PASDUNet
from nets.unet import ResnetBlock, Transformer, UNet
from tests.helpers.seeded_weights import load_seeded, seeded_input
from tests.helpers.tiny import ALPHAS
from tests.helpers.tiny import SMALL_UNET as UNET
from weights.merge import PASD_KEYS

VARIANTS = ("full", "light", "eq2", "none")
LATENT = (4, 4, 4)  # of a picture of 32 pixels a side: 4 x 4 and 2 x 2 cells on the two levels


def base_unet() -> UNet:
    """A base model's U-Net, the same each time."""
    return copy.deepcopy(_base_unet())


@functools.cache
def _base_unet() -> UNet:
    net = UNet(UNET)
    load_seeded(net, seed=9)
    return net.eval().requires_grad_(False)


@functools.cache
def _nets(variant: str, fresh: bool, options: tuple[tuple[str, Any], ...]) -> tuple[PASDUNet, ControlNet]:
    nets = start_pasd_nets(base_unet(), variant=variant, **{"hint_widths": (4, 6, 8, 10), **dict(options)})
    if not fresh:
        for net in nets:
            load_seeded(net, seed=9)
    return nets


def objective(
    config: TrainConfig,
    variant: str = "full",
    *,
    dtype: torch.dtype = torch.float32,
    fresh: bool = False,
    prediction_type: str = "epsilon",
    grayscale: bool = False,
    **start: Any,
) -> PASDObjective:
    """What is trained: nets as a run starts them (`fresh`), or with no weight at zero; the same each time."""
    unet, controlnet = copy.deepcopy(_nets(variant, fresh, tuple(start.items())))
    for net in (unet, controlnet):
        net.to(dtype)
    return PASDObjective(
        unet,
        controlnet,
        ALPHAS,
        config,
        added=PASD_KEYS,
        prediction_type=prediction_type,
        grayscale=grayscale,
    )


def inputs(draws: Draws, index: Sequence[int], dtype: torch.dtype = torch.float32) -> Inputs:
    """The samples `index`: pictures, text and latents by their numbers, noise and t as drawn."""

    def by_number(name: str, *shape: int) -> Tensor:
        return torch.stack([seeded_input(f"{name}{n}", shape, seed=1) for n in index]).to(dtype)

    clean, control = by_number("clean", 3, 32, 32).tanh(), by_number("control", 3, 32, 32).sigmoid()
    z = by_number("z", *LATENT) + 0.1 * draws.posterior.to(dtype)
    context = by_number("context", 5, 12)
    context[torch.tensor(draws.null)] = 0
    return Inputs(z, draws.t, draws.noise.to(dtype), context, clean, control)


def numbered(index: Sequence[int], dtype: torch.dtype = torch.float32, seed: int = 0) -> Inputs:
    """The samples `index` of a run of `seed`."""
    return inputs(draw_samples(seed, index, LATENT, null_prompts=0.5), index, dtype)


def feed(trainer: Trainer, dtype: torch.dtype = torch.float32) -> Iterator[Inputs]:
    """What this process is to train on, from the next step to the last."""
    return (numbered(index, dtype) for index in trainer.batches())


def spoil(found: nn.Module, calls: Sequence[int]) -> None:
    """Let the gradients of the loss be NaN at the calls in `calls`, counted from 0."""
    count = itertools.count()

    def after_forward(module: nn.Module, arguments: Any, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        return losses | {"loss": losses["loss"] * float("nan")} if next(count) in calls else losses

    found.register_forward_hook(after_forward)


def trained(
    config: TrainConfig,
    *,
    world: World = World(),  # noqa: B008
    dtype: torch.dtype = torch.float64,
    thrifty: bool = False,
    poison: tuple[int, Sequence[int]] = (0, ()),
    resume: int = 0,
    before: TrainConfig | None = None,
    **options: Any,
) -> dict[str, Any]:
    """What a run gives: "gradients" and "figures" of each step, at last "weights",
    those "kept" and the "state".

    The calls of `poison` (rank, numbers) have gradients that are not finite; after `resume` steps, with
    the options `before` if they were others, another Trainer goes on.
    """

    def make(config: TrainConfig = config) -> Trainer:
        found = objective(config, dtype=dtype, **options)
        if thrifty:
            checkpoint_activations(found, (ResnetBlock, Transformer))
        if poison[0] == world.rank:
            spoil(found, poison[1])
        return Trainer(found, config, world=world)

    trainer, figures, after = make(before or config), [], []
    batches = feed(trainer, dtype)
    for step in range(config.steps):
        if resume and step == resume:
            state, trainer = _of_first_rank(trainer), make()
            trainer.load_state(state)
            batches = feed(trainer, dtype)
        figures.append(trainer.step(batches))
        after.append(gradients(trainer))
    weights = {name: p.detach() for name, p in trainer.parameters.items()}
    found = {"figures": figures, "gradients": after, "weights": weights, "kept": trainer.kept()}
    return found | {"state": copy.deepcopy(trainer.state())}


def _of_first_rank(trainer: Trainer) -> dict[str, Any]:
    """The state that process 0 would save, as all of them would read it."""
    box = [copy.deepcopy(trainer.state())]
    if trainer.world.size > 1:
        dist.broadcast_object_list(box)
    return box[0]


def gradients(trainer: Trainer) -> dict[str, Tensor]:
    """The gradient of every trained tensor, as the last step left it."""
    return {name: p.grad.clone() for name, p in trainer.parameters.items() if p.grad is not None}


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference between tensors of the same names."""
    assert a.keys() == b.keys()
    return max(((a[name] - b[name]).abs().max().item() for name in a), default=0.0)


# ---- other processes -------------------------------------------------------------------------------------


def start(target: Callable[..., None], *arguments: Any) -> Any:
    """`target(*arguments)` in a process of its own, that has imported modules and done nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["msbd.loading.nets", "msbd.train.validate"]
    )  # once for all: it takes seconds
    process = context.Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


def finish(*processes: Any) -> list[int | None]:
    """The exit codes; a process that hangs is killed, which shows in its code."""
    for process in processes:
        process.join(600)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def spread(cases: dict[str, dict[str, Any]], rank: int, size: int, folder: Path) -> None:
    """One rank's part of `trained(**case)` for every case, into rank<n>.pt."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=size)
    results = {name: trained(**case, world=World(rank, size)) for name, case in cases.items()}
    torch.save(results, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


RUN = TrainConfig(
    steps=9,
    batch=2,
    learning_rate=1e-3,
    warmup=2,
    schedule="cosine",
    ema=0.9,
    log_every=1,
    save_every=3,
    validate_every=4,
)


def run(
    folder: Path, config: TrainConfig = RUN, *, on_step: Callable[[int], None] = lambda step: None
) -> Trainer:
    """What a command does: start in `folder`, or go on from what is there, to the last step."""
    keeper = RunFolder(folder)
    trainer = Trainer(objective(config, fresh=True), config)
    if state := keeper.load():
        trainer.load_state(state)
    held_out = [numbered([900, 901])]

    def encode(index: list[int], draw: Callable[..., Draws]) -> Inputs:
        return inputs(draw(index, LATENT), index)

    encoder: Any = encode
    train(
        trainer,
        encoder,
        trainer.batches(),
        keeper,
        validate=lambda step: validation_losses(trainer, trainer.objective, held_out),
        on_step=lambda step, figures: on_step(step),
    )
    return trainer


def run_and_die(folder: Path, step: int | None = None, save: int | None = None) -> None:
    """A run that is killed after `step`, or half through writing the checkpoint of step `save`,
    or not at all.
    """
    torch.set_num_threads(1)
    whole_save = torch.save

    def save_half(state: dict[str, Any], path: Path) -> None:
        whole_save(state, path)
        if state["step"] == save:
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def die(done: int) -> None:
        if done == step:
            os.kill(os.getpid(), signal.SIGKILL)

    train_state.torch.save = save_half  # type: ignore[attr-defined]
    run(folder, on_step=die)
