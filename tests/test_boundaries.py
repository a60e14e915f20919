"""The layout's promises: imports point down, leaves can be copied, nothing is installed,
no name shadows another.
"""

import ast
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LEAVES = ("nets", "samplers", "weights")

# Folder -> the project folders it may import absolutely; its own siblings it imports relatively (tools:
# either way).
ALLOWED: dict[str, set[str]] = {
    "nets": set(),
    "samplers": set(),
    "weights": set(),
    "msbd": {"samplers"},
    "tools": {"msbd", "samplers", "nets", "weights", "tools"},
}
JOINING = ("msbd/load.py", "msbd/loading/")  # the only code of msbd/ that knows nets and weights

# Folder -> the third-party packages it may import (DESIGN section 7: never diffusers, basicsr, einops,
# opencv, ...).
LIBRARIES = {
    "nets": {"torch"},
    "samplers": {"torch"},
    "weights": {"torch", "numpy", "safetensors", "tokenizers", "huggingface_hub", "tqdm"},
    "msbd": {"torch", "numpy", "PIL"},
    "tools": {"torch", "numpy", "PIL", "safetensors", "tqdm"},
}
EXTRA_LIBRARIES = {  # lazily, all of them
    "msbd/pixels/vips.py": {"pyvips"},
    "msbd/pixels/tiff.py": {"tifffile", "imagecodecs"},
    "msbd/loading/captions.py": {"torchvision", "transformers", "tokenizers"},
    "tools/_c2pa.py": {"c2pa", "cryptography"},
    "tools/folders/ray_job.py": {"pyarrow", "ray"},
    "tools/_report.py": {"matplotlib"},
}

SOURCES = sorted(path for folder in ALLOWED for path in (ROOT / folder).rglob("*.py"))
LEAF_FILES = [path for path in SOURCES if path.parent.name in LEAVES and path.name != "__init__.py"]


def name_of(path: Path) -> str:
    """The path below the root, with slashes."""
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> tuple[set[str], set[int]]:
    """Top-level packages that `path` imports absolutely, anywhere in it,
    and the levels of its relative imports.
    """
    packages, levels = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            packages |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            packages.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            levels.add(node.level)
    return packages, levels


def relative_targets(path: Path) -> set[str]:
    """What `path` imports relatively, as paths below its top folder: "edit/plan", "pixels/box", ..."""
    top = ROOT / path.relative_to(ROOT).parts[0]
    targets = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.parents[node.level - 1]
            names = [node.module.replace(".", "/")] if node.module else [alias.name for alias in node.names]
            targets |= {(base / name).relative_to(top).as_posix() for name in names}
    return targets


def copying_line(path: Path) -> str:
    """What the module docstring says after "Copying", up to the end of its paragraph."""
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    found = re.search(r"^Copying\s+(.+?)(?=\n\S|\n\n|\Z)", docstring, re.MULTILINE | re.DOTALL)
    assert found, f"{name_of(path)}: its docstring has no `Copying` line that says what to take along"
    return found[1]


def siblings(path: Path) -> set[str]:
    """File names that the `Copying` line tells to take along, without the file itself."""
    return {Path(name).name for name in re.findall(r"[\w/]+\.py", copying_line(path))} - {path.name}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_point_down(path: Path) -> None:
    folder, name = path.relative_to(ROOT).parts[0], name_of(path)
    packages, levels = imports(path)
    joining = {"nets", "weights"} if name.startswith(JOINING) else set()
    wrong = packages & set(ALLOWED) - ALLOWED[folder] - joining
    assert not wrong, f"{name} may not import {sorted(wrong)}"
    assert not packages & {"tests", "goldens", "seeded_weights"}, f"{name} imports from tests/"
    depth = len(path.relative_to(ROOT).parts) - 1
    assert max(levels, default=0) <= depth, f"{name}: a relative import may not leave {folder}/"


@pytest.mark.parametrize("path", sorted((ROOT / "msbd").rglob("*.py")), ids=name_of)
def test_the_two_pipelines_and_the_training_keep_apart(path: Path) -> None:
    """edit/ and restore/ never import each other, and what they stand on imports neither."""
    room = path.relative_to(ROOT / "msbd").parts[0]
    imported = {target.split("/")[0] for target in relative_targets(path)}
    forbidden = {
        "edit": {"restore", "train"},
        "restore": {"edit", "train"},
        "train": {"edit"},
        "pixels": {"edit", "restore", "train"},
    }
    wrong = imported & forbidden.get(room, set())
    assert not wrong, f"{name_of(path)} may not import from {sorted(wrong)}"


# Folder of tools/ -> the others that it may not import from: scenes <- train <- mini, and scenes <- evaluate.
APART = {
    "scenes": {"train", "mini", "evaluate"},
    "train": {"mini", "evaluate"},
    "evaluate": {"mini", "train"},
    "mini": {"evaluate"},
}


