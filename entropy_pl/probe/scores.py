"""What the model passes of a probe leave behind: everything its estimates are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from entropy_pl.rollout import TokenStats


@dataclass(frozen=True, eq=False)
class CounterfactualScores:
    """E at the θ+ηv′ of another update v′, η the step really taken.

    Args:
        stats: ``[N, T]``.
        update_norm: ‖v′‖.
        cosine: of the angle between v′ and v; None where one of them is zero.
    """

    stats: TokenStats
    update_norm: float
    cosine: float | None


@dataclass(frozen=True, eq=False)
class HalvedStep:
    """First derivatives of some sequences by central differences at half the usual step: are they the same?

    Args:
        rows: which sequences of the E-batch, ``[N]``, bool; n of them.
        first: their derivatives per unit η, ``[n, T]``.
    """

    rows: Tensor
    first: TokenStats

    def select(self, rows: Tensor) -> HalvedStep | None:
        """Of some sequences of the E-batch, as if the others had never been drawn; None where none of them was."""
        kept = self.rows[rows]
        place = (self.rows.cumsum(0) - 1)[rows][kept]
        return HalvedStep(kept, self.first.select(place)) if len(place) else None

    def to(self, device: torch.device | str) -> HalvedStep:
        """The same numbers on another device."""
        return HalvedStep(self.rows.to(device), self.first.to(device))

    @staticmethod
    def concatenate(parts: Sequence[HalvedStep]) -> HalvedStep:
        """Of all shares of the E-batch."""
        return HalvedStep(
            torch.cat([part.rows for part in parts]), TokenStats.concatenate([part.first for part in parts])
        )


@dataclass(frozen=True, eq=False)
class ProbeScores:
    """An E-batch, scored at θ, along v, and at every θ+ηv.

    Args:
        base: at θ, ``[N, T]``.
        tangent: first derivatives (ṡ, ḣ) per unit η, ``[N, T]``.
        curvature: second derivatives (s̈, ḧ), ``[N, T]``.
        shifted: η → statistics at θ+ηv, ``[N, T]``, by ascending η.
        clusters: prompt of each sequence, ``[N]``; None where none repeats.
        features: hidden states that emit the tokens, ``[tokens, d]`` in the order of the mask; None where no critic
            asked for them.
        method: how the first derivatives were made.
        difference_step: h of the central difference behind the derivatives, in η.
        seconds: wall time per phase.
        rewards: of every sequence, ``[N]``; None where nobody asked for them.
        counterfactuals: name → E after another step.
        failed: name → why E could not be scored after that step.
        differences: first derivatives by central differences, ``[N, T]``, where ``tangent`` is by forward mode.
        halved: the same at half the step, of some sequences; None where that was not asked for, or nothing moved.
        temperature: of the sampling distribution.
    """

    base: TokenStats
    tangent: TokenStats
    curvature: TokenStats
    shifted: dict[float, TokenStats]
    clusters: Tensor | None
    features: Tensor | None
    method: str
    difference_step: float | None
    seconds: dict[str, float] = field(default_factory=dict)
    rewards: Tensor | None = None
    counterfactuals: dict[str, CounterfactualScores] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    differences: TokenStats | None = None
    halved: HalvedStep | None = None
    temperature: float = 1.0

    def __len__(self) -> int:
        return len(self.base)

    def select(self, rows: Tensor) -> ProbeScores:
        """The scores of some sequences, as if the others had never been drawn; the time they took stays whole."""
        features = self.features
        if features is not None:
            parts = features.split(self.base.mask.sum(1).tolist())
            features = torch.cat([parts[row] for row in rows.tolist()])
        return replace(
            self,
            base=self.base.select(rows),
            tangent=self.tangent.select(rows),
            curvature=self.curvature.select(rows),
            shifted={eta: stats.select(rows) for eta, stats in self.shifted.items()},
            clusters=None if self.clusters is None else self.clusters[rows],
            features=features,
            rewards=None if self.rewards is None else self.rewards[rows],
            counterfactuals={n: replace(c, stats=c.stats.select(rows)) for n, c in self.counterfactuals.items()},
            differences=None if self.differences is None else self.differences.select(rows),
            halved=None if self.halved is None else self.halved.select(rows),
        )

    def to(self, device: torch.device | str) -> ProbeScores:
        """The same numbers on another device."""
        return replace(
            self,
            base=self.base.to(device),
            tangent=self.tangent.to(device),
            curvature=self.curvature.to(device),
            shifted={eta: stats.to(device) for eta, stats in self.shifted.items()},
            clusters=None if self.clusters is None else self.clusters.to(device),
            features=None if self.features is None else self.features.to(device),
            rewards=None if self.rewards is None else self.rewards.to(device),
            counterfactuals={n: replace(c, stats=c.stats.to(device)) for n, c in self.counterfactuals.items()},
            differences=None if self.differences is None else self.differences.to(device),
            halved=None if self.halved is None else self.halved.to(device),
        )

    @staticmethod
    def concatenate(parts: Sequence[ProbeScores]) -> ProbeScores:
        """The scores of all sequences, from parts scored at the same step sizes; times are the first part's."""
        first = parts[0]
        clusters = [part.clusters for part in parts if part.clusters is not None]
        features = [part.features for part in parts if part.features is not None]
        rewards = [part.rewards for part in parts if part.rewards is not None]
        differences = [part.differences for part in parts if part.differences is not None]
        halved = [part.halved for part in parts if part.halved is not None]
        return replace(
            first,
            base=TokenStats.concatenate([part.base for part in parts]),
            tangent=TokenStats.concatenate([part.tangent for part in parts]),
            curvature=TokenStats.concatenate([part.curvature for part in parts]),
            shifted={eta: TokenStats.concatenate([part.shifted[eta] for part in parts]) for eta in first.shifted},
            clusters=torch.cat(clusters) if clusters else None,
            features=torch.cat(features) if features else None,
            rewards=torch.cat(rewards) if rewards else None,
            counterfactuals={
                name: replace(one, stats=TokenStats.concatenate([part.counterfactuals[name].stats for part in parts]))
                for name, one in first.counterfactuals.items()
            },
            differences=TokenStats.concatenate(differences) if differences else None,
            halved=HalvedStep.concatenate(halved) if halved else None,
        )
