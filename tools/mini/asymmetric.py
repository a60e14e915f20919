"""The bundle's mask-conditioned decoder: the VAE's, its fine end trained to meet what an edit keeps.

Zhu et al. 2023, arXiv:2306.04632. The encoder, the middle and the coarse end are those of the shipped VAE and
stay as they are, so that only what differs is written (`msbd.loading.seam`).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from msbd.loading.parts import load_net
from nets.asymmetric_vae import AsymmetricAutoencoderKL, AsymmetricVAEConfig
from weights.registry import MINI

from ..scenes.data import abstract_pictures, stage_pictures, training_pictures
from .parts import VAE, draw, random_crops
from .train import Recipe

# What is trained of the decoder: from the first place on that takes something from the picture. More places,
# before resolutions that stay as they are, made it worse: docs/log.md.
TRAINED = (
    "decoder.condition_encoder.",
    "decoder.up_blocks.2.",
    "decoder.up_blocks.3.",
    "decoder.conv_norm_out.",
    "decoder.conv_out.",
)
SEAM = 8  # pixels on either side of the mask's edge that weigh more
PASSAGE = 5  # pixels inside it over which a foreign edit passes from the source to what is new


def asymmetric_config(scaling_factor: float) -> AsymmetricVAEConfig:
    """The sizes of the bundle's VAE."""
    return AsymmetricVAEConfig(
        down_block_out_channels=VAE.block_out_channels,
        layers_per_down_block=VAE.layers_per_block,
        up_block_out_channels=VAE.block_out_channels,
        layers_per_up_block=VAE.layers_per_block,
        norm_num_groups=VAE.norm_num_groups,
        scaling_factor=scaling_factor,
        mid_attention=VAE.mid_attention,
        condition_layers=3,
    )


