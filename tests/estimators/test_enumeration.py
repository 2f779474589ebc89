"""The estimators against exact answers: a policy whose every completion is written down."""

from __future__ import annotations

import itertools

import pytest
import torch
from samples import ETA, NORMALIZE, OPTIONS, at, exact_curvature

from entropy_pl.estimators import (
    entropy_estimate,
    first_order_delta_entropy,
    second_order_delta_entropy,
    snis_delta_entropy,
)
from entropy_pl.policy.precision import float64_evaluation
from entropy_pl.policy.score import token_stats


@pytest.mark.parametrize(("normalize", "integrand"), itertools.product(NORMALIZE, ("rao_blackwell", "surprisal")))
def test_entropy_is_the_enumerated_one(enumeration, scored, drawn, normalize, integrand):
    estimate = entropy_estimate(scored["base"].select(drawn), normalize=normalize, integrand=integrand)
    z = (estimate.value - enumeration.exact_entropy(normalize)) / estimate.stderr
    assert abs(z) < 4


@pytest.mark.parametrize(("normalize", "weighting", "integrand"), OPTIONS)
def test_true_change_is_the_enumerated_one(enumeration, scored, drawn, normalize, weighting, integrand):
    exact = enumeration.exact_entropy(normalize, ETA) - enumeration.exact_entropy(normalize)
    estimate = snis_delta_entropy(
        *at(scored, drawn, "base", "shifted"), normalize=normalize, weighting=weighting, integrand=integrand
    )
    assert abs(exact) > 10 * estimate.stderr, "the change must stand out, or z says nothing"
    assert abs(estimate.value - exact) / estimate.stderr < 4


@pytest.mark.parametrize(("normalize", "weighting", "integrand"), OPTIONS)
def test_first_order_is_the_enumerated_gradient(enumeration, scored, drawn, normalize, weighting, integrand):
    estimate = first_order_delta_entropy(
        *at(scored, drawn, "base", "first"), normalize=normalize, weighting=weighting, integrand=integrand
    )
    exact = enumeration.exact_slope(normalize)
    assert abs(exact) > 10 * estimate.stderr
    assert abs(estimate.value - exact) / estimate.stderr < 4


@pytest.mark.parametrize(("normalize", "weighting", "integrand"), OPTIONS)
def test_second_order_is_the_enumerated_curvature(enumeration, scored, drawn, normalize, weighting, integrand):
    exact = exact_curvature(enumeration, normalize)
    estimate = second_order_delta_entropy(
        *at(scored, drawn, "base", "first", "second"), normalize=normalize, weighting=weighting, integrand=integrand
    )
    assert abs(estimate.value - exact) / estimate.stderr < 4


@pytest.mark.parametrize(("normalize", "weighting", "integrand"), OPTIONS)
def test_first_order_is_the_slope_of_the_true_change(enumeration, scored, drawn, normalize, weighting, integrand):
    """δH₁ = ΔH(η)/η as η → 0 on one E-batch, to 1e-6: an identity, not a statistic."""
    rows, options = drawn[:256], {"normalize": normalize, "weighting": weighting, "integrand": integrand}
    base, first = at(scored, rows, "base", "first")
    eta = 1e-6  # symmetric: its own error is η²H'''/6, 1e-10 here; rounding, 1e-16/η, is as small
    with float64_evaluation(enumeration.model):
        plus, minus = (
            token_stats(enumeration.model, enumeration.rollout, update=enumeration.update, eta=e).select(rows)
            for e in (eta, -eta)
        )
    up, down = (snis_delta_entropy(base, shifted, **options) for shifted in (plus, minus))
    estimate = first_order_delta_entropy(base, first, **options)
    assert (up.value - down.value) / (2 * eta) == pytest.approx(estimate.value, rel=1e-6)
    torch.testing.assert_close(
        (up.influence - down.influence) / (2 * eta), estimate.influence, rtol=1e-6, atol=1e-6 * abs(estimate.value)
    )
