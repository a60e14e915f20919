"""The parts of the mini bundle: each net's size, its recipe and its loss."""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msbd.files import whole_file
from msbd.train.degrade import apply
from nets.clip import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig
from nets.rrdb import RRDBConfig, RRDBNet
from nets.unet import UNet, UNetConfig
from nets.vae import AutoencoderKL, VAEConfig
from samplers.schedule import make_alphas_cumprod, make_betas, q_sample
from weights.tokenizer import PromptTokenizer, train_tokenizer

from ..scenes.data import (
    NATIVE,
    StoredPictures,
    abstract_pictures,
    runs_folder,
    stage_pictures,
    training_pictures,
)
from ..scenes.mild import Strength, sample_mild
from ..scenes.scenes import CLOSE_UP, DEGRADED, all_captions
from .train import Recipe, trained

VAE = VAEConfig(
    block_out_channels=(32, 64, 96, 96), layers_per_block=1, norm_num_groups=8, mid_attention=False
)
UNET = UNetConfig(
    block_out_channels=(64, 96, 160),
    layers_per_block=1,
    cross_attention_dim=128,
    attention_head_dim=4,
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    norm_num_groups=16,
)
RRDB = RRDBConfig(scale=4, num_feat=32, num_block=3, num_grow_ch=16)

GUIDANCE = 4.0  # what `python -m tools.mini evaluate` is run with

# What the RRDB learns to undo: more blur (a VAE's pictures are soft) and noise than mild.MILD.
RRDB_STRENGTH = Strength(
    blur_sigma=(0.2, 2.5),
    noise_probability=0.6,
    gaussian_sigma=(1 / 255, 20 / 255),
    jpeg_probability=0.6,
    jpeg_quality=(40, 95),
)


def clip_config(vocab_size: int) -> CLIPConfig:
    """About 2 M parameters: four layers of width 128 on either side, 64 patches."""
    size: dict[str, Any] = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    }
    text = CLIPTextConfig(**size, vocab_size=vocab_size, eos_token_id=vocab_size - 1)
    vision = CLIPVisionConfig(**size, image_size=NATIVE, patch_size=16)
    return CLIPConfig(text=text, vision=vision, projection_dim=128)


@cache
def mini_tokenizer() -> PromptTokenizer:
    """CLIP's pipeline with a vocabulary learned from every caption there is."""
    words = [*all_captions(), *all_captions(), DEGRADED, CLOSE_UP, "a photo of"]
    return PromptTokenizer(train_tokenizer(words, 768))


def draw(count: int, upper: int, generator: torch.Generator) -> Tensor:
    """`count` random indices below `upper`."""
    return torch.randint(upper, (count,), generator=generator)


