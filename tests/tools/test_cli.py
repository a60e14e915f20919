"""The command lines of edit and restore: what their help shows, that it is at hand at once,
and that earlier flags still work.
"""

import re
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

from tools import _cli, edit
from tools.restore import __main__ as restore

COMMANDS: dict[str, Any] = {"edit": edit, "restore": restore}
NEEDED = {"edit": ["-i", "a", "-m", "b", "-p", "c", "-o", "d"], "restore": ["-i", "a", "-o", "b"]}

# Every flag of version 0.3 but -h, --version and those that are needed, with a value of each that takes one.
EARLIER = {
    "edit": """
        --image a | --mask b | --prompt c | --output d | --model x | --lora x:0.5 | --preset official | --invert-mask
        --resize-mask | --compare x | --candidates x | --stages x | --no-metadata | --dry-run | --device cpu
        --dtype bfloat16 | --seed 3 | --debug | --steps 3 | --guidance-scale 3 | --negative-prompt x | --eta 0.3
        --background-level current | --background-noise fresh | --latent-mask center | --dilate-mask | --no-dilate-mask
        --formulas official | --mode msbd | --mode naive | --mode segments | --mode first-stage-only | --margin 2
        --first-stage-size 64 | --first-stage-batch 3 | --repaint-steps 3 | --repaint-jump 3 | --start-timestep 0.3
        --start-from noise | --clip-reranking | --no-clip-reranking | --rerank-area mask | --max-edgelen 64
        --straight-to-grid | --no-straight-to-grid | --upscale-startstep 0.3 | --grid-startstep 0.3 | --upscale-steps 3
        --upscaling-mode sharpen | --lowpass-reference half | --conditional-upscale | --no-conditional-upscale
        --blended-upscale | --no-blended-upscale | --tile 64 | --grid-overlap 16 | --tile-batch 3
        --decoder-optimization | --no-decoder-optimization | --decoderopt-steps 3 | --decoderopt-lr 0.1
        --decoderopt-weight 3 | --decoderopt-latents reencode | --feather 3""",
    "restore": """
        --image a | --output b | --scale 3 | --size 3x4 | --mode sr | --mode stylize | --mode oldphoto | --mode colorize
        --model x | --base x | --base-weight 0.3 | --lora x:0.5 | --prompt x | --high-level-info caption
        --preset official | --compare x | --skip-existing | --no-metadata | --dry-run | --device cpu | --dtype bfloat16
        --seed 3 | --debug | --fidelity 0.3 | --alpha-a 0.3 | --added-noise-level 3 | --conditioning-scale 0.3
        --control-start 0.3 | --control-end 0.3 | --color-fix adain | --guidance-scale 3 | --guidance-start 0.3
        --guidance-end 0.3 | --added-prompt x | --negative-prompt x | --method rrdb | --sampler ddim | --steps 3
        --spacing leading | --final-level first | --eta 0.3 | --init-latent-with-noise | --no-init-latent-with-noise
        --offset-noise-scale 0.3 | --posterior sample | --strength 0.3 | --formulas official | --ans fallback
        --process-size 64 | --latent-tiled-size 32 | --latent-tiled-overlap 3 | --tile-batch 3 | --vae-tiling fast
        --encoder-tiled-size 304 | --decoder-tiled-size 30""",
}
# What those of another name today are now: the flag, and how often the number is taken.
RENAMED: dict[str, dict[str, tuple[str, int]]] = {
    "edit": {"--mode": ("--method", 1)},
    "restore": {
        "--latent-tiled-size": ("--tile", 8),
        "--latent-tiled-overlap": ("--tile-overlap", 8),
        "--encoder-tiled-size": ("--vae-encoder-tile", 1),
        "--decoder-tiled-size": ("--vae-decoder-tile", 8),
    },
}


def earlier_flags(command: str) -> list[list[str]]:
    return [line.split() for line in re.split(r"[|\n]", EARLIER[command]) if line.strip()]


