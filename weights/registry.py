"""Known models by name: where each comes from, what its files are, and under which licence.

Data only: nothing is looked up or downloaded here. Sizes are in bytes; a sha256 is that of the whole file as its host gives it.
Copying  this file and files.py; standard library, and torch and safetensors through files.py
"""

from dataclasses import dataclass
from pathlib import Path

from .files import WeightsError

MINI = Path(__file__).resolve().parent / "mini"  # the bundle that is part of the checkout

OPENRAIL = (
    "CreativeML OpenRAIL-M: restrictions on use, which pass on to whoever gets the weights or a derived model"
)


@dataclass(frozen=True)
class ModelFile:
    """One file of a model. `size` and `sha256` are None where they are not known to us."""

    part: str  # unet, vae, clip, controlnet, rrdb, tokenizer, or "all" for one file with every part
    file: str  # path inside the repository, or inside weights/mini/ for the bundle
    repo: str | None = None  # Hugging Face repository; None: inside the checkout, or at `url`
    url: str | None = None  # where it is not on the hub
    size: int | None = None  # bytes
    sha256: str | None = None  # 64 hexadecimal digits


@dataclass(frozen=True)
class Model:
    """A name that `--model` takes."""

    name: str
    what: str  # one line
    licence: str
    files: tuple[ModelFile, ...]
    loadable: bool  # False: known, loads from the next release


_SD = "stable-diffusion-v1-5/stable-diffusion-v1-5"
_PASD = "yangtao9009/PASD"
_CLIP_L = ModelFile(
    "clip", "model.safetensors", "openai/clip-vit-large-patch14", None, 1_710_540_580,
    "a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb",
)  # fmt: skip


def _pasd(name: str, folder: str, what: str) -> Model:
    # Sizes and hashes of these files are not known to us.
    weights = "diffusion_pytorch_model.safetensors"
    files = tuple(ModelFile(part, f"{folder}/{part}/{weights}", _PASD) for part in ("unet", "controlnet"))
    return Model(
        name, what, "Apache-2.0; works on top of Stable Diffusion 1.5 (OpenRAIL-M)", files, loadable=False
    )


def _esrgan(name: str, what: str, release: str, file: str, size: int, sha256: str) -> Model:
    url = f"https://github.com/xinntao/Real-ESRGAN/releases/download/{release}/{file}"
    return Model(
        name, what, "BSD-3-Clause", (ModelFile("rrdb", file, None, url, size, sha256),), loadable=False
    )


_ALL = (
    Model(
        "mini", "small nets of the same classes, trained here on synthetic scenes; part of the checkout", "Apache-2.0",
        tuple(ModelFile(part, f"{part}.safetensors") for part in ("vae", "clip", "unet", "rrdb"))
        + (ModelFile("tokenizer", "tokenizer.json"),),
        loadable=True,
    ),
    Model(
        "sd-v1-4", "Stable Diffusion 1.4, one file", OPENRAIL,
        (ModelFile("all", "sd-v1-4.ckpt", "CompVis/stable-diffusion-v-1-4-original", None, 4_265_380_512,
                   "fe4efff1e174c627256e44ec2991ba279b3816e364b49f9be2abc0b3ff3f8556"), _CLIP_L),
        loadable=False,
    ),
    Model(
        "sd-v1-5", "Stable Diffusion 1.5, one file", OPENRAIL,
        (ModelFile("all", "v1-5-pruned-emaonly.safetensors", _SD, None, 4_265_146_304,
                   "6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa"), _CLIP_L),
        loadable=False,
    ),
    _pasd("pasd", "pasd/checkpoint-100000", "Pixel-Aware Stable Diffusion: super-resolution, stylisation"),
    _pasd("pasd-light", "pasd_light/checkpoint-120000", "PASD with pixel attention inside the text blocks"),
    _esrgan("realesrgan-x4plus", "Real-ESRGAN, photographs, x 4", "v0.1.0", "RealESRGAN_x4plus.pth", 67_040_989,
            "4fa0d38905f75ac06eb49a7951b426670021be3018265fd191d2125df9d682f1"),
    _esrgan("realesrgan-x2plus", "Real-ESRGAN, photographs, x 2", "v0.2.1", "RealESRGAN_x2plus.pth", 67_061_725,
            "49fafd45f8fd7aa8d31ab2a22d14d91b536c34494a5cfe31eb5d89c2fa266abb"),
    _esrgan("realesrgan-anime", "Real-ESRGAN, drawings, x 4", "v0.2.2.4", "RealESRGAN_x4plus_anime_6B.pth", 17_938_799,
            "f872d837d3c90ed2e05227bed711af5671a6fd1c9f7d7e91c911a61f155e99da"),
)  # fmt: skip

MODELS = {model.name: model for model in _ALL}


def find_model(name: str) -> Model:
    """The model of that name, loadable or not. Raises WeightsError naming the known ones."""
    if name not in MODELS:
        raise WeightsError(
            f"no model is called {name!r}; known: {', '.join(MODELS)}; or give the path of a model's folder"
        )
    return MODELS[name]


def model_files(name: str) -> dict[str, Path]:
    """Part -> file on this machine, for a model that can be loaded. Raises WeightsError for any other name, or a missing file."""
    model = find_model(name)
    if not model.loadable:
        ready = ", ".join(known.name for known in MODELS.values() if known.loadable)
        raise WeightsError(f"{name} is known but loads from the next release; this one loads: {ready}")
    paths = {file.part: MINI / file.file for file in model.files}
    if missing := [path for path in paths.values() if not path.is_file()]:
        raise WeightsError(
            f"{missing[0]}: missing, though it is part of the checkout; restore it with `git checkout weights/mini`"
        )
    return paths
