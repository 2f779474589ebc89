"""Quotients of estimates, against sums by hand, the definition of Fieller's interval, and how often it is right."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from samples import N, plus, ragged
from torch import Tensor

from entropy_pl.estimators import (
    EntropyChange,
    entropy_estimate,
    eta_star,
    fieller_set,
    linear_combination,
    ratio,
    snis_delta_entropy,
)
from entropy_pl.rollout import TokenStats

CLUSTERS = torch.arange(N) % 11


def mean_of(x: Tensor, confidence: float = 0.95) -> EntropyChange:
    """A plain mean as an estimate: one token per sequence, whose entropy is x."""
    column = x.double()[:, None]
    stats = TokenStats(0 * column, column, torch.ones_like(column))
    return entropy_estimate(stats, normalize="per_sequence", confidence=confidence)


def pair(**error_bar: Any) -> tuple[EntropyChange, EntropyChange]:
    """A change that is all noise, and one that stands out, of the same sequences."""
    base, change = ragged()
    return snis_delta_entropy(base, plus(base, change), **error_bar), entropy_estimate(base, **error_bar)


@pytest.mark.parametrize("clusters", [None, CLUSTERS])
def test_value_and_stderr_are_the_delta_method_in_loops(clusters):
    a, b = pair(clusters=clusters)
    labels = list(range(N)) if clusters is None else clusters.tolist()
    quotient, sums = a.value / b.value, {}
    for i, label in enumerate(labels):
        psi = (float(a.influence[i]) - quotient * float(b.influence[i])) / b.value
        sums[label] = sums.get(label, 0.0) + psi
    count = len(sums)
    found = ratio(a, b)
    assert found.value == pytest.approx(quotient, rel=1e-12)
    stderr = math.sqrt(count / (count - 1) * sum(x**2 for x in sums.values())) / N
    assert found.stderr == pytest.approx(stderr, rel=1e-10)


@pytest.mark.parametrize("clusters", [None, CLUSTERS])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_the_ends_are_where_the_difference_is_just_distinguishable_from_zero(clusters, confidence):
    """Fieller: ρ is excluded when the interval of a − ρb is clear of zero."""
    error_bar = {"clusters": clusters, "confidence": confidence}
    found = ratio(*pair(**error_bar))
    assert found.bounded
    assert found.ci_low < found.value < found.ci_high

    def clear_of_zero(rho: float) -> float:
        a, b = pair(**error_bar)
        difference = linear_combination([(1.0, a), (-rho, b)])
        return max(difference.ci_low, -difference.ci_high)  # positive: excluded

    width = found.ci_high - found.ci_low
    for end, outwards in ((found.ci_low, -1), (found.ci_high, 1)):
        assert clear_of_zero(end) == pytest.approx(0, abs=1e-12)
        assert clear_of_zero(end + outwards * 0.01 * width) > 0 > clear_of_zero(end - outwards * 0.01 * width)


def test_intervals_cover():
    """Correlated Gaussian means, N = 30, a denominator 8 standard errors from zero: 2,000 resamples, 92.5–97.5 %."""
    rng, covered, resamples = np.random.default_rng(0), 0, 2000
    cholesky = np.linalg.cholesky([[1.0, 0.6], [0.6, 2.0]])
    mean = np.array([0.4, 2.0])
    for _ in range(resamples):
        x, y = torch.from_numpy(rng.standard_normal((30, 2)) @ cholesky.T + mean).T
        found = ratio(mean_of(x), mean_of(y))
        assert found.bounded
        covered += found.ci_low <= mean[0] / mean[1] <= found.ci_high
    assert 0.925 <= covered / resamples <= 0.975


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_unbounded_is_a_denominator_whose_own_interval_holds_zero(confidence):
    x = torch.randn(40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = torch.randn(40, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    seen = set()
    for shift in (-2.0, -0.5, -0.2, -0.05, 0.0, 0.05, 0.2, 0.5, 2.0):
        denominator = mean_of(y + shift, confidence)
        found = ratio(mean_of(x, confidence), denominator)
        assert found.bounded == (denominator.ci_low > 0 or denominator.ci_high < 0)
        assert math.isfinite(found.value)
        assert found.stderr > 0
        assert (found.ci_low is None) == (found.ci_high is None) == (not found.bounded)
        seen.add(found.bounded)
    assert seen == {True, False}


@pytest.mark.parametrize(("a", "b"), [(2.0, 3.0), (2.0, 0.1), (0.02, 0.1), (-0.3, 0.4), (0.02, 3.0), (-2.0, -0.15)])
def test_the_set_holds_what_is_not_clear_of_zero(a, b):
    """ρ is in the set exactly where a − ρb has zero in its interval: an interval, its outside, or the whole line."""
    x, y = torch.randn(2, 40, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    top, bottom = mean_of(x + a), mean_of(y + 0.5 * x + b)
    found = fieller_set(top, bottom)
    for rho in np.concatenate([np.linspace(-60, 60, 1001), [-1e6, 1e6]]):
        difference = linear_combination([(1.0, top), (-float(rho), bottom)])
        assert (float(rho) in found) == (difference.ci_low <= 0 <= difference.ci_high)
    magnitudes = found.magnitudes()
    inside = [abs(rho) for rho in np.linspace(-60, 60, 1001) if rho in found]
    step = 120 / 1000  # of the grid
    assert magnitudes[0] == pytest.approx(min(inside), abs=step)
    assert found.bounded == math.isfinite(magnitudes[1]) == (bottom.ci_low > 0 or bottom.ci_high < 0)
    if found.bounded:
        assert magnitudes[1] == pytest.approx(max(inside), abs=step)


def test_eta_star_is_twice_the_magnitudes_of_the_quotient():
    x, y = torch.randn(2, 40, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    slope, curvature, flat = mean_of(x - 2), mean_of(y + 3), mean_of(y + 0.1)
    value, low, high = eta_star(slope, curvature)
    assert value == pytest.approx(2 * abs(slope.value / curvature.value))
    assert (low, high) == tuple(2 * end for end in fieller_set(slope, curvature).magnitudes())
    _, low, high = eta_star(slope, flat)
    assert low > 0
    assert high is None


def test_an_estimate_over_itself_is_one_exactly():
    found = ratio(pair()[1], pair()[1])
    # the roots of a square: half the digits
    assert (found.value, found.ci_low, found.ci_high) == (1, pytest.approx(1, abs=1e-7), pytest.approx(1, abs=1e-7))
    assert found.stderr == pytest.approx(0, abs=1e-8)


def test_a_denominator_of_zero_is_no_number_and_no_crash():
    nothing = mean_of(torch.zeros(N))
    found = ratio(pair()[0], nothing)
    assert math.isnan(found.value)
    assert found.to_dict() == {"value": None, "stderr": None, "ci_low": None, "ci_high": None, "bounded": False}


def test_plain_numbers():
    found = ratio(*pair())
    assert found.to_dict() == {
        "value": found.value,
        "stderr": found.stderr,
        "ci_low": found.ci_low,
        "ci_high": found.ci_high,
        "bounded": True,
    }


def test_what_cannot_be_divided_is_named():
    a, _ = pair()
    base, _ = ragged()
    with pytest.raises(ValueError, match=r"same sequences, got \[37, 20\]"):
        ratio(a, entropy_estimate(base.select(torch.arange(20))))
    with pytest.raises(ValueError, match="of the same prompts"):
        ratio(a, pair(clusters=CLUSTERS)[1])
