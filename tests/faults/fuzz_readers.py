"""Damaged files for every reader but those of pictures: `python -m tests.faults.fuzz_readers --count 10000`.

Small files of every kind that is read are drawn here, damaged, and read. Input number i of a seed is the same
wherever the libraries are the same. A fault is: an exception that the reader's docstring does not promise; a
message of more than one line, or that does not name the file; more than a second of the processor's time, or
200 MB more than the files have; anything printed, executed, imported, written or left open; and the end of
the process. For Linux and macOS.
"""

import argparse
import contextlib
import faulthandler
import functools
import io
import json
import os
import pickle
import pickletools
import random
import re
import signal
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from huggingface_hub import constants
from PIL import Image
from torch import Tensor, nn

from msbd.loading.captions import _tokenizer as load_captions_tokenizer
from msbd.loading.nets import build_net, read_lora_file
from msbd.train.config import TrainConfig
from msbd.train.loop import Trainer
from msbd.train.pictures import PictureFolder, TarShards
from msbd.train.state import RunFolder
from nets.rrdb import RRDBNet
from tests.helpers import fuzzing as damage
from tests.helpers import hostile, tiny_bundle
from tests.helpers.fuzzing import DEADLINE, feed_process, limit_addresses, memory
from tests.helpers.ncnn_files import write_ncnn
from tools._c2pa import read_credentials
from tools.evaluate import edit
from tools.evaluate.edit import Ledger
from tools.folders.lists import read_list
from tools.folders.manifest import Manifest, Record, still_holds
from tools.folders.tasks import Task
from tools.train.curves import tenths_table
from weights.fetch import find_local
from weights.files import WeightsError, read_metadata, read_state_dict, write_safetensors
from weights.hub import find_source, read_json, read_source, source_files, source_of
from weights.locate import locate
from weights.ncnn import read_ncnn
from weights.registry import ModelFile
from weights.settings import read_normalisation, read_restoring, read_training
from weights.tokenizer import load_tokenizer

CHUNK = 20_000  # inputs that one process is fed
MOST_SECONDS, MOST_MEMORY = 1.0, 200 * 2**20  # for one input, of the processor's time and of memory
LARGE = 10_000_000  # values from which on a tensor is not looked through


# ---- the readers -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reader:
    """A public function that reads files, and what its docstring promises."""

    read: Callable[[Path], object]  # of a seed's first file
    refuses: tuple[type[Exception], ...] = (WeightsError,)
    writes: bool = False  # whether it may write in the file's folder
    warns: bool = False  # whether it may warn, in one line that names the file


def _look(tensors: Mapping[str, Tensor]) -> None:
    """Touch every value."""
    for tensor in tensors.values():
        if tensor.numel() < LARGE:
            tensor.float().sum()


def _weights(path: Path) -> None:
    read_metadata(path)
    _look(read_state_dict(path))


def _model(path: Path) -> None:
    """A model's file or folder, to nets."""
    located = locate(path.parent if path.name == "model_index.json" else path)
    for part, source in located.nets.items():
        if part == "lora":
            continue
        build_net(located.contents(part).tensors(part), source)
        if part == "unet":
            read_training(source, located.scheduler)
    if located.tokenizer:
        load_tokenizer(located.tokenizer)


def _shards(path: Path) -> None:
    source = find_source(path.parent)
    source_files(source)
    _look(read_source(source))


def _settings(path: Path) -> None:
    source = source_of(path)
    scheduler = read_json(path.with_name("scheduler_config.json"))
    for read in (
        lambda: read_training(source, scheduler),
        lambda: read_restoring(source),
        lambda: read_normalisation(source, (0.5,) * 3, (0.5,) * 3),
    ):
        error = None
        try:
            read()
        except WeightsError as caught:
            error = caught
        if error:
            raise error


def _tokenizer(path: Path) -> None:
    tokenizer = load_tokenizer(path)
    tokenizer(["a red house, a dog's 12 bones \N{SNOWMAN}"])


def _captions_tokenizer(path: Path) -> None:
    load_captions_tokenizer(path).encode("a red house").ids  # noqa: B018


def _lora(path: Path) -> None:
    read_lora_file(path).describe()


class _Objective(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 2)


def _trained() -> Trainer:
    torch.manual_seed(0)
    return Trainer(_Objective(), TrainConfig(ema=0.9))


def _checkpoint(path: Path) -> None:
    _trained().resume(RunFolder(path.parent))


def _log(path: Path) -> None:
    folder = RunFolder(path.parent)
    folder.load()
    if folder.read_log():
        tenths_table([path.parent])


def _ledger(path: Path) -> None:
    with (
        patch.dict(os.environ, {"MSBD_RUNS": str(path.parents[1])}),
        patch.object(edit, "code_state", lambda: "b"),
    ):
        Ledger("a").get(0, edit.SOURCE)


def _manifest(path: Path) -> None:
    manifest = Manifest(path.parent)
    for record in manifest.read().values():
        task = Task("a.png", path.parent / "a.png", path.parent / record.output)
        still_holds(record, task, "0" * 16, path.parent)
    manifest.add(Record("b.png", "done", "b.png"))
    assert manifest.read()["b.png"].done


def _list(path: Path) -> None:
    read_list(path, ("image", "mask", "prompt", "seed", "margin", "output"))


def _cache(path: Path) -> None:
    """A cache of the Hugging Face hub, whose small files huggingface_hub reads."""
    with patch.object(constants, "HF_HUB_CACHE", str(path.parents[2])):
        find_local(ModelFile("unet", "unet/net.json", "me/mine"))


def _credentials(path: Path) -> None:
    read_credentials(path, path.with_name("key.pem"))


def _tar(path: Path) -> None:
    shards = TarShards(path)
    for number in range(min(len(shards), 4)):
        shards.read(number)


def _captions(path: Path) -> None:
    PictureFolder(path.parent).read(0)


