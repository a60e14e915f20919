"""JPEG there and back, 4:2:0: Pillow's, and the same in tensor code, batched and on any device.

Papers   ITU-T T.81 (JPEG: the DCT is A.3.3, the tables are annex K.1) and T.871 (JFIF: the colours)
Tensors  image (B, 3, H, W) in [0, 1], any H, W from 1 up; inside, 0..255 in float32 (float64 if `image` is)
Copying  this file stands alone: torch, numpy and Pillow

The standard leaves open how chroma is averaged and enlarged, how quality scales the tables, what is rounded
when. The style "libjpeg" does it as libjpeg-turbo, which Pillow uses: equal in float64, a level or two away
in a few values of 100,000 in float32. "diffjpeg" is the DiffJPEG that Real-ESRGAN and PASD are trained with.
Files do not look so: it rounds nothing but coefficients, has the luma table transposed, pads with black up to
multiples of 16, which shows at the edges, and repeats chroma 2 x 2 where libjpeg interpolates.
"""

import io
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

Quality = float | Sequence[float] | Tensor

# T.81 tables K.1 and K.2, for luma and chroma; rows are vertical frequencies. K.2 is 99 outside its corner.
LUMA_TABLE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMA_CORNER = ((17, 18, 24, 47), (18, 21, 26, 66), (24, 26, 56, 99), (47, 66, 99, 99))
CHROMA_TABLE = tuple((*row, 99, 99, 99, 99) for row in (*CHROMA_CORNER, *((99,) * 4,) * 4))

# T.871 section 7: RGB to YCbCr, and what Cb and Cr (each less 128) add to R, G and B.
TO_YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
FROM_CBCR = ((0, 1.402), (-0.344136, -0.714136), (1.772, 0))

# libjpeg's integers in place of these, times 2^16, and of sqrt(8) DCT, times 2^13: the left half, which the
# right half mirrors, with its signs changed in odd rows. They are what constants of 13 bits make of the fast
# DCT of Loeffler, Ligtenberg & Moschytz 1989: up to 1.2 away from the true values.
LIBJPEG_TO_YCBCR = ((19595, 38470, 7471), (-11058, -21710, 32768), (32768, -27439, -5329))
LIBJPEG_FROM_CBCR = ((0, 91881), (-22554, -46802), (116130, 0))
LIBJPEG_DCT = (
    (8192, 8192, 8192, 8192), (11363, 9633, 6437, 2260), (10703, 4433, -4433, -10703),
    (9633, -2259, -11362, -6436), (8192, -8192, -8192, 8192), (6437, -11362, 2261, 9633),
    (4433, -10704, 10704, -4433), (2260, -6436, 9633, -11363),
)  # fmt: skip


def pillow_jpeg(image: Tensor, quality: Quality) -> Tensor:
    """`image` (B, 3, H, W) in [0, 1] through Pillow's JPEG and back, on 256 levels; no gradient.

    `quality` is a whole number 1..100, or one per picture. Runs on the CPU; device and dtype are `image`'s.
    ValueError for another shape or quality.
    """
    qualities = _checked_qualities(image, quality, whole=True)
    decoded = []
    pictures = _half_up(_levels(image.detach())).to(torch.uint8).cpu()
    for picture, its_quality in zip(pictures, qualities, strict=True):
        buffer, pixels = io.BytesIO(), picture.permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=int(its_quality), subsampling=2)
        decoded.append(torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1))
    return torch.stack(decoded).to(image) / 255


