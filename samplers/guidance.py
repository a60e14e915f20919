"""Classifier-free guidance: one denoiser out of a text-conditional net and two contexts.

Papers   Ho and Salimans 2022, arXiv:2207.12598, Eq. 6; Kynkäänniemi et al. 2024, arXiv:2404.07724 (the
         interval); Yang et al. 2023 (PASD), arXiv:2308.14469, section 3.4
Tensors  x (B, C, h, w) latent · t timestep · context (1 or B, 77, D) text states -> eps (B, C, h, w)
Copying  this file stands alone: torch only

PASD's paper prints eps(c) + w eps(c_neg), by which a larger w would lead towards the negative prompt.
Computed here is eps(c_neg) + w (eps(c) - eps(c_neg)), as Ho and Salimans have it, and as PASD's official code
does.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def classifier_free_guidance(
    model: Callable[[Tensor, Tensor, Tensor], Tensor],
    cond: Tensor,
    uncond: Tensor,
    scale: float,
    interval: tuple[float, float] | None = None,
) -> Callable[[Tensor, Tensor], Tensor]:
    """A denoiser `(x, t) -> eps`: one call of `model(x, t, context)` for a batch of [uncond; cond].

    cond and uncond (1 or B, 77, D), the latter the empty or the negative prompt; a single one serves the
    whole batch. eps = eps_u + scale (eps_c - eps_u), in at least float32 (bfloat16 differences times 7.5
    would be coarse). With scale 1, or where t lies outside `interval` = (lowest, highest) timestep with
    guidance, both inclusive, only the conditional half is evaluated. Raises ValueError if the interval is
    reversed or, when called, if a context's batch is neither 1 nor x's.
    """
    if interval is not None and interval[0] > interval[1]:
        raise ValueError(f"guidance interval is {interval}; it is (lowest, highest) timestep")

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        if scale == 1 or not _inside(t, interval):
            return model(x, t, _expand(cond, x, "cond"))
        context = torch.cat([_expand(uncond, x, "uncond"), _expand(cond, x, "cond")])  # (2B, 77, D)
        t_both = torch.cat([t, t]) if isinstance(t, Tensor) and t.dim() > 0 else t
        eps_u, eps_c = model(torch.cat([x, x]), t_both, context).chunk(2)  # (B, C, h, w) each
        eps_u, eps_c = (e.to(torch.promote_types(e.dtype, torch.float32)) for e in (eps_u, eps_c))
        # Ho and Salimans write (1 + w) eps_c - w eps_u; scale here is their 1 + w, as everyone counts today
        return eps_u + scale * (eps_c - eps_u)

    return denoise


def _inside(t: Tensor, interval: tuple[float, float] | None) -> bool:
    """Whether guidance is on at t; all entries of a (B,) t must agree on it."""
    if interval is None:
        return True
    inside = (t >= interval[0]) & (t <= interval[1])
    if isinstance(inside, Tensor) and bool(inside.any()) != bool(inside.all()):
        raise ValueError(
            f"timesteps {t.tolist()} lie on both sides of guidance interval {interval}; give the batch one t"
        )
    return bool(inside.all() if isinstance(inside, Tensor) else inside)


def _expand(context: Tensor, x: Tensor, name: str) -> Tensor:
    """`context` (1 or B, 77, D) as (B, 77, D)."""
    if context.shape[0] not in (1, x.shape[0]):
        raise ValueError(
            f"{name} context has batch {context.shape[0]}; expected 1 or the latent's {x.shape[0]}"
        )
    return context.expand(x.shape[0], *context.shape[1:])
