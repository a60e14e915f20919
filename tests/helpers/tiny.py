"""Tiny nets and a pipeline of them, for tests that are about the algorithm and not about what a net has
learned.
"""

from typing import Any

import torch
from torch import Tensor, nn

from msbd.edit.config import ModelSpec
from msbd.edit.pipeline import EditPipeline
from nets.unet import UNetConfig
from nets.vae import AutoencoderKL, IdentityAutoencoder, VAEConfig
from samplers.schedule import make_alphas_cumprod, make_betas

ALPHAS = make_alphas_cumprod(make_betas())
SPEC = ModelSpec(native=64, multiple=16)
SMALL_UNET = UNetConfig(
    block_out_channels=(8, 16),
    layers_per_block=1,
    cross_attention_dim=12,
    attention_head_dim=2,
    norm_num_groups=4,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)


class PullTowards(nn.Module):
    """A denoiser whose x0 is always `target` (per channel), whatever the prompt."""

    def __init__(self, target: list[float]) -> None:
        super().__init__()
        self.target = nn.Parameter(torch.tensor(target).view(1, -1, 1, 1))

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        a = ALPHAS[int(t)].float()
        return (x - a.sqrt() * self.target) / (1 - a).sqrt()


def tiny_vae() -> AutoencoderKL:
    """f8 with random weights."""
    torch.manual_seed(0)
    config = VAEConfig(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, mid_attention=False
    )
    return AutoencoderKL(config).eval().requires_grad_(False)


class TinyNet(nn.Module):
    """A denoiser with something of everything: neighbours, timestep and prompt matter;
    tame at every timestep.
    """

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(0.2 * torch.randn(channels, channels, 3, 3, generator=generator))

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        shift = context.mean(dim=(1, 2)).view(-1, 1, 1, 1)
        return (
            0.6 * x + 0.4 * torch.tanh(nn.functional.conv2d(x, self.weight, padding=1) + shift) + 0.0001 * t
        )


class Recorder(nn.Module):
    """A net that notes every call: its timestep, its batch and each member's context mean.

    Raises torch.OutOfMemoryError for the first `failures` calls with more than one in the batch.
    """

    def __init__(self, net: nn.Module, *, failures: int = 0) -> None:
        super().__init__()
        self.net, self.failures = net, failures
        self.timesteps: list[int] = []
        self.batches: list[Tensor] = []
        self.contexts: list[list[float]] = []

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        self.timesteps.append(int(t))
        self.batches.append(x.clone())
        self.contexts.append(context.mean(dim=(1, 2)).tolist())
        if self.failures and len(x) > 1:
            self.failures -= 1
            raise torch.OutOfMemoryError("pretended")
        return self.net(x, t, context)


def count_letters(prompts: list[str]) -> Tensor:
    """A tokenizer: every id is the length of the prompt."""
    return torch.tensor([len(prompt) for prompt in prompts])[:, None].expand(-1, 77)


def letters_as_context(ids: Tensor) -> Tensor:
    """A text encoder: 0.01 x the length of the prompt, (B, 77, 4)."""
    return 0.01 * ids.float()[..., None].expand(-1, -1, 4)


def pixel_pipeline(target: tuple[float, float, float] = (0.5, -0.5, 0.0), **parts: Any) -> EditPipeline:
    """A pixel-space pipeline (identity autoencoder) that paints everything in one colour."""
    return _pipeline({"unet": PullTowards(list(target)), "vae": IdentityAutoencoder(), **parts})


def latent_pipeline(**parts: Any) -> EditPipeline:
    """A latent pipeline whose nets are random: candidates, prompts and seeds all show in the picture."""
    return _pipeline({"unet": TinyNet(), "vae": tiny_vae(), **parts})


def _pipeline(parts: dict[str, Any]) -> EditPipeline:
    common = {
        "text_encoder": letters_as_context,
        "tokenizer": count_letters,
        "alphas_cumprod": ALPHAS,
        "spec": SPEC,
    }
    return EditPipeline(**{**common, **parts})
