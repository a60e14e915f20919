"""Fine-tune a base, the U-Net below PASD's parts, whole or by a low-rank change; the LoRA between two bases.

Paper    Yang et al. 2023 (PASD), arXiv:2308.14469, section 3.5 (a personalised base); Hu et al. 2021 (LoRA),
         arXiv:2106.09685
Tensors  up (out, r), down (r, in * kh * kw): W (out, in[, kh, kw]) + alpha / r * up @ down
Weights  LoRA files in kohya's names, lora_unet_<path with _>.lora_down.weight, .lora_up.weight and .alpha, in
         which kohya's programs, diffusers and weights/lora.py agree on the scale alpha / r
Copying  needs samplers/schedule.py, train/config.py, train/objective.py; the U-Net comes as an argument, its
         layers are known by diffusers' names
"""

import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from samplers.schedule import q_sample

from .config import TrainConfig
from .objective import Inputs, denoising_loss

# Every dense layer of the transformers, where the text acts: kohya's default too, 192 layers of SD 1.x.
_TARGETS = re.compile(
    r".+\.attentions\.\d+\.(proj_in|proj_out|.+\.(to_[qkv]|to_out\.0|ff\.net\.0\.proj|ff\.net\.2))"
)


class LowRankChange(nn.Module):
    """A frozen weight's trained change for torch's `parametrize`: `weight` is W + alpha / r * up @ down.

    The whole W is formed in each forward: a step of SD 1.x at batch 1 and r = 16 takes 13 % more operations
    than one that adds up @ (down @ x) to the layer's output. In return nothing in the net has to know, not
    even code that reads `weight` without calling the layer, and under autocast the sum is rounded as a merged
    file's will be.
    """

    def __init__(self, weight: Tensor, rank: int, alpha: float, generator: torch.Generator) -> None:
        """`weight` is (out, in[, 1, 1]).

        `up` starts at zero, `down` uniform in +-1 / sqrt(in), Kaiming's as for nn.Linear.
        """
        super().__init__()
        fan_in = weight[0].numel()
        down = torch.rand(rank, fan_in, generator=generator).mul(2).sub(1) / fan_in**0.5
        self.down = nn.Parameter(down.to(weight))
        self.up = nn.Parameter(weight.new_zeros(len(weight), rank))
        self.scale = alpha / rank

    def forward(self, weight: Tensor) -> Tensor:
        """The changed weight, in the shape and dtype of `weight`."""
        with torch.autocast(weight.device.type, enabled=False):  # W is not to be rounded before the sum is
            return torch.addmm(weight.flatten(1), self.up, self.down, alpha=self.scale).view_as(weight)


class BaseObjective(nn.Module):
    """The noise prediction loss of a U-Net alone.

    With a `rank`, only low-rank changes of its transformers are trained.

    `unet` itself is changed: all of it is trained, or its targets get a `LowRankChange`, drawn from
    config.seed, which adds to the names of its tensors. `alpha` is `rank` unless given. ValueError for a rank
    below 1 or above a layer's width.
    """

    def __init__(
        self,
        unet: nn.Module,
        alphas_cumprod: Tensor,
        config: TrainConfig,
        *,
        rank: int | None = None,
        alpha: float | None = None,
        prediction_type: str = "epsilon",
    ) -> None:
        super().__init__()
        self.unet = unet.train().requires_grad_(rank is None)
        self.alphas_cumprod = alphas_cumprod.double().cpu()
        self.prediction_type = prediction_type
        self.alpha: float | None = None
        self.changed: tuple[str, ...] = ()  # the paths in the U-Net of the layers with a low-rank change
        if rank is not None:
            self.alpha = float(rank if alpha is None else alpha)
            self._add_changes(rank, self.alpha, torch.Generator().manual_seed(config.seed))

    def _add_changes(self, rank: int, alpha: float, generator: torch.Generator) -> None:
        nets = {path: net for path, net in self.unet.named_modules() if _TARGETS.fullmatch(path)}
        layers = {path: net for path, net in nets.items() if isinstance(net, nn.Linear | nn.Conv2d)}
        most = min((min(net.weight.shape[:2]) for net in layers.values()), default=0)
        if not 1 <= rank <= most:
            raise ValueError(f"rank is {rank}; expected 1 to {most}, the width of the narrowest layer")
        for net in layers.values():
            register_parametrization(net, "weight", LowRankChange(net.weight, rank, alpha, generator))
        self.changed = tuple(layers)

    def forward(self, inputs: Inputs) -> dict[str, Tensor]:
        """The losses of a batch: "loss" is the one to descend, here "denoising" itself."""
        z, t, noise, context = inputs[:4]
        prediction = self.unet(q_sample(z, t, self.alphas_cumprod, noise), t, context)
        denoising = denoising_loss(
            prediction, inputs, self.alphas_cumprod, prediction_type=self.prediction_type
        )
        return {"loss": denoising, "denoising": denoising}


