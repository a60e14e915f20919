"""`python -m tools.evaluate photos | tiles`: where tiles end, what a seam measures, and the tables."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from msbd.load import load_restore_pipeline
from msbd.pixels.files import load_image, save_image
from msbd.restore.config import ModelSpec, RestoreConfig
from msbd.restore.pipeline import RestorePipeline
from msbd.restore.plan import RestorePlan, plan_restore
from tests.helpers.tiny_bundle import write_pasd_folder, write_tiny_bundle
from tools.evaluate.__main__ import build_parser, main
from tools.evaluate.photos import (
    Restored,
    border_lines,
    border_steps,
    find_pictures,
    make_cases,
    make_sheet,
    photo_table,
    tiles_in_cells,
)

SMALL = ModelSpec(native=32, guidance_scale=1, uses_prompts=False)


def plan_for(output: tuple[int, int], tile: int = 8, overlap: int = 2, **options: Any) -> RestorePlan:
    config = RestoreConfig(latent_tiled_size=tile, latent_tiled_overlap=overlap, **options)
    return plan_restore((16, 16), output, config, SMALL)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> RestorePipeline:
    """A tiny PASD with an upscaler."""
    folder = tmp_path_factory.mktemp("model")
    bundle = write_tiny_bundle(folder / "base")
    pipe = load_restore_pipeline(write_pasd_folder(folder / "pasd"), base=bundle)
    pipe.spec = SMALL
    return pipe


@pytest.fixture
def tiny(pipe: RestorePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the commands load it."""
    monkeypatch.setattr("tools.evaluate.photos.load_restore_pipeline", lambda model, **_: pipe)


# ---- borders -----------------------------------------------------------------------------------------------


def test_borders_are_where_tiles_begin_and_end() -> None:
    (_, rows, other_rows), (_, columns, others) = border_lines(plan_for((64, 112)))
    assert (rows, other_rows) == ([], [8, 16, 24, 32, 40, 48, 56])
    # Tiles of 8 of the 14 cells, at 0 and 6: the second begins at 48 and the first ends at 64.
    assert columns == [48, 64]
    assert others == [8, 16, 24, 32, 40, 56, 72, 80, 88, 96, 104]


def test_borders_follow_the_frame_and_the_size() -> None:
    # 64 x 108 is framed by 14 cells, 2 pixels wider on both sides.
    assert border_lines(plan_for((64, 108)))[1][1] == [46, 62]
    # Restored at 96 x 168, whose 21 cells have tiles at 0, 6, 12, 13, and shrunk to 32 x 56.
    assert border_lines(plan_for((32, 56), process_size=96))[1][1] == [16, 21, 32, 35, 37, 53]


@pytest.mark.parametrize(("line", "seen"), [(48, 5.0), (64, 5.0), (56, -10 / 11), (47, 0.0)])
def test_a_step_is_seen_at_the_borders_only(line: int, seen: float) -> None:
    plan, image = plan_for((64, 112)), torch.zeros(1, 3, 64, 112)
    image[..., line:] = 10 / 127.5
    steps = border_steps(image, plan)
    assert steps.shape == (2,)
    assert steps.mean().item() == pytest.approx(seen, abs=1e-5)


def test_a_single_tile_has_no_borders() -> None:
    assert border_steps(torch.rand(1, 3, 64, 64), plan_for((64, 64))).shape == (0,)


def test_steps_of_tiles_that_begin_in_every_cell() -> None:
    assert border_steps(torch.rand(1, 3, 64, 256), plan_for((64, 256), overlap=7)).isfinite().all()


# ---- photos ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("tiny")
def test_photos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    Image.effect_noise((24, 16), 60).convert("RGB").save(folder / "noise.png")
    Image.new("RGB", (15, 17), (200, 100, 30)).save(folder / "plain.jpg")
    (folder / "notes.txt").write_text("no picture")
    words = ["photos", "-i", str(folder), "--steps", "1", "--fidelity", "0", "1"]
    out = tmp_path / "out"
    assert main([*words, "--pictures", str(out), "--json", str(out / "photos.json"), "--debug"]) == 0
    told = capsys.readouterr().out
    assert "8 of 8 results have the asked size" in told
    assert "15 x 17 -> 60 x 68" in told
    results = json.loads((out / "photos.json").read_text())["results"]
    noise, plain = results[str(folder / "noise.png")], results[str(folder / "plain.jpg")]
    assert list(noise) == list(plain) == ["bicubic", "RRDB", "fidelity 0", "fidelity 1"]
    assert plain["bicubic"]["colour"] < 0.01 < 1 < plain["RRDB"]["colour"]  # whose weights are random
    assert plain["bicubic"]["input"] == 99 > plain["RRDB"]["input"]
    assert plain["bicubic"]["sharpness"] < 0.5 < noise["bicubic"]["sharpness"]
    assert 0 < noise["bicubic"]["input"] < 60
    assert "seam" in noise["fidelity 1"]
    assert "seam" not in noise["bicubic"]
    with Image.open(out / "photos 1.png") as sheet:
        assert sheet.width == 1600
    assert load_image(out / "02 plain, fidelity 1.png").size == (68, 60)


