"""XMP, a text about a picture: what of it changes with the picture.

Sources  XMP parts 1 (serialization as RDF/XML) and 3 (JPEG's extended packets); IPTC photo metadata 2024
         (Digital Source Type)
Copying  this file stands alone: the standard library only

The text is changed at a few places and else stays as it is, letter for letter. No regular expression here can
search the same place twice: a hostile text takes no more time than its length asks for.
"""

import re

EDITED = "compositeWithTrainedAlgorithmicMedia"  # IPTC's words for pictures that a model painted into,
ENHANCED = "algorithmicallyEnhanced"  # and for those that were only enlarged
SOURCE_TYPES = "http://cv.iptc.org/newscodes/digitalsourcetype/"

_SPACES = {  # prefixes as they are usually chosen; a text may choose others
    "tiff": "http://ns.adobe.com/tiff/1.0/",
    "exif": "http://ns.adobe.com/exif/1.0/",
    "xmp": "http://ns.adobe.com/xap/1.0/",
    "xmpNote": "http://ns.adobe.com/xmp/note/",
    "hdrgm": "http://ns.adobe.com/hdr-gain-map/1.0/",
    "rdf": "http://www.w3.org/1999/02/22-rdf-syntax-ns#",
    "Iptc4xmpExt": "http://iptc.org/std/Iptc4xmpExt/2008-02-29/",
}
_MOST_PREFIXES = 4  # that a text may choose for one name space


def kept_xmp(xmp: bytes) -> bytes:
    """Of an upright picture, without thumbnails of the former one, and without the names of what is
    not kept: an extended packet, and a gain map.
    """
    xmp = with_value(xmp, "tiff:Orientation", "1")
    for name in ("xmp:Thumbnails", "xmpNote:HasExtendedXMP", "hdrgm:Version"):
        xmp = _without(xmp, name)
    return xmp


def orientation_of(xmp: bytes) -> int:
    """1 to 8; 1 where it does not say."""
    for name in _names(xmp, "tiff:Orientation"):
        if found := re.search(rb"(?<![\w.-])" + name + rb"(?:\s*=\s*[\"']|>\s*)([1-8])\s*[\"'<]", xmp):
            return int(found[1])
    return 1


def with_size(xmp: bytes, width: int, height: int, dpi: tuple[float, float] | None) -> bytes:
    """With the size in pixels, and the resolution, that the picture has now, where the text says them."""
    values = {"tiff:ImageWidth": f"{width}", "tiff:ImageLength": f"{height}"}
    values |= {"exif:PixelXDimension": f"{width}", "exif:PixelYDimension": f"{height}"}
    if dpi is not None:
        across, down = (f"{round(side * 10000)}/10000" for side in dpi)
        values |= {"tiff:XResolution": across, "tiff:YResolution": down, "tiff:ResolutionUnit": "2"}
    for name, value in values.items():
        xmp = with_value(xmp, name, value)
    return xmp


def with_source_type(xmp: bytes | None, word: str) -> bytes | None:
    """With IPTC's Digital Source Type `word`; a packet of its own where there is none, None where the one
    there is cannot be added to.
    """
    if not xmp:
        xmp = (
            '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
            f'<rdf:RDF xmlns:rdf="{_SPACES["rdf"]}"></rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
        ).encode()
    # At most one: what a file said before was of its former picture.
    xmp = _without(xmp, "Iptc4xmpExt:DigitalSourceType")
    for name in _names(xmp, "rdf:RDF"):
        rdf = name.split(b":")[0]
        emptied = rb"<%s:Description %s:about=\"\"\s+xmlns:Iptc4xmpExt=\"[^\"]{0,99}\"\s*/>" % (rdf, rdf)
        text = re.sub(emptied, b"", xmp)
        text = re.sub(rb"<%s\b([^<>]{0,4000})/>" % name, rb"<%s\1></%s>" % (name, name), text)
        ends = [found.start() for found in re.finditer(rb"</%s\s*>" % name, text)]
        if ends:
            ours = (
                b'<%s:Description %s:about="" xmlns:Iptc4xmpExt="%s" Iptc4xmpExt:DigitalSourceType="%s"/>'
            ) % (rdf, rdf, _SPACES["Iptc4xmpExt"].encode(), (SOURCE_TYPES + word).encode())
            return text[: ends[-1]] + ours + text[ends[-1] :]
    return None


def with_value(xmp: bytes, name: str, value: str) -> bytes:
    """With another value of a property that is one number, where it is there."""
    for said in _names(xmp, name):
        xmp = re.sub(
            rb"(?<![\w.-])" + said + rb"(\s*=\s*[\"']|>\s*)[\d./]+", said + rb"\g<1>" + value.encode(), xmp
        )
    return xmp


def _without(xmp: bytes, name: str) -> bytes:
    """Without a property, be it an attribute or an element; one that does not end stays."""
    for said in _names(xmp, name):
        xmp = re.sub(said + rb"\s*=\s*(\"[^\"]{0,300}\"|'[^']{0,300}')", b"", xmp)
        first, *parts = re.split(rb"<%s(?=[\s/>])" % said, xmp)
        kept = [first]
        for part in parts:
            head = part[: part.find(b">", 0, 1000) + 1]
            if head.endswith(b"/>"):
                kept.append(part[len(head) :])
                continue
            _, ended, after = part.partition(b"</%s" % said)
            kept.append(after[after.find(b">") + 1 :] if head and ended else b"<" + said + part)
        xmp = b"".join(kept)
    return xmp


def _names(xmp: bytes, name: str) -> list[bytes]:
    """A property or element as this text may call it: with the usual prefix, and those that it chose."""
    prefix, local = name.split(":")
    bound = rb"xmlns:([\w.-]{1,40})\s*=\s*[\"']%s[\"']" % re.escape(_SPACES[prefix].encode())
    chosen = dict.fromkeys([prefix.encode(), *re.findall(bound, xmp)])
    return [one + b":" + local.encode() for one in list(chosen)[:_MOST_PREFIXES]]


def in_utf8(xmp: bytes) -> bytes:
    """A text in UTF-16 or UTF-32, which XMP allows outside JPEG, in UTF-8, as the functions here want it."""
    for encoding, step in (("utf-32-be", 4), ("utf-32-le", 4), ("utf-16-be", 2), ("utf-16-le", 2)):
        places = (xmp.find(start.encode(encoding), 0, 64) for start in ("<?xpacket", "<x:"))
        if any(at >= 0 and at % step == 0 for at in places):
            return xmp.decode(encoding, errors="replace").removeprefix("\ufeff").encode()
    return xmp
