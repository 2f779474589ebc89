"""Records: one JSON line each, written so that a killed run loses nothing it had measured.

A *record* is a JSON-able dict. Every probe's record has ``schema``, ``kind`` (``"probe"``), ``status`` (``"ok"``,
``"no_movement"``, ``"skipped"`` or ``"failed"``), ``message``, ``step`` (the optimizer step, from 0) and ``lr``; one
that was measured has the rest:

* ``entropy``, ``first_order`` (per unit η), ``second_order`` (per unit η², or None): estimates, each with ``value``,
  ``stderr``, ``ci_low``, ``ci_high``, ``ess``, ``n_sequences`` and so on, in nats, and ``trustworthy``: false where
  the importance weights behind it have collapsed (:attr:`entropy_pl.estimators.EntropyChange.trustworthy`);
* ``sweep``: a list of ``{"eta", "taken", "true": estimate, "first_order": estimate, already multiplied by eta}``;
  the point with ``"taken": true`` is the step the optimizer really made;
* ``untrustworthy_from``: the smallest |η| of the sweep whose ``true`` is not trustworthy, null where there is none;
  ``message`` then says what to do, and ``status`` stays ``"ok"``;
* ``eta_star``, ``update_norm``, ``reward``, ``normalize``, and whatever else its writer found worth keeping.

Where attribution, rewards, predictors or counterfactual losses were asked for, a record has these as well:

* ``attribution``, in nats of the step taken: ``momentum``, ``weight_decay``, ``gradient``, ``tokens`` and
  ``remainder_sum``, each ``{"value", "stderr", "stderr_jackknife", "ci_low", "ci_high"}``, errors over E; ``tokens``
  and the same of every sign of the advantage in ``by_sign`` with ``stderr_u`` and ``stderr_u_jackknife`` too, errors
  over the prompts of the U-batch (``over_u`` has their number, and why there are none); ``remainder``, what of
  ``remainder_sum`` is what, ``{name: value}``; ``total``, momentum, weight decay and tokens together; ``first_order``,
  the δH₁ of the step taken, which is ``total`` and the remainders together. And of the tokens ``tokens_by_sign``,
  ``by_decile`` and ``top_tokens`` (:meth:`.AttributedTokens.summary`);
* ``predictors``: ``{name: {"pearson", "spearman", "sign_agreement", "step_pearson", "step_spearman", ...}}``, how well
  each follows the attributed changes token by token, and ΔH step by step; of some with ``_stderr``, ``_ci_low`` and
  ``_ci_high``; and ``step``, what it predicts of the step per unit η;
* ``expected_reward``, an estimate of J; and in every point of ``sweep`` ``reward_true`` and ``reward_first_order``,
  estimates of ΔJ(η) and of δJ₁(η), the latter already multiplied by eta;
* ``exchange_rate``: ΔH/ΔJ of the step taken, ``{"value", "stderr", "ci_low", "ci_high", "bounded"}``, in nats per unit
  reward; ``bounded`` false: ΔJ is not told from zero, and the interval has no bounds;
* ``counterfactuals``: ``{loss: {"true", "difference", "reward_true", "reward_difference"}}``, estimates of ΔH and ΔJ
  had the step been made by that loss, and of both minus those of the step taken;
* ``absent``: which of these were asked for and are not there, and why, ``{name: reason}``.

A probe within a run also has ``e_prompts`` (how many, a hash of their texts, and how many of them the run trains on),
``processes`` (that shared the E-batch), ``memory`` (bytes beside the run's), ``seconds`` per phase and ``overhead``:
the seconds of all probes so far over those that the run has spent otherwise, since the first step that was probed in
this process. ``sampler_gap`` is the mean |log-prob as generated − as scored| of a few sequences, in nats a token, as
measured last; null where nothing was compared.

Files are strict JSON: a number that is not finite is written as null, since ``NaN`` is not JSON and most readers
refuse it. A file whose name ends in ``.gz`` is compressed, every record a gzip member of its own: ``zcat`` reads it,
and a file cut short still yields every member that is whole.
"""

from __future__ import annotations

import errno
import gzip
import json
import math
import os
import warnings
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from numbers import Real
from pathlib import Path
from typing import Any

