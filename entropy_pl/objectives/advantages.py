"""Advantages of completions over the others of their group (the completions of one prompt)."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

AdvantageKind = Literal["mean_std", "mean", "leave_one_out"]
"""What rewards are compared with, and in which unit: see :func:`group_advantages`."""


def group_advantages(rewards: Tensor, group_size: int, kind: AdvantageKind = "mean_std", eps: float = 1e-4) -> Tensor:
    """Advantage of each completion within its group of G.

    With r̄ the mean and σ the unbiased standard deviation of the group's rewards::

        mean_std       (r − r̄) / (σ + eps)             GRPO, arXiv 2402.03300
        mean            r − r̄                          Dr. GRPO, arXiv 2503.20783
        leave_one_out   r − mean of the other G − 1     RLOO, arXiv 2402.14740

    A group of equal rewards has advantages of exactly zero, whatever the kind.

    Args:
        rewards: ``[N]``, prompt-major: row ``p * G + g`` is completion g of prompt p.
        group_size: G, at least 2.
        kind: one of the above.
        eps: keeps ``mean_std`` finite.

    Returns:
        ``[N]``, of the rewards' dtype.

    Raises:
        ValueError: for an unknown kind, or rewards that do not divide into groups.
    """
    if kind not in get_args(AdvantageKind):
        raise ValueError(f"expected an advantage kind out of {list(get_args(AdvantageKind))}, got {kind!r}")
    # in float64 the mean of equal float32 rewards is that very reward, and their advantage exactly zero
    groups = _grouped(rewards, group_size).double()
    centred = groups - groups.mean(1, keepdim=True)
    if kind == "mean_std":
        centred = centred / (groups.std(1, keepdim=True) + eps)
    elif kind == "leave_one_out":
        centred = centred * (group_size / (group_size - 1))
    return centred.flatten().to(rewards.dtype)


def zero_advantage_groups(rewards: Tensor, group_size: int) -> Tensor:
    """Which groups teach nothing, their rewards being all equal.

    Args:
        rewards: ``[N]``, prompt-major.
        group_size: G, at least 2.

    Returns:
        ``[N / G]``, bool.

    Raises:
        ValueError: if the rewards do not divide into groups.
    """
    groups = _grouped(rewards, group_size)
    return (groups == groups[:, :1]).all(1)


def _grouped(rewards: Tensor, group_size: int) -> Tensor:
    if group_size < 2:
        raise ValueError(f"expected groups of at least 2 completions, got group_size={group_size}")
    if rewards.ndim != 1 or len(rewards) % group_size or not rewards.is_floating_point():
        raise ValueError(
            f"expected floating-point rewards [N] with N a multiple of group_size={group_size}, "
            f"got {rewards.dtype} of shape {list(rewards.shape)}"
        )
    return rewards.reshape(-1, group_size)
