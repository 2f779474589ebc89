"""What a probe will take, said before it is taken."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import nn

from entropy_pl.policy.adapter import trainable_parameters
from entropy_pl.policy.head import head_chunk
from entropy_pl.policy.logits import stats_chunk
from entropy_pl.policy.micro_batches import default_batch_tokens, model_device
from entropy_pl.policy.precision import is_quantized
from entropy_pl.policy.shape import ModelShape
from entropy_pl.probe.engine import EntropyProbe

READING_BYTES = 48  # a number: Δθ, AdamW's three parts of it, and what is left of their sum, in float64
STATS_TEMPORARIES = 4  # of a chunk of logits in the entropy's dtype: wide, shifted, exponentials, and their products


@dataclass(frozen=True)
class ProbeMemory:
    """Bytes that a probe needs in one process, beside what the run holds anyway.

    Args:
        snapshot: θ before the step, in the parameters' own dtype; kept from the step's start to the probe's end.
        displaced: θ+ηv, in float32 or better.
        widened: parameters narrower than the probe's precision, held in it for the time.
        cache: keys and values while sampling.
        scoring: one micro-batch's activations, a chunk of its logits, and what softmax and entropy make of them.
        reading: the update's parts of one parameter in float64, before and after the passes.
        attribution: two gradients in float64, and the graph behind one micro-batch's logits, or θ+ηv and the scoring of
            one, whichever is more; 0 without one.
    """

    snapshot: int
    displaced: int
    widened: int
    cache: int
    scoring: int
    reading: int
    attribution: int = 0

    @property
    def total(self) -> int:
        """At the worst moment: reading, sampling, scoring and attribution do not overlap."""
        working = max(self.cache, self.displaced + self.scoring, self.attribution)
        return self.snapshot + max(self.widened + working, self.reading)

    def __str__(self) -> str:
        parts = {name: amount for name, amount in asdict(self).items() if amount >= 0.01 * self.total}
        listed = ", ".join(f"{name} {_shown(amount)}" for name, amount in parts.items())
        return f"{_shown(self.total)} at the worst moment (not all at once: {listed})"


def probe_memory(
    model: nn.Module,
    probe: EntropyProbe,
    *,
    rows: int,
    prompt_tokens: int,
    max_new_tokens: int,
    attribution: bool = False,
    moments: bool = False,
) -> ProbeMemory:
    """The memory of one probe, by what its shapes say; docs/scaling.md has the formula.

    Args:
        model: the policy, as it is trained.
        probe: its precision and its token budget.
        rows: completions sampled at once in this process.
        prompt_tokens: of the longest prompt.
        max_new_tokens: of the longest completion.
        attribution: whether the change is attributed to tokens; the U-batch's micro-batches are no larger than E's.
        moments: whether Adam's moments of before the step are kept, for counterfactual steps.

    Raises:
        ValueError: if the policy has no trainable parameter.
    """
    wide = getattr(torch, probe.precision)
    trainable = trainable_parameters(model).values()
    floating = [p for p in model.parameters() if p.is_floating_point() and not is_quantized(p)]
    shape, kind = ModelShape.of(model), model_device(model).type
    length = prompt_tokens + max_new_tokens

    def micro_batch(graph: bool) -> tuple[int, int]:
        """Tokens of one, and how many of them the head makes logits of."""
        most = probe.max_batch_tokens or default_batch_tokens(model, graph=graph)
        tokens = min(max(most, length), rows * length)  # a sequence longer than the budget has one to itself
        return tokens, tokens * max_new_tokens // length

    tokens, scored = micro_batch(graph=False)
    in_graph, with_logits = micro_batch(graph=True)
    entropy_dtype = getattr(torch, probe.entropy_dtype)
    at_once = min(scored, head_chunk(shape.vocabulary, kind, wide))
    chunk = at_once * shape.vocabulary
    stats = min(at_once, stats_chunk(shape.vocabulary, kind, entropy_dtype)) * shape.vocabulary * entropy_dtype.itemsize
    numbers = sum(p.numel() for p in trainable)
    vectors = numbers * 2 * torch.float64.itemsize
    graph = in_graph * shape.graph_of_body + with_logits * shape.graph_of_head
    displaced = sum(p.numel() * max(p.element_size(), wide.itemsize) for p in trainable)
    scoring = (chunk + tokens * shape.activations) * wide.itemsize + STATS_TEMPORARIES * stats
    return ProbeMemory(
        snapshot=(1 + 2 * moments) * sum(p.numel() * p.element_size() for p in trainable),
        displaced=displaced,
        widened=sum(p.numel() * wide.itemsize for p in floating if p.element_size() < wide.itemsize),
        cache=shape.cache * rows * length * wide.itemsize,
        scoring=scoring,
        reading=READING_BYTES * max(p.numel() for p in trainable),
        attribution=(vectors + max(graph * wide.itemsize, displaced + scoring)) if attribution else 0,
    )


def _shown(amount: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.3g} {unit}"
        amount /= 1024
    return f"{amount:.3g} GiB"
