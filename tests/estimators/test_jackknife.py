"""The jackknife against closed forms, and against the influences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from samples import N, plus, ragged

from entropy_pl.estimators import jackknife_standard_error, snis_delta_entropy

X = np.random.default_rng(0).normal(size=60)


def mean(rows: torch.Tensor) -> float:
    return float(X[rows.numpy()].mean())


def test_of_a_mean_it_is_the_textbook_error():
    assert jackknife_standard_error(mean, 60) == pytest.approx(X.std(ddof=1) / math.sqrt(60), rel=1e-10)


@pytest.mark.parametrize("groups", [3, 20])
def test_equal_groups_of_a_mean_are_a_mean_of_group_means(groups):
    means = [X[j::groups].mean() for j in range(groups)]
    expected = np.std(means, ddof=1) / math.sqrt(groups)
    assert jackknife_standard_error(mean, 60, groups=groups) == pytest.approx(expected, rel=1e-10)


def test_clusters_of_a_mean_are_left_out_whole():
    clusters = torch.arange(60) // 4  # 15 clusters of 4
    expected = X.reshape(15, 4).mean(1).std(ddof=1) / math.sqrt(15)
    assert jackknife_standard_error(mean, 60, clusters=clusters) == pytest.approx(expected, rel=1e-10)
    by_three = [X.reshape(15, 4)[j::3].mean() for j in range(3)]
    expected = np.std(by_three, ddof=1) / math.sqrt(3)
    found = jackknife_standard_error(mean, 60, clusters=clusters, groups=3)
    assert found == pytest.approx(expected, rel=1e-10)


def test_unequal_groups_have_the_right_expectation():
    """E[SE²] = σ²/n for the mean of n = 11 in 4 groups of 3, 3, 3 and 2; equal weights would give 2 % more."""
    rng = np.random.default_rng(1)
    squares = []
    for _ in range(4000):
        x = rng.normal(size=11)
        squares.append(jackknife_standard_error(lambda rows, x=x: x[rows.numpy()].mean(), 11, groups=4) ** 2)
    z = (np.mean(squares) - 1 / 11) / (np.std(squares) / math.sqrt(len(squares)))
    assert abs(z) < 4


def test_unequal_groups_by_hand():
    """n = 3 in groups {0, 2} and {1}: Σ_j (m_j/n)·… of Busing et al. written out for a mean."""
    x = np.array([1.0, 2.0, 6.0])
    whole, without = x.mean(), (x[1], (x[0] + x[2]) / 2)
    h = (3 / 2, 3.0)
    pseudo = [h[j] * whole - (h[j] - 1) * without[j] for j in range(2)]
    centre = 2 * whole - sum((1 - 1 / h[j]) * without[j] for j in range(2))
    expected = math.sqrt(sum((pseudo[j] - centre) ** 2 / (h[j] - 1) for j in range(2)) / 2)
    assert jackknife_standard_error(lambda r: x[r.numpy()].mean(), 3, groups=2) == pytest.approx(expected)


def test_of_the_reducer_it_is_the_error_of_the_influences():
    """Prompts that repeat, all sequences of a prompt left out together."""
    base, change = ragged(scale=0.1)
    shifted, clusters = plus(base, change), torch.arange(N) % 18
    estimate = snis_delta_entropy(base, shifted, clusters=clusters)

    def value(rows: torch.Tensor) -> float:
        return snis_delta_entropy(base.select(rows), shifted.select(rows)).value

    found = jackknife_standard_error(value, N, clusters=clusters)
    assert found == pytest.approx(estimate.stderr, rel=0.15)  # they differ at O(1/18)


def test_more_groups_than_clusters_are_the_clusters():
    assert jackknife_standard_error(mean, 60, groups=1000) == jackknife_standard_error(mean, 60)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 1}, "2 clusters and 2 groups"),
        ({"count": 0}, "2 clusters and 2 groups"),
        ({"count": 60, "groups": 1}, "2 clusters and 2 groups of them to leave out, got 60 and 1"),
        ({"count": 60, "clusters": [0] * 60}, "got 1 and None"),
        ({"count": 60, "clusters": [0, 1]}, r"clusters of shape \[60\]"),
    ],
)
def test_too_little_to_leave_out_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        jackknife_standard_error(mean, **arguments)
