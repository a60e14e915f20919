import io
import sys
from pathlib import Path

import numpy as np
import pytest

from msbd.pixels.files import Photo, load_image, save_photo
from tests.helpers.fuzz_pictures import run, seeds

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the process that is fed needs POSIX")


def test_damaged_pictures_are_read_or_refused_in_one_line(tmp_path: Path) -> None:
    report = run(4000, seed=1, keep=tmp_path)
    assert report.faults == []
    assert report.tried == 4000 and report.read > 400


@pytest.mark.long
def test_many_damaged_pictures_are_read_or_refused_in_one_line(tmp_path: Path) -> None:
    report = run(30_000, seed=2, keep=tmp_path)
    assert report.faults == []
    assert report.tried == 30_000


def test_a_damaged_picture_spoils_none_that_comes_later(tmp_path: Path) -> None:
    """libvips kept its words, with a byte of the file in them, over which pyvips failed at the next call."""
    avif = next(seed.data for seed in seeds() if seed.name == "AVIF grey")
    at = avif.index(b"ipma") + 14  # how many properties the picture has; then each, marked if it is essential
    marked = bytes(one | 0x80 for one in avif[at + 1 : at + 1 + avif[at]])
    avif = (avif[: at + 1] + marked + avif[at + 1 + avif[at] :]).replace(b"ispe", b"is\xf0e")
    with pytest.raises(ValueError, match="not a readable picture"):
        load_image(io.BytesIO(avif))
    deep = np.arange(600, dtype=np.uint16).reshape(20, 30)
    save_photo(Photo(deep), tmp_path / "a.png")
    assert np.array_equal(load_image(tmp_path / "a.png").samples, deep)
