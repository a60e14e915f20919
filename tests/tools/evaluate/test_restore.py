"""`python -m tools.evaluate restore`: methods side by side, PASD of a file among them."""

import json
from pathlib import Path

import pytest
import torch

from msbd.train.config import TrainConfig
from msbd.train.loop import World
from tests.helpers.tiny_bundle import write_tiny_bundle
from tools.evaluate.__main__ import build_parser, main
from tools.evaluate.methods import pasd_method
from tools.evaluate.restore import bicubic, make_pairs
from tools.train.run import PASDRun, TrainingJob


class Gray:
    """One picture."""

    def __len__(self) -> int:
        return 1

    def read(self, index: int, /) -> tuple[object, str]:
        raise AssertionError("nothing is trained here")


def write_untrained(folder: Path, bundle: Path, variant: str) -> Path:
    """PASD as training begins: the base itself, whatever it is given to see."""
    job = TrainingJob(Gray(), Gray(), folder, base=str(bundle), variant=variant)  # pyright: ignore[reportArgumentType]
    return PASDRun(job, TrainConfig(), torch.device("cpu"), World()).export()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle"))


def test_the_table_has_every_method(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full, alone = (write_untrained(tmp_path / v, bundle, v) for v in ("full", "none"))
    words = ["restore", "--model", str(bundle), "--scenes", "3", "--steps", "2", "--quiet", "--debug"]
    words += ["--device", "cpu"]
    words += ["--pasd", f"full={full}", "--pasd", f"none={alone.parent}", "--baseline", "none"]
    assert main([*words, "--json", str(tmp_path / "r.json"), "--pictures", str(tmp_path / "pictures")]) == 0
    results = json.loads((tmp_path / "r.json").read_text())["results"]
    assert list(results) == ["bicubic", "RRDB", "full", "none"]
    assert all(len(values) == 3 for row in results.values() for values in row.values())
    # Both begin as the base, to the rounding of float16 files.
    assert results["full"]["PSNR"] == pytest.approx(results["none"]["PSNR"], abs=0.05)
    assert (tmp_path / "pictures" / "restored 1.png").exists()
    assert capsys.readouterr().err == ""


def test_batches_do_not_matter(bundle: Path, tmp_path: Path) -> None:
    path = write_untrained(tmp_path, bundle, "full")
    words = ["restore", "--model", str(bundle), "--steps", "2", "--captions", "--guidance-scale", "2"]
    method = pasd_method(path, build_parser().parse_args([*words, "--device", "cpu"]))
    pairs = make_pairs(3)
    low, captions = torch.cat([pair.low for pair in pairs]), [pair.caption for pair in pairs]
    with torch.no_grad():
        together = method(low, captions, 5)
        alone = method(low[2:], captions[2:], 7)
    assert together.shape == (3, 3, 128, 128)
    torch.testing.assert_close(together[2:], alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize("word", ["full", "=x", "full="])
def test_names_and_paths_are_told_apart(word: str) -> None:
    with pytest.raises(SystemExit):
        main(["restore", "--pasd", word])


def test_large_areas_take_the_degraded_pictures_colours(bundle: Path, tmp_path: Path) -> None:
    path, pairs = write_untrained(tmp_path, bundle, "none"), make_pairs(2)
    low, captions = torch.cat([pair.low for pair in pairs]), ["", ""]
    far = {}
    for fix in ("wavelet", "none"):
        args = build_parser().parse_args(
            ["restore", "--steps", "2", "--color-fix", fix, "--model", str(bundle), "--device", "cpu"]
        )
        with torch.no_grad():
            made = pasd_method(path, args)(low, captions, 0)
        far[fix] = (made - bicubic(low, captions, 0)).mean((2, 3)).abs().max().item()
    assert far["wavelet"] < 0.2 * far["none"]
