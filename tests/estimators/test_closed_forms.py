"""The reducer and its derivatives against sums written out term by term, and against hand-made numbers."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from samples import NORMALIZE, WEIGHTING, N, T, plus, ragged
from scipy import stats

from entropy_pl.estimators import EntropyChange, entropy_estimate, first_order_delta_entropy, snis_delta_entropy
from entropy_pl.rollout import TokenStats


@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("weighting", WEIGHTING)
@pytest.mark.parametrize("integrand", ["rao_blackwell", "surprisal"])
def test_true_change_is_its_definition_in_loops(normalize, weighting, integrand):
    base, change = ragged()
    shifted = plus(base, change)

    def entropy(stats_at: TokenStats) -> float:
        total = length = 0.0
        for k in range(T):
            up, down, count, weights = 0.0, 0.0, 0.0, 0.0
            for i in range(N):
                ratio = [float(stats_at.logp[i, j] - base.logp[i, j]) for j in range(T)]
                before, including = math.exp(sum(ratio[:k])), math.exp(sum(ratio[: k + 1]))
                if weighting == "sequence":
                    before = including = math.exp(sum(ratio))
                w = before if integrand == "rao_blackwell" else including
                x = float(stats_at.entropy[i, k] if integrand == "rao_blackwell" else -stats_at.logp[i, k])
                m = float(base.mask[i, k])
                up, down = up + w * m * x, down + w
                count, weights = count + before * m, weights + before
            total, length = total + up / down, length + count / weights
        return total / length if normalize == "per_token" else total

    estimate = snis_delta_entropy(base, shifted, normalize=normalize, weighting=weighting, integrand=integrand)
    assert estimate.value == pytest.approx(entropy(shifted) - entropy(base), rel=1e-12)


@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("weighting", WEIGHTING)
@pytest.mark.parametrize("with_baseline", [False, True])
def test_first_order_is_the_closed_form(normalize, weighting, with_baseline):
    """D_i of docs/theory.md, §4, in loops: pathwise term plus score times centred entropy (to go)."""
    base, tangent = ragged()
    h, m, sdot, hdot = (x.double().numpy() for x in (base.entropy, base.mask, tangent.logp, tangent.entropy))
    baseline = ragged(5)[0].entropy if with_baseline else None
    mean_length = m.sum() / N if normalize == "per_token" else 1.0
    centre = h.sum() / m.sum() if normalize == "per_token" else 0.0
    c = m * (h - centre)
    values = []
    for i in range(N):
        d = hdot[i].sum()
        for k in range(T):
            if weighting == "prefix":
                to_go, batch = c[i, k + 1 :].sum(), c[:, k + 1 :].sum() / N
            else:
                to_go, batch = c[i].sum(), c.sum() / N
            d += sdot[i, k] * (to_go - (float(baseline[i, k]) if with_baseline else batch))
        values.append(d / mean_length)
    estimate = first_order_delta_entropy(base, tangent, normalize=normalize, weighting=weighting, baseline=baseline)
    assert estimate.value == pytest.approx(np.mean(values), rel=1e-12)


@pytest.mark.parametrize("integrand", ["rao_blackwell", "surprisal"])
@pytest.mark.parametrize("weighting", WEIGHTING)
@pytest.mark.parametrize("normalize", NORMALIZE)
def test_baseline_equal_to_the_batch_mean_changes_nothing(normalize, weighting, integrand):
    """The baseline that self-normalization already subtracts, written in loops, is the neutral one."""
    base, tangent = ragged(3)
    x = (base.entropy if integrand == "rao_blackwell" else -base.logp).numpy()
    m = base.mask.double().numpy()
    centre = (x * m).sum() / m.sum() if normalize == "per_token" else 0.0
    neutral = torch.zeros(N, T, dtype=torch.float64)
    for k in range(T):
        first = {"prefix": k + (integrand == "rao_blackwell"), "sequence": 0}[weighting]
        first_count = {"prefix": k + 1, "sequence": 0}[weighting]
        neutral[:, k] = ((x * m)[:, first:].sum() - centre * m[:, first_count:].sum()) / N
    options = {"normalize": normalize, "weighting": weighting, "integrand": integrand}
    plain = first_order_delta_entropy(base, tangent, **options)
    with_neutral = first_order_delta_entropy(base, tangent, baseline=neutral, **options)
    assert with_neutral.value == pytest.approx(plain.value, rel=1e-12)
    torch.testing.assert_close(with_neutral.influence, plain.influence)


@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("weighting", WEIGHTING)
def test_influences_are_those_of_the_jackknife(normalize, weighting):
    """Leaving a sequence out moves the estimate by −ψ_i/(N−1) to O(1/N)."""
    base, change = ragged(scale=0.1)
    shifted = plus(base, change)
    options = {"normalize": normalize, "weighting": weighting}
    estimate = snis_delta_entropy(base, shifted, **options)
    left_out = []
    for i in range(N):
        rest = torch.arange(N) != i
        left_out.append(snis_delta_entropy(base.select(rest), shifted.select(rest), **options).value)
    jackknife = math.sqrt((N - 1) / N * sum((x - np.mean(left_out)) ** 2 for x in left_out))
    assert estimate.stderr == pytest.approx(jackknife, rel=0.1)  # they differ at O(1/N), 3 % here
    assert float(estimate.influence.mean()) == pytest.approx(0, abs=1e-12)


def test_standard_error_and_interval_of_a_plain_mean():
    """per_sequence H at θ is a mean: its error bar is the textbook's."""
    base, _ = ragged()
    h = base.entropy.sum(1).numpy()
    estimate = entropy_estimate(base, normalize="per_sequence")
    low, high = stats.t.interval(0.95, N - 1, loc=h.mean(), scale=stats.sem(h))
    assert (estimate.value, estimate.stderr) == (pytest.approx(h.mean()), pytest.approx(stats.sem(h)))
    assert (estimate.ci_low, estimate.ci_high) == (pytest.approx(low), pytest.approx(high))


