"""The record that a probe or an offline measurement leaves behind, with a field for every key of its JSON line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from entropy_pl.records.attribution import NO_ATTRIBUTION, AttributionRecord
from entropy_pl.records.estimates import (
    NO_ESTIMATE,
    NO_POINT,
    CounterfactualRecord,
    EstimateRecord,
    PointRecord,
    PowerLawRecord,
    PredictorRecord,
    SymmetricRecord,
)
from entropy_pl.records.stored import DETAIL, Stored, detail, wrong_kind

SCHEMA = 2
"""Version of the record format, written as ``schema``: 2 since the attribution is in nats of the step taken."""

LARGEST_STEP = 2**53  # beyond it a float, which is what figures are made of, has no room for every whole number

Json = dict[str, Any]
"""A record as JSON has it, which is what a file's line is read as."""


@dataclass(frozen=True, kw_only=True)
class PromptsRecord(Stored):
    """The E prompts of a probe.

    Args:
        count: how many there are.
        sha256: of their texts.
        in_u: how many of the pool the run trains on; None where that is not known.
    """

    count: int | None = None
    sha256: str | None = None
    in_u: int | None = None


@dataclass(frozen=True, kw_only=True)
class MemoryRecord(Stored):
    """What a probe held beside the run.

    Args:
        kind: ``cuda``, or ``resident``, the process's resident set.
        added_bytes: the most that it held.
    """

    kind: str | None = None
    added_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class LeftOutRecord(Stored):
    """What the trainable parameters that are not in the update amount to.

    Args:
        parameters: their share of the policy's trainable parameters.
        change: norm of their change in the training step, as a share of all parameters'.
    """

    parameters: float | None = None
    change: float | None = None


NO_LINE, NO_PROMPTS, NO_MEMORY, NOT_LEFT_OUT = PowerLawRecord(), PromptsRecord(), MemoryRecord(), LeftOutRecord()


