"""msbd/loading/seam.py: a mask-conditioned decoder from an official file, or completed from a difference."""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from msbd.load import load_edit_pipeline, locate_editor
from msbd.loading.parts import load_net
from msbd.loading.seam import read_seam_decoder, write_seam_decoder
from nets.asymmetric_vae import AsymmetricAutoencoderKL, AsymmetricVAEConfig
from nets.vae import AutoencoderKL
from tests.helpers.seeded_weights import load_seeded, seeded_input
from tools.models.__main__ import main
from weights.files import WeightsError, read_metadata, read_state_dict, write_safetensors
from weights.locate import locate
from weights.registry import MINI

CONFIG = AsymmetricVAEConfig(
    down_block_out_channels=(8, 16, 24, 24), layers_per_down_block=1,
    up_block_out_channels=(8, 16, 24, 24), layers_per_up_block=1, norm_num_groups=4, condition_layers=3,
)  # fmt: skip
State = Mapping[str, Tensor]


def seeded(config: AsymmetricVAEConfig = CONFIG) -> AsymmetricAutoencoderKL:
    net = AsymmetricAutoencoderKL(config).eval().requires_grad_(False)
    load_seeded(net, seed=6)
    return net


def plain_of(net: AsymmetricAutoencoderKL, dtype: torch.dtype = torch.float16) -> AutoencoderKL:
    """The autoencoder that `net` is a change to: its own tensors, but for another finest resolution."""
    vae = AutoencoderKL(net.config.decoder).eval().requires_grad_(False)
    own = net.state_dict()
    state = {key: tensor.half() for key, tensor in own.items() if ".condition_encoder." not in key}
    state |= {key: tensor + 0.25 for key, tensor in state.items() if key.startswith("decoder.up_blocks.3.")}
    vae.load_state_dict(state)
    return vae.to(dtype)


def rounded(net: AsymmetricAutoencoderKL) -> AsymmetricAutoencoderKL:
    """`net` as float16 holds it."""
    return net.half().float()


def official(folder: Path, net: AsymmetricAutoencoderKL, **config: Any) -> Path:
    """A folder as the hub has it: a pickle, and a config.json of diffusers."""
    folder.mkdir()
    torch.save(net.state_dict(), folder / "diffusion_pytorch_model.bin")
    said = {
        "_class_name": "AsymmetricAutoencoderKL", "act_fn": "silu", "sample_size": 256, "block_out_channels": [64],
        **{name: getattr(net.config, name) for name in ("norm_num_groups", "scaling_factor", "latent_channels")},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(said | config))
    return folder


def refusal(path: str | Path, vae: AutoencoderKL) -> str:
    with pytest.raises(WeightsError) as caught:
        read_seam_decoder(path, vae)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[key]) for key, tensor in one.items())


# ---- whole files -------------------------------------------------------------------------------------------


def test_an_official_folder_and_its_file_load_strictly(tmp_path: Path) -> None:
    net = seeded(
        replace(CONFIG, up_block_out_channels=(8, 16, 32, 32), layers_per_up_block=3, condition_layers=5)
    )
    folder = official(tmp_path / "hub", net)
    vae = plain_of(seeded())
    for path in (folder, folder / "diffusion_pytorch_model.bin"):
        for found in (read_seam_decoder(path, vae), load_net(path)):
            assert found.config == net.config and same(found.state_dict(), net.state_dict())
            assert not found.training and not any(p.requires_grad for p in found.parameters())


def test_without_a_config_stable_diffusion_s_values_hold(tmp_path: Path) -> None:
    config = AsymmetricVAEConfig(
        down_block_out_channels=(32,) * 4, up_block_out_channels=(32,) * 4, layers_per_down_block=1, layers_per_up_block=1
    )  # fmt: skip
    net = seeded(config)
    write_safetensors(tmp_path / "a.safetensors", net.state_dict())
    vae = plain_of(net)
    assert read_seam_decoder(tmp_path / "a.safetensors", vae).config == config


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda s: s.pop("decoder.conv_out.bias"), "1 tensors are missing, first 'decoder.conv_out.bias'"),
        (lambda s: s.pop("decoder.condition_encoder.layers.1.bias"), "1 tensors are missing"),
        (lambda s: s.update({"decoder.more.weight": torch.ones(1)}), "1 tensors are unknown"),
        (
            lambda s: s.update({"decoder.condition_encoder.layers.2.weight": torch.ones(24, 16, 3, 3)}),
            r"'decoder.condition_encoder.layers.2.weight' has shape \(24, 16, 3, 3\), expected \(24, 16, 4, 4\)",
        ),
        (lambda s: s.update({"decoder.conv_out.bias": torch.tensor([1, 2, 3])}), "holds torch.int64"),
        (lambda s: s.update({"decoder.conv_out.bias": torch.full((3,), float("nan"))}), "not finite"),
        (lambda s: s.pop("decoder.up_blocks.0.resnets.0.conv1.weight"), "is missing; the file is incomplete"),
    ],
)  # fmt: skip
def test_a_damaged_file_gives_one_line(damage: Any, message: str, tmp_path: Path) -> None:
    net, state = seeded(), dict(seeded().state_dict())
    damage(state)
    write_safetensors(tmp_path / "a.safetensors", state, {"config": json.dumps(asdict(net.config))})
    with pytest.raises(WeightsError, match=message) as caught:
        read_seam_decoder(tmp_path / "a.safetensors", plain_of(net))
    assert "\n" not in str(caught.value) and str(caught.value).startswith(f"{tmp_path / 'a.safetensors'}: ")


