"""A mask-conditioned decoder (Asymmetric VQGAN): of a whole file, or of what it has over an autoencoder."""

import json
from dataclasses import asdict
from pathlib import Path

import torch

from nets.asymmetric_vae import AsymmetricAutoencoderKL
from nets.vae import AutoencoderKL
from weights.canonical import read_contents
from weights.fetch import is_here
from weights.files import WeightsError, write_safetensors
from weights.hub import Source, find_source, read_source, source_metadata, source_of
from weights.locate import DECODERS, Located, locate
from weights.merge import completed, difference, fingerprint
from weights.registry import MINI, MODELS, check_kind

from .nets import build_net
from .parts import check_finite

OFFICIAL = ("asymmetric-vae-x-1-5", "asymmetric-vae-x-2")  # for the latents of Stable Diffusion 1.x
CHANGES = "changes"  # in the metadata of a difference file: the fingerprint of the autoencoder's tensors


def read_seam_decoder(model: str | Path, vae: AutoencoderKL) -> AsymmetricAutoencoderKL:
    """The autoencoder whose decoder sees what is kept, of a known name ("mini-asymmetric",
    "asymmetric-vae-x-1-5"), a file or a net's folder, to go beside `vae`, which makes the latents.

    A file that holds only what it has over an autoencoder is completed with the tensors of `vae`, which are
    shared where the dtype is the same, and has to have been made for it. On the CPU, in its file's dtype, or
    that of `vae`; in evaluation mode, without gradients. Raises WeightsError, one line, for another kind of
    file, a damaged one, and one whose latents are not those of `vae`.
    """
    source = find_seam_decoder(model)
    contents = read_contents(read_source(source), source.path)
    part = next((part for part in DECODERS if part in contents.parts), None)
    if part is None:
        raise WeightsError(
            f"{source.path}: {contents.layout}, expected a mask-conditioned decoder (AsymmetricAutoencoderKL)"
        )
    state = contents.tensors(part)
    check_finite(source.path, state)
    if part == "asymmetric_added":
        base = vae.state_dict()
        if source_metadata(source).get(CHANGES) != fingerprint(base):
            raise WeightsError(
                f"{source.path}: a change to another autoencoder than this model's; take the one it was made for"
            )
        try:
            state = completed(state, base)
        except WeightsError as error:
            raise WeightsError(f"{source.path}: {error}") from None
    net = build_net(state, source)
    for what in ("latent_channels", "scaling_factor"):
        found, expected = getattr(net.config, what), getattr(vae.config, what)
        if found != expected:
            raise WeightsError(
                f"{source.path}: {what} {found}, but the model's autoencoder has {expected}; these files are not of one model"
            )
    if net.downscale != vae.downscale:
        raise WeightsError(
            f"{source.path}: cells of {net.downscale} pixels, but the model's autoencoder has {vae.downscale}; these files are "
            "not of one model"
        )
    return net


def choose_seam_decoder(located: Located) -> str:
    """The known decoder for a model: the bundle's own for its autoencoder, else the first official one that
    is on this machine. No network call. WeightsError, with the command that gets one, where there is none.
    """
    if located.net("vae").path.parent.resolve() == MINI.resolve():
        return "mini-asymmetric"
    if here := next((name for name in OFFICIAL if is_here(MODELS[name])), None):
        return here
    raise WeightsError(
        f"no mask-conditioned decoder is on this machine for {located.name}; get one by "
        f"`python -m tools.models fetch {OFFICIAL[0]}`"
    )


def write_seam_decoder(path: Path, net: AsymmetricAutoencoderKL, vae: AutoencoderKL) -> None:
    """Write what `net` has over `vae`, in float16, for `read_seam_decoder` to complete. WeightsError where
    float16 cannot hold it.
    """
    base = vae.state_dict()
    metadata = {"config": json.dumps(asdict(net.config)), CHANGES: fingerprint(base)}
    write_safetensors(path, difference(net.state_dict(), base, torch.float16), metadata)


def find_seam_decoder(model: str | Path) -> Source:
    """Where the net lies that `read_seam_decoder` reads. WeightsError for another kind, or where none is."""
    check_kind(model, "decoder")
    path = Path(model)
    if str(model) in MODELS or not path.exists():  # refuses an unknown name and names the known ones
        return next(iter(locate(str(model)).nets.values()))
    return find_source(path) if path.is_dir() else source_of(path)
