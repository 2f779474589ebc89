"""Standard errors by leaving data out: slow, and with no formula of the estimator to get wrong."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from entropy_pl.estimators.estimate import cluster_index
from entropy_pl.estimators.snis import Clusters


def jackknife_standard_error(
    estimate: Callable[[Tensor], float], count: int, *, clusters: Clusters = None, groups: int | None = None
) -> float:
    """Jackknife standard error of any estimate of N sequences, clusters left out whole.

    With n clusters in g groups of m_j, θ̂ of everything and θ_j without group j (Busing, Meijer & van der Leeden 1999):

        h_j = n/m_j,  θ̃_j = h_j θ̂ − (h_j−1) θ_j,  θ_J = g θ̂ − Σ_j (1 − 1/h_j) θ_j,
        SE² = (1/g) Σ_j (θ̃_j − θ_J)² / (h_j−1),

    which for groups of one size is the textbook's (g−1)/g Σ_j (θ_j − mean)².

    Args:
        estimate: from the row numbers kept, ``[n]`` int64, ascending, to the estimate. Called g + 1 times.
        count: N.
        clusters: prompt of each sequence, ``[N]``, where prompts repeat.
        groups: g, the groups of whole clusters to leave out in turn (cluster number c is in group c modulo g), for
            speed; at most one per cluster is used. None: every cluster by itself.

    Returns:
        The standard error, in the estimate's unit.

    Source:
        docs/theory.md, §3; groups of unequal size after Busing, Meijer & van der Leeden 1999.

    Raises:
        ValueError: for fewer than 2 clusters or groups, or clusters of another length.
    """
    index = cluster_index(clusters, count)
    n = int(index.max(initial=-1)) + 1
    g = n if groups is None else min(groups, n)
    if g < 2:
        raise ValueError(f"expected at least 2 clusters and 2 groups of them to leave out, got {n} and {groups}")
    group = index % g
    everything = estimate(torch.arange(count))
    without = np.array([estimate(torch.from_numpy(np.flatnonzero(group != j))) for j in range(g)])
    h = n / np.bincount(np.arange(n) % g)
    pseudo = h * everything - (h - 1) * without
    centre = g * everything - ((1 - 1 / h) * without).sum()
    return float(np.sqrt((np.square(pseudo - centre) / (h - 1)).mean()))
