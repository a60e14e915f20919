"""Known models and model files: what there is, get it, check it, convert it, look into it.

python -m tools.models list                every known model: size, licence, whether it is on this machine
python -m tools.models list sd-v1-5        one of them with its files: sizes, hashes, where they come from
python -m tools.models fetch sd-v1-5       download it and what it needs; what is here already costs nothing
python -m tools.models verify NAME ...     hash a model's files, or any file, and compare with what is known
python -m tools.models keys FILE           what a file is, its sizes, where its keys map, what is missing
python -m tools.models convert IN -o OUT   any layout to safetensors under canonical names: a folder or a file

Pickles (.ckpt, .pth, .bin) are read without running any code, and converted in a process of their own.
"""

import argparse
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from .._cli import ROOT, Transfer, add_lora, check_not_shadowed, report_errors, weighted_file

if TYPE_CHECKING:
    from weights.canonical import Contents
    from weights.fetch import Check
    from weights.hub import Source
    from weights.registry import Model, ModelFile


def build_parser() -> argparse.ArgumentParser:
    """One sub-command per job."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.models",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    jobs = parser.add_subparsers(dest="job", required=True)
    known = jobs.add_parser("list", help="every known model in a line, or some with their files")
    known.add_argument(
        "names", nargs="*", metavar="NAME", help="show its files, their sizes, hashes and origin"
    )
    fetch = jobs.add_parser("fetch", help="download models")
    fetch.add_argument("names", nargs="+", metavar="NAME")
    fetch.add_argument("--quiet", action="store_true", help="print nothing but errors")
    verify = jobs.add_parser("verify", help="hash files and compare")
    verify.add_argument("names", nargs="+", metavar="NAME_OR_FILE")
    keys = jobs.add_parser("keys", help="look into a file or a net's folder")
    keys.add_argument("file", type=Path, metavar="FILE")
    keys.add_argument("--all", action="store_true", help="every key, not the first ones of each part")
    convert = jobs.add_parser("convert", help="to canonical safetensors")
    convert.add_argument("model", metavar="IN", help="a file, a folder, or a known model's name")
    convert.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="OUT",
        help="a folder that gets one file per part, or FILE.safetensors for one part",
    )
    convert.add_argument("--part", help="only this one (unet, vae, text_encoder, ...)")
    convert.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="(default: as it is)")
    convert.add_argument(
        "--blend",
        type=weighted_file,
        metavar="FILE:WEIGHT",
        help="mix another model in: (1 - WEIGHT) of IN and WEIGHT of FILE, of U-Net, VAE and text encoder",
    )
    add_lora(convert.add_argument, "the model, merged into its tensors")
    convert.add_argument(
        "--layout",
        choices=("canonical", "ldm"),
        default="canonical",
        help="ldm: one file as the original Stable Diffusion code has it (default: canonical)",
    )
    convert.add_argument(
        "--pasd-delta",
        action="store_true",
        help="of a PASD model only what it adds to its base, and the ControlNet, float16, in one file",
    )
    convert.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one job; exit code 0, 1 for an expected failure or a wrong file, 2 for wrong usage."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.job == "convert" and args.pasd_delta and (args.part or args.dtype or args.layout == "ldm"):
        parser.error("--pasd-delta decides parts, dtype and layout itself")
    if args.job == "convert" and args.layout == "ldm" and args.part:
        parser.error("--layout ldm writes all parts in one file; leave --part out")
    with report_errors(debug=args.debug) as outcome:
        check_not_shadowed()
        if args.job == "convert":
            outcome.exit_code = _convert(args, sys.argv[1:] if argv is None else argv)
        else:
            outcome.exit_code = {"list": _list, "fetch": _fetch, "verify": _verify, "keys": _keys}[args.job](
                args
            )
    return outcome.exit_code


# ---- known models ------------------------------------------------------------------------------------------


def _list(args: argparse.Namespace) -> int:
    from weights.registry import MODELS, find_model

    if args.names:
        models = [find_model(name) for name in args.names]  # a misspelt name is told before anything else
        for model in models:
            print("\n".join(_description(model)))
        return 0
    rows = [
        (model.name, _state(model), _size(model), _short(model.licence), model.what)
        for model in MODELS.values()
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for *columns, what in rows:
        print("  ".join(f"{text:{width}}" for text, width in zip(columns, widths, strict=True)) + f"  {what}")
    return 0


def _description(model: "Model") -> list[str]:
    """A known model in full: what it is, its licence, and each of its files."""
    lines = [
        f"{model.name}: {model.what}",
        f"    {_size(model)}, {_state(model)}{', with ' + ', '.join(model.needs) if model.needs else ''}",
        f"    {model.licence}",
    ]
    if model.sampling:
        lines.append("    made for " + ", ".join(f"{name} {value}" for name, value in model.sampling.items()))
    for file in model.files:
        for source in file.sources:
            if source is file:
                lines.append(f"    {file.part:12} {_file(file)}")
            elif source.sha256 == file.sha256:
                lines.append(f"    {'':12} or the same bytes from {_origin(source)}")
            else:
                lines.append(f"    {'':12} or {_file(source)}")
            if source.beside is not None and source.beside not in model.files:
                lines.append(f"    {'':12} with {_file(source.beside)}")
    return lines


def _file(file: "ModelFile") -> str:
    """One file of one source in full."""
    size, digest = _known(_bytes(file)), _known(file.sha256)
    return f"{file.file}, {size} bytes, sha256 {digest}, from {_origin(file)}"


def _state(model: "Model") -> str:
    """Whether this machine has the model and those it needs: "here", "not here" or "2 of 5 files here"."""
    from weights.fetch import find_local
    from weights.registry import needed_files

    files = needed_files(model)
    here = sum(find_local(file) is not None for file in files)
    return "here" if here == len(files) else f"{here} of {len(files)} files here" if here else "not here"


def _size(model: "Model") -> str:
    """The size of the model's own files, in words."""
    from weights.fetch import download_size

    return download_size(replace(file, size=_bytes(file)) for file in model.files)


