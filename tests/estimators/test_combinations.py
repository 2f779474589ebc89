"""Estimates made of estimates, against the same calculation on the values and influences by hand."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from samples import ETA, N, at, plus, ragged
from scipy import stats

from entropy_pl.estimators import (
    entropy_estimate,
    first_order_delta_entropy,
    linear_combination,
    low_variance_delta_entropy,
    score_baseline,
    second_order_delta_entropy,
    snis_delta_entropy,
    symmetric_difference,
)

CLUSTERS = torch.arange(N) % 11


@pytest.mark.parametrize("clusters", [None, CLUSTERS])
def test_a_combination_is_linear_in_values_and_influences(clusters):
    base, change = ragged()
    near, far = (
        snis_delta_entropy(base, plus(base, change, eta), clusters=clusters, confidence=0.9) for eta in (0.5, -1.0)
    )
    found = 2.0 * near - 3.0 * far
    assert found.to_dict() == linear_combination([(2.0, near), (-3.0, far)]).to_dict()
    psi = 2 * near.influence.numpy() - 3 * far.influence.numpy()
    sums = psi if clusters is None else np.array([psi[clusters.numpy() == c].sum() for c in range(11)])
    stderr = math.sqrt(len(sums) * sums.var(ddof=1)) / N  # the sums have mean zero: those of ψ do
    margin = stats.t.ppf(0.95, len(sums) - 1) * stderr
    assert found.value == pytest.approx(2 * near.value - 3 * far.value, rel=1e-12)
    assert found.stderr == pytest.approx(stderr, rel=1e-12)
    assert (found.ci_low, found.ci_high) == pytest.approx((found.value - margin, found.value + margin))
    np.testing.assert_allclose(found.influence.numpy(), psi, rtol=1e-12)


def test_one_term_is_itself():
    base, change = ragged()
    estimate = snis_delta_entropy(base, plus(base, change), clusters=CLUSTERS)
    assert linear_combination([(1.0, estimate)]).to_dict() == estimate.to_dict()
    minus_two, scaled = linear_combination([(-2.0, estimate)]).to_dict(), estimate.scaled(-2.0).to_dict()
    assert minus_two.pop("warnings") == scaled.pop("warnings")
    assert minus_two == pytest.approx(scaled)


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_another_standard_error_has_the_interval_of_its_size(confidence):
    estimate = entropy_estimate(ragged()[0], confidence=confidence)
    wider = estimate.with_stderr(1.5 * estimate.stderr)
    reach = stats.t.ppf(0.5 + confidence / 2, N - 1) * 1.5 * estimate.stderr
    assert wider.value == estimate.value
    assert wider.stderr == 1.5 * estimate.stderr
    assert (wider.ci_low, wider.ci_high) == pytest.approx((estimate.value - reach, estimate.value + reach), rel=1e-12)


def test_shared_noise_cancels():
    base, change = ragged()
    estimate = snis_delta_entropy(base, plus(base, change))
    for nothing in (estimate - estimate, estimate + -estimate):
        assert (nothing.value, nothing.stderr) == (0, 0)


def test_the_worst_health_is_kept():
    base, change = ragged()
    clipped, free = (snis_delta_entropy(base, plus(base, change), clip_log_weight=c) for c in (0.1, None))
    fewer = dataclasses.replace(entropy_estimate(base), n_tokens=5)
    found = linear_combination([(1.0, clipped), (0.5, free), (0.0, fewer)])
    assert (found.ess, found.ess_min) == (min(clipped.ess, free.ess), min(clipped.ess_min, free.ess_min))
    assert found.ess < fewer.ess
    assert found.max_abs_log_weight == free.max_abs_log_weight
    assert (found.mean_weight, found.mean_weight_stderr) == (free.mean_weight, free.mean_weight_stderr)
    assert (found.clip_fraction, found.n_tokens, found.n_sequences) == (clipped.clip_fraction, 5, N)


def test_what_cannot_be_combined_is_named():
    base, _ = ragged()
    whole, half = entropy_estimate(base), entropy_estimate(base.select(torch.arange(20)))
    with pytest.raises(ValueError, match=r"same sequences, got \[37, 20\]"):
        linear_combination([(1.0, whole), (1.0, half)])
    with pytest.raises(ValueError, match=r"at least one .* got none"):
        linear_combination([])
    with pytest.raises(ValueError, match=r"one confidence, got \[0\.8, 0\.95\]"):
        linear_combination([(1.0, whole), (1.0, entropy_estimate(base, confidence=0.8))])
    with pytest.raises(ValueError, match="of the same prompts"):
        linear_combination([(1.0, whole), (1.0, entropy_estimate(base, clusters=CLUSTERS))])
    with pytest.raises(ValueError, match=r"eta > 0, .* got -0.1"):
        symmetric_difference(whole, whole, -0.1)


def test_low_variance_change_is_its_formula(scored, drawn):
    base, first, shifted = at(scored, drawn[:300], "base", "first", "shifted")
    clusters = drawn[:300] % 7
    error_bar = {"clusters": clusters, "confidence": 0.8}
    true = snis_delta_entropy(base, shifted, **error_bar)
    matched = first_order_delta_entropy(base, first, **error_bar)
    low = first_order_delta_entropy(base, first, baseline=score_baseline("position", base), **error_bar)
    found = low_variance_delta_entropy(true, matched, low, ETA)
    assert found.value == pytest.approx(true.value - ETA * matched.value + ETA * low.value, rel=1e-12)
    psi = (true.influence - ETA * matched.influence + ETA * low.influence).numpy()
    sums = np.array([psi[clusters.numpy() == c].sum() for c in range(7)])
    assert found.stderr == pytest.approx(math.sqrt(7 * sums.var(ddof=1)) / 300, rel=1e-9)
    for health in ("ess", "ess_min", "max_abs_log_weight", "clip_fraction", "n_tokens"):
        assert getattr(found, health) == getattr(true, health)


def test_low_variance_change_is_the_enumerated_one(enumeration, scored, drawn):
    """Unbiased with the exact first order for the less noisy one, and only curvature's noise is left."""
    base, first, shifted = at(scored, drawn, "base", "first", "shifted")
    options = {"weighting": "sequence", "normalize": "per_sequence"}
    true, matched = snis_delta_entropy(base, shifted, **options), first_order_delta_entropy(base, first, **options)
    exact = dataclasses.replace(
        matched, value=enumeration.exact_slope("per_sequence"), influence=torch.zeros_like(matched.influence)
    )
    found = low_variance_delta_entropy(true, matched, exact, ETA)
    change = enumeration.exact_entropy("per_sequence", ETA) - enumeration.exact_entropy("per_sequence")
    assert abs(found.value - change) / found.stderr < 4
    assert found.stderr < 0.7 * true.stderr


