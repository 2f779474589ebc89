"""The identities of docs/theory.md, for any ragged batch under any option."""

from __future__ import annotations

import math

import loops
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import MANY, Batch, batches, integrands, normalizations, options, weightings
from torch import Tensor
from torch.nn.functional import pad

from entropy_pl.estimators import (
    entropy_estimate,
    first_order_coefficients,
    first_order_delta_entropy,
    linear_combination,
    second_order_delta_entropy,
    snis_delta_entropy,
)
from entropy_pl.rollout import TokenStats

# Sums of up to 9 × 8 terms of a few nats, weights up to e^10: float64 leaves 1e-12 of the largest term.
ROUNDING = {"rel": 1e-9, "abs": 1e-11}


def close(ours: Tensor, theirs: Tensor) -> bool:
    return torch.allclose(ours, theirs, rtol=1e-9, atol=1e-10)


class TestValues:
    @MANY
    @given(batches(), options)
    def test_true_change_is_its_definition(self, batch, chosen):
        estimate = snis_delta_entropy(batch.base, batch.shifted, **chosen)
        assert estimate.value == pytest.approx(loops.change_of_entropy(batch.base, batch.change, **chosen), **ROUNDING)

    @MANY
    @given(batches(), options, st.sampled_from([0.05, 0.5, 2.0]))
    def test_clipped_weights_are_too(self, batch, chosen, bound):
        estimate = snis_delta_entropy(batch.base, batch.shifted, clip_log_weight=bound, **chosen)
        expected = loops.change_of_entropy(batch.base, batch.change, clip=bound, **chosen)
        assert estimate.value == pytest.approx(expected, **ROUNDING)

    @MANY
    @given(batches(), options)
    def test_a_bound_that_is_never_reached_changes_nothing(self, batch, chosen):
        free = snis_delta_entropy(batch.base, batch.shifted, **chosen)
        bound = snis_delta_entropy(batch.base, batch.shifted, clip_log_weight=1e3, **chosen)
        assert bound.to_dict() == free.to_dict()
        assert torch.equal(bound.influence, free.influence)

    @MANY
    @given(batches(), options)
    def test_at_zero_step_nothing_changes(self, batch, chosen):
        """Exactly, and for every sequence: both sides are the same sums."""
        estimate = snis_delta_entropy(batch.base, batch.at(0.0), **chosen)
        assert (estimate.value, estimate.stderr) == (0.0, 0.0)
        assert not estimate.influence.any()
        # of equal weights, N; their sum of squares is a rounding off
        assert estimate.ess == pytest.approx(len(batch.base), rel=1e-12)

    @MANY
    @given(batches(), options)
    def test_first_order_is_the_derivative(self, batch, chosen):
        """Of the value by a complex step, which is exact."""
        estimate = first_order_delta_entropy(batch.base, batch.change, **chosen)
        assert estimate.value == pytest.approx(loops.slope(batch.base, batch.change, **chosen), **ROUNDING)

    @MANY
    @given(batches(), options)
    def test_first_order_is_the_limit_with_its_influences(self, batch, chosen):
        """Value and influence of [ΔH(η) − ΔH(−η)]/2η, and so the error bar."""
        eta = 1e-4  # off by η² of a third derivative (up to some 1e3 here) and 1e-16/η
        there, back = (snis_delta_entropy(batch.base, batch.at(sign * eta), **chosen) for sign in (1, -1))
        estimate = first_order_delta_entropy(batch.base, batch.change, **chosen)
        size = 1 + float(estimate.influence.abs().max())
        assert estimate.value == pytest.approx((there.value - back.value) / (2 * eta), abs=1e-4 * size)
        assert torch.allclose(estimate.influence, (there.influence - back.influence) / (2 * eta), atol=1e-4 * size)

    @MANY
    @given(batches(), normalizations, weightings)
    def test_first_order_is_the_closed_form(self, batch, normalize, weighting):
        estimate = first_order_delta_entropy(batch.base, batch.change, normalize=normalize, weighting=weighting)
        assert estimate.value == pytest.approx(
            loops.closed_form(batch.base, batch.change, normalize, weighting), **ROUNDING
        )

    @MANY
    @given(batches(), options)
    def test_second_order_is_the_derivative_of_the_first(self, batch, chosen):
        still = TokenStats(*(torch.zeros_like(batch.base.logp) for _ in range(2)), batch.base.mask)
        estimate = second_order_delta_entropy(batch.base, batch.change, still, **chosen)
        eta = 1e-4  # off by η² of a fourth derivative, up to some 1e4 here, and by 1e-16/η
        there, back = (loops.slope(batch.base, batch.change, sign * eta, **chosen) for sign in (1, -1))
        assert estimate.value == pytest.approx((there - back) / (2 * eta), rel=1e-4, abs=1e-4)

    @MANY
    @given(batches(), options)
    def test_coefficients_are_what_the_slope_is_made_of(self, batch, chosen):
        coefficients = first_order_coefficients(batch.base, **chosen)
        products = coefficients.logp * batch.change.logp + coefficients.entropy * batch.change.entropy
        assert math.fsum(products.flatten().tolist()) == pytest.approx(
            loops.slope(batch.base, batch.change, **chosen), **ROUNDING
        )


