"""Estimates made of other estimates of the same batch: what they share in noise cancels."""

from __future__ import annotations

import math

from entropy_pl.estimators.estimate import EntropyChange, linear_combination


def low_variance_delta_entropy(
    true: EntropyChange, matched: EntropyChange, low: EntropyChange, eta: float
) -> EntropyChange:
    """ΔH(η) with its first order exchanged for a less noisy one: ΔH(η) − η·δH₁(matched) + η·δH₁(low variance).

    ΔH(η) and the matched δH₁ share their noise, so what stays of it is the curvature's.
    No further model pass; unbiased as far as both first orders are.

    Args:
        true: ΔH(η), nats.
        matched: first order per unit η with no baseline, and the options ``true`` was made with.
        low: first order per unit η with a baseline.
        eta: η.

    Returns:
        ΔH(η) in nats; the health of the weights is ``true``'s, derivatives having none.

    Source:
        docs/theory.md, §9.

    Raises:
        ValueError: for estimates of different batches, as :func:`entropy_pl.estimators.linear_combination`.
    """
    return linear_combination([(1.0, true), (-eta, matched), (eta, low)])


def symmetric_difference(plus: EntropyChange, minus: EntropyChange, eta: float) -> tuple[EntropyChange, EntropyChange]:
    """Slope and curvature of the true change, from one step forward and one back.

    Args:
        plus: ΔH(η), nats.
        minus: ΔH(−η), nats, of the same batch.
        eta: η > 0.

    Returns:
        The odd part [ΔH(η) − ΔH(−η)]/2η = ⟨∇H, v⟩ + O(η²), per unit η, and the even part
        [ΔH(η) + ΔH(−η)]/η² = v'∇²H v + O(η²), per unit η².

    Source:
        docs/theory.md, §7.

    Raises:
        ValueError: for η that is not positive and finite, or estimates of different batches.
    """
    if not (eta > 0 and math.isfinite(eta)):
        raise ValueError(f"expected a finite eta > 0, that of the step forward, got {eta}")
    odd = [(0.5 / eta, plus), (-0.5 / eta, minus)]
    even = [(1 / eta**2, plus), (1 / eta**2, minus)]
    return linear_combination(odd), linear_combination(even)