from entropy_pl.reporting.older_records import from_schema_1
from entropy_pl.reporting.record_shape import check_shape

SCHEMA = 2
"""Version of the record format, written as ``schema``: 2 since the attribution is in nats of the step taken."""

Record = dict[str, Any]
"""What a probe or a measurement leaves behind, JSON-able; its keys are this module's subject."""

GZIP_MAGIC = b"\x1f\x8b\x08"  # how every gzip member begins
CHUNK = 1 << 16  # bytes decompressed at a time: what lies behind a member's end is copied once per member


class RecordWriter:
    """Appends records to a file of JSON lines.

    Each record is one write of a full line, on disk (fsync) when :meth:`write` returns. A write that fails leaves the
    file as it was, so that it can be tried again. What a killed run left unfinished stays as it is, and the next record
    starts on a line, or a gzip member, of its own: :func:`read_records` goes on behind the gap, where ``zcat`` stops.
    Nothing is kept open in between.

    Args:
        path: the file to append to, compressed if its name ends in ``.gz``; it and its folders are made when first
            written to.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record.

        Args:
            record: what to write; NumPy and torch numbers and arrays become plain ones, numbers that are not finite
                become null.

        Raises:
            TypeError: if the record is not a mapping, or holds something that JSON has no form for.
            OSError: if the line could not be written in full; what was written of it is taken back.
        """
        if not isinstance(record, Mapping):
            raise TypeError(f"expected a record (a mapping), got {type(record).__name__}")
        line = to_json(record).encode() + b"\n"
        if _compressed(self.path):
            line = gzip.compress(line, compresslevel=6, mtime=0)  # no clock: the same records give the same file
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a+b", buffering=0) as file:  # unbuffered: one system call per line
            end = file.seek(0, os.SEEK_END)
            if not _compressed(self.path) and end:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    line = b"\n" + line
            try:
                written = file.write(line)
                os.fsync(file.fileno())
                if written != len(line):
                    raise OSError(errno.ENOSPC, f"expected to write {len(line)} bytes, wrote {written}: disk full?")
            except BaseException as error:  # an interrupt as well: it is tried again, and would then stand there twice
                with suppress(OSError):
                    file.truncate(end)
                if isinstance(error, OSError):  # which, of an open file, does not say its name
                    raise OSError(error.errno, error.strerror, str(self.path)) from error
                raise


