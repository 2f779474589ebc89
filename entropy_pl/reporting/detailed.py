"""The detailed log of a measurement: as much of it as the settings ask for, as JSON lines in a file of its own.

Every record has ``schema``, ``kind`` and ``run_id``. Each level adds kinds to those of the level before it:

* ``minimal``: one ``summary``, its numbers where a measurement's result has them: ``config_hash``; ``sweep``, a list of
  ``{"eta", "deltaH_true", "deltaH_approx"}``, ΔH(η) and δH₁(η) in nats per token or per sequence, as the estimates
  were normalized; ``timing``, ``{"total"}`` in seconds.
* ``standard``: one ``measurement``, the measurement's whole result: estimates with error bars, timings, versions,
  config.
* ``detailed``: one ``sequence`` per sequence i of the E-batch: ``index`` (i, from 0); ``cluster`` (the label of its
  prompt; its index where no prompt repeats); ``n_prompt_tokens``; ``n_tokens`` (T_i); ``logp`` (S_i = Σ_k s_ik at θ,
  nats); ``entropy`` (H_i = Σ_k h_ik at θ, nats); ``first_order_influence`` (ψ_i of δH₁, per unit η, in the estimate's
  nats); ``sweep``, a list of ``{"eta", "log_weight" (Σ_k r_ik, nats), "entropy" (Σ_k h_ik at θ+ηv, nats),
  "influence" (ψ_i of ΔH(η), in the estimate's nats)}``; ``prompt`` and ``completion``, their texts (null: not at hand).
* ``debug``: one ``tokens`` per sequence: ``index``, and one number per completion token in ``token_id``, ``logp`` (s,
  nats), ``entropy`` (h, nats), ``logp_dot`` and ``entropy_dot`` (ṡ and ḣ, nats per unit η; null: not at hand). And the
  raw tensors, see :func:`raw_tensors`, in one safetensors file beside the log.

The functions that make the records take arrays and touch no file; :class:`DetailedLog` keeps what the settings ask for.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor

from entropy_pl.estimators import EntropyChange
from entropy_pl.reporting.records import SCHEMA, Record, RecordWriter, to_json
from entropy_pl.rollout import Rollout, TokenStats

if sys.platform != "win32":
    import fcntl

Level = Literal["minimal", "standard", "detailed", "debug"]
Kind = Literal["summary", "measurement", "sequence", "tokens"]
Content = Kind | Literal["texts", "raw_tensors"]

IMPLIED_FROM: dict[Content, Level] = {
    "summary": "minimal",
    "measurement": "standard",
    "sequence": "detailed",
    "texts": "detailed",
    "tokens": "debug",
    "raw_tensors": "debug",
}
"""The lowest level with this content."""

FLAG_OF: dict[Content, str] = {"texts": "log_sequences", "tokens": "log_tokens", "raw_tensors": "log_raw_tensors"}

RUN_ID = r"[A-Za-z0-9][A-Za-z0-9._-]*"
LOG_NAME = re.compile(rf"measure-(?P<run_id>{RUN_ID})\.jsonl(\.gz)?")
COMPANIONS = (".safetensors", ".safetensors.tmp")  # the second is what a killed run leaves of the first


@dataclass(frozen=True)
class LoggingSettings:
    """How much of a measurement is kept on file, and where.

    Args:
        enabled: whether anything is written at all.
        level: `minimal` keeps the sweep's values and the time, `standard` the whole result, `detailed` a record per
            sequence as well, `debug` every token and the raw tensors.
        log_sequences: the texts of prompts and completions, in a record per sequence. False leaves the texts out and
            the level's numbers in. None: what the level implies (from `detailed` on).
        log_tokens: a record per sequence with every token's numbers. None: what the level implies (`debug`).
        log_raw_tensors: the arrays behind the estimates, in a safetensors file. None: what the level implies (`debug`).
        output_directory: folder of the logs, `measure-<run id>.jsonl`; made when first written to.
        compress: gzip the log (`measure-<run id>.jsonl.gz`).
        max_files: logs to keep in the folder; a new one replaces the oldest, with its tensors. Logs that a running
            process is writing stay.

    Raises:
        ValueError: for an option out of range.
    """

    enabled: bool = False
    level: Level = "standard"
    log_sequences: bool | None = None
    log_tokens: bool | None = None
    log_raw_tensors: bool | None = None
    output_directory: str = "logs/entropy"
    compress: bool = False
    max_files: int = 20

    def __post_init__(self) -> None:
        if self.level not in get_args(Level):
            raise ValueError(f"expected level to be one of {', '.join(get_args(Level))}, got {self.level!r}")
        for name in ("enabled", "compress"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"expected {name} to be true or false, got {getattr(self, name)!r}")
        for name in FLAG_OF.values():
            if not isinstance(getattr(self, name), bool | None):
                raise ValueError(
                    f"expected {name} to be true, false or null (what the level implies), got {getattr(self, name)!r}"
                )
        if not self.output_directory:
            raise ValueError("expected output_directory to be a folder for the logs, got an empty name ('.': here)")
        if not isinstance(self.max_files, int) or self.max_files < 1:
            raise ValueError(
                f"expected max_files to be a whole number of at least 1, the log being written, got {self.max_files!r} "
                "(for no log at all: enabled=False)"
            )

    def keeps(self, content: Content) -> bool:
        """Whether the log has this content: what the level implies, with the flags' additions and exceptions."""
        if not self.enabled:
            return False
        levels = get_args(Level)
        implied = levels.index(self.level) >= levels.index(IMPLIED_FROM[content])
        if content == "sequence":
            return implied or bool(self.log_sequences)  # texts need a record to be in
        flag = getattr(self, FLAG_OF[content]) if content in FLAG_OF else None
        return implied if flag is None else flag