def tensor_jpeg(
    image: Tensor,
    quality: Quality,
    *,
    style: Literal["libjpeg", "diffjpeg"] = "libjpeg",
    rounding: Literal["hard", "smooth"] = "hard",
) -> Tensor:
    """`image` (B, 3, H, W) in [0, 1] through JPEG at `quality` and back, on its device and in its dtype.

    `quality` 1..100, one or one per picture; whole numbers, but any in the style "diffjpeg". `style`: see the
    top of the file; "libjpeg" gives 256 levels. `rounding` of the coefficients: "hard" gives no gradient;
    "smooth" is r + (x - r)^3, r the nearest integer (Shin & Song 2017, "JPEG-resistant adversarial images").
    Other roundings pass gradients unchanged. Where TF32 is allowed, "libjpeg" is some 55 dB from Pillow.
    ValueError for another shape, quality, style or rounding.
    """
    if style not in ("libjpeg", "diffjpeg"):
        raise ValueError(f"unknown JPEG style {style!r}; expected libjpeg or diffjpeg")
    if rounding not in ("hard", "smooth"):
        raise ValueError(f"unknown JPEG rounding {rounding!r}; expected hard or smooth")
    qualities = _checked_qualities(image, quality, whole=style == "libjpeg")
    function = _like_libjpeg if style == "libjpeg" else _like_diffjpeg
    with torch.autocast(image.device.type, enabled=False):  # coefficients need all digits
        levels = _levels(image)
        levels = function(levels, levels.new_tensor(qualities), rounding == "smooth")
    return levels.clamp(0, 255).to(image) / 255


def _checked_qualities(image: Tensor, quality: Quality, *, whole: bool) -> list[float]:  # one per picture
    if image.ndim != 4 or image.shape[1] != 3 or 0 in image.shape or not image.is_floating_point():
        raise ValueError(f"JPEG wants float (B, 3, H, W) in [0, 1]; got {image.dtype} {tuple(image.shape)}")
    qualities, batch = torch.as_tensor(quality).flatten().tolist(), len(image)
    if len(qualities) not in (1, batch):
        raise ValueError(f"{len(qualities)} JPEG qualities for {batch} pictures; expected 1 or {batch}")
    for value in qualities:
        if not 1 <= value <= 100 or (whole and value % 1):
            raise ValueError(f"JPEG quality {value}: expected a {'whole ' * whole}number from 1 to 100")
    return qualities if len(qualities) == batch else qualities * batch


def _levels(image: Tensor) -> Tensor:
    return image.to(torch.promote_types(image.dtype, torch.float32)).clamp(0, 1) * 255


