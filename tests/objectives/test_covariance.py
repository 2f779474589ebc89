import math

import pytest
import torch

from entropy_pl.objectives import LossSettings, select_tokens, token_covariance

MASK = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
ADVANTAGES = torch.tensor([2.0, -1.0, 30.0, 0.5], dtype=torch.float64)
LOGP = torch.tensor(
    [[-1.0, 9, 9, 9], [-4.0, -0.5, -2.0, float("nan")], [9, 9, 9, 9], [-3.0, -3.0, -0.1, -6.0]], dtype=torch.float64
)


def by_loop(logp, advantages, mask):
    tokens = [(i, k) for i in range(len(mask)) for k in range(mask.shape[1]) if mask[i, k]]
    mean_logp = math.fsum(logp[i, k].item() for i, k in tokens) / len(tokens)
    mean_advantage = math.fsum(advantages[i].item() for i, _ in tokens) / len(tokens)
    return {(i, k): (logp[i, k].item() - mean_logp) * (advantages[i].item() - mean_advantage) for i, k in tokens}


def places(selected):
    return {tuple(place) for place in selected.nonzero().tolist()}


def test_covariance_against_a_loop():
    covariance = token_covariance(LOGP, ADVANTAGES, MASK)
    expected = by_loop(LOGP, ADVANTAGES, MASK)
    for i in range(4):
        for k in range(4):
            assert covariance[i, k].item() == pytest.approx(expected.get((i, k), 0.0), rel=1e-13)  # float64 rounding
    assert covariance.dtype == torch.float64
    # the shares sum to n times the covariance
    pairs = torch.stack([LOGP[MASK], ADVANTAGES[:, None].expand(4, 4)[MASK]])
    assert covariance.sum().item() / 8 == pytest.approx(torch.cov(pairs, correction=0)[0, 1].item(), rel=1e-13)


@pytest.mark.parametrize("fraction", [1e-4, 0.25, 0.5, 0.99, 1.0])
def test_kl_cov_takes_the_largest(fraction):
    generator = torch.Generator().manual_seed(0)
    logp = torch.randn(9, 7, generator=generator) - 2
    advantages = torch.randn(9, generator=generator)
    mask = torch.arange(7) < torch.tensor([7, 1, 0, 3, 5, 7, 2, 4, 6])[:, None]
    settings = LossSettings(kl_cov_fraction=fraction)
    selected = select_tokens(token_covariance(logp, advantages, mask), mask, settings)
    expected = by_loop(logp, advantages, mask)
    count = max(1, int(fraction * 35))
    assert places(selected) == set(sorted(expected, key=expected.get, reverse=True)[:count])


def test_kl_cov_takes_all_that_tie_for_the_last_place():
    covariance = torch.tensor([[0.0, 3.0, -0.0, -1.0], [2.0, -5.0, 0.0, 7.0]], dtype=torch.float64)
    mask = torch.ones(2, 4, dtype=torch.bool)
    mask[1, 3] = False
    chosen = {
        count: places(select_tokens(covariance, mask, LossSettings(kl_cov_fraction=min(1.0, (count + 0.5) / 7))))
        for count in (1, 2, 3, 5, 6, 7)
    }
    assert chosen[1] == {(0, 1)}
    assert chosen[2] == {(0, 1), (1, 0)}
    assert chosen[3] == chosen[5] == {(0, 1), (1, 0), (0, 0), (0, 2), (1, 2)}  # minus zero is zero
    assert chosen[6] == chosen[5] | {(0, 3)}
    assert chosen[7] == places(mask)


def test_clip_cov_chooses_inside_its_bounds():
    covariance = torch.linspace(-2, 7, 60, dtype=torch.float64).reshape(6, 10)
    covariance[0, 0], covariance[0, 1] = 1.0, 5.0  # on a bound is outside
    mask = torch.ones(6, 10, dtype=torch.bool)
    mask[3] = False  # 2.58 to 3.95
    inside = places(mask & (covariance > 1) & (covariance < 5))
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(places(select_tokens(covariance, mask, LossSettings(clip_cov_fraction=0.1))))
        assert draws[-1] < inside
        assert len(draws[-1]) == 5  # of 50 tokens
    assert draws[0] == draws[1] != draws[2]
    assert places(select_tokens(covariance, mask, LossSettings(clip_cov_fraction=0.9))) == inside  # 45 wanted
    none = LossSettings(clip_cov_fraction=0.9, clip_cov_bounds=(10, 11))
    assert not select_tokens(covariance, mask, none).any()
    assert len(places(select_tokens(covariance, mask, LossSettings(clip_cov_fraction=1e-6)))) == 1  # at least


def test_clip_cov_chooses_every_candidate_as_often():
    """N = 3000 draws of 2 out of 8 candidates: each 750 times, give or take z = 4 standard deviations of 23.7."""
    covariance = torch.full((2, 5), 2.0, dtype=torch.float64)
    covariance[:, 0] = 0.0
    mask = torch.ones(2, 5, dtype=torch.bool)
    torch.manual_seed(0)
    counts = sum(select_tokens(covariance, mask, LossSettings(clip_cov_fraction=0.2)).long() for _ in range(3000))
    assert counts[:, 0].tolist() == [0, 0]
    assert ((counts[:, 1:] - 750).abs() < 4 * math.sqrt(3000 * 0.25 * 0.75)).all()


def test_nothing_to_choose_from():
    mask = torch.zeros(0, 1, dtype=torch.bool)
    covariance = token_covariance(torch.zeros(0, 1), torch.zeros(0), mask)
    for settings in (LossSettings(kl_cov_fraction=0.5), LossSettings(clip_cov_fraction=0.5)):
        assert select_tokens(covariance, mask, settings).shape == (0, 1)
    with pytest.raises(ValueError, match="clip_cov_fraction or kl_cov_fraction above 0, got 0 for both"):
        select_tokens(covariance, mask, LossSettings())
