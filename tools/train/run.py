"""A run of training: nets, data, validation, files.

What `tools.train` and `tools.mini train` have in common.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from msbd.files import whole_file
from msbd.latents import decode
from msbd.load import load_training_parts
from msbd.loading.nets import start_pasd_nets
from msbd.loading.parts import put_pasd_tensors
from msbd.restore.pipeline import RestorePipeline
from msbd.train.base import BaseObjective, lora_state, unet_state
from msbd.train.config import HELD_OUT, TrainConfig
from msbd.train.data import TrainingData, collate
from msbd.train.degrade import PASD, Ranges
from msbd.train.loop import Figures, Trainer, World, checkpoint_activations, train
from msbd.train.objective import Encoder, Inputs, PASDObjective
from msbd.train.pictures import Pictures
from msbd.train.state import RunFolder
from msbd.train.validate import kept_weights, restore_pictures, validation_draws, validation_losses
from nets.unet import ResnetBlock, Transformer
from samplers.ddim import ddim_sample
from samplers.schedule import trailing_timesteps
from weights.files import read_metadata, write_safetensors
from weights.merge import PASD_KEYS, narrow, pack_delta

from .._report import write_sheet
from ..models.convert import convert, copying
from .curves import tenths_table
from .processes import ignore_signals, plain_failures, stop_signals

SHOWN = 8  # pictures of a validation's sheet, at most
# What may change in mid-run.
FREE = (
    *("steps", "learning_rate", "precision", "clip"),  # at the price of another curve
    *("batch", "accumulate"),  # as long as a step has as many samples
    "data",  # the pictures may have moved: they are counted
    *("checkpointing", "zero", "nan_limit", "log_every", "validate_every", "save_every"),
)


@dataclass(frozen=True)
class TrainingJob:
    """What is trained, on what, and where it goes."""

    pictures: Pictures
    held_out: Pictures
    output: Path
    data: str = "scenes"  # the words that `pictures` were named by
    base: str = "mini"
    size: int | None = None  # pixels, the crops' side; None: the base's own
    scale: int = 4
    workers: int = 0
    # For PASD
    variant: str = "full"
    use_rrdb: bool = False
    to_rgb: bool = True
    zero_init: bool = True
    hint_widths: tuple[int, ...] = (16, 32, 96, 256)
    start: Path | None = None  # PASD's weights to start from
    grayscale: bool = False
    ranges: Ranges = PASD
    # For a base
    rank: int | None = None  # the LoRA's; None: the whole U-Net is trained

    @property
    def choices(self) -> dict[str, Any]:
        """What a run that goes on must have begun with."""
        left_out = ("held_out", "output", "workers")
        found = {
            field.name: getattr(self, field.name) for field in fields(self) if field.name not in left_out
        }
        return found | {
            "pictures": len(self.pictures),
            "held_out": len(self.held_out),
            "ranges": asdict(self.ranges),
            "start": str(self.start),
        }


class Run:
    """One run, ready to go on from where its folder is."""

    def __init__(self, job: TrainingJob, config: TrainConfig, device: torch.device, world: World) -> None:
        self.parts = load_training_parts(job.base)
        # Pixels, the crops' side.
        self.size = self.parts.spec.native if job.size is None else job.size
        self.job = replace(job, size=self.size)
        self.config, self.device, self.folder = config, device, RunFolder(job.output)
        cell = self.parts.vae.downscale
        if self.size < 1 or self.size % cell:
            raise ValueError(f"pictures of {self.size} pixels; this base needs a multiple of {cell}")
        self.objective = self.make_objective()
        # The base's own is let go of, where there are two.
        self.parts = replace(self.parts, unet=self.objective.unet)
        if config.checkpointing:
            checkpoint_activations(self.objective, (ResnetBlock, Transformer))
        self.trainer = Trainer(self.objective, config, world=world)
        if config.precision == "bf16":  # float16 overflows in it
            self.parts.vae.bfloat16()
        vae, text_encoder = self.placed(self.parts.vae), self.parts.text_encoder.to(device)
        self.encoder = Encoder(vae, text_encoder, self.parts.tokenizer)
        self._resume(world)

    def _resume(self, world: World) -> None:
        """Go on from the folder's checkpoint, if it has one.

        ValueError where that is of a run with other options.
        """
        path, first = self.folder.options_file, world.rank == 0
        batch = self.trainer.samples_per_step
        options = json.loads(json.dumps(asdict(self.config) | self.job.choices | {"samples_per_step": batch}))
        if self.folder.checkpoint.exists():
            if not path.exists():
                raise ValueError(
                    f"{path}: missing beside a checkpoint, whose options are so unknown; take another folder"
                )
            before = self.folder.read_options()
            if changed := [
                name
                for name in before
                if name in options and name not in FREE and before[name] != options[name]
            ]:
                name = changed[0]
                raise ValueError(
                    f"{self.folder.path}: holds a run with {name} = {before[name]}, now {options[name]}; "
                    "go on with the options it began with, or take another folder"
                )
        self.trainer.resume(self.folder, cut_log=first)
        if len(set(world.all(self.trainer.done))) > 1:
            raise ValueError(
                f"{self.folder.path}: not the same for all processes; take a folder on a disk that all "
                "machines share"
            )
        if first:
            self.folder.path.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as unfinished:
                unfinished.write_text(json.dumps(options, indent=1) + "\n")

    def placed(self, net: Any) -> Any:
        """`net` on the run's device; for work in 16 bits channels last, faster on CPUs (GPUs: unmeasured)."""
        wide = self.config.precision == "fp32"
        return net.to(self.device, memory_format=torch.preserve_format if wide else torch.channels_last)

    def make_objective(self) -> Any:
        """The module that gives the loss, on the run's device."""
        raise NotImplementedError

    def export(self) -> Path:
        """Write what was trained as a file that loads."""
        raise NotImplementedError

    def draw(self, inputs: Inputs, captions: Sequence[str]) -> list[Tensor]:
        """Columns of pictures (B, 3, H, W) in [-1, 1] that show the state of the run."""
        raise NotImplementedError

    def run(self, *, quiet: bool = False) -> Path:
        """Train to the last step; where the result is.

        KeyboardInterrupt where it was stopped, and is saved.
        """
        batches = DataLoader(
            self._data(self.job.pictures, self.config.seed),
            batch_sampler=self.trainer.batches(),
            num_workers=self.job.workers,
            # Not by fork: libvips, with which this process may have read pictures, then hangs at times.
            multiprocessing_context="spawn" if self.job.workers else None,
            collate_fn=collate,
            worker_init_fn=ignore_signals,
            pin_memory=self.device.type == "cuda",
        )
        first = self.trainer.world.rank == 0
        validate = self._validation() if first and self.config.validate_every else None
        bar = tqdm(
            total=self.config.steps,
            initial=self.trainer.done,
            disable=True if quiet or not first else None,
            dynamic_ncols=True,
        )
        with bar, plain_failures(), stop_signals() as stop:

            def show(step: int, figures: Figures) -> None:
                bar.update()
                bar.set_postfix(loss=f"{figures['loss']:.4f}")

            train(
                self.trainer, self.encoder, batches, self.folder, validate=validate, on_step=show, stop=stop
            )
        if self.trainer.done < self.config.steps:
            step = self.trainer.done
            saved = f"interrupted after step {step}, which is saved: the same command goes on from there"
            raise KeyboardInterrupt(saved if first else "")
        return self.export() if first else self.job.output

    def summary(self) -> str:
        """The losses on the held-out pictures, at the beginning and at the end."""
        return tenths_table([self.job.output])

    def _data(self, pictures: Pictures, seed: int) -> TrainingData:
        job = self.job
        return TrainingData(
            pictures, size=self.size, ranges=job.ranges, scale=job.scale, grayscale=job.grayscale, seed=seed
        )

    def _validation(self) -> Callable[[int], Figures]:
        """Losses on all held-out pictures with fixed timesteps and noise, and a sheet of the first ones."""
        data, size = self._data(self.job.held_out, 0), self.config.batch
        count = min(HELD_OUT, len(self.job.held_out))
        draw = validation_draws(self.config.seed, count, timesteps=len(self.parts.alphas_cumprod))
        groups = [range(i, min(i + size, count)) for i in range(0, count, size)]
        read = [collate([data[n] for n in group]) for group in groups]
        batches = [self.encoder(batch, draw) for batch in read]
        captions = [caption for batch in read for caption in batch.captions][:SHOWN]
        folder = self.job.output / "pictures"

        def validate(step: int) -> Figures:
            with kept_weights(self.trainer), torch.no_grad():  # in float32: the VAE could not bear float16
                shown = Inputs(*(torch.cat(fields)[:SHOWN] for fields in zip(*batches, strict=True)))
                rows = self.draw(shown, captions)
            folder.mkdir(exist_ok=True, parents=True)
            pictures = [picture.cpu() for row in rows for picture in row]
            write_sheet(folder / f"{step:07d}.png", pictures, len(rows[0]))
            return validation_losses(self.trainer, self.objective, batches)

        return validate