def _like_libjpeg(image: Tensor, quality: Tensor, smooth: bool) -> Tensor:
    """`image` (B, 3, H, W) in 0..255 and back, with libjpeg-turbo's order of averages, pads and roundings."""
    height, width = image.shape[-2:]
    # libjpeg continues the columns before the chroma is averaged, and the rows (but for one) after it.
    image = F.pad(_half_up(image), (0, -width % 16, 0, height % 2), mode="replicate")
    # Halves go down in Cb and Cr, in even columns of the small chroma and in odd ones of the large; else up.
    half_down = image.new_tensor((0, 2**-17, 2**-17)).view(3, 1, 1)
    ycbcr = _half_up(_mix(image - 128, LIBJPEG_TO_YCBCR) / 2**16 - half_down)
    odd = torch.arange(image.shape[-1], device=image.device) % 2
    chroma = _half_up(F.avg_pool2d(ycbcr[:, 1:], 2) - (1 - odd[: image.shape[-1] // 2]) / 8)
    scale = torch.where(quality < 50, (5000 / quality).floor(), 200 - 2 * quality).view(-1, 1, 1)
    tables = image.new_tensor((LUMA_TABLE, CHROMA_TABLE)).unsqueeze(1) * scale  # (2, B, 8, 8)
    tables = ((tables + 50) / 100).floor().clamp(1, 255)
    luma = _code_like_libjpeg(ycbcr[:, :1], tables[0], smooth)[..., :height, :width]
    chroma = _code_like_libjpeg(chroma, tables[1], smooth)[..., : -(-height // 2), : -(-width // 2)]
    mode = "bilinear" if width > 4 else "nearest"  # libjpeg does not interpolate one or two columns
    chroma = F.interpolate(chroma, scale_factor=2, mode=mode)
    chroma = _half_up(chroma - odd[: chroma.shape[-1]] / 32)
    return luma + 128 + _half_up(_mix(chroma[..., :height, :width], LIBJPEG_FROM_CBCR) / 2**16)


def _code_like_libjpeg(planes: Tensor, table: Tensor, smooth: bool) -> Tensor:
    """`planes` (B, C, H, W) in -128..127, quantised by `table` (B, 8, 8) in libjpeg's "slow" integer DCT.

    Continued at the right and lower edges to multiples of 8, and not cut again. The DCT has 2 bits behind the
    point between its passes and 3 at its end, so ties are frequent: a plain DCT is 49 to 52 dB from Pillow.
    """
    blocks = _to_blocks(F.pad(planes, (0, -planes.shape[-1] % 8, 0, -planes.shape[-2] % 8), mode="replicate"))
    left = planes.new_tensor(LIBJPEG_DCT) / 2**13
    transform = torch.cat([left, left.flip(1) * left.new_tensor((1, -1) * 4)[:, None]], 1)
    rows = _half_up(blocks @ (4 * transform.mT))
    steps = 8 * table.view(-1, 1, 1, 1, 8, 8)
    coefficients = _half_up((transform / 4) @ rows) / steps
    nearest = (coefficients.abs() + 0.5).floor().copysign(coefficients)  # halves away from zero
    dequantised = _round(coefficients, nearest, smooth) * (steps / 8)
    columns = _half_up((4 * transform.mT) @ dequantised)
    return _from_blocks(_half_up(columns @ (transform / 32))).clamp(-128, 127)


def _like_diffjpeg(image: Tensor, quality: Tensor, smooth: bool) -> Tensor:
    """`image` (B, 3, H, W) in 0..255 and back, as DiffJPEG does it."""
    height, width = image.shape[-2:]
    ycbcr = _mix(F.pad(image, (0, -width % 16, 0, -height % 16)) - 128, TO_YCBCR)
    scale = torch.where(quality < 50, 50 / quality, 2 - quality / 50).clamp(min=1e-3)  # at 100 it is 0
    transform = _dct_matrix(image)
    planes = []
    for plane, table in ((ycbcr[:, :1], LUMA_TABLE), (F.avg_pool2d(ycbcr[:, 1:], 2), CHROMA_TABLE)):
        steps = (image.new_tensor(table).mT * scale.view(-1, 1, 1)).view(-1, 1, 1, 1, 8, 8)
        coefficients = transform @ _to_blocks(plane) @ transform.mT / steps
        dequantised = _round(coefficients, coefficients.round(), smooth) * steps
        planes.append(_from_blocks(transform.mT @ dequantised @ transform))
    chroma = F.interpolate(planes[1], scale_factor=2, mode="nearest")
    return (planes[0] + 128 + _mix(chroma, FROM_CBCR))[..., :height, :width]


def _round(x: Tensor, nearest: Tensor, smooth: bool) -> Tensor:
    nearest = nearest.detach()
    return nearest + (x - nearest) ** 3 if smooth else nearest


def _half_up(x: Tensor) -> Tensor:
    """The nearest integers, halves upwards; the gradient is that of `x`."""
    nearest = (x.detach() + 0.5).floor_()
    return x + (nearest - x).detach() if x.requires_grad else nearest  # exact: they differ by 1/2 at most


def _mix(planes: Tensor, matrix: Sequence[Sequence[float]]) -> Tensor:
    return torch.einsum("dc,bchw->bdhw", planes.new_tensor(matrix), planes)


def _dct_matrix(like: Tensor) -> Tensor:
    """T.81 A.3.3 as a matrix (8, 8), orthonormal; rows are frequencies."""
    n = torch.arange(8, dtype=torch.float64)
    rows = torch.cos((2 * n + 1) * n[:, None] * math.pi / 16) / 2
    rows[0] /= math.sqrt(2)
    return rows.to(like)


def _to_blocks(planes: Tensor) -> Tensor:
    """(B, C, 8 R, 8 S) -> (B, C, R, S, 8, 8)."""
    return planes.unflatten(-1, (-1, 8)).unflatten(-3, (-1, 8)).transpose(-3, -2)


def _from_blocks(blocks: Tensor) -> Tensor:
    return blocks.transpose(-3, -2).flatten(-4, -3).flatten(-2, -1)
