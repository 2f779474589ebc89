"""What of a record is not to be believed, and how tables and figures say so."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from entropy_pl.records import PointRecord, Record

UNTRUSTED = "not to be trusted: see the warnings"


def any_untrustworthy(points: Iterable[PointRecord]) -> bool:
    """Return whether ΔH of any of these points of sweeps must not be believed."""
    return any(point.true.untrustworthy for point in points)


def warnings_by_text(records: Sequence[Record]) -> dict[str, list[int | None]]:
    """Return the warnings of all records, each once, with the steps that have it.

    Args:
        records: of a run's probes, or the one of a measurement.

    Returns:
        Sentence → steps in the order of the records, sentences in the order in which they came up.
    """
    found: dict[str, list[int | None]] = {}
    for record in records:
        for warning in record.warnings:
            found.setdefault(warning, []).append(record.step)
    return found
