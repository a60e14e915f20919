"""Every stored case of the nets in one list, and how far a net is from it anywhere.

For the table (parity_table.py) and the tests on a GPU. To add a family: a builder (sidecar -> net) in
seeded_nets.py, a function (net, case -> outputs by their stored names), the cases in CASES, the net it comes
from in parity_oracles.py where that can be installed; then `make parity-table`.
"""

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.goldens import Golden, load_golden, relative_error
from tests.helpers.seeded_nets import (
    Meta,
    seeded_clip,
    seeded_lora,
    seeded_pasd,
    seeded_rrdb,
    seeded_text,
    seeded_unet,
    seeded_unet_ldm,
    seeded_vae,
    seeded_vae_ldm,
)
from tests.helpers.seeded_weights import seeded_input

TINY, FULL = 1e-5, 1e-4  # float32 on the CPU, relative (DESIGN section 6)
SENSITIVE = 2e-6  # the same, absolute, where weights are so small that a wrong epsilon shows; float32 only
ON_GPU = 10.0  # times as much is allowed to float32 on a GPU, whose algorithms are others
LOW = {torch.bfloat16: 0.04, torch.float16: 0.01}  # relative, on any device


@dataclass(frozen=True)
class Case:
    """One stored case of one net.

    `outputs(net, case)` gives what the case stores, by its name there without `out.`; the rest is ignored.
    """

    family: str  # folder below tests/golden
    name: str
    build: Callable[[Meta], nn.Module]  # the net in float32 on the CPU; several as a ModuleList
    outputs: Callable[[Any, Golden], dict[str, Tensor]]
    tolerance: float  # TINY, FULL or SENSITIVE
    inputs_of: str | None = None  # the case that stores inputs and weights, if another one
    low: Mapping[torch.dtype, float] = field(
        default_factory=lambda: LOW
    )  # a dtype that is missing is not run

    @property
    def label(self) -> str:
        """family/name."""
        return f"{self.family}/{self.name}"

    @property
    def source(self) -> Golden:
        """Where the inputs and the sidecar of the net are stored."""
        return load_golden(self.family, self.inputs_of or self.name)

    @property
    def net(self) -> str:
        """A key that cases with the same net and weights share."""
        meta = self.source.meta
        named = [k for k in meta if "config" in k or k in ("weights", "lora", "multipliers")]
        return json.dumps([self.family, {k: meta[k] for k in named}])

    @property
    def full(self) -> bool:
        """Whether the net has its official size: gigabytes, and half a minute to fill."""
        return self.tolerance == FULL

    def allowed(self, device: str, dtype: torch.dtype) -> float | None:
        """The tolerance there; None where it is not run."""
        if dtype == torch.float32:
            return self.tolerance * (1 if device == "cpu" else ON_GPU)
        return None if self.tolerance == SENSITIVE else self.low.get(dtype)


def moved(net: nn.Module, device: str, dtype: torch.dtype) -> nn.Module:
    """A copy of `net` there. The original stays as it is; a parameter that is there already is shared."""
    there = {id(p): nn.Parameter(p.to(device, dtype), requires_grad=False) for p in net.parameters()}
    return copy.deepcopy(net, there)


@torch.no_grad()
def error_of(case: Case, net: nn.Module, device: str, dtype: torch.dtype) -> float:
    """The largest error of `net`, which is there already, over the case's outputs.

    max|difference| / max|reference|, without the denominator for a SENSITIVE case.
    """
    stored, source = load_golden(case.family, case.name), case.source
    inputs = {
        name: a.to(device, dtype if a.is_floating_point() else None) for name, a in source.tensors.items()
    }
    errors = []
    for name, out in case.outputs(net, Golden(inputs, source.meta)).items():
        key = next((key for key in (f"out.{name}", name) if stored.has(key)), None)
        if key is not None:
            out, reference = stored.sampled(key, out)
            scale = reference.abs().max().item() if case.tolerance == SENSITIVE else 1.0
            errors.append(relative_error(out, reference) * scale)
    return max(errors)


