"""PASD's adjustable noise schedule (ANS): the latent that restoring starts from.

Paper    Yang et al. 2023 (PASD), arXiv:2308.14469, section 3.3, Eqs. 3 and 4
Tensors  z_lr (B, C, h, w), the scaled latent of the degraded picture; noise of its shape, standard normal
Copying  needs schedule.py beside it, and torch

Training never reaches pure noise: at the last timestep N a share sqrt(a_N) of the clean picture is left. Eq.
3 puts the degraded picture there; Eq. 4 lowers its share by a further level a_a. 1 keeps all of it
(faithful), 0 none (pure noise, inventive). The paper's "a_900 = 0.1189" is a root: a_900 is 0.01415, its root
0.11896.
"""

from torch import Tensor

from .schedule import q_sample_between


def ans_start(
    z_lr: Tensor, a_n: float, a_a: float, noise: Tensor, more_noise: Tensor | None = None
) -> Tensor:
    """z_N at the level of its first timestep, (B, C, h, w) in z_lr's dtype (Eq. 4).

    `a_n` is alphas_cumprod at that timestep, `a_a` the adjustable level in [0, 1]. One `noise` stands for
    both of the paper's, z and z', whose sum is normal again; with `more_noise` they are kept apart, as the
    official code draws them. ValueError for a level outside [0, 1].
    """
    if not 0 <= a_a <= 1:
        raise ValueError(
            f"alpha_a is {a_a}; it is a level from 0 (start from pure noise) to 1 (no noise added)"
        )
    if more_noise is None:
        return q_sample_between(z_lr, 1.0, a_a * a_n, noise)
    return q_sample_between(q_sample_between(z_lr, 1.0, a_n, noise), 1.0, a_a, more_noise)
