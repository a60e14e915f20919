"""What `python -m tools.evaluate restore` compares: interpolation, the upscaler, and runs of PASD."""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from msbd.load import TrainingParts, load_edit_pipeline, load_training_parts
from msbd.load_nets import load_net, load_pasd_nets
from msbd.train_data import enlarge
from msbd.train_validate import restore_pictures
from weights.locate import locate
from weights.registry import MINI

from ._report import write_json
from ._restore_trials import (
    SCALE,
    Method,
    bicubic,
    clip_features,
    make_pairs,
    measure,
    restore_figures,
    restore_table,
    upscaler_method,
)


def restore(args: argparse.Namespace) -> str:
    """Measure what the options ask for; the table. ValueError, WeightsError."""
    if args.pictures:
        args.pictures.mkdir(parents=True, exist_ok=True)
    pipe, parts = load_edit_pipeline(args.model), load_training_parts(args.model)
    methods: dict[str, Method] = {"bicubic": bicubic}
    if pipe.upscaler is not None:
        methods["RRDB"] = upscaler_method(pipe)
    for name, path in args.pasd or [("PASD", MINI / "pasd.safetensors")]:
        methods[name] = pasd_method(parts, path, steps=args.steps, captioned=args.captions, base=args.model)
    results = measure(
        methods, make_pairs(args.scenes), clip_features(pipe), sheets=args.pictures, quiet=args.quiet
    )
    baseline = args.baseline or "bicubic"
    if args.json:
        settings = {
            "model": args.model,
            "scenes": args.scenes,
            "steps": args.steps,
            "captions": args.captions,
        }
        write_json(args.json, restore_figures(results, baseline), **settings, results=results)
    return restore_table(results, baseline)


def pasd_method(
    parts: TrainingParts, path: str | Path, *, steps: int, captioned: bool, base: str | Path
) -> Method:
    """PASD of the file or folder at `path` on the base: DDIM from the noised latent, without guidance.

    A file that holds a ControlNet alone is the variant "none". `captioned` gives it the scenes' captions, otherwise none.
    """
    nets = locate(path).nets
    unet, controlnet = (
        (parts.unet, load_net(path)) if set(nets) == {"controlnet"} else load_pasd_nets(path, base)
    )
    unet, controlnet = unet.float(), controlnet.float()

    def method(low: Tensor, captions: list[str], first_seed: int) -> Tensor:
        height, width = (side * SCALE for side in low.shape[-2:])
        control = enlarge(low, (height, width))
        context = parts.text_encoder(parts.tokenizer(captions if captioned else [""] * len(low)))
        shape = (
            parts.vae.config.latent_channels,
            height // parts.vae.downscale,
            width // parts.vae.downscale,
        )
        noise = [
            torch.randn(shape, generator=torch.Generator().manual_seed(first_seed + i))
            for i in range(len(low))
        ]
        return restore_pictures(
            unet, controlnet, parts.vae, control, context, parts.alphas_cumprod, noise=torch.stack(noise), steps=steps,
            prediction_type=parts.prediction_type,
        )  # fmt: skip

    return method
