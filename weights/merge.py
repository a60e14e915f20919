"""Whole state dicts put together: two models blended, PASD's tensors told from its base's, or what a net has
over another kept as a file of its own.

Paper    Yang et al. 2023, arXiv:2308.14469 (PASD), section 3.5: another base under what PASD adds
Tensors  {key: tensor} on the CPU; results may share tensors with what they were made of, which are never
         written to
Weights  canonical (diffusers) names; in a delta file the U-Net's added tensors after "unet.", the ControlNet
         after "controlnet."; in a difference file the net's own
Copying  this file, files.py (for WeightsError) and pickles.py; torch, safetensors through them
"""

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from .files import WeightsError

State = Mapping[str, Tensor]

# Parts of the keys that PASD adds to a U-Net: the first in the full model, the others in the light one.
PASD_KEYS = (".pixel_attentions.", ".norm2_plus.", ".attn2_plus.", ".proj_in_plus.")
UNET, CONTROLNET = "unet.", "controlnet."  # the two halves of a delta file
CONDITION = "decoder.condition_encoder."  # what a mask-conditioned decoder has over a plain one


def blend(base: State, other: State, weight: float) -> dict[str, Tensor]:
    """(1 - weight) * base + weight * other, `weight` from 0 to 1: PASD's `blending_alpha`, `other` the
    personal model.

    Computed in float32 (float64 for a float64 base), one tensor at a time, in base's dtype; 0 gives base
    itself and 1 gives `other`. Raises WeightsError where the two have not the same keys and shapes.
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"the blending weight is {weight}: expected 0 (the base) to 1 (the other model)")
    _require_layout(other, base, "the model to blend in")
    return {key: _mix(tensor, other[key], weight) for key, tensor in base.items()}


def added_tensors(state: State) -> dict[str, Tensor]:
    """The tensors that PASD adds to a U-Net: 312 in the full model for SD 1.x, 81 in the light one."""
    return {key: tensor for key, tensor in state.items() if is_pasd_key(key)}


def base_tensors(state: State) -> dict[str, Tensor]:
    """The tensors that PASD's U-Net has from its base."""
    return {key: tensor for key, tensor in state.items() if not is_pasd_key(key)}


def pack_delta(
    unet_state: State, controlnet_state: State, dtype: torch.dtype = torch.float16
) -> dict[str, Tensor]:
    """PASD without its base: the tensors it adds to the U-Net and the whole ControlNet, in `dtype`.

    Raises WeightsError for a U-Net without added tensors, an empty ControlNet, and numbers that `dtype`
    cannot hold.
    """
    halves = {UNET: added_tensors(unet_state), CONTROLNET: controlnet_state}
    for prefix, half in halves.items():
        if not half:
            raise WeightsError(f"nothing to pack under {prefix!r}: expected PASD's U-Net and its ControlNet")
    return {
        prefix + key: narrow(tensor, dtype, prefix + key)
        for prefix, half in halves.items()
        for key, tensor in half.items()
    }


def is_delta(keys: Iterable[str]) -> bool:
    """Whether these are the keys of a delta file."""
    return {_half(key) for key in keys} == {UNET, CONTROLNET}


def _half(key: str) -> str:
    """The prefix of the half of a delta file that `key` belongs to, "" for none."""
    if key.startswith(CONTROLNET):
        return CONTROLNET
    return UNET if key.startswith(UNET) and is_pasd_key(key) else ""


def is_pasd_key(key: str) -> bool:
    """Whether a U-Net has this key from PASD, not from its base."""
    return any(mark in key for mark in PASD_KEYS)


def difference(state: State, base: State, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """The tensors of `state` that `base` has not, or has otherwise, in `dtype`; `completed` undoes it.

    Raises WeightsError for numbers that `dtype` cannot hold.
    """
    return {
        key: narrow(tensor, dtype, key)
        for key, tensor in state.items()
        if key not in base or not torch.equal(tensor, base[key].to(tensor))
    }


def completed(part: State, base: State) -> dict[str, Tensor]:
    """`part` laid over `base`, in the dtype of `base`: the whole that `difference` took `part` from.

    Raises WeightsError where a tensor of both has another shape.
    """
    for key in part.keys() & base.keys():
        if part[key].shape != base[key].shape:
            raise WeightsError(
                f"{key[:80]!r} has shape {tuple(part[key].shape)}, expected {tuple(base[key].shape)} as in what "
                "it is a change to"
            )
    dtype = next((tensor.dtype for tensor in base.values()), torch.float32)
    return dict(base) | {key: tensor.to(dtype) for key, tensor in part.items()}


def fingerprint(state: State) -> str:
    """sha256, in hexadecimal, over the names and values of `state`, taken as float16 whatever their dtype.

    So the tensors of a float16 file have the same one when they were widened.
    """
    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(key.encode())
        digest.update(state[key].detach().cpu().half().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def is_decoder_delta(keys: Iterable[str]) -> bool:
    """Whether these are the keys of a mask-conditioned decoder without the autoencoder that it changes."""
    keys = list(keys)
    return any(key.startswith(CONDITION) for key in keys) and not any(
        key.startswith("encoder.") for key in keys
    )


def _mix(base: Tensor, other: Tensor, weight: float) -> Tensor:
    if weight == 0:
        return base
    if weight == 1:
        return other.to(base.dtype)
    wide = torch.promote_types(base.dtype, torch.float32)
    return torch.lerp(base.to(wide), other.to(wide), weight).to(base.dtype)


def narrow(tensor: Tensor, dtype: torch.dtype, key: str) -> Tensor:
    """`tensor` in `dtype`; WeightsError, which names it `key`, where that cannot hold its numbers."""
    converted = tensor.to(dtype)
    if not converted.isfinite().all():
        raise WeightsError(f"{key!r} has numbers that are not finite in {dtype}; keep it in float32")
    return converted


def _require_layout(state: State, expected: State, what: str) -> None:
    """WeightsError unless both have the same keys and shapes."""
    missing, unknown = expected.keys() - state.keys(), state.keys() - expected.keys()
    if missing or unknown:
        raise WeightsError(
            f"{what} lacks {len(missing)} keys and has {len(unknown)} that do not belong, first "
            f"{min(missing | unknown)[:80]!r}; expected a net of the same kind"
        )
    for key, tensor in expected.items():
        if state[key].shape != tensor.shape:
            raise WeightsError(
                f"{what} has {key[:80]!r} of shape {tuple(state[key].shape)}, expected {tuple(tensor.shape)}"
            )
