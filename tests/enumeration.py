"""The oracle of the estimators: a policy small enough to write down every completion it can give.

Everything here is arithmetic on all of them, with the model called plainly: no scorer, no reducer, no sampling.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from tiny import build_model
from torch import Tensor, nn

from entropy_pl.policy.precision import float64_evaluation
from entropy_pl.rollout import Rollout
from entropy_pl.updates import UpdateVector

EOS, VOCABULARY, LENGTH = 1, 4, 4
PROMPTS = ((2, 3), (3, 3, 2, 0))  # of two lengths, equally likely


def completions() -> list[tuple[int, ...]]:
    """Every completion: up to LENGTH tokens, ending at the first EOS."""
    found = []
    for length in range(1, LENGTH + 1):
        for tokens in itertools.product(range(VOCABULARY), repeat=length):
            ends = tokens[-1] == EOS or length == LENGTH
            if ends and EOS not in tokens[:-1]:
                found.append(tokens)
    return found


@dataclass
class Enumeration:
    """A policy, an update, and every (prompt, completion) there is as one rollout."""

    model: nn.Module
    update: UpdateVector
    rollout: Rollout

    @classmethod
    def make(cls, seed: int, direction: int | None = None) -> Enumeration:
        """A policy and an update by their seeds; by default they have the same."""
        model = build_model(seed, vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, pad_token_id=None)
        generator = torch.Generator().manual_seed(seed if direction is None else direction)
        direction = {
            name: 0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
            for name, p in model.named_parameters()
        }
        rows = [(prompt, completion) for prompt in PROMPTS for completion in completions()]
        width = max(map(len, PROMPTS))
        left = [[0] * (width - len(p)) + list(p) for p, _ in rows]
        left_mask = [[False] * (width - len(p)) + [True] * len(p) for p, _ in rows]
        right = [list(c) + [0] * (LENGTH - len(c)) for _, c in rows]
        right_mask = [[True] * len(c) + [False] * (LENGTH - len(c)) for _, c in rows]
        return cls(
            model,
            UpdateVector(direction, lr=1e-2),
            Rollout(*(torch.tensor(x) for x in (left, left_mask, right, right_mask))),
        )

    @contextmanager
    def at(self, eta: float) -> Iterator[None]:
        """The model at θ + ηv in float64, by hand."""
        with float64_evaluation(self.model):
            before = {name: p.data for name, p in self.model.named_parameters()}
            for name, p in self.model.named_parameters():
                p.data = before[name] + eta * self.update.direction[name]
            try:
                yield
            finally:
                for name, p in self.model.named_parameters():
                    p.data = before[name]

    def sequence_log_probs(self) -> tuple[Tensor, Tensor]:
        """log π(completion | prompt) and the completion's length for every row, one plain forward pass per prompt."""
        rollout, logps = self.rollout, []
        per_prompt = len(rollout) // len(PROMPTS)
        for i, prompt in enumerate(PROMPTS):
            rows = slice(i * per_prompt, (i + 1) * per_prompt)
            completion, mask = rollout.completion_ids[rows], rollout.completion_mask[rows]
            ids = torch.cat([torch.tensor(prompt).expand(per_prompt, -1), completion], 1)
            log_p = torch.log_softmax(self.model(input_ids=ids).logits, -1)[:, len(prompt) - 1 : -1]
            logps.append((log_p.gather(2, completion[..., None])[..., 0] * mask).sum(1))
        return torch.cat(logps), rollout.completion_mask.sum(1).double()

    def exact_entropy(self, normalize: str, eta: float = 0.0) -> float:
        """H(π_{θ+ηv}) from the definition, −Σ π log π over completions, divided by E[T] per token."""
        with self.at(eta), torch.no_grad():
            return float(_entropy(*self.sequence_log_probs(), normalize))

    def exact_slope(self, normalize: str) -> float:
        """⟨∇H, v⟩ by reverse mode through the definition."""
        with self.at(0.0):
            entropy = _entropy(*self.sequence_log_probs(), normalize)
            parameters = dict(self.model.named_parameters())
            gradients = torch.autograd.grad(entropy, list(parameters.values()), allow_unused=True)
        return sum(
            float((g * self.update.direction[name]).sum())
            for name, g in zip(parameters, gradients, strict=True)
            if g is not None
        )

    def probabilities(self) -> Tensor:
        """Probability of every row under the policy at θ, prompts equally likely."""
        with self.at(0.0), torch.no_grad():
            return self.sequence_log_probs()[0].exp() / len(PROMPTS)


def _entropy(logp: Tensor, length: Tensor, normalize: str) -> Tensor:
    p = logp.exp() / len(PROMPTS)
    total = -(p * logp).sum()
    return total / (p * length).sum() if normalize == "per_token" else total
