"""The quotient of two estimates of one batch, such as the exchange rate ΔH/ΔJ, and an interval that may be infinite."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from entropy_pl.estimators.estimate import EntropyChange, check_same_sequences, covariance, student_t
from entropy_pl.estimators.snis import Clusters


@dataclass(frozen=True)
class Ratio:
    """A quotient of two estimates.

    Args:
        value: numerator / denominator, in the unit of one per unit of the other; NaN for a denominator of 0.
        stderr: by the delta method; good where the denominator is many standard errors from zero.
        ci_low: lower end of Fieller's interval; None where it is unbounded.
        ci_high: upper end; likewise.
        bounded: whether the denominator is distinguishable from zero at this confidence. Where it is not, the quotients
            that the data do not exclude reach to infinity.
    """

    value: float
    stderr: float
    ci_low: float | None
    ci_high: float | None
    bounded: bool

    def to_dict(self) -> dict[str, Any]:
        """Every field as a plain number, None where it is not finite."""
        return {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in asdict(self).items()}


def ratio(
    numerator: EntropyChange, denominator: EntropyChange, *, clusters: Clusters = None, confidence: float = 0.95
) -> Ratio:
    """a/b with its error bars, the noise that a and b share included.

    With V the influences' covariances, clustered, and t Student's with clusters − 1 degrees of freedom, Fieller's
    interval (1954) holds every ρ for which a − ρb is within t standard errors of zero:

        (a − ρb)² ≤ t² (V_aa − 2ρ V_ab + ρ² V_bb),

    an interval between the roots where b² > t² V_bb, and unbounded otherwise. The delta method's standard error is
    that of the influences (ψ_a − (a/b) ψ_b)/b.

    Args:
        numerator: a.
        denominator: b, of the same sequences in the same order.
        clusters: prompt of each sequence, ``[N]``, where prompts repeat.
        confidence: of the interval.

    Returns:
        The quotient, in the unit of a per unit of b: nats per unit of reward, for ΔH/ΔJ.

    Source:
        docs/theory.md, §11, "Reward"; the interval after Fieller 1954.

    Raises:
        ValueError: for estimates of different batches, a confidence outside (0, 1), or fewer than two clusters.
    """
    check_same_sequences([numerator, denominator])
    a, b = numerator.value, denominator.value
    v, count = covariance(torch.stack([numerator.influence, denominator.influence]), clusters)
    t_square = student_t(confidence, count) ** 2
    value = a / b if b else math.nan
    # max: rounding may take the variance of a difference that cancels below zero
    variance = float(v[0, 0] - 2 * value * v[0, 1] + value**2 * v[1, 1])
    stderr = math.sqrt(max(variance, 0.0)) / abs(b) if b else math.nan
    square = float(b**2 - t_square * v[1, 1])  # ρ² square − 2ρ middle + constant ≤ 0
    if not square > 0:
        return Ratio(value, stderr, None, None, bounded=False)
    middle, constant = float(a * b - t_square * v[0, 1]), float(a**2 - t_square * v[0, 0])
    reach = math.sqrt(max(middle**2 - square * constant, 0.0))
    return Ratio(value, stderr, (middle - reach) / square, (middle + reach) / square, bounded=True)
