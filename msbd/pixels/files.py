"""Picture files in and out: at their own depth, in their own colours, with what they say of themselves.

Tensors  image (1, 3, H, W) float in [-1, 1], sRGB; mask (1, 1, H, W) in {0, 1}, 1 = edit
Copying  needs files.py, pixels/colours.py, pixels/decode.py, pixels/encode.py, pixels/fill.py,
         pixels/formats.py, pixels/mask_files.py, pixels/metadata.py, pixels/samples.py; numpy and torch

A picture's samples are kept as they are, so that an edit can return every one outside its mask unchanged; the
nets get them converted to sRGB, and what they paint is converted back.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ..files import check_name, whole_file
from . import colours
from .decode import decoded_file
from .encode import JPEG_SUFFIXES, LONGEST, SUFFIXES, Output, encode
from .fill import fill_hidden
from .formats import READ_SUFFIXES as READ_SUFFIXES
from .mask_files import load_mask as load_mask
from .metadata import Metadata
from .samples import in_8_bits, to_image, to_pixels


@dataclass(frozen=True)
class Photo:
    """A picture as read: upright, at its own depth, in the colours of `icc_profile` (None: sRGB)."""

    samples: np.ndarray  # (H, W) grey or (H, W, 3) RGB, uint8 or uint16
    alpha: np.ndarray | None = None  # (H, W), of the samples' type, its greatest value = opaque
    icc_profile: bytes | None = None
    colour_chunks: tuple[tuple[bytes, bytes], ...] = ()  # of a PNG, which says its colours in numbers
    metadata: Metadata = field(default_factory=Metadata)
    notes: tuple[str, ...] = ()  # what was not read, as frames behind the first

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.samples.shape[0], self.samples.shape[1]

    @property
    def model(self) -> str:
        """What the samples are: "grey" or "rgb"."""
        return "grey" if self.samples.ndim == 2 else "rgb"

    @property
    def _converts(self) -> bool:
        """Whether the samples are other numbers than sRGB's."""
        return self.icc_profile is not None and not colours.is_srgb(self.icc_profile, self.model)

    @property
    def _as_rgb(self) -> np.ndarray:
        """The samples with three channels."""
        return self.samples if self.model == "rgb" else np.repeat(self.samples[..., None], 3, axis=-1)

    @property
    def pixels(self) -> np.ndarray:
        """The colours as they are shown, (H, W, 3) uint8 sRGB; those of transparent pixels too."""
        if self._converts:
            return (
                (colours.to_srgb(self.samples, self.model, self.icc_profile) * 255).round().astype(np.uint8)
            )
        return in_8_bits(self._as_rgb)

    @property
    def image(self) -> Tensor:
        """What the nets get: sRGB (1, 3, H, W) in [-1, 1], where hidden colours are those of their visible
        neighbours.
        """
        if self._converts:
            shown = colours.to_srgb(self.samples, self.model, self.icc_profile)
            image = torch.from_numpy(shown.transpose(2, 0, 1) * 2 - 1)[None]
        else:
            image = to_image(self._as_rgb)
        return (
            image if self.alpha is None else fill_hidden(image, torch.from_numpy(self.alpha > 0)[None, None])
        )

    def over(self, background: np.ndarray | int) -> np.ndarray:
        """The colours as they are shown over `background`, levels of 255 that fit (H, W, 3): uint8."""
        if self.alpha is None:
            return self.pixels
        opaque = in_8_bits(self.alpha)[..., None] / 255
        return (opaque * self.pixels + (1 - opaque) * background).round().astype(np.uint8)

    def painted(self, image: Tensor, weight: Tensor) -> "Photo":
        """The photo with `image` (1, 3, H, W), sRGB in [-1, 1], wherever `weight` (1, 1, H, W) is above 0,
        and opaque by as much; every other sample stays.
        """
        rows, columns = np.nonzero(weight[0, 0].numpy().any(1))[0], np.nonzero(weight[0, 0].numpy().any(0))[0]
        if not len(rows):
            return self
        box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        acting = weight[0, 0][box].numpy() > 0
        samples = self.samples.copy()
        samples[box][acting] = self.samples_of(image[..., *box])[acting]
        alpha = self.alpha
        if alpha is not None:
            full = np.iinfo(alpha.dtype).max
            opaque = (weight[0, 0].numpy() * full).round().astype(alpha.dtype)
            alpha = np.maximum(alpha, opaque)
        return replace(self, samples=samples, alpha=alpha)

    def samples_of(self, image: Tensor) -> np.ndarray:
        """`image` (1, 3, h, w), sRGB in [-1, 1], as samples of this photo's model, profile and depth.

        ValueError where it holds NaN, which no sample can be.
        """
        if image.isnan().any():
            raise ValueError(
                "the nets gave NaN in place of a picture; take --dtype float32, or other weights"
            )
        rgb = ((image[0].detach().float().cpu().clamp(-1, 1) + 1) / 2).permute(1, 2, 0).contiguous().numpy()
        levels = colours.from_srgb(rgb, self.model, self.icc_profile)
        return (levels * np.iinfo(self.samples.dtype).max).round().astype(self.samples.dtype)

    def remade(
        self, image: Tensor, alpha: np.ndarray | None, *, before: Tensor | None = None, coloured: bool = False
    ) -> "Photo":
        """The photo with all of `image` (1, 3, H', W'), sRGB in [-1, 1], and `alpha` (H', W') in place of its
        own.

        Where it equals `before`, what `self.image` gave, samples stay as they are. `coloured`: a grey photo
        becomes RGB, in sRGB.
        """
        height, width = image.shape[-2:]
        metadata = self.metadata.scaled(width / self.size[1], height / self.size[0])
        if coloured and self.model == "grey":
            rgb = replace(
                self, samples=np.zeros((1, 1, 3), self.samples.dtype), icc_profile=None, colour_chunks=()
            )
            return replace(rgb, samples=rgb.samples_of(image), alpha=alpha, metadata=metadata)
        samples = self.samples_of(image)
        if before is not None and before.shape == image.shape:
            same = (before == image)[0].all(0).numpy()
            samples[same] = self.samples[same]
        return replace(self, samples=samples, alpha=alpha, metadata=metadata)


