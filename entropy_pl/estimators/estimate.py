"""An estimate and its error bar, from a value and the influence of every sequence on it, and when not to believe it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from numbers import Real
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
MEAN_WEIGHT_ERRORS, MEAN_WEIGHT_TOLERANCE = 4.0, 0.02
"""The mean importance weight may be so many of its standard errors, or else this far, from its expectation of 1.

At N = 256 four standard errors give no false alarm below a standard deviation of the log-weights of 0.05, and one in a
thousand at 0.8; the tolerance lets pass what rounding does to weights that hardly vary."""
FEWEST_SEQUENCES, FEWEST_CLUSTERS = 64, 8
"""Below so many sequences, or prompts, an error bar is itself too uncertain to be believed."""
NOT_JSON = ("influence", "clusters")


@dataclass(frozen=True)
class Weights:
    """What the importance weights behind an estimate are like; the default is that of an estimate without weights.

    Args:
        ess: Kish effective sample size of the full-sequence weights, ``(Σw)²/Σw²``; None: N.
        ess_min: its minimum over completion positions where the weights differ by position; None: N.
        mean: of the full-sequence weights before clipping. Its expectation is exactly 1.
        mean_stderr: standard error of ``mean``, clustered by prompt.
        max_abs_log: the largest absolute log weight in use, before clipping.
        clip_fraction: share of the weights in use that clipping changed.
    """

    ess: float | None = None
    ess_min: float | None = None
    mean: float = 1.0
    mean_stderr: float = 0.0
    max_abs_log: float = 0.0
    clip_fraction: float = 0.0


@dataclass(frozen=True, eq=False)
class EntropyChange:
    """An entropy, a change of it or a derivative of it, in nats, with its error bar and the health of its weights.

    Of an expected reward likewise, in the unit of the reward (:mod:`entropy_pl.estimators.reward`).

    Args:
        value: the estimate; a derivative is per unit η (first order) or η² (second order). NaN where it is withheld.
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
        mean_weight: mean of the full-sequence weights before clipping, whose expectation is exactly 1.
        mean_weight_stderr: its standard error.
        clusters: prompt of each sequence, ``[N]``, where prompts repeat; None: every sequence is its own.
        confidence: of the interval.
        withheld: why the value is withheld, a sentence; None where it is not.
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
    mean_weight: float = 1.0
    mean_weight_stderr: float = 0.0
    clusters: Tensor | None = None
    confidence: float = 0.95
    withheld: str | None = None

    @property
    def n_clusters(self) -> int:
        """Independent clusters behind the error bar: prompts, where prompts repeat, else sequences."""
        return self.n_sequences if self.clusters is None else len(self.clusters.unique())

    @property
    def collapsed(self) -> str | None:
        """What the importance weights have against the estimate, in words: too few of them carry it."""
        if self.ess_min >= TRUSTED_ESS * self.n_sequences:
            return None
        return (
            f"The effective sample size is {self.ess_min:.3g} of {self.n_sequences} sequences, less than half: the "
            "estimate and its error bar rest on a few heavy importance weights."
        )

    @property
    def off_balance(self) -> str | None:
        """What their mean has against it: weights heavier than those drawn are missing."""
        distance = abs(self.mean_weight - 1)
        if distance <= max(MEAN_WEIGHT_ERRORS * self.mean_weight_stderr, MEAN_WEIGHT_TOLERANCE):
            return None
        return (
            f"The mean importance weight is {self.mean_weight:.3f} ± {self.mean_weight_stderr:.3f}, where 1 is "
            "expected: completions with heavy weights were not drawn, so the estimate is biased. Measure the other way "
            "round (completions drawn at the far end), at a smaller η, or through intermediate points."
        )

    @property
    def too_few(self) -> str | None:
        """What the number of sequences, or of their prompts, has against it."""
        if self.n_sequences >= FEWEST_SEQUENCES and self.n_clusters >= FEWEST_CLUSTERS:
            return None
        return (
            f"The E-batch has {self.n_sequences} sequences of {self.n_clusters} prompts. Below "
            f"{FEWEST_SEQUENCES} sequences or {FEWEST_CLUSTERS} prompts an error bar is itself too uncertain: draw "
            "more completions, of more prompts."
        )

    @property
    def warnings(self) -> tuple[str, ...]:
        """Why value and interval must not be believed, a sentence or two each; empty where they may be.

        Withheld values, an effective sample size below half the sequences, a mean importance weight that is not 1, and
        fewer than 64 sequences or 8 prompts. Derivatives at θ have no weights.
        """
        return tuple(why for why in (self.withheld, self.collapsed, self.off_balance, self.too_few) if why)

    @property
    def trustworthy(self) -> bool:
        """Whether value and interval may be believed: there are no :attr:`warnings`."""
        return not self.warnings

    def __add__(self, other: EntropyChange) -> EntropyChange:
        """The sum of two estimates of one batch: their influences add, so that the noise they share is counted once.

        Raises:
            ValueError: for estimates of different sequences, prompts or confidence.
        """
        return linear_combination([(1.0, self), (1.0, other)]) if isinstance(other, EntropyChange) else NotImplemented

    def __sub__(self, other: EntropyChange) -> EntropyChange:
        """The difference of two estimates of one batch, in which the noise they share cancels; errors as for a sum."""
        return linear_combination([(1.0, self), (-1.0, other)]) if isinstance(other, EntropyChange) else NotImplemented

    def __mul__(self, factor: float) -> EntropyChange:
        """The estimate times a number: value, interval and influences alike."""
        return self.scaled(factor) if isinstance(factor, Real) else NotImplemented

    __rmul__ = __mul__

    def __neg__(self) -> EntropyChange:
        return self.scaled(-1.0)

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
        low, high = interval(self.value, stderr, self.n_clusters, self.confidence)
        return replace(self, stderr=stderr, ci_low=low, ci_high=high)

    def withheld_because(self, reason: str) -> EntropyChange:
        """The same estimate without its value and error bar, which must not be used.

        Args:
            reason: why, a sentence for its readers.
        """
        nan, unknown = math.nan, torch.full_like(self.influence, math.nan)
        return replace(self, value=nan, stderr=nan, ci_low=nan, ci_high=nan, influence=unknown, withheld=reason)

    def to_dict(self) -> dict[str, Any]:
        """Every field but the arrays, as plain numbers, with ``n_clusters``, ``trustworthy`` and ``warnings``."""
        plain = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in NOT_JSON}
        plain = {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in plain.items()}
        del plain["withheld"]  # the first of the warnings
        return plain | {
            "n_clusters": self.n_clusters,
            "trustworthy": self.trustworthy,
            "warnings": list(self.warnings),
        }

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
    weights: Weights | None = None,
) -> EntropyChange:
    """Put the error bar on a value: standard error and Student's t interval from its influences.

    For an estimator of one's own: see docs/extending.md.

    Args:
        value: the estimate, a scalar, nats or whatever it is in.
        influence: ψ_i, ``[N]``, mean zero, the unit of ``value``: what sequence i adds to N times the estimate's error.
        clusters: prompt of each sequence, ``[N]``, where prompts repeat; None: every sequence is its own.
        confidence: of the interval.
        mask: m_ik, ``[N, T]``, for the count of tokens.
        weights: the importance weights behind it; None: there are none.

    Returns:
        The estimate with standard error, interval and influences.

    Source:
        docs/theory.md, §3.

    Raises:
        ValueError: if ``confidence`` is not between 0 and 1, or the clusters are too few.
    """
    weights = Weights() if weights is None else weights
    N = len(mask)
    return _estimate(
        float(value),
        influence,
        None if clusters is None else torch.as_tensor(clusters),
        confidence,
        ess=float(N) if weights.ess is None else weights.ess,
        ess_min=float(N) if weights.ess_min is None else weights.ess_min,
        mean_weight=weights.mean,
        mean_weight_stderr=weights.mean_stderr,
        max_abs_log_weight=weights.max_abs_log,
        clip_fraction=weights.clip_fraction,
        n_tokens=int(mask.sum()),
    )