class TestBetweenOptions:
    @MANY
    @given(batches(), integrands)
    def test_per_token_is_per_sequence_over_the_mean_length(self, batch, integrand):
        per_token = entropy_estimate(batch.base, normalize="per_token", integrand=integrand)
        per_sequence = entropy_estimate(batch.base, normalize="per_sequence", integrand=integrand)
        mean_length = sum(map(sum, batch.base.mask.tolist())) / len(batch.base)
        assert per_token.value == pytest.approx(per_sequence.value / mean_length, **ROUNDING)

    @MANY
    @given(batches(longest=1, least=1), normalizations)
    def test_of_single_tokens_both_weightings_are_one(self, batch, normalize):
        """Where the integrand is that token's own: the entropy before it does not depend on it, and is not weighed."""
        both = [
            snis_delta_entropy(batch.base, batch.shifted, normalize=normalize, weighting=w, integrand="surprisal")
            for w in ("prefix", "sequence")
        ]
        assert both[0].value == pytest.approx(both[1].value, **ROUNDING)
        assert close(both[0].influence, both[1].influence)

    @MANY
    @given(batches(longest=1, least=1), normalizations)
    def test_of_single_tokens_the_entropy_by_prefix_is_a_plain_mean(self, batch, normalize):
        estimate = snis_delta_entropy(batch.base, batch.shifted, normalize=normalize, weighting="prefix")
        assert estimate.value == pytest.approx(np.mean(batch.change.entropy.numpy()[:, 0]), **ROUNDING)

    @MANY
    @given(batches(), normalizations, weightings)
    def test_without_weights_the_change_is_that_of_the_means(self, batch, normalize, weighting):
        """Entropies move, log-probs do not."""
        moved = TokenStats(batch.base.logp, batch.shifted.entropy, batch.base.mask)
        estimate = snis_delta_entropy(batch.base, moved, normalize=normalize, weighting=weighting)
        each = batch.change.entropy.sum(1).numpy()
        over = batch.base.mask.sum().item() / len(batch.base) if normalize == "per_token" else 1.0
        assert estimate.value == pytest.approx(each.mean() / over, **ROUNDING)

    @MANY
    @given(batches(least=1), normalizations, integrands, st.floats(-20, 20))
    def test_a_factor_common_to_all_weights_cancels(self, batch, normalize, integrand, shift):
        """Self-normalization: by sequence, every log weight moved by one constant. (h is held, −s is not.)"""
        first = torch.zeros_like(batch.base.logp)
        first[:, 0] = shift
        chosen = {"normalize": normalize, "weighting": "sequence", "integrand": "rao_blackwell"}
        there = batch.shifted
        moved = TokenStats(there.logp + first, there.entropy, there.mask)
        plain, shifted = (snis_delta_entropy(batch.base, stats, **chosen) for stats in (there, moved))
        assert shifted.value == pytest.approx(plain.value, rel=1e-8, abs=1e-10)  # exp of a sum rounded at 20
        assert shifted.ess == pytest.approx(plain.ess, rel=1e-8)

    @MANY
    @given(batches(), normalizations, weightings, st.floats(-5, 5))
    def test_another_unit_of_entropy(self, batch, normalize, weighting, factor):
        """Bits for nats: h times c is ΔH, SE and influences times c."""

        def change(scale: float) -> tuple[float, float, Tensor]:
            stats = (TokenStats(s.logp, scale * s.entropy, s.mask) for s in (batch.base, batch.shifted))
            found = snis_delta_entropy(*stats, normalize=normalize, weighting=weighting)
            return found.value, found.stderr, found.influence

        plain, scaled = change(1.0), change(factor)
        assert scaled[0] == pytest.approx(factor * plain[0], **ROUNDING)
        assert scaled[1] == pytest.approx(abs(factor) * plain[1], **ROUNDING)
        assert close(scaled[2], factor * plain[2])

    @MANY
    @given(batches(), options, st.floats(-5, 5))
    def test_first_order_is_linear_in_the_update(self, batch, chosen, factor):
        longer = TokenStats(factor * batch.change.logp, factor * batch.change.entropy, batch.base.mask)
        once = first_order_delta_entropy(batch.base, batch.change, **chosen)
        scaled = first_order_delta_entropy(batch.base, longer, **chosen)
        assert scaled.value == pytest.approx(factor * once.value, **ROUNDING)
        assert close(scaled.influence, factor * once.influence)


