"""The change of expected reward, against its definition in loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from samples import N, T, plus, ragged
from scipy import stats
from torch import Tensor

from entropy_pl.estimators import (
    first_order_delta_reward,
    reward_baseline,
    reward_estimate,
    snis_delta_reward,
)
from entropy_pl.rollout import TokenStats

EMPTY = torch.tensor([2, 11, 30])  # completions without any token
CLUSTERS = torch.arange(N) % 11


def with_empty(seed: int = 0) -> tuple[TokenStats, TokenStats]:
    """Ragged statistics of which three completions have no token, with rubbish behind the mask."""
    mask = ragged(seed)[0].mask.clone()
    mask[EMPTY] = False
    base, change = (
        TokenStats(x.logp.masked_fill(~mask, fill), x.entropy.masked_fill(~mask, math.nan), mask)
        for x, fill in zip(ragged(seed), (7.0, -3.0), strict=True)
    )
    return base, change


def rewards() -> Tensor:
    return torch.randn(N, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def weight_of(base: TokenStats, shifted: TokenStats, i: int, bound: float = math.inf) -> float:
    log_weight = sum(float(shifted.logp[i, k] - base.logp[i, k]) for k in range(T) if base.mask[i, k])
    return math.exp(min(max(log_weight, -bound), bound))


def test_the_reward_itself_is_a_mean():
    base, r = with_empty()[0], rewards().numpy()
    found = reward_estimate(base, rewards(), confidence=0.9)
    low, high = stats.t.interval(0.9, N - 1, loc=r.mean(), scale=stats.sem(r))
    assert (found.value, found.stderr) == (pytest.approx(r.mean(), rel=1e-12), pytest.approx(stats.sem(r), rel=1e-12))
    assert (found.ci_low, found.ci_high) == (pytest.approx(low), pytest.approx(high))
    assert (found.n_sequences, found.n_tokens) == (N, int(base.mask.sum()))


@pytest.mark.parametrize("bound", [None, 0.3])
def test_the_change_is_its_definition_in_loops(bound):
    base, change = with_empty()
    shifted, r = plus(base, change), rewards()
    w = np.array([weight_of(base, shifted, i, math.inf if bound is None else bound) for i in range(N)])
    assert (w[EMPTY] == 1).all()
    mean = sum(w[i] * float(r[i]) for i in range(N)) / w.sum()
    psi = [w[i] * (float(r[i]) - mean) / w.mean() - (float(r[i]) - float(r.mean())) for i in range(N)]
    sums = np.array([sum(psi[i] for i in range(N) if CLUSTERS[i] == c) for c in range(11)])
    found = snis_delta_reward(base, shifted, r.tolist(), clip_log_weight=bound, clusters=CLUSTERS)
    assert found.value == pytest.approx(mean - float(r.mean()), rel=1e-12)
    np.testing.assert_allclose(found.influence.numpy(), psi, rtol=1e-10, atol=1e-14)  # two numbers of size 1 subtracted
    assert found.stderr == pytest.approx(math.sqrt(11 * sums.var(ddof=1)) / N, rel=1e-10)
    assert found.ess == pytest.approx(w.sum() ** 2 / (w**2).sum(), rel=1e-12)
    assert (found.clip_fraction > 0) == (bound is not None)
    assert found.n_tokens == int(base.mask.sum())


@pytest.mark.parametrize("with_baseline", [False, True])
def test_the_first_order_is_its_definition_in_loops(with_baseline):
    base, tangent = with_empty()
    r, b = rewards(), ragged(5)[0].entropy
    mean, total = float(r.mean()), 0.0
    for i in range(N):
        for k in range(T):
            if base.mask[i, k]:
                total += float(tangent.logp[i, k]) * (float(r[i]) - (float(b[i, k]) if with_baseline else mean))
    found = first_order_delta_reward(base, tangent, r, baseline=b if with_baseline else None)
    assert found.value == pytest.approx(total / N, rel=1e-12)
    assert found.n_tokens == int(base.mask.sum())


def test_the_first_order_is_the_slope_of_the_change():
    """Value and influences: one reducer and its derivative."""
    base, change = with_empty()
    r, eta = rewards(), 1e-5  # symmetric: off by η²ΔJ'''/6 and by rounding, 1e-16/η; both 1e-11
    up, down = (snis_delta_reward(base, plus(base, change, e), r) for e in (eta, -eta))
    first = first_order_delta_reward(base, change, r)
    assert (up.value - down.value) / (2 * eta) == pytest.approx(first.value, rel=1e-6)
    torch.testing.assert_close((up.influence - down.influence) / (2 * eta), first.influence, rtol=1e-6, atol=1e-8)


def test_the_entropy_does_not_matter():
    base, change = ragged()
    other = TokenStats(change.logp, change.entropy + 1, change.mask)
    both = [first_order_delta_reward(base, tangent, rewards()).value for tangent in (change, other)]
    assert both[0] == both[1]


def test_the_baseline_by_position_is_its_definition_in_loops():
    """The mean reward of the other folds' completions alive at k; where none is, that of the last position with one."""
    base, r, folds = with_empty()[0], rewards(), 3
    found = reward_baseline("position", base, r, clusters=CLUSTERS, folds=folds)
    for i in range(N):
        others = [j for j in range(N) if CLUSTERS[j] % folds != CLUSTERS[i] % folds]
        for k in range(T):
            expected = 0.0
            if base.mask[i, k]:
                alive = next(
                    a for a in ([j for j in others if base.mask[j, p]] for p in range(k, -1, -1)) if a
                )  # position k, or the last before it
                expected = float(np.mean([float(r[j]) for j in alive]))
            assert float(found[i, k]) == pytest.approx(expected, rel=1e-12)


