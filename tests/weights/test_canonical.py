"""weights/canonical.py: the same tensors come out of every layout, everything in a file is accounted for,
and the rest is refused.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nets.clip import CLIPModel
from nets.controlnet import ControlNet, ControlNetConfig
from nets.pasd_unet import PASDUNet, PASDUNetConfig
from nets.rrdb import RRDBConfig, RRDBNet
from nets.unet import SDXL_UNET, UNet
from nets.vae import AutoencoderKL, VAEConfig
from tests.helpers.tiny_bundle import RRDB, UNET, clip_config
from weights.canonical import Contents, read_contents
from weights.detect import net_config
from weights.files import WeightsError, read_state_dict
from weights.ldm import ema_name, to_ldm
from weights.merge import pack_delta

State = dict[str, Tensor]
VAE = VAEConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)
CONTROLNET = ControlNetConfig(**vars(UNET), conditioning_embedding_out_channels=(4, 4, 8, 8))
U, V, T = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."
SCHEDULE = {name: torch.zeros(1000) for name in ("betas", "alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_mean_coef2")}  # fmt: skip
POSITIONS = torch.arange(77)[None]


def pasd(variant: str) -> State:
    return PASDUNet(PASDUNetConfig(**vars(UNET), variant=variant)).state_dict()


def start(state: Mapping[str, Tensor], beginning: str) -> State:
    return {key: tensor for key, tensor in state.items() if key.startswith(beginning)}


def without(state: Mapping[str, Tensor], beginning: str) -> State:
    return {key: tensor for key, tensor in state.items() if not key.startswith(beginning)}


def under(prefix: str, state: Mapping[str, Tensor]) -> State:
    return {prefix + key: tensor for key, tensor in state.items()}


def bare(prefix: str, state: Mapping[str, Tensor]) -> State:
    return {key.removeprefix(prefix): tensor for key, tensor in state.items()}


torch.manual_seed(0)
CLIP: State = CLIPModel(clip_config(20)).state_dict()
PARTS: dict[str, State] = {
    "unet": UNet(UNET).state_dict(),
    "vae": AutoencoderKL(VAE).state_dict(),
    "text_encoder": start(CLIP, "text_model."),
}
TEXT, VISION = PARTS["text_encoder"], start(CLIP, "vision_model.")
ESRGAN: State = RRDBNet(RRDB).state_dict()
LDM = to_ldm(PARTS) | SCHEDULE
BARE_TEXT = {key.removeprefix("text_model."): tensor for key, tensor in TEXT.items()}
AVERAGES = {ema_name(key): tensor + 1 for key, tensor in start(LDM, U).items()}
COUNTERS = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
LOSSES = {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.zeros(4, 3, 4, 4)}
LORA = {f"lora_unet_mid_block_attentions_0_proj_in.lora_{end}.weight": torch.zeros(2, 2) for end in ("up", "down")}  # fmt: skip
OLD_ATTENTION = (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn"))


def to_ldm_bare(part: str) -> State:
    """A part under LDM's names without their prefix."""
    prefix = U if part == "unet" else V
    return {key.removeprefix(prefix): tensor for key, tensor in to_ldm({part: PARTS[part]}).items()}


def old_vae(vae: Mapping[str, Tensor]) -> State:
    """The attention names of diffusers before 0.17."""
    renamed = dict(vae)
    for half in ("encoder", "decoder"):
        for new, old in OLD_ATTENTION:
            for end in ("weight", "bias"):
                place = f"{half}.mid_block.attentions.0."
                renamed[f"{place}{old}.{end}"] = renamed.pop(f"{place}{new}.{end}")
    return renamed


def esrgan_first(state: Mapping[str, Tensor], blocks: int) -> State:
    """The names of ESRGAN's first code, a Sequential: written down here a second time,
    from its published models.
    """
    ends = {"conv_first": "0", "conv_body": f"1.sub.{blocks}", "conv_up1": "3", "conv_up2": "6", "conv_hr": "8", "conv_last": "10"}  # fmt: skip
    renamed = {}
    for key, tensor in state.items():
        path, _, end = key.rpartition(".")
        inner = re.sub(r"^body\.(\d+)\.rdb(\d)\.conv(\d)$", r"1.sub.\1.RDB\2.conv\3.0", path)
        renamed[f"model.{ends.get(path, inner)}.{end}"] = tensor
    return renamed


