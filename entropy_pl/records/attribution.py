"""What a record holds of an attribution: a step's change of the entropy, split into parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from entropy_pl.records.estimates import NO_ESTIMATE, EstimateRecord
from entropy_pl.records.stored import Stored, detail


@dataclass(frozen=True, kw_only=True)
class OverURecord(Stored):
    """What the error bars over the prompts of the U-batch rest on.

    Args:
        prompts: how many prompts there are.
        absent: why there are no such error bars, in words; None where there are.
    """

    prompts: int | None = None
    absent: str | None = detail()


@dataclass(frozen=True, kw_only=True)
class DecileRecord(Stored):
    """A tenth of the U-batch's tokens, by their probability; its sums by sign of the advantage are in ``extra``.

    Args:
        logp_low: the least log π in it, nats; None where it is empty.
        logp_high: the largest.
        tokens: how many tokens it holds.
    """

    logp_low: float | None = None
    logp_high: float | None = None
    tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class TokenRecord(Stored):
    """One of the tokens that changed the entropy most.

    Args:
        text: the token.
        context: what stands before it in its completion.
        sequence: row of its completion in the U-batch, from 0.
        position: its place in the completion, from 0.
        value: what it did to the entropy, nats.
        stderr: standard error over the E-batch; None unless it was asked for.
        logp: its log π before the step, nats.
        entropy: of the distribution it was drawn from, nats.
        advantage: of its completion; None where that is not known.
    """

    text: str | None = detail()
    context: str | None = detail()
    sequence: int | None = None
    position: int | None = None
    value: float | None = None
    stderr: float | None = None
    logp: float | None = None
    entropy: float | None = None
    advantage: float | None = None


NOT_SAID = OverURecord()


@dataclass(frozen=True, kw_only=True)
class AttributionRecord(Stored):
    """What the parts of a step did to the entropy, to first order, in nats of the step taken.

    ``momentum``, ``weight_decay``, ``tokens`` and ``remainder_sum`` add up to ``first_order``.

    Args:
        first_order: δH₁ of the whole step.
        momentum: of what the optimizer remembered of earlier gradients.
        weight_decay: of the decay.
        gradient: of this step's gradient, which ``tokens`` explain but for the remainder.
        tokens: of all tokens of the U-batch.
        by_sign: of the tokens by sign of the advantage: ``positive_advantage``, ``negative_advantage`` and
            ``zero_advantage``.
        remainder: what neither explains, by name.
        remainder_sum: the remainders together.
        total: momentum, weight decay and tokens together.
        over_u: what the error bars over the U-batch rest on.
        tokens_by_sign: how many tokens by sign of the advantage.
        by_decile: the tokens in ten groups by their probability.
        top_tokens: the tokens that changed the entropy most.
    """

    first_order: EstimateRecord = NO_ESTIMATE
    momentum: EstimateRecord = NO_ESTIMATE
    weight_decay: EstimateRecord = NO_ESTIMATE
    gradient: EstimateRecord = NO_ESTIMATE
    tokens: EstimateRecord = NO_ESTIMATE
    by_sign: Mapping[str, EstimateRecord] = field(default_factory=dict)
    remainder: Mapping[str, float | None] = field(default_factory=dict)
    remainder_sum: EstimateRecord = NO_ESTIMATE
    total: float | None = None
    over_u: OverURecord = NOT_SAID
    tokens_by_sign: Mapping[str, int] = detail({})
    by_decile: tuple[DecileRecord, ...] = detail(())
    top_tokens: tuple[TokenRecord, ...] = detail(())

    @property
    def parts(self) -> dict[str, EstimateRecord]:
        """Every part by the name under which it is shown; ``remainder`` is the sum, signs of the advantage are last."""
        return {
            "momentum": self.momentum,
            "weight_decay": self.weight_decay,
            "gradient": self.gradient,
            "tokens": self.tokens,
            "remainder": self.remainder_sum,
            "first_order": self.first_order,
            **self.by_sign,
        }

    def part(self, name: str) -> EstimateRecord:
        """Return one of :attr:`parts`, an empty estimate where the record has none of that name.

        Args:
            name: of the part.
        """
        return self.parts.get(name, NO_ESTIMATE)


NO_ATTRIBUTION = AttributionRecord()
