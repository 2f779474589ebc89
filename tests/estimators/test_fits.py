"""Fits against exact laws and numpy.polyfit."""

from __future__ import annotations

import math

import numpy as np
import pytest

from entropy_pl.estimators import fit_power_law, linear_coefficient

ETAS = [1e-6, 1e-5, 1e-4, 1e-3]


@pytest.mark.parametrize(("coefficient", "exponent"), [(-3.0, 1.0), (0.2, 2.0), (-1e3, 1.5)])
def test_an_exact_power_law_is_found(coefficient, exponent):
    fit = fit_power_law(ETAS, [coefficient * eta**exponent for eta in ETAS])
    assert fit.slope == pytest.approx(exponent, rel=1e-12)
    assert fit.coefficient == pytest.approx(coefficient, rel=1e-10)
    assert fit.intercept == pytest.approx(math.log10(abs(coefficient)), abs=1e-11)
    assert fit.r_squared == pytest.approx(1, abs=1e-12)
    assert (fit.n_points, fit.n_left_out) == (4, 0)


def test_a_noisy_law_is_polyfit_of_logs():
    noise = np.random.default_rng(0).normal(size=4)
    changes = [-2 * eta * math.exp(0.3 * z) for eta, z in zip(ETAS, noise, strict=True)]
    x, y = np.log10(ETAS), np.log10(np.abs(changes))
    slope, intercept = np.polyfit(x, y, 1)
    fit = fit_power_law(ETAS, changes)
    assert (fit.slope, fit.intercept) == (pytest.approx(slope), pytest.approx(intercept))
    assert fit.r_squared == pytest.approx(np.corrcoef(x, y)[0, 1] ** 2)


def test_points_off_the_law_are_left_out_and_counted():
    law = [-3 * eta for eta in ETAS]
    strays = [(0.0, 0.0), (-1e-4, 3e-4), (1e-5, 0.0), (1e-7, 1e-9), (1e-2, math.nan)]
    fit = fit_power_law(ETAS + [eta for eta, _ in strays], law + [change for _, change in strays])
    assert (fit.slope, fit.coefficient) == (pytest.approx(1), pytest.approx(-3))
    assert (fit.n_points, fit.n_left_out) == (4, 5)


def test_a_tie_of_signs_goes_to_the_smallest_eta():
    fit = fit_power_law([1, 2, 4, 8, 16, 32], [-1, -2, -4, 8, 16, 32])
    assert (fit.coefficient, fit.n_left_out) == (pytest.approx(-1), 3)


@pytest.mark.parametrize(
    ("etas", "changes"),
    [([], []), ([1e-3, 1e-4], [1, 2]), ([-1, -2, -3], [1, 2, 3]), ([1, 2, 3], [0, 0, 0]), ([1, 1, 2], [1, 1, 2])],
)
def test_too_few_points_make_no_law(etas, changes):
    assert fit_power_law(etas, changes) is None


def test_the_slope_at_zero_is_not_bent_by_curvature():
    assert linear_coefficient(ETAS, [-14 * eta + 5e3 * eta**2 for eta in ETAS]) == pytest.approx(-14, rel=1e-12)


def test_the_slope_at_zero_is_polyfit_of_the_ratio():
    rng = np.random.default_rng(1)
    etas = np.array([1e-4, 2e-4, 5e-4, 1e-3])
    changes, weights = -14 * etas + 1e-4 * rng.normal(size=4), rng.uniform(0.1, 10, 4)
    strays = ([*etas, -1e-4, 0.0], [*changes, 5.0, 0.0])
    assert linear_coefficient(*strays) == pytest.approx(np.polyfit(etas, changes / etas, 1)[1], rel=1e-9)
    weighted = np.polyfit(etas, changes / etas, 1, w=np.sqrt(weights))[1]  # polyfit squares its weights
    assert linear_coefficient(*strays, weights=[*weights, 1.0, 1.0]) == pytest.approx(weighted, rel=1e-9)


def test_bad_points_are_named():
    with pytest.raises(ValueError, match="one change per eta, got 1 changes and 2 etas"):
        fit_power_law([1, 2], [1])
    with pytest.raises(ValueError, match=r"2 different eta > 0.* got \[0.5\]"):
        linear_coefficient([0.5, 0.5, -1], [1, 2, 3])
    with pytest.raises(ValueError, match="2 positive weights"):
        linear_coefficient([1, 2], [1, 2], weights=[1, 0])