class PASDRun(Run):
    """PASD's ControlNet and pixel-aware attention, on a frozen base."""

    def make_objective(self) -> PASDObjective:
        """Eq. 5 + gamma L_DR of new nets, or of those that the job starts from."""
        job, parts = self.job, self.parts
        unet, controlnet = start_pasd_nets(
            parts.unet,
            variant=job.variant,
            zero_init=job.zero_init,
            use_rrdb=job.use_rrdb,
            to_rgb=job.to_rgb,
            hint_widths=job.hint_widths,
            seed=self.config.seed,
        )
        if job.start:
            put_pasd_tensors(job.start, unet, controlnet)
        self.unet, self.controlnet = self.placed(unet), self.placed(controlnet)
        return PASDObjective(
            self.unet,
            self.controlnet,
            parts.alphas_cumprod,
            self.config,
            added=PASD_KEYS,
            prediction_type=parts.prediction_type,
            grayscale=job.grayscale,
        )

    def export(self) -> Path:
        """The ControlNet and what was added to the U-Net, to load on a base; or a ControlNet alone."""
        with kept_weights(self.trainer):
            unet, controlnet = _on_cpu(self.unet), _on_cpu(self.controlnet)
        sizes: dict[str, Any] = {
            "unet": asdict(self.unet.config),
            "controlnet": asdict(self.controlnet.config),
        }
        if self.job.variant == "none":
            path, sizes = self.job.output / "controlnet.safetensors", sizes["controlnet"]
            tensors = _halved(controlnet)
        else:
            path, tensors = self.job.output / "pasd.safetensors", pack_delta(unet, controlnet)
        write_safetensors(path, tensors, {"config": json.dumps(sizes)})
        return path

    def draw(self, inputs: Inputs, captions: Sequence[str]) -> list[Tensor]:
        """What the ControlNet sees, what is restored of it, the clean picture."""
        parts = self.parts
        pipe = RestorePipeline(
            unet=self.unet,
            controlnet=self.controlnet,
            vae=parts.vae,
            text_encoder=parts.text_encoder,
            tokenizer=parts.tokenizer,
            alphas_cumprod=parts.alphas_cumprod,
            prediction_type=parts.prediction_type,
        )
        size = (inputs.control.shape[-2], inputs.control.shape[-1])
        restored = restore_pictures(pipe, inputs.control, captions, size)
        return [inputs.control * 2 - 1, restored, inputs.clean]


