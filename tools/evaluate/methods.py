"""What `python -m tools.evaluate restore` compares: interpolation, the upscaler, and runs of PASD."""

import argparse
from pathlib import Path

from msbd.load import load_edit_pipeline, load_restore_pipeline
from msbd.restore.config import RestoreConfig
from weights.locate import locate

from .._cli import choose_device
from .._report import settings_of, write_json
from .restore import (
    Method,
    bicubic,
    clip_features,
    make_pairs,
    measure,
    restore_figures,
    restore_table,
    restoring_method,
    upscaler_method,
)


def restore(args: argparse.Namespace) -> str:
    """Measure what the options ask for; the table. ValueError, WeightsError."""
    device, dtype = choose_device(args.device, args.dtype)
    pipe = load_edit_pipeline(args.model, device=device, dtype=dtype)
    if pipe.clip is None:
        raise ValueError(
            f"--model {args.model}: without CLIP, which measures the results; add its clip.safetensors"
        )
    methods: dict[str, Method] = {"bicubic": bicubic}
    if pipe.upscaler is not None:
        methods["RRDB"] = upscaler_method(pipe)
    for name, path in args.pasd or [("PASD", "mini-pasd")]:
        methods[name] = pasd_method(path, args)
    if args.baseline not in methods:
        raise ValueError(f"--baseline {args.baseline}: not among what is compared ({', '.join(methods)})")
    pairs = make_pairs(args.scenes, start=args.start)
    results = measure(methods, pairs, clip_features(pipe), sheets=args.pictures, quiet=args.quiet)
    if args.json:
        figures = restore_figures(results, args.baseline)
        write_json(args.json, figures, settings=settings_of(args), results=results)
    return restore_table(results, args.baseline)


def pasd_method(path: str | Path, args: argparse.Namespace) -> Method:
    """PASD of the file or folder at `path` on the base of --model; what no option says, as in tools.restore.

    A file that holds a ControlNet alone is the variant "none". WeightsError, ValueError.
    """
    device, dtype = choose_device(args.device, args.dtype)
    alone = set(locate(path).nets) == {"controlnet"}
    method = "controlnet" if alone else "pasd"
    pipe = load_restore_pipeline(path, base=args.model, method=method, device=device, dtype=dtype)
    asked = {} if args.own_settings else {
        "guidance_scale": args.guidance_scale,
        "conditioning_scale": args.conditioning_scale,
        "added_prompt": "",
        "negative_prompt": args.negative_prompt,
    }  # fmt: skip
    config = RestoreConfig(
        method=method,
        sampler=args.sampler,
        num_inference_steps=args.steps,
        alpha_a=args.alpha_a,
        process_size=args.process_size,
        color_fix=args.color_fix,
        **asked,
    )
    return restoring_method(pipe, config, captions=args.captions, seed=args.seed)
