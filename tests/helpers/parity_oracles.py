"""The libraries of the extra `parity` that stored cases came from, behind our nets' interfaces.

Each class takes a sidecar and our net of the case, whose weights it gets. There is none for the code of LDM,
PASD and peft; spandrel stands for basicsr, and knows num_grow_ch 32 alone.
"""

import importlib
import importlib.util
from collections.abc import Callable
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tests.helpers.parity_cases import Case
from tests.helpers.seeded_nets import Meta


def has_oracle(case: Case) -> bool:
    """Whether a library, installed or not, can run the case again."""
    known = case.family != "rrdbnet" or case.source.meta["config"]["num_grow_ch"] == 32
    return known and case.family in ORACLES


def are_installed() -> bool:
    """Whether all the libraries can be imported; they are not."""
    return all(importlib.util.find_spec(library) for library, _ in ORACLES.values())


def versions() -> str:
    """The libraries and their versions, in one line."""
    return ", ".join(
        f"{name} {version(name)}" for name in sorted({library for library, _ in ORACLES.values()})
    )


def oracle_of(case: Case, net: nn.Module) -> nn.Module:
    """The library's net with `net`'s weights, in float32 on the CPU; it may share their memory."""
    return ORACLES[case.family][1](case.source.meta, net).eval().requires_grad_(False)


class _UNet(nn.Module):
    """diffusers.UNet2DConditionModel as nets.unet.UNet."""

    def __init__(self, meta: Meta, net: nn.Module) -> None:
        super().__init__()
        diffusers = importlib.import_module("diffusers")
        with torch.device("meta"):
            self.net: Any = diffusers.UNet2DConditionModel(**meta["config"])
        self.net.load_state_dict(net.state_dict(), strict=True, assign=True)

    def forward(self, x: Tensor, t: Tensor, context: Tensor, control: Any = None) -> Tensor:
        down, mid = (control.down, control.mid) if control is not None else (None, None)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        return self.net(x, t, context, **residuals).sample


class _VAE(nn.Module):
    """diffusers.AutoencoderKL as nets.vae.AutoencoderKL."""

    def __init__(self, meta: Meta, net: nn.Module) -> None:
        super().__init__()
        diffusers = importlib.import_module("diffusers")
        with torch.device("meta"):
            self.net: Any = diffusers.AutoencoderKL(**meta["config"])
        self.net.load_state_dict(net.state_dict(), strict=True, assign=True)

    def encode(self, image: Tensor) -> Any:
        found = self.net.encode(image).latent_dist
        return SimpleNamespace(
            mean=found.mean, logvar=found.logvar, sample=lambda noise: found.mean + found.std * noise
        )

    def decode(self, latent: Tensor) -> Tensor:
        return self.net.decode(latent).sample


class _Text(nn.Module):
    """transformers.CLIPTextModel as nets.clip.CLIPTextModel."""

    def __init__(self, meta: Meta, net: Any) -> None:
        super().__init__()
        transformers = importlib.import_module("transformers")
        self.net: Any = transformers.CLIPTextModel(transformers.CLIPTextConfig(**meta["config"]))
        self.net.load_state_dict(net.text_model.state_dict(), strict=True)

    def forward(self, ids: Tensor, clip_skip: int = 0) -> Tensor:
        states = self.net(ids, output_hidden_states=True)
        if not clip_skip:
            return states.last_hidden_state
        return self.net.final_layer_norm(states.hidden_states[-1 - clip_skip])

    def pooled(self, ids: Tensor) -> Tensor:
        return self.net(ids).pooler_output


class _CLIP(nn.Module):
    """transformers.CLIPModel as nets.clip.CLIPModel."""

    def __init__(self, meta: Meta, net: nn.Module) -> None:
        super().__init__()
        transformers = importlib.import_module("transformers")
        text, vision = meta["text_config"], meta["vision_config"]
        width = text["projection_dim"]
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=width)
        self.net: Any = transformers.CLIPModel(config)
        self.net.load_state_dict(net.state_dict(), strict=True)
        self.logit_scale, self.vision_model = self.net.logit_scale, _Vision(self.net.vision_model)

    def encode_image(self, pixels: Tensor) -> Tensor:
        return self.net.visual_projection(self.vision_model.pooled(pixels))

    def encode_text(self, ids: Tensor) -> Tensor:
        return self.net.text_projection(self.net.text_model(ids).pooler_output)


class _Vision(nn.Module):
    """transformers.CLIPVisionModel as nets.clip.VisionTransformer."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    def forward(self, pixels: Tensor) -> Tensor:
        return self.net(pixels).last_hidden_state

    def pooled(self, pixels: Tensor) -> Tensor:
        return self.net(pixels).pooler_output


def _rrdb(_meta: Meta, net: nn.Module) -> nn.Module:
    """spandrel's RRDBNet, which is called as ours."""
    loader = importlib.import_module("spandrel").ModelLoader()
    return loader.load_from_state_dict({"params_ema": net.state_dict()}).model


# Family -> library, and its net's class here.
ORACLES: dict[str, tuple[str, Callable[[Meta, nn.Module], nn.Module]]] = {
    "unet": ("diffusers", _UNet),
    "vae": ("diffusers", _VAE),
    "clip_text": ("transformers", _Text),
    "clip_full": ("transformers", _CLIP),
    "rrdbnet": ("spandrel", _rrdb),
}
