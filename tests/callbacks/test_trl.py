"""The probe in TRL's GRPOTrainer and Hugging Face's Trainer, on runs that know nothing of this package."""

from __future__ import annotations

import random
from typing import Any, ClassVar

import pytest
import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import build_model, build_tokenizer
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl_runs import EVALUATED, LEARNT, Keeper, grpo_trainer, probe

from entropy_pl import EntropyProbe, UpdateVector, sample_completions
from entropy_pl.callbacks.trl import EntropyProbeTrainerCallback
from entropy_pl.policy.rng import derived_seed, isolated_rng
from entropy_pl.reporting import read_records


def test_every_second_step_of_grpo_is_recorded(tmp_path):
    trainer = grpo_trainer(tmp_path)
    callback = probe(trainer)
    trainer.train()
    records = read_records(tmp_path / "entropy_probe/records.jsonl")
    assert [(r["step"], r["status"]) for r in records] == [(0, "ok"), (2, "ok")]
    for record in records:
        assert record["lr"] == 1e-2
        assert [p["eta"] for p in record["sweep"]] == pytest.approx([0.5e-2, 1e-2, 2e-2])
        assert [p["taken"] for p in record["sweep"]] == [False, True, False]
        assert record["update_gap"] < 1e-4  # float32's rounding of θ, 6e-8 of |θ| against steps of 1e-2
        assert set(record["update_components"]) == {"momentum", "gradient", "weight_decay"}
        assert record["e_prompts"]["in_u"] == 0
        assert record["reward"] == trainer.state.log_history[record["step"]]["reward"]  # of that very step
    assert callback.records[0]["entropy"]["n_tokens"] <= 16 * 8  # max_completion_length of the run
    assert (tmp_path / "entropy_probe/delta_entropy.png").stat().st_size > 10_000


def test_the_record_is_what_the_probe_says_of_that_step(tmp_path):
    """Weights kept by the run, E drawn and measured by hand: the same numbers."""
    trainer, keeper = grpo_trainer(tmp_path, num_iterations=2, temperature=0.7), Keeper()
    trainer.add_callback(keeper)
    callback = probe(trainer, every_n_steps=3)
    trainer.train()
    record = callback.records[1]
    assert (record["step"], record["status"]) == (3, "ok")

    before, after = keeper.weights[3:5]
    model = trainer.model
    model.load_state_dict(before)
    with isolated_rng(derived_seed(0, "completions of step 3")):
        prompts = random.Random("0").sample(EVALUATED, 16)
        rollout = sample_completions(model, build_tokenizer(), prompts, max_new_tokens=8, temperature=0.7)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    direction = {name: (after[name].double() - before[name].double()) / 1e-2 for name in trained}
    result = EntropyProbe(temperature=0.7).measure(model, rollout, UpdateVector(direction, 1e-2))
    assert record["sweep"][1]["true"]["value"] == result.taken.true.value
    assert record["sweep"][1]["true"]["stderr"] == result.taken.true.stderr
    assert record["first_order"]["value"] == result.first_order.value


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "bnpo", "cispo"])
def test_every_loss_type(tmp_path, loss_type):
    trainer = grpo_trainer(tmp_path, loss_type=loss_type, max_steps=1, gradient_accumulation_steps=2, report_to=[])
    callback = probe(trainer, eta_multipliers=())
    trainer.train()
    assert [(r["step"], r["status"]) for r in callback.records] == [(0, "ok")]


def test_tensorboard_has_the_tags_of_a_lightning_run(tmp_path):
    trainer = grpo_trainer(tmp_path)
    probe(trainer)
    trainer.train()
    [run] = (tmp_path / "runs").iterdir()
    events = EventAccumulator(str(run)).Reload()
    tags = set(events.Tags()["scalars"])
    for name in ("entropy", "delta_h_true", "delta_h1"):
        assert {f"entropy_probe/{name}", f"entropy_probe/{name}_ci_low", f"entropy_probe/{name}_ci_high"} <= tags
    assert {"entropy_probe/ess_fraction", "entropy_probe/eta_star", "entropy_probe/update_norm"} <= tags
    assert "train/reward" in tags  # in the run's own event file
    assert [e.step for e in events.Scalars("entropy_probe/delta_h_true")] == [0, 2]
    assert "entropy_probe/eta_sweep" in events.Tags()["images"]
    assert "custom_scalars__config__" in events.Tags()["tensors"]


