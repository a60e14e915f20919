"""Single files of every kind beside diffusers' own converter: the same tensors under the same names."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nets.clip import CLIPTextConfig, CLIPTextModel
from nets.controlnet import ControlNet, ControlNetConfig
from nets.unet import UNet, UNetConfig
from nets.vae import AutoencoderKL, VAEConfig
from weights.canonical import read_contents
from weights.ldm import ema_name, to_ldm

single_file_utils = pytest.importorskip("diffusers.loaders.single_file_utils")

State = dict[str, Tensor]
U, V, T, C = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer.", "control_model."

# As many levels as SD 1.x has: diffusers' converter knows no others.
UNET = UNetConfig(
    block_out_channels=(8, 8, 16, 16), cross_attention_dim=12, attention_head_dim=2, norm_num_groups=4
)
VAE = VAEConfig(block_out_channels=(8, 8, 16, 16), norm_num_groups=4)
CONTROLNET = ControlNetConfig(**vars(UNET), conditioning_embedding_out_channels=(4, 8, 12, 16), to_rgb=False)
TEXT = CLIPTextConfig(vocab_size=30, hidden_size=12, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)  # fmt: skip

torch.manual_seed(3)
NETS = {
    "unet": UNet(UNET),
    "vae": AutoencoderKL(VAE),
    "text_encoder": CLIPTextModel(TEXT),
    "controlnet": ControlNet(CONTROLNET),
}
PARTS: dict[str, State] = {part: net.state_dict() for part, net in NETS.items()}
LINEAR = UNet(replace(UNET, use_linear_projection=True)).state_dict()
DEEP = UNet(replace(UNET, transformer_layers_per_block=2)).state_dict()
BASE = {part: PARTS[part] for part in ("unet", "vae", "text_encoder")}
FILE = to_ldm(BASE)
CONTROL = to_ldm({"controlnet": PARTS["controlnet"]})
AVERAGES = {ema_name(key): tensor + 1 for key, tensor in FILE.items() if key.startswith(U)}


def theirs(state: State, config: Any = UNET, *, averages: bool = False) -> dict[str, State]:
    """The parts as diffusers converts them, of those that the file has."""
    said = {
        "layers_per_block": config.layers_per_block,
        "class_embed_type": None,
        "addition_embed_type": None,
    }
    found: dict[str, State] = {}
    if any(key.startswith(U) for key in state):
        found["unet"] = single_file_utils.convert_ldm_unet_checkpoint(dict(state), said, extract_ema=averages)
    if any(key.startswith((V, "encoder.")) for key in state):
        levels = {f"{way}_block_types": (None,) * 4 for way in ("down", "up")} | {"layers_per_block": 2}
        found["vae"] = single_file_utils.convert_ldm_vae_checkpoint(dict(state), levels)
    if any(key.startswith(T) for key in state):
        found["text_encoder"] = single_file_utils.convert_ldm_clip_checkpoint(dict(state))
    if any(key.startswith(C) or key.startswith("input_hint_block.") for key in state):
        found["controlnet"] = single_file_utils.convert_controlnet_checkpoint(dict(state), said)
    return found


def under(prefix: str, state: Mapping[str, Tensor]) -> State:
    return {prefix + key: tensor for key, tensor in state.items()}


def start(state: State, *prefixes: str) -> State:
    return {key: tensor for key, tensor in state.items() if key.startswith(prefixes)}


def bare(prefix: str, state: State) -> State:
    return {key.removeprefix(prefix): tensor for key, tensor in start(state, prefix).items()}


@dataclass(frozen=True)
class Kind:
    state: State  # the file
    plain: State | None = None  # what to give diffusers in its place, which knows no such wrapper
    averages: bool = False


SCHEDULE = {
    "betas": torch.zeros(1000),
    "alphas_cumprod": torch.zeros(1000),
    f"{T}text_model.embeddings.position_ids": torch.arange(77)[None],
}
KINDS: dict[str, Kind] = {
    "complete": Kind(FILE),
    "in float16": Kind({key: tensor.half() for key, tensor in FILE.items()}),
    "with schedule and positions": Kind(FILE | SCHEDULE, FILE),
    "with averages": Kind(FILE | AVERAGES, averages=True),
    "U-Net alone": Kind(start(FILE, U)),
    "U-Net alone, no prefix": Kind(bare(U, FILE), start(FILE, U)),
    "without autoencoder": Kind(start(FILE, U, T)),
    "without text encoder": Kind(start(FILE, U, V)),
    "autoencoder alone": Kind(start(FILE, V)),
    "autoencoder alone, no prefix": Kind(bare(V, FILE)),
    "linear projections": Kind(to_ldm({"unet": LINEAR})),
    "deep transformers": Kind(to_ldm({"unet": DEEP})),
    "from DataParallel": Kind(under("module.", FILE), FILE),
    "laid flat under state_dict.": Kind(under("state_dict.", FILE) | {"global_step": torch.tensor(9)}, FILE),
    "marked for v": Kind(FILE | {"v_pred": torch.empty(0), "ztsnr": torch.empty(0)}, FILE),
    "ControlNet of its authors": Kind(CONTROL),
    "ControlNet of its authors, no prefix": Kind(bare(C, CONTROL)),
    "ControlNet with its model": Kind(FILE | CONTROL),
}  # fmt: skip


@pytest.mark.parametrize("case", KINDS)
def test_a_single_file_gives_what_diffusers_converts_it_to(case: str) -> None:
    kind = KINDS[case]
    expected = theirs(kind.plain or kind.state, averages=kind.averages)
    contents = read_contents(kind.state, case)
    assert set(contents.parts) == set(expected) and not contents.unknown
    for part, tensors in expected.items():
        found = contents.tensors(part)
        assert found.keys() == tensors.keys(), part
        assert all(torch.equal(found[key], tensors[key]) for key in found), part


@torch.no_grad()
def test_a_controlnet_of_its_authors_computes_what_diffusers_does() -> None:
    diffusers = pytest.importorskip("diffusers")
    config = {name: getattr(CONTROLNET, name) for name in (
        "block_out_channels", "cross_attention_dim", "attention_head_dim", "norm_num_groups", "conditioning_embedding_out_channels",
    )}  # fmt: skip
    oracle = diffusers.ControlNetModel(**config).eval()
    state = {key: torch.randn_like(tensor) / 8 for key, tensor in PARTS["controlnet"].items()}
    oracle.load_state_dict(theirs(to_ldm({"controlnet": state}))["controlnet"])
    net = ControlNet(CONTROLNET).eval()
    net.load_state_dict(read_contents(to_ldm({"controlnet": state})).tensors("controlnet"))
    x, context, image = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 12), torch.rand(1, 3, 64, 64)
    down, mid = oracle(x, torch.tensor([7]), context, image, return_dict=False)
    ours = net(x, torch.tensor([7]), context, image)
    for found, expected in zip((*ours.down, ours.mid), (*down, mid), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
