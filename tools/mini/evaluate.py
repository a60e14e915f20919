"""Held-out figures of the mini bundle: is every net good enough for what it is there for?

Nothing heavy is imported until it is run, so that `--help` answers at once.
"""

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from .._cli import add_shared_options, choose_device, report_errors

if TYPE_CHECKING:
    from .._report import Figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m tools.mini evaluate`."""
    parser.add_argument(
        "--model", default="mini", help="a name, or a folder laid out as weights/mini (default: mini)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="also write sheets of pictures there")
    parser.add_argument(
        "--pairs", type=int, default=64, metavar="N", help="pictures for VAE and RRDB (default: 64)"
    )
    parser.add_argument(
        "--samples", type=int, default=96, metavar="N", help="text-to-image samples (default: 96)"
    )
    parser.add_argument("--steps", type=int, default=50, metavar="N", help="DDIM's steps (default: 50)")
    add_shared_options(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, print one table; exit code 0, or 1 if it could not be done.

    A figure not reached is no failure.
    """
    with report_errors(debug=args.debug) as outcome:
        started = time.perf_counter()
        text = evaluate(args)
        if not args.quiet:
            print(f"{text}\n{time.perf_counter() - started:.0f} s")
    return outcome.exit_code


def evaluate(args: argparse.Namespace) -> str:
    """All measurements with the options of `add_arguments`; the table. Writes what was asked for besides."""
    from msbd.load import load_edit_pipeline, model_hash

    from .._report import figures_table, make_folders, write_json
    from ..scenes.judge import load_judge
    from . import figures

    device, dtype = choose_device(args.device, args.dtype)
    pipe = load_edit_pipeline(args.model, device=device, dtype=dtype)
    make_folders(args)
    judge = load_judge()
    samples = figures.text_to_image(
        pipe, judge, count=args.samples, steps=args.steps, seed=args.seed, quiet=args.quiet
    )
    found = [
        *figures.vae_figures(pipe, args.pairs, args.pictures),
        *figures.rrdb_figures(pipe, args.pairs, args.pictures),
        figures.clip_figure(pipe),
        *figures.sample_figures(samples, args.pictures),
        *figures.judge_figures(judge),
    ]
    if str(args.model) == "mini":
        found += _bundled_decoder(args.pairs)
    if args.json:
        details = [sample.record for sample in samples]
        settings = {
            "model": str(args.model),
            "hash": model_hash(args.model),
            "steps": args.steps,
            "seed": args.seed,
        }
        write_json(args.json, found, **settings, samples=details)
    return figures_table(found)


def _bundled_decoder(count: int) -> "list[Figure]":
    """The figures of the bundle's mask-conditioned decoder, on the CPU."""
    from msbd.loading.parts import load_net
    from msbd.loading.seam import read_seam_decoder
    from weights.registry import MINI

    from . import figures

    vae = load_net(MINI / "vae.safetensors")
    decoder = read_seam_decoder("mini-asymmetric", vae).float()
    return figures.seam_figures(vae.float(), decoder, count)
