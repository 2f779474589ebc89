"""What a command says when it fails: on one screen, what to do next, and nothing lost."""

from __future__ import annotations

import errno
import logging
import os
import shlex
import signal
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from commands import ROWS, screen_rows, short_fit
from lightning.pytorch import Callback

from entropy_pl import failures
from entropy_pl.cli import main
from entropy_pl.failures import RunState, failure_message, fitted, shortened, users_place
from entropy_pl.measurements import EntropyMeasurements
from entropy_pl.objectives import register_reward
from entropy_pl.peers import PeerError
from entropy_pl.policy.logits import NonFiniteError
from entropy_pl.reporting import read_records
from entropy_pl.training import _said

FAULTS: dict[str, BaseException] = {
    "gpu memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB." + " Of which" * 200),
    "cpu memory": RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
    "disk": OSError(errno.ENOSPC, "No space left on device", "last.ckpt"),
    "permission": PermissionError(errno.EACCES, "Permission denied", "/readonly/last.ckpt"),
    "not finite": NonFiniteError("expected finite logits, got NaN or infinity at 3 of 17 completion tokens"),
    "peer": PeerError("process 1 failed: ValueError: x"),
    "connection": RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:3004"),
    "import": ImportError("expected bitsandbytes"),
    "shapes": RuntimeError("Error(s) in loading state_dict:\n" + "\n".join(f"mismatch of {i}" for i in range(99))),
    "anything": KeyError("x"),
}
TO_DO = {
    "gpu memory": "lower the batch size",
    "cpu memory": "lower the batch size",
    "disk": "make room on that disk",
    "permission": "give a folder that can be written to",
    "not finite": "lower the learning rate",
    "peer": "look for what another process of this run said",
    "connection": "look for what another process of this run said",
    "import": "install what is missing",
    "shapes": "read the end of error.log",
    "anything": "read the end of error.log",
}


def raiser(error: BaseException, compiled_in: str = failures.__file__) -> Callable[..., None]:
    """A function of the code in some file that raises the error in its second line."""
    names: dict[str, Any] = {"error": error}
    exec(compile("def fail(*_):\n    raise error", compiled_in, "exec"), names)
    return names["fail"]


def raised(error: BaseException, compiled_in: str = failures.__file__) -> BaseException:
    """The error with a traceback, as if raised by the code of a file."""
    with pytest.raises(type(error)) as caught:
        raiser(error, compiled_in)()
    return error.with_traceback(caught.tb.tb_next)  # without this function


@pytest.mark.parametrize("kind", FAULTS)
def test_a_failure_is_told_on_one_screen_with_what_to_do(kind, tmp_path):
    error = raised(FAULTS[kind])
    state = RunState(
        "training at optimizer step 7",
        tmp_path,
        kept={"records": tmp_path / "records.jsonl", "saved": tmp_path / "step=5.ckpt"},
        resume=f"entropy-pl fit --config {tmp_path / 'config.yaml'} --ckpt_path {tmp_path / 'step=5.ckpt'}",
        less_memory="the batch size",
    )
    shown = failure_message(error, state)
    assert shown.startswith("entropy-pl: error: training at optimizer step 7 failed\n" + type(error).__name__)
    assert f"to do: {TO_DO[kind]}" in shown
    for line in (f"records  {tmp_path}", f"saved    {tmp_path}", "go on    entropy-pl fit", f"details  {tmp_path}"):
        assert f"\n{line}" in shown
    assert screen_rows(shown) <= ROWS
    log = (tmp_path / "error.log").read_text()
    assert "Traceback (most recent call last)" in log
    assert str(error) in log  # whole, however much of it is on the screen


def test_logs_of_several_failures_are_kept(tmp_path):
    for number in range(2):
        failure_message(raised(ValueError(f"failure {number}")), RunState("x", tmp_path))
    log = (tmp_path / "error.log").read_text()
    assert log.index("failure 0") < log.index("failure 1")