def test_without_its_trainer_it_writes_curves_of_its_own(tmp_path):
    trainer = grpo_trainer(tmp_path)
    trainer.add_callback(EntropyProbeTrainerCallback(EVALUATED, num_sequences=16, every_n_steps=2))
    trainer.train()
    events = EventAccumulator(str(tmp_path / "entropy_probe/tensorboard")).Reload()
    assert [e.step for e in events.Scalars("entropy_probe/delta_h_true")] == [0, 2]
    rewards = [record["reward"] for record in read_records(tmp_path / "entropy_probe/records.jsonl")]
    assert rewards == [None, trainer.state.log_history[1]["reward"]]  # what was logged last


class Reporter(TrainerCallback):
    """Stands for an integration such as W&B's."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.logged.append(logs)


def test_other_reporters_get_the_numbers_too(tmp_path, monkeypatch):
    from entropy_pl.callbacks import trl as adapter

    monkeypatch.setitem(adapter.INTEGRATION_TO_CALLBACK, "test", Reporter)
    trainer, reporter = grpo_trainer(tmp_path, report_to=[]), Reporter()
    trainer.add_callback(reporter)
    callback = probe(trainer)
    trainer.train()
    values = [logs["entropy_probe/delta_h_true"] for logs in reporter.logged if "entropy_probe/delta_h_true" in logs]
    assert values == [record["sweep"][1]["true"]["value"] for record in callback.records]


def test_reporters_out_of_reach_are_named(tmp_path):
    trainer = grpo_trainer(tmp_path, report_to=[], max_steps=1)
    trainer.args.report_to = ["wandb"]
    trainer.add_callback(EntropyProbeTrainerCallback(EVALUATED, num_sequences=16))
    with pytest.warns(UserWarning, match=r"do not reach wandb: .*EntropyProbeTrainerCallback\(..., trainer=trainer\)"):
        trainer.train()


def test_stopped_and_resumed_it_is_one_run(tmp_path):
    """The same steps probed on the same prompts, every record on disk once."""
    options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "report_to": []}
    whole = grpo_trainer(tmp_path / "whole", **options)
    uninterrupted = probe(whole, resample_prompts=True)
    whole.train()

    first = grpo_trainer(tmp_path / "parts", **options)
    probe(first, resample_prompts=True)
    first.add_callback(StopAfter(5))  # two steps after what will be gone on from
    first.train()
    second = grpo_trainer(tmp_path / "parts", **options)
    probe(second, resample_prompts=True)
    second.train(resume_from_checkpoint=str(tmp_path / "parts/checkpoint-3"))
    records = read_records(tmp_path / "parts/entropy_probe/records.jsonl")
    assert [r["step"] for r in records] == [0, 2, 4]  # 4 was probed twice, to the same bits, and is there once
    assert [r["e_prompts"] for r in records] == [r["e_prompts"] for r in uninterrupted.records]
    assert len({r["e_prompts"]["sha256"] for r in records}) == 3
    assert [r["sweep"][1]["true"]["value"] for r in records] == [
        r["sweep"][1]["true"]["value"] for r in uninterrupted.records
    ]


class StopAfter(TrainerCallback):
    def __init__(self, steps: int) -> None:
        self._steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step == self._steps


def test_a_plain_trainer(tmp_path):
    """No GRPO: supervised steps of a whole model, prompts in chat form, E among the texts it learns from."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
    )
    learnt = Dataset.from_dict({"prompt": LEARNT, "input_ids": [[5, 6, 7, 8]] * 36, "labels": [[5, 6, 7, 8]] * 36})
    trainer = Trainer(
        model=build_model(),
        args=TrainingArguments(
            output_dir=str(tmp_path), max_steps=3, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no"
        ),
        train_dataset=learnt,
        processing_class=tokenizer,
    )
    chats = [[{"role": "user", "content": f"{a}+{b}"}] for a in range(3) for b in range(6)]
    callback = EntropyProbeTrainerCallback(chats, trainer=trainer, num_sequences=16, every_n_steps=2, max_new_tokens=6)
    trainer.add_callback(callback)
    trainer._signature_columns = ["prompt", "input_ids", "labels"]
    trainer.data_collator = lambda rows: {k: torch.tensor([r[k] for r in rows]) for k in ("input_ids", "labels")}
    with pytest.warns(UserWarning, match=r"18 of 18 E prompts are prompts that this run trains on"):
        trainer.train()
    assert [(r["step"], r["status"], r["e_prompts"]["in_u"]) for r in callback.records] == [
        (0, "ok", 18),
        (2, "ok", 18),
    ]
    assert callback.records[0]["reward"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": None}, "expected E prompts, got none"),
        ({"prompts": [[{"role": "user", "content": "1"}]] * 16}, "expected a tokenizer with a chat template"),
        ({"prompts": [*EVALUATED, "1" * 70]}, "context of 64 tokens, got 70 prompt tokens"),
        ({"num_sequences": 99}, "at least 99 E prompts"),
        ({"policy": "actor"}, "the policy at 'actor' of PeftModel"),
        ({"optimizer": 1}, "expected optimizer 1 to hold trainable parameters of the policy .* got 0: AdamW with 8"),
        ({"output_directory": __file__}, "a folder for the probe's records that can be written to"),
    ],
)
def test_bad_attachments_are_refused_before_the_first_step(tmp_path, options, message):
    trainer = grpo_trainer(tmp_path, report_to=[])
    prompts = options.pop("prompts", EVALUATED)
    trainer.add_callback(EntropyProbeTrainerCallback(prompts, trainer=trainer, **({"num_sequences": 16} | options)))
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("sharder", ["deepspeed", "fsdp"])
def test_sharded_runs_are_refused(tmp_path, sharder):
    trainer = grpo_trainer(tmp_path, report_to=[])
    probe(trainer)
    setattr(trainer.args, sharder, {"stage": 3})  # as after parsing; neither runs on this machine
    callback = trainer.callback_handler.callbacks[-1]
    with pytest.raises(
        ValueError, match=r"hold the whole policy, got (DeepSpeed|FSDP): .* checkpoint.after_checkpoint_path"
    ):
        callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)