def read_records(path: str | os.PathLike[str]) -> list[Record]:
    """The records of a file, in the order they were written.

    Lines that are no record (unfinished, not JSON, of a schema that this version does not know, with something else
    under a record's keys) are left out, with a warning that names them; so are the bytes of a ``.gz`` file that belong
    to no whole gzip member. Records of schema 1 are converted to this version's
    (:mod:`entropy_pl.reporting.older_records`).

    Args:
        path: a file written by :class:`RecordWriter`.

    Returns:
        One dict per good line; empty for an empty file.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"expected a file of records (JSON lines), got {path}, which is not a file")
    data = path.read_bytes()
    if _compressed(path):
        size, (data, lost) = len(data), _whole_members(data)
        if lost:
            warnings.warn(f"{path}: {lost} of {size} bytes are in no whole gzip member and were left out", stacklevel=2)
    records = []
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            records.append(_parse(line))
        except ValueError as error:
            warnings.warn(f"{path}, line {number} is not a record and was left out: {error}", stacklevel=2)
    return records


def to_json(record: Mapping[str, Any], *, sort_keys: bool = False) -> str:
    """A record as strict JSON on one line.

    Args:
        record: as :meth:`RecordWriter.write` takes it.
        sort_keys: whether keys are sorted, so that equal records give equal text whatever their order.

    Raises:
        TypeError: if the record holds something that JSON has no form for.
    """
    return json.dumps(plain(record), allow_nan=False, sort_keys=sort_keys)


def plain(record: Mapping[str, Any]) -> Record:
    """A record in JSON's own types: numbers and arrays of other libraries as Python's, not finite ones as None.

    Raises:
        TypeError: if the record holds something that JSON has no form for.
    """
    converted: Record = _plain(record, "record")
    return converted


def latest_per_step(records: Sequence[Mapping[str, Any]]) -> list[Record]:
    """The probes of the run as it finally went: one record per step, by step.

    A run resumed from an earlier checkpoint probes steps again, and what followed them the first time belongs to a
    trajectory that was given up. So a record replaces every earlier one of its own step *and of later steps*.

    Args:
        records: records in the order they were written; those of another kind than ``"probe"`` are left out.

    Returns:
        The surviving records, steps strictly increasing.

    Raises:
        ValueError: if a probe's record has no integer ``step``.
    """
    kept: list[Record] = []
    for record in records:
        if record.get("kind", "probe") != "probe":
            continue
        step = record.get("step")
        if not isinstance(step, int):
            raise ValueError(f"expected every record to have an integer 'step', got {step!r}")
        while kept and kept[-1]["step"] >= step:
            kept.pop()
        kept.append(dict(record))
    return kept


def taken_point(record: Mapping[str, Any]) -> Record | None:
    """The sweep's point at the step the optimizer really made, or None where that was not measured.

    Args:
        record: one probe's record, or the results of an offline measurement.

    Returns:
        The entry of ``sweep`` with ``taken: true``.
    """
    if record.get("status", "ok") != "ok":
        return None
    return next((point for point in record.get("sweep") or () if point.get("taken")), None)


def number(mapping: Mapping[str, Any] | None, key: str) -> float:
    """``mapping[key]`` as a float; NaN where it is absent, None, not finite or larger than a float can be."""
    value = None if mapping is None else mapping.get(key)
    with suppress(OverflowError):
        return float(value) if isinstance(value, Real) and math.isfinite(value) else math.nan
    return math.nan


def _compressed(path: Path) -> bool:
    return path.suffix == ".gz"


def _whole_members(data: bytes) -> tuple[bytes, int]:
    """The text of every whole gzip member, and how many bytes are in none."""
    view = memoryview(data)
    texts: list[bytes] = []
    start = lost = 0
    while start < len(data):
        end, text = _member(view, start)
        if not end:  # cut short by a killed run; a later run may have gone on behind it
            end = data.find(GZIP_MAGIC, start + 1)
            end = len(data) if end < 0 else end
            lost += end - start
            text = b"\n"
        texts.append(text)
        start = end
    return b"".join(texts), lost


def _member(view: memoryview, start: int) -> tuple[int, bytes]:
    """Where the whole gzip member that begins at ``start`` ends, and its text; 0 where there is none."""
    reader = zlib.decompressobj(wbits=31)  # with gzip's header, and its checksum verified
    parts = []
    for at in range(start, len(view), CHUNK):
        chunk = view[at : at + CHUNK]
        try:
            parts.append(reader.decompress(chunk))
        except zlib.error:
            break
        if reader.eof:
            return at + len(chunk) - len(reader.unused_data), b"".join(parts)
    return 0, b""


def _parse(line: bytes) -> Record:
    try:
        record = json.loads(line.decode(), parse_constant=lambda token: None)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, got {type(record).__name__}")
    if b"\\ud" in line.lower():  # escapes of half a character, which no file or terminal takes: � in their place
        text = json.dumps(record, ensure_ascii=False).encode("utf-16", "surrogatepass")
        record = json.loads(text.decode("utf-16", "replace"))
    return current(record)


def current(record: Record) -> Record:
    """A record that was read, as this version writes it: one of schema 1 converted, one of another refused.

    Args:
        record: as JSON has it.

    Raises:
        ValueError: if it is of another schema, or has something else under a record's keys.
    """
    schema = record.get("schema", SCHEMA)
    if schema not in (1, SCHEMA):
        raise ValueError(f"expected schema {SCHEMA} or 1, got {schema!r}")
    check_shape(record)
    return record if schema == SCHEMA else from_schema_1(record)


def _plain(value: Any, where: str) -> Any:
    """``value`` in JSON's own types; ``where`` names it in the error."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # NumPy and torch, scalars and arrays alike
        return _plain(value.tolist(), where)
    raise TypeError(f"expected {where} to be JSON-able, got {type(value).__name__}")