def test_a_wrong_size_is_told() -> None:
    values = {"colour": 1.0, "input": 30.0, "sharpness": 2.0, "seconds": 3.0}
    rows = [(Path("a.png"), [Restored("RRDB", torch.zeros(1), "8 x 8 -> 8 x 8, NOT 32 x 32", 0, values)])]
    assert "0 of 1 results have the asked size" in photo_table(rows)


def test_a_sheet_holds_pictures_of_any_shape(tmp_path: Path) -> None:
    rows = []
    for size in ((2, 900), (900, 2), (30, 30)):
        image = torch.ones(1, 3, *size)
        save_image(image, tmp_path / f"{size[0]}.png")
        rows.append((tmp_path / f"{size[0]}.png", [Restored("x", image, "", 0, {})] * 7))
    assert make_sheet(rows).shape == ((1 + 8) + (256 + 8) + (192 + 8), 1600, 3)


def test_folders_without_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert find_pictures([tmp_path / "named.xyz"]) == [tmp_path / "named.xyz"]
    assert main(["photos", "-i", str(tmp_path / "named.xyz")]) == 1
    assert "named.xyz" in capsys.readouterr().err
    assert main(["photos", "-i", str(tmp_path)]) == 1
    assert "no pictures there" in capsys.readouterr().err


# ---- tiles -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("tiny")
def test_tiles(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.effect_noise((30, 30), 60).convert("RGB").save(tmp_path / "photo.png")
    words = ["tiles", "-i", str(tmp_path / "photo.png"), "--steps", "1", "--size", "112x64"]
    words += ["--tile", "64", "--tile-overlap", "16", "32", "--json", str(tmp_path / "t.json")]
    assert main([*words, "--pictures", str(tmp_path / "out"), "--debug"]) == 0
    assert "worst seam" in capsys.readouterr().out
    rows = json.loads((tmp_path / "t.json").read_text())["results"]
    assert [row["case"] for row in rows[::2]] == ["scene", "flat", "gradient", "photo"]
    assert [(row["tile"], row["overlap"], row["tiles"]) for row in rows[:2]] == [(64, 16, 2), (64, 32, 3)]
    for row in rows:
        assert row["seam"] == pytest.approx(row["step"] - row["untiled step"], abs=1e-6)
        assert 10 < row["PSNR"] < 100
    assert load_image(tmp_path / "out" / "flat, tiles of 64, overlap 32.png").size == (64, 112)


def test_tiles_are_told_in_pixels_or_as_before_in_cells(capsys: pytest.CaptureFixture[str]) -> None:
    parse = build_parser().parse_args
    pixels = ["tiles", "--tile", "64", "--tile-overlap", "16", "32"]
    assert tiles_in_cells(parse(pixels), 8) == (8, [2, 4])
    assert tiles_in_cells(parse(["tiles"]), 8) == (None, None)
    assert capsys.readouterr().err == ""
    cells = ["tiles", "--latent-tiled-size", "8", "--latent-tiled-overlap", "2", "4"]
    assert tiles_in_cells(parse(cells), 8) == (8, [2, 4])
    assert capsys.readouterr().err.count("in pixels: 8 times the number of latent cells") == 2
    with pytest.raises(ValueError, match="--tile-overlap 12: expected a multiple of 8 pixels"):
        tiles_in_cells(parse(["tiles", "--tile-overlap", "8", "12"]), 8)


@pytest.mark.usefixtures("tiny")
def test_a_single_tile_is_nothing_to_compare(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tiles", "--size", "64x64"]) == 1
    assert "a single tile" in capsys.readouterr().err


def test_cases_are_of_the_asked_shape(tmp_path: Path) -> None:
    pixels = torch.zeros(1, 3, 40, 90)
    pixels[..., 15:75] = 1
    save_image(pixels, tmp_path / "wide.png")
    cases = dict(make_cases((64, 96), tmp_path / "wide.png"))
    assert [tuple(image.shape[-2:]) for image in cases.values()] == [(16, 24)] * 3 + [(40, 60)]
    assert bool((cases["wide"] == 1).all())  # its middle
    levels = cases["gradient"][0, 0] * 127.5 + 127.5
    assert levels[0, 0].item() == pytest.approx(64)
    assert levels[-1, -1].item() == pytest.approx(191)
    assert float(levels.diff(dim=1).min()) > 0 < float(levels.diff(dim=0).min())
    assert cases["flat"].unique().numel() == 1
