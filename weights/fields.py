"""What a net's configuration may say besides sizes: fields that are followed, fields that change nothing, and
fields of which only one value is computed here.

Reads    config.json beside a net (diffusers 0.2 to 0.42, transformers), and the table in a file's own
         metadata; both as tables that json.load gives, lists as tuples
Copying  this file, files.py (for WeightsError) and pickles.py; torch and safetensors through them
"""

from collections.abc import Callable, Mapping
from typing import Any

from .files import WeightsError

_ACTIVATIONS = ("silu", "swish", "gelu", "mish", "relu")
_ACTIVATION = f"activation ({', '.join(_ACTIVATIONS)})"
_CHANNELS = "order of channels (rgb, bgr)"
_KINDS: dict[str, Callable[[Any], bool]] = {
    "count": lambda value: type(value) is int and 1 <= value < 2**31,
    "count or one per level": lambda value: all(map(_KINDS["count"], value if isinstance(value, tuple) else (value,))),
    "index": lambda value: type(value) is int and 0 <= value < 2**31,
    "padding (0, 1)": lambda value: type(value) is int and value in (0, 1),
    "number above 0": lambda value: type(value) in (int, float) and 0 < value < 1e30,
    "number": lambda value: type(value) in (int, float) and abs(value) < 1e30,
    "flag": lambda value: type(value) is bool,
    "name": lambda value: type(value) is str,
    _ACTIVATION: lambda value: type(value) is str and value.lower() in _ACTIVATIONS,
    _CHANNELS: lambda value: value in ("rgb", "bgr"),
}  # fmt: skip

# ---- family -> the fields that are followed, and what kind of value each has -------------------------------

# No shape tells them. What nothing says is as in the net's config class (SD 1.x, ViT-L/14).
_ENCODER = {
    "attention_head_dim": "count or one per level", "norm_num_groups": "count", "norm_eps": "number above 0", "flip_sin_to_cos": "flag",
    "freq_shift": "index", "addition_time_embed_dim": "count", "act_fn": _ACTIVATION, "downsample_padding": "padding (0, 1)",
    "mid_block_scale_factor": "number above 0", "timestep_post_act": _ACTIVATION, "time_embedding_act_fn": _ACTIVATION,
}  # fmt: skip
_UNET = _ENCODER | {"center_input_sample": "flag"}
_VAE = {"norm_num_groups": "count", "scaling_factor": "number above 0", "act_fn": _ACTIVATION}
_CLIP = {"num_attention_heads": "count", "hidden_act": "name", "layer_norm_eps": "number above 0"}
FREE_FIELDS: dict[str, dict[str, str]] = {
    "unet": _UNET, "pasd_unet": _UNET,
    "controlnet": _ENCODER | {"controlnet_conditioning_channel_order": _CHANNELS},
    "vae": _VAE | {"shift_factor": "number"}, "asymmetric_vae": _VAE | {"condition_layers": "count"},
    "clip": {},
    "clip_text": _CLIP | {"eos_token_id": "index"},
    "clip_vision": _CLIP,
    "rrdb": {},
    "srvgg": {},
    "tiny_vae": {"scaling_factor": "number above 0"},
}  # fmt: skip

# ---- fields of which a net here has one value: that, or what says as little (null, false, "", []) ----------

_ONLY_ENCODER = {
    "only_cross_attention": False, "encoder_hid_dim": None, "encoder_hid_dim_type": None,
    "class_embed_type": None, "num_class_embeds": None, "resnet_time_scale_shift": "default",
}  # fmt: skip
_ONLY_UNET = _ONLY_ENCODER | {
    "dual_cross_attention": False, "mid_block_only_cross_attention": None, "cross_attention_norm": None, "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0, "time_embedding_type": "positional", "conv_in_kernel": 3, "conv_out_kernel": 3,
    "attention_type": "default", "class_embeddings_concat": False, "reverse_transformer_layers_per_block": None,
}  # fmt: skip
_ONLY_VAE = {"latents_mean": None, "latents_std": None, "use_quant_conv": True, "use_post_quant_conv": True}
ONLY_FIELDS: dict[str, dict[str, Any]] = {
    "unet": _ONLY_UNET, "pasd_unet": _ONLY_UNET,
    "controlnet": _ONLY_ENCODER | {"global_pool_conditions": False},
    "tiny_vae": {
        "act_fn": "relu", "upsample_fn": "nearest", "upsampling_scaling_factor": 2, "latent_magnitude": 3, "latent_shift": 0.5,
        "shift_factor": 0.0,
    },
    "vae": _ONLY_VAE, "asymmetric_vae": _ONLY_VAE | {"shift_factor": 0.0},
}  # fmt: skip

