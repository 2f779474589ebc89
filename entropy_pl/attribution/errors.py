"""Two error bars of one number: over the E-batch it was measured on, and over the U-batch that it was the luck of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from entropy_pl.estimators import (
    first_order_coefficients,
    first_order_delta_entropy,
    interval,
    jackknife_standard_error,
)
from entropy_pl.estimators.estimate import cluster_index, standard_error
from entropy_pl.estimators.snis import Clusters
from entropy_pl.rollout import TokenStats

JACKKNIFE_GROUPS = 20  # of E: enough that the jackknife's own noise, 1/sqrt(2·19), is 16 %
FEWEST_PROMPTS = 8  # of U: with fewer an error bar over them says little of the luck of a batch
Divisor = Literal["completions", "tokens"]


@dataclass(frozen=True)
class ErrorBar:
    """A standard error by two ways that share no formula, and the interval that the first of them gives.

    Args:
        influence: from the influence of every sequence.
        jackknife: from the estimate without each prompt, or group of prompts; NaN of fewer than three.
        ci_low: lower end of the confidence interval (Student's t, prompts − 1 degrees of freedom).
        ci_high: upper end.
    """

    influence: float
    jackknife: float
    ci_low: float
    ci_high: float


def errors_over_e(
    base: TokenStats,
    along: Mapping[str, tuple[float, TokenStats]],
    clusters: Clusters,
    baseline: Tensor | None,
    *,
    confidence: float = 0.95,
    **options: Any,
) -> dict[str, ErrorBar]:
    """How well E measures the change along some directions.

    Args:
        base: statistics of E at θ, ``[N, T]``.
        along: name of a direction → the change along it, and the derivatives of the statistics, which need be good
            enough for an error bar only.
        clusters: prompt of each sequence, ``[N]``, where prompts repeat.
        baseline: of the estimate, ``[N, T]``; it stays as it was fitted.
        confidence: of the intervals.
        options: of :func:`~entropy_pl.estimators.first_order_delta_entropy`.
    """
    groups = min(JACKKNIFE_GROUPS, cluster_count(clusters, len(base)))
    kept: dict[bytes, TokenStats] = {}

    def of(rows: Tensor, tangent: TokenStats) -> float:
        """The estimate is linear in the tangents: what it multiplies them by is made once for all directions."""
        key = rows.numpy().tobytes()
        if key not in kept:
            subtracted = None if baseline is None else baseline[rows]
            kept[key] = first_order_coefficients(base.select(rows), baseline=subtracted, **options)
        some, a = tangent.select(rows), kept[key]
        return float((a.logp * some.logp + a.entropy * some.entropy).sum())

    def error(value: float, tangent: TokenStats) -> ErrorBar:
        whole = first_order_delta_entropy(base, tangent, baseline=baseline, **options)
        jackknife = math.nan
        if groups > 2:
            estimate = partial(of, tangent=tangent)
            jackknife = jackknife_standard_error(estimate, len(base), clusters=clusters, groups=groups)
        stderr, count = standard_error(whole.influence, clusters)
        return ErrorBar(stderr, jackknife, *interval(value, stderr, count, confidence))

    return {name: error(*change) for name, change in along.items()}


def error_over_u(
    per_sequence: Tensor, sizes: Tensor, clusters: Clusters, *, confidence: float = 0.95
) -> ErrorBar | None:
    """How much of a sum over the U-batch was the luck of its prompts, the preconditioner and the clipping as they were.

    The sum G = Σ_u A_u is that of a loss divided by Z = Σ_u z_u, so of B prompts one more or less changes the share of
    the others too: prompt p's influence on G is B (A_p − G z_p/Z), and without p there would have been
    (G − A_p) Z/(Z − z_p).

    Args:
        per_sequence: A, ``[N]``.
        sizes: z, ``[N]``: 1 of each completion where the loss divides by their number, its tokens where by those.
        clusters: prompt of each completion, ``[N]``; None: each has its own.
        confidence: of the interval.

    Returns:
        None for a single prompt, of which nothing can be said.

    Raises:
        ValueError: if the clusters are of another length.
    """
    values, sizes = per_sequence.double().cpu(), sizes.double().cpu()
    total, whole, count = values.sum(), sizes.sum(), len(values)

    def of_these(rows: Tensor) -> float:
        return float(values[rows].sum() * whole / sizes[rows].sum())

    if cluster_count(clusters, count) < 2:
        return None
    influence, prompts = standard_error(count * (values - total * sizes / whole), clusters)
    jackknife = jackknife_standard_error(of_these, count, clusters=clusters)
    return ErrorBar(influence, jackknife, *interval(float(total), influence, prompts, confidence))


def errors_over_u(
    per_sequence: Mapping[str, Tensor], sizes: Tensor, clusters: Clusters, *, confidence: float = 0.95
) -> dict[str, ErrorBar]:
    """:func:`error_over_u` of several sums by name; none of fewer than 8 prompts."""
    if cluster_count(clusters, len(sizes)) < FEWEST_PROMPTS:
        return {}
    found = {name: error_over_u(of, sizes, clusters, confidence=confidence) for name, of in per_sequence.items()}
    return {name: bar for name, bar in found.items() if bar is not None}


def cluster_count(clusters: Clusters, count: int) -> int:
    """How many prompts so many sequences have."""
    return int(cluster_index(clusters, count).max(initial=-1)) + 1


def loss_sizes(mask: Tensor, divided_by: Divisor) -> Tensor:
    """What every completion adds to the loss's divisor, ``[N]``, float64."""
    return mask.sum(1).double() if divided_by == "tokens" else torch.ones(len(mask), dtype=torch.float64)
