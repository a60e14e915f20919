"""Nets for tests of restoring: real ones as small as they go, and fakes whose every call is noted."""

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msbd.restore.config import ModelSpec
from msbd.restore.pipeline import RestorePipeline
from nets.controlnet import ControlNet, ControlNetConfig, ControlOutput
from nets.pasd_unet import PASDUNet, PASDUNetConfig
from nets.tiled_vae import TiledAutoencoder
from nets.vae import AutoencoderKL, DiagonalGaussian
from tests.helpers.seeded_weights import load_seeded
from tests.helpers.tiny import ALPHAS, count_letters
from tests.helpers.tiny_bundle import UNET, VAE

SPEC = ModelSpec(native=32, guidance_scale=2.0)  # works at 48 pixels and more, in tiles of 8 cells
WIDTH = UNET.cross_attention_dim


def letters_as_context(ids: Tensor) -> Tensor:
    """A text encoder: 0.01 x the length of the prompt, (B, 77, 16)."""
    return 0.01 * ids.float()[..., None].expand(-1, -1, WIDTH)


def real_nets(variant: str = "full") -> dict[str, Any]:
    """PASD's two nets and an autoencoder, with seeded weights."""
    widths = (4, 4, 8, 8)
    nets: tuple[nn.Module, ...] = (
        PASDUNet(PASDUNetConfig(**vars(UNET), variant=variant)),
        ControlNet(ControlNetConfig(**vars(UNET), conditioning_embedding_out_channels=widths)),
        AutoencoderKL(VAE),
    )
    for net in nets:
        load_seeded(net, seed=5)
        net.eval().requires_grad_(False)
    return dict(zip(("unet", "controlnet", "vae"), nets, strict=True))


def fake_nets() -> dict[str, Any]:
    return {"unet": FakeUNet(), "controlnet": FakeControlNet(), "vae": FakeVAE()}


def pipeline(nets: dict[str, Any], **parts: Any) -> RestorePipeline:
    vae = nets["vae"]
    tiled = (lambda **settings: TiledAutoencoder(vae, **settings)) if isinstance(vae, AutoencoderKL) else None
    common = {
        "text_encoder": letters_as_context,
        "tokenizer": count_letters,
        "alphas_cumprod": ALPHAS,
        "spec": SPEC,
        "tiled_vae": tiled,
    }
    return RestorePipeline(**{**common, **nets, **parts})


class FakeUNet(nn.Module):
    """A noise predictor that looks at one cell at a time; the text shifts it, the control is added."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7), requires_grad=False)
        self.calls: list[tuple[int, int, bool]] = []  # timestep, batch, whether it was controlled
        self.most: int | None = None  # a larger batch does not fit into memory
        self.error: type[RuntimeError] = torch.OutOfMemoryError

    def forward(self, x: Tensor, t: Tensor, context: Tensor, control: Any = None) -> Tensor:
        self.calls.append((int(t), len(x), control is not None))
        if self.most is not None and len(x) > self.most:
            raise self.error("out of memory, it is pretended")
        assert context.shape == (len(x), 77, WIDTH)
        shift = context.mean(dim=(1, 2))[:, None, None, None]
        eps = self.scale * x + 0.2 * torch.tanh(x.roll(1, dims=1)) + shift
        return eps if control is None else eps + control.mid


class FakeControlNet(nn.Module):
    """Residuals that look at one cell of the picture and of the latent."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.3), requires_grad=False)
        self.embedded: list[Tensor] = []
        self.scales: list[float] = []

    def embed(self, image: Tensor) -> Tensor:
        self.embedded.append(image)
        cells = F.avg_pool2d(image, 8)
        return torch.cat([cells, cells.mean(1, keepdim=True)], dim=1)

    def forward(self, x: Tensor, t: Tensor, context: Tensor, *, scale: float, hint: Tensor) -> ControlOutput:
        assert hint.shape == x.shape and context.shape == (len(x), 77, WIDTH)
        self.scales.append(scale)
        return ControlOutput((), scale * self.weight * (hint + 0.1 * x))


class FakeVAE(nn.Module):
    """Cells are means of 8 x 8 pixels, and become such pixels; the fourth channel is lost."""

    downscale = 8

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(latent_channels=4, scaling_factor=0.5)
        self.encoded: list[Tensor] = []

    def encode(self, image: Tensor) -> DiagonalGaussian:
        self.encoded.append(image)
        cells = F.avg_pool2d(image, 8)
        mean = torch.cat([cells, cells.mean(1, keepdim=True)], dim=1)
        return DiagonalGaussian(mean, torch.full_like(mean, -2.0))

    def decode(self, latent: Tensor) -> Tensor:
        return F.interpolate(latent[:, :3], scale_factor=8, mode="nearest")


class FakeSamplePrediction(FakeUNet):
    """FakeUNet's noise said as the clean latent it implies."""

    def forward(self, x: Tensor, t: Tensor, context: Tensor, control: Any = None) -> Tensor:
        eps, a = super().forward(x, t, context, control).double(), float(ALPHAS[int(t)])
        return ((x.double() - (1 - a) ** 0.5 * eps) / a**0.5).float()


class FakeVPrediction(FakeUNet):
    """FakeUNet's noise said as a velocity, v = sqrt(a) eps - sqrt(1 - a) x0 (Salimans and Ho)."""

    def forward(self, x: Tensor, t: Tensor, context: Tensor, control: Any = None) -> Tensor:
        eps, a = super().forward(x, t, context, control).double(), float(ALPHAS[int(t)])
        x0 = (x.double() - (1 - a) ** 0.5 * eps) / a**0.5
        return (a**0.5 * eps - (1 - a) ** 0.5 * x0).float()