def test_a_traceback_goes_where_there_is_room(tmp_path, monkeypatch):
    """Into the run's folder, else into that for temporary files; else it says how to see it."""
    monkeypatch.setattr(failures.tempfile, "tempdir", str(tmp_path))
    error = raised(ValueError("x"))
    shown = failure_message(error, RunState("x", tmp_path / "never made"))
    [log] = tmp_path.glob("entropy-pl-*.log")
    assert f"details  {log}" in shown
    monkeypatch.setattr(failures.tempfile, "tempdir", str(tmp_path / "gone"))
    assert "ENTROPY_PL_TRACEBACK=1 shows it" in failure_message(error, RunState("x", None))


def test_another_process_says_which_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert "error: process 1: x failed" in failure_message(raised(ValueError("y")), RunState("x", tmp_path))
    assert (tmp_path / "error-1.log").exists()


def test_the_place_is_the_innermost_of_the_users_own_code(tmp_path):
    mine = str(tmp_path / "my_rewards.py")
    assert users_place(raised(ValueError("x"), mine)) == f"{mine}:2, in fail"
    library = os.path.join(os.path.dirname(torch.__file__), "functional.py")
    debians = "/usr/lib/python3/dist-packages/numpy/__init__.py"
    for file in (failures.__file__, library, debians, logging.__file__, "<string>"):
        assert users_place(raised(ValueError("x"), file)) is None


def test_a_file_that_is_missing_is_no_folder_that_cannot_be_written_to(tmp_path):
    missing, closed = FileNotFoundError(errno.ENOENT, "gone", "a.jsonl"), PermissionError(errno.EACCES, "no", "runs")
    assert _said(missing) == "[Errno 2] gone: 'a.jsonl'"
    assert _said(closed).startswith("expected a folder for the run that can be written to, got runs: no.")


def test_long_messages_are_cut(monkeypatch):
    assert shortened("a\n\nb") == "a\nb"
    cut = shortened("\n".join(f"line {i}" for i in range(100)))
    assert cut.endswith("line 5\n…")
    assert screen_rows(shortened("word " * 10_000)) <= 5


def test_lines_are_broken_at_a_terminal_alone(monkeypatch):
    path = "/a/" + "long-folder/" * 12 + "file"
    text = f"{'word ' * 40}{path}"
    assert fitted(text) == text
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    broken = fitted(text).splitlines()
    assert len(broken) > 1
    assert path in [line.strip() for line in broken]  # what is to be copied is whole


# ------------------------------------------------------------------------------------------------ from the command line


class Failing(Callback):
    """Fails at the end of a step."""

    def __init__(self, kind: str = "anything") -> None:
        self.kind = kind

    def on_train_batch_end(self, *_: object) -> None:
        raise KeyboardInterrupt if self.kind == "interrupt" else FAULTS[self.kind]


@register_reward("raises")
def raises(completion: str, answer: str) -> float:
    """A user's own, with a mistake in it."""
    return float("no number")


@pytest.fixture
def words(tiny_policy_dir, tmp_path, monkeypatch) -> list[str]:
    monkeypatch.setattr(logging, "raiseExceptions", False)  # Lightning's log handler outlives a test's captured stderr
    return short_fit(tiny_policy_dir, tmp_path)


def ended(capsys, words: list[str], status: int) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(words)
    assert exit_.value.code == status
    said = capsys.readouterr().err.partition("entropy-pl: ")
    assert "Traceback" not in said[2]
    assert screen_rows(said[2]) <= ROWS
    return said[1] + said[2]


def failing(kind: str) -> list[str]:
    return ["--trainer.callbacks+=test_failures.Failing", f"--trainer.callbacks.kind={kind}"]


