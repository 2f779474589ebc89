"""Losses and advantages: what sums must come to, and what they do not depend on."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from strategies import MANY, batches

from entropy_pl.objectives import AdvantageKind, LossSettings, LossType, group_advantages, policy_loss, token_weights

loss_types = st.sampled_from(get_args(LossType))
kinds = st.sampled_from(get_args(AdvantageKind))
LONGEST = 9  # dr_grpo's constant


@MANY
@given(batches(), loss_types)
def test_weights_sum_to_their_definition(batch, loss_type):
    """1 where every completion or every token counts once (empty completions count and weigh nothing)."""
    mask = batch.base.mask.tolist()
    lengths = [sum(row) for row in mask]
    expected = {
        "grpo": sum(1 for length in lengths if length) / len(lengths),
        "dr_grpo": sum(lengths) / (len(lengths) * LONGEST),
        "dapo": 1.0,
        "bnpo": 1.0,
    }[loss_type]
    weights = token_weights(batch.base.mask, loss_type, LONGEST, dtype=torch.float64)
    assert float(weights.sum()) == pytest.approx(expected, rel=1e-12)  # at most 72 terms of one sign
    assert not weights[~batch.base.mask].any()


@MANY
@given(
    batch=batches(),
    loss_type=loss_types,
    clips=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    kl=st.sampled_from([0.0, 0.3]),
    sign=st.sampled_from(["both", "positive", "negative"]),
    cut=st.integers(0, 9),
)
def test_micro_batches_add_up_in_any_order(batch, loss_type, clips, kl, sign, cut):
    """Losses, gradients and metrics of two parts of a shuffled batch are those of the whole."""
    settings = LossSettings(loss_type, *clips, kl_coefficient=kl, max_completion_length=LONGEST, advantage_sign=sign)
    mask, N = batch.base.mask, len(batch.base)
    advantages, reference = batch.randn(N), batch.base.logp + 0.1 * batch.randn(*mask.shape)
    weights = token_weights(mask, loss_type, LONGEST, dtype=torch.float64)
    order = batch.permutation()

    def loss_of(*parts: torch.Tensor) -> list[torch.Tensor]:
        logp = batch.shifted.logp.clone().requires_grad_()
        made = [
            policy_loss(
                logp[rows], batch.base.logp[rows], advantages[rows], weights[rows], settings, ref_logp=reference[rows]
            )
            for rows in parts
        ]
        sum(part.loss for part in made).backward()
        sums = [sum(getattr(part, name) for part in made) for name in ("num_tokens", "clipped_low", "clipped_high")]
        return [sum(part.loss for part in made).detach(), logp.grad, sum(part.kl_sum for part in made), *sums]

    for one, other in zip(loss_of(torch.arange(N)), loss_of(order[:cut], order[cut:]), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-10)


@st.composite
def rewards(draw: DrawFn) -> tuple[torch.Tensor, int]:
    """Of whole groups; a few values only, so that groups of equal ones are among them."""
    size, groups = draw(st.integers(2, 5)), draw(st.integers(1, 4))
    values = draw(st.lists(st.sampled_from([0.0, 0.2, 1.0]), min_size=size * groups, max_size=size * groups))
    return torch.tensor(values, dtype=torch.float64), size


@MANY
@given(rewards(), kinds, st.floats(-3, 3))
def test_advantages(given_rewards, kind, shift):
    """By loops; they sum to zero in every group, and a constant added to all rewards changes none of them."""
    values, size = given_rewards
    found = group_advantages(values, size, kind)
    for start in range(0, len(values), size):
        group = values[start : start + size].tolist()
        mean = sum(group) / size
        spread = (sum((x - mean) ** 2 for x in group) / (size - 1)) ** 0.5
        expected = {
            "mean": [x - mean for x in group],
            "leave_one_out": [x - (sum(group) - x) / (size - 1) for x in group],
            "mean_std": [(x - mean) / (spread + 1e-4) for x in group],
        }[kind]
        assert found[start : start + size].tolist() == pytest.approx(expected, rel=1e-9, abs=1e-11)
    assert found.view(-1, size).sum(1).abs().max() < 1e-10
    # differences of rewards moved by 3 are off by 4e-16, which 1/(σ + 1e-4) makes 1e-11 at most
    torch.testing.assert_close(group_advantages(values + shift, size, kind), found, rtol=1e-9, atol=1e-10)
