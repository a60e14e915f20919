"""The measurements of `python -m tools.mini evaluate`, all on pictures and captions held out from training.

Pictures are rounded to 8 bits before they are compared, as they would be in a file.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count as count_up
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from msbd.edit.pipeline import EditPipeline
from msbd.latents import decode
from msbd.pixels.metrics import edge_step, psnr
from msbd.pixels.preprocess import clip_pixels
from msbd.pixels.resize import resize
from msbd.train.degrade import apply
from nets.asymmetric_vae import AsymmetricAutoencoderKL
from nets.vae import AutoencoderKL
from samplers.ddim import ddim_sample
from samplers.guidance import classifier_free_guidance
from samplers.schedule import leading_timesteps

from .._report import Figure, mean, share, write_sheet
from ..scenes.data import STAGE, held_out_scenes, picture, to_8_bits
from ..scenes.judge import Judge
from ..scenes.mild import sample_mild
from ..scenes.scenes import COLOURS, GROUNDS, HELD_OUT, LIGHTS, Scene, random_scene
from ..scenes.shapes import OBJECTS
from .asymmetric import random_mask
from .parts import RRDB_STRENGTH

_RETRIEVAL = HELD_OUT + 10_000  # first seed of the pictures that CLIP is asked about


# ---- reconstruction ----------------------------------------------------------------------------------------


@torch.no_grad()
def vae_figures(pipe: EditPipeline, count: int = 64, sheet: Path | None = None) -> list[Figure]:
    """Mean PSNR of held-out scenes at the native size, encoded (the posterior's mean) and decoded again."""
    weight = next(pipe.vae.parameters())
    pairs = []
    for scene in held_out_scenes(count):
        image = picture(scene, pipe.spec.native)
        decoded = pipe.vae.decode(pipe.vae.encode(image.to(weight)).mean)
        pairs.append((image, to_8_bits(decoded.cpu())))
    if sheet:
        write_sheet(sheet / "vae.png", [image[0] for pair in pairs[:24] for image in pair], 12)
    return [mean("VAE, held-out scenes", [psnr(b, a).item() for a, b in pairs], "dB", asked=27.0)]


@torch.no_grad()
def rrdb_figures(pipe: EditPipeline, count: int = 64, sheet: Path | None = None) -> list[Figure]:
    """PSNR of degraded held-out scenes enlarged x4 by the upscaler and by interpolation, and the paired gain.

    Degraded as the upscaler's training pictures are (`parts.RRDB_STRENGTH`).
    """
    assert pipe.upscaler is not None, "the bundle has an upscaler"
    weight = next(pipe.upscaler.parameters())
    learned, plain, shown = [], [], []
    for number, scene in enumerate(held_out_scenes(count)):
        image = picture(scene, pipe.spec.native)
        generator = torch.Generator().manual_seed(number)
        small = apply(image / 2 + 0.5, sample_mild(generator, strength=RRDB_STRENGTH))
        large = to_8_bits(pipe.upscaler(small.to(weight)).float().cpu() * 2 - 1)
        bicubic = to_8_bits(
            F.interpolate(small, image.shape[-2:], mode="bicubic", align_corners=False) * 2 - 1
        )
        learned.append(psnr(large, image).item())
        plain.append(psnr(bicubic, image).item())
        shown += [bicubic[0], large[0], image[0]]
    if sheet:
        write_sheet(sheet / "rrdb.png", shown[:72], 12)
    gain = [a - b for a, b in zip(learned, plain, strict=True)]
    return [
        mean("RRDB x4, degraded scenes", learned, "dB"),
        mean("bicubic x4, the same", plain, "dB"),
        mean("RRDB over bicubic, paired", gain, "dB", asked=1.0),
    ]


# ---- the decoder that sees what is kept --------------------------------------------------------------------

RING = 16  # pixels outside the mask


@torch.no_grad()
def seam_figures(
    vae: AutoencoderKL, decoder: AsymmetricAutoencoderKL, count: int = 64, *, size: int = STAGE
) -> list[Figure]:
    """How well a plain and a mask-conditioned decoder meet the source around a mask, on `count` scenes.

    Each scene is repainted under a random mask twice: perfectly, where the source is the scene but for the
    masked part, and foreign, where another scene fills the cells that the mask touches. The latent is the
    source's outside these cells. Of the perfect ones: PSNR over the ring as decoded, how far the two decoders
    are apart inside. Of both: the step across the mask's edge, by `edge_step`, once the source is put back
    outside, less that of the scene.
    """
    found: dict[str, list[float]] = defaultdict(list)
    pictures = [picture(scene, size) for scene in held_out_scenes(count + 1)]
    for number, (scene, other) in enumerate(pairwise(pictures)):
        mask = random_mask(size, torch.Generator().manual_seed(number), whole=False)[None]
        cells = F.max_pool2d(mask, vae.downscale)
        touched = F.interpolate(cells, mask.shape[-2:], mode="nearest")
        ring = F.max_pool2d(mask, 2 * RING + 1, 1, padding=RING) * (1 - mask) > 0
        edits = {
            "perfect": (torch.lerp(scene, other, mask), scene),
            "foreign": (scene, torch.lerp(scene, other, touched)),
        }
        for kind, (source, new) in edits.items():
            latent = torch.lerp(vae.encode(source).mean, vae.encode(new).mean, cells)
            decoded = {"plain": vae.decode(latent), "seam": decoder.decode(latent, source, mask)}
            for name, raw in decoded.items():
                result = to_8_bits(raw)
                step = edge_step(torch.lerp(source, result, mask), mask) - edge_step(scene, mask)
                found[f"{kind} {name} step"].append(step.item())
                found[f"{kind} {name} ring"].append(psnr(result, source, ring.float()).item())
            apart = (decoded["seam"] - decoded["plain"]).abs().masked_select(mask > 0).mean() * 127.5
            found[f"{kind} inside"].append(apart.item())
    return [
        mean("seam decoder, ring", found["perfect seam ring"], "dB", asked=36.0),
        mean("plain decoder, ring", found["perfect plain ring"], "dB"),
        mean("seam decoder, step, foreign edits", found["foreign seam step"], "levels"),
        mean("plain decoder, step, foreign edits", found["foreign plain step"], "levels"),
        mean("seam decoder, step, perfect edits", found["perfect seam step"], "levels"),
        mean("plain decoder, step, perfect edits", found["perfect plain step"], "levels"),
        mean("the two inside, perfect edits", found["perfect inside"], "levels"),
    ]


# ---- CLIP --------------------------------------------------------------------------------------------------


@torch.no_grad()
def clip_figure(pipe: EditPipeline, captions: int = 100, pictures_each: int = 2) -> Figure:
    """How often a held-out picture's own caption is the nearest of `captions` distinct ones.

    Chance is 1 in `captions`. The captions are full ones, "a red house on snow at night", many differing in a
    single word.
    """
    assert pipe.clip is not None, "the bundle has a CLIP"
    found = scenes_by_caption(captions, pictures_each)
    device = pipe.clip.logit_scale.device
    text = F.normalize(pipe.clip.encode_text(pipe.clip_tokenizer(list(found)).to(device)).float(), dim=-1)
    right = []
    for number, scenes in enumerate(found.values()):
        images = torch.cat([picture(scene, pipe.spec.native) for scene in scenes])
        pixels = clip_pixels(images, **pipe.clip_preprocessing).to(pipe.clip.logit_scale)
        nearest = (pipe.clip.encode_image(pixels).float() @ text.T).argmax(1)
        right += [index == number for index in nearest.tolist()]
    return share(f"CLIP, right one of {captions} captions", right, asked=90.0)


def scenes_by_caption(captions: int, each: int) -> dict[str, list[Scene]]:
    """The first `captions` distinct captions of held-out scenes, each with the first `each` such scenes."""
    found: dict[str, list[Scene]] = {}
    for seed in count_up(_RETRIEVAL):
        scene = random_scene(seed)
        scenes = found.setdefault(scene.caption, []) if len(found) < captions else found.get(scene.caption)
        if scenes is not None and len(scenes) < each:
            scenes.append(scene)
        if len(found) == captions and all(len(scenes) == each for scenes in found.values()):
            return found
    raise AssertionError("the seeds do not end")


# ---- text to image -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """A picture drawn from a caption, and what the judge sees in it."""

    asked: Scene  # only what the caption says counts
    image: Tensor  # (3, H, W) in [-1, 1]
    kind: str
    colour: str | None

    @property
    def right(self) -> bool:
        """Both the object and its colour are the asked ones."""
        return self.kind == self.asked.kind and self.colour == self.asked.colour

    @property
    def record(self) -> dict[str, Any]:
        """For JSON: without the picture."""
        return {"caption": self.asked.caption, "seen": self.kind, "colour": self.colour}


def distinct_scenes(count: int) -> list[Scene]:
    """`count` different captions in a fixed shuffled order, as scenes. ValueError for more than there are."""
    every = [Scene(c, k, g, t, 0) for c in COLOURS for k in OBJECTS for g in GROUNDS for t in LIGHTS]
    if count > len(every):
        raise ValueError(f"{count} samples of distinct captions: there are {len(every)} captions")
    return [every[i] for i in np.random.default_rng(0).permutation(len(every))[:count]]


def text_to_image(
    pipe: EditPipeline,
    judge: Judge,
    *,
    count: int = 96,
    steps: int = 50,
    seed: int = 0,
    batch: int = 16,
    quiet: bool = False,
) -> list[Sample]:
    """`count` pictures of distinct captions (deterministic DDIM, the model's own guidance), judged."""
    scenes = distinct_scenes(count)
    samples: list[Sample] = []
    starts = range(0, count, batch)
    for start in tqdm(starts, desc="text to image", disable=True if quiet else None, leave=False):
        asked = scenes[start : start + batch]
        images = draw_captions(pipe, [s.caption for s in asked], steps=steps, seed=seed * 100_000 + start)
        seen = judge.kinds(images), judge.colours(images, [s.time for s in asked])
        samples += [Sample(*row) for row in zip(asked, images, *seen, strict=True)]
    return samples


@torch.no_grad()
def draw_captions(pipe: EditPipeline, captions: Sequence[str], *, steps: int, seed: int) -> Tensor:
    """A picture (B, 3, native, native) in [-1, 1] of each caption.

    Picture i starts from the noise of seed + i.
    """
    weight = next(pipe.unet.parameters())
    context = pipe.text_encoder(pipe.tokenizer([*captions, ""]).to(weight.device)).to(weight.dtype)
    side = pipe.spec.native // pipe.vae.downscale
    shape = (pipe.vae.config.latent_channels, side, side)
    noise = [
        torch.randn(shape, generator=torch.Generator().manual_seed(seed + i)) for i in range(len(captions))
    ]

    def model(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return pipe.unet(x.to(weight.dtype), t, context).float()

    denoise = classifier_free_guidance(model, context[:-1], context[-1:], pipe.spec.guidance_scale)
    latents = ddim_sample(
        denoise, torch.stack(noise).to(weight.device), leading_timesteps(steps), pipe.alphas_cumprod
    )
    return to_8_bits(decode(pipe.vae, latents).cpu())


def sample_figures(samples: Sequence[Sample], sheet: Path | None = None) -> list[Figure]:
    """How many samples show the asked colour, the asked object, and both."""
    if sheet:
        shown = [resize(sample.image[None], (128, 128))[0] for sample in samples]
        write_sheet(sheet / "samples.png", shown, 12, wrong=[not sample.right for sample in samples])
    return [
        share("samples, asked colour", [s.colour == s.asked.colour for s in samples], asked=90.0),
        share("samples, asked object", [s.kind == s.asked.kind for s in samples], asked=80.0),
        share("samples, both", [s.right for s in samples]),
    ]


def judge_figures(judge: Judge, count: int = 200) -> list[Figure]:
    """What the judge gets right where the answer is known: held-out scenes, as large as the samples."""
    scenes = held_out_scenes(count, start=5_000)
    images = torch.cat([picture(scene, 128) for scene in scenes])
    colours = judge.colours(images, [scene.time for scene in scenes])
    kinds = judge.kinds(images)
    return [
        share("judge on true scenes, colour", [c == s.colour for c, s in zip(colours, scenes, strict=True)]),
        share("judge on true scenes, object", [k == s.kind for k, s in zip(kinds, scenes, strict=True)]),
    ]
