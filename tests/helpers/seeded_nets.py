"""The nets of the stored cases: built from a sidecar's config, filled with its seeded weights, frozen."""

import dataclasses
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from nets.clip import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPVisionConfig
from nets.controlnet import ControlNet, ControlNetConfig
from nets.pasd_unet import PASDUNet, PASDUNetConfig
from nets.rrdb import RRDBConfig, RRDBNet
from nets.unet import UNet, UNetConfig
from nets.vae import AutoencoderKL, VAEConfig
from tests.helpers.goldens import load_golden, read_shapes
from tests.helpers.seeded_weights import kind_of, seeded_tensor, shapes_of
from weights.canonical import read_contents
from weights.detect import net_config
from weights.lora import Lora, merge_loras, read_lora

Meta = dict[str, Any]  # a sidecar
C = TypeVar("C")
N = TypeVar("N", bound=nn.Module)


def config_of(config: type[C], reference: Meta) -> C:
    """A config of ours with the fields that a reference's constructor arguments name; lists become tuples."""
    assert dataclasses.is_dataclass(config)
    names = [field.name for field in dataclasses.fields(config) if field.name in reference]
    values = {name: reference[name] for name in names}
    return config(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def seeded_state(weights: Meta) -> dict[str, Tensor]:
    """The weights that a sidecar's `weights` describes, without `position_ids`, which no net of ours has."""
    shapes = weights.get("shapes") or read_shapes(Path(weights["manifest"]).stem)
    names = [name for name in shapes if name.startswith(weights.get("name_prefix", ""))]
    names = [name for name in names if not name.endswith("position_ids")]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # numpy draws without Python's lock
        made = pool.map(lambda name: seeded_tensor(name, shapes[name], weights["seed"]), names)
        state = dict(zip(names, made, strict=True))
    factor = weights.get("then_multiply_weight_and_bias_kinds_by", 1.0)
    for name, tensor in state.items():
        if kind_of(name, tensor.shape) in ("weight", "bias"):
            tensor *= factor
    return state


def filled(net: type[N], config: Any, state: dict[str, Tensor]) -> N:
    """`net(config)`, strictly loaded with these very tensors."""
    with torch.device("meta"):
        built = net(config)
    built.load_state_dict(state, strict=True, assign=True)
    return built.eval().requires_grad_(False)


def seeded(net: type[N], config: Any, weights: Meta) -> N:
    """`net(config)`, strictly loaded with the weights that `weights` describes."""
    return filled(net, config, seeded_state(weights))


def seeded_unet(meta: Meta) -> UNet:
    """The U-Net of a case of the family `unet`."""
    return seeded(UNet, config_of(UNetConfig, meta["config"]), meta["weights"])


def seeded_vae(meta: Meta) -> AutoencoderKL:
    """The autoencoder of a case of the family `vae`."""
    return seeded(AutoencoderKL, config_of(VAEConfig, meta["config"]), meta["weights"])


def seeded_text(meta: Meta) -> CLIPTextModel:
    """The text encoder of a case of the family `clip_text`."""
    return seeded(CLIPTextModel, config_of(CLIPTextConfig, meta["config"]), meta["weights"])


def seeded_clip(meta: Meta) -> CLIPModel:
    """The CLIP of a case of the family `clip_full`."""
    text = config_of(CLIPTextConfig, meta["text_config"])
    vision = config_of(CLIPVisionConfig, meta["vision_config"])
    return seeded(CLIPModel, CLIPConfig(text, vision, meta["text_config"]["projection_dim"]), meta["weights"])


def seeded_rrdb(meta: Meta) -> RRDBNet:
    """The RRDBNet of a case of the family `rrdbnet`."""
    return seeded(RRDBNet, config_of(RRDBConfig, meta["config"]), meta["weights"])


def _from_ldm(net: type[N], config: Any, part: str, weights: Meta, **free: Any) -> N:
    """A net whose weights get LDM's names and come back from weights/; `free` is what no shape tells."""
    tensors = read_contents(seeded_state(weights)).tensors(part)
    family, sizes = net_config(tensors, {"config": json.dumps(free)})
    assert family == part
    return filled(net, config(**sizes), tensors)


def seeded_unet_ldm(meta: Meta) -> UNet:
    """The U-Net of a case of the family `unet_ldm`."""
    return _from_ldm(
        UNet, UNetConfig, "unet", meta["weights"], attention_head_dim=meta["config"]["num_heads"]
    )


def seeded_vae_ldm(meta: Meta) -> AutoencoderKL:
    """The autoencoder of a case of the family `vae_ldm`."""
    return _from_ldm(AutoencoderKL, VAEConfig, "vae", meta["weights"])


def _with_shapes(meta: Meta) -> Meta:
    """The sidecar that has what this one, of PASD, leaves to another case."""
    other = meta["weights"].get("shapes_same_as")
    return load_golden(*other.split("/")).meta if other else meta


def _one_of_pasd(net: str, meta: Meta) -> Meta:
    """The `weights` of the ControlNet or the U-Net, as sidecars of one net have them."""
    weights, shapes = meta["weights"], _with_shapes(meta)["weights"]
    described = {kind: shapes.get(f"{kind}_{net}") for kind in ("shapes", "manifest")}
    factor = weights.get(f"{net}_then_multiply_weight_and_bias_kinds_by", 1.0)
    return {**described, "seed": weights[f"seed_{net}"], "then_multiply_weight_and_bias_kinds_by": factor}


def seeded_controlnet(meta: Meta) -> ControlNet:
    """The ControlNet of a case of the family `pasd` or `pasd_light`."""
    config = config_of(ControlNetConfig, _with_shapes(meta)["controlnet_config"])
    return seeded(ControlNet, config, _one_of_pasd("controlnet", meta))


def seeded_pasd_unet(meta: Meta) -> PASDUNet:
    """The U-Net of a case of the family `pasd` (variant "full") or `pasd_light` ("light")."""
    variant = {"pasd": "full", "pasd_light": "light"}[meta["family"]]
    config = config_of(PASDUNetConfig, {**meta["unet_config"], "variant": variant})
    return seeded(PASDUNet, config, _one_of_pasd("unet", meta))


def seeded_pasd(meta: Meta) -> nn.ModuleList:
    """ControlNet and U-Net."""
    return nn.ModuleList([seeded_controlnet(meta), seeded_pasd_unet(meta)])


def seeded_lora_file(about: Meta) -> Lora:
    """The LoRA that a sidecar's `lora` describes; a number among the shapes is an alpha."""
    state = {}
    for key, value in about["keys_shapes_or_alpha"].items():
        if isinstance(value, list):
            state[key] = about["scale"] * seeded_tensor(key, value, about["seed"])
        else:
            state[key] = torch.tensor(value)
    return read_lora(state)


def seeded_lora(meta: Meta) -> nn.ModuleList:
    """The pairs (U-Net, text encoder) of a case of the family `lora`: plain, then by each multiplier."""
    weights, lora = meta["weights"], seeded_lora_file(meta["lora"])
    configs = config_of(UNetConfig, meta["unet_config"]), config_of(CLIPTextConfig, meta["text_config"])
    with torch.device("meta"):
        shapes = shapes_of(CLIPTextModel(configs[1]))
    base = {
        "unet": seeded_state({"shapes": weights["shapes_unet"], "seed": weights["seed_unet"]}),
        "text_encoder": seeded_state({"shapes": shapes, "seed": weights["seed_text"]}),
    }
    alpha = "ignore" if meta["reference"].startswith("pasd.") else "honour"  # as PASD's code does
    multipliers = meta["multipliers"] if isinstance(meta["multipliers"], list) else [meta["multipliers"]]
    pairs = nn.ModuleList()
    for loras in [[], *([(lora, multiplier)] for multiplier in multipliers)]:
        merged = merge_loras(base, loras, alpha=alpha)
        unet = filled(UNet, configs[0], base["unet"] | merged.get("unet", {}))
        text = filled(CLIPTextModel, configs[1], base["text_encoder"] | merged.get("text_encoder", {}))
        pairs.append(nn.ModuleList([unet, text]))
    return pairs