READERS = {
    "safetensors": Reader(_weights),
    "checkpoints": Reader(_weights),
    "models": Reader(_model),
    "shards": Reader(_shards),
    "ncnn": Reader(lambda path: _look(read_ncnn(path))),
    "config.json": Reader(read_json),
    "settings": Reader(_settings),
    "tokenizer.json": Reader(_tokenizer),
    "vocab.json": Reader(_tokenizer),
    "captioner's tokenizer": Reader(_captions_tokenizer),
    "LoRA": Reader(_lora),
    "training state": Reader(_checkpoint, (ValueError, OSError), writes=True),
    "training log": Reader(_log, (ValueError, OSError), writes=True),
    "training options": Reader(lambda path: RunFolder(path.parent).read_options(), (ValueError, OSError)),
    "trials": Reader(_ledger, (ValueError, OSError), writes=True),
    "manifest": Reader(_manifest, (), writes=True),
    "lists of pictures": Reader(_list, (ValueError,)),
    "hub's cache": Reader(_cache, ()),
    "credentials": Reader(_credentials, (ValueError, OSError)),
    "picture shards": Reader(_tar, (ValueError, OSError), warns=True),
    "caption files": Reader(_captions, (ValueError, OSError)),
}


# ---- what is damaged ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seed:
    """Files before they are damaged; the first is the one that is read."""

    reader: str
    name: str
    files: Mapping[str, bytes]
    whole: tuple[str, ...] = ()  # files that are never damaged
    refused: bool = False  # whether it is refused undamaged

    @property
    def targets(self) -> list[str]:
        """The files that may be damaged."""
        return [name for name in self.files if name not in self.whole]


