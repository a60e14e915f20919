"""examples/: the pictures are small, their masks fit, and the README's lines really make the masks."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.mark.parametrize("name", ["coffee", "chelsea"])
def test_mask_fits_its_picture(name: str) -> None:
    mask = np.asarray(Image.open(EXAMPLES / f"{name}_mask.png"))
    with Image.open(EXAMPLES / f"{name}.jpg") as picture:
        assert picture.size == mask.shape[::-1]
    assert set(np.unique(mask)) == {0, 255}
    assert all((EXAMPLES / f"{name}{end}").stat().st_size < 400_000 for end in (".jpg", "_mask.png"))


def test_readme_lines_make_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = re.search(r"```python\n(.*?)```", (EXAMPLES / "README.md").read_text(), re.DOTALL)
    assert found
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    exec(found[1], namespace)
    made = sorted(path.name for path in tmp_path.iterdir())
    assert made == sorted(path.name for path in EXAMPLES.iterdir() if path.suffix in (".jpg", ".png"))
    for name in made:
        ours, theirs = (np.asarray(Image.open(folder / name), np.int16) for folder in (tmp_path, EXAMPLES))
        # JPEG decoders and encoders of another version may round differently; masks may not.
        assert np.abs(ours - theirs).max() <= (8 if name.endswith(".jpg") else 0), name