def linear_combination(terms: Sequence[tuple[float, EntropyChange]]) -> EntropyChange:
    """Σ_a c_a·estimate_a of one batch: values and influences add, so noise that the terms share cancels or adds up.

    Args:
        terms: pairs (c_a, estimate_a), all of the same N sequences in the same order, with the same clusters and
            confidence; those are the combination's.

    Returns:
        The combination in the unit of c·estimate; of weights' health and token counts the worst among the terms
        (smallest ``ess``, ``ess_min`` and ``n_tokens``, largest ``max_abs_log_weight`` and ``clip_fraction``, the
        ``mean_weight`` farthest from 1). Withheld if one of the terms is.

    Source:
        docs/theory.md, §3.

    Raises:
        ValueError: for no term at all, or terms of different sequences, clusters or confidence.
    """
    if not terms:
        raise ValueError("expected at least one (factor, estimate) to combine, got none")
    estimates = [estimate for _, estimate in terms]
    check_same_sequences(estimates)
    withheld = next((estimate for estimate in estimates if estimate.withheld), None)
    if withheld is not None:
        return withheld
    farthest = max(estimates, key=lambda estimate: abs(estimate.mean_weight - 1))
    return _estimate(
        sum(factor * estimate.value for factor, estimate in terms),
        torch.stack([factor * estimate.influence for factor, estimate in terms]).sum(0),
        estimates[0].clusters,
        estimates[0].confidence,
        ess=min(estimate.ess for estimate in estimates),
        ess_min=min(estimate.ess_min for estimate in estimates),
        mean_weight=farthest.mean_weight,
        mean_weight_stderr=farthest.mean_weight_stderr,
        max_abs_log_weight=max(estimate.max_abs_log_weight for estimate in estimates),
        clip_fraction=max(estimate.clip_fraction for estimate in estimates),
        n_tokens=min(estimate.n_tokens for estimate in estimates),
    )