def unet_outputs(net: Any, case: Golden) -> dict[str, Tensor]:
    """With a ControlNet's residuals too, where the case describes some."""
    x, t, context = case["in.x"], case["in.t"], case["in.context"]
    out = {"eps": net(x, t, context)}
    if shapes := case.meta.get("intermediate", {}).get("residual_shapes"):
        down = [seeded_input(f"tiny_b.res{i}", s, 11, 0.5).to(x) for i, s in enumerate(shapes["down"])]
        control = SimpleNamespace(down=down, mid=seeded_input("tiny_b.resmid", shapes["mid"], 11, 0.5).to(x))
        out["eps_with_residuals"] = net(x, t, context, control)
    return out


def vae_outputs(net: Any, case: Golden) -> dict[str, Tensor]:
    """Both halves."""
    latents = net.encode(case["in.image"])
    out = {"mean": latents.mean, "logvar": latents.logvar, "decoded": net.decode(case["in.latent"])}
    return {**out, "sample": latents.sample(case["in.noise"])} if "in.noise" in case.tensors else out


def in_float64(
    outputs: Callable[[Any, Golden], dict[str, Tensor]],
) -> Callable[[Any, Golden], dict[str, Tensor]]:
    """The same outputs, under the names of the reference's float64 run."""
    return lambda net, case: {f"{name}_float64": out for name, out in outputs(net, case).items()}


def text_outputs(net: Any, case: Golden) -> dict[str, Tensor]:
    """States, pooled state, and states with the last layer left out."""
    ids = case["in.ids"]
    return {"last_hidden_state": net(ids), "pooled": net.pooled(ids), "penultimate_ln": net(ids, clip_skip=1)}


def clip_outputs(net: Any, case: Golden) -> dict[str, Tensor]:
    """Everything from states to logits; the full case names the preprocessed pictures that it takes."""
    pixels = case.tensors.get("in.pixel_values")
    if pixels is None:
        stored = [
            load_golden(*name.split("/"))["out.pixel_values"] for name in case.meta["pixel_values_from"]
        ]
        pixels = torch.cat(stored).to(net.logit_scale)
    image, text = net.encode_image(pixels), net.encode_text(case["in.ids"])
    image_normed, text_normed = F.normalize(image), F.normalize(text)
    return {
        "image_features": image,
        "text_features": text,
        "image_embeds_normed": image_normed,
        "text_embeds_normed": text_normed,
        "cosine": image_normed @ text_normed.T,
        "logits_per_image": net.logit_scale.exp() * image_normed @ text_normed.T,
        "vision_pooled": net.vision_model.pooled(pixels),
        "vision_last_hidden_slice": net.vision_model(pixels)[:, :8],
    }


def rrdb_outputs(net: Any, case: Golden) -> dict[str, Tensor]:
    """The enlarged picture."""
    return {"y": net(case["in.x"])}


def pasd_outputs(nets: Any, case: Golden) -> dict[str, Tensor]:
    """eps at each conditioning scale, toRGB heads, samples of the hint and of the residuals at scale 1."""
    controlnet, unet = nets
    x, t, context, image = (case[f"in.{name}"] for name in ("x", "t", "context", "cond"))
    out, parts = {}, {"cond_embedding": controlnet.embed(image)}
    for scale in case.meta.get("conditioning_scales", [1.0]):
        control = controlnet(x, t, context, image, scale)
        out[f"eps_s{scale}"] = unet(x, t, context, control)
        if scale == 1.0:
            out["eps"] = out["eps_s1.0"]
            out |= {f"rgb{i}": rgb for i, rgb in enumerate(control.to_rgbs)}
            parts |= {f"down{i}": residual for i, residual in enumerate(control.down)} | {"mid": control.mid}
    strides = {name: of["stride"] for name, of in case.meta.get("intermediate", {}).items() if name in parts}
    return out | {f"mid.{k}.strided": parts[k].flatten()[::stride][:2048] for k, stride in strides.items()}


def lora_outputs(nets: Any, case: Golden) -> dict[str, Tensor]:
    """eps and text states of the pairs (U-Net, text encoder), plain and merged."""
    given = case.meta["multipliers"]
    merged = [f"merged_{multiplier}" for multiplier in given] if isinstance(given, list) else ["merged"]
    out = {}
    for name, (unet, text) in zip(["base", *merged], nets, strict=True):
        out[f"eps_{name}"] = unet(case["in.x"], case["in.t"], case["in.context"])
        out[f"text_{name}"] = text(case["in.ids"])
    return out


