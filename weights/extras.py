"""What programs put around a file's weights: a prefix before every key, marks without values that say how the
model was trained, and the scales of 8-bit weights.

Reads    the marks `v_pred` and `ztsnr` of today's single files (v: Salimans and Ho 2022, arXiv:2202.00512;
         zero terminal SNR: Lin et al. 2023, arXiv:2305.08891, section 3.1), and the `scaled_fp8` layout
Tensors  {key: tensor} on the CPU, views of the same memory; a scaled weight becomes float32
Copying  this file, files.py (for WeightsError) and pickles.py; torch and safetensors through them
"""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from .files import WeightsError

State = Mapping[str, Tensor]

# What a wrapper around a net puts before each of its keys: DataParallel, a checkpoint laid flat,
# torch.compile, a trainer. ESRGAN's first code numbers its layers behind "model.", LDM's U-Net has it too.
_WRAPPERS = ("module", "state_dict", "_orig_mod", "model", "net")
_NO_WRAPPERS = ("model.diffusion_model.", *(f"model.{digit}" for digit in range(10)))
_INNER = ("", "model.diffusion_model.", "diffusion_model.")  # where a mark may stand

# Mark -> what it says, under the names of a scheduler_config.json.
MARKS: dict[str, tuple[str, Any]] = {
    "v_pred": ("prediction_type", "v_prediction"),
    "ztsnr": ("rescale_betas_zero_snr", True),
}
_SCALED = "scaled_fp8"  # says that there are scales, which the scales say too
# Ends of the keys of a layer's scales: of its weight, and of its input, which matters to 8-bit multiplication
# alone.
_SCALES, _UNUSED = ("scale_weight", "weight_scale"), ("scale_input", "input_scale", "comfy_quant")


def unwrapped(state: State) -> State:
    """`state` without the wrappers' names before its keys; keys without a dot (marks, counters) have none."""
    for _ in range(4):  # more are not nested
        inner = [key for key in state if "." in key]
        heads = {key.partition(".")[0] for key in inner}
        if len(heads) != 1 or (head := heads.pop()) not in _WRAPPERS or inner[0].startswith(_NO_WRAPPERS):
            break
        state = {key.removeprefix(f"{head}."): tensor for key, tensor in state.items()}
    return state


def find_marks(state: State) -> dict[str, str]:
    """Key -> the mark that it is: of MARKS, or "scaled_fp8". WeightsError for one that holds values, and for
    the marks of a model that no sampler here runs.
    """
    found = {}
    for key, tensor in state.items():
        name = next((key.removeprefix(inner) for inner in reversed(_INNER) if key.startswith(inner)), key)
        if name.startswith(("edm_mean", "edm_std", "edm_vpred")):
            raise WeightsError(
                f"marked {name!r:.40}: trained on the noise levels of EDM, on which no sampler here works; "
                "take a model of Stable Diffusion 1.x's schedule"
            )
        if name in MARKS or key.rpartition(".")[2] == _SCALED:
            if tensor.numel() > 2:
                raise WeightsError(
                    f"{key!r:.80} holds {tensor.numel():,} values; expected a mark, which holds none or one"
                )
            found[key] = name if name in MARKS else _SCALED
    return found


def is_valueless(key: str, tensor: Tensor) -> bool:
    """Whether a tensor that belongs to no net can be passed over: it is empty, or a counter at the top."""
    module, _, name = key.rpartition(".")
    if tensor.ndim == 0 and not module:
        return key != "logit_scale"  # which is CLIP's
    return tensor.numel() == 0 and name not in ("weight", "bias")


def find_scales(state: State) -> tuple[dict[str, str], list[str]]:
    """Key of a weight -> that of its scale, and the keys of what stands beside 8-bit weights unused."""
    scales, unused = {}, []
    for key in state:
        module, _, name = key.rpartition(".")
        weight = f"{module}.weight"
        if name in _SCALES and weight in state and state[weight].is_floating_point():
            scales[weight] = key
        elif name in _UNUSED and weight in state and state[weight].is_floating_point():
            unused.append(key)
    return scales, unused


def scaled(key: str, weight: Tensor, scale: Tensor) -> Tensor:
    """`weight` * `scale` in float32; `scale` is one number, or one for each of the weight's rows.
    WeightsError for another shape.
    """
    rows = len(weight) if weight.ndim else 1
    if scale.numel() not in (1, rows) or not scale.is_floating_point():
        raise WeightsError(
            f"{key!r:.80} has a scale of shape {tuple(scale.shape)} ({scale.dtype}); expected one number, or {rows}"
        )
    return weight.float() * scale.float().reshape(-1, *[1] * (weight.ndim - 1))


def told(marks: Iterable[str]) -> dict[str, Any]:
    """What `marks` say of the training, under the names of a scheduler_config.json."""
    return dict(MARKS[mark] for mark in marks if mark in MARKS)
