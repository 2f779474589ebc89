"""The command line as a person meets it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from entropy_pl.cli import main
from entropy_pl.reporting import read_records
from entropy_pl.version import __version__

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture
def short_run(tiny_policy_dir, tmp_path, monkeypatch) -> list[str]:
    """The quickstart, cut down to two steps of a tiny policy."""
    monkeypatch.setattr(logging, "raiseExceptions", False)  # Lightning's log handler outlives a test's captured stderr
    return [
        "fit",
        f"--config={CONFIGS / 'quickstart.yaml'}",
        f"--model.policy.name={tiny_policy_dir}",
        "--model.num_generations=2",
        "--model.max_new_tokens=6",
        "--data.batch_size=2",
        "--probe.every_n_steps=1",
        "--probe.num_sequences=8",
        "--trainer.max_steps=2",
        f"--trainer.logger.init_args.save_dir={tmp_path}",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_checkpointing=false",
    ]


def shown_by(capsys, *words: str, status: int) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(list(words))
    assert exit_.value.code == status
    captured = capsys.readouterr()
    return captured.out + captured.err


def test_fit_trains_probes_and_says_where_things_are(short_run, tmp_path, capsys):
    # a reward that a random policy earns at times, so that steps are taken
    main([*short_run, "--model.kl_coefficient=0.1", "--trainer.max_steps=2"])
    out = capsys.readouterr().out
    run = tmp_path / "quickstart/version_0"
    assert str(run / "entropy_probe/delta_entropy.png") in out
    assert f"tensorboard --logdir {tmp_path / 'quickstart'}" in out
    assert [r["step"] for r in read_records(run / "entropy_probe/records.jsonl")] == [0, 1]
    assert "every_n_steps: 1" in (run / "config.yaml").read_text()  # the run can be made again from its folder


def command_of(config: str) -> list[str]:
    """Which command a shipped config is for, by its name."""
    study = config.removesuffix(".yaml").removeprefix("study_").replace("_", "-")
    if config.startswith("study_"):
        return ["study", study]
    return ["measure"] if config.startswith("measure") else ["fit"]


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("*.yaml")))
def test_every_config_is_valid_and_documented(name, capsys):
    command = command_of(name)
    out = shown_by(capsys, *command, f"--config={CONFIGS / name}", "--print_config", status=0)
    wanted = (
        {"model", "data", "probe", "trainer"} if command == ["fit"] else {"checkpoint", "batch_config", "estimator"}
    )
    wanted |= {"study"} if command[0] == "study" else set()
    assert wanted <= yaml.safe_load(out).keys()
    assert wanted <= yaml.safe_load((CONFIGS / name).read_text()).keys()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "expected a command out of fit, measure, study, got none"),
        (["mesure"], "got 'mesure'; did you mean 'measure'?"),
        (["study"], "expected a study out of linear-regime, variance, convergence, got ''"),
        (["study", "variants"], "got 'variants'; did you mean 'variance'?"),
        (["measure", "--seed=x"], "seed: expected int, got x"),
        (["measure"], "expected a value for checkpoint.checkpoint_path, got none"),
        (
            ["measure", "--checkpoint.checkpoint_path=no.ckpt", "--batch_config.dataset_name=arithmetic_r1_template"],
            "expected a checkpoint at no.ckpt",
        ),
        (["measure", "--checkpoint.optimiser_path=x"], "did you mean 'checkpoint.optimizer_path'?"),
    ],
)
def test_commands_that_cannot_be(capsys, words, message):
    out = shown_by(capsys, *words, status=2)
    assert message in out
    assert "Traceback" not in out


def test_help_and_version(capsys):
    assert "measure" in shown_by(capsys, "--help", status=0)
    assert shown_by(capsys, "--version", status=0) == f"entropy-pl {__version__}\n"
    assert "--batch_config.completions_per_prompt" in shown_by(capsys, "measure", "--help", status=0)


def test_probe_is_a_section_of_its_own(capsys):
    out = shown_by(
        capsys,
        "fit",
        f"--config={CONFIGS / 'quickstart.yaml'}",
        "--probe.every_n_steps=5",
        "--probe.etas=[1e-5, 2e-5]",
        "--print_config",
        status=0,
    )
    assert yaml.safe_load(out)["probe"]["etas"] == [1e-5, 2e-5]  # written without a dot, and a number all the same


def test_help_says_what_each_key_means(capsys):
    out = " ".join(shown_by(capsys, "fit", "--help", status=0).split())
    for words in (
        "--probe.every_n_steps",
        "distance between probed steps; 0 turns the probe off",
        "--model.kl_coefficient",
        "--data.e_size",
        "how many evaluation prompts are kept for the probe",
    ):
        assert words in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--probe.frequency=5"], "unknown key 'probe.frequency': expected one of probe.prompts, "),
        (["--probe.num_seqences=5"], "unknown key 'probe.num_seqences'; did you mean 'probe.num_sequences'?"),
        (["--probe.every=5"], "unknown key 'probe.every'"),  # no abbreviations: another version may have two such keys
        (["--model.loss_type=ppo"], "model.loss_type: expected one of grpo, dr_grpo, dapo, bnpo, got ppo"),
        (["--model.num_generations=1"], "at least 2"),
        (["--data.dataset=gsm9k"], "gsm8k_r1_template"),
        (["--data.e_size=99999"], "expected e_size of at most"),
        (["--model.policy.name=demo_arithmetics"], "did you mean 'demo_arithmetic'"),
        (["--probe.num_sequences=257"], "expected at least 257 E prompts"),
        (["--probe.weighting=token"], "probe.weighting: expected one of prefix, sequence, got token"),
        (["--model.rewards=[formats]"], "format"),
        (["--model.policy.name=foo/bar"], "expected foo/bar"),
    ],
)
def test_bad_words_are_answered_on_one_screen(short_run, capsys, words, message):
    out = shown_by(capsys, *short_run, *words, status=2)
    assert message in out
    assert "Traceback" not in out
    assert len(out.splitlines()) < 20


def test_a_callback_of_the_users_own_is_kept(short_run, tmp_path):
    """Lightning accepts a single callback as well as a list of them."""
    main([*short_run, "--trainer.callbacks=LearningRateMonitor", "--trainer.max_steps=1", "--model.kl_coefficient=0.1"])
    [events] = tmp_path.rglob("events.out.tfevents.*")
    assert any("lr-" in tag for tag in EventAccumulator(str(events)).Reload().Tags()["scalars"])


def test_an_unknown_config_key_is_named(short_run, tmp_path, capsys):
    config = tmp_path / "bad.yaml"
    config.write_text("probe:\n  num_sequence: 5\n")
    out = shown_by(capsys, *short_run, f"--config={config}", status=2)
    assert "unknown key 'probe.num_sequence'; did you mean 'probe.num_sequences'?" in out