@functools.lru_cache(maxsize=1)
def seeds() -> tuple[Seed, ...]:
    """Small files for every reader, the same each time."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle = tiny_bundle.write_tiny_bundle(folder / "bundle")
        groups = (_weight_files(), _models(folder, bundle), _shard_files(folder), _ncnn_files(folder),
                  _texts(bundle), _loras(folder), _runs(), _training_data(), _others())  # fmt: skip
        return tuple(seed for group in groups for seed in group)


def _tensors() -> dict[str, Tensor]:
    values = torch.arange(24).float()
    return {"a.weight": values.view(2, 3, 4), "b": values[:4].half(), "c": values[:3].long(), "d": values[:0]}


def _stored(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        write_safetensors(Path(folder, "a"), tensors, metadata)
        return Path(folder, "a").read_bytes()


def _files_in(folder: Path, first: str) -> dict[str, bytes]:
    files = {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    return {first: files[first]} | files


def _weight_files() -> Iterator[Seed]:
    yield Seed("safetensors", "plain", {"model.safetensors": _stored(_tensors(), {"config": '{"a": [1]}'})})
    plain, one = _tensors(), torch.arange(6.0)
    shared = {"a": one, "b": one[2:4], "c": one.view(2, 3).T}
    rest = {"epoch": 3, "note": "x" * 300, "lr": 0.1, "steps": [1, -2, 2**40]}
    for name, content in {"plain": plain, "nested": rest | {"state_dict": plain}, "shared": shared}.items():
        yield Seed("checkpoints", f"{name}.ckpt", {"model.ckpt": hostile.saved(content)})
    for name, content in {"shared": shared, "nested": rest | {"state_dict": shared}}.items():
        data = hostile.saved(content, zipped=False)
        # The old format names a storage by where it was in memory.
        data = re.sub(rb"X.\0\0\0\d{9,}", lambda _: hostile.text("0"), data, flags=re.DOTALL)
        yield Seed("checkpoints", f"{name}.pth", {"model.pth": data})
    beside = hostile.table(("a", hostile.tensor()), ("x", hostile.call("numpy.dtype", hostile.text("x"))))
    for make, suffix in ((hostile.archive, ".ckpt"), (hostile.old, ".pth")):
        yield Seed("checkpoints", f"calls{suffix}", {f"model{suffix}": make(beside)})


def _models(folder: Path, bundle: Path) -> Iterator[Seed]:
    for part in ("rrdb", "clip", "unet", "vae"):
        yield Seed("models", part, _only(bundle, f"{part}.safetensors"))
    state = read_state_dict(bundle / "rrdb.safetensors")
    yield Seed("models", "rrdb.pth", {"rrdb.pth": hostile.saved({"params_ema": state})})
    single = tiny_bundle.write_ldm_file(bundle, folder / "single" / "single.safetensors")
    yield Seed("models", "single file", _files_in(single.parent, "single.safetensors"))
    hub = tiny_bundle.write_hub_folder(bundle, folder / "hub")
    yield Seed("models", "folder", _files_in(hub, "model_index.json"))


def _only(folder: Path, name: str) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes()}


def _shard_files(folder: Path) -> Iterator[Seed]:
    first, second = {"a": torch.ones(2)}, {"b": torch.ones(3), "c": torch.ones(1)}
    stem = "diffusion_pytorch_model"
    names = [f"{stem}-0000{number}-of-00002.safetensors" for number in (1, 2)]
    index = {"metadata": {"total_size": 24}, "weight_map": {"a": names[0], "b": names[1], "c": names[1]}}
    yield Seed(
        "shards",
        "two",
        {f"{stem}.safetensors.index.json": json.dumps(index).encode(), names[0]: _stored(first),
         names[1]: _stored(second), "config.json": b'{"sample_size": 16}'},
    )  # fmt: skip


def _ncnn_files(folder: Path) -> Iterator[Seed]:
    write_ncnn(folder / "net.param", RRDBNet(tiny_bundle.RRDB).state_dict())
    yield Seed("ncnn", "rrdb", _only(folder, "net.param") | _only(folder, "net.bin"))


def _texts(bundle: Path) -> Iterator[Seed]:
    config = {"_class_name": "UNet2DConditionModel", "sample_size": 16, "attention_head_dim": [2, 4],
              "norm_eps": 1e-5, "flip_sin_to_cos": True, "text_config": {"hidden_act": "quick_gelu"}}  # fmt: skip
    yield Seed("config.json", "config.json", {"config.json": json.dumps(config, indent=2).encode()})
    said = {"unet": tiny_bundle.TRAINING, "controlnet": {"guidance_scale": 7.5, "conditioning_scale": 1, "prompts": True},
            "clip": {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}}  # fmt: skip
    settings = {
        "model.safetensors": _stored(
            {"a": torch.ones(1)}, {"config": json.dumps(said), "modelspec.prediction_type": "v"}
        ),
        "scheduler_config.json": json.dumps(
            {"beta_start": 0.001, "beta_end": 0.02, "prediction_type": "v_prediction", "trained_betas": None,
             "num_train_timesteps": 1000, "rescale_betas_zero_snr": True}
        ).encode(),
        "config.json": json.dumps(config).encode(),
        "model.yaml": b'model:\n  params:\n    parameterization: "v"\n    timesteps: 1000\n',
    }  # fmt: skip
    yield Seed("settings", "settings", settings)
    bare = {**settings, "model.safetensors": _stored({"a": torch.ones(1)})}
    yield Seed("settings", "no metadata", bare, ("model.safetensors",))
    tokenizer = json.loads((bundle / "tokenizer.json").read_text())
    yield Seed("tokenizer.json", "CLIP's", _only(bundle, "tokenizer.json"))
    vocabulary = tokenizer["model"]["vocab"]
    merges = "#version: 0.2\n" + "".join(" ".join(pair) + "\n" for pair in tokenizer["model"]["merges"])
    yield Seed(
        "vocab.json",
        "CLIP's",
        {"vocab.json": json.dumps(vocabulary).encode(), "merges.txt": merges.encode()},
    )
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    words = {
        word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "house", "##s"])
    }
    pieces = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    pieces.normalizer = normalizers.BertNormalizer()
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pieces.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    yield Seed("captioner's tokenizer", "BERT's", {"tokenizer.json": pieces.to_str().encode()})


def _loras(folder: Path) -> Iterator[Seed]:
    down, up, alpha = torch.ones(2, 8), torch.ones(8, 2), torch.tensor(2.0)
    kohya = {f"lora_unet_mid_block_attentions_0_proj_in.{role}": tensor
             for role, tensor in (("lora_down.weight", down), ("lora_up.weight", up), ("alpha", alpha))}  # fmt: skip
    tucker = {
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(2, 8, 1, 1),
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(8, 2, 1, 1),
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_mid.weight": torch.ones(2, 2, 3, 3),
    }
    yield Seed("LoRA", "kohya's", {"lora.safetensors": _stored(kohya | tucker, {"ss_network_dim": "2"})})
    peft = {"base_model.model.down_blocks.0.resnets.0.conv1.lora_A.weight": torch.ones(2, 8, 3, 3),
            "base_model.model.down_blocks.0.resnets.0.conv1.lora_B.weight": torch.ones(8, 2, 1, 1)}  # fmt: skip
    said = {"lora_alpha": 4, "alpha_pattern": {}, "use_rslora": False, "r": 2, "target_modules": ["conv1"]}
    settings = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 3.5, "unet.r": 2})}
    beside = json.dumps(said).encode()
    yield Seed("LoRA", "PEFT's", {"adapter_model.safetensors": _stored(peft), "adapter_config.json": beside})
    yield Seed("LoRA", "diffusers'", {"lora.safetensors": _stored(peft, settings)})
    yield Seed("LoRA", "pickled", {"lora.pt": hostile.saved(kohya)})


def _runs() -> Iterator[Seed]:
    trainer = _trained()
    trainer.parameters["net.weight"].sum().backward()
    trainer.optimizer.step()
    trainer.done = 20
    log = "".join(
        json.dumps({"step": step, "denoising": 0.5, "val_denoising": 0.25, "gradient": None, "seconds": 1.5}) + "\n"
        for step in (1, 10, 20, 30)
    )  # fmt: skip
    state = hostile.saved(trainer.state())
    yield Seed("training state", "state", {"last.pt": state, "log.jsonl": log.encode()}, ("log.jsonl",))
    options = {"steps": 20, "batch": 4, "learning_rate": 5e-5, "ema": 0.0, "base": "mini", "size": None}
    yield Seed("training options", "options", {"run.json": json.dumps(options, indent=1).encode()})
    yield Seed("training log", "log", {"log.jsonl": log.encode(), "last.pt": state}, ("last.pt",))


def _training_data() -> Iterator[Seed]:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), (200, 100, 50)).save(buffer, "PNG")
    picture, archive = buffer.getvalue(), io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for number in range(2):
            for ending, data in (("png", picture), ("txt", b"a red house\n")):
                member = tarfile.TarInfo(f"data/{number}.{ending}")
                member.size, member.pax_headers = (
                    len(data),
                    {"comment": "x", "mtime": "1.5"} if number else {},
                )
                tar.addfile(member, io.BytesIO(data))
    yield Seed("picture shards", "tar", {"a.tar": archive.getvalue()})
    files = {"a.png": picture, "a.txt": "\ufeffa red house\nby the sea".encode()}
    yield Seed("caption files", "folder", files, ("a.png",))


def _others() -> Iterator[Seed]:
    trials = "".join(
        json.dumps({"scene": n, "trial": "a", "success": True, "time": 1.5}) + "\n" for n in range(3)
    )
    yield Seed("trials", "ledger", {"evaluate/a-b.jsonl": trials.encode()})
    records = [
        Record("a.png", "done", "a.png", 7, "0" * 64, None, "1" * 64, "0" * 16, 1.5, "a.png: 3 x 2", time=9.5, seen={"input": (9, 10)}),
        Record("sub/b.jpg", "failed", "sub/b.png", error="sub/b.jpg: cut off", notes=("one", "two"), time=9.75),
    ]  # fmt: skip
    manifest = "".join(json.dumps(asdict(record)) + "\n" for record in records)
    yield Seed(
        "manifest", "manifest", {"out/msbd.jsonl": manifest.encode(), "out/a.png": b"a"}, ("out/a.png",)
    )
    rows = 'image;mask;prompt;seed;margin\na.png;m.png;"a ""red"" house;\nby the sea";7;0.5\nb.png;;;;\n'
    yield Seed("lists of pictures", "CSV", {"list.txt": rows.encode()})
    lines = [{"image": "a.png", "prompt": "a red house", "seed": 7}, {"image": "b.png", "margin": 1.5}]
    yield Seed("lists of pictures", "JSON lines", {"list.jsonl": "\n".join(map(json.dumps, lines)).encode()})
    commit = "c0ffee" + "0" * 34
    cache = {"hub/models--me--mine/refs/main": commit.encode(),
             f"hub/models--me--mine/snapshots/{commit}/unet/net.json": b"{}"}  # fmt: skip
    yield Seed("hub's cache", "main", cache)
    yield Seed("credentials", "Ed25519", dict(zip(("chain.pem", "key.pem"), _signer(), strict=True)))


def _signer() -> tuple[bytes, bytes]:
    """A certificate by an authority of its own with the authority's, and its key: the same each time."""
    import datetime

    from cryptography import x509
    from cryptography.hazmat.primitives import serialization as coding
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    keys = [Ed25519PrivateKey.from_private_bytes(bytes(31) + bytes([number])) for number in (1, 2)]
    names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name), x509.NameAttribute(NameOID.ORGANIZATION_NAME, "nobody")])
             for name in ("authority", "signer")]  # fmt: skip
    made = []
    for number, (name, key) in enumerate(zip(names, keys, strict=True)):
        first = number == 0
        usage = x509.KeyUsage(not first, False, False, False, False, first, first, False, False)
        builder = x509.CertificateBuilder(names[0], name, key.public_key(), number + 1)
        builder = builder.not_valid_before(datetime.datetime(2020, 1, 1)).not_valid_after(datetime.datetime(2120, 1, 1))  # fmt: skip
        builder = builder.add_extension(x509.BasicConstraints(first, None), True).add_extension(usage, True)
        builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
        if not first:
            purpose = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION])
            issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(keys[0].public_key())
            builder = builder.add_extension(purpose, False).add_extension(issuer, False)
        made.append(builder.sign(keys[0], None).public_bytes(coding.Encoding.PEM))
    key = keys[1].private_bytes(coding.Encoding.PEM, coding.PrivateFormat.PKCS8, coding.NoEncryption())
    return made[1] + made[0], key