def esrgan_second(state: Mapping[str, Tensor]) -> State:
    """Those of its second code."""
    names = {"conv_body": "trunk_conv", "conv_up1": "upconv1", "conv_up2": "upconv2", "conv_hr": "HRconv"}
    renamed = {}
    for key, tensor in state.items():
        path, _, end = key.rpartition(".")
        inner = re.sub(r"^body\.(\d+)\.rdb(\d)", r"RRDB_trunk.\1.RDB\2", path)
        renamed[f"{names.get(path, inner)}.{end}"] = tensor
    return renamed


def moved_to(dtype: torch.dtype, state: Mapping[str, Tensor]) -> State:
    return {key: tensor.to(dtype) for key, tensor in state.items()}


def added(state: Mapping[str, Tensor]) -> State:
    return {key: tensor for key, tensor in state.items() if ".pixel_attentions." in key or "_plus." in key}


FEW_BLOCKS: State = RRDBNet(RRDBConfig(num_feat=8, num_block=3, num_grow_ch=4)).state_dict()
CONTROL: State = ControlNet(CONTROLNET).state_dict()
PLAIN_CONTROL: State = ControlNet(replace(CONTROLNET, to_rgb=False)).state_dict()
PASD = {variant: pasd(variant) for variant in ("full", "light", "eq2")}
AVERAGED = {key: tensor + 1 for key, tensor in PARTS["unet"].items()}
BASE = {part: PARTS[part] for part in ("unet", "vae")}

