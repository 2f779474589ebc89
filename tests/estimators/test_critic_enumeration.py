"""Baselines against exact answers: what moves no expectation, what does and by how much, and whether intervals hold."""

from __future__ import annotations

import itertools

import pytest
import torch
from enumeration import Enumeration
from samples import ETA, INTEGRAND, OPTIONS, at, prefix_features, prefix_numbers
from torch import Tensor

from entropy_pl.estimators import (
    first_order_delta_entropy,
    low_variance_delta_entropy,
    score_baseline,
    score_return,
    snis_delta_entropy,
)
from entropy_pl.estimators.critic import gae_baseline, prefix_columns
from entropy_pl.estimators.ridge import RidgeFolds


@pytest.fixture(scope="module")
def hidden(enumeration: Enumeration) -> Tensor:
    return prefix_features(enumeration)


def sampled(scored, hidden, rows, **options):
    """Statistics, tangents and features of the sampled rows, with the options of the estimate."""
    base, first = at(scored, rows, "base", "first")
    return base, first, hidden[rows][base.mask]


@pytest.mark.parametrize("integrand", INTEGRAND)
def test_a_fitted_critic_moves_no_expectation(enumeration, scored, hidden, drawn, integrand):
    """Learnt from one sample and frozen, it is a function of the prefix: Σ_i p_i Σ_k ṡ_ik b_ik = 0."""
    base, _, features = sampled(scored, hidden, drawn[:500])
    returns = score_return(base, integrand=integrand)
    fold = (torch.arange(500) % 5)[:, None].expand_as(base.mask)[base.mask]
    critic = RidgeFolds([features, prefix_columns(base)], returns[base.mask], fold, 5).fit()
    everything, sdot = scored["base"], scored["first"].logp
    b = torch.zeros_like(sdot)
    b[everything.mask] = critic.predict([hidden[everything.mask], prefix_columns(everything)])
    per_row = (sdot * b).sum(1)
    p = enumeration.probabilities()
    assert float((p * per_row.abs()).sum()) > 0.1  # there is something to cancel
    assert float((p * per_row).sum()) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("normalize", "weighting", "integrand"), OPTIONS)
@pytest.mark.parametrize("kind", ["position", "critic"])
def test_first_order_with_a_baseline_is_the_enumerated_gradient(
    enumeration, scored, hidden, drawn, normalize, weighting, integrand, kind
):
    base, first, features = sampled(scored, hidden, drawn)
    options = {"normalize": normalize, "weighting": weighting, "integrand": integrand}
    plain = first_order_delta_entropy(base, first, **options)
    baseline = score_baseline(kind, base, features=features, **options)
    estimate = first_order_delta_entropy(base, first, baseline=baseline, **options)
    assert abs(estimate.value - enumeration.exact_slope(normalize)) / estimate.stderr < 4
    assert estimate.stderr < (1.02 if kind == "position" else 1.0) * plain.stderr


def expected_first_order(enumeration, scored, integrand, baseline) -> float:
    """E of the closed form per sequence (docs/theory.md, §4), Σ_i p_i [Σ_k ẋ_ik + Σ_k ṡ_ik (G_ik − b_ik)]."""
    returns = score_return(scored["base"], normalize="per_sequence", integrand=integrand)
    sdot, hdot = scored["first"].logp, scored["first"].entropy
    pathwise = hdot if integrand == "rao_blackwell" else -sdot
    return float((enumeration.probabilities()[:, None] * (pathwise + sdot * (returns - baseline))).sum())


@pytest.mark.parametrize(("integrand", "gae_lambda"), itertools.product(INTEGRAND, (0.0, 0.5, 0.95, 1.0)))
def test_gae_is_off_by_the_error_of_its_critic(enumeration, scored, integrand, gae_lambda):
    """Its bias, enumerated, is −(1−λ) Σ_k Σ_{l≥1} λ^{l−1} E[ṡ_k (V − W)_{k+l}]: none for W = V, or for λ = 1."""
    base, sdot, numbers = scored["base"], scored["first"].logp, prefix_numbers(enumeration)
    p, mask = enumeration.probabilities(), scored["base"].mask
    returns = score_return(base, normalize="per_sequence", integrand=integrand)
    size = int(numbers.max()) + 1
    weight = torch.zeros(size, dtype=p.dtype).index_add(0, numbers[mask], (p[:, None] * mask)[mask])
    total = torch.zeros(size, dtype=p.dtype).index_add(0, numbers[mask], (p[:, None] * returns)[mask])
    perfect = (total / weight)[numbers] * mask  # V = E[G | prefix]
    bad = 3 * torch.randn(size, generator=torch.Generator().manual_seed(5), dtype=p.dtype)[numbers] * mask
    error = perfect - bad
    bias = 0.0
    for k, later in itertools.combinations(range(mask.shape[1]), 2):
        bias -= (1 - gae_lambda) * gae_lambda ** (later - k - 1) * float((p * sdot[:, k] * error[:, later]).sum())
    slope = enumeration.exact_slope("per_sequence")
    off = {
        name: expected_first_order(enumeration, scored, integrand, gae_baseline(returns, w, mask, gae_lambda)) - slope
        for name, w in (("perfect", perfect), ("bad", bad))
    }
    assert off["perfect"] == pytest.approx(0, abs=1e-9)
    assert off["bad"] == pytest.approx(bias, abs=1e-9)
    assert (abs(bias) > 0.05 * abs(slope)) == (gae_lambda < 0.95)
    assert (bias == 0) == (gae_lambda == 1)


@pytest.mark.parametrize("gae_lambda", [0.0, 1.0])
def test_the_bias_of_gae_shows_in_a_large_sample(enumeration, scored, hidden, drawn, gae_lambda):
    """A critic with features that say nothing: z > 4 at λ = 0, and no bias at λ = 1."""
    base, first, features = sampled(scored, hidden, drawn)
    options = {"normalize": "per_sequence", "weighting": "sequence", "integrand": "surprisal"}
    baseline = score_baseline("gae", base, features=0 * features, gae_lambda=gae_lambda, **options)
    estimate = first_order_delta_entropy(base, first, baseline=baseline, **options)
    z = (estimate.value - enumeration.exact_slope("per_sequence")) / estimate.stderr
    assert (abs(z) > 4) == (gae_lambda == 0)


def low_variance_change(scored, hidden, rows, kind, **options):
    """ΔH(η) with the first order of that baseline for its own."""
    base, first, features = sampled(scored, hidden, rows)
    true = snis_delta_entropy(base, scored["shifted"].select(rows), **options)
    matched = first_order_delta_entropy(base, first, **options)
    baseline = score_baseline(kind, base, features=features, **options)
    low = first_order_delta_entropy(base, first, baseline=baseline, **options)
    return low_variance_delta_entropy(true, matched, low, ETA)


@pytest.mark.parametrize(("normalize", "weighting", "integrand"), OPTIONS)
@pytest.mark.parametrize("kind", ["position", "critic"])
def test_the_change_with_a_baseline_is_the_enumerated_one(
    enumeration, scored, hidden, drawn, normalize, weighting, integrand, kind
):
    options = {"normalize": normalize, "weighting": weighting, "integrand": integrand}
    exact = enumeration.exact_entropy(normalize, ETA) - enumeration.exact_entropy(normalize)
    found = low_variance_change(scored, hidden, drawn, kind, **options)
    assert abs(found.value - exact) / found.stderr < 4
