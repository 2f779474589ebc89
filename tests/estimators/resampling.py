"""Thousands of samples of the enumerated policy at once, each with the estimates and error bars that the product makes.

Every estimator takes one batch. Here its own code runs on many batches side by side (``torch.vmap``), with what cannot
be vectorized put aside: checks of the arguments, and the error bar, which the product then makes of every batch by
itself. `test_calibration.py` compares the two ways.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from enumeration import PROMPTS, Enumeration
from samples import ETA, prefix_features, rewards_of
from torch import Tensor

from entropy_pl.estimators import EntropyChange, derivatives, reward, score_baseline, snis
from entropy_pl.estimators.estimate import make_estimate
from entropy_pl.policy.precision import float64_evaluation
from entropy_pl.policy.score import token_stats
from entropy_pl.policy.tangents import one_sided_tangent, tangents, token_stats_jvp
from entropy_pl.rollout import TokenStats
from entropy_pl.updates import UpdateVector

CHUNK = 125  # batches side by side: their arrays stay in a core's caches


@dataclass
class Policy:
    """The enumerated policy, with all that an estimate may want to know of every completion."""

    enumeration: Enumeration

    @cached_property
    def probabilities(self) -> Tensor:
        return self.enumeration.probabilities()

    @cached_property
    def stats(self) -> dict[str, TokenStats]:
        """At θ, at θ ± ηv, after another step, and the derivatives along v: exact, and one-sided differences."""
        model, rollout, update = self.enumeration.model, self.enumeration.rollout, self.enumeration.update
        with float64_evaluation(model):
            base, first = token_stats_jvp(model, rollout, update)
            positive = self.positive.update
            return {
                "base": base,
                "first": first,
                "first_of_positive": token_stats_jvp(model, rollout, positive)[1],
                "one_sided_of_positive": one_sided_tangent(model, rollout, positive, base),
                "first_of_other": token_stats_jvp(model, rollout, self.other.update)[1],
                "one_sided": one_sided_tangent(model, rollout, update, base),
                "second": tangents(model, rollout, update, method="central_difference").second,
                "shifted": token_stats(model, rollout, update=update, eta=ETA),
                "backward": token_stats(model, rollout, update=update, eta=-ETA),
                "other": token_stats(model, rollout, update=self.other.update, eta=ETA),
            }

    @cached_property
    def other(self) -> Enumeration:
        """The same policy with another update: half of v, and as much of something else."""
        generator = torch.Generator().manual_seed(11)
        direction = {
            name: 0.5 * v + 0.05 * torch.randn(v.shape, generator=generator, dtype=torch.float64)
            for name, v in self.enumeration.update.direction.items()
        }
        return replace(self.enumeration, update=UpdateVector(direction, lr=1e-2))

    @cached_property
    def positive(self) -> Enumeration:
        """The same policy with what the completions of A > 0 alone do, of a step on 32 completions: its gradient."""
        rows = torch.randint(len(self.advantages), (32,), generator=torch.Generator().manual_seed(12))
        chosen = rows[self.advantages[rows] > 0]
        with self.enumeration.at(0.0):
            value = (self.enumeration.sequence_log_probs()[0] * self.advantages)[chosen].sum() / 32
            parameters = dict(self.enumeration.model.named_parameters())
            gradients = torch.autograd.grad(value, list(parameters.values()))
        direction = {name: gradient.double() for name, gradient in zip(parameters, gradients, strict=True)}
        return replace(self.enumeration, update=UpdateVector(direction, lr=1e-2))

    @cached_property
    def advantages(self) -> Tensor:
        """Of every row: its reward less their mean."""
        return self.rewards - (self.probabilities * self.rewards).sum()

    @cached_property
    def rewards(self) -> Tensor:
        return rewards_of(self.enumeration)

    @cached_property
    def features(self) -> Tensor:
        return prefix_features(self.enumeration)


@contextmanager
def side_by_side() -> Iterator[None]:
    """Within, estimators return (value, influences) and check nothing."""

    def pair(value: Tensor, influence: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        return value, influence

    unchecked: dict[str, Any] = {"check_stats": lambda *_, **__: None}
    with (
        patch.multiple(snis, make_estimate=pair, _weights=lambda *_: None, **unchecked),
        patch.multiple(derivatives, make_estimate=pair, **unchecked),
        patch.multiple(
            reward, checked_rewards=lambda rewards, *_: rewards, _of_tokens=lambda found, _: found, **unchecked
        ),
    ):
        yield


@dataclass
class Samples:
    """R batches of N completions each.

    Args:
        policy: they are drawn from.
        rows: of the enumeration, ``[R, N]``.
        clusters: which of a batch share a prompt, ``[N]``; None: every completion has a prompt of its own.
    """

    policy: Policy
    rows: Tensor
    clusters: Tensor | None = None
    _kept: dict[Any, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def draw(cls, policy: Policy, count: int, size: int, per_prompt: int = 1, seed: int = 2) -> Samples:
        """Prompts, and of each ``per_prompt`` completions: the enumeration's prompts are equally likely."""
        p = policy.probabilities.numpy()
        rng, prompts = np.random.default_rng(seed), size // per_prompt
        if per_prompt == 1:
            return cls(policy, torch.from_numpy(rng.choice(len(p), (count, size), p=p / p.sum())))
        each = len(p) // len(PROMPTS)
        chosen = rng.integers(len(PROMPTS), size=(count, prompts, 1))
        drawn = [
            rng.choice(each, (count, prompts, per_prompt), p=part / part.sum())
            for part in p.reshape(len(PROMPTS), each)
        ]
        rows = np.choose(chosen, [part + number * each for number, part in enumerate(drawn)])
        return cls(policy, torch.from_numpy(rows.reshape(count, size)), torch.arange(size) // per_prompt)

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, number: int, *names: str) -> list[TokenStats]:
        """One batch's statistics."""
        return [self.policy.stats[name].select(self.rows[number]) for name in names]

    def estimates(
        self,
        estimate: Callable[..., Any],
        *names: str,
        rewarded: bool = False,
        baseline: Tensor | None = None,
        confidence: float = 0.95,
        clusters: Tensor | str | None = "own",
        **options: Any,
    ) -> list[EntropyChange]:
        """Of every batch.

        Args:
            estimate: a function of :mod:`entropy_pl.estimators`.
            names: of the statistics it takes.
            rewarded: whether it takes rewards after them.
            baseline: of every batch, ``[R, N, T]``.
            confidence: of the intervals.
            clusters: ``own``: those of the samples; or others.
            options: of the estimate.
        """
        mask = self.policy.stats["base"].mask
        rewards = self.policy.rewards  # not made within vmap, which allows no random numbers

        def one(rows: Tensor, subtracted: Tensor | None) -> tuple[Tensor, Tensor]:
            arrays: list[Any] = [
                TokenStats(stats.logp[rows], stats.entropy[rows], mask[rows])
                for stats in (self.policy.stats[name] for name in names)
            ]
            if rewarded:
                arrays.append(rewards[rows])
            found: tuple[Tensor, Tensor] = estimate(
                *arrays, **options, **({} if subtracted is None else {"baseline": subtracted})
            )
            return found

        with side_by_side(), torch.no_grad():
            many = torch.vmap(one, in_dims=(0, None if baseline is None else 0), chunk_size=CHUNK)
            values, influences = many(self.rows, baseline)
        own = self.clusters if isinstance(clusters, str) else clusters
        return [
            make_estimate(value, influence, clusters=own, confidence=confidence, mask=mask[rows])
            for value, influence, rows in zip(values, influences, self.rows, strict=True)
        ]

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What several intervals are made of, made once."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def baseline(self, kind: str, fit: Callable[..., Tensor | None] = score_baseline, **options: Any) -> Tensor:
        """Of every batch, ``[R, N, T]``; a critic is fitted one batch after another."""

        def make() -> Tensor:
            made = []
            for number, rows in enumerate(self.rows):
                [base] = self.batch(number, "base")
                told = {"features": self.policy.features[rows][base.mask], "clusters": self.clusters, **options}
                made.append(fit(kind, base, *([] if fit is score_baseline else [self.policy.rewards[rows]]), **told))
            return torch.stack(made)

        found: Tensor = self.once((kind, fit, *sorted(options.items())), make)
        return found


def coverage(intervals: Sequence[tuple[float, float]], truth: float) -> float:
    """The share that holds the truth."""
    return sum(low <= truth <= high for low, high in intervals) / len(intervals)