class AsymmetricPart:
    """Reconstruction from the latent that an edit leaves, beside its source: L1 and L1 of edges.

    The latent is the source's, but in every cell that the mask touches it is that of something new, and half
    the time a little off. Two edits in five are perfect: what is new goes on as the source does, and is the
    target. In the others it is foreign, and what the decoder has to paint passes from the source to it.
    """

    name = "asymmetric"
    recipe = Recipe(steps=2600, batch=12, learning_rate=1e-3, clip=5.0, bfloat16=False)

    def __init__(self, *, start: bool = False) -> None:
        """With `start` the condition's encoder is fitted to the decoder, else it is left as it comes."""
        self.data = (training_pictures(), stage_pictures(), abstract_pictures())
        vae = load_net(MINI / "vae.safetensors").float()
        torch.manual_seed(self.recipe.seed)
        self.net: Any = AsymmetricAutoencoderKL(asymmetric_config(vae.config.scaling_factor))
        self.net.load_state_dict(vae.state_dict(), strict=False)
        if start:
            fit_condition(self.net, self._pictures(24, 128, torch.Generator().manual_seed(self.recipe.seed)))
        for name, parameter in self.net.named_parameters():
            parameter.requires_grad_(name.startswith(TRAINED))

    def loss(self, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """Weighted reconstruction of a batch of crops of 64, 96 or 128 px: fewer of the larger ones."""
        device = next(self.net.parameters()).device
        size = (64, 96, 128)[int(draw(1, 3, generator))]
        count = max(3, round(self.recipe.batch * (64 / size) ** 2))
        one, other = (self._pictures(count, size, generator).to(device) for _ in range(2))
        mask = torch.stack([random_mask(size, generator) for _ in range(count)]).to(device)
        perfect = (torch.rand(count, 1, 1, 1, generator=generator) < 0.4).to(device)
        cells = F.max_pool2d(mask, self.net.downscale)
        touched = F.interpolate(cells, (size, size), mode="nearest")
        target = torch.where(perfect, one, torch.lerp(one, other, passage(mask)))
        source = torch.where(perfect, torch.lerp(one, other, mask), one)
        new = torch.where(perfect, one, torch.lerp(one, other, touched))
        with torch.no_grad():
            latent = self._edited_latent(source, new, cells, generator)
        error = self.net.decode(latent, source, mask).float() - target
        weight = loss_weight(mask)
        across = (error.diff(dim=-1).abs() * weight[..., 1:]).mean()
        down = (error.diff(dim=-2).abs() * weight[..., 1:, :]).mean()
        loss = (error.abs() * weight).mean() + (across + down) / 2
        ring = (weight > 2) & (mask < 0.5)
        share = ring.float().mean().clamp(min=1e-6)
        psnr = -10 * torch.log10((error.square() * ring).mean() / share / 4 + 1e-10)
        return loss, {"psnr ring": psnr.item(), "inside": (error.abs() * mask).mean().item() * 127.5}

    def _pictures(self, count: int, size: int, generator: torch.Generator) -> Tensor:
        """(count, 3, size, size) in [-1, 1]: scenes, views and tiles, and one in six abstract."""
        scenes, views, abstracts = self.data
        strange = max(1, count // 6)
        second = (count - strange) // 2
        return torch.cat([
            random_crops(source.batch(draw(n, len(source.captions), generator)), size, generator)
            for source, n in ((scenes, count - strange - second), (views, second), (abstracts, strange))
        ])[torch.randperm(count, generator=generator)]  # fmt: skip

    def _edited_latent(
        self, source: Tensor, new: Tensor, cells: Tensor, generator: torch.Generator
    ) -> Tensor:
        """The latent of `source` with that of `new` in `cells`, unscaled; half the time a little off."""
        kept, wanted = self.net.encode(torch.cat([source, new])).mode().chunk(2)
        count, channels, height, width = wanted.shape

        def noise(rows: int, columns: int, largest: float) -> Tensor:
            sigma = largest * (2 * torch.rand(count, 1, 1, 1, generator=generator) - 1).clamp(min=0)
            return (torch.randn(count, channels, rows, columns, generator=generator) * sigma).to(wanted)

        smooth = F.interpolate(noise(3, 3, 0.08), (height, width), mode="bilinear", align_corners=False)
        drift = noise(height, width, 0.05) + smooth + noise(1, 1, 0.08)
        scale = self.net.config.scaling_factor
        edited = wanted + drift / scale
        return torch.lerp(kept + noise(height, width, 0.05) / scale, edited, cells.to(kept))


def passage(mask: Tensor) -> Tensor:
    """Share of what is new (B, 1, H, W) in the target of a foreign edit: 0 outside `mask` and on the first
    pixel inside, 1 from PASSAGE pixels further in on.
    """
    depth = sum(-F.max_pool2d(-mask, 2 * k + 1, 1, padding=k) for k in range(1, PASSAGE + 1))
    assert isinstance(depth, Tensor)
    return 1 - (1 - depth / PASSAGE).square()


def loss_weight(mask: Tensor) -> Tensor:
    """(B, 1, H, W), like `mask`: 1 outside it, 2 inside, 4 within SEAM pixels of the edge, 8 where a foreign
    edit passes.
    """
    grown, shrunk = (sign * F.max_pool2d(sign * mask, 2 * SEAM + 1, 1, padding=SEAM) for sign in (1, -1))
    weight = torch.where(grown > shrunk, 4.0, 1 + mask)
    return torch.where((passage(mask) < 1) & (mask > 0), 8.0, weight)


def random_mask(size: int, generator: torch.Generator, *, whole: bool = True) -> Tensor:
    """(1, size, size) of 0 and 1: a union of one to four ellipses, rectangles and strokes.

    One in sixteen is 1 everywhere if `whole`, one in eight holds one small shape, one in eight is the rest of
    shapes.
    """

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    kind = uniform(0, 1)
    if whole and kind < 1 / 16:
        return torch.ones(1, size, size)
    tiny = kind < 3 / 16
    axis = (torch.arange(size) + 0.5) / size
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    mask = torch.zeros(size, size, dtype=torch.bool)
    for _ in range(1 if tiny else int(draw(1, 4, generator)) + 1):
        angle, row, column = uniform(0, torch.pi), uniform(0, 1), uniform(0, 1)
        along = (x - column) * torch.tensor(angle).cos() + (y - row) * torch.tensor(angle).sin()
        across = (y - row) * torch.tensor(angle).cos() - (x - column) * torch.tensor(angle).sin()
        a, b = (
            (uniform(0.02, 0.1), uniform(0.02, 0.1)) if tiny else (uniform(0.06, 0.35), uniform(0.06, 0.35))
        )
        shape = ("ellipse", "ellipse", "rectangle", "stroke")[int(draw(1, 4, generator))]
        if shape == "ellipse":
            mask |= torch.hypot(along / a, across / b) < 1
        elif shape == "rectangle":
            mask |= (along.abs() < a) & (across.abs() < b)
        else:  # all that is within b / 3 of a line of length 2 * end
            end = a if tiny else 2 * a
            mask |= torch.hypot((along.abs() - end).clamp(min=0), across) < b / 3
    if kind > 7 / 8:
        mask = ~mask
    return mask[None].float()


def fit_condition(net: AsymmetricAutoencoderKL, pictures: Tensor) -> None:
    """Set the condition's encoder so that, for `pictures` (B, 3, H, W) in [-1, 1], it gives the features that
    the decoder has at the same places: layer by layer, by linear regression.

    So blending starts as nearly no change; random features would spoil every resolution below them.
    """
    with torch.no_grad():
        z = net.post_quant_conv(net.encode(pictures).mode())
        x = net.decoder.mid_block(net.decoder.conv_in(z))
        wanted = [x]
        for block in net.decoder.up_blocks:
            wanted.append(x := block(x))
        x = pictures
        for i, layer in enumerate(net.decoder.condition_encoder.layers):
            _regress(layer, x if i == 0 else F.relu(x), wanted[-1 - i])
            x = layer(x if i == 0 else F.relu(x))


def _regress(layer: Any, x: Tensor, wanted: Tensor) -> None:
    """Make the convolution `layer` the least squares fit of `wanted` from `x`, a little regularised."""
    gram, product, count = 0.0, 0.0, 0
    for one, answer in zip(x.split(1), wanted.split(1), strict=True):
        patches = F.unfold(one, layer.kernel_size, padding=layer.padding, stride=layer.stride)[0].double()
        rows = torch.cat([patches, torch.ones(1, patches.shape[1]).double()])  # the last is the bias
        gram, product = gram + rows @ rows.T, product + rows @ answer[0].flatten(1).double().T
        count += patches.shape[1]
    assert isinstance(gram, Tensor)
    gram = gram + 1e-4 * gram.diagonal().mean() * torch.eye(len(gram)).double()
    solved = torch.linalg.solve(gram, product).T.float()
    layer.weight.copy_(solved[:, :-1].reshape(layer.weight.shape))
    layer.bias.copy_(solved[:, -1])
