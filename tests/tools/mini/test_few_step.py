"""The few-step LoRA: consistency distillation is what it says, and what is shipped samples in four steps."""

from pathlib import Path
from typing import Any

import pytest
import torch

from msbd.latents import decode
from msbd.load import load_edit_pipeline
from msbd.loading.nets import read_lora_file
from msbd.pixels.metrics import sharpness
from msbd.pixels.preprocess import clip_pixels
from msbd.train.base import LowRankChange
from samplers.lcm import lcm_sample, lcm_timesteps
from tools.mini import few_step
from tools.mini.few_step import FewStepPart, with_changes, write_few_step_lora
from tools.mini.figures import distinct_scenes
from tools.mini.train import train


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> FewStepPart:
    """The recipe on four latents of either size, in batches of two."""
    latents = {"mini-latents": torch.randn(2, 4, 4, 16, 16).half().numpy(),
               "mini-stage-latents": torch.randn(2, 4, 4, 24, 24).half().numpy()}  # fmt: skip

    class Captions:
        captions = ["a red ball", "a blue house on snow", "a green tree", "a white tent at night"]

    monkeypatch.setattr(few_step, "encoded", lambda name, pictures, vae: latents[name])
    monkeypatch.setattr(few_step, "training_pictures", Captions)
    monkeypatch.setattr(few_step, "stage_pictures", Captions)
    monkeypatch.setattr(few_step.FewStepPart, "recipe", few_step.Recipe(2, 2, 1e-3, bfloat16=False))
    monkeypatch.setattr(few_step.FewStepPart, "stage_batch", 2)
    return FewStepPart()


def test_the_target_is_the_nets_own_view_one_step_further_on(
    part: FewStepPart, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where all is one clean latent, both views are it, whatever the timestep, and the loss is 0."""
    monkeypatch.setattr(FewStepPart, "_clean", lambda self, x, t, a_t, context: torch.zeros_like(x))
    loss, _ = part.loss(torch.Generator().manual_seed(1))
    assert loss == 0


def test_at_the_first_timestep_the_target_is_the_clean_latent(part: FewStepPart) -> None:
    """f(x, 0) = x, the boundary condition."""
    x = torch.randn(3, 4, 16, 16)
    context = part.text(part.tokenizer(["a red ball"])).expand(3, -1, -1)
    clean = part._clean(x, torch.zeros(3, dtype=torch.long), torch.ones(3), context)
    torch.testing.assert_close(clean, x)


def test_only_the_changes_are_trained_and_they_start_at_nothing(part: FewStepPart) -> None:
    trained = [name for name, p in part.net.named_parameters() if p.requires_grad]
    assert trained and all(".parametrizations.weight.0." in name for name in trained)
    x, t = torch.randn(1, 4, 16, 16), torch.tensor(499)
    context = part.text(part.tokenizer(["a red ball"]))
    torch.testing.assert_close(part.net(x, t, context), part.teacher(x, t, context), rtol=1e-4, atol=1e-5)


def test_what_is_written_makes_the_trained_net(
    part: FewStepPart, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MSBD_RUNS", str(tmp_path))
    net: Any = train(part, device=torch.device("cpu"))
    for module in net.modules():
        if isinstance(module, LowRankChange):  # as far from nothing as float16 can hold well
            module.up.copy_(torch.randn(module.up.shape, generator=torch.Generator().manual_seed(3)) / 64)
    monkeypatch.setattr(few_step, "trained", lambda part, device: net)
    write_few_step_lora(tmp_path / "lora.safetensors")
    merged = load_edit_pipeline("mini", loras=[(read_lora_file(tmp_path / "lora.safetensors"), 1.0)]).unet
    x, t = torch.randn(1, 4, 16, 16), torch.tensor(499)
    context = part.text(part.tokenizer(["a red ball"]))
    torch.testing.assert_close(merged(x, t, context), net(x, t, context), rtol=0, atol=0.02)


def test_layers_narrower_than_the_rank_are_left_alone(part: FewStepPart) -> None:
    assert not hasattr(part.net.conv_out, "parametrizations")  # 4 channels
    assert hasattr(part.net.mid_block.resnets[0].conv1, "parametrizations")
    assert with_changes is few_step.with_changes


@torch.no_grad()
def test_the_shipped_lora_draws_in_few_steps() -> None:
    """In one step CLIP knows what was asked, and in four the pictures are sharp; without it neither is so."""
    captions = [scene.caption for scene in distinct_scenes(16)]
    noise = torch.randn(16, 4, 16, 16, generator=torch.Generator().manual_seed(0))

    def drawn(loras: Any, steps: int) -> tuple[float, float]:
        """Mean cosine of picture and caption, and sharpness."""
        pipe = load_edit_pipeline("mini", loras=loras)
        context = pipe.text_encoder(pipe.tokenizer(captions))
        latents = lcm_sample(
            lambda x, t: pipe.unet(x, t, context), noise, lcm_timesteps(steps), pipe.alphas_cumprod,
            generator=torch.Generator().manual_seed(1),
        )  # fmt: skip
        images = decode(pipe.vae, latents)
        seen = pipe.clip.encode_image(clip_pixels(images, **pipe.clip_preprocessing))
        asked = pipe.clip.encode_text(pipe.clip_tokenizer(captions))
        return torch.cosine_similarity(seen, asked).mean().item(), sharpness(images).mean().item()

    few_step = [(read_lora_file("mini-few-step"), 1.0)]
    assert drawn(few_step, 1)[0] > drawn([], 1)[0] + 0.1  # 0.77 and 0.50, of 48
    assert drawn(few_step, 4)[1] > 1.25 * drawn([], 4)[1]  # 3.06 and 2.06; DDIM in 50 steps: 3.20
