"""Known models by name: where each comes from, what its files are, and under which licence.

Data only: nothing is looked up or downloaded here, fetch.py does that. A size or sha256 that is not known to
us is None, never a guess; the sha256 is that of the whole file as its host gives it.
Copying  this file, files.py and pickles.py; standard library, and torch and safetensors through them
"""

from dataclasses import dataclass
from pathlib import Path

from .files import WeightsError

MINI = Path(__file__).resolve().parent / "mini"  # the bundle that is part of the checkout

OPENRAIL = (
    "CreativeML OpenRAIL-M: restrictions on use, which pass on to whoever gets the weights or a derived model"
)

# Repositories that moved: old name -> today's. Old names live on in people's scripts and caches.
RENAMED = {"runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5"}


@dataclass(frozen=True)
class ModelFile:
    """One file of a model, from one of four places: `repo`, `url`, `page`, or (none of them) the checkout."""

    # all (one file with every part), unet, vae, text_encoder, clip, tokenizer, scheduler, controlnet, rrdb,
    # ...
    part: str
    file: str  # path inside the repository or inside weights/mini/; at `url` and `page` the bare name
    repo: str | None = None  # Hugging Face repository
    url: str | None = None  # https; such a file has a size and a sha256, because only they tell what came
    page: str | None = None  # where a person downloads it by hand
    revision: str | None = None  # commit, branch or tag of the repository; None: main
    size: int | None = None  # bytes
    about: int | None = None  # bytes, rounded, where the exact size is not known
    sha256: str | None = None  # 64 hexadecimal digits

    def __post_init__(self) -> None:
        if self.url is not None and (self.size is None or self.sha256 is None):
            raise ValueError(f"{self.url}: a file that comes by url needs its size and sha256")


@dataclass(frozen=True)
class Model:
    """A name that `--model` and `python -m tools.models` take."""

    name: str
    what: str  # one line
    licence: str
    files: tuple[ModelFile, ...]  # no two of one part
    needs: tuple[str, ...] = ()  # models that give the parts this one lacks; see `needed_files`


# Editing needs CLIP (reranking, and the tokenizer that single files do not hold) and an upscaler.
_EDIT = ("clip-vit-l14", "realesrgan-x4plus")
_SD14_FILES = "CompVis/stable-diffusion-v-1-4-original"
_SD14 = "CompVis/stable-diffusion-v1-4"
_SD15 = RENAMED["runwayml/stable-diffusion-v1-5"]
_SD15_ARCHIVE = "Comfy-Org/stable-diffusion-v1-5-archive"
_CLIP_L = "openai/clip-vit-large-patch14"
_PASD = "yangtao9009/PASD"
_BLIP = "Salesforce/blip-image-captioning-base"
_BLIP_LARGE = "Salesforce/blip-image-captioning-large"
_NET = "diffusion_pytorch_model"  # what diffusers calls the weights of any net


def _sd_text(repo: str) -> tuple[ModelFile, ...]:
    """The small files of a Stable Diffusion folder; load_tokenizer looks for merges.txt beside vocab.json."""
    return (
        ModelFile("tokenizer", "tokenizer/vocab.json", repo),
        ModelFile("tokenizer_merges", "tokenizer/merges.txt", repo),
        ModelFile("scheduler", "scheduler/scheduler_config.json", repo),
    )


def _personal(name: str, what: str, licence: str, file: ModelFile) -> Model:
    return Model(name, f"{what}; a base of PASD, and edits too", licence, (file,), _EDIT)


def _pasd(name: str, folder: str, what: str, unet: float, *, own_scheduler: bool = False) -> Model:
    """`folder` with its two nets. The rounded sizes follow from their shapes in float32; hashes are not known
    to us.
    """
    files = []
    for part, about in (("unet", unet), ("controlnet", 1.45)):
        files += [
            ModelFile(part, f"{folder}/{part}/{_NET}.safetensors", _PASD, about=round(about * 1e9)),
            ModelFile(f"{part}_config", f"{folder}/{part}/config.json", _PASD),
        ]
    if own_scheduler:  # beside the checkpoint, because the official code looks for it there
        files.append(ModelFile("scheduler", f"{folder.split('/')[0]}/scheduler/scheduler_config.json", _PASD))
    licence = f"Apache-2.0; made from Stable Diffusion 1.5 and needs it: {OPENRAIL}"
    return Model(name, what, licence, tuple(files), ("sd-v1-5-diffusers",))


def _esrgan(name: str, what: str, release: str, file: str, size: int, sha256: str) -> Model:
    url = f"https://github.com/xinntao/Real-ESRGAN/releases/download/{release}/{file}"
    return Model(name, what, "BSD-3-Clause", (ModelFile("rrdb", file, url=url, size=size, sha256=sha256),))


def _torchvision(name: str, what: str, pictures: str, part: str, file: str, size: int, sha256: str) -> Model:
    licence = f"BSD-3-Clause, as torchvision; the pictures it was trained on ({pictures}) have other terms"
    url = f"https://download.pytorch.org/models/{file}"
    return Model(name, what, licence, (ModelFile(part, file, url=url, size=size, sha256=sha256),))


