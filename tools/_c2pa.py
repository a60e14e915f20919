"""Content credentials: a signed manifest in the result that says what was edited, by C2PA.

Source   C2PA technical specification 2.2 (claims, actions `c2pa.opened` and `c2pa.edited`); the extra `c2pa`
         (c2pa-python) makes and signs the manifest
"""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ._pictures import FileBytes

MIME = {
    ".png": "image/png",
    ".webp": "image/webp",
    ".tif": "image/tiff",
    ".tiff": "image/tiff",
} | dict.fromkeys((".jpg", ".jpeg", ".jfif", ".jpe"), "image/jpeg")
_READ = {
    "PNG": "image/png", "JPEG": "image/jpeg", "WebP": "image/webp", "TIFF": "image/tiff", "GIF": "image/gif",
    "AVIF": "image/avif",
}  # fmt: skip


@dataclass(frozen=True)
class Credentials:
    """A certificate chain and its private key, both PEM, and the algorithm that fits the key."""

    chain: bytes
    key: bytes
    algorithm: str

    def sign(self, data: bytes, suffix: str, *, source: FileBytes, source_type: str, version: str) -> bytes:
        """`data`, a picture with that `suffix`, with a manifest: opened `source`, edited it as `source_type`
        (IPTC's word) says.

        ValueError where the library refuses.
        """
        import c2pa

        from msbd.pixels.xmp import SOURCE_TYPES

        edited = {"action": "c2pa.edited", "digitalSourceType": SOURCE_TYPES + source_type}
        manifest = {
            "claim_generator_info": [{"name": "msbd", "version": version}],
            "assertions": [{"label": "c2pa.actions", "data": {"actions": [edited]}}],
        }
        signed = io.BytesIO()
        try:
            with self._signer() as signer, c2pa.Builder(json.dumps(manifest)) as builder:
                builder.set_intent(c2pa.C2paBuilderIntent.EDIT)
                ingredient = json.dumps({"title": Path(source.name).name, "relationship": "parentOf"})
                read = source.getvalue()
                builder.add_ingredient(ingredient, _mime(read), io.BytesIO(read))
                builder.sign(signer, MIME[suffix], io.BytesIO(data), signed)
        except c2pa.C2paError as error:
            raise ValueError(
                f"--c2pa: the result could not be signed ({' '.join(str(error).split())})"
            ) from error
        return signed.getvalue()

    def _signer(self) -> Any:
        import c2pa

        return c2pa.Signer.from_info(
            c2pa.C2paSignerInfo(self.algorithm, self.chain, self.key, None)  # type: ignore[arg-type]
        )


def signing(
    credentials: Credentials | None, source: FileBytes, source_type: str
) -> Callable[[bytes, str], bytes] | None:
    """What `save_photo` signs with: the bytes of a file and its suffix, as an edit of `source`."""
    if credentials is None:
        return None
    from ._cli import version

    return lambda data, suffix: credentials.sign(
        data, suffix, source=source, source_type=source_type, version=version()
    )


def read_credentials(chain: Path, key: Path) -> Credentials:
    """Read and check the two files of --c2pa.

    FileNotFoundError or ValueError for files that will not sign, ImportError without the extra `c2pa`.
    """
    for path in (chain, key):
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: there is no such file; --c2pa takes a certificate chain and its private key, both PEM"
            )
    try:
        import c2pa
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
    except ImportError as error:
        raise ImportError(f"--c2pa needs the extra `c2pa`: pip install c2pa-python ({error})") from error
    try:
        loaded = load_pem_private_key(key.read_bytes(), None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        why = " ".join(str(error).split())
        raise ValueError(f"{key}: not a private key in PEM without a password ({why:.200})") from error
    credentials = Credentials(chain.read_bytes(), key.read_bytes(), _algorithm(loaded, key))
    try:
        credentials._signer().close()
    except c2pa.C2paError as error:
        raise ValueError(
            f"{chain}: not a certificate chain that signs ({' '.join(str(error).split()):.200})"
        ) from error
    return credentials


def _algorithm(key: Any, path: Path) -> str:
    """C2PA's name of the signature that a private key makes."""
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    if isinstance(key, ed25519.Ed25519PrivateKey):
        return "ed25519"
    if isinstance(key, rsa.RSAPrivateKey):
        return "ps256"
    curves = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}
    if isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name in curves:
        return curves[key.curve.name]
    raise ValueError(
        f"{path}: a private key that C2PA has no signature for; use RSA, Ed25519, or a NIST curve"
    )


def _mime(data: bytes) -> str:
    from msbd.pixels.formats import HEAD, format_of

    return _READ.get(format_of(data[:HEAD]) or "", "application/octet-stream")
