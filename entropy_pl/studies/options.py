"""The estimator's options side by side, and what each makes of one pool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from entropy_pl.estimators import Baseline, EntropyChange
from entropy_pl.estimators.estimate import cluster_index, standard_error
from entropy_pl.estimators.snis import Clusters, Integrand, Weighting
from entropy_pl.probe import EntropyProbe
from entropy_pl.studies.pool import Pool, Quantity


@dataclass(frozen=True)
class EstimatorOption:
    """A way to make δH₁ and ΔH of the same scores.

    Args:
        name: in tables and figures.
        weighting: `prefix` or `sequence`.
        integrand: `rao_blackwell`, the entropy at each prefix, or `surprisal` of the sampled token.
        baseline: `none`, `position`, `critic` or `gae`; ΔH's first order is exchanged for the one it makes.
        gae_lambda: λ of `gae`.
    """

    name: str
    weighting: Weighting = "prefix"
    integrand: Integrand = "rao_blackwell"
    baseline: Baseline = "none"
    gae_lambda: float = 0.95

    @property
    def needs_features(self) -> bool:
        """Whether a critic has a part in it."""
        return self.baseline in ("critic", "gae")

    @property
    def unbiased(self) -> bool:
        """To O(1/N)."""
        return self.baseline != "gae" or self.gae_lambda == 1

    def probe(self, probe: EntropyProbe) -> EntropyProbe:
        """The same probe with this option."""
        return replace(
            probe,
            weighting=self.weighting,
            integrand=self.integrand,
            baseline=self.baseline,
            gae_lambda=self.gae_lambda,
            jackknife_groups=0,  # the study's own jackknife stands beside what the influences say
        )


DEFAULT_OPTIONS = (
    EstimatorOption("sequence", weighting="sequence"),
    EstimatorOption("sequence+surprisal", weighting="sequence", integrand="surprisal"),
    EstimatorOption("sequence+position", weighting="sequence", baseline="position"),
    EstimatorOption("sequence+critic", weighting="sequence", baseline="critic"),
    EstimatorOption("prefix"),
    EstimatorOption("prefix+surprisal", integrand="surprisal"),
    EstimatorOption("prefix+position", baseline="position"),
    EstimatorOption("prefix+critic", baseline="critic"),
    EstimatorOption("prefix+gae(0.95)", baseline="gae", gae_lambda=0.95),
    EstimatorOption("prefix+gae(0.8)", baseline="gae", gae_lambda=0.8),
)


class PoolEstimates:
    """What every option makes of a pool's sequences, or of some of them; values are worked out once.

    Args:
        pool: the pool.
        probe: everything the options do not say.
        options: the options.
    """

    def __init__(self, pool: Pool, probe: EntropyProbe, options: Sequence[EstimatorOption]) -> None:
        self.pool = pool
        self.options = {option.name: option for option in options}
        self._probe = probe
        self._values: dict[tuple[str, bytes], dict[Quantity, float]] = {}

    @property
    def confidence(self) -> float:
        """Of all intervals."""
        return self._probe.confidence

    def changes(self, option: str, rows: Tensor) -> dict[Quantity, EntropyChange]:
        """δH₁ and ΔH with their influences, from these sequences as if there were no others."""
        found = self.pool.estimates(self.options[option].probe(self._probe), rows)
        del found["entropy", None]  # which no option changes, but for the integrand
        self._values[option, _key(rows)] = {quantity: change.value for quantity, change in found.items()}
        return found

    def values(self, option: str, rows: Tensor) -> dict[Quantity, float]:
        """The estimates' values alone."""
        if (option, _key(rows)) not in self._values:
            self.changes(option, rows)
        return self._values[option, _key(rows)]


def variance_ratio(change: EntropyChange, other: EntropyChange, clusters: Clusters) -> tuple[float, float]:
    """Variance of an estimate over another's of the same sequences, and the ratio's own standard error.

    With u_c, w_c the influences summed by prompt, the ratio is Σu²/Σw², and (u_c² − ratio · w_c²)/mean(w²) its
    influence: the two variances share their noise.

    Args:
        change: the numerator.
        other: the denominator.
        clusters: prompt of each sequence, ``[N]``, where prompts repeat.
    """
    index = cluster_index(clusters, change.n_sequences)
    u, w = (np.square(np.bincount(index, weights=one.influence.cpu().numpy())) for one in (change, other))
    ratio = float(u.mean() / w.mean())
    return ratio, standard_error(torch.from_numpy((u - ratio * w) / w.mean()))[0]


def _key(rows: Tensor) -> bytes:
    return rows.numpy().tobytes()