@pytest.mark.parametrize(
    "said, message",
    [
        ({"condition_layers": 5}, "4 tensors are missing, first 'decoder.condition_encoder.layers.3.bias'"),
        ({"condition_layers": 2}, "2 tensors are unknown, first 'decoder.condition_encoder.layers.2.bias'"),
        ({"condition_layers": 6}, "condition_layers is 6: expected 1 to 5"),
        ({"condition_layers": "all"}, "condition_layers = 'all', expected a count"),
        ({"norm_num_groups": 5}, "multiples of norm_num_groups"),
        ({"up_block_out_channels": [1, 2]}, "the tensors say"),
    ],
)
def test_a_wrong_config_gives_one_line(said: dict[str, Any], message: str, tmp_path: Path) -> None:
    net = seeded()
    config = json.dumps(asdict(net.config) | said)
    write_safetensors(tmp_path / "a.safetensors", net.state_dict(), {"config": config})
    assert message in refusal(tmp_path / "a.safetensors", plain_of(net))


def test_another_size_of_cells_on_the_way_up_is_refused(tmp_path: Path) -> None:
    """As in autoencoders that enlarge: five resolutions up, four down."""
    state = dict(seeded().state_dict())
    state |= {
        key.replace("up_blocks.3.", "up_blocks.4."): tensor
        for key, tensor in state.items()
        if "up_blocks.3." in key
    }
    write_safetensors(tmp_path / "a.safetensors", state, {"config": json.dumps({"norm_num_groups": 4})})
    assert "4 widths of the encoder and 5 of the decoder" in refusal(
        tmp_path / "a.safetensors", plain_of(seeded())
    )


@pytest.mark.parametrize("change", [{"latent_channels": 8}, {"scaling_factor": 0.5}])
def test_a_decoder_of_other_latents_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    vae, other = plain_of(seeded()), seeded(replace(CONFIG, condition_layers=5, **change))
    folder = official(tmp_path / "hub", other)
    (name,) = change
    assert f"{name} {change[name]}, but the model's autoencoder has" in refusal(folder, vae)


# ---- what it has over an autoencoder -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_difference_is_completed_with_the_autoencoder_s_tensors(dtype: torch.dtype, tmp_path: Path) -> None:
    net = rounded(seeded())
    vae, path = plain_of(net, dtype), tmp_path / "a.safetensors"
    write_seam_decoder(path, net, plain_of(net))
    stored = read_state_dict(path)
    assert {key.split(".")[0] for key in stored} == {"decoder"}
    assert {".".join(key.split(".")[1:3]) for key in stored} == {"condition_encoder.layers", "up_blocks.3"}
    found = read_seam_decoder(path, vae)
    assert found.config == net.config and {p.dtype for p in found.parameters()} == {dtype}
    assert same({key: tensor.float() for key, tensor in found.state_dict().items()}, net.state_dict())
    assert found.encoder.conv_in.weight.data_ptr() == vae.encoder.conv_in.weight.data_ptr()


def test_a_difference_to_another_autoencoder_is_refused(tmp_path: Path) -> None:
    net = rounded(seeded())
    vae, path = plain_of(net), tmp_path / "a.safetensors"
    write_seam_decoder(path, net, vae)
    vae.encoder.conv_in.weight += 1
    assert "a change to another autoencoder than this model's" in refusal(path, vae)
    write_safetensors(path, read_state_dict(path), {"config": read_metadata(path)["config"]})
    assert "a change to another autoencoder" in refusal(path, plain_of(net))  # it says of none


@pytest.mark.parametrize("key", ["decoder.conv_norm_out.weight", "decoder.more"])
def test_a_difference_with_a_wrong_tensor_is_refused(key: str, tmp_path: Path) -> None:
    net = rounded(seeded())
    path = tmp_path / "a.safetensors"
    write_seam_decoder(path, net, plain_of(net))
    write_safetensors(path, read_state_dict(path) | {key: torch.ones(3)}, read_metadata(path))
    assert key in refusal(path, plain_of(net))