# ---- how it is damaged -------------------------------------------------------------------------------------

# What may stand in the place of a value of JSON, as text.
_DEEP = 100_000
VALUES = (
    *("0", "-1", "1", "2", "0.5", "-0.0", "1000", "2147483648", "9223372036854775807", "9223372036854775808"),
    *("18446744073709551616", "-9223372036854775809", "1e308", "1e999", "-1e999", "1e-999", "NaN", "Infinity"),
    *("9" * 400, "9" * 5000, "1" + "0" * 400 + ".5", "true", "false", "null", "[]", "{}", "[[]]", "[null]", '[""]'),
    *('""', '"a"', '"1"', r'"\u0000"', r'"\ud800"', r'"\n\u2028"', r'"\u001b[2J"', '"../a"', '"/etc/passwd"', '"."', '".."'),
    *('"' + "x" * 300 + '"', '"' + "x" * 100_000 + '"', '"' + "\u00e9" * 5000 + '"', "[1, 2]", "[" + "1," * 20_000 + "1]"),
    *("[" * _DEEP, "[" * _DEEP + "]" * _DEEP, '{"a":' * _DEEP + "1" + "}" * _DEEP),
    *("[" * 900 + "]" * 900, '{"a":' * 400 + "1" + "}" * 400, "[" * 120 + "]" * 120),
)  # fmt: skip
_KEYS = (
    "",
    "a",
    "\0",
    "\ud800",
    "__metadata__",
    "config",
    "x" * 5000,
    "a.weight",
    "\n",
    "\u2028",
    "unet",
    "text",
    "..",
    "1",
)
_TEXT = (".json", ".jsonl", ".yaml", ".txt", ".param", ".pem", "")


def damaged(seed: int, number: int) -> tuple[Seed, dict[str, bytes]]:
    """Input `number` of `seed`: what it was made of, and its files after some kinds of damage."""
    chance = random.Random(f"{seed}/{number}")
    source = _source(chance)
    files = dict(source.files)
    for _ in range(chance.choice((1, 1, 1, 1, 2, 2, 3))):
        name = source.targets[0] if chance.random() < 0.4 else chance.choice(source.targets)
        if name in files and len(files) > 1 and chance.random() < 0.01:
            del files[name]
        elif data := files.get(name):
            files[name] = _damage(chance, name, data, files)
    return source, files


def _source(chance: random.Random) -> Seed:
    """Any reader as likely as any other, but those that build nets: they take the most time."""
    names = [name for name in READERS if name != "models" or chance.random() < 0.3]
    reader = chance.choice(names)
    return chance.choice([seed for seed in seeds() if seed.reader == reader])


def _damage(chance: random.Random, name: str, data: bytes, files: Mapping[str, bytes]) -> bytes:
    suffix = Path(name).suffix
    if chance.random() < 0.02:  # another kind of file
        return chance.choice((b"", b"\0", b"{}", b"[]", hostile.GOOD, *files.values(), chance.randbytes(99)))
    if chance.random() < 0.65:
        if suffix in (".json", ".jsonl"):
            return _in_json(chance, data)
        if suffix in (".txt", ".param", ".yaml", ".pem", ""):
            return _in_lines(chance, data)
        if suffix == ".safetensors":
            return _in_header(chance, data)
        if suffix in (".ckpt", ".pt") or data.startswith(b"PK"):
            return _in_archive(chance, data)
        if suffix == ".pth":
            return _in_pickles(chance, data)
        if suffix == ".tar":
            return _in_tar(chance, data)
    if suffix in _TEXT and chance.random() < 0.4:
        return _other_number(chance, data)
    return bytes(chance.choice(_BYTE_DAMAGES)(chance, bytearray(data)))


_BYTE_DAMAGES = (
    damage.flip, damage.flip, damage.substitute, damage.extreme, damage.delete, damage.insert, damage.truncate,
    damage.duplicate, damage.overwrite, lambda chance, data: _long_number(chance, data),
)  # fmt: skip


def _long_number(chance: random.Random, data: bytearray) -> bytearray:
    """An extreme number of eight bytes."""
    at = damage.place(chance, data)
    number = chance.choice((0, 1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1))
    data[at : at + 8] = number.to_bytes(8, chance.choice(("little", "big")))
    return data


def _other_number(chance: random.Random, data: bytes) -> bytes:
    """Another number in the place of one in a text."""
    found = list(re.finditer(rb"-?\d+(\.\d+)?([eE][-+]?\d+)?", data))
    if not found:
        return data
    one = chance.choice(found)
    return data[: one.start()] + chance.choice(VALUES[:21]).encode() + data[one.end() :]


