"""What the tests of this room share: random ragged statistics, and samples of the enumerated policy."""

from __future__ import annotations

import itertools

import torch
from enumeration import Enumeration
from torch import Tensor

from entropy_pl.rollout import TokenStats

NORMALIZE = ("per_token", "per_sequence")
WEIGHTING = ("prefix", "sequence")
INTEGRAND = ("rao_blackwell", "surprisal")
OPTIONS = list(itertools.product(NORMALIZE, WEIGHTING, INTEGRAND))

N, T = 37, 6  # of the ragged statistics
ETA = 0.1  # log weights of sd 0.3: importance sampling has work to do
N_LARGE = 40_000  # completions drawn of the enumerated ones


def ragged(seed: int = 0, scale: float = 0.3) -> tuple[TokenStats, TokenStats]:
    """Random statistics of ragged completions, and a random change of them."""
    rng = torch.Generator().manual_seed(seed)
    mask = torch.arange(T) < torch.randint(1, T + 1, (N, 1), generator=rng)

    def noise(size: float) -> Tensor:
        return size * torch.randn(N, T, generator=rng, dtype=torch.float64) * mask

    base = TokenStats(-noise(1).abs(), noise(1).abs(), mask)
    return base, TokenStats(noise(scale), noise(scale), mask)


def plus(base: TokenStats, change: TokenStats, eta: float = 1.0) -> TokenStats:
    return TokenStats(base.logp + eta * change.logp, base.entropy + eta * change.entropy, base.mask)


def at(scored: dict[str, TokenStats], rows: Tensor, *names: str) -> list[TokenStats]:
    return [scored[name].select(rows) for name in names]


def prefix_numbers(enumeration: Enumeration) -> Tensor:
    """Every prefix (prompt and tokens before k) by its own number, for every row of the enumeration, ``[rows, T]``."""
    rollout, numbers = enumeration.rollout, {}
    found = torch.zeros_like(rollout.completion_ids)
    for i, k in rollout.completion_mask.nonzero().tolist():
        prefix = (*rollout.prompt_ids[i].tolist(), -1, *rollout.completion_ids[i, :k].tolist())
        found[i, k] = numbers.setdefault(prefix, len(numbers))
    return found
