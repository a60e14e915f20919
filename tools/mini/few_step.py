"""A LoRA with which the bundle's U-Net samples in a few steps, distilled from it by consistency.

Papers   Luo et al. 2023 (latent consistency models), arXiv:2310.04378, algorithm 1; Luo et al. 2023
         (LCM-LoRA), arXiv:2311.05556
"""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from msbd.load import load_edit_pipeline
from msbd.train.base import LowRankChange, kohya_names
from nets.unet import UNet
from samplers.ddim import ddim_step
from samplers.lcm import lcm_step, lcm_timesteps
from samplers.schedule import q_sample
from weights.files import write_safetensors
from weights.merge import narrow

from ..scenes.data import stage_pictures, training_pictures
from .parts import GUIDANCE, draw, encoded
from .train import Recipe, trained

RANK = 16  # of the LoRA, in every dense layer and convolution: 1.0 M parameters
_HUBER = 1e-3  # c of the pseudo-Huber loss, as LCM-LoRA's published recipe has it


class FewStepPart:
    """Consistency distillation with guidance: f(x_t, t) is to be f(x_s, s) one DDIM step of 20 further on.

    The step is the frozen U-Net's, guided by GUIDANCE, so that the result is sampled without guidance. The
    target is the net itself without gradients. As in UNetPart every fourth batch is of later stages: 24 x 24
    latents at the lower timesteps.
    """

    name = "few-step"
    recipe = Recipe(steps=1800, batch=24, learning_rate=1e-3, ema=0.99, bfloat16=False)
    stage_batch = 11  # latents of 24 x 24: they have as many cells as 24 of 16 x 16
    stage_timesteps = 450

    def __init__(self) -> None:
        bundle: Any = load_edit_pipeline("mini", device=torch.device("cpu"), dtype=torch.float32)
        self.teacher: UNet = bundle.unet
        self.net: Any = with_changes(copy.deepcopy(bundle.unet), RANK)
        self.text, self.tokenizer = bundle.text_encoder, bundle.tokenizer
        self.alphas_cumprod = bundle.alphas_cumprod
        self.scaling_factor = bundle.vae.config.scaling_factor
        self.native, self.stage = training_pictures().captions, stage_pictures().captions
        self.native_latents = encoded("mini-latents", training_pictures, bundle.vae)
        self.stage_latents = encoded("mini-stage-latents", stage_pictures, bundle.vae)
        self.timesteps = lcm_timesteps(50).flip(0)  # 19, 39, ..., 999: what the net is distilled on

    def loss(self, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """The pseudo-Huber distance of the two predictions of one batch, all at one of the timesteps."""
        later = float(torch.rand((), generator=generator)) < 0.25
        stored, captions = (self.stage_latents, self.stage) if later else (self.native_latents, self.native)
        count = self.stage_batch if later else self.recipe.batch
        index, mirrored = draw(count, len(captions), generator), draw(count, 2, generator)
        z = torch.from_numpy(stored[mirrored.numpy(), index.numpy()]).float() * self.scaling_factor
        usable = int((self.timesteps < self.stage_timesteps).sum()) if later else len(self.timesteps)
        n = draw(count, usable, generator)
        t, s = self.timesteps[n], torch.where(n > 0, self.timesteps[n - 1], 0)
        a_t, a_s = self.alphas_cumprod[t], torch.where(n > 0, self.alphas_cumprod[s], 1.0)
        x_t = q_sample(z, t, self.alphas_cumprod, torch.randn(z.shape, generator=generator))
        device = next(self.net.parameters()).device
        with torch.no_grad():
            context = self.text(self.tokenizer([*(captions[i] for i in index), ""]))
            x_t, t, s, a_t, a_s, context = (x.to(device) for x in (x_t, t, s, a_t, a_s, context))
            cond, uncond = context[:-1], context[-1:].expand(count, -1, -1)
            both = self.teacher.to(device)(
                torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([uncond, cond])
            )
            eps_u, eps_c = both.chunk(2)
            eps = eps_u + GUIDANCE * (eps_c - eps_u)
            x_s = torch.stack([ddim_step(*row)[0] for row in zip(x_t, eps, a_t, a_s, strict=True)])
            target = self._clean(x_s, s, a_s, cond)  # x_s itself where s is 0: f is the identity there
        error = self._clean(x_t, t, a_t, cond) - target
        return ((error.square() + _HUBER**2).sqrt() - _HUBER).mean(), {"later": float(later)}

    def _clean(self, x: Tensor, t: Tensor, a_t: Tensor, context: Tensor) -> Tensor:
        """f(x, t) (n, 4, h, w): the clean latents that the net in training sees in `x` at t (n,)."""
        rows = zip(x, self.net(x, t, context), t.tolist(), a_t.tolist(), strict=True)
        return torch.stack([lcm_step(x, eps, t, a, 1.0)[1] for x, eps, t, a in rows])


def with_changes(unet: UNet, rank: int) -> UNet:
    """`unet` frozen, a trainable low-rank change in each dense layer and convolution as wide as `rank`."""
    unet.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for net in list(unet.modules()):
        if isinstance(net, nn.Linear | nn.Conv2d) and min(net.weight.shape[:2]) >= rank:
            register_parametrization(net, "weight", LowRankChange(net.weight, rank, rank, generator))
    return unet


def write_few_step_lora(path: Path) -> None:
    """Write the LoRA of the last checkpoint to `path`, in float16."""
    net: Any = trained(FewStepPart(), device=torch.device("cpu"))
    state: dict[str, Tensor] = {}
    for name, module in net.named_modules():
        if isinstance(module, LowRankChange):
            layer = name.removesuffix(".parametrizations.weight.0")
            shape = net.get_parameter(f"{layer}.parametrizations.weight.original").shape
            state |= kohya_names(layer, module.up, module.down, shape, float(RANK))
    write_safetensors(path, {key: narrow(tensor, torch.float16, key) for key, tensor in state.items()})
