"""Which network a state dict belongs to, from its keys, and that network's sizes, from its shapes.

Tensors  {canonical key: tensor} -> family, and keyword arguments of that family's config class (nets/*.py) as
         a plain dict
Weights  canonical layouts: diffusers U-Net and VAE, Hugging Face CLIP, basicsr RRDB; others are named and
         refused in one line
Copying  this file, fields.py, files.py (for WeightsError), merge.py and pickles.py; torch and safetensors
         through them
"""

import json
import re
from collections.abc import Mapping
from itertools import pairwise
from math import isqrt
from typing import Any

from torch import Tensor

from .fields import FREE_FIELDS, read_fields
from .files import WeightsError
from .merge import is_pasd_key

State = Mapping[str, Tensor]

# Keys that only this family has, all of them needed. What has more comes before what has a part of it: CLIP
# before its halves.
FAMILIES = {
    "controlnet": ("controlnet_cond_embedding.conv_in.weight", "controlnet_down_blocks.0.weight", "conv_in.weight"),
    "unet": ("conv_in.weight", "time_embedding.linear_1.weight", "up_blocks.0.resnets.0.conv1.weight"),
    "asymmetric_vae": ("decoder.condition_encoder.layers.0.weight", "encoder.conv_in.weight", "decoder.conv_in.weight"),
    "tiny_vae": ("encoder.layers.0.weight", "decoder.layers.0.weight", "encoder.layers.1.conv.0.weight"),
    "vae": ("encoder.conv_in.weight", "decoder.conv_in.weight", "encoder.down_blocks.0.resnets.0.conv1.weight"),
    "clip": ("text_projection.weight", "visual_projection.weight", "text_model.embeddings.token_embedding.weight"),
    "clip_text": ("text_model.embeddings.token_embedding.weight",),
    "clip_vision": ("vision_model.embeddings.patch_embedding.weight",),
    "rrdb": ("conv_first.weight", "body.0.rdb1.conv1.weight"),
    "srvgg": ("body.0.weight", "body.1.weight", "body.2.weight"),
}  # fmt: skip

# Whose tables a net may find its own in, in a config of several nets.
_TABLES = {"clip_text": ("text_encoder", "text"), "clip_vision": ("vision",), "pasd_unet": ("unet",)}

_NO_PIPELINE = "no pipeline here runs it; use a Stable Diffusion 1.x model"
_OPENAI = "CLIP in OpenAI's layout; use the Hugging Face layout (openai/clip-vit-large-patch14)"
_NO_ADAPTER = "nothing here applies it; leave it out"
_NO_CONTROLNET = "nothing here applies it; take the ControlNet's whole file"
_WIDER = "take its file in float16"
_EMBEDDING = "a textual inversion embedding, not a model; give it with --embedding"

