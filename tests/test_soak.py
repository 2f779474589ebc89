"""A long run with many probes: nothing that a probe takes, makes or opens is still there at the next one.

200 optimizer steps with a probe every 5; ENTROPY_PL_SOAK_STEPS gives another number. What was measured is among the
properties of the test (``--junitxml``); the seconds among it are there to be read, and nothing is asserted of them.
"""

from __future__ import annotations

import gc
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import psutil
import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from entropy_pl.callbacks import EntropyProbeCallback
from entropy_pl.data.datamodule import PromptDataModule
from entropy_pl.grpo import GRPOModule
from entropy_pl.monitor import loggers, step_monitor
from entropy_pl.monitor.run_probe import RunProbe
from entropy_pl.objectives import register_reward
from entropy_pl.policy import LoraSettings, PolicySettings
from entropy_pl.reporting import read_records

pytestmark = pytest.mark.slow

STEPS = int(os.environ.get("ENTROPY_PL_SOAK_STEPS", "200"))
EVERY = 5
WARM_UP = 10  # probes until caches, lazy imports and the allocator's arenas are what they stay
KEPT = 4  # records in memory, so that their bound is reached while warming up
MIB = 2**20


@register_reward("test_soak_digits")
def digits(completion: str, answer: str) -> float:
    """Differs almost surely within a group."""
    return sum(c.isdigit() for c in completion) / max(1, len(completion))


class Gauge(Callback):
    """What is there after every probe."""

    def __init__(self) -> None:
        self.found: list[dict[str, Any]] = []
        self._process = psutil.Process()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step % EVERY != 1:
            return
        gc.collect()
        objects = gc.get_objects()
        optimizer = trainer.optimizers[0]
        hooks = [
            len(value)
            for owner in (*pl_module.modules(), optimizer)
            for name, value in vars(owner).items()
            if name.endswith("_hooks")
        ]
        self.found.append(
            {
                "tensors": sum(issubclass(type(thing), torch.Tensor) for thing in objects),
                "objects": len(objects),
                "resident": self._process.memory_info().rss,
                "files": self._process.num_fds(),
                "threads": sorted(thread.name for thread in threading.enumerate()),
                "figures": len(plt.get_fignums()),
                "hooks": sum(hooks),
            }
        )

    def of(self, what: str) -> list[Any]:
        return [found[what] for found in self.found]


def slope(values: list[float]) -> float:
    """Per probe, after warming up."""
    rest = values[WARM_UP:]
    return float(np.polyfit(np.arange(len(rest)), rest, 1)[0])


def counted(function: Callable[..., Any], calls: Counter[str], name: str) -> Callable[..., Any]:
    def counting(*args: Any, **options: Any) -> Any:
        calls[name] += 1
        return function(*args, **options)

    return counting


def test_nothing_grows(tmp_path, tiny_policy_dir, monkeypatch, record_property):
    calls: Counter[str] = Counter()
    passes: list[int] = []
    seconds: list[float] = []  # of the CPU, for a probe, its record and its figures; other processes are not in it
    measure, keep = RunProbe.measure, step_monitor.StepMonitor._keep

    def measured(self: RunProbe, step: int, on_pass: Callable[[str], None]) -> Any:
        took: Counter[str] = Counter()
        started = time.process_time()
        record = measure(self, step, counted(on_pass, took, "pass"))
        seconds.append(time.process_time() - started)
        passes.append(took["pass"])
        return record

    def kept(self: step_monitor.StepMonitor, record: Any) -> None:
        started = time.process_time()
        keep(self, record)
        seconds[-1] += time.process_time() - started

    monkeypatch.setattr(RunProbe, "measure", measured)
    monkeypatch.setattr(step_monitor.StepMonitor, "_keep", kept)
    monkeypatch.setattr(step_monitor, "KEPT", KEPT)
    for module in (step_monitor, loggers):
        monkeypatch.setattr(module, "read_records", counted(read_records, calls, "files read"))

    policy = PolicySettings(str(tiny_policy_dir), lora=LoraSettings(rank=4))
    module = GRPOModule(
        policy,
        num_generations=4,
        max_new_tokens=6,
        rewards=["test_soak_digits"],
        optimizer=partial(torch.optim.AdamW, lr=1e-3),
    )
    probe = EntropyProbeCallback(
        num_sequences=16, every_n_steps=EVERY, output_directory=str(tmp_path / "probe"), progress_bar=False
    )
    gauge = Gauge()
    trainer = Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        logger=TensorBoardLogger(tmp_path, name="run"),
        callbacks=[probe, gauge],
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    data = PromptDataModule(prompt_template="{question}", e_size=16, u_size=64, batch_size=4)
    trainer.fit(module, datamodule=data)

    probes = len(range(0, STEPS, EVERY))
    assert len(gauge.found) == probes
    record_property("CPU seconds per probe", float(np.mean(seconds[WARM_UP:])))
    record_property("CPU seconds per probe, slope", slope(seconds))
    record_property("resident bytes, slope", slope(gauge.of("resident")))
    record_property("resident bytes", gauge.of("resident")[-1])
    for what in ("tensors", "objects", "files", "hooks", "figures"):
        record_property(what, f"{gauge.of(what)[WARM_UP]} after {WARM_UP} probes, {gauge.of(what)[-1]} at the end")

    for what in ("tensors", "files", "threads", "figures", "hooks"):  # to the last one
        assert all(found == gauge.of(what)[WARM_UP] for found in gauge.of(what)[WARM_UP:]), what
    # what theories are compared by: numbers in at most this many dicts and lists per probe
    assert slope(gauge.of("objects")) < 16
    # The allocator's arenas breathe by some MiB. One figure that stays at every probe is 1 MiB, and 30 at the least.
    resident = np.array(gauge.of("resident")[WARM_UP:])
    quarter = max(1, len(resident) // 4)
    assert resident[-quarter:].mean() - resident[:quarter].mean() < 16 * MIB

    # what would make a probe take longer than the one before it: passes, files read, hooks (above), records held
    assert set(passes[1:]) == {passes[1]}
    assert calls["files read"] == 1  # by the summary at the end
    assert len(probe.records) == KEPT

    assert [record["step"] for record in read_records(tmp_path / "probe/records.jsonl")] == list(range(0, STEPS, EVERY))
    assert {record["status"] for record in probe.records} == {"ok"}
    shown = EventAccumulator(str(Path(trainer.log_dir))).Reload()
    assert len(shown.Scalars("entropy_probe/delta_h_true")) == probes
