"""The command line as a person meets it."""

from __future__ import annotations

import logging
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from commands import CONFIGS, ROWS, screen_rows, short_fit
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import build_model

from entropy_pl.cli import main
from entropy_pl.policy import LoraSettings
from entropy_pl.policy.adapter import attach_lora, trainable_parameters
from entropy_pl.reporting import read_records
from entropy_pl.version import __version__


@pytest.fixture
def short_run(tiny_policy_dir, tmp_path, monkeypatch) -> list[str]:
    """The quickstart, cut down to two steps of a tiny policy."""
    monkeypatch.setattr(logging, "raiseExceptions", False)  # Lightning's log handler outlives a test's captured stderr
    return short_fit(tiny_policy_dir, tmp_path)


def shown_by(capsys, *words: str, status: int) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(list(words))
    assert exit_.value.code == status
    captured = capsys.readouterr()
    return captured.out + captured.err


def test_fit_trains_probes_and_says_where_things_are(short_run, tmp_path, capsys):
    main(short_run)
    out, error = capsys.readouterr()
    assert "\r" not in out  # nobody is looking: no bar
    assert not re.search(r"Epoch|entropy probe, step|pass/s", out + error)
    run = tmp_path / "quickstart/version_0"
    assert str(run / "entropy_probe/delta_entropy.png") in out
    assert f"tensorboard --logdir {tmp_path / 'quickstart'}" in out
    assert [r["step"] for r in read_records(run / "entropy_probe/records.jsonl")] == [0, 1]
    [checkpoint] = run.glob("checkpoints/*.ckpt")
    for line in (f"config   {run / 'config.yaml'}", f"saved    {checkpoint}"):
        assert line in out.splitlines()
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
        ([], "expected a command out of fit, measure, study, report, got none"),
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


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory) -> dict[str, Path]:
    """Files and folders that are not what a newcomer takes them for, by the names they have in the table below."""
    folder = tmp_path_factory.mktemp("mistakes")
    found = {name: folder / name.lower() for name in ("EMPTY_DATA", "BAD_DATA", "NO_TOKENIZER", "NOTHING")}
    for path in found.values():
        path.mkdir()
    for split in ("train", "test"):
        (found["EMPTY_DATA"] / f"{split}.jsonl").touch()
        (found["BAD_DATA"] / f"{split}.jsonl").write_text("{question\n")
    build_model().save_pretrained(found["NO_TOKENIZER"])
    found["A_FILE"], found["BAD_YAML"] = folder / "a_file", folder / "bad.yaml"
    for name in ("A_FILE", "BAD_YAML"):
        found[name].write_text("a: [1, 2\nb: {")
    found["OTHER_SHAPES"] = folder / "other.ckpt"
    with torch.random.fork_rng():
        model = attach_lora(build_model(hidden_size=16), LoraSettings(rank=8, alpha=16))
    state = {f"model.{name}": parameter for name, parameter in trainable_parameters(model).items()}
    torch.save({"state_dict": state, "rollouts_done": 0, "pytorch-lightning_version": "2.5.0"}, found["OTHER_SHAPES"])
    return found


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
        (["--model.policy.name=./nowhere"], "got './nowhere': there is no such folder"),
        (["--model.policy.name=A_FILE"], "there is no such folder"),
        (["--model.policy.name=NOTHING"], "found no config.json"),
        (["--model.policy.name=NO_TOKENIZER"], "Save it there with tokenizer.save_pretrained"),
        (["--model.policy.device_map=cuda"], "leave device_map out, or install a PyTorch with CUDA"),
        (["--model.max_new_tokens=1000"], "shorten the prompt or lower max_new_tokens"),
        (["--model.optimizer.init_args.lr=fast"], "model.optimizer.init_args.lr: expected float or Tensor, got fast"),
        (["--model.optimizer.init_args.lrr=1"], "unknown key 'model.optimizer.init_args.lrr': AdamW has no such"),
        (["--model.optimizer=Adamm"], "model.optimizer: expected the name or path of a class, got Adamm"),
        (["--model.optimizer=torch.optim.Adamm"], "model.optimizer: expected the name or path of a class, got torch"),
        (["--data.dataset=gsm8k_r1_template", "--data.dataset_path=/no/such"], "got /no/such, no such folder"),
        (["--data.dataset=gsm8k_r1_template", "--data.dataset_path=EMPTY_DATA"], "test.jsonl, got an empty file"),
        (["--data.dataset=gsm8k_r1_template", "--data.dataset_path=BAD_DATA"], "test.jsonl, got "),
        (["--probe.output_directory=A_FILE"], "expected a folder for the probe's records that can be written to"),
        (["--trainer.max_steps=many"], "trainer.max_steps: expected int, got many"),
        (["--trainer.precision=fp16"], "32-true, 64-true, bf16, got fp16"),
        (["--trainer.logger=TensorbordLogger"], "trainer.logger: expected the name or path of a class"),
        (["--trainer.logger.init_args.savedir=x"], "'trainer.logger.init_args.savedir': TensorBoardLogger has no such"),
        (["--trainer.logger=WandbLogger"], "WandbLogger needs a package that is not installed: pip install 'wandb"),
        (["--trainer.logger.init_args.save_dir=A_FILE"], "Set the logger's save_dir"),
        (["--trainer.accelerator=cuda"], "Set it to cpu, or to auto"),
        (
            ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps=x"],
            "trainer.callbacks.init_args.every_n_train_steps: expected int or null, got x",
        ),
        (["--ckpt_path=no.ckpt"], "expected a checkpoint at no.ckpt, and there is no such file: check --ckpt_path"),
        (["--ckpt_path=BAD_YAML"], "which is damaged or of another format"),
        (["--ckpt_path=OTHER_SHAPES"], "resume with the policy and LoRA settings it was saved with"),
        (["--config=no.yaml"], "expected a config file, got no.yaml, no such file"),
        (["--config=BAD_YAML"], "expected YAML from"),
        (["quickstart.yaml"], "unrecognized arguments: quickstart.yaml"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_words_are_answered_on_one_screen(short_run, capsys, words, message, mistakes):
    if ("WandbLogger" in words[0] and find_spec("wandb")) or ("cuda" in words[0] and torch.cuda.is_available()):
        pytest.skip("no mistake on this machine")
    option, _, value = words[-1].partition("=")
    file = mistakes.get(value)
    given = words if file is None else [*words[:-1], f"{option}={file}"]
    out = shown_by(capsys, *short_run, *given, status=2)
    said = out[out.index("entropy-pl: error: ") :]
    assert message in said
    assert "Traceback" not in said
    assert screen_rows(said) <= ROWS
    assert file is None or file.name in said or value == "OTHER_SHAPES"  # which file it is


def test_a_callback_of_the_users_own_is_kept(short_run, tmp_path):
    """Lightning accepts a single callback as well as a list of them."""
    main([*short_run, "--trainer.callbacks=LearningRateMonitor", "--trainer.max_steps=1"])
    [events] = tmp_path.rglob("events.out.tfevents.*")
    assert any("lr-" in tag for tag in EventAccumulator(str(events)).Reload().Tags()["scalars"])


def test_an_unknown_config_key_is_named(short_run, tmp_path, capsys):
    config = tmp_path / "bad.yaml"
    config.write_text("probe:\n  num_sequence: 5\n")
    out = shown_by(capsys, *short_run, f"--config={config}", status=2)
    assert "unknown key 'probe.num_sequence'; did you mean 'probe.num_sequences'?" in out
