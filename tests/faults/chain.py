"""A policy that knows its last token alone: exact entropies for completions of any length, and heavy weights.

The enumerated policy's completions have four tokens at most, whose weights can hardly collapse. These have up to 24,
and an exact answer all the same, by carrying the distribution of the last token forward.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from entropy_pl.rollout import TokenStats

VOCABULARY, LENGTH, END, START = 6, 24, 0, 6
Array = NDArray[np.float64]


@dataclass
class Chain:
    """Logits of the next token for every last token, and for the start, ``[7, 6]``, and a direction to move them in."""

    logits: Array
    direction: Array

    @classmethod
    def make(cls, seed: int) -> Chain:
        rng = np.random.default_rng(seed)
        logits = rng.normal(size=(VOCABULARY + 1, VOCABULARY))
        logits[:, END] -= 1.0  # lengths of 10 or so
        return cls(logits, rng.normal(size=logits.shape))

    def at(self, eta: float) -> tuple[Array, Array]:
        """Log-probs ``[7, 6]``, and entropies ``[7]``, at θ+ηv."""
        shifted = self.logits + eta * self.direction
        logp = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
        return logp, -(np.exp(logp) * logp).sum(1)

    def entropy(self, normalize: str, eta: float) -> float:
        """Exact, by the probability of being at each last token, position by position."""
        logp, entropy = self.at(eta)
        last, total, length = np.zeros(VOCABULARY + 1), 0.0, 0.0
        last[START] = 1.0
        for _ in range(LENGTH):
            total += last @ entropy
            length += last.sum()
            last = np.append(last @ np.exp(logp), 0.0)
            last[END] = 0.0  # these have ended
        return total / length if normalize == "per_token" else total

    def draw(
        self, count: int, rng: np.random.Generator
    ) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.bool_]]:
        """Completions drawn at θ: the token before, the token, and the mask, ``[count, 24]`` each."""
        cumulative = np.exp(self.at(0.0)[0]).cumsum(1)
        last, alive, columns = np.full(count, START), np.ones(count, dtype=bool), []
        for _ in range(LENGTH):
            token = np.minimum((rng.random(count)[:, None] > cumulative[last]).sum(1), VOCABULARY - 1)
            columns.append((last, token, alive))
            alive, last = alive & (token != END), token
        before, tokens, mask = (np.stack(column, 1) for column in zip(*columns, strict=True))
        return before, tokens, mask

    def scored(
        self, before: NDArray[np.intp], tokens: NDArray[np.intp], mask: NDArray[np.bool_], eta: float
    ) -> TokenStats:
        """What a scorer would say of these completions at θ+ηv."""
        logp, entropy = self.at(eta)
        values = (np.where(mask, of, 0.0) for of in (logp[before, tokens], entropy[before]))
        return TokenStats(*map(torch.from_numpy, values), torch.from_numpy(mask))