@dataclass(frozen=True, kw_only=True)
class Record(Stored):
    """One probe, or one offline measurement.

    A probe without a result has the fields up to ``lr`` alone. Entropies are in nats per token or per sequence, as
    ``normalize`` says; η and ``eta_star`` are learning rates.

    Args:
        schema: version of the record format.
        kind: ``probe``, or ``measurement`` for an offline one.
        status: ``ok``, ``no_movement``, ``skipped`` or ``failed``.
        message: what a probe without a result has to say.
        step: the optimizer step, from 0.
        lr: learning rate of the step.
        warnings: what a reader must know before believing the numbers, a sentence each.
        normalize: ``per_token`` or ``per_sequence``.
        confidence: level of every interval.
        weighting: of the importance weights.
        integrand: whose mean the entropy is.
        baseline: what is subtracted from the score term.
        gae_lambda: λ of the baseline ``gae``.
        clip_log_weight: bound on the absolute log-weight; None: there is none.
        temperature: at which the E-batch was drawn.
        precision: of the forward pass.
        entropy_dtype: of softmax, log-prob and entropy.
        method: how derivatives were made.
        difference_step: h of the central difference behind them, in η.
        difference_error: what differences add to the first order's error, nats per unit η.
        roughness: how far the policy is from smooth along the update; above 0.1 it is not.
        entropy: H before the step.
        first_order: ⟨∇H, v⟩, nats per unit η.
        second_order: v'∇²H v, nats per unit η².
        eta_star: η at which first and second order are equal in size.
        eta_star_ci_low: lower end of its interval.
        eta_star_ci_high: upper end; None where it is unbounded.
        sweep: ΔH and δH₁ at every step size, in ascending order.
        untrustworthy_from: the smallest ``|η|`` of the sweep whose ΔH must not be believed; None where there is none.
        symmetric: pairs ±η of the sweep.
        power_law: the line through ``log |ΔH|`` over log η.
        update_norm: norm of the update per unit learning rate.
        update_components: norm of each of its components, where the optimizer's step could be decomposed.
        update_gap: what the components leave unexplained, relative to ``update_norm``.
        update_split_absent: why there are no components, in words.
        update_left_out: what the trainable parameters outside of the update amount to.
        expected_reward: J, the mean reward of the E-batch.
        exchange_rate: ΔH/ΔJ of the step taken, nats per unit of reward.
        attribution: what the parts of the step did.
        predictors: how well each predictor from the literature does, by name.
        counterfactuals: what the step would have been under another loss, by name of the loss.
        absent: what was asked for and is not there, by name, with the reason.
        reward: mean reward of the training batch, where the run logs one.
        e_prompts: the E prompts.
        completions_per_prompt: completions of the E-batch that share a prompt.
        mean_completion_length: of the E-batch, tokens.
        processes: that shared the E-batch.
        device: that an offline measurement ran on.
        sampler_gap: mean ``|log-prob as generated − as scored|`` of a few sequences, nats per token.
        memory: what the probe held beside the run.
        seconds: wall time by phase.
        timing: the same of an offline measurement.
        overhead: seconds of all probes so far over those of the run without them.
        versions: of the libraries behind an offline measurement.
    """

    schema: int | None = None
    kind: str = "probe"
    status: str = "ok"
    message: str | None = None
    step: int | None = None
    lr: float | None = None
    warnings: tuple[str, ...] = ()
    normalize: str | None = None
    confidence: float | None = None
    weighting: str | None = detail()
    integrand: str | None = detail()
    baseline: str | None = detail()
    gae_lambda: float | None = None
    clip_log_weight: float | None = None
    temperature: float | None = None
    precision: str | None = detail()
    entropy_dtype: str | None = detail()
    method: str | None = detail()
    difference_step: float | None = None
    difference_error: float | None = None
    roughness: float | None = None
    entropy: EstimateRecord = NO_ESTIMATE
    first_order: EstimateRecord = NO_ESTIMATE
    second_order: EstimateRecord = NO_ESTIMATE
    eta_star: float | None = None
    eta_star_ci_low: float | None = None
    eta_star_ci_high: float | None = None
    sweep: tuple[PointRecord, ...] = ()
    untrustworthy_from: float | None = None
    symmetric: tuple[SymmetricRecord, ...] = detail(())
    power_law: PowerLawRecord = NO_LINE
    update_norm: float | None = None
    update_components: Mapping[str, float | None] = detail({})
    update_gap: float | None = None
    update_split_absent: str | None = detail()
    update_left_out: LeftOutRecord = field(default=NOT_LEFT_OUT, metadata=DETAIL)
    expected_reward: EstimateRecord = NO_ESTIMATE
    exchange_rate: EstimateRecord = NO_ESTIMATE
    attribution: AttributionRecord = NO_ATTRIBUTION
    predictors: Mapping[str, PredictorRecord] = field(default_factory=dict)
    counterfactuals: Mapping[str, CounterfactualRecord] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)
    reward: float | None = None
    e_prompts: PromptsRecord = field(default=NO_PROMPTS, metadata=DETAIL)
    completions_per_prompt: int | None = None
    mean_completion_length: float | None = None
    processes: int | None = None
    device: str | None = detail()
    sampler_gap: float | None = None
    memory: MemoryRecord = field(default=NO_MEMORY, metadata=DETAIL)
    seconds: Mapping[str, float | None] = detail({})
    timing: Mapping[str, float | None] = detail({})
    overhead: float | None = None
    versions: Mapping[str, str] = detail({})

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Record:
        """Read a record as JSON has it.

        Args:
            found: of this version's schema; numbers may be NumPy's as well.

        Raises:
            ValueError: naming the first key that holds something of another kind, what was expected and what came.
        """
        step, confidence = found.get("step"), found.get("confidence")
        if step is not None and not (type(step) is int and abs(step) < LARGEST_STEP):
            raise wrong_kind("step", f"a whole number below {LARGEST_STEP}", step)
        if confidence is not None and (isinstance(confidence, bool) or not isinstance(confidence, int | float)):
            raise wrong_kind("confidence", "a number", confidence)
        return super().from_json(found)

    @classmethod
    def of(cls, record: Record | Mapping[str, Any]) -> Record:
        """Return a record that is given in either form.

        Args:
            record: as it is, or as JSON has it.

        Raises:
            ValueError: as :meth:`from_json`.
        """
        return record if isinstance(record, Record) else cls.from_json(record)

    @property
    def is_ok(self) -> bool:
        """Whether the probe has a result."""
        return self.status == "ok"

    @property
    def is_measurement(self) -> bool:
        """Whether the record is an offline measurement's rather than a probe's."""
        return self.kind == "measurement"

    @property
    def taken(self) -> PointRecord:
        """The sweep's point at the step that the optimizer took; an empty one where that was not measured."""
        return next((point for point in self.sweep if point.taken), NO_POINT) if self.is_ok else NO_POINT


AnyRecord = Record | Mapping[str, Any]
"""A record, or one as JSON has it: what everything that shows records takes."""
