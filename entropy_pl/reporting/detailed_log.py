"""The file of a detailed log: crash-safe, with its tensors beside it, and the oldest ones making room."""

from __future__ import annotations

import os
import re
import shutil
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor

from entropy_pl.files import written_whole
from entropy_pl.records import SCHEMA, RecordWriter
from entropy_pl.reporting.detailed import (
    Kind,
    LoggingSettings,
    MeasuredBatch,
    raw_tensors,
    sequence_records,
    summary_record,
    token_records,
)

if sys.platform != "win32":
    import fcntl

RUN_ID = r"[A-Za-z0-9][A-Za-z0-9._-]*"
LOG_NAME = re.compile(rf"measure-(?P<run_id>{RUN_ID})\.jsonl(\.gz)?")
COMPANIONS = (".safetensors", ".safetensors.tmp")  # the second is what a killed run leaves of the first


class DetailedLog:
    """The log of one measurement, or of several under one run id: ``measure-<run_id>.jsonl[.gz]`` and its tensors.

    Nothing is made or opened before the first write. From then to :meth:`close` (or the process's end, however it
    comes) the log is held under a shared lock, which keeps other runs from removing it. A file system or platform
    without such locks removes nothing, and says nothing: there, logs pile up beyond ``max_files``.

    Args:
        settings: what to keep, and where.
        run_id: names the file: letters, digits, ``.``, ``_`` and ``-``, a letter or digit first.

    Raises:
        ValueError: if ``run_id`` cannot name a file.

    Example:
        with DetailedLog(LoggingSettings(enabled=True, level="debug"), run_id="2025-01-01T12-00-00") as log:
            log.write_measurement(result, batch, config=config, seconds=12.5)
    """

    def __init__(self, settings: LoggingSettings, run_id: str) -> None:
        if not re.fullmatch(RUN_ID, run_id):
            raise ValueError(
                "expected a run_id of letters, digits, '.', '_' and '-', a letter or digit first (it names the log's "
                f"file), got {run_id!r}"
            )
        self.settings, self.run_id = settings, run_id
        name = f"measure-{run_id}.jsonl" + (".gz" if settings.compress else "")
        self.path = Path(settings.output_directory) / name
        self.tensors_path = _companion(self.path, run_id, ".safetensors")
        self._writer = RecordWriter(self.path)
        self._held: IO[bytes] | None = None

    def __enter__(self) -> DetailedLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file, so that later runs may remove it in its turn. A write takes hold of it again."""
        if self._held is not None:
            self._held.close()
            self._held = None

    def write_measurement(
        self, result: Mapping[str, Any], batch: MeasuredBatch, *, config: Mapping[str, Any], seconds: float
    ) -> None:
        """Write a whole measurement, what cannot be had again from the rest first.

        Args:
            result: the measurement's result, JSON-able.
            batch: the arrays behind it.
            config: what it was measured under.
            seconds: its wall time.

        Raises:
            TypeError: as :meth:`write`.
            OSError: as :meth:`write` and :meth:`write_tensors`; what was written before it stays.
        """
        settings = self.settings
        if settings.keeps("summary"):
            self.write("summary", summary_record(batch, config=config, seconds=seconds))
        self.write("measurement", result)
        if settings.keeps("sequence"):
            for record in sequence_records(batch, texts=settings.keeps("texts")):
                self.write("sequence", record)
        if settings.keeps("tokens"):
            for record in token_records(batch):
                self.write("tokens", record)
        if settings.keeps("raw_tensors"):
            self.write_tensors(raw_tensors(batch))

    def write(self, kind: Kind, record: Mapping[str, Any]) -> None:
        """Append one record, on disk when this returns; nothing where the settings do not ask for its kind.

        Args:
            kind: ``summary``, ``measurement``, ``sequence`` or ``tokens``.
            record: as :meth:`RecordWriter.write` takes it; ``schema``, ``kind`` and ``run_id`` are added.

        Raises:
            ValueError: for another kind.
            TypeError: if the record holds something that JSON has no form for.
            OSError: if the record could not be written in full.
        """
        if kind not in get_args(Kind):
            raise ValueError(f"expected a record's kind to be one of {', '.join(get_args(Kind))}, got {kind!r}")
        if self.settings.keeps(kind):
            self._begin()
            head = {"schema": SCHEMA, "kind": kind, "run_id": self.run_id}
            self._writer.write({**head, **record, **head})  # first in the line, and not the record's to change

    def write_tensors(self, tensors: Mapping[str, Tensor]) -> Path | None:
        """Write the raw tensors beside the log, all or nothing; nothing where the settings do not ask for them.

        Args:
            tensors: by name, of any shape, dtype and device. They replace what an earlier call wrote.

        Returns:
            The safetensors file, ``measure-<run_id>.safetensors``, or None.

        Raises:
            OSError: if the file could not be written in full; one written before stays as it was.
        """
        if not self.settings.keeps("raw_tensors"):
            return None
        self._begin()
        # of their own storage: safetensors refuses tensors that share one, as the slices of a batch do
        own = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
        }
        try:
            with written_whole(self.tensors_path) as unfinished:
                save_file(own, unfinished, metadata={"schema": str(SCHEMA), "run_id": self.run_id})
                shutil.copymode(self.path, unfinished)  # safetensors makes a file that its owner alone can read
        except Exception as error:  # safetensors has an exception of its own for a full disk
            raise OSError(f"expected to write {len(own)} tensors to {self.tensors_path}, got: {error}") from error
        return self.tensors_path

    def _begin(self) -> None:
        if self._held is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not self.path.exists():
                self._rotate()
            self._held = _hold(self.path)

    def _rotate(self) -> None:
        """Make room for one more log: the runs last written to longest ago go."""
        runs: dict[str, list[Path]] = {}
        for path in self.path.parent.iterdir():
            match = LOG_NAME.fullmatch(path.name)
            if match and match["run_id"] != self.run_id and path.is_file() and not path.is_symlink():
                runs.setdefault(match["run_id"], []).append(path)
        newest_first = sorted(runs, key=lambda run: (max(map(_modified, runs[run])), run), reverse=True)
        for run_id in newest_first[self.settings.max_files - 1 :]:
            _remove(run_id, runs[run_id])


def _companion(log: Path, run_id: str, suffix: str) -> Path:
    return log.with_name(f"measure-{run_id}{suffix}")


def _modified(path: Path) -> int:
    """Nanoseconds of the last write; 0 where another run has just removed the file."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _lock(file: IO[bytes], *, shared: bool) -> None:
    """Take the lock of an open file: shared by its writers (waiting for it), or exclusive (at once or never).

    Raises:
        OSError: if the exclusive lock is not to be had, or there are no locks here.
    """
    if sys.platform == "win32":
        raise OSError("no advisory locks on Windows")
    fcntl.flock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX | fcntl.LOCK_NB)


def _hold(path: Path) -> IO[bytes]:
    """The file, made where there is none, open under the lock that says it is being written."""
    while True:
        file = open(path, "a+b")  # noqa: SIM115 - held until the log is closed
        with suppress(OSError):  # no locks here: then nobody can get the exclusive one to remove it either
            _lock(file, shared=True)
        # another run may have removed the file between its opening and its locking
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()


def _remove(run_id: str, logs: Sequence[Path]) -> None:
    """Remove a run's files, unless somebody is writing to them."""
    with ExitStack() as held:
        for log in logs:
            try:
                _lock(held.enter_context(open(log, "r+b")), shared=False)
            except OSError:
                return
        companions = [_companion(logs[0], run_id, suffix) for suffix in COMPANIONS]
        try:
            for path in (*companions, *logs):  # a log goes last: without it nobody would find its companions
                path.unlink(missing_ok=True)
        except OSError as error:
            warnings.warn(f"an old log could not be removed: {error}", stacklevel=2)