def test_symmetric_difference_is_odd_and_even_part():
    base, change = ragged(scale=0.1)
    forward, back = (snis_delta_entropy(base, plus(base, change, eta), clusters=CLUSTERS) for eta in (0.5, -0.5))
    odd, even = symmetric_difference(forward, back, 0.5)
    assert odd.value == pytest.approx(forward.value - back.value, rel=1e-12)
    assert even.value == pytest.approx(4 * (forward.value + back.value), rel=1e-12)
    for found, psi in ((odd, forward.influence - back.influence), (even, 4 * (forward.influence + back.influence))):
        sums = np.array([float(psi[c == CLUSTERS].sum()) for c in range(11)])
        assert found.stderr == pytest.approx(math.sqrt(11 * sums.var(ddof=1)) / N, rel=1e-9)


def test_symmetric_difference_finds_slope_and_curvature():
    """Of the reducer itself as η → 0: its own first and second derivative, off by O(η²)."""
    base, change = ragged(scale=0.1)
    none = dataclasses.replace(change, logp=0 * change.logp, entropy=0 * change.entropy)
    first, second = first_order_delta_entropy(base, change), second_order_delta_entropy(base, change, none)
    errors = []
    for eta in (2e-2, 1e-2):
        pair = (snis_delta_entropy(base, plus(base, change, e)) for e in (eta, -eta))
        odd, even = symmetric_difference(*pair, eta)
        errors.append((odd.value - first.value, even.value - second.value))
        assert odd.stderr == pytest.approx(first.stderr, rel=1e-3)
        assert even.stderr == pytest.approx(second.stderr, rel=1e-3)
    for coarse, fine in zip(*errors, strict=True):
        assert coarse / fine == pytest.approx(4, rel=0.05)  # halved η, a quarter of the error