def random_crops(images: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """A random `size` x `size` window of each picture (B, 3, H, W), half of them mirrored."""
    tops = draw(len(images), images.shape[-2] - size + 1, generator).tolist()
    lefts = draw(len(images), images.shape[-1] - size + 1, generator).tolist()
    flips = (torch.rand(len(images), generator=generator) < 0.5).tolist()
    crops = [image[:, t : t + size, x : x + size] for image, t, x in zip(images, tops, lefts, strict=True)]
    return torch.stack([crop.flip(-1) if flip else crop for crop, flip in zip(crops, flips, strict=True)])


class _Mixed:
    """Crops of scenes, one in eight of them an abstract picture."""

    def __init__(self) -> None:
        self.scenes, self.abstracts = training_pictures(), abstract_pictures()

    def crops(self, batch: int, size: int, generator: torch.Generator) -> Tensor:
        """(batch, 3, size, size) in [-1, 1]."""
        strange = batch // 8
        scenes = self.scenes.batch(draw(batch - strange, len(self.scenes.captions), generator))
        abstracts = self.abstracts.batch(draw(strange, len(self.abstracts.captions), generator))
        return random_crops(torch.cat([scenes, abstracts]), size, generator)


class VAEPart:
    """f8, 4 channels: L1, L1 of the gradients (edges), a little KL."""

    name = "vae"
    recipe = Recipe(steps=4200, batch=16, learning_rate=1.5e-3, clip=5.0)

    def __init__(self) -> None:
        self.net = AutoencoderKL(VAE)
        self.data = _Mixed()

    def loss(self, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """Reconstruction of a batch of 64-px crops."""
        device = next(self.net.parameters()).device
        images = self.data.crops(self.recipe.batch, 64, generator).to(device)
        posterior = self.net.encode(images)
        noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
        error = self.net.decode(posterior.sample(noise)).float() - images
        edges = (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()) / 2
        pixels, kl = error.abs().mean(), posterior.kl().float().mean()
        psnr = -10 * torch.log10(error.square().mean() / 4)
        return pixels + edges + 2e-4 * kl, {"psnr": psnr.item(), "kl": kl.item()}


class RRDBPart:
    """x4 super-resolution of degraded pictures: L1."""

    name = "rrdb"
    recipe = Recipe(steps=5000, batch=16, learning_rate=8e-4)

    def __init__(self) -> None:
        self.net = RRDBNet(RRDB)
        self.data = _Mixed()

    def loss(self, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """Restoration of a batch of 64-px crops from 16-px degraded ones, in [0, 1]."""
        device = next(self.net.parameters()).device
        images = self.data.crops(self.recipe.batch, 64, generator) / 2 + 0.5
        drawn = [sample_mild(generator, strength=RRDB_STRENGTH) for _ in images]
        with torch.autocast("cpu", enabled=False):  # data, so in float32 whatever the net runs in
            small = torch.cat([apply(x[None], each) for x, each in zip(images, drawn, strict=True)])
        error = self.net(small.to(device)).float() - images.to(device)
        psnr = -10 * torch.log10(error.square().mean())
        return error.abs().mean(), {"psnr": psnr.item()}


class CLIPPart:
    """Text and vision towers: contrastive on captioned pictures (Radford et al. 2021, figure 3)."""

    name = "clip"
    recipe = Recipe(steps=1100, batch=128, learning_rate=1e-3, weight_decay=0.05, ema=0.99)

    def __init__(self) -> None:
        self.data = training_pictures()
        self.ids = mini_tokenizer()(self.data.captions)
        self.net = CLIPModel(clip_config(mini_tokenizer().vocab_size))
        for module in self.net.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        self.longest = int((self.ids != mini_tokenizer().end_id).sum(1).max()) + 1  # the rest is padding

    def loss(self, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """Cross-entropy both ways over one batch; equal captions are all right answers."""
        device = next(self.net.parameters()).device
        index = draw(self.recipe.batch, len(self.ids), generator)
        images = random_crops(self.data.batch(index), NATIVE, generator).to(device)
        ids = self.ids[index, : self.longest].to(device)  # causal: dropping padding changes nothing
        image = F.normalize(self.net.encode_image(images).float(), dim=-1)
        text = F.normalize(self.net.encode_text(ids).float(), dim=-1)
        logits = self.net.logit_scale.clamp(max=math.log(100)).exp() * image @ text.T
        same = (ids[:, None] == ids[None]).all(-1).float()
        target = same / same.sum(1, keepdim=True)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        right = same.gather(1, logits.argmax(1, keepdim=True)).mean()
        return loss, {"accuracy": right.item()}


class UNetPart:
    """Text to picture on the trained VAE's latents and CLIP's text states: epsilon, mean squared error.

    Three batches in four are of the native size and all timesteps. The fourth is what the later stages of an
    edit evaluate: 24 x 24 latents, whole views and parts of the object, at the lower timesteps they start
    from, under the plain caption. A part of the object says "close up" in its caption only at the higher
    timesteps, where the layout is decided: there the plain caption means a whole view, below it either.
    """

    name = "unet"
    recipe = Recipe(steps=9000, batch=32, learning_rate=8e-4, weight_decay=0.01, ema=0.999, bfloat16=False)
    dropped = 0.1  # the share of captions that are left out, for classifier-free guidance
    stage_batch = 14  # latents of 24 x 24: they have as many cells as 32 of 16 x 16
    stage_timesteps = 450  # the later stages start at 381 (T' = 0.4) or 241 (0.25)
    layout_timestep = 400  # from here on the caption says "close up"

    def __init__(self) -> None:
        self.net = UNet(UNET)
        self.native, self.stage = training_pictures().captions, stage_pictures().captions
        self.native_latents, self.scaling_factor = latents()
        self.stage_latents = encoded("stage-latents", stage_pictures)
        self.text = trained(CLIPPart(), device=torch.device("cpu")).text_model
        self.alphas_cumprod = make_alphas_cumprod(make_betas())

    def loss(self, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """|eps - eps_theta|^2 (Ho et al. 2020, eq. 14) at uniform timesteps; half the pictures mirrored."""
        device = next(self.net.parameters()).device
        later = float(torch.rand((), generator=generator)) < 0.25
        stored, captions = (self.stage_latents, self.stage) if later else (self.native_latents, self.native)
        count = self.stage_batch if later else self.recipe.batch
        index, mirrored = draw(count, len(captions), generator), draw(count, 2, generator)
        z = torch.from_numpy(stored[mirrored.numpy(), index.numpy()]).float() * self.scaling_factor
        t = draw(count, self.stage_timesteps if later else len(self.alphas_cumprod), generator)
        noise = torch.randn(z.shape, generator=generator)
        kept = torch.rand(count, generator=generator) >= self.dropped
        texts = [
            self._caption(captions[i], int(at)) if keep else ""
            for i, at, keep in zip(index, t, kept, strict=True)
        ]
        with torch.no_grad():
            context = self.text(mini_tokenizer()(texts)).to(device)
        x = q_sample(z, t, self.alphas_cumprod, noise)
        error = self.net(x.to(device), t.to(device), context).float() - noise.to(device)
        return error.square().mean(), {"later": float(later)}

    def _caption(self, caption: str, t: int) -> str:
        return caption if t >= self.layout_timestep else caption.removesuffix(CLOSE_UP)


def latents() -> tuple[Any, float]:
    """The training pictures' latents (2, N, 4, 16, 16), as they are and mirrored, and 1 / their deviation.

    They are float16, unscaled.
    """
    stored = encoded("latents", training_pictures)
    return stored, float(1 / stored.astype(np.float32).std())


def encoded(name: str, pictures: Callable[[], StoredPictures], vae: AutoencoderKL | None = None) -> Any:
    """Latents (2, N, 4, h, w) in float16, unscaled, of pictures as they are and mirrored; made once.

    By `vae`, or by the one of the last checkpoint.
    """
    stored = runs_folder() / "data" / f"{name}.npy"
    if not stored.exists():
        found, encoder = pictures(), vae or trained(VAEPart(), device=torch.device("cpu"))
        batches = []
        for start in range(0, len(found.captions), 64):
            images = found.batch(range(start, min(start + 64, len(found.captions))))
            batches.append(
                np.stack([encoder.encode(side).mean.half().numpy() for side in (images, images.flip(-1))])
            )
        with whole_file(stored) as unfinished, open(unfinished, "wb") as file:
            np.save(file, np.concatenate(batches, axis=1))
    return np.load(stored)


PARTS = {part.name: part for part in (VAEPart, CLIPPart, UNetPart, RRDBPart)}
