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

These functions take arrays and touch no file; :class:`~entropy_pl.reporting.detailed_log.DetailedLog` does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from entropy_pl.estimators import EntropyChange
from entropy_pl.records import Json, to_json
from entropy_pl.rollout import Rollout, TokenStats

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

    Returns:
        The digits.

    Raises:
        TypeError: if it holds something that JSON has no form for.
    """
    return hashlib.sha256(to_json(config, sort_keys=True).encode()).hexdigest()[:16]


def summary_record(batch: MeasuredBatch, *, config: Mapping[str, Any], seconds: float) -> Json:
    """What the level ``minimal`` keeps of a measurement: the sweep's values without their error bars.

    Args:
        batch: what was measured.
        config: what it was measured under; its hash is recorded.
        seconds: wall time of the whole measurement.

    Returns:
        A record without ``schema`` and ``kind``, which the log adds.
    """
    return {
        "config_hash": config_hash(config),
        "sweep": [
            {
                "eta": eta,
                "deltaH_true": batch.changes[eta].value,
                "deltaH_approx": (eta * batch.first_order).value,
            }
            for eta in batch.etas
        ],
        "timing": {"total": seconds},
    }


def sequence_records(batch: MeasuredBatch, *, texts: bool = True) -> Iterator[Json]:
    """One record per sequence of the E-batch, in its order.

    Args:
        batch: what was measured.
        texts: whether prompt and completion are among the keys.

    Returns:
        The records, made one by one.
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


def token_records(batch: MeasuredBatch) -> Iterator[Json]:
    """One record per sequence of the E-batch, in its order, with one number per completion token under every key.

    Args:
        batch: what was measured.

    Returns:
        The records, made one by one.
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
        **{f"rollout/{name}": values for name, values in batch.rollout.tensors.items()},
        **{f"{name}/logp": stats.logp for name, stats in batch.stats().items()},
        **{f"{name}/entropy": stats.entropy for name, stats in batch.stats().items()},
        **{f"{name}/influence": change.influence for name, change in batch.estimates().items()},
        **({} if batch.clusters is None else {"clusters": batch.clusters}),
    }


def _per_sequence(batch: MeasuredBatch, eta: float) -> list[Json]:
    """What one step size of the sweep says of every sequence."""
    shifted = batch.shifted[eta]
    columns = {
        "log_weight": (shifted.logp - batch.base.logp).sum(1).tolist(),
        "entropy": shifted.entropy.sum(1).tolist(),
        "influence": batch.changes[eta].influence.tolist(),
    }
    return [{"eta": eta, **row} for row in _rows(columns)]


def _rows(columns: Mapping[str, Sequence[Any]]) -> Iterator[Json]:
    """Columns of one length, row by row."""
    return (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