@dataclass(frozen=True, eq=False)
class MeasuredBatch:
    """The arrays behind one measurement.

    Args:
        rollout: the E-batch, ``[N, T]``.
        base: its statistics at θ, ``[N, T]``.
        shifted: by η, the statistics of the same tokens at θ+ηv.
        changes: by η, ΔH(η); the same η as in ``shifted``.
        first_order: ⟨∇H, v⟩, per unit η.
        tangent: (ṡ, ḣ) per unit η, ``[N, T]``, if they are at hand.
        clusters: prompt of each sequence, ``[N]``; None: no prompt repeats.
        prompts: text of every sequence's prompt, N of them.
        completions: text of every completion, N of them.

    Raises:
        ValueError: if these are not of one batch and one sweep.
    """

    rollout: Rollout
    base: TokenStats
    shifted: Mapping[float, TokenStats]
    changes: Mapping[float, EntropyChange]
    first_order: EntropyChange
    tangent: TokenStats | None = None
    clusters: Tensor | None = None
    prompts: Sequence[str] | None = None
    completions: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if set(self.shifted) != set(self.changes):
            raise ValueError(
                f"expected shifted and changes at the same η, got {sorted(self.shifted)} and {sorted(self.changes)}"
            )
        shape = self.rollout.completion_ids.shape
        for name, stats in self.stats().items():
            if stats.logp.shape != shape:
                raise ValueError(
                    f"expected {name} of the rollout's shape [N, T] = {list(shape)}, got {list(stats.logp.shape)}"
                )
        per_sequence = {
            **{f"the influences of {name}": change.influence for name, change in self.estimates().items()},
            **{name: getattr(self, name) for name in ("clusters", "prompts", "completions")},
        }
        for name, values in per_sequence.items():
            if values is not None and len(values) != len(self.rollout):
                raise ValueError(f"expected {name} for {len(self.rollout)} sequences, got {len(values)}")

    @property
    def etas(self) -> list[float]:
        """The step sizes of the sweep, ascending."""
        return sorted(self.changes)

    def stats(self) -> dict[str, TokenStats]:
        """Every array of statistics by name: ``base``, ``tangent`` if there is one, ``shifted/<η>``."""
        tangent = {} if self.tangent is None else {"tangent": self.tangent}
        return {"base": self.base, **tangent, **{f"shifted/{eta!r}": self.shifted[eta] for eta in sorted(self.shifted)}}

    def estimates(self) -> dict[str, EntropyChange]:
        """Every estimate by name: ``first_order``, ``change/<η>``."""
        return {"first_order": self.first_order, **{f"change/{eta!r}": self.changes[eta] for eta in self.etas}}


def config_hash(config: Mapping[str, Any]) -> str:
    """Sixteen hexadecimal digits that equal configs share, whatever the order of their keys.

    Args:
        config: nested mappings, lists and plain values.

    Raises:
        TypeError: if it holds something that JSON has no form for.
    """
    return hashlib.sha256(to_json(config, sort_keys=True).encode()).hexdigest()[:16]


