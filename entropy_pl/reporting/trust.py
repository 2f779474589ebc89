"""What of a record is not to be believed, and how tables and figures say so."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

UNTRUSTED = "not to be trusted: see the warnings"


def untrustworthy(estimate: Mapping[str, Any] | None) -> bool:
    """Whether the estimate says of itself that it must not be believed; False of records that do not say.

    Args:
        estimate: one of a record, such as ``true`` of a point of its sweep.
    """
    return (estimate or {}).get("trustworthy") is False


def any_untrustworthy(points: Iterable[Mapping[str, Any] | None]) -> bool:
    """Whether ΔH of any of these points of sweeps is not to be believed."""
    return any(untrustworthy((point or {}).get("true")) for point in points)


def warnings_by_text(records: Sequence[Mapping[str, Any]]) -> dict[str, list[int | None]]:
    """The warnings of all records, each once, with the steps that have it.

    Args:
        records: of a run's probes, or the one of a measurement.

    Returns:
        Sentence → steps in the order of the records, sentences in the order in which they came up.
    """
    found: dict[str, list[int | None]] = {}
    for record in records:
        for warning in record.get("warnings") or ():
            found.setdefault(str(warning), []).append(record.get("step"))
    return found
