"""Look at a training run: its losses on fixed samples, and what its nets restore.

Paper    Song et al. 2021 (DDIM), arXiv:2010.02502; Yang et al. 2023 (PASD), arXiv:2308.14469, Eq. 3 (the start)
Tensors  as in train.py
Copying  needs train.py and what that needs, samplers/ddim.py and guidance.py
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from samplers.ddim import ddim_sample
from samplers.guidance import classifier_free_guidance
from samplers.schedule import q_sample, trailing_timesteps, v_prediction

from ..latents import decode, encode
from .loop import Figures, Trainer
from .objective import Draws, Inputs, draw_samples


def validation_draws(seed: int, count: int, *, timesteps: int = 1000) -> Callable[..., Draws]:
    """`draw` for an Encoder: the timesteps of the samples 0 to `count` - 1 spread evenly, so that few samples tell much."""

    def draw(index: Sequence[int], shape: tuple[int, ...]) -> Draws:
        draws = draw_samples(seed + 1_000_003, index, shape, null_prompts=0.0, timesteps=timesteps)
        even = [int((n + 0.5) * timesteps / count) for n in index]
        return draws._replace(t=torch.tensor(even))

    return draw


@contextmanager
def kept_weights(trainer: Trainer) -> Iterator[None]:
    """Within it the nets have the weights that would be kept: the averaged ones, where there are."""
    kept = trainer.kept()
    own = {name: parameter.data for name, parameter in trainer.parameters.items()}
    for name, parameter in trainer.parameters.items():
        parameter.data = kept[name].to(parameter.dtype)
    try:
        yield
    finally:
        for name, parameter in trainer.parameters.items():
            parameter.data = own[name]


@torch.no_grad()
def validation_losses(trainer: Trainer, objective: Any, batches: Sequence[Inputs]) -> Figures:
    """The mean losses of the kept weights over `batches`, "val_" before their names."""
    totals: dict[str, float] = {}
    count = sum(len(batch.z) for batch in batches)
    with kept_weights(trainer), trainer.autocast():
        for batch in batches:
            for name, value in objective(batch).items():
                totals[f"val_{name}"] = totals.get(f"val_{name}", 0.0) + value.item() * len(batch.z) / count
    return totals


@torch.no_grad()
def restore_pictures(
    unet: Any, controlnet: Any, vae: Any, control: Tensor, context: Tensor, alphas_cumprod: Tensor, *,
    noise: Tensor, steps: int = 20, prediction_type: str = "epsilon", conditioning_scale: float = 1.0,
    negative: Tensor | None = None, guidance_scale: float = 1.0,
) -> Tensor:  # fmt: skip
    """Pictures (B, 3, H, W) in [-1, 1] restored from `control` (B, 3, H, W) in [0, 1].

    DDIM over `steps` trailing timesteps, started from the noised latent of the control picture (Eq. 3); `noise` (B, 4, h, w).
    Guided by eps(negative) + guidance_scale (eps(context) - eps(negative)), text states (B, 77, D); without `negative` not.
    """
    timesteps = trailing_timesteps(steps, num_train_timesteps=len(alphas_cumprod))
    z, hint = encode(vae, control * 2 - 1), controlnet.embed(control)

    def predict(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        seen = hint.repeat(len(x) // len(hint), 1, 1, 1)  # guidance asks for both texts at once
        residuals = controlnet(x, t, text, scale=conditioning_scale, hint=seen)
        return unet(x, t, text, residuals).float()

    negative = context if negative is None else negative
    denoise = classifier_free_guidance(predict, context, negative, guidance_scale)
    if prediction_type == "v_prediction":
        denoise = v_prediction(denoise, alphas_cumprod)
    start = q_sample(z, int(timesteps[0]), alphas_cumprod, noise.to(z))
    return decode(vae, ddim_sample(denoise, start, timesteps, alphas_cumprod))
