"""What is said to a wrong config: the key, what was expected, the nearest there is."""

from __future__ import annotations

import inspect
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import yaml

import entropy_pl.configs
from entropy_pl import EntropyMeasurements
from entropy_pl.config import SettingsParser, keys_of
from entropy_pl.grpo import GRPOModule
from entropy_pl.measurements import MeasurementSettings
from entropy_pl.measurements.training import SETTING_OF
from entropy_pl.objectives import LossSettings


def settings_of(config):
    return EntropyMeasurements(config).settings


@pytest.mark.parametrize("written", ["1e-5", "1E-5", "0.00001"])
def test_numbers_without_a_dot(written, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(
        f"checkpoint: {{checkpoint_path: x}}\nestimator: {{eta_list: [{written}, 2e-5]}}\nupdate: {{lr: {written}}}\n"
    )
    settings = settings_of(file)
    assert settings.estimator.eta_list == [1e-5, 2e-5]
    assert settings.update.lr == 1e-5


def test_numbers_as_pyyaml_leaves_them():
    """PyYAML reads 1e-5 as text; a dict that came from it means a number all the same."""
    settings = settings_of({"checkpoint": {"checkpoint_path": "x"}, "update": {"lr": "1e-5"}})
    assert settings.update.lr == 1e-5


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"checkpoint": {"checkpoint_pth": "x"}},
            "unknown key 'checkpoint.checkpoint_pth'; did you mean 'checkpoint.ch",
        ),
        ({"chekpoint": {"checkpoint_path": "x"}}, "unknown key 'chekpoint.checkpoint_path'; did you mean 'checkpoint"),
        ({"batch_config": {"B_E": 2.5}}, "batch_config.B_E: expected int, got 2.5"),
        ({"batch_config": {"B_E": 1}}, "expected B_E of at least 2, got 1"),
        ({"batch_config": {"B_E": 10, "completions_per_prompt": 4}}, "completions_per_prompt times at least 2 prompts"),
        ({"batch_config": {"dataset_name": "gsm8k_r1"}}, "did you mean 'gsm8k_r1_template'"),
        ({"batch_config": {"prompt_template": "Q:"}}, "contains {question}"),
        ({"batch_config": 5}, "batch_config: expected a section"),
        ({"generation": {"temperature": 0}}, "temperature above 0, got 0"),
        ({"generation": {"temperature": "warm"}}, "generation.temperature: expected float, got warm"),
        ({"estimator": {"weighting": "token"}}, "estimator.weighting: expected one of prefix, sequence, got token"),
        ({"estimator": {"eta_list": []}}, "at least one η in eta_list"),
        ({"estimator": {"eta_list": [0]}}, "finite and not 0"),
        ({"estimator": {"eta_list": [1, "many"]}}, "estimator.eta_list: expected list"),
        ({"estimator": {"single_eta": 1e-3}}, "expected eta_sweep: false to go with single_eta=0.001"),
        ({"estimator": {"confidence": 95}}, "expected a confidence between 0 and 1"),
        ({"update": {"loss_type": "grp"}}, "update.loss_type: expected one of grpo, dr_grpo, dapo, bnpo, got grp; did"),
        ({"update": {"rewards": ["formt"]}}, "did you mean 'format'"),
        ({"update": {"max_grad_norm": -1}}, "expected max_grad_norm above 0"),
        ({"precision": {"runtime_dtype": "bfloat16"}}, "precision.runtime_dtype: expected one of float32, float64"),
        (
            {"precision": {"runtime_dtype": "float64", "update_vector": {"use_amp": True}}},
            "expected update_vector.use_amp: false",
        ),
        ({"precision": {"update_vector": {"amp": True}}}, "unknown key 'precision.update_vector.amp'"),
        ({"detailed_logging": {"level": "all"}}, "expected one of minimal, standard, detailed, debug, got all"),
        ({"checkpoint": {"after_checkpoint_path": "y", "optimizer_path": "z"}}, "got both"),
        ({"update": {"top_p": 5}}, "expected top_p above 0 and at most 1, got 5"),
        ({"update": {"top_k": 0}}, "expected top_k of at least 1, got 0"),
        ({"estimator": {"baseline": "critic", "clip_log_weight": 3}}, "expected clip_log_weight: None with baseline"),
        (
            {"checkpoint": {"quantization": "nf4"}, "precision": {"runtime_dtype": "float64"}},
            "expected no checkpoint.quantization with runtime_dtype: float64",
        ),
        ({"seed": -1}, "expected a seed of at least 0"),
        ({"seed": None}, "seed: expected int"),
        ({"checkpoint": {"lora": {"rank": 0}}}, "expected a LoRA rank of at least 1, got 0"),
        ({"checkpoint": {"lora": {"rank": "x"}}}, "checkpoint.lora.rank: expected int, got x"),
        ({"update": {"max": 64}}, "unknown key 'update.max': expected one of update.loss_type, "),
        ({"update": {"clip_cov_bounds": [5, 1]}}, "expected clip_cov_bounds of two numbers, the smaller one first"),
        ({"update": {"clip_cov_bounds": [1, 2, 3]}}, "update.clip_cov_bounds: expected "),
        ({"update": {"clip_low": 2}}, "expected clip_low between 0 and 1, got 2"),
        ({"update": {"advantage_sign": "positiv"}}, "expected one of both, positive, negative, got positiv"),
        ({"update": {"entropy_coefficient": -1}}, "expected entropy_coefficient to be finite and not negative"),
        ({"update": {"clip_cov_fraction": 0.1, "kl_cov_fraction": 0.1}}, "expected Clip-Cov or KL-Cov, got both"),
        ({"attribution": True}, "attribution: expected a section with keys of its own, got True"),
        ({"attribution": {"enable": True}}, "unknown key 'attribution.enable'; did you mean 'attribution.enabled'?"),
        ({"attribution": {"influence_matrix": True}}, "expected attribution turned on with influence_matrix"),
        (
            {"attribution": {"enabled": True, "token_error_blocks": 1}},
            "token_error_blocks of at least 2, or 0 for none",
        ),
        ({"attribution": {"counterfactuals": ["entropy_bonu"]}}, "did you mean 'entropy_bonus'?"),
        ({"attribution": {"counterfactuals": "unchanged"}}, "attribution.counterfactuals: expected list"),
        (
            {"attribution": {"counterfactuals": ["unchanged", "unchanged"]}},
            "expected every name in counterfactuals once",
        ),
        (
            {"attribution": {"counterfactuals": ["clip_cov"]}, "update": {"kl_cov_fraction": 0.1}},
            "attribution.counterfactuals, clip_cov: expected Clip-Cov or KL-Cov, got both",
        ),
        ({"batch-config": {"B_E": 64}}, "unknown key 'batch-config.B_E'; did you mean 'batch_config.B_E'?"),
    ],
)
def test_wrong_configs_are_answered(section, message):
    config = {"checkpoint": {"checkpoint_path": "x"}}
    for name, values in section.items():
        config[name] = {**config.get(name, {}), **values} if isinstance(values, dict) else values
    with pytest.raises(ValueError, match=r".") as raised:
        settings_of(config)
    assert message in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