def _short(licence: str) -> str:
    """A licence's name, and " ..." where there is more to read."""
    name = re.split("[:;,]", licence)[0]
    return name if name == licence else f"{name} ..."


def _bytes(file: "ModelFile") -> int | None:
    from weights.registry import MINI

    # The registry does not measure the checkout.
    return (MINI / file.file).stat().st_size if file.inside else file.size


def _known(value: object) -> str:
    if value is None:
        return "unknown"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _origin(file: "ModelFile") -> str:
    if file.repo:
        return f"huggingface.co/{file.repo}{f' at {file.revision}' if file.revision else ''}"
    if file.package:
        package = file.package
        return f"the package {package.distribution} {package.version} (extra {package.extra})"
    return file.url or (f"{file.page} (by hand)" if file.page else "this checkout")


def _fetch(args: argparse.Namespace) -> int:
    from weights.fetch import check_space, download_size, fetch, find_local, verify
    from weights.registry import find_model, needed_files

    # A misspelt name, or a full disk, is told before anything is downloaded; files that are got by hand come
    # last.
    models = [find_model(name) for name in args.names]
    check_space((file for model in models for file in needed_files(model)), ", ".join(args.names))
    for model in models:
        files = sorted(needed_files(model), key=lambda file: not (file.direct or file.inside))
        missing = [file for file in files if find_local(file) is None]
        direct = [file for file in missing if file.direct]
        if direct and not args.quiet:
            print(
                f"{model.name}: {download_size(direct)} to download. Licence: {model.licence}",
                file=sys.stderr,
            )
        for file in files:
            came = file in missing
            with Transfer(file.file, quiet=args.quiet) as transfer:
                path = fetch(file, on_progress=transfer)
            if not args.quiet:
                print(path)
            if came and file.sha256 is None and not args.quiet:
                print(verify(path, file))  # the hash, for whoever wants to record it
    return 0


def _verify(args: argparse.Namespace) -> int:
    checks = [check for name in args.names for check in _checks(name)]
    for check in checks:
        print(check)
    return 1 if any(check.state == "wrong" for check in checks) else 0


def _checks(name: str) -> "Iterator[Check]":
    from weights.fetch import beside, find_source, local_files, verify
    from weights.files import WeightsError
    from weights.registry import MODELS, find_model, needed_files

    path = Path(name)
    if name in MODELS or not path.exists():
        if name not in MODELS and len(path.parts) > 1:
            raise WeightsError(f"{path}: no such file")
        model = find_model(name)
        local_files(model)  # refuses a model that is not all here
        files = needed_files(model)
        for source, where in filter(None, map(find_source, files)):
            yield verify(where, source)
            if source.beside is not None and source.beside not in files:
                yield verify(beside(where, source.beside), source.beside)
    elif not path.is_file():
        raise WeightsError(
            f"{path}: {'a folder; name its files' if path.is_dir() else 'a device or pipe, no file'}"
        )
    else:
        yield _check_file(path)


