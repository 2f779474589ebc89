"""The probe in a Lightning run: what it records, what it logs, and that the run does not notice it."""

from __future__ import annotations

import csv
import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign import LR, PROMPTS, Deterministic, ForeignModule, fit, probe
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import build_model, build_tokenizer
from torch import nn

from entropy_pl.callbacks import EntropyProbeCallback
from entropy_pl.policy import derived_seed
from entropy_pl.policy.rng import isolated_rng
from entropy_pl.policy.sample import sample_completions
from entropy_pl.probe import EntropyProbe
from entropy_pl.reporting import RecordWriter, read_records, scalars
from entropy_pl.updates import UpdateRecorder, record_update


def logged(logger: CSVLogger) -> list[dict[str, str]]:
    with open(Path(logger.log_dir) / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_every_second_step_is_recorded(tmp_path):
    callback = probe()
    trainer = fit(ForeignModule(), tmp_path, callback)
    records = read_records(Path(trainer.log_dir) / "entropy_probe/records.jsonl")
    assert [(r["step"], r["status"]) for r in records] == [(0, "no_movement"), (2, "ok"), (4, "ok")]
    assert "learning rate of zero" in records[0]["message"]
    for record in records[1:]:
        assert record["lr"] == LR  # the rate of that step: warmed up, and not yet the scheduler's next one
        assert [p["eta"] for p in record["sweep"]] == pytest.approx([LR / 2, LR, 2 * LR])
        assert [p["taken"] for p in record["sweep"]] == [False, True, False]
        assert record["entropy"]["n_sequences"] == 16
        assert record["update_gap"] < 1e-4  # float32's rounding of θ, 6e-8 of |θ| against steps of 1e-2
        assert record["reward"] is not None
        assert all(p["true"]["stderr"] > 0 and p["first_order"]["stderr"] > 0 for p in record["sweep"])


def test_the_record_is_what_the_probe_says_of_that_step(tmp_path):
    """The same step taken by hand, its E-batch drawn by hand, measured by the engine alone: the same numbers."""
    callback = probe(every_n_steps=3)
    fit(ForeignModule(), tmp_path, callback, steps=4, gradient_clip_val=None)
    record = callback.records[1]

    class ByHand(ForeignModule):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            optimizer_closure()
            if self.trainer.global_step == 3:
                with isolated_rng(derived_seed(0, "completions of step 3")):
                    prompts = random.Random("0").sample(PROMPTS, 16)
                    rollout = sample_completions(self.policy, self.tokenizer, prompts, max_new_tokens=5)
                before = {n: p.detach().clone() for n, p in self.policy.named_parameters()}
                with record_update(self.policy, optimizer.optimizer) as recorder:
                    optimizer.optimizer.step()
                after = {n: p.detach().clone() for n, p in self.policy.named_parameters()}
                self.policy.load_state_dict(before)
                self.result = EntropyProbe().measure(self.policy, rollout, recorder.update)
                self.policy.load_state_dict(after)
            else:
                optimizer.step()

    module = ByHand()
    fit(module, tmp_path, steps=4, gradient_clip_val=None)
    assert module.result.taken.true.value == record["sweep"][1]["true"]["value"]
    assert module.result.taken.true.stderr == record["sweep"][1]["true"]["stderr"]
    assert module.result.first_order.value == record["first_order"]["value"]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_run_does_not_notice(tmp_path, precision):
    """Weights, optimizer state, losses, logged metrics and random streams are the same bits with and without."""

    class Streams(ForeignModule):
        def on_train_end(self) -> None:
            self.streams = (torch.rand(3).tolist(), random.random(), float(np.random.rand()))
            self.modes = [m.training for m in self.modules()]
            self.gradients = [p.grad.clone() for p in self.policy.parameters() if p.grad is not None]

    runs = []
    for callbacks in ([], [probe(every_n_steps=1)]):
        module = Streams()
        logger = CSVLogger(tmp_path / f"{len(callbacks)}")
        trainer = fit(module, tmp_path, *callbacks, precision=precision, logger=logger, log_every_n_steps=1)
        rows = [(row["step"], row["train/reward"]) for row in logged(logger) if row["train/reward"]]
        runs.append((module, trainer, rows))
    (plain, plain_trainer, plain_rows), (probed, probed_trainer, probed_rows) = runs
    assert [r["status"] for r in callbacks[0].records][1:] == ["ok"] * 5
    for (name, a), (_, b) in zip(plain.named_parameters(), probed.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    states = [trainer.optimizers[0].state_dict()["state"] for trainer in (plain_trainer, probed_trainer)]
    for a, b in zip(*(state.values() for state in states), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert plain.seen == probed.seen
    assert plain.streams == probed.streams
    assert plain.modes == probed.modes
    assert all(torch.equal(a, b) for a, b in zip(plain.gradients, probed.gradients, strict=True))
    assert len(plain_rows) == 6
    assert plain_rows == probed_rows


def test_tensorboard_shows_the_curves(tmp_path):
    trainer = fit(ForeignModule(), tmp_path, probe())
    events = EventAccumulator(trainer.log_dir).Reload()
    tags = set(events.Tags()["scalars"])
    for name in ("entropy", "delta_h_true", "delta_h1"):
        assert {f"entropy_probe/{name}", f"entropy_probe/{name}_ci_low", f"entropy_probe/{name}_ci_high"} <= tags
    assert {"entropy_probe/ess_fraction", "entropy_probe/eta_star", "entropy_probe/update_norm"} <= tags
    assert [e.step for e in events.Scalars("entropy_probe/delta_h_true")] == [2, 4]
    assert "entropy_probe/eta_sweep" in events.Tags()["images"]
    assert "custom_scalars__config__" in events.Tags()["tensors"]


def test_csv_logger_gets_the_scalars(tmp_path):
    logger = CSVLogger(tmp_path)
    fit(ForeignModule(), tmp_path, probe(), logger=logger)
    rows = [row for row in logged(logger) if row["entropy_probe/delta_h_true"]]
    assert [row["step"] for row in rows] == ["2", "4"]


def test_a_run_without_a_logger_still_keeps_records(tmp_path):
    fit(ForeignModule(), tmp_path, probe(), logger=False, default_root_dir=tmp_path)
    assert len(read_records(tmp_path / "entropy_probe/records.jsonl")) == 3


def test_summary_names_the_files(tmp_path, capsys):
    trainer = fit(ForeignModule(), tmp_path, probe())
    shown = capsys.readouterr().out
    assert "tensorboard --logdir" in shown
    assert (Path(trainer.log_dir) / "entropy_probe/delta_entropy.png").stat().st_size > 10_000
    assert str(Path(trainer.log_dir) / "entropy_probe/delta_entropy.png") in shown
    assert f"report   entropy-pl report {trainer.log_dir}\n" in shown


def test_the_step_really_taken_is_in_every_sweep(tmp_path):
    callback = probe(etas=[1e-4, 3e-3], eta_multipliers=())
    fit(ForeignModule(), tmp_path, callback)
    assert [p["eta"] for p in callback.records[-1]["sweep"]] == [1e-4, 3e-3, LR]
    assert [p["taken"] for p in callback.records[-1]["sweep"]] == [False, False, True]


def test_prompts_are_fixed_or_drawn_anew(tmp_path):
    callback = probe()
    fit(ForeignModule(), tmp_path, callback, steps=1)
    again = probe(resample_prompts=True)
    sessions = [c.run_probe_for(ForeignModule().policy, build_tokenizer(), PROMPTS, 1.0, 5) for c in (callback, again)]
    fixed, drawn = ([s.e_prompts(step) for step in (0, 2, 2)] for s in sessions)
    assert fixed[0] == fixed[1] == fixed[2]
    assert drawn[0] != drawn[1]
    assert drawn[1] == drawn[2]


def test_repeated_prompts_cluster_the_error_bars(tmp_path):
    callback = probe(num_sequences=24, completions_per_prompt=4, every_n_steps=5)
    fit(ForeignModule(), tmp_path, callback)
    [record] = [r for r in callback.records if r["status"] == "ok"]
    assert record["entropy"]["n_sequences"] == 24


def test_non_finite_logits_are_recorded_and_training_goes_on(tmp_path):
    """A step that blows the policy up at 10^9 times its length: that probe fails, the next one stands."""
    callback = probe(eta_multipliers=(1e30,), every_n_steps=3)
    module = ForeignModule()
    with pytest.warns(UserWarning, match=r"entropy probe at step 3 failed, training goes on. NonFiniteError: expected"):
        trainer = fit(module, tmp_path, callback)
    assert trainer.global_step == 6
    failed = callback.records[-1]
    assert failed["status"] == "failed"
    assert failed["message"].startswith("NonFiniteError: expected finite logits, got NaN or infinity at ")
    plain = ForeignModule()
    fit(plain, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), module.parameters(), strict=True))
    assert json.loads((Path(trainer.log_dir) / "entropy_probe/records.jsonl").read_text().splitlines()[-1])


def test_two_optimizers_are_told_apart(tmp_path):
    """Counted are the steps of the policy's optimizer, whatever others step in between."""

    class WithCritic(ForeignModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.critic = nn.Linear(1, 1)

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> None:
            critic, actor = self.optimizers()
            for optimizer, loss in ((critic, self.critic(torch.ones(1, 1)).sum()), (actor, None)):
                optimizer.zero_grad()
                self.manual_backward(self.policy(input_ids=batch, labels=batch).loss if loss is None else loss)
                optimizer.step()

        def configure_optimizers(self) -> Any:
            trainable = [p for p in self.policy.parameters() if p.requires_grad]
            return [torch.optim.SGD(self.critic.parameters(), lr=0.1), torch.optim.AdamW(trainable, lr=LR)]

    callback = probe()
    fit(WithCritic(), tmp_path, callback, steps=12, gradient_clip_val=None)
    assert [(r["step"], r["status"], r["lr"]) for r in callback.records] == [(n, "ok", LR) for n in (0, 2, 4)]


def test_an_optimizer_lightning_does_not_see_step_is_counted(tmp_path):
    class Raw(ForeignModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> None:
            optimizer = self.optimizers(use_pl_optimizer=False)
            optimizer.zero_grad()
            self.manual_backward(self.policy(input_ids=batch, labels=batch).loss)
            optimizer.step()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([p for p in self.policy.parameters() if p.requires_grad], lr=LR)

    callback = probe(every_n_steps=5)
    fit(Raw(), tmp_path, callback, max_epochs=1, steps=-1, gradient_clip_val=None)
    assert [r["step"] for r in callback.records] == [0, 5, 10, 15]


def test_accumulated_batches_are_one_step(tmp_path):
    callback = probe()
    fit(ForeignModule(), tmp_path, callback, steps=5, accumulate_grad_batches=3)
    assert [r["step"] for r in callback.records] == [0, 2, 4]


def test_a_step_skipped_by_the_scaler_is_recorded_as_skipped(tmp_path):
    """A loss scale that overflows: the first steps are skipped, and counted."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-60)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    callback = probe(every_n_steps=1)
    trainer = fit(ForeignModule(), tmp_path, callback, plugins=[plugin], gradient_clip_val=None)
    assert [r["step"] for r in callback.records] == list(range(trainer.global_step))
    statuses = [r["status"] for r in callback.records]
    assert statuses[0] == "skipped"
    assert statuses[-1] == "ok"
    assert "gradient scaler" in callback.records[0]["message"]


def test_a_resumed_run_goes_on_counting(tmp_path):
    """Stopped after 3 steps and resumed: step 4 is probed, as in the uninterrupted run."""
    first = fit(ForeignModule(), tmp_path, probe(), steps=3)
    first.save_checkpoint(tmp_path / "at3.ckpt")
    again = probe()
    trainer = Trainer(
        max_steps=6,
        accelerator="cpu",
        logger=False,
        callbacks=[again],
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(ForeignModule(), ckpt_path=tmp_path / "at3.ckpt")
    assert [r["step"] for r in again.records] == [4]


def test_what_goes_wrong_before_the_step_is_recorded_too(tmp_path, monkeypatch):
    def out_of_memory(self: Any, moments: bool = False) -> None:
        raise torch.OutOfMemoryError("no room for a copy of θ")

    monkeypatch.setattr(UpdateRecorder, "snapshot", out_of_memory)
    callback = probe()
    with pytest.warns(UserWarning, match="OutOfMemoryError: no room for a copy of θ"):
        trainer = fit(ForeignModule(), tmp_path, callback)
    assert trainer.global_step == 6
    assert [r["status"] for r in callback.records] == ["failed"] * 3


def test_a_full_disk_does_not_end_training(tmp_path, monkeypatch):
    def full(self: Any, record: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RecordWriter, "write", full)
    callback = probe()
    with pytest.warns(UserWarning, match="could not write the record of step 2, training goes on. OSError"):
        trainer = fit(ForeignModule(), tmp_path, callback)
    assert trainer.global_step == 6
    assert len(callback.records) == 3  # still at hand, for whoever holds the callback


def test_a_record_is_on_disk_as_soon_as_it_is_measured(tmp_path):
    class Dies(ForeignModule):
        def on_train_batch_end(self, *_: Any) -> None:
            if self.trainer.global_step == 3:
                raise KeyError("something of the user's own")

    callback = probe()
    with pytest.raises(KeyError):
        fit(Dies(), tmp_path, callback)
    [path] = tmp_path.rglob("records.jsonl")
    assert [r["step"] for r in read_records(path)] == [0, 2]


def test_every_n_steps_zero_is_off(tmp_path):
    callback = EntropyProbeCallback(every_n_steps=0)  # needs no prompts, no policy
    fit(ForeignModule(), tmp_path, callback)
    assert not callback.records


def test_stopped_and_resumed_it_is_one_run(tmp_path):
    """The same steps probed on the same prompts; what is measured twice is on disk once, and nothing is lost."""
    options = {"resample_prompts": True, "num_sequences": 8, "every_n_steps": 2}
    whole = probe(**options)
    fit(Deterministic(), tmp_path / "whole", whole, steps=6)

    folder = tmp_path / "parts"
    settings = options | {"output_directory": str(folder / "probe")}
    first = fit(Deterministic(), folder, probe(**settings), steps=3)
    first.save_checkpoint(folder / "at3.ckpt")
    fit(Deterministic(), folder, probe(**settings), steps=5, ckpt_path=folder / "at3.ckpt")  # cut off after step 4
    fit(Deterministic(), folder, probe(**settings), steps=6, ckpt_path=folder / "at3.ckpt")
    records = read_records(folder / "probe/records.jsonl")
    assert [r["step"] for r in records] == [0, 2, 4]
    assert [r["e_prompts"] for r in records] == [r["e_prompts"] for r in whole.records]
    assert len({r["e_prompts"]["sha256"] for r in records}) == 3
    measured = [[r["sweep"][1]["true"] for r in of if r["status"] == "ok"] for of in (records, whole.records)]
    assert measured[0] == measured[1]


def test_a_step_taken_again_differently_is_kept_beside_the_first(tmp_path):
    settings = {"output_directory": str(tmp_path / "probe"), "every_n_steps": 5}
    fit(ForeignModule(), tmp_path, probe(**settings))
    fit(ForeignModule(), tmp_path, probe(seed=1, **settings))
    records = read_records(tmp_path / "probe/records.jsonl")
    assert [r["step"] for r in records] == [0, 5, 0, 5]


def test_optimizers_that_call_the_closure_more_than_once(tmp_path):
    """LBFGS: three looks at the loss, one step."""

    class Lines(ForeignModule):
        def configure_optimizers(self) -> Any:
            trainable = [p for p in self.policy.parameters() if p.requires_grad]
            return torch.optim.LBFGS(trainable, lr=1e-3, max_iter=3)

    callback = probe(every_n_steps=1)
    fit(Lines(), tmp_path, callback, steps=3, gradient_clip_val=None)
    assert [(r["step"], r["status"]) for r in callback.records] == [(0, "ok"), (1, "ok"), (2, "ok")]


def test_a_step_that_raised_and_was_caught_is_not_the_end_of_the_probe(tmp_path):
    class Stumbles(ForeignModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.policy(input_ids=batch, labels=batch).loss)
            optimizer.optimizer.stumble = batch_idx == 1
            try:
                optimizer.step()
            except torch.OutOfMemoryError:
                self.caught = True

        def configure_optimizers(self) -> Any:
            return Stumbling([p for p in self.policy.parameters() if p.requires_grad], lr=LR)

    module, callback = Stumbles(), probe(every_n_steps=1)
    fit(module, tmp_path, callback, steps=4, gradient_clip_val=None)
    assert module.caught
    statuses = [r["status"] for r in callback.records]
    assert statuses == ["ok", "skipped", "ok", "ok", "ok"]  # the Trainer counts the four that it took
    assert "did not take place, or did not end" in callback.records[1]["message"]


class Stumbling(torch.optim.SGD):
    stumble = False

    def step(self, closure: Any = None) -> Any:
        if self.stumble:
            closure()
            raise torch.OutOfMemoryError("no room for the step")
        return super().step(closure)


def test_a_compiled_optimizer_step(tmp_path):
    class Compiled(ForeignModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> None:
            optimizer = self.optimizers().optimizer
            optimizer.zero_grad()
            self.manual_backward(self.policy(input_ids=batch, labels=batch).loss)
            torch.compile(lambda: optimizer.step(), backend="eager")()

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW([p for p in self.policy.parameters() if p.requires_grad], lr=torch.tensor(LR))

    torch._dynamo.reset()
    callback = probe(every_n_steps=2)
    fit(Compiled(), tmp_path, callback, steps=-1, max_epochs=1, limit_train_batches=4, gradient_clip_val=None)
    assert [(r["step"], r["status"], r["message"]) for r in callback.records] == [(0, "ok", None), (2, "ok", None)]


def test_the_snapshot_is_among_the_memory(tmp_path):
    class Whole(ForeignModule):
        def __init__(self) -> None:
            super().__init__()
            self.policy = build_model(vocab_size=20_000, hidden_size=64)  # 2.6 M parameters

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.policy.parameters(), lr=1e-5)

    module, callback = Whole(), probe(every_n_steps=1, eta_multipliers=())
    fit(module, tmp_path, callback, steps=2)
    snapshot = sum(p.numel() * 4 for p in module.policy.parameters())
    for record in callback.records:
        assert record["status"] == "ok"
        assert record["memory"]["added_bytes"] > snapshot


def test_the_overhead_is_of_the_run_so_far(tmp_path):
    """By a clock of the test's own: what the run took without its probes is what the record divides by."""
    callback, start = probe(every_n_steps=1), time.perf_counter()
    fit(Deterministic(), tmp_path, callback, steps=3)
    lasted = time.perf_counter() - start
    probing = 0.0
    without: list[float] = []
    for record in callback.records:
        probing += record["seconds"]["total"]
        without.append(probing / record["overhead"])
        assert scalars(record)["entropy_probe/overhead"] == record["overhead"]
    assert 0 < without[0] < without[1] < without[2] < lasted - probing


@pytest.mark.parametrize(("interval", "rates"), [("step", [1.0, 0.5, 0.25, 0.125]), ("epoch", [1.0, 1.0, 0.5, 0.5])])
def test_the_rate_is_that_of_the_step(tmp_path, interval, rates):
    """Whenever a scheduler moves it: two batches an epoch."""

    class Scheduled(Deterministic):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW([p for p in self.policy.parameters() if p.requires_grad], lr=LR)
            schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": interval}}

    callback = probe(every_n_steps=1, eta_multipliers=())
    fit(Scheduled(), tmp_path, callback, steps=4)
    assert [r["lr"] / LR for r in callback.records] == rates
    assert [r["sweep"][0]["eta"] / LR for r in callback.records] == rates


def test_a_compiled_module(tmp_path):
    """``trainer.fit(torch.compile(module))``: its training_step is compiled, the policy probed as it is."""
    torch._dynamo.reset()
    callback = probe(every_n_steps=3, eta_multipliers=())
    fit(torch.compile(Deterministic(), backend="eager"), tmp_path, callback)
    plain = probe(every_n_steps=3, eta_multipliers=())
    fit(Deterministic(), tmp_path, plain)
    assert [r["status"] for r in callback.records] == ["no_movement", "ok"]
    assert callback.records[1]["sweep"][0]["true"] == plain.records[1]["sweep"][0]["true"]


def test_an_optimizer_without_a_split_and_the_record_says_so(tmp_path):
    class Plain(ForeignModule):
        def configure_optimizers(self) -> Any:
            return torch.optim.RMSprop([p for p in self.policy.parameters() if p.requires_grad], lr=LR)

    callback = probe(every_n_steps=5)
    fit(Plain(), tmp_path, callback)
    assert callback.records[0]["update_components"] is None
    assert callback.records[0]["update_split_absent"].startswith("RMSprop is not of Adam's family and not torch's SGD")


def test_a_fused_step_that_suppresses_itself_is_recorded_as_skipped(tmp_path):
    """Under a gradient scaler a fused optimizer is called all the same, hooks and all, and moves nothing."""

    class Fused(ForeignModule):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW([p for p in self.policy.parameters() if p.requires_grad], lr=LR, fused=True)

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-60)
    callback = probe(every_n_steps=1)
    plugins = [MixedPrecision("16-mixed", "cpu", scaler=scaler)]
    trainer = fit(Fused(), tmp_path, callback, plugins=plugins, gradient_clip_val=None)
    assert [r["step"] for r in callback.records] == list(range(trainer.global_step))
    statuses = [r["status"] for r in callback.records]
    assert (statuses[0], statuses[-1]) == ("skipped", "ok")