def parse(command: str, *words: str) -> dict[str, Any]:
    return vars(COMMANDS[command].build_parser().parse_args([*NEEDED[command], *words]))


def shown(command: str, *words: str) -> str:
    """What `python -m tools.COMMAND` prints into a pipe of no known width,
    and that it has not imported torch.
    """
    code = f"""
import sys
from {COMMANDS[command].__name__} import main
try:
    main({list(words)})
except SystemExit as ended:
    heavy = {{"torch", "torchvision", "numpy", "PIL", "safetensors", "tqdm"}}
    print(ended.code, sorted(heavy & set(sys.modules)), file=sys.stderr)
"""
    environment = {"PATH": "", "COLUMNS": ""}
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=_cli.ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stderr == "0 []\n"
    return run.stdout


# ---- help -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_short_and_shows_the_options_most_used(command: str) -> None:
    text = shown(command, "--help")
    assert text == shown(command, "-h") and len(text.splitlines()) <= 45
    flags = re.findall(r"^  (?:-\w .*, )?(--[a-z-]+)", text, re.MULTILINE)
    assert 10 <= len(flags) <= 18
    assert {"--help-all", "--image", "--output", "--prompt", "--model", "--steps", "--seed"} <= set(flags)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_all_names_every_option_and_no_earlier_flag(command: str) -> None:
    module, text = COMMANDS[command], shown(command, "--help-all")
    assert text == module.build_parser().format_help()
    flat = " ".join(text.split())
    for option in module.OPTIONS.values():
        assert re.search(rf"(?<![\w-]){option.flag}[ ,]", text)
        if option.name != "seed":  # whose sentence all commands share
            assert option.help in flat
    for old, (new, _) in RENAMED[command].items():
        assert not re.search(rf"^ +{old} ", text, re.MULTILINE) or old == "--mode"
        assert re.search(rf"^ +{new} ", text, re.MULTILINE)
    every = {flag for flag, *_ in earlier_flags(command)} - RENAMED[command].keys()
    assert all(re.search(rf"(?<![\w-]){flag}[ ,\n]", text) for flag in every)


@pytest.mark.parametrize("command, count", [("edit", 2), ("restore", 4)])
def test_the_commands_in_the_help_parse(command: str, count: int) -> None:
    lines = [line for line in shown(command, "-h").splitlines() if line.startswith("  python -m tools.")]
    assert len(lines) == count
    for line in lines:
        words = [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', line)]
        assert words[2] == f"tools.{command}" and words[3] == "-i"
        COMMANDS[command].build_parser().parse_args(words[3:])


@pytest.mark.parametrize("command", COMMANDS)
def test_help_answers_at_once(command: str) -> None:
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", f"tools.{command}", "--help"],
            cwd=_cli.ROOT,
            capture_output=True,
            check=True,
        )
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1.5  # 0.15 s where nothing else runs; torch alone takes longer than this


# ---- earlier flags --------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_earlier_flag_works_and_a_renamed_one_tells_its_new_name_once(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = parse(command)
    flags = earlier_flags(command)
    assert len(flags) == {"edit": 64, "restore": 55}[command]
    for flag, *values in flags:
        new, times = RENAMED[command].get(flag, (flag, 1))
        now = [str(times * int(value)) if times > 1 else value for value in values]
        expected = parse(command, new, *now)
        assert capsys.readouterr() == ("", "")
        assert parse(command, flag, *values, *[flag, *values] * (flag != "--lora")) == expected
        notes = capsys.readouterr().err.splitlines()
        assert len(notes) == (flag in RENAMED[command])
        if notes:
            assert notes[0].startswith(f"note: {flag} is now {new}")
            assert ("in pixels: 8 times" in notes[0]) == (times > 1)
            assert parse(command, f"{flag}={values[0]}") == expected
            assert len(capsys.readouterr().err.splitlines()) == 1
            parse(command, "--quiet", flag, *values)
        assert capsys.readouterr() == ("", "")
        if values and values[0] not in ("a", "b", "c", "d", "msbd", "sr"):  # what stands there anyway
            assert expected != plain