def _check_file(path: Path) -> "Check":
    """Compare a file with every registered one: by its hash, and by its name where only one has that."""
    from weights.fetch import verify
    from weights.files import sha256
    from weights.registry import MODELS, ModelFile

    found = sha256(path)
    sources = [source for model in MODELS.values() for file in model.files for source in file.sources]
    files = [file for source in sources for file in (source, source.beside) if file and not file.inside]
    same = [file for file in files if file.sha256 == found]
    # Those of the same bytes in several places count once.
    named = {(file.size, file.sha256): file for file in files if Path(file.file).name == path.name}
    if not same and len(named) == 1:
        same = [*named.values()]
    return verify(path, same[0] if same else ModelFile("unknown", path.name), found)


# ---- looking into a file -----------------------------------------------------------------------------------


def _keys(args: argparse.Namespace) -> int:
    from weights.canonical import read_contents
    from weights.embeddings import embedding_of, is_embedding
    from weights.extras import told
    from weights.files import WeightsError
    from weights.hub import find_source, read_source, source_of

    source = find_source(args.file) if args.file.is_dir() else source_of(args.file)
    state = read_source(source)
    if is_embedding(state):
        print(f"{source.path}: {embedding_of(state, source.path).describe()}")
        return 0
    contents = read_contents(state, source.path)
    values = sum(tensor.numel() for tensor in contents.state.values())
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in contents.state.values()})
    print(f"{source.path}: {contents.layout}")
    print(f"{len(contents.state):,} tensors, {values:,} values, {', '.join(dtypes)}")
    for name, value in told(contents.marks).items():
        print(f"marked: {name} = {value}")
    for note in contents.notes:
        print(f"note: {note}")
    sound = [_part_keys(contents, part, source, every=args.all) for part in contents.parts]
    _some("ignored (no weights of a net)", contents.ignored, every=args.all)
    _some("unknown (of no net of this layout)", contents.unknown, every=args.all)
    if not all(sound) or contents.unknown:
        raise WeightsError(
            f"{source.path}: would not load as it is: keys are missing, unknown or misshapen, see above"
        )
    return 0


def _part_keys(contents: "Contents", part: str, source: "Source", *, every: bool) -> bool:
    """Print one part: its net and sizes, where its keys map, what does not fit. Whether it would load."""
    names = {key: name for key, (of, name) in contents.names.items() if of == part}
    print(f"\n{part}: {len(names):,} tensors, {sum(contents.state[key].numel() for key in names):,} values")
    problems: dict[str, Sequence[str]] = {}
    if part == "lora":
        from weights.files import read_metadata
        from weights.lora import read_lora

        lora = read_lora(contents.state, source.path, read_metadata(source.path))
        print("\n".join(f"    {line}" for line in (lora.describe(), *lora.notes)))
    elif part not in ("pasd_added", "asymmetric_added"):
        from msbd.loading.nets import fit_net

        fit = fit_net(contents.renamed(part), source)
        print(textwrap.fill(str(fit.net.config), 120, initial_indent="    ", subsequent_indent="        "))
        problems = {"missing": fit.missing, "unknown": fit.unknown, "misshapen": fit.misshapen}
    lines = [f"{key} -> {name}  {tuple(contents.state[key].shape)}" for key, name in names.items()]
    _some("keys", lines, every=every)
    for what, found in problems.items():
        _some(what, found, every=True)
    return not any(problems.values())


def _some(title: str, lines: Sequence[str], *, every: bool) -> None:
    if lines:
        print(f"    {title}: {len(lines):,}")
        shown = lines if every or len(lines) <= 6 else [*lines[:5], f"... {len(lines) - 5:,} more (--all)"]
        print("\n".join(f"        {line if line.isprintable() else ascii(line)}" for line in shown))


# ---- converting --------------------------------------------------------------------------------------------


def _convert(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """In a process of its own, which does nothing else: it may have to read a pickle."""
    if args.in_process:
        from .convert import convert

        for path in convert(args):
            print(path)
        return 0
    command = [sys.executable, "-m", "tools.models", *argv, "--in-process"]
    try:
        code = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False).returncode
    except KeyboardInterrupt:  # which the other process has got too, and says
        return 130
    if code < 0:
        raise ChildProcessError(
            f"{args.model}: converting was ended by signal {-code}; is there enough memory?"
        )
    return code


if __name__ == "__main__":
    raise SystemExit(main())