@pytest.mark.parametrize("folder", APART)
def test_the_folders_of_tools_have_no_circle(folder: str) -> None:
    for path in sorted((ROOT / "tools" / folder).rglob("*.py")):
        wrong = {target.split("/")[0] for target in relative_targets(path)} & APART[folder]
        assert not wrong, f"{name_of(path)} may not import from {sorted(wrong)}"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_only_the_agreed_libraries_are_imported(path: Path) -> None:
    folder, name = path.relative_to(ROOT).parts[0], name_of(path)
    third_party = imports(path)[0] - set(ALLOWED) - set(sys.stdlib_module_names)
    extra = third_party - LIBRARIES[folder] - EXTRA_LIBRARIES.get(name, set())
    assert not extra, f"{name} imports {sorted(extra)}, which DESIGN section 7 does not list for {folder}/"


@pytest.mark.parametrize("path", [path for path in SOURCES if path.name == "__init__.py"], ids=name_of)
def test_init_files_hold_a_docstring_only(path: Path) -> None:
    body = ast.parse(path.read_text()).body
    assert len(body) == 1 and ast.get_docstring(ast.parse(path.read_text())), (
        f"{name_of(path)} holds more than a docstring"
    )


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_comment_was_torn_off_its_line(path: Path) -> None:
    """The formatter moves a comment that does not fit behind a bracket of its own;
    it belongs above the line.
    """
    torn = [line for line in path.read_text().splitlines() if re.match(r"\s*[\])}]+[,:]*\s+# (?!fmt)", line)]
    assert not torn, f"{name_of(path)}: put above its line: {torn[0].strip()}"


def test_every_source_folder_is_a_regular_package() -> None:
    folders = {path.parent for path in SOURCES}
    assert all((folder / "__init__.py").is_file() for folder in folders)


def test_no_file_is_named_like_the_standard_library() -> None:
    tests = list((ROOT / "tests").rglob("*.py"))
    clashes = [name_of(path) for path in SOURCES + tests if path.stem in sys.stdlib_module_names]
    assert not clashes, f"{clashes} would hide modules of the standard library when run as a script"


def test_the_wheel_is_empty() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"] == {"packages": []}, (
        "generic folder names must not reach site-packages"
    )
    assert not {"scripts", "gui-scripts", "entry-points"} & project["project"].keys()


def git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)


def test_git_keeps_the_code_of_weights_and_drops_checkpoints() -> None:
    if shutil.which("git") is None or git("rev-parse", "--git-dir").returncode:
        pytest.skip("not a git checkout")
    kept = [name_of(path) for path in SOURCES] + [
        "weights/mini/unet.safetensors",
        "tests/golden/unet/x.safetensors",
    ]
    assert git("check-ignore", "--no-index", *kept).stdout == ""
    for dropped in ("weights/model.safetensors", "sd-v1-4.ckpt", "weights/x.pth", "outputs/demo.png"):
        assert git("check-ignore", "-q", "--no-index", dropped).returncode == 0, dropped


def direct_needs(path: Path) -> set[str]:
    """What a file of msbd/ imports: of msbd/ from there on, of samplers/ with the folder's name."""
    needs = {f"{target}.py" for target in relative_targets(path)}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("samplers."):
            needs.add(f"{(node.module or '').replace('.', '/')}.py")
    return needs


WITH_COPYING = [
    path
    for path in SOURCES
    if path.is_relative_to(ROOT / "msbd") and re.search(r"^Copying ", path.read_text(), re.MULTILINE)
]


@pytest.mark.parametrize("path", WITH_COPYING, ids=name_of)
def test_the_copying_lines_of_msbd_name_what_is_imported(path: Path) -> None:
    assert set(re.findall(r"[\w/]+\.py", copying_line(path))) == direct_needs(path)


