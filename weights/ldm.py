"""The layout of CompVis's latent diffusion code: one file with U-Net, autoencoder and text encoder under
prefixes.

Paper    Rombach et al. 2022, arXiv:2112.10752; its names are those of every SD 1.x file that is not a
         diffusers folder
Tensors  {LDM key: tensor} <-> {canonical key: tensor}; 1x1 convolutions of the autoencoder's attention <->
         linear layers
Copying  this file and keymap.py; torch
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized

from torch import Tensor

from .keymap import KeyMap, count, expand, within

# Part -> the prefixes of its keys in an LDM file, the usual one first; "" where the file holds nothing else.
PREFIXES = {
    "unet": ("model.diffusion_model.", "diffusion_model.", ""),
    "vae": ("first_stage_model.", ""),
    "text_encoder": ("cond_stage_model.transformer.",),
    "controlnet": ("control_model.", ""),
}
# Part -> keys of which it has one at least.
_MARKS = {
    "unet": ("input_blocks.0.0.weight",),
    "vae": ("encoder.down.0.block.0.norm1.weight",),
    "text_encoder": ("embeddings.token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
    "controlnet": ("input_hint_block.0.weight", "zero_convs.0.0.weight"),
}

# What lies beside the nets and is no part of them: the noise schedule, the moving average's counters,
# training's losses, and what other programs save along (older ComfyUI the first two of the last line, which
# belong to other text encoders).
IGNORED = re.compile(
    r"(betas|(sqrt_|log_)?(one_minus_|recip_|recipm1_)?alphas_cumprod(_prev)?|posterior_\w+|lvlb_weights|logvar|scale_factor"
    r"|model_ema\..+|(.*\.)?position_ids|(.*\.)?loss\..+"
    r"|cond_stage_model\.(logit_scale|(transformer\.)?text_projection(\.weight)?)|denoiser\.sigmas|embedding_manager\..+)"
)  # fmt: skip

# ---- the maps, as data: (LDM, canonical) -------------------------------------------------------------------

_RESNET = (
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("emb_layers.1", "time_emb_proj"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("skip_connection", "conv_shortcut"),
)
_UNET_ENDS = (("out.0", "conv_norm_out"), ("out.2", "conv_out"))
# What a ControlNet has too.
_ENCODER_ENDS = (
    ("time_embed.0", "time_embedding.linear_1"),
    ("time_embed.2", "time_embedding.linear_2"),
    ("input_blocks.0.0", "conv_in"),
    *within(("middle_block.0", "mid_block.resnets.0"), _RESNET),
    ("middle_block.1", "mid_block.attentions.0"),
    *within(("middle_block.2", "mid_block.resnets.1"), _RESNET),
)
# n counts LDM's flat lists of blocks; level i and layer j are diffusers'.
_UNET_DOWN = (
    *within(("input_blocks.{n}.0", "down_blocks.{i}.resnets.{j}"), _RESNET),
    ("input_blocks.{n}.1", "down_blocks.{i}.attentions.{j}"),
)
_UNET_HALVING = (("input_blocks.{n}.0.op", "down_blocks.{i}.downsamplers.0.conv"),)
_UNET_UP = within(("output_blocks.{n}.0", "up_blocks.{i}.resnets.{j}"), _RESNET)
_UNET_UP_ATTENTION = (("output_blocks.{n}.1", "up_blocks.{i}.attentions.{j}"),)
# An enlargement follows the attention where there is one.
_UNET_DOUBLING = (("output_blocks.{n}.{m}.conv", "up_blocks.{i}.upsamplers.0.conv"),)


def unet_map(levels: int, layers: int, up_attention: Sequence[bool]) -> KeyMap:
    """The U-Net of `levels` resolutions and `layers` residual blocks each; `up_attention`: has it attention
    on the way up, coarse to fine?
    """
    step = layers + 1  # blocks per level on the way up: one residual block more than on the way down
    up = [{"n": step * i + j, "i": i, "j": j} for i in range(levels) for j in range(step)]
    attention = [place for place in up if up_attention[place["i"]]]
    doubling = [{"n": step * i + layers, "m": 1 + up_attention[i], "i": i} for i in range(levels - 1)]
    return KeyMap(
        (
            *_encoder_pairs(levels, layers),
            *_UNET_ENDS,
            *expand(_UNET_UP, up),
            *expand(_UNET_UP_ATTENTION, attention),
            *expand(_UNET_DOUBLING, doubling),
        )
    )


def _encoder_pairs(levels: int, layers: int) -> Iterator[tuple[str, str]]:
    """The way down and the middle, which U-Net and ControlNet share."""
    step = layers + 1  # blocks per level: the residual ones and a halving
    yield from _ENCODER_ENDS
    yield from expand(
        _UNET_DOWN, ({"n": 1 + step * i + j, "i": i, "j": j} for i in range(levels) for j in range(layers))
    )
    yield from expand(_UNET_HALVING, ({"n": step * (i + 1), "i": i} for i in range(levels - 1)))


_HINT = "controlnet_cond_embedding."


def controlnet_map(levels: int, layers: int, convolutions: int) -> KeyMap:
    """The ControlNet on such a U-Net whose encoder of the picture has so many `convolutions`.

    Zhang et al. 2023, arXiv:2302.05543: the names of its authors' code, where an activation follows each
    convolution of the picture's encoder but the last.
    """
    inner = ({"n": 2 * (i + 1), "i": i} for i in range(convolutions - 2))
    return KeyMap(
        (
            *_encoder_pairs(levels, layers),
            *expand(
                (("zero_convs.{n}.0", "controlnet_down_blocks.{n}"),),
                ({"n": n} for n in range((layers + 1) * levels)),
            ),
            ("middle_block_out.0", "controlnet_mid_block"),
            ("input_hint_block.0", _HINT + "conv_in"),
            *expand((("input_hint_block.{n}", _HINT + "blocks.{i}"),), inner),
            (f"input_hint_block.{2 * (convolutions - 1)}", _HINT + "conv_out"),
        )
    )


_VAE_HALF = (
    ("{half}.conv_in", "{half}.conv_in"),
    ("{half}.conv_out", "{half}.conv_out"),
    ("{half}.norm_out", "{half}.conv_norm_out"),
    ("{half}.mid.block_1", "{half}.mid_block.resnets.0"),
    ("{half}.mid.block_2", "{half}.mid_block.resnets.1"),
    ("{half}.mid.attn_1.norm", "{half}.mid_block.attentions.0.group_norm"),
)
_VAE_ATTENTION = (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0"))
_VAE_BLOCK = (
    ("norm1", "norm1"),
    ("conv1", "conv1"),
    ("norm2", "norm2"),
    ("conv2", "conv2"),
    ("nin_shortcut", "conv_shortcut"),
)
# The decoder's levels are counted from the finest here (k) and from the coarsest there (i).
_VAE_DOWN = within(("encoder.down.{i}.block.{j}", "encoder.down_blocks.{i}.resnets.{j}"), _VAE_BLOCK)
_VAE_UP = within(("decoder.up.{k}.block.{j}", "decoder.up_blocks.{i}.resnets.{j}"), _VAE_BLOCK)
_VAE_HALVING = (("encoder.down.{i}.downsample.conv", "encoder.down_blocks.{i}.downsamplers.0.conv"),)
_VAE_DOUBLING = (("decoder.up.{k}.upsample.conv", "decoder.up_blocks.{i}.upsamplers.0.conv"),)


def vae_map(levels: int, layers: int, *, mixed: bool = False) -> KeyMap:
    """The autoencoder of `levels` resolutions and `layers` residual blocks each in the encoder.

    `mixed`: its attention has the names that diffusers' own converter left in such files (diffusers issue
    4790).
    """
    attention = [
        (f"{half}.mid.attn_1.{ours if mixed else theirs}", f"{half}.mid_block.attentions.0.{ours}")
        for half in ("encoder", "decoder")
        for theirs, ours in _VAE_ATTENTION
    ]
    halves = [
        (theirs.format(half=half), ours.format(half=half))
        for half in ("encoder", "decoder")
        for theirs, ours in _VAE_HALF
    ]
    down = [{"i": i, "j": j} for i in range(levels) for j in range(layers)]
    up = [{"k": levels - 1 - i, "i": i, "j": j} for i in range(levels) for j in range(layers + 1)]
    return KeyMap(
        (
            ("quant_conv", "quant_conv"),
            ("post_quant_conv", "post_quant_conv"),
            *halves,
            *attention,
            *expand(_VAE_DOWN, down),
            *expand(_VAE_HALVING, ({"i": i} for i in range(levels - 1))),
            *expand(_VAE_UP, up),
            *expand(_VAE_DOUBLING, ({"k": levels - 1 - i, "i": i} for i in range(levels - 1))),
        )
    )


# ---- reading -----------------------------------------------------------------------------------------------


def find_parts(keys: Iterable[str]) -> dict[str, str]:
    """Part -> prefix of its keys, for the parts that a file with these keys has in LDM's layout; {} if it has
    another.
    """
    keys = set(keys)
    found = {}
    for part, prefixes in PREFIXES.items():
        for prefix in prefixes:
            if part == "unet" and any(prefix + mark in keys for mark in _MARKS["controlnet"]):
                continue  # a ControlNet begins as its U-Net does
            if any(prefix + mark in keys for mark in _MARKS[part]):
                found.setdefault(part, prefix)
    return found


def map_of(part: str, keys: Iterable[str]) -> KeyMap:
    """The map of "unet", "vae" or "controlnet" for a net with these LDM keys (without prefix), of any number
    of levels and layers.
    """
    keys = set(keys)
    if part == "vae":
        levels = count(keys, "encoder.down.{}.")
        layers = _layers(levels, count(keys, "encoder.down.0.block.{}."), keys)
        return vae_map(levels, layers, mixed="encoder.mid.attn_1.to_q.weight" in keys)
    blocks = count(keys, "input_blocks.{}.")  # conv_in, per level its layers, between levels a halving
    levels = 1 + sum(key.endswith(".op.weight") for key in keys)
    layers = max(blocks // levels - 1, 0)
    if part == "controlnet":
        return controlnet_map(levels, layers, max(count(keys, "input_hint_block.{}.", step=2), 2))
    attention = [f"output_blocks.{i * (layers + 1)}.1.norm.weight" in keys for i in range(levels)]
    return unet_map(levels, layers, attention)


def map_to(part: str, keys: Iterable[str]) -> KeyMap:
    """The map of "unet", "vae" or "controlnet" for a net with these canonical keys, to be used backwards."""
    keys = set(keys)
    if part == "vae":
        levels = count(keys, "encoder.down_blocks.{}.")
        return vae_map(levels, _layers(levels, count(keys, "encoder.down_blocks.0.resnets.{}."), keys))
    levels = count(keys, "down_blocks.{}.")
    layers = _layers(levels, count(keys, "down_blocks.0.resnets.{}."), keys)
    if part == "controlnet":
        return controlnet_map(levels, layers, 2 + count(keys, _HINT + "blocks.{}."))
    attention = [f"up_blocks.{i}.attentions.0.norm.weight" in keys for i in range(levels)]
    return unet_map(levels, layers, attention)


def _layers(levels: int, found: int, keys: Sized) -> int:
    """`found` layers, but no more blocks than there are keys: a file that only claims sizes shall not fill
    the memory.
    """
    return min(found, len(keys) // max(levels, 1))


def ema_name(key: str) -> str:
    """Where the moving average of `key` ("model.diffusion_model....") lies: without its dots, as LDM
    registers it.
    """
    return "model_ema." + key.removeprefix("model.").replace(".", "")


def linear(key: str, tensor: Tensor) -> Tensor:
    """The autoencoder's attention weights (C, C, 1, 1) as (C, C), a view; other tensors as they are. `key` is
    canonical.
    """
    if ".mid_block.attentions." in key and tensor.ndim == 4 and tensor.shape[2:] == (1, 1):
        return tensor[:, :, 0, 0]
    return tensor


def to_ldm(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """One LDM file of canonical "unet", "vae", "text_encoder" and "controlnet": the way back, for tools that
    read nothing else.

    Raises ValueError for a part or key that the layout has no name for.
    """
    state: dict[str, Tensor] = {}
    for part, tensors in parts.items():
        if part not in PREFIXES:
            raise ValueError(f"{part}: LDM's layout has no place for it; expected {', '.join(PREFIXES)}")
        renamed = dict(zip(tensors, tensors, strict=True))
        if part != "text_encoder":
            coverage = map_to(part, tensors).back(tensors)
            if coverage.unknown:
                raise ValueError(f"{part}: LDM's layout has no name for {coverage.unknown[0]!r}")
            renamed = coverage.renamed
        for key, name in renamed.items():
            tensor = tensors[key]
            if ".attn_1." in name and tensor.ndim == 2:
                tensor = tensor[:, :, None, None]
            state[PREFIXES[part][0] + name] = tensor
    return state
