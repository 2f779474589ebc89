"""Ctrl-C and SIGTERM while a probe is under way: the step that was taken stays taken, and the run ends behind it."""

from __future__ import annotations

import os
import signal
import sys
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from other_process import Announce, other_process, stop_within_probe
from six_steps import Saves, Steps, assert_same, measured, records, run
from tiny import build_model
from trl_runs import Keeper, grpo_trainer
from trl_runs import probe as trl_probe

from entropy_pl.monitor import step_monitor
from entropy_pl.monitor.run_probe import RunProbe
from entropy_pl.peers import Peers
from entropy_pl.records import files as writing
from entropy_pl.reporting import read_records
from entropy_pl.updates import displace

WITHIN = {"sampling": None, "tangents": "sampling", "sweep": "tangents"}


def stop_at(point: str, monkeypatch: pytest.MonkeyPatch, announce: Announce) -> None:
    """In the midst of a pass of step 4's probe; or of writing its record; or of logging it."""
    if point in WITHIN:
        stop_within_probe(monkeypatch, 4, WITHIN[point], announce)
        return
    calls, third = count(), 2  # records of steps 0, 2 and 4

    def once(function: Any) -> Any:
        def stopping(*args: Any) -> None:
            function(*args)
            if next(calls) == third:
                announce()

        return stopping

    if point == "writing":
        monkeypatch.setattr(writing.os, "fsync", once(os.fsync))
    else:
        monkeypatch.setattr(step_monitor, "publish", once(step_monitor.publish))


@pytest.mark.parametrize("point", [*WITHIN, "writing", "logging"])
def test_ctrl_c_in_a_lightning_run(tmp_path, monkeypatch, uninterrupted, point):
    whole = uninterrupted.records

    class SavesOnException(Saves):
        def on_exception(self, trainer: Any, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / "stopped.ckpt")

    def work(announce: Announce) -> None:
        stop_at(point, monkeypatch, announce)
        run(tmp_path, SavesOnException(tmp_path / "a.ckpt"), Steps(tmp_path / "stopped.pt"))

    with other_process(work) as process:
        process.reach()
        assert process.stop(signal.SIGINT) == 1, process.said()  # Lightning's own exit code
        said = process.said()
    assert "KeyboardInterrupt during the entropy probe of step 4: the run stops at the end of the step" in said
    assert "Traceback" not in said
    stopped = torch.load(tmp_path / "stopped.pt", weights_only=True)
    assert_same(stopped, uninterrupted.states[4], streams=True)  # step 4 is done and counted, and nothing else

    # the probe that was interrupted has no record; one that was over has, once
    assert records(tmp_path) == whole[: 2 if point in WITHIN else 3]
    steps = Steps()
    run(tmp_path, steps, ckpt_path=tmp_path / "stopped.ckpt")  # as Lightning's save_on_exception leaves one
    assert_same(steps.states[-1], uninterrupted.states[-1])
    run(tmp_path, ckpt_path=tmp_path / "a.ckpt")
    assert records(tmp_path) == whole


def test_an_interrupt_in_a_run_of_several_processes(tmp_path, monkeypatch):
    """It is not held back until the step ends: the others wait in the probe, and this process would behind it."""

    class Interrupt(BaseException):
        """Like Ctrl-C, which Lightning would answer for the whole of the tests' process."""

    class Counts(Callback):
        def on_exception(self, trainer: Trainer, *_: Any) -> None:
            counted.append(trainer.global_step)

    def interrupted(self: RunProbe, *_: Any) -> None:
        self.peers = Peers(rank=0, size=2)
        raise Interrupt

    counted: list[int] = []
    monkeypatch.setattr(RunProbe, "measure", interrupted)
    with pytest.raises(Interrupt):
        run(tmp_path, Counts())
    assert counted == [0]  # Lightning, which counts a step once it is over, had no chance to wait for anybody
    assert not (tmp_path / "records.jsonl").exists()


