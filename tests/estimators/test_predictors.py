"""Predictors against loops and a softmax of one token, and their agreement against scipy and a jackknife in loops."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from samples import N, T, ragged
from scipy import stats
from torch import Tensor

from entropy_pl.estimators import agreement, covariance_prediction, steer_prediction

CLUSTERS = torch.arange(N) % 12


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("weighted", [False, True])
def test_covariance_is_its_definition_in_loops(weighted):
    base, advantages = ragged()[0], normal(N, seed=1)
    weights = normal(N, T, seed=2).abs() if weighted else None
    tokens = base.mask.nonzero().tolist()
    mean_s = sum(float(base.logp[i, k]) for i, k in tokens) / len(tokens)
    mean_a = sum(float(advantages[i]) for i, _ in tokens) / len(tokens)
    expected = torch.zeros(N, T, dtype=torch.float64)
    for i, k in tokens:
        expected[i, k] = -(float(base.logp[i, k]) - mean_s) * (float(advantages[i]) - mean_a)
        expected[i, k] *= float(weights[i, k]) if weighted else 1.0
    found = covariance_prediction(base.logp, advantages, base.mask, weights)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_covariance_adds_up_to_minus_the_covariance():
    base, advantages = ragged()[0], normal(N, seed=1)
    s, a = base.logp[base.mask].numpy(), advantages[:, None].expand(N, T)[base.mask].numpy()
    total = float(covariance_prediction(base.logp, advantages, base.mask).sum())
    assert total == pytest.approx(-len(s) * np.cov(s, a, bias=True)[0, 1], rel=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("off_policy", [False, True])
def test_steer_is_its_definition_in_loops(weighted, off_policy):
    base, advantages = ragged()[0], normal(N, seed=1)
    weights = normal(N, T, seed=2).abs() if weighted else None
    old_logp = base.logp + 0.3 * normal(N, T, seed=3) if off_policy else None
    expected = torch.zeros(N, T, dtype=torch.float64)
    for i, k in base.mask.nonzero().tolist():
        log_pi = float(base.logp[i, k])
        pi, pi_old = math.exp(log_pi), math.exp(float(old_logp[i, k]) if off_policy else log_pi)
        omega = float(advantages[i]) / pi_old * pi * (1 - pi) * (log_pi + float(base.entropy[i, k]))
        expected[i, k] = -omega * (float(weights[i, k]) if weighted else 1.0)
    found = steer_prediction(base.logp, base.entropy, advantages, base.mask, old_logp, weights)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def entropy(logits: Tensor) -> float:
    logp = torch.log_softmax(logits, 0)
    return float(-(logp.exp() * logp).sum())


def slope_along(logits: Tensor, direction: Tensor) -> float:
    """dH/dη along a change of the logits, by symmetric difference: off by η² and 1e-16/η, both 1e-10."""
    eta = 1e-5
    return (entropy(logits + eta * direction) - entropy(logits - eta * direction)) / (2 * eta)


def predicted(logits: Tensor, token: int, advantage: float, log_old_ratio: float = 0.0) -> float:
    """−Ω for one token drawn from one softmax; π_old = π·exp(log_old_ratio)."""
    logp = torch.log_softmax(logits, 0)[token].reshape(1, 1)
    return float(
        steer_prediction(
            logp,
            torch.full((1, 1), entropy(logits), dtype=torch.float64),
            torch.tensor([advantage], dtype=torch.float64),
            torch.ones(1, 1, dtype=torch.bool),
            logp + log_old_ratio,
        )
    )


def policy_gradient(logits: Tensor, token: int, advantage: float, log_old_ratio: float = 0.0) -> Tensor:
    """∂/∂z of A π(t)/π_old(t): (A π/π_old)(1_t − p)."""
    p = torch.softmax(logits, 0)
    return advantage * math.exp(-log_old_ratio) * (torch.nn.functional.one_hot(torch.tensor(token), len(p)) - p)


@pytest.mark.parametrize("seed", range(4))
def test_the_first_order_of_a_step_is_the_closed_form(seed):
    """−η Σ_j p_j (ln p_j + H) δz_j, which both tests below lean on."""
    logits = normal(5, seed=seed)
    logp, direction = torch.log_softmax(logits, 0), policy_gradient(logits, seed, 0.7)
    closed = -float((logp.exp() * (logp + entropy(logits)) * direction).sum())
    assert slope_along(logits, direction) == pytest.approx(closed, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("size", [2, 3, 9])
@pytest.mark.parametrize("log_old_ratio", [0.0, 0.4])
def test_steer_is_exact_for_the_drawn_tokens_own_logit(size, log_old_ratio):
    """The change is π times −Ω where the step moves the logit of the drawn token and no other."""
    for seed in range(5):
        logits = 2 * normal(size, seed=seed)
        for token in range(size):
            for advantage in (1.3, -0.6):
                direction = policy_gradient(logits, token, advantage, log_old_ratio)
                own = torch.zeros_like(direction)
                own[token] = direction[token]
                pi = float(torch.softmax(logits, 0)[token])
                found = pi * predicted(logits, token, advantage, log_old_ratio)
                assert found == pytest.approx(slope_along(logits, own), rel=1e-6, abs=1e-9)


def test_steer_is_right_for_the_whole_step_of_a_coin():
    """Of two tokens the other moves the opposite way and by as much: 2π times −Ω, so the sign is right as well."""
    for seed in range(10):
        logits = 2 * normal(2, seed=seed)
        for token, advantage in ((0, 1.0), (1, 1.0), (0, -0.5), (1, -0.5)):
            change = slope_along(logits, policy_gradient(logits, token, advantage))
            minus_omega = predicted(logits, token, advantage)
            pi = float(torch.softmax(logits, 0)[token])
            assert 2 * pi * minus_omega == pytest.approx(change, rel=1e-6, abs=1e-9)
            assert minus_omega * change > 0


def test_steer_may_miss_the_sign_where_the_other_logits_decide():
    """It leaves out Σ_j p_j² (ln p_j + H) = Cov(p, ln p) ≥ 0: wrong for a token hardly likelier than e^−H."""
    clear = torch.tensor([0.62, 0.30, 0.08], dtype=torch.float64).log()
    for token, sign in ((0, -1), (1, 1), (2, 1)):
        assert sign * predicted(clear, token, 1.0) > 0
        assert sign * slope_along(clear, policy_gradient(clear, token, 1.0)) > 0
    close = torch.tensor([0.50, 0.46, 0.04], dtype=torch.float64).log()
    assert predicted(close, 1, 1.0) < 0 < slope_along(close, policy_gradient(close, 1, 1.0))


def two_arrays() -> tuple[Tensor, Tensor, Tensor]:
    """A prediction that is half right, with ties, on ragged tokens."""
    mask = ragged()[0].mask
    attributed = normal(N, T, seed=5) + normal(N, 1, seed=6)
    return (2 * (attributed + normal(N, T, seed=7))).round() / 2, attributed, mask


def leave_out(statistic, groups: int) -> float:
    """The textbook's jackknife, for groups of one size."""
    x, y, mask = two_arrays()
    without = []
    for j in range(groups):
        kept = mask & (CLUSTERS % groups != j)[:, None]
        without.append(statistic(x[kept].numpy(), y[kept].numpy()).statistic)
    return math.sqrt((groups - 1) / groups * sum((value - np.mean(without)) ** 2 for value in without))


