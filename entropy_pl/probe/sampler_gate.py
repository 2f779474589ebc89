"""Is the sampler's policy the scorer's? Log-probs as tokens were drawn beside those that the scorer gives them.

Importance weights carry an E-batch from the policy that drew it to θ+ηv, scored. Where the two disagree at θ already
(an adapter that acts in ``generate``, a stale cache, padding, a position regime), every number would be of a mixture of
two policies, and no error bar would tell.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from entropy_pl.peers import ALONE, Peers
from entropy_pl.policy.generated import GeneratedLogProbs
from entropy_pl.policy.micro_batches import default_batch_tokens
from entropy_pl.policy.positions import crossing, position_boundary
from entropy_pl.policy.precision import coarse_arithmetic, evaluation
from entropy_pl.policy.score import token_stats
from entropy_pl.rollout import Rollout, TokenStats

FINE, COARSE = 1e-4, 0.1
"""Nats a token allowed: float32 rounds a log-prob by 1e-6 to 1e-5, half precision by 0.03."""
LONGER = 2
"""A gate that was passed is passed anew for sequences so many times as long as any it has seen."""


class SamplerMismatchError(ValueError):
    """The sampler and the scorer are two policies, so that nothing of what was drawn can be measured."""


@dataclass(frozen=True)
class SamplerGap:
    """How far log-probs as generated are from those scored, over a few sequences.

    Args:
        sequences: how many were compared.
        tokens: how many tokens they have.
        total: Σ ``|as generated − as scored|``, in nats.
        first_tokens: sequences whose first token counts in ``first``: all that have one.
        first: the part of ``total`` that is of first tokens, which no cache has a part in.
        padded_tokens: tokens of sequences whose prompt was padded when it was sampled.
        padded: the part of ``total`` that is theirs.
        neighbours: Σ ``|scored one at a time − scored in micro-batches|``, in nats.
        allowed: largest mean difference, in nats a token.
        coarse: why it is larger than what float32 allows, in words; None where it is not.
    """

    sequences: int
    tokens: int
    total: float
    first_tokens: int
    first: float
    padded_tokens: int
    padded: float
    neighbours: float
    allowed: float = FINE
    coarse: str | None = None

    @property
    def mean(self) -> float:
        """Mean ``|log-prob as generated − as scored|``, in nats a token."""
        return self.total / max(self.tokens, 1)

    def check(self) -> None:
        """Refuse two policies.

        Raises:
            SamplerMismatchError: saying which disagree, by how much, and what to look at.
        """
        over = f"over {self.sequences} sequences, {self.tokens} tokens; up to {self.allowed:g} is rounding"
        over += f", since {self.coarse}" if self.coarse else ""
        if self.neighbours > self.allowed * max(self.tokens, 1):
            raise SamplerMismatchError(
                "expected the scorer to give a token one log-prob whatever sequences it is scored with, got a "
                f"difference of {self.neighbours / self.tokens:.3g} nats a token between one at a time and "
                f"micro-batches ({over}): the policy reads padding on the right, or chooses how to encode positions by "
                "the longest sequence of a batch (rotary scaling). Nothing can be measured of it: keep all sequences "
                "in one position regime, or correct the model's use of its attention mask"
            )
        if self.mean > self.allowed:
            raise SamplerMismatchError(
                "expected sampler and scorer to be one policy, got log-probs of the same tokens, as generated and as "
                f"scored by a forward pass, that differ by {self.mean:.3g} nats a token ({over}): {self._where()}"
            )

    def _where(self) -> str:
        allowed = self.allowed
        unpadded_tokens = self.tokens - self.padded_tokens
        unpadded = (self.total - self.padded) / max(unpadded_tokens, 1)
        if self.padded_tokens and unpadded_tokens and unpadded <= allowed < self.padded / self.padded_tokens:
            return (
                "only where the prompt was padded for sampling. Check that the policy heeds attention_mask and counts "
                "positions without the padding; sample_batch_size=1 samples without any"
            )
        if self.first / max(self.first_tokens, 1) <= allowed:
            return (
                "not at the first token but after it. Check the cache that generate keeps (stale, or of another "
                "adapter), rotary scaling or another position regime that changes with length, and what the policy "
                "keeps from one forward pass to the next"
            )
        return (
            "at the first token already. Check for an adapter that acts in generate or in forward alone, a generate "
            "that changes logits, padding, and layers that are random in eval mode"
        )


def sampler_gap(
    model: nn.Module,
    rollout: Rollout,
    generated: GeneratedLogProbs,
    *,
    max_batch_tokens: int | None = None,
) -> SamplerGap:
    """Compare the log-probs of a few sequences as they were drawn with those that the scorer gives them.

    Args:
        model: the policy, at the parameters that drew the rollout.
        rollout: what was drawn, ``[N, T]``.
        generated: that :func:`~entropy_pl.policy.sample.sample_completions` has filled while it drew it.
        max_batch_tokens: padded tokens per micro-batch; None takes what the free memory and the device suggest.

    Returns:
        The differences, in nats; its ``check()`` raises where they are those of two policies.

    Raises:
        NonFiniteError: if a logit is NaN or +inf.
        ValueError: if ``generated`` was not filled.

    Example:
        generated = GeneratedLogProbs()
        rollout = sample_completions(model, tokenizer, prompts, generated=generated)
        sampler_gap(model, rollout, generated).check()
    """
    if not len(generated.index):
        raise ValueError(
            "expected log-probs of what was drawn, got none: sample_completions(..., generated=generated) fills them"
        )
    few = rollout.select(generated.index.to(rollout.prompt_ids.device))
    with evaluation(model):
        coarse = "it was sampled in half precision" if generated.half else coarse_arithmetic(model)
        budget = max_batch_tokens or default_batch_tokens(model, few)
        together = token_stats(model, few, max_batch_tokens=budget)
        alone = token_stats(model, few, max_batch_tokens=1)
    return _gap(together, alone, generated, COARSE if coarse else FINE, coarse)


def _gap(
    together: TokenStats, alone: TokenStats, generated: GeneratedLogProbs, allowed: float, coarse: str | None
) -> SamplerGap:
    mask = together.mask
    drawn = generated.logp[:, : mask.shape[1]].to(mask.device)
    difference = torch.where(mask, (drawn - together.logp).abs(), 0.0)
    padded = generated.padded.to(mask.device)

    def total(values: Tensor) -> float:
        return float(values.sum())

    return SamplerGap(
        sequences=len(mask),
        tokens=int(mask.sum()),
        total=total(difference),
        first_tokens=int(mask[:, :1].sum()),
        first=total(difference[:, :1]),
        padded_tokens=int(mask[padded].sum()),
        padded=total(difference[padded]),
        neighbours=total((together.logp - alone.logp).abs()),
        allowed=allowed,
        coarse=coarse,
    )


class SamplerGate:
    """Lets a run's probes pass once sampler and scorer have been found to be one policy, and none before.

    The first probe with something to compare decides. What was refused stays refused, for the same reason; what has
    passed is compared again only where sequences have become much longer than any that were compared.
    """

    def __init__(self) -> None:
        self.gap: float | None = None
        """Mean ``|log-prob as generated − as scored|``, in nats a token, as compared last; None before."""
        self._refusal: str | None = None
        self._longest = 0

    def refuse_again(self) -> None:
        """Before anything is drawn: refuse what has been refused before.

        Raises:
            SamplerMismatchError: with the reason of the first time.
        """
        if self._refusal is not None:
            raise SamplerMismatchError(self._refusal)

    def check(
        self,
        model: nn.Module,
        rollout: Rollout,
        generated: GeneratedLogProbs,
        *,
        max_batch_tokens: int | None = None,
        peers: Peers = ALONE,
    ) -> float | None:
        """After E was drawn: compare, where that has not been done for sequences of this length.

        Args:
            model: the policy at θ, in the precision that scores E.
            rollout: this process's share of E; it may be empty.
            generated: of its sampling; it may be empty, where something else has drawn E.
            max_batch_tokens: padded tokens per micro-batch.
            peers: the run's processes, which all call this, and all refuse if one has to.

        Returns:
            The gap, in nats a token; None where nothing can be compared.

        Raises:
            SamplerMismatchError: if sampler and scorer are two policies, in any process.
            NonFiniteError: if a logit is NaN or +inf.
            PeerError: if another process failed.
        """
        boundary = position_boundary(model)
        few = rollout.select(generated.index.to(rollout.prompt_ids.device))
        lengths = (few.prompt_lengths + few.completion_lengths).tolist()
        said = peers.exchange((int(crossing(rollout, boundary).sum()), len(rollout), max(lengths, default=0)))
        crossed, sequences, longest = sum(s[0] for s in said), sum(s[1] for s in said), max(s[2] for s in said)
        try:
            if crossed:
                raise SamplerMismatchError(
                    f"expected every sequence of E within one position regime of the policy, which encodes all "
                    f"positions otherwise beyond {boundary} tokens (longrope), got {crossed} of {sequences} that cross "
                    "it while they are generated: their first tokens were drawn with the short factors and would be "
                    f"scored with the long ones. Keep prompt and max_new_tokens together within {boundary} tokens, or "
                    "give prompts that are longer than it"
                )
            if longest > LONGER * self._longest:
                mine = None
                if lengths:
                    mine = sampler_gap(model, rollout, generated, max_batch_tokens=max_batch_tokens)
                gap = _merged([one for one in peers.exchange(mine) if one is not None])
                self.gap, self._longest = gap.mean, longest
                gap.check()
        except SamplerMismatchError as error:
            self._refusal = str(error)
            raise
        return self.gap


def _merged(gaps: list[SamplerGap]) -> SamplerGap:
    """Of several processes as one."""
    words = ("allowed", "coarse")
    sums = {f.name: sum(getattr(gap, f.name) for gap in gaps) for f in fields(SamplerGap) if f.name not in words}
    coarsest = max(gaps, key=lambda gap: gap.allowed)
    return SamplerGap(**sums, allowed=coarsest.allowed, coarse=coarsest.coarse)
