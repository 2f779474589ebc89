"""Which tokens move the entropy, by the theory of Cui et al. 2025 (arXiv 2505.22617), and which of them to hold back.

Over all n tokens of a step's batch, those of all processes,

    cov_ik = (s_ik − s̄)(A_i − Ā),    s_ik = log π(t_ik),    s̄ = Σ_ik s_ik / n,    Ā = Σ_ik A_i / n

is a token's share of the covariance of log-prob and advantage, which in that theory drives the entropy down. Here π is
the policy that *sampled*, so that tokens are chosen once per rollout; the authors' code
(github.com/PRIME-RL/Entropy-Mechanism-of-RL) takes the policy of every update, and leaves out tokens that are clipped
already. At a rollout's first update the two are the same: no ratio has left 1. Both methods hold back max(1, ⌊f n⌋)
tokens, f the fraction; over several processes they are those that one process would hold back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from entropy_pl.objectives.losses import LossSettings, OverProcesses


def token_covariance(
    logp: Tensor, advantages: Tensor, mask: Tensor, total: OverProcesses = lambda sums: sums
) -> Tensor:
    """Covariance of log-prob and advantage, token by token.

    Args:
        logp: s under the policy that sampled, in nats, ``[N, T]``.
        advantages: A, ``[N]``.
        mask: the tokens, ``[N, T]``.
        total: sums over the processes that share the batch, all of which call this function.

    Returns:
        cov, ``[N, T]``, float64, zero where the mask is False.
    """
    logp = torch.where(mask, logp.double(), 0.0)
    spread = torch.where(mask, advantages.double()[:, None], 0.0)
    tokens, logp_sum, advantage_sum = total(torch.stack([mask.sum().double(), logp.sum(), spread.sum()])).tolist()
    tokens = max(tokens, 1.0)
    return torch.where(mask, (logp - logp_sum / tokens) * (spread - advantage_sum / tokens), 0.0)


def select_tokens(
    covariance: Tensor, mask: Tensor, settings: LossSettings, total: OverProcesses = lambda sums: sums
) -> Tensor:
    """The tokens that Clip-Cov or KL-Cov holds back.

    Clip-Cov draws them among those with a covariance strictly inside its bounds, and takes all where there are too few;
    the random numbers are the global torch stream's. KL-Cov takes those with the largest covariance; where several tie
    for the last place, all of them.

    Args:
        covariance: :func:`token_covariance`, ``[N, T]``.
        mask: the tokens, ``[N, T]``.
        settings: which of the two, and its options.
        total: as in :func:`token_covariance`.

    Returns:
        ``[N, T]``, bool.

    Raises:
        ValueError: if the settings want neither.
    """
    if not settings.needs_covariance:
        raise ValueError("expected settings with clip_cov_fraction or kl_cov_fraction above 0, got 0 for both")
    fraction = settings.clip_cov_fraction or settings.kl_cov_fraction
    count = max(1, int(fraction * int(total(mask.sum()))))
    if settings.kl_cov_fraction:
        return _largest(covariance, mask, count, total)
    low, high = settings.clip_cov_bounds
    keys = torch.rand(mask.shape, dtype=torch.float64).to(mask.device)  # on the CPU: the same draw on every device
    return _largest(keys, mask & (covariance > low) & (covariance < high), count, total)


def _largest(keys: Tensor, candidates: Tensor, count: int, total: OverProcesses) -> Tensor:
    """The candidates with the ``count`` largest keys of all processes, by bisection: 64 sums of one integer."""
    ranks = _ordered_integers(keys[candidates])
    low, high = -(2**63), 2**63 - 1  # the threshold; at `low` there are enough, or all
    while low < high:
        middle = (low + high + 1) // 2
        if int(total((ranks >= middle).sum())) >= count:
            low = middle
        else:
            high = middle - 1
    chosen = torch.zeros_like(candidates)
    chosen[candidates] = ranks >= low
    return chosen


def _ordered_integers(values: Tensor) -> Tensor:
    """int64 in the order of the float64: of negative ones, the bits but the sign count downwards."""
    bits = (values + 0.0).view(torch.int64)  # −0 + 0 = 0
    return torch.where(bits < 0, bits ^ (2**63 - 1), bits)