@pytest.mark.parametrize("groups", [12, 4])
def test_agreement_is_scipys_with_a_jackknife_in_loops(groups):
    x, y, mask = two_arrays()
    found = agreement(x, y, mask, clusters=CLUSTERS, groups=groups, confidence=0.9)
    reach = stats.t.ppf(0.95, groups - 1)
    for name, statistic in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr)):
        value, stderr = getattr(found, name), getattr(found, f"{name}_stderr")
        assert value == pytest.approx(statistic(x[mask].numpy(), y[mask].numpy()).statistic, rel=1e-12)
        assert stderr == pytest.approx(leave_out(statistic, groups), rel=1e-9)
        assert getattr(found, f"{name}_ci_low") == pytest.approx(value - reach * stderr)
        assert getattr(found, f"{name}_ci_high") == pytest.approx(min(value + reach * stderr, 1.0))
    assert found.n_tokens == int(mask.sum())


def test_agreement_in_sign_is_weighted_by_size():
    x, y, mask = two_arrays()
    right = total = 0.0
    for i, k in mask.nonzero().tolist():
        total += abs(float(y[i, k]))
        right += abs(float(y[i, k])) * (float(x[i, k]) * float(y[i, k]) > 0)
    assert agreement(x, y, mask).sign_agreement == pytest.approx(right / total, rel=1e-12)
    assert 0.6 < right / total < 0.95


