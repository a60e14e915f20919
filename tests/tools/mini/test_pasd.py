"""The bundle's PASD at work: what it makes of degraded and of grey scenes that it has not seen."""

import pytest
import torch
from torch import Tensor

from msbd.load import load_edit_pipeline, load_training_parts
from msbd.loading.parts import load_pasd_nets
from msbd.train.validate import restore_pictures
from tools.evaluate.__main__ import build_parser
from tools.evaluate.methods import pasd_method
from tools.evaluate.restore import Results, bicubic, clip_features, make_pairs, measure

SCENES, START = 8, 2000  # none of those that the README's table is made of


@pytest.fixture(scope="module")
def results() -> Results:
    args = build_parser().parse_args(["restore", "--steps", "10", "--conditioning-scale", "1.5"])
    method = pasd_method(load_training_parts("mini"), "mini-pasd", args)
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
    parts = load_training_parts("mini")
    unet, controlnet = load_pasd_nets("mini-pasd-color")
    pairs = make_pairs(SCENES, start=START)
    clean = torch.cat([pair.clean for pair in pairs])
    grey = clean - chroma(clean)
    context = parts.text_encoder(parts.tokenizer([pair.caption for pair in pairs]))
    noise = torch.randn(SCENES, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    colored = restore_pictures(
        unet.float(), controlnet.float(), parts.vae, grey / 2 + 0.5, context, parts.alphas_cumprod,
        noise=noise, steps=10,
    )  # fmt: skip

    error, without = (chroma(images - clean).square().mean().item() for images in (colored, grey))
    assert error < 0.5 * without
