"""Picture files in and out: 8-bit pixels as they are in the file, masks, metadata.

Tensors  image (1, 3, H, W) float in [-1, 1]; mask (1, 1, H, W) in {0, 1}, 1 = edit; pixels (H, W, 3) uint8
Copying  needs files.py; numpy, torch and Pillow

A picture's bytes are kept as they are, with their colour profile, so that an edit can return every byte
outside its mask unchanged. 16-bit files are read at 8 bits: grey ones rounded, colour PNGs cut off by Pillow.
"""

import io
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ..files import whole_file

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")  # that are written
LONGEST = {".webp": 16383, ".jpg": 65500, ".jpeg": 65500}  # pixels a side that a format can hold
# Of files that a folder is searched for; what they are is told by their content.
READ_SUFFIXES = (*SUFFIXES, ".tif", ".tiff", ".bmp", ".gif")
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF")  # that are read; not EPS, which runs Ghostscript


@dataclass(frozen=True)
class Photo:
    """A picture as read: upright, 8-bit RGB, in the colours of `icc_profile` (None: take it as sRGB)."""

    pixels: np.ndarray  # (H, W, 3) uint8
    alpha: np.ndarray | None = None  # (H, W) uint8, 255 = opaque; None for a picture without transparency
    icc_profile: bytes | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.pixels.shape[0], self.pixels.shape[1]

    @property
    def image(self) -> Tensor:
        """The pixels as a (1, 3, H, W) tensor in [-1, 1]."""
        return to_image(self.pixels)


def load_image(path: str | Path, *, to_srgb: bool = False) -> Photo:
    """Read a picture of one of FORMATS, told by its content: the first frame, upright by its EXIF
    orientation.

    An RGB picture keeps its bytes and its colour profile; with `to_srgb`, and for CMYK always, colours are
    converted to sRGB instead. FileNotFoundError if there is no such file; ValueError if it is not a whole
    picture or is too large.
    """
    picture = _open(path)
    profile = picture.info.get("icc_profile")
    alpha = None
    if _has_alpha(picture):
        picture = picture.convert("RGBA")
        alpha = np.array(picture.getchannel("A"))
    if profile and picture.mode in ("RGB", "RGBA", "P", "CMYK") and (to_srgb or picture.mode == "CMYK"):
        picture, profile = _convert_to_srgb(picture, profile), None
    elif picture.mode not in ("RGB", "RGBA", "P"):
        profile = None  # a grey (or Lab, ...) profile does not describe the RGB that we return
    return Photo(np.array(picture.convert("RGB")), alpha, profile)


def load_mask(path: str | Path, *, invert: bool = False, from_alpha: bool = False) -> Tensor:
    """Read a mask of any mode as (1, 1, H, W) in {0, 1}: 128 of 255 and more is 1, edit.

    `from_alpha`: transparent is edit. Otherwise grey counts, and transparent is black. `invert` swaps the two
    at the end. ValueError as `load_image`, or if `from_alpha` finds no transparency.
    """
    picture = _open(path)
    has_alpha = _has_alpha(picture)
    if from_alpha:
        if not has_alpha:
            raise ValueError(
                f"{path}: a {picture.mode} picture without transparency; a mask from alpha needs some"
            )
        mask = mask_from_alpha(np.array(picture.convert("RGBA").getchannel("A")))
    else:
        if has_alpha:
            picture = Image.alpha_composite(
                Image.new("RGBA", picture.size, (0, 0, 0, 255)), picture.convert("RGBA")
            )
        grey = picture.convert("RGB").convert("L")  # by way of RGB: Lab knows no direct way
        mask = torch.from_numpy(np.array(grey) >= 128).float()[None, None]
    return 1 - mask if invert else mask


def mask_from_alpha(alpha: np.ndarray) -> Tensor:
    """The mask (1, 1, H, W) of an (H, W) uint8 alpha channel: transparent (below 128) is 1, edit."""
    return torch.from_numpy(alpha < 128).float()[None, None]


def save_image(
    image: np.ndarray | Tensor,
    path: str | Path,
    *,
    metadata: Mapping[str, Any] | None = None,
    alpha: np.ndarray | None = None,
    icc_profile: bytes | None = None,
    quality: int = 95,
) -> None:
    """Write a picture as PNG or WebP (both lossless) or JPEG, by the suffix of `path`.

    `image` is (H, W, 3) uint8 or (1, 3, H, W) in [-1, 1]; `quality` is JPEG's, 1 to 95.
    `metadata` (JSON-able) goes into a PNG's text as `parameters` (to be read by people; its "prompt" first)
    and `msbd` (JSON), into the EXIF user comment of the others. `alpha` is (H, W) uint8. The file appears
    whole or not at all, replacing an older one. ValueError for an unknown suffix or for transparency in a
    JPEG.
    """
    path = Path(path)
    suffix = check_output_path(path)
    pixels = image if isinstance(image, np.ndarray) else to_pixels(image)
    if alpha is not None and suffix in (".jpg", ".jpeg"):
        raise ValueError(f"{path}: JPEG has no transparency, which the picture has; save it as .png or .webp")
    picture = Image.fromarray(pixels if alpha is None else np.dstack([pixels, alpha]))
    options: dict[str, Any] = {"icc_profile": icc_profile} if icc_profile else {}
    if suffix == ".png":
        options |= {"format": "PNG", "pnginfo": _png_text(metadata)}
    else:
        options["exif"] = _exif(metadata)
        if suffix == ".webp":
            # exact: without it colours under full transparency are thrown away
            options |= {"format": "WEBP", "lossless": True, "exact": True}
        else:  # 4:4:4: halved colour would show at the edge of an edit
            options |= {"format": "JPEG", "quality": quality, "subsampling": 0}
    with whole_file(path) as unfinished:
        picture.save(unfinished, **options)


