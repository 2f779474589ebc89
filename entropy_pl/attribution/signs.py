"""The U-batch's tokens by the sign of their advantage."""

from __future__ import annotations

from typing import Any

POSITIVE, NEGATIVE, ZERO = "positive_advantage", "negative_advantage", "zero_advantage"


def by_sign(advantages: Any) -> dict[str, Any]:
    """Which advantages are above, below and of zero (NaN included), by name.

    Args:
        advantages: a tensor or an array of any shape.

    Returns:
        For each name a tensor or an array of truth values, of the same kind and shape.
    """
    positive, negative = advantages > 0, advantages < 0
    return {POSITIVE: positive, NEGATIVE: negative, ZERO: ~(positive | negative)}