# What it is -> tensors as a file has them, and what they are.
LAYOUTS: dict[str, tuple[State, dict[str, State]]] = {
    "single file": (LDM, PARTS),
    "without schedule": (without(LDM, "betas"), PARTS),
    "with averages": (LDM | AVERAGES | COUNTERS, PARTS | {"unet": AVERAGED}),
    "averages first": (COUNTERS | AVERAGES | LDM, PARTS | {"unet": AVERAGED}),
    "with some averages only": (LDM | without(AVERAGES, "model_ema.diffusion_modelout2bias") | COUNTERS, PARTS),
    "counters only": (LDM | COUNTERS, PARTS),
    "without autoencoder": (without(LDM, V), {part: PARTS[part] for part in ("unet", "text_encoder")}),
    "without text encoder": (without(LDM, T), BASE),
    "U-Net alone": (start(LDM, U), {"unet": PARTS["unet"]}),
    "U-Net alone, no model.": (under("diffusion_model.", to_ldm_bare("unet")), {"unet": PARTS["unet"]}),
    "U-Net alone, no prefix": (to_ldm_bare("unet"), {"unet": PARTS["unet"]}),
    "text encoder alone": (start(LDM, T), {"text_encoder": TEXT}),
    "text encoder without text_model.": (without(LDM, T) | under(T, BARE_TEXT), PARTS),
    "with positions": (LDM | {f"{T}text_model.embeddings.position_ids": POSITIONS}, PARTS),
    "with bare positions": (without(LDM, T) | under(T, BARE_TEXT) | {f"{T}embeddings.position_ids": POSITIONS}, PARTS),
    "with losses and logvar": (LDM | under(V, LOSSES) | {"logvar": torch.zeros(1000), "scale_factor": torch.zeros(())}, PARTS),
    "from DataParallel": (under("module.", LDM), PARTS),
    "autoencoder in LDM's names": (to_ldm_bare("vae") | LOSSES, {"vae": PARTS["vae"]}),
    "autoencoder under its prefix": (start(LDM, V), {"vae": PARTS["vae"]}),
    "autoencoder": (PARTS["vae"], {"vae": PARTS["vae"]}),
    "autoencoder with old attention": (old_vae(PARTS["vae"]), {"vae": PARTS["vae"]}),
    "U-Net": (PARTS["unet"], {"unet": PARTS["unet"]}),
    "text encoder": (TEXT | {"text_model.embeddings.position_ids": POSITIONS}, {"text_encoder": TEXT}),
    "text encoder of transformers 5": (BARE_TEXT | {"embeddings.position_ids": POSITIONS}, {"text_encoder": TEXT}),
    "CLIP": (CLIP | {"vision_model.embeddings.position_ids": POSITIONS}, {"clip": CLIP}),
    "CLIP's vision half": (VISION, {"clip_vision": VISION}),
    "CLIP's vision half, bare": ({k.removeprefix("vision_model."): t for k, t in VISION.items()}, {"clip_vision": VISION}),
    "ESRGAN": (ESRGAN, {"rrdb": ESRGAN}),
    "ESRGAN, first names": (esrgan_first(FEW_BLOCKS, 3), {"rrdb": FEW_BLOCKS}),
    "ESRGAN, second names": (esrgan_second(FEW_BLOCKS), {"rrdb": FEW_BLOCKS}),
    "ESRGAN from DataParallel": (under("module.", esrgan_second(ESRGAN)), {"rrdb": ESRGAN}),
    "PASD": (PASD["full"], {"unet": PASD["full"]}),
    "PASD light": (PASD["light"], {"unet": PASD["light"]}),
    "PASD, Eq. 2": (PASD["eq2"], {"unet": PASD["eq2"]}),
    "ControlNet": (CONTROL, {"controlnet": CONTROL}),
    "ControlNet, no heads": (without(CONTROL, "controlnet_cond_embedding.to_rgbs"), {"controlnet": without(CONTROL, "controlnet_cond_embedding.to_rgbs")}),
    "PASD without its base": (pack_delta(PASD["full"], CONTROL, torch.float32), {"pasd_added": added(PASD["full"]), "controlnet": CONTROL}),
    "PASD light without its base": (pack_delta(PASD["light"], CONTROL, torch.float32), {"pasd_added": added(PASD["light"]), "controlnet": CONTROL}),
    "LoRA": (LORA, {"lora": LORA}),
    "ControlNet of its authors": (to_ldm({"controlnet": PLAIN_CONTROL}), {"controlnet": PLAIN_CONTROL}),
    "ControlNet of its authors, no prefix": (bare("control_model.", to_ldm({"controlnet": PLAIN_CONTROL})), {"controlnet": PLAIN_CONTROL}),
    "ControlNet within a model": (LDM | to_ldm({"controlnet": PLAIN_CONTROL}), PARTS | {"controlnet": PLAIN_CONTROL}),
    "ControlNet in a trainer's wrapper": (under("state_dict.", to_ldm({"controlnet": PLAIN_CONTROL})), {"controlnet": PLAIN_CONTROL}),
    "marked for v": (LDM | {"v_pred": torch.empty(0), "ztsnr": torch.empty(0)}, PARTS),
    "laid flat": (under("state_dict.", LDM), PARTS),
    "text encoder with projection": (TEXT | {"text_projection.weight": torch.zeros(8, 16)}, {"text_encoder": TEXT}),
}  # fmt: skip


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    """Keys, dtypes and values; the order is free."""
    return found.keys() == expected.keys() and all(
        found[key].dtype == tensor.dtype and torch.equal(found[key], tensor)
        for key, tensor in expected.items()
    )


def check_accounts(contents: Contents) -> None:
    """Every key of the file is in exactly one list."""
    lists = [*contents.names, *contents.ignored, *contents.unknown]
    assert len(lists) == len(set(lists)) and set(lists) == set(contents.state)


def refusal(act: Callable[[], Any]) -> str:
    """The one line of a WeightsError."""
    with pytest.raises(WeightsError) as refused:
        act()
    line = str(refused.value)
    assert "\n" not in line and line.startswith("x.ckpt: ") and len(line) < 300, line
    return line


@pytest.mark.parametrize("case", LAYOUTS)
def test_every_layout_gives_the_same_tensors(case: str) -> None:
    state, expected = LAYOUTS[case]
    contents = read_contents(state)
    assert set(contents.parts) == set(expected) and not contents.unknown
    for part, tensors in expected.items():
        assert same(contents.tensors(part), tensors), part
    check_accounts(contents)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "case", ["single file", "with averages", "autoencoder with old attention", "ESRGAN, first names"]
)
def test_dtypes_stay_as_they_are(case: str, dtype: torch.dtype) -> None:
    state, expected = LAYOUTS[case]
    contents = read_contents(moved_to(dtype, state))
    for part, tensors in expected.items():
        assert same(contents.tensors(part), moved_to(dtype, tensors))


