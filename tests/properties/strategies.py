"""What the properties are asked of: ragged batches of any shape, and the options of the estimators.

Shapes, lengths and seeds are hypothesis's, so that a failure shrinks to few short sequences; the numbers themselves
come from the seed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from torch import Tensor

from entropy_pl.rollout import Rollout, TokenStats

MANY = settings(max_examples=50, deadline=None, derandomize=True, database=None)
"""Of array properties, a few milliseconds each; the same cases in every run."""
FEW = settings(MANY, max_examples=12)
"""Of properties that run a model."""


@dataclass(frozen=True)
class Batch:
    """Statistics at θ, their change, and a generator for whatever else a property draws."""

    base: TokenStats
    change: TokenStats
    noise: torch.Generator

    @property
    def shifted(self) -> TokenStats:
        return self.at(1.0)

    def at(self, eta: float) -> TokenStats:
        base, change = self.base, self.change
        return TokenStats(base.logp + eta * change.logp, base.entropy + eta * change.entropy, base.mask)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.noise, dtype=torch.float64)

    def permutation(self) -> Tensor:
        return torch.randperm(len(self.base), generator=self.noise)


@st.composite
def lengths(draw: DrawFn, least: int = 0, sequences: tuple[int, int] = (2, 9), longest: int = 6) -> list[int]:
    """Of completions: at least one has a token."""
    count = draw(st.integers(*sequences))
    found = draw(st.lists(st.integers(least, longest), min_size=count, max_size=count))
    return found if any(found) else [1, *found[1:]]


@st.composite
def batches(draw: DrawFn, least: int = 0, longest: int = 6, dtype: torch.dtype = torch.float64) -> Batch:
    """Ragged statistics: log-probs below zero, entropies above, a change of up to some nats a token."""
    found = draw(lengths(least, longest=longest))
    width = max(found) + draw(st.integers(0, 2)) * (longest > 1)  # columns that nobody reaches
    noise = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([1e-4, 0.1, 1.0]))
    mask = torch.arange(width) < torch.tensor(found)[:, None]

    def made(size: float) -> Tensor:
        return (size * torch.randn(len(found), width, generator=noise, dtype=torch.float64) * mask).to(dtype)

    return Batch(TokenStats(-made(1).abs(), made(1).abs(), mask), TokenStats(made(scale), made(scale), mask), noise)


normalizations = st.sampled_from(["per_token", "per_sequence"])
weightings = st.sampled_from(["prefix", "sequence"])
integrands = st.sampled_from(["rao_blackwell", "surprisal"])
options = st.fixed_dictionaries({"normalize": normalizations, "weighting": weightings, "integrand": integrands})


@st.composite
def rollouts(draw: DrawFn, vocabulary: int) -> Rollout:
    """Ragged prompts, left-padded, and completions, right-padded."""
    after = draw(lengths(sequences=(2, 5), longest=5))
    before = draw(st.lists(st.integers(1, 5), min_size=len(after), max_size=len(after)))
    noise = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    P, T = max(before), max(after)

    def ids(width: int) -> Tensor:
        return torch.randint(4, vocabulary, (len(after), width), generator=noise)

    return Rollout(
        ids(P),
        torch.arange(P) >= P - torch.tensor(before)[:, None],
        ids(T),
        torch.arange(T) < torch.tensor(after)[:, None],
    )