# Part of a key ("\n" marks its beginning) -> what it gives away, and the way out. The first that is found
# counts.
FOREIGN = (
    ("\nstring_to_param", _EMBEDDING),
    ("\nemb_params", _EMBEDDING),
    ("\n<", _EMBEDDING),
    # what is added to a model
    ("\nimage_proj.", f"an IP-Adapter; {_NO_ADAPTER}"),
    ("\nip_adapter.", f"an IP-Adapter; {_NO_ADAPTER}"),
    (".to_k_ip.", f"a U-Net with an IP-Adapter in it; {_NO_PIPELINE}"),
    ("\nadapter.body.", f"a T2I-Adapter; {_NO_ADAPTER}"),
    ("\nadapter.conv_in.", f"a T2I-Adapter; {_NO_ADAPTER}"),
    ("\nbody.0.block1.", f"a T2I-Adapter; {_NO_ADAPTER}"),
    ("\nbody.0.in_conv.", f"a T2I-Adapter; {_NO_ADAPTER}"),
    ("\nlora_controlnet", f"a ControlNet as a LoRA (Control-LoRA); {_NO_CONTROLNET}"),
    ("\nlllite_", f"a ControlNet-LLLite; {_NO_CONTROLNET}"),
    ("\ndifference", f"a ControlNet as the difference to its U-Net (\"transfer control\"); {_NO_CONTROLNET}"),
    ("\nctrl_midblock.", f"a ControlNet-XS; {_NO_CONTROLNET}"),
    ("\ncontrol_add_embedding.", f"a ControlNet of several tasks (union) for SDXL; {_NO_CONTROLNET}"),
    ("\nbrushnet_", f"BrushNet; {_NO_ADAPTER}"),
    ("\nposition_net.", f"a U-Net of GLIGEN; {_NO_PIPELINE}"),
    (".fuser.attn.", f"a U-Net of GLIGEN; {_NO_PIPELINE}"),
    ("motion_modules.", f"AnimateDiff's motion modules; {_NO_PIPELINE}"),
    # transformers in place of a U-Net
    ("token_refiner.", f"HunyuanVideo; {_NO_PIPELINE}"),
    ("mlp_t5.", f"Hunyuan-DiT; {_NO_PIPELINE}"),
    ("joint_blocks.", f"Stable Diffusion 3; {_NO_PIPELINE}"),
    ("distilled_guidance_layer.", f"Chroma; {_NO_PIPELINE}"),
    ("double_stream_blocks.", f"HiDream; {_NO_PIPELINE}"),
    ("double_blocks.", f"FLUX; {_NO_PIPELINE}"),
    ("single_transformer_blocks.", f"FLUX; {_NO_PIPELINE}"),
    ("transformer_blocks.0.img_mod.", f"Qwen-Image; {_NO_PIPELINE}"),
    ("transformer_blocks.0.attn.add_q_proj.", f"Stable Diffusion 3; {_NO_PIPELINE}"),
    ("patchify_proj.", f"LTX-Video; {_NO_PIPELINE}"),
    ("adaln_single.", f"PixArt; {_NO_PIPELINE}"),
    ("y_embedder.y_proj.", f"PixArt; {_NO_PIPELINE}"),
    ("y_embedder.embedding_table.", f"a DiT of ImageNet's classes; {_NO_PIPELINE}"),
    ("time_projection.1.", f"Wan; {_NO_PIPELINE}"),
    ("condition_embedder.time_proj", f"Wan; {_NO_PIPELINE}"),
    ("double_layers.", f"AuraFlow; {_NO_PIPELINE}"),
    ("cap_embedder.", f"Lumina or Z-Image; {_NO_PIPELINE}"),
    ("patch_embed.text_proj.", f"CogVideoX; {_NO_PIPELINE}"),
    ("t5_y_embedder.", f"Mochi; {_NO_PIPELINE}"),
    ("attention_y_norm.", f"Sana; {_NO_PIPELINE}"),
    ("clip_txt_mapper.", f"Stable Cascade; {_NO_PIPELINE}"),
    ("clip_txt_pooled_mapper.", f"Stable Cascade; {_NO_PIPELINE}"),
    # other U-Nets
    (".temporal_transformer_blocks.", f"a video model (Stable Video Diffusion); {_NO_PIPELINE}"),
    (".time_stack.", f"a video model (Stable Video Diffusion); {_NO_PIPELINE}"),
    (".temp_convs.", f"a video model (ModelScope, ZeroScope); {_NO_PIPELINE}"),
    (".temopral_conv.", f"a video model (ModelScope, ZeroScope); {_NO_PIPELINE}"),  # sic
    ("\nlow_scale_model.", f"Stable Diffusion's x4 upscaler; {_NO_PIPELINE}"),
    ("\nnoise_augmentor.", f"Stable unCLIP; {_NO_PIPELINE}"),
    ("\ndepth_model.", f"a depth-to-image model of Stable Diffusion 2; {_NO_PIPELINE}"),
    ("\ncc_projection.", f"Zero123, which turns an object round; {_NO_PIPELINE}"),
    ("\nconditioner.embedders.", f"an SDXL single file; {_NO_PIPELINE}"),
    ("\nadd_embedding.linear_1.", f"an SDXL U-Net; {_NO_PIPELINE}"),
    ("\nadd_embedding.", f"a U-Net with add_embedding, as Kandinsky's and DeepFloyd IF's; {_NO_PIPELINE}"),
    (".add_k_proj.", f"a U-Net with added keys, as Kandinsky's and DeepFloyd IF's; {_NO_PIPELINE}"),
    ("\nencoder_hid_proj.", f"a U-Net with encoder_hid_dim, as Kandinsky's and DeepFloyd IF's; {_NO_PIPELINE}"),
    ("diffusion_model.label_emb.", f"an SDXL single file; {_NO_PIPELINE}"),
    ("\ncond_stage_model.model.", f"a Stable Diffusion 2.x single file; {_NO_PIPELINE}"),
    # parts of other models
    ("encoder.block.0.layer.0.SelfAttention.", "a T5 text encoder; Stable Diffusion 1.x has CLIP ViT-L/14 in its place"),
    ("\nlayers.0.self_attn.", "a language model; Stable Diffusion 1.x has CLIP ViT-L/14 in its place"),
    ("\nmodel.layers.0.self_attn.", "a language model; Stable Diffusion 1.x has CLIP ViT-L/14 in its place"),
    ("idx_pred_layer.", "CodeFormer, which repairs faces; use RealESRGAN_x4plus or a model of PASD's"),
    ("\nstylegan_decoder", "GFPGAN, which repairs faces; use RealESRGAN_x4plus or a model of PASD's"),
    ("decoder.middle.0.residual.", f"an autoencoder for video; {_NO_PIPELINE}"),
    (".resnets.0.conv1.conv.weight", f"an autoencoder for video; {_NO_PIPELINE}"),
    ("\nencoder.project_in.", f"a DC-AE autoencoder (Sana); {_NO_PIPELINE}"),
    # training, and fewer bits
    (".exp_avg", "the state of an optimizer, not weights; take the model's file beside it"),
    (".quant_state.bitsandbytes", f"a model in 4 bits (bitsandbytes); {_WIDER}"),
    (".SCB", f"a model in 8 bits (bitsandbytes); {_WIDER}"),
    (".qweight", f"a model in 4 or 8 bits (GPTQ, AWQ, SVDQuant); {_WIDER}"),
    (".weight_scale_2", f"a model in 4 bits (NVFP4); {_WIDER}"),
    ("\ntransformer.resblocks.", _OPENAI),
    ("\nvisual.transformer.resblocks.", _OPENAI),
    ("\ndecoder.encoder.layers.", "Asymmetric VQGAN in its authors' layout; use asymmetric-vae-x-1-5 or -x-2, the diffusers files"),
    ("\nquantize.embedding.", f"a VQ autoencoder; {_NO_PIPELINE}"),
)  # fmt: skip