class TestErrorBars:
    @MANY
    @given(batches(), options, st.sampled_from([None, 0.05]))
    def test_influences_are_derivatives_by_the_weight_of_a_sequence(self, batch, chosen, bound):
        """The definition of an influence function, clipped weights or not, by a complex step."""
        estimate = snis_delta_entropy(batch.base, batch.shifted, clip_log_weight=bound, **chosen)
        expected = loops.influences(batch.base, batch.change, clip=bound, **chosen)
        assert estimate.influence.tolist() == pytest.approx(
            expected, rel=1e-9, abs=1e-10 * (1 + max(map(abs, expected)))
        )

    @MANY
    @given(batches(), options, st.booleans())
    def test_influences_are_centred_and_make_the_error(self, batch, chosen, derivative):
        if derivative:
            estimate = first_order_delta_entropy(batch.base, batch.change, **chosen)
        else:
            estimate = snis_delta_entropy(batch.base, batch.shifted, **chosen)
        psi = estimate.influence.numpy()
        assert psi.sum() == pytest.approx(0, abs=1e-11 * (1 + np.abs(psi).sum()))
        assert estimate.stderr == pytest.approx(psi.std(ddof=1) / math.sqrt(len(psi)), **ROUNDING)
        assert estimate.ci_low <= estimate.value <= estimate.ci_high

    @MANY
    @given(batches(), options)
    def test_clusters_of_one_are_none(self, batch, chosen):
        plain = snis_delta_entropy(batch.base, batch.shifted, **chosen)
        labels = batch.permutation() * 7 - 3  # any labels, in any order
        assert snis_delta_entropy(batch.base, batch.shifted, clusters=labels, **chosen).stderr == pytest.approx(
            plain.stderr, **ROUNDING
        )

    @MANY
    @given(batches(), options, st.integers(2, 4))
    def test_copies_are_evidence_only_to_who_does_not_know(self, batch, chosen, copies):
        """As sequences of their own, c copies divide the variance by c and more; as clusters they change nothing."""
        N = len(batch.base)
        rows = torch.arange(N).repeat(copies)
        many = (batch.base.select(rows), batch.shifted.select(rows))
        once = snis_delta_entropy(batch.base, batch.shifted, **chosen)
        naive, known = (snis_delta_entropy(*many, clusters=labels, **chosen) for labels in (None, rows))
        for estimate in (naive, known):
            assert estimate.value == pytest.approx(once.value, **ROUNDING)
        assert known.stderr == pytest.approx(once.stderr, **ROUNDING)
        # Σψ²·c over (cN)(cN−1), against Σψ² over N(N−1)
        assert naive.stderr == pytest.approx(once.stderr * math.sqrt((N - 1) / (copies * N - 1)), **ROUNDING)

    @MANY
    @given(batches(), options, st.floats(-3, 3), st.floats(-3, 3))
    def test_combinations_share_their_noise(self, batch, chosen, a, b):
        """The variance of a·x + b·y with its covariance, by NumPy."""
        x = snis_delta_entropy(batch.base, batch.shifted, **chosen)
        y = first_order_delta_entropy(batch.base, batch.change, **chosen)
        both = np.cov(np.stack([x.influence.numpy(), y.influence.numpy()]))
        variance = np.array([a, b]) @ both @ np.array([a, b]) / len(batch.base)
        found = linear_combination([(a, x), (b, y)])
        assert found.value == pytest.approx(a * x.value + b * y.value, **ROUNDING)
        assert found.stderr**2 == pytest.approx(variance, rel=1e-8, abs=1e-12)

    @MANY
    @given(batches(), options)
    def test_effective_sample_sizes_are_kishs(self, batch, chosen):
        estimate = snis_delta_entropy(batch.base, batch.shifted, **chosen)
        sums = np.cumsum(batch.change.logp.double().numpy() * batch.base.mask.numpy(), axis=1)
        sizes = [sum(w) ** 2 / sum(x * x for x in w) for w in np.exp(sums).T.tolist()]
        assert estimate.ess == pytest.approx(sizes[-1], rel=1e-9)
        assert estimate.ess_min == pytest.approx(min(sizes) if chosen["weighting"] == "prefix" else sizes[-1], rel=1e-9)
        assert 1 - 1e-9 <= estimate.ess_min <= len(batch.base) * (1 + 1e-9)


