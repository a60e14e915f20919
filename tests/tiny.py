"""Tiny nets and a pipeline of them, for tests that are about the algorithm and not about what a net has learned."""

from typing import Any

import torch
from torch import Tensor, nn

from msbd.edit import EditPipeline
from msbd.plan import Measures
from nets.vae import AutoencoderKL, IdentityAutoencoder, VAEConfig
from samplers.schedule import make_alphas_cumprod, make_betas

ALPHAS = make_alphas_cumprod(make_betas())
MEASURES = Measures(native=64, multiple=16)


class PullTowards(nn.Module):
    """A denoiser whose x0 is always `target` (per channel), times the context's mean when that is not zero."""

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


def pixel_pipeline(target: tuple[float, float, float] = (0.5, -0.5, 0.0), **parts: Any) -> EditPipeline:
    """A pixel-space pipeline (identity autoencoder) that paints everything in one colour."""
    return EditPipeline(
        unet=PullTowards(list(target)),
        vae=IdentityAutoencoder(),
        text_encoder=lambda ids: torch.zeros(len(ids), 77, 4),
        tokenizer=lambda prompts: torch.zeros(len(prompts), 77, dtype=torch.long),
        alphas_cumprod=ALPHAS,
        measures=MEASURES,
        **parts,
    )