def test_mixed_dtypes_stay_mixed() -> None:
    contents = read_contents(moved_to(torch.float16, start(LDM, U)) | without(LDM, U))
    assert {t.dtype for t in contents.tensors("unet").values()} == {torch.float16}
    assert {t.dtype for t in contents.tensors("vae").values()} == {torch.float32}


@pytest.mark.parametrize("case", [case for case in LAYOUTS if case != "PASD without its base"])
def test_no_tensor_is_copied(case: str) -> None:
    state, expected = LAYOUTS[case]
    contents = read_contents(state)
    places = {tensor.data_ptr() for tensor in state.values()}
    assert all(t.data_ptr() in places for part in expected for t in contents.tensors(part).values())


def test_averages_are_taken_all_or_none() -> None:
    all_of_them = read_contents(LDM | AVERAGES | COUNTERS)
    assert "averaged" in all_of_them.layout
    assert set(all_of_them.ignored) == {*SCHEDULE, *COUNTERS, *start(LDM, U)}
    for missing in list(AVERAGES)[::29]:
        averages = {key: tensor for key, tensor in AVERAGES.items() if key != missing}
        some = read_contents(LDM | averages)
        assert "averaged" not in some.layout and same(some.tensors("unet"), PARTS["unet"])
        assert set(some.ignored) == {*SCHEDULE, *averages}


@pytest.mark.parametrize(
    ("state", "layout"),
    [(LDM, "a Stable Diffusion 1.x single file"), (to_ldm_bare("vae"), "LDM's autoencoder"), (start(LDM, V), "LDM's autoencoder"),
     (start(LDM, T), "a Stable Diffusion 1.x single file"), (ESRGAN, "one net (rrdb)"), (esrgan_second(ESRGAN), "one net (rrdb, older names)"),
     (PASD["light"], "one net (pasd_unet)"), (LORA, "a LoRA"), (LAYOUTS["PASD without its base"][0], "PASD without its base (compact export)")],
)  # fmt: skip
def test_the_layout_is_said_in_words(state: State, layout: str) -> None:
    assert read_contents(state).layout == layout


# ---- what does not belong ----------------------------------------------------------------------------------


def test_tensors_of_no_net_are_refused_when_a_part_is_taken() -> None:
    strays = {"hypernetwork.initial": torch.zeros(2), "module.extra": torch.zeros(2)}
    contents = read_contents(LDM | strays, "x.ckpt")
    assert contents.unknown == tuple(strays) and contents.parts == ("unet", "vae", "text_encoder")
    line = refusal(lambda: contents.tensors("unet"))
    assert "2 tensors belong to no net" in line and "'hypernetwork.initial'" in line
    assert same(contents.renamed("unet"), PARTS["unet"])
    check_accounts(contents)


def test_what_other_programs_save_along_is_ignored() -> None:
    inert = (
        "cond_stage_model.logit_scale",
        "cond_stage_model.text_projection",
        "denoiser.sigmas",
        "embedding_manager.x",
    )
    contents = read_contents(LDM | dict.fromkeys(inert, torch.zeros(2)), "x.ckpt")
    assert not contents.unknown and set(inert) <= set(contents.ignored)


def test_the_attention_names_that_diffusers_converter_left() -> None:
    ours = {".attn_1.q.": "to_q", ".attn_1.k.": "to_k", ".attn_1.v.": "to_v", ".attn_1.proj_out.": "to_out.0"}
    mixed = {}
    for key, tensor in LDM.items():
        for old, new in ours.items():
            key = key.replace(old, f".attn_1.{new}.")
        mixed[key] = tensor
    assert mixed.keys() != LDM.keys()
    assert same(read_contents(mixed, "x.ckpt").tensors("vae"), PARTS["vae"])


