"""Curves through ΔH over η: how it scales, and with what slope it leaves zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class PowerLaw:
    """ΔH ≈ coefficient · η^slope.

    Args:
        slope: exponent; 1 in the linear regime.
        intercept: log₁₀ of ``|coefficient|``.
        r_squared: squared correlation of ``log₁₀ |ΔH|`` and log₁₀ η.
        n_points: points the line went through.
        coefficient: 10^intercept with ΔH's sign, nats per unit η^slope.
        n_left_out: points that have no place on it: zero, not finite, η ≤ 0, or of the other sign.
    """

    slope: float
    intercept: float
    r_squared: float
    n_points: int
    coefficient: float
    n_left_out: int = 0


def fit_power_law(etas: Sequence[float], changes: Sequence[float]) -> PowerLaw | None:
    """The straight line through ``log₁₀ |ΔH|`` over log₁₀ η, by least squares.

    A power law has one sign: the one most changes at η > 0 have (a tie: that of the smallest η). Points of the other
    sign, zeros, numbers that are not finite and η ≤ 0 are left out, and counted in ``n_left_out``: a count above
    zero says that noise or curvature turns the sign within the range, and the slope describes what is left.

    Args:
        etas: η.
        changes: ΔH(η), nats.

    Returns:
        The fit; None where fewer than 3 different η are left.

    Source:
        docs/theory.md, §7.

    Raises:
        ValueError: if ``etas`` and ``changes`` differ in length.

    Example:
        >>> round(fit_power_law([1e-4, 1e-3, 1e-2], [-3e-4, -3e-3, -3e-2]).slope, 9)
        1.0
    """
    eta, change, kept = _positive(etas, changes)
    eta, change = eta[kept & (change != 0)], change[kept & (change != 0)]
    if not len(eta):
        return None
    sign = np.sign(np.sign(change).sum()) or np.sign(change[eta.argmin()])
    eta, change = eta[np.sign(change) == sign], change[np.sign(change) == sign]
    if len(np.unique(eta)) < 3:
        return None
    line = stats.linregress(np.log10(eta), np.log10(np.abs(change)))
    return PowerLaw(
        slope=float(line.slope),
        intercept=float(line.intercept),
        r_squared=float(line.rvalue**2),
        n_points=len(eta),
        coefficient=float(sign * 10.0**line.intercept),
        n_left_out=len(etas) - len(eta),
    )


def linear_coefficient(
    etas: Sequence[float], changes: Sequence[float], weights: Sequence[float] | None = None
) -> float:
    """The measured slope of ΔH at η = 0: a of the least squares ΔH/η = a + bη, to be compared with δH₁ per unit η.

    b takes up the curvature v'∇²H v / 2, which would bias the mean of ΔH/η. Points with η ≤ 0 or numbers that are not
    finite are left out.

    Args:
        etas: η.
        changes: ΔH(η), nats.
        weights: of the squared residuals, such as 1/variance of ΔH/η; None: all one.

    Returns:
        a, nats per unit η.

    Source:
        docs/theory.md, §7.

    Raises:
        ValueError: for lengths that differ, weights that are not positive, or fewer than 2 different η > 0.
    """
    eta, change, kept = _positive(etas, changes)
    weight = np.ones(len(eta)) if weights is None else np.asarray(weights, dtype=np.float64)
    if weight.shape != eta.shape or not (weight > 0).all():
        raise ValueError(f"expected {len(eta)} positive weights, one per eta, got {weights}")
    eta, change, root = eta[kept], change[kept], np.sqrt(weight[kept])
    if len(np.unique(eta)) < 2:
        raise ValueError(
            f"expected at least 2 different eta > 0, to tell slope from curvature, got {np.unique(eta).tolist()}"
        )
    design = np.stack([np.ones(len(eta)), eta / eta.max()], 1)  # in units of the largest η, for conditioning
    solution = np.linalg.lstsq(design * root[:, None], change / eta * root, rcond=None)[0]
    return float(solution[0])


def _positive(etas: Sequence[float], changes: Sequence[float]) -> tuple[Floats, Floats, npt.NDArray[np.bool_]]:
    """Both as arrays, and which points have a finite η > 0 and a finite ΔH."""
    eta, change = np.asarray(etas, dtype=np.float64), np.asarray(changes, dtype=np.float64)
    if eta.shape != change.shape or eta.ndim != 1:
        raise ValueError(f"expected one change per eta, got {len(changes)} changes and {len(etas)} etas")
    return eta, change, np.isfinite(eta) & np.isfinite(change) & (eta > 0)
