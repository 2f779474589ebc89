"""How many operations and bytes a policy's work takes at the least: products alone, everything else left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from entropy_pl.policy.head import output_head
from entropy_pl.policy.shape import ModelShape


@dataclass(frozen=True)
class Counts:
    """Of a decoder-only model.

    Args:
        body: numbers in the matrices that every token meets, adapters included; embeddings and head left out.
        head: numbers in the head's matrix.
        attended: numbers a token's query and its output have, over all layers: layers × heads × head size.
        cached: numbers of a token's keys and values, over all layers.
    """

    body: int
    head: int
    attended: int
    cached: int

    @classmethod
    def of(cls, model: Any) -> Counts:
        """Of a Hugging Face model, plain or PEFT."""
        head, shape = output_head(model), ModelShape.of(model)
        matrices = (m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and m is not head)
        attended = shape.layers * shape.heads * shape.head_size
        return cls(sum(matrices), head.weight.numel(), attended, shape.cache)

    @classmethod
    def from_sizes(
        cls,
        *,
        hidden: int,
        layers: int,
        heads: int,
        kv_heads: int,
        head_size: int,
        inner: int,
        vocabulary: int,
        rank: int = 0,
    ) -> Counts:
        """Of a model of Llama's or Qwen2's kind, with LoRA of a rank on all its linear layers."""
        q, kv = heads * head_size, kv_heads * head_size
        layer = [
            (hidden, q),
            (hidden, kv),
            (hidden, kv),
            (q, hidden),
            (hidden, inner),
            (hidden, inner),
            (inner, hidden),
        ]
        body = sum(a * b + rank * (a + b) for a, b in layer)
        return cls(layers * body, hidden * vocabulary, layers * q, 2 * layers * kv)

    def forward(self, lengths: Tensor, completions: Tensor, *, causal: bool = True) -> float:
        """FLOPs of a pass over sequences of so many tokens, with so many of them to the head: one a completion token.

        Args:
            lengths: tokens of each sequence, ``[N]``.
            completions: of which completion, ``[N]``.
            causal: count pairs of a token with itself and those before it; else all pairs, as an unfused kernel does.
        """
        lengths, completions = lengths.double(), completions.double()
        pairs = (lengths * (lengths + 1) / 2 if causal else lengths**2).sum()
        # Queries with keys, and probabilities with values: a product and a sum each.
        products = self.body * lengths.sum() + self.head * completions.sum() + 2 * self.attended * pairs
        return float(2 * products)

    def decoding_bytes(self, lengths: Tensor, completions: Tensor, itemsize: int) -> float:
        """Bytes read to draw the completions in one batch: weights once a step, and the cache of what is not done."""
        steps = int(completions.max())
        prompts = (lengths - completions).double()
        drawn = completions.double()
        cached = (drawn * prompts + drawn * (drawn + 1) / 2).sum()
        return float(itemsize * (steps * (self.body + self.head) + self.cached * cached))
