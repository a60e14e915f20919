"""The bundle's PASD at work: what it makes of degraded and of grey scenes that it has not seen."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from msbd.load import load_edit_pipeline, load_restore_pipeline
from msbd.train.validate import LOOK, restore_pictures
from tools.evaluate.__main__ import build_parser
from tools.evaluate.methods import pasd_method
from tools.evaluate.restore import Results, bicubic, clip_features, make_pairs, measure

SCENES, START = 8, 2000  # none of those that the README's table is made of


@pytest.fixture(scope="module")
def results() -> Results:
    words = ["restore", "--steps", "10", "--conditioning-scale", "1.5", "--device", "cpu"]
    words += ["--sampler", "ddim", "--alpha-a", "1", "--process-size", "128"]
    method = pasd_method("mini-pasd", build_parser().parse_args(words))
    pairs = make_pairs(SCENES, start=START)
    features = clip_features(load_edit_pipeline("mini"))
    return measure({"bicubic": bicubic, "PASD": method}, pairs, features, quiet=True)


@pytest.mark.parametrize(
    ("metric", "least"), [("PSNR", 0.2), ("SSIM", 0.02), ("GMSD", 0.003), ("feature distance", 0.0)]
)
def test_what_is_restored_is_nearer_to_the_clean_picture(results: Results, metric: str, least: float) -> None:
    gain = sum(results["PASD"][metric]) / SCENES - sum(results["bicubic"][metric]) / SCENES
    assert (gain if metric in ("PSNR", "SSIM") else -gain) > least


def chroma(images: Tensor) -> Tensor:
    """What remains of pictures (B, 3, H, W) without their luma."""
    return images - (images * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)


@torch.no_grad()
def test_grey_pictures_get_their_colours_back() -> None:
    pipe = load_restore_pipeline("mini-pasd-color")
    pairs = make_pairs(SCENES, start=START)
    clean = torch.cat([pair.clean for pair in pairs])
    grey = clean - chroma(clean)
    captions, config = [pair.caption for pair in pairs], replace(LOOK, num_inference_steps=10)
    colored = restore_pictures(pipe, grey / 2 + 0.5, captions, (128, 128), config)
    error, without = (chroma(images - clean).square().mean().item() for images in (colored, grey))
    assert error < 0.5 * without
