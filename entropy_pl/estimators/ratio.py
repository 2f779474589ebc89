"""The quotient of two estimates of one batch, such as ΔH/ΔJ or η*, and the set of quotients that the data allow."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from entropy_pl.estimators.estimate import EntropyChange, check_same_sequences, covariance, student_t


@dataclass(frozen=True)
class FiellerSet:
    """The quotients ρ = a/b that two noisy estimates do not exclude: an interval, or all of the line but one.

    Args:
        low: the smaller of the set's two ends; −∞ for the whole line.
        high: the larger one; +∞ for the whole line.
        outside: whether the set is what lies outside of (low, high): the denominator is not told from zero.
    """

    low: float
    high: float
    outside: bool = False

    def __contains__(self, quotient: float) -> bool:
        if self.outside:
            return quotient <= self.low or quotient >= self.high
        return self.low <= quotient <= self.high

    @property
    def bounded(self) -> bool:
        """Whether it is an interval of finite length."""
        return not self.outside and math.isfinite(self.high - self.low)

    def magnitudes(self) -> tuple[float, float]:
        """The smallest interval that holds the absolute values of the set; its upper end may be infinite."""
        ends = abs(self.low), abs(self.high)
        return 0.0 if 0.0 in self else min(ends), max(ends) if self.bounded else math.inf


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


def fieller_set(numerator: EntropyChange, denominator: EntropyChange) -> FiellerSet:
    """Every quotient that is compatible with both estimates at their confidence, the noise that they share included.

    With V their covariances, clustered, and t Student's with clusters − 1 degrees of freedom, it holds every ρ for
    which a − ρb is within t standard errors of zero:

        (a − ρb)² ≤ t² (V_aa − 2ρ V_ab + ρ² V_bb).

    That is the interval between the roots where b² > t² V_bb; else what lies outside of them, or the whole line where
    there are none. It holds the true quotient as often as a − ρb's own interval holds zero, however noisy b is.

    Args:
        numerator: a.
        denominator: b, of the same sequences in the same order.

    Returns:
        The set, in the unit of a per unit of b.

    Source:
        Fieller 1954; docs/theory.md, §5 and §11.

    Raises:
        ValueError: for estimates of different batches.
    """
    check_same_sequences([numerator, denominator])
    a, b = numerator.value, denominator.value
    v, count = covariance(torch.stack([numerator.influence, denominator.influence]), numerator.clusters)
    t_square = student_t(numerator.confidence, count) ** 2
    # From the standard errors: they may hold a variance that the influences do not (that of a fitted critic).
    square = b**2 - t_square * denominator.stderr**2  # ρ² square − 2ρ middle + constant ≤ 0
    middle, constant = a * b - t_square * float(v[0, 1]), a**2 - t_square * numerator.stderr**2
    discriminant = middle**2 - square * constant
    if square > 0:
        # Never negative but by rounding: a/b itself is in the set.
        reach = math.sqrt(max(discriminant, 0.0))
        return FiellerSet((middle - reach) / square, (middle + reach) / square)
    if square == 0 or not discriminant > 0:
        return FiellerSet(-math.inf, math.inf)
    reach = math.sqrt(discriminant)
    return FiellerSet((middle + reach) / square, (middle - reach) / square, outside=True)


def ratio(numerator: EntropyChange, denominator: EntropyChange) -> Ratio:
    """a/b with its error bars: Fieller's interval (:func:`fieller_set`) and the delta method's standard error.

    The latter is that of the influences (ψ_a − (a/b) ψ_b)/b.

    Args:
        numerator: a.
        denominator: b, of the same sequences in the same order.

    Returns:
        The quotient, in the unit of a per unit of b: nats per unit of reward, for ΔH/ΔJ.

    Source:
        docs/theory.md, §11, "Reward"; the interval after Fieller 1954.

    Raises:
        ValueError: for estimates of different batches.
    """
    found = fieller_set(numerator, denominator)
    a, b = numerator.value, denominator.value
    value = a / b if b else math.nan
    stderr = (numerator - value * denominator).stderr / abs(b) if b else math.nan
    if not found.bounded:
        return Ratio(value, stderr, None, None, bounded=False)
    return Ratio(value, stderr, found.low, found.high, bounded=True)


def eta_star(first: EntropyChange, second: EntropyChange) -> tuple[float | None, float | None, float | None]:
    """The step size η* = ``2|a|/|b|`` at which first and second order are equal in size, with its interval.

    The curvature b is often not told from zero, so a symmetric ± says nothing: the interval is twice the absolute
    values of the quotients that :func:`fieller_set` allows. It covers at least as often as that set does. Its upper end
    may be infinite, and then the lower end is what is known.

    Args:
        first: a, the slope per unit η.
        second: b, the curvature per unit η², of the same sequences in the same order.

    Returns:
        η*, in the unit of η, None without curvature and NaN where an order is withheld; the lower end of its interval;
        and the upper end, None where it is unbounded.

    Source:
        docs/theory.md, §5.

    Raises:
        ValueError: for estimates of different batches.
    """
    if first.withheld or second.withheld:
        return math.nan, None, None
    low, high = (2 * end for end in fieller_set(first, second).magnitudes())
    value = 2 * abs(first.value / second.value) if second.value else None
    return value, low, high if math.isfinite(high) else None