class BaseRun(Run):
    """A base's U-Net on pictures of a kind, whole or as a LoRA."""

    def make_objective(self) -> BaseObjective:
        """Eq. 5 without control."""
        parts = self.parts
        self.unet = self.placed(parts.unet)
        return BaseObjective(
            self.unet,
            parts.alphas_cumprod,
            self.config,
            rank=self.job.rank,
            prediction_type=parts.prediction_type,
        )

    def export(self) -> Path:
        """The LoRA, or a folder with the whole changed model, which loads where the base does."""
        kept = {key: tensor.cpu() for key, tensor in self.trainer.kept().items()}
        if self.job.rank is not None:
            path = self.job.output / "lora.safetensors"
            write_safetensors(path, _halved(lora_state(self.objective, kept)))
            return path
        folder = self.job.output / "model"
        for _ in convert(copying(self.job.base, folder)):
            pass  # the base's own parts, of which one is replaced: what its file says of it stays
        path = folder / "unet.safetensors"
        write_safetensors(path, _halved(unet_state(self.objective, kept)), read_metadata(path))
        return folder

    def draw(self, inputs: Inputs, captions: Sequence[str]) -> list[Tensor]:
        """What the captions give, and the pictures that they belong to."""
        alphas = self.parts.alphas_cumprod
        timesteps = trailing_timesteps(20, num_train_timesteps=len(alphas))

        def predict(x: Tensor, t: Tensor) -> Tensor:
            return self.unet(x, t, inputs.context).float()

        drawn = ddim_sample(predict, inputs.noise, timesteps, alphas, prediction=self.parts.prediction_type)
        return [decode(self.parts.vae, drawn), inputs.clean]


def _on_cpu(net: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.cpu() for key, tensor in net.state_dict().items()}


def _halved(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state` in float16, for a file. WeightsError for a number that float16 cannot hold."""
    return {key: narrow(tensor, torch.float16, key).contiguous() for key, tensor in state.items()}