def summary_record(batch: MeasuredBatch, *, config: Mapping[str, Any], seconds: float) -> Record:
    """What the level ``minimal`` keeps of a measurement: the sweep's values without their error bars.

    Args:
        batch: what was measured.
        config: what it was measured under; its hash is recorded.
        seconds: wall time of the whole measurement.
    """
    return {
        "config_hash": config_hash(config),
        "sweep": [
            {
                "eta": eta,
                "deltaH_true": batch.changes[eta].value,
                "deltaH_approx": batch.first_order.scaled(eta).value,
            }
            for eta in batch.etas
        ],
        "timing": {"total": seconds},
    }


def sequence_records(batch: MeasuredBatch, *, texts: bool = True) -> Iterator[Record]:
    """One record per sequence of the E-batch, in its order.

    Args:
        batch: what was measured.
        texts: whether prompt and completion are among the keys.
    """
    columns: dict[str, Sequence[Any]] = {
        "index": range(len(batch.rollout)),
        "cluster": range(len(batch.rollout)) if batch.clusters is None else batch.clusters.tolist(),
        "n_prompt_tokens": batch.rollout.prompt_lengths.tolist(),
        "n_tokens": batch.rollout.completion_lengths.tolist(),
        "logp": batch.base.logp.sum(1).tolist(),
        "entropy": batch.base.entropy.sum(1).tolist(),
        "first_order_influence": batch.first_order.influence.tolist(),
        "sweep": list(zip(*(_per_sequence(batch, eta) for eta in batch.etas), strict=True))
        or [()] * len(batch.rollout),
    }
    if texts:
        nothing = [None] * len(batch.rollout)
        columns |= {"prompt": batch.prompts or nothing, "completion": batch.completions or nothing}
    return _rows(columns)


def token_records(batch: MeasuredBatch) -> Iterator[Record]:
    """One record per sequence of the E-batch, in its order, with one number per completion token under every key.

    Args:
        batch: what was measured.
    """
    mask = batch.rollout.completion_mask.cpu()

    def of_tokens(values: Tensor) -> list[list[float]]:
        values = values.cpu()
        return [row[real].tolist() for row, real in zip(values, mask, strict=True)]

    nothing = [None] * len(mask)
    return _rows(
        {
            "index": range(len(mask)),
            "token_id": of_tokens(batch.rollout.completion_ids),
            "logp": of_tokens(batch.base.logp),
            "entropy": of_tokens(batch.base.entropy),
            "logp_dot": nothing if batch.tangent is None else of_tokens(batch.tangent.logp),
            "entropy_dot": nothing if batch.tangent is None else of_tokens(batch.tangent.entropy),
        }
    )


def raw_tensors(batch: MeasuredBatch) -> dict[str, Tensor]:
    """Every array of the measurement by name.

    Args:
        batch: what was measured.

    Returns:
        ``rollout/prompt_ids``, ``rollout/prompt_mask`` ``[N, P]``, ``rollout/completion_ids``,
        ``rollout/completion_mask`` ``[N, T]``; ``base/logp``, ``base/entropy`` and the same under ``tangent`` and
        ``shifted/<η>``, ``[N, T]``; ``first_order/influence`` and ``change/<η>/influence``, ``[N]``; ``clusters``
        ``[N]``, where prompts repeat. η is written as Python's ``repr`` writes it. Units as in the records.
    """
    return {
        **{f"rollout/{name}": values for name, values in vars(batch.rollout).items()},
        **{f"{name}/logp": stats.logp for name, stats in batch.stats().items()},
        **{f"{name}/entropy": stats.entropy for name, stats in batch.stats().items()},
        **{f"{name}/influence": change.influence for name, change in batch.estimates().items()},
        **({} if batch.clusters is None else {"clusters": batch.clusters}),
    }


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
        temporary = _companion(self.path, self.run_id, ".safetensors.tmp")
        try:
            save_file(own, temporary, metadata={"schema": str(SCHEMA), "run_id": self.run_id})
            shutil.copymode(self.path, temporary)  # safetensors makes a file that its owner alone can read
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, self.tensors_path)
        except Exception as error:  # safetensors has an exception of its own for a full disk
            temporary.unlink(missing_ok=True)
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


def _per_sequence(batch: MeasuredBatch, eta: float) -> list[Record]:
    """What one step size of the sweep says of every sequence."""
    shifted = batch.shifted[eta]
    columns = {
        "log_weight": (shifted.logp - batch.base.logp).sum(1).tolist(),
        "entropy": shifted.entropy.sum(1).tolist(),
        "influence": batch.changes[eta].influence.tolist(),
    }
    return [{"eta": eta, **row} for row in _rows(columns)]


def _rows(columns: Mapping[str, Sequence[Any]]) -> Iterator[Record]:
    """Columns of one length, row by row."""
    return (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))


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