def _in_lines(chance: random.Random, data: bytes) -> bytes:
    """Lines or words of a text taken out, put in again, exchanged; other numbers; other bytes."""
    kind = chance.randrange(5)
    if kind == 0:
        return _other_number(chance, data)
    if kind == 1:
        strange = (
            b"\0",
            b"\xff\xfe",
            b"\xed\xa0\x80",
            b"\r",
            b"\x0b",
            "\u2028".encode(),
            b"x" * 100_000,
            b" " * 5000,
        )
        at = chance.randrange(len(data) + 1)
        return data[:at] + chance.choice(strange) + data[at:]
    separator = chance.choice((b"\n", b" "))
    parts = data.split(separator)
    one, other = chance.randrange(len(parts)), chance.randrange(len(parts))
    if kind == 2:
        del parts[one]
    elif kind == 3:
        parts.insert(other, parts[one])
    else:
        parts[one], parts[other] = parts[other], parts[one]
    return separator.join(parts)


def _in_json(chance: random.Random, data: bytes) -> bytes:
    """A value of JSON replaced, a key renamed, taken out or given twice."""
    lines = data.splitlines(keepends=True)
    if len(lines) > 1:  # a log has a value on each line
        at = chance.randrange(len(lines))
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(lines[at])
            if isinstance(value, dict):
                return b"".join((*lines[:at], _changed_json(chance, value), b"\n", *lines[at + 1 :]))
    try:
        return _changed_json(chance, json.loads(data))
    except (ValueError, RecursionError):
        return bytes(chance.choice(_BYTE_DAMAGES)(chance, bytearray(data or b"{}")))