# A tiny forward for every net: `m` is the copied module, alone with its siblings.
TINY = {
    "unet": (
        "c = m.UNetConfig(block_out_channels=(8, 8), layers_per_block=1, cross_attention_dim=8, attention_head_dim=2, norm_num_groups=4,"
        " down_block_types=('CrossAttnDownBlock2D', 'DownBlock2D'), up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D'))\n"
        "assert m.UNet(c)(torch.zeros(1, 4, 8, 8), torch.tensor([5]), torch.zeros(1, 7, 8)).shape == (1, 4, 8, 8)"
    ),
    "vae": (
        "c = m.VAEConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4)\n"
        "net = m.AutoencoderKL(c)\n"
        "assert net.decode(net.encode(torch.zeros(1, 3, 16, 16)).mode()).shape == (1, 3, 16, 16)"
    ),
    "asymmetric_vae": (
        "c = m.AsymmetricVAEConfig(down_block_out_channels=(8, 8), layers_per_down_block=1, up_block_out_channels=(8, 8), layers_per_up_block=1, norm_num_groups=4, condition_layers=3)\n"
        "net, image = m.AsymmetricAutoencoderKL(c), torch.zeros(1, 3, 16, 16)\n"
        "assert net.decode(net.encode(image).mode(), image, image[:, :1]).shape == (1, 3, 16, 16)"
    ),
    "tiled_vae": (
        "c = m.VAEConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4)\n"
        "net = m.TiledAutoencoder(m.AutoencoderKL(c), encoder_tile=16, decoder_tile=8)\n"
        "assert net.decode(net.encode(torch.zeros(1, 3, 8, 96)).mode()).shape == (1, 3, 8, 96)"
    ),
    "clip": (
        "s = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)\n"
        "c = m.CLIPConfig(text=m.CLIPTextConfig(vocab_size=9, **s), vision=m.CLIPVisionConfig(image_size=8, patch_size=4, **s), projection_dim=5)\n"
        "net = m.CLIPModel(c)\n"
        "assert net.encode_text(torch.tensor([[0, 3, 8]])).shape == net.encode_image(torch.zeros(1, 3, 8, 8)).shape == (1, 5)"
    ),
    "taesd": (
        "net = m.AutoencoderTiny(m.TinyVAEConfig(width=8, encoder_blocks=(1, 1), decoder_blocks=(1, 1)))\n"
        "assert net.decode(net.encode(torch.zeros(1, 3, 6, 8)).mode()).shape == (1, 3, 6, 8)"
    ),
    "srvgg": (
        "net = m.SRVGGNet(m.SRVGGConfig(num_feat=8, num_conv=1, upscale=2))\n"
        "assert net(torch.zeros(1, 3, 5, 4)).shape == (1, 3, 10, 8)"
    ),
    "rrdb": (
        "net = m.RRDBNet(m.RRDBConfig(num_feat=8, num_block=1, num_grow_ch=4))\n"
        "assert net(torch.zeros(1, 3, 5, 6)).shape == (1, 3, 20, 24)"
    ),
    "controlnet": (
        "c = m.ControlNetConfig(block_out_channels=(8, 8), layers_per_block=1, cross_attention_dim=8, attention_head_dim=2, norm_num_groups=4,"
        " down_block_types=('CrossAttnDownBlock2D', 'DownBlock2D'), up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D'), use_rrdb=True)\n"
        "control = m.ControlNet(c)(torch.zeros(1, 4, 8, 8), torch.tensor([5]), torch.zeros(1, 7, 8), torch.zeros(1, 3, 64, 64))\n"
        "assert [r.shape for r in (*control.down, control.mid)] == [(1, 8, s, s) for s in (8, 8, 4, 4, 4)]"
    ),
    "pasd_unet": (
        "from types import SimpleNamespace\n"
        "c = m.PASDUNetConfig(block_out_channels=(8, 8), layers_per_block=1, cross_attention_dim=8, attention_head_dim=2, norm_num_groups=4,"
        " down_block_types=('CrossAttnDownBlock2D', 'DownBlock2D'), up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D'))\n"
        "down = [torch.zeros(1, 8, s, s) for s in (8, 8, 4, 4)]\n"
        "control = SimpleNamespace(down=down, mid=down[-1])\n"
        "assert m.PASDUNet(c)(torch.zeros(1, 4, 8, 8), torch.tensor([5]), torch.zeros(1, 7, 8), control).shape == (1, 4, 8, 8)"
    ),
}  # fmt: skip

# Run with -I: neither the current folder nor PYTHONPATH is looked at, so only what was copied can be found.
ALONE = """
import importlib, json, sys, traceback
root, jobs = sys.argv[1], json.loads(sys.argv[2])
sys.path.append(root)
import torch
failed = {}
for package, module, code in jobs:
    try:
        exec(code, {"m": importlib.import_module(f"{package}.{module}"), "torch": torch})
    except BaseException as error:
        failed[f"{package}/{module}.py"] = traceback.format_exception_only(error)[-1].strip()
foreign = {"nets", "samplers", "weights", "msbd", "tools"} & set(sys.modules)
print(json.dumps({"failed": failed, "foreign": sorted(foreign)}))
"""


def test_leaf_files_work_when_copied_alone(tmp_path: Path) -> None:
    jobs = []
    for path in LEAF_FILES:
        package = tmp_path / f"{path.parent.name}_{path.stem}_alone"
        package.mkdir()
        (package / "__init__.py").touch()
        for name in {path.name} | siblings(path):
            assert (path.parent / name).is_file(), (
                f"{name_of(path)}: its `Copying` line names {name}, which is not beside it"
            )
            shutil.copy(path.parent / name, package)
        if path.parent.name == "nets":
            assert path.stem in TINY, f"{name_of(path)}: add a tiny forward to TINY in {Path(__file__).name}"
        jobs.append((package.name, path.stem, TINY.get(path.stem, "") if path.parent.name == "nets" else ""))
    run = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, str(tmp_path), json.dumps(jobs)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == {"failed": {}, "foreign": []}


def test_copying_md_says_what_to_copy() -> None:
    rows = re.findall(
        r"^\| `((?:nets|samplers|weights)/\w+\.py)` \|([^|]*)\|",
        (ROOT / "docs/copying.md").read_text(),
        re.MULTILINE,
    )
    table = {file: set(re.findall(r"\w+\.py", take)) for file, take in rows}
    assert table == {name_of(path): siblings(path) for path in LEAF_FILES}, (
        "docs/copying.md: its table is not what the docstrings say"
    )