def check_output_path(path: str | Path, size: tuple[int, int] = (1, 1)) -> str:
    """The suffix of `path`; ValueError if `save_image` could not write `size` (H, W) there, said before the
    work is done.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(
            f"{path}: cannot write pictures of type {suffix or '(no suffix)'!r}; use one of {', '.join(SUFFIXES)}"
        )
    if not path.parent.is_dir():
        raise ValueError(f"{path}: the folder {path.parent} does not exist")
    if max(size) > (longest := LONGEST.get(suffix, max(size))):
        raise ValueError(
            f"{path}: {suffix} holds at most {longest} pixels a side, not {max(size)}; write a .png"
        )
    return suffix


def to_image(pixels: np.ndarray) -> Tensor:
    """(H, W, C) uint8 -> (1, C, H, W) float32 in [-1, 1]; `to_pixels` gives exactly the same bytes back."""
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None].float() / 127.5 - 1


def to_pixels(image: Tensor) -> np.ndarray:
    """(1, C, H, W) in [-1, 1] -> (H, W, C) uint8, clamped and rounded (the official code truncates)."""
    levels = ((image[0].detach().float().cpu() + 1) * 127.5).round().clamp(0, 255)
    return levels.permute(1, 2, 0).to(torch.uint8).contiguous().numpy()


def parameters_text(metadata: Mapping[str, Any]) -> str:
    """`metadata` for people: prompt, negative prompt, then "Key: value" pairs on one line."""
    rest = {
        key: value
        for key, value in metadata.items()
        if key not in ("prompt", "negative_prompt") and value is not None
    }
    lines = [str(metadata.get("prompt", ""))]
    if metadata.get("negative_prompt"):
        lines.append(f"Negative prompt: {metadata['negative_prompt']}")
    lines.append(", ".join(f"{key.replace('_', ' ').capitalize()}: {value}" for key, value in rest.items()))
    return "\n".join(line for line in lines if line)


def first_frame(file: Path | BinaryIO) -> Image.Image:
    """The first frame of a file of one of FORMATS, read and upright; raises whatever Pillow raises."""
    with warnings.catch_warnings():
        # Pillow warns from 89 megapixels on, which photographs have; its refusal from 179 on stays.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(file, formats=FORMATS) as opened:
            opened.load()
            return ImageOps.exif_transpose(opened)


def _open(path: str | Path) -> Image.Image:
    """The first frame of a file, read and upright, grey at 8 bits; ValueError for anything unreadable."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        picture = first_frame(path)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path}: too large to be read safely ({error})") from error
    except Exception as error:  # of broken files plugins raise OSError, SyntaxError, struct.error, ...
        empty = path.is_file() and path.stat().st_size == 0
        reason = "the file is empty" if empty else " ".join(str(error).split())
        raise ValueError(f"{path}: not a readable picture ({reason})") from error
    return _from_16_bits(picture, path)


def _has_alpha(picture: Image.Image) -> bool:
    return "transparency" in picture.info or picture.mode in ("LA", "PA", "La", "RGBA", "RGBa")


def _from_16_bits(picture: Image.Image, path: Path) -> Image.Image:
    if not picture.mode.startswith(("I", "F")):
        return picture
    levels = np.asarray(picture)
    if picture.mode == "F" or levels.min() < 0 or levels.max() > 65535:
        raise ValueError(
            f"{path}: {picture.mode} pictures (floating point or 32 bits) are not supported; save it with 8 or 16 bits"
        )
    return Image.fromarray((levels.astype(np.uint32) / 257).round().astype(np.uint8))


def _convert_to_srgb(picture: Image.Image, profile: bytes) -> Image.Image:
    """Through the profile, or Pillow's plain conversion if the profile cannot be used."""
    source = picture.convert("RGB") if picture.mode in ("P", "RGBA") else picture
    try:
        converted = ImageCms.profileToProfile(
            source,
            ImageCms.ImageCmsProfile(io.BytesIO(profile)),
            ImageCms.createProfile("sRGB"),
            outputMode="RGB",
        )
    except (ImageCms.PyCMSError, OSError):
        converted = None
    return converted or source.convert("RGB")


def _png_text(metadata: Mapping[str, Any] | None) -> PngInfo | None:
    if metadata is None:
        return None
    info = PngInfo()
    text = parameters_text(metadata)
    add = info.add_text if text.isascii() else info.add_itxt  # plain text chunks hold Latin-1 only
    add("parameters", text)
    info.add_text("msbd", json.dumps(dict(metadata)))  # ASCII: json escapes the rest
    return info


def _exif(metadata: Mapping[str, Any] | None) -> Image.Exif:
    exif = Image.Exif()
    if metadata is not None:
        # Tag 0x9286, UserComment, in the Exif block 0x8769; its first 8 bytes name the character set.
        exif.get_ifd(0x8769)[0x9286] = b"ASCII\0\0\0" + json.dumps(dict(metadata)).encode("ascii")
    return exif
