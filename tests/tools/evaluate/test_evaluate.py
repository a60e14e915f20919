"""`python -m tools.evaluate`: what it asks for, what it measures, and that it goes on where it stopped."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from msbd.edit.config import EditConfig, ModelSpec
from msbd.edit.pipeline import EditResult
from msbd.edit.plan import plan_edit
from msbd.pixels.masks import dilate
from tests.helpers.tiny import ALPHAS
from tools._cli import version
from tools._report import code_state, write_json
from tools.evaluate import edit
from tools.evaluate.__main__ import JOBS, OLD_FLAGS, build_parser, main, today
from tools.evaluate.edit import (
    EditTask,
    EditTrial,
    Ledger,
    background_record,
    fitting_kinds,
    make_task,
    make_trials,
)
from tools.scenes.judge import nearest_colour
from tools.scenes.scenes import HELD_OUT

TINY = ("--scenes", "2", "--size", "96", "--steps", "2", "--repaint-steps", "1", "--device", "cpu")


def test_even_tasks_change_the_colour_and_odd_ones_the_kind_too() -> None:
    for number in range(16):
        task = make_task(number, 64)
        old, new = task.scene, task.asked
        assert old.seed >= HELD_OUT and new.colour != old.colour
        assert (new.kind == old.kind) == (number % 2 == 0)
        assert replace(new, colour=old.colour, kind=old.kind) == old  # nothing else
        assert make_task(number, 64) == task


def test_another_kind_covers_most_of_the_old_one() -> None:
    for number in range(8):
        scene = make_task(number, 64).scene
        kinds = fitting_kinds(scene)
        assert kinds and scene.kind not in kinds
        assert "bottle" not in kinds  # the slimmest covers none of the others


def test_mask_surrounds_the_object_and_its_core_shows_the_colour() -> None:
    right = 0
    for number in range(12):
        task = make_task(number, 128)
        changed = (task.truth - task.image).abs().amax(1, keepdim=True) > 0.05
        if number % 2 == 0:
            assert not (changed & (task.mask == 0)).any()
        assert (task.core <= task.mask).all() and 0 < task.core.sum() < task.mask.sum()
        right += nearest_colour(task.truth[0], task.core[0], task.asked.time) == task.asked.colour
        right += nearest_colour(task.image[0], task.core[0], task.scene.time) == task.scene.colour
    assert right >= 23


def test_trials_are_the_modes_with_their_candidates() -> None:
    args = build_parser().parse_args(["edit"])
    trials = make_trials(args, EditConfig())
    assert [trial.name for trial in trials] == [
        "source", "truth", "msbd, B = 5", "msbd, B = 1", "naive, B = 1", "segments, B = 1",
    ]  # fmt: skip
    assert not any(trial.config.decoder_optimization for trial in trials if trial.config)
    off, on = make_trials(build_parser().parse_args(["decoder-opt"]), EditConfig())
    assert off.config and on.config and not off.config.decoder_optimization
    assert replace(off.config, decoder_optimization=True) == on.config
    assert off.key != on.key


def background_of(task: EditTask, decoded: torch.Tensor, pasted: torch.Tensor) -> dict[str, float]:
    """The record of an edit whose last stage decoded to `decoded`, cut to the crop,
    and that ended as `pasted`.
    """
    plan = plan_edit(task.mask, EditConfig(), ModelSpec(native=32, multiple=16), ALPHAS)
    crop, stage = plan.crop, plan.stages[-1]
    assert stage.size == crop.size
    shown = {
        f"{stage.name}, result": decoded[..., crop.top : crop.bottom, crop.left : crop.right],
    }
    return background_record(
        task, EditResult(pasted, plan, decoded, None, 0, weight=pasted[:, :1] * 0), shown
    )


def test_background_error_is_that_of_the_ring_alone() -> None:
    task = make_task(0, 128)
    near = dilate(task.mask, edit.RING) - task.mask
    outside = 1 - near
    far_off = task.image + outside * 0.4  # under the mask and far from it
    assert background_of(task, far_off, task.image)["mse"] < 1e-12
    ringed = task.image + near * 0.2  # 0.1 of the range
    record = background_of(task, ringed, task.image)
    assert record["mse"] == pytest.approx(0.01, rel=1e-4) and record["psnr"] == pytest.approx(20, abs=0.01)


def test_edge_step_is_what_the_edit_adds() -> None:
    task = make_task(2, 128)
    assert background_of(task, task.image, task.image)["step"] == 0
    lifted = torch.where(task.mask > 0, torch.full_like(task.image, 1.0), task.image)
    assert background_of(task, task.image, lifted)["step"] > 20


def test_ledger_remembers_and_forgets() -> None:
    trial, other = EditTrial("a", EditConfig()), EditTrial("a", EditConfig(num_steps=7))
    Ledger("words").add(3, trial, {"psnr": 1.5})
    again = Ledger("words")
    assert again.get(3, trial) == {"scene": 3, "trial": trial.key, "psnr": 1.5}
    assert again.get(2, trial) is None and again.get(3, other) is None
    assert Ledger("words", fresh=True).get(3, trial) is None


def test_ledger_forgets_what_other_code_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    trial = EditTrial("a", EditConfig())
    Ledger("words").add(3, trial, {"psnr": 1.5})
    with monkeypatch.context() as patched:
        patched.setattr(edit, "code_state", lambda: "of another commit")
        assert Ledger("words").get(3, trial) is None
    assert edit.code_state() in Ledger("words").path.name


def test_code_state_is_another_after_every_change_of_code(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        said = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        subprocess.run(["git", "-C", str(tmp_path), *said, *words], check=True, capture_output=True)

    assert code_state(tmp_path) == version()  # no git there
    git("init", "--quiet")
    (tmp_path / "a.py").write_text("a = 1\n")
    git("add", "a.py")
    git("commit", "--quiet", "-m", "a")
    clean = code_state(tmp_path)
    assert len(clean) == 12 and int(clean, 16) >= 0
    (tmp_path / "picture.png").write_text("what a run writes is no code")
    (tmp_path / "folder").mkdir()
    assert code_state(tmp_path) == clean
    assert code_state(tmp_path / "folder") == version()  # somebody else's checkout around it
    states = [clean]
    for name, text in (("a.py", "a = 2\n"), ("a.py", "a = 3\n"), ("b.py", "b = 1\n"), ("b.py", "b = 2\n")):
        (tmp_path / name).write_text(text)
        states.append(code_state(tmp_path))
        assert states[-1].startswith(f"{clean}-dirty-")
    git("add", "a.py", "b.py")
    git("commit", "--quiet", "-m", "b")
    states.append(code_state(tmp_path))
    assert len(set(states)) == 6 and "dirty" not in states[-1]


def test_figures_say_which_code_measured_them(tmp_path: Path) -> None:
    write_json(tmp_path / "f.json", [])
    assert json.loads((tmp_path / "f.json").read_text())["code"] == code_state()


# ---- the command line ------------------------------------------------------------------------------------


def test_every_measurement_can_run_elsewhere() -> None:
    needed = {"photos": ["-i", "x"]}
    for job in sorted(JOBS.keys() - {"degrade"}):
        words = [job, *needed.get(job, []), "--device", "cuda", "--dtype", "bfloat16", "--seed", "3"]
        args = build_parser().parse_args([*words, "--json", "f.json", "--pictures", "p", "--steps", "4"])
        assert (args.device, args.dtype, args.seed, args.steps) == ("cuda", "bfloat16", 3, 4)


BEFORE = {
    "edit --modes msbd naive --num-steps=3": "edit --methods msbd naive --steps=3",
    "decoder-opt --num-steps 3": "decoder-opt --steps 3",
    "decoder-opt --num-steps 3 --steps=9": "decoder-opt --steps 3 --decoderopt-steps=9",
    "restore --guidance 2 --negative blurry": "restore --guidance-scale 2 --negative-prompt blurry",
    "colorize --guidance 1 2 --negative x": "colorize --guidance-scale 1 2 --negative-prompt x",
    "photos --input a b": "photos --image a b",
    "tiles --input=a": "tiles --image=a",
    "degrade --input a --out b": "degrade --image a --output b",
}


@pytest.mark.parametrize("before", BEFORE)
def test_flags_of_before_go_on_working(before: str, capsys: pytest.CaptureFixture[str]) -> None:
    words, after = before.split(), BEFORE[before].split()
    parsed = build_parser().parse_args(today(words))
    said = capsys.readouterr().err.splitlines()
    assert parsed == build_parser().parse_args(after)
    assert len(said) == sum(word not in after for word in words)
    for line in said:
        assert line.startswith("note: ") and line.split()[1] in before and line.split()[-1] in BEFORE[before]


def test_every_flag_of_before_is_tried() -> None:
    for job, flags in OLD_FLAGS.items():
        mine = " ".join(before for before in BEFORE if before.startswith(job))
        assert all(old in mine for old in flags), job


def test_steps_of_adam_have_a_name_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["decoder-opt", "--steps", "7"]
    assert today(words) == words
    assert "Adam's are --decoderopt-steps" in capsys.readouterr().err
    off, _ = make_trials(build_parser().parse_args([*words, "--decoderopt-steps", "9"]), EditConfig())
    assert off.config and off.config.decoderopt_steps == 9


# ---- the measurements ------------------------------------------------------------------------------------


def test_edit_is_measured_in_parts_that_add_up(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["edit", "--model", model, *TINY, "--first-stage-batch", "2", "--pictures", str(tmp_path / "p")]
    assert main([*command, "--start", "1", "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    assert main([*command, "--count", "1", "--quiet"]) == 0
    monkeypatch.setattr(edit, "_try", None)  # there is nothing left to do
    assert main([*command, "--json", str(tmp_path / "e.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if line.startswith("msbd, B = 1"))
    assert row.split()[4] == "2"
    assert next(line for line in lines if line.startswith("truth")).count("100.0 (34.2 .. 100.0)") >= 1
    stored = json.loads((tmp_path / "e.json").read_text())
    assert {len(records) for records in stored["records"].values()} == {2}
    assert {path.name for path in (tmp_path / "p").iterdir()} >= {
        "000 msbd 2.png",
        "001 source.png",
        "rows 1.png",
    }


def test_decoder_opt_is_paired(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = ["--json", str(tmp_path / "d.json")]
    assert main(["decoder-opt", "--model", model, *TINY, "--decoderopt-steps", "2", *written]) == 0
    out = capsys.readouterr().out
    assert "of 2" in out and "on - off" in out
    records = json.loads((tmp_path / "d.json").read_text())["records"]
    assert [r["scene"] for r in records["off"]] == [r["scene"] for r in records["on"]] == [0, 1]
    assert records["off"][0]["mse"] != records["on"][0]["mse"]


def test_impossible_options_are_one_line(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    for options in (["--scenes", "0"], ["--steps", "0"], ["--start", "-1"]):
        assert main(["edit", "--model", model, *options]) == 1
        assert capsys.readouterr().err.count("\n") == 1
