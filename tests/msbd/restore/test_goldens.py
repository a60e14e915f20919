"""Whole runs of the official PASD pipeline and of diffusers' Stable Diffusion pipelines,
with tiny seeded nets, reproduced.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from msbd.latents import decode
from msbd.pixels.files import to_image
from msbd.restore.config import RestoreConfig
from msbd.restore.pipeline import RestorePipeline
from msbd.solvers import make_timesteps, sample
from nets.controlnet import ControlNet, ControlNetConfig
from nets.pasd_unet import PASDUNet, PASDUNetConfig
from nets.tiled_vae import TiledAutoencoder
from nets.unet import UNet, UNetConfig
from nets.vae import AutoencoderKL, VAEConfig
from samplers.guidance import classifier_free_guidance
from samplers.schedule import StepInfo, make_alphas_cumprod, make_betas
from tests.helpers.goldens import Golden, load_golden, relative_error
from tests.helpers.seeded_nets import Meta, config_of, seeded

ALPHAS = make_alphas_cumprod(make_betas())
SITES = {
    "vae latent_dist.sample": "posterior",
    "vae sample": "posterior",
    "img2img noise": "start",
    "offset_noise": "offset",
}


def weights_of(meta: Meta, net: str) -> Meta:
    """The `weights` of one net; those of PASD's share their shapes with a case of one net alone."""
    weights, shared = meta["weights"], load_golden("pasd", "tiny_a").meta["weights"]
    shapes = (
        weights.get(f"shapes_{net}")
        or first_pipeline()["weights"].get(f"shapes_{net}")
        or shared[f"shapes_{net}"]
    )
    return {"shapes": shapes, "seed": weights[f"seed_{net}"]}


def first_pipeline() -> Meta:
    return load_golden("pasd_pipeline", "pipe_64x64_unipc6").meta


def build(meta: Meta, embeds: Tensor, **parts: Any) -> RestorePipeline:
    """The pipeline of a case; its text states are the stored ones,
    as CLIP's vocabulary is not ours to keep.
    """
    vae = seeded(AutoencoderKL, config_of(VAEConfig, meta["vae_config"]), weights_of(meta, "vae"))

    def encode_text(prompts: list[str]) -> Tensor:
        negative, positive = embeds[0], embeds[-1]  # of a case without guidance there is one
        return torch.stack([positive, negative])

    return RestorePipeline(
        vae=vae,
        tiled_vae=lambda **settings: TiledAutoencoder(vae, **settings),
        tokenizer=lambda prompts: torch.zeros(1),
        text_encoder=lambda ids: encode_text([]),
        alphas_cumprod=ALPHAS,
        **parts,
    )


def stored_noise(golden: Golden, names: dict[str, str]) -> Callable[[str, int, tuple[int, ...]], Tensor]:
    """The stored draws by the site that we draw them at; the first of prepare_latents is "start",
    the second "more".
    """
    sites: dict[str, Tensor] = {}
    for k, drawn in enumerate(golden.meta["noise_draws_in_order"]):
        name = drawn if isinstance(drawn, str) else drawn[0]
        site = names.get(name) or ("start" if "start" not in sites else "more")
        sites[site] = golden[f"noise.{k}"]

    def noise(site: str, step: int, shape: tuple[int, ...]) -> Tensor:
        assert step == 0 and tuple(sites[site].shape) == shape
        return sites.pop(site)

    return noise


def picture(golden: Golden) -> Tensor:
    return to_image(golden["in.image_uint8"].numpy())


def image_of(golden: Golden) -> Tensor:
    """The stored result as we have pictures, (1, 3, H, W) in [-1, 1]."""
    return golden["out.image_float_hwc"].permute(2, 0, 1)[None] * 2 - 1


# Random nets, guided 9 times, magnify rounding up to a hundredfold a step: at the end our own run in float32
# and the same in float64 differ by 2.5e-2, 1.6e-4, below 1e-5 and 6.5e-4, and one thread and two as much. So
# the limit grows with the steps, from 1e-5 for the first two; these are those of the last.
ENDS = {
    "pipe_64x64_unipc6": 0.3,
    "pipe_64x96_purenoise": 3e-3,
    "pipe_ddim_nocfg": 1e-5,
    "pipe_tiled_128x192": 1e-2,
}
MIDDLES = {"out.latents_after_step2": 5e-4, "out.latents_after_step3": 3e-3}  # of six and of five steps


