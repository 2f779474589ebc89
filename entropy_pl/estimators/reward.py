"""The price of reward: the expected reward J = E[R] of the E-batch's completions, and how it moves with θ.

R_i is known when the completion ends, so the weight that carries it to θ+ηv is the whole sequence's:
Ĵ(η) = Σ_i w_i R_i / Σ_i w_i, w_i = exp Σ_k r_ik. That is the reducer under ``sequence`` weighting and ``per_sequence``
with R_i as the integrand, so ΔJ and δJ₁ are the entropy's own estimators, their influences included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from entropy_pl.estimators.critic import Baseline, fit_baseline
from entropy_pl.estimators.derivatives import first_order_delta_entropy
from entropy_pl.estimators.estimate import EntropyChange
from entropy_pl.estimators.snis import Clusters, check_stats, entropy_estimate, snis_delta_entropy
from entropy_pl.rollout import TokenStats

Rewards = Tensor | Sequence[float]


def reward_estimate(
    base: TokenStats, rewards: Rewards, *, clusters: Clusters = None, confidence: float = 0.95
) -> EntropyChange:
    """The expected reward J(θ), from completions drawn at θ: their mean.

    Args:
        base: statistics at θ of completions drawn at θ, ``[N, T]``.
        rewards: R_i, ``[N]``. A completion without any token counts as any other, with weight 1.
        clusters: prompt of each sequence, ``[N]``, where prompts repeat.
        confidence: of the interval.

    Returns:
        J in the unit of the reward.

    Source:
        docs/theory.md, §11, "Reward".

    Raises:
        ValueError: for rewards that are not finite, the answer being unknown, or of another shape than ``[N]``; or for
            statistics no estimate can be made of, as :func:`entropy_pl.estimators.snis_delta_entropy`.
    """
    check_stats(base, base=base)
    paid = _with_integrand(base, checked_rewards(rewards, len(base), base.logp.device))
    estimate = entropy_estimate(paid, normalize="per_sequence", clusters=clusters, confidence=confidence)
    return _of_tokens(estimate, base)


def snis_delta_reward(
    base: TokenStats,
    shifted: TokenStats,
    rewards: Rewards,
    *,
    clip_log_weight: float | None = None,
    clusters: Clusters = None,
    confidence: float = 0.95,
) -> EntropyChange:
    """Change of the expected reward, ΔJ(η) = J(π_{θ+ηv}) − J(π_θ), by self-normalized importance sampling.

    Args:
        base: statistics of completions drawn at θ, at θ; ``[N, T]``.
        shifted: of the same tokens, at θ+ηv.
        rewards: R_i, ``[N]``.
        clip_log_weight: bound on the absolute log weight; None is unbiased to O(1/N).
        clusters: prompt of each sequence, ``[N]``, where prompts repeat.
        confidence: of the interval.

    Returns:
        The change in the unit of the reward.

    Source:
        docs/theory.md, §11, "Reward".

    Raises:
        ValueError: as :func:`reward_estimate` and :func:`entropy_pl.estimators.snis_delta_entropy`.

    Example:
        >>> mask = torch.ones(4, 1, dtype=torch.bool)
        >>> logp = torch.tensor([0.75, 0.75, 0.75, 0.25]).log()[:, None]  # a coin with P(heads) = 3/4
        >>> base = TokenStats(logp, torch.full((4, 1), 0.5623351446), mask)
        >>> fair = TokenStats(torch.full((4, 1), 0.5).log(), torch.full((4, 1), 0.6931471806), mask)
        >>> round(snis_delta_reward(base, fair, [1.0, 1.0, 1.0, 0.0]).value, 4)  # heads is right
        -0.25
    """
    check_stats(base, base=base, shifted=shifted)
    integrand = checked_rewards(rewards, len(base), base.logp.device)
    estimate = snis_delta_entropy(
        _with_integrand(base, integrand),
        _with_integrand(shifted, integrand),
        normalize="per_sequence",
        weighting="sequence",
        clip_log_weight=clip_log_weight,
        clusters=clusters,
        confidence=confidence,
    )
    return _of_tokens(estimate, base)


def first_order_delta_reward(
    base: TokenStats,
    tangent: TokenStats,
    rewards: Rewards,
    *,
    baseline: Tensor | None = None,
    clusters: Clusters = None,
    confidence: float = 0.95,
) -> EntropyChange:
    """First-order change of the expected reward per unit η, δJ₁/η = ⟨∇J, v⟩: the mean of Ṡ_i (R_i − R̄).

    Together with :func:`snis_delta_reward` and a baseline, :func:`entropy_pl.estimators.low_variance_delta_entropy`
    gives ΔJ(η) with less noise, as it gives ΔH(η).

    Args:
        base: statistics at θ of completions drawn at θ, ``[N, T]``.
        tangent: their derivatives per unit η, ``[N, T]``; only ṡ matters, R_i does not move with θ.
        rewards: R_i, ``[N]``.
        baseline: ``[N, T]``, a prediction of R_i from the prefix of token k alone (:func:`reward_baseline`), in the
            place of R̄.
        clusters: prompt of each sequence, ``[N]``, where prompts repeat.
        confidence: of the interval.

    Returns:
        The slope in the unit of the reward per unit η.

    Source:
        docs/theory.md, §11, "Reward".

    Raises:
        ValueError: as :func:`reward_estimate` and :func:`entropy_pl.estimators.first_order_delta_entropy`.
    """
    check_stats(base, base=base, tangent=tangent)
    integrand = checked_rewards(rewards, len(base), base.logp.device)
    estimate = first_order_delta_entropy(
        _with_integrand(base, integrand),
        _with_integrand(tangent, torch.zeros_like(integrand)),
        normalize="per_sequence",
        weighting="sequence",
        baseline=baseline,
        clusters=clusters,
        confidence=confidence,
    )
    return _of_tokens(estimate, base)


def reward_baseline(
    kind: Baseline,
    base: TokenStats,
    rewards: Rewards,
    *,
    features: Tensor | None = None,
    gae_lambda: float = 0.95,
    clusters: Clusters = None,
    folds: int = 5,
) -> Tensor | None:
    """A baseline for :func:`first_order_delta_reward`: the return of every token is its completion's R_i.

    Kinds, cross-fitting and what each costs in bias are :func:`entropy_pl.estimators.score_baseline`'s.

    Args:
        kind: ``none``, ``position``, ``critic`` or ``gae``.
        base: statistics at θ of completions drawn at θ, ``[N, T]``.
        rewards: R_i, ``[N]``.
        features: for ``critic`` and ``gae``: one row per completion token in the order of ``base.mask``.
        gae_lambda: λ between 0 and 1; 1 is ``critic`` exactly.
        clusters: prompt of each sequence, ``[N]``, where prompts repeat.
        folds: of the cross-fitting.

    Returns:
        ``[N, T]`` in the unit of the reward, float64, zero where the mask is False; None for ``none``.

    Source:
        docs/theory.md, §9 and §11.

    Raises:
        ValueError: as :func:`reward_estimate` and :func:`entropy_pl.estimators.score_baseline`.
    """
    check_stats(base, base=base)
    returns = checked_rewards(rewards, len(base), base.logp.device)[:, None] * base.mask
    return fit_baseline(
        kind, base, returns, returns, features=features, gae_lambda=gae_lambda, clusters=clusters, folds=folds
    )


def checked_rewards(rewards: Rewards, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Rewards as ``[N]``, float64.

    Args:
        rewards: anything torch can make a tensor of.
        count: N.
        device: of the result.

    Raises:
        ValueError: for another shape, or rewards that are not finite.
    """
    found = torch.as_tensor(rewards, dtype=torch.float64, device=device).detach()
    if found.shape != (count,):
        raise ValueError(f"expected rewards of shape [{count}], one per completion, got {list(found.shape)}")
    unknown = int((~torch.isfinite(found)).sum())
    if unknown:
        raise ValueError(
            f"expected a finite reward for every completion, got {unknown} of {count} that are not: leave out "
            "completions whose answer nobody knows"
        )
    return found


def _with_integrand(stats: TokenStats, x: Tensor) -> TokenStats:
    """The statistics with x_i for an entropy, at the first position, ``Σ_k m_ik h_ik = x_i``.

    That position is made everybody's: a completion without any token has a reward too, and a log ratio of 0.
    """
    mask = stats.mask.clone()
    mask[:, 0] = True
    integrand = torch.nn.functional.pad(x[:, None], (0, mask.shape[1] - 1))
    return TokenStats(torch.where(stats.mask, stats.logp.detach().double(), 0.0), integrand, mask)


def _of_tokens(estimate: EntropyChange, base: TokenStats) -> EntropyChange:
    """With the tokens there really are, the first positions of empty completions not counted."""
    return replace(estimate, n_tokens=int(base.mask.sum()))