def _changed_json(chance: random.Random, content: Any) -> bytes:
    places = list(_places(content, 0))
    mark = '"@raw@"'
    raw = chance.choice(VALUES)
    if not places or chance.random() < 0.02:
        return raw.encode(errors="surrogatepass")
    box, key = chance.choice(places[: max(1, len(places) // chance.choice((1, 1, 10, 50)))])
    old = box[key]
    kind = chance.randrange(10)
    if isinstance(old, str) and old[:1] in ("{", "[") and kind < 8:  # JSON inside of JSON
        with contextlib.suppress(ValueError, RecursionError):
            box[key] = _changed_json(chance, json.loads(old)).decode(errors="replace")
            return json.dumps(content).encode()
    if kind < 6:
        box[key] = mark[1:-1]
    elif kind == 6:
        del box[key]
    elif isinstance(box, dict):
        new = chance.choice(_KEYS) if kind < 9 else chance.choice(list(box))
        box[new] = box.pop(key) if kind == 7 else old
        if kind == 9 and new != key:
            box[key], box[new] = box[new], box[key]
    else:
        box.insert(key, box[chance.randrange(len(box))])
    text = json.dumps(content).replace(mark, raw, 1)
    if isinstance(box, dict) and chance.random() < 0.05:  # a key twice
        text = text.replace("{", '{"a": ' + chance.choice(VALUES[:20]) + ", ", 1)
    return text.encode(errors="surrogatepass")


def _places(content: Any, depth: int) -> Iterator[tuple[Any, Any]]:
    if depth > 50 or not isinstance(content, dict | list):
        return
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        yield content, key
        yield from _places(value, depth + 1)


def _in_header(chance: random.Random, data: bytes) -> bytes:
    """A safetensors file whose header is other JSON, its length right, or another."""
    length = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + length], data[8 + length :]
    if chance.random() < 0.1:
        claimed = chance.choice(
            (0, 1, 8, length - 1, length + 1, 10_000_000, 10_000_001, 2**31, 2**63, 2**64 - 1)
        )
        return (claimed % 2**64).to_bytes(8, "little") + data[8:]
    new = _other_number(chance, header) if chance.random() < 0.3 else _in_json(chance, header)
    if chance.random() < 0.2:  # another dtype or shape of as many bytes
        for old, other in chance.choice((((b'"F16"', b'"BF16"'),), ((b'"F16"', b'"I16"'),), ((b'"F32"', b'"I32"'),),
                                         ((b'"F32"', b'"U32"'),), ((b'"F32"', b'"F8_E5M2"'),), ((b'"F16"', b'"F4"'),))):  # fmt: skip
            new = header.replace(old, other)
    return len(new).to_bytes(8, "little") + new + rest


_OPERATIONS = {operation.name: operation for operation in pickletools.opcodes}
_CANARIES = ("os.system", "builtins.eval", "builtins.exec", "subprocess.Popen", "builtins.open", "pathlib.Path.touch",
             "importlib.import_module", "shutil.rmtree", "torch.load", "numpy.load", "builtins.__import__",
             "collections.OrderedDict", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter", "torch.Size",
             "_codecs.encode", "torch.device", "torch.FloatStorage", "torch._utils._rebuild_sparse_tensor",
             "torch._tensor._rebuild_from_type_v2", "torch.serialization._get_layout", "numpy._core.multiarray.scalar")  # fmt: skip


def _operation(chance: random.Random) -> bytes:
    """Any operation of pickles, of every protocol, with some argument."""
    one = chance.choice(pickletools.opcodes)
    code = one.code.encode("latin-1")
    if one.arg is None:
        return code
    count = chance.choice((0, 1, 3, 200, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1))
    text = chance.choice(
        (
            b"0",
            b"1",
            b"x",
            b"os system",
            b"-5",
            b"9" * 6000,
            b"'x'",
            b"1e999",
            b"\xff",
            b"00",
            b"01",
            b"2147483648L",
        )
    )
    size = one.arg.n
    if size >= 0:
        return code + chance.choice((chance.randbytes(size), bytes(size), b"\xff" * size, b"\x01" + bytes(max(size - 1, 0))))[:size]  # fmt: skip
    if size == pickletools.UP_TO_NEWLINE:
        return code + text + b"\n" + (b"system\n" if one.name in ("GLOBAL", "INST") else b"")
    width = {pickletools.TAKEN_FROM_ARGUMENT1: 1, pickletools.TAKEN_FROM_ARGUMENT8U: 8}.get(size, 4)
    if chance.random() < 0.5:
        count = len(text)
    return code + (count % 256**width).to_bytes(width, "little") + text


def _snippet(chance: random.Random) -> bytes:
    """Some operations: a call of what is not to be called, a damaged tensor, a deep or long list."""
    kind = chance.randrange(8)
    if kind == 0:
        name = chance.choice(_CANARIES)
        return hostile.call(name, hostile.text("touch canary")) + chance.choice((b"", b"0"))
    if kind == 1:
        return chance.choice(list(hostile.PICKLES.values()))[0]
    if kind == 2:
        sizes = [
            chance.choice((0, 1, 2, -1, 2**31, 2**62, 2**63, 2**200)) for _ in range(chance.randrange(4))
        ]
        return hostile.tensor(tuple(sizes), tuple(reversed(sizes)), chance.choice((0, 1, -1, 2**40)))
    if kind == 3:
        return hostile.tensor(
            held=hostile.storage(chance.choice((0, 1, 2, -1, 10**6, 2**31, 2**40, 2**62, 2**64)))
        )
    if kind == 4:
        depth = chance.choice((50, 2000, 20_000))
        return chance.choice(
            (
                b"]" * depth + b"a" * (depth - 1),
                b"}" * depth,
                b"(" * depth,
                b"]" * depth + b"\x85" * depth,
                b"2" * depth,
            )
        )
    if kind == 5:  # twice as much at each step, twenty to sixty times
        times = chance.choice((20, 60))
        return b"](K\x01e" + b"".join(
            b"q" + bytes([n]) + b"0](h" + bytes([n]) + b"h" + bytes([n]) + b"e" for n in range(times)
        )
    return b"".join(_operation(chance) for _ in range(chance.choice((1, 1, 2, 5))))


def _in_pickle(chance: random.Random, data: bytes) -> bytes:
    """A pickle with operations put in, taken out, exchanged, or with other arguments."""
    try:
        starts = [at for _, _, at in pickletools.genops(data) if at is not None]
    except Exception:  # damaged before
        starts = []
    if not starts:
        return bytes(chance.choice(_BYTE_DAMAGES)(chance, bytearray(data or b".")))
    one = chance.randrange(len(starts))
    start, end = starts[one], (*starts, len(data))[one + 1]
    kind = chance.randrange(6)
    if kind == 0:
        return data[:start] + data[end:]
    if kind == 1:
        other = chance.choice(starts)
        return data[:other] + data[start:end] + data[other:]
    if kind == 2:
        return data[:start] + _operation(chance) + data[end:]
    if kind == 3:
        numbers = [at for at in starts if data[at : at + 1] in (b"K", b"M", b"J", b"\x8a")]
        if numbers:
            at = chance.choice(numbers)
            end = (*starts, len(data))[starts.index(at) + 1]
            number = chance.choice(
                (0, 1, -1, 2, 7, 1000, 2**31, -(2**31), 2**32, 2**40, 2**63, 2**64, 2**200, 2**1000)
            )
            return data[:at] + hostile.number(number) + data[end:]
    if kind == 4 and chance.random() < 0.2:
        return pickle.dumps(chance.choice(({"a": 1}, [1], "x", 2**70, {"state_dict": {}})), chance.choice((0, 1, 2, 3, 4, 5)))  # fmt: skip
    return data[:start] + _snippet(chance) + data[start:]


def _in_pickles(chance: random.Random, data: bytes) -> bytes:
    """One of the five pickles of the old format."""
    file, ends = io.BytesIO(data), [0]
    try:
        for _ in range(5):
            for _ in pickletools.genops(file):
                pass
            ends.append(file.tell())
    except Exception:  # damaged before
        return bytes(chance.choice(_BYTE_DAMAGES)(chance, bytearray(data or b".")))
    one = chance.choice((0, 1, 2, 3, 3, 3, 3, 4))
    return data[: ends[one]] + _in_pickle(chance, data[ends[one] : ends[one + 1]]) + data[ends[one + 1] :]


def _packed(name: str) -> zipfile.ZipInfo:
    member = zipfile.ZipInfo(name)
    member.compress_type = zipfile.ZIP_DEFLATED
    return member


@functools.lru_cache(maxsize=1)
def _bomb() -> bytes:
    """A zip archive of 300 KB that says it is, and unpacks to, 300 MB."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        archive.writestr(zipfile.ZipInfo("m/data/0"), bytes(8))
        with archive.open(_packed("m/data.pkl"), "w") as member:
            for _ in range(300):
                member.write(bytes(2**20))
    return buffer.getvalue()


def _in_archive(chance: random.Random, data: bytes) -> bytes:
    """Another pickle in the archive, other names, other sizes; or an archive that unpacks to a lot."""
    if chance.random() < 0.01:
        return _bomb()
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
    except Exception:  # damaged before
        members = {}
    if not members:
        return bytes(chance.choice(_BYTE_DAMAGES)(chance, bytearray(data)))
    kind, name = chance.randrange(12), chance.choice(list(members))
    if kind < 6:
        name = next((name for name in members if name.endswith("data.pkl")), name)
        members[name] = _in_pickle(chance, members[name])
    elif kind == 6:
        del members[name]
    elif kind == 7:
        new = chance.choice(
            (
                "x",
                "data.pkl",
                "a/b",
                "../x",
                "/x",
                "\ud7ff",
                "archive/.data/serialization_id",
                "archive/byteorder",
            )
        )
        members[new] = members.pop(name)
    elif kind == 8 and members[name]:
        members[name] = bytes(chance.choice(_BYTE_DAMAGES)(chance, bytearray(members[name])))
    elif kind == 9:
        byteorder = next((name for name in members if name.endswith("byteorder")), "archive/byteorder")
        members[byteorder] = chance.choice((b"big", b"", b"\xff", b"middle", b"little\n"))
    elif kind == 10:
        at = data.rfind(b"PK\x01\x02") + chance.randrange(46)
        whole = bytearray(data)
        number = chance.choice((2, 4, 8))
        whole[at : at + number] = chance.choice((0, 1, 2**15, 2**31 - 1, 2**32 - 1, 2**63)).to_bytes(
            9, "little"
        )[:number]
        return bytes(whole)
    else:
        end = data.rfind(b"PK\x05\x06")
        return (
            bytes(damage.extreme(chance, bytearray(data[end:])).join((data[:end], b""))) if end >= 0 else data
        )
    with warnings.catch_warnings(action="ignore"):
        return hostile.zipped(members, zipfile.ZIP_DEFLATED if chance.random() < 0.03 else zipfile.ZIP_STORED)


def _in_tar(chance: random.Random, data: bytes) -> bytes:
    """A header of a tar archive with other fields and the right sum."""
    starts = [at for at in range(0, len(data) - 511, 512) if data[at + 257 : at + 262] == b"ustar"]
    if not starts:
        return data
    at = chance.choice(starts)
    block = bytearray(data[at : at + 512])
    fields = (
        (0, 100),
        (100, 8),
        (108, 8),
        (124, 12),
        (124, 12),
        (136, 12),
        (156, 1),
        (156, 1),
        (157, 100),
        (345, 155),
    )
    start, size = chance.choice(fields)
    values = (
        b"", b"\xff" * size, b"7" * (size - 1), b"-1", b"\x80" + b"\xff" * (size - 1), b"\x80" + bytes(max(size - 2, 0)) + b"\1",
        b"0", b"00000000777\0", chance.choice(b"01234567LKxgSVDNXA\0").to_bytes(1, "little"), b"x/" * 40, b"\xe9\xff.png",
    )  # fmt: skip
    block[start : start + size] = chance.choice(values)[:size].ljust(size, b"\0")
    if chance.random() < 0.9:
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
    return data[:at] + bytes(block) + data[at + 512 :]


# ---- one input ---------------------------------------------------------------------------------------------


@dataclass
class Result:
    """What became of one input."""

    number: int
    read: bool = False
    seconds: float = 0  # of the processor
    memory: int = 0  # bytes on top of what the process had
    faults: list[str] = field(default_factory=list)


class Watch:
    """What Python code does to the system while a file is read, by its audit events."""

    def __init__(self) -> None:
        self.folder: Path | None = None  # where files may be read; None for nothing to be watched
        self.writes = False  # whether they may be written there, too
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, values: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if event == "open":
            path, _, flags = values
            outside = isinstance(path, str | bytes) and not os.fsdecode(path).startswith(str(self.folder))
            written = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            if written and not self.writes or outside and not str(path).startswith(_LIBRARIES):
                self.seen.append(f"opened {path!r:.80} with flags {flags}")
        elif event == "compile":
            if "canary" in str(values[0]):
                self.seen.append(f"compiled {values[0]!r:.80}")
        elif event.startswith(_EVENTS) and not (self.writes and event.startswith(("os.re", "os.mkdir"))):
            self.seen.append(f"{event} {values!r:.80}")


_EVENTS = (
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.startfile", "os.re", "os.mkdir", "os.rmdir",
    "os.truncate", "os.chmod", "os.link", "os.symlink", "os.kill", "os.chdir", "subprocess", "socket.",
    "ctypes.dlopen", "shutil", "pty", "webbrowser", "urllib", "pickle.find_class", "code.", "tempfile",
)  # fmt: skip
_LIBRARIES = (sys.prefix, sys.base_prefix, os.devnull)  # torch imports parts of its own where it refuses


def feed(source: Seed, files: Mapping[str, bytes], scratch: Path, watch: Watch, said: int) -> Result:
    """Read `files` in the empty folder `scratch`; `said` is the file that what is printed goes to."""
    result, reader = Result(0), READERS[source.reader]
    for name, data in files.items():
        (scratch / name).parent.mkdir(parents=True, exist_ok=True)
        (scratch / name).write_bytes(data)
    before, printed, opened = _listing(scratch), os.fstat(said).st_size, len(os.listdir("/proc/self/fd"))
    modules, held, started = len(sys.modules), memory(forget=True)[0], time.process_time()
    watch.folder, watch.writes, watch.seen = scratch, reader.writes, []
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        _read(result, reader, scratch / next(iter(source.files)), scratch, watch)
    result.seconds, result.memory = time.process_time() - started, memory()[1] - held
    result.faults += watch.seen
    for warning in warned:
        text = str(warning.message)
        if not reader.warns or len(text.splitlines()) != 1 or str(scratch) not in text:
            result.faults.append(f"warned: {text:.120}")
    if len(os.listdir("/proc/self/fd")) > opened:
        result.faults.append("a file is left open")
    if len(sys.modules) > modules and (new := [name for name in list(sys.modules)[modules:]
                                              if not name.startswith(("encodings.", "torch."))]):  # fmt: skip
        result.faults.append(f"imported {', '.join(new)[:80]}")
    if not reader.writes and _listing(scratch) != before:
        result.faults.append("something was written")
    sys.stdout.flush()
    sys.stderr.flush()
    if (now := os.fstat(said).st_size) > printed:
        result.faults.append(f"printed: {os.pread(said, min(now - printed, 200), printed)!r}")
    if result.seconds > MOST_SECONDS:
        result.faults.append("too slow")
    if result.memory > MOST_MEMORY + sum(map(len, files.values())):
        result.faults.append("too much memory")
    return result


def _read(result: Result, reader: Reader, path: Path, scratch: Path, watch: Watch) -> None:
    """Read `path`, and note whether it was read, or refused as it should be."""
    try:
        reader.read(path)
        watch.folder = None
        result.read = True
    except reader.refuses as error:
        watch.folder = None
        text = str(error)
        if len(text.splitlines()) != 1 or not text.isprintable():
            result.faults.append(f"not one printable line: {_told(error)}")
        elif str(scratch) not in text:
            result.faults.append(f"a message that names no file: {_told(error)}")
        elif isinstance(error, UnicodeError) or len(text) > 1000:
            result.faults.append(f"no message of ours: {_told(error)}")
    except BaseException as error:  # a panic of a library in Rust is no Exception
        watch.folder = None
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        result.faults.append(_told(error))


def _listing(folder: Path) -> list[tuple[str, int, int]]:
    """Every file below `folder`, with its size and time of change."""
    found = []
    for place, _, names in os.walk(folder):
        for name in names:
            status = os.stat(os.path.join(place, name))
            found.append((os.path.join(place, name), status.st_size, status.st_mtime_ns))
    return sorted(found)


def _told(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if {"weights", "msbd", "tools"} & {*Path(frame.filename).parts}]
    where = " < ".join(f"{Path(one.filename).name}:{one.lineno}" for one in (frames[-1], *ours[-1:]))
    return f"{type(error).__name__} at {where}: {str(error)[:200]!r}"


# ---- the process that is fed -------------------------------------------------------------------------------


def serve(seed: int, first: int, end: int) -> None:
    """Feed inputs `first` to `end` and write a line of JSON for each, in order; what is printed goes to a
    file.
    """
    answers, errors = os.fdopen(os.dup(1), "w"), os.dup(2)
    faulthandler.enable(errors)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name, tempfile.TemporaryFile() as said:
        scratch, watch = Path(name, "files"), Watch()
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
        try:
            _warm_up(scratch, watch, said.fileno())
            limit_addresses()
            for number in range(first, end):
                source, files = damaged(seed, number)
                _emptied(scratch)
                signal.setitimer(signal.ITIMER_PROF, DEADLINE)  # at its end the process ends
                result = feed(source, files, scratch, watch, said.fileno())
                signal.setitimer(signal.ITIMER_PROF, 0)
                result.number = number
                answers.write(json.dumps(vars(result)) + "\n")
                answers.flush()
        finally:
            os.dup2(errors, 2)  # for what is wrong with this tool


def _warm_up(scratch: Path, watch: Watch, said: int) -> None:
    """Read and refuse a file of every kind: what is imported and loaded once, no input pays for. ValueError
    for a seed that is not read.
    """
    for source in seeds():
        feed(source, source.files, _emptied(scratch), watch, said)
        result = feed(source, source.files, _emptied(scratch), watch, said)
        if result.faults or not result.read:
            raise ValueError(f"{source.reader} {source.name}: {result.faults or 'refused, undamaged'}")
        cut = {name: data[: len(data) // 2] for name, data in source.files.items()}
        feed(source, cut, _emptied(scratch), watch, said)


def _emptied(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for place, folders, names in os.walk(folder, topdown=False):
        for name in names:
            os.unlink(os.path.join(place, name))
        for name in folders:
            os.rmdir(os.path.join(place, name))
    return folder


# ---- the command -------------------------------------------------------------------------------------------


@dataclass
class Report:
    """What became of all inputs."""

    tried: int = 0
    read: int = 0
    slowest: tuple[float, int] = (0.0, -1)  # seconds of the processor, and which input
    hungriest: tuple[int, int] = (0, -1)  # bytes, and which input
    faults: list[tuple[int, str, str]] = field(default_factory=list)  # which input, its reader, and what
    readers: Counter[tuple[str, bool]] = field(default_factory=Counter)  # reader, whether read
    words: Counter[str] = field(default_factory=Counter)  # that a process printed in the end

    def add(self, result: Result, reader: str) -> None:
        """Count an input of `reader` in."""
        self.tried += 1
        self.read += result.read
        self.readers[reader, result.read] += 1
        self.slowest = max(self.slowest, (result.seconds, result.number))
        self.hungriest = max(self.hungriest, (result.memory, result.number))
        self.faults += [(result.number, reader, fault) for fault in result.faults]


def run(
    count: int,
    seed: int,
    seconds: float | None = None,
    keep: Path | None = None,
    first: int = 0,
    tell: Callable[[Report], None] | None = None,
) -> Report:
    """Feed inputs `first` to `count` of `seed`, for `seconds` at most; faulty ones go into folder `keep`.

    `tell` is called with what is known after each process.
    """
    report = Report()
    until = None if seconds is None else time.monotonic() + seconds
    number = first

    def answered(line: bytes) -> int:
        result = Result(**json.loads(line))
        report.add(result, _reader(seed, result.number))
        return result.number

    while number < count and (until is None or time.monotonic() < until):
        module = __spec__.name if __spec__ else "tests.faults.fuzz_readers"
        end = min(count, number + CHUNK)
        number, why = feed_process(module, seed, number, end, until, answered, report.words)
        if why:
            report.faults.append((number - 1, _reader(seed, number - 1), why))
            report.tried += 1
        if tell is not None:
            tell(report)
    if keep is not None:
        for faulty in {number for number, _, _ in report.faults}:
            for name, data in damaged(seed, faulty)[1].items():
                path = keep / f"{seed}-{faulty}" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
    return report


def _reader(seed: int, number: int) -> str:
    """Whose input this is."""
    return _source(random.Random(f"{seed}/{number}")).reader


def main() -> int:
    """The command; 1 where there were faults."""
    parser = argparse.ArgumentParser(description="Feed damaged files to every reader but those of pictures.")
    parser.add_argument("--count", type=int, default=10_000, help="inputs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, metavar="I", help="the input to begin with")
    parser.add_argument("--seconds", type=float, help="stop after these")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where faulty inputs go")
    parser.add_argument("--serve", type=int, nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(given.seed, *given.serve)
        return 0
    started = time.monotonic()
    report = run(given.count, given.seed, given.seconds, given.keep, given.first, _tell)
    print_report(report, given.seed, time.monotonic() - started)
    return 1 if report.faults else 0


def _tell(report: Report) -> None:
    last = ", the last of input {} ({}): {}".format(*report.faults[-1]) if report.faults else ""
    print(f"{report.tried:,} inputs, {len(report.faults)} faults{last}", file=sys.stderr, flush=True)


def print_report(report: Report, seed: int, seconds: float) -> None:
    """The figures of a run that took `seconds`."""
    print(f"{os.cpu_count()} processors, Python {sys.version.split()[0]}, torch {torch.__version__}")
    print(
        f"{report.tried:,} inputs of seed {seed} in {seconds:,.0f} s ({report.tried / seconds:.0f} a second)"
    )
    print(f"{report.read:,} read, {report.tried - report.read:,} refused or faulty; of {len(seeds())} seeds")
    for reader in READERS:
        read, refused = report.readers[reader, True], report.readers[reader, False]
        print(f"  {reader:22} {read:8,} read {refused:8,} refused")
    print(f"slowest: {report.slowest[0] * 1000:,.0f} ms of the processor, input {report.slowest[1]}")
    print(f"most memory: {report.hungriest[0] / 2**20:,.0f} MB, input {report.hungriest[1]}")
    print(f"faults: {len(report.faults)}")
    classes: dict[tuple[str, str], list[int]] = {}
    for number, reader, fault in report.faults:
        classes.setdefault(
            (reader, re.sub(r"/tmp/\S+|'.*'|[0-9]+|0x[0-9a-f]+", "#", fault)[:150]), []
        ).append(number)
    for (reader, fault), numbers in sorted(classes.items(), key=lambda item: -len(item[1])):
        print(f"  {len(numbers):6} x {reader}: {fault}")
        print(
            f"           python -m tests.faults.fuzz_readers --seed {seed} --first {numbers[0]} --count {numbers[0] + 1}"
        )


if __name__ == "__main__":
    sys.exit(main())