def _blip_text(repo: str) -> tuple[ModelFile, ...]:
    """The small files of a BLIP folder."""
    return tuple(ModelFile(f"caption_{name}", f"{name}.json", repo) for name in ("config", "tokenizer"))


_ALL = (
    Model(
        "mini", "small nets of the same classes, trained here on synthetic scenes; part of the checkout", "Apache-2.0",
        tuple(ModelFile(part, f"{part}.safetensors") for part in ("vae", "clip", "unet", "rrdb"))
        + (ModelFile("tokenizer", "tokenizer.json"),),
    ),
    Model(
        "mini-pasd", "PASD on the mini bundle: x 4 and repair", "Apache-2.0",
        (ModelFile("all", "pasd.safetensors"),), ("mini",),
    ),
    Model(
        "mini-pasd-color", "PASD on the mini bundle, light variant: colour for grey pictures", "Apache-2.0",
        (ModelFile("all", "pasd-color.safetensors"),), ("mini",),
    ),
    Model(
        "mini-style", "a LoRA that makes the mini bundle draw in red chalk", "Apache-2.0",
        (ModelFile("lora", "style-lora.safetensors"),),
    ),
    Model(
        "sd-v1-4", "Stable Diffusion 1.4, one file", OPENRAIL,
        (ModelFile("all", "sd-v1-4.ckpt", _SD14_FILES, size=4_265_380_512,
                   sha256="fe4efff1e174c627256e44ec2991ba279b3816e364b49f9be2abc0b3ff3f8556"),),
        _EDIT,
    ),
    Model(
        "sd-v1-4-full-ema", "Stable Diffusion 1.4, one file that holds the raw weights beside the averaged ones", OPENRAIL,
        (ModelFile("all", "sd-v1-4-full-ema.ckpt", _SD14_FILES, size=7_703_807_346,
                   sha256="14749efc0ae8ef0329391ad4436feb781b402f4fece4883c7ad8d10556d8a36a"),),
        _EDIT,
    ),
    Model(
        "sd-v1-4-diffusers", "Stable Diffusion 1.4, a diffusers folder", OPENRAIL,
        (ModelFile("unet", f"unet/{_NET}.safetensors", _SD14, about=3_440_000_000),
         ModelFile("vae", f"vae/{_NET}.safetensors", _SD14),
         ModelFile("text_encoder", "text_encoder/model.safetensors", _SD14), *_sd_text(_SD14)),
        _EDIT,
    ),
    Model(
        "sd-v1-5", "Stable Diffusion 1.5, one file", OPENRAIL,
        (ModelFile("all", "v1-5-pruned-emaonly.safetensors", _SD15, size=4_265_146_304,
                   sha256="6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa"),),
        _EDIT,
    ),
    Model(
        "sd-v1-5-fp16", "Stable Diffusion 1.5, one file in float16", OPENRAIL,
        (ModelFile("all", "v1-5-pruned-emaonly-fp16.safetensors", _SD15_ARCHIVE, about=2_130_000_000,
                   sha256="e9476a13728cd75d8279f6ec8bad753a66a1957ca375a1464dc63b37db6e3916"),),
        _EDIT,
    ),
    Model(
        "sd-v1-5-diffusers", "Stable Diffusion 1.5, a diffusers folder in float16", OPENRAIL,
        (ModelFile("unet", f"unet/{_NET}.fp16.safetensors", _SD15, about=1_720_000_000,
                   sha256="c83908253f9a64d08c25fc90874c9c8aef9a329ce1ca5fb909d73b0c83d1ea21"),
         ModelFile("vae", f"vae/{_NET}.fp16.safetensors", _SD15, about=167_000_000,
                   sha256="4fbcf0ebe55a0984f5a5e00d8c4521d52359af7229bb4d81890039d2aa16dd7c"),
         ModelFile("text_encoder", "text_encoder/model.fp16.safetensors", _SD15), *_sd_text(_SD15)),
        _EDIT,
    ),
    Model(
        "clip-vit-l14", "CLIP ViT-L/14: reranking, and the tokenizer of every Stable Diffusion 1.x",
        "MIT, the licence of OpenAI's CLIP code",
        (ModelFile("clip", "model.safetensors", _CLIP_L, size=1_710_540_580,
                   sha256="a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb"),
         ModelFile("tokenizer", "tokenizer.json", _CLIP_L, about=2_220_000)),
    ),
    _esrgan("realesrgan-x4plus", "Real-ESRGAN, photographs, x 4", "v0.1.0", "RealESRGAN_x4plus.pth", 67_040_989,
            "4fa0d38905f75ac06eb49a7951b426670021be3018265fd191d2125df9d682f1"),
    _esrgan("realesrgan-x2plus", "Real-ESRGAN, photographs, x 2", "v0.2.1", "RealESRGAN_x2plus.pth", 67_061_725,
            "49fafd45f8fd7aa8d31ab2a22d14d91b536c34494a5cfe31eb5d89c2fa266abb"),
    _esrgan("realesrgan-anime", "Real-ESRGAN, drawings, x 4", "v0.2.2.4", "RealESRGAN_x4plus_anime_6B.pth", 17_938_799,
            "f872d837d3c90ed2e05227bed711af5671a6fd1c9f7d7e91c911a61f155e99da"),
    # The step in the names of the two rrdb folders is that of the zips of the same weights; the hub's listing
    # was not seen.
    _pasd("pasd", "pasd/checkpoint-100000", "Pixel-Aware Stable Diffusion: super-resolution, stylisation", 4.43),
    _pasd("pasd-rrdb", "pasd_rrdb/checkpoint-100000", "PASD with an RRDB against heavier degradation", 4.43),
    _pasd("pasd-light", "pasd_light/checkpoint-120000", "PASD with pixel attention inside the text blocks", 3.55),
    _pasd("pasd-light-rrdb", "pasd_light_rrdb/checkpoint-100000", "PASD light with an RRDB", 3.55),
    _pasd("pasd-light-color", "pasd_light_color/checkpoint-180000", "PASD light that colours grey photographs", 3.55,
          own_scheduler=True),
    _personal(
        "majicmix-v7", "majicMIX realistic v7, photographs", "its page says \"other\": read it there before use",
        ModelFile("all", "majicmixRealistic_v7.safetensors", page="https://civitai.com/models/43331", size=2_132_625_894,
                  sha256="7c819b6d13663ed720c2254f4fe18373107dfef2448d337913c8fc545640881e"),
    ),
    _personal(
        "majicmix-v6", "majicMIX realistic v6, photographs", "its page says \"other\": read it there before use",
        ModelFile("all", "majicmixRealistic_v6.safetensors", page="https://civitai.com/models/43331", about=2_400_000_000,
                  sha256="e4a30e4607faeb06b5d590b2ed8e092690c631da0b2becb6224d4bb5327104b7"),
    ),
    _personal(
        "toonyou", "ToonYou beta 3, cartoons", "not known to us: read its page before use",
        ModelFile("all", "toonyou_beta3.safetensors", page="https://civitai.com/models/30240", about=2_130_000_000),
    ),
    _personal(
        "mo-di", "mo-di-diffusion, animated films",
        "not known to us: read https://huggingface.co/nitrosocke/mo-di-diffusion before use",
        ModelFile("all", "moDi-v1-pruned.ckpt", "nitrosocke/mo-di-diffusion"),
    ),
    Model(
        "lcm-lora", "a LoRA with which Stable Diffusion 1.5 samples in a few steps", "openrail++, with restrictions on use",
        (ModelFile("lora", "pytorch_lora_weights.safetensors", "latent-consistency/lcm-lora-sdv1-5"),),
    ),
    _torchvision("resnet50", "ResNet-50, IMAGENET1K_V2: names what a picture shows", "ImageNet", "classifier",
                 "resnet50-11ad3fa6.pth", 102_540_417,
                 "11ad3fa62ca79e40addfd354a8ec4b7c75143b3038b8d2a807fbc68deab379ca"),
    _torchvision("fasterrcnn-resnet50-v2", "Faster R-CNN ResNet-50 FPN v2: finds the objects in a picture", "COCO", "detector",
                 "fasterrcnn_resnet50_fpn_v2_coco-dd69338a.pth", 175_221_657,
                 "dd69338a24b8d7381807e247652bdc356325bcbaf1cd3e092e00e0a1a58706bf"),
    Model(
        "blip-base", "BLIP base: describes a picture in words", "BSD-3-Clause",
        (ModelFile("caption", "pytorch_model.bin", _BLIP, size=989_820_849,
                   sha256="d6638651a5526cc2ede56f2b5104d6851b0755816d220e5e046870430180c767"),
         *_blip_text(_BLIP)),
    ),
    Model(
        "blip-large", "BLIP large: describes a picture in words", "BSD-3-Clause",
        (ModelFile("caption", "model.safetensors", _BLIP_LARGE, about=1_880_000_000,
                   sha256="ebc867586b8318647dd7b75ef8e52f93f89b98ac7dcbd04d10219d33b9a68c6f"),
         *_blip_text(_BLIP_LARGE)),
    ),
)  # fmt: skip

MODELS = {model.name: model for model in _ALL}


def find_model(name: str) -> Model:
    """The model of that name. Raises WeightsError naming the known ones."""
    if name not in MODELS:
        raise WeightsError(
            f"no model is called {name!r}; known: {', '.join(MODELS)}; or give the path of a model's folder"
        )
    return MODELS[name]


def needed_files(model: Model) -> tuple[ModelFile, ...]:
    """The model's files, then those of each model it needs whose part is not there yet: all that running it
    takes.
    """
    files = {file.part: file for file in model.files}
    for name in model.needs:
        for file in MODELS[name].files:
            files.setdefault(file.part, file)
    return tuple(files.values())


def current_repo(repo: str) -> str:
    """Today's name of a Hugging Face repository, for a name that a user gave."""
    return RENAMED.get(repo, repo)