def test_the_checkpoint_is_required():
    with pytest.raises(ValueError, match=r"expected a value for checkpoint\.checkpoint_path, got none"):
        settings_of({})


def test_a_file_that_is_not_there():
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml, no such file"):
        settings_of("nowhere.yaml")


def test_a_config_executes_nothing(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(f"checkpoint: !!python/object/apply:os.mkdir ['{tmp_path}/made']\n")
    with pytest.raises(ValueError, match="could not determine a constructor"):
        settings_of(file)
    assert not (tmp_path / "made").exists()


def test_keys_of_every_depth():
    keys = keys_of(MeasurementSettings)
    assert {"seed", "checkpoint", "checkpoint.lora.rank", "precision.update_vector.use_amp"} <= set(keys)


def test_words_go_before_the_file(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("checkpoint: {checkpoint_path: x}\nseed: 3\n")
    settings = SettingsParser(MeasurementSettings).parse(["--config", str(file), "--batch_config.B_E", "64"])
    assert (settings.seed, settings.batch_config.B_E, settings.checkpoint.checkpoint_path) == (3, 64, "x")


def test_the_loss_options_are_those_of_training():
    """Every argument of GRPOModule that is an option of its loss has the same name and default here."""
    defaults = {name: p.default for name, p in inspect.signature(GRPOModule).parameters.items()}
    options = {f.name for f in fields(LossSettings)} - {"max_completion_length"}  # of which max_new_tokens is it
    settings = settings_of({"checkpoint": {"checkpoint_path": "x"}})
    loss = settings.update.loss(settings.generation.max_new_tokens)
    for name in options:
        assert getattr(settings.update, name) == getattr(loss, name) == defaults[name], name
        assert SETTING_OF[name] == f"update.{name}"
    written = {"clip_cov_bounds": [0.5, 2], "kl_cov_coefficient": 3, "clip_high": 0.3}
    update = settings_of({"checkpoint": {"checkpoint_path": "x"}, "update": written}).update
    assert (update.loss(8).clip_cov_bounds, update.loss(8).kl_cov_coefficient) == ((0.5, 2.0), 3.0)
    assert update.loss(8).clip_high == 0.3


def test_the_commented_example_is_the_defaults():
    """Its sections of loss and attribution: what a newcomer reads there is what happens without."""
    example = yaml.safe_load(Path(entropy_pl.configs.__path__[0], "measure.yaml").read_text())
    settings = settings_of({"checkpoint": {"checkpoint_path": "x"}})
    assert example["attribution"] == asdict(settings.attribution)
    assert set(example["update"]) >= {f.name for f in fields(LossSettings)} - {"max_completion_length"}
    for name, value in example["update"].items():
        if name not in ("rewards", "reward_weights"):
            ours = getattr(settings.update, name)
            assert value == (list(ours) if isinstance(ours, tuple) else ours), name


def test_lists_on_the_command_line():
    words = ["--checkpoint.checkpoint_path=x", "--update.clip_cov_bounds", "[0.5, 2]"]
    words += ["--attribution.counterfactuals", "[unchanged, no_momentum]"]
    settings = SettingsParser(MeasurementSettings).parse(words)
    assert settings.update.loss(8).clip_cov_bounds == (0.5, 2.0)
    assert settings.attribution.counterfactuals == ["unchanged", "no_momentum"]
