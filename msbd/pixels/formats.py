"""What kind of picture a file is, told by its first bytes; and of what is not read, its name.

Sources  the formats' own marks: PNG (third edition, 5.2), JPEG (ITU-T T.81, B.1), TIFF 6.0 and BigTIFF, GIF
         89a, RIFF/WebP, ISO 14496-12 (brands of HEIC and AVIF), and those of the other formats
Copying  this file stands alone: the standard library only
"""

READ = ("PNG", "JPEG", "WebP", "TIFF", "BMP", "GIF", "AVIF")

# Of a file in which a folder is searched for pictures; what it is, its first bytes tell.
READ_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jfif", ".jpe", ".mpo", ".webp", ".tif", ".tiff", ".bmp", ".dib", ".gif", ".avif",
)  # fmt: skip

HEAD = 512  # bytes that `format_of` wants

_MARKS: tuple[tuple[int, bytes, str], ...] = (  # offset, bytes, name
    (0, b"\x89PNG\r\n\x1a\n", "PNG"),
    (0, b"\xff\xd8\xff", "JPEG"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (0, b"II+\0", "TIFF"),
    (0, b"MM\0+", "TIFF"),
    (0, b"GIF8", "GIF"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
    (0, b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (0, b"8BPS", "Photoshop (PSD)"),
    (0, b"gimp xcf", "GIMP (XCF)"),
    (0, b"DDS ", "DDS"),
    (0, b"\0\0\1\0", "ICO"),
    (0, b"\0\0\2\0\1\0", "CUR"),
    (0, b"qoif", "QOI"),
    (0, b"\x76\x2f\x31\x01", "OpenEXR"),
    (0, b"#?RADIANCE", "Radiance HDR"),
    (0, b"FUJIFILMCCD-RAW", "raw (RAF)"),
    (0, b"IIRO", "raw (ORF)"),
    (0, b"IIU\0", "raw (RW2)"),
    (0, b"%PDF", "PDF"),
    (0, b"%!PS", "PostScript"),
    (0, b"\xc5\xd0\xd3\xc6", "PostScript"),
    (0, b"\x01\xda", "SGI"),
    (0, b"BLP", "BLP"),
    (0, b"icns", "ICNS"),
    (0, b"/* XPM */", "XPM"),
    (0, b"#define", "XBM"),
    (0, b"\x59\xa6\x6a\x95", "Sun raster"),
    (4, b"\x11\xaf", "FLI"),
    (4, b"\x12\xaf", "FLC"),
    (0, b"PK\3\4", "ZIP archive"),
    (0, b"SIMPLE  =", "FITS"),
    (128, b"DICM", "DICOM"),
)

_BRANDS = {
    b"avif": "AVIF", b"avis": "AVIF",
    b"heic": "HEIC", b"heix": "HEIC", b"heim": "HEIC", b"heis": "HEIC", b"hevc": "HEIC", b"hevx": "HEIC",
    b"crx ": "raw (CR3)",
}  # fmt: skip
_PORTABLE = {b"P1", b"P2", b"P3", b"P4", b"P5", b"P6", b"P7", b"Pf", b"PF"}


def format_of(head: bytes) -> str | None:
    """The name of the format of a file that begins with `head` (HEAD bytes or fewer); None for an unknown
    one.
    """
    for offset, mark, name in _MARKS:
        if head.startswith(mark, offset):
            return name
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WebP"
    if head[4:8] == b"ftyp":
        return _brand(head)
    if head[:2] == b"BM" and len(head) > 14:
        return "BMP"
    if head[:1] == b"\n" and head[1:2] <= b"\5" and head[2:3] in (b"\0", b"\1"):
        return "PCX"
    # TGA has no mark: a map of colours or none, its type, and bits a pixel.
    if (
        head[1:2] in (b"\0", b"\1")
        and head[2:3] in b"\1\2\3\x09\x0a\x0b"
        and head[16:17] in b"\x08\x0f\x10\x18\x20"
    ):
        return "TGA" if len(head) >= 18 else None
    if head[:2] in _PORTABLE and head[2:3].isspace():
        return "PPM"
    return _text(head)


def _brand(head: bytes) -> str:
    """Of an ISO base media file: by its major brand, or, where that is general, by those it is compatible
    with.
    """
    length = min(int.from_bytes(head[:4], "big"), len(head))
    brands = [head[8:12], *(head[at : at + 4] for at in range(16, length - 3, 4))]
    known = [_BRANDS[brand] for brand in brands if brand in _BRANDS]
    if known:
        return known[0]
    return "HEIC" if head[8:12] in (b"mif1", b"msf1") else "video (MP4 or MOV)"


def _text(head: bytes) -> str | None:
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:200].lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "web page"
    if b"<svg" in start:
        return "SVG"
    return None