def _unet(name: str, tolerance: float) -> Case:
    return Case("unet", name, seeded_unet, unet_outputs, tolerance)


def _vae(name: str, tolerance: float) -> Case:
    return Case("vae", name, seeded_vae, vae_outputs, tolerance, low=VAE_LOW)


def _text(name: str, tolerance: float) -> Case:
    return Case("clip_text", name, seeded_text, text_outputs, tolerance)


def _clip(name: str, tolerance: float) -> Case:
    return Case("clip_full", name, seeded_clip, clip_outputs, tolerance, low=CLIP_LOW)


def _rrdb(name: str, tolerance: float) -> Case:
    return Case("rrdbnet", name, seeded_rrdb, rrdb_outputs, tolerance)


def _pasd(family: str, name: str, tolerance: float) -> Case:
    return Case(family, name, seeded_pasd, pasd_outputs, tolerance, low=PASD_LOW[family])


def _lora(name: str) -> Case:
    return Case("lora", name, seeded_lora, lora_outputs, TINY)


VAE_LOW = {torch.bfloat16: 0.04}  # the autoencoder never runs in float16 (DESIGN section 4)
# The cosine of two random embeddings is small beside what it sums: transformers' own bfloat16 is 0.051 away.
CLIP_LOW = {torch.bfloat16: 0.1, torch.float16: 0.02}
# Two nets, one after the other, and a transformer more after each layer of the way up: tiny_rrdb is 0.043 in
# bfloat16, 0.020 in float32 with weights rounded to bfloat16, 0.0043 in float16.
PASD_LOW = {"pasd": {torch.bfloat16: 0.06, torch.float16: 0.01}, "pasd_light": LOW}

PASD = (("tiny_a", TINY), ("tiny_rrdb", TINY), ("tiny_eps_sensitive", SENSITIVE), ("full_16x16_t21", FULL))

# Cases with the same net stand together: it is built once.
CASES = [
    _unet("tiny_a", TINY),
    _unet("tiny_b", TINY),
    _unet("tiny_linear_proj", TINY),
    _unet("tiny_odd_size", TINY),
    _unet("tiny_eps_sensitive", SENSITIVE),
    _unet("full_16x16_t1", FULL),
    _unet("full_24x16_t500", FULL),
    _unet("full_16x16_t981", FULL),
    Case(
        "unet", "full_16x16_t981_float64", seeded_unet, in_float64(unet_outputs), FULL, "full_16x16_t981"
    ),
    Case("unet_ldm", "ldm_tiny_a", seeded_unet_ldm, unet_outputs, TINY),
    Case("unet_ldm", "ldm_full_16x16_t981", seeded_unet_ldm, unet_outputs, FULL),
    _vae("tiny_a", TINY),
    _vae("tiny_b", TINY),
    _vae("tiny_eps_sensitive", SENSITIVE),
    _vae("full_96x64", FULL),
    _vae("full_odd_70x62", FULL),
    _vae("full_64x64", FULL),
    Case("vae", "full_64x64_float64", seeded_vae, in_float64(vae_outputs), FULL, "full_64x64", VAE_LOW),
    Case("vae_ldm", "ldm_tiny", seeded_vae_ldm, vae_outputs, TINY, low=VAE_LOW),
    Case("vae_ldm", "ldm_full_64x64", seeded_vae_ldm, vae_outputs, FULL, low=VAE_LOW),
    _text("tiny_quick_gelu", TINY),
    _text("tiny_eps_sensitive", SENSITIVE),
    _text("full_vitl14", FULL),
    _clip("tiny", TINY),
    _clip("vitl14_a", FULL),
    _rrdb("tiny_x2", TINY),
    _rrdb("tiny_x4", TINY),
    _rrdb("full_x2plus_24x20", FULL),
    _rrdb("full_x4plus_24x20", FULL),
    *(
        _pasd(family, name, tolerance)
        for family in ("pasd", "pasd_light")
        for name, tolerance in PASD
    ),
    _lora("diffusers_kohya_r4"),
    _lora("diffusers_kohya_r4_conv3"),
    _lora("pasd_convert_lora_r4"),
]  # fmt: skip