def test_clusters_are_counted_once():
    """Every sequence written down twice, as its own cluster of two, is no more evidence than once."""
    base, change = ragged()
    shifted = plus(base, change)
    twice = torch.arange(N).repeat(2)
    once = snis_delta_entropy(base, shifted)
    doubled = snis_delta_entropy(base.select(twice), shifted.select(twice), clusters=twice)
    naive = snis_delta_entropy(base.select(twice), shifted.select(twice))
    assert doubled.value == pytest.approx(once.value, rel=1e-12)
    assert doubled.stderr == pytest.approx(once.stderr, rel=1e-12)
    assert naive.stderr < 0.75 * once.stderr


def test_weight_health_by_hand():
    """Two tokens, log ratios (0, ln 3) and (ln 2, 0): prefixes and whole sequences weigh differently."""
    mask = torch.ones(2, 2, dtype=torch.bool)
    zero = torch.zeros(2, 2, dtype=torch.float64)
    base = TokenStats(zero, zero + 1, mask)
    shifted = TokenStats(torch.tensor([[0.0, 3.0], [2.0, 1.0]]).double().clamp(min=1).log(), zero + 1, mask)
    whole = snis_delta_entropy(base, shifted, weighting="sequence")
    prefix = snis_delta_entropy(base, shifted, weighting="prefix")
    assert whole.ess == prefix.ess == whole.ess_min == pytest.approx((3 + 2) ** 2 / (9 + 4))
    assert prefix.ess_min == pytest.approx(min((1 + 2) ** 2 / (1 + 4), 25 / 13))
    assert whole.max_abs_log_weight == pytest.approx(math.log(3))
    clipped = snis_delta_entropy(base, shifted, weighting="sequence", clip_log_weight=math.log(2.5))
    assert clipped.clip_fraction == 0.5
    # by prefix, h_i0 is weighed by 1 and h_i1 by the ratio of token 0: 1 and 2; the last token's ratio is never used
    assert prefix.max_abs_log_weight == pytest.approx(math.log(2))
    by_prefix = snis_delta_entropy(base, shifted, weighting="prefix", clip_log_weight=math.log(1.5))
    assert by_prefix.clip_fraction == 0.25
    assert clipped.ess == pytest.approx((2.5 + 2) ** 2 / (2.5**2 + 4))