def test_an_evaluation_alone_is_refused(tmp_path):
    trainer = grpo_trainer(tmp_path, report_to=[], per_device_eval_batch_size=8)
    probe(trainer)
    with pytest.warns(UserWarning, match="expected a run that trains, got an evaluation: .* entropy-pl measure"):
        trainer.evaluate(eval_dataset=Dataset.from_dict({"prompt": EVALUATED}))
    trainer.train()  # evaluated first, as many are
    assert len(read_records(tmp_path / "entropy_probe/records.jsonl")) == 2


def test_the_reward_is_the_mean_of_the_steps_generations(tmp_path):
    """Two generations accumulated into every step."""
    trainer = grpo_trainer(
        tmp_path, report_to=[], per_device_train_batch_size=4, gradient_accumulation_steps=4, steps_per_generation=2
    )
    callback = probe(trainer, every_n_steps=1, eta_multipliers=())
    trainer.train()
    logged = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    assert [r["reward"] for r in callback.records] == pytest.approx(logged, rel=1e-12)  # a mean, summed likewise


def test_a_reporter_that_counts_what_it_logs_is_left_alone(tmp_path, monkeypatch):
    from entropy_pl.callbacks import trl as adapter

    class DVCLiveCallback(Reporter):
        """Like DVCLive's: each call is a step to it."""

    monkeypatch.setitem(adapter.INTEGRATION_TO_CALLBACK, "dvclive", DVCLiveCallback)
    trainer, reporter = grpo_trainer(tmp_path, report_to=[], max_steps=2), DVCLiveCallback()
    trainer.add_callback(reporter)
    probe(trainer)
    with pytest.warns(UserWarning, match="the probe's curves do not go to DVCLiveCallback"):
        trainer.train()
    assert len(reporter.logged) == 3  # two steps and the run's own summary


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_what_the_launcher_shards_is_refused(tmp_path, monkeypatch, kind):
    """As after `accelerate config`: the arguments know nothing of it."""
    from entropy_pl.callbacks import trl as adapter

    class State:
        _shared_state: ClassVar[Any] = {"distributed_type": kind}
        distributed_type = kind

    monkeypatch.setattr(adapter, "AcceleratorState", State)
    trainer = grpo_trainer(tmp_path, report_to=[])
    probe(trainer)
    with pytest.raises(ValueError, match=rf"hold the whole policy, got {kind.value}: "):
        trainer.train()


def test_every_n_steps_zero_is_off(tmp_path):
    trainer = grpo_trainer(tmp_path, report_to=[], max_steps=1)
    callback = EntropyProbeTrainerCallback(every_n_steps=0)  # needs no prompts
    trainer.add_callback(callback)
    trainer.train()
    assert not callback.records