def refuse_foreign(state: State, source: object = "the state dict") -> None:
    """WeightsError, beginning with `source`, for a model that is known but that nothing here runs; in any
    layout.
    """
    keys = "\n" + "\n".join(state)
    for mark, what in FOREIGN:
        if mark in keys:
            raise WeightsError(f"{source}: {what}")
    alone = [t for key, t in state.items() if t.ndim in (1, 2) and not key.endswith((".weight", ".bias"))]
    if len(alone) == len(state) == 1 and alone[0].shape[-1] in (768, 1024):
        raise WeightsError(f"{source}: {_EMBEDDING}")
    context = next((state[key] for key in state if key.endswith(".attn2.to_k.weight")), None)
    if context is not None and context.shape[-1:] in ((1024,), (2048,)):
        family = {1024: "Stable Diffusion 2.x", 2048: "SDXL"}[context.shape[-1]]
        net = (
            "ControlNet" if any(mark in keys for mark in ("\ncontrolnet_", "input_hint_block.")) else "U-Net"
        )
        raise WeightsError(f"{source}: a {net} of {family}; {_NO_PIPELINE}")


# Input channels of a U-Net that takes more than the latent -> what else.
_MORE_CHANNELS = {
    5: "a depth map (depth-to-image)", 7: "a small picture (x4 upscaler)", 8: "a picture (instruct-pix2pix, Zero123)",
}  # fmt: skip


def refuse_channels(state: State, source: object = "the state dict") -> None:
    """WeightsError, beginning with `source`, for a U-Net that takes something else beside the latent; in
    LDM's layout and in diffusers'.
    """
    if "controlnet_cond_embedding.conv_in.weight" in state:
        return
    for key, tensor in state.items():
        of_unet = key == "conv_in.weight" or key.endswith("input_blocks.0.0.weight")
        if of_unet and tensor.ndim == 4 and (more := _MORE_CHANNELS.get(tensor.shape[1])):
            raise WeightsError(
                f"{source}: a U-Net of {tensor.shape[1]} input channels, the latent's and those of {more}; {_NO_PIPELINE}"
            )