def features_of(base: TokenStats) -> Tensor:
    return torch.randn(int(base.mask.sum()), 3, generator=torch.Generator().manual_seed(8))


def ragged_with_empty() -> TokenStats:
    """Like :func:`with_empty`, with entropies that are numbers."""
    base = ragged()[0]
    mask = base.mask.clone()
    mask[EMPTY] = False
    return TokenStats(base.logp, base.entropy, mask)


def test_no_critic_sees_the_prompt_it_serves():
    base, r = ragged_with_empty(), rewards()
    options = {"features": features_of(base), "clusters": CLUSTERS}
    before = reward_baseline("critic", base, r, **options)
    fold_of_zero = CLUSTERS % 5 == 0
    after = reward_baseline("critic", base, torch.where(fold_of_zero, r + 5.0, r), **options)
    assert torch.equal(after[fold_of_zero], before[fold_of_zero])
    others = base.mask & ~fold_of_zero[:, None]
    assert (after[others] != before[others]).all()  # they learnt from it


@pytest.mark.parametrize("gae_lambda", [0.0, 0.7, 1.0])
def test_gae_is_its_definition_in_loops(gae_lambda):
    """R − Σ_l λ^l δ_{k+l}, δ_k = r_k + W_{k+1} − W_k, the whole reward paid by the last token."""
    base, r = ragged_with_empty(), rewards()
    options = {"features": features_of(base), "clusters": CLUSTERS}
    w = reward_baseline("critic", base, r, **options)
    found = reward_baseline("gae", base, r, gae_lambda=gae_lambda, **options)
    for i in range(N):
        length = int(base.mask[i].sum())
        value = [float(w[i, k]) for k in range(length)] + [0.0]
        paid = [float(r[i]) * (k == length - 1) for k in range(length)]
        for k in range(length):
            delta = [paid[j] + value[j + 1] - value[j] for j in range(k, length)]
            expected = float(r[i]) - sum(gae_lambda**n * d for n, d in enumerate(delta))
            assert float(found[i, k]) == pytest.approx(expected, rel=1e-10, abs=1e-12)
    assert not found[~base.mask].any()


def test_no_baseline_is_none():
    assert reward_baseline("none", ragged()[0], rewards()) is None


CALLS = {
    "estimate": lambda base, change, r: reward_estimate(base, r),
    "change": lambda base, change, r: snis_delta_reward(base, plus(base, change), r),
    "first order": lambda base, change, r: first_order_delta_reward(base, change, r),
    "baseline": lambda base, change, r: reward_baseline("position", base, r),
}


@pytest.mark.parametrize("call", sorted(CALLS))
def test_rewards_nobody_knows_are_counted(call):
    r = rewards()
    r[[3, 5]] = math.nan
    with pytest.raises(ValueError, match=r"finite reward for every completion, got 2 of 37"):
        CALLS[call](*ragged(), r)
    with pytest.raises(ValueError, match=r"rewards of shape \[37\], .* got \[36\]"):
        CALLS[call](*ragged(), r[1:])


def test_what_else_is_wrong_is_named():
    base, change = ragged()
    with pytest.raises(ValueError, match="got shifted with another mask"):
        snis_delta_reward(base, TokenStats(base.logp, base.entropy, ~base.mask), rewards())
    with pytest.raises(ValueError, match=r"a baseline among .* got 'mean'"):
        reward_baseline("mean", base, rewards())
    with pytest.raises(ValueError, match=r"baseline of shape \[37, 6\], got \[37, 1\]"):
        first_order_delta_reward(base, change, rewards(), baseline=torch.zeros(N, 1))