@pytest.mark.parametrize(
    ("part", "state", "key"),
    [("unet", PARTS["unet"], "extra.weight"), ("vae", to_ldm_bare("vae"), "extra.weight"), ("rrdb", esrgan_second(ESRGAN), "extra"),
     ("unet", LDM, f"{U}extra.weight"), ("vae", LDM, f"{V}extra.weight"), ("text_encoder", LDM, f"{T}extra.weight")],
)  # fmt: skip
def test_a_stray_tensor_of_a_net_keeps_its_name_for_strict_loading_to_find(
    part: str, state: State, key: str
) -> None:
    found = read_contents(state | {key: torch.zeros(1)}).tensors(part)
    prefix = {"unet": U, "vae": V, "text_encoder": T}.get(part, "")
    assert key.removeprefix(prefix) in found


def test_a_part_that_is_not_there_is_named_with_what_is() -> None:
    contents = read_contents(without(LDM, V), "x.ckpt")
    assert refusal(lambda: contents.tensors("vae")) == (
        "x.ckpt: a Stable Diffusion 1.x single file, has no vae; it has unet, text_encoder"
    )
    assert contents.renamed("vae") == {}


TWICE: dict[str, State] = {
    "old and new attention": PARTS["vae"] | {"encoder.mid_block.attentions.0.query.weight": torch.zeros(16, 16)},
    "with and without text_model.": LDM | {f"{T}final_layer_norm.weight": torch.zeros(16), f"{T}embeddings.token_embedding.weight": torch.zeros(20, 16)},
    "bare and not": BARE_TEXT | {"text_model.final_layer_norm.weight": torch.zeros(16)},
    "LDM's and canonical": LDM | {f"{U}conv_in.weight": torch.zeros(8, 4, 3, 3)},
    "autoencoder, LDM's and canonical": LDM | {f"{V}encoder.conv_norm_out.bias": torch.zeros(8)},
    "ESRGAN, old and new": esrgan_second(ESRGAN) | {"conv_body.weight": ESRGAN["conv_body.weight"]},
}  # fmt: skip


@pytest.mark.parametrize("case", TWICE)
def test_a_tensor_under_two_names_is_refused(case: str) -> None:
    line = refusal(lambda: read_contents(TWICE[case], "x.ckpt"))
    assert "two of its tensors are the same one of the net" in line


def meta(net: Any, config: Any) -> State:
    with torch.device("meta"):
        return net(config).state_dict()