def test_a_run_that_fails_keeps_its_records_and_can_be_resumed(words, tmp_path, capsys):
    every_step = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps=1"]
    # the checkpoint's callback comes last whatever the order: the first step is not saved when the fault comes
    first = ended(capsys, [*words, *every_step, *failing("anything")], status=1)
    run = tmp_path / "quickstart/version_0"
    assert "training at optimizer step 1 failed\nKeyError: 'x'" in first
    assert f"raised at {__file__}:" in first
    assert "to do: fix that line" in first
    assert "go on    from the start: no checkpoint was saved" in first
    assert f"details  {run / 'error.log'}" in first
    assert [record["step"] for record in read_records(run / "entropy_probe/records.jsonl")] == [0]


def test_what_it_says_to_go_on_with_goes_on(words, tmp_path, capsys, monkeypatch):
    saved = [*words, "--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps=1"]
    monkeypatch.setattr(Failing, "on_train_batch_end", lambda *_: None)
    monkeypatch.setattr(Failing, "on_train_end", lambda *_: (_ for _ in ()).throw(FAULTS["disk"]), raising=False)
    said = ended(capsys, [*saved, *failing("disk")], status=1)
    assert "make room on that disk" in said
    [command] = [line.removeprefix("go on    ") for line in said.splitlines() if line.startswith("go on")]
    monkeypatch.undo()
    program, *again = shlex.split(command)
    assert program == "entropy-pl"
    main([*again, "--trainer.callbacks=null", "--trainer.max_steps=3"])
    [records] = tmp_path.glob("quickstart/version_1/entropy_probe/records.jsonl")
    assert [record["step"] for record in read_records(records)][-1] == 2
    assert str(records) in capsys.readouterr().out


def test_a_users_reward_that_raises_is_named_with_its_line(words, capsys):
    said = ended(capsys, [*words, "--model.rewards=[raises]", "--model.reward_weights=[1.0]"], status=1)
    assert "training at optimizer step 0 failed\nValueError: could not convert string to float: 'no number'" in said
    assert f"raised at {__file__}:" in said
    assert "in raises" in said


def test_ctrl_c_is_no_error(words, tmp_path, capsys):
    said = ended(capsys, [*words, *failing("interrupt")], status=130)
    assert said.startswith("entropy-pl: interrupted: training at optimizer step 1\n")
    records = tmp_path / "quickstart/version_0/entropy_probe/records.jsonl"
    assert f"records  {records}" in said
    assert [record["step"] for record in read_records(records)] == [0]
    assert not (tmp_path / "quickstart/version_0/error.log").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.fixture
def measure(tmp_path) -> list[str]:
    (tmp_path / "out").mkdir()
    return ["measure", "--checkpoint.checkpoint_path=x", f"--output_directory={tmp_path / 'out'}"]


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (FAULTS["cpu memory"], 1, "to do: lower generation.max_batch_tokens"),
        (FAULTS["not finite"], 1, "the measurement failed\nNonFiniteError"),
        (FAULTS["disk"], 1, "make room on that disk"),
        (AssertionError("x"), 1, "to do: read the end of error.log"),
        (KeyboardInterrupt(), 130, "entropy-pl: interrupted: the measurement"),
        (ValueError("expected a, got b: do c"), 2, "expected a, got b: do c"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_a_measurement_that_fails(measure, tmp_path, capsys, monkeypatch, error, status, message):
    monkeypatch.setattr(EntropyMeasurements, "run_experiments", raiser(error))
    assert message in ended(capsys, measure, status)
    assert (tmp_path / "out/error.log").exists() == (status == 1)


def test_the_whole_traceback_can_be_had(measure, monkeypatch):
    monkeypatch.setenv("ENTROPY_PL_TRACEBACK", "1")
    monkeypatch.setattr(EntropyMeasurements, "run_experiments", raiser(FAULTS["anything"]))
    with pytest.raises(failures.RunError) as raised_:
        main(measure)
    assert raised_.value.__cause__ is FAULTS["anything"]