def check_same_sequences(estimates: Sequence[EntropyChange]) -> None:
    """Refuse to combine estimates whose influences do not belong to the same N sequences of the same prompts.

    Raises:
        ValueError: naming the numbers of sequences, or what else differs.
    """
    counts = [estimate.n_sequences for estimate in estimates]
    if len(set(counts)) > 1:
        raise ValueError(
            f"expected estimates of the same sequences, got {counts} of them: influences add sequence by sequence, "
            "so every term must come from one batch"
        )
    first = estimates[0]
    index = cluster_index(first.clusters, first.n_sequences)
    if any(not np.array_equal(index, cluster_index(other.clusters, other.n_sequences)) for other in estimates):
        raise ValueError(
            "expected estimates of the same prompts, got some that group their sequences otherwise: give all of them "
            "the same clusters="
        )
    if len(levels := {estimate.confidence for estimate in estimates}) > 1:
        raise ValueError(f"expected estimates of one confidence, got {sorted(levels)}")


def interval(value: float, stderr: float, count: int, confidence: float) -> tuple[float, float]:
    """The confidence interval of an estimate: Student's t around its value.

    Args:
        value: the estimate.
        stderr: its standard error.
        count: independent clusters behind the standard error; their number less one is the degrees of freedom.
        confidence: between 0 and 1.

    Returns:
        Lower and upper end, in the unit of ``value``.

    Source:
        docs/theory.md, §3.

    Raises:
        ValueError: if ``confidence`` is not between 0 and 1.
    """
    margin = student_t(confidence, count) * stderr
    return value - margin, value + margin


def student_t(confidence: float, count: int) -> float:
    """How many standard errors an interval reaches to either side: Student's t with ``count`` − 1 degrees of freedom.

    Raises:
        ValueError: if ``confidence`` is not between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"expected a confidence between 0 and 1, such as 0.95, got {confidence}")
    return float(stats.t.ppf(0.5 + confidence / 2, count - 1))


def _estimate(
    value: float, influence: Tensor, clusters: Tensor | None, confidence: float, **others: Any
) -> EntropyChange:
    """An estimate whose error bar follows from its influences."""
    stderr, count = standard_error(influence, clusters)
    low, high = interval(value, stderr, count, confidence)
    return EntropyChange(
        value=value,
        stderr=stderr,
        ci_low=low,
        ci_high=high,
        n_sequences=len(influence),
        influence=influence.detach().to(torch.float64),
        clusters=clusters,
        confidence=confidence,
        **others,
    )
