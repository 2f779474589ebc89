"""Which records count: the probes of a run as it finally went, and the step that the optimizer took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from entropy_pl.records.record import AnyRecord, Json, Record

GivenRecord = TypeVar("GivenRecord", bound="Record | Mapping[str, Any]")


def latest_per_step(records: Sequence[GivenRecord]) -> list[GivenRecord]:
    """Return the probes of the run as it finally went: one record per step, by step.

    A run resumed from an earlier checkpoint probes steps again, and what followed them the first time belongs to a
    trajectory that was given up. So a record replaces every earlier one of its own step *and of later steps*.

    Args:
        records: records in the order they were written, in either form; those of another kind than ``"probe"`` are left
            out.

    Returns:
        The surviving records, steps strictly increasing.

    Raises:
        ValueError: if a probe's record has no integer ``step``.
    """
    kept: list[tuple[int, GivenRecord]] = []
    for record in records:
        kind, step = _kind_and_step(record)
        if kind != "probe":
            continue
        if not isinstance(step, int):
            raise ValueError(f"expected every record to have an integer 'step', got {step!r}")
        while kept and kept[-1][0] >= step:
            kept.pop()
        kept.append((step, record))
    return [record for _, record in kept]


def probes_of(records: Sequence[AnyRecord]) -> list[Record]:
    """Return the probes of the run as it finally went (:func:`latest_per_step`), each as a :class:`Record`.

    Args:
        records: records in the order they were written, in either form.

    Returns:
        The surviving records, steps strictly increasing.

    Raises:
        ValueError: as :func:`latest_per_step` and :meth:`Record.from_json`.
    """
    return [Record.of(record) for record in latest_per_step(records)]


def _kind_and_step(record: AnyRecord) -> tuple[object, object]:
    if isinstance(record, Record):
        return record.kind, record.step
    return record.get("kind", "probe"), record.get("step")


def taken_point(record: Mapping[str, Any]) -> Json | None:
    """Return the sweep's point at the step the optimizer took, as JSON has it; None where that was not measured.

    Args:
        record: one probe's record as JSON has it, or the results of an offline measurement.

    Returns:
        The entry of ``sweep`` with ``taken: true``.
    """
    if record.get("status", "ok") != "ok":
        return None
    return next((point for point in record.get("sweep") or () if point.get("taken")), None)
