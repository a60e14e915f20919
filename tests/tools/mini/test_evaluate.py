"""Figures of a bundle: each is right where the right answer is known, and the command tells them all."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.tiny import pixel_pipeline
from tests.helpers.tiny_bundle import write_tiny_bundle
from tools._report import figures_table, mean, share, table
from tools.mini.__main__ import main
from tools.mini.figures import (
    Sample,
    clip_figure,
    distinct_scenes,
    draw_captions,
    rrdb_figures,
    sample_figures,
    scenes_by_caption,
    vae_figures,
)
from tools.scenes import judge
from tools.scenes.judge import Judge, JudgeNet
from tools.scenes.scenes import HELD_OUT


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


class Bicubic(nn.Module):
    """An upscaler that is the one it is compared with."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=4, mode="bicubic", align_corners=False)


class Oracle(nn.Module):
    """A CLIP that knows which picture it is shown next: two of each caption, in order.
    It is wrong where `wrong` says.
    """

    def __init__(self, captions: int, wrong: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.zeros(()))
        self.captions, self.wrong, self.seen = captions, wrong, 0

    def encode_text(self, ids: Tensor) -> Tensor:
        return torch.eye(self.captions)

    def encode_image(self, pixels: Tensor) -> Tensor:
        index = torch.arange(self.seen, self.seen + len(pixels))
        self.seen += len(pixels)
        shift = torch.tensor([1 if i in self.wrong else 0 for i in index.tolist()])
        return torch.eye(self.captions)[(index // 2 + shift) % self.captions]


def with_parameter(pipe: Any) -> Any:
    """An identity autoencoder has no weights; give it one, as the bundle's has."""
    pipe.vae.unused = nn.Parameter(torch.zeros(1))
    return pipe


def test_autoencoder_that_is_one_level_off_has_48_db(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = with_parameter(pixel_pipeline())
    monkeypatch.setattr(pipe.vae, "decode", lambda latent: latent - 2 / 255)
    figure = vae_figures(pipe, 3)[0]
    assert figure.value == pytest.approx(20 * math.log10(255), abs=0.01) and figure.reached


def test_rrdb_gains_nothing_over_itself() -> None:
    figures = rrdb_figures(pixel_pipeline(upscaler=Bicubic()), 3)
    assert figures[0].value == figures[1].value and 15 < figures[0].value < 45
    assert (figures[2].value, figures[2].low, figures[2].high, figures[2].reached) == (0, 0, 0, False)


def test_clip_figure_counts_the_right_ones() -> None:
    assert clip_figure(pixel_pipeline(clip=Oracle(5)), 5).value == 100
    figure = clip_figure(pixel_pipeline(clip=Oracle(5, wrong=(3, 8))), 5)
    assert figure.value == 80 and figure.count == 10


def test_retrieval_has_distinct_captions_and_held_out_scenes() -> None:
    found = scenes_by_caption(20, 2)
    assert len(found) == 20 and all(len(scenes) == 2 for scenes in found.values())
    for caption, scenes in found.items():
        assert all(scene.caption == caption and scene.seed >= HELD_OUT for scene in scenes)
        assert scenes[0].seed != scenes[1].seed


def test_samples_have_distinct_captions() -> None:
    assert len({scene.caption for scene in distinct_scenes(96)}) == 96
    assert distinct_scenes(96)[:10] == distinct_scenes(10)
    with pytest.raises(ValueError, match="576"):
        distinct_scenes(577)


def test_drawing_ends_where_the_denoiser_points() -> None:
    pipe = with_parameter(pixel_pipeline((0.5, -0.5, 0.0)))
    images = draw_captions(pipe, ["one", "two"], steps=5, seed=0)
    assert images.shape == (2, 3, 64, 64)
    assert images.mean((2, 3)).tolist()[1] == pytest.approx([0.5, -0.5, 0.0], abs=0.01)


def test_sample_figures_want_the_asked_kind_and_colour(tmp_path: Path) -> None:
    asked = distinct_scenes(4)
    image = torch.zeros(3, 16, 16)
    seen = [(s.kind, s.colour) for s in asked[:2]] + [("nothing", asked[2].colour), (asked[3].kind, None)]
    samples = [Sample(scene, image, *what) for scene, what in zip(asked, seen, strict=True)]
    assert [figure.value for figure in sample_figures(samples, tmp_path)] == [75, 75, 50]
    assert (tmp_path / "samples.png").exists()


def test_tables_are_aligned() -> None:
    lines = table([["", "n"], ["a long name", "1"], ["b", "1000"]]).splitlines()
    assert [len(line) for line in lines] == [17] * 4
    text = figures_table([share("good", [True] * 9 + [False], 80.0), mean("none", [], "dB", 1.0)])
    assert "90.0 (59.6 .. 98.2)" in text and text.count("reached") == 2 and "NOT reached" in text


def test_the_command_prints_a_table_and_writes_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(judge, "load_judge", lambda: Judge(JudgeNet().eval(), {}))
    model = write_tiny_bundle(tmp_path / "model")
    options = ["--pairs", "2", "--samples", "3", "--steps", "2", "--device", "cpu", "--quiet"]
    written = ["--json", str(tmp_path / "f.json"), "--pictures", str(tmp_path / "p")]
    assert main(["evaluate", "--model", str(model), *options, *written]) == 0
    assert capsys.readouterr().out == ""
    stored = json.loads((tmp_path / "f.json").read_text())
    names = [figure["name"] for figure in stored["figures"]]
    assert "RRDB over bicubic, paired" in names and "samples, asked object" in names
    assert len(stored["samples"]) == 3
    assert {path.name for path in (tmp_path / "p").iterdir()} == {"vae.png", "rrdb.png", "samples.png"}


def test_a_missing_model_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--model", "no/such/model"]) == 1
    assert capsys.readouterr().err.startswith("error: ")