def detect_family(state: State, source: object = "the state dict") -> str:
    """One of FAMILIES, or "pasd_unet", from canonical keys. WeightsError, beginning with `source`, for
    anything else.
    """
    refuse_foreign(state, source)
    for family, needed in FAMILIES.items():
        if all(key in state for key in needed):
            added = family == "unet" and any(map(is_pasd_key, state))
            return "pasd_unet" if added else family
    first = f", first {min(state)[:80]!r}" if state else ""
    raise WeightsError(
        f"{source}: no family known here ({len(state):,} keys{first}); expected one of {', '.join(FAMILIES)}"
    )


def net_config(
    state: State,
    metadata: Mapping[str, str] | None = None,
    source: object = "the state dict",
    beside: Mapping[str, Any] | None = None,
) -> tuple[str, dict[str, Any]]:
    """Family, and the keyword arguments of its config class: sizes from shapes, the rest from
    `metadata["config"]`.

    What that leaves open comes from `beside`, the content of a config.json; its sizes are not looked at,
    since such a file may be another net's (PASD's are). For "clip" the arguments are {"text": {...},
    "vision": {...}, "projection_dim": n}. Fields that nothing tells are left out. Raises WeightsError where
    the family is not one of ours, a key is missing that the sizes hang on, or the metadata contradicts the
    shapes.
    """
    family = detect_family(state, source)
    try:
        sizes = _SIZES[family](state)
        _check_blocks(state, sizes)
        # PASD's nets are changed ones of diffusers, with fields of their own.
        strangers = family == "pasd_unet" or sizes.get("to_rgb", False)
        said = _free(family, beside or {}, strangers=strangers) | table_of(
            stored_config(metadata), *_TABLES.get(family, (family,))
        )
        return family, _complete(family, sizes, said)
    except WeightsError as error:
        raise WeightsError(f"{source}: {error}") from None


def _check_blocks(state: State, sizes: Mapping[str, Any]) -> None:
    """WeightsError where there are too few tensors for the blocks: building a net of made-up sizes would fill
    the memory.
    """
    levels, layers = len(sizes.get("block_out_channels", ())), sizes.get("layers_per_block", 0)
    depths = sizes.get("transformer_layers_per_block", 1)
    # A residual block has 8 tensors.
    needed = 8 * layers * (sum(depths) if isinstance(depths, tuple) else levels * depths)
    for way in ("down", "up"):
        widths = sizes.get(f"{way}_block_out_channels", ())
        needed = max(needed, 8 * len(widths) * sizes.get(f"layers_per_{way}_block", 0))
    for half in (sizes, sizes.get("text", {}), sizes.get("vision", {})):
        # A layer of CLIP has 16 tensors, a block of RRDBNet 30.
        needed = max(needed, 16 * half.get("num_hidden_layers", 0), 16 * half.get("num_block", 0))
    needed = max(needed, 3 * sizes.get("num_conv", 0))  # of SRVGGNet, a convolution and its PReLU
    if needed > len(state):
        raise WeightsError(
            f"{len(state):,} tensors, too few for its layers; the file is incomplete or of another kind"
        )


def _free(family: str, config: Mapping[str, Any], *, strangers: bool = False) -> dict[str, Any]:
    """What a config.json says that no shape tells. WeightsError for what no net here computes."""
    halves = {}
    if "attention_head_dim" in FREE_FIELDS[family] and config.get("num_attention_heads") is not None:
        config = {**config, "attention_head_dim": config["num_attention_heads"]}  # which goes before it there
    if family.startswith("clip_"):
        config = table_of(config, f"{family.removeprefix('clip_')}_config")
    if family == "clip":
        for half in ("text", "vision"):
            inner = config.get(f"{half}_config")
            halves[half] = _free(f"clip_{half}", inner if isinstance(inner, Mapping) else {})
    return read_fields(family, _with_tuples(dict(config)), strangers=strangers) | halves


def table_of(config: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """A net's own table in a config of several nets, under the first of `names` that is there; else all of
    it.
    """
    return dict(next((config[name] for name in names if isinstance(config.get(name), dict)), config))


def stored_config(metadata: Mapping[str, str] | None) -> dict[str, Any]:
    """The JSON table under `config` in the metadata, lists as tuples; {} if there is none.

    Holds what shapes cannot tell, of the net (heads, groups, ...) and of its training (prediction_type,
    betas, native size, ...).
    """
    text = (metadata or {}).get("config", "{}")
    try:
        config = _with_tuples(json.loads(text))
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise WeightsError(f"the metadata's config is not a JSON table, it begins {text[:40]!r}")
    return config


def _with_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_tuples(inner) for key, inner in value.items()}
    return tuple(_with_tuples(inner) for inner in value) if isinstance(value, list) else value