class TestWhatDoesNotMatter:
    @MANY
    @given(batches(), options, st.integers(1, 3), st.sampled_from([7.0, -1e30, math.inf, math.nan]))
    def test_columns_and_numbers_behind_the_mask(self, batch, chosen, columns, filler):
        def padded(stats: TokenStats) -> TokenStats:
            mask = pad(stats.mask, (0, columns))
            arrays = (pad(x, (0, columns)).masked_fill(~mask, filler) for x in (stats.logp, stats.entropy))
            return TokenStats(*arrays, mask)

        for estimator, other in ((snis_delta_entropy, batch.shifted), (first_order_delta_entropy, batch.change)):
            plain, dirty = (
                estimator(batch.base, other, **chosen),
                estimator(padded(batch.base), padded(other), **chosen),
            )
            assert dirty.value == pytest.approx(plain.value, **ROUNDING)
            assert close(dirty.influence, plain.influence)
            assert dirty.ess == pytest.approx(plain.ess, rel=1e-9)

    @MANY
    @given(batches(), options)
    def test_order_of_the_batch(self, batch, chosen):
        order = batch.permutation()
        for estimator, other in ((snis_delta_entropy, batch.shifted), (first_order_delta_entropy, batch.change)):
            plain = estimator(batch.base, other, **chosen)
            turned = estimator(batch.base.select(order), other.select(order), **chosen)
            assert turned.value == pytest.approx(plain.value, **ROUNDING)
            assert turned.stderr == pytest.approx(plain.stderr, **ROUNDING)
            assert close(turned.influence, plain.influence[order])

    @MANY
    @given(batches(dtype=torch.float32), options)
    def test_the_dtype_that_numbers_come_in(self, batch, chosen):
        """Sums are float64 whatever they are of: the same numbers give the same estimate, to the bit."""
        wide = Batch(*(_wide(stats) for stats in (batch.base, batch.change)), batch.noise)
        for estimator, ours, theirs in (
            (snis_delta_entropy, batch.shifted, _wide(batch.shifted)),
            (first_order_delta_entropy, batch.change, wide.change),
        ):
            narrow, full = estimator(batch.base, ours, **chosen), estimator(wide.base, theirs, **chosen)
            assert narrow.to_dict() == full.to_dict()
            assert torch.equal(narrow.influence, full.influence)
            assert narrow.influence.dtype == torch.float64


def _wide(stats: TokenStats) -> TokenStats:
    return TokenStats(stats.logp.double(), stats.entropy.double(), stats.mask)