def test_numbers_behind_the_mask_do_not_matter():
    base, change = ragged()
    shifted = plus(base, change)
    dirty = TokenStats(
        shifted.logp.masked_fill(~base.mask, 7.0), shifted.entropy.masked_fill(~base.mask, math.nan), base.mask
    )
    assert snis_delta_entropy(base, dirty).value == snis_delta_entropy(base, shifted).value


def test_huge_log_weights_do_not_overflow():
    base, change = ragged()
    estimate = snis_delta_entropy(base, plus(base, change, 5000.0), integrand="rao_blackwell")
    assert math.isfinite(estimate.value)
    assert estimate.ess < 2  # one sequence carries everything, and the estimate says so


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"normalize": "per_word"}, "normalize .*per_token.*per_sequence.* got 'per_word'"),
        ({"weighting": "token"}, "weighting .*prefix"),
        ({"integrand": "renyi"}, "integrand .*rao_blackwell"),
        ({"clip_log_weight": -1.0}, "clip_log_weight > 0"),
        ({"confidence": 95}, "confidence between 0 and 1"),
        ({"clusters": [0, 1]}, r"clusters of shape \[37\]"),
        ({"clusters": [0] * N}, "at least 2 clusters"),
    ],
)
def test_bad_options_are_named(arguments, message):
    base, change = ragged()
    with pytest.raises(ValueError, match=message):
        snis_delta_entropy(base, plus(base, change), **arguments)


def test_bad_statistics_are_named():
    base, change = ragged()
    other = TokenStats(base.logp, base.entropy, ~base.mask)
    broken = TokenStats(base.logp.clone().index_fill_(0, torch.tensor(3), math.nan), base.entropy, base.mask)
    none = TokenStats(base.logp, base.entropy, torch.zeros_like(base.mask))
    with pytest.raises(ValueError, match="at least 2 sequences, for an error bar, got 1"):
        snis_delta_entropy(base.select(torch.tensor([0])), base.select(torch.tensor([0])))
    with pytest.raises(ValueError, match="got shifted with another mask"):
        snis_delta_entropy(base, other)
    with pytest.raises(ValueError, match=r"finite numbers in shifted.logp, got \d+ that are not, .* sequence 3"):
        snis_delta_entropy(base, broken)
    with pytest.raises(ValueError, match="every completion is empty"):
        snis_delta_entropy(none, none)
    with pytest.raises(ValueError, match=r"baseline of shape \[37, 6\], got \[37, 1\]"):
        first_order_delta_entropy(base, change, baseline=torch.zeros(N, 1))


def test_scaling_keeps_the_interval_in_order():
    base, tangent = ragged()
    estimate = first_order_delta_entropy(base, tangent)
    for factor in (-2.0, 0.5):
        scaled = estimate.scaled(factor)
        assert isinstance(scaled, EntropyChange)
        assert scaled.value == factor * estimate.value
        assert scaled.ci_low < scaled.value < scaled.ci_high
        assert scaled.stderr == abs(factor) * estimate.stderr


def test_options_are_covered():
    """The cases above really differ: no two options give the same number."""
    base, change = ragged()
    shifted = plus(base, change)
    values = {
        snis_delta_entropy(base, shifted, normalize=n, weighting=w, integrand=i).value
        for n, w, i in itertools.product(NORMALIZE, WEIGHTING, ("rao_blackwell", "surprisal"))
    }
    assert len(values) == 8