def _complete(family: str, sizes: dict[str, Any], stored: dict[str, Any]) -> dict[str, Any]:
    """`sizes` and the free fields that `stored` has; what else it has is not the net's business
    (stored_config gives it).
    """
    complete = sizes | read_fields(family, stored, strangers=True)
    for name, value in stored.items():
        if name in ("text", "vision") and family == "clip" and isinstance(value, dict):
            complete[name] = _complete(f"clip_{name}", sizes[name], value)
        elif (
            name in sizes and name not in FREE_FIELDS[family] and _per_level(value) != _per_level(sizes[name])
        ):
            raise WeightsError(
                f"the metadata says {name} = {value!r:.60}, the tensors say {sizes[name]!r:.60}"
            )
    return complete


def _per_level(value: Any) -> Any:
    """One value for all levels and that value for each level are the same configuration."""
    same = isinstance(value, tuple) and value and all(each == value[0] for each in value)
    return value[0] if same else value


def _shape(state: State, key: str, ndim: int) -> tuple[int, ...]:
    if key not in state:
        raise WeightsError(f"{key!r} is missing; the file is incomplete or of another kind")
    shape = tuple(state[key].shape)
    if len(shape) != ndim or 0 in shape:
        raise WeightsError(f"{key!r} has shape {shape}, expected {ndim} axes, none empty")
    return shape


def _count(state: State, template: str, first: int = 0) -> int:
    """How many of `template`, with {} = first, first + 1, ..., are keys, up to the first that is not."""
    count = 0
    while template.format(first + count) in state:
        count += 1
    return count


def _encoder_sizes(state: State) -> dict[str, Any]:
    """Of what U-Net and ControlNet share: the way down and the middle."""
    first = "down_blocks.{}.resnets.0.conv1.weight"
    _shape(state, first.format(0), 4)  # at least one level
    levels = range(_count(state, first))
    places = [f"down_blocks.{i}.attentions.0" for i in levels]
    mid = "mid_block.attentions.0"
    present = [place for place in (*places, mid) if f"{place}.proj_in.weight" in state]
    sizes: dict[str, Any] = {
        "in_channels": _shape(state, "conv_in.weight", 4)[1],
        "block_out_channels": tuple(_shape(state, first.format(i), 4)[0] for i in levels),
        "layers_per_block": _count(state, "down_blocks.0.resnets.{}.conv1.weight"),
        "transformer_layers_per_block": _depths(state, [[place] for place in places]),
        "down_block_types": tuple(
            "CrossAttnDownBlock2D" if place in present else "DownBlock2D" for place in places
        ),
        "mid_block_type": "UNetMidBlock2DCrossAttn" if mid in present else "UNetMidBlock2D",
    }
    return sizes | _attention_sizes(state, present)


def _unet_sizes(state: State) -> dict[str, Any]:
    sizes = _encoder_sizes(state)
    if "time_embedding.cond_proj.weight" in state:
        sizes["time_cond_proj_dim"] = _shape(state, "time_embedding.cond_proj.weight", 2)[1]
    levels = range(len(sizes["block_out_channels"]))
    ups = [f"up_blocks.{levels[-1] - i}.attentions.0" for i in levels]  # fine to coarse
    present = [place for place in ups if f"{place}.proj_in.weight" in state]
    sizes |= {
        "out_channels": _shape(state, "conv_out.weight", 4)[0],
        "transformer_layers_per_block": _depths(
            state, [[f"down_blocks.{i}.attentions.0", ups[i]] for i in levels]
        ),
        "up_block_types": tuple(
            "CrossAttnUpBlock2D" if place in present else "UpBlock2D" for place in reversed(ups)
        ),
    }
    return _attention_sizes(state, present) | sizes


def _pasd_sizes(state: State) -> dict[str, Any]:
    keys = "\n".join(state)
    variant = (
        "full"
        if ".pixel_attentions.0.transformer_blocks." in keys
        else "light"
        if ".attn2_plus." in keys
        else "eq2"
    )
    return _unet_sizes(state) | {"variant": variant}