def test_a_prompt_written_down_twice_is_no_more_evidence():
    x, y, mask = two_arrays()
    twice = torch.arange(N).repeat(2)
    once = agreement(x, y, mask, groups=N)
    doubled = agreement(x[twice], y[twice], mask[twice], clusters=twice, groups=N)
    for name in ("pearson", "spearman"):
        assert getattr(doubled, f"{name}_stderr") == pytest.approx(getattr(once, f"{name}_stderr"), rel=0.02)
        # ranks of doubled numbers are not quite doubled ranks; correlations are the same


def test_numbers_behind_the_mask_and_scales_do_not_matter():
    x, y, mask = two_arrays()
    plain = agreement(x, y, mask)
    dirty = agreement((1e-250 * x).masked_fill(~mask, math.nan), (1e9 * y).masked_fill(~mask, math.inf), mask)
    assert dirty.to_dict() == pytest.approx(plain.to_dict(), rel=1e-9)


@pytest.mark.parametrize("which", ["predicted", "attributed", "both", "one prompt", "one token"])
def test_what_says_nothing_is_none_and_no_warning(which):
    x, y, mask = two_arrays()
    clusters = None
    if which in ("predicted", "both"):
        x = torch.full_like(x, 0.1)
    if which in ("attributed", "both"):
        y = torch.zeros_like(y)
    if which == "one prompt":
        clusters = [0] * N
    if which == "one token":
        mask = torch.zeros_like(mask).index_fill_(0, torch.tensor(0), True) & (torch.arange(T) == 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = agreement(x, y, mask, clusters=clusters).to_dict()
    for name in ("pearson", "spearman"):
        assert (found[name] is None) == (which != "one prompt")
        assert found[f"{name}_stderr"] is found[f"{name}_ci_low"] is found[f"{name}_ci_high"] is None
    assert (found["sign_agreement"] is None) == (which in ("attributed", "both"))


def test_what_cannot_be_compared_is_named():
    x, y, mask = two_arrays()
    with pytest.raises(ValueError, match=r"attributed of the mask's shape \[37, 6\], got \[36, 6\]"):
        agreement(x, y[1:], mask)
    with pytest.raises(ValueError, match=r"finite numbers in predicted, got 1 of \d+ tokens"):
        agreement(x.clone().index_put_((torch.tensor(0), torch.tensor(0)), torch.tensor(math.nan).double()), y, mask)
    with pytest.raises(ValueError, match="every completion is empty"):
        agreement(x, y, torch.zeros_like(mask))
    with pytest.raises(ValueError, match="at least 2 groups to leave out, got 1"):
        agreement(x, y, mask, groups=1)
    with pytest.raises(ValueError, match="confidence between 0 and 1"):
        agreement(x, y, mask, confidence=95)
    with pytest.raises(ValueError, match=r"advantages of shape \[37\], .* got \[37, 6\]"):
        covariance_prediction(x, y, mask)
    with pytest.raises(ValueError, match=r"entropy of the mask's shape .* got \[37, 5\]"):
        steer_prediction(x, y[:, 1:], y[:, 0], mask)
