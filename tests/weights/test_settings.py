"""weights/settings.py: who is believed about a model's training, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from weights.files import WeightsError, write_safetensors
from weights.hub import Source
from weights.settings import Training, read_config, read_normalisation, read_training

HUGE = 10**400  # JSON has no largest number


def source(folder: Path, said: Any = None, **config: Any) -> Source:
    """A file whose metadata say `said`, and the config.json beside it."""
    path = folder / "unet.safetensors"
    metadata = {} if said is None else {"config": said if isinstance(said, str) else json.dumps(said)}
    write_safetensors(path, {"a": torch.zeros(1)}, metadata)
    return Source(path, config)


def refusal(given: Source, scheduler: dict[str, Any] | None = None) -> str:
    """The one line with which settings are refused."""
    with pytest.raises(WeightsError) as refused:
        read_training(given, scheduler or {})
    line = str(refused.value)
    assert "\n" not in line and line.startswith(f"{given.path}: ") and len(line) < 300
    return line


# ---- training ----------------------------------------------------------------------------------------------


def test_what_nothing_says_is_as_in_stable_diffusion(tmp_path: Path) -> None:
    usual = Training("epsilon", "scaled_linear", 0.00085, 0.012, False, None, None, None)
    assert read_training(source(tmp_path), {}) == Training() == usual
    torch.save({"a": torch.zeros(1)}, tmp_path / "x.ckpt")
    assert read_training(Source(tmp_path / "x.ckpt"), {}) == usual
    assert read_training(Source(tmp_path / "x.safetensors.index.json"), {}) == usual  # of shards: not opened


def test_stable_diffusions_own_scheduler_config_says_nothing_new(tmp_path: Path) -> None:
    scheduler = {
        "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012, "beta_schedule": "scaled_linear",
        "beta_start": 0.00085, "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
        "trained_betas": None, "clip_sample": False,
    }  # fmt: skip
    assert read_training(source(tmp_path, sample_size=64), scheduler) == Training(native=512)


def test_the_scheduler_is_followed_and_the_metadata_go_before_it(tmp_path: Path) -> None:
    scheduler = {"prediction_type": "v_prediction", "beta_schedule": "linear", "beta_start": 0.001, "beta_end": 0.02,
                 "rescale_betas_zero_snr": True}  # fmt: skip
    followed = Training("v_prediction", "linear", 0.001, 0.02, True)
    assert read_training(source(tmp_path), scheduler) == followed
    said = {"prediction_type": "epsilon", "beta_start": 0.002, "rescale_betas_zero_snr": False, "native": 128,
            "multiple": 16, "guidance_scale": 3}  # fmt: skip
    found = read_training(source(tmp_path, said, sample_size=64), scheduler)
    assert found == Training("epsilon", "linear", 0.002, 0.02, False, 128, 16, 3.0)
    assert type(found.guidance_scale) is float


@pytest.mark.parametrize(
    ("cells", "native"),
    [(64, 512), (96, 768), (16, 128), (72, None), (8, None), (0, None), (-64, None), (65, None), (True, None), ("64", None), (64.0, None),
     ([64, 64], None), (None, None)],
)  # fmt: skip
def test_the_native_size_is_eight_pixels_a_cell(tmp_path: Path, cells: Any, native: int | None) -> None:
    assert read_training(source(tmp_path, sample_size=cells), {}).native == native


def test_other_fields_of_a_config_json_say_nothing_of_the_training(tmp_path: Path) -> None:
    config = {"prediction_type": "v_prediction", "beta_start": 0.5, "native": 7, "num_train_timesteps": 3}
    assert read_training(source(tmp_path, **config), {}) == Training()


@pytest.mark.parametrize("flag", [True, False, None])
def test_zero_terminal_snr(tmp_path: Path, flag: bool | None) -> None:
    assert read_training(source(tmp_path), {"rescale_betas_zero_snr": flag}).rescale_betas_zero_snr is bool(
        flag
    )


@pytest.mark.parametrize(
    "own",
    [{"num_train_timesteps": 500}, {"num_train_timesteps": None}, {"trained_betas": [0.1] * 999}, {"trained_betas": []},
     {"trained_betas": [0.1] * 999 + [1.0]}, {"trained_betas": [0.1] * 999 + [0]}, {"trained_betas": "linear"},
     {"trained_betas": [0.1] * 999 + [float("nan")]}, {"trained_betas": [0.1] * 999 + [True]}],
)  # fmt: skip
def test_a_noise_schedule_that_is_none_of_1000_timesteps_is_refused(
    tmp_path: Path, own: dict[str, Any]
) -> None:
    for line in (refusal(source(tmp_path), own), refusal(source(tmp_path, own))):
        assert "expected 1000" in line and next(iter(own)) in line and len(line.splitlines()) == 1


def test_trained_betas_and_other_schedules_are_followed(tmp_path: Path) -> None:
    betas = [0.001 + 1e-6 * k for k in range(1000)]
    for found in (
        read_training(source(tmp_path), {"trained_betas": betas}),
        read_training(source(tmp_path, {"trained_betas": betas}), {}),
    ):
        assert found == Training(trained_betas=tuple(betas))
    said = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"}
    assert read_training(source(tmp_path), said) == Training("sample", "squaredcos_cap_v2")


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"prediction_type": "x0"}, "prediction_type = 'x0', expected one of epsilon, v_prediction, sample"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule = 'sigmoid', expected one of scaled_linear, linear"),
        ({"beta_schedule": ["linear"]}, "beta_schedule = "),
        ({"prediction_type": ["epsilon"]}, "prediction_type"),
        ({"prediction_type": None}, "prediction_type = None"),
        ({"beta_start": 0.02}, "betas from 0.02 to 0.012"),
        ({"beta_end": 1.5}, "betas from 0.00085 to 1.5"),
        ({"beta_start": 0}, "beta_start = 0, expected a number above 0"),
        ({"beta_end": "0.012"}, "beta_end = '0.012'"),
        ({"beta_start": HUGE}, "beta_start = 1000"),
        ({"beta_start": float("nan")}, "beta_start = nan"),
        ({"rescale_betas_zero_snr": "false"}, "rescale_betas_zero_snr = 'false', expected true or false"),
        ({"rescale_betas_zero_snr": 1}, "rescale_betas_zero_snr = 1"),
        ({"guidance_scale": HUGE}, "guidance_scale = 1000"),
        ({"guidance_scale": None}, "guidance_scale = None"),
        ({"guidance_scale": True}, "guidance_scale = True"),
        ({"native": 0}, "native = 0, expected pixels"),
        ({"native": 512.0}, "native = 512.0"),
        ({"native": True}, "native = True"),
        ({"multiple": "8"}, "multiple = '8'"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(
    tmp_path: Path, said: dict[str, Any], reason: str
) -> None:
    assert reason in refusal(source(tmp_path, said))


@pytest.mark.parametrize("said", ["{", "[]", "null", "1", "[" * 100_000])
def test_metadata_that_are_no_table_are_refused(tmp_path: Path, said: str) -> None:
    assert "config is not a JSON table" in refusal(source(tmp_path, said))


def test_a_damaged_file_is_named_once(tmp_path: Path) -> None:
    path = tmp_path / "unet.safetensors"
    path.write_bytes(b"<html>")
    assert refusal(Source(path)).count(str(path)) == 1
    assert "absent.safetensors: no such file" in refusal(Source(tmp_path / "absent.safetensors"))


def test_the_metadata_are_given_whole(tmp_path: Path) -> None:
    assert read_config(source(tmp_path, {"native": 1, "x": [1, [2]]}, native=2), "unet") == {
        "native": 1,
        "x": (1, (2,)),
    }
    assert (
        read_config(source(tmp_path), "unet") == read_config(Source(tmp_path / "x.index.json"), "unet") == {}
    )
    several = source(tmp_path, {"unet": {"native": 3}, "vae": {"native": 4}})
    assert read_config(several, "unet") == {"native": 3} and read_config(several, "vae") == {"native": 4}


def test_a_yaml_or_modelspec_says_that_a_single_file_predicts_v(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text('model:\n  params:\n    parameterization: "v"  \n')
    for name, metadata in (("a", {}), ("b", {"modelspec.prediction_type": "v"}), ("c", {})):
        write_safetensors(tmp_path / f"{name}.safetensors", {"x": torch.zeros(1)}, metadata)
    kinds = [read_training(Source(tmp_path / f"{name}.safetensors"), {}).prediction_type for name in "abc"]
    assert kinds == ["v_prediction", "v_prediction", "epsilon"]


# ---- normalisation -----------------------------------------------------------------------------------------

GIVEN = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)


def test_the_metadata_give_the_normalisation_and_else_the_caller(tmp_path: Path) -> None:
    assert read_normalisation(source(tmp_path), *GIVEN) == GIVEN
    assert read_normalisation(Source(tmp_path / "x.index.json"), *GIVEN) == GIVEN
    assert read_normalisation(source(tmp_path, {"image_mean": [0, 0.5, 1]}), *GIVEN) == (
        (0, 0.5, 1),
        GIVEN[1],
    )
    both = source(tmp_path, {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "other": 1})
    assert read_normalisation(both, *GIVEN) == ((0.5,) * 3, (0.25,) * 3)


@pytest.mark.parametrize(
    "said",
    [{"image_mean": [1, 2]}, {"image_mean": 0.5}, {"image_mean": [1, 2, "3"]}, {"image_mean": [True] * 3}, {"image_mean": None}, {"image_mean": [HUGE, 0, 0]}, {"image_std": [1, 1, float("nan")]},
     {"image_std": [1, 1, 0]}, {"image_std": [1, -1, 1]}, {"image_std": [1, 1, 1, 1]}, {"image_std": {"r": 1}}],
)  # fmt: skip
def test_a_normalisation_that_is_none_is_refused(tmp_path: Path, said: dict[str, Any]) -> None:
    (name,) = said
    with pytest.raises(WeightsError, match=f"unet.safetensors: configured for {name} = .*, expected three"):
        read_normalisation(source(tmp_path, said), *GIVEN)