def test_a_difference_alone_is_no_net(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = rounded(seeded())
    path = tmp_path / "a.safetensors"
    write_seam_decoder(path, net, plain_of(net))
    with pytest.raises(WeightsError, match="a change to a model, not a net"):
        load_net(path)
    assert main(["keys", str(path)]) == 0
    assert "asymmetric_added: " in capsys.readouterr().out
    assert main(["convert", str(path), "-o", str(tmp_path / "out"), "--in-process"]) == 1
    assert "a decoder without its autoencoder; it loads as it is" in capsys.readouterr().err


def test_a_whole_file_is_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = seeded(replace(CONFIG, condition_layers=5))
    folder, out = official(tmp_path / "hub", net), tmp_path / "a.safetensors"
    assert main(["convert", str(folder / "diffusion_pytorch_model.bin"), "-o", str(out), "--in-process"]) == 0
    found = load_net(out)
    assert found.config == net.config and same(found.state_dict(), net.state_dict())
    assert main(["keys", str(folder)]) == 0 and "asymmetric_vae: " in capsys.readouterr().out


# ---- in the wrong place ------------------------------------------------------------------------------------


def test_another_net_is_no_seam_decoder(tmp_path: Path) -> None:
    vae = load_net(MINI / "vae.safetensors")
    assert "one net (vae), expected a mask-conditioned decoder" in refusal(MINI / "vae.safetensors", vae)
    assert "one net (rrdb), expected a mask-conditioned" in refusal(MINI / "rrdb.safetensors", vae)
    assert "sd-vae-ft-mse: an autoencoder" in refusal("sd-vae-ft-mse", vae)
    assert "no weights here" in refusal(tmp_path, vae)
    assert "no such file" in refusal(tmp_path / "gone.safetensors", vae)


@pytest.mark.parametrize("place", ["vae", "upscaler"])
def test_a_seam_decoder_is_no_other_part(place: str, tmp_path: Path) -> None:
    net = rounded(seeded())
    whole, part = official(tmp_path / "hub", net) / "diffusion_pytorch_model.bin", tmp_path / "a.safetensors"
    write_seam_decoder(part, net, plain_of(net))
    for path in (whole, part):
        with pytest.raises(
            WeightsError, match="a mask-conditioned decoder .Asymmetric VQGAN., which goes beside"
        ):
            locate_editor("mini", **cast(Any, {place: path}))
    for name in ("mini-asymmetric", "asymmetric-vae-x-1-5"):
        with pytest.raises(WeightsError, match=f"^{name}: a mask-conditioned decoder .*, expected an? "):
            locate_editor("mini", **cast(Any, {place: name}))


def test_a_seam_decoder_is_no_model(tmp_path: Path) -> None:
    whole = official(tmp_path / "hub", seeded()) / "diffusion_pytorch_model.bin"
    with pytest.raises(WeightsError, match="a mask-conditioned decoder .*; no unet there"):
        load_edit_pipeline(whole)
    with pytest.raises(
        WeightsError, match="^mini-asymmetric: a mask-conditioned decoder .*, expected a base"
    ):
        load_edit_pipeline("mini-asymmetric")


# ---- the bundle's ------------------------------------------------------------------------------------------


def test_the_bundle_s_decoder_goes_beside_the_bundle_s_vae() -> None:
    vae = load_net(MINI / "vae.safetensors")
    net = read_seam_decoder("mini-asymmetric", vae)
    assert (net.config.condition_layers, net.config.scaling_factor) == (3, vae.config.scaling_factor)
    assert net.config.decoder == vae.config
    own, plain = net.state_dict(), vae.state_dict()
    assert all(
        torch.equal(own[key], tensor) for key, tensor in plain.items() if not key.startswith("decoder.")
    )
    assert locate("mini-asymmetric").nets.keys() == {"asymmetric_added"}
    assert (MINI / "asymmetric.safetensors").stat().st_size <= 1_600_000


def test_the_bundle_s_decoder_keeps_what_is_kept() -> None:
    """Of a smooth picture; how well on scenes is measured by `python -m tools.mini evaluate`."""
    vae = load_net(MINI / "vae.safetensors").float()
    net = read_seam_decoder("mini-asymmetric", vae)
    coarse = seeded_input("picture", (1, 3, 6, 9), seed=1, scale=0.3)
    image = torch.nn.functional.interpolate(coarse, (96, 144), mode="bicubic", align_corners=False)
    mask = torch.zeros(1, 1, 96, 144)
    mask[..., 21:70, 30:99] = 1
    with torch.no_grad():
        latent = vae.encode(image * (1 - mask)).mean
        plain, seeing = vae.decode(latent), net.decode(latent, image, mask)
    kept = mask.expand_as(image) == 0
    errors = [(decoded - image)[kept].abs().mean().item() for decoded in (plain, seeing)]
    assert errors[1] < 0.5 * errors[0]