def test_sigterm_in_a_lightning_run(tmp_path, monkeypatch, uninterrupted):
    """Lightning waits for the end of the step: the probe ends first, and is recorded."""

    def work(announce: Announce) -> None:
        stop_at("sweep", monkeypatch, announce)
        run(tmp_path, Saves(tmp_path / "a.ckpt"), Steps(tmp_path / "stopped.pt"))

    with other_process(work) as process:
        process.reach()
        process.stop(signal.SIGTERM)
    assert_same(torch.load(tmp_path / "stopped.pt", weights_only=True), uninterrupted.states[4], streams=True)
    assert records(tmp_path) == uninterrupted.records
    run(tmp_path, ckpt_path=tmp_path / "a.ckpt")
    assert records(tmp_path) == uninterrupted.records


def test_ctrl_c_in_a_run_of_hugging_faces_trainer(tmp_path, monkeypatch):
    options = {"save_strategy": "steps", "save_steps": 1, "report_to": [], "max_steps": 4}
    settings = {"num_sequences": 8, "attribution": False}
    whole, keeper = grpo_trainer(tmp_path / "whole", **options), Keeper()
    trl_probe(whole, **settings)
    whole.add_callback(keeper)
    whole.train()
    expected = [measured(r) for r in read_records(tmp_path / "whole/entropy_probe/records.jsonl")]

    def work(announce: Announce) -> None:
        stop_within_probe(monkeypatch, 2, "tangents", announce)
        trainer = grpo_trainer(tmp_path / "parts", **options)
        trl_probe(trainer, **settings)
        try:
            trainer.train()
        except KeyboardInterrupt:
            after = {name: parameter.detach() for name, parameter in trainer.model.named_parameters()}
            torch.save({"weights": after, "step": trainer.state.global_step}, tmp_path / "stopped.pt")
            raise

    with other_process(work) as process:
        process.reach()
        assert process.stop(signal.SIGINT) == 130, process.said()
        assert "KeyboardInterrupt during the entropy probe of step 2" in process.said()
    stopped = torch.load(tmp_path / "stopped.pt", weights_only=True)
    assert stopped["step"] == 3
    assert all(torch.equal(tensor, keeper.weights[3][name]) for name, tensor in stopped["weights"].items())

    path = tmp_path / "parts/entropy_probe/records.jsonl"
    assert [measured(r) for r in read_records(path)] == expected[:1]
    resumed, keeper_of_resumed = grpo_trainer(tmp_path / "parts", **options), Keeper()
    trl_probe(resumed, **settings)
    resumed.add_callback(keeper_of_resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts/checkpoint-2"))
    found = [measured(r) for r in read_records(path)]
    assert [r["step"] for r in found] == [0, 2]
    assert [r["sweep"] for r in found] == [r["sweep"] for r in expected]
    assert all(torch.equal(t, keeper.weights[-1][name]) for name, t in keeper_of_resumed.weights[-1].items())


def test_parameters_are_put_back_wherever_an_interrupt_falls():
    """At every line that is executed while other values are in place, and while they are taken out again."""
    model = build_model()
    before = {name: parameter.data for name, parameter in model.named_parameters()}
    values = {name: data + 1 for name, data in before.items()}
    lines = 0
    while interrupted_at_line(lines, model, values):
        lines += 1
        assert all(parameter.data is not None for parameter in model.parameters())
        for name, parameter in model.named_parameters():
            assert parameter.data_ptr() == before[name].data_ptr(), (lines, name)
    assert lines > 2 * len(values)  # each is set and put back


def interrupted_at_line(number: int, model: Any, values: dict[str, Any]) -> bool:
    """Interrupt at the so many-th line of the module that exchanges parameters; False if there are not as many."""
    lines = count()
    file = str(Path(displace.__file__))

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename != file:
            return None
        if event == "line" and next(lines) == number:
            raise KeyboardInterrupt
        return trace

    earlier = sys.gettrace()
    try:
        sys.settrace(trace)
        with displace.parameters_set_to(model, values):
            pass
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(earlier)
    return False
