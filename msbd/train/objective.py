"""What PASD's training descends: Eq. 5 and the degradation removal loss, and what each sample of them draws.

Paper    Yang et al. 2023 (PASD), arXiv:2308.14469, section 3.6 (Eq. 5, gamma, null prompts) and 3.1 (L_DR)
Tensors  clean pictures (B, 3, H, W) in [-1, 1], control pictures (B, 3, H, W) in [0, 1], latents
         (B, 4, H / 8, W / 8) times the VAE's scaling_factor, text states (B, 77, D)
Copying  needs latents.py, samplers/schedule.py, train/config.py; nets come as arguments
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samplers.schedule import q_sample, training_target

from ..latents import dtype_of
from .config import TrainConfig

GOLDEN = (math.sqrt(5) - 1) / 2


# ---- losses ------------------------------------------------------------------------------------------------


def denoising_loss(
    prediction: Tensor, inputs: "Inputs", alphas_cumprod: Tensor, *, prediction_type: str
) -> Tensor:
    """Eq. 5, section 3.6: the mean squared error of `prediction` (B, 4, h, w) from what it should be."""
    z, t, noise = inputs[:3]
    target = training_target(z, noise, t, alphas_cumprod, prediction_type)
    return F.mse_loss(prediction.to(target), target)


def removal_loss(to_rgbs: Sequence[Tensor], clean: Tensor, *, antialias: bool = True) -> Tensor:
    """L_DR of section 3.1: over the levels s, the sum of the mean |I_hq^s - I_sr^s|.

    `to_rgbs` (B, 3, h_s, w_s) are the heads' pictures, `clean` (B, 3, H, W) the one they stand for, in [-1,
    1], which is resized to each. The paper writes a norm: a mean, as in the official code, does not grow with
    the picture. That code resizes without antialiasing, which is no pyramid: `antialias=False`.
    """
    total = clean.new_zeros(())
    for picture in to_rgbs:
        target = F.interpolate(
            clean, picture.shape[2:], mode="bilinear", align_corners=False, antialias=antialias
        )
        total = total + F.l1_loss(picture.to(target), target)
    return total


def colourfulness_loss(pictures: Tensor) -> Tensor:
    """1 - colourfulness, the mean over `pictures` (B, 3, H, W) in [-1, 1]: low for vivid colours.

    Colourfulness (Hasler & Suesstrunk 2003) is sqrt(var(rg) + var(yb)) + 0.3 sqrt(mean(rg)^2 + mean(yb)^2),
    of the opponents rg = |R - G| and yb = |(R + G) / 2 - B|; the official code's form, whose opponents are
    magnitudes, but it adds up over a batch.
    """
    r, g, b = pictures.float().unbind(1)
    rg, yb = (r - g).abs().flatten(1), ((r + g) / 2 - b).abs().flatten(1)  # (B, H * W)
    spread, offset = rg.var(1) + yb.var(1), rg.mean(1) ** 2 + yb.mean(1) ** 2
    return (1 - (spread.sqrt() + 0.3 * offset.sqrt())).mean()


# ---- what one sample draws ---------------------------------------------------------------------------------


class Draws(NamedTuple):
    """The randomness of a batch, sample by sample."""

    t: Tensor  # (B,) timesteps
    noise: Tensor  # (B, 4, h, w), eps of Eq. 5
    posterior: Tensor  # (B, 4, h, w), which of the latents that stand for the picture
    null: list[bool]  # whose caption is left out


def draw_samples(
    seed: int, indices: Iterable[int], shape: tuple[int, ...], *, null_prompts: float, timesteps: int = 1000
) -> Draws:
    """What a run's samples `indices` draw for latents of `shape` (C, h, w), each from (seed, index) alone.

    Timesteps are uniform, and evenly spread over any consecutive samples (steps of the golden ratio): a batch
    without chance's clusters has a gradient with less noise (cf. Kingma et al. 2021, "Variational Diffusion
    Models", appendix I.1).
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
    """From pictures and captions to what is trained on, by a frozen autoencoder and a frozen text encoder."""

    def __init__(
        self, vae: Any, text_encoder: nn.Module, tokenizer: Callable[[Sequence[str]], Tensor]
    ) -> None:
        self.vae, self.text_encoder, self.tokenizer = vae, text_encoder, tokenizer

    @torch.no_grad()
    def __call__(self, batch: Any, draw: Callable[[Sequence[int], tuple[int, ...]], Draws]) -> Inputs:
        """`batch` has clean, control, captions and index, as data.Batch; `draw` gives its samples' draws."""
        device = next(self.vae.parameters()).device
        clean = batch.clean.to(device, non_blocking=True)
        posterior = self.vae.encode(clean.to(dtype_of(self.vae)))
        t, noise, which, null = draw(batch.index, tuple(posterior.mean.shape[1:]))
        z = posterior.sample(which.to(posterior.mean)).float() * self.vae.config.scaling_factor
        captions = ["" if nothing else text for text, nothing in zip(batch.captions, null, strict=True)]
        context = self.text_encoder(self.tokenizer(captions).to(device)).float()
        control = batch.control.to(device, non_blocking=True)
        return Inputs(z, t.to(device), noise.to(device), context, clean.float(), control.float())


# ---- objectives --------------------------------------------------------------------------------------------


class PASDObjective(nn.Module):
    """Eq. 5 + gamma L_DR as one module, so that DistributedDataParallel wraps both nets once, together.

    (The official code wraps each and lets neither synchronise when it should: reference bug 18.) Only the
    ControlNet and what PASD adds to the U-Net, told by the parameters' names in `added`, are trained.
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
        self.prediction_type, self.grayscale = prediction_type, grayscale
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
        denoising = denoising_loss(
            prediction, inputs, self.alphas_cumprod, prediction_type=self.prediction_type
        )
        losses = {"loss": denoising, "denoising": denoising}
        if residuals.to_rgbs:
            removal = removal_loss(residuals.to_rgbs, clean, antialias=self.config.antialias)
            losses |= {"loss": denoising + self.config.gamma * removal, "removal": removal}
            if self.grayscale:
                colour = torch.stack([colourfulness_loss(picture) for picture in residuals.to_rgbs]).sum()
                losses |= {"loss": losses["loss"] + self.config.colour_weight * colour, "colour": colour}
        return losses
