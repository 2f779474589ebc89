"""Predictions of a token's entropy change from the literature, and how well they agree with what was attributed.

A prediction is ``[N, T]``, positive where the token's term of the loss should raise the entropy, right up to a positive
scale, and zero where the mask is False.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import rankdata
from torch import Tensor

from entropy_pl.estimators.estimate import cluster_index, student_t
from entropy_pl.estimators.jackknife import jackknife_standard_error
from entropy_pl.estimators.snis import Clusters

Array = npt.NDArray[np.float64]


def covariance_prediction(logp: Tensor, advantages: Tensor, mask: Tensor, weights: Tensor | None = None) -> Tensor:
    """Cui et al. 2025 (arXiv 2505.22617): −(log π(t_ik) − mean) (A_i − mean), whose mean over tokens is −Cov(log π, A).

    Args:
        logp: log π(t_ik) in nats, ``[N, T]``.
        advantages: A_i, ``[N]``.
        mask: m_ik, ``[N, T]``. Both means run over its tokens, not over completions.
        weights: of every token in the loss, ``[N, T]``, by which the prediction is multiplied: what a token moves is
            proportional to its weight.

    Returns:
        ``[N, T]``, float64, zero where the mask is False.

    Source:
        Cui et al. 2025, arXiv 2505.22617.

    Raises:
        ValueError: for shapes that disagree, or no token at all.
    """
    advantage = _per_token(advantages, mask, logp=logp, weights=weights)
    s, a = logp.detach().double(), advantage
    prediction = -(s - s[mask].mean()) * (a - a[mask].mean())
    return _weighted(prediction, mask, weights)


def steer_prediction(
    logp: Tensor,
    entropy: Tensor,
    advantages: Tensor,
    mask: Tensor,
    old_logp: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """STEER (arXiv 2510.10150): −Ω, Ω = (A/π_old) π(1−π) (ln π + H).

    (A/π_old) π(1−π) is how far a policy-gradient step moves the logit of the token that was drawn; to first order that
    logit alone moves the entropy by −π (ln π + H) times as much, and −Ω is this without its factor π > 0. What the step
    does to the other logits is left out.

    Args:
        logp: ln π(t_ik) in nats, ``[N, T]``.
        entropy: H of the distribution that t_ik was drawn from, in nats, ``[N, T]``.
        advantages: A_i, ``[N]``.
        mask: m_ik, ``[N, T]``.
        old_logp: ln π_old(t_ik) of the policy that sampled, ``[N, T]``; None: π itself.
        weights: of every token in the loss, ``[N, T]``, as for :func:`covariance_prediction`.

    Returns:
        ``[N, T]``, float64, zero where the mask is False.

    Source:
        arXiv 2510.10150.

    Raises:
        ValueError: for shapes that disagree, or no token at all.
    """
    advantage = _per_token(advantages, mask, logp=logp, entropy=entropy, old_logp=old_logp, weights=weights)
    s = logp.detach().double()
    ratio = torch.ones_like(s) if old_logp is None else (s - old_logp.detach().double()).exp()
    prediction = advantage * ratio * torch.expm1(s) * (s + entropy.detach().double())  # expm1(ln π) = −(1 − π)
    return _weighted(prediction, mask, weights)


@dataclass(frozen=True)
class Agreement:
    """How well a prediction does, token by token. NaN where there is nothing to say, such as for a constant.

    Args:
        pearson: correlation of predicted and attributed over tokens.
        pearson_stderr: by the jackknife, prompts left out whole.
        pearson_ci_low: lower end of the interval (Student's t, groups − 1 degrees of freedom), not below −1.
        pearson_ci_high: upper end, not above 1.
        spearman: correlation of the ranks.
        spearman_stderr: as of ``pearson``.
        spearman_ci_low: likewise.
        spearman_ci_high: likewise.
        sign_agreement: share of Σ|attributed| that is on tokens whose sign was predicted.
        n_tokens: tokens.
    """

    pearson: float
    pearson_stderr: float
    pearson_ci_low: float
    pearson_ci_high: float
    spearman: float
    spearman_stderr: float
    spearman_ci_low: float
    spearman_ci_high: float
    sign_agreement: float
    n_tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Every field as a plain number, None where it is NaN."""
        return {name: None if math.isnan(x) else x for name, x in asdict(self).items()}


def agreement(
    predicted: Tensor,
    attributed: Tensor,
    mask: Tensor,
    *,
    clusters: Clusters = None,
    groups: int = 20,
    confidence: float = 0.95,
) -> Agreement:
    """Correlation, rank correlation and agreement in sign of a prediction with the attributed change.

    The tokens of a prompt are not independent: error bars are :func:`entropy_pl.estimators.jackknife_standard_error`'s,
    with whole prompts left out. Of a single prompt there is none (NaN).

    Args:
        predicted: ``[N, T]``.
        attributed: what the tokens really did, ``[N, T]``, in any unit.
        mask: m_ik, ``[N, T]``.
        clusters: prompt of each sequence, ``[N]``, where prompts repeat.
        groups: of prompts to leave out in turn; at most one per prompt is used.
        confidence: of the intervals.

    Returns:
        Correlations, which have no unit, with their error bars, and the share of agreement in sign.

    Source:
        Pearson's and Spearman's coefficients by their definitions; the error bars, docs/theory.md, §3.

    Raises:
        ValueError: for shapes that disagree, no token at all, numbers that are not finite, fewer than 2 groups, or a
            confidence outside (0, 1).
    """
    _check_shapes(mask, predicted=predicted, attributed=attributed)
    if groups < 2:
        raise ValueError(f"expected at least 2 groups to leave out, got {groups}")
    rows = mask.nonzero()[:, 0].cpu().numpy()
    x, y = _numbers("predicted", predicted, mask), _numbers("attributed", attributed, mask)
    n_clusters = int(cluster_index(clusters, len(mask)).max()) + 1
    reach = student_t(confidence, max(2, min(groups, n_clusters)))

    def with_error_bar(correlation: Callable[[Array, Array], float]) -> tuple[float, float, float, float]:
        def over(sequences: Tensor) -> float:
            kept = np.zeros(len(mask), dtype=bool)
            kept[sequences.numpy()] = True
            return correlation(x[kept[rows]], y[kept[rows]])

        value, stderr = correlation(x, y), math.nan
        if n_clusters > 1:
            stderr = jackknife_standard_error(over, len(mask), clusters=clusters, groups=groups)
        margin = reach * stderr
        return value, stderr, float(np.clip(value - margin, -1, 1)), float(np.clip(value + margin, -1, 1))

    size = np.abs(y)
    same = float(size[np.sign(x) == np.sign(y)].sum() / size.sum()) if size.any() else math.nan
    return Agreement(*with_error_bar(_pearson), *with_error_bar(_spearman), sign_agreement=same, n_tokens=len(x))


def _numbers(name: str, values: Tensor, mask: Tensor) -> Array:
    numbers = values.detach()[mask].double().cpu().numpy()
    bad = int((~np.isfinite(numbers)).sum())
    if bad:
        raise ValueError(f"expected finite numbers in {name}, got {bad} of {len(numbers)} tokens that are not")
    return numbers


def _spearman(x: Array, y: Array) -> float:
    return _pearson(rankdata(x), rankdata(y))  # equal numbers share their mean rank


def _pearson(x: Array, y: Array) -> float:
    """NaN for a constant: rounding must not pass for variation."""
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    x, y = x - x.mean(), y - y.mean()
    # each scaled first: squares of changes of 1e-200 would be 0
    x, y = x / np.abs(x).max(), y / np.abs(y).max()
    return float(np.clip(x @ y / math.sqrt((x @ x) * (y @ y)), -1, 1))


def _per_token(advantages: Tensor, mask: Tensor, **arrays: Tensor | None) -> Tensor:
    """A_i at every token, ``[N, T]``, float64, the shapes of everything checked."""
    _check_shapes(mask, **arrays)
    if advantages.shape != mask.shape[:1]:
        raise ValueError(
            f"expected advantages of shape [{len(mask)}], one per completion, got {list(advantages.shape)}"
        )
    return advantages.detach().double()[:, None].expand(mask.shape)


def _check_shapes(mask: Tensor, **arrays: Tensor | None) -> None:
    for name, x in arrays.items():
        if x is not None and x.shape != mask.shape:
            raise ValueError(f"expected {name} of the mask's shape {list(mask.shape)}, got {list(x.shape)}")
    if not mask.any():
        raise ValueError("expected at least one completion token, got an empty mask: every completion is empty")


def _weighted(prediction: Tensor, mask: Tensor, weights: Tensor | None) -> Tensor:
    if weights is not None:
        prediction = prediction * weights.detach().double()
    return torch.where(mask, prediction, 0.0)
