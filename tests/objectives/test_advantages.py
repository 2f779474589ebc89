import statistics

import pytest
import torch

from entropy_pl.objectives import group_advantages, zero_advantage_groups

REWARDS = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.2, 0.2, 1.0, 0.2])


def test_mean_std():
    # mean 1/2 and unbiased variance 4 · (1/4) / 3 = 1/3; mean 0.4 and variance (3 · 0.04 + 0.36) / 3 = 0.16
    expected = [0.866025, -0.866025, -0.866025, 0.866025, -0.5, -0.5, 1.5, -0.5]
    assert group_advantages(REWARDS, 4, "mean_std", eps=0.0).tolist() == pytest.approx(expected, abs=1e-6)


def test_mean():
    expected = [0.5, -0.5, -0.5, 0.5, -0.2, -0.2, 0.6, -0.2]
    assert group_advantages(REWARDS, 4, "mean").tolist() == pytest.approx(expected)


def test_leave_one_out():
    rewards = REWARDS.tolist()
    expected = []
    for row, reward in enumerate(rewards):
        start = row - row % 4
        others = [rewards[j] for j in range(start, start + 4) if j != row]
        expected.append(reward - statistics.mean(others))
    assert group_advantages(REWARDS, 4, "leave_one_out").tolist() == pytest.approx(expected)


def test_eps_is_added_to_the_standard_deviation():
    assert group_advantages(REWARDS[4:], 4, "mean_std", eps=0.1).tolist() == pytest.approx([-0.4, -0.4, 1.2, -0.4])


@pytest.mark.parametrize("kind", ["mean_std", "mean", "leave_one_out"])
@pytest.mark.parametrize("group_size", [3, 7, 8])
def test_equal_rewards_have_no_advantage_at_all(kind, group_size):
    assert (group_advantages(torch.full((group_size,), 0.7), group_size, kind) == 0).all()


def test_zero_advantage_groups():
    rewards = torch.tensor([0.2, 0.2, 0.2, 1.0, 1.0, 1.0, 0.0, 0.0, 1e-7])
    assert zero_advantage_groups(rewards, 3).tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((REWARDS, 3, "mean"), r"multiple of group_size=3, got torch.float32 of shape \[8\]"),
        ((REWARDS[:, None], 4, "mean"), r"shape \[8, 1\]"),
        ((REWARDS.long(), 4, "mean"), "torch.int64"),
        ((REWARDS, 1, "mean"), "at least 2 completions, got group_size=1"),
        ((REWARDS, 4, "median"), r"\['mean_std', 'mean', 'leave_one_out'\], got 'median'"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(*arguments)