def unet_state(objective: BaseObjective, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The U-Net trained whole, under its own names; `weights` as `Trainer.kept` gives them.

    ValueError for a LoRA's.
    """
    if objective.changed:
        raise ValueError("only low-rank changes were trained; expected rank None, or take lora_state")
    return {name: weights[f"unet.{name}"] for name in objective.unet.state_dict()}


def lora_state(objective: BaseObjective, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The trained changes as a LoRA file's tensors; `weights` as `Trainer.kept` gives them.

    ValueError without a rank.
    """
    if objective.alpha is None:
        raise ValueError("the whole U-Net was trained; expected a rank, or take unet_state")
    state = {}
    for path in objective.changed:
        trained = f"unet.{path}.parametrizations.weight"
        up, down = weights[f"{trained}.0.up"], weights[f"{trained}.0.down"]
        shape = objective.unet.get_parameter(f"{path}.parametrizations.weight.original").shape
        state |= kohya_names(path, up, down, shape, objective.alpha)
    return state


def low_rank(difference: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of `difference` (out, in[, kh, kw]) of that rank.

    Returns up (out, rank) and down (rank, in * kh * kw). It is the singular value decomposition cut off
    (Eckart & Young 1936), the values' roots on either side, and zeros where the layer has fewer values. From
    the eigenvectors of the smaller Gram matrix in float64: the same to rounding, in a tenth of the time for
    SD's widest layers. Float32, or float64 for float64. ValueError for a rank below 1.
    """
    if rank < 1:
        raise ValueError(f"rank is {rank}; expected at least 1")
    matrix = difference.detach().flatten(1).double()
    tall = len(matrix) > matrix.shape[1]
    wide = matrix.T if tall else matrix
    up = torch.linalg.eigh(wide @ wide.T).eigenvectors.flip(1)[:, :rank]  # the largest values' come first
    down = up.T @ wide  # its rows are as long as the singular values
    root = torch.linalg.vector_norm(down, dim=1).sqrt().clamp(min=1e-30)
    up, down = up * root, down / root[:, None]
    if tall:
        up, down = down.T, up.T
    dtype, missing = torch.promote_types(difference.dtype, torch.float32), rank - len(down)
    return F.pad(up.to(dtype), (0, missing)), F.pad(down.to(dtype), (0, 0, 0, missing))


def extract_lora(
    base_state: Mapping[str, Tensor], tuned_state: Mapping[str, Tensor], rank: int
) -> tuple[dict[str, Tensor], float]:
    """A LoRA file's tensors for what one U-Net has over another, and the share of it that they keep.

    Each dense layer and convolution that differs gets the best change of `rank`, narrow ones too: diffusers
    mistakes the scale where ranks differ. Alpha is `rank`. Biases and norms cannot be in a LoRA. The share is
    of the squared difference, over all tensors. ValueError for nets that do not match or do not differ.
    """
    if {k: v.shape for k, v in base_state.items()} != {k: v.shape for k, v in tuned_state.items()}:
        raise ValueError("the two U-Nets have other names or shapes; expected one tuned from the other")
    state: dict[str, Tensor] = {}
    total = lost = 0.0
    for key, base in base_state.items():
        difference = tuned_state[key].double() - base.double()
        size = difference.square().sum().item()
        total += size
        if size and base.ndim in (2, 4):
            up, down = low_rank(difference.float(), rank)
            state |= kohya_names(key.removesuffix(".weight"), up, down, base.shape, float(rank))
            size = (difference.flatten(1) - up.double() @ down.double()).square().sum().item()
        lost += size
    if not state:
        raise ValueError("the two U-Nets have the same weights; expected one tuned from the other")
    return state, 1 - lost / total


def kohya_names(path: str, up: Tensor, down: Tensor, shape: torch.Size, alpha: float) -> dict[str, Tensor]:
    """The change of the layer at `path`, whose weight has `shape`, in kohya's names."""
    name, kernel = f"lora_unet_{path.replace('.', '_')}", shape[2:]
    return {
        f"{name}.lora_down.weight": down.reshape(len(down), shape[1], *kernel),
        f"{name}.lora_up.weight": up.reshape(*up.shape, *(1 for _ in kernel)),
        f"{name}.alpha": torch.tensor(alpha),
    }