def _controlnet_sizes(state: State) -> dict[str, Any]:
    sizes = _encoder_sizes(state)
    picture = "controlnet_cond_embedding."
    width, channels, _, _ = _shape(state, picture + "conv_in.weight", 4)
    # Of the pairs of convolutions the second halves, and widens to the next entry.
    halvings = range(1, _count(state, picture + "blocks.{}.weight"), 2)
    widths = [_shape(state, f"{picture}blocks.{i}.weight", 4)[0] for i in halvings]
    up = {"CrossAttnDownBlock2D": "CrossAttnUpBlock2D", "DownBlock2D": "UpBlock2D"}
    return sizes | {
        "up_block_types": tuple(up[kind] for kind in reversed(sizes["down_block_types"])),
        "conditioning_channels": channels,
        "conditioning_embedding_out_channels": (width, *widths),
        "use_rrdb": any(key.startswith(picture + "preprocesser.") for key in state),
        "to_rgb": any(key.startswith(picture + "to_rgbs.") for key in state),
    }


def _depths(state: State, places: list[list[str]]) -> Any:
    """Blocks per transformer of each level, one number where all are alike; the coarsest level's may stand in
    the middle alone.
    """
    places[-1].append("mid_block.attentions.0")
    depths = [
        max(_count(state, place + ".transformer_blocks.{}.norm1.weight") for place in level) or 1
        for level in places
    ]
    return _per_level(tuple(depths))


def _attention_sizes(state: State, places: list[str]) -> dict[str, Any]:
    if not places:
        return {}
    context = _shape(state, f"{places[0]}.transformer_blocks.0.attn2.to_k.weight", 2)
    linear = state[f"{places[0]}.proj_in.weight"].ndim == 2
    return {"cross_attention_dim": context[1], "use_linear_projection": linear}


def _vae_sizes(state: State) -> dict[str, Any]:
    first = "encoder.down_blocks.{}.resnets.0.conv1.weight"
    levels = range(_count(state, first))
    if not {"quant_conv.weight", "post_quant_conv.weight"} & state.keys():
        raise WeightsError(
            f"an autoencoder of {_shape(state, 'decoder.conv_in.weight', 4)[1]} latent channels without quant_conv, as those of "
            f"Stable Diffusion 3 and FLUX; {_NO_PIPELINE}"
        )
    return {
        "in_channels": _shape(state, "encoder.conv_in.weight", 4)[1],
        "out_channels": _shape(state, "decoder.conv_out.weight", 4)[0],
        "block_out_channels": tuple(_shape(state, first.format(i), 4)[0] for i in levels),
        "layers_per_block": _count(state, "encoder.down_blocks.0.resnets.{}.conv1.weight"),
        "latent_channels": _shape(state, "decoder.conv_in.weight", 4)[1],
        "mid_attention": any(key.startswith("encoder.mid_block.attentions.") for key in state),
    }


def _tiny_vae_sizes(state: State) -> dict[str, Any]:
    blocks = {}
    for half in ("encoder", "decoder"):
        found = [re.match(rf"{half}\.layers\.(\d{{1,3}})\.(conv\.0\.)?weight", key) for key in state]
        # Convolutions by themselves are the ends and what changes the size; what stands between are blocks.
        kinds = [kind for _, kind in sorted((int(one[1]), bool(one[2])) for one in found if one)]
        places = [place for place, is_block in enumerate(kinds) if not is_block]
        blocks[f"{half}_blocks"] = tuple(b - a - 1 for a, b in pairwise(places))
    width, channels, _, _ = _shape(state, "encoder.layers.0.weight", 4)
    last = max(int(key.split(".")[2]) for key in state if key.startswith("decoder.layers."))
    return {
        "in_channels": channels,
        "out_channels": _shape(state, f"decoder.layers.{last}.weight", 4)[0],
        "latent_channels": _shape(state, "decoder.layers.0.weight", 4)[1],
        "width": width,
        **blocks,
    }


def _asymmetric_vae_sizes(state: State) -> dict[str, Any]:
    sizes = _vae_sizes(state)
    first = "decoder.up_blocks.{}.resnets.0.conv1.weight"
    _shape(state, first.format(0), 4)  # at least one level
    levels = range(_count(state, first))
    return {
        "down_block_out_channels": sizes.pop("block_out_channels"),
        "layers_per_down_block": sizes.pop("layers_per_block"),
        "up_block_out_channels": tuple(_shape(state, first.format(i), 4)[0] for i in reversed(levels)),
        # The decoder has one more than its config says.
        "layers_per_up_block": _count(state, "decoder.up_blocks.0.resnets.{}.conv1.weight") - 1,
        **sizes,
    }