# ---- fields that are passed over ---------------------------------------------------------------------------

# What the tensors' shapes and names tell, of whichever family: a config.json is not asked for it. But for
# num_attention_heads, which is CLIP's too, and which detect.py reads.
_TOLD = {
    "in_channels", "out_channels", "block_out_channels", "layers_per_block", "cross_attention_dim", "transformer_layers_per_block",
    "num_attention_heads", "down_block_types", "mid_block_type", "up_block_types", "use_linear_projection", "addition_embed_type", "addition_embed_type_num_heads",
    "projection_class_embeddings_input_dim", "time_embedding_dim", "time_cond_proj_dim", "conditioning_channels",
    "conditioning_embedding_out_channels", "use_rrdb", "to_rgb", "return_rgbs", "variant", "zero_init", "latent_channels",
    "mid_attention", "mid_block_add_attention", "down_block_out_channels", "up_block_out_channels", "layers_per_down_block",
    "layers_per_up_block", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings",
    "image_size", "patch_size", "num_channels", "projection_dim", "num_in_ch", "num_out_ch", "num_feat", "num_block", "num_grow_ch", "scale",
    "unshuffle", "plus", "num_conv", "upscale", "width", "encoder_blocks", "decoder_blocks", "encoder_block_out_channels",
    "decoder_block_out_channels", "num_encoder_blocks", "num_decoder_blocks",
}  # fmt: skip
# What changes nothing in inference: of training (dropout, moving averages of diffusers' EMAModel), of
# precision (upcast_attention, force_upcast: this code decides that itself), of programs that wrote the file.
# The size of the pictures is read by settings.py.
_IDLE = {
    "dropout", "decay", "min_decay", "inv_gamma", "power", "optimization_step", "update_after_step", "use_ema_warmup", "min_value",
    "upcast_attention", "force_upcast", "sample_size", "dtype", "torch_dtype", "model_type", "architectures", "transformers_version",
}  # fmt: skip
# Families whose config.json is looked at in full. Those of transformers have a hundred fields of generation,
# training and classification, whose names change with each version: of them only FREE_FIELDS are.
_CHECKED = ("unet", "pasd_unet", "controlnet", "vae", "asymmetric_vae", "tiny_vae")
# Those that this file says something of. A single file's config.json speaks of several nets.
KNOWN_FIELDS = frozenset(_TOLD | _IDLE).union(*FREE_FIELDS.values(), *ONLY_FIELDS.values())


def read_fields(family: str, config: Mapping[str, Any], *, strangers: bool = False) -> dict[str, Any]:
    """The fields of `config` that a net of `family` follows, checked; null is left out.

    With `strangers`, a field that nobody here knows is passed over; else it is refused, unless its value says
    nothing (null, false, "", []). WeightsError, one line that names field and value, for one that asks for
    what no net here computes, and for a value of another kind.
    """
    free, only = FREE_FIELDS[family], ONLY_FIELDS.get(family, {})
    checked = family in _CHECKED and not strangers
    found = {}
    for name, value in config.items():
        if name in free:
            if value is not None:
                found[name] = _checked(name, value, free[name])
        elif name in only:
            _check_only(name, value, only[name])
        elif checked and not (name in KNOWN_FIELDS or name.startswith("_") or _says_nothing(value)):
            raise WeightsError(
                f"configured for {name!r:.60} = {value!r:.60}, a field that is not known here; take it out of config.json if "
                "it changes nothing"
            )
    return found


def _checked(name: str, value: Any, kind: str) -> Any:
    if not _KINDS[kind](value):
        article = "an" if kind[0] in "aeio" else "a"
        raise WeightsError(f"configured for {name} = {value!r:.60}, expected {article} {kind}")
    return value.lower() if kind == _ACTIVATION else value


def _check_only(name: str, value: Any, only: Any) -> None:
    for each in value if isinstance(value, tuple | list) else (value,):  # one for all levels, or for each
        same = each == only and isinstance(each, bool) == isinstance(only, bool)
        if not same and (only is True or not _says_nothing(each)):
            raise WeightsError(
                f"configured for {name} = {value!r:.60}, which no net here computes; expected {only!r}, as in Stable Diffusion 1.x"
            )


def _says_nothing(value: Any) -> bool:
    return value is None or value is False or value in ("", (), [], {})
