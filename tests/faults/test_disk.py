"""A full disk: the run goes on to the bit, and what could not be written is written when there is room."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import Deterministic
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from other_process import Announce, other_process
from six_steps import Saves, Steps, assert_same, measured, records, run
from trl_runs import Keeper, grpo_trainer
from trl_runs import probe as trl_probe

from entropy_pl.reporting import read_records

FULL = Path("/dev/full")  # every write to it fails with ENOSPC
needs_a_full_disk = pytest.mark.skipif(not FULL.exists(), reason="no /dev/full, the disk that is always full")


class RoomAgain(Callback):
    """Frees the disk after so many steps, or at the end of training."""

    def __init__(self, file: Path, after: int | None) -> None:
        self.file, self.after = file, after

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.after:
            self.file.unlink()

    def on_train_end(self, *_: Any) -> None:
        if self.after is None:
            self.file.unlink()


@needs_a_full_disk
@pytest.mark.parametrize("after", [3, None], ids=["at step 3", "at the end"])
def test_records_wait_for_room(tmp_path, uninterrupted, after):
    file, steps = tmp_path / "records.jsonl", Steps()
    file.symlink_to(FULL)
    with pytest.warns(
        UserWarning,
        match=r"could not write the record of step 2, training goes on\. OSError: .*No space left on device: "
        r".*records\.jsonl.*: it is kept, and written with the next one",
    ):
        run(tmp_path, RoomAgain(file, after), steps)
    assert records(tmp_path) == uninterrupted.records
    assert_same(steps.states[-1], uninterrupted.states[-1], streams=True)


@needs_a_full_disk
def test_records_wait_for_room_until_a_run_breaks_off(tmp_path, uninterrupted):
    file = tmp_path / "records.jsonl"
    file.symlink_to(FULL)

    class Breaks(RoomAgain):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            super().on_train_batch_end(trainer)
            if trainer.global_step == 3:
                raise KeyError("something of the user's own")

    with pytest.warns(UserWarning, match="could not write the record of step 2"), pytest.raises(KeyError):
        run(tmp_path, Breaks(file, 3))
    assert records(tmp_path) == uninterrupted.records[:2]


@needs_a_full_disk
def test_records_that_never_found_room_are_named(tmp_path, uninterrupted):
    (tmp_path / "records.jsonl").symlink_to(FULL)
    steps = Steps()
    with pytest.warns(
        UserWarning,
        match=r"could not write the last records.* the records of steps 0, 2, 4 are not in the file, but in the "
        r"callback's `records`",
    ):
        run(tmp_path, steps)
    assert_same(steps.states[-1], uninterrupted.states[-1], streams=True)


@needs_a_full_disk
def test_pages_and_figures(tmp_path):
    """What is half written does not stand there as if it were whole; records and training are as on an empty disk."""

    def train(folder: Path) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
        trainer, keeper = grpo_trainer(folder, report_to=[], max_steps=3), Keeper()
        trl_probe(trainer, num_sequences=8)
        trainer.add_callback(keeper)
        trainer.train()
        return [measured(r) for r in read_records(folder / "entropy_probe/records.jsonl")], keeper.weights[-1]

    expected, weights = train(tmp_path / "room")
    full = tmp_path / "full"
    pages = full / "entropy_probe/attribution"
    pages.mkdir(parents=True)
    for name in ("attribution/step_000000.npz.tmp", "attribution/step_000002.html.tmp", "delta_entropy.png"):
        (full / "entropy_probe" / name).symlink_to(FULL)
    with pytest.warns(UserWarning, match="could not") as caught:
        found, same_weights = train(full)
    said = [str(warning.message) for warning in caught]
    for what in (
        "write the attributed tokens of step 0",
        "write the attributed tokens of step 2",
        "draw delta_entropy.png",
    ):
        assert any(f"could not {what}, training goes on. OSError: [Errno 28] No space left" in text for text in said)
    assert [r["sweep"] for r in found] == [r["sweep"] for r in expected]
    assert [r["attribution"] for r in found] == [r["attribution"] for r in expected]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in same_weights.items())
    assert sorted(os.listdir(pages)) == ["step_000002.npz"]
    assert (full / "entropy_probe/components.png").stat().st_size > 10_000


@pytest.mark.parametrize("probed", [True, False])
def test_the_runs_own_event_file(tmp_path, probed, uninterrupted):
    """TensorBoard's writer raises in the run that it belongs to, with the probe or without; the records are whole."""

    class Logs(Deterministic):
        def training_step(self, *args: Any) -> torch.Tensor:
            loss = super().training_step(*args)
            self.log("loss", loss)
            return loss

    class NoMoreRoom(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 3:  # a limit that the event file has reached, and the records have not
                [events] = Path(trainer.log_dir).glob("events.*")
                trainer.logger.experiment.flush()
                limit = max(events.stat().st_size, 20_000 if probed else 0)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    def work(announce: Announce) -> None:
        logger = TensorBoardLogger(tmp_path, name="run")
        options = {"probe": {} if probed else {"every_n_steps": 0}, "logger": logger, "log_every_n_steps": 1}
        run(tmp_path, Saves(tmp_path / "a.ckpt"), NoMoreRoom(), module=Logs(), **options)

    with other_process(work) as process:
        assert process.wait() == 1
        assert "OSError: [Errno 27] File too large" in process.said()
    if not probed:
        return
    assert records(tmp_path) in (uninterrupted.records[:2], uninterrupted.records)  # the third, if it came to that
    steps = Steps()
    run(tmp_path, steps, ckpt_path=tmp_path / "a.ckpt")
    assert records(tmp_path) == uninterrupted.records
    assert_same(steps.states[-1], uninterrupted.states[-1])
