"""Which estimates of a record are not to be believed, and how tables and figures say so."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

UNTRUSTED = "not to be trusted: ESS below half of N"


def untrustworthy(estimate: Mapping[str, Any] | None) -> bool:
    """Whether the estimate's importance weights had collapsed; False of records that do not say.

    Args:
        estimate: one of a record, such as ``true`` of a point of its sweep.
    """
    return (estimate or {}).get("trustworthy") is False


def any_untrustworthy(points: Iterable[Mapping[str, Any] | None]) -> bool:
    """Whether ΔH of any of these points of sweeps is not to be believed."""
    return any(untrustworthy((point or {}).get("true")) for point in points)