def _transformer_sizes(state: State, half: str) -> dict[str, Any]:
    layers = half + ".encoder.layers.{}.mlp.fc1.weight"
    intermediate, width = _shape(state, layers.format(0), 2)
    return {
        "hidden_size": width,
        "intermediate_size": intermediate,
        "num_hidden_layers": _count(state, layers),
        # 64 channels a head in every CLIP of the paper (appendix F).
        "num_attention_heads": max(1, width // 64),
    }


def _clip_text_sizes(state: State) -> dict[str, Any]:
    return _transformer_sizes(state, "text_model") | {
        "vocab_size": _shape(state, "text_model.embeddings.token_embedding.weight", 2)[0],
        "max_position_embeddings": _shape(state, "text_model.embeddings.position_embedding.weight", 2)[0],
    }


def _clip_vision_sizes(state: State) -> dict[str, Any]:
    _, channels, patch, _ = _shape(state, "vision_model.embeddings.patch_embedding.weight", 4)
    positions, _ = _shape(state, "vision_model.embeddings.position_embedding.weight", 2)
    side = isqrt(positions - 1)  # one position is the class token's
    return _transformer_sizes(state, "vision_model") | {
        "image_size": side * patch,
        "patch_size": patch,
        "num_channels": channels,
    }


def _clip_sizes(state: State) -> dict[str, Any]:
    return {
        "text": _clip_text_sizes(state),
        "vision": _clip_vision_sizes(state),
        "projection_dim": _shape(state, "text_projection.weight", 2)[0],
    }


def _rrdb_sizes(state: State) -> dict[str, Any]:
    width, folded, _, _ = _shape(state, "conv_first.weight", 4)
    channels = _shape(state, "conv_last.weight", 4)[0]
    doublings = _count(state, "conv_up{}.weight", 1)
    # Real-ESRGAN's scales 2 and 1 fold 2 x 2 and 4 x 4 pixels into channels first.
    block = {4 * channels: 2, 16 * channels: 4}.get(folded, 1)
    if doublings > 4 or 2**doublings < block:
        raise WeightsError(f"an RRDBNet with {doublings} doublings of size; expected scale 1, 2, 4, 8 or 16")
    scale = 2**doublings // block
    sizes: dict[str, Any] = {
        "num_in_ch": folded // block**2,
        "num_out_ch": channels,
        "scale": scale,
        "num_feat": width,
        "num_block": _count(state, "body.{}.rdb1.conv1.weight"),
        "num_grow_ch": _shape(state, "body.0.rdb1.conv1.weight", 4)[0],
    }
    if block != {2: 2, 1: 4}.get(scale, 1):
        sizes["unshuffle"] = block
    return sizes | ({"plus": True} if "body.0.rdb1.conv1x1.weight" in state else {})


def _srvgg_sizes(state: State) -> dict[str, Any]:
    width, channels, _, _ = _shape(state, "body.0.weight", 4)
    layers = [int(key.split(".")[1]) for key in state if re.fullmatch(r"body\.\d{1,4}\.weight", key)]
    last = max(layers)
    spread = _shape(state, f"body.{last}.weight", 4)[0]
    if "body.1.weight" not in state:
        raise WeightsError("a compact Real-ESRGAN without weights of an activation; only PReLU is read")
    for made in (channels, 3):
        scale = isqrt(spread // made)
        if made * scale**2 == spread:
            return {
                "num_in_ch": channels,
                "num_out_ch": made,
                "num_feat": width,
                "num_conv": max(last // 2 - 1, 0),
                "upscale": scale,
            }
    raise WeightsError(
        f"a compact Real-ESRGAN whose last convolution gives {spread} channels, which no scale does"
    )


_SIZES = {
    "controlnet": _controlnet_sizes,
    "unet": _unet_sizes,
    "pasd_unet": _pasd_sizes,
    "asymmetric_vae": _asymmetric_vae_sizes,
    "tiny_vae": _tiny_vae_sizes,
    "vae": _vae_sizes,
    "clip": _clip_sizes,
    "clip_text": _clip_text_sizes,
    "clip_vision": _clip_vision_sizes,
    "rrdb": _rrdb_sizes,
    "srvgg": _srvgg_sizes,
}
