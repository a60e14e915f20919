"""What a person clones, or carries to another machine, stays small,
and what stored cases leave out can be made again.
"""

import math
import subprocess
from pathlib import Path

import pytest

from tests.helpers.goldens import GOLDEN, load_golden, read_json

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 54 * 2**20  # bytes of all tracked files together


def tracked_files() -> list[Path]:
    """The files that git tracks and that are there; skips outside of a git checkout."""
    try:
        listed = subprocess.run(
            ["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, check=True, text=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in listed.split("\0") if name]
    return [file for file in files if file.is_file()]


def test_tracked_files_are_at_most_54_mebibytes() -> None:
    sizes = {str(file.relative_to(ROOT)): file.stat().st_size for file in tracked_files()}
    largest = ", ".join(sorted(sizes, key=lambda name: -sizes[name])[:10])
    assert len(sizes) > 100
    assert sum(sizes.values()) <= LIMIT, f"{sum(sizes.values()):,} bytes are tracked; the largest: {largest}"


CASES = [
    (path.parent.name, path.name.split(".json")[0])
    for path in sorted(GOLDEN.rglob("*.json*"))  # or compressed
    if path.parent.name not in ("manifests", "clip_tokenizer")
]


@pytest.mark.parametrize(("family", "case"), CASES)
def test_a_case_has_every_tensor_that_its_sidecar_lists(family: str, case: str) -> None:
    """Stored or made, of the listed kind and shape; a sampled one by a stride that meets every row and
    column.
    """
    golden = load_golden(family, case)
    for name, (kind, shape) in golden.meta.get("tensors", {}).items():
        assert str(golden[name].dtype) == f"torch.{kind}", name
        assert list(golden[name].shape) == shape, name
    for name, stride in golden.meta.get("strided", {}).items():
        assert math.gcd(stride, math.prod(golden.meta["whole"][name])) == 1, name


def test_key_lists_are_stored_once() -> None:
    """No sidecar repeats a list of 21 or more keys and shapes that another one has."""
    seen: dict[str, str] = {}
    for family, case in CASES:
        weights = read_json(f"{family}/{case}.json").get("weights")
        for key, value in weights.items() if isinstance(weights, dict) else ():
            if key.startswith("shapes") and isinstance(value, dict) and len(value) > 20:
                place = seen.setdefault(str(value), f"{family}/{case}")
                assert place == f"{family}/{case}", f"{family}/{case} repeats {key} of {place}"
