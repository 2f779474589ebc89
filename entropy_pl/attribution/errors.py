"""Two error bars of one number: over the E-batch it was measured on, and over the U-batch that it was the luck of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from entropy_pl.estimators import first_order_coefficients, first_order_delta_entropy, jackknife_standard_error
from entropy_pl.estimators.estimate import cluster_index, standard_error
from entropy_pl.estimators.snis import Clusters
from entropy_pl.rollout import TokenStats

JACKKNIFE_GROUPS = 20  # of E: enough that the jackknife's own noise, 1/sqrt(2·19), is 16 %
Divisor = Literal["completions", "tokens"]


@dataclass(frozen=True)
class ErrorBar:
    """A standard error by two ways that share no formula.

    Args:
        influence: from the influence of every sequence.
        jackknife: from the estimate without each prompt, or group of prompts; NaN of fewer than three.
    """

    influence: float
    jackknife: float


def errors_over_e(
    base: TokenStats, along: Mapping[str, TokenStats], clusters: Clusters, baseline: Tensor | None, **options: Any
) -> dict[str, ErrorBar]:
    """How well E measures the change along some directions.

    Args:
        base: statistics of E at θ, ``[N, T]``.
        along: name of a direction → their derivatives along it.
        clusters: prompt of each sequence, ``[N]``, where prompts repeat.
        baseline: of the estimate, ``[N, T]``; it stays as it was fitted.
        options: of :func:`~entropy_pl.estimators.first_order_delta_entropy`.
    """
    groups = min(JACKKNIFE_GROUPS, len(set(cluster_index(clusters, len(base)).tolist())))
    kept: dict[bytes, TokenStats] = {}

    def of(rows: Tensor, tangent: TokenStats) -> float:
        """The estimate is linear in the tangents: what it multiplies them by is made once for all directions."""
        key = rows.numpy().tobytes()
        if key not in kept:
            subtracted = None if baseline is None else baseline[rows]
            kept[key] = first_order_coefficients(base.select(rows), baseline=subtracted, **options)
        some, a = tangent.select(rows), kept[key]
        return float((a.logp * some.logp + a.entropy * some.entropy).sum())

    def error(tangent: TokenStats) -> ErrorBar:
        whole = first_order_delta_entropy(base, tangent, baseline=baseline, **options)
        jackknife = math.nan
        if groups > 2:
            estimate = partial(of, tangent=tangent)
            jackknife = jackknife_standard_error(estimate, len(base), clusters=clusters, groups=groups)
        return ErrorBar(standard_error(whole.influence, clusters)[0], jackknife)

    return {name: error(tangent) for name, tangent in along.items()}


def error_over_u(per_sequence: Tensor, sizes: Tensor, clusters: Clusters) -> ErrorBar | None:
    """How much of a sum over the U-batch was the luck of its prompts, the preconditioner and the clipping as they were.

    The sum G = Σ_u A_u is that of a loss divided by Z = Σ_u z_u, so of B prompts one more or less changes the share of
    the others too: prompt p's influence on G is B (A_p − G z_p/Z), and without p there would have been
    (G − A_p) Z/(Z − z_p).

    Args:
        per_sequence: A, ``[N]``.
        sizes: z, ``[N]``: 1 of each completion where the loss divides by their number, its tokens where by those.
        clusters: prompt of each completion, ``[N]``; None: each has its own.

    Returns:
        None for a single prompt, of which nothing can be said.

    Raises:
        ValueError: if the clusters are of another length.
    """
    values, sizes = per_sequence.double().cpu(), sizes.double().cpu()
    total, whole, count = values.sum(), sizes.sum(), len(values)

    def of_these(rows: Tensor) -> float:
        return float(values[rows].sum() * whole / sizes[rows].sum())

    if len(set(cluster_index(clusters, count).tolist())) < 2:
        return None
    influence, _ = standard_error(count * (values - total * sizes / whole), clusters)
    return ErrorBar(influence, jackknife_standard_error(of_these, count, clusters=clusters))


def loss_sizes(mask: Tensor, divided_by: Divisor) -> Tensor:
    """What every completion adds to the loss's divisor, ``[N]``, float64."""
    return mask.sum(1).double() if divided_by == "tokens" else torch.ones(len(mask), dtype=torch.float64)
