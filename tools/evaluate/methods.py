"""What `python -m tools.evaluate restore` compares: interpolation, the upscaler, and runs of PASD."""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from msbd.load import TrainingParts, load_edit_pipeline, load_training_parts
from msbd.loading.parts import ModelParts, load_pasd_nets
from msbd.pixels.resize import enlarge
from msbd.restore.color import wavelet_color_fix
from msbd.train.validate import restore_pictures
from weights.locate import locate

from .._report import write_json
from .restore import (
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

SETTINGS = (
    *("model", "scenes", "start", "steps", "captions", "guidance", "negative"),
    *("conditioning_scale", "color_fix"),
)


def restore(args: argparse.Namespace) -> str:
    """Measure what the options ask for; the table. ValueError, WeightsError."""
    for folder in filter(None, (args.pictures, args.json and args.json.parent)):
        folder.mkdir(parents=True, exist_ok=True)
    pipe, parts = load_edit_pipeline(args.model), load_training_parts(args.model)
    if pipe.clip is None:
        raise ValueError(
            f"--model {args.model}: without CLIP, which measures the results; add its clip.safetensors"
        )
    methods: dict[str, Method] = {"bicubic": bicubic}
    if pipe.upscaler is not None:
        methods["RRDB"] = upscaler_method(pipe)
    for name, path in args.pasd or [("PASD", "mini-pasd")]:
        methods[name] = pasd_method(parts, path, args)
    if args.baseline not in methods:
        raise ValueError(f"--baseline {args.baseline}: not among what is compared ({', '.join(methods)})")
    pairs = make_pairs(args.scenes, start=args.start)
    results = measure(methods, pairs, clip_features(pipe), sheets=args.pictures, quiet=args.quiet)
    if args.json:
        settings = {name: getattr(args, name) for name in SETTINGS}
        write_json(args.json, restore_figures(results, args.baseline), settings=settings, results=results)
    return restore_table(results, args.baseline)


def pasd_method(parts: TrainingParts, path: str | Path, args: argparse.Namespace) -> Method:
    """PASD of the file or folder at `path` on the base, sampled as the options `SETTINGS` say.

    A file that holds a ControlNet alone is the variant "none".
    """
    located = locate(path)
    if set(located.nets) == {"controlnet"}:
        unet, controlnet = parts.unet, ModelParts(located).net("controlnet")
    else:
        unet, controlnet = load_pasd_nets(path, args.model)
    unet, controlnet, vae = unet.float(), controlnet.float(), parts.vae

    def text(prompts: list[str]) -> Tensor:
        return parts.text_encoder(parts.tokenizer(prompts))

    def method(low: Tensor, captions: list[str], first_seed: int) -> Tensor:
        height, width = (SCALE * side for side in low.shape[-2:])
        shape = (vae.config.latent_channels, height // vae.downscale, width // vae.downscale)
        seeds = range(first_seed, first_seed + len(low))
        noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        control = enlarge(low, (height, width))
        restored = restore_pictures(
            unet, controlnet, vae, control,
            text(captions if args.captions else [""] * len(low)), parts.alphas_cumprod,
            noise=torch.stack(noise), steps=args.steps, prediction_type=parts.prediction_type,
            conditioning_scale=args.conditioning_scale, guidance_scale=args.guidance,
            negative=text([args.negative] * len(low)),
        )  # fmt: skip
        return wavelet_color_fix(restored, control * 2 - 1) if args.color_fix == "wavelet" else restored

    return method