SD2 = meta(UNet, replace(UNET, cross_attention_dim=1024, use_linear_projection=True))
one = torch.empty(1, device="meta")
FOREIGN: dict[str, tuple[State, str]] = {
    "SD 2.x single file": (to_ldm({"unet": SD2, "vae": PARTS["vae"]}) | {"cond_stage_model.model.positional_embedding": one}, "Stable Diffusion 2.x single file"),
    "SD 2.x single file without text": (to_ldm({"unet": SD2, "vae": PARTS["vae"]}), "U-Net of Stable Diffusion 2.x"),
    "SD 2.x U-Net": (SD2, "U-Net of Stable Diffusion 2.x"),
    "SDXL single file": (LDM | {"conditioner.embedders.0.transformer.text_model.final_layer_norm.bias": one}, "SDXL single file"),
    "SDXL single file without text": (to_ldm({"unet": meta(UNet, replace(SDXL_UNET, addition_embed_type=None))}) | {f"{U}label_emb.0.0.weight": one}, "SDXL single file"),
    "SDXL U-Net": (meta(UNet, SDXL_UNET), "SDXL U-Net"),
    "instruct-pix2pix single file": (to_ldm({"unet": meta(UNet, replace(UNET, in_channels=8))}), "U-Net of 8 input channels"),
    "instruct-pix2pix": (meta(UNet, replace(UNET, in_channels=8)), "a picture (instruct-pix2pix"),
    "depth": (meta(UNet, replace(UNET, in_channels=5)), "a depth map"),
    "x4 upscaler": (meta(UNet, replace(UNET, in_channels=7)), "a small picture"),
    "Zero123": (to_ldm({"unet": meta(UNet, replace(UNET, in_channels=8))}) | {"cc_projection.weight": one}, "Zero123"),
    "ControlNet of SD 2": (to_ldm({"controlnet": meta(ControlNet, replace(CONTROLNET, cross_attention_dim=1024, to_rgb=False))}), "a ControlNet of Stable Diffusion 2.x"),
    "ControlNet of SDXL": (meta(ControlNet, replace(CONTROLNET, cross_attention_dim=2048)), "a ControlNet of SDXL"),
    "ControlNet as a difference": (to_ldm({"controlnet": PLAIN_CONTROL}) | {"difference": torch.tensor(1.0)}, "as the difference to its U-Net"),
    "Control-LoRA": (to_ldm({"controlnet": PLAIN_CONTROL}) | {"lora_controlnet": torch.empty(0)}, "Control-LoRA"),
    "T2I-Adapter": ({"adapter.body.0.resnets.0.block1.weight": one, "adapter.conv_in.weight": one}, "T2I-Adapter"),
    "T2I-Adapter of its authors": ({"body.0.block1.weight": one, "conv_in.weight": one}, "T2I-Adapter"),
    "IP-Adapter": ({"image_proj.proj.weight": one, "ip_adapter.1.to_k_ip.weight": one}, "IP-Adapter"),
    "GLIGEN": (PARTS["unet"] | {"position_net.linears.0.weight": one}, "GLIGEN"),
    "autoencoder of SD 3": (without(without(meta(AutoencoderKL, replace(VAE, latent_channels=16)), "quant_conv"), "post_quant_conv"), "16 latent channels without quant_conv"),
    "optimizer": ({"state.0.exp_avg": one, "state.0.exp_avg_sq": one}, "state of an optimizer"),
    "4 bits": (PARTS["unet"] | {"mid_block.attentions.0.proj_in.weight.quant_state.bitsandbytes__nf4": one}, "4 bits (bitsandbytes)"),
    "SD 3": ({f"{U}joint_blocks.0.context_block.attn.qkv.weight": one}, "Stable Diffusion 3"),
    "FLUX": ({"double_blocks.0.img_attn.proj.weight": one, "single_blocks.0.linear1.weight": one}, "FLUX"),
    "FLUX single file": ({f"{U}double_blocks.0.img_attn.proj.weight": one}, "FLUX"),
    "OpenAI CLIP": ({"visual.class_embedding": one, "visual.transformer.resblocks.0.ln_1.bias": one, "text_projection": one}, "OpenAI's layout"),
    "embedding": ({"emb_params": torch.zeros(2, 768)}, "textual inversion"),
    "old embedding": ({"string_to_param": one}, "textual inversion"),
    "AnimateDiff": (PARTS["unet"] | {"down_blocks.0.motion_modules.0.norm.weight": one}, "AnimateDiff"),
    "something else": ({"layers.0.weight": one}, "no family known here"),
    "nothing": ({}, "no family known here"),
    "only schedules": (dict(SCHEDULE), "no family known here"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOREIGN)
def test_what_nothing_here_runs_is_refused_in_one_line(case: str) -> None:
    state, message = FOREIGN[case]

    def read() -> None:
        contents = read_contents(state, "x.ckpt")
        net_config(contents.tensors(contents.parts[0]), None, "x.ckpt")

    assert message in refusal(read)


@pytest.mark.parametrize("case", ["with averages", "text encoder without text_model.", "autoencoder with old attention",
                                  "ESRGAN, first names", "PASD light without its base"])  # fmt: skip
def test_damage_raises_nothing_but_one_line(case: str) -> None:
    state, _ = LAYOUTS[case]
    for key in list(state)[::7]:
        rest = {other: tensor for other, tensor in state.items() if other != key}
        for damaged in (
            rest,
            rest | {f"{key}.x": state[key]},
            *(state | {key: torch.empty(shape)} for shape in ((), (0,), (3, 9, 1, 1))),
        ):
            try:
                contents = read_contents(damaged, "x.ckpt")
                check_accounts(contents)
                for part in {*contents.parts} - {"pasd_added"}:
                    net_config(contents.tensors(part), None, "x.ckpt")
            except WeightsError as error:
                assert "\n" not in str(error) and str(error).startswith("x.ckpt: ")


def test_a_checkpoint_of_a_trainer_is_read_the_same(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "state_dict": LDM | AVERAGES, "optimizer_states": []}, tmp_path / "model.ckpt")
    contents = read_contents(read_state_dict(tmp_path / "model.ckpt"))
    assert all(
        same(contents.tensors(part), tensors) for part, tensors in (PARTS | {"unet": AVERAGED}).items()
    )
