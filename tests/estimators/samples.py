"""What the tests of this package share: random ragged statistics, and samples of the enumerated policy."""

from __future__ import annotations

import itertools

import torch
from enumeration import EOS, PROMPTS, Enumeration
from torch import Tensor

from entropy_pl.rollout import TokenStats

NORMALIZE = ("per_token", "per_sequence")
WEIGHTING = ("prefix", "sequence")
INTEGRAND = ("rao_blackwell", "surprisal")
OPTIONS = list(itertools.product(NORMALIZE, WEIGHTING, INTEGRAND))

N, T = 37, 6  # of the ragged statistics
ETA = 0.1  # log weights of sd 0.3: importance sampling has work to do
N_LARGE = 40_000  # completions drawn of the enumerated ones
WIDTH = 8  # features per prefix, of 80 prefixes: a critic with an error of its own


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


def prefix_features(enumeration: Enumeration) -> Tensor:
    """A random vector per prefix, ``[rows, T, WIDTH]``, as a last hidden state is a function of the prefix."""
    numbers = prefix_numbers(enumeration)
    table = torch.randn(int(numbers.max()) + 1, WIDTH, generator=torch.Generator().manual_seed(3))
    return table[numbers]


def rewards_of(enumeration: Enumeration) -> Tensor:
    """One reward per row: 1 for a completion that ends by itself, and something of its own."""
    ended = (enumeration.rollout.completion_ids == EOS).any(1).double()
    return ended + 0.3 * torch.randn(len(ended), generator=torch.Generator().manual_seed(6), dtype=torch.float64)


def exact_reward(enumeration: Enumeration, rewards: Tensor, eta: float) -> float:
    """J(π_{θ+ηv}) from the definition, Σ π R over completions."""
    with enumeration.at(eta), torch.no_grad():
        return float((enumeration.sequence_log_probs()[0].exp() * rewards).sum()) / len(PROMPTS)


def exact_reward_slope(enumeration: Enumeration, rewards: Tensor) -> float:
    """⟨∇J, v⟩ by a difference in float64: off by step² of a third derivative, 1e-8, far below any standard error."""
    step = 1e-4
    return (exact_reward(enumeration, rewards, step) - exact_reward(enumeration, rewards, -step)) / (2 * step)


def exact_curvature(enumeration: Enumeration, normalize: str) -> float:
    """v'∇²H v by a difference: off by step² of a fourth derivative and 1e-16/step², far below any standard error."""
    step = 1e-3
    return sum(c * enumeration.exact_entropy(normalize, k * step) for c, k in ((1, -1), (-2, 0), (1, 1))) / step**2