def load_image(file: str | Path | BinaryIO) -> Photo:
    """Read a picture, told by its content: the first frame, upright by its EXIF orientation.

    CMYK and Lab become sRGB. FileNotFoundError if there is no such file; ValueError if it is not a whole
    picture, of a format that is not read, or too large for this machine.
    """
    decoded = decoded_file(file)
    samples, chunks = decoded.samples, decoded.colour_chunks
    profile = colours.profile_of(decoded.model, decoded.profile, chunks, 8 * samples.itemsize)
    notes = list(decoded.notes)
    if unknown := colours.unknown_colours(chunks):
        notes.append(unknown)
    if decoded.model == "cmyk":
        shown = colours.to_srgb(samples, "cmyk", profile)
        samples = (shown * np.iinfo(samples.dtype).max).round().astype(samples.dtype)
        profile, chunks = None, ()
        notes.append("CMYK, which becomes sRGB")
    if profile is not None and profile == decoded.profile:  # which comes before what the chunks say
        chunks = ()
    return Photo(samples, decoded.alpha, profile, chunks, decoded.metadata, tuple(notes))


def save_image(
    image: np.ndarray | Tensor,
    path: str | Path,
    *,
    metadata: Mapping[str, Any] | None = None,
    alpha: np.ndarray | None = None,
    icc_profile: bytes | None = None,
    quality: int = 95,
) -> None:
    """Write pixels of 8 bits as PNG, WebP or TIFF (all lossless) or JPEG, by the suffix of `path`.

    `image` is (H, W, 3) uint8 or (1, 3, H, W) in [-1, 1], `alpha` (H, W) uint8; `quality` is JPEG's, 1 to 95;
    `metadata` (JSON-able) says what made it. Else as `save_photo`.
    """
    pixels = image if isinstance(image, np.ndarray) else to_pixels(image)
    save_photo(Photo(pixels, alpha, icc_profile), path, ours=metadata, quality=quality)


def save_photo(
    photo: Photo,
    path: str | Path,
    *,
    ours: Mapping[str, Any] | None = None,
    source_type: str | None = None,
    quality: int = 95,
    sign: Callable[[bytes, str], bytes] | None = None,
) -> list[str]:
    """Write a photo with its profile and metadata, at its depth where the format has that; a note for
    whatever the format could not hold.

    `ours` (JSON-able) goes into a PNG's text as `parameters` (to be read by people; its "prompt" first) and
    `msbd` (JSON), into the EXIF user comment of the others; `source_type` is IPTC's word for how the picture
    was made. The file appears whole or not at all, replacing an older one. ValueError for an unknown suffix
    or for transparency in a JPEG.
    """
    path = Path(path)
    suffix = check_output_path(path, photo.size)
    output = Output(
        photo.samples,
        photo.alpha,
        photo.icc_profile,
        photo.colour_chunks,
        photo.metadata,
        ours,
        source_type,
        quality,
    )
    try:
        data, notes = encode(output, suffix)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if sign is not None:
        data = sign(data, suffix)
    with whole_file(path) as unfinished:
        unfinished.write_bytes(data)
    return notes


def check_output_path(path: str | Path, size: tuple[int, int] = (1, 1)) -> str:
    """The suffix of `path`; ValueError if `save_photo` could not write `size` (H, W) there, said before the
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
    check_name(path)
    if max(size) > (longest := LONGEST.get(suffix, max(size))):
        raise ValueError(
            f"{path}: {suffix} holds at most {longest} pixels a side, not {max(size)}; write a .png"
        )
    return suffix


def holds_transparency(path: Path) -> bool:
    """Whether the format of `path`, by its suffix, has transparency."""
    return path.suffix.lower() not in JPEG_SUFFIXES
