"""An estimate and its error bar, from a value and the influence of every sequence on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import stats
from torch import Tensor

TRUSTED_ESS = 0.5
"""Share of the sequences below which an effective sample size makes an importance-sampled estimate untrustworthy.

Particle filters resample at the same share. What it is worth here, against exact answers, is in docs/reliability.md,
"When the importance weights collapse"."""


@dataclass(frozen=True, eq=False)
class EntropyChange:
    """An entropy, a change of it or a derivative of it, in nats, with its error bar and the health of its weights.

    Of an expected reward likewise, in the unit of the reward (:mod:`entropy_pl.estimators.reward`).

    Args:
        value: the estimate; a derivative is per unit η (first order) or η² (second order).
        stderr: standard error from the influences, clustered by prompt where prompts repeat.
        ci_low: lower end of the confidence interval (Student's t, clusters − 1 degrees of freedom).
        ci_high: upper end.
        ess: Kish effective sample size of the full-sequence weights, ``(Σw)²/Σw²``.
        ess_min: the smallest effective sample size over completion positions (``prefix`` weighting), else ``ess``.
        max_abs_log_weight: largest absolute log importance weight in use, before clipping.
        clip_fraction: share of the weights in use that clipping changed.
        n_sequences: N.
        n_tokens: completion tokens.
        influence: ``ψ_i`` of every sequence, ``[N]``, float64, mean zero; SE = sd(ψ)/√N.
    """

    value: float
    stderr: float
    ci_low: float
    ci_high: float
    ess: float
    ess_min: float
    max_abs_log_weight: float
    clip_fraction: float
    n_sequences: int
    n_tokens: int
    influence: Tensor

    @property
    def trustworthy(self) -> bool:
        """Whether value and interval may be believed: ``ess_min`` is at least half the sequences.

        Below that the intervals hold the truth too seldom. It is a necessary condition, judged by the weights that were
        drawn: heavy ones that were not drawn are missing from the ESS as well. Derivatives have no weights, and pass.
        """
        return self.ess_min >= TRUSTED_ESS * self.n_sequences

    def scaled(self, factor: float) -> EntropyChange:
        """The same estimate times a number: δH₁(η) from δH₁ per unit η."""
        low, high = sorted((self.ci_low * factor, self.ci_high * factor))
        return replace(
            self,
            value=self.value * factor,
            stderr=self.stderr * abs(factor),
            ci_low=low,
            ci_high=high,
            influence=self.influence * factor,
        )

    def with_stderr(self, stderr: float) -> EntropyChange:
        """The same value with a standard error from elsewhere; the interval widens in proportion."""
        widen = stderr / self.stderr if self.stderr else 1.0
        low, high = (self.value + widen * (end - self.value) for end in (self.ci_low, self.ci_high))
        return replace(self, stderr=stderr, ci_low=low, ci_high=high)

    def to_dict(self) -> dict[str, Any]:
        """Every field but the influences, as plain numbers, and ``trustworthy``."""
        plain = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "influence"}
        return plain | {"trustworthy": self.trustworthy}

    def __str__(self) -> str:
        return f"{self.value:.4g} ± {self.stderr:.2g}"


def standard_error(influence: Tensor, clusters: Tensor | Sequence[int] | None = None) -> tuple[float, int]:
    """Standard error of an asymptotically linear estimator, and the number of independent clusters behind it.

    ``SE² = C/(C−1) · Σ_c (Σ_{i∈c} ψ_i)² / N²``; with one sequence per cluster this is ``sd(ψ)/√N``.

    Args:
        influence: ``ψ_i``, ``[N]``, mean zero.
        clusters: prompt of each sequence, ``[N]``, any labels; None: every sequence is its own.

    Raises:
        ValueError: if there are fewer than two clusters, or ``clusters`` has another length.
    """
    matrix, count = covariance(influence[None], clusters)
    return float(np.sqrt(matrix[0, 0])), count


def covariance(
    influences: Tensor, clusters: Tensor | Sequence[int] | None = None
) -> tuple[npt.NDArray[np.float64], int]:
    """Covariances of asymptotically linear estimators of the same sequences, and the number of clusters behind them.

    ``Cov_ab = C/(C−1) · Σ_c (Σ_{i∈c} ψ_ai) (Σ_{i∈c} ψ_bi) / N²``; the diagonal is :func:`standard_error` squared.

    Args:
        influences: ``ψ_ai``, one row per estimator, ``[K, N]``, each of mean zero.
        clusters: prompt of each sequence, ``[N]``, any labels; None: every sequence is its own.

    Returns:
        The covariances, ``[K, K]``, and C.

    Raises:
        ValueError: as :func:`standard_error`.
    """
    psi = influences.detach().double().cpu().numpy()
    index = cluster_index(clusters, psi.shape[1])
    sums = np.stack([np.bincount(index, weights=row) for row in psi])
    count = sums.shape[1]
    if count < 2:
        raise ValueError(
            f"expected at least 2 {'sequences' if clusters is None else 'clusters'} for an error bar, got {count}: "
            + ("draw more completions" if clusters is None else "completions of one prompt are one cluster, take more")
        )
    return count / (count - 1) * (sums @ sums.T) / psi.shape[1] ** 2, count


def cluster_index(clusters: Tensor | Sequence[int] | None, count: int) -> npt.NDArray[np.intp]:
    """The cluster of every sequence, numbered 0 … C−1 in the order of the labels, ``[N]``.

    Args:
        clusters: prompt of each sequence, ``[N]``, any labels; None: every sequence is its own.
        count: N.

    Raises:
        ValueError: if ``clusters`` has another length.
    """
    if clusters is None:
        return np.arange(count)
    labels = np.asarray(clusters.cpu() if isinstance(clusters, Tensor) else clusters)
    if labels.shape != (count,):
        raise ValueError(f"expected clusters of shape [{count}], one label per sequence, got {labels.shape}")
    return np.unique(labels, return_inverse=True)[1]


def make_estimate(
    value: Tensor,
    influence: Tensor,
    *,
    clusters: Tensor | Sequence[int] | None,
    confidence: float,
    mask: Tensor,
    ess: float | None = None,
    ess_min: float | None = None,
    max_abs_log_weight: float = 0.0,
    clip_fraction: float = 0.0,
) -> EntropyChange:
    """Put the error bar on a value: standard error and Student's t interval from its influences.

    For an estimator of one's own: see docs/extending.md.

    Args:
        value: the estimate, a scalar, nats or whatever it is in.
        influence: ψ_i, ``[N]``, mean zero, the unit of ``value``: what sequence i adds to N times the estimate's error.
        clusters: prompt of each sequence, ``[N]``, where prompts repeat; None: every sequence is its own.
        confidence: of the interval.
        mask: m_ik, ``[N, T]``, for the count of tokens.
        ess: effective sample size of the full-sequence weights; None: N, there are no weights.
        ess_min: its minimum over positions; likewise.
        max_abs_log_weight: the largest absolute log weight in use.
        clip_fraction: share of the weights that were clipped.

    Returns:
        The estimate with standard error, interval and influences.

    Source:
        docs/theory.md, §3.

    Raises:
        ValueError: if ``confidence`` is not between 0 and 1, or the clusters are too few.
    """
    return EntropyChange(
        **_error_bar(float(value), influence, clusters, confidence),
        ess=float(len(mask)) if ess is None else ess,
        ess_min=float(len(mask)) if ess_min is None else ess_min,
        max_abs_log_weight=max_abs_log_weight,
        clip_fraction=clip_fraction,
        n_tokens=int(mask.sum()),
    )


def linear_combination(
    terms: Sequence[tuple[float, EntropyChange]],
    *,
    clusters: Tensor | Sequence[int] | None = None,
    confidence: float = 0.95,
) -> EntropyChange:
    """Σ_a c_a·estimate_a of one batch: values and influences add, so noise that the terms share cancels or adds up.

    Args:
        terms: pairs (c_a, estimate_a), all of the same N sequences in the same order.
        clusters: prompt of each sequence, ``[N]``, where prompts repeat.
        confidence: of the interval.

    Returns:
        The combination in the unit of c·estimate; of weights' health and token counts the worst among the terms
        (smallest ``ess``, ``ess_min`` and ``n_tokens``, largest ``max_abs_log_weight`` and ``clip_fraction``).

    Source:
        docs/theory.md, §3.

    Raises:
        ValueError: for no term at all, terms of different numbers of sequences, or as :func:`standard_error`.
    """
    if not terms:
        raise ValueError("expected at least one (factor, estimate) to combine, got none")
    estimates = [estimate for _, estimate in terms]
    check_same_sequences(estimates)
    influence = torch.stack([factor * estimate.influence for factor, estimate in terms]).sum(0)
    value = sum(factor * estimate.value for factor, estimate in terms)
    return EntropyChange(
        **_error_bar(value, influence, clusters, confidence),
        ess=min(estimate.ess for estimate in estimates),
        ess_min=min(estimate.ess_min for estimate in estimates),
        max_abs_log_weight=max(estimate.max_abs_log_weight for estimate in estimates),
        clip_fraction=max(estimate.clip_fraction for estimate in estimates),
        n_tokens=min(estimate.n_tokens for estimate in estimates),
    )


def check_same_sequences(estimates: Sequence[EntropyChange]) -> None:
    """Refuse to combine estimates whose influences do not belong to the same N sequences.

    Raises:
        ValueError: naming the numbers of sequences.
    """
    counts = [estimate.n_sequences for estimate in estimates]
    if len(set(counts)) > 1:
        raise ValueError(
            f"expected estimates of the same sequences, got {counts} of them: influences add sequence by sequence, "
            "so every term must come from one batch"
        )


def student_t(confidence: float, count: int) -> float:
    """How many standard errors an interval reaches to either side: Student's t with ``count`` − 1 degrees of freedom.

    Raises:
        ValueError: if ``confidence`` is not between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"expected a confidence between 0 and 1, such as 0.95, got {confidence}")
    return float(stats.t.ppf(0.5 + confidence / 2, count - 1))


def _error_bar(
    value: float, influence: Tensor, clusters: Tensor | Sequence[int] | None, confidence: float
) -> dict[str, Any]:
    """The fields of an :class:`EntropyChange` that follow from its value and its influences."""
    stderr, count = standard_error(influence, clusters)
    margin = student_t(confidence, count) * stderr
    return {
        "value": value,
        "stderr": stderr,
        "ci_low": value - margin,
        "ci_high": value + margin,
        "n_sequences": len(influence),
        "influence": influence.detach().to(torch.float64),
    }


def interval(value: float, stderr: float, count: int, confidence: float) -> tuple[float, float]:
    """The confidence interval of an estimate: Student's t with ``count`` − 1 degrees of freedom, to either side.

    Args:
        value: the estimate, in any unit.
        stderr: its standard error, in the same unit.
        count: independent clusters behind the standard error: prompts, where prompts repeat.
        confidence: of the interval, between 0 and 1.

    Returns:
        Lower and upper end, in the unit of ``value``; NaN where that or ``stderr`` is, or of fewer than 2 clusters.

    Source:
        docs/theory.md, §3.

    Raises:
        ValueError: if ``confidence`` is not between 0 and 1.
    """
    margin = student_t(confidence, count) * stderr
    return value - margin, value + margin
