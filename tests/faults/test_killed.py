"""kill -9, and a run that goes on from its last checkpoint: nothing is recorded twice or lost, no number is another."""

from __future__ import annotations

import builtins
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations import local
from other_process import Announce, other_process, stop_within_probe
from six_steps import Saves, Steps, assert_same, records, run

from entropy_pl.cli import main
from entropy_pl.records import files as writing


def killed(work: Any) -> None:
    """Run, and kill where the work says so."""
    with other_process(work) as process:
        process.reach()
        assert process.stop(signal.SIGKILL) == -signal.SIGKILL


@pytest.mark.parametrize("after", [None, "sampling", "tangents"], ids=["sampling", "tangents", "sweep"])
def test_killed_during_a_probe(tmp_path, monkeypatch, uninterrupted, after):
    whole = uninterrupted.records

    def work(announce: Announce) -> None:
        stop_within_probe(monkeypatch, 4, after, announce)
        run(tmp_path, Saves(tmp_path / "a.ckpt"))

    killed(work)
    assert records(tmp_path) == whole[:2]
    steps = Steps()
    run(tmp_path, steps, ckpt_path=tmp_path / "a.ckpt")
    assert records(tmp_path) == whole
    assert_same(steps.states[-1], uninterrupted.states[-1])


class HalfWritten:
    """A file of which a write gets half the way, once it is the one that is meant."""

    def __init__(self, file: Any, announce: Announce, which: int) -> None:
        self._file, self._announce, self._which = file, announce, which

    def __enter__(self) -> HalfWritten:
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, data: bytes) -> int:
        if self._file.seek(0, 2) and f'"step": {self._which}'.encode() in data:
            self._file.write(data[: len(data) // 2])
            self._announce()
        return self._file.write(data)


def test_killed_while_a_record_is_written(tmp_path, monkeypatch, uninterrupted):
    whole = uninterrupted.records

    def work(announce: Announce) -> None:
        def half(path: Path, *args: Any, **options: Any) -> HalfWritten:
            return HalfWritten(builtins.open(path, *args, **options), announce, 4)

        monkeypatch.setattr(writing, "open", half, raising=False)
        run(tmp_path, Saves(tmp_path / "a.ckpt"))

    killed(work)
    torn = (tmp_path / "records.jsonl").read_bytes().split(b"\n")[-1]
    assert torn.startswith(b'{"schema"')
    steps = Steps()
    with pytest.warns(UserWarning, match=r"records\.jsonl, line 3 is not a record and was left out"):
        run(tmp_path, steps, ckpt_path=tmp_path / "a.ckpt")
    with pytest.warns(UserWarning, match="line 3 is not a record") as caught:
        assert records(tmp_path) == whole  # the record of step 4 on line 4
    assert len(caught) == 1
    assert_same(steps.states[-1], uninterrupted.states[-1])


def test_killed_while_a_checkpoint_is_written(tmp_path, monkeypatch, uninterrupted):
    """Lightning writes it beside its place and moves it there: the one of before is whole, and is gone on from."""
    whole = uninterrupted.records
    checkpoint = tmp_path / "a.ckpt"

    def work(announce: Announce) -> None:
        write = local.LocalFileOpener.write

        def half(self: Any, data: bytes) -> int:
            if not checkpoint.exists():
                return write(self, data)
            write(self, data[: len(data) // 2])
            self.f.flush()
            announce()
            return 0

        monkeypatch.setattr(local.LocalFileOpener, "write", half)
        tempfile.tempdir = str(tmp_path)  # so that what is left of it goes when the test does
        run(tmp_path, Saves(checkpoint, steps=(3, 5)))

    killed(work)
    assert records(tmp_path) == whole
    steps = Steps()
    run(tmp_path, steps, ckpt_path=checkpoint)
    assert records(tmp_path) == whole  # step 4 has been taken and measured again, and stands there once
    assert_same(steps.states[-1], uninterrupted.states[-1])


@pytest.mark.parametrize("command", ["fit", "measure"])
def test_a_checkpoint_cut_short(tmp_path, capsys, command):
    run(tmp_path, Saves(tmp_path / "a.ckpt"), steps=3)
    half = tmp_path / "half.ckpt"
    data = (tmp_path / "a.ckpt").read_bytes()
    half.write_bytes(data[: len(data) // 2])
    capsys.readouterr()
    words = {
        "fit": ["--config", "configs/quickstart.yaml", "--ckpt_path", str(half)],
        "measure": ["--checkpoint.checkpoint_path", str(half), "--batch_config.dataset_name", "arithmetic_r1_template"],
    }
    with pytest.raises(SystemExit) as stopped:
        main([command, *words[command]])
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert f"expected a readable checkpoint, got {half}, which is damaged" in said
    assert "take an earlier one" in said
    assert "Traceback" not in said