def test_restores_mode_stays_the_task_and_edits_mode_refuses_a_task(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert parse("restore", "--mode", "colorize")["mode"] == "colorize"
    assert capsys.readouterr().err == ""
    with pytest.raises(SystemExit) as ended:
        parse("edit", "--mode", "colorize")
    assert ended.value.code == 2
    note, *usage = capsys.readouterr().err.splitlines()
    assert note == "note: --mode is now --method" and "invalid choice: 'colorize'" in usage[-1]


def make_parser() -> _cli.CommandParser:
    """A command with sub-commands, as tools.evaluate is one."""
    parser = _cli.CommandParser(prog="x")
    job = parser.add_subparsers(dest="job", required=True).add_parser("tiles")
    job.add_argument("-i", "--image", required=True)
    job.add_argument("--tile-overlap", type=int, nargs="+")
    job.add_argument("--size", type=_cli.picture_size)
    job.add_argument("rest", nargs="*")
    job.add_renamed("--input", "--image")
    job.add_renamed("--latent-tiled-overlap", "--tile-overlap", times=8)
    return parser


def test_renamed_flags_of_a_sub_command(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["tiles", "--latent-tiled-overlap", "2", "3", "--size", "4x5", "--input", "a", "--", "--input"]
    args = make_parser().parse_args(words)
    assert (args.image, args.tile_overlap, args.size, args.rest) == ("a", [16, 24], (5, 4), ["--input"])
    assert capsys.readouterr().err.splitlines() == [
        "note: --latent-tiled-overlap is now --tile-overlap, in pixels: 8 times the number of latent cells",
        "note: --input is now --image",
    ]


def test_a_wrong_value_of_an_earlier_flag_is_refused_under_its_new_name(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        make_parser().parse_args(["tiles", "-i", "a", "--latent-tiled-overlap", "few"])
    assert ended.value.code == 2
    assert "argument --tile-overlap: invalid int value: 'few'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "kind, text, expected",
    [
        (_cli.picture_size, "31x77", (77, 31)),
        (_cli.finite, "1e3", 1000.0),
        (_cli.weighted_file, "a:b:2", ("a:b", 2.0)),
        (_cli.weighted_file, "C:\\loras\\x.safetensors", ("C:\\loras\\x.safetensors", 1.0)),
        (_cli.weighted_file, "C:\\loras\\x.safetensors:-0.5", ("C:\\loras\\x.safetensors", -0.5)),
    ],
)
def test_words_of_a_command_line(kind: Callable[[str], Any], text: str, expected: Any) -> None:
    assert kind(text) == expected


def test_pixels_are_whole_latent_cells() -> None:
    assert _cli.pixels_in_cells(512, "--tile") == 64
    with pytest.raises(ValueError, match=r"--tile is 100; expected pixels, a multiple of 8"):
        _cli.pixels_in_cells(100, "--tile")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--tile 32", "--tile is 32; expected at least 64 (pixels)"),
        ("--vae-decoder-tile 8", "--vae-decoder-tile is 8; expected at least 64 (pixels)"),
        ("--vae-encoder-tile 100", "--vae-encoder-tile is 100; expected a multiple of 8"),
        ("--tile-overlap 2048", "--tile-overlap is 2048; expected less than --tile, 256"),
        ("--steps 0", "--steps is 0; expected at least 1"),
    ],
)
def test_errors_of_a_config_speak_of_flags_and_pixels(
    flags: str, expected: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(_cli.ROOT)
    words = ["-i", "examples/coffee_small.jpg", "-o", "restored.png", "--dry-run", "--model", "mini"]
    assert restore.main([*words, *flags.split()]) == 1
    assert expected in capsys.readouterr().err


def test_numbers_of_renamed_flags_are_multiplied_in_any_spelling() -> None:
    for spelling in ("16", "+16", "1_6"):
        args = restore.build_parser().parse_args(
            ["-i", "a.png", "-o", "b.png", "--quiet", "--latent-tiled-size", spelling]
        )
        assert args.latent_tiled_size == 128