@pytest.mark.parametrize("case", ENDS)
def test_whole_runs_of_the_official_pipeline(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start latent, guidance, tiles with their Gaussian weights, solver and decoding;
    before the cut to 8 bits.
    """
    monkeypatch.setattr("msbd.restore.official.finish", lambda restored, *_: restored)
    latents: list[Tensor] = []

    def spied(*args: Any, on_step: Callable[[Any], None], **kwargs: Any) -> Tensor:
        def seen(info: StepInfo) -> None:
            latents.append(info.x)
            on_step(info)

        return sample(*args, on_step=seen, **kwargs)

    monkeypatch.setattr("msbd.restore.pipeline.sample", spied)
    golden = load_golden("pasd_pipeline", case)
    meta, args = golden.meta, golden.meta["args"]
    pasd = {**meta["unet_config"], "variant": "full"}
    pipe = build(
        meta,
        golden["out.prompt_embeds"],
        unet=seeded(PASDUNet, config_of(PASDUNetConfig, pasd), weights_of(meta, "unet")),
        controlnet=seeded(
            ControlNet,
            config_of(ControlNetConfig, load_golden("pasd", "tiny_a").meta["controlnet_config"]),
            weights_of(meta, "controlnet"),
        ),
    )
    ddim = meta["scheduler"].startswith("ddim")
    image = picture(golden)
    config = RestoreConfig(
        sampler="ddim" if ddim else "unipc",
        spacing="leading" if ddim else "auto",
        final_level="first" if ddim else "clean",
        guidance_scale=meta["guidance_scale"],
        conditioning_scale=meta["conditioning_scale"],
        formulas="official",
        ans="fallback",
        posterior="sample",
        color_fix="none",
        process_size=min(image.shape[-2:]),
        **args,
    )
    result = pipe(
        image,
        output_size=(image.shape[-2], image.shape[-1]),
        config=config,
        noise=stored_noise(golden, SITES),
    )
    assert result.plan.timesteps.tolist() == golden["timesteps"].tolist()
    assert result.plan.evaluations == meta["n_controlnet_calls"]
    for step in (0, 1):
        assert relative_error(latents[step], golden[f"out.latents_after_step{step}"]) <= 1e-5
    for name, limit in MIDDLES.items():
        if name in golden.tensors and int(name[-1]) < len(latents) - 1:
            assert relative_error(latents[int(name[-1])], golden[name]) <= limit
    assert relative_error(latents[-1], golden[f"out.latents_after_step{len(latents) - 1}"]) <= ENDS[case]
    assert relative_error(result.image, image_of(golden)) <= ENDS[case]


def test_image_to_image_of_stable_diffusion() -> None:
    """The baseline img2img is StableDiffusionImg2ImgPipeline's run."""
    golden = load_golden("sd_pipeline", "img2img_ddim10_s06")
    meta = golden.meta
    embeds = torch.cat([golden["out.negative_embeds"], golden["out.prompt_embeds"]])
    unet = seeded(UNet, config_of(UNetConfig, meta["unet_config"]), weights_of(meta, "unet"))
    image = picture(golden)
    config = RestoreConfig(
        method="img2img", sampler="ddim", spacing="leading", final_level="first", posterior="sample", color_fix="none",
        strength=meta["strength"], num_inference_steps=meta["steps"], guidance_scale=meta["guidance_scale"],
        process_size=64,
    )  # fmt: skip
    result = build(meta, embeds, unet=unet)(
        image,
        output_size=(image.shape[-2], image.shape[-1]),
        config=config,
        noise=stored_noise(golden, SITES),
    )
    assert len(result.plan.timesteps) == meta["n_steps_run"]
    assert relative_error(result.image, image_of(golden)) <= 1e-4


@pytest.mark.parametrize("case", ["txt2img_ddim8", "txt2img_pndm10_nonsquare", "txt2img_dpm6_clipskip"])
def test_text_to_image_of_stable_diffusion(case: str) -> None:
    """U-Net, guidance, each solver at Stable Diffusion's own settings, decoder:
    StableDiffusionPipeline's runs.
    """
    golden = load_golden("sd_pipeline", case)
    meta = golden.meta
    unet = seeded(UNet, config_of(UNetConfig, meta["unet_config"]), weights_of(meta, "unet"))
    vae = seeded(AutoencoderKL, config_of(VAEConfig, meta["vae_config"]), weights_of(meta, "vae"))
    denoise = classifier_free_guidance(
        unet, golden["out.prompt_embeds"], golden["out.negative_embeds"], meta["guidance_scale"]
    )
    sampler = {"ddim": "ddim", "pndm": "pndm", "dpm": "dpmpp"}[meta["scheduler"]]
    spacing = "linspace" if sampler == "dpmpp" else "leading"
    timesteps = make_timesteps(sampler, meta["steps"], spacing)
    latents: list[Tensor] = []
    final = 1.0 if sampler == "dpmpp" else float(ALPHAS[0])
    with torch.no_grad():
        z = sample(
            sampler,
            denoise,
            golden["in.latents"],
            timesteps,
            ALPHAS,
            noise=lambda *_: torch.zeros(1),
            final_alpha=final,
            on_step=lambda info: latents.append(info.x),
        )
        image = decode(vae, z)
    assert len(latents) == meta["n_steps_run"]
    for name, reference in golden.tensors.items():
        if name.startswith("out.latents_after_step"):
            assert (
                relative_error(latents[int(name.removeprefix("out.latents_after_step"))], reference) <= 1e-4
            )
    assert relative_error(image, image_of(golden)) <= 1e-4
